"""LoRA's laws, and the same numbers as peft: forward, backward, after training.

A law that takes only `lora`, the module, is run again by tests/test_mutations.py on
broken copies of lora.py. Messages name the mistake that gives the symptom.
"""

import copy
import math

import bitsandbytes
import pytest
import test_every_method as every
import torch
from common import (
    ALL,
    BATCH,
    IDS,
    MODELS,
    SMALL,
    assert_one_sentence,
    assert_same_training,
    assert_unchanged,
    by_fault,
    net,
    seeded,
    snapshot,
    t5,
    train,
    trainable,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peftlab import lora as reference


@pytest.fixture
def lora():
    return reference


def fill(model, lora, seed=1):
    """Random B (A is random already), so that the bypass says something."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in lora.state_dict(model).items():
        if name.endswith("lora_B"):
            t.copy_(torch.randn(t.shape, generator=generator) / 8)
    return model


# The laws


def test_adding_lora_changes_no_output(lora):
    plain = net()(IDS)
    for bias in ("none", "all"):
        model = lora.add(net(), ALL, bias=bias)
        assert torch.equal(model(IDS), plain), (
            "outputs moved at step 0: B must start at zero (are A and B both random?)"
        )


def test_the_first_gradient_reaches_b_and_not_a(lora):
    model = lora.add(net(), ALL)
    model(IDS).pow(2).mean().backward()
    for name, p in lora.state_dict(model, keep_vars=True).items():
        assert p.grad is not None, f"{name} gets no gradient: is the bypass dead?"
        if name.endswith("lora_A"):
            assert not p.grad.any(), f"{name} has a gradient: B was not zero"
        else:
            assert p.grad.any(), f"{name} stays zero: is A zero too, the bypass dead?"


def test_a_starts_uniform_within_one_over_the_root_of_its_width(lora):
    layer = lora.add(nn.Sequential(nn.Linear(400, 3)), ["0"], r=100)[0]
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound
    assert abs(layer.lora_A.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert layer.lora_A.shape == (100, 400) and layer.lora_B.shape == (3, 100)


def test_the_bypass_adds_alpha_over_r_times_b_a_x(lora):
    base = nn.Linear(6, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    plain = base(x)
    layer = fill(lora.add(nn.Sequential(base), ["0"], r=3, alpha=12), lora)[0]
    added = layer(x) - plain
    product = x @ layer.lora_A.T @ layer.lora_B.T
    assert added.any(), "the bypass adds nothing: the branch is dead"
    torch.testing.assert_close(
        added, 4 * product, msg="the scale is alpha / r (not 1, alpha or alpha * r)"
    )


def test_rslora_scales_by_alpha_over_the_root_of_r(lora):
    base = nn.Linear(6, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    plain = base(x)
    model = lora.add(nn.Sequential(base), ["0"], r=4, alpha=12, rslora=True)
    layer = fill(model, lora)[0]
    product = x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(
        layer(x) - plain, 6 * product, msg="with rsLoRA the scale is alpha / sqrt(r)"
    )
    merged = lora.merge(model)
    torch.testing.assert_close(merged(x) - plain, 6 * product)


def test_a_conv1d_is_wrapped_by_what_goes_in_and_out(lora):
    model = fill(lora.add(net(), ALL, r=2, alpha=2), lora)
    layer, x = model.c_attn, torch.randn(5, 8, dtype=torch.float64)
    assert layer.lora_A.shape == (2, 8), "A is (r, in); a Conv1D's weight is (in, out)"
    assert layer.lora_B.shape == (12, 2), "B is (out, r)"
    expected = x @ layer.base.weight + layer.base.bias
    expected = expected + x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)


def test_the_change_after_training_has_rank_r(lora):
    before = {n: p.clone() for n, p in net().named_parameters()}
    model = lora.merge(train(lora.add(net(), ALL, r=2)))
    for name in ALL:
        change = model.get_parameter(f"{name}.weight") - before[f"{name}.weight"]
        values = torch.linalg.svdvals(change)
        assert values[0] > 1e-6, f"{name} did not change: was it trained at all?"
        assert values[1] > 1e-12 * values[0], f"{name}: only one direction was learned"
        assert values[2] < 1e-12 * values[0], f"{name}: rank above r; is W trained too?"


def test_merging_leaves_plain_frozen_layers(lora):
    model = lora.merge(lora.add(net(), ALL, bias="all"))
    kinds = [(n, type(m)) for n, m in model.named_modules()]
    assert kinds == [(n, type(m)) for n, m in net().named_modules()]
    assert model.state_dict().keys() == net().state_dict().keys()
    assert not trainable(model), "a merged model is frozen, its biases too"


def test_merging_takes_a_16_bit_base_once_to_its_own_precision(lora):
    model = fill(lora.add(net().bfloat16(), ["proj"], r=2, alpha=4), lora)
    layer = model.proj
    exact = layer.base.weight.float() + 2 * layer.lora_B @ layer.lora_A
    merged = lora.merge(model).proj.weight
    assert torch.equal(merged, exact.bfloat16()), "the sum must be rounded only once"


def test_dropout_is_off_in_eval_mode(lora):
    model = fill(lora.add(net(), ALL, dropout=0.5), lora)
    twin = fill(lora.add(net(), ALL), lora)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(IDS), twin(IDS)), "dropout is left on in eval mode"


def test_dropout_is_off_at_once_on_a_model_in_eval_mode(lora):
    model = fill(lora.add(net().eval(), ALL, dropout=0.5), lora)
    assert torch.equal(model(IDS), model(IDS)), "the new layers are in train mode"
    assert lora.add(net().train(), ALL, dropout=0.5).proj.training


def test_dropout_thins_only_the_input_of_the_bypass(lora):
    x = torch.randn(50, 6, dtype=torch.float64)
    base = nn.Linear(6, 4).double()
    layer = lora.add(nn.Sequential(base), ["0"], r=2, alpha=4, dropout=0.5).train()[0]
    assert torch.equal(layer(x), base(x)), "dropout touches the base's path"
    fill(layer, lora)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    thinned = nn.functional.dropout(x, 0.5)
    expected = base(x) + 2 * thinned @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(got, expected, msg="dropout goes on x, before A")


def test_only_a_and_b_train(lora):
    model = lora.add(net(), ALL)
    wanted = {f"{path}.lora_{x}" for path in ALL for x in "AB"}
    assert trainable(model) == wanted, "the base is not frozen, or A and B are"


def test_bias_all_trains_every_bias_and_no_other_base_weight(lora):
    model = lora.add(net(), ["q_proj"], bias="all")
    got = {n.replace(".base", "") for n in trainable(model) if "lora_" not in n}
    wanted = {f"{p}.bias" for p in ("q_proj", "norm", "c_attn", "c_proj", "lm_head")}
    assert got == wanted


def test_bias_lora_only_trains_the_biases_of_the_targets(lora):
    model = lora.add(net(), ["q_proj", "c_proj", "proj"], bias="lora_only")
    got = {n.replace(".base", "") for n in trainable(model) if "lora_" not in n}
    assert got == {"q_proj.bias", "c_proj.bias"}


def test_frozen_weights_are_bit_identical_after_training(lora):
    biases = [f"{p}.bias" for p in ("q_proj", "norm", "c_attn", "c_proj", "lm_head")]
    asked = {"none": [], "all": biases, "lora_only": [biases[0], *biases[2:4]]}
    for bias in asked:
        model = lora.add(net(), ALL, bias=bias)
        before = snapshot(model)[0]
        train(model)
        for name, t in model.state_dict().items():
            trains = "lora_" in name or name.replace(".base", "") in asked[bias]
            moved = not torch.equal(t, before[name])
            assert trains or not moved, f"{name} is frozen, and yet it moved"
            assert moved or not trains, f"{name} did not train"


def test_all_linear_leaves_out_a_classifier_and_a_score(lora):
    two = nn.ModuleDict({"dense": nn.Linear(4, 4), "out_proj": nn.Linear(4, 2)})
    for name, head in (
        ("classifier", nn.Linear(4, 2)),
        ("score", nn.Linear(4, 2)),
        ("qa_outputs", nn.Linear(4, 2)),
        ("classifier", two),  # RoBERTa's; and it has a name that the body has too
    ):
        model = nn.ModuleDict({"dense": nn.Linear(4, 4), name: head})
        lora.add(model, "all-linear")
        got = {n.rpartition(".")[0] for n in lora.state_dict(model)}
        assert got == {"dense"}, f"all-linear must leave out the head: {got}"


def test_the_state_dict_goes_round(lora):
    for bias in ("none", "all", "lora_only"):
        one = train(lora.add(net(), ALL, bias=bias))
        two = lora.add(net(), ALL, bias=bias)
        tensors = {n: t.clone() for n, t in lora.state_dict(one).items()}
        lora.load_state_dict(two, tensors)
        assert torch.equal(one(IDS), two(IDS)), "something trained was not carried over"
        assert trainable(two) == trainable(one)


def test_the_state_dict_names_biases_as_in_the_plain_model(lora):
    model = lora.add(net(), ["q_proj"], bias="all")
    biases = {n: t for n, t in lora.state_dict(model).items() if "lora_" not in n}
    plain = dict(net().named_parameters())
    assert biases.keys() == {n for n in plain if n.endswith("bias")}
    assert all(torch.equal(t, plain[n]) for n, t in biases.items())


def test_a_module_that_is_called_base_keeps_its_name(lora):
    def build():
        inner = nn.ModuleDict({"base": nn.Linear(3, 3), "up": nn.Linear(3, 3)})
        return nn.ModuleDict({"base": inner, "head": nn.Linear(3, 3)})

    for targets in (["up"], ["base.base"], ["base.base", "up"]):
        model = lora.add(build(), targets, r=1, bias="all")
        biases = {n for n in lora.state_dict(model) if n.endswith("bias")}
        assert biases == {"base.base.bias", "base.up.bias", "head.bias"}


def test_loading_is_strict(lora):
    model = fill(lora.add(net(), ALL, bias="lora_only"), lora)
    good = {n: t.clone() + 1 for n, t in lora.state_dict(model).items()}
    before = snapshot(model)
    bad = [
        {},
        {n: t for n, t in good.items() if n != "proj.lora_B"},
        {n: t for n, t in good.items() if n != "q_proj.bias"},
        {**good, "proj.lora_C": torch.zeros(2)},
        {**good, "proj.lora_A": good["proj.lora_A"].T},
        {**good, "proj.lora_B": good["proj.lora_B"][:, :1]},
        {**good, "proj.lora_B": None},
    ]
    for tensors in bad:
        with pytest.raises(ValueError) as error:
            lora.load_state_dict(model, tensors)
        assert_one_sentence(error)
        assert_unchanged(model, before)
    lora.load_state_dict(model, good)


# Bad input: one sentence each, and the model as it was

BAD = {
    "alpha=0": dict(alpha=0),
    "alpha=-16": dict(alpha=-16),
    "alpha=nan": dict(alpha=math.nan),
    "alpha=inf": dict(alpha=math.inf),
    "alpha='16'": dict(alpha="16"),
    "alpha=None": dict(alpha=None),
    "dropout=-0.1": dict(dropout=-0.1),
    "dropout=1.0": dict(dropout=1.0),
    "dropout=nan": dict(dropout=math.nan),
    "dropout='0.1'": dict(dropout="0.1"),
    "bias='some'": dict(bias="some"),
    "bias=True": dict(bias=True),
    "bias=None": dict(bias=None),
    "alpha=10**400": dict(alpha=10**400),
    "alpha=True": dict(alpha=True),
    "dropout=10**400": dict(dropout=10**400),
    "rslora='false'": dict(rslora="false"),
    "rslora=1": dict(rslora=1),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(case):
    model = net()
    model.norm.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        reference.add(model, **{"targets": ["q_proj"], **BAD[case]})
    assert_one_sentence(error)
    assert_unchanged(model, before)


# Packed weights


def packed(kind):
    if kind == "nf4":
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    else:
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(64, 2)).to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_lora_trains_over_a_packed_base_and_merge_refuses_it(kind):
    torch.manual_seed(0)
    model = packed(kind)
    x = torch.randn(3, 64)
    plain = model(x)
    reference.add(model, ["0"], r=2)
    assert model[0].lora_A.dtype == torch.float32 and model[0].lora_B.shape == (64, 2)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    codes = model[0].base.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # B moves first, then A
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()
    assert model[0].lora_A.grad.any() and model[0].lora_B.any()
    assert torch.equal(model[0].base.weight, codes), "the packed codes moved"
    with pytest.raises(ValueError, match="packed") as error:
        reference.merge(model)
    assert_one_sentence(error)
    assert isinstance(model[0], reference.LoRALinear)


# The oracle: peft


MODES = {
    "none": dict(bias="none"),
    "all": dict(bias="all"),
    "lora_only": dict(bias="lora_only"),
    "rslora": dict(bias="none", rslora=True),
}


def peft_twin(model, targets, r=4, alpha=6, bias="none", rslora=False, **options):
    """peft's model on a copy of a plain `model`."""
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets,
        bias=bias,
        use_rslora=rslora,
        **options,
    )
    return get_peft_model(copy.deepcopy(model), config)


