"""4-bit weights as bitsandbytes names them."""

import json
import math

import torch
from torch import nn

from peftlab import nf4, surgery
from peftlab.peft_files import METHODS

TYPES = {"nf4": nf4.NF4, "fp4": nf4.FP4}  # bitsandbytes' 4-bit types
FLOAT = torch.float32
STATE = ".weight.quant_state.bitsandbytes__"
KEYS = {"absmax": ".absmax", "code": ".quant_map", "nested_absmax": ".nested_absmax"}


def packed_state_dict(model):
    """{name: tensor} of a base with linears in 4 bits, as bitsandbytes names them: what
    `safetensors.torch.save_file` and transformers' 4-bit loading take. That wants T5's
    `wo` and Falcon's linears plain, and takes a classifier, which is plain here, for
    packed unless its `llm_int8_skip_modules` names it (by how a name ends: DistilBERT's
    "classifier" is its `pre_classifier` too). An adapter on the model is left out, and
    of tied weights the first alone is there. Raises ValueError for a model with no
    packed linear, and for a type of 4 bits, a block size or a dtype that bitsandbytes
    does not have."""
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = {p: m for p, m in modules.items() if isinstance(m, nf4.NF4Linear)}
    if not packed:
        raise ValueError("no linear of the model is in 4 bits: see qlora.add")
    kinds = {method.layer: method.keys for method in METHODS.values()}
    found, seen = {}, set()
    for name, t in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        holder = path.removesuffix(".base")  # an adapter holds the layer as its base
        plain = holder if type(modules[holder]) in kinds else path
        if path in packed and leaf not in ("codes", "bias"):
            continue  # goes with the codes
        if leaf in kinds.get(type(modules[path]), ()):
            continue  # an adapter's own
        place = t.data_ptr() or name, t.shape  # nothing is tied to an empty tensor
        if place not in seen and path in packed and leaf == "codes":
            found |= _to_bitsandbytes(plain, packed[path])
        elif place not in seen:
            found[f"{plain}.{leaf}" if plain else leaf] = t
        seen.add(place)
    return found


def load_packed(model, tensors, compute_dtype=torch.bfloat16):
    """Put the weights of a 4-bit checkpoint into a plain model, in place; return it.

    model: built from the checkpoint's config, its linears plain. tensors: {name:
    tensor} as bitsandbytes names them, say from `safetensors.torch.load_file`. Linears
    that are packed there become `nf4.NF4Linear`; the rest is copied in the model's
    dtype. compute_dtype: as in `nf4.NF4Linear`; the file does not say. Raises
    ValueError, the model unchanged, for a missing, unexpected, broken or wrong-shaped
    entry, one that is NaN or past the model's dtype, a setting that we do not have, and
    a model on the meta device."""
    for name, t in tensors.items() if isinstance(tensors, dict) else [(None, tensors)]:
        dense = torch.is_tensor(t) and t.layout == torch.strided and not t.is_meta
        if not isinstance(name, str) or not dense:
            raise ValueError(f"{name!r}: need {{name: tensor}}, dense and with memory")
    if not getattr(compute_dtype or FLOAT, "is_floating_point", False):
        raise ValueError(f"compute_dtype: a float or None, not {compute_dtype!r}")
    paths = {name.partition(STATE)[0] for name in tensors if STATE in name}
    if not paths:
        raise ValueError("there is no linear in 4 bits among these tensors")
    if any(t.is_meta for t in model.state_dict().values()):
        raise ValueError("the model is on the meta device: give it memory first")
    modules = dict(model.named_modules(remove_duplicate=False))
    rest, new, there = dict(tensors), {}, model.state_dict()
    for path in sorted(paths):
        parts = {
            k: rest.pop(k) for k in tensors if f"{k}.".startswith(f"{path}.weight.")
        }
        sides = {"in_features", "out_features"} <= {*vars(modules.get(path, model))}
        plain = sides or type(modules.get(path)).__name__ == "Conv1D"
        if not path or path not in modules or not plain:
            raise ValueError(f"the model has no linear {path!r} to put 4 bits into")
        new[modules[path]] = _from_bitsandbytes(
            path, modules[path], parts, compute_dtype
        )
    inner = tuple(f"{path}." for path in paths)  # a base that is packed has more there
    own = {k: t for k, t in there.items() if not k.startswith(inner) or "bias" in k}
    tied = {there[k].data_ptr() for k in there.keys() & tensors.keys()}
    for name in sorted(own.keys() | rest.keys()):
        got, want = (str(getattr(d.get(name), "shape", None)) for d in (rest, own))
        if got != want and not (got == "None" and own[name].data_ptr() in tied):
            raise ValueError(f"{name}: its shape is {got} here, {want} in the model")
        if name in rest and _kind(rest[name]) != _kind(own[name]):
            kinds = f"{rest[name].dtype} here, {own[name].dtype} in the model"
            raise ValueError(f"{name}: its dtype is {kinds}")
    for name, t in rest.items():
        cast = t.to(own[name].dtype)
        if cast.isnan().any() or (cast.isinf() & t.isfinite()).any():
            raise ValueError(f"{name}: it is NaN, or too large for {cast.dtype}")
    with torch.no_grad():
        for name, t in rest.items():
            own[name].copy_(t)
    surgery.swap(model, new)
    return model


