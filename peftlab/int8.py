r"""Int8: absmax quantization and LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339.

Absmax (section 2) scales x by its largest magnitude $m$ into [-127, 127] and rounds:
$q = \mathrm{round}(x \cdot 127 / m)$, $x \approx q\, m / 127$. One large value makes
all steps coarse. So LLM.int8() (section 3, eq. 8) has an $m$ for each row of X and W;
input columns $O$, where a magnitude reaches the threshold, stay in x's dtype, 16 bits:

$$ X W^T \approx X_{:,O}\, W_{:,O}^T + \frac{m_X m_W^T}{127^2} \odot (X_q W_q^T) $$

| symbol | shape | in code |
|---|---|---|
| $W_q$, $m_W$ | (out, in), (out, 1) | `codes`, `absmax` |
| $X_q$, $m_X$ | (n, in), (n, 1) | `rest.codes`, zero in $O$, `columns`; `rest.absmax` |

As in the library, not the paper, $W_{:,O}$ comes from the codes, and $m_X$ heeds the
values of $O$ below the threshold too. The gradient to x is that of the dequantized W:
rounding counts as identity. Not here: zero points, 8-bit gradients, training W.
"""

from typing import NamedTuple

import torch
from torch import nn


class Quantized(NamedTuple):
    """What `quantize` makes of x, and all that `dequantize` needs."""

    codes: torch.Tensor  # int8, x's shape
    absmax: torch.Tensor  # float32, x's shape with 1 where it is shared; or (blocks, 1)
    dtype: torch.dtype  # x's
    blocksize: int | None = None


@torch.no_grad()
def quantize(x, dim=None, blocksize=None):
    """x, floats of any shape -> Quantized, codes in [-127, 127]. One absmax for all; or
    over dim (-1: one for each row); or for each blocksize values of the flat x (fewer
    at its end). ValueError: no floats, empty, NaN, infinity, a bad dim or blocksize."""
    if not torch.is_tensor(x) or not x.is_floating_point() or not x.numel():
        raise ValueError("x must be a tensor of floats that is not empty")
    fits = dim is None or type(dim) is int and -x.dim() <= dim < x.dim()
    whole = blocksize is None or type(blocksize) is int and blocksize > 0
    if not fits or not whole or None not in (dim, blocksize):
        raise ValueError(f"give a dim of x or a size above 0, not {dim=}, {blocksize=}")
    values, axis = (_blocks(x, blocksize), -1) if blocksize else (x, dim)
    absmax = values.abs().amax(() if axis is None else axis, keepdim=True).float()
    if not absmax.isfinite().all():
        raise ValueError("int8 holds no NaN, infinity or number beyond float32: mend x")
    codes = _codes(values, absmax).flatten()[: x.numel()].view(x.shape)
    return Quantized(codes, absmax, x.dtype, blocksize)


@torch.no_grad()
def dequantize(q):
    """Quantized -> codes * absmax / 127, in x's shape and dtype."""
    codes = _blocks(q.codes, q.blocksize) if q.blocksize else q.codes
    x = codes.float().div_(127).mul_(q.absmax)  # in this order 127 gives absmax itself
    return x.flatten()[: q.codes.numel()].view(q.codes.shape).to(q.dtype)


@torch.no_grad()
def decompose(x, threshold):
    """x (n, in) -> Quantized by rows, and the columns (outliers,) that hold NaN or some
    magnitude of at least threshold (0: only infinity). The codes in them are zero."""
    size, limit = x.abs(), threshold or torch.inf
    columns = (size < limit).all(0).logical_not().nonzero().flatten()
    size[:, columns] = (some := size[:, columns]).where(some < limit, 0)
    absmax = size.amax(-1, keepdim=True).float()
    codes = _codes(x, absmax).index_fill_(1, columns, 0)
    return Quantized(codes, absmax, x.dtype), columns


