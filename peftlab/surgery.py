"""Model surgery: what every method does to a model, and what no paper is about.

Linear layers are chosen by name (`select`), wrapped (`wrap`) and put back (`unwrap`);
what a method trains is named (`state_dict`) and loaded (`load`); and what cannot be is
refused in one clear sentence before anything changes (`check_...`, `refuse_...`).

A method that needs this file can be had as one file that does not: the book's pages
offer it for download, and `python tools/standalone.py lora` writes it.
"""

import math

import torch
from torch import nn

HEADS = {"classifier", "score", "qa_outputs"}  # RoBERTa's classifier is two layers


# Linear layers


def is_conv1d(layer):
    """Whether it is GPT-2's linear layer, which keeps its weight as (in, out)."""
    return type(layer).__name__ == "Conv1D"


def shape(layer):
    """(out, in) of a linear layer, packed or not; None for any other module."""
    if is_conv1d(layer):
        return layer.weight.shape[::-1]
    n_out = getattr(layer, "out_features", None)
    n_in = getattr(layer, "in_features", None)
    return (n_out, n_in) if n_out and n_in else None


def weight(layer):
    """W as every paper has it, (out, in)."""
    return layer.weight.T if is_conv1d(layer) else layer.weight


def set_weight(layer, W):
    """Give the layer the weight W, (out, in), rounded once to the dtype that it had.

    It is a new parameter, frozen: an embedding that was tied to the old one stays.
    """
    W = W.T if is_conv1d(layer) else W
    W = W.to(layer.weight.dtype).contiguous()
    layer.weight = nn.Parameter(W, requires_grad=False)


def like(layer):
    """dtype and device of what trains beside a layer: float32 over 16 bits or fewer."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    return dict(dtype=dtype, device=layer.weight.device)


# Which layers


def select(model, targets):
    """The linear layers that `targets` names, a list.

    targets: a list of names, each a full path or a dotted suffix ("q_proj"), or
    "all-linear": all but the output head. Raises ValueError unless each name matches.
    """
    linears = {p: m for p, m in model.named_modules() if p and shape(m)}

    if targets == "all-linear":
        refuse_fused_experts(model)
        return [m for p, m in linears.items() if not is_head(model, p, m)]

    if not isinstance(targets, list | tuple | set) or not targets:
        raise ValueError(f'targets: a list of names or "all-linear", not {targets!r}')
    lost = [t for t in targets if not any(ends_in(p, t) for p in linears)]
    if lost:
        names = ", ".join(sorted({p.rpartition(".")[2] for p in linears}))
        raise ValueError(f"no linear layer is named {lost}; there are: {names}")
    return [m for p, m in linears.items() if any(ends_in(p, t) for t in targets)]


def ends_in(path, name):
    """Whether a path ends in a name, whole parts only: "proj" is not "q_proj"."""
    return f".{path}".endswith(f".{name}")


def is_head(model, path, layer):
    """Whether a layer is the output head, or a part of a classifier."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return layer is head or bool(HEADS & set(path.split(".")))


def refuse_fused_experts(model):
    """ValueError for a mixture whose experts are 3-D tensors: they are no layers."""
    sizes = {(n, p.dim()): p.numel() for n, p in model.named_parameters()}
    fused = sum(n for (name, dim), n in sizes.items() if "expert" in name and dim == 3)
    if fused:
        share = f"{fused / sum(sizes.values()):.0%} of the weights"
        raise ValueError(f"all-linear misses {share}, fused in 3-D expert tensors")


# In and out


def swap(model, layers):
    """Put layers[old] where the module `old` hangs in the model, wherever that is."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = layers.get(child, child)


def wrap(model, new):
    """Freeze the model, put new[layer] in the place of each layer, and return it."""
    for layer, wrapper in new.items():
        wrapper.train(layer.training)
    swap(model.requires_grad_(False), new)
    return model


def unwrap(model, kind):
    """Put the plain layers back, and return the model, all of it frozen."""
    swap(model, {m: m.base for m in wrappers(model, kind).values()})
    return model.requires_grad_(False)


def wrappers(model, kind):
    """{path: layer} of the method's layers; ValueError where there are none."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, kind)}
    if not found:
        name = method(kind)
        raise ValueError(f"the model carries no {name}: call {name.lower()}.add first")
    return found


def method(kind):
    """The method's name: LoRALinear is LoRA's."""
    return kind.__name__.removesuffix("Linear")


# Tensors


def state_dict(model, kind, names, keep_vars=False):
    """{path.name: tensor} of the method's layers; keep_vars gives the parameters."""
    layers = wrappers(model, kind)
    own = {f"{p}.{name}": getattr(m, name) for p, m in layers.items() for name in names}
    return own if keep_vars else {name: t.detach() for name, t in own.items()}


def load(own, tensors):
    """Copy tensors into `own`, a state dict. Raises ValueError, nothing copied, for a
    missing or unexpected name, a wrong shape, and what is no tensor."""

    def size(t):
        return tuple(t.shape) if torch.is_tensor(t) else None

    for name in sorted(own.keys() | tensors.keys()):
        got, want = size(tensors.get(name)), size(own.get(name))
        if got is None or got != want:
            raise ValueError(f"{name}: its shape is {got} here, {want} in the model")
    for name, t in own.items():
        t.copy_(tensors[name])


# What cannot be


def check_whole(what, value, least, below=math.inf):
    if type(value) is not int or not least <= value < below:
        raise ValueError(
            f"{what} must be a whole number of at least {least}, not {value!r}"
        )


def check_positive(what, value):
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a positive number, not {value!r}")


def check_fraction(what, value):
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{what} must be at least 0 and below 1, not {value!r}")


def check_one_of(what, value, choices):
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, not {value!r}")


def refuse_twice(model, kind):
    if any(isinstance(m, kind) for m in model.modules()):
        raise ValueError(f"the model carries {method(kind)} already: merge it first")


def refuse_packed(layers, what):
    """ValueError, which begins with `what`, for a layer whose weight is packed."""
    for w in (layer.weight for layer in layers):
        if hasattr(w, "quant_state") or not w.is_floating_point():
            raise ValueError(f"{what} a packed (4- or 8-bit) weight")
