"""Run the chapters one at a time and store their outputs and figures: `make notebooks`.

    python tools/notebooks.py             all of them
    python tools/notebooks.py 05          those whose name begins so
    python tools/notebooks.py --no-run    write stubs, metadata and figures only

Before a run each stub is written from its solution, by nbgrader's own code, and the
cells that a reader need not see get the metadata that hides them, on Colab too.

A chapter is stored only when it ran through and printed nothing to stderr. Its figures
go to `book/results`, and the figures bound in its text and alt texts are written anew
from them: read the text again afterwards, for the words around a number may no longer
be true."""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
)

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import figures, student
from tools.student import exercises

CHECK_TITLE = "# @title For the book's tests: nothing to read here"
HIDDEN = ["book-check", "remove-cell"]


def prepare(book):
    """Write each stub from its solution, and what hides the cells that hold no lesson.

    A cell tagged book-check leaves the page and is folded on Colab and in JupyterLab;
    a solution is folded on Colab. Works in place."""
    for cell in book.cells:
        if exercises.tagged(cell, exercises.BOOK_CHECK):
            hide(cell)
        elif cell.cell_type == "code" and exercises.role(cell) == "solution":
            cell.metadata["cellView"] = "form"

    for exercise in exercises.exercises(book):
        if exercise["stub"]:
            exercise["stub"].source = student.stub(exercise["solution"])


def hide(cell):
    meta = cell.metadata
    others = [tag for tag in meta.get("tags", ()) if tag not in HIDDEN]
    meta["tags"] = HIDDEN + others
    meta["cellView"] = "form"
    meta["jupyter"] = {**meta.get("jupyter", {}), "source_hidden": True}
    if not cell.source.startswith("# @title"):
        cell.source = f"{CHECK_TITLE}\n{cell.source}"


def refresh(book, chapter):
    """Write the figures bound in text and alt texts anew. Works in place."""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = figures.refresh(cell.source, chapter)
        image = cell.metadata.get("mystnb", {}).get("image", {})
        if "alt" in image:
            image["alt"] = figures.refresh(image["alt"], chapter)


def execute(book, folder):
    """Run a notebook in place, in a folder; raises on an error or on stderr.

    Returns its fresh results, {file name: text}."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["PEFTLAB_RESULTS"] = scratch
        NotebookClient(
            book,
            timeout=300,
            kernel_name="python3",
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        ).execute()
        fresh = Path(scratch).glob("*.json")
        stored = {path.name: path.read_text("utf8") for path in fresh}

    for cell in book.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"cell {cell.id} printed to stderr: {output.text}")
    return stored


def run(path, executed=True):
    """A chapter made ready, run, and with its figures written anew."""
    book = nbformat.read(path, as_version=4)
    prepare(book)
    if executed:
        for name, text in execute(book, path.parent).items():
            (ROOT / "book" / "results" / name).write_text(text, encoding="utf8")
    refresh(book, path.stem)
    book.metadata = dict(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"),
        language_info=dict(name="python"),
    )
    return book


def main(arguments):
    names = tuple(a for a in arguments if a != "--no-run")
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chapters = [c for c in chapters if not names or c.stem.startswith(names)]
    if not chapters:
        sys.exit(f"no chapter's name begins with {' or '.join(names)}")
    for path in chapters:
        begun = time.time()
        book = run(path, executed="--no-run" not in arguments)
        fresh = path.with_suffix(".new")
        nbformat.write(book, fresh)
        fresh.replace(path)
        print(f"{time.time() - begun:6.1f} s  {path.stem}", flush=True)
    figures.refresh_pages()  # the book's pages quote chapters too


if __name__ == "__main__":
    main(sys.argv[1:])