def plain_names(peft_model):
    """peft's trainable parameters by our names."""
    return {
        n.removeprefix("base_model.model.")
        .replace(".default.weight", "")
        .replace(".base_layer.bias", ".bias"): p
        for n, p in peft_model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*MODELS, "t5"])
def test_numbers_equal_pefts_before_and_after_training(name, mode):
    model = {**MODELS, "t5": t5}[
        name
    ]().double()  # float32 is off by 1.5e-5 on some CPUs
    twin, settings = copy.deepcopy(model), dict(r=4, alpha=6, **MODES[mode])
    fill(reference.add(model, "all-linear", **settings), reference)
    ours = reference.state_dict(model, keep_vars=True)
    paths = [n.removesuffix(".lora_A") for n in ours if n.endswith(".lora_A")]
    twin = peft_twin(twin, paths, **settings).eval()
    theirs = plain_names(twin)
    for n, p in theirs.items():
        p.data.copy_(ours[n])
    assert_same_training(model, ours, twin, theirs, steps=3)


@pytest.mark.parametrize("name", ["tiny-decoder", "gpt2", "llama", "bert"])
def test_merged_equals_unmerged_to_1e_5_in_float32(name):
    model = MODELS[name]()
    fill(reference.add(model, "all-linear", r=4, alpha=8), reference)
    with torch.no_grad():
        wrapped = model(**BATCH)[0]
        merged = reference.merge(model)(**BATCH)[0]
    torch.testing.assert_close(merged, wrapped, rtol=1e-5, atol=1e-5)


