"""The files of every method that peft has too, both ways with peft."""

import copy

import peft
import pytest
import torch
import transformers as tf
from common import MODELS, assert_one_sentence, bert, jiggle, seeded, t5
from safetensors.torch import load_file, save_file
from test_peft_files import (
    CONFIG,
    WEIGHTS,
    answers,
    assert_equal,
    config_of,
    refuses,
    rewrite,
)

from peftlab import dora, ia3, lora, multi_lora, peft_files, pissa, prefix, prompt, vera

EVERY = {**MODELS, "t5": t5}
TARGETS = {  # an attention layer or two, and the feed-forward block's second layer
    "tiny-decoder": (["k_proj", "v_proj"], ["down_proj"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "bert": (["key", "value"], ["layer.0.output.dense", "layer.1.output.dense"]),
    "bert-model": (["key", "value"], ["layer.0.output.dense", "layer.1.output.dense"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "t5": (["k", "v"], ["wo"]),
}
MODULES = dict(
    lora=lora, dora=dora, pissa=pissa, vera=vera, ia3=ia3, prompt=prompt, prefix=prefix
)
TREE = ("lora", "dora", "pissa", "vera", "ia3")
SOFT = [
    (kind, name)
    for kind in ("prompt", "prefix")
    for name in ("tiny-decoder", "llama", "gpt2", "t5", "bert", "bert-model")
    if kind == "prompt" or "bert" not in name
]
PAIRS = [(kind, name) for kind in TREE[1:] for name in EVERY]
each_pair = pytest.mark.parametrize("kind, name", [("lora", "t5"), *PAIRS])
each_kind = pytest.mark.parametrize("kind", [*TREE, "prompt", "prefix"])
TASKS = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "bert-model": "FEATURE_EXTRACTION"}


def head_of(model):
    return [*getattr(model, "classifier", torch.nn.Module()).parameters()]


def ours(kind, name, plain):
    """A model with the method on it, and its head if it has one, as after training."""
    model, (outputs, inputs) = copy.deepcopy(plain), TARGETS[name]
    module, targets = MODULES[kind], [*outputs, *inputs]
    if kind == "ia3":
        module.add(model, outputs, inputs)
    elif kind in ("lora", "dora"):
        module.add(model, targets, r=3, alpha=6)
    elif kind in ("pissa", "vera"):
        module.add(model, targets, r=4)
    else:
        model = module.add(model, 3)
    jiggle([*module.state_dict(model).values(), *head_of(model)])
    return model


def theirs(kind, name, plain, **more):
    """peft's model with the method on it, as after training."""
    outputs, inputs = TARGETS[name]
    task = dict(task_type=TASKS.get(name, "CAUSAL_LM"))
    tree = dict(target_modules=[*outputs, *inputs], **task)
    soft = dict(num_virtual_tokens=3, **task)
    config = {
        "lora": lambda: peft.LoraConfig(r=3, lora_alpha=6, **tree),
        "dora": lambda: peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, **tree),
        "pissa": lambda: peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights="pissa", **tree
        ),
        "vera": lambda: peft.VeraConfig(r=4, projection_prng_key=7, **tree, **more),
        "ia3": lambda: peft.IA3Config(feedforward_modules=inputs, **tree),
        "prompt": lambda: peft.PromptTuningConfig(**soft, **more),
        "prefix": lambda: peft.PrefixTuningConfig(**soft, **more),
    }[kind]()
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    jiggle(p for p in model.parameters() if p.requires_grad)
    return model


@each_pair
def test_peft_loads_what_we_save(kind, name, tmp_path, recwarn):
    plain = EVERY[name]()
    model = ours(kind, name, plain)
    peft_files.save(model, tmp_path)
    want = answers(model)
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    said = [str(w.message) for w in recwarn if "adapter keys" in str(w.message)]
    assert not said, f"peft misses tensors or finds too many: {said}"
    assert (want - answers(plain)).abs().max() > 1e-3, "the adapter does nothing"
    assert_equal(answers(twin), want)
    assert_equal(answers(peft_files.load(copy.deepcopy(plain), tmp_path)), want)


@each_pair
def test_we_load_what_peft_saves(kind, name, tmp_path):
    plain = EVERY[name]()
    twin = theirs(kind, name, plain)
    twin.save_pretrained(tmp_path)
    model = peft_files.load(copy.deepcopy(plain), tmp_path)
    assert_equal(answers(model), answers(twin))
    own = MODULES[kind].state_dict(model)
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trains) == len(own), "more trains than the adapter"


