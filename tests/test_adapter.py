"""The laws of bottleneck adapters. The oracle is `make adapterhub`, in its own
environment: the `adapters` library needs an older transformers.

A law that takes only `adapter`, the module, is run again by tests/test_mutations.py on
broken copies of adapter.py. Messages name the mistake that gives the symptom.
"""

import copy
import math

import pytest
import torch
from common import (
    BATCH,
    SMALL,
    assert_one_sentence,
    assert_unchanged,
    bert,
    gpt2,
    jiggle,
    llama,
    seeded,
    snapshot,
    t5,
    trainable,
)
from torch import nn
from torch.nn.functional import gelu, relu, silu
from transformers import (
    BertConfig,
    BertModel,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from peftlab import adapter as reference
from peftlab.kit import base_models

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


@pytest.fixture
def adapter():
    return reference


def encoder():
    return bert(BertModel).double()


FAMILIES = {"bert": encoder, "llama": llama, "t5": t5}


def run(model):
    """The model's first output, (3, 8, ...), for the batch that the tests share."""
    seq2seq = getattr(model.config, "is_encoder_decoder", False)
    more = dict(decoder_input_ids=BATCH["input_ids"]) if seq2seq else {}
    return model(**BATCH, **more)[0]


def plain_output(model):
    with torch.no_grad():  # as frozen: attention has another kernel for training
        return run(model)


def fill(model, adapter, name=None, seed=1):
    """Every number of the adapters random, so that they say something."""
    generator = torch.Generator().manual_seed(seed)
    for t in adapter.state_dict(model, name).values():
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        t.copy_(noise / t.shape[-1] ** 0.5)
    return model


def train(model, steps=2):
    """A few steps of gradient descent on whatever is trainable; the model."""
    own = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        gradients = torch.autograd.grad(run(model).sin().sum(), own)
        for p, g in zip(own, gradients, strict=True):
            p.data -= 0.1 * g
    return model


def branch(tensors, site, u, f=relu, name="default"):
    """up(f(down(u))), from an adapter's four tensors; site is a path's beginning."""
    w = {k.removeprefix(f"{site}.adapters.{name}."): t for k, t in tensors.items()}
    low = f(u @ w["down.weight"].T + w["down.bias"])
    return low @ w["up.weight"].T + w["up.bias"]


def sub_layer(adapter, site, *placements, **settings):
    """A post-norm sub-layer of BERT: what it returns, and h, x and LN to do it by hand.
    A second placement is a second adapter, called "second"."""
    model = encoder()
    for i, placement in enumerate(placements):
        adapter.add(model, placement, 5, ("default", "second")[i], **settings)
    fill(model, adapter)
    layer, generator = model.get_submodule(site), torch.Generator().manual_seed(3)
    x = torch.randn(4, 32, generator=generator, dtype=torch.float64)
    inner = torch.randn(4, layer.dense.in_features, generator=generator).double()
    tensors = adapter.state_dict(model)
    return layer(inner, x), layer.dense(inner), x, layer.LayerNorm, tensors


# The laws


def test_adding_an_adapter_changes_no_output(adapter):
    for name, build in FAMILIES.items():
        plain = plain_output(build())
        for placement in PLACEMENTS:
            model = adapter.add(build(), placement, 4)
            assert torch.equal(plain_output(model), plain), (
                f"{name}, {placement}: outputs moved at step 0: up and its bias start"
                " at zero, and the sub-layer's own output stays"
            )


def test_the_first_gradient_reaches_up_and_not_down(adapter):
    for build in FAMILIES.values():
        for placement in PLACEMENTS:
            torch.manual_seed(0)  # or a unit of ReLU's may be off for every token
            model = adapter.add(build(), placement, 16)
            run(model).sin().sum().backward()
            for name, p in adapter.state_dict(model, keep_vars=True).items():
                assert p.grad is not None, f"{name} gets no gradient: never called?"
                if ".up." in name:
                    assert p.grad.any(), f"{name} stays zero: the adapter is dead"
                else:
                    assert not p.grad.any(), f"{name} has a gradient: up was not zero"


def test_down_starts_uniform_and_its_bias_at_zero(adapter):
    tensors = adapter.state_dict(adapter.add(encoder(), "parallel", 500))
    for name, t in tensors.items():
        if name.endswith("down.weight"):
            bound = 1 / math.sqrt(32)
            assert t.shape == (500, 32) and t.abs().max() <= bound
            assert abs(t.std() - bound / math.sqrt(3)) < 0.02 * bound
        else:
            assert not t.any(), f"{name} starts at zero"


def test_houlsby_reads_what_the_sub_layer_returns(adapter):
    for site in ("encoder.layer.1.attention.output", "encoder.layer.1.output"):
        got, h, x, norm, tensors = sub_layer(adapter, site, "houlsby")
        expected = norm(h + branch(tensors, site, h) + x)
        torch.testing.assert_close(
            got, expected, msg=f"{site}: LN(h + up(f(down(h))) + x), x left unread"
        )


def test_pfeiffer_reads_behind_the_norm_and_keeps_what_came_before_it(adapter):
    site = "encoder.layer.1.output"
    got, h, x, norm, tensors = sub_layer(adapter, site, "pfeiffer")
    expected = norm(h + branch(tensors, site, norm(h + x)) + x)
    torch.testing.assert_close(
        got,
        expected,
        msg="u is LN(h + x); what is kept is h, not u, and LN runs a second time",
    )


def test_parallel_reads_the_sub_layers_input_and_weighs_four(adapter):
    site = "encoder.layer.1.output"
    got, h, x, norm, tensors = sub_layer(adapter, site, "parallel")
    expected = norm(h + 4 * branch(tensors, site, x) + x)
    torch.testing.assert_close(got, expected, msg="u is x, and s is 4")


def test_the_scale_and_the_activation_are_settings(adapter):
    site = "encoder.layer.0.output"
    for name, f in dict(relu=relu, gelu=gelu, silu=silu).items():
        for scale in (0.5, 2):
            settings = dict(activation=name, scale=scale)
            got, h, x, norm, tensors = sub_layer(adapter, site, "houlsby", **settings)
            expected = norm(h + scale * branch(tensors, site, h, f) + x)
            torch.testing.assert_close(got, expected, msg=f"s is {scale}, f is {name}")


def test_on_llama_u_is_not_normalised(adapter):
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    base = llama().double().model
    rope = base.rotary_emb(x, torch.arange(6)[None])
    base = base.layers[0]
    for placement in PLACEMENTS:
        model = fill(adapter.add(llama().double(), placement, 5), adapter)
        tensors, site = adapter.state_dict(model), "model.layers.0"
        got = model.get_submodule(site)(x, position_embeddings=rope)
        normed = base.input_layernorm(x)
        h = base.self_attn(normed, position_embeddings=rope, attention_mask=None)[0]
        if placement == "houlsby":
            h = h + branch(tensors, f"{site}.self_attn", h)
        middle = x + h
        h = base.mlp(base.post_attention_layernorm(middle))
        u, s = {
            "houlsby": (h, 1),
            "pfeiffer": (h + middle, 1),
            "parallel": (middle, 4),
        }[placement]
        expected = middle + h + s * branch(tensors, f"{site}.mlp", u)
        torch.testing.assert_close(got, expected, msg=f"{placement} reads another u")


def test_on_t5_u_is_not_normalised(adapter):
    x = torch.randn(1, 6, 32)
    for site, inner in (
        ("encoder.block.0.layer.0", "SelfAttention"),
        ("encoder.block.1.layer.1", "DenseReluDense"),
        ("decoder.block.1.layer.2", "DenseReluDense"),
    ):
        for placement in PLACEMENTS if inner == "DenseReluDense" else ["houlsby"]:
            model = fill(adapter.add(t5(), placement, 5), adapter)
            layer, base = model.get_submodule(site), t5().get_submodule(site)
            h = base.get_submodule(inner)(base.layer_norm(x))
            h = h[0] if isinstance(h, tuple) else h
            u, s = {"houlsby": (h, 1), "pfeiffer": (h + x, 1), "parallel": (x, 4)}[
                placement
            ]
            expected = x + h + s * branch(adapter.state_dict(model), site, u)
            got = layer(x)
            got = got[0] if isinstance(got, tuple) else got
            torch.testing.assert_close(got, expected, msg=f"{site}: {placement}")


def test_houlsby_sits_twice_in_a_layer_the_others_once(adapter):
    sites = {
        "bert": (
            "encoder.layer.{}.",
            ["output"],
            ["attention.output"],
        ),
        "llama": ("model.layers.{}.", ["mlp"], ["self_attn"]),
        "t5": (
            "{}.block.{}.layer.",
            ["encoder 1", "decoder 2"],
            ["encoder 0", "decoder 0"],  # and none behind the cross-attention
        ),
    }
    for family, (path, forward, attention) in sites.items():
        for placement in PLACEMENTS:
            model = adapter.add(FAMILIES[family](), placement, 2)
            names = [*forward, *(attention if placement == "houlsby" else [])]
            wanted = set()
            for i in range(2):
                for name in names:
                    stack, _, leaf = name.rpartition(" ")
                    wanted.add(path.format(*[stack] * bool(stack), i) + leaf)
            found = {n.partition(".adapters.")[0] for n in adapter.state_dict(model)}
            assert found == wanted, f"{family}, {placement}: in the wrong places"


def test_an_adapter_has_2md_plus_d_plus_m_numbers(adapter):
    large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    for build, d, m, layers, pfeiffer in (
        (lambda: BertModel(BertConfig()), 768, 48, 12, 894_528),
        (
            lambda: RobertaModel(RobertaConfig(**large, num_attention_heads=16)),
            1024,
            64,
            24,
            3_171_840,
        ),
    ):
        with torch.device("meta"):
            model = build()
        for name, number in (("pfeiffer", 1), ("parallel", 1), ("houlsby", 2)):
            adapter.add(model, name, m, name)
            own = adapter.state_dict(model, name)
            count = sum(t.numel() for t in own.values())
            assert count == layers * number * (2 * m * d + d + m), f"{name}: {count:,}"
            assert count == number * pfeiffer
            assert trainable(model) == own.keys()
            assert all(t.is_meta for t in own.values()), "not on the base's device"


def test_only_the_new_adapter_trains(adapter):
    for build in FAMILIES.values():
        model = adapter.add(build(), "houlsby", 2, "first")
        assert trainable(model) == adapter.state_dict(model).keys(), "is W frozen?"
        adapter.add(model, "pfeiffer", 2, "second")
        assert trainable(model) == adapter.state_dict(model, "second").keys(), (
            "the base and the earlier adapter are frozen, the new one is not"
        )


def test_frozen_weights_are_bit_identical_after_training(adapter):
    for placement in PLACEMENTS:
        model = fill(adapter.add(encoder(), placement, 4), adapter)
        before, own = snapshot(model)[0], adapter.state_dict(model)
        train(model)
        for name, t in model.state_dict().items():
            moved = not torch.equal(t, before[name])
            assert name in own or not moved, f"{name} is frozen, and yet it moved"
            assert moved or name not in own, f"{name} did not train"


def test_the_base_keeps_the_names_of_its_weights(adapter):
    for build in FAMILIES.values():
        plain = build().state_dict()
        model = adapter.add(build(), "houlsby", 2)
        got = model.state_dict().keys() - adapter.state_dict(model).keys()
        assert got == plain.keys(), "a weight of the base goes by another name"
        assert not model.load_state_dict(plain, strict=False).unexpected_keys


def test_the_second_adapter_reads_what_the_first_returns(adapter):
    site = "encoder.layer.1.output"
    got, h, x, norm, tensors = sub_layer(adapter, site, "houlsby", "pfeiffer")
    first = h + branch(tensors, site, h)
    second = first + branch(tensors, site, norm(first + x), name="second")
    torch.testing.assert_close(got, norm(second + x), msg="in sequence, as added")


def test_the_order_of_the_names_is_the_order_of_work(adapter):
    model = adapter.add(adapter.add(encoder(), "houlsby", 5, "a"), "pfeiffer", 5, "b")
    fill(model, adapter)
    added = plain_output(model)
    swapped = plain_output(adapter.activate(model, ["b", "a"]))
    assert (swapped - added).abs().max() > 1e-3, "the order makes no difference"
    again = plain_output(adapter.activate(model, ("a", "b")))
    assert torch.equal(again, added)


def test_two_parallel_adapters_add_up(adapter):
    site = "encoder.layer.1.output"
    got, h, x, norm, tensors = sub_layer(adapter, site, "parallel", "parallel")
    both = branch(tensors, site, x) + branch(tensors, site, x, name="second")
    torch.testing.assert_close(got, norm(h + 4 * both + x), msg="each reads x alone")


def test_switched_off_is_the_base_model(adapter):
    for build in FAMILIES.values():
        plain, model = plain_output(build()), build()
        adapter.add(model, "houlsby", 4, "a")
        alone = plain_output(fill(model, adapter, "a"))
        fill(adapter.add(model, "parallel", 4, "b"), adapter, "b")
        assert not torch.allclose(plain_output(model), alone), "the second is dead"
        assert adapter.activate(model, ["a"]) is model
        assert torch.equal(plain_output(model), alone), "b still works"
        assert torch.equal(plain_output(adapter.activate(model, [])), plain)


def test_a_new_adapter_leaves_off_what_is_off(adapter):
    model = adapter.add(encoder(), "pfeiffer", 4, "a")
    adapter.activate(fill(model, adapter), [])
    fill(adapter.add(model, "houlsby", 4, "b"), adapter, "b")
    alone = fill(adapter.add(encoder(), "houlsby", 4, "b"), adapter)
    assert torch.equal(plain_output(model), plain_output(alone))


def test_the_state_dict_goes_round(adapter):
    for build in FAMILIES.values():
        for placement in PLACEMENTS:
            one = train(adapter.add(build(), placement, 3))
            tensors = {n: t.clone() for n, t in adapter.state_dict(one).items()}
            two = adapter.add(build(), placement, 3)
            adapter.load_state_dict(two, tensors)
            assert torch.equal(plain_output(one), plain_output(two))


def test_one_adapter_of_two_is_saved_and_loaded_by_its_name(adapter):
    def both():
        return adapter.add(
            adapter.add(encoder(), "pfeiffer", 3, "a"), "houlsby", 3, "b"
        )

    one, two = fill(both(), adapter), both()
    tensors = {n: t.clone() for n, t in adapter.state_dict(one, "a").items()}
    assert len(tensors) == 8 and all(".adapters.a." in n for n in tensors)
    adapter.load_state_dict(two, tensors, "a")
    assert all(torch.equal(adapter.state_dict(two)[n], t) for n, t in tensors.items())
    assert not any(t.any() for n, t in adapter.state_dict(two).items() if ".b.up" in n)
    with pytest.raises(ValueError):
        adapter.load_state_dict(two, tensors)  # all of them are meant, b too


def test_loading_is_strict(adapter):
    model = fill(adapter.add(encoder(), "houlsby", 3), adapter)
    good = {n: t.clone() + 1 for n, t in adapter.state_dict(model).items()}
    before = snapshot(model)
    up = "encoder.layer.1.output.adapters.default.up.weight"
    bad = [
        {},
        {n: t for n, t in good.items() if n != up},
        {**good, up.replace("default", "other"): good[up]},
        {**good, up: good[up].T},
        {**good, up: good[up][:, :1]},
        {**good, up: None},
    ]
    for tensors in bad:
        with pytest.raises(ValueError) as error:
            adapter.load_state_dict(model, tensors)
        assert_one_sentence(error)
        assert_unchanged(model, before)
    adapter.load_state_dict(model, good)


def test_train_and_eval_change_no_weight(adapter):
    model = fill(adapter.add(encoder(), "pfeiffer", 3), adapter)
    before, output = snapshot(model)[0], plain_output(model)
    model.train().eval().train().eval()
    after = snapshot(model)[0]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before), "a mode moved weights"
    assert torch.equal(plain_output(model), output)


