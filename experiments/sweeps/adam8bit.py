"""Adam's states in a byte: does the loss follow 32-bit Adam, and what does it weigh?

Finnish dates, all weights, 200 steps of 16 at 1e-3, three seeds, the same batches for
torch's AdamW, ours, the library's AdamW8bit, and the library's with its own exact
kernel in place of its CPU's table, which rounds v to zero. Some eight minutes on two
cores."""

import contextlib
from importlib.metadata import version
from itertools import islice

import bitsandbytes.backends.cpu.ops as cpu
import torch
from bitsandbytes.optim import AdamW8bit

from experiments.common import records, scores, store, sweep
from peftlab import adam8bit
from peftlab.kit import base_models, data, measure
from peftlab.kit.results import share, shares, where
from peftlab.kit.train import batches, collate

OPTIMIZERS = dict(
    AdamW=torch.optim.AdamW,
    Adam8bit=adam8bit.Adam8bit,
    AdamW8bit=AdamW8bit,
    nearest=AdamW8bit,
)
SEEDS, RATE, STEPS, BATCH = range(3), 1e-3, 200, 16


def exact(x, code, blocksize=256):
    """(codes, absmax) by the kernel that bitsandbytes has for devices without one of
    their own: it finds the nearest code, where its CPU looks in 65,536 bins."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    kernel = torch.ops.bitsandbytes.quantize_blockwise.default
    return kernel.redispatch(key, x, code, blocksize)


@contextlib.contextmanager
def nearest_codes():
    """Within it the library's optimizers pack their states with `exact`."""

    def pack(x, code, absmax, codes, blocksize):
        exact_codes, exact_absmax = exact(x, code, blocksize)
        codes.copy_(exact_codes)
        absmax.copy_(exact_absmax)

    table, cpu._quant_blockwise_fp32_direct = cpu._quant_blockwise_fp32_direct, pack
    try:
        yield
    finally:
        cpu._quant_blockwise_fp32_direct = table


def tune(name, seed, steps=STEPS):
    """A copy of tiny-decoder after the first `steps` of STEPS steps; returns (model,
    tokenizer, optimizer, the loss of each step, the largest |change of a weight| / lr).

    Data, batches and schedule are those of experiments.common.tune."""
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(seed)
    weights, losses, largest = [*model.parameters()], [], 0.0
    optimizer = OPTIMIZERS[name](weights, RATE, weight_decay=0.0)
    warm = STEPS // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (STEPS - s) / (STEPS - warm))
    )
    source = batches(records("dates", ["fi"], 3600, "train", seed), BATCH, seed)
    for batch in islice(source, steps):
        loss = model.train()(**collate(batch, tokenizer)).loss
        loss.backward()
        before = [w.detach().clone() for w in weights]
        with nearest_codes() if name == "nearest" else contextlib.nullcontext():
            optimizer.step()
        moved = max((w - b).abs().max() for w, b in zip(weights, before, strict=True))
        largest = max(largest, moved.item() / schedule.get_last_lr()[0])
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), tokenizer, optimizer, losses, largest


def state_bytes(optimizer, least=1):
    """Bytes of m and v, with all that unpacking them needs, of the weights of `least`
    elements and more, counted from the storages (torch's step is a tensor too)."""
    states = [s.values() for p, s in optimizer.state.items() if p.numel() >= least]
    tensors = [t for s in states for t in s if torch.is_tensor(t)]
    return measure.nbytes(t for t in tensors if t.dim())


@torch.no_grad()
def held_out(model, tokenizer, lines):
    """Mean loss of a token of the answers of `lines`, in batches of 100."""
    parts = [lines[i : i + 100] for i in range(0, len(lines), 100)]
    total = [model(**collate(part, tokenizer)).loss.item() for part in parts]
    return sum(total) / len(total)


def one(job):
    name, seed = job
    model, tokenizer, optimizer, losses, largest = tune(name, seed)
    curve = [sum(losses[i : i + 20]) / 20 for i in range(0, STEPS, 20)]
    run = dict(optimizer=name, seed=seed, curve=curve, largest=largest)
    test = records("dates", ["fi"], 400, "test")
    run |= dict(final=curve[-1], held_out=held_out(model, tokenizer, test))
    run |= dict(bytes=state_bytes(optimizer), large=state_bytes(optimizer, 4096))
    run |= dict(countries=countries(model, tokenizer))
    return run | scores(model, tokenizer, ["fi"], 400)


def countries(model, tokenizer):
    """Bits on country names in the base languages: words that no date has."""
    test = records("countries", data.BASE_LANGUAGES, 15, "test")
    return "".join("01"[right] for right in measure.answered(model, tokenizer, test))


def derive(runs):
    """Means over the seeds, the spread of 32-bit Adam's losses, the share of bytes."""
    mean = {}
    for name in OPTIMIZERS:
        mine = where(runs, optimizer=name)
        for key in ("final", "held_out", "bytes", "large"):
            mean[f"{name}.{key}"] = sum(r[key] for r in mine) / len(mine)
        for key in ("learned", "base", "countries"):
            mean[f"{name}.{key}"] = sum(shares(mine, key)) / len(mine)
        mean[f"{name}.largest"] = max(r["largest"] for r in mine)
        for key in ("bytes", "large"):
            mean[f"{name}.{key}.share"] = mean[f"{name}.{key}"] / mean[f"AdamW.{key}"]
    for key in ("final", "held_out"):
        losses = {n: [r[key] for r in where(runs, optimizer=n)] for n in OPTIMIZERS}
        mean[f"spread.{key}"] = max(losses["AdamW"]) - min(losses["AdamW"])
        pairs = zip(losses["Adam8bit"], losses["AdamW"], strict=True)
        mean[f"gap.{key}"] = max(abs(a - b) for a, b in pairs)
    return mean


def tolerance(key):
    """How far another machine's figure may be: bytes do not differ, giant steps do."""
    if "bytes" in key or "large." in f"{key}.":
        return 0.0
    return 5000.0 if key == "nearest.largest" else 5.0 if "largest" in key else 0.05


def main():
    jobs = [(name, seed) for name in OPTIMIZERS for seed in SEEDS]
    runs = sweep(one, jobs, "8-bit Adam")
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    frozen = countries(model, tokenizer)
    found = derive(runs) | {"frozen.countries": share(frozen)}
    figures = {k: dict(value=v, tolerance=tolerance(k)) for k, v in found.items()}
    setting = dict(language="fi", steps=STEPS, batch=BATCH, lr=RATE)
    setting |= dict(bitsandbytes=version("bitsandbytes"))
    store("adam8bit", runs, figures=figures, frozen=frozen, setting=setting)
    for name in OPTIMIZERS:
        keys = ("final", "held_out", "learned", "countries", "largest", "bytes.share")
        print(f"{name:10}", *(f"{k} {found[f'{name}.{k}']:.4g}" for k in keys))


if __name__ == "__main__":
    main()
