r"""Prompt tuning: Lester et al. 2021, arXiv 2104.08691, section 2.

n trained vectors stand before the embedded text of a frozen model; nothing else trains:

$$ \Pr_{\theta;\,P}\,\big(Y \mid [P;\ E(X)]\big) $$

| symbol | shape | in code | start |
|---|---|---|---|
| $P$ | (n, d) | `prompt_embeddings` | random tokens (the paper: of 5,000) |
| $E(X)$ | (batch, tokens, d) | `text` | pretrained, frozen |
| $\theta$ | | `model` | pretrained, frozen |

P is float32 over a 16-bit base. Logits cover n + tokens slots. A row padded on the left
becomes [pads, prompt, text] and its pads take no position, so it answers as it does
alone. Where that cannot be, in BERT or BART, the batch is refused.

Not here: ensembles (section 6), static caches, `generate` from a filled cache, 4-D
masks, `start_positions`.

peft leaves the pads between prompt and text and counts them; has "random" as a standard
normal (here the paper's, uniform in $\pm 0.5$); drops position ids; does not lengthen a
token classifier's labels. For an encoder-decoder, whose prompt stands in the encoder,
it keeps (2n, d) and reads the first n rows alone: `decoder=True`.
"""

import copy
import functools
import inspect

import torch
from torch import nn

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


class PromptModel(nn.Module):
    """A frozen `model` that reads a prompt first; config, device... are the model's."""

    peft_method = "prompt"

    def __init__(self, model, n, rows, decoder):
        super().__init__()
        self.prompt_embeddings = nn.Parameter(rows)
        self.model = model
        self.n = n
        self.decoder = decoder
        self.training = model.training

        self._in_encoder = _is_encoder_decoder(model)
        self._takes_positions = _takes_positions(model)
        self._takes_left_pads = _takes_left_pads(model)
        self._first_position = _first_position(model)
        self._pools_last = _pools_last(model)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @ModelSignature
    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        """What the model returns, over n + tokens slots.

        Args:
            input_ids: (batch, tokens); or give `inputs_embeds`, (batch, tokens, d).
            attention_mask: (batch, tokens), 0 over pads, or None.
            labels: as the model takes them; those of tokens are -100 over the prompt.
            inputs: whatever else the model takes.

        Raises:
            ValueError: unless it gets exactly one of input_ids and inputs_embeds; for
                pads that the model would count or pool; for a static cache.
        """
        if labels is not None:
            inputs["labels"] = labels
        return self.model(**self._with_prompt(input_ids, attention_mask, **inputs))

    def generate(self, *args, **options):
        """The model's own `generate`: a decoder's result starts with input_ids.

        Raises:
            ValueError: as `forward`, and for a cache that holds a text already.
        """
        if self._in_encoder:
            return self.model.generate(**self._with_prompt(*args, **options))

        if _is_filled(_cache(options)):
            raise ValueError("a prompt begins the text: give all of it, and no cache")

        # `generate` calls forward for each token. A shallow copy, whose forward puts
        # the prompt in, leaves the model as it is, for other threads too.
        @functools.wraps(self.model.forward)
        def forward(*args, **inputs):
            return self.model.forward(**self._with_prompt(*args, **inputs))

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

    def _with_prompt(self, input_ids=None, attention_mask=None, **inputs):
        """The model's inputs with the prompt put in, and all that is aligned moved.

        `generate` comes here for each token. After the first the prompt has been read,
        and only the mask and the positions must still count it.
        """
        inputs["input_ids"] = input_ids
        inputs["attention_mask"] = attention_mask
        was_read = self._was_read(inputs)
        self._check_pads(attention_mask)
        order = _order(attention_mask, self.n)

        fill = {"attention_mask": 1}  # what gets n more columns, and of which value
        if not was_read:
            prompt = self.prompt_embeddings[: self.n]
            inputs["inputs_embeds"] = _join(prompt, self._embedded(inputs), order)
            fill["token_type_ids"] = 0
            if _are_of_tokens(inputs.get("labels")) and not self._in_encoder:
                fill["labels"] = -100  # no loss on the prompt
        for name, value in fill.items():
            t = inputs.get(name)
            if t is not None:
                inputs[name] = _join(t.new_full((self.n,), value), t, order)

        positions = self._positions(inputs, order, was_read)
        if positions is not None:
            inputs["position_ids"] = positions
        return inputs

    def _positions(self, inputs, order, was_read):
        """Where the slots stand, the prompt first; None where the model counts them."""
        given = inputs.get("position_ids")
        if given is not None and was_read:
            return given + self.n
        if given is not None:
            start = given.min().clamp(max=self._first_position)
            first = torch.arange(self.n, device=given.device) + start
            return _join(first, given + self.n, order)

        if order is None or not self._takes_positions:
            return None
        counted = inputs["attention_mask"].cumsum(1).long() - 1  # pads do not count
        counted = counted.clamp(0) + self._first_position
        if not was_read:
            return counted
        ids = inputs["input_ids"]
        text = inputs["inputs_embeds"] if ids is None else ids
        return counted[:, -text.shape[1] :]

    def _was_read(self, inputs):
        """Whether the prompt is in the cache, or in the encoder's outputs, already."""
        if self._in_encoder:
            return inputs.get("encoder_outputs") is not None
        return _is_filled(_cache(inputs))

    def _check_pads(self, mask):
        """ValueError for pads that would be counted as text, or pooled."""
        if mask is None:
            return
        if mask.dim() != 2:
            raise ValueError("the attention mask must be (batch, tokens)")

        if not mask.any(1).all():
            raise ValueError("a row has pads alone, or its first chunk has")
        if not mask[:, 0].all() and not self._takes_left_pads:
            raise ValueError("this model would count left pads: pad on the right")
        if not mask[:, -1].all() and self._pools_last:
            raise ValueError("this model reads its answer last: pad on the left")

    def _embedded(self, inputs):
        """The text's embeddings (batch, tokens, d), given or looked up."""
        ids = inputs.pop("input_ids")
        text = inputs.get("inputs_embeds")
        if (ids is None) == (text is None):
            raise ValueError("give one of the two, input_ids or inputs_embeds")
        return self.model.get_input_embeddings()(ids) if text is None else text


