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
to peft's training. Adapters, BitFit and inactive LoRAs have no form in peft.

Only safetensors are read or written, never pickle. A setting that would change numbers
and that we do not support is refused by its name. How a folder is written so that no
adapter is ever lost is `adapter_folder.py`; what `inspect` tells of one that is broken,
`adapter_report.py`. Verified against peft 0.18 and 0.21.

    python -m peftlab.peft_files FOLDER    # what is in it, and what is wrong with it
"""

import json
import math
import re
from hashlib import sha256
from inspect import signature
from typing import NamedTuple

import torch

from . import adapter_folder, dora, ia3, lora, pissa, prefix, prompt, surgery, vera


def save(model, folder, heads=(), task_type=None):
    """Write the model's adapter as peft does: `PeftModel.from_pretrained` loads it.

    Args:
        model: one that carries LoRA, DoRA, PiSSA, VeRA or IA3, or the wrapper of a
            prompt or prefix; torch.compile may be around it.
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
        OSError: `load` finds the old adapter or the new one, whole.
    """
    model = surgery.uncompiled(model)
    surgery.refuse_containers(model)
    name = _carried(model)
    method = METHODS[name]
    soft = method.keys is SOFT
    base = model.model if soft else model
    layers = {} if soft else surgery.wrappers(model, method.layer)

    guess = _task(base)
    heads = _all_heads(base, heads, guess if task_type is None else task_type)
    _check_heads(base, heads, layers, name)
    _refuse_left_out(model, base, name, heads)
    if task_type is None and _takes_what_peft_hands_on(base, guess):
        task_type = guess
    if soft:
        task_type = task_type or "FEATURE_EXTRACTION"

    config = dict(
        peft_type=method.peft_type,
        task_type=task_type,
        base_model_name_or_path=_config_of(base, "_name_or_path"),
        modules_to_save=heads or None,
        inference_mode=True,
    )
    config |= _soft_settings(model, name) if soft else _settings(model, name, layers)
    tensors = _tensors_for_file(model, base, name, layers, heads)
    adapter_folder.write(folder, config, tensors, _digest)


def load(model, folder):
    """Put the adapter that peft (or `save`) wrote into a folder on `model`.

    As after the method's `add` the base is frozen and the adapter trainable. Heads in
    the file are copied over the model's, which stay frozen; so are the embeddings that
    peft writes where a vocabulary was changed.

    Args:
        model: the plain base; torch.compile may be around it.
        folder: the adapter's.

    Returns:
        The model as it was given; for a prompt or a prefix, the wrapper around the
        plain base.

    Raises:
        ValueError: for a file that is missing, truncated, empty or made for another
            model, for files of two adapters, NaN and infinity, and a setting that is
            out of range or not supported. Then the model is unchanged.
    """
    plain = surgery.uncompiled(model)
    surgery.refuse_containers(plain)
    inactive = vars(plain).pop("lora_adapters", None)  # multi_lora's do not matter
    try:
        adapted = _load(plain, folder)
    finally:
        if inactive is not None:
            plain.lora_adapters = inactive
    return model if adapted is plain else adapted


def inspect(folder, model=None):
    """Say what an adapter's folder holds, and what is wrong with it; load nothing.

    It looks at the files that peft would load: that a save of ours was interrupted, so
    that `load` would take others, is a fault.

    Args:
        folder: the adapter's, written here or by peft.
        model: the plain base; then names and shapes are compared with its layers too.

    Returns:
        A report. Its `str` says what the folder holds, with a sentence for each fault;
        `problems` is a tuple of these sentences, and `ok` is True if there is none.

    Raises:
        ValueError: for what is no path of a folder, and no plain model. A broken
            folder raises nothing.
    """
    from . import adapter_report  # it takes the tables below

    return adapter_report.report(folder, model)


def _load(model, folder):
    """`load` on the plain base."""
    config, tensors = adapter_folder.read(folder, _digest)
    config = _checked(config)
    name = _method_of(config)
    heads = config["modules_to_save"] or ()
    _refuse_adapters_name(tensors)

    adapter, replaced = _sorted(tensors, model, name, heads)
    _check_replaced(replaced, model, heads)
    if not adapter:
        raise ValueError(f"{folder} holds no {name} tensors: the adapter is empty")

    places = model.state_dict()  # the memory stays, whatever wraps its layers
    if METHODS[name].keys is SOFT:
        adapted = _insert_soft(model, name, config, adapter)
    else:
        adapted = _insert(model, name, config, adapter, heads, replaced)
    for key, t in replaced.items():
        places[key].copy_(t)
    return adapted


# What goes into the file


def _carried(model):
    """The name of the one method that the model carries; ValueError for none or two."""
    kinds = {type(m) for m in model.modules()}
    names = [name for name, method in METHODS.items() if method.layer in kinds]

    known = {method.layer for method in METHODS.values()}
    names += sorted({k.peft_method for k in kinds - known if hasattr(k, "peft_method")})
    if any("bitfit" in vars(m) for m in model.modules()):
        names.append("BitFit")

    if len(names) != 1 or names[0] not in METHODS:
        what = " and ".join(names) or "no LoRA"
        raise ValueError(
            f"the model carries {what}: a folder holds one adapter, of a kind that peft"
            " can read"
        )
    return names[0]


def _config_of(base, name):
    """A value of the base's own config, or None."""
    return getattr(getattr(base, "config", None), name, None)


