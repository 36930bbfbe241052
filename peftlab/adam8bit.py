r"""Adam with 8-bit states: Dettmers et al. 2021, arXiv 2110.02861.

Adam averages each weight's gradient $g$ and its square: in float32, eight bytes a
weight. Here each average takes one byte. The byte is the index of a value in a dynamic
map (sections 1.3 and 2.2), and the value counts in units of the largest magnitude of
its block (section 2.1: 2,048 weights a block; here 256). Step t unpacks both, does as
AdamW does (learning rate $\eta$, weight decay $\lambda$) and packs them again:

$$ \begin{aligned} m &\leftarrow \beta_1 m + (1 - \beta_1)\, g \\ v &\leftarrow
\beta_2 v + (1 - \beta_2)\, g^2 \\ w &\leftarrow (1 - \eta \lambda)\, w - \eta\,
\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \end{aligned} $$

| symbol | shape | in code | start |
|---|---|---|---|
| $m$, on the signed map | w's, uint8 | `m` | zero |
| $v$ (the paper's $r$), on the unsigned map | w's, uint8 | `v` | zero |
| a block's largest magnitude | (blocks,), float32 | `m_absmax`, `v_absmax` | zero |

Each number becomes the nearest value of the map (`_nearest`). On the CPU bitsandbytes
has 65,536 even bins instead, so its codes near 0 are not the nearest. One exception is
ours: v > 0 never becomes code 0. Else m, which is not squared, would outlive it, and a
step would be m / eps, thousands of learning rates long. The signed map has 1 and no -1,
so a block whose largest is negative shrinks by 0.7%. Not here: the paper's stable
embedding, and paged states.
"""

import functools
import math

import torch
from torch.nn.functional import pad


def dynamic_map(signed=True):
    """The values of the 8-bit dynamic type (arXiv 2110.02861, section 1.3).

    They are 0, 1 and, for e = 0 to 6, the middles of `2**e` equal parts of 0.1 to 1,
    times `10**(e - 6)`, with their negatives. The unsigned map (section 2.2) has twice
    as many parts and no negatives.

    Args:
        signed: whether the map has negatives.

    Returns:
        The values, (256,), float32 on the CPU, rising.
    """
    like = dict(dtype=torch.float32, device="cpu")  # whatever the defaults are
    values = [torch.arange(2, **like)]

    for e in range(7):
        parts = 2**e if signed else 2 * 2**e
        edges = torch.linspace(0.1, 1, parts + 1, **like)
        middles = 10.0 ** (e - 6) * (edges[:-1] + edges[1:]) / 2
        values.append(middles)
        if signed:
            values.append(-middles)

    return torch.cat(values).sort().values


SIGNED = dynamic_map(True)
UNSIGNED = dynamic_map(False)


def quantize(x, code, blocksize=256):
    """Pack floats into bytes: of each over its block's largest, the nearest value.

    Args:
        x: floats of any shape. Blocks run over its elements row after row.
        code: the values of the map, (256,), rising: `SIGNED` or `UNSIGNED`.
        blocksize: elements a block, a whole number; the last block may be shorter.

    Returns:
        The indices of the values, uint8, in x's shape, and absmax, the largest
        magnitude of each block, float32, (blocks,).

    Raises:
        ValueError: x is no tensor of floats, or has NaN or infinity; blocksize is no
            whole number above 0; code is too fine for the look-up.
    """
    if not torch.is_tensor(x) or not x.is_floating_point():
        raise ValueError(f"x must be floats, not {getattr(x, 'dtype', type(x))}")
    _check("blocksize", blocksize)

    rows = _blocks(x.detach().float(), blocksize)  # (blocks, blocksize)
    absmax = rows.abs().amax(1)  # (blocks,)
    if not absmax.isfinite().all():
        raise ValueError("no byte stands for NaN or infinity: take them out of x first")

    rows = rows * (1 / absmax.clamp(min=1e-38))[:, None]  # zeros stay zeros
    codes = _nearest(rows.flatten()[: x.numel()], code)
    return codes.view(x.shape), absmax


def dequantize(codes, absmax, code, blocksize=256):
    """Unpack what `quantize` gave.

    Args:
        codes: indices of values, uint8, any shape.
        absmax: the largest magnitude of each block, float32, (blocks,).
        code: the values of the map, (256,).
        blocksize: elements a block, as it was for `quantize`.

    Returns:
        `code[index] * absmax`, float32, in the shape of codes.
    """
    indices = _blocks(codes, blocksize)  # (blocks, blocksize)

    values = code.to(absmax).index_select(0, indices.flatten().int())
    rows = values.view(indices.shape).mul_(absmax.view(len(indices), 1))
    return rows.flatten()[: codes.numel()].view(codes.shape)


