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
the `adapters` library, with Pfeiffer's oddity: LN runs twice, and what goes on is h,
not the LN(h + x) that was read. T5 and Llama have no LN after: u is h + x, and
parallel's x is not normalised. T5's cross-attention gets none. Houlsby et al. start
both W at std 0.01, the library (but for parallel) at 0.02. The library has f = silu for
Houlsby, and of two parallel ones stacked it keeps the last, where we add both. Left
out: the norms that Houlsby et al. train too; `merge`, as a nonlinear f fits into no
weight.
"""

import re
import threading
from typing import NamedTuple

import torch
from torch import nn

from . import surgery

READS = {  # u, from the sub-layer's output h, its input x and the norm that follows
    "houlsby": lambda h, x, norm: h,
    "pfeiffer": lambda h, x, norm: norm(h + x),
    "parallel": lambda h, x, norm: x,
}
ACTIVATIONS = ["relu", "gelu", "silu"]


class Bottleneck(nn.Module):
    """One adapter in one place: down to m numbers, f, up again, added to h."""

    peft_method = "adapter"

    def __init__(self, width, placement, m, f, scale):
        super().__init__()
        self.placement = placement
        self.scale = scale
        self.f = getattr(nn.functional, f)

        # width is a norm's weight (d,): its length, its device, and at least its dtype
        dtype = torch.promote_types(width.dtype, torch.float32)
        like = dict(device=width.device, dtype=dtype)
        self.down = nn.Linear(len(width), m, **like)
        self.up = nn.Linear(m, len(width), **like)
        for t in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(t)

    def forward(self, h, x, norm):  # (..., d), (..., d) -> (..., d)
        u = READS[self.placement](h, x, norm).to(self.down.weight.dtype)
        change = self.up(self.f(self.down(u)))  # (..., d)
        return (h + self.scale * change).to(h.dtype)


class Site(nn.ModuleDict):
    """A sub-layer's adapters, {name: Bottleneck}.

    Hooks run them, so that the base's weights keep their names.
    """

    peft_method = "adapter"
    active = ()

    def forward(self, h, x, norm):  # (..., d), (..., d) -> (..., d)
        for name in self.active:
            if name in self:
                h = self._modules[name](h, x, norm)
        return h


class Place(NamedTuple):
    """Where a sub-layer's adapters go, and the modules that show x and h.

    `owner` gets the Site. `entry` is called with x, `exit` returns h, and both are
    called within `block`. `width` is a tensor (d,).
    """

    block: nn.Module
    owner: nn.Module
    entry: nn.Module
    exit: nn.Module
    width: torch.Tensor
    feed_forward: bool


def add(model, placement, bottleneck, name="default", activation="relu", scale=None):
    """Freeze `model`, earlier adapters too, put a new one in place, and return it.

    A second adapter, by another name, works after those that are active, on what they
    return.

    Args:
        model: a BERT, (XLM-)RoBERTa, (m)T5, Llama, Mistral, Qwen2 or Qwen3.
        placement: "houlsby", "pfeiffer" or "parallel", the table above.
        bottleneck: m, the adapter's width.
        name: text without a dot, part of the names of its tensors.
        activation: f, "relu", "gelu" or "silu".
        scale: s; None is 4 for "parallel" and 1 for the others.

    Returns:
        The same model.

    Raises:
        ValueError: for another model, a value out of range, a name that is taken, and a
            model that carries another method. Then the model is unchanged.
    """
    surgery.check_one_of("placement", placement, list(READS))
    surgery.check_one_of("activation", activation, ACTIVATIONS)
    surgery.check_whole("bottleneck", bottleneck, 1)
    if scale is None:
        scale = 4.0 if placement == "parallel" else 1.0
    surgery.check_positive("scale", scale)

    plain = surgery.uncompiled(model)
    sites = _sites(plain)
    if not sites:
        surgery.refuse_carried(plain)
    taken = _names(sites)
    if not isinstance(name, str) or not name or "." in name or name in taken:
        raise ValueError(f"name: text without a dot, not in {taken}, not {name!r:.60}")

    places = [p for p in _places(plain) if p.feed_forward or placement == "houlsby"]
    if not places:
        kind = type(plain).__name__
        raise ValueError(f"adapters fit BERT, RoBERTa, T5 and Llama, not {kind}")
    settings = (placement, bottleneck, activation, scale)
    new = [Bottleneck(place.width, *settings) for place in places]

    model.requires_grad_(False)
    for place, module in zip(places, new, strict=True):
        if not hasattr(place.owner, "adapters"):
            _open(place)
        place.owner.adapters._modules[name] = module  # not [name]: "values" is refused
    active = sites[0].active if sites else ()
    return activate(model, [*active, name])


def activate(model, names):
    """Have some adapters work, in this order, and no others.

    Args:
        model: one that carries adapters.
        names: a list of their names; [] gives back the base.

    Returns:
        The same model.

    Raises:
        ValueError: for an unknown name and one that comes twice. Then nothing is
            changed.
    """
    sites = _sites(model)
    known = _names(sites)
    fits = isinstance(names, list | tuple) and all(name in known for name in names)
    if not known or not fits or len(set(names)) < len(names):
        raise ValueError(f"names: some of {known}, each once, not {names!r:.60}")

    for site in sites:
        site.active = tuple(names)
    return model


def state_dict(model, name=None, keep_vars=False):
    """Name the tensors of one adapter, or of all.

    Args:
        model: one that carries adapters.
        name: the adapter's; None for all of them.
        keep_vars: give the parameters themselves, not detached tensors.

    Returns:
        {path: tensor}: path.adapters.NAME with `.down.weight` (m, d), `.down.bias`
        (m,), `.up.weight` (d, m) and `.up.bias` (d,).

    Raises:
        ValueError: where there is none.
    """
    model = surgery.uncompiled(model)
    surgery.refuse_containers(model)
    tensors = {}
    for path, site in model.named_modules():
        if isinstance(site, Site):
            for adapter, module in site.items():
                if name is None or name == adapter:
                    tensors |= module.named_parameters(f"{path}.{adapter}")
    if not tensors:
        which = "" if name is None else f" {name!r:.60}"
        raise ValueError(f"the model carries no adapter{which}: call adapter.add first")
    return tensors if keep_vars else {path: t.detach() for path, t in tensors.items()}


def load_state_dict(model, tensors, name=None):
    """Copy what `state_dict` gave into one adapter, or into all.

    Args:
        model: one that carries the same adapters.
        tensors: {path: tensor}, none missing and none more.
        name: the adapter's; None for all of them.

    Raises:
        ValueError: for a missing or unexpected path, a wrong shape, a tensor that is
            not of floats, NaN or infinity. Then nothing is copied.
    """
    surgery.load(state_dict(model, name), tensors)


def _sites(model):
    model = surgery.uncompiled(model)
    surgery.refuse_containers(model)
    return [m for m in model.modules() if isinstance(m, Site)]


def _names(sites):
    return sorted({name for site in sites for name in site})


# Where adapters go


def _places(model):
    """The places of a model's sub-layers, by the names of their classes."""
    for m in model.modules():
        kind = type(m).__name__
        if re.fullmatch("(Bert|.*Roberta)(Self)?Output", kind):
            width = m.LayerNorm.weight
            yield Place(m, m, m, m.dropout, width, "Self" not in kind)
        elif re.fullmatch("M?T5Layer(Self.*|FF)", kind):
            width = m.layer_norm.weight
            yield Place(m, m, m, m.dropout, width, "Self" not in kind)
        elif re.fullmatch("(Llama|Mistral|Qwen2|Qwen3)DecoderLayer", kind):
            for norm, sub_layer, feed_forward in (
                (m.input_layernorm, m.self_attn, False),
                (m.post_attention_layernorm, m.mlp, True),
            ):
                yield Place(m, sub_layer, norm, sub_layer, norm.weight, feed_forward)


