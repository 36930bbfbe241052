"""The form of a chapter: what a reader sees, in what order, and what they do not see.

Each rule is a function of a notebook and its name that returns complaints. Every
chapter obeys every rule; a small chapter made up at the end shows that each rule
complains when its subject is broken.

    python -m pytest -q tests/test_notebooks.py -k 02_lora
"""

import ast
import copy
import re
from pathlib import Path

import nbformat
import pytest

from tools import notebooks, student
from tools.student import exercises

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BOOKS = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
WIDTH = 79
LONGEST, LONGEST_CHECK = 25, 80  # lines of a cell
TALK = {
    "bookkeeping": r"\bfigures\.|\bresults\.Figures\b|the text says",
    "a word for a tool": r"#\s*noqa|#\s*fmt:",
    "an invitation to change MODEL": r"hub name|^MODEL\b.*#.*\btry\b",
}
CAPTION = re.compile(r"\*\*Figure (\d+\.\d+)\.\*\*")
TENS = {"ten": 10, "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40}
TENS |= {"fifty": 50, "sixty": 60, "five": 5}
RULES = {}


def rule(function):
    RULES[function.__name__] = function
    return function


def tags(cell):
    return set(cell.metadata.get("tags", ()))


def name_of(cell):
    return f"cell {cell.id!r} ({' '.join(cell.source.split())[:40]})"


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def seen(book):
    """The code cells that are on the page, folded or not."""
    return [cell for cell in code(book) if "remove-cell" not in tags(cell)]


def hidden(book):
    """The code cells that only the book's tests need."""
    return [cell for cell in code(book) if exercises.BOOK_CHECK in tags(cell)]


def is_figure(cell):
    """Whether a cell shows a drawing: PNG, SVG, or SVG within HTML."""
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if {"image/png", "image/svg+xml"} & data.keys():
            return True
        if "<svg" in "".join(data.get("text/html", "")):
            return True
    return False


# ---- what a reader sees and does not see


@rule
def no_visible_cell_talks_to_the_build(book, chapter):
    bad = []
    for cell in seen(book):
        for what, pattern in TALK.items():
            if found := re.search(pattern, cell.source, re.M):
                bad.append(f"{what} in {name_of(cell)}: {found[0]!r}")
    return bad


@rule
def no_visible_cell_asserts_but_a_check(book, chapter):
    cells = [cell for cell in seen(book) if exercises.role(cell) != "check"]
    asserts = [cell for cell in cells if re.search(r"^\s*assert\b", cell.source, re.M)]
    return [f"{name_of(cell)} has an assert: tag it book-check" for cell in asserts]


@rule
def what_only_tests_need_is_out_of_sight(book, chapter):
    bad = []
    for cell in hidden(book):
        fixed = copy.deepcopy(cell)
        notebooks.hide(fixed)
        if fixed != cell:
            bad.append(f"{name_of(cell)} is not hidden: run tools/notebooks.py")
        if tags(cell) & {exercises.SETUP, exercises.STUB}:
            bad.append(f"{name_of(cell)}: an exercise cannot stand on it")
    for cell in code(book):
        if tags(cell) & {"remove-cell", "nbval-skip", "book-check"} == {"remove-cell"}:
            bad.append(f"{name_of(cell)} leaves the page: is it a book-check?")
    return bad


@rule
def no_visible_cell_needs_a_hidden_one(book, chapter):
    """The student's sheet has no cells for the book's tests."""
    own = set()
    for cell in hidden(book):
        own |= bound(cell)
    shared = set()
    for cell in seen(book):
        shared |= bound(cell)
    bad = []
    for cell in seen(book):
        read = {n.id for n in ast.walk(parsed(cell)) if isinstance(n, ast.Name)}
        if missing := sorted(read & (own - shared)):
            bad.append(f"{name_of(cell)} needs {missing} of a book-check cell")
    return bad


def parsed(cell):
    source = re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M)
    return ast.parse(source)


