"""What `peft_files.inspect` says of healthy folders (nothing) and of broken ones: the
fault, in one sentence. The folders are real: saved by peft, and by peft_files.save."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import MODELS, SMALL, bert, jiggle, llama, seeded
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftlab import (
    adapter_folder,
    adapter_report,
    dora,
    ia3,
    lora,
    peft_files,
    pissa,
    prefix,
    prompt,
    vera,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FOUR = ["q_proj", "v_proj", "up_proj", "down_proj"]


def deep(layers=4, width=32):
    sizes = {**SMALL, "num_hidden_layers": layers, "hidden_size": width}
    return seeded(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)))


def by_peft(folder, plain, config):
    model = get_peft_model(copy.deepcopy(plain), config)
    jiggle(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return folder


def by_us(folder, plain, method, *args, **settings):
    model = method.add(copy.deepcopy(plain), *args, **settings)
    jiggle(method.state_dict(model).values())
    peft_files.save(model, folder)
    return folder


CAUSAL = dict(task_type="CAUSAL_LM")
PAIR = dict(target_modules=FOUR, **CAUSAL)
HEALTHY = {  # who saved what: the method's name in the report, and how it is made
    "peft's LoRA": ("LoRA", by_peft, LoraConfig(r=4, lora_alpha=6, **PAIR)),
    "peft's rsLoRA": ("LoRA", by_peft, LoraConfig(r=4, use_rslora=True, **PAIR)),
    "peft's DoRA": ("DoRA", by_peft, LoraConfig(r=4, use_dora=True, **PAIR)),
    "peft's PiSSA": ("PiSSA", by_peft, LoraConfig(init_lora_weights="pissa", **PAIR)),
    "peft's biases": ("LoRA", by_peft, LoraConfig(bias="lora_only", **PAIR)),
    "peft's all-linear": ("LoRA", by_peft, LoraConfig(target_modules="all-linear")),
    "peft's ranks": ("LoRA", by_peft, LoraConfig(rank_pattern={"q_proj": 2}, **PAIR)),
    "peft's expression": (
        "LoRA",
        by_peft,
        LoraConfig(target_modules=r".*\.[01]\.(mlp|self_attn)\.(q|up)_proj", **CAUSAL),
    ),
    "peft's embedding": ("LoRA", by_peft, LoraConfig(target_modules=["embed_tokens"])),
    "peft's head": (
        "LoRA",
        by_peft,
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ),
    "peft's VeRA": ("VeRA", by_peft, VeraConfig(r=8, target_modules=["q_proj"])),
    "peft's IA3": (
        "IA3",
        by_peft,
        IA3Config(target_modules=FOUR, feedforward_modules=["down_proj"], **CAUSAL),
    ),
    "peft's prompt": (
        "prompt",
        by_peft,
        PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    ),
    "peft's prefix": (
        "prefix",
        by_peft,
        PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
    ),
    "our LoRA": ("LoRA", by_us, lora, FOUR, 4, 6),
    "our DoRA": ("DoRA", by_us, dora, FOUR, 4, 6),
    "our PiSSA": ("LoRA", by_us, pissa, FOUR, 4),
    "our VeRA": ("VeRA", by_us, vera, ["q_proj"], 8),
    "our IA3": ("IA3", by_us, ia3, FOUR),
    "our prompt": ("prompt", by_us, prompt, 4),
    "our prefix": ("prefix", by_us, prefix, 4),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_folder_has_no_problem(name, tmp_path):
    method, save, *rest = HEALTHY[name]
    plain = llama()
    save(tmp_path, plain, *rest)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = {key: t.clone() for key, t in plain.state_dict().items()}
    for model in (None, plain):
        found = peft_files.inspect(tmp_path, model)
        assert not found.problems, f"{found}"
        assert found.ok and found and found.method == method
        assert str(found).endswith("nothing wrong was found")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert all(torch.equal(t, state[key]) for key, t in plain.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "bert-model", "gpt2", "tiny-decoder"])
def test_other_models_have_no_problem_either(name, tmp_path):
    plain = MODELS[name]()
    more = dict(task_type="SEQ_CLS") if name == "bert" else {}
    config = LoraConfig(target_modules="all-linear", **more)
    by_peft(tmp_path / "theirs", plain, config)
    by_us(tmp_path / "ours", plain, lora, "all-linear")
    for folder in ("theirs", "ours"):
        found = peft_files.inspect(tmp_path / folder, plain)
        assert found.ok, f"{found}"
        assert ("classifier" in found.heads) == (name == "bert")


def test_it_says_what_the_folder_holds(tmp_path):
    plain = llama()
    plain.config._name_or_path = "some/base"
    by_us(tmp_path, plain, lora, ["q_proj", "up_proj"], 4, 6)
    found = peft_files.inspect(str(tmp_path))
    assert (found.r, found.alpha, found.scaling) == (4, 6, 1.5)
    assert found.targets == ("q_proj", "up_proj") and found.layers == 4
    assert found.parameters == sum(t.numel() for t in weights(tmp_path).values())
    assert found.nbytes == os.path.getsize(tmp_path / WEIGHTS)
    for words in ("LoRA", "rank 4", "alpha 6", "scaled by 1.5", "q_proj, up_proj"):
        assert words in str(found)
    assert f"4 layers, {found.parameters:,} parameters" in str(found)
    assert "base model: 'some/base'" in str(found)


# Broken in one way each


def weights(folder):
    return load_file(folder / WEIGHTS)


def rewrite(folder, change):
    """Save the tensors anew, as `change` returns them: with no digest."""
    tensors = {key: t.clone() for key, t in change(weights(folder)).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def reconfigure(folder, *without, **settings):
    """Change the config, and let the weights forget which one was theirs."""
    rewrite(folder, dict)
    config = {**json.loads((folder / CONFIG).read_text()), **settings}
    for key in without:
        del config[key]
    (folder / CONFIG).write_text(json.dumps(config))


def renamed(folder, old, new):
    rewrite(folder, lambda ts: {k.replace(old, new, 1): t for k, t in ts.items()})


def zeroed(folder, end=".lora_B.weight"):
    rewrite(folder, lambda ts: {k: t * (not k.endswith(end)) for k, t in ts.items()})


def filled(folder, value):
    def change(tensors):
        tensors[max(tensors)].view(-1)[3] = value
        return tensors

    rewrite(folder, change)


def dropped(folder, *parts):
    rewrite(
        folder,
        lambda ts: {k: t for k, t in ts.items() if not any(p in k for p in parts)},
    )


def pickled(folder):
    torch.save(weights(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut(folder, share):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()


def swapped(folder):
    """Another adapter's config beside the weights, both saved by us."""
    by_us(folder / "other", deep(), lora, FOUR, 4, 60)
    shutil.copy(folder / "other" / CONFIG, folder / CONFIG)
    shutil.rmtree(folder / "other")


