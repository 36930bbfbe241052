"""The laws of bottleneck adapters. The oracle is `make adapterhub`, in its own
environment: the `adapters` library needs an older transformers.

A law that takes only `adapter`, the module, is run again by tests/test_mutations.py on
broken copies of adapter.py. Messages name the mistake that gives the symptom.
"""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import torch
import transformers as tf
from common import (
    BATCH,
    SMALL,
    bert,
    by_fault,
    gpt2,
    jiggle,
    llama,
    refused,
    seeded,
    snapshot,
    t5,
    trainable,
)
from torch import nn
from torch.nn.functional import gelu, relu, silu

from peftlab import adapter as reference
from peftlab import bitfit, lora, multi_lora
from peftlab.kit import base_models, results

ROOT = Path(__file__).parents[1]
SITE, MLP = "encoder.layer.1.output", "model.layers.1.mlp"
READS = {  # u, from h, x and the norm that follows, and s
    "houlsby": (lambda h, x, norm: h, 1),
    "pfeiffer": (lambda h, x, norm: norm(h + x), 1),
    "parallel": (lambda h, x, norm: x, 4),
}


@pytest.fixture
def adapter():
    return reference


def encoder():
    return bert(tf.BertModel).double()


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


def copies(adapter, model, name=None):
    return {n: t.clone() for n, t in adapter.state_dict(model, name).items()}


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


def two(adapter):
    """A model with two adapters, a and b."""
    return adapter.add(adapter.add(encoder(), "pfeiffer", 3, "a"), "houlsby", 3, "b")


# The laws


def test_the_first_step_changes_no_output_and_reaches_up_alone(adapter):
    for family, build in FAMILIES.items():
        plain = plain_output(build())
        for placement in READS:
            torch.manual_seed(0)  # or a unit of ReLU's may be off for every token
            model = adapter.add(build(), placement, 16)
            assert torch.equal(plain_output(model), plain), (
                f"{family}, {placement}: outputs moved at step 0: up and its bias start"
                " at zero, and the sub-layer's own output stays"
            )
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


def test_each_placement_reads_its_own_u(adapter):
    settings = (
        {},
        dict(activation="gelu", scale=0.5),
        dict(activation="silu", scale=2),
    )
    for site in ("encoder.layer.1.attention.output", SITE):
        for placement in READS if site == SITE else ["houlsby"]:
            for more, f in zip(settings, (relu, gelu, silu), strict=True):
                got, h, x, norm, own = sub_layer(adapter, site, placement, **more)
                read, s = READS[placement]
                change = branch(own, site, read(h, x, norm), f)
                expected = norm(h + more.get("scale", s) * change + x)
                torch.testing.assert_close(
                    got, expected, msg=f"{site}, {placement}, {more}: is it another u"
                    " (h, LN(h + x), x), another f or s, or does u go on, not h?"
                )  # fmt: skip


def test_on_llama_u_is_not_normalised(adapter):
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    base = llama().double().model
    rope = base.rotary_emb(x, torch.arange(6)[None])
    base = base.layers[0]
    for placement, (read, s) in READS.items():
        model = fill(adapter.add(llama().double(), placement, 5), adapter)
        tensors, site = adapter.state_dict(model), "model.layers.0"
        got = model.get_submodule(site)(x, position_embeddings=rope)
        normed = base.input_layernorm(x)
        h = base.self_attn(normed, position_embeddings=rope, attention_mask=None)[0]
        if placement == "houlsby":
            h = h + branch(tensors, f"{site}.self_attn", h)
        middle = x + h
        h = base.mlp(base.post_attention_layernorm(middle))
        u = read(h, middle, lambda t: t)
        expected = middle + h + s * branch(tensors, f"{site}.mlp", u)
        torch.testing.assert_close(got, expected, msg=f"{placement} reads another u")


