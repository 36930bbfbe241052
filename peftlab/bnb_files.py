"""4-bit weights as bitsandbytes names them and transformers finds in a checkpoint.

| `nf4.NF4Linear` at `path` | bitsandbytes | shape |
|---|---|---|
| `codes` | `path.weight` | (out in / 2, 1) |
| `absmax` | `path.weight.absmax` | (blocks,) |
| `code` | `path.weight.quant_map` | (16,) |
| `nested_absmax` | `path.weight.nested_absmax` | (blocks / 256,) |
| the 8-bit dynamic type | `path.weight.nested_quant_map` | (256,) |
| all else | `path.weight.quant_state.bitsandbytes__nf4` | JSON |

`packed_state_dict` writes these names and `load_packed` reads them. Not here: 8-bit
weights, and experts that transformers packs as one tensor.
"""

import json

import torch
from torch import nn

from . import nf4, surgery
from .peft_files import METHODS

TYPES = {"nf4": nf4.NF4, "fp4": nf4.FP4}  # bitsandbytes' 4-bit types
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = [2**k for k in range(5, 13)]
STATE = ".weight.quant_state.bitsandbytes__"
KEYS = {"absmax": ".absmax", "code": ".quant_map", "nested_absmax": ".nested_absmax"}


def packed_state_dict(model):
    """Name the tensors of a base with linears in 4 bits as bitsandbytes does.

    They are what `safetensors.torch.save_file` and transformers' 4-bit loading take.
    That wants T5's `wo` and Falcon's linears plain. It takes a classifier, which is
    plain here, for packed unless its `llm_int8_skip_modules` names it (by how a name
    ends: DistilBERT's "classifier" is its `pre_classifier` too).

    Args:
        model: one with `nf4.NF4Linear`, such as `qlora.add` makes.

    Returns:
        {name: tensor}, without the adapter if there is one on the model; of tied
        weights the first alone is there.

    Raises:
        ValueError: for a model with no packed linear, and for a type of 4 bits, a block
            size or a dtype that bitsandbytes does not have.
    """
    surgery.refuse_containers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = {p: m for p, m in modules.items() if isinstance(m, nf4.NF4Linear)}
    if not packed:
        raise ValueError("no linear of the model is in 4 bits: see qlora.add")

    kinds = {method.layer: method.keys for method in METHODS.values()}
    tensors = {}
    places = set()
    for name, t in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if leaf in kinds.get(type(modules[path]), ()):
            continue  # an adapter's
        if path in packed and leaf not in ("codes", "bias"):
            continue  # goes with the codes

        place = t.data_ptr() or name, t.shape  # nothing is tied to an empty tensor
        if place in places:
            continue
        places.add(place)

        holder = path.removesuffix(".base")  # an adapter holds the layer as its base
        plain = holder if type(modules[holder]) in kinds else path
        if path in packed and leaf == "codes":
            tensors |= _to_bitsandbytes(plain, packed[path])
        else:
            tensors[f"{plain}.{leaf}".removeprefix(".")] = t
    return tensors


