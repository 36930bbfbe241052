"""QLoRA beside LoRA on one new language, and what is left of it after merging.

Finnish dates, 200 steps of 16, at the rate that `families` found for LoRA; r=8 on all
linears, five seeds. LoRA's base is float32; QLoRA's is packed to NF4, FP4 or INT4,
doubly quantized, with products in bfloat16. Each NF4 run is then merged into 16 bits,
which on this model means its own float32; into 4 bits; and once more as A and B on a
base in bfloat16, merged into that. Some fifteen minutes on two cores."""

import copy

import torch

from experiments.common import BASES, records, store, sweep
from peftlab import int8, lora, nf4, qlora, surgery
from peftlab.kit import base_models, measure
from peftlab.kit.results import share, table, where
from peftlab.kit.train import collate, train
from tools.figures import refresh_pages

LAST = 0.9677083  # the probability below NF4's largest value, before it is made 1
CODES = {"NF4": nf4.NF4, "FP4": nf4.FP4, "INT4": nf4.INT4}
SEEDS, STEPS, RATE, BATCH, R = range(5), 200, 1e-2, 16, dict(r=8, alpha=16)
# The NF4 run on its float32 model, and its A and B on a bfloat16 one: {name: bits}.
STATES = {"unmerged": None, "merged16": 16, "merged4": 4}
BF16_STATES = {"bf16.unmerged": None, "bf16.merged16": 16}


def start(name, dtype=torch.float32):
    """tiny-decoder with LoRA over a plain base or a packed one: (model, tokenizer)."""
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    if name == "LoRA":
        return lora.add(model.to(dtype), "all-linear", **R), tokenizer
    return qlora.add(model.to(dtype), **R, code=CODES[name]), tokenizer


def one(job):
    """One run: train and ask; after NF4 also merge and ask again."""
    name, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer = start(name)
    lines = records("dates", ["fi"], 3600, "train", seed)
    options = dict(progress=False, max_grad_norm=None)
    train(model, tokenizer, lines, STEPS, RATE, BATCH, seed, **options)
    test = records("dates", ["fi"], 400, "test")
    run = dict(method=name, seed=seed, lr=RATE, learned=bits(model, tokenizer, test))
    if name == "NF4":
        half, _ = start(name, torch.bfloat16)
        qlora.load_state_dict(half, qlora.state_dict(model))
        run |= states(model, STATES, tokenizer, test)
        run |= states(half.eval(), BF16_STATES, tokenizer, test)
    return run


def bits(model, tokenizer, lines):
    """One character a record keeps the file readable and the bootstrap possible."""
    return "".join("01"[x] for x in measure.answered(model, tokenizer, lines))


def states(model, wanted, tokenizer, test):
    """{NAME.key: value} of each state: right answers, and errors against the packed
    base and its LoRA with no rounding at all: of all weights over their size, and over
    the size of the change s B A; of the logits over theirs."""
    found, change = {}, weights(model) - weights(model, change=False)
    size, batch = weights(model).norm(), collate(test[:100], tokenizer)
    answer = logits(exact(model), batch)
    for name, into in wanted.items():
        twin = copy.deepcopy(model)
        twin = qlora.merge(twin, into) if into else twin
        error = (weights(twin) - weights(model)).norm()
        gap = (logits(twin, batch) - answer).norm()
        found |= {
            f"{name}.bits": bits(twin, tokenizer, test),
            f"{name}.weights": (error / size).item(),
            f"{name}.change": (error / change.norm()).item(),
            f"{name}.outputs": (gap / answer.norm()).item(),
        }
    return found


