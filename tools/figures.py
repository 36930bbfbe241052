"""Figures in prose, each bound to a stored result by a comment that no reader sees.

    LoRA reaches 0.97<!-- lora.finnish --> of the dates.

The key belongs to the chapter's own `book/results/NN_name.json`, or names another
file: `<!-- atlas:rank90 -->`. A figure taken from a paper says so, `<!-- cited -->`,
and so does a setting or a definition, `90%<!-- given -->`.
"""

import io
import re

from peftlab.kit import results

NUMBER = r"[-\u2212]?\d[\d,]*(?:\.\d+)?"
BOUND = re.compile(
    rf"(?P<number>{NUMBER})(?P<percent>%?)<!--\s*(?P<key>[^>]*?)\s*-->", re.ASCII
)


FREE = ("cited", "given")


def stored(key, chapter=None, folder=None):
    """The value behind a key, of the chapter's own results or of `file:key`."""
    name, _, own = key.rpartition(":")
    return results.load(name or chapter, folder)["figures"][own]["value"]


def written(value, like):
    """The value as text, with the decimals, the percent sign and the commas of
    `like`."""
    number, percent = like["number"], like["percent"]
    decimals = len(number.partition(".")[2])
    comma = "," if "," in number or abs(value) >= 10_000 else ""
    text = f"{value * (100 if percent else 1):{comma}.{decimals}f}"
    return text.replace("-", "\u2212" if "\u2212" in number else "-") + percent


def refresh(text, chapter=None):
    """The text with every bound figure written anew from what is stored."""

    def fresh(match):
        if match["key"] in FREE:
            return match[0]
        value = stored(match["key"], chapter)
        return f"{written(value, match)}<!-- {match['key']} -->"

    return BOUND.sub(fresh, text)


def refresh_pages():
    """Write every bound figure on the book's own pages anew, after a sweep."""
    for path in sorted(results.FOLDER.parent.glob("*.md")):
        path.write_text(refresh(path.read_text("utf8")), "utf8")


def save_picture(figure, name):
    """Write a matplotlib figure as a picture of the book, an SVG with text as text.

    The same bytes each time, without a date, and no space at the end of a line."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())
    (results.FOLDER.parent / "_static" / name).write_text(text, "utf8")


def stale(text, chapter=None):
    """The bound figures that differ from what is stored, as (written, stored, key)."""
    return [
        (m["number"] + m["percent"], written(stored(m["key"], chapter), m), m["key"])
        for m in BOUND.finditer(text)
        if m["key"] not in FREE
        and written(stored(m["key"], chapter), m) != m["number"] + m["percent"]
    ]


NOT_PROSE = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)|<[a-z/][^>]*>"
    r"|arXiv[: ]\d+\.\d+|(?:section|Table|Figure|equation|chapter|version|eq\.) [\d.]+",
    re.DOTALL,
)


def unbound(text):
    """Decimal numbers, percentages and thousands in prose that no comment binds."""
    prose = NOT_PROSE.sub(" ", BOUND.sub(" ", text))
    return re.findall(r"\d+\.\d+|\d+ ?%|\d{1,3}(?:,\d{3})+", prose)
