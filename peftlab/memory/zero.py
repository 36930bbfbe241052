r"""What each of several GPUs holds: ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054.

Every GPU trains on sequences of its own, and without ZeRO each holds everything. Each
level divides one more part among them (section 5); FSDP is another name of the third.

| level | optimizer | gradients | weights |
|---|---|---|---|
| 0 | whole | whole | whole |
| 1 | divided | whole | whole |
| 2 | divided | divided | whole |
| 3 | divided | divided | divided |

Activations are each GPU's own. From level 2 on a gradient is whole only while it is
made, and its share is there from the start. At level 3 a GPU collects the weights of
one block at a time, such as a decoder layer, and the largest block counts with the
activations. Not counted: buckets to send, and blocks collected ahead of time.
"""

from torch import nn

from .messages import check_whole
from .tracker import nbytes

LEVELS = (0, 1, 2, 3)


def shard(weights, gradients, optimizer, gpus=1, zero=0):
    """Divide what a step holds as in the paper's figure 1.

    Args:
        weights: bytes.
        gradients: bytes.
        optimizer: bytes of its state.
        gpus: how many hold it together.
        zero: the level, 0 to 3.

    Returns:
        The three, in bytes of one GPU, rounded up.

    Raises:
        ValueError: for a number of GPUs or a level that cannot be.
    """
    check(gpus, zero)
    parts = (weights, gradients, optimizer)
    is_divided = (zero >= 3, zero >= 2, zero >= 1)
    return tuple(
        -(-part // gpus) if divided else part
        for part, divided in zip(parts, is_divided, strict=True)
    )


def check(gpus, zero):
    """ValueError for what no cluster has."""
    check_whole("gpus", gpus, 10**5)
    check_whole("the level zero", zero, 3, least=0)
    if zero and gpus == 1:
        raise ValueError("zero divides among several GPUs: gpus must be at least 2")


def block_sizes(model):
    """The bytes of each block: a layer of a stack, or what is in none.

    A block is an element of an outermost ModuleList; what lies in no list, such as an
    embedding or a head, is a block by itself.
    """
    blocks = []

    def visit(module):
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(child)
            elif any(isinstance(m, nn.ModuleList) for m in child.modules()):
                visit(child)
            else:
                blocks.append(child)

    visit(model)
    return [nbytes([*block.parameters(), *block.buffers()]) for block in blocks]
