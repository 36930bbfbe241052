r"""LoRA, low-rank adaptation: Hu et al. 2021, arXiv 2106.09685, section 4.1, eq. 3.

A frozen linear layer gets a trainable bypass of rank r (rsLoRA: arXiv 2312.03732):

$$ y = W x + s\,B A x, \qquad s = \alpha / r, \text{ with rsLoRA } \alpha / \sqrt r $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W$ | (out, in) | `base.weight` | pretrained, frozen |
| $A$ | (r, in) | `lora_A` | random, uniform in $\pm 1/\sqrt{\mathrm{in}}$ |
| $B$ | (out, r) | `lora_B` | zero, so step 0 changes nothing |
| $s$ | | `scaling` | |

A and B are float32 over a base in fewer bits. Only `merge` changes a weight, never
`train` or `eval`. The paper draws A from a Gaussian; like peft, we use Kaiming's
uniform. GPT-2's Conv1D keeps its weight as (in, out): `surgery.weight` turns it.
Not here: embeddings, convolutions, the input weights of `nn.MultiheadAttention`. Code
that reads a layer's weight and never calls the layer sees $W + s\,BA$, without dropout.
"""

import math

import torch
from torch import nn

from . import surgery


class LoRALinear(nn.Module):
    """Holds a frozen linear `base` and adds `s B A x` to what it returns (eq. 3)."""

    peft_method = "LoRA"

    def __init__(self, base, r, alpha, dropout, bias, rslora):
        super().__init__()
        self.base = base
        self.r = r
        self.alpha = alpha
        self.rslora = rslora
        self.bias_mode = bias
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = nn.Dropout(dropout)

        n_out, n_in = surgery.shape(base)
        like = surgery.like(base)  # dtype and device
        self.lora_A = nn.Parameter(torch.empty(r, n_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        low = self.dropout(x.to(self.lora_A.dtype)) @ self.lora_A.T  # (..., r)
        return (y + (self.scaling * low) @ self.lora_B.T).to(y.dtype)

    def folded(self):  # (out, in)
        """The one weight `W + s B A` that does the same."""
        W = surgery.weight(self.base)
        return W + self.scaling * (self.lora_B @ self.lora_A)

    @property
    def weight(self):  # for code that reads a layer's weight and never calls it
        return surgery.read_weight(self)

    @property
    def bias(self):
        return self.base.bias


def add(model, targets, r=8, alpha=16, dropout=0.0, bias="none", rslora=False):
    """Freeze `model`, put LoRA beside its target layers in place, and return it.

    Args:
        model: any module.
        targets: names of linear layers, each a full path or a dotted suffix
            ("q_proj"), or "all-linear": all but the output head.
        r: the rank.
        alpha: the change is scaled by alpha / r, with `rslora` by alpha / sqrt(r).
        dropout: the share of the bypass's input that is dropped in training.
        bias: which biases train too: "none", "all" or "lora_only" (the targets').
        rslora: rank-stabilized scaling (arXiv 2312.03732).

    Returns:
        The same model.

    Raises:
        ValueError: for a value out of range, a target without a match, and a model that
            carries a method already. Then the model is unchanged.
    """
    surgery.check_whole("the rank r", r, 1)
    surgery.check_positive("alpha", alpha)
    surgery.check_fraction("dropout", dropout)
    surgery.check_one_of("bias", bias, ("none", "all", "lora_only"))
    surgery.check_flag("rslora", rslora)
    surgery.refuse_carried(model)

    layers = surgery.select(model, targets)
    settings = (r, alpha, dropout, bias, rslora)
    surgery.wrap(model, {m: LoRALinear(m, *settings) for m in layers})

    # A and B train by now; this adds the biases that were asked for.
    for p in state_dict(model, keep_vars=True).values():
        p.requires_grad_(True)
    return model


@torch.no_grad()
def merge(model):
    """Make each base weight W + s B A, and put the plain layers back.

    Args:
        model: one that carries LoRA.

    Returns:
        The same model, plain and frozen.

    Raises:
        ValueError: without LoRA, on a packed weight, and for a sum that is NaN or
            infinite in the base's dtype. Then the model is unchanged.
    """
    return surgery.merge(model, LoRALinear)


def state_dict(model, keep_vars=False):
    """Name all that LoRA trains.

    Args:
        model: one that carries LoRA.
        keep_vars: give the parameters themselves, not detached tensors.

    Returns:
        {name: tensor}: `path.lora_A` (r, in), `path.lora_B` (out, r), and the biases
        that were asked for, named as in the plain model.

    Raises:
        ValueError: without LoRA.
    """
    own = surgery.state_dict(model, LoRALinear, ("lora_A", "lora_B"), keep_vars)
    for name, p in _biases(model).items():
        own[name] = p if keep_vars else p.detach()
    return own


def load_state_dict(model, tensors):
    """Copy what `state_dict` gave into the model's LoRA.

    Args:
        model: one that carries LoRA on the same layers.
        tensors: {name: tensor}, none missing and none more.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape, a tensor that is
            not of floats, NaN or infinity. Then nothing is copied.
    """
    surgery.load(state_dict(model), tensors)  # these share the parameters' memory


def _biases(model):
    """{name: parameter} of the biases that train along, named as in the plain model."""
    layers = surgery.wrappers(model, LoRALinear)
    mode = next(iter(layers.values())).bias_mode
    plain_names = {f"{path}.base.bias": f"{path}.bias" for path in layers}

    biases = {}
    for name, p in surgery.uncompiled(model).named_parameters():
        is_bias = name.endswith("bias")
        asked = mode == "all" or mode == "lora_only" and name in plain_names
        if is_bias and asked:
            biases[plain_names.get(name, name)] = p
    return biases
