r"""LoRA+, two learning rates for LoRA: Hayou et al. 2024, arXiv 2402.12354, section 4.

B starts at zero and A at random, so their steps should not be alike: B's learning rate
is a multiple of A's.

$$ A \leftarrow A - \eta\, G_A, \qquad B \leftarrow B - \lambda \eta\, G_B $$

| symbol | in code | usual value |
|---|---|---|
| $\eta$, the learning rate of A and of all else | `lr` | as for LoRA, or lower |
| $\lambda = \eta_B / \eta_A$ | `ratio` | 16 |
| $G_A$, $G_B$ | what the optimizer makes of the gradients | |

The model, its adapter and its file are plain LoRA's; only the optimizer's groups
differ. Give them to any torch optimizer:
`AdamW(lora_plus.parameter_groups(model, 1e-4))`. B is known by its name, ours and
peft's. Biases learn at A's rate, as does LoRA on an embedding, whose B is random and
A zero at the start. peft gives biases B's rate, such embeddings a rate of their own,
and splits B's group once more, by weight decay.
"""

from torch import nn

from . import surgery


def parameter_groups(model, lr, ratio=16):
    """Two groups of a model's trainable parameters, for a torch optimizer.

    Args:
        model: a module with LoRA in it, ours or peft's.
        lr: the learning rate of A, and of biases or heads that train too.
        ratio: how many times faster B learns (section 4 of the paper).

    Returns:
        `[{"params": [...], "lr": lr}, {"params": [B, ...], "lr": lr * ratio}]`. A
        LambdaLR scales both rates. OneCycleLR overwrites both: give it both as max_lr.

    Raises:
        ValueError: model is no module, lr, ratio or their product is no positive
            number, or no B trains.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, not a {type(model).__name__}")
    surgery.check_positive("lr", lr)
    surgery.check_positive("ratio", ratio)
    surgery.check_positive("lr * ratio", lr * ratio)

    slow = []
    fast = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = fast if _is_b(name) else slow
            group.append(p)

    if not fast:
        raise ValueError("no lora_B trains in this model: add LoRA to it first")
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]


def _is_b(name):
    """Ours is `path.lora_B`, peft's `path.lora_B.default.weight`."""
    return "lora_B" in name.split(".")
