"""LoRA+'s laws: which parameter learns how fast, and the same steps as peft's.

A law that takes only `lora_plus`, the module, is run again by tests/test_mutations.py
on broken copies of lora_plus.py. Messages name the mistake that gives the symptom.
"""

import copy
import functools
import math

import pytest
import torch
from common import (
    ALL,
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
    models = [lora.add(net(), ALL, bias=bias) for bias in ("none", "all", "lora_only")]
    models.append(lora.add(net(), ALL))
    for name, p in models[-1].named_parameters():
        p.requires_grad_(name.endswith("lora_B"))  # B alone may train
    for model in models:
        before = snapshot(model)
        found = rates(model, lora_plus.parameter_groups(model, 1e-4))
        assert found.keys() == trainable(model), "all that trains, and nothing frozen"
        assert_unchanged(model, before)


def test_b_alone_learns_ratio_times_as_fast(lora_plus):
    headed = lora.add(net(), ALL, bias="all")
    headed.lm_head.requires_grad_(True)  # a new head
    whole = dict(modules_to_save=["classifier"])
    config = LoraConfig(target_modules=["query", "value"], **whole)
    pefts = get_peft_model(bert(), config)
    for model in (headed, dora.add(net(), ALL), pefts):
        for lr, ratio in ((1e-4, 16), (0.5, 4), (2, 1.5), (1e-3, 0.5)):
            found = rates(model, lora_plus.parameter_groups(model, lr, ratio))
            assert found.keys() == trainable(model)
            fast = {n for n, rate in found.items() if rate == lr * ratio}
            slow = {n for n, rate in found.items() if rate == lr}
            assert fast == {n for n in found if "lora_B" in n}, "B's rate is lr * ratio"
            assert len(fast) == 4 and fast | slow == found.keys(), (
                "A, biases, heads, lengths learn at lr"
            )


def test_the_usual_ratio_is_16(lora_plus):
    slow, fast = lora_plus.parameter_groups(lora.add(net(), ALL), 1e-4)
    assert fast["lr"] / slow["lr"] == 16
    assert slow.keys() == fast.keys() == {"params", "lr"}, "the rest is the optimizer's"


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
    def change(make, ratio):
        torch.manual_seed(0)
        model = lora.add(net(), ALL)
        before = {n: t.clone() for n, t in lora.state_dict(model).items()}
        one_step(model, make(lora_plus.parameter_groups(model, 1e-3, ratio)))
        return {n: t - before[n] for n, t in lora.state_dict(model).items()}

    for make in (torch.optim.SGD, functools.partial(torch.optim.AdamW, **FREE)):
        plain = change(make, 1)
        for name, moved in change(make, 16).items():
            if name.endswith("lora_B"):
                assert moved.any(), f"{name} did not move"
                torch.testing.assert_close(moved, 16 * plain[name])
            else:
                assert torch.equal(moved, plain[name]), "A's step is LoRA's"


# Bad input: one sentence each, and the model as it was


def refused(module, model, **settings):
    """The sentence with which it refuses, the model unchanged."""
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        module.parameter_groups(model, **{"lr": 1e-4, **settings})
    assert_one_sentence(error)
    assert_unchanged(model, before)
    return str(error.value)


def test_no_b_that_trains_is_refused(lora_plus):
    frozen = lora.add(net(), ALL)
    for name, p in frozen.named_parameters():
        p.requires_grad_(not name.endswith("lora_B"))
    for model in (net(), lora.merge(lora.add(net(), ALL)), frozen):
        assert "lora_B" in refused(lora_plus, model)


WRONG = [0, -1, math.nan, math.inf, 10**400, "16", None, True, [1e-4], 1j]
WRONG += [torch.tensor(1.0), torch.ones(3, 3)]


def test_bad_settings_get_one_sentence_and_change_nothing(lora_plus):
    model = lora.add(net(), ALL)
    for name in ("lr", "ratio"):
        for value in WRONG:
            message = refused(lora_plus, model, **{name: value})
            assert message.startswith(f"{name} must be a positive number"), value
    for lr, ratio in ((1e299, 1e299), (10**299, 1e200), (1e-200, 1e-200)):
        assert "lr * ratio must be" in refused(lora_plus, model, lr=lr, ratio=ratio)
    for what in (None, "a model", [model]):
        with pytest.raises(ValueError, match="model must be an nn.Module") as error:
            lora_plus.parameter_groups(what, 1e-4)
        assert_one_sentence(error)


# The oracle: peft


@pytest.mark.parametrize("name", [*MODELS, "t5"])
def test_adamw_makes_the_steps_that_pefts_optimizer_makes(name):
    model = {**MODELS, "t5": t5}[name]().double()  # else Adam turns noise into steps
    twin = copy.deepcopy(model)
    lora.add(model, "all-linear", r=4, alpha=8)
    ours = lora.state_dict(model, keep_vars=True)
    for n, p in ours.items():
        if n.endswith("lora_B"):  # so that A has a gradient too
            nn.init.normal_(p, std=1 / 8)
    paths = [n.removesuffix(".lora_A") for n in ours if n.endswith(".lora_A")]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=paths)
    twin = get_peft_model(twin, config).eval()
    theirs = {
        n.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for n, p in twin.named_parameters()
        if p.requires_grad
    }
    assert ours.keys() == theirs.keys()
    for n, p in theirs.items():
        p.data.copy_(ours[n])
    before = {n: p.detach().clone() for n, p in ours.items()}
    groups = reference.parameter_groups(model, 1e-3, 16)
    settings = dict(lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.0, **FREE)
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
        moved = (p - before[n]).abs().max()
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
    for name, p in model.named_parameters():  # why an embedding's B is not fast
        if "lora_embedding_" in name:
            assert bool(p.any()) is ("lora_embedding_B" in name), name


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

