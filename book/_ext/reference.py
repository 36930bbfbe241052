"""The page of a reference file: ``{reference} lora`` in a page of book/reference.

It shows the docstring of peftlab/lora.py as the Markdown that it is, every public
function with its signature and its docstring (Google style, or Markdown), the file
itself, a download and the chapter that builds it. The file is parsed, never imported,
so that the book needs no torch to build.

The other way round, a chapter links to the file as GitHub and Colab want it,
``[lora.py](../peftlab/lora.py)``; in the book that link leads to the file's page.
"""

import ast
import posixpath
import re
import sys
import zipfile
from pathlib import Path, PurePosixPath

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import standalone  # noqa: E402

PACKAGE = "peftlab"
DOWNLOADS = "_build/standalone"  # where they are written
PAGES = "book/reference"
GOOGLE = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):$", re.MULTILINE)
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


# Docstrings


class Docstring(GoogleDocstring):
    """Google style to reStructuredText: a list of definitions for each section.

    napoleon's own lists run a name and its text together, and take `{name: tensor}`
    in Returns for a type.
    """

    def _parse_parameters_section(self, section):
        return self._definitions(section)

    def _parse_raises_section(self, section):
        return self._definitions(section)

    def _parse_attributes_section(self, section):
        return self._definitions(section)

    def _parse_returns_section(self, section):
        lines = self._dedent(self._consume_to_next_section())
        return self._field(section, lines)

    def _parse_yields_section(self, section):
        return self._parse_returns_section(section)

    def _definitions(self, section):
        lines = []
        for names, _, text in self._consume_fields(parse_type=False):
            names = names.replace("\\", "").split(", ")
            lines += [", ".join(f"``{name}``" for name in names)]
            lines += self._indent(text or [".."], 3)
        return self._field(section, lines)

    def _field(self, section, lines):
        return [f":{section}:", *self._indent(lines, 3), ""]


def restructured(docstring):
    """A Google-style docstring as reStructuredText, in a container of its own.

    Outside the container Sphinx would take the fields for its own and rename them.
    """
    text = CODE.sub(r"``\1``", docstring)
    pieces = re.split(r"(``.+?``)", text, flags=re.DOTALL)
    pieces[::2] = map(escaped, pieces[::2])
    lines = Docstring("".join(pieces), Config()).lines()
    return [".. container:: docstring", "", *(f"   {line}".rstrip() for line in lines)]


def escaped(prose):
    """Prose in which nothing is markup; a star may still begin an item of a list."""
    prose = re.sub(r"(?<!^)(?<!\n)([*|\\])(?=\S)", r"\\\1", prose)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", prose)


def rendered(docstring):
    """The lines of Markdown for a docstring of either style."""
    docstring = docstring or ""
    if GOOGLE.search(docstring):
        return ["```{eval-rst}", *restructured(docstring), "```"]
    return markdown(docstring)


def markdown(docstring):
    """Headings become bold lines: a section cannot begin inside a directive."""
    lines, fenced = [], False
    for line in docstring.splitlines():
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        heading = None if fenced else re.match(r"#{1,6} +(.+)", line)
        lines.append(f"**{heading[1]}**" if heading else line)
    return lines


# Functions and classes


def public(body):
    """The functions and classes that a user may call, in the file's order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n for n in body if isinstance(n, kinds) and n.name[0] != "_"]


def signature(node):
    """``(model, targets, r=8)``: no types, they stand in the file below."""
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if getattr(n, "name", "") == "__init__"]
        if not inits:
            return ""
        node = inits[0]
    arguments = node.args
    every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    for a in [*every, arguments.vararg, arguments.kwarg]:
        if a is not None:
            a.annotation = None
    if arguments.args and arguments.args[0].arg == "self":
        del arguments.args[0]
    return f"({ast.unparse(arguments)})"


def described(module, node):
    """The Markdown of a function, or of a class with its documented methods."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    name = f"{module}.{node.name}"
    lines = [f"``````{{py:{kind}}} {name}{signature(node)}", ""]
    lines += [*rendered(ast.get_docstring(node)), "``````", ""]

    methods = public(node.body) if kind == "class" else []
    for method in methods:
        if ast.get_docstring(method) and not method.decorator_list:
            head = f"``````{{py:method}} {name}.{method.name}{signature(method)}"
            lines += [head, "", *rendered(ast.get_docstring(method)), "``````", ""]
    return lines


# The page


def download(srcdir, module, source):
    """Write what the page offers, and return the line that offers it."""
    folder = Path(srcdir, DOWNLOADS)
    folder.mkdir(parents=True, exist_ok=True)
    if module not in standalone.NAMES:
        (folder / f"{module}.py").write_text(source, "utf8")
        return offer("Download the file", f"{module}.py", source)

    files = standalone.parts(module)
    if len(files) == 1:
        (text,) = files.values()
        (folder / f"{module}.py").write_text(text, "utf8")
        return offer("Download as one file", f"{module}.py", text)

    with zipfile.ZipFile(folder / f"{module}.zip", "w") as archive:
        for name, text in files.items():  # ZipInfo: no time of day, the same each time
            archive.writestr(zipfile.ZipInfo(f"{module}/{name}"), text)
    names = ", ".join(name for name in files if name[0] != "_")
    text = "".join(files.values())
    return offer(f"Download as one folder: {names}", f"{module}.zip", text)


def offer(words, file, text):
    count = len(text.splitlines())
    return f"[{words}](/{DOWNLOADS}/{file}) ({count} lines)"


def page(module, source, chapter, offered):
    """The Markdown of the whole page below its title."""
    tree = ast.parse(source)
    links = [offered]
    if chapter:
        links.append(f"built step by step in {{doc}}`/notebooks/{chapter}`")
    lines = [" · ".join(links), "", *markdown(ast.get_docstring(tree) or ""), ""]
    for node in public(tree.body):
        lines += described(module, node)
    count = len(source.splitlines())
    return [*lines, f"**The file itself**, {count} lines:", ""]


class Reference(SphinxDirective):
    required_arguments = 1
    option_spec = {"chapter": directives.unchanged}

    def run(self):
        module = self.arguments[0]
        path = Path(self.env.srcdir, PACKAGE, f"{module}.py")
        self.env.note_dependency(str(path))
        if not path.is_file():
            raise self.error(f"there is no {PACKAGE}/{module}.py")
        source = path.read_text("utf8")
        offered = download(self.env.srcdir, module, source)
        lines = page(module, source, self.options.get("chapter"), offered)
        box = nodes.container(classes=["reference-file"])
        self.state.nested_parse(StringList(lines, str(path)), self.content_offset, box)
        code = nodes.literal_block(source, source, language="python", linenos=True)
        code["classes"].append("whole-file")
        return [*box.children, code]


class FileLinks(SphinxPostTransform):
    """A link to peftlab/lora.py in a chapter leads to the page of that file."""

    default_priority = 5

    def run(self, **kwargs):
        here = posixpath.dirname(self.env.docname)
        if here.startswith(PAGES):
            return
        for link in list(self.document.findall(addnodes.download_reference)):
            target = posixpath.normpath(posixpath.join(here, link["reftarget"]))
            target = PurePosixPath(target.lstrip("/"))
            doc = f"{PAGES}/{target.stem}"
            if str(target.parent) == PACKAGE and doc in self.env.found_docs:
                uri = self.app.builder.get_relative_uri(self.env.docname, doc)
                text = nodes.literal(link.astext(), link.astext())
                link.replace_self(nodes.reference("", "", text, refuri=uri))


def setup(app):
    app.add_directive("reference", Reference)
    app.add_post_transform(FileLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
