"""Adapter files both ways with peft, and bad files: one sentence, nothing changed."""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as tf
from common import (
    BATCH,
    MODELS,
    SMALL,
    assert_one_sentence,
    assert_unchanged,
    jiggle,
    net,
    seeded,
    snapshot,
    t5,
)
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora import MODES, fill, peft_twin
from torch import nn

from peftlab import adapter_folder, lora, peft_files, prompt

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADS = dict(num_attention_heads=4)


def roberta():
    return seeded(
        tf.RobertaForSequenceClassification(tf.RobertaConfig(**SMALL, **HEADS))
    )


def llama_classifier():
    config = tf.LlamaConfig(**SMALL, **HEADS, pad_token_id=0, num_labels=3)
    return seeded(tf.LlamaForSequenceClassification(config))


def answerer():
    return seeded(tf.BertForQuestionAnswering(tf.BertConfig(**SMALL, **HEADS)))


HEADED = [
    ("SEQ_CLS", roberta),
    ("SEQ_CLS", llama_classifier),
    ("QUESTION_ANS", answerer),
]


def whisper():
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    sizes = dict(d_model=24, encoder_layers=1, decoder_layers=1, vocab_size=9)
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**sizes, **ids))


def answers(model):
    inner = getattr(model, "base_model", model)
    more = {}
    if getattr(inner.config, "is_encoder_decoder", False):
        more = dict(labels=BATCH["input_ids"] % 7)
    with torch.no_grad():
        out = model.eval()(**BATCH, **more)
    return out.logits if hasattr(out, "logits") else out[0]


def trained(model, targets="all-linear", **settings):
    """The model with LoRA and the head, if it has one, as after training."""
    model = copy.deepcopy(model)
    lora.add(model, targets, **{"r": 4, "alpha": 6, **settings})
    names = ("classifier", "score", "qa_outputs")
    heads = [getattr(model, name) for name in names if hasattr(model, name)]
    jiggle([*lora.state_dict(model).values(), *nn.ModuleList(heads).parameters()])
    return model


def trained_by_peft(model, targets="all-linear", **settings):
    twin = peft_twin(model, targets, **settings)
    jiggle(p for p in twin.parameters() if p.requires_grad)
    return twin


def assert_equal(got, want):
    gap, size = (got - want).abs().max(), want.abs().max()
    assert gap <= 2e-6 * max(1, size), f"the outputs differ by {gap:.1e} of {size:.1e}"


def config_of(folder):
    return json.loads((folder / CONFIG).read_text("utf8"))


def rewrite(folder, **settings):
    config = {**config_of(folder), **settings}
    (folder / CONFIG).write_text(json.dumps(config), "utf8")


# Both ways


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_we_save(name, mode, tmp_path, recwarn):
    plain = MODELS[name]()
    ours = trained(plain, **MODES[mode])
    peft_files.save(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    said = [str(w.message) for w in recwarn if "adapter keys" in str(w.message)]
    assert not said, f"peft misses tensors or finds too many: {said}"
    want = answers(ours)
    assert (want - answers(plain)).abs().max() > 1e-2, "the adapter does nothing"
    assert_equal(answers(theirs), want)
    back = peft_files.load(plain, tmp_path)
    assert torch.equal(answers(back), want)
    assert lora.state_dict(back).keys() == lora.state_dict(ours).keys()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_we_load_what_peft_saves(name, mode, tmp_path):
    plain = MODELS[name]()
    more = dict(task_type="SEQ_CLS") if name == "bert" else {}
    theirs = trained_by_peft(plain, **MODES[mode], **more)
    theirs.save_pretrained(tmp_path)
    want = answers(theirs)
    assert (want - answers(plain)).abs().max() > 1e-2, "the adapter does nothing"
    ours = peft_files.load(plain, tmp_path)
    assert_equal(answers(ours), want)
    trainable = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert len(trainable) == len(lora.state_dict(ours)), "more trains than the adapter"


@pytest.mark.parametrize("task, build", HEADED)
def test_the_head_of_a_task_goes_both_ways(task, build, tmp_path):
    plain = build()
    two = ["q_proj", "v_proj"] if build is llama_classifier else ["query", "value"]
    cases = [(two, "none")]
    if build is not answerer:  # peft would put LoRA on its head as well
        cases += [("all-linear", "none"), ("all-linear", "all")]
    for targets, bias in cases:
        theirs = trained_by_peft(plain, targets, bias=bias, task_type=task)
        theirs.save_pretrained(tmp_path)
        ours = peft_files.load(copy.deepcopy(plain), tmp_path)
        assert_equal(answers(ours), answers(theirs))
        ours = trained(plain, targets, bias=bias)
        peft_files.save(ours, tmp_path)
        assert config_of(tmp_path)["task_type"] == task
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        assert_equal(answers(theirs), answers(ours))
        again = peft_files.load(copy.deepcopy(plain), tmp_path)
        assert_equal(answers(again), answers(ours))


def test_pefts_modules_to_save_are_heads(tmp_path):
    plain = MODELS["llama"]()
    theirs = trained_by_peft(plain, ["q_proj"], modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path)
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(theirs))


