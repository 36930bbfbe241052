"""Questions on entries of ICD-10-CM, answered by a language model over QLoRA.

    pip install "peftlab[medical]"
    python 20_medical.py

What differs from qlora_llm.py: the records are made here, one question in four
has no answer in its entry, and the tests count those apart. Phrasings of the
test questions are new to the model, and so are their entries' categories.

A lesson on public text. Never for billing, a diagnosis or any patient.
"""

import json

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


def score(model, tokenizer, questions, args):
    """Shares right to the letter: where there is an answer, and where none."""
    right = {True: [], False: []}
    for q in questions:
        args.prompt = prompt(q)
        given = qlora_llm.answer(model, tokenizer, args).strip()
        right[bool(q.answer)].append(given == (q.answer or NONE))
    return [sum(bits) / len(bits) for bits in (right[True], right[False])]


def main(args):
    tests = icd_questions.questions("test", args.tests, unseen=True)
    write(args.data, icd_questions.questions("train", args.train))
    args.prompt = prompt(tests[0])
    qlora_llm.main(args)

    base, tokenizer = qlora_llm.load(args.model)
    model = PeftModel.from_pretrained(base, args.out)
    rows = {"adapter": score(model, tokenizer, tests, args)}
    with model.disable_adapter():
        rows["base"] = score(model, tokenizer, tests, args)
    for name, (answered, refused) in rows.items():
        print(f"{name}: {answered:.2f} answered, {refused:.2f} refused right")


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--train", type=int, default=640)
    parser.add_argument("--tests", type=int, default=200)
    parser.set_defaults(data="icd.jsonl", length=256, tokens=40, epochs=3)
    main(parser.parse_args())
