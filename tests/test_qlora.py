"""QLoRA's laws, and the same numbers as peft over bitsandbytes: in training, merged.

A law that takes only `qlora`, the module, is run again by tests/test_mutations.py on
broken copies of qlora.py. Messages name the mistake that gives the symptom.
"""

import contextlib
import copy
import functools
import itertools
import math
import weakref

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from common import (
    ALL,
    BATCH,
    IDS,
    MODELS,
    SMALL,
    Net,
    assert_same,
    by_fault,
    gpt2,
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
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from test_lora import BAD as BAD_FOR_LORA
from test_lora import fill, plain_names
from torch import nn
from torch.nn.utils import prune
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from experiments.sweeps import qlora as experiment
from peftlab import lora, nf4, peft_files, surgery
from peftlab import qlora as reference
from peftlab.kit import base_models, measure, results

HALVES = (torch.bfloat16, torch.float16)
FULL = dict(compute_dtype=torch.float32)
CODES = {"NF4": nf4.NF4, "FP4": nf4.FP4, "INT4": nf4.INT4}
FAMILIES = {**MODELS, "t5": t5}
U = 2**-9  # half of bfloat16's step: what one rounding may take, of 1


@pytest.fixture
def qlora():
    return reference


def single(dtype=torch.float32):
    """Net, in a float that can be packed."""
    return net().to(dtype)


def put(qlora, targets=ALL, dtype=torch.float32, **settings):
    """Net with QLoRA, as after training: every A and B a little different."""
    settings = dict(r=3, alpha=6, **FULL) | settings
    torch.manual_seed(0)  # A is random
    model = qlora.add(single(dtype), targets, **settings)
    jiggle(lora.state_dict(model).values())
    return model


def packed(model):
    """{path: layer} of all linears in 4 bits, by their paths in the plain model."""
    found = dict(model.named_modules())
    found = {p: m for p, m in found.items() if isinstance(m, nf4.NF4Linear)}
    return {p.removesuffix(".base"): m for p, m in found.items()}


def adapted(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, lora.LoRALinear)}


def change(layer):
    """s B A, (out, in), in float32."""
    return layer.scaling * (layer.lora_B @ layer.lora_A).detach()


def unpacked(model):
    """A copy of it over plain linears in float32, each with its dequantized weight."""
    model, swaps = copy.deepcopy(model), {}
    for m in packed(model).values():
        weight = nf4.dequantize(m, torch.float32)
        swaps[m] = nn.Linear(*weight.T.shape, bias=m.bias is not None)
        swaps[m].weight = nn.Parameter(weight, requires_grad=False)
        swaps[m].bias = m.bias
    surgery.swap(model, swaps)
    return model


def matrix(layer):
    """A plain linear's weight as (out, in)."""
    turned = isinstance(layer, Conv1D)
    return layer.weight.detach().T if turned else layer.weight.detach()


def kept(model):
    """The sizes of the floats that autograd keeps for the way back."""
    sizes = set()

    def keep(t):
        if t.is_floating_point():
            sizes.add(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(IDS).pow(2).mean()
    return sizes


@contextlib.contextmanager
def watched():
    """A list: how many unpacked weights there are, each time one more is made."""
    real, stores, counts = nf4.dequantize, [], []

    def spy(*arguments, **options):
        weight = real(*arguments, **options)
        stores.append(weakref.ref(weight.untyped_storage()))
        counts.append(sum(store() is not None for store in stores))
        return weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "dequantize", spy)
        yield counts


# The laws: what is packed, and what is not


def test_every_linear_but_the_head_is_packed_whatever_the_targets(qlora):
    for targets in ("all-linear", ["q_proj"], ["c_proj", "proj"]):
        model = qlora.add(single(), targets)
        assert packed(model).keys() == set(ALL), (
            "targets say where LoRA goes; packed are all linears, and the head is not"
        )
        assert adapted(model).keys() == set(ALL if targets == "all-linear" else targets)
        assert type(model.lm_head) is nn.Linear, "the head must stay as it is"


def test_a_head_that_is_a_target_gets_lora_and_is_not_packed(qlora):
    model = put(qlora, ["q_proj", "lm_head"])
    assert packed(model).keys() == set(ALL)
    assert adapted(model).keys() == {"q_proj", "lm_head"}
    assert type(model.lm_head.base) is nn.Linear


def test_the_defaults_are_the_papers(qlora):
    model = qlora.add(nn.Sequential(nn.Linear(256, 256)))
    base = model[0].base
    assert torch.equal(base.code, nf4.NF4) and base.blocksize == 64
    assert base.compute_dtype == torch.bfloat16, "products are in bfloat16"
    bits = nf4.Packed.bits(base)
    assert abs(bits - 4.127) < 0.001, f"double quantization leaves 4.127, not {bits}"
    assert (model[0].r, model[0].scaling) == (8, 2)


def test_the_packing_is_nf4s_own(qlora):
    both = itertools.product(CODES.values(), (True, False))
    for settings in [dict(blocksize=16, code=c, double_quant=d) for c, d in both]:
        plain, model = single(), qlora.add(single(), ["proj"], **settings)
        for path, m in packed(model).items():
            q = nf4.quantize(matrix(plain.get_submodule(path)), **settings)
            assert m.blocksize == 16 and (m.offset is None) == (q.offset is None)
            for name, want in q.named_buffers():
                assert torch.equal(getattr(m, name), want), f"{path}: {name} differs"


def test_head_embedding_norm_and_biases_stay_to_the_bit(qlora):
    for dtype in (torch.float32, *HALVES):
        plain = single(dtype)
        own = dict(plain.named_parameters())
        before = {n: p.detach().clone() for n, p in own.items()}
        model = qlora.add(plain, ["proj"])
        now = {n.replace(".base", ""): p for n, p in model.named_parameters()}
        for name in before.keys() - {f"{path}.weight" for path in ALL}:
            assert now[name] is own[name], f"{name} is another tensor now"
            assert now[name].dtype == dtype, f"{name} changed its dtype"
            assert torch.equal(now[name], before[name]), f"{name} moved"


