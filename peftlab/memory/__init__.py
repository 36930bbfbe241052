"""What fine-tuning takes in memory, of any shape, on a machine that could not hold it.

    python -m peftlab.memory --config llama-2-7b --method qlora --seq 512 --batch 4

No formula for any architecture: the model is built on torch's meta device, where a
tensor has a shape and no bytes, the method is added, and a training step is run on it
for real: forward, backward, optimizer. What the step would have held is followed from
each storage's birth to its death. It is a second step: the optimizer has its state.

| part | what it is |
|---|---|
| weights | parameters and buffers, the adapter's too, after packing |
| gradients | of what trains, all of them |
| optimizer | its state |
| activations | the highest point of a step above these three: all that comes and goes |

Sequences are whole: no padding, no packing; every token has a label. Gradients are
set to None after a step. A GPU and a CPU differ in four ways, and `device` says whose
are counted. With dropout on its attention a CPU stores the scores, a GPU does not. A
dropout mask has a number for each element on a CPU, on a GPU one byte. AdamW goes
through the weights one by one on a CPU; on a GPU it is the fused one, as transformers'
Trainer has it, and needs nothing but its state. Plain `torch.optim.AdamW` works on all
weights at once there, on one more copy of what trains: "adamw-foreach". And a CPU that
adds or multiplies two dtypes copies one of them to the other's first. Not counted:
the kernels' own workspaces, and what an allocator wastes.

GB are 10^9 bytes, everywhere.
"""

import argparse
import contextlib
import functools
import inspect
import json
import sys
import textwrap
import warnings
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftlab import adam8bit, lora, nf4, qlora
from peftlab.kit import measure

aten, GiB = torch.ops.aten, 2**30
# What torch can see of a card, in GiB, as its own out-of-memory messages say it ("has a
# total capacity of 23.52 GiB"), the smallest that is reported. It is less than the name
# says, and a name's GB is sometimes a GiB. Where the memory corrects errors, as in the
# L4 and the L40S, a part is gone for that.
CARDS = {
    "T4 (16 GB)": 14.56,
    "L4 or A10G (24 GB)": 21.95,
    "RTX 3090 or 4090 (24 GB)": 23.52,
    "RTX 5090 (32 GB)": 31.36,
    "A100 (40 GB)": 39.38,
    "L40S (48 GB)": 44.34,
    "RTX A6000 (48 GB)": 47.40,
    "A100 or H100 (80 GB)": 79.10,
    "H200 (141 GB)": 139.72,
    "B200 (180 GB)": 178.35,
}
# Kept free: CUDA's context takes 0.5 to 0.65 GB, cuBLAS and others want workspaces.
# Then a guess: the allocator rounds up and leaves holes, for which we add a twentieth.
CONTEXT, HOLES = 1e9, 0.05

DTYPES = {str(t)[6:]: t for t in (torch.float32, torch.bfloat16, torch.float16)}
METHODS = {"full": None, "lora": lora.add, "qlora": qlora.add}
DEVICES = ("cuda", "cpu")
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw-foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw8bit": adam8bit.Adam8bit,
    "sgd": torch.optim.SGD,
}


