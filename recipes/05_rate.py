"""QLoRA at a learning rate that was looked for, not guessed.

    python 05_rate.py --data records.jsonl --rank 16 --rate 2e-4

Trains at --rate, at a third of it and at three times as much, each time from
the same start, and compares the loss on held-out records. While the best is at
an edge it goes on beyond that edge, for --runs trainings at most. The best
adapter is saved. A twentieth of the records is held out: have a hundred there,
or the differences are chance. Once --alpha is chosen, leave it: with AdamW it
is the learning rate of B.
"""

import math

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

import qlora_llm


def adder(args):
    """The function that puts LoRA of the wanted rank on the base."""

    def add_lora(model):
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.alpha,
            use_rslora=args.rslora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model = get_peft_model(model, config)
        model.print_trainable_parameters()
        return model

    return add_lora


def adapter(model):
    """{name: parameter} of all that trains."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def copy(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def put_back(model, tensors):
    for name, parameter in adapter(model).items():
        parameter.copy_(tensors[name])


def next_rate(found):
    """What to try next; None if the best has a worse one on either side."""
    best = min(found, key=found.get)
    if best == min(found):
        return best / 3
    return best * 3 if best == max(found) else None


def train(model, tokenizer, records, held_out, args):
    first, best = copy(adapter(model)), {}
    found, left = {}, [args.rate, args.rate / 3, args.rate * 3]
    while left and len(found) < args.runs:
        args.rate = left.pop(0)
        put_back(model, first)
        loss = qlora_llm.train(model, tokenizer, records, held_out, args)
        found[args.rate] = loss if math.isfinite(loss) else math.inf
        print(f"rate {args.rate:.2g}: held-out loss {found[args.rate]:.4f}")
        if found[args.rate] == min(found.values()):
            best = copy(adapter(model))
        if not left and (further := next_rate(found)):
            left = [further]

    put_back(model, best)
    where = "at an edge: not done" if left else "worse on either side"
    print(f"best: {min(found, key=found.get):.2g}, {where}")


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument(
        "--rslora", action="store_true", help="alpha / sqrt(r)"
    )
    parser.add_argument("--runs", type=int, default=6, help="at most")
    args = parser.parse_args()
    if args.runs < 3 or args.rate <= 0:
        raise SystemExit("--runs is at least 3, --rate above 0")
    qlora_llm.main(args, add_lora=adder(args), train=train)
