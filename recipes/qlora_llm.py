"""QLoRA on one GPU: a language model learns to answer as your records do.

    pip install torch transformers peft accelerate bitsandbytes
    hf auth login
    python qlora_llm.py --data records.jsonl --prompt "A prompt like those"

The default model is gated: accept its licence on its page on the hub, then log
in. `--model Qwen/Qwen2.5-7B-Instruct` needs neither. records.jsonl has one
record a row, {"prompt": "...", "answer": "..."}. The GPU must have bfloat16 (a
T4 has not).
"""

import argparse
import json
import random

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B-Instruct")
    parser.add_argument("--data", default="records.jsonl")
    parser.add_argument("--out", default="my-adapter")
    parser.add_argument("--prompt", default="Who are you?")
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens at most"
    )
    parser.add_argument("--tokens", type=int, default=100, help="of an answer")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rate", type=float, default=2e-4)
    return parser


FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def load(name, packing=FOUR_BITS):
    """The base model, packed into 4 bits, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=packing,
        dtype=torch.bfloat16,
        device_map=DEVICE,
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def add_lora(model):
    """Freeze the base, checkpoint its activations, add LoRA to all linears."""
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    return with_lora(model)


def with_lora(model):
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return model


def chat(tokenizer, prompt):
    """The prompt in the model's own format, up to where the answer begins."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
    )


def encode(tokenizer, record, length):
    """Token ids, and labels without a loss on the prompt.

    A prompt that is too long loses its middle: the format around it and the
    answer stay whole. None if the answer takes more than half the length."""
    prompt = chat(tokenizer, record["prompt"])
    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = record["answer"] + tokenizer.eos_token
    answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    room = length - len(answer)
    if room < length // 2:
        return None

    if len(prompt) > room:
        half = room // 2
        prompt = prompt[:half] + prompt[len(prompt) - (room - half) :]
    return {
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
    }


def read(file, tokenizer, length):
    """The records of a file, encoded and shuffled."""
    with open(file, encoding="utf8") as lines:
        records = [
            encode(tokenizer, json.loads(line), length) for line in lines
        ]
    short = [record for record in records if record]
    print(
        f"{len(short)} records, {len(records) - len(short)} answers too long"
    )
    random.Random(0).shuffle(short)
    return short


def train(model, tokenizer, records, held_out, args):
    """Train; print the held-out loss before and after, return the latter."""
    settings = TrainingArguments(
        args.out,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # 16 sequences a step
        per_device_eval_batch_size=4,
        learning_rate=args.rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.3,
        bf16=True,
        use_cpu=DEVICE == "cpu",
        logging_steps=10,
        save_strategy="no",
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=records,
        eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss on held-out records: {before:.3f} -> {after:.3f}")
    return after


@torch.no_grad()
def answer(model, tokenizer, args):
    model.eval()
    text = chat(tokenizer, args.prompt)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(model.device)
    tokens = model.generate(
        **inputs, max_new_tokens=args.tokens, do_sample=False
    )
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def main(args, load=load, add_lora=add_lora, read=read, train=train):
    """The whole run. A later recipe hands in the function that it changes."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        raise SystemExit("no bfloat16 here: take an A10, L4, RTX 30 or newer")

    model, tokenizer = load(args.model)
    model = add_lora(model)
    records = read(args.data, tokenizer, args.length)
    held_out = records[: max(1, len(records) // 20)]
    train(model, tokenizer, records[len(held_out) :], held_out, args)
    model.save_pretrained(args.out)
    del model

    # As on another day: the base model and the saved adapter.
    base, tokenizer = load(args.model)
    model = PeftModel.from_pretrained(base, args.out)
    print("with the adapter:", answer(model, tokenizer, args))
    with model.disable_adapter():
        print("without it:", answer(model, tokenizer, args))


if __name__ == "__main__":
    main(options().parse_args())