def load_packed(model, tensors, compute_dtype=torch.bfloat16):
    """Put the weights of a 4-bit checkpoint into a plain model, in place.

    Linears that are packed there become `nf4.NF4Linear`; the rest is copied in the
    model's dtype.

    Args:
        model: built from the checkpoint's config, its linears plain.
        tensors: {name: tensor} as bitsandbytes names them, say from
            `safetensors.torch.load_file`.
        compute_dtype: as in `nf4.NF4Linear`; the file does not say.

    Returns:
        The same model.

    Raises:
        ValueError: for a missing, unexpected, broken or wrong-shaped entry, one that is
            NaN or past the model's dtype, a setting that we do not have, and a model on
            the meta device. Then the model is unchanged.
    """
    surgery.refuse_containers(model)
    _check_tensors(tensors)
    if not getattr(compute_dtype or torch.float32, "is_floating_point", False):
        raise ValueError(f"compute_dtype: a float or None, not {compute_dtype!r:.60}")
    paths = {name.partition(STATE)[0] for name in tensors if STATE in name}
    if not paths:
        raise ValueError("there is no linear in 4 bits among these tensors")
    state = model.state_dict()
    if any(t.is_meta for t in state.values()):
        raise ValueError("the model is on the meta device: give it memory first")

    modules = dict(model.named_modules(remove_duplicate=False))
    rest = dict(tensors)
    layers = {}
    for path in sorted(paths):
        names = [name for name in tensors if _belongs(name, path)]
        parts = {name: rest.pop(name) for name in names}
        base = modules.get(path)
        if not path or not _is_linear(base):
            raise ValueError(
                f"the model has no linear {path!r:.200} to put 4 bits into"
            )
        layers[base] = _from_bitsandbytes(path, base, parts, compute_dtype)

    inner = tuple(f"{path}." for path in paths)  # a base that is packed has more there
    own = {k: t for k, t in state.items() if not k.startswith(inner) or "bias" in k}
    tied = {state[name].data_ptr() for name in state.keys() & tensors.keys()}
    _check_rest(rest, own, tied)

    with torch.no_grad():
        for name, t in rest.items():
            own[name].copy_(t)
    surgery.swap(model, layers)
    return model


def _check_tensors(tensors):
    """ValueError unless they are {name: tensor}, each with numbers in memory."""
    if not isinstance(tensors, dict):
        raise ValueError(f"need {{name: tensor}}, not a {type(tensors).__name__}")
    for name, t in tensors.items():
        dense = torch.is_tensor(t) and t.layout == torch.strided and not t.is_meta
        if not isinstance(name, str) or not dense:
            what = f"{name!r:.200}"
            raise ValueError(f"{what}: need {{name: tensor}}, dense and with memory")


def _belongs(name, path):
    """Whether an entry describes the packed weight of the layer at a path."""
    return f"{name}.".startswith(f"{path}.weight.")


def _is_linear(m):
    """Whether 4 bits can go into it; a layer that carries an adapter is none."""
    if type(m).__name__ == "Conv1D":
        return True
    return m is not None and {"in_features", "out_features"} <= vars(m).keys()


def _check_rest(rest, own, tied):
    """ValueError unless the plain tensors fit the model's; tied ones may be missing."""
    for name in sorted(own.keys() | rest.keys()):
        got = surgery.size(rest.get(name))
        want = surgery.size(own.get(name))
        if got is None and own[name].data_ptr() in tied:
            continue
        if got != want:
            where = f"{got} here, {want} in the model"
            raise ValueError(f"{name:.200}: its shape is {where}")
        if _kind(rest[name]) != _kind(own[name]):
            kinds = f"{rest[name].dtype} here, {own[name].dtype} in the model"
            raise ValueError(f"{name}: its dtype is {kinds}")

    for name, t in rest.items():
        cast = t.to(own[name].dtype)
        if cast.isnan().any() or (cast.isinf() & t.isfinite()).any():
            raise ValueError(f"{name}: it is NaN, or too large for {cast.dtype}")


def _kind(tensor):  # one is copied into another of its kind alone
    return tensor.is_floating_point(), tensor.is_complex()


def _to_bitsandbytes(path, layer):
    """{name: tensor} of one packed linear."""
    code = layer.code.cpu()
    types = [name for name, values in TYPES.items() if torch.equal(values, code)]
    known = types and layer.blocksize in BLOCKSIZES and layer.dtype in DTYPES
    if not known:
        raise ValueError(
            f"{path}: bitsandbytes has nf4 and fp4 alone, in blocks of 32, 64, 128, ..."
            " to 4096, of float32, bfloat16 and float16"
        )

    tensors = {"": layer.codes, ".absmax": layer.absmax, ".quant_map": layer.code}
    about = dict(
        quant_type=types[0],
        blocksize=layer.blocksize,
        dtype=str(layer.dtype).removeprefix("torch."),
        shape=[*layer.shape],
    )
    if layer.offset is not None:  # the absmax are packed too
        tensors[".nested_absmax"] = layer.nested_absmax
        tensors[".nested_quant_map"] = nf4.DYNAMIC.clone()
        about |= dict(nested_blocksize=256, nested_dtype="float32")
        about |= dict(nested_offset=layer.offset.item())

    text = bytearray(json.dumps(about), "utf8")
    key = STATE.removeprefix(".weight") + types[0]
    tensors[key] = torch.frombuffer(text, dtype=torch.uint8)
    return {f"{path}.weight{key}": t for key, t in tensors.items()}


