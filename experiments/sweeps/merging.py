"""A trained QLoRA merged, and the error as a curve over the size of its change.

The task needs a small change only: dates written out in Portuguese, "2026-03-12 = 12 de
março de 2026", without the "pt: " that tells tiny-decoder to. It knows how; it has to
be brought to do it. LoRA r=8 on all linears over NF4, doubly quantized, products in
float32. The learning rate sets the size of the change, from a hundredth of the weights
to a quarter; at the lowest the task is not learned to the end. Five seeds of each, and
one of French, which needs a larger change. Training runs over the unpacked base: its
gradients are QLoRA's, and it is quicker.

Each run is merged

- `16`: W4 + dW, rounded to bfloat16 (W4 are the weights of the packed base, unpacked);
- `4`: W4 + dW, packed again as the base was, which is `qlora.merge(model, 4)`;
- `checkpoint`: W + dW in bfloat16, W being the weights from before the base was packed;
- `afterwards`: W + dW, packed only then.

All answer with products in float32. Five minutes on one core."""

import copy

import torch

from experiments.common import differences, graded, store, sweep
from experiments.sweeps.families import rendered
from peftlab import lora, nf4, qlora
from peftlab.kit import base_models
from peftlab.kit.results import share, where
from peftlab.kit.train import train
from tools.figures import refresh_pages

BATCH = 16
RATES = {1e-4: 100, 3e-4: 100, 1e-3: 50, 3e-3: 40, 1e-2: 40}  # {learning rate: steps}
FRENCH = (3e-4, 200, 0, "fr")  # learning rate, steps, seed
SEEDS = range(5)
PACKING = dict(compute_dtype=torch.float32)  # the rest is qlora's: NF4, twice
INTO = ("16", "4", "checkpoint", "afterwards")


def packed():
    """tiny-decoder with a QLoRA that changes nothing yet, and its tokenizer."""
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    return qlora.add(model, "all-linear", r=8, alpha=16, **PACKING), tokenizer


def trained(lr, steps, seed, language):
    """A QLoRA that writes dates in a language unasked, and its tokenizer."""
    model, tokenizer = packed()
    torch.manual_seed(seed)
    plain = lora.add(qlora.merge(copy.deepcopy(model)), "all-linear", r=8, alpha=16)
    lines = rendered(language, 3600, "train", seed)
    train(plain, tokenizer, lines, steps, lr, BATCH, seed, progress=False)
    qlora.load_state_dict(model, lora.state_dict(plain))
    return model.eval(), tokenizer


@torch.no_grad()
def parts(model):
    """{path: (W4, dW)} of a model that carries QLoRA."""
    found = {}
    for path, m in model.named_modules():
        if isinstance(m, lora.LoRALinear):
            dW = m.scaling * (m.lora_B @ m.lora_A)
            found[path] = nf4.dequantize(m.base, torch.float32), dW
    return found


def packed_again(W):
    return nf4.dequantize(nf4.quantize(W, double_quant=True))


@torch.no_grad()
def half_steps(weight):
    """For each weight of a matrix, half the gap between its value of NF4's sixteen and
    the next ones, on average of both sides, times the absmax of its block."""
    q = nf4.quantize(weight)
    half = nf4.NF4.diff() / 2
    each = torch.cat([half[:1], (half[1:] + half[:-1]) / 2, half[-1:]])
    index = torch.stack([q.codes >> 4, q.codes & 15], -1).flatten()
    return each[index.int()].view(-1, 64) * q.absmax[:, None]


def rms(tensors):
    total = sum(t.double().square().sum() for t in tensors)
    return (total / sum(t.numel() for t in tensors)).sqrt().item()


def errors(start, merged, wanted, dW):
    """Over all layers: how far the merged weights are from W4 + dW, over dW's size; and
    the share of dW that the merge has added to the weights that it started from."""
    off = [merged[path] - wanted[path] for path in dW]
    dots = sum(((merged[p] - start[p]) * d).double().sum() for p, d in dW.items())
    squares = sum(d.double().square().sum() for d in dW.values())
    return dict(error=rms(off) / rms(dW.values()), kept=(dots / squares).item())


