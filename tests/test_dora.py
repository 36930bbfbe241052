"""DoRA's laws, and the same numbers as peft: forward, backward, trained, merged.

A law that takes only `dora`, the module, is run again by tests/test_mutations.py on
broken copies of dora.py. What holds for other methods too is in test_every_method.py.
"""

import copy
import math

import pytest
import test_every_method as every
import torch
from common import (
    ALL,
    MODELS,
    assert_one_sentence,
    assert_same_merged,
    assert_same_training,
    assert_unchanged,
    by_fault,
    jiggle,
    net,
    snapshot,
    t5,
)
from peft import LoraConfig, get_peft_model
from test_lora import packed
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from peftlab import dora as reference


@pytest.fixture
def dora():
    return reference


def bases():
    """Linears of several shapes in float64, with and without a bias, and Conv1Ds."""
    torch.manual_seed(1)
    for base in (
        nn.Linear(6, 4),
        nn.Linear(4, 6, bias=False),
        nn.Linear(5, 5),  # square: a wrong transpose or dimension still fits
        Conv1D(4, 6),  # 6 in, 4 out
        Conv1D(5, 5),
    ):
        base.weight.data = torch.randn(base.weight.shape) / 2
        if base.bias is not None:
            base.bias.data = torch.randn(base.bias.shape)
        yield base.double()


def on(dora, base, stirred=True):
    """A layer of rank 3, scaled by 4, over `base`; stirred: as after training."""
    layer = dora.add(nn.Sequential(base), ["0"], r=3, alpha=12)[0]
    if stirred:
        jiggle([layer.lora_A, layer.lora_B, layer.dora_m])
    return layer


def matrix(base):
    """W as (out, in)."""
    w = base.weight.detach()
    return w.T if isinstance(base, Conv1D) else w


def dense(layer, x, norm_of=lambda w: w.norm(dim=1)):
    """Equation 5 with whole matrices, gradients and all."""
    w = matrix(layer.base) + 4 * layer.lora_B @ layer.lora_A
    return linear(x, (layer.dora_m / norm_of(w))[:, None] * w, layer.base.bias)


# The laws


def test_the_length_starts_as_each_outputs_norm(dora):
    for base in bases():
        layer = on(dora, base, stirred=False)
        lengths = [math.sqrt(sum(v * v for v in row)) for row in matrix(base).tolist()]
        want = torch.tensor(lengths, dtype=torch.float64)
        assert layer.dora_m.shape == want.shape, "m is one number for each output"
        torch.testing.assert_close(layer.dora_m.detach(), want)


