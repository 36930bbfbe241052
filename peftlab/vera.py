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
to the bit, here and in peft. They stand once in the model, below its first such layer.
Not here: dropout, other draws of A and B.
"""

import math

import torch
from torch import nn

from . import surgery


class Shared(nn.Module):
    """The two frozen matrices of all layers: A (r, widest in) and B (widest out, r)."""

    def __init__(self, A, B):
        super().__init__()
        self.vera_A = nn.Parameter(A, requires_grad=False)
        self.vera_B = nn.Parameter(B, requires_grad=False)


class VeRALinear(nn.Module):
    """Holds a frozen linear `base` and adds `diag(b) B diag(d) A x` (eq. 2)."""

    peft_method = "VeRA"

    def __init__(self, base, shared, seed, owner=False):
        super().__init__()
        self.base = base
        self.seed = seed
        self.shape = surgery.shape(base)

        # In a list torch does not see them: a checkpoint has them once, by the owner.
        self.frozen = [shared]
        if owner:
            self.shared = shared
        A, B = self.slices()
        self.vera_d = nn.Parameter(torch.full_like(A[:, 0], 0.1))  # (r,)
        self.vera_b = nn.Parameter(torch.zeros_like(B[:, 0]))  # (out,)

    @property
    def vera_A(self):  # (r, widest in)
        return self.frozen[0].vera_A

    @property
    def vera_B(self):  # (widest out, r)
        return self.frozen[0].vera_B

    def slices(self):  # (r, in), (out, r)
        """This layer's part of the shared matrices A and B."""
        n_out, n_in = self.shape
        return self.vera_A[:, :n_in], self.vera_B[:n_out]

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        A, B = self.slices()
        low = x.to(A.dtype) @ A.T * self.vera_d  # (..., r)
        return (y + low @ B.T * self.vera_b).to(y.dtype)

    def folded(self):  # (out, in)
        """The one weight `W + diag(b) B diag(d) A` that does the same."""
        A, B = self.slices()
        W = surgery.weight(self.base)
        return W + (self.vera_b[:, None] * B * self.vera_d) @ A

    @property
    def weight(self):  # for code that reads a layer's weight and never calls it
        return surgery.read_weight(self)

    @property
    def bias(self):
        return self.base.bias


def add(model, targets, r=256, seed=0):
    """Freeze `model`, put VeRA beside its target layers in place, and return it.

    Args:
        model: any module.
        targets: names of linear layers, each a full path or a dotted suffix
            ("q_proj"), or "all-linear": all but the output head.
        r: the rank of the shared matrices.
        seed: where they come from.

    Returns:
        The same model.

    Raises:
        ValueError: for a value out of range, a target without a match, and a model that
            carries a method already. Then the model is unchanged.
    """
    surgery.check_whole("the rank r", r, 1)
    surgery.check_whole("seed", seed, 0, below=2**63)
    surgery.refuse_carried(model)

    layers = surgery.select(model, targets)
    widest_out = max(surgery.shape(m)[0] for m in layers)
    widest_in = max(surgery.shape(m)[1] for m in layers)
    like = surgery.like(layers[0])
    both = Shared(*(t.to(**like) for t in shared(widest_in, widest_out, r, seed)))
    new = {m: VeRALinear(m, both, seed, owner=m is layers[0]) for m in layers}
    return surgery.wrap(model, new)


def shared(n_in, n_out, r, seed):
    """Draw the shared matrices of a seed, as peft does: Kaiming's uniform, A first.

    Args:
        n_in, n_out: the widest input and output among the layers.
        r: the rank.
        seed: of the draw.

    Returns:
        A (r, n_in) and B (n_out, r), float32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # peft's order
        t = torch.empty(shape, dtype=torch.float32, device="cpu")  # not the default
        return t.uniform_(-bound, bound, generator=generator)

    A = draw(r, n_in)
    B = draw(n_out, r)
    return A, B


@torch.no_grad()
def merge(model):
    """Make each base weight W + diag(b) B diag(d) A, and put the plain layers back.

    Args:
        model: one that carries VeRA.

    Returns:
        The same model, plain and frozen.

    Raises:
        ValueError: without VeRA, on a packed weight, and for a sum that is NaN or
            infinite in the base's dtype. Then the model is unchanged.
    """
    return surgery.merge(model, VeRALinear)


def state_dict(model, keep_vars=False):
    """Name all that VeRA trains.

    Args:
        model: one that carries VeRA.
        keep_vars: give the parameters themselves, not detached tensors.

    Returns:
        {name: tensor}: `path.vera_d` (r,), `path.vera_b` (out,). A and B come from the
        seed.

    Raises:
        ValueError: without VeRA.
    """
    return surgery.state_dict(model, VeRALinear, ("vera_d", "vera_b"), keep_vars)


def load_state_dict(model, tensors):
    """Copy what `state_dict` gave into the model's VeRA.

    Args:
        model: one that carries VeRA on the same layers.
        tensors: {name: tensor}, none missing and none more.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape, a tensor that is
            not of floats, NaN or infinity. Then nothing is copied.
    """
    surgery.load(state_dict(model), tensors)  # these share the parameters' memory
