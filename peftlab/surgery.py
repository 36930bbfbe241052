"""Model surgery: what every method does to a model, and what no paper is about.

Linear layers are chosen by name (`select`), wrapped (`wrap`), folded into plain ones
(`merge`) or put back (`unwrap`). What a method trains is named (`state_dict`) and
loaded (`load`). What cannot be is refused in one clear sentence before anything changes
(`check_...`, `refuse_...`).

A method that needs this file can be had as one file that does not: its page in the book
offers it for download, and `python tools/standalone.py lora` writes it.
"""

import copy
import functools
import inspect
import re
import warnings

import torch
from torch import nn

HEADS = {"classifier", "score", "qa_outputs"}  # RoBERTa's classifier is two layers
CONTAINERS = {  # what wraps a model, and where it keeps the plain one
    "OptimizedModule": "_orig_mod",  # torch.compile's
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
}


class Exactly(list):
    """Names of layers that are full paths: none is taken for a suffix."""


# Linear layers


def is_conv1d(layer):
    """Whether it is GPT-2's linear layer, which keeps its weight as (in, out)."""
    return any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)


def shape(layer):
    """(out, in) of a linear layer, packed or not; None for any other module."""
    if is_conv1d(layer):
        return layer.weight.shape[::-1]
    n_out = getattr(layer, "out_features", None)
    n_in = getattr(layer, "in_features", None)
    return (n_out, n_in) if n_out and n_in else None


def weight(layer):
    """W as every paper has it, (out, in)."""
    return layer.weight.T if is_conv1d(layer) else layer.weight


def set_weight(layer, W):
    """Give the layer the weight W, (out, in), rounded once to the dtype that it had.

    It is a new parameter, frozen: an embedding that was tied to the old one stays.
    """
    W = W.T if is_conv1d(layer) else W
    W = W.to(layer.weight.dtype).contiguous()
    layer.weight = nn.Parameter(W, requires_grad=False)


def like(layer):
    """dtype and device of what trains beside a layer: float32 over 16 bits or fewer."""
    W = layer.weight
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return dict(dtype=dtype, device=W.device)


def is_packed(W):
    """Whether a weight is in 4 or 8 bits, whatever the dtype that stores them."""
    return hasattr(W, "quant_state") or not W.is_floating_point() or W.itemsize < 2


def is_plain(layer):
    """Whether the layer computes W x + b and no more, so that a method may build on it.

    nn.Linear and Conv1D do. A class with a forward of its own, such as Falcon's linear,
    is tried on two rows. A packed layer computes with what it unpacks.
    """
    W = getattr(layer, "weight", None)
    if not torch.is_tensor(W):
        return False
    if type(layer).forward is nn.Linear.forward or is_conv1d(layer) or is_packed(W):
        return True
    if W.is_meta:
        return True  # there are no numbers to try

    rows = torch.randn(2, W.shape[-1], generator=torch.Generator().manual_seed(0))
    rows = (8 * rows).to(W)
    try:
        with torch.no_grad():
            want = nn.functional.linear(rows, W, layer.bias)
            gap = (layer(rows) - want).abs().max()
    except Exception:  # it wants other inputs, or returns more than a tensor
        return False
    rounding = max(4 * torch.finfo(W.dtype).eps, 1e-4)
    return bool(gap <= rounding * want.abs().max())


# Which layers


def select(model, targets):
    """The linear layers that `targets` names.

    Args:
        model: any module.
        targets: a list of names, each a full path or a dotted suffix ("q_proj");
            `Exactly` a list of full paths; or "all-linear": all but the output head.

    Returns:
        The layers, a list in the model's order.

    Raises:
        ValueError: for a name without a match, and for one whose layer computes
            something else than W x + b; "all-linear" leaves such layers out and warns.
    """
    model = uncompiled(model)
    linears = {p: m for p, m in model.named_modules() if p and shape(m)}

    if targets == "all-linear":
        refuse_fused_experts(model)
        inner = {p: m for p, m in linears.items() if not is_head(model, p, m)}
        return plain_alone(inner)

    if not isinstance(targets, list | tuple | set) or not targets:
        what = 'targets: a list of names or "all-linear"'
        raise ValueError(f"{what}, not {shown(targets)}")
    matches = path_is if isinstance(targets, Exactly) else ends_in
    lost = [t for t in targets if not any(matches(p, t) for p in linears)]
    if lost:
        names = ", ".join(sorted({p.rpartition(".")[2] for p in linears}))
        raise ValueError(f"no linear layer is named {lost!r:.200}; there are: {names}")

    chosen = {p: m for p, m in linears.items() if any(matches(p, t) for t in targets)}
    for path, m in chosen.items():
        if not is_plain(m):
            raise ValueError(
                f"{path}, a {type(m).__name__}, computes more than W x + b"
            )
    return list(chosen.values())


