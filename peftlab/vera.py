r"""VeRA, vector-based random matrix adaptation: Kopiczko et al. 2023, arXiv 2310.11454.

All layers share two frozen random matrices; each trains only two vectors (3.1, eq. 2):

$$ y = W x + \Lambda_b B \Lambda_d A x $$

| symbol | shape | in code | start |
|---|---|---|---|
| $W$ | (out, in) | `base.weight` | pretrained, frozen |
| $A$ | (r, widest in) | `vera_A` | random from a seed, frozen, shared |
| $B$ | (widest out, r) | `vera_B` | random from the same seed, frozen, shared |
| $d$, diagonal of $\Lambda_d$ | (r,) | `vera_d` | 0.1 |
| $b$, diagonal of $\Lambda_b$ | (out,) | `vera_b` | zero, so step 0 changes nothing |

A narrower layer takes A's first columns and B's first rows. The seed gives both again,
to the bit, here and in peft. Not here: dropout, other draws of A and B.
"""

import math

import torch
from torch import nn


class VeRALinear(nn.Module):
    r"""Holds a frozen linear `base` and adds $\Lambda_b B \Lambda_d A x$ (eq. 2)."""

    def __init__(self, base, A, B, seed):
        super().__init__()
        self.base, self.seed, self.shape = base, seed, _shape(base)
        self.vera_A, self.vera_B = A, B  # not buffers: .to(device) copies those apart
        self.vera_d = nn.Parameter(torch.full_like(A[:, 0], 0.1))  # (r,)
        self.vera_b = nn.Parameter(A.new_zeros(self.shape[0]))  # (out,)

    weight = property(lambda self: self.base.weight)  # T5 asks a layer for its dtype

    def slices(self):  # this layer's part of the shared ones: A (r, in), B (out, r)
        return self.vera_A[:, : self.shape[1]], self.vera_B[: self.shape[0]]

    def forward(self, x):  # (..., in) -> (..., out)
        y, (A, B) = self.base(x), self.slices()
        low = x.to(A.dtype) @ A.T * self.vera_d  # (..., r)
        return torch.addcmul(y, low @ B.T, self.vera_b).to(y.dtype)


def add(model, targets, r=256, seed=0):
    """Freeze `model`, put VeRA beside its target layers in place, and return it.
    targets: names of linear layers, each a full path or a dotted suffix ("q_proj"), or
    "all-linear", all but the output head. r: rank of the shared matrices. seed: where
    they come from. ValueError, nothing changed: a bad value, no match, VeRA twice."""
    if type(r) is not int or r < 1:
        raise ValueError(f"the rank r must be a whole number of at least 1, not {r!r}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number of at least 0, not {seed!r}")
    if any(isinstance(m, VeRALinear) for m in model.modules()):
        raise ValueError("the model carries VeRA already: merge it first")
    chosen = _select(model, targets)
    n_out, n_in = (max(sizes) for sizes in zip(*map(_shape, chosen), strict=True))
    w = chosen[0].weight
    like = dict(device=w.device, dtype=torch.promote_types(w.dtype, torch.float32))
    A, B = (nn.Parameter(t.to(**like), False) for t in shared(n_in, n_out, r, seed))
    wrappers = {m: VeRALinear(m, A, B, seed).train(m.training) for m in chosen}
    _replace(model.requires_grad_(False), wrappers)
    return model


def shared(n_in, n_out, r, seed):
    """A (r, n_in) and B (n_out, r) of a seed, float32, Kaiming's uniform, A first."""
    dice, pair = torch.Generator().manual_seed(seed), []
    for shape in ((r, n_in), (n_out, r)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # peft's order
        t = torch.empty(shape, dtype=torch.float32, device="cpu")  # not the default
        pair.append(t.uniform_(-bound, bound, generator=dice))
    return pair


def state_dict(model, keep_vars=False):
    """{name: tensor} of all that VeRA trains: `path.vera_d` (r,), `path.vera_b` (out,);
    A and B come from the seed. keep_vars gives parameters. ValueError without VeRA."""
    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, VeRALinear)]
    if not layers:
        raise ValueError("the model carries no VeRA: call vera.add first")
    own = {f"{p}.{n}": getattr(m, n) for p, m in layers for n in ("vera_d", "vera_b")}
    return own if keep_vars else {n: t.detach() for n, t in own.items()}


def load_state_dict(model, tensors):
    """Copy {name: tensor}, as `state_dict` gives it, into the model's VeRA. Raises
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
    """Make each base weight W + diag(b) B diag(d) A, put the plain layers back, return
    the model, frozen. ValueError, unchanged, without VeRA or on a packed weight."""
    state_dict(model)  # raises where there is no VeRA
    layers = {m: m.base for m in model.modules() if isinstance(m, VeRALinear)}
    for base in layers.values():
        if hasattr(base.weight, "quant_state") or not base.weight.is_floating_point():
            raise ValueError("VeRA cannot be merged into a packed (4- or 8-bit) weight")
    for m, base in layers.items():
        A, B = m.slices()
        delta = (m.vera_b[:, None] * B * m.vera_d) @ A  # (out, in)
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
