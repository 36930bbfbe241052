"""What the sweeps share: one run (train, then measure) and a pool of two workers."""

import hashlib
import inspect
import json
import os
import re
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers, a thread each: no quarrel

import torch
from torch import multiprocessing
from tqdm import tqdm

from peftlab import lora
from peftlab.kit import base_models, data, measure, results
from peftlab.kit.results import share, where
from peftlab.kit.train import collate, train

SCRATCH = Path(__file__).parents[1] / "_build" / "sweeps"
WORKERS = int(os.environ.get("WORKERS", 2))

BASES = data.BASE_LANGUAGES
# Learning rates half a decade apart, a factor of about three: 1e-6, 3e-6, ... 30
GRID = [float(f"{m}e{i}") for i in range(-6, 2) for m in (1, 3)]
TARGETS = {
    "LoRA": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "MLP": ["gate_proj", "up_proj", "down_proj"],
}


def records(kind, languages, n, split, seed=0):
    """n records of a kind from each language, in one list."""
    return [r for where in languages for r in data.records(kind, where, n, split, seed)]


def tune(languages, method, lr, seed, steps, replay=0.0, batch=16, clip=None):
    """A copy of tiny-decoder trained on the dates of `languages`; returns (model,
    tokenizer).

    method: "full", "LoRA r=8" (on all linears), "attention r=12" or "MLP r=7"; alpha is
    2 r. replay: the share of the training records that are a mixture of what the base
    saw. clip: the norm at which gradients are clipped, None for not at all."""
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(seed)
    if method != "full":
        where, _, r = method.partition(" r=")
        lora.add(model, TARGETS[where], r=int(r), alpha=2 * int(r))
    lines = records("dates", languages, 3600 // len(languages), "train", seed)
    if replay:
        from peftlab.kit.pretrain import SHARES

        n = round(len(lines) * replay / (1 - replay))
        lines += data.mixture(SHARES, BASES, n, "train", seed)
    options = dict(progress=False, max_grad_norm=clip)
    train(model, tokenizer, lines, steps, lr, batch, seed, **options)
    return model, tokenizer


def scores(model, tokenizer, languages, n):
    """Bits on test records: the languages learnt, the base languages, the refusals."""
    sets = dict(
        dev=records("dates", languages, 180 // len(languages), "dev"),
        learned=records("dates", languages, n // len(languages), "test"),
        base=records("dates", BASES, 40, "test"),
        refuse=records("refuse", BASES, 20, "test"),
    )
    answered = {k: measure.answered(model, tokenizer, v) for k, v in sets.items()}
    # One character a record keeps the file readable and the bootstrap possible.
    return {k: "".join("01"[right] for right in v) for k, v in answered.items()}


@torch.no_grad()
def graded(model, tokenizer, lines):
    """A bit for each record that greedy decoding answers right, and the mean loss.

    Greedy decoding gives the right answer where each of its tokens, the end token too,
    is the likeliest after those before it. So one forward pass grades all."""
    batch = collate(lines, tokenizer)
    out = model(**batch)
    labels = batch["labels"]
    logits = out.logits[:, -labels.shape[1] :]  # after a trained prompt's own
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
    return "".join("01"[bit] for bit in right.all(1)), out.loss.item()


def moved(before, after):
    """||dW|| / ||W||, the mean over the weights of `before`, {path: weight}."""
    sizes = [(after[path] - w).norm() / w.norm() for path, w in before.items()]
    return torch.stack(sizes).mean().item()


def search(run, starts, title, stages=(5,)):
    """Every method's best learning rate, by the mean on dev records.

    From a start the search moves half a decade at a time until the best has none better
    on either side, first with the seeds of the first stage, then of the next.

    Args:
        run: of a job (name, learning rate, seed) the result, a dict that has `method`,
            `lr`, `seed` and `dev`, bits or a share.
        starts: {name: a learning rate of `GRID`}.
        title: of the progress bar.
        stages: numbers of seeds.

    Returns:
        All results, and {name: the best learning rate}.
    """
    best, tried = dict(starts), {}
    for seeds in stages:
        settled = False
        while not settled:
            jobs = [
                (name, lr, seed)
                for name in best
                for lr in neighbourhood(best[name])
                for seed in range(seeds)
            ]
            found = sweep(run, jobs, title)
            tried |= zip(jobs, found, strict=True)
            before, best = best, {}
            for name, rate in before.items():
                mine = where(list(tried.values()), method=name)
                best[name] = best_of_three(mine, rate, seeds)
            settled = best == before
    return list(tried.values()), best


def best_of_three(runs, rate, seeds):
    """A learning rate or one of its neighbours; of equal ones the present."""

    def mean(lr):
        rows = [run for run in where(runs, lr=lr) if run["seed"] < seeds]
        return sum(map(dev_share, rows)) / len(rows)

    return max(neighbourhood(rate), key=lambda lr: (mean(lr), lr == rate))


def neighbourhood(rate):
    """A learning rate of `GRID` with the one below and the one above it."""
    place = GRID.index(rate)
    if not 0 < place < len(GRID) - 1:
        raise ValueError(f"the search came to the end of its grid, at {rate:g}")
    return GRID[place - 1 : place + 2]


def dev_share(run):
    """The share right on dev records, from bits or as it is."""
    return share(run["dev"]) if isinstance(run["dev"], str) else run["dev"]


def best_rate(runs, method):
    """The learning rate with the best mean on dev records, never on test records."""
    rates = sorted({r["lr"] for r in runs if r["method"] == method})
    mean = {
        lr: sum(share(r["dev"]) for r in where(runs, method=method, lr=lr))
        for lr in rates
    }
    return max(rates, key=mean.get)


def differences(key, ours, theirs, mark="_"):
    """The mean of the paired differences, and its interval: KEY, KEY_low, KEY_high."""
    mean, low, high = measure.paired_interval(ours, theirs)
    return {key: mean, f"{key}{mark}low": low, f"{key}{mark}high": high}


def sweep(run, jobs, title):
    """run(job) for each job, two at a time; the results in the order of the jobs.

    Each result is written to `_build/sweeps` as it comes, so that a sweep that was
    stopped goes on where it was. Results of other code are not taken: the files carry a
    digest of the sweep's own file, of this one and of the training loop.
    """
    path = SCRATCH / f"{re.sub(r'[^a-z0-9]+', '-', title)}-{digest(run)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = finished(path)
    left = [job for job in jobs if json.dumps(job) not in done]
    with (
        multiprocessing.get_context("spawn").Pool(WORKERS) as pool,
        path.open("a", encoding="utf8") as f,
    ):
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(left), desc=title)
        for job, result in zip(left, pool.imap(run, left), strict=False):
            f.write(json.dumps([job, result]) + "\n")
            f.flush()
            done[json.dumps(job)] = json.loads(json.dumps(result))
            bar.update()

    return [done[json.dumps(job)] for job in jobs]


def finished(path):
    """{job as JSON: result} of a sweep's file; the row that a kill tore is cut off."""
    if not path.is_file():
        return {}

    text = path.read_text("utf8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf8")
    rows = [json.loads(row) for row in whole.splitlines()]
    return {json.dumps(job): result for job, result in rows}


def digest(run):
    """Of the code that a sweep's results depend on, as far as the sweep can tell."""
    files = [inspect.getfile(run), __file__, inspect.getfile(train)]
    text = "".join(Path(file).read_text("utf8") for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def store(name, runs, **more):
    """Write `book/results/NAME.json`: the machine, the settings, every run."""
    results.save(name, dict(machine=measure.machine(), runs=runs, **more))