def test_a_deep_copy_is_a_model_of_its_own(adapter):
    for build in FAMILIES.values():
        model = fill(adapter.add(build(), "houlsby", 3), adapter)
        output = plain_output(model)
        run(model)  # with a graph: what a hook keeps of it cannot be copied
        twin = copy.deepcopy(model)
        assert torch.equal(plain_output(twin), output)
        jiggle(adapter.state_dict(twin).values())
        assert not torch.equal(plain_output(twin), output), (
            "the copy runs the original's"
        )
        adapter.activate(twin, [])
        assert torch.equal(plain_output(model), output), "the original follows its copy"


def test_no_activation_is_kept_after_a_forward_pass(adapter):
    model = adapter.add(encoder(), "parallel", 3)
    run(model)
    for module in model.modules():
        held = [v for v in vars(module).values() if isinstance(v, tuple) and v]
        held = [v for v in held if torch.is_tensor(v[0])]
        assert not held, "memory: a hook keeps a sub-layer's input alive"


def test_adapters_are_float32_over_a_16_bit_base(adapter):
    for placement in PLACEMENTS:
        for dtype in (torch.bfloat16, torch.float16):
            model = fill(adapter.add(encoder().to(dtype), placement, 3), adapter)
            own = adapter.state_dict(model, keep_vars=True).values()
            assert {p.dtype for p in own} == {torch.float32}
            output = run(model)
            assert output.dtype == dtype, "the base's precision must go on"
            output.float().sin().sum().backward()
            assert all(p.grad.isfinite().all() and p.grad.any() for p in own)
    own = adapter.state_dict(adapter.add(encoder(), "houlsby", 3))
    assert {p.dtype for p in own.values()} == {torch.float64}


