"""The scripts in recipes/ run to the end on stand-ins, and change their answers.

A stand-in is a folder as a hub's model lies in it: the real architecture, small random
weights, tiny-decoder's tokenizer with a chat template. One more is tiny-decoder
itself. What these runs score says nothing of a real model."""

import argparse
import ast
import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peftlab import nf4, peft_files
from peftlab.kit import base_models, data

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
PAGES = {  # a chapter, and the recipes that its page shows
    "01_quickstart": ["qlora_llm.py"],
    "02_lora": ["02_lora.py"],
    "03_learning_and_forgetting": ["03_replay.py"],
    "04_why_low_rank": ["04_rank.py"],
    "05_rank_alpha_rate": ["05_rate.py"],
    "06_save_merge_swap": ["06_swap.py"],
    "07_variants": ["07_variants.py"],
    "08_adapters": ["08_adapter.py"],
    "09_prompt_and_prefix": ["09_prompt.py"],
    "10_bitfit_norms_ia3": ["10_ia3.py"],
    "11_what_training_costs": ["11_peak_memory.py"],
    "12_int8": ["12_int8.py"],
    "13_nf4": ["13_pack.py"],
    "14_qlora": ["14_merge.py"],
    "15_fitting_in_memory": ["15_fit.py"],
    "16_data": ["16_check_data.py"],
    "18_library_stack": ["18_train.py"],
    "19_many_adapters": ["19_serve.py"],
    "20_medical_questions": ["20_medical.py"],
    "21_preference_and_reward": ["21_dpo.py"],
    "22_shipping": ["22_ship.py"],
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
KINDS = {
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "Llama": (LlamaConfig, LlamaForCausalLM),
}


def make_stand_in(name, folder):
    """A model's folder in the hub's layout, and files of records beside it."""
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    if name in KINDS:
        config, kind = KINDS[name]
        torch.manual_seed(0)
        model = kind(config(vocab_size=len(tokenizer), **SHAPE))
    tokenizer.chat_template = TEMPLATE
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for file, language in (("records", "fi"), ("general", "en")):
        records = data.records("dates", language, 40, "train", 0)
        rows = [json.dumps(dict(prompt=r.text, answer=r.answer)) for r in records]
        (folder / f"{file}.jsonl").write_text("\n".join(rows))
    return folder


def run(folder, name, *arguments):
    """What a recipe prints, run in a folder as the command line does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.syspath_prepend(RECIPES)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(RECIPES / name), run_name="__main__")
    return out.getvalue()


@pytest.fixture(scope="module", autouse=True)
def packed_weights_stay_as_a_gpu_has_them():
    """On a CPU with bfloat16 instructions bitsandbytes packs a layer anew at its first
    answer, for inference alone: training after that raises, or gets no gradient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


def quick(folder, out):
    """What makes a run short, and strong enough to change an answer."""
    rows = (folder / "records.jsonl").read_text().splitlines()
    prompt = json.loads(rows[0])["prompt"]
    few = ("--length", 96, "--epochs", 3, "--rate", 1e-2, "--tokens", 12)
    return ("--model", "model", "--prompt", prompt, "--out", out, *few)


def assert_it_learned(out):
    before, after = re.search(r"held-out records: ([\d.]+) -> ([\d.]+)", out).groups()
    assert float(after) < float(before), out
    on = re.search(r"^with the adapter: ?(.*)$", out, re.M)[1]
    off = re.search(r"^without it: ?(.*)$", out, re.M)[1]
    assert on != off, f"the adapter changes no answer: {on!r}"


@pytest.fixture(scope="module", params=KINDS)
def stand_in(request, tmp_path_factory):
    return make_stand_in(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(stand_in):
    """The stand-in with a QLoRA adapter in first/, and what the recipe printed."""
    return stand_in, run(stand_in, "qlora_llm.py", *quick(stand_in, "first"))


def load(folder, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder / adapter) if adapter else model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(5, 45).reshape(2, 20)).logits.float()


def test_qlora_from_records_to_an_answer(trained):
    folder, out = trained
    assert_it_learned(out)
    assert "40 records, 0 answers too long" in out
    files = {path.name for path in (folder / "first").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files


def test_qlora_runs_on_tiny_decoder_itself(tmp_path):
    folder = make_stand_in("tiny-decoder", tmp_path)
    assert_it_learned(run(folder, "qlora_llm.py", *quick(folder, "first")))


def test_lora_in_16_bits_and_the_merged_model(stand_in):
    more = ("--merged", "merged")
    out = run(stand_in, "02_lora.py", *quick(stand_in, "second"), *more)
    assert_it_learned(out)
    assert answer_of(out, "merged") != answer_of(out, "without it"), out
    merged = AutoModelForCausalLM.from_pretrained(stand_in / "merged").float()
    ours = logits(load(stand_in, "second"))
    off = (logits(merged) - ours).norm()
    moved = (logits(load(stand_in)) - ours).norm()
    assert off < 0.1 * moved, f"merged differs by {off:.3g}, the base by {moved:.3g}"


@pytest.mark.parametrize("share, mixed", [(0, 0), (0.25, 13)])
def test_replay_measures_what_is_forgotten(stand_in, share, mixed):
    common = quick(stand_in, "third")
    out = run(stand_in, "03_replay.py", *common, "--share", share)
    assert_it_learned(out)
    assert f"38 records, {mixed} general ones" in out
    assert re.search(r"loss on general records: [\d.]+ -> [\d.]+", out)


def test_the_rank_of_a_change_and_a_smaller_adapter(trained):
    folder, _ = trained
    adapter = ("--adapter", "first", "--model", "model")
    out = run(folder, "04_rank.py", *adapter, "--rank", 16, "--out", "same")
    pattern = r"^(\S+\.weight): size ([\d.]+), 90% in rank (\d+) of 16"
    layers = re.findall(pattern, out, re.M)
    model = load(folder, "first")
    assert len(layers) == 2 * 7, "seven linears in each of two layers"
    weights = dict(load(folder).named_parameters())
    for path, size, rank in layers:
        layer = model.get_submodule("base_model.model." + path.removesuffix(".weight"))
        change = layer.get_delta_weight("default").detach()
        expected = change.norm() / weights[path].detach().norm()
        assert float(size) == pytest.approx(expected.item(), rel=0.01, abs=1e-4)
        energy = torch.linalg.svdvals(change).square()
        assert energy[: int(rank)].sum() >= 0.8999 * energy.sum()
        assert energy[: int(rank) - 1].sum() < 0.9001 * energy.sum()

    whole, base = logits(model), logits(load(folder))
    same = logits(load(folder, "same"))
    assert (same - whole).norm() < 1e-4 * whole.norm(), "16 of 16 lose nothing"
    run(folder, "04_rank.py", *adapter, "--rank", 4, "--out", "cut")
    cut = load(folder, "cut")
    assert cut.peft_config["default"].r == 4
    gap = (logits(cut) - whole).norm()
    assert gap < (base - whole).norm(), "the cut adapter is nearer than none"


REFUSED = {  # arguments, what else is in the adapter, and what is said
    "a rank above the adapter's": (("--rank", 17), {}, "from 1 to 16, not 17"),
    "rank 0": (("--rank", 0), {}, "from 1 to 16, not 0"),
    "rsLoRA": ((), dict(use_rslora=True), "not one with use_rslora"),
    "another rank for a layer": ((), dict(rank_pattern={"up_proj": 4}), "rank_pattern"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_would_be_cut_wrongly_is_refused(trained, name, tmp_path):
    folder, _ = trained
    arguments, settings, said = REFUSED[name]
    file = folder / "first" / "adapter_config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | settings))
    common = ("--adapter", "first", "--model", "model", "--out", tmp_path / "new")
    try:
        with pytest.raises(SystemExit, match=said):
            run(folder, "04_rank.py", *common, *arguments)
    finally:
        file.write_text(before)
    assert not (tmp_path / "new").exists()


def test_a_head_beside_the_adapter_is_not_left_out_of_a_smaller_one(trained):
    recipe = runpy.run_path(str(RECIPES / "04_rank.py"))
    folder, _ = trained
    config = PeftConfig.from_pretrained(folder / "first")
    tensors = load_file(folder / "first" / "adapter_model.safetensors")
    recipe["refuse"](config, tensors, 4)
    for other in ("base_model.model.lm_head.weight", "x.lora_embedding_A"):
        with pytest.raises(SystemExit, match=other):
            recipe["refuse"](config, tensors | {other: None}, 4)


def test_a_rate_is_looked_for_and_the_best_adapter_saved(stand_in, tmp_path):
    common = (*quick(stand_in, tmp_path / "fifth"), "--epochs", 1, "--rank", 4)
    out = run(stand_in, "05_rate.py", *common, "--rslora", "--runs", 4)
    found = dict(re.findall(r"^rate (\S+): held-out loss ([\d.]+|inf)", out, re.M))
    assert list(found)[:3] == ["0.01", "0.0033", "0.03"] and len(found) <= 4
    best, where = re.search(r"^best: (\S+), (.*)$", out, re.M).groups()
    found = {float(rate): float(loss) for rate, loss in found.items()}
    assert float(best) == min(found, key=found.get), out
    edge = float(best) in (min(found), max(found))
    assert where == ("at an edge: not done" if edge else "worse on either side")

    config = PeftConfig.from_pretrained(tmp_path / "fifth")
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 32, True)
    recipe = runpy.run_path(str(RECIPES / "05_rate.py"))
    tokenizer = AutoTokenizer.from_pretrained(stand_in / "model")
    records = recipe["qlora_llm"].read(stand_in / "records.jsonl", tokenizer, 96)
    loss = runpy.run_path(str(RECIPES / "03_replay.py"))["loss"]
    again = loss(load(stand_in, tmp_path / "fifth"), tokenizer, records[:2])
    assert again == pytest.approx(found[float(best)], rel=0.1), "the best is saved"


def test_a_search_goes_on_beyond_an_edge_and_ends_inside():
    recipe = runpy.run_path(str(RECIPES / "05_rate.py"))
    assert recipe["next_rate"]({1.0: 3, 3.0: 2, 9.0: 4}) is None
    assert recipe["next_rate"]({1.0: 1, 3.0: 2, 9.0: 4}) == pytest.approx(1 / 3)
    assert recipe["next_rate"]({1.0: 3, 3.0: 2, 9.0: 1}) == 27
    assert recipe["next_rate"]({1.0: 3, 3.0: 2, 9.0: float("inf")}) is None


@pytest.mark.parametrize("arguments", [("--runs", 2), ("--rate", 0)])
def test_a_search_with_no_neighbours_or_no_rate_is_refused(stand_in, arguments):
    with pytest.raises(SystemExit, match="--runs is at least 3, --rate above 0"):
        run(stand_in, "05_rate.py", *quick(stand_in, "never"), *arguments)
    assert not (stand_in / "never").exists()


@pytest.fixture(scope="module")
def two(trained, tmp_path_factory):
    """The stand-in's adapter first/, and an rsLoRA in another/, far from it."""
    folder, _ = trained
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(folder), config)
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += p.requires_grad * 0.2 * torch.randn(p.shape)
    model.save_pretrained(folder / "another")
    return folder


def answer_of(out, name):
    return re.search(rf"^{name}: ?(.*)$", out, re.M)[1]


def test_adapters_swapped_on_one_base_and_added_exactly(two, tmp_path):
    adapters = ("--adapters", "first", "another")
    common = (*quick(two, tmp_path / "both"), *adapters)
    out = run(two, "06_swap.py", *common)
    answers = {answer_of(out, name) for name in ("first", "another", "none")}
    assert len(answers) == 3, f"each adapter answers in its own way: {out}"
    assert not (tmp_path / "both").exists(), "nothing is saved unasked"

    out = run(two, "06_swap.py", *common, "--weights", 0.5, -2)
    assert "2 adapters of rank 20 together" in out
    assert answer_of(out, "first") in answers
    paths = [n.removesuffix(".lora_A") for n, _ in load(two, "first").named_modules()]
    paths = {p for p in paths if p.endswith("_proj")}
    one, other = (load(two, name) for name in ("first", "another"))
    both = load(two, tmp_path / "both")
    for path in paths:
        changes = [
            m.get_submodule(path).get_delta_weight("default")
            for m in (one, other, both)
        ]
        want = 0.5 * changes[0] - 2 * changes[1]
        assert torch.allclose(changes[2], want, atol=1e-5 * want.abs().max().item())
    assert len(paths) == 2 * 7


def test_one_adapter_at_weight_1_is_itself(two, tmp_path):
    for name in ("first", "another"):
        alone = tmp_path / name
        common = (*quick(two, alone), "--adapters", name, "--weights", 1)
        out = run(two, "06_swap.py", *common)
        assert answer_of(out, re.escape(str(alone))) == answer_of(out, name)
        gap = logits(load(two, alone)) - logits(load(two, name))
        assert gap.abs().max() < 1e-4


SWAPPED_WRONGLY = {  # adapters, arguments, a setting changed, what is said
    "a weight too few": ("first another", (0.5,), {}, "as many --weights"),
    "no such adapter": ("first nowhere", (1, 1), {}, "nowhere has no adapter_model"),
    "DoRA": (
        "first another",
        (1, 1),
        dict(use_dora=True),
        "only plain LoRA .* use_dora",
    ),
    "a rank of its own": (
        "first another",
        (1, 1),
        dict(rank_pattern={"q_proj": 2}),
        "rank_pattern",
    ),
}


@pytest.mark.parametrize("name", SWAPPED_WRONGLY)
def test_what_does_not_add_up_is_refused_before_anything_is_written(
    two, name, tmp_path
):
    adapters, weights, settings, said = SWAPPED_WRONGLY[name]
    file = two / "another" / "adapter_config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | settings))
    common = (*quick(two, tmp_path / "new"), "--adapters", *adapters.split())
    try:
        with pytest.raises(SystemExit, match=said):
            run(two, "06_swap.py", *common, "--weights", *weights)
    finally:
        file.write_text(before)
    assert not (tmp_path / "new").exists()


def test_a_sum_overwrites_no_folder_and_wants_the_same_layers(two, tmp_path):
    common = (*quick(two, "first"), "--adapters", "first", "--weights", 1)
    with pytest.raises(SystemExit, match="first is there already"):
        run(two, "06_swap.py", *common)
    recipe = runpy.run_path(str(RECIPES / "06_swap.py"))
    config, tensors = recipe["read"](two / "first")
    fewer = dict(list(tensors.items())[2:])
    with pytest.raises(SystemExit, match="not on the same layers"):
        recipe["combine"]([(config, tensors), (config, fewer)], [1, 1])


@pytest.fixture(scope="module")
def variants(stand_in):
    """{variant: (the adapter's folder, its config, its tensors, what was printed)}"""
    found = {}
    for name in ("lora", "rslora", "loraplus", "pissa", "dora", "vera"):
        out = stand_in / f"variant-{name}"
        common = (*quick(stand_in, out), "--merged", stand_in / f"merged-{name}")
        other = dict(vera=("--rate", 0.3), rslora=("--rank", 16)).get(name, ())
        said = run(stand_in, "07_variants.py", *common, *other, "--variant", name)
        tensors = load_file(out / "adapter_model.safetensors")
        found[name] = (out, PeftConfig.from_pretrained(out), tensors, said)
    return found


def test_every_variant_learns_and_what_vllm_takes_is_a_plain_lora(variants, stand_in):
    for name, (_, config, tensors, said) in variants.items():
        assert_it_learned(said)
        plain = all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in tensors)
        plain = plain and not getattr(config, "use_dora", False)
        assert plain == ("vLLM loads it" in said) == (name not in ("dora", "vera"))
        assert (stand_in / f"merged-{name}").exists() != plain
    assert {t.dim() for t in variants["vera"][2].values()} == {1}, "no A, no B"


def test_rslora_is_lora_at_rank_16_and_lora_plus_is_not(variants):
    lora, rslora, plus = (variants[n][2] for n in ("lora", "rslora", "loraplus"))
    assert variants["rslora"][1].use_rslora and variants["rslora"][1].lora_alpha == 8
    for name, t in lora.items():
        assert torch.allclose(t, rslora[name], atol=1e-5)
    far = [(plus[n] - t).norm() / t.norm() for n, t in lora.items() if "lora_B" in n]
    assert min(far) > 1, "B learns much faster"


def test_the_alpha_of_rslora_stays_when_the_rank_changes(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    recipe = runpy.run_path(str(RECIPES / "07_variants.py"))
    at = {r: recipe["alpha"]("rslora", r) / r**0.5 for r in (4, 16, 64)}
    assert at == {4: 4, 16: recipe["alpha"]("lora", 16) / 16, 64: 1}
    assert recipe["RANKS"]["rslora"] == 64, "the default is where the rule differs"


def test_a_pissa_is_saved_as_a_lora_for_the_base_as_it_came(variants, stand_in):
    out, config, tensors, _ = variants["pissa"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (32, 32, True)
    start = load_file(stand_in / f"{out.name}-start" / "adapter_model.safetensors")
    for name, t in tensors.items():
        half = start[name]
        if "lora_A" in name:
            assert torch.equal(t[16:], half) and not torch.equal(t[:16], half)
        else:
            assert torch.equal(t[:, 16:], -half)
    with torch.no_grad():
        adapted = load(stand_in, out)
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), logits(load(stand_in)))


def test_what_vllm_refuses_is_merged(variants, stand_in):
    for name in ("dora", "vera"):
        out, _, _, said = variants[name]
        assert answer_of(said, "merged") != answer_of(said, "without it"), said
        folder = stand_in / f"merged-{name}"
        merged = AutoModelForCausalLM.from_pretrained(folder).float()
        ours = logits(load(stand_in, out))
        off = (logits(merged) - ours).norm()
        assert off < 0.1 * (logits(load(stand_in)) - ours).norm()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--variant", "lora", "--rank", 0), "at least 1, not 0"),
        (("--variant", "loraplus", "--ratio", 0), "above 0, not 0"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(stand_in, arguments, said):
    with pytest.raises(SystemExit, match=said):
        run(stand_in, "07_variants.py", *quick(stand_in, "none"), *arguments)
    assert not (stand_in / "none").exists()


def test_replay_refuses_a_share_of_one_and_too_few_general_records(stand_in):
    common = quick(stand_in, "refused")
    with pytest.raises(SystemExit, match="below 1"):
        run(stand_in, "03_replay.py", *common, "--share", 1)
    with pytest.raises(SystemExit, match="152 general records wanted, 38 there"):
        run(stand_in, "03_replay.py", *common, "--share", 0.8)
    assert not (stand_in / "refused").exists()


def test_ia3_trains_its_scales_and_folds_them_in(stand_in, tmp_path):
    common = (*quick(stand_in, tmp_path / "tenth"), "--rate", 0.1)
    out = run(stand_in, "10_ia3.py", *common, "--folded", tmp_path / "folded")
    assert_it_learned(out)
    tensors = load_file(tmp_path / "tenth" / "adapter_model.safetensors")
    inner = 128 + 2 * 64 // 2  # of a layer: the MLP's units, its keys and values
    assert sum(t.numel() for t in tensors.values()) == 2 * inner
    sides = {name.split(".")[-2]: tuple(t.shape) for name, t in tensors.items()}
    assert sides == dict(k_proj=(32, 1), v_proj=(32, 1), down_proj=(1, 128))

    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").float()
    ours = logits(load(stand_in, tmp_path / "tenth"))
    off = (logits(folded) - ours).norm()
    moved = (logits(load(stand_in)) - ours).norm()
    assert off < 0.1 * moved, f"folded differs by {off:.3g}, the base by {moved:.3g}"


@pytest.mark.parametrize("placement, number", [("parallel", 1), ("houlsby", 2)])
def test_a_bottleneck_adapter_is_saved_with_its_settings(
    stand_in, tmp_path, placement, number
):
    common = (*quick(stand_in, tmp_path / "eighth"), "--placement", placement)
    out = run(stand_in, "08_adapter.py", *common, "--bottleneck", 16)
    assert_it_learned(out)
    size = 2 * number * (2 * 16 * 64 + 64 + 16)  # of two layers, 64 wide
    assert f"{size:,} parameters are trained" in out

    recipe = runpy.run_path(str(RECIPES / "08_adapter.py"))
    model = recipe["put_on"](load(stand_in), tmp_path / "eighth")
    tensors = recipe["adapter"].state_dict(model)
    assert sum(t.numel() for t in tensors.values()) == size
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    with_it = logits(model)
    base = logits(load(stand_in))
    assert (with_it - base).abs().max() > 1e-3, "the saved one works"
    assert torch.equal(logits(recipe["adapter"].activate(model, [])), base)


ADAPTED_WRONGLY = {  # arguments, what is said
    "no such placement": (("--placement", "serial"), "placement must be one of"),
    "no width": (("--bottleneck", 0), "bottleneck must be a whole number"),
    "no rate": (("--rate", 0), "above 0, not 0"),
}


@pytest.mark.parametrize("name", ADAPTED_WRONGLY)
def test_an_adapter_that_cannot_be_is_refused_before_the_model_is_loaded(
    stand_in, name, tmp_path
):
    arguments, said = ADAPTED_WRONGLY[name]
    with pytest.raises(SystemExit, match=said):
        run(stand_in, "08_adapter.py", *quick(stand_in, tmp_path / "never"), *arguments)
    assert not (tmp_path / "never").exists()


SCALED_WRONGLY = {  # arguments, and what is said
    "no such layer": (("--outputs", "key"), "has no layer called key"),
    "one wrong name of three": (("--outputs", "k_proj", "wo"), "no layer called wo"),
    "a layer on both sides": (("--outputs", "k_proj", "down_proj"), "down_proj is in"),
    "no rate": (("--rate", 0), "above 0, not 0"),
}


@pytest.mark.parametrize("name", SCALED_WRONGLY)
def test_scales_that_would_miss_their_layers_are_refused(stand_in, name, tmp_path):
    arguments, said = SCALED_WRONGLY[name]
    common = quick(stand_in, tmp_path / "new")
    with pytest.raises(SystemExit, match=said):
        run(stand_in, "10_ia3.py", *common, *arguments)
    assert not (tmp_path / "new").exists()


def test_a_prompt_starts_as_an_instruction_and_is_all_that_is_trained(stand_in):
    common = (*quick(stand_in, "prompted"), "--rate", 0.3, "--epochs", 6)
    out = run(stand_in, "09_prompt.py", *common, "--start", "fi: ", "--vectors", 8)
    assert_it_learned(out)
    assert "trainable params: 512 ||" in out, "8 vectors, 64 wide"
    tensors = load_file(stand_in / "prompted" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "prompt_embeddings": (8, 64)
    }


PROMPTED_WRONGLY = {  # arguments, what is said
    "no instruction": (("--start", " "), "--start is empty"),
    "an instruction cut off": (("--start", "fi: 2026", "--vectors", 2), "too many for"),
    "no vectors": (("--start", "fi: ", "--vectors", 0), "too many for 0"),
    "no room for the text": (("--vectors", 60), "60 vectors are over half"),
}


@pytest.mark.parametrize("name", PROMPTED_WRONGLY)
def test_a_prompt_that_cannot_be_is_refused(stand_in, name):
    arguments, said = PROMPTED_WRONGLY[name]
    with pytest.raises(SystemExit, match=said):
        run(stand_in, "09_prompt.py", *quick(stand_in, "none"), *arguments)
    assert not (stand_in / "none").exists()


def test_the_calculator_beside_the_measured_peak(stand_in):
    common = [*quick(stand_in, "eleventh"), "--epochs", 1]
    out = run(stand_in, "11_peak_memory.py", *common)
    assert_it_learned(out)
    found = dict(re.findall(r"^(predicted|measured) +([\d.]+) GB", out, re.M))
    ratio = float(found["measured"]) / float(found["predicted"])
    assert 0.5 < ratio < 3, f"on a stand-in of a few MB the ratio is {ratio:.2f}"


def test_lora_over_a_base_in_8_bits(stand_in):
    out = run(stand_in, "12_int8.py", *quick(stand_in, "eight"))
    assert_it_learned(out)
    wide = sum(p.numel() * 2 for p in load(stand_in).parameters()) / 1e9
    sizes = [float(size) for size in re.findall(r"8 bits: ([\d.]+) GB", out)]
    assert len(sizes) == 2 and max(sizes) < wide, f"{sizes}, in 16 bits {wide}"
    tensors = load_file(stand_in / "eight" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7, "A and B on seven linears of two layers"


def test_the_threshold_reaches_the_layers_and_a_negative_one_is_refused(stand_in):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        recipe = runpy.run_path(str(RECIPES / "12_int8.py"))
        for threshold in (0.0, 4.5):
            model, _ = recipe["loader"](threshold)(stand_in / "model")
            layer = model.model.layers[0].mlp.up_proj
            assert layer.state.threshold == threshold
            assert layer.weight.dtype == torch.int8
            assert model.lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(SystemExit, match="at least 0, not -1"):
        run(stand_in, "12_int8.py", *quick(stand_in, "never"), "--threshold", -1)
    assert not (stand_in / "never").exists()


def test_a_packed_folder_answers_alone_and_its_errors_are_nf4s(stand_in):
    prompt = json.loads((stand_in / "records.jsonl").read_text().splitlines()[0])
    common = ("--model", "model", "--prompt", prompt["prompt"], "--tokens", 12)
    out = run(stand_in, "13_pack.py", *common, "--out", "packed")
    answer_of(out, "packed")
    plain, packed = map(float, re.search(r"MB: ([\d.]+) -> ([\d.]+)", out).groups())
    assert packed < plain, out

    rows = re.findall(r"^(\w+): error ([\d.]+), ([\d,]+) weights", out, re.M)
    kinds = {kind: float(error) for kind, error, _ in rows}
    assert len(kinds) == 7, "seven kinds of linear layers, not the output head"
    weights = load(stand_in).model.layers
    for kind, printed in kinds.items():
        lost = total = 0
        for layer in weights:
            (w,) = (p for n, p in layer.named_parameters() if f"{kind}.weight" in n)
            w = w.detach().bfloat16()
            q = nf4.quantize(w, double_quant=True)
            lost += (nf4.dequantize(q).float() - w.float()).square().sum().item()
            total += w.float().square().sum().item()
        assert printed == pytest.approx((lost / total) ** 0.5, rel=0.02), kind
    tensors = load_file(stand_in / "packed" / "model.safetensors")
    assert sum("quant_state.bitsandbytes__nf4" in n for n in tensors) == 2 * 7


def scaled_copy(folder, factor, name):
    """The adapter first/ with a change of another size, in a folder beside it."""
    (folder / name).mkdir(exist_ok=True)
    config = (folder / "first" / "adapter_config.json").read_text()
    (folder / name / "adapter_config.json").write_text(config)
    tensors = load_file(folder / "first" / "adapter_model.safetensors")
    tensors = {n: t * factor if "lora_B" in n else t for n, t in tensors.items()}
    save_file(tensors, folder / name / "adapter_model.safetensors")
    return name


def merge_of(folder, adapter, into, out):
    prompt = json.loads((folder / "records.jsonl").read_text().splitlines()[0])
    common = ("--model", "model", "--prompt", prompt["prompt"], "--tokens", 12)
    return run(
        *(folder, "14_merge.py", *common, "--adapter", adapter),
        *("--into", into, "--out", folder / out),
    )


LINE = r"^(\S+): change ([\d.]+), packing ([\d.]+)$"


def test_a_qlora_merged_into_16_bits_in_two_ways(trained, tmp_path):
    folder, _ = trained
    base, beside = load(folder), load(folder, "first")
    effect = (logits(beside) - logits(base)).norm()
    gaps = {}
    for way in ("unpacked", "checkpoint"):
        out = merge_of(folder, "first", way, tmp_path / way)
        layers = re.findall(LINE, out, re.M)
        assert len(layers) == 2 * 7, "seven linears in each of two layers"
        for path, size, error in layers:
            layer = beside.get_submodule(f"base_model.model.{path}")
            change = layer.get_delta_weight("default").norm()
            change = change / base.get_submodule(path).weight.norm()
            assert float(size) == pytest.approx(change.item(), rel=0.02, abs=1e-4)
            assert 0.08 < float(error) < 0.11, "packing's, for normal weights"
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / way).float()
        gaps[way] = (logits(merged) - logits(beside)).norm() / effect
        assert answer_of(out, "merged")
    assert gaps["checkpoint"] < 0.1, "beside this base the adapter stood here"
    assert gaps["unpacked"] > gaps["checkpoint"], "the base's rounding is in it"


def test_a_small_change_is_not_merged_into_4_bits(trained, tmp_path):
    folder, _ = trained
    small = scaled_copy(folder, 0.01, "small")
    with pytest.raises(SystemExit, match="it would be lost there: --into checkpoint"):
        merge_of(folder, small, "packed", tmp_path / "small")
    assert not (tmp_path / "small").exists()
    out = merge_of(folder, small, "unpacked", tmp_path / "small")
    assert "in 14 of 14 layers the change is the smaller" in out

    large = scaled_copy(folder, 1000, "large")
    out = merge_of(folder, large, "packed", tmp_path / "large")
    assert "in 0 of 14 layers" in out and answer_of(out, "merged") is not None
    tensors = load_file(tmp_path / "large" / "model.safetensors")
    assert sum(t.dtype == torch.uint8 for n, t in tensors.items()) >= 14
    with pytest.raises(SystemExit, match="is there already"):
        merge_of(folder, large, "unpacked", tmp_path / "large")


@pytest.mark.parametrize(
    "change, said",
    [
        (
            dict(init_lora_weights="loftq", loftq_config=dict(loftq_bits=4)),
            "loftq trained beside a base of its own",
        ),
        (dict(init_lora_weights="pissa_niter_4"), "beside a base of its own"),
        (dict(init_lora_weights="OLoRA"), "beside a base of its own"),
        (dict(fan_in_fan_out=True), "only plain LoRA is merged here, not fan_in"),
        (dict(use_dora=True), "only plain LoRA is merged here, not use_dora"),
    ],
)
def test_an_adapter_that_is_more_than_B_A_is_not_merged(trained, change, said):
    folder, _ = trained
    other = folder / scaled_copy(folder, 1, "other")
    config = json.loads((other / "adapter_config.json").read_text()) | change
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=said):
        merge_of(folder, "other", "checkpoint", folder / "never")
    assert not (folder / "never").exists()


@pytest.fixture
def fit(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    return runpy.run_path(str(RECIPES / "15_fit.py"))


def card(size):
    """GB of a card on which so many bytes just fit, by the recipe's reserve."""
    return (size + 1e9 + 1) / 0.9e9


def test_a_plan_pulls_one_lever_after_the_other(fit, monkeypatch, capsys):
    ways = [{}]
    for _, change in fit["PLAN"]:
        ways.append(ways[-1] | change)
    del ways[0]

    def count(config, length, way):  # nothing else fits
        return 80 - 10 * ways.index(way) if way in ways else 1e12

    monkeypatch.setitem(fit["plan"].__globals__, "count", count)
    for number, way in enumerate(ways):
        assert fit["plan"](None, 64, card(80 - 10 * number)) == way
        assert len(capsys.readouterr().out.splitlines()) == number + 1
    assert way["batch"] == 1 and way["method"] == "qlora" and way["checkpointing"]
    with pytest.raises(SystemExit, match="a larger card"):
        fit["plan"](None, 64, card(19))


def test_a_plan_that_fits_takes_more_records_at_a_time(fit, monkeypatch, capsys):
    def count(config, length, way):
        return way["batch"] * (5 if way.get("checkpointing") else 100)

    monkeypatch.setitem(fit["plan"].__globals__, "count", count)
    way = fit["plan"](None, 64, card(45))
    assert way == dict(method="lora", batch=8, checkpointing=True)
    assert "8 at a time fit" in capsys.readouterr().out


@pytest.mark.parametrize("levers", [0, 3])
def test_a_plan_is_trained_by(stand_in, fit, levers):
    config = AutoConfig.from_pretrained(stand_in / "model")
    way = {}
    for _, change in fit["PLAN"][: levers + 1]:
        way = way | change
    size = fit["count"](config, 96, way)
    common = (*quick(stand_in, f"fit{levers}"), "--card", card(size))
    out = run(stand_in, "15_fit.py", *common)
    assert len(re.findall(r"^.+ GB of [\d.]+$", out, re.M)) == levers + 1, out
    assert_it_learned(out)


def test_a_plan_with_every_lever_is_trained_by(stand_in, fit, monkeypatch, capsys):
    """On a stand-in 4 bits save nothing: its embedding, in 32 bits, is most of it."""
    way = {}
    for _, change in fit["PLAN"]:
        way = way | change
    monkeypatch.chdir(stand_in)
    base = fit["qlora_llm"]
    args = base.options().parse_args([*map(str, quick(stand_in, "fit6"))])
    load, add = fit["loader"](way), fit["adder"](way)
    base.main(args, load=load, add_lora=add, train=fit["trainer"](way))
    assert_it_learned(capsys.readouterr().out)


def test_a_plan_alone_loads_no_model(stand_in):
    common = (*quick(stand_in, "planned"), "--card", 24, "--plan")
    out = run(stand_in, "15_fit.py", *common)
    assert out.startswith("LoRA on 16 bits") and out.count("\n") == 1
    assert not (stand_in / "planned").exists()


# ---- 16: chats, looked at before a run

CHATS = """{% for m in messages %}{% if m.role == "user" %}{{ bos_token + m.content }}
{%- else %}{{ " =" }}{{ " " + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ " =" }}{% endif %}"""


def look_at_chats(folder, rows, template=CHATS, length=64, tokenizer=None):
    """What 16_check_data.py prints of rows, with tiny-decoder's tokenizer."""
    tokenizer = tokenizer or base_models.load("tiny-decoder", device="cpu")[1]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "words")
    file = folder / "chats.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    common = ("--model", "words", "--data", file, "--length", length)
    return run(folder, "16_check_data.py", *common)


def some_chats():
    """Three records: a pair, and chats of one and of two answers."""
    pairs = [(r.text, r.answer) for r in data.records("dates", "fi", 4, "train")]
    turns = [
        [dict(role="user", content=text), dict(role="assistant", content=answer)]
        for text, answer in pairs
    ]
    first = dict(prompt=pairs[0][0], answer=pairs[0][1])
    return [first, dict(messages=turns[1]), dict(messages=turns[2] + turns[3])]


def test_good_chats_are_let_through(tmp_path):
    out = look_at_chats(tmp_path, some_chats(), length=96)
    assert out.startswith("prompt, no loss: '<s>") and "3 chats" in out
    assert out.count("</s>") == 1 and out.endswith("nothing wrong was found\n")


BAD_CHATS = {  # what is wrong: (how it is made so, what is said)
    "no generation prompt": (
        dict(template=CHATS.partition("{%- if add")[0]),
        "the prompt stops before '='",
    ),
    "no end token": (
        dict(template=CHATS.replace(" + eos_token", "")),
        "no end token: the model would not learn to stop",
    ),
    "two start tokens": (
        dict(template="{{ bos_token }}" + CHATS),
        "two start tokens",
    ),
    "no place for the answer": (dict(length=8), "the prompt fills the length"),
    "a long answer": (dict(length=40), "the answer's end is cut off"),
    "no JSON": (dict(row="{"), "no JSON"),
    "a number": (dict(row=5), "no chat, but something else"),
    "a text for a chat": (
        dict(row=dict(messages="Hei")),
        "no chat, but something else",
    ),
    "an empty answer": (dict(row=dict(prompt="a", answer=" ")), "a turn without text"),
    "a turn without a role": (
        dict(row=dict(messages=[dict(content="a")] * 2)),
        "a turn without a role",
    ),
    "nothing": (dict(row="null"), "no chat, but something else"),
    "a list of turns": (dict(row=[dict(role="user", content="a")]), "no chat, but"),
    "a turn of parts": (
        dict(row=dict(messages=[dict(role="user", content=[dict(text="a")])] * 2)),
        "a turn that is not text",
    ),
    "turns that are no list": (dict(row=dict(messages=5)), "no chat, but something"),
    "a template that refuses it": (
        dict(template="{{ raise_exception('no system') }}" + CHATS),
        "the template refuses it: no system",
    ),
    "no answer": (
        dict(row=dict(messages=[dict(role="user", content="a")] * 2)),
        "the last turn is not the assistant's",
    ),
    "the same again": (dict(row="twice"), "the same chat again"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_bad_chat_is_named_and_stops_the_run(name, tmp_path):
    changes, said = BAD_CHATS[name]
    rows, row = some_chats(), changes.get("row")
    if row is not None:
        rows.append(rows[0] if row == "twice" else row)
    settings = {k: v for k, v in changes.items() if k != "row"}
    settings.setdefault("length", 96)
    with pytest.raises(SystemExit, match=re.escape(said)):
        look_at_chats(tmp_path, rows, **settings)


def test_a_completion_is_an_answer_too(tmp_path):
    rows = [dict(prompt="a", completion="b"), dict(prompt="a", answer="c")]
    assert "2 chats" in look_at_chats(tmp_path, rows)
    with pytest.raises(SystemExit, match="a turn without text"):
        look_at_chats(tmp_path, [*rows, dict(prompt="a", answr="b")])


def test_a_line_separator_in_a_text_ends_no_row(tmp_path):
    row = json.dumps(dict(prompt="a\u2028b", answer="c"), ensure_ascii=False)
    assert look_at_chats(tmp_path, [*some_chats(), row], length=96).count("4 chats")


def test_an_end_that_the_generation_config_names_is_one(tmp_path):
    """As Gemma's: its turns end otherwise than its tokenizer's texts."""
    template = CHATS.replace("eos_token", "'|'")
    with pytest.raises(SystemExit, match="no end token"):
        look_at_chats(tmp_path, some_chats(), template, length=96)
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("|")]
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path / "words")
    out = look_at_chats(tmp_path, some_chats(), template, length=96)
    assert out.endswith("nothing wrong was found\n")


# what ends a turn, where it is not the tokenizer's own end
ENDS = {"gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "phi3": "<|end|>"}
ENDS |= dict.fromkeys(("qwen2_5", "qwen3"), "<|im_end|>")
ENDS |= {"llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "gptoss": "<|return|>"}


@pytest.mark.parametrize("name", ENDS)
def test_the_templates_of_well_known_models_are_let_through(name, tmp_path):
    """trl ships them; the tokenizer here is tiny-decoder's, with that end added."""
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    template = (folder / f"{name}.jinja").read_text("utf8")
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    tokenizer.add_special_tokens({"eos_token": ENDS[name]})
    out = look_at_chats(tmp_path, some_chats(), template, 4096, tokenizer)
    assert out.endswith("nothing wrong was found\n")


def check_batch_of_the_page():
    page = nbformat.read(ROOT / "notebooks" / "16_data.ipynb", 4)
    names = {"torch": torch}
    for cell in page.cells:
        if cell.cell_type == "code" and cell.source.startswith(
            ("def sequences(", "def check_batch(")
        ):
            exec(cell.source, names)
    return names["check_batch"]


@pytest.mark.parametrize("name", ENDS)
def test_the_pages_check_lets_them_through_and_sees_what_is_wrong(name):
    check = check_batch_of_the_page()
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text("utf8")
    end = tokenizer.add_special_tokens({"additional_special_tokens": [ENDS[name]]})
    assert end == 1
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    chat = some_chats()[1]["messages"]
    render = functools.partial(tokenizer.apply_chat_template, return_dict=False)
    ids = render(chat)
    start = len(render(chat[:1], add_generation_prompt=True))
    ids = torch.tensor([ids + ids])
    half = ids.shape[1] // 2
    labels = ids.clone()
    labels[0, :start] = labels[0, half : half + start] = -100
    places = torch.arange(half).repeat(1, 2)
    good = dict(input_ids=ids, labels=labels, position_ids=places)
    ends = [end, tokenizer.eos_token_id]  # as a generation config names them
    check(good, tokenizer, ends=ends)
    with pytest.raises(ValueError, match="no end to learn"):
        check(good, tokenizer, ends=[tokenizer.bos_token_id])
    whole = labels.clone()
    whole[0, half + 1 :] = ids[0, half + 1 :]  # the second chat's prompt, too
    with pytest.raises(ValueError, match="a loss on the prompt"):
        check(good | dict(labels=whole), tokenizer, ends=ends)
    none = labels.clone()
    none[0, half:] = -100
    with pytest.raises(ValueError, match="no label"):
        check(good | dict(labels=none), tokenizer, ends=ends)
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="chats see each other"):
        check(good | dict(attention_mask=mask), tokenizer, ends=ends)


def test_an_empty_file_of_chats_is_no_good_one(tmp_path):
    with pytest.raises(SystemExit, match="the file is empty"):
        look_at_chats(tmp_path, [])


def test_a_file_of_chats_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match="there is no file nowhere.jsonl"):
        run(tmp_path, "16_check_data.py", "--data", "nowhere.jsonl")


def test_a_tokenizer_without_a_template_is_named(tmp_path):
    with pytest.raises(SystemExit, match="has no chat template"):
        look_at_chats(tmp_path, some_chats(), template=None)


# ---- 22: a folder made ready for strangers

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def to_ship(stand_in, tmp_path):
    """A copy of the trained adapter, and what ships it with four records."""
    out = shutil.copytree(stand_in / "first", tmp_path / "shipped")
    rows = (stand_in / "records.jsonl").read_text().splitlines()
    (tmp_path / "held-out.jsonl").write_text("\n".join(rows[:4]))
    (tmp_path / "records.jsonl").write_text("\n".join(rows[4:]))
    files = ("--held-out", tmp_path / "held-out.jsonl")
    files += ("--data", tmp_path / "records.jsonl")
    names = ("--base-name", "some-lab/base", "--licence", "mit")
    names += ("--base-licence", "apache-2.0")
    return out, (*quick(stand_in, out), *files, *names)


def test_an_adapter_is_shipped_with_a_card_of_what_was_measured(trained, tmp_path):
    folder, _ = trained
    out, common = to_ship(folder, tmp_path)
    before = (out / "adapter_model.safetensors").read_bytes()
    said = run(folder, "22_ship.py", *common, "--revision", COMMIT)
    scores = re.search(r"([\d.]+) with the adapter, ([\d.]+) without", said).groups()
    config = PeftConfig.from_pretrained(out)
    assert config.base_model_name_or_path == "some-lab/base"
    assert config.revision == COMMIT
    assert (out / "adapter_model.safetensors").read_bytes() == before

    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "some-lab/base" and card.data.license == "mit"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert card.data.to_dict()["sha256"][name] == digest
        assert card.text.count(digest) == 1
    assert all(f"| {score} |" in card.text for score in scores)
    assert "| 4 held-out records |" in card.text and COMMIT in card.text
    assert "base apache-2.0, data\nunknown" in card.text
    assert "a folder, whose commit was not checked" in card.text
    trained = hashlib.sha256((tmp_path / "records.jsonl").read_bytes()).hexdigest()
    for row in ("records | 36", "learning rate | 0.01", "epochs | 3.0"):
        assert f"| {row} |" in card.text
    assert trained in card.text and "steps |" not in card.text
    assert "nobody said it: steps, seed" in said
    assert "needed" not in card.text.lower()

    said = run(folder, "22_ship.py", "--out", out, "--verify")
    assert "both files are those" in said
    assert not list(out.glob(".*")), "no draft stays behind"
    whole = (out / "adapter_config.json").read_text()
    (out / "adapter_config.json").write_text(whole.replace("some-lab", "other-lab"))
    with pytest.raises(SystemExit, match="config.json is not the file"):
        run(folder, "22_ship.py", "--out", out, "--verify")
    (out / "adapter_config.json").write_text(whole)
    raw = bytearray(before)
    raw[-3] ^= 1
    (out / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(SystemExit, match="safetensors is not the file"):
        run(folder, "22_ship.py", "--out", out, "--verify")


def spoil(out, change):
    """Every tensor of the folder's file changed."""
    file = out / "adapter_model.safetensors"
    tensors = {name: change(name, t) for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


NOT_SHIPPED = {  # the revision, what is done to the folder, what is said
    "a branch": ("main", lambda out: None, "a commit: 40 digits"),
    "a short commit": (COMMIT[:12], lambda out: None, "a commit: 40 digits"),
    "a pickle": (
        COMMIT,
        lambda out: (out / "training_args.bin").write_bytes(b""),
        "training_args.bin may run code",
    ),
    "a script, deeper down": (
        COMMIT,
        lambda out: (out / "more").mkdir() or (out / "more/x.py").write_text(""),
        "x.py may run code",
    ),
    "no config": (
        COMMIT,
        lambda out: (out / "adapter_config.json").unlink(),
        "has no adapter_config",
    ),
    "NaN": (COMMIT, lambda out: spoil(out, lambda n, t: t / 0 * 0), "NaN or infinity"),
    "untrained": (
        COMMIT,
        lambda out: spoil(out, lambda n, t: t * ("lora_A" in n)),
        "never trained",
    ),
}


def told(out, **settings):
    """The adapter's config with other settings."""
    file = out / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


OTHER = COMMIT[::-1]
NOT_SHIPPED |= {
    "another commit in the config": (
        COMMIT,
        lambda out: told(out, revision=OTHER),
        f"names the commit {OTHER}",
    ),
    "another base in the config": (
        COMMIT,
        lambda out: told(out, base_model_name_or_path="some-lab/other"),
        "names the base some-lab/other",
    ),
}


@pytest.mark.parametrize("name", NOT_SHIPPED)
def test_what_is_not_fit_to_ship_is_refused(trained, tmp_path, name):
    folder, _ = trained
    revision, damage, said = NOT_SHIPPED[name]
    out, common = to_ship(folder, tmp_path)
    damage(out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match=said):
        run(folder, "22_ship.py", *common, "--revision", revision)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


FILES = {  # the options of the call that are changed, and what is said
    "no held-out file": ({"--held-out": ""}, "give a file as --held-out"),
    "no training file": ({"--data": ""}, "give a file as --data"),
    "none there": ({"--held-out": "none.jsonl"}, "none.jsonl cannot be read"),
    "the training file": (
        {"--data": "held-out.jsonl"},
        "4 of the 4 held-out prompts are in",
    ),
    "a folder without a name": ({"--base-name": ""}, "give its hub name"),
    "a row without an answer": ({"--held-out": "odd.jsonl"}, "record 2 has no answer"),
    "a row that is no object": ({"--data": "odd.jsonl"}, "record 3 has no prompt"),
}
ODD = '{"prompt": "a", "answer": "b"}\n\n{"prompt": "c"}\n[]\n'


@pytest.mark.parametrize("name", FILES)
def test_records_that_were_trained_on_are_not_held_out(trained, tmp_path, name):
    folder, _ = trained
    out, common = to_ship(folder, tmp_path)
    (tmp_path / "odd.jsonl").write_text(ODD)
    changed, said = FILES[name]
    words = list(map(str, common))
    for option, value in changed.items():
        value = value and "-name" not in option and tmp_path / value or value
        words[words.index(option) + 1] = str(value)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match=said):
        run(folder, "22_ship.py", *words, "--revision", COMMIT)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_what_is_known_of_the_training_comes_from_the_trainers_file(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        recipe = runpy.run_path(str(RECIPES / "22_ship.py"))
    (tmp_path / "records.jsonl").write_text("{}")
    logs = [dict(learning_rate=1e-4), dict(learning_rate=2e-4), dict(eval_loss=1)]
    state = dict(global_step=70, num_train_epochs=2, log_history=logs)
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    args = dict(out=tmp_path, data=tmp_path / "records.jsonl", seed=0)
    args = argparse.Namespace(**args, epochs=None, steps=None, rate=None)
    found = recipe["training"](args, dict(peft_version="0.21.2"), 1)
    del found["file's SHA-256"]
    known = dict(records=1, epochs=2, steps=70, seed=0)
    assert found == known | {"learning rate": 2e-4, "saved by peft": "0.21.2"}


def test_a_base_is_known_by_its_folder_in_the_hubs_cache(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        about = runpy.run_path(str(RECIPES / "22_ship.py"))["about_the_base"]
    for commit in (COMMIT, OTHER):
        (tmp_path / commit).mkdir()
    names = dict(base_name="some-lab/base", revision=COMMIT)
    args = argparse.Namespace(model=str(tmp_path / COMMIT), **names)
    assert "in the hub's cache. The adapter was saved without" in about(args, {})
    assert about(args, dict(revision=COMMIT)).endswith("cache.")
    args.model = str(tmp_path / OTHER)
    with pytest.raises(SystemExit, match="cache of another commit"):
        about(args, {})
    args = argparse.Namespace(model="some-lab/base", base_name=None, revision=COMMIT)
    assert "the hub's files at this commit" in about(args, dict(revision=COMMIT))


def test_a_card_that_cannot_be_written_leaves_no_draft(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        write = runpy.run_path(str(RECIPES / "22_ship.py"))["write"]
    path = tmp_path / "README.md"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write(path, "new \ud800")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_long_prompt_loses_its_middle_and_a_long_answer_is_left_out(stand_in):
    recipe = runpy.run_path(str(RECIPES / "qlora_llm.py"))
    tokenizer = AutoTokenizer.from_pretrained(stand_in / "model")
    words = "Tuesday, 3 March 2026 and " * 30
    record = dict(prompt=words, answer="2026-03-03")
    found = recipe["encode"](tokenizer, record, 64)
    ids, labels = found["input_ids"], found["labels"]
    assert len(ids) == len(labels) == 64
    learned = [i for i in labels if i != -100]
    assert tokenizer.decode(learned) == "2026-03-03</s>", "the answer survives"
    text = tokenizer.decode(ids)
    assert text.startswith("<s>user: Tuesday") and "assistant: 2026-03-03</s>" in text
    assert recipe["encode"](tokenizer, dict(prompt="x", answer=words), 64) is None


# ---- 20_medical.py


def test_questions_on_icd_are_answered_and_refusals_are_counted_apart(stand_in):
    few = ("--length", 256, "--epochs", 2, "--rate", 1e-2, "--tokens", 12)
    sizes = ("--train", 40, "--tests", 8)
    common = ("--model", "model", "--out", "medical", *few, *sizes)
    out = run(stand_in, "20_medical.py", *common)
    assert_it_learned(out)
    assert "40 records, 0 too long" in out
    loose = re.findall(r"^    (\d+) answers were no quotation", out, re.M)
    assert len(loose) == 2 and all(int(n) <= 8 for n in loose)
    pattern = r"^(adapter|base): ([\d.]+) answered, ([\d.]+) refused right$"
    rows = re.findall(pattern, out, re.M)
    assert [name for name, *_ in rows] == ["adapter", "base"]
    assert all(0 <= float(share) <= 1 for _, *two in rows for share in two)
    records = [json.loads(r) for r in (stand_in / "icd.jsonl").read_text().splitlines()]
    assert sum(r["answer"] == "not stated" for r in records) == 10, "a quarter"
    assert all(r["answer"] in r["prompt"] for r in records)


def test_a_right_answer_and_a_right_refusal_are_told_apart(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    recipe = runpy.run_path(str(RECIPES / "20_medical.py"))
    asked = recipe["icd_questions"].questions("test", 40)
    right = {recipe["prompt"](q): q.answer or "not stated" for q in asked}
    llm = recipe["qlora_llm"]
    args = llm.options().parse_args([])

    def scored(answer):
        monkeypatch.setattr(llm, "answer", lambda model, tokenizer, args: answer(args))
        return recipe["score"](None, None, asked, args)

    assert scored(lambda args: right[args.prompt]) == (1, 1, 0)
    assert scored(lambda args: "not stated") == (0, 1, 0)
    assert scored(lambda args: args.prompt[:2]) == (0, 0, 0), "of the entry, wrong"
    assert scored(lambda args: "Q99.Z") == (0, 1, 40), "no quotation: refused"
    assert scored(lambda args: "") == (0, 1, 40)


def test_a_question_that_is_too_long_is_named_and_left_out(
    stand_in, monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(RECIPES)
    recipe = runpy.run_path(str(RECIPES / "20_medical.py"))
    tokenizer = AutoTokenizer.from_pretrained(stand_in / "model")
    asked = recipe["icd_questions"].questions("train", 8)
    recipe["write"](tmp_path / "rows.jsonl", asked)
    lengths = [
        len(r["labels"])
        for r in recipe["read"](tmp_path / "rows.jsonl", tokenizer, 999)
    ]
    short = min(lengths)
    few = recipe["read"](tmp_path / "rows.jsonl", tokenizer, short)
    out = capsys.readouterr().out
    assert {len(r["labels"]) for r in few} == {short}
    assert out.count("left out, ") == 8 - lengths.count(short)
    assert f"{len(few)} records, {8 - len(few)} too long" in out
    with pytest.raises(SystemExit, match="no record has 5 tokens or fewer"):
        recipe["read"](tmp_path / "rows.jsonl", tokenizer, 5)


# ---- 21_dpo.py


@pytest.fixture(scope="module")
def preferred(stand_in):
    """The stand-in trained to prefer dates to `?`, and what the recipe printed."""
    pytest.importorskip("trl")
    rows = map(json.loads, (stand_in / "records.jsonl").read_text().splitlines())
    pairs = [
        json.dumps(dict(prompt=r["prompt"], chosen=r["answer"], rejected="?"))
        for r in rows
    ]
    (stand_in / "pairs.jsonl").write_text("\n".join(pairs))
    return stand_in, run(stand_in, "21_dpo.py", *quick(stand_in, "preferred"))


def held_out_rewards(out):
    """{"chosen", "rejected", "margins": (before, after)} that the recipe prints."""
    found = re.findall(r"^rewards/(\w+): (\S+) -> (\S+)", out, re.M)
    return {which: tuple(map(float, pair)) for which, *pair in found}


def test_dpo_raises_the_chosen_answers_above_the_rejected(preferred):
    folder, out = preferred
    assert "40 pairs, 0 too long" in out and "2 held-out pairs" in out
    rewards = held_out_rewards(out)
    assert {start for start, _ in rewards.values()} == {0.0}
    assert rewards["chosen"][1] > max(0.1, rewards["rejected"][1]), out
    assert rewards["margins"][1] > 0
    assert re.search(r"^answers that end: [01]\.\d\d -> [01]\.\d\d$", out, re.M), out
    assert answer_of(out, "with the adapter") != answer_of(out, "without it")
    files = {path.name for path in (folder / "preferred").rglob("*.safetensors")}
    assert files == {"adapter_model.safetensors"}, "the frozen copy is not saved"
    saved = load_file(folder / "preferred" / "adapter_model.safetensors").values()
    assert {w.dtype for w in saved} == {torch.float32}, "trained as trl rounded them"


def test_dpo_goes_on_from_an_adapter_that_is_its_own_reference(preferred, tmp_path):
    folder, _ = preferred
    more = ("--adapter", "preferred", "--answers", 0)
    out = run(folder, "21_dpo.py", *quick(folder, tmp_path / "again"), *more)
    rewards = held_out_rewards(out)
    starts = {start for start, _ in rewards.values()}
    assert starts == {0.0}, f"the reference is not where training begins: {out}"
    assert rewards["margins"][1] > 0


@pytest.fixture(scope="module")
def dpo():
    """The recipe's names."""
    pytest.importorskip("trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        return runpy.run_path(str(RECIPES / "21_dpo.py"))


def test_a_pairs_prompt_is_the_one_that_the_model_is_asked(preferred, dpo):
    folder, _ = preferred
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    asked = [dpo["qlora_llm"].chat(tokenizer, json.loads(x)["prompt"]) for x in lines]
    asked = tokenizer(asked, add_special_tokens=False)["input_ids"]
    rows = dpo["read"](folder / "pairs.jsonl", tokenizer, 96)
    found = tokenizer([row["prompt"] for row in rows])["input_ids"]
    assert sorted(found) == sorted(asked), "the first token once"


def test_a_step_that_bfloat16_would_lose_is_made(preferred, dpo, monkeypatch):
    """trl rounds A and B of a packed model; in the recipe they stay as they were."""
    folder, _ = preferred
    monkeypatch.chdir(folder)
    model, tokenizer = dpo["qlora_llm"].load("model")
    model = PeftModel.from_pretrained(model, "preferred", is_trainable=True)
    weights = {n: p.detach().clone() for n, p in dpo["trained"](model).items()}
    rows = dpo["read"]("pairs.jsonl", tokenizer, 96)
    common = ["--length", "96", "--rate", "2e-5", "--out", "x"]
    options = dpo["qlora_llm"].options()
    options.set_defaults(beta=0.1, answers=1.0)
    trainer = dpo["DPOTrainer"](
        model,
        args=dpo["settings"](options.parse_args(common)),
        train_dataset=dpo["Dataset"].from_list(rows),
        processing_class=tokenizer,
    )
    there = dict(trainer.model.named_parameters())
    rounded = [there[name].dtype == torch.bfloat16 for name in weights]
    assert all(rounded), "trl no longer rounds: the recipe and the page may say less"
    dpo["restore"](trainer.model, weights)
    copies = 0
    for name, before in weights.items():
        reference = there[name.replace(".default.", ".ref.")]
        for parameter in (there[name], reference):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before)
        copies += there[name].data_ptr() != reference.data_ptr()
    assert copies == len(weights), "the reference must not be trained along"
    moved = torch.cat([(w - 2e-5 != w).flatten() for w in weights.values()])
    assert moved.all(), "in float32 no step of this size is lost"


def test_a_pair_that_trl_would_cut_is_left_out_and_named(preferred, tmp_path, dpo):
    folder, _ = preferred
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    short = dict(prompt="1", chosen="1", rejected="2")
    long = short | dict(rejected="2" * 300)
    rows = [short, long, short]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = dpo["read"](path, tokenizer, 96)
    assert len(found) == 2 and "2 pairs, 1 too long: lines [2]" in out.getvalue()
    exact = dpo["tokens"](tokenizer, found[0])
    assert len(dpo["read"](path, tokenizer, exact)) == 2
    with pytest.raises(SystemExit, match="need two pairs"):
        dpo["read"](path, tokenizer, exact - 1)


def test_a_pair_of_equal_answers_is_refused(preferred, tmp_path):
    folder, _ = preferred
    same = json.dumps(dict(prompt="x", chosen="y", rejected="y"))
    (tmp_path / "same.jsonl").write_text(same)
    common = (*quick(folder, tmp_path / "no"), "--pairs", tmp_path / "same.jsonl")
    with pytest.raises(SystemExit, match="line 1 prefers an answer to itself"):
        run(folder, "21_dpo.py", *common)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("chapter", PAGES)
def test_the_page_shows_the_file(chapter):
    """In a fold, as it stands. A recipe that no page shows would not be found."""
    text = "\n".join(
        cell.source
        for cell in nbformat.read(ROOT / "notebooks" / f"{chapter}.ipynb", 4).cells
        if cell.cell_type == "markdown"
    )
    for name in PAGES[chapter]:
        code = (RECIPES / name).read_text("utf8").strip()
        assert f"```python\n{code}\n```" in text, f"{chapter} does not show {name}"


def test_every_recipe_is_shown_and_short_in_width():
    assert sorted(sum(PAGES.values(), [])) == sorted(
        p.name for p in RECIPES.glob("*.py")
    )
    for path in RECIPES.glob("*.py"):
        wide = [line for line in path.read_text("utf8").splitlines() if len(line) > 80]
        assert not wide, f"{path.name}: {wide}"


# ---- 19_serve.py: many adapters in one batch


def recipe_19():
    """The names of the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        return runpy.run_path(str(RECIPES / "19_serve.py"))


@pytest.fixture(scope="module")
def serving(two):
    """The recipe's names, and the stand-in in 32 bits with both adapters in slots."""
    recipe = recipe_19()
    server = recipe["Server"](load(two).eval(), r=16, size=3)
    for name in ("first", "another"):
        recipe["put"](server, name, recipe["read"](two / name, server.model))
    return recipe, server


def test_a_row_of_a_mixed_batch_is_its_adapter_alone(two, serving):
    _, server = serving
    names = ["another", None, "first", "another"]
    ids = torch.arange(5, 85).reshape(4, 20)
    with torch.no_grad():
        with server.using(names) as model:
            mixed = model(input_ids=ids).logits
        base = server.model(input_ids=ids).logits
        assert torch.equal(mixed[1], base[1]), "no name: the base to the bit"
        for name in ("first", "another"):
            rows = torch.tensor([n == name for n in names])
            alone = load(two, name).eval()(input_ids=ids).logits
            moved = (alone - base)[rows].abs().max()
            assert (mixed - alone)[rows].abs().max() < 1e-5 * max(1, moved)
            assert moved > 0.1


def test_a_mixed_batch_with_the_cache_writes_what_each_row_alone_writes(serving):
    recipe, server = serving
    tokenizer = AutoTokenizer.from_pretrained(server.model.config.name_or_path)
    texts = ["a longer text than the others =", "12 =", "March =", "x y z ="]
    names = ["first", "another", None, "first"]
    mixed = recipe["answer"](server, tokenizer, texts, names, 12)
    for row, (text, name) in enumerate(zip(texts, names, strict=True)):
        alone = recipe["answer"](server, tokenizer, [text], [name], 12)
        assert alone == [mixed[row]]


def test_requests_from_a_file_are_answered_over_a_base_in_4_bits(two, tmp_path):
    common = (*quick(two, "unused"), "--adapters", "first", "another")
    out = run(two, "19_serve.py", *common)
    answers = {name: answer_of(out, name) for name in ("first", "another", "none")}
    assert len(set(answers.values())) == 3, f"each answers in its own way: {out}"
    prompt = common[common.index("--prompt") + 1]
    rows = [dict(prompt=prompt, adapter="another"), dict(prompt=prompt)]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    again = run(two, "19_serve.py", *common, "--requests", file)
    assert [line.split(":")[0] for line in again.splitlines()[-2:]] == [
        "another",
        "none",
    ]


SERVED_WRONGLY = {  # a setting changed in another/, the request's name, what is said
    "an unknown name": ({}, "nobody", "no adapter is named 'nobody'"),
    "DoRA": (dict(use_dora=True), "first", "another is no plain LoRA: use_dora is T"),
    "no name of a base": (
        dict(base_model_name_or_path=None),
        "first",
        r"another is for the base \(none\), this is model",
    ),
    "another base": (
        dict(base_model_name_or_path="elsewhere/other"),
        "first",
        "another is for the base elsewhere/other, this is model",
    ),
}


@pytest.mark.parametrize("name", SERVED_WRONGLY)
def test_what_cannot_be_served_is_refused(two, name, tmp_path):
    settings, asked, said = SERVED_WRONGLY[name]
    config = two / "another" / "adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | settings))
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(dict(prompt="x", adapter=asked)))
    common = (*quick(two, "unused"), "--adapters", "first", "another")
    try:
        with pytest.raises(SystemExit, match=said):
            run(two, "19_serve.py", *common, "--requests", file)
    finally:
        config.write_text(before)


def test_a_request_without_a_prompt_is_named(two, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "x"}\n\n{"promt": "x"}\n')
    common = (*quick(two, "unused"), "--adapters", "first", "another")
    with pytest.raises(SystemExit, match="request 2 has no prompt"):
        run(two, "19_serve.py", *common, "--requests", file)


def copied(folder, target, *lost, **settings):
    """A copy of an adapter's folder with other settings and without some tensors."""
    shutil.copytree(folder, target)
    config = target / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    tensors = load_file(target / "adapter_model.safetensors")
    kept = {n: t.clone() for n, t in tensors.items() if not n.endswith(lost or "-")}
    save_file(kept, target / "adapter_model.safetensors")
    return target


MORE_THAN_A_AND_B = {  # what a row's answer would hang on besides
    "peft_type": "LOHA",
    "use_dora": True,
    "alora_invocation_tokens": [7, 8],
    "init_lora_weights": "pissa",
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "bias": "all",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2], [1, 2]],
    "layers_to_transform": 0,
    "a_setting_of_tomorrow": 1,
}


@pytest.mark.parametrize("setting", MORE_THAN_A_AND_B)
def test_what_is_more_than_a_plain_lora_is_refused(two, serving, setting, tmp_path):
    recipe, server = serving
    value = MORE_THAN_A_AND_B[setting]
    folder = copied(two / "first", tmp_path / "odd", **{setting: value})
    with pytest.raises(ValueError, match=f"no plain LoRA: {setting} is"):
        recipe["read"](folder, server.model)


@pytest.mark.parametrize("start", ("olora", "corda", "loftq", "pissa_niter_4"))
def test_a_start_that_changes_the_base_is_refused(two, serving, start, tmp_path):
    recipe, server = serving
    folder = copied(two / "first", tmp_path / "odd", init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}'"):
        recipe["read"](folder, server.model)


def test_the_rule_is_that_of_the_door_to_adapter_files(serving):
    recipe, _ = serving
    known = f"{peft_files.HARMLESS['']} {peft_files.HARMLESS['LORA']}".split()
    acted_on = {*peft_files.DEFAULTS["LORA"]}
    refused = {"bias", "use_dora", "modules_to_save"}  # what peft_files can do, too
    assert {*recipe["KNOWN"]} == {*known} | acted_on - refused
    assert recipe["STARTS"] == peft_files.KEEP_THE_BASE


def test_a_pissa_is_served_once_it_is_converted(two, tmp_path):
    recipe = recipe_19()
    base = load(two).eval()
    ids = torch.arange(5, 45).reshape(2, 20)
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"])
    tuned = get_peft_model(copy.deepcopy(base), config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    for name, p in tuned.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn(p.shape)
    tuned.save_pretrained(tmp_path / "as-it-is")
    start = str(tmp_path / "start")
    tuned.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=start
    )
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa'"):
        recipe["read"](tmp_path / "as-it-is", base)
    server = recipe["Server"](base)
    recipe["put"](server, "x", recipe["read"](tmp_path / "converted", base))
    with torch.no_grad(), server.using(["x", None]) as model:
        mixed = model(input_ids=ids).logits
    with torch.no_grad():
        assert (mixed - tuned(input_ids=ids).logits)[0].abs().max() < 1e-4
        assert (mixed - tuned(input_ids=ids).logits)[1].abs().max() > 1e-2


@pytest.mark.parametrize("side", "AB")
def test_a_file_that_has_lost_a_tensor_is_refused(two, serving, side, tmp_path):
    recipe, server = serving
    lost = f"layers.1.self_attn.q_proj.lora_{side}.weight"
    folder = copied(two / "first", tmp_path / "torn", lost)
    with pytest.raises(ValueError, match=r"q_proj\.lora_.\.weight is not of a pair"):
        recipe["read"](folder, server.model)


def test_a_rank_that_is_not_the_files_is_refused(two, serving, tmp_path):
    recipe, server = serving
    folder = copied(two / "first", tmp_path / "odd", r=5)
    with pytest.raises(ValueError, match="is not of a pair of rank 5"):
        recipe["read"](folder, server.model)
    folder = copied(two / "first", tmp_path / "none", ".weight")
    with pytest.raises(ValueError, match="holds no tensor"):
        recipe["read"](folder, server.model)


ONE_BASE = {  # a file's name of its base, the model's, and whether they may be one
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"): True,
    ("meta-llama/Llama-3.1-8B", "somebody-else/Llama-3.1-8B"): False,
    ("meta-llama/Llama-3.1-8B", "/models/Llama-3.1-8B"): True,
    ("../models/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"): True,
    ("openai-community/gpt2", "gpt2"): True,
    ("../models/Llama-3.1-8B", "/models/Llama-3.2-1B"): False,
    (None, "gpt2"): False,
}


@pytest.mark.parametrize(("its", "ours"), ONE_BASE)
def test_the_base_is_compared_by_its_name(serving, its, ours):
    recipe, _ = serving
    config = dict(peft_type="LORA", base_model_name_or_path=its)
    if ONE_BASE[its, ours]:
        recipe["check"]("x", config, ours)
    else:
        with pytest.raises(ValueError, match="is for the base"):
            recipe["check"]("x", config, ours)


def test_nothing_of_a_customer_is_left_to_the_next_in_its_slot(two):
    recipe = recipe_19()
    base = load(two).eval()
    every = recipe["read"](two / "first", base)
    few = {path: (A[:3], B[:, :3]) for path, (A, B) in [*every.items()][:2]}
    ids = torch.arange(5, 45).reshape(2, 20)
    answers = []
    for before in ([], [every]):
        server = recipe["Server"](copy.deepcopy(base), r=16, size=1)
        for factors in before:
            recipe["put"](server, "former", factors)
            with pytest.raises(ValueError, match="no slot is free: remove"):
                recipe["put"](server, "next", few)
            recipe["remove"](server, "former")
            with pytest.raises(ValueError, match="named 'former'"):
                recipe["remove"](server, "former")
        recipe["put"](server, "next", few)
        with torch.no_grad(), server.using(["next", None]) as model:
            answers.append(model(input_ids=ids).logits)
        plain = base(input_ids=ids).logits.detach()
        assert torch.equal(answers[-1][1], plain[1])
        assert (answers[-1] - plain)[0].abs().max() > 1e-3, "the next one is served"
    assert torch.equal(*answers), "the former customer's layers are still active"
    with pytest.raises(ValueError, match="no adapter is named None"):
        recipe["remove"](server, None)


def test_a_server_answers_one_batch_at_a_time(serving):
    _, server = serving
    ids = torch.arange(5, 45).reshape(2, 20)
    errors = []

    def second():
        try:
            with server.using(["another"] * 2):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with torch.no_grad(), server.using(["first", None]) as model:
        before = model(input_ids=ids).logits
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert torch.equal(model(input_ids=ids).logits, before), "the outer goes on"
    assert len(errors) == 2 and "one at a time" in errors[0]
    with torch.no_grad(), server.using(["first", None]) as model:
        assert torch.equal(model(input_ids=ids).logits, before)


def test_what_does_not_fit_a_server_changes_nothing(two, serving):
    recipe, server = serving
    factors = recipe["read"](two / "first", server.model)
    path, (A, B) = next(iter(factors.items()))
    wrong = {
        "'first' is taken": ("first", factors),
        "rank 17": ("wide", {path: (torch.ones(17, A.shape[1]), B[:, :1])}),
        "does not fit: lm_head.x": ("lost", {"lm_head.x": (A, B)}),
        f"does not fit: {re.escape(path)}": ("thin", {path: (A[:, 1:], B)}),
        f"not fit: {re.escape(path)}, rank 2": ("odd", {path: (A[:2], B[:, :1])}),
    }
    before = {n: (s.A.clone(), s.B.clone()) for n, s in server.layers.items()}
    for said, (name, new) in wrong.items():
        with pytest.raises(ValueError, match=said):
            recipe["put"](server, name, new)
    with pytest.raises(ValueError, match="2 rows, but 1 names"):
        with server.using(["first"]) as model:
            model(input_ids=torch.ones(2, 3, dtype=torch.long))
    assert list(server.numbers) == [None, "first", "another"]
    for name, (A, B) in before.items():
        slots = server.layers[name]
        assert torch.equal(slots.A, A) and torch.equal(slots.B, B)
        assert slots.a is None and slots.b is None, "and after the error none is on"


def test_the_page_builds_the_server_of_the_file():
    page = nbformat.read(ROOT / "notebooks" / "19_many_adapters.ipynb", 4)
    cells = "\n\n\n".join(c.source for c in page.cells if c.cell_type == "code")
    text = (RECIPES / "19_serve.py").read_text("utf8")
    for node in ast.parse(text).body:
        name = getattr(node, "name", None)
        if name in ("Slots", "Server", "check", "read", "fits", "put", "remove"):
            assert ast.get_source_segment(text, node) in cells, name


# ---- 18_train.py: the library stack


@pytest.fixture(scope="module")
def pairs(stand_in):
    """The stand-in's folder, with its records as prompts and completions."""
    rows = map(json.loads, (stand_in / "records.jsonl").read_text().splitlines())
    rows = [dict(prompt=r["prompt"], completion=r["answer"]) for r in rows]
    (stand_in / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return stand_in


STACK = ("--model", "model", "--data", "pairs.jsonl", "--batch", 4, "--accumulate", 2)
SIX = ("--steps", 6, "--save-every", 2, "--rate", 1e-2)


def adapters_apart(one, other):
    one, other = (load_file(f / "adapter_model.safetensors") for f in (one, other))
    assert one.keys() == other.keys()
    return max((one[n] - other[n]).abs().max().item() for n in one)


@pytest.mark.parametrize("bits", [(), ("--load-in-4bit",)], ids=["32 bits", "4 bits"])
def test_a_run_goes_on_from_its_last_whole_checkpoint(pairs, tmp_path, bits):
    common = (*STACK, *SIX, "--dropout", 0.2, *bits)
    run(pairs, "18_train.py", *common, "--out", tmp_path / "whole")
    run(pairs, "18_train.py", *common, "--out", tmp_path / "cut")
    assert adapters_apart(tmp_path / "whole", tmp_path / "cut") == 0, "not repeatable"
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    # as if it had been killed while it saved its last checkpoint
    (tmp_path / "cut" / "checkpoint-6" / "trainer_state.json").write_text('{"epo')
    out = run(pairs, "18_train.py", *common, "--out", tmp_path / "cut", "--resume")
    assert out.count("'loss'") == 2, "it goes on at step 5 of 6"
    assert adapters_apart(tmp_path / "whole", tmp_path / "cut") == 0
    trained = logits(load(pairs, tmp_path / "cut"))
    assert (trained - logits(load(pairs))).abs().max() > 0.01


def test_resume_without_a_checkpoint_starts_anew(pairs, tmp_path):
    common = (*STACK, "--steps", 2, "--out", tmp_path / "new", "--resume")
    out = run(pairs, "18_train.py", *common)
    assert out.count("'loss'") == 2 and "starts anew" in out


STACKED_WRONGLY = {  # arguments, what is said
    "no data": (("--data", "nowhere.jsonl"), "there is no file nowhere.jsonl"),
    "one process to shard": (("--shard",), "two or more processes"),
    "an earlier run's folder": (("--out", "earlier"), "--resume goes on from them"),
    "a record without an answer": (("--data", "bare.jsonl"), "row 2: a record is"),
    "no record": (("--data", "empty.jsonl"), "empty.jsonl is empty"),
}


@pytest.mark.parametrize("name", STACKED_WRONGLY)
def test_a_run_that_could_not_end_well_is_refused_at_once(pairs, name):
    (pairs / "earlier" / "checkpoint-2").mkdir(parents=True, exist_ok=True)
    whole = '{"prompt": "a", "completion": "b"}'
    (pairs / "bare.jsonl").write_text(whole + '\n{"prompt": "a"}\n')
    (pairs / "empty.jsonl").write_text("")
    arguments, said = STACKED_WRONGLY[name]
    with pytest.raises(SystemExit, match=said):
        run(pairs, "18_train.py", *STACK, "--out", "refused", *arguments)
    assert not (pairs / "refused").exists()


def test_a_missing_library_is_named_before_any_work(monkeypatch):
    recipe = runpy.run_path(str(RECIPES / "18_train.py"))
    for name, words in (("bitsandbytes", "--load-in-4bit"), ("wandb", "--report-to")):
        more = [words, "wandb"] if name == "wandb" else [words]
        args = recipe["options"]().parse_args(["--data", "x", *more])
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name: None)
            with pytest.raises(SystemExit, match=f"pip install {name}"):
                recipe["check"](args)


def test_wandb_without_a_login_goes_on_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    recipe = runpy.run_path(str(RECIPES / "18_train.py"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for known, mode in ((True, "online"), (False, "offline")):
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setattr("wandb.login", lambda prompt, known=known: known)
        recipe["log_to_wandb"](tmp_path / "out")
        assert os.environ["WANDB_MODE"] == mode
        assert ("no login to wandb" in capsys.readouterr().out) is not known
    monkeypatch.setattr("wandb.login", lambda prompt: 1 / 0)  # nobody answers
    monkeypatch.setenv("WANDB_MODE", "online")
    recipe["log_to_wandb"](tmp_path / "out")
    assert os.environ["WANDB_MODE"] == "offline"


def test_two_processes_with_a_shared_base_train_the_adapter_of_one(pairs, tmp_path):
    """FSDP2 by gloo; with SGD, for Adam makes steps of rounding."""
    common = (*STACK, "--steps", 4, "--optim", "sgd", "--rate", 0.5)
    run(pairs, "18_train.py", *common, "--out", tmp_path / "one")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    words += ["--num_processes", "2", "--main_process_port", "0"]
    words += [RECIPES / "18_train.py", *common, "--out", tmp_path / "two"]
    words += ["--batch", 2, "--shard"]
    quiet = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        list(map(str, words)), cwd=pairs, env=quiet, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert adapters_apart(tmp_path / "one", tmp_path / "two") < 1e-5
