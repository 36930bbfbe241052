"""Tables that a notebook shows: rows, and answers before and after."""

from IPython.display import display
from tabulate import tabulate


def table(header, rows):
    """Show rows as a table.

    Args:
        header: the names of the columns, with | between them: "check | found".
        rows: sequences with an entry for each column; each is shown as its `str`.

    Raises:
        ValueError: a row has more or fewer entries than the header has names.
    """
    names = [name.strip() for name in header.split("|")]
    cells = [[str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(names):
            raise ValueError(f"the header has {len(names)} columns, a row {len(row)}")

    options = dict(headers=names, disable_numparse=True)
    page = tabulate(cells, tablefmt="html", **options)
    page = page.replace("<table>", '<table class="table">')
    text = tabulate(cells, tablefmt="simple", **options)
    display({"text/html": page, "text/plain": text}, raw=True)


def compare(title, texts, right, **answers):
    """Show answers to texts side by side, each with a tick or a cross.

    Args:
        title: what the texts are, the name of the first column.
        texts: what was asked, strings.
        right: the right answer to each.
        **answers: for each further column its name and its answers, one for each text,
            such as `before=..., after=...`.

    Raises:
        ValueError: the lists differ in length.
    """
    rows = []
    for text, truth, *given in zip(texts, right, *answers.values(), strict=True):
        marks = [f"{a or '(nothing)'} {'✓' if a == truth else '✗'}" for a in given]
        rows.append((text, *marks))
    table(" | ".join([title, *answers]), rows)
