"""How large is an adapter's change, and of what rank? Then cut it.

    python 04_rank.py --adapter my-adapter --rank 8 --out smaller-adapter

For each layer: ||dW|| / ||W||, and how many singular values hold 90% of the
sum of their squares. The rank of dW = (alpha / r) B A is at most r, so its SVD
is that of an r x r matrix. The smaller adapter holds the best approximation of
the wanted rank.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def svd(B, A):
    """U, S, Vh of the product B A, (out, r), (r,), (r, in)."""
    q_left, r_left = torch.linalg.qr(B)  # (out, r), (r, r)
    q_right, r_right = torch.linalg.qr(A.T)  # (in, r), (r, r)
    U, S, Vh = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ U, S, Vh @ q_right.T


def refuse(config, tensors, rank):
    """What this script would cut wrongly: anything but plain LoRA."""
    others = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    others = [name for name in others if getattr(config, name)]
    plain = (".lora_A.weight", ".lora_B.weight")
    others += [name for name in tensors if not name.endswith(plain)]
    if others:
        raise SystemExit(
            f"only plain LoRA can be cut, not one with {others[0]}"
        )
    if not 1 <= rank <= config.r:
        raise SystemExit(f"--rank is from 1 to {config.r}, not {rank}")


def main(args):
    folder, out = Path(args.adapter), Path(args.out)
    config = PeftConfig.from_pretrained(args.adapter)
    base = AutoModelForCausalLM.from_pretrained(
        args.model or config.base_model_name_or_path, dtype=torch.bfloat16
    )
    weights = dict(base.named_parameters())
    tensors = load_file(folder / "adapter_model.safetensors")
    refuse(config, tensors, args.rank)
    scaling = config.lora_alpha / config.r
    smaller = {}
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        A, B = tensors[name].float(), tensors[other].float()
        U, S, Vh = svd(B, A)
        energy = S.square().cumsum(0) / S.square().sum()
        rank = int((energy < 0.9).sum()) + 1
        path = name.removeprefix("base_model.model.").replace(".lora_A", "")
        size = scaling * S.norm() / weights[path].float().norm()
        print(f"{path}: size {size:.4f}, 90% in rank {rank} of {len(S)}")
        root = S[: args.rank].sqrt()
        smaller[other] = (U[:, : args.rank] * root).contiguous()
        smaller[name] = (root[:, None] * Vh[: args.rank]).contiguous()

    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= dict(r=args.rank, lora_alpha=scaling * args.rank)
    out.mkdir(exist_ok=True)
    save_file(smaller, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    print(f"rank {config.r} -> {args.rank}, in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", default="my-adapter")
    parser.add_argument("--model", help="by default as the adapter says")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", default="smaller-adapter")
    main(parser.parse_args())
