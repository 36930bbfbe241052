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
    """Holds a frozen linear `base`, turns its weight by `s B A`, scales it by `m`."""

    peft_method = "DoRA"

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

    def turned(self):  # (out, in)
        """`W + s B A`."""
        W = surgery.weight(self.base)
        return W + self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()  # section 4.3: a constant to the gradient
    def norm(self):  # (out,)
        """The length of each row of `W + s B A`; a tiny one for a row of zeros."""
        W = self.turned()
        return torch.linalg.vector_norm(W, dim=1).clamp_min(torch.finfo(W.dtype).tiny)

    def forward(self, x):  # (..., in) -> (..., out)
        y = nn.functional.linear(x, surgery.weight(self.base))
        low = x.to(self.lora_A.dtype) @ self.lora_A.T  # (..., r)
        turned = y + (self.scaling * low) @ self.lora_B.T  # (..., out)
        z = turned * (self.dora_m / self.norm())
        if self.base.bias is not None:
            z = z + self.base.bias
        return z.to(y.dtype)

    def folded(self):  # (out, in)
        """The one weight `m (W + s B A) / |W + s B A|` that does the same."""
        return self.turned() * (self.dora_m / self.norm())[:, None]

    @property
    def weight(self):  # for code that reads a layer's weight and never calls it
        return surgery.read_weight(self)

    @property
    def bias(self):
        return self.base.bias


def add(model, targets, r=8, alpha=16):
    """Freeze `model`, turn its target layers into DoRA in place, and return it.

    Args:
        model: any module.
        targets: names of linear layers, each a full path or a dotted suffix
            ("q_proj"), or "all-linear": all but the output head.
        r: the rank.
        alpha: B A is scaled by alpha / r.

    Returns:
        The same model.

    Raises:
        ValueError: for a value out of range, a target without a match, with a packed
            weight or with hooks, and a model that carries a method already. Then the
            model is unchanged.
    """
    surgery.check_whole("the rank r", r, 1)
    surgery.check_positive("alpha", alpha)
    surgery.refuse_carried(model)

    layers = surgery.select(model, targets)
    surgery.refuse_unwritable(layers, "DoRA cannot take the norm of")
    surgery.refuse_hooks(layers, "DoRA cannot take the place of")
    return surgery.wrap(model, {m: DoRALinear(m, r, alpha) for m in layers})


@torch.no_grad()
def merge(model):
    """Make each base weight m (W + s B A) / |W + s B A|, and put the plain layers back.

    Args:
        model: one that carries DoRA.

    Returns:
        The same model, plain and frozen.

    Raises:
        ValueError: without DoRA, and for a weight that would be NaN or infinite in the
            base's dtype. Then the model is unchanged.
    """
    return surgery.merge(model, DoRALinear)


def state_dict(model, keep_vars=False):
    """Name all that DoRA trains.

    Args:
        model: one that carries DoRA.
        keep_vars: give the parameters themselves, not detached tensors.

    Returns:
        {name: tensor}: `path.lora_A` (r, in), `path.lora_B` (out, r) and `path.dora_m`
        (out,).

    Raises:
        ValueError: without DoRA.
    """
    names = ("lora_A", "lora_B", "dora_m")
    return surgery.state_dict(model, DoRALinear, names, keep_vars)


def load_state_dict(model, tensors):
    """Copy what `state_dict` gave into the model's DoRA.

    Args:
        model: one that carries DoRA on the same layers.
        tensors: {name: tensor}, none missing and none more.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape, a tensor that is
            not of floats, NaN or infinity. Then nothing is copied.
    """
    surgery.load(state_dict(model), tensors)  # these share the parameters' memory
