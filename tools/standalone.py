"""Write a method as one file that needs torch alone: to copy into another project.

    python tools/standalone.py lora > lora.py

The method's text stays as it is, but that `surgery.select` becomes `_select`. The
helpers of peftlab/surgery.py that are reached from there stand below it, word for word.

A method that takes other methods (multi_lora, qlora) becomes a folder, a small package:

    python tools/standalone.py qlora FOLDER

Each file in it is stand-alone too, but for `from . import lora`.
"""

import ast
import builtins
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peftlab"
SHARED = "surgery"
NO_METHODS = {SHARED, "adapter_folder", "adapter_report", "peft_files", "bnb_files"}
NAMES = sorted({p.stem for p in PACKAGE.glob("[a-z]*.py")} - NO_METHODS)
NOTE = "# What follows is no part of the method: it is from peftlab/surgery.py."
EARLY = "# Needed at once, and no part of the method: it is from peftlab/surgery.py."
IMPORTS = ast.Import | ast.ImportFrom
SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


# One method


@cache
def of(name):
    """The text of peftlab/NAME.py with what it takes of surgery.py."""
    return formatted(standalone(text(name), text(SHARED)))


def parts(name):
    """{file name: text} of a method and of the methods that it takes."""
    names = [name]
    for each in names:
        taken = siblings(text(each))
        names += [other for other in taken if other not in names]
    files = {f"{each}.py": of(each) for each in sorted(names)}
    if len(files) == 1:
        return files
    title = f'"""{name}.py, and the files that it takes."""\n'
    return {"__init__.py": title, **files}


def text(name):
    return (PACKAGE / f"{name}.py").read_text("utf8")


def siblings(source):
    """The methods that a method imports."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    names = {a.name for n in nodes if n.level and not n.module for a in n.names}
    return sorted(names - {SHARED})


def formatted(source):
    """The text as ruff formats it; where there is no ruff, as it is."""
    options = [f"--config={ROOT / 'pyproject.toml'}", "--stdin-filename=method.py", "-"]
    command = [sys.executable, "-m", "ruff", "format", *options]
    run = subprocess.run(command, input=source.encode(), capture_output=True)
    return source if run.returncode else run.stdout.decode()


def standalone(method, surgery):
    """The texts of a method's file and of surgery.py -> the text of one file."""
    tree = ast.parse(method)
    helpers = definitions(surgery)
    uses = shared_uses(tree)
    missing = sorted({node.attr for node in uses} - helpers.keys())
    if missing:
        raise ValueError(f"surgery.py has no {missing[0]}")

    reached = closure({node.attr for node in uses}, helpers)
    names = new_names(reached, identifiers(tree))
    at_import = {*evaluated_at_import(tree)}
    early = closure({node.attr for node in uses if node in at_import}, helpers)

    body = edited(method, [(n, f"{SHARED}.{n.attr}", names[n.attr]) for n in uses])
    texts = {name: renamed(helpers[name], names) for name in helpers if name in reached}
    above = spaced(part for name, part in texts.items() if name in early)
    below = spaced(part for name, part in texts.items() if name not in early)

    head, rest = without_imports(body)
    more = needed(surgery, texts)
    defined = {name for node in tree.body for name in made(node)}
    if defined & more.keys():
        raise ValueError(f"surgery.py imports a {min(defined & more.keys())} too")
    head += written(merged(import_table(body), more))
    if above:
        head += f"\n{EARLY}\n{above}\n"
    if below:
        rest = f"{rest.rstrip()}\n\n\n{NOTE}\n{below}"
    return head + rest


def spaced(parts):
    """One text: two empty lines around functions and classes, one between constants."""
    text = ""
    tall = False
    for part in parts:
        after_tall = tall
        tall = isinstance(ast.parse(part).body[0], ast.FunctionDef | ast.ClassDef)
        text += ("\n\n" if tall or after_tall else "\n") + part
    return text


