"""Faults in the data, each trained or asked with five seeds: what they cost.

LoRA r=8 on all linears of tiny-decoder, Finnish dates in its own chat template, 100
steps of 16 at a learning rate of 0.01. The faults of training are one change each to
the batch; those of asking are put to the model that was trained rightly. 400 test
dates. Besides exact matches we store how many answers begin with the right one.
About seven minutes on one core."""

import copy

import torch
from transformers import get_linear_schedule_with_warmup

from experiments.common import differences, store, sweep
from peftlab import lora
from peftlab.kit import base_models, data
from peftlab.kit.results import shares, where
from peftlab.kit.train import batches

OWN = """{% for m in messages %}{% if m.role == "user" %}
{{- bos_token + m.content }}
{%- else %}
{{- " =" }}{% generation %}{{ " " + m.content + eos_token }}{% endgeneration %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ " =" }}{% endif %}"""
OTHER = OWN.replace("+ m.content }}\n{%- else", '+ "user: " + m.content }}\n{%- else')
OTHER = OTHER.replace('" ="', '"\\nassistant:"')
SEEDS, STEPS, BATCH, RATE, CUT = range(5), 100, 16, 0.01, 24
TRAINED = ("right", "prompt", "no_end", "cut", "other", "left", "packed", "leaking")
ASKED = ("right_padding", "no_generation_prompt", "two_starts", "other_asked")


def messages(record):
    user = dict(role="user", content=record.text)
    return [user, dict(role="assistant", content=record.answer)]


def encode(tokenizer, record, fault):
    """Token ids and labels of a record, with one fault."""
    chat = messages(record)
    prompt = tokenizer.apply_chat_template(
        chat[:1], add_generation_prompt=True, return_dict=False
    )
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    if fault == "prompt":
        labels = ids
    if fault == "no_end":
        ids, labels = ids[:-1], labels[:-1]
    if fault == "cut":
        ids, labels = ids[:CUT], labels[:CUT]
    return ids, labels


def collate(rows, fault):
    """A batch of (ids, labels): padded, or packed into one row."""
    if fault in ("packed", "leaking"):
        parts = zip(*rows, strict=True)
        ids, labels = (torch.tensor([sum(part, [])]) for part in parts)
        places = [torch.arange(len(ids_)) for ids_, _ in rows]
        batch = dict(input_ids=ids, labels=labels, position_ids=torch.cat(places)[None])
        return batch | dict(use_cache=fault == "leaking")

    longest = max(len(ids) for ids, _ in rows)

    def padded(lists, fill):
        pads = [[fill] * (longest - len(row)) for row in lists]
        both = [
            p + row if fault == "left" else row + p
            for row, p in zip(lists, pads, strict=True)
        ]
        return torch.tensor(both)

    ids, labels = zip(*rows, strict=True)
    mask = padded([[1] * len(row) for row in ids], 0)
    batch = dict(input_ids=padded(ids, 0), labels=padded(labels, -100))
    return batch | dict(attention_mask=mask)


def train(base, tokenizer, fault, seed):
    torch.manual_seed(seed)
    model = lora.add(copy.deepcopy(base), "all-linear", r=8, alpha=16).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    dates = data.records("dates", "fi", 3600, "train")
    for _, some in zip(range(STEPS), batches(dates, BATCH, seed), strict=False):
        rows = [encode(tokenizer, record, fault) for record in some]
        model(**collate(rows, fault)).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answers(model, tokenizer, records, fault):
    """What the model writes to each record, asked with one fault."""
    texts = [
        tokenizer.apply_chat_template(
            messages(record)[:1],
            tokenize=False,
            add_generation_prompt=fault != "no_generation_prompt",
            chat_template=OTHER if fault in ("other", "other_asked") else OWN,
        )
        for record in records
    ]
    inputs = tokenizer(
        texts,
        padding=True,
        padding_side="right" if fault == "right_padding" else "left",
        add_special_tokens=fault == "two_starts",
        return_tensors="pt",
    )
    inputs.pop("token_type_ids", None)
    new = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    new = new[:, inputs["input_ids"].shape[1] :]
    return [t.strip(" ") for t in tokenizer.batch_decode(new, skip_special_tokens=True)]


def graded(fault, seed, given, records):
    pairs = list(zip(given, records, strict=True))
    exact = "".join("01"[a == r.answer] for a, r in pairs)
    begins = "".join("01"[a.startswith(r.answer)] for a, r in pairs)
    return dict(fault=fault, seed=seed, exact=exact, begins=begins)


def one(job):
    """One training: (fault, seed); the right one is asked wrongly too."""
    fault, seed = job
    torch.set_num_threads(1)
    base, tokenizer = base_models.load("tiny-decoder", device="cpu")
    base_models.logging.set_verbosity_error()  # it warns of padding on the right
    tokenizer.chat_template = OTHER if fault == "other" else OWN
    model = train(base, tokenizer, fault, seed)
    test = data.records("dates", "fi", 400, "test")
    asked = [fault, *ASKED] if fault == "right" else [fault]
    return [
        graded(way, seed, answers(model, tokenizer, test, way), test) for way in asked
    ]


def derive(runs):
    """Means, lowest and highest, and what each fault costs, with a t interval."""
    figures, right = {}, shares(where(runs, fault="right"), "exact")
    for fault in (*TRAINED, *ASKED):
        mine = where(runs, fault=fault)
        for key in ("exact", "begins"):
            found = shares(mine, key)
            figures[f"{fault}.{key}"] = sum(found) / len(found)
            figures[f"{fault}.{key}.lowest"] = min(found)
            figures[f"{fault}.{key}.highest"] = max(found)
        if fault != "right":
            costs = differences(f"{fault}.lost", right, shares(mine, "exact"), ".")
            figures |= costs
    return {k: dict(value=v, tolerance=0.05) for k, v in figures.items()}


def main():
    jobs = [(fault, seed) for fault in TRAINED for seed in SEEDS]
    runs = sum(sweep(one, jobs, "data faults"), [])
    figures = derive(runs)
    setting = dict(steps=STEPS, batch=BATCH, lr=RATE, r=8, alpha=16, cut=CUT)
    store("data_faults", runs, figures=figures, setting=setting)
    for key, figure in figures.items():
        print(f"{key:40} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
