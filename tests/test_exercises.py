"""The exercises: their metadata, their checks, and the sheets made from them.

A check must do this: pass the chapter's own solution, standing on nothing but the cells
tagged `exercise-setup`, and every published variant of it, whatever the state of the
random generators; reject the empty stub and every published wrong answer, each with the
message that names its mistake; and mind no function of the learner's, whatever its
name. At the end the same rules are shown to notice a check that was emptied, on a
notebook made up for the purpose.

The set-up of a chapter runs once. Each answer is judged in a copy of the process
(os.fork), so that nothing which it changes is seen by the next.

    python -m pytest -q tests/test_exercises.py -k 02-3
"""

import ast
import json
import linecache
import os
import pickle
import random
import re
import signal
import sys
import traceback
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import student  # noqa: E402
from tools.student import exercises  # noqa: E402

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BOOKS = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
ALL = [(c, e) for c, book in BOOKS.items() for e in exercises.exercises(book)]
AUTO = [(c, e) for c, e in ALL if e.get("grading") == "auto"]
WRONG = {chapter: exercises.wrong_answers(ROOT, chapter) for chapter in BOOKS}
CASES = [(c, w) for c, every in WRONG.items() for w in every]
RIGHT = {chapter: exercises.right_answers(ROOT, chapter) for chapter in BOOKS}
VARIANTS = [(c, r) for c, every in RIGHT.items() for r in every]
SEEDS = 25  # with which a right answer must pass
WRONG_SEEDS = 3  # with which a wrong answer must be rejected
SECONDS = 60  # of the processor, for one answer with all its seeds
# What learners call their own helpers.
HELPERS = """answer batch best case cases change check compare count delta draw error
    expected forward g generator got helper inputs keep kept loss make merged message
    named ok out output predict reference result rng row rows same sample saved score
    seed seeds share shape size t test total truth value values want wanted""".split()
LEVELS = {"run", "explain", "build", "investigate"}
FACTS = "title objective level minutes points grading heading".split()
KNOWN = {"id", *FACTS, "rubric", "needs", "solution", "check", "stub"}
FOLD = dict(code_prompt_show="Show solution", code_prompt_hide="Hide solution")
MARKER = re.compile(r"(BEGIN|END) (SOLUTION|HIDDEN TESTS)")


def each(names, values, label):
    return pytest.mark.parametrize(names, values, ids=[label(*v) for v in values])


each_exercise = each("chapter, exercise", ALL, lambda c, e: e.get("id", c))
each_auto = each("chapter, exercise", AUTO, lambda c, e: e.get("id", c))
each_wrong = each(
    "chapter, wrong", CASES, lambda c, w: f"{w['exercise']} {w['mistake']}"
)
each_right = each(
    "chapter, right", VARIANTS, lambda c, r: f"{r['exercise']} {r['what']}"
)
each_chapter = pytest.mark.parametrize("chapter", BOOKS)