class _Product(torch.autograd.Function):
    """x (n, in), bias (out,), codes (out, in), absmax (out, 1) -> (n, out), eq. 8. For
    backward it keeps codes and absmax, which the layer has anyway, not x and not W."""

    @staticmethod
    def forward(ctx, x, bias, codes, absmax, threshold):
        ctx.save_for_backward(codes, absmax)
        with torch.autocast(x.device.type, enabled=False):  # it would round exact sums
            rest, columns = decompose(x, threshold)
            y = _multiply(rest.codes, codes) * (rest.absmax / 127) * (absmax.T / 127)
            if len(columns):  # in x's 16 bits, summed in float32 as a GPU does
                w = dequantize(Quantized(codes[:, columns], absmax, x.dtype))
                y.addmm_(x[:, columns].float(), w.float().T)
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # (n, out)
        w = dequantize(Quantized(*ctx.saved_tensors, grad.dtype))
        return grad @ w, grad.sum(0) if ctx.needs_input_grad[1] else None, *[None] * 3


class Int8Linear(nn.Module):
    """LLM.int8() in place of `base`, an nn.Linear or GPT-2's Conv1D, left as it is.
    Frozen. threshold: the magnitude that keeps a column of x in its dtype; 0: none.
    ValueError: another base, a packed one, NaN in its weight, a threshold below 0."""

    def __init__(self, base, threshold=6.0):
        super().__init__()
        if type(threshold) not in (int, float) or not 0 <= threshold < torch.inf:
            raise ValueError(f"threshold: a number of at least 0, not {threshold!r}")
        w, kind = getattr(base, "weight", None), type(base).__name__
        linear = isinstance(base, nn.Linear) or kind == "Conv1D"
        if not linear or hasattr(w, "quant_state") or not w.is_floating_point():
            raise ValueError(f"base: an nn.Linear or Conv1D of floats, not this {kind}")
        q = quantize(w.T if kind == "Conv1D" else w, dim=-1)
        (self.out_features, self.in_features), self.threshold = q.codes.shape, threshold
        self.register_buffer("codes", q.codes)  # int8 (out, in)
        self.register_buffer("absmax", q.absmax)  # float32 (out, 1)
        self.register_buffer("like", w.new_empty(0), persistent=False)  # has the dtype
        self.bias = None if base.bias is None else nn.Parameter(base.bias.data, False)
        self.training = base.training

    @property
    def weight(self):  # (out, in), made anew at each reading
        w = dequantize(q := Quantized(self.codes, self.absmax, self.like.dtype))
        w.quant_state = q  # merging must not write into it
        return w

    def forward(self, x):  # (..., in) -> (..., out), in x's dtype
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise ValueError(f"the input must be floats (..., {self.in_features})")
        rows, layer = x.reshape(-1, self.in_features), (self.codes, self.absmax)
        y = _Product.apply(rows, self.bias, *layer, self.threshold)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse=True):  # model.half() must not round absmax
        m = self.absmax
        return super()._apply(lambda t: t.to(fn(t).device) if t is m else fn(t))


def _codes(x, absmax):  # round(x * 127/absmax), half to even
    grow = torch.where(absmax < 2**-100, 2.0**100, 1.0)  # 127/1e-40 is infinite
    scale = 127 / (absmax * grow).clamp(min=2**-100)  # where absmax is 0, so is x
    return (x.float() * grow).mul_(scale).round_().to(torch.int8)


def _multiply(a, b):  # a (n, in) and b (out, in), int8 -> a b^T (n, out), exact
    # torch._int_mm is slow on other CPUs and takes few shapes on a GPU. There float32,
    # exact up to 2**24, adds 1,040 products at a time: 1,040 * 127 * 127 is just below.
    if a.is_cpu and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return torch._int_mm(a, b.T) if len(b.T) > 1 else a.int() * b.T  # in = 1: wrong
    parts = zip(a.split(1040, 1), b.split(1040, 1), strict=True)
    return sum((p.float() @ q.float().T).int() for p, q in parts)


def _blocks(x, n):  # (blocks, n) of the flat tensor, the last filled up with zeros
    return nn.functional.pad(x.flatten(), (0, -x.numel() % n)).view(-1, n)
