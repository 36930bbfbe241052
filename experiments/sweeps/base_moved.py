"""An adapter on a later version of its base: same name, same shapes, other weights.

A LoRA r=8 learns Finnish dates beside tiny-decoder, as in chapter 22: 100 steps of 16
records at 0.01. Then the base's author trains the base itself for 3 to 100 steps of 32
records more, at 0.001, in two ways:

- `more`: records of the kinds and languages that the base was made with;
- `German`: half of those, half German dates, a language that it did not know.

The adapter, unchanged, answers on each of these bases. `again` is an adapter that was
trained anew on the last one. Five seeds, which draw all records and the adapter's
start. Eight minutes on one core."""

import copy
from statistics import mean

import torch

from experiments.common import BASES, graded, moved, records, store, sweep
from peftlab import lora
from peftlab.kit import base_models, data, measure
from peftlab.kit.pretrain import SHARES
from peftlab.kit.results import share
from peftlab.kit.train import train

SEEDS = range(5)
STEPS = (3, 10, 30, 100)
RATE, BATCH = 1e-3, 32
KINDS = ("more", "German")


def with_lora(base, tensors=None):
    model = lora.add(copy.deepcopy(base), "all-linear", r=8, alpha=16)
    if tensors is not None:
        lora.load_state_dict(model, tensors)
    return model


def trained(base, tokenizer, seed):
    """A LoRA for Finnish dates beside a base, as {name: tensor}."""
    torch.manual_seed(seed)
    model = with_lora(base)
    lines = records("dates", ["fi"], 3600, "train", seed)
    train(model, tokenizer, lines, 100, 0.01, 16, seed, progress=False)
    return lora.state_dict(model)


def later(base, tokenizer, kind, steps, seed):
    """A copy of the base that its author has trained further, every weight."""
    lines = data.mixture(SHARES, BASES, 3600, "train", seed + 1)
    if kind == "German":
        lines += records("dates", ["de"], 3600, "train", seed)
    model = copy.deepcopy(base).requires_grad_(True)
    train(model, tokenizer, lines, steps, RATE, BATCH, seed, progress=False)
    return model.eval()


def one(seed):
    """All runs of a seed, a row for each version of the base."""
    torch.set_num_threads(1)
    base, tokenizer = base_models.load("tiny-decoder", device="cpu")
    W = {n: p.detach().clone() for n, p in base.named_parameters() if p.dim() == 2}
    finnish = records("dates", ["fi"], 400, "test")
    own = records("dates", BASES, 40, "test")
    tensors = trained(base, tokenizer, seed)

    def answers(kind, steps, model, adapter):
        bits, loss = graded(with_lora(model, adapter).eval(), tokenizer, finnish)
        row = dict(seed=seed, kind=kind, steps=steps, adapter=bits, loss=loss)
        row["base"] = graded(model.eval(), tokenizer, own)[0]
        return row | dict(moved=moved(W, dict(model.named_parameters())))

    rows = [answers("none", 0, base, tensors)]
    for kind in KINDS:
        for steps in STEPS:
            model = later(base, tokenizer, kind, steps, seed)
            rows.append(answers(kind, steps, model, tensors))
        again = with_lora(model, trained(model, tokenizer, seed)).eval()
        rows[-1]["again"] = graded(again, tokenizer, finnish)[0]
    return rows


def figures(runs):
    """The means over the seeds, and what the adapter loses, with its t interval."""
    found = {}
    first = [share(r["adapter"]) for r in runs if r["kind"] == "none"]
    found["first"] = mean(first)
    for kind in KINDS:
        for steps in STEPS:
            rows = [r for r in runs if (r["kind"], r["steps"]) == (kind, steps)]
            rows.sort(key=lambda r: r["seed"])
            now = [share(r["adapter"]) for r in rows]
            lost, low, high = measure.paired_interval(first, now)
            key = f"{kind}.{steps}"
            found |= {f"{key}.adapter": mean(now), f"{key}.lost": lost}
            found |= {f"{key}.low": low, f"{key}.high": high}
            found[f"{key}.base"] = mean(share(r["base"]) for r in rows)
            found[f"{key}.moved"] = mean(r["moved"] for r in rows)
        found[f"{kind}.again"] = mean(share(r["again"]) for r in rows)
    return {key: dict(value=value, tolerance=0) for key, value in found.items()}


def main():
    runs = sum(sweep(one, list(SEEDS), "base moved"), [])
    store("base_moved", runs, figures=figures(runs))


if __name__ == "__main__":
    main()
