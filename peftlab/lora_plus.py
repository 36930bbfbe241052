r"""LoRA+, two learning rates for LoRA: Hayou et al. 2024, arXiv 2402.12354, section 4.

B starts at zero and A at random, so their steps should not be alike: B's learning rate
is a multiple of A's.

$$ A \leftarrow A - \eta\, G_A, \qquad B \leftarrow B - \lambda \eta\, G_B $$

| symbol | in code | usual value |
|---|---|---|
| $\eta$, the rate of A and of all else | `lr` | as for LoRA, or lower |
| $\lambda = \eta_B / \eta_A$ | `ratio` | 16 |
| $G_A$, $G_B$ | what the optimizer makes of the gradients | |

The model, its adapter and its file are plain LoRA's; only the optimizer's groups
differ. Give them to any torch optimizer:
`AdamW(lora_plus.parameter_groups(model, 1e-4))`. B is found by its name, ours and
peft's. Biases learn at A's rate, as does LoRA on an embedding, whose B is random and
A zero at the start. peft gives biases B's rate, such embeddings one of their own, and
splits B's group once more, by weight decay.
"""

import math


def parameter_groups(model, lr, ratio=16):
    """Two groups of a model's trainable parameters for a torch optimizer.

    lr: the learning rate of A, and of biases or heads that train along. ratio: how many
    times faster B learns. Returns [{"params": [...], "lr": lr}, {"params": [B, ...],
    "lr": lr * ratio}]; a LambdaLR scales both, OneCycleLR overwrites both: give it both
    as max_lr. Raises ValueError for a rate or ratio that is not a positive number, and
    where no B trains."""
    for name, value in (("lr", lr), ("ratio", ratio)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, not {value!r}")
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fast = [p for n, p in trains.items() if _is_b(n)]
    slow = [p for n, p in trains.items() if not _is_b(n)]
    if not fast:
        raise ValueError("no lora_B trains in this model: add LoRA to it first")
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]


def _is_b(name):
    """Ours is `path.lora_B`, peft's `path.lora_B.default.weight`."""
    return "lora_B" in name.split(".")