def write(folder, name, text):
    (folder / name).write_text(text)


def change_one(folder):
    """Half the layers without a pattern to them: 1 and 2 of q, 0 of up."""
    dropped(folder, "1.self_attn.q_proj", "2.self_attn.q_proj", "2.mlp.up_proj")


LORA = {  # a fault, how it is made, what is said
    "torch.compile": (renamed, (".model.model.", ".model._orig_mod.model."), "compile"),
    "compiled outside": (renamed, ("base_", "_orig_mod.base_"), "torch.compile"),
    "DataParallel": (renamed, (".model.model.", ".model.module.model."), "DataPara"),
    "DataParallel outside": (renamed, ("base_model", "module.base_model"), "DataPara"),
    "FSDP": (renamed, (".layers.", ".layers._fsdp_wrapped_module."), "FSDP was around"),
    ".default.": (renamed, (".weight", ".default.weight"), "all 32 .*adapter's name"),
    "no prefix": (renamed, ("base_model.model.", ""), "lack peft's prefix"),
    "zero B": (zeroed, (), "B is zero in all 16 layers: the adapter changes nothing"),
    "zero A": (zeroed, (".lora_A.weight",), "A is zero in all 16 layers"),
    "rank in the config": (reconfigure, dict(r=8), "says rank 8, and all 32 tensors"),
    "rank in a tensor": (
        rewrite,
        (
            lambda ts: {
                k: t[:3] if "0.mlp.up_proj.lora_A" in k else t for k, t in ts.items()
            },
        ),
        "says rank 4, and 1 of 32 tensors.*has 3",
    ),
    "no A": (dropped, ("lora_A",), "16 of 16 layers lack a tensor.*has no lora_A"),
    "no B in some": (dropped, ("1.mlp.up_proj.lora_B",), "1 of 16 layers.*no lora_B"),
    "layers missing": (change_one, (), "3 layers are missing that other blocks have"),
    "NaN": (filled, (torch.nan,), "1 of 32 tensors hold NaN or infinity"),
    "infinity": (filled, (-torch.inf,), "1 of 32 tensors hold NaN or infinity"),
    "pickle": (pickled, (), "pickle, adapter_model.bin"),
    "IA3's config": (
        reconfigure,
        dict(peft_type="IA3"),
        "the config says IA3, the tensors are LoRA's",
    ),
    "VeRA's config": (reconfigure, dict(peft_type="VERA"), "says VeRA.*are LoRA's"),
    "a prompt's config": (
        reconfigure,
        dict(peft_type="PROMPT_TUNING", num_virtual_tokens=4),
        "says prompt, the tensors are LoRA's",
    ),
    "DoRA's config": (reconfigure, dict(use_dora=True), "says DoRA.*are LoRA's"),
    "another config": (swapped, (), "the config is another adapter's"),
    "a named head missing": (
        reconfigure,
        dict(modules_to_save=["lm_head"]),
        "modules_to_save names lm_head, and the file holds no such tensor",
    ),
    "a task's head missing": (
        reconfigure,
        dict(task_type="SEQ_CLS", modules_to_save=["classifier", "score"]),
        "the task is SEQ_CLS, and the file has no head",
    ),
    "truncated": (cut, (0.7,), "truncated: it lacks [0-9,]+ bytes"),
    "truncated in the header": (cut, (0.02,), "truncated: it lacks"),
    "no header": (write, (WEIGHTS, "abc"), "truncated: it lacks 5 bytes"),
    "rubbish": (write, (WEIGHTS, "rubbish " * 99), "is damaged"),
    "a pointer": (
        write,
        (WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "pointer of Git LFS",
    ),
    "empty weights": (write, (WEIGHTS, ""), "safetensors is empty"),
    "empty config": (write, (CONFIG, ""), "adapter_config.json is empty"),
    "empty folder": (emptied, (), "the folder is empty"),
    "no tensors": (rewrite, (lambda ts: {},), "holds no tensor"),
    "no adapter's tensors": (
        rewrite,
        (lambda ts: {"base_model.model.norm.weight": torch.ones(3)},),
        "none of the tensors is an adapter's",
    ),
    "no JSON": (write, (CONFIG, "{'r': 4}"), "is not valid JSON"),
    "JSON, but a list": (write, (CONFIG, "[4]"), "no object"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), (), "no adapter_config"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), (), "no adapter_model"),
    "no peft_type": (reconfigure, ["peft_type"], "names no peft_type"),
    "unknown peft_type": (reconfigure, dict(peft_type="LORE"), "peft_type 'LORE'"),
    "alpha 0": (reconfigure, dict(lora_alpha=0), "lora_alpha is 0"),
    "alpha below 0": (reconfigure, dict(lora_alpha=-1), "lora_alpha is -1"),
    "alpha in words": (reconfigure, dict(lora_alpha="16"), "lora_alpha is '16'"),
    "no alpha": (reconfigure, ["lora_alpha"], "names no lora_alpha"),
    "rank 0": (reconfigure, dict(r=0), "r is 0"),
    "a target nowhere": (
        reconfigure,
        dict(target_modules=[*FOUR, "gate_porj"]),
        "target_modules names gate_porj, and no tensor belongs to it",
    ),
    "an expression for nothing": (
        reconfigure,
        dict(target_modules=".*query"),
        "no tensor belongs to target_modules=",
    ),
    "no expression": (reconfigure, dict(target_modules="(q"), "no regular expression"),
    "no targets": (reconfigure, dict(target_modules=None), "names no target_modules"),
    "whole numbers": (
        rewrite,
        (lambda ts: {k: (100 * t).int() for k, t in ts.items()},),
        "no floating-point numbers",
    ),
}


