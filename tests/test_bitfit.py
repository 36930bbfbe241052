"""BitFit's laws, which biases they are, and norm tuning with the same numbers as peft.

A law that takes only `bitfit`, the module, is run again by tests/test_mutations.py on
broken copies of bitfit.py. Messages name the mistake that gives the symptom.
"""

import copy

import bitsandbytes
import pytest
import torch
from common import (
    IDS,
    MODELS,
    SMALL,
    assert_one_sentence,
    assert_same_merged,
    assert_same_training,
    assert_unchanged,
    bert,
    gpt2,
    jiggle,
    llama,
    net,
    outputs,
    seeded,
    snapshot,
    t5,
    train,
    trainable,
)
from peft import LNTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM

from peftlab import bitfit as reference

BIASES = {f"{n}.bias" for n in ("q_proj", "norm", "c_attn", "c_proj", "lm_head")}


@pytest.fixture
def bitfit():
    return reference


def bare(head="classifier"):
    """A model with no bias at all: two linears, a norm with a weight only, a head."""
    parts = {"up": nn.Linear(6, 8, bias=False), "norm": nn.LayerNorm(8, bias=False)}
    parts |= {"down": nn.Linear(8, 6, bias=False), head: nn.Linear(6, 4, bias=False)}
    return seeded(nn.ModuleDict(parts).double())


def run(model, x):
    for layer in model.values():
        x = layer(x)
    return x


def stir(model, bitfit, seed=5):
    """All that trains a little different, as after training."""
    jiggle(bitfit.state_dict(model).values(), seed)
    return model


# The laws


def test_adding_bitfit_changes_no_output_and_no_layer(bitfit):
    for settings in ({}, dict(create=True), dict(targets=["q_proj"])):
        model = bitfit.add(net(), **settings)
        assert torch.equal(model(IDS), net()(IDS)), "outputs moved at step 0"
        kinds = [type(m) for m in model.modules()]
        assert kinds == [type(m) for m in net().modules()], "no layer is wrapped"


def test_every_bias_trains_and_nothing_else(bitfit):
    model = bitfit.add(net())
    assert trainable(model) == BIASES, "all biases train, the norms' and the head's too"
    own = bitfit.state_dict(model, keep_vars=True)
    assert own.keys() == BIASES
    assert all(model.get_parameter(n) is p for n, p in own.items())


def test_the_gradients_are_those_of_full_fine_tuning(bitfit):
    full, model = net(), bitfit.add(net())
    for m in (full, model):
        m(IDS).pow(2).mean().backward()
    for name, p in bitfit.state_dict(model, keep_vars=True).items():
        assert p.grad is not None, f"{name} gets no gradient"
        torch.testing.assert_close(p.grad, full.get_parameter(name).grad)


def test_targets_train_only_their_biases(bitfit):
    for targets, wanted in (
        (["q_proj"], {"q_proj.bias"}),
        (["q_proj", "c_proj"], {"q_proj.bias", "c_proj.bias"}),
        (("lm_head",), {"lm_head.bias"}),
    ):
        model = bitfit.add(net(), targets=targets)
        assert trainable(model) == wanted == bitfit.state_dict(model).keys()
    model = bitfit.add(net(), create=True, targets="all-linear")
    wanted = {f"{n}.bias" for n in ("q_proj", "c_attn", "c_proj", "proj")}
    assert trainable(model) == wanted, "all-linear: no norm and no head"


def test_created_biases_are_zero_and_change_no_output(bitfit):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = bitfit.add(bare().to(dtype), create=True)
        own = bitfit.state_dict(model)
        assert own.keys() == {"up.bias", "down.bias"}
        assert [len(t) for t in own.values()] == [8, 6]
        assert not any(t.any() for t in own.values()), "created biases start at zero"
        assert {t.dtype for t in own.values()} == {dtype}, "as precise as the weights"
        plain = run(bare().to(dtype), x.to(dtype))
        assert torch.equal(run(model, x.to(dtype)), plain), "outputs moved at step 0"


def test_created_biases_train(bitfit):
    model, x = bitfit.add(bare(), create=True), torch.ones(2, 6, dtype=torch.float64)
    assert trainable(model) == {"up.bias", "down.bias"}
    run(model, x).pow(2).sum().backward()
    assert model["up"].bias.grad.any() and model["down"].bias.grad.any()
    both = bitfit.add(net(), create=True)
    assert trainable(both) == BIASES | {"proj.bias"}, "those that were there train too"


