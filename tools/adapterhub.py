"""The oracle of peftlab/adapter.py: the `adapters` library, in its own environment.

    make adapterhub            compare with the library and with what is stored
    make adapterhub STORE=1    compare, and store it in book/results/adapterhub.json

On small random models in float32, in eval mode, with the library's own settings: the
outputs and the adapters' gradients, once with our weights moved to the library's model,
once the other way round. A gap is the largest difference as a share of the largest
number. The script that chapter 08 shows, adapterhub_example.py, runs too, and what it
prints is stored. Exit 1 if a gap is above 1e-5, a count differs, or the stored file
says other.
"""

import argparse
import copy
import json
import logging
import platform
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import adapters
import torch
import transformers
from adapters.composition import Stack
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import standalone

STORED = ROOT / "book" / "results" / "adapterhub.json"
EXAMPLE = ROOT / "tools" / "adapterhub_example.py"
TINY_DECODER = ROOT / "peftlab" / "models" / "tiny-decoder"
BOUND = 1e-5
WIDTH = 64
IDS = torch.arange(3, 35).reshape(2, 16)
MASK = torch.tensor([[1] * 16, [1] * 11 + [0] * 5])

# One file, not the package, which needs a newer transformers.
adapter = types.ModuleType("adapter")
exec(compile(standalone.of("adapter"), "adapter.py", "exec"), adapter.__dict__)

# {placement: (their settings, at their defaults, and what these are in ours)}
CONFIGS = {
    "houlsby": (adapters.DoubleSeqBnConfig(), dict(bottleneck=4, activation="silu")),
    "pfeiffer": (adapters.SeqBnConfig(), dict(bottleneck=4)),
    "parallel": (adapters.ParBnConfig(), dict(bottleneck=32)),
}
SIZES = dict(vocab_size=64, hidden_size=WIDTH, intermediate_size=128)
LAYERS = dict(num_hidden_layers=2, num_attention_heads=4)
T5_SIZES = dict(vocab_size=64, d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2)
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZES, **LAYERS)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, **LAYERS)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES, num_heads=4)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, **LAYERS, num_key_value_heads=2)
    ),
}


def randomise(tensors, seed):
    """Weights of about one over the root of the width; biases small, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in tensors.items():
        noise = torch.randn(t.shape, generator=generator)
        one_row = t.dim() == 1
        noise = 0.3 * noise if one_row else noise / t.shape[-1] ** 0.5
        t.data.copy_(
            noise + (one_row and "norm" in name.lower() and "bias" not in name)
        )


def their_name(name):
    """The path of a tensor of ours in the library's model."""
    for ours, theirs in (
        ("self_attn.adapters", "attention_adapters.adapters"),
        ("mlp.adapters", "output_adapters.adapters"),
        ("down", "adapter_down.0"),
        ("up", "adapter_up"),
    ):
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def pair(family, placements):
    """The same random base twice, with the same adapters "a" (and "b"), all training:
    (ours, the library's)."""
    ours = MODELS[family]().eval()
    randomise(dict(ours.named_parameters()), seed=0)
    theirs, names = copy.deepcopy(ours), "ab"[: len(placements)]
    adapters.init(theirs)
    for name, placement in zip(names, placements, strict=True):
        config, settings = CONFIGS[placement]
        theirs.add_adapter(name, config=config)
        adapter.add(ours, placement, name=name, **settings)
    theirs.train_adapter(Stack(*names))
    for p in adapter.state_dict(ours, keep_vars=True).values():
        p.requires_grad_(True)  # train_adapter has both of a stack learn
    return ours, theirs.eval()


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def outputs(model):
    more = dict(decoder_input_ids=IDS) if model.config.is_encoder_decoder else {}
    row = model(input_ids=IDS, attention_mask=MASK, **more)[0]
    return row * MASK[..., None]  # what stands behind padding is nobody's concern


