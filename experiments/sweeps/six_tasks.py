"""Six tasks, one for each of peft's task types: the base, the head alone, LoRA, full.

Every row trains as many steps on the same batches. The learning rate of each row is
found on development records with the first seed: from a start the search moves half a
decade at a time until the best has none better on either side. Then three seeds, on
216 test records (of the diagnoses 12 in each chapter). Under LoRA and full fine-tuning
a new head has a learning rate of its own, 0.01, which chapter 1's sweep found.

"Before" is the base with a head that nobody has trained. The two tasks that write text
have no new head; the retrieval task has one only in the row "head": a matrix on the
mean vector that starts as the identity.

Fifteen minutes on one core."""

import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

from experiments.common import search, store, sweep
from peftlab.kit import tasks
from peftlab.kit.results import where

SEEDS = range(3)
RECORDS, DEV, TEST = 3600, 108, 216
HEAD_RATE = 1e-2  # beside LoRA and full fine-tuning
START = {"head": 3e-2, "LoRA": 3e-3, "full": 3e-4}  # MiniLM's
START_TINY = {"LoRA": 1e-2, "full": 3e-3}
WRITES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def prepared(task, method, seed):
    """The model before training, and its tokenizer."""
    model, tokenizer = task.load(seed)
    if method == "LoRA":
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=task.targets, task_type=task.kind
        )
        return get_peft_model(model, config), tokenizer
    if method == "head":
        model.requires_grad_(False)
        if task.head:
            model.get_submodule(task.head).requires_grad_(True)
        else:
            width = model.config.hidden_size
            model.projection = torch.nn.Linear(width, width, bias=False)
            torch.nn.init.eye_(model.projection.weight)
    return model, tokenizer


def groups(task, model, method, lr):
    """The optimizer's groups: the body's weights, and a head's."""
    body, head = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_head = method == "head" or task.head and task.head in name
            (head if is_head else body).append(p)
    rate = lr if method == "head" else HEAD_RATE
    return [dict(params=body, lr=lr), dict(params=head, lr=rate)]


def fit(task, model, tokenizer, method, lr, seed):
    examples = task.examples(RECORDS, "train", seed)
    parts = groups(task, model, method, lr)
    optimizer = torch.optim.AdamW(parts, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, task.steps // 10, task.steps)
    source = tasks.batches(examples, task.size, seed)
    model.train(method != "head")  # a frozen body without dropout
    torch.manual_seed(seed)
    for _ in range(task.steps):
        loss = task.loss(model, task.batch(tokenizer, next(source)))
        loss.backward()
        trained = [p for part in parts for p in part["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def one(job):
    """One run: ("task: method", learning rate, seed)."""
    name, lr, seed = job
    kind, method = name.split(": ")
    task = tasks.SIX[kind]
    torch.set_num_threads(1)
    begun = time.process_time()
    model, tokenizer = prepared(task, method, seed)
    run = dict(method=name, lr=lr, seed=seed)
    run["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method != "before":
        fit(task, model, tokenizer, method, lr, seed)
    for split, n in (("dev", DEV), ("test", TEST)):
        run[split] = task.score(model, tokenizer, task.examples(n, split, 0))
    return run | dict(seconds=round(time.process_time() - begun, 1))


def start(methods):
    """{"task: method": the learning rate that its search starts from}."""
    starts = {}
    for kind in tasks.SIX:
        rates = START_TINY if kind in WRITES else START
        rates = {"before": 0.0} | rates
        starts |= {f"{kind}: {m}": rates[m] for m in methods if m in rates}
    return starts


def derive(runs, best):
    """The mean, the lowest and the highest of three seeds, for each row."""
    figures = {}
    for name, lr in best.items():
        scores = [r["test"] for r in where(runs, method=name, lr=lr)]
        key = name.replace(": ", ".")
        figures[key] = sum(scores) / len(scores)
        figures[f"{key}.lowest"] = min(scores)
        figures[f"{key}.highest"] = max(scores)
    return {k: dict(value=v, tolerance=0.05) for k, v in figures.items()}


def main():
    runs, tried, best = {}, [], {}
    for methods in (("before",), ("LoRA", "head"), ("full",)):
        rates = start(methods)
        with_seeds(rates, runs, best)
        write(runs, tried, best)
        if methods != ("before",):
            found, rates = search(one, rates, "six tasks", stages=(1,))
            tried += found
            with_seeds(rates, runs, best)
            write(runs, tried, best)


def with_seeds(rates, runs, best):
    """Add the runs at these learning rates, all seeds, in place of other rates."""
    jobs = [(name, lr, seed) for name, lr in rates.items() for seed in SEEDS]
    for run in sweep(one, jobs, "six tasks"):
        runs[run["method"], run["seed"]] = run
    best |= rates


def write(runs, tried, best):
    runs = list(runs.values())
    figures = derive(runs, best)
    setting = dict(records=RECORDS, r=8, alpha=16, head_rate=HEAD_RATE)
    store("six_tasks", runs, rates=tried, best=best, figures=figures, setting=setting)
    for key, figure in figures.items():
        print(f"{key:32} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
