"""The plans of 4 and 12 weeks: made from the chapters as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import syllabus as tool
from tools.problem_sets import SETS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "book" / "instructors.md").read_text("utf8")
syllabus = tool.syllabus
CHAPTERS = syllabus.chapters(ROOT)
each_plan = pytest.mark.parametrize("count", syllabus.PLANS)


def rows(count, **links):
    """The cells of the weeks' table, and those of the exercises' table."""
    lines = syllabus.markdown(ROOT, count, **links)
    fold = (
        lines.index("</details>"),
        next(i for i, x in enumerate(lines) if "<det" in x),
    )

    def cells(some):
        found = [re.split(r" *(?<!\\)\| *", x)[1:-1] for x in some if x.startswith("|")]
        return found[2:]

    return cells(lines[: fold[1]]), cells(lines[fold[1] : fold[0]])


def test_every_notebook_is_a_chapter_with_minutes():
    names = {p.stem[:2] for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert CHAPTERS.keys() == names
    for number, chapter in CHAPTERS.items():
        assert 5 <= chapter["read"] <= 120, number


def test_twelve_weeks_have_every_chapter_once():
    planned = [c for week, _ in syllabus.weeks(12, CHAPTERS) for c in week]
    assert planned == sorted(CHAPTERS)


@each_plan
def test_a_plan_has_no_chapter_and_no_set_twice(count):
    weeks = syllabus.PLANS[count]
    assert len(weeks) == count
    planned = [c for week, _ in weeks for c in week]
    sets = [task for _, task in weeks if task]
    assert len(set(planned)) == len(planned) and planned == sorted(planned)
    assert len(set(sets)) == len(sets) and set(sets) <= SETS.keys()
    assert count != 12 or set(sets) == SETS.keys()


@each_plan
def test_the_tables_say_what_the_notebooks_say(count):
    weeks, detail = rows(count)
    plan = syllabus.weeks(count, CHAPTERS)
    assert len(weeks) == len(plan) + 1
    mine = [
        (w, e)
        for w, (names, _) in enumerate(plan, 1)
        for n in names
        for e in CHAPTERS[n]["exercises"]
    ]
    assert len(detail) == len(mine)
    for cells, (week, e) in zip(detail, mine, strict=True):
        assert cells[0] == str(week) and f"[{e['id']}]" in cells[1]
        assert cells[3:] == [e["level"], str(e["minutes"]), str(e["points"])]
    for week, (names, task) in enumerate(plan, 1):
        cells = weeks[week - 1]
        own = [e for w, e in mine if w == week]
        assert cells[0] == str(week)
        assert all(CHAPTERS[n]["name"] in cells[1] for n in names)
        assert cells[2] == f"{sum(CHAPTERS[n]['read'] for n in names)} min"
        assert cells[3] == f"{sum(e['minutes'] for e in own)} min"
        assert cells[4] == str(sum(e["points"] for e in own))
        assert all(f"sheet {n}" in cells[5] for n in names)
        assert (f"[problem set {task}]" in cells[5]) == bool(task)
    assert weeks[-1][4] == str(sum(e["points"] for _, e in mine))


@each_plan
def test_the_page_has_the_plan(count):
    assert f"```{{syllabus}} {count}\n```" in PAGE


def test_a_chapter_that_appears_shows_up_and_one_that_goes_is_left_out():
    more = CHAPTERS | {"99": CHAPTERS["01"]}
    assert syllabus.weeks(12, more)[-1][0][-1] == "99"
    fewer = {c: v for c, v in CHAPTERS.items() if c not in ("05", "06")}
    planned = [c for week, _ in syllabus.weeks(12, fewer) for c in week]
    assert planned == sorted(fewer)
    assert [week for week, _ in syllabus.weeks(4, fewer)][1] == ["03"]
    assert syllabus.weeks(4, {}) == [([], 1), ([], 3), ([], 5), ([], 6)]


@pytest.mark.parametrize("count", [0, 5, "4", None, -12])
def test_there_are_no_other_plans(count):
    with pytest.raises(ValueError, match="there are plans of 4 and 12 weeks"):
        syllabus.weeks(count, CHAPTERS)


@pytest.mark.parametrize(
    "said, wanted",
    [
        ("Ten minutes of reading and running, forty for the exercises. No GPU.", 10),
        ("Thirty-five minutes to read, 40 for the exercises.", 35),
        ("75 minutes, 5 of them exercises. The cells run in a minute.", 70),
        ("Half an hour of reading, 45 minutes for the exercises.", 30),
        ("Twenty minutes.", 20),
    ],
)
def test_minutes_are_read_off_the_line_below_the_title(said, wanted):
    assert syllabus.minutes_to_read(book(said)) == wanted


@pytest.mark.parametrize(
    "said", ["", "No GPU needed.", "Some minutes.", "5 minutes, 5 of them exercises."]
)
def test_a_title_without_minutes_is_refused(said):
    with pytest.raises(ValueError, match="no line such as"):
        syllabus.minutes_to_read(book(said))


def book(said):
    """A chapter of one exercise of five minutes."""
    title = dict(
        cell_type="markdown", metadata={}, source=f"# 99. Made up\n\n*{said}*\n"
    )
    exercise = dict(id="99-1", title="Why", minutes=5, points=2)
    meta = dict(peftlab=dict(exercise=exercise))
    return dict(cells=[title, dict(cell_type="markdown", metadata=meta, source="")])


def test_the_command_prints_a_plan_whose_links_leave_the_page():
    command = [sys.executable, str(ROOT / "tools" / "syllabus.py")]
    done = subprocess.run([*command, "4"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("| week |")
    assert "](../" not in done.stdout and "/blob/" in done.stdout
    done = subprocess.run([*command, "5"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice" in done.stderr
