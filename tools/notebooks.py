"""Run the chapters one at a time and store their outputs and figures: `make notebooks`.

    python tools/notebooks.py             all of them
    python tools/notebooks.py 05          those whose name begins so

A chapter is stored only when it ran through and printed nothing to stderr. Its figures
go to `book/results`, and the figures bound in its text are written anew from them: read
the text again afterwards, for the words around a number may no longer be true."""

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

from tools import figures


def run(path):
    """Execute a notebook; returns it with fresh outputs. Raises on an error or on
    stderr."""
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["PEFTLAB_RESULTS"] = scratch
        NotebookClient(
            book,
            timeout=300,
            kernel_name="python3",
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": path.parent}},
        ).execute()
        for cell in book.cells:
            cell.metadata.pop("execution", None)
            for output in cell.get("outputs", ()):
                if output.get("name") == "stderr":
                    raise RuntimeError(f"{path.name} printed to stderr: {output.text}")
        for fresh in Path(scratch).glob("*.json"):
            text = fresh.read_text(encoding="utf8")
            (ROOT / "book" / "results" / fresh.name).write_text(text, encoding="utf8")
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = figures.refresh(cell.source, path.stem)
    book.metadata = dict(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"),
        language_info=dict(name="python"),
    )
    return book


def main(names):
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chapters = [c for c in chapters if not names or c.stem.startswith(tuple(names))]
    if not chapters:
        sys.exit(f"no chapter's name begins with {' or '.join(names)}")
    for path in chapters:
        begun = time.time()
        book = run(path)
        fresh = path.with_suffix(".new")
        nbformat.write(book, fresh)
        fresh.replace(path)
        print(f"{time.time() - begun:6.1f} s  {path.stem}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
