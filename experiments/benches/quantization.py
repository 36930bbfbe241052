"""What packing costs, ours beside bitsandbytes', turn by turn in one run: `make bench`.

Quantizing and unpacking 16.8 million weights, the forward pass of packed linears, a
QLoRA step beside peft's and an 8-bit Adam step. Ratios of seconds, ours over theirs,
the median of three repeats. What wins depends on the processor, so that the figures of
each kind have a file of their own. Wants a quiet machine; five minutes on two cores."""

import copy
import functools
import json
import os
import subprocess
import sys
import tempfile

import bitsandbytes
import peft
import torch
from bitsandbytes import functional
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from experiments.benches.methods import (
    ALL,
    RATE,
    REPEATS,
    TASK,
    llama,
    optimizer,
    spread,
    step,
)
from peftlab import adam8bit, int8, nf4, qlora
from peftlab.kit import measure, plot, results
from tools.figures import refresh_pages, save_picture

SIDE = 4096  # of the weight that is packed: 16.8 million
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Whether the memory of an answer of 32 or 64 MB comes from the system each time or is
# used again: to get it takes longer than to unpack into it. Left alone, malloc gives
# either, and in some processes new memory to one of the two and used to the other.
KEEP = dict(MALLOC_TRIM_THRESHOLD_=str(2**34))  # what lies below the limit
MEMORY = {
    "new": KEEP | dict(MALLOC_MMAP_THRESHOLD_=str(2**24)),
    "kept": KEEP | dict(MALLOC_MMAP_MAX_="0"),
}
WIDTHS = {512: 8, 1024: 4}  # of the Llama that takes QLoRA steps: turns
VECTORS = torch.backends.cpu.get_cpu_capability()
# On other processors a backward pass in bfloat16 takes so long (`products`) that
# nothing else counts beside it, in ours or in theirs: there only float32 trains.
TRAINED = [name for name in TYPES if VECTORS == "AVX512" or name == "float32"]
BOTH = ("float32", "bfloat16")
ROWS = [  # of the picture: its name, what the figures are called, of which types
    ("quantize to NF4", "quantize nf4, {}", BOTH),
    ("to FP4", "quantize fp4, {}", BOTH),
    ("to NF4, doubly", "quantize nf4 doubly, {}", ("float32",)),
    ("to int8, by rows", "quantize int8 by rows, {}", ("float16",)),
    ("unpack, memory new", "dequantize, {}, new", BOTH),
    ("compiled", "dequantize compiled, {}, new", BOTH),
    ("unpack, memory reused", "dequantize, {}, kept", BOTH),
    ("compiled", "dequantize compiled, {}, kept", BOTH),
    ("NF4Linear", "NF4Linear forward, {}", BOTH),
    ("both ways", "NF4Linear both ways, {}", BOTH),
    ("Int8Linear", "Int8Linear forward", ("float16",)),
    ("QLoRA step", "QLoRA step, 1024, {}", BOTH),
    ("Adam8bit step", "Adam8bit step", ("float32",)),
]


def weight(dtype=torch.float32, rows=SIDE, columns=SIDE):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def quantizing():
    """{what: (ours, theirs, turns)}: a weight into 4 bits."""
    cases = {}
    for name, dtype in TYPES.items():
        w = weight(dtype)
        for kind, code in (("nf4", nf4.NF4), ("fp4", nf4.FP4)):
            cases[f"quantize {kind}, {name}"] = (
                lambda w=w, code=code: nf4.quantize(w, code=code),
                lambda w=w, kind=kind: functional.quantize_4bit(w, quant_type=kind),
                5,
            )
    w, half = weight(), weight(torch.float16)
    cases["quantize nf4 doubly, float32"] = (
        lambda: nf4.quantize(w, double_quant=True),
        lambda: functional.quantize_4bit(w, None, None, 64, True, "nf4"),
        5,
    )
    cases["quantize int8 by rows, float16"] = (
        lambda: int8.quantize(half, dim=-1),
        lambda: functional.int8_vectorwise_quant(half),
        5,
    )
    return cases


