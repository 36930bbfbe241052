r"""Train the small models from nothing: `make models` (half an hour on two cores).

tiny-decoder: a Llama of under one million parameters with grouped-query attention and
tied embeddings learns to continue the records of `kit.data` in ten base languages:
dates, amounts, countries, rendered dates and refusals. The loss is on every token of a
record, as in any pretraining.

tiny-seq2seq: a T5 of one and a half million parameters, with tiny-decoder's tokenizer,
learns to translate dates and amounts between the ten base languages.

Writes two ordinary Hugging Face folders into `peftlab/models`, and beside the weights
`training.json`: settings, versions, the loss curve and exact match on records of the
test split, which training never saw. `python -m peftlab.kit.pretrain NAME` trains
one."""

import functools
import itertools
import json
import platform
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import trange
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peftlab.kit import data
from peftlab.kit.measure import exact_match
from peftlab.kit.train import collate, collate_pairs

SHARES = dict(dates=0.42, amounts=0.20, countries=0.10, render=0.18, refuse=0.10)
MODELS = Path(__file__).parents[1] / "models"


def train_tokenizer(lines, size=1024):
    """A byte-level BPE tokenizer that keeps digits apart and adds `<s>` by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()

    bpe.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )

    bpe.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)]
    )

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def new_model(vocabulary=1024):
    """tiny-decoder with random weights: 4 layers of width 128, 4 query and 2 key-value
    heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def new_seq2seq(vocabulary=1024):
    """tiny-seq2seq with random weights: a T5 (version 1.1: gated GELU) with 3 layers of
    encoder and 3 of decoder, width 128, 4 heads."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=320,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


def batches_by_length(lines, tokenizer, size, seed, to_tensors):
    """One pass over the texts, those of about one length together: little padding.

    (Fine-tuning does not do this: over a few hundred steps it costs accuracy.)"""
    rng = random.Random(seed)
    order = rng.sample(range(len(lines)), len(lines))
    chunk = 50 * size
    groups = []
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk], key=lambda i: len(lines[i].line))
        groups += [part[i : i + size] for i in range(0, len(part) - size + 1, size)]
    rng.shuffle(groups)
    for group in groups:
        yield to_tensors([lines[i] for i in group], tokenizer)


def optimize(model, source, steps, lr, title):
    """AdamW with one cycle of the learning rate; returns minutes and the loss curve."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    curve, begun = [], time.time()
    model.train()
    for step in (bar := trange(steps, desc=title)):
        loss = model(**next(source)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            curve.append([step, round(loss.item(), 4)])
            bar.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()
    return round((time.time() - begun) / 60, 1), curve


def endless(lines, tokenizer, size, seed, to_tensors):
    """Pass after pass of `batches_by_length`."""
    for epoch in itertools.count():
        yield from batches_by_length(
            lines, tokenizer, size, f"{seed} {epoch}", to_tensors
        )


def log_of(model, minutes, curve, **settings):
    """What `training.json` holds, but for the scores."""
    return dict(
        settings=settings,
        minutes=minutes,
        parameters=sum(p.numel() for p in model.parameters()),
        versions=dict(torch=torch.__version__, python=platform.python_version()),
        threads=torch.get_num_threads(),
        loss=curve,
    )


def pretrain(steps=3000, size=96, lr=3e-3, n=300_000, seed=0):
    """Returns tiny-decoder, its tokenizer and the log that `training.json` holds."""
    torch.manual_seed(seed)
    lines = data.mixture(SHARES, data.BASE_LANGUAGES, n, seed=seed)
    tokenizer = train_tokenizer([r.line for r in lines[:100_000]])
    model = new_model(len(tokenizer))
    whole_lines = functools.partial(collate, loss_on="line")
    source = endless(lines, tokenizer, size, seed, whole_lines)
    minutes, curve = optimize(model, source, steps, lr, "tiny-decoder")
    settings = dict(steps=steps, batch=size, lr=lr, records=n, seed=seed, shares=SHARES)
    return model, tokenizer, log_of(model, minutes, curve, **settings)


def pretrain_seq2seq(tokenizer, steps=4000, size=96, lr=3e-3, n=300_000, seed=0):
    """Returns tiny-seq2seq and the log that `training.json` holds."""
    torch.manual_seed(seed)
    lines = data.mixture({"translate": 1}, data.BASE_LANGUAGES, n, seed=seed)
    model = new_seq2seq(len(tokenizer))
    source = endless(lines, tokenizer, size, seed, collate_pairs)
    minutes, curve = optimize(model, source, steps, lr, "tiny-seq2seq")
    settings = dict(steps=steps, batch=size, lr=lr, records=n, seed=seed)
    return model, log_of(model, minutes, curve, **settings)


def marks(model, tokenizer, n=200):
    """Exact match on n test records of each kind and language, as {kind: {language:
    share}}."""
    table = {
        kind: {
            language: exact_match(
                model, tokenizer, data.records(kind, language, n, "test")
            )
            for language in data.BASE_LANGUAGES
        }
        for kind in ("dates", "amounts", "render")
    }

    table["refuse"] = {
        language: exact_match(
            model, tokenizer, data.records("refuse", language, 50, "test")
        )
        for language in data.BASE_LANGUAGES
    }

    table["held_back_dates"] = {
        language: exact_match(
            model, tokenizer, data.records("dates", language, n, "test")
        )
        for language in data.HELD_BACK
    }
    return table


def marks_seq2seq(model, tokenizer, n=200):
    """Exact match on n test records into each language, as {kind: {language:
    share}}."""
    groups = dict(translate=data.BASE_LANGUAGES, held_back=data.HELD_BACK)
    return {
        name: {
            language: exact_match(
                model, tokenizer, data.records("translate", language, n, "test")
            )
            for language in languages
        }
        for name, languages in groups.items()
    }


def ship(name, model, tokenizer, log):
    """Put a folder in the old one's place when it is whole."""
    for kind, by_language in log["exact_match"].items():
        print(f"{kind:16}", "  ".join(f"{k} {v:.2f}" for k, v in by_language.items()))
    folder = MODELS / name
    fresh = folder.with_name(f"{name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    print(f"wrote {folder}")


def main(names):
    """Train, measure and ship these models, by default both."""
    unknown = set(names) - {"tiny-decoder", "tiny-seq2seq"}
    if unknown:
        raise SystemExit(f"no model {unknown.pop()!r}: tiny-decoder or tiny-seq2seq")

    if not names or "tiny-decoder" in names:
        model, tokenizer, log = pretrain()
        log["exact_match"] = marks(model, tokenizer)
        ship("tiny-decoder", model, tokenizer, log)
    if not names or "tiny-seq2seq" in names:
        tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-decoder")
        model, log = pretrain_seq2seq(tokenizer)
        log["exact_match"] = marks_seq2seq(model, tokenizer)
        ship("tiny-seq2seq", model, tokenizer, log)


if __name__ == "__main__":
    main(sys.argv[1:])
