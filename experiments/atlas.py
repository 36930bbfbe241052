"""The atlas's figures: one more sweep (attention against MLP) and the others' means.

Attention at r=12 and MLP at r=7 have the same number of parameters on tiny-decoder, 43,008. Run
`finnish`, `six_languages` and `step_time` first. Some five minutes on two cores.
"""

from experiments.common import best_rate, store, sweep
from experiments.six_languages import SEEDS, one_rate
from peftlab.kit import measure, results
from peftlab.kit.results import shares, table, where

RATES = {"attention r=12": (3e-3, 1e-2, 3e-2), "MLP r=7": (3e-3, 1e-2, 3e-2)}


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def compare(figures, name, ours, theirs, key):
    """Keep both means, their difference and its 95% interval under NAME.KEY."""
    gap, low, high = measure.interval(table(ours, key), table(theirs, key))
    parts = dict(a=mean(shares(ours, key)), b=mean(shares(theirs, key)))
    for part, value in (parts | dict(gap=gap, low=low, high=high)).items():
        figures[f"{name}.{key}.{part}"] = dict(value=value, tolerance=0.0)


def derive(runs, best):
    """All figures of the atlas, as {key: {value, tolerance}}."""
    finnish, six = results.load("finnish"), results.load("six_languages")
    figures = {}

    def keep(key, value):
        figures[key] = dict(value=value, tolerance=0.0)

    at_best = {
        m: where(finnish["runs"], method=m, lr=lr) for m, lr in finnish["best"].items()
    }
    changes = {
        (m, replay): where(finnish["changes"], method=m, replay=replay)
        for m in finnish["best"]
        for replay in (0.0, 0.25)
    }
    at_six = {m: where(six["runs"], method=m, lr=lr) for m, lr in six["best"].items()}
    full = changes["full", 0.0]
    for key in ("rank90", "rank90_random"):
        keep(key, mean(mean(r[key].values()) for r in full))
    keep("whole", mean(shares(full, "learned")))
    for rank in ("1", "4", "8", "16"):
        keep(f"truncated.{rank}", mean(r["truncated"][rank] for r in full))
    for m in ("full", "LoRA r=1", "LoRA r=8"):
        keep(f"rate.{m}", finnish["best"][m])
        keep(
            f"intruders.{m}",
            mean(mean(r["intruders"].values()) for r in changes[m, 0.0]),
        )
    for key in ("learned", "base", "refuse"):
        compare(figures, "finnish.8", at_best["LoRA r=8"], at_best["full"], key)
        for m in ("full", "LoRA r=8"):
            compare(figures, f"replay.{m}", changes[m, 0.25], changes[m, 0.0], key)
        replayed = changes["LoRA r=8", 0.25], changes["full", 0.25]
        compare(figures, "replayed.8", *replayed, key)
    compare(
        figures, "long.1", changes["LoRA r=1", 0.0], changes["LoRA r=8", 0.0], "learned"
    )
    for r in ("1", "8"):
        compare(figures, f"six.{r}", at_six[f"LoRA r={r}"], at_six["full"], "learned")
    compare(figures, "six.1v8", at_six["LoRA r=1"], at_six["LoRA r=8"], "learned")
    parts = [where(runs, method=m, lr=best[m]) for m in ("MLP r=7", "attention r=12")]
    compare(figures, "mlp", *parts, "learned")
    return figures


def main():
    jobs = [(m, lr, seed) for m in RATES for lr in RATES[m] for seed in SEEDS]
    runs = sweep(one_rate, jobs, "attention against MLP")
    best = {m: best_rate(runs, m) for m in RATES}
    store("atlas", runs, best=best, figures=derive(runs, best))


if __name__ == "__main__":
    main()
