"""A stored sweep to drag through: scaling, rank and learning rate, without a kernel.

The numbers stand in a plain table, and `explore.js` reads them from there. So a reader
without JavaScript, or on a page that allows none, still has them all. The script runs
in the page and fetches nothing.

    explore.rates(results.load("rank_alpha_rate")["runs"])    # in a notebook
"""

from html import escape
from pathlib import Path
from statistics import mean

from IPython.display import HTML

from peftlab.kit import results

SCRIPT = Path(__file__).with_suffix(".js")
STYLE = """
.explore-live { display: grid; gap: 0 1.5rem; align-items: center;
  grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); }
.explore [hidden] { display: none; }
.explore label { display: block; margin: 0; }
.explore :is(select, input) { display: block; width: 100%; margin: 0; font: inherit; }
.explore input { height: 1.7rem; accent-color: var(--fig-orange, #c8500f); }
.explore select { padding: 0.3rem; border: 1px solid; border-radius: 0.3rem;
  background: transparent; color: inherit; }
.explore option { background: #fefefe; color: #1f2933; }
.explore :is(select, input):focus-visible { outline: 3px solid; outline-offset: 2px; }
.explore svg { display: block; width: 100%; margin-top: 0.6rem; }
.explore p { margin: 0 0 0.6rem; }
.explore svg text { fill: currentColor; font-size: 11px; }
.explore svg line { stroke: currentColor; opacity: 0.25; }
.explore polyline { fill: none; stroke: var(--fig-grey, #6b7682); stroke-width: 1.3; }
.explore svg .chosen { stroke: var(--fig-orange, #c8500f); stroke-width: 3;
  opacity: 1; }
.explore circle { fill: var(--fig-orange, #c8500f); }
.explore table { width: 100%; font-size: 0.9rem; }
.explore td, .explore tr > th { padding: 0.1rem 0.3rem; text-align: right; }
.explore th.scaling { padding-top: 0.6rem; text-align: left; }
"""


def rates(runs, key="learned", start=("alpha = 2r", 16, 0.01)):
    """Controls, a drawing and a table for runs at several scalings, ranks and rates.

    Args:
        runs: dicts with `scaling`, `r`, `alpha`, `lr`, `seed`, `change` and, under
            `key`, a bit for each test record; every combination with every seed.
        key: what is shown, as the share of ones.
        start: the scaling, the rank and the learning rate that are shown first.

    Returns:
        An IPython `HTML` object.

    Raises:
        ValueError: a combination has no run.
    """
    scalings = list(dict.fromkeys(run["scaling"] for run in runs))
    ranks = sorted({run["r"] for run in runs})
    steps = sorted({run["lr"] for run in runs})
    heads = "".join(f'<th scope="col">{lr:g}</th>' for lr in steps)
    rows = [f'<tr><th scope="col">rank</th>{heads}</tr>']
    for scaling in scalings:
        span = f'class="scaling" colspan="{len(steps) + 1}"'
        rows.append(f'<tr><th {span} scope="rowgroup">{escape(scaling)}</th></tr>')
        for r in ranks:
            cells = "".join(_cell(runs, scaling, r, lr, key) for lr in steps)
            rows.append(f'<tr><th scope="row">{r}</th>{cells}</tr>')
    first = [scalings.index(start[0]), ranks.index(start[1]), steps.index(start[2])]
    names = "".join(f"<option>{escape(scaling)}</option>" for scaling in scalings)

    return HTML(
        f"""<div class="explore" data-start="{first}">
<style>{STYLE}</style>
<div class="explore-live" hidden>
<div>
<label>Scaling <select>{names}</select></label>
<label>Rank: <span></span><input type="range" max="{len(ranks) - 1}"></label>
<label>Learning rate: <span></span><input type="range" max="{len(steps) - 1}"></label>
<p role="status"></p>
</div>
<svg role="img" viewBox="0 0 360 190"></svg>
</div>
<details open><summary>All the numbers</summary>
<table>
{chr(10).join(rows)}
</table>
</details>
<script>{SCRIPT.read_text("utf8")}</script>
</div>"""
    )


def _cell(runs, scaling, r, lr, key):
    """The table's entry: the mean over the seeds, and what else the script says."""
    same = results.where(runs, scaling=scaling, r=r, lr=lr)
    if not same:
        raise ValueError(f"no run at {scaling}, rank {r}, learning rate {lr:g}")

    shares = results.shares(same, key)
    more = dict(low=min(shares), high=max(shares))
    more["change"] = mean(run["change"] for run in same)
    data = "".join(f' data-{name}="{value:.2f}"' for name, value in more.items())
    return f'<td data-alpha="{same[0]["alpha"]}"{data}>{mean(shares):.2f}</td>'
