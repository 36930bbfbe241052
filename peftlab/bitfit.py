r"""BitFit, training the biases alone: Ben Zaken et al. 2021, arXiv 2106.10199.

Every layer keeps its weight and learns only what it adds (section 3, eqs. 1 to 5):

$$ y = W x + b, \qquad b \leftarrow b - \eta\, \partial \mathcal{L} / \partial b $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W$ | (out, in) | `weight` | pretrained, frozen |
| $b$ | (out,) | `bias` | pretrained; zero where `create` makes it |

BERT-base has 102,912 biases, 0.09% of it. A second setting of the paper trains just
those of the queries and of the first feed-forward layer: `targets`. Models such as
Llama have none: `create=True` makes them, zero, so step 0 changes nothing;
`from_pretrained` would drop them, so create them again before `load_state_dict`. A bias
has its layer's dtype: in 16 bits small steps round to nothing. The neighbour is norm
tuning, `add_norms` (Zhao et al. 2023, arXiv 2312.11420; peft's LNTuning). No module is
wrapped: `merge` just ends the training. peft has no BitFit. The paper also trains the
task's new head; that is yours to unfreeze.
"""

import torch
from torch import nn

from . import surgery


def add(model, create=False, targets=None):
    """Freeze `model` but for its biases, in place, and return it.

    create: give every linear layer without a bias one, zero (the output head gets
    none). targets: names of linear layers, each a full path or a dotted suffix
    ("query"), or "all-linear"; then only their biases train. Raises ValueError, the
    model unchanged, where there is no bias to train, for a target without a match or,
    unless created, without a bias, and for BitFit twice."""
    _refuse_twice(model)
    named, linears = targets is not None, []
    if named or create:
        linears = surgery.select(model, targets if named else "all-linear")
    bare = [m for m in linears if m.bias is None]
    if bare and not create:
        path = next(p for p, m in model.named_modules() if m is bare[0])
        raise ValueError(f"{path} has no bias: create=True would make one, zero")
    if not linears and not _biases(model):
        raise ValueError("the model has no biases: create=True would make them, zero")
    for m in bare:
        dtype = m.weight.dtype if m.weight.is_floating_point() else torch.float32
        zeros = torch.zeros(m.out_features, dtype=dtype, device=m.weight.device)
        m.bias = nn.Parameter(zeros)
    return _train(model, [m.bias for m in linears] if named else _biases(model))


def add_norms(model):
    """Freeze `model` but for its norms' weights and biases, in place, and return it.

    A norm is a module whose class is called so (LayerNorm, LlamaRMSNorm). Raises
    ValueError, the model unchanged, where there is none, and for BitFit twice."""
    _refuse_twice(model)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    chosen = [p for m in norms for p in m.parameters(recurse=False)]
    if not chosen:
        raise ValueError("the model has no norms with weights to train")
    return _train(model, chosen)


def state_dict(model, keep_vars=False):
    """{name: tensor} of what trains: `path.bias` (out,), for norms `path.weight` too;
    keep_vars gives parameters. ValueError without BitFit."""
    names = getattr(model, "bitfit", None)
    if names is None:
        raise ValueError("the model carries no BitFit: call bitfit.add first")
    own = {name: model.get_parameter(name) for name in names}
    return own if keep_vars else {n: t.detach() for n, t in own.items()}


def load_state_dict(model, tensors):
    """Copy {name: tensor}, as `state_dict` gives it, into the model. Raises ValueError,
    nothing copied, for a missing or unexpected name or a wrong shape."""
    surgery.load(state_dict(model), tensors)


def merge(model):
    """End the training: the biases stay, part of the model, which is returned, frozen.
    ValueError without BitFit."""
    state_dict(model)  # raises where there is no BitFit
    del model.bitfit
    return model.requires_grad_(False)


def _refuse_twice(model):
    if hasattr(model, "bitfit"):
        raise ValueError("the model carries BitFit already: merge it first")


def _biases(model):
    return [p for name, p in model.named_parameters() if name.endswith("bias")]


def _train(model, chosen):
    """Freeze all but `chosen`, and note their names on the model."""
    model.requires_grad_(False)
    ids = {id(p.requires_grad_(True)) for p in chosen}
    model.bitfit = tuple(n for n, p in model.named_parameters() if id(p) in ids)
    return model
