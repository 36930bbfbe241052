"""The table that the calculator in the page reads: peftlab/memory/table.json.

A page cannot run a step on torch's meta device. But for a model, a method and a setting
the bytes alive at a moment of a step are a polynomial in the batch b, the tokens s and
the rank r. A step with three primes for them shows it: what a storage's size is
divisible by, it is a multiple of. A second step with other primes tells s from s + 1.

Layers are alike, so four and five are enough: one more layer moves each moment by as
many bytes as the fifth did. Of the thousands of moments those go that another, or two
others on average, exceed at every b, s and r. A few are left, and the highest of them
is the peak. Tests compare the table with real `memory.step`s. Ten minutes on one core.
"""

import json
import re
import sys
from collections import Counter
from fractions import Fraction
from itertools import product
from math import comb, prod

import torch
from tqdm import tqdm

from peftlab import memory
from peftlab.memory import calculator, cards, table, tracker, zero
from peftlab.memory.messages import quiet

MODELS = (
    "tiny-decoder",
    "bert-base",
    "gpt2",
    "qwen2.5-0.5b",
    "llama-2-7b",
    "mistral-7b",
    "qwen2.5-7b",
    "llama-3-8b",
    "llama-2-13b",
    "llama-33b",
    "llama-65b",
    "llama-2-70b",
    "llama-3-70b",
)
SAME = {"llama-7b": "llama-2-7b", "llama-13b": "llama-2-13b"}
# Batch, tokens, rank: no size of a model is divisible by them, and no model too short.
FIRST = (101, 113, 107)
SECOND = (103, 127, 109)
FEW = 4  # layers
# Bytes for each number, for each tensor, for each block. 8-bit Adam has short tensors
# in float32, and works on one tensor at a time, the last block of it filled up.
OPTIMIZERS = {
    "adamw": dict(number=8, tensor=4),
    "adamw8bit": dict(
        number=2,
        block=8,
        blocksize=256,
        least=4096,
        short=8,
        update=dict(number=23, filling=12, block=8, short=8),
    ),
}


class Recorder(tracker.Tracker):
    """A tracker that writes down each birth, death and moment, in order."""

    def __init__(self):
        super().__init__("cuda")
        self.events = []  # (1, -1 or 0; which storage)
        self.sizes = []  # of the storages, in bytes
        self.numbers = {}  # {address: which storage}

    def _come(self, address, size):
        super()._come(address, size)
        self.numbers[address] = len(self.sizes)
        self.events.append((1, len(self.sizes)))
        self.sizes.append(size)

    def _leave(self, address, size, _):
        super()._leave(address, size, _)
        self.events.append((-1, self.numbers.pop(address)))

    def look(self, more=0):
        super().look(more)
        self.events.append((0, 0))


def record(config, method, kbit_prepared, checkpointing, point):
    """A step at that batch, length and rank: what happened, and all sizes."""
    batch, seq, rank = point
    r = rank if method in calculator.LORAS else None
    settings = calculator.method_settings(method, r, None, None, None, kbit_prepared)
    with quiet(), tracker.as_on("cuda"):
        model, base = calculator.build(config, method, **settings)
        inputs = calculator.make_inputs(model, batch, seq)
        if checkpointing:
            calculator.enable_checkpointing(model)

        weights = [*model.parameters(), *model.buffers()]
        trained = [p for p in model.parameters() if p.requires_grad]
        with Recorder() as recorder:
            recorder.enter([*weights, *inputs.values()])
            forward = None
            if model.training:
                loss = calculator.loss_of(model, inputs)
                forward = len(recorder.course)
                loss.backward()
            else:
                calculator.pass_through(model, inputs)

        gradients = [p.grad for p in trained if p.grad is not None]
        addresses = [g.untyped_storage()._cdata for g in gradients]
    return dict(
        events=[*recorder.events],  # before the model goes
        forward=forward or len(recorder.course),
        made=[recorder.numbers[address] for address in addresses],
        sizes=recorder.sizes,
        weights=[tracker.nbytes(weights)],
        gradients=[tracker.nbytes(gradients)],
        block=zero.block_sizes(model),
        inputs=[tracker.nbytes([t]) for t in inputs.values()],
        trained=[p.numel() for p in trained if p.grad is not None],
        base=[base],
    )


# Sizes as polynomials: {(power of b, of s, of r): coefficient}


