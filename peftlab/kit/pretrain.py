r"""Train tiny-decoder from nothing: `make models` (some fifteen minutes on two cores).

A Llama of under one million parameters with grouped-query attention and tied embeddings
learns to continue the records of `kit.data` in ten base languages: dates, amounts,
countries, rendered dates and refusals. The loss is on every token of a record, as in
any pretraining.

Writes an ordinary Hugging Face folder, `peftlab/models/tiny-decoder`, and beside the
weights `training.json`: settings, versions, the loss curve and exact match on records
of the test split, which training never saw."""

import json
import platform
import random
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftlab.kit import data
from peftlab.kit.measure import exact_match
from peftlab.kit.train import collate

SHARES = dict(dates=0.42, amounts=0.20, countries=0.10, render=0.18, refuse=0.10)
FOLDER = Path(__file__).parents[1] / "models" / "tiny-decoder"


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


def batches_by_length(lines, tokenizer, size, seed):
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
        yield collate([lines[i] for i in group], tokenizer, loss_on="line")


def pretrain(steps=3000, size=96, lr=3e-3, n=300_000, seed=0):
    """Returns the trained model, its tokenizer and the log that `training.json`
    holds."""
    torch.manual_seed(seed)
    lines = data.mixture(SHARES, data.BASE_LANGUAGES, n, seed=seed)
    tokenizer = train_tokenizer([r.line for r in lines[:100_000]])
    model = new_model(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    curve, begun, epoch, source = [], time.time(), 0, iter(())
    for step in (bar := trange(steps, desc="tiny-decoder")):
        if (batch := next(source, None)) is None:
            source = batches_by_length(lines, tokenizer, size, f"{seed} {epoch}")
            batch, epoch = next(source), epoch + 1
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            curve.append([step, round(loss.item(), 4)])
            bar.set_postfix(loss=f"{loss.item():.3f}")
    settings = dict(steps=steps, batch=size, lr=lr, records=n, seed=seed, shares=SHARES)
    log = dict(
        settings=settings,
        minutes=round((time.time() - begun) / 60, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        versions=dict(torch=torch.__version__, python=platform.python_version()),
        threads=torch.get_num_threads(),
        loss=curve,
    )
    return model.eval(), tokenizer, log


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


def main():
    """Train, measure, and put the new folder in the old one's place when it is
    whole."""
    model, tokenizer, log = pretrain()
    log["exact_match"] = marks(model, tokenizer)
    for kind, by_language in log["exact_match"].items():
        print(f"{kind:16}", "  ".join(f"{k} {v:.2f}" for k, v in by_language.items()))
    fresh = FOLDER.with_name("tiny-decoder.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    shutil.rmtree(FOLDER, ignore_errors=True)
    fresh.rename(FOLDER)
    print(f"wrote {FOLDER}")


if __name__ == "__main__":
    main()