def test_the_settings_are_loras(qlora):
    for bias in ("none", "all", "lora_only"):
        settings = dict(r=3, alpha=5, dropout=0.25, bias=bias, rslora=True)
        model, twin = qlora.add(single(), ["q_proj"], **settings), net()
        lora.add(twin, ["q_proj"], **settings)
        for name in ("r", "alpha", "scaling", "rslora", "bias_mode"):
            assert getattr(model.q_proj, name) == getattr(twin.q_proj, name), name
        assert getattr(model.q_proj.dropout, "p", 0) == 0.25
        names = qlora.state_dict(model).keys()
        assert names == lora.state_dict(twin).keys()
        trained = {n.replace(".base.bias", ".bias") for n in trainable(model)}
        assert trained == names, "what trains is not what LoRA trains"


def test_modes_are_kept(qlora):
    for mode in (True, False):
        model = qlora.add(single().train(mode), ["q_proj", "proj"], dropout=0.5)
        assert {m.training for m in model.modules()} == {mode}
        for bits in (4, 16):
            merged = qlora.merge(copy.deepcopy(model), bits)
            assert {m.training for m in merged.modules()} == {mode}, "after merging"


def test_a_linear_with_two_parents_is_packed_once_and_merged_once(qlora):
    up, down = nn.Linear(6, 6), nn.Linear(6, 6)
    parts = {k: nn.ModuleDict({"up": up, "down": down}) for k in "ab"}
    model, x = nn.ModuleDict(parts), torch.randn(4, 6)
    qlora.add(model, ["up"], r=2, **FULL)
    jiggle(qlora.state_dict(model).values())
    for name in ("up", "down"):
        one, two = model["a"][name], model["b"][name]
        assert one is two and type(one) is not nn.Linear, f"{name}: in one parent only"
    assert len(packed(model)) == 2 and len(adapted(model)) == 1
    wrapped = model["b"]["up"](model["b"]["down"](x))
    qlora.merge(model)
    for name in ("up", "down"):
        assert model["a"][name] is model["b"][name]
        assert type(model["a"][name]) is nn.Linear
    torch.testing.assert_close(model["b"]["up"](model["b"]["down"](x)), wrapped)


# The laws: forward and backward


def test_at_the_start_it_is_the_plain_model_with_dequantized_weights(qlora):
    plain, model = single(), qlora.add(single(), ["q_proj"], **FULL)
    for path, m in packed(model).items():
        weight, layer = nf4.dequantize(m), plain.get_submodule(path)
        layer.weight.data.copy_(weight.T if isinstance(layer, Conv1D) else weight)
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-6, atol=1e-6)
    gap = (model(IDS) - single()(IDS)).abs().max()
    assert gap > 1e-3, "nothing was rounded: is the base packed at all?"


def test_a_layer_adds_s_b_a_x_to_the_product_in_the_compute_dtype(qlora):
    for dtype in (torch.float32, torch.bfloat16):
        answers = []
        for compute in (None, torch.float32, *HALVES):
            settings = dict(r=3, alpha=12, compute_dtype=compute)
            model = nn.Sequential(seeded(nn.Linear(64, 48).to(dtype)))
            torch.manual_seed(0)  # A is random
            layer = fill(qlora.add(model, ["0"], **settings), qlora)[0]
            assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
            x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
            c = compute or dtype
            y = x.to(c) @ nf4.dequantize(layer.base, c).T + layer.base.bias.to(c)
            low = 4 * x.float() @ layer.lora_A.T
            want = (y.to(dtype) + low @ layer.lora_B.T).to(dtype)
            got = layer(x)
            assert got.dtype == dtype, "the layer must answer in its input's dtype"
            assert torch.equal(got, want), (
                f"not W x in {c} and s B A x in float32, s = alpha / r: is LoRA's"
                " branch dead, the compute dtype ignored, alpha / r lost?"
            )
            answers.append(got.float())
            got.float().pow(2).sum().backward()
            assert layer.lora_A.grad.any() and layer.lora_B.grad.any()
            assert layer.lora_A.grad.dtype == torch.float32
        one, full, *halves = answers
        assert torch.equal(one, full if dtype == torch.float32 else halves[0])
        gaps = [(half - full).abs().max() / full.abs().max() for half in halves]
        assert all(0 < gap < 0.02 for gap in gaps), "the dtypes would not be told apart"


def test_gradients_are_those_through_an_explicitly_dequantized_base(qlora):
    for targets in (ALL, ["q_proj", "c_proj"]):
        model = put(qlora, targets, compute_dtype=None)
        twin, rows = unpacked(model), []
        for m in (model, twin):
            own = lora.state_dict(m, keep_vars=True)
            loss = (m(IDS) - 1).pow(2).mean()
            rows.append(torch.autograd.grad(loss, [*own.values()]))
        for name, got, want in zip(own, *rows, strict=True):
            assert want.abs().max() > 1e-4, f"{name}: this would prove little"
            gap = (got - want).abs().max() / want.abs().max()
            assert gap < 1e-5, f"the gradient of {name} is off by {gap:.1e}"


def test_only_a_and_b_train(qlora):
    for targets in (ALL, ["q_proj", "proj"]):
        model = qlora.add(single(), targets)
        wanted = {f"{path}.lora_{x}" for path in targets for x in "AB"}
        assert trainable(model) == wanted, "the base is not frozen, or A and B are"
        assert wanted == qlora.state_dict(model).keys()


def test_all_but_a_and_b_is_bit_identical_after_training(qlora):
    model = put(qlora, ["q_proj", "c_proj", "proj"], compute_dtype=torch.bfloat16)
    before = snapshot(model)[0]
    assert sum("codes" in name for name in before) == len(ALL)
    train(model)
    for name, t in model.state_dict().items():
        moved = not torch.equal(t, before[name])
        assert moved == ("lora_" in name), f"{name} moved, or did not train"


def test_no_weight_is_kept_for_the_way_back(qlora):
    weights = {8 * 6, 12 * 8, 12 * 12}
    for compute in (None, torch.bfloat16):
        sizes = kept(put(qlora, compute_dtype=compute))
        assert sizes and not weights & sizes, "an unpacked weight waits for backward"
    plain = lora.add(single(), ALL, r=3)  # the first input needs no gradient
    assert weights - {8 * 6} <= kept(plain), "over a plain base they do wait"


def test_one_weight_is_unpacked_at_a_time(qlora):
    model = put(qlora, ["q_proj"], compute_dtype=torch.bfloat16)
    with watched() as counts:
        model(IDS).pow(2).mean().backward()
    # q_proj is the first: its input needs no gradient, as it is an embedding
    assert len(counts) == 2 * len(ALL) - 1, "each way, each layer unpacks once"
    assert max(counts) == 1, f"{max(counts)} unpacked weights were there at once"
    with watched() as counts:
        weights = [nf4.dequantize(m) for m in packed(model).values()]
    assert max(counts) == len(weights) == 4, "this would not see two"


