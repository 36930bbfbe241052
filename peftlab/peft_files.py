r"""The one door to adapter files: reads what peft writes, writes what peft reads.

A peft adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`.
Which names in the file belong to which method, for a layer at `path` of the base model
(the prefix `base_model.model.` left out), is the table `METHODS` below:

| method | here | in the file | shape |
|---|---|---|---|
| LoRA, DoRA, PiSSA | `path.lora_A` | `path.lora_A.weight` | (r, in) |
| | `path.lora_B` | `path.lora_B.weight` | (out, r) |
| DoRA | `path.dora_m` | `path.lora_magnitude_vector` | (out,) |
| VeRA | `path.vera_d`, `path.vera_b` | `path.vera_lambda_d`, `_b` | (r,), (out,) |
| | the shared A, B | `base_model.vera_A`, `base_model.vera_B` | (r, in), (out, r) |
| IA3 | `path.ia3_l` | `path.ia3_l` | (out, 1) or (1, in) |
| prompt | `prompt_embeddings` | `prompt_embeddings` | (n, d), T5's also (2n, d) |
| prefix | `prompt_embeddings` | `prompt_embeddings` | (n, 2 layers kv_width) |
| LoRA's biases | `path.bias` | `path.base_layer.bias`, `path.bias` | (out,) |
| a head that goes along | as in the model | as in the model | as in the model |

A PiSSA is written as a LoRA of twice the rank that fits the original base; peft's PiSSA
files are read as PiSSA. A `dropout` in a DoRA, VeRA or IA3 file is left out: it belongs
to peft's training. Adapters, BitFit and held LoRAs have no form in peft.

Only safetensors are read or written, never pickle. A setting that would change numbers
and that we do not support is refused by its name.

A save is a transaction: wherever it is killed, `load` finds the old adapter or the new
one, whole, and the next save cleans up. Both new files are written beside the old ones.
From the moment that the new config is named `.adapter_config.json.new` they count, and
`load` prefers them; then they move into place. In between peft finds no config. The
weights' metadata holds a digest of the settings that they belong to, so that two
adapters' files in one folder are refused. Verified against peft 0.21.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import reprlib
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file

from . import dora, ia3, lora, pissa, prefix, prompt, surgery, vera

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def save(model, folder, heads=(), task_type=None):
    """Write the model's adapter as peft does: `PeftModel.from_pretrained` loads it.

    Args:
        model: one that carries LoRA, DoRA, PiSSA, VeRA or IA3, or the wrapper of a
            prompt or prefix.
        folder: where the two files go; made if it is not there.
        heads: names of modules saved whole, such as a new output layer. The
            `classifier`, `score` or `qa_outputs` of a task that has one always goes
            along, as in peft.
        task_type: peft's name for the task, guessed from the model's class if None.

    Raises:
        ValueError: nothing written, for a model without an adapter or with two kinds,
            a parameter that trains and would not be in the file, NaN and infinity, a
            folder without a name, and a head that does not exist, carries the adapter
            or shares its weight.
        OSError: the old adapter, if there was one, is whole.
    """
    surgery.refuse_containers(model)
    folder = _path(folder)
    name = _carried(model)
    method = METHODS[name]
    soft = method.keys is SOFT
    base = model.model if soft else model
    layers = {} if soft else _layers(model, name)

    if task_type is None:
        task_type = _task_that_peft_runs(base)
        heads = [*_names(heads), *_heads_of_task(base, _task(base))]
    else:
        heads = [*_names(heads), *_heads_of_task(base, task_type)]
    if soft:
        task_type = task_type or "FEATURE_EXTRACTION"
    heads = list(dict.fromkeys(heads))
    _check_heads(base, heads, layers, name)
    _refuse_left_out(model, base, name, heads)

    own = pissa.to_lora(model) if name == "PiSSA" else method.module.state_dict(model)
    tensors = {_to_file(key, name, layers): t for key, t in own.items()}
    if name == "VeRA":
        (shared,) = next(iter(layers.values())).frozen
        tensors |= dict(zip(SHARED, (shared.vera_A, shared.vera_B), strict=True))
    front = "base_model." if soft else PREFIX  # peft wraps no layer for a soft prompt
    tensors |= {front + key: t for key, t in _tensors_of(heads, base).items()}
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    for key, t in tensors.items():
        surgery.check_fits(key, t, t.dtype)

    about_base = getattr(base, "config", None)
    config = dict(
        peft_type=method.peft_type,
        task_type=task_type,
        base_model_name_or_path=getattr(about_base, "_name_or_path", None),
        modules_to_save=heads or None,
        inference_mode=True,
    )
    config |= _soft_settings(model, name) if soft else _settings(model, name, layers)
    _write(folder, {key: t.clone() for key, t in tensors.items()}, config)


def load(model, folder):
    """Put the adapter that peft (or `save`) wrote into a folder on `model`.

    As after the method's `add` the base is frozen and the adapter trainable. Heads in
    the file are copied over the model's, which stay frozen; so are the embeddings that
    peft writes where a vocabulary was changed.

    Args:
        model: the plain base.
        folder: the adapter's.

    Returns:
        The model; for a prompt or a prefix, the wrapper around it.

    Raises:
        ValueError: the model unchanged, for a file that is missing, truncated, empty
            or made for another model, for files of two adapters, NaN and infinity, and
            a setting that is out of range or not supported.
    """
    surgery.refuse_containers(model)
    held = vars(model).pop("lora_adapters", None)  # multi_lora's, which wait: no matter
    try:
        return _load(model, _path(folder))
    finally:
        if held is not None:
            model.lora_adapters = held


def _load(model, folder):
    name, config, tensors = _read(folder)
    config = _with_pefts_targets(config, model)
    heads = config["modules_to_save"] or ()

    own, replaced = _sorted(tensors, model, name, heads)
    places = model.state_dict()
    _check_replaced(replaced, places, model, heads)
    for key, t in own.items():
        if not t.is_floating_point():
            raise ValueError(f"{_shown(key)}: {t.dtype} where floats belong")
        surgery.check_fits(_shown(key), t, torch.float32)

    if METHODS[name].keys is SOFT:
        model = _insert_soft(model, name, config, own, folder)
    else:
        model = _insert(model, name, config, own, heads, replaced, folder)
    for key, t in replaced.items():
        places[key].copy_(t)
    return model


# What goes into the file


def _carried(model):
    """The name of the one method that the model carries; ValueError for none or two."""
    kinds = {type(m) for m in model.modules()}
    names = [name for name, method in METHODS.items() if method.layer in kinds]

    files = {method.layer for method in METHODS.values()}
    others = {k.peft_method for k in kinds - files if hasattr(k, "peft_method")}
    names += sorted(others)
    if any("bitfit" in vars(m) for m in model.modules()):
        names.append("BitFit")

    if len(names) != 1 or names[0] not in METHODS:
        what = " and ".join(names) or "no LoRA"
        raise ValueError(
            f"the model carries {what}: a folder holds one adapter, of a kind that peft"
            " can read"
        )
    return names[0]


def _layers(model, name):
    """{path: layer} of the method's layers in the model."""
    kind = METHODS[name].layer
    return {p: m for p, m in model.named_modules() if isinstance(m, kind)}


