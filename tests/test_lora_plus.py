"""LoRA+'s laws: which parameter learns how fast, and the same steps as peft's.

A law that takes only `lora_plus`, the module, is run again by tests/test_mutations.py
on broken copies of lora_plus.py. Messages name the mistake that gives the symptom.
"""

import copy
import functools
import math

import pytest
import torch
from common import ALL, IDS, bert, by_fault, net, outputs, refused, t5, trainable
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


# The laws


def test_the_groups_hold_each_trainable_parameter_once(lora_plus):
    models = [lora.add(net(), ALL, bias=bias) for bias in ("none", "all", "lora_only")]
    models.append(lora.add(net(), ALL))
    for name, p in models[-1].named_parameters():
        p.requires_grad_(name.endswith("lora_B"))  # B alone may train
    for model in models:
        before = trainable(model)
        slow, fast = lora_plus.parameter_groups(model, 1e-4)
        found = rates(model, (slow, fast))
        assert found.keys() == trainable(model), "all that trains, and nothing frozen"
        assert trainable(model) == before, "it changes the model"
        assert fast["lr"] / slow["lr"] == 16, "the usual ratio"
        assert slow.keys() == fast.keys() == {"params", "lr"}, "the optimizer's own"


def test_b_alone_learns_ratio_times_as_fast(lora_plus):
    headed = lora.add(net(), ALL, bias="all")
    headed.lm_head.requires_grad_(True)  # a new head
    targets = dict(target_modules=["query", "value"], modules_to_save=["classifier"])
    pefts = get_peft_model(bert(), LoraConfig(**targets))
    for model in (headed, dora.add(net(), ALL), pefts):
        for lr, ratio in ((1e-4, 16), (0.5, 4), (1e-3, 0.5)):
            found = rates(model, lora_plus.parameter_groups(model, lr, ratio))
            fast = {n for n, rate in found.items() if rate == lr * ratio}
            slow = {n for n, rate in found.items() if rate == lr}
            assert fast == {n for n in found if "lora_B" in n}, "B's rate is lr * ratio"
            words = "A, biases, heads, lengths learn at lr"
            assert len(fast) == 4 and fast | slow == found.keys(), words


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
        optimizer = make(lora_plus.parameter_groups(model, 1e-3, ratio))
        (model(IDS) - 1).pow(2).mean().backward()
        optimizer.step()
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


def test_no_b_that_trains_is_refused(lora_plus):
    frozen = lora.add(net(), ALL)
    for name, p in frozen.named_parameters():
        p.requires_grad_(not name.endswith("lora_B"))
    for model in (net(), lora.merge(lora.add(net(), ALL)), frozen):
        refused(model, "lora_B", lora_plus.parameter_groups, 1e-4)


WRONG = [0, -1, math.nan, math.inf, 10**400, "16", None, True, torch.ones(3, 3)]
PRODUCTS = ((1e299, 1e299), (10**299, 1e200), (1e-200, 1e-200))


def test_bad_settings_get_one_sentence_and_change_nothing(lora_plus):
    model, groups = lora.add(net(), ALL), lora_plus.parameter_groups
    for value in WRONG:
        refused(model, "^lr must be a positive number", groups, value)
        refused(model, "^ratio must be a positive number", groups, 1e-4, value)
    for lr, ratio in PRODUCTS:
        refused(model, r"lr \* ratio must be", groups, lr, ratio)
    for what in (None, [model]):
        refused(what, "model must be an nn.Module", groups, 1e-4)


# The oracle: peft