# The laws: merged into 16 bits


def test_merged_into_16_bits_it_is_the_unmerged_model(qlora):
    for targets in (ALL, ["q_proj", "c_proj"]):
        for settings in (dict(), dict(rslora=True), dict(code=nf4.INT4, blocksize=8)):
            model = put(qlora, targets, **settings)
            wrapped = model(IDS)
            bare = qlora.add(single(), targets, **{**FULL, **settings})(IDS)
            assert (wrapped - bare).abs().max() > 1e-2, "LoRA says nothing"
            gap = (qlora.merge(model)(IDS) - wrapped).abs().max()
            assert gap < 1e-5 * max(1, wrapped.abs().max()), (
                f"merging moved the outputs by {gap:.1e}: is the product transposed,"
                " added twice, or is alpha / r forgotten?"
            )


def test_merged_weights_are_the_float32_sums_rounded_once(qlora):
    for dtype in (torch.float32, *HALVES):
        model, wanted = put(qlora, ["c_proj", "proj"], dtype), {}
        for path, m in packed(model).items():
            wanted[path] = nf4.dequantize(m, torch.float32)
            if path in adapted(model):
                wanted[path] += change(adapted(model)[path])
        qlora.merge(model)
        for path, weight in wanted.items():
            got = matrix(model.get_submodule(path))
            assert got.dtype == dtype
            assert torch.equal(got, weight.to(dtype)), f"{path}: rounded more than once"


def test_merged_into_16_bits_all_layers_are_plain_again(qlora):
    for dtype in (torch.float32, torch.bfloat16):
        plain = single(dtype)
        model = qlora.merge(put(qlora, ["q_proj", "c_proj"], dtype, bias="all"))
        kinds = [(n, type(m)) for n, m in model.named_modules()]
        want = [(n, type(m)) for n, m in plain.named_modules()]
        assert kinds == want, "another type than before: a Conv1D must be one again"
        assert not trainable(model), "a merged model is frozen, its biases too"
        own = model.state_dict()
        assert own.keys() == plain.state_dict().keys()
        for name, t in plain.state_dict().items():
            same = own[name].shape == t.shape and own[name].dtype == t.dtype
            assert same and own[name].is_contiguous(), f"{name} has another layout"
        plain.load_state_dict(own)
        assert torch.equal(plain(IDS), model(IDS))
        qlora.add(model, ["q_proj"])  # and it may come again


def test_trained_biases_survive_a_merge(qlora):
    for bits in (16, 4):
        model = train(put(qlora, ["q_proj"], bias="all"))
        trained = {n: t.clone() for n, t in qlora.state_dict(model).items()}
        own = qlora.merge(model, bits).state_dict()
        for name in (n for n in trained if n.endswith("bias")):
            assert name in own, f"merging dropped {name}"
            assert torch.equal(own[name], trained[name])
        assert not torch.equal(own["q_proj.bias"], single().q_proj.bias)


def test_a_head_with_lora_is_merged_along(qlora):
    for bits in (16, 4):
        model = put(qlora, ["q_proj", "lm_head"])
        weight, delta = model.lm_head.base.weight, change(model.lm_head)
        assert type(qlora.merge(model, bits).lm_head) is nn.Linear
        assert torch.equal(model.lm_head.weight, weight + delta)
        assert not adapted(model) and not trainable(model)


# The laws: merged into 4 bits


def test_merged_into_4_bits_the_sums_are_packed_as_the_base_was(qlora):
    cases = [
        dict(),
        dict(double_quant=False, blocksize=128, compute_dtype=torch.bfloat16),
        dict(code=nf4.FP4, blocksize=16, compute_dtype=None),
        dict(code=nf4.INT4, double_quant=False, compute_dtype=torch.float16),
    ]
    for settings in cases:
        for dtype in (torch.float32, torch.bfloat16):
            model = put(qlora, ["q_proj", "c_attn"], dtype, **settings)
            before, deltas = packed(model), adapted(model)
            qlora.merge(model, bits=4)
            assert packed(model).keys() == set(ALL) and not adapted(model)
            assert not trainable(model), "a merged model is frozen"
            for path, old in before.items():
                new = packed(model)[path]
                if path not in deltas:
                    assert new is old, f"{path} has no LoRA: it must stay as it is"
                    continue
                nested = old.offset is not None
                total = nf4.dequantize(old, torch.float32) + change(deltas[path])
                want = nf4.quantize(total, old.blocksize, old.code, nested)
                assert new.blocksize == old.blocksize, "with another block size"
                assert torch.equal(new.code, old.code), "into another type of 4 bits"
                assert (new.offset is not None) == nested, "another nesting"
                assert torch.equal(new.codes, want.codes), "not the float32 sum's codes"
                assert torch.equal(new.absmax, want.absmax)
                assert new.compute_dtype == old.compute_dtype, "computes in another"
                assert new.dtype == old.dtype == dtype and new.bias is old.bias
                assert new.kind is old.kind
                assert not torch.equal(new.codes, old.codes), "LoRA said nothing"


def test_merged_into_4_bits_a_small_change_is_lost_and_a_large_one_kept(qlora):
    kept = {}
    for size in (0.01, 1):  # of s B A, over the weight's
        torch.manual_seed(0)
        model = nn.Sequential(seeded(nn.Linear(256, 256)))
        layer = fill(qlora.add(model, ["0"]), qlora)[0]
        before = nf4.dequantize(layer.base, torch.float32)
        layer.lora_B.data *= size * before.norm() / change(layer).norm()
        delta = change(layer)
        after = nf4.dequantize(qlora.merge(model, bits=4)[0], torch.float32)
        kept[size] = ((after - before) * delta).sum() / delta.square().sum()
    assert kept[0.01] < 0.1, f"a change far below the steps between levels: {kept}"
    assert 0.9 < kept[1] < 1.1, f"a change as large as the weight: {kept}"


# The laws: tensors in and out


def test_the_state_dict_is_loras_and_goes_round(qlora):
    one, two = train(put(qlora)), qlora.add(single(), ALL, r=3, alpha=6, **FULL)
    tensors = {n: t.clone() for n, t in qlora.state_dict(one).items()}
    names = {f"{path}.lora_{x}" for path in ALL for x in "AB"}
    assert tensors.keys() == names, "the base stays out: it is on the disk already"
    qlora.load_state_dict(two, tensors)
    assert torch.equal(one(IDS), two(IDS)), "something trained was not carried over"
    for bad in ({}, {**tensors, "proj.base.codes": torch.zeros(2)}):
        refused(two, "", qlora.load_state_dict, bad)