@pytest.mark.parametrize(
    "settings",
    [
        dict(targets=r".*\.0\.self_attn\.(q|v)_proj"),
        dict(targets=r"model\.layers\.1\..*_proj"),
        dict(targets=["q_proj", "up_proj"], exclude_modules=["0.self_attn.q_proj"]),
        dict(targets=r".*_proj", exclude_modules=r".*mlp.*"),
        dict(targets=["model.layers.1.mlp.down_proj", "0.self_attn.o_proj"]),
    ],
)
def test_we_select_the_modules_that_peft_selected(settings, tmp_path):
    plain = MODELS["llama"]()
    theirs = trained_by_peft(plain, **settings)
    theirs.save_pretrained(tmp_path)
    ours = peft_files.load(plain, tmp_path)
    assert_equal(answers(ours), answers(theirs))
    paths = {n.rpartition(".")[0] for n in lora.state_dict(ours)}
    assert paths == {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_ways_to_start_that_keep_the_base_are_read(init, tmp_path):
    plain = MODELS["llama"]()
    theirs = trained_by_peft(plain, ["q_proj"], init_lora_weights=init)
    theirs.save_pretrained(tmp_path)
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(theirs))


def test_the_fewest_settings_that_peft_takes_are_enough(tmp_path):
    plain = MODELS["llama"]()
    theirs = trained_by_peft(plain, ["q_proj"], r=8, alpha=8)
    theirs.save_pretrained(tmp_path)
    config = dict(peft_type="LORA", target_modules=["q_proj"])
    (tmp_path / CONFIG).write_text(json.dumps(config), "utf8")
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(theirs))


def test_dropout_is_kept_and_off_in_eval_mode(tmp_path):
    plain = MODELS["llama"]()
    peft_files.save(trained(plain, dropout=0.25), tmp_path)
    assert config_of(tmp_path)["lora_dropout"] == 0.25
    ours = peft_files.load(plain, tmp_path)  # it is in eval mode
    with torch.no_grad():
        assert torch.equal(ours(**BATCH)[0], ours(**BATCH)[0])
    layer = ours.model.layers[0].self_attn.q_proj
    assert layer.dropout.p == 0.25


# What is written


