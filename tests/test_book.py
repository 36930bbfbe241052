"""The built book and the files that point at each other, checked offline."""

import ast
import copy
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tools import standalone

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"
PAGES = sorted(p for p in HTML.rglob("*.html") if "_static" not in p.parts)
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
ENTRIES = [c for part in TOC["parts"] for c in part["chapters"]]
DOCS = [TOC["root"]] + [e["file"] for c in ENTRIES for e in [c, *c.get("sections", ())]]
CHAPTERS = [doc for doc in DOCS if doc.startswith("notebooks/")]
REFERENCES = [doc for doc in DOCS if doc.startswith("book/reference/")]
REPOSITORY = CONFIG["repository"]["url"]
BRANCH = CONFIG["repository"]["branch"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
SLUG = urlsplit(REPOSITORY).path.strip("/")

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda p: str(p.relative_to(HTML))
)
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


@cache
def soup(path):
    return BeautifulSoup(path.read_text("utf8"), "html.parser")


@cache
def anchors(path):
    return {tag["id"] for tag in soup(path).find_all(id=True)}


def prose(page):
    """The text of a page that a reader sees, without code and mathematics."""
    article = copy.copy(soup(page).find("article") or BeautifulSoup("", "html.parser"))
    for tag in article.select("pre, code, script, style, .math, .MathJax, svg"):
        tag.decompose()
    return article.get_text(" ")


def notebook(chapter):
    return json.loads((ROOT / f"{chapter}.ipynb").read_text("utf8"))


def source(cell):
    return "".join(cell["source"])


def test_the_book_is_built_and_has_every_page_of_its_contents():
    missing = [d for d in DOCS if not (HTML / f"{d}.html").is_file()]
    assert not missing, f"{HTML} lacks {missing}: run `make book` first"


def dead(page, url):
    """What is wrong with a link inside the book, or None."""
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return None
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.exists():
        return f"dead link {url}"
    anchor = unquote(parts.fragment)
    if anchor and target.suffix == ".html" and anchor not in anchors(target):
        return f"dead anchor {url}"


@each_page
def test_links_and_anchors_lead_somewhere(page):
    tags = soup(page).find_all(["a", "link", "img", "script"])
    urls = {t.get("href") or t.get("src") for t in tags} - {None}
    bad = [complaint for url in sorted(urls) if (complaint := dead(page, url))]
    assert not bad, "\n".join(bad)


@each_page
def test_no_page_fetches_anything(page):
    fetched = []
    for tag in soup(page).find_all(["script", "img", "iframe", "source", "video"]):
        fetched.append(tag.get("src"))
    for tag in soup(page).find_all("link"):
        if {"stylesheet", "preload", "icon", "modulepreload"} & set(tag.get("rel", [])):
            fetched.append(tag.get("href"))
    bad = [url for url in fetched if url and urlsplit(url).netloc]
    assert not bad, f"fetched from elsewhere: {bad}"


def test_no_style_sheet_fetches_anything():
    bad = {}
    for css in HTML.rglob("*.css"):
        found = re.findall(
            r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)'\"]+", css.read_text("utf8")
        )
        if found:
            bad[css.name] = found
    assert not bad, f"style sheets fetch {bad}"


@each_page
def test_every_image_says_what_it_shows(page):
    bad = []
    for img in soup(page).find_all("img"):
        alt, name = (img.get("alt") or "").strip(), Path(img.get("src", "")).stem
        file_name = re.search(r"\.(png|svg|jpe?g)$|_images/", alt) or alt == name
        if not alt or file_name:
            bad.append(f"{img.get('src')}: alt text {alt!r}")
    hint = "in a notebook, set the cell's metadata mystnb: {image: {alt: ...}}"
    assert not bad, "\n".join([*bad, hint])


@each_page
def test_nothing_raw_is_left_in_the_text(page):
    text = prose(page)
    rules = {
        "LaTeX between dollars": r"\$\$|\$[^$\n]*[\\_^][^$\n]*\$",
        "a comment": r"<!--|-->",
        "a MyST role or directive": r"\{[a-z:]+\}`|:::",
        "a Markdown link": r"\]\([^)\s]+\)",
        "an nbgrader marker": r"### (BEGIN|END) ",
    }
    bad = [f"{k}: {m[0][:80]!r}" for k, r in rules.items() if (m := re.search(r, text))]
    assert not bad, "\n".join(bad)


@each_page
def test_no_page_shows_a_warning_or_a_traceback(page):
    bad = soup(page).select(".output.stderr, .output.traceback")
    assert not bad, bad[0].get_text()[:300]


