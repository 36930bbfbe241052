"""Write a method as one file, with all that it takes of surgery.py: to copy.

    python tools/standalone.py lora > lora.py

The method's text stays as it is, but that `surgery.select` becomes `_select`. The
helpers that are reached from there stand below it, word for word.
"""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "peftlab"
NOTE = "# What follows is no part of the method: it is from peftlab/surgery.py."


def standalone(method, surgery):
    """The texts of a method's file and of surgery.py -> the text of one file."""
    helpers = definitions(surgery)
    method, todo = rename(method, lambda node: called(node, helpers))
    if not todo:
        return method
    taken = {}
    while todo:  # what those call in turn
        name = todo.pop()
        taken[name], more = rename(helpers[name], lambda node: named(node, helpers))
        todo |= more - taken.keys()
    rest = "\n\n".join(taken[name] for name in helpers if name in taken)
    head, body = with_imports(method, imports(method) | imports(surgery), rest)
    return f"{head}{body.rstrip()}\n\n\n{NOTE}\n\n\n{rest}"


def definitions(source):
    """{name: its text} of the functions and constants of a file, in its order."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.Assign):
            name = getattr(node, "name", None) or node.targets[0].id
            found[name] = "".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def called(node, helpers):
    """The NAME of `surgery.NAME`."""
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "surgery":
        if node.attr not in helpers:
            raise ValueError(f"surgery.py has no {node.attr}")
        return node.attr


def named(node, helpers):
    """The NAME of a helper inside surgery.py, where it is used and where it is made."""
    name = getattr(node, "id", None) or getattr(node, "name", None)
    return name if name in helpers else None


def rename(source, find):
    """The text with an underscore before every name that `find` finds, and those."""
    rows, found = [row.encode() for row in source.splitlines(keepends=True)], set()
    nodes = [n for n in ast.walk(ast.parse(source)) if hasattr(n, "col_offset")]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset), reverse=True):
        if name := find(node):
            found.add(name)
            row, begin = rows[node.lineno - 1], node.col_offset
            if isinstance(node, ast.FunctionDef):
                begin, end = begin + len("def "), begin + len("def ") + len(name)
            else:
                end = node.end_col_offset
            rows[node.lineno - 1] = row[:begin] + f"_{name}".encode() + row[end:]
    return b"".join(rows).decode(), found


def imports(source):
    """{name: the line that imports it}"""
    kinds = ast.Import | ast.ImportFrom
    nodes = [n for n in ast.parse(source).body if isinstance(n, kinds)]
    return {a.asname or a.name: ast.unparse(n) for n in nodes for a in n.names}


def with_imports(method, lines, rest):
    """The text up to and with the imports that both parts need, and what follows."""
    kinds = ast.Import | ast.ImportFrom
    nodes = [n for n in ast.parse(method).body if isinstance(n, kinds)]
    rows = method.splitlines(keepends=True)
    body = "".join(rows[nodes[-1].end_lineno :])
    used = {n.id for n in ast.walk(ast.parse(body + rest)) if isinstance(n, ast.Name)}
    needed = sorted({lines[name] for name in lines if name in used}, reverse=True)
    needed.sort(key=lambda line: line.startswith("from"))
    own = [line for line in needed if line.split()[1] in sys.stdlib_module_names]
    other = [line for line in needed if line not in own]
    blocks = ["\n".join(block) for block in (own, other) if block]
    return "".join(rows[: nodes[0].lineno - 1]) + "\n\n".join(blocks) + "\n", body


def of(name):
    """The one file of peftlab/NAME.py."""
    return standalone(
        *((PACKAGE / f"{n}.py").read_text("utf8") for n in (name, "surgery"))
    )


if __name__ == "__main__":
    sys.stdout.write(of(sys.argv[1]))