def _task(base):
    """peft's name for what a class of transformers' does, or None."""
    kind = type(base).__name__
    return next((task for end, task in TASKS.items() if kind.endswith(end)), None)


def _task_that_peft_runs(base):
    """The same, but None for speech and pictures: peft's classes hand on token ids."""
    task = _task(base)
    inputs = inspect.signature(base.forward).parameters.keys()
    if "input_ids" not in inputs:
        return None
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if task == "SEQ_2_SEQ_LM" and (not encodes or inputs & NO_TEXT):
        return None
    return task


def _heads_of_task(base, task):
    """The names of the new layers that peft saves whole for a task, if they exist."""
    if task is not None and not isinstance(task, str):
        raise ValueError(f"task_type must be peft's name of a task, not {_shown(task)}")
    return [head for head in HEADS.get(task, ()) if hasattr(base, head)]


def _names(heads):
    if isinstance(heads, str) or not all(isinstance(head, str) for head in heads):
        raise ValueError(f"heads must be a list of names, not {_shown(heads)}")
    return heads


def _check_heads(base, heads, layers, name):
    """ValueError for a head that does not exist, and one that carries the adapter."""
    missing = set(heads) - {path for path, _ in base.named_modules() if path}
    if missing:
        raise ValueError(f"there is no module {min(missing)!r} to save as a head")
    both = [path for path in layers if _under(path, heads)]
    if both:
        raise ValueError(f"{both[0]} carries {name}: it cannot be in a head as well")


def _refuse_left_out(model, base, name, heads):
    """ValueError for a parameter of the base that trains and would be lost."""
    written = ()
    if base is model:
        written = METHODS[name].module.state_dict(model, keep_vars=True).values()
    ids = {id(p) for p in written}
    for key, p in base.named_parameters():
        if p.requires_grad and id(p) not in ids and not _under(key, heads):
            raise ValueError(
                f"{key} trains and would not be in the file: name its module in heads="
                " or freeze it"
            )


