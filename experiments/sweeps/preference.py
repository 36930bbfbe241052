"""Refusals lost to a harmless adapter, and four ways to bring them back.

tiny-decoder learns Finnish dates (LoRA, 100 steps, merged). From this model each way
sees the same pairs in the ten languages of the base and in Finnish: an impossible
date, `?` chosen and the model's own answer rejected; and a valid date, its answer
chosen and `?` rejected. Forty steps of sixteen pairs at a constant learning rate,
gradients clipped at 1: DPO on all pairs, DPO on the impossible dates alone, DPO with
the ordinary loss on the chosen answers beside it, and that loss alone.

Five seeds, each way's learning rate searched with all five on development dates: the
mean of four shares right (dates impossible and valid, in the base's languages and in
Finnish). A seed draws the order of the Finnish dates, both adapters' starts and the
order of the pairs. Beside them `mixed`: the Finnish training itself with twenty
impossible dates, nine times each, among its 3,600. Twenty minutes on one core."""

import copy
import dataclasses
import functools

import torch
from torch.nn import functional as F

from experiments.common import (
    BASES,
    GRID,
    differences,
    records,
    search,
    store,
    sweep,
)
from peftlab import lora
from peftlab.kit import base_models, data, measure
from peftlab.kit.results import share, where
from peftlab.kit.train import batches, collate, train
from tools.figures import refresh_pages

FINNISH = dict(steps=100, lr=0.01, batch_size=16)
STEPS, SIZE, BETA = 40, 16, 0.1
# a way: the weight of DPO's loss, that of the chosen answers' own, and its pairs
WAYS = {
    "DPO": (1.0, 0.0, "all"),
    "DPO on refusals": (1.0, 0.0, "refusals"),
    "DPO + answers": (1.0, 1.0, "all"),
    "answers": (0.0, 1.0, "all"),
}
STARTS = {
    "DPO": 3e-4,
    "DPO on refusals": 3e-4,
    "DPO + answers": 3e-4,
    "answers": 1e-3,
}
SEEDS = range(5)
EACH = dict(dev=(10, 40), test=(20, 200))  # of a base language, of Finnish
FEW, TIMES = 20, 9
SETS = ("none.base", "none.fi", "valid.base", "valid.fi")


def learn_finnish(seed, more=()):
    """tiny-decoder after a hundred steps of Finnish, merged, and its tokenizer."""
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(seed)
    lora.add(model, "all-linear", r=8, alpha=16)
    lessons = data.records("dates", "fi", 3600, "train") + list(more)
    train(model, tokenizer, lessons, seed=seed, progress=False, **FINNISH)
    return lora.merge(model), tokenizer


@functools.cache
def finnish(seed):
    """The model that all ways go on from, its tokenizer, and the pairs."""
    model, tokenizer = learn_finnish(seed)
    return model, tokenizer, make_pairs(model, tokenizer)


def make_pairs(model, tokenizer):
    """(chosen, rejected) records: {"refusals": of impossible dates, "all": both}."""
    languages = [*BASES, "fi"]
    asked = records("refuse", languages, 10, "train")
    said = measure.answers(model, tokenizer, [r.prompt for r in asked])
    refusals = [
        (r, dataclasses.replace(r, answer=a))
        for r, a in zip(asked, said, strict=True)
        if a != "?"
    ]
    valid = [
        (r, dataclasses.replace(r, answer="?"))
        for r in records("dates", languages, 10, "train")
    ]
    return {"refusals": refusals, "all": refusals + valid}