def test_a_starts_uniform_within_one_over_the_root_of_its_width(dora):
    layer = dora.add(nn.Sequential(nn.Linear(400, 3)), ["0"], r=100)[0]
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound, "A starts as LoRA's does"
    assert abs(layer.lora_A.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert layer.lora_A.shape == (100, 400) and layer.lora_B.shape == (3, 100)
    assert not layer.lora_B.any()


def test_each_output_is_a_length_times_a_direction(dora):
    for base in bases():
        layer, n_in = on(dora, base), matrix(base).shape[1]
        x = torch.randn(2, 3, n_in, dtype=torch.float64)
        with torch.no_grad():
            y, change = layer(x), 4 * layer.lora_B @ layer.lora_A
            for i, row in enumerate(matrix(base) + change):
                want = layer.dora_m[i] * (x @ row) / row.norm()
                want = want + (0 if base.bias is None else base.bias[i])
                assert torch.allclose(y[..., i], want), (
                    "an output is m * (w + s B A) x / |w + s B A|, the norm along the"
                    " inputs, s = alpha / r in both places, the bias as it was"
                )
            assert y.shape == (2, 3, len(change))
            torch.testing.assert_close(layer(x[0, 0]), y[0, 0])


def test_the_norm_is_a_constant_to_the_gradient(dora):
    for base in bases():
        layer, n_in = on(dora, base), matrix(base).shape[1]
        x = torch.randn(7, n_in, dtype=torch.float64, requires_grad=True)
        own = [layer.lora_A, layer.lora_B, layer.dora_m, x]

        def gradients(y, own=own):
            return torch.autograd.grad(torch.sin(y).sum(), own)

        ours = gradients(layer(x))
        constant = gradients(dense(layer, x, lambda w: w.norm(dim=1).detach()))
        attached = gradients(dense(layer, x))
        for got, want in zip(ours, constant, strict=True):
            assert torch.allclose(got, want), (
                "not section 4.3's gradient: |W + s B A| must be detached from it"
            )
        for got, other in zip(ours[:2], attached[:2], strict=True):
            assert (got - other).abs().max() > 1e-3, "the two would be hard to tell"


def test_the_first_gradient_reaches_b_and_m_and_not_a(dora):
    for base in bases():
        layer = on(dora, base, stirred=False)
        x = torch.randn(7, matrix(base).shape[1], dtype=torch.float64)
        layer(x).sin().sum().backward()
        assert layer.lora_B.grad.any(), "B stays zero: is A zero too, the branch dead?"
        assert layer.dora_m.grad.all(), "some length gets no gradient"
        assert not layer.lora_A.grad.any(), "A has a gradient: B was not zero"


def test_a_merged_row_is_as_long_as_m_says(dora):
    for base in bases():
        layer = on(dora, base)
        directions = matrix(base) + 4 * layer.lora_B @ layer.lora_A
        merged = matrix(dora.merge(nn.Sequential(layer))[0])
        want = layer.dora_m.abs()
        assert torch.allclose(merged.norm(dim=1), want), "m is not the merged length"
        cosine = torch.cosine_similarity(merged, directions) * layer.dora_m.sign()
        assert torch.allclose(cosine, torch.ones_like(want)), "nor W + s B A its turn"


def test_a_row_of_zeros_stays_finite_and_can_learn(dora):
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        base, x = nn.Linear(6, 4).to(dtype), torch.randn(5, 6, dtype=dtype)
        base.weight.data[1] = 0
        plain = base(x)
        layer = on(dora, base, stirred=False)
        torch.testing.assert_close(layer(x), plain)
        own = [layer.lora_A, layer.lora_B, layer.dora_m]
        for _ in range(3):
            gradients = torch.autograd.grad((layer(x) - 1).pow(2).sum(), own)
            for p, g in zip(own, gradients, strict=True):
                assert g.isfinite().all(), "0 / 0: the norm of a row may be zero"
                p.data -= 0.01 * g
        gap = (layer(x) - plain).abs()
        assert gap.isfinite().all() and gap[:, 1].max() > 1e-4, "that row is dead"
        assert dora.merge(nn.Sequential(layer))[0].weight.isfinite().all()


def test_a_row_that_is_nearly_cancelled_keeps_its_length(dora):
    for left, autocast, most in ((1e-3, False, 1e-3), (0.1, True, 0.1)):
        torch.manual_seed(0)
        base = nn.Linear(64, 64, bias=False)
        layer = on(dora, base, stirred=False)
        with torch.no_grad():
            layer.lora_B.normal_()
            change = 4 * layer.lora_B @ layer.lora_A
            base.weight.copy_(left * torch.randn(64, 64) - change)
            exact = dense(layer.double(), x := torch.randn(5, 64).double())
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = layer.float()(x.float())
        gap = (got - exact).abs().max() / exact.abs().max()
        assert gap < most, f"off by {gap:.1g}: a square that is expanded is rounding"


def test_merging_takes_a_16_bit_base_once_to_its_own_precision(dora):
    layer = on(dora, nn.Linear(8, 8).bfloat16())
    with torch.no_grad():
        w = layer.base.weight.float() + 4 * (layer.lora_B @ layer.lora_A)
        exact = (layer.dora_m / w.norm(dim=1))[:, None] * w
    merged = dora.merge(nn.Sequential(layer))[0].weight
    assert torch.equal(merged, exact.bfloat16()), "the product is rounded only once"


def test_a_packed_weight_is_refused(dora):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    model[1].weight = nn.Parameter(codes, requires_grad=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="packed") as error:
        dora.add(model, ["0", "1"])
    assert_one_sentence(error)
    assert_unchanged(model, before)


def test_a_layer_with_hooks_is_refused(dora):
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        getattr(model[1], hook)(lambda *_: None)
        before = snapshot(model)
        with pytest.raises(ValueError, match="hooks") as error:
            dora.add(model, ["0", "1"])
        assert_one_sentence(error)
        assert_unchanged(model, before)


# Bad input: one sentence each, and the model as it was

BAD = {
    "alpha=0": dict(alpha=0),
    "alpha=-16": dict(alpha=-16),
    "alpha=nan": dict(alpha=math.nan),
    "alpha=inf": dict(alpha=math.inf),
    "alpha='16'": dict(alpha="16"),
    "alpha=None": dict(alpha=None),
    "alpha=10**400": dict(alpha=10**400),
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
def test_bitsandbytes_packed_weights_are_refused(kind):
    model = packed(kind)
    with pytest.raises(ValueError, match="packed"):
        reference.add(model, ["0", "2"], r=2)
    assert type(model[2]) is nn.Linear and model[2].weight.requires_grad


def test_dora_trains_one_number_more_an_output_than_lora():
    model = reference.add(net(), ALL, r=2)
    sizes = [(8, 6), (12, 8), (12, 12), (12, 12)]  # (out, in)
    count = sum(t.numel() for t in reference.state_dict(model).values())
    assert count == sum(2 * (n_out + n_in) + n_out for n_out, n_in in sizes)


# The oracle: peft


def peft_twin(model, paths):
    """peft's DoRA on `model`, and its trainable parameters by our names."""
    gpt2 = any(isinstance(m, Conv1D) for m in model.modules())
    config = LoraConfig(
        r=4, lora_alpha=6, use_dora=True, target_modules=paths, fan_in_fan_out=gpt2
    )
    twin = get_peft_model(model, config)
    return twin, {
        n.removeprefix("base_model.model.")
        .replace(".default.weight", "")
        .replace("lora_magnitude_vector", "dora_m"): p
        for n, p in twin.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", [*MODELS, "t5"])
def test_numbers_equal_pefts_before_and_after_training(name, mode):
    model = {**MODELS, "t5": t5}[name]().train(mode == "train")
    plain = copy.deepcopy(model)
    reference.add(model, "all-linear", r=4, alpha=6)
    ours = reference.state_dict(model, keep_vars=True)
    twin, theirs = peft_twin(plain, sorted(every.paths(reference, model)))
    for n in ours:
        if n.endswith("dora_m"):  # before anything is copied
            torch.testing.assert_close(ours[n].data, theirs[n].data)
    jiggle(p for n, p in ours.items() if not n.endswith("lora_A"))
    for n, p in theirs.items():
        p.data.copy_(ours[n])
    twin.train(mode == "train")
    assert_same_training(model, ours, twin, theirs)
    assert_same_merged(reference.merge(model), twin.merge_and_unload())


# dora.py copied alone, for tests/test_standalone.py

ALONE = """
import dora
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x = torch.randn(5, 6)
plain = model(x)
dora.add(model, ["0", "2"], r=2)
assert torch.allclose(model(x), plain, atol=1e-6)
for _ in range(2):
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for p in dora.state_dict(model, keep_vars=True).values():
        p.data -= 0.1 * p.grad
tuned = model(x)
assert not torch.allclose(tuned, plain)
dora.load_state_dict(model, dora.state_dict(model))
merged = dora.merge(model)
assert [type(m).__name__ for m in merged] == ["Linear", "Tanh", "Linear"]
assert torch.allclose(merged(x), tuned, atol=1e-5)
"""

# Broken copies, for tests/test_mutations.py

CHANGE = "self.scaling * (self.lora_B @ self.lora_A)"
DETACHED = "@torch.no_grad()  # section 4.3: a constant to the gradient"
FACTOR = "(self.dora_m / self.norm())"
LINEAR = "nn.functional.linear(x, _weight(self.base))"
TURNED = "turned = y + (self.scaling * low) @ self.lora_B.T"
ADD_BIAS = "if self.base.bias is not None:\n            z = z + self.base.bias"
LONG = "self.turned() * (self.dora_m / self.norm())[:, None]"
NORM = "return torch.linalg.vector_norm(W, dim=1).clamp_min(torch.finfo(W.dtype).tiny)"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_each_output_is_a_length_times_a_direction: {
        "alpha / r is missing": {"scaling = alpha / r": "scaling = 1.0"},
        "the scaling is forgotten in the norm": {CHANGE: "(self.lora_B @ self.lora_A)"},
        "the scaling is forgotten in the direction": {"(self.scaling * low)": "low"},
        "the norm is W's alone": {f"return W + {CHANGE}": "return W"},
        "the norm is missing": {FACTOR: "self.dora_m"},
        "the length is missing": {FACTOR: "(1 / self.norm())"},
        "both are missing: it is LoRA": {f" * {FACTOR}": ""},
        "it divides by m": {FACTOR: "(self.norm() / self.dora_m)"},
        "the bias is scaled along": {LINEAR: "self.base(x)", ADD_BIAS: "pass"},
        "only the change is scaled, not W": {
            TURNED: TURNED.replace("y + ", ""),
            f"turned * {FACTOR}": f"y + turned * {FACTOR}",
        },
        "the branch is dead": {TURNED: "turned = y + 0 * low.sum()"},
    },
    test_the_length_starts_as_each_outputs_norm: {
        "the norm is of the columns": {"(W, dim=1)": "(W, dim=0)"},
        "the norm is of the whole matrix": {
            "vector_norm(W, dim=1)": "vector_norm(W).expand(len(W)).clone()"
        },
        "a Conv1D is untransposed": {
            "layer.weight.T if _is_conv1d(layer) else layer.weight": "layer.weight"
        },
    },
    every.test_adding_changes_no_output: {
        "the bias is forgotten": {ADD_BIAS: "pass"},
        "m starts at one": {
            "nn.Parameter(self.norm())": "nn.Parameter(torch.ones(n_out, **like))"
        },
    },
    test_the_norm_is_a_constant_to_the_gradient: {
        "the norm is attached to the gradient": {DETACHED: ""},
        "the whole factor is detached": {FACTOR: f"{FACTOR}.detach()"},
        "the direction is detached": {
            "(self.scaling * low)": "(self.scaling * low.detach())"
        },
    },
    test_the_first_gradient_reaches_b_and_m_and_not_a: {
        "A and B are both zero": {
            "kaiming_uniform_(self.lora_A, a=math.sqrt(5))": "zeros_(self.lora_A)"
        },
        "B starts random": {"torch.zeros(n_out": "torch.randn(n_out"},
    },
    test_a_starts_uniform_within_one_over_the_root_of_its_width: {
        "A starts from another width": {"a=math.sqrt(5)": "a=0"}
    },
    test_a_row_of_zeros_stays_finite_and_can_learn: {
        "a row of zeros is 0 / 0": {".clamp_min(torch.finfo(W.dtype).tiny)": ""}
    },
    test_a_row_that_is_nearly_cancelled_keeps_its_length: {
        "the square is expanded": {
            NORM: "base = _weight(self.base)\n        d = W - base\n"
            "        square = (base**2 + 2 * base * d + d**2).sum(1)\n"
            "        return square.clamp_min(torch.finfo(W.dtype).tiny).sqrt()"
        }
    },
    test_a_merged_row_is_as_long_as_m_says: {
        "merging forgets the length": {LONG: "self.turned() / self.norm()[:, None]"},
        "merging forgets the norm": {LONG: "self.turned() * self.dora_m[:, None]"},
        "merging forgets the change": {
            LONG: LONG.replace("self.turned()", "_weight(self.base)")
        },
        "merging scales the columns": {LONG: f"{FACTOR} * self.turned()"},
    },
    every.test_merged_equals_unmerged_to_1e_10_in_float64: {
        "merging forgets the scaling": {
            LONG: LONG.replace(
                "self.turned()",
                "(self.turned() - (self.scaling - 1) * (self.lora_B @ self.lora_A))",
            )
        },
        "merging is LoRA's": {LONG: "self.turned()"},
    },
    test_merging_takes_a_16_bit_base_once_to_its_own_precision: {
        "merging rounds twice": {
            LONG: LONG.replace(
                "self.turned()", "self.turned().to(self.base.weight.dtype)"
            )
        }
    },
    test_a_packed_weight_is_refused: {
        "a packed weight is accepted": {"if _is_packed(layer.weight):": "if False:"}
    },
    test_a_layer_with_hooks_is_refused: {
        "hooks are lost": {"if any(hooks) or ": "if False and "}
    },
    every.test_only_what_the_state_dict_names_trains: {
        "the state dict leaves m out": {
            'names = ("lora_A", "lora_B", "dora_m")': 'names = ("lora_A", "lora_B")'
        }
    },
    every.test_the_state_dict_goes_round: {
        "m is not loaded": {
            "t.copy_(tensors[name])": 'name[-1] == "m" or t.copy_(tensors[name])'
        }
    },
    every.test_the_verbs_say_so_where_there_is_nothing: {
        "nothing is said where there is no DoRA": {
            "    if not layers:\n        name": "    if False:\n        name"
        }
    },
    every.test_own_tensors_are_float32_over_a_16_bit_base: {
        "the answer is in float32": {"return z.to(y.dtype)": "return z"}
    },
}
MUTATIONS = by_fault(BROKEN)
