"""Write what the live page loads: tiny-decoder and six adapters, six bits a weight.

    python tools/live.py           train the adapters, pack them, measure, store
    python tools/live.py --pack    pack and measure those in _build/live once more

Six bits are one letter of base64, so a matrix is stored as text, one letter a weight:

    weight = (letter - 32) / 31 * scale        letter: 0 to 63 in base64's alphabet

with one scale, in 16 bits, for each block of 64 weights. A browser opens the result
from a folder too, where scripts may not read files: it is a script that sets one
variable. The factors of an adapter are sorted by how much they contribute, so that the
first k rows of A and of B's transpose are the best change of rank k.

The same adapters give the same bytes. `book/results/live.json` holds their checksum and
what the page's own weights score."""

import argparse
import base64
import datetime
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from babel.dates import format_date

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from peftlab import lora, peft_files
from peftlab.kit import base_models, data, measure, results
from peftlab.kit.train import train

DATA_FILE = ROOT / "book" / "_static" / "live" / "data.js"
ADAPTERS = ROOT / "_build" / "live"

LANGUAGES = dict(
    de="German", fi="Finnish", hu="Hungarian", pl="Polish", sw="Swahili", tr="Turkish"
)
SETTINGS = dict(r=8, alpha=16, steps=400, lr=0.01, batch_size=16, records=3600)
EXAMPLES = 20  # days that the page offers, in each language
RECORDS = 400  # test dates that a score is taken on
PAIRS = (["de", "fi"], ["pl", "tr"], ["hu", "sw"])  # measured with both on

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
BLOCK = 64
MIDDLE, STEPS = 32, 31  # the letter that means 0, and the steps on each side of it
BEGIN, END = "window.tinyDecoderData = ", ";\n"


# Training


def train_adapters(folder):
    """Train a LoRA for each language, and save each as peft does."""
    for language in LANGUAGES:
        model, tokenizer = base_models.load("tiny-decoder", device="cpu")
        torch.manual_seed(0)
        lora.add(model, "all-linear", r=SETTINGS["r"], alpha=SETTINGS["alpha"])
        dates = data.records("dates", language, SETTINGS["records"])
        how = {name: SETTINGS[name] for name in ("steps", "lr", "batch_size")}
        losses = train(model, tokenizer, dates, **how)
        peft_files.save(model, folder / language)
        print(f"{LANGUAGES[language]:10} loss {losses[0]:.2f} -> {losses[-1]:.3f}")


def read_adapters(folder):
    """{language: {"scaling", "tensors"}}, with factors sorted by what they contribute.

    B is given transposed, (r, out): row k of A and row k of B^T belong together."""
    adapters = {}
    for language in LANGUAGES:
        model, _ = base_models.load("tiny-decoder", device="cpu")
        peft_files.load(model, folder / language)
        tensors = {}
        for path, layer in model.named_modules():
            if isinstance(layer, lora.LoRALinear):
                A, Bt = sort_factors(layer.lora_A.detach(), layer.lora_B.detach())
                tensors[f"{path}.A"] = A
                tensors[f"{path}.Bt"] = Bt
                scaling = layer.scaling
        adapters[language] = dict(scaling=scaling, tensors=tensors)
    return adapters


def sort_factors(A, B):  # (r, in), (out, r) -> (r, in), (r, out)
    """Factors of the same product BA, its largest singular direction first.

    The SVD of a product of thin matrices needs only small ones: B = Q_B R_B,
    A^T = Q_A R_A, and R_B R_A^T is (r, r)."""
    Q_A, R_A = torch.linalg.qr(A.T.double())
    Q_B, R_B = torch.linalg.qr(B.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    root = S.sqrt()
    A = root[:, None] * (Vh @ Q_A.T)
    Bt = root[:, None] * (Q_B @ U).T
    return A.float(), Bt.float()


# Packing


def pack_matrix(t):
    """A matrix as text: {"shape", "scales", "codes"}, a letter of `codes` a weight."""
    blocks = t.numpy().reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True).astype(np.float16)
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)
    steps = np.rint(blocks / divisors * STEPS).clip(-STEPS, STEPS)
    letters = np.frombuffer(ALPHABET, np.uint8)
    codes = letters[steps.astype(np.int64) + MIDDLE]
    return dict(
        shape=list(t.shape), scales=pack_halves(scales), codes=codes.tobytes().decode()
    )


def unpack_matrix(packed):
    """The matrix that `pack_matrix` made text of, as near as six bits come."""
    scales = unpack_halves(packed["scales"])
    letters = np.frombuffer(packed["codes"].encode(), np.uint8)
    step_of = np.zeros(128, np.float32)
    step_of[np.frombuffer(ALPHABET, np.uint8)] = np.arange(64) - MIDDLE
    steps = step_of[letters].reshape(-1, BLOCK)
    values = steps / np.float32(STEPS) * scales[:, None]
    return torch.from_numpy(values.reshape(packed["shape"]))


def pack_halves(values):
    """Numbers as 16-bit floats in base64."""
    return base64.b64encode(np.asarray(values, "<f2").tobytes()).decode()


def unpack_halves(text):
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)


