"""How many codes does an adapter hold? Facts learned by heart, over its rank.

A fact is a title of ICD-10-CM and a code of a letter and two digits. In `random` the
code is drawn: nothing about it can be guessed from the title, so each fact takes
log2(2300) = 11.17 bits (23 letters that are one token of tiny-decoder, two digits). In
`real` it is the title's own category.

LoRA sits on all seven linears of tiny-decoder's last layer; the layers below are frozen
and the same in every step, so they are computed once. 600 steps of AdamW, each on all
facts together: 600 exposures a fact.

Measured are the facts held (the greedy answer is right to the letter) and the bits
stored, as in Allen-Zhu and Li 2024: those that all codes take, less those that the
model still needs to write them down, its cross-entropy. Both also after half of the
steps and three quarters. Some 15 minutes on one free core."""

import math
import random

import torch

from experiments.common import store, sweep
from peftlab import lora
from peftlab.kit import base_models, icd
from peftlab.kit.results import where

STEPS, RATE, WARMUP = 600, 0.02, 20
LETTERS = "ABCDEFGHIJKLMNPRSTUVWYZ"  # O, Q and X are two tokens
BITS = math.log2(len(LETTERS) * 100)
RANKS, SIZES = (1, 2, 4, 8), (32, 64, 128, 256, 512)
MORE = (8, 1024)  # rank and facts: 512 do not fill rank 8
SEEDS = range(2)
REAL = (2, 256)  # rank and facts of the runs with real codes
LONGEST = 14  # tokens of a prompt


def titles(tokenizer):
    """(title, category) of every title that is short and in one category only."""
    pairs = icd.titles(40, rf"[{LETTERS}]\d\d")
    lengths = map(len, tokenizer([f"{title} =" for title, _ in pairs])["input_ids"])
    short = zip(pairs, lengths, strict=True)
    return [pair for pair, length in short if length <= LONGEST]


def facts(kind, n, seed, tokenizer):
    """n pairs (title, code)."""
    rng = random.Random(seed)
    drawn = rng.sample(titles(tokenizer), n)
    if kind == "real":
        return drawn
    return [(t, rng.choice(LETTERS) + f"{rng.randrange(100):02}") for t, _ in drawn]


class LastLayer:
    """tiny-decoder's last layer, on what the layers below make of the prompts."""

    def __init__(self, model, tokenizer, pairs):
        self.model = model
        self.layer = model.model.layers[-1]
        prompts = [f"{title} =" for title, _ in pairs]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        codes = [f" {code}" for _, code in pairs]
        codes = tokenizer(codes, add_special_tokens=False)["input_ids"]
        self.answers = torch.tensor(codes)  # (facts, 3)
        ids = torch.cat([inputs["input_ids"], self.answers[:, :2]], dim=1)
        there = inputs["attention_mask"].bool()
        there = torch.nn.functional.pad(there, (0, 2), value=True)

        length = ids.shape[1]
        causal = torch.ones(length, length).tril().bool()
        seen = causal & there[:, None] | torch.eye(length).bool()
        self.seen = seen[:, None]  # (facts, 1, T, T)
        self.positions = model.model.rotary_emb(
            model.lm_head.weight, torch.arange(length)[None]
        )
        with torch.no_grad():
            out = model(
                input_ids=ids, attention_mask=there.long(), output_hidden_states=True
            )
        self.inputs = out.hidden_states[-2]  # (facts, T, width)
        self.whole = out.logits[:, -3:]

    def logits(self):
        """(facts, 3, tokens), for the three tokens of each answer."""
        layer, x = self.layer, self.inputs
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(x),
            position_embeddings=self.positions,
            attention_mask=self.seen,
        )
        x = (x + attended)[:, -3:]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(self.model.model.norm(x))

    @torch.no_grad()
    def score(self):
        """How many facts are held, and the bits that they take less those missing."""
        logits = self.logits()
        held = (logits.argmax(-1) == self.answers).all(1).sum().item()
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), self.answers.flatten(), reduction="sum"
        )
        bits = len(self.answers) * BITS - nats.item() / math.log(2)
        return held, round(bits, 1)


def one(job):
    """One run: (kind, rank, facts, seed)."""
    kind, r, n, seed = job
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    last = LastLayer(model, tokenizer, facts(kind, n, seed, tokenizer))
    if not torch.allclose(last.logits(), last.whole, atol=1e-4):
        raise ValueError("the last layer alone does not give the model's logits")

    torch.manual_seed(seed)
    lora.add(model, "all-linear", r=r, alpha=2 * r)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name and ".layers.3." in name)
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    run = dict(kind=kind, r=r, n=n, seed=seed)
    run["parameters"] = sum(w.numel() for w in trained)
    run["course"] = {}
    for step in range(1, STEPS + 1):
        factor = min(step / WARMUP, 1, 2 * (1 - (step - 1) / STEPS))
        optimizer.param_groups[0]["lr"] = RATE * factor
        loss = torch.nn.functional.cross_entropy(
            last.logits().flatten(0, 1), last.answers.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step * 4 % STEPS == 0 and step * 2 >= STEPS:
            run["course"][step] = last.score()
    run["held"], run["bits"] = last.score()
    return run


def derive(runs):
    """Means over the seeds, and what a rank holds at most."""
    figures = {}
    for r in RANKS:
        mine = [run for run in runs if run["r"] == r and run["kind"] == "random"]
        figures[f"r{r}.parameters"] = mine[0]["parameters"]
        most = {}
        for n in sorted({run["n"] for run in mine}):
            same = where(mine, n=n)
            held = [run["held"] for run in same]
            bits = [run["bits"] for run in same]
            figures[f"r{r}.n{n}.held"] = sum(held) / len(held)
            figures[f"r{r}.n{n}.share"] = sum(held) / len(held) / n
            most[n] = figures[f"r{r}.n{n}.bits"] = sum(bits) / len(bits)
        best = max(most, key=most.get)
        figures[f"r{r}.most"] = most[best]
        figures[f"r{r}.most.n"] = best
        figures[f"r{r}.each"] = most[best] / mine[0]["parameters"]
        before = [run["course"][str(STEPS * 3 // 4)][1] for run in where(mine, n=best)]
        figures[f"r{r}.late"] = most[best] / (sum(before) / len(before)) - 1
    r, n = REAL
    for kind in ("real", "random"):
        held = [run["held"] for run in where(runs, kind=kind, r=r, n=n)]
        figures[f"{kind}.share"] = sum(held) / len(held) / n
    return {key: dict(value=float(v), tolerance=0) for key, v in figures.items()}


def main():
    jobs = [
        (kind, r, n, seed)
        for seed in SEEDS
        for kind, r, n in [
            *(("random", r, n) for r in RANKS for n in SIZES),
            ("random", *MORE),
            ("real", *REAL),
        ]
    ]
    runs = sweep(one, jobs, "medical capacity")
    figures = derive(runs)
    setting = dict(steps=STEPS, rate=RATE, bits=BITS)
    store("medical_capacity", runs, figures=figures, setting=setting)
    for key, figure in figures.items():
        print(f"{key:28} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
