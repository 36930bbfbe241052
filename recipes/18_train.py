r"""One training script: on one GPU, on several, and again after a crash.

    pip install torch transformers peft accelerate bitsandbytes "wandb>=0.30"
    python 18_train.py --data records.jsonl --load-in-4bit
    python 18_train.py --data records.jsonl --load-in-4bit --resume
    accelerate launch --multi_gpu --num_processes 8 18_train.py \
        --data records.jsonl --batch 1 --accumulate 2

records.jsonl has one record a row, {"prompt": "...", "completion": "..."}. A
step sees --batch x --accumulate x processes sequences: 16 in each of these
lines. With --shard each process holds a part of the base model only (FSDP2;
not in 4 bits, and its runs cannot be resumed yet). --resume goes on from the
last whole checkpoint in --out, or starts anew where there is none.
--report-to wandb writes to OUT/wandb; with WANDB_MODE=online and a login it
is uploaded as well.
"""

import argparse
import importlib.util
import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

GPU = torch.cuda.is_available()
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # accelerate launch sets it


def options():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    add("--data", required=True)
    add("--out", default="my-adapter")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=4, help="sequences at once, a process")
    add("--accumulate", type=int, default=4)
    add("--rate", type=float, default=2e-4)
    add("--optim", default="adamw_torch", help="sgd, paged_adamw_8bit, ...")
    add("--dropout", type=float, default=0.0)
    add("--save-every", type=int, default=50)
    add("--seed", type=int, default=0)
    add("--dtype", default="bfloat16" if GPU else "float32")
    add("--load-in-4bit", action="store_true")
    add("--resume", action="store_true")
    add("--shard", action="store_true")
    add("--report-to", choices=["none", "wandb"], default="none")
    return parser


def check(args):
    """Stop before any work, with one sentence, where it could not end well."""
    wanted = ["bitsandbytes"] * args.load_in_4bit
    wanted += ["wandb"] * (args.report_to == "wandb")
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{name} is not installed: pip install {name}")
    if not Path(args.data).is_file():
        raise SystemExit(f"there is no file {args.data}: name it with --data")
    if args.shard and (args.load_in_4bit or args.resume or PROCESSES == 1):
        raise SystemExit(
            "--shard needs `accelerate launch` with two or more processes,"
            " and goes neither with --load-in-4bit nor with --resume"
        )
    if not args.resume and any(Path(args.out).glob("checkpoint-*")):
        raise SystemExit(
            f"{args.out} has checkpoints: --resume goes on from them;"
            " for another run name another --out"
        )


def log_to_wandb(folder):
    """Offline unless WANDB_MODE says online; without a login offline too."""
    import wandb

    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DIR", str(folder))
    known, mode = True, os.environ.setdefault("WANDB_MODE", "offline")
    if mode == "online":
        try:
            known = wandb.login(prompt=False)
        except Exception:  # a wrong key, or nobody answers
            known = False
    if not known:
        os.environ["WANDB_MODE"] = "offline"
        print(
            "no login to wandb: this run is logged to a file. Set"
            " WANDB_API_KEY or call `wandb login`; `wandb sync` uploads it."
        )


def load(args):
    """The base model with LoRA on all linears, and the tokenizer."""
    settings = dict(dtype=getattr(torch, args.dtype))
    if args.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=settings["dtype"],
        )
    if args.shard:
        from transformers.distributed import DistributedConfig

        settings["distributed_config"] = DistributedConfig(fsdp_size=PROCESSES)
    elif GPU:
        settings["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    model = AutoModelForCausalLM.from_pretrained(args.model, **settings)
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=False,  # Trainer turns it on
        )
    set_seed(args.seed)  # every process draws the same A
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def encode(tokenizer, record):
    """Token ids, and labels without a loss on the prompt."""
    text, special = record["prompt"], True
    if tokenizer.chat_template:
        special = False  # the template writes them
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
        )
    prompt = tokenizer(text, add_special_tokens=special)["input_ids"]
    answer = record["completion"] + tokenizer.eos_token
    answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    labels = [-100] * len(prompt) + answer
    return {"input_ids": prompt + answer, "labels": labels}


def read(file, tokenizer):
    """The records of a file; a row that is none is named."""
    records = []
    with open(file, encoding="utf8") as rows:
        for number, row in enumerate(rows, 1):
            try:
                records.append(encode(tokenizer, json.loads(row)))
            except (ValueError, TypeError, KeyError):
                raise SystemExit(
                    f"{file}, row {number}: a record is"
                    ' {"prompt": "...", "completion": "..."}'
                ) from None
    if not records:
        raise SystemExit(f"{file} is empty")
    return records


def held(model):
    """MB of the base's weights in this process, and MB of them all."""
    base = [p for n, p in model.named_parameters() if "lora_" not in n]
    here = [p.to_local() if hasattr(p, "to_local") else p for p in base]
    return [sum(p.nbytes for p in part) / 1e6 for part in (here, base)]


def arguments(args):
    renamed = hasattr(TrainingArguments, "activation_checkpointing")  # 5.23
    checkpointing = "activation" if renamed else "gradient"
    more = {f"{checkpointing}_checkpointing": not args.shard}
    return TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.rate,
        optim=args.optim,
        logging_steps=1,
        save_steps=args.save_every,
        save_total_limit=2,  # the one before, should the disk spoil the last
        save_only_model=args.shard,
        bf16=args.dtype == "bfloat16",
        use_cpu=not GPU,
        ddp_find_unused_parameters=False,
        report_to=args.report_to,
        seed=args.seed,
        disable_tqdm=True,
        **more,
    )


def last_whole_checkpoint(out):
    """The one with the most steps whose last file, the state, can be read."""
    whole = {}
    for file in Path(out).glob("checkpoint-*/trainer_state.json"):
        try:
            whole[json.loads(file.read_text("utf8"))["global_step"]] = file
        except ValueError:  # the run was killed while it wrote this
            continue
    return str(whole[max(whole)].parent) if whole else None


def main(args):
    check(args)
    if args.report_to == "wandb" and os.environ.get("RANK", "0") == "0":
        log_to_wandb(args.out)
    model, tokenizer = load(args)
    records = read(args.data, tokenizer)
    trainer = Trainer(
        model,
        arguments(args),
        train_dataset=records,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    if PROCESSES > 1:
        here, base = held(model)
        rank = os.environ["RANK"]
        print(f"process {rank} holds {here:.2f} of {base:.2f} MB of the base")
    start = last_whole_checkpoint(args.out) if args.resume else None
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main(options().parse_args())