@pytest.fixture(autouse=True)
def one_thread_in_a_folder_of_its_own(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.delenv("PEFTLAB_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)


# ---- running the cells of an exercise


def execute(code, space, name):
    """Run a cell in a namespace, without its IPython magics."""
    code = re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M)
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    exec(compile(code, name, "exec"), space)


GROUNDS = {}


def ground(book):
    """The names that the setup cells of a notebook leave; they run once for all."""
    if id(book) not in GROUNDS:
        space = {"__name__": "__main__"}
        for i, cell in enumerate(exercises.setup_cells(book)):
            execute(exercises.source(cell), space, f"<exercise-setup {i}>")
        GROUNDS[id(book)] = book, space
    return GROUNDS[id(book)][1]


class Failure(NamedTuple):
    """What became of an answer that its check did not accept."""

    kind: str
    said: str
    own_words: bool

    def __repr__(self):
        return f"{self.kind}: {self.said}"


def judge(book, exercise, answer, seeds=1, before_check=None):
    """Run the check on an answer in the solution's place: a Failure or None, a seed.

    before_check: a function of the namespace, called between the answer and its check.
    """
    check = exercises.source(exercise["check"])
    space = ground(book)

    def outcomes():
        needed = [
            other
            for other in exercises.exercises(book)
            if other["id"] in exercise.get("needs", ())
        ]
        found = []
        for seed in range(seeds):
            random.seed(seed), torch.manual_seed(seed), np.random.seed(seed)
            own = dict(space)
            for other in needed:
                execute(exercises.source(other["solution"]), own, f"<{other['id']}>")
            found.append(outcome(answer, check, own, before_check))
        return found

    return apart(outcomes)


def outcome(answer, check, space, before_check):
    try:
        execute(answer, space, "<answer>")
    except Exception as error:
        return Failure(type(error).__name__, f"before the check: {error}", False)
    if before_check:
        before_check(space)
    try:
        execute(check, space, "<check>")
    except Exception as error:
        own_words = in_the_checks_own_words(error, check)
        return Failure(type(error).__name__, str(error).strip(), own_words)


def apart(function):
    """What a function returns, from a copy of this process that ends with it.

    Where a copy is not safe (beside a GPU, or not on Linux) it runs right here."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return function()
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            result = pickle.dumps((function(), None))
        except BaseException:
            result = pickle.dumps((None, traceback.format_exc()))
        with open(sender, "wb") as stream:
            stream.write(result)
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as stream:
        result = stream.read()
    os.waitpid(child, 0)
    assert result, f"it died, or took {SECONDS} seconds and no end"
    value, trouble = pickle.loads(result)
    assert trouble is None, trouble
    return value


def defined(code):
    """The names that a cell defines for the cells after it."""
    names = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        names |= {getattr(node, "name", None)} - {None}
    return names


def in_the_checks_own_words(error, check):
    """An assert, or a `raise` that stands in the check: not an accident on the way."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raises = [n for n in ast.walk(ast.parse(check)) if isinstance(n, ast.Raise)]
    raised = any(n.lineno <= last.lineno <= n.end_lineno for n in raises)
    return isinstance(error, AssertionError) or last.filename == "<check>" and raised


# ---- what must hold of an exercise


def assert_check_accepts(book, exercise, answer, what="the chapter's own solution"):
    for seed, failure in enumerate(judge(book, exercise, answer, SEEDS)):
        assert failure is None, (
            f"{exercise['id']}: {what} fails its check with seed {seed}, standing on "
            f"the exercise-setup cells alone: {failure!r}"
        )


def assert_check_accepts_the_solution(book, exercise):
    assert_check_accepts(book, exercise, exercises.source(exercise["solution"]))


def assert_check_rejects_the_stub(book, exercise):
    stub = student.stub(exercise["solution"])
    (failure,) = judge(book, exercise, stub)
    assert failure, f"{exercise['id']}: the check accepts the empty stub"


def assert_check_minds_no_helper(book, exercise):
    """The learner has functions of these names; the solution uses none of them."""
    solution = exercises.source(exercise["solution"])
    used = {n.id for n in ast.walk(ast.parse(solution)) if isinstance(n, ast.Name)}
    names = set(HELPERS) - used - defined(solution)

    def learners_own(*arguments, **options):
        raise TypeError("a function of the learner's was called")

    def define(space):
        space.update(dict.fromkeys(names, learners_own))

    (failure,) = judge(book, exercise, solution, before_check=define)
    assert not failure, (
        f"{exercise['id']}: the check breaks if the learner has helpers named like "
        f"count, got or check: {failure!r}"
    )


def assert_check_rejects(book, exercise, wrong):
    name, check = wrong["mistake"], exercises.source(exercise["check"])
    missing = defined(student.stub(exercise["solution"])) - defined(wrong["code"])
    assert not missing, f"{name}: the wrong answer does not define {missing}"
    assert not re.search(wrong["message"], ""), f"{name}: its pattern matches anything"
    for failure in judge(book, exercise, wrong["code"], WRONG_SEEDS):
        assert failure, f"{exercise['id']}: the check accepts: {name}"
        assert failure.own_words, (
            f"{name}: the check breaks down instead of saying what is wrong: "
            f"{failure!r}"
        )
        assert_message(failure.said, wrong, check)


def assert_message(said, wrong, check):
    words, says = wrong["message"], f"{wrong['mistake']}: the check says {said!r}"
    assert re.search(words, said), f"{says}, which {words!r} does not match"
    assert len(said) >= 18 and len(said.split()) >= 4, f"{says}, not a sentence"
    shown = exercises.message(check, words)
    assert shown is not None, (
        f"{says}, but {words!r} matches no text of the check as it is written, where …"
        " stands for a value"
    )
    pattern = re.escape(shown).replace("…", ".*")
    assert re.search(pattern, said, re.DOTALL), (
        f"{says}, but the instructor's page shows the first text that {words!r}"
        f" matches, {shown!r}: make it match only one"
    )


@each_auto
def test_a_check_passes_the_solution_and_rejects_the_stub(chapter, exercise):
    assert_check_accepts_the_solution(BOOKS[chapter], exercise)
    assert_check_rejects_the_stub(BOOKS[chapter], exercise)
    asserts = ast.walk(ast.parse(exercises.source(exercise["check"])))
    for node in asserts:
        if isinstance(node, ast.Assert):
            assert node.msg, (
                f"{exercise['id']}: no message for {ast.unparse(node.test)}"
            )


@each_auto
def test_a_check_minds_no_helper_of_the_learners(chapter, exercise):
    assert_check_minds_no_helper(BOOKS[chapter], exercise)


def automatic(chapter, answer):
    every = {e["id"]: e for c, e in AUTO if c == chapter}
    name = answer["exercise"]
    assert name in every, f"{chapter} checks no {name}"
    return every[name]


@each_right
def test_another_right_answer_passes(chapter, right):
    exercise = automatic(chapter, right)
    assert_check_accepts(BOOKS[chapter], exercise, right["code"], right["what"])


@each_wrong
def test_a_wrong_answer_is_rejected_by_name(chapter, wrong):
    assert_check_rejects(BOOKS[chapter], automatic(chapter, wrong), wrong)


@each_chapter
def test_a_chapter_has_answers_enough(chapter):
    assert len(WRONG[chapter]) >= 22, "at least 22 wrong answers a chapter"
    assert len(RIGHT[chapter]) >= 7, "at least 7 right answers beside the chapter's own"


# ---- metadata


@each_exercise
def test_the_metadata_is_complete(chapter, exercise):
    name = exercise["id"]
    assert re.fullmatch(r"\d\d-\d+", name) and name[:2] == chapter[:2]
    assert not exercise.keys() - KNOWN, f"{name}: unknown metadata"
    assert all(str(exercise[key]).strip() for key in FACTS), f"{name}: empty metadata"
    assert exercise["level"] in LEVELS
    assert exercise["grading"] in exercises.GRADED
    for key in ("minutes", "points"):
        assert type(exercise[key]) is int and exercise[key] > 0, f"{name}: {key}"
    wanted = f"Exercise {name} · {exercise['title']}"
    assert exercise["heading"] == wanted, f"no Markdown cell has the line ### {wanted}"
    before = [e["id"] for c, e in ALL if c == chapter]
    before = before[: before.index(name)]
    assert set(exercise.get("needs", ())) <= set(before), "it needs a later exercise"


@each_exercise
def test_an_exercise_has_a_check_or_a_rubric(chapter, exercise):
    cell, source = exercise["solution"], exercises.source(exercise["solution"])
    name, graded = exercise["id"], exercise["check"]
    assert exercises.grade_id(cell) == name
    if exercise["grading"] == "auto":
        assert exercises.role(cell) == "solution" and cell.cell_type == "code"
        assert graded, f"no cell has the grade_id {name}-check"
        published = [w["exercise"] for w in WRONG[chapter]]
        assert name in published, f"no wrong answer is published for {name}"
        assert "### BEGIN SOLUTION" in source
        assert cell.metadata.get("mystnb") == FOLD, "the book must fold the solution"
        assert "hide-input" in cell.metadata.get("tags", ())
    else:
        assert exercises.role(cell) == "answer" and cell.cell_type == "markdown"
        assert graded is None
        assert exercise["rubric"] and all(point.strip() for point in exercise["rubric"])
        assert "<details>" in source, "the book must fold the model answer"
        graded = cell
    assert graded.metadata.nbgrader.points == exercise["points"]


@each_chapter
def test_a_chapter_has_exercises_and_no_cell_of_nbgraders_is_astray(chapter):
    every = exercises.exercises(BOOKS[chapter])
    assert every, f"{chapter} has no exercise"
    assert exercises.setup_cells(BOOKS[chapter]), "no cell is tagged exercise-setup"
    own = [e["solution"] for e in every] + [e["check"] for e in every if e["check"]]
    for cell in BOOKS[chapter].cells:
        if exercises.role(cell):
            name = exercises.grade_id(cell)
            assert any(cell is o for o in own), f"{name} belongs to no exercise"
        elif "nbgrader" not in cell.metadata:
            assert not MARKER.search(cell.source), "a marker outside nbgrader's cells"


def test_ids_are_unique_and_answers_belong_to_chapters():
    assert not [i for i, n in Counter(e["id"] for _, e in ALL).items() if n > 1]
    for folder in (exercises.WRONG_ANSWERS, exercises.RIGHT_ANSWERS):
        published = {p.stem for p in (ROOT / folder).glob("*.yml")}
        assert published <= BOOKS.keys(), f"{folder}: answers that belong to no chapter"
    for _, wrong in CASES:
        assert set(wrong) == {"exercise", "mistake", "code", "message"}
        assert all(text.strip() for text in wrong.values())
    for _, right in VARIANTS:
        assert set(right) == {"exercise", "what", "code"}
        assert all(text.strip() for text in right.values())


# ---- the sheets


def split(cell):
    """The lines of a cell that a student may see, and those that must go."""
    seen, hidden, where = [], [], None
    for line in exercises.source(cell).splitlines():
        marker = MARKER.search(line)
        if marker:
            where = marker[0] if marker[1] == "BEGIN" else None
        else:
            (hidden if where else seen).append(line.strip())
    if exercises.role(cell) == "answer" and not hidden:
        seen, hidden = [], seen
    return seen, [line for line in hidden if line]


def assert_the_sheets_are_sound(book, wrong):
    """The student's keeps the secrets and stops at the first check; the other tells."""
    every = exercises.exercises(book)
    sheet = student.student(book)
    text = nbformat.writes(sheet)
    sources = "\n".join(cell.source for cell in sheet.cells)
    lines = Counter(line.strip() for line in sources.splitlines())
    dropped = [c for c in book.cells if out_of_sight(c)]
    parts = [split(cell) for cell in book.cells if not out_of_sight(cell)]
    names = {cell.id for cell in sheet.cells}
    assert names == {c.id for c in book.cells} - {c.id for c in dropped}
    seen = Counter(line for part in parts for line in part[0])
    for line in {line for part in parts for line in part[1]}:
        assert lines[line] <= seen[line], f"the student sees {line!r}"
    assert not MARKER.search(text)
    for answer in wrong:
        assert answer["code"].strip() not in sources, answer["mistake"]
    points = [point for e in every for point in e.get("rubric", ())]
    assert not [p for p in points if p in text], "the student sees the rubric"
    for cell in sheet.cells:
        assert not set(cell.metadata.get("tags", ())) & student.FOLDS
        assert not {"mystnb", "cellView"} & cell.metadata.keys(), "nothing is folded"
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None

    instructors = student.instructor(book, wrong)
    notes = [c for c in instructors.cells if "instructor" in c.metadata.get("tags", ())]
    rest = [c.source for c in instructors.cells if c not in notes]
    assert rest == [c.source for c in book.cells]
    for exercise in every:
        name = f"exercise {exercise['id']}*"
        note = next(c.source for c in notes if name in c.source)
        answers = [w["code"].strip() for w in wrong if w["exercise"] == exercise["id"]]
        points = exercises.plural(exercise["points"], "point")
        for text in (points, *exercise.get("rubric", ()), *answers):
            assert text in note

    for exercise in exercises.exercises(sheet):
        if exercise["check"]:
            (failure,) = judge(book, exercise, exercise["solution"].source)
            assert failure, f"{exercise['id']}: the student's check accepts the stub"
            assert failure.kind in student.STUDENT_FAULTS, failure


def out_of_sight(cell):
    """Whether no sheet for a student has the cell."""
    return any(
        exercises.tagged(cell, tag) for tag in (exercises.STUB, exercises.BOOK_CHECK)
    )


@each_chapter
def test_the_sheets_of_a_chapter(chapter):
    assert_the_sheets_are_sound(BOOKS[chapter], WRONG[chapter])


def test_the_instructors_page_lists_every_exercise():
    page = ROOT / "_build" / "html" / "book" / "instructors.html"
    assert page.is_file(), f"there is no {page}: run `make book` first"
    article = BeautifulSoup(page.read_text("utf8"), "html.parser").find("article")
    links = {a.get_text(): a["href"] for a in article.select("td a[href]")}
    code = article.get_text()
    for chapter, exercise in ALL:
        link = links.get(exercise["id"], "")
        assert f"{chapter}.html#exercise-" in link, (
            f"{exercise['id']}: rebuild the book"
        )
    for _, wrong in CASES:
        assert wrong["code"].strip() in code, wrong["mistake"]


# ---- the same rules on a notebook made up here: they notice what is broken

SOLUTION = '''def scale(alpha, r):
    """Two numbers -> the factor of the bypass."""
    ### BEGIN SOLUTION
    the_secret_factor = alpha / r
    return the_secret_factor
    ### END SOLUTION'''
CHECK = """assert scale(16, 8) != 16, "alpha is not divided by r: the factor is alpha/r"
assert scale(8, 8) == ONE, f"alpha equal to r must give {ONE}, and changes nothing"
### BEGIN HIDDEN TESTS
assert scale(1, 4) == 0.25, "a rank above alpha makes the factor smaller than one"
### END HIDDEN TESTS"""
ANSWER = """Why divide by r?

<!-- BEGIN SOLUTION -->
<details><summary>Show an answer</summary>

So that the rank can change and the learning rate stay.

</details>
<!-- END SOLUTION -->"""
MISTAKES = [
    dict(exercise="99-1", mistake=mistake, message=words)
    | dict(code=f"def scale(alpha, r):\n    return {value}\n")
    for mistake, value, words in (
        ("alpha alone", "alpha", "not divided by r"),
        ("divided by r squared", "alpha / r**2", "alpha equal to r"),
        ("never below one", "max(1, alpha / r)", "smaller than one"),
    )
]
PYTHON = dict(display_name="Python 3", language="python", name="python3")
PYTHON = dict(kernelspec=PYTHON, language_info=dict(name="python"))


def made_up(solution=SOLUTION, check=CHECK, before="made = ONE"):
    """A small chapter: magics, a setup, a stored output, both kinds of exercise."""
    facts = dict(level="build", minutes=5, points=2)
    one = dict(facts, id="99-1", title="The factor", grading="auto")
    one |= dict(objective="scale the bypass")
    two = dict(facts, id="99-2", title="Why", grading="rubric", level="explain")
    two |= dict(objective="explain the scale", rubric=["names the learning rate"])
    v4 = nbformat.v4

    def graded(cell, name, grade, solution, **other):
        meta = dict(grade_id=name, grade=grade, solution=solution, task=False)
        meta |= dict(locked=not solution, schema_version=3)
        meta |= dict(points=2) if grade else {}
        cell.metadata = nbformat.from_dict(dict(nbgrader=meta, **other))
        return cell

    def tagged(text, tag):
        cell = v4.new_code_cell(text)
        cell.metadata.tags = [tag]
        return cell

    output = v4.new_output("stream", text="a stored output\n")
    exercise = dict(peftlab=dict(exercise=one), mystnb=FOLD, tags=["hide-input"])
    answer = graded(v4.new_code_cell(solution), "99-1", False, True, **exercise)
    stub = student.stub(answer) if "### END" in solution else "pass"
    why = "99-2", True, True
    cells = [
        v4.new_markdown_cell("# 99. Made up\n\n[file](../peftlab/lora.py)"),
        tagged("if False:\n    %pip install nothing", "nbval-skip"),
        tagged(
            "%config Application.verbose_crash = True\nONE, count = 1.0, float",
            "exercise-setup",
        ),
        v4.new_code_cell(before, execution_count=3, outputs=[output]),
        tagged("assert made, 'for the book alone'", "book-check"),
        v4.new_markdown_cell("## Exercises\n\n### Exercise 99-1 · The factor"),
        tagged(stub, "exercise-stub"),
        answer,
        graded(v4.new_code_cell(check), "99-1-check", True, False),
        v4.new_markdown_cell("### Exercise 99-2 · Why"),
        graded(v4.new_markdown_cell(ANSWER), *why, peftlab=dict(exercise=two)),
    ]
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
    return v4.new_notebook(cells=cells, metadata=PYTHON)


def assert_all(book):
    exercise = exercises.exercises(book)[0]
    assert_check_accepts_the_solution(book, exercise)
    assert_check_minds_no_helper(book, exercise)
    assert_check_rejects_the_stub(book, exercise)
    for wrong in MISTAKES:
        assert_check_rejects(book, exercise, wrong)


def test_rules_hold_for_a_sound_exercise():
    book = made_up()
    assert_all(book)
    assert_the_sheets_are_sound(book, MISTAKES)
    text = nbformat.writes(student.student(book))
    for secret in ("the_secret_factor", "0.25", "learning rate", "a stored output"):
        assert secret not in text
    assert "raise NotImplementedError()" in text and "YOUR ANSWER HERE" in text


def test_the_message_of_an_answer_is_found_among_the_checks_texts():
    check = 'assert a, "the factor is alpha"\nassert b, f"{name} was changed in place"'
    assert exercises.message(check, "factor is") == "the factor is alpha"
    changed = "… was changed in place"
    assert exercises.message(check, "was changed") == changed
    assert exercises.message(check, "table was changed in place") == changed
    assert exercises.message(check, "table was moved") is None


def test_an_answer_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.2)
    endless = SOLUTION.replace("the_secret_factor = ", "while True: ")
    book = made_up()
    with pytest.raises(AssertionError, match="no end"):
        judge(book, exercises.exercises(book)[0], endless)


