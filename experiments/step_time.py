"""LoRA's cost, ours beside peft's and full fine-tuning, turn by turn in one run.

One training step (forward, backward, AdamW) of a two-layer Llama at three widths: the
median of many turns, and the highest point of memory. Five repeats; two cores, nothing
else running."""

import statistics

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftlab import lora
from peftlab.kit import measure, results

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTHS = {192: 40, 512: 12, 1024: 6}  # width: turns


def model(width):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    return LlamaForCausalLM(config).train()


def methods(width):
    """{name: model} with the same LoRA, r=8 on all linears, ours and peft's, and
    full."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    return {
        "peftlab": lora.add(model(width), TARGETS, r=8, alpha=16),
        "peft": peft.get_peft_model(model(width), config),
        "full": model(width),
    }


def step(network, tokens, optimizer):
    def work():
        network(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def one_width(width, rounds):
    tokens = torch.randint(0, 1024, (8, 64))
    steps = {}
    for name, network in methods(width).items():
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4)
        steps[name] = step(network, tokens, optimizer)
    times = measure.step_times(steps, rounds)
    return dict(
        seconds=times, peak={k: measure.peak_memory(s) for k, s in steps.items()}
    )


def main():
    repeats = [{str(w): one_width(w, n) for w, n in WIDTHS.items()} for _ in range(5)]
    figures = {}
    for width in map(str, WIDTHS):
        for other in ("peft", "full"):
            for key in ("seconds", "peak"):
                ratios = [
                    r[width][key]["peftlab"] / r[width][key][other] for r in repeats
                ]
                middle = statistics.median(ratios)
                figures[f"{key}.{width}.{other}"] = dict(
                    value=middle, tolerance=0.1, lowest=min(ratios), highest=max(ratios)
                )
                print(f"{key} at {width}, ours / {other}: {middle:.3f}")
    setting = "two layers, batch 8, 64 tokens, r=8 on all linears, float32"
    results.save(
        "step_time",
        dict(
            machine=measure.machine(), setting=setting, repeats=repeats, figures=figures
        ),
    )


if __name__ == "__main__":
    main()
