r"""The one door to adapter files: reads what peft writes, writes what peft reads.

A peft adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`.
LoRA's tensors in it, for a layer at `path` of the base model:

| here | in the file | shape |
|---|---|---|
| `path.lora_A` | `base_model.model.path.lora_A.weight` | (r, in) |
| `path.lora_B` | `base_model.model.path.lora_B.weight` | (out, r) |
| `path.bias` of a target layer | `base_model.model.path.base_layer.bias` | (out,) |
| any other bias, with bias="all" | `base_model.model.path.bias` | its own |
| a head that goes along | `base_model.model.head.weight`, `.bias` | its own |

Only safetensors are read or written, never pickle. A setting that would change numbers
and that we do not support is refused by its name. Files are written beside their target
and renamed, so a crash leaves the old adapter whole. Held against peft 0.21.
"""

import json
import os
import re
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file

from peftlab import lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DEFAULTS = dict(  # what load acts on, and peft's values where a file is silent
    peft_type=None,
    r=8,
    lora_alpha=8,
    lora_dropout=0.0,
    bias="none",
    use_rslora=False,
    target_modules=None,
    modules_to_save=None,
)
HARMLESS = (  # what says nothing about the numbers of a finished LoRA
    "auto_mapping base_model_name_or_path fan_in_fan_out"
    " inference_mode init_lora_weights megatron_core peft_version qalora_group_size"
    " revision runtime_config task_type loftq_config eva_config ensure_weight_tying"
).split()
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to start
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def save(model, folder, heads=(), task_type=None):
    """Write the model's LoRA as a peft adapter folder that `PeftModel.from_pretrained` loads.

    heads: names of modules saved whole, such as a new output layer; the `classifier` or
    `score` of a classification model always goes along, as in peft. task_type: peft's name
    for the task, guessed from the model's class if None. Raises ValueError, with nothing
    written, where there is no LoRA or a head does not exist or carries LoRA itself."""
    tensors = lora.state_dict(model)  # raises where there is no LoRA
    layers = _layers(model)
    if task_type is None:
        task_type = next((t for end, t in TASKS.items() if _class(model).endswith(end)), None)
    if task_type in ("SEQ_CLS", "TOKEN_CLS"):
        heads = [*heads, *(h for h in ("classifier", "score") if hasattr(model, h))]
    heads = list(dict.fromkeys(heads))
    modules = dict(model.named_modules())
    for head in heads:
        if head not in modules:
            raise ValueError(f"there is no module {head!r} to save as a head")
        if any(f"{path}.".startswith(f"{head}.") for path in layers):
            raise ValueError(f"{head!r} carries LoRA: it cannot be a head as well")
    own = {_to_file(name, layers): t for name, t in tensors.items()}
    for head in heads:
        for name, t in modules[head].state_dict().items():
            own[f"{PREFIX}{head}.{name}"] = t
    one = next(iter(layers.values()))
    config = dict(
        peft_type="LORA",
        task_type=task_type,
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None),
        r=one.r,
        lora_alpha=one.alpha,
        lora_dropout=getattr(one.dropout, "p", 0.0),
        bias=one.bias_mode,
        use_rslora=one.rslora,
        target_modules=_shortest(model, layers),
        modules_to_save=heads or None,
        fan_in_fan_out=any(type(m.base).__name__ == "Conv1D" for m in layers.values()),
        init_lora_weights=True,
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: t.detach().cpu().contiguous() for name, t in own.items()}
    _write(folder / WEIGHTS, lambda path: save_file(own, path, {"format": "pt"}))
    text = json.dumps(config, indent=2) + "\n"
    _write(folder / CONFIG, lambda path: path.write_text(text, encoding="utf8"))


