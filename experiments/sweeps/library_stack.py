"""The library stack's script in ways that chapter 18 has no time for.

One process beside two, with SGD and with AdamW, and in 4 bits; runs that go on from
their checkpoint in bfloat16 and on two processes; the time of a start and of a step,
and the most memory that a process held. All on the CPU. Some six minutes on two
cores."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file

from experiments.common import records, store
from peftlab.kit import base_models

SCRIPT = Path(__file__).parents[2] / "recipes" / "18_train.py"
QUIET = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
STEPS = 12  # and a checkpoint after half of them
TWO = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
TWO += ["--num_processes", "2", "--main_process_port", "0"]

SGD = "--optim sgd --rate 0.5"
ADAM = "--optim adamw_torch --rate 1e-2"
PAIRS = {  # one process beside two
    "sgd": SGD,
    "adamw": ADAM,
    "sgd.4bit": f"{SGD} --load-in-4bit",
}
RESUMED = {  # settings, processes
    "bf16": (f"{ADAM} --dropout 0.1 --dtype bfloat16", 1),
    "ddp": (f"{ADAM} --dropout 0.1", 2),
}
LONG = {bits: f"{ADAM} {flag}" for bits, flag in ((32, ""), (4, "--load-in-4bit"))}


def write(folder):
    """Finnish dates as records; every third answer is the year alone."""
    rows = []
    for number, r in enumerate(records("dates", ["fi"], 1200, "train")):
        answer = f" {r.answer}" if number % 3 else f" {r.answer}"[:5]
        rows.append(json.dumps(dict(prompt=r.prompt, completion=answer)))
    (folder / "dates.jsonl").write_text("\n".join(rows), "utf8")


def run(folder, out, settings, processes=1, steps=STEPS):
    """Seconds in all, seconds of training, and the MB that a process held at most."""
    words = TWO if processes == 2 else [sys.executable]
    words = [*words, SCRIPT, "--model", base_models.MODELS / "tiny-decoder"]
    words += ["--data", "dates.jsonl", "--out", out, "--steps", steps]
    words += ["--save-every", steps // 2, "--batch", 8 // processes]
    words += ["--accumulate", 2, *settings.split()]
    begun, log = time.perf_counter(), folder / f"{out}.log"
    with open(log, "w", encoding="utf8") as file:
        where = dict(cwd=folder, env=QUIET, stdout=file, stderr=subprocess.STDOUT)
        child = subprocess.Popen([str(word) for word in words], **where)
        _, status, used = os.wait4(child.pid, 0)
    text = log.read_text("utf8")
    if status:
        raise RuntimeError(text[-2000:])
    trained = float(re.findall(r"'train_runtime': '([\d.]+)'", text)[-1])
    whole = time.perf_counter() - begun
    return dict(seconds=whole, trained=trained, MB=used.ru_maxrss / 1000)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def apart(one, other):
    """The largest difference of two adapters' values."""
    return max((one[n] - other[n]).abs().max().item() for n in one | other)


def beside(folder, name, settings):
    """Two processes against one."""
    for processes in (1, 2):
        run(folder, f"{name}.{processes}", settings, processes)
    one, two = (adapter(folder / f"{name}.{n}") for n in (1, 2))
    values = [v.abs().mean().item() for v in one.values()]
    return dict(apart=apart(one, two), typical=sum(values) / len(values))


def resumed(folder, name, settings, processes):
    """A whole run against its second half, done again from the checkpoint."""
    run(folder, name, settings, processes)
    whole = adapter(folder / name)
    (folder / name / "adapter_model.safetensors").unlink()
    shutil.rmtree(folder / name / f"checkpoint-{STEPS}")
    run(folder, name, f"{settings} --resume", processes)
    said = (folder / f"{name}.log").read_text("utf8")
    if said.count("'loss'") != STEPS // 2:
        raise RuntimeError(f"{name} did not go on from its checkpoint")
    return dict(apart=apart(whole, adapter(folder / name)))


def derive(runs):
    """The figures: gaps, the time of a start and of a step, the most memory."""
    found = {}
    for name in PAIRS:
        limit = 0.01 if name == "adamw" else 1e-4
        found[f"two.{name}"] = runs[name]["apart"], limit
    for name in RESUMED:
        found[f"resumed.{name}"] = runs[name]["apart"], 0.0
    for bits in LONG:
        cost = runs[f"cost.{bits}"]
        found[f"start.{bits}"] = cost["seconds"] - cost["trained"], 60.0
        found[f"step.{bits}"] = cost["trained"] / cost["steps"], 2.0
        found[f"MB.{bits}"] = cost["MB"], 500.0
    found["typical"] = runs["adamw"]["typical"], 0.05
    return {k: dict(value=v, tolerance=t) for k, (v, t) in found.items()}


def main():
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder)
        for name, settings in PAIRS.items():
            runs[name] = beside(folder, name, settings)
        for name, (settings, processes) in RESUMED.items():
            runs[name] = resumed(folder, name, settings, processes)
        for bits, settings in LONG.items():
            cost = run(folder, f"cost.{bits}", settings, steps=60)
            runs[f"cost.{bits}"] = cost | dict(steps=60)
    figures = derive(runs)
    setting = dict(steps=STEPS, transformers=version("transformers"))
    store("library_stack", runs, figures=figures, setting=setting)
    for key, figure in figures.items():
        print(f"{key:15} {figure['value']:.3g}")


if __name__ == "__main__":
    main()
