"""NF4's laws, and the same bytes as bitsandbytes: codes, absmax, unpacked values.

A law that takes only `nf4`, the module, is run again by tests/test_mutations.py on
broken copies of nf4.py. What is called same is the same to the bit: -0 is not 0.
"""

import copy
import importlib.util
import io
from statistics import NormalDist

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes.functional import (
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
)
from common import assert_one_sentence, by_fault, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from peftlab import dora, ia3, lora, pissa, vera
from peftlab import nf4 as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # all that the library has
KINDS = ("nf4", "fp4")
CODES = ("NF4", "FP4", "INT4")
FLOOR = 1.1e-38  # an absmax below it counts as 1e-38

each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
examples = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@pytest.fixture
def nf4():
    return reference


# Helpers


def bits(t):
    return t.contiguous().view(
        {4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.itemsize]
    )


def same(a, b):
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.equal(bits(a), bits(b))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unpack(codes, n):
    """(n,) indices of packed bytes, the first in the high half."""
    return torch.stack([codes >> 4, codes & 15], 1).flatten()[:n].long()


def midpoints(code):
    levels = code.sort().values
    return (levels[1:] + levels[:-1]) / 2


def library(weight, blocksize=64, kind="nf4", nested=False):
    """bitsandbytes' bytes and state, and code[index] * absmax of them, rounded once."""
    packed, state = quantize_4bit(
        weight, blocksize=blocksize, quant_type=kind, compress_statistics=nested
    )
    absmax = state.absmax
    if nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    absmax = absmax.repeat_interleave(blocksize)[: weight.numel()]
    values = state.code[unpack(packed, weight.numel())] * absmax
    return packed, state, values.to(weight.dtype).view(weight.shape)


def assert_librarys(nf4, weight, blocksize=64, kind="nf4"):
    q = nf4.quantize(weight, blocksize, getattr(nf4, kind.upper()))
    packed, state, values = library(weight, blocksize, kind)
    where = f"{kind}, {weight.dtype}, {[*weight.shape]}, blocks of {blocksize}"
    assert q.codes.shape == packed.shape and q.codes.dtype == packed.dtype, where
    wrong = (q.codes != packed).sum()
    assert not wrong, f"{wrong} of {len(packed)} bytes are not the library's: {where}"
    assert same(q.absmax, state.absmax), f"absmax is not the library's: {where}"
    assert same(q.code, state.code), f"code is not the library's: {where}"
    got = nf4.dequantize(q)
    assert same(got, values), f"code[index] * absmax, rounded once, it is not: {where}"
    return q


# The 16 values


def test_the_values_are_the_librarys_to_the_bit(nf4):
    for kind in KINDS:
        want, got = get_4bit_type(kind, device="cpu"), getattr(nf4, kind.upper())
        assert same(got, want), f"{kind}: {(got - want).tolist()} is left, or a -0"
    assert same(nf4.DYNAMIC, create_dynamic_map()), "the 8-bit dynamic type differs"
    assert len(nf4.DYNAMIC) == 256 and nf4.DYNAMIC[127] == 0 and nf4.DYNAMIC[255] == 1


def test_the_steps_between_nf4_values_are_equally_likely(nf4):
    """Seven equal slices of probability below zero and eight above, each side from the
    median to 0.9677083, the mean of 1 - 1/32 and 1 - 1/30."""
    assert [(nf4.NF4 < 0).sum(), (nf4.NF4 > 0).sum()] == [7, 8], "7 below zero, 8 above"
    assert nf4.NF4[7] == 0 and nf4.NF4[0] == -1 and nf4.NF4[15] == 1
    normal = NormalDist()
    end = normal.inv_cdf(1 - (1 / 32 + 1 / 30) / 2)
    below = torch.tensor([normal.cdf(v * end) for v in nf4.NF4.tolist()]).diff()
    half = normal.cdf(end) - 0.5
    for part, n in ((below[:7], 7), (below[7:], 8)):
        gap = (part - half / n).abs().max()
        assert gap < 1e-6, f"{part.tolist()} are not {n} equal slices of {half}"


def test_fp4_is_read_off_its_bits(nf4):
    for i, value in enumerate(nf4.FP4.tolist()):
        sign, exponent, mantissa = -1 if i >> 3 else 1, i >> 1 & 3, i & 1
        size = 2.0 ** (4 - exponent) * (1 + mantissa / 2) if exponent else mantissa / 16
        want = torch.tensor(sign * size or 0.0) / 12
        assert value == want, f"{i:04b} is {sign * size}/12, not {12 * value}/12"


def test_int4_is_evenly_spaced(nf4):
    want = torch.tensor([*range(-7, 1), *range(8)], dtype=torch.float64) / 7
    assert same(nf4.INT4, want.float()), "the sevenths, zero twice"


def test_the_values_heed_no_default(nf4):
    """A script may set the default dtype or device before it imports the file."""
    spec = importlib.util.spec_from_file_location(f"{nf4.__name__}_again", nf4.__file__)
    again = importlib.util.module_from_spec(spec)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            spec.loader.exec_module(again)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in (*CODES, "DYNAMIC"):
        table = getattr(again, name)
        assert table.device.type == "cpu" and same(table, getattr(nf4, name)), name


# Packing


def test_codes_absmax_and_values_are_the_librarys(nf4):
    for kind in KINDS:
        for dtype in DTYPES:
            assert_librarys(nf4, randn(64, 64, dtype=dtype), 64, kind)
            assert_librarys(nf4, randn(33, 77, dtype=dtype), 32, kind)
            assert_librarys(nf4, 3 * randn(5, dtype=dtype), 64, kind)


def test_the_first_of_two_weights_is_in_the_high_half(nf4):
    q = nf4.quantize(nf4.NF4)
    assert q.codes.shape == (8, 1) and q.codes.dtype == torch.uint8
    assert bytes(q.codes.view(-1).tolist()).hex() == "0123456789abcdef"
    last = nf4.quantize(nf4.NF4[:15]).codes[-1].item()
    assert last == 0xE7, f"{last:#x}: beside an odd last weight stands a zero, 7"


def test_a_tie_goes_to_the_lower_value(nf4):
    for name in CODES:
        levels = getattr(nf4, name).sort().values
        ties = midpoints(levels)  # (15,)
        up = torch.nextafter(ties, torch.full_like(ties, 9.0))
        for x, want in ((ties, levels[:-1]), (up, levels[1:])):
            row = torch.cat([torch.ones(1), x]) / 512
            got = 512 * nf4.dequantize(nf4.quantize(row, 16, getattr(nf4, name)))[1:]
            assert torch.equal(got, want), f"{name}: {x.tolist()} -> {got.tolist()}"


def near_midpoints(code, seed=0):
    """(4096, 76): rows of a c from 1 to 2, then c times a midpoint and the four floats
    around it, for each midpoint."""
    c = 1 + torch.rand(4096, generator=torch.Generator().manual_seed(seed))
    x = (midpoints(code).double() * c[:, None].double()).float()  # (4096, 15)
    near, ends = [x], torch.tensor([9.0, -9.0])
    for end in ends:
        step = x
        for _ in range(2):
            near.append(step := torch.nextafter(step, end))
    return torch.cat([c[:, None], *near], 1)


def test_a_full_block_multiplies_and_a_partial_one_divides(nf4):
    """x * (1/c) and x / c differ once in ten million weights, next to a midpoint often.
    The library multiplies in full blocks and divides in the last one if it is partial.
    """
    for kind in KINDS:
        code = getattr(nf4, kind.upper())
        rows, bounds = near_midpoints(code), midpoints(code)
        times, over = rows * (1 / rows[:, :1]), rows / rows[:, :1]
        telling = torch.bucketize(times, bounds) != torch.bucketize(over, bounds)
        telling = telling.any(1)
        assert telling.sum() > 500, "the rows do not tell one from the other"
        full = torch.cat([rows, torch.zeros(4096, 52)], 1)  # blocks of 128
        assert_librarys(nf4, full, 128, kind)
        for row in rows[telling][:5]:
            assert_librarys(nf4, row, 128, kind)
            assert_librarys(nf4, torch.cat([full[0], row]), 128, kind)