def _settings(model, name, layers):
    """What peft's config says of the method, for the layers in the model."""
    layer = next(iter(layers.values()))
    kinds = {getattr(m.base, "kind", type(m.base)) for m in layers.values()}
    config = dict(
        target_modules=_shortest(model, layers),
        fan_in_fan_out=any(k.__name__ == "Conv1D" for k in kinds),  # packed ones too
    )

    if name == "IA3":
        return config | _sides(model, layers)
    if name == "VeRA":
        config |= dict(r=len(layer.vera_d), bias="none")
        return config | dict(projection_prng_key=layer.seed, save_projection=True)

    pissa_rank = 2 * layer.r  # as a LoRA whose scaling is 1
    return config | dict(
        r=pissa_rank if name == "PiSSA" else layer.r,
        lora_alpha=pissa_rank if name == "PiSSA" else layer.alpha,
        lora_dropout=getattr(getattr(layer, "dropout", None), "p", 0.0),
        bias=getattr(layer, "bias_mode", "none"),
        use_rslora=getattr(layer, "rslora", False),
        use_dora=name == "DoRA",
        init_lora_weights=True,
    )


def _sides(model, layers):
    """IA3's targets, and which of them are rescaled on the input side."""
    inputs = {p: m for p, m in layers.items() if m.feedforward}
    outputs = {p: m for p, m in layers.items() if not m.feedforward}
    parts = [_shortest(model, some) for some in (outputs, inputs) if some]

    suffixes = all(isinstance(part, list) for part in parts)
    if suffixes and inputs:  # peft wants no dot before such a suffix
        suffixes = not any(path.endswith(tuple(parts[-1])) for path in outputs)
    if not suffixes:
        return dict(
            target_modules="|".join(re.escape(path) for path in layers),
            feedforward_modules="|".join(re.escape(path) for path in inputs) or [],
        )
    return dict(
        target_modules=sorted(sum(parts, [])),
        feedforward_modules=parts[-1] if inputs else [],
    )


def _soft_settings(wrapper, name):
    """What peft's config says of a prompt or a prefix."""
    about = wrapper.config.to_dict()
    settings = {}
    for setting, names in SIZES.items():
        sizes = [about[key] for key in names if key in about]
        settings[setting] = sizes[0] if sizes else None

    if name == "prefix":  # under grouped-query attention peft counts key-value heads
        layers, heads, size = wrapper.sizes
        settings |= dict(num_layers=layers, num_attention_heads=heads)
        settings |= dict(token_dim=heads * size, encoder_hidden_size=heads * size)
        twice = wrapper.config.is_encoder_decoder
    else:
        settings |= dict(token_dim=wrapper.prompt_embeddings.shape[1])
        twice = wrapper.decoder
    settings |= dict(num_virtual_tokens=wrapper.n)
    return settings | dict(num_transformer_submodules=2 if twice else 1)


# What comes out of it


def _sorted(tensors, model, name, heads):
    """The file's tensors by our names: the adapter's, and those that replace others.

    What peft writes besides is left out: copies of a head's biases with bias="all", a
    tied bias by its second name, and weights of the base that are the model's already.
    """
    names = {key for key, _ in model.named_parameters()}
    second_names = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    second_names -= names
    places = model.state_dict()
    embeddings = _embeddings(model)

    own = {}
    replaced = {}
    for key, t in tensors.items():
        plain = _from_file(key, name)
        is_weight = plain.endswith(".weight") and plain in places
        if re.search(r"\.(original_module|modules_to_save)\.", plain):
            continue
        if _under(plain, heads):
            replaced[plain] = t
        elif is_weight and plain in embeddings:
            replaced[plain] = t
        elif is_weight and torch.equal(places[plain], t.to(places[plain])):
            continue
        elif plain not in second_names:
            own[plain] = t
    return own, replaced


def _embeddings(model):
    """The names of the weights that belong to the vocabulary."""
    ends = [
        getattr(model, f"get_{side}_embeddings", lambda: None)()
        for side in ("input", "output")
    ]
    layers = [m for m in ends if m is not None]
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.weight" for path, m in modules if any(m is e for e in layers)}


def _check_replaced(replaced, places, model, heads):
    """ValueError for tensors that cannot be copied over the model's."""
    inside = _tensors_of(heads, model).keys()
    asked = {key for key in replaced if _under(key, heads)}
    for key in sorted(inside ^ asked):
        where = "the file" if key in asked else "the model"
        raise ValueError(
            f"made for another model: the head's {_shown(key)} is only in {where}"
        )

    storages = {}
    for key, t in replaced.items():
        place = places[key]
        if t.shape != place.shape:
            sizes = f"{tuple(t.shape)} in the file, {tuple(place.shape)} in the model"
            hint = ""
            if key in _embeddings(model):
                hint = ": resize_token_embeddings gives it the file's vocabulary"
            raise ValueError(f"made for another model: {key} is {sizes}{hint}")
        if _kind(t) != _kind(place):
            raise ValueError(f"{key}: {t.dtype} in the file, {place.dtype} here")
        surgery.check_fits(key, t, place.dtype)

        twin = storages.setdefault(place.data_ptr() or key, key)
        if not torch.equal(replaced[twin], t):
            raise ValueError(
                f"{twin} and {key} are tied in the model and differ in the file: untie"
                " them first"
            )


