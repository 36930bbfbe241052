"""What holds for every method that wraps linear layers, tried on each of them.

A law takes only `method`, the module. MUTATIONS break what surgery.py does for all of
them; the files of the single methods name laws of this one among theirs, too.
"""

import copy
import importlib
import inspect
import itertools
import warnings

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
    by_fault,
    jiggle,
    net,
    seeded,
    snapshot,
    train,
    trainable,
)
from safetensors.torch import load, load_file, save, save_file
from torch import nn
from torch.nn.utils import prune
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from peftlab import bitfit, nf4, surgery

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
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        put(method, model, "all-linear")
    assert not found, f"a module with one width was taken for a linear: {found[0]}"
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


BAD = {
    "unknown target": dict(targets=["nothing"]),
    "a target that is no linear": dict(targets=["embed"]),
    "a linear and a norm": dict(targets=["q_proj", "norm"]),
    "part of a name": dict(targets=["_proj"]),
    "an empty name": dict(targets=[""]),
    "a target that is None": dict(targets=[None]),
    "a string": dict(targets="q_proj"),
    "an empty string": dict(targets=""),
    "an empty list": dict(targets=[]),
    "no targets": dict(targets=None),
    "a number": dict(targets=3),
    "an iterator, which is spent after one look": dict(targets=iter(["q_proj"])),
    "half-wrong list": dict(targets=["q_proj", "nothing"]),
    "a long list": dict(targets=["nothing" * 1000]),
    **{f"r={r!r:.9}": dict(r=r) for r in (0, -1, 2.5, True, "8", None, 10**400)},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(method, case):
    model = net()
    model.norm.requires_grad_(False)
    before = snapshot(model)
    if "r" in BAD[case] and "r" not in inspect.signature(method.add).parameters:
        pytest.skip("it has no rank")
    with pytest.raises(ValueError) as error:
        method.add(model, **{"targets": ["q_proj"], **BAD[case]})
    assert_one_sentence(error)
    assert_unchanged(model, before)


@pytest.mark.parametrize("model", [None, "net", 3, [nn.Linear(2, 2)]])
def test_what_is_no_module_is_refused(method, model):
    for call in (
        lambda: put(method, model),
        lambda: method.merge(model),
        lambda: method.state_dict(model),
        lambda: method.load_state_dict(model, {}),
    ):
        with pytest.raises(ValueError, match="nn.Module") as error:
            call()
        assert_one_sentence(error)


def test_the_verbs_say_so_where_there_is_nothing(method):
    model = net()
    before = snapshot(model)
    for verb in ("state_dict", "load_state_dict", "merge"):
        with pytest.raises(ValueError, match="carries no ") as error:
            getattr(method, verb)(model, *[{}] * (verb == "load_state_dict"))
        assert_one_sentence(error)
        assert_unchanged(model, before)


# The laws: what cannot be


def contained(model):
    """The model in what torch wraps around one, and with one such part."""
    yield nn.DataParallel(model), "module"
    model.inner = torch.compile(nn.Linear(2, 2), backend="eager")
    yield model, "inner._orig_mod"


def test_a_model_in_a_container_is_refused(method):
    for plain in (net(), put(method, net())):
        for model, inner in contained(plain):
            carries = any(hasattr(m, "peft_method") for m in plain.modules())
            calls = [lambda m: put(method, m)]
            if carries:
                calls = [method.state_dict, method.merge]
                calls += [lambda m: method.load_state_dict(m, {})]
            for call in calls:
                with pytest.raises(ValueError, match="wrapped by") as error:
                    call(model)
                assert f"`{inner}`" in str(error.value), "say which is the plain one"
                assert_one_sentence(error)


def test_a_compiled_model_has_plain_names(method):
    model, plain = net(), net()(IDS)
    outer = torch.compile(model, backend="eager")
    assert torch.equal(outer(IDS), plain)
    assert put(method, outer, ["q_proj", "proj"]) is outer
    assert method.state_dict(outer).keys() == method.state_dict(model).keys()
    wrapped = stir(method, outer)(IDS)
    assert torch.allclose(model(IDS), wrapped) and not torch.allclose(wrapped, plain)
    method.load_state_dict(
        outer, {n: t + 0 for n, t in method.state_dict(model).items()}
    )
    gap = (method.merge(outer)(IDS) - wrapped).abs().max()
    assert gap < 1e-10 and type(model.proj) is nn.Linear


def test_a_second_method_is_refused(method):
    for other in (*METHODS.values(), bitfit):
        for targets in (["q_proj"], ["c_proj"]):
            model = put(method, net(), ["q_proj"])
            before = snapshot(model)
            with pytest.raises(ValueError, match="already") as error:
                other.add(model) if other is bitfit else put(other, model, targets)
            assert_one_sentence(error)
            assert_unchanged(model, before)
        if other is not bitfit:
            model = put(other, net(), ["q_proj"])
            with pytest.raises(ValueError, match="already"):
                put(method, model, targets)
    model = bitfit.add(net())
    before = snapshot(model)
    with pytest.raises(ValueError, match="BitFit already"):
        put(method, model)
    assert_unchanged(model, before)


def test_a_merge_past_what_the_dtype_holds_changes_nothing(method):
    for spoiled in (1e38, torch.nan, torch.inf):
        model = nn.Sequential(nn.Linear(6, 6).half(), nn.Linear(6, 6).half())
        stir(method, put(method, model, ["0", "1"]))
        for name, t in method.state_dict(model).items():
            if name.startswith("1."):
                t.fill_(spoiled)  # the second: the first would be merged by then
        before = snapshot(model)
        with pytest.raises(ValueError, match="NaN or infinite") as error:
            method.merge(model)
        assert_one_sentence(error)
        moved = [n for n, t in snapshot(model)[0].items() if n.startswith("0.")
                 and not torch.equal(t, before[0][n])]  # fmt: skip
        assert not moved and snapshot(model)[2] == before[2], "half the model is merged"


def unwritable(kind):
    layer = nn.Linear(6, 6)
    if kind == "pruned":
        return prune.l1_unstructured(layer, "weight", 0.5)
    if kind == "normed":
        return nn.utils.parametrizations.weight_norm(layer)
    return layer.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", ["pruned", "normed", "float8"])
def test_a_weight_that_cannot_be_written_is_refused_first(method, kind):
    model = nn.ModuleDict({"plain": nn.Linear(6, 6), "odd": unwritable(kind)})
    splits = method in (METHODS["dora"], METHODS["pissa"])
    if not splits:
        stir(method, put(method, model, ["plain", "odd"]))
    weight = model["plain"].weight.detach().clone()
    with pytest.raises(ValueError, match="packed|computed") as error:
        put(method, model, ["plain", "odd"]) if splits else method.merge(model)
    assert_one_sentence(error)
    assert torch.equal(model["plain"].weight, weight), "half the model was changed"


class Reader(nn.Module):
    """Reads its layers' weights and biases and never calls them, as WavLM does."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 8), Conv1D(6, 8)

    def forward(self, x):
        x = nn.functional.linear(x, self.linear.weight, self.linear.bias)
        return torch.tanh(x) @ self.conv.weight + self.conv.bias


def test_a_layer_that_is_read_and_never_called_has_an_effect(method):
    reader = seeded(Reader().double())
    x = torch.randn(3, 6, dtype=torch.float64)
    plain = reader(x)
    put(method, reader, ["linear", "conv"])
    assert (reader(x) - plain).abs().max() < 1e-12
    wrapped = stir(method, reader)(x)
    assert (wrapped - plain).abs().max() > 1e-3, "the method has no effect there"
    wrapped.sum().backward()
    assert any(p.grad.any() for p in method.state_dict(reader, True).values())
    assert (method.merge(reader)(x) - wrapped).abs().max() < 1e-10


def test_a_packed_layer_that_is_read_has_an_effect(method):
    if method in (METHODS["dora"], METHODS["pissa"]):
        return  # they refuse a packed weight
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 2, batch_first=True).eval()
    attention.out_proj = nf4.NF4Linear(attention.out_proj)
    x = torch.randn(2, 3, 64)
    plain = attention(x, x, x)[0]
    put(method, attention, ["out_proj"])
    assert (attention(x, x, x)[0] - plain).abs().max() < 1e-6
    wrapped = stir(method, attention)(x, x, x)[0]
    assert (wrapped - plain).abs().max() > 1e-3, "the method has no effect there"


def test_a_fast_path_gives_the_same_numbers(method):
    layer = dict(d_model=8, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True)
    block = nn.TransformerEncoderLayer(**layer)
    put(method, seeded(block), ["linear1", "linear2", "out_proj"])
    stir(method, block).eval()
    x = torch.randn(2, 3, 8)
    slow = block(x.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(block(x), slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.merge(block)(x), slow, rtol=1e-4, atol=1e-5)


class Squashed(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Doubled(nn.Linear):
    def forward(self, x, scale=2.0):
        return scale * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x, scale=None):
        return super().forward(x), scale


class Same(nn.Linear):
    """As Falcon's linear: a forward of its own that is the product all the same."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


def test_a_layer_that_is_no_product_is_refused_by_name(method):
    dtypes = (torch.float32, torch.bfloat16)
    for dtype, kind in itertools.product(dtypes, (Squashed, Doubled, Pair)):
        model = nn.ModuleDict({"fc": nn.Linear(6, 6), "odd": kind(6, 6)}).to(dtype)
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"odd, a {kind.__name__}") as error:
            put(method, model, ["fc", "odd"])
        assert_one_sentence(error)
        assert_unchanged(model, before)
        with pytest.warns(UserWarning, match="leaves out odd"):
            put(method, model, "all-linear")
        assert paths(method, model) == {"fc"}