def test_blocks_run_along_the_rows(nf4):
    weight = randn(48, 64) * torch.logspace(-3, 3, 48)[:, None]
    for w in (weight, weight.T, weight[::2, 1::3], weight.expand(2, 48, 64)):
        q, rows = nf4.quantize(w), w.contiguous().view(-1)
        want = [block.abs().max() for block in rows.split(64)]
        assert torch.equal(q.absmax, torch.stack(want)), "do blocks run over columns?"
        assert same(nf4.quantize(rows).codes, q.codes), "row after row of this shape"
        gaps = (nf4.dequantize(q) - w).reshape(-1).split(64)
        most = max(g.abs().max() / c for g, c in zip(gaps, want, strict=True))
        assert most < 0.153, f"a block is off by {most:.2f} of its absmax"


def test_a_weight_comes_back_in_its_shape_and_dtype_and_is_left_alone(nf4):
    for shape in ((), (1,), (7,), (3, 5), (2, 3, 5), (64, 1)):
        for dtype in DTYPES:
            weight = nn.Parameter(randn(*shape, dtype=dtype))
            before, table = weight.detach().clone(), nf4.NF4.clone()
            q = nf4.quantize(weight)
            w, n = nf4.dequantize(q), weight.numel()
            assert (w.shape, w.dtype) == (weight.shape, dtype) and not w.requires_grad
            assert len(q.codes) == (n + 1) // 2 and len(q.absmax) == -(n // -64)
            assert nf4.dequantize(q, torch.float64).dtype == torch.float64
            q.code.zero_()
            assert same(weight.data, before), "quantizing wrote into the weight"
            assert same(nf4.NF4, table), "a packed weight shares NF4's own table"


def test_blocks_of_zeros_stay_zero(nf4):
    q = nf4.quantize(torch.zeros(3, 64))
    assert (q.codes == 0x77).all() and not q.absmax.any(), "zero is 7 in both halves"
    assert same(nf4.dequantize(q), torch.zeros(3, 64)), "zeros came back as others"
    some = randn(5, 64)
    some[[0, 3]] = 0
    for kind in KINDS:
        for dtype in DTYPES:
            assert_librarys(nf4, some.to(dtype), 64, kind)
            assert_librarys(nf4, torch.zeros(65, dtype=dtype), 64, kind)
            tail = torch.cat([randn(128), torch.zeros(30)]).to(dtype)
            q = assert_librarys(nf4, tail, 64, kind)
            assert q.absmax[-1] == torch.tensor(1e-38), "the library's floor"


def test_blocks_do_not_heed_each_other_in_a_large_tensor(nf4):
    """It goes through in pieces; small tensors go another way."""
    n = 3 * 2**18 + 70
    weight = (randn(n) * torch.linspace(0.1, 9, n)).bfloat16()
    for code in (nf4.NF4, nf4.FP4):
        q = nf4.quantize(weight, code=code)
        parts = [nf4.quantize(part, code=code) for part in weight.split(2**15)]
        for name in ("absmax", "codes"):
            assert same(torch.cat([getattr(p, name) for p in parts]), getattr(q, name))
        want = torch.cat([nf4.dequantize(p) for p in parts])
        assert same(nf4.dequantize(q), want), "unpacked, other values"


def contents(n, dtype, seed):
    """Tensors (n,) of all sorts: ordinary, extreme, tiny, with blocks of zeros."""
    limits, x = torch.finfo(dtype), randn(n, seed=seed)
    tiny = limits.smallest_normal
    yield from (x, x**9, x.clamp(-1, 1) * limits.max, (x * 4).round() / 4)
    yield (x.sign() * limits.max).where(x.abs() > 1, x)
    yield from (x * tiny / 9, x * 1e-38, x.sign() * tiny * limits.eps)
    yield x * (torch.arange(n) // 32 % 3 > 0)


@each_dtype
@each_kind
def test_every_size_and_content_is_the_librarys(kind, dtype):
    limits = torch.finfo(dtype)
    for blocksize in (32, 512):
        for n in (1, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize):
            for x in contents(n, dtype, n):
                w = x.clamp(limits.min, limits.max).to(dtype)
                assert_librarys(reference, w, blocksize, kind)
    w = randn(130, 96, dtype=dtype)
    turned = w.view(13, 10, 96).transpose(0, 2)
    for view in (w[0, 0], w.T, w[1:, ::3], turned, w[0].expand(5, 96)):
        assert_librarys(reference, view, 64, kind)
    for blocksize, n in ((32, 2**19 + 1), (4096, 2**19 + 4095)):
        w = randn(n, seed=blocksize) * torch.logspace(-3, 3, n)
        assert_librarys(reference, w.to(dtype), blocksize, kind)


def test_all_pairs_of_float16_mantissas_are_the_librarys():
    """1,024 absmax, each with all weights from 1/16 of it on: 8 million weights, every
    quotient but for powers of two."""
    steps = torch.arange(1024, dtype=torch.float32) / 1024 + 1
    scales = 2.0 ** torch.arange(0, -4, -1)
    w = (steps * scales[:, None]).view(-1)  # (4096,)
    w = torch.stack([w, -w], 1).view(1, -1)  # (1, 8192)
    absmax = steps[:, None]  # (1024, 1)
    w = w.where(w.abs() <= absmax, absmax)  # every block has its absmax
    w = torch.cat([absmax, w[:, 1:]], 1)
    for half in w.half().split(4096, 1):
        assert_librarys(reference, half.contiguous(), 4096)


# NaN, infinity and other bad input


def test_nan_and_infinity_are_refused(nf4):
    """In a full block, in a partial one, in its odd last weight."""
    for dtype in DTYPES:
        for value in (torch.nan, torch.inf, -torch.inf):
            for n, place in ((128, 5), (100, 70), (65, 64)):
                base = nn.Linear(n, 1, dtype=dtype)
                base.weight.data[0, place] = value
                refused(base.weight, "NaN or infinite", nf4.quantize)
                with pytest.raises(ValueError, match="NaN or infinite"):
                    nf4.NF4Linear(base, double_quant=True)


LEVELS = torch.linspace(-1, 1, 16)
ONES = torch.ones(8)
BAD = {
    ("the block size", "blocksize"): [0, 3, 65, 10**400, True, 64.0, "64", -64, None],
    ("double_quant", "double_quant"): ["yes", 1, None, torch.tensor(True)],
    ("a code must be 16", "code"): [
        *(LEVELS[1:], torch.linspace(-1, 1, 17), LEVELS.view(4, 4), LEVELS > 0),
        *(7 * LEVELS, LEVELS / 2, LEVELS.tolist(), "nf4", None, LEVELS.int()),
        LEVELS.clone().index_fill(0, torch.tensor([3]), torch.nan),
        *(LEVELS.to(torch.complex64), LEVELS.to_sparse(), LEVELS.to("meta")),
    ],
    ("4 bits need", "weight"): [
        *(ONES.to(dtype) for dtype in (torch.float64, torch.int32, torch.complex64)),
        *(ONES > 0, ONES.to(torch.float8_e4m3fn), [1.0, 2.0], ONES.numpy(), None),
        *(torch.empty(3, 0), torch.eye(8).to_sparse(), torch.empty(0, device="meta")),
    ],
}


@pytest.mark.parametrize("words, name", BAD)
def test_bad_input_gets_one_sentence(words, name):
    for value in BAD[words, name]:
        settings = {"weight": randn(8, 8), name: value}
        refused(settings.pop("weight"), words, reference.quantize, **settings)


def test_only_what_is_packed_is_unpacked_and_to_floats_alone():
    q = reference.quantize(ONES)
    for value in (ONES, None, nn.Linear(2, 2), (ONES, ONES)):
        refused(value, "what quantize made", reference.dequantize)
    for dtype in (torch.int8, torch.complex64, torch.float8_e5m2, "half"):
        refused(q, "a float of 16 bits", reference.dequantize, dtype)
    w = torch.full((640,), 3e38)  # finite, and the mean of the absmax is not
    assert torch.equal(reference.dequantize(reference.quantize(w)), w)
    refused(w, "mean .* infinite", reference.quantize, double_quant=True)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-1, 1))