def test_a_name_is_free_once(adapter):
    model = adapter.add(encoder(), "houlsby", 3, "values")  # a ModuleDict refuses it
    adapter.add(model, "houlsby", 3, "train")
    before = snapshot(model)
    for name in ("values", "train"):
        for placement in PLACEMENTS:
            with pytest.raises(ValueError, match=name) as error:
                adapter.add(model, placement, 3, name)
            assert_one_sentence(error)
            assert_unchanged(model, before)
    assert len(adapter.state_dict(model, "values")) == 16


# More architectures


def kin(config, model, **more):
    return lambda: seeded(model(config(**SMALL, num_attention_heads=4, **more)))


GROUPED = dict(num_key_value_heads=2, head_dim=8)
T5_SIZES = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
MORE = {
    "roberta": kin(RobertaConfig, RobertaForSequenceClassification),
    "xlm-roberta": kin(XLMRobertaConfig, XLMRobertaModel),
    "mistral": kin(MistralConfig, MistralForCausalLM, **GROUPED),
    "qwen2": kin(Qwen2Config, Qwen2ForCausalLM, num_key_value_heads=2),
    "qwen3": kin(Qwen3Config, Qwen3ForCausalLM, **GROUPED),
    "mt5": lambda: seeded(MT5ForConditionalGeneration(MT5Config(**T5_SIZES))),
    "tiny-decoder": lambda: base_models.load("tiny-decoder", device="cpu")[0],
}


