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

    peft_method = "IA3"

    def __init__(self, base, feedforward):
        super().__init__()
        self.base = base
        self.feedforward = feedforward

        n_out, n_in = surgery.shape(base)
        shape = (1, n_in) if feedforward else (n_out, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, **surgery.like(base)))

    def forward(self, x):  # (..., in) -> (..., out)
        scale = self.ia3_l.flatten()
        if self.feedforward:
            return self.base((scale * x).to(x.dtype))
        y = self.base(x)
        return (scale * y).to(y.dtype)

    def folded(self):  # (out, in)
        """The one weight `l W` that does the same, with `folded_bias`."""
        return self.ia3_l * surgery.weight(self.base)

    def folded_bias(self):  # (out,)
        """`l b` for a vector on the output side: that rescales the bias too."""
        bias = self.base.bias
        if bias is None or self.feedforward:
            return bias
        return (self.ia3_l.flatten() * bias).to(bias.dtype)

    @property
    def weight(self):  # for code that reads a layer's weight and never calls it
        return surgery.read_weight(self)

    @property
    def bias(self):
        return self.folded_bias()


def add(model, targets, feedforward=()):
    """Freeze `model`, put a vector on its target layers in place, and return it.

    Args:
        model: any module.
        targets: names of linear layers, each a full path or a dotted suffix
            ("q_proj"), or "all-linear": all but the output head.
        feedforward: names of those rescaled on their input side ("down_proj"); they
            may stand in `targets` too, as in peft.

    Returns:
        The same model.

    Raises:
        ValueError: for a target without a match, and a model that carries a method
            already. Then the model is unchanged.
    """
    surgery.refuse_carried(model)

    inputs = surgery.select(model, feedforward) if feedforward else []
    outputs = surgery.select(model, targets) if targets or not inputs else []
    layers = [*inputs, *outputs]
    return surgery.wrap(model, {m: IA3Linear(m, m in inputs) for m in layers})


@torch.no_grad()
def merge(model):
    """Make each weight l W, an output's bias l b, and put the plain layers back.

    Args:
        model: one that carries IA3.

    Returns:
        The same model, plain and frozen.

    Raises:
        ValueError: without IA3, on a packed weight, and for a product that is NaN or
            infinite in the base's dtype. Then the model is unchanged.
    """
    layers = surgery.wrappers(model, IA3Linear)
    bases = [m.base for m in layers.values()]
    surgery.refuse_unwritable(bases, "IA3 cannot be merged into")
    biases = {m: m.folded_bias() for m in layers.values()}
    for path, m in layers.items():
        if biases[m] is not None:
            surgery.check_fits(f"{path}.bias", biases[m], biases[m].dtype)

    surgery.merge(model, IA3Linear)
    for m, bias in biases.items():
        if bias is not None and not m.feedforward:
            m.base.bias = nn.Parameter(bias, requires_grad=False)
    return model


@torch.no_grad()
def unmerge(model, tensors):
    """Undo the `merge` of a state dict, up to rounding.

    Args:
        model: the merged one.
        tensors: {name: tensor}, what `state_dict` gave before merging.

    Returns:
        The same model, which carries IA3 again.

    Raises:
        ValueError: for no tensors, one that does not fit or has a zero in it, a weight
            that is packed, and a model that carries a method already. Then the model is
            unchanged.
    """
    surgery.refuse_carried(model)
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError("unmerge needs {name: tensor}, what state_dict gave")
    vectors = {str(name).removesuffix(".ia3_l"): v for name, v in tensors.items()}
    layers = surgery.select(model, surgery.Exactly(vectors))
    surgery.refuse_unwritable(layers, "IA3 cannot be divided out of")

    paths = {m: path for path, m in model.named_modules()}
    new = {}
    for base in layers:
        vector = vectors[paths[base]]
        n_out, n_in = surgery.shape(base)
        fits = torch.is_tensor(vector) and vector.shape in ((n_out, 1), (1, n_in))
        # A zero cannot be undone; nor can NaN, for which this is false too.
        if not fits or not (vector / vector == 1).all():
            raise ValueError(f"{paths[base]}: unmerge needs its vector, without zeros")
        new[base] = IA3Linear(base, feedforward=vector.shape != (n_out, 1))
        new[base].ia3_l.copy_(1 / vector)
        surgery.check_fits(paths[base], new[base].folded(), base.weight.dtype)

    for base, m in new.items():
        bias = m.folded_bias()
        surgery.set_weight(base, m.folded())
        if bias is not None and not m.feedforward:
            base.bias = nn.Parameter(bias, requires_grad=False)
        m.ia3_l.copy_(vectors[paths[base]])
    return surgery.wrap(model, new)


def state_dict(model, keep_vars=False):
    """Name all that IA3 trains.

    Args:
        model: one that carries IA3.
        keep_vars: give the parameters themselves, not detached tensors.

    Returns:
        {name: tensor}: `path.ia3_l`, (out, 1) on the output side, (1, in) on the input
        side.

    Raises:
        ValueError: without IA3.
    """
    return surgery.state_dict(model, IA3Linear, ("ia3_l",), keep_vars)


def load_state_dict(model, tensors):
    """Copy what `state_dict` gave into the model's IA3.

    Args:
        model: one that carries IA3 on the same layers.
        tensors: {name: tensor}, none missing and none more.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape, a tensor that is
            not of floats, NaN or infinity. Then nothing is copied.
    """
    surgery.load(state_dict(model), tensors)  # these share the parameters' memory
