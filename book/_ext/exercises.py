"""The exercises, as the chapters hold them, and ``{exercises}``: the tables of them.

A chapter's notebook is the one source. The cell that holds the solution carries the
exercise in its metadata (`peftlab.exercise`), the check is the cell whose grade_id is
the exercise's with "-check" added, and the open stub is the cell tagged exercise-stub
before the solution. The wrong answers that the check must reject are published in
book/wrong_answers, one file for a chapter; those that it must accept, beside the
chapter's own, are in book/right_answers.

Read by tools/notebooks.py, tools/student.py and the tests too. Nothing is executed
here: the message that a wrong answer meets is read off the check's text.
"""

import ast
import json
import posixpath
import re
from html import escape
from pathlib import Path

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

NOTEBOOKS = "notebooks"
WRONG_ANSWERS = "book/wrong_answers"
RIGHT_ANSWERS = "book/right_answers"
SETUP = "exercise-setup"  # the tag of the cells that the exercises stand on
STUB = "exercise-stub"  # of the open stub, which is made from the solution
BOOK_CHECK = "book-check"  # of what the book's tests need and no reader
HEADING = re.compile(r"^### Exercise (\S+) · (.+?)\s*$", re.M)
GRADED = {"auto": "its check", "rubric": "hand, by the rubric"}


def source(cell):
    return "".join(cell["source"])


def role(cell):
    """What nbgrader makes of a cell: "solution", "check", "answer" or None.

    An answer is written text: the student's cell and the graded one in one."""
    meta = cell["metadata"].get("nbgrader", {})
    kinds = {(True, False): "solution", (False, True): "check", (True, True): "answer"}
    return kinds.get((bool(meta.get("solution")), bool(meta.get("grade"))))


def grade_id(cell):
    return cell["metadata"]["nbgrader"]["grade_id"]


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", ())


def setup_cells(book):
    """The cells that every exercise of a chapter stands on, in order."""
    return [cell for cell in book["cells"] if tagged(cell, SETUP)]


def exercises(book):
    """The exercises of a notebook, in order: the metadata of each, and its cells.

    `solution` is the cell that the student fills, `check` the one that judges it, None
    for an exercise graded by hand; `stub` is the open stub, or None; `heading` is the
    heading of its task, or None."""
    checks = {grade_id(c): c for c in book["cells"] if role(c) == "check"}
    text = (source(c) for c in book["cells"] if c["cell_type"] == "markdown")
    headings = {m[1]: m for t in text for m in HEADING.finditer(t)}
    found, stub = [], None
    for cell in book["cells"]:
        stub = cell if tagged(cell, STUB) else stub
        meta = cell["metadata"].get("peftlab", {}).get("exercise")
        if meta is not None:
            heading = headings.get(meta.get("id"))
            check = checks.get(f"{meta.get('id')}-check")
            found.append(
                dict(meta, solution=cell, check=check, stub=stub)
                | dict(heading=heading and heading[0].lstrip("# ").strip())
            )
            stub = None
    return found


def wrong_answers(root, chapter):
    """The published wrong answers of a chapter: exercise, mistake, code, message."""
    return _answers(Path(root, WRONG_ANSWERS, f"{chapter}.yml"))


def right_answers(root, chapter):
    """Other right answers than the chapter's own: exercise, what, code."""
    return _answers(Path(root, RIGHT_ANSWERS, f"{chapter}.yml"))


def _answers(path):
    return (yaml.safe_load(path.read_text("utf8")) or []) if path.is_file() else []


def messages(check):
    """What a check may say: its texts, in order, "…" where a value is put in.

    A message may stand in the assert, or in a table or a function that the assert takes
    it from; so these are all texts of at least three words."""
    found = []

    class Texts(ast.NodeVisitor):
        def visit_Constant(self, node):
            if isinstance(node.value, str):
                found.append(node.value)

        def visit_JoinedStr(self, node):
            parts = (
                v.value if isinstance(v, ast.Constant) else "…" for v in node.values
            )
            found.append("".join(parts))

    Texts().visit(ast.parse(check))
    return [text for text in found if len(text.split()) >= 3]