def plain_alone(linears):
    """The layers of {path: layer} that are plain; a warning names the others."""
    others = [path for path, m in linears.items() if not is_plain(m)]
    if others:
        names = ", ".join(others)
        warnings.warn(f"all-linear leaves out {names}: more than W x + b", stacklevel=4)
    plain = [m for path, m in linears.items() if path not in others]
    if not plain:
        raise ValueError("all-linear finds no linear layer besides the output head")
    return plain


def path_is(path, name):
    return path == name


def ends_in(path, name):
    """Whether a path ends in a name, whole parts only: "proj" is not "q_proj"."""
    return f".{path}".endswith(f".{name}")


def is_head(model, path, layer):
    """Whether a layer is the output head, or a part of a classifier."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return layer is head or bool(HEADS & set(path.split(".")))


def refuse_fused_experts(model):
    """ValueError for a mixture whose experts are 3-D tensors: they are no layers."""
    sizes = {(n, p.dim()): p.numel() for n, p in model.named_parameters()}
    fused = sum(n for (name, dim), n in sizes.items() if "expert" in name and dim == 3)
    if fused:
        share = f"{fused / sum(sizes.values()):.0%} of the weights"
        raise ValueError(f"all-linear misses {share}, fused in 3-D expert tensors")


# Biases that would train nothing


def zeros(layer):
    """A bias to begin with, (out,)."""
    W = layer.weight
    dtype = torch.float32 if is_packed(W) else W.dtype
    return torch.zeros(shape(layer)[0], dtype=dtype, device=W.device)


def computed(model, name, layers):
    """{layer: sentence} where pruning or a norm computes the bias or weight anew."""
    idle = {}
    layers = set(layers)
    for path, m in model.named_modules():
        t = getattr(m, name, None) if m in layers else None
        plain = isinstance(t, nn.Parameter)
        if torch.is_tensor(t) and t.is_floating_point() and not plain:
            idle[m] = f"{path}.{name} is computed, or a buffer"
    return idle


def unread(model, layers):
    """{layer: sentence} where a new bias would not be added."""
    idle = {}
    for parent_path, parent in model.named_modules():
        for name, m in parent._modules.items():
            if m in layers and not (adds(m) and reads(type(parent), name)):
                idle[m] = f"{parent_path}.{name} would not add its bias".lstrip(".")
    return idle


def adds(layer):
    """Whether a layer adds a bias that is no zero: a forward of its own may not."""
    layer.bias = nn.Parameter(zeros(layer) + 1)
    try:
        return is_plain(layer)
    finally:
        layer.bias = None


def reads(kind, name):
    """Whether a parent of this class calls its layer `name`, or reads its bias.

    Mamba's kernel on a GPU and MobileBERT's head are given the weight alone. T5 asks
    for the weight's dtype, and whether it is a tensor at all.
    """
    try:
        methods = [getattr(kind, attr) for attr in dir(kind) if "forward" in attr]
        source = "".join(map(inspect.getsource, methods))
    except (OSError, TypeError):  # there is no text of it
        return True
    asked = r"\b(?!\.dtype|\.device|\.shape|, torch\.Tensor)"
    weight_alone = re.search(rf"self\.{name}\.weight{asked}", source)
    return not weight_alone or f"self.{name}.bias" in source


# In and out


def uncompiled(model):
    """The model that torch.compile was given: its layers have their plain names."""
    while type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    return model


def swap(model, layers):
    """Put layers[old] where the module `old` hangs in the model, wherever that is."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = layers.get(child, child)