def _kind(t):
    return t.is_floating_point(), t.is_complex()


def _insert_soft(model, name, config, tensors, folder):
    """The wrapper of a prompt or prefix around the model, with the file's tensor."""
    n = config["num_virtual_tokens"]
    rows = tensors.get("prompt_embeddings")
    if rows is None or rows.dim() != 2:
        raise ValueError(f"{folder} holds no {name} tensors: the adapter is empty")
    if len(rows) not in (n, 2 * n):
        raise ValueError(f"made for another model: num_virtual_tokens={n} is not so")

    module = METHODS[name].module
    twice = name == "prompt" and len(rows) == 2 * n
    trained = {p: p.requires_grad for p in model.parameters()}
    try:
        more = dict(decoder=True) if twice else {}
        wrapper = module.add(model, n, **more)
        module.load_state_dict(wrapper, tensors)
    except ValueError as error:
        for p, flag in trained.items():
            p.requires_grad_(flag)
        raise _made_for_another(error) from None
    return wrapper


def _insert(model, name, config, tensors, heads, replaced, folder):
    """The method's layers put into the model, with the file's tensors in them."""
    surgery.refuse_carried(model)
    paths = _adapted(tensors, name)
    if not paths:
        raise ValueError(f"{folder} holds no {name} tensors: the adapter is empty")
    _check_paths(model, config, paths, heads)
    shared = {key[-6:]: tensors.pop(key) for key in SHARED if key in tensors}
    narrow = [t for key, t in tensors.items() if key.endswith((".lora_A", ".vera_d"))]
    if any(t.shape[:1] != (config["r"],) for t in narrow):
        raise ValueError(f"made for another model: r={config['r']} is not the file's")

    trained = {p: p.requires_grad for p in model.parameters()}
    weights = {m: m.weight for p, m in model.named_modules() if p in paths}
    _add(model, name, config, paths)

    module = METHODS[name].module
    layers = _layers(model, name)
    own = module.state_dict(model)
    for key in replaced.keys() & own.keys():  # bias="all" trains a head's biases too
        tensors[key] = replaced[key]
    try:
        _check_biases(own, tensors)
        if shared:
            _load_shared(layers, shared)
        module.load_state_dict(model, tensors)
    except ValueError as error:
        surgery.swap(model, {m: m.base for m in layers.values()})
        for m, weight in weights.items():  # PiSSA changes the weights themselves
            m.weight = weight
        for p, flag in trained.items():
            p.requires_grad_(flag)
        raise _made_for_another(error) from None

    if name == "PiSSA":  # our formula has no scaling: it goes into B
        for m in layers.values():
            m.lora_B.data *= _scaling(config)
    return model


def _check_biases(own, tensors):
    biases = {key for key in own if key.endswith("bias")}
    if biases and not biases & tensors.keys():
        raise ValueError(
            "its config says that biases are trained and the file holds none (peft"
            " before 0.21 leaves them out)"
        )


def _made_for_another(error):
    return ValueError(f"made for another model: {_shown(str(error))[1:-1]}")


def _adapted(tensors, name):
    """The paths of the layers that a file's tensors belong to, sorted."""
    ends = tuple(f".{leaf}" for leaf in METHODS[name].keys)
    return sorted({key.rpartition(".")[0] for key in tensors if key.endswith(ends)})


def _check_paths(model, config, paths, heads):
    """ValueError unless the config selects just the linear layers `paths`."""
    selected = _selected(model, config, heads)
    modules = dict(model.named_modules())
    for path in sorted(selected | set(paths)):
        m = modules.get(path)
        if m is not None and surgery.shape(m) is None:
            kind = type(m).__name__
            raise ValueError(f"{path} is a {kind}: only linear layers are supported")
    for path in sorted(selected ^ set(paths)):
        where = "the file" if path in paths else "the model"
        raise ValueError(
            f"made for another model: {_shown(path)} is only in {where}, by"
            f" target_modules={_shown(config['target_modules'])}"
        )


