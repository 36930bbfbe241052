"""MiniLM answers questions on entries of ICD-10-CM: the head alone, and LoRA.

Three seeds of each, on 960 questions; the threshold below which a model refuses is
chosen on 96 development questions. Tests are 240 questions in each of three wordings:
known phrasings, unseen ones, and known ones with the notes' labels reworded. One
question in four has no answer and is counted apart.

The head alone sees the frozen encoder's output, computed once, and is trained until
little moves: 400 steps on all questions at once. `longer` is LoRA with three passes
over the questions in place of one. Wrong answers to what is never coded together are
counted by what they are. Intervals draw whole sentences again, all their questions
with them: those in one sentence are right or wrong together.

Beside these stand three baselines that train nothing: `rule`, a program of a few lines
that knows the phrasings and the labels; `matched`, the same rule, given the known
phrasing that frozen MiniLM finds nearest to the question; and `labels`, which in the
same way finds the nearest to each label that it does not know, too. Fifteen minutes on
one free core."""

import itertools
import random
import re

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging

from experiments.common import store, sweep
from peftlab.kit import base_models, icd_questions, measure, tasks
from peftlab.kit.icd_questions import questions
from peftlab.kit.results import share, where

ASKED, BATCH, RATE, HEAD_RATE = 960, 8, 1e-3, 1e-2
DEV, TEST = 96, 240
SEEDS, PASSES = range(3), dict(LoRA=1, longer=3)
WORDINGS = {"known": {}, "unseen": dict(unseen=True), "reworded": dict(reworded=True)}
METHODS = ("rule", "matched", "labels", "head", "LoRA", "longer")
AGAINST = [("LoRA", "head"), ("longer", "LoRA")]
AGAINST += [(m, rule) for m in ("LoRA", "longer") for rule in ("matched", "labels")]
LAYERS = ["query", "key", "value", "dense"]
LABEL = r"\. ([^.:]+): "