def shared_uses(tree):
    """The nodes `surgery.NAME`; ValueError for any other use of surgery."""
    nodes = [*ast.walk(tree)]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(SHARED):
            raise ValueError("write `from . import surgery`, and surgery.NAME")
    names = [n for n in nodes if isinstance(n, ast.Name) and n.id == SHARED]
    uses = [n for n in nodes if isinstance(n, ast.Attribute) and n.value in names]
    if len(uses) < len(names):
        raise ValueError("surgery can be used as surgery.NAME only")
    return uses


def closure(names, helpers):
    """These helpers, and all that they use in turn."""
    reached = set()
    todo = set(names)
    while todo:
        name = todo.pop()
        reached.add(name)
        used = {n.id for n in global_names(ast.parse(helpers[name]))}
        todo |= (used & helpers.keys()) - reached
    return reached


def new_names(helpers, taken):
    """{helper: its name in the one file}, private, and not one of the method's."""
    names = {}
    for name in helpers:
        private = f"_{name.lstrip('_')}"
        names[name] = f"_{SHARED}{private}" if private in taken else private
    return names


# Reading Python


def definitions(source):
    """{name: its text} of the functions, classes and constants of a file, in order.

    A comment right above one belongs to it.
    """
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.parse(source).body:
        begin = min(n.lineno for n in [node, *getattr(node, "decorator_list", ())])
        while begin > 1 and lines[begin - 2].startswith("#"):
            begin -= 1
        for name in made(node):
            found[name] = "".join(lines[begin - 1 : node.end_lineno])
    return found


def made(node):
    """The names that a statement at the top of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        targets = [n for target in node.targets for n in ast.walk(target)]
        return [n.id for n in targets if isinstance(n, ast.Name)]
    return []


def identifiers(tree):
    """All names that a file defines or uses, arguments too."""
    fields = ("id", "arg", "name")
    nodes = [*ast.walk(tree)]
    return {getattr(node, field, None) for node in nodes for field in fields}


def global_names(node, local=frozenset()):
    """The nodes of names that are not local to a function: loads, stores and `def`s."""
    if isinstance(node, ast.Name):
        if node.id not in local:
            yield node
        return

    outside = evaluated_outside(node)
    inside = [child for child in ast.iter_child_nodes(node) if child not in outside]
    for child in outside:
        yield from global_names(child, local)

    if isinstance(node, ast.ClassDef):  # its methods do not see what it binds
        bound = locals_of(node)
        for child in inside:
            method = isinstance(child, SCOPES)
            yield from global_names(child, local if method else local | bound)
        return

    if isinstance(node, SCOPES | COMPREHENSIONS):
        local = local | locals_of(node)
    for child in inside:
        yield from global_names(child, local)


def evaluated_outside(node):
    """The children of a function, class or comprehension that see none of its names."""
    if isinstance(node, COMPREHENSIONS):
        return []
    outside = [*getattr(node, "decorator_list", ()), *getattr(node, "bases", ())]
    return outside


def locals_of(scope):
    """The names that it binds: arguments, assignments, imports, functions inside."""
    bound = set()
    todo = [*ast.iter_child_nodes(scope)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            bound.add(node.id)
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        if isinstance(node, ast.alias):
            bound.add(node.asname or node.name)
        if isinstance(node, ast.ExceptHandler):
            bound.add(node.name)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif not isinstance(node, ast.Lambda | COMPREHENSIONS):
            todo += ast.iter_child_nodes(node)
    return bound


def evaluated_at_import(node):
    """The nodes that run when a file is imported: all but the bodies of functions."""
    yield node
    if isinstance(node, SCOPES):
        ahead = [node.args, *getattr(node, "decorator_list", ())]
        children = [*ahead, getattr(node, "returns", None) or ast.Pass()]
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from evaluated_at_import(child)


# Writing Python


def renamed(source, names):
    """A helper's text with the new names of the helpers that it defines and uses."""
    tree = ast.parse(source)
    edits = [(n, n.id, names[n.id]) for n in global_names(tree) if n.id in names]
    source = edited(source, edits)
    node = tree.body[0]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        word = "def" if isinstance(node, ast.FunctionDef) else "class"
        old, new = f"{word} {node.name}", f"{word} {names[node.name]}"
        source = source.replace(old, new, 1)
    return source


