"""Every method of the book, and full fine-tuning, on two tasks.

- `finnish`: tiny-decoder parses Finnish dates, 200 steps of 16, gradients clipped at 1;
- `icd`: MiniLM names the chapter of a diagnosis, as in `icd`: 100 steps of 32, and 1e-2
  for the new head, which was best there for the head alone, LoRA and full fine-tuning.
  These three are taken from `icd`; a prefix has no place in an encoder.

Every method has a learning rate of its own. From a start the search moves half a decade
at a time until the best on dev records has none better on either side, first with two
seeds, then with five. Test records choose nothing.

Prompt tuning is another question: a prompt cannot teach a language, so it is asked to
stand in for an instruction, "fr: 2026-03-12 = 12 mars 2026" without its "fr:", and the
same in Finnish, which the base does not know.

At the end, alone and turn by turn, what a step of each costs on MiniLM, in time and
memory. The dates take forty minutes on two cores, the diagnoses an hour or more, stored
as each group of methods ends; the costs two minutes. One part alone, the others as they
are stored:

    python -m experiments.sweeps.families dates, or diagnoses, or costs
"""

import copy
import dataclasses
import functools
import statistics
import sys

import torch
from safetensors.torch import save
from transformers import logging as transformers_logging

from experiments.common import (
    BASES,
    SCRATCH,
    differences,
    graded,
    moved,
    records,
    search,
    store,
    sweep,
)
from experiments.sweeps import icd as chapters
from experiments.sweeps.finnish import linears
from peftlab import (
    adapter,
    bitfit,
    dora,
    ia3,
    lora,
    lora_plus,
    pissa,
    prefix,
    prompt,
    vera,
)
from peftlab.kit import base_models, data, icd, measure, plot, results
from peftlab.kit.results import share, shares, where
from peftlab.kit.train import train
from tools.figures import refresh_pages, save_picture

ALL, KEYS = "all-linear", ["k_proj", "v_proj"]
LAST = [f"encoder.layer.{i}.output.dense" for i in range(6)]  # of each MLP in MiniLM
METHODS = {  # {name: (module, how it is added, start on finnish, start on icd)}
    "full": (None, {}, 3e-3, None),
    "LoRA": (lora, dict(targets=ALL, r=8, alpha=16), 1e-2, None),
    "rsLoRA": (lora, dict(targets=ALL, r=8, alpha=16, rslora=True), 3e-3, 3e-4),
    "LoRA+": (lora, dict(targets=ALL, r=8, alpha=16), 3e-3, 3e-4),
    "DoRA": (dora, dict(targets=ALL, r=8, alpha=16), 1e-2, 1e-3),
    "PiSSA": (pissa, dict(targets=ALL, r=8), 1e-2, 3e-4),
    "VeRA": (vera, dict(targets=ALL, r=128), 1e-1, 1e-2),
    "adapter, Houlsby": (adapter, dict(placement="houlsby", bottleneck=32), 1e-2, 1e-3),
    "adapter, Pfeiffer": (
        adapter,
        dict(placement="pfeiffer", bottleneck=64),
        1e-2,
        1e-3,
    ),
    "adapter, parallel": (
        adapter,
        dict(placement="parallel", bottleneck=64),
        1e-2,
        1e-3,
    ),
    "IA3": (ia3, dict(targets=KEYS, feedforward=["down_proj"]), 3e-1, 1e-2),
    "BitFit": (bitfit, dict(create=True), 1e-1, 3e-3),
    "norms": (bitfit, {}, 1e-1, 1e-2),
    "prefix": (prefix, dict(n=16), 1e-1, None),
    "prefix, MLP": (prefix, dict(n=16, hidden=128), 3e-2, None),
}
ON_MINILM = {  # what differs there
    "IA3": dict(targets=["key", "value"], feedforward=LAST),
    "BitFit": dict(create=False),
    "VeRA": dict(targets=ALL, r=256),
}
FROM_ICD = {"head": "head", "LoRA": "LoRA", "full": "everything"}
GROUPS = (
    ("rsLoRA", "LoRA+", "DoRA", "PiSSA", "VeRA"),
    ("adapter, Houlsby", "adapter, Pfeiffer", "adapter, parallel"),
    ("IA3", "BitFit", "norms"),
)
PROMPTS = {"prompt, French": "fr", "prompt, Finnish": "fi"}  # {name: language}
TOKENS, PROMPT_RATE = 4, 3e-2
# Points on GSM8K in peft's own method_comparison, July 2026: Llama-3.2-3B, one seed.
PEFT = {
    "rsLoRA": 51.3,
    "LoRA": 47.8,
    "full": 47.2,
    "DoRA": 46.9,
    "IA3": 45.5,
    "prefix": 41.6,
    "VeRA": 35.4,
}
STAGES, STEPS, BATCH, HEAD = (2, 5), 200, 16, 1e-2