FAST = '"lr": lr * ratio}]'
SLOW = '"lr": lr}, '
IS_B = '"lora_B" in name.split(".")'
TRAINS = "if p.requires_grad:"
ONCE = test_the_groups_hold_each_trainable_parameter_once
RATES = test_b_alone_learns_ratio_times_as_fast
USUAL = test_the_usual_ratio_is_16
NAME = test_b_is_known_by_its_whole_name
STEP = test_the_first_step_of_b_is_ratio_times_that_of_lora
NO_B = test_no_b_that_trains_is_refused
WRONG_INPUT = test_bad_settings_get_one_sentence_and_change_nothing

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "the ratio is on A": (STEP, {FAST: '"lr": lr}]', SLOW: '"lr": lr * ratio}, '}),
    "A is slowed by the ratio": (
        RATES,
        {FAST: '"lr": lr}]', SLOW: '"lr": lr / ratio}, '},
    ),
    "the ratio is forgotten": (RATES, {FAST: '"lr": lr}]'}),
    "the ratio is added": (RATES, {FAST: '"lr": lr + ratio}]'}),
    "the ratio is not the argument": (RATES, {FAST: '"lr": lr * 16}]'}),
    "the ratio's square": (STEP, {FAST: '"lr": lr * ratio**2}]'}),
    "another ratio by default": (USUAL, {"ratio=16": "ratio=8"}),
    "the groups bring a weight decay along": (
        USUAL,
        {SLOW: '"lr": lr, "weight_decay": 0.0}, '},
    ),
    "frozen parameters are in the groups": (ONCE, {TRAINS: "if True:"}),
    "B is in both groups": (
        ONCE,
        {"group.append(p)": "slow.append(p) if group is fast else 0, group.append(p)"},
    ),
    "B is in no group": (ONCE, {'{"params": fast,': '{"params": fast[:0],'}),
    "biases are left out": (ONCE, {TRAINS: f'{TRAINS[:-1]} and "bias" not in name:'}),
    "biases are fast, as in peft": (RATES, {IS_B: f'{IS_B} or name.endswith("bias")'}),
    "all but A is fast": (RATES, {IS_B: '"lora_A" not in name'}),
    "vectors are fast, as in peft": (RATES, {"_is_b(name) e": "p.dim() < 2 e"}),
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
        RATES,
        {IS_B: 'bool({"lora_B", "default"} & {*name.split(".")})'},
    ),
    "ratio 1 is not LoRA": (RATES, {FAST: '"lr": lr * (ratio + 1)}]'}),
    "the rate is capped": (RATES, {FAST: '"lr": min(lr * ratio, 0.5)}]'}),
    "no B, and nothing said": (NO_B, {"if not fast:": "if False:"}),
    "a frozen B will do": (
        NO_B,
        {"if not fast:": "if not any(_is_b(n) for n, _ in model.named_parameters()):"},
    ),
    "A must train": (
        ONCE,
        {
            '"params": slow,': '"params": [p.requires_grad_(True) for n, p in '
            'model.named_parameters() if "lora_A" in n],'
        },
    ),
    "B is made to train": (
        ONCE,
        {"    if not fast:": "    model.requires_grad_(True)\n    if not fast:"},
    ),
    "True is a number": (WRONG_INPUT, {" and not isinstance(value, bool)": ""}),
    "a rate has no limit": (WRONG_INPUT, {"< 1e300": '< float("inf")'}),
    "the product is not looked at": (
        WRONG_INPUT,
        {'_check_positive("lr * r': '("lr * r'},
    ),
}
