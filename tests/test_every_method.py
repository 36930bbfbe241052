"""What holds for every method that wraps linear layers, tried on each of them.

A law takes only `method`, the module. The files of the single methods name laws of this
one among their MUTATIONS, so that each is seen to fail on broken copies.
"""

import copy
import importlib
import inspect

import bitsandbytes
import pytest
import torch
from common import (
    ALL,
    IDS,
    SMALL,
    Net,
    assert_one_sentence,
    assert_unchanged,
    jiggle,
    net,
    snapshot,
    train,
    trainable,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

NAMES = ("lora", "dora", "pissa", "vera", "ia3")
METHODS = {name: importlib.import_module(f"peftlab.{name}") for name in NAMES}


@pytest.fixture(params=NAMES)
def method(request):
    return METHODS[request.param]


def put(method, model, targets=ALL):
    """`model` with the method on its targets, of rank 2 where the method has a rank."""
    rank = {"r": 2} if "r" in inspect.signature(method.add).parameters else {}
    return method.add(model, targets, **rank)


def stir(method, model, seed=5):
    """All that the method trains a little different, so that it says something."""
    jiggle(method.state_dict(model).values(), seed)
    return model


def paths(method, model):
    return {name.rpartition(".")[0] for name in method.state_dict(model)}


class Head(nn.Module):
    """Says how wide its input is and is no linear, as ESM's contact head does."""

    def __init__(self):
        super().__init__()
        self.in_features, self.regression = 6, nn.Linear(6, 2)

    def forward(self, x):
        return self.regression(x)


# The laws: at the start


def test_adding_changes_no_output(method):
    for kind in (net, lambda: net().train()):
        gap = (put(method, kind())(IDS) - net()(IDS)).abs().max()
        assert gap < 1e-12, f"outputs moved by {gap:.1e} at step 0"


def test_only_what_the_state_dict_names_trains(method):
    model = put(method, net())
    own = method.state_dict(model, keep_vars=True)
    assert trainable(model) == own.keys(), (
        "what trains is not what the state dict names: is the base frozen, are the"
        " method's own tensors, is one of them forgotten?"
    )
    assert all(model.get_parameter(n) is p for n, p in own.items())
    assert paths(method, model) == set(ALL), "a tensor's name is its layer's path first"
    for name, t in method.state_dict(model).items():
        assert not t.requires_grad and t.data_ptr() == own[name].data_ptr()


def test_all_linear_takes_what_has_two_widths(method):
    model = nn.Sequential(nn.Linear(6, 6), Head())
    try:
        put(method, model, "all-linear")
    except AttributeError as error:
        pytest.fail(f"a module with one width was taken for a linear: {error}")
    assert paths(method, model) == {"0", "1.regression"}


def test_the_new_layers_are_in_the_models_mode(method):
    assert not any(m.training for m in put(method, net()).modules())
    assert all(m.training for m in put(method, net().train()).modules())


def test_own_tensors_are_float32_over_a_16_bit_base(method):
    for dtype in (torch.bfloat16, torch.float16):
        model = put(method, nn.Sequential(nn.Linear(6, 6).to(dtype)), ["0"])
        own = method.state_dict(stir(method, model), keep_vars=True)
        assert {p.dtype for p in own.values()} == {torch.float32}, "16 bits are too few"
        y = model(torch.randn(3, 6, dtype=dtype))
        assert y.dtype == dtype, "the layer must answer in its base's precision"
        y.float().pow(2).sum().backward()
        assert all(p.grad.any() for p in own.values())
        weight = method.merge(model)[0].weight
        assert weight.dtype == dtype, "merging must keep the base's precision"


def test_a_model_on_the_meta_device_gets_the_same_shapes(method):
    with torch.device("meta"):
        model = Net().double()
    put(method, model)
    assert all(p.is_meta for p in model.parameters())
    real = {n: t.shape for n, t in method.state_dict(put(method, net())).items()}
    assert {n: t.shape for n, t in method.state_dict(model).items()} == real
    shapes = {n: t.shape for n, t in method.merge(model).state_dict().items()}
    assert shapes == {n: t.shape for n, t in net().state_dict().items()}


# The laws: training


def test_frozen_weights_are_bit_identical_after_training(method):
    model = stir(method, put(method, net()))
    own, before = method.state_dict(model), snapshot(model)[0]
    train(model)
    for name, t in model.state_dict().items():
        moved = not torch.equal(t, before[name])
        assert name in own or not moved, f"{name} is frozen, and yet it moved"
        assert moved or name not in own, f"{name} did not train"


def test_train_and_eval_change_no_weight(method):
    model = stir(method, put(method, net()))
    before, plain = snapshot(model)[0], model(IDS)
    model.train().eval().train()
    assert torch.equal(model(IDS), plain), "a mode changed the outputs"
    after = snapshot(model.eval())[0]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before), "a mode merged"