def load(model, folder):
    """Put the LoRA that peft (or `save`) wrote into a folder on `model`; returns the model.

    The base is frozen and the adapter trainable, as after `lora.add`; heads in the file are
    copied over the model's. Raises ValueError, with the model unchanged, for a file that is
    missing, truncated, empty or made for another model, and for an unsupported setting."""
    config, tensors = _read(Path(folder))
    found = {key.removeprefix(PREFIX): t for key, t in tensors.items()}
    paths = {n.removesuffix(".lora_A.weight") for n in found if n.endswith(".lora_A.weight")}
    if not paths:
        raise ValueError(f"{folder} holds no LoRA tensors: the adapter is empty")
    if strange := sorted(paths ^ _matched(model, config["target_modules"])):
        where = "the file" if strange[0] in paths else "the model"
        raise ValueError(f"made for another model: {strange[0]} is only in {where}")
    heads, own = {}, {}
    for name, t in found.items():
        plain = re.sub(r"\.base_layer\.bias$", ".bias", name)
        plain = re.sub(r"\.(lora_[AB])\.weight$", r".\1", plain)
        is_head = any(f".{name}".find(f".{h}.") >= 0 for h in config["modules_to_save"] or ())
        (heads if is_head else own)[plain] = t
    there = model.state_dict()
    for name, t in heads.items():
        if name not in there or there[name].shape != t.shape:
            raise ValueError(f"made for another model: the head's {name} does not fit")
    settings = [config[k] for k in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora")]
    trained = {p: p.requires_grad for p in model.parameters()}
    lora.add(model, sorted(paths), *settings)
    try:
        lora.load_state_dict(model, own)
    except ValueError as error:
        lora._replace(model, {m: m.base for m in _layers(model).values()})
        for p, was in trained.items():
            p.requires_grad_(was)
        raise ValueError(f"made for another model: {error}") from None
    for name, t in heads.items():
        there[name].copy_(t)
    return model


def _read(folder):
    """The config and the tensors of an adapter folder, checked."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        name = Path(error.filename or WEIGHTS).name
        raise ValueError(f"{folder} is no adapter folder: it has no {name}") from None
    except json.JSONDecodeError:
        raise ValueError(f"{folder / CONFIG} is not valid JSON") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or damaged: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds {config.get('peft_type')!r}, not a LoRA adapter")
    if config.get("init_lora_weights", True) not in KEEP_THE_BASE:
        start = config["init_lora_weights"]
        raise ValueError(f"init_lora_weights={start!r} changes the base: not supported")
    for name, value in config.items():
        if value and name not in DEFAULTS and name not in HARMLESS:
            raise ValueError(f"the setting {name}={value!r} is not supported")
    return {**DEFAULTS, **config}, tensors


def _write(path, write):
    """Write a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _class(model):
    return type(model).__name__


def _layers(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, lora.LoRALinear)}


def _to_file(name, layers):
    owner, _, leaf = name.rpartition(".")
    if leaf in ("lora_A", "lora_B"):
        return f"{PREFIX}{name}.weight"
    return PREFIX + (f"{owner}.base_layer.{leaf}" if owner in layers else name)


def _matched(model, targets):
    """The paths that peft's target_modules select: a regular expression or suffixes."""
    modules = dict(model.named_modules())
    if targets == "all-linear":
        chosen = set(lora._select(model, targets))
        return {path for path, m in modules.items() if m in chosen}
    if isinstance(targets, str):
        return {path for path in modules if re.fullmatch(targets, path)}
    ends = tuple(f".{t}" for t in targets or ())
    return {path for path in modules if path and f".{path}".endswith(ends)}


def _shortest(model, layers):
    """The shortest suffixes that select just these layers, else a regular expression."""
    inside = tuple(f"{path}." for path in layers)
    paths = [p for p, _ in model.named_modules() if p and not p.startswith(inside)]
    chosen = set()
    for path in layers:
        parts = path.split(".")
        tries = (".".join(parts[-k:]) for k in range(1, len(parts) + 1))
        fits = (t for t in tries if all(p in layers for p in paths if f".{p}".endswith(f".{t}")))
        if (suffix := next(fits, None)) is None:
            return "|".join(re.escape(p) for p in layers)
        chosen.add(suffix)
    return sorted(chosen)
