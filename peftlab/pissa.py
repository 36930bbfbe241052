r"""PiSSA, principal singular values and vectors: Meng et al. 2024, arXiv 2404.02948.

A and B start as the r strongest directions of W, the base keeps the rest (section 3):

$$ W = U S V^\top, \quad A = \sqrt{S_r}\, V_r^\top, \quad B = U_r \sqrt{S_r}, \quad
W^\mathrm{res} = W - BA, \qquad y = W^\mathrm{res} x + B A x $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W^\mathrm{res}$ | (out, in) | `base.weight` | W less its first r directions; frozen |
| $A$, $B$ | (r, in), (out, r) | `lora_A`, `lora_B` | singular vectors, scaled |

The paper writes x W and A B; its alpha is r: no scaling. A 16-bit residual is rounded.
A and B fit it alone; `to_lora` makes a LoRA of rank 2r for the original base. peft also
has a faster, inexact SVD. Not here: dropout, packed bases (QPiSSA).
"""

import torch
from torch import nn

from . import surgery


class PiSSALinear(nn.Module):
    """Holds `base`, whose weight is the residual, and adds `B A x` to its output."""

    peft_method = "PiSSA"

    def __init__(self, base, r):
        super().__init__()
        self.base = base
        self.r = r

        W = surgery.weight(base).detach().to(**surgery.like(base))
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = S[:r].sqrt()
        self.lora_A = nn.Parameter((root[:, None] * Vh[:r]).contiguous())  # (r, in)
        self.lora_B = nn.Parameter((U[:, :r] * root).contiguous())  # (out, r)
        self.start = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        low = x.to(self.lora_A.dtype) @ self.lora_A.T  # (..., r)
        return (y + low @ self.lora_B.T).to(y.dtype)

    def folded(self):  # (out, in)
        """The one weight `W_res + B A` that does the same."""
        return surgery.weight(self.base) + self.lora_B @ self.lora_A

    @property
    def weight(self):  # for code that reads a layer's weight and never calls it
        return surgery.read_weight(self)

    @property
    def bias(self):
        return self.base.bias


def add(model, targets, r=8):
    """Freeze `model`, split its target layers' weights in place, and return it.

    Args:
        model: any module.
        targets: names of linear layers, each a full path or a dotted suffix
            ("q_proj"), or "all-linear": all but the output head.
        r: how many directions train.

    Returns:
        The same model.

    Raises:
        ValueError: for an r out of range, a target without a match or with a weight
            that is packed, NaN or infinite, and a model that carries a method already.
            Then the model is unchanged.
    """
    surgery.check_whole("the rank r", r, 1)
    surgery.refuse_carried(model)

    layers = surgery.select(model, targets)
    surgery.refuse_unwritable(layers, "PiSSA cannot split")
    most = min(min(surgery.shape(m)) for m in layers)
    if r > most:
        raise ValueError(f"the rank r is {r}, but a target's weight has only {most}")
    for m in layers:
        surgery.check_fits("a target's weight", m.weight, m.weight.dtype)

    new = {m: PiSSALinear(m, r) for m in layers}
    with torch.no_grad():
        for base, m in new.items():
            surgery.set_weight(base, surgery.weight(base) - m.lora_B @ m.lora_A)
    return surgery.wrap(model, new)


@torch.no_grad()
def merge(model):
    """Make each base weight the residual + B A, and put the plain layers back.

    Args:
        model: one that carries PiSSA.

    Returns:
        The same model, plain and frozen.

    Raises:
        ValueError: without PiSSA, and for a sum that is NaN or infinite in the base's
            dtype. Then the model is unchanged.
    """
    return surgery.merge(model, PiSSALinear)


def to_lora(model):
    """Write B A - B0 A0 as one product: a LoRA on the original base.

    It fits `lora.add(original, targets, r=2*r, alpha=2*r)`.

    Args:
        model: one that carries PiSSA.

    Returns:
        {name: tensor}: `path.lora_A` (2r, in), which is [A; A0], and `path.lora_B`
        (out, 2r), which is [B, -B0].

    Raises:
        ValueError: without PiSSA.
    """
    tensors = {}
    for path, m in surgery.wrappers(model, PiSSALinear).items():
        A, B = m.lora_A.detach(), m.lora_B.detach()
        A0, B0 = (t.to(A) for t in m.start)
        tensors[f"{path}.lora_A"] = torch.cat([A, A0])
        tensors[f"{path}.lora_B"] = torch.cat([B, -B0], 1)
    return tensors


def state_dict(model, keep_vars=False):
    """Name all that PiSSA trains.

    Args:
        model: one that carries PiSSA.
        keep_vars: give the parameters themselves, not detached tensors.

    Returns:
        {name: tensor}: `path.lora_A` (r, in), `path.lora_B` (out, r).

    Raises:
        ValueError: without PiSSA.
    """
    names = ("lora_A", "lora_B")
    return surgery.state_dict(model, PiSSALinear, names, keep_vars)


def load_state_dict(model, tensors):
    """Copy what `state_dict` gave into the model's PiSSA.

    Args:
        model: one that carries PiSSA on the same layers.
        tensors: {name: tensor}, none missing and none more.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape, a tensor that is
            not of floats, NaN or infinity. Then nothing is copied.
    """
    surgery.load(state_dict(model), tensors)  # these share the parameters' memory
