"""The memory calculator against measured peaks, and what it says of large models.

A cell is a shape, a method and a setting. A real model is built and makes two steps;
the second finds the optimizer with its state. Measured are the bytes of the model, and
the highest point above them that torch's allocator reports. `peftlab.memory` predicts
the same from the shape alone. About ten minutes on one core with AVX512; much longer
without, where bfloat16 is slow.
"""

import copy
import gc
import time

import torch
from tqdm import tqdm
from transformers import LlamaConfig

from peftlab import memory
from peftlab.kit import measure, plot, results
from peftlab.memory import calculator
from peftlab.memory.cards import GIB
from peftlab.memory.tracker import nbytes
from tools.figures import refresh_pages, save_picture

METHODS = ("full", "lora", "qlora")
NEWER = {  # on the three sizes: an 8-bit base, and what peft prepares
    "lora8bit": [{}, dict(checkpointing=True)],
    "qlora": [dict(kbit_prepared=True)],
}
NAMES = dict(full="full", lora="LoRA", qlora="QLoRA")
WIDEST = 160e9  # bytes of the longest bar that is drawn
PARTS = ("weights", "gradients", "optimizer", "activations", "total")


def llama(width, layers, heads, kv_heads, vocab):
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
    )


SIZES = {  # name: config, tokens of a sequence, sequences
    "width 256": (llama(256, 4, 4, 4, 8192), 128, 8),
    "width 512": (llama(512, 6, 8, 2, 16384), 256, 4),
    "width 1024": (llama(1024, 8, 16, 16, 32000), 512, 2),
}
OTHERS = {
    "bert-base": ("bert-base", 128, 4),
    "gpt2": ("gpt2", 256, 2),
    "t5-small": ("t5-small", 128, 4),
}
LINES = (
    "T4 (16 GB)",
    "RTX 3090 or 4090 (24 GB)",
    "L40S (48 GB)",
    "A100 or H100 (80 GB)",
)
OPTIMIZERS = ("adamw8bit", "sgd")  # on the middle size, in full
LARGE = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
LINEARS = ["q_proj", "v_proj"]
CLAIMS = {  # what is said of a model, and the setting that comes nearest
    "65b": dict(config="llama-65b", method="qlora", r=64),
    "65b.small": dict(config="llama-65b", method="qlora", r=16),
    "33b": dict(config="llama-33b", method="qlora", r=64),
    "33b.small": dict(config="llama-33b", method="qlora", r=16),
    "7b": dict(config="llama-2-7b", method="qlora", r=16),
    "65b.full": dict(config="llama-65b", method="full"),
    "65b.bf16": dict(config="llama-65b", method="full", dtype="bfloat16"),
    "gpt3": dict(config="gpt-3", dtype="float16", r=4, targets=LINEARS),
}
CASES = {  # four sequences; with checkpointing where it trains
    "lora8bit": dict(config="llama-2-7b", method="lora8bit", checkpointing=True),
    "inference": dict(config="llama-2-7b", method="inference"),
}
for more in (None, True):
    CASES[f"kbit.{bool(more)}"] = dict(
        config="llama-3-8b", method="qlora", checkpointing=True, kbit_prepared=more
    )
for level in range(4):
    CASES[f"zero.{level}"] = dict(
        config="llama-2-7b", method="full", checkpointing=True, gpus=8, zero=level
    )


