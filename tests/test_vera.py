"""VeRA's laws, and the same numbers as peft: from the seed alone, trained, merged.

A law that takes only `vera`, the module, is run again by tests/test_mutations.py on
broken copies of vera.py. What holds for other methods too is in test_every_method.py.
"""

import copy
import math

import pytest
import test_every_method as every
import torch
from common import (
    ALL,
    IDS,
    MODELS,
    assert_one_sentence,
    assert_same,
    assert_same_merged,
    assert_same_training,
    assert_unchanged,
    by_fault,
    jiggle,
    net,
    outputs,
    snapshot,
    t5,
    train,
)
from peft import VeraConfig, get_peft_model
from test_lora import packed
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from peftlab import vera as reference


@pytest.fixture
def vera():
    return reference


def jiggled(vera, model):
    """Its vectors as after training."""
    jiggle(vera.state_dict(model).values())
    return model


def stirred(vera, r=5, seed=0):
    return jiggled(vera, vera.add(net(), ALL, r=r, seed=seed))


def matrix(base):
    """W as (out, in)."""
    w = base.weight.detach()
    return w.T if isinstance(base, Conv1D) else w


# The laws


def test_d_starts_at_a_tenth_and_b_at_zero(vera):
    model = vera.add(net(), ALL, r=5)
    for path in ALL:
        layer = model.get_submodule(path)
        assert layer.vera_d.shape == (5,) and (layer.vera_d == 0.1).all(), "d is 0.1"
        n_out = len(matrix(layer.base))
        assert layer.vera_b.shape == (n_out,) and not layer.vera_b.any(), "b is zero"


def test_the_first_gradient_reaches_b_and_not_d(vera):
    model = vera.add(net(), ALL)
    model(IDS).pow(2).mean().backward()
    for name, p in vera.state_dict(model, keep_vars=True).items():
        assert p.grad is not None, f"{name} gets no gradient: is the branch dead?"
        if name.endswith("vera_b"):
            assert p.grad.all(), f"{name} stays zero in part: are A, B or d zero too?"
        else:
            assert not p.grad.any(), f"{name} has a gradient: b was not zero"


def test_a_layer_adds_b_times_big_b_times_d_times_big_a_x(vera):
    model = stirred(vera)
    big_a, big_b = vera.shared(12, 12, 5, 0)  # the widest of Net are 12 and 12
    for path in ALL:
        layer = model.get_submodule(path)
        n_out, n_in = matrix(layer.base).shape
        x = torch.randn(2, 3, n_in, dtype=torch.float64)
        a, b = big_a.double()[:, :n_in], big_b.double()[:n_out]
        change = torch.diag(layer.vera_b) @ b @ torch.diag(layer.vera_d) @ a
        want = linear(x, matrix(layer.base) + change, layer.base.bias)
        assert torch.allclose(layer(x), want), (
            f"{path}: the change is diag(b) B diag(d) A; d between A and B, b last;"
            " A's first columns and B's first rows where a layer is narrower"
        )
        torch.testing.assert_close(layer(x[0, 0]), want[0, 0])
        assert (change @ torch.ones(n_in).double()).abs().max() > 0.01


def test_all_layers_share_one_frozen_a_and_one_b(vera):
    def shares(model):
        layers = [model.get_submodule(path) for path in ALL]
        for name in ("vera_A", "vera_B"):
            places = {getattr(layer, name).data_ptr() for layer in layers}
            assert len(places) == 1, f"{name} is kept {len(places)} times, not shared"
        return layers[0].vera_A, layers[0].vera_B

    model = vera.add(net().float(), ALL, r=5)
    a, b = shares(model)
    assert a.shape == (5, 12) and b.shape == (12, 5), "as wide as the widest layer"
    first = a.clone(), b.clone()
    train(jiggled(vera, model))
    assert torch.equal(a, first[0]) and torch.equal(b, first[1]), "A or B trained"
    assert not a.requires_grad and not b.requires_grad, "A and B are frozen"
    shares(model.double())  # after a move too
    shares(copy.deepcopy(model))
    extra = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in net().parameters()
    )
    names = [n for n in model.state_dict() if "vera_A" in n or "vera_B" in n]
    assert len(names) == 2, f"a checkpoint must hold A and B once: {names}"
    vectors = sum(t.numel() for t in vera.state_dict(model).values())
    assert vectors == sum(5 + n for n in (8, 12, 12, 12)), "L (d + r) numbers train"
    assert extra == vectors + 2 * 5 * 12


