"""One new language: learning rates, what is forgotten, and the shape of the change.

Finnish dates, 16 a step, gradients clipped at a norm of 1, five seeds of everything:

- `runs`: 100 steps, every method at five learning rates;
- `changes`: 200 steps at each method's best rate, with and without a quarter of replay,
  with the spectrum of the change, its truncations and its intruder dimensions;
- `gentle`: 500 steps at learning rates that move the weights far less.

Beside every result stands the size of the change, ||dW|| / ||W||, and what merging it
in 16 bits would lose. Some twenty minutes on two cores."""

import torch

from experiments.common import best_rate, scores, share, store, sweep, tune
from peftlab import lora
from peftlab.kit import base_models, measure
from peftlab.kit.data import records

RATES = {
    "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "LoRA r=1": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "LoRA r=8": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
GENTLE = {"full": (1e-4, 3e-4), "LoRA r=8": (1e-3, 3e-3)}
SEEDS = range(5)
RANKS = (1, 2, 4, 8, 16, 32, 64)


def one_rate(job):
    method, lr, seed, steps = job
    model, tokenizer = tune(["fi"], method, lr, seed, steps, clip=1.0)
    bits = scores(model, tokenizer, ["fi"], 400)
    change = size(model, method)
    return dict(method=method, lr=lr, seed=seed, **bits, **change)


def linears(model):
    """{path: weight} of the linear layers in the decoder's blocks, merged."""
    return {
        name.removesuffix(".weight"): p.detach()
        for name, p in model.named_parameters()
        if p.dim() == 2 and ".layers." in name
    }


def size(model, method):
    """How far a trained model's weights moved; its LoRA is merged, in place.

    Returns:
        change: ||dW|| / ||W||; bfloat16, float16: the error of W + dW rounded to this
        type, as a share of ||dW||, where W itself is of this type. Each is the mean
        over the linear layers.
    """
    if method != "full":
        lora.merge(model)
    base, _ = base_models.load("tiny-decoder", device="cpu")
    before, after = linears(base), linears(model)

    found = {"change": [], "bfloat16": [], "float16": []}
    for path, weight in before.items():
        change = after[path] - weight
        found["change"].append(change.norm() / weight.norm())
        for dtype in (torch.bfloat16, torch.float16):
            stored = weight.to(dtype).float()
            merged = (stored + change).to(dtype).float()
            lost = merged - stored - change
            found[str(dtype).removeprefix("torch.")].append(lost.norm() / change.norm())

    return {key: torch.stack(values).mean().item() for key, values in found.items()}


def energy_rank(matrix, share=0.9):
    """How many singular values hold 90% of the sum of their squares."""
    energy = torch.linalg.svdvals(matrix).square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def intruders(before, after, top=10, threshold=0.5):
    """Of the top singular vectors after, how many are close to none before
    (2410.21228)."""
    old, new = torch.linalg.svd(before)[0], torch.linalg.svd(after)[0][:, :top]
    return int(((old.T @ new).abs().max(0).values < threshold).sum())


@torch.no_grad()
def truncated(base, model, tokenizer, rank, test):
    """Exact match with each layer's change cut to its best approximation of a rank."""
    before, after = linears(base), linears(model)
    kept = {path: w.clone() for path, w in after.items()}
    for path, w in after.items():
        u, s, v = torch.linalg.svd(w - before[path], full_matrices=False)
        w.copy_(before[path] + (u[:, :rank] * s[:rank]) @ v[:rank])
    bits = measure.answered(model, tokenizer, test)
    for path, w in after.items():
        w.copy_(kept[path])
    return sum(bits) / len(bits)


def one_change(job):
    method, lr, seed, replay = job
    how = dict(steps=200, replay=replay, clip=1.0)
    model, tokenizer = tune(["fi"], method, lr, seed, **how)
    found = dict(method=method, lr=lr, seed=seed, replay=replay)
    found |= scores(model, tokenizer, ["fi"], 400)
    if replay:
        return found
    found["moved"] = size(model, method)
    base, _ = base_models.load("tiny-decoder", device="cpu")
    before, after = linears(base), linears(model)
    change = {path: after[path] - before[path] for path in before}
    found["intruders"] = {p: intruders(before[p], after[p]) for p in before}
    found["change"] = {p: (change[p].norm() / before[p].norm()).item() for p in before}
    if method == "full":
        test = records("dates", "fi", 200, "test")
        noise = torch.Generator().manual_seed(seed)
        found["rank90"] = {p: energy_rank(d) for p, d in change.items()}
        found["rank90_random"] = {
            p: energy_rank(torch.randn(d.shape, generator=noise))
            for p, d in change.items()
        }
        found["rank90_weight"] = {p: energy_rank(w) for p, w in before.items()}
        found["truncated"] = {
            str(r): truncated(base, model, tokenizer, r, test) for r in RANKS
        }
    return found


def main():
    jobs = [(m, lr, seed, 100) for m in RATES for lr in RATES[m] for seed in SEEDS]
    runs = sweep(one_rate, jobs, "finnish: rates")
    best = {m: best_rate(runs, m) for m in RATES}
    for m, lr in best.items():
        mine = [share(r["learned"]) for r in runs if (r["method"], r["lr"]) == (m, lr)]
        print(f"{m}: best rate {lr:g}, Finnish {sum(mine) / len(mine):.3f}")
    jobs = [
        (m, best[m], seed, rep) for m in RATES for rep in (0.0, 0.25) for seed in SEEDS
    ]
    changes = sweep(one_change, jobs, "finnish: changes")
    jobs = [(m, lr, seed, 500) for m in GENTLE for lr in GENTLE[m] for seed in SEEDS]
    gentle = sweep(one_rate, jobs, "finnish: gentle rates")
    store(
        "finnish",
        runs,
        best=best,
        changes=changes,
        gentle=gentle,
        steps=dict(runs=100, changes=200, gentle=500),
        batch=16,
    )


if __name__ == "__main__":
    main()