def test_on_t5_u_is_not_normalised(adapter):
    x = torch.randn(1, 6, 32)
    for site, inner in (
        ("encoder.block.0.layer.0", "SelfAttention"),
        ("decoder.block.1.layer.2", "DenseReluDense"),
    ):
        base = t5().get_submodule(site)
        h = base.get_submodule(inner)(base.layer_norm(x))
        h = h[0] if isinstance(h, tuple) else h
        for placement in READS if inner == "DenseReluDense" else ["houlsby"]:
            model = fill(adapter.add(t5(), placement, 5), adapter)
            read, s = READS[placement]
            u = read(h, x, lambda t: t)
            expected = x + h + s * branch(adapter.state_dict(model), site, u)
            got = model.get_submodule(site)(x)
            got = got[0] if isinstance(got, tuple) else got
            torch.testing.assert_close(got, expected, msg=f"{site}: {placement}")


def test_houlsby_sits_twice_in_a_layer_the_others_once(adapter):
    sites = {  # behind the feed-forward; behind attention, but not T5's second one
        "bert": (["encoder.layer.{}.output"], ["encoder.layer.{}.attention.output"]),
        "llama": (["model.layers.{}.mlp"], ["model.layers.{}.self_attn"]),
        "t5": (
            ["encoder.block.{}.layer.1", "decoder.block.{}.layer.2"],
            ["encoder.block.{}.layer.0", "decoder.block.{}.layer.0"],
        ),
    }
    for family, (forward, attention) in sites.items():
        for placement in READS:
            model = adapter.add(FAMILIES[family](), placement, 2)
            paths = forward + attention * (placement == "houlsby")
            wanted = {path.format(i) for path in paths for i in range(2)}
            found = {n.partition(".adapters.")[0] for n in adapter.state_dict(model)}
            assert found == wanted, f"{family}, {placement}: in the wrong places"


def test_an_adapter_has_2md_plus_d_plus_m_numbers(adapter):
    large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    large = tf.RobertaConfig(**large, num_attention_heads=16)
    for kind, config, d, m, layers, pfeiffer in (
        (tf.BertModel, tf.BertConfig(), 768, 48, 12, 894_528),
        (tf.RobertaModel, large, 1024, 64, 24, 3_171_840),
    ):
        with torch.device("meta"):
            model = kind(config)
        for name, number in (("pfeiffer", 1), ("houlsby", 2)):
            adapter.add(model, name, m, name)
            own = adapter.state_dict(model, name)
            count = sum(t.numel() for t in own.values())
            assert count == layers * number * (2 * m * d + d + m), f"{name}: {count:,}"
            assert count == number * pfeiffer
            assert trainable(model) == own.keys()
            assert all(t.is_meta for t in own.values()), "not on the base's device"


def test_the_base_keeps_its_names_and_the_new_adapter_alone_trains(adapter):
    for build in FAMILIES.values():
        plain, model = build().state_dict(), adapter.add(build(), "houlsby", 4, "a")
        assert trainable(model) == adapter.state_dict(model).keys(), "is W frozen?"
        names = model.state_dict().keys() - adapter.state_dict(model).keys()
        assert names == plain.keys(), "a weight of the base goes by another name"
        adapter.add(fill(model, adapter), "parallel", 4, "b")
        own = adapter.state_dict(fill(model, adapter, "b"), "b")
        assert trainable(model) == own.keys(), "the earlier adapter is frozen too"
        before = snapshot(model)[0]
        train(model)
        for name, t in model.state_dict().items():
            moved = not torch.equal(t, before[name])
            assert name in own or not moved, f"{name} is frozen, and yet it moved"
            assert moved or name not in own, f"{name} did not train"


def test_two_adapters_work_in_sequence_and_two_parallel_ones_add_up(adapter):
    got, h, x, norm, tensors = sub_layer(adapter, SITE, "houlsby", "pfeiffer")
    first = h + branch(tensors, SITE, h)
    second = first + branch(tensors, SITE, norm(first + x), name="second")
    torch.testing.assert_close(got, norm(second + x), msg="in sequence, as added")
    got, h, x, norm, tensors = sub_layer(adapter, SITE, "parallel", "parallel")
    both = branch(tensors, SITE, x) + branch(tensors, SITE, x, name="second")
    torch.testing.assert_close(got, norm(h + 4 * both + x), msg="each reads x alone")