class Renamed(nn.Linear):  # Falcon's: a forward of its own, and yet W x + b
    def forward(self, x):
        return x @ self.weight.T + self.bias


def hooked(kind):
    base = nn.Linear(8, 8)
    getattr(base, f"register_forward_{kind}")(lambda *a: None)
    return base


def cast(dtype):
    base = nn.Linear(8, 8)
    base.weight = nn.Parameter(base.weight.data.to(dtype), requires_grad=False)
    return base


def linear4bit(storage):
    how = dict(quant_type="nf4", quant_storage=storage)
    return bitsandbytes.nn.Linear4bit(64, 64, **how).to("cpu")


NO_BASE = {
    "plain linear": [
        *(lambda: nn.Embedding(8, 8), lambda: None, lambda: nn.LazyLinear(4)),
        *(lambda: nn.Bilinear(4, 4, 4), lambda: nn.Sequential(nn.Linear(8, 8))),
        lambda: lora.add(nn.Sequential(nn.Linear(8, 8)), ["0"], r=2)[0],
    ],
    "a packed": [  # whose bytes may be stored as floats, and are no weights for that
        *(lambda: linear4bit(torch.uint8), lambda: linear4bit(torch.bfloat16)),
        lambda: bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu"),
        lambda: reference.NF4Linear(nn.Linear(8, 8)),
        lambda: cast(torch.float8_e4m3fn),
    ],
    "torch.float64": [lambda: cast(torch.float64)],
    "more than W x": [lambda: Clamped(64, 8)],
    "computed": [
        lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    ],
    "hooks": [lambda: hooked("hook"), lambda: hooked("pre_hook")],
}


def test_only_a_plain_linear_is_packed(nf4):
    for words, builds in NO_BASE.items():
        for build in builds:
            with pytest.raises(ValueError, match=words) as error:
                nf4.NF4Linear(build())
            assert_one_sentence(error)


def test_a_class_of_its_own_that_is_a_plain_product_is_packed(nf4):
    base, x = Renamed(64, 8), randn(5, 64)
    want = linear(x, nf4.dequantize(nf4.quantize(base.weight)), base.bias)
    try:
        assert near(nf4.NF4Linear(base)(x), want, 1e-6)
    except ValueError as error:
        pytest.fail(f"it is refused: {error}")


def test_a_bad_setting_of_a_layer_is_refused(nf4):
    base = nn.Linear(8, 8)
    for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn, "bf16", 16):
        words = "compute_dtype.* float"
        refused(base, words, nf4.NF4Linear, compute_dtype=dtype)
    refused(base, "block size", nf4.NF4Linear, blocksize=7)


def test_an_input_of_another_width_or_of_whole_numbers_is_refused(nf4):
    x = torch.ones(2, 4)
    for compute in (None, torch.bfloat16):
        layer = nf4.NF4Linear(nn.Linear(4, 3), compute_dtype=compute)
        for bad in (x.long(), x > 0, x[:, :3], torch.tensor(1.0), x.tolist(), None):
            with pytest.raises(ValueError, match="must be floats") as error:
                layer(bad)
            assert_one_sentence(error)


# Double quantization


def nearest(x):
    """Indices of the nearest of the 256 dynamic values, by trying all in float64: (n,)
    lower, (n,) upper. They differ at a tie, to the rounding of a float32 product."""
    gap = (x.double()[:, None] - create_dynamic_map().double()).abs()
    near = 2.0**-22 * x.double().abs()[:, None]
    tie = (gap <= gap.min(1, keepdim=True).values + near).int()
    return tie.argmax(1), 255 - tie.flip(1).argmax(1)


def spread(blocks, seed=0):
    """(blocks, 8): a weight of an absmax each, lognormal."""
    absmax = randn(blocks, seed=seed).exp()
    return torch.cat([absmax[:, None], torch.zeros(blocks, 7)], 1)


def test_double_quantization_takes_the_nearest_dynamic_value(nf4):
    weight = spread(5000)
    q = nf4.quantize(weight, 8, double_quant=True)
    absmax = weight[:, 0]
    assert same(q.offset, absmax.mean()), "the offset is the mean of the absmax"
    rows = nn.functional.pad(absmax - q.offset, (0, 120)).view(20, 256)
    assert q.nested_absmax.shape == (20,), "an absmax of 256 blocks each"
    assert same(q.nested_absmax, rows.abs().max(1).values), "of absmax less their mean"
    assert q.absmax.dtype == torch.uint8 and q.absmax.shape == (5000,)
    x = rows.double() / q.nested_absmax[:, None].double()
    low, high = nearest(x.view(-1)[:5000])
    assert (low != high).sum() < 5, "the numbers hardly test anything"
    wrong = ((q.absmax < low) | (q.absmax > high)).sum()
    assert not wrong, f"{wrong} of 5000 absmax are not at the nearest dynamic value"
    # and back, as the library does it with the same bytes
    state = bitsandbytes.functional.QuantState(
        q.nested_absmax, blocksize=256, code=create_dynamic_map(), dtype=torch.float32
    )
    want = dequantize_blockwise(q.absmax, state) + q.offset
    back = nf4.dequantize(q)
    assert same(back[:, 0], want), "code * nested_absmax + offset, which is a mean"
    assert not back[:, 1:].any()


def test_absmax_next_to_a_midpoint_are_at_the_nearest_too(nf4):
    """On it, to the lower; 54 of the 255 midpoints are themselves rounded up and 53
    down, and then no float32 lies between."""
    middle = midpoints(create_dynamic_map())
    near = [middle, *(torch.nextafter(middle, torch.tensor(e)) for e in (-9.0, 9.0))]
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    for x in near:
        # two blocks of 256: their mean is 2, the largest distance from it 1
        absmax = 2 + torch.cat([x, -x, torch.tensor([1.0, -1.0])])[order]  # (512,)
        weight = absmax[:, None] * torch.tensor([1.0, 0, 0, 0])
        q = nf4.quantize(weight, 4, double_quant=True)
        rest = (absmax - q.offset).view(2, 256).double()
        low, high = nearest((rest / q.nested_absmax[:, None].double()).view(-1))
        wrong = ((q.absmax < low) | (q.absmax > high)).sum()
        assert not wrong, f"{wrong} absmax are not at the nearest dynamic value"


def test_equal_absmax_leave_nothing_to_divide_by(nf4):
    """Their distance from the mean is zero, or what rounding leaves of it."""
    for value in (0.0, 0.1, 3e-38, 2.0**100):
        for blocks in (1, 256, 257):
            weight = torch.full((blocks, 64), value)
            q = nf4.quantize(weight, double_quant=True)
            got, nested = nf4.dequantize(q), q.nested_absmax.repeat_interleave(256)
            assert torch.allclose(got, weight, rtol=1e-5, atol=0), f"{value}: {got[0]}"
            level = nf4.DYNAMIC[q.absmax.int()]
            assert not level[nested[:blocks] == 0].any(), "zero is at another value"


