"""The diagnoses: splits apart, draws that stay, the package asked for by name."""

import importlib.metadata
import inspect
import statistics
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import torch
from common import assert_one_sentence

from peftlab.kit import base_models, icd, results

ROOT = Path(__file__).parents[1]
BOOK = nbformat.read(ROOT / "notebooks" / "01_quickstart.ipynb", 4)


def test_every_phrase_belongs_to_one_split_and_one_chapter():
    every = icd.phrases()
    assert len(every) > 20_000
    texts = [text for text, _, _ in every]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= icd.LONGEST
    for split in ("train", "dev", "test"):
        chapters = Counter(c for _, c, s in every if s == split)
        assert len(chapters) == len(icd.CHAPTERS) == 18
        assert min(chapters.values()) >= 40


def test_a_draw_is_even_and_stays():
    drawn = icd.diagnoses("train", 20, seed=1)
    assert set(Counter(c for _, c in drawn).values()) == {20}
    assert drawn == icd.diagnoses("train", 20, seed=1)
    assert set(drawn) < set(icd.diagnoses("train", 40, seed=1)), "a draw only grows"
    assert set(drawn) != set(icd.diagnoses("train", 20, seed=2))
    chapters = [c for _, c in drawn]
    assert chapters != sorted(chapters), "shuffled"


def test_a_new_release_moves_only_what_it_changed(monkeypatch):
    before = set(icd.diagnoses("train", 20))
    some = icd.phrases()
    more = [(f"a new disease, type {i}", i % 18, "train") for i in range(180)]
    monkeypatch.setattr(icd, "phrases", lambda: sorted([*some[9:], *more]))
    moved = before - set(icd.diagnoses("train", 20))
    assert len(moved) < 60, f"{len(moved)} of 360 moved"


def test_an_unknown_split_and_a_missing_package_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="train, dev or test") as error:
        icd.diagnoses("validation")
    assert_one_sentence(error)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    icd.phrases.cache_clear()
    with pytest.raises(ValueError, match="pip install simple-icd-10-cm") as error:
        icd.diagnoses("test")
    assert_one_sentence(error)
    icd.phrases.cache_clear()


def test_the_classifier_is_the_one_on_the_page_and_ignores_padding():
    shown = inspect.getsource(icd.MeanClassifier).splitlines()
    ours = [line for line in shown if line and '"""' not in line]
    (cell,) = [c for c in BOOK.cells if c.id == "classifier"]
    assert ours == [line for line in cell.source.splitlines() if line]

    model = icd.MeanClassifier.from_pretrained(base_models.minilm_folder()).eval()
    ids = torch.tensor([[101, 11868, 15395, 102, 0, 0]])
    with torch.no_grad():
        padded = model(ids, (ids != 0).long()).logits
        plain = model(ids[:, :4], torch.ones(1, 4)).logits
    assert torch.allclose(padded, plain, atol=1e-5)


def test_the_rates_are_tuned_with_all_seeds_and_none_at_an_edge():
    stored = results.load("icd")
    assert stored["seeds"] == 5
    for name, best in stored["best"].items():
        row, _, shared = name.partition(", one")
        found = {}
        for run in stored["runs"]:
            if run["row"] == row and (not shared or run["body"] == run["head"]):
                found.setdefault((run["body"], run["head"]), []).append(run["dev"])
        full = {p: statistics.mean(v) for p, v in found.items() if len(v) == 5}
        point = best["body"], best["head"]
        assert full[point] == max(full.values()), name
        for k, rate in enumerate(point):
            if rate is None:
                continue
            rates = [p[k] for p in full if shared or p[1 - k] == point[1 - k]]
            assert min(rates) < rate < max(rates), f"{name}: {rate} is at the edge"


def test_the_stored_shares_are_those_of_the_stored_bits():
    stored = results.load("icd")
    assert len(stored["test_phrases"]) > 4000
    for name, best in stored["best"].items():
        row = name.partition(", one")[0]
        runs = [
            run
            for run in results.where(stored["runs"], row=row, **best)
            if "test" in run
        ]
        assert [run["seed"] for run in runs] == list(range(5))
        shares = [results.share(run["test"]) for run in runs]
        kept = stored["figures"][f"{name}.all"]["value"]
        assert kept == pytest.approx(statistics.mean(shares))
