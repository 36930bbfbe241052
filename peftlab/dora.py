r"""DoRA, weight-decomposed low-rank adaptation: Liu et al. 2024, arXiv 2402.09353.

Each output's weights are a length times a direction; LoRA turns the direction (eq. 5):

$$ y = \frac{m}{\lVert W + s\,BA \rVert} \odot (W x + s\,B A x) + \mathrm{bias},
\qquad s = \alpha / r $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W$ | (out, in) | `base.weight` | pretrained, frozen |
| $A$, $B$ | (r, in), (out, r) | `lora_A`, `lora_B` | as LoRA's: random, zero |
| $m$ | (out,) | `dora_m` | $\lVert W \rVert$, so step 0 changes nothing |

The norm is of each row of (out, in), one an output; the paper's W lies the other way,
so it says columns. It is a constant to the gradient (section 4.3). We build W + sBA to
measure it, an (out, in) matrix; expanding the square would avoid that, but where sBA
nearly cancels a row, only rounding is left. Not here: dropout, rsLoRA, embeddings, a
packed (4- or 8-bit) base.
"""

import math

import torch
from torch import nn


class DoRALinear(nn.Module):
    r"""Holds a frozen linear `base`, turns its weight by $sBA$ and scales it by $m$."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.r, self.alpha, self.scaling = base, r, alpha, alpha / r
        self.conv = type(base).__name__ == "Conv1D"  # it keeps W as (in, out)
        (n_out, n_in), w = _shape(base), base.weight
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(r, n_in, dtype=dtype, device=w.device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, dtype=dtype, device=w.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dora_m = nn.Parameter(self.norm())  # (out,)

    weight = property(lambda self: self.base.weight)  # T5 asks a layer for its dtype
    matrix = property(lambda self: self.weight.T if self.conv else self.weight)

    @torch.no_grad()  # section 4.3: a constant to the gradient
    def norm(self):
        r"""(out,): each row's length in $W + sBA$, a tiny one for a row of zeros."""
        w = self.matrix + self.scaling * (self.lora_B @ self.lora_A)  # (out, in)
        return torch.linalg.vector_norm(w, dim=1).clamp_min(torch.finfo(w.dtype).tiny)

    def forward(self, x):  # (..., in) -> (..., out)
        y, bias = nn.functional.linear(x, self.matrix), self.base.bias
        low = x.to(self.lora_A.dtype) @ self.lora_A.T  # (..., r)
        z = (y + (low * self.scaling) @ self.lora_B.T) * (self.dora_m / self.norm())
        return (z if bias is None else z + bias).to(y.dtype)


def add(model, targets, r=8, alpha=16):
    """Freeze `model`, turn its target layers into DoRA in place, and return it.
    targets: names of linear layers, each a full path or a dotted suffix ("q_proj"), or
    "all-linear", all but the output head. r: rank. alpha: BA is scaled by alpha/r.
    Raises ValueError, the model unchanged, for a value out of range, a target without a
    match, a packed weight, and DoRA twice."""
    if type(r) is not int or r < 1:
        raise ValueError(f"the rank r must be a whole number of at least 1, not {r!r}")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, not {alpha!r}")
    if any(isinstance(m, DoRALinear) for m in model.modules()):
        raise ValueError("the model carries DoRA already: merge it first")
    chosen = _select(model, targets)
    weights = [m.weight for m in chosen]
    if any(hasattr(w, "quant_state") or not w.is_floating_point() for w in weights):
        raise ValueError("DoRA cannot take the norm of a packed (4- or 8-bit) weight")
    wrappers = {m: DoRALinear(m, r, alpha).train(m.training) for m in chosen}
    _replace(model.requires_grad_(False), wrappers)
    return model


def state_dict(model, keep_vars=False):
    """{name: tensor} of all that DoRA trains: `path.lora_A` (r, in), `path.lora_B`
    (out, r), `path.dora_m` (out,); keep_vars gives parameters. ValueError without."""
    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, DoRALinear)]
    if not layers:
        raise ValueError("the model carries no DoRA: call dora.add first")
    names = ("lora_A", "lora_B", "dora_m")
    own = {f"{p}.{n}": getattr(m, n) for p, m in layers for n in names}
    return own if keep_vars else {n: t.detach() for n, t in own.items()}


def load_state_dict(model, tensors):
    """Copy {name: tensor}, as `state_dict` gives it, into the model's DoRA. Raises
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
    """Make each base weight m (W + s B A) / |W + s B A|, put the plain layers back,
    return the model, frozen. ValueError, the model unchanged, without DoRA."""
    state_dict(model)  # raises where there is no DoRA
    layers = {m: m.base for m in model.modules() if isinstance(m, DoRALinear)}
    for m, base in layers.items():
        w = m.matrix + m.scaling * (m.lora_B @ m.lora_A)  # (out, in)
        w = (m.dora_m / m.norm())[:, None] * w
        w = (w.T if m.conv else w).to(base.weight.dtype).contiguous()
        base.weight = nn.Parameter(w, False)
    _replace(model, layers)
    return model.requires_grad_(False)


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
