"""A training step on the meta device, and the bytes that it would have held.

The model is built, the method is added, and the step is run for real: forward,
backward, optimizer. It is a second step: the optimizer has its state.
"""

import contextlib
import functools
import inspect

import torch
from torch.nn.modules import module

from peftlab import adam8bit, lora, qlora
from peftlab.kit import measure

from .cards import fits
from .messages import check_one_of, check_whole, one_sentence, quiet, shown
from .shapes import load
from .tracker import Tracker, as_on, nbytes

DTYPES = {str(t)[6:]: t for t in (torch.float32, torch.bfloat16, torch.float16)}
METHODS = {"full": None, "lora": lora.add, "qlora": qlora.add}
DEVICES = ("cuda", "cpu")
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw-foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw8bit": adam8bit.Adam8bit,
    "sgd": torch.optim.SGD,
}
SEQ = 512  # tokens, where nothing is said and the model can
# More than anyone has: a step of this size is refused and not counted.
MOST_TOKENS = 10**7
MOST_SEQUENCES = 10**6
MOST_MODULES = 10**5
MOST_PARAMETERS = 10**13


def step(
    config,
    method="lora",
    r=None,
    targets=None,
    seq=None,
    batch=1,
    dtype=None,
    optimizer="adamw",
    checkpointing=False,
    double_quant=None,
    device="cuda",
):
    """What a training step takes, in bytes.

    Args:
        config: a name in SHAPES, a `config.json` or a folder that has one, or a
            transformers config.
        method: "full", "lora" (the base in `dtype`, A and B in float32) or "qlora" (its
            linears in NF4, the rest of the base in bfloat16, A and B in float32).
        r: LoRA's rank, 16 by default.
        targets: names of linears, by default "all-linear".
        seq: tokens of a sequence, by default 512, or the model's maximum if it is less.
        batch: sequences of a step.
        dtype: of the weights, by default "float32" for full (16 bytes a parameter with
            AdamW), "bfloat16" for lora.
        optimizer: one of OPTIMIZERS.
        checkpointing: whether activations are computed again in the backward pass,
            layer by layer.
        double_quant: of qlora, on by default.
        device: "cuda" or "cpu", whose attention, dropout and AdamW are counted.

    Returns:
        A dict. Bytes: weights, gradients, optimizer, activations and their sum, total.
        Numbers: trainable and parameters, the base counted before it is packed. And
        gpu: what `fits` says of the total. A weight that no gradient reaches, such as a
        reader of images where there are none, has no gradient and no state.

    Raises:
        ValueError: for a name that is not there, a size that cannot be or that nobody
            has, a combination that cannot be, and a model that does not run without
            data.
    """
    settings = method_settings(method, r, targets, dtype, double_quant)
    _check(seq, batch, optimizer, checkpointing, device)
    config = load(config)

    with quiet(), as_on(device):
        model, base = build(config, method, **settings)
        seq = _length(model, seq)
        with one_sentence(f"a {type(model).__name__} does not run without data"):
            inputs = make_inputs(model, batch, seq)
            if checkpointing:
                enable_checkpointing(model)
            sizes = _run(model, inputs, optimizer, device)

    trainable = measure.parameters(model)[0]
    parameters = base if method == "full" else base + trainable
    sizes |= dict(trainable=trainable, parameters=parameters)
    return sizes | dict(gpu=fits(sizes["total"]))


def default_seq(config):
    """The tokens of a sequence that `step` takes where nothing is said."""
    with quiet(), as_on("cuda"):
        model, _ = build(load(config), "full", dtype=torch.float32)
        return _length(model, None)


# What is asked for


def method_settings(method, r, targets, dtype, double_quant):
    """The base's dtype and what goes to the method's `add`, by name.

    Raises:
        ValueError: for a combination that cannot be.
    """
    check_one_of("method", method, METHODS)
    if method == "full":
        for name, value in dict(r=r, targets=targets).items():
            if value is not None:
                raise ValueError(f"full trains everything: {name} is of lora and qlora")
    if method == "qlora" and dtype is not None:
        raise ValueError("qlora packs bfloat16 weights: dtype is of full and lora")
    if method != "qlora" and double_quant is not None:
        raise ValueError(f"{method} packs no weights: double_quant is of qlora")

    if isinstance(dtype, torch.dtype):
        dtype = str(dtype)[6:]
    if dtype is None:
        dtype = "float32" if method == "full" else "bfloat16"
    check_one_of("dtype", dtype, DTYPES)

    settings = dict(dtype=DTYPES[dtype])
    if method != "full":
        settings["r"] = 16 if r is None else r
        settings["targets"] = "all-linear" if targets is None else targets
        check_whole("the rank r", settings["r"], 10**5)
        _check_targets(settings["targets"])
    if method == "qlora":
        double_quant = True if double_quant is None else double_quant
        _check_bool("double_quant", double_quant)
        settings["double_quant"] = double_quant
    return settings


def _check_targets(targets):
    """Names of a sensible length: a message may repeat them."""
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list | tuple | set):
        names = [targets]
    for name in names:
        if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
            raise ValueError(
                f'targets: a list of names or "all-linear", not {shown(name)}'
            )


def _check(seq, batch, optimizer, checkpointing, device):
    if seq is not None:
        check_whole("seq", seq, MOST_TOKENS)
    check_whole("batch", batch, MOST_SEQUENCES)
    _check_bool("checkpointing", checkpointing)
    check_one_of("optimizer", optimizer, OPTIMIZERS)
    check_one_of("device", device, DEVICES)


def _check_bool(what, value):
    if type(value) is not bool:
        raise ValueError(f"{what} must be True or False, not {shown(value)}")


