"""IA3's laws, and the same numbers as peft: forward, backward, after training.

A law that takes only `ia3`, the module, is run again by tests/test_mutations.py on
broken copies of ia3.py. What holds for other methods too is in test_every_method.py.
"""

import copy
import math

import bitsandbytes
import pytest
import test_every_method as every
import torch
from common import (
    ALL,
    IDS,
    MODELS,
    assert_one_sentence,
    assert_same,
    assert_same_merged,
    assert_same_training,
    assert_unchanged,
    by_fault,
    net,
    snapshot,
    t5,
    train,
    trainable,
)
from peft import IA3Config, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftlab import ia3 as reference

OUT, IN = ["q_proj", "c_attn"], ["c_proj", "proj"]  # by side; each has a Conv1D


@pytest.fixture
def ia3():
    return reference


def fill(model, ia3, seed=1):
    """Random vectors, none near zero, so that they say something."""
    generator = torch.Generator().manual_seed(seed)
    for t in ia3.state_dict(model).values():
        sign = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
        t.copy_(sign * (0.5 + torch.rand(t.shape, generator=generator)))
    return model


def saved(model, ia3):
    return {n: t.clone() for n, t in ia3.state_dict(model).items()}


def linear(n_in=6, n_out=4, bias=True):
    torch.manual_seed(2)
    return nn.Linear(n_in, n_out, bias=bias).double()


def rows(n_in=6):
    return torch.randn(5, n_in, dtype=torch.float64)


# The laws


def test_adding_ia3_changes_no_output(ia3):
    model = ia3.add(net(), OUT, IN)
    assert torch.equal(model(IDS), net()(IDS)), "the vectors must start at one"


def test_every_vector_gets_a_gradient_at_once(ia3):
    model = ia3.add(net(), OUT, IN)
    model(IDS).pow(2).mean().backward()
    for name, p in ia3.state_dict(model, keep_vars=True).items():
        assert p.grad is not None and p.grad.all(), (
            f"{name} is dead: is it used at all?"
        )


def test_an_output_vector_rescales_what_comes_out_bias_and_all(ia3):
    base, x = linear(), rows()
    plain = base(x)
    layer = fill(ia3.add(nn.Sequential(base), ["0"]), ia3)[0]
    scale = ia3.state_dict(nn.Sequential(layer))["0.ia3_l"].flatten()
    torch.testing.assert_close(
        layer(x), scale * plain, msg="the output side is l * (W x + b), the bias too"
    )


def test_an_input_vector_rescales_what_goes_in_and_no_bias(ia3):
    base, x = linear(), rows()
    layer = fill(ia3.add(nn.Sequential(base), [], ["0"]), ia3)[0]
    scale = ia3.state_dict(nn.Sequential(layer))["0.ia3_l"].flatten()
    expected = (x * scale) @ base.weight.T + base.bias
    torch.testing.assert_close(
        layer(x), expected, msg="the feed-forward side is W (l * x) + b, not the output"
    )


def test_the_shape_tells_the_side(ia3):
    shapes = {n: (*t.shape,) for n, t in saved(ia3.add(net(), OUT, IN), ia3).items()}
    assert shapes == {
        "q_proj.ia3_l": (8, 1),
        "c_attn.ia3_l": (12, 1),  # a Conv1D with 8 in and 12 out
        "c_proj.ia3_l": (1, 12),
        "proj.ia3_l": (1, 12),
    }, "(out, 1) on the output side and (1, in) on the input side, as in peft's files"


def test_feedforward_names_may_stand_in_targets_too_as_in_peft(ia3):
    for targets in (OUT, [*OUT, "proj"], [*OUT, *IN], {*OUT, *IN}, "all-linear"):
        model = fill(ia3.add(net(), targets, IN), ia3)
        assert ia3.state_dict(model).keys() == {f"{n}.ia3_l" for n in ALL}
        twin = fill(ia3.add(net(), OUT, IN), ia3)
        assert torch.equal(model(IDS), twin(IDS)), "the names in both are feed-forward"
    every_one = ia3.state_dict(ia3.add(net(), [], "all-linear"))
    assert every_one.keys() == {f"{n}.ia3_l" for n in ALL}
    assert {len(t) for t in every_one.values()} == {1}, "these go on the input side"