def broken(folder, fault):
    how, what, _ = LORA[fault]
    if isinstance(what, dict):
        how(folder, **what)
    else:
        how(folder, *what)


def the_one(found, words):
    assert not found.ok and not found
    said = [p for p in found.problems if re.search(words, p)]
    assert said, f"{words!r} is not said: {found}"
    for problem in found.problems:
        assert "\n" not in problem and len(problem) < 400 and problem.isprintable()
        assert f"wrong: {problem}" in str(found)
    return said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    plain = deep()
    folders = {}
    for who in ("peft", "ours"):
        folder = folders[who] = tmp_path_factory.mktemp(who)
        if who == "peft":
            by_peft(folder, plain, LoraConfig(r=4, lora_alpha=6, **PAIR))
        else:
            by_us(folder, plain, lora, FOUR, 4, 6)
    return folders


@pytest.mark.parametrize("who", ["peft", "ours"])
@pytest.mark.parametrize("fault", LORA)
def test_the_fault_is_named(fault, who, saved, tmp_path):
    if fault == "another config" and who == "peft":
        pytest.skip("peft writes no digest")
    folder = Path(shutil.copytree(saved[who], tmp_path / "adapter"))
    (folder / "README.md").unlink(missing_ok=True)
    broken(folder, fault)
    found = peft_files.inspect(folder)
    the_one(found, LORA[fault][2])
    secondary = 1 + (fault in ("zero A", "no A"))
    assert len(found.problems) <= secondary, f"one fault, one sentence: {found}"
    with_model = peft_files.inspect(folder, deep())
    beside = "3 of the 16 layers that target_modules selects are not in the file"
    the_one(with_model, beside if fault == "layers missing" else LORA[fault][2])