def test_lora_fits_an_encoder_decoder_and_a_two_layer_head():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    roberta = RobertaForSequenceClassification(
        RobertaConfig(**SMALL, num_attention_heads=4)
    )
    for model, more in (
        (t5, dict(decoder_input_ids=BATCH["input_ids"])),
        (roberta, {}),
    ):
        model = seeded(model)
        plain = model(**BATCH, **more)[0]
        reference.add(model, "all-linear")
        same = model(**BATCH, **more)[0]
        torch.testing.assert_close(same, plain, rtol=0, atol=1e-6)
        names = reference.state_dict(model)
        assert not any("lm_head" in n or "classifier" in n for n in names)


# lora.py copied alone, for tests/test_standalone.py

ALONE = """
import lora
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x = torch.randn(5, 6)
plain = model(x)
lora.add(model, ["0", "2"], r=2, dropout=0.1, bias="lora_only")
assert torch.equal(model.eval()(x), plain)
for _ in range(2):
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for p in lora.state_dict(model, keep_vars=True).values():
        p.data -= 0.1 * p.grad
tuned = model(x)
assert not torch.allclose(tuned, plain)
lora.load_state_dict(model, lora.state_dict(model))
merged = lora.merge(model)
assert [type(m).__name__ for m in merged] == ["Linear", "Tanh", "Linear"]
assert torch.allclose(merged(x), tuned, atol=1e-5)
"""