def wrap(model, new):
    """Freeze the model, put new[layer] in the place of each layer, and return it."""
    for layer, wrapper in new.items():
        wrapper.train(layer.training)
    swap(model.requires_grad_(False), new)
    return model


def wrappers(model, kind):
    """{path: layer} of the method's layers; ValueError where there are none."""
    model = uncompiled(model)
    refuse_containers(model)
    layers = {p: m for p, m in model.named_modules() if isinstance(m, kind)}
    if not layers:
        name = kind.peft_method
        raise ValueError(f"the model carries no {name}: call {name.lower()}.add first")
    return layers


def unwrap(model, kind):
    """Put the plain layers back, and return the model, all of it frozen."""
    swap(model, {m: m.base for m in wrappers(model, kind).values()})
    return model.requires_grad_(False)


def merge(model, kind):
    """Give each base the weight `folded()` of its wrapper, (out, in), and put it back.

    Returns:
        The model, frozen.

    Raises:
        ValueError: nothing changed, without the method, for a weight that cannot be
            written, and for a sum that is NaN or infinite in the base's dtype.
    """
    layers = wrappers(model, kind)
    bases = [m.base for m in layers.values()]
    refuse_unwritable(bases, f"{kind.peft_method} cannot be merged into")
    for path, m in layers.items():  # all of them, before the first one changes
        check_fits(path, m.folded(), m.base.weight.dtype)

    for m in layers.values():
        set_weight(m.base, m.folded())
    return unwrap(model, kind)


def read_weight(wrapper):
    """What a wrapper shows as its `weight`: the folded one, in the base's layout.

    It is for code that reads a layer's weight and never calls the layer, such as
    nn.MultiheadAttention. A weight in packed bytes is shown as it is.
    """
    base = wrapper.base
    W = base.weight
    is_float = W.is_floating_point() and W.itemsize > 1
    if not is_float or weight(base).shape != shape(base):
        return W
    folded = wrapper.folded()
    folded = folded.T if is_conv1d(base) else folded
    return folded.to(W.dtype)


# Tensors


def state_dict(model, kind, names, keep_vars=False):
    """{path.name: tensor} of the method's layers; keep_vars gives the parameters."""
    layers = wrappers(model, kind)
    own = {f"{p}.{name}": getattr(m, name) for p, m in layers.items() for name in names}
    return own if keep_vars else {name: t.detach() for name, t in own.items()}


def load(own, tensors):
    """Copy tensors into `own`, a state dict of the model.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape, a tensor that is
            not of floats, NaN or infinity. Then nothing is copied.
    """
    if not isinstance(tensors, dict):
        raise ValueError(f"give {{name: tensor}}, not a {type(tensors).__name__}")
    missing = sorted(own.keys() - tensors.keys(), key=str)
    unexpected = sorted(tensors.keys() - own.keys(), key=str)
    if missing or unexpected:
        what = f"missing: {missing[:3]}, unexpected: {unexpected[:3]}"
        raise ValueError(f"these are not the model's tensors: {what}")

    for name, t in own.items():
        got, want = size(tensors[name]), size(t)
        if got != want:
            raise ValueError(f"{name}: its shape is {got} here, {want} in the model")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name}: {tensors[name].dtype} where floats belong")
        check_fits(name, tensors[name], t.dtype)

    for name, t in own.items():
        t.copy_(tensors[name])


def size(t):
    return tuple(t.shape) if torch.is_tensor(t) else None


# What cannot be


def check_fits(name, t, dtype):
    """ValueError for a tensor that is NaN or infinite once it has that dtype."""
    t = t.to(dtype)
    if not t.is_meta and not t.isfinite().all():
        raise ValueError(f"{name} would be NaN or infinite in {dtype}")


def shown(value):
    """A value in a message: on one line, and not all of a long one."""
    return " ".join(repr(value).split())[:60]


def is_number(value):
    return type(value) is int or isinstance(value, float)


