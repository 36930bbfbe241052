"""PiSSA's laws, and the same numbers as peft: split, forward, backward, as a LoRA.

A law that takes only `pissa`, the module, is run again by tests/test_mutations.py on
broken copies of pissa.py. What holds for other methods too is in test_every_method.py.
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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_lora import packed
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftlab import lora
from peftlab import pissa as reference


@pytest.fixture
def pissa():
    return reference


def bases(dtype=torch.float64):
    """Linears of several shapes, with and without a bias, and Conv1Ds."""
    torch.manual_seed(1)
    for base in (
        nn.Linear(8, 6),
        nn.Linear(5, 9, bias=False),
        nn.Linear(6, 6),  # square: a wrong transpose still fits
        Conv1D(6, 8),  # 8 in, 6 out
        Conv1D(6, 6),
    ):
        base.weight.data = torch.randn(base.weight.shape)
        if base.bias is not None:
            base.bias.data = torch.randn(base.bias.shape)
        yield base.to(dtype)


def on(pissa, base, r=3):
    return pissa.add(nn.Sequential(base), ["0"], r=r)[0]


def matrix(base):
    """W as (out, in), a copy."""
    w = base.weight.detach().clone()
    return w.T if isinstance(base, Conv1D) else w


def product(tensors, path):
    return tensors[f"{path}.lora_B"] @ tensors[f"{path}.lora_A"]


# The laws


def test_the_residual_and_b_a_give_the_weight_back(pissa):
    for dtype, most in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        for base in bases(dtype):
            w = matrix(base)
            layer = on(pissa, base)
            gap = (matrix(layer.base) + layer.lora_B @ layer.lora_A - w).abs().max()
            assert gap < most * w.abs().max(), f"W is not W_res + B A: off by {gap:.1e}"


def test_a_and_b_take_the_principal_directions(pissa):
    for base in bases():
        values = torch.linalg.svdvals(w := matrix(base))
        layer = on(pissa, base)
        kept = torch.linalg.svdvals(matrix(layer.base))
        assert torch.allclose(kept[: len(values) - 3], values[3:]), (
            "the residual's largest singular value must be W's fourth: were other"
            " directions taken than the first three, or others taken off?"
        )
        assert kept[-3:].max() < 1e-12, "the first three are still in the residual"
        taken = torch.linalg.svdvals(layer.lora_B @ layer.lora_A)[:3]
        assert torch.allclose(taken, values[:3])
        best = (w - layer.lora_B @ layer.lora_A).norm().square()
        assert torch.allclose(best, values[3:].square().sum()), "not the best of rank 3"


def test_a_and_b_share_the_singular_values_evenly(pissa):
    for base in bases():
        w = matrix(base)
        want = torch.diag(torch.linalg.svdvals(w)[:3])
        layer = on(pissa, base)
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        assert a.shape == (3, w.shape[1]) and b.shape == (len(w), 3)
        for square, name in ((a @ a.T, "A A^T"), (b.T @ b, "B^T B")):
            assert torch.allclose(square, want, atol=1e-12), (
                f"{name} must be diag(S): each gets a root of S, its rows apart"
            )


def test_a_layer_is_the_residual_plus_b_a(pissa):
    for base in bases():
        layer = on(pissa, base)
        jiggle([layer.lora_A, layer.lora_B])
        x = torch.randn(2, 3, matrix(base).shape[1], dtype=torch.float64)
        w = matrix(layer.base) + layer.lora_B @ layer.lora_A
        want = nn.functional.linear(x, w, layer.base.bias)
        assert torch.allclose(layer(x), want), "y = W_res x + B A x: there is no scale"
        torch.testing.assert_close(layer(x[0, 0]), want[0, 0])


def test_the_first_gradient_reaches_a_and_b(pissa):
    for base in bases():
        layer = on(pissa, base)
        x = torch.randn(7, matrix(base).shape[1], dtype=torch.float64)
        layer(x).sin().sum().backward()
        for p in (layer.lora_A, layer.lora_B):
            assert p.grad.any(), "no gradient at the start: PiSSA has none of zero"


def test_the_change_as_a_lora_fits_the_original_base(pissa):
    model = pissa.add(net(), ALL, r=3)
    still = pissa.to_lora(model)
    for path in ALL:
        assert product(still, path).abs().max() < 1e-14, "untrained, and yet a change"
    tensors = pissa.to_lora(train(model))
    twin = lora.add(net(), ALL, r=6, alpha=6)
    lora.load_state_dict(twin, tensors)
    gap = (twin(IDS) - model(IDS)).abs().max()
    assert (model(IDS) - net()(IDS)).abs().max() > 1e-3
    assert gap < 1e-12, f"off by {gap:.1e}: is it B A - B0 A0, B0 and A0 as at first?"
    merged = pissa.merge(model)
    for path in ALL:
        change = matrix(merged.get_submodule(path)) - matrix(net().get_submodule(path))
        assert torch.allclose(change, product(tensors, path), atol=1e-12)
        assert not (torch.linalg.svdvals(change)[6:] > 1e-12).any(), "above rank 2r"


def test_files_pass_between_bases_whose_svd_took_other_signs(pissa):
    one, two = train(pissa.add(net(), ALL, r=3)), pissa.add(net(), ALL, r=3)
    signs = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    for path in ALL:  # a singular pair is defined up to a common sign
        layer = two.get_submodule(path)
        layer.lora_A.data *= signs[:, None]
        layer.lora_B.data *= signs
        layer.start = (layer.start[0] * signs[:, None], layer.start[1] * signs)
    assert (two(IDS) - net()(IDS)).abs().max() < 1e-12
    pissa.load_state_dict(two, pissa.state_dict(one))
    assert (two(IDS) - one(IDS)).abs().max() < 1e-12, "the residuals differ"
    for path in ALL:
        ours, theirs = (product(pissa.to_lora(m), path) for m in (one, two))
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_adding_and_merging_gives_the_weights_back(pissa):
    model, plain = pissa.merge(pissa.add(net(), ALL, r=3)), net().state_dict()
    for name, t in model.state_dict().items():
        assert torch.allclose(t, plain[name], rtol=0, atol=1e-13), f"{name} moved"


def test_a_16_bit_base_is_split_in_float32_and_rounded_once(pissa):
    for dtype in (torch.bfloat16, torch.float16):
        for base in bases(dtype):
            exact = matrix(base).float()
            layer = on(pissa, base)
            u, s, vh = torch.linalg.svd(exact, full_matrices=False)
            first = (u[:, :3] * s[:3]) @ vh[:3]
            taken = layer.lora_B @ layer.lora_A
            assert torch.allclose(taken, first, atol=1e-5), "not split in float32"
            got, want = matrix(layer.base), (exact - taken).to(dtype)
            assert got.dtype == dtype and torch.equal(got, want), "rounded elsewhere"


def test_a_rank_above_the_weights_is_refused(pissa):
    model = net()
    before = snapshot(model)
    for targets in (["q_proj"], ALL):  # q_proj is 6 by 8
        with pytest.raises(ValueError, match="only 6") as error:
            pissa.add(model, targets, r=7)
        assert_one_sentence(error)
        assert_unchanged(model, before)
    pissa.add(model, ["q_proj"], r=6)


def test_a_packed_weight_is_refused(pissa):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    model[1].weight = nn.Parameter(codes, requires_grad=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="packed") as error:
        pissa.add(model, ["0", "1"], r=2)
    assert_one_sentence(error)
    assert_unchanged(model, before)


# Bad input: one sentence each, and the model as it was

BAD = {
    "a rank above the default target's": dict(r=7),
    "a rank above one target's of two": dict(r=8, targets=["c_proj", "q_proj"]),
    "the default rank where it does not fit": dict(),
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    model = net()
    model.proj.weight.data[0, 0] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN or infinite") as error:
        reference.add(model, ALL, r=2)
    assert_one_sentence(error)
    assert snapshot(model)[1:] == before[1:]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_packed_weights_are_refused(kind):
    model = packed(kind)
    weight = model[2].weight.clone()
    with pytest.raises(ValueError, match="packed"):
        reference.add(model, ["2", "0"], r=2)
    assert type(model[2]) is nn.Linear and torch.equal(model[2].weight, weight)


def test_the_change_as_a_lora_is_refused_where_there_is_no_pissa():
    with pytest.raises(ValueError, match="no PiSSA") as error:
        reference.to_lora(net())
    assert_one_sentence(error)


# The oracle: peft


def peft_twin(model, paths):
    """peft's PiSSA on `model`, and its trainable parameters by our names."""
    gpt2 = any(isinstance(m, Conv1D) for m in model.modules())
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        init_lora_weights="pissa",
        target_modules=paths,
        fan_in_fan_out=gpt2,
    )
    twin = get_peft_model(model, config).eval()
    return twin, {
        n.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for n, p in twin.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("name", [*MODELS, "t5"])
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_numbers_equal_pefts_and_its_conversion_to_a_lora(name, tmp_path):
    model = {**MODELS, "t5": t5}[name]()
    plain, original = copy.deepcopy(model), copy.deepcopy(model)
    reference.add(model, "all-linear", r=4)
    ours = reference.state_dict(model, keep_vars=True)
    paths = sorted(every.paths(reference, model))
    twin, theirs = peft_twin(plain, paths)
    assert_same(outputs(model), outputs(twin), "the output at the start")
    for path in paths:  # A and B are defined up to their directions' signs
        assert_same(product(ours, path), product(theirs, path), f"B A of {path}")
        residual = plain.get_submodule(path).base_layer.weight
        assert_same(model.get_submodule(path).base.weight, residual, f"W_res of {path}")
    for n, p in theirs.items():
        p.data.copy_(ours[n])
    first = str(tmp_path / "first")
    twin.save_pretrained(first)
    assert_same_training(model, ours, twin, theirs)

    config = {"path_initial_model_for_weight_conversion": first}
    twin.save_pretrained(tmp_path / "lora", **config)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    converted = {
        n.removeprefix("base_model.model.").removesuffix(".weight"): t
        for n, t in stored.items()
    }
    tensors = reference.to_lora(model)
    assert tensors.keys() == converted.keys()
    for path in paths:
        assert_same(product(tensors, path), product(converted, path), f"BA of {path}")
        assert product(tensors, path).abs().max() > 1e-4, f"{path} did not train"
    loaded = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "lora")
    lora.load_state_dict(lora.add(original, paths, r=8, alpha=8), tensors)
    assert_same(outputs(original), outputs(model), "to_lora: the output")
    assert_same(outputs(loaded.eval()), outputs(model), "peft's LoRA: the output")
    assert_same_merged(reference.merge(model), twin.merge_and_unload())