def bound(cell):
    """The names that a cell gives a value, in functions too."""
    names = set()
    for node in ast.walk(parsed(cell)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


@rule
def code_fits_the_page(book, chapter):
    bad = []
    for cell in code(book):
        if "nbval-skip" in tags(cell):  # it installs, from an address of any length
            continue
        lines = cell.source.splitlines()
        wide = [line for line in lines if len(line) > WIDTH]
        bad += [f"{name_of(cell)}: {len(line)} characters: {line}" for line in wide]
        check = exercises.role(cell) == "check" or exercises.BOOK_CHECK in tags(cell)
        most = LONGEST_CHECK if check else LONGEST
        if len(lines) > most:
            bad.append(f"{name_of(cell)} has {len(lines)} lines, more than {most}")
    return bad


@rule
def the_first_result_is_marked(book, chapter):
    marked = [cell for cell in book.cells if "first-result" in tags(cell)]
    if len(marked) != 1:
        return [f"{len(marked)} cells are tagged first-result: the one that shows it"]
    if not marked[0].get("outputs"):
        return [f"{name_of(marked[0])} is tagged first-result and shows nothing"]
    return []


# ---- figures


@rule
def every_figure_has_an_alt_text_and_a_caption_below(book, chapter):
    bad, numbers, below = [], [], [*book.cells[1:], None]
    for cell, after in zip(book.cells, below, strict=True):
        is_caption = after and after.cell_type == "markdown"
        caption = is_caption and CAPTION.match(after.source)
        if not is_figure(cell):
            if caption:
                bad.append(f"{name_of(after)} stands below no figure")
            continue
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if len(alt) <= 20:
            bad.append(f"{name_of(cell)} has no alt text: mystnb.image.alt")
        if "hide-input" not in tags(cell):
            bad.append(f"{name_of(cell)} draws: tag it hide-input")
        if caption:
            numbers.append(caption[1])
        else:
            bad.append(f"below {name_of(cell)} stands no caption **Figure N.k.** ...")
    wanted = [f"{int(chapter[:2])}.{k + 1}" for k in range(len(numbers))]
    if numbers != wanted:
        bad.append(f"the figures are numbered {numbers}, and should be {wanted}")
    return bad


# ---- exercises


@rule
def an_exercise_stands_in_order(book, chapter):
    """The task, the open stub, a hint, the solution and its check; or task, answer."""
    bad = []
    for exercise in exercises.exercises(book):
        name, written = exercise["id"], exercise["grading"] == "rubric"
        place = next(i for i, c in enumerate(book.cells) if c is exercise["solution"])
        task = f"### Exercise {name} "
        if written:
            if task not in text(book, place - 1):
                bad.append(f"{name}: above the answer stands not its task")
            continue
        stub = exercise["stub"]
        if stub is None or stub is not book.cells[place - 2]:
            bad.append(f"{name}: the stub stands not two cells above the solution")
        elif stub.source != student.stub(exercise["solution"]):
            bad.append(
                f"{name}: the stub is not the solution's: run tools/notebooks.py"
            )
        elif any(isinstance(node, ast.Raise) for node in parsed(stub).body):
            bad.append(f"{name}: the stub must define something, and run")
        if task not in text(book, place - 3):
            bad.append(f"{name}: above the stub stands not its task")
        hint = text(book, place - 1)
        if "<details>" not in hint or "Hint" not in hint:
            bad.append(f"{name}: between stub and solution stands no folded hint")
        if exercise["check"] is None or book.cells[place + 1] is not exercise["check"]:
            bad.append(f"{name}: below the solution stands not its check")
        if exercise["solution"].metadata.get("cellView") != "form":
            bad.append(f"{name}: the solution is open on Colab: run tools/notebooks.py")
    used = [e["stub"] for e in exercises.exercises(book) if e["stub"]]
    stray = [c for c in book.cells if exercises.STUB in tags(c)]
    if len(stray) != len(used):
        bad.append("a stub belongs to no exercise")
    return bad


def text(book, place):
    cell = book.cells[place]
    return cell.source if cell.cell_type == "markdown" else ""


@rule
def there_are_three_exercises_or_more_and_one_in_words(book, chapter):
    every = exercises.exercises(book)
    bad = [] if 3 <= len(every) <= 5 else [f"{len(every)} exercises"]
    if not any(e["grading"] == "rubric" for e in every):
        bad.append("no exercise is answered in words")
    return bad


@rule
def the_minutes_of_the_exercises_are_those_of_the_title(book, chapter):
    every = exercises.exercises(book)
    total = sum(e["minutes"] for e in every)
    bad = []
    for exercise in every:
        said = f"{exercises.plural(exercise['minutes'], 'minute')} · "
        said += exercises.plural(exercise["points"], "point")
        heading = re.escape(f"### Exercise {exercise['id']} ")
        cells = "\n".join(c.source for c in book.cells if c.cell_type == "markdown")
        task = re.search(rf"{heading}.*\n+(.*)", cells)
        if not task or f"*{exercise['level']} · {said}.*" not in task[1]:
            bad.append(f"{exercise['id']} should say *{exercise['level']} · {said}.*")
    said = [s for s in sentences(book.cells[0].source) if "exercise" in s]
    numbers = [n for sentence in said for n in minutes(sentence)]
    if numbers and total not in numbers:
        bad.append(f"the title says {numbers} minutes, the exercises take {total}")
    return bad


def sentences(words):
    return re.split(r"(?<=[.!?])\s|\n", words)


def minutes(sentence):
    """The numbers in a sentence, written in digits or in words."""
    words = re.findall(r"\d+|[a-z]+", sentence.lower())
    return [
        int(w) if w.isdigit() else TENS[w] for w in words if w in TENS or w.isdigit()
    ]


@rule
def a_check_keeps_to_itself(book, chapter):
    """It binds names with a leading underscore alone, and shows no solution."""
    bad = []
    for exercise in exercises.exercises(book):
        if exercise["check"] is None:
            continue
        name, tree = exercise["id"], parsed(exercise["check"])
        public = sorted(n for n in bound_outside(tree) if n[0] != "_")
        if public:
            bad.append(f"{name}: the check binds {public}, which may be the learner's")
        said = "\n".join(exercises.messages(exercise["check"].source))
        for line in solution_lines(exercise["solution"]):
            if line in said:
                bad.append(f"{name}: a message shows the solution: {line!r}")
    return bad


def bound_outside(tree):
    """The names that a cell binds for the cells after it; imports do no harm."""
    names, todo = set(), list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp)):
            pass
        elif not isinstance(node, (ast.GeneratorExp, ast.Import, ast.ImportFrom)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            todo += ast.iter_child_nodes(node)
    return names


def solution_lines(cell):
    """The lines of a solution that say something."""
    inside = re.findall(r"### BEGIN SOLUTION\n(.*?)### END", cell.source, re.S)
    lines = [line.split("#")[0].strip() for part in inside for line in part.split("\n")]
    return [line.removeprefix("return ") for line in lines if len(line) >= 20]


# ---- the rules, on every chapter


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("chapter", BOOKS)
def test_a_chapter(chapter, name):
    bad = RULES[name](BOOKS[chapter], chapter)
    if bad:
        pytest.fail("\n".join(bad), pytrace=False)


# ---- and on a chapter made up here

SOLUTION = '''def scale(alpha, r):
    """Two numbers -> the factor."""
    ### BEGIN SOLUTION
    factor = alpha / r + 0 * alpha
    return factor
    ### END SOLUTION'''
TASK = "### Exercise 99-{} · Scale\n*build · 5 minutes · 2 points.* Do."
HINT = "<details><summary>Hint</summary>\n\nDivide.\n</details>"


def graded(cell, name, solution, **meta):
    own = dict(grade_id=name, solution=solution, grade=meta.pop("grade", not solution))
    cell.metadata = nbformat.from_dict(dict(nbgrader=own, **meta))
    return cell


def exercise_cells(k, v4):
    facts = dict(id=f"99-{k}", title="Scale", level="build", minutes=5, points=2)
    facts = dict(exercise=dict(facts, grading="auto"))
    stub = v4.new_code_cell("", metadata=dict(tags=[exercises.STUB]))
    check = "_got = scale(1, 2)\nassert _got == 0.5, 'one half'"
    return [
        v4.new_markdown_cell(TASK.format(k)),
        stub,
        v4.new_markdown_cell(HINT),
        graded(v4.new_code_cell(SOLUTION), f"99-{k}", True, peftlab=facts),
        graded(v4.new_code_cell(check), f"99-{k}-check", False),
    ]


@pytest.fixture
def made_up():
    v4 = nbformat.v4
    picture = v4.new_output("display_data", data={"image/svg+xml": "<svg/>"})
    words = v4.new_output("stream", text="0.5\n")
    drawn = dict(mystnb=dict(image=dict(alt="A curve that falls from 3 to 1")))
    drawn["tags"] = ["hide-input", "first-result"]
    written = dict(id="99-3", title="Why", level="explain", minutes=5, points=2)
    written = dict(exercise=dict(written, grading="rubric", rubric=["names it"]))
    answer = v4.new_markdown_cell("<details>So.</details>")
    book = v4.new_notebook()
    book.cells = [
        v4.new_markdown_cell("# 99. Made up\n\n*Ten minutes, 15 for the exercises.*"),
        v4.new_code_cell("%pip", metadata=dict(tags=["remove-cell", "nbval-skip"])),
        v4.new_code_cell("ONE = 1", outputs=[words]),
        v4.new_code_cell("two = 2\nassert two", metadata=dict(tags=["book-check"])),
        v4.new_code_cell("plot(ONE)", metadata=drawn, outputs=[picture]),
        v4.new_markdown_cell("**Figure 99.1.** A curve."),
        *exercise_cells(1, v4),
        *exercise_cells(2, v4),
        v4.new_markdown_cell(TASK.format(3).replace("build", "explain")),
        graded(answer, "99-3", True, grade=True, peftlab=written),
    ]
    for i, cell in enumerate(book.cells):
        cell.id = f"cell-{i}"
    notebooks.prepare(book)
    return book


@pytest.mark.parametrize("name", RULES)
def test_a_sound_chapter_obeys(name, made_up):
    assert RULES[name](made_up, "99_made_up") == []


ASSERTS = "no_visible_cell_asserts_but_a_check"
TALKS = "no_visible_cell_talks_to_the_build"
SIGHT = "what_only_tests_need_is_out_of_sight"
PICTURE = "every_figure_has_an_alt_text_and_a_caption_below"
ORDER = "an_exercise_stands_in_order"
MINUTES = "the_minutes_of_the_exercises_are_those_of_the_title"
COUNT = "there_are_three_exercises_or_more_and_one_in_words"
CHECK = "a_check_keeps_to_itself"
FAULTS = {  # the rule that complains, and the cell whose text is replaced
    "a figure is kept": (TALKS, 2, "ONE", "figures.keep('a', ONE := 1, 0)\nONE"),
    "the text says": (TALKS, 2, "ONE", "# the text says so\nONE"),
    "try Qwen": (TALKS, 2, "ONE", "MODEL = 'tiny'  # with a GPU, try Qwen\nONE"),
    "noqa": (TALKS, 2, "= 1", "= 1  # noqa: E731"),
    "an assert": (ASSERTS, 2, "ONE", "assert 1\nONE"),
    "an assert in a loop": (ASSERTS, 2, "ONE", "for i in []:\n    assert i\nONE"),
    "no title": (SIGHT, 3, notebooks.CHECK_TITLE, "# checks"),
    "needs two": ("no_visible_cell_needs_a_hidden_one", 2, "= 1", "= two"),
    "wide": ("code_fits_the_page", 2, "1", "1" + " + 1" * 30),
    "long": ("code_fits_the_page", 2, "1", "1\n" * 26),
    "no caption": (PICTURE, 5, "**Figure", "Figure"),
    "another number": (PICTURE, 5, "99.1", "99.2"),
    "a caption astray": (PICTURE, 8, "<details>", "**Figure 99.2.** <details>"),
    "a stub of one's own": (ORDER, 7, "# YOUR CODE HERE", "# yours"),
    "no hint": (ORDER, 8, "Hint", "Answer"),
    "another task": (ORDER, 6, "99-1", "99-2"),
    "more minutes": (MINUTES, 0, "15", "30"),
    "other points": (MINUTES, 6, "2 points", "3 points"),
    "the learner's name": (CHECK, 10, "_got", "got"),
    "the learner's name in a loop": (CHECK, 10, "_got = ", "for row in []: 1\n_got = "),
    "the solution": (CHECK, 10, "one half", "say factor = alpha / r + 0 * alpha"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, made_up):
    own, place, old, new = FAULTS[name]
    cell = made_up.cells[place]
    assert old in cell.source
    cell.source = cell.source.replace(old, new)
    assert RULES[own](made_up, "99_made_up"), f"{own} does not notice"


MISSING = {
    "no alt text": (PICTURE, 4, "mystnb"),
    "a picture with its code open": (PICTURE, 4, "tags"),
    "no result": ("the_first_result_is_marked", 4, "tags"),
    "in sight on Colab": (SIGHT, 3, "cellView"),
    "in sight in Jupyter": (SIGHT, 3, "jupyter"),
    "an open solution": (ORDER, 9, "cellView"),
    "no stub": (ORDER, 7, "tags"),
    "no exercise in words": (COUNT, 17, "peftlab"),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_metadata_is_found(name, made_up):
    own, place, key = MISSING[name]
    del made_up.cells[place].metadata[key]
    assert RULES[own](made_up, "99_made_up"), f"{own} does not notice"


def test_a_stub_is_written_from_its_solution_and_a_check_is_hidden(made_up):
    stub, check = made_up.cells[7], made_up.cells[3]
    assert stub.source.splitlines() == [
        "def scale(alpha, r):",
        '    """Two numbers -> the factor."""',
        "    # YOUR CODE HERE",
        "    raise NotImplementedError()",
    ]
    assert check.source.startswith(notebooks.CHECK_TITLE)
    assert check.metadata.tags == ["book-check", "remove-cell"]
    assert check.metadata.jupyter.source_hidden is True
    again = copy.deepcopy(made_up)
    notebooks.prepare(again)
    assert again == made_up, "twice is once"


def test_an_alt_text_is_refreshed_like_prose(made_up, monkeypatch):
    monkeypatch.setattr(
        notebooks.figures, "stored", lambda key, chapter=None: {"top": 2.9}[key]
    )
    image = made_up.cells[4].metadata.mystnb.image
    image.alt = "A curve that falls from 3.1<!-- top --> to 1"
    notebooks.refresh(made_up, "99_made_up")
    assert image.alt == "A curve that falls from 2.9<!-- top --> to 1"