def message(check, pattern):
    """The first text of a check that a wrong answer's pattern matches, or None.

    If the pattern names a value that the text puts in, it is the text found in it."""
    texts = messages(check)
    literal = (text for text in texts if re.search(pattern, text))
    filled = (
        text
        for text in texts
        if "…" in text and re.search(re.escape(text).replace("…", ".+"), pattern)
    )
    return next(literal, next(filled, None))


def plural(count, word):
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def literal(text):
    """Markdown that shows a text as it stands; code in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([\\*_\[\]<>$|{}#~])", r"\\\1", p) for p in parts[::2]]
    return "".join(parts)


def notes(exercise, wrong):
    """The Markdown of an exercise's rubric and wrong answers, for the instructor."""
    lines = [f"- {point}" for point in exercise.get("rubric", ())]
    for answer in wrong:
        check = exercise["check"]
        met = check and message(source(check), answer["message"])
        met = f"“{literal(met)}”" if met else f"a message with `{answer['message']}`"
        lines += ["", f"*{answer['mistake'].strip()}* meets: {met}", ""]
        lines += ["```python", *answer["code"].rstrip().splitlines(), "```"]
    return lines


def slug(heading):
    """The anchor that MyST and GitHub give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def chapter_page(book, link, wrong):
    """The Markdown of one chapter's part of the page, folded."""
    every = exercises(book)
    text = "\n".join(source(c) for c in book["cells"] if c["cell_type"] == "markdown")
    title = re.search(r"^# +(.+)", text, re.M)
    title = title[1] if title else posixpath.basename(link)
    counts = [plural(len(every), "exercise")]
    counts += [plural(sum(e[k] for e in every), k[:-1]) for k in ("minutes", "points")]
    summary = escape(f"{title} · {', '.join(counts)}")
    lines = [f"<details><summary>{summary}</summary>", "", f"[The chapter]({link})", ""]
    names = [
        "exercise",
        "title",
        "level",
        "minutes",
        "points",
        "graded by",
        "you can then",
    ]
    lines += ["| " + " | ".join(names) + " |", "|---|---|---|--:|--:|---|---|"]
    for e in every:
        to = f"{link}#{slug(e['heading'])}" if e["heading"] else link
        cells = [
            f"[{e['id']}]({to})",
            e["title"],
            e["level"],
            e["minutes"],
            e["points"],
        ]
        cells += [GRADED[e["grading"]], e["objective"]]
        row = (" ".join(str(c).split()).replace("|", "\\|") for c in cells)
        lines.append(f"| {' | '.join(row)} |")
    lines.append("")
    for e in every:
        own = [w for w in wrong if w["exercise"] == e["id"]]
        kinds = [plural(len(own), "wrong answer")] if own else []
        kinds += ["the rubric"] if e.get("rubric") else []
        if kinds:
            summary = escape(f"{e['id']}: {' and '.join(kinds)}")
            lines += [f"<details><summary>{summary}</summary>", "", *notes(e, own), ""]
            lines += ["</details>", ""]
    return [*lines, "</details>", ""]


class Exercises(SphinxDirective):
    """One table for each chapter that has exercises, with what its checks reject."""

    def run(self):
        root, here = Path(self.env.srcdir), posixpath.dirname(self.env.docname)
        box = nodes.container(classes=["exercises"])
        for path in sorted((root / NOTEBOOKS).glob("*.ipynb")):
            if f"{NOTEBOOKS}/{path.stem}" not in self.env.found_docs:
                continue
            self.env.note_dependency(str(path))
            self.env.note_dependency(str(root / WRONG_ANSWERS / f"{path.stem}.yml"))
            book = json.loads(path.read_text("utf8"))
            if exercises(book):
                link = posixpath.relpath(f"{NOTEBOOKS}/{path.name}", here or ".")
                lines = chapter_page(book, link, wrong_answers(root, path.stem))
                self.state.nested_parse(
                    StringList(lines, str(path)), self.content_offset, box
                )
        return box.children


def setup(app):
    app.add_directive("exercises", Exercises)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
