"""The stored figures: what chapters and sweeps measured, one JSON file for each of
them.

`book/results/NAME.json` holds, for a chapter or a sweep, the machine and versions and
`figures`, each with a tolerance: how far a fresh run may differ and still bear the text
out. A figure quoted in prose is bound to its key, `0.94<!-- full.finnish -->`, and a
test compares the two. Chapters run for the tests write to a scratch folder instead,
which is then compared with the stored one. Run by a reader they write nothing."""

import json
import os
from pathlib import Path

import peftlab
from peftlab.kit import measure

_PACKAGE = Path(peftlab.__file__).parent
_CHECKOUT = _PACKAGE.parent / "book" / "results"
FOLDER = _CHECKOUT if _CHECKOUT.is_dir() else _PACKAGE / "results"


def load(name, folder=None):
    """What is stored under a name, e.g. "02_lora" or "sweep", as a dict.

    Raises ValueError, with the names that exist, for an unknown one."""
    path = Path(folder or FOLDER) / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.json")))
        raise ValueError(f"no stored results {name!r}; there are: {there or 'none'}")
    return json.loads(path.read_text(encoding="utf8"))


def save(name, content, folder=None):
    """Write a results file whole or not at all."""
    path = Path(folder or FOLDER) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(
        json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf8"
    )
    fresh.replace(path)


class Figures:
    """A chapter's figures: `figures = Figures("02_lora")`, `figures.keep("loss", 0.1,
    0.05)`.

    Written to the folder in the variable PEFTLAB_RESULTS; nowhere if it is not set."""

    def __init__(self, name):
        self.name, self.kept = name, {}
        self.folder = os.environ.get("PEFTLAB_RESULTS")

    def keep(self, key, value, tolerance):
        """Keep one number under a key, with its tolerance; returns the number."""
        if not tolerance >= 0:
            raise ValueError(
                f"{key}: the tolerance must be 0 or more, not {tolerance!r}"
            )
        self.kept[key] = dict(value=float(value), tolerance=tolerance)
        if self.folder:
            content = dict(machine=measure.machine(), figures=self.kept)
            save(self.name, content, self.folder)
        return value


def where(runs, **fixed):
    """The runs of a sweep whose settings are those given, in order of their seeds."""
    same = [r for r in runs if all(r[k] == v for k, v in fixed.items())]
    return sorted(same, key=lambda r: r["seed"])


def share(bits):
    """Share of ones in a string such as "0111", one character for each test record."""
    return bits.count("1") / len(bits)


def shares(runs, key):
    """The share of ones under `key`, a list with one number for each run (seed)."""
    return [share(run[key]) for run in runs]


def table(runs, key):
    """Right or wrong as a list of rows, (seeds, records), for `measure.interval`."""
    return [[c == "1" for c in run[key]] for run in runs]
