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
    """Holds `base`, whose weight is the residual, and adds $BAx$ to what it returns."""

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

    @property
    def weight(self):  # T5 asks a layer for its dtype
        return self.base.weight

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        low = x.to(self.lora_A.dtype) @ self.lora_A.T  # (..., r)
        return (y + low @ self.lora_B.T).to(y.dtype)


def add(model, targets, r=8):
    """Freeze `model`, split its target layers' weights in place, and return it.

    - `targets`: names of linear layers, each a full path or a dotted suffix
      ("q_proj"), or "all-linear": all but the output head.
    - `r`: how many directions train.

    Raises ValueError, the model unchanged, for an r out of range, a target without a
    match or with a packed weight, and PiSSA twice.
    """
    surgery.check_whole("the rank r", r, 1)
    surgery.refuse_twice(model, PiSSALinear)

    layers = surgery.select(model, targets)
    surgery.refuse_packed(layers, "PiSSA cannot split")
    most = min(min(surgery.shape(m)) for m in layers)
    if r > most:
        raise ValueError(f"the rank r is {r}, but a target's weight has only {most}")

    new = {m: PiSSALinear(m, r) for m in layers}
    with torch.no_grad():
        for base, m in new.items():
            surgery.set_weight(base, surgery.weight(base) - m.lora_B @ m.lora_A)
    return surgery.wrap(model, new)


@torch.no_grad()
def merge(model):
    """Make each base weight the residual + B A, put the plain layers back, and return
    the model, frozen. Raises ValueError, nothing changed, without PiSSA."""
    for m in surgery.wrappers(model, PiSSALinear).values():
        surgery.set_weight(m.base, surgery.weight(m.base) + m.lora_B @ m.lora_A)
    return surgery.unwrap(model, PiSSALinear)


def to_lora(model):
    """B A - B0 A0 as one product, {name: tensor} of a LoRA on the original base, for
    `lora.add(original, targets, r=2*r, alpha=2*r)`: `path.lora_A` (2r, in) is [A; A0],
    `path.lora_B` (out, 2r) is [B, -B0]. ValueError without PiSSA."""
    own = {}
    for path, m in surgery.wrappers(model, PiSSALinear).items():
        A, B = m.lora_A.detach(), m.lora_B.detach()
        A0, B0 = (t.to(A) for t in m.start)
        own[f"{path}.lora_A"] = torch.cat([A, A0])
        own[f"{path}.lora_B"] = torch.cat([B, -B0], 1)
    return own


def state_dict(model, keep_vars=False):
    """All that PiSSA trains, {name: tensor}: `path.lora_A` (r, in), `path.lora_B`
    (out, r). keep_vars: the parameters. ValueError without PiSSA."""
    names = ("lora_A", "lora_B")
    return surgery.state_dict(model, PiSSALinear, names, keep_vars)


def load_state_dict(model, tensors):
    """Copy tensors, as `state_dict` gives them, into the model's PiSSA. Raises
    ValueError, nothing copied, for a missing or unexpected name or a wrong shape."""
    surgery.load(state_dict(model), tensors)
