"""One colour code: readable in light and dark, told apart by the colour-blind too."""

import io
import itertools
import re
import sys
from pathlib import Path

import numpy
import pytest

from experiments import pictures
from peftlab.kit import plot

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))
import schematics  # noqa: E402

CSS = (ROOT / "book/_static/peftlab.css").read_text("utf8")
GROUNDS = {"light": "#ffffff", "dark": "#222832"}  # dark: the lightest ground there is

# Machado, Oliveira, Fernandes 2009: how three kinds of colour-blind readers see linear
# RGB, at full severity.
SEEN = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def linear(color):
    """The three channels of a colour such as "#c8500f", as light."""
    c = numpy.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return numpy.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(linear(c) @ TO_XYZ[1] for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(color, seen):
    """A colour's CIELAB values, as a reader sees it."""
    rgb = numpy.clip(numpy.array(SEEN[seen]) @ linear(color), 0, 1)
    x, y, z = numpy.cbrt(numpy.maximum(TO_XYZ @ rgb / [0.9505, 1, 1.089], 0.008856))
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def theme_colors(theme):
    """The colours that the style sheet puts in the place of plot's, by name."""
    blocks = re.findall(rf'html\[data-theme="{theme}"\] \{{(.*?)\}}', CSS, re.S)
    return dict(re.findall(r"--fig-(\w+): (#\w{6})", "".join(blocks)))


@pytest.mark.parametrize("theme", GROUNDS)
def test_every_colour_can_be_read_and_told_apart(theme):
    colors = theme_colors(theme)
    assert set(colors) == set(schematics.FIGURE.values()) - {"ground"}
    for name, color in colors.items():
        got = contrast(color, GROUNDS[theme])
        least = 3 if name in ("green", "purple") and theme == "dark" else 4.5
        assert got >= least, f"{name} has {got:.2f}:1 on {theme}"
    curves = [c for n, c in colors.items() if n != "ink"]
    for one, other in itertools.combinations(curves, 2):
        for seen in SEEN:
            apart = numpy.linalg.norm(lab(one, seen) - lab(other, seen))
            assert apart > 15, f"{one} and {other}: {apart:.0f} with {seen}"


def test_the_book_knows_each_colour_of_plot_and_light_is_as_drawn():
    drawn = {plot.INK, plot.GROUND, *plot.COLORS.values()}
    assert set(schematics.FIGURE) == drawn
    light = theme_colors("light")
    for color, name in schematics.FIGURE.items():
        assert name == "ground" or light[name] == color


def svg(figure):
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plot.plt.close(figure)
    return file.getvalue()


def draw():
    panels = plot.axes("steps", "loss (nats)", rows=2)
    for ax in panels:
        plot.band(ax, [1, 2], [[1.0, 3.0], [2.0, 4.0]], "full")
        plot.band(ax, [1, 2], [[2.0, 3.0], [3.0, 4.0]], "LoRA")
    return panels


def test_a_figure_is_text_and_the_same_bytes_each_time():
    first, again = (svg(draw()[0].figure) for _ in range(2))
    assert first == again
    assert ">loss (nats)</text>" in first and plot.GROUND in first


def test_one_legend_names_each_curve_once_and_hides_none():
    panels = draw()
    legend = plot.legend(panels)
    assert [t.get_text() for t in legend.get_texts()] == ["full", "LoRA"]
    panels[0].figure.canvas.draw()
    bottom = legend.get_window_extent().y0
    assert all(bottom >= ax.get_window_extent().y1 for ax in panels)
    plot.plt.close("all")


NAME = re.compile(r"\b[pm][0-9a-f]{10}\b")  # matplotlib's, made of what it draws
NUMBER = re.compile(r"-?\d+\.?\d*")


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_stored_picture_is_what_the_stored_results_give(name, monkeypatch):
    drawn, draw = {}, pictures.PICTURES[name]

    def keep(figure, file):
        drawn[file] = svg(figure)

    monkeypatch.setitem(draw.__globals__, "save_picture", keep)
    draw()
    stored = (ROOT / "book/_static" / f"{name}.svg").read_text("utf8")
    fresh, kept = (NAME.sub("", t) for t in (drawn[f"{name}.svg"], stored))
    again = f"run python -m experiments.pictures {name}"
    assert NUMBER.sub("", fresh).split() == NUMBER.sub("", kept).split(), again
    numbers = zip(NUMBER.findall(fresh), NUMBER.findall(kept), strict=True)
    assert all(abs(float(a) - float(b)) < 0.2 for a, b in numbers), again
