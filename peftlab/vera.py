r"""VeRA, vector-based random matrix adaptation: Kopiczko et al. 2023, arXiv 2310.11454.

All layers share two frozen random matrices; each trains only two vectors (3.1, eq. 2):

$$ y = W x + \Lambda_b B \Lambda_d A x $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W$ | (out, in) | `base.weight` | pretrained, frozen |
| $A$ | (r, widest in) | `vera_A` | random from a seed, frozen, shared |
| $B$ | (widest out, r) | `vera_B` | random from the same seed, frozen, shared |
| $d$, diagonal of $\Lambda_d$ | (r,) | `vera_d` | 0.1 |
| $b$, diagonal of $\Lambda_b$ | (out,) | `vera_b` | zero, so step 0 changes nothing |

A narrower layer takes A's first columns and B's first rows. The seed gives both again,
to the bit, here and in peft. Not here: dropout, other draws of A and B.
"""

import math

import torch
from torch import nn

from . import surgery


class VeRALinear(nn.Module):
    r"""Holds a frozen linear `base` and adds $\Lambda_b B \Lambda_d A x$ (eq. 2)."""

    def __init__(self, base, A, B, seed):
        super().__init__()
        self.base = base
        self.seed = seed
        self.shape = surgery.shape(base)
        self.vera_A, self.vera_B = A, B  # not buffers: .to(device) copies those apart
        self.vera_d = nn.Parameter(torch.full_like(A[:, 0], 0.1))  # (r,)
        self.vera_b = nn.Parameter(torch.zeros_like(B[: self.shape[0], 0]))  # (out,)

    @property
    def weight(self):  # T5 asks a layer for its dtype
        return self.base.weight

    def slices(self):
        """This layer's part of the shared matrices: A (r, in) and B (out, r)."""
        n_out, n_in = self.shape
        return self.vera_A[:, :n_in], self.vera_B[:n_out]

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        A, B = self.slices()
        low = x.to(A.dtype) @ A.T * self.vera_d  # (..., r)
        return (y + low @ B.T * self.vera_b).to(y.dtype)


def add(model, targets, r=256, seed=0):
    """Freeze `model`, put VeRA beside its target layers in place, and return it.

    - `targets`: names of linear layers, each a full path or a dotted suffix
      ("q_proj"), or "all-linear": all but the output head.
    - `r`: the rank of the shared matrices.
    - `seed`: where they come from.

    Raises ValueError, the model unchanged, for a value out of range, a target without
    a match, and VeRA twice.
    """
    surgery.check_whole("the rank r", r, 1)
    surgery.check_whole("seed", seed, 0, below=2**63)
    surgery.refuse_twice(model, VeRALinear)

    layers = surgery.select(model, targets)
    widest_out, widest_in = map(max, zip(*map(surgery.shape, layers), strict=True))
    like = surgery.like(layers[0])
    A, B = (t.to(**like) for t in shared(widest_in, widest_out, r, seed))
    A, B = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)
    return surgery.wrap(model, {m: VeRALinear(m, A, B, seed) for m in layers})


def shared(n_in, n_out, r, seed):
    """A (r, n_in) and B (n_out, r) of a seed, float32, Kaiming's uniform, A first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # peft's order
        t = torch.empty(shape, dtype=torch.float32, device="cpu")  # not the default
        return t.uniform_(-bound, bound, generator=generator)

    return draw(r, n_in), draw(n_out, r)


@torch.no_grad()
def merge(model):
    """Make each base weight W + diag(b) B diag(d) A, put the plain layers back, and
    return the model, frozen. Raises ValueError, nothing changed, without VeRA or on a
    packed weight."""
    layers = surgery.wrappers(model, VeRALinear).values()
    surgery.refuse_packed([m.base for m in layers], "VeRA cannot be merged into")
    for m in layers:
        A, B = m.slices()
        W = surgery.weight(m.base)
        surgery.set_weight(m.base, W + (m.vera_b[:, None] * B * m.vera_d) @ A)
    return surgery.unwrap(model, VeRALinear)


def state_dict(model, keep_vars=False):
    """All that VeRA trains, {name: tensor}: `path.vera_d` (r,), `path.vera_b` (out,);
    A and B come from the seed. keep_vars: the parameters. ValueError without VeRA."""
    return surgery.state_dict(model, VeRALinear, ("vera_d", "vera_b"), keep_vars)


def load_state_dict(model, tensors):
    """Copy tensors, as `state_dict` gives them, into the model's VeRA. Raises
    ValueError, nothing copied, for a missing or unexpected name or a wrong shape."""
    surgery.load(state_dict(model), tensors)