def test_a_weight_takes_4_bits_and_its_share_of_an_absmax(nf4):
    """4 + 32/64; doubly quantized 4 + 8/64 + 32/(64 * 256), and 32 for the offset."""
    weight, n = randn(1024, 1024), 2**20
    q = nf4.quantize(weight)
    assert q.bits() == 4.5, f"{q.bits()} bits a weight"
    assert nf4.quantize(weight, 4096).bits() == 4 + 32 / 4096
    q = nf4.quantize(weight, double_quant=True)
    assert q.bits() == 4 + 8 / 64 + 32 / (64 * 256) + 32 / n
    assert round(q.bits(), 3) == 4.127, f"{q.bits()} bits a weight"
    assert nf4.quantize(torch.ones(3)).bits() == 8 * (2 + 4) / 3, "3 in two bytes"


def test_the_librarys_table_of_65536_bins_is_coarser():
    """On the CPU the library looks an absmax up in 65,536 bins from -1 to 1: near a
    midpoint some go to the neighbour, near zero up to three away."""
    cases = (randn(2**20).view(-1, 64), 0.0010), (spread(300_000), 0.0025)
    for weight, low in cases:
        weight = nn.functional.pad(weight, (0, 64 - weight.shape[1]))
        q = reference.quantize(weight, 64, double_quant=True)
        packed, state, _ = library(weight, 64, nested=True)
        assert same(q.codes, packed) and same(q.offset, state.offset)
        assert same(q.nested_absmax, state.state2.absmax)
        gap = (q.absmax.int() - state.absmax.int()).abs()
        assert low < (gap > 0).double().mean() < 2.5 * low and gap.max() <= 3


# For any weights that hypothesis thinks of


def largest_half_gap(code):
    return code.sort().values.diff().max().item() / 2


@st.composite
def weights(draw, dtypes=DTYPES, bound=None):
    """(n,) of up to 150; any floats, or none beyond bound."""
    dtype, n = draw(st.sampled_from(dtypes)), draw(st.integers(1, 150))
    most = float(torch.finfo(dtype).max) if bound is None else bound
    most = min(most, float(np.finfo(np.float32).max))
    floats = st.floats(-most, most, width=32)
    return torch.from_numpy(draw(arrays(np.float32, n, elements=floats))).to(dtype)


sizes = st.sampled_from((2, 6, 8, 12, 32, 64, 100, 4096))
codes = st.sampled_from(CODES)


@examples
@given(code=codes, weight=weights(), blocksize=sizes)
def test_a_weight_moves_by_half_the_widest_gap_at_most(code, weight, blocksize):
    table, limits = getattr(reference, code), torch.finfo(weight.dtype)
    q = reference.quantize(weight, blocksize, table)
    got, weight = reference.dequantize(q).double(), weight.double()
    for w, new in zip(weight.split(blocksize), got.split(blocksize), strict=True):
        c = w.abs().max()
        bound = c * (largest_half_gap(table) + limits.eps + 1e-6)
        bound += limits.smallest_normal * limits.eps  # a subnormal's rounding
        assert (w - new).abs().max() <= bound + FLOOR


@examples
@given(kind=st.sampled_from(KINDS), weight=weights(), blocksize=st.sampled_from(BLOCKS))
def test_whatever_the_weights_the_bytes_are_the_librarys(kind, weight, blocksize):
    assert_librarys(reference, weight, blocksize, kind)


@st.composite
def ordinary(draw, dtypes=DTYPES):
    """(n,) and a block size: each block's absmax is a power of two from 1/8 to 8, no
    weight but zero is tiny."""
    weight, size = draw(weights(dtypes, bound=1.0)), draw(sizes)
    weight = weight.masked_fill(weight.abs() < 2**-10, 0)
    weight[::size] = draw(st.sampled_from((1.0, -1.0)))
    return weight * 2.0 ** draw(st.integers(-3, 3)), size


@examples
@given(code=codes, pair=ordinary())
def test_packing_what_was_unpacked_changes_nothing(code, pair):
    """The largest weight is at 1 or -1 of every code, so that absmax stays. FP4 and
    INT4 have zero twice: a code may go from one to the other, no value does."""
    weight, size = pair
    q = reference.quantize(weight, size, getattr(reference, code))
    once = reference.dequantize(q)
    again = reference.quantize(once, size, getattr(reference, code))
    assert same(again.absmax, q.absmax)
    assert same(reference.dequantize(again), once)
    assert code != "NF4" or same(again.codes, q.codes)


@examples
@given(code=codes, pair=ordinary(DTYPES[:1]), power=st.integers(-110, 110))
def test_a_power_of_two_scales_absmax_and_leaves_the_codes(code, pair, power):
    weight, size = pair
    table, scale = getattr(reference, code), 2.0**power
    one = reference.quantize(weight, size, table)
    two = reference.quantize(weight * scale, size, table)
    assert same(one.codes, two.codes) and same(one.absmax * scale, two.absmax)


def test_nf4_does_not_turn_with_the_sign(nf4):
    there, back = (
        nf4.dequantize(nf4.quantize(sign * torch.tensor([1.0, 0.25, -0.25, 0]), 4))
        for sign in (1, -1)
    )
    assert not torch.equal(there, -back), "8 values above zero, 7 below: not symmetric"


@examples
@given(
    absmax=arrays(
        np.float32, st.integers(1, 600), elements=st.floats(0, 2**80, width=32)
    )
)
def test_double_quantization_moves_absmax_by_half_a_step_at_most(absmax):
    """Of the dynamic type, whose widest steps are 0.9 / 64: 0.7% of the largest
    distance from the mean among 256 absmax."""
    absmax = torch.from_numpy(absmax)
    q = reference.quantize(absmax[:, None].expand(-1, 4), 4, double_quant=True)
    got = reference.dequantize(q)[:, 0].double()
    nested = q.nested_absmax.double().repeat_interleave(256)[: len(absmax)]
    bound = nested * (0.9 / 128 + 1e-6) + 1e-6 * q.offset
    assert ((got - absmax).abs() <= bound + 2 * FLOOR).all()


# The library's own way back


RIGHT = [
    ((64, 64), 64),
    ((10, 72), 64),
    ((7, 130), 64),
    ((3, 5, 64), 64),
    ((2, 2048), 1024),
]


@each_dtype
@each_kind
def test_values_are_those_of_the_librarys_kernel_where_that_is_right(kind, dtype):
    for shape, blocksize in RIGHT:
        weight = randn(*shape, dtype=dtype)
        packed, state, values = library(weight, blocksize, kind)
        theirs = dequantize_4bit(packed, state)
        q = reference.quantize(weight, blocksize, getattr(reference, kind.upper()))
        got = reference.dequantize(q)
        # equal, not the same: of FP4's zeros the kernel makes one a -0
        assert torch.equal(got, theirs) and same(got, values), (shape, blocksize)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="that kernel alone errs"
)
def test_the_librarys_kernel_is_wrong_where_rows_end_within_a_block():
    """bitsandbytes 0.50.2: rows of a multiple of 16 columns, but not of the block size.
    From the second row on it takes the absmax of a wrong block; the book says so."""
    for shape, blocksize in (((144, 144), 64), ((64, 64), 128), ((80, 80), 64)):
        weight = randn(*shape) * torch.logspace(-2, 2, shape[0])[:, None]
        packed, state, values = library(weight, blocksize)
        theirs = dequantize_4bit(packed, state)
        assert not torch.allclose(theirs, values, rtol=1e-2), "it is right by now"
        assert same(reference.dequantize(reference.quantize(weight, blocksize)), values)


# NF4Linear


def plain(n_out=96, n_in=64, bias=True, dtype=torch.float32, seed=0):
    layer = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    layer.weight.data = randn(n_out, n_in, seed=seed, dtype=dtype) / n_in**0.5
    if bias:
        layer.bias.data = randn(n_out, seed=seed + 1, dtype=dtype)
    return layer