def step(
    config,
    method="lora",
    r=None,
    targets=None,
    seq=512,
    batch=1,
    dtype=None,
    optimizer="adamw",
    checkpointing=False,
    double_quant=None,
    device="cuda",
):
    """What a training step takes, in bytes; a dict.

    config: a name in SHAPES, a config.json or a folder that has one, or a transformers
    config. method: "full", "lora" (the base in dtype, A and B in float32) or "qlora"
    (its linears in NF4, the rest of the base in bfloat16, A and B in float32). r: 16 by
    default; targets: names of linears, by default "all-linear". seq, batch: tokens,
    sequences. dtype: of the weights, by default "float32" for full (16 bytes a
    parameter with AdamW), "bfloat16" for lora. optimizer: one of OPTIMIZERS.
    checkpointing: activations are counted again in the backward pass, layer by layer.
    double_quant: of qlora, on by default. device: "cuda" or "cpu", whose attention,
    dropout and AdamW are counted.

    Returns weights, gradients, optimizer, activations and their sum, total; trainable
    and parameters, which are numbers, not bytes, the base counted before it is packed;
    and gpu, what `fits` says of the total. A weight that no gradient reaches, such as a
    reader of images where there are none, has no gradient and no state. Raises
    ValueError for a name that is not there, a combination that cannot be, and a model
    that does not run without data."""
    config, settings = load(config), _settings(method, r, targets, dtype, double_quant)
    _check(seq, batch, optimizer, checkpointing, device)
    with _quiet(), _as_on(device):
        model, base = _build(config, method, **settings)
        _check_length(model, seq)
        with _one_sentence(f"a {type(model).__name__} does not run without data"):
            inputs = _inputs(model, batch, seq)
            if checkpointing:
                model.activation_checkpointing_enable()
            found = _run(model, inputs, optimizer, device)
    trainable = measure.parameters(model)[0]
    total = base if method == "full" else base + trainable
    numbers = dict(trainable=trainable, parameters=total)
    return found | numbers | dict(gpu=fits(found["total"]))


def fits(total):
    """The smallest common card that holds so many bytes, with what CUDA takes and a
    twentieth more: its name in CARDS; None where none does."""
    if not isinstance(total, int | float) or not total >= 0:
        raise ValueError(f"bytes are a number of at least 0, not {total!r}")
    held = total * (1 + HOLES) + CONTEXT
    return next((card for card, size in CARDS.items() if held <= size * GiB), None)


def _settings(method, r, targets, dtype, double_quant):
    """{dtype, and what goes to the method's add}; ValueError for what cannot be."""
    _one_of("method", method, METHODS)
    if method == "full":
        for name, value in dict(r=r, targets=targets).items():
            if value is not None:
                raise ValueError(f"full trains everything: {name} is of lora and qlora")
    if method == "qlora" and dtype is not None:
        raise ValueError("qlora packs bfloat16 weights: dtype is of full and lora")
    if method != "qlora" and double_quant is not None:
        raise ValueError(f"{method} packs no weights: double_quant is of qlora")
    dtype = str(dtype)[6:] if isinstance(dtype, torch.dtype) else dtype
    if dtype is None:
        dtype = "float32" if method == "full" else "bfloat16"
    _one_of("dtype", dtype, DTYPES)
    found = dict(dtype=DTYPES[dtype])
    if method != "full":
        targets = "all-linear" if targets is None else targets
        found |= dict(r=16 if r is None else r, targets=targets)
    if method == "qlora":
        found |= dict(double_quant=double_quant is not False)
    return found


def _check(seq, batch, optimizer, checkpointing, device):
    for name, n in dict(seq=seq, batch=batch).items():
        if type(n) is not int or n < 1:
            raise ValueError(f"{name} must be a whole number from 1 up, not {n!r}")
    if type(checkpointing) is not bool:
        raise ValueError(f"checkpointing must be True or False, not {checkpointing!r}")
    _one_of("optimizer", optimizer, OPTIMIZERS)
    _one_of("device", device, DEVICES)


def _one_of(what, name, there):
    if not isinstance(name, str) or name not in there:
        raise ValueError(f"no {what} {name!r}; there are: {', '.join(there)}")


def _build(config, method, dtype, **settings):
    """A model on the meta device with its method, and the base's parameters."""
    with _one_sentence(f"no model can be built of this {type(config).__name__}"):
        model = measure._on_meta(config, dtype, None).train()
    base, add = measure.parameters(model)[1], METHODS[method]
    # Without data a weight may be packed in one piece, and to any type: it is quicker.
    with mock.patch.multiple(nf4, CHUNK=2**62, DYNAMIC=nf4.NF4):
        with _one_sentence(f"{method} cannot be added to a {type(model).__name__}"):
            return (add(model, **settings) if add else model), base


