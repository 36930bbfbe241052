r"""NF4 and other types of 4 bits: QLoRA, Dettmers et al. 2023, arXiv 2305.14314.

This is the storage of the frozen weights. LoRA over them, which is QLoRA itself, is
`qlora.py`.

Weights are packed in blocks of 64 (section 2, eq. 1; section 3). A block stores its
largest magnitude, the absmax $c$. Each of its weights $w$ stores 4 bits: the index $i$
of the value nearest to $w / c$ among 16 values from -1 to 1, which are called the code:

$$ w \approx c \, \mathrm{code}_i $$

An absmax of 32 bits adds half a bit to each of 64 weights. Double quantization (section
3) packs the absmax too: their mean is subtracted, and the rest is stored in blocks of
256, as indices of 8 bits. A weight then takes 4.127 bits instead of 4.5.

| symbol | shape | in code |
|---|---|---|
| the 16 values | (16,), float32 | `code`: `NF4`, `FP4`, `INT4` or your own |
| $i$, from 0 to 15 | (n,), uint8 | `indices`, while a weight is packed |
| two $i$ in a byte, the first in the high half | (n / 2, 1), uint8 | `codes` |
| $c$ | (blocks,), float32 | `absmax` |
| $c$, doubly quantized | (blocks,), uint8 | `absmax`, indices into `DYNAMIC` |
| their absmax | (blocks / 256,), float32 | `nested_absmax` |
| their mean | (), float32 | `offset` |

So `code` is the values and `codes` the bytes. These names are in every state dict.

The codes and absmax of NF4 and FP4 are those of bitsandbytes to the bit. Two things
differ. The paper stores an absmax as an 8-bit float; we take the 8-bit type that
bitsandbytes has. And on the CPU bitsandbytes finds the 8-bit index in a table of 65,536
bins, which sometimes misses the nearest value; ours is the nearest. Not here: products
that read the 4 bits directly. A weight is unpacked, used and thrown away.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import surgery

CHUNK = 2**19  # weights in a piece of work: so many fit into a processor's cache
TINY = 1e-38  # the least divisor, so that a block of zeros is not divided by zero
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU = dict(dtype=torch.float32, device="cpu")  # whatever torch's defaults are


# The values


def _nf4():
    """Quantiles of a normal distribution at even steps of probability (section 3).

    Eight lie above zero, seven below, and zero itself is one. The outermost would be at
    infinity, so the steps end at 0.9677083, which is 1 - (1/32 + 1/30) / 2. Eq. 4 is
    another formula; the values that the paper lists (appendix E) are these.
    """
    above = torch.linspace(0.9677083, 0.5, 9, **CPU).double()  # the last one is zero's
    mirrored = torch.linspace(0.9677083, 0.5, 8, **CPU).double()[:-1]  # seven, no half

    probabilities = torch.cat([1 - mirrored, above.flip(0)])  # from small to large
    quantiles = torch.special.ndtri(probabilities).float()
    return quantiles / quantiles[-1]  # the largest becomes 1


def _fp4():
    """Floats of 4 bits (a sign, two bits of exponent, one of mantissa), over 12.

    The index is the bit pattern, so they are not in order. 1/16 is subnormal, and zero
    comes twice.
    """
    positive = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], **CPU) / 12
    negative = 0 - positive  # unlike -positive it has no -0; bitsandbytes has none
    return torch.cat([positive, negative])


def _int4():
    """The sevenths from -1 to 1, evenly spaced. Zero comes twice."""
    return torch.tensor([*range(-7, 1), *range(8)], **CPU) / 7


def _dynamic():
    """The 256 values for an absmax, from -0.993 to 1 (arXiv 2110.02861, section 1.3).

    For each e from 0 to 6 the range from 0.1 to 1 is cut into 2**e equal parts, and
    their middles are multiplied by 10**(e - 6): 127 values, the large ones with more
    digits. Their negatives, 0 and 1 complete them.
    """
    positive = []
    for e in range(7):
        ends = torch.linspace(0.1, 1, 2**e + 1, **CPU)
        middles = (ends[:-1] + ends[1:]) / 2
        positive.append(10.0 ** (e - 6) * middles)

    positive = torch.cat(positive)
    zero_and_one = torch.arange(2, **CPU)
    return torch.cat([positive, -positive, zero_and_one]).sort().values


NF4 = _nf4()
FP4 = _fp4()
INT4 = _int4()
DYNAMIC = _dynamic()


# Packing


class Packed(nn.Module):
    """A weight in 4 bits, as `quantize` makes it.

    Its buffers are `codes`, `absmax`, `code`, `nested_absmax` and `offset`, as in the
    table above; the last two are None unless the weight is doubly quantized. `shape`
    and `dtype` are the weight's.
    """

    def __init__(self, shape, dtype, blocksize, **buffers):
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.blocksize = blocksize
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def bits(self):
        """The bits that a weight takes, its share of the absmax included."""
        nbytes = sum(t.nbytes for t in self.buffers() if t is not self.code)
        return 8 * nbytes / self.shape.numel()

    def snapshot(self):
        """The tensors of now, for `dequantize` to use later: the layer may be moved,
        or called with other buffers, between forward and backward."""
        buffers = [self._buffers[name] for name in Snapshot._fields[3:]]
        return Snapshot(self.shape, self.dtype, self.blocksize, *buffers)

    def _apply(self, fn, recurse=True):
        """Move with the model. A cast of it sets `dtype`, and rounds no absmax."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)

        for name, tensor in list(self.named_buffers()):
            if tensor.dtype != before[name].dtype:  # it was cast: take the old one
                self._buffers[name] = before[name].to(self.codes.device)

        # fn casts, moves or both, and does not say which. What it makes of an empty
        # tensor in the weight's dtype is the dtype from now on.
        probe = torch.empty(0, dtype=self.dtype, device="cpu")
        self.dtype = fn(probe).dtype
        return self


