"""Pictures that follow the theme, and a description for every page.

An SVG in an `<img>` sees neither the page's colours nor its light/dark button. So the
drawings of `peftlab.kit.schematic`, and matplotlib's SVG figures, are put into the page
itself: the alt text becomes the label, the ground goes, and the page's CSS
(`--ps-…`, `--fig-ink`) gives the colours. Whoever reads the notebook elsewhere sees
the plain image.
"""

import re
from html import escape
from pathlib import Path

from docutils import nodes

IMAGE = re.compile(r'<img\b[^>]*\bsrc="[^"]*?([^"/]+\.svg)"[^>]*>')
# The colours of peftlab.kit.plot, and the CSS variable that takes the place of each.
FIGURE = {
    "#4a5561": "ink",
    "#fefefe": "ground",
    "#c8500f": "orange",
    "#1f2933": "dark",
    "#6b7682": "grey",
    "#7a3212": "brown",
    "#1261dc": "blue",
    "#0b8457": "green",
    "#8a21a8": "purple",
}
PAINT = re.compile("|".join(FIGURE))
GROUND = re.compile(r'<rect class="ground"[^>]*/>\n?')
STYLE = re.compile(r"<style\b[^>]*>.*?</style>\n?", re.S)
HEAD = re.compile(r"<svg\b[^>]*>", re.S)


def _attribute(tag, name):
    found = re.search(rf'\b{name}="([^"]*)"', tag)
    return found[1] if found else ""


def _inline(svg, alt, classes, first, number):
    """The SVG as an element of the page, or None if it is no drawing of ours."""
    svg = svg[svg.index("<svg") :]
    head = HEAD.match(svg)[0]
    box = _attribute(head, "viewBox")
    if "peft-schematic" in head:
        kind = "peft-schematic"
        svg = GROUND.sub("", svg)
        svg = svg if first else STYLE.sub("", svg)
    elif 'id="figure_1"' in svg and PAINT.search(svg):
        kind = "peft-figure"
        svg = PAINT.sub(lambda m: f"var(--fig-{FIGURE[m[0]]})", svg)
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
        svg = STYLE.sub("", svg)
        # matplotlib's names are the same in each figure.
        svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>f{number}-", svg)
    else:
        return None
    width = box.split()[2]
    new = (
        f'<svg class="{kind} {classes}" role="img" aria-label="{alt}" '
        f'viewBox="{box}" style="--natural: {float(width):g}px">'
    )
    svg = svg.replace(HEAD.match(svg)[0], new, 1).strip()
    # The theme makes its scrollable boxes reachable by keyboard where they scroll.
    box = '<div class="pst-scrollable-table-container">{}</div>'
    return box.format(svg) if kind == "peft-figure" else svg


def inline(app, pagename, templatename, context, doctree):
    files = {name: path for path, (_, name) in app.env.images.items()}
    count = 0

    def swap(match):
        nonlocal count
        path = Path(app.srcdir, files.get(match[1], ""))
        if match[1] not in files or not path.is_file():
            return match[0]
        alt, classes = (_attribute(match[0], a) for a in ("alt", "class"))
        new = _inline(path.read_text("utf8"), alt, classes, count == 0, count)
        count += new is not None
        return new or match[0]

    if "body" in context:
        context["body"] = IMAGE.sub(swap, context["body"])


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
    """The theme's arrows in the side bar have no name for a screen reader."""
    theirs = context.get("generate_toctree_html")

    def ours(*args, **options):
        label = '<summary aria-label="Show or hide the pages below">'
        return str(theirs(*args, **options)).replace("<summary>", label)

    if theirs:
        context["generate_toctree_html"] = ours


def setup(app):
    app.connect("html-page-context", name_toggles, priority=950)
    app.connect("html-page-context", inline, priority=950)
    app.connect("html-page-context", describe)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
