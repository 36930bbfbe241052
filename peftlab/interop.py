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
    exclude_modules=None,
    modules_to_save=None,
    init_lora_weights=True,
)
HARMLESS = (  # what says nothing about the numbers of a finished LoRA
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config fan_in_fan_out"
    " inference_mode layers_pattern loftq_config megatron_core peft_version"
    " qalora_group_size revision runtime_config task_type"
).split()
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to start
TASKS = {  # how a class's name ends, and peft's name for its task
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
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
    """Write the model's LoRA as a peft adapter: `PeftModel.from_pretrained` loads it.

    heads: names of modules saved whole, such as a new output layer; the `classifier`,
    `score` or `qa_outputs` of a task that has one always goes along, as in peft.
    task_type: peft's name for the task, guessed from the model's class if None. Raises
    ValueError, with nothing written, for a model without LoRA, a folder without a name,
    and a head that does not exist, carries LoRA or shares its weight."""
    tensors, layers = lora.state_dict(model), _layers(model)  # raises without LoRA
    if not str(folder).strip():
        raise ValueError("name a folder to write the adapter to: this name is empty")
    if task_type is None:
        ends = (t for end, t in TASKS.items() if type(model).__name__.endswith(end))
        task_type = next(ends, None)
    heads = [*heads, *(h for h in HEADS.get(task_type, ()) if hasattr(model, h))]
    heads = list(dict.fromkeys(heads))
    if missing := set(heads) - {path for path, _ in model.named_modules()}:
        raise ValueError(f"there is no module {min(missing)!r} to save as a head")
    if both := [path for path in layers if _under(path, heads)]:
        raise ValueError(f"{both[0]} carries LoRA: it cannot be in a head as well")
    own = {_to_file(name, layers): t for name, t in tensors.items()}
    own |= {PREFIX + name: t for name, t in _tensors_of(heads, model).items()}
    own = {name: t.detach().cpu().clone().contiguous() for name, t in own.items()}
    one = next(iter(layers.values()))
    config = dict(
        peft_type="LORA",
        task_type=task_type,
        base_model_name_or_path=getattr(
            getattr(model, "config", None), "_name_or_path", None
        ),
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
    _write(Path(folder), own, json.dumps(config, indent=2) + "\n")


def load(model, folder):
    """Put the LoRA that peft (or `save`) wrote into a folder on `model`, and return it.

    As after `lora.add` the base is frozen and the adapter trainable; heads in the file
    are copied over the model's, which stay frozen. Raises ValueError, with the model
    unchanged, for a file that is missing, truncated, empty or made for another model,
    and for a setting that is not supported."""
    config, tensors = _read(Path(folder))
    heads, found = config["modules_to_save"] or (), {}
    for name, t in tensors.items():
        plain = re.sub(r"\.base_layer\.bias$", ".bias", name.removeprefix(PREFIX))
        plain = re.sub(r"\.(lora_[AB])\.weight$", r".\1", plain)
        # With bias="all" peft adds copies of a head's biases, the untrained ones too.
        if not re.search(r"\.(original_module|modules_to_save)\.", plain):
            found[plain] = t
    paths = {n.removesuffix(".lora_A") for n in found if n.endswith(".lora_A")}
    if not paths:
        raise ValueError(f"{folder} holds no LoRA tensors: the adapter is empty")
    if strange := sorted(paths ^ _selected(model, config)):
        where = "the file" if strange[0] in paths else "the model"
        raise ValueError(f"made for another model: {strange[0]} is only in {where}")
    there = _tensors_of(heads, model)
    new = {name: t for name, t in found.items() if _under(name, heads)}
    for name in sorted(there.keys() ^ new.keys()):
        where = "the file" if name in new else "the model"
        raise ValueError(
            f"made for another model: the head's {name} is only in {where}"
        )
    for name, t in new.items():
        if t.shape != there[name].shape:
            raise ValueError(f"made for another model: the head's {name} does not fit")
    trained = {p: p.requires_grad for p in model.parameters()}
    settings = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora")
    lora.add(model, sorted(paths), *(config[k] for k in settings))
    biases = new.keys() & lora.state_dict(model).keys()  # bias="all" trains them too
    own = {n: t for n, t in found.items() if n not in new or n in biases}
    try:
        lora.load_state_dict(model, own)
    except ValueError as error:
        lora._replace(model, {m: m.base for m in _layers(model).values()})
        for p, was in trained.items():
            p.requires_grad_(was)
        raise ValueError(f"made for another model: {error}") from None
    for name, t in new.items():
        there[name].copy_(t)
    return model


def _read(folder):
    """The config, with peft's defaults, and the tensors of a folder, both checked."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        tensors = load_file(folder / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename or WEIGHTS).name
        note = ", only a pickle" if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{folder} is no adapter folder: no {name}{note}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{folder / CONFIG} is not valid JSON") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is truncated or damaged: {error}"
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{folder} holds {kind!r}, not a LoRA adapter")
    for name, value in config.items():
        unset = value is None or value is False or value in ([], {})
        if not unset and name not in DEFAULTS and name not in HARMLESS:
            raise ValueError(f"the setting {name}={value!r} is not supported")
    config = {**DEFAULTS, **config}
    if not isinstance(config["modules_to_save"], list | None):
        raise ValueError(f"modules_to_save={config['modules_to_save']!r} is not a list")
    if (start := config["init_lora_weights"]) not in KEEP_THE_BASE:
        raise ValueError(f"init_lora_weights={start!r} changes the base: not supported")
    if strange := [name for name in tensors if "lora_embedding_" in name]:
        raise ValueError(f"LoRA on an embedding is not supported: {strange[0]}")
    return config, tensors


def _write(folder, tensors, config):
    """Write both files beside their targets, then rename both; clean up in any case."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = {name: folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(tensors, fresh[WEIGHTS], {"format": "pt"})
        fresh[CONFIG].write_text(config, encoding="utf8")
        for name, path in fresh.items():
            os.replace(path, folder / name)
    finally:
        for path in fresh.values():
            path.unlink(missing_ok=True)


def _layers(model):
    """{path: layer} of the model's LoRA layers."""
    return {p: m for p, m in model.named_modules() if isinstance(m, lora.LoRALinear)}


def _to_file(name, layers):
    """The name in peft's file of a tensor of `lora.state_dict`: the table above."""
    owner, _, leaf = name.rpartition(".")
    if leaf in ("lora_A", "lora_B"):
        return f"{PREFIX}{name}.weight"
    return PREFIX + (f"{owner}.base_layer.{leaf}" if owner in layers else name)


def _under(path, names):
    """Whether `path` is, as peft sees it, one of the modules `names` or inside one."""
    return any(f".{name}." in f".{path}." for name in names)


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
        linears = lora._select(model, "all-linear")
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
        except re.error:
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