def test_the_output_head_gets_no_created_bias(bitfit):
    for head in ("classifier", "score"):
        assert bitfit.add(bare(head), create=True)[head].bias is None
    model = net()
    model.lm_head = nn.Linear(12, 11, bias=False).double()
    bitfit.add(model, create=True)
    assert model.lm_head.bias is None, "the output head gets no bias"
    assert trainable(model) == (BIASES | {"proj.bias"}) - {"lm_head.bias"}


def test_created_biases_go_only_on_the_targets(bitfit):
    model = bitfit.add(bare(), create=True, targets=["down"])
    assert trainable(model) == {"down.bias"} and model["up"].bias is None
    model = bitfit.add(bare(), create=True, targets=["classifier"])
    assert trainable(model) == {"classifier.bias"}, "asked for by name it gets one"


def test_a_model_without_biases_is_refused_with_the_way_out(bitfit):
    model = bare()
    before = snapshot(model)
    with pytest.raises(ValueError, match="create=True") as error:
        bitfit.add(model)
    assert_one_sentence(error)
    assert_unchanged(model, before)


def test_a_target_without_a_bias_is_refused_by_its_path(bitfit):
    model = net()
    before = snapshot(model)
    for targets in (["proj"], ["q_proj", "proj"], "all-linear"):
        with pytest.raises(ValueError, match="^proj has no bias.*create=True") as error:
            bitfit.add(model, targets=targets)
        assert_one_sentence(error)
        assert_unchanged(model, before)


def test_an_empty_list_of_targets_is_refused(bitfit):
    for settings in ({}, dict(create=True)):
        for nothing in ([], "", ()):
            model = net()
            before = snapshot(model)
            with pytest.raises(ValueError):
                bitfit.add(model, targets=nothing, **settings)
                pytest.fail(f"{nothing!r} was taken for every bias")
            assert_unchanged(model, before)


def test_a_half_wrong_target_list_is_refused(bitfit):
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="no_such_proj") as error:
        bitfit.add(model, create=True, targets=["proj", "no_such_proj"])
    assert "c_attn" in str(error.value), "the message must list what there is"
    assert_unchanged(model, before)


def test_frozen_weights_are_bit_identical_after_training(bitfit):
    for settings in ({}, dict(create=True), dict(targets=["c_attn", "lm_head"])):
        model = bitfit.add(net(), **settings)
        own, before = bitfit.state_dict(model), snapshot(model)[0]
        train(model)
        for name, t in model.state_dict().items():
            moved = not torch.equal(t, before[name])
            assert name in own or not moved, f"{name} is frozen, and yet it moved"
            assert moved or name not in own, f"{name} did not train"


def test_norm_tuning_trains_the_norms_alone(bitfit):
    model = bitfit.add_norms(net())
    assert trainable(model) == {"norm.weight", "norm.bias"}
    assert bitfit.state_dict(model).keys() == {"norm.weight", "norm.bias"}
    before = snapshot(model)[0]
    train(model)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"norm.weight", "norm.bias"}
    mixed = nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4))
    mixed.append(nn.LayerNorm(4, elementwise_affine=False))
    assert len(trainable(bitfit.add_norms(mixed))) == 2 + 1 + 2 + 0


def test_a_norm_is_its_own_parameters_not_what_is_in_it(bitfit):
    class PreNorm(nn.Module):  # a block that is only called so
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)

    model = bitfit.add_norms(nn.Sequential(PreNorm()))
    assert trainable(model) == {"0.norm.weight", "0.norm.bias"}


def test_a_model_without_norms_is_refused(bitfit):
    for model in (nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(2, bias=False)):
        if isinstance(model, nn.LayerNorm):
            model.weight = None
        before = snapshot(model)
        with pytest.raises(ValueError, match="norms") as error:
            bitfit.add_norms(model)
        assert_one_sentence(error)
        assert_unchanged(model, before)


def test_a_shared_bias_is_counted_once(bitfit):
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({k: nn.ModuleDict({"up": shared}) for k in "ab"})
    assert [*bitfit.state_dict(bitfit.add(model))] == ["a.up.bias"]
    two = nn.ModuleDict({k: nn.Linear(3, 3) for k in "ab"})
    two["b"].bias = two["a"].bias
    for settings in ({}, dict(targets=["b"])):
        model = bitfit.add(copy.deepcopy(two), **settings)
        assert [*bitfit.state_dict(model)] == ["a.bias"]
        assert model["b"].bias is model["a"].bias


