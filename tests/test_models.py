"""The shipped models: ordinary folders, small, and good at what the book needs.

Exact match here is on other test records than in training.json, which `make models`
writes; the marks are the same.
"""

import json
import re
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from peftlab.kit import base_models, data
from peftlab.kit.measure import answered

FOLDER = base_models.MODELS / "tiny-decoder"
PAIRS = base_models.MODELS / "tiny-seq2seq"


@cache
def plain():
    """Loaded as anybody would, without the kit."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    return model.eval(), AutoTokenizer.from_pretrained(FOLDER)


@cache
def seq2seq():
    """tiny-seq2seq, loaded as anybody would."""
    model = AutoModelForSeq2SeqLM.from_pretrained(PAIRS)
    return model.eval(), AutoTokenizer.from_pretrained(PAIRS)


def by_language(kind, languages, n, model=plain):
    """{language: exact match} on n test records each, answered in one go."""
    records = [r for code in languages for r in data.records(kind, code, n, "test", 1)]
    right = answered(*model(), records)
    return {c: sum(right[i * n : (i + 1) * n]) / n for i, c in enumerate(languages)}


def mean(marks):
    return sum(marks.values()) / len(marks)


def test_plain_transformers_loads_tiny_decoder():
    model, tokenizer = plain()
    ours, same = base_models.load("tiny-decoder", device="cpu")
    inputs = tokenizer("12 mars 2026 =", return_tensors="pt")
    assert same("12 mars 2026 =")["input_ids"] == inputs["input_ids"][0].tolist()
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, ours(**inputs).logits)


def test_tiny_decoder_is_a_small_llama_with_grouped_queries():
    model, _ = plain()
    config = model.config
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert config.num_key_value_heads < config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    kv_width = config.num_key_value_heads * width
    for size in (config.hidden_size, config.intermediate_size, kv_width):
        assert size % 64 == 0, f"{size} is no multiple of 64, the block size of NF4"


def test_the_tokenizer_adds_bos_by_itself_and_splits_digits():
    _, tokenizer = plain()
    ids = tokenizer("2026-03-12")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 1 + len("2026-03-12")
    assert tokenizer.eos_token_id not in ids
    assert len({tokenizer.pad_token_id, ids[0], tokenizer.eos_token_id}) == 3


def test_the_folder_says_how_it_was_trained():
    log = json.loads((FOLDER / "training.json").read_text("utf8"))
    assert log["minutes"] <= 60 and log["loss"] and log["settings"]["seed"] == 0
    assert log["parameters"] == sum(p.numel() for p in plain()[0].parameters())
    assert not list(FOLDER.glob("*.bin")), "weights ship as safetensors only"


@pytest.mark.parametrize(
    "kind, mark",
    [("dates", 0.98), ("render", 0.95), ("refuse", 0.95), ("amounts", 0.9)],
)
def test_base_languages_reach_the_mark(kind, mark):
    marks = by_language(kind, data.BASE_LANGUAGES, 100)
    assert mean(marks) >= mark, f"{kind}: {mean(marks):.3f} of {mark}; {marks}"


def test_dates_of_held_back_languages_are_still_to_be_learned():
    marks = by_language("dates", data.HELD_BACK, 200)
    assert len(marks) >= 6 and max(marks.values()) <= 0.30, marks


def test_tiny_seq2seq_is_a_small_t5_with_the_same_tokenizer():
    model, tokenizer = seq2seq()
    assert model.config.model_type == "t5" and model.config.is_encoder_decoder
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert tokenizer.get_vocab() == plain()[1].get_vocab()
    assert not list(PAIRS.glob("*.bin")), "weights ship as safetensors only"
    log = json.loads((PAIRS / "training.json").read_text("utf8"))
    assert log["minutes"] <= 60 and log["loss"] and log["settings"]["seed"] == 0
    assert log["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_kit_loads_it_by_its_name():
    model, tokenizer = seq2seq()
    ours, same = base_models.load("tiny-seq2seq", device="cpu")
    inputs = tokenizer("fr: March 12, 2026 =", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    asked = same("fr: March 12, 2026 =")["input_ids"]
    assert asked == inputs["input_ids"][0].tolist()
    given = [m.generate(**inputs, max_new_tokens=24) for m in (model, ours)]
    assert torch.equal(*given)


def test_tiny_seq2seq_translates_unseen_records_between_base_languages():
    marks = by_language("translate", data.BASE_LANGUAGES, 100, seq2seq)
    assert mean(marks) >= 0.95 and min(marks.values()) >= 0.9, marks


def test_tiny_seq2seq_translates_unseen_dates():
    records = [
        record
        for code in data.BASE_LANGUAGES
        for record in data.records("translate", code, 100, "test", 1)
        if re.search("[a-zé]{3}", record.answer)  # a month's name: no amount has one
    ]
    right = answered(*seq2seq(), records)
    assert len(records) > 400 and sum(right) / len(right) >= 0.95


def test_translating_into_held_back_languages_is_still_to_be_learned():
    marks = by_language("translate", data.HELD_BACK, 100, seq2seq)
    assert len(marks) >= 6 and max(marks.values()) <= 0.30, marks
