"""Laws of absmax quantization and of LLM.int8(), and the same numbers as bitsandbytes.

A law that takes only `int8`, the module, is run again by tests/test_mutations.py on
broken copies of int8.py.
"""

import copy
import io
import logging
import math
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from common import (
    IDS,
    assert_one_sentence,
    assert_unchanged,
    by_fault,
    gpt2,
    llama,
    refused,
    snapshot,
    t5,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from peftlab import int8 as reference
from peftlab import lora

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODELS = {"llama": llama, "gpt2": gpt2, "t5": t5}
SOME = (5, 90, 200)  # columns with outliers


@pytest.fixture(scope="module")
def int8():
    return reference


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes says at each call that it casts its input to float16."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(n_in=24, n_out=10, bias=True, dtype=torch.float32, seed=3):
    """An nn.Linear with random weights and bias."""
    base = nn.Linear(n_in, n_out, bias)
    for i, p in enumerate(base.parameters()):
        p.data = randn(*p.shape, seed=seed + i) / math.sqrt(n_in)
    return base.to(dtype).eval()


def activations(rows=16, n_in=24, outliers=(3, 17), size=20.0, dtype=torch.float32):
    """Ordinary inputs, with a few columns in which some row has a large value."""
    x = randn(rows, n_in, seed=7).clamp(-5, 5)
    for i, column in enumerate(outliers):
        x[i % rows, column] = size * (-1) ** i
    return x.to(dtype)


def quantized(int8, model, **settings):
    """Every linear of the model but its head in int8."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Conv1D) and child is not head:
                setattr(parent, name, int8.Int8Linear(child, **settings))
    return model


def by_hand(values):
    """Codes and absmax of a list of floats, in plain Python (float64)."""
    absmax = max(abs(v) for v in values)
    return [round(v * 127 / absmax) if absmax else 0 for v in values], absmax


def spread(q):
    """absmax for each value."""
    absmax = q.absmax.double()
    if q.blocksize:
        size = min(q.blocksize, q.codes.numel())
        absmax = absmax.expand(-1, size).flatten()[: q.codes.numel()]
        return absmax.view(q.codes.shape)
    return absmax.expand(q.codes.shape)


@contextmanager
def another_cpu():
    """As on a processor without AVX512."""
    with patch.object(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"):
        yield


@contextmanager
def avx512():
    """As on one with it, where `torch._int_mm` is wrong for a single input."""
    right = torch._int_mm

    def product(a, b):
        return right(a, b) if len(b) > 1 else right(a, b).zero_()

    with (
        patch.object(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512"),
        patch.object(torch, "_int_mm", product),
    ):
        yield


# The laws of absmax


def test_a_code_is_127_x_over_absmax_rounded_half_to_even(int8):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5], [-0.5, -1.5, 63.4, -126.6]])
    q = int8.quantize(x)
    assert q.codes.dtype == torch.int8 and q.codes.shape == x.shape
    assert q.codes.tolist() == [[127, 0, 2, 2], [0, -2, 63, -127]], (
        "round half to even, signs kept; 127, not 128, stands for absmax"
    )
    assert q.absmax.dtype == torch.float32 and q.absmax.item() == 127
    for seed in range(5):
        x = randn(40, seed=seed)
        codes, absmax = by_hand(x.tolist())
        q = int8.quantize(x)
        assert q.codes.tolist() == codes and q.absmax.item() == absmax


def test_each_slice_along_dim_has_an_absmax_of_its_own(int8):
    x = randn(3, 4, 5) * torch.tensor([1e-3, 1, 50.0]).view(3, 1, 1)
    for dim in (0, 1, 2, -1, -3):
        q = int8.quantize(x, dim=dim)
        assert q.absmax.shape == x.abs().amax(dim, keepdim=True).shape
        rows = [t.movedim(dim, -1).reshape(-1, x.shape[dim]) for t in (x, q.codes)]
        for row, got, share in zip(*rows, q.absmax.flatten(), strict=True):
            codes, absmax = by_hand(row.tolist())
            assert share == absmax, f"dim {dim}: absmax is shared by other values"
            assert got.tolist() == codes


def test_each_block_of_the_flat_tensor_has_an_absmax_of_its_own(int8):
    for x in (randn(6, 11), randn(11, 6).T):
        flat = x.flatten().tolist()
        for n in (1, 7, 66, 67, 2**40, 10**400):  # the last may be short, or the only
            q = int8.quantize(x, blocksize=n)
            step = min(n, 66)
            blocks = [by_hand(flat[i : i + step]) for i in range(0, 66, step)]
            assert q.absmax.flatten().tolist() == [absmax for _, absmax in blocks]
            assert q.codes.shape == x.shape
            codes = [code for block, _ in blocks for code in block]
            assert q.codes.flatten().tolist() == codes, f"blocks of {n} run over rows"
            gap = (int8.dequantize(q) - x).abs()
            assert (gap <= spread(q) / 253).all()


def test_going_back_gives_codes_times_absmax_over_127(int8):
    x = randn(6, 11)
    for how in ({}, dict(dim=0), dict(blocksize=7)):
        q = int8.quantize(x, **how)
        exact = q.codes.double() * spread(q) / 127
        back = int8.dequantize(q).double()
        torch.testing.assert_close(back, exact, rtol=3e-7, atol=0)
    for dtype in DTYPES:
        q = int8.quantize(x.to(dtype), dim=-1)
        back = int8.dequantize(q)
        assert back.dtype == dtype and back.shape == x.shape
        assert q.absmax.dtype == torch.float32, "16 bits would round absmax"
        largest = x.to(dtype).abs().amax(1)
        assert torch.equal(back.abs().amax(1), largest), "127 stands for absmax itself"


def test_zeros_stay_zeros(int8):
    x = torch.zeros(3, 4)
    x[1] = torch.tensor([1.0, -2, 0, 2])
    for how in ({}, dict(dim=-1), dict(dim=0), dict(blocksize=4)):
        back = int8.dequantize(int8.quantize(x, **how))
        assert torch.equal(back == 0, x == 0), "0 / 0 has no place in a row of zeros"
    q = int8.quantize(torch.zeros(5), blocksize=2)
    assert not q.codes.any() and not q.absmax.any()


def test_no_magnitude_is_too_small_or_too_large(int8):
    row = torch.tensor([1.0, -0.5, 0.25, 0.01])
    codes = by_hand(row.tolist())[0]
    for power in (-149, -140, -128, -122, -100, -99, 60, 127):
        x = torch.ldexp(row.double(), torch.tensor(power)).float()
        q = int8.quantize(x)
        gap = abs(int8.dequantize(q) - x).max()
        assert gap <= q.absmax / 254 * 1.01 + 2**-149, (
            f"absmax 2**{power}: does 127 / absmax or codes * absmax overflow?"
        )
        if power > -135:  # below, float32 has not the bits to hold the row
            assert q.codes.tolist() == codes, f"absmax 2**{power} gives other codes"
    assert int8.quantize(torch.tensor([1e-40, -1e-40])).codes.tolist() == [127, -127]


SHARING = ({}, dict(dim=-1), dict(dim=0), *({"blocksize": n} for n in (1, 3, 8)))
EVERY = settings(
    max_examples=60, deadline=None, derandomize=True, report_multiple_bugs=False
)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TIES = st.sampled_from([0.0, 0.5, 1.5, 2.5, 127.0])  # beside 127, a half is a tie
ORDINARY = TIES | st.floats(2**-10, 127, width=32)


@st.composite
def matrices(draw, floats=FINITE):
    """Any finite matrix in any of the dtypes, subnormal and huge numbers too."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    n = rows * columns
    values = draw(st.lists(floats, min_size=n, max_size=n))
    x = torch.tensor(values, dtype=torch.float64).view(rows, columns)
    dtype = draw(st.sampled_from(DTYPES))
    if dtype == torch.float64 and draw(st.booleans()):
        x = x / 3  # thirds are not float32's
    return x.to(dtype).nan_to_num()  # beyond it: its largest


@EVERY
@given(x=matrices(), how=st.sampled_from(SHARING))
def test_the_round_trip_is_within_half_a_step(int8, x, how):
    q = int8.quantize(x, **how)
    back, absmax = int8.dequantize(q), spread(q)
    size = x.abs().float().double()
    assert (size <= absmax).all() and absmax.max() == size.max(), "absmax is another"
    assert q.codes.min() >= -127 and q.codes.max() <= 127
    gap = (back.double() - x.double()).abs()
    info = torch.finfo(torch.float32 if x.dtype == torch.float64 else x.dtype)
    rounding = info.eps * x.abs().double() + info.smallest_normal * info.eps
    step = absmax / 127
    assert (gap <= step * (0.5 + 1e-4) + rounding).all(), (
        f"off by {(gap / step).max():.3f} steps: half a step is what rounding costs"
    )
    again = int8.quantize(back, **how)
    assert torch.equal(again.codes, q.codes), "what came back has other codes"
    assert torch.equal(again.absmax, q.absmax), "what came back has another absmax"


@EVERY
@given(
    x=matrices(ORDINARY | ORDINARY.map(lambda v: -v)),
    how=st.sampled_from(SHARING),
    power=st.integers(-3, 3),
)
def test_signs_and_scales_leave_the_codes_alone(int8, x, how, power):
    q = int8.quantize(x, **how)
    flipped, scaled = (int8.quantize(x * s, **how) for s in (-1, 2.0**power))
    assert torch.equal(flipped.codes, -q.codes), "round toward even, not up"
    assert torch.equal(flipped.absmax, q.absmax), "absmax has lost its abs"
    assert torch.equal(scaled.codes, q.codes), "the scale belongs to absmax alone"
    assert torch.equal(scaled.absmax, q.absmax * 2.0**power)


# The laws of LLM.int8()


def test_outlier_columns_meet_weights_rounded_to_their_dtype(int8):
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        layer = int8.Int8Linear(nn.Linear(64, 32, bias=False).to(dtype))
        x = torch.zeros(3, 64, dtype=dtype)
        x[:, 5] = torch.tensor([50.0, 37.0, 50.0])  # nothing but one outlier column
        w = layer.weight[:, 5].to(dtype)
        want = (x[:, 5:6].float() @ w.float()[None]).to(dtype)
        assert torch.equal(layer(x), want), dtype


def test_columns_with_a_large_value_are_taken_out(int8):
    x = activations()
    x[4, 9], x[5, 11] = 6.0, 5.999  # the first reaches the threshold
    before = x.clone()
    rest, columns = int8.decompose(x, 6.0)
    assert torch.equal(x, before), "the input was written into"
    assert columns.tolist() == [3, 9, 17], "every column with some |x| >= 6, no other"
    assert not rest.codes[:, columns].any(), "an outlier column counts twice"
    small = x.masked_fill(x.abs() >= 6, 0)
    assert torch.equal(rest.absmax, small.abs().amax(1, keepdim=True)), (
        "the outlier coarsens the rest of its row; or another row's absmax is used"
    )
    back = int8.dequantize(rest)
    back[:, columns] = x[:, columns]
    assert ((back - x).abs() <= rest.absmax / 253).all()
    for threshold in (0, 0.0, 30):
        rest, columns = int8.decompose(x, threshold)
        assert not columns.numel(), "0 means that no column is taken out"
        assert torch.equal(rest.codes, int8.quantize(x, dim=-1).codes)


def test_a_layer_computes_equation_8(int8):
    for bias, threshold in ((True, 6.0), (False, 6.0), (True, 0), (False, 0.5)):
        base, x = plain(bias=bias), activations()
        layer = int8.Int8Linear(base, threshold)
        w = int8.quantize(base.weight, dim=-1)
        rest, columns = int8.decompose(x, threshold)
        assert torch.equal(w.codes, layer.codes) and torch.equal(w.absmax, layer.absmax)
        whole = (rest.codes.long() @ w.codes.long().T).double()
        want = whole * rest.absmax.double() * w.absmax.double().T / 127**2
        want += (x[:, columns] @ int8.dequantize(w)[:, columns].T).double()
        want += base.bias.double() if bias else 0
        torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)
        fine = linear(x, layer.weight, layer.bias)
        half_steps = rest.absmax / 253 * layer.weight.abs().sum(1)
        assert ((layer(x) - fine).abs() <= half_steps + 1e-5).all()


