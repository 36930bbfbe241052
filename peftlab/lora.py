r"""LoRA, low-rank adaptation: Hu et al. 2021, arXiv 2106.09685, section 4.1, eq. 3.

A frozen linear layer gets a trainable bypass of rank r (rsLoRA: arXiv 2312.03732):

$$ y = W x + s\,B A x, \qquad s = \alpha / r, \text{ with rsLoRA } \alpha / \sqrt r $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W$ | (out, in) | `base.weight` | pretrained, frozen |
| $A$ | (r, in) | `lora_A` | random, uniform in $\pm 1/\sqrt{\mathrm{in}}$ |
| $B$ | (out, r) | `lora_B` | zero, so step 0 changes nothing |

A and B are float32 over a 16-bit or packed base. Only `merge` changes a weight, never
`train` or `eval`. The paper draws A from a Gaussian; we, as peft, by Kaiming's rule.
Not here: embeddings, convolutions, `nn.MultiheadAttention` and the fast path of
`nn.TransformerEncoderLayer`: both read a layer's weight and never call it.
"""

import math

import torch
from torch import nn


class LoRALinear(nn.Module):
    r"""Holds a frozen linear `base` and adds $s\,BAx$ to what it returns (eq. 3)."""

    def __init__(self, base, r, alpha, dropout, bias, rslora):
        super().__init__()
        self.base, self.r, self.alpha, self.rslora = base, r, alpha, rslora
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.bias_mode, (n_out, n_in), w = bias, _shape(base), base.weight
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(r, n_in, dtype=dtype, device=w.device))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, dtype=dtype, device=w.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    weight = property(lambda self: self.base.weight)  # T5 asks a layer for its dtype

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        low = self.dropout(x.to(self.lora_A.dtype)) @ self.lora_A.T  # (..., r)
        return (y + (low * self.scaling) @ self.lora_B.T).to(y.dtype)


def add(model, targets, r=8, alpha=16, dropout=0.0, bias="none", rslora=False):
    """Freeze `model`, put LoRA beside its target layers in place, and return it.
    targets: names of linear layers, each a full path or a dotted suffix ("q_proj"), or
    "all-linear", all but the output head. r: rank. alpha: the change is scaled by
    alpha/r, with rslora by alpha/sqrt(r). dropout: on the bypass's input. bias: which
    train too: "none", "all" or "lora_only" (the targets'). Raises ValueError, the model
    unchanged, for a value out of range, a target without a match, and LoRA twice."""
    if type(r) is not int or r < 1:
        raise ValueError(f"the rank r must be a whole number of at least 1, not {r!r}")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number, not {alpha!r}")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout!r}")
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", not {bias!r}')
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model carries LoRA already: merge it first")
    settings, chosen = (r, alpha, dropout, bias, rslora), _select(model, targets)
    wrappers = {m: LoRALinear(m, *settings).train(m.training) for m in chosen}
    model.requires_grad_(False)
    _replace(model, wrappers)
    for p in state_dict(model, keep_vars=True).values():
        p.requires_grad_(True)
    return model


def state_dict(model, keep_vars=False):
    """{name: tensor} of all that LoRA trains: `path.lora_A` (r, in), `path.lora_B`
    (out, r), the asked biases; keep_vars gives parameters. ValueError without LoRA."""
    layers = {p: m for p, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("the model carries no LoRA: call lora.add first")
    mode, found = next(iter(layers.values())).bias_mode, {}
    for name, p in model.named_parameters():
        owner, _, leaf = (plain := name.replace(".base.bias", ".bias")).rpartition(".")
        asked = mode == "all" or mode == "lora_only" and owner in layers
        if leaf in ("lora_A", "lora_B") or asked and leaf.endswith("bias"):
            found[plain if owner in layers else name] = p if keep_vars else p.detach()
    return found


def load_state_dict(model, tensors):
    """Copy {name: tensor}, as `state_dict` gives it, into the model's LoRA. Raises
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
    """Make each base weight W + s B A, put the plain layers back, return the model,
    frozen. ValueError, the model unchanged, without LoRA or on a packed weight."""
    state_dict(model)  # raises where there is no LoRA
    layers = {m: m.base for m in model.modules() if isinstance(m, LoRALinear)}
    for base in layers.values():
        if hasattr(base.weight, "quant_state") or not base.weight.is_floating_point():
            raise ValueError("LoRA cannot be merged into a packed (4- or 8-bit) weight")
    for m, base in layers.items():
        delta = m.scaling * (m.lora_B @ m.lora_A)  # (out, in)
        delta = delta.T if type(base).__name__ == "Conv1D" else delta
        base.weight = nn.Parameter((base.weight + delta).to(base.weight.dtype), False)
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