def test_the_names_work_in_their_order_and_the_others_not_at_all(adapter):
    for build in FAMILIES.values():
        plain, model = plain_output(build()), adapter.add(build(), "houlsby", 4, "a")
        alone = plain_output(fill(model, adapter, "a"))
        fill(adapter.add(model, "pfeiffer", 4, "b"), adapter, "b", seed=2)
        both = plain_output(model)
        assert not torch.allclose(both, alone), "the second is dead"
        swapped = plain_output(adapter.activate(model, ["b", "a"]))
        assert (swapped - both).abs().max() > 1e-3, "the order makes no difference"
        assert adapter.activate(model, ["a"]) is model
        assert torch.equal(plain_output(model), alone), "b still works"
        assert torch.equal(plain_output(adapter.activate(model, [])), plain)
        assert torch.equal(plain_output(adapter.activate(model, ("a", "b"))), both)
        adapter.add(adapter.activate(model, ["a"]), "parallel", 4, "c")
        assert torch.equal(plain_output(model), alone), "a new one woke the others"


def test_the_state_dict_goes_round(adapter):
    for build, placement in zip(FAMILIES.values(), READS, strict=True):
        model, other = (adapter.add(build(), placement, 3) for _ in range(2))
        adapter.load_state_dict(other, copies(adapter, train(model)))
        assert torch.equal(plain_output(model), plain_output(other))


def test_one_adapter_of_two_is_saved_and_loaded_by_its_name(adapter):
    model, other = fill(two(adapter), adapter), two(adapter)
    tensors = copies(adapter, model, "a")
    assert len(tensors) == 8 and all(".adapters.a." in n for n in tensors)
    adapter.load_state_dict(other, tensors, "a")
    own = adapter.state_dict(other)
    assert all(torch.equal(own[n], t) for n, t in tensors.items())
    assert not any(t.any() for n, t in own.items() if ".b.up" in n)
    refused(other, "", adapter.load_state_dict, tensors)  # all are meant, b too


def test_loading_is_strict(adapter):
    model = fill(adapter.add(encoder(), "houlsby", 3), adapter)
    good = copies(adapter, model)
    up = f"{SITE}.adapters.default.up.weight"
    rest = {n: t for n, t in good.items() if n != up}
    for tensors in (rest, {**good, "other": good[up]}, {**good, up: good[up].T}):
        refused(model, "", adapter.load_state_dict, tensors)


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
        assert not torch.equal(plain_output(twin), output), "it runs the original's"
        adapter.activate(twin, [])
        assert torch.equal(plain_output(model), output), "the original follows its copy"


def stop(kind):
    def raising(*_):
        raise kind("stopped")

    return raising


def test_no_activation_stays_after_a_forward_pass(adapter):
    for build, inner in ((encoder, f"{SITE}.dense"), (llama, f"{MLP}.down_proj")):
        model = adapter.add(build(), "parallel", 3)
        run(model)
        assert not adapter.WAITING.inputs, "memory: a sub-layer's input stays alive"
        model.get_submodule(inner).register_forward_pre_hook(stop(RuntimeError))
        with pytest.raises(RuntimeError):
            run(model)
        assert not adapter.WAITING.inputs, "memory: an error leaves an input behind"