def measured(
    config,
    method,
    seq,
    batch,
    dtype=None,
    optimizer="adamw",
    checkpointing=False,
    r=None,
    targets=None,
    kbit_prepared=None,
):
    """Bytes that a real step takes at its highest point, those held before included."""
    settings = calculator.method_settings(
        method, r, targets, dtype, None, kbit_prepared
    )
    settings.pop("kbit_prepared", None)
    shape, dtype = memory.load(config), settings.pop("dtype")
    kind = type(measure._on_meta(shape, dtype, None))  # the class that the shape is of
    torch.manual_seed(0)
    model = kind(copy.deepcopy(shape)).to(dtype).train()
    add = memory.METHODS[method]
    if add is not None:
        model = add(model, **settings)
    if method == "inference":
        model.eval().requires_grad_(False)
    if kbit_prepared:
        calculator.prepare_for_kbit_training(model)
    if checkpointing:
        calculator.enable_checkpointing(model)
    inputs = {
        name: torch.zeros_like(t, device="cpu") if isinstance(t, torch.Tensor) else t
        for name, t in calculator.make_inputs(model, batch, seq).items()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    updates = memory.OPTIMIZERS[optimizer](trained, lr=1e-5) if trained else None

    def two_steps():
        for _ in range(2):
            calculator.pass_through(model, inputs)
            if updates:
                updates.step()
                updates.zero_grad()

    # The optimizer's state is born in there: of blocks that were there before, the
    # profiler does not see the end, and an 8-bit state is replaced at each step.
    held = nbytes([*model.parameters(), *model.buffers(), *inputs.values()])
    gc.collect()
    return held + measure.peak_memory(two_steps)


def cell(name, shape, seq, batch, **settings):
    """One row: what a step takes, predicted and measured, in bytes."""
    work = dict(seq=seq, batch=batch, **settings)
    begun = time.perf_counter()
    predicted = memory.step(shape, device="cpu", **work)
    gpu = memory.step(shape, **work)["total"]
    middle = time.perf_counter()
    real = measured(shape, **work)
    return dict(
        work,
        shape=name,
        predicted={part: predicted[part] for part in PARTS},
        on_a_gpu=gpu,
        measured=real,
        ratio=predicted["total"] / real,
        seconds=[(middle - begun) / 2, time.perf_counter() - middle],
    )


def cells():
    jobs = [
        (name, *shape, dict(method=method, checkpointing=checkpointing))
        for shapes in (SIZES, OTHERS)
        for name, shape in shapes.items()
        for method in METHODS
        for checkpointing in (False, True)
    ]
    jobs += [
        (name, *shape, dict(method=method, **more))
        for name, shape in SIZES.items()
        for method, settings in NEWER.items()
        for more in settings
    ]
    # In bfloat16 a CPU with AVX512 copies the head's weights for each sequence, to
    # multiply the last token with them: no GPU does, and it is not counted.
    inference = dict(method="inference", dtype="float32")
    jobs += [(name, *shape, inference) for name, shape in SIZES.items()]
    shape, seq, batch = SIZES["width 1024"]
    inference = dict(method="inference", dtype="bfloat16")
    jobs.append(("width 1024", shape, seq * batch, 1, inference))
    middle = "width 512"
    jobs += [
        (middle, *SIZES[middle], dict(method="full", optimizer=optimizer))
        for optimizer in OPTIMIZERS
    ]
    return [
        cell(name, *shape, **more)
        for name, *shape, more in tqdm(jobs, desc="measured cells")
    ]


def large():
    """{model.method.batch: what it takes}, with checkpointing, 512 tokens."""
    jobs = [(c, m, b) for c in LARGE for m in METHODS for b in (1, 4)]
    return {
        f"{config}.{method}.{batch}": memory.step(
            config, method, seq=512, batch=batch, checkpointing=True
        )
        for config, method, batch in tqdm(jobs, desc="large models")
    }


def claims():
    return {
        name: memory.step(seq=512, batch=1, checkpointing=True, **claim)
        for name, claim in tqdm(CLAIMS.items(), desc="claims")
    }


def cases():
    return {
        name: memory.step(seq=512, batch=4, **case)
        for name, case in tqdm(CASES.items(), desc="cases")
    }


def key(row):
    """width 512.lora.checkpointing, or width 512.full.sgd"""
    settings = ("checkpointing", "kbit_prepared")
    more = next((s for s in settings if row.get(s)), row.get("optimizer"))
    more = "bfloat16" if row.get("dtype") == "bfloat16" else more
    return ".".join(filter(None, (row["shape"], row["method"], more)))


def derive(rows, models):
    """Ratios as they are; bytes in MB (10^6) of what is measured, in GB of the rest."""
    figures = {}
    ratios = [row["ratio"] for row in rows if row.get("dtype") != "bfloat16"]
    for row in rows:
        figures[f"{key(row)}.ratio"] = dict(value=row["ratio"], tolerance=0.05)
        sizes = dict(measured=row["measured"], predicted=row["predicted"]["total"])
        for name, size in sizes.items():
            value = size / 1e6
            figures[f"{key(row)}.{name}"] = dict(value=value, tolerance=value / 20)
    figures["lowest"] = dict(value=min(ratios), tolerance=0.05)
    figures["highest"] = dict(value=max(ratios), tolerance=0.05)
    for name, found in models.items():
        for part in PARTS:
            value = found[part] / 1e9
            figures[f"{name}.{part}"] = dict(value=value, tolerance=value / 100)
        figures[f"{name}.trainable"] = dict(value=found["trainable"], tolerance=0)
    prepared = [models[f"case.kbit.{on}"]["weights"] / 1e9 for on in (False, True)]
    figures["kbit.more"] = dict(value=prepared[1] - prepared[0], tolerance=0.01)
    for name, size in memory.CARDS.items():
        value = size * GIB / 1e9
        figures[f"card.{name.partition(' (')[0]}"] = dict(value=value, tolerance=0)
    return figures


def draw():
    """A bar for each size and method, of its parts, with the cards as lines."""
    models = results.load("memory")["models"]
    label = "GB of a step, four sequences of 512 tokens"
    ax = plot.axes(label, figsize=(plot.WIDE, 3.7))
    bars = {
        f"{NAMES[method]} {config.rpartition('-')[2].upper()}": found
        for config in LARGE
        for method in METHODS
        if (found := models[f"{config}.{method}.4"])["total"] < WIDEST
    }
    left = torch.zeros(len(bars))
    colors = (plot.GREY, plot.ORANGE, plot.PURPLE, plot.BLUE)
    for part, color in zip(PARTS[:-1], colors, strict=True):
        width = torch.tensor([found[part] / 1e9 for found in bars.values()])
        ax.barh([*bars], width, 0.62, left, label=part, color=color)
        left += width
    for card in LINES:
        x = memory.CARDS[card] * GIB / 1e9
        ax.axvline(x, color=plot.INK, linestyle=":", linewidth=1.2)
        name = card.partition(" (")[0]
        ax.text(x, -0.75, name, rotation=35, ha="left", va="bottom", fontsize=10)
    ax.set(xlim=(0, WIDEST / 1e9), ylim=(len(bars) - 0.4, -0.6))
    ax.grid(False)
    plot.legend(ax)
    save_picture(ax.figure, "memory.svg")


def main():
    torch.set_num_threads(1)
    rows, big, said, more = cells(), large(), claims(), cases()
    models = big | {f"claim.{name}": found for name, found in said.items()}
    models |= {f"case.{name}": found for name, found in more.items()}
    figures = derive(rows, models)
    results.save(
        "memory",
        dict(machine=measure.machine(), cells=rows, models=models, figures=figures),
    )
    draw()
    refresh_pages()
    for row in rows:
        predicted, real = row["predicted"]["total"] / 1e6, row["measured"] / 1e6
        print(f"{key(row):32} {predicted:9.1f} {real:9.1f} MB  {row['ratio']:.4f}")
    for name, found in models.items():
        parts = "  ".join(f"{part} {found[part] / 1e9:.2f}" for part in PARTS)
        print(f"{name:24} {parts} GB  {found['gpu']}")


if __name__ == "__main__":
    main()
