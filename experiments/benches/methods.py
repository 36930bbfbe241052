"""What each method costs, ours beside peft's, turn by turn in one run: `make bench`.

One training step (forward, backward, AdamW) of a two-layer Llama at three widths: the
median of many turns, and the highest point of memory; and the bytes of the adapter's
file. Methods that peft does not have are set beside full fine-tuning alone. Three
repeats. Wants a quiet machine; a quarter of an hour on two cores."""

import os
import statistics
import tempfile
import time
from pathlib import Path

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peftlab import (
    adapter,
    bitfit,
    dora,
    ia3,
    lora,
    lora_plus,
    peft_files,
    pissa,
    prefix,
    prompt,
    vera,
)
from peftlab.kit import base_models, data, measure, plot, results
from peftlab.kit.train import train
from tools.figures import refresh_pages, save_picture

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEYS = ["k_proj", "v_proj"]
RATE, REPEATS = 1e-4, 3
WIDTHS = {192: 30, 512: 10, 1024: 5}  # width: turns
TASK = dict(task_type="CAUSAL_LM")
SOFT = dict(num_virtual_tokens=16, **TASK)
METHODS = {  # {name: (ours, peft's, made anew each time: it writes into its config)}
    "LoRA": (lambda m: lora.add(m, ALL, r=8), lambda: theirs(alpha=16)),
    "LoRA+": (lambda m: lora.add(m, ALL, r=8), lambda: theirs(alpha=16)),
    "DoRA": (
        lambda m: dora.add(m, ALL, r=8),
        lambda: theirs(alpha=16, use_dora=True),
    ),
    "PiSSA": (
        lambda m: pissa.add(m, ALL, r=8),
        lambda: theirs(alpha=8, init_lora_weights="pissa"),
    ),
    "VeRA": (
        lambda m: vera.add(m, ALL, r=256),
        lambda: peft.VeraConfig(r=256, target_modules=ALL, **TASK),
    ),
    "IA3": (
        lambda m: ia3.add(m, KEYS, ["down_proj"]),
        lambda: peft.IA3Config(
            target_modules=[*KEYS, "down_proj"],
            feedforward_modules=["down_proj"],
            **TASK,
        ),
    ),
    "norms": (
        bitfit.add_norms,
        lambda: peft.LNTuningConfig(target_modules=r".*norm", **TASK),
    ),
    "prompt": (lambda m: prompt.add(m, 16), lambda: peft.PromptTuningConfig(**SOFT)),
    "prefix": (lambda m: prefix.add(m, 16), lambda: peft.PrefixTuningConfig(**SOFT)),
    "prefix, MLP": (
        lambda m: prefix.add(m, 16, hidden=128),
        lambda: peft.PrefixTuningConfig(
            prefix_projection=True, encoder_hidden_size=128, **SOFT
        ),
    ),
    "BitFit": (lambda m: bitfit.add(m, create=True), None),
    "adapter, Houlsby": (lambda m: adapter.add(m, "houlsby", bottleneck=32), None),
    "adapter, Pfeiffer": (lambda m: adapter.add(m, "pfeiffer", bottleneck=64), None),
    "adapter, parallel": (lambda m: adapter.add(m, "parallel", bottleneck=64), None),
}


def theirs(alpha, **more):
    return peft.LoraConfig(r=8, lora_alpha=alpha, target_modules=ALL, **more, **TASK)


def llama(width):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    return LlamaForCausalLM(config).train()


def models(name, width):
    """{"peftlab": model, "peft": model}, or ours and the model tuned in full."""
    ours, config = METHODS[name]
    found = {"peftlab": ours(llama(width))}
    if config is not None:
        found["peft"] = peft.get_peft_model(llama(width), config())
    if config is None or name == "LoRA":
        found["full"] = llama(width)
    return found


def optimizer(name, who, network):
    trained = [p for p in network.parameters() if p.requires_grad]
    if name == "LoRA+" and who == "peft":
        return create_loraplus_optimizer(
            network, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16
        )
    if name == "LoRA+":
        trained = lora_plus.parameter_groups(network, RATE)
    return torch.optim.AdamW(trained, RATE)