def test_outliers_cost_little_with_the_threshold_and_much_without(int8):
    """64 inputs, of which each has three values of up to 60."""
    base, x = plain(1024, 256, seed=11), randn(64, 1024, seed=7).clamp(-5, 5)
    signs, sizes = randn(64, 3, seed=9).sign(), 60 - 18 * randn(64, 3).sigmoid()
    x[:, [5, 200, 900]] = signs * sizes
    layers = [int8.Int8Linear(base, t) for t in (6.0, 0)]
    # over the base, and over the weight that is stored: its own rounding apart
    for weight, times in ((base.weight, 4), (layers[0].weight, 10)):
        exact = linear(x, weight, base.bias)
        mixed, naive = ((m(x) - exact).std() / exact.std() for m in layers)
        assert mixed < 0.01, f"with the threshold: an error of {mixed:.3f}"
        assert naive > times * mixed, "is the threshold ignored?"


def test_the_integer_product_is_exact_for_any_shape(int8):
    torch.manual_seed(0)
    shapes = [(1, 7, 5), (3, 1, 1), (17, 33, 9), (2, 1041, 3), (5, 2100, 4), (0, 8, 6)]
    shapes += [(20, 1, 5), (82, 1, 7), (300, 1, 64), (64, 2, 40)]  # few inputs
    for n, n_in, n_out in shapes:
        a = torch.randint(-127, 128, (n, n_in), dtype=torch.int8)
        b = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8)
        if n_in > 1000:  # large products, so that sums pass 2**24, odd ones too
            a, b = a.abs().clamp(min=100), b.abs().clamp(min=100)
        want = a.long() @ b.long().T
        for where in (nullcontext, another_cpu, avx512):
            with where():
                got = int8._multiply(a, b)
            assert got.dtype == torch.int32 and torch.equal(got.long(), want), (
                f"in={n_in}: torch._int_mm is wrong for 1, float32 exact up to 2**24"
            )