# The laws: refusals


def test_what_lora_or_nf4_refuses_leaves_the_model_plain(qlora):
    """And a weight that cannot be packed is named, whatever the targets."""

    def spoilt(path, spoil):
        model = single()
        spoil(model.get_submodule(path))
        return model

    def infinite(layer):
        layer.weight.data[0, 0] = torch.inf

    def hook(layer):
        layer.register_forward_hook(lambda m, x, y: 2 * y)

    pruned = functools.partial(prune.random_unstructured, name="weight", amount=0.5)
    cases = [(single(), "", settings) for settings in BAD]
    cases += [(net(), "float64", {})]
    for path, spoil in (("proj", infinite), ("c_attn", pruned), ("q_proj", hook)):
        for targets in ("all-linear", ["c_proj"]):
            cases += [(spoilt(path, spoil), f"{path}: ", dict(targets=targets))]
    for model, words, settings in cases:
        model.norm.requires_grad_(False)
        refused(model, words, qlora.add, **settings)


def test_fused_experts_are_refused_even_where_they_are_no_target(qlora):
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = MixtralForCausalLM(MixtralConfig(**SMALL, **heads, num_local_experts=4))
    for targets in ("all-linear", ["q_proj"]):
        refused(model, "expert", qlora.add, targets)


def test_adding_twice_is_refused(qlora):
    merged = qlora.merge(put(qlora, ["q_proj"]), bits=4)
    for model in (put(qlora, ["q_proj"]), merged, lora.add(single(), ["q_proj"])):
        for targets in ("all-linear", ["proj"]):
            refused(model, "", qlora.add, targets)


def test_merging_refuses_other_bits_and_other_models(qlora):
    model = put(qlora)
    for bits in (8, "16", None, True, 16.0, 10**400):
        refused(model, "16 bits or into 4", qlora.merge, bits)
    for bits in (16, 4):
        refused(net(), "no LoRA", qlora.merge, bits)
        refused(lora.add(net(), ALL), "lora.merge", qlora.merge, bits)
        refused(qlora.merge(put(qlora), bits=4), "no LoRA", qlora.merge, bits)


def test_merging_refuses_a_broken_adapter_and_a_sum_that_overflows(qlora):
    for bits in (16, 4):
        for dtype, value in ((torch.float32, torch.inf), (torch.float16, 60000.0)):
            model = put(qlora, ["q_proj", "proj", "lm_head"], dtype)
            model.proj.lora_B.data[0, :] = value
            model.proj.lora_A.data[:, 0] = 1
            refused(model, "NaN or infinite", qlora.merge, bits)
        model = put(qlora, ["q_proj", "lm_head"], torch.float16)
        model.lm_head.lora_B.data[:] = 1e30
        refused(model, "lm_head .*infinite", qlora.merge, bits)
        model = put(qlora, ["q_proj", "lm_head"])
        prune.random_unstructured(model.lm_head.base, "weight", 0.5)
        refused(model, "is computed", qlora.merge, bits)


def test_loras_own_merge_refuses(qlora):
    for targets in (ALL, ["proj", "lm_head"]):
        refused(put(qlora, targets), "packed", lora.merge)


BAD = [
    *BAD_FOR_LORA.values(),
    *(dict(r=r) for r in (0, "8")),
    *(dict(targets=t) for t in (None, [], "q_proj", ["q_proj", "nothing"])),
    *(dict(blocksize=n) for n in (0, 65, "64")),
    *(dict(code=c) for c in ("nf4", torch.ones(3))),
    *(dict(compute_dtype=t) for t in ("bfloat16", torch.int8)),
    dict(double_quant="yes"),
]


def test_a_model_in_a_container_is_refused_and_a_compiled_one_has_plain_names():
    for call in (reference.add, reference.merge, reference.state_dict):
        for value in (None, single().state_dict(), "tiny-decoder"):
            refused(value, "", call)
    for model, call in ((single(), reference.add), (put(reference), reference.merge)):
        refused(nn.DataParallel(model), "DataParallel", call)
    model = single()
    compiled = torch.compile(model, backend="eager")
    assert reference.add(compiled, r=2, **FULL) is compiled
    assert packed(model).keys() == adapted(model).keys() == {*ALL}
    names = reference.state_dict(compiled).keys()
    assert names == reference.state_dict(model).keys()
    reference.merge(compiled)
    assert not packed(model) and not adapted(model)


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def test_a_layer_that_is_more_than_a_product_stays_plain_and_is_named():
    def build():
        model = single()
        model.proj.__class__ = Scaled
        return model

    with pytest.warns(UserWarning, match="leaves out proj"):
        refused(build(), "proj, a Scaled", reference.add, ["proj"])
    model = build()
    model.lm_head.weight.data[0, 0] = math.nan  # the head is not packed
    with pytest.warns(UserWarning, match="leaves out proj") as caught:
        reference.add(model, r=2, **FULL)
    assert len(caught) == 1, "it is said once"
    assert packed(model).keys() == adapted(model).keys() == {*ALL} - {"proj"}
    want = unpacked(model)(IDS)
    torch.testing.assert_close(model(IDS), want, atol=1e-5, rtol=0, equal_nan=True)
    assert type(reference.merge(model).proj) is Scaled


@pytest.mark.parametrize("merge", [lora.merge, reference.merge])
def test_a_base_that_another_library_packed_is_refused(merge):
    theirs = Linear4bit(64, 64, quant_type="nf4").to("cpu")
    model = nn.ModuleDict({"ours": nn.Linear(64, 64), "theirs": theirs})
    refused(model, "", reference.add, ["ours"])
    model["ours"] = nf4.NF4Linear(model["ours"])  # by hand one gets there
    lora.add(model, ["ours", "theirs"])
    refused(model, "packed", merge)


# Whole models


