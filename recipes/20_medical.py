"""Questions on entries of ICD-10-CM, answered by a language model over QLoRA.

    pip install "peftlab[medical]"
    python 20_medical.py

What differs from qlora_llm.py: the records are made here, one question in four
has no answer, and the tests count those apart. An answer that is no quotation
from the entry is not given. A record longer than --length is named and left
out: cut, it could lose its answer. Phrasings of the test questions are new to
the model, and so are their entries' categories.

A lesson on public text. Never for billing, a diagnosis or any patient.
"""

import json
import random

from peft import PeftModel

import qlora_llm
from peftlab.kit import icd_questions

NONE = "not stated"


def prompt(q):
    return f"{q.context}\n{q.question} Quote the entry, or say: {NONE}."


def write(file, questions):
    """One record a row, for qlora_llm.read."""
    with open(file, "w", encoding="utf8") as rows:
        for q in questions:
            record = {"prompt": prompt(q), "answer": q.answer or NONE}
            rows.write(json.dumps(record) + "\n")


def read(file, tokenizer, length):
    """The records of a file that need no cut, encoded and shuffled."""
    with open(file, encoding="utf8") as rows:
        records = [json.loads(row) for row in rows]
    whole = []
    for record in records:
        encoded = qlora_llm.encode(tokenizer, record, 10**6)
        if len(encoded["labels"]) <= length:
            whole.append(encoded)
        else:
            n, name = len(encoded["labels"]), record["prompt"][:40]
            print(f"left out, {n} tokens: {name} ...")
    if not whole:
        raise SystemExit(f"no record has {length} tokens or fewer")
    print(f"{len(whole)} records, {len(records) - len(whole)} too long")
    random.Random(0).shuffle(whole)
    return whole


def quotation(given, q):
    """What is given out: a piece of the entry, or that there is none."""
    return given if given and given in q.context else NONE


def score(model, tokenizer, questions, args):
    """Shares right, to the letter: where there is an answer, where there is
    none; and how many answers were no quotations."""
    right, loose = {True: [], False: []}, 0
    for q in questions:
        args.prompt = prompt(q)
        said = qlora_llm.answer(model, tokenizer, args).strip()
        given = quotation(said, q)
        loose += said != given
        right[bool(q.answer)].append(given == (q.answer or NONE))
    shares = [sum(bits) / len(bits) for bits in (right[True], right[False])]
    return *shares, loose


def main(args):
    tests = icd_questions.questions("test", args.tests, unseen=True)
    write(args.data, icd_questions.questions("train", args.train))
    args.prompt = prompt(tests[0])
    qlora_llm.main(args, read=read)

    base, tokenizer = qlora_llm.load(args.model)
    model = PeftModel.from_pretrained(base, args.out)
    rows = {"adapter": score(model, tokenizer, tests, args)}
    with model.disable_adapter():
        rows["base"] = score(model, tokenizer, tests, args)
    for name, (answered, refused, loose) in rows.items():
        print(f"{name}: {answered:.2f} answered, {refused:.2f} refused right")
        print(f"    {loose} answers were no quotation, and were not given")


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--train", type=int, default=640)
    parser.add_argument("--tests", type=int, default=200)
    parser.set_defaults(data="icd.jsonl", length=256, tokens=40, epochs=3)
    main(parser.parse_args())
