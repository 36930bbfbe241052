"""What a plain LoRA, an untrained one and another student's reach in the problem sets.

The thresholds of `tools/problem_sets.py` are set by these runs: the book's plain LoRA
has to get full points, an untrained adapter and one of another variant none. One run
for each language of set 1, and for the variants of two students in the other sets, on
records of the test split drawn with a secret of this file's. Nine minutes on one core.
"""

import torch
from transformers import get_linear_schedule_with_warmup

from experiments.common import store, sweep
from peftlab import lora
from peftlab.kit import data, icd
from peftlab.kit.pretrain import SHARES
from peftlab.kit.results import where
from peftlab.kit.train import batches, train
from tools import problem_sets
from tools.figures import refresh_pages

SECRET = "not the secret of any course"
PLAIN = dict(targets="all-linear", r=8, lr=8e-3, steps=200, batch=16, replay=0.0)
SETTINGS = {  # of the plain LoRA; alpha is 2 r
    1: PLAIN,
    2: PLAIN | dict(r=1, lr=2e-2, steps=400),
    3: PLAIN | dict(lr=5e-3, steps=400, batch=20, replay=0.6),
    5: PLAIN | dict(r=16, lr=5e-3, steps=400, batch=20, replay=0.6),
    6: PLAIN | dict(steps=300),
}
PHRASES = dict(targets=["query", "value"], r=8, lr=1e-3, head_lr=1e-2, steps=60)
STUDENTS = ("ada", "ben")


def tuned(number, names, seed):
    """The plain LoRA of a set, trained for one variant; (model, tokenizer)."""
    model, tokenizer = problem_sets.base(number)
    torch.manual_seed(seed)
    if number == 4:
        return classifier(model, tokenizer, names, seed), tokenizer

    s = SETTINGS[number]
    lora.add(model, s["targets"], r=s["r"], alpha=2 * s["r"])
    n = 3000 // len(names)
    lines = [r for one in names for r in data.records("dates", one, n, "train", seed)]
    if s["replay"]:
        more = round(len(lines) * s["replay"] / (1 - s["replay"]))
        lines += data.mixture(SHARES, data.BASE_LANGUAGES, more, "train", seed)
    how = (s["steps"], s["lr"], s["batch"], seed)
    train(model, tokenizer, lines, *how, progress=False)
    return model, tokenizer


def classifier(model, tokenizer, names, seed):
    """LoRA on queries and values of MiniLM, and the new head at its own rate."""
    s = PHRASES
    lora.add(model, s["targets"], r=s["r"], alpha=2 * s["r"])
    model.classifier.requires_grad_(True)
    body = [p for n, p in model.named_parameters() if "lora_" in n]
    head = list(model.classifier.parameters())
    groups = [dict(params=body, lr=s["lr"]), dict(params=head, lr=s["head_lr"])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    schedule = get_linear_schedule_with_warmup(optimizer, 10, s["steps"])
    place = {icd.CHAPTERS.index(name): k for k, name in enumerate(names)}
    phrases = icd.diagnoses("train", 300, seed)
    pairs = [(text, place[c]) for text, c in phrases if c in place]
    source = batches(pairs, 32, seed)
    model.train()
    for _ in range(s["steps"]):
        texts, labels = zip(*next(source), strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        model(**batch, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def hidden(number, names, n=problem_sets.RECORDS):
    seed = problem_sets._hash("hidden", SECRET, number)
    return problem_sets.records(number, names, "test", seed, n)


def variants(number):
    """The variants that a set is tried with."""
    if number == 1:
        return [(language,) for language in problem_sets.LANGUAGES]
    return [problem_sets.variant(student, number) for student in STUDENTS]


def one(job):
    """One adapter: the score for its own variant, for the next one, and untrained."""
    number, names, seed = job
    torch.set_num_threads(1)
    start, tokenizer = problem_sets.base(number)
    model, _ = tuned(number, names, seed)
    parts, every = hidden(number, names), variants(number)
    after = every[(every.index(tuple(names)) + 1) % len(every)]
    other = hidden(number, after, 60)
    run = dict(set=number, variant=list(names), seed=seed)
    run["score"], run["parts"] = problem_sets.score(model, tokenizer, parts)
    run["untrained"], run["untrained_parts"] = problem_sets.score(
        start, tokenizer, parts
    )
    run["another"], _ = problem_sets.score(model, tokenizer, other)
    return run


def derive(runs):
    """Of each set the least that its own reach, and the most of all others.

    Besides what set 5's base can do before any training."""
    figures = {}
    for number in problem_sets.SETS:
        mine = where(runs, set=number)
        scores = [run["score"] for run in mine]
        figures[f"{number}.variants"] = len(mine)
        figures[f"{number}.mean"] = sum(scores) / len(scores)
        figures[f"{number}.lowest"] = min(scores)
        for key in ("untrained", "another"):
            figures[f"{number}.{key}"] = max(run[key] for run in mine)
    broken = [run["untrained_parts"]["base dates"] for run in where(runs, set=5)]
    figures["5.broken"] = max(broken)
    return {k: dict(value=v, tolerance=0.05) for k, v in figures.items()}


def main():
    sets = sorted(problem_sets.SETS, reverse=True)
    jobs = [(number, names, 0) for number in sets for names in variants(number)]
    runs = sweep(one, jobs, "problem sets")
    figures = derive(runs)
    settings = {str(n): s for n, s in SETTINGS.items()} | {"4": PHRASES}
    store("problem_sets", runs, figures=figures, setting=settings)
    refresh_pages()
    for key, figure in figures.items():
        print(f"{key:16} {figure['value']:.3f}")


if __name__ == "__main__":
    main()