def test_a_forward_of_its_own_that_is_the_product_is_taken(method):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (True, False):
            odd = Same(64, 64, bias=bias)
            model = nn.Sequential(odd, nn.Linear(64, 64)).to(dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                put(method, model, "all-linear")
            assert paths(method, model) == {"0", "1"}, "it is W x + b all the same"


def test_full_paths_alone_are_taken_where_they_are_asked_for(method):
    body = nn.ModuleDict({"proj": nn.Linear(2, 2)})
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "body": body})
    exactly = getattr(method, "_Exactly", surgery.Exactly)  # that of the one file
    put(method, model, exactly(["proj"]))
    assert paths(method, model) == {"proj"}, "body.proj ends in proj, but is not it"


# Files and states


def test_the_whole_model_goes_into_a_safetensors_file(method):
    model = stir(method, put(method, net()))
    try:
        content = save(model.state_dict())
    except RuntimeError as error:
        pytest.fail(f"a checkpoint cannot be written: {error}")
    twin = put(method, net())
    twin.load_state_dict(load(content))
    assert torch.equal(twin(IDS), model(IDS)), "a checkpoint lacks something"


def test_loading_takes_finite_floats_alone(method):
    model = stir(method, put(method, net()))
    good = {n: t.clone() + 1 for n, t in method.state_dict(model).items()}
    name = next(iter(good))
    spoiled = good[name].clone()
    spoiled.view(-1)[-1] = torch.nan
    before = snapshot(model)
    for t in (good[name].long(), good[name] > 0, good[name] + 0j, spoiled, spoiled / 0):
        with pytest.raises(ValueError) as error:
            method.load_state_dict(model, {**good, name: t})
        assert_one_sentence(error)
        assert_unchanged(model, before)
    for tensors in (None, [], good.keys()):
        with pytest.raises(ValueError):
            method.load_state_dict(model, tensors)


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