@pytest.mark.parametrize("build", [bert, t5])
def test_adamw_makes_the_steps_that_pefts_optimizer_makes(build):
    config = dict(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build(), LoraConfig(**config)).eval()  # B is random
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    settings = dict(lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.0, **FREE)
    for m, optimizer in (
        (model, torch.optim.AdamW(reference.parameter_groups(model, 1e-3, 16), **FREE)),
        (twin, create_loraplus_optimizer(twin, torch.optim.AdamW, **settings)),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            outputs(m).sin().sum().backward()
            optimizer.step()
    for n in trainable(model):
        p = model.get_parameter(n)
        gap = (p - twin.get_parameter(n)).abs().max()
        assert gap < 1e-6, f"{n} differs from peft's by {gap:.1e}"
        moved = (p - before.get_parameter(n)).abs().max()
        assert moved > (1e-2 if "lora_B" in n else 1e-3), f"{n} hardly moved"


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
EMBEDDING = '{"lora_B", "lora_embedding_B"} & {*name.split(".")}'
MAKES = "    model.requires_grad_(True)\n    if not fast:"
A_TRAINS = 'for n, p in model.named_parameters() if "lora_A" in n],'
A_TRAINS = '"params": [p.requires_grad_(True) ' + A_TRAINS
BOTH = "(slow if group is fast else []).append(p), group.append(p)"
ANY_B = "if not any(_is_b(n) for n, _ in model.named_parameters()):"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_the_groups_hold_each_trainable_parameter_once: {
        "another ratio by default": {"ratio=16": "ratio=8"},
        "the groups bring a weight decay along": {SLOW: f'"decay": 0.0, {SLOW}'},
        "frozen parameters are in the groups": {TRAINS: "if True:"},
        "B is in both groups": {"group.append(p)": BOTH},
        "B is in no group": {'{"params": fast,': '{"params": fast[:0],'},
        "biases are left out": {TRAINS: f'{TRAINS[:-1]} and "bias" not in name:'},
        "A must train": {'"params": slow,': A_TRAINS},
        "B is made to train": {"    if not fast:": MAKES},
    },
    test_b_alone_learns_ratio_times_as_fast: {
        "A is slowed by the ratio": {FAST: '"lr": lr}]', SLOW: '"lr": lr / ratio}, '},
        "the ratio is forgotten": {FAST: '"lr": lr}]'},
        "the ratio is added": {FAST: '"lr": lr + ratio}]'},
        "the ratio is not the argument": {FAST: '"lr": lr * 16}]'},
        "biases are fast, as in peft": {IS_B: f'{IS_B} or name.endswith("bias")'},
        "all but A is fast": {IS_B: '"lora_A" not in name'},
        "vectors are fast, as in peft": {"_is_b(name) e": "p.dim() < 2 e"},
        "all that peft calls default is fast": {
            IS_B: 'bool({"lora_B", "default"} & {*name.split(".")})'
        },
        "ratio 1 is not LoRA": {FAST: '"lr": lr * (ratio + 1)}]'},
        "the rate is capped": {FAST: '"lr": min(lr * ratio, 0.5)}]'},
    },
    test_b_is_known_by_its_whole_name: {
        "a part of a name is enough": {IS_B: '"lora_B" in name'},
        "the end of a name is enough": {IS_B: 'name.endswith("lora_B")'},
        "upper and lower case are one": {IS_B: '"lora_b" in name.lower().split(".")'},
        "an embedding's B is fast": {IS_B: f"bool({EMBEDDING})"},
    },
    test_the_first_step_of_b_is_ratio_times_that_of_lora: {
        "the ratio is on A": {FAST: '"lr": lr}]', SLOW: '"lr": lr * ratio}, '},
        "the ratio's square": {FAST: '"lr": lr * ratio**2}]'},
    },
    test_no_b_that_trains_is_refused: {
        "no B, and nothing said": {"if not fast:": "if False:"},
        "a frozen B will do": {"if not fast:": ANY_B},
    },
    test_bad_settings_get_one_sentence_and_change_nothing: {
        "True is a number": {"type(value) is int or": "isinstance(value, int) or"},
        "a rate has no limit": {"< 1e300": '< float("inf")'},
        "the product is not looked at": {'_check_positive("lr * r': '("lr * r'},
    },
}
MUTATIONS = by_fault(BROKEN)
