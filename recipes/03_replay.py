"""QLoRA with replay: general records are mixed in, and forgetting is measured.

    python 03_replay.py --data records.jsonl --general general.jsonl

general.jsonl holds what the model should not lose, in the form of
records.jsonl: conversations of all kinds, in any order. A twentieth of it, at
least one record, is held out: the loss on it before and after training says
what was forgotten. `--share 0` measures without mixing in.
"""

import random

import torch
from transformers import DataCollatorForSeq2Seq

import qlora_llm


@torch.no_grad()
def loss(model, tokenizer, records):
    """Mean loss for each token of the answers."""
    model.eval()
    collate, total, count = DataCollatorForSeq2Seq(tokenizer), 0.0, 0
    for record in records:
        batch = collate([record]).to(model.device)
        tokens = (batch["labels"][:, 1:] != -100).sum().item()
        total += model(**batch).loss.item() * tokens
        count += tokens
    return total / count


def train(model, tokenizer, records, held_out, args):
    general = qlora_llm.read(args.general, tokenizer, args.length)
    kept_out = general[: max(1, len(general) // 20)]
    general = general[len(kept_out) :]
    wanted = round(len(records) * args.share / (1 - args.share))
    if wanted > len(general):
        raise SystemExit(
            f"{wanted} general records wanted, {len(general)} there"
        )

    mixed = records + general[:wanted]
    random.Random(0).shuffle(mixed)
    print(f"{len(records)} records, {len(mixed) - len(records)} general ones")

    before = loss(model, tokenizer, kept_out)
    qlora_llm.train(model, tokenizer, mixed, held_out, args)
    after = loss(model, tokenizer, kept_out)
    print(f"loss on general records: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--general", default="general.jsonl")
    parser.add_argument("--share", type=float, default=0.05, help="below 1")
    args = parser.parse_args()
    if not 0 <= args.share < 1:
        raise SystemExit(f"--share is from 0 to below 1, not {args.share}")

    qlora_llm.main(args, train=train)