def one(job):
    """One run: (learning rate, steps, seed, language)."""
    lr, steps, seed, language = job
    torch.set_num_threads(1)
    model, tokenizer = trained(lr, steps, seed, language)
    test = rendered(language, 400, "test")
    plain, _ = base_models.load("tiny-decoder", device="cpu")
    W = {p: plain.get_submodule(p).weight.detach().clone() for p in parts(model)}
    W4 = {path: pair[0] for path, pair in parts(model).items()}
    dW = {path: pair[1] for path, pair in parts(model).items()}
    wanted = {path: W4[path] + dW[path] for path in dW}

    run = dict(lr=lr, steps=steps, seed=seed, language=language)
    run["size"] = rms(dW.values()) / rms(W.values())
    run["half_steps"] = rms(dW.values()) / rms([half_steps(w) for w in W.values()])
    run["unmerged"], _ = graded(model, tokenizer, test)
    new = {
        "16": {p: w.bfloat16().float() for p, w in wanted.items()},
        "4": read(qlora.merge(copy.deepcopy(model), 4), dW),
        "checkpoint": {p: (w + dW[p]).bfloat16().float() for p, w in W.items()},
        "afterwards": {p: packed_again(w + dW[p]) for p, w in W.items()},
    }
    for name, weights in new.items():
        start = W if name == "checkpoint" else W4
        found = errors(start, weights, wanted, dW)
        run |= {f"{name}.{key}": value for key, value in found.items()}
        for path, w in weights.items():
            plain.get_submodule(path).weight.data.copy_(w)
        run[name], _ = graded(plain, tokenizer, test)
    return run


def read(model, paths):
    """The weights of a model's packed layers."""
    return {p: nf4.dequantize(model.get_submodule(p), torch.float32) for p in paths}


def frozen():
    """Bits of the packed base, and the size of half a step beside that of a weight."""
    model, tokenizer = packed()
    W = [pair[0] for pair in parts(model).values()]
    step = rms([half_steps(w) for w in W]) / rms(W)
    return graded(model, tokenizer, rendered("pt", 400, "test"))[0], step


def derive(runs, before, step):
    """Means over the seeds, and what each way to merge loses, with a t interval."""
    figures = {"frozen": share(before), "half_step": step}
    for place, lr in enumerate(RATES, 1):
        mine = where(runs, lr=lr, language="pt")
        for key in ("size", "half_steps", *(f"{n}.error" for n in INTO)):
            figures[f"{place}.{key}"] = sum(r[key] for r in mine) / len(mine)
        for name in INTO:
            kept = [r[f"{name}.kept"] for r in mine]
            figures[f"{place}.{name}.kept"] = sum(kept) / len(kept)
        whole = [share(r["unmerged"]) for r in mine]
        for name in ("unmerged", *INTO):
            bits = [share(r[name]) for r in mine]
            key = f"{place}.{name}"
            figures[key] = sum(bits) / len(bits)
            figures[f"{key}.lowest"] = min(bits)
            figures[f"{key}.highest"] = max(bits)
            if name != "unmerged":
                figures |= differences(f"{key}.lost", whole, bits)
    (french,) = where(runs, language="fr")
    figures["fr.size"] = french["size"]
    figures |= {f"fr.{n}": share(french[n]) for n in ("unmerged", *INTO)}
    return {k: dict(value=v, tolerance=0.05) for k, v in figures.items()}


def main():
    pairs = RATES.items()
    jobs = [(lr, n, seed, "pt") for seed in SEEDS for lr, n in pairs] + [FRENCH]
    runs = sweep(one, jobs, "merging")
    before, step = frozen()
    figures = derive(runs, before, step)
    setting = dict(batch=BATCH, r=8, alpha=16)
    store("merging", runs, figures=figures, frozen=before, setting=setting)
    refresh_pages()
    for key, figure in figures.items():
        print(f"{key:28} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