@each_page
def test_every_page_has_one_title_and_a_language(page):
    article = soup(page).find("article") or soup(page)
    assert len(article.find_all("h1")) == 1
    assert soup(page).html["lang"] == "en"
    assert soup(page).title.get_text().strip()


@pytest.mark.parametrize("doc", REFERENCES)
def test_a_reference_page_shows_its_file_and_its_chapter(doc):
    page, name = HTML / f"{doc}.html", Path(doc).name
    path = ROOT / "peftlab" / f"{name}.py"
    public = re.findall(r"^def ([a-z]\w*)", path.read_text("utf8"), re.M)
    missing = [f for f in public if f"{name}.{f}" not in anchors(page)]
    assert not missing, f"{doc} does not document {missing}: touch it and rebuild"
    listings = [b.get_text() for b in soup(page).select("div.highlight pre")]
    first = next(line for line in path.read_text("utf8").splitlines() if "def " in line)
    assert any(first in text for text in listings), "the file itself is not shown"
    links = [a["href"] for a in soup(page).select("article a[href]")]
    wanted = f"{name}.zip" if name in ("multi_lora", "qlora") else f"{name}.py"
    assert any("_downloads" in url and url.endswith(wanted) for url in links)
    chapters = [u for u in links if "/notebooks/" in u]
    wanted = ":chapter:" in (ROOT / f"{doc}.md").read_text("utf8")
    assert bool(chapters) == wanted, f"{doc} does not link to its chapter"
    if not chapters:  # the chapter is yet to come
        return
    back = soup((page.parent / urlsplit(chapters[0]).path).resolve())
    wanted = f"reference/{name}.html"
    assert any(wanted in a["href"] for a in back.select("article a[href]")), (
        f"{chapters[0]} does not link back: write [{name}.py](../peftlab/{name}.py)"
    )


def documented(docstring):
    """The names in the Args of a Google-style docstring."""
    args = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", docstring, re.MULTILINE)
    lines = re.findall(
        r"^ {4}([\w*, ]+):(?= |$)", args[1] if args else "", re.MULTILINE
    )
    return [name.strip("* ") for line in lines for name in line.split(",")]


@pytest.mark.parametrize("doc", REFERENCES)
def test_every_argument_is_said_and_shown_as_a_list(doc):
    page, name = HTML / f"{doc}.html", Path(doc).name
    tree = ast.parse((ROOT / "peftlab" / f"{name}.py").read_text("utf8"))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name[0] == "_":
            continue
        names = documented(ast.get_docstring(node) or "")
        if not names:
            continue
        assert names == [a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)]
        entry = soup(page).find(id=f"{name}.{node.name}").find_next_sibling("dd")
        shown = ", ".join(dt.get_text() for dt in entry.select(".docstring dl dl dt"))
        assert shown.startswith(", ".join(names)), f"{node.name}: {shown}; rebuild"


def test_every_reference_file_has_a_page():
    files = {p.stem for p in (ROOT / "peftlab").glob("*.py")} - {
        "__init__",
        "adapter_folder",
        "adapter_report",
    }
    assert files == {Path(doc).name for doc in REFERENCES}


@each_chapter
def test_a_chapter_links_to_itself_on_colab(chapter):
    owner = urlsplit(REPOSITORY)
    url = (
        f"https://colab.research.google.com/github{owner.path}"
        f"/blob/{BRANCH}/{chapter}.ipynb"
    )
    first = next(c for c in notebook(chapter)["cells"] if c["cell_type"] == "markdown")
    assert f"({url})" in source(first), f"the first cell does not link to {url}"
    page = soup(HTML / f"{chapter}.html").find("article")
    assert page.find("a", href=url), "the link is not on the page"


@each_chapter
def test_a_chapter_installs_this_repository_on_colab(chapter):
    code = [c for c in notebook(chapter)["cells"] if c["cell_type"] == "code"]
    diagnoses = r"icd\.diagnoses|icd_questions|tasks\.SIX"
    medical = any(re.search(diagnoses, source(c)) for c in code)
    names = ("BitsAndBytesConfig", "bitsandbytes.optim", "--load-in-4bit")
    packed = any(name in source(c) for c in code for name in names)
    extras = "notebooks" + ",medical" * medical + ",quantization" * packed
    wanted = (
        'import sys\n\nif "google.colab" in sys.modules:\n'
        f'    %pip install -q "peftlab[{extras}] @ git+{REPOSITORY}"'
    )
    if any(re.search(r"^\s*(from|import) trl\b", source(c), re.M) for c in code):
        # alone: it would have pip replace Colab's datasets
        wanted += "\n    %pip install -q --no-deps trl"
    squeezed = source(code[0]).replace("\n\n", "\n").strip()
    assert squeezed == wanted.replace("\n\n", "\n")
    assert {"remove-cell", "nbval-skip"} <= set(code[0]["metadata"].get("tags", []))


