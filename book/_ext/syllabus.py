"""``{syllabus} 4``: a course of four weeks, or of twelve, as tables.

Which chapters a week has stands in `PLANS`. All else comes from the notebooks: the
title, the minutes to read (the line below the title says them), and of each exercise
its title, kind, minutes and points. A chapter that does not exist is left out, and one
that is not in the plan of twelve weeks joins the last.

Read by tools/syllabus.py too, which prints the tables for a page of your own.
"""

import json
import posixpath
import re
from pathlib import Path

import exercises
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

PLANS = {  # weeks: for each week its chapters, and the problem set that is handed in
    4: [
        (["01", "02"], 1),
        (["03", "05", "06"], 3),
        (["11", "13", "14"], 5),
        (["16", "18", "22"], 6),
    ],
    12: [
        (["01", "02"], None),
        (["03", "04"], 1),
        (["05"], None),
        (["06", "07"], 3),
        (["08", "09"], None),
        (["10"], 2),
        (["11", "12"], None),
        (["13", "14"], None),
        (["15", "16"], 5),
        (["17", "18"], 4),
        (["19", "20"], 6),
        (["21", "22"], None),
    ],
}
WORDS = dict(five=5, ten=10, fifteen=15, twenty=20, thirty=30, forty=40)
WORDS |= dict(fifty=50, sixty=60, seventy=70, eighty=80, ninety=90)
MINUTES = re.compile(r"^\*(?!\*)([^*\n]*\bminutes?\b[^*\n]*)\*\s*$", re.M)


def minutes(sentence):
    """The numbers in a sentence, in digits or words: "Thirty-five minutes" is 35."""
    text = sentence.lower().replace("half an hour", "30").replace("an hour", "60")
    tens = r"(twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)-(five)"
    text = re.sub(tens, lambda m: str(WORDS[m[1]] + WORDS[m[2]]), text)
    words = re.findall(r"\d+|[a-z]+", text)
    return [WORDS.get(w) or int(w) for w in words if w in WORDS or w.isdigit()]


def minutes_to_read(book):
    """What the line below a chapter's title says, without the exercises.

    Raises:
        ValueError: it says nothing that can be read.
    """
    title = exercises.source(book["cells"][0])
    said = MINUTES.search(title)
    first = minutes(said[1].split(".")[0]) if said else []
    own = sum(e["minutes"] for e in exercises.exercises(book))
    if first and "of them exercises" in said[1]:
        first[0] -= own
    if not first or first[0] <= 0:
        raise ValueError("no line such as *Ten minutes to read, 45 for the exercises.*")
    return first[0]


def chapters(root):
    """{number: what a plan needs to know of a chapter} of the notebooks that exist."""
    found = {}
    for path in sorted(Path(root, exercises.NOTEBOOKS).glob("[0-9][0-9]_*.ipynb")):
        book = json.loads(path.read_text("utf8"))
        every = exercises.exercises(book)
        if not every:
            continue
        title = re.search(r"^# +(.+)", exercises.source(book["cells"][0]), re.M)
        found[path.stem[:2]] = dict(
            name=path.name,
            title=title[1] if title else path.stem,
            read=minutes_to_read(book),
            exercises=every,
        )
    return found


def weeks(count, found):
    """The weeks of a plan, as (numbers of chapters that exist, problem set or None).

    Raises:
        ValueError: there is no such plan.
    """
    if count not in PLANS:
        plans = " and ".join(map(str, PLANS))
        raise ValueError(f"there are plans of {plans} weeks, not of {count!r}")
    plan = [([c for c in week if c in found], task) for week, task in PLANS[count]]
    if count == max(PLANS):
        planned = {c for week, _ in PLANS[count] for c in week}
        plan[-1][0].extend(sorted(found.keys() - planned))
    return [week for week in plan if any(week)]


def row(*cells):
    written = (" ".join(str(c).split()).replace("|", "\\|") for c in cells)
    return f"| {' | '.join(written)} |"


def markdown(root, count, notebooks="../notebooks", sets="problem_sets.md"):
    """A plan as Markdown: a table of weeks, and a folded one of their exercises.

    Args:
        root: of the repository.
        count: of weeks, 4 or 12.
        notebooks: where links to chapters lead.
        sets: where links to problem sets lead.

    Returns:
        A list of lines.
    """
    found = chapters(root)
    table = [row("week", "chapters", "to read", "exercises", "points", "hand in")]
    table.append("|--:|---|--:|--:|--:|---|")
    detail = [row("week", "exercise", "title", "kind", "minutes", "points")]
    detail.append("|--:|---|---|---|--:|--:|")
    sums = [0, 0, 0]
    for week, (names, task) in enumerate(weeks(count, found), 1):
        mine = [found[name] for name in names]
        every = [(c, e) for c in mine for e in c["exercises"]]
        counts = [sum(c["read"] for c in mine)]
        counts += [sum(e[key] for _, e in every) for key in ("minutes", "points")]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        links = [f"[{c['title']}]({notebooks}/{c['name']})" for c in mine]
        due = [f"sheet {name}" for name in names]
        due += [f"[problem set {task}]({sets})"] if task else []
        read, work, points = counts
        times = (f"{read} min", f"{work} min")
        table.append(row(week, "<br>".join(links), *times, points, "<br>".join(due)))
        for chapter, e in every:
            to = f"{notebooks}/{chapter['name']}"
            to += f"#{exercises.slug(e['heading'])}" if e["heading"] else ""
            link = f"[{e['id']}]({to})"
            cells = (week, link, e["title"], e["level"], e["minutes"], e["points"])
            detail.append(row(*cells))
    read, work, points = sums
    table.append(row("", "**together**", f"{read} min", f"{work} min", points, ""))
    summary = f"<summary>The exercises of the {count} weeks</summary>"
    return [*table, "", "<details>" + summary, "", *detail, "", "</details>", ""]


class Syllabus(SphinxDirective):
    """The plan of so many weeks."""

    required_arguments = 1

    def run(self):
        root, here = Path(self.env.srcdir), posixpath.dirname(self.env.docname) or "."
        for path in sorted((root / exercises.NOTEBOOKS).glob("*.ipynb")):
            self.env.note_dependency(str(path))
        notebooks = posixpath.relpath(exercises.NOTEBOOKS, here)
        sets = posixpath.relpath("book/problem_sets.md", here)
        lines = markdown(root, int(self.arguments[0]), notebooks, sets)
        box = nodes.container(classes=["exercises"])
        self.state.nested_parse(StringList(lines, __file__), self.content_offset, box)
        return box.children


def setup(app):
    app.add_directive("syllabus", Syllabus)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
