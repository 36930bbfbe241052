"""A plan that makes a model fit a card, and LoRA trained by that plan.

    pip install -e PATH    # of a clone of this book
    python 15_fit.py --data records.jsonl --card 24 --length 1024
    python 15_fit.py --card 24 --plan    # only says what it would do

--card is what the card has, in GB (10^9 bytes): a tenth of it and 1 GB stay
free, for CUDA and for what the allocator wastes. The plan is counted, with
every sequence at its full length, and stops when it fits: LoRA on a base in
bfloat16, then fewer sequences at a time, checkpointing, a base in 4 bits. It
was verified on a CPU only: watch the first steps.
"""

import torch
from transformers import AutoConfig, TrainingArguments

import qlora_llm
from peftlab import memory

RECORDS = 16  # a step
PLAN = [  # what is pulled, and what is then true
    ("LoRA on 16 bits", dict(method="lora", batch=RECORDS)),
    ("4 at a time", dict(batch=4)),
    ("1 at a time", dict(batch=1)),
    ("checkpointing", dict(checkpointing=True)),
    ("base in 4 bits", dict(method="qlora")),
    ("Adam in 8 bits, paged", dict(optimizer="adamw8bit")),
]


def count(config, length, way):
    """Bytes of a step at its peak."""
    device = qlora_llm.DEVICE
    if way["method"] == "qlora":  # what is not packed has 32 bits with peft
        way = way | dict(kbit_prepared=True)
    sizes = memory.step(config, r=16, seq=length, device=device, **way)
    return sizes["total"]


def plan(config, length, card):
    """The first settings that fit; prints the bytes after each lever."""
    room, way = 0.9 * card * 1e9 - 1e9, {}
    for name, change in PLAN:
        way = way | change
        size = count(config, length, way)
        print(f"{name:30}{size / 1e9:9.4f} GB of {room / 1e9:.4f}")
        if size <= room:
            return with_more_records(config, length, way, room)
    raise SystemExit("no: shorter sequences, a smaller model or a larger card")


def with_more_records(config, length, way, room):
    """The same levers, with as many records at a time as fit."""
    for batch in (8, 4, 2):
        more = way | dict(batch=batch)
        if batch > way["batch"] and count(config, length, more) <= room:
            print(f"with these levers {batch} at a time fit")
            return more
    return way


def loader(way):
    packing = qlora_llm.FOUR_BITS if way["method"] == "qlora" else None
    return lambda name: qlora_llm.load(name, packing=packing)


def adder(way):
    def add_lora(model):
        if way["method"] == "qlora":
            return qlora_llm.add_lora(model)  # it checkpoints too
        if way.get("checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return qlora_llm.with_lora(model)

    return add_lora


def trainer(way):
    adam = "paged_adamw_8bit" if "optimizer" in way else "adamw_torch_fused"
    if adam.startswith("paged") and qlora_llm.DEVICE == "cpu":
        adam = "adamw_bnb_8bit"

    changed = dict(
        per_device_train_batch_size=way["batch"],
        gradient_accumulation_steps=RECORDS // way["batch"],
        per_device_eval_batch_size=1,
        optim=adam,
    )

    def train(*given):
        qlora_llm.TrainingArguments = lambda out, **usual: TrainingArguments(
            out, **(usual | changed)
        )
        qlora_llm.train(*given)
        qlora_llm.TrainingArguments = TrainingArguments

    return train


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--card", type=float, help="GB; this GPU's by default")
    parser.add_argument("--plan", action="store_true", help="only the plan")
    args = parser.parse_args()
    if args.card is None:
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU here: say --card, in GB")
        args.card = torch.cuda.get_device_properties(0).total_memory / 1e9

    way = plan(AutoConfig.from_pretrained(args.model), args.length, args.card)
    if not args.plan:
        qlora_llm.main(
            args, load=loader(way), add_lora=adder(way), train=trainer(way)
        )