@torch.no_grad()
def logits(folder):
    model = PeftModel.from_pretrained(deep(), folder).eval()
    return model(torch.arange(6)[None]).logits


def compiled_first(folder, config):
    base = torch.compile(deep(), backend="eager")
    trained(base, config).save_pretrained(folder)


def compiled_after(folder, config):
    model = torch.compile(trained(deep(), config), backend="eager")
    model.save_pretrained(folder)


def trained(base, config):
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    jiggle(p for p in model.parameters() if p.requires_grad)
    return model


def test_an_adapter_on_a_compiled_base_is_named_and_its_repair_works(tmp_path):
    """As chapter 6 says: compile after `get_peft_model`, or repair the names."""
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    compiled_after(right, LoraConfig(r=4, **PAIR))
    assert peft_files.inspect(right, deep()).ok

    compiled_first(wrong, LoraConfig(r=4, **PAIR))
    said = "torch.compile was around .* until '_orig_mod.' is taken out of the names"
    the_one(peft_files.inspect(wrong), said)
    with pytest.warns(UserWarning, match="missing adapter keys"), torch.no_grad():
        plain = deep().eval()(torch.arange(6)[None]).logits
        assert torch.equal(logits(wrong), plain), "peft loads nothing of it"

    rewrite(wrong, lambda ts: {k.replace("_orig_mod.", ""): t for k, t in ts.items()})
    assert peft_files.inspect(wrong, deep()).ok
    assert torch.equal(logits(wrong), logits(right))


BESIDE_A_MODEL = {  # a base, and what is said of an adapter for deep()
    "a wider base": (
        lambda: deep(width=64),
        "base of another size.*in 16 of 16 layers",
    ),
    "a deeper base": (lambda: deep(6), "8 of the 24 layers .* are not in the file"),
    "a shallower base": (lambda: deep(2), "made for another base: it has no"),
    "another kind of base": (bert, "made for another base: it has no"),
}


@pytest.mark.parametrize("who", ["peft", "ours"])
@pytest.mark.parametrize("base", BESIDE_A_MODEL)
def test_another_base_is_named(base, who, saved):
    build, words = BESIDE_A_MODEL[base]
    the_one(peft_files.inspect(saved[who], build()), words)


