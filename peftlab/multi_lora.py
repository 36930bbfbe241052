r"""Many LoRA adapters on one base: hold them by name, switch, combine.

Composes `lora.py`: copy both files, and `surgery.py`, into one package folder. One base
model, many small changes of it, one a customer (LoRA's first advantage in Hu et al.
2021, arXiv 2106.09685, section 1):

$$ y = W x + s\,B_k A_k x \quad\text{with } k \text{ the active name}, \qquad
\sum_k w_k\, s\,B_k A_k = s\,[w_1 B_1, w_2 B_2, \dots]\,[A_1; A_2; \dots] $$

| symbol | shape | in code |
|---|---|---|
| $A_k$, $B_k$ | (r_k, in), (out, r_k) | an adapter, `{path: LoRALinear}` |
| $k$ | a name | `active(model)` |
| $w_k$ | a number | `weights` in `combine` |

The active adapter hangs in the model, so all functions of `lora` and the saving of
files work on it. The others wait beside the model, in `model.lora_adapters`, and
switching puts them in its place. A combination is exact: the ranks are stacked, as in
peft's "cat". peft's "linear" adds the A's and the B's apart, which brings in products
of one's B with another's A. `lora.merge` changes the base that all adapters share:
deepcopy the model first. Not here: several at once in one batch, biases (they belong to
the base).
"""

import torch

from . import lora, surgery


def add(model, name, targets, r=8, alpha=16, dropout=0.0, rslora=False):
    """Put a new LoRA on `model` under a name, make it active, and return the model.

    Args:
        model: any module; one that holds LoRAs already keeps them.
        name: text that no other adapter has.
        targets: as in `lora.add`, like the settings that follow.
        r: the rank.
        alpha: the change is scaled by alpha / r, with `rslora` by alpha / sqrt(r).
        dropout: the share of the bypass's input that is dropped in training.
        rslora: rank-stabilized scaling (arXiv 2312.03732).

    Returns:
        The same model.

    Raises:
        ValueError: for a name that is empty or taken, a LoRA without a name, and what
            `lora.add` refuses. Then the model is unchanged.
    """
    _check_new(model, name)
    before = active(model)
    switch(model, None)

    adapters = _adapters(model)
    _hold(model, {})  # `lora.add` refuses a model that holds LoRAs
    try:
        lora.add(model, targets, r, alpha, dropout, "none", rslora)
    except BaseException:  # an interrupt too
        _hold(model, adapters)
        switch(model, before)
        raise
    _hold(model, adapters)
    return keep(model, name)


def keep(model, name):
    """Hold the LoRA that is on the model now, say from a file, under a name.

    Args:
        model: one that carries LoRA.
        name: text that no other adapter has.

    Returns:
        The same model.

    Raises:
        ValueError: for a name that is empty or taken, and where there is no LoRA, one
            that has a name already, or one that trains biases. Then the model is
            unchanged.
    """
    _check_new(model, name)
    layers = _layers_in(model)
    if not layers or active(model) is not None:
        raise ValueError("the model carries no LoRA that still needs a name")
    if any(layer.bias_mode != "none" for layer in layers.values()):
        raise ValueError('the biases belong to the base: hold a LoRA with bias="none"')
    return _hold(model, {**_adapters(model), name: layers})


def names(model):
    """The names of the adapters that the model holds, a list, in the order of adding.

    Raises:
        ValueError: for what is no plain module.
    """
    return list(_adapters(model))


def active(model):
    """The name of the adapter that is on the model now, or None.

    Raises:
        ValueError: for what is no plain module.
    """
    in_model = set(_layers_in(model).values())
    for name, layers in _adapters(model).items():
        if in_model and in_model <= set(layers.values()):
            return name
    return None


def switch(model, name):
    """Put the named adapter on the model, or with None the base alone.

    Args:
        model: one that holds adapters.
        name: one of `names(model)`, or None.

    Returns:
        The same model.

    Raises:
        ValueError: for an unknown name, a LoRA without a name, another method that came
            meanwhile, and an adapter whose layers have left the model. Then nothing is
            changed.
    """
    layers = {} if name is None else _adapter(model, name)
    in_model = _layers_in(model)
    if in_model and active(model) is None:
        raise ValueError("the model carries a LoRA without a name: keep it under one")
    _check_present(model, layers)

    for layer in layers.values():  # while it waited, the base may have moved to a GPU
        layer.to(layer.base.weight.device).train(model.training)
    surgery.swap(model, {layer: layer.base for layer in in_model.values()})
    surgery.swap(model, {layer.base: layer for layer in layers.values()})
    return model