def test_the_file_holds_the_adapter_and_no_base_weight(tmp_path):
    for name, dtype in (("llama", torch.float32), ("gpt2", torch.bfloat16)):
        model = MODELS[name]().to(dtype)
        fill(lora.add(model, "all-linear", r=2), lora)
        peft_files.save(model, tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        ends = (".lora_A.weight", ".lora_B.weight")
        assert all(n.startswith("base_model.model.") for n in tensors)
        assert all(n.endswith(ends) for n in tensors), "a base weight is in the file"
        assert len(tensors) == len(lora.state_dict(model))
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    "build, task",
    [
        (MODELS["llama"], "CAUSAL_LM"),
        (MODELS["gpt2"], "CAUSAL_LM"),
        (MODELS["bert"], "SEQ_CLS"),
        (MODELS["bert-model"], None),
        (t5, "SEQ_2_SEQ_LM"),
        (whisper, None),
        (net, None),
    ],
)
def test_the_task_is_guessed_from_the_models_class(build, task, tmp_path):
    model = lora.add(build(), "all-linear")
    peft_files.save(model, tmp_path)
    assert config_of(tmp_path)["task_type"] == task


def test_the_settings_are_written_as_peft_names_them(tmp_path):
    more = dict(r=3, alpha=5, bias="lora_only", rslora=True)
    model = lora.add(MODELS["gpt2"](), ["c_attn"], **more)
    peft_files.save(model, tmp_path, task_type="FEATURE_EXTRACTION")
    wanted = dict(peft_type="LORA", task_type="FEATURE_EXTRACTION", r=3, lora_alpha=5)
    wanted |= dict(lora_dropout=0.0, bias="lora_only", use_rslora=True)
    wanted |= dict(target_modules=["c_attn"], modules_to_save=None)
    wanted |= dict(fan_in_fan_out=True, inference_mode=True)
    assert wanted.items() <= config_of(tmp_path).items()


ALL = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()
LAYERS = ["q_proj", "model.layers.0.self_attn.v_proj", "1.self_attn.v_proj"]
OUTPUT = ["attention.output.dense"]  # "dense" and "output.dense" are more


@pytest.mark.parametrize(
    "name, targets, written",
    [
        ("llama", LAYERS, ["q_proj", "v_proj"]),
        ("llama", ["0.self_attn.q_proj"], ["0.self_attn.q_proj"]),
        ("llama", ["mlp.up_proj"], ["up_proj"]),
        ("llama", "all-linear", ALL),
        ("bert-model", OUTPUT, OUTPUT),
    ],
)
def test_targets_are_written_as_the_shortest_suffixes(name, targets, written, tmp_path):
    peft_files.save(lora.add(MODELS[name](), targets), tmp_path)
    assert config_of(tmp_path)["target_modules"] == written


