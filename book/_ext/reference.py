"""The page of a reference file: ``{reference} lora`` in a page of book/reference.

It shows the docstring of peftlab/lora.py as the Markdown that it is, every public
function with its signature, the file itself, a download and the chapter that builds
it. The file is parsed, never imported, so that the book needs no torch to build.

The other way round, a chapter links to the file as GitHub and Colab want it,
``[lora.py](../peftlab/lora.py)``; in the book that link leads to the file's page.
"""

import ast
import posixpath
import re
import sys
from pathlib import Path, PurePosixPath

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import standalone  # noqa: E402

PACKAGE = "peftlab"
ONE_FILE = "_build/standalone"  # where the downloads are written
PAGES = "book/reference"


def public(tree):
    """The functions and classes that a user may call, in the file's order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"]


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


def markdown(docstring):
    """Headings become bold lines: a section cannot begin inside a directive."""
    lines, fenced = [], False
    for line in (docstring or "").splitlines():
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        heading = None if fenced else re.match(r"#{1,6} +(.+)", line)
        lines.append(f"**{heading[1]}**" if heading else line)
    return lines


def one_file(srcdir, module, source):
    """Write the method as one file; its path in the book's sources, and its length."""
    shared = Path(srcdir, PACKAGE, "surgery.py").read_text("utf8")
    alone = module not in ("multi_lora", "qlora", "peft_files")  # these take other methods
    text = standalone.standalone(source, shared) if alone else source
    path = Path(srcdir, ONE_FILE, f"{module}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf8")
    return f"/{ONE_FILE}/{module}.py", len(text.splitlines())


def page(module, source, chapter, download, whole):
    """The Markdown of the whole page below its title."""
    tree = ast.parse(source)
    links = [f"{{download}}`Download as one file <{download}>` ({whole} lines)"]
    if chapter:
        links.append(f"built step by step in {{doc}}`/notebooks/{chapter}`")
    lines = [" · ".join(links), "", *markdown(ast.get_docstring(tree)), ""]
    for node in public(tree):
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        lines += [f"``````{{py:{kind}}} {module}.{node.name}{signature(node)}", ""]
        lines += [*markdown(ast.get_docstring(node)), "``````", ""]
    count = len(source.splitlines())
    lines += [f"**The file itself**, {count} lines:", ""]
    return lines


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
        download, count = one_file(self.env.srcdir, module, source)
        lines = page(module, source, self.options.get("chapter"), download, count)
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