def test_the_state_dict_goes_round(bitfit):
    for add, settings in (
        (bitfit.add, {}),
        (bitfit.add, dict(create=True)),
        (bitfit.add, dict(targets=["c_attn", "proj"], create=True)),
        (bitfit.add_norms, {}),
    ):
        one, two = train(add(net(), **settings)), add(net(), **settings)
        tensors = {n: t.clone() for n, t in bitfit.state_dict(one).items()}
        bitfit.load_state_dict(two, tensors)
        assert torch.equal(one(IDS), two(IDS)), "something trained was not carried over"
        assert trainable(two) == trainable(one) == tensors.keys()


def test_loading_is_strict(bitfit):
    model = bitfit.add(net(), create=True)
    good = {n: t.clone() + 1 for n, t in bitfit.state_dict(model).items()}
    before = snapshot(model)
    bad = [
        {},
        *({n: t for n, t in good.items() if n != left_out} for left_out in good),
        {**good, "q_proj.weight": model.q_proj.weight.detach()},
        {**good, "proj.bias": good["proj.bias"][:-1]},
        {**good, "proj.bias": good["proj.bias"][None]},
        {**good, "proj.bias": None},
    ]
    for tensors in bad:
        with pytest.raises(ValueError) as error:
            bitfit.load_state_dict(model, tensors)
        assert_one_sentence(error)
        assert_unchanged(model, before)
    bitfit.load_state_dict(model, good)
    assert all(torch.equal(t, good[n]) for n, t in bitfit.state_dict(model).items())


def test_merging_ends_it_and_keeps_the_biases(bitfit):
    model = stir(bitfit.add(net(), create=True), bitfit)
    tuned, biases = model(IDS), bitfit.state_dict(model)
    assert (tuned - net()(IDS)).abs().max() > 1e-3
    model = bitfit.merge(model)
    assert torch.equal(model(IDS), tuned), "the biases stay as they were trained"
    assert not trainable(model), "a merged model is frozen"
    assert model.state_dict().keys() == net().state_dict().keys() | biases.keys()
    for verb in (bitfit.state_dict, bitfit.merge):
        with pytest.raises(ValueError, match="no BitFit"):
            verb(model)
    again = bitfit.add(model)  # the created bias is one of its own now
    assert trainable(again) == BIASES | {"proj.bias"}


def test_adding_twice_is_refused(bitfit):
    for first in (bitfit.add, bitfit.add_norms):
        model = first(net())
        before = snapshot(model)
        for second in (bitfit.add, bitfit.add_norms):
            with pytest.raises(ValueError, match="already") as error:
                second(model)
            assert_one_sentence(error)
            assert_unchanged(model, before)
        bitfit.add(bitfit.merge(model))  # once it is merged, it may come again


def test_a_deepcopy_stands_on_its_own(bitfit):
    model = bitfit.add(net(), create=True)
    before, twin = snapshot(model)[0], copy.deepcopy(model)
    own = bitfit.state_dict(twin, keep_vars=True)
    assert trainable(twin) == trainable(model) == own.keys()
    assert all(twin.get_parameter(n) is p for n, p in own.items())
    bitfit.merge(train(twin))
    assert all(torch.equal(t, before[n]) for n, t in bitfit.state_dict(model).items())


# Bad input: one sentence each, and the model as it was