@pytest.mark.parametrize("name", ["tiny-decoder", "gpt2", "bert", "t5"])
def test_all_but_the_head_of_a_model_is_packed_and_its_gradients_are_exact(name):
    torch.manual_seed(0)
    plain = FAMILIES[name]()
    kinds = nn.Linear | Conv1D
    linears = {path for path, m in plain.named_modules() if isinstance(m, kinds)}
    model = fill(reference.add(plain, r=4, compute_dtype=None), reference)
    assert packed(model).keys() == adapted(model).keys()
    assert packed(model).keys() == linears - {"lm_head", "classifier"}
    own, twin = reference.state_dict(model, keep_vars=True), unpacked(model)
    row, gradients = step(model, own)
    want, others = step(twin, reference.state_dict(twin, keep_vars=True))
    assert_same(row, want, "the output, over an unpacked base,")
    assert max(g.abs().max() for g in others.values()) > 0.05
    for n in own:
        assert_same(gradients[n], others[n], f"the gradient of {n}")


def test_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = fill(reference.add(FAMILIES["tiny-decoder"]()), reference).train()
        if checkpointing:
            how = dict(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.gradient_checkpointing_enable(**how)
        with watched() as counts:
            model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        own = reference.state_dict(model, keep_vars=True)
        found.append((flat({n: p.grad for n, p in own.items()}), len(counts)))
    (plain, n_plain), (again, n_again) = found
    assert n_again > n_plain, "nothing was computed again"
    assert plain.any() and torch.equal(again, plain)


def test_t5_asks_a_packed_layer_for_its_dtype():
    model, seen = reference.add(t5().half(), ["q"]), set()
    for m in packed(model).values():
        m.register_forward_pre_hook(lambda m, x: seen.add(x[0].dtype))
    logits = model(**BATCH, decoder_input_ids=BATCH["input_ids"]).logits
    assert seen == {torch.half}, f"hidden states were cast on the way: {seen}"
    assert logits.dtype == torch.half and logits.isfinite().all()


def test_the_meta_device_gives_the_same_shapes():
    def form(model):
        return {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}

    with torch.device("meta"):
        model = reference.add(Net(), ["proj"])
    assert form(model) == form(put(reference, ["proj"], r=8))
    assert all(t.is_meta for t in model.state_dict().values())
    small = reference.merge(copy.deepcopy(model), 4).state_dict()
    assert all(t.is_meta for t in small.values())
    assert form(reference.merge(model)) == form(single())


# Files


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_peft_loads_what_is_saved_onto_the_plain_base(tmp_path):
    plain = gpt2()
    model = fill(reference.add(copy.deepcopy(plain), **FULL), reference)
    peft_files.save(model, tmp_path)
    twin = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    ours = lora.add(plain, "all-linear")
    lora.load_state_dict(ours, reference.state_dict(model))
    assert_same(outputs(ours), outputs(twin), "the adapter on the plain base")


def test_an_adapter_is_loaded_onto_a_packed_base(tmp_path):
    model, bare = put(reference, ["q_proj", "c_proj"]), single()
    peft_files.save(model, tmp_path)
    linears = surgery.select(bare, "all-linear")
    surgery.swap(bare, {m: nf4.NF4Linear(m, double_quant=True) for m in linears})
    peft_files.load(bare, tmp_path)
    torch.testing.assert_close(bare(IDS), model(IDS))
    reference.merge(bare)  # it is QLoRA, whichever way it was made
    torch.testing.assert_close(bare(IDS), model(IDS))


# The oracle: peft over bitsandbytes

# How many packed products follow one another, on the longest way from input to output.
PRODUCTS = {"tiny-decoder": 16, "gpt2": 8, "t5": 20}


def wide(name):
    """A model whose widths are multiples of 64, where the library's CPU kernel is
    right, and without dropout, as it has to be in train mode."""
    if name == "tiny-decoder":
        return FAMILIES[name]()
    if name == "gpt2":
        off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        sizes = dict(vocab_size=40, n_embd=64, n_layer=2, n_head=4)
        return seeded(GPT2LMHeadModel(GPT2Config(**sizes, **off)))
    sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ids = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    config = T5Config(vocab_size=40, dropout_rate=0.0, **sizes, **ids)
    return seeded(T5ForConditionalGeneration(config))


def theirs(layer, double, kind):
    """The library's layer with a plain linear's weight, packed by the library."""
    weight = matrix(layer).clone().contiguous()
    bias = layer.bias is not None
    found = Linear4bit(*weight.T.shape, bias=bias, compute_dtype=torch.bfloat16)
    # Bytes seen as floats: T5 casts its hidden states to a weight's dtype.
    how = dict(compress_statistics=double, quant_type=kind, quant_storage=weight.dtype)
    found.weight = Params4bit(weight, requires_grad=False, **how).to("cpu")
    if bias:  # which it rounds in place
        found.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return found.train()


def library(model, double=True, kind="nf4"):
    """A copy of a plain model with the library's layers, as transformers makes them."""
    model = copy.deepcopy(model)
    swaps = {m: theirs(m, double, kind) for m in surgery.select(model, "all-linear")}
    surgery.swap(model, swaps)
    model.is_loaded_in_4bit = True  # else peft takes them for plain linears
    return model


def take(layer, twin):
    """The library's bytes into our layer."""
    state = twin.weight.quant_state
    codes = twin.weight.data.detach().view(torch.uint8).view(-1, 1)
    found = dict(codes=codes, absmax=state.absmax, code=state.code)
    if state.nested:
        found |= dict(nested_absmax=state.state2.absmax, offset=state.offset)
    for name, t in found.items():
        want = getattr(layer, name)
        assert t.shape == want.shape and t.dtype == want.dtype
        setattr(layer, name, t.clone())


def peft_over(twin, model):
    """peft's LoRA over the library's layers with our A and B, and {our name: its
    parameter}."""
    own = reference.state_dict(model)
    paths = [n.removesuffix(".lora_A") for n in own if n.endswith(".lora_A")]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=paths)
    twin = get_peft_model(twin, config)
    found = plain_names(twin)
    kinds = {type(twin.base_model.model.get_submodule(path)) for path in paths}
    assert kinds == {peft.tuners.lora.Linear4bit} and found.keys() == own.keys()
    for n, p in found.items():
        p.data.copy_(own[n])
    return twin.train(), {n: found[n] for n in own}