def gap(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def gaps(ours, theirs):
    """The gap of the outputs, and the largest of the adapters' gradients."""
    own, its = adapter.state_dict(ours, keep_vars=True), trained(theirs)
    both = [(ours, own.values()), (theirs, [its[their_name(n)] for n in own])]
    rows, gradients = [], []
    for model, parameters in both:
        row = outputs(model)
        rows.append(row.detach())
        loss = (row.flatten() * torch.cos(torch.arange(row.numel()))).mean()
        found = torch.autograd.grad(loss, list(parameters))
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert gradients[1].count_nonzero() > len(gradients[1]) / 2, "hardly any gradient"
    return dict(output=gap(*rows), gradient=gap(*gradients))


def compare(family, *placements):
    """{key: number} of all that is compared, the weights moved there and back."""
    ours, theirs = pair(family, placements)
    own, its = adapter.state_dict(ours), trained(theirs)
    assert {their_name(n) for n in own} == its.keys(), "not in the same places"
    what, found = f"{family}.{'+'.join(placements)}", {}
    randomise(own, seed=1)
    for name, t in own.items():
        its[their_name(name)].data.copy_(t)
    for key, value in gaps(ours, theirs).items():
        found[f"gap.{what}.to_library.{key}"] = value
    randomise(its, seed=2)
    adapter.load_state_dict(ours, {n: its[their_name(n)].data for n in own})
    for key, value in gaps(ours, theirs).items():
        found[f"gap.{what}.from_library.{key}"] = value
    for name, model in (("peftlab", ours), ("library", theirs)):
        found[f"parameters.{what}.{name}"] = sum(
            p.numel() for p in trained(model).values()
        )
    with torch.no_grad():  # and the comparison sees what is wrong
        next(iter(own.values())).add_(0.01)
        assert gap(outputs(ours), outputs(theirs)) > BOUND, (
            f"{what}: it compares nothing"
        )
    return found


def two_parallel():
    """Where the library differs: of two parallel adapters in a Stack, the second starts
    from the input again, and what the first found is lost."""
    ours, theirs = pair("bert", ("parallel", "parallel"))
    own, its = adapter.state_dict(ours), trained(theirs)
    randomise(own, seed=1)
    for name, t in own.items():
        its[their_name(name)].data.copy_(t)
    with torch.no_grad():
        both, library = outputs(ours), outputs(theirs)
        last = outputs(adapter.activate(ours, ["b"]))
    assert gap(both, library) > 0.1, "the library adds up both by now: say so"
    return {"gap.bert.parallel+parallel.last_alone.output": gap(last, library)}


def full_size():
    """Parameter counts of real models, with their default reduction to a 16th."""
    large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    large = RobertaConfig(**large, num_attention_heads=16)
    found = {}
    for name, kind, config in (
        ("bert-base", BertModel, BertConfig()),
        ("roberta-large", RobertaModel, large),
    ):
        for placement in ("pfeiffer", "houlsby"):
            with torch.device("meta"):
                ours, theirs = kind(config), kind(config)
                adapters.init(theirs)
                theirs.add_adapter("a", config=CONFIGS[placement][0])
            theirs.train_adapter("a")
            adapter.add(ours, placement, config.hidden_size // 16)
            for who, model in (("peftlab", ours), ("library", theirs)):
                count = sum(p.numel() for p in trained(model).values())
                found[f"parameters.{name}.{placement}.{who}"] = count
    return found


def measure():
    stacks = [
        ("houlsby", "pfeiffer"),
        ("pfeiffer", "houlsby"),
        ("pfeiffer", "pfeiffer"),
    ]
    found = {**full_size(), **two_parallel()}
    for family in MODELS:
        for placements in [*((p,) for p in CONFIGS), *stacks]:
            found |= compare(family, *placements)
    return found


def example():
    """The answers that the script of chapter 08 prints, its last two lines."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLE), str(TINY_DECODER)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{EXAMPLE.name} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-2:]


def complaints(found, stored):
    """What is wrong, one line each; `stored` is None where nothing is stored yet."""
    for key, value in found.items():
        if key.startswith("gap.") and not value <= BOUND:
            yield f"{key} is {value:.1e}, above {BOUND:.0e}"
        twin = found.get(key.removesuffix(".peftlab") + ".library", value)
        if key.endswith(".peftlab") and twin != value:
            yield f"{key} is {value:,}, the library's {twin:,}"
    for key in sorted(found.keys() ^ stored.keys()) if stored is not None else ():
        yield f"{key} is not both measured and stored: make adapterhub STORE=1"
    for key, kept in (stored or {}).items():
        if abs(found.get(key, kept["value"]) - kept["value"]) > kept["tolerance"]:
            yield f"{key} is {found[key]}, stored as {kept['value']}"


def main(store):
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns in train_adapter
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="`past_key_value` is deprecated")
    found, answers = measure(), example()
    kept = json.loads(STORED.read_text("utf8")) if not store else None
    wrong = list(complaints(found, kept and kept["figures"]))
    if kept and answers != kept.get("example"):
        wrong.append(f"{EXAMPLE.name} prints {answers}, stored: {kept.get('example')}")
    if wrong:
        sys.exit("\n".join(wrong))
    if store:
        versions = dict(adapters=adapters.__version__, torch=torch.__version__)
        versions |= dict(transformers=transformers.__version__)
        versions |= dict(python=platform.python_version())
        figures = {
            key: dict(value=value, tolerance=BOUND if key.startswith("gap.") else 0)
            for key, value in found.items()
        }
        content = dict(machine=versions, figures=figures, example=answers)
        fresh = STORED.with_suffix(".tmp")  # whole or not at all
        fresh.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf8")
        fresh.replace(STORED)
    gaps = [value for key, value in found.items() if key.startswith("gap.")]
    print(
        f"adapters {adapters.__version__}: {len(gaps)} comparisons, the largest gap is"
        f" {max(gaps):.1e}; {(len(found) - len(gaps)) // 2} parameter counts are equal"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", action="store_true", help="write the results file")
    main(parser.parse_args().store)