def edited(source, edits):
    """The text with the source of some nodes exchanged: (node, its text, new text)."""
    rows = [row.encode() for row in source.splitlines(keepends=True)]
    for node, old, new in sorted(edits, key=lambda edit: place(edit[0]), reverse=True):
        row = rows[node.lineno - 1]
        begin, end = node.col_offset, node.end_col_offset
        if node.end_lineno != node.lineno or row[begin:end].decode() != old:
            raise ValueError(f"line {node.lineno}: {old} should stand there as it is")
        rows[node.lineno - 1] = row[:begin] + new.encode() + row[end:]
    return b"".join(rows).decode()


def place(node):
    return node.lineno, node.col_offset


def without_imports(source):
    """The text before the imports at the top of a file, and the text after them."""
    body = ast.parse(source).body
    places = [i for i, node in enumerate(body) if isinstance(node, IMPORTS)]
    if not places:
        return "", source
    if places[-1] - places[0] >= len(places):
        raise ValueError(f"line {body[places[-1]].lineno}: an import below the others")
    rows = source.splitlines(keepends=True)
    head = "".join(rows[: body[places[0]].lineno - 1])
    return head, "".join(rows[body[places[-1]].end_lineno :])


def import_table(source):
    """{name in the file: (module, name in the module or None)}, without surgery."""
    table = {}
    for node in ast.parse(source).body:
        if not isinstance(node, IMPORTS):
            continue
        for alias in node.names:
            name = alias.asname or alias.name
            if isinstance(node, ast.Import):
                table[name] = alias.name, None
            elif alias.name != SHARED:
                table[name] = "." * node.level + (node.module or ""), alias.name
    return table


def needed(surgery, helpers):
    """The part of surgery.py's imports that these helpers use."""
    trees = [ast.parse(part) for part in helpers.values()]
    used = {n.id for tree in trees for n in global_names(tree)} - {*dir(builtins)}
    table = import_table(surgery)
    return {name: table[name] for name in table if name.partition(".")[0] in used}


def merged(table, more):
    """Both tables of imports; ValueError where one name means two things."""
    for name, origin in more.items():
        if table.get(name, origin) != origin:
            raise ValueError(f"{name} is imported twice, and not from one place")
    return table | more


def written(table):
    """The import statements, in three blocks: standard library, packages, siblings."""
    lines = {}
    for name, (module, member) in table.items():
        whole = member or module
        alias = whole if name == whole else f"{whole} as {name}"
        key = (block(module), member is not None, module)
        lines.setdefault(key, []).append(alias)

    blocks = {}
    for (number, is_from, module), names in sorted(lines.items()):
        names.sort(key=lambda n: (not n.isupper(), n[0].islower(), n))
        new = [f"import {name}\n" for name in names]
        if is_from:
            new = [f"from {module} import {', '.join(names)}\n"]
        blocks.setdefault(number, []).extend(new)
    return "\n".join("".join(block) for block in blocks.values())


def block(module):
    if module == "__future__":
        return 0
    if module.startswith("."):
        return 3
    return 1 if module.partition(".")[0] in sys.stdlib_module_names else 2


# The command


def main(arguments):
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        if not 1 <= len(arguments) <= 2:
            raise ValueError("give a method's name, such as lora; qlora wants a FOLDER")
        write(*arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write(name, folder=None):
    """Print a method, or write it with those that it takes into a folder."""
    if name not in NAMES:
        raise ValueError(f"no method is named {name!r}; there are: {', '.join(NAMES)}")
    files = parts(name)
    if folder is None and len(files) > 1:
        others = ", ".join(file for file in files if file[0] != "_")
        raise ValueError(f"{name} takes several files ({others}): name a FOLDER too")
    if folder is None:
        sys.stdout.buffer.write(files[f"{name}.py"].encode())
        return

    folder = Path(folder)
    for file in files:
        if (folder / file).exists():
            raise ValueError(f"{folder / file} exists already: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file, source in files.items():
        (folder / file).write_text(source, "utf8", newline="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
