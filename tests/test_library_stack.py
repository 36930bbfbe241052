"""Chapter 18's script refuses what could not end well, and resumes from whole
checkpoints only; its sweep's figures follow from its runs."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.sweeps import library_stack as sweep
from peftlab.kit import base_models, results

SCRIPT = Path(__file__).parents[1] / "recipes" / "18_train.py"
MODEL = base_models.MODELS / "tiny-decoder"
LINES = ['{"prompt": "1.2.2003 =", "completion": " 2003-02-01"}'] * 3


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(SCRIPT))


def parsed(recipe, folder, *more):
    (folder / "data.jsonl").write_text("\n".join(LINES))
    words = ["--data", folder / "data.jsonl", "--out", folder / "out"]
    words += ["--model", MODEL, *more]
    return recipe["options"]().parse_args(list(map(str, words)))


def written(folder, steps, processes=1, names=None):
    """A checkpoint as Trainer leaves it, or the files of it that are named."""
    path = folder / f"checkpoint-{steps}"
    path.mkdir(parents=True)
    ranks = range(processes) if processes > 1 else ()
    rng = [f"rng_state_{k}.pth" for k in ranks] or ["rng_state.pth"]
    for name in names or ("optimizer.pt", "scheduler.pt", *rng):
        torch.save({"a": torch.zeros(100)}, path / name)
    save_file({"a": torch.zeros(100)}, path / "adapter_model.safetensors")
    (path / "trainer_state.json").write_text(json.dumps(dict(global_step=steps)))
    return path


# ---- what is refused


@pytest.mark.parametrize("more", [(), ("--load-in-4bit",)], ids=["32", "4 bits"])
def test_one_process_that_sees_several_gpus_is_refused(
    recipe, tmp_path, monkeypatch, more
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    args = parsed(recipe, tmp_path, *more)
    with pytest.raises(SystemExit, match="one process sees 8 GPUs.*accelerate launch"):
        recipe["main"](args)
    assert not (tmp_path / "out").exists()


def test_one_process_for_each_gpu_is_not_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setitem(recipe["check"].__globals__, "PROCESSES", 8)
    recipe["check"](parsed(recipe, tmp_path))


def test_shard_under_an_older_transformers_is_refused(recipe, tmp_path, monkeypatch):
    names = recipe["check"].__globals__
    monkeypatch.setitem(names, "PROCESSES", 2)
    args = parsed(recipe, tmp_path, "--shard")
    recipe["check"](args)
    monkeypatch.setitem(names, "VERSION", (5, 23))
    with pytest.raises(SystemExit, match="--shard needs transformers 5.24"):
        recipe["check"](args)


def test_float16_is_no_choice(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parsed(recipe, tmp_path, "--dtype", "float16")
    assert "invalid choice: 'float16'" in capsys.readouterr().err


def test_activations_are_computed_again_with_shard_too(recipe, tmp_path):
    for more in ((), ("--shard",)):
        made = recipe["arguments"](parsed(recipe, tmp_path, *more))
        assert made.gradient_checkpointing, more


# ---- data and tokenizer


def test_records_that_are_too_long_are_counted_and_none_is_cut(
    recipe, tmp_path, capsys
):
    args = parsed(recipe, tmp_path)
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    whole = recipe["read"](args.data, tokenizer, 1024)
    assert len(whole) == 3 and capsys.readouterr().out == ""
    exact = len(whole[0]["input_ids"])
    Path(args.data).write_text("\n".join([LINES[0], LINES[0].replace("=", "= 1")]))
    kept = recipe["read"](args.data, tokenizer, exact)
    assert kept == whole[:1], "a record of the very length stays, and whole"
    said = f"1 of 2 records are longer than --max-length {exact} tokens"
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2 of 2 records are longer.*none is left"):
        recipe["read"](args.data, tokenizer, exact - 1)


def test_a_tokenizer_without_an_end_token_is_named_not_the_data(recipe, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    args = parsed(recipe, tmp_path, "--model", tmp_path / "model")
    with pytest.raises(SystemExit, match="the tokenizer of .*model has no end token"):
        recipe["load"](args)


@pytest.mark.parametrize(
    "row", ["[]", "{}", "3", '{"prompt": "a", "completion": 3}', '{"prompt": "a"}', "{"]
)
def test_a_row_that_is_no_record_is_named(recipe, tmp_path, row):
    args = parsed(recipe, tmp_path)
    Path(args.data).write_text("\n".join([LINES[0], row]))
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    with pytest.raises(SystemExit, match="row 2: a record is"):
        recipe["read"](args.data, tokenizer, 1024)


# ---- the checkpoint to go on from

NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
NEEDED += ("rng_state.pth", "trainer_state.json")


def test_the_last_whole_checkpoint_is_the_one_with_the_most_steps(recipe, tmp_path):
    assert recipe["last_whole_checkpoint"](tmp_path) is None
    for steps in (96, 120, 8):
        written(tmp_path, steps)
    for other in ("best", "8-copy", ""):
        shutil.copytree(tmp_path / "checkpoint-120", tmp_path / f"checkpoint-{other}")
    last = recipe["last_whole_checkpoint"](tmp_path)
    assert last == str(tmp_path / "checkpoint-120")


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("how", ["missing", "torn", "empty"])
def test_a_checkpoint_with_a_file_missing_or_torn_is_passed_over(
    recipe, tmp_path, name, how
):
    written(tmp_path, 10)
    torn = written(tmp_path, 20) / name
    if how == "missing":
        torn.unlink()
    else:
        content = torn.read_bytes()
        torn.write_bytes(b"" if how == "empty" else content[: len(content) // 2])
    last = recipe["last_whole_checkpoint"](tmp_path)
    assert last == str(tmp_path / "checkpoint-10")


def test_other_numbers_of_processes_do_not_write_over_a_run(
    recipe, tmp_path, monkeypatch
):
    last = recipe["last_whole_checkpoint"]
    written(tmp_path / "two", 10, processes=2)
    with pytest.raises(SystemExit, match="no checkpoint in .* is whole for a run of 1"):
        last(tmp_path / "two")
    monkeypatch.setitem(last.__globals__, "PROCESSES", 2)
    assert last(tmp_path / "two") == str(tmp_path / "two" / "checkpoint-10")
    written(tmp_path / "three", 10, processes=3)
    with pytest.raises(SystemExit, match="of 2 process"):
        last(tmp_path / "three")
    (tmp_path / "two" / "checkpoint-10" / "rng_state_1.pth").unlink()
    with pytest.raises(SystemExit, match="of 2 process"):
        last(tmp_path / "two")


# ---- the sweep


def test_the_stored_figures_follow_from_the_stored_runs():
    stored = results.load("library_stack")
    assert stored["figures"] == sweep.derive(stored["runs"])


def test_sgd_hides_rounding_and_adamw_makes_steps_of_it():
    value = {k: f["value"] for k, f in results.load("library_stack")["figures"].items()}
    assert max(value["two.sgd"], value["two.sgd.4bit"]) < 1e-5
    assert 1e-5 < value["two.adamw"] < value["typical"]
    assert value["resumed.bf16"] == value["resumed.ddp"] == 0