def add(model, n, init="vocabulary", decoder=False):
    """Freeze `model` and return it in a PromptModel with n trained vectors.

    Args:
        model: any module with token embeddings that takes `inputs_embeds`.
        n: the prompt's length in tokens, a whole number.
        init: where the vectors start: "vocabulary" (random tokens), "random" (uniform
            in +-0.5), or token ids, a 1-D tensor, repeated or cut to length n.
        decoder: also carry the n idle rows that peft keeps for an encoder-decoder,
            (2n, d) in all.

    Returns:
        A PromptModel, whose `prompt_embeddings` is (n, d).

    Raises:
        ValueError: the model unchanged, for a bad value, a model without token
            embeddings, and one that carries a method already.
    """
    surgery.refuse_carried(model)
    model = surgery.uncompiled(model)
    surgery.check_whole("n", n, 1)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError("the model has no token embeddings to put a prompt before")
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise ValueError("the model takes no embeddings in place of token ids")
    if decoder and not _is_encoder_decoder(model):
        raise ValueError("decoder=True is for an encoder-decoder: this model is none")

    rows = _start(embedding, 2 * n if decoder else n, init)
    return PromptModel(model.requires_grad_(False), n, rows, bool(decoder))


def state_dict(wrapper):
    """The trained tensors by their names in a file.

    Returns:
        {"prompt_embeddings": (n, d)}; (2n, d) with decoder=True.

    Raises:
        ValueError: for a model without a prompt.
    """
    wrapper = surgery.uncompiled(wrapper)
    surgery.refuse_containers(wrapper)
    if not isinstance(wrapper, PromptModel):
        raise ValueError("the model has no prompt: call prompt.add first")
    return {"prompt_embeddings": wrapper.prompt_embeddings.detach()}


def load_state_dict(wrapper, tensors):
    """Copy {"prompt_embeddings": tensor} into the wrapper.

    Raises:
        ValueError: nothing copied, for a missing or unexpected name, a wrong shape.
    """
    surgery.load(state_dict(wrapper), tensors)


