r"""PiSSA, principal singular values and vectors: Meng et al. 2024, arXiv 2404.02948.

A and B start as the r strongest directions of W, the base keeps the rest (section 3):

$$ W = U S V^\top, \quad A = \sqrt{S_r}\, V_r^\top, \quad B = U_r \sqrt{S_r}, \quad
W^\mathrm{res} = W - BA, \qquad y = W^\mathrm{res} x + B A x $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W^\mathrm{res}$ | (out, in) | `base.weight` | W less its first r directions; frozen |
| $A$, $B$ | (r, in), (out, r) | `lora_A`, `lora_B` | singular vectors, scaled |

The paper writes x W and A B; its alpha is r: no scaling. A 16-bit residual is rounded.
A and B fit it alone; `to_lora` makes a LoRA of rank 2r for the original base. peft also
has a faster, inexact SVD. Not here: dropout, packed bases (QPiSSA).
"""

import torch
from torch import nn


class PiSSALinear(nn.Module):
    """Holds `base`, whose weight is the residual, and adds $BAx$ to what it returns."""

    def __init__(self, base, r):
        super().__init__()
        self.base, self.r, w = base, r, base.weight.detach()
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        w = w.T if type(base).__name__ == "Conv1D" else w  # (out, in)
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        root = s[:r].sqrt()
        self.lora_A = nn.Parameter((root[:, None] * vh[:r]).contiguous())  # (r, in)
        self.lora_B = nn.Parameter((u[:, :r] * root).contiguous())  # (out, r)
        self.start = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    weight = property(lambda self: self.base.weight)  # T5 asks a layer for its dtype

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        return (y + x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T).to(y.dtype)


def add(model, targets, r=8):
    """Freeze `model`, split its target layers' weights in place, and return it.
    targets: names of linear layers, each a full path or a dotted suffix ("q_proj"), or
    "all-linear", all but the output head. r: how many directions train. ValueError, the
    model unchanged: r out of range, a target without a match or packed, PiSSA twice."""
    if type(r) is not int or r < 1:
        raise ValueError(f"the rank r must be a whole number of at least 1, not {r!r}")
    if any(isinstance(m, PiSSALinear) for m in model.modules()):
        raise ValueError("the model carries PiSSA already: merge it first")
    chosen = _select(model, targets)
    weights = [m.weight for m in chosen]
    if any(hasattr(w, "quant_state") or not w.is_floating_point() for w in weights):
        raise ValueError("PiSSA cannot split a packed (4- or 8-bit) weight")
    if r > (most := min(min(_shape(m)) for m in chosen)):
        raise ValueError(f"the rank r is {r}, but a target's weight has only {most}")
    wrappers = {m: PiSSALinear(m, r).train(m.training) for m in chosen}
    for m, new in wrappers.items():
        _shift(m, -new.lora_B @ new.lora_A)
    _replace(model.requires_grad_(False), wrappers)
    return model


def state_dict(model, keep_vars=False):
    """{name: tensor} of all that PiSSA trains: `path.lora_A` (r, in), `path.lora_B`
    (out, r); keep_vars gives parameters. ValueError without PiSSA."""
    layers, names = _layers(model), ("lora_A", "lora_B")
    own = {f"{p}.{n}": getattr(m, n) for p, m in layers for n in names}
    return own if keep_vars else {n: t.detach() for n, t in own.items()}


def load_state_dict(model, tensors):
    """Copy {name: tensor}, as `state_dict` gives it, into the model's PiSSA. Raises
    ValueError, nothing copied, for a missing or unexpected name or a wrong shape."""
    own = state_dict(model)
    for name in sorted(own.keys() | tensors.keys()):
        got, want = (str(getattr(d.get(name), "shape", None)) for d in (tensors, own))
        if got != want or name not in own:
            raise ValueError(f"{name}: its shape is {got} here, {want} in the model")
    for name, t in own.items():
        t.copy_(tensors[name])


def to_lora(model):
    """B A - B0 A0 as one product, {name: tensor} of a LoRA on the original base, for
    `lora.add(original, targets, r=2*r, alpha=2*r)`: `path.lora_A` (2r, in) is [A; A0],
    `path.lora_B` (out, 2r) is [B, -B0]. ValueError without PiSSA."""
    own = {}
    for p, m in _layers(model):
        own[f"{p}.lora_A"] = torch.cat([m.lora_A.detach(), m.start[0].to(m.lora_A)])
        own[f"{p}.lora_B"] = torch.cat([m.lora_B.detach(), -m.start[1].to(m.lora_B)], 1)
    return own


@torch.no_grad()
def merge(model):
    """Make each base weight the residual + B A, put the plain layers back, return the
    model, frozen. ValueError, the model unchanged, without PiSSA."""
    for _, m in (layers := _layers(model)):
        _shift(m.base, m.lora_B @ m.lora_A)
    _replace(model, {m: m.base for _, m in layers})
    return model.requires_grad_(False)


def _layers(model):
    if found := [(p, m) for p, m in model.named_modules() if type(m) is PiSSALinear]:
        return found
    raise ValueError("the model carries no PiSSA: call pissa.add first")


def _shift(base, change):
    change = change.T if type(base).__name__ == "Conv1D" else change
    base.weight = nn.Parameter((base.weight + change).to(base.weight.dtype), False)


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
