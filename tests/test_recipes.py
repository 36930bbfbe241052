"""The scripts in recipes/ run to the end on stand-ins, and change their answers.

A stand-in is a folder as a hub's model lies in it: the real architecture, small random
weights, tiny-decoder's tokenizer with a chat template. One more is tiny-decoder
itself. What these runs score says nothing of a real model."""

import json
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peftlab.kit import base_models, data

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
PAGES = {  # a chapter, and the recipes that its page shows
    "01_quickstart": ["qlora_llm.py"],
    "02_lora": ["02_lora.py"],
    "03_learning_and_forgetting": ["03_replay.py"],
    "04_why_low_rank": ["04_rank.py"],
    "11_what_training_costs": ["11_peak_memory.py"],
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


@pytest.fixture(scope="module", params=[*KINDS, "tiny-decoder"])
def stand_in(request, tmp_path_factory):
    """A folder in the hub's layout, with a file of records beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    if request.param in KINDS:
        config, kind = KINDS[request.param]
        torch.manual_seed(0)
        model = kind(config(vocab_size=len(tokenizer), **SHAPE))
    tokenizer.chat_template = TEMPLATE
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for file, language in (("records", "fi"), ("general", "en")):
        records = data.records("dates", language, 64, "train", 0)
        lines = [json.dumps(dict(prompt=r.text, answer=r.answer)) for r in records]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(stand_in, monkeypatch, capfd):
    """Run a recipe in the stand-in's folder, as the command line does: its output."""
    torch.set_num_threads(1)
    monkeypatch.chdir(stand_in)
    monkeypatch.syspath_prepend(RECIPES)
    prompt = json.loads(Path("records.jsonl").read_text().splitlines()[0])["prompt"]

    def run(name, *more, general=True):
        common = ["--model", "model", "--prompt", prompt] if general else []
        monkeypatch.setattr(sys, "argv", [name, *common, *map(str, more)])
        torch.manual_seed(0)
        runpy.run_path(str(RECIPES / name), run_name="__main__")
        return capfd.readouterr().out

    return run


QUICK = ("--length", 96, "--epochs", 3, "--rate", 1e-2)


def assert_it_learned(out):
    before, after = re.search(r"held-out records: ([\d.]+) -> ([\d.]+)", out).groups()
    assert float(after) < float(before), out
    on = re.search(r"^with the adapter: ?(.*)$", out, re.M)[1]
    off = re.search(r"^without it: ?(.*)$", out, re.M)[1]
    assert on != off, "the adapter changes no answer"


def adapter(folder):
    base = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


def logits(model):
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_qlora_from_records_to_an_answer(run):
    out = run("qlora_llm.py", "--data", "records.jsonl", *QUICK)
    assert_it_learned(out)
    assert "64 records, 0 answers too long" in out
    files = {p.name for p in Path("my-adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files


def test_lora_in_16_bits_and_the_merged_model(run):
    out = run("02_lora.py", *QUICK, "--merged", "merged")
    assert_it_learned(out)
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    base = AutoModelForCausalLM.from_pretrained("model").eval()
    ours = logits(adapter("my-adapter"))
    off = (logits(merged.float()) - ours).norm() / ours.norm()
    moved = (logits(base.float()) - ours).norm() / ours.norm()
    assert off < 0.1 * moved, f"merged differs by {off:.3g}, the base by {moved:.3g}"


@pytest.mark.parametrize("share, mixed", [(0, 0), (0.25, 20)])
def test_replay_measures_what_is_forgotten(run, share, mixed):
    out = run("03_replay.py", *QUICK, "--share", share)
    assert_it_learned(out)
    assert f"61 records, {mixed} general ones" in out
    assert re.search(r"loss on general records: [\d.]+ -> [\d.]+", out)


def test_the_rank_of_a_change_and_a_smaller_adapter(run):
    run("qlora_llm.py", *QUICK)
    out = run("04_rank.py", "--rank", 16, "--out", "same", general=False)
    layers = re.findall(
        r"^(\S+\.weight): size ([\d.]+), 90% in rank (\d+) of 16", out, re.M
    )
    model = adapter("my-adapter")
    assert len(layers) == sum("lora_A" in name for name, _ in model.named_modules()) / 2
    weights = dict(AutoModelForCausalLM.from_pretrained("model").named_parameters())
    for path, size, rank in layers:
        layer = model.get_submodule("base_model.model." + path.removesuffix(".weight"))
        change = layer.get_delta_weight("default").detach()
        want = change.norm() / weights[path].detach().float().norm()
        assert float(size) == pytest.approx(want.item(), abs=1e-4, rel=1e-2)
        energy = torch.linalg.svdvals(change).square()
        assert energy[: int(rank)].sum() >= 0.8999 * energy.sum()
        assert energy[: int(rank) - 1].sum() < 0.9001 * energy.sum()

    ours = logits(model)
    whole = logits(adapter("same"))
    assert (whole - ours).norm() < 1e-4 * ours.norm(), "rank 16 of 16 loses nothing"
    run("04_rank.py", "--rank", 4, "--out", "cut", general=False)
    cut = adapter("cut")
    assert cut.peft_config["default"].r == 4
    gap = (logits(cut) - ours).norm()
    base = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    assert gap < (logits(base) - ours).norm(), "the cut adapter is nearer than none"


def test_the_calculator_beside_the_measured_peak(run):
    out = run("11_peak_memory.py", "--length", 64, "--epochs", 1, "--rate", 1e-2)
    assert_it_learned(out)
    found = dict(re.findall(r"^(predicted|measured) +([\d.]+) GB", out, re.M))
    ratio = float(found["measured"]) / float(found["predicted"])
    assert 0.5 < ratio < 3, f"a stand-in of a few MB is off by {ratio:.2f}"


def test_a_long_prompt_loses_its_middle_and_a_long_answer_is_left_out(run, stand_in):
    sys.path.insert(0, str(RECIPES))
    try:
        import qlora_llm
    finally:
        sys.path.remove(str(RECIPES))
    _, tokenizer = qlora_llm.load("model")
    long = "Tuesday, 3 March 2026 and " * 30
    found = qlora_llm.encode(tokenizer, dict(prompt=long, answer="2026-03-03"), 64)
    ids, labels = found["input_ids"], found["labels"]
    assert len(ids) == len(labels) == 64
    learned = [i for i in labels if i != -100]
    assert tokenizer.decode(learned) == "2026-03-03</s>", "the answer survives"
    text = tokenizer.decode(ids)
    assert text.startswith("<s>user: Tuesday") and "assistant: 2026-03-03</s>" in text
    assert qlora_llm.encode(tokenizer, dict(prompt="x", answer=long), 64) is None


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
