"""A model packed into 4 bits once and saved, and what each layer loses.

    python 13_pack.py --model Qwen/Qwen2.5-7B-Instruct --out packed

Prints for each kind of linear layer its size and the error of its weights, RMS
relative to the weights in 16 bits. The folder in --out is loaded without
packing again, by `from_pretrained` alone. Both models are in memory while they
are compared, the plain one in that of the processor.
"""

from collections import defaultdict

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

import qlora_llm


def errors(plain, packed):
    """{kind of layer: [squared error, squared weights, how many]}"""
    sums = defaultdict(lambda: [0.0, 0.0, 0])
    for path, layer in packed.named_modules():
        if isinstance(layer, Linear4bit):
            weight = plain.get_submodule(path).weight.detach().float()
            back = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            lost = back.cpu().float() - weight
            row = sums[path.rpartition(".")[2]]
            row[0] += lost.square().sum().item()
            row[1] += weight.square().sum().item()
            row[2] += weight.numel()
    return sums


def scales(packed):
    """Their bytes, which get_memory_footprint() leaves out."""
    total = 0
    for layer in packed.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            held = [state.absmax]
            if state.nested:  # double quantization
                held += [state.state2.absmax, state.offset]
            total += sum(tensor.nbytes for tensor in held)
    return total


def main(args):
    plain = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16
    )
    packed, tokenizer = qlora_llm.load(args.model)
    for kind, (lost, squares, count) in errors(plain, packed).items():
        error = (lost / squares) ** 0.5
        print(f"{kind}: error {error:.4f}, {count:,} weights")
    sizes = [m.get_memory_footprint() for m in (plain, packed)]
    sizes[1] += scales(packed)
    print(f"MB: {sizes[0] / 1e6:.1f} -> {sizes[1] / 1e6:.1f}")
    del plain

    packed.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    del packed

    # As on another day: the folder alone.
    model = AutoModelForCausalLM.from_pretrained(
        args.out, device_map=qlora_llm.DEVICE
    )
    print("packed:", qlora_llm.answer(model, tokenizer, args))


if __name__ == "__main__":
    main(qlora_llm.options().parse_args())
