"""Reinforcement learning with exact match as the reward: rank 1, rank 8, every weight.

tiny-decoder first learns a little Finnish from right answers (LoRA, 45 steps, merged):
it then parses a third of new dates. From there on it sees no answer, only whether its
own was right. A step samples eight answers to each of sixteen new dates; an answer's
advantage is its reward minus the mean of its group; one step of AdamW, gradients
clipped at 1, no KL term. Fifty steps, five seeds, each method's learning rate searched
on development dates with all five. A seed draws the dates, A's start and the samples;
all methods of a seed get the same dates.

Beside them, from the same start: fifty steps on the right answers (`answers`), at the
learning rate that chapter 2 found for LoRA. Twenty minutes on one core."""

import copy
import functools

import torch
from torch.nn import functional as F

from experiments.common import BASES, differences, moved, records, search, store, sweep
from peftlab import lora
from peftlab.kit import base_models, data, measure
from peftlab.kit.results import share, where
from peftlab.kit.train import batches, train
from tools.figures import refresh_pages

WARM = dict(steps=45, lr=0.01, batch_size=16, seed=0)
STEPS, PROMPTS, SAMPLES, RISE = 50, 16, 8, 5
STARTS = {"full": 3e-4, "LoRA r=8": 3e-3, "LoRA r=1": 1e-2}
SEEDS = range(5)
PASS = 16  # samples for pass@k


@functools.cache
def warm():
    """tiny-decoder after a little Finnish, as plain weights, and its tokenizer."""
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(0)
    lora.add(model, "all-linear", r=8, alpha=16)
    dates = data.records("dates", "fi", 3600, "train")
    train(model, tokenizer, dates, progress=False, **WARM)
    return lora.merge(model), tokenizer


def log_probs(model, batch):
    """Of each sequence in a batch, the log-probability of its answer, (batch,)."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1].transpose(1, 2)
    return -F.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").sum(1)


def sample(model, tokenizer, lines, k):
    """k answers to each record as one batch, and their rewards, (records, k)."""
    prompts = tokenizer(
        [r.prompt for r in lines],
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    tokens = model.generate(
        **prompts,
        do_sample=True,
        top_k=0,
        max_new_tokens=12,
        num_return_sequences=k,
    )
    start = prompts["input_ids"].shape[1]
    texts = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    right = [r.answer for r in lines for _ in range(k)]
    reward = [float(t.strip(" ") == a) for t, a in zip(texts, right, strict=True)]
    # An answer goes up to its first end token, whatever token pads it.
    ends = tokens[:, start:] == tokenizer.eos_token_id
    mask = ends.cumsum(1) - ends.long() == 0
    asked = prompts["attention_mask"].repeat_interleave(k, 0)
    labels = tokens.clone()
    labels[:, :start] = -100
    labels[:, start:][~mask] = -100
    attention = torch.cat([asked, mask.long()], 1)
    batch = dict(input_ids=tokens, attention_mask=attention, labels=labels)
    return batch, torch.tensor(reward).view(-1, k)


def reinforce(model, batch, reward):
    """The loss, or None where each group has equal rewards: no gradient then."""
    advantage = (reward - reward.mean(1, keepdim=True)).flatten()
    use = advantage != 0
    if not use.any():
        return None
    some = {key: t[use] for key, t in batch.items()}
    return -(advantage[use] * log_probs(model, some)).sum() / len(advantage)


def reward_run(model, tokenizer, lr, seed, steps=STEPS):
    """Train on rewards; returns the mean reward of each step."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR
    rise = schedule(optimizer, lambda step: min(1, (step + 1) / RISE))
    source = batches(data.records("dates", "fi", 3600, "train", 1), PROMPTS, seed)
    curve = []
    for _ in range(steps):
        batch, reward = sample(model, tokenizer, next(source), SAMPLES)
        loss = reinforce(model, batch, reward)
        if loss is not None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        rise.step()
        curve.append(round(reward.mean().item(), 4))
    return curve