class Snapshot(NamedTuple):
    """What `dequantize` reads of a `Packed`."""

    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    codes: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None


@torch.no_grad()
def quantize(weight, blocksize=64, code=NF4, double_quant=False):
    """Pack a tensor, row after row, in blocks that run over the ends of rows.

    Section 2, eq. 1, with a table of 16 values in place of whole numbers; section 3.

    Args:
        weight: a tensor of any shape, float32, bfloat16 or float16. It stays as it is.
            On the meta device only shapes come out.
        blocksize: how many weights share an absmax; even, from 2 to `CHUNK`.
        code: (16,) floats from -1 to 1, the largest magnitude being 1, in any order.
        double_quant: whether the absmax are packed too.

    Returns:
        A `Packed`.

    Raises:
        ValueError: for another dtype or setting, no weights, a sparse tensor, NaN and
            infinity, and, with double_quant, absmax whose mean overflows.
    """
    _check(weight, blocksize, code, double_quant)

    piece = CHUNK // blocksize * blocksize  # whole blocks
    if weight.is_meta:
        piece = weight.numel()

    indices = []
    absmax = []
    for x in weight.reshape(-1).split(piece):
        nearest, largest = _nearest(x, blocksize, code)
        indices.append(nearest)
        absmax.append(largest)
    indices = torch.cat(indices)
    absmax = torch.cat(absmax)
    _check_finite("a weight", absmax)

    n = weight.numel()
    high = indices[:n:2]
    low = indices[1 : n + 1 : 2]  # where n is odd, the last one is a padding zero's
    index_bytes = (high << 4 | low)[:, None]  # (n / 2, 1)

    nested_absmax = offset = None
    if double_quant:
        absmax, nested_absmax, offset = _quantize_absmax(absmax)
    return Packed(
        weight.shape,
        weight.dtype,
        blocksize,
        codes=index_bytes,
        absmax=absmax,
        code=code.to(weight.device, torch.float32, copy=True),
        nested_absmax=nested_absmax,
        offset=offset,
    )