def polynomial(first, second):
    """The polynomial that has these values at FIRST and at SECOND."""
    powers = [0, 0, 0]
    if first != second:
        for i, (p, q) in enumerate(zip(FIRST, SECOND, strict=True)):
            while first % p == 0 and second % q == 0:
                first, second = first // p, second // q
                powers[i] += 1
    if first == second:
        return {tuple(powers): first}

    b, s, r = powers  # times a number and one in s, as 8 (s + 1)
    slope, rest = divmod(second - first, SECOND[1] - FIRST[1])
    if rest:
        raise ValueError(f"no polynomial has {first} and {second}")
    return {(b, s + 1, r): slope, (b, s, r): first - slope * FIRST[1]}


def linear(first, second):
    """Of sums such as 32 weights and 4 r: the polynomial in r."""
    slope, rest = divmod(second - first, SECOND[2] - FIRST[2])
    if rest:
        raise ValueError(f"no line in r has {first} and {second}")
    return {(0, 0, 1): slope, (0, 0, 0): first - slope * FIRST[2]}


def vector(found, terms):
    return torch.tensor([found.get(powers, 0) for powers in terms])


class Steps:
    """Two steps with so many layers, as matrices (moments, terms) and polynomials."""

    def __init__(self, name, layers, *way):
        config = memory.load(name)
        config.num_hidden_layers = layers
        one, two = (record(config, *way, point) for point in (FIRST, SECOND))
        if one["events"] != two["events"]:
            raise ValueError(f"two steps of {name} differ in more than sizes")

        self.forward = one["forward"]
        self.events = one["events"]
        self.made = {*one["made"]}
        self.sizes = [*map(polynomial, one["sizes"], two["sizes"])]
        self.numbers = {
            part: linear(*one[part], *two[part])
            for part in ("weights", "gradients", "base")
        }
        self.blocks = [*map(linear, one["block"], two["block"])]
        self.inputs = [*map(polynomial, one["inputs"], two["inputs"])]
        trained = map(linear, one["trained"], two["trained"])
        self.trained = Counter((n[0, 0, 0], n[0, 0, 1]) for n in trained)

    def course(self, terms):
        """All bytes at each moment, and those less the gradients made before."""
        size = torch.stack([vector(each, terms) for each in self.sizes])
        what, which = torch.tensor(self.events).T
        moment = what == 0
        change = size[which] * what[:, None]
        live = change.cumsum(0)[moment]

        born = torch.tensor([w == 1 and n in self.made for w, n in self.events])
        made = (size[which] * born[:, None]).cumsum(0)[moment]
        before = torch.cat([torch.zeros_like(made[:1]), made[:-1]])
        return live, live - before


# Few rows that are the highest somewhere


def from_one(rows, terms):
    """The coefficients in b - 1, s - 1 and r - 1, which are 0 or more."""
    columns = {}
    for j, powers in enumerate(terms):
        for lower in product(*(range(n + 1) for n in powers)):
            factor = prod(map(comb, powers, lower))
            columns[lower] = columns.get(lower, 0) + factor * rows[:, j]
    return torch.stack([*columns.values()], 1)


def highest(rows, terms):
    """Those of rows (n, terms) without which the maximum would be lower somewhere.

    A row goes if another, or a mixture of two others, is nowhere below it.
    """
    rows = rows.unique(dim=0)
    values = from_one(rows, terms).double()  # whole numbers below 2^53
    points = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    points = torch.exp2(22 * points.double())  # 1 to 4 million, evenly over the sizes
    powers = torch.tensor(terms).double()
    weights = (points[:, None, :] ** powers).prod(-1)  # (points, terms)
    kept = (weights @ rows.double().T).argmax(1).unique().tolist()

    left = [i for i in range(len(rows)) if i not in kept]
    while left:
        left = [i for i in left if not exceeded(values[i], values[kept])]
        if left:
            kept.append(max(left, key=lambda i: values[i].sum()))
            left.remove(kept[-1])
    return rows[sorted(kept)]


def exceeded(row, others):
    """Whether a mixture of two of the others (n, terms) is nowhere below the row."""
    gap = others - row
    if (gap >= 0).all(1).any():
        return True
    a, b = gap[:, None], gap[None, :]  # t a + (1 - t) b >= 0 for one t from 0 to 1
    edge = b / (b - a)
    low = edge.where(a > b, 0).amax(-1).clamp(min=0)
    high = edge.where(a < b, 1).amin(-1).clamp(max=1)
    level = ((a != b) | (b >= 0)).all(-1)
    pairs = (level & (low < high + 1e-9)).nonzero().tolist()
    return any(_mixes(gap[i], gap[j], (low + high)[i, j] / 2) for i, j in pairs)