def _task(base):
    """peft's name for what a class of transformers' does, or None."""
    kind = type(base).__name__
    return next((task for end, task in TASKS.items() if kind.endswith(end)), None)


def _takes_what_peft_hands_on(base, task):
    """Whether peft's class for the task runs the base: it hands on token ids alone."""
    inputs = signature(base.forward).parameters.keys()
    if task == "SEQ_2_SEQ_LM":
        text = not inputs & NO_TEXT
        return "input_ids" in inputs and text and _config_of(base, "is_encoder_decoder")
    return "input_ids" in inputs


def _all_heads(base, heads, task):
    """The names asked for, and those of the layers that peft saves for a task."""
    if isinstance(heads, str) or not all(isinstance(head, str) for head in heads):
        raise ValueError(f"heads must be a list of names, not {heads!r:.160}")
    if task is not None and not isinstance(task, str):
        raise ValueError(f"task_type must be peft's name of a task, not {task!r:.160}")
    of_task = [head for head in HEADS.get(task, ()) if hasattr(base, head)]
    return list(dict.fromkeys([*heads, *of_task]))


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


def _tensors_for_file(model, base, name, layers, heads):
    """{name in the file: tensor}, finite, on the CPU, none sharing memory."""
    method = METHODS[name]
    make = pissa.to_lora if name == "PiSSA" else method.module.state_dict
    tensors = {_to_file(key, name, layers): t for key, t in make(model).items()}
    if name == "VeRA":
        (shared,) = next(iter(layers.values())).frozen
        tensors |= dict(zip(SHARED, (shared.vera_A, shared.vera_B), strict=True))

    front = "base_model." if method.keys is SOFT else PREFIX  # no layer is wrapped
    tensors |= {front + key: t for key, t in _tensors_of(heads, base).items()}
    for key, t in tensors.items():
        surgery.check_fits(key, t, t.dtype)
        tensors[key] = t.detach().to("cpu", copy=True).contiguous()
    return tensors


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

    r = 2 * layer.r if name == "PiSSA" else layer.r
    return config | dict(
        r=r,
        lora_alpha=r if name == "PiSSA" else layer.alpha,  # its scaling is 1
        lora_dropout=getattr(getattr(layer, "dropout", None), "p", 0.0),
        bias=getattr(layer, "bias_mode", "none"),
        use_rslora=getattr(layer, "rslora", False),
        use_dora=name == "DoRA",
        init_lora_weights=True,
    )


