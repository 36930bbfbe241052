"""A training step on the meta device, and the bytes that it would have held.

The model is built, the method is added, and the step is run for real: forward,
backward, optimizer. It is a second step: the optimizer has its state. Inference is a
forward pass and no more.
"""

import contextlib
import functools
import inspect

import torch
from torch.nn.modules import module

from peftlab import adam8bit, int8, lora, qlora, surgery
from peftlab.kit import measure

from . import zero as sharding
from .cards import fits
from .messages import check_one_of, check_whole, one_sentence, quiet, shown
from .shapes import load
from .tracker import Tracker, as_on, nbytes

DTYPES = {str(t)[6:]: t for t in (torch.float32, torch.bfloat16, torch.float16)}


def add_lora8bit(model, targets, r):
    """LoRA over linears in 8 bits, all but the head: peft's over `load_in_8bit`."""
    linears = surgery.select(model, "all-linear")
    packed = {layer: int8.Int8Linear(layer) for layer in linears}
    lora.add(model, targets, r)
    surgery.swap(model, packed)
    return model


METHODS = {
    "full": None,
    "lora": lora.add,
    "lora8bit": add_lora8bit,
    "qlora": qlora.add,
    "inference": None,
}
LORAS = ("lora", "lora8bit", "qlora")
PACKED = ("lora8bit", "qlora")
DEVICES = ("cuda", "cpu")
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw-foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw8bit": adam8bit.Adam8bit,
    "sgd": torch.optim.SGD,
}
PARTS = ("weights", "gradients", "optimizer", "activations")
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
    kbit_prepared=None,
    gpus=1,
    zero=0,
):
    """What a training step takes on each GPU, or inference, in bytes.

    Args:
        config: a name in SHAPES, a `config.json` or a folder that has one, or a
            transformers config.
        method: "full", "lora" (the base in `dtype`, A and B in float32), "lora8bit" or
            "qlora" (its linears in 8 bits or in NF4, the rest of the base in bfloat16,
            A and B in float32), or "inference": one pass over all the tokens, without
            gradients, that fills the KV cache and gives the last token's logits. A
            generation that ends at `seq` tokens takes no more.
        r: LoRA's rank, 16 by default.
        targets: names of linears, by default "all-linear".
        seq: tokens of a sequence, by default 512, or the model's maximum if it is less.
        batch: sequences of a step, on each GPU.
        dtype: of the weights, by default "float32" for full (16 bytes a parameter with
            AdamW), "bfloat16" for lora and inference.
        optimizer: one of OPTIMIZERS.
        checkpointing: whether activations are computed again in the backward pass,
            layer by layer.
        double_quant: of qlora, on by default.
        device: "cuda" or "cpu", whose attention, dropout and AdamW are counted.
        kbit_prepared: of lora8bit and qlora, off by default: whether peft's
            `prepare_model_for_kbit_training` has made float32 of all that is not
            packed: embedding, norms, head and biases.
        gpus: how many share the work.
        zero: the level at which they divide what they hold, 0 to 3: see `shard`.

    Returns:
        A dict. Bytes: weights, gradients, optimizer, activations and their sum, total.
        Numbers: trainable and parameters, the base counted before it is packed. And
        gpu: what `fits` says of the total. With several GPUs the bytes are each one's,
        and the numbers the whole model's. A weight that no gradient reaches, such as a
        reader of images where there are none, has no gradient and no state.

    Raises:
        ValueError: for a name that is not there, a size that cannot be or that nobody
            has, a combination that cannot be, and a model that does not run without
            data.
    """
    settings = method_settings(method, r, targets, dtype, double_quant, kbit_prepared)
    check(seq, batch, optimizer, checkpointing, device)
    check_sharing(method, checkpointing, gpus, zero)
    config = load(config)

    with quiet(), as_on(device):
        model, base = build(config, method, **settings)
        seq = _length(model, seq)
        with one_sentence(f"a {type(model).__name__} does not run without data"):
            inputs = make_inputs(model, batch, seq)
            if checkpointing:
                enable_checkpointing(model)
            found = run(model, inputs, optimizer, device)

    sizes = shared(found, gpus, zero)
    trainable = measure.parameters(model)[0]
    parameters = base + trainable if method in LORAS else base
    sizes |= dict(trainable=trainable, parameters=parameters)
    bfloat16 = settings["dtype"] == torch.bfloat16
    return sizes | dict(gpu=fits(sizes["total"], bfloat16))


def default_seq(config):
    """The tokens of a sequence that `step` takes where nothing is said."""
    with quiet(), as_on("cuda"):
        model, _ = build(load(config), "full", dtype=torch.float32)
        return _length(model, None)


# What is asked for


def method_settings(method, r, targets, dtype, double_quant, kbit_prepared=None):
    """The base's dtype and what goes to the method's `add`, by name.

    Raises:
        ValueError: for a combination that cannot be.
    """
    check_one_of("method", method, METHODS)
    if method not in LORAS:
        what = "everything" if method == "full" else "nothing"
        for name, value in dict(r=r, targets=targets).items():
            if value is not None:
                raise ValueError(
                    f"{method} trains {what}: {name} is of lora, lora8bit and qlora"
                )
    if method in PACKED and dtype is not None:
        raise ValueError(
            f"{method} packs bfloat16 weights: dtype is of full, lora and inference"
        )
    if method != "qlora" and double_quant is not None:
        raise ValueError(f"{method} packs no weights twice: double_quant is of qlora")
    if method not in PACKED and kbit_prepared is not None:
        raise ValueError(
            f"{method} packs no weights: kbit_prepared is of lora8bit and qlora"
        )

    if isinstance(dtype, torch.dtype):
        dtype = str(dtype)[6:]
    if dtype is None:
        dtype = "float32" if method == "full" else "bfloat16"
    check_one_of("dtype", dtype, DTYPES)

    settings = dict(dtype=DTYPES[dtype])
    if method in LORAS:
        settings["r"] = 16 if r is None else r
        settings["targets"] = "all-linear" if targets is None else targets
        check_whole("the rank r", settings["r"], 10**5)
        _check_targets(settings["targets"])
    if method == "qlora":
        double_quant = True if double_quant is None else double_quant
        _check_bool("double_quant", double_quant)
        settings["double_quant"] = double_quant
    if kbit_prepared is not None:
        _check_bool("kbit_prepared", kbit_prepared)
        settings["kbit_prepared"] = kbit_prepared
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


