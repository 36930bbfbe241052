r"""QLoRA: LoRA over a base in 4 bits, Dettmers et al. 2023, arXiv 2305.14314, eq. 5, 6.

Every linear layer but the output head is packed to NF4, doubly quantized, and frozen.
LoRA goes beside those that are targeted, as in `lora`:

$$ y = \mathrm{dequant}(W^{\mathrm{NF4}})\,x + s\,B A x $$

| symbol | shape | in code | precision |
|---|---|---|---|
| $W^{\mathrm{NF4}}$ | (out, in) | `base`, an `nf4.NF4Linear` | 4.127 bits a weight |
| its product with $x$ | (..., out) | `compute_dtype` | bfloat16 |
| $A$, $B$ | (r, in), (out, r) | `lora_A`, `lora_B` | float32 (eq. 5: bfloat16) |

The gradient of A and B passes through the unpacked weights of the layers above. A
weight is unpacked where it is needed, in both directions, and only one is there at a
time. Embeddings, norms and the head stay in the dtype that they have: load the model in
16 bits. peft's `prepare_model_for_kbit_training` makes them float32; that is not here,
nor are paged optimizers. To save: `peft_files.save` writes A and B,
`bnb_files.packed_state_dict` gives the base in bitsandbytes' form.
"""

import torch
from torch import nn

from . import lora, nf4, surgery


def add(
    model,
    targets="all-linear",
    r=8,
    alpha=16,
    double_quant=True,
    compute_dtype=torch.bfloat16,
    dropout=0.0,
    bias="none",
    rslora=False,
    blocksize=64,
    code=nf4.NF4,
):
    """Pack every linear of `model` but its head, and put LoRA beside the targets.

    While it works both bases are in memory.

    Args:
        model: any module, in 16 or 32 bits.
        targets: where LoRA goes, as in `lora.add`. All else is packed too.
        r: the rank.
        alpha: the change is scaled by alpha / r, with `rslora` by alpha / sqrt(r).
        double_quant: as in `nf4.quantize`.
        compute_dtype: what weights are unpacked to for a product, None for the input's
            dtype. On a CPU without AVX512 float32 is many times quicker.
        dropout: as in `lora.add`.
        bias: as in `lora.add`.
        rslora: as in `lora.add`.
        blocksize: as in `nf4.quantize`.
        code: as in `nf4.quantize`.

    Returns:
        The same model.

    Raises:
        ValueError: for what `lora.add` or `nf4.NF4Linear` refuses. A base that is
            packed already is one for `lora.add`. Then the model is unchanged.
    """
    surgery.refuse_carried(model)
    linears = surgery.select(model, "all-linear")
    plain_model = surgery.uncompiled(model)  # in which no name begins with _orig_mod
    paths = {layer: path for path, layer in plain_model.named_modules()}

    packed = {}
    for layer in linears:
        try:
            packed[layer] = nf4.NF4Linear(
                layer, blocksize, double_quant, compute_dtype, code
            )
        except ValueError as error:
            raise ValueError(f"{paths[layer]}: {error}") from None

    if targets == "all-linear":  # the same layers, without a second warning
        targets = surgery.Exactly(paths[layer] for layer in linears)
    lora.add(model, targets, r, alpha, dropout, bias, rslora)
    surgery.swap(model, packed)
    return model


@torch.no_grad()
def merge(model, bits=16):
    """Fold s B A into the base, and take LoRA off.

    With 16 bits all packed layers become plain again, in the dtype from before. The sum
    is taken in float32 and rounded once; that is the only error. With 4 bits the sum is
    packed anew where there is LoRA, as the base was. That rounds to 16 levels again,
    and a change that is small beside the gaps between them is lost. A head that is a
    target was not packed, and stays plain.

    Args:
        model: one that carries QLoRA.
        bits: 16 or 4.

    Returns:
        The same model, frozen.

    Raises:
        ValueError: for other bits, a model without QLoRA, a head that cannot be
            written, and a sum that is NaN or infinite in its dtype. Then the model is
            unchanged.
    """
    if type(bits) is not int or bits not in (4, 16):
        raise ValueError(f"merge into 16 bits or into 4, not {bits!r:.60}")
    wrappers = surgery.wrappers(model, lora.LoRALinear)
    packed, heads = {}, {}
    for path, m in wrappers.items():
        group = packed if isinstance(m.base, nf4.NF4Linear) else heads
        group[path] = m
    if not packed:
        raise ValueError("no base under this LoRA is packed: lora.merge is for it")

    # First the new layers, which checks every sum; then the model changes.
    surgery.refuse_unwritable(
        [m.base for m in heads.values()], "QLoRA cannot be merged into"
    )
    for path, m in heads.items():
        surgery.check_fits(path, m.folded(), m.base.weight.dtype)

    new_layers = {m: m.base for m in heads.values()}
    for path, m in packed.items():
        base = m.base
        delta = m.scaling * (m.lora_B @ m.lora_A)  # (out, in)
        W = nf4.dequantize(base, torch.float32) + delta
        surgery.check_fits(path, W, base.dtype)
        new_layers[m] = _pack(base, W) if bits == 4 else _plain(base, W, base.dtype)

    if bits == 16:  # those without LoRA too
        bases = [m.base for m in packed.values()]
        for layer in model.modules():
            if isinstance(layer, nf4.NF4Linear) and layer not in bases:
                new_layers[layer] = _plain(layer, nf4.dequantize(layer), layer.dtype)

    for m in heads.values():
        surgery.set_weight(m.base, m.folded())
    surgery.swap(model, new_layers)
    return model.requires_grad_(False)


def state_dict(model, keep_vars=False):
    """Name all that trains, which is LoRA's; the packed base stays out.

    Args:
        model: one that carries QLoRA.
        keep_vars: give the parameters themselves, not detached tensors.

    Returns:
        {name: tensor}, as `lora.state_dict`.

    Raises:
        ValueError: without LoRA.
    """
    return lora.state_dict(model, keep_vars)


def load_state_dict(model, tensors):
    """Copy tensors into the model's LoRA, as `lora.load_state_dict`.

    Args:
        model: one that carries QLoRA.
        tensors: {name: tensor} as `state_dict` gives them.

    Raises:
        ValueError: for a missing or unexpected name, a wrong shape, and what is no
            tensor of finite floats. Then nothing is copied.
    """
    lora.load_state_dict(model, tensors)


def _pack(base, W):
    """The packed layer with the weight W, (out, in), which is rounded only here."""
    layer = nf4.NF4Linear(
        _plain(base, W, torch.float32),
        blocksize=base.blocksize,
        double_quant=base.offset is not None,
        compute_dtype=base.compute_dtype,
        code=base.code,
    )
    layer.dtype = base.dtype
    layer.kind = base.kind
    return layer


def _plain(packed, W, dtype):
    """The layer that was packed, with the weight W, (out, in)."""
    n_out, n_in = W.shape
    is_conv1d = packed.kind.__name__ == "Conv1D"
    with torch.device("meta"):  # its own random weight is not needed
        layer = packed.kind(n_out, n_in) if is_conv1d else nn.Linear(n_in, n_out)

    W = W.T if is_conv1d else W
    layer.weight = nn.Parameter(W.to(dtype).contiguous(), requires_grad=False)
    layer.bias = packed.bias
    return layer.train(packed.training)