def conv(n_out=96, n_in=64):
    layer = Conv1D(n_out, n_in)  # GPT-2's: 64 in, 96 out, the weight is (64, 96)
    layer.weight.data, layer.bias.data = randn(n_in, n_out) / 8, randn(n_out)
    return layer


def matrix(base):
    """W as (out, in)."""
    return base.weight.T if isinstance(base, Conv1D) else base.weight


def near(a, b, tolerance):
    return (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def test_a_layer_multiplies_by_the_dequantized_weight(nf4):
    square = conv(64, 64)  # where a wrong transpose still fits
    for base in (plain(), plain(bias=False), conv(), square, plain(7, 5)):
        for how in (dict(blocksize=32), dict(double_quant=True)):
            layer = nf4.NF4Linear(base, **how)
            w = nf4.dequantize(nf4.quantize(matrix(base), **how))
            assert w.shape == (layer.out_features, layer.in_features)
            assert same(layer.weight, w), "it is the dequantized one, (out, in)"
            for lead in ((2, 5), (), (2, 0)):
                x = randn(*lead, w.shape[1]).requires_grad_()
                pull = randn(*lead, len(w), seed=3)
                want, got = linear(x, w, base.bias), layer(x)
                assert got.shape == want.shape and got.dtype == x.dtype
                grad, exact = [torch.autograd.grad(y, x, pull)[0] for y in (got, want)]
                assert grad.shape == x.shape
                if x.numel():
                    assert near(got, want, 1e-6), "not x W^T and the bias"
                    assert near(grad, exact, 1e-6), "the gradient to x is grad W"


def test_a_layer_in_16_bits_is_right_to_rounding(nf4):
    for dtype in (torch.bfloat16, torch.float16):
        base = plain(dtype=dtype)
        layer, unit = nf4.NF4Linear(base), torch.finfo(dtype).eps
        w = nf4.dequantize(nf4.quantize(base.weight)).float()
        x = randn(9, 64, dtype=dtype).requires_grad_()
        got, want = layer(x), linear(x.float(), w, base.bias.float())
        assert got.dtype == dtype and near(got, want, unit)
        pull = randn(9, 96, seed=3, dtype=dtype)
        grad, exact = torch.autograd.grad(got, x, pull)[0], pull.float() @ w
        assert grad.dtype == dtype and near(grad, exact, unit)


def test_the_product_is_in_compute_dtype_and_the_answer_in_the_inputs(nf4):
    for compute in (None, torch.bfloat16, torch.float16, torch.float32):
        layer = nf4.NF4Linear(base := plain(), compute_dtype=compute)
        for dtype in (*DTYPES, torch.float64):
            x, c = randn(3, 64).to(dtype).requires_grad_(), compute or dtype
            want = x.to(c) @ layer.weight.to(c).T + base.bias.to(c)
            got = layer(x)
            assert got.dtype == dtype, "the answer has the input's dtype"
            assert torch.equal(got, want.to(dtype)), f"the product is not in {c}"
            got.sum().backward()
            assert x.grad.dtype == dtype and x.grad.any()


def test_the_gradient_is_exact_in_float64(nf4):
    layer = nf4.NF4Linear(plain(5, 8))
    x = randn(2, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x), "backward is not that of forward"
    assert torch.autograd.gradgradcheck(layer, x)


def test_a_bias_stays_the_layers_own_frozen_or_trained(nf4):
    for trains in (True, False):
        base = plain().train(trains)
        base.bias.requires_grad_(trains)
        layer = nf4.NF4Linear(base)
        assert layer.training is trains, "it is in the mode of its base"
        assert layer.bias is base.bias and [*layer.parameters()] == [base.bias]
        x, pull = randn(5, 64).requires_grad_(), randn(5, 96, seed=3)
        layer(x).backward(pull)
        assert x.grad is not None and (base.bias.grad is not None) == trains
        assert not trains or near(base.bias.grad, pull.sum(0), 1e-6)


def test_no_unpacked_weight_outlives_a_product(nf4):
    """What `dequantize` made is gone after forward, and after backward; and autograd
    saves no other tensor of that shape."""
    made, saved, real = [], [], nf4.dequantize
    hooks = lambda t: saved.append((*t.shape,)) or t, lambda t: t  # noqa: E731

    def watched(*args, **kwargs):
        w = real(*args, **kwargs)
        made.append(StorageWeakRef(w.untyped_storage()))
        return w

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "dequantize", watched)
        for compute in (None, torch.bfloat16):
            first = nf4.NF4Linear(plain(96, 64), compute_dtype=compute)
            last = nf4.NF4Linear(conv(80, 96), compute_dtype=compute)
            x = randn(3, 64).requires_grad_()
            made.clear()
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                y = last(torch.tanh(first(x)))
            assert len(made) == 2, "each layer unpacks once on the way there"
            assert all(ref.expired() for ref in made), "a weight is kept for backward"
            weights = {(96, 64), (64, 96), (80, 96), (96, 80)}
            assert not weights & {*saved}, "a weight is saved for backward"
            y.sum().backward()
            assert len(made) == 4 and x.grad.any(), "and once more on the way back"
            assert all(ref.expired() for ref in made), "a weight outlives backward"


def test_under_autocast_the_way_back_is_in_the_inputs_dtype(nf4):
    layer = nf4.NF4Linear(plain())
    x, grad = randn(9, 64).requires_grad_(), randn(9, 96)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = layer(x), linear(x, layer.weight, layer.bias)
    assert got.dtype == torch.float32 and near(got, want.float(), 2**-7)
    assert not torch.equal(got, layer(x)), "autocast does nothing here"
    got.backward(grad)
    # The product came out in bfloat16, so its gradient is rounded; W is not.
    assert near(x.grad, grad.bfloat16().float() @ layer.weight, 1e-5)


def test_a_cast_of_the_model_rounds_no_absmax(nf4):
    casts = [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float]
    casts += [lambda m: m.to(torch.float16), lambda m: m.type(torch.float16)]
    for nested in (False, True):
        layer = nf4.NF4Linear(plain(), double_quant=nested)
        model = nn.Sequential(layer, nn.Linear(96, 2))
        before = {n: t.clone() for n, t in layer.named_buffers()}
        for cast in casts:
            cast(model)
            after = dict(layer.named_buffers())
            assert after.keys() == before.keys()
            for name, t in after.items():
                assert same(t, before[name]), f"{name} was rounded: {t.dtype}"
            dtype = model[1].weight.dtype
            assert layer.bias.dtype == dtype, "the bias goes with the other layers"
            assert layer.weight.dtype == dtype, "T5 asks the weight for its dtype"
            assert model(randn(3, 64).to(dtype)).dtype == dtype
    with torch.device("meta"):  # whatever the default device
        layer.to("cpu").half()
    assert layer.dtype == torch.half and same(layer.absmax, before["absmax"])


def test_a_layer_goes_to_the_meta_device_and_back(nf4):
    for nested in (False, True):
        layer = nf4.NF4Linear(plain(), double_quant=nested)
        twin = copy.deepcopy(layer).to("meta")
        assert all(t.is_meta for t in twin.state_dict().values())
        assert twin.weight.is_meta and twin(randn(3, 64).to("meta")).shape == (3, 96)
        twin = twin.half().to_empty(device="cpu").float()
        twin.load_state_dict(layer.state_dict())
        assert same(twin.weight, layer.weight), "an absmax was rounded on its way"
        for sizes in ((5, 7), (1500, 700)):  # a partial block; more than a piece
            found = []
            for device in ("cpu", "meta"):
                packed = nf4.NF4Linear(nn.Linear(*sizes, device=device), 64, nested)
                state = packed.state_dict()
                found.append({n: (t.shape, t.dtype) for n, t in state.items()})
            assert found[0] == found[1]


