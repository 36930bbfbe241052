r"""Int8: absmax quantization and LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339.

Absmax quantization (section 2) scales x by its largest magnitude $m$, the absmax, into
the range from -127 to 127, and rounds:

$$ q = \mathrm{round}(127\, x / m), \qquad x \approx q\, m / 127 $$

One large value makes all steps coarse. LLM.int8() (section 3, eq. 8) therefore has an
absmax for each row of X and of W. The columns $O$ of X in which a magnitude reaches the
threshold, the outliers, are multiplied in 16 bits:

$$ X W^T \approx X_{:,O}\, W_{:,O}^T + \frac{m_X m_W^T}{127^2} \odot (X_q W_q^T) $$

| symbol | shape | in code |
|---|---|---|
| $W_q$, $m_W$ | (out, in), (out, 1) | `codes`, `absmax` |
| $X_q$ | (n, in) | `rest.codes`, zero in the columns $O$ |
| $m_X$ | (n, 1) | `rest.absmax` |
| $O$ | (outliers,) | `columns` |

Two things are as in the library and not as in the paper: $W_{:,O}$ is unpacked from the
codes, and $m_X$ also counts those values of $O$ that are below the threshold. The
gradient with respect to x is that of the unpacked W, as if nothing had been rounded.
Not here: zero points, 8-bit gradients, training of W.
"""

from typing import NamedTuple

import torch
from torch import nn

from . import surgery

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Absmax quantization


class Quantized(NamedTuple):
    """What `quantize` makes of x, and all that `dequantize` needs."""

    codes: torch.Tensor  # int8, x's shape
    absmax: torch.Tensor  # float32, x's shape with 1 where it is shared; or (blocks, 1)
    dtype: torch.dtype  # x's
    blocksize: int | None = None


@torch.no_grad()
def quantize(x, dim=None, blocksize=None):
    """Round to 8 bits, with one absmax for all of x unless `dim` or `blocksize` is set.

    Args:
        x: a tensor of floats, of any shape.
        dim: the values along this dimension share an absmax; -1: one for each row.
        blocksize: so many values of the flattened x share one; the last block may have
            fewer.

    Returns:
        A `Quantized`, its codes from -127 to 127.

    Raises:
        ValueError: for what is no tensor of floats, an empty or sparse one, NaN and
            infinity, a dim that x does not have, a bad blocksize, or both of them.
    """
    _check_floats(x)
    _check_sharing(x, dim, blocksize)

    values, axis = x, dim
    if blocksize:
        values, axis = _blocks(x, blocksize), -1
    if axis is None:
        axis = ()  # over all dimensions

    absmax = values.abs().amax(axis, keepdim=True).float()
    if not absmax.is_meta and not absmax.isfinite().all():
        raise ValueError("int8 holds no NaN, infinity or number beyond float32")

    codes = _codes(values, absmax)
    codes = codes.flatten()[: x.numel()].view(x.shape)  # without what filled a block
    return Quantized(codes, absmax, x.dtype, blocksize)


@torch.no_grad()
def dequantize(q):
    """Go back from a `Quantized`: codes * absmax / 127, in x's shape and dtype.

    Raises:
        ValueError: for what is no `Quantized`.
    """
    if not isinstance(q, Quantized):
        raise ValueError(f"dequantize takes what quantize made, not {type(q).__name__}")
    codes = q.codes
    if q.blocksize:
        codes = _blocks(codes, q.blocksize)

    x = codes.float().div_(127).mul_(q.absmax)  # in this order 127 gives absmax itself
    return x.flatten()[: q.codes.numel()].view(q.codes.shape).to(q.dtype)


def _codes(x, absmax):
    """round(127 x / absmax), half to even. Where absmax is 0, so is x."""
    grow = torch.where(absmax < 2**-100, 2.0**100, 1.0)  # 127 / 1e-40 is infinite
    scale = 127 / (absmax * grow).clamp(min=2**-100)
    return (x.float() * grow).mul_(scale).round_().to(torch.int8)


def _blocks(x, blocksize):
    """The flattened tensor as (blocks, blocksize), the last one filled with zeros."""
    size = min(blocksize, x.numel())
    missing = -x.numel() % size
    return nn.functional.pad(x.flatten(), (0, missing)).view(-1, size)


# LLM.int8()


@torch.no_grad()
def decompose(x, threshold):
    """Take the outlier columns out of x and quantize the rest by rows.

    Args:
        x: (n, in), a tensor of floats.
        threshold: a column with a magnitude of at least this, or NaN, is an outlier; 0:
            only one with infinity or NaN is.

    Returns:
        A `Quantized` (n, in), its codes zero in those columns, and their indices
        (outliers,).

    Raises:
        ValueError: for another x, and a threshold below 0.
    """
    _check_threshold(threshold)
    if not _is_floats(x) or x.dim() != 2 or x.is_meta:
        raise ValueError("x must be a matrix (n, in) of floats, not on the meta device")

    size = x.abs()
    is_small = size < (threshold or torch.inf)
    columns = is_small.all(0).logical_not().nonzero().flatten()
    size[:, columns] = size[:, columns].where(is_small[:, columns], 0)
    absmax = size.amax(-1, keepdim=True).float()

    codes = _codes(x, absmax).index_fill_(1, columns, 0)
    return Quantized(codes, absmax, x.dtype), columns


