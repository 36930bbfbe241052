"""Pictures that follow the theme.

An SVG in an `<img>` sees neither the page's colours nor its light/dark button. So the
drawings of `peftlab.kit.schematic`, and matplotlib's SVG figures, are put into the page
itself: the alt text becomes the label, the ground goes, and the page's CSS
(`--ps-…`, `--fig-…`) gives the colours. Whoever reads the notebook elsewhere sees
the plain image.

A figure with panels side by side is too wide for a phone. There its panels stand one
below the other: each is the same drawing once more, seen through a window of its own.
"""

import re
from pathlib import Path

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
PANEL = re.compile(r'<g id="(?:f\d+-)?axes_\d+">')
CORNER = re.compile(r"[ML] (-?[\d.]+) (-?[\d.]+)\s")
TEXT = re.compile(r'<text style="([^"]*)" x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*)')
LETTER = 6.6  # the width of one, about


def _attribute(tag, name):
    found = re.search(rf'\b{name}="([^"]*)"', tag)
    return found[1] if found else ""


def _windows(svg, number, width, height):
    """Of panels side by side, what shows each: x, y, width, height. Else nothing.

    The first window is the legend's, where there is one above the panels."""
    panels = PANEL.split(svg)[1:]
    if len(panels) < 2:
        return []
    panels[-1], _, legend = panels[-1].partition(f'<g id="f{number}-legend_1">')
    boxes = [_extent(panel) for panel in panels]
    narrow = any(right - left < 90 for _, left, right, _ in boxes)
    if narrow or any(a[2] > b[0] for a, b in zip(boxes, boxes[1:], strict=False)):
        return []
    windows = []
    named = [(float(x), float(y), words) for _, x, y, words in TEXT.findall(legend)]
    if named and max(y for _, y, _ in named) < min(top for *_, top in boxes) + 5:
        right = max(x + LETTER * len(words) + 8 for x, _, words in named)
        windows.append((0, 0, right, max(y for _, y, _ in named) + 6))
    edges = [0, *(first - 2 for first, *_ in boxes[1:]), width]
    for (*_, top), left, right in zip(boxes, edges, edges[1:], strict=False):
        windows.append((left, top, right - left, height - top))
    return windows


def _extent(panel):
    """Where a panel's words begin, its axes' left and right edge, and its top."""
    (left, _), (right, _), (_, top), *_ = (
        tuple(map(float, corner)) for corner in CORNER.findall(panel)
    )
    first, above = left, top - 5
    for style, x, y, words in TEXT.findall(panel):
        x, y = float(x), float(y)
        if x < left:
            end = "text-anchor: end" in style
            first = min(first, x - (LETTER * len(words) if end else 12))
        if y < top:
            above = min(above, y - 14)
    return first, left, right, above


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
    width, height = map(float, box.split()[2:])
    new = '<svg class="{}" {} viewBox="{}" style="--natural: {:g}px">'
    label = f'role="img" aria-label="{alt}"'
    whole = new.format(f"{kind} {classes}", label, box, width)
    svg = svg.replace(head, whole, 1).strip()
    if kind == "peft-schematic":
        return svg
    windows = _windows(svg, number, width, height)
    for x, y, w, h in windows:
        view = f"{x:g} {y:g} {w:g} {h:g}"
        svg += new.format("peft-figure panel", 'aria-hidden="true"', view, w)
        svg += f'<use href="#f{number}-figure_1"/></svg>'
    # The theme makes its scrollable boxes reachable by keyboard where they scroll.
    stacks = " stacks" if windows else ""
    return f'<div class="pst-scrollable-table-container{stacks}">{svg}</div>'


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


def setup(app):
    app.connect("html-page-context", inline, priority=950)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
