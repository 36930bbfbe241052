"""The data of six tasks: labels on the right pieces, splits apart, fair scores."""

from types import SimpleNamespace

import pytest
import torch
from common import assert_one_sentence
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

from peftlab.kit import base_models, data, icd, tasks


@pytest.fixture(scope="module")
def tokenizer():
    return base_models.load_minilm(device="cpu")[1]


def fields(line):
    return {(k, *span) for k, span in line.spans.items() if k in tasks.LABELS}


def test_every_field_stands_where_its_span_says():
    for line in tasks.lines(200, "train"):
        assert set(line.spans) == {*tasks.QUESTIONS}
        where = data.locale(line.language)
        assert line.part("country") in data.country_names(where)
        assert line.part("number").isdigit() and line.part("day").isdigit()
        assert 1950 <= int(line.part("year")) <= 2049
        assert line.part("amount")[0].isdigit() and line.part("amount")[-1].isdigit()
        assert not any(c.isdigit() or c.isspace() for c in line.part("currency"))
        for name in line.spans:
            assert line.part(name) == line.part(name).strip() != ""


def test_splits_are_apart_and_a_seed_gives_the_same_lines():
    assert tasks.lines(50, "train", 1) == tasks.lines(50, "train", 1)
    assert tasks.lines(50, "train", 1) != tasks.lines(50, "train", 2)
    seen = {split: tasks.lines(600, split) for split in data.SPLITS}
    countries = {s: {line.part("country") for line in seen[s]} for s in seen}
    codes = {
        split: {
            data.country_names(data.locale(line.language))[line.part("country")]
            for line in seen[split]
        }
        for split in seen
    }
    assert len(countries["test"]) > 20
    assert not codes["train"] & codes["test"] and not codes["train"] & codes["dev"]
    pairs = {split: tasks.translations(200, split) for split in ("train", "test")}
    assert not {e for _, e in pairs["train"]} & {e for _, e in pairs["test"]}
    assert len({english for _, english in pairs["test"]}) == 200


def test_labels_make_the_spans_again(tokenizer):
    lines = tasks.lines(300, "train")
    encoded = tokenizer([line.text for line in lines], padding=True)
    for i, line in enumerate(lines):
        labels = tasks.word_labels(line.text, encoded[i], line.spans)
        words = encoded[i].word_ids
        for before, word, label in zip([None, *words], words, labels, strict=False):
            assert (label == -100) == (word is None or word == before)
        assert tasks.spans_of(line.text, encoded[i], labels) == fields(line)


@pytest.mark.parametrize("alone", [False, True])
def test_labels_fit_a_tokenizer_that_counts_the_space_into_the_next_word(alone):
    text, spans = "27 juillet 1995", dict(day=(0, 2), month=(3, 10), year=(11, 15))
    pieces = ["▁", *"juilet", "ll", "27", "1995"]
    if not alone:
        pieces += ["▁27", "▁ju", "▁1995"]
    words = Tokenizer(Unigram([("<unk>", -9.0)] + [(p, -1.0) for p in pieces], 0))
    words.pre_tokenizer = Metaspace()
    encoding = words.encode(text)
    assert encoding.tokens[0] == ("▁" if alone else "▁27")
    assert (2, 3) in encoding.offsets or (2, 5) in encoding.offsets  # with the space
    labels = tasks.word_labels(text, encoding, spans)
    named = [tasks.LABELS[k] for k in labels if k != -100]
    assert named == ["day", "month", "year"]
    right = {(k, *span) for k, span in spans.items()}
    assert tasks.spans_of(text, encoding, labels) == right


@pytest.mark.parametrize("text, pieces", [("£10", ["£10"]), ("€10", ["€", "##10"])])
def test_english_is_left_out_since_a_word_holds_two_fields(tokenizer, text, pieces):
    assert "en" not in tasks.LANGUAGES
    encoding = tokenizer(text).encodings[0]
    assert encoding.tokens[1:-1] == pieces
    assert set(encoding.word_ids[1:-1]) == {0}
    spans = dict(currency=(0, 1), amount=(1, 3))
    labels = tasks.word_labels(text, encoding, spans)
    assert [tasks.LABELS[k] for k in labels if k != -100] == ["currency"]


def test_f1_counts_whole_spans_over_all_texts():
    right = [{("day", 0, 2), ("year", 5, 9)}, {("day", 0, 1)}]
    assert tasks.f1(right, right) == 1
    assert tasks.f1([set(), set()], right) == 0
    assert tasks.f1([set(), set()], [set(), set()]) == 0
    half = [{("day", 0, 2), ("year", 5, 8)}, set()]
    assert tasks.f1(half, right) == pytest.approx(2 * 1 / (2 + 3))