def _check_length(model, seq):
    """ValueError where the model has fewer positions than that, and where it would find
    out only with data; no T5 has a limit."""
    parts = ["text_config", "text_encoder", "encoder", "decoder"]
    configs = [model.config, *(getattr(model.config, part, None) for part in parts)]
    limits = []
    for heads, shared, *positions in map(_numbers, configs):
        if heads and shared and heads % shared:
            raise ValueError(
                f"{heads} attention heads cannot share {shared} keys and values"
            )
        limits += filter(None, positions)
    most = min(limits, default=seq)
    for name, m in model.named_modules():
        # RoBERTa's table starts with the padding's row, and the text comes after it.
        if name.endswith("position_embeddings") and hasattr(m, "padding_idx"):
            most -= 0 if m.padding_idx is None else m.padding_idx + 1
    if limits and most < seq:
        raise ValueError(f"seq {seq} is longer than the model's maximum, {most}")


def _numbers(config):
    """Heads, those of keys and values, and all limits of positions, None for none."""
    names = ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    names += [f"max_{end}_position_embeddings" for end in ("encoder", "decoder")]
    found = (getattr(config, name, None) for name in [*names, "max_target_positions"])
    return [n if type(n) is int and n > 0 else None for n in found]


# Whose step is counted


class Ledger(TorchDispatchMode):
    """Bytes alive, `live`, and their highest point, `peak`: every storage that an
    operation returns is written down, and struck off when it is freed.

    What asks about values, which are not there, gets an answer as for whole sequences
    and small numbers: "are all?" yes, "is any?" no, "below?" yes, "above?" no."""

    ANSWERS = {aten.all: True, aten.any: False, aten.lt: True, aten.gt: False}
    ARITHMETIC = (aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_)
    ARITHMETIC += (aten.div, aten.div_)
    INTO_ZEROS = (aten.scatter_add, aten.index_put, aten.index_add)

    def __init__(self, device="cpu"):
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self.open = {}  # {a storage's address: a reference that does not keep it alive}

    def enter(self, things):
        for tensor in things:
            if not isinstance(tensor, torch.Tensor):
                continue
            store = tensor.untyped_storage()
            if (key := store._cdata) not in self.open:
                size = store.nbytes()
                self.live += size
                gone = functools.partial(self._close, key, size)
                self.open[key] = weakref.ref(store, gone)

    def _close(self, key, size, _):
        self.live -= size
        del self.open[key]

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is aten._local_scalar_dense.default and hasattr(args[0], "answer"):
            return args[0].answer
        self.peak = max(self.peak, self.live)
        result = operation(*args, **(kwargs or {}))
        if (question := operation.overloadpacket) in self.ANSWERS:
            result.answer = self.ANSWERS[question]
        self.enter(tree_leaves(result))
        # Autograd adds a second gradient to the first in place, if that is no view, and
        # what was picked out to zeros; not where it is watched: look only once the two
        # are gone.
        second = operation is aten.add.Tensor or question in self.INTO_ZEROS
        if torch.is_grad_enabled() or not second or args[0]._is_view():
            self.peak = max(self.peak, self.live + self._copies(question, args, result))
        return result

    def _copies(self, operation, args, result):
        """A CPU copies what has not the dtype that it reckons in; a GPU casts as it
        reads."""
        two = [t for t in args if isinstance(t, torch.Tensor) and t.dim()]
        if self.device != "cpu" or operation not in self.ARITHMETIC or len(two) < 2:
            return 0
        common = torch.promote_types(*(t.dtype for t in two))
        copied = [t.numel() for t in (*two, result) if t.dtype != common]
        return sum(copied) * common.itemsize


