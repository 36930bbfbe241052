r"""The one picture of the book: a layer, what is frozen, and what is trained beside it.

`draw("lora")` returns a drawing that a notebook shows as SVG; its `svg` is the text.
Every method is drawn on the same sheet: W at the same place, a unit of area for each
parameter, frozen parts grey with a lock, trained parts orange, the sum as a plus. What
a method shares with LoRA is pale, so that only the difference stands out.

The colours are CSS variables (`--ps-ink` and so on). A book page inlines the drawing
(`book/_ext/schematics.py`) and sets them for its own theme; as a plain image, on GitHub
or on Colab, the drawing brings a ground of its own and follows the reader's system.

    python -m peftlab.kit.schematic book/_static/schematic    # write them all
"""

import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 430, 259
SKY = 17  # the sheet begins here, above it nothing is drawn
OUT = IN = 128  # a square layer of tiny-decoder, one unit of the drawing a number
RANK = 8
VECTOR = 4  # a vector's thickness: one unit would be lost

LEFT, TOP = 56, 66  # of W
SQUARE = 264  # left edge of the square that B and A span
MIDDLE = TOP + OUT / 2

STYLE = """
.peft-schematic {
  --ps-ground: #ffffff; --ps-ink: #24303c; --ps-muted: #55606c; --ps-line: #76818d;
  --ps-frozen: #d6dbe1; --ps-trained: #dd6b2f; --ps-pale: #fbe0d1;
  --ps-trained-text: #a83f0c; --ps-on-trained: #1b1410; --ps-ghost: #a7b0ba;
}
@media (prefers-color-scheme: dark) {
  .peft-schematic {
    --ps-ground: #14181d; --ps-ink: #e6eaef; --ps-muted: #b1bac5; --ps-line: #8d98a5;
    --ps-frozen: #444e5a; --ps-trained: #f08a52; --ps-pale: #5a3622;
    --ps-trained-text: #ffa877; --ps-on-trained: #1b1410; --ps-ghost: #66717d;
  }
}
.peft-schematic text {
  font: 15px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  fill: var(--ps-ink);
}
.peft-schematic .letter {
  font-family: "STIX Two Text", "Times New Roman", "DejaVu Serif", serif;
  font-style: italic; font-size: 1.22em;
}
.peft-schematic .muted { fill: var(--ps-muted); }
.peft-schematic .hot { fill: var(--ps-trained-text); font-weight: 600; }
.peft-schematic .letter.hot { font-weight: 700; }
.peft-schematic .on { fill: var(--ps-on-trained); font-weight: 600; }
.peft-schematic .ground { fill: var(--ps-ground); }
.peft-schematic .frozen { fill: var(--ps-frozen); stroke: var(--ps-line); }
.peft-schematic .trained { fill: var(--ps-trained); stroke: var(--ps-trained-text); }
.peft-schematic .pale { fill: var(--ps-pale); stroke: var(--ps-trained-text); }
.peft-schematic .passing { fill: none; stroke: var(--ps-ink); }
.peft-schematic .ghost { fill: none; stroke: var(--ps-ghost); stroke-dasharray: 4 4; }
.peft-schematic .line { fill: none; stroke: var(--ps-ink); stroke-width: 1.6; }
.peft-schematic .solid { fill: var(--ps-ink); stroke: none; }
.peft-schematic .plate { fill: var(--ps-frozen); stroke: none; }
.peft-schematic .level { fill: var(--ps-ink); stroke: none; }
""".strip()

# The same where no style sheet is read: an attribute yields to any CSS rule.
PAINT = {
    "ground": 'fill="#ffffff"',
    "frozen": 'fill="#d6dbe1" stroke="#76818d"',
    "plate": 'fill="#d6dbe1"',
    "trained": 'fill="#dd6b2f" stroke="#a83f0c"',
    "pale": 'fill="#fbe0d1" stroke="#a83f0c"',
    "passing": 'fill="none" stroke="#24303c"',
    "ghost": 'fill="none" stroke="#a7b0ba" stroke-dasharray="4 4"',
    "line": 'fill="none" stroke="#24303c" stroke-width="1.6"',
    "solid": 'fill="#24303c"',
    "level": 'fill="#24303c"',
    "letter": 'font-family="serif" font-style="italic"',
    "muted": 'fill="#55606c"',
    "hot": 'fill="#a83f0c" font-weight="600"',
    "on": 'fill="#1b1410" font-weight="600"',
}


def _look(kinds):
    """The class of an element, and its paint for where there is no style sheet."""
    paint = [PAINT[kind] for kind in kinds.split()]
    return " ".join([f'class="{kinds}"', *paint]) if kinds else ""


