"""Write the student and instructor sheets into _build, and run them: `make student`.

    python tools/student.py                   all chapters
    python tools/student.py 02 04             those whose name begins so
    python tools/student.py --no-run          write only
    python tools/student.py --course FOLDER   sources for a course of nbgrader's
    python tools/student.py --course FOLDER --exercises-only

The student's sheet has stubs for solutions, no hidden tests, no outputs, and nothing
that only the book's own tests need. The instructor's is the chapter whole, with points,
rubric and wrong answers below each check. The instructor's must run through; the
student's must fail, at its first check and not before. The markers are nbgrader's, and
so is the code that applies them.

Beside them stands problem_sets.zip, what a student needs for the problem sets.

`--course` writes FOLDER/source/NAME/NAME.ipynb for each chapter, which nbgrader's own
`generate_assignment` turns into the student's sheet, and FOLDER/nbgrader_config.py.
With `--exercises-only` an assignment has the exercises, and what they stand on, alone.
"""

import argparse
import copy
import os
import re
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbgrader import preprocessors

ROOT = Path(__file__).parents[1]
KERNEL = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
KERNEL |= dict(HF_HUB_OFFLINE="1")
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import exercises  # noqa: E402

# The order is that of nbgrader's own generate_assignment.
STUDENT = ["LockCells", "ClearSolutions", "ClearOutput", "CheckCellMetadata"]
STUDENT += ["ClearHiddenTests", "ComputeChecksums", "CheckCellMetadata"]
INSTRUCTOR = ["LockCells", "CheckCellMetadata"]
FOLDS = {"hide-input", "hide-cell", "hide-output", "remove-input", "remove-output"}
FOLDS |= {"first-result"}
STUDENT_FAULTS = ("AssertionError", "NotImplementedError")
SECONDS_A_CELL = 300
EPOCH = (1980, 1, 1, 0, 0, 0)  # the only date in the zips, so that they reproduce


def prepared(book, names):
    """A copy of a notebook that went through preprocessors of nbgrader's."""
    book = copy.deepcopy(book)
    for name in names:
        book, _ = getattr(preprocessors, name)().preprocess(book, {})
    return book


