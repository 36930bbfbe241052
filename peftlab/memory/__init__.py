"""What fine-tuning takes in memory, of any shape, on a machine that could not hold it.

    python -m peftlab.memory --config llama-2-7b --method qlora --seq 512 --batch 4

No formula for any architecture: the model is built on torch's meta device, where a
tensor has a shape and no bytes, the method is added, and a training step is run on it
for real: forward, backward, optimizer. What the step would have held is followed from
each storage's birth to its death. It is a second step: the optimizer has its state.

| part | what it is |
|---|---|
| weights | parameters and buffers, the adapter's too, after packing |
| gradients | of what trains, all of them |
| optimizer | its state |
| activations | the highest point of a step above these three: all that comes and goes |

Of several GPUs it is what each one holds (see `zero.py`); of inference, one forward
pass. `lookup` has common models in a table, which the page in the book reads too.
Sequences are whole: no padding, no packing; every token has a label. Gradients are set
to None after a step. A GPU and a CPU differ in four ways, and `device` says whose are
counted. With dropout on its attention a CPU stores the scores, a GPU does not. A
dropout mask has a number for each element on a CPU, on a GPU one byte. AdamW goes
through the weights one by one on a CPU; on a GPU it is the fused one, as transformers'
Trainer has it, and needs nothing but its state. Plain `torch.optim.AdamW` works on all
weights at once there, on one more copy of what trains: "adamw-foreach". And a CPU that
adds or multiplies two dtypes copies one of them to the other's first. Not counted:
the kernels' own workspaces, and what an allocator wastes.

GB are 10^9 bytes, everywhere.
"""

from .calculator import DEVICES, DTYPES, METHODS, OPTIMIZERS, step
from .cards import CARDS, fits
from .shapes import SHAPES, load
from .table import lookup
from .tracker import Tracker
from .zero import shard

__all__ = [
    "CARDS",
    "DEVICES",
    "DTYPES",
    "METHODS",
    "OPTIMIZERS",
    "SHAPES",
    "Tracker",
    "fits",
    "load",
    "lookup",
    "shard",
    "step",
]
