"""What a notebook's plain Markdown cannot say about how its page looks.

- A paragraph that begins **Figure 2.1.**, right after the cell that draws the figure,
  is its caption: it moves into the cell, between the figure and "Show code".
- An exercise (its heading, stub, hint, solution and check) is one frame; the check
  folds, and the cells say which they are.
- Every page gets a description for search engines: its first paragraph.
- The theme's arrows and folds get names that a screen reader can say.
"""

import re
from html import escape

from docutils import nodes
from exercises import role

CAPTION = re.compile(r"Figure [\d.]+\.$")
EXERCISE = re.compile(r"Exercise \d+-\d+ · ")


def _cells(doctree):
    """The code cells of a page, as (node, metadata)."""
    for node in doctree.findall(nodes.container):
        if node.get("nb_element") == "cell_code":
            yield node, node.get("cell_metadata", {})


def mark_exercises(app, doctree):
    """Say which cells are an exercise's solution and check, and fold the check."""
    for node, metadata in _cells(doctree):
        kind = role({"metadata": metadata})
        if kind in ("solution", "check"):
            node["classes"].append(f"exercise-{kind}")
        if kind == "check" and not node.get("hide_mode"):
            prompts = dict(prompt_show="Show the check", prompt_hide="Hide the check")
            node.attributes.update(prompts, hide_mode="input")
    for section in doctree.findall(nodes.section):
        title = section.next_node(nodes.title)
        if title is not None and EXERCISE.match(title.astext()):
            section["classes"].append("exercise-unit")


def move_captions(app, doctree, docname):
    """Put each figure's caption into the cell that draws it."""
    for paragraph in list(doctree.findall(nodes.paragraph)):
        first = next((c for c in paragraph.children if c.astext().strip()), None)
        if not (isinstance(first, nodes.strong) and CAPTION.match(first.astext())):
            continue
        paragraph["classes"].append("figure-caption")
        siblings = paragraph.parent.children
        at = siblings.index(paragraph)
        before = siblings[at - 1] if at else None
        if getattr(before, "get", dict().get)("nb_element") == "cell_code":
            paragraph.parent.remove(paragraph)
            before.append(paragraph)


def describe(app, pagename, templatename, context, doctree):
    """The first paragraph as the page's description, unless it has one."""
    if doctree is None or 'name="description"' in context.get("metatags", ""):
        return
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if len(text) > 40:
            short = text if len(text) < 160 else text[:157].rsplit(" ", 1)[0] + " …"
            context["metatags"] = context.get("metatags", "") + (
                f'\n<meta name="description" content="{escape(short)}">'
            )
            return


def name_toggles(app, pagename, templatename, context, doctree):
    """A fold is called what it shows; the arrows of the side bar have no name."""
    if "body" in context:
        context["body"] = context["body"].replace(
            '<summary aria-label="Toggle hidden content">', "<summary>"
        )
    theirs = context.get("generate_toctree_html")

    def ours(*args, **options):
        label = '<summary aria-label="Show or hide the pages below">'
        return str(theirs(*args, **options)).replace("<summary>", label)

    if theirs:
        context["generate_toctree_html"] = ours


def setup(app):
    app.connect("doctree-read", mark_exercises)
    app.connect("doctree-resolved", move_captions)
    app.connect("html-page-context", describe)
    app.connect("html-page-context", name_toggles, priority=950)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
