r"""NF4 and other 4-bit types: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.

A block of 64 weights keeps its largest magnitude, the absmax $c$, and for each weight
the index of the nearest of 16 values: $w \approx c\,\mathrm{code}_i$ with

$$ i = \arg\min_j \left| w / c - \mathrm{code}_j \right| $$

| symbol | shape | in code | what it is |
|---|---|---|---|
| $\mathrm{code}$ | (16,) | `NF4`, `FP4`, `INT4` | values from -1 to 1 |
| $i$ | (n / 2, 1) | `Packed.codes` | two to a byte, the first in the high half |
| $c$ | (n / 64,) | `Packed.absmax` | float32; doubly quantized, a byte |

Double quantization packs the absmax too: less their mean, in blocks of 256, to an 8-bit
dynamic type (the library's; the paper has 8-bit floats). It leaves 4.127 of 4.5 bits a
weight. Codes and absmax are those of bitsandbytes to the bit, but its CPU looks dynamic
codes up in 65,536 bins; ours are the nearest. Not here: products without unpacking.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


def normal_float():
    """NF4, (16,): normal quantiles evenly spaced in probability, 8 above zero, 7 below,
    and zero, over the largest. They start at 1 - (1/32 + 1/30) / 2, to seven digits:
    with more, or in float32, the last bits are not the library's."""
    up, down = (torch.linspace(0.9677083, 0.5, n, **CPU)[:-1].double() for n in (9, 8))
    up, down = torch.special.ndtri(up), -torch.special.ndtri(down)
    return torch.cat([down, up.new_zeros(1), up.flip(0)]).float() / up.max().float()


def dynamic_map():
    """The 8-bit dynamic type (2110.02861, section 1.3), (256,), rising. In each of 7
    decades up to 1, 0.1 to 1 is cut into equal parts, twice as many as in that below;
    a value is the middle of a part. Also their negatives, 0, and 1 without a twin."""
    cuts = [torch.linspace(0.1, 1, 2**e + 1, **CPU) for e in range(7)]
    parts = [10.0 ** (e - 6) * (x[:-1] + x[1:]) / 2 for e, x in enumerate(cuts)]
    return torch.cat([*parts, *(-x for x in parts), torch.arange(2, **CPU)]).sort()[0]


CPU = dict(dtype=torch.float32, device="cpu")  # whatever torch's defaults are
NF4, DYNAMIC = normal_float(), dynamic_map()
# By bit pattern: a sign, two bits of exponent, one of mantissa; 1/16 is subnormal.
FP4 = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], **CPU) / 12
FP4 = torch.cat([FP4, 0 - FP4])  # zero comes twice, as in the library not as -0
INT4 = torch.tensor([*range(-7, 1), *range(8)], **CPU) / 7  # evenly spaced
CHUNK, TINY = 2**19, 1e-38  # so many weights at a time stay in a processor's cache


@dataclass
class Packed:
    """A weight in 4 bits. Doubly quantized, its absmax is DYNAMIC[absmax] times
    nested_absmax plus offset. `bits()`: a weight's, counted from all the bytes."""

    codes: torch.Tensor  # (ceil(n / 2), 1) uint8
    absmax: torch.Tensor  # (blocks,) float32, or uint8
    code: torch.Tensor  # (16,)
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None  # (ceil(blocks / 256),) float32
    offset: torch.Tensor | None = None  # ()

    def bits(self):
        kept = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return 8 * sum(t.nbytes for t in kept if t is not None) / self.shape.numel()


