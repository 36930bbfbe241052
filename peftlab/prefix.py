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
`state_dict` gives what the MLP makes. The text's positions start at n.

A row padded on the left answers as it does alone; peft counts its pads as positions.
Left pads are refused in models that count every slot, such as BART, and where they
would push the prefix out of a sliding window.

T5's prefix is in the decoder's self-attention, as in peft (the paper: in the encoder
too). There, as in peft, layer l reads pair 2l mod layers. So with an even number of
layers one half of the pairs is read twice, and the other half never.

Not here: encoders, layers whose keys and values are not of one shape (Mamba, DeepSeek),
static caches, `generate` from a filled cache, gradient checkpointing, a start from
activations (7.4).
"""

import math

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from . import surgery


class PrefixModel(nn.Module):
    """A frozen `model` that reads a prefix first; config, device... are the model's."""

    peft_method = "prefix"

    def __init__(self, model, n, hidden, sizes):
        super().__init__()
        self.n = n
        self.hidden = hidden
        self.sizes = sizes  # layers, key-value heads, size of a head

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
        self.training = model.training

    @surgery.ModelSignature
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
        return self.model(**self._with_prefix(**inputs))

    def _with_prefix(self, **inputs):
        """The model's inputs with the prefix in an empty cache, and the rest to match.

        `generate` comes here for each token. After the first the cache holds the
        prefix, and only the mask and the positions must still count it.
        """
        _check(self.model, self.n, inputs)
        cache = surgery.cache_in(inputs)
        text = surgery.given_text(inputs)  # (batch, tokens, ...)

        if inputs.get("use_cache") is False:
            cache = None  # each step reads the whole text anew
        if not surgery.is_filled(cache):
            is_new = surgery.takes(self.model, "cache")
            inputs.pop("past_key_values", None)  # its name to transformers 5.23
            name = "cache" if is_new else "past_key_values"
            inputs[name] = self._filled(cache, len(text))

        side = _side(self.model)
        mask = inputs.get(side + "attention_mask")
        positions = inputs.get(side + "position_ids")
        is_told = surgery.takes(self.model, side + "position_ids")
        if positions is None and is_told and surgery.has_left_pads(mask):
            positions = surgery.positions(mask, text.shape[1], self.model)

        if positions is not None:
            inputs[side + "position_ids"] = positions + self.n
        if mask is not None:
            longer = nn.functional.pad(mask, (self.n, 0), value=1)
            inputs[side + "attention_mask"] = longer
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
            surgery.text_part(cache).update(key, value, layer)
        return cache

    def generate(self, *args, **options):
        """The model's own `generate`: a decoder's result starts with input_ids.

        Raises:
            ValueError: as `forward`, and for a cache that holds a text already.
        """
        return surgery.generate(self.model, self._with_prefix, *args, **options)

    def state_dict(self, *args, **options):
        return surgery.untied(super().state_dict(*args, **options))

    def __getattr__(self, name):
        return surgery.attribute(self, name)


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
        ValueError: for a bad value, an encoder, a layer without keys and values of one
            shape, and a model that carries a method already. Then the model is
            unchanged.
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
    wrapper = surgery.around(wrapper, PrefixModel)
    return {"prompt_embeddings": wrapper.mlp(wrapper.prompt_embeddings).detach()}


def load_state_dict(wrapper, tensors):
    """Fold the wrapper and copy {"prompt_embeddings": tensor} into it.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape. Then nothing is
            changed.
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
    cache = surgery.text_part(surgery.cache_in(outputs))
    layers = cache.layers if type(cache) is DynamicCache else []

    kinds = {type(layer).__name__ for layer in layers}
    if not layers or not kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise ValueError("a prefix needs a model that generates by attention alone")
    keys = [getattr(layer, "keys", None) for layer in layers]
    values = [getattr(layer, "values", None) for layer in layers]
    shapes = {getattr(t, "shape", None) for t in keys + values}
    if len(shapes) > 1 or None in shapes:
        raise ValueError("a prefix needs keys and values of one shape in all layers")

    _, heads, _, size = shapes.pop()
    return len(layers), heads, size


def _side(model):
    """What the names of the text's mask and positions begin with."""
    return "decoder_" if model.config.is_encoder_decoder else ""


def _check(model, n, inputs):
    """ValueError for what would lose the prefix, or move it away from the text."""
    layers = model.modules() if model.training else []
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ValueError("gradient checkpointing drops the prefix: disable it")

    counts = "this model counts left pads: give rows of one length"
    mask = inputs.get("attention_mask")
    if surgery.has_left_pads(mask) and not surgery.takes_left_pads(model):
        raise ValueError(counts)

    side = _side(model)
    mask = inputs.get(side + "attention_mask")
    if not surgery.has_left_pads(mask):
        return
    if side and not surgery.takes(model, side + "position_ids"):
        raise ValueError(counts)
    if n + mask.shape[1] > _window(model):
        raise ValueError(
            "left pads push the prefix out of the attention's window of"
            f" {_window(model)} tokens: give rows of one length"
        )


def _window(model):
    """How many tokens back a layer attends at least."""
    config = model.config.get_text_config(decoder=True)
    names = "sliding_window", "attention_chunk_size", "window_size"
    return min(getattr(config, name, None) or math.inf for name in names)