def add(name, model, **settings):
    """A method on a model, in place: what it trains has requires_grad."""
    module, usual, _, _ = METHODS[name]
    if module is None:
        return model
    if name == "norms":
        return bitfit.add_norms(model)
    return module.add(model, **usual | settings)


# ---- Finnish dates


def finnish(job):
    """One run: (name, learning rate, seed) -> bits of each set, what was trained."""
    name, lr, seed = job
    torch.set_num_threads(1)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    base = {path: weight.clone() for path, weight in linears(model).items()}
    torch.manual_seed(seed)
    if name in PROMPTS:
        model = prompt.add(model, TOKENS)
        draw = functools.partial(rendered, PROMPTS[name])
    else:
        model = add(name, model)
        draw = functools.partial(data.records, "dates", "fi")
    groups = lora_plus.parameter_groups(model, lr) if name == "LoRA+" else None

    trained, _ = measure.parameters(model)
    lines = draw(3600, "train", seed)
    how = dict(progress=False, groups=groups)
    train(model, tokenizer, lines, STEPS, lr, BATCH, seed, **how)

    run = dict(task="finnish", method=name, lr=lr, seed=seed, trainable=trained)
    run["dev"], _ = graded(model, tokenizer, draw(180, "dev"))
    run["learned"], _ = graded(model, tokenizer, draw(400, "test"))
    if name in PROMPTS:
        return run
    run["base"], _ = graded(model, tokenizer, records("dates", BASES, 40, "test"))
    run["refuse"], _ = graded(model, tokenizer, records("refuse", BASES, 20, "test"))
    run["file"] = len(save(kept(name, model)))
    if hasattr(METHODS[name][0], "merge"):
        METHODS[name][0].merge(model)
    if name not in ("prefix", "prefix, MLP") and not name.startswith("adapter"):
        run["change"] = moved(base, linears(model))
    return run


def rendered(language, n, split, seed=0):
    """Dates to be written out in a language that nothing in the prompt names."""
    told = data.records("render", language, n, split, seed)
    mute = (r.text.removeprefix(f"{language}: ") for r in told)
    return [dataclasses.replace(r, text=t) for r, t in zip(told, mute, strict=True)]


def kept(name, model):
    """The tensors that a method's file holds."""
    module = METHODS[name][0]
    tensors = module.state_dict(model) if module else model.state_dict()
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


# ---- diagnoses


class Task(chapters.Task):
    """Chapter 1's task, trained in every way of ours."""

    def fresh(self, row, seed):
        torch.manual_seed(seed)
        model = icd.MeanClassifier.from_pretrained(
            self.folder, num_labels=len(icd.CHAPTERS)
        )
        if row in METHODS:
            add(row, model.bert, **ON_MINILM.get(row, {}))
        return model

    def groups(self, row, model, body, head):
        if row != "LoRA+":
            return super().groups(row, model, body, head)
        new = dict(params=list(model.classifier.parameters()), lr=head)
        return [*lora_plus.parameter_groups(model.bert, body), new]

    def change(self, row, model):
        """||dW|| / ||W|| of the encoder's linears, where the method folds in."""
        module = METHODS[row][0]
        if not hasattr(module, "merge"):
            return None
        merged = copy.deepcopy(model.bert)
        module.merge(merged)
        after = dict(merged.named_parameters())
        before = {
            name: weight
            for name, weight in self.encoder.named_parameters()
            if name.startswith("encoder.") and weight.dim() == 2
        }
        return moved(before, after)