# Broken copies, for tests/test_mutations.py

SCALING = "alpha / math.sqrt(r) if rslora else alpha / r"
RETURN = "return (y + (self.scaling * low) @ self.lora_B.T).to(y.dtype)"
KAIMING = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"
DELTA = "self.scaling * (self.lora_B @ self.lora_A)"
DROPPED = "self.dropout(x.to(self.lora_A.dtype))"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_the_bypass_adds_alpha_over_r_times_b_a_x: {
        "alpha / r is missing": {SCALING: "1.0"},
        "scaled by alpha": {SCALING: "alpha"},
        "scaled by alpha * r": {SCALING: "alpha * r"},
        "scaled by r / alpha": {SCALING: "r / alpha"},
        "the bypass is dead": {RETURN: "return y"},
    },
    test_rslora_scales_by_alpha_over_the_root_of_r: {
        "rsLoRA is ignored": {SCALING: "alpha / r"}
    },
    test_adding_lora_changes_no_output: {
        "the base is dropped": {RETURN: RETURN.replace("y + ", "", 1)},
        "A and B are both random": {"torch.zeros(n_out": "torch.randn(n_out"},
    },
    every.test_own_tensors_are_float32_over_a_16_bit_base: {
        "the answer is in float32": {RETURN: RETURN.removesuffix(".to(y.dtype)")}
    },
    test_the_first_gradient_reaches_b_and_not_a: {
        "A and B are both zero": {KAIMING: "self.lora_A.data *= 0"},
        "A is zero and B random": {
            "torch.zeros(n_out": "torch.randn(n_out",
            KAIMING: "self.lora_A.data *= 0",
        },
    },
    test_a_starts_uniform_within_one_over_the_root_of_its_width: {
        "A starts from another width": {"a=math.sqrt(5)": "a=0"}
    },
    test_the_change_after_training_has_rank_r: {
        "the rank is one too many": {"torch.empty(r,": "torch.empty(r := r + 1,"}
    },
    test_only_a_and_b_train: {
        "the base is not frozen": {
            "_swap(model.requires_grad_(False), new)": "_swap(model, new)"
        },
        "A and B are frozen too": {"p.requires_grad_(True)": "p.requires_grad_(False)"},
    },
    every.test_merged_equals_unmerged_to_1e_10_in_float64: {
        "the product is transposed": {
            DELTA: "self.scaling * (self.lora_A.T @ self.lora_B.T)"
        },
        "a square product is transposed": {
            DELTA: f"(lambda d: d.T if d.shape[0] == d.shape[1] else d)({DELTA})"
        },
        "merging forgets the scaling": {DELTA: "self.lora_B @ self.lora_A"},
        "merging adds nothing": {f"return W + {DELTA}": "return W"},
    },
    test_a_conv1d_is_wrapped_by_what_goes_in_and_out: {
        "a Conv1D's width is read the wrong way": {
            "layer.weight.shape[::-1]": "layer.weight.shape"
        }
    },
    test_merging_takes_a_16_bit_base_once_to_its_own_precision: {
        "merging rounds twice": {DELTA: f"({DELTA}).to(W.dtype)"}
    },
    test_merging_leaves_plain_frozen_layers: {
        "merging leaves biases to train": {
            "    return model.requires_grad_(False)": "    return model"
        }
    },
    test_frozen_weights_are_bit_identical_after_training: {
        "biases train unasked": {'mode == "all" or': 'mode == "none" or'}
    },
    test_dropout_is_off_in_eval_mode: {
        "dropout stays on in eval mode": {DROPPED: "nn.functional.dropout(x, 0.5)"}
    },
    test_dropout_is_off_at_once_on_a_model_in_eval_mode: {
        "dropout is on in a model that is in eval mode": {
            "wrapper.train(layer.training)": "pass"
        }
    },
    test_dropout_thins_only_the_input_of_the_bypass: {
        "dropout is forgotten": {DROPPED: "x.to(self.lora_A.dtype)"},
        "dropout thins the base's input too": {
            "y = self.base(x)": "y = self.base(x := self.dropout(x))"
        },
    },
    test_bias_all_trains_every_bias_and_no_other_base_weight: {
        'bias="all" trains none': {'mode == "all" or ': ""}
    },
    test_bias_lora_only_trains_the_biases_of_the_targets: {
        'bias="lora_only" trains all': {" and name in plain_names": ""}
    },
    test_the_state_dict_names_biases_as_in_the_plain_model: {
        "biases are named as in the wrapper": {"plain_names.get(name, name)": "name"}
    },
    test_a_module_that_is_called_base_keeps_its_name: {
        "a module called base loses its name": {
            "plain_names.get(name, name)": 'name.replace(".base.bias", ".bias")'
        }
    },
    test_the_state_dict_goes_round: {
        "the state dict leaves A out": {'("lora_A", "lora_B")': '("lora_B",)'}
    },
    test_loading_is_strict: {
        "biases are not loaded": {"own[name] = p if keep_vars else p.detach()": "pass"}
    },
    test_all_linear_leaves_out_a_classifier_and_a_score: {
        "the classifier is in all-linear": {'{"classifier", "score", ': '{"score", '}
    },
}
MUTATIONS = by_fault(BROKEN)
