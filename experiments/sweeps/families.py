"""Every method of the book on one new language: does it learn?

Finnish dates, 200 steps of 16, each method at its own learning rate: a sweep half a
decade apart, two seeds a rate (five for full fine-tuning, which the others are measured
against), scored on dev records, widened until the best rate is inside it; then five
seeds at that rate, scored on test records, against the frozen base. Gradients are not
clipped.

Prompt tuning is another question: a prompt cannot teach a language, so it is asked to
stand in for an instruction, "fr: 2026-03-12 = 12 mars 2026" without its "fr:", and the
same in Finnish, which the base does not know. Some forty minutes on two cores."""

import dataclasses
import functools

import torch

from experiments.common import scores, store, sweep
from peftlab import (
    adapter,
    bitfit,
    dora,
    ia3,
    lora,
    lora_plus,
    pissa,
    prefix,
    prompt,
    vera,
)
from peftlab.kit import base_models, data, measure, plot, results
from peftlab.kit.results import share, shares, table, where
from peftlab.kit.train import train
from tools.figures import refresh_pages, save_picture

LADDER = [float(f"{digit}e{power}") for power in range(-6, 3) for digit in (1, 3)]
ALL, KEYS = "all-linear", ["k_proj", "v_proj"]
METHODS = {  # {name: (how it is added, the learning rates to start from)}
    "full": (lambda m: m, (3e-4, 1e-3, 3e-3, 1e-2)),
    "LoRA": (lambda m: lora.add(m, ALL, r=8, alpha=16), (1e-3, 3e-3, 1e-2, 3e-2)),
    "LoRA+": (lambda m: lora.add(m, ALL, r=8, alpha=16), (3e-4, 1e-3, 3e-3, 1e-2)),
    "DoRA": (lambda m: dora.add(m, ALL, r=8, alpha=16), (1e-3, 3e-3, 1e-2, 3e-2)),
    "PiSSA": (lambda m: pissa.add(m, ALL, r=8), (3e-4, 1e-3, 3e-3, 1e-2)),
    "VeRA": (lambda m: vera.add(m, ALL, r=128), (1e-2, 3e-2, 1e-1, 3e-1)),
    "adapter, Houlsby": (
        lambda m: adapter.add(m, "houlsby", bottleneck=32),
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "adapter, Pfeiffer": (
        lambda m: adapter.add(m, "pfeiffer", bottleneck=64),
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "adapter, parallel": (
        lambda m: adapter.add(m, "parallel", bottleneck=64),
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "IA3": (lambda m: ia3.add(m, KEYS, ["down_proj"]), (1e-2, 3e-2, 1e-1, 3e-1)),
    "BitFit": (lambda m: bitfit.add(m, create=True), (1e-2, 3e-2, 1e-1, 3e-1)),
    "norms": (bitfit.add_norms, (1e-2, 3e-2, 1e-1, 3e-1)),
    "prefix": (lambda m: prefix.add(m, 16), (1e-2, 3e-2, 1e-1, 3e-1)),
    "prefix, MLP": (
        lambda m: prefix.add(m, 16, hidden=128),
        (3e-4, 1e-3, 3e-3, 1e-2),
    ),
}
PROMPTS = {"prompt, French": "fr", "prompt, Finnish": "fi"}  # {name: language}
TOKENS, PROMPT_RATES = 4, (1e-2, 3e-2, 1e-1, 3e-1)
SEEDS, STEPS, BATCH = range(5), 200, 16
TUNED_ON = {"full": SEEDS}  # {name: seeds a rate}; two for the others


def rendered(language, n, split, seed=0):
    """Dates to be written out in a language that nothing in the prompt names."""
    records = data.records("render", language, n, split, seed)
    mute = (r.text.removeprefix(f"{language}: ") for r in records)
    return [dataclasses.replace(r, text=t) for r, t in zip(records, mute, strict=True)]


def bits(model, tokenizer, records):
    return "".join("01"[x] for x in measure.answered(model, tokenizer, records))


def one(job):
    """One run: (name, rate, seed, whether to score on test records)."""
    name, lr, seed, test = job
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(seed)
    language = PROMPTS.get(name, "fi")
    make = functools.partial(rendered if name in PROMPTS else dates, language)
    if name in PROMPTS:
        model = prompt.add(model, TOKENS)
    else:
        model = METHODS[name][0](model)
    groups = lora_plus.parameter_groups(model, lr) if name == "LoRA+" else None
    trainable, _ = measure.parameters(model)
    options = dict(progress=False, groups=groups, max_grad_norm=None)
    train(
        model, tokenizer, make(3600, "train", seed), STEPS, lr, BATCH, seed, **options
    )
    run = dict(method=name, lr=lr, seed=seed, trainable=trainable)
    if not test:
        return run | dict(dev=bits(model, tokenizer, make(180, "dev")))
    if name in PROMPTS:
        return run | dict(learned=bits(model, tokenizer, make(400, "test")))
    return run | scores(model, tokenizer, ["fi"], 400)


def dates(language, n, split, seed=0):
    return data.records("dates", language, n, split, seed)


def best_rates(names):
    """Sweep all methods, widening each one's rates until the best is inside them."""
    grids = {n: METHODS[n][1] if n in METHODS else PROMPT_RATES for n in names}
    runs, todo = [], {n: list(rates) for n, rates in grids.items()}
    while todo:
        jobs = [
            (n, lr, seed, False)
            for n in todo
            for lr in todo[n]
            for seed in TUNED_ON.get(n, (0, 1))
        ]
        runs += sweep(one, jobs, "learning rates")
        best, todo = {n: _best(runs, n) for n in grids}, {}
        for n, lr in best.items():
            tried = sorted({r["lr"] for r in runs if r["method"] == n})
            if lr in (tried[0], tried[-1]) and share_at(runs, n, lr) > 0:
                todo[n] = [LADDER[LADDER.index(lr) + (1 if lr == tried[-1] else -1)]]
    return best, runs


def share_at(runs, name, lr):
    rows = where(runs, method=name, lr=lr)
    return sum(share(r["dev"]) for r in rows) / len(rows)


def _best(runs, name):
    rates = sorted({r["lr"] for r in runs if r["method"] == name})
    return max(rates, key=lambda lr: share_at(runs, name, lr))


def derive(runs, frozen):
    """What the pages quote: each method's mean, gain over the frozen base and gap to
    LoRA, and their intervals by a paired bootstrap over seeds and records."""
    figures = {"frozen.base": dict(value=share(frozen["base"]), tolerance=0.05)}
    for name in dict.fromkeys(r["method"] for r in runs):
        mine = where(runs, method=name)
        base = [[c == "1" for c in frozen[name]]] * len(mine)
        gain, low, high = measure.interval(table(mine, "learned"), base)
        found = dict(gain=gain, low=low, high=high, trainable=mine[0]["trainable"])
        found |= dict(learned=sum(share(r["learned"]) for r in mine) / len(mine))
        found |= dict(frozen=share(frozen[name]), rate=mine[0]["lr"])
        seeds = shares(mine, "learned")
        found |= dict(lowest=min(seeds), highest=max(seeds))
        if name in METHODS:
            lora_runs = table(where(runs, method="LoRA"), "learned")
            gap, *ends = measure.interval(table(mine, "learned"), lora_runs)
            found |= dict(gap=gap, gap_low=ends[0], gap_high=ends[1])
            found |= dict(base=sum(share(r["base"]) for r in mine) / len(mine))
            found |= dict(refuse=sum(share(r["refuse"]) for r in mine) / len(mine))
        figures |= {
            f"{name}.{key}": dict(value=value, tolerance=0.05)
            for key, value in found.items()
        }
    return figures


def draw():
    """What each method learns and what it retains, a mark a seed, the best on top."""
    runs = results.load("families")["runs"]
    names = {r["method"]: r["trainable"] for r in runs if r["method"] in METHODS}
    mean = {n: sum(shares(where(runs, method=n), "learned")) for n in names}
    order = sorted(names, key=mean.get)
    ax = plot.axes("exact match", figsize=(plot.WIDE, 5.4))
    looks = {
        "learned": (plot.ORANGE, "o", 0.17, "learned: Finnish dates"),
        "base": (plot.BLUE, "D", -0.17, "retained: base dates"),
    }
    for key, (color, mark, up, label) in looks.items():
        for y, name in enumerate(order):
            x = shares(where(runs, method=name), key)
            dark = name == "full" and key == "learned"
            look = dict(color=plot.DARK if dark else color)
            ax.plot(x, [y + up] * len(x), mark, ms=3.5, alpha=0.6, **look)
            ax.plot(sum(x) / len(x), y + up, "|", ms=10, mew=2, **look)
        ax.plot([], [], mark, color=color, label=label)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(order) - 0.4), yticks=range(len(order)))
    ax.set_yticklabels([f"{name}  {names[name]:,}" for name in order])
    plot.legend(ax)
    save_picture(ax.figure, "families.svg")


def main():
    names = [*METHODS, *PROMPTS]
    best, tried = best_rates(names)
    jobs = [(name, best[name], seed, True) for name in names for seed in SEEDS]
    runs = sweep(one, jobs, "five seeds at the best rate")
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    untold = {
        n: bits(model, tokenizer, rendered(at, 400, "test"))
        for n, at in PROMPTS.items()
    }
    known = bits(model, tokenizer, dates("fi", 400, "test"))
    frozen = {name: untold.get(name, known) for name in names}
    frozen["base"] = scores(model, tokenizer, ["fi"], 400)["base"]
    setting = dict(steps=STEPS, batch=BATCH, tokens=TOKENS, language="fi")
    more = dict(best=best, rates=tried, frozen=frozen, setting=setting)
    figures = derive(runs, frozen)
    store("families", runs, figures=figures, **more)
    draw()
    refresh_pages()
    for name in names:
        found = {k: figures[f"{name}.{k}"]["value"] for k in ("learned", "low", "high")}
        print(
            f"{name:18} rate {best[name]:g}", {k: round(v, 3) for k, v in found.items()}
        )


if __name__ == "__main__":
    main()
