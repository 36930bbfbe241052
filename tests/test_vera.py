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
    "r=0": dict(r=0),
    "r=-1": dict(r=-1),
    "r=2.5": dict(r=2.5),
    "r=True": dict(r=True),
    "r='8'": dict(r="8"),
    "r=None": dict(r=None),
    "seed=-1": dict(seed=-1),
    "seed=1.5": dict(seed=1.5),
    "seed=True": dict(seed=True),
    "seed='0'": dict(seed="0"),
    "seed=None": dict(seed=None),
    "seed=2**63": dict(seed=2**63),
    "half-wrong list": dict(targets=["q_proj", "nothing"]),
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
RETURN = "return torch.addcmul(y, low @ B.T, self.vera_b).to(y.dtype)"
SLICES = "self.vera_A[:, : self.shape[1]], self.vera_B[: self.shape[0]]"
WRAP = "VeRALinear(m, A, B, seed)"
KEPT = "self.vera_A, self.vera_B = A, B"
DRAW = 't = torch.empty(shape, dtype=torch.float32, device="cpu")'
SHAPES = "((r, n_in), (n_out, r))"
BOUND = "math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))"
CHANGE = "(m.vera_b[:, None] * B * m.vera_d) @ A"
SUM = "(base.weight + delta).to(base.weight.dtype)"
TURN = 'delta = delta.T if type(base).__name__ == "Conv1D" else delta'
STARTS = test_d_starts_at_a_tenth_and_b_at_zero
FIRST = test_the_first_gradient_reaches_b_and_not_d
EQUATION = test_a_layer_adds_b_times_big_b_times_d_times_big_a_x
SHARED = test_all_layers_share_one_frozen_a_and_one_b
SEED = test_a_and_b_come_from_the_seed_and_nothing_else
KAIMING = test_a_comes_first_and_both_are_kaimings_uniform
DEFAULT = test_the_draw_heeds_no_default
RANK = test_the_change_after_training_has_rank_r
MERGED = every.test_merged_equals_unmerged_to_1e_10_in_float64
IN_16_BITS = every.test_own_tensors_are_float32_over_a_16_bit_base
ONLY = every.test_only_what_the_state_dict_names_trains
STRICT = every.test_loading_is_strict

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "d is forgotten": (EQUATION, {LOW: "low = x.to(A.dtype) @ A.T"}),
    "b is forgotten": (
        every.test_adding_changes_no_output,
        {RETURN: "return (y + low @ B.T).to(y.dtype)"},
    ),
    "b is at d's place and d at b's": (
        EQUATION,
        {
            "self.vera_d = nn.Parameter": "self.vera_x = nn.Parameter",
            "self.vera_b = nn.Parameter": "self.vera_d = nn.Parameter",
            "self.vera_x = nn.Parameter": "self.vera_b = nn.Parameter",
        },
    ),
    "b scales what the base says too": (
        every.test_adding_changes_no_output,
        {RETURN: "return ((y + low @ B.T) * self.vera_b).to(y.dtype)"},
    ),
    "the vectors are squared": (EQUATION, {LOW: f"{LOW} * self.vera_d"}),
    "the change is divided by r": (EQUATION, {"low @ B.T,": "low @ B.T / len(A),"}),
    "the branch is dead": (EQUATION, {RETURN: "return y"}),
    "the base is dropped": (
        every.test_adding_changes_no_output,
        {RETURN: RETURN.replace("(y,", "(0 * y,")},
    ),
    "a narrow layer takes B's last rows": (
        EQUATION,
        {SLICES: SLICES.replace("[: self.shape[0]]", "[-self.shape[0] :]")},
    ),
    "a narrow layer takes A's last columns": (
        EQUATION,
        {SLICES: SLICES.replace(": self.shape[1]", "-self.shape[1] :")},
    ),
    "each layer has an A and a B of its own": (
        SHARED,
        {
            WRAP: "VeRALinear(m, nn.Parameter(A.clone(), False),"
            " nn.Parameter(B.clone(), False), seed)"
        },
    ),
    "A and B are buffers, which part when moved": (
        SHARED,
        {
            KEPT: 'self.register_buffer("vera_A", A.data)\n'
            '        self.register_buffer("vera_B", B.data)'
        },
    ),
    "A and B train": (ONLY, {"nn.Parameter(t.to(**like), False)": "nn.Parameter(t)"}),
    "A and B are in the base's 16 bits": (
        IN_16_BITS,
        {"dtype=torch.promote_types(w.dtype, torch.float32)": "dtype=w.dtype"},
    ),
    "the seed is ignored": (SEED, {"manual_seed(seed)": "manual_seed(0)"}),
    "torch's own dice are thrown": (SEED, {", generator=dice": ""}),
    "torch's own dice are seeded": (
        SEED,
        {"torch.Generator().manual_seed(seed)": "torch.manual_seed(seed)"},
    ),
    "B is drawn first": (
        KAIMING,
        {SHAPES: "((n_out, r), (r, n_in))", "return pair": "return pair[::-1]"},
    ),
    "each is drawn from the seed anew": (
        KAIMING,
        {DRAW: f"dice.manual_seed(seed)\n        {DRAW}"},
    ),
    "A and B are Gaussian": (
        KAIMING,
        {"t.uniform_(-bound, bound": "t.normal_(0, bound"},
    ),
    "Kaiming's gain is left out": (KAIMING, {"math.sqrt(2) / ": "1 / "}),
    "the width is of the other side": (KAIMING, {"sqrt(shape[1])": "sqrt(shape[0])"}),
    "the draw heeds the default dtype": (DEFAULT, {"dtype=torch.float32, ": ""}),
    "the draw heeds the default device": (DEFAULT, {', device="cpu"': ""}),
    "the rank is one too many": (RANK, {SHAPES: "((r := r + 1, n_in), (n_out, r))"}),
    "d starts at one": (STARTS, {"(A[:, 0], 0.1)": "(A[:, 0], 1.0)"}),
    "b starts at one": (STARTS, {"A.new_zeros(": "A.new_ones("}),
    "d starts at zero too": (FIRST, {"(A[:, 0], 0.1)": "(A[:, 0], 0.0)"}),
    "the answer is in float32": (IN_16_BITS, {RETURN: RETURN[: -len(".to(y.dtype)")]}),
    "merging forgets d": (MERGED, {CHANGE: "(m.vera_b[:, None] * B) @ A"}),
    "merging forgets b": (MERGED, {CHANGE: "(B * m.vera_d) @ A"}),
    "merging adds nothing": (RANK, {SUM: "base.weight.clone()"}),
    "merging forgets to cut A and B": (
        MERGED,
        {
            "A, B = m.slices()\n        delta": (
                "A, B = m.vera_A, m.vera_B\n        delta"
            )
        },
    ),
    "a Conv1D is merged untransposed": (MERGED, {TURN: "pass"}),
    "merging rounds twice": (
        test_merging_takes_a_16_bit_base_once_to_its_own_precision,
        {SUM: "base.weight + delta.to(base.weight.dtype)"},
    ),
    "merging writes into a tied weight": (
        every.test_a_tied_weight_is_left_alone,
        {f"base.weight = nn.Parameter({SUM}, False)": "base.weight.data += delta"},
    ),
    "merging leaves the wrappers": (
        every.test_merging_leaves_plain_frozen_layers,
        {"_replace(model, layers)": "pass"},
    ),
    "merging stops at a packed weight half-way": (
        test_merging_refuses_a_packed_weight_before_the_first_layer,
        {'hasattr(base.weight, "quant_state") or not': "False and not"},
    ),
    "the base is not frozen": (
        ONLY,
        {"_replace(model.requires_grad_(False), ": "_replace(model, "},
    ),
    "the base trains along": (
        every.test_frozen_weights_are_bit_identical_after_training,
        {"_replace(model.requires_grad_(False), ": "_replace(model, "},
    ),
    "the state dict leaves d out": (ONLY, {'("vera_d", "vera_b")': '("vera_b",)'}),
    "the state dict holds A and B": (
        test_the_state_dict_holds_vectors_alone,
        {'("vera_d", "vera_b")': '("vera_d", "vera_b", "vera_A", "vera_B")'},
    ),
    "d is not loaded": (
        every.test_the_state_dict_goes_round,
        {"t.copy_(tensors[name])": 'name[-1] == "b" and t.copy_(tensors[name])'},
    ),
    "loading is not strict": (
        STRICT,
        {
            "if got != want or name not in own:": "if name in tensors and name in own"
            " and got != want:",
            "t.copy_(tensors[name])": "t.copy_(tensors.get(name, t))",
        },
    ),
    "loading lets the unexpected pass": (
        STRICT,
        {"own.keys() | tensors.keys()": "own.keys()"},
    ),
    "new layers are in train mode": (
        every.test_the_new_layers_are_in_the_models_mode,
        {".train(m.training)": ""},
    ),
    "one parent of two is wrapped": (
        every.test_a_linear_with_two_parents_is_wrapped_once_and_merged_once,
        {"swaps.get(child, child)": "swaps.pop(child, child)"},
    ),
    "A and B stay behind when the model is moved": (
        every.test_a_model_can_be_moved_to_another_precision,
        {
            KEPT: "self.pair = A, B",
            "self.vera_A[": "self.pair[0][",
            "self.vera_B[": "self.pair[1][",
        },
    ),
    "A and B are on the CPU": (
        every.test_a_model_on_the_meta_device_gets_the_same_shapes,
        {"device=w.device, ": ""},
    ),
    "a half-wrong target list is accepted": (
        every.test_a_half_wrong_target_list_is_refused,
        {
            "if lost := [": "if len(targets) == len(lost := [",
            "for p in linears)]:": "for p in linears)]):",
        },
    ),
    "fused experts are passed over": (
        every.test_fused_experts_are_refused_by_their_share,
        {'"expert" in n and d == 3': "False"},
    ),
    "VeRA goes on VeRA": (
        every.test_adding_twice_is_refused,
        {"any(isinstance(m, VeRALinear) for m in model.modules())": "False"},
    ),
}