LIMITS = dict(  # {setting: (the least, the most)}
    lr=(0, 1e18),
    betas=(0, 1 - 2**-53),
    eps=(1e-30, 1e18),
    weight_decay=(0, 1e18),
    min_8bit_size=(0, math.inf),
    blocksize=(1, math.inf),
)


class Adam8bit(torch.optim.Optimizer):
    """AdamW with its two averages in bytes (arXiv 2110.02861, section 2).

    Args:
        params: parameters or groups of them, as for any torch optimizer.
        lr: the learning rate.
        betas: the two averages' decay, beta1 and beta2.
        eps: added to the root of v.
        weight_decay: AdamW's, apart from the gradient.
        min_8bit_size: tensors of fewer elements have float32 states, as in
            bitsandbytes. `math.inf` for a group of embeddings does as the paper does.
        blocksize: elements a block.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        min_8bit_size=4096,
        blocksize=256,
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
            blocksize=blocksize,
        )
        super().__init__(params, defaults)

    def add_param_group(self, group):
        """Add a group of parameters, as any torch optimizer does.

        Args:
            group: a dict of "params" and of the settings that differ in this group.

        Raises:
            ValueError: for a setting out of range. Then nothing is added.
        """
        settings = self.defaults | group
        for name in LIMITS:
            _check(name, settings[name])

        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update each parameter that has a gradient.

        Args:
            closure: called first, with gradients on, if it is given.

        Returns:
            What the closure gives, or None.

        Raises:
            ValueError: no weight moved, where a gradient is sparse, has not 16 or 32
                bits, or holds NaN or more than 1e18, which would spoil a block.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        pairs = []
        for group in self.param_groups:
            pairs += [(p, group) for p in group["params"] if p.grad is not None]

        for p, _ in pairs:
            _check_gradient(p)
        for p, group in pairs:
            self._update(p, group)
        return loss

    def _update(self, p, group):
        state = self.state[p]
        blocksize = group["blocksize"]
        t = state.get("step", 0) + 1
        m, v = _unpacked(state, blocksize) if state else _zeros(p)

        _adamw(p, m, v, t, group)

        if p.numel() >= group["min_8bit_size"]:
            self.state[p] = dict(step=t, **_packed(m, v, blocksize))
        else:
            self.state[p] = dict(step=t, m=m, v=v)

    def load_state_dict(self, state_dict):
        """Take over what `state_dict` of an Adam8bit gave, to the bit.

        Args:
            state_dict: settings and states for as many parameters of the same shapes.

        Raises:
            ValueError: for anything else, such as another optimizer's state or another
                model's. Then nothing is changed.
        """
        try:
            states = _saved_states(state_dict, self.param_groups)
        except (AttributeError, KeyError, NotImplementedError, TypeError):
            raise ValueError("this is not what state_dict of Adam8bit gave") from None

        # torch's would cast the states to the dtype of the parameters
        copies = {p: _copied(state, p.device) for p, state in states.items()}
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(copies)


def _adamw(p, m, v, t, group):
    """Step t of AdamW, in place on p, m and v; in float32, p rounded at the end."""
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    g = p.grad.float()
    w = p.float()  # p itself where p is float32

    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)

    root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
    w.mul_(1 - lr * group["weight_decay"])
    w.addcdiv_(m, root, value=-lr / (1 - beta1**t))
    p.copy_(w)


# The search for the nearest value


def _nearest(x, code):
    """The index of the value of `code` that is nearest to each x, float32, (n,).

    The upper 16 bits of a float32 (its sign, its exponent and 7 bits more) say in which
    of 65,536 cells it lies. A cell is so narrow that at most one midpoint between two
    values lies in it: a table gives the lower of the two, one comparison with the
    midpoint decides. Halfway between two values the lower is taken.
    """
    lower, midpoint = _cells(tuple(code.tolist()), x.device)
    cell = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF)

    codes = lower.index_select(0, cell)
    above = x > midpoint.index_select(0, cell)
    return codes.add_(above.view(torch.uint8))


@functools.lru_cache(maxsize=8)
def _cells(code, device):
    """For each cell the least code in it, uint8, and the midpoint above that, float32.

    Both are (65536,). ValueError where two midpoints lie in one cell.
    """
    values = torch.tensor(code, dtype=torch.float32, device=device)
    midpoints = (values[:-1] + values[1:]) / 2  # (255,)

    upper = torch.arange(2**16, dtype=torch.int32, device=device) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)  # of each cell
    ends = ends.where(ends.isfinite(), 1.0)  # no x is infinite or NaN
    least, most = torch.bucketize(ends, midpoints, out_int32=True).aminmax(dim=0)

    if (most - least > 1).any():
        raise ValueError("code is too fine: two of its midpoints are in one cell")
    return least.to(torch.uint8), pad(midpoints, (0, 1), value=math.inf)[least]


# The states


def _zeros(p):
    return [torch.zeros_like(p, dtype=torch.float32) for _ in "mv"]


def _blocks(x, blocksize):
    """The elements of x as rows, a block each, the last one filled up with zeros."""
    size = max(1, min(blocksize, x.numel()))
    missing = -x.numel() % size
    flat = x.flatten()
    if missing:
        flat = pad(flat, (0, missing))
    return flat.view(-1, size)


def _packed(m, v, blocksize):
    m_codes, m_absmax = quantize(m, SIGNED, blocksize)
    v_codes, v_absmax = quantize(v, UNSIGNED, blocksize)
    v_codes.clamp_(min=(v > 0).byte())  # never zero under a root
    return dict(m=m_codes, v=v_codes, m_absmax=m_absmax, v_absmax=v_absmax)


def _unpacked(state, blocksize):
    if state["m"].dtype == torch.float32:
        return state["m"], state["v"]
    m = dequantize(state["m"], state["m_absmax"], SIGNED, blocksize)
    v = dequantize(state["v"], state["v_absmax"], UNSIGNED, blocksize)
    return m, v


def _saved_states(state_dict, groups):
    """{parameter: its saved state}; ValueError for what is not Adam8bit's and ours."""
    states = state_dict["state"]
    saved_groups = state_dict["param_groups"]

    for saved in saved_groups:
        missing = [name for name in LIMITS if name not in saved]
        if missing:
            raise ValueError(
                "this is another optimizer's state, not one of Adam8bit: its groups"
                f" have no {', '.join(missing)}"
            )
        for name in LIMITS:
            _check(name, saved[name])

    lengths = [len(group["params"]) for group in groups]
    if [len(saved["params"]) for saved in saved_groups] != lengths:
        raise ValueError("this is the state of other groups of parameters")
    indices = [i for saved in saved_groups for i in saved["params"]]
    if len({*indices}) < len(indices) or states.keys() - {*indices}:
        raise ValueError("the groups of this state do not name each tensor of it once")

    chosen = {}
    for group, saved in zip(groups, saved_groups, strict=True):
        for p, i in zip(group["params"], saved["params"], strict=True):
            if states.get(i, {}) != {}:
                _check_state(states[i], p, saved["blocksize"])
                chosen[p] = states[i]
    return chosen


