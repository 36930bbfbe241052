"""Sixteen levels over the weights that they store: play with type and block size.

The page quantizes 16,384 weights itself, in JavaScript, whenever something is chosen:
`nf4_explorer.js` has the arithmetic of `nf4.quantize`, to the bit. What stands here is
its twin in Python, which fills a plain table for readers without JavaScript, and which
the tests compare with the page. Nothing is fetched.

    nf4_explorer.show()    # in a notebook
"""

import json
import math
from base64 import b64encode
from pathlib import Path

import numpy as np
import torch
from IPython.display import HTML

from peftlab import nf4
from peftlab.kit import base_models

COUNT = 16_384
SIZES = [2**k for k in range(4, 13)]  # of a block
OUTLIERS = [4, 8, 16, 32]  # standard deviations
SEEDS = [2305, 14314]
ROUNDS = 100  # of Lloyd's algorithm
LAYER = "encoder.layer.3.intermediate.dense.weight"

TYPES = {"NF4": nf4.NF4, "FP4": nf4.FP4, "INT4": nf4.INT4}
BEST = "Lloyd's best"
DISTRIBUTIONS = {  # and what each is called in the menu
    "normal": "normal",
    "uniform": "uniform",
    "minilm": "a MiniLM layer",
    "outlier": "one outlier",
}
SHOWN = [64, 256, 1024, 4096]  # columns of the table

SCRIPT = Path(__file__).with_suffix(".js")
STYLE = """
.nf4-explorer { --hue: var(--fig-blue, #1261dc); }
.nf4-explorer[data-type="FP4"] { --hue: var(--fig-purple, #8a21a8); }
.nf4-explorer[data-type="INT4"] { --hue: var(--fig-green, #0b8457); }
.nf4-explorer[data-type^="Lloyd"] { --hue: var(--fig-orange, #c8500f); }
.nf4-explorer [hidden] { display: none; }
.nf4-controls, .nf4-drawings { display: grid; gap: 0.5rem 1.2rem; }
.nf4-controls { grid-template-columns: repeat(auto-fit, minmax(min(9rem, 100%), 1fr)); }
.nf4-drawings {
  grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
.nf4-explorer label { display: block; margin: 0; font-size: 0.9rem; }
.nf4-explorer :is(select, input) { display: block; box-sizing: border-box;
  width: 100%; margin: 0.15rem 0 0; font: inherit; }
.nf4-explorer input { height: 1.9rem; accent-color: var(--fig-ink, #4a5561); }
.nf4-explorer select { height: 1.9rem; padding: 0 0.3rem; border: 1px solid;
  border-radius: 0.3rem; background: transparent; color: inherit; }
.nf4-explorer option { background: #fefefe; color: #1f2933; }
.nf4-explorer :is(select, input):focus-visible { outline: 3px solid;
  outline-offset: 2px; }
.nf4-explorer [role="status"] { min-height: 3em; margin: 0.7rem 0 0.4rem; }
.nf4-explorer .nf4-note { margin: 0.4rem 0; font-size: 0.82rem;
  overflow-wrap: anywhere; }
.nf4-explorer svg { display: block; width: 100%; }
.nf4-explorer svg text { fill: currentColor; font-size: 11px; }
.nf4-explorer svg text.other { fill: var(--fig-grey, #6b7682); }
.nf4-explorer svg .hue { fill: var(--hue); }
.nf4-explorer svg text.hue { font-weight: 600; }
.nf4-explorer svg line { stroke: currentColor; opacity: 0.25; }
.nf4-explorer svg line.equal { opacity: 0.7; stroke-dasharray: 3 3; }
.nf4-explorer svg line.here { stroke: var(--hue); opacity: 0.6; }
.nf4-explorer rect.weights { fill: var(--fig-grey, #6b7682); opacity: 0.6; }
.nf4-explorer polyline { fill: none; stroke: var(--fig-grey, #6b7682);
  stroke-width: 1.3; }
.nf4-explorer polyline.chosen { stroke: var(--hue); stroke-width: 3; }
.nf4-explorer table { width: 100%; font-size: 0.85rem; }
.nf4-explorer :is(td, tr > th) { padding: 0.1rem 0.3rem; text-align: right; }
.nf4-explorer th.group { padding-top: 0.6rem; text-align: left; }
"""


def show():
    """Controls, two drawings and a table: levels over weights, error and bits.

    Returns:
        An IPython `HTML` object.

    Raises:
        ValueError: MiniLM is not to be had, as `base_models.load_minilm` says.
    """
    layer = weights("minilm").bfloat16().view(torch.int16).numpy()
    data = dict(
        count=COUNT,
        sizes=SIZES,
        outliers=OUTLIERS,
        seeds=SEEDS,
        rounds=ROUNDS,
        best=BEST,
        codes={name: code.tolist() for name, code in TYPES.items()},
        layer=b64encode(layer.astype("<i2").tobytes()).decode(),
    )
    options = "".join(
        f'<option value="{key}">{name}</option>' for key, name in DISTRIBUTIONS.items()
    )
    types = "".join(f"<option>{name}</option>" for name in [*TYPES, BEST])

    return HTML(
        f"""<div class="nf4-explorer">
<style>{STYLE}</style>
<div class="nf4-live" hidden>
<div class="nf4-controls">
<label>Weights <select>{options}</select></label>
<label>Type <select>{types}</select></label>
<label>Block size: <span></span>
<input type="range" max="{len(SIZES) - 1}" value="{SIZES.index(64)}"></label>
<label hidden>Outlier: <span></span>
<input type="range" max="{len(OUTLIERS) - 1}" value="{OUTLIERS.index(16)}"></label>
</div>
<p role="status"></p>
<div class="nf4-drawings">
<svg role="img" viewBox="0 0 360 230"></svg>
<svg role="img" viewBox="0 0 360 230"></svg>
</div>
</div>
<p class="nf4-note">{COUNT:,} weights, drawn at random or the first of MiniLM's
<code>{LAYER}</code> in bfloat16 (<a href="https://huggingface.co/\
sentence-transformers/all-MiniLM-L6-v2">all-MiniLM-L6-v2</a>, Apache 2.0).
{BEST}: the sixteen values that Lloyd's algorithm fits to these very weights, in blocks
of this very size.</p>
<details open><summary>Relative RMS errors in a table</summary>
<table>
{chr(10).join(_rows())}
</table>
</details>
<script type="application/json">{json.dumps(data)}</script>
<script>{SCRIPT.read_text("utf8")}</script>
</div>"""
    )