def _sides(model, layers):
    """IA3's targets, and which of them are rescaled on the input side."""
    inputs = [path for path, m in layers.items() if m.feedforward]
    outputs = [path for path in layers if path not in inputs]
    targets = [_shortest(model, paths) for paths in (outputs, inputs) if paths]
    feedforward = targets[-1] if inputs else []

    lists = all(isinstance(names, list) for names in targets)
    if lists and _named(layers, feedforward, dot="") == set(inputs):
        targets = sorted(sum(targets, []))
        return dict(target_modules=targets, feedforward_modules=feedforward)
    return dict(
        target_modules=_expression(layers),
        feedforward_modules=_expression(inputs) or [],
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


def _refuse_adapters_name(tensors):
    """ValueError for names like lora_A.default.weight, in which peft finds nothing."""
    for key in tensors:
        match = WITH_ADAPTERS_NAME.search(key)
        if match:
            raise ValueError(
                f"{key!r:.160} has the adapter's name {match[1] or match[2]!r:.160} in"
                " it, as in a whole peft model's state dict: save_pretrained leaves it"
                " out"
            )


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

    adapter = {}
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
            adapter[plain] = t
    return adapter, replaced


def _embeddings(model):
    """The names of the weights that belong to the vocabulary."""
    layers = []
    for side in ("input", "output"):
        layers.append(getattr(model, f"get_{side}_embeddings", lambda: None)())
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.weight" for path, m in modules if any(m is e for e in layers)}


def _check_replaced(replaced, model, heads):
    """ValueError for tensors that cannot be copied over the model's."""
    asked = {key for key in replaced if _under(key, heads)}
    for key in sorted(_tensors_of(heads, model).keys() ^ asked):
        where = "the file" if key in asked else "the model"
        raise ValueError(
            f"made for another model: the head's {key!r:.160} is only in {where}"
        )

    places = model.state_dict()
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


def _insert_soft(model, name, config, tensors):
    """The wrapper of a prompt or prefix around the model, with the file's tensor."""
    n = config["num_virtual_tokens"]
    rows = len(next(iter(tensors.values())))
    if rows not in (n, 2 * n):
        raise ValueError(f"made for another model: num_virtual_tokens={n} is not so")

    module = METHODS[name].module
    twice = dict(decoder=True) if name == "prompt" and rows == 2 * n else {}
    trained = {p: p.requires_grad for p in model.parameters()}
    try:
        wrapper = module.add(model, n, **twice)
        module.load_state_dict(wrapper, tensors)
    except ValueError as error:
        for p, flag in trained.items():
            p.requires_grad_(flag)
        raise _made_for_another(error) from None
    return wrapper


def _insert(model, name, config, tensors, heads, replaced):
    """The method's layers put into the model, with the file's tensors in them."""
    surgery.refuse_carried(model)
    ends = tuple(f".{leaf}" for leaf in METHODS[name].keys)
    paths = sorted({key.rpartition(".")[0] for key in tensors if key.endswith(ends)})
    _check_paths(model, config, paths, heads)
    shared = {key[-6:]: tensors.pop(key) for key in SHARED if key in tensors}
    narrow = [t for key, t in tensors.items() if key.endswith((".lora_A", ".vera_d"))]
    if any(t.shape[:1] != (config["r"],) for t in narrow):
        raise ValueError(f"made for another model: r={config['r']} is not the file's")

    trained = {p: p.requires_grad for p in model.parameters()}
    bases = [m for path, m in model.named_modules() if path in paths]
    weights = [m._parameters.get("weight") for m in bases]  # a packed layer has none
    _add(model, name, config, paths)

    module = METHODS[name].module
    layers = surgery.wrappers(model, METHODS[name].layer)
    places = module.state_dict(model)
    for key in replaced.keys() & places.keys():  # bias="all": a head's biases too
        tensors[key] = replaced[key]
    try:
        _check_biases(places, tensors)
        _load_shared(layers, shared)
        module.load_state_dict(model, tensors)
    except ValueError as error:
        surgery.swap(model, {m: m.base for m in layers.values()})
        if name == "PiSSA":  # it has changed the weights themselves
            for m, weight in zip(bases, weights, strict=True):
                m.weight = weight
        for p, flag in trained.items():
            p.requires_grad_(flag)
        raise _made_for_another(error) from None

    if name == "PiSSA":  # our formula has no scaling: it goes into B
        for m in layers.values():
            m.lora_B.data *= _scaling(config)
    return model


def _made_for_another(error):
    return ValueError(f"made for another model, or damaged: {error!s:.300}")


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
            f"made for another model: {path!r:.160} is only in {where}, by"
            f" target_modules={config['target_modules']!r:.160}"
        )


def _check_biases(places, tensors):
    """ValueError where biases are trained and none is in the file."""
    biases = {key for key in places if key.endswith("bias")}
    if biases and not biases & tensors.keys():
        raise ValueError(
            "its config says that biases are trained and the file holds none (peft"
            " before 0.21 leaves them out)"
        )


def _add(model, name, config, paths):
    """The method's own `add`, with the settings of a peft config."""
    targets = surgery.Exactly(paths)
    if name == "LoRA":
        settings = [config[key] for key in ("r", "lora_alpha", "lora_dropout", "bias")]
        lora.add(model, targets, *settings, config["use_rslora"])
    elif name == "DoRA":
        alpha = config["lora_alpha"]
        if config["use_rslora"]:
            alpha = _scaling(config) * config["r"]
        dora.add(model, targets, config["r"], alpha)
    elif name == "PiSSA":
        pissa.add(model, targets, config["r"])
    elif name == "VeRA":
        vera.add(model, targets, config["r"], config["projection_prng_key"])
    else:
        inputs = _named(paths, config["feedforward_modules"], dot="")
        ia3.add(model, targets, surgery.Exactly(sorted(inputs)))


def _scaling(config):
    """alpha / r, or with rsLoRA alpha / sqrt(r)."""
    r = config["r"]
    return config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)


