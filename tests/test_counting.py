"""Counting what a method trains, and the page of the papers' figures made from it."""

import copy
import re
from fractions import Fraction

import pytest
import torch
from common import assert_one_sentence
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    T5Config,
)

from experiments.paper_tables import count as paper_tables
from experiments.paper_tables.notes import INTRODUCTIONS, NOTES
from experiments.paper_tables.rows import GROUPS, OPEN
from peftlab import lora, prompt
from peftlab.kit import measure

SMALL = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
FITS = ("equal", "rounds")
LLAMA = LlamaConfig(**SMALL, num_attention_heads=4)


def test_the_count_is_that_of_a_model_with_memory():
    model = LlamaForCausalLM(LLAMA)
    base = measure.parameters(model)[1]
    lora.add(model, ["q_proj", "down_proj"], r=3)
    tensors = lora.state_dict(model)
    before = LLAMA.to_dict()
    found = measure.count(LLAMA, lora.add, ["q_proj", "down_proj"], r=3)
    assert LLAMA.to_dict() == before
    trainable = sum(t.numel() for t in tensors.values())
    want = dict(trainable=trainable, base=base, total=base + trainable)
    want |= dict(trainable_bytes=measure.nbytes(tensors), share=trainable / base)
    assert found == want


def test_bytes_are_those_of_what_trains_not_of_the_base():
    whole = measure.count(LLAMA)
    assert whole["trainable"] == whole["base"] == whole["total"]
    assert whole["share"] == 1 and whole["trainable_bytes"] == 4 * whole["base"]
    half = measure.count(LLAMA, dtype=torch.bfloat16)
    assert half["trainable_bytes"] == 2 * half["base"]
    found = measure.count(LLAMA, lora.add, ["q_proj"], r=2, dtype=torch.bfloat16)
    assert found["trainable_bytes"] == 4 * found["trainable"], "LoRA is float32"
    wrapped = measure.count(LLAMA, prompt.add, 7)  # it counts with its model
    assert wrapped["trainable"] == 7 * 32 == wrapped["total"] - wrapped["base"]


def test_the_head_is_guessed_named_or_taken_from_the_architectures():
    tiny = dict(SMALL, num_attention_heads=4)
    bare = measure.count(BertConfig(**tiny))["base"]
    assert measure.count(BertConfig(**tiny), kind="base")["base"] == bare
    masked = measure.count(BertConfig(**tiny), kind="masked")["base"]
    named = BertConfig(**tiny, architectures=["BertForMaskedLM"])
    assert measure.count(named)["base"] == masked != bare
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    for config, kind in (
        (LLAMA, "causal"),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4), "causal"),
        (T5Config(vocab_size=40, **sizes), "seq2seq"),
        (MarianConfig(vocab_size=40, d_model=32, pad_token_id=0), "seq2seq"),
    ):
        assert measure.count(config) == measure.count(config, kind=kind)


def test_a_65b_model_is_counted_in_no_memory():
    heads = dict(num_hidden_layers=80, num_attention_heads=64)
    config = LlamaConfig(hidden_size=8192, intermediate_size=22016, **heads)
    found = []

    def work():
        found.append(measure.count(config, lora.add, "all-linear", r=64))

    assert measure.peak_memory(work) < 1e6 or torch.cuda.is_available()
    assert found[0]["base"] == 65_285_660_672


OTHER = LlamaConfig(architectures=["BertForMaskedLM"])  # another family's class


@pytest.mark.parametrize(
    "config, settings, words",
    [
        ("meta-llama/Llama-2-7b-hf", {}, "needs a config"),
        (LlamaConfig, {}, "needs a config"),
        (OTHER, {}, "no BertForMaskedLM is built from a LlamaConfig"),
        (LLAMA, dict(kind="decoder"), "kind must be one of"),
        (LLAMA, dict(kind="masked"), "has no 'masked' model"),
        (LLAMA, dict(add=lora), "such as lora.add"),
        (LLAMA, dict(dtype="bfloat16"), "torch.bfloat16"),
        (LLAMA, dict(dtype=torch.int8), "torch.bfloat16"),
        (LLAMA, dict(add=lambda model: None), "must return a model"),
        (LLAMA, dict(add=lora.add, targets=["query"]), "no linear layer is named"),
    ],
)
def test_bad_input_gets_one_clear_sentence(config, settings, words):
    with pytest.raises(ValueError, match=words) as error:
        measure.count(config, **settings)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    "printed, value, word",
    [
        ("10,240", 10_240, "equal"),
        ("10,420", 10_240, "differs"),
        ("0.3M", 294_912, "rounds"),
        ("0.3M", 300_000, "equal"),
        ("301.9M", 301_989_888, "cut off"),
        ("302.1M", 301_989_888, "differs"),
        ("110M", 109_482_240, "rounds"),
        ("110.0M", 109_482_240, "differs"),
        ("540K", 540_672, "cut off"),
        ("540K", 543_000, "rounds"),
        ("65.2B", 65_285_660_672, "cut off"),
        ("2.4M", 2_350_000, "rounds"),
        ("10,000×", 9_251, "rounds"),
        ("0.01307%", 0.00013074, "rounds"),
        ("0.01907%", 0.00013074, "differs"),
    ],
)
def test_a_printed_figure_is_judged_or_refused(printed, value, word):
    assert paper_tables.verdict(printed, Fraction(value)) == word
    with pytest.raises(ValueError, match="cannot read"):
        paper_tables.verdict("about 5M", 5)