def test_any_leading_shape_and_float_goes_through(int8):
    base = plain()
    layer, x = int8.Int8Linear(base), activations()
    flat = layer(x)
    assert torch.equal(layer(x.view(2, 4, 2, 24)), flat.view(2, 4, 2, 10))
    assert torch.equal(layer(x.T.contiguous().T), flat), "strides change the numbers"
    torch.testing.assert_close(layer(x[:1].expand(3, 24)), layer(x[:1]).expand(3, 10))
    naive = int8.Int8Linear(base, 0)
    torch.testing.assert_close(naive(x[-1]), naive(x)[-1])
    x = torch.zeros(3, 0, 24, requires_grad=True)
    y = layer(x)
    assert y.shape == (3, 0, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for dtype in DTYPES:
        x = activations(dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype, "the answer is in the input's dtype"
        # two roundings at most of the largest: of the outliers' weights, of the answer
        gap = (y.double() - layer(x.float()).double()).abs().max()
        assert gap <= 2 * flat.abs().max() * torch.finfo(dtype).eps + 1e-5


def test_autocast_changes_no_number(int8):
    layer, x = int8.Int8Linear(plain(256, 64)), activations(32, 256, (5, 90), 60.0)
    for where in (nullcontext, another_cpu):
        with where():
            want = layer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = layer(x)
        assert got.dtype == x.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg="sums were rounded")


def test_not_a_number_stays_in_its_row(int8):
    for threshold in (6.0, 0):
        layer = int8.Int8Linear(plain(), threshold)
        for bad in (math.nan, math.inf, -math.inf):
            x = activations(outliers=())
            fine = layer(x)
            x[2, 5] = bad
            y = layer(x)
            assert not y[2].isfinite().any(), f"{bad} in, finite out: it is hidden"
            others = torch.arange(len(x)) != 2
            assert (y - fine)[others].abs().max() < 0.05


def test_the_gradient_is_that_of_the_dequantized_weight(int8):
    for dtype in (torch.float32, torch.bfloat16):
        base = plain(dtype=dtype)
        layer = int8.Int8Linear(base)
        x = activations(dtype=dtype).view(4, 4, 24).requires_grad_(True)
        y = layer(x)
        grad = randn(*y.shape, dtype=dtype)
        y.backward(grad)
        want = grad @ layer.weight.to(dtype)
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad, want, msg="the gradient is grad @ W")
        assert layer.bias.grad is None, "the bias is frozen"
    layer.bias.requires_grad_(True)
    layer(x.detach()).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.flatten(0, 1).sum(0))
    assert [n for n, _ in layer.named_parameters()] == ["bias"]