def test_a_and_b_come_from_the_seed_and_nothing_else(vera):
    def pair(seed, noise):
        model = net()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        layer = vera.add(model, ALL, r=5, seed=seed).proj
        assert torch.equal(torch.get_rng_state(), before), "it uses torch's own dice"
        return layer.vera_A, layer.vera_B

    for seed in (0, 7):
        for one, two in zip(pair(seed, 1), pair(seed, 2), strict=True):
            assert torch.equal(one, two), "the same seed must give the same A and B"
    for one, two in zip(pair(0, 1), pair(7, 1), strict=True):
        assert not torch.equal(one, two), "another seed must give another A and B"
    one, two = stirred(vera, seed=3), vera.add(net(), ALL, r=5, seed=3)
    vera.load_state_dict(two, vera.state_dict(one))
    assert torch.equal(two(IDS), one(IDS)), "the vectors and the seed are not enough"


def test_a_comes_first_and_both_are_kaimings_uniform(vera):
    a, b = vera.shared(300, 200, 64, 5)
    dice = torch.Generator().manual_seed(5)
    for got, shape in ((a, (64, 300)), (b, (200, 64))):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        want = torch.empty(shape).uniform_(-bound, bound, generator=dice)
        assert got.dtype == torch.float32 and got.shape == shape
        assert torch.equal(got, want), "peft's draw: A, then B, within sqrt(6 / width)"
        assert abs(got.var() * shape[1] / 2 - 1) < 0.05, "its variance is 2 / width"