def test_a_pass_that_was_interrupted_does_not_reach_the_next(adapter):
    models = [adapter.add(llama(), "parallel", 3) for _ in range(2)]
    for seed, model in enumerate(models):
        fill(model, adapter, seed=seed)
    want = plain_output(models[0])
    for model in models:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.get_submodule(MLP), "forward", stop(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(model)
    assert torch.equal(plain_output(models[0]), want), "x is another pass's"
    plain_output(models[1])


def test_threads_in_one_model_do_not_mix(adapter):
    model = fill(adapter.add(llama(), "parallel", 3), adapter)
    batches = torch.arange(3, 33).reshape(2, 3, 5)
    want = [model(ids)[0] for ids in batches]
    barrier = threading.Barrier(2, timeout=10)
    for layer in model.model.layers:  # both are between the entry and the exit
        layer.mlp.register_forward_pre_hook(lambda *_: barrier.wait() * 0 or None)
    with ThreadPoolExecutor(2) as pool:
        got = pool.map(lambda ids: model(ids)[0], batches)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, msg="another thread's x")


def test_a_replica_runs_its_own_adapters(adapter):
    for build in (encoder, llama):
        model = fill(adapter.add(build(), "parallel", 3), adapter)
        # as nn.DataParallel makes it: its own tensors, and the model's hooks
        twins = {m: m._replicate_for_data_parallel() for m in model.modules()}
        for m, twin in twins.items():
            for name, child in m._modules.items():
                setattr(twin, name, twins[child])
            for name, p in m._parameters.items():
                setattr(twin, name, None if p is None else p.detach() * 1.5)
            twin._buffers = dict(m._buffers)
        got = plain_output(twins[model])
        for p in model.parameters():
            p.data *= 1.5
        torch.testing.assert_close(got, plain_output(model))


def test_adapters_are_float32_over_a_16_bit_base(adapter):
    for placement in READS:
        model = fill(adapter.add(encoder().bfloat16(), placement, 3), adapter)
        own = adapter.state_dict(model, keep_vars=True).values()
        assert {p.dtype for p in own} == {torch.float32}
        output = run(model)
        assert output.dtype == torch.bfloat16, "the base's precision must go on"
        output.float().sin().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in own)
    own = adapter.state_dict(adapter.add(encoder(), "houlsby", 3))
    assert {p.dtype for p in own.values()} == {torch.float64}


def test_a_name_is_free_once(adapter):
    model = adapter.add(encoder(), "houlsby", 3, "values")  # a ModuleDict refuses it
    adapter.add(model, "houlsby", 3, "train")
    for name in ("values", "train"):
        refused(model, name, adapter.add, "parallel", 3, name)
    assert len(adapter.state_dict(model, "values")) == 16


# More architectures


def kin(config, model, **more):
    return lambda: seeded(model(config(**SMALL, num_attention_heads=4, **more)))


GROUPED = dict(num_key_value_heads=2, head_dim=8)
T5_SIZES = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
MORE = {
    "roberta": kin(tf.RobertaConfig, tf.RobertaForSequenceClassification),
    "xlm-roberta": kin(tf.XLMRobertaConfig, tf.XLMRobertaModel),
    "mistral": kin(tf.MistralConfig, tf.MistralForCausalLM, **GROUPED),
    "qwen2": kin(tf.Qwen2Config, tf.Qwen2ForCausalLM, num_key_value_heads=2),
    "qwen3": kin(tf.Qwen3Config, tf.Qwen3ForCausalLM, **GROUPED),
    "mt5": lambda: seeded(tf.MT5ForConditionalGeneration(tf.MT5Config(**T5_SIZES))),
    "tiny-decoder": lambda: base_models.load("tiny-decoder", device="cpu")[0],
}


def all_placements(model):
    """The model with an adapter of each placement, which is called so."""
    for placement in READS:
        reference.add(model, placement, 4, placement)
    return model


@pytest.mark.parametrize("family", MORE)
def test_the_kin_of_bert_t5_and_llama_have_adapters_too(family):
    model = MORE[family]()
    plain = plain_output(model)
    assert torch.equal(plain_output(all_placements(model)), plain)
    layers = 4 if family in ("mt5", "tiny-decoder") else 2
    for placement in READS:
        own = reference.state_dict(model, placement)
        assert len(own) == 4 * layers * (2 if placement == "houlsby" else 1), placement
    assert not torch.allclose(plain_output(fill(model, reference)), plain)