TITLES = {
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "vera": "VeRA",
    "ia3": "IA3",
    "bitfit": "BitFit",
    "adapter": "Bottleneck adapter",
    "prompt": "Prompt tuning",
    "prefix": "Prefix tuning",
    "qlora": "QLoRA",
}


class Drawing:
    """A finished drawing: `svg`, `alt`, and how a notebook shows it."""

    def __init__(self, method, svg, alt):
        self.method, self.svg, self.alt = method, svg, alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/svg+xml": self.svg, "text/plain": self.alt}


class Sheet:
    """A list of SVG elements, and the few shapes that the pictures are made of."""

    def __init__(self):
        self.parts = []

    def add(self, element):
        self.parts.append(element)

    def rect(self, x, y, width, height, kind, radius=2):
        self.add(
            f'<rect {_look(kind)} x="{x:g}" y="{y:g}" width="{width:g}" '
            f'height="{height:g}" rx="{radius}"/>'
        )

    def path(self, d, kind="line"):
        self.add(f'<path {_look(kind)} d="{d}"/>')

    def text(self, x, y, words, kind="", anchor="middle", size=None):
        """Words at a point. `words` may be a list of (words, kind) set in a row."""
        runs = [(words, kind)] if isinstance(words, str) else words
        spans = "".join(f"<tspan {_look(k)}>{escape(w)}</tspan>" for w, k in runs)
        style = f' style="font-size:{size}px"' if size else ""
        self.add(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{spans}</text>'
        )

    def arrow(self, x1, y1, x2, y2):
        """A straight line with a head, to the right, up or down."""
        self.path(f"M{x1:g} {y1:g}L{x2:g} {y2:g}")
        if x1 == x2:
            back = 6 if y2 < y1 else -6
            self.path(f"M{x2:g} {y2:g}l-4 {back}h8z", "solid")
        else:
            self.path(f"M{x2:g} {y2:g}l-6 -4v8z", "solid")

    def plus(self, x, y, radius=11):
        self.add(f'<circle {_look("line")} cx="{x:g}" cy="{y:g}" r="{radius}"/>')
        arm = radius * 0.55
        self.path(f"M{x - arm:g} {y:g}h{2 * arm:g}M{x:g} {y - arm:g}v{2 * arm:g}")

    def times(self, x, y, radius=8):
        """The sign of a product number by number: a dot in a circle."""
        self.add(f'<circle {_look("line")} cx="{x:g}" cy="{y:g}" r="{radius}"/>')
        self.add(f'<circle {_look("solid")} cx="{x:g}" cy="{y:g}" r="2"/>')

    def lock(self, x, y):
        """A small closed lock, its middle at (x, y)."""
        self.rect(x - 5.5, y - 2, 11, 9, "solid", 2)
        self.path(f"M{x - 3.5:g} {y - 2:g}v-2.5a3.5 3.5 0 0 1 7 0v2.5")

    def frozen_word(self, x, y):
        """The lock and the word, centred at x on the baseline y."""
        self.lock(x - 30, y - 6)
        self.text(x + 8, y, "frozen")


def _label(letter, shape, state="", hot=True):
    """A matrix's letter, its shape and its state, as runs of text."""
    runs = [(letter, "letter hot" if hot else "letter"), (f" {shape}", "muted")]
    return runs + [(f" {state}", "hot" if hot else "muted")] if state else runs


def _formula(sheet, *runs):
    """The equation below the picture; a run that starts with * is trained."""
    spans = [
        (r.lstrip("*"), "letter hot" if r.startswith("*") else "letter") for r in runs
    ]
    sheet.text(WIDTH / 2, 243, spans)


def _count(sheet, words):
    sheet.text(WIDTH / 2, 267, words, "muted", size=14.5)


def _weight(sheet, kind="frozen", note=None):
    """W: the square on the left, with its name below and its state inside."""
    sheet.rect(LEFT, TOP, IN, OUT, kind)
    if kind == "trained":
        sheet.text(LEFT + IN / 2, MIDDLE + 5, "trained", "on")
    else:
        sheet.frozen_word(LEFT + IN / 2, MIDDLE + 5)
    name = _label("W", "(out, in)", hot=kind == "trained")
    sheet.text(LEFT + IN / 2, TOP + OUT + 19, name)