def unpacking():
    """Back to floats: in plain torch, and what torch.compile makes of the function."""
    cases, fast = {}, torch.compile(nf4.dequantize)
    for name, dtype in TYPES.items():
        q = nf4.quantize(weight(dtype))
        theirs = functional.quantize_4bit(weight(dtype), quant_type="nf4")
        back = functools.partial(functional.dequantize_4bit, *theirs)
        cases[f"dequantize, {name}"] = functools.partial(nf4.dequantize, q), back, 9
        cases[f"dequantize compiled, {name}"] = functools.partial(fast, q), back, 9
    return cases


def unpacking_apart(variables):
    """The times of `unpacking` in a process of its own, with environment variables."""
    command = [sys.executable, "-m", "experiments.benches.quantization", "unpacking"]
    environment = os.environ | variables
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def timed(cases):
    """{what: {who: seconds}}, turn by turn."""
    return {
        name: measure.step_times(dict(ours=ours, theirs=theirs), turns, warmup=2)
        for name, (ours, theirs, turns) in cases.items()
    }


def linears():
    """Forward, and forward and backward, 512 rows through a square linear."""
    torch.manual_seed(0)
    plain, cases = nn.Linear(2048, 2048), {}
    rows = torch.randn(512, 2048)
    there_and_back = lambda m, x: lambda: m(x).sum().backward()  # noqa: E731
    forward = lambda m, x: lambda: m(x)  # noqa: E731
    for name, dtype in TYPES.items():
        base, x = copy.deepcopy(plain).to(dtype), rows.to(dtype).requires_grad_()
        ours = nf4.NF4Linear(base)
        theirs = bitsandbytes.nn.Linear4bit(
            2048, 2048, compute_dtype=dtype, quant_type="nf4"
        )
        theirs.load_state_dict(base.state_dict())
        theirs = theirs.to("cpu").train()  # eval mode repacks the weight on some CPUs
        both = [(forward(m, x), there_and_back(m, x)) for m in (ours, theirs)]
        there, and_back = zip(*both, strict=True)
        cases[f"NF4Linear forward, {name}"] = *there, 9
        if name in TRAINED:
            cases[f"NF4Linear both ways, {name}"] = *and_back, 9
    base, x16 = plain.half(), rows.half()
    x16[:, 7] *= 40  # a column above the threshold
    theirs = bitsandbytes.nn.Linear8bitLt(
        2048, 2048, has_fp16_weights=False, threshold=6.0
    )
    theirs.load_state_dict(base.state_dict())
    theirs = theirs.to("cpu").eval()
    ours = int8.Int8Linear(base, threshold=6.0)
    cases["Int8Linear forward"] = forward(ours, x16), forward(theirs, x16), 9
    return cases


def products():
    """128 rows through an NF4Linear: products in bfloat16 over those in float32."""
    base, x = nn.Linear(1024, 1024), torch.randn(128, 1024, requires_grad=True)
    both = [nf4.NF4Linear(base, compute_dtype=t) for t in (torch.bfloat16, None)]
    there = [lambda layer=layer: layer(x) for layer in both]
    and_back = [lambda layer=layer: layer(x).sum().backward() for layer in both]
    return {
        "bfloat16 over float32, forward": (*there, 9),
        "bfloat16 over float32, both ways": (*and_back, 9),
    }


def qlora_steps(width, dtype):
    """A QLoRA step of a two-layer Llama in a dtype, doubly quantized, r=8."""
    model = llama(width).to(dtype)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        twin = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map="cpu", dtype=dtype
        )
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=ALL, **TASK)
    twin = peft.get_peft_model(twin.train(), config)
    ours = qlora.add(model, ALL, r=8, compute_dtype=dtype).train()
    torch.manual_seed(1)
    tokens = torch.randint(0, 1024, (8, 64))
    return [step(m, tokens, optimizer("LoRA", "", m)) for m in (ours, twin)]


