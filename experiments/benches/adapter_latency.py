"""What an adapter adds to a token's time, beside LoRA merged and not merged.

    python -m experiments.benches.adapter_latency

24 tokens one at a time, each with the keys and values of those before it, for one
user; and a batch of texts read at once. The models are tiny-decoder's shape, a wider
one and a wider one with more layers, with random weights. All variants take turns in
one run: ratios to the base, the median of five repeats. Wants a quiet machine; some
two minutes, on one thread.
"""

import copy

import torch
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from experiments.benches.methods import spread
from peftlab import adapter, lora
from peftlab.kit import measure, results

REPEATS, TOKENS = 5, 24
# {name: (width, MLP, layers, heads, turns one at a time, turns of a batch)}
SHAPES = {
    "128": (128, 384, 4, 4, 6, 6),
    "768": (768, 2048, 4, 12, 4, 2),
}
BATCH, LENGTH = 8, 64  # texts read at once, and their tokens
LORA = dict(targets="all-linear", r=8)


def llama(width, inner, layers, heads):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def filled(model, method):
    """The model with random numbers in the method's tensors: B and up start at zero."""
    generator = torch.Generator().manual_seed(1)
    for t in method.state_dict(model).values():
        noise = torch.randn(t.shape, generator=generator)
        t.copy_(0.1 * noise / t.shape[-1] ** 0.5)
    return model.requires_grad_(False)


def variants(base):
    """{name: model}: the base and what may stand on it, a copy each."""

    def fresh():
        return copy.deepcopy(base)

    with_lora = filled(lora.add(fresh(), **LORA), lora)
    found = {
        "base": base,
        "LoRA, merged": lora.merge(copy.deepcopy(with_lora)),
        "LoRA": with_lora,
    }
    for name, placement, m in (
        ("Houlsby", "houlsby", 32),
        ("Pfeiffer", "pfeiffer", 64),
        ("parallel", "parallel", 64),
    ):
        found[name] = filled(adapter.add(fresh(), placement, m), adapter)

    stack = adapter.add(fresh(), "pfeiffer", 64, "first")
    stack = filled(adapter.add(stack, "pfeiffer", 64, "second"), adapter)
    found["two stacked"] = stack
    found["Houlsby, off"] = adapter.activate(copy.deepcopy(found["Houlsby"]), [])
    return found


def one_at_a_time(model):
    """A function that feeds tokens one by one, as generation does."""

    @torch.no_grad()
    def work():
        cache = DynamicCache(config=model.config)
        for token in range(TOKENS):
            ids = torch.tensor([[3 + token]])
            model(input_ids=ids, past_key_values=cache, use_cache=True)

    return work


def all_at_once(model):
    """A function that reads a batch of texts, as training does going forward."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 1000, (BATCH, LENGTH), generator=generator)

    @torch.no_grad()
    def work():
        model(input_ids=ids, use_cache=False)

    return work


def one(shape):
    """Seconds of every variant, {how: {name: seconds}}."""
    *sizes, turns, batch_turns = shape
    models = variants(llama(*sizes))
    token = {name: one_at_a_time(model) for name, model in models.items()}
    batch = {name: all_at_once(model) for name, model in models.items()}
    return {
        "token": measure.step_times(token, turns, warmup=1),
        "batch": measure.step_times(batch, batch_turns, warmup=1),
    }


def derive(repeats):
    """Ratios to the base, and the base's milliseconds for a token."""
    figures = {}
    for shape in SHAPES:
        for how in ("token", "batch"):
            rows = [r[shape][how] for r in repeats]
            for name in rows[0]:
                if name != "base":
                    ratios = [row[name] / row["base"] for row in rows]
                    figures[f"{name}.{how}.{shape}"] = spread(ratios, tolerance=0.1)
        base = [1000 * r[shape]["token"]["base"] / TOKENS for r in repeats]
        figures[f"base.ms.{shape}"] = spread(base, tolerance=5)
    return figures


def main():
    torch.set_num_threads(1)
    repeats = [
        {name: one(shape) for name, shape in SHAPES.items()}
        for _ in tqdm(range(REPEATS), desc="repeats")
    ]
    figures = derive(repeats)
    setting = dict(
        tokens=TOKENS, batch=BATCH, length=LENGTH, dtype="float32", shapes=SHAPES
    )
    results.save(
        "adapter_latency",
        dict(
            machine=measure.machine(), setting=setting, repeats=repeats, figures=figures
        ),
    )
    for key, f in figures.items():
        print(f"{key}: {f['value']:.3f} ({f['lowest']:.3f} to {f['highest']:.3f})")


if __name__ == "__main__":
    main()
