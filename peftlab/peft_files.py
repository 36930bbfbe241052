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
| a head that goes along | its own | its own | its own |

A PiSSA is written as a LoRA of twice the rank that fits the original base; peft's own
PiSSA files are read as PiSSA. A `dropout` in a DoRA, VeRA or IA3 file is left out: it
belongs to peft's training. Adapters, BitFit and held LoRAs have no form in peft.

`packed_state_dict` and `load_packed` are for weights in 4 bits (`nf4.NF4Linear`), under
the names that bitsandbytes gives them and transformers finds in a checkpoint:

| `nf4.NF4Linear` at `path` | bitsandbytes | shape |
|---|---|---|
| `codes` | `path.weight` | (out in / 2, 1) |
| `absmax` | `path.weight.absmax` | (blocks,) |
| `code` | `path.weight.quant_map` | (16,) |
| `nested_absmax` | `path.weight.nested_absmax` | (blocks / 256,) |
| the 8-bit dynamic type | `path.weight.nested_quant_map` | (256,) |
| all else | `path.weight.quant_state.bitsandbytes__nf4` | JSON |

Only safetensors are read or written, never pickle. A setting that would change numbers
and that we do not support is refused by its name. Files are written beside their target
and renamed: a crash leaves the old adapter, or none, never a mix. Held against peft
0.21.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftlab import dora, ia3, lora, nf4, pissa, prefix, prompt, surgery, vera


class Method(NamedTuple):
    """One method's names, here and in peft's files: a row of METHODS."""

    module: object  # the reference file
    layer: type  # what it puts into a model, or around one
    peft_type: str
    keys: dict  # {a tensor's name here: its name in the file}


