r"""Prefix tuning: Li and Liang 2021, arXiv 2101.00190, section 4.

Each layer of a frozen model attends to n trained keys and values before the text's own:

$$ \mathrm{softmax}\Big(\frac{Q\,[P^K;\ K]^\top}{\sqrt{d_h}}\Big)\,[P^V;\ V] $$

| symbol | shape | in code | start |
|---|---|---|---|
| $P^K, P^V$ of all layers | (n, 2 layers kv) | `prompt_embeddings` | standard normal |
| or $\mathrm{MLP}(P')$, with $P'$ | (n, kv) | `prompt_embeddings` | standard normal |
| $\mathrm{MLP}$ | kv to hidden, tanh, 2 layers kv | `mlp` | as linear layers do |
| $Q, K, V$ | (batch, heads, tokens, $d_h$) | in `model` | pretrained, frozen |

kv is $d_h$ times the key-value heads; layer l has its key at 2l, its value at 2l + 1.
`state_dict` gives what the MLP makes. The text's positions start at n. A row padded on
the left answers as it does alone (peft counts the pads); where it cannot, in BART or
beyond a sliding window, the batch is refused.

As in peft, T5's prefix is in the decoder's self-attention (the paper: in the encoder
too) and, an oddity of peft's, layer l reads pair 2l mod layers: if layers is even, half
serve twice, the rest never.

Not here: encoders, layers whose keys and values are not of one shape (Mamba, DeepSeek),
static caches, `generate` from a filled cache, gradient checkpointing, a start from
activations (7.4).
"""

import copy
import functools
import inspect
import math

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from . import surgery


class ModelSignature:
    """A method of a wrapper that shows the arguments of the model's own `forward`.

    transformers' Trainer gives `forward` only the columns that its signature names.
    """

    def __init__(self, method):
        self.method = method

    def __get__(self, wrapper, kind):
        if wrapper is None:
            return self.method

        bound = functools.partial(self.method, wrapper)
        bound.__signature__ = inspect.signature(wrapper.model.forward)
        return bound


