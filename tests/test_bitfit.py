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
    assert_same_merged,
    assert_same_training,
    by_fault,
    jiggle,
    net,
    outputs,
    refused,
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
LINEAR = BIASES - {"norm.bias", "lm_head.bias"} | {"proj.bias"}


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


CHOICES = (  # settings, and what they train
    ({}, BIASES),
    (dict(create=True), BIASES | {"proj.bias"}),
    (dict(targets=["q_proj"]), {"q_proj.bias"}),
    (dict(targets=("q_proj", "lm_head")), {"q_proj.bias", "lm_head.bias"}),
    (dict(create=True, targets="all-linear"), LINEAR),
)


def test_the_chosen_biases_train_and_no_output_changes(bitfit):
    for settings, wanted in CHOICES:
        model = bitfit.add(net(), **settings)
        assert torch.equal(model(IDS), net()(IDS)), "outputs moved at step 0"
        kinds = [type(m) for m in model.modules()]
        assert kinds == [type(m) for m in net().modules()], "no layer is wrapped"
        own = bitfit.state_dict(model, keep_vars=True)
        assert trainable(model) == own.keys() == wanted, settings
        assert all(model.get_parameter(n) is p for n, p in own.items())


def test_the_gradients_are_those_of_full_fine_tuning(bitfit):
    full, model = net(), bitfit.add(net())
    for m in (full, model):
        m(IDS).pow(2).mean().backward()
    for name, p in bitfit.state_dict(model, keep_vars=True).items():
        assert p.grad is not None, f"{name} gets no gradient"
        torch.testing.assert_close(p.grad, full.get_parameter(name).grad)


def test_created_biases_are_zero_and_train(bitfit):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.bfloat16):
        model = bitfit.add(bare().to(dtype), create=True)
        own = bitfit.state_dict(model, keep_vars=True)
        assert own.keys() == {"up.bias", "down.bias"} == trainable(model)
        assert [len(t) for t in own.values()] == [8, 6]
        assert not any(t.any() for t in own.values()), "created biases start at zero"
        assert {t.dtype for t in own.values()} == {dtype}, "as precise as the weights"
        y = run(model, x.to(dtype))
        assert torch.equal(y, run(bare().to(dtype), x.to(dtype))), "outputs moved"
        y.pow(2).sum().backward()
        assert all(p.grad.any() for p in own.values())


def test_the_output_head_gets_a_created_bias_only_by_name(bitfit):
    for head in ("classifier", "score"):
        assert bitfit.add(bare(head), create=True)[head].bias is None
    model = net()
    model.lm_head = nn.Linear(12, 11, bias=False).double()
    bitfit.add(model, create=True)
    assert trainable(model) == (BIASES | {"proj.bias"}) - {"lm_head.bias"}
    for target in ("down", "classifier"):
        model = bitfit.add(bare(), create=True, targets=[target])
        assert trainable(model) == {f"{target}.bias"} and model["up"].bias is None


def test_what_leaves_nothing_to_train_is_refused_with_the_way_out(bitfit):
    refused(bare(), "create=True", bitfit.add)
    for targets in (["q_proj", "proj"], "all-linear"):  # by the path of the bare one
        refused(net(), "^proj has no bias.*create=True", bitfit.add, targets=targets)
    for settings in (dict(create=False), dict(create=True)):
        refused(net(), "targets", bitfit.add, targets=[], **settings)
    bare_norm = nn.LayerNorm(2, elementwise_affine=False)
    refused(nn.Sequential(nn.Linear(2, 2), bare_norm), "norms", bitfit.add_norms)


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
    called = nn.Linear(4, 4, bias=False)
    deaf = nn.ModuleDict({"deaf": Deaf(4, 4, False), "called": called})
    for start, idle, rest in (
        (deaf, "deaf", {"called.bias"}),
        # `asked` is asked for its dtype alone
        (nn.ModuleDict({"b": Reader()}), "read", {"b.called.bias", "b.asked.bias"}),
    ):
        words, add = f"{idle} would not add", bitfit.add
        refused(copy.deepcopy(start), words, add, True, targets=["called", idle])
        for targets in (None, "all-linear"):
            with pytest.warns(UserWarning, match=words):
                model = add(copy.deepcopy(start), create=True, targets=targets)
            assert trainable(model) == rest


