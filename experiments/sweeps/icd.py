"""MiniLM names the chapter of a diagnosis: the head alone, LoRA, everything.

100 steps of 32 phrases, five seeds. Every row has a learning rate for the body and one
for the head, found on development phrases: from a start the search moves to the best of
the four neighbours (three times more or less) until none is better, first with two
seeds, then with five. So every best has a neighbour on each side with as many seeds.
Then all test phrases, right or wrong one by one, at the best rates, and for LoRA also
at the best rate that body and head share.

Beside these, `head, to the end`: the same linear layer on the same phrases, trained
until nothing moves, with the weight decay that is best on development phrases; and
`few`: 20 phrases a chapter and as many steps, the head alone and LoRA at the rates of
the chapter, scored on its 720 test phrases.

The head alone sees the frozen encoder's output, computed once and without dropout: the
mean over tokens, as all rows do, and the pooled first token, which transformers' own
classifier takes.

Each run is stored as it ends, in _build/icd; started again, the sweep goes on where it
stopped. An hour on one free core."""

import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers import logging as transformers_logging

from experiments.common import store
from peftlab.kit import base_models, icd, measure, results

STEPS, BATCH, WARMUP = 100, 32, 10
PER_CHAPTER = STEPS * BATCH // len(icd.CHAPTERS)  # phrases, for one pass
STAGES = (2, 5)  # seeds
RATES = [float(f"{m}e{i}") for i in range(-6, 1) for m in (1, 3)]  # 1e-6, 3e-6, ...
START = {  # learning rates of the body and of the head
    "head": (None, 1e-2),
    "head, first token": (None, 1e-1),
    "LoRA": (1e-3, 1e-2),
    "everything": (1e-4, 1e-2),
    "LoRA, one rate": (3e-3, 3e-3),
}
DECAYS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FEW = 20  # phrases a chapter
SCRATCH = Path(__file__).parents[2] / "_build" / "icd"


def main():
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    task, best = Task(), dict(START)
    for seeds in STAGES:
        for name in START:
            best[name] = search(task, name, best[name], seeds)
        write(task, best, seeds)
    add_beside(task)


def search(task, name, point, seeds):
    """The pair of rates (body, head) none of whose neighbours is better on dev."""
    row, _, shared = name.partition(", one")

    def score(point):
        runs = [task.run(row, *point, seed) for seed in range(seeds)]
        return sum(run["dev"] for run in runs) / seeds

    while True:
        best = max([point, *neighbours(point, shared)], key=score)
        print(f"{name}, {seeds} seeds: {best} has {score(best):.4f}", flush=True)
        if best == point:
            return point
        point = best


def neighbours(point, shared=False):
    """One step of the grid down and up, in each rate alone or in both at once."""
    body, head = point

    def step(rate, by):
        return RATES[RATES.index(rate) + by]

    if shared:
        return [(step(body, by), step(head, by)) for by in (-1, 1)]
    found = [(body, step(head, by)) for by in (-1, 1)]
    if body is not None:
        found += [(step(body, by), head) for by in (-1, 1)]
    return found


def write(task, best, seeds):
    """Store every run, and test those at the best rates."""
    tested = {}
    for name, (body, head) in best.items():
        row = name.partition(", one")[0]
        tested[name] = [task.test(row, body, head, seed) for seed in range(seeds)]
    runs = [json.loads(file.read_text()) for file in sorted(SCRATCH.glob("*.json"))]
    chapters = [chapter for _, chapter in task.test_set]
    even = {name: by_seed(runs, chapters) for name, runs in tested.items()}
    store(
        "icd",
        runs,
        best={name: dict(body=b, head=h) for name, (b, h) in best.items()},
        by_seed={name: shares.tolist() for name, shares in even.items()},
        figures=figures(tested, even) | dev_figures(runs),
        seeds=seeds,
        steps=STEPS,
        batch=BATCH,
        dev_phrases=len(task.dev),
        test_phrases=chapters,
    )