@torch.no_grad()
def combine(model, weights, name):
    """Make a new adapter, the weighted sum of others, active under a name.

    Its rank is the sum of theirs. A single one keeps its alpha and rsLoRA; several get
    the alpha that gives their scaling without rsLoRA.

    Args:
        model: one that holds adapters.
        weights: {name: number}, which may be negative.
        name: text that no other adapter has.

    Returns:
        The same model.

    Raises:
        ValueError: for no weights, one that is no finite number or makes B infinite, an
            unknown name, a new name that is taken, and scalings that differ: the
            stacked product has one scaling, and to fold another into B would hide it
            from the file. Then the model is unchanged.
    """
    _check_new(model, name)
    if not isinstance(weights, dict) or not all(map(_is_number, weights.values())):
        weights = {}
    if not weights:
        raise ValueError("weights must be {name: finite number}, at least one")
    parts = {k: _adapter(model, k) for k in weights}
    for layers in parts.values():
        _check_present(model, layers)

    every = {path: m for layers in parts.values() for path, m in layers.items()}
    alpha, rslora = _scaling(parts)
    r = sum(_rank(layers) for layers in parts.values())
    stacked = {}
    for path, like in every.items():
        layer = lora.LoRALinear(like.base, r, alpha, 0.0, "none", rslora)
        _stack(layer, path, weights, parts)
        for t in (layer.lora_A, layer.lora_B):
            surgery.check_fits(f"the combined {path}", t, t.dtype)
        stacked[path] = layer

    switch(model, None)
    _hold(model, {**_adapters(model), name: stacked})
    return switch(model, name)


def forget(model, name):
    """Drop an adapter; an active one is taken off first.

    Args:
        model: one that holds adapters.
        name: one of `names(model)`.

    Returns:
        The same model.

    Raises:
        ValueError: for an unknown name.
    """
    _adapter(model, name)
    if active(model) == name:
        switch(model, None)
    rest = {k: layers for k, layers in _adapters(model).items() if k != name}
    return _hold(model, rest)


# What the model holds


def _adapters(model):
    """{name: {path: LoRALinear}}: a plain attribute, so torch sees only the active."""
    model = surgery.uncompiled(model)
    surgery.refuse_containers(model)
    return getattr(model, "lora_adapters", {})


def _hold(model, adapters):
    """Let the model hold these adapters; without any it carries no trace."""
    plain = surgery.uncompiled(model)
    vars(plain).pop("lora_adapters", None)
    if adapters:
        plain.lora_adapters = adapters
    return model


def _adapter(model, name):
    adapters = _adapters(model)
    if not isinstance(name, str) or name not in adapters:
        raise ValueError(
            f"no adapter is named {name!r:.60}; there are: {list(adapters)}"
        )
    return adapters[name]


def _layers_in(model):
    """{path: LoRALinear} of the LoRA that is on the model now."""
    model = surgery.uncompiled(model)
    surgery.refuse_containers(model)
    return {p: m for p, m in model.named_modules() if isinstance(m, lora.LoRALinear)}


# Combining


def _scaling(parts):
    """alpha and rslora of a combination. ValueError if the parts' scalings differ."""
    layers = [layer for part in parts.values() for layer in part.values()]
    first = layers[0]
    if len(parts) == 1:
        return first.alpha, first.rslora

    scalings = {layer.scaling for layer in layers}
    if max(scalings) > min(scalings) * (1 + 1e-9):
        raise ValueError(f"adapters of different scalings do not add up: {scalings}")
    return first.scaling * sum(map(_rank, parts.values())), False


def _rank(layers):
    return next(iter(layers.values())).r


def _stack(layer, path, weights, parts):
    """Fill A (r, in) and B (out, r) with those of the parts, one below the other."""
    layer.lora_A.zero_()  # an adapter that lacks this layer adds nothing to it
    start = 0
    for name, layers in parts.items():
        stop = start + _rank(layers)
        if path in layers:
            weight = float(weights[name])  # torch takes no whole number past 64 bits
            layer.lora_A[start:stop] = layers[path].lora_A
            layer.lora_B[:, start:stop] = weight * layers[path].lora_B
        start = stop


# What cannot be


def _check_new(model, name):
    adapters = _adapters(model)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"an adapter needs a name, not {name!r:.60}")
    if name in adapters:
        raise ValueError(f"there is an adapter {name!r:.60} already")


def _check_present(model, layers):
    """ValueError unless an adapter's layers are in the model, and plain ones."""
    modules = set(model.modules())
    lost = [path for path, m in layers.items() if m.base not in modules]
    if lost:
        raise ValueError(f"layers that the adapter is on have left the model: {lost}")

    kinds = {m.peft_method for m in modules if hasattr(type(m), "peft_method")}
    if layers and kinds - {"LoRA"}:
        others = " and ".join(sorted(kinds - {"LoRA"}))
        raise ValueError(f"the model carries {others} now: merge or remove it first")


def _is_number(value):
    return type(value) in (int, float) and -1e300 < value < 1e300
