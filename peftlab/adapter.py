r"""Bottleneck adapters: Houlsby et al. 2019, arXiv 1902.00751, section 2.1.

A sub-layer (attention, feed-forward) makes h from its input x, and x + h goes on, on
BERT through a LayerNorm, LN. An adapter is a small network that reads u and adds to h:

$$ h \leftarrow h + s\,(W_\uparrow f(W_\downarrow u + b_\downarrow) + b_\uparrow) $$

| placement | u | after | paper |
|---|---|---|---|
| houlsby | $h$ | attention, feed-forward | 1902.00751, section 2.1 |
| pfeiffer | LN(h + x) | feed-forward | AdapterFusion, 2005.00247, Figure 5 |
| parallel | $x$ | feed-forward | He et al. 2022, 2110.04366, Table 1 |

| symbol | shape | in code | start |
|---|---|---|---|
| $W_\downarrow, b_\downarrow$ | (m, d), (m,) | `down` | within $\pm 1/\sqrt d$; zero |
| $W_\uparrow, b_\uparrow$ | (d, m), (d,) | `up` | zero, so step 0 changes nothing |

2md + d + m numbers each, no LayerNorm inside; s is 4 for parallel, else 1. Placed as by
the `adapters` library, with Pfeiffer's oddity: LN runs twice, and h is kept, not the
LN(h + x) that was read. T5 and Llama have no LN after: u is h + x, and parallel's x is
not normalised. T5's cross-attention gets none. Houlsby et al. start both W at std 0.01,
the library (but for parallel) at 0.02. The library has f = silu for Houlsby, and of two
parallel ones stacked it keeps the last, where we add both. Left out: the norms that
Houlsby et al. train too; `merge`, as a nonlinear f fits into no weight.
"""

import re

import torch
from torch import nn

from . import surgery

READS = {  # u, from the sub-layer's output h, its input x and the norm that follows
    "houlsby": lambda h, x, norm: h,
    "pfeiffer": lambda h, x, norm: norm(h + x),
    "parallel": lambda h, x, norm: x,
}


class Bottleneck(nn.Module):
    """One adapter in one place: down to m numbers, f, up again, added to h."""

    def __init__(self, entry, placement, m, f, scale):
        super().__init__()
        self.placement, self.scale, self.f = placement, scale, getattr(nn.functional, f)
        w = getattr(entry, "LayerNorm", entry).weight  # (d,)
        like = dict(device=w.device, dtype=torch.promote_types(w.dtype, torch.float32))
        self.down, self.up = nn.Linear(len(w), m, **like), nn.Linear(m, len(w), **like)
        for t in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(t)

    def forward(self, h, x, norm):  # (..., d), (..., d) -> (..., d)
        u = READS[self.placement](h, x, norm).to(self.down.weight.dtype)
        return (h + self.scale * self.up(self.f(self.down(u)))).to(h.dtype)


class Site(nn.ModuleDict):
    """A sub-layer's adapters, run by hooks: the base keeps its modules' names."""

    _active = ()

    def enter(self, module, args):  # x is the last: BERT's (h, x), a norm's (x,)
        self._seen = args[-1], getattr(module, "LayerNorm", lambda t: t)

    def leave(self, module, args, out):  # Llama's attention returns (h, its weights)
        (x, norm), self._seen = self._seen, None  # keep no activation alive
        h, *rest = out if isinstance(out, tuple) else (out,)
        for name in (n for n in self._active if n in self):
            h = self._modules[name](h, x, norm)
        return (h, *rest) if isinstance(out, tuple) else h


def add(model, placement, bottleneck, name="default", activation="relu", scale=None):
    """Freeze `model`, earlier adapters too, put a new one in place, return the model: a
    BERT, (XLM-)RoBERTa, (m)T5, Llama, Mistral, Qwen2 or Qwen3. placement: as above.
    bottleneck: m. name: a second adapter, by another name, works after those that are
    active, on what they return. activation: f, "relu", "gelu" or "silu". scale: s.
    ValueError, nothing changed: another model, a value out of range, a name taken."""
    for value, choices in (placement, [*READS]), (activation, ["relu", "gelu", "silu"]):
        if value not in choices:
            raise ValueError(f"placement, activation: one of {choices}, not {value!r}")
    if type(bottleneck) is not int or bottleneck < 1:
        raise ValueError(f"bottleneck: a whole number of 1 or more, not {bottleneck!r}")
    scale = (4.0 if placement == "parallel" else 1.0) if scale is None else scale
    if type(scale) not in (int, float) or not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, not {scale!r}")
    old = {n: m._active for m in model.modules() if isinstance(m, Site) for n in m}
    if not isinstance(name, str) or not name or "." in name or name in old:
        raise ValueError(f"name: text without a dot, not one of {[*old]}, not {name!r}")
    places = [p for p in _places(model) if p[-1] or placement == "houlsby"]
    if not places:
        raise ValueError(f"adapters fit BERT, RoBERTa, T5 and Llama, not {type(model)}")
    new = [Bottleneck(p[1], placement, bottleneck, activation, scale) for p in places]
    model.requires_grad_(False)
    for (owner, entry, exit, _), one in zip(places, new, strict=True):
        if not hasattr(owner, "adapters"):
            owner.adapters = Site()
            entry.register_forward_pre_hook(owner.adapters.enter)
            exit.register_forward_hook(owner.adapters.leave)
        owner.adapters._modules[name] = one  # not [name]: that refuses "values"
    return activate(model, [*next(iter(old.values()), ()), name])


def activate(model, names):
    """Have the adapters `names`, a list, work in this order and no other; [] gives back
    the base. Returns the model. ValueError, nothing changed, for an unknown name."""
    sites = [m for m in model.modules() if isinstance(m, Site)]
    there = sorted({n for site in sites for n in site})
    fits = isinstance(names, list | tuple) and all(n in there for n in names)
    if not there or not fits or len({*names}) < len(names):
        raise ValueError(f"names: some of {there}, each once, not {names!r}")
    for site in sites:
        site._active = tuple(names)
    return model


def state_dict(model, name=None, keep_vars=False):
    """{path: tensor} of the adapter `name`, or of all: down.weight (m, d), down.bias
    (m,), up.weight (d, m), up.bias (d,). keep_vars: parameters. ValueError without."""
    found = {}
    for path, site in model.named_modules():
        for k, p in site.named_parameters(path) if isinstance(site, Site) else ():
            if name in (None, k.split(".")[-3]):  # path.adapters.NAME.down.weight
                found[k] = p if keep_vars else p.detach()
    if not found:
        raise ValueError(f"the model carries no adapter{f' {name!r}' if name else ''}")
    return found


def load_state_dict(model, tensors, name=None):
    """Copy {path: tensor}, as `state_dict` gives it, into the adapter `name`, or into
    all. ValueError, nothing copied, for a missing or unexpected path, a wrong shape."""
    surgery.load(state_dict(model, name), tensors)


def _places(model):
    """(owner of the Site, what x goes into, what h comes out of, is it feed-forward)"""
    for m in model.modules():
        kind = type(m).__name__
        if re.fullmatch("(Bert|.*Roberta)(Self)?Output|M?T5Layer(Self.*|FF)", kind):
            yield m, getattr(m, "layer_norm", m), m.dropout, "Self" not in kind
        elif re.fullmatch("(Llama|Mistral|Qwen2|Qwen3)DecoderLayer", kind):
            yield m.self_attn, m.input_layernorm, m.self_attn, False
            yield m.mlp, m.post_attention_layernorm, m.mlp, True
