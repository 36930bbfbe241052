"""What four bits cost, what QLoRA wins back, and whether it helps to start from the
error that packing makes.

- `icd`: MiniLM names the chapter of a diagnosis, as in `icd`, its linears packed to
  NF4, doubly quantized, with products in float32: a new head alone, and QLoRA r=8 with
  the learning rates that were LoRA's best there, beside the same LoRA over float32 and
  the head over float32, which is taken from `icd` (its LoRA is peft's). Test phrases,
  chapters counted alike, five seeds.
- `start`: LoftQ's start (Li et al. 2023, arXiv 2310.08659, one iteration): B A is the
  best approximation of rank 8 of W - W4, beside B = 0. On the shrunken channel of
  `outliers`, inserted on purpose, with its dates, before training and after 50 steps of
  16; and on the plain tiny-decoder, which learns Finnish for 100. Five seeds, the
  learning rate that QLoRA had there.

All of it runs over the unpacked base, which gives QLoRA's answers and gradients in less
time. Ten minutes on one core; a part by its name alone, beside what is stored."""

import functools
import statistics
import sys

import torch
from transformers import logging as transformers_logging

from experiments.common import (
    BASES,
    SCRATCH,
    differences,
    graded,
    records,
    store,
    sweep,
)
from experiments.sweeps import icd as chapters
from experiments.sweeps.outliers import with_outliers
from peftlab import lora, qlora, surgery
from peftlab.kit import icd, results
from peftlab.kit.results import share, where
from peftlab.kit.train import train
from tools.figures import refresh_pages

SEEDS = range(5)
BODY, HEAD = 1e-3, 1e-2  # LoRA's best learning rates in `icd`
CASES = {  # what is inserted: QLoRA's learning rate there, and how many steps
    "shrunken": (3e-3, (0, 50)),
    "none": (1e-2, (100,)),
}
STARTS = ("zero", "error")
gap = functools.partial(differences, mark=".")


def through_nf4(model):
    """The model with every linear but its head packed and unpacked again."""
    return qlora.merge(qlora.add(model, compute_dtype=torch.float32))


# ---- diagnoses


class Task(chapters.Task):
    """Chapter 1's task, the encoder's linears as they are or as 4 bits have them."""

    def __init__(self, scratch, packed):
        super().__init__(scratch)
        self.packed = packed
        if packed:
            through_nf4(self.encoder)

    def fresh(self, row, seed):
        torch.manual_seed(seed)
        model = icd.MeanClassifier.from_pretrained(
            self.folder, num_labels=len(icd.CHAPTERS)
        )
        if self.packed:
            through_nf4(model.bert)
        lora.add(model.bert, "all-linear", r=8, alpha=16)
        return model

    def change(self, row, model):
        """||dW|| / ||W|| of each linear."""
        found = {}
        for path, m in surgery.wrappers(model.bert, lora.LoRALinear).items():
            with torch.no_grad():
                dW = m.scaling * (m.lora_B @ m.lora_A)
                found[path] = (dW.norm() / m.base.weight.norm()).item()
        return found


