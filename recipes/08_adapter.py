"""A bottleneck adapter in place of LoRA: a small network in every block.

    pip install "peftlab @ git+https://github.com/peftlab/peftlab"
    python 08_adapter.py --data records.jsonl --placement parallel

peft has no such adapter: this is peftlab/adapter.py, for Llama, Mistral, Qwen
2 and Qwen 3. The base is in 16 bits: Trainer refuses one in 4 bits unless peft
has put the adapter on it. The file in --out holds the adapter's tensors and
its settings. Nothing is merged: a nonlinear network fits into no weight.

The default, parallel, did best on LLaMA-7B and 13B in Hu et al. 2023, but not
on BLOOM and GPT-J: try pfeiffer too, and houlsby, which puts two in a block.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import qlora_llm
from peftlab import adapter


def check(args, settings):
    """Try it on the model's shape, before any weight is loaded."""
    if args.rate <= 0:
        raise SystemExit(f"--rate is above 0, not {args.rate}")
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_config(config)
    try:
        adapter.add(model, **settings)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    trained = sum(t.numel() for t in adapter.state_dict(model).values())
    print(f"{trained:,} parameters are trained")


def load(name):
    if qlora_llm.DEVICE == "cuda" and not torch.cuda.is_bf16_supported():
        raise SystemExit("no bfloat16 here: take an A10, L4, RTX 30 or newer")
    return qlora_llm.load(name, packing=None)


def save(model, settings, folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {
        name: t.contiguous() for name, t in adapter.state_dict(model).items()
    }
    note = {"format": "pt", "adapter": json.dumps(settings)}
    save_file(tensors, Path(folder, "adapter.safetensors"), note)


def put_on(model, folder):
    """A saved adapter on its base: the settings are in the file."""
    file = Path(folder, "adapter.safetensors")
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["adapter"])
    adapter.add(model, **settings)
    adapter.load_state_dict(model, load_file(file))
    return model


def main(args):
    settings = dict(placement=args.placement, bottleneck=args.bottleneck)
    check(args, settings)
    model, tokenizer = load(args.model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter.add(model, **settings)
    records = qlora_llm.read(args.data, tokenizer, args.length)
    held_out = records[: max(1, len(records) // 20)]
    qlora_llm.train(model, tokenizer, records[len(held_out) :], held_out, args)
    save(model, settings, args.out)
    del model

    # As on another day: the base model and the saved adapter.
    base, tokenizer = load(args.model)
    model = put_on(base, args.out)
    print("with the adapter:", qlora_llm.answer(model, tokenizer, args))
    adapter.activate(model, [])
    print("without it:", qlora_llm.answer(model, tokenizer, args))


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--placement", default="parallel")
    parser.add_argument("--bottleneck", type=int, default=256)
    parser.set_defaults(rate=3e-4)
    main(parser.parse_args())