@pytest.mark.parametrize("kind, name", SOFT)
def test_soft_prompts_go_both_ways(kind, name, tmp_path):
    plain = EVERY[name]()
    model = ours(kind, name, plain)
    peft_files.save(model, tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert_equal(answers(twin), answers(model))
    twin = theirs(kind, name, plain)
    twin.save_pretrained(tmp_path / "theirs")
    back = peft_files.load(copy.deepcopy(plain), tmp_path / "theirs")
    assert_equal(answers(back), answers(twin))
    assert type(back) is type(model)
    trains = [n for n, p in back.named_parameters() if p.requires_grad]
    assert trains == ["prompt_embeddings"]


def test_a_prompt_on_both_stacks_of_a_t5_goes_both_ways(tmp_path):
    plain = t5()
    model = prompt.add(copy.deepcopy(plain), 3, decoder=True)
    jiggle(prompt.state_dict(model).values())
    peft_files.save(model, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["prompt_embeddings"].shape == (6, 32)
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_equal(answers(twin), answers(model))
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(model))


def test_a_prefix_with_a_network_is_saved_without_it(tmp_path):
    plain = MODELS["llama"]()
    model = prefix.add(copy.deepcopy(plain), 3, hidden=7)
    jiggle(p for p in model.parameters() if p.requires_grad)
    peft_files.save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "prompt_embeddings": (3, 32)  # 2 layers, keys and values, one head of 8
    }
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_equal(answers(twin), answers(model))
    more = dict(prefix_projection=True, encoder_hidden_size=7)
    twin = theirs("prefix", "llama", plain, **more)
    twin.save_pretrained(tmp_path)
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(twin))


def test_vera_is_read_from_its_seed_alone(tmp_path):
    plain = MODELS["llama"]()
    twin = theirs("vera", "llama", plain, save_projection=False)
    twin.save_pretrained(tmp_path)
    assert not [n for n in load_file(tmp_path / WEIGHTS) if "vera_A" in n]
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(twin))


def test_veras_shared_matrices_are_read_where_the_file_has_them(tmp_path):
    plain = MODELS["llama"]()
    peft_files.save(ours("vera", "llama", plain), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.vera_A"] *= 1.5
    save_file(tensors, tmp_path / WEIGHTS)
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    model = peft_files.load(copy.deepcopy(plain), tmp_path)
    assert_equal(answers(model), answers(twin))
    peft_files.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert torch.equal(again["base_model.vera_A"], tensors["base_model.vera_A"])
    tensors["base_model.vera_B"] = tensors["base_model.vera_B"][:-1].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    refuses(plain, tmp_path, "vera_B")


def test_a_pissa_is_written_as_a_lora_of_twice_the_rank(tmp_path):
    plain = MODELS["llama"]()
    model = ours("pissa", "llama", plain)
    peft_files.save(model, tmp_path)
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["init_lora_weights"] is True and not config["use_rslora"]
    back = peft_files.load(plain, tmp_path)
    assert lora.state_dict(back), "the file is a LoRA's, and is read as one"


def test_pefts_converted_pissa_is_read_as_the_lora_that_it_is(tmp_path):
    plain = MODELS["llama"]()
    start = dict(init_lora_weights="pissa", target_modules=["q_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=4, **start)
    twin = peft.get_peft_model(copy.deepcopy(plain), config)
    twin.peft_config["default"].init_lora_weights = True
    twin.save_pretrained(tmp_path / "start")
    twin.peft_config["default"].init_lora_weights = "pissa"
    jiggle(p for p in twin.parameters() if p.requires_grad)
    more = dict(path_initial_model_for_weight_conversion=tmp_path / "start")
    twin.save_pretrained(tmp_path / "end", **more)
    model = peft_files.load(plain, tmp_path / "end")
    assert lora.state_dict(model)
    assert_equal(answers(model), answers(twin))


def test_a_dora_with_rslora_scales_as_peft_does(tmp_path):
    plain = MODELS["llama"]()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=["q_proj"]
    )
    twin = peft.get_peft_model(copy.deepcopy(plain), config)
    jiggle(p for p in twin.parameters() if p.requires_grad)
    twin.save_pretrained(tmp_path)
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(twin))


@pytest.mark.parametrize("kind", ["dora", "vera", "ia3", "prompt"])
def test_a_classifiers_head_goes_along(kind, tmp_path):
    plain = bert()
    twin = theirs(kind, "bert", plain)
    twin.save_pretrained(tmp_path)
    model = peft_files.load(copy.deepcopy(plain), tmp_path)
    assert_equal(answers(model), answers(twin))
    assert (head_of(model)[0] - head_of(plain)[0]).abs().max() > 1e-3
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[next(n for n in tensors if n.endswith("classifier.bias"))]
    save_file(tensors, tmp_path / WEIGHTS)
    refuses(plain, tmp_path, "classifier.bias")


@pytest.mark.parametrize("kind", TREE)
def test_a_head_that_is_asked_for_goes_both_ways(kind, tmp_path):
    plain = MODELS["llama"]()
    model = ours(kind, "llama", plain)
    jiggle(model.lm_head.parameters())
    peft_files.save(model, tmp_path, heads=("lm_head",))
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_equal(answers(twin), answers(model))
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(model))