def run_icd():
    """{row: the share right of each seed, chapters counted alike}, and the change."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    scratch = SCRATCH / "qlora-icd"
    scratch.mkdir(parents=True, exist_ok=True)
    tasks = {packed: Task(scratch, packed) for packed in (False, True)}
    rows = {"LoRA": (False, BODY), "QLoRA": (True, BODY), "head": (True, None)}
    found = {
        name: [tasks[packed].test(name, body, HEAD, seed) for seed in SEEDS]
        for name, (packed, body) in rows.items()
    }
    truth = [chapter for _, chapter in tasks[True].test_set]
    even = {
        name: chapters.by_seed(runs, truth).tolist() for name, runs in found.items()
    }
    changes = [statistics.mean(run["change"].values()) for run in found["QLoRA"]]
    stored = results.load("icd")["by_seed"]["head"]
    by_seed = {
        "head, float32": stored,
        "head, NF4": even["head"],
        "LoRA, float32": even["LoRA"],
        "QLoRA, NF4": even["QLoRA"],
    }
    return dict(by_seed=by_seed, change=statistics.mean(changes))


# ---- the start


@torch.no_grad()
def start_from_error(model, errors):
    """s B A becomes the best approximation of its rank of W - W4, {path: error}."""
    for path, m in surgery.wrappers(model, lora.LoRALinear).items():
        U, S, Vh = torch.linalg.svd(errors[path], full_matrices=False)
        root = (S[: m.r] / m.scaling).sqrt()
        m.lora_B.copy_(U[:, : m.r] * root)
        m.lora_A.copy_(root[:, None] * Vh[: m.r])


@torch.no_grad()
def left(model, errors):
    """||W - (W4 + s B A)|| / ||W - W4||, over all layers."""
    rest = total = 0
    for path, m in surgery.wrappers(model, lora.LoRALinear).items():
        rest += (errors[path] - m.scaling * (m.lora_B @ m.lora_A)).square().sum()
        total += errors[path].square().sum()
    return (rest / total).sqrt().item()


def begun(case, start, seed):
    """The packed model with its LoRA at the start, its tokenizer, and what is left of
    the error."""
    model, tokenizer = with_outliers(case, seed)
    linears = set(surgery.select(model, "all-linear"))
    paths = [path for path, m in model.named_modules() if m in linears]
    W = {path: model.get_submodule(path).weight.detach().clone() for path in paths}
    through_nf4(model)
    errors = {p: W[p] - model.get_submodule(p).weight.detach() for p in paths}
    torch.manual_seed(seed)
    lora.add(model, "all-linear", r=8, alpha=16)
    if start == "error":
        start_from_error(model, errors)
    return model, tokenizer, left(model, errors)


def one(job):
    """One run: (what is inserted, start, steps, seed)."""
    case, start, steps, seed = job
    torch.set_num_threads(1)
    model, tokenizer, rest = begun(case, start, seed)
    languages, n = (BASES, 360) if case == "shrunken" else (["fi"], 3600)
    test = records("dates", languages, 400 // len(languages), "test")
    if steps:
        lines = records("dates", languages, n, "train", seed)
        rate = CASES[case][0]
        train(model, tokenizer, lines, steps, rate, 16, seed, progress=False)
    run = dict(case=case, start=start, steps=steps, seed=seed, left=rest)
    run["right"], run["loss"] = graded(model.eval(), tokenizer, test)
    return run


# ---- what the chapter quotes


def derive(stored):
    figures = derive_icd(stored["icd"]) if stored["icd"] else {}
    if stored["runs"]:
        figures |= derive_starts(stored["runs"])
    return {k: dict(value=v, tolerance=0.05) for k, v in figures.items()}


def derive_icd(stored):
    figures = {}
    for name, values in stored["by_seed"].items():
        figures |= {f"icd.{name}": statistics.mean(values)}
        figures |= {f"icd.{name}.least": min(values), f"icd.{name}.most": max(values)}
    even = stored["by_seed"]
    for a, b in (
        ("QLoRA, NF4", "head, NF4"),
        ("QLoRA, NF4", "head, float32"),
    ):
        figures |= gap(f"icd.{a} - {b}", even[a], even[b])
    figures |= gap("icd.lost", even["head, float32"], even["head, NF4"])
    figures |= gap("icd.behind", even["LoRA, float32"], even["QLoRA, NF4"])
    return figures | {"icd.change": stored["change"]}


def derive_starts(runs):
    figures = {}
    for case, (_, lengths) in CASES.items():
        for steps in lengths:
            mine = {s: where(runs, case=case, start=s, steps=steps) for s in STARTS}
            shares = {s: [share(r["right"]) for r in some] for s, some in mine.items()}
            for name, values in shares.items():
                key = f"{case}.{name}.{steps}"
                figures[key] = statistics.mean(values)
                figures[f"{key}.lowest"] = min(values)
                figures[f"{key}.highest"] = max(values)
                losses = [r["loss"] for r in mine[name]]
                figures[f"{key}.loss"] = statistics.mean(losses)
            figures |= gap(f"{case}.gain.{steps}", shares["error"], shares["zero"])
        rest = [r["left"] for r in where(runs, case=case, start="error")]
        figures[f"{case}.left"] = statistics.mean(rest)
    return figures


def main(names=("start", "icd")):
    try:
        stored = results.load("qlora_quality")
    except ValueError:  # there is nothing stored yet
        stored = dict(runs=[], icd=None)
    if "start" in names:
        jobs = [
            (case, start, steps, seed)
            for case, (_, lengths) in CASES.items()
            for start in STARTS
            for steps in lengths
            for seed in SEEDS
        ]
        stored["runs"] = sweep(one, jobs, "QLoRA starts")
    if "icd" in names:
        stored["icd"] = run_icd()
    figures = derive(stored)
    setting = dict(batch=16, r=8, alpha=16, rates=CASES, body=BODY, head=HEAD)
    kept = dict(icd=stored["icd"], figures=figures, setting=setting)
    store("qlora_quality", stored["runs"], **kept)
    refresh_pages()
    for key, figure in figures.items():
        print(f"{key:40} {figure['value']:.4g}")


if __name__ == "__main__":
    main(sys.argv[1:] or ("start", "icd"))
