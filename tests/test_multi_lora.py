"""The laws of many adapters on one base, and a combination equal to peft's.

A law that takes only `multi_lora`, the module, is run again by tests/test_mutations.py
on broken copies of multi_lora.py. Messages name the mistake that gives the symptom.
"""

import copy
import math
from unittest.mock import Mock

import common
import pytest
import torch
from common import (
    ALL,
    IDS,
    MODELS,
    assert_same,
    assert_unchanged,
    by_fault,
    net,
    outputs,
    snapshot,
    train,
    trainable,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peftlab import bitfit, dora, lora, peft_files, surgery, vera
from peftlab import multi_lora as reference

TARGETS = {"fi": ALL, "pl": ["q_proj", "proj"], "tr": ["c_attn", "c_proj"]}
RANKS = {"fi": 2, "pl": 3, "tr": 1}


@pytest.fixture
def multi_lora():
    return reference


def fill(model, seed=1):
    """Random B's on the LoRA that is active."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in lora.state_dict(model).items():
        if name.endswith("lora_B"):
            t.copy_(torch.randn(t.shape, generator=generator) / 8)
    return model


def full(multi_lora, model=None):
    """A model with three adapters of other targets and ranks; the last one is active.
    Also their tensors, and what the model returns with each."""
    model, tensors, answers = model or net(), {}, {}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        r = RANKS[name]
        fill(multi_lora.add(model, name, targets, r=r, alpha=2 * r), seed)
        tensors[name] = {n: t.clone() for n, t in lora.state_dict(model).items()}
        answers[name] = model(IDS).detach()
    return model, tensors, answers


def deltas(tensors, scaling):
    """{path: s B A} of an adapter's tensors."""
    paths = {n.removesuffix(".lora_A") for n in tensors if n.endswith(".lora_A")}
    return {p: scaling * tensors[f"{p}.lora_B"] @ tensors[f"{p}.lora_A"] for p in paths}


def load(model, add, *args, **settings):
    """Put a method on a model that holds LoRAs, as `peft_files.load` may do."""
    adapters = vars(model).pop("lora_adapters")
    add(model, *args, **settings)
    model.lora_adapters = adapters


def held(model):
    """Every tensor of every held adapter, by its name and path; copies."""
    return {
        f"{k}:{path}.{n}": t.detach().clone()
        for k, layers in vars(model).get("lora_adapters", {}).items()
        for path, m in layers.items()
        for n, t in (("A", m.lora_A), ("B", m.lora_B))
    }


def refused(multi_lora, model, words, *calls):
    """Each call, (function, arguments after the model), raises one sentence with these
    words, and nothing has changed."""
    before, state = held(model), (multi_lora.names(model), multi_lora.active(model))
    for call, *arguments in calls:
        common.refused(model, words, call, *arguments)
        assert (multi_lora.names(model), multi_lora.active(model)) == state
        for name, t in held(model).items():
            assert torch.equal(before[name], t), f"{name} moved"


# The laws: hold and switch


def test_a_new_adapter_is_active_and_changes_no_output(multi_lora):
    model = net()
    assert multi_lora.names(model) == [] and multi_lora.active(model) is None
    for name in ("fi", "pl", "tr"):
        assert multi_lora.add(model, name, ["q_proj", "proj"]) is model
        assert multi_lora.active(model) == name == multi_lora.names(model)[-1]
        assert torch.equal(model(IDS), net()(IDS)), "the other adapter is still there"
        fill(model)
    assert multi_lora.names(model) == ["fi", "pl", "tr"]


def test_the_settings_are_loras(multi_lora):
    model, settings = net(), dict(r=3, alpha=5, dropout=0.25, rslora=True)
    multi_lora.add(model, "fi", ["q_proj"], **settings)
    twin = lora.add(net(), ["q_proj"], **settings).q_proj
    layer = model.q_proj
    for name in ("r", "alpha", "scaling", "rslora", "bias_mode"):
        assert getattr(layer, name) == getattr(twin, name), name
    assert layer.dropout.p == twin.dropout.p == 0.25


def test_switching_gives_each_adapters_outputs_and_tensors_to_the_bit(multi_lora):
    (model, tensors, answers), plain = full(multi_lora), net()
    for name in ("fi", None, "tr", "pl", "pl", None, "fi"):
        assert multi_lora.switch(model, name) is model
        assert multi_lora.active(model) == name
        want = plain(IDS) if name is None else answers[name]
        assert torch.equal(model(IDS), want), f"with {name} these are other outputs"
        own = {} if name is None else lora.state_dict(model)
        assert trainable(model) == own.keys(), "only the active one trains"
        assert all(torch.equal(t, tensors[name][n]) for n, t in own.items())
        if name is None:
            kinds = [(n, type(m)) for n, m in model.named_modules()]
            assert kinds == [(n, type(m)) for n, m in plain.named_modules()]
            for n, t in plain.state_dict().items():
                assert torch.equal(model.state_dict()[n], t), f"{n} of the base moved"


def test_training_one_leaves_the_others_and_the_base_bit_identical(multi_lora):
    model, _, answers = full(multi_lora)
    before = held(multi_lora.switch(model, "pl"))
    train(model)
    for name, t in held(model).items():
        same = torch.equal(t, before[name])
        assert same is not name.startswith("pl:"), f"{name} moved, or did not"
    for name in ("fi", "tr", None):
        want = net()(IDS) if name is None else answers[name]
        assert torch.equal(multi_lora.switch(model, name)(IDS), want)
    assert not torch.equal(multi_lora.switch(model, "pl")(IDS), answers["pl"])


def test_an_adapter_comes_back_in_the_models_mode(multi_lora):
    model = multi_lora.add(net(), "fi", ["proj"], r=2, dropout=0.5)
    fill(model)
    multi_lora.switch(model, None).train()
    assert multi_lora.switch(model, "fi").proj.training
    multi_lora.switch(model, None).eval()
    multi_lora.switch(model, "fi")
    assert not any(m.training for m in model.modules()), "dropout is on in eval mode"
    assert torch.equal(model(IDS), model(IDS))


def test_what_is_refused_leaves_the_active_one_on(multi_lora):
    add, keep, combine = multi_lora.add, multi_lora.keep, multi_lora.combine
    for active in ("pl", None):
        model = multi_lora.switch(full(multi_lora)[0], active)
        answer = model(IDS)
        for name in ("fi", "pl", "", "  ", None, ["fi"]):
            calls = (add, name, ["proj"]), (keep, name), (combine, {"fi": 1}, name)
            refused(multi_lora, model, "already|needs a name", *calls)
        for name in ("sw", "", 3):
            calls = (multi_lora.switch, name), (multi_lora.forget, name)
            calls += ((combine, {name: 1}, "x"),)
            refused(multi_lora, model, "'fi', 'pl', 'tr'", *calls)
        for bad in ([["q_proj", "nothing"]], [["proj"], 0], [["proj"], 2, -1]):
            refused(multi_lora, model, "", (add, "sw", *bad))
        assert torch.equal(model(IDS), answer)


def test_a_lora_without_a_name_is_kept_under_one_or_refused(multi_lora):
    model = multi_lora.switch(full(multi_lora)[0], None)
    load(model, lora.add, ["q_proj"], r=2)
    answer = fill(model, 7)(IDS)
    calls = [(multi_lora.switch, "fi"), (multi_lora.switch, None)]
    calls += [(multi_lora.add, "sw", ["proj"]), (multi_lora.combine, {"fi": 1}, "sw")]
    refused(multi_lora, model, "without a name", *calls)
    assert multi_lora.keep(model, "sw") is model and multi_lora.active(model) == "sw"
    multi_lora.switch(model, "fi")
    assert torch.equal(multi_lora.switch(model, "sw")(IDS), answer)
    biases = lora.add(net(), ["q_proj"], bias="lora_only")
    for other, words in ((net(), "no LoRA"), (model, "no LoRA"), (biases, "biases")):
        refused(multi_lora, other, words, (multi_lora.keep, "x"))


def test_a_forgotten_adapter_is_gone(multi_lora):
    model, _, answers = full(multi_lora)
    multi_lora.switch(model, "pl")
    assert multi_lora.forget(model, "fi") is model
    assert multi_lora.names(model) == ["pl", "tr"] and multi_lora.active(model) == "pl"
    assert torch.equal(model(IDS), answers["pl"]), "forgetting another moved outputs"
    multi_lora.forget(model, "pl")
    assert multi_lora.names(model) == ["tr"] and multi_lora.active(model) is None
    assert torch.equal(model(IDS), net()(IDS)), "a forgotten adapter is taken off"
    multi_lora.add(model, "pl", ["proj"])  # its name is free again
    assert multi_lora.names(model) == ["tr", "pl"]
    for name in ("tr", "pl"):
        multi_lora.forget(model, name)
    try:
        dora.add(model, ["proj"])
    except ValueError:
        pytest.fail("the model holds no adapters any more")


def test_a_layer_with_two_parents_is_switched_in_both(multi_lora):
    shared, x = nn.Linear(6, 6).double(), torch.ones(1, 6, dtype=torch.float64)
    model = nn.ModuleDict({k: nn.ModuleDict({"up": shared}) for k in "ab"})
    plain = shared(x)
    fill(multi_lora.add(model, "fi", ["up"], r=2))
    assert model["a"]["up"] is model["b"]["up"] is not shared
    multi_lora.switch(model, None)
    assert model["a"]["up"] is model["b"]["up"] is shared
    multi_lora.switch(model, "fi")
    assert model["a"]["up"] is model["b"]["up"]
    assert not torch.equal(model["b"]["up"](x), plain)


def test_layers_that_have_left_the_model_are_noticed(multi_lora):
    for name in (None, "pl"):  # while it waits, and while it is on
        model = multi_lora.switch(full(multi_lora)[0], name)
        model.proj = nn.Linear(12, 12, bias=False).double()  # say, a packed one
        assert multi_lora.active(model) == name, "the rest of it is still there"
        both = (multi_lora.combine, {"tr": 1, "pl": 1}, "sum")
        words = "left the model.*proj"
        refused(multi_lora, model, words, (multi_lora.switch, "pl"), both)
        multi_lora.switch(model, "tr")  # it is on other layers
        multi_lora.forget(model, "pl")


def test_another_method_meanwhile_is_noticed(multi_lora):
    model = multi_lora.switch(full(multi_lora)[0], None)
    calls = (dora.add, ["proj"]), (vera.add, ["proj"]), (bitfit.add,)
    refused(multi_lora, model, "carries LoRAs", *calls)
    load(model, dora.add, ["proj"], r=2)
    calls = (multi_lora.switch, "fi"), (multi_lora.combine, {"fi": 1}, "sum")
    refused(multi_lora, model, "carries DoRA now", *calls)
    answer = model(IDS)
    dora.merge(model)
    assert (multi_lora.switch(model, None)(IDS) - answer).abs().max() < 1e-10
    multi_lora.switch(model, "fi")


# The laws: what else is done with a model


def test_a_deepcopy_stands_on_its_own(multi_lora):
    model, _, answers = full(multi_lora)
    twin = copy.deepcopy(multi_lora.switch(model, "pl"))
    assert multi_lora.names(twin) == multi_lora.names(model)
    assert multi_lora.active(twin) == "pl"
    before = held(model)
    train(multi_lora.switch(twin, "fi"))
    multi_lora.forget(twin, "tr")
    assert multi_lora.names(model) == ["fi", "pl", "tr"]
    assert all(torch.equal(t, before[n]) for n, t in held(model).items())
    for name, answer in answers.items():
        assert torch.equal(multi_lora.switch(model, name)(IDS), answer), "it shares"
    assert not torch.equal(twin(IDS), answers["fi"])


def test_the_base_may_change_its_precision_while_others_wait(multi_lora):
    model, _, answers = full(multi_lora, net().float())
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        twin = multi_lora.switch(copy.deepcopy(model), "tr").to(dtype)
        for name in ("fi", "pl", "tr"):
            got = multi_lora.switch(twin, name)(IDS)
            assert got.dtype == dtype
            want = answers[name].to(dtype)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_functions_of_lora_work_on_the_active_one(multi_lora):
    model, tensors, answers = full(multi_lora)
    one = multi_lora.switch(model, "pl")
    two = multi_lora.add(net(), "x", TARGETS["pl"], 3, 6)
    lora.load_state_dict(two, lora.state_dict(one))
    assert torch.equal(two(IDS), answers["pl"])
    merged = lora.merge(copy.deepcopy(one))
    assert (merged(IDS) - answers["pl"]).abs().max() < 1e-10
    assert multi_lora.active(merged) is None and multi_lora.active(model) == "pl"
    twin = lora.add(net(), ALL, r=2, alpha=4)
    lora.load_state_dict(twin, tensors["fi"])
    assert torch.equal(twin(IDS), answers["fi"]), "an adapter is no other than LoRA's"


# The laws: combine


def test_a_combination_is_the_weighted_sum_of_the_products(multi_lora):
    model, tensors, answers = full(multi_lora)
    before = held(model)
    for weights in (
        {"fi": 0.5, "pl": 0.5},
        {"pl": 1, "tr": -0.75},
        {"tr": 2.0, "fi": -1.0, "pl": 0.3},
        {"pl": -1},
        {"fi": 0, "pl": 1},
    ):
        assert multi_lora.combine(model, weights, "sum") is model
        assert multi_lora.active(model) == "sum"
        got, want, summed = deltas(lora.state_dict(model), 2), {}, net()
        for name, weight in weights.items():
            for path, delta in deltas(tensors[name], 2).items():
                want[path] = want.get(path, 0) + weight * delta
        assert got.keys() == want.keys(), "on every layer that one of them is on"
        for path, delta in want.items():
            gap = (got[path] - delta).abs().max()
            assert gap < 1e-12, (
                f"{path} is off by {gap:.1e}: the sum is of the products B A, not of"
                " the A's and the B's"
            )
            conv = path in ("c_attn", "c_proj")
            summed.get_parameter(f"{path}.weight").data += delta.T if conv else delta
        for m in (model, lora.merge(copy.deepcopy(model))):
            assert (m(IDS) - summed(IDS)).abs().max() < 1e-12, "outputs"
        r = sum(RANKS[name] for name in weights)
        for m in multi_lora.switch(model, "sum").modules():
            if isinstance(m, lora.LoRALinear):
                assert m.r == len(m.lora_A) == r, "the rank is the sum of the ranks"
                assert math.isclose(m.scaling, 2), "the parts' own scaling"
                assert math.isclose(m.alpha, 2 * r)
        train(model)  # it is an adapter of its own
        now = held(model)
        assert before.keys() < now.keys(), "a part is gone"
        assert all(torch.equal(now[n], t) for n, t in before.items()), "a part moved"
        multi_lora.forget(model, "sum")
    multi_lora.combine(model, {"fi": 1, "pl": 1}, "sum")
    multi_lora.combine(model, {"sum": 1, "pl": -1}, "difference")
    assert (model(IDS) - answers["fi"]).abs().max() < 1e-12, "a sum can be a part"
    assert multi_lora.names(model) == ["fi", "pl", "tr", "sum", "difference"]


def test_one_adapter_at_weight_one_is_itself(multi_lora):
    model = net()
    for rslora in (False, True):
        name = f"rslora={rslora}"
        multi_lora.add(model, name, ALL, r=3, alpha=16, rslora=rslora)
        answer = fill(model)(IDS)
        layer = multi_lora.combine(model, {name: 1}, f"{name} again").proj
        assert torch.equal(model(IDS), answer), "the scaling differs in its last digit"
        assert (layer.r, layer.alpha, layer.rslora) == (3, 16, rslora)


def test_rslora_adapters_of_one_scaling_add_up(multi_lora):
    model, scaling = net(), 8 / math.sqrt(2)
    for seed, (name, r) in enumerate({"a": 2, "b": 8}.items()):
        alpha = scaling * math.sqrt(r)
        fill(multi_lora.add(model, name, ["proj"], r, alpha, rslora=True), seed)
    parts = [multi_lora.switch(model, k).proj for k in "ab"]
    want = scaling * (parts[0].lora_B @ parts[0].lora_A)
    want = want - 0.5 * scaling * (parts[1].lora_B @ parts[1].lora_A)
    layer = multi_lora.combine(model, {"a": 1, "b": -0.5}, "sum").proj
    torch.testing.assert_close(layer.scaling * (layer.lora_B @ layer.lora_A), want)


def test_unequal_scalings_are_refused_with_the_reason(multi_lora):
    model = full(multi_lora)[0]
    multi_lora.add(model, "sw", ["proj"], r=2, alpha=16)
    combine = (multi_lora.combine, {"fi": 1, "sw": 1}, "sum")
    refused(multi_lora, model, "different scalings.*(2.0, 8.0|8.0, 2.0)", combine)
    third = 16 / math.sqrt(8)  # rsLoRA's, reached in another way
    multi_lora.add(model, "a", ["proj"], r=8, alpha=16, rslora=True)
    multi_lora.add(model, "b", ["proj"], r=3, alpha=3 * third * (1 + 1e-15))
    try:
        multi_lora.combine(model, {"a": 1, "b": 1}, "sum")
    except ValueError:
        pytest.fail("these scalings are equal up to rounding")


def test_wrong_weights_are_refused(multi_lora):
    model = full(multi_lora, net().float())[0]
    wrong = [{}, [], None, "fi", [("fi", 1.0)]]
    values = (math.nan, math.inf, "1", None, True, 10**400)
    wrong += [{"fi": 1, "pl": value} for value in values]
    large = [{"fi": 1, "tr": value} for value in (1e200, -(10**45))]
    for words, every in (("^weights must", wrong), ("NaN or infinite", large)):
        calls = [(multi_lora.combine, weights, "sum") for weights in every]
        refused(multi_lora, model, words, *calls)


# What no broken copy is tried on


def test_an_interrupt_in_lora_leaves_the_active_one_on():
    model = full(reference)[0]
    before, names = snapshot(model), reference.names(model)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(surgery, "select", Mock(side_effect=KeyboardInterrupt))
        reference.add(model, "sw", ["q_proj"])
    assert_unchanged(model, before)
    assert reference.active(model) == "tr" and reference.names(model) == names


def test_a_compiled_model_has_plain_names():
    model, tensors, answers = full(reference)
    compiled = torch.compile(model, backend="eager")
    for name, answer in answers.items():
        assert torch.equal(reference.switch(compiled, name)(IDS), answer)
        assert lora.state_dict(compiled).keys() == tensors[name].keys()
    reference.add(compiled, "sw", ["proj"])
    reference.combine(compiled, {"fi": 1}, "again")
    assert (compiled(IDS) - answers["fi"]).abs().max() < 1e-12
    reference.forget(compiled, "again")
    assert reference.names(model) == ["fi", "pl", "tr", "sw"]


def test_what_is_no_plain_model_is_refused():
    container = nn.DataParallel(full(reference)[0])
    for model, words in ((container, "wrapped by"), (None, "nn.Module")):
        for call, *arguments in (
            (reference.add, "sw", ["proj"]),
            (reference.keep, "sw"),
            (reference.names,),
            (reference.active,),
            (reference.switch, "fi"),
            (reference.switch, None),
            (reference.combine, {"fi": 1}, "sum"),
            (reference.forget, "fi"),
        ):
            common.refused(model, words, call, *arguments)


def test_adapters_go_to_files_and_come_back_under_names(tmp_path):
    model, _, answers = full(reference)
    reference.combine(model, {"fi": 0.5, "tr": -2}, "sum")
    answers["sum"] = model(IDS).detach()
    for name in answers:
        peft_files.save(reference.switch(model, name), tmp_path / name)
    fresh = net()
    for name in answers:
        peft_files.load(reference.switch(fresh, None), tmp_path / name)
        reference.keep(fresh, name)
    assert reference.names(fresh) == reference.names(model)
    for name, answer in answers.items():
        torch.testing.assert_close(reference.switch(fresh, name)(IDS), answer)
    assert torch.equal(reference.switch(fresh, None)(IDS), net()(IDS))


# The oracle: peft, which holds and combines too


def peft_twin(model, adapters):
    """peft's model with the same adapters as ours."""
    twin = None
    for name, (targets, tensors) in adapters.items():
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        if twin is None:
            twin = get_peft_model(model, config, adapter_name=name)
        else:
            twin.add_adapter(name, config)
        own = dict(twin.named_parameters())
        for n, t in tensors.items():
            own[f"base_model.model.{n}.{name}.weight"].data.copy_(t)
    return twin.eval()


PARTS = {
    "tiny-decoder": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


@torch.no_grad()
@pytest.mark.parametrize("family", PARTS)
def test_switching_and_combining_give_the_numbers_of_pefts(family, tmp_path):
    model, adapters = MODELS[family](), {}
    plain, names = copy.deepcopy(model), PARTS[family]
    for seed, (name, targets) in enumerate({"fi": names, "pl": names[:2]}.items()):
        fill(reference.add(model, name, targets, r=4, alpha=8), seed)
        adapters[name] = targets, lora.state_dict(model)
    twin = peft_twin(copy.deepcopy(plain), adapters)
    for name in adapters:
        twin.set_adapter(name)
        assert_same(outputs(reference.switch(model, name)), outputs(twin), name)
    combined = outputs(reference.combine(model, {"fi": 2, "pl": -0.75}, "sum"))
    for kind in ("cat", "linear"):
        parts = ["fi", "pl"], [2, -0.75], kind
        twin.add_weighted_adapter(*parts, combination_type=kind)
    twin.set_adapter("cat")
    assert_same(combined, outputs(twin), 'the combination, peft\'s "cat",')
    twin.set_adapter("linear")  # one's B meets another's A
    assert (outputs(twin) - combined).abs().max() > 0.01, "the docstring is wrong"
    peft_files.save(model, tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert_same(combined, outputs(loaded), "the combination in a file")


# multi_lora.py and lora.py copied alone, for tests/test_standalone.py

ALONE = """
from mine import multi_lora, lora
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x, deltas = torch.randn(5, 6), {}
plain = model(x)
for name, targets in (("fi", ["0", "2"]), ("pl", ["2"])):
    multi_lora.add(model, name, targets, r=2, alpha=4)
    assert torch.equal(model(x), plain)
    for p in lora.state_dict(model).values():
        p += 0.1
    deltas[name] = 2 * model[2].lora_B @ model[2].lora_A
assert multi_lora.names(model) == ["fi", "pl"] and multi_lora.active(model) == "pl"
assert not torch.equal(model(x), plain)
assert torch.equal(multi_lora.switch(model, None)(x), plain)
multi_lora.combine(model, {"fi": 1, "pl": -0.5}, "both")
weight = model[2].base.weight + deltas["fi"] - 0.5 * deltas["pl"]
assert torch.allclose(lora.merge(model)[2].weight, weight, atol=1e-6)
multi_lora.forget(model, "both")
"""

# Broken copies, for tests/test_mutations.py

ON = "surgery.swap(model, {layer.base: layer for layer in layers.values()})"
OFF = "surgery.swap(model, {layer: layer.base for layer in in_model.values()})"
A = "layers[path].lora_A"
B = "weight * layers[path].lora_B"
EVERY = "parts.values() for path, m in"
TO = "to(layer.base.weight.device)"
ALPHA = "first.scaling * sum(map(_rank, parts.values())), False"
KEPT = "    return _hold(model, {**_adapters(model), name: layers})"
NAMED = "if active(model) == name:"
LOOP = "    for i, m in enumerate(layers.values()):\n        "
APART = "if max(scalings) > min(scalings) * (1 + 1e-9):"

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_a_new_adapter_is_active_and_changes_no_output: {
        "a new adapter's B is not zero": {
            KEPT: f"{LOOP}torch.nn.init.ones_(m.lora_B)\n{KEPT}"
        },
        "names come in reverse": {
            "list(_adapters(model))": "[*_adapters(model)][::-1]"
        },
    },
    test_the_settings_are_loras: {
        "dropout is forgotten": {'alpha, dropout, "none"': 'alpha, 0.1, "none"'},
        "rsLoRA is forgotten": {'dropout, "none", rslora': 'dropout, "none", False'},
    },
    test_switching_gives_each_adapters_outputs_and_tensors_to_the_bit: {
        "switching puts nothing on": {ON: "pass"},
        "switching takes nothing off": {OFF: f"None if name else {OFF}"},
        "switching merges": {OFF: "lora.merge(model) if in_model else None"},
        "the active one is the last to come": {
            "            return name\n": "            return [*_adapters(model)][-1]\n"
        },
        "the base trains once the adapter is off": {
            OFF: f"{OFF}; model.requires_grad_()"
        },
        "the waiting ones are seen too": {
            KEPT: f'{LOOP}model.register_parameter(f"{{name}}_{{i}}", m.lora_A)\n{KEPT}'
        },
    },
    test_training_one_leaves_the_others_and_the_base_bit_identical: {
        "one adapter's tensors serve all": {
            KEPT: "    for p, m in next(iter(_adapters(model).values()), {}).items():\n"
            "        if p in layers and m.r < layers[p].r:\n"
            "            m.lora_A.data = layers[p].lora_A.data[: m.r]\n"
            f"{KEPT}"
        },
    },
    test_an_adapter_comes_back_in_the_models_mode: {
        "dropout stays as it was when it was put aside": {".train(model.training)": ""},
    },
    test_what_is_refused_leaves_the_active_one_on: {
        "an empty name is taken": {"or not name.strip()": ""},
        "an adapter is overwritten": {"if name in adapters:": "if False:"},
        "an unknown name means none": {
            "if not isinstance(name, str) or name not in adapters:": "if False:",
            "return adapters[name]": "return adapters.get(name, {})",
        },
        "a refusal takes the active one off": {"        switch(model, before)\n": ""},
    },
    test_a_lora_without_a_name_is_kept_under_one_or_refused: {
        "a nameless LoRA is thrown away": {
            "if in_model and active(": "if 0 and active("
        },
        "a held LoRA is held twice": {" or active(model) is not None": ""},
        "trained biases are lost": {'layer.bias_mode != "none"': "False"},
        "nothing is kept": {"if not layers or active": "if active"},
    },
    test_a_forgotten_adapter_is_gone: {
        "forgetting leaves it on the model": {NAMED: "if False:"},
        "forgetting takes the active one off": {NAMED: "if True:"},
        "forgetting forgets all": {"if k != name}": "if False}"},
        "once all are forgotten the model still holds some": {
            "return _hold(model, rest)": "model.lora_adapters = rest\n    return model"
        },
    },
    test_a_layer_with_two_parents_is_switched_in_both: {
        "one parent of two is switched": {ON: ON.replace("model", "model['a']")},
    },
    test_layers_that_have_left_the_model_are_noticed: {
        "a layer that has left is passed over": {"    if lost:": "    if False:"},
        "an adapter that lost a layer has lost its name": {
            "in_model <=": "in_model =="
        },
    },
    test_another_method_meanwhile_is_noticed: {
        "an adapter goes beneath another method": {"if layers and k": "if 0 and k"},
    },
    test_a_deepcopy_stands_on_its_own: {
        "the adapters are held beside the model, not in it": {
            'return getattr(model, "lora_adapters", {})': "return HELD",
            "plain.lora_adapters = ": "globals()['HELD'] = plain.lora_adapters = ",
            "import torch\n": "import torch\n\nHELD = {}\n",
        },
    },
    test_the_base_may_change_its_precision_while_others_wait: {
        "a waiting adapter keeps its base's old precision": {TO: "float()"},
    },
    test_the_functions_of_lora_work_on_the_active_one: {
        "the active one is not LoRA's own": {KEPT: f"{LOOP}m.scaling *= 1.5\n{KEPT}"},
    },
    test_a_combination_is_the_weighted_sum_of_the_products: {
        "the A's and B's are added, not the products": {
            "[start:stop] =": "[: stop - start] +=",
            "[:, start:stop] =": "[:, : stop - start] +=",
        },
        "the weights are forgotten": {B: B.removeprefix("weight * ")},
        "the weight is on A and on B": {A: f"weight * {A}"},
        "a negative weight is taken as positive": {B: f"abs({B[:6]}){B[6:]}"},
        "layers of the first adapter alone": {
            EVERY: f"[*{EVERY[:14]}][:1]{EVERY[14:]}"
        },
        "the ranks overlap": {"start = stop\n": "start += 1\n"},
        "the weights are squared in what comes out": {B: f"abs(weight) * {B}"},
        "a combination has the alpha of one": {ALPHA: "first.alpha, False"},
        "a combination's scaling is one": {
            ALPHA: ALPHA.removeprefix("first.scaling * "),
            B: f"layers[path].scaling * {B}",
        },
        "a combination is filled up with A's noise": {"r = sum(": "r = 8 + 0 * sum("},
        "combining scales the parts": {B: "layers[path].lora_B.mul_(weight)"},
        "the parts are dropped": {"{**_adapters(model), name: st": "{name: st"},
        "a combination has the first part's rank on paper": {
            "lora_A.zero_()": "lora_A.zero_(); layer.r = _rank([*parts.values()][0])"
        },
    },
    test_one_adapter_at_weight_one_is_itself: {
        "a single one loses its settings": {"if len(parts) == 1:": "if False:"},
    },
    test_rslora_adapters_of_one_scaling_add_up: {
        "an rsLoRA's alpha is taken for the sum": {ALPHA: "first.alpha, first.rslora"},
    },
    test_unequal_scalings_are_refused_with_the_reason: {
        "unequal scalings are added up": {APART: "if False:"},
        "a last digit counts as another scaling": {APART: "if len(scalings) > 1:"},
    },
    test_wrong_weights_are_refused: {
        "what is no number is a weight": {" and -1e300 < value < 1e300": ""},
        "no weights are a combination": {
            "if not weights:": "if not weights:\n        return model\n    if 0:"
        },
        "B may be infinite": {"surgery.check_fits(": "(lambda *_: 0)("},
    },
}
MUTATIONS = by_fault(BROKEN)