class PrefixModel(nn.Module):
    """A frozen `model` that reads a prefix first; config, device... are the model's."""

    peft_method = "prefix"

    def __init__(self, model, n, hidden, sizes):
        super().__init__()
        self.n = n
        self.hidden = hidden
        self.sizes = sizes  # layers, key-value heads, size of a head
        self.training = model.training

        layers, heads, size = sizes
        kv = heads * size
        dtype = torch.promote_types(model.dtype, torch.float32)
        with torch.device(model.device):
            start = torch.randn(n, kv if hidden else 2 * layers * kv, dtype=dtype)
            mlp = nn.Sequential()  # it changes nothing
            if hidden:
                up = nn.Linear(kv, hidden)
                mlp = nn.Sequential(up, nn.Tanh(), nn.Linear(hidden, 2 * layers * kv))
        self.prompt_embeddings = nn.Parameter(start)
        self.mlp = mlp.to(dtype)
        self.model = model

        side = "decoder_" if model.config.is_encoder_decoder else ""
        self._mask_name = side + "attention_mask"
        self._positions_name = side + "position_ids"
        names = inspect.signature(model.forward).parameters
        self._takes_positions = self._positions_name in names
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # to 5.23
        self._first_position = _first_position(model)
        self._padded_on_the_left = _padded_on_the_left(model)
        self._window = _window(model)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @ModelSignature
    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        """What the model returns, over the text's slots.

        Args:
            input_ids: (batch, tokens); or give `inputs_embeds`, (batch, tokens, d).
            attention_mask: (batch, tokens), 0 over pads, or None.
            labels: as the model takes them.
            inputs: whatever else the model takes.

        Raises:
            ValueError: unless it gets exactly one of input_ids and inputs_embeds; for
                pads that the model would count, a static cache, checkpointing.
        """
        if (input_ids is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("give one of the two, input_ids or inputs_embeds")
        if labels is not None:
            inputs["labels"] = labels
        inputs["input_ids"] = input_ids
        inputs["attention_mask"] = attention_mask
        return self.model(**self._with_prefix(inputs))

    def generate(self, *args, **options):
        """The model's own `generate`: a decoder's result starts with input_ids.

        Raises:
            ValueError: as `forward`, and for a cache that holds a text already.
        """
        if _is_filled(_cache(options)):
            raise ValueError("a prefix begins the text: give all of it, and no cache")

        # `generate` calls forward for each token. A shallow copy, whose forward puts
        # the prefix in, leaves the model as it is, for other threads too.
        @functools.wraps(self.model.forward)
        def forward(**inputs):
            return self.model.forward(**self._with_prefix(inputs))

        reader = copy.copy(self.model)
        reader.forward = forward
        return reader.generate(*args, **options)

    def state_dict(self, *args, **options):
        """As of any module, but tied weights are copies: safetensors, with which
        transformers' Trainer saves, takes no shared memory."""
        tensors = super().state_dict(*args, **options)
        storages = set()
        for name, t in tensors.items():
            if torch.is_tensor(t):
                storage = t.untyped_storage().data_ptr()
                tensors[name] = t.clone() if storage in storages else t
                storages.add(storage)
        return tensors

    def _with_prefix(self, inputs):
        """The model's inputs, the prefix in an empty cache, the mask longer by n.

        `generate` comes here for each token. After the first the cache holds the
        prefix, and only the mask and the positions must still count it.
        """
        cache = _cache(inputs)
        self._check(inputs)
        mask = inputs.get(self._mask_name)
        text = _text(inputs)  # (batch, tokens, ...)

        if inputs.get("use_cache") is False:
            cache = None  # each step reads the whole text anew
        if not _is_filled(cache):
            inputs.pop("past_key_values", None)
            inputs[self._cache_name] = self._filled(cache, len(text))

        positions = inputs.get(self._positions_name)
        if mask is not None:
            inputs[self._mask_name] = nn.functional.pad(mask, (self.n, 0), value=1)
            if positions is None and self._takes_positions and _has_left_pads(mask):
                counted = (mask.cumsum(1).long() - 1).clamp(0)  # pads do not count
                positions = counted[:, -text.shape[1] :] + self._first_position
        if positions is not None:
            inputs[self._positions_name] = positions + self.n
        return inputs

    def _filled(self, cache, rows):
        """The cache, a new one if None, with the prefix in it for that many rows."""
        layers, heads, size = self.sizes
        pairs = self.mlp(self.prompt_embeddings).to(self.model.dtype)
        pairs = pairs.view(self.n, 2 * layers, 1, heads, size)
        pairs = pairs.permute(1, 2, 3, 0, 4).expand(-1, rows, -1, -1, -1)

        twice = self.model.config.is_encoder_decoder  # peft's oddity
        if cache is None and twice:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        elif cache is None:
            cache = DynamicCache()
        for layer in range(layers):
            pair = 2 * layer % layers if twice else layer
            key, value = pairs[2 * pair], pairs[2 * pair + 1]  # (rows, heads, n, size)
            _of_the_text(cache).update(key, value, layer)
        return cache

    def _check(self, inputs):
        """ValueError for what would lose the prefix, or move it away from the text."""
        layers = self.model.modules() if self.model.training else []
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ValueError("gradient checkpointing drops the prefix: disable it")

        for name in {"attention_mask", self._mask_name} - self._padded_on_the_left:
            if _has_left_pads(inputs.get(name)):
                raise ValueError("this model counts left pads: give rows of one length")
        mask = inputs.get(self._mask_name)
        if _has_left_pads(mask) and self.n + mask.shape[1] > self._window:
            raise ValueError(
                "left pads push the prefix out of the attention's window of"
                f" {self._window} tokens: give rows of one length"
            )


def add(model, n, hidden=None):
    """Freeze `model` and return it in a PrefixModel with n keys and values a layer.

    Args:
        model: a model of transformers that generates by attention; it reads one token,
            whose cache tells the sizes.
        n: the prefix's length in tokens, a whole number.
        hidden: None, or the width of the MLP that makes them while training.

    Returns:
        A PrefixModel, whose `prompt_embeddings` is (n, 2 layers kv), or (n, kv) before
        an MLP.

    Raises:
        ValueError: the model unchanged, for a bad value, an encoder, a layer without
            keys and values of one shape, and a model that carries a method already.
    """
    surgery.refuse_carried(model)
    model = surgery.uncompiled(model)
    surgery.check_whole("n", n, 1)
    if hidden is not None:
        surgery.check_whole("hidden", hidden, 1)
    sizes = _sizes(model)
    return PrefixModel(model.requires_grad_(False), n, hidden, sizes)


def state_dict(wrapper):
    """The trained tensor by its name in a file, folded: what the MLP makes.

    Returns:
        {"prompt_embeddings": (n, 2 layers kv)}

    Raises:
        ValueError: for a model without a prefix.
    """
    wrapper = surgery.uncompiled(wrapper)
    surgery.refuse_containers(wrapper)
    if not isinstance(wrapper, PrefixModel):
        raise ValueError("the model has no prefix: call prefix.add first")
    return {"prompt_embeddings": wrapper.mlp(wrapper.prompt_embeddings).detach()}


def load_state_dict(wrapper, tensors):
    """Fold the wrapper and copy {"prompt_embeddings": tensor} into it.

    Raises:
        ValueError: nothing changed, for a missing or unexpected name, a wrong shape.
    """
    surgery.load(state_dict(wrapper), tensors)  # with an MLP this checks, no more
    surgery.load(state_dict(fold(wrapper)), tensors)


def fold(wrapper):
    """Put what the MLP makes in its place, a flat parameter, and return the wrapper."""
    made = state_dict(wrapper)["prompt_embeddings"]
    plain = surgery.uncompiled(wrapper)
    if plain.hidden:
        plain.prompt_embeddings = nn.Parameter(made)
        plain.hidden = None
        plain.mlp = nn.Sequential()
    return wrapper


# What a model does with caches and pads


def _sizes(model):
    """Layers, key-value heads, size of a head: read off the cache of one token."""
    if not getattr(model, "can_generate", bool)():
        raise ValueError("a prefix needs a model that generates by attention")
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    inputs = {"input_ids": token}
    if not getattr(model.config, "use_cache", True):
        inputs["use_cache"] = True
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):  # dropout draws from it
        outputs = model(**inputs)

    cache = _of_the_text(_cache(outputs))
    layers = cache.layers if type(cache) is DynamicCache else []
    kinds = {type(layer).__name__ for layer in layers}
    if not layers or not kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise ValueError("a prefix needs a model that generates by attention alone")
    tensors = [
        getattr(layer, name, None) for layer in layers for name in ("keys", "values")
    ]
    shapes = {getattr(t, "shape", None) for t in tensors}
    if len(shapes) > 1 or None in shapes:
        raise ValueError("a prefix needs keys and values of one shape in all layers")

    _, heads, _, size = shapes.pop()
    return len(layers), heads, size