def _rows():
    """The table's rows: bits a weight, then an error for each distribution and type."""
    heads = "".join(f'<th scope="col">{size}</th>' for size in SHOWN)
    yield f'<tr><th scope="col">block size</th>{heads}</tr>'
    cells = "".join(f"<td>{4 + 32 / size:.3f}</td>" for size in SHOWN)
    yield f'<tr><th scope="row">bits a weight</th>{cells}</tr>'

    for key, name in DISTRIBUTIONS.items():
        if key == "outlier":
            name = "normal with one outlier of 16 standard deviations"
        span = f'class="group" colspan="{len(SHOWN) + 1}"'
        yield f'<tr><th {span} scope="rowgroup">{name}</th></tr>'

        x = weights(key)
        for kind in [*TYPES, BEST]:
            found = [errors(x, size, code(kind, x, size))[0] for size in SHOWN]
            cells = "".join(f"<td>{error:.4f}</td>" for error in found)
            yield f'<tr><th scope="row">{kind}</th>{cells}</tr>'


def weights(distribution, outlier=16):
    """The weights that the page has under this name.

    Args:
        distribution: a key of `DISTRIBUTIONS`.
        outlier: the size of the one outlier, in standard deviations.

    Returns:
        (16384,) float32.
    """
    if distribution == "minilm":
        model, _ = base_models.load_minilm("cpu")
        layer = model.get_parameter(LAYER).detach()
        return layer.flatten()[:COUNT].bfloat16().float()

    u, v = (_random(seed) for seed in SEEDS)
    if distribution == "uniform":
        return torch.tensor([2 * a - 1 for a in u])

    pairs = zip(u, v, strict=True)  # by the method of Box and Muller
    x = [math.sqrt(-2 * math.log(a)) * math.cos(2 * math.pi * b) for a, b in pairs]
    x = torch.tensor(x)
    if distribution == "outlier":
        x[COUNT // 3] = outlier
    return x


def _random(state):
    """Numbers between 0 and 1 by Lehmer's generator, the same in every language."""
    numbers = []
    for _ in range(COUNT):
        state = state * 48271 % 2147483647
        numbers.append(state / 2147483647)
    return numbers


def code(kind, x, size):
    """The sixteen values of a type; Lloyd's are fitted to x in blocks of this size."""
    return lloyd(x, size) if kind == BEST else TYPES[kind]


def lloyd(x, size):
    """Sixteen values with a small squared error for x, by Lloyd's algorithm from NF4.

    In each round every divided weight goes to the nearest value, and every value moves
    to the mean of its weights. In that mean a weight counts by its block's absmax
    squared, as its error does.

    Args:
        x: (n,) float32, in whole blocks.
        size: how many weights share an absmax.

    Returns:
        (16,) float32. The largest magnitude need not be 1.
    """
    rows = x.view(-1, size)
    absmax = rows.abs().amax(1, keepdim=True)
    divided = (rows * (1 / absmax.clamp(nf4.TINY))).flatten().double().numpy()
    order = np.argsort(divided, kind="stable")
    divided = divided[order]
    counts = (absmax.double() ** 2).expand_as(rows).flatten().numpy()[order]

    # sums over the weights in front of each place: a value's weights are neighbours
    mass = np.concatenate([[0], np.cumsum(counts)])
    moment = np.concatenate([[0], np.cumsum(counts * divided)])
    values = nf4.NF4.double().numpy()
    for _ in range(ROUNDS):
        midpoints = (values[1:] + values[:-1]) / 2
        ends = np.searchsorted(divided, midpoints, side="right")
        ends = np.concatenate([[0], ends, [len(divided)]])
        own = np.diff(mass[ends])
        means = np.diff(moment[ends]) / np.where(own > 0, own, 1)
        values = np.where(own > 0, means, values)
    return torch.from_numpy(values).float()


def errors(x, size, code):
    """What is lost when x is stored, over the root mean square of x.

    Returns:
        The root mean square of the error and its largest magnitude, as floats.
    """
    indices, absmax = nf4._nearest(x, size, code)  # which takes Lloyd's values too
    stored = code[indices.long()].view(-1, size) * absmax[:, None]
    lost = stored.flatten()[: len(x)].double() - x.double()
    scale = x.double().square().mean().sqrt()
    rms = lost.square().mean().sqrt() / scale
    return rms.item(), (lost.abs().max() / scale).item()
