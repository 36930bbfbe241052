"""The atlas's figures: one more sweep, on six languages, and the other sweeps' means.

Attention at r=12 and MLP at r=7 have the same number of parameters on tiny-decoder,
43,008. Run `finnish`, `six_languages` and `bench` first. Some five minutes on two
cores. Gradients are not clipped."""

from experiments.common import best_rate, scores, store, sweep, tune
from experiments.sweeps.six_languages import SEEDS, one_rate
from peftlab.kit import measure, plot, results
from peftlab.kit.data import HELD_BACK
from peftlab.kit.results import shares, table, where
from tools.figures import refresh_pages, save_picture

RATES = {
    "attention r=12": (3e-3, 1e-2, 3e-2),
    "MLP r=7": (3e-3, 1e-2, 3e-2),
    "LoRA r=32": (1e-3, 3e-3, 1e-2),
}


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def compare(figures, name, ours, theirs, key):
    """Keep both means, their difference and its 95% interval under NAME.KEY."""
    gap, low, high = measure.interval(table(ours, key), table(theirs, key))
    parts = dict(a=mean(shares(ours, key)), b=mean(shares(theirs, key)))
    for part, value in (parts | dict(gap=gap, low=low, high=high)).items():
        figures[f"{name}.{key}.{part}"] = dict(value=value, tolerance=0.0)


def longer(job):
    method, lr, seed = job
    model, tokenizer = tune(list(HELD_BACK), method, lr, seed, steps=600)
    bits = scores(model, tokenizer, list(HELD_BACK), 420)
    return dict(method=method, lr=lr, seed=seed, **bits)


def derive(runs, best, long):
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
    compare(figures, "six.1", at_six["LoRA r=1"], at_six["full"], "learned")
    for key in ("learned", "base", "refuse"):
        compare(figures, "six.8", at_six["LoRA r=8"], at_six["full"], key)
    slower = where(six["runs"], method="full", lr=1e-3)
    keep("six.full.slower.learned", mean(shares(slower, "learned")))
    keep("six.full.slower.base", mean(shares(slower, "base")))
    slower = where(finnish["runs"], method="full", lr=1e-3)
    keep("finnish.full.slower.learned", mean(shares(slower, "learned")))
    keep("finnish.full.slower.base", mean(shares(slower, "base")))
    for m, lr in (("full", 1e-4), ("LoRA r=8", 1e-3)):
        gentle = where(finnish["gentle"], method=m, lr=lr)
        keep(f"gentle.{m}.learned", mean(shares(gentle, "learned")))
        keep(f"gentle.{m}.base", mean(shares(gentle, "base")))
        keep(f"gentle.{m}.change", mean(run["change"] for run in gentle))
    compare(figures, "six.1v8", at_six["LoRA r=1"], at_six["LoRA r=8"], "learned")
    parts = [where(runs, method=m, lr=best[m]) for m in ("MLP r=7", "attention r=12")]
    compare(figures, "mlp", *parts, "learned")
    wide = where(runs, method="LoRA r=32", lr=best["LoRA r=32"])
    compare(figures, "six.32", wide, at_six["full"], "learned")
    compare(figures, "six.32v8", wide, at_six["LoRA r=8"], "learned")
    thrice = [where(long, method=m) for m in ("LoRA r=8", "full")]
    compare(figures, "six.600", *thrice, "learned")
    return figures


def draw():
    """The start page's figure: what is learnt against what is retained, by
    learning rate."""
    finnish = results.load("finnish")
    ax = plot.axes("learned: Finnish dates (exact match)", "retained: base dates")
    for method in ("full", "LoRA r=8"):
        rates = sorted({r["lr"] for r in finnish["runs"] if r["method"] == method})
        rows = [where(finnish["runs"], method=method, lr=lr) for lr in rates]
        points = [(mean(shares(r, "learned")), mean(shares(r, "base"))) for r in rows]
        top = max(range(len(points)), key=lambda i: points[i][0])
        x, y = zip(*points[: top + 1], strict=True)  # beyond the best rate both fall
        name = method.removesuffix(" r=8")
        look = dict(color=plot.COLORS[name])
        label = "full fine-tuning" if method == "full" else method
        ax.plot(x, y, plot.MARKERS[name] + "-", label=label, **look)
        replay = where(finnish["changes"], method=method, replay=0.25)
        at = mean(shares(replay, "learned")), mean(shares(replay, "base"))
        ax.plot(*at, "*", ms=14, **look)
    ax.plot([], [], "*", ms=11, color=plot.INK, label="a quarter of replay")
    ax.set(xlim=(0, 1.02), ylim=(0, 1.05))
    plot.legend(ax)
    save_picture(ax.figure, "learn_forget.svg")


def main():
    jobs = [(m, lr, seed) for m in RATES for lr in RATES[m] for seed in SEEDS]
    runs = sweep(one_rate, jobs, "attention, MLP and rank 32")
    best = {m: best_rate(runs, m) for m in RATES}
    rates = results.load("six_languages")["best"]
    jobs = [(m, rates[m], seed) for m in ("full", "LoRA r=8") for seed in SEEDS]
    long = sweep(longer, jobs, "three times the steps")
    store("atlas", runs, best=best, long=long, figures=derive(runs, best, long))
    draw()
    refresh_pages()


if __name__ == "__main__":
    main()