@pytest.mark.parametrize("who", ["peft", "ours"])
def test_half_the_layers_missing_is_seen_beside_the_model(who, saved, tmp_path):
    folder = Path(shutil.copytree(saved[who], tmp_path / "adapter"))
    dropped(folder, "layers.2.", "layers.3.")
    found = peft_files.inspect(folder, deep())
    the_one(found, "8 of the 16 layers that target_modules selects are not in the file")
    folder = Path(shutil.copytree(saved[who], tmp_path / "other"))
    dropped(folder, "layers.1.")
    dropped(folder, "layers.0.mlp.up")
    the_one(peft_files.inspect(folder), "missing that other blocks have")


def test_a_hybrid_model_is_not_taken_for_damage(saved, tmp_path):
    """Attention in each third block alone, as in models that mix it with others."""
    plain = deep(9)
    for k in range(9):
        if k % 3 != 2:
            plain.model.layers[k].self_attn.q_proj = torch.nn.Identity()
    by_us(tmp_path, plain, lora, ["q_proj", "up_proj"], 4, 6)
    assert peft_files.inspect(tmp_path).ok


OTHERS = {  # a method's fault: the folder of HEALTHY, what is done to it, what is said
    "VeRA, b zero": ("peft's VeRA", zeroed, ("vera_lambda_b",), "b is zero in all 2"),
    "VeRA, another rank": ("our VeRA", reconfigure, dict(r=16), "says rank 16"),
    "VeRA, no shared": ("peft's VeRA", dropped, ("vera_A",), "shared A and B"),
    "VeRA, half": ("our VeRA", dropped, ("0.self_attn.q_proj.vera_lambda_d",), "lack"),
    "IA3, ones": (
        "peft's IA3",
        rewrite,
        (lambda ts: {k: 0 * t + 1 for k, t in ts.items()},),
        "the scale is 1 in all 8 layers: the adapter changes nothing",
    ),
    "DoRA as LoRA": ("peft's DoRA", reconfigure, dict(use_dora=False), "are DoRA's"),
    "DoRA, half": ("our DoRA", dropped, ("0.mlp.up_proj.lora_mag",), "no dora_m"),
    "prompt, rows": (
        "peft's prompt",
        reconfigure,
        dict(num_virtual_tokens=9),
        "4 rows",
    ),
    "prompt as prefix": (
        "our prompt",
        reconfigure,
        dict(peft_type="PREFIX_TUNING"),
        "says prefix, the tensor is a prompt's",
    ),
    "prefix as prompt": (
        "our prefix",
        reconfigure,
        dict(peft_type="PROMPT_TUNING"),
        "the tensor is a prefix's",
    ),
    "prompt, NaN": ("our prompt", filled, (torch.nan,), "NaN"),
    "prompt, state_dict": (
        "peft's prompt",
        renamed,
        ("prompt_emb", "prompt_encoder.default.emb"),
        "adapter's name",
    ),
    "a head lost": ("peft's head", dropped, ("lm_head",), "modules_to_save names lm_h"),
}


@pytest.mark.parametrize("fault", OTHERS)
def test_the_fault_of_another_method_is_named(fault, tmp_path):
    name, how, what, words = OTHERS[fault]
    _, save, *rest = HEALTHY[name]
    save(tmp_path, llama(), *rest)
    how(tmp_path, **what) if isinstance(what, dict) else how(tmp_path, *what)
    the_one(peft_files.inspect(tmp_path), words)


def test_a_classifier_without_its_head_is_named(tmp_path):
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    by_peft(tmp_path, bert(), config)
    assert peft_files.inspect(tmp_path).ok
    dropped(tmp_path, "classifier")
    the_one(
        peft_files.inspect(tmp_path), "the task is SEQ_CLS, and the file has no head"
    )


def test_a_head_that_no_config_speaks_of_is_named_beside_the_model(tmp_path):
    by_peft(tmp_path, bert(), LoraConfig(target_modules=["query"]))
    assert peft_files.inspect(tmp_path).ok
    the_one(
        peft_files.inspect(tmp_path, bert()), "has a head, classifier, and the file"
    )