def step(model, own):
    """The outputs of a training step, and the gradients by their names."""
    row = outputs(model).float()
    loss = (row * torch.cos(torch.arange(len(row)))).sum() / len(row) ** 0.5
    gradients = torch.autograd.grad(loss, [*own.values()])
    return row.detach(), dict(zip(own, gradients, strict=True))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def gap(got, want):
    """The largest difference over the largest number."""
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(
    "name, double, dtype",
    [("gpt2", False, torch.float32), ("t5", True, torch.bfloat16)],
)
def test_a_training_step_is_pefts_over_the_librarys_layers(name, double, dtype):
    """Each of n products in a row rounds its result (3 U, as above), and so does the
    gradient on its way back: outputs to 3 n U of the largest, gradients to 6 n U of the
    model's largest. With FP4 in place of NF4 both are outside."""
    torch.manual_seed(0)
    plain, n = wide(name).to(dtype), PRODUCTS[name]
    model = reference.add(copy.deepcopy(plain), r=4, alpha=6, double_quant=double)
    fill(model, reference).train()
    row, gradients = step(model, reference.state_dict(model, keep_vars=True))
    found = {}
    for kind in ("nf4", "fp4"):
        twin = library(plain, double, kind)
        want, others = step(*peft_over(twin, model))
        found[kind] = gap(row, want), gap(flat(gradients), flat(others))
    assert found["nf4"][0] <= 3 * n * U and found["nf4"][1] <= 6 * n * U, found
    assert found["fp4"][0] > 3 * n * U and found["fp4"][1] > 6 * n * U, found


