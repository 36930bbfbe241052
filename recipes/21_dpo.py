"""DPO on preferences, with the adapter turned off as the reference.

    python 21_dpo.py --pairs pairs.jsonl --prompt "A prompt like those"
    python 21_dpo.py --pairs pairs.jsonl --adapter my-adapter --out better

Each record of pairs.jsonl is {"prompt": "...", "chosen": "...", "rejected":
"..."}. What differs from qlora_llm.py: the loss compares two answers, and each
with what the model gave it before. No second model is loaded for that: trl
keeps a frozen copy of the adapter as it was at the start. That is the base for
a new adapter, and with --adapter the one to go on from. Beside the preference
stands the ordinary loss on the chosen answers (--answers 0 leaves it out).
Needs trl: pip install trl.
"""

import json

from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

import qlora_llm


def read(file, tokenizer):
    """The pairs; the prompt in the model's own format, as in qlora_llm."""
    rows = []
    with open(file, encoding="utf8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt = qlora_llm.chat(tokenizer, row["prompt"])
            # trl's tokenizer call puts the first token in front by itself
            row["prompt"] = prompt.removeprefix(tokenizer.bos_token or "")
            rows.append({k: row[k] for k in ("prompt", "chosen", "rejected")})
    same = sum(row["chosen"] == row["rejected"] for row in rows)
    if same:
        raise SystemExit(f"{same} pairs prefer an answer to itself")
    print(f"{len(rows)} pairs")
    return Dataset.from_list(rows)


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
        learning_rate=args.rate,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=qlora_llm.DEVICE == "cpu",
        logging_steps=1,
        save_strategy="no",
    )


def main(args):
    model, tokenizer = qlora_llm.load(args.model)
    if args.adapter:
        model = PeftModel.from_pretrained(
            model, args.adapter, is_trainable=True
        )
    else:
        model = qlora_llm.add_lora(model)
    trainer = DPOTrainer(
        model,
        args=settings(args),
        train_dataset=read(args.pairs, tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    for name in ("loss", "logps/chosen", "logps/rejected"):
        print(f"{name}: {steps[0][name]:.3f} -> {steps[-1][name]:.3f}")
    trainer.model.save_pretrained(args.out, selected_adapters=["default"])
    del model, trainer

    base, tokenizer = qlora_llm.load(args.model)
    model = PeftModel.from_pretrained(base, args.out)
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
