"""One plain training loop, and the batches it eats."""

import random
import sys

import torch
from tqdm.auto import tqdm
from transformers import BatchEncoding, get_linear_schedule_with_warmup


def collate(records, tokenizer, loss_on="answer"):
    """Tensors for a batch of records, padded on the right.

    Args:
        records: a list of `data.Record`.
        tokenizer: of a causal model.
        loss_on: "answer", or "line" for every token.

    Returns:
        {input_ids, attention_mask, labels: (batch, tokens)}, which has a `to(device)`.
        labels is -100 where there is no loss: on padding and, with loss_on="answer", on
        the prompt.
    """
    rows, labels = [], []
    prompts = tokenizer([r.prompt for r in records])["input_ids"]
    answers = [f" {r.answer}" for r in records]
    answers = tokenizer(answers, add_special_tokens=False)["input_ids"]
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = answer + [tokenizer.eos_token_id]
        rows.append(prompt + answer)
        labels.append(
            ([-100] * len(prompt) if loss_on == "answer" else prompt) + answer
        )
    longest = max(map(len, rows))

    def padded(lists, fill):
        return torch.tensor([row + [fill] * (longest - len(row)) for row in lists])

    tensors = dict(
        input_ids=padded(rows, tokenizer.pad_token_id),
        attention_mask=padded([[1] * len(row) for row in rows], 0),
        labels=padded(labels, -100),
    )
    return BatchEncoding(tensors)


def collate_pairs(records, tokenizer):
    """Tensors for a batch of records for an encoder-decoder model.

    The encoder takes the prompt, the decoder learns the answer; the model shifts the
    labels to the right by itself.

    Args:
        records: a list of `data.Record`.
        tokenizer: of the model.

    Returns:
        {input_ids, attention_mask: (batch, tokens of the prompt), labels: (batch,
        tokens of the answer), -100 on padding}, which has a `to(device)`.
    """
    prompts = tokenizer([r.prompt for r in records], return_tensors="pt", padding=True)
    answers = tokenizer([r.answer for r in records], add_special_tokens=False)
    answers = [row + [tokenizer.eos_token_id] for row in answers["input_ids"]]
    longest = max(map(len, answers))
    labels = [row + [-100] * (longest - len(row)) for row in answers]

    tensors = {key: prompts[key] for key in ("input_ids", "attention_mask")}
    return BatchEncoding(tensors | dict(labels=torch.tensor(labels)))


def batches(records, size, seed=0):
    """Endless lists of `size` records, shuffled anew each time all have been seen."""
    rng, queue = random.Random(seed), []
    while True:
        while len(queue) < size:
            queue += rng.sample(records, len(records))
        yield queue[:size]
        queue = queue[size:]


def checkpoint_activations(model, **settings):
    """Have a transformers model store only what goes into each layer.

    The rest is computed a second time in the backward pass. transformers 5.23 renamed
    its method for this; both names are tried.

    Args:
        model: a transformers model; it is changed in place.
        **settings: of `torch.utils.checkpoint`, such as `use_reentrant=False`.

    Returns:
        The same model.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        enable = model.gradient_checkpointing_enable

    enable(settings or None)
    return model


def train(
    model,
    tokenizer,
    records,
    steps,
    lr,
    batch_size=20,
    seed=0,
    progress=True,
    groups=None,
    max_grad_norm=1.0,
):
    """Train a causal or encoder-decoder model on the answers of `records`, with AdamW.

    Batches are drawn anew each time all records have been seen.

    Args:
        model: a causal or encoder-decoder model; what has requires_grad is trained.
        tokenizer: the model's.
        records: a list of `data.Record`.
        steps: how many, at least 1.
        lr: the peak learning rate. It rises from zero over a tenth of the steps and
            falls to zero again, both linearly, as in transformers' Trainer.
        batch_size: records a step.
        seed: of the order of the records.
        progress: show a bar, on a terminal alone: never in a notebook's stored outputs.
        groups: AdamW's parameter groups, each with a learning rate of its own, in place
            of one group at lr (`lora_plus.parameter_groups` makes such).
        max_grad_norm: longer gradients are shortened to this norm, all parameters taken
            together, as transformers' Trainer does; None leaves them as they are.

    Returns:
        The loss of each step, a list of floats.

    Raises:
        ValueError: nothing is trainable, or there are no records or steps.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "nothing to train: no parameter of the model has requires_grad"
        )
    if not records or steps < 1:
        raise ValueError("train needs at least one record and one step")
    torch.manual_seed(seed)
    source, losses = batches(records, batch_size, seed), []
    optimizer = torch.optim.AdamW(groups or trainable, lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    config = getattr(model, "config", None)
    pairs = getattr(config, "is_encoder_decoder", False)
    to_tensors = collate_pairs if pairs else collate
    model.train()
    quiet = not (progress and sys.stderr.isatty())
    for _ in tqdm(range(steps), desc="train", disable=quiet, leave=False):
        batch = to_tensors(next(source), tokenizer).to(model.device)
        loss = model(**batch).loss
        loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