BAD = {
    "unknown target": dict(targets=["nothing"]),
    "half-wrong list": dict(targets=["q_proj", "nothing"]),
    "a target that is no linear": dict(targets=["embed"]),
    "a norm": dict(targets=["norm"]),
    "part of a name": dict(targets=["_proj"]),
    "an empty name": dict(targets=[""]),
    "a target that is None": dict(targets=[None]),
    "a string": dict(targets="q_proj"),
    "a number": dict(targets=3),
    "False": dict(targets=False),
    "an iterator": dict(targets=iter(["q_proj"])),
    "a target without a bias": dict(targets=["proj"]),
    "one of two without a bias": dict(targets=["proj", "q_proj"]),
    "create on an unknown target": dict(create=True, targets=["nothing"]),
    "create on a norm": dict(create=True, targets=["proj", "norm"]),
    "create on a string": dict(create=True, targets="proj"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(case):
    model = net()
    model.norm.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        reference.add(model, **BAD[case])
    assert_one_sentence(error)
    assert_unchanged(model, before)


@pytest.mark.parametrize("verb", ["state_dict", "load_state_dict", "merge"])
def test_the_verbs_say_so_where_there_is_no_bitfit(verb):
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="no BitFit") as error:
        getattr(reference, verb)(model, *[{}] * (verb == "load_state_dict"))
    assert_one_sentence(error)
    assert_unchanged(model, before)


def test_creating_over_fused_experts_is_refused_by_their_share():
    moe = dict(**SMALL, num_attention_heads=4, num_key_value_heads=2)
    model = MixtralForCausalLM(MixtralConfig(**moe, num_local_experts=4))
    before = snapshot(model)
    with pytest.raises(ValueError, match="% of the weights") as error:
        reference.add(model, create=True)
    assert_one_sentence(error)
    assert_unchanged(model, before)
    reference.add(model, create=True, targets=["q_proj", "v_proj"])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_packed_layer_gets_a_bias_in_float32(kind):
    torch.manual_seed(0)
    if kind == "nf4":
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    else:
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, False, has_fp16_weights=False)
    model, x = nn.Sequential(layer).to("cpu"), torch.randn(3, 64)
    plain = model(x)
    reference.add(model, create=True)
    assert torch.equal(model(x), plain) and layer.bias.dtype == torch.float32
    model(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((64,), 3.0))


# Which biases: the paper's counts, and real models


@pytest.mark.parametrize(
    "width, layers, heads, count, base",
    [
        (768, 12, 12, 102_912, 109_482_240),
        (1024, 24, 16, 272_384, 335_141_888),
    ],
)
def test_bert_trains_as_many_biases_as_it_has(width, layers, heads, count, base):
    sizes = dict(hidden_size=width, intermediate_size=4 * width)
    config = BertConfig(**sizes, num_hidden_layers=layers, num_attention_heads=heads)
    with torch.device("meta"):
        model = reference.add(BertModel(config))
    assert sum(p.numel() for p in model.parameters()) == base
    assert sum(t.numel() for t in reference.state_dict(model).values()) == count
    assert 0.0008 < count / base < 0.00095  # the paper: 0.09% and 0.08%


def test_bert_base_has_46_080_biases_in_queries_and_intermediate_layers():
    with torch.device("meta"):
        model = BertModel(BertConfig())
        reference.add(model, targets=["query", "intermediate.dense"])
    assert sum(t.numel() for t in reference.state_dict(model).values()) == 46_080


def has_biases(name):
    return name not in ("tiny-decoder", "t5")


FAMILIES = {**MODELS, "t5": t5}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_keeps_its_outputs_and_then_learns(name):
    model = FAMILIES[name]()
    if not has_biases(name):
        with pytest.raises(ValueError, match="create=True"):
            reference.add(model)
    with torch.no_grad():
        plain = outputs(model)
        reference.add(model, create=True)
        assert torch.equal(outputs(model), plain)
        heads = {"lm_head", "classifier"}
        own = reference.state_dict(model)
        created = {n for n in own if n not in dict(FAMILIES[name]().named_parameters())}
        assert bool(created) == (name in ("tiny-decoder", "llama", "t5"))
        assert not heads & {n.split(".")[0] for n in created}
        stir(model, reference)
        assert (outputs(model) - plain).abs().max() > 1e-3


# The oracle: peft's LNTuning. It has no BitFit