def test_on_the_meta_device_nothing_is_compared(nf4):
    """So that a model of any size is packed there in no time, as `memory` does it."""
    calls = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    base = nn.Linear(4096, 4096, device="meta")
    with Watch():
        nf4.NF4Linear(base, double_quant=True)
    assert torch.gt not in calls and len(calls) < 300


def test_the_buffers_are_the_whole_of_a_weight(nf4):
    """They go round by state dict and deepcopy; `code` too, so that an FP4 weight loads
    into a layer that was NF4. Another block size or nesting is an error."""
    for nested in (False, True):
        a = nf4.NF4Linear(plain(), double_quant=nested, code=nf4.FP4)
        b = nf4.NF4Linear(plain(seed=7), double_quant=nested)
        assert not same(a.weight, b.weight)
        state = a.state_dict()
        names = ["codes", "absmax", "code", "bias", "nested_absmax", "offset"]
        assert state.keys() == {*(names if nested else names[:4])}
        b.load_state_dict(state)
        assert same(b.weight, a.weight), "the state dict is not the whole weight"
        twin, kept = copy.deepcopy(a), a.weight
        assert same(twin.weight, kept)
        for t in (*twin.buffers(), *b.buffers()):
            t.zero_()
        assert same(a.weight, kept), "a copy shares its tensors"
        for other in (dict(double_quant=not nested), dict(blocksize=32)):
            layer = nf4.NF4Linear(plain(), **{"double_quant": nested, **other})
            with pytest.raises(RuntimeError, match="state_dict"):
                layer.load_state_dict(state)


def test_a_whole_layer_goes_through_a_file():
    layer, file = reference.NF4Linear(plain(), double_quant=True), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False).weight, layer.weight)


def test_reading_the_weight_unpacks_it_anew_and_marks_it(nf4):
    for dtype in DTYPES:
        layer = nf4.NF4Linear(plain(dtype=dtype), double_quant=True)
        w = layer.weight
        assert w.dtype == dtype and not w.requires_grad
        assert hasattr(w, "quant_state"), "without the mark a merge would write into it"
        kept = w.clone()
        w.zero_()
        assert same(layer.weight, kept), "writing into it changed the layer"
        assert same(nf4.dequantize(layer), kept), "a layer is a packed weight too"


