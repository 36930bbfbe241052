"""Questions on ICD-10-CM: answers that stand in the entry, splits and wording apart."""

import importlib.metadata
import re
import zlib
from collections import Counter

import pytest
import torch
from common import assert_one_sentence

from experiments.sweeps import medical_questions as sweep
from peftlab.kit import icd, icd_questions
from peftlab.kit.icd_questions import KINDS, KNOWN, LABELS, REWORDED, UNSEEN, questions

SIZES = {"train": 640, "dev": 200, "test": 400}


@pytest.mark.parametrize("split", SIZES)
def test_an_answer_stands_in_its_entry_and_a_quarter_have_none(split):
    drawn = questions(split, SIZES[split])
    assert len(drawn) == SIZES[split] == len(set(drawn))
    none = [q for q in drawn if not q.answer]
    assert len(none) == SIZES[split] // 4
    for q in none:
        assert q.start == -1 and LABELS[q.kind] not in q.context
    each = Counter(q.kind for q in none)
    assert set(each) == set(LABELS)
    assert max(each.values()) - min(each.values()) <= 1, "no kind is mostly refused"
    for q in drawn:
        if not q.answer:
            continue
        assert q.context[q.start :].startswith(q.answer)
        assert q.start == 0 if q.kind == "code" else q.start > 3
        before = q.context[: q.start]
        assert q.kind == "code" or before.endswith(f". {LABELS[q.kind]}: ")
    kinds = Counter(q.kind for q in drawn if q.answer)
    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 25


def test_an_answer_is_one_item_without_its_code():
    for code, heading, notes, _, _ in icd_questions.entries():
        assert notes and len(notes) <= icd_questions.MOST
        assert heading.count(". ") <= 1
        text = icd_questions.context(code, heading, notes)
        assert text.startswith(f"{code} {heading}. ") and text.endswith(".")
        for kind, item in notes.items():
            assert f"{LABELS[kind]}: {item}." in text
    for q in questions("test", 400):
        assert not re.search(r"[()\[\]:;]", q.answer), q.answer


def printed():
    """{code: (its elements of notes, the tags of all notes that hold for it)}"""
    found = {}

    def walk(element, above):
        tags = above | {child.tag for child in element}
        if element.tag == "diag":
            found[element.findtext("name")] = list(element), tags
        for child in element:
            walk(child, tags)

    walk(icd.classification().getroot(), set())
    return found


def test_a_refusal_has_no_note_of_its_kind_in_the_entry_or_above_it():
    entries = printed()
    tags = dict(first="codeFirst", never="excludes1", apart="excludes2")
    tags |= dict(also="useAdditionalCode")
    for split, n in SIZES.items():
        for q in questions(split, n):
            _, there = entries[q.context.split(" ")[0]]
            if not q.answer:
                assert tags[q.kind] not in there, q
                assert q.kind != "also" or "codeAlso" not in there, q


def test_what_stands_under_a_heading_or_a_condition_is_not_quoted_alone():
    entries = printed()
    for code, _, notes, *_ in icd_questions.entries():
        for item in notes.values():
            assert not re.search(r"\b(if|when|such as)\b", item), item
        for element in entries[code][0]:
            heading = ""
            for note in element if element.tag in icd_questions.TAGS.values() else ():
                text = note.text.strip()
                if heading:
                    assert text not in notes.values(), (code, heading, text)
                if text.endswith(":") or re.search(r"\bif (known|applicable)", text):
                    heading = text
    said = {code: notes for code, _, notes, *_ in icd_questions.entries()}
    whole = "osteomyelitis due to echinococcus (B67.2)"
    assert said["M86"]["never"] == whole and "F01" not in said
    assert said["J47"]["also"].startswith("to identify exposure to")
    assert "first" not in said["I47"] and "also" not in said["O85"]
    assert said["J99"]["first"] == "underlying disease"


def test_splits_share_no_category():
    found = {}
    for split, n in SIZES.items():
        for q in questions(split, n):
            category = q.context[:3]
            assert found.setdefault(category, split) == split
            assert icd.SPLITS[zlib.crc32(category.encode()) % 5] == split


