r"""DoRA, weight-decomposed low-rank adaptation: Liu et al. 2024, arXiv 2402.09353.

Each output's weights are a length times a direction; LoRA turns the direction (eq. 5):

$$ y = \frac{m}{\lVert W + s\,BA \rVert} \odot (W x + s\,B A x) + \mathrm{bias},
\qquad s = \alpha / r $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W$ | (out, in) | `base.weight` | pretrained, frozen |
| $A$, $B$ | (r, in), (out, r) | `lora_A`, `lora_B` | as LoRA's: random, zero |
| $m$ | (out,) | `dora_m` | $\lVert W \rVert$, so step 0 changes nothing |

The norm is of each row of (out, in), one an output; the paper's W lies the other way,
so it says columns. It is a constant to the gradient (section 4.3). We build W + sBA to
measure it, an (out, in) matrix; expanding the square would avoid that, but where sBA
nearly cancels a row, only rounding is left. Not here: dropout, rsLoRA, embeddings, a
packed (4- or 8-bit) base.
"""

import math

import torch
from torch import nn

from . import surgery


class DoRALinear(nn.Module):
    r"""Holds a frozen linear `base`, turns its weight by $sBA$ and scales it by $m$."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base
        self.r = r
        self.alpha = alpha
        self.scaling = alpha / r

        n_out, n_in = surgery.shape(base)
        like = surgery.like(base)
        self.lora_A = nn.Parameter(torch.empty(r, n_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dora_m = nn.Parameter(self.norm())  # (out,)

    @property
    def weight(self):  # T5 asks a layer for its dtype
        return self.base.weight

    def turned(self):
        r"""$W + sBA$, (out, in)."""
        return surgery.weight(self.base) + self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()  # section 4.3: a constant to the gradient
    def norm(self):
        r"""(out,): each row's length in $W + sBA$, a tiny one for a row of zeros."""
        W = self.turned()
        return torch.linalg.vector_norm(W, dim=1).clamp_min(torch.finfo(W.dtype).tiny)

    def forward(self, x):  # (..., in) -> (..., out)
        y = nn.functional.linear(x, surgery.weight(self.base))
        low = x.to(self.lora_A.dtype) @ self.lora_A.T  # (..., r)
        turned = y + (self.scaling * low) @ self.lora_B.T
        z = turned * (self.dora_m / self.norm())
        if self.base.bias is not None:
            z = z + self.base.bias
        return z.to(y.dtype)


def add(model, targets, r=8, alpha=16):
    """Freeze `model`, turn its target layers into DoRA in place, and return it.

    - `targets`: names of linear layers, each a full path or a dotted suffix
      ("q_proj"), or "all-linear": all but the output head.
    - `r`: the rank.
    - `alpha`: BA is scaled by alpha / r.

    Raises ValueError, the model unchanged, for a value out of range, a target without
    a match, a packed weight, and DoRA twice.
    """
    surgery.check_whole("the rank r", r, 1)
    surgery.check_positive("alpha", alpha)
    surgery.refuse_twice(model, DoRALinear)

    layers = surgery.select(model, targets)
    surgery.refuse_packed(layers, "DoRA cannot take the norm of")
    return surgery.wrap(model, {m: DoRALinear(m, r, alpha) for m in layers})


@torch.no_grad()
def merge(model):
    """Make each base weight m (W + s B A) / |W + s B A|, put the plain layers back, and
    return the model, frozen. Raises ValueError, nothing changed, without DoRA."""
    for m in surgery.wrappers(model, DoRALinear).values():
        W = m.turned() * (m.dora_m / m.norm())[:, None]
        surgery.set_weight(m.base, W)
    return surgery.unwrap(model, DoRALinear)


def state_dict(model, keep_vars=False):
    """All that DoRA trains, {name: tensor}: `path.lora_A` (r, in), `path.lora_B`
    (out, r), `path.dora_m` (out,). keep_vars: the parameters. ValueError without."""
    names = ("lora_A", "lora_B", "dora_m")
    return surgery.state_dict(model, DoRALinear, names, keep_vars)


def load_state_dict(model, tensors):
    """Copy tensors, as `state_dict` gives them, into the model's DoRA. Raises
    ValueError, nothing copied, for a missing or unexpected name or a wrong shape."""
    surgery.load(state_dict(model), tensors)