def test_keys_and_values_can_be_told_apart(ia3):
    pair = nn.ModuleDict({k: linear() for k in ("k_proj", "v_proj")})
    x = rows()
    plain = {k: m(x) for k, m in pair.items()}
    ia3.add(pair, ["k_proj", "v_proj"])
    tensors = {
        "k_proj.ia3_l": torch.full((4, 1), 2.0),
        "v_proj.ia3_l": torch.zeros(4, 1),
    }
    ia3.load_state_dict(pair, tensors)
    assert torch.equal(pair["k_proj"](x), 2 * plain["k_proj"]), "k's vector is not k's"
    assert not pair["v_proj"](x).any(), "v's vector is not v's: are they swapped?"


def test_merged_equals_unmerged_on_either_side(ia3):
    model = train(ia3.add(net(), OUT, IN))
    wrapped = model(IDS)
    gap = (ia3.merge(model)(IDS) - wrapped).abs().max()
    assert gap < 1e-10, (
        f"merging moved the outputs by {gap:.1e}: l scales rows and the bias on the"
        " output side, columns on the input side; a Conv1D's weight lies the other way"
    )


def test_a_bias_past_the_dtype_is_refused_before_anything_changes(ia3):
    model = ia3.add(net().half(), OUT, IN)
    model.c_attn.ia3_l.data.fill_(1e3)
    model.c_attn.base.bias.data.fill_(6e4)
    before = snapshot(model)
    with pytest.raises(ValueError, match="c_attn.bias") as error:
        ia3.merge(model)
    assert_one_sentence(error)
    assert_unchanged(model, before)


def test_unmerging_gives_outputs_weights_and_vectors_back(ia3):
    model = fill(ia3.add(net(), OUT, IN), ia3)
    before, wrapped, tensors = snapshot(model), model(IDS), saved(model, ia3)
    model = ia3.unmerge(ia3.merge(model), tensors)
    values, flags, kinds = snapshot(model)
    assert flags == before[1] and kinds == before[2], "not the model that add made"
    for name, t in values.items():
        gap = (t - before[0][name]).abs().max()
        assert gap < 1e-14, f"{name} is off by {gap:.1e}: divide by l, once"
    assert (model(IDS) - wrapped).abs().max() < 1e-12


def test_unmerging_a_model_read_from_a_file_freezes_it(ia3):
    model = fill(ia3.add(net(), OUT, IN), ia3)
    tensors, merged = saved(model, ia3), net()
    merged.load_state_dict(ia3.merge(model).state_dict())
    assert len(trainable(merged)) > len(tensors)
    assert trainable(ia3.unmerge(merged, tensors)) == tensors.keys()


def test_unmerging_refuses_what_cannot_be_undone(ia3):
    model = fill(ia3.add(net(), OUT, IN), ia3)
    good = saved(model, ia3)
    before = snapshot(ia3.merge(model))

    def spoiled(value):
        t = good["proj.ia3_l"].clone()
        t[0, 3] = value
        return {**good, "proj.ia3_l": t}

    bad = {
        "a zero: what it erased is gone": spoiled(0),
        "not a number": spoiled(math.nan),
        "an infinite one": spoiled(math.inf),
        "nothing": {},
        "an unknown name": {**good, "other.ia3_l": good["proj.ia3_l"]},
        "an embedding": {**good, "embed.ia3_l": torch.ones(6, 1)},
        "part of a path": {"no.proj.ia3_l": good["proj.ia3_l"]},
        "another tensor": {"proj.lora_A": good["proj.ia3_l"]},
        "a flat vector": {**good, "q_proj.ia3_l": good["q_proj.ia3_l"].flatten()},
        "too short": {**good, "proj.ia3_l": good["proj.ia3_l"][:, 1:]},
        "a number": {**good, "proj.ia3_l": torch.ones(())},
        "None": {**good, "proj.ia3_l": None},
    }
    for what, tensors in bad.items():
        with pytest.raises(ValueError) as error:
            ia3.unmerge(model, tensors)
            pytest.fail(f"unmerge took {what}")
        assert_one_sentence(error)
        assert_unchanged(model, before)
    before = snapshot(ia3.unmerge(model, good))
    for again in (good, {"lm_head.ia3_l": torch.ones(11, 1)}):
        with pytest.raises(ValueError, match="already"):
            ia3.unmerge(model, again)
        assert_unchanged(model, before)


