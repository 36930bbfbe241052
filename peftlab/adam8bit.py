r"""Adam with 8-bit states: Dettmers et al. 2021, arXiv 2110.02861.

Adam keeps two averages of the gradient $g$. Here each takes a byte a weight: the index
of the nearest value of a dynamic map (section 1.3), over its block's largest (2.1).
Step t unpacks them, does as AdamW (rate $\eta$, weight decay $\lambda$), packs again:

$$ m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \quad
v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \quad w \leftarrow (1 - \eta \lambda)\, w
- \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} $$

| symbol | shape | in code |
|---|---|---|
| $m$ signed; $v$ (the paper's $r$) unsigned | w's, uint8 | `m`, `v` |
| a block's largest magnitude | (blocks,), float32 | `m_absmax`, `v_absmax` |

As in bitsandbytes, below 4,096 weights m and v stay float32. Our codes are the nearest
(its CPU has 65,536 even bins), save that v > 0 is never code 0: m, not squared, would
outlive it, and a step be m / eps, thousands of lr. The map has no -1: what is there
shrinks by 0.7%. Not here: paged states, the paper's stable embedding.
"""

import math

import torch
from torch.nn.functional import pad


def dynamic_map(signed=True):
    """The 8-bit dynamic type (2110.02861, section 1.3), (256,), rising: 0, 1, and for
    e = 0 to 6 the middles of 2^e equal parts of 0.1 to 1, times 10^(e - 6), with their
    negatives; unsigned, of twice as many parts, without."""
    like = dict(dtype=torch.float32, device="cpu")  # whatever the defaults are
    cuts = [torch.linspace(0.1, 1, 2 ** (e + 1 - signed) + 1, **like) for e in range(7)]
    parts = [10.0 ** (e - 6) * (x[:-1] + x[1:]) / 2 for e, x in enumerate(cuts)]
    mirror = [-x for x in parts] if signed else []
    return torch.cat([*parts, *mirror, torch.arange(2, **like)]).sort().values


SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)
LEAST = dict(lr=0, eps=1e-30, weight_decay=0, min_8bit_size=0, blocksize=1)


def quantize(x, code, blocksize=256):
    """Floats of any shape -> (indices of the values of `code`, (256,), nearest to them
    over their block's largest magnitude, uint8, x's shape; those, float32, (blocks,)).
    Blocks run row after row. ValueError: NaN, infinity, no floats, no blocksize."""
    if not x.is_floating_point() or type(blocksize) is not int or blocksize < 1:
        raise ValueError(f"floats, a blocksize of 1 or more? {x.dtype}, {blocksize!r}")
    rows, n = x.detach().float().flatten(), x.numel()
    rows = pad(rows, (0, -n % blocksize)).view(-1, blocksize)  # (blocks, blocksize)
    absmax = torch.linalg.vector_norm(rows, math.inf, 1)  # (blocks,)
    if not absmax.isfinite().all():
        raise ValueError("no byte stands for NaN or infinity: mend x first")
    rows = rows * (1 / absmax.clamp(min=1e-38))[:, None]  # zeros stay zeros
    codes = torch.bucketize(rows, (code[:-1] + code[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).flatten()[:n].view(x.shape), absmax


def dequantize(codes, absmax, code, blocksize=256):
    """What `quantize` gave -> code[index] * absmax, float32, in the shape of codes."""
    index = pad(codes.flatten(), (0, -codes.numel() % blocksize)).int()
    rows = code.index_select(0, index).view(-1, blocksize) * absmax[:, None]
    return rows.flatten()[: codes.numel()].view(codes.shape)


class Adam8bit(torch.optim.Optimizer):
    """AdamW, m and v in bytes; in 32 bits below min_8bit_size weights, as the paper has
    embeddings: a group with math.inf. Raises ValueError for a setting out of range."""

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
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        sizes = dict(min_8bit_size=min_8bit_size, blocksize=blocksize)
        super().__init__(params, settings | sizes)

    def add_param_group(self, group):
        """As torch's. Raises ValueError, nothing added, for a setting out of range."""
        full = self.defaults | group
        for name, low in LEAST.items():
            kind, x = int if name == "blocksize" else int | float, full[name]
            if not isinstance(x, kind) or not x >= low:
                raise ValueError(f"{name} must be a number from {low} up, not {x!r}")
        betas = full["betas"]
        two = isinstance(betas, tuple | list) and len(betas) == 2
        if not two or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), not {betas!r}")
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of each parameter with a gradient; returns closure's loss. Raises
        ValueError, no weight changed, for a gradient that is sparse, of another dtype,
        NaN, infinite or above 1e18: such a one would spoil its whole block."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        pairs = [(p, group) for p, group in pairs if p.grad is not None]
        for p, _ in pairs:
            if p.grad.is_sparse or p.is_complex() or p.dtype == torch.float64:
                raise ValueError("Adam8bit takes dense real gradients of 16 or 32 bits")
            if p.numel() and not p.grad.abs().max() < 1e18:
                raise ValueError("a gradient is NaN or above 1e18: skip this step")
        for p, group in pairs:
            self._update(p, group)
        return loss

    def _update(self, p, group):
        state, lr, size = self.state[p], group["lr"], group["blocksize"]
        g, w = p.grad.float(), p.float()  # w is p itself where p is float32
        if not state:
            state.update(step=0, m=torch.zeros_like(g), v=torch.zeros_like(g))
        m, v, t = state["m"], state["v"], state["step"] + 1
        beta1, beta2 = group["betas"]
        one, two = SIGNED.to(p.device), UNSIGNED.to(p.device)
        if m.dtype == torch.uint8:
            m = dequantize(m, state["m_absmax"], one, size)
            v = dequantize(v, state["v_absmax"], two, size)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        w.mul_(1 - lr * group["weight_decay"])
        p.copy_(w.addcdiv_(m, root, value=-lr / (1 - beta1**t)))
        state.update(step=t, m=m, v=v)
        if p.numel() >= group["min_8bit_size"]:
            state["m"], state["m_absmax"] = quantize(m, one, size)
            state["v"], state["v_absmax"] = quantize(v, two, size)
            state["v"].clamp_(min=(v > 0).byte())  # never zero under a root

    def load_state_dict(self, state_dict):
        """Takes what `state_dict` gave, to the bit: torch's would make it the dtype of
        the parameters. Raises ValueError, nothing changed, for another model's."""
        own = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved = state_dict["state"]
        new = {p: saved.get(i, {}) for p, i in zip(own, ids, strict=False)}
        for p, state in new.items():
            if state and getattr(state.get("m"), "shape", None) != p.shape:
                raise ValueError(f"no state of Adam8bit for a tensor of {[*p.shape]}")
        super().load_state_dict({**state_dict, "state": {}})  # it compares the lengths
        for p, state in new.items():
            for k, x in state.items():
                self.state[p][k] = x if k == "step" else x.to(p.device, copy=True)
