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
has its layer's dtype, over packed weights float32: in 16 bits small steps round to
nothing. The neighbour is norm tuning, `add_norms` (Zhao et al. 2023, arXiv 2312.11420;
peft's LNTuning). No module is wrapped: `merge` just ends the training. peft has no
BitFit. The paper also trains the task's new head; that is yours to unfreeze.
"""

import warnings

from torch import nn

from . import surgery


def add(model, create=False, targets=None):
    """Freeze `model` but for its biases, in place, and return it.

    A bias that would train nothing, because its layer computes it anew at each call or
    never adds it, is left out with a warning, or refused where `targets` names it.

    Args:
        model: any module.
        create: give every linear layer without a bias one, zero, (out,). The output
            head gets none.
        targets: None for all biases, the norms' and the head's too; or names of linear
            layers, each a full path or a dotted suffix ("query"), or "all-linear": then
            only their biases train.

    Returns:
        The same model.

    Raises:
        ValueError: where there is no bias to train, for a target without a match or,
            unless created, without a bias, and for a model that carries a method
            already. Then the model is unchanged.
    """
    surgery.check_flag("create", create)
    surgery.refuse_carried(model)
    plain = surgery.uncompiled(model)

    linears = []
    if create or targets is not None:
        names = "all-linear" if targets is None else targets
        linears = surgery.select(plain, names)
    bare = [m for m in linears if m.bias is None]
    if bare and not create:
        path = next(p for p, m in plain.named_modules() if m is bare[0])
        raise ValueError(f"{path} has no bias: create=True would make one, zero")

    idle = surgery.unread(plain, bare)
    idle |= surgery.computed(
        plain, "bias", plain.modules() if targets is None else linears
    )
    _leave_out(idle, refuse=isinstance(targets, list | tuple | set))
    linears = [m for m in linears if m not in idle]
    bare = [m for m in bare if m not in idle]
    if not linears and (targets is not None or not _biases(plain)):
        raise ValueError("the model has no biases: create=True would make them, zero")

    for m in bare:
        m.bias = nn.Parameter(surgery.zeros(m))
    chosen = _biases(plain) if targets is None else [m.bias for m in linears]
    _train(plain, chosen)
    return model


def add_norms(model):
    """Freeze `model` but for its norms' weights and biases, in place, and return it.

    Args:
        model: any module. A norm in it is one whose class is called so (LayerNorm,
            LlamaRMSNorm) and that is no linear layer.

    Returns:
        The same model.

    Raises:
        ValueError: where no norm has weights, and for a model that carries a method
            already. Then the model is unchanged.
    """
    surgery.refuse_carried(model)
    plain = surgery.uncompiled(model)
    norms = [m for m in plain.modules() if "Norm" in type(m).__name__]
    norms = [m for m in norms if surgery.shape(m) is None]

    idle = surgery.computed(plain, "weight", norms) | surgery.computed(
        plain, "bias", norms
    )
    _leave_out(idle)
    norms = [m for m in norms if m not in idle]
    chosen = [p for m in norms for p in m.parameters(recurse=False)]
    if not chosen:
        raise ValueError("the model has no norms with weights to train")
    _train(plain, chosen)
    return model


def state_dict(model, keep_vars=False):
    """Name all that trains.

    Args:
        model: one that carries BitFit.
        keep_vars: give the parameters themselves, not detached tensors.

    Returns:
        {name: tensor}: `path.bias` (out,), for norms `path.weight` too.

    Raises:
        ValueError: without BitFit, and where a layer has left the model.
    """
    model = surgery.uncompiled(model)
    names = _names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in parameters:
            raise ValueError(f"{name}, which BitFit trains, has left the model")
    tensors = {name: parameters[name] for name in names}
    return tensors if keep_vars else {name: t.detach() for name, t in tensors.items()}


def load_state_dict(model, tensors):
    """Copy what `state_dict` gave into the model.

    Args:
        model: one that carries BitFit on the same layers.
        tensors: {name: tensor}, none missing and none more.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape, a tensor that is
            not of floats, NaN or infinity. Then nothing is copied.
    """
    surgery.load(state_dict(model), tensors)


def merge(model):
    """End the training: the biases stay, part of the model.

    Args:
        model: one that carries BitFit.

    Returns:
        The same model, frozen.

    Raises:
        ValueError: without BitFit.
    """
    plain = surgery.uncompiled(model)
    _names(plain)  # raises where there is no BitFit
    del plain.bitfit
    return model.requires_grad_(False)


def _names(model):
    """The names of what trains. They are all that BitFit notes on a model."""
    surgery.refuse_containers(model)
    if not hasattr(model, "bitfit"):
        raise ValueError("the model carries no BitFit: call bitfit.add first")
    return model.bitfit


def _train(model, chosen):
    """Freeze all but `chosen`, and note their names on the model."""
    model.requires_grad_(False)
    ids = {id(p.requires_grad_(True)) for p in chosen}
    model.bitfit = tuple(n for n, p in model.named_parameters() if id(p) in ids)


def _biases(model):
    named = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return [p for p in named if p.is_floating_point() or p.is_complex()]


def _leave_out(idle, refuse=False):
    """Warn of the layers of {layer: sentence}, or refuse the first of them."""
    for sentence in idle.values():
        if refuse:
            raise ValueError(f"{sentence}: it would train nothing")
    if idle:
        warnings.warn(f"BitFit leaves out: {'; '.join(idle.values())}", stacklevel=3)