def _load_shared(layers, tensors):
    """Copy a file's shared A and B over VeRA's, where the file has them."""
    if tensors:
        (shared,) = next(iter(layers.values())).frozen
        places = {name: getattr(shared, name).data for name in tensors}
        surgery.load(places, tensors)


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
    """The paths that an expression matches, or that end in a name of a list.

    Before the name peft wants a dot, but not in IA3's feedforward_modules.
    """
    if isinstance(names, str):
        try:
            return {path for path in paths if re.fullmatch(names, path)}
        except (re.error, OverflowError, RecursionError):
            raise ValueError(f"{names!r:.160} is no regular expression") from None
    ends = tuple(f"{dot}{name}" for name in names or ())
    return {path for path in paths if f"{dot}{path}".endswith(ends)}


def _shortest(model, layers):
    """The shortest suffixes that select just these layers, or a regular expression."""
    inside = tuple(f"{path}." for path in layers)
    paths = [p for p, _ in model.named_modules() if p and not p.startswith(inside)]
    suffixes = set()
    for path in layers:
        parts = path.split(".")
        ends = [".".join(parts[-k:]) for k in range(1, len(parts) + 1)]
        fitting = [end for end in ends if _named(paths, [end]) <= set(layers)]
        if not fitting:
            return _expression(layers)
        suffixes.add(fitting[0])
    return sorted(suffixes)


def _expression(paths):
    """A regular expression that matches just these paths."""
    return "|".join(re.escape(path) for path in paths)


# Settings


TREE = dict(target_modules=None, exclude_modules=None, modules_to_save=None)
DEFAULTS = {  # what load acts on, and peft's values where a file is silent
    "LORA": dict(
        TREE,
        r=8,
        lora_alpha=8,
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
    ),
    "VERA": dict(TREE, r=256, projection_prng_key=0, save_projection=True),
    "IA3": dict(TREE, feedforward_modules=None),
    "PROMPT_TUNING": dict(modules_to_save=None, num_virtual_tokens=None),
    "PREFIX_TUNING": dict(modules_to_save=None, num_virtual_tokens=None),
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


def _check_list(what, value):
    names = [] if value is None else value
    is_list = isinstance(names, list)
    if not is_list or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{what} must be a list of names, not {value!r:.160}")


def _check_names(what, value):
    if not isinstance(value, str):
        _check_list(what, value)


def _check_targets(what, value):
    if value is None:  # peft has defaults, and writes those that it took
        raise ValueError(f"the file names no {what}: write the layers' names into it")
    _check_names(what, value)


CHECKS = {  # what a setting may be: a function and what else it is given
    "r": (surgery.check_whole, 1),
    "num_virtual_tokens": (surgery.check_whole, 1),
    "projection_prng_key": (surgery.check_whole, 0, 2**63),
    "lora_alpha": (surgery.check_positive,),
    "lora_dropout": (surgery.check_fraction,),
    "use_rslora": (surgery.check_flag,),
    "use_dora": (surgery.check_flag,),
    "save_projection": (surgery.check_flag,),
    "bias": (surgery.check_one_of, ("none", "all", "lora_only")),
    "modules_to_save": (_check_list,),
    "target_modules": (_check_targets,),
    "feedforward_modules": (_check_targets,),
    "exclude_modules": (_check_names,),
}


def _checked(config):
    """The config with peft's defaults; ValueError for what is not supported."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise ValueError(f"the file's peft_type is {kind!r:.160}, not one of {known}")

    harmless = f"{HARMLESS['']} {HARMLESS[kind]}".split()
    for setting, value in config.items():
        unset = value is None or value is False or value in ([], {}, "none")
        if not unset and setting not in DEFAULTS[kind] and setting not in harmless:
            what = f"{setting!r:.160} = {value!r:.160}"
            raise ValueError(f"the setting {what} is not supported")

    config = {**DEFAULTS[kind], **config}
    for setting in DEFAULTS[kind].keys() & CHECKS.keys():
        check, *limits = CHECKS[setting]
        check(setting, config[setting], *limits)
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
            f"init_lora_weights={start!r:.160} changes the base: not supported"
        )
    if (config["use_dora"] or split) and config["bias"] != "none":
        raise ValueError(f"bias={config['bias']!r} is supported for plain LoRA only")
    if config["use_dora"]:
        return "DoRA"
    return "PiSSA" if split else "LoRA"


def _digest(config):
    """A digest of the settings that `load` acts on."""
    config = _checked(config)
    settings = {"method": _method_of(config)}
    for key in DEFAULTS[config["peft_type"]]:
        value = config[key]
        settings[key] = sorted(value) if isinstance(value, list) else value
    text = json.dumps(settings, sort_keys=True)
    return sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    import sys

    from peftlab import adapter_report

    adapter_report.main(sys.argv[1:])