def log_probs(model, batch):
    """Of each answer in a batch: the sum over its tokens, (batch,)."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1].transpose(1, 2)
    return -F.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").sum(1)


def prefer(model, reference, tokenizer, pairs, weights, lr, seed):
    """Train on pairs: DPO's loss and the chosen answers' own, by their weights."""
    dpo, answers = weights
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    source = batches(pairs, SIZE, seed)
    for _ in range(STEPS):
        few = next(source)
        loss = 0.0
        if dpo:
            batch = collate([c for c, _ in few] + [r for _, r in few], tokenizer)
            with torch.no_grad():
                start = log_probs(reference, batch)
            chosen, rejected = (log_probs(model, batch) - start).chunk(2)
            loss = loss - dpo * F.logsigmoid(BETA * (chosen - rejected)).mean()
        if answers:
            chosen = collate([c for c, _ in few], tokenizer)
            loss = loss + answers * model(**chosen).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def bits(flags):
    return "".join("01"[flag] for flag in flags)


def measured(model, tokenizer, split):
    """Bits of four sets of dates of a split, right or not; and where `?` is wrong."""
    few, many = EACH[split]
    found = {}
    for kind, name in (("refuse", "none"), ("dates", "valid")):
        for where_, languages, n in (("base", BASES, few), ("fi", ["fi"], many)):
            n = min(n, 120) if (kind, where_) == ("refuse", "fi") else n
            lines = records(kind, languages, n, split)
            given = measure.answers(model, tokenizer, [r.prompt for r in lines])
            right = (a == r.answer for a, r in zip(given, lines, strict=True))
            found[f"{name}.{where_}"] = bits(right)
            if kind == "dates":
                found[f"over.{where_}"] = bits(a == "?" for a in given)
            else:
                found[f"begun.{where_}"] = bits(a[:1] == "?" for a in given)
    return found


def one(job):
    """One run: (method, learning rate, seed)."""
    method, lr, seed = job
    if method == "base":
        model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    elif method == "mixed":
        more = TIMES * records("refuse", BASES, FEW // len(BASES), "train")
        model, tokenizer = learn_finnish(seed, more)
    else:
        start, tokenizer, pairs = finnish(seed)
        model = copy.deepcopy(start)
        if method != "start":
            *weights, kind = WAYS[method]
            torch.manual_seed(seed)
            lora.add(model, "all-linear", r=8, alpha=16)
            prefer(model, start, tokenizer, pairs[kind], weights, lr, seed)
    dev = [share(measured(model, tokenizer, "dev")[key]) for key in SETS]
    found = measured(model, tokenizer, "test")
    return dict(method=method, lr=lr, seed=seed, dev=sum(dev) / 4, **found)


def derive(runs, best):
    """Means over the seeds, their range, and paired differences with a t interval."""
    rates = best | dict(base=0.0, start=0.01, mixed=0.01)
    rows = {way: where(runs, method=way, lr=rate) for way, rate in rates.items()}
    figures = {}
    for way, mine in rows.items():
        figures[f"{way}.rate"] = rates[way]
        for key in (k for k in mine[0] if "." in k):
            found = [share(run[key]) for run in mine]
            figures[f"{way}.{key}"] = sum(found) / len(found)
            figures[f"{way}.{key}.low"] = min(found)
            figures[f"{way}.{key}.high"] = max(found)
    # half a decade above DPO's best rate, where most seeds lose the end token
    fast = where(runs, method="DPO", lr=GRID[GRID.index(best["DPO"]) + 1])
    for key in ("none.base", "begun.base"):
        found = [share(run[key]) for run in fast]
        figures[f"fast.{key}"] = sum(found) / len(found)
    figures["fast.rate"] = fast[0]["lr"]
    unended = (share(r["begun.base"]) - share(r["none.base"]) for r in fast)
    figures["fast.lost"] = sum(gap > 0.5 for gap in unended)
    for name, way, other in (
        ("both.minus.dpo", "DPO + answers", "DPO"),
        ("both.minus.answers", "DPO + answers", "answers"),
        ("alone.minus.dpo", "DPO on refusals", "DPO"),
    ):
        for key in SETS:
            pair = ([share(run[key]) for run in rows[w]] for w in (way, other))
            figures |= differences(f"{name}.{key}", *pair, mark=".")
    return {k: dict(value=v, tolerance=0.1) for k, v in figures.items()}


def main():
    runs, best = search(one, STARTS, "preference", stages=(len(SEEDS),))
    jobs = [(way, 0.01, seed) for way in ("start", "mixed") for seed in SEEDS]
    runs += sweep(one, [*jobs, ("base", 0.0, 0)], "preference beside")
    figures = derive(runs, best)
    setting = dict(steps=STEPS, pairs=SIZE, beta=BETA, finnish=FINNISH)
    store("preference", runs, best=best, figures=figures, setting=setting)
    refresh_pages()
    for key, figure in figures.items():
        print(f"{key:28} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