NORMS = {
    "tiny-decoder": ["input_layernorm", "post_attention_layernorm", "norm"],
    "bert": ["LayerNorm"],
    "bert-model": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "t5": ["layer_norm", "final_layer_norm"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_norm_tuning_gives_the_numbers_of_pefts(name):
    model = FAMILIES[name]()
    twin = get_peft_model(
        copy.deepcopy(model), LNTuningConfig(target_modules=NORMS[name])
    ).eval()
    theirs = {
        n.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): p
        for n, p in twin.named_parameters()
        if p.requires_grad
    }
    ours = reference.state_dict(reference.add_norms(model), keep_vars=True)
    assert_same_training(model, ours, twin, theirs)
    assert_same_merged(reference.merge(model), twin.merge_and_unload())


@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_a_bias_step_is_that_of_full_fine_tuning(build):
    model, full = reference.add(build()), build()
    ours = reference.state_dict(model, keep_vars=True)
    theirs = {n: p for n, p in full.named_parameters() if n in ours}
    assert_same_training(model, ours, full, theirs)


# bitfit.py copied alone, for tests/test_standalone.py

ALONE = """
import bitfit
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2))
x = torch.randn(5, 6)
plain = model(x)
bitfit.add(model, create=True)
assert torch.equal(model(x), plain)
model(x).pow(2).sum().backward()
own = bitfit.state_dict(model, keep_vars=True)
assert [*own] == ["0.bias", "1.bias", "2.bias"]
for p in own.values():
    p.data -= 0.1 * p.grad
tuned = model(x)
assert not torch.allclose(tuned, plain)
bitfit.load_state_dict(model, bitfit.state_dict(model))
assert torch.equal(bitfit.merge(model)(x), tuned)
assert [*bitfit.state_dict(bitfit.add_norms(model))] == ["1.weight", "1.bias"]
"""

# Broken copies, for tests/test_mutations.py

ZEROS = "torch.zeros(m.out_features, dtype=dtype, device=m.weight.device)"
CHOSEN = "[m.bias for m in linears] if named else _biases(model)"
TRAIN = "{id(p.requires_grad_(True)) for p in chosen}"
FREEZE = "model.requires_grad_(False)\n    ids"
NORM = '"Norm" in type(m).__name__'
EVERY = test_every_bias_trains_and_nothing_else
START = test_adding_bitfit_changes_no_output_and_no_layer
GRADIENT = test_the_gradients_are_those_of_full_fine_tuning
CREATED = test_created_biases_are_zero_and_change_no_output
TARGETS = test_targets_train_only_their_biases
FROZEN = test_frozen_weights_are_bit_identical_after_training
TUNED = test_norm_tuning_trains_the_norms_alone
ROUND = test_the_state_dict_goes_round
STRICT = test_loading_is_strict
ENDED = test_merging_ends_it_and_keeps_the_biases

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "the base is not frozen": (EVERY, {FREEZE: "ids"}),
    "the base trains along": (FROZEN, {FREEZE: "ids"}),
    "the biases are frozen too": (EVERY, {"(True)) for p": "(False)) for p"}),
    "the norms' biases are left out": (
        EVERY,
        {'name.endswith("bias")': 'name.endswith("bias") and "norm" not in name'},
    ),
    "the head's bias is left out": (
        EVERY,
        {'name.endswith("bias")': 'name.endswith("bias") and "head" not in name'},
    ),
    "weights train, not biases": (EVERY, {'endswith("bias")': 'endswith("weight")'}),
    "the state dict gives copies": (
        EVERY,
        {
            "return own if keep_vars": "return {n: nn.Parameter(p) for n, p in "
            "own.items()} if keep_vars"
        },
    ),
    "the biases start anew": (START, {TRAIN: "{id(p.zero_()) for p in chosen}"}),
    "the biases start at zero": (
        START,
        {TRAIN: TRAIN.replace("p.requires", "nn.init.zeros_(p).requires")},
    ),
    "gradients are halved": (
        GRADIENT,
        {FREEZE: "[p.register_hook(lambda g: g / 2) for p in chosen]\n    " + FREEZE},
    ),
    "created biases are random": (CREATED, {"torch.zeros(m.out": "torch.randn(m.out"}),
    "created biases are in float32": (
        CREATED,
        {"m.weight.dtype if m.weight.is_floating_point() else torch.float32": "None"},
    ),
    "created biases are of the input's width": (
        CREATED,
        {"m.out_features, dtype": "m.in_features, dtype"},
    ),
    "norms get a created bias too": (
        CREATED,
        {
            "    for m in bare:": "    for m in model.modules():\n"
            "        if isinstance(m, nn.LayerNorm) and m.bias is None:\n"
            "            m.bias = nn.Parameter(torch.zeros_like(m.weight))\n"
            "    for m in bare:"
        },
    ),
    "created biases do not train": (
        test_created_biases_train,
        {CHOSEN: f"[b for b in ({CHOSEN}) if b.any()]"},
    ),
    "only created biases train": (
        test_created_biases_train,
        {
            CHOSEN: CHOSEN.replace(
                "_biases", "create and [m.bias for m in bare] or _biases"
            )
        },
    ),
    "the head gets a created bias": (
        test_the_output_head_gets_no_created_bias,
        {"if m is not head}": "}"},
    ),
    "a classifier gets a created bias": (
        test_the_output_head_gets_no_created_bias,
        {'{"classifier", "score", ': '{"score", '},
    ),
    "targets are ignored": (TARGETS, {CHOSEN: "_biases(model)"}),
    "a target's weight trains too": (
        TARGETS,
        {CHOSEN: "[p for m in linears for p in m.parameters()] if named else []"},
    ),
    "created biases go everywhere": (
        test_created_biases_go_only_on_the_targets,
        {"targets if named else": '"all-linear" if create else'},
    ),
    "no bias, and nothing said": (
        test_a_model_without_biases_is_refused_with_the_way_out,
        {"if not linears and not _biases(model):": "if False:"},
    ),
    "a target without a bias is passed over": (
        test_a_target_without_a_bias_is_refused_by_its_path,
        {
            "if bare and not create:": "if False:",
            "[m.bias for m in linears]": "[m.bias for m in linears if m not in bare]",
        },
    ),
    "a target without a bias gets one unasked": (
        test_a_target_without_a_bias_is_refused_by_its_path,
        {"if bare and not create:": "if False:"},
    ),
    "an empty list means all": (
        test_an_empty_list_of_targets_is_refused,
        {"named, linears = targets is not None": "named, linears = bool(targets)"},
    ),
    "a half-wrong target list is accepted": (
        test_a_half_wrong_target_list_is_refused,
        {
            "if lost := [": "if len(targets) == len(lost := [",
            "for p in linears)]:": ("for p in linears)]):"),
        },
    ),
    "norm tuning trains the weights alone": (
        TUNED,
        {"for p in m.parameters(recurse=False)": "for p in [m.weight]"},
    ),
    "only LayerNorm is a norm": (TUNED, {NORM: 'type(m).__name__ == "LayerNorm"'}),
    "norm tuning trains the biases too": (
        TUNED,
        {
            "return _train(model, chosen)": "return _train(model, "
            "chosen + _biases(model))"
        },
    ),
    "norm tuning trains what is in a block": (
        test_a_norm_is_its_own_parameters_not_what_is_in_it,
        {"m.parameters(recurse=False)": "m.parameters()"},
    ),
    "no norm, and nothing said": (
        test_a_model_without_norms_is_refused,
        {"if not chosen:": "if False:"},
    ),
    "a shared bias is listed twice": (
        test_a_shared_bias_is_counted_once,
        {
            "in model.named_parameters() if id": "in "
            "model.named_parameters(remove_duplicate=False) if id"
        },
    ),
    "the state dict leaves one out": (ROUND, {"in names}": "in names[:-1]}"}),
    "the state dict holds biases alone": (
        ROUND,
        {"for name in names}": 'for name in names if name.endswith("bias")}'},
    ),
    "loading does nothing": (ROUND, {"t.copy_(tensors[name])": "pass"}),
    "loading is not strict": (
        STRICT,
        {
            "if got != want or name not in own:": "if name in tensors and name in own"
            " and got != want:",
            "t.copy_(tensors[name])": "t.copy_(tensors.get(name, t))",
        },
    ),
    "loading lets the unexpected pass": (
        STRICT,
        {"own.keys() | tensors.keys()": "own.keys()"},
    ),
    "merging does not end it": (ENDED, {"    del model.bitfit\n": ""}),
    "merging leaves the biases to train": (
        ENDED,
        {"del model.bitfit\n    return model.requires_grad_(False)": "return model"},
    ),
    "merging takes created biases away": (
        ENDED,
        {
            "del model.bitfit": "for m in model.modules():\n"
            '        if getattr(m, "in_features", 0) and m.out_features == 12:\n'
            "            m.bias = None\n    del model.bitfit"
        },
    ),
    "BitFit goes on BitFit": (
        test_adding_twice_is_refused,
        {'if hasattr(model, "bitfit"):': "if False:"},
    ),
    "a copy gives the first model's tensors": (
        test_a_deepcopy_stands_on_its_own,
        {
            "    model.bitfit = tuple(": "    globals()['first'] = model\n"
            "    model.bitfit = tuple(",
            "model.get_parameter(name)": "first.get_parameter(name)",
        },
    ),
}
