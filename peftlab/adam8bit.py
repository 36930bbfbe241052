r"""Adam with 8-bit states: Dettmers et al. 2021, arXiv 2110.02861.

Adam keeps two averages of the gradient $g$. Here each takes a byte a weight: its index
in a dynamic map (section 1.3, 2.2), over its block's largest (2.1: of 2,048; here 256).
Step t unpacks, does as AdamW (rate $\eta$, weight decay $\lambda$) and packs again:

$$ \begin{aligned} m &\leftarrow \beta_1 m + (1 - \beta_1)\, g \\ v &\leftarrow
\beta_2 v + (1 - \beta_2)\, g^2 \\ w &\leftarrow (1 - \eta \lambda)\, w - \eta\,
\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \end{aligned} $$

| symbol | shape | in code |
|---|---|---|
| $m$ signed; $v$ (the paper's $r$) unsigned | w's, uint8 | `m`, `v` |
| a block's largest magnitude | (blocks,), float32 | `m_absmax`, `v_absmax` |

Codes are the nearest (bitsandbytes' CPU has 65,536 even bins), save that v > 0 is never
code 0: m, not squared, would outlive it, and a step be m / eps, thousands of lr. With
no -1 in the map, -m_absmax shrinks by 0.7%. Not here: paged states, stable embedding.
"""

import math

import torch
from torch.nn.functional import pad


def dynamic_map(signed=True):
    """The 8-bit dynamic type (2110.02861, section 1.3), (256,), rising: 0, 1, and for
    e = 0 to 6 the middles of `2**e` equal parts of 0.1 to 1, times `10**(e - 6)`,
    with their negatives; unsigned (2.2), of twice as many parts, without."""
    like = dict(dtype=torch.float32, device="cpu")  # whatever the defaults are
    cuts = [torch.linspace(0.1, 1, 2 ** (e + 1 - signed) + 1, **like) for e in range(7)]
    parts = [10.0 ** (e - 6) * (x[:-1] + x[1:]) / 2 for e, x in enumerate(cuts)]
    mirror = [-x for x in parts] if signed else []
    return torch.cat([*parts, *mirror, torch.arange(2, **like)]).sort().values


SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)
LEAST = dict(lr=0, betas=0, eps=1e-30, weight_decay=0, min_8bit_size=0, blocksize=1)
MOST = dict(betas=1 - 2**-53, min_8bit_size=math.inf, blocksize=math.inf)  # or 1e18


def quantize(x, code, blocksize=256):
    """Floats of any shape -> (indices of the values of `code`, (256,), nearest to them
    over their block's largest magnitude, uint8, x's shape; those, float32, (blocks,)).
    Blocks run row after row. ValueError: NaN, infinity, no floats, no blocksize."""
    if not torch.is_tensor(x) or not x.is_floating_point():
        raise ValueError(f"x must be floats, not {getattr(x, 'dtype', type(x))}")
    _check(dict(blocksize=blocksize), ["blocksize"])
    n, size = x.numel(), max(1, min(blocksize, x.numel()))
    rows = pad(x.detach().float().flatten(), (0, -n % size)).view(-1, size)
    absmax = torch.linalg.vector_norm(rows, math.inf, 1)  # (blocks,)
    if not absmax.isfinite().all():
        raise ValueError("no byte stands for NaN or infinity: mend x first")
    rows = rows * (1 / absmax.clamp(min=1e-38))[:, None]  # zeros stay zeros
    codes = torch.bucketize(rows, (code[:-1] + code[1:]).to(rows) / 2, out_int32=True)
    return codes.flatten()[:n].to(torch.uint8).view(x.shape), absmax


def dequantize(codes, absmax, code, blocksize=256):
    """What `quantize` gave -> code[index] * absmax, float32, in the shape of codes."""
    scale = absmax.repeat_interleave(max(1, min(blocksize, codes.numel())))
    values = code.to(absmax).index_select(0, codes.flatten().int())
    return values.mul_(scale[: codes.numel()]).view(codes.shape)


