"""LoRA on a base model in 16 bits, and merged into it at the end.

    python 02_lora.py --data records.jsonl --merged my-model

What differs from qlora_llm.py: the base is loaded in 16 bits, not packed into
4. Its weights take more memory, nothing is unpacked in each step, and the
change can be merged into the very weights that it was trained beside. A merge
in 16 bits rounds, and a small change loses most: see what the merged model
answers, and keep the adapter.
"""

from peft import PeftModel

import qlora_llm


def load(name):
    return qlora_llm.load(name, packing=None)


def add_lora(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()  # checkpointing over frozen embeddings
    return qlora_llm.with_lora(model)


def merge(args):
    """The base with the change added to its weights, as an ordinary model."""
    base, tokenizer = load(args.model)
    model = PeftModel.from_pretrained(base, args.out).merge_and_unload()
    model.save_pretrained(args.merged)
    tokenizer.save_pretrained(args.merged)
    print("merged:", qlora_llm.answer(model, tokenizer, args))


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--merged", default="my-model")
    args = parser.parse_args()
    qlora_llm.main(args, load=load, add_lora=add_lora)
    merge(args)