# The model


def build(config, method, dtype, **settings):
    """A model on the meta device with its method, and the base's parameters.

    Raises:
        ValueError: for a model that cannot be built or is larger than anyone's, and for
            what the method's `add` refuses.
    """
    with one_sentence(f"no model can be built of this {type(config).__name__}"):
        with _bounded():
            model = measure._on_meta(config, dtype, None).train()
    base = measure.parameters(model)[1]

    add = METHODS[method]
    if add is not None:
        with one_sentence(f"{method} cannot be added to a {type(model).__name__}"):
            model = add(model, **settings)
    return model, base


@contextlib.contextmanager
def _bounded():
    """ValueError as soon as what is built inside is larger than anyone's model."""
    counted = dict(modules=0, parameters=0)

    def count_module(*_):
        counted["modules"] += 1
        if counted["modules"] > MOST_MODULES:
            raise ValueError(f"the model has more than {MOST_MODULES:,} layers")

    def count_parameter(owner, name, parameter):
        counted["parameters"] += 0 if parameter is None else parameter.numel()
        if counted["parameters"] > MOST_PARAMETERS:
            raise ValueError(f"the model has more than {MOST_PARAMETERS:,} parameters")

    modules = module.register_module_module_registration_hook(count_module)
    parameters = module.register_module_parameter_registration_hook(count_parameter)
    with modules, parameters:
        yield


def _length(model, seq):
    """Tokens of a sequence: `seq`, or the default.

    Raises:
        ValueError: where the model has fewer positions than that, and where it would
            find out only with data.
    """
    parts = ["text_config", "text_encoder", "encoder", "decoder"]
    configs = [model.config, *(getattr(model.config, part, None) for part in parts)]
    for config in configs:
        heads = _number(config, "num_attention_heads")
        shared = _number(config, "num_key_value_heads")
        if heads and shared and heads % shared:
            raise ValueError(
                f"{heads} attention heads cannot share {shared} keys and values"
            )

    most = _most_positions(model, configs)
    if seq is None:
        return min(SEQ, most)
    if seq > most:
        raise ValueError(f"seq {seq} is longer than the model's maximum, {most}")
    return seq


def _most_positions(model, configs):
    """The model's maximum, in tokens; infinity where there is none, as in a T5."""
    names = ["max_position_embeddings", "max_target_positions"]
    names += [f"max_{end}_position_embeddings" for end in ("encoder", "decoder")]
    limits = [_number(config, name) for config in configs for name in names]
    most = min(filter(None, limits), default=float("inf"))

    for name, layer in model.named_modules():
        # RoBERTa's table starts with the padding's row, and the text comes after it.
        if name.endswith("position_embeddings") and hasattr(layer, "padding_idx"):
            padding = layer.padding_idx
            most -= 0 if padding is None else padding + 1
    return most


def _number(config, name):
    """A whole number of a config; None for none."""
    value = getattr(config, name, None)
    return value if type(value) is int and value > 0 else None


def enable_checkpointing(model):
    """Turn activation checkpointing on, by the name that this transformers has."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = getattr(model, names[0], None) or getattr(model, names[1])
    enable()


# The step


def make_inputs(model, batch, seq):
    """What the model's forward is called with: tokens, and labels where it has some."""
    arguments = inspect.signature(model.forward).parameters
    kind = type(model).__name__
    config = model.config
    if "input_ids" not in arguments:
        raise ValueError(f"a {kind} reads no text: it has no input_ids")

    def ids(*shape):
        return torch.zeros(*shape, dtype=torch.long, device="meta")

    inputs = dict(input_ids=ids(batch, seq))
    tasks = ("ForSequenceClassification", "ForNextSentencePrediction")
    whole = kind.endswith(tasks)  # a label for each sequence
    if whole and config.problem_type is None:
        config.problem_type = "single_label_classification"  # not for it to guess

    if whole and config.problem_type == "multi_label_classification":
        inputs["labels"] = ids(batch, config.num_labels).float()
    elif "labels" in arguments:
        inputs["labels"] = ids(batch) if whole else ids(batch, seq)
    elif "start_positions" in arguments:
        inputs["start_positions"] = ids(batch)
        inputs["end_positions"] = ids(batch)
    elif config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(batch, seq)

    if "use_cache" in arguments:
        inputs["use_cache"] = False
    return inputs


def loss_of(model, inputs):
    """The model's loss; of a model without a head, a mean that reaches all of it."""
    out = model(**inputs)
    loss = getattr(out, "loss", None)
    return out[0].float().mean() if loss is None else loss


def _run(model, inputs, name, device):
    """{part: bytes} of a training step that finds the optimizer with its state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[name](trained)
    weights = [*model.parameters(), *model.buffers()]
    held = [*weights, *inputs.values()]

    with Tracker(device) as tracker:
        tracker.enter(held)
        loss_of(model, inputs).backward()
    with Tracker(device):
        optimizer.step()  # gives the state

    # No list of the states: a step may put others in their place.
    state = nbytes(_state(optimizer))
    peak = tracker.peak + state
    if (name, device) != ("adamw", "cuda"):  # fused: it makes no tensor at all
        with Tracker(device) as tracker:
            tracker.enter([*held, *(p.grad for p in trained), *_state(optimizer)])
            optimizer.step()
        peak = max(peak, tracker.peak)

    sizes = dict(
        weights=nbytes(weights),
        gradients=nbytes(p.grad for p in trained),
        optimizer=state,
    )
    return sizes | dict(activations=peak - sum(sizes.values()), total=peak)


def _state(optimizer):
    return (t for state in optimizer.state.values() for t in state.values())
