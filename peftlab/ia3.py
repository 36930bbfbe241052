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


class IA3Linear(nn.Module):
    """Holds a frozen linear `base` and rescales what it returns, or what goes in."""

    def __init__(self, base, feedforward):
        super().__init__()
        self.base, self.feedforward = base, feedforward
        (n_out, n_in), w = _shape(base), base.weight
        ones = torch.ones((1, n_in) if feedforward else (n_out, 1), device=w.device)
        self.ia3_l = nn.Parameter(ones.to(torch.promote_types(w.dtype, ones.dtype)))

    weight = property(lambda self: self.base.weight)  # T5 asks a layer for its dtype

    def forward(self, x):  # (..., in) -> (..., out)
        scale = self.ia3_l.flatten()
        y = self.base((x * scale).to(x.dtype) if self.feedforward else x)
        return y if self.feedforward else (y * scale).to(y.dtype)


def add(model, targets, feedforward=()):
    """Freeze `model`, put a vector on its target layers in place, and return it.
    targets: names of linear layers, each a full path or a dotted suffix ("k_proj"), or
    "all-linear". feedforward: those rescaled on their input side ("down_proj"), also in
    targets (peft) or not. ValueError, unchanged, for no match and for IA3 twice."""
    if any(isinstance(m, IA3Linear) for m in model.modules()):
        raise ValueError("the model carries IA3 already: merge it first")
    inputs = _select(model, feedforward) if feedforward else []
    chosen = [*inputs, *(_select(model, targets) if targets or not inputs else [])]
    wrappers = {m: IA3Linear(m, m in inputs).train(m.training) for m in chosen}
    _replace(model.requires_grad_(False), wrappers)
    return model


def state_dict(model, keep_vars=False):
    """{name: tensor} of all that IA3 trains: `path.ia3_l`, (out, 1) on the output side,
    (1, in) on the input side; keep_vars gives parameters. ValueError without IA3."""
    own = {n: p for n, p in model.named_parameters() if n.endswith(".ia3_l")}
    if not own:
        raise ValueError("the model carries no IA3: call ia3.add first")
    return own if keep_vars else {n: t.detach() for n, t in own.items()}


def load_state_dict(model, tensors):
    """Copy {name: tensor}, as `state_dict` gives it, into the model's IA3. Raises
    ValueError, nothing copied, for a missing or unexpected name or a wrong shape."""
    own = state_dict(model)
    for name in sorted(own.keys() | tensors.keys()):
        got, want = (str(getattr(d.get(name), "shape", None)) for d in (tensors, own))
        if got != want or name not in own:
            raise ValueError(f"{name}: its shape is {got} here, {want} in the model")
    for name, t in own.items():
        t.copy_(tensors[name])


@torch.no_grad()
def merge(model):
    """Make each weight l * W (an output's bias l * bias), put the plain layers back,
    return the model, frozen. ValueError, unchanged, without IA3 or on a packed one."""
    state_dict(model)  # raises where there is no IA3
    layers = {m: m.base for m in model.modules() if isinstance(m, IA3Linear)}
    for base in layers.values():
        if hasattr(base.weight, "quant_state") or not base.weight.is_floating_point():
            raise ValueError("IA3 cannot be merged into a packed (4- or 8-bit) weight")
    for m, base in layers.items():
        _rescale(base, m.ia3_l, m.feedforward)
    _replace(model, layers)
    return model.requires_grad_(False)


@torch.no_grad()
def unmerge(model, tensors):
    """Undo the `merge` of `tensors`, a `state_dict`, up to rounding; returns the model.
    ValueError, nothing changed: no tensors, one unfit or with a zero, IA3 unmerged."""
    if any(isinstance(m, IA3Linear) for m in model.modules()):
        raise ValueError("the model carries IA3 already: merge it first")
    own = {n.removesuffix(".ia3_l"): v for n, v in tensors.items()}
    _select(model, [*own])  # raises for what is no linear
    old = {m: own[p] for p, m in model.named_modules() if torch.is_tensor(own.get(p))}
    new = {m: IA3Linear(m, v.shape != (_shape(m)[0], 1)) for m, v in old.items()}
    fit = [new[m].ia3_l.shape == v.shape and (v / v == 1).all() for m, v in old.items()]
    if not fit or not all(fit) or len(fit) != len(tensors):
        raise ValueError("unmerge needs a vector without zeros for each merged layer")
    for m, v in old.items():
        new[m].train(m.training).ia3_l.copy_(v)
        _rescale(m, 1 / new[m].ia3_l, new[m].feedforward)
    _replace(model.requires_grad_(False), new)
    return model


def _rescale(base, scale, feedforward):
    turned = scale.T if type(base).__name__ == "Conv1D" else scale  # it keeps W.T
    base.weight = nn.Parameter((base.weight * turned).to(base.weight.dtype), False)
    if (b := base.bias) is not None and not feedforward:
        base.bias = nn.Parameter((b * scale.flatten()).to(b.dtype), False)


def _shape(m):
    """(out, in) of a linear, else None; GPT-2's Conv1D has its weight as (in, out)."""
    conv = type(m).__name__ == "Conv1D"
    sides = tuple(getattr(m, f"{side}_features", None) for side in ("out", "in"))
    return m.weight.shape[::-1] if conv else sides if all(sides) else None


def _select(model, targets):
    """The linears that `targets` name; ValueError unless each target matches one."""
    paths = {f".{path}": m for path, m in model.named_modules() if path}
    linears = {p: m for p, m in paths.items() if _shape(m)}
    if targets == "all-linear":
        sizes = {(n, p.dim()): p.numel() for n, p in model.named_parameters()}
        if fused := sum(k for (n, d), k in sizes.items() if "expert" in n and d == 3):
            share = f"{fused / sum(sizes.values()):.0%} of the weights"
            raise ValueError(f"all-linear misses {share}, fused in 3-D expert tensors")
        head = getattr(model, "get_output_embeddings", lambda: None)()
        inner = {p: m for p, m in linears.items() if m is not head}
        heads = {"classifier", "score", "qa_outputs"}  # RoBERTa's first has two layers
        linears = {p: m for p, m in inner.items() if not heads & {*p.split(".")}}
        targets = [p[1:] for p in linears]
    if not isinstance(targets, list | tuple | set) or not targets:
        raise ValueError(f'targets: a list of names or "all-linear", not {targets!r}')
    if lost := [t for t in targets if not any(p.endswith(f".{t}") for p in linears)]:
        names = ", ".join(sorted({p.rpartition(".")[2] for p in linears}))
        raise ValueError(f"no linear layer is named {lost}; there are: {names}")
    return [m for p, m in linears.items() if any(p.endswith(f".{t}") for t in targets)]


def _replace(model, swaps):
    """Put swaps[old] where the module `old` hangs in the tree, wherever that is."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = swaps.get(child, child)