@each_kind
def test_saving_and_loading_many_times_gives_the_same_bytes(kind, tmp_path):
    plain = MODELS["llama"]()
    peft_files.save(ours(kind, "llama", plain), tmp_path / "one")
    again = peft_files.load(copy.deepcopy(plain), tmp_path / "one")
    peft_files.save(again, tmp_path / "two")
    for name in (CONFIG, WEIGHTS):
        one, two = (tmp_path / k / name for k in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_the_active_one_of_several_is_what_is_saved(tmp_path):
    plain = MODELS["llama"]()
    model = copy.deepcopy(plain)
    for seed, name in enumerate(("fi", "de")):
        multi_lora.add(model, name, ["q_proj"], r=2)
        jiggle(lora.state_dict(model).values(), seed)
        peft_files.save(model, tmp_path / name)
    want = answers(multi_lora.switch(model, "fi"))
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "fi")
    assert_equal(answers(twin), want)


# Bad input: one sentence, and the model as it was


@each_kind
def test_tensors_that_do_not_fit_are_refused(kind, tmp_path):
    plain = MODELS["llama"]()
    theirs(kind, "llama", plain).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    first, last = min(tensors), max(tensors)
    cases = [
        {n: t for n, t in tensors.items() if n != first},
        {**tensors, "base_model.model.model.norm.weight": torch.ones(32)},
        {**tensors, last: torch.ones(*tensors[last].shape, 2)},
        {**tensors, last: torch.full_like(tensors[last], torch.nan)},
        {},
    ]
    for case in cases:
        save_file(case, tmp_path / WEIGHTS)
        refuses(plain, tmp_path, "")


@each_kind
def test_a_compiled_model_is_the_model_inside(kind, tmp_path):
    plain = MODELS["llama"]()
    model = ours(kind, "llama", plain)
    peft_files.save(model, tmp_path / "one")
    peft_files.save(torch.compile(model), tmp_path / "two")
    for name in (CONFIG, WEIGHTS):
        one, two = (tmp_path / k / name for k in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    outer = torch.compile(plain)
    back = peft_files.load(outer, tmp_path / "two")
    assert type(back) is type(model if kind in ("prompt", "prefix") else outer)
    assert_equal(answers(getattr(back, "_orig_mod", back)), answers(model))


SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=1, attention_bias=True)
OTHERS = [dict(hidden_size=48), dict(num_hidden_layers=1), dict(num_hidden_layers=3)]


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("kind", [*TREE[1:], "prefix"])
def test_an_adapter_for_another_model_is_refused(other, kind, tmp_path):
    theirs(kind, "llama", MODELS["llama"]()).save_pretrained(tmp_path)
    config = tf.LlamaConfig(**{**SIZES, **other})
    if kind == "prefix" and "hidden_size" in other:
        config.num_key_value_heads = 2
    refuses(tf.LlamaForCausalLM(config), tmp_path, "another model")


MISFITS = {
    ("dora", "bias"): ["all"],
    ("dora", "r"): [5],
    ("dora", "lora_alpha"): [-1],
    ("pissa", "bias"): ["lora_only"],
    ("pissa", "init_lora_weights"): ["pissa_niter_4"],
    ("pissa", "r"): [0],
    ("vera", "bias"): ["all"],
    ("vera", "layers_to_transform"): [[0]],
    ("vera", "r"): [3, "4"],
    ("vera", "projection_prng_key"): [-1, None, 10**400, 7.0],
    ("vera", "save_projection"): ["no"],
    ("ia3", "feedforward_modules"): [[], ["v_proj"], [1]],
    ("ia3", "target_modules"): [["k_proj"]],
    ("ia3", "exclude_modules"): [["k_proj"]],
    ("prompt", "num_virtual_tokens"): [4, None, "3", 10**400],
    ("prefix", "num_virtual_tokens"): [0],
    ("prefix", "peft_type"): ["P_TUNING"],
}


@pytest.mark.parametrize("kind, setting", MISFITS)
def test_a_setting_that_does_not_fit_is_refused(kind, setting, tmp_path):
    plain = MODELS["llama"]()
    theirs(kind, "llama", plain).save_pretrained(tmp_path)
    for value in MISFITS[kind, setting]:
        rewrite(tmp_path, **{setting: value})
        refuses(plain, tmp_path, "")