def _run(model, inputs, name, device):
    """The bytes of a training step's parts, the optimizer's state being there."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[name](trained)
    held = [*model.parameters(), *model.buffers(), *inputs.values()]
    with Ledger(device) as ledger:
        ledger.enter(held)
        _loss(model, inputs).backward()
    with Ledger(device):
        optimizer.step()  # gives the state
    weights, gradients = _held(held[: -len(inputs)]), _held(p.grad for p in trained)
    # No list of the states: a step may put others in their place.
    state = _held(_state(optimizer))
    peak = ledger.peak + state
    if (name, device) != ("adamw", "cuda"):  # fused: it makes no tensor at all
        with Ledger(device) as ledger:
            ledger.enter([*held, *(p.grad for p in trained), *_state(optimizer)])
            optimizer.step()
        peak = max(peak, ledger.peak)
    sizes = dict(weights=weights, gradients=gradients, optimizer=state)
    return sizes | dict(activations=peak - sum(sizes.values()), total=peak)


def _state(optimizer):
    return (t for state in optimizer.state.values() for t in state.values())


def _held(things):
    ledger = Ledger()
    ledger.enter(things)
    return ledger.live


def _loss(model, inputs):
    out = model(**inputs)
    loss = getattr(out, "loss", None)
    return out[0].float().mean() if loss is None else loss  # a model without a head


def _inputs(model, batch, seq):
    """What the model's forward is called with: tokens, and labels where it has some."""
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        raise ValueError(f"a {type(model).__name__} reads no text: it has no input_ids")

    def ids(*shape):
        return torch.zeros(*shape, dtype=torch.long, device="meta")

    inputs = dict(input_ids=ids(batch, seq))
    tasks = ("ForSequenceClassification", "ForNextSentencePrediction")
    one = type(model).__name__.endswith(tasks)
    if one and model.config.problem_type is None:
        model.config.problem_type = "single_label_classification"  # not for it to guess
    if one and model.config.problem_type == "multi_label_classification":
        inputs["labels"] = ids(batch, model.config.num_labels).float()
    elif "labels" in takes:
        inputs["labels"] = ids(batch) if one else ids(batch, seq)
    elif "start_positions" in takes:
        inputs |= dict(start_positions=ids(batch), end_positions=ids(batch))
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(batch, seq)
    return inputs | (dict(use_cache=False) if "use_cache" in takes else {})


@contextlib.contextmanager
def _as_on(device):
    """Meta tensors take the paths that tensors with memory take."""
    from transformers import masking_utils

    with contextlib.ExitStack() as stack:

        def patch(*args, **more):
            stack.enter_context(mock.patch.object(*args, **more))

        attention = functional.scaled_dot_product_attention
        swap = functools.partial(_attention, attention, device)
        patch(functional, "scaled_dot_product_attention", swap)
        if device == "cuda":
            swap = functools.partial(_dropout, functional.dropout)
            patch(functional, "dropout", swap)
        # It sums and compares; the ledger knows an answer to `all` alone.
        patch(masking_utils, "fast_all", torch.all, create=True)
        # On meta it is there for bfloat16 alone; experts share the tokens evenly.
        patch(functional, "grouped_mm", _grouped_mm, create=True)
        yield


def _attention(original, device, q, k, v, attn_mask=None, dropout_p=0.0, *a, **more):
    """On meta torch would store the matrix of scores; hardware seldom does."""
    learned = attn_mask is not None and attn_mask.requires_grad
    stores = device == "cpu" and (dropout_p or learned or q.shape[-1] != v.shape[-1])
    shared = q.shape[:-2] != k.shape[:-2] and not more.get("enable_gqa")  # Falcon's
    if stores or shared or not q.is_meta or q.dim() != 4:
        return original(q, k, v, attn_mask, dropout_p, *a, **more)
    return (_learned if learned else _flash)(q, k, v, attn_mask, *a, **more)


def _flash(q, k, v, mask, is_causal=False, scale=None, enable_gqa=False):
    """Keeps the result and one float32 a row, and makes the scores again later."""
    if mask is not None and mask.dtype == torch.bool:
        ends = torch.zeros(2, dtype=q.dtype, device=q.device)  # 0 and -inf
        mask = torch.where(mask, ends[0], ends[1])
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]


def _learned(q, k, v, bias, is_causal=False, scale=None, enable_gqa=False):
    """The kernel that has a gradient for a bias on the scores, such as T5's."""
    bias = bias.expand(*q.shape[:3], k.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, bias, True, 0.0, is_causal, scale=scale)[0]


