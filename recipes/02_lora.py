"""LoRA on a base model in 16 bits, and merged into it at the end.

    python 02_lora.py --data records.jsonl --merged my-model

What differs from qlora_llm.py: the base is loaded in 16 bits, not packed into
4. Its weights take more memory, nothing is unpacked in each step, and the
change can be merged into the very weights that it was trained beside.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_llm import DEVICE, main, options


def load(name):
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16, device_map=DEVICE
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def add_lora(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()  # checkpointing over frozen embeddings
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


def merge(args):
    """The base with the change added to its weights, as an ordinary model."""
    base, tokenizer = load(args.model)
    model = PeftModel.from_pretrained(base, args.out).merge_and_unload()
    model.save_pretrained(args.merged)
    tokenizer.save_pretrained(args.merged)
    print(f"merged into {args.merged}")


if __name__ == "__main__":
    parser = options()
    parser.add_argument("--merged", default="my-model")
    args = parser.parse_args()
    main(args, load=load, add_lora=add_lora)
    merge(args)
