"""Run each chapter alone, as Colab does, in the environment of this interpreter.

    .venv-colab/bin/python tools/environments.py         all of them: `make colab`
    .venv-newest/bin/python tools/environments.py 05     those whose name begins so

Each chapter runs in an empty folder, its hidden install cell included. That cell
installs the package from this checkout, uncommitted changes too, instead of GitHub.
Nothing is stored, and no output is compared. A chapter fails where a cell raises or
writes to stderr, and where pip prints an error or replaces a package that was there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
ADDRESS = "git+https://github.com/"  # then owner/name and the closing quote
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
COLORS = re.compile(r"\x1b\[[0-9;]*m")
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else each kernel prints a warning


def pretend_colab():
    """An empty package google.colab: the install cell runs only where it is there."""
    package = Path(sysconfig.get_path("purelib")) / "google" / "colab"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()


def copy_of_checkout(folder):
    """Copy what git knows or would add: pip builds there and leaves nothing behind."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout

    for name in listed.decode().strip("\0").split("\0"):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return folder


def installed():
    """{name: version} of all packages but ours."""
    found = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
    found.pop("peftlab", None)
    return found


def prepare(book, source):
    """Have the install cell find a google.colab, and the package in a folder."""
    cells = [c for c in book.cells if c.cell_type == "code" and "%pip" in c.source]
    if len(cells) != 1:
        raise ValueError(f"{len(cells)} cells install something; there should be one")

    (cell,) = cells
    before, address, rest = cell.source.partition(ADDRESS)
    if not address:
        raise ValueError(f"the install cell does not name {ADDRESS}")
    end = rest.index('"')
    cell.source = f"import google.colab\n{before}{source.as_uri()}{rest[end:]}"
    return cell


def complaints(book, install):
    """What a run printed that a reader on Colab should not see, one line each."""
    for number, cell in enumerate(book.cells):
        for output in cell.get("outputs", ()):
            text = output.get("text", "").strip()
            if output.get("name") == "stderr":
                yield f"cell {number} wrote to stderr: {text[:600]}"
            elif cell is install and "ERROR" in text:
                yield f"pip prints an error: {text[:600]}"


def run(path, source):
    """Run one chapter alone; returns what is wrong with it, a list of lines."""
    subprocess.run([*PIP, "uninstall", "-qq", "--yes", "peftlab"], check=True)
    before = installed()
    book = nbformat.read(path, as_version=4)
    install = prepare(book, source)
    wrong = []

    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(
            book,
            timeout=900,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": empty}},
        )
        try:
            client.execute()
        except CellExecutionError as error:
            wrong.append(COLORS.sub("", str(error))[-2000:])

    after = installed()
    replaced = {name for name in before if after.get(name) != before[name]}
    for name in sorted(replaced):
        wrong.append(f"pip replaced {name} {before[name]} by {after.get(name)}")
    return [*wrong, *complaints(book, install)]


def main(names):
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chapters = [c for c in chapters if not names or c.stem.startswith(tuple(names))]
    if not chapters:
        sys.exit(f"no chapter's name begins with {' or '.join(names)}")

    pretend_colab()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        source = copy_of_checkout(Path(folder) / "peftlab")
        for path in chapters:
            begun = time.time()
            wrong = run(path, source)
            mark = "FAILED" if wrong else "passed"
            print(f"{mark} {time.time() - begun:6.1f} s  {path.stem}", flush=True)
            for line in wrong:
                print(f"    {line}", flush=True)
            failed = failed or bool(wrong)

    versions = installed()
    shown = ("torch", "transformers", "peft", "numpy", "babel", "ipykernel")
    print("under", ", ".join(f"{name} {versions[name]}" for name in shown))
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