def of_depth(config, n):
    """The config with n layers; T5 has as many again in its decoder."""
    config = copy.deepcopy(config)
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, n)
    return config


def quickly(row):
    """What `count` says, from models of two and of three layers: a line through them.

    All layers of a model are alike, and building 96 of them takes seconds.
    """
    if row.config is None:
        return paper_tables.count(row)
    two, three = (measure.count(of_depth(row.config, n), row.add) for n in (2, 3))
    more = row.config.num_hidden_layers - 2
    return paper_tables.shares(*(two[k] + more * (three[k] - two[k]) for k in PARTS))


PARTS = ("trainable", "base", "total")
ROWS = [(group, i) for group in GROUPS for i in range(len(group.rows))]


@pytest.fixture(scope="module")
def counted():
    return [(group, [(row, quickly(row)) for row in group.rows]) for group in GROUPS]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_a_model_of_full_depth_has_what_the_line_says(group):
    built = [row for row in group.rows if row.config is not None]
    for row in built[-1:]:
        assert paper_tables.count(row) == quickly(row), row.setting


@pytest.mark.parametrize("group, i", ROWS, ids=[f"{g.title}-{i}" for g, i in ROWS])
def test_what_is_built_has_the_count_worked_out_by_hand(counted, group, i):
    row, values = dict((g.title, rows) for g, rows in counted)[group.title][i]
    assert values["trainable"] == row.formula, f"{row.setting}: {values}"
    words = paper_tables.judge(row, values).values()
    assert {*words} <= {*FITS} or row.note, (
        f"{row.setting}: {row.printed} printed, {values}: a note must say why"
    )


def test_most_figures_are_equal_or_rounded_and_all_that_is_written_is_used(counted):
    pairs = [pair for _, rows in counted for pair in rows]
    words = [word for pair in pairs for word in paper_tables.judge(*pair).values()]
    assert len(words) >= 180
    assert sum(w in FITS for w in words) >= 140
    unbuilt = [row for row, _ in pairs if row.config is None]
    assert unbuilt and all(row in OPEN for row in unbuilt)
    assert {row.note for row, _ in pairs} - {""} == NOTES.keys()
    assert {g.title for g in GROUPS} == INTRODUCTIONS.keys()


EQUATION = re.compile(r"([\d(][\d,.·+/() ]*) = (\d[\d,]*(?:\.\d+)?[%×]?)")
SHARE = re.compile(r"(\d[\d,]*) of (\d[\d,]*) is ([\d.]+%)")


def worked(text):
    """The value of an expression of a note, exactly."""
    numbers = re.sub(r"[\d,]+", lambda m: f"Fraction({m[0].replace(',', '')})", text)
    return eval(numbers.replace("·", "*"), {"Fraction": Fraction})


def test_the_arithmetic_of_the_notes_is_right():
    equations = 0
    for name, note in NOTES.items():
        text = " ".join(note.split())
        found = EQUATION.findall(text)
        equations += len(found)
        sums = [(worked(left), right.rstrip(",")) for left, right in found]
        sums += [(worked(f"{a} / {b}"), share) for a, b, share in SHARE.findall(text)]
        wrong = [s for s in sums if paper_tables.verdict(s[1], s[0]) not in FITS]
        assert not wrong, name
    assert equations > 20, "most notes have arithmetic"


def test_the_page_is_what_the_code_writes_now(counted):
    stored = paper_tables.FILE.read_text("utf8")
    fresh = paper_tables.page(counted)
    assert stored == fresh, "run `python -m experiments.paper_tables.count`"