def _low_rank(sheet, kind="trained", r=RANK, labels=True, inside=True):
    """B and A at the edges of the square that they span, and the plus before it."""
    sheet.plus(214, MIDDLE)
    sheet.rect(SQUARE, TOP, IN, OUT, "ghost")
    sheet.rect(SQUARE, TOP - 6 - r, IN, r, kind, 1)
    sheet.rect(SQUARE - 6 - r, TOP, r, OUT, kind, 1)
    if inside:
        sheet.text(SQUARE + IN / 2, MIDDLE - 2, [("B A", "letter")])
        sheet.text(SQUARE + IN / 2, MIDDLE + 18, "(out, in)", "muted")
    if labels:
        sheet.text(SQUARE + IN / 2, TOP - 16 - r, _label("A", "(r, in)", "trained"))
        below = _label("B", "(out, r)", "trained")
        sheet.text(SQUARE - 6 - r, TOP + OUT + 19, below, anchor="start")


def _nothing_beside(sheet):
    """Where LoRA has its square, this method has nothing."""
    sheet.rect(SQUARE, TOP, IN, OUT, "ghost")
    sheet.text(SQUARE + IN / 2, MIDDLE - 4, "nothing", "muted")
    sheet.text(SQUARE + IN / 2, MIDDLE + 14, "beside it", "muted")


def _vector(sheet, x, y=TOP, length=OUT):
    sheet.rect(x, y, VECTOR, length, "trained", 1)


def full(sheet):
    _weight(sheet, "trained")
    _nothing_beside(sheet)
    _formula(sheet, "y = ", "*W", " x")
    _count(sheet, f"{OUT * IN:,} of {OUT * IN:,} parameters trained, drawn to scale")
    return "the square W, trained; nothing stands beside it"


def lora(sheet):
    _weight(sheet)
    _low_rank(sheet)
    _formula(sheet, "y = W x + (α/r) ", "*B A", " x")
    _count(sheet, f"{RANK * (OUT + IN):,} trained beside {OUT * IN:,}, drawn to scale")
    return (
        "the square W, frozen, plus the square that two thin trained matrices span: "
        "B, as tall as W and r wide, and A, as wide as W and r tall"
    )


def dora(sheet):
    _weight(sheet)
    _low_rank(sheet, "pale", labels=False)
    sheet.text(SQUARE + IN / 2, TOP - 24, [("B, A", "letter"), (" as LoRA’s", "muted")])
    x = 14
    _vector(sheet, x)
    sheet.times(x + 18, MIDDLE)
    sheet.text(x - 4, TOP - 24, _label("m", "(out,)", "trained"), anchor="start")
    for edge, bend in ((50, -9), (400, 9)):
        sheet.path(f"M{edge} {TOP - 18}q{bend} {OUT / 2 + 21} 0 {OUT + 42}")
    sheet.text(SQUARE + IN, TOP + OUT + 19, "rows of the sum: length 1", "muted", "end")
    _formula(sheet, "y = ", "*m", " / ‖W + s ", "*B A", "‖ ⊙ (W + s ", "*B A", ") x")
    count = RANK * (OUT + IN) + OUT
    _count(sheet, f"LoRA’s {RANK * (OUT + IN):,} and {OUT} more: {count:,} trained")
    return (
        "LoRA's picture, pale, in brackets: W, frozen, plus the square of B and A, "
        "each row of the sum at length 1; before the brackets the trained vector m, "
        "one length a row"
    )


def vera(sheet):
    r = 2 * RANK
    _weight(sheet)
    _low_rank(sheet, "frozen", r=r, labels=False, inside=False)
    middle = SQUARE + IN / 2
    sheet.text(
        middle, MIDDLE - 24, [("B", "letter"), (" and ", "muted"), ("A", "letter")]
    )
    sheet.frozen_word(middle, MIDDLE - 3)
    sheet.text(middle, MIDDLE + 18, "random, shared", "muted", size=14)
    sheet.text(middle, MIDDLE + 36, "by all layers", "muted", size=14)
    d = SQUARE - VECTOR - 3
    _vector(sheet, d, TOP - 6 - r, r)
    sheet.text(d - 6, TOP - 9, _label("d", "(r,)", "trained"), anchor="end")
    b = SQUARE - 6 - r - VECTOR - 4
    _vector(sheet, b)
    sheet.text(b, TOP + OUT + 19, _label("b", "(out,)", "trained"), anchor="start")
    sheet.text(middle, TOP - 31, [("A", "letter"), (" (r, in)", "muted")])
    _formula(sheet, "y = W x + ", "*b", " ⊙ B (", "*d", " ⊙ A x)")
    _count(sheet, f"{OUT + r} trained: two vectors, drawn {VECTOR} times too thick")
    return (
        "LoRA's picture with B and A grey: random, frozen and shared by all layers; "
        "trained are two vectors, d beside A and b beside B"
    )