def _mixes(a, b, t):
    """Whether t a + (1 - t) b >= 0, in whole numbers."""
    t = Fraction(float(t) + 1e-12).limit_denominator(1000)
    k, n = t.numerator, t.denominator
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    return all(k * int(x) + (n - k) * int(y) >= 0 for x, y in pairs)


# The table


def entry(name, *way):
    """What the table has of a model and a way to train it."""
    few, five = (Steps(name, FEW + more, *way) for more in (0, 1))
    more = memory.load(name).num_hidden_layers - FEW
    numbers = few.numbers | {}
    for part, at in few.numbers.items():
        numbers[part] = {
            p: n + more * (five.numbers[part][p] - n) for p, n in at.items()
        }

    trained = Counter(few.trained)
    for size in five.trained:
        trained[size] += more * (five.trained[size] - few.trained[size])

    # A fifth layer comes in the middle, both in the forward pass and in the backward.
    terms = sorted({p for s in (few, five) for each in s.sizes for p in each})
    terms = sorted({*terms, (0, 0, 0), (0, 0, 1)})
    courses, longer = few.course(terms), five.course(terms)
    n = len(courses[0])
    ahead = five.forward - few.forward
    back = len(longer[0]) - n - ahead
    there = torch.arange(n)
    there[few.forward - 2 * ahead :] += ahead
    there[n - 2 * back :] += back
    whole, alone = (
        a + more * (b[there] - a) for a, b in zip(courses, longer, strict=True)
    )

    alone = alone - vector(numbers["weights"], terms)
    whole = whole - vector(numbers["weights"], terms)
    whole = whole - vector(numbers["gradients"], terms)
    inputs = Counter()
    for each in few.inputs:
        inputs.update(each)
    rows = dict(
        whole=highest(whole, terms),
        alone=highest(alone, terms),
        block=highest(torch.stack([vector(b, terms) for b in few.blocks]), terms),
        inputs=vector(inputs, terms)[None],
    )
    rows |= {part: vector(number, terms)[None] for part, number in numbers.items()}

    used = torch.cat([*rows.values()]).any(0)
    names = [table.name(powers) for powers, u in zip(terms, used, strict=True) if u]
    found = {part: row[:, used].tolist() for part, row in rows.items()}
    tensors = [[k, *size] for size, k in sorted(trained.items()) if k]
    return dict(terms=names, trained=tensors, **found)


def ways():
    """{its name in the table: method, kbit_prepared, checkpointing}."""
    found = {}
    for method in memory.METHODS:
        for kbit in (None, True) if method in calculator.PACKED else (None,):
            for checkpointing in (False, True)[: 1 + (method != "inference")]:
                way = (method, kbit, checkpointing)
                found[table.way(method, checkpointing, bool(kbit))] = way
    return found


def write(models):
    """Write the table, a row of numbers on each line."""
    room = dict(context=cards.CONTEXT, holes=cards.HOLES, GiB=cards.GIB)
    rules = dict(
        cards=cards.CARDS,
        no_bfloat16=[*cards.NO_BFLOAT16],
        room={name: int(value) if value > 1 else value for name, value in room.items()},
        optimizers=OPTIMIZERS,
        models=models,
    )
    lines = json.dumps(rules, indent=1)
    lines = re.sub(r"\[[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), lines)
    table.FILE.write_text(lines + "\n", "utf8")


def main(names=MODELS):
    """Record the named models and write the table; what it has of others stays."""
    torch.set_num_threads(1)
    models = table.content()["models"] if table.FILE.exists() else {}
    jobs = [(name, *way) for name in names for way in ways().items()]
    for name, key, way in tqdm(jobs, desc="memory table"):
        model = models.setdefault(name, dict(ways={}))
        model["positions"] = memory.load(name).max_position_embeddings
        model["ways"][key] = entry(name, *way)

    for name, other in SAME.items():
        positions = memory.load(name).max_position_embeddings
        models[name] = dict(same=other, positions=positions)
    write({name: models[name] for name in (*MODELS, *SAME) if name in models})


if __name__ == "__main__":
    main(sys.argv[1:] or MODELS)