@torch.no_grad()
def entropy(model, batch):
    """Mean entropy of the next token over the answers, in nats."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logp = model(**inputs).logits[:, :-1].log_softmax(-1)
    each = -(logp.exp() * logp).sum(-1)
    return each[batch["labels"][:, 1:] != -100].mean().item()


def measured(model, tokenizer):
    """What a model scores, and how varied its samples are."""
    model.eval()
    sets = dict(
        dev=data.records("dates", "fi", 180, "dev"),
        test=data.records("dates", "fi", 400, "test"),
        base=records("dates", BASES, 20, "test"),
    )
    bits = {k: measure.answered(model, tokenizer, v) for k, v in sets.items()}
    found = {k: "".join("01"[bit] for bit in v) for k, v in bits.items()}
    torch.manual_seed(0)
    batch, reward = sample(model, tokenizer, sets["test"][:100], PASS)
    found["hits"] = reward.sum(1).int().tolist()
    return found | dict(entropy=entropy(model, batch))


def one(job):
    """One run: (method, learning rate, seed)."""
    method, lr, seed = job
    base, tokenizer = warm()
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if method == "full":
        model.requires_grad_(True)
    else:
        r = int(method.partition("r=")[2] or 8)
        lora.add(model, "all-linear", r=r, alpha=2 * r)
    curve = []
    if method == "answers":
        dates = data.records("dates", "fi", 3600, "train", 1)
        train(model, tokenizer, dates, STEPS, lr, PROMPTS, seed, progress=False)
    else:
        curve = reward_run(model, tokenizer, lr, seed)
    found = measured(model, tokenizer)
    if method not in ("full", "answers"):
        lora.merge(model)
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    linear = {p: w.detach() for p, w in before.items() if p.endswith("_proj.weight")}
    size = moved(linear, after) if method != "answers" else 0.0
    return dict(method=method, lr=lr, seed=seed, curve=curve, size=size) | found


def pass_at(hits, k, n=PASS):
    """pass@k without bias from n samples (Chen et al. 2021): 1 - C(n-c,k) / C(n,k)."""
    total = 0.0
    for c in hits:
        miss = 1.0
        for i in range(k):
            miss *= max(0, n - c - i) / (n - i)
        total += 1 - miss
    return total / len(hits)


def derive(runs, best, start):
    """Means over the seeds, the range, and paired differences with a t interval."""
    figures = {
        "start": share(start["test"]),
        "start.sampled": share(start["test"][:100]),
        "start.base": share(start["base"]),
        "start.entropy": start["entropy"],
        **{f"start.pass.{k}": pass_at(start["hits"], k) for k in (1, 4, 16)},
    }
    rows = {m: where(runs, method=m, lr=best[m]) for m in best}
    for method, mine in rows.items():
        tests = [share(r["test"]) for r in mine]
        figures |= {
            f"{method}.rate": best[method],
            f"{method}.test": sum(tests) / len(tests),
            f"{method}.low": min(tests),
            f"{method}.high": max(tests),
            f"{method}.gain": min(tests) - figures["start"],
        }
        # greedy, on the dates of which pass@k takes samples
        first = [share(r["test"][:100]) for r in mine]
        figures[f"{method}.sampled"] = sum(first) / len(first)
        for key in ("entropy", "size"):
            figures[f"{method}.{key}"] = sum(r[key] for r in mine) / len(mine)
        kept = [share(r["base"]) for r in mine]
        figures[f"{method}.base"] = sum(kept) / len(kept)
        for k in (1, 4, 16):
            found = [pass_at(r["hits"], k) for r in mine]
            figures[f"{method}.pass.{k}"] = sum(found) / len(found)
    for method in ("LoRA r=1", "LoRA r=8"):
        ours, full = ([share(r["test"]) for r in rows[m]] for m in (method, "full"))
        figures |= differences(f"{method}.minus", ours, full)
    eight = [share(r["test"]) for r in rows["LoRA r=8"]]
    one_ = [share(r["test"]) for r in rows["LoRA r=1"]]
    figures |= differences("ranks.minus", one_, eight)
    return {k: dict(value=v, tolerance=0.1) for k, v in figures.items()}


def main():
    runs, best = search(one, STARTS, "reward")
    jobs = [("answers", 0.01, seed) for seed in SEEDS]
    runs += sweep(one, jobs, "reward answers")
    best["answers"] = 0.01
    base, tokenizer = warm()
    start = measured(base, tokenizer)
    figures = derive(runs, best, start)
    setting = dict(steps=STEPS, prompts=PROMPTS, samples=SAMPLES, warm=WARM)
    store("reward", runs, best=best, start=start, figures=figures, setting=setting)
    refresh_pages()
    for key, figure in figures.items():
        print(f"{key:28} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