def ia3(sheet):
    _weight(sheet)
    _nothing_beside(sheet)
    _vector(sheet, 16)
    sheet.times(37, MIDDLE)
    sheet.text(12, TOP - 16, _label("l", "(out,)", "trained"), anchor="start")
    _formula(sheet, "y = ", "*l", " ⊙ W x")
    _count(sheet, f"{OUT} trained: one vector, drawn {VECTOR} times too thick")
    return (
        "the square W, frozen, and before it the trained vector l, which scales its "
        "rows"
    )


def bitfit(sheet):
    _weight(sheet)
    sheet.rect(SQUARE, TOP, IN, OUT, "ghost")
    sheet.text(SQUARE + IN / 2, MIDDLE - 4, "no matrix,", "muted")
    sheet.text(SQUARE + IN / 2, MIDDLE + 14, "one vector", "muted")
    sheet.plus(214, MIDDLE)
    _vector(sheet, SQUARE - 14)
    sheet.text(
        SQUARE - 14, TOP + OUT + 19, _label("b", "(out,)", "trained"), anchor="start"
    )
    _formula(sheet, "y = W x + ", "*b")
    _count(sheet, f"{OUT} trained: one vector, drawn {VECTOR} times too thick")
    return "the square W, frozen, plus one trained vector: the bias b"


