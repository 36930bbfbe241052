"""Models as sizes alone: those known by name, and any config.json.

Nothing is fetched and no code but transformers' own is run. A config that no model can
have (negative sizes, a dropout of 7, a million layers) is refused before anything is
built of it.
"""

import json
import math
import re
from pathlib import Path

from .messages import one_line, one_sentence, quiet, shown

MODELS = Path(__file__).parents[1] / "models"
MOST_BYTES = 10**7  # of a config.json; those with a thousand labels have 10^5
# More than anyone has. What is nested inside, such as "text_config", is checked too.
LIMITS = {
    r"(num|n)_.*layers?|n_layer|.*(encoder|decoder)_layers|depth": 1_000,
    r"hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim": 100_000,
    r"intermediate_size|d_ff|ffn_dim|n_inner|head_dim|d_kv": 10**6,
    r"(num|n)_.*heads?|n_head|.*attention_heads": 10_000,
    r"vocab_size": 10**8,
    r"(num|n)_.*experts|num_labels": 100_000,
}
# These have to be there at least once. A model may well have no dense layers.
AT_LEAST_ONE = (
    "hidden_size d_model n_embd num_hidden_layers n_layer num_attention_heads n_head "
    "num_key_value_heads vocab_size intermediate_size d_ff d_kv"
).split()
NOT_SIZES = {"id2label", "label2id", "quantization_config"}


# By name


def encoder(kind, width, layers, **more):
    """BERT or RoBERTa, fine-tuned as a classifier of two classes."""
    return config(
        kind,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        architectures=[f"{kind}ForSequenceClassification"],
        **more,
    )


