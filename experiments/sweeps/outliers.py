"""Outliers inserted on purpose: what int8 and NF4 lose on them, and what gets it back.

No channel of tiny-decoder stands out, so quantization has little to lose. Here channels
of its norms are multiplied by s and the columns that read them divided by it, which
leaves the function as it is (`kit.outliers`); the channels are drawn anew for each
seed, the same ones in all eight norms. Dates in the base languages, 400 test records.

QLoRA: 100 steps on the same dates, its rate from a sweep with two seeds on dev records,
then five seeds on test records. Then the kurtosis of each linear's weights in MiniLM
and in tiny-decoder, and what NF4 does to each. Seven minutes on two cores."""

import random
import statistics

import torch

from experiments.common import BASES, records, store, sweep
from peftlab import nf4, qlora, surgery
from peftlab.int8 import Int8Linear
from peftlab.kit import base_models, measure, outliers, plot, results
from peftlab.kit.results import share, table, where
from peftlab.kit.train import train
from tools.figures import refresh_pages, save_picture

CASES = {  # {name: (s, how many channels)}
    "none": (1, 0),
    "outliers": (200, 1),
    "sixteen outliers": (200, 16),
    "shrunken": (1 / 60, 1),
}
PACKED = dict(double_quant=True, compute_dtype=torch.bfloat16)  # as QLoRA has them
LAYERS = {  # {name: what takes a linear's place, in all but the head}
    "plain": lambda linear: linear,
    "naive": lambda linear: Int8Linear(linear, threshold=0),
    "threshold": lambda linear: Int8Linear(linear, threshold=6.0),
    "NF4": lambda linear: nf4.NF4Linear(linear, **PACKED),
}
STEPS, BATCH, RANK, RATES = 100, 16, 8, (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = range(5)


def channels(name, seed):
    """The channels of a seed that get outliers; no two seeds share one of the 128."""
    shuffled, n = random.Random(0).sample(range(128), 128), CASES[name][1]
    return sorted(shuffled[seed * n : (seed + 1) * n])


def with_outliers(name, seed):
    """tiny-decoder with the outliers of a case, and its tokenizer."""
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    if CASES[name][1]:
        outliers.scale_channels(model, CASES[name][0], channels(name, seed))
    return model, tokenizer


def replaced(model, method):
    """The model with every linear but the head replaced by the method's."""
    linears = surgery.select(model, "all-linear")
    surgery.swap(model, {linear: LAYERS[method](linear) for linear in linears})
    return model


@torch.no_grad()
def emptied(model, lost):
    """The model without what some channels of its norms carry."""
    for norm in outliers.readers(model):
        model.get_submodule(norm).weight[lost] = 0
    return model


def bits(model, tokenizer, kind="dates", n=40, split="test"):
    asked = records(kind, BASES, n, split)
    return "".join("01"[x] for x in measure.answered(model, tokenizer, asked))


def one(job):
    """One run: (case, method, seed, rate, whether to score on test records)."""
    name, method, seed, lr, test = job
    torch.set_num_threads(1)
    model, tokenizer = with_outliers(name, seed)
    run = dict(inserted=name, method=method, seed=seed, channels=channels(name, seed))
    if method == "QLoRA":
        torch.manual_seed(seed)
        qlora.add(model, "all-linear", r=RANK, alpha=2 * RANK, **PACKED)
        lines = records("dates", BASES, 360, "train", seed)
        options = dict(progress=False, max_grad_norm=None)
        train(model, tokenizer, lines, STEPS, lr, BATCH, seed, **options)
        run["lr"] = lr
    elif method == "emptied":
        emptied(model, run["channels"])
    else:
        replaced(model, method)
    if not test:
        return run | dict(dev=bits(model, tokenizer, n=18, split="dev"))
    run["dates"] = bits(model, tokenizer)
    if name == "shrunken" or method == "plain":
        run["refuse"] = bits(model, tokenizer, "refuse", 20)
    return run


def weigh(name, model, tokenizer):
    """For each linear, what stands out in its weights and what NF4 does to them: excess
    kurtosis (0 for a normal distribution), the largest over their RMS, and the RMS
    error over the RMS of the weights and of what the layer puts out."""
    errors, rows, handles = {}, [], []
    for path, m in model.named_modules():
        if type(m) is torch.nn.Linear and m is not getattr(model, "lm_head", None):
            w = m.weight.detach()  # (out, in)
            off = _unpacked(w) - w
            row = dict(model=name, path=path, kurtosis=excess_kurtosis(w))
            row["largest"] = (w.abs().max() / w.pow(2).mean().sqrt()).item()
            rows.append(row | dict(weights=(off.norm() / w.norm()).item()))
            errors[path] = torch.zeros(2, dtype=torch.float64)
            handles.append(m.register_forward_pre_hook(_weigh(errors[path], off, w)))
    with torch.no_grad():
        for record in records("dates", BASES, 10, "test"):
            model(**tokenizer(record.prompt, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return [r | dict(output=_ratio(errors[r["path"]])) for r in rows]


def excess_kurtosis(w):
    """The fourth moment about the mean over the squared variance, less 3: 0 for a
    normal distribution, large where a few weights are far from the rest."""
    z = (w - w.mean()).double()
    return (z.pow(4).mean() / z.pow(2).mean() ** 2).item() - 3


def _weigh(sums, off, w):
    def hook(module, args):
        x = args[0].detach()
        sums.add_(torch.stack([(x @ y.T).pow(2).sum() for y in (off, w)]))

    return hook


def _unpacked(w):
    return nf4.dequantize(nf4.quantize(w))


def _ratio(sums):
    return (sums[0] / sums[1]).sqrt().item()


@torch.no_grad()
def watched(model, tokenizer):
    """The logits of the test prompts (tokens, vocabulary), and {kind of linear: the
    largest magnitude in its input}."""
    found, handles = {}, []
    for path, m in model.named_modules():
        if type(m) is torch.nn.Linear and m is not model.lm_head:
            kind = path.rpartition(".")[2]

            def hook(module, args, kind=kind):
                found[kind] = max(found.get(kind, 0), args[0].abs().max().item())

            handles.append(m.register_forward_pre_hook(hook))
    prompts = [r.prompt for r in records("dates", BASES, 10, "test")]
    rows = [model(**tokenizer(p, return_tensors="pt")).logits[0] for p in prompts]
    for handle in handles:
        handle.remove()
    return torch.cat(rows), found


def activations():
    """For each case, seed 0, the largest input of each kind of linear, and how far the
    logits move, over the largest of them."""
    before, figures = watched(*with_outliers("none", 0))[0], {}
    for name in CASES:
        logits, found = watched(*with_outliers(name, 0))
        figures |= {f"{name}.largest.{kind}": v for kind, v in found.items()}
        moved = (logits - before).abs().max() / before.abs().max()
        figures[f"{name}.moved"] = moved.item()
    return figures


def derive(runs, linears, seen):
    """What the page quotes: each row's mean over the seeds, what it loses against the
    plain model, what repairs it, with intervals by a paired bootstrap over seeds and
    records; and the weights of the linears."""
    shares = {}
    for name, method in dict.fromkeys((r["inserted"], r["method"]) for r in runs):
        key, mine = f"{name}.{method}", where(runs, inserted=name, method=method)
        for kind in ("dates", "refuse"):
            if kind in mine[0]:
                shares |= spread(f"{key}.{kind}", [share(r[kind]) for r in mine])
        plain = where(runs, inserted="none", method="plain") * len(mine)
        shares |= gap(f"{key}.loss", plain, mine)
    for name, better, worse in (
        ("outliers", "threshold", "naive"),
        ("sixteen outliers", "threshold", "naive"),
        ("sixteen outliers", "threshold", "emptied"),
        ("shrunken", "QLoRA", "NF4"),
    ):
        pair = [where(runs, inserted=name, method=m) for m in (better, worse)]
        shares |= gap(f"{name}.{better}.over {worse}", *pair)
    weights = {}
    for name in dict.fromkeys(r["model"] for r in linears):
        for key in ("kurtosis", "largest", "weights", "output"):
            values = [r[key] for r in linears if r["model"] == name]
            weights |= spread(f"{name}.{key}", values)
            weights[f"{name}.{key}"] = statistics.median(values)
    w = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    weights["normal.weights"] = ((_unpacked(w) - w).norm() / w.norm()).item()
    return {k: dict(value=v, tolerance=0.05) for k, v in shares.items()} | {
        k: dict(value=v, tolerance=0.02 * abs(v))
        for k, v in {**weights, **seen}.items()
    }


def spread(key, values):
    ends = {f"{key}.lowest": min(values), f"{key}.highest": max(values)}
    return {key: sum(values) / len(values), **ends}


def gap(key, a, b):
    mean, low, high = measure.interval(table(a, "dates"), table(b, "dates"))
    return {key: mean, f"{key}.low": low, f"{key}.high": high}


@torch.no_grad()
def blocks(seed):
    """The share of the blocks of 64 with a shrunken channel's weight that it sets the
    scale of: in each it is the largest."""
    model, _ = with_outliers("shrunken", seed)
    paths = [path for paths in outliers.readers(model).values() for path in paths]
    rows = torch.cat([model.get_submodule(path).weight for path in paths]).abs()
    (channel,) = channels("shrunken", seed)
    block = rows.view(len(rows), -1, 64)[:, channel // 64]
    return (block[:, channel % 64] == block.amax(1)).double().mean().item()


def draw_runs():
    """The dates that each run parses, a mark a seed and a bar for the mean."""
    runs = results.load("outliers")["runs"]
    names = {"plain": "as it is", "naive": "naive int8", "threshold": "LLM.int8()"}
    rows = dict.fromkeys((r["inserted"], r["method"]) for r in runs)
    rows = [row for row in rows if row[0] in ("outliers", "shrunken")]
    rows = sorted((r for r in rows if r[1] != "emptied"), key=lambda r: r[0])
    ax = plot.axes("exact match: base dates", figsize=(plot.WIDE, 3.4))
    for y, (name, method) in enumerate(rows):
        x = [share(r["dates"]) for r in where(runs, inserted=name, method=method)]
        color, mark = ((plot.BLUE, "o"), (plot.PURPLE, "D"))[name == "shrunken"]
        look = dict(color=color, clip_on=False)
        ax.plot(x, [y] * len(x), mark, ms=4, alpha=0.6, **look)
        ax.plot(sum(x) / len(x), y, "|", ms=14, mew=2, **look)
    labels = [f"{name}: {names.get(method, method)}" for name, method in rows]
    ax.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
    ax.set_yticklabels(labels)
    save_picture(ax.figure, "outliers_inserted.svg")


def draw():
    """Each linear's kurtosis against what NF4 does to its weights and its output."""
    stored = results.load("outliers")
    looks = {
        "MiniLM": (plot.BLUE, "o"),
        "tiny-decoder": (plot.GREY, "s"),
        "inserted": (plot.PURPLE, "^"),
    }
    titles = dict(weights="error of the weights", output="error of the output")
    label = "excess kurtosis (normal: 0)"
    size = (plot.WIDE, 5.4)
    panels = plot.axes(label, "RMS error, relative", rows=2, figsize=size)
    for ax, (key, title) in zip(panels, titles.items(), strict=True):
        for name, (color, mark) in looks.items():
            mine = [r for r in stored["linears"] if r["model"] == name]
            x, y = ([r[k] for r in mine] for k in ("kurtosis", key))
            label = "outliers inserted" if name == "inserted" else name
            ax.plot(x, y, mark, ms=4.5, alpha=0.7, label=label, color=color)
        normal = stored["figures"]["normal.weights"]["value"]
        ax.axhline(normal, color=plot.INK, lw=1)
        ax.set(title=title, xscale="symlog", xlim=(-0.3, 3e3), yscale="log")
        ax.set_yticks(
            [0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"]
        )
        ax.set_ylim(0.011, 0.6)
        ax.minorticks_off()
    plot.legend(panels)
    save_picture(panels[0].figure, "outliers.svg")


def jobs():
    """All runs that are scored on test records, but QLoRA's."""
    rows = {("none", m): [0] for m in LAYERS}  # nothing is drawn there
    rows |= {(p, m): SEEDS for p in ("outliers", "shrunken") for m in LAYERS}
    rows |= {("outliers", "emptied"): SEEDS}
    rest = ("naive", "threshold", "emptied")
    rows |= {("sixteen outliers", m): SEEDS for m in rest}
    return [(*row, seed, None, True) for row, seeds in rows.items() for seed in seeds]


def main():
    rates = [("shrunken", "QLoRA", s, lr, False) for lr in RATES for s in (0, 1)]
    rates = sweep(one, rates, "learning rates")
    tried = {lr: [share(r["dev"]) for r in rates if r["lr"] == lr] for lr in RATES}
    best = max(RATES, key=lambda lr: sum(tried[lr]))
    tuned = [("shrunken", "QLoRA", seed, best, True) for seed in SEEDS]
    runs = sweep(one, [*jobs(), *tuned], "test records")
    torch.set_num_threads(1)
    models = {
        "MiniLM": base_models.load_minilm("cpu"),
        "tiny-decoder": with_outliers("none", 0),
        "inserted": with_outliers("shrunken", 0),
    }
    linears = [row for name, pair in models.items() for row in weigh(name, *pair)]
    figures = derive(runs, linears, activations())
    figures["rate"] = dict(value=best, tolerance=0)
    mean = statistics.mean(blocks(seed) for seed in SEEDS)
    figures["shrunken.blocks"] = dict(value=mean, tolerance=0.02)
    more = dict(best=best, rates=rates, linears=linears, figures=figures)
    cases = {name: dict(s=s, channels=n) for name, (s, n) in CASES.items()}
    setting = dict(steps=STEPS, batch=BATCH, r=RANK, cases=cases)
    store("outliers", runs, setting=setting, **more)
    draw()
    draw_runs()
    refresh_pages()
    for key, figure in figures.items():
        if key.endswith((".dates", ".refuse")) or " over" in key or ".over" in key:
            print(f"{key:40} {figure['value']:.3f}")


if __name__ == "__main__":
    main()