@functools.cache
def task():
    """The phrases and the encoder, once for each worker."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    (SCRATCH / "families-icd").mkdir(parents=True, exist_ok=True)
    return Task(SCRATCH / "families-icd")


def diagnoses(job):
    """One run: (name, learning rate, seed[, "test"])."""
    name, lr, seed, *test = job
    run = (task().test if test else task().run)(name, lr, HEAD, seed)
    found = dict(task="icd", method=name, lr=lr, seed=seed, trainable=run["trained"])
    found |= {k: run[k] for k in ("dev", "change") if run.get(k) is not None}
    return found | (dict(learned=run["test"]) if test else {})


# ---- what a step costs


def costs():
    """Seconds and peak bytes of a step on MiniLM, and a file's bytes, by method."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    tokenizer = base_models.load_minilm(device="cpu")[1]
    pairs = icd.diagnoses("train", 2)[:32]
    batch = tokenizer([t for t, _ in pairs], padding=True, return_tensors="pt")
    batch = dict(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=torch.tensor([chapter for _, chapter in pairs]),
    )
    steps, found = {}, {}
    for name in METHODS:
        if name.startswith("prefix"):
            continue
        model = task().fresh(name, 0).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-5)
        steps[name] = functools.partial(one_step, model, optimizer, batch)
        steps[name]()
        found[name] = dict(peak=measure.peak_memory(steps[name]))
        found[name]["file"] = len(save(kept(name, model.bert)))
    for name, seconds in measure.step_times(steps, rounds=15).items():
        found[name]["seconds"] = seconds
    return found


def one_step(model, optimizer, batch):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- what the pages quote


def derive(stored):
    """Means, and differences to LoRA with a t interval over the five seeds."""
    figures = {"frozen.base": share(stored["frozen"]["base"])}
    for name in stored["best"]:
        mine = where(stored["runs"], method=name)
        figures |= {f"{name}.{k}": v for k, v in summary(mine).items()}
        base = share(stored["frozen"][name])
        figures[f"{name}.frozen"] = base
        values = shares(mine, "learned")
        figures |= differences(f"{name}.gain", values, [base] * len(values))
        if name in METHODS:
            figures |= beside_lora(name, mine, where(stored["runs"], method="LoRA"))
    ours = [figures[f"{name}.learned"] for name in PEFT]
    figures["peft.agreement"] = statistics.correlation(
        ranks(ours), ranks(PEFT.values())
    )
    figures |= derive_icd(stored["icd"])
    for name, cost in stored["costs"].items():
        for key in ("seconds", "peak"):
            figures[f"cost.{name}.{key}"] = cost[key] / stored["costs"]["full"][key]
        figures[f"cost.{name}.file"] = cost["file"] / 1e3
    return {k: dict(value=v, tolerance=0.05) for k, v in figures.items()}


def ranks(values):
    """The place of each value, the lowest first: their correlation is Spearman's."""
    values = list(values)
    return [sorted(values).index(value) for value in values]


def beside_lora(name, mine, lora_runs):
    """What is retained, and the differences to LoRA in what is learned and retained."""
    found = {}
    for key in ("base", "refuse"):
        found[f"{name}.{key}"] = statistics.mean(shares(mine, key))
    for key, gap in (("learned", "gap"), ("base", "base_gap")):
        ours, theirs = shares(mine, key), shares(lora_runs, key)
        found |= differences(f"{name}.{gap}", ours, theirs)
    return found


def derive_icd(stored):
    """The same for the diagnoses, chapters counted alike; three rows are of `icd`."""
    found, plain = {}, results.load("icd")["figures"]
    for name, values in stored["by_seed"].items():
        if name in stored["best"]:
            mine = summary(where(stored["runs"], method=name))
        else:
            source = dict(rate="body rate", trainable="trained", change="change")
            keys = {k: f"{FROM_ICD[name]}.{theirs}" for k, theirs in source.items()}
            mine = {k: plain[key]["value"] for k, key in keys.items() if key in plain}
        mine |= dict(learned=statistics.mean(values))
        mine |= dict(lowest=min(values), highest=max(values))
        found |= {f"icd.{name}.{k}": v for k, v in mine.items()}
        found |= differences(f"icd.{name}.gap", values, stored["by_seed"]["LoRA"])
        found |= differences(f"icd.{name}.over_head", values, stored["by_seed"]["head"])
    return found


def summary(runs):
    """A method's mean and range over the seeds, its rate, size and change."""
    values = shares(runs, "learned")
    found = dict(learned=statistics.mean(values))
    found |= dict(lowest=min(values), highest=max(values))
    found |= dict(rate=runs[0]["lr"], trainable=runs[0]["trainable"])
    if runs[0].get("change"):  # biases and norms leave the weights where they are
        found["change"] = statistics.mean(run["change"] for run in runs)
    if "file" in runs[0]:
        found["file"] = runs[0]["file"] / 1e3
    return found


