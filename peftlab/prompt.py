r"""Prompt tuning: Lester et al. 2021, arXiv 2104.08691, section 2.

n trained vectors stand before the embedded text of a frozen model; nothing else trains:

$$ \Pr_{\theta;\,P}\,\big(Y \mid [P;\ E(X)]\big) $$

| symbol | shape | in code | start |
|---|---|---|---|
| $P$ | (n, d) | `prompt_embeddings` | random tokens (the paper: of 5,000) |
| $E(X)$ | (batch, tokens, d) | `text` | pretrained, frozen |
| $\theta$ | | `model` | pretrained, frozen |

P is float32 over a 16-bit base. Logits cover n + tokens slots.

A row padded on the left becomes [pads, prompt, text]. Its pads take no position, so it
answers as it does alone. Models that count every slot, such as BERT and BART, refuse
left pads.

Not here: ensembles (section 6), static caches, `generate` from a filled cache, 4-D
masks, `start_positions`.

peft differs in five points:

- It leaves left pads between prompt and text, and counts them as positions.
- Its "random" is a standard normal. Here it is the paper's, uniform in $\pm 0.5$.
- It drops position ids. Here the text's move by n.
- It leaves a token classifier's labels as they are. Here they grow by n.
- For an encoder-decoder, whose prompt stands in the encoder, it stores (2n, d) and only
  reads the first n rows. `decoder=True` stores as many.
"""

import torch
from torch import nn

from . import surgery