def check_whole(what, value, least, below=2**31):
    if type(value) is not int or not least <= value < below:
        raise ValueError(
            f"{what} must be a whole number of at least {least}, not {shown(value)}"
        )


def check_positive(what, value):
    if not is_number(value) or not 0 < value < 1e300:
        raise ValueError(f"{what} must be a positive number, not {shown(value)}")


def check_fraction(what, value):
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{what} must be at least 0 and below 1, not {shown(value)}")


def check_one_of(what, value, choices):
    if value not in choices:
        names = ", ".join(choices)
        raise ValueError(f"{what} must be one of {names}, not {shown(value)}")


def check_flag(what, value):
    if type(value) is not bool:
        raise ValueError(f"{what} must be True or False, not {shown(value)}")


def refuse_containers(model):
    """ValueError for what is no module, and for a model that torch.compile or a
    parallel wrapper holds, in part too: names are others there, copies drift apart."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model must be an nn.Module, not {shown(model)}")
    for path, m in model.named_modules():
        for kind in type(m).__mro__:
            if kind.__name__ in CONTAINERS:
                name = kind.__name__.replace("OptimizedModule", "torch.compile")
                plain = f"{path}.{CONTAINERS[kind.__name__]}".lstrip(".")
                raise ValueError(
                    f"{path or 'the model'} is wrapped by {name}: give the plain model,"
                    f" with its `{plain}`"
                )


def refuse_carried(model):
    """ValueError for a model in a container, and one that carries a method already."""
    model = uncompiled(model)
    refuse_containers(model)
    names = {m.peft_method for m in model.modules() if hasattr(type(m), "peft_method")}
    if hasattr(model, "bitfit"):
        names.add("BitFit")
    if hasattr(model, "lora_adapters"):
        names.add("LoRAs under names")
    if names:
        what = " and ".join(sorted(names))
        raise ValueError(f"the model carries {what} already: merge or remove it first")


def refuse_unwritable(layers, what):
    """ValueError, which begins with `what`, for a weight that cannot be written: one in
    4 or 8 bits, and one that pruning or a norm computes anew at each call."""
    for layer in layers:
        if is_packed(layer.weight):
            raise ValueError(f"{what} a packed (4- or 8-bit) weight")
        if "weight" not in layer._parameters:
            raise ValueError(f"{what} a weight that is computed (pruned, normed)")


def refuse_hooks(layers, what):
    """ValueError, which begins with `what`, for a layer that would not be called any
    more and has hooks, or a forward of its own set on it: they would be lost."""
    for layer in layers:
        hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks)
        if any(hooks) or "forward" in vars(layer):
            raise ValueError(f"{what} a layer with hooks: they would be lost")


def refuse_unpackable(base):
    """ValueError unless `base` is a linear layer whose plain weight can be packed."""
    kind = type(base).__name__
    if not isinstance(base, nn.Module) or shape(base) is None:
        raise ValueError(f"a plain linear can be packed, not {kind}")
    if not torch.is_tensor(getattr(base, "weight", None)):
        raise ValueError(f"this {kind} has no plain weight: it may be packed already")
    if "bias" not in base._parameters:
        raise ValueError(f"the bias of this {kind} is computed at each call")
    refuse_unwritable([base], f"a {kind} cannot be packed: it has")
    if not is_plain(base):
        raise ValueError(f"a {kind} cannot be packed: it computes more than W x + b")
    refuse_hooks([base], "packing cannot take the place of")


# Around a model: what prompt.py and prefix.py put before a text


class ModelSignature:
    """A method of a wrapper that shows the arguments of its model's `forward`.

    transformers' Trainer gives a model only the columns that its signature names.
    """

    def __init__(self, method):
        self.method = method

    def __get__(self, wrapper, kind):
        if wrapper is None:
            return self.method

        bound = functools.partial(self.method, wrapper)
        bound.__signature__ = inspect.signature(wrapper.model.forward)
        return bound


def attribute(wrapper, name):
    """An attribute of the wrapper, a module, or else of the model in it."""
    try:
        return nn.Module.__getattr__(wrapper, name)
    except AttributeError:
        return getattr(nn.Module.__getattr__(wrapper, "model"), name)


def around(wrapper, kind):
    """The wrapper, not compiled; ValueError if it is none of that kind."""
    wrapper = uncompiled(wrapper)
    refuse_containers(wrapper)
    if not isinstance(wrapper, kind):
        name = kind.peft_method
        raise ValueError(f"the model carries no {name}: call {name}.add first")
    return wrapper


def untied(tensors):
    """A state dict in which tied weights are copies: safetensors, with which
    transformers' Trainer saves, takes no shared memory."""
    storages = set()
    for name, t in tensors.items():
        if torch.is_tensor(t):
            storage = t.untyped_storage().data_ptr()
            tensors[name] = t.clone() if storage in storages else t
            storages.add(storage)
    return tensors