def test_tiny_decoder_generates_with_its_cache_what_it_would_without():
    model = fill(all_placements(MORE["tiny-decoder"]()), reference)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    settings |= dict(inputs=BATCH["input_ids"][:1], attention_mask=torch.ones(1, 8))
    cached, whole = (model.generate(use_cache=x, **settings) for x in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing_are_the_same(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = fill(all_placements(llama()), reference).train()
        model.enable_input_require_grads()  # or reentrant ones are left out
        own = reference.state_dict(model, keep_vars=True)
        for p in own.values():
            p.requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        run(model).sin().sum().backward()
        gradients.append({n: p.grad for n, p in own.items()})
        assert not reference.WAITING.inputs, "the second forward pass left something"
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, msg=name)


def test_a_compiled_model_stays_in_one_piece_and_has_plain_names():
    model = llama()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    fill(reference.add(compiled, "parallel", 4), reference)
    assert reference.state_dict(compiled).keys() == reference.state_dict(model).keys()
    for names in (["default"], []):
        reference.activate(compiled, names)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**BATCH)[0], run(model))


# What cannot be: one sentence each, and the model as it was

BAD = {
    "placement": ["lora", ["houlsby"]],
    "bottleneck": [0, "8"],
    "name": ["", "de.dates", 3, ["de"]],
    "activation": ["softmax", None],
    "scale": [0, "4"],
}


def test_bad_input_is_refused():
    model = encoder()
    model.pooler.requires_grad_(False)
    for setting, values in BAD.items():
        for value in values:
            settings = {"placement": "houlsby", "bottleneck": 4, setting: value}
            refused(model, "", reference.add, **settings)


def test_a_model_that_cannot_have_an_adapter_is_refused():
    held = multi_lora.switch(multi_lora.add(encoder(), "fi", ["query"]), None)
    carrying = reference.add(encoder(), "houlsby", 3)
    for words, *models in (
        ("BERT, RoBERTa, T5 and Llama", gpt2(), nn.Sequential(nn.Linear(4, 4))),
        ("carries", lora.add(encoder(), ["query"]), bitfit.add(encoder()), held),
        ("wrapped by", nn.DataParallel(encoder()), nn.DataParallel(carrying)),
        ("nn.Module", None),
    ):
        for model in models:
            refused(model, words, reference.add, "houlsby", 3, "b")
    refused(carrying, "carries adapter", lora.add, ["query"])


def test_activate_refuses_what_it_does_not_know():
    model = fill(two(reference), reference)
    output = plain_output(model)
    for names in ("a", ["a", "c"], ["a", "a"], [["a"]], None, {"a"}):
        refused(model, "'a', 'b'", reference.activate, names)
    assert torch.equal(plain_output(model), output)


def test_the_functions_say_so_where_there_is_no_adapter():
    model = reference.add(encoder(), "houlsby", 3)
    for function, *more in (
        (reference.activate, []),
        (reference.state_dict,),
        (reference.load_state_dict, {}),
    ):
        refused(encoder(), "", function, *more)
        refused(nn.DataParallel(model), "wrapped by", function, *more)
        refused(None, "nn.Module", function, *more)
    refused(model, "'de'", reference.state_dict, "de")


# The script with the library, which `make adapterhub` runs


def test_chapter_08_shows_the_librarys_script_and_what_it_printed():
    book = nbformat.read(ROOT / "notebooks" / "08_adapters.ipynb", 4)
    text = "\n".join(c.source for c in book.cells if c.cell_type == "markdown")
    script = (ROOT / "tools" / "adapterhub_example.py").read_text("utf8").strip()
    printed = "\n".join(results.load("adapterhub")["example"])
    assert f"```python\n{script}\n```" in text
    assert f"```text\n{printed}\n```" in text


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
    model["output"](h, x).pow(2)[:, 0].sum().backward()
    for p in adapter.state_dict(model, placement, keep_vars=True).values():
        p.data -= 0.1 * p.grad
    assert not torch.allclose(model["output"](h, x), plain)
    adapter.load_state_dict(model, adapter.state_dict(model))
    adapter.activate(model, [])
