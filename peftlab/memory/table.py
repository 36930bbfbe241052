"""A table of common models: what `step` counts, looked up instead of run.

The calculator in the page reads the same file, table.json, with the same few rules
(peftlab/kit/calculator.js). `experiments/sweeps/memory_table.py` writes it from real
steps on the meta device. For each model and way to train it has

| part | what it is |
|---|---|
| terms | products of b, s and r: the batch, the tokens of a sequence and the rank |
| weights, gradients, inputs | one row of coefficients, in bytes |
| block | rows; the highest is the largest block's weights |
| whole | rows; the highest is what forward and backward take on top of those parts |
| alone | the same where each gradient leaves once it is made (ZeRO from level 2 on) |
| base | parameters of the model |
| trained | [how many, n, m]: so many tensors of n + m r numbers, in float32 |

All are whole numbers, and below 2^53, so that JavaScript computes them exactly.
"""

import functools
import json
import math
import operator
from pathlib import Path

from . import calculator
from .cards import fits
from .messages import check_one_of

FILE = Path(__file__).with_name("table.json")


def name(powers):
    """The name of a term: (1, 2, 0) is b s s."""
    letters = [" ".join(c * n) for c, n in zip("bsr", powers, strict=True) if n]
    return " ".join(letters) or "1"


@functools.cache
def content():
    """The table as a dict."""
    return json.loads(FILE.read_text("utf8"))


def way(method, checkpointing, kbit_prepared):
    """The name of a way to train: qlora.checkpointing.kbit_prepared."""
    more = dict(checkpointing=checkpointing, kbit_prepared=kbit_prepared)
    return ".".join([method, *(name for name, on in more.items() if on)])


def lookup(
    model,
    method="lora",
    r=None,
    seq=None,
    batch=1,
    optimizer="adamw",
    checkpointing=False,
    kbit_prepared=None,
    gpus=1,
    zero=0,
):
    """What `step` returns for these settings, from the table and at once.

    Args:
        model: a name in the table.
        method: as in `step`, and so are r, seq, batch, checkpointing, kbit_prepared,
            gpus and zero.
        optimizer: "adamw" or "adamw8bit".

    Returns:
        The same dict.

    Raises:
        ValueError: for a model or an optimizer that the table lacks, and for all that
            `step` refuses.
    """
    table = content()
    check_one_of("model in the table", model, table["models"])
    check_one_of("optimizer in the table", optimizer, table["optimizers"])
    settings = calculator.method_settings(method, r, None, None, None, kbit_prepared)
    calculator.check(seq, batch, optimizer, checkpointing, "cuda")
    calculator.check_sharing(method, checkpointing, gpus, zero)

    entry = table["models"][model]
    same = table["models"][entry.get("same", model)]
    row = same["ways"][way(method, checkpointing, kbit_prepared)]
    seq = calculator.length(seq, entry["positions"])
    r = settings.get("r", 0)

    found = evaluate(row, batch, seq, r)
    found |= optimizer_bytes(table["optimizers"][optimizer], row["trained"], r)
    sizes = calculator.shared(found, gpus, zero)
    trainable = sum(k * (n + m * r) for k, n, m in row["trained"])
    is_lora = method in calculator.LORAS
    parameters = found["base"] + (trainable if is_lora else 0)
    sizes |= dict(trainable=trainable, parameters=parameters)
    return sizes | dict(gpu=fits(sizes["total"], method != "full"))


def evaluate(row, b, s, r):
    """{part: bytes}: of each part's rows the highest at that batch, length and rank."""
    letters = dict(b=b, s=s, r=r)
    terms = [
        math.prod(letters.get(letter, 1) for letter in term.split())
        for term in row["terms"]
    ]
    parts = [part for part in row if part not in ("terms", "trained")]
    return {
        part: max(sum(map(operator.mul, line, terms)) for line in row[part])
        for part in parts
    }


def optimizer_bytes(rule, trained, r):
    """Bytes of the state, and the most that the optimizer's step makes."""
    state, update = 0, 0
    step = rule.get("update")
    for k, n, m in trained:
        size = n + m * r
        if size < rule.get("least", 0):
            state += k * rule["short"] * size
            update = max(update, step["short"] * size)
            continue
        state += k * (rule["number"] * size + rule.get("tensor", 0))
        if step:
            blocks = -(-size // rule["blocksize"])
            filling = blocks * rule["blocksize"] - size
            state += k * rule["block"] * blocks
            made = step["number"] * size + step["filling"] * filling
            update = max(update, made + step["block"] * blocks)
    return dict(optimizer=state, update=update)
