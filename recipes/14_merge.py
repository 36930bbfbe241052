"""Merge a QLoRA: into 16 bits, and into 4 only where that keeps the change.

    python 14_merge.py --adapter my-adapter --out merged

For each layer: the size of the change beside the error that packing makes. A
change that is smaller is rounded away when the sum is packed again.

--into unpacked (the default): the weights as training saw them, 4 bits
unpacked into bfloat16, and the change. --into checkpoint: the original weights
and the change; pack this one if you need 4 bits. --into packed: the packed
weights, packed again with the change; refused where it would be lost.
"""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_llm

WAYS = ("unpacked", "checkpoint", "packed")
PLAIN = (".lora_A.weight", ".lora_B.weight")
OTHERS = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
OTHERS += ("fan_in_fan_out",)
MOVED = ("pissa", "corda", "olora", "lora_ga", "loftq")  # change the base


def read(folder):
    """{layer: its change dW} of a plain LoRA, and the base's name."""
    config = PeftConfig.from_pretrained(folder)
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    others = [name for name in OTHERS if getattr(config, name, None)]
    others += [name for name in tensors if not name.endswith(PLAIN)]
    if others:
        raise SystemExit(f"only plain LoRA is merged here, not {others[0]}")
    start = str(config.init_lora_weights)
    if start.lower().startswith(MOVED):
        raise SystemExit(f"{start} trained beside a base of its own: not here")

    s = config.lora_alpha / config.r ** (0.5 if config.use_rslora else 1)
    changes = {}
    for name, A in tensors.items():
        front, found, _ = name.partition(".lora_A.")
        if found:
            B = tensors[f"{front}.lora_B.weight"]
            layer = front.removeprefix("base_model.model.")
            changes[layer] = s * B.float() @ A.float()
    return changes, config.base_model_name_or_path


def packed(W):
    """W through NF4, blocks of 64, doubly quantized, as in qlora_llm.py."""
    settings = dict(blocksize=64, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(*quantize_4bit(W.contiguous(), **settings)).float()


@torch.no_grad()
def merge(model, changes, way):
    """Change the weights in place; {layer: size of the change / packing's}."""
    ratios = {}
    for layer, dW in changes.items():
        weight = model.get_submodule(layer).weight
        W, W4 = weight.float(), packed(weight)
        error, size = (W4 - W).norm() / W.norm(), dW.norm() / W.norm()
        ratios[layer] = (size / error).item()
        print(f"{layer}: change {size:.4f}, packing {error:.4f}")
        weight.copy_((W if way == "checkpoint" else W4) + dW)
    return ratios


def main(args):
    if Path(args.out).exists():
        raise SystemExit(f"{args.out} is there already: name another --out")
    changes, name = read(args.adapter)
    name = args.model or name
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    ratios = merge(model, changes, args.into)
    small = sum(ratio < 1 for ratio in ratios.values())
    print(f"in {small} of {len(ratios)} layers the change is the smaller")
    if args.into == "packed" and small:
        raise SystemExit(
            "packed again, it would be lost there: --into checkpoint, and load"
            " the result in 4 bits; or keep the adapter beside the base"
        )

    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(name).save_pretrained(args.out)
    if args.into == "packed":
        model, _ = qlora_llm.load(args.out)  # it is packed as it is loaded
        model.save_pretrained(args.out)
    packing = qlora_llm.FOUR_BITS if args.into == "packed" else None
    model, tokenizer = qlora_llm.load(args.out, packing)
    print("merged:", qlora_llm.answer(model, tokenizer, args))


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--adapter", default="my-adapter")
    parser.add_argument("--into", choices=WAYS, default="unpacked")
    parser.set_defaults(model=None, out="merged")
    main(parser.parse_args())