def _add(model, name, config, paths):
    """The method's own `add`, with the settings of a peft config."""
    targets = surgery.Exactly(paths)
    if name == "LoRA":
        settings = [config[key] for key in ("r", "lora_alpha", "lora_dropout", "bias")]
        return lora.add(model, targets, *settings, bool(config["use_rslora"]))
    if name == "DoRA":
        alpha = config["lora_alpha"]
        if config["use_rslora"]:
            alpha = _scaling(config) * config["r"]
        return dora.add(model, targets, config["r"], alpha)
    if name == "PiSSA":
        return pissa.add(model, targets, config["r"])
    if name == "VeRA":
        return vera.add(model, targets, config["r"], config["projection_prng_key"])
    inputs = _feedforward(paths, config["feedforward_modules"])
    return ia3.add(model, targets, surgery.Exactly(inputs))


def _scaling(config):
    """alpha / r, or with rsLoRA alpha / sqrt(r)."""
    r = config["r"]
    return config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)


def _load_shared(layers, tensors):
    """Copy a file's shared A and B over VeRA's, where the file has them."""
    (shared,) = next(iter(layers.values())).frozen
    for name, t in tensors.items():
        if t.shape != getattr(shared, name).shape:
            raise ValueError(f"the shared {name} has another shape")
    for name, t in tensors.items():
        getattr(shared, name).data.copy_(t)


# Names


class Method(NamedTuple):
    """One method's names, here and in peft's files: a row of METHODS."""

    module: object  # the reference file
    layer: type  # what it puts into a model, or around one
    peft_type: str
    keys: dict  # {a tensor's name here: its name in the file}