def check(seq, batch, optimizer, checkpointing, device):
    if seq is not None:
        check_whole("seq", seq, MOST_TOKENS)
    check_whole("batch", batch, MOST_SEQUENCES)
    _check_bool("checkpointing", checkpointing)
    check_one_of("optimizer", optimizer, OPTIMIZERS)
    check_one_of("device", device, DEVICES)


def check_sharing(method, checkpointing, gpus, zero):
    sharding.check(gpus, zero)
    if method == "inference" and checkpointing:
        raise ValueError("inference has no backward pass: checkpointing is of training")
    if method == "lora8bit" and zero == 3:
        raise ValueError(
            "zero 3 divides floats, which 8-bit weights are not: take qlora, whose 4 "
            "bits can be stored as floats, or level 2"
        )


def _check_bool(what, value):
    if type(value) is not bool:
        raise ValueError(f"{what} must be True or False, not {shown(value)}")


# The model


def build(config, method, dtype, kbit_prepared=False, **settings):
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
    if method == "inference":
        model.eval().requires_grad_(False)
    if kbit_prepared:
        prepare_for_kbit_training(model)
    return model, base


def prepare_for_kbit_training(model):
    """float32 for all parameters of 16 bits: what peft's function does to the bytes."""
    for p in model.parameters():
        if p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()


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

    return length(seq, _most_positions(model, configs))


def length(seq, most):
    """Tokens of a sequence: `seq`, or the default where that is None.

    Raises:
        ValueError: for more than the model has positions.
    """
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
    """What the model's forward is called with: tokens, and labels where it has some.

    In inference it has none, and as in `generate` the KV cache is filled and one token
    has logits.
    """
    arguments = inspect.signature(model.forward).parameters
    kind = type(model).__name__
    config = model.config
    if "input_ids" not in arguments:
        raise ValueError(f"a {kind} reads no text: it has no input_ids")

    def ids(*shape):
        return torch.zeros(*shape, dtype=torch.long, device="meta")

    inputs = dict(input_ids=ids(batch, seq))
    if not model.training:
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids(batch, seq)
        others = dict(use_cache=True, logits_to_keep=1)
        return inputs | {k: v for k, v in others.items() if k in arguments}

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


def pass_through(model, inputs):
    """Forward and backward; in inference, forward."""
    if model.training:
        loss_of(model, inputs).backward()
    else:
        with torch.no_grad():
            model(**inputs)


def run(model, inputs, name, device, tracker=None):
    """What a step takes whose optimizer has its state already, in bytes.

    Returns:
        A dict: weights, gradients, optimizer; block, the largest of the model; and what
        comes on top of those three: whole in forward and backward, alone in them less
        the gradients that are made by then, update in the optimizer's step, of which
        inputs is not its own.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [*model.parameters(), *model.buffers()]
    held = [*weights, *inputs.values()]

    tracker = tracker or Tracker(device)
    with tracker:
        tracker.enter(held)
        pass_through(model, inputs)
    gradients = [p.grad for p in trained if p.grad is not None]
    sizes = dict(weights=nbytes(weights), gradients=nbytes(gradients))
    state, update = update_of(trained, held, name, device)

    return sizes | dict(
        optimizer=state,
        block=max(sharding.block_sizes(model)),
        whole=tracker.peak - sum(sizes.values()),
        alone=tracker.peak_without(gradients) - sizes["weights"],
        update=update,
        inputs=nbytes(inputs.values()),
    )


def update_of(trained, held, name, device):
    """Bytes of the optimizer's state, and the most that its second step makes."""
    if not trained:
        return 0, 0
    optimizer = OPTIMIZERS[name](trained)
    with Tracker(device):
        optimizer.step()  # gives the state

    # No list of the states: a step may put others in their place.
    state = nbytes(_state(optimizer))
    if (name, device) == ("adamw", "cuda"):  # fused: it makes no tensor at all
        return state, 0
    with Tracker(device) as tracker:
        tracker.enter([*held, *(p.grad for p in trained), *_state(optimizer)])
        start = tracker.live
        optimizer.step()
    return state, max(tracker.peak - start, 0)


def shared(found, gpus, zero):
    """{part: bytes} on each of several GPUs, of what `run` returns or a table has."""
    parts = (found["weights"], found["gradients"], found["optimizer"])
    sizes = dict(zip(PARTS, sharding.shard(*parts, gpus, zero), strict=False))

    update = found["update"]
    if zero >= 1:  # of a share of the weights
        update = -(-update // gpus)
    computing = found["alone"] if zero >= 2 else found["whole"]
    sizes["activations"] = max(computing, found["inputs"] + update)
    if zero == 3:
        sizes["activations"] += found["block"]
    return sizes | dict(total=sum(sizes.values()))


def _state(optimizer):
    return (t for state in optimizer.state.values() for t in state.values())
