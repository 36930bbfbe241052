"""How large an outlier int8 bears, and how many, with the threshold and without.

Channels of tiny-decoder's norms are multiplied by s and the columns that read them
divided by it, which leaves the function as it is (`kit.outliers`), then every linear
but the head is computed in int8. Five draws of the channels, those of the sweep
`outliers`; dates in the base languages, 400 test records. Six minutes on two cores."""

import random
import statistics

import torch

from experiments.common import BASES, differences, records, store, sweep
from peftlab import surgery
from peftlab.int8 import Int8Linear, decompose
from peftlab.kit import base_models, measure, outliers
from peftlab.kit.results import share

SIZES = (1, 10, 30, 60, 100, 150, 200, 300, 1000)
COUNTS = (1, 2, 4, 8, 16, 25)  # at once, of the 128 channels
MANY = 200  # the size of each of them
SEEDS = range(5)


class PaperLinear(Int8Linear):
    """Takes the outliers' columns of W from W itself, as the paper does, and not from
    its codes, as the library does. For at most 1,040 inputs, without a bias."""

    def __init__(self, base, threshold=6.0):
        super().__init__(base, threshold)
        self.exact = base.weight

    def forward(self, x):
        rows = x.flatten(0, -2)
        rest, columns = decompose(rows, self.threshold)
        y = rest.codes.float() @ self.codes.float().T
        y = y * (rest.absmax / 127) * (self.absmax.T / 127)
        y += rows[:, columns] @ self.exact[:, columns].T
        return y.view(*x.shape[:-1], -1)


LAYERS = {
    "naive": lambda linear: Int8Linear(linear, threshold=0),
    "threshold": lambda linear: Int8Linear(linear, threshold=6.0),
    "paper": lambda linear: PaperLinear(linear, threshold=6.0),
}


def channels(n, seed):
    """n channels; no two seeds share one of the 128."""
    shuffled = random.Random(0).sample(range(128), 128)
    return sorted(shuffled[seed * n : (seed + 1) * n])


@torch.no_grad()
def one(job):
    """One run: (size, how many, method, seed)."""
    s, n, method, seed = job
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    outliers.scale_channels(model, s, channels(n, seed))
    linears = surgery.select(model, "all-linear")
    surgery.swap(model, {linear: LAYERS[method](linear) for linear in linears})

    asked = records("dates", BASES, 40, "test")
    bits = measure.answered(model, tokenizer, asked)
    run = dict(s=s, n=n, method=method, seed=seed, channels=channels(n, seed))
    return run | dict(dates="".join("01"[bit] for bit in bits))


def jobs():
    sizes = [(s, 1, m) for m in ("naive", "threshold") for s in SIZES]
    counts = [(MANY, n, m) for m in ("threshold", "paper") for n in COUNTS]
    rows = dict.fromkeys([*sizes, *counts])
    return [(*row, seed) for row in rows for seed in SEEDS]


def derive(runs):
    """{method.size.number: mean over the seeds}, with its lowest and highest."""
    shares = {}
    for run in runs:
        key = f"{run['method']}.{run['s']}.{run['n']}"
        shares.setdefault(key, []).append(share(run["dates"]))

    figures = {}
    for key, values in shares.items():
        figures[key] = statistics.mean(values)
        figures[f"{key}.lowest"] = min(values)
        figures[f"{key}.highest"] = max(values)
    for n in COUNTS:
        pair = [shares[f"{m}.{MANY}.{n}"] for m in ("paper", "threshold")]
        figures |= differences(f"paper over threshold.{n}", *pair, mark=".")
    return {key: dict(value=value, tolerance=0.05) for key, value in figures.items()}


def main():
    runs = sweep(one, jobs(), "outlier sizes")
    store("outlier_size", runs, figures=derive(runs), sizes=SIZES, counts=COUNTS)


if __name__ == "__main__":
    main()