class Reader:
    """MiniLM with a head that scores each token as an answer's first and its last."""

    def __init__(self, lora, seed):
        folder = base_models.minilm_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(seed)
        self.model = BertForQuestionAnswering.from_pretrained(folder)
        if lora:
            config = LoraConfig(
                r=8, lora_alpha=16, target_modules=LAYERS, task_type="QUESTION_ANS"
            )
            self.model = get_peft_model(self.model, config)

    def encode(self, asked):
        """Tensors, and each answer's first and last token: 0, [CLS], for none."""
        batch = self.tokenizer(
            [q.question for q in asked],
            [q.context for q in asked],
            padding=True,
            return_tensors="pt",
        )
        ends = torch.zeros(2, len(asked), dtype=torch.long)
        for i, q in enumerate(asked):
            if q.answer:
                last = q.start + len(q.answer) - 1
                ends[0, i] = batch.char_to_token(i, q.start, 1)
                ends[1, i] = batch.char_to_token(i, last, 1)
        return batch, ends

    def fit(self, asked, seed, passes):
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        head = [p for n, p in named if "qa_outputs" in n]
        body = [p for n, p in named if "qa_outputs" not in n]
        groups = [dict(params=body, lr=RATE), dict(params=head, lr=HEAD_RATE)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps = passes * len(asked) // BATCH
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        batches, order, rng = by_length(asked, BATCH), [], random.Random(seed)
        for _ in range(passes):
            rng.shuffle(batches)
            order += batches
        self.model.train()
        for some in order:
            batch, (first, last) = self.encode(some)
            out = self.model(**batch, start_positions=first, end_positions=last)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(body + head, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def fit_head(self, asked):
        """The head alone, on hidden states that are computed once."""
        head, parts = self.model.qa_outputs, []
        with torch.no_grad():
            for some in by_length(asked, 48):
                batch, ends = self.encode(some)
                hidden = self.model.bert(**batch).last_hidden_state
                parts.append((hidden, batch["attention_mask"], ends))
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
            for hidden, mask, ends in parts:
                logits = head(hidden).masked_fill(mask[..., None] == 0, -1e9)
                loss = sum(
                    torch.nn.functional.cross_entropy(
                        logits[..., k], ends[k], reduction="sum"
                    )
                    for k in (0, 1)
                )
                (loss / 2 / len(asked)).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def read(self, asked):
        """{question: (its best span, by how much it beats no answer)}"""
        self.model.eval()
        found = {}
        for some in by_length(asked, 50):
            batch, _ = self.encode(some)
            out = self.model(**batch)
            for i, q in enumerate(some):
                given = [s == 1 for s in batch.sequence_ids(i)]
                span, margin = icd_questions.best_span(
                    out.start_logits[i], out.end_logits[i], torch.tensor(given)
                )
                first = batch.token_to_chars(i, span[0]).start
                last = batch.token_to_chars(i, span[1]).end
                found[q] = q.context[first:last], margin
        return found


def by_length(asked, size):
    """Batches of questions of about one length."""
    order = sorted(asked, key=lambda q: len(q.context))
    return [order[k : k + size] for k in range(0, len(order), size)]


def matched(asked, labels=False):
    """The rule's answers, given the known phrasing that MiniLM finds nearest; with
    `labels`, also to each label that ICD-10-CM does not print."""
    model, tokenizer = base_models.load_minilm(device="cpu")

    @torch.no_grad()
    def vectors(texts):
        return tasks.embed(model, tokenizer(texts, padding=True, return_tensors="pt"))

    def nearest(texts, known):
        closest = (vectors(texts) @ vectors(known).T).argmax(1)
        return {text: known[i] for text, i in zip(texts, closest, strict=True)}

    known = {text: k for k, asks in icd_questions.KNOWN.items() for text in asks}
    named = nearest(sorted({q.question for q in asked}), list(known))
    printed = icd_questions.LABELS
    notes = [text for text, kind in known.items() if kind in printed]
    contexts = [q.context for q in asked]
    if labels:
        found = {x for text in contexts for x in re.findall(LABEL, text)}
        new = sorted(found - set(printed.values()))
        said = nearest(new, notes) if new else {}
        names = {x: printed[known[text]] for x, text in said.items()}
        contexts = [
            re.sub(LABEL, lambda m: f". {names.get(m[1], m[1])}: ", text)
            for text in contexts
        ]
    pairs = zip(asked, contexts, strict=True)
    return [icd_questions.rule(named[q.question], text) for q, text in pairs]


def graded(asked, given):
    """What a run stores: a bit for each question, and the mean token F1."""
    pairs = list(zip(given, asked, strict=True))
    parts = [icd_questions.token_f1(a, q.answer) for a, q in pairs if q.answer]
    bits = "".join("01"[a == q.answer] for a, q in pairs)
    return dict(bits=bits, f1=sum(parts) / len(parts))


def mistakes(asked, given):
    """What stands in place of what is never coded together: {mistake: how many}, each
    wrong answer under one of them."""
    others = (icd_questions.LABELS["apart"], *icd_questions.REWORDED["apart"])
    found = dict.fromkeys(("asked", "refused", "over-run", "Excludes2", "else"), 0)
    for q, a in zip(asked, given, strict=True):
        if q.kind != "never" or not q.answer:
            continue
        found["asked"] += 1
        if not a:
            found["refused"] += 1
        elif a != q.answer and q.answer in a:
            found["over-run"] += 1
        elif any(f"{label}: {a}" in q.context for label in others):
            found["Excludes2"] += 1
        elif a != q.answer:
            found["else"] += 1
    return found


def sentences(asked, wording):
    """The words that each question hangs on: its own, or the label asked for (that of
    the entry's first note, where none is asked for or there is none)."""
    if wording != "reworded":
        return [q.question for q in asked]
    ends = [q.start if q.start > 0 else None for q in asked]
    labels = [
        re.findall(LABEL, q.context[:e]) for q, e in zip(asked, ends, strict=True)
    ]
    pairs = zip(labels, ends, strict=True)
    return [found[-1] if end else found[0] for found, end in pairs]


def clustered(gains, clusters, draws=2000):
    """The mean of `gains`, and its 95% interval, with whole clusters drawn again."""
    groups = {}
    for gain, cluster in zip(gains, clusters, strict=True):
        groups.setdefault(cluster, []).append(gain)
    groups, rng, means = list(groups.values()), random.Random(0), []
    for _ in range(draws):
        drawn = [x for some in rng.choices(groups, k=len(groups)) for x in some]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    cut = draws // 40
    return sum(gains) / len(gains), means[cut], means[-1 - cut]


def apart(found):
    """The share of pairs, a question with an answer and one without, in which the
    first has the greater margin: no threshold is needed."""
    has = torch.tensor([bool(q.answer) for q in found])
    margins = torch.tensor([margin for _, margin in found.values()])
    return (margins[has][:, None] > margins[~has]).double().mean().item()


def one(job):
    """One run: (method, seed)."""
    method, seed = job
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    run = dict(method=method, seed=seed)
    if method in ("rule", "matched", "labels"):
        for name, wording in WORDINGS.items():
            asked = questions("test", TEST, **wording)
            if method == "rule":
                given = [icd_questions.rule(q.question, q.context) for q in asked]
            else:
                given = matched(asked, method == "labels")
            run[name] = graded(asked, given)
        return run

    reader = Reader(method in PASSES, seed)
    asked = questions("train", ASKED, seed)
    if method in PASSES:
        reader.fit(asked, seed, PASSES[method])
    else:
        reader.fit_head(asked)
    dev = questions("dev", DEV)
    run["threshold"] = icd_questions.threshold(reader.read(dev))
    for name, wording in {"dev": None, **WORDINGS}.items():
        asked = dev if wording is None else questions("test", TEST, **wording)
        found = reader.read(asked)
        given = [found[q][0] if found[q][1] > run["threshold"] else "" for q in asked]
        run[name] = graded(asked, given)
        run[name] |= dict(never=mistakes(asked, given), apart=apart(found))
    part = reader.model if method in PASSES else reader.model.qa_outputs
    run["trained"] = measure.parameters(part)[0]
    return run


def by_question(runs, method, name):
    """The share of seeds that are right, for each question."""
    bits = [run[name]["bits"] for run in where(runs, method=method)]
    return [share("".join(column)) for column in zip(*bits, strict=True)]


def derive(runs):
    """Means over the seeds; gains of one method over another, drawn by sentence."""
    asked = questions("test", TEST)
    parts = {
        "all": [True] * TEST,
        "answered": [bool(q.answer) for q in asked],
        "refused": [not q.answer for q in asked],
    }
    for kind in icd_questions.KINDS:
        parts[kind] = [q.kind == kind and bool(q.answer) for q in asked]
    figures, shares = {}, {}
    for method in METHODS:
        mine = where(runs, method=method)
        for name in WORDINGS:
            for part, chosen in parts.items():
                found = [
                    share("".join(itertools.compress(run[name]["bits"], chosen)))
                    for run in mine
                ]
                shares[method, name, part] = found
                figures[f"{method}.{name}.{part}"] = sum(found) / len(found)
            f1 = [run[name]["f1"] for run in mine]
            figures[f"{method}.{name}.f1"] = sum(f1) / len(f1)
    for name, wording in WORDINGS.items():
        words = sentences(questions("test", TEST, **wording), name)
        each = {method: by_question(runs, method, name) for method in METHODS}
        for a, b in AGAINST:
            gains = [x - y for x, y in zip(each[a], each[b], strict=True)]
            found = clustered(gains, words)
            for key, value in zip(("gain", "low", "high"), found, strict=True):
                figures[f"{a}.{name}.over.{b}.{key}"] = value
        for method in ("LoRA", "longer"):
            seeds = shares[method, name, "all"]
            figures[f"{method}.{name}.least"] = min(seeds)
            figures[f"{method}.{name}.most"] = max(seeds)
            mine = where(runs, method=method)
            margins = [run[name]["apart"] for run in mine]
            figures[f"{method}.{name}.margins"] = sum(margins) / len(margins)
            for mistake in mine[0][name]["never"]:
                n = sum(run[name]["never"][mistake] for run in mine)
                figures[f"{method}.{name}.never.{mistake}"] = n
            groups = {}
            for right, word in zip(each[method], words, strict=True):
                groups.setdefault(word, []).append(right)
            said = sorted(sum(some) / len(some) for some in groups.values())
            figures[f"{method}.{name}.sentences"] = len(said)
            figures[f"{method}.{name}.sentences.least"] = said[0]
            figures[f"{method}.{name}.sentences.most"] = said[-1]
            half = sum(x < 0.5 for x in said)
            figures[f"{method}.{name}.sentences.below"] = half
    figures["trained"] = where(runs, method="LoRA")[0]["trained"]
    return {key: dict(value=float(v), tolerance=0) for key, v in figures.items()}


def main():
    jobs = [("rule", 0), ("matched", 0), ("labels", 0)]
    jobs += [(method, seed) for seed in SEEDS for method in ("LoRA", "head", "longer")]
    runs = sweep(one, jobs, "medical questions")
    figures = derive(runs)
    setting = dict(asked=ASKED, batch=BATCH, rate=RATE, head_rate=HEAD_RATE)
    store("medical_questions", runs, figures=figures, setting=setting)
    for key, figure in figures.items():
        print(f"{key:28} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
