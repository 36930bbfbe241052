"""One style for all figures, read on light and dark pages alike.

The background is transparent and every colour is of middle lightness, so that the
page's own colour shows through and nothing disappears on either."""

import matplotlib
import matplotlib.pyplot as plt
from IPython import get_ipython
from matplotlib_inline.backend_inline import set_matplotlib_formats

INK = "#7f8893"  # axes and labels
COLORS = {  # one colour for each method, in every chapter
    "full": "#d9622b",
    "LoRA": "#2f8fc4",
    "LoRA r=1": "#8a6fd1",
    "base": "#7f8893",
    "peft": "#3f9e6e",
    "random": "#b0862b",
}


def use_style():
    """Set the book's style for all figures drawn after it.

    In a notebook they are SVG, whose ink takes the colour of the page's text
    (book/_ext/schematics.py)."""
    if get_ipython() is not None:
        set_matplotlib_formats("svg", metadata={"Date": None})
    matplotlib.rcParams.update(
        {
            "figure.figsize": (6.4, 3.4),
            "figure.dpi": 110,
            "figure.facecolor": "none",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "none",
            "savefig.transparent": True,
            "axes.facecolor": "none",
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": matplotlib.cycler(color=list(COLORS.values())),
            "axes.grid": True,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "xtick.color": INK,
            "ytick.color": INK,
            "text.color": INK,
            "font.size": 10.5,
            "lines.linewidth": 2,
            "lines.markersize": 5,
            "legend.frameon": False,
            "hatch.color": INK,
            "svg.fonttype": "none",
            "svg.hashsalt": "peftlab",
        }
    )


def axes(xlabel="", ylabel="", columns=1, **options):
    """A figure's axes (or an array of them) in the book's style, labelled, units and
    all."""
    use_style()
    if columns > 1:
        options.setdefault("figsize", (7.6, 3.4))
    figure, ax = plt.subplots(1, columns, **options)
    for one in ax if columns > 1 else [ax]:
        one.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def band(ax, x, runs, label, color=None, marker="o"):
    """Mean of `runs` over seeds as a line, lowest to highest as a band.

    x: (points,). runs: (points, seeds), a number for each point and seed."""
    mean = [sum(row) / len(row) for row in runs]
    color = color or COLORS.get(label)
    (line,) = ax.plot(x, mean, marker=marker, label=label, color=color)
    ax.fill_between(
        x,
        [min(r) for r in runs],
        [max(r) for r in runs],
        alpha=0.2,
        color=line.get_color(),
    )
    return line
