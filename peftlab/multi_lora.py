r"""Several LoRA adapters on one base: hold them by name, switch, combine.

Composes `lora.py`: copy both files into one package folder. One base model, many small
changes of it, one a customer (LoRA's first advantage in Hu et al. 2021, section 1):

$$ y = W x + s\,B_k A_k x \quad\text{with } k \text{ the active name}, \qquad
\sum_k w_k\, s\,B_k A_k = s\,[w_1 B_1, w_2 B_2, \dots]\,[A_1; A_2; \dots] $$

| symbol | shape | in code |
|---|---|---|
| $A_k$, $B_k$ | (r_k, in), (out, r_k) | an adapter, `{path: LoRALinear}` |
| $k$ | a name | `active(model)` |
| $w_k$ | a number | `weights` in `combine` |

The active adapter hangs in the model, so all of `lora`'s verbs and the saving of files
work on it; the others wait beside the model, and switching puts them in its place. A
combination is exact: the ranks are stacked, as in peft's "cat". peft's "linear" adds
the A's and the B's apart, which brings in products of one's B with another's A.
`lora.merge` changes the base that all held adapters share: deepcopy the model first.
Not here: several at once in one batch, biases (they belong to the base).
"""

import math

import torch

from . import lora, surgery


def add(model, name, targets, r=8, alpha=16, dropout=0.0, rslora=False):
    """Put a new LoRA on `model` under a name, make it active, and return the model.
    The settings are `lora.add`'s. Raises ValueError, the model unchanged, for a name
    that is empty or taken, a LoRA without a name, and what `lora.add` refuses."""
    _check_new(model, name)
    before = active(model)
    switch(model, None)
    try:
        lora.add(model, targets, r, alpha, dropout, "none", rslora)
    except Exception:
        switch(model, before)
        raise
    return keep(model, name)


def keep(model, name):
    """Hold the LoRA that is on the model now, say from a file, by a name; the model.
    Raises ValueError, the model unchanged, for a name that is empty or taken, and where
    there is no LoRA, one that is held already, or one that trains biases."""
    _check_new(model, name)
    layers = {p: m for p, m in model.named_modules() if isinstance(m, lora.LoRALinear)}
    if not layers or active(model) is not None:
        raise ValueError("the model carries no LoRA that still needs a name")
    if any(m.bias_mode != "none" for m in layers.values()):
        raise ValueError('the biases belong to the base: hold a LoRA with bias="none"')
    model.lora_adapters = {**_held(model), name: layers}
    return model


def names(model):
    """The names of the adapters that the model holds, in the order of their coming."""
    return [*_held(model)]


def active(model):
    """The name of the held adapter that is on the model now, or None."""
    there = {m for m in model.modules() if isinstance(m, lora.LoRALinear)}
    for name, layers in _held(model).items():
        if there and there == {*layers.values()}:
            return name
    return None


def switch(model, name):
    """Put the named adapter on the model, or with None the base alone; the model.
    Raises ValueError, nothing changed, for an unknown name and a LoRA without one."""
    layers = {} if name is None else _layers(model, name)
    there = {m: m.base for m in model.modules() if isinstance(m, lora.LoRALinear)}
    if there and active(model) is None:
        raise ValueError("the model carries a LoRA without a name: keep it under one")
    if not {m.base for m in layers.values()} <= {*model.modules()}:
        raise ValueError(f"layers that {name!r} belongs to have left the model")
    surgery.swap(model, there)
    for m in layers.values():  # while it waited, the base may have moved to a GPU
        m.to(m.base.weight.device).train(model.training)
    surgery.swap(model, {m.base: m for m in layers.values()})
    return model


@torch.no_grad()
def combine(model, weights, name):
    """Make a new adapter, the weighted sum of others, active under a name; the model.
    weights: {name: number}, may be negative. Its rank is the sum of theirs. Raises
    ValueError, the model unchanged, for no weights, one that is no finite number, an
    unknown name, a new name that is taken, and for scalings that differ: the stacked
    product has one scaling, and to fold another into B would hide it from the file."""
    _check_new(model, name)
    numbers = weights.values() if isinstance(weights, dict) else [None]
    numbers = [isinstance(w, int | float) and math.isfinite(w) for w in numbers]
    if not numbers or not all(numbers):
        raise ValueError(f"weights must be {{name: finite number}}, not {weights!r}")
    parts = [(weight, _layers(model, k)) for k, weight in weights.items()]
    scalings = {m.scaling for _, layers in parts for m in layers.values()}
    if not {m.base for _, p in parts for m in p.values()} <= {*model.modules()}:
        raise ValueError("layers that these adapters belong to have left the model")
    if not math.isclose(min(scalings), max(scalings)):
        raise ValueError(f"adapters of different scalings do not add up: {scalings}")
    r = sum(next(iter(layers.values())).r for _, layers in parts)
    new = {}
    for path, one in {p: m for _, layers in parts for p, m in layers.items()}.items():
        settings = (one.base, r, one.scaling * r, 0.0, "none", False)
        new[path] = m = lora.LoRALinear(*settings)
        m.lora_A.zero_()  # an adapter that lacks this layer adds nothing to it
        at = 0
        for weight, layers in parts:
            if (part := layers.get(path)) is not None:
                m.lora_A[at : at + part.r] = part.lora_A
                m.lora_B[:, at : at + part.r] = weight * part.lora_B
            at += next(iter(layers.values())).r
    switch(model, None)
    model.lora_adapters = {**_held(model), name: new}
    return switch(model, name)


def forget(model, name):
    """Drop a held adapter; an active one is taken off first. Returns the model. Raises
    ValueError for an unknown name."""
    _layers(model, name)
    if active(model) == name:
        switch(model, None)
    model.lora_adapters = {k: v for k, v in _held(model).items() if k != name}
    return model


def _held(model):
    """{name: {path: LoRALinear}}: a plain attribute, so torch sees only the active."""
    return getattr(model, "lora_adapters", {})


def _layers(model, name):
    held = _held(model)
    if not isinstance(name, str) or name not in held:
        raise ValueError(f"no adapter is named {name!r}; there are: {[*held]}")
    return held[name]


def _check_new(model, name):
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"an adapter needs a name, not {name!r}")
    if name in _held(model):
        raise ValueError(f"there is an adapter {name!r} already")