def draw():
    """What each method learns and retains of dates, and learns of diagnoses."""
    stored = results.load("families")
    diagnosed, names = stored["icd"]["by_seed"], list(METHODS)
    mean = {n: stored["figures"][f"{n}.learned"]["value"] for n in names}
    order = sorted(names, key=mean.get)
    left, right = plot.axes(columns=2, figsize=(plot.WIDE, 5.4))
    for y, name in enumerate(order):
        mine = where(stored["runs"], method=name)
        color = plot.DARK if name == "full" else plot.ORANGE
        mark(left, shares(mine, "learned"), y + 0.17, "o", color)
        mark(left, shares(mine, "base"), y - 0.17, "D", plot.BLUE)
        if name in diagnosed:
            mark(right, diagnosed[name], y, "o", color)

    height = -0.6, len(order) - 0.4
    head = statistics.mean(diagnosed["head"])
    right.axvline(head, color=plot.GREY, lw=1.5, ls="--")
    right.text(head + 0.001, 0.5, "head alone", color=plot.INK)
    right.set(yticks=range(len(order)), yticklabels=[], ylim=height)
    right.set(xlabel="diagnoses right")

    looks = ((plot.ORANGE, "o", "learned"), (plot.BLUE, "D", "retained: base dates"))
    for color, shape, label in looks:
        left.plot([], [], shape, color=color, label=label)
    counts = {n: stored["figures"][f"{n}.trainable"]["value"] for n in names}
    left.set(xlim=(-0.03, 1.03), ylim=height, xlabel="dates right")
    left.set_yticks(range(len(order)), [f"{n}  {counts[n]:,}" for n in order])
    plot.legend(left)
    save_picture(left.figure, "families.svg")


def mark(ax, values, y, shape, color):
    """A mark for each seed, and a bar at their mean."""
    ax.plot(values, [y] * len(values), shape, ms=3.5, alpha=0.6, color=color)
    ax.plot(statistics.mean(values), y, "|", ms=10, mew=2, color=color)


def report(stored):
    """Store the runs with the figures of the pages; picture and pages follow."""
    stored = {k: v for k, v in stored.items() if k not in ("figures", "machine")}
    store("families", **stored, figures=derive(stored))
    draw()
    refresh_pages()


def frozen():
    """Bits of the untrained base on each method's test records."""
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    known, _ = graded(model, tokenizer, data.records("dates", "fi", 400, "test"))
    base, _ = graded(model, tokenizer, records("dates", BASES, 40, "test"))
    untold = {
        name: graded(model, tokenizer, rendered(language, 400, "test"))[0]
        for name, language in PROMPTS.items()
    }
    return dict.fromkeys(METHODS, known) | untold | dict(base=base)


def run_dates():
    """The runs on Finnish dates at each method's best rate, and what the search saw."""
    starts = {name: row[2] for name, row in METHODS.items()}
    starts |= dict.fromkeys(PROMPTS, PROMPT_RATE)
    tried, best = search(finnish, starts, "families: finnish", STAGES)
    return dict(
        runs=at_best(tried, best),
        rates=without_tests(tried),
        best=best,
        frozen=frozen(),
        setting=dict(steps=STEPS, batch=BATCH, tokens=TOKENS, language="fi"),
    )


def run_diagnoses():
    """The same for the diagnoses, as far as they are, after each group of methods."""
    truth = [chapter for _, chapter in icd.diagnoses("test")]
    even = results.load("icd")["by_seed"]
    even = {name: even[row] for name, row in FROM_ICD.items()}
    found = dict(runs=[], rates=[], best={}, by_seed=even)
    for group in GROUPS:
        starts = {name: METHODS[name][3] for name in group}
        tried, best = search(diagnoses, starts, "families: diagnoses", STAGES)
        jobs = [(n, lr, seed, "test") for n, lr in best.items() for seed in range(5)]
        tested = sweep(diagnoses, jobs, "families: diagnoses")
        for name in group:
            mine = [dict(test=run["learned"]) for run in where(tested, method=name)]
            even[name] = chapters.by_seed(mine, truth).tolist()
        found["runs"] += tested
        found["rates"] += tried
        found["best"] |= best
        yield found


def main(parts):
    stored = results.load("families")
    if "dates" in parts:
        stored |= run_dates()
        report(stored)
    if "diagnoses" in parts:
        for found in run_diagnoses():
            stored |= dict(icd=found)
            report(stored)
    if "costs" in parts:
        stored |= dict(costs=costs())
        report(stored)


def at_best(runs, best):
    """The five runs of each method at its best learning rate."""
    return [run for name, lr in best.items() for run in where(runs, method=name, lr=lr)]


def without_tests(runs):
    """What the search saw of each run."""
    keys = ("task", "method", "lr", "seed", "dev")
    return [{key: run[key] for key in keys} for run in runs]


if __name__ == "__main__":
    main(sys.argv[1:] or ("dates", "diagnoses", "costs"))