def test_unmerging_leaves_a_tied_weight_and_a_second_parent_alone(ia3):
    model = net()
    model.lm_head = nn.Linear(6, 11, bias=False).double()
    model.lm_head.weight = model.embed.weight
    model.proj = nn.Linear(12, 6, bias=False).double()
    model.another = nn.ModuleDict({"c_proj": model.c_proj})
    embedding = model.embed.weight.detach().clone()
    fill(ia3.add(model, ["lm_head"], ["c_proj"]), ia3)
    wrapped, tensors = model(IDS), saved(model, ia3)
    model = ia3.unmerge(ia3.merge(model), tensors)
    assert torch.equal(model.embed.weight, embedding), "the tied embedding moved too"
    assert model.another["c_proj"] is model.c_proj, "one parent of two got the vector"
    assert (model(IDS) - wrapped).abs().max() < 1e-12


def test_one_output_is_told_from_one_input(ia3):
    model = nn.Sequential(linear(6, 1), linear(1, 4)).double()
    fill(ia3.add(model, ["0"], ["1"]), ia3)
    x, tensors = rows(), saved(model, ia3)
    wrapped = model(x)
    assert (ia3.merge(model)(x) - wrapped).abs().max() < 1e-14
    try:
        ia3.unmerge(model, tensors)
    except ValueError:
        pytest.fail("of a (1, 1) the layer's own shape tells the side")
    torch.testing.assert_close(model(x), wrapped)
    assert [m.ia3_l.shape for m in model] == [(1, 1), (1, 1)]


def test_a_16_bit_base_is_merged_once_to_its_own_precision(ia3):
    model = fill(ia3.add(net().bfloat16(), OUT, IN), ia3)
    exact = {
        "q_proj.weight": model.q_proj.base.weight.float() * model.q_proj.ia3_l,
        "q_proj.bias": model.q_proj.base.bias.float() * model.q_proj.ia3_l[:, 0],
        "c_attn.weight": model.c_attn.base.weight.float() * model.c_attn.ia3_l.T,
        "proj.weight": model.proj.base.weight.float() * model.proj.ia3_l,
    }
    merged = dict(ia3.merge(model).named_parameters())
    for name, want in exact.items():
        assert torch.equal(merged[name], want.bfloat16()), f"{name}: round only once"


def test_the_vectors_are_float32_over_a_16_bit_base(ia3):
    for dtype in (torch.bfloat16, torch.float16):
        for sides in ((["0"],), ([], ["0"])):
            layer = ia3.add(nn.Sequential(nn.Linear(6, 6).to(dtype)), *sides)[0]
            assert layer.ia3_l.dtype == torch.float32
            y = layer(torch.randn(3, 6, dtype=dtype))
            assert y.dtype == dtype, "the layer must answer in its base's precision"
            y.sum().backward()
            assert layer.ia3_l.grad.any() and layer.base.weight.dtype == dtype
    assert ia3.add(net(), OUT).q_proj.ia3_l.dtype == torch.float64


# Bad input: one sentence each, and the model as it was

