r"""IA3, learned rescaling of inner activations: Liu et al. 2022, arXiv 2205.05638.

Vectors rescale keys, values and what goes into the second feed-forward layer (3.3):

$$ k = l_k \odot (W_k x), \qquad v = l_v \odot (W_v x), \qquad
y = W_2\,(l_\mathrm{ff} \odot \gamma(W_1 x)) $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W$ | (out, in) | `base.weight` | pretrained, frozen |
| $l_k$, $l_v$: output side | (out, 1) | `ia3_l` | ones, so step 0 changes nothing |
| $l_\mathrm{ff}$: input side | (1, in) | `ia3_l` | ones |

The shapes, peft's, tell the side: $l \odot W$ is the folded weight for both. An output
vector rescales the bias too; the paper's T5 has none. Not here: the paper's losses.
"""

import torch
from torch import nn

from . import surgery


class IA3Linear(nn.Module):
    """Holds a frozen linear `base` and rescales what it returns, or what goes in."""

    def __init__(self, base, feedforward):
        super().__init__()
        self.base = base
        self.feedforward = feedforward
        n_out, n_in = surgery.shape(base)
        shape = (1, n_in) if feedforward else (n_out, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, **surgery.like(base)))

    @property
    def weight(self):  # T5 asks a layer for its dtype
        return self.base.weight

    def forward(self, x):  # (..., in) -> (..., out)
        scale = self.ia3_l.flatten()
        if self.feedforward:
            return self.base((scale * x).to(x.dtype))
        y = self.base(x)
        return (scale * y).to(y.dtype)


def add(model, targets, feedforward=()):
    """Freeze `model`, put a vector on its target layers in place, and return it.

    - `targets`: names of linear layers, each a full path or a dotted suffix ("k_proj"),
      or "all-linear": all but the output head.
    - `feedforward`: names of those rescaled on their input side ("down_proj"); they may
      stand in targets too, as in peft.

    Raises ValueError, the model unchanged, for a target without a match and IA3 twice.
    """
    surgery.refuse_twice(model, IA3Linear)
    inputs = surgery.select(model, feedforward) if feedforward else []
    outputs = surgery.select(model, targets) if targets or not inputs else []
    layers = [*inputs, *outputs]
    return surgery.wrap(model, {m: IA3Linear(m, m in inputs) for m in layers})


@torch.no_grad()
def merge(model):
    """Make each weight l * W (an output's bias l * bias), put the plain layers back,
    and return the model, frozen. Raises ValueError, nothing changed, without IA3 or on
    a packed weight."""
    layers = surgery.wrappers(model, IA3Linear).values()
    surgery.refuse_packed([m.base for m in layers], "IA3 cannot be merged into")
    for m in layers:
        _rescale(m.base, m.ia3_l, m.feedforward)
    return surgery.unwrap(model, IA3Linear)


@torch.no_grad()
def unmerge(model, tensors):
    """Undo the `merge` of `tensors`, a `state_dict`, up to rounding; returns the model.

    Raises ValueError, nothing changed, for no tensors, one that does not fit or has a
    zero in it, and a model with IA3 on it.
    """
    surgery.refuse_twice(model, IA3Linear)
    vectors = {name.removesuffix(".ia3_l"): v for name, v in tensors.items()}
    surgery.select(model, list(vectors))  # raises for what is no linear

    new = {}
    for path, base in model.named_modules():
        vector = vectors.get(path)
        if torch.is_tensor(vector):
            n_out, _ = surgery.shape(base)
            layer = IA3Linear(base, feedforward=vector.shape != (n_out, 1))
            # A zero cannot be undone; nor can NaN, for which this is false too.
            if vector.shape == layer.ia3_l.shape and (vector / vector == 1).all():
                layer.ia3_l.copy_(vector)
                new[base] = layer
    if len(new) < max(1, len(tensors)):
        raise ValueError("unmerge needs a vector without zeros for each merged layer")

    for base, layer in new.items():
        _rescale(base, 1 / layer.ia3_l, layer.feedforward)
    return surgery.wrap(model, new)


def state_dict(model, keep_vars=False):
    """All that IA3 trains, {name: tensor}: `path.ia3_l`, (out, 1) on the output side,
    (1, in) on the input side. keep_vars: the parameters. ValueError without IA3."""
    return surgery.state_dict(model, IA3Linear, ("ia3_l",), keep_vars)


def load_state_dict(model, tensors):
    """Copy tensors, as `state_dict` gives them, into the model's IA3. Raises
    ValueError, nothing copied, for a missing or unexpected name or a wrong shape."""
    surgery.load(state_dict(model), tensors)


def _rescale(base, scale, feedforward):
    """scale * W, and an output's scale * bias."""
    surgery.set_weight(base, scale * surgery.weight(base))
    if base.bias is not None and not feedforward:
        bias = (scale.flatten() * base.bias).to(base.bias.dtype)
        base.bias = nn.Parameter(bias, requires_grad=False)