def adam_steps():
    """{who: one update} of 16.8 million parameters in four tensors."""

    def made(kind):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(weight(rows=SIDE // 4)) for _ in range(4)]
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        return kind(parameters, lr=RATE).step

    kinds = dict(
        ours=adam8bit.Adam8bit,
        theirs=bitsandbytes.optim.Adam8bit,
        torch=torch.optim.AdamW,
    )
    return {who: made(kind) for who, kind in kinds.items()}


def timed_adam():
    """{who: seconds} of `adam_steps`, turn by turn."""
    return measure.step_times(adam_steps(), 5, warmup=2)


def once():
    """{case: {who: seconds}} of everything, and the peaks of the QLoRA steps."""
    found, peaks = timed(quantizing() | linears() | products()), {}
    for memory, variables in MEMORY.items():
        for name, times in unpacking_apart(variables).items():
            found[f"{name}, {memory}"] = times
    for name in TRAINED:
        for width, turns in WIDTHS.items():
            steps = qlora_steps(width, TYPES[name])
            both = dict(zip(("ours", "theirs"), steps, strict=True))
            key = f"{width}, {name}"
            found[f"QLoRA step, {key}"] = measure.step_times(both, turns, warmup=2)
            peaks[key] = {who: measure.peak_memory(s) for who, s in both.items()}
    found["Adam8bit step"] = timed_adam()
    return dict(seconds=found, peak=peaks)


def derive(repeats):
    """Ratios of ours to theirs, and our millions of weights a second."""
    figures = {}
    for name in repeats[0]["seconds"]:
        times = [r["seconds"][name] for r in repeats]
        figures[name] = spread([t["ours"] / t["theirs"] for t in times], 0.1)
        if "quantize" in name:
            rate = [SIDE**2 / t["ours"] / 1e6 for t in times]
            figures[f"{name}, rate"] = spread(rate, max(rate))
    times = [r["seconds"]["Adam8bit step"] for r in repeats]
    figures["Adam8bit step, AdamW"] = spread([t["ours"] / t["torch"] for t in times], 1)
    for key in repeats[0]["peak"]:
        peaks = [r["peak"][key]["ours"] / r["peak"][key]["theirs"] for r in repeats]
        figures[f"QLoRA peak, {key}"] = spread(peaks, 0.1)
    return figures


def draw():
    """A mark for each case, type and processor."""
    ax = plot.axes("seconds, ours / theirs", figsize=(plot.WIDE, 5.0))
    colors = dict(AVX512=plot.BLUE, AVX2=plot.GREEN)
    marks = dict(float32="o", bfloat16="s", float16="^")
    for (vectors, color), up in zip(colors.items(), (-0.16, 0.16), strict=True):
        figures = results.load(f"bench_quantization_{vectors.lower()}")["figures"]
        for kind, mark in marks.items():
            dots = {
                y + up: figures[name.format(kind)]["value"]
                for y, (_, name, kinds) in enumerate(ROWS)
                if kind in kinds and name.format(kind) in figures
            }
            label = f"{vectors}, {kind}"
            ax.plot([*dots.values()], [*dots], mark, ms=5, color=color, label=label)
    ax.axvline(1, color=plot.INK, lw=1)
    ax.set(xscale="log", xlim=(0.2, 8), yticks=range(len(ROWS)))
    ax.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    ax.minorticks_off()
    ax.set_yticklabels([label for label, _, _ in ROWS])
    ax.invert_yaxis()
    plot.legend(ax, ncols=2)
    save_picture(ax.figure, "packing.svg")


def main():
    # Within `make results` the sweeps before this one have set it to one.
    torch.set_num_threads(os.cpu_count())
    if sys.argv[1:] == ["unpacking"]:
        print(json.dumps(timed(unpacking())))
        return
    if sys.argv[1:] == ["adam8bit"]:  # this row alone: it is printed, not stored
        seconds = timed_adam()
        for who in ("theirs", "torch"):
            print(f"ours / {who}: {seconds['ours'] / seconds[who]:.2f}")
        return
    logging.disable_progress_bar()
    repeats = [once() for _ in tqdm(range(REPEATS), desc="quantization")]
    figures = derive(repeats)
    results.save(
        f"bench_quantization_{VECTORS.lower()}",
        dict(
            machine=measure.machine(),
            repeats=repeats,
            figures=figures,
        ),
    )
    draw()
    refresh_pages()
    for key, f in figures.items():
        print(f"{key}: {f['value']:.3f} ({f['lowest']:.3f} to {f['highest']:.3f})")


if __name__ == "__main__":
    main()