assert torch.equal(model["output"](h, x), plain)
"""

# Broken copies, for tests/test_mutations.py

CHANGE = "(h + self.scale * change).to(h.dtype)"
ZEROS = "(self.down.bias, self.up.weight, self.up.bias)"
FREEZE = "    model.requires_grad_(False)\n"
END = "    return activate(model, [*"
DEFAULT = '4.0 if placement == "parallel" else 1.0'
NEW = "place.owner.adapters = Site()"
NORM = "getattr(place.entry, 'LayerNorm', place.entry)"
TYPE = "torch.promote_types(width.dtype, torch.float32)"
LOOP = "        for name in self.active:\n"
RUN = "h = self._modules[name](h, x, norm)"
FIRST = {LOOP: "        first = h\n" + LOOP}
ACTIVE = "site.active = tuple(names)"
SAVED = 'tensors |= module.named_parameters(f"{path}.{adapter}")'
LOAD = "_load(state_dict(model, name), tensors)"
OWN = "{n: t for n, t in tensors.items() if n in state_dict(model)}"
BY_OWNER = "_hook(lambda m, a, o, owner=place.owner: _leave(owner, a, o))"
WAIT = "WAITING.inputs[entry] = args[-1]"
FITS = 'p.feed_forward or placement == "houlsby"'
KINDS = "T5Layer(Self.*|FF)"
TRAIN = """    active = ()

    def train(self, mode=True):
        for p in self.parameters():
            p.data *= 1 + 1e-3 * mode
        return super().train(mode)