def test_a_bias_that_is_computed_is_refused_or_left_out(bitfit):
    pruned, parametrized, words = net(), net(), "q_proj.bias is computed"
    prune.random_unstructured(pruned.q_proj, "bias", 0.5)
    layer = parametrized.q_proj
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    for model in (pruned, parametrized):
        refused(model, words, bitfit.add, targets=["q_proj", "c_attn"])
        for settings in ({}, dict(create=True)):
            with pytest.warns(UserWarning, match=words):
                bitfit.add(model, **settings)
            assert not any("q_proj" in name for name in trainable(model))
            bitfit.merge(model)


def test_norm_tuning_trains_the_norms_own_parameters(bitfit):
    assert trainable(bitfit.add_norms(net())) == {"norm.weight", "norm.bias"}

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
    mixed = nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4))
    mixed.append(nn.LayerNorm(4, elementwise_affine=False))
    assert len(trainable(bitfit.add_norms(mixed))) == 2 + 1 + 2 + 0


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


def test_all_that_trains_moves_and_is_carried_over(bitfit):
    cases = [(bitfit.add, settings, names) for settings, names in CHOICES]
    cases.append((bitfit.add_norms, {}, {"norm.weight", "norm.bias"}))
    for add, settings, names in cases:
        model, other = add(net(), **settings), add(net(), **settings)
        before = snapshot(train(other))[0]
        for name, t in net().state_dict().items():
            moved = not torch.equal(t, before[name])
            assert moved is (name in names), f"{name} moved, or did not train"
        tensors = {n: t.clone() for n, t in bitfit.state_dict(other).items()}
        bitfit.load_state_dict(model, tensors)
        assert torch.equal(model(IDS), other(IDS)), "something was not carried over"
        assert trainable(model) == trainable(other) == tensors.keys() == names


def test_loading_is_strict(bitfit):
    model = bitfit.add(net(), create=True)
    good = {n: t.clone() + 1 for n, t in bitfit.state_dict(model).items()}
    rest = {n: t for n, t in good.items() if n != "proj.bias"}
    more = {**good, "q_proj.weight": model.q_proj.weight.detach()}
    for tensors in (rest, more, {**good, "proj.bias": good["proj.bias"][:-1]}):
        refused(model, "", bitfit.load_state_dict, tensors)


def test_merging_ends_it_and_leaves_the_biases(bitfit):
    model = stir(bitfit.add(net(), create=True), bitfit)
    tuned, biases = model(IDS), bitfit.state_dict(model)
    assert (tuned - net()(IDS)).abs().max() > 1e-3
    for add in (bitfit.add, bitfit.add_norms):
        refused(model, "already", add)
    model = bitfit.merge(model)
    assert torch.equal(model(IDS), tuned), "the biases stay as they were trained"
    assert not trainable(model), "a merged model is frozen"
    assert model.state_dict().keys() == net().state_dict().keys() | biases.keys()
    for function in (bitfit.state_dict, bitfit.merge):
        refused(model, "no BitFit", function)
    again = bitfit.add(model)  # the created bias is one of its own now
    assert trainable(again) == BIASES | {"proj.bias"}


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

TARGETS = [["q_proj", "nothing"], ["norm"], [None], "q_proj", 3, False, ["proj"]]
BAD = [dict(targets=targets) for targets in TARGETS]
BAD += [dict(create=True, targets=t) for t in (["proj", "norm"], "proj")]
BAD += [dict(create=create) for create in (None, 1)]


def test_what_it_cannot_be_added_to_is_refused():
    model = net()
    model.norm.requires_grad_(False)
    for settings in BAD:
        refused(model, "", reference.add, **settings)
    held = multi_lora.switch(multi_lora.add(net(), "fi", ["proj"]), None)
    for words, model in (
        ("carries", lora.add(net(), ["proj"])),
        ("carries", held),
        ("wrapped by", nn.DataParallel(net())),
        ("nn.Module", None),
    ):
        for add in (reference.add, reference.add_norms):
            refused(model, words, add)


