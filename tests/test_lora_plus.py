"""LoRA+'s laws: which parameter learns how fast, and the same steps as peft's.

A law that takes only `lora_plus`, the module, is run again by tests/test_mutations.py
on broken copies of lora_plus.py. Messages name the mistake that gives the symptom.
"""

import copy
import math

import pytest
import torch
from common import (
    ALL,
    BATCH,
    IDS,
    MODELS,
    assert_one_sentence,
    assert_unchanged,
    bert,
    net,
    outputs,
    snapshot,
    t5,
    trainable,
)
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from peftlab import dora, lora
from peftlab import lora_plus as reference

FREE = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)  # what both optimizers get


@pytest.fixture
def lora_plus():
    return reference


def fill(model, seed=1):
    """Random B's, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p.dtype) / 8
    return model


def rates(model, groups):
    """{name: learning rate} of a model's parameters in an optimizer's groups."""
    names = {id(p): n for n, p in model.named_parameters()}
    pairs = [(names[id(p)], g["lr"]) for g in groups for p in g["params"]]
    assert len(dict(pairs)) == len(pairs), "a parameter is in the groups twice"
    return dict(pairs)


def one_step(model, optimizer):
    optimizer.zero_grad()
    (model(IDS) - 1).pow(2).mean().backward()
    optimizer.step()


# The laws


def test_the_groups_hold_each_trainable_parameter_once(lora_plus):
    for bias in ("none", "all", "lora_only"):
        model = lora.add(net(), ALL, bias=bias)
        found = rates(model, lora_plus.parameter_groups(model, 1e-4))
        assert found.keys() == trainable(model), "all that trains, and nothing frozen"


def test_b_learns_ratio_times_as_fast_as_a(lora_plus):
    model = lora.add(net(), ALL)
    for lr, ratio in ((1e-4, 16), (0.5, 4), (2, 1), (1e-3, 0.5)):
        found = rates(model, lora_plus.parameter_groups(model, lr, ratio))
        fast = {n for n, rate in found.items() if rate == lr * ratio}
        slow = {n for n, rate in found.items() if rate == lr}
        assert {n for n in found if n.endswith("lora_B")} <= fast, (
            "B's rate is lr·ratio"
        )
        assert {n for n in found if n.endswith("lora_A")} <= slow, "A's rate is lr"


def test_the_usual_ratio_is_16(lora_plus):
    model = lora.add(net(), ALL)
    slow, fast = lora_plus.parameter_groups(model, 1e-4)
    assert fast["lr"] / slow["lr"] == 16
    assert slow.keys() == fast.keys() == {"params", "lr"}, "the rest is the optimizer's"


def test_all_but_b_learns_at_the_slow_rate(lora_plus):
    model = lora.add(net(), ALL[:2], bias="all")
    model.lm_head.requires_grad_(True)  # a new head
    found = rates(model, lora_plus.parameter_groups(model, 1e-4, 8))
    fast = {n for n, rate in found.items() if rate > 1e-4}
    assert fast == {"q_proj.lora_B", "c_attn.lora_B"}, (
        "biases and heads learn at lr: only B is fast"
    )
    model = dora.add(net(), ALL)
    found = rates(model, lora_plus.parameter_groups(model, 1e-4, 8))
    fast = {n for n, rate in found.items() if rate > 1e-4}
    assert fast == {f"{n}.lora_B" for n in ALL}, "and DoRA's lengths learn at lr"


def test_b_is_known_by_its_whole_name(lora_plus):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_B = nn.Parameter(torch.zeros(2, 2))
            self.lora_Bias = nn.Parameter(torch.zeros(2))
            self.my_lora_B = nn.Parameter(torch.zeros(2))
            self.lora_b = nn.Parameter(torch.zeros(2))
            # peft's, for an embedding: it starts at random, its A at zero
            self.lora_embedding_B = nn.ParameterDict({"x": torch.zeros(2)})

    for model in (Layer(), nn.ModuleDict({"up": Layer()})):
        slow, fast = lora_plus.parameter_groups(model, 1.0)
        assert [p.dim() for p in fast["params"]] == [2] and len(slow["params"]) == 4


def test_the_first_step_of_b_is_ratio_times_that_of_lora(lora_plus):
    for make in (
        torch.optim.SGD,
        lambda groups, **k: torch.optim.AdamW(groups, **FREE),
    ):
        changes = []
        for ratio in (1, 16):
            torch.manual_seed(0)
            model = lora.add(net(), ALL)
            start = {n: t.clone() for n, t in lora.state_dict(model).items()}
            one_step(model, make(lora_plus.parameter_groups(model, 1e-3, ratio)))
            own = lora.state_dict(model)
            changes.append({n: t - start[n] for n, t in own.items()})
        for name, change in changes[1].items():
            if name.endswith("lora_B"):
                assert change.any(), f"{name} did not move"
                torch.testing.assert_close(change, 16 * changes[0][name])
            else:
                assert torch.equal(change, changes[0][name]), "A's step is LoRA's"


def test_ratio_one_is_lora(lora_plus):
    results = []
    for plus in (False, True):
        torch.manual_seed(0)
        model = lora.add(net(), ALL, bias="all")
        own = [p for p in model.parameters() if p.requires_grad]
        groups = lora_plus.parameter_groups(model, 1e-2, 1) if plus else own
        optimizer = torch.optim.AdamW(groups, lr=1e-2, **FREE)
        for _ in range(3):
            one_step(model, optimizer)
        results.append(model(IDS))
    assert torch.equal(*results)


def test_a_scheduler_keeps_the_ratio(lora_plus):
    model = fill(lora.add(net(), ALL))
    optimizer = torch.optim.AdamW(lora_plus.parameter_groups(model, 0.1, 8))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 / (1 + step)
    )
    for step in range(4):
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert math.isclose(slow, 0.1 / (1 + step)) and math.isclose(fast, 8 * slow)
        one_step(model, optimizer)
        scheduler.step()


def test_no_b_that_trains_is_refused(lora_plus):
    frozen, merged = lora.add(net(), ALL), lora.merge(lora.add(net(), ALL))
    for name, p in frozen.named_parameters():
        p.requires_grad_(not name.endswith("lora_B"))
    for model in (net(), merged, frozen):
        before = snapshot(model)
        with pytest.raises(ValueError, match="lora_B") as error:
            lora_plus.parameter_groups(model, 1e-4)
        assert_one_sentence(error)
        assert_unchanged(model, before)


def test_b_alone_may_train(lora_plus):
    model = lora.add(net(), ALL)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("lora_B"))
    start = {n: t.clone() for n, t in lora.state_dict(model).items()}
    one_step(model, torch.optim.AdamW(lora_plus.parameter_groups(model, 1e-3)))
    for name, t in lora.state_dict(model).items():
        assert torch.equal(t, start[name]) is name.endswith("lora_A")


def test_the_model_is_left_as_it_was(lora_plus):
    model = lora.add(net(), ALL, bias="lora_only")
    before = snapshot(model)
    lora_plus.parameter_groups(model, 1e-4)
    assert_unchanged(model, before)


def test_a_b_of_peft_is_known_too(lora_plus):
    config = LoraConfig(
        target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model = get_peft_model(bert(), config)
    found = rates(model, lora_plus.parameter_groups(model, 1e-4, 4))
    assert found.keys() == trainable(model) and len(found) == 2 * 4 + 2
    fast = {n for n, rate in found.items() if rate > 1e-4}
    assert fast == {n for n in found if "lora_B" in n} and len(fast) == 4


# Bad input: one sentence each, and the model as it was

WRONG = {
    "0": 0,
    "-1": -1,
    "nan": math.nan,
    "inf": math.inf,
    "a string": "16",
    "None": None,
    "True": True,
    "a list": [1e-4],
    "a tensor": torch.tensor(1.0),
    "a complex number": 1j,
}
BAD = {
    f"{name}={what}": {name: WRONG[what]} for name in ("lr", "ratio") for what in WRONG
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(case):
    model = lora.add(net(), ALL)
    before, name = snapshot(model), case.partition("=")[0]
    with pytest.raises(ValueError, match=f"^{name} must be a positive number") as error:
        reference.parameter_groups(model, **{"lr": 1e-4, **BAD[case]})
    assert_one_sentence(error)
    assert_unchanged(model, before)


# The oracle: peft


def peft_twin(model, paths, **options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=paths, **options)
    twin = get_peft_model(copy.deepcopy(model), config).eval()
    names = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    short = {n.replace(".default.weight", ""): p for n, p in names.items()}
    return twin, {n.removeprefix("base_model.model."): p for n, p in short.items()}


@pytest.mark.parametrize("name", [*MODELS, "t5"])
def test_adamw_makes_the_steps_that_pefts_optimizer_makes(name):
    model = {**MODELS, "t5": t5}[name]().double()  # else Adam turns noise into steps
    plain = copy.deepcopy(model)
    fill(lora.add(model, "all-linear", r=4, alpha=8))
    ours = lora.state_dict(model, keep_vars=True)
    paths = [n.removesuffix(".lora_A") for n in ours if n.endswith(".lora_A")]
    twin, theirs = peft_twin(plain, paths)
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for n, p in theirs.items():
            p.copy_(ours[n])
    start = {n: p.detach().clone() for n, p in ours.items()}
    groups = reference.parameter_groups(model, 1e-3, 16)
    settings = dict(lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.0, **FREE)
    settings["weight_decay"] = 0.0
    optimizers = {
        model: torch.optim.AdamW(groups, **FREE),
        twin: create_loraplus_optimizer(twin, torch.optim.AdamW, **settings),
    }
    for step in range(3):
        for m, optimizer in optimizers.items():
            optimizer.zero_grad()
            outputs(m).sin().sum().backward()
            optimizer.step()
        for n, p in ours.items():
            gap = (p - theirs[n]).abs().max()
            assert gap < 1e-6, f"step {step}: {n} differs from peft's by {gap:.1e}"
    for n, p in ours.items():
        moved = (p - start[n]).abs().max()
        assert moved > (1e-2 if n.endswith("lora_B") else 1e-3), f"{n} hardly moved"


def test_peft_gives_biases_the_fast_rate_and_embeddings_their_own():
    """Where we part from peft, as the docstring says."""
    config = LoraConfig(target_modules=["query", "word_embeddings"], bias="lora_only")
    model = get_peft_model(bert(), config)
    settings = dict(lr=1e-4, loraplus_lr_ratio=16, loraplus_lr_embedding=3e-6)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **settings)
    theirs = rates(model, optimizer.param_groups)
    ours = rates(model, reference.parameter_groups(model, 1e-4, 16))
    assert ours.keys() == theirs.keys()
    apart = {n for n in ours if not math.isclose(ours[n], theirs[n])}
    assert apart == {n for n in ours if n.endswith("bias") or "embedding_" in n}
    assert {ours[n] for n in apart} == {1e-4}
    assert {theirs[n] for n in apart} == {16e-4, 3e-6}
    start = {n: bool(p.any()) for n, p in model.named_parameters() if n in apart}
    for name, random in start.items():  # why an embedding's B is not fast
        if "lora_embedding_" in name:
            assert random is ("lora_embedding_B" in name), name


def test_a_trained_adapter_is_plain_loras():
    model = lora.add(MODELS["tiny-decoder"](), ["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW(reference.parameter_groups(model, 1e-3))
    for _ in range(2):
        optimizer.zero_grad()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        tuned = outputs(model)
        gap = (outputs(lora.merge(model)) - tuned).abs().max()
    assert gap < 1e-4


# lora_plus.py copied alone, for tests/test_standalone.py

ALONE = """
import lora_plus
from torch import nn
model = nn.ModuleDict({"up": nn.Linear(2, 2)})
model["up"].lora_A = nn.Parameter(torch.ones(1, 2))
model["up"].lora_B = nn.Parameter(torch.zeros(2, 1))
model["up"].weight.requires_grad_(False)
groups = lora_plus.parameter_groups(model, 0.25, ratio=8)
assert [g["lr"] for g in groups] == [0.25, 2.0]
assert [len(g["params"]) for g in groups] == [2, 1]
for group in groups:
    for p in group["params"]:
        p.data -= group["lr"]
