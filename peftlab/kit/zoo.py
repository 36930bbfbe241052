"""The base models: what ships with the package, and the loading of hub models.

Nothing here reaches for the network unless you ask: `load()` gives the shipped
tiny-decoder, and only a name that you pass makes it load something else."""

import logging as standard_logging
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

# peft 0.21 asks transformers by an old name; the notebooks would store the warning.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
# On a CPU with AVX512-BF16 bitsandbytes misses an optional package, and says so.
standard_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel("ERROR")

MODELS = Path(__file__).parents[1] / "models"


def load(name="tiny-decoder", device=None):
    """A causal language model in eval mode and its tokenizer, as (model, tokenizer).

    name: a shipped model, a folder, or a hub name such as "Qwen/Qwen2.5-0.5B". device:
    a torch device, by default the GPU if there is one. Raises ValueError where nothing
    is found under that name."""
    shipped = MODELS / name
    where = str(shipped) if shipped.is_dir() else name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # its bar would be stored in the notebooks
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    except (OSError, ValueError) as error:
        ships = ", ".join(sorted(p.name for p in MODELS.iterdir() if p.is_dir()))
        raise ValueError(
            f"no model {name!r}: shipped are {ships}; a hub name needs the network"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer
