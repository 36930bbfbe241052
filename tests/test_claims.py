"""The page of claims: each row has a verdict, a figure that we measured, a chapter."""

import re
from pathlib import Path

import pytest

from peftlab.kit import results
from tools import figures

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "book" / "claims.md"
VERDICTS = {"true", "false", "outdated", "depends"}
VERDICT = re.compile(r"\*\*(true|false|outdated)\*\*|\*\*(depends)\*\* on \w.+")
HEADER = ["said", "verdict", "measured here", "elsewhere", "chapter"]
WHY_NOT = re.compile(r"not measured here: \w")


def tables(text):
    """[(the header, the rows)] of a page, each row a list of its cells."""
    found = []
    for block in re.findall(r"(?m)^\|.*(?:\n\|.*)*", text):
        rows = [row.strip("|").split("|") for row in block.splitlines()]
        rows = [[cell.strip() for cell in row] for row in rows]
        found.append((rows[0], rows[2:]))
    return found


def measured(cell):
    """The keys of the stored results that a cell's figures are bound to."""
    keys = [m["key"] for m in figures.BOUND.finditer(cell)]
    return [key for key in keys if key not in figures.FREE]


def complaint(row):
    """What is wrong with a row of the page, or None."""
    if len(row) != len(HEADER):
        return f"{len(row)} cells"
    said, verdict, here, elsewhere, chapter = row
    if not said or not elsewhere:
        return "an empty cell"
    if not VERDICT.fullmatch(verdict):
        return f"the verdict {verdict!r}"
    if not measured(here) and not WHY_NOT.search(here):
        return "neither a figure of ours nor why there is none"
    if figures.unbound(f"{here} {elsewhere}"):
        return "a figure that is not bound"
    link = re.fullmatch(r"\[(\d+)\]\(\.\./(notebooks/(\d\d)_\w+\.ipynb)\)", chapter)
    if not link or int(link[1]) != int(link[3]) or not (ROOT / link[2]).is_file():
        return f"no chapter: {chapter}"


def every_row():
    return [row for _, rows in tables(PAGE.read_text("utf8")) for row in rows]


@pytest.mark.parametrize("row", every_row(), ids=lambda row: row[0])
def test_a_row_is_whole(row):
    assert complaint(row) is None


def test_the_page_has_its_rows_and_says_how_many():
    text = PAGE.read_text("utf8")
    assert all(header == HEADER for header, _ in tables(text))
    rows = every_row()
    assert len(rows) >= 25
    assert len({row[0] for row in rows}) == len(rows), "a claim stands twice"
    verdicts = [row[1].split("**")[1] for row in rows]
    assert set(verdicts) == VERDICTS
    said = re.search(r"(\d+) of these (\d+) sayings hold in one place", text)
    assert said.groups() == (str(verdicts.count("depends")), str(len(rows)))
    said = re.search(r"(\d+) are true wherever", text)
    assert said[1] == str(verdicts.count("true"))


def test_the_figures_are_those_stored():
    assert not figures.stale(PAGE.read_text("utf8"))
    assert not figures.unbound(PAGE.read_text("utf8"))


def test_a_stored_figure_that_changes_is_noticed(monkeypatch):
    """Each file that the page draws on, every figure in a copy of it a tenth larger."""
    text, load = PAGE.read_text("utf8"), results.load
    names = {key.split(":")[0] for row in every_row() for key in measured(row[2])}
    assert len(names) > 10
    for changed in names:

        def altered(name, folder=None, changed=changed):
            stored = load(name, folder)
            if name == changed:
                for figure in stored["figures"].values():
                    figure["value"] = 1.1 * figure["value"] + 0.1
            return stored

        monkeypatch.setattr(results, "load", altered)
        stale = figures.stale(text)
        assert stale and {key.split(":")[0] for *_, key in stale} == {changed}


def test_a_fault_in_a_row_is_found():
    row = every_row()[1]
    assert complaint(row) is None and measured(row[2])
    faults = {
        "another verdict": (1, "**partly**"),
        "no bold": (1, row[1].replace("*", "")),
        "it depends, nobody knows on what": (1, "**depends**"),
        "no figure": (2, "about the same"),
        "a cited figure in the place of ours": (2, "0.5<!-- cited --> less"),
        "a loose figure": (3, "0.57 in the paper"),
        "no source": (3, ""),
        "a chapter that does not exist": (4, "[99](../notebooks/99_none.ipynb)"),
        "another chapter's number": (4, row[4].replace("[", "[1", 1)),
    }
    for fault, (place, text) in faults.items():
        broken = [*row[:place], text, *row[place + 1 :]]
        assert complaint(broken), fault
    assert complaint(row[:-1])
    assert complaint([*row[:2], "not measured here: no GPU", *row[3:]]) is None