class PromptModel(nn.Module):
    """A frozen `model` that reads a prompt first; config, device... are the model's."""

    peft_method = "prompt"

    def __init__(self, model, n, rows, decoder):
        super().__init__()
        self.prompt_embeddings = nn.Parameter(rows)  # (n, d), or (2n, d)
        self.model = model
        self.n = n
        self.decoder = decoder
        self.training = model.training

    @surgery.ModelSignature
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

    def _with_prompt(self, input_ids=None, attention_mask=None, **inputs):
        """The model's inputs with the prompt before the text, and the rest to match.

        `generate` comes here for each token. After the first the prompt has been read,
        and only the mask and the positions must still count it.
        """
        inputs["input_ids"] = input_ids
        mask = attention_mask
        was_read = _was_read(self.model, inputs)
        _check_pads(self.model, mask)
        order = _order(mask, self.n)

        if mask is not None:
            ones = mask.new_ones(self.n)
            inputs["attention_mask"] = _join(ones, mask, order)
        positions = self._positions(inputs, mask)  # (batch, tokens) or None
        if positions is not None:
            inputs["position_ids"] = positions + self.n
        if was_read:
            return inputs

        text = self._embedded(inputs)
        prompt = self.prompt_embeddings[: self.n]
        inputs["inputs_embeds"] = _join(prompt, text, order)

        if positions is not None:
            first = surgery.first_position(self.model)
            places = torch.arange(self.n, device=positions.device) + first
            inputs["position_ids"] = _join(places, positions + self.n, order)

        types = inputs.get("token_type_ids")
        if types is not None:
            inputs["token_type_ids"] = _join(types.new_zeros(self.n), types, order)

        labels = inputs.get("labels")
        if _are_of_tokens(labels) and not _is_encoder_decoder(self.model):
            no_loss = labels.new_full((self.n,), -100)
            inputs["labels"] = _join(no_loss, labels, order)
        return inputs

    def _positions(self, inputs, mask):
        """Where the text stands without a prompt, as given or, with left pads, counted;
        None where the model counts right by itself."""
        given = inputs.get("position_ids")
        if given is not None or not surgery.has_left_pads(mask):
            return given
        if not surgery.takes(self.model, "position_ids"):
            return None
        tokens = surgery.given_text(inputs).shape[1]
        return surgery.positions(mask, tokens, self.model)

    def _embedded(self, inputs):
        """The text's embeddings (batch, tokens, d), given or looked up."""
        ids = inputs.pop("input_ids")
        text = inputs.get("inputs_embeds")
        if (ids is None) == (text is None):
            raise ValueError("give one of the two, input_ids or inputs_embeds")
        if text is None:
            text = self.model.get_input_embeddings()(ids)
        return text

    def generate(self, inputs=None, *args, **options):
        """The model's own `generate`: a decoder's result starts with input_ids.

        Raises:
            ValueError: as `forward`, and for a cache that holds a text already.
        """
        if _is_encoder_decoder(self.model):
            input_ids = options.pop("input_ids", inputs)
            options = self._with_prompt(input_ids, **options)
            return self.model.generate(None, *args, **options)
        return surgery.generate(self.model, self._with_prompt, inputs, *args, **options)

    def state_dict(self, *args, **options):
        return surgery.untied(super().state_dict(*args, **options))

    def __getattr__(self, name):
        return surgery.attribute(self, name)


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
        ValueError: for a bad value, a model without token embeddings, and one that
            carries a method already. Then the model is unchanged.
    """
    surgery.refuse_carried(model)
    model = surgery.uncompiled(model)
    surgery.check_whole("n", n, 1)
    surgery.check_flag("decoder", decoder)

    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError("the model has no token embeddings to put a prompt before")
    if not surgery.takes(model, "inputs_embeds"):
        raise ValueError("the model takes no embeddings in place of token ids")
    if decoder and not _is_encoder_decoder(model):
        raise ValueError("decoder=True is for an encoder-decoder: this model is none")

    rows = _start(embedding, 2 * n if decoder else n, init)
    return PromptModel(model.requires_grad_(False), n, rows, decoder)


def state_dict(wrapper):
    """The trained tensors by their names in a file.

    Returns:
        {"prompt_embeddings": (n, d)}; (2n, d) with decoder=True.

    Raises:
        ValueError: for a model without a prompt.
    """
    wrapper = surgery.around(wrapper, PromptModel)
    return {"prompt_embeddings": wrapper.prompt_embeddings.detach()}


def load_state_dict(wrapper, tensors):
    """Copy {"prompt_embeddings": tensor} into the wrapper.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape. Then nothing is
            copied.
    """
    surgery.load(state_dict(wrapper), tensors)


# Where the prompt starts


def _start(embedding, count, init):
    """The first values of the prompt, (count, d)."""
    size = len(embedding.weight)
    if isinstance(init, torch.Tensor):
        return _embed(embedding, _repeated(init, count, size))
    if init not in ("vocabulary", "random"):
        raise ValueError(f'init: "vocabulary", "random" or token ids, not {init!r:.60}')

    ids = torch.randint(size, (count,), device=embedding.weight.device)
    tokens = _embed(embedding, ids)
    if init == "random":
        return torch.rand_like(tokens) - 0.5
    return tokens


def _embed(embedding, ids):
    """Vectors (count, d) in float32 or more, scaled if the embedding scales."""
    vectors = embedding(ids.to(embedding.weight.device)).detach()
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


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
    if not surgery.has_left_pads(mask):
        return None
    rank = 2 * (mask.cumsum(1) > 0)  # pads 0, the prompt 1, the text 2
    return nn.functional.pad(rank, (n, 0), value=1).argsort(dim=1, stable=True)


def _join(first, rest, order):
    """first (n, ...) before each row of rest (batch, tokens, ...), then in `order`."""
    first = first.to(rest).expand(len(rest), *first.shape)
    both = torch.cat([first, rest], 1)
    if order is None:
        return both
    rows = torch.arange(len(both))[:, None]
    return both[rows, order]


def _was_read(model, inputs):
    """Whether the prompt is in the cache, or in the encoder's outputs, already."""
    if _is_encoder_decoder(model):
        return inputs.get("encoder_outputs") is not None
    return surgery.is_filled(surgery.cache_in(inputs))


def _are_of_tokens(labels):
    """Whether labels are (batch, tokens): not one a row, nor a float for each class."""
    return labels is not None and labels.dim() == 2 and labels.dtype == torch.long


# What a model does with pads


def _check_pads(model, mask):
    """ValueError for pads that would be counted as text, or pooled."""
    if mask is None:
        return
    if mask.dim() != 2:
        raise ValueError("the attention mask must be (batch, tokens)")
    if not mask.any(1).all():
        raise ValueError("a row, or its first part of several, holds pads alone")

    if surgery.has_left_pads(mask) and not _reads_past_left_pads(model):
        raise ValueError("this model would count left pads: pad on the right")
    if not mask[:, -1].all() and _pools_last(model):
        raise ValueError("this model reads its answer last: pad on the left")


def _reads_past_left_pads(model):
    """Whether a row that begins with pads answers as it does alone, if the pads stand
    before the prompt: in MPT, which measures distances, and Mamba, whose state passes
    over them, too."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    before_the_prompt = family in ("mpt", "mamba", "mamba2", "falcon_mamba")
    return before_the_prompt or surgery.takes_left_pads(model)


def _pools_last(model):
    """Whether it is a decoder that classifies: it does so by the last slot."""
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return classifies and (hasattr(model, "score") or surgery.is_causal(model))


def _is_encoder_decoder(model):
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False)