def test_a_head_of_another_size_is_named(tmp_path):
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    by_peft(tmp_path, bert(), config)
    plain = bert()
    plain.classifier = torch.nn.Linear(32, 7)
    the_one(
        peft_files.inspect(tmp_path, plain), r"the head's .*\(3, 32\), here \(7, 32\)"
    )


def test_a_prompt_for_a_wider_base_is_named(tmp_path):
    by_us(tmp_path, llama(), prompt, 4)
    the_one(peft_files.inspect(tmp_path, deep(width=64)), "base of another size")


def test_a_setting_that_we_cannot_load_is_a_note_and_no_fault(tmp_path):
    by_peft(tmp_path, llama(), LoraConfig(rank_pattern={"q_proj": 2}, **PAIR))
    found = peft_files.inspect(tmp_path)
    assert found.ok and "rank_pattern" in found.notes[0] and "note: " in str(found)


def test_a_layer_that_never_got_a_gradient_is_a_note(saved, tmp_path):
    folder = Path(shutil.copytree(saved["peft"], tmp_path / "adapter"))
    zeroed(folder, "0.mlp.up_proj.lora_B.weight")
    found = peft_files.inspect(folder)
    assert found.ok and found.notes == ("B is zero in 1 of 16 layers",)


# Hostile


@pytest.mark.parametrize("path", [None, 3, "", " ", "no/such/folder", "a\0b", "file"])
def test_what_is_no_folder_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    with pytest.raises(ValueError) as error:
        peft_files.inspect(path)
    assert "\n" not in str(error.value) and str(error.value).isprintable()


def test_what_is_no_plain_model_is_refused(saved):
    with pytest.raises(ValueError, match="must be an nn.Module"):
        peft_files.inspect(saved["ours"], {})


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loose link"])
def test_no_plain_file(name, kind, saved, tmp_path):
    folder = Path(shutil.copytree(saved["peft"], tmp_path / "adapter"))
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else "nowhere")
    the_one(peft_files.inspect(folder), f"{name} is no plain file")


