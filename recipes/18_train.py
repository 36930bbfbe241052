r"""One training script: on one GPU, on several, and again after a crash.

    pip install "transformers>=5.15" "peft>=0.20" "accelerate>=1.14"
    pip install "bitsandbytes>=0.50" "wandb>=0.30"    # where you use them
    python 18_train.py --data records.jsonl --load-in-4bit
    python 18_train.py --data records.jsonl --load-in-4bit --resume
    accelerate launch --multi_gpu --num_processes 8 18_train.py \
        --data records.jsonl --batch 1 --accumulate 2

records.jsonl has one record a row, {"prompt": "...", "completion": "..."}. A
step sees --batch x --accumulate x processes sequences: 16 in each of these
lines. Records longer than --max-length tokens are left out and counted, none
is cut. With --shard each process holds a part of the base model only (FSDP2,
from transformers 5.24; not in 4 bits, and its runs cannot be resumed yet).
--resume goes on from the last whole checkpoint in --out, with as many
processes as before, or starts anew where there is none. --report-to wandb
writes to OUT/wandb; with WANDB_MODE=online and a login it is uploaded as well.
"""

import argparse
import importlib.util
import json
import os
import zipfile
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors import SafetensorError, safe_open
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
RANK = int(os.environ.get("RANK", 0))  # and this
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def options():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    add("--data", required=True)
    add("--out", default="my-adapter")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=4, help="sequences at once, a process")
    add("--accumulate", type=int, default=4)
    add("--max-length", type=int, default=1024, help="of a record, in tokens")
    add("--rate", type=float, default=2e-4)
    add("--optim", default="adamw_torch", help="sgd, paged_adamw_8bit, ...")
    add("--dropout", type=float, default=0.0)
    add("--save-every", type=int, default=50)
    add("--seed", type=int, default=0)
    dtypes = ["bfloat16", "float32"]  # float16 would need a loss scaler
    add("--dtype", choices=dtypes, default=dtypes[0] if GPU else dtypes[1])
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
    if PROCESSES == 1 and torch.cuda.device_count() > 1:
        raise SystemExit(
            f"one process sees {torch.cuda.device_count()} GPUs, and Trainer"
            " would multiply the batch by that: set CUDA_VISIBLE_DEVICES=0,"
            " or start it with `accelerate launch`, a process for each GPU"
        )
    if args.shard and VERSION < (5, 24):
        raise SystemExit(
            "--shard needs transformers 5.24 or newer, here is"
            f" {transformers.__version__}: pip install -U transformers"
        )
    if args.shard and (args.load_in_4bit or args.resume or PROCESSES == 1):
        raise SystemExit(
            "--shard needs `accelerate launch` with two or more processes,"
            " and goes neither with --load-in-4bit nor with --resume"
        )
    if not args.resume and checkpoints(args.out):
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
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.eos_token is None:
        raise SystemExit(
            f"the tokenizer of {args.model} has no end token: set eos_token"
            " in its tokenizer_config.json, or an answer has no end to learn"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
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
    return get_peft_model(model, config), tokenizer


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


def parse(row):
    """A row as a record; ValueError, TypeError or KeyError if it is none."""
    record = json.loads(row)
    texts = {key: record[key] for key in ("prompt", "completion")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("a prompt and a completion are texts")
    return texts


def read(file, tokenizer, longest):
    """The records of a file that are not too long; a row that is none is
    named."""
    records = []
    with open(file, encoding="utf8") as rows:
        for number, row in enumerate(rows, 1):
            try:
                record = parse(row)
            except (ValueError, TypeError, KeyError):
                raise SystemExit(
                    f"{file}, row {number}: a record is"
                    ' {"prompt": "...", "completion": "..."}'
                ) from None
            records.append(encode(tokenizer, record))
    if not records:
        raise SystemExit(f"{file} is empty")
    short = [r for r in records if len(r["input_ids"]) <= longest]
    said = (
        f"{len(records) - len(short)} of {len(records)} records are longer"
        f" than --max-length {longest} tokens"
    )
    if not short:
        raise SystemExit(f"{file}: {said}, and none is left")
    if len(short) < len(records) and RANK == 0:
        print(f"{said}: they are left out")
    return short


def held(model):
    """MB of the base's weights in this process, and MB of them all."""
    base = [p for n, p in model.named_parameters() if "lora_" not in n]
    here = [p.to_local() if hasattr(p, "to_local") else p for p in base]
    return [sum(p.nbytes for p in part) / 1e6 for part in (here, base)]


def arguments(args):
    renamed = hasattr(TrainingArguments, "activation_checkpointing")  # 5.23
    checkpointing = "activation" if renamed else "gradient"
    more = {f"{checkpointing}_checkpointing": True}
    return TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.rate,
        optim=args.optim,
        logging_steps=1,
        save_steps=args.save_every,
        save_total_limit=2,  # the one before, should the last be torn
        save_only_model=args.shard,
        bf16=args.dtype == "bfloat16",
        use_cpu=not GPU,
        ddp_find_unused_parameters=False,
        report_to=args.report_to,
        seed=args.seed,
        disable_tqdm=True,
        **more,
    )


def checkpoints(out):
    """{steps: folder} of what Trainer has saved, whole or not."""
    found = {}
    for folder in Path(out).glob("checkpoint-*"):
        steps = folder.name.removeprefix("checkpoint-")
        if steps.isdecimal():
            found[int(steps)] = folder
    return found


def is_whole(folder):
    """Whether all files are there and can be opened that a resume needs."""
    rng = [f"rng_state_{k}.pth" for k in range(PROCESSES)]
    rng = rng if PROCESSES > 1 else ["rng_state.pth"]
    if (folder / f"rng_state_{PROCESSES}.pth").exists():
        return False  # there were more processes
    try:
        json.loads((folder / "trainer_state.json").read_text("utf8"))
        with safe_open(folder / "adapter_model.safetensors", "pt"):
            pass
    except (OSError, ValueError, SafetensorError):  # missing, or torn
        return False
    packed = ["optimizer.pt", "scheduler.pt", *rng]  # zip files, all of them
    return all(zipfile.is_zipfile(folder / name) for name in packed)


def last_whole_checkpoint(out):
    """The one with the most steps; None if there is none at all.

    Those that are there and cannot be used are not written over."""
    found = checkpoints(out)
    whole = [steps for steps in found if is_whole(found[steps])]
    if found and not whole:
        raise SystemExit(
            f"no checkpoint in {out} is whole for a run of {PROCESSES}"
            " process(es): start as many as before, or name another --out"
        )
    return str(found[max(whole)]) if whole else None


def main(args):
    check(args)
    start = last_whole_checkpoint(args.out) if args.resume else None
    if args.resume and RANK == 0:
        print(f"goes on from {start}" if start else "starts anew")
    if args.report_to == "wandb" and RANK == 0:
        log_to_wandb(args.out)
    model, tokenizer = load(args)
    records = read(args.data, tokenizer, args.max_length)
    trainer = Trainer(
        model,
        arguments(args),
        train_dataset=records,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    if PROCESSES > 1:
        here, base = held(model)
        print(f"process {RANK} holds {here:.2f} of {base:.2f} MB of the base")
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main(options().parse_args())