def test_a_deepcopy_stands_on_its_own(method):
    model = stir(method, put(method, net()))
    twin, before, plain = copy.deepcopy(model), snapshot(model)[0], model(IDS)
    assert torch.equal(twin(IDS), plain), "the copy gives other outputs"
    assert trainable(twin) == trainable(model)
    assert len([*twin.parameters()]) == len([*model.parameters()])
    train(twin)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    gap = (method.merge(twin)(IDS) - plain).abs().max()
    assert gap > 1e-6 and torch.equal(model(IDS), plain), "the copy shares tensors"


def test_a_model_can_be_moved_to_another_precision(method):
    model = stir(method, put(method, net().float()))
    single = model(IDS)
    double = copy.deepcopy(model).double()
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    torch.testing.assert_close(double(IDS).float(), single, rtol=1e-4, atol=1e-5)
    wrapped = double(IDS)
    assert (method.merge(double)(IDS) - wrapped).abs().max() < 1e-10
    half = copy.deepcopy(model).bfloat16()
    assert half(IDS).dtype == torch.bfloat16
    torch.testing.assert_close(half(IDS).float(), single, rtol=0.1, atol=0.1)
    train(half, 1)
    assert method.merge(half)(IDS).isfinite().all()


# The laws: merging


def test_merged_equals_unmerged_to_1e_10_in_float64(method):
    model = train(stir(method, put(method, net())))
    wrapped = model(IDS)
    assert (wrapped - net()(IDS)).abs().max() > 1e-3
    gap = (method.merge(model)(IDS) - wrapped).abs().max()
    assert gap < 1e-10, (
        f"merging moved the outputs by {gap:.1e}: is a product transposed (W is"
        " (out, in), a Conv1D's (in, out)), or something left out?"
    )


def test_merging_leaves_plain_frozen_layers(method):
    model, plain = method.merge(stir(method, put(method, net()))), net()
    kinds = [(n, type(m)) for n, m in model.named_modules()]
    assert kinds == [(n, type(m)) for n, m in plain.named_modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not trainable(model), "a merged model is frozen"
    for name, t in model.state_dict().items():
        same = t.is_contiguous() and t.shape == plain.state_dict()[name].shape
        assert same, f"{name} is not laid out as it was"
    put(method, model)  # and it may come again


def test_a_tied_weight_is_left_alone(method):
    model = net()
    model.lm_head = nn.Linear(6, 11, bias=False).double()
    model.lm_head.weight = model.embed.weight
    model.proj = nn.Linear(12, 6, bias=False).double()
    embedding, plain = model.embed.weight.detach().clone(), model(IDS)
    put(method, model, ["lm_head"])
    assert torch.equal(model.embed.weight, embedding), "adding moved the embedding"
    assert (model(IDS) - plain).abs().max() < 1e-12
    wrapped = stir(method, model)(IDS)
    method.merge(model)
    assert torch.equal(model.embed.weight, embedding), "merging moved the embedding"
    assert (model(IDS) - wrapped).abs().max() < 1e-10


def test_a_linear_with_two_parents_is_wrapped_once_and_merged_once(method):
    shared = nn.Linear(6, 6).double()
    model = nn.ModuleDict({k: nn.ModuleDict({"up": shared}) for k in "ab"})
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = shared(x)
    put(method, model, ["up"])
    assert model["a"]["up"] is model["b"]["up"], "one linear got two wrappers"
    assert paths(method, model) == {"a.up"}
    assert (model["b"]["up"](x) - plain).abs().max() < 1e-12
    wrapped = stir(method, model)["b"]["up"](x)
    method.merge(model)
    assert model["a"]["up"] is model["b"]["up"] is shared
    gap = (model["b"]["up"](x) - wrapped).abs().max()
    assert gap < 1e-10, "the shared weight was merged twice, or in one parent only"


# The laws: tensors in and out


def test_the_state_dict_goes_round(method):
    one, two = train(stir(method, put(method, net()))), put(method, net())
    tensors = {n: t.clone() for n, t in method.state_dict(one).items()}
    method.load_state_dict(two, tensors)
    assert torch.equal(one(IDS), two(IDS)), "something trained was not carried over"
    assert trainable(two) == trainable(one)


def test_loading_is_strict(method):
    model = stir(method, put(method, net()))
    good = {n: t.clone() + 1 for n, t in method.state_dict(model).items()}
    name, t = next(iter(good.items()))
    before = snapshot(model)
    bad = [
        {},
        *({n: t for n, t in good.items() if n != left_out} for left_out in good),
        {**good, name.rpartition(".")[0] + ".another": torch.zeros(2)},
        {**good, name: t[..., :-1]},
        {**good, name: t[None]},
        {**good, name: None},
    ]
    for tensors in bad:
        with pytest.raises(ValueError) as error:
            method.load_state_dict(model, tensors)
        assert_one_sentence(error)
        assert_unchanged(model, before)
    method.load_state_dict(model, good)
    loaded = method.state_dict(model)
    assert all(torch.equal(loaded[n], t) for n, t in good.items())


# The laws: targets


def test_all_linear_leaves_out_the_output_head(method):
    model = put(method, net(), "all-linear")
    assert paths(method, model) == set(ALL), "all-linear is every linear but the head"


def test_a_target_matches_whole_names_from_the_end(method):
    def chosen(*targets):
        first = {k: nn.Linear(2, 2) for k in ("q_proj", "proj")}
        parts = {"first": first, "other": {"proj": nn.Linear(2, 2)}}
        model = nn.ModuleDict({k: nn.ModuleDict(v) for k, v in parts.items()})
        return paths(method, put(method, model, list(targets)))

    assert chosen("proj") == {"first.proj", "other.proj"}, '"proj" is not "q_proj"'
    assert chosen("first.proj") == {"first.proj"}
    assert chosen("q_proj", "other.proj") == {"first.q_proj", "other.proj"}


def test_a_half_wrong_target_list_is_refused(method):
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="no_such_proj") as error:
        put(method, model, ["q_proj", "no_such_proj"])
    assert "c_attn" in str(error.value), "the message must list what there is"
    assert_unchanged(model, before)