def test_a_draw_stays_and_another_seed_gives_another():
    assert questions("train", 100, seed=1) == questions("train", 100, seed=1)
    assert questions("train", 100, seed=1) != questions("train", 100, seed=2)
    kinds = [q.kind for q in questions("train", 100)]
    assert kinds != sorted(kinds), "shuffled"


def test_the_wording_changes_and_the_entries_do_not():
    plain = questions("test", 200)
    unseen = questions("test", 200, unseen=True)
    reworded = questions("test", 200, reworded=True)
    for old, new, other in zip(plain, unseen, reworded, strict=True):
        assert old.kind == new.kind == other.kind
        assert old.answer == new.answer == other.answer
        assert old.context == new.context and old.question == other.question
        assert old.question in KNOWN[old.kind] and new.question in UNSEEN[new.kind]
        back = other.context
        for kind, labels in REWORDED.items():
            for label in labels:
                back = back.replace(f". {label}: ", f". {LABELS[kind]}: ")
        assert back == old.context != other.context
    used = {q.question for q in unseen}
    assert used == {phrase for k in KINDS for phrase in UNSEEN[k]}, "all are asked"
    assert all(len(set(UNSEEN[k])) == 6 for k in KINDS)
    labels = [label for k in LABELS for label in REWORDED[k]]
    assert len(set(labels)) == 12 and not set(labels) & set(LABELS.values())
    for label in labels:
        assert any(f". {label}: " in q.context for q in reworded), label
    assert not {p for k in KINDS for p in KNOWN[k]} & used


def test_the_rule_is_right_on_what_it_knows_and_lost_elsewhere():
    def right(**wording):
        drawn = questions("test", 400, **wording)
        given = [icd_questions.rule(q.question, q.context) for q in drawn]
        return sum(a == q.answer for a, q in zip(given, drawn, strict=True)) / 400

    assert right() == 1
    assert right(unseen=True) < 0.5 and right(reworded=True) < 0.5


def test_no_phrasing_that_the_rule_knows_points_to_two_kinds():
    entry = "A00 Cholera. " + " ".join(f"{LABELS[k]}: {k} one." for k in LABELS)
    for kind, phrasings in KNOWN.items():
        wanted = "A00" if kind == "code" else f"{kind} one"
        for phrasing in phrasings:
            assert icd_questions.rule(phrasing, entry) == wanted, phrasing
    assert icd_questions.rule("What else is coded?", "A00 Cholera.") == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("validation", 100), "train, dev or test"),
        (("train", 7), "at least 8"),
        (("train", 9.5), "at least 8"),
        (("test", 100_000), "has only"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(arguments, said):
    with pytest.raises(ValueError, match=said) as error:
        questions(*arguments)
    assert_one_sentence(error)


@pytest.mark.parametrize("wording", ["unseen", "reworded"])
def test_test_wording_is_not_for_training(wording):
    with pytest.raises(ValueError, match="dev and test alone") as error:
        questions("train", 100, **{wording: True})
    assert_one_sentence(error)


def test_a_missing_package_is_one_sentence(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    icd_questions.entries.cache_clear()
    with pytest.raises(ValueError, match="pip install simple-icd-10-cm") as error:
        questions("test", 20)
    assert_one_sentence(error)
    icd_questions.entries.cache_clear()


def test_the_best_span_is_the_best_of_all_and_its_margin_is_to_no_answer():
    torch.manual_seed(0)
    for _ in range(20):
        start, end = torch.randn(2, 12).double()
        given = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0]).bool()
        found, margin = icd_questions.best_span(start, end, given, longest=4)
        every = {
            (i, j): (start[i] + end[j] - start[0] - end[0]).item()
            for i in range(12)
            for j in range(i, min(12, i + 4))
            if given[i] and given[j]
        }
        assert found == max(every, key=every.get)
        assert margin == pytest.approx(every[found])


def test_a_threshold_is_the_best_there_is():
    asked = questions("dev", 40)
    margins = [((7 * i) % 40) / 4 - 3 for i in range(40)]
    found = {
        q: (q.answer if i % 5 else "A00.0", m)
        for i, (q, m) in enumerate(zip(asked, margins, strict=True))
    }

    def right(cut):
        return sum((t if m > cut else "") == q.answer for q, (t, m) in found.items())

    best = max(right(m - 0.01) for m in margins)
    assert right(icd_questions.threshold(found)) == best


