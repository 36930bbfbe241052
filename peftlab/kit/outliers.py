r"""Outliers inserted on purpose: channels made large or small, the function the same.

Large language models have a few channels whose activations are far above the rest
(Dettmers et al. 2022, arXiv 2208.07339). The small ones of this book have none, but
some can be inserted: a norm multiplies each channel by a weight, and the linears after
it multiply the same channel by a column.

$$ W (g \odot \hat x + b) = (W / s) \, (s g \odot \hat x + s b) $$

with $s$ on the chosen channels and 1 on the others. With $s > 1$ the activations get
outliers, with $s < 1$ the weights do: their columns grow. In real numbers the function
is the same for every $s$; in floating point to the bit where $s$ is a power of two,
else within rounding.

That holds only where nothing but these linears reads the norm's output, and nothing but
their layers the weights. So a forward pass is watched to find the readers, and a norm
that anything else reads is refused: BERT adds its norms' output to the residual.
Whatever is measured on such a model says that its outliers were inserted.
"""

import math

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# What says nothing of the values may be asked of a norm's output.
SHAPE = "shape dtype device ndim requires_grad is_nested is_cuda".split()
SHAPE = {getattr(torch.Tensor, name).__get__ for name in SHAPE}
SHAPE |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.is_floating_point}


def scale_channels(model, s, channels, norms=None, inputs=None):
    """Multiply channels of norms by s, and divide the columns that read them by s.

    The model computes what it did before. Calling it again with 1/s takes the outliers
    out.

    Args:
        model: any module, changed in place.
        s: a positive number.
        channels: indices into the norms' output.
        norms: their names, each a full path or a dotted suffix ("input_layernorm"); by
            default every norm that `readers` finds.
        inputs: what to run the model on to find the readers, a dict of arguments or one
            tensor; by default transformers' `model.dummy_inputs`.

    Returns:
        The same model.

    Raises:
        ValueError: nothing changed, for an s or a channel out of range, an unknown
            norm, and a norm whose output is read by anything but plain linears, such as
            packed ones.
    """
    if isinstance(s, bool) or not isinstance(s, int | float) or not 0 < s < math.inf:
        raise ValueError(f"s must be a positive number, not {s!r}")
    if not isinstance(channels, list | tuple | range | set):
        raise ValueError(f"channels must be a list of whole numbers, not {channels!r}")
    found, refused = _examine(model, inputs)
    chosen = _choose(found, refused, norms)
    fresh = {}
    for norm in chosen:
        scale = _scale(model.get_submodule(norm).weight, s, channels, norm)
        for name, p in model.get_submodule(norm).named_parameters():
            fresh[f"{norm}.{name}"] = p, p * scale
        for reader in found[norm]:
            m = model.get_submodule(reader)
            fits = scale[:, None] if type(m).__name__ == "Conv1D" else scale
            fresh[f"{reader}.weight"] = m.weight, m.weight / fits  # (out, in)
    for name, (old, new) in fresh.items():
        if not new.isfinite().all() or not torch.equal(new == 0, old == 0):
            raise ValueError(f"s={s!r} takes {name} out of what {old.dtype} can hold")
    with torch.no_grad():
        for old, new in fresh.values():
            old.copy_(new)
    return model


def readers(model, inputs=None):
    """Find the norms whose output only plain linears read.

    They are found by watching one forward pass in eval mode: a branch that this pass
    does not take is not seen.

    Args:
        model: any module.
        inputs: as for `scale_channels`.

    Returns:
        {norm: [linears]}, all by their paths.

    Raises:
        ValueError: the model needs inputs of its own.
    """
    return _examine(model, inputs)[0]


def _scale(weight, s, channels, norm):
    """(width,): s at the channels, one elsewhere."""
    width, channels = len(weight), list(channels)
    good = [type(c) is int and 0 <= c < width for c in channels]
    if not channels or not all(good):
        raise ValueError(
            f"channels must be numbers from 0 to {width - 1} for {norm}, and at least"
            f" one, not {channels!r}"
        )
    scale = torch.ones(width, dtype=torch.float64, device=weight.device)
    scale[channels] = s
    return scale.to(weight.dtype)


def _choose(found, refused, norms):
    """The paths that `norms` names; ValueError unless each may be scaled."""
    if norms is None and not found:
        why = next((f"{n}: {r}" for n, r in refused.items()), "it has no norm")
        raise ValueError(f"no norm here is read by linears alone ({why})")
    if norms is None:
        return list(found)
    named = isinstance(norms, list | tuple | set) and all(type(n) is str for n in norms)
    if not named or not norms:
        raise ValueError(f"norms must be a list of names, not {norms!r}")
    every, chosen = {**found, **refused}, []
    for name in norms:
        hits = [n for n in every if f".{n}".endswith(f".{name}")]
        if not hits:
            known = ", ".join(sorted({n.rpartition(".")[2] for n in every}))
            raise ValueError(f"no norm is named {name!r}; there are: {known}")
        if bad := [n for n in hits if n in refused]:
            raise ValueError(f"{bad[0]} cannot be scaled: {refused[bad[0]]}")
        chosen += hits
    return list(dict.fromkeys(chosen))


