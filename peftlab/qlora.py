r"""QLoRA: LoRA over a base in 4 bits, Dettmers et al. 2023, arXiv 2305.14314, eq. 5, 6.

Every linear but the output head is packed to NF4, doubly quantized, and frozen; LoRA
goes beside those that are targeted, as in `lora`:

$$ y = \mathrm{dequant}(W^{\mathrm{NF4}})\,x + s\,B A x $$

| symbol | shape | in code | precision |
|---|---|---|---|
| $W^{\mathrm{NF4}}$ | (out, in) | `base`, an `nf4.NF4Linear` | 4.127 bits a weight |
| its product with $x$ | (..., out) | `compute_dtype` | bfloat16 |
| $A$, $B$ | (r, in), (out, r) | `lora_A`, `lora_B` | float32 (eq. 5: bfloat16) |

The gradient of A and B passes through the unpacked weight of the layers above. W is
unpacked where it is needed, in both directions, and only one is there at a time.
Embeddings, norms and the head stay in the dtype that they have: load the model in 16
bits. peft's `prepare_model_for_kbit_training` makes them float32; that is not here, nor
are paged optimizers. For saving: `peft_files.save`, which writes A and B, or
`bnb_files.packed_state_dict` for the base in bitsandbytes' form.
"""

import torch
from torch import nn

from . import lora, nf4, surgery

state_dict, load_state_dict = lora.state_dict, lora.load_state_dict  # of A and B


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
    """Pack every linear of `model` but its head, put LoRA beside the targets, in place;
    return it. targets say where LoRA goes; r, alpha, dropout, bias and rslora are
    `lora.add`'s; blocksize, code and double_quant are `nf4.quantize`'s. compute_dtype:
    what weights are unpacked to for a product, None for the input's; on a CPU without
    AVX512 float32 is many times quicker. Raises ValueError, the model unchanged, for
    what `lora.add` or `nf4.NF4Linear` refuses, a base packed already too (`lora.add`
    takes that). While it works both bases are in memory."""
    settings = blocksize, double_quant, compute_dtype, code
    linears = surgery.select(model, "all-linear")
    packed, paths = {}, {m: path for path, m in model.named_modules()}
    for m in linears:
        try:
            packed[m] = nf4.NF4Linear(m, *settings)
        except ValueError as error:
            raise ValueError(f"{paths[m]}: {error}") from None
    lora.add(model, targets, r, alpha, dropout, bias, rslora)
    surgery.swap(model, packed)
    return model


@torch.no_grad()
def merge(model, bits=16):
    """Fold s B A into the base, and return the model, frozen.

    bits=16: plain layers again, all of them, in the dtype from before. The sum is taken
    in float32 and rounded once, and that is the error. bits=4: where there is LoRA the
    sum is packed anew, as the base was. That rounds it to 16 levels again, and a change
    that is small beside the gaps between them is lost. A head that is a target was not
    packed, and stays plain. Raises ValueError, the model unchanged, for other bits, a
    model without QLoRA, and a sum that is NaN or past what the dtype holds."""
    if bits not in (4, 16):
        raise ValueError(f"merge into 16 bits or into 4, not {bits!r}")
    state_dict(model)  # raises where there is no LoRA
    tuned = {m: m.base for m in model.modules() if isinstance(m, lora.LoRALinear)}
    packed = {m: b for m, b in tuned.items() if isinstance(b, nf4.NF4Linear)}
    if not packed:
        raise ValueError("no base under this LoRA is packed: lora.merge is for it")
    new = dict(tuned)
    for m, base in packed.items():
        delta = m.scaling * (m.lora_B @ m.lora_A)  # (out, in)
        weight = nf4.dequantize(base, torch.float32) + delta
        if not (weight.is_meta or weight.to(base.dtype).isfinite().all()):
            raise ValueError(f"a merged weight is NaN or too large for {base.dtype}")
        new[m] = _pack(base, weight) if bits == 4 else _plain(base, weight, base.dtype)
    if bits == 16:
        others = {m for m in model.modules() if isinstance(m, nf4.NF4Linear)}
        for base in others - {*tuned.values()}:
            new[base] = _plain(base, nf4.dequantize(base), base.dtype)
    if plain := [m for m in tuned if m not in packed]:  # merged in place, and it may
        lora.merge(nn.ModuleList(plain))  # refuse: so nothing is swapped before
    surgery.swap(model, new)
    return model.requires_grad_(False)


def _pack(base, weight):
    """The packed layer with another weight (out, in), which is rounded only here."""
    settings = base.blocksize, base.offset is not None, base.compute_dtype, base.code
    layer = nf4.NF4Linear(_plain(base, weight, torch.float32), *settings)
    layer.dtype = base.dtype
    return layer


def _plain(packed, weight, dtype):
    """The layer that was packed, with another weight (out, in)."""
    conv = packed.kind.__name__ == "Conv1D"
    kind = packed.kind if conv else lambda n_out, n_in: nn.Linear(n_in, n_out)
    with torch.device("meta"):
        layer = kind(*weight.shape)
    weight = (weight.T if conv else weight).to(dtype).contiguous()
    layer.weight, layer.bias = nn.Parameter(weight, False), packed.bias
    return layer.train(packed.training)