def test_the_functions_say_so_where_there_is_no_bitfit():
    wrapped = nn.DataParallel(reference.add(net()))
    for call, *more in (
        (reference.state_dict,),
        (reference.load_state_dict, {}),
        (reference.merge,),
    ):
        refused(net(), "no BitFit", call, *more)
        refused(wrapped, "wrapped by", call, *more)
        refused(None, "nn.Module", call, *more)


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
    assert any(n.endswith("mixer.out_proj.bias") for n in trainable(mamba))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = reference.add(t5(), create=True)
    assert any(n.endswith("wo.bias") for n in trainable(model))


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


PACKED = {
    "bnb-nf4": lambda m: bitsandbytes.nn.Linear4bit(64, 64, False, quant_type="nf4"),
    "bnb-int8": lambda m: bitsandbytes.nn.Linear8bitLt(64, 64, False, False),
    "nf4": nf4.NF4Linear,
    "int8": int8.Int8Linear,
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_packed_layer_gets_a_bias_in_float32(kind):
    torch.manual_seed(0)
    layer = PACKED[kind](nn.Linear(64, 64, False))
    model, x = nn.Sequential(layer).to("cpu"), torch.randn(3, 64)
    plain = model(x)
    reference.add(model, create=True)
    assert torch.equal(model(x), plain) and layer.bias.dtype == torch.float32
    assert reference.state_dict(model).keys() == {"0.bias"}
    model(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((64,), 3.0))


# Real models (test_counting.py has the paper's counts)


NORMS = {
    "tiny-decoder": ["input_layernorm", "post_attention_layernorm", "norm"],
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
FAMILIES = {**MODELS, "t5": t5}


@pytest.mark.parametrize("name", NORMS)
def test_a_model_keeps_its_outputs_and_then_learns(name):
    model = FAMILIES[name]()
    if name in ("tiny-decoder", "t5"):  # they have no biases
        refused(model, "create=True", reference.add)
    before = dict(model.named_parameters()).keys()
    with torch.no_grad():
        plain = outputs(model)
        reference.add(model, create=True)
        assert torch.equal(outputs(model), plain)
        created = reference.state_dict(model).keys() - before
        assert bool(created) == (name in ("tiny-decoder", "llama", "t5"))
        assert not {"lm_head", "classifier"} & {n.split(".")[0] for n in created}
        stir(model, reference)
        assert (outputs(model) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", NORMS)
def test_norm_tuning_gives_the_numbers_of_pefts(name):
    """peft's LNTuning is the oracle: it has no BitFit."""
    model, config = FAMILIES[name](), LNTuningConfig(target_modules=NORMS[name])
    twin = get_peft_model(copy.deepcopy(model), config).eval()
    theirs = {
        n.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): p
        for n, p in twin.named_parameters()
        if p.requires_grad
    }
    ours = reference.state_dict(reference.add_norms(model), keep_vars=True)
    assert_same_training(model, ours, twin, theirs)
    assert_same_merged(reference.merge(model), twin.merge_and_unload())


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
NAMED = "for name in names}"
COPIES = "{n: nn.Parameter(p) for n, p in tensors.items()}"
NEW = "[m.bias for m in bare]"
EVERY = "for p in m.parameters()"
HALVED = "[p.register_hook(lambda g: g / 2) for p in chosen]"
TWICE = "remove_duplicate=False"
FITTING = "{n: t for n, t in tensors.items() if n in state_dict(model)}"
LOAD = "_load(state_dict(model), tensors)"
OWN = "for p in m.parameters(recurse=False)"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_the_chosen_biases_train_and_no_output_changes: {
        "the base is not frozen": {FREEZE: "ids"},
        "the biases are frozen too": {TRAIN: TRAIN.replace("True", "False")},
        "the norms' biases are left out": {ENDS: f'{ENDS} and "norm" not in name'},
        "the head's bias is left out": {ENDS: f'{ENDS} and "head" not in name'},
        "weights train, not biases": {ENDS: ENDS.replace("bias", "weight")},
        "the state dict gives copies": {"return tensors if": f"return {COPIES} if"},
        "the biases start anew": {TRAIN: "{id(p.zero_()) for p in chosen}"},
        "the biases start at zero": {TRAIN: TRAIN.replace("p.", "nn.init.zeros_(p).")},
        "only created biases train": {CHOSEN: f"create and {NEW} or {CHOSEN}"},
        "targets are ignored": {CHOSEN: "_biases(plain)"},
        "a target's weight trains too": {CHOSEN: f"[p for m in linears {EVERY}]"},
    },
    test_all_that_trains_moves_and_is_carried_over: {
        "the state dict leaves one out": {NAMED: "for name in names[1:]}"},
        "the state dict holds biases alone": {NAMED: f"for name in names {ENDS}}}"},
        "loading does nothing": {LOAD: "pass"},
    },
    test_the_gradients_are_those_of_full_fine_tuning: {
        "gradients are halved": {FREEZE: f"{HALVED}\n    {FREEZE}"},
    },
    test_created_biases_are_zero_and_train: {
        "created biases are random": {ZEROS: ZEROS.replace("zeros", "randn")},
        "created biases do not train": {CHOSEN: f"[b for b in ({CHOSEN}) if b.any()]"},
        "created biases are in float32": {DTYPE: "None"},
        "created biases are of the input's width": {ZEROS: ZEROS.replace("0", "1")},
        "norms get a created bias too": {
            CREATE: "    for m in model.modules():\n"
            "        if isinstance(m, nn.LayerNorm) and m.bias is None:\n"
            f"            m.bias = nn.Parameter(torch.zeros_like(m.weight))\n{CREATE}"
        },
    },
    test_the_output_head_gets_a_created_bias_only_by_name: {
        "the head gets a created bias": {"layer is head or ": ""},
        "a classifier gets a created bias": {'{"classifier", "score", ': '{"score", '},
        "created biases go everywhere": {" if targets is None else targets\n": "\n"},
    },
    test_what_leaves_nothing_to_train_is_refused_with_the_way_out: {
        "no bias, and nothing said": {NONE: "    if False:\n"},
        "a target without a bias is passed over": {
            BARE: "    linears = [m for m in linears if create or m not in bare]\n"
            "    bare = bare if create else []\n    if False:\n"
        },
        "a target without a bias gets one unasked": {BARE: "    if False:\n"},
        "an empty list means all": {
            "    linears = []\n": "    targets = targets or None\n    linears = []\n"
        },
        "no norm, and nothing said": {"    if not chosen:": "    if False:"},
    },
    test_a_created_bias_that_nobody_reads_is_refused_or_left_out: {
        "a layer that adds no bias gets one": {"not (_adds(m) and": "not (True and"},
        "a layer that is not called gets one": {"_reads(type(parent), name))": "True)"},
        "asking for a dtype counts as reading": {r"(?!\.dtype|": "(?!"},
        "a layer that is left out is told nobody": {"    if idle:": "    if False:"},
    },
    test_a_bias_that_is_computed_is_refused_or_left_out: {
        "a computed bias is taken": {"and not plain:": "and False:"},
        "by name it is left out": {"        if refuse:": "        if False:"},
    },
    test_norm_tuning_trains_the_norms_own_parameters: {
        "norm tuning trains the weights alone": {OWN: "for p in [m.weight]"},
        "only LayerNorm is a norm": {NORM: 'type(m).__name__ == "LayerNorm"'},
        "norm tuning trains the biases too": {OWN + "]": OWN + "] + _biases(plain)"},
        "norm tuning trains what is in a block": {"(recurse=False)": "()"},
        "a linear is a norm": {"if _shape(m) is None]": "]"},
    },
    test_a_shared_bias_is_counted_once: {
        "a shared bias is listed twice": {
            "parameters() if id": f"parameters({TWICE}) if id"
        },
    },
    test_loading_is_strict: {
        "loading is not strict": {
            LOAD: "[t.copy_(tensors.get(n, t)) for n, t in state_dict(model).items()]"
        },
        "loading lets the unexpected pass": {LOAD: LOAD.replace("tensors", FITTING)},
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
        "BitFit goes on BitFit": {'    if hasattr(model, "bitfit"):': "    if False:"},
    },
    test_a_layer_that_has_left_is_noticed: {
        "what is gone is passed over": {
            NAMED: "for name in names if name in parameters}",
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
MUTATIONS = by_fault(BROKEN)