def test_a_training_step_is_the_one_of_transformers_and_pefts_own_recipe():
    """The same through `BitsAndBytesConfig` and peft's preparation, from the folder."""
    settings = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    settings |= dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    folder, config = base_models.MODELS / "tiny-decoder", BitsAndBytesConfig(**settings)
    how = dict(dtype=torch.float32, device_map="cpu", quantization_config=config)
    twin = AutoModelForCausalLM.from_pretrained(str(folder), **how)
    twin = prepare_model_for_kbit_training(twin, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = reference.add(FAMILIES["tiny-decoder"](), r=4, alpha=6)
    fill(model, reference).train()
    theirs = {p for p, m in twin.named_modules() if isinstance(m, Linear4bit)}
    assert packed(model).keys() == theirs, "not the same linears are packed"
    row, gradients = step(model, reference.state_dict(model, keep_vars=True))
    want, others = step(*peft_over(twin, model))
    n = PRODUCTS["tiny-decoder"]
    assert gap(row, want) <= 3 * n * U
    assert gap(flat(gradients), flat(others)) <= 6 * n * U


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_merged_into_4_bits_the_bytes_are_pefts(double):
    """peft merges by packing the sum anew. From the same bytes it comes to the same
    bytes, over a float32 base; so the errors are the same too."""
    torch.manual_seed(0)
    plain = FAMILIES["tiny-decoder"]()
    model = reference.add(copy.deepcopy(plain), r=4, alpha=6, double_quant=double)
    fill(model, reference)
    twin = library(plain, double)
    for path, m in packed(model).items():
        take(m, twin.get_submodule(path))
    twin, _ = peft_over(twin, model)
    sums = {
        path: nf4.dequantize(m.base, torch.float32) + change(m)
        for path, m in adapted(model).items()
    }
    reference.merge(model, bits=4)
    twin = twin.merge_and_unload()
    errors = dict(ours=0.0, peft=0.0)
    for path, m in packed(model).items():
        weight = twin.get_submodule(path).weight
        theirs = weight.data.view(torch.uint8).view(-1, 1)
        assert torch.equal(m.codes, theirs), f"{path}: other codes than peft's"
        steps = m.absmax.float() - weight.quant_state.absmax.float()
        assert steps.abs().sum() <= (0.01 * len(steps) + 1 if double else 0)
        back = dict(ours=nf4.dequantize(m, torch.float32))
        back["peft"] = dequantize_4bit(weight.data, weight.quant_state).float()
        for who, w in back.items():
            errors[who] += (w - sums[path]).square().sum()
    size = sum(w.square().sum() for w in sums.values())
    ours, peft = ((e / size).sqrt().item() for e in errors.values())
    assert 0.08 < ours < 0.1, "NF4's rounding of nearly normal weights"
    assert ours == pytest.approx(peft, rel=1e-3 if double else 1e-6)


# What the stored runs have to show


STORED = results.load("qlora")


def stored(key):
    return STORED["figures"][key]["value"]


def tables(key, **fixed):
    rows = results.where(STORED["runs"], **fixed)
    assert [r["seed"] for r in rows] == [0, 1, 2, 3, 4]
    assert all(len(r[key]) == 400 for r in rows)
    return results.table(rows, key)


def test_the_settings_are_those_of_loras_best_in_the_comparison_of_all_methods():
    """Save that gradients are clipped there, and not here."""
    families = results.load("families")
    want = {k: families["setting"][k] for k in ("steps", "batch", "language")}
    assert STORED["setting"] == dict(want, lr=families["best"]["LoRA"], r=8, alpha=16)
    ours = [r["learned"] for r in results.where(STORED["runs"], method="LoRA")]
    theirs = [r["learned"] for r in results.where(families["runs"], method="LoRA")]
    pairs = zip(ours, theirs, strict=True)
    apart = max(abs(results.share(a) - results.share(b)) for a, b in pairs)
    assert apart < 0.1, "the same five LoRA runs, and other answers"


@pytest.mark.parametrize("name", experiment.CODES)
def test_no_4_bit_type_is_seen_to_differ_from_lora(name):
    """No difference larger than the spread of the seeds: each interval holds 0."""
    base = tables("learned", method="LoRA")
    gap, low, high = measure.interval(tables("learned", method=name), base)
    kept = [stored(f"{name}.{k}") for k in ("gap", "gap_low", "gap_high")]
    assert kept == pytest.approx([gap, low, high])
    assert low <= 0 <= high and low > -0.15
    assert stored(f"{name}.learned") > 0.85
    assert stored(f"{name}.frozen") > 0.99 < stored("LoRA.frozen"), "nothing is lost"


@pytest.mark.parametrize("state", [*experiment.STATES, *experiment.BF16_STATES])
def test_merging_keeps_the_exact_match(state):
    unmerged = tables("learned", method="NF4")
    rows = tables(f"{state}.bits", method="NF4")
    gap, low, high = measure.interval(rows, unmerged)
    kept = [stored(f"{state}.{k}") for k in ("gap", "gap_low", "gap_high")]
    assert kept == pytest.approx([gap, low, high])
    assert abs(gap) <= 0.01 and low > -0.02 and high < 0.02
    if state == "merged16":
        same = sum(
            a == b
            for x, y in zip(rows, unmerged, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert same >= 0.99 * 2000, "16 bits change next to no answer"


def test_each_merge_errs_as_its_rounding_says():
    assert stored("merged16.weights") < 1e-7, "float32: half of its step at most"
    assert U / 2 < stored("bf16.merged16.weights") < U
    assert stored("merged4.weights") == pytest.approx(stored("NF4.rms.model"), rel=0.1)
    size = stored("merged4.weights") / stored("merged4.change")
    assert 0.3 < size < 0.7, "these runs change weights by half of their size"
    outputs = [stored(f"{k}.outputs") for k in ("merged16", "unmerged", "merged4")]
    assert outputs[0] < 1e-5 < outputs[1] < 0.01 < outputs[2] < 0.1


def test_the_stored_rounding_is_measured_anew():
    fresh = experiment.rounding()
    for key, value in fresh.items():
        assert stored(key) == pytest.approx(value, rel=1e-3), key
    for where in ("model", "normal"):
        errors = [fresh[f"{n}.rms.{where}"] for n in ("int8", "NF4", "INT4", "FP4")]
        assert errors == sorted(errors), "NF4 rounds best of the three"
    for name in experiment.CODES:
        assert fresh[f"{name}.bits"] == pytest.approx(4.13, abs=0.01)


# qlora.py copied with what it composes, for tests/test_standalone.py

ALONE = """
from mine import lora, nf4, qlora
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))
x = torch.randn(5, 64)
qlora.add(model, ["0"], r=2, alpha=4)
assert isinstance(model[0].base, nf4.NF4Linear) and isinstance(model[2], nf4.NF4Linear)
plain = model(x)
codes = model[0].base.codes.clone()
for _ in range(2):
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for p in qlora.state_dict(model, keep_vars=True).values():
        p.data -= 0.1 * p.grad
tuned = model(x)
assert not torch.allclose(tuned, plain) and torch.equal(model[0].base.codes, codes)
qlora.load_state_dict(model, qlora.state_dict(model))
assert len(qlora.state_dict(model)) == 2
import copy
small = qlora.merge(copy.deepcopy(model), bits=4)
assert [type(m).__name__ for m in small] == ["NF4Linear", "Tanh", "NF4Linear"]
merged = qlora.merge(model)
assert [type(m).__name__ for m in merged] == ["Linear", "Tanh", "Linear"]
assert torch.allclose(merged(x), tuned, atol=0.1)  # products were in bfloat16
"""

# Broken copies, for tests/test_mutations.py

ADD_LORA = "lora.add(model, targets, r, alpha, dropout, bias, rslora)"
PUT = "    surgery.swap(model, packed)\n    return model"
LINEARS = 'surgery.select(model, "all-linear")'
PATHS = "    paths = {layer: path"
SETTINGS = "layer, blocksize, double_quant, compute_dtype, code"
DELTA = "m.scaling * (m.lora_B @ m.lora_A)"
SUM = "nf4.dequantize(base, torch.float32) + delta"
CHOICE = "_pack(base, W) if bits == 4 else _plain(base, W, base.dtype)"
END = "    surgery.swap(model, new_layers)\n    return model.requires_grad_(False)"
HEADS = "    for m in heads.values():\n        surgery.set_weight(m.base, m.folded())\n"
FITS = "surgery.check_fits(path, W, base.dtype)"


def for_each_packed(*rows):
    """Lines that spoil each packed layer m before it is put in."""
    body = "".join(f"        {row}\n" for row in rows)
    return {PUT: f"    for m in packed.values():\n{body}{PUT}"}


def settings(**other):
    """`add` with other settings of LoRA."""
    call = ADD_LORA
    for name, value in other.items():
        call = call.replace(name, value)
    return {ADD_LORA: call}


# {the law that goes red: {what is broken: {text: text in its place}}}
# fmt: off
BROKEN = {
    test_every_linear_but_the_head_is_packed_whatever_the_targets: {
        "the head is packed too": {
            LINEARS: '[m for m in model.modules() if hasattr(m, "in_features")]'},
        "the targets alone are packed": {LINEARS: "surgery.select(model, targets)"}},
    test_a_head_that_is_a_target_gets_lora_and_is_not_packed: {
        "a targeted head is packed": {
            PATHS: f"    linears += surgery.select(model, targets)\n{PATHS}"},
        "LoRA goes everywhere": settings(targets='"all-linear"')},
    test_at_the_start_it_is_the_plain_model_with_dequantized_weights: {
        "nothing is packed": {PUT: "    return model"}},
    test_the_defaults_are_the_papers: {
        "double quantization is off": {"double_quant=True": "double_quant=False"},
        "products are in the input's dtype": {
            "compute_dtype=torch.bfloat16": "compute_dtype=None"}},
    test_the_packing_is_nf4s_own: {
        "double quantization cannot be switched off": {
            SETTINGS: SETTINGS.replace("double_quant", "True")},
        "the code is ignored": {SETTINGS: SETTINGS.replace("code", "nf4.NF4")},
        "the block size is ignored": {SETTINGS: SETTINGS.replace("blocksize", "64")}},
    test_head_embedding_norm_and_biases_stay_to_the_bit: {
        "embeddings and norms become float32": {PUT: f"{PUT}.float()"},
        "the biases are rounded": for_each_packed(
            "if m.bias is not None:",
            "    m.bias.data = m.bias.data.bfloat16().to(m.dtype)")},
    test_the_settings_are_loras: {
        "dropout is forgotten": settings(dropout="0.0"),
        "biases cannot train": settings(bias='"none"'),
        "rsLoRA is forgotten": settings(rslora="False")},
    test_modes_are_kept: {
        "merged layers are in train mode": {
            "return layer.train(packed.training)": "return layer"}},
    test_a_linear_with_two_parents_is_packed_once_and_merged_once: {
        "one parent of two gets the packed layer": {
            PUT: "    for parent in list(model.modules()):\n"
            "        for k, child in parent._modules.items():\n"
            "            parent._modules[k] = packed.pop(child, child)\n"
            "    return model"}},
    test_a_layer_adds_s_b_a_x_to_the_product_in_the_compute_dtype: {
        "the compute dtype is ignored": {
            SETTINGS: SETTINGS.replace("compute_dtype", "None")},
        "LoRA's branch is dead": {
            PUT: "    for m in model.modules():\n"
            "        if isinstance(m, lora.LoRALinear):\n"
            f"            m.forward = packed[m.base].forward\n{PUT}"},
        "A and B are in 16 bits": {
            PUT: "    for p in state_dict(model, keep_vars=True).values():\n"
            f"        p.data = p.data.bfloat16()\n{PUT}"},
        "alpha is ignored": settings(alpha="r")},
    test_gradients_are_those_through_an_explicitly_dequantized_base: {
        "gradients stop at a packed layer": for_each_packed(
            "m.register_forward_hook(lambda m, x, y: y.detach())")},
    test_only_a_and_b_train: {
        "the base may train": {PUT: f"{PUT}.requires_grad_(True)"}},
    test_all_but_a_and_b_is_bit_identical_after_training: {
        "the norms train": {PUT: f"    model.norm.requires_grad_(True)\n{PUT}"}},
    test_no_weight_is_kept_for_the_way_back: {
        "the unpacked weight waits for backward": for_each_packed(
            "m.forward = lambda x, m=m: nn.functional.linear(",
            "    x, nf4.dequantize(m, x.dtype), m.bias)")},
    test_one_weight_is_unpacked_at_a_time: {
        "each weight stays once it is unpacked": for_each_packed(
            "m.register_forward_pre_hook(",
            "    lambda m, x: m.__dict__.update(last=nf4.dequantize(m)))")},
    test_merged_into_16_bits_it_is_the_unmerged_model: {
        "merging drops alpha / r": {DELTA: "m.lora_B @ m.lora_A"},
        "merging adds twice": {SUM: f"{SUM} + delta"},
        "merging adds nothing": {SUM: SUM.removesuffix(" + delta")},
        "merging subtracts": {SUM: SUM.replace("+", "-")},
        "merging transposes a square product": {
            SUM: SUM.replace(
                "delta", "(delta.T if len({*delta.shape}) == 1 else delta)"
            )}},
    test_merged_weights_are_the_float32_sums_rounded_once: {
        "merging rounds before it adds": {SUM: "nf4.dequantize(base).float() + delta"},
        "merging rounds the change first": {
            SUM: SUM.replace("delta", "delta.to(base.dtype)")}},
    test_merged_into_16_bits_all_layers_are_plain_again: {
        "merging leaves layers without LoRA packed": {"if bits == 16:": "if False:"},
        "a Conv1D comes back as a linear": {
            'packed.kind.__name__ == "Conv1D"': "False"},
        "a Conv1D's weight is not turned": {"W.T if is_conv1d else W": "W"},
        "a turned weight is not laid out anew": {".contiguous()": ""},
        "a merged model is in float32": {"W.to(dtype)": "W"},
        "a merged model may train": {END: END.replace("False", "True")}},
    test_trained_biases_survive_a_merge: {
        "merging drops biases": {"layer.bias = packed.bias": "layer.bias = None"}},
    test_a_head_with_lora_is_merged_along: {
        "a head with LoRA stays unmerged": {HEADS: ""},
        "a head keeps its wrapper": {"{m: m.base for m in heads.values()}": "{}"}},
    test_merged_into_4_bits_the_sums_are_packed_as_the_base_was: {
        "4 bits are 16": {CHOICE: "_plain(base, W, base.dtype)"},
        "4 bits in default settings": {
            "=base.blocksize": "=64",
            "=base.offset is not None": "=True",
            "=base.compute_dtype": "=torch.bfloat16",
            "=base.code": "=nf4.NF4"},
        "4 bits forget the block size": {"=base.blocksize": "=64"},
        "4 bits forget the code": {"=base.code": "=nf4.NF4"},
        "4 bits forget double quantization": {"=base.offset is not None": "=False"},
        "4 bits forget the compute dtype": {"=base.compute_dtype": "=None"},
        "4 bits round to 16 first": {
            "_plain(base, W, torch.float32)": "_plain(base, W, base.dtype)"},
        "packed anew it is another dtype": {"    layer.dtype = base.dtype\n": ""},
        "layers without LoRA are packed anew": {
            END: "    for m in model.modules() if bits == 4 else ():\n"
            "        if isinstance(m, nf4.NF4Linear):\n"
            f"            new_layers.setdefault(m, _pack(m, nf4.dequantize(m)))\n{END}"
        }},
    test_merged_into_4_bits_a_small_change_is_lost_and_a_large_one_kept: {
        "4 bits have blocks of 4 weights": {"=base.blocksize": "=4"}},
    test_the_state_dict_is_loras_and_goes_round: {
        "the state dict holds the base": {
            "return lora.state_dict(model, keep_vars)": "return model.state_dict()"},
        "loading is not strict": {
            "lora.load_state_dict(model, tensors)\n\n\n": "model.load_state_dict("
            "tensors, strict=False)\n\n\n"}},
    test_what_lora_or_nf4_refuses_leaves_the_model_plain: {
        "LoRA is there when a weight cannot be packed": {
            f"    {ADD_LORA}\n": "",
            PATHS: f"    {ADD_LORA}\n{PATHS}"},
        "the base is packed when LoRA refuses": {
            ADD_LORA: f"surgery.swap(model, packed)\n    {ADD_LORA}",
            PUT: "    return model"},
        "a weight that cannot be packed stays as it is": {
            'raise ValueError(f"{paths[layer]}: {error}") from None': "pass",
            "as error": ""}},
    test_fused_experts_are_refused_even_where_they_are_no_target: {
        "fused experts are passed over": {LINEARS: 'surgery.select(model, ["q_proj"])'},
    },
    test_adding_twice_is_refused: {
        "a second time says nothing": {
            "    surgery.refuse_carried(model)\n": "    kinds = nf4.NF4Linear, "
            "lora.LoRALinear\n    if any(isinstance(m, kinds) for m in "
            "model.modules()):\n        return model\n"}},
    test_merging_refuses_other_bits_and_other_models: {
        "any number of bits is 16": {
            "if type(bits) is not int or bits not in (4, 16):": "if False:"},
        "a plain LoRA is merged": {"if not packed:": "if False:"}},
    test_merging_refuses_a_broken_adapter_and_a_sum_that_overflows: {
        "merging changes the head first": {
            HEADS: "",
            "    new_layers = {": f"{HEADS}    new_layers = {{"},
        "what overflows is merged": {FITS: "pass"},
        "merging swaps layer by layer": {
            CHOICE: f"{CHOICE}\n        surgery.swap(model, {{m: new_layers[m]}})"}},
    test_loras_own_merge_refuses: {
        "the base is rounded and not packed": {
            PUT: "    for m, q in packed.items():\n"
            f"        packed[m] = _plain(q, nf4.dequantize(q), q.dtype)\n{PUT}"}},
}
# fmt: on
MUTATIONS = by_fault(BROKEN)
