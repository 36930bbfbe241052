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
the left answers as it does alone (peft counts the pads). As in peft, T5's prefix is in
the decoder's self-attention (the paper: in the encoder too) and, an oddity of peft's,
layer l reads pair 2l mod layers: if layers is even, half serve twice, the rest never.
Not here: encoders, static caches, checkpointing, pads beyond a sliding window, linear
attention, a start from activations (7.4).
"""

import inspect

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache


class PrefixModel(nn.Module):
    """A frozen `model` that reads a prefix first; config, device... are the model's."""

    def __init__(self, sizes, model, n, hidden):
        super().__init__()
        names = inspect.signature(model.forward).parameters
        self._cache = "cache" if "cache" in names else "past_key_values"  # until 5.23
        self._told = "position_ids" in names
        (layers, heads, size), self.training, mlp = sizes, model.training, []
        kv, all_kv = heads * size, 2 * layers * heads * size
        dtype = torch.promote_types(model.dtype, torch.float32)
        with torch.device(model.device):
            start = torch.randn(n, kv if hidden else all_kv, dtype=dtype)
            if hidden:
                mlp = nn.Linear(kv, hidden), nn.Tanh(), nn.Linear(hidden, all_kv)
        self.mlp = nn.Sequential(*mlp).to(dtype)  # with no layer it changes nothing
        self.prompt_embeddings = nn.Parameter(start)
        self.model, self.n, self.hidden, self.sizes = model, n, hidden, sizes

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        """What the model returns for input_ids (batch, tokens) or inputs_embeds (batch,
        tokens, d) and all else that it takes. ValueError for neither and for both."""
        if (input_ids is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("give one of the two, input_ids or inputs_embeds")
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.model(**self._put_in(inputs))

    def generate(self, *args, **options):
        """The model's own `generate`: a decoder's result starts with input_ids."""
        with self.model.register_forward_pre_hook(
            lambda _, args, inputs: (args, self._put_in(inputs)), with_kwargs=True
        ):
            return self.model.generate(*args, **options)

    def _put_in(self, inputs):
        """The model's inputs, the prefix in an empty cache, the mask longer by n."""
        which = "decoder_" * self.model.config.is_encoder_decoder + "attention_mask"
        mask, n = inputs.get(which), self.n
        cache = None if inputs.get("use_cache") is False else inputs.get(self._cache)
        at, begins = inputs.get("position_ids"), not (cache and cache.get_seq_length())
        text = [t for k, t in inputs.items() if "input" in k and t is not None][0]
        if begins:
            inputs[self._cache] = self._filled(cache, len(text))
        if mask is not None:
            inputs[which] = nn.functional.pad(mask, (n, 0), value=1)
            if at is None and self._told and not mask[:, 0].all():  # pads do not count
                at = (mask.cumsum(1).long() - 1).clamp(0)[:, -text.shape[1] :]
        if at is not None:
            inputs["position_ids"] = at + n
        return inputs

    def _filled(self, cache, rows):
        """The cache, a new one if None, with the prefix in it for that many rows."""
        (layers, heads, size), config = self.sizes, self.model.config
        kv = self.mlp(self.prompt_embeddings).to(self.model.dtype)
        kv = kv.view(self.n, 2 * layers, 1, heads, size).permute(1, 2, 3, 0, 4)
        kv = kv.expand(-1, rows, -1, -1, -1).unbind()  # each (rows, heads, n, size)
        if cache is None and config.is_encoder_decoder:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache = DynamicCache() if cache is None else cache
        own = getattr(cache, "self_attention_cache", cache)
        for layer in range(layers):
            pair = (1 + config.is_encoder_decoder) * layer % layers
            own.update(kv[2 * pair], kv[2 * pair + 1], layer)
        return cache


def add(model, n, hidden=None):
    """Freeze `model` and return it in a PrefixModel with n keys and values a layer.
    hidden: None, or the width of the MLP that makes them while training. ValueError,
    nothing changed, for a bad value, an encoder, a second soft prompt."""
    for name, value in {"n": n, "hidden": 1 if hidden is None else hidden}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: a whole number of at least 1, not {value!r}")
    if any(type(m).__name__ in ("PromptModel", "PrefixModel") for m in model.modules()):
        raise ValueError("the model has a soft prompt already: take its .model")
    return PrefixModel(_sizes(model), model.requires_grad_(False), n, hidden)


def state_dict(wrapper):
    """{"prompt_embeddings": (n, 2 layers kv)}, folded. ValueError without a prefix."""
    if not isinstance(wrapper, PrefixModel):
        raise ValueError("the model has no prefix: call prefix.add first")
    return {"prompt_embeddings": wrapper.mlp(wrapper.prompt_embeddings).detach()}


def load_state_dict(wrapper, tensors):
    """Fold the wrapper and copy {"prompt_embeddings": tensor} into it. ValueError, and
    nothing changed, for a missing or unexpected name or a wrong shape."""
    own = state_dict(wrapper)
    for name in sorted(own.keys() | tensors.keys()):
        got, want = (str(getattr(d.get(name), "shape", None)) for d in (tensors, own))
        if got != want or name not in own:
            raise ValueError(f"{name}: its shape is {got} here, {want} in the model")
    state_dict(fold(wrapper))["prompt_embeddings"].copy_(tensors["prompt_embeddings"])


def fold(wrapper):
    """Put what the MLP makes in its place, a flat parameter, and return the wrapper."""
    made = state_dict(wrapper)["prompt_embeddings"]
    if wrapper.hidden:
        wrapper.prompt_embeddings, wrapper.hidden = nn.Parameter(made), None
        wrapper.mlp = nn.Sequential()
    return wrapper


def _sizes(model):
    """Layers, key-value heads, size of a head; ValueError if no decoder generates."""
    config = getattr(model, "can_generate", bool)() and model.config
    config = config and config.get_text_config(decoder=True)
    if not (heads := getattr(config, "num_attention_heads", 0)):
        raise ValueError("a prefix needs a model that generates by attention")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    return layers, getattr(config, "num_key_value_heads", None) or heads, size