# From the entry to the exit
#
# x waits in the thread, not on a module: threads may share the model, and a copy of it,
# or a replica on another device, has the same hooks. Each hook acts on the module that
# it is called with.


class Waiting(threading.local):
    """{entry: x} of the sub-layers that a thread is in, the innermost last."""

    def __init__(self):
        self.inputs = {}


WAITING = Waiting()


def _open(place):
    """Give a place an empty Site and the hooks that run it."""
    place.owner.adapters = Site().train(place.owner.training)
    place.entry.register_forward_pre_hook(_enter)
    place.exit.register_forward_hook(_leave)
    if _forget not in place.block._forward_hooks.values():
        place.block.register_forward_hook(_forget, always_call=True)


def _enter(entry, args):  # x is the last: BERT's (h, x), a norm's (x,)
    WAITING.inputs.pop(entry, None)  # of a pass that was interrupted
    WAITING.inputs[entry] = args[-1]


def _leave(module, args, out):  # Llama's attention returns (h, its weights)
    if not WAITING.inputs:
        raise RuntimeError(
            "adapters need their sub-layer's input: call the whole block"
        )
    entry, x = WAITING.inputs.popitem()
    owner = module if hasattr(module, "adapters") else entry
    norm = getattr(entry, "LayerNorm", lambda t: t)

    if not isinstance(out, tuple):
        return owner.adapters(out, x, norm)
    return (owner.adapters(out[0], x, norm), *out[1:])


def _forget(block, args, out):
    """After an error too, where the exit was not reached: let no x wait any more."""
    for module in (block, *block.children()):
        WAITING.inputs.pop(module, None)