class Odd(nn.Module):
    """A linear `up`, and a norm `inner.up` that the suffix "up" would select too."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"up": nn.LayerNorm(4)})

    def forward(self, x):
        return self.inner["up"](self.up(x))


def test_where_no_suffix_will_do_a_regular_expression_is_written(tmp_path):
    plain, x = seeded(Odd()), torch.randn(3, 4)
    ours = fill(lora.add(copy.deepcopy(plain), ["up"], r=2), lora)
    peft_files.save(ours, tmp_path)
    assert config_of(tmp_path)["target_modules"] == "up"
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_equal(theirs(x), ours(x))
    assert torch.equal(peft_files.load(plain, tmp_path)(x), ours(x))


# A save is a transaction


def layers(alpha=1, width=8):
    """A small net with a LoRA whose numbers are all alpha."""
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
    if alpha:
        lora.add(model, ["0", "1", "2"], r=2, alpha=alpha)
        for t in lora.state_dict(model).values():
            t.fill_(alpha)
    return model


def alpha_in(folder):
    """The alpha of the adapter in a folder, whose numbers must be all the same."""
    model = peft_files.load(layers(None), folder)
    assert all((t == model[0].alpha).all() for t in lora.state_dict(model).values())
    return model[0].alpha


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def fail(*args, **kwargs):
    raise OSError("no space left on the device")


def test_an_error_while_writing_leaves_the_old_adapter(tmp_path, monkeypatch):
    peft_files.save(layers(1), tmp_path)
    before = contents(tmp_path)
    for owner, name in ((adapter_folder, "save_file"), (Path, "write_text")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(owner, name, fail)
            peft_files.save(layers(2), tmp_path)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("stop", range(10))
def test_a_save_that_stops_anywhere_loses_nothing(
    stop, first, killed, tmp_path, monkeypatch
):
    """An error at one call of the system; whoever is killed makes no more calls."""
    if not first:
        peft_files.save(layers(1), tmp_path)
    before = contents(tmp_path)
    calls = []
    done = []

    def stopping(really):
        def call(*args, **settings):
            calls.append(really)
            if len(calls) == stop + 1 or killed and len(calls) > stop:
                raise OSError("stopped")
            really(*args, **settings)
            done.append(really)

        return call

    for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    with contextlib.suppress(OSError):
        peft_files.save(layers(2), tmp_path)
    monkeypatch.undo()

    if os.replace in done:
        assert alpha_in(tmp_path) == 2
    elif first:
        refuses(layers(None), tmp_path, f"no {CONFIG}")
    else:
        assert alpha_in(tmp_path) == 1
        assert killed or contents(tmp_path) == before
    if (tmp_path / CONFIG).exists():
        (value,) = {t.mean().item() for t in load_file(tmp_path / WEIGHTS).values()}
        assert value == config_of(tmp_path)["lora_alpha"], "peft would mix two adapters"

    peft_files.save(layers(3), tmp_path)
    assert alpha_in(tmp_path) == 3
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS], "litter"


def test_saves_that_are_killed_lose_nothing(tmp_path):
    models, wait = [layers(1), layers(2)], random.Random(0)
    peft_files.save(layers(3), tmp_path)
    for _ in range(30):
        child = os.fork()
        try:
            while child == 0:
                for model in models:
                    peft_files.save(model, tmp_path)
        finally:
            if child == 0:
                os._exit(1)
        for _ in range(3):  # a reader beside a writer
            assert alpha_in(tmp_path) in (1, 2, 3)
        time.sleep(wait.random() / 50)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert alpha_in(tmp_path) in (1, 2, 3)
    peft_files.save(layers(3), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_threads_may_save_into_one_folder(tmp_path):
    models = [layers(alpha) for alpha in range(1, 5)]
    with ThreadPoolExecutor(5) as pool:
        saves = [pool.submit(peft_files.save, m, tmp_path) for m in 8 * models]
        loads = [pool.submit(alpha_in, tmp_path) for _ in range(20) if saves[0].result]
        assert all(save.result() is None for save in saves)
        assert {load.result() for load in loads} <= {1, 2, 3, 4}
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_a_load_waits_for_a_save(tmp_path):
    peft_files.save(layers(1), tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with adapter_folder._alone_in(tmp_path):
            load = pool.submit(alpha_in, tmp_path)
            time.sleep(0.1)
            assert not load.done(), "it reads while files may move"
        assert load.result() == 1


def test_files_of_two_adapters_are_refused(tmp_path):
    for alpha in (1, 2):
        peft_files.save(layers(alpha), tmp_path / str(alpha))
    shutil.copy(tmp_path / "1" / WEIGHTS, tmp_path / "2")
    refuses(layers(None), tmp_path / "2", "one adapter's weights and another's config")
    rewrite(tmp_path / "1", base_model_name_or_path="elsewhere", revision="2")
    assert alpha_in(tmp_path / "1") == 1, "these say nothing about the numbers"


# What cannot be saved


class Beside(nn.Linear):
    peft_method = "adapters"

    def __init__(self):
        super().__init__(1, 1)


def beside(**more):
    """A model that carries something else beside its LoRA."""
    model = trained(net())
    for name, value in more.items():
        setattr(model, name, value)
    return model


def unfrozen(path):
    model = trained(MODELS["llama"]())
    model.get_submodule(path).requires_grad_(True)
    return model


def broken(name):
    model = trained(MODELS["llama"]())
    model.get_parameter(name).data[0, 0] = torch.nan
    return model


def compiled_inside():
    wrapper = prompt.add(MODELS["llama"](), 2)
    wrapper.model = torch.compile(wrapper.model)
    return wrapper


@pytest.mark.parametrize(
    "case, settings",
    [
        ("no LoRA", dict(model=MODELS["llama"])),
        ("empty", dict(folder="")),
        ("empty", dict(folder="  ")),
        ("no module", dict(heads=("no_such_head",))),
        ("carries LoRA", dict(heads=("model.layers.0.self_attn.q_proj",))),
        ("carries LoRA", dict(heads=("model",))),
        ("list of names", dict(heads="lm_head")),
        ("task_type", dict(task_type=["SEQ_CLS"])),
        ("must be a path", dict(folder=None)),
        ("must be a path", dict(folder=b"adapter")),
        ("nn.Module", dict(model=lambda: None)),
        ("give the plain model", dict(model=lambda: nn.DataParallel(trained(net())))),
        ("give the plain model", dict(model=compiled_inside)),
        ("norm.weight trains", dict(model=lambda: unfrozen("model.norm"))),
        ("lm_head.weight trains", dict(model=lambda: unfrozen("lm_head"))),
        ("BitFit", dict(model=lambda: beside(bitfit=("norm.bias",)))),
        ("LoRA and adapters", dict(model=lambda: beside(adapters=Beside()))),
        ("NaN", dict(model=lambda: broken("model.layers.0.mlp.up_proj.lora_A"))),
    ],
)
def test_what_cannot_be_saved_writes_nothing(case, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build = settings.pop("model", lambda: trained(MODELS["llama"]()))
    settings.setdefault("folder", tmp_path / "new")
    model = build()
    before = snapshot(model) if model is not None else None
    with pytest.raises(ValueError, match=case) as error:
        peft_files.save(model, **settings)
    assert_one_sentence(error)
    if case not in ("nn.Module", "NaN"):
        assert_unchanged(model, before)
    assert not list(tmp_path.iterdir())


def test_a_tied_head_is_refused_on_both_ways(tmp_path):
    plain = MODELS["tiny-decoder"]()
    with pytest.raises(ValueError, match="tied") as error:
        peft_files.save(trained(plain), tmp_path, heads=("lm_head",))
    assert_one_sentence(error)
    theirs = trained_by_peft(plain, ["q_proj"])
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = plain.lm_head.weight.detach().clone()
    save_file(tensors, tmp_path / WEIGHTS)
    rewrite(tmp_path, modules_to_save=["lm_head"])
    refuses(plain, tmp_path, "tied")


def test_embeddings_that_peft_writes_are_loaded_or_refused_with_their_sizes(tmp_path):
    plain, longer = MODELS["llama"](), MODELS["llama"]()
    longer.resize_token_embeddings(45)
    theirs = trained_by_peft(longer, ["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    refuses(plain, tmp_path, r"\(45, 32\) in the file, \(40, 32\) in the model")
    plain.resize_token_embeddings(45)
    jiggle(plain.lm_head.parameters())
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(theirs))
    longer.resize_token_embeddings(50)
    refuses(longer, tmp_path, r"\(45, 32\) in the file, \(50, 32\) in the model")


@pytest.mark.parametrize("heads", [["model.embed_tokens", "lm_head"], []])
def test_tied_weights_that_came_apart_in_the_file_are_refused(heads, tmp_path):
    plain = MODELS["tiny-decoder"]()
    model = trained(plain)
    peft_files.save(model, tmp_path, heads=heads)
    ours = peft_files.load(copy.deepcopy(plain), tmp_path)
    assert_equal(answers(ours), answers(model))
    rows = plain.lm_head.weight.detach()
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = rows + 1
    tensors["base_model.model.model.embed_tokens.weight"] = rows.clone()
    save_file(tensors, tmp_path / WEIGHTS)
    refuses(plain, tmp_path, "tied in the model and differ")


def test_targets_that_a_file_leaves_out_are_asked_for(folder):
    rewrite(folder, target_modules=None)
    refuses(MODELS["llama"](), folder, "names no target_modules")


def test_names_with_the_adapters_name_in_them_are_explained(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors = {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS)
    refuses(MODELS["llama"](), folder, "'default' in it")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)


@pytest.mark.parametrize("build", [Attention, lambda: nn.ModuleDict({"attn": conv()})])
def test_an_adapter_on_what_is_no_linear_layer_is_refused_by_its_kind(build, tmp_path):
    twin = peft_twin(build(), ["attn"])
    twin.save_pretrained(tmp_path)
    refuses(build(), tmp_path, "attn is a (MultiheadAttention|Conv2d)")


def conv():
    return nn.Conv2d(4, 4, 3)


@pytest.mark.parametrize("model", [None, "llama", torch.nn.Linear])
def test_what_is_no_model_and_no_path_is_refused(model, folder):
    with pytest.raises(ValueError, match="nn.Module"):
        peft_files.load(model, folder)
    for path in (None, b"folder", 3):
        refuses(MODELS["llama"](), path, "must be a path")


def test_an_adapter_is_not_put_into_a_container(folder):
    inside = nn.Sequential(torch.compile(MODELS["llama"]()))
    for model in (inside, nn.DataParallel(MODELS["llama"]())):
        with pytest.raises(ValueError, match="give the plain model"):
            peft_files.load(model, folder)


def test_the_adapter_goes_through_torch_compile(tmp_path):
    outer = torch.compile(layers(2), backend="eager")
    peft_files.save(outer, tmp_path)
    fresh = torch.compile(layers(None), backend="eager")
    fresh.load_state_dict({f"_orig_mod.{n}": t for n, t in plain_state(outer).items()})
    assert peft_files.load(fresh, tmp_path) is fresh
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), outer(x))
    assert alpha_in(tmp_path) == 2


def plain_state(model):
    state = model._orig_mod.state_dict()
    return {n.replace(".base", ""): t for n, t in state.items() if "lora" not in n}


# Bad files: one sentence, and the model as it was


def refuses(model, folder, match):
    first = next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        peft_files.load(model, folder)
    assert_one_sentence(error)
    assert_unchanged(model, before)
    assert not first.requires_grad


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    peft_files.save(trained(MODELS["llama"](), bias="lora_only"), folder)
    return folder


@pytest.fixture
def folder(stored, tmp_path):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((stored / name).read_bytes())
    return tmp_path


def test_the_stored_adapter_loads(folder):
    peft_files.load(MODELS["llama"](), folder)


def test_a_missing_folder_or_file_is_refused_by_its_name(folder, tmp_path_factory):
    model = MODELS["llama"]()
    empty = tmp_path_factory.mktemp("empty")
    refuses(model, empty / "nowhere", "no adapter folder")
    refuses(model, str(empty), CONFIG)
    refuses(model, folder / CONFIG, "no adapter folder")
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
        refuses(model, folder, name)


def test_a_pickle_is_never_read(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    refuses(MODELS["llama"](), folder, "pickle")


NO_JSON = ["", "{", '{"r": 8,}', "LORA", "[" * 10**5, '{"r": ' + "9" * 5000 + "}"]
NO_CONFIG = ["[]", "3", "null", '"LORA"', "{}"]


def test_what_is_no_config_is_refused(folder):
    model = MODELS["llama"]()
    for words, texts in (("not valid JSON", NO_JSON), ("not one of", NO_CONFIG)):
        for text in texts:
            (folder / CONFIG).write_text(text)
            refuses(model, folder, words)
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")
    refuses(model, folder, "not valid JSON")
    os.truncate(folder / CONFIG, 10**12)  # and not read, either
    refuses(model, folder, "not valid JSON")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_plain_file_is_refused_at_once(kind, name, folder):
    (folder / name).unlink()
    if kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "fifo" else os.mkdir)(folder / name)
    refuses(MODELS["llama"](), folder, "no plain file")
    with pytest.raises(ValueError, match="no plain file"):
        peft_files.save(trained(MODELS["llama"]()), folder)


@pytest.mark.parametrize(
    "what", ["setting", "value", "regex", "type", "tensor", "head"]
)
def test_a_message_is_short_and_printable_whatever_the_file_says(what, folder):
    long = "\x1b[2J" + "a" * 10**5
    settings = dict(setting={long: 1}, value={"rank_pattern": long}, type=dict(r=long))
    settings |= dict(regex=dict(target_modules=f"({long}"), tensor={})
    rewrite(folder, **settings.get(what, dict(modules_to_save=[long])))
    if what in ("tensor", "head"):
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, f"{long}.weight": torch.ones(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError) as error:
        peft_files.load(MODELS["llama"](), folder)
    assert_one_sentence(error)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "value",
    [torch.nan, torch.inf, -torch.inf, 1e300, torch.int32, torch.bool, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize(
    "end", ["q_proj.lora_A.weight", "base_layer.bias", "classifier"]
)
def test_tensors_that_are_no_finite_floats_are_refused(end, value, tmp_path):
    plain = MODELS["bert"]()
    name = "bert.encoder.layer.0.attention.self.query.base_layer.bias"
    if end != "base_layer.bias":
        name = "classifier.weight" if end == "classifier" else "query.lora_A.weight"
    peft_files.save(trained(plain, bias="lora_only"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith(name))
    if isinstance(value, torch.dtype):
        tensors[key] = tensors[key].to(value)
    else:
        tensors[key] = tensors[key].double()
        tensors[key].view(-1)[0] = value
    save_file(tensors, tmp_path / WEIGHTS)
    refuses(plain, tmp_path, "floats belong|NaN|in the file")


def test_a_truncated_file_is_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:length])
        refuses(MODELS["llama"](), folder, "truncated or damaged")


def test_a_file_without_lora_tensors_is_refused(folder):
    for tensors in ({}, {"base_model.model.lm_head.weight": torch.ones(40, 32)}):
        save_file(tensors, folder / WEIGHTS)
        refuses(MODELS["llama"](), folder, "no LoRA tensors")


@pytest.mark.parametrize(
    "change", ["A", "B", "bias", "biases", "more", "other shape", "other r"]
)
def test_tensors_that_do_not_fit_are_refused(change, folder):
    tensors = load_file(folder / WEIGHTS)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    words = "another model"
    if change == "more":
        tensors[f"{path}.lora_C.weight"] = torch.ones(2)
    elif change == "other shape":
        tensors[f"{path}.lora_A.weight"] = torch.ones(4, 31)
    elif change == "other r":
        rewrite(folder, r=5)
    elif change == "biases":  # as peft 0.20 writes them
        tensors = {n: t for n, t in tensors.items() if not n.endswith("bias")}
        words = "biases are trained and the file holds none"
    else:
        ends = dict(A="lora_A.weight", B="lora_B.weight", bias="base_layer.bias")
        del tensors[f"{path}.{ends[change]}"]
    save_file(tensors, folder / WEIGHTS)
    refuses(MODELS["llama"](), folder, words)


OTHERS = [dict(hidden_size=48), dict(intermediate_size=80), dict(num_hidden_layers=1)]
OTHERS += [dict(num_hidden_layers=3), dict(num_key_value_heads=4)]
OTHERS += [dict(attention_bias=False)]


def test_an_adapter_for_another_model_is_refused(folder):
    sizes = dict(**SMALL, **HEADS, num_key_value_heads=1, attention_bias=True)
    models = [tf.LlamaForCausalLM(tf.LlamaConfig(**sizes | other)) for other in OTHERS]
    families = ("gpt2", "bert", "bert-model", "tiny-decoder")
    for model in (*models, *[MODELS[name]() for name in families]):
        refuses(model, folder, "another model")


CHANGES_NUMBERS = {
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"q_proj": 2}],
    "layers_to_transform": [[0], 0],
    "layer_replication": [[[0, 1], [0, 2]]],
    "use_qalora": [True],
    "use_bdlora": [{"target_modules_bd_a": []}],
    "lora_bias": [True],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "trainable_token_indices": [[1, 2]],
    "alora_invocation_tokens": [[1]],
    "arrow_config": [{"top_k": 3}],
    "megatron_config": [{"tp": 2}],
    "corda_config": [{"a": 1}],
    "init_lora_weights": "pissa_niter_4 olora corda loftq lora_ga".split()
    + [["pissa"]],
    "a_setting_of_next_year": ["on"],
}


@pytest.mark.parametrize("setting", CHANGES_NUMBERS)
def test_a_setting_that_changes_numbers_is_refused_by_name(setting, folder):
    for value in CHANGES_NUMBERS[setting]:
        rewrite(folder, **{setting: value})
        refuses(MODELS["llama"](), folder, setting)


OUT_OF_RANGE = {
    "r": ["4", 0, None, True, 10**400, 4.0],
    "lora_alpha": [-6, None, 10**400, "6", True, float("nan")],
    "lora_dropout": [1.5, True, 10**400],
    "use_rslora": ["false", 0],
    "use_dora": ["false"],
    "bias": ["some", ["none"]],
    "target_modules": [None, [], 3, ["q_proj"], "*(", "all-nonlinear", [1], {"q": 1}],
    "exclude_modules": ["*(", [None]],
    "modules_to_save": [["lm_head"], ["q_proj"], "lm_head", [1], [""]],
}


@pytest.mark.parametrize("setting", OUT_OF_RANGE)
def test_a_setting_out_of_range_is_refused(setting, folder):
    for value in OUT_OF_RANGE[setting]:
        rewrite(folder, **{setting: value})
        refuses(MODELS["llama"](), folder, "")


@pytest.mark.parametrize("kind", peft_files.DEFAULTS)
def test_every_field_of_pefts_config_is_known_or_refused(kind, folder):
    known = {
        *peft_files.DEFAULTS[kind],
        *f"{peft_files.HARMLESS['']} {peft_files.HARMLESS[kind]}".split(),
    }
    fields = set(PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__)
    gone = known - fields - {"peft_version", "exclude_modules"}
    assert not gone, f"peft no longer has these settings: {gone}"
    (folder / CONFIG).write_text(json.dumps(dict(peft_type=kind)))
    for field in sorted(fields - known):
        rewrite(folder, **{field: "on"})
        refuses(MODELS["llama"](), folder, field)
        rewrite(folder, **{field: None})


def test_what_peft_writes_and_we_do_not_support_is_refused_by_name(tmp_path):
    for match, settings in (
        ("rank_pattern", dict(rank_pattern={"q_proj": 2})),
        ("Embedding: only linear", dict(targets=["q_proj", "embed_tokens"])),
        ("pissa_niter_4", dict(init_lora_weights="pissa_niter_4")),
        ("olora", dict(init_lora_weights="olora")),
    ):
        twin = peft_twin(MODELS["llama"](), **{"targets": ["q_proj"], **settings})
        twin.save_pretrained(tmp_path)
        refuses(MODELS["llama"](), tmp_path, match)
    config = LoHaConfig(target_modules=["k_proj"])
    get_peft_model(MODELS["llama"](), config).save_pretrained(tmp_path)
    refuses(MODELS["llama"](), tmp_path, "LOHA")


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    peft_files.save(trained(MODELS["bert"]()), tmp_path)
    model = MODELS["bert"]()
    model.classifier = nn.Linear(32, 5)
    refuses(model, tmp_path, "classifier")
    tensors = load_file(tmp_path / WEIGHTS)
    for end in ("classifier.weight", "bias"):
        tensors = {n: t for n, t in tensors.items() if not n.endswith(end)}
        save_file(tensors, tmp_path / WEIGHTS)
        refuses(MODELS["bert"](), tmp_path, f"classifier.{end}"[-17:])