@pytest.mark.parametrize("family", MORE)
def test_the_kin_of_bert_t5_and_llama_have_adapters_too(family):
    model = MORE[family]()
    plain = plain_output(model)
    for i, placement in enumerate(PLACEMENTS):
        reference.add(model, placement, 4, placement)
        assert torch.equal(plain_output(model), plain)
        layers = 4 if family in ("mt5", "tiny-decoder") else 2
        own = reference.state_dict(model, placement)
        assert len(own) == 4 * layers * (2 if placement == "houlsby" else 1), i
    fill(model, reference)
    assert not torch.allclose(plain_output(model), plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tiny_decoder_generates_with_its_cache_what_it_would_without(placement):
    model = fill(reference.add(MORE["tiny-decoder"](), placement, 4), reference)
    ids = BATCH["input_ids"][:1]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    cached, whole = (
        model.generate(ids, attention_mask=mask, use_cache=use, **settings)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("build", [lambda: bert(BertModel), llama, t5])
def test_autocast_comes_close_to_float32(build):
    model = fill(reference.add(build(), "pfeiffer", 3, scale=0.1), reference)
    exact = plain_output(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(model)
    rounded.float().sin().sum().backward()
    own = reference.state_dict(model, keep_vars=True).values()
    assert all(p.grad.dtype == p.dtype and p.grad.any() for p in own)
    gap = (rounded.float() - exact).abs().max() / exact.abs().max()
    assert gap < 0.05, f"autocast moves the outputs by {gap:.1%}"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_under_checkpointing_are_the_same(placement):
    gradients = []
    for checkpointing in (False, True):
        model = fill(reference.add(llama(), placement, 4), reference).train()
        if checkpointing:
            how = dict(use_reentrant=False)
            model.activation_checkpointing_enable(how)
        run(model).sin().sum().backward()
        own = reference.state_dict(model, keep_vars=True)
        gradients.append({n: p.grad for n, p in own.items()})
        copy.deepcopy(model)  # nothing of the second forward pass is left behind
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, msg=name)


# Bad input: one sentence each, and the model as it was

BAD = {
    "an unknown placement": dict(placement="lora"),
    "no placement": dict(placement=None),
    "a list of placements": dict(placement=["houlsby"]),
    "bottleneck=0": dict(bottleneck=0),
    "bottleneck=-8": dict(bottleneck=-8),
    "bottleneck=1.0": dict(bottleneck=1.0),
    "bottleneck=True": dict(bottleneck=True),
    "bottleneck='8'": dict(bottleneck="8"),
    "bottleneck=None": dict(bottleneck=None),
    "an empty name": dict(name=""),
    "a name with a dot": dict(name="de.dates"),
    "a name that is None": dict(name=None),
    "a name that is a number": dict(name=3),
    "a name that is a list": dict(name=["de"]),
    "an unknown activation": dict(activation="softmax"),
    "an activation that is a function": dict(activation=torch.relu),
    "scale=0": dict(scale=0),
    "scale=-1": dict(scale=-1.0),
    "scale=nan": dict(scale=math.nan),
    "scale=inf": dict(scale=math.inf),
    "scale='4'": dict(scale="4"),
    "scale=True": dict(scale=True),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(case):
    model = encoder()
    model.pooler.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        reference.add(model, **{"placement": "houlsby", "bottleneck": 4, **BAD[case]})
    assert_one_sentence(error)
    assert_unchanged(model, before)


@pytest.mark.parametrize("build", [gpt2, lambda: nn.Sequential(nn.Linear(4, 4))])
def test_an_unknown_architecture_is_refused_by_what_is_known(build):
    model = build()
    before = snapshot(model)
    for placement in PLACEMENTS:
        with pytest.raises(ValueError, match="BERT, RoBERTa, T5 and Llama") as error:
            reference.add(model, placement, 4)
        assert_one_sentence(error)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "names", ["a", ["c"], ["a", "c"], ["a", "a"], [None], [["a"]], None, 3, {"a"}]
)
def test_activate_refuses_what_it_does_not_know_and_changes_nothing(names):
    model = reference.add(
        reference.add(encoder(), "houlsby", 3, "a"), "pfeiffer", 3, "b"
    )
    output = plain_output(fill(model, reference))
    with pytest.raises(ValueError, match="'a', 'b'") as error:
        reference.activate(model, names)
    assert_one_sentence(error)
    assert torch.equal(plain_output(model), output)


@pytest.mark.parametrize("verb", ["state_dict", "load_state_dict", "activate"])
def test_the_verbs_say_so_where_there_is_no_adapter(verb):
    model, more = encoder(), dict(load_state_dict=[{}], activate=[[]])
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        getattr(reference, verb)(model, *more.get(verb, []))
    assert_one_sentence(error)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="'de'"):
        reference.state_dict(reference.add(model, "houlsby", 3), "de")


# adapter.py copied alone, for tests/test_standalone.py

ALONE = """
import adapter
from torch import nn

class BertOutput(nn.Module):  # as in transformers, which is not here
    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(8, 4), nn.LayerNorm(4)
        self.dropout = nn.Dropout(0.1)

    def forward(self, h, x):
        return self.LayerNorm(self.dropout(self.dense(h)) + x)

torch.manual_seed(0)
model = nn.ModuleDict({"output": BertOutput()}).eval()
h, x = torch.randn(5, 8), torch.randn(5, 4)
plain = model["output"](h, x)
for placement in ("houlsby", "pfeiffer", "parallel"):
    adapter.add(model, placement, 2, name=placement)
    assert torch.equal(model["output"](h, x), plain)
    for _ in range(2):
        model.zero_grad()
        model["output"](h, x).pow(2)[:, 0].sum().backward()
        own = adapter.state_dict(model, placement, keep_vars=True)
        for p in own.values():
            p.data -= 0.1 * p.grad
    assert not torch.allclose(model["output"](h, x), plain)
    adapter.load_state_dict(model, adapter.state_dict(model))
    adapter.activate(model, [])
assert torch.equal(model["output"](h, x), plain)
"""

# Broken copies, for tests/test_mutations.py

UP = "(h + self.scale * self.up(self.f(self.down(u)))).to(h.dtype)"
ZEROS = "(self.down.bias, self.up.weight, self.up.bias)"
FREEZE = "    model.requires_grad_(False)\n"
ACTIVE = "[*next(iter(old.values()), ()), name]"
DEFAULT = '4.0 if placement == "parallel" else 1.0'
SITE = "owner.adapters = Site"
START = test_adding_an_adapter_changes_no_output
HOULSBY = test_houlsby_reads_what_the_sub_layer_returns
PFEIFFER = test_pfeiffer_reads_behind_the_norm_and_keeps_what_came_before_it
PARALLEL = test_parallel_reads_the_sub_layers_input_and_weighs_four
LLAMA = test_on_llama_u_is_not_normalised
T5 = test_on_t5_u_is_not_normalised
TWICE = test_houlsby_sits_twice_in_a_layer_the_others_once
OFF = test_switched_off_is_the_base_model
STRICT = test_loading_is_strict
COPY = test_a_deep_copy_is_a_model_of_its_own

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "up starts at random": (START, {ZEROS: "(self.down.bias, self.up.bias)"}),
    "up's bias starts at random": (START, {ZEROS: "(self.down.bias, self.up.weight)"}),
    "down's bias starts at random": (
        test_down_starts_uniform_and_its_bias_at_zero,
        {ZEROS: "(self.up.weight, self.up.bias)"},
    ),
    "up and down start at zero": (
        test_down_starts_uniform_and_its_bias_at_zero,
        {ZEROS: "self.parameters()"},
    ),
    "the adapter is dead": (
        test_the_first_gradient_reaches_up_and_not_down,
        {UP: "h"},
    ),
    "down and up start at random": (
        test_the_first_gradient_reaches_up_and_not_down,
        {ZEROS: "(self.down.bias,)"},
    ),
    "no skip connection": (START, {UP: UP.replace("h + ", "", 1)}),
    "no nonlinearity": (HOULSBY, {"self.f(self.down(u))": "self.down(u)"}),
    "houlsby reads the input": (HOULSBY, {"x, norm: h,": "x, norm: x,"}),
    "houlsby reads h + x": (HOULSBY, {"x, norm: h,": "x, norm: h + x,"}),
    "pfeiffer reads before the norm": (
        PFEIFFER,
        {"norm: norm(h + x)": "norm: h + x"},
    ),
    "pfeiffer forgets the residual": (PFEIFFER, {"norm(h + x)": "norm(h)"}),
    "pfeiffer reads what houlsby reads": (PFEIFFER, {"norm: norm(h + x)": "norm: h"}),
    "what is read is kept, not h": (PFEIFFER, {UP: UP.replace("h + ", "u + ", 1)}),
    "parallel reads the output": (PARALLEL, {"norm: x,": "norm: h,"}),
    "parallel weighs one": (PARALLEL, {DEFAULT: "1.0"}),
    "all weigh four": (HOULSBY, {DEFAULT: "4.0"}),
    "the scale is ignored": (
        test_the_scale_and_the_activation_are_settings,
        {"self.scale * self.up": "self.up"},
    ),
    "the activation is ignored": (
        test_the_scale_and_the_activation_are_settings,
        {"getattr(nn.functional, f)": "nn.functional.relu"},
    ),
    "the input is read behind its norm": (
        LLAMA,
        {"self._seen = args[-1]": "self._seen = module.forward(*args)"},
    ),
    "llama's adapters read the other sub-layer's input": (
        LLAMA,
        {"m.mlp, m.post_attention_layernorm,": "m.mlp, m.input_layernorm,"},
    ),
    "t5's pfeiffer reads what it normalises": (
        T5,
        {"lambda t: t": "module"},
    ),
    "t5's attention has none": (TWICE, {"T5Layer(Self.*|FF)": "T5Layer(FF)"}),
    "t5's cross-attention has one": (
        TWICE,
        {"T5Layer(Self.*|FF)": "T5Layer(.*Attention|FF)"},
    ),
    "pfeiffer sits behind attention too": (
        TWICE,
        {'p[-1] or placement == "h': '1 or "h'},
    ),
    "houlsby sits once": (TWICE, {'p[-1] or placement == "houlsby"': "p[-1]"}),
    "no biases": (
        test_an_adapter_has_2md_plus_d_plus_m_numbers,
        {"m, **like), nn": "m, False, **like), nn", ZEROS: "(self.up.weight,)"},
    ),
    "the width is one too many": (
        test_an_adapter_has_2md_plus_d_plus_m_numbers,
        {"nn.Linear(len(w), m,": "nn.Linear(len(w), m := m + 1,"},
    ),
    "the base is not frozen": (test_only_the_new_adapter_trains, {FREEZE: ""}),
    "all of it is frozen": (
        test_only_the_new_adapter_trains,
        {"    return activate(model, [*": f"{FREEZE}    return activate(model, [*"},
    ),
    "the base trains along": (
        test_frozen_weights_are_bit_identical_after_training,
        {FREEZE: ""},
    ),
    "the base's modules go by other names": (
        test_the_base_keeps_the_names_of_its_weights,
        {SITE: "owner.base = getattr(entry, 'LayerNorm', entry); " + SITE},
    ),
    "the second adapter reads what the first read": (
        test_the_second_adapter_reads_what_the_first_returns,
        {"        for name in (n": "        first = h\n        for name in (n"}
        | {
            "h = self._modules[name](h, x, norm)": "h = h - first + "
            "self._modules[name](first, x, norm)"
        },
    ),
    "the adapters work in the order of adding": (
        test_the_order_of_the_names_is_the_order_of_work,
        {"n in self._active if n in self)": "n in self if n in self._active)"},
    ),
    "the last of two parallel ones is left alone": (
        test_two_parallel_adapters_add_up,
        {"        for name in (n": "        first = h\n        for name in (n"}
        | {"(h, x, norm)\n        return": "(first, x, norm)\n        return"},
    ),
    "switching off does nothing": (OFF, {"site._active = tuple(names)": "pass"}),
    "only the first may be switched off": (
        OFF,
        {"site._active = tuple(names)": "site._active = tuple(names) or ('a',)"},
    ),
    "a new adapter wakes the others": (
        test_a_new_adapter_leaves_off_what_is_off,
        {ACTIVE: "[*old, name]"},
    ),
    "the state dict leaves biases out": (
        test_the_state_dict_goes_round,
        {"if name in (None, k.split": "if 'bias' not in k and name in (None, k.split"},
    ),
    "the state dict is always everyone's": (
        test_one_adapter_of_two_is_saved_and_loaded_by_its_name,
        {"if name in (None, k.split": "if True or name in (None, k.split"},
    ),
    "loading is not strict": (
        STRICT,
        {
            "if got != want or path not in own:": "if path in tensors and path in own"
            " and got != want:",
            "t.copy_(tensors[path])": "t.copy_(tensors.get(path, t))",
        },
    ),
    "loading lets the unexpected pass": (
        STRICT,
        {"own.keys() | tensors.keys()": "own.keys()"},
    ),
    "train() moves a weight": (
        test_train_and_eval_change_no_weight,
        {
            "    def enter(self,": "    def train(self, mode=True):\n"
            "        for p in self.parameters():\n"
            "            p.data *= 1 + 1e-3 * mode\n"
            "        return super().train(mode)\n\n"
            "    def enter(self,"
        },
    ),
    "a copy runs the original's adapters": (
        COPY,
        {
            "_hook(owner.adapters.leave)": "_hook("
            "lambda m, a, o, site=owner.adapters: site.leave(m, a, o))"
        }
        | {
            "_hook(owner.adapters.enter)": "_hook("
            "lambda m, a, site=owner.adapters: site.enter(m, a))"
        },
    ),
    "the input of a sub-layer is kept": (
        COPY,
        {"(x, norm), self._seen = self._seen, None": "x, norm = self._seen"},
    ),
    "the input stays in memory": (
        test_no_activation_is_kept_after_a_forward_pass,
        {"(x, norm), self._seen = self._seen, None": "x, norm = self._seen"},
    ),
    "the adapters are in the base's 16 bits": (
        test_adapters_are_float32_over_a_16_bit_base,
        {"torch.promote_types(w.dtype, torch.float32)": "w.dtype"},
    ),
    "the answer is in float32": (
        test_adapters_are_float32_over_a_16_bit_base,
        {UP: UP.removesuffix(".to(h.dtype)")},
    ),
    "float32 over a float64 base": (
        test_adapters_are_float32_over_a_16_bit_base,
        {"torch.promote_types(w.dtype, torch.float32)": "torch.float32"},
    ),
    "a name may come twice": (
        test_a_name_is_free_once,
        {" or name in old": ""},
    ),
}