def qlora(sheet):
    sheet.rect(LEFT, TOP, IN, OUT, "frozen")
    cell = 8
    for row in range(OUT // cell):
        for column in range(IN // cell):
            level = (row * 7 + column * 5 + row * column * 3) % 16
            x, y = LEFT + column * cell, TOP + row * cell
            sheet.add(
                f'<rect {_look("level")} x="{x}" y="{y}" '
                f'width="{cell}" height="{cell}" opacity="{level / 34:.2f}"/>'
            )
    sheet.rect(LEFT, TOP, IN, OUT, "line")
    sheet.rect(LEFT + 18, MIDDLE - 27, IN - 36, 52, "plate", 4)
    sheet.text(LEFT + IN / 2, MIDDLE - 8, "4 bits each")
    sheet.frozen_word(LEFT + IN / 2, MIDDLE + 14)
    sheet.text(LEFT + IN / 2, TOP + OUT + 19, _label("W", "(out, in)", hot=False))
    _low_rank(sheet, "pale", labels=False)
    sheet.text(SQUARE + IN / 2, TOP - 24, [("B, A", "letter"), (" as LoRA’s", "muted")])
    _formula(sheet, "y = unpack(W) x + (α/r) ", "*B A", " x")
    _count(sheet, "a weight is one of 16 values; 64 share a scale")
    return (
        "LoRA's picture, pale; the square W is frozen and made of cells in 16 shades: "
        "4 bits for each weight"
    )


def _box(sheet, x, width, *lines, top=TOP + 12, height=104):
    sheet.rect(x, top, width, height, "frozen", 4)
    first = top + height / 2 - 9 * len(lines) + 4
    for i, line in enumerate(lines):
        sheet.text(x + width / 2, first + 18 * i, line)
    sheet.lock(x + width / 2, first + 18 * len(lines))


def _bow_tie(sheet, x, width=40, tall=104, waist=RANK):
    """An adapter: from d numbers down to m and up again."""
    top, gap = MIDDLE - tall / 2, (tall - waist) / 2
    middle = x + width / 2
    for a, b in ((x, middle - 1.5), (x + width, middle + 1.5)):
        sheet.path(
            f"M{a:g} {top:g}v{tall}L{b:g} {top + gap + waist:g}v-{waist}z", "trained"
        )


def adapter(sheet):
    y = MIDDLE
    sheet.text(9, y + 5, [("x", "letter")])
    for start, words in ((30, ("atten-", "tion")), (222, ("feed-", "forward"))):
        sheet.arrow(start - 13, y, start, y)
        _box(sheet, start, 68, *words)
        sheet.arrow(start + 68, y, start + 84, y)
        _bow_tie(sheet, start + 84)
        sheet.path(f"M{start + 74} {y}V{y + 66}H{start + 138}V{y + 11}")
        sheet.path(f"M{start + 124} {y}h5")
        sheet.plus(start + 139, y, 9)
        sheet.path(f"M{start - 8} {y}V{TOP - 12}H{start + 166}V{y - 9}")
        sheet.path(f"M{start + 148} {y}h9")
        sheet.plus(start + 166, y, 9)
    sheet.path(f"M205 {y}h4")
    sheet.arrow(397, y, 415, y)
    sheet.text(423, y + 5, [("y", "letter")])
    sheet.text(134, TOP + 4, "trained", "hot")
    sheet.text(326, TOP + 4, "trained", "hot")
    down = [("W↓", "letter hot"), (" (m, d) and ", "muted"), ("W↑", "letter hot")]
    sheet.text(WIDTH / 2, 218, down + [(" (d, m)", "muted")])
    _formula(sheet, "h + ", "*W↑", " f(", "*W↓", " h)")
    _count(sheet, "a small network after each half of the block")
    return (
        "a transformer block: attention and feed-forward, frozen, each followed by a "
        "trained bow tie, from d numbers down to m and up to d, added to what it "
        "reads; "
        "the block's own sums follow"
    )


def prompt(sheet):
    top, tall, step = TOP + 14, 96, 15
    for i in range(4):
        sheet.rect(20 + step * i, top, 11, tall, "trained", 1)
    for i in range(8):
        sheet.rect(88 + step * i, top, 11, tall, "passing", 1)
    sheet.text(9, top - 12, [("P", "letter hot"), (" trained", "hot")], anchor="start")
    sheet.text(47, top + tall + 20, "(n, d)", "muted")
    sheet.text(152, top - 12, [("E(X)", "letter"), (" the text", "muted")])
    sheet.text(146, top + tall + 20, "(tokens, d)", "muted")
    sheet.arrow(210, MIDDLE, 252, MIDDLE)
    _box(sheet, 254, 116, "the whole", "model", top=top - 6, height=108)
    sheet.arrow(370, MIDDLE, 398, MIDDLE)
    sheet.text(411, MIDDLE + 5, [("y", "letter")])
    _formula(sheet, "y = model([", "*P", "; E(X)])")
    _count(sheet, "n trained vectors before the text; no layer is touched")
    return (
        "n trained columns, then the columns of the text's embeddings, go into the "
        "whole "
        "model, which is frozen"
    )


def prefix(sheet):
    wide, tall, n = 62, 74, 30
    top = TOP + 30
    sheet.rect(22, top + 6, wide, tall, "passing")
    sheet.text(22 + wide / 2, top + 48, [("Q", "letter")])
    for x, letter, sign in ((136, "K", "ᴷ"), (256, "V", "ⱽ")):
        sheet.rect(x, top - 28, wide, n, "trained")
        sheet.text(x + wide / 2, top - 7, [(f"P{sign}", "letter on")])
        sheet.rect(x, top + 6, wide, tall, "passing")
        sheet.text(x + wide / 2, top + 48, [(letter, "letter")])
    for start, end, word in ((88, 131, "seeks"), (202, 251, "reads"), (322, 360, "")):
        sheet.arrow(start, top + 43, end, top + 43)
        sheet.text((start + end) / 2 - 2, top + 36, word, size=14.5)
    sheet.text(392, top + 48, "output")
    sheet.text(227, top - 40, "trained (n, d), in every layer", "hot")
    sheet.lock(34, top + tall + 25)
    sheet.text(
        48, top + tall + 31, "Q, K, V of the text, by frozen matrices", anchor="start"
    )
    _formula(sheet, "softmax(Q [", "*Pᴷ", "; K]ᵀ / √d) [", "*Pⱽ", "; V]")
    _count(sheet, "n trained keys and values before the text’s own")
    return (
        "attention: the text's queries Q seek keys and read values; n trained keys "
        "stand before the text's own, and n trained values before its values"
    )


METHODS = {
    f.__name__: f
    for f in (full, lora, dora, vera, ia3, bitfit, adapter, prompt, prefix, qlora)
}


def draw(method):
    """The picture of a method.

    Args:
        method: one of `METHODS`, such as "lora" or "prefix".

    Returns:
        A `Drawing`, which a notebook shows as SVG.

    Raises:
        ValueError: there is no picture of that name.
    """
    if method not in METHODS:
        raise ValueError(f"no picture of {method!r}; there are {', '.join(METHODS)}")
    sheet = Sheet()
    alt = f"{TITLES[method]}: {METHODS[method](sheet)}."
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="peft-schematic" role="img" '
        f'viewBox="0 {SKY} {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'aria-label="{escape(alt)}" font-family="sans-serif" font-size="15">'
    )
    size = f'y="{SKY}" width="{WIDTH}" height="{HEIGHT}" rx="6"'
    ground = f"<rect {_look('ground')} {size}/>"
    lines = [head, f"<style>{STYLE}</style>", ground, *sheet.parts, "</svg>"]
    return Drawing(method, "\n".join(lines) + "\n", alt)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in METHODS:
        (folder / f"{name}.svg").write_text(draw(name).svg, "utf8")