def test_macro_accuracy_counts_classes_alike():
    assert tasks.macro_accuracy([0, 0, 0, 0], [0, 0, 0, 1]) == 0.5
    assert tasks.macro_accuracy([1, 1, 0, 0], [0, 0, 1, 1]) == 0


def test_the_answer_of_a_question_is_in_its_text(tokenizer):
    asked = tasks.questions(tasks.lines(60, "train"))
    assert {question for question, _, _ in asked} == {*tasks.QUESTIONS.values()}
    batch = tasks.SIX["QUESTION_ANS"].batch(tokenizer, asked)
    assert "token_type_ids" not in batch
    for i, (_, text, (start, end)) in enumerate(asked):
        first, last = batch["start_positions"][i], batch["end_positions"][i]
        assert batch.sequence_ids(i)[first] == batch.sequence_ids(i)[last] == 1
        (a, b), (c, d) = batch[i].offsets[first], batch[i].offsets[last]
        assert a <= start < b and c < end <= d, (text, text[start:end])


def test_the_best_span_is_in_order_and_in_the_text():
    torch.manual_seed(0)
    for _ in range(50):
        starts, ends = torch.randn(2, 9) - 3
        inside = torch.arange(9) >= 3
        found = tasks.best_span(starts, ends, inside)
        scores = {(i, j): starts[i] + ends[j] for i in range(3, 9) for j in range(i, 9)}
        assert found == max(scores, key=scores.get)


def test_a_batch_has_examples_of_about_one_length():
    lines = tasks.lines(400, "train")
    source = tasks.batches(lines, 16, seed=0)
    some = [next(source) for _ in range(20)]
    assert {len(batch) for batch in some} == {16}
    spread = [max(len(x.text) for x in b) - min(len(x.text) for x in b) for b in some]
    assert sorted(spread)[len(spread) // 2] <= 6
    again = tasks.batches(lines, 16, seed=0)
    assert some == [next(again) for _ in range(20)]


def test_the_contrastive_loss_is_lower_where_partners_are_alike():
    model, tokenizer = base_models.load_minilm(device="cpu")
    batch = tasks.SIX["FEATURE_EXTRACTION"].batch
    texts = ["March 12, 2026", "Toothache", "1,234.50 euros"]
    same = batch(tokenizer, [(t, t) for t in texts])
    other = batch(tokenizer, list(zip(texts, texts[1:] + texts[:1], strict=True)))
    with torch.no_grad():
        assert tasks.contrastive_loss(model, same) < 0.01
        assert tasks.contrastive_loss(model, other) > 5
    pairs = [(t, t) for t in texts]
    assert tasks.nearest(model, tokenizer, pairs) == [0, 1, 2]


class Elsewhere(torch.nn.Module):
    """A model on torch's meta device, which wants its inputs there too."""

    device = torch.device("meta")

    def forward(self, **batch):
        assert {t.device for t in batch.values()} == {self.device}
        hidden = torch.zeros(*batch["input_ids"].shape, 8, device=self.device)
        return SimpleNamespace(last_hidden_state=hidden, loss=hidden.sum())


@pytest.mark.parametrize("kind", tasks.SIX)
def test_a_batch_follows_the_model_to_its_device(kind, monkeypatch):
    def same_device(logits, labels):
        assert logits.device == labels.device
        return logits.sum()

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", same_device)
    task = tasks.SIX[kind]
    batch = task.batch(task.load()[1], task.examples(36, "dev")[:4])
    assert task.loss(Elsewhere(), batch).device == Elsewhere.device


@pytest.mark.parametrize("kind", tasks.SIX)
def test_a_task_has_a_loss_and_a_score(kind):
    torch.set_num_threads(1)
    task = tasks.SIX[kind]
    model, tokenizer = task.load(seed=0)
    assert not task.head or hasattr(model, task.head)
    examples = task.examples(len(icd.CHAPTERS), "dev")
    with torch.no_grad():
        assert task.loss(model, task.batch(tokenizer, examples[:4])) > 0
    assert 0 <= task.score(model, tokenizer, examples) <= 1
    assert task.examples(18, "dev", 0) == task.examples(18, "dev", 0)


def test_an_unknown_split_is_one_sentence():
    for bad in (lambda: tasks.lines(3, "validation"), lambda: tasks.lines(0)):
        with pytest.raises(ValueError) as error:
            bad()
        assert_one_sentence(error)
