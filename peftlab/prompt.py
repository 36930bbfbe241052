r"""Prompt tuning: Lester et al. 2021, arXiv 2104.08691, section 2.

n trained vectors stand before the embedded text of a frozen model; nothing else trains:

$$ \Pr_{\theta;\,P}\,\big(Y \mid [P;\ E(X)]\big) $$

| symbol | shape | in code | start |
|---|---|---|---|
| $P$ | (n, d) | `prompt_embeddings` | random tokens (the paper: of 5,000) |
| $E(X)$ | (batch, tokens, d) | `x` | pretrained, frozen |
| $\theta$ | | `model` | pretrained, frozen |

P is float32 over a 16-bit base. Logits cover n + tokens slots. A row padded on the left
becomes [pads, prompt, text], its pads take no position: it answers as it does alone.
Not here: ensembles (section 6), static caches, 4-D masks, `start_positions`; pads on
the left where a model pools or counts slots (BERT, BART), on the right where a decoder
classifies. peft leaves pads between prompt and text and counts them; has "random" as a
standard normal (here the paper's, uniform in $\pm 0.5$); drops position ids; does not
lengthen a token classifier's labels. For an encoder-decoder, whose prompt stands in the
encoder, it keeps (2n, d) and reads the first n rows alone: `decoder=True`.
"""

import inspect

import torch
from torch import nn

from . import surgery


class PromptModel(nn.Module):
    """A frozen `model` that reads a prompt first; config, device... are the model's."""

    def __init__(self, model, n, rows, decoder, encodes):
        super().__init__()
        self.model = model
        self.n = n
        self.prompt_embeddings = nn.Parameter(rows)
        self.decoder = decoder
        self.training = model.training
        self._encodes = encodes
        self._told = "position_ids" in inspect.signature(model.forward).parameters

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        """What the model returns, over n + tokens slots. input_ids (batch, tokens) or
        inputs_embeds (batch, tokens, d), attention_mask, labels and whatever else the
        model takes. ValueError unless it gets exactly one of the first two."""
        return self.model(**self._put_in(input_ids, attention_mask, **inputs))

    def generate(self, *args, **options):
        """The model's own `generate`: a decoder's result starts with input_ids."""
        if self._encodes:
            return self.model.generate(**self._put_in(*args, **options))
        with self.model.register_forward_pre_hook(
            lambda _, args, inputs: (args, self._put_in(**inputs)), with_kwargs=True
        ):
            return self.model.generate(*args, **options)

    def _put_in(self, input_ids=None, attention_mask=None, **inputs):
        """The model's inputs with the prompt put in, and all that is aligned moved.

        `generate` comes here at each step. After the first the prompt has been read,
        and only the mask and the positions must still count it.
        """
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        order = _order(attention_mask, self.n)
        begins = not self._was_read(inputs)

        fill = {"attention_mask": 1}  # what gets n more columns, and with which value
        if begins:
            inputs["inputs_embeds"] = _join(
                self.prompt_embeddings[: self.n], self._embedded(inputs), order
            )
            fill["token_type_ids"] = 0
        if begins and not self._encodes:
            fill["labels"] = -100  # no loss on the prompt
        for name, value in fill.items():
            t = inputs.get(name)
            if t is None or t.dim() != 2:
                continue
            if name == "labels" and t.dtype != torch.long:
                continue  # one row of numbers for each text, as for several classes
            inputs[name] = _join(t.new_full((self.n,), value), t, order)

        if inputs.get("position_ids") is not None:
            at = inputs["position_ids"] + self.n
            first = torch.arange(self.n)
            inputs["position_ids"] = _join(first, at, order) if begins else at
        elif order is not None and self._told:  # else the model would count the pads
            at = (inputs["attention_mask"].cumsum(1).long() - 1).clamp(0)
            inputs["position_ids"] = at if begins else at[:, -input_ids.shape[1] :]
        return inputs

    def _was_read(self, inputs):
        """Whether the prompt is in the cache, or in the encoder's outputs, already."""
        if self._encodes:
            return inputs.get("encoder_outputs") is not None
        cache = inputs.get("cache") or inputs.get("past_key_values")  # until 5.23
        return bool(cache and cache.get_seq_length())

    def _embedded(self, inputs):
        """The text's embeddings (batch, tokens, d), given or looked up."""
        ids, x = inputs.pop("input_ids"), inputs.get("inputs_embeds")
        if (ids is None) == (x is None):
            raise ValueError("give one of the two, input_ids or inputs_embeds")
        return self.model.get_input_embeddings()(ids) if x is None else x


def add(model, n, init="vocabulary", decoder=False):
    """Freeze `model` and return it in a PromptModel with n trained vectors, (n, d).
    init: where they start: "vocabulary", "random" (uniform in +-0.5), or token ids, a
    1-D tensor, repeated or cut to length. decoder: also carry the n idle rows that peft
    keeps for an encoder-decoder, (2n, d). ValueError, nothing changed, for a bad value,
    a model without token embeddings, a second soft prompt."""
    if type(n) is not int or n < 1:
        raise ValueError(f"n must be a whole number of at least 1, not {n!r}")
    if any(type(m).__name__ in ("PromptModel", "PrefixModel") for m in model.modules()):
        raise ValueError("the model has a soft prompt already: take its .model")
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError("the model has no token embeddings to put a prompt before")
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decoder and not encodes:
        raise ValueError("decoder=True is for an encoder-decoder: this model is none")
    rows = _start(embedding, 2 * n if decoder else n, init)
    return PromptModel(model.requires_grad_(False), n, rows, bool(decoder), encodes)


def state_dict(wrapper):
    """{"prompt_embeddings": (n, d)}, (2n, d) with decoder=True. ValueError without."""
    if not isinstance(wrapper, PromptModel):
        raise ValueError("the model has no prompt: call prompt.add first")
    return {"prompt_embeddings": wrapper.prompt_embeddings.detach()}


def load_state_dict(wrapper, tensors):
    """Copy {"prompt_embeddings": tensor} into the wrapper. Raises ValueError, nothing
    copied, for a missing or unexpected name or a wrong shape."""
    surgery.load(state_dict(wrapper), tensors)


def _start(embedding, rows, init):
    size, device = embedding.weight.shape[0], embedding.weight.device
    if isinstance(init, torch.Tensor):
        listed = init.dim() == 1 and init.dtype in (torch.int32, torch.int64)
        if not listed or not len(init) or init.min() < 0 or init.max() >= size:
            raise ValueError(f"init: token ids are a 1-D tensor of 0 to {size - 1}")
        ids, init = init.repeat(-(-rows // len(init)))[:rows].to(device), "ids"
    elif init in ("vocabulary", "random"):
        ids = torch.randint(size, (rows,), device=device)
    else:
        raise ValueError(f'init: "vocabulary", "random" or token ids, not {init!r}')
    start = embedding(ids).detach()  # (rows, d), scaled if the module scales
    start = start.to(torch.promote_types(start.dtype, torch.float32))
    return torch.rand_like(start) - 0.5 if init == "random" else start


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