def step(network, tokens, optimizer):
    def work():
        network(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def one(name, width, rounds):
    """Seconds and peak bytes of one step for everyone who has the method."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 1024, (8, 64))
    steps = {
        who: step(network, tokens, optimizer(name, who, network))
        for who, network in models(name, width).items()
    }
    times = measure.step_times(steps, rounds, warmup=2)
    return dict(
        seconds=times, peak={who: measure.peak_memory(s) for who, s in steps.items()}
    )


def file_bytes(name, width=192):
    """Bytes of the file, for ours and for peft's (BitFit's and adapters' have none)."""
    found = models(name, width)
    if "peft" not in found or name == "norms":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        peft_files.save(found["peftlab"], Path(folder, "peftlab"))
        found["peft"].save_pretrained(Path(folder, "peft"))
        sizes = {
            who: Path(folder, who, peft_files.WEIGHTS).stat().st_size
            for who in ("peftlab", "peft")
        }
    return sizes


def run_seconds():
    """A whole run as chapter 05 makes them: LoRA r=8, 200 steps of 20 German dates."""
    lines = data.records("dates", "de", 3600)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    lora.add(model, "all-linear", r=8, alpha=16)
    begun = time.perf_counter()
    train(model, tokenizer, lines, 200, 8e-3, 20, progress=False)
    return time.perf_counter() - begun


def derive(repeats, files, runs):
    """Ratios of ours to the others': the median of the repeats, lowest and highest."""
    figures = {"run.seconds": spread(runs, tolerance=10)}
    for name in METHODS:
        for width in map(str, WIDTHS):
            for other in set(repeats[0][name][width]["seconds"]) - {"peftlab"}:
                for key in ("seconds", "peak"):
                    pairs = [r[name][width][key] for r in repeats]
                    ratios = [p["peftlab"] / p[other] for p in pairs]
                    figures[f"{name}.{key}.{width}.{other}"] = spread(ratios, 0.1)
        for who, size in files[name].items():
            figures[f"{name}.file.{who}"] = dict(value=size, tolerance=0)
    return figures


def spread(values, tolerance):
    middle, ends = statistics.median(values), dict(lowest=min(values))
    return dict(value=middle, tolerance=tolerance, highest=max(values), **ends)


def draw():
    """One dot for each method and width: time and memory, ours over peft's."""
    figures = results.load("bench_methods")["figures"]
    names = [n for n, (_, config) in METHODS.items() if config is not None][::-1]
    titles = dict(seconds="time of a step", peak="peak memory")
    panels = plot.axes("ours / peft's", rows=2, figsize=(plot.WIDE, 5.6))
    looks = ((plot.GREEN, "o"), (plot.BLUE, "s"), (plot.PURPLE, "^"))
    for ax, (key, title) in zip(panels, titles.items(), strict=True):
        for i, (width, (color, mark)) in enumerate(zip(WIDTHS, looks, strict=True)):
            x = [figures[f"{n}.{key}.{width}.peft"]["value"] for n in names]
            y = [j + 0.22 * (1 - i) for j in range(len(names))]
            ax.plot(x, y, mark, ms=4.5, color=color, label=f"width {width}")
        ax.axvline(1, color=plot.INK, lw=1)
        ax.set(title=title, yticks=range(len(names)), yticklabels=names)
    plot.legend(panels)
    save_picture(panels[0].figure, "bench.svg")


def main():
    # Within `make results` the sweeps before this one have set it to one.
    torch.set_num_threads(os.cpu_count())
    repeats = []
    for _ in tqdm(range(REPEATS), desc="repeats"):
        repeats.append(
            {
                name: {str(w): one(name, w, n) for w, n in WIDTHS.items()}
                for name in METHODS
            }
        )
    files = {name: file_bytes(name) for name in METHODS}
    figures = derive(repeats, files, [run_seconds() for _ in range(REPEATS)])
    setting = "two layers, batch 8, 64 tokens, float32, AdamW"
    results.save(
        "bench_methods",
        dict(
            machine=measure.machine(),
            setting=setting,
            repeats=repeats,
            figures=figures,
        ),
    )
    draw()
    refresh_pages()
    for key, f in figures.items():
        ends = f" ({f['lowest']:.3f} to {f['highest']:.3f})" if "lowest" in f else ""
        print(f"{key}: {f['value']:.3f}{ends}")


if __name__ == "__main__":
    main()