def add_beside(task):
    """Add the head trained to the end, and the rows with few phrases."""
    stored = results.load("icd")
    chapters = stored["test_phrases"]
    seeds = range(stored["seeds"])

    heads = {d: [task.converged(d, seed) for seed in seeds] for d in DECAYS}
    decay = max(DECAYS, key=lambda d: sum(run["dev"] for run in heads[d]))
    print(f"head to the end: weight decay {decay:g}", flush=True)
    name = "head, to the end"
    even = by_seed(heads[decay], chapters).tolist()
    found = {f"{name}.even": statistics.mean(even), f"{name}.decay": decay}
    for row in ("LoRA", "everything"):
        parts = measure.paired_interval(stored["by_seed"][row], even)
        for part, value in zip(("mean", "low", "high"), parts, strict=True):
            found[f"{row} - {name}.{part}"] = value

    few = {row: [task.few(row, seed) for seed in seeds] for row in ("head", "LoRA")}
    for row, shares in few.items():
        found[f"few.{row}"] = statistics.mean(shares)
    parts = measure.paired_interval(few["LoRA"], few["head"])
    for part, value in zip(("mean", "low", "high"), parts, strict=True):
        found[f"few.LoRA - head.{part}"] = value

    stored["by_seed"][name] = even
    stored["few"] = few
    for key, value in found.items():
        stored["figures"][key] = dict(value=float(value), tolerance=0)
    results.save("icd", stored)


def by_seed(runs, chapters):
    """For each run its share of right test phrases, each chapter counted alike."""
    bits = torch.tensor([[c == "1" for c in run["test"]] for run in runs]).double()
    columns = [[i for i, c in enumerate(chapters) if c == k] for k in {*chapters}]
    return torch.stack([bits[:, own].mean(1) for own in columns], dim=1).mean(1)


def figures(tested, even):
    """What the chapter quotes: shares of the test phrases, and differences by seed.

    "all" counts every phrase alike, "even" every chapter of ICD-10-CM."""
    found = {}
    for name, runs in tested.items():
        whole = [run["test"].count("1") / len(run["test"]) for run in runs]
        found[f"{name}.all"] = statistics.mean(whole)
        found[f"{name}.even"] = even[name].mean()
        found[f"{name}.least"], found[f"{name}.most"] = even[name].aminmax()
        found[f"{name}.trained"] = runs[0]["trained"]
        found[f"{name}.head rate"] = runs[0]["head"]
        if "change" in runs[0]:
            found[f"{name}.body rate"] = runs[0]["body"]
            changes = [statistics.mean(run["change"].values()) for run in runs]
            found[f"{name}.change"] = statistics.mean(changes)
    for a, b in itertools.permutations(tested, 2):
        parts = measure.paired_interval(even[a].tolist(), even[b].tolist())
        for part, value in zip(("mean", "low", "high"), parts, strict=True):
            found[f"{a} - {b}.{part}"] = value
    found["test phrases"] = len(tested["head"][0]["test"])
    return {key: dict(value=float(value), tolerance=0) for key, value in found.items()}


def dev_figures(runs):
    """The share of the development phrases at every pair of rates."""
    shares = {}
    for run in runs:
        key = f"{run['row']}.dev.{run['body']}.{run['head']}"
        shares.setdefault(key, []).append(run["dev"])
    return {
        key: dict(value=statistics.mean(values), tolerance=0)
        for key, values in shares.items()
    }