def test_backward_keeps_no_input_and_no_float_weight(int8):
    layer = int8.Int8Linear(plain())
    x, kept = activations().requires_grad_(True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        y = layer(x).sum()
    held = {t.data_ptr() for t in (layer.codes, layer.absmax)}
    strange = [(t.dtype, t.shape) for t in kept if t.data_ptr() not in held]
    assert kept and not strange, f"kept for backward beside the codes: {strange}"
    assert y.grad_fn is not None


def test_the_base_is_left_alone_and_the_layer_is_frozen(int8):
    base = plain().train()
    before = snapshot(base)
    layer = int8.Int8Linear(base)
    layer.half()
    assert_unchanged(base, before)
    assert layer.training and not int8.Int8Linear(base.eval()).training
    assert (layer.in_features, layer.out_features) == (24, 10)
    assert not any(p.requires_grad for p in layer.parameters())
    assert int8.Int8Linear(plain(bias=False)).bias is None


def test_the_weight_is_made_anew_with_a_warning_on_it(int8):
    for dtype in DTYPES:
        base = plain(dtype=dtype)
        w = int8.Int8Linear(base).weight
        assert w.dtype == dtype and w.shape == (10, 24) and not w.requires_grad
        assert torch.equal(w, int8.dequantize(int8.quantize(base.weight, dim=-1)))
        assert hasattr(w, "quant_state"), "merging cannot know that nothing is kept"
    layer = int8.Int8Linear(base)
    layer.weight.zero_()
    assert layer.weight.any() and layer.weight is not layer.weight
    names = {n: t.dtype for n, t in layer.state_dict().items()}
    assert names.keys() == {"codes", "absmax", "bias"}, "a float weight is stored"
    assert names["codes"] == torch.int8 and names["absmax"] == torch.float32


def test_a_cast_of_the_model_spares_codes_and_absmax(int8):
    base = plain()
    codes, absmax, *_ = int8.quantize(base.weight, dim=-1)
    assert not torch.equal(absmax.bfloat16().float(), absmax)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = nn.Sequential(int8.Int8Linear(base)).to(dtype)
        layer = model[0]
        assert layer.absmax.dtype == torch.float32, "the cast has rounded absmax"
        assert torch.equal(layer.absmax, absmax) and torch.equal(layer.codes, codes)
        assert layer.bias.dtype == dtype and layer.weight.dtype == dtype
        assert model(activations(dtype=dtype)).dtype == dtype
        layer.float()
        assert torch.equal(layer.absmax, absmax) and layer.weight.dtype == torch.float32
    assert model.to("meta")[0].absmax.is_meta, "absmax stays behind on another device"


def test_copies_and_stored_states_give_the_same_numbers(int8):
    layer, x = int8.Int8Linear(plain()), activations()
    want = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), want)
    assert twin.codes.data_ptr() != layer.codes.data_ptr()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = int8.Int8Linear(plain(seed=50))
    assert not torch.equal(other(x), want)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), want), "the state dict lacks something"