def link_out(book, home):
    """Links that leave the folder of notebooks lead to `home`, an address, instead."""
    for cell in book.cells:
        if home and cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", f"]({home}/")


def stub(solution):
    """What the student finds in the place of a solution's cell."""
    book = nbformat.v4.new_notebook(cells=[copy.deepcopy(solution)])
    return prepared(book, ["ClearSolutions"]).cells[0].source


def source(book, home=None, exercises_only=False):
    """The chapter as nbgrader wants its source: solutions in, nothing folded.

    Stubs go, since nbgrader makes its own, and so do cells for the book's tests and the
    rubric, which would be released. `exercises_only` leaves the exercises and the cells
    that they stand on."""
    book = copy.deepcopy(book)
    if exercises_only:
        book.cells = exercise_cells(book)
    hidden = (exercises.STUB, exercises.BOOK_CHECK)
    book.cells = [
        cell
        for cell in book.cells
        if not any(exercises.tagged(cell, tag) for tag in hidden)
    ]
    for cell in book.cells:
        meta = cell.metadata
        for key in ("mystnb", "execution", "cellView"):
            meta.pop(key, None)
        meta.get("jupyter", {}).pop("source_hidden", None)
        meta.get("peftlab", {}).get("exercise", {}).pop("rubric", None)
        tags = [tag for tag in meta.pop("tags", ()) if tag not in FOLDS]
        if tags:
            meta.tags = tags
    link_out(book, home)
    return book


def exercise_cells(book):
    """The title, the cell that installs, the set-up, and all below "## Exercises"."""
    kept, below = [], False
    for i, cell in enumerate(book.cells):
        text = cell.cell_type == "markdown" and cell.source
        if text and re.search(r"^## ", text, re.M):
            below = bool(re.search(r"^## Exercises", text, re.M))
        installs = "nbval-skip" in cell.metadata.get("tags", ())
        if i == 0 or installs or below or exercises.tagged(cell, exercises.SETUP):
            kept.append(cell)
    return kept


def student(book, home=None):
    """The sheet to hand out: stubs, visible checks only, nothing folded, no output."""
    return prepared(source(book, home), STUDENT)


def note(exercise, wrong):
    """The cell that tells the instructor what stands behind a check."""
    graded = exercises.GRADED[exercise["grading"]]
    facts = [exercise["level"]]
    facts += [exercises.plural(exercise[k], k[:-1]) for k in ("minutes", "points")]
    facts += [f"graded by {graded}"]
    text = (
        f"**For the instructor, exercise {exercise['id']}** · {' · '.join(facts)}\n\n"
    )
    text += f"Afterwards the student can {exercise['objective']}.\n"
    if exercise.get("rubric"):
        text += "\nRubric:\n\n"
    elif wrong:
        text += "\nWrong answers that the check must reject:\n"
    text += "\n".join(exercises.notes(exercise, wrong))
    cell = nbformat.v4.new_markdown_cell(text.rstrip())
    cell.id = f"instructor-{exercise['id']}"
    cell.metadata = nbformat.from_dict({"tags": ["instructor"]})
    return cell


def instructor(book, wrong=(), home=None):
    """The whole chapter, hidden tests and outputs too, with notes below each check."""
    book = prepared(book, INSTRUCTOR)
    for exercise in exercises.exercises(book):
        below = exercise["check"] or exercise["solution"]
        place = next(i for i, cell in enumerate(book.cells) if cell is below)
        own = [w for w in wrong if w["exercise"] == exercise["id"]]
        book.cells.insert(place + 1, note(exercise, own))
    link_out(book, home)
    return book


def repository():
    """Where the repository's files are seen, for links that leave the sheets."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]
    return f"{config['url']}/blob/{config['branch']}"


def replace(path, content):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def pack(folder, files):
    """folder.zip with the files in one folder, the same bytes for the same files."""
    with tempfile.TemporaryFile() as scratch:
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(files):
                entry = zipfile.ZipInfo(f"{folder.name}/{path.name}", EPOCH)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())
        scratch.seek(0)
        replace(folder.with_suffix(".zip"), scratch.read())


def bundle(out, root=ROOT):
    """Write problem_sets.zip: the tool that a student runs, and the six starters."""
    tools = root / "tools"
    files = [tools / "problem_sets.py", *(tools / "starters").glob("set*.py")]
    pack(out / "problem_sets", files)


def write(chapters, out, root=ROOT, keep=()):
    """Write the two sheets of each chapter and the two zips; return the sheets' paths.

    Every sheet is made before the first is written: a chapter whose markers are wrong
    raises ValueError and leaves what was there. Sheets of chapters that are in neither
    `chapters` nor `keep`, the stems of those that exist, go."""
    made, home = {}, repository()
    for path in chapters:
        try:
            book = nbformat.read(path, as_version=4)
            wrong = exercises.wrong_answers(root, path.stem)
            made[out / "student" / path.name] = student(book, home)
            made[out / "instructor" / path.name] = instructor(book, wrong, home)
        except Exception as error:
            raise ValueError(f"{path.name} makes no sheets: {error}") from error
    for path, book in made.items():
        replace(path, (nbformat.writes(book) + "\n").encode("utf8"))
    stems = {path.stem for path in chapters} | set(keep)
    for folder in (out / "student", out / "instructor"):
        for path in folder.glob("*.ipynb"):
            if path.stem not in stems:
                path.unlink()
        pack(folder, folder.glob("*.ipynb"))
    return list(made)


CONFIG = """# nbgrader reads this file: https://nbgrader.readthedocs.io
c = get_config()
c.CourseDirectory.course_id = "peftlab"
c.ExecutePreprocessor.timeout = {timeout}  # seconds a cell; nbgrader's own is 30
"""


def write_course(chapters, folder, exercises_only=False):
    """Write source/NAME/NAME.ipynb for each chapter, and nbgrader_config.py.

    A configuration that is there stays as it is."""
    made, home = {}, repository()
    for path in chapters:
        book = nbformat.read(path, as_version=4)
        made[path.stem] = source(book, home, exercises_only)
    for name, book in made.items():
        text = nbformat.writes(book) + "\n"
        replace(folder / "source" / name / f"{name}.ipynb", text.encode("utf8"))
    config = folder / "nbgrader_config.py"
    if not config.exists():
        replace(config, CONFIG.format(timeout=SECONDS_A_CELL).encode("utf8"))
    return list(made)


def run(path):
    """Execute a sheet where it lies, up to its first error; the file is left as it is.

    Returns (seconds, cell, error), the cell's place and the error's name or None."""
    book, begun = nbformat.read(path, as_version=4), time.time()
    where = {"metadata": {"path": str(path.parent)}}
    started = []
    client = NotebookClient(
        book,
        timeout=SECONDS_A_CELL,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources=where,
        on_cell_execute=lambda cell, cell_index: started.append(cell_index),
    )
    error = None
    try:
        client.execute()
    except CellExecutionError as failure:
        error = failure.ename
    except (CellTimeoutError, DeadKernelError) as failure:
        error = type(failure).__name__
    return time.time() - begun, started[-1] if error else None, error


def first_check(book):
    """The place of the first check, or None."""
    places = (i for i, c in enumerate(book.cells) if exercises.role(c) == "check")
    return next(places, None)


def verdict(path, place, error):
    """(whether the sheet did what it must, a sentence)."""
    book = nbformat.read(path, as_version=4)
    where = f"cell {place}, {name_of(book.cells[place])}" if error else ""
    check = first_check(book)
    if path.parent.name == "instructor" or check is None:
        return not error, f"FAILS at {where}: {error}" if error else "passes"
    wanted = exercises.grade_id(book.cells[check])
    if not error:
        return False, f"PASSES, and should fail at {wanted}"
    if place != check:
        return False, f"FAILS at {where}: {error}, and should at {wanted}"
    if error not in STUDENT_FAULTS:
        return False, f"fails at {wanted}, but not for the stub: {error}"
    return True, f"fails at {wanted}, as it should"


def name_of(cell):
    """What to call a cell in a message: its grade_id, or how it begins."""
    if exercises.role(cell):
        return exercises.grade_id(cell)
    return repr(re.sub(r"\s+", " ", cell.source)[:40])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how the chapters' names begin")
    parser.add_argument("--no-run", action="store_true", help="write only")
    parser.add_argument("--course", type=Path, help="the folder of an nbgrader course")
    parser.add_argument("--exercises-only", action="store_true", help="for --course")
    options = parser.parse_args(arguments)
    os.environ.update(KERNEL)
    os.environ.pop("PEFTLAB_RESULTS", None)  # a sheet stores no figures
    every = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chosen = tuple(options.names)
    chapters = [c for c in every if not chosen or c.stem.startswith(chosen)]
    if not chapters:
        sys.exit(f"no chapter's name begins with {' or '.join(chosen) or 'anything'}")
    if options.course:
        names = write_course(chapters, options.course, options.exercises_only)
        print(f"Written to {options.course / 'source'}: {', '.join(names)}")
        return
    try:
        sheets = write(chapters, ROOT / "_build", keep=[c.stem for c in every])
    except ValueError as error:
        sys.exit(str(error))
    bundle(ROOT / "_build")
    print(f"{len(sheets)} sheets and three zips are in {ROOT / '_build'}")
    if options.no_run:
        return
    good = True
    for path in sheets:
        seconds, place, error = run(path)
        fine, words = verdict(path, place, error)
        good &= fine
        where = f"{path.parent.name}/{path.stem}"
        print(f"{seconds:6.1f} s  {where:38}  {words}", flush=True)
    if not good:
        sys.exit("A sheet did not do what it must: see above.")


if __name__ == "__main__":
    main()