class Int8Linear(nn.Module):
    """A frozen linear layer that computes LLM.int8(), and answers in its input's dtype.

    Args:
        base: an nn.Linear, or GPT-2's Conv1D. It stays as it is.
        threshold: the magnitude from which on a column of x is an outlier; 0: none is.

    Raises:
        ValueError: for another base, such as one that is packed or pruned or computes
            more than W x + b, NaN in its weight, and a threshold below 0.
    """

    def __init__(self, base, threshold=6.0):
        super().__init__()
        _check_threshold(threshold)
        surgery.refuse_unpackable(base)
        q = quantize(surgery.weight(base), dim=-1)
        empty = base.weight.new_empty(0)  # has the dtype, and moves and casts along

        self.out_features, self.in_features = q.codes.shape
        self.threshold = threshold
        self.register_buffer("codes", q.codes)  # int8 (out, in)
        self.register_buffer("absmax", q.absmax)  # float32 (out, 1)
        self.register_buffer("like", empty, persistent=False)
        self.bias = None
        if base.bias is not None:
            self.bias = nn.Parameter(base.bias.data, requires_grad=False)
        self.training = base.training

    @property
    def weight(self):
        """W, (out, in), unpacked at each reading, with the mark of a packed weight."""
        q = Quantized(self.codes, self.absmax, self.like.dtype)
        W = dequantize(q)
        W.quant_state = q  # merges refuse to write into what has it
        return W

    def forward(self, x):  # (..., in) -> (..., out)
        _check_input(x, self.in_features)
        rows = x.reshape(-1, self.in_features)
        y = _Product.apply(rows, self.bias, self.codes, self.absmax, self.threshold)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse=True):
        """Move and cast with the model; `model.half()` must not round the absmax."""
        absmax = self.absmax

        def move(t):
            return t.to(fn(t).device) if t is absmax else fn(t)

        return super()._apply(move)


class _Product(torch.autograd.Function):
    """x (n, in), bias (out,), codes (out, in), absmax (out, 1) -> (n, out), eq. 8.

    For backward it retains codes and absmax, which the layer has anyway, not x or W.
    """

    @staticmethod
    def forward(ctx, x, bias, codes, absmax, threshold):
        ctx.save_for_backward(codes, absmax)

        with torch.autocast(x.device.type, enabled=False):  # it would round exact sums
            rest, columns = decompose(x, threshold)
            y = _multiply(rest.codes, codes)
            y = y * (rest.absmax / 127) * (absmax.T / 127)
            if len(columns):  # in x's 16 bits, summed in float32 as a GPU does
                w = dequantize(Quantized(codes[:, columns], absmax, x.dtype))
                y.addmm_(x[:, columns].float(), w.float().T)

        if bias is not None:
            y.add_(bias)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # (n, out)
        codes, absmax = ctx.saved_tensors
        w = dequantize(Quantized(codes, absmax, grad.dtype))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[1] else None
        return grad @ w, grad_bias, None, None, None


def _multiply(a, b):
    """a (n, in), b (out, in), int8 -> a b^T (n, out), exact.

    torch._int_mm is slow on other CPUs and takes few shapes on a GPU. There we multiply
    in float32, which is exact up to 2**24: 1,040 products of 127 * 127 are just below.
    """
    if a.is_cpu and torch.backends.cpu.get_cpu_capability() == "AVX512":
        if a.shape[1] == 1:  # where torch._int_mm is wrong
            return a.int() * b.T
        return torch._int_mm(a, b.T)

    total = 0
    for p, q in zip(a.split(1040, 1), b.split(1040, 1), strict=True):
        total = total + (p.float() @ q.float().T).int()
    return total


# What cannot be


def _is_floats(x):
    is_dense = torch.is_tensor(x) and x.layout == torch.strided and not x.is_nested
    return is_dense and x.dtype in FLOATS


def _check_input(x, in_features):
    if not _is_floats(x):
        what = getattr(x, "dtype", type(x).__name__)
        raise ValueError(f"the input must be floats in a dense tensor, not {what}")
    if x.shape[-1:] != (in_features,):
        raise ValueError(
            f"the input must be floats (..., {in_features}), not {(*x.shape,)}"
        )


def _check_floats(x):
    if not _is_floats(x):
        what = getattr(x, "dtype", type(x).__name__)
        raise ValueError(
            f"x must be a dense tensor of 16- to 64-bit floats, not {what}"
        )
    if not x.numel():
        raise ValueError("x must be a tensor that is not empty")


def _check_sharing(x, dim, blocksize):
    if dim is not None and blocksize is not None:
        raise ValueError("give a dim or a blocksize, not both")
    if dim is not None and (type(dim) is not int or not -x.dim() <= dim < x.dim()):
        raise ValueError(f"x of {x.dim()} dimensions has no dim {dim!r:.60}")
    if blocksize is not None and (type(blocksize) is not int or blocksize < 1):
        raise ValueError(f"a blocksize is a whole number from 1, not {blocksize!r:.60}")


def _check_threshold(threshold):
    if type(threshold) not in (int, float) or not 0 <= threshold <= 1e300:
        raise ValueError(f"threshold: a number of at least 0, not {threshold!r:.60}")