BAD = {
    "nothing on either side": dict(targets=[], feedforward=[]),
    "an unknown feed-forward name": dict(feedforward=["nothing"]),
    "a half-wrong feed-forward list": dict(feedforward=["proj", "nothing"]),
    "a feed-forward norm": dict(feedforward=["norm"]),
    "a feed-forward string": dict(feedforward="proj"),
    "feedforward=True": dict(feedforward=True),
    "a wrong target beside a right feed-forward": dict(
        targets=["nothing"], feedforward=["proj"]
    ),
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
    elif kind == "nf4 kept as bfloat16":  # as for FSDP: packed, yet of a float dtype
        storage = dict(quant_storage=torch.bfloat16)
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", **storage)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(64, 64)).to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "nf4 kept as bfloat16", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_ia3_trains_over_a_packed_base_and_merge_refuses_it(kind):
    for sides in ((["0", "2"],), (["2"], ["0"])):
        torch.manual_seed(0)
        model, x = packed(kind), torch.randn(3, 64)
        plain = model(x)
        reference.add(model, *sides)
        assert model[0].ia3_l.dtype == torch.float32
        assert torch.equal(model(x), plain)
        codes = model[0].base.weight.data.view(torch.uint8).clone()
        model(x).pow(2).sum().backward()
        assert model[0].ia3_l.grad.any()
        weights = model[2].base.weight.clone(), model[2].base.bias.clone()
        with pytest.raises(ValueError, match="packed") as error:
            reference.merge(model)
        assert_one_sentence(error)
        assert isinstance(model[0], reference.IA3Linear)
        now = model[0].base.weight.data.view(torch.uint8)
        assert torch.equal(now, codes), "the packed codes moved"
        assert torch.equal(model[2].base.weight, weights[0]), (
            "half the model was merged"
        )
        assert torch.equal(model[2].base.bias, weights[1])


# How many numbers, as in the paper and in peft


@pytest.mark.parametrize(
    "d_model, d_ff, layers, heads, count",
    [
        (512, 1024, 8, 6, 34_816),  # T5 1.1 from small to XXL, which T0 has too
        (768, 2048, 12, 12, 104_448),
        (1024, 2816, 24, 16, 282_624),
        (2048, 5120, 24, 32, 540_672),
        (4096, 10240, 24, 64, 1_081_344),
    ],
)
def test_t5_trains_as_many_numbers_as_the_paper_says(
    d_model, d_ff, layers, heads, count
):
    sizes = dict(d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=heads)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**sizes, d_kv=64))
        reference.add(model, ["k", "v"], ["wo"])
    assert sum(t.numel() for t in reference.state_dict(model).values()) == count


def test_llama_7b_trains_614_400_numbers():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        reference.add(model, ["k_proj", "v_proj"], ["down_proj"])
    assert sum(t.numel() for t in reference.state_dict(model).values()) == 614_400


# The oracle: peft