def test_a_compiled_dequantize_agrees_to_the_bit(nf4):
    """It goes another way there: a partial block, another dtype, both nestings."""
    for shape, *how, dtype in (
        ((5, 77), 64, nf4.FP4, False, torch.bfloat16),
        ((3, 5, 7), 32, nf4.INT4, True, torch.float16),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(nf4.dequantize, backend="aot_eager", fullgraph=True)
        q = nf4.quantize(randn(*shape).to(dtype), *how)
        assert same(compiled(q), nf4.dequantize(q))


def test_a_compiled_layer_keeps_no_unpacked_weight(nf4):
    """In the graph for both ways one unpacking would do for two, if it may."""
    torch._dynamo.reset()
    layer, saved = nf4.NF4Linear(plain(48, 64), compute_dtype=torch.bfloat16), []
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition")
    note = lambda t: (saved.append(t.numel()), t)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        compiled(randn(3, 64).requires_grad_())
    assert saved and max(saved) < 48 * 64, f"saved for backward, numbers each: {saved}"


def test_a_compiled_layer_agrees(nf4):
    """Traced whole, forward and backward; no C++ compiler is needed for that."""
    torch._dynamo.reset()
    layer = nf4.NF4Linear(plain(), double_quant=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = randn(3, 64).requires_grad_()
    assert torch.equal(got := compiled(x), layer(x))
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert near(grad, layer.weight.sum(0).expand(3, 64), 1e-6)


def test_the_way_back_is_through_the_buffers_of_the_way_there(nf4):
    """Other buffers for a call, as in torch.func.functional_call, or a layer moved."""
    one, two = (nf4.NF4Linear(plain(32, 64, seed=s), double_quant=True) for s in (0, 1))
    x = randn(3, 64).requires_grad_()
    y = torch.func.functional_call(one, dict(two.state_dict()), (x,))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert near(grad, two.weight.sum(0).expand(3, 64), 1e-6)
    y, want = one(x), one.weight.sum(0)
    one.to("meta")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert near(grad, want.expand(3, 64), 1e-6)


def test_no_buffer_is_a_view_of_more(nf4):
    """What is saved is the storage: it must be the bytes that `bits` counts."""
    for n, blocksize in ((64, 64), (33 * 77, 64), (5, 4096)):
        for double in (False, True):
            q = nf4.quantize(randn(n), blocksize, double_quant=double)
            for name, t in q.named_buffers():
                assert t.untyped_storage().nbytes() == t.nbytes, (name, n, blocksize)


# With other methods and modules


@pytest.mark.parametrize("method", [lora, vera, ia3, dora, pissa])
def test_other_methods_work_over_a_packed_layer_or_refuse_it(method):
    torch.manual_seed(0)
    packed, x = reference.NF4Linear(plain(64, 64), double_quant=True), randn(5, 64)
    model = nn.Sequential(packed, nn.Tanh(), plain(8, 64))
    if method in (dora, pissa):  # they need the weight itself
        return refused(model, "packed", method.add, "all-linear", r=2)
    first = model(x)
    method.add(model, ["0"])
    assert torch.equal(model(x), first), "adding moved the outputs"
    model(x).pow(2).sum().backward()
    assert any(p.grad.any() for p in method.state_dict(model, keep_vars=True).values())
    refused(model, "packed", method.merge)


def test_torchs_attention_reads_the_right_weight():
    """nn.MultiheadAttention and the fast path of nn.TransformerEncoderLayer take a
    layer's weight and never call it: they find it unpacked."""
    x = randn(2, 5, 64)
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    block = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    for model, paths, call in (
        (attention, ["out_proj"], lambda m, x: m(x, x, x)[0]),
        (block, ["self_attn.out_proj", "linear1", "linear2"], lambda m, x: m(x)),
    ):
        twin = copy.deepcopy(model)
        for path in paths:
            dense = twin.get_submodule(path)
            layer = reference.NF4Linear(model.get_submodule(path), double_quant=True)
            model.set_submodule(path, layer)
            dense.weight.data = layer.weight
        for mode in (True, False):  # in eval mode without gradients the fast path
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    got, want = (call(m.train(mode), x) for m in (model, twin))
                assert near(got, want, 1e-5)
    half = [x.half()] * 3  # the unpacked weight is in half precision too
    assert near(attention.half()(*half)[0], attention.float()(x, x, x)[0], 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, nested", [("nf4", False), ("nf4", True), ("fp4", True)])
def test_forward_and_backward_are_linear4bits(kind, nested, dtype):
    """In training mode: in eval mode the library packs its weight another way. Its
    nested absmax go into ours, which has the nearest."""
    base, seen = plain(128, 192, dtype=dtype), []
    code = getattr(reference, kind.upper())
    layer = reference.NF4Linear(base, double_quant=nested, code=code)
    how = dict(quant_type=kind, compress_statistics=nested, compute_dtype=dtype)
    theirs = bitsandbytes.nn.Linear4bit(192, 128, **how)
    theirs.load_state_dict(base.state_dict())
    theirs.weight.data = base.weight.data.clone()
    theirs = theirs.to("cpu").train()
    state = theirs.weight.quant_state
    assert same(layer.codes, theirs.weight.data)
    assert nested or same(layer.absmax, state.absmax)
    layer.absmax.copy_(state.absmax)
    for m in (layer, theirs):
        x = randn(7, 192, dtype=dtype).requires_grad_()
        y = m(x)
        y.backward(randn(7, 128, seed=3, dtype=dtype))
        seen.append((y, x.grad))
    unit = 1e-6 if dtype == torch.float32 else 2**-7
    for got, want in zip(*seen, strict=True):
        assert got.dtype == want.dtype and near(got, want, unit)


# nf4.py copied alone, for tests/test_standalone.py

ALONE = """
import copy
import nf4
from torch import nn
torch.manual_seed(0)
base = nn.Linear(64, 48)
q = nf4.quantize(base.weight, double_quant=True)
assert q.codes.dtype == torch.uint8 and q.codes.shape == (64 * 24, 1) and q.bits() < 4.2
w = nf4.dequantize(q)
assert (w - base.weight).abs().max() < 0.16 * base.weight.abs().max()
layer = nf4.NF4Linear(base, double_quant=True)
x = torch.randn(3, 64, requires_grad=True)
assert torch.allclose(layer(x), x @ w.T + base.bias, atol=1e-5)
layer(x).sum().backward()
assert torch.allclose(x.grad[0], w.sum(0), atol=1e-5)
twin = nf4.NF4Linear(nn.Linear(64, 48), double_quant=True)
twin.load_state_dict(layer.state_dict())
assert torch.equal(twin.half().float().weight, w)
try:
    nf4.quantize(torch.tensor([1.0, float("nan")]))
except ValueError:
    pass
else:
    raise AssertionError("NaN went through")
"""

# Broken copies, for tests/test_mutations.py

CPU = 'CPU = dict(dtype=torch.float32, device="cpu")'
ABOVE = "above = torch.linspace(0.9677083, 0.5, "
BELOW = "mirrored = torch.linspace(0.9677083, 0.5, "
SYMMETRIC = {f"{ABOVE}9": f"{ABOVE}8", ".double()[:-1]": ".double()"}
SCALED = "scaled = rows * (1 / absmax.clamp(TINY))[:, None]"
LAST = "scaled[-1] = rows[-1] / absmax[-1]"
BYTES = "sum(t.nbytes for t in self.buffers() if t is not self.code)"
CODE_PAIRS = "(high << 4 | low)[:, None]"
MIDDLE = "(values[1:] + values[:-1]) / 2"
MEAN = "offset = absmax.mean()"
PAIRS = "torch.cartesian_prod(q.code, q.code)"
PIECES = "for piece in zip(*tensors, strict=True):"
UNPACK = "_unpack_into(*piece, pairs)"
FINITE = "not t.isfinite().all()"
BACK = "grad @ dequantize(ctx.q, ctx.dtype), None"
APPLY = "y = _Product.apply(y, self.snapshot())"
THERE = "return _multiply(x, q)"
ANSWER = "return y.to(x.dtype)"
PLAIN = "if not _is_plain(base):"
PROBE = 'dtype=self.dtype, device="cpu")'
WIDTH = "x.shape[-1:] != (in_features,)"

# {the law that goes red: {what is broken: {text: text in its place}}}
# fmt: off
BROKEN = {
    test_the_values_are_the_librarys_to_the_bit: {
        "the offset has more digits": {"0.9677083": "0.96770833333"},
        "the quantiles are in float32": {".double()": ""},
        "the steps are in float64": {
            f"{ABOVE}9, **CPU": f"{ABOVE}9, dtype=torch.float64",
            f"{BELOW}8, **CPU": f"{BELOW}8, dtype=torch.float64"},
        "FP4 has a -0": {"0 - positive": "-positive"},
        "the dynamic type has a -1": {
            "torch.arange(2, **CPU)": "torch.tensor([0, -1])"}},
    test_the_steps_between_nf4_values_are_equally_likely: {
        "eight values are below zero and seven above": {
            f"{ABOVE}9": f"{ABOVE}8",
            f"{BELOW}8": f"{BELOW}9"},
        "zero comes twice": SYMMETRIC,
        "the quantiles start at 1 - 1/32": {"0.9677083": "0.96875"},
        "the values are evenly spaced": {
            "torch.special.ndtri(probabilities)": "(probabilities - 0.5)"}},
    test_nf4_does_not_turn_with_the_sign: {"NF4 is made symmetric": SYMMETRIC},
    test_the_values_heed_no_default: {
        "the values heed the default dtype": {CPU: 'CPU = dict(device="cpu")'},
        "the values heed the default device": {CPU: "CPU = dict(dtype=torch.float32)"}},
    test_fp4_is_read_off_its_bits: {
        "FP4 is in order": {"6, 8, 12, 4, 6, 2, 3": "6, 2, 3, 4, 6, 8, 12"},
        "FP4 has no subnormal": {"[0, 1 / 16,": "[0, 1,"}},
    test_int4_is_evenly_spaced: {
        "INT4 goes down to -8": {
            "torch.tensor([*range(-7, 1), *range(8)], **CPU) / 7": "torch.arange("
            "-8, 8, **CPU) / 8"}},
    test_codes_absmax_and_values_are_the_librarys: {
        "FP4's order is ignored": {
            "order.to(x.device, torch.uint8).take(rank.long())": "rank.byte()"},
        "absmax is max": {"rows.abs().amax(1)": "rows.amax(1)"},
        "absmax is in the weight's dtype": {
            ".view(-1, size).float()": ".view(-1, size)"},
        "the padding counts": {"(0, padding)).view": "(0, padding), value=9.0).view"},
        "the high half of a byte comes last": {PAIRS: f"{PAIRS}.flip(1).contiguous()"}},
    test_the_first_of_two_weights_is_in_the_high_half: {
        "the low half comes first": {"high << 4 | low": "high | low << 4"},
        "the padding is code 0": {
            CODE_PAIRS: f"{CODE_PAIRS}; index_bytes.view(-1)[n // 2 :] &= 240"}},
    test_a_tie_goes_to_the_lower_value: {
        "a tie goes to the upper": {"torch.gt(scaled": "torch.ge(scaled"}},
    test_a_full_block_multiplies_and_a_partial_one_divides: {
        "full blocks divide": {SCALED: "scaled = rows / absmax.clamp(TINY)[:, None]"},
        "the partial block multiplies": {LAST: "pass"},
        "every last block divides": {"if padding:": "if len(x):"}},
    test_blocks_run_along_the_rows: {
        "blocks run over columns": {"weight.reshape(-1)": "weight.mT.reshape(-1)"},
        "blocks run as the memory does": {
            "weight.reshape(-1)": "(weight if weight.dim() != 2 or"
            " weight.stride(0) > 1 else weight.T).reshape(-1)"}},
    test_a_weight_comes_back_in_its_shape_and_dtype_and_is_left_alone: {
        "a tensor comes back flat": {".view(q.shape)": ""},
        "a tensor comes back in float32": {
            "dtype or q.dtype": "dtype or torch.float32"},
        "a packed weight shares NF4's table": {", copy=True)": ")"}},
    test_blocks_of_zeros_stay_zero: {
        "a block of zeros gives NaN": {"(1 / absmax.clamp(TINY))": "(1 / absmax)"},
        "the floor of a partial block is dropped": {
            "        absmax[-1].clamp_(TINY)\n": "",
            LAST: f"{LAST}.clamp(TINY)"}},
    test_blocks_do_not_heed_each_other_in_a_large_tensor: {
        "only the first piece is unpacked": {
            PIECES: "for piece in [[t[0] for t in tensors]]:"},
        "absmax is always that of the first piece": {
            UNPACK: "_unpack_into(*piece[:2], absmax[: len(piece[0])], pairs)"}},
    test_nan_and_infinity_are_refused: {
        "NaN goes through": {FINITE: "t.isinf().any()"},
        "infinity goes through": {FINITE: "t.isnan().any()"},
        "only the first block is looked at": {
            '("a weight", absmax)': '("a weight", absmax[:1])'}},
    test_only_a_plain_linear_is_packed: {
        "a forward of its own is ignored": {PLAIN: "if False:"},
        "a computed weight is packed": {
            'if "weight" not in layer._parameters:': "if False:"},
        "hooks are dropped": {'any(hooks) or "forward" in vars(layer)': "False"}},
    test_a_class_of_its_own_that_is_a_plain_product_is_packed: {
        "every class of its own is refused": {
            PLAIN: "if type(base).forward is not nn.Linear.forward:"}},
    test_a_bad_setting_of_a_layer_is_refused: {
        "compute_dtype may be anything": {
            '_check_float("compute_dtype", compute_dtype)': "pass"}},
    test_an_input_of_another_width_or_of_whole_numbers_is_refused: {
        "whole numbers go through": {"and x.is_floating_point()": ""},
        "an input may have any width": {WIDTH: "False"}},
    test_double_quantization_takes_the_nearest_dynamic_value: {
        "the offset is forgotten": {" * nested_absmax + q.offset": " * nested_absmax"},
        "there is no offset": {MEAN: "offset = torch.tensor(0.0)"},
        "the offset is the largest": {MEAN: "offset = absmax.max()"},
        "nested blocks are of 64": {
            "absmax - offset, 256,": "absmax - offset, 64,",
            "interleave(256)": "interleave(64)"},
        "absmax go to the value below": {MIDDLE: "values[1:]"},
        "absmax go to the value above": {MIDDLE: "values[:-1]"},
        "an absmax's sign is lost": {
            "_nearest(absmax - offset,": "_nearest((absmax - offset).abs(),"}},
    test_absmax_next_to_a_midpoint_are_at_the_nearest_too: {
        "the midpoints are off by a thousandth of a step": {
            MIDDLE: f"({MIDDLE}).lerp(values[1:], 0.001)"}},
    test_equal_absmax_leave_nothing_to_divide_by: {
        "equal absmax give NaN": {"(1 / absmax.clamp(TINY))": "(1 / absmax)"}},
    test_a_weight_takes_4_bits_and_its_share_of_an_absmax: {
        "bits counts the codes alone": {BYTES: "self.codes.nbytes"},
        "bits forgets the nested absmax": {
            BYTES: "sum(t.nbytes for t in (self.codes, self.absmax))"},
        "a code takes a byte": {CODE_PAIRS: "indices[: n + 1, None]"}},
    test_a_layer_multiplies_by_the_dequantized_weight: {
        "a Conv1D is packed untransposed": {"_weight(base), b": "base.weight, b"},
        "the product is with W, not its transpose": {"(q, x.dtype).T": "(q, x.dtype)"},
        "the gradient goes through the wrong orientation": {
            BACK: BACK.replace(", None", ".T, None")},
        "a LoRA gets no gradient through the layer": {
            BACK: "torch.zeros_like(grad) @ dequantize(ctx.q, ctx.dtype), None"},
        "the gradient passes W by": {
            BACK: "grad.mean(-1, True) + grad.new_zeros(ctx.q.shape[1]), None"},
        "the bias is dropped": {"if self.bias is not None:": "if False:"},
        "a layer is never doubly quantized": {
            "(base), blocksize, code, double_quant)": "(base), blocksize, code)"}},
    test_a_layer_in_16_bits_is_right_to_rounding: {
        "16 bits are computed in float32 and stay so": {
            "self.bias.to(y.dtype)": "self.bias.float()",
            ANSWER: "return y"}},
    test_the_product_is_in_compute_dtype_and_the_answer_in_the_inputs: {
        "compute_dtype is ignored": {"x.to(self.compute_dtype or x.dtype)": "x"},
        "the answer is in compute_dtype": {ANSWER: "return y"}},
    test_the_gradient_is_exact_in_float64: {
        "the gradient is rounded to 8 bits": {
            "grad.to(ctx.dtype)": "grad.bfloat16().to(ctx.dtype)"}},
    test_a_bias_stays_the_layers_own_frozen_or_trained: {
        "the bias is a copy": {
            "self.bias = base.bias": "self.bias = copy.deepcopy(base.bias)",
            "import torch\n": "import copy\n\nimport torch\n"},
        "a layer is in train mode": {"self.training = base.training": "pass"}},
    test_no_unpacked_weight_outlives_a_product: {
        "autograd saves the weight": {
            APPLY: "y = nn.functional.linear(y, dequantize(self, y.dtype))"},
        "the context keeps the weight": {
            THERE: "ctx.w = dequantize(q, x.dtype)\n        return x @ ctx.w.T"},
        "the layer keeps the weight": {
            "return x @ dequantize(q, x.dtype).T": "W = dequantize(q, x.dtype)\n"
            "    q.absmax.W = W\n    return x @ W.T"}},
    test_under_autocast_the_way_back_is_in_the_inputs_dtype: {
        "the way back is in the gradient's dtype": {
            "grad.to(ctx.dtype)": "grad",
            BACK: "grad @ dequantize(ctx.q, grad.dtype), None"},
        "autocast decides the answer's dtype": {ANSWER: "return y"}},
    test_a_cast_of_the_model_rounds_no_absmax: {
        "half() rounds absmax": {"self._buffers[name] = before[name]": "before[name]"},
        "the weight does not follow a cast": {"self.dtype = fn(probe).dtype": "pass"},
        "half() leaves the bias": {"super()._apply(fn, recurse)": "pass"},
        "a cast makes tensors where the default says": {PROBE: "dtype=self.dtype)"}},
    test_a_layer_goes_to_the_meta_device_and_back: {
        "a meta layer cannot be given memory": {
            "if tensor.dtype != before[name].dtype:": "if True:"},
        "a layer on the meta device is taken for NaN": {
            f'not t.is_meta and {FINITE}:\n        raise ValueError(f"{{what}} is N': (
                f'{FINITE}:\n        raise ValueError(f"{{what}} is N'
            )}},
    test_on_the_meta_device_nothing_is_compared: {
        "a meta weight goes through piece by piece": {
            "if weight.is_meta:\n        piece": "if False:\n        piece"},
        "shapes are compared": {"if x.is_meta:": "if False:"}},
    test_the_buffers_are_the_whole_of_a_weight: {
        "the code is not saved": {
            "(name, tensor)\n\n": '(name, tensor, persistent=name != "code")\n\n'}},
    test_reading_the_weight_unpacks_it_anew_and_marks_it: {
        "the mark is missing": {"W.quant_state = True": "pass"},
        "the weight is read in float32": {
            "W = dequantize(self)": "W = dequantize(self, torch.float32)"}},
    test_a_compiled_layer_agrees: {
        "a trace breaks": {
            "y = checkpoint(": "print(end='', flush=bool(x.sum() > 0))\n"
            "            y = checkpoint("}},
    test_the_way_back_is_through_the_buffers_of_the_way_there: {
        "the context holds the layer itself": {"self.snapshot())": "self)"}},
    test_a_compiled_layer_keeps_no_unpacked_weight: {
        "a compiled layer multiplies as any": {
            "if torch.compiler.is_compiling():  # a trace": "if False:  # a trace"}},
    test_no_buffer_is_a_view_of_more: {
        "the absmax are a view": {"[: len(absmax)].clone()": "[: len(absmax)]"},
        "the codes are a view": {
            CODE_PAIRS: "(indices[::2] << 4 | indices[1::2])[: (n + 1) // 2, None]"}},
    test_a_compiled_dequantize_agrees_to_the_bit: {
        "compiled, the half that is first comes last": {
            "pairs[index_bytes.int()]": "pairs.flip(1)[index_bytes.int()]"},
        "compiled, every block has the first one's absmax": {
            "absmax[:, None, None]": "absmax[:1, None, None]"},
        "compiled, a weight comes back in float32": {
            "[:, None, None]).to(dtype)": "[:, None, None])"}},
}
# fmt: on
MUTATIONS = by_fault(BROKEN)
