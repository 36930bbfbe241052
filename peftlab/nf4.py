r"""NF4 and other 4-bit types: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.

A block of 64 weights keeps its largest magnitude, the absmax $c$, and for each weight
the index of the nearest of 16 values: $w \approx c\,\mathrm{code}_i$ with

$$ i = \arg\min_j \left| w / c - \mathrm{code}_j \right| $$

Double quantization packs the absmax too: less their mean, in blocks of 256, to an 8-bit
dynamic type (the library's; the paper has 8-bit floats). It leaves 4.127 of 4.5 bits a
weight. Codes and absmax are those of bitsandbytes to the bit, but its CPU looks dynamic
codes up in 65,536 bins; ours are the nearest. Not here: products without unpacking.
"""

import torch
from torch import nn


def normal_float():
    """NF4, (16,): normal quantiles evenly spaced in probability, 8 above zero, 7 below,
    from 1 - (1/32 + 1/30) / 2 in 7 digits, and zero; over the largest."""
    up, down = (torch.linspace(0.9677083, 0.5, n, **CPU)[:-1].double() for n in (9, 8))
    up, down = torch.special.ndtri(up), -torch.special.ndtri(down)
    return torch.cat([down, up.new_zeros(1), up.flip(0)]).float() / up.max().float()


def dynamic_map():
    """The 8-bit dynamic type (2110.02861, section 1.3), (256,): the middles of 2**e
    parts of 0.1 to 1, times 10**(e - 6), e from 0 to 6; their negatives; 0 and 1."""
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


class Packed(nn.Module):
    """A weight in 4 bits: `codes` (n / 2, 1) uint8, the first of two in the high half;
    `code` (16,); `absmax` (blocks,), float32 or, doubly quantized, uint8, with
    `nested_absmax` (blocks / 256,) and `offset` (). `bits()`: of one, by all bytes."""

    def bits(self):
        held = sum(t.nbytes for t in self.buffers() if t is not self.code)
        return 8 * held / self.shape.numel()

    def _apply(self, fn, recurse=True):  # moves, but a cast must not round the absmax
        kept = self._buffers.copy()
        super()._apply(fn, recurse)
        cast = [k for k, t in self.named_buffers() if t.dtype != kept[k].dtype]
        self._buffers |= {k: kept[k].to(self.codes.device) for k in cast}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


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
    n, step = weight.numel(), max(1, CHUNK // blocksize) * blocksize
    parts = [_nearest(x, blocksize, code) for x in weight.reshape(-1).split(step)]
    near, absmax = map(torch.cat, zip(*parts, strict=True))
    offset, nested = absmax.mean() if double_quant else None, None
    whole = absmax if offset is None else offset  # a mean may overflow
    if not n or not (whole.is_meta or whole.isfinite().all()):
        raise ValueError("there must be weights, none NaN or infinite, nor their sum")
    codes = (near[::2] << 4 | near[1::2])[: (n + 1) // 2, None]
    if double_quant:  # c becomes DYNAMIC[absmax] * nested_absmax + offset
        near, nested = _nearest(absmax - offset, 256, DYNAMIC)
        absmax = near[: len(absmax)]
    q = Packed()
    q.blocksize, q.shape, q.dtype = blocksize, weight.shape, weight.dtype
    q.register_buffer("codes", codes)
    q.register_buffer("absmax", absmax)
    q.register_buffer("code", code.to(weight.device, torch.float32, copy=True))
    q.register_buffer("nested_absmax", nested)
    q.register_buffer("offset", offset)
    return q


def _nearest(x, size, code):  # (n,), blocks of size -> indices (n + padding,), absmax
    rows = nn.functional.pad(x, (0, -len(x) % size)).view(-1, size).float()
    absmax = torch.linalg.vector_norm(rows, torch.inf, 1)
    y = rows * (1 / absmax.clamp(TINY))[:, None]
    if len(x) % size:  # a partial block: as the library, TINY stays, and it divides
        y[-1] = rows[-1] / absmax[-1].clamp_(TINY)
    levels, order = code.float().sort(stable=True)
    near = torch.zeros_like(y, dtype=torch.uint8)
    for bound in ((levels[1:] + levels[:-1]) / 2).tolist():
        near += y > bound  # as many midpoints lie below
    return order.to(x.device, torch.uint8).take(near.long()).view(-1), absmax


def dequantize(q, dtype=None):
    """The weight of a `Packed` or NF4Linear, in its shape and its dtype, or another."""
    absmax, codes, n = q.absmax, q.codes.view(-1), len(q.absmax)
    if q.offset is not None:
        nested = q.nested_absmax.repeat_interleave(256)[:n]
        absmax = DYNAMIC.to(absmax.device)[absmax.int()] * nested + q.offset
    if short := n * q.blocksize // 2 - len(codes):
        codes = nn.functional.pad(codes, (0, short))
    rows, absmax = codes.view(n, -1), absmax[:, None]
    pairs = torch.cartesian_prod(q.code, q.code)  # (256, 2), a byte's two values
    if torch.compiler.is_compiling():  # it fuses this; without it, below is quicker
        out = (pairs[rows.int()] * absmax[:, None]).to(dtype or q.dtype)
    else:
        out = absmax.new_empty(n, q.blocksize, dtype=dtype or q.dtype)
        pairs, step = pairs.view(torch.int64).view(1, 256), max(1, CHUNK // q.blocksize)
        for at in (slice(i, i + step) for i in range(0, n, step)):
            x = pairs.expand(len(rows[at]), 256).gather(1, rows[at].long())
            torch.mul(x.view(torch.float32), absmax[at], out=out[at])
    return out.view(-1)[: q.shape.numel()].view(q.shape)


class _Multiply(torch.autograd.Function):  # x W^T; it never keeps the unpacked W
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        return x @ dequantize(layer, x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype) @ dequantize(ctx.layer, ctx.dtype), None


class NF4Linear(Packed):
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
        vars(self).update(vars(q))  # now it is this `Packed`
        (self.out_features, self.in_features), self.bias = q.shape, base.bias
        self.compute_dtype, self.training = compute_dtype, base.training
        self.kind = type(base)  # to be it again once unpacked

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
