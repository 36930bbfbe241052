"""book/paper_tables.md, written anew: every figure counted, compared and explained.

Run it with `python -m experiments.paper_tables.count`; it takes about a minute and no
memory to speak of. `rows` has the figures, `notes` the words, `shapes` the models.
"""

import re
import textwrap
from collections import Counter
from fractions import Fraction
from pathlib import Path

from experiments.paper_tables.notes import NOTES, PAGE
from experiments.paper_tables.rows import GROUPS, OPEN
from peftlab.kit import measure

FILE = Path(__file__).parents[2] / "book" / "paper_tables.md"
UNITS = {"": 1, "×": 1, "%": Fraction(1, 100), "K": 10**3, "M": 10**6, "B": 10**9}
PRINTED = re.compile(r"(?P<whole>[\d,]+)(?:\.(?P<part>\d+))?(?P<unit>[KMB%×]?)")


def verdict(printed, value):
    """How a printed figure fits a value: "equal", "rounds", "cut off" or "differs".

    printed: such as "10,420", "4.7M", "0.0622%" or "10,000×". Whole numbers with a unit
    may be rounded to fewer digits than they show: 110M may stand for 109.48M."""
    match = PRINTED.fullmatch(printed)
    if not match:
        raise ValueError(f"cannot read the figure {printed!r}")
    whole, part, unit = match["whole"].replace(",", ""), match["part"] or "", match[3]
    said, exact = Fraction(int(whole + part), 10 ** len(part)), value / UNITS[unit]
    place = Fraction(1, 10 ** len(part))
    if said == exact:
        return "equal"
    if not unit:
        return "differs"
    coarse = place * (1 if part else 10 ** (len(whole) - len(whole.rstrip("0"))))
    if said == nearest(exact, place):
        return "rounds"
    if said == int(exact / place) * place:
        return "cut off"
    return "rounds" if said == nearest(exact, coarse) else "differs"


def nearest(value, step):
    """The multiple of step that is nearest to a value, the higher of two."""
    return int(value / step + Fraction(1, 2)) * step


def count(row):
    """{what: its value} of a row: all that may be printed of it, really counted."""
    if row.config is None:
        return dict(trainable=Fraction(row.formula))
    found = measure.count(row.config, row.add)
    return shares(found["trainable"], found["base"], found["total"])


def shares(trainable, base, total):
    """{what: its value} of three numbers of parameters, as exact fractions."""
    return dict(
        trainable=Fraction(trainable),
        total=Fraction(total),
        fold=Fraction(base, trainable),
        share=Fraction(trainable, base),
        of_all=Fraction(trainable, total),
    )


def judge(row, values):
    """{what: verdict} for each figure that the paper prints."""
    return {k: verdict(figure, values[k]) for k, figure in row.printed.items()}


ORDER = ("trainable", "total", "of_all", "share", "fold")


def ours(key, row, value):
    """A value as text; a share or a fold with the decimals that the paper gives it."""
    if key in ("trainable", "total"):
        return f"{int(value):,}"
    match = PRINTED.fullmatch(row.printed[key])
    number = float(value / UNITS[match["unit"]])
    return f"{number:,.{len(match['part'] or '')}f}{match['unit']}"


def line(row, values, notes):
    """A row of a table: setting, what the paper says, ours, how they compare."""
    keys = [k for k in ORDER if k in row.printed]
    said = "<br>".join(row.printed[k] for k in keys) or "not printed"
    shown = keys if "trainable" in keys else ["trainable", *keys]
    mine = "<br>".join(ours(k, row, values[k]) for k in shown)
    words = {*judge(row, values).values()}
    loud = [w for w in ("differs", "cut off") if w in words]
    remarks = loud[:1] or sorted(words)
    if row.note:
        remarks = [*remarks, f"note {notes.index(row.note) + 1}"]
    return f"| {row.setting} | {said} | {mine} | {', '.join(remarks)} |"


def table(group, rows):
    """A group's section: title, introduction, and folded the table with its notes."""
    notes = list(dict.fromkeys(row.note for row in group.rows if row.note))
    lines = ["| setting | paper says | ours | note |", "|---|---|---|---|"]
    lines += [line(row, values, notes) for row, values in rows]
    items = [wrapped(NOTES[n], f"{i}. ") for i, n in enumerate(notes, 1)]
    fold = "\n\n".join(["\n".join(lines), "\n".join(items)]).rstrip()
    fold = f":::{{dropdown}} {summary(rows)}\n{fold}\n:::"
    return "\n\n".join([f"## {group.title}", wrapped(group.text), fold])


def summary(rows):
    """What a fold says of its table: "16 rows: 4 cut off, 2 differ"."""
    words = [{*judge(row, values).values()} for row, values in rows]
    cut = sum("cut off" in found and "differs" not in found for found in words)
    differ = sum("differs" in found for found in words)
    parts = [f"{cut} cut off"] * bool(cut)
    parts += [f"{differ} {'differs' if differ == 1 else 'differ'}"] * bool(differ)
    return f"{len(rows)} rows: {', '.join(parts) or 'all fit'}"


def wrapped(text, start=""):
    """Text in lines of 88, as an item of a list where `start` says so."""
    how = dict(initial_indent=start, subsequent_indent=" " * len(start))
    return textwrap.fill(" ".join(text.split()), 88, break_on_hyphens=False, **how)


def counted():
    """Every row with its values: [(group, [(row, values), ...]), ...]."""
    return [(group, [(row, count(row)) for row in group.rows]) for group in GROUPS]


def page(groups):
    """The whole page as text, from what `counted` gives."""
    words = Counter()
    for group, rows in groups:
        found = [word for pair in rows for word in judge(*pair).values()]
        words.update(["open"] * len(found) if group.rows is OPEN else found)
    tally = {word.split()[0]: n for word, n in words.items()}  # "cut off": {cut}
    head = PAGE.format(count=words.total(), **tally).strip()
    sections = [table(group, rows) for group, rows in groups]
    return "\n\n".join(["# What the papers count", head, *sections]) + "\n"


def main():
    FILE.write_text(page(counted()), encoding="utf8")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