def gpt2(width, layers):
    return config("GPT2", n_embd=width, n_layer=layers, n_head=width // 64)


def t5(width, layers, inner, heads):
    """T5 1.1; transformers 5 ties its head, too."""
    return config(
        "T5",
        d_model=width,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        d_kv=64,
        vocab_size=32128,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )


def llama(width, layers, inner, positions=2048, kv_heads=None, vocab=32000):
    return config(
        "Llama",
        hidden_size=width,
        intermediate_size=inner,
        vocab_size=vocab,
        num_attention_heads=width // 128,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        max_position_embeddings=positions,
    )


def mistral():
    """Mistral-7B-v0.2, without the sliding window of the first version."""
    return config(
        "Mistral",
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=32000,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=32,
        max_position_embeddings=32768,
        sliding_window=None,
    )


def qwen2(width, layers, inner, heads, kv_heads, vocab, **more):
    return config(
        "Qwen2",
        hidden_size=width,
        intermediate_size=inner,
        vocab_size=vocab,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        max_position_embeddings=32768,
        **more,
    )


def gpt3():
    """Never published: GPT-3's sizes in OPT's modules.

    They are GPT-2's but for query, key and value, which are three layers here.
    """
    return config(
        "OPT",
        vocab_size=50257,
        max_position_embeddings=2048,
        hidden_size=12288,
        word_embed_proj_dim=12288,
        num_hidden_layers=96,
        num_attention_heads=96,
        ffn_dim=4 * 12288,
    )


def config(kind, **sizes):
    """A function that makes the config: transformers is slow to import."""

    def make():
        import transformers as tf

        return getattr(tf, f"{kind}Config")(**sizes)

    return make


def shipped(name):
    """One that lies in peftlab/models."""
    return lambda: read(MODELS / name / "config.json")


ROBERTA = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
SHAPES = {
    "bert-base": encoder("Bert", 768, 12),
    "bert-large": encoder("Bert", 1024, 24),
    "roberta-base": encoder("Roberta", 768, 12, **ROBERTA),
    "roberta-large": encoder("Roberta", 1024, 24, **ROBERTA),
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
    "mistral-7b": mistral(),
    "qwen2.5-0.5b": qwen2(896, 24, 4864, 14, 2, vocab=151936, tie_word_embeddings=True),
    "qwen2.5-7b": qwen2(3584, 28, 18944, 28, 4, vocab=152064),
    "gpt-3": gpt3(),
    "tiny-decoder": shipped("tiny-decoder"),
}


# From a file


def load(config):
    """A transformers config.

    Args:
        config: a name in SHAPES, a `config.json` or a folder that has one, or a
            transformers config, which is checked and returned as it is.

    Returns:
        The config.

    Raises:
        ValueError: with the names that exist, for another name; for a file that is not
            a config that transformers itself can build; and for sizes that cannot be or
            that nobody has.
    """
    import transformers as tf

    if isinstance(config, tf.PreTrainedConfig):
        _check_content(config.to_dict())
        return config
    if not isinstance(config, str | Path):
        raise ValueError(f"a config is a name, a path or a config, not {shown(config)}")
    if config in SHAPES:
        return SHAPES[config]()

    name = shown(str(config))
    path = Path(config)
    try:
        if path.is_dir():
            path = path / "config.json"
        if path.is_file():
            return read(path)
        if path.exists():
            raise ValueError(f"{name} is no regular file, so no config.json")
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error

    names = ", ".join(SHAPES)
    raise ValueError(
        f"no config {name}: a config.json, a folder that has one, or one of {names}"
    )


def read(path):
    """The config that a file has; ValueError for one that transformers cannot build."""
    from transformers import CONFIG_MAPPING

    name = shown(str(path))
    content = _read_json(path, name)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{name} is no model's config: it has no model_type")
    _check_known(content, name)

    with one_sentence(f"{name} is not a valid config"):
        _check_content(content)
    content = _plain(content)
    with quiet(), one_sentence(f"{name} is not a valid config"):
        config = CONFIG_MAPPING[kind].from_dict(content)
        _check_content(config.to_dict())
    return config


def _read_json(path, name):
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name} is no config.json: it has over {MOST_BYTES:,} bytes")

    try:
        return json.loads(data.decode("utf8"), object_hook=_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {one_line(error)}") from error


def _number(content):
    """JSON has no infinity; transformers writes {"__float__": "Infinity"}."""
    return float(content["__float__"]) if [*content] == ["__float__"] else content


def _check_known(content, name):
    """ValueError for what transformers alone, without code from elsewhere, lacks."""
    import transformers as tf

    kind = content["model_type"]
    classes = content.get("architectures") or []
    lacks = [c for c in classes if not hasattr(tf, str(c))]
    if "auto_map" in content and (kind not in tf.CONFIG_MAPPING or lacks):
        raise ValueError(f"{name} needs code of its own (auto_map), which is not run")

    if kind not in tf.CONFIG_MAPPING:
        known = len(tf.CONFIG_MAPPING.keys())
        raise ValueError(
            f"{name}: transformers {tf.__version__} knows no model type {shown(kind)}; "
            f"it knows {known} types, such as llama, gpt2, bert and t5"
        )


def _plain(content):
    """Without what says how a model is stored, or by whose code and kernels it runs."""
    others = {"quantization_config", "auto_map"}
    others |= {"attn_implementation", "_attn_implementation"}
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in others
    }


def _check_content(content):
    """ValueError for a setting that no model can have, or that none has."""
    for name, value in content.items():
        name = str(name)
        if isinstance(value, dict):
            if name not in NOT_SIZES:
                _check_content(value)
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name} is not a number")
        elif "drop" in name:
            _check_share(name, value)
        else:
            _check_size(name, value)


def _check_share(name, value):
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    if numbers and not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, not {shown(value)}")


def _check_size(name, value):
    limits = [most for names, most in LIMITS.items() if re.fullmatch(names, name)]
    if not limits or value is None or isinstance(value, list):
        return

    least = 1 if name in AT_LEAST_ONE else 0
    most = limits[0]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{name} must be a whole number from {least} to {most:,}, not "
            f"{shown(value)}"
        )