AB = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
ABM = {**AB, "dora_m": "lora_magnitude_vector"}
DB = {"vera_d": "vera_lambda_d", "vera_b": "vera_lambda_b"}
SOFT = {"prompt_embeddings": "prompt_embeddings"}
METHODS = {
    "LoRA": Method(lora, lora.LoRALinear, "LORA", AB),
    "DoRA": Method(dora, dora.DoRALinear, "LORA", ABM),
    "PiSSA": Method(pissa, pissa.PiSSALinear, "LORA", AB),
    "VeRA": Method(vera, vera.VeRALinear, "VERA", DB),
    "IA3": Method(ia3, ia3.IA3Linear, "IA3", {"ia3_l": "ia3_l"}),
    "prompt": Method(prompt, prompt.PromptModel, "PROMPT_TUNING", SOFT),
    "prefix": Method(prefix, prefix.PrefixModel, "PREFIX_TUNING", SOFT),
}
PREFIX = "base_model.model."
SHARED = ("base_model.vera_A", "base_model.vera_B")
WITH_ADAPTERS_NAME = re.compile(  # lora_A.default.weight; not lora_A.weight
    r"\.(?:lora_[AB]|lora_magnitude_vector|vera_lambda_[bd]|ia3_l)"
    r"\.(?!weight$|bias$)(\w+)|^(?:base_model\.)?prompt_encoder\.(\w+)"
)
TASKS = {  # how a class's name ends, and peft's name for its task
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "MTModel": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
NO_TEXT = {"pixel_values", "input_features", "input_values", "flattened_patches"}
HEADS = {  # the new layers that peft trains and saves whole, whether asked to or not
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _to_file(key, name, layers):
    """The name in peft's file of a tensor of the method's state dict: METHODS."""
    owner, _, leaf = key.rpartition(".")
    keys = METHODS[name].keys
    if not owner:
        return keys[leaf]
    if leaf in keys:
        return f"{PREFIX}{owner}.{keys[leaf]}"
    return PREFIX + (f"{owner}.base_layer.{leaf}" if owner in layers else key)


def _from_file(key, name):
    """The other way round: our name of a tensor in peft's file."""
    if key in SHARED:
        return key
    keys = METHODS[name].keys
    plain = key.removeprefix("base_model." if keys is SOFT else PREFIX)
    plain = re.sub(r"\.base_layer\.(bias|weight)$", r".\1", plain)
    for ours, theirs in keys.items():
        if plain.endswith(f".{theirs}"):
            return f"{plain.removesuffix(theirs)}{ours}"
    return plain


def _under(path, names):
    """Whether `path` is, as peft sees it, one of the modules `names` or inside one.

    It looks at how a path ends: "classifier" is DistilBERT's `pre_classifier` too.
    """
    ends = tuple(names)
    parts = path.split(".")
    outer = [".".join(parts[: k + 1]) for k in range(len(parts))]
    return any(path.endswith(ends) for path in outer)


def _tensors_of(heads, model):
    """{name: tensor} of all that is in the heads; ValueError for a tied weight."""
    state = model.state_dict()
    inside = {name: t for name, t in state.items() if _under(name, heads)}
    outside = {t.data_ptr(): n for n, t in state.items() if n not in inside}
    for name, t in inside.items():
        twin = outside.get(t.data_ptr() or name)  # 0 without memory
        if twin is not None:  # peft would untie them
            raise ValueError(f"{name} is tied to {twin}: it cannot be in a head")
    return inside


def _selected(model, config, heads):
    """The paths of the modules that a peft config selects."""
    paths = {path: m for path, m in model.named_modules() if path}
    if config["target_modules"] == "all-linear":
        linears = surgery.select(model, "all-linear")
        chosen = {path for path, m in paths.items() if m in linears}
    else:
        chosen = _named(paths, config["target_modules"])
    inside = {path for path in chosen if _under(path, heads)}
    return chosen - inside - _named(paths, config["exclude_modules"])


def _named(paths, names, dot="."):
    """The paths that an expression matches, or that end in a name of a list."""
    if isinstance(names, str):
        try:
            return {path for path in paths if re.fullmatch(names, path)}
        except (re.error, OverflowError, RecursionError):
            raise ValueError(f"{_shown(names)} is no regular expression") from None
    ends = tuple(f"{dot}{name}" for name in names or ())
    return {path for path in paths if f"{dot}{path}".endswith(ends)}


def _feedforward(paths, names):
    """Which targets of IA3 are rescaled on the input side: "proj" is "q_proj" too."""
    return sorted(_named(paths, names, dot=""))


def _shortest(model, layers):
    """The shortest suffixes that select just these layers, or a regular expression."""
    inside = tuple(f"{path}." for path in layers)
    paths = [p for p, _ in model.named_modules() if p and not p.startswith(inside)]
    suffixes = set()
    for path in layers:
        parts = path.split(".")
        ends = [".".join(parts[-k:]) for k in range(1, len(parts) + 1)]
        fitting = [end for end in ends if _named(paths, [end]) <= layers.keys()]
        if not fitting:
            return "|".join(re.escape(path) for path in layers)
        suffixes.add(fitting[0])
    return sorted(suffixes)


# Settings


COMMON = dict(target_modules=None, exclude_modules=None, modules_to_save=None)
DEFAULTS = {  # what load acts on, and peft's values where a file is silent
    "LORA": dict(
        COMMON,
        r=8,
        lora_alpha=8,
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
    ),
    "VERA": dict(COMMON, r=256, projection_prng_key=0, save_projection=True),
    "IA3": dict(COMMON, feedforward_modules=None),
    "PROMPT_TUNING": dict(COMMON, num_virtual_tokens=None),
    "PREFIX_TUNING": dict(COMMON, num_virtual_tokens=None),
}
HARMLESS = {  # what says nothing about the numbers of a finished adapter
    "": "auto_mapping base_model_name_or_path inference_mode peft_type peft_version"
    " revision task_type",
    "LORA": "ensure_weight_tying eva_config fan_in_fan_out layers_pattern loftq_config"
    " megatron_core qalora_group_size runtime_config",
    "VERA": "d_initial fan_in_fan_out init_weights layers_pattern vera_dropout",
    "IA3": "fan_in_fan_out init_ia3_weights",
    "PROMPT_TUNING": "num_attention_heads num_layers num_transformer_submodules"
    " prompt_tuning_init prompt_tuning_init_text token_dim tokenizer_kwargs"
    " tokenizer_name_or_path",
    "PREFIX_TUNING": "encoder_hidden_size init_weights num_attention_heads num_layers"
    " num_transformer_submodules prefix_projection token_dim",
}
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to start
SIZES = {  # the same sizes by the names that models give them
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "num_heads", "n_head", "n_heads"),
}


def _is_whole(value):
    return type(value) is int and 0 < value < 2**31


def _is_seed(value):
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value):
    return type(value) in (int, float) and 0 < value < 1e300


def _is_share(value):
    return type(value) in (int, float) and 0 <= value < 1


def _is_flag(value):
    return value is None or type(value) is bool


def _is_bias(value):
    return value in ("none", "all", "lora_only")


def _is_list(value):
    names = [] if value is None else value
    return isinstance(names, list) and all(isinstance(n, str) and n for n in names)


def _is_names(value):
    return isinstance(value, str) or _is_list(value)