def pack(adapters):
    """The text of the data file: the shipped base model and these adapters."""
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    base = weights_of_base()
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)

    packed = {}
    for language, adapter in adapters.items():
        tensors = {name: pack_matrix(t) for name, t in adapter["tensors"].items()}
        packed[language] = dict(
            name=LANGUAGES[language], scaling=adapter["scaling"], tensors=tensors
        )

    content = dict(
        config=sizes(model.config),
        tokens=tokens,
        merges=[" ".join(pair) for pair in bpe["merges"]],
        norms={name: pack_halves(t) for name, t in base["norms"].items()},
        matrices={name: pack_matrix(t) for name, t in base["matrices"].items()},
        adapters=packed,
        dates=example_dates(),
    )
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return BEGIN + text + END


def sizes(config):
    """What the forward pass needs of a Llama's config."""
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "eos_token_id",
        "bos_token_id",
    )
    chosen = {name: getattr(config, name) for name in names}
    return chosen | dict(rope_theta=config.rope_parameters["rope_theta"])


def example_dates():
    """{"days": ISO dates of the test split, language: each of them as written there}.

    Every other day has its weekday."""
    records = data.records("dates", "en", EXAMPLES, "test")
    days = [record.answer for record in records]
    dates = dict(days=days)
    for language in ["en", *LANGUAGES]:
        where = data.locale(language)
        dates[language] = [
            format_date(datetime.date.fromisoformat(day), style, locale=where)
            for day, style in zip(days, itertools.cycle(["long", "full"]))
        ]
    return dates


def unpack(text):
    """The data file's content with its weights as tensors."""
    content = json.loads(text.removeprefix(BEGIN).removesuffix(END))
    matrices = [content["matrices"]]
    matrices += [adapter["tensors"] for adapter in content["adapters"].values()]
    for tensors in matrices:
        for name, packed in tensors.items():
            tensors[name] = unpack_matrix(packed)

    norms = content["norms"]
    for name, packed in norms.items():
        norms[name] = torch.from_numpy(unpack_halves(packed))
    return content


# Measuring


@torch.no_grad()
def assemble(content, languages=(), rank=8, strength=1.0):
    """tiny-decoder with the file's own weights, some of its adapters merged in."""
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    modules = dict(model.named_modules())
    for name, W in {**content["matrices"], **content["norms"]}.items():
        modules[name].weight.copy_(W)
    for language in languages:
        adapter = content["adapters"][language]
        for name in content["matrices"]:
            A = adapter["tensors"].get(f"{name}.A")
            if A is not None:
                Bt = adapter["tensors"][f"{name}.Bt"]
                change = Bt[:rank].T @ A[:rank]
                modules[name].weight += strength * adapter["scaling"] * change
    return model, tokenizer


def weights_of_base():
    """{"matrices", "norms"}: the shipped weights, named as in the data file."""
    model, _ = base_models.load("tiny-decoder", device="cpu")
    matrices, norms = {}, {}
    for name, t in model.named_parameters():
        weights = matrices if t.dim() == 2 else norms
        weights[name.removesuffix(".weight")] = t.detach()
    return dict(matrices=matrices, norms=norms)


def size_of_change(content, language):
    """||dW|| / ||W||, all adapted layers taken together."""
    adapter = content["adapters"][language]
    change = base = 0.0
    for name, W in content["matrices"].items():
        A = adapter["tensors"].get(f"{name}.A")
        if A is not None:
            dW = adapter["scaling"] * adapter["tensors"][f"{name}.Bt"].T @ A
            change += dW.norm().item() ** 2
            base += W.norm().item() ** 2
    return (change / base) ** 0.5


def figures(content, plain):
    """{key: value}: what the page's weights score, and beside them the full ones.

    plain: the adapters before packing, as `read_adapters` gives them."""
    tests = {k: data.records("dates", k, RECORDS, "test") for k in ["en", *LANGUAGES]}

    def score(language, *args, source=content, **settings):
        model, tokenizer = assemble(source, *args, **settings)
        return measure.exact_match(model, tokenizer, tests[language])

    full = dict(weights_of_base(), adapters=plain)
    found = {"english.before": score("en"), "english.full": score("en", source=full)}
    for language in LANGUAGES:
        own = [language]
        found[f"before.{language}"] = score(language)
        found[f"after.{language}"] = score(language, own)
        found[f"english.{language}"] = score("en", own)
        found[f"full.{language}"] = score(language, own, source=full)
        found[f"change.{language}"] = size_of_change(content, language)
        for rank in (1, 4):
            found[f"rank{rank}.{language}"] = score(language, own, rank)
        found[f"half.{language}"] = score(language, own, strength=0.5)
        found[f"english.half.{language}"] = score("en", own, strength=0.5)
        print(language, {k: v for k, v in found.items() if k.endswith(language)})
    losses = [abs(found[f"after.{k}"] - found[f"full.{k}"]) for k in LANGUAGES]
    found["rounding"] = max(losses)

    for pair in PAIRS:
        for language in pair:
            found[f"pair.{'.'.join(pair)}.{language}"] = score(language, pair)
    return found


def checksum(text):
    return hashlib.sha256(text.encode()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pack", action="store_true", help="do not train")
    args = parser.parse_args()
    if not args.pack:
        train_adapters(ADAPTERS)

    plain = read_adapters(ADAPTERS)
    text = pack(plain)
    DATA_FILE.write_text(text, "ascii")
    print(f"{DATA_FILE.relative_to(ROOT)}: {len(text):,} bytes")

    found = figures(unpack(text), plain)
    found["bytes"] = len(text)
    stored = {key: dict(value=v, tolerance=0.01) for key, v in found.items()}
    results.save(
        "live",
        dict(
            machine=measure.machine(),
            settings=SETTINGS,
            sha256=checksum(text),
            figures=stored,
        ),
    )


if __name__ == "__main__":
    main()
