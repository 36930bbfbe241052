"""The one picture: it can be read in light and dark, and it does not lie."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from peftlab.kit import schematic

CSS = (Path(__file__).parents[1] / "book/_static/peftlab.css").read_text("utf8")
PAGES = {"light": "#ffffff", "dark": "#121212"}
CARD = {"light": "#ffffff", "dark": "#222832"}  # the theme's surface, under the cards
# What is written upon what.
PAIRS = [("ink", "page"), ("muted", "page"), ("trained-text", "page")]
PAIRS += [("ink", "card"), ("muted", "card"), ("trained-text", "card")]
PAIRS += [("ink", "frozen"), ("on-trained", "trained")]
SHAPES = [("trained", "page"), ("line", "page"), ("trained-text", "page")]

each_method = pytest.mark.parametrize("method", schematic.METHODS)
each_theme = pytest.mark.parametrize("theme", PAGES)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def read(text):
    return dict(re.findall(r"--ps-([\w-]+): (#\w{6})", text))


def palettes(theme):
    """The drawing's own colours, and those that the book's style sheet sets."""
    own = schematic.STYLE.split("@media")[theme == "dark"]
    book = CSS.split(f'html[data-theme="{theme}"] .peft-schematic {{')[1].split("}")[0]
    ours = read(own)
    return [
        ours | {"page": ours["ground"], "card": ours["ground"]},
        ours | read(book) | {"page": PAGES[theme], "card": CARD[theme]},
    ]


@each_theme
def test_words_have_four_and_a_half_to_one_and_shapes_three(theme):
    for colors in palettes(theme):
        for pairs, least in ((PAIRS, 4.5), (SHAPES, 3)):
            for one, other in pairs:
                got = contrast(colors[one], colors[other])
                assert got >= least, f"{theme}: {one} on {other} has {got:.2f}:1"


@each_method
def test_a_picture_is_well_formed_named_and_says_what_is_trained(method):
    drawing = schematic.draw(method)
    root = ElementTree.fromstring(drawing.svg)
    assert root.get("aria-label") == drawing.alt
    assert drawing.alt.startswith(schematic.TITLES[method])
    assert "trained" in "".join(root.itertext())
    assert set(drawing._repr_mimebundle_()) == {"image/svg+xml", "text/plain"}


@each_method
def test_the_stored_file_is_the_function_s(method):
    path = Path(__file__).parents[1] / f"book/_static/schematic/{method}.svg"
    again = "python -m peftlab.kit.schematic book/_static/schematic"
    assert path.read_text("utf8") == schematic.draw(method).svg, f"run {again}"


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match="no picture of 'lokr'; there are full, lora"):
        schematic.draw("lokr")