def addresses(text):
    """Every mention of a repository of this name, on GitHub or Colab."""
    name = SLUG.split("/")[1]
    return re.findall(rf"github(?:\.com)?/([\w.-]+/{re.escape(name)})(?![\w-])", text)


def test_one_place_names_the_repository_and_the_others_agree():
    files = ["README.md", "CITATION.cff", "pyproject.toml", "environment.yml"]
    files += [f"{c}.ipynb" for c in CHAPTERS] + [f"{d}.md" for d in DOCS[:1]]
    for file in files:
        others = set(addresses((ROOT / file).read_text("utf8"))) - {SLUG}
        assert not others, f"{file} names {others}; _config.yml names {SLUG}"
    assert PROJECT["urls"]["Repository"] == REPOSITORY


def links(text):
    """The targets of a Markdown text's links, inline and by reference, in order."""
    named = dict(re.findall(r"^\[([^]]+)\]: (\S+)$", text, re.MULTILINE))
    found = re.findall(r"\]\(([^)]+)\)|\[([^]]+)\](?:\[([^]]*)\])?(?![(:\]])", text)
    every = [
        inline or named.get((ref or words).lower()) for inline, words, ref in found
    ]
    return [url for url in every if url]


def table(text):
    """The chapters that a file's table of chapters links to, in order."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    rest = [line for line in text.splitlines() if line.startswith("[")]
    urls = links("\n".join([*rows, *rest]))
    found = [re.fullmatch(r"(?:\.\./)?(notebooks/[\w.]+)\.ipynb", url) for url in urls]
    return [m[1] for m in found if m]


@pytest.mark.parametrize("file", ["README.md", f"{TOC['root']}.md"])
def test_the_table_of_chapters_is_that_of_the_contents(file):
    assert table((ROOT / file).read_text("utf8")) == CHAPTERS


def test_every_chapter_on_disk_is_in_the_contents():
    disk = sorted(f"notebooks/{p.stem}" for p in (ROOT / "notebooks").glob("*.ipynb"))
    assert disk == sorted(CHAPTERS)


def test_the_files_that_the_readme_links_to_exist():
    for file in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / file).read_text("utf8")
        named = {*re.findall(r"^\[[^]]+\]: (\S+)$", text, re.MULTILINE)}
        assert named <= {*links(text)}, "a reference that no link uses"
        urls = [url for url in links(text) if not urlsplit(url).scheme]
        assert not [url for url in urls if not (ROOT / url).exists()]


def test_the_readme_opens_with_code_and_names_every_method():
    text = (ROOT / "README.md").read_text("utf8")
    assert text.index("```python") < text.index("|---"), "a table before the first code"
    first = text.index("python tools/standalone.py lora > lora.py")
    assert text.index("```python") < first < text.index("|---")
    lost = [n for n in standalone.NAMES if f"peftlab/{n}.py" not in links(text)]
    assert not lost, f"README does not link to {lost}"


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_lines_have_at_most_100_characters(file):
    lines = (ROOT / file).read_text("utf8").splitlines()
    assert not [line for line in lines if len(line) > 100]


def test_conda_gives_the_same_environment_as_pip():
    env = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))
    assert env["name"] == "peftlab" and env["channels"] == ["conda-forge"]
    conda = [d for d in env["dependencies"] if isinstance(d, str)]
    python = next(d for d in conda if d.startswith("python="))
    wanted = SpecifierSet(PROJECT["requires-python"])
    assert wanted.contains(python.split("=")[1] + ".0")
    assert "pip" in conda, "conda warns when pip is used and not named"
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    extras = sorted(PROJECT["optional-dependencies"])
    assert len(pip) == 1 and pip[0].startswith("-e .[")
    assert sorted(pip[0][5:-1].split(",")) == extras


def test_every_dependency_is_pinned_within_its_range():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text("utf8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for wanted in map(Requirement, [r for group in groups for r in group]):
        version = pins.get(canonicalize_name(wanted.name))
        assert version, f"constraints.txt does not pin {wanted.name}"
        assert wanted.specifier.contains(version), f"{version} is not {wanted}"
    assert not [v for v in pins.values() if "+" in v], "a pin names a local build"