def test_gpt2s_conv1d_is_stored_as_out_by_in(int8):
    for n_in in (24, 10):  # square, too, where a wrong transpose still fits
        twin, base = plain(n_in), Conv1D(10, n_in)
        base.weight.data, base.bias.data = twin.weight.data.T.clone(), twin.bias.data
        ours, theirs = int8.Int8Linear(base), int8.Int8Linear(twin)
        assert ours.codes.shape == (10, n_in) and ours.codes.is_contiguous()
        assert torch.equal(ours.absmax, theirs.absmax), "absmax is over the input"
        assert torch.equal(ours.codes, theirs.codes)


def test_whole_models_keep_their_function(int8):
    def run(model):
        more = dict(decoder_input_ids=IDS) if name == "t5" else {}
        first = model.get_input_embeddings().weight.requires_grad_(True)
        logits = model(IDS, **more).logits
        return logits, torch.autograd.grad(logits.square().mean(), first)[0]

    for name, build in MODELS.items():
        model, exact = quantized(int8, build()), run(build())
        assert sum(isinstance(m, int8.Int8Linear) for m in model.modules()) >= 8
        for got, want, most in zip(run(model), exact, (0.06, 0.25), strict=True):
            gap = ((got - want).norm() / want.norm()).item()
            assert 1e-4 < gap < most, f"{name}: off by {gap:.3f}, logits or gradient"
        logits = run(model.bfloat16())[0]
        assert logits.dtype == torch.bfloat16
        assert (logits - exact[0]).norm() < 0.1 * exact[0].norm()


def test_lora_trains_over_int8_and_merge_refuses_it(int8):
    model = lora.add(quantized(int8, gpt2()), ["c_attn", "c_proj", "c_fc"], r=4)
    before = snapshot(model)[0]
    plain_output = model(IDS).logits
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # B moves first, then A
        optimizer.zero_grad()
        (model(IDS).logits - 1).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(model(IDS).logits, plain_output)
    for name, t in model.state_dict().items():
        moved = not torch.equal(t, before[name])
        assert moved == ("lora_" in name), f"{name}: {'moved' if moved else 'idle'}"
    refused(model, "packed", lora.merge)


# Bad input: one sentence each