# pissa.py copied alone, for tests/test_standalone.py

ALONE = """
import pissa
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x = torch.randn(5, 6)
plain = model(x)
pissa.add(model, ["0", "2"], r=2)
assert torch.allclose(model(x), plain, atol=1e-6)
for _ in range(2):
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for p in pissa.state_dict(model, keep_vars=True).values():
        p.data -= 0.1 * p.grad
tuned = model(x)
assert not torch.allclose(tuned, plain)
pissa.load_state_dict(model, pissa.state_dict(model))
assert pissa.to_lora(model)["2.lora_B"].shape == (2, 4)
merged = pissa.merge(model)
assert [type(m).__name__ for m in merged] == ["Linear", "Tanh", "Linear"]
assert torch.allclose(merged(x), tuned, atol=1e-5)
"""

# Broken copies, for tests/test_mutations.py

SPLIT = "_weight(base) - m.lora_B @ m.lora_A"
ROOT = "root = S[:r].sqrt()"
START = "self.start = self.lora_A.detach().clone(), self.lora_B.detach().clone()"
FOLDED = "_weight(self.base) + self.lora_B @ self.lora_A"
OWN_A, OWN_B = "(root[:, None] * Vh[:r])", "(U[:, :r] * root)"
LAID_OUT = "W = W.T if _is_conv1d(layer) else W\n    W = W.to"
ROUND = "W = W.to(layer.weight.dtype).contiguous()"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    every.test_adding_changes_no_output: {
        "the residual is not taken off": {SPLIT: "_weight(base)"}
    },
    test_the_residual_and_b_a_give_the_weight_back: {
        "B A is added to the base": {SPLIT: SPLIT.replace(" - ", " + ")},
        "the base is emptied": {SPLIT: "0 * _weight(base)"},
        "a Conv1D's residual is untransposed": {LAID_OUT: "W = W.to"},
    },
    test_a_and_b_take_the_principal_directions: {
        "the smallest directions are taken": {
            ROOT: f"U, S, Vh = U.flip(1), S.flip(0), Vh.flip(0)\n        {ROOT}"
        },
        "the directions after the first are taken": {
            ROOT: f"U, S, Vh = U[:, 1:], S[1:], Vh[1:]\n        {ROOT}"
        },
        "the singular values are left out": {ROOT: "root = S[:r] ** 0"},
        "the root is forgotten": {ROOT: "root = S[:r]"},
        "float64 is split in float32": {".to(**_like(base))": ".float()"},
    },
    test_a_and_b_share_the_singular_values_evenly: {
        "B gets all of S": {OWN_A: "Vh[:r].clone()", OWN_B: "(U[:, :r] * S[:r])"},
        "A and B are random": {OWN_A: "torch.randn_like(Vh[:r])"},
        "one direction too many is taken": {
            "        self.r = r\n": "        self.r = r = r + 1\n"
        },
        "a Conv1D is split untransposed": {
            "layer.weight.T if _is_conv1d(layer) else layer.weight": "layer.weight"
        },
    },
    test_the_first_gradient_reaches_a_and_b: {
        "it starts as LoRA does, B zero": {OWN_B: "(U[:, :r] * 0)"}
    },
    test_a_layer_is_the_residual_plus_b_a: {
        "B A is scaled by two": {"low @ self.lora_B.T": "2 * low @ self.lora_B.T"},
        "the branch is dead": {"y + low @ self.lora_B.T": "y"},
    },
    every.test_own_tensors_are_float32_over_a_16_bit_base: {
        "A and B are in the base's 16 bits": {
            ROOT: f"U, S, Vh = (t.to(base.weight) for t in (U, S, Vh))\n        {ROOT}"
        },
        "the answer is in float32": {"self.lora_B.T).to(y.dtype)": "self.lora_B.T)"},
    },
    test_a_16_bit_base_is_split_in_float32_and_rounded_once: {
        "B A is rounded before it is taken off": {
            SPLIT: "_weight(base) - (m.lora_B @ m.lora_A).to(base.weight.dtype)"
        },
        "the residual is in float32": {ROUND: "W = W.contiguous()"},
    },
    every.test_a_tied_weight_is_left_alone: {
        "splitting writes into a tied weight": {
            "layer.weight = nn.Parameter(W, requires_grad=False)": "layer.weight.data"
            ".copy_(W)"
        }
    },
    test_the_change_as_a_lora_fits_the_original_base: {
        "the start moves along": {START: START.replace(".clone()", "")},
        "the start is added, not taken off": {"[B, -B0]": "[B, B0]"},
        "the start is forgotten": {"[B, -B0]": "[B, 0 * B0]"},
        "the LoRA is of twice the change": {"[B, -B0]": "[2 * B, -B0]"},
    },
    test_files_pass_between_bases_whose_svd_took_other_signs: {
        "loading takes B alone": {
            "t.copy_(tensors[name])": 'name[-1] == "B" and t.copy_(tensors[name])'
        }
    },
    every.test_merged_equals_unmerged_to_1e_10_in_float64: {
        "merging adds nothing": {FOLDED: "_weight(self.base)"},
        "merging gives the first weights back": {
            FOLDED: "_weight(self.base) + self.start[1] @ self.start[0]"
        },
    },
    test_adding_and_merging_gives_the_weights_back: {
        "merging takes B A off again": {FOLDED: FOLDED.replace(" + ", " - ")}
    },
    test_a_rank_above_the_weights_is_refused: {
        "a rank that is too high is cut": {"if r > most:": "if False:"},
        "one target's rank is looked at": {
            "min(min(_shape(m)) for m in layers)": "min(_shape(layers[-1]))"
        },
    },
    test_a_packed_weight_is_refused: {
        "a packed weight is accepted": {"if _is_packed(layer.weight):": "if False:"}
    },
    every.test_frozen_weights_are_bit_identical_after_training: {
        "the residual trains along": {
            "nn.Parameter(W, requires_grad=False)": "nn.Parameter(W)",
            "_swap(model.requires_grad_(False), new)": "_swap(model, new)",
        }
    },
    every.test_only_what_the_state_dict_names_trains: {
        "the state dict leaves A out": {
            'names = ("lora_A", "lora_B")': 'names = ("lora_B",)'
        }
    },
}
MUTATIONS = by_fault(BROKEN)
