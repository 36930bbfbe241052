"""One style and one colour code for all figures.

Orange is what is trained, grey what is frozen or untouched, dark is full fine-tuning.
Every colour has at least 4.5:1 on white, and any two can be told apart with each of the
three kinds of colour blindness (tests/test_plot.py).

A figure has a white ground of its own, so it can be read on any page, light or dark.
In the book it is part of the page: book/_ext/schematics.py takes the ground away and
puts the theme's colour in the place of each colour named here.

    ax = plot.axes("learning rate", "exact match")
    plot.band(ax, rates, runs, "LoRA")     # "LoRA" is a name in COLORS: orange
    plot.legend(ax)                        # above the axes, off the curves

Two panels that share an x axis are easier to read one above the other, and they fit a
phone: `plot.axes(..., rows=2)`. Panels side by side (`columns=2`) stand one below the
other on a phone, in the book."""

import math

import matplotlib
import matplotlib.pyplot as plt
from IPython import get_ipython
from matplotlib_inline.backend_inline import set_matplotlib_formats

INK = "#4a5561"  # axes, labels, reference lines
GROUND = "#fefefe"  # the paper
ORANGE, DARK, GREY = "#c8500f", "#1f2933", "#6b7682"
BROWN, BLUE, GREEN, PURPLE = "#7a3212", "#1261dc", "#0b8457", "#8a21a8"

COLORS = {  # what has a colour of its own, in every chapter
    "LoRA": ORANGE,  # and whatever else is trained
    "full": DARK,
    "base": GREY,  # frozen, before training, the head alone
    "peft": BLUE,
    "random": PURPLE,
    "other": GREEN,
    "LoRA r=1": BROWN,
}
MARKERS = {"LoRA": "o", "full": "s", "base": "D", "LoRA r=1": "^", "peft": "v"}

WIDE = 5.2  # inches: the text of a panel this wide can be read on a phone


def use_style():
    """Set the book's style for all figures drawn after it.

    In a notebook they are SVG, with text as text, and the same bytes each time."""
    if get_ipython() is not None:
        set_matplotlib_formats("svg", metadata={"Date": None, "Creator": None})
    matplotlib.rcParams.update(
        {
            "figure.figsize": (WIDE, 3.2),
            "figure.dpi": 110,
            "figure.facecolor": GROUND,
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "auto",
            "savefig.transparent": False,
            "axes.facecolor": "none",
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": matplotlib.cycler(color=list(COLORS.values())),
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": INK,
            "grid.alpha": 0.2,
            "grid.linewidth": 0.7,
            "xtick.color": INK,
            "ytick.color": INK,
            "text.color": INK,
            "font.size": 11,
            "xtick.labelsize": 10.5,
            "ytick.labelsize": 10.5,
            "legend.fontsize": 10.5,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "lines.markersize": 5.5,
            "hatch.color": INK,
            "svg.fonttype": "none",
            "svg.hashsalt": "peftlab",
        }
    )


def axes(xlabel="", ylabel="", columns=1, rows=1, **options):
    """A figure's axes in the book's style, labelled, units and all.

    Args:
        xlabel, ylabel: what the axes show, with the unit.
        columns: panels side by side.
        rows: panels one above the other; they share their x axis.
        options: what `plt.subplots` takes: figsize, sharex, sharey.

    Returns:
        One `Axes`, or an array of them, one for each panel.
    """
    use_style()
    if columns > 1:
        options.setdefault("figsize", (3.7 * columns, 3.3))
    elif rows > 1:
        options.setdefault("figsize", (WIDE, 0.4 + 2.1 * rows))
        options.setdefault("sharex", True)
    _, panels = plt.subplots(rows, columns, **options)
    for one in [panels] if rows * columns == 1 else panels.flat:
        one.set(xlabel=xlabel, ylabel=ylabel)
        if rows > 1 and options.get("sharex"):
            one.label_outer(remove_inner_ticks=False)
        if columns > 1:  # each panel reads on its own where they are stacked
            one.tick_params(labelleft=True)
    return panels


def band(ax, x, runs, label, color=None, marker=None, **options):
    """Mean of `runs` over seeds as a curve, lowest to highest as a band.

    Args:
        x: (points,), where the runs were made.
        runs: (points, seeds), a value for each point and seed.
        label: the curve's name; a name in `COLORS` brings its colour and marker.
        options: what `ax.plot` takes, such as linestyle.

    Returns:
        The curve, a matplotlib `Line2D`.
    """
    mean = [sum(row) / len(row) for row in runs]
    options["color"] = color or COLORS.get(label)
    options["marker"] = marker or MARKERS.get(label, "o")
    (curve,) = ax.plot(x, mean, label=label, **options)
    lowest, highest = [min(row) for row in runs], [max(row) for row in runs]
    ax.fill_between(x, lowest, highest, alpha=0.2, lw=0, color=curve.get_color())
    return curve


def legend(ax, ncols=None, title=None):
    """The names of the curves above the panels, where they hide nothing.

    Args:
        ax: the axes, or the array of them that `axes` returned: one legend for all.
        ncols: names in a row; None: as many as fit.
        title: what the names are, in a few words.

    Returns:
        matplotlib's `Legend`.
    """
    panels = [ax] if isinstance(ax, plt.Axes) else list(ax.flat)
    figure, named = panels[0].figure, {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if ncols is None:  # inches: a handle with its gaps 0.55, a letter 0.088
        wide = [0.55 + 0.088 * len(label) for label in named]
        fit = min(WIDE, figure.get_figwidth()) / max(wide)
        rows = 1 if sum(wide) < WIDE else math.ceil(len(named) / max(1, int(fit)))
        ncols = math.ceil(len(named) / rows)
    return figure.legend(
        named.values(),
        named.keys(),
        loc="outside upper left",
        ncols=ncols,
        title=title,
        alignment="left",
        columnspacing=1.4,
        handlelength=1.6,
    )