def _copied(state, device):
    tensors = {name: t for name, t in state.items() if name != "step"}
    copies = {name: t.detach().to(device, copy=True) for name, t in tensors.items()}
    return dict(step=state["step"], **copies)


# What cannot be


def _check(name, value):
    """ValueError for a setting that is no number, or out of its limits."""
    least, most = LIMITS[name]
    numbers = [value]
    what = "a number"
    if name == "blocksize":
        what = "a whole number"
    if name == "betas":
        what = "two numbers"
        numbers = [*value] if isinstance(value, tuple | list) else []

    kinds = int if name == "blocksize" else int | float
    right = [
        isinstance(n, kinds) and type(n) is not bool and least <= n <= most
        for n in numbers
    ]
    if right != [True] * (2 if name == "betas" else 1):
        shown = " ".join(repr(value).split())
        raise ValueError(f"{name} must be {what}, {least} to {most}, not {shown:.50}")


def _check_gradient(p):
    """ValueError for a gradient that would spoil p or its states."""
    g = p.grad
    if g.layout != torch.strided or p.is_complex() or p.itemsize not in (2, 4):
        raise ValueError("Adam8bit takes dense real gradients of 16 or 32 bits")
    if not p.numel():
        return
    least, most = g.aminmax()
    if not torch.maximum(most, -least) < 1e18:
        raise ValueError("a gradient is NaN or above 1e18: skip this step")


def _check_state(state, p, blocksize):
    """ValueError for a state that p cannot have had."""
    blocks = -(-p.numel() // blocksize)
    wide = dict.fromkeys(["m", "v"], (torch.float32, p.shape))
    packed = dict.fromkeys(["m", "v"], (torch.uint8, p.shape))
    packed |= dict.fromkeys(["m_absmax", "v_absmax"], (torch.float32, (blocks,)))

    tensors = {name: t for name, t in state.items() if name != "step"}
    kinds = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    if kinds not in (wide, packed):
        raise ValueError(
            f"no state of Adam8bit for {[*p.shape]} in blocks of {blocksize!s:.20}"
        )

    for name, t in tensors.items():
        least = -math.inf if name == "m" else 0
        if not (t.isfinite() & (t >= least)).all():
            raise ValueError(f"{name} of a saved state is NaN, infinite or negative")

    step = state.get("step")
    if type(step) is not int or not 0 < step < 2**53:
        raise ValueError(f"step of a saved state must be a count, not {step!r:.50}")