def _to_bitsandbytes(path, layer):
    """{name: tensor} of one packed linear."""
    kind = next((k for k, v in TYPES.items() if torch.equal(v, layer.code.cpu())), None)
    sizes, dtypes = [2**k for k in range(5, 13)], (FLOAT, torch.bfloat16, torch.float16)
    if kind is None or layer.blocksize not in sizes or layer.dtype not in dtypes:
        raise ValueError(
            f"{path}: bitsandbytes has nf4 and fp4 alone, in blocks of 32, 64, 128, ..."
            " to 4096, of float32, bfloat16 and float16"
        )
    found = {"": layer.codes, ".absmax": layer.absmax, ".quant_map": layer.code}
    dtype = str(layer.dtype).removeprefix("torch.")
    about = dict(quant_type=kind, blocksize=layer.blocksize, dtype=dtype)
    about["shape"] = [*layer.shape]
    if layer.offset is not None:
        found[".nested_absmax"] = layer.nested_absmax
        found[".nested_quant_map"] = nf4.DYNAMIC.clone()
        nested = dict(nested_blocksize=256, nested_dtype="float32")
        about |= nested | dict(nested_offset=layer.offset.item())
    text = bytearray(json.dumps(about), "utf8")
    found[STATE.removeprefix(".weight") + kind] = torch.frombuffer(
        text, dtype=torch.uint8
    )
    return {f"{path}.weight{key}": t for key, t in found.items()}


def _from_bitsandbytes(path, base, parts, compute_dtype):
    """The packed linear that bitsandbytes' tensors of one layer describe."""
    state = next(k for k in parts if STATE in k)
    found = {
        k.removeprefix(f"{path}.weight"): t for k, t in parts.items() if k != state
    }
    try:
        about = json.loads(bytes(parts[state].flatten().tolist()))
        code = TYPES[about["quant_type"]]
        nested = "nested_offset" in about
        offset = torch.tensor(float(about["nested_offset"])) if nested else None
        dtype, shape = getattr(torch, about["dtype"]), tuple(about["shape"])
        size = about["blocksize"]
        with torch.device("meta"):  # a layer of that sort, without memory
            layer = nn.Linear(*shape[::-1], bias=False, dtype=dtype)
            layer = nf4.NF4Linear(layer, size, nested, compute_dtype)
    except (
        AttributeError,
        KeyError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{state} does not describe a weight in 4 bits") from error
    if not state.endswith(about["quant_type"]):
        raise ValueError(f"{state} describes a weight in {about['quant_type']}")
    if shape != surgery.shape(base):
        raise ValueError(
            f"{path}: its shape is {shape}, in the model {surgery.shape(base)}"
        )
    if nested and about.get("nested_blocksize") != 256:
        raise ValueError(
            f"{path}: the absmax must be in blocks of 256 where it is packed"
        )
    values = found.pop(".nested_quant_map", None) if nested else nf4.DYNAMIC
    if values is None or not torch.equal(values.float().cpu(), nf4.DYNAMIC):
        raise ValueError(f"{path}: the absmax are in another type than the dynamic one")
    codes = found.pop("", torch.empty(0)).contiguous().view(-1).view(torch.uint8)
    own = {"codes": codes.view(-1, 1), "offset": offset}
    plain = () if nested else ("nested_absmax",)
    own |= {
        name: found.pop(key, None) for name, key in KEYS.items() if name not in plain
    }
    if found:
        raise ValueError(f"{path}.weight: {min(found)!r} is nothing that we know")
    for name, want in layer.state_dict().items():
        t = own[name]
        if getattr(t, "shape", None) != want.shape or t.dtype != want.dtype:
            raise ValueError(f"{path}.weight: {KEYS.get(name, name)} is missing or odd")
        if not t.isfinite().all():
            raise ValueError(f"{path}.weight: {KEYS.get(name, name)} is not finite")
        if "absmax" in name and t.min() < 0:
            raise ValueError(f"{path}.weight: {KEYS[name]} is a magnitude below zero")
    if not torch.allclose(own["code"].cpu(), code, atol=1e-6):
        raise ValueError(f"{path}.weight: its values are not {about['quant_type']}'s")
    own = {
        name: t.detach().to(base.weight.device, copy=True)
        for name, t in own.items()
        if t is not None
    }
    layer.load_state_dict(own, assign=True)
    layer.bias, layer.kind = base.bias, type(base)
    return layer.train(base.training)


def _kind(tensor):  # one is copied into another of its kind alone
    return tensor.is_floating_point(), tensor.is_complex()