ONES = torch.ones(2, 2)
BAD = {
    "holds no NaN": [
        *((torch.tensor([1.0, v]), {}) for v in (math.nan, math.inf)),
        (torch.tensor([[1.0], [-math.inf]]), dict(dim=-1)),
        (torch.tensor([1.0, 1.0, math.nan]), dict(blocksize=2)),
        (torch.tensor([1e300], dtype=torch.float64), {}),
    ],
    "must be a": [
        *((x, {}) for x in (torch.arange(4), ONES > 0, [1.0, 2.0], None)),
        *((ONES.to(t), {}) for t in (torch.complex64, torch.float8_e4m3fn)),
        *((x, dict(dim=-1)) for x in (ONES[:, :0], ONES.to_sparse())),
    ],
    "has no dim": [
        *((ONES, dict(dim=d)) for d in (2, -3, 10**400, True, 1.0, "rows", (0, 1))),
        (torch.tensor(1.0), dict(dim=0)),
    ],
    "blocksize is a whole": [
        (ONES, dict(blocksize=n)) for n in (0, -(10**400), 64.0, True, "64")
    ],
    "not both": [(ONES, dict(dim=0, blocksize=2))],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence(words):
    for x, how in BAD[words]:
        refused(x, words, reference.quantize, **how)


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Renamed(nn.Linear):  # Falcon's: a forward of its own, and yet W x + b
    def forward(self, x):
        return x @ self.weight.T + self.bias


def spoiled(value):
    base = plain()
    base.weight.data[3, 5] = value
    return base


def hooked():
    base = plain()
    base.register_forward_hook(lambda *a: None)
    return base


BAD_BASES = {
    "plain linear": [
        *(lambda: nn.LayerNorm(4), lambda: None, lambda: nn.LazyLinear(4)),
        lambda: lora.add(nn.Sequential(plain()), ["0"])[0],
    ],
    "a packed": [
        lambda: reference.Int8Linear(plain()),
        lambda: bitsandbytes.nn.Linear4bit(64, 64).to("cpu"),
        lambda: bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu"),
    ],
    "computed": [lambda: prune.l1_unstructured(plain(), "weight", 0.5)],
    "NaN": [lambda: spoiled(math.nan), lambda: spoiled(math.inf)],
    "more than W x": [lambda: Scaled(24, 10)],
    "hooks": [hooked],
}


def test_a_base_that_cannot_be_packed_gets_one_sentence(int8):
    for words, builds in BAD_BASES.items():
        for build in builds:
            with pytest.raises(ValueError, match=words) as error:
                int8.Int8Linear(build())
            assert_one_sentence(error)


def test_a_class_of_its_own_that_is_a_plain_product_is_packed(int8):
    base = Renamed(24, 10)
    try:
        gap = int8.Int8Linear(base)(activations()) - base(activations())
    except ValueError as error:
        pytest.fail(f"it is refused: {error}")
    assert gap.abs().max() < 0.2


def test_a_bad_threshold_gets_one_sentence():
    for value in (-1, math.nan, math.inf, 10**400, "6", None, True):
        refused(plain(), "threshold", reference.Int8Linear, value)
        refused(ONES, "threshold", reference.decompose, value)


def test_a_bad_input_gets_one_sentence(int8):
    layer, x = int8.Int8Linear(plain()), torch.ones(2, 24)
    bad = (x[:, :12], torch.tensor(1.0), x.long(), x.to(torch.float8_e4m3fn), None)
    cases = [("must be floats", layer, value) for value in bad]
    matrices = (None, ONES[0], ONES.int(), [[1.0]])
    cases += [("a matrix", lambda v: int8.decompose(v, 6.0), v) for v in matrices]
    cases += [("what quantize made", int8.dequantize, q) for q in (ONES, (ONES, ONES))]
    for words, call, value in cases:
        refused(value, words, call)


# The oracle: bitsandbytes


def theirs(base, threshold):
    """Its layer, in eval mode: in training its CPU path ignores the threshold."""
    n_out, n_in = base.weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(
        n_in, n_out, base.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bitsandbytes.nn.Int8Params(
        base.weight.data.clone(), requires_grad=False, has_fp16_weights=False
    )
    layer.bias = copy.deepcopy(base.bias)
    return layer.to("cpu").eval()


def test_rows_have_the_librarys_codes_and_stats():
    shapes = ((1, 8), (5, 7), (64, 333))
    xs = [randn(*s, dtype=torch.float16) * z for s in shapes for z in (0.1, 10)]
    xs.append(torch.cat([xs[0], 0 * xs[0]]))
    for x in xs:
        codes, stats, columns = int8_vectorwise_quant(x.clone())
        q = reference.quantize(x, dim=-1)
        assert columns is None and torch.equal(q.codes, codes)
        assert torch.equal(q.absmax.flatten(), stats)
        got, want = reference.dequantize(q), int8_vectorwise_dequant(codes, stats)
        torch.testing.assert_close(got, want.half(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows, outliers", [(1, (3,)), (16, ()), (300, (0, 3, 17, 23))])
def test_outliers_have_the_librarys_columns_codes_and_stats(rows, outliers):
    x = activations(rows, 24, outliers, 37.0, torch.float16)
    codes, stats, columns = int8_vectorwise_quant(x.clone(), threshold=6.0)
    rest, ours = reference.decompose(x, 6.0)
    assert ours.tolist() == columns.tolist() == list(outliers)
    assert torch.equal(rest.codes, codes)
    assert torch.equal(rest.absmax.flatten(), stats)


@pytest.mark.parametrize("outliers, threshold", [((), 6.0), (SOME, 0.0), (SOME, 6.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_layer_answers_as_the_librarys(dtype, outliers, threshold):
    """On float16 within roundings of the answer (the library rounds thrice, we once).
    It casts other inputs to float16 before it counts: its codes may be one off."""
    base = plain(256, 128, dtype=torch.float16)
    x = activations(64, 256, outliers, 40.0, dtype)
    layer = reference.Int8Linear(base.to(dtype), threshold)
    oracle = theirs(base, threshold)
    xs = [x.clone().requires_grad_(True) for _ in range(2)]
    ours, want = layer(xs[0]), oracle(xs[1])
    assert ours.dtype == want.dtype == dtype
    assert torch.equal(layer.codes, oracle.state.CB)
    assert torch.equal(layer.absmax.flatten(), oracle.state.SCB)
    eps, size = torch.finfo(dtype).eps, want.abs().max()
    gap = (ours - want).abs()
    if dtype == torch.float32:
        one = reference.decompose(x, threshold)[0].absmax / 127
        assert (gap <= 3 * one * layer.weight.abs().max()).all(), "three codes off?"
        assert gap.mean() <= 1e-3 * size
    else:
        assert (gap <= 2 * eps * size).all()
    grad = randn(*want.shape, dtype=dtype)
    ours.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=4 * eps, atol=4 * eps)


# int8.py copied alone, for tests/test_standalone.py

ALONE = """
import int8
from torch import nn
torch.manual_seed(0)
w = torch.randn(6, 10)
for how in ({}, dict(dim=-1), dict(dim=0), dict(blocksize=7)):
    q = int8.quantize(w, **how)
    assert q.codes.dtype == torch.int8 and q.codes.shape == w.shape
    assert (int8.dequantize(q) - w).abs().max() <= w.abs().max() / 253
base, x = nn.Linear(10, 6), torch.randn(4, 10, requires_grad=True)
x.data[1, 2] = 50.0
layer = int8.Int8Linear(base)
assert (layer(x) - base(x)).abs().max() < 0.2
assert (int8.Int8Linear(base, 0)(x) - base(x)).abs().max() > 0.02
layer(x).sum().backward()
assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, 10))
"""

# Broken copies, for tests/test_mutations.py

ROUND = "(x.float() * grow).mul_(scale).round_().to(torch.int8)"
GROW = "grow = torch.where(absmax < 2**-100, 2.0**100, 1.0)"
AMAX = "values.abs().amax(axis, keepdim=True).float()"
MISSING = "-x.numel() % size"
BACKWARDS = "codes.float().div_(127).mul_(q.absmax)"
RESCALED = "y * (rest.absmax / 127) * (absmax.T / 127)"
SPLIT = "zip(a.split(1040, 1), b.split(1040, 1), strict=True)"
EXACT = "(p.float() @ q.float().T).int()"
SAVED = "codes, absmax = ctx.saved_tensors"
SAVE = "ctx.save_for_backward(codes, absmax)"
BUFFER = 'self.register_buffer("absmax", q.absmax)'
BIAS = "nn.Parameter(base.bias.data, requires_grad=False)"
SMALL = "is_small = size < (threshold or torch.inf)"
COLUMNS = "is_small.all(0).logical_not()"
AT_LEAST = "(size >= (threshold or torch.inf)).any(0)"
ROWS = "size.amax(-1, keepdim=True)"

# {the law that goes red: {what is broken: {text: text in its place}}}
# fmt: off
BROKEN = {
    test_a_code_is_127_x_over_absmax_rounded_half_to_even: {
        "the codes are cut off, not rounded": {"round_()": "trunc_()"},
        "halves are rounded up": {"round_()": "add_(0.5).floor_()"},
        "absmax becomes 128": {"scale = 127 /": "scale = 128 /"},
        "only 7 bits are used": {"scale = 127 /": "scale = 63 /"},
        "the code is unsigned": {ROUND: f"{ROUND}.abs()"}},
    test_each_slice_along_dim_has_an_absmax_of_its_own: {
        "dim is ignored": {AMAX: "values.abs().amax().float()"},
        "dim is what is kept": {
            AMAX: "values.abs().amax([d for d in range(x.dim()) if d != axis], "
            "keepdim=True).float()"}},
    test_each_block_of_the_flat_tensor_has_an_absmax_of_its_own: {
        "the blocks run over columns": {"pad(x.flatten()": "pad(x.mT.flatten()"},
        "the last block is dropped": {MISSING: "-(x.numel() % size)"},
        "a block too many": {MISSING: "size - x.numel() % size"},
        "a long block is filled up": {"min(blocksize, x.numel())": "blocksize"}},
    test_going_back_gives_codes_times_absmax_over_127: {
        "going back divides by 128": {"div_(127)": "div_(128)"},
        "going back forgets absmax": {".mul_(q.absmax)": ""},
        "absmax is kept in 16 bits": {"keepdim=True).float()": "keepdim=True)"},
        "what comes back is float32": {".to(q.dtype)": ""}},
    test_zeros_stay_zeros: {
        "zeros get an absmax of their own": {AMAX: f"{AMAX}.clamp(min=1e-8)"}},
    test_no_magnitude_is_too_small_or_too_large: {
        "127 / absmax overflows": {GROW: "grow = 1.0"},
        "codes * absmax overflows": {
            BACKWARDS: "codes.float().mul_(q.absmax).div_(127)"}},
    test_the_round_trip_is_within_half_a_step: {
        "the codes are counted by the mean": {
            "values.abs().amax(axis": "values.abs().mean(axis"},
        "rounding costs a whole step": {"round_()": "floor_()"}},
    test_signs_and_scales_leave_the_codes_alone: {
        "the largest takes the place of absmax": {"values.abs()": "values"},
        "signs are rounded apart": {"round_()": "add_(0.5).floor_()"}},
    test_outlier_columns_meet_weights_rounded_to_their_dtype: {
        "outlier columns meet weights in float32": {
            "absmax, x.dtype))": "absmax, torch.float32))"}},
    test_columns_with_a_large_value_are_taken_out: {
        "one outlier in a row is too few": {".all(0)": ".any(0)"},
        "the threshold itself is no outlier": {SMALL: SMALL.replace("<", "<=")},
        "only positive outliers are seen": {"size = x.abs()": "size = x.clone()"},
        "the input is written into": {"size = x.abs()": "size = x.abs_()"},
        "outlier columns count twice": {".index_fill_(1, columns, 0)": ""},
        "an outlier coarsens its row": {".where(is_small[:, columns], 0)": ""},
        "threshold 0 takes out every column": {"threshold or torch.inf": "threshold"},
        "the rows share one absmax": {ROWS: "size.amax().expand(len(x), 1)"}},
    test_a_layer_computes_equation_8: {
        "the weight has one absmax": {"_weight(base), dim=-1)": "_weight(base))"},
        "the product is not rescaled by rows of x": {RESCALED: "y * (absmax.T / 127)"},
        "the product is not rescaled by rows of W": {
            RESCALED: "y * (rest.absmax / 127)"},
        "127 is forgotten once": {RESCALED: "y * rest.absmax * (absmax.T / 127)"},
        "outliers are dropped": {"if len(columns):": "if False:"},
        "the bias is dropped": {"y.add_(bias)": "pass"}},
    test_outliers_cost_little_with_the_threshold_and_much_without: {
        "the threshold is ignored": {
            "decompose(x, threshold)\n            y": "decompose(x, 0)\n            y"},
    },
    test_the_integer_product_is_exact_for_any_shape: {
        "one input goes the library's wrong way": {"if a.shape[1] == 1:": "if False:"},
        "float32 sums grow too long": {SPLIT: SPLIT.replace("1040", "4096")},
        "float32 sums are added in float32": {EXACT: EXACT.removesuffix(".int()")},
        "sums in bfloat16": {EXACT: "(p.bfloat16() @ q.bfloat16().T).int()"}},
    test_any_leading_shape_and_float_goes_through: {
        "the answer is in float32": {"return y.to(x.dtype)": "return y"},
        "leading shapes are lost": {"y.view(*x.shape[:-1], self.out_features)": "y"}},
    test_autocast_changes_no_number: {
        "autocast rounds the sums": {
            "with torch.autocast(x.device.type, enabled=False):": "if True:"}},
    test_not_a_number_stays_in_its_row: {
        "NaN is hidden": {COLUMNS: AT_LEAST, "size.amax(": "size.nan_to_num(0).amax("},
        "NaN spreads to other rows": {
            ROWS: "size.amax().expand(len(x), 1)",
            COLUMNS: AT_LEAST}},
    test_the_gradient_is_that_of_the_dequantized_weight: {
        "the gradient passes no absmax": {
            "w = dequantize(Quantized(codes, absmax, grad.dtype))": "w = codes.to("
            "grad.dtype)"},
        "the gradient is zero, as rounding's is": {"grad @ w": "0 * grad @ w"},
        "a trained bias gets no gradient": {"if ctx.needs_input_grad[1]": "if False"},
        "the bias trains": {BIAS: "nn.Parameter(base.bias.data)"}},
    test_backward_keeps_no_input_and_no_float_weight: {
        "the float weight is kept for backward": {
            SAVE: f"{SAVE[:-1]}, dequantize(Quantized(codes, absmax, x.dtype)))",
            SAVED: "codes, absmax, _ = ctx.saved_tensors"},
        "the input is kept for backward": {
            SAVE: f"{SAVE[:-1]}, x)",
            SAVED: "codes, absmax, _ = ctx.saved_tensors"}},
    test_the_base_is_left_alone_and_the_layer_is_frozen: {
        "the base is frozen too": {BIAS: "base.bias.requires_grad_(False)"},
        "the layer is in train mode": {"self.training = base.training": "pass"},
        "in and out are exchanged": {
            "self.out_features, self.in_features =": "self.in_features, self."
            "out_features ="}},
    test_the_weight_is_made_anew_with_a_warning_on_it: {
        "merging is not warned": {"W.quant_state = q": "pass"},
        "the weight is in float32": {
            "self.absmax, self.like.dtype)": "self.absmax, torch.float32)"},
        "the float weight is stored along": {
            BUFFER: f'{BUFFER}; self.register_buffer("w", base.weight.data)'}},
    test_a_cast_of_the_model_spares_codes_and_absmax: {
        "a cast rounds absmax": {"super()._apply(move)": "super()._apply(fn)"},
        "absmax stays on its device": {"t.to(fn(t).device)": "t"},
        "the weight's dtype does not follow a cast": {
            "self.like.dtype": "self.kind",
            "self.training =": "self.kind = base.weight.dtype; self.training ="}},
    test_copies_and_stored_states_give_the_same_numbers: {
        "absmax is not in the state dict": {
            BUFFER: f"{BUFFER[:-1]}, persistent=False)"}},
    test_gpt2s_conv1d_is_stored_as_out_by_in: {
        "Conv1D is taken for a Linear": {"_weight(base), dim": "base.weight, dim"}},
    test_a_base_that_cannot_be_packed_gets_one_sentence: {
        "any layer is packed": {"_refuse_unpackable(base)\n        q": "q"}},
    test_a_class_of_its_own_that_is_a_plain_product_is_packed: {
        "every class of its own is refused": {
            "if not _is_plain(base):": "if type(base).forward is not nn.Linear.forward:"
        }},
    test_a_bad_input_gets_one_sentence: {
        "an input may have any width": {"x.shape[-1:] != (in_features,)": "False"}},
    test_whole_models_keep_their_function: {
        "the weight is rounded to 3 bits": {
            "scale = 127 /": "scale = 3 /",
            RESCALED: RESCALED.replace("127", "3"),
            "div_(127)": "div_(3)"},
        "no gradient comes through a layer": {"return grad @ w": "return None"}},
    test_lora_trains_over_int8_and_merge_refuses_it: {
        "no gradient reaches a LoRA below": {"return grad @ w": "return 0 * grad @ w"}},
}
# fmt: on
MUTATIONS = by_fault(BROKEN)