@torch.no_grad()
def quantize(weight, blocksize=64, code=NF4, double_quant=False):
    """Pack a tensor of any shape, of 16- or 32-bit floats, row after row; a `Packed`.
    blocksize: weights to an absmax, a multiple of 4. code: 16 values from -1 to 1.
    Raises ValueError for any other of these or dtype, no weights, NaN and infinity."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"4 bits need a float of 16 or 32 bits, not {weight.dtype}")
    if type(blocksize) is not int or blocksize < 4 or blocksize % 4:
        raise ValueError(f"the block size must be a multiple of 4, not {blocksize!r}")
    if getattr(code, "shape", None) != (16,) or code.abs().max() != 1:
        raise ValueError("a code must be 16 values, the largest magnitude being 1")
    n = weight.numel()
    rows = F.pad(weight.reshape(-1), (0, -n % blocksize)).view(-1, blocksize)
    absmax = torch.linalg.vector_norm(rows, torch.inf, 1, dtype=torch.float32)
    whole = absmax.mean() if double_quant else absmax  # the mean may overflow
    if not n or not (whole.is_meta or whole.isfinite().all()):
        raise ValueError("there must be weights, none NaN or infinite, nor their sum")
    levels, order = code.float().sort(stable=True)
    bounds = ((levels[1:] + levels[:-1]) / 2).tolist()
    codes = torch.empty_like(rows[:, ::2], dtype=torch.uint8)  # (blocks, blocksize / 2)
    for i in range(0, len(rows), step := max(1, CHUNK // blocksize)):
        c = absmax[i : i + step, None].clamp(TINY)
        x = rows[i : i + step] * (1 / c)
        if n % blocksize and i + step >= len(rows):  # a partial block: as the library,
            absmax[-1], x[-1] = c[-1], rows[-1] / c[-1]  # TINY kept, and a division
        near = torch.zeros_like(x, dtype=torch.uint8)
        for bound in bounds:
            near += x > bound  # as many midpoints lie below x
        if code is not NF4:
            near = order.to(x.device, torch.uint8)[near.int()]
        codes[i : i + step] = near[:, ::2] << 4 | near[:, 1::2]
    codes = codes.view(-1, 1)[: (n + 1) // 2]
    code = code.to(weight.device, torch.float32, copy=True)
    q = Packed(codes, absmax, code, blocksize, weight.shape, weight.dtype)
    return _double(q) if double_quant else q


def _double(q):
    q.offset = q.absmax.mean()
    rows = F.pad(q.absmax - q.offset, (0, -len(q.absmax) % 256)).view(-1, 256)
    q.nested_absmax = rows.abs().amax(1)
    x = rows * (1 / q.nested_absmax.clamp(TINY))[:, None]
    near = torch.bucketize(x, ((DYNAMIC[1:] + DYNAMIC[:-1]) / 2).to(x.device))
    q.absmax = near.to(torch.uint8).view(-1)[: len(q.absmax)]
    return q


@torch.no_grad()
def dequantize(q, dtype=None):
    """The weight of a `Packed` or NF4Linear, in its shape and its dtype, or another."""
    absmax, table = q.absmax, q.code
    if q.offset is not None:
        nested = q.nested_absmax.repeat_interleave(256)[: len(absmax)]
        absmax = DYNAMIC.to(absmax.device)[absmax.int()] * nested + q.offset
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # (256, 2)
    table, codes = pairs.view(torch.int64).view(-1), q.codes.view(-1)
    if short := len(absmax) * q.blocksize // 2 - len(codes):
        codes = F.pad(codes, (0, short))
    if len(codes) > 2**16:  # look up two bytes at once, the low one first
        low = pairs.expand(256, 256, 2)
        four = torch.cat([low, low.transpose(0, 1)], 2)  # (256, 256, 4)
        table, codes = four.view(torch.complex128).view(-1), codes.view(torch.uint16)
    rows = codes.view(len(absmax), -1)
    out = absmax.new_empty(len(absmax), q.blocksize, dtype=dtype or q.dtype)
    for i in range(0, len(out), step := max(1, CHUNK // q.blocksize)):
        x = table.take(rows[i : i + step].long()).view(torch.float32)
        out[i : i + step] = x.mul_(absmax[i : i + step, None])
    return out.view(-1)[: q.shape.numel()].view(q.shape)


class _Multiply(torch.autograd.Function):
    """x W^T; W is unpacked on the way there and on the way back, never kept between."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        return x @ dequantize(layer, x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype) @ dequantize(ctx.layer, ctx.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear or Conv1D with its weight (out, in) packed, its bias as it was.
    compute_dtype: of the product, None for the input's; the answer has the input's.
    Raises ValueError for another layer, and as `quantize` does."""

    def __init__(
        self, base, blocksize=64, double_quant=False, compute_dtype=None, code=NF4
    ):
        super().__init__()
        conv = type(base).__name__ == "Conv1D"  # GPT-2's keeps its weight as (in, out)
        weight = getattr(base, "_parameters", {}).get("weight")
        linear = (conv or hasattr(base, "in_features")) and weight is not None
        if not linear or hasattr(weight, "quant_state"):
            raise ValueError(f"a plain linear can be packed, not {type(base).__name__}")
        if not getattr(compute_dtype or torch.half, "is_floating_point", False):
            raise ValueError(f"compute_dtype: a float or None, not {compute_dtype!r}")
        q = quantize(weight.T if conv else weight, blocksize, code, double_quant)
        (self.out_features, self.in_features), self.bias = q.shape, base.bias
        self.shape, self.dtype, self.blocksize = q.shape, q.dtype, blocksize
        self.compute_dtype, self.training = compute_dtype, base.training
        self.kind = type(base)  # to be it again once unpacked
        for name in ("codes", "absmax", "code", "nested_absmax", "offset"):
            self.register_buffer(name, getattr(q, name))  # now it reads as a `Packed`

    def _apply(self, fn, recurse=True):  # moves, but a cast must not round the absmax
        kept = self._buffers.copy()
        super()._apply(fn, recurse)
        cast = [k for k, t in self.named_buffers() if t.dtype != kept[k].dtype]
        self._buffers |= {k: kept[k].to(self.codes.device) for k in cast}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    @property
    def weight(self):  # unpacked at each reading; its mark keeps merges away
        weight = dequantize(self)
        weight.quant_state = True
        return weight

    def forward(self, x):  # (..., in) -> (..., out)
        if not x.is_floating_point():
            raise ValueError(f"the input must be floats, not {x.dtype}")
        y = _Multiply.apply(x.to(self.compute_dtype or x.dtype), self)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)
