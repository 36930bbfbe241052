"""Rank, alpha and the learning rate of LoRA, and what else people turn.

Finnish dates, LoRA on all linears, gradients clipped at a norm of 1, five seeds of
everything:

- `rates`: 100 steps of 16; five ranks at five learning rates under three scalings that
  agree at r=16: alpha = 32 at every rank, alpha = 2 r, and rsLoRA with alpha = 8;
- `targets`: attention, MLP or all linears with about as many parameters;
- `plus`: LoRA+, whose B learns 4 or 16 times faster than A;
- `dropout`: 64 records only, seen 25 times each, with dropout 0, 0.1 and 0.3;
- `batches`: 3,200 records in steps of 4, 16 or 64, LoRA r=8 and full fine-tuning.

Each row of the last four has a learning rate of its own: from a start the search moves
half a decade at a time until the best on dev records has a worse one on either side.
An hour and a half on two cores; a part by its name alone, beside what is stored:

    python -m experiments.sweeps.rank_alpha_rate batches"""

import sys

import torch

from experiments.common import TARGETS, graded, moved, search, store, sweep
from experiments.sweeps.finnish import linears
from peftlab import lora, lora_plus
from peftlab.kit import base_models, data, results
from peftlab.kit.train import train

SEEDS = range(5)
RANKS = (1, 4, 8, 16, 64)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SCALINGS = {  # name: (alpha at rank r, rsLoRA)
    "alpha = 32": (lambda r: 32, False),
    "alpha = 2r": (lambda r: 2 * r, False),
    "rsLoRA": (lambda r: 8, True),
}
LORA = dict(targets="LoRA", r=8, alpha=16)
ROWS = {  # part: {row: (settings, a learning rate to start from)}
    "targets": {
        "attention": (dict(targets="attention", r=12, alpha=24), 1e-2),
        "MLP": (dict(targets="MLP", r=7, alpha=14), 1e-2),
        "all": (dict(targets="LoRA", r=4, alpha=8), 1e-2),
    },
    "plus": {
        "4": (LORA | dict(ratio=4), 3e-3),
        "16": (LORA | dict(ratio=16), 1e-3),
    },
    "dropout": {
        "0": (LORA | dict(records=64), 3e-3),
        "0.1": (LORA | dict(records=64, dropout=0.1), 3e-3),
        "0.3": (LORA | dict(records=64, dropout=0.3), 3e-3),
    },
    "batches": {
        "LoRA, 4": (LORA | dict(batch=4, steps=800), 3e-3),
        "LoRA, 16": (LORA | dict(batch=16, steps=200), 1e-2),
        "LoRA, 64": (LORA | dict(batch=64, steps=50), 1e-2),
        "full, 4": (dict(targets=None, batch=4, steps=800), 1e-3),
        "full, 16": (dict(targets=None, batch=16, steps=200), 1e-3),
        "full, 64": (dict(targets=None, batch=64, steps=50), 3e-3),
    },
}
SETTINGS = {
    row: settings for rows in ROWS.values() for row, (settings, _) in rows.items()
}


def one_run(job):
    """Train once: the bits on dev and test records, the loss, the size of the change.

    job: settings, a learning rate and a seed. Without targets, everything trains."""
    settings, lr, seed = job
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    base = {name: p.detach().clone() for name, p in linears(model).items()}
    torch.manual_seed(seed)
    groups = None
    if settings["targets"]:
        lora.add(
            model,
            TARGETS[settings["targets"]],
            r=settings["r"],
            alpha=settings["alpha"],
            dropout=settings.get("dropout", 0.0),
            rslora=settings.get("rslora", False),
        )
    if "ratio" in settings:
        groups = lora_plus.parameter_groups(model, lr, settings["ratio"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    lines = data.records("dates", "fi", settings.get("records", 3600), "train", seed)
    train(
        model,
        tokenizer,
        lines,
        settings.get("steps", 100),
        lr,
        settings.get("batch", 16),
        seed,
        progress=False,
        groups=groups,
    )

    dev = data.records("dates", "fi", 180, "dev")
    test = data.records("dates", "fi", 400, "test")
    found = dict(lr=lr, seed=seed, trained=trained)
    found["dev"], found["loss"] = graded(model, tokenizer, dev)
    found["learned"], _ = graded(model, tokenizer, test)
    if settings["targets"]:
        lora.merge(model)
    found["change"] = moved(base, linears(model))
    return found


def curves():
    """Every rank at every learning rate, under every scaling."""
    jobs = {}
    for scaling, (alpha, rslora) in SCALINGS.items():
        for r in RANKS:
            settings = dict(targets="LoRA", r=r, alpha=alpha(r), rslora=rslora)
            if r == 16:  # the three are one there
                settings |= dict(alpha=32, rslora=False)
            for lr in RATES:
                for seed in SEEDS:
                    jobs[scaling, r, lr, seed] = settings, lr, seed

    once = {repr(job): job for job in jobs.values()}
    found = sweep(one_run, list(once.values()), "rank, alpha, rate: rates")
    result = dict(zip(once, found, strict=True))
    return [
        dict(scaling=scaling, r=r, alpha=job[0]["alpha"]) | result[repr(job)]
        for (scaling, r, _, _), job in jobs.items()
    ]


def row_run(job):
    """One run of a row: (its name, a learning rate, a seed)."""
    name, lr, seed = job
    return dict(method=name) | one_run((SETTINGS[name], lr, seed))


def main(names=()):
    """Run all parts, or the named ones, and store each as it ends.

    ValueError for an unknown name."""
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise ValueError(f"no part is named {unknown[0]}; there are: {', '.join(ROWS)}")

    stored = results.load("rank_alpha_rate") if names else dict(runs=curves())
    stored = {key: value for key, value in stored.items() if key != "machine"}
    stored = dict(best={}, settings={}) | stored
    for part in names or ROWS:
        starts = {row: start for row, (_, start) in ROWS[part].items()}
        stored[part], best = search(row_run, starts, f"rank, alpha, rate: {part}")
        stored["best"][part] = best
        stored["settings"][part] = {row: SETTINGS[row] for row in starts}
        store("rank_alpha_rate", **stored)


if __name__ == "__main__":
    main(sys.argv[1:])
