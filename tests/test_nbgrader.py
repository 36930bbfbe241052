"""nbgrader's own commands, from our sources to the feedback, nothing edited by hand.

One chapter's exercises are handed in right, wrong and empty; the commands run as an
instructor types them, and the scores are read from nbgrader's gradebook.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook
from nbgrader.preprocessors import Execute
from traitlets.config import PyFileConfigLoader

from tools import student
from tools.student import exercises

ROOT = Path(__file__).parents[1]
CHAPTER = "11_what_training_costs"  # its set-up trains nothing
BOOK = nbformat.read(ROOT / "notebooks" / f"{CHAPTER}.ipynb", as_version=4)
ALL = exercises.exercises(BOOK)
AUTO = {e["id"]: e for e in ALL if e["grading"] == "auto"}
POINTS = sum(e["points"] for e in AUTO.values())
PEOPLE = ("right", "wrong", "empty")
SECRETS = ("BEGIN SOLUTION", "BEGIN HIDDEN", "book-check", "exercise-stub", '"rubric":')


@pytest.fixture(scope="module", autouse=True)
def activated():
    """nbgrader calls alembic by name: as in an activated environment."""
    with pytest.MonkeyPatch.context() as patch:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        for name, value in (student.KERNEL | dict(PATH=path, MPLBACKEND="Agg")).items():
            patch.setenv(name, value)
        patch.delenv("PEFTLAB_RESULTS", raising=False)
        yield


def nbgrader(folder, *arguments):
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    said = f"nbgrader {' '.join(arguments)}: {done.stderr[-3000:]}"
    assert done.returncode == 0, said


def answers(who):
    """{grade_id: what is written in its cell} of somebody who hands in."""
    if who == "empty":
        return {}
    if who == "right":
        mine = {e["id"]: exercises.source(e["solution"]) for e in ALL}
        return mine | {e["id"]: "In words." for e in ALL if e["id"] not in AUTO}
    wrong = exercises.wrong_answers(ROOT, CHAPTER)
    return {w["exercise"]: w["code"] for w in reversed(wrong)}


def hand_in(course, who):
    released = course / "release" / CHAPTER / f"{CHAPTER}.ipynb"
    book = nbformat.read(released, as_version=4)
    written = answers(who)
    for cell in book.cells:
        if exercises.role(cell) in ("solution", "answer"):
            name = exercises.grade_id(cell)
            cell.source = written.get(name, cell.source)
    path = course / "submitted" / who / CHAPTER / f"{CHAPTER}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(book, path)


@pytest.fixture(scope="module")
def course(activated, tmp_path_factory):
    """A course from `tools/student.py --course` to nbgrader's feedback."""
    folder = tmp_path_factory.mktemp("course")
    options = ["--course", str(folder), "--exercises-only"]
    student.main([CHAPTER[:2], *options])
    nbgrader(folder, "generate_assignment", CHAPTER)
    for who in PEOPLE:
        hand_in(folder, who)
    nbgrader(folder, "autograde", CHAPTER)
    nbgrader(folder, "generate_feedback", CHAPTER)
    return folder


def test_the_assignment_that_nbgrader_releases_tells_no_secrets(course):
    text = (course / "release" / CHAPTER / f"{CHAPTER}.ipynb").read_text("utf8")
    assert not [secret for secret in SECRETS if secret in text]
    book = nbformat.reads(text, as_version=4)
    cells = {c.metadata.nbgrader.grade_id: c for c in book.cells if exercises.role(c)}
    for exercise in ALL:
        cell = cells[exercise["id"]]
        if exercise["id"] in AUTO:
            assert cell.source == student.stub(exercise["solution"])
        else:
            assert cell.source.strip() == "YOUR ANSWER HERE"


def test_a_cell_may_take_longer_than_nbgraders_30_seconds(course):
    loaded = PyFileConfigLoader("nbgrader_config.py", str(course)).load_config()
    assert Execute().timeout == 30
    assert Execute(config=loaded).timeout == student.SECONDS_A_CELL > 60


def test_right_wrong_and_empty_hand_ins_get_their_points(course):
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        hand_ins = {who: book.find_submission(CHAPTER, who) for who in PEOPLE}
        scores = {who: hand_in.score for who, hand_in in hand_ins.items()}
        manual = hand_ins["right"].needs_manual_grade
    assert scores["right"] == POINTS, scores
    assert scores["wrong"] == 0 and scores["empty"] == 0, scores
    assert manual, "an answer in words waits for its grade"


@pytest.mark.parametrize("who", PEOPLE)
def test_feedback_shows_each_check_that_failed(course, who):
    page = course / "feedback" / who / CHAPTER / f"{CHAPTER}.html"
    failed = page.read_text("utf8").count("output_error")
    assert failed == (0 if who == "right" else len(AUTO))