def distilbert():
    sizes = dict(vocab_size=40, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    return seeded(tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**sizes)))


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_pefts_ending_match_of_heads_takes_distilberts_pre_classifier(kind, tmp_path):
    plain, soft = distilbert(), dict(num_virtual_tokens=3, task_type="SEQ_CLS")
    configs = dict(
        lora=lambda: peft.LoraConfig(target_modules=["q_lin"], task_type="SEQ_CLS"),
        ia3=lambda: peft.IA3Config(
            target_modules=["k_lin"], feedforward_modules=[], task_type="SEQ_CLS"
        ),
        prompt=lambda: peft.PromptTuningConfig(
            **soft, token_dim=32, num_layers=2, num_attention_heads=4
        ),
    )
    twin = peft.get_peft_model(copy.deepcopy(plain), configs[kind]())
    jiggle(p for p in twin.parameters() if p.requires_grad)
    twin.save_pretrained(tmp_path / "theirs")
    model = peft_files.load(copy.deepcopy(plain), tmp_path / "theirs")
    assert_equal(answers(model), answers(twin))
    peft_files.save(model, tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert_equal(answers(twin), answers(model))


def test_a_file_with_the_vocabularys_weights_in_it_is_read(tmp_path):
    plain = MODELS["llama"]()
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    twin = peft.get_peft_model(copy.deepcopy(plain), config)
    jiggle(p for p in twin.parameters() if p.requires_grad)
    twin.save_pretrained(tmp_path)
    assert any(n.endswith("base_layer.weight") for n in load_file(tmp_path / WEIGHTS))
    assert_equal(answers(peft_files.load(plain, tmp_path)), answers(twin))


def electra():
    sizes = dict(vocab_size=40, embedding_size=16, hidden_size=32, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, intermediate_size=64)
    return tf.ElectraModel(tf.ElectraConfig(**sizes))


def short_decoder():
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_heads=4, vocab_size=40)
    config = tf.T5Config(**sizes, num_layers=3, num_decoder_layers=2)
    config.decoder_start_token_id = 0
    return tf.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("build, module", [(electra, prompt), (short_decoder, prefix)])
def test_a_soft_prompt_has_the_sizes_of_what_reads_it(build, module, tmp_path):
    """The embeddings' width, not the model's; the decoder's depth."""
    plain = seeded(build())
    model = module.add(copy.deepcopy(plain), 3)
    peft_files.save(model, tmp_path)
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_equal(answers(twin), answers(model))


def test_two_kinds_at_once_do_not_go_into_one_folder(tmp_path):
    model = lora.add(MODELS["llama"](), ["q_proj"])
    layer = model.model.layers[0].self_attn
    layer.k_proj = ia3.IA3Linear(layer.k_proj, False)
    with pytest.raises(ValueError, match="LoRA and IA3") as error:
        peft_files.save(model, tmp_path / "new")
    assert_one_sentence(error)
    assert not (tmp_path / "new").exists()


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})
        self.proj, self.q_proj = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.q_proj(self.proj(torch.relu(self.body["proj"](x))))


@pytest.mark.parametrize("kind", TREE)
def test_a_full_path_is_no_suffix_in_a_file(kind, tmp_path):
    """A file for `proj` alone, beside `body.proj`; IA3's own end without a dot too."""
    plain, x = seeded(Two()), torch.randn(3, 8)
    tree = dict(target_modules="proj|q_proj")
    configs = dict(
        lora=peft.LoraConfig(r=3, **tree),
        dora=peft.LoraConfig(r=3, use_dora=True, **tree),
        pissa=peft.LoraConfig(r=3, init_lora_weights="pissa", **tree),
        vera=peft.VeraConfig(r=3, **tree),
        ia3=peft.IA3Config(feedforward_modules="proj", **tree),
    )
    twin = peft.get_peft_model(copy.deepcopy(plain), configs[kind])
    jiggle(p for p in twin.parameters() if p.requires_grad)
    twin.save_pretrained(tmp_path / "theirs")
    model = peft_files.load(copy.deepcopy(plain), tmp_path / "theirs")
    assert_equal(model(x), twin(x))
    peft_files.save(model, tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert_equal(twin(x), model(x))


def test_a_bare_encoder_keeps_its_own_task(tmp_path):
    model = prompt.add(seeded(bert(tf.BertModel)), 2)
    peft_files.save(model, tmp_path)
    config = config_of(tmp_path)
    assert config["task_type"] == "FEATURE_EXTRACTION"