def test_adding_twice_is_refused(method):
    model = put(method, net(), ["q_proj"])
    before = snapshot(model)
    for targets in (["q_proj"], ["proj"]):
        with pytest.raises(ValueError, match="already") as error:
            put(method, model, targets)
        assert_one_sentence(error)
        assert_unchanged(model, before)
    put(method, method.merge(model), ["q_proj"])  # once it is merged, it may come again


def test_fused_experts_are_refused_by_their_share(method):
    moe = dict(**SMALL, num_attention_heads=4, num_key_value_heads=2)
    for model in (
        MixtralForCausalLM(MixtralConfig(**moe, num_local_experts=4)),
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**moe, num_experts=4, moe_intermediate_size=32, head_dim=8)
        ),
    ):
        before = snapshot(model)
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        fused = sum(k for n, k in sizes.items() if n.endswith(("up_proj", "down_proj")))
        with pytest.raises(ValueError, match=f"{fused / sum(sizes.values()):.0%}"):
            put(method, model, "all-linear")
        assert_unchanged(model, before)
        put(method, model, ["q_proj", "v_proj"])  # by name, the attention can have it


BAD_TARGETS = {
    "unknown target": ["nothing"],
    "a target that is no linear": ["embed"],
    "a linear and a norm": ["q_proj", "norm"],
    "part of a name": ["_proj"],
    "an empty name": [""],
    "a target that is None": [None],
    "a string": "q_proj",
    "an empty string": "",
    "an empty list": [],
    "None": None,
    "a number": 3,
    "an iterator, which is spent after one look": iter(["q_proj"]),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets_get_one_sentence_and_change_nothing(method, case):
    model = net()
    model.norm.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        put(method, model, BAD_TARGETS[case])
    assert_one_sentence(error)
    assert_unchanged(model, before)


def test_the_verbs_say_so_where_there_is_nothing(method):
    model = net()
    before = snapshot(model)
    for verb in ("state_dict", "load_state_dict", "merge"):
        with pytest.raises(ValueError, match="carries no ") as error:
            getattr(method, verb)(model, *[{}] * (verb == "load_state_dict"))
        assert_one_sentence(error)
        assert_unchanged(model, before)


def test_what_the_state_dict_gives_goes_into_a_safetensors_file(method, tmp_path):
    own = method.state_dict(stir(method, put(method, net())))
    save_file(own, tmp_path / "own.safetensors")
    back = load_file(tmp_path / "own.safetensors")
    assert all(torch.equal(back[n], t) for n, t in own.items())


def test_loading_takes_tensors_only_and_all_or_none(method):
    model = stir(method, put(method, net()))
    own = {n: t + 1 for n, t in method.state_dict(model).items()}
    last, before = [*own][-1], snapshot(model)
    for bad in ({**own, last: own[last].numpy()}, {**own, "no.such.layer": None}):
        with pytest.raises(ValueError) as error:
            method.load_state_dict(model, bad)
        assert_one_sentence(error)
        assert_unchanged(model, before)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_four_bit_weight_is_known_by_any_storage(method, storage):
    def build():
        settings = dict(quant_type="nf4", quant_storage=storage)
        packed = bitsandbytes.nn.Linear4bit(64, 64, **settings).to("cpu")
        return nn.ModuleDict({"plain": nn.Linear(64, 64), "packed": packed})

    def unpacked(model):  # 4-bit bytes seen as bfloat16 may be NaN, equal to nothing
        return snapshot(model["plain"]), trainable(model)

    model = build()
    before, wraps = unpacked(model), method not in (METHODS["dora"], METHODS["pissa"])
    if wraps:
        stir(method, put(method, model, ["plain", "packed"]))
        before = unpacked(model)
    with pytest.raises(ValueError, match="packed"):
        method.merge(model) if wraps else put(method, model, ["plain", "packed"])
    assert_unchanged(model["plain"], before[0])
    assert trainable(model) == before[1]


def test_each_law_has_a_mutation_that_it_finds():
    laws = {f for n, f in globals().items() if n.startswith("test_")}
    laws = {f for f in laws if [*inspect.signature(f).parameters] == ["method"]}
    files = [importlib.import_module(f"test_{n}") for n in ("dora", "pissa", "vera")]
    found = {law for file in files for law, _ in file.MUTATIONS.values()}
    idle = {law.__name__ for law in laws - found}
    assert not idle, f"laws that no mutation puts to the test: {idle}"