"""

# {the law that goes red: {what is broken: {text: text in its place}}}
BROKEN = {
    test_the_first_step_changes_no_output_and_reaches_up_alone: {
        "up starts at random": {ZEROS: "(self.down.bias, self.up.bias)"},
        "up's bias starts at random": {ZEROS: "(self.down.bias, self.up.weight)"},
        "no skip connection": {CHANGE: CHANGE.replace("h + ", "", 1)},
        "the adapter is dead": {CHANGE: "h"},
        "down and up start at random": {ZEROS: "(self.down.bias,)"},
    },
    test_down_starts_uniform_and_its_bias_at_zero: {
        "down's bias starts at random": {ZEROS: "(self.up.weight, self.up.bias)"},
        "up and down start at zero": {ZEROS: "self.parameters()"},
    },
    test_each_placement_reads_its_own_u: {
        "no nonlinearity": {"self.f(self.down(u))": "self.down(u)"},
        "houlsby reads the input": {"x, norm: h,": "x, norm: x,"},
        "houlsby reads h + x": {"x, norm: h,": "x, norm: h + x,"},
        "all weigh four": {DEFAULT: "4.0"},
        "pfeiffer reads before the norm": {"norm: norm(h + x)": "norm: h + x"},
        "pfeiffer forgets the residual": {"norm(h + x)": "norm(h)"},
        "pfeiffer reads what houlsby reads": {"norm: norm(h + x)": "norm: h"},
        "what is read goes on, not h": {CHANGE: CHANGE.replace("h + ", "u + ", 1)},
        "parallel reads the output": {"norm: x,": "norm: h,"},
        "parallel weighs one": {DEFAULT: "1.0"},
        "the scale is ignored": {"self.scale * change": "change"},
        "the activation is ignored": {"nal, f)": "nal, 'relu')"},
    },
    test_on_llama_u_is_not_normalised: {
        "the input is read behind its norm": {"args[-1]": "entry.forward(*args)"},
        "llama's adapters read the other sub-layer's input": {
            "(m.post_attention_layernorm, m.mlp,": "(m.input_layernorm, m.mlp,"
        },
    },
    test_on_t5_u_is_not_normalised: {
        "t5's pfeiffer reads what it normalises": {
            "lambda t: t)": "getattr(entry, 'layer_norm', lambda t: t))"
        },
    },
    test_houlsby_sits_twice_in_a_layer_the_others_once: {
        "t5's attention has none": {KINDS: "T5Layer(FF)"},
        "t5's cross-attention has one": {KINDS: "T5Layer(.*Attention|FF)"},
        "pfeiffer sits behind attention too": {FITS: "True"},
        "houlsby sits once": {FITS: "p.feed_forward"},
    },
    test_an_adapter_has_2md_plus_d_plus_m_numbers: {
        "no biases": {"len(width), m, **": "len(width), m, False, **", ZEROS: "()"},
        "the width is one too many": {"len(width), m,": "len(width), m := m + 1,"},
    },
    test_the_base_keeps_its_names_and_the_new_adapter_alone_trains: {
        "the base is not frozen": {FREEZE: ""},
        "all of it is frozen": {END: FREEZE + END},
        "the base's modules go by other names": {
            NEW: f"place.owner.base = {NORM};{NEW}"
        },
    },
    test_two_adapters_work_in_sequence_and_two_parallel_ones_add_up: {
        "the second adapter reads what the first read": FIRST
        | {RUN: "h = h - first + self._modules[name](first, x, norm)"},
        "the last of two parallel ones is left alone": FIRST
        | {RUN: "h = self._modules[name](first, x, norm)"},
    },
    test_the_names_work_in_their_order_and_the_others_not_at_all: {
        "the adapters work in the order of adding": {
            "for name in self.active:": "for name in self:",
            "if name in self:": "if name in self.active:",
        },
        "turning off does nothing": {ACTIVE: "pass"},
        "a new adapter wakes the others": {"[*active, name]": "[*taken, name]"},
        "only the first may be turned off": {ACTIVE: f"{ACTIVE} or ('a',)"},
    },
    test_the_state_dict_goes_round: {
        "the state dict leaves biases out": {
            SAVED: f"{SAVED}\n"
            "    tensors = {n: p for n, p in tensors.items() if 'bias' not in n}"
        },
    },
    test_one_adapter_of_two_is_saved_and_loaded_by_its_name: {
        "the state dict is always everyone's": {"if name is None or": "if True or"},
    },
    test_loading_is_strict: {
        "loading is not strict": {
            LOAD: "[t.copy_(tensors.get(n, t)) for n, t in state_dict(model).items()]"
        },
        "loading lets the unexpected pass": {LOAD: LOAD.replace("tensors", OWN)},
    },
    test_train_and_eval_change_no_weight: {
        "train() moves a weight": {"    active = ()\n": TRAIN},
    },
    test_a_deep_copy_is_a_model_of_its_own: {
        "a copy runs the original's adapters": {"_hook(_leave)": BY_OWNER},
        "the input stays on a module": {WAIT: WAIT.replace("=", "= entry.seen =")},
    },
    test_a_replica_runs_its_own_adapters: {
        "a replica runs the first one's adapters": {"_hook(_leave)": BY_OWNER},
    },
    test_threads_in_one_model_do_not_mix: {
        "the threads share what waits": {"Waiting(threading.local)": "Waiting"},
    },
    test_no_activation_stays_after_a_forward_pass: {
        "the input stays in memory": {
            "WAITING.inputs.popitem()": "[*WAITING.inputs.items()][-1]",
            "WAITING.inputs.pop(module, None)": "pass",
        },
        "an error leaves the input behind": {"always_call=True": "always_call=False"},
    },
    test_a_pass_that_was_interrupted_does_not_reach_the_next: {
        "an old input is read": {"WAITING.inputs.pop(entry, None)": "pass"},
    },
    test_adapters_are_float32_over_a_16_bit_base: {
        "the adapters are in the base's 16 bits": {TYPE: "width.dtype"},
        "the answer is in float32": {CHANGE: CHANGE.removesuffix(".to(h.dtype)")},
        "float32 over a float64 base": {TYPE: "torch.float32"},
    },
    test_a_name_is_free_once: {"a name may come twice": {" or name in taken": ""}},
}
MUTATIONS = by_fault(BROKEN)
