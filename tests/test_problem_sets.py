"""The problem sets: variants, limits, scores, and hand-ins that mean no good.

One small adapter is trained, for a language of set 1. It has to get full points from
its owner's records, none from another's. The refusals are tried one by one."""

import csv
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftlab import ia3, lora, peft_files, prefix, prompt, vera
from peftlab.kit import data, icd, results
from peftlab.kit.train import train
from tools import problem_sets, student
from tools.problem_sets import CONFIG, SETS, WEIGHTS, Refused

ROOT = Path(__file__).parents[1]
SECRET = "a secret of these tests"
LANGUAGE = "uz"
N = 40  # records in each part: a tenth of a point is not asked of them here
STARTERS = sorted((ROOT / "tools" / "starters").glob("set*.py"))
OTHERS = ("untrained", "another")
each_set = pytest.mark.parametrize("number", SETS)


def somebody(number, wanted):
    """An ID whose variant is `wanted`."""
    names = (f"s{k}" for k in range(100_000))
    return next(s for s in names if problem_sets.variant(s, number) == wanted)


OWNER = somebody(1, (LANGUAGE,))
OTHER = somebody(1, ("cs",))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a LoRA that has learned set 1's Uzbek."""
    torch.set_num_threads(1)
    model, tokenizer = problem_sets.base(1)
    torch.manual_seed(0)
    lora.add(model, "all-linear", r=8, alpha=16)
    records = data.records("dates", LANGUAGE, 2000, "train")
    train(model, tokenizer, records, 150, 8e-3, 20, progress=False)
    folder = tmp_path_factory.mktemp("learned") / "set1"
    peft_files.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with an untrained LoRA on tiny-decoder."""
    model, _ = problem_sets.base(1)
    folder = tmp_path_factory.mktemp("plain") / "set1"
    peft_files.save(lora.add(model, "all-linear", r=4, alpha=8), folder)
    return folder


@pytest.fixture
def mine(plain, tmp_path):
    """A copy of the untrained one, to be spoilt."""
    return Path(shutil.copytree(plain, tmp_path / "set1"))


def settings(folder, **changes):
    path = folder / CONFIG
    config = json.loads(path.read_text("utf8")) | changes
    path.write_text(json.dumps(config), "utf8")


def tensors(folder, change):
    found = load_file(folder / WEIGHTS)
    save_file(change(found), folder / WEIGHTS, {"format": "pt"})


# Variants


def test_a_variant_follows_from_the_id_and_from_nothing_else():
    for number in SETS:
        names = problem_sets.variant("ada.l-1815", number)
        assert names == problem_sets.variant("ADA.L-1815", number)
        assert len(set(names)) == len(names)
    assert [len(problem_sets.variant("x", n)) for n in SETS] == [1, 1, 1, 6, 1, 2]
    # Of all time: a new release must not change what students were given.
    assert problem_sets.variant("ada", 1) == ("de",)
    assert problem_sets.variant("ada", 6) == ("sw", "fi")
    assert problem_sets.seed("ada", 1) == 7080692


def test_every_language_and_every_class_is_somebodys():
    students = [f"student{k}" for k in range(200)]
    for number in SETS:
        given = [problem_sets.variant(s, number) for s in students]
        names = icd.CHAPTERS if number == 4 else problem_sets.LANGUAGES
        assert {name for one in given for name in one} == set(names)
    assert len({problem_sets.variant(s, 4) for s in students}) == 200
    assert len({problem_sets.seed(s, 1) for s in students}) == 200


@pytest.mark.parametrize(
    "name", ["", " ", "../x", "a/b", "a b", ".x", "x.", "=1+1", "ä", "x" * 65, None, 7]
)
def test_what_is_no_id_is_refused(name):
    for function in (problem_sets.variant, problem_sets.seed):
        with pytest.raises(ValueError, match="an ID has 1 to 64 letters"):
            function(name, 1)


@pytest.mark.parametrize("number", [0, 7, -1, "1", 1.0, True, None])
def test_what_is_no_set_is_refused(number):
    for call in (
        lambda: problem_sets.variant("ada", number),
        lambda: problem_sets.seed("ada", number),
        lambda: problem_sets.base(number),
        lambda: problem_sets.records(number, ("de",)),
        lambda: problem_sets.load(ROOT, number),
        lambda: problem_sets.points(number, 1.0),
    ):
        with pytest.raises(ValueError, match="there are the sets 1 to 6"):
            call()


# Hidden records


@pytest.mark.parametrize("language", problem_sets.LANGUAGES)
def test_hidden_dates_are_of_the_test_split_and_in_words(language):
    hidden = problem_sets.spelled(language, 200, "test", "x")
    assert len({r.text for r in hidden}) == 200
    for record in hidden:
        assert data.split_of(record.answer) == "test"
        assert any(c.isalpha() for c in record.text)


@pytest.mark.parametrize(
    "number, names",
    [(1, ()), (1, "de"), (1, ("fr",)), (6, ("de",)), (4, ("skin",) * 5), (4, ("de",))],
)
def test_records_of_no_variant_are_refused(number, names):
    with pytest.raises(ValueError, match=f"is no variant of set {number}"):
        problem_sets.records(number, names)
    with pytest.raises(ValueError, match="n is 0"):
        problem_sets.records(3, ("de",), n=0)


def test_bad_input_meets_a_sentence(tmp_path):
    model, tokenizer = problem_sets.base(1)
    for call, said in (
        (lambda: problem_sets.score(model, tokenizer, {}), "no records"),
        (lambda: problem_sets.score(model, tokenizer, {"de": []}), "no records"),
        (lambda: problem_sets.three_values(torch.ones(3, 5)), "no whole blocks"),
        (lambda: problem_sets.spelled("xx", 20, "test"), "Babel knows no language"),
        (lambda: problem_sets.spelled("de", 20, "exam"), "unknown split"),
        (lambda: problem_sets.load(None, 1), "name a folder"),
        (lambda: problem_sets.hand_ins(7), "name a folder"),
        (lambda: problem_sets.grade(tmp_path, "short"), "at least 16 characters"),
        (lambda: problem_sets.grade(tmp_path, None), "at least 16 characters"),
        (lambda: problem_sets.check(tmp_path, "a b", 1), "an ID has"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_set_5_s_base_has_three_values_a_block():
    broken, whole = (problem_sets.base(n)[0].state_dict() for n in (5, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    for block, before in zip(
        broken[name].view(-1, problem_sets.BLOCK),
        whole[name].view(-1, problem_sets.BLOCK),
        strict=True,
    ):
        a = before.abs().max()
        assert set(block.unique().tolist()) <= {-a.item(), 0.0, a.item()}
        assert ((block - before).abs() <= a / 2 + 1e-6).all()
    same = "model.embed_tokens.weight"
    assert torch.equal(broken[same], whole[same])


@each_set
def test_another_secret_draws_other_records(number):
    names = problem_sets.variant("ada", number)
    one, same, other = (
        problem_sets.records(number, names, "test", seed) for seed in "aab"
    )
    assert one == same
    assert one.keys() == other.keys()
    for part in one:
        common = set(one[part]) & set(other[part])
        most = 0.8 if number == 4 else 0.5  # there are not many more phrases
        assert len(common) < most * len(one[part]), part


def test_phrases_come_with_the_place_of_their_class_in_the_variant():
    names = problem_sets.variant("ada", 4)
    pairs = problem_sets.records(4, names)["phrases"]
    classes = dict(icd.diagnoses("dev"))
    assert len(pairs) == 6 * (problem_sets.RECORDS // 6)
    for text, place in pairs:
        assert icd.CHAPTERS[classes[text]] == names[place]


# Scores


@pytest.fixture(scope="module")
def graded(learned, plain, tmp_path_factory):
    """{(ID, set): row} of a course of four, and what else lay there."""
    folder = tmp_path_factory.mktemp("handins")
    for who, source in ((OWNER, learned), (OTHER, learned), ("zoe", plain)):
        shutil.copytree(source, folder / who / "set1")
    shutil.copytree(learned, folder / "zoe" / "set5")
    (folder / "zoe" / "notes.txt").write_text("hello")
    (folder / "late").mkdir()
    shutil.copytree(plain, folder / "late" / "set1")
    (folder / "late" / "set1" / WEIGHTS).unlink()
    rows, strange = problem_sets.grade(folder, SECRET, N)
    return {(r["id"], r["set"]): r for r in rows}, strange, folder


def test_one_who_has_learned_gets_full_points(graded):
    row = graded[0][OWNER, 1]
    assert row["points"] == row["of"] == 10, row
    assert float(row["score"]) >= max(SETS[1].points)


def test_an_untrained_adapter_gets_none(graded):
    row = graded[0]["zoe", 1]
    assert row["points"] == 0 and "hardly learned" in row["note"], row


def test_another_students_language_gets_none_and_is_named(graded):
    row = graded[0][OTHER, 1]
    assert row["points"] == 0
    assert re.search(rf"low: it answers \d\.\d+ of {LANGUAGE}, another", row["note"])


def test_equal_hand_ins_are_reported_at_each(graded):
    rows, _, _ = graded
    owners = {(OWNER, 1), (OTHER, 1), ("zoe", 5)}
    for key, row in rows.items():
        assert ("equal, number for number" in row["note"]) == (key in owners), row
        for who, number in owners - {key} if key in owners else ():
            assert f"{who}/set{number}" in row["note"]


def test_one_that_is_refused_does_not_stop_the_others(graded):
    row = graded[0]["late", 1]
    assert row["note"] == (
        "refused: adapter_model.safetensors is missing: save the adapter, not the model"
    )
    assert row["score"] == "" and row["points"] == 0


def test_what_was_not_handed_in_has_a_row(graded):
    rows, strange, _ = graded
    assert rows.keys() == {
        (w, n) for w in (OWNER, OTHER, "zoe", "late") for n in (1, 5)
    }
    assert rows[OWNER, 5]["note"] == "not handed in"
    assert strange == ["zoe/'notes.txt' is no set1 to set6"]


def test_the_command_writes_the_same_grades_whole_or_not_at_all(
    graded, tmp_path, capsys, monkeypatch
):
    rows, _, folder = graded
    secret, out = tmp_path / "secret.txt", tmp_path / "grades.csv"
    secret.write_text(SECRET + "\n")
    monkeypatch.setattr(problem_sets.grade, "__defaults__", (N, None))
    problem_sets.main(
        ["grade", str(folder), "--secret", str(secret), "--out", str(out)]
    )
    with open(out, encoding="utf8", newline="") as file:
        table = list(csv.DictReader(file))
    same = [{k: str(v) for k, v in row.items()} for row in rows.values()]
    assert table == same and tuple(table[0]) == problem_sets.COLUMNS
    assert "8 rows" in capsys.readouterr().out
    before = out.read_bytes()
    broken = [dict.fromkeys(problem_sets.COLUMNS, "x"), {"no such column": 1}]
    with pytest.raises(ValueError):
        problem_sets.write(broken, out)
    assert out.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"secret.txt", "grades.csv"}


def test_a_student_sees_points_on_public_records(learned, capsys):
    command = ["check", str(learned), "--id", OWNER, "--set", "1"]
    problem_sets.main(command)
    said = capsys.readouterr().out
    assert "10 of 10 points" in said and "On public records" in said


def test_points_are_those_of_the_highest_threshold_reached():
    for number, one in SETS.items():
        assert list(one.points) == sorted(one.points)
        assert list(one.points.values()) == sorted(one.points.values())
        assert problem_sets.points(number, 0.0) == 0
        for at, points in one.points.items():
            assert problem_sets.points(number, at) == points
            assert problem_sets.points(number, at - 1e-6) < points


# Refusals


def refusal(folder, number=1):
    with pytest.raises(Refused) as caught:
        problem_sets.load(folder, number)
    said = str(caught.value)
    assert len(said.split()) >= 4 and "\n" not in said, said
    return said


def too_large(folder):
    (folder / "notes.txt").write_bytes(bytes(1_000_000))


def pickled(folder):
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")


def no_config(folder):
    (folder / CONFIG).unlink()


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def another_base(folder):
    settings(folder, base_model_name_or_path="models/tiny-seq2seq/")


def broken_config(folder):
    (folder / CONFIG).write_text("{")


def deep_config(folder):
    (folder / CONFIG).write_text("[" * 100_000)


def list_config(folder):
    (folder / CONFIG).write_text("[]")


def broken_weights(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def no_tensors(folder):
    tensors(folder, lambda found: {})


def nan(folder):
    tensors(folder, lambda found: {k: t * float("nan") for k, t in found.items()})


def infinite(folder):
    tensors(folder, lambda found: {k: t + float("inf") for k, t in found.items()})


def slow_expression(folder):
    settings(folder, target_modules="(.*.*)*_projx")


def long_prompt(folder):
    settings(folder, peft_type="PROMPT_TUNING", num_virtual_tokens=100_000)


def other_shapes(folder):
    tensors(folder, lambda found: {k: t[:, :2].clone() for k, t in found.items()})


def another_method(folder):
    settings(folder, peft_type="OFT")


def subfolder(folder):
    (folder / "checkpoint-100").mkdir()


def link(folder):
    target = folder.parent / "elsewhere"
    (folder / WEIGHTS).rename(target)
    (folder / WEIGHTS).symlink_to(target)


def fifo(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


REFUSALS = {
    too_large: "it is too large",
    pickled: "is a pickle, which can run code",
    no_config: f"{CONFIG} is missing",
    no_weights: f"{WEIGHTS} is missing",
    another_base: "it is for the base 'tiny-seq2seq': set 1 has tiny-decoder",
    broken_config: "is not valid JSON",
    deep_config: "is not valid JSON",
    list_config: "no object with settings",
    broken_weights: "is no whole file of safetensors",
    no_tensors: "is empty",
    nan: "holds NaN or infinity",
    infinite: "holds NaN or infinity",
    slow_expression: "target_modules is an expression",
    long_prompt: "more than 100 virtual tokens",
    other_shapes: "the adapter does not load: made for another model",
    another_method: "the adapter does not load: the file's peft_type is 'OFT'",
    subfolder: "'checkpoint-100' is no plain file",
    link: "is no plain file",
    fifo: "is no plain file",
}


@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda f: f.__name__)
def test_a_hand_in_that_breaks_a_rule_is_refused_in_a_sentence(spoil, mine):
    problem_sets.load(mine, 1)
    spoil(mine)
    assert REFUSALS[spoil] in refusal(mine)


def test_a_folder_that_is_none_is_refused(mine, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "no such folder" in refusal(mine / CONFIG)
    (tmp_path / "link").symlink_to(mine, target_is_directory=True)
    assert "it is a link" in refusal(tmp_path / "link")


def test_a_pickle_is_not_opened(mine):
    """The file would leave a trace."""
    import pickle

    trace = mine.parent / "trace"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (trace,))

    (mine / WEIGHTS).write_bytes(pickle.dumps(Evil()))
    assert "is no whole file of safetensors" in refusal(mine)
    assert not trace.exists()


def test_set_2_counts_every_parameter_of_the_file(mine):
    assert "holds 38,912 parameters" in refusal(mine, 2)
    few = {
        k: t[:1] if "lora_A" in k else t[:, :1]
        for k, t in load_file(mine / WEIGHTS).items()
        if "self_attn" in k
    }
    tensors(mine, lambda found: {k: t.clone() for k, t in few.items()})
    settings(mine, r=1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert problem_sets.load(mine, 2) is not None


def test_an_adapter_of_minilm_does_not_fit_tiny_decoder(mine, tmp_path):
    model, _ = problem_sets.base(4)
    lora.add(model, ["query"], r=1, alpha=1)
    peft_files.save(model, tmp_path / "set4", heads=["classifier"])
    problem_sets.load(tmp_path / "set4", 4)
    assert refusal(tmp_path / "set4", 1)
    assert "set 4 has MiniLM" in refusal(mine, 4)


METHODS = {
    "LoRA with rsLoRA": lambda m: lora.add(m, "all-linear", r=2, rslora=True),
    "VeRA": lambda m: vera.add(m, ["q_proj", "v_proj"], r=16),
    "IA3": lambda m: ia3.add(m, ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "prompt": lambda m: prompt.add(m, 4),
    "prefix": lambda m: prefix.add(m, 4),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_peft_files_has_may_be_handed_in(name, tmp_path):
    model, tokenizer = problem_sets.base(1)
    peft_files.save(METHODS[name](model), tmp_path / "set1")
    row = problem_sets.judged(
        tmp_path / "set1",
        OWNER,
        1,
        (problem_sets.base(1)[0], tokenizer),
        problem_sets.records(1, (LANGUAGE,), n=20),
    )[0]
    assert row["score"], row


@pytest.mark.parametrize("number", [1, 4])
def test_what_peft_itself_saves_may_be_handed_in(number, tmp_path):
    model, _ = problem_sets.base(number)
    torch.manual_seed(0)
    targets = ["query", "value"] if number == 4 else "all-linear"
    task = "SEQ_CLS" if number == 4 else "CAUSAL_LM"
    config = peft.LoraConfig(
        task_type=task, target_modules=targets, init_lora_weights=False
    )
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = problem_sets.load(tmp_path / "adapter", number)
    inputs = dict(
        input_ids=torch.arange(5, 15)[None],
        attention_mask=torch.ones(1, 10, dtype=torch.long),
    )
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, again(**inputs).logits, atol=1e-4)


# What the command line refuses, and the starters


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["variant", "a b"], "an ID has"),
        (["check", "nowhere", "--id", "ada", "--set", "9"], "there are the sets"),
        (
            ["grade", "nowhere", "--secret", "{s}", "--out", "x.csv"],
            "there is no folder",
        ),
        (["grade", "{e}", "--secret", "{s}", "--out", "x.csv"], "holds no hand-in"),
        (["grade", "{e}", "--secret", "nothing", "--out", "x.csv"], "cannot be read"),
        (["grade", "{e}", "--secret", "{short}", "--out", "x.csv"], "at least 16"),
        (["grade", "{e}", "--out", "x.csv"], "PEFTLAB_SECRET"),
        (
            ["grade", "{e}", "--secret", "{s}", "--out", "no/x.csv"],
            "there is no folder",
        ),
    ],
)
def test_the_command_line_ends_with_a_sentence(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PEFTLAB_SECRET", raising=False)
    paths = {k: tmp_path / k for k in ("s", "short", "e")}
    paths["s"].write_text(SECRET)
    paths["short"].write_text("short")
    paths["e"].mkdir()
    with pytest.raises(SystemExit) as caught:
        problem_sets.main([a.format(**paths) for a in arguments])
    assert message in str(caught.value.code)
    assert not (tmp_path / "x.csv").exists()


def test_the_secret_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("PEFTLAB_SECRET", f" {SECRET}\n")
    assert problem_sets.read_secret() == SECRET


@pytest.mark.parametrize("path", STARTERS, ids=lambda p: p.stem)
def test_a_starter_runs_and_has_no_points(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setitem(sys.modules, "problem_sets", problem_sets)
    monkeypatch.setattr(problem_sets.records, "__defaults__", ("dev", 0, 20))
    runpy.run_path(str(path), run_name="__main__")
    assert ", 0 of 10 points; low: " in capsys.readouterr().out
    assert problem_sets.load(tmp_path / path.stem, int(path.stem[-1])) is not None


def test_there_is_a_starter_for_each_set_and_the_zip_has_them(tmp_path):
    import zipfile

    assert [p.name for p in STARTERS] == [f"set{n}.py" for n in SETS]
    student.bundle(tmp_path)
    names = zipfile.ZipFile(tmp_path / "problem_sets.zip").namelist()
    files = ["problem_sets.py", *(p.name for p in STARTERS)]
    assert names == [f"problem_sets/{name}" for name in files]


# The page and the stored runs


@each_set
def test_the_page_states_the_thresholds_and_the_limit(number):
    page = (ROOT / "book" / "problem_sets.md").read_text("utf8")
    (part,) = re.findall(rf"^## Set {number}\. (.*?)(?=^## )", page, re.M | re.S)
    one = SETS[number]
    assert part.startswith(one.title + "\n")
    said = re.findall(r"(\d+) points from (\d\.\d+)", part)
    assert {float(at): int(points) for points, at in said} == one.points
    assert f"](../tools/starters/set{number}.py)" in part
    if one.parameters:
        assert f"{one.parameters:,}<!-- given --> parameters" in part


def test_the_page_names_the_languages_and_the_size():
    page = (ROOT / "book" / "problem_sets.md").read_text("utf8")
    words = " ".join(page.replace("`", "").replace(",", "").split())
    assert " ".join(problem_sets.LANGUAGES) in words
    assert f"{problem_sets.LARGEST:,}<!-- given --> bytes" in page


@each_set
def test_the_thresholds_part_the_lora_of_the_book_from_the_rest(number):
    """As stored by the sweep: full points, and none for what is not this variant's."""
    figures = results.load("problem_sets")["figures"]
    scores = {k: figures[f"{number}.{k}"]["value"] for k in ("lowest", *OTHERS)}
    assert scores["lowest"] >= max(SETS[number].points)
    assert max(scores[k] for k in OTHERS) < min(SETS[number].points)
