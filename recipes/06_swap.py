"""One base and several adapters: each answers in turn, or all as one.

    python 06_swap.py --adapters first second --prompt "A prompt like those"
    python 06_swap.py --adapters first second --weights 0.5 0.5 --out both

The base is loaded once, and nothing is merged into it. With --weights their
weighted sum is saved as one adapter: the ranks are stacked, and each B takes
its own scaling along. So the sum is exact for rsLoRA too, which peft's
add_weighted_adapter gets wrong; a DoRA is no sum, and is refused.
"""

import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

import qlora_llm

PLAIN = (".lora_A.weight", ".lora_B.weight")


def read(folder):
    """The config and the tensors of a plain LoRA; anything else is refused."""
    file = Path(folder, "adapter_model.safetensors")
    if not file.is_file():
        raise SystemExit(f"{folder} has no adapter_model.safetensors")
    config, tensors = PeftConfig.from_pretrained(folder), load_file(file)
    others = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    others = [name for name in others if getattr(config, name, None)]
    others += [name for name in tensors if not name.endswith(PLAIN)]
    if others:
        raise SystemExit(f"only plain LoRA adds up: {folder} has {others[0]}")
    return config, tensors


def scaling(config):
    r = config.r**0.5 if config.use_rslora else config.r
    return config.lora_alpha / r


def combine(adapters, weights):
    """The tensors of the weighted sum; their scaling is in B already."""
    parts = {}
    for (config, tensors), weight in zip(adapters, weights, strict=True):
        for name, t in tensors.items():
            factor = weight * scaling(config) if "lora_B" in name else 1.0
            parts.setdefault(name, []).append(factor * t.float())
    if any(len(found) < len(adapters) for found in parts.values()):
        raise SystemExit("the adapters are not on the same layers")
    return {
        name: torch.cat(found, dim=int("lora_B" in name))
        for name, found in parts.items()
    }


def save(args):
    adapters = [read(folder) for folder in args.adapters]
    tensors = combine(adapters, args.weights)
    r = sum(config.r for config, _ in adapters)
    file = Path(args.adapters[0], "adapter_config.json")
    settings = json.loads(file.read_text("utf8"))
    settings |= dict(r=r, lora_alpha=r, use_rslora=False)
    out = Path(args.out)
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    print(f"{len(adapters)} adapters of rank {r} together, in {out}")


def main(args):
    if args.weights is not None:
        if len(args.weights) != len(args.adapters):
            raise SystemExit("give as many --weights as --adapters")
        if Path(args.out).exists():
            raise SystemExit(
                f"{args.out} is there already: name another --out"
            )
        save(args)
        args.adapters.append(args.out)

    base, tokenizer = qlora_llm.load(args.model)
    model = PeftModel.from_pretrained(base, args.adapters[0], "0")
    for k, folder in enumerate(args.adapters[1:], 1):
        model.load_adapter(folder, str(k))
    for k, folder in enumerate(args.adapters):
        model.set_adapter(str(k))
        print(f"{folder}:", qlora_llm.answer(model, tokenizer, args))
    with model.disable_adapter():
        print("none:", qlora_llm.answer(model, tokenizer, args))


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--weights", nargs="+", type=float)
    main(parser.parse_args())