def _nearest(x, size, code):
    """For each number of x over its block's absmax, the index of the nearest value.

    x is (n,), the last block is filled with zeros to its size. Returns the indices
    (blocks * size,), uint8, of the zeros too, and the absmax (blocks,), float32.
    """
    padding = -len(x) % size
    rows = nn.functional.pad(x, (0, padding)).view(-1, size).float()
    absmax = rows.abs().amax(1)
    if x.is_meta:  # there are no numbers to compare
        return torch.empty_like(rows, dtype=torch.uint8).view(-1), absmax

    scaled = rows * (1 / absmax.clamp(TINY))[:, None]
    if padding:  # in a partial block bitsandbytes divides, and stores TINY for a zero
        absmax[-1].clamp_(TINY)
        scaled[-1] = rows[-1] / absmax[-1]

    # The nearest value's rank is the number of midpoints below. A loop over midpoints
    # that adds floats is several times as quick as torch.bucketize.
    values, order = code.float().sort(stable=True)
    midpoints = (values[1:] + values[:-1]) / 2
    rank = torch.zeros_like(scaled)
    is_above = torch.empty_like(scaled)
    for midpoint in midpoints.tolist():
        rank += torch.gt(scaled, midpoint, out=is_above)

    indices = order.to(x.device, torch.uint8).take(rank.long())
    return indices.view(-1), absmax


# Unpacking


def dequantize(q, dtype=None):
    """Unpack a weight: code[index] * absmax, in float32, then rounded once (eq. 6).

    Args:
        q: a `Packed`, or an `NF4Linear`, which is one, or a `Snapshot` of it.
        dtype: a dtype of floats of at least 16 bits, None for the weight's own.

    Returns:
        A tensor of the weight's shape.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(q, Packed | Snapshot):
        raise ValueError(f"dequantize takes what quantize made, not {type(q).__name__}")
    _check_float("dtype", dtype)
    dtype = dtype or q.dtype

    # W = code[index] * absmax. A byte holds two indices, so two values are looked up at
    # once, in a table of all pairs.
    absmax = q.absmax if q.offset is None else _dequantize_absmax(q)  # (blocks,)
    pairs = torch.cartesian_prod(q.code, q.code)  # (256, 2)
    index_bytes = _index_bytes(q, len(absmax))  # (blocks, blocksize / 2)

    if torch.compiler.is_compiling():  # the compiler makes one loop of this
        values = pairs[index_bytes.int()]  # (blocks, blocksize / 2, 2)
        W = (values * absmax[:, None, None]).to(dtype)
    else:  # the same in pieces that fit into a cache
        W = absmax.new_empty(len(absmax), q.blocksize, dtype=dtype)
        step = CHUNK // q.blocksize
        tensors = [t.split(step) for t in (W, index_bytes, absmax)]
        for piece in zip(*tensors, strict=True):
            _unpack_into(*piece, pairs)
            if W.is_meta:  # there are no numbers, and the next take as much memory
                break

    n = q.shape.numel()
    return W.view(-1)[:n].view(q.shape)


def _index_bytes(q, blocks):
    """The bytes of the indices, (blocks, blocksize / 2). Zeros fill a partial block."""
    index_bytes = q.codes.view(-1)
    missing = blocks * q.blocksize // 2 - len(index_bytes)
    if missing:
        index_bytes = nn.functional.pad(index_bytes, (0, missing))
    return index_bytes.view(blocks, -1)


def _unpack_into(W, index_bytes, absmax, pairs):
    """Write pairs[index_bytes] * absmax into W, (blocks, blocksize).

    The two float32 of a pair are moved as one number of 8 bytes. torch.gather needs the
    table once for each row: expand repeats it without a copy.
    """
    table = pairs.view(torch.int64).view(1, 256)
    table = table.expand(len(index_bytes), 256)

    target = W.view(torch.int64) if W.dtype == torch.float32 else None
    values = torch.gather(table, 1, index_bytes.long(), out=target)
    torch.mul(values.view(torch.float32), absmax[:, None], out=W)


# Double quantization


def _quantize_absmax(absmax):
    """(blocks,) float32 -> indices (blocks,) uint8, nested_absmax, offset."""
    offset = absmax.mean()
    _check_finite("the mean of the absmax", offset)
    indices, nested_absmax = _nearest(absmax - offset, 256, DYNAMIC)
    indices = indices[: len(absmax)].clone()  # not a view of the padding too
    return indices, nested_absmax, offset


def _dequantize_absmax(q):
    """DYNAMIC[index] * nested_absmax + offset, (blocks,) float32 (eq. 6)."""
    values = DYNAMIC.to(q.absmax.device)[q.absmax.int()]
    nested_absmax = q.nested_absmax.repeat_interleave(256)[: len(values)]
    return values * nested_absmax + q.offset


# The layer


class NF4Linear(Packed):
    """A frozen linear layer whose weight, (out, in), is packed (eq. 5 without LoRA).

    It answers in its input's dtype. The bias is the base's own parameter. The gradient
    with respect to x passes through the unpacked weight; the packed one has none.

    Args:
        base: an nn.Linear, or GPT-2's Conv1D. Its weight stays as it is.
        blocksize: as in `quantize`.
        double_quant: as in `quantize`.
        compute_dtype: the dtype of the product, None for the input's.
        code: as in `quantize`.

    Raises:
        ValueError: for another layer, such as one that is packed or pruned or computes
            more than W x + b, and for what `quantize` refuses.
    """

    def __init__(
        self, base, blocksize=64, double_quant=False, compute_dtype=None, code=NF4
    ):
        surgery.refuse_unpackable(base)
        _check_float("compute_dtype", compute_dtype)
        packed = quantize(surgery.weight(base), blocksize, code, double_quant)

        super().__init__(
            packed.shape, packed.dtype, packed.blocksize, **packed._buffers
        )
        self.out_features, self.in_features = packed.shape
        self.bias = base.bias
        self.compute_dtype = compute_dtype
        self.kind = type(base)  # nn.Linear or Conv1D: merging makes one again
        self.training = base.training

    @property
    def weight(self):
        """W, (out, in), unpacked at each reading, with the mark of a packed weight."""
        W = dequantize(self)
        # W is thrown away, and what a merge writes into it with it. By this attribute,
        # which bitsandbytes' packed weights have, a merge knows that, and refuses.
        W.quant_state = True
        return W

    def forward(self, x):  # (..., in) -> (..., out)
        _check_input(x, self.in_features)
        y = x.to(self.compute_dtype or x.dtype)

        if torch.compiler.is_compiling():  # a trace of _Product would keep W
            y = checkpoint(_multiply, y, self, use_reentrant=False)
        else:
            y = _Product.apply(y, self.snapshot())

        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


def _multiply(x, q):
    return x @ dequantize(q, x.dtype).T


class _Product(torch.autograd.Function):
    """x W^T, which unpacks W again for the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        ctx.dtype = x.dtype
        return _multiply(x, q)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.to(ctx.dtype)  # under autocast it comes in autocast's dtype
        return grad @ dequantize(ctx.q, ctx.dtype), None