def _from_bitsandbytes(path, base, parts, compute_dtype):
    """The packed linear that bitsandbytes' tensors of one layer describe."""
    state = next(name for name in parts if STATE in name)
    about, layer = _described(state, parts[state], compute_dtype)
    if layer.shape != surgery.shape(base):
        sizes = f"{tuple(layer.shape)}, in the model {tuple(surgery.shape(base))}"
        raise ValueError(f"{path}: its shape is {sizes}")

    front = f"{path}.weight"
    tensors = {k.removeprefix(front): t for k, t in parts.items() if k != state}
    nested = "nested_offset" in about
    if nested:
        values = tensors.pop(".nested_quant_map", torch.empty(0))
        if about.get("nested_blocksize") != 256:
            raise ValueError(f"{path}: packed absmax must be in blocks of 256")
        if not torch.equal(values.float().cpu(), nf4.DYNAMIC):
            raise ValueError(f"{path}: the absmax are in another than the dynamic type")

    codes = tensors.pop("", torch.empty(0)).contiguous().view(-1).view(torch.uint8)
    own = {"codes": codes.view(-1, 1)}
    for name, key in KEYS.items():
        if nested or name != "nested_absmax":
            own[name] = tensors.pop(key, None)
    if nested:
        own["offset"] = torch.tensor(float(about["nested_offset"]))
    if tensors:
        raise ValueError(f"{front}: {min(tensors)!r:.200} is nothing that we know")

    _check_numbers(front, own, layer, TYPES[about["quant_type"]])
    for name, t in own.items():
        own[name] = t.detach().to(base.weight.device, copy=True)
    layer.load_state_dict(own, assign=True)
    layer.bias = base.bias
    layer.kind = type(base)
    return layer.train(base.training)


def _described(state, tensor, compute_dtype):
    """What the JSON of a layer says, and such a layer without memory."""
    try:
        about = json.loads(bytes(tensor.flatten().tolist()))
        n_out, n_in = about["shape"]
        dtype = getattr(torch, about["dtype"])
        nested = "nested_offset" in about
        float(about.get("nested_offset", 0))
        TYPES[about["quant_type"]]
        with torch.device("meta"):
            plain = nn.Linear(n_in, n_out, bias=False, dtype=dtype)
            layer = nf4.NF4Linear(plain, about["blocksize"], nested, compute_dtype)
    except (ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{state} does not describe a weight in 4 bits") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{state} does not describe a weight in 4 bits") from error
    if not state.endswith(about["quant_type"]):
        raise ValueError(f"{state} describes a weight in {about['quant_type']}")
    return about, layer


def _check_numbers(front, own, layer, code):
    """ValueError unless the tensors are such as the layer has, and make sense."""
    for name, want in layer.state_dict().items():
        t = own[name]
        what = f"{front}: {KEYS.get(name, name)}"
        if surgery.size(t) != tuple(want.shape) or t.dtype != want.dtype:
            raise ValueError(f"{what} is missing or odd")
        if not t.isfinite().all():
            raise ValueError(f"{what} is not finite")
        if "absmax" in name and t.min() < 0:
            raise ValueError(f"{what} is a magnitude below zero")
    if not torch.allclose(own["code"].cpu(), code, atol=1e-6):
        raise ValueError(f"{front}: its values are not those of its type")