@torch.no_grad()
def logits(model, batch):
    """In a row, those of padding left out."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = model(input_ids=ids, attention_mask=mask).logits
    return found[mask.bool()].double()


def exact(model):
    """The same codes and the same LoRA, with every product in float32."""
    model = copy.deepcopy(model).float()
    for m in model.modules():
        if isinstance(m, nf4.NF4Linear):
            m.compute_dtype = None
    return model


@torch.no_grad()
def weights(model, change=True):
    """All linears' weights but the head's in a row, with s B A or without."""
    above = {m.base: m for m in model.modules() if isinstance(m, lora.LoRALinear)}
    rows = []
    for m in surgery.select(model, "all-linear"):
        packed = isinstance(m, nf4.NF4Linear)
        weight = nf4.dequantize(m, torch.float32) if packed else m.weight
        rows.append(weight.double())
        if change and m in above:
            a, b = above[m].lora_A.double(), above[m].lora_B.double()
            rows[-1] = rows[-1] + above[m].scaling * b @ a
    return torch.cat([w.flatten() for w in rows])


def rounding():
    """{key: number}: bits a weight from real bytes, and RMS errors over the RMS of the
    weights, of tiny-decoder's linears and of normal numbers; how often these have the
    values at NF4's zero and ends, and where those ends lie."""
    plain = surgery.select(
        base_models.load("tiny-decoder", device="cpu")[0], "all-linear"
    )
    own = [m.weight.detach() for m in plain]
    dice = torch.Generator().manual_seed(0)
    sets = dict(model=own, normal=[torch.randn(2**20, generator=dice)])
    found = {"LoRA.bits": 8.0 * own[0].element_size()}
    for name, code in CODES.items():
        packed = [nf4.quantize(w, code=code, double_quant=True) for w in own]
        total = sum(q.bits() * q.shape.numel() for q in packed)
        found[f"{name}.bits"] = total / sum(w.numel() for w in own)
        for key, some in sets.items():
            for twice, kind in ((False, "rms"), (True, "rms_double")):
                back = [nf4.dequantize(nf4.quantize(w, 64, code, twice)) for w in some]
                found[f"{name}.{kind}.{key}"] = rms(some, back)
    for key, some in sets.items():
        back = [int8.dequantize(int8.quantize(w, blocksize=64)) for w in some]
        found[f"int8.rms.{key}"] = rms(some, back)
    q = nf4.quantize(*sets["normal"])
    used = torch.stack([q.codes >> 4, q.codes & 15]).flatten().bincount() / 2**20
    ends = dict(zero=used[7], low=used[0], high=used[15], largest=q.absmax.mean())
    found |= {f"NF4.normal.{name}": x.item() for name, x in ends.items()}
    found["NF4.end"] = torch.special.ndtri(torch.tensor(LAST).double()).item()
    return found


def rms(some, back):
    gap = sum((a - b).square().sum() for a, b in zip(some, back, strict=True))
    return (gap / sum(a.square().sum() for a in some)).sqrt().item()


def frozen(name):
    """Base languages' dates that the base answers before any training."""
    torch.set_num_threads(1)
    model, tokenizer = start(name)
    return bits(model, tokenizer, records("dates", BASES, 40, "test"))


def compare(figures, name, rows, other):
    """Keep the mean, the gap to the other's and its 95% interval, lowest, highest."""
    gap, low, high = measure.interval(rows, other)
    means = [sum(row) / len(row) for row in rows]
    found = dict(learned=sum(means) / len(means), gap=gap, gap_low=low, gap_high=high)
    found |= dict(lowest=min(means), highest=max(means))
    for key, value in found.items():
        figures[f"{name}.{key}"] = dict(value=value, tolerance=0.05)


def derive(runs, before, found):
    """What the pages quote: methods against LoRA, states against the unmerged run."""
    figures = {k: dict(value=v, tolerance=0.001 * v) for k, v in found.items()}
    mine = {name: where(runs, method=name) for name in before}
    for name, rows in mine.items():
        compare(figures, name, table(rows, "learned"), table(mine["LoRA"], "learned"))
        figures[f"{name}.frozen"] = dict(value=share(before[name]), tolerance=0.02)
    rows = mine["NF4"]
    for name in (*STATES, *BF16_STATES):
        unmerged = table(rows, "unmerged.bits")
        compare(figures, name, table(rows, f"{name}.bits"), unmerged)
        for key in ("weights", "change", "outputs"):
            value = sum(r[f"{name}.{key}"] for r in rows) / len(rows)
            figures[f"{name}.{key}"] = dict(value=value, tolerance=0.2 * value)
    return figures


def main():
    names = ("LoRA", *CODES)
    runs = sweep(one, [(n, seed) for n in names for seed in SEEDS], "QLoRA")
    before = dict(zip(names, sweep(frozen, names, "frozen"), strict=True))
    figures = derive(runs, before, rounding())
    setting = dict(steps=STEPS, batch=BATCH, lr=RATE, language="fi", **R)
    store("qlora", runs, figures=figures, frozen=before, setting=setting)
    refresh_pages()
    for key, figure in figures.items():
        print(f"{key:24} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