def test_what_an_answer_changes_is_gone_with_it():
    book = made_up(solution=SOLUTION.replace("alpha / r", "ONE.append(r) or alpha / r"))
    book.cells[2].source = "ONE = [1.0]"
    exercise = exercises.exercises(book)[0]
    assert judge(book, exercise, exercises.source(exercise["solution"])) != [None]
    assert ground(book)["ONE"] == [1.0]


LONG = "alpha is not divided by r: the factor is alpha/r"
BREAKS = "1 / (scale(16, 8) - 16), 'alpha is not divided by r'\n" + CHECK
BROKEN = {
    "emptied": ("", "accepts the empty stub"),
    "trivially true": ("assert scale or True, 'it is a function'", "accepts the empty"),
    "true of any number": ("assert scale(16, 8) is not None, 'x'", "accepts: alpha"),
    "its hidden part gone": (CHECK.split("### BEGIN")[0], "accepts: never below one"),
    "wrong about the solution": (
        "assert scale(16, 8) == 3, 'no'",
        "own solution fails",
    ),
    "without messages": (re.sub(r", f?\".*", "", CHECK), "does not match"),
    "a word for a message": (CHECK.replace(LONG, "not divided by r"), "not a sentence"),
    "breaking down": (BREAKS, "breaks down"),
    "using a name of the learner's": (
        CHECK.replace("scale(8, 8)", "count(scale(8, 8))"),
        "helpers named like",
    ),
    "right by luck": (
        "import random\nassert random.random() > 0.2, 'one draw in five is unlucky'",
        "with seed",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_check_is_noticed(name):
    check, complaint = BROKEN[name]
    with pytest.raises(AssertionError, match=complaint):
        assert_all(made_up(check=check))


def test_answers_define_what_the_stub_does_and_lean_on_the_setup_alone():
    book = made_up()
    wrong = dict(MISTAKES[0], code="def scaling(alpha, r):\n    return alpha\n")
    with pytest.raises(AssertionError, match="does not define"):
        assert_check_rejects(book, exercises.exercises(book)[0], wrong)
    book = made_up(solution=SOLUTION.replace("alpha / r", "alpha / r * made"))
    with pytest.raises(AssertionError, match="exercise-setup cells alone"):
        assert_all(book)


@pytest.fixture
def chapter(tmp_path):
    path = tmp_path / "notebooks" / "99_made_up.ipynb"
    path.parent.mkdir()

    def store(**changes):
        nbformat.write(made_up(**changes), path)
        return path

    store()
    return store


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_sheets_and_zips_are_the_same_each_time(chapter, tmp_path):
    for out in ("one", "two"):
        student.write([chapter()], tmp_path / out, tmp_path)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    archive = zipfile.ZipFile(tmp_path / "one" / "student.zip")
    assert archive.namelist() == ["student/99_made_up.ipynb"]
    sheet = tmp_path / "one" / "student" / "99_made_up.ipynb"
    assert archive.read("student/99_made_up.ipynb") == sheet.read_bytes()
    nbformat.validate(nbformat.read(sheet, as_version=4))
    assert "/blob/" in json.loads(sheet.read_text("utf8"))["cells"][0]["source"][-1]
    path = chapter(solution=SOLUTION.replace("### END SOLUTION", ""))
    with pytest.raises(ValueError, match="99_made_up.ipynb makes no sheets"):
        student.write([path], tmp_path / "one", tmp_path)
    assert contents(tmp_path / "one") == contents(tmp_path / "two"), "the old ones stay"


RUNS = {  # what is changed, the sheet that is run, whether it is good, and words
    "sound": ({}, 0, True, "fails at 99-1-check, as it should"),
    "a check that accepts the stub": (dict(check="pass"), 0, False, "PASSES"),
    "a cell before the check fails": (
        *(dict(before="made = undefined"), 0, False),
        "FAILS at cell 3, 'made = undefined': NameError",
    ),
    "the check lacks an import": (
        *(dict(check="math.isclose(scale(8, 8), 1)"), 0, False),
        "not for the stub: NameError",
    ),
    "the instructor's": ({}, 1, True, "passes"),
    "a wrong solution": (
        *(dict(solution=SOLUTION.replace("alpha / r", "alpha")), 1, False),
        "FAILS at cell 8, 99-1-check",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_sheet_tells(name, chapter, tmp_path):
    changes, which, good, words = RUNS[name]
    path = student.write([chapter(**changes)], tmp_path / "out", tmp_path)[which]
    before = path.read_bytes()
    _, place, error = student.run(path)
    fine, said = student.verdict(path, place, error)
    assert fine is good and words in said, said
    assert path.read_bytes() == before