def _dropout(original, input, p=0.5, training=True, inplace=False):
    """A GPU keeps its mask in booleans."""
    if inplace or not (input.is_meta and training and p):
        return original(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _grouped_mm(x, weights, offs=None, **more):
    """A mixture's product, (n, in) and (experts, in, out) -> (n, out): of that size."""
    return x @ weights[0]


@contextlib.contextmanager
def _quiet():
    """Nothing on stderr but our own sentence."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def _one_sentence(what):
    """Whatever goes wrong in code that is not ours is said in one."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise
        raise ValueError(f"{what}: {_line(error)}") from error


def _line(error):
    return textwrap.shorten(str(error), 160).rstrip(".")


# The shapes: published sizes, no weights


def load(config):
    """A transformers config: of a name in SHAPES, a config.json, a folder that has one.

    Nothing is fetched. Raises ValueError, with the names that exist, for another one,
    and for a file that is not a config that transformers itself can build."""
    import transformers as tf

    if isinstance(config, tf.PreTrainedConfig):
        return config
    if not isinstance(config, str | Path):
        raise ValueError(f"a config is a name, a path or a config, not {config!r}")
    if config in SHAPES:
        return SHAPES[config]()
    try:
        path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        if path.is_file():
            return _read(path)
    except OSError as error:
        raise ValueError(f"{config} cannot be read: {error.strerror}") from error
    there = ", ".join(SHAPES)
    raise ValueError(
        f"no config {str(config)!r}: a config.json, a folder that has one, or one of "
        f"{there}"
    )


def _read(path):
    from transformers import CONFIG_MAPPING, __version__

    try:
        content = json.loads(path.read_text(encoding="utf8"), object_hook=_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {_line(error)}") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{path} is no model's config: it has no model_type")
    if "auto_map" in content:
        raise ValueError(f"{path} needs code of its own (auto_map), which is not run")
    if kind not in CONFIG_MAPPING:
        known = f"{len(CONFIG_MAPPING.keys())} types, such as llama, gpt2, bert and t5"
        raise ValueError(
            f"{path}: transformers {__version__} knows no model type {kind!r}; it "
            f"knows {known}"
        )
    content.pop("quantization_config", None)  # the method says what is packed
    with _quiet(), _one_sentence(f"{path} is not a valid config"):
        return CONFIG_MAPPING[kind].from_dict(content)


def _number(content):
    """JSON has no infinity; transformers writes {"__float__": "Infinity"}."""
    return float(content["__float__"]) if [*content] == ["__float__"] else content


def _shapes():
    """{name: a function that makes its config}: configs are slow to make."""

    def encoder(kind, width, layers, **more):
        def make():
            import transformers as tf

            sizes = dict(hidden_size=width, num_hidden_layers=layers)
            sizes |= dict(num_attention_heads=width // 64, intermediate_size=4 * width)
            # Fine-tuned as a classifier of two classes.
            named = [f"{kind}ForSequenceClassification"]
            return getattr(tf, f"{kind}Config")(architectures=named, **sizes, **more)

        return make

    def config(kind, **sizes):
        def make():
            import transformers as tf

            return getattr(tf, f"{kind}Config")(**sizes)

        return make

    def gpt2(width, layers):
        return config("GPT2", n_embd=width, n_layer=layers, n_head=width // 64)

    def t5(width, layers, inner, heads):  # 1.1; transformers 5 ties its head, too
        sizes = dict(d_model=width, d_ff=inner, num_layers=layers, num_heads=heads)
        sizes |= dict(d_kv=64, vocab_size=32128, tie_word_embeddings=False)
        sizes |= dict(decoder_start_token_id=0)
        return config("T5", feed_forward_proj="gated-gelu", **sizes)

    def llama(width, layers, inner, positions=2048, kv_heads=None, vocab=32000):
        sizes = dict(hidden_size=width, intermediate_size=inner, vocab_size=vocab)
        sizes |= dict(num_attention_heads=width // 128, num_key_value_heads=kv_heads)
        sizes |= dict(num_hidden_layers=layers, max_position_embeddings=positions)
        return config("Llama", **sizes)

    words = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    # GPT-3 was never published: its sizes in OPT's modules, which are GPT-2's but for
    # query, key and value, here three layers.
    gpt3 = dict(vocab_size=50257, max_position_embeddings=2048, hidden_size=12288)
    gpt3 |= dict(num_hidden_layers=96, num_attention_heads=96, ffn_dim=4 * 12288)
    tiny = Path(measure.__file__).parents[1] / "models" / "tiny-decoder" / "config.json"
    return {
        "bert-base": encoder("Bert", 768, 12),
        "bert-large": encoder("Bert", 1024, 24),
        "roberta-base": encoder("Roberta", 768, 12, **words),
        "roberta-large": encoder("Roberta", 1024, 24, **words),
        "gpt2": gpt2(768, 12),
        "gpt2-medium": gpt2(1024, 24),
        "gpt2-large": gpt2(1280, 36),
        "gpt2-xl": gpt2(1600, 48),
        "t5-small": t5(512, 8, 1024, 6),
        "t5-base": t5(768, 12, 2048, 12),
        "t5-large": t5(1024, 24, 2816, 16),
        "t5-xl": t5(2048, 24, 5120, 32),
        "t5-xxl": t5(4096, 24, 10240, 64),
        "llama-7b": llama(4096, 32, 11008),
        "llama-13b": llama(5120, 40, 13824),
        "llama-33b": llama(6656, 60, 17920),
        "llama-65b": llama(8192, 80, 22016),
        "llama-2-7b": llama(4096, 32, 11008, 4096),
        "llama-2-13b": llama(5120, 40, 13824, 4096),
        "llama-2-70b": llama(8192, 80, 28672, 4096, kv_heads=8),
        "llama-3-8b": llama(4096, 32, 14336, 8192, kv_heads=8, vocab=128256),
        "llama-3-70b": llama(8192, 80, 28672, 8192, kv_heads=8, vocab=128256),
        "gpt-3": config("OPT", word_embed_proj_dim=12288, **gpt3),
        "tiny-decoder": functools.partial(_read, tiny),
    }


SHAPES = _shapes()


# The command


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # without the usage, which is longer than the sentence
        self.exit(2, f"{message}\n")


def _parser():
    parser = _Parser(
        prog="python -m peftlab.memory",
        description="What fine-tuning takes, in GB of 10^9 bytes, and the smallest "
        "common GPU that holds it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    there = ", ".join(SHAPES)
    add("--config", required=True, help=f"a config.json, its folder, or one of {there}")
    add("--method", default="lora", help=", ".join(METHODS))
    add("--r", type=int, help="LoRA's rank, 16 by default")
    add("--targets", help="linears by name, with commas; all of them by default")
    add("--seq", type=int, default=512, help="tokens of a sequence")
    add("--batch", type=int, default=1, help="sequences of a step")
    add("--dtype", help=f"of the weights: {', '.join(DTYPES)}")
    add("--optimizer", default="adamw", help=", ".join(OPTIMIZERS))
    add("--checkpointing", action="store_true", help="activation checkpointing")
    add("--double-quant", action=argparse.BooleanOptionalAction, help="of qlora; on")
    add("--device", default="cuda", help="whose step is counted: cuda, cpu")
    add("--json", action="store_true", help="bytes as JSON")
    return parser


def report(found):
    """The parts as lines of text, in GB of 10^9 bytes."""
    parts = "weights", "gradients", "optimizer", "activations", "total"
    lines = [f"{part:12}{found[part] / 1e9:10.2f} GB" for part in parts]
    share = found["trainable"] / found["parameters"]
    numbers = f"{found['trainable']:,} of {found['parameters']:,} ({share:.2%})"
    gpu = found["gpu"] or f"none of them; the largest is the {[*CARDS][-1]}"
    return "\n".join([*lines, f"{'trains':12}{numbers}", f"{'fits':12}{gpu}"])


def main(arguments=None):
    """The command line; returns the exit status, 2 where the input is wrong."""
    options = vars(_parser().parse_args(arguments))
    as_json = options.pop("json")
    if options["targets"] not in (None, "all-linear"):
        options["targets"] = options["targets"].split(",")
    try:
        found = step(**options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if as_json else report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