class Adam8bit(torch.optim.Optimizer):
    """AdamW, m and v in bytes; below min_8bit_size weights, as in bitsandbytes, float32
    (for embeddings, as in the paper: math.inf). ValueError: a setting out of range."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 min_8bit_size=4096, blocksize=256):  # fmt: skip
        how = dict(lr=lr, betas=betas, weight_decay=weight_decay, blocksize=blocksize)
        super().__init__(params, dict(how, eps=eps, min_8bit_size=min_8bit_size))

    def add_param_group(self, group):
        """As torch's. Raises ValueError, nothing added, for a setting out of range."""
        _check(self.defaults | group)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None):
        """Steps what has a gradient; gives closure's loss. ValueError, no weight moved:
        one is sparse, not of 16 or 32 bits, NaN or above 1e18, which spoils a block."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        pairs = [(p, group) for p, group in pairs if p.grad is not None]
        for p, _ in pairs:
            if p.grad.is_sparse or p.is_complex() or p.itemsize not in (2, 4):
                raise ValueError("Adam8bit takes dense real gradients of 16 or 32 bits")
            if p.numel() and not p.grad.abs().max() < 1e18:
                raise ValueError("a gradient is NaN or above 1e18: skip this step")
        for p, group in pairs:
            self._update(p, group)
        return loss

    def _update(self, p, group):
        state, lr, size = self.state[p], group["lr"], group["blocksize"]
        g, w = p.grad.float(), p.float()  # w is p itself where p is float32
        m, v = (state[k] if state else torch.zeros_like(g) for k in "mv")
        t, (beta1, beta2) = state.get("step", 0) + 1, group["betas"]
        if m.dtype == torch.uint8:
            m = dequantize(m, state["m_absmax"], SIGNED, size)
            v = dequantize(v, state["v_absmax"], UNSIGNED, size)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        w.mul_(1 - lr * group["weight_decay"])
        p.copy_(w.addcdiv_(m, root, value=-lr / (1 - beta1**t)))
        self.state[p] = state = dict(step=t, m=m, v=v)
        if p.numel() >= group["min_8bit_size"]:
            state["m"], state["m_absmax"] = quantize(m, SIGNED, size)
            state["v"], state["v_absmax"] = quantize(v, UNSIGNED, size)
            state["v"].clamp_(min=(v > 0).byte())  # never zero under a root

    def load_state_dict(self, state_dict):
        """Takes what `state_dict` gave, to the bit: torch's would make it the dtype of
        the parameters. Raises ValueError, nothing changed, for anything else."""
        try:
            new, saved, groups = {}, state_dict["state"], state_dict["param_groups"]
            for own, group in zip(self.param_groups, groups, strict=False):
                _check(group)
                for p, i in zip(own["params"], group["params"], strict=False):
                    new[p] = _copy(saved.get(i, {}), p, group["blocksize"])
        except (AttributeError, KeyError, TypeError):
            raise ValueError("this is not what state_dict of Adam8bit gave") from None
        super().load_state_dict({**state_dict, "state": {}})  # it compares the lengths
        self.state.update((p, state) for p, state in new.items() if state)


def _check(settings, names=LEAST):  # ValueError for one that is missing or out of range
    for name in names:
        x, low, high = settings.get(name), LEAST[name], MOST.get(name, 1e18)
        what = dict(betas="two numbers", blocksize="an integer").get(name, "a number")
        kind = () if what == "an integer" else float  # a bool is neither
        xs = x if name == "betas" and isinstance(x, tuple | list) else [x]
        fit = [(type(b) is int or isinstance(b, kind)) and low <= b <= high for b in xs]
        if fit != [True] * (1 + (name == "betas")):
            raise ValueError(f"{name} must be {what}, {low} to {high}, not {x!r:.50}")


def _copy(state, p, size):  # of a saved state of p's; ValueError for any other
    n, t = (torch.float32, (-(-p.numel() // size),)), state.get("step")
    wide = dict.fromkeys("mv", (torch.float32, p.shape))
    packed = dict.fromkeys("mv", (torch.uint8, p.shape)) | dict(m_absmax=n, v_absmax=n)
    new = {k: x.to(p.device, copy=True) for k, x in state.items() if k != "step"}
    found = {k: (x.dtype, x.shape) for k, x in new.items() if x.isfinite().all()}
    if state and not (found in (wide, packed) and type(t) is int and 0 < t < 2**53):
        raise ValueError(f"no state of Adam8bit for a tensor of {[*p.shape]}")
    return state | new
