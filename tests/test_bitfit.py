"""BitFit's laws, which biases they are, and norm tuning with the same numbers as peft.

A law that takes only `bitfit`, the module, is run again by tests/test_mutations.py on
broken copies of bitfit.py. Messages name the mistake that gives the symptom.
"""

import copy
import warnings

import bitsandbytes
import pytest
import torch
import transformers as tf
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
from torch.nn.utils import prune

from peftlab import bitfit as reference
from peftlab import int8, lora, multi_lora, nf4

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


def refused(model, words, call, *args, **settings):
    """The call raises one sentence with these words, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=words) as error:
        call(model, *args, **settings)
    assert_one_sentence(error)
    assert_unchanged(model, before)


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
    refused(bare(), "create=True", bitfit.add)


def test_a_target_without_a_bias_is_refused_by_its_path(bitfit):
    for targets in (["proj"], ["q_proj", "proj"], "all-linear"):
        words = "^proj has no bias.*create=True"
        refused(net(), words, bitfit.add, targets=targets)


class Deaf(nn.Linear):
    """A linear layer with a forward of its own, which forgets the bias."""

    def forward(self, x):
        return x @ self.weight.T


class Reader(nn.Module):
    """A parent that reads the weight of `read` and calls the other two."""

    def __init__(self):
        super().__init__()
        for name in ("read", "called", "asked"):
            setattr(self, name, nn.Linear(4, 4, bias=False))

    def forward(self, x):
        x = self.asked(self.called(x.to(self.asked.weight.dtype)))
        return torch.tanh(x) @ self.read.weight


def test_a_created_bias_that_nobody_reads_is_refused_or_left_out(bitfit):
    def with_deaf():
        called = nn.Linear(4, 4, bias=False)
        return nn.ModuleDict({"deaf": Deaf(4, 4, False), "called": called})

    def with_reader():
        return nn.ModuleDict({"b": Reader()})

    for build, idle, rest in (
        (with_deaf, "deaf", "called"),
        (with_reader, "read", "b.called"),
    ):
        words = f"{idle} would not add"
        named = dict(create=True, targets=["called", idle])
        refused(build(), words, bitfit.add, **named)
        for targets in (None, "all-linear"):
            model = build()
            with pytest.warns(UserWarning, match=f"{idle} would not add"):
                bitfit.add(model, create=True, targets=targets)
            names = trainable(model)
            assert f"{rest}.bias" in names and not any(idle in n for n in names)
            assert ("b" not in model) or "b.asked.bias" in names, "it asks for a dtype"


def test_a_bias_that_is_computed_is_refused_or_left_out(bitfit):
    def pruned(model):
        prune.random_unstructured(model.q_proj, "bias", 0.5)

    def parametrized(model):
        nn.utils.parametrize.register_parametrization(model.q_proj, "bias", nn.Tanh())

    def build(compute):
        model = net()
        compute(model)
        return model

    words = "q_proj.bias is computed"
    for compute in (pruned, parametrized):
        targets = ["q_proj", "c_attn"]
        refused(build(compute), words, bitfit.add, targets=targets)
        for settings in ({}, dict(create=True)):
            with pytest.warns(UserWarning, match=words):
                model = bitfit.add(build(compute), **settings)
            assert not any("q_proj" in name for name in trainable(model))


def test_an_empty_list_of_targets_is_refused(bitfit):
    for settings in ({}, dict(create=True)):
        for nothing in ([], "", ()):
            refused(net(), "targets", bitfit.add, targets=nothing, **settings)


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

    class NormedLinear(nn.Linear):  # a linear that is only called so
        pass

    class L2Norm(nn.Module):  # one without a weight
        pass

    model = nn.Sequential(PreNorm(), NormedLinear(4, 4), L2Norm())
    assert trainable(bitfit.add_norms(model)) == {"0.norm.weight", "0.norm.bias"}


def test_a_model_without_norms_is_refused(bitfit):
    bare_norm = nn.LayerNorm(2, elementwise_affine=False)
    for model in (nn.Sequential(nn.Linear(2, 2)), bare_norm):
        refused(model, "norms", bitfit.add_norms)


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
    bad = [
        {},
        *({n: t for n, t in good.items() if n != left_out} for left_out in good),
        {**good, "q_proj.weight": model.q_proj.weight.detach()},
        {**good, "proj.bias": good["proj.bias"][:-1]},
        {**good, "proj.bias": good["proj.bias"][None]},
        {**good, "proj.bias": None},
    ]
    for tensors in bad:
        refused(model, "", bitfit.load_state_dict, tensors)
    bitfit.load_state_dict(model, good)
    assert all(torch.equal(t, good[n]) for n, t in bitfit.state_dict(model).items())


def test_merging_ends_it_and_leaves_the_biases(bitfit):
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
        for second in (bitfit.add, bitfit.add_norms):
            refused(model, "already", second)
        bitfit.add(bitfit.merge(model))  # once it is merged, it may come again


def test_a_deepcopy_stands_on_its_own(bitfit):
    model = bitfit.add(net(), create=True)
    before, twin = snapshot(model)[0], copy.deepcopy(model)
    own = bitfit.state_dict(twin, keep_vars=True)
    assert trainable(twin) == trainable(model) == own.keys()
    assert all(twin.get_parameter(n) is p for n, p in own.items())
    bitfit.merge(train(twin))
    assert all(torch.equal(t, before[n]) for n, t in bitfit.state_dict(model).items())


def test_a_layer_that_has_left_is_noticed(bitfit):
    model = bitfit.add(net(), create=True)
    tensors = bitfit.state_dict(model)
    model.proj = nn.Linear(12, 12, bias=False).double()
    refused(model, "proj.bias.*has left", bitfit.state_dict)
    refused(model, "proj.bias.*has left", bitfit.load_state_dict, tensors)
    assert not trainable(bitfit.merge(model)), "it can be ended all the same"


# Bad input: one sentence each, and the model as it was

TARGETS = [["nothing"], ["q_proj", "nothing"], ["embed"], ["norm"], ["_proj"], [""]]
TARGETS += [[None], "q_proj", 3, False, iter(["q_proj"]), ["proj"], ["proj", "q_proj"]]
BAD = [dict(targets=targets) for targets in TARGETS]
BAD += [dict(create=True, targets=t) for t in (["nothing"], ["proj", "norm"], "proj")]
BAD += [dict(create=create) for create in (None, 1, 10**400)]


@pytest.mark.parametrize("settings", BAD, ids=lambda settings: f"{settings!r:.40}")
def test_bad_input_gets_one_sentence_and_changes_nothing(settings):
    model = net()
    model.norm.requires_grad_(False)
    refused(model, "", reference.add, **settings)


@pytest.mark.parametrize("function", ["state_dict", "load_state_dict", "merge"])
def test_the_functions_say_so_where_there_is_no_bitfit(function):
    call, more = getattr(reference, function), [{}] * (function == "load_state_dict")
    refused(net(), "no BitFit", call, *more)
    wrapped = nn.DataParallel(reference.add(net()))
    refused(wrapped, "wrapped by", call, *more)
    with pytest.raises(ValueError, match="nn.Module"):
        call(None, *more)


@pytest.mark.parametrize("add", [reference.add, reference.add_norms])
def test_what_is_no_plain_model_is_refused(add):
    held = multi_lora.switch(multi_lora.add(net(), "fi", ["proj"]), None)
    for model in (lora.add(net(), ["proj"]), held):
        refused(model, "carries", add)
    refused(nn.DataParallel(net()), "wrapped by", add)
    with pytest.raises(ValueError, match="nn.Module"):
        add(None)


def test_a_compiled_model_has_plain_names():
    model = torch.compile(net(), backend="eager")
    for add in (reference.add, reference.add_norms):
        tensors = reference.state_dict(add(net()))
        assert reference.state_dict(add(model)).keys() == tensors.keys()
        reference.load_state_dict(model, tensors)
        assert torch.equal(reference.merge(model)(IDS), net()(IDS))


def test_real_layers_that_read_no_bias_get_none():
    sizes = dict(vocab_size=40, hidden_size=32, num_hidden_layers=1)
    mamba = tf.MambaForCausalLM(tf.MambaConfig(**sizes, state_size=4))
    with pytest.warns(UserWarning, match="x_proj would not add"):  # a GPU's kernel
        reference.add(mamba, create=True)
    more = dict(intermediate_size=32, num_attention_heads=4, embedding_size=16)
    config = tf.MobileBertConfig(**sizes, **more, intra_bottleneck_size=16)
    with pytest.warns(UserWarning, match="cls.predictions.dense would not add"):
        reference.add(tf.MobileBertForMaskedLM(config), create=True)
    for model, name in ((mamba, "mixer.out_proj.bias"), (t5(), "wo.bias")):
        if model is not mamba:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                reference.add(model, create=True)
        assert any(n.endswith(name) for n in trainable(model))


@pytest.mark.parametrize("first", [True, False])
def test_the_biases_of_attention_are_read(first):
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0, norm_first=first, bias=False)
    model, x = reference.add(seeded(layer), create=True), torch.randn(3, 2, 8)
    names = {"self_attn.out_proj.bias", "linear1.bias", "linear2.bias"}
    assert trainable(model) == names
    model(x).sin().sum().backward()
    assert all(model.get_parameter(n).grad.any() for n in names)
    stir(model, reference)
    with torch.no_grad():  # its fast path
        quick = model(x)
    torch.testing.assert_close(quick, model(x))


def test_creating_over_fused_experts_is_refused_by_their_share():
    moe = dict(**SMALL, num_attention_heads=4, num_key_value_heads=2)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**moe, num_local_experts=4))
    refused(model, "% of the weights", reference.add, create=True)
    reference.add(model, create=True, targets=["q_proj", "v_proj"])


PLAIN = dict(in_features=64, out_features=64, bias=False)
PACKED = {
    "bnb-nf4": lambda: bitsandbytes.nn.Linear4bit(64, 64, False, quant_type="nf4"),
    "bnb-int8": lambda: bitsandbytes.nn.Linear8bitLt(64, 64, False, False),
    "nf4": lambda: nf4.NF4Linear(nn.Linear(**PLAIN)),
    "int8": lambda: int8.Int8Linear(nn.Linear(**PLAIN)),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_packed_layer_gets_a_bias_in_float32(kind):
    torch.manual_seed(0)
    layer = PACKED[kind]()
    model, x = nn.Sequential(layer).to("cpu"), torch.randn(3, 64)
    plain = model(x)
    reference.add(model, create=True)
    assert torch.equal(model(x), plain) and layer.bias.dtype == torch.float32
    assert reference.state_dict(model).keys() == {"0.bias"}
    model(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((64,), 3.0))


# Real models (test_counting.py has the paper's counts)


FAMILIES = {**MODELS, "t5": t5}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_keeps_its_outputs_and_then_learns(name):
    model = FAMILIES[name]()
    if name in ("tiny-decoder", "t5"):  # they have no biases
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

ZEROS = "torch.zeros(_shape(layer)[0], dtype=dtype, device=W.device)"
DTYPE = "torch.float32 if _is_packed(W) else W.dtype"
CHOSEN = "_biases(plain) if targets is None else [m.bias for m in linears]"
TRAIN = "{id(p.requires_grad_(True)) for p in chosen}"
FREEZE = "model.requires_grad_(False)\n    ids"
NORM = '"Norm" in type(m).__name__'
ENDS = 'if name.endswith("bias")'
NONE = "    if not linears and (targets is not None or not _biases(plain)):\n"
BARE = "    if bare and not create:\n"
CREATE = "    for m in bare:\n"
TENSORS = "tensors = {name: parameters[name] for name in names}"
LOAD = "_load(state_dict(model), tensors)"
OWN = "for p in m.parameters(recurse=False)"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_every_bias_trains_and_nothing_else: {
        "the base is not frozen": {FREEZE: "ids"},
        "the biases are frozen too": {TRAIN: TRAIN.replace("True", "False")},
        "the norms' biases are left out": {ENDS: f'{ENDS} and "norm" not in name'},
        "the head's bias is left out": {ENDS: f'{ENDS} and "head" not in name'},
        "weights train, not biases": {ENDS: ENDS.replace("bias", "weight")},
        "the state dict gives copies": {
            "return tensors if keep_vars": "return {n: nn.Parameter(p) for n, p in "
            "tensors.items()} if keep_vars"
        },
    },
    test_frozen_weights_are_bit_identical_after_training: {
        "the base trains along": {FREEZE: "ids"},
    },
    test_adding_bitfit_changes_no_output_and_no_layer: {
        "the biases start anew": {TRAIN: "{id(p.zero_()) for p in chosen}"},
        "the biases start at zero": {
            TRAIN: TRAIN.replace("p.requires", "nn.init.zeros_(p).requires")
        },
    },
    test_the_gradients_are_those_of_full_fine_tuning: {
        "gradients are halved": {
            FREEZE: f"[p.register_hook(lambda g: g / 2) for p in chosen]\n    {FREEZE}"
        },
    },
    test_created_biases_are_zero_and_change_no_output: {
        "created biases are random": {ZEROS: ZEROS.replace("zeros", "randn")},
        "created biases are in float32": {DTYPE: "None"},
        "created biases are of the input's width": {
            "_shape(layer)[0]": "_shape(layer)[1]"
        },
        "norms get a created bias too": {
            CREATE: "    for m in model.modules():\n"
            "        if isinstance(m, nn.LayerNorm) and m.bias is None:\n"
            f"            m.bias = nn.Parameter(torch.zeros_like(m.weight))\n{CREATE}"
        },
    },
    test_created_biases_train: {
        "created biases do not train": {CHOSEN: f"[b for b in ({CHOSEN}) if b.any()]"},
        "only created biases train": {
            CHOSEN: f"create and [m.bias for m in bare] or {CHOSEN}"
        },
    },
    test_the_output_head_gets_no_created_bias: {
        "the head gets a created bias": {"layer is head or ": ""},
        "a classifier gets a created bias": {'{"classifier", "score", ': '{"score", '},
    },
    test_targets_train_only_their_biases: {
        "targets are ignored": {CHOSEN: "_biases(plain)"},
        "a target's weight trains too": {
            CHOSEN: "[p for m in linears for p in m.parameters()]"
        },
    },
    test_created_biases_go_only_on_the_targets: {
        "created biases go everywhere": {
            '"all-linear" if targets is None else targets': '"all-linear"'
        },
    },
    test_a_model_without_biases_is_refused_with_the_way_out: {
        "no bias, and nothing said": {NONE: "    if False:\n"},
    },
    test_a_target_without_a_bias_is_refused_by_its_path: {
        "a target without a bias is passed over": {
            BARE: "    linears = [m for m in linears if create or m not in bare]\n"
            "    bare = bare if create else []\n    if False:\n"
        },
        "a target without a bias gets one unasked": {BARE: "    if False:\n"},
    },
    test_a_created_bias_that_nobody_reads_is_refused_or_left_out: {
        "a layer that adds no bias gets one": {"not (_adds(m) and": "not (True and"},
        "a layer that is not called gets one": {"_reads(type(parent), name))": "True)"},
        "asking for a dtype counts as reading": {
            r"(?!\.dtype|\.device": r"(?!\.device"
        },
        "a layer that is left out is told nobody": {
            "warnings.warn(": "str(",
            ", stacklevel=3)": ")",
        },
    },
    test_a_bias_that_is_computed_is_refused_or_left_out: {
        "a computed bias is taken": {"and not plain:": "and False:"},
        "by name it is left out": {"        if refuse:": "        if False:"},
    },
    test_an_empty_list_of_targets_is_refused: {
        "an empty list means all": {
            "    linears = []\n": "    targets = targets or None\n    linears = []\n"
        },
    },
    test_norm_tuning_trains_the_norms_alone: {
        "norm tuning trains the weights alone": {OWN: "for p in [m.weight]"},
        "only LayerNorm is a norm": {NORM: 'type(m).__name__ == "LayerNorm"'},
        "norm tuning trains the biases too": {
            OWN + "]": OWN + "] + _biases(plain)",
        },
    },
    test_a_norm_is_its_own_parameters_not_what_is_in_it: {
        "norm tuning trains what is in a block": {"(recurse=False)": "()"},
        "a linear is a norm": {"if _shape(m) is None]": "]"},
    },
    test_a_model_without_norms_is_refused: {
        "no norm, and nothing said": {"    if not chosen:": "    if False:"},
    },
    test_a_shared_bias_is_counted_once: {
        "a shared bias is listed twice": {
            "in model.named_parameters() if id": "in "
            "model.named_parameters(remove_duplicate=False) if id"
        },
    },
    test_the_state_dict_goes_round: {
        "the state dict leaves one out": {
            TENSORS: TENSORS.replace("names}", "names[1:]}")
        },
        "the state dict holds biases alone": {
            TENSORS: TENSORS.replace("names}", f"names {ENDS}}}")
        },
        "loading does nothing": {LOAD: "pass"},
    },
    test_loading_is_strict: {
        "loading is not strict": {
            LOAD: "[t.copy_(tensors.get(n, t)) for n, t in state_dict(model).items()]"
        },
        "loading lets the unexpected pass": {
            LOAD: "own = state_dict(model)\n"
            "    _load(own, {n: t for n, t in tensors.items() if n in own})"
        },
    },
    test_merging_ends_it_and_leaves_the_biases: {
        "merging does not end it": {"    del plain.bitfit\n": ""},
        "merging leaves the biases to train": {
            "bitfit\n    return model.requires_grad_(False)": "bitfit\n    return model"
        },
        "merging takes created biases away": {
            "del plain.bitfit": "for m in model.modules():\n"
            '        if getattr(m, "in_features", 0) and m.out_features == 12:\n'
            "            m.bias = None\n    del plain.bitfit"
        },
    },
    test_adding_twice_is_refused: {
        "BitFit goes on BitFit": {'    if hasattr(model, "bitfit"):': "    if False:"},
    },
    test_a_layer_that_has_left_is_noticed: {
        "what is gone is passed over": {
            TENSORS: TENSORS.replace("names}", "names if name in parameters}"),
            "        if name not in parameters:": "        if False:",
        },
    },
    test_a_deepcopy_stands_on_its_own: {
        "a copy gives the first model's tensors": {
            "    model.bitfit = tuple(": "    globals()['first'] = model\n"
            "    model.bitfit = tuple(",
            "dict(model.named_parameters(r": "dict(first.named_parameters(r",
        },
    },
}
MUTATIONS = {
    what: (law, changes)
    for law, cases in BROKEN.items()
    for what, changes in cases.items()
}