class Task:
    """The phrases, the encoder, and the runs that there are."""

    def __init__(self, scratch=SCRATCH):
        self.scratch = scratch
        self.folder = base_models.minilm_folder()
        self.encoder, self.tokenizer = base_models.load_minilm(device="cpu")
        self.dev = icd.diagnoses("dev", 40)
        self.test_set = icd.diagnoses("test")
        self.features = {}

    def run(self, row, body, head, seed):
        """One run's figures, from the scratch folder or made now."""
        file = self.file(row, body, head, seed)
        if file.exists():
            return json.loads(file.read_text())

        begun = time.perf_counter()
        found = dict(row=row, body=body, head=head, seed=seed)
        if body is None:
            model = self.train_head(row, head, seed)
            dev = self.predict_head(model, row, self.dev)
            trained = model.state_dict()
        else:
            model = self.train(row, body, head, seed)
            dev = self.predict(model, self.dev)
            found["change"] = self.change(row, model)
            needs = {n for n, p in model.named_parameters() if p.requires_grad}
            trained = {n: t for n, t in model.state_dict().items() if n in needs}
        right = [a == c for a, (_, c) in zip(dev, self.dev, strict=True)]
        found["dev"] = sum(right) / len(right)
        found["trained"] = sum(t.numel() for t in trained.values())
        found["seconds"] = round(time.perf_counter() - begun, 1)
        save_file(trained, file.with_suffix(".safetensors"))
        file.write_text(json.dumps(found))
        shown = {k: v for k, v in found.items() if k != "change"}
        print(time.strftime("%H:%M:%S"), shown, flush=True)
        return found

    def test(self, row, body, head, seed):
        """Add to a run which test phrases it gets right, as a string of 0 and 1."""
        found = self.run(row, body, head, seed)
        if "test" in found:
            return found
        file = self.file(row, body, head, seed)
        trained = load_file(file.with_suffix(".safetensors"))
        if body is None:
            model = torch.nn.Linear(self.encoder.config.hidden_size, len(icd.CHAPTERS))
            model.load_state_dict(trained)
            given = self.predict_head(model, row, self.test_set)
        else:
            model = self.fresh(row, seed)
            model.load_state_dict(trained, strict=False)
            given = self.predict(model, self.test_set)
        bits = ["01"[a == c] for a, (_, c) in zip(given, self.test_set, strict=True)]
        found["test"] = "".join(bits)
        file.write_text(json.dumps(found))
        share = bits.count("1") / len(bits)
        print(f"{file.stem}: {share:.4f} of the test phrases", flush=True)
        return found

    def file(self, row, body, head, seed):
        """Where a run is stored as it ends; what it trained lies beside it."""
        name = f"{row}-{body}-{head}-{seed}.json".replace(" ", "_")
        return self.scratch / name

    def change(self, row, model):
        """||dW||/||W|| of each linear layer in the encoder's blocks."""
        return relative_change(model, self.encoder)

    def fresh(self, row, seed):
        """The classifier before training."""
        torch.manual_seed(seed)
        model = icd.MeanClassifier.from_pretrained(
            self.folder, num_labels=len(icd.CHAPTERS)
        )
        if row == "everything":
            return model
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"
        )
        return get_peft_model(model, lora)

    def converged(self, decay, seed):
        """A linear layer on the frozen encoder, as good as this decay lets it get."""
        pairs = icd.diagnoses("train", PER_CHAPTER, seed)
        inputs = self.feature("head", [text for text, _ in pairs])
        labels = torch.tensor([chapter for _, chapter in pairs])
        model = torch.nn.Linear(inputs.shape[1], len(icd.CHAPTERS))
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            max_iter=1000,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            loss = loss + decay * model.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = {}
        for name, part in dict(dev=self.dev, test=self.test_set).items():
            given = self.predict_head(model, "head", part)
            bits = [a == c for a, (_, c) in zip(given, part, strict=True)]
            found[name] = bits
        found["dev"] = sum(found["dev"]) / len(found["dev"])
        found["test"] = "".join("01"[bit] for bit in found["test"])
        return found

    def few(self, row, seed):
        """The share of the chapter's 720 test phrases after training on few."""
        model = self.fresh("everything" if row == "head" else row, seed)
        if row == "head":
            model.bert.requires_grad_(False)
        model = self.train(row, *START["LoRA"], seed, model, FEW)
        pairs = icd.diagnoses("test", 40)
        given = self.predict(model, pairs)
        share = sum(a == c for a, (_, c) in zip(given, pairs, strict=True)) / len(pairs)
        print(f"few, {row}, seed {seed}: {share:.3f}", flush=True)
        return share

    def train(self, row, body, head, seed, model=None, per_chapter=PER_CHAPTER):
        """Trainer, with a learning rate for the body and one for the head."""
        model = model or self.fresh(row, seed)
        groups = self.groups(row, model, body, head)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        pairs = icd.diagnoses("train", per_chapter, seed)
        tokens = self.tokenizer([text for text, _ in pairs])["input_ids"]
        examples = [
            dict(input_ids=ids, labels=chapter)
            for ids, (_, chapter) in zip(tokens, pairs, strict=True)
        ]
        settings = TrainingArguments(
            str(self.scratch / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="group_by_length",
            warmup_steps=WARMUP,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model,
            settings,
            train_dataset=examples,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            optimizers=(optimizer, None),
        )
        trainer.train()
        return model

    def groups(self, row, model, body, head):
        """The optimizer's two groups: the body's weights, and the head's."""
        rates = {body: [], head: []}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                rates[head if "classifier" in name else body].append(weight)
        return [dict(params=weights, lr=rate) for rate, weights in rates.items()]

    def train_head(self, row, rate, seed):
        """The same steps and schedule for a linear layer on the frozen encoder."""
        pairs = icd.diagnoses("train", PER_CHAPTER, seed)
        inputs = self.feature(row, [text for text, _ in pairs])
        labels = torch.tensor([chapter for _, chapter in pairs])
        torch.manual_seed(seed)
        model = torch.nn.Linear(inputs.shape[1], len(icd.CHAPTERS))
        torch.nn.init.normal_(model.weight, std=self.encoder.config.initializer_range)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        order = torch.randperm(len(pairs))
        for step in range(len(pairs) // BATCH):
            rise, fall = (step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP)
            optimizer.param_groups[0]["lr"] = rate * min(rise, fall)
            batch = order[step * BATCH : (step + 1) * BATCH]
            dropped = torch.dropout(inputs[batch], 0.1, True)
            loss = torch.nn.functional.cross_entropy(model(dropped), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return model

    @torch.no_grad()
    def predict(self, model, pairs):
        """The likeliest chapter of each phrase."""
        model.eval()
        logits = self.batched([t for t, _ in pairs], lambda b: model(**b).logits)
        return logits.argmax(-1).tolist()

    @torch.no_grad()
    def predict_head(self, model, row, pairs):
        """The same with a linear layer on the frozen encoder."""
        return model(self.feature(row, [t for t, _ in pairs])).argmax(-1).tolist()

    @torch.no_grad()
    def feature(self, row, texts):
        """The frozen encoder's output for each text, (texts, width), computed once."""

        def both(batch):
            out = self.encoder(**batch)
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
            return torch.stack([mean, out.pooler_output], dim=1)

        missing = [text for text in texts if text not in self.features]
        if missing:
            self.features |= zip(missing, self.batched(missing, both), strict=True)
        index = int("first token" in row)
        return torch.stack([self.features[text][index] for text in texts])

    def batched(self, texts, compute):
        """compute(batch) for all texts, those of one length together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = [None] * len(texts)
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            batch = self.tokenizer(
                [texts[i] for i in chosen], padding=True, return_tensors="pt"
            )
            for i, row in zip(chosen, compute(batch), strict=True):
                found[i] = row
        return torch.stack(found)


@torch.no_grad()
def relative_change(model, encoder):
    """||dW||/||W|| of each linear layer in the encoder's blocks."""
    before = dict(encoder.named_modules())
    found = {}
    for name, layer in model.named_modules():
        path = name.rpartition("bert.")[2]
        if not path.startswith("encoder.") or path not in before:
            continue
        if not isinstance(before[path], torch.nn.Linear):
            continue
        weight = before[path].weight
        if hasattr(layer, "get_delta_weight"):
            change = layer.get_delta_weight("default")
        else:
            change = layer.weight - weight
        found[path] = round((change.norm() / weight.norm()).item(), 5)
    return found


if __name__ == "__main__":
    main()