def test_the_draw_heeds_no_default(vera):
    want = vera.shared(6, 8, 4, 0)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = vera.shared(6, 8, 4, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(want, got, strict=True):
        assert two.device.type == "cpu" and torch.equal(one, two), (
            "another default dtype or device gives another A and B from the same seed"
        )


def test_the_change_after_training_has_rank_r(vera):
    before = net().state_dict()
    model = vera.merge(train(stirred(vera, r=2)))
    for path in ALL:
        change = model.get_parameter(f"{path}.weight") - before[f"{path}.weight"]
        values = torch.linalg.svdvals(change)
        assert values[1] > 1e-6, f"{path} changed in one direction, or in none"
        assert values[2] < 1e-12, f"{path}: rank above r; is W trained too?"


def test_the_state_dict_holds_vectors_alone(vera):
    tensors = vera.state_dict(vera.add(net(), ALL, r=5))
    assert tensors.keys() == {f"{path}.vera_{x}" for path in ALL for x in "db"}
    assert all(t.dim() == 1 for t in tensors.values()), "A and B come from the seed"


def test_merging_takes_a_16_bit_base_once_to_its_own_precision(vera):
    model = vera.add(nn.Sequential(nn.Linear(8, 8).bfloat16()), ["0"], r=4)
    layer = jiggled(vera, model)[0]
    a, b = layer.slices()
    change = (layer.vera_b[:, None] * b * layer.vera_d) @ a
    exact = layer.base.weight.float() + change
    merged = vera.merge(model)[0].weight
    assert torch.equal(merged, exact.bfloat16()), "the sum must be rounded only once"


def test_merging_refuses_a_packed_weight_before_the_first_layer(vera):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    model[1].weight = nn.Parameter(codes, requires_grad=False)
    jiggled(vera, vera.add(model, ["0", "1"], r=4))
    assert model[1].vera_A.dtype == torch.float32
    before = snapshot(model)
    with pytest.raises(ValueError, match="packed") as error:
        vera.merge(model)
    assert_one_sentence(error)
    assert_unchanged(model, before)


# Bad input: one sentence each, and the model as it was

BAD = {
    "seed=-1": dict(seed=-1),
    "seed=1.5": dict(seed=1.5),
    "seed=True": dict(seed=True),
    "seed='0'": dict(seed="0"),
    "seed=None": dict(seed=None),
    "seed=2**63": dict(seed=2**63),
    "seed=10**400": dict(seed=10**400),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(case):
    model = net()
    model.norm.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        reference.add(model, **{"targets": ["q_proj"], **BAD[case]})
    assert_one_sentence(error)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_vera_trains_over_a_packed_base_and_merge_refuses_it(kind):
    torch.manual_seed(0)
    model, x = packed(kind), torch.randn(3, 64)
    plain = model(x)
    reference.add(model, ["0"], r=8)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    codes = model[0].base.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # b moves first, then d
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()
    assert model[0].vera_d.grad.any() and model[0].vera_b.all()
    assert torch.equal(model[0].base.weight, codes), "the packed codes moved"
    with pytest.raises(ValueError, match="packed"):
        reference.merge(model)
    assert isinstance(model[0], reference.VeRALinear)


# The oracle: peft


def peft_twin(model, paths, seed):
    """peft's VeRA on `model`, and its trainable parameters by our names."""
    gpt2 = any(isinstance(m, Conv1D) for m in model.modules())
    config = VeraConfig(
        r=16, target_modules=paths, projection_prng_key=seed, fan_in_fan_out=gpt2
    )
    twin = get_peft_model(model, config).eval()
    return twin, {
        n.removeprefix("base_model.model.")
        .removesuffix(".default")
        .replace("vera_lambda_", "vera_"): p
        for n, p in twin.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("seed", [0, 11])
@pytest.mark.parametrize("name", [*MODELS, "t5"])
def test_numbers_equal_pefts_from_the_seed_alone(name, seed):
    model = {**MODELS, "t5": t5}[name]()
    plain = copy.deepcopy(model)
    reference.add(model, "all-linear", r=16, seed=seed)
    ours = reference.state_dict(model, keep_vars=True)
    paths = sorted(every.paths(reference, model))
    twin, theirs = peft_twin(plain, paths, seed)
    layer = model.get_submodule(paths[0])
    for x in "AB":
        got, want = getattr(layer, f"vera_{x}"), getattr(twin, f"vera_{x}")["default"]
        assert torch.equal(got, want), f"{x} is not peft's to the bit"
    assert all(torch.equal(ours[n], p) for n, p in theirs.items()), "another start"
    assert_same(outputs(model), outputs(twin), "the output at the start")
    jiggle(ours.values())
    for n, p in theirs.items():  # the vectors alone: A and B are from the seed
        ours[n].data *= 3  # else the gradients are small
        p.data.copy_(ours[n])
    assert_same_training(model, ours, twin, theirs)
    assert_same_merged(reference.merge(model), twin.merge_and_unload())


# vera.py copied alone, for tests/test_standalone.py

ALONE = """
import vera
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x = torch.randn(5, 6)
plain = model(x)
vera.add(model, ["0", "2"], r=16, seed=1)
assert torch.equal(model(x), plain)
for _ in range(2):
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for p in vera.state_dict(model, keep_vars=True).values():
        p.data -= 0.1 * p.grad
tuned = model(x)
assert not torch.allclose(tuned, plain)
vera.load_state_dict(model, vera.state_dict(model))
merged = vera.merge(model)
assert [type(m).__name__ for m in merged] == ["Linear", "Tanh", "Linear"]
assert torch.allclose(merged(x), tuned, atol=1e-5)
"""

# Broken copies, for tests/test_mutations.py

LOW = "low = x.to(A.dtype) @ A.T * self.vera_d"
ADDED = "y + low @ B.T * self.vera_b"
RETURN = f"return ({ADDED}).to(y.dtype)"
SLICES = "return self.vera_A[:, :n_in], self.vera_B[:n_out]"
DRAW = 't = torch.empty(shape, dtype=torch.float32, device="cpu")'
CHANGE = "(self.vera_b[:, None] * B * self.vera_d) @ A"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_a_layer_adds_b_times_big_b_times_d_times_big_a_x: {
        "d is forgotten": {LOW: "low = x.to(A.dtype) @ A.T"},
        "b is at d's place and d at b's": {
            "self.vera_d = nn.Parameter": "self.vera_x = nn.Parameter",
            "self.vera_b = nn.Parameter": "self.vera_d = nn.Parameter",
            "self.vera_x = nn.Parameter": "self.vera_b = nn.Parameter",
        },
        "the vectors are squared": {LOW: f"{LOW} * self.vera_d"},
        "the change is divided by r": {"low @ B.T *": "low @ B.T / len(A) *"},
        "the branch is dead": {RETURN: "return y"},
        "a narrow layer takes B's last rows": {
            SLICES: SLICES.replace("[:n_out]", "[-n_out:]")
        },
        "a narrow layer takes A's last columns": {
            SLICES: SLICES.replace("[:, :n_in]", "[:, -n_in:]")
        },
    },
    every.test_adding_changes_no_output: {
        "b is forgotten": {ADDED: "y + low @ B.T"},
        "b scales what the base says too": {ADDED: "(y + low @ B.T) * self.vera_b"},
        "the base is dropped": {ADDED: f"0 * {ADDED}"},
    },
    test_all_layers_share_one_frozen_a_and_one_b: {
        "each layer has an A and a B of its own": {
            "self.frozen = [shared]": "self.frozen = [shared := Shared(shared.vera_A"
            ".data.clone(), shared.vera_B.data.clone())]"
        },
        "every layer holds A and B for torch": {"if owner:": "if True:"},
    },
    every.test_the_whole_model_goes_into_a_safetensors_file: {
        "a checkpoint holds A and B for each layer": {"if owner:": "if True:"}
    },
    every.test_only_what_the_state_dict_names_trains: {
        "A and B train": {"nn.Parameter(A, requires_grad=False)": "nn.Parameter(A)"},
        "the state dict leaves d out": {'("vera_d", "vera_b")': '("vera_b",)'},
    },
    every.test_own_tensors_are_float32_over_a_16_bit_base: {
        "A and B are in the base's 16 bits": {
            "torch.float64 if W.dtype == torch.float64 else torch.float32": "W.dtype"
        },
        "the answer is in float32": {RETURN: RETURN[: -len(".to(y.dtype)")]},
    },
    test_a_and_b_come_from_the_seed_and_nothing_else: {
        "the seed is ignored": {"manual_seed(seed)": "manual_seed(0)"},
        "torch's own dice are thrown": {", generator=generator": ""},
        "torch's own dice are seeded": {
            "torch.Generator().manual_seed(seed)": "torch.manual_seed(seed)"
        },
    },
    test_a_comes_first_and_both_are_kaimings_uniform: {
        "B is drawn first": {
            "    A = draw(r, n_in)\n    B = draw(n_out, r)\n": "    B = draw(n_out,"
            " r)\n    A = draw(r, n_in)\n"
        },
        "each is drawn from the seed anew": {
            DRAW: f"generator.manual_seed(seed)\n        {DRAW}"
        },
        "A and B are Gaussian": {"t.uniform_(-bound, bound": "t.normal_(0, bound"},
        "Kaiming's gain is left out": {"math.sqrt(2) / ": "1 / "},
        "the width is of the other side": {"sqrt(shape[1])": "sqrt(shape[0])"},
    },
    test_the_draw_heeds_no_default: {
        "the draw heeds the default dtype": {"dtype=torch.float32, ": ""},
        "the draw heeds the default device": {', device="cpu"': ""},
    },
    test_the_change_after_training_has_rank_r: {
        "the rank is one too many": {"A = draw(r, n_in)": "A = draw(r := r + 1, n_in)"},
        "merging adds nothing": {f"return W + {CHANGE}": "return W"},
    },
    test_d_starts_at_a_tenth_and_b_at_zero: {
        "d starts at one": {"(A[:, 0], 0.1)": "(A[:, 0], 1.0)"},
        "b starts at one": {"torch.zeros_like(B": "torch.ones_like(B"},
    },
    test_the_first_gradient_reaches_b_and_not_d: {
        "d starts at zero too": {"(A[:, 0], 0.1)": "(A[:, 0], 0.0)"}
    },
    every.test_merged_equals_unmerged_to_1e_10_in_float64: {
        "merging forgets d": {CHANGE: "(self.vera_b[:, None] * B) @ A"},
        "merging forgets b": {CHANGE: "(B * self.vera_d) @ A"},
        "merging forgets to cut A and B": {
            "A, B = self.slices()\n        W": "A, B = self.vera_A, self.vera_B\n"
            "        W"
        },
    },
    test_merging_takes_a_16_bit_base_once_to_its_own_precision: {
        "merging rounds twice": {CHANGE: f"({CHANGE}).to(W.dtype)"}
    },
    test_merging_refuses_a_packed_weight_before_the_first_layer: {
        "merging stops at a packed weight half-way": {
            "if _is_packed(layer.weight):": "if False:"
        }
    },
    test_the_state_dict_holds_vectors_alone: {
        "the state dict holds A and B": {
            '("vera_d", "vera_b")': '("vera_d", "vera_b", "vera_A", "vera_B")'
        }
    },
    every.test_the_state_dict_goes_round: {
        "d is not loaded": {
            "t.copy_(tensors[name])": 'name[-1] == "b" and t.copy_(tensors[name])'
        }
    },
    every.test_a_model_can_be_moved_to_another_precision: {
        "A and B stay behind when the model is moved": {"if owner:": "if False:"}
    },
    every.test_a_model_on_the_meta_device_gets_the_same_shapes: {
        "A and B are on the CPU": {"t.to(**like) for t": "t for t"}
    },
}
MUTATIONS = by_fault(BROKEN)