def generate(model, put_in, *args, **options):
    """The model's own `generate`, in which each token's inputs go through `put_in`.

    A shallow copy of the model does it, with a forward of its own. So the model stays
    as it is, for other threads too.

    Raises:
        ValueError: for a cache that holds a text already.
    """
    if is_filled(cache_in(options)):
        raise ValueError(
            "a prompt or prefix begins the text: give all of it, and no cache"
        )

    @functools.wraps(model.forward)
    def forward(*args, **inputs):
        return model.forward(**put_in(*args, **inputs))

    reader = copy.copy(model)
    reader.forward = forward
    return reader.generate(*args, **options)


def cache_in(inputs):
    """The cache among the inputs, or None: its name has changed with transformers 5.24.

    Raises:
        ValueError: for a static cache, which has no room for a prompt or prefix.
    """
    names = ("cache", "past_key_values", "cache_params", "state")  # Mamba's, RWKV's
    given = [inputs[name] for name in names if inputs.get(name) is not None]
    cache = given[0] if given else None
    layers = getattr(text_part(cache), "layers", [])
    if any(hasattr(layer, "max_cache_len") for layer in layers):
        raise ValueError("a static cache has no room to grow: use a dynamic one")
    return cache


def text_part(cache):
    """Of an encoder-decoder's cache the part that is the decoder's own text."""
    return getattr(cache, "self_attention_cache", cache)


def is_filled(cache):
    """Whether a cache holds a text already."""
    if not hasattr(cache, "get_seq_length"):
        return cache is not None
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # Mamba's has states and no length
        return cache.has_previous_state()


def given_text(inputs):
    """The ids or embeddings among the inputs, (batch, tokens, ...)."""
    names = "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"
    given = [inputs[name] for name in names if inputs.get(name) is not None]
    if not given:
        raise ValueError("give one of the two, input_ids or inputs_embeds")
    return given[0]


def takes(model, argument):
    return argument in inspect.signature(model.forward).parameters


def has_left_pads(mask):
    return mask is not None and mask.dim() == 2 and not mask[:, 0].all()


def takes_left_pads(model):
    """Whether a row that begins with pads answers as it does alone.

    It does in a decoder that is told the positions, in Bloom, which counts by the mask,
    and in T5's encoder, which measures distances. BERT reads its answer off the first
    slot, BART counts all slots, RecurrentGemma's state reads the pads.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family is None:
        return True  # no model of transformers: left to itself
    if config.is_encoder_decoder:
        return hasattr(config, "relative_attention_num_buckets")
    if not takes(model, "position_ids"):
        return family == "bloom"
    return family != "recurrent_gemma" and (is_causal(model) or model.can_generate())


def is_causal(model):
    return any(getattr(m, "is_causal", False) for m in model.modules())


def positions(mask, tokens, model):
    """Where the last `tokens` slots stand if pads do not count, (batch, tokens).

    The first is 0; in RoBERTa's family, whose pads have a position, one after theirs.
    """
    first = first_position(model)
    counted = (mask.cumsum(1).long() - 1).clamp(0)
    return counted[:, -tokens:] + first


def first_position(model):
    for m in model.modules():
        if hasattr(m, "create_position_ids_from_inputs_embeds"):
            return m.padding_idx + 1
    return 0