# Broken copies of what surgery.py does, for tests/test_mutations.py: in lora's one file

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_only_what_the_state_dict_names_trains: {
        "the base is not frozen": {
            "_swap(model.requires_grad_(False), new)": "_swap(model, new)"
        },
        "the state dict gives copies": {
            "name: t.detach() for": "name: t.detach().clone() for"
        },
    },
    test_frozen_weights_are_bit_identical_after_training: {
        "the base trains along": {
            "_swap(model.requires_grad_(False), new)": "_swap(model, new)"
        }
    },
    test_the_new_layers_are_in_the_models_mode: {
        "new layers are in train mode": {"wrapper.train(layer.training)": "pass"}
    },
    test_adding_changes_no_output: {
        "adding moves the outputs": {
            "wrapper.train(layer.training)": "layer.weight.data += 1e-3"
        }
    },
    test_train_and_eval_change_no_weight: {
        "train() merges": {
            "    def forward(self, x):": "    def train(self, mode=True):\n"
            "        self.base.weight.data += 1e-3 * (not mode)\n"
            "        return super().train(mode)\n\n"
            "    def forward(self, x):"
        }
    },
    test_a_deepcopy_stands_on_its_own: {
        "a copy is the same layer": {
            "    def forward(self, x):": "    def __deepcopy__(self, memo):\n"
            "        return self\n\n    def forward(self, x):"
        }
    },
    test_a_model_can_be_moved_to_another_precision: {
        "the new tensors stay in their precision": {
            "    def forward(self, x):": "    def _apply(self, fn, recurse=True):\n"
            "        self.base._apply(fn)\n        return self\n\n"
            "    def forward(self, x):"
        }
    },
    test_a_linear_with_two_parents_is_wrapped_once_and_merged_once: {
        "one parent of two is wrapped": {
            "layers.get(child, child)": "layers.pop(child, child)"
        }
    },
    test_all_linear_takes_what_has_two_widths: {
        "one width makes a linear": {"if n_out and n_in": "if n_out or n_in"}
    },
    test_a_model_on_the_meta_device_gets_the_same_shapes: {
        "a Conv1D's width is read the wrong way": {
            "layer.weight.shape[::-1]": "layer.weight.shape"
        },
        "new tensors are on the CPU": {", device=W.device)": ', device="cpu")'},
    },
    test_own_tensors_are_float32_over_a_16_bit_base: {
        "new tensors are in the base's 16 bits": {
            "torch.float64 if W.dtype == torch.float64 else torch.float32": "W.dtype"
        },
        "merging leaves float32 over a 16-bit base": {
            "W = W.to(layer.weight.dtype).contiguous()": "W = W.contiguous()"
        },
    },
    test_all_linear_leaves_out_the_output_head: {
        "the head is in all-linear": {"layer is head or ": ""}
    },
    test_a_target_matches_whole_names_from_the_end: {
        "a target matches the end of a name": {
            '.endswith(f".{name}")': ".endswith(name)"
        }
    },
    test_full_paths_alone_are_taken_where_they_are_asked_for: {
        "full paths are taken for suffixes": {
            "return path == name": "return path.endswith(name)"
        }
    },
    test_a_half_wrong_target_list_is_refused: {
        "a half-wrong target list is accepted": {
            "if lost:": "if len(targets) == len(lost):"
        }
    },
    test_fused_experts_are_refused_by_their_share: {
        "fused experts are passed over": {'"expert" in name and dim == 3': "False"}
    },
    test_adding_twice_is_refused: {
        "a method goes on a method": {
            "    if names:\n        what": "    if False:\n        what"
        }
    },
    test_a_second_method_is_refused: {
        "another method goes on a method": {
            'hasattr(type(m), "peft_method")': "isinstance(m, LoRALinear)"
        },
        "BitFit beneath is not seen": {'hasattr(model, "bitfit")': "False"},
    },
    test_a_model_in_a_container_is_refused: {
        "a container is taken for the model": {
            "if kind.__name__ in _CONTAINERS:": "if False:"
        },
        "a container is looked for outside alone": {
            "for path, m in model.named_modules():\n        for": "for path, m in"
            ' [("", model)]:\n        for'
        },
    },
    test_a_compiled_model_has_plain_names: {
        "a compiled model has names of its own": {
            "model = model._orig_mod": "break",
            "if kind.__name__ in _CONTAINERS:": "if False:",
        }
    },
    test_a_layer_that_is_no_product_is_refused_by_name: {
        "what is no product is taken": {
            "return bool(gap <= rounding * want.abs().max())": "return True"
        },
        "what returns more than a tensor is taken": {
            "than a tensor\n        return False": "\n        return True"
        },
    },
    test_a_forward_of_its_own_that_is_the_product_is_taken: {
        "a forward of its own is refused": {
            "return bool(gap <= rounding": "return bool(gap <= -rounding"
        }
    },
    test_loading_is_strict: {
        "loading lets a name be missing": {
            "if missing or unexpected:": "if unexpected:",
            "for name, t in own.items():\n        got": "for name, t in own.items():\n"
            "        tensors = {name: t, **tensors}\n        got",
        },
        "loading lets the unexpected pass": {
            "if missing or unexpected:": "if missing:"
        },
        "loading takes other shapes": {
            "if got != want:": "if got is None:",
            "t.copy_(tensors[name])": "t.copy_(tensors[name].flatten()[0])",
        },
    },
    test_loading_takes_tensors_only_and_all_or_none: {
        "loading copies what fits before it refuses": {
            "own.items():\n        got": "own.items():\n"
            "        t.copy_(torch.as_tensor(tensors[name]))\n        got"
        }
    },
    test_the_state_dict_goes_round: {
        "loading does nothing": {"t.copy_(tensors[name])": "pass"}
    },
    test_loading_takes_finite_floats_alone: {
        "NaN is loaded": {"_check_fits(name, tensors[name], t.dtype)": "pass"},
        "whole numbers are loaded": {
            "if not tensors[name].is_floating_point():": "if False:"
        },
    },
    test_the_whole_model_goes_into_a_safetensors_file: {
        "the whole model has no A": {
            "self.lora_A = nn.Parameter(torch.empty(r, n_in, **like))": "self.hidden = "
            "[nn.Parameter(torch.empty(r, n_in, **like))]",
            "    def forward(self, x):": "    lora_A = property(lambda self: "
            "self.hidden[0])\n\n    def forward(self, x):",
        }
    },
    test_merged_equals_unmerged_to_1e_10_in_float64: {
        "a Conv1D is merged untransposed": {
            "W = W.T if _is_conv1d(layer) else W\n    W = W.to": "W = W.to"
        }
    },
    test_a_tied_weight_is_left_alone: {
        "merging writes into a tied weight": {
            "layer.weight = nn.Parameter(W, requires_grad=False)": "layer.weight.data"
            ".copy_(W)"
        }
    },
    test_merging_leaves_plain_frozen_layers: {
        "merging leaves the wrappers": {
            "    return _unwrap(model, kind)": "    return model.requires_grad_(False)"
        },
        "merging unfreezes": {
            "return model.requires_grad_(False)": "return model.requires_grad_()"
        },
    },
    test_a_merge_past_what_the_dtype_holds_changes_nothing: {
        "merging goes past the dtype": {
            "_check_fits(path, m.folded(), m.base.weight.dtype)": "pass"
        },
        "merging checks and writes layer by layer": {
            "_check_fits(path, m.folded(), m.base.weight.dtype)": "_check_fits(path, "
            "m.folded(), m.base.weight.dtype)\n        _set_weight(m.base, m.folded())"
        },
    },
    test_a_layer_that_is_read_and_never_called_has_an_effect: {
        "a layer that is read shows its base": {
            "folded = wrapper.folded()": "folded = _weight(base)"
        }
    },
    test_a_packed_layer_that_is_read_has_an_effect: {
        "a packed layer that is read shows its base": {
            "if not is_float or ": "if _is_packed(W) or not is_float or "
        }
    },
    test_a_fast_path_gives_the_same_numbers: {
        "a fast path sees the base": {
            "folded = wrapper.folded()": "folded = _weight(base)"
        }
    },
}
MUTATIONS = by_fault(BROKEN)
