"""The figures: what the prose says, what is stored, what a fresh run gives."""

import json
from pathlib import Path

import nbformat
import pytest

from peftlab.kit import results
from tools import figures

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*sorted((ROOT / "book").rglob("*.md")), ROOT / "README.md"]
FRESH = ROOT / "_build" / "results"  # where `make test` has the chapters write

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def prose(chapter):
    cells = nbformat.read(chapter, as_version=4).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


@each_chapter
def test_every_figure_in_a_chapter_is_what_is_stored(chapter):
    stale = figures.stale(prose(chapter), chapter.stem)
    assert not stale, f"written, stored, key: {stale}; run tools/notebooks.py"


@each_page
def test_every_figure_on_a_page_is_what_is_stored(page):
    stale = figures.stale(page.read_text("utf8"))
    assert not stale, f"written, stored, key: {stale}"


@each_chapter
def test_no_decimal_in_a_chapter_is_left_unbound(chapter):
    loose = figures.unbound(prose(chapter))
    assert not loose, f"bind these to a result, or mark them <!-- cited -->: {loose}"


@pytest.mark.parametrize("name", ["atlas", "index"])
def test_no_decimal_on_a_page_of_findings_is_left_unbound(name):
    loose = figures.unbound((ROOT / "book" / f"{name}.md").read_text("utf8"))
    assert not loose, f"bind these to a result, or mark them <!-- cited -->: {loose}"


@each_chapter
def test_a_fresh_run_gives_the_stored_figures(chapter):
    fresh = FRESH / f"{chapter.stem}.json"
    assert fresh.is_file(), "no fresh figures: `make test` runs the chapters first"
    fresh = json.loads(fresh.read_text("utf8"))["figures"]
    stored = results.load(chapter.stem)["figures"]
    assert fresh.keys() == stored.keys(), "run `make notebooks`: the keys have changed"
    off = {
        key: (fresh[key]["value"], kept["value"], kept["tolerance"])
        for key, kept in stored.items()
        if abs(fresh[key]["value"] - kept["value"]) > kept["tolerance"] + 1e-9
    }
    assert not off, f"fresh, stored, tolerance: {off}"


def test_a_wrong_figure_is_found(monkeypatch):
    kept = dict(share=0.974, count=77824.0, drop=-0.035)
    stored = {"figures": {k: dict(value=v) for k, v in kept.items()}}
    monkeypatch.setattr(results, "load", lambda name, folder=None: stored)
    right = "0.97<!-- share --> 97%<!-- share --> 77,824<!-- count --> "
    right += "−0.04<!-- drop -->"
    assert not figures.stale(right, "x")
    wrong = "0.98<!-- share --> 98%<!-- share --> 77,825<!-- count --> "
    wrong += "0.04<!-- drop -->"
    assert len(figures.stale(wrong, "x")) == 4
    assert figures.refresh(wrong, "x").replace("-0.04", "−0.04") == right


def test_an_unbound_figure_is_found():
    text = "It is 0.97 or 12% of 4,096, see section 4.1, `x = 0.5`, $0.5$,"
    text += " 0.3<!-- cited -->."
    assert figures.unbound(text) == ["0.97", "12%", "4,096"]


def test_stored_outputs_are_whole_and_quiet():
    for chapter in CHAPTERS:
        for i, cell in enumerate(nbformat.read(chapter, as_version=4).cells):
            if cell.cell_type != "code":
                continue
            where, tags = f"{chapter.name}, cell {i}", cell.metadata.get("tags", [])
            assert cell.execution_count or "nbval-skip" in tags, f"{where} has not run"
            assert len(cell.source.splitlines()) <= 25, (
                f"{where} is longer than 25 lines"
            )
            for output in cell.outputs:
                assert output.get("name") != "stderr", f"{where} printed to stderr"
                if "image/png" in output.get("data", {}):
                    image = cell.metadata.get("mystnb", {}).get("image", {})
                    alt = image.get("alt", "")
                    assert len(alt) > 20, f"{where}: the figure needs an alt text"