FAMILIES = {**MODELS, "t5": t5}
SIDES = {  # peft's own choice for each; BERT's output.dense is in the attention as well
    "tiny-decoder": (["k_proj", "v_proj"], ["down_proj"]),
    "bert": (["key", "value"], ["output.dense"]),
    "bert-model": (["key", "value"], ["output.dense"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "t5": (["k", "v"], ["wo"]),
}


def twins(name):
    """Our model and peft's with the same vectors, and peft's by our names."""
    model, (targets, feedforward) = FAMILIES[name](), SIDES[name]
    config = IA3Config(
        target_modules=[*targets, *feedforward],
        feedforward_modules=feedforward,
        fan_in_fan_out=name == "gpt2",
    )
    twin = get_peft_model(copy.deepcopy(model), config).eval()
    fill(reference.add(model, targets, feedforward), reference)
    theirs = {
        n.removeprefix("base_model.model.").removesuffix(".default"): p
        for n, p in twin.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for n, t in reference.state_dict(model).items():
            assert t.shape == theirs[n].shape, f"{n} has another shape than peft's"
            theirs[n].copy_(t)
    return model, twin, theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_equal_pefts_before_and_after_training(name):
    model, twin, theirs = twins(name)
    ours = reference.state_dict(model, keep_vars=True)
    assert_same_training(model, ours, twin, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights_equal_pefts_and_unmerged_ones_the_base(name):
    model, twin, _ = twins(name)
    plain, tensors = FAMILIES[name]().state_dict(), saved(model, reference)
    assert_same_merged(reference.merge(model), twin.merge_and_unload())
    reference.unmerge(model, tensors)
    for n, t in model.state_dict().items():
        if not n.endswith("ia3_l"):
            assert_same(t, plain[n.replace(".base.", ".")], f"{n}, unmerged,")


# ia3.py copied alone, for tests/test_standalone.py

ALONE = """
import ia3
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x = torch.randn(5, 6)
plain = model(x)
ia3.add(model, ["0"], feedforward=["2"])
assert torch.equal(model(x), plain)
model(x).pow(2).sum().backward()
for p in ia3.state_dict(model, keep_vars=True).values():
    p.data -= 0.1 * p.grad
tuned = model(x)
assert not torch.allclose(tuned, plain)
tensors = {n: t.clone() for n, t in ia3.state_dict(model).items()}
ia3.load_state_dict(model, tensors)
merged = ia3.merge(model)
assert [type(m).__name__ for m in merged] == ["Linear", "Tanh", "Linear"]
assert torch.allclose(merged(x), tuned, atol=1e-5)
assert torch.allclose(ia3.unmerge(merged, tensors)(x), tuned, atol=1e-5)
"""

# Broken copies, for tests/test_mutations.py

ONES = "(1, n_in) if feedforward else (n_out, 1)"
ENTERS = "return self.base((scale * x).to(x.dtype))"
LEAVES = "return (scale * y).to(y.dtype)"
SIDE = "if self.feedforward:"
PRODUCT = "self.ia3_l * _weight(self.base)"
BIAS = "(self.ia3_l.flatten() * bias).to(bias.dtype)"
UNDO = "new[base].ia3_l.copy_(1 / vector)"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_adding_ia3_changes_no_output: {
        "the vectors start at zero": {"torch.ones(": "torch.zeros("},
        "the vectors start at random": {"torch.ones(": "torch.rand("},
    },
    test_every_vector_gets_a_gradient_at_once: {
        "the output vector is dead": {LEAVES: "return y + 0 * scale.sum()"},
        "the input vector is dead": {"(scale * x)": "(x + 0 * scale)"},
    },
    test_an_output_vector_rescales_what_comes_out_bias_and_all: {
        "the output side leaves the bias out": {
            LEAVES: "return (scale * (y - self.base.bias)).to(y.dtype)"
        },
        "the output side adds the vector": {"(scale * y)": "(y + scale - 1)"},
        "every vector is on the input side": {"m in inputs": "True"},
    },
    test_an_input_vector_rescales_what_goes_in_and_no_bias: {
        "the feed-forward side rescales what comes out": {
            ONES: "(n_out, 1)",
            SIDE: "if False:",
        },
        "every vector is on the output side": {"m in inputs": "False"},
    },
    test_the_shape_tells_the_side: {
        "the two sides are swapped": {"m in inputs": "m not in inputs"},
        "the vectors are flat": {ONES: "n_in if feedforward else n_out"},
        "a Conv1D's width is read the wrong way": {
            "layer.weight.shape[::-1]": "layer.weight.shape"
        },
    },
    test_feedforward_names_may_stand_in_targets_too_as_in_peft: {
        "a name in both lists is no feed-forward": {
            "(m, m in inputs)": "(m, m in inputs and m not in outputs)"
        },
        "a feed-forward name must stand in targets": {"[*inputs, *outputs]": "outputs"},
    },
    test_keys_and_values_can_be_told_apart: {
        "keys and values are swapped": {
            "t.copy_(tensors[name])": "t.copy_(tensors[name.replace('k_', 'v_') "
            "if 'k_' in name else name.replace('v_', 'k_')])"
        },
        "one vector for keys and values": {
            "_swap(model.requires_grad_(False), new)": "first = [*new.values()][0]\n"
            "    for layer in new.values():\n"
            "        layer.ia3_l.data = first.ia3_l.data\n"
            "    _swap(model.requires_grad_(False), new)"
        },
    },
    test_merged_equals_unmerged_on_either_side: {
        "merging forgets the bias": {BIAS: "bias"},
        "merging scales the bias on the input side too": {
            "if bias is None or self.feedforward:": "if bias is None:",
            "if bias is not None and not m.feedforward:": "if bias is not None:",
        },
        "a Conv1D is merged untransposed": {
            "W = W.T if _is_conv1d(layer) else W\n    W = W.to": "W = W.to"
        },
        "every weight is scaled on the wrong side": {
            PRODUCT: "_weight(self.base) * (self.ia3_l.T if self.ia3_l.numel() == "
            "len(_weight(self.base)) == _weight(self.base).shape[1] else self.ia3_l)"
        },
        "merging changes nothing": {PRODUCT: "_weight(self.base) * 1"},
    },
    test_a_16_bit_base_is_merged_once_to_its_own_precision: {
        "merging rounds twice": {
            PRODUCT: "self.ia3_l.to(self.base.weight.dtype) * _weight(self.base)"
        }
    },
    test_a_bias_past_the_dtype_is_refused_before_anything_changes: {
        "a bias goes past the dtype": {
            '_check_fits(f"{path}.bias", biases[m], biases[m].dtype)': "pass"
        }
    },
    test_unmerging_leaves_a_tied_weight_and_a_second_parent_alone: {
        "unmerging writes into a tied weight": {
            "layer.weight = nn.Parameter(W, requires_grad=False)": "layer.weight.data"
            ".copy_(W)"
        },
        "one parent of two gets the vector back": {
            "layers.get(child, child)": "layers.pop(child, child)"
        },
    },
    test_unmerging_gives_outputs_weights_and_vectors_back: {
        "unmerging multiplies again": {UNDO: "new[base].ia3_l.copy_(vector)"},
        "unmerging leaves the weights": {"_set_weight(base, m.folded())": "pass"},
        "unmerging takes peft's 1e-8": {
            UNDO: "new[base].ia3_l.copy_(1 / (vector + 1e-8))"
        },
        "unmerging gives back one over the vector": {
            "m.ia3_l.copy_(vectors[paths[base]])": "pass"
        },
    },
    test_unmerging_a_model_read_from_a_file_freezes_it: {
        "unmerging leaves the model to train": {
            "_swap(model.requires_grad_(False), new)": "_swap(model, new)"
        }
    },
    test_unmerging_refuses_what_cannot_be_undone: {
        "unmerging divides by zero": {
            "(vector / vector == 1).all()": "True",
            "_check_fits(paths[base], new[base].folded(), base.weight.dtype)": "pass",
        },
        "unmerging takes what is not a number": {
            "(vector / vector == 1).all()": "vector.all()",
            "_check_fits(paths[base], new[base].folded(), base.weight.dtype)": "pass",
        },
        "unmerging passes over unknown names": {"    if lost:": "    if False:"},
        "unmerging is done twice": {
            "    if names:\n        what": "    if False:\n        what"
        },
    },
    test_one_output_is_told_from_one_input: {
        "a vector of one number is taken for the input side": {
            "feedforward=vector.shape != (n_out, 1)": "feedforward=len(vector) == 1"
        }
    },
    test_the_vectors_are_float32_over_a_16_bit_base: {
        "the vectors are in the base's 16 bits": {
            "torch.float64 if W.dtype == torch.float64 else torch.float32": "W.dtype"
        },
        "the vectors are always in float32": {
            "torch.float64 if W.dtype == torch.float64 else ": ""
        },
        "the answer is in float32": {LEAVES: "return scale * y"},
    },
    every.test_only_what_the_state_dict_names_trains: {
        "the vectors are frozen too": {
            "for m in layers})": "for m in layers}).requires_grad_(False)"
        }
    },
}
MUTATIONS = by_fault(BROKEN)