KINDS = {  # what a setting may be
    "r": (_is_whole, "a whole number of at least 1"),
    "num_virtual_tokens": (_is_whole, "a whole number of at least 1"),
    "projection_prng_key": (_is_seed, "a whole number of at least 0"),
    "lora_alpha": (_is_positive, "a positive number"),
    "lora_dropout": (_is_share, "at least 0 and below 1"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "save_projection": (_is_flag, "true or false"),
    "bias": (_is_bias, "none, all or lora_only"),
    "modules_to_save": (_is_list, "a list of names"),
    "target_modules": (_is_names, "a list of names or a regular expression"),
    "exclude_modules": (_is_names, "a list of names or a regular expression"),
    "feedforward_modules": (_is_names, "a list of names or a regular expression"),
}


def _checked(config, folder):
    """The config with peft's defaults; ValueError for what is not supported."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise ValueError(f"{folder} holds peft_type {_shown(kind)}, not one of {known}")

    harmless = f"{HARMLESS['']} {HARMLESS[kind]}".split()
    for setting, value in config.items():
        unset = value is None or value is False or value in ([], {}, "none")
        if not unset and setting not in DEFAULTS[kind] and setting not in harmless:
            what = f"{_shown(setting)[1:-1]}={_shown(value)}"
            raise ValueError(f"the setting {what} is not supported")

    config = {**DEFAULTS[kind], **config}
    for setting in DEFAULTS[kind].keys() & KINDS.keys():
        fits, words = KINDS[setting]
        if not fits(config[setting]):
            raise ValueError(
                f"{setting} must be {words}, not {_shown(config[setting])}"
            )
    return config


def _method_of(config):
    """Which of METHODS a config speaks of; ValueError for what would change numbers."""
    kind = config["peft_type"]
    if kind != "LORA":
        return next(name for name, m in METHODS.items() if m.peft_type == kind)

    start = config["init_lora_weights"]
    split = start == "pissa" and not config["use_dora"]
    if start not in KEEP_THE_BASE and not split:
        raise ValueError(
            f"init_lora_weights={_shown(start)} changes the base: not supported"
        )
    if (config["use_dora"] or split) and config["bias"] != "none":
        raise ValueError(f"bias={config['bias']!r} is supported for plain LoRA only")
    if config["use_dora"]:
        return "DoRA"
    return "PiSSA" if split else "LoRA"


def _with_pefts_targets(config, model):
    """The config with the names that peft takes for a type of model where it has none.

    peft writes the names that it took, so only files made by hand come here.
    """
    for setting in ("target_modules", "feedforward_modules"):
        if setting not in config or config[setting] is not None:
            continue
        if config["peft_type"] not in ("LORA", "VERA", "IA3"):
            continue  # a soft prompt has no targets

        kind = getattr(getattr(model, "config", None), "model_type", None)
        table = (
            f"TRANSFORMERS_MODELS_TO_{config['peft_type']}_{setting.upper()}_MAPPING"
        )
        try:
            from peft.utils import constants  # only here: peft takes seconds
        except ImportError:
            constants = None
        names = getattr(constants, table, {}).get(kind)
        if names is None:
            raise ValueError(
                f"the file names no {setting}, and peft has none for {kind}"
            )
        config = {**config, setting: list(names)}
    return config


def _digest(config):
    """A digest of the settings that `load` acts on."""
    defaults = DEFAULTS[config["peft_type"]]
    settings = {key: config.get(key, value) for key, value in defaults.items()}
    for key, value in settings.items():
        settings[key] = sorted(value) if isinstance(value, list) else value
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# Files


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DRAFTS = ".adapter_drafts"
LARGEST_CONFIG = 10_000_000  # bytes
TRIES = 200  # a folder that is always being written to is refused after so many
ONE_SAVE = threading.Lock()  # where the system has no locks on folders
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 160
SHORT.maxlong = 40


def _shown(value):
    """A value of a file as a message shows it: short, without control characters."""
    return SHORT.repr(value)


def _path(folder):
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"the folder must be a path, not {_shown(folder)}")
    if not str(folder).strip():
        raise ValueError("name a folder for the adapter: this name is empty")
    return Path(folder)


def _read(folder):
    """The method's name, the config with peft's defaults, and the tensors, checked."""
    config, tensors, metadata = _read_files(folder)
    config = _checked(config, folder)
    name = _method_of(config)
    if metadata.get("settings") not in (None, _digest(config)):
        raise ValueError(
            f"{folder} holds one adapter's weights and another's config, or one that"
            " was changed afterwards: save it again"
        )

    for key in tensors:
        if "lora_embedding_" in key:
            raise ValueError(f"LoRA on an embedding is not supported: {_shown(key)}")
        match = WITH_ADAPTERS_NAME.search(key)
        if match:
            raise ValueError(
                f"{_shown(key)} has the adapter's name {match[1] or match[2]!r} in it,"
                " as in a whole peft model's state dict: save_pretrained leaves it out"
            )
    return name, config, tensors


def _read_files(folder):
    """The config, the tensors and their metadata, all of one and the same save."""
    for _ in range(TRIES):
        before = _identities(folder)
        failure = None
        try:
            contents = _read_once(folder, before)
        except ValueError as error:
            failure = error
        if _identities(folder) == before:
            if failure is not None:
                raise failure
            return contents
        time.sleep(0.001)
    raise ValueError(f"{folder} is being written to all the time: try again later")


def _identities(folder):
    """{path: what changes when another file takes it, None without one}."""
    paths = [folder / CONFIG, folder / WEIGHTS]
    paths += [_beside(path, "new") for path in paths]
    identities = {}
    for path in paths:
        try:
            about = os.stat(path)
        except OSError:
            identities[path] = None
        else:
            times = about.st_mtime_ns, about.st_ctime_ns
            identities[path] = (about.st_ino, about.st_size, about.st_mode, *times)
    return identities


def _read_once(folder, identities):
    config = folder / CONFIG
    weights = folder / WEIGHTS
    if identities[_beside(config, "new")]:  # of a save that is moving, or was killed
        config = _beside(config, "new")
        if identities[_beside(weights, "new")]:
            weights = _beside(weights, "new")

    for path, name in ((config, CONFIG), (weights, WEIGHTS)):
        if identities[path] is None:
            pickle = (folder / "adapter_model.bin").exists()
            note = ", only a pickle" if pickle else ""
            raise ValueError(f"{folder} is no adapter folder: no {name}{note}")
        if not stat.S_ISREG(identities[path][2]):
            raise ValueError(f"{path} is no plain file")
    if identities[config][1] > LARGEST_CONFIG:
        raise ValueError(f"{config} is no config: it has {identities[config][1]} bytes")

    try:
        settings = json.loads(config.read_text(encoding="utf8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{config} is not valid JSON") from None
    except OSError as error:
        raise ValueError(f"{config} cannot be read: {error.strerror}") from None
    try:
        with safetensors.safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
        return settings, load_file(weights), metadata
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        what = _shown(str(error))[1:-1]
        raise ValueError(f"{weights} is truncated or damaged: {what}") from None


def _write(folder, tensors, config):
    """Write both files as one transaction."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        path = folder / name
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no plain file: it stays")
    drafts = folder / DRAFTS  # a folder: safetensors has a temporary file of its own
    weights = drafts / WEIGHTS

    with _alone_in(folder):
        _move_into_place(folder)  # what a save that was killed has left
        try:
            drafts.mkdir()
            metadata = {"format": "pt", "settings": _digest(config)}
            save_file(tensors, weights, metadata)
            _order_metadata(weights, metadata)
            text = json.dumps(config, indent=2) + "\n"
            (drafts / CONFIG).write_text(text, encoding="utf8")
            for name in (WEIGHTS, CONFIG):  # with the config the new adapter counts
                _sync(drafts / name)
                os.replace(drafts / name, _beside(folder / name, "new"))
            _move_into_place(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                _take_back(folder)
            raise


def _move_into_place(folder):
    """Finish a save whose new adapter counts, and remove what else lies about."""
    config = folder / CONFIG
    weights = folder / WEIGHTS
    if _beside(config, "new").exists():
        if config.exists():  # no config while the weights change: peft must not mix
            os.replace(config, _beside(config, "old"))
        if _beside(weights, "new").exists():
            if weights.exists():
                os.replace(weights, _beside(weights, "old"))
            os.replace(_beside(weights, "new"), weights)
        os.replace(_beside(config, "new"), config)
        _sync_folder(folder)
    _clean(folder)


def _take_back(folder):
    """Put the old adapter back after an error; the new one counts until the last."""
    config = folder / CONFIG
    weights = folder / WEIGHTS
    if _beside(config, "new").exists():
        if not _beside(weights, "new").exists():
            os.replace(weights, _beside(weights, "new"))
        for path in (weights, config):
            if _beside(path, "old").exists():
                os.replace(_beside(path, "old"), path)
        _beside(config, "new").unlink()
    _clean(folder)


def _clean(folder):
    for name in (CONFIG, WEIGHTS):
        for what in ("new", "old"):
            _beside(folder / name, what).unlink(missing_ok=True)
    shutil.rmtree(folder / DRAFTS, ignore_errors=True)


def _beside(path, what):
    return path.with_name(f".{path.name}.{what}")


@contextlib.contextmanager
def _alone_in(folder):
    """One save at a time: other threads and processes wait for the folder."""
    if fcntl is None:
        with ONE_SAVE:
            yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)  # and a killed process gives its lock back


def _order_metadata(path, metadata):
    """Give the metadata one order, for equal bytes: safetensors writes any."""
    items = [f'"{key}":"{value}"'.encode() for key, value in metadata.items()]
    with open(path, "r+b") as file:
        start = file.read(1000)
        file.seek(0)
        file.write(start.replace(b",".join(items[::-1]), b",".join(items), 1))


def _sync(path):
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder):
    if fcntl is not None:
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(lock)
        os.close(lock)