LONG = "\x1b[2J\u202e" + "a" * 10**5
HOSTILE = {
    "setting": {LONG: 1},
    "rank_pattern": dict(rank_pattern=LONG),
    "r": dict(r=LONG),
    "alpha": dict(lora_alpha=LONG),
    "peft_type": dict(peft_type=LONG),
    "base": dict(base_model_name_or_path=LONG, r=8),
    "heads": dict(modules_to_save=[LONG]),
    "targets": dict(target_modules=[LONG]),
    "an expression": dict(target_modules=f"({LONG}"),
    "a slow expression": dict(target_modules=r"(([a-z_0-9.])+)+X"),
    "task": dict(task_type=LONG, r=8),
    "task's kind": dict(task_type=[LONG], r=8),
    "heads' kind": dict(modules_to_save={"a": LONG}, r=8),
    "targets' kind": dict(target_modules={"a": LONG}, r=8),
    "tokens": dict(peft_type="PROMPT_TUNING", num_virtual_tokens=LONG),
    "a large number": dict(lora_alpha=10**4000),
    "not finite": dict(lora_alpha=float("nan")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_settings_are_neither_echoed_nor_waited_for(
    what, saved, tmp_path, monkeypatch
):
    monkeypatch.setattr(adapter_report, "PATIENCE", 1)
    folder = Path(shutil.copytree(saved["peft"], tmp_path / "adapter"))
    reconfigure(folder, **HOSTILE[what])
    for model in (None, deep()):
        found = peft_files.inspect(folder, model)
        assert not found.ok or what in ("setting", "rank_pattern")
        assert str(found).replace("\n", "").isprintable() and len(str(found)) < 4000


@pytest.mark.parametrize("end", [".weight", ".lora_B.weight", ".default.weight", ""])
def test_hostile_names_are_not_echoed(end, saved, tmp_path):
    folder = Path(shutil.copytree(saved["peft"], tmp_path / "adapter"))
    key = f"base_model.model._orig_mod.{LONG}{end}"
    rewrite(folder, lambda tensors: {**tensors, key: torch.full((4, 4), torch.nan)})
    for model in (None, deep()):
        found = peft_files.inspect(folder, model)
        assert not found.ok
        assert str(found).replace("\n", "").isprintable() and len(str(found)) < 4000


def test_every_cut_and_many_changed_bytes_raise_nothing(saved, tmp_path):
    folder = Path(shutil.copytree(saved["peft"], tmp_path / "adapter"))
    draw = torch.Generator().manual_seed(0)
    for name in (CONFIG, WEIGHTS):
        whole = (folder / name).read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            place = int(torch.randint(min(len(whole), 3000), (), generator=draw))
            content[place] = int(torch.randint(256, (), generator=draw))
            (folder / name).write_bytes(content)
            str(peft_files.inspect(folder))
            (folder / name).write_bytes(whole[:place])
            assert not peft_files.inspect(folder).ok
        (folder / name).write_bytes(whole)
    assert peft_files.inspect(folder).ok


def test_a_save_that_was_interrupted_is_named_and_the_next_one_mends_it(
    saved, tmp_path
):
    folder = Path(shutil.copytree(saved["ours"], tmp_path / "adapter"))
    (folder / adapter_folder.NEW).mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / adapter_folder.NEW / name)
    the_one(peft_files.inspect(folder), "a save was interrupted: peft does not read")
    model = deep()
    peft_files.load(model, folder)
    peft_files.save(model, folder)
    assert peft_files.inspect(folder).ok
    (folder / adapter_folder.NEW).mkdir()  # an empty one hides nothing
    assert peft_files.inspect(folder).ok


@pytest.mark.parametrize("beside", ["NaN", "pickle"])
def test_clean_files_in_a_subfolder_hide_nothing_that_peft_loads(
    beside, saved, tmp_path
):
    folder = Path(shutil.copytree(saved["peft"], tmp_path / "adapter"))
    clean = folder / adapter_folder.NEW
    clean.mkdir()
    shutil.copy(folder / WEIGHTS, clean)
    if beside == "NaN":
        filled(folder, torch.nan)
        words = "hold NaN"
    else:
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        words = "only there as a pickle"
    found = peft_files.inspect(folder, deep())
    the_one(found, "a save was interrupted")
    the_one(found, words)


def test_the_command_prints_the_report_and_its_status_says_whether(
    saved, tmp_path, capsys
):
    folder = Path(shutil.copytree(saved["peft"], tmp_path / "adapter"))
    zeroed(folder)
    words = [sys.executable, "-m", "peftlab.peft_files", str(folder)]
    root = Path(__file__).parents[1]
    dead = subprocess.run(words, capture_output=True, text=True, cwd=root)
    assert dead.returncode == 1 and "wrong: B is zero in all 16" in dead.stdout
    assert "rank 4, alpha 6" in dead.stdout and not dead.stderr, dead.stderr

    with pytest.raises(SystemExit) as end:
        adapter_report.main([str(saved["peft"])])
    assert end.value.code == 0 and "nothing wrong" in capsys.readouterr().out
    for arguments in ([str(tmp_path / "none")], [], ["one", "two"]):
        with pytest.raises(SystemExit, match="no folder|one argument") as end:
            adapter_report.main(arguments)  # a text as the code: the status is 1


@pytest.mark.parametrize(
    "header", [{"a": {}}, {"a": 3}, [], {"a": {"data_offsets": 1}}]
)
def test_a_malformed_header_is_a_sentence(tmp_path, header):
    text = json.dumps(header).encode()
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    found = peft_files.inspect(tmp_path)
    assert any("is damaged" in problem for problem in found.problems), found


def test_odd_names_and_huge_numbers_are_sentences(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    save_file({"x.prompt_embeddings": torch.ones(2, 3)}, file)
    for kind in ("LORA", "PROMPT_TUNING", "PREFIX_TUNING"):
        config = dict(peft_type=kind, r=10**400, lora_alpha=1, num_virtual_tokens=2)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found = peft_files.inspect(tmp_path)
        assert not found.ok and str(found)
