r"""NF4 and other 4-bit types: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.

A block of 64 weights keeps its largest magnitude, the absmax $c$, and for each weight
$w$ the index $i$ of the nearest of 16 values to $w/c$: $w \approx c\,\mathrm{code}_i$.

Double quantization packs the absmax too, less their mean, in blocks of 256, to an 8-bit
type (the library's; the paper has 8-bit floats). It leaves 4.127 of 4.5 bits a weight.
NF4's and FP4's codes and absmax are those of bitsandbytes to the bit, but its CPU looks
8-bit codes up in 65,536 bins; ours are the nearest. Not here: products of packed data.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CPU = dict(dtype=torch.float32, device="cpu")  # whatever torch's defaults are
# Normal quantiles at even steps of probability from 0.9677083, 1 - (1/32 + 1/30) / 2,
# to a half: 8 above zero, 7 below, and zero. Divided by the largest.
up, down = (torch.linspace(0.9677083, 0.5, n, **CPU).double() for n in (9, 8))
NF4 = torch.special.ndtri(torch.cat([1 - down[:-1], up.flip(0)])).float()
NF4 = NF4 / NF4[-1]
# By bit pattern: sign, two bits of exponent, one of mantissa; 1/16 is subnormal.
FP4 = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], **CPU) / 12
FP4 = torch.cat([FP4, 0 - FP4])  # zero comes twice, as in the library not as -0
INT4 = torch.tensor([*range(-7, 1), *range(8)], **CPU) / 7  # evenly spaced
# 8 bits (2110.02861, section 1.3): the middles of 2**e equal parts of 0.1 to 1, times
# 10**(e - 6), for e from 0 to 6; their negatives; 0 and 1.
cuts = [torch.linspace(0.1, 1, 2**e + 1, **CPU) for e in range(7)]
parts = torch.cat([10.0 ** (e - 6) * (x[:-1] + x[1:]) / 2 for e, x in enumerate(cuts)])
DYNAMIC = torch.cat([parts, -parts, torch.arange(2, **CPU)]).sort()[0]
CHUNK, TINY = 2**19, 1e-38  # weights that a cache holds; the least divisor


class Packed(nn.Module):
    """A weight in 4 bits: `codes` (n / 2, 1) uint8, the first of two in the high half;
    `code` (16,); `absmax` (blocks,), float32 or, doubly quantized, uint8, with
    `nested_absmax` (blocks / 256,) and `offset` (). `bits()`: what a weight takes."""

    def bits(self):
        held = sum(t.nbytes for t in self.buffers() if t is not self.code)
        return 8 * held / self.shape.numel()

    def _apply(self, fn, recurse=True):  # moves, but a cast must not round the absmax
        kept = self._buffers.copy()
        super()._apply(fn, recurse)
        cast = [k for k, t in self.named_buffers() if t.dtype != kept[k].dtype]
        self._buffers |= {k: kept[k].to(self.codes.device) for k in cast}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self


@torch.no_grad()
def quantize(weight, blocksize=64, code=NF4, double_quant=False):
    """Pack a tensor of any shape, of 16- or 32-bit floats, row after row; a `Packed`.
    blocksize: weights to an absmax, even, up to CHUNK. code: 16 values from -1 to 1.
    Raises ValueError for any other of these or dtype, no weights, NaN and infinity."""
    dtype = getattr(weight, "dtype", type(weight))
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"4 bits need a float of 16 or 32 bits, not {dtype}")
    if type(blocksize) is not int or not 2 <= blocksize <= CHUNK or blocksize % 2:
        raise ValueError(f"a block size is even, 2 to {CHUNK}, not {blocksize!r}")
    if not torch.is_tensor(code) or code.shape != (16,) or code.abs().max() != 1:
        raise ValueError("a code must be 16 values, the largest magnitude being 1")
    n = weight.numel()
    piece = n if weight.is_meta else CHUNK // blocksize * blocksize
    parts = [_nearest(x, blocksize, code) for x in weight.reshape(-1).split(piece or 1)]
    near, absmax = map(torch.cat, zip(*parts, strict=True))
    whole = absmax.mean() if double_quant else absmax  # a mean may overflow
    if not n or not (whole.is_meta or whole.isfinite().all()):
        raise ValueError("there must be weights, none NaN or infinite, nor their mean")
    codes, nested = (near[:n:2] << 4 | near[1 : n + 1 : 2])[:, None], None
    if double_quant:  # c becomes DYNAMIC[absmax] * nested_absmax + offset
        near, nested = _nearest(absmax - whole, 256, DYNAMIC)
        absmax = near[: len(absmax)].clone()  # not a view of the padding
    q, code = Packed(), code.to(weight.device, torch.float32, copy=True)
    q.blocksize, q.shape, q.dtype = blocksize, weight.shape, dtype
    q._buffers |= dict(codes=codes, absmax=absmax, code=code, nested_absmax=nested)
    q._buffers["offset"] = whole if double_quant else None
    return q


def _nearest(x, size, code):  # (n,), blocks of size -> indices (n + padding,), absmax
    rows = nn.functional.pad(x, (0, -len(x) % size)).view(-1, size).float()
    absmax = rows.abs().amax(1)
    if x.is_meta:  # no numbers to compare, only shapes
        return rows.new_empty(rows.numel(), dtype=torch.uint8), absmax
    y = rows * (1 / absmax.clamp(TINY))[:, None]
    if len(x) % size:  # a partial block: as the library, TINY stays, and it divides
        y[-1] = rows[-1] / absmax[-1].clamp_(TINY)
    levels, order = code.float().sort(stable=True)
    near, above = torch.zeros_like(y), torch.empty_like(y)  # floats are quickest
    for bound in ((levels[1:] + levels[:-1]) / 2).tolist():
        near += torch.gt(y, bound, out=above)  # the index: the midpoints below
    return order.to(x.device, torch.uint8).take(near.long()).view(-1), absmax


def dequantize(q, dtype=None):
    """The weight of a `Packed` or NF4Linear, in its shape, in `dtype` or its own."""
    absmax, codes, n = q.absmax, q.codes.view(-1), len(q.absmax)
    if q.offset is not None:
        nested = q.nested_absmax.repeat_interleave(256)[:n]
        absmax = DYNAMIC.to(absmax.device)[absmax.int()] * nested + q.offset
    if short := n * q.blocksize // 2 - len(codes):
        codes = nn.functional.pad(codes, (0, short))
    rows, absmax = codes.view(n, -1), absmax[:, None]
    pairs = torch.cartesian_prod(q.code, q.code)  # (256, 2), a byte's two values
    if torch.compiler.is_compiling():  # one loop; run eagerly, the other is quicker
        out = (pairs[rows.int()] * absmax[:, None]).to(dtype or q.dtype)
    else:
        out = absmax.new_empty(n, q.blocksize, dtype=dtype or q.dtype)
        step, pairs = CHUNK // q.blocksize, pairs.view(torch.int64).T
        for r, c, o in zip(*(x.split(step) for x in (rows, absmax, out)), strict=True):
            x = o.view(torch.int64) if out.dtype == torch.float32 else None
            x = torch.gather(pairs.expand(len(r), 256), 1, r.long(), out=x)
            torch.mul(x.view(torch.float32), c, out=o)
    return out.view(-1)[: q.shape.numel()].view(q.shape)


class _Multiply(torch.autograd.Function):  # it never keeps the unpacked W
    @staticmethod
    def forward(ctx, x, q):
        ctx.q, ctx.dtype = q, x.dtype
        return x @ dequantize(q, x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype) @ dequantize(ctx.q, ctx.dtype), None


class NF4Linear(Packed):
    """A frozen linear or Conv1D with its weight (out, in) packed, its bias as it was.
    compute_dtype: of the product, None for the input's, which the output has too.
    Raises ValueError for another layer, and as `quantize` does."""

    def __init__(self, base, blocksize=64, double_quant=False, compute_dtype=None,
                 code=NF4):  # fmt: skip
        super().__init__()
        conv = type(base).__name__ == "Conv1D"  # GPT-2's keeps its weight as (in, out)
        weight = getattr(base, "_parameters", {}).get("weight")
        linear = (conv or hasattr(base, "in_features")) and weight is not None
        if not linear or hasattr(weight, "quant_state"):
            raise ValueError(f"a plain linear can be packed, not {type(base).__name__}")
        if not getattr(compute_dtype or torch.half, "is_floating_point", False):
            raise ValueError(f"compute_dtype: a float or None, not {compute_dtype!r}")
        q = quantize(weight.T if conv else weight, blocksize, code, double_quant)
        vars(self).update(vars(q))  # now it is this `Packed`
        (self.out_features, self.in_features), self.training = q.shape, base.training
        self.bias, self.compute_dtype, self.kind = base.bias, compute_dtype, type(base)

    @property
    def weight(self):  # unpacked at each reading; merges refuse what has the mark
        weight = dequantize(self)
        weight.quant_state = True
        return weight

    def forward(self, x):  # (..., in) -> (..., out)
        if not x.is_floating_point():
            raise ValueError(f"the input must be floats, not {x.dtype}")
        y = x.to(self.compute_dtype or x.dtype)
        if torch.compiler.is_compiling():  # a trace of _Multiply would keep W
            product = lambda x: x @ dequantize(self, x.dtype).T  # noqa: E731
            y = checkpoint(product, y, use_reentrant=False)
        else:  # a copy: buffers may be swapped or moved before the way back
            y = _Multiply.apply(y, SimpleNamespace(**vars(self), **self._buffers))
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)