def _text(inputs):
    """The ids or embeddings that are given."""
    names = "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"
    return next(inputs[name] for name in names if inputs.get(name) is not None)


def _first_position(model):
    """0; in RoBERTa's family, whose positions count from the pad's id, one after it."""
    for m in model.modules():
        if hasattr(m, "create_position_ids_from_inputs_embeds"):
            return m.padding_idx + 1
    return 0


def _padded_on_the_left(model):
    """The masks that may begin with pads, behind which a row answers as it does alone.

    Of a decoder that is told the positions, or counts by the mask, as Bloom; of T5's
    encoder, which measures distances. (In its decoder pads would part it from the
    prefix.)
    """
    names = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        is_relative = hasattr(model.config, "relative_attention_num_buckets")
        is_told = "decoder_position_ids" in names
        masks = {"attention_mask": is_relative, "decoder_attention_mask": is_told}
    else:
        is_told = "position_ids" in names or model.config.model_type == "bloom"
        masks = {"attention_mask": is_told}
    return {name for name, fits in masks.items() if fits}


def _has_left_pads(mask):
    return mask is not None and mask.dim() == 2 and not mask[:, 0].all()


def _window(model):
    """How many tokens back a layer attends at least."""
    config = model.config.get_text_config(decoder=True)
    names = "sliding_window", "attention_chunk_size", "window_size"
    return min(getattr(config, name, None) or math.inf for name in names)


def _cache(inputs):
    """The cache among inputs or outputs, or None.

    Raises:
        ValueError: for a static cache, which has no room for the prefix.
    """
    cache = inputs.get("cache")
    if cache is None:
        cache = inputs.get("past_key_values")
    layers = getattr(_of_the_text(cache), "layers", [])
    if any(hasattr(layer, "max_cache_len") for layer in layers):
        raise ValueError("a static cache has no room for a prefix: use a dynamic one")
    return cache


def _of_the_text(cache):
    """The part of a cache that keeps the decoder's own text."""
    return getattr(cache, "self_attention_cache", cache)


def _is_filled(cache):
    return cache is not None and cache.get_seq_length() > 0
