"""The memory of QLoRA's training: by the book's calculator, and measured.

    pip install -e PATH    # of a clone of this book
    python 11_peak_memory.py --data records.jsonl --length 1024

Every record is repeated until it fills `--length` tokens, so that each step is
as large as it can be. The calculator counts the embedding and the output layer
in 16 bits; `prepare_model_for_kbit_training` makes 32 of them, which is added.
"""

from transformers import AutoConfig

import qlora_llm
from peftlab import memory
from peftlab.kit import measure


def read(file, tokenizer, length):
    records = qlora_llm.read(file, tokenizer, length)
    return [{k: (v * length)[:length] for k, v in r.items()} for r in records]


def train(model, tokenizer, records, held_out, args):
    config = AutoConfig.from_pretrained(args.model)
    sizes = memory.step(
        config,
        "qlora",
        r=16,
        seq=args.length,
        batch=4,
        checkpointing=True,
        device=qlora_llm.DEVICE,
    )
    for part in ("weights", "gradients", "optimizer", "activations"):
        show(part, sizes[part])
    frozen = [p for p in model.parameters() if not p.requires_grad]
    wide = 2 * sum(p.numel() for p in frozen if p.dtype.itemsize == 4)
    show("32 bits instead of 16", wide)
    show("predicted", sizes["total"] + wide)

    def work():
        qlora_llm.train(model, tokenizer, records, held_out, args)

    show("measured", measure.nbytes(model) + measure.peak_memory(work))


def show(part, size):
    print(f"{part:22}{size / 1e9:9.4f} GB")


if __name__ == "__main__":
    qlora_llm.main(qlora_llm.options().parse_args(), read=read, train=train)