# Refusals


def _check(weight, blocksize, code, double_quant):
    """ValueError for what `quantize` cannot pack."""
    if not torch.is_tensor(weight) or weight.dtype not in FLOATS:
        what = getattr(weight, "dtype", type(weight).__name__)
        raise ValueError(f"4 bits need a float of 16 or 32 bits, not {what}")
    if not _is_dense(weight) or not weight.numel():
        raise ValueError("4 bits need weights in a dense tensor that is not empty")

    surgery.check_whole("the block size", blocksize, 2, CHUNK + 1)
    if blocksize % 2:
        raise ValueError(f"the block size must be even, not {blocksize}")
    surgery.check_flag("double_quant", double_quant)

    is_code = torch.is_tensor(code) and code.is_floating_point() and _is_dense(code)
    is_elsewhere = is_code and code.is_meta and not weight.is_meta
    if not is_code or code.shape != (16,) or is_elsewhere:
        raise ValueError("a code must be 16 values, a tensor of floats")
    if not code.is_meta and code.float().abs().max() != 1:
        raise ValueError("a code must be 16 values, the largest magnitude being 1")


def _is_dense(t):
    return t.layout == torch.strided and not t.is_nested


def _check_input(x, in_features):
    is_float = torch.is_tensor(x) and x.is_floating_point()
    if not is_float or x.shape[-1:] != (in_features,):
        shape = surgery.size(x)
        what = getattr(x, "dtype", type(x).__name__) if not is_float else shape
        raise ValueError(f"the input must be floats (..., {in_features}), not {what}")


def _check_finite(what, t):
    if not t.is_meta and not t.isfinite().all():
        raise ValueError(f"{what} is NaN or infinite: it cannot be packed")


def _check_float(what, dtype):
    if dtype is not None and dtype not in (*FLOATS, torch.float64):
        raise ValueError(
            f"{what}: a float of 16 bits or more, or None, not {dtype!r:.60}"
        )