class _Watch(TorchFunctionMode):
    """Notes what reads the norms' outputs, by hooks on modules and, as a mode, in every
    torch function that runs outside a linear."""

    def __init__(self, model):
        super().__init__()
        self.made, self.inside = {}, None  # {id of an output: (the norm, the output)}
        self.calls, self.others = {}, {}  # by norm: its first call; what else reads it
        self.linears, self.handles = {}, []  # by linear: the norms that it reads
        self.owners = {}  # by id of a weight: its layer
        self.lent = {}  # by layer: what else reads its weight
        for path, m in model.named_modules():
            if type(m) is nn.Linear or type(m).__name__ == "Conv1D":
                self.linears[path] = set()
                before, after = self._reads(path), self._leave
            elif hasattr(m, "in_features"):
                kind = f"{path}, which is a {type(m).__name__}"
                before, after = self._other(kind), None
            elif getattr(m._parameters.get("weight"), "ndim", 0) == 1:
                self.others[path] = []
                before, after = self._enter(path), self._note(path)
            else:
                continue
            if after:
                self.owners |= {id(p): path for p in m._parameters.values()}
            if before:
                handle = m.register_forward_pre_hook(before, with_kwargs=True)
                self.handles.append(handle)
            if after:
                self.handles.append(m.register_forward_hook(after, with_kwargs=True))

    def sources(self, values):
        """The norms that made any of the tensors; None for one that no norm made."""
        tensors = [t for t in tree_leaves(values) if torch.is_tensor(t)]
        return {self.made.get(id(t), [None])[0] for t in tensors}

    def read(self, what, values):
        for norm in self.sources(values) - {None}:
            self.others[norm].append(what)

    def _reads(self, path):
        def hook(module, args, kwargs):
            self.linears[path] |= self.sources((args, kwargs))
            self.inside = path

        return hook

    def _enter(self, path):
        def hook(module, args, kwargs):
            self.inside = path

        return hook

    def _leave(self, module, args, kwargs, output):
        self.inside = None

    def _other(self, what):
        return lambda module, args, kwargs: self.read(what, (args, kwargs))

    def _note(self, path):
        def hook(module, args, kwargs, output):
            self.inside = None
            self.made[id(output)] = path, output  # held, so that no other has its id
            self.calls.setdefault(path, (args, kwargs, output))

        return hook

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in SHAPE:
            name = getattr(func, "__name__", str(func))
            if name == "__get__":  # of an attribute, such as T
                name = func.__self__.__name__
            if self.inside not in self.linears:
                self.read(f"`{name}` outside a linear", (args, kwargs))
            read = {self.owners.get(id(t)) for t in tree_leaves((args, kwargs))}
            for path in read - {None, self.inside}:
                self.lent[path] = f"`{name}` outside it"
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _examine(model, inputs):
    """({norm: [linears]}, {norm: why it cannot be scaled}), both by path."""
    inputs = getattr(model, "dummy_inputs", None) if inputs is None else inputs
    if inputs is None:
        raise ValueError("give inputs to run the model on: it has no dummy_inputs")
    named = isinstance(inputs, dict) or hasattr(inputs, "keys")
    if not all(map(torch.is_tensor, inputs.values() if named else [inputs])):
        raise ValueError("inputs must be a tensor, or a dict of tensors")
    watch, training = _Watch(model), [m for m in model.modules() if m.training]
    device = next((p.device for p in model.parameters()), "cpu")
    try:
        model.eval()
        with watch:
            if named:
                out = model(**{k: v.to(device) for k, v in inputs.items()})
            else:
                out = model(inputs.to(device))
        watch.read("the caller", out)
        found, refused = {}, {}
        for norm in watch.others:
            mine = [p for p, norms in watch.linears.items() if norm in norms]
            why = _why_not(model, watch, norm, mine)
            refused.update({norm: why}) if why else found.update({norm: mine})
    finally:
        for handle in watch.handles:
            handle.remove()
        for m in training:
            m.training = True
    return found, refused


def _why_not(model, watch, norm, mine):
    """Why a norm cannot be scaled, or None."""
    owners = {}  # the modules that own a weight: more than one where it is tied
    for path, m in model.named_modules():
        for p in m._parameters.values():
            if p is not None:
                owners.setdefault(p.data_ptr(), []).append(path)
    if norm not in watch.calls:
        return "the forward pass did not run it"
    if others := watch.others[norm]:
        return f"its output is also read by {others[0]}"
    if not mine:
        return "no linear reads its output"
    for path in [norm, *mine]:
        weight = model.get_submodule(path).weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            return f"{path} has no plain weight of floats"
        if len(shared := owners[weight.data_ptr()]) > 1:
            return f"{shared[0]} and {shared[1]} share one weight"
        if path in watch.lent:
            return f"the weight of {path} is also read by {watch.lent[path]}"
    if mixed := [p for p in mine if watch.linears[p] != {norm}]:
        return f"{mixed[0]} reads something else too"
    if not _doubles(model.get_submodule(norm), *watch.calls[norm]):
        return "its output does not scale with its weight (Gemma's is 1 + weight)"
    return None


def _doubles(norm, args, kwargs, output):
    """Whether a norm with twice the weight and bias gives twice the output."""
    if any(p.shape != norm.weight.shape for p in norm.parameters()):
        return False
    twice = {name: 2 * p for name, p in norm.named_parameters()}
    again = torch.func.functional_call(norm, twice, args, kwargs)
    return torch.allclose(again, 2 * output, rtol=1e-3)