@pytest.mark.parametrize(
    "given, answer, expected",
    [
        ("", "", 1),
        ("fever", "", 0),
        ("", "fever", 0),
        ("typhoid fever", "typhoid fever", 1),
        ("fever", "typhoid fever", 2 / 3),
        ("fever fever", "fever", 2 / 3),
        ("rash", "fever", 0),
    ],
)
def test_token_f1(given, answer, expected):
    assert icd_questions.token_f1(given, answer) == pytest.approx(expected)


def test_titles_are_in_one_category_and_what_is_made_up_is_in_none():
    train, test = icd_questions.titles("train", 300), icd_questions.titles("test", 300)
    assert not {c for _, c in train} & {c for _, c in test}
    assert all(re.fullmatch(r"[A-Z]\d\d", c) for _, c in train + test)
    assert icd_questions.titles("train", 20, seed=1) != train[:20]
    every = {title.lower() for title, _ in icd_questions._titles()}
    nothing = icd_questions.made_up(300)
    assert len(set(nothing)) == 300 and nothing == icd_questions.made_up(300)
    assert not every & {text.lower() for text in nothing}
    assert not {text.split()[0].lower() for text in nothing} & {
        word for text in every for word in text.split()
    }


def test_the_categories_are_those_of_all_titles():
    known = icd_questions.categories()
    assert {c for _, c in icd_questions.titles("train", 300)} < known
    assert {"A00", "J45", "Z99"} < known and not {"L35", "A10"} & known
    assert all(re.fullmatch(r"[A-Z]\w\w", c) for c in known) and len(known) > 1900


@pytest.mark.parametrize("split, n", [("all", 9), ("test", 0), ("test", 99_999)])
def test_titles_that_there_are_not_are_one_sentence(split, n):
    with pytest.raises(ValueError, match="split") as error:
        icd_questions.titles(split, n)
    assert_one_sentence(error)


@pytest.mark.parametrize("n", [0, 2.5])
def test_titles_of_nothing_are_counted_in_whole_numbers(n):
    with pytest.raises(ValueError, match="at least one") as error:
        icd_questions.made_up(n)
    assert_one_sentence(error)


def test_a_wrong_answer_is_one_mistake_and_the_mistakes_add_up():
    asked = [q for q in questions("test", 160) if q.kind == "never" and q.answer]
    both = [q for q in asked if "Excludes2: " in q.context][:2]
    other = [re.search(r"Excludes2: (.*?)( \(|\.)", q.context)[1] for q in both]
    drawn = [*both, *(q for q in asked if q not in both)][:6]
    given = [*other, "", f"x. Excludes1: {drawn[3].answer}", "Z99", drawn[5].answer]
    found = sweep.mistakes(drawn, given)
    parts = {"refused": 1, "over-run": 1, "Excludes2": 2, "else": 1}
    assert found == {"asked": 6, **parts}


def test_the_words_that_a_question_hangs_on():
    new = questions("test", 200, unseen=True)
    assert sweep.sentences(new, "unseen") == [q.question for q in new]
    drawn = questions("test", 200, reworded=True)
    labels = {label for k in LABELS for label in REWORDED[k]}
    for q, words in zip(drawn, sweep.sentences(drawn, "reworded"), strict=True):
        assert words in labels and f". {words}: " in q.context
        if q.answer and q.kind != "code":
            assert f"{words}: {q.answer}" in q.context and words in REWORDED[q.kind]


def test_an_interval_by_sentence_is_wider_where_a_sentence_goes_as_one():
    together = [float(i // 20 % 2) for i in range(200)]
    mixed = [float(i % 2) for i in range(200)]
    sentence = [i // 20 for i in range(200)]
    mean, low, high = sweep.clustered(together, sentence)
    assert mean == 0.5 and low < 0.3 and high > 0.7
    assert sweep.clustered(mixed, sentence) == (0.5, 0.5, 0.5)