# Where the prompt starts


def _start(embedding, count, init):
    """The first values of the prompt, (count, d), in float32 or more."""
    size = embedding.weight.shape[0]
    device = embedding.weight.device
    if isinstance(init, torch.Tensor):
        ids = _repeated(init, count, size).to(device)
        init = "ids"
    elif init in ("vocabulary", "random"):
        ids = torch.randint(size, (count,), device=device)
    else:
        raise ValueError(f'init: "vocabulary", "random" or token ids, not {init!r:.60}')

    start = embedding(ids).detach()  # (count, d), scaled if the module scales
    start = start.to(torch.promote_types(start.dtype, torch.float32))
    return torch.rand_like(start) - 0.5 if init == "random" else start


def _repeated(ids, count, size):
    """Token ids of a vocabulary of that size, repeated or cut to `count`."""
    listed = ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64)
    if not listed or not len(ids) or ids.min() < 0 or ids.max() >= size:
        raise ValueError(f"init: token ids are a 1-D tensor of 0 to {size - 1}")
    times = -(-count // len(ids))  # rounded up
    return ids.repeat(times)[:count]


# Where the prompt stands


def _order(mask, n):
    """Indices (batch, n + tokens) that put left pads before the prompt, or None."""
    if mask is None or mask[:, 0].all():
        return None
    rank = 2 * (mask.cumsum(1) > 0)  # pads 0, the prompt 1, the text 2
    return nn.functional.pad(rank, (n, 0), value=1).argsort(dim=1, stable=True)


def _join(first, rest, order):
    """first (n, ...) before each row of rest (batch, tokens, ...), then in `order`."""
    both = torch.cat([first.to(rest).expand(len(rest), *first.shape), rest], 1)
    return both if order is None else both[torch.arange(len(both))[:, None], order]


def _are_of_tokens(labels):
    """Whether each token has a label, not a row one, or a number for each class."""
    return labels is not None and labels.dim() == 2 and labels.dtype == torch.long


# What a model does with pads and caches


def _is_encoder_decoder(model):
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _takes_positions(model):
    return "position_ids" in inspect.signature(model.forward).parameters


def _first_position(model):
    """0; in RoBERTa's family, whose positions count from the pad's id, one after it."""
    for m in model.modules():
        if hasattr(m, "create_position_ids_from_inputs_embeds"):
            return m.padding_idx + 1
    return 0


def _takes_left_pads(model):
    """Whether a row behind pads answers as it does alone.

    Decoders that are told the positions do. BERT pools the first slot, BART counts all
    slots. T5 and MPT measure distances, Bloom counts by the mask, Mamba not at all.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family is None:
        return True  # no model of transformers: left to itself
    if family == "recurrent_gemma":
        return False  # its state reads the pads

    if config.is_encoder_decoder:
        return hasattr(config, "relative_attention_num_buckets")
    if not _takes_positions(model):
        return family in ("bloom", "mpt", "mamba", "mamba2", "falcon_mamba")
    return _is_causal(model) or model.can_generate()


def _pools_last(model):
    """Whether it is a decoder that classifies: it does so by the last slot."""
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return classifies and (hasattr(model, "score") or _is_causal(model))


def _is_causal(model):
    return any(getattr(m, "is_causal", False) for m in model.modules())


def _cache(inputs):
    """The cache among the inputs, or None: its name has changed with transformers 5.24.

    Raises:
        ValueError: for a static cache, which has no room for the prompt.
    """
    names = ("cache", "past_key_values", "cache_params", "state")  # Mamba's, RWKV's
    given = [inputs[name] for name in names if inputs.get(name) is not None]
    cache = given[0] if given else None
    if any(hasattr(layer, "max_cache_len") for layer in getattr(cache, "layers", [])):
        raise ValueError("a static cache has no room for a prompt: use a dynamic one")
    return cache


def _is_filled(cache):
    """Whether a cache holds a text already."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return cache is not None
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # Mamba's has states and no length
        return cache.has_previous_state()