assert torch.equal(model["up"].lora_A, torch.full((1, 2), 0.75))
assert torch.equal(model["up"].lora_B, torch.full((2, 1), -2.0))
"""

# Broken copies, for tests/test_mutations.py

GROUPS = '[{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]'
IS_B = '"lora_B" in name.split(".")'
ONCE = test_the_groups_hold_each_trainable_parameter_once
RATES = test_b_learns_ratio_times_as_fast_as_a
SLOW = test_all_but_b_learns_at_the_slow_rate
STEP = test_the_first_step_of_b_is_ratio_times_that_of_lora
NAME = test_b_is_known_by_its_whole_name

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "the ratio is on A": (
        RATES,
        {GROUPS: '[{"params": slow, "lr": lr * ratio}, {"params": fast, "lr": lr}]'},
    ),
    "A is slowed by the ratio": (
        RATES,
        {GROUPS: '[{"params": slow, "lr": lr / ratio}, {"params": fast, "lr": lr}]'},
    ),
    "the ratio is forgotten": (RATES, {"lr * ratio": "lr"}),
    "the ratio is added": (RATES, {"lr * ratio": "lr + ratio"}),
    "the ratio is not the argument": (RATES, {"lr * ratio": "lr * 16"}),
    "the ratio's square": (STEP, {"lr * ratio": "lr * ratio**2"}),
    "the groups are swapped": (
        STEP,
        {GROUPS: '[{"params": fast, "lr": lr}, {"params": slow, "lr": lr * ratio}]'},
    ),
    "another ratio by default": (test_the_usual_ratio_is_16, {"ratio=16": "ratio=8"}),
    "the groups bring a weight decay along": (
        test_the_usual_ratio_is_16,
        {'"lr": lr}, {': '"lr": lr, "weight_decay": 0.0}, {'},
    ),
    "frozen parameters are in the groups": (ONCE, {" if p.requires_grad": ""}),
    "B is in both groups": (ONCE, {" if not _is_b(n)]": "]"}),
    "B is in no group": (ONCE, {'{"params": fast,': '{"params": fast[:0],'}),
    "biases are left out": (
        ONCE,
        {"if p.requires_grad}": 'if p.requires_grad and "bias" not in n}'},
    ),
    "biases are fast, as in peft": (
        SLOW,
        {IS_B: f'{IS_B} or name.endswith("bias")'},
    ),
    "all but A is fast": (SLOW, {IS_B: '"lora_A" not in name'}),
    "vectors are fast, as in peft": (
        SLOW,
        {"if _is_b(n)]": "if _is_b(n) or p.dim() < 2]"},
    ),
    "a part of a name is enough": (NAME, {IS_B: '"lora_B" in name'}),
    "the end of a name is enough": (NAME, {IS_B: 'name.endswith("lora_B")'}),
    "upper and lower case are one": (
        NAME,
        {IS_B: '"lora_b" in name.lower().split(".")'},
    ),
    "an embedding's B is fast": (
        NAME,
        {IS_B: 'bool({"lora_B", "lora_embedding_B"} & {*name.split(".")})'},
    ),
    "all that peft calls default is fast": (
        test_a_b_of_peft_is_known_too,
        {IS_B: 'bool({"lora_B", "default"} & {*name.split(".")})'},
    ),
    "ratio 1 is not LoRA": (test_ratio_one_is_lora, {"lr * ratio": "lr * (ratio + 1)"}),
    "the rate is capped": (
        test_a_scheduler_keeps_the_ratio,
        {"lr * ratio": "min(lr * ratio, 0.5)"},
    ),
    "no B, and nothing said": (
        test_no_b_that_trains_is_refused,
        {"if not fast:": "if False:"},
    ),
    "a frozen B will do": (
        test_no_b_that_trains_is_refused,
        {"if not fast:": "if not any(_is_b(n) for n, _ in model.named_parameters()):"},
    ),
    "A must train": (
        test_b_alone_may_train,
        {
            '"params": slow,': '"params": [p.requires_grad_(True) for n, p in '
            'model.named_parameters() if "lora_A" in n],'
        },
    ),
    "B is made to train": (
        test_the_model_is_left_as_it_was,
        {"    if not fast:": "    model.requires_grad_(True)\n    if not fast:"},
    ),
}
