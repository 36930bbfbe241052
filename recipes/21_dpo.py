"""DPO on preferences, with a frozen copy of the adapter as the reference.

    python 21_dpo.py --pairs pairs.jsonl --prompt "A prompt like those"
    python 21_dpo.py --pairs pairs.jsonl --adapter my-adapter --out better

Each record of pairs.jsonl is {"prompt": "...", "chosen": "...", "rejected":
"..."}. What differs from qlora_llm.py: the loss compares two answers, and each
with what the model gave it before. No second model is loaded for that: trl
keeps a frozen copy of the adapter as it was at the start. That is the base for
a new adapter, and with --adapter the one to go on from. Beside the preference
stands the ordinary loss on the chosen answers (--answers 0 leaves it out).
A twentieth of the pairs is held out. Needs trl: pip install trl.
"""

import json
import random

import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

import qlora_llm


def read(file, tokenizer, length):
    """The pairs, shuffled; the prompt in the model's own format.

    trl would cut a sequence that is too long, and its end with it: such pairs
    are left out, and their lines named."""
    rows, long = [], []
    with open(file, encoding="utf8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if row["chosen"] == row["rejected"]:
                raise SystemExit(f"line {number} prefers an answer to itself")

            prompt = qlora_llm.chat(tokenizer, row["prompt"])
            # trl's tokenizer call puts the first token in front by itself
            row["prompt"] = prompt.removeprefix(tokenizer.bos_token or "")
            if tokens(tokenizer, row) > length:
                long.append(number)
            else:
                keys = ("prompt", "chosen", "rejected")
                rows.append({key: row[key] for key in keys})
    print(f"{len(rows)} pairs, {len(long)} too long: lines {long[:20]}")
    if len(rows) < 2:
        raise SystemExit(f"need two pairs of at most {length} tokens")

    random.Random(0).shuffle(rows)
    return rows


def tokens(tokenizer, row):
    """Of the pair's longer sequence, with the end token."""
    texts = [row["prompt"] + row[which] for which in ("chosen", "rejected")]
    return 1 + max(map(len, tokenizer(texts)["input_ids"]))


def settings(args):
    losses, weights = ["sigmoid"], [1.0]
    if args.answers:
        losses, weights = ["sigmoid", "sft"], [1.0, args.answers]
    return DPOConfig(
        args.out,
        beta=args.beta,
        loss_type=losses,
        loss_weights=weights,
        max_length=args.length,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # 16 pairs a step
        per_device_eval_batch_size=4,
        learning_rate=args.rate,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=qlora_llm.DEVICE == "cpu",
        logging_steps=1,
        save_strategy="no",
    )


def trained(model):
    parameters = model.named_parameters()
    return {name: p for name, p in parameters if p.requires_grad}


def restore(model, weights):
    """Undo trl 1.16's rounding of A and B, and of their copy, to bfloat16.

    There a step as small as this rate is lost in every larger entry."""
    for name, parameter in model.named_parameters():
        name = name.replace(".ref.", ".default.")
        if name in weights:
            parameter.data = weights[name].clone()


def evaluate(trainer):
    """Means over the held-out pairs. Before the first step rewards are 0."""
    trainer.evaluate()
    return trainer.state.log_history[-1]


@torch.no_grad()
def ending(model, tokenizer, rows, limit):
    """The share of greedy answers that end within a number of tokens."""
    model.eval()
    ended = 0
    for row in rows:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        inputs = inputs.to(model.device)
        tokens = model.generate(
            **inputs, max_new_tokens=limit, do_sample=False
        )
        ended += tokens.shape[1] - inputs["input_ids"].shape[1] < limit
    return ended / len(rows)


def main(args):
    model, tokenizer = qlora_llm.load(args.model)
    rows = read(args.pairs, tokenizer, args.length)
    held_out = rows[: max(1, len(rows) // 20)]
    if args.adapter:
        model = PeftModel.from_pretrained(
            model, args.adapter, is_trainable=True
        )
    else:
        model = qlora_llm.add_lora(model)
    few = (held_out[:20], args.tokens)
    ended = ending(model, tokenizer, *few)

    weights = {name: p.detach().clone() for name, p in trained(model).items()}
    trainer = DPOTrainer(
        model,
        args=settings(args),
        train_dataset=Dataset.from_list(rows[len(held_out) :]),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
    )
    restore(trainer.model, weights)
    before = evaluate(trainer)
    trainer.train()
    after = evaluate(trainer)
    print(f"{len(held_out)} held-out pairs")
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        key = f"eval_{name}"
        print(f"{name}: {before[key]:.3f} -> {after[key]:.3f}")
    trainer.model.save_pretrained(args.out, selected_adapters=["default"])
    del model, trainer

    base, tokenizer = qlora_llm.load(args.model)
    model = PeftModel.from_pretrained(base, args.out)
    now = ending(model, tokenizer, *few)
    print(f"answers that end: {ended:.2f} -> {now:.2f}")
    print("with the adapter:", qlora_llm.answer(model, tokenizer, args))
    with model.disable_adapter():
        print("without it:", qlora_llm.answer(model, tokenizer, args))


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--pairs", default="pairs.jsonl")
    parser.add_argument("--adapter", help="one to go on from")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--answers", type=float, default=1.0)
    parser.set_defaults(rate=2e-5, out="preferred")
    main(parser.parse_args())