AB = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
SOFT = {"prompt_embeddings": "prompt_embeddings"}
METHODS = {
    "LoRA": Method(lora, lora.LoRALinear, "LORA", AB),
    "DoRA": Method(
        dora, dora.DoRALinear, "LORA", {**AB, "dora_m": "lora_magnitude_vector"}
    ),
    "PiSSA": Method(pissa, pissa.PiSSALinear, "LORA", AB),
    "VeRA": Method(
        vera,
        vera.VeRALinear,
        "VERA",
        {"vera_d": "vera_lambda_d", "vera_b": "vera_lambda_b"},
    ),
    "IA3": Method(ia3, ia3.IA3Linear, "IA3", {"ia3_l": "ia3_l"}),
    "prompt": Method(prompt, prompt.PromptModel, "PROMPT_TUNING", SOFT),
    "prefix": Method(prefix, prefix.PrefixModel, "PREFIX_TUNING", SOFT),
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SHARED = ("base_model.vera_A", "base_model.vera_B")
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
TASKS = {  # how a class's name ends, and peft's name for its task
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "MTModel": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
HEADS = {  # the new layers that peft trains and saves whole, whether asked to or not
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def save(model, folder, heads=(), task_type=None):
    """Write the model's adapter as peft does: `PeftModel.from_pretrained` loads it.

    model: one that carries LoRA, DoRA, PiSSA, VeRA or IA3, or the wrapper of a prompt
    or prefix. heads: names of modules saved whole, such as a new output layer; the
    `classifier`, `score` or `qa_outputs` of a task that has one always goes along, as
    in peft. task_type: peft's name for the task, guessed from the model's class if
    None. Raises ValueError, with nothing written, for a model without an adapter or
    with two kinds, a folder without a name, and a head that does not exist, carries the
    adapter or shares its weight."""
    name = _carried(model)
    base, soft = (model.model, True) if name in ("prompt", "prefix") else (model, False)
    tensors, layers = METHODS[name].module.state_dict(model), _layers(base, name)
    tensors = pissa.to_lora(model) if name == "PiSSA" else tensors
    if not str(folder).strip():
        raise ValueError("name a folder to write the adapter to: this name is empty")
    if task_type is None:
        ends = (t for end, t in TASKS.items() if type(base).__name__.endswith(end))
        task_type = next(ends, "FEATURE_EXTRACTION" if soft else None)
    heads = [*heads, *(h for h in HEADS.get(task_type, ()) if hasattr(base, h))]
    heads = list(dict.fromkeys(heads))
    if missing := set(heads) - {path for path, _ in base.named_modules() if path}:
        raise ValueError(f"there is no module {min(missing)!r} to save as a head")
    if both := [path for path in layers if _under(path, heads)]:
        raise ValueError(f"{both[0]} carries {name}: it cannot be in a head as well")
    own = {_to_file(n, name, layers): t for n, t in tensors.items()}
    if name == "VeRA":
        one = next(iter(layers.values()))
        own |= dict(zip(SHARED, (one.vera_A, one.vera_B), strict=True))
    front = "base_model." if soft else PREFIX  # peft wraps no layer for a soft prompt
    own |= {front + n: t for n, t in _tensors_of(heads, base).items()}
    own = {n: t.detach().cpu().clone().contiguous() for n, t in own.items()}
    config = dict(
        peft_type=METHODS[name].peft_type,
        task_type=task_type,
        base_model_name_or_path=getattr(
            getattr(base, "config", None), "_name_or_path", None
        ),
        modules_to_save=heads or None,
        inference_mode=True,
    )
    config |= _soft_settings(model, name) if soft else _settings(model, name, layers)
    _write(Path(folder), own, json.dumps(config, indent=2) + "\n")


def load(model, folder):
    """Put the adapter that peft (or `save`) wrote into a folder on `model`.

    Returns the model; for a prompt or a prefix, the wrapper around it. As after the
    method's `add` the base is frozen and the adapter trainable; heads in the file are
    copied over the model's, which stay frozen. Raises ValueError, with the model
    unchanged, for a file that is missing, truncated, empty or made for another model,
    and for a setting that is not supported."""
    name, config, tensors = _read(Path(folder))
    heads, found = config["modules_to_save"] or (), {}
    kept, there = {n for n, _ in model.named_parameters()}, model.state_dict()
    twins = {n for n, _ in model.named_parameters(remove_duplicate=False)} - kept
    for key, t in tensors.items():
        plain = _from_file(key, name)
        # peft also writes a tied bias by its second name, and a vocabulary's weights.
        same = plain.endswith(".weight") and plain in there
        same = same and torch.equal(there[plain], t.to(there[plain]))
        if (same or plain in twins) and not _under(plain, heads):
            continue
        # With bias="all" peft adds copies of a head's biases, the untrained ones too.
        if not re.search(r"\.(original_module|modules_to_save)\.", plain):
            found[plain] = t
    there = _tensors_of(heads, model)
    new = {n: t for n, t in found.items() if _under(n, heads)}
    for n in sorted(there.keys() ^ new.keys()):
        where = "the file" if n in new else "the model"
        raise ValueError(f"made for another model: the head's {n} is only in {where}")
    for n, t in new.items():
        if t.shape != there[n].shape:
            raise ValueError(f"made for another model: the head's {n} does not fit")
    soft = name in ("prompt", "prefix")
    insert = _insert_soft if soft else _insert
    model = insert(model, name, config, found, new, folder)
    for n, t in new.items():
        there[n].copy_(t)
    return model


def _insert_soft(model, name, config, found, heads, folder):
    """The wrapper of a prompt or prefix around the model, with the file's tensor."""
    own = {n: t for n, t in found.items() if n not in heads}
    n, rows = config["num_virtual_tokens"], own.get("prompt_embeddings")
    if rows is None or rows.dim() != 2:
        raise ValueError(f"{folder} holds no {name} tensors: the adapter is empty")
    if type(n) is not int or len(rows) not in (n, 2 * n):
        raise ValueError(f"made for another model: num_virtual_tokens={n!r}")
    trained = {p: p.requires_grad for p in model.parameters()}
    twice = dict(decoder=True) if name == "prompt" and len(rows) == 2 * n else {}
    try:
        wrapper = METHODS[name].module.add(model, n, **twice)
        METHODS[name].module.load_state_dict(wrapper, own)
    except ValueError as error:
        for p, was in trained.items():
            p.requires_grad_(was)
        raise ValueError(f"made for another model: {error}") from None
    return wrapper


def _insert(model, name, config, found, heads, folder):
    """The method's layers put into the model, with the file's tensors in them."""
    method = METHODS[name]
    ends = tuple(f".{leaf}" for leaf in method.keys)
    paths = {n.rpartition(".")[0] for n in found if n.endswith(ends)}
    if not paths:
        raise ValueError(f"{folder} holds no {name} tensors: the adapter is empty")
    if strange := sorted(paths ^ _selected(model, config)):
        where = "the file" if strange[0] in paths else "the model"
        raise ValueError(f"made for another model: {strange[0]} is only in {where}")
    shared = {key[-6:]: found.pop(key) for key in SHARED if key in found}
    narrow = [t for n, t in found.items() if n.endswith((".lora_A", ".vera_d"))]
    if any(t.shape[:1] != (config["r"],) for t in narrow):
        raise ValueError(f"made for another model: r={config['r']!r} is not the file's")
    if config["peft_type"] == "LORA":
        _scaling(config)  # raises before anything changes
    trained = {p: p.requires_grad for p in model.parameters()}
    split = paths if name == "PiSSA" else ()  # PiSSA changes the weights themselves
    weights = {m: m.weight for p, m in model.named_modules() if p in split}
    _add(model, name, config, sorted(paths))
    own, layers = method.module.state_dict(model), _layers(model, name)
    biases = heads.keys() & own.keys()  # bias="all" trains a head's too
    try:
        mine = {n: t for n, t in found.items() if n not in heads or n in biases}
        _load_shared(layers, shared)
        method.module.load_state_dict(model, mine)
        if name == "PiSSA":  # our formula has no scaling: it goes into B
            for m in layers.values():
                m.lora_B.data *= _scaling(config)
    except ValueError as error:
        surgery.swap(model, {m: m.base for m in layers.values()})
        for m, weight in weights.items():
            m.weight = weight
        for p, was in trained.items():
            p.requires_grad_(was)
        raise ValueError(f"made for another model: {error}") from None
    return model


def _add(model, name, config, paths):
    """The method's own `add`, with the settings of a peft config."""
    if name == "LoRA":
        settings = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora")
        return lora.add(model, paths, *(config[k] for k in settings))
    if name == "DoRA":
        alpha = _scaling(config) * config["r"]  # with rsLoRA not what the file says
        alpha = alpha if config["use_rslora"] else config["lora_alpha"]
        return dora.add(model, paths, config["r"], alpha)
    if name == "PiSSA":
        return pissa.add(model, paths, config["r"])
    if name == "VeRA":
        return vera.add(model, paths, config["r"], config["projection_prng_key"])
    inputs = _named(dict.fromkeys(paths), config["feedforward_modules"])
    return ia3.add(model, paths, sorted(inputs))


def _scaling(config):
    """alpha / r, or with rsLoRA alpha / sqrt(r); ValueError where that is no number."""
    r, alpha = config["r"], config["lora_alpha"]
    whole = type(r) is int and r > 0 and isinstance(alpha, int | float)
    if not whole or not 0 < alpha < 1e300:
        raise ValueError(f"r={r!r} and lora_alpha={alpha!r} give no scaling")
    return alpha / math.sqrt(r) if config["use_rslora"] else alpha / r


def _load_shared(layers, tensors):
    """Copy a file's shared A and B over VeRA's, where the file has them."""
    one = next(iter(layers.values()))
    for name, t in tensors.items():
        if t.shape != getattr(one, name).shape:
            raise ValueError(f"the shared {name} has another shape")
    for name, t in tensors.items():
        getattr(one, name).data.copy_(t)


def _settings(model, name, layers):
    """What peft's config says of the method, for what is wrapped in the tree."""
    one = next(iter(layers.values()))
    kinds = {getattr(m.base, "kind", type(m.base)) for m in layers.values()}
    conv = any(kind.__name__ == "Conv1D" for kind in kinds)  # packed ones too
    config = dict(target_modules=_shortest(model, layers), fan_in_fan_out=conv)
    if name == "VeRA":
        seed = dict(projection_prng_key=one.seed, save_projection=True)
        return config | dict(r=len(one.vera_d), bias="none", **seed)
    if name == "IA3":
        return config | _sides(model, layers)
    twice = 2 if name == "PiSSA" else 1
    return config | dict(
        r=twice * one.r,
        lora_alpha=twice * one.r if name == "PiSSA" else one.alpha,
        lora_dropout=getattr(getattr(one, "dropout", None), "p", 0.0),
        bias=getattr(one, "bias_mode", "none"),
        use_rslora=getattr(one, "rslora", False),
        use_dora=name == "DoRA",
        init_lora_weights=True,
    )


def _sides(model, layers):
    """IA3's targets, among which peft wants the feed-forward ones by the same names."""
    inputs = {p: m for p, m in layers.items() if m.feedforward}
    outputs = {p: m for p, m in layers.items() if not m.feedforward}
    parts = [_shortest(model, some) for some in (outputs, inputs) if some]
    if any(isinstance(part, str) for part in parts):
        expression = "|".join(re.escape(path) for path in inputs)
        return dict(
            target_modules="|".join(re.escape(path) for path in layers),
            feedforward_modules=expression or [],
        )
    return dict(
        target_modules=sorted(sum(parts, [])),
        feedforward_modules=parts[-1] if inputs else [],
    )


def _soft_settings(wrapper, name):
    """What peft's config says of a prompt or a prefix."""
    config = wrapper.config.to_dict()
    sizes = {  # the same sizes by the names that models give them
        "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
        "num_attention_heads": (
            "num_attention_heads",
            "num_heads",
            "n_head",
            "n_heads",
        ),
    }
    found = {
        k: next((config[n] for n in names if n in config), None)
        for k, names in sizes.items()
    }
    if name == "prefix":  # under grouped-query attention peft counts key-value heads
        layers, heads, size = wrapper.sizes
        found |= dict(num_layers=layers, num_attention_heads=heads)
        found |= dict(token_dim=heads * size, encoder_hidden_size=heads * size)
        parts = 2 if wrapper.config.is_encoder_decoder else 1
    else:
        parts = 2 if wrapper.decoder else 1
        found |= dict(token_dim=wrapper.prompt_embeddings.shape[1])
    return found | dict(num_virtual_tokens=wrapper.n, num_transformer_submodules=parts)


def _read(folder):
    """The method's name, the config with peft's defaults, and the tensors, checked."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        tensors = load_file(folder / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename or WEIGHTS).name
        note = ", only a pickle" if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{folder} is no adapter folder: no {name}{note}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{folder / CONFIG} is not valid JSON") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is truncated or damaged: {error}"
        ) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise ValueError(f"{folder} holds peft_type {kind!r}, not one of {known}")
    harmless = f"{HARMLESS['']} {HARMLESS[kind]}".split()
    for setting, value in config.items():
        unset = value is None or value is False or value in ([], {}, "none")
        if not unset and setting not in DEFAULTS[kind] and setting not in harmless:
            raise ValueError(f"the setting {setting}={value!r} is not supported")
    config = {**DEFAULTS[kind], **config}
    if not isinstance(config["modules_to_save"], list | None):
        raise ValueError(f"modules_to_save={config['modules_to_save']!r} is not a list")
    if strange := [name for name in tensors if "lora_embedding_" in name]:
        raise ValueError(f"LoRA on an embedding is not supported: {strange[0]}")
    return _method_of(config), config, tensors


def _method_of(config):
    """Which of METHODS a config speaks of; ValueError for what would change numbers."""
    if (kind := config["peft_type"]) != "LORA":
        return next(name for name, m in METHODS.items() if m.peft_type == kind)
    start, turned = config["init_lora_weights"], config["use_dora"]
    split = start == "pissa" and not turned
    if start not in KEEP_THE_BASE and not split:
        raise ValueError(f"init_lora_weights={start!r} changes the base: not supported")
    if (turned or split) and (bias := config["bias"]) != "none":
        raise ValueError(f"bias={bias!r} is supported for plain LoRA only")
    return "DoRA" if turned else "PiSSA" if split else "LoRA"


def _write(folder, tensors, config):
    """Write both files beside their targets, then rename both; clean up in any case.
    The old config goes aside first: new weights never stand under it."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = {name: folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG)}
    old = folder / f".{CONFIG}.{os.getpid()}.old"
    try:
        save_file(tensors, fresh[WEIGHTS], {"format": "pt"})
        fresh[CONFIG].write_text(config, encoding="utf8")
        if (folder / CONFIG).exists():
            os.replace(folder / CONFIG, old)
        for name, path in fresh.items():
            os.replace(path, folder / name)
    finally:
        if old.exists() and fresh[WEIGHTS].exists():
            os.replace(old, folder / CONFIG)
        for path in (*fresh.values(), old):
            path.unlink(missing_ok=True)


def _carried(model):
    """The name of the one method that the model carries; ValueError for none or two."""
    kinds = {type(m) for m in model.modules()}
    found = [name for name, method in METHODS.items() if method.layer in kinds]
    if len(found) != 1:
        what = " and ".join(found) or "no LoRA and nothing else that peft can read"
        raise ValueError(f"the model carries {what}: one adapter goes into a folder")
    return found[0]


def _layers(model, name):
    """{path: layer} of the method's layers in the model."""
    kind = METHODS[name].layer
    return {p: m for p, m in model.named_modules() if isinstance(m, kind)}


def _to_file(key, name, layers):
    """The name in peft's file of a tensor of the method's state dict: METHODS."""
    owner, _, leaf = key.rpartition(".")
    if not owner:
        return METHODS[name].keys[leaf]
    if leaf in METHODS[name].keys:
        return f"{PREFIX}{owner}.{METHODS[name].keys[leaf]}"
    return PREFIX + (f"{owner}.base_layer.{leaf}" if owner in layers else key)


def _from_file(key, name):
    """The other way round: our name of a tensor in peft's file."""
    if key in SHARED:
        return key
    soft = METHODS[name].keys is SOFT
    plain = key.removeprefix("base_model." if soft else PREFIX)
    plain = re.sub(r"\.base_layer\.(bias|weight)$", r".\1", plain)
    for ours, theirs in METHODS[name].keys.items():
        if plain.endswith(f".{theirs}"):
            return f"{plain.removesuffix(theirs)}{ours}"
    return plain


def _under(path, names):
    """Whether `path` is, as peft sees it, one of the modules `names` or inside one: it
    looks at how a path ends, so "classifier" is DistilBERT's `pre_classifier` too."""
    ends, parts = tuple(names), path.split(".")
    return any(".".join(parts[: k + 1]).endswith(ends) for k in range(len(parts)))


def _tensors_of(heads, model):
    """{name: tensor} of all that is in the heads; ValueError for a tied weight."""
    there = model.state_dict()
    found = {name: t for name, t in there.items() if _under(name, heads)}
    others = {t.data_ptr(): name for name, t in there.items() if name not in found}
    for name, t in found.items():
        if t.data_ptr() in others:  # peft would untie them
            raise ValueError(
                f"{name} is tied to {others[t.data_ptr()]}: it cannot be in a head"
            )
    return found


def _selected(model, config):
    """The paths of the modules that a peft config selects."""
    paths = {path: m for path, m in model.named_modules() if path}
    if config["target_modules"] == "all-linear":
        linears = surgery.select(model, "all-linear")
        chosen = {path for path, m in paths.items() if m in linears}
    else:
        chosen = _named(paths, config["target_modules"])
    inside = {path for path in chosen if _under(path, config["modules_to_save"] or ())}
    return chosen - inside - _named(paths, config["exclude_modules"])


def _named(paths, names):
    """The paths that a regular expression matches, or that end in a name of a list."""
    if isinstance(names, str):
        try:
            return {path for path in paths if re.fullmatch(names, path)}
        except (re.error, OverflowError, RecursionError):
            raise ValueError(f"{names!r} is not a regular expression") from None
    if not isinstance(names, list | None):
        raise ValueError(f"{names!r} is neither a list of names nor an expression")
    ends = tuple(f".{name}" for name in names or ())
    return {path for path in paths if f".{path}".endswith(ends)}


def _shortest(model, layers):
    """The shortest suffixes that select just these layers, or a regular expression."""
    inside = tuple(f"{path}." for path in layers)
    paths = [p for p, _ in model.named_modules() if p and not p.startswith(inside)]
    chosen = set()
    for path in layers:
        parts = path.split(".")
        suffixes = (".".join(parts[-k:]) for k in range(1, len(parts) + 1))
        fits = (s for s in suffixes if _named(paths, [s]) <= layers.keys())
        if (suffix := next(fits, None)) is None:
            return "|".join(re.escape(path) for path in layers)
        chosen.add(suffix)
    return sorted(chosen)
