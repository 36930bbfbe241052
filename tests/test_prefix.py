"""Prefix tuning's laws, and the same numbers as peft: forward, backward, generated.

A law that takes only `prefix`, the module, is run again by tests/test_mutations.py on
broken copies of prefix.py. Messages name the mistake that gives the symptom.
More laws, and the tools of these, are in test_soft_prompts.py.
"""

import copy

import pytest
import test_soft_prompts as soft
import torch
import transformers as tf
from common import (
    BATCH,
    MODELS,
    SMALL,
    assert_same,
    assert_unchanged,
    bert,
    by_fault,
    gpt2,
    llama,
    seeded,
    snapshot,
    t5,
    trainable,
)
from peft import PrefixTuningConfig, get_peft_model
from test_soft_prompts import (
    BAD_NUMBERS,
    CACHE,
    IDS,
    LABELS,
    LEFT,
    MASK,
    N,
    add_is_refused,
    bart,
    bart_decoder,
    bloom,
    greedy,
    jamba,
    mamba2,
    mistral,
    refused,
    roberta_decoder,
    says_alone,
    write,
    writes_greedily,
)
from torch import nn

from peftlab import prefix as reference
from peftlab.kit import measure


@pytest.fixture
def prefix():
    return reference


def wide():
    """Heads that are not hidden / heads wide, two for keys, and an uneven depth."""
    sizes = dict(SMALL, num_hidden_layers=3, head_dim=12)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return seeded(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **heads)))


def falcon():
    """One key and value for all heads, which no setting but this one tells."""
    sizes = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, multi_query=True)
    return seeded(tf.FalconForCausalLM(tf.FalconConfig(**sizes, **heads)))


def uneven():
    """A T5 whose decoder is deeper than its encoder."""
    sizes = dict(d_model=32, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=3)
    ids = dict(decoder_start_token_id=0, pad_token_id=0)
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=40, **sizes, **ids))


def deepseek():
    """Its keys are wider than its values."""
    heads = dict(num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=8)
    sizes = dict(qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, q_lora_rank=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    config = tf.DeepseekV3Config(**SMALL, **heads, **sizes, **experts)
    return seeded(tf.DeepseekV3ForCausalLM(config))


def wrapped(prefix, model=llama, **settings):
    torch.manual_seed(1)
    return prefix.add(model(), N, **settings)


def by_hand(wrapper, flat, ids, mask=None, **inputs):
    """What the plain model says after a cache filled from the flat tensor."""
    layers, heads, size = wrapper.sizes
    pairs = [t.view(N, heads, size).transpose(0, 1) for t in flat.chunk(2 * layers, 1)]
    pairs = [t.expand(len(ids), -1, -1, -1) for t in pairs]
    cache = tf.DynamicCache()
    for layer in range(layers):  # the key at 2 layer, the value after it
        cache.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([torch.ones(len(ids), N).long(), mask], 1)
    return wrapper.model(ids, **{CACHE: cache}, **inputs)


def flat_of(prefix, wrapper):
    return prefix.state_dict(wrapper)["prompt_embeddings"]


# The laws: what the attention reads


@torch.no_grad()
def test_every_layer_reads_its_keys_and_values_before_the_texts_own(prefix):
    for model in (llama, wide, gpt2, falcon):
        wrapper = wrapped(prefix, model)
        flat = flat_of(prefix, wrapper)
        layers, heads, size = wrapper.sizes
        assert flat.shape == (N, 2 * layers * heads * size), "2 layers kv columns"
        got, want = wrapper(IDS).logits, by_hand(wrapper, flat, IDS).logits
        assert got.shape[:2] == IDS.shape, "logits cover the text alone"
        assert not torch.allclose(got, wrapper.model(IDS).logits), "the prefix is dead"
        torch.testing.assert_close(
            got,
            want,
            msg="layer l reads columns 2l as keys and 2l + 1 as values, split by heads",
        )


def test_the_sizes_are_those_of_the_key_value_heads(prefix):
    all_sizes = (2, 1, 8), (3, 2, 12), (2, 4, 8), (2, 1, 8), (3, 8, 4)
    models = llama, wide, gpt2, falcon, uneven
    for model, sizes in zip(models, all_sizes, strict=True):
        plain = model().train()
        plain.config.use_cache = False  # as training scripts set it
        torch.manual_seed(0)
        want = torch.randn(N, 2 * sizes[0] * sizes[1] * sizes[2])
        torch.manual_seed(0)
        try:
            wrapper = prefix.add(plain, N)
        except ValueError:
            pytest.fail("a cache that is turned off has no sizes")
        assert wrapper.sizes == sizes, "(decoder layers, key-value heads, head's size)"
        assert torch.equal(wrapper.prompt_embeddings, want), "dropout moved the seed"
        wrapper(IDS, labels=LABELS).loss.backward()


@torch.no_grad()
def test_a_key_that_fits_every_query_makes_attention_give_its_value(prefix):
    torch.manual_seed(0)
    wrapper = prefix.add(gpt2(), 1)
    attention = wrapper.model.transformer.h[0].attn
    seen = []
    hook = attention.c_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    attention.c_attn.weight[:, :32], attention.c_attn.bias[:32] = 0, 1  # queries: ones
    flat = flat_of(prefix, wrapper)
    flat[:, :32], value = 100, flat[0, 32:64]
    wrapper(IDS)
    hook.remove()
    gap = (seen[0] - value).abs().max()
    assert gap < 1e-4, f"attention on the prefix alone must give its value: {gap:.1e}"


@torch.no_grad()
def test_a_batch_padded_on_the_right_is_masked_and_counted_as_ever(prefix):
    for model in (llama, gpt2):
        wrapper = wrapped(prefix, model)
        want = by_hand(wrapper, flat_of(prefix, wrapper), IDS, MASK).logits
        torch.testing.assert_close(
            wrapper(IDS, MASK).logits,
            want,
            msg="the mask is 1 over the prefix, and positions are left to the model"
            " (they differ at the pads: are the pads left out of the count?)",
        )


@torch.no_grad()
def test_a_row_padded_on_the_left_says_what_it_says_alone(prefix):
    for model in (llama, gpt2, bloom, falcon, roberta_decoder):
        says_alone(wrapped(prefix, model), model.__name__)
    wrapper = wrapped(prefix, t5)  # its encoder has no prefix and measures distances
    gap = wrapper(**BATCH, labels=IDS).logits - wrapper(**LEFT, labels=IDS).logits
    assert gap.abs().max() < 1e-4


def test_pads_that_would_be_counted_are_refused(prefix):
    for model in (bart_decoder, bart):
        wrapper = wrapped(prefix, model)
        with refused("counts left pads", wrapper):
            wrapper(**LEFT)
    mask = dict(decoder_input_ids=IDS, decoder_attention_mask=LEFT["attention_mask"])
    with refused("counts left pads"):
        wrapped(prefix, t5)(**BATCH, **mask)
    wrapper = wrapped(prefix, mistral)
    wrapper(IDS, MASK)
    with refused("window of 7 tokens", wrapper):
        wrapper(**LEFT)


@torch.no_grad()
def test_position_ids_start_after_the_prefix(prefix):
    wrapper, at = wrapped(prefix, gpt2), torch.arange(8)[None]
    plain = wrapper(IDS).logits
    torch.testing.assert_close(wrapper(IDS, position_ids=at).logits, plain)
    moved = wrapper(IDS, position_ids=at + 1).logits
    assert not torch.allclose(moved, plain, atol=1e-3), "position ids are dropped"


def test_embeddings_and_labels_pass_through(prefix):
    wrapper = wrapped(prefix)
    x = wrapper.model.get_input_embeddings()(IDS)
    one, two = wrapper(**BATCH, labels=LABELS), wrapper(inputs_embeds=x, labels=LABELS)
    torch.testing.assert_close(two.logits[:2], one.logits[:2])
    want = nn.functional.cross_entropy(
        one.logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()
    )
    torch.testing.assert_close(one.loss, want)


@torch.no_grad()
def test_the_decoder_of_t5_has_the_prefix_in_its_self_attention(prefix):
    wrapper = wrapped(prefix, t5)
    encoded = wrapper.model.encoder(IDS, MASK).last_hidden_state
    got = wrapper(**BATCH, labels=LABELS)
    assert torch.equal(got.encoder_last_hidden_state, encoded), "the encoder has none"
    plain = wrapper.model(**BATCH, labels=LABELS)
    assert not torch.allclose(got.logits, plain.logits, atol=1e-3), "the prefix is dead"
    mask = (LABELS != -100).long()
    longer = wrapper(**BATCH, labels=LABELS, decoder_attention_mask=mask)
    torch.testing.assert_close(longer.logits[:2], got.logits[:2])


def test_t5_reads_every_other_pair_as_peft_does(prefix):
    for layers, read in ((2, [0]), (3, [0, 1, 2]), (4, [0, 2])):
        sizes = dict(d_model=16, d_kv=4, d_ff=16, num_heads=4, num_layers=layers)
        ids = dict(decoder_start_token_id=0, pad_token_id=0)
        config = tf.T5Config(vocab_size=40, **sizes, **ids)
        wrapper = prefix.add(seeded(tf.T5ForConditionalGeneration(config)), N)
        wrapper(**BATCH, labels=LABELS).loss.backward()
        moves = wrapper.prompt_embeddings.grad.view(N, layers, 2, 16)[:, :, 1].any(2)
        assert moves.any(0).nonzero().flatten().tolist() == read


# The laws: what it writes


def test_it_writes_the_greedy_choice_of_forward(prefix):
    for model in (llama, gpt2, mistral):
        writes_greedily(wrapped(prefix, model))


def test_beams_find_the_same_with_and_without_a_cache(prefix):
    for model in (llama, t5):
        wrapper = wrapped(prefix, model)
        found = [write(wrapper, IDS, num_beams=3, use_cache=c) for c in (True, False)]
        assert torch.equal(*found), "every beam has a row of the prefix in its cache"


# The laws: what trains


def test_only_the_prefix_trains(prefix):
    mlp = {f"mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    for hidden, more in ((None, set()), (6, mlp)):
        wrapper = wrapped(prefix, hidden=hidden)
        assert trainable(wrapper) == {"prompt_embeddings"} | more
        before = snapshot(wrapper.model)
        trained = [p for p in wrapper.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in trained]
        wrapper(**BATCH, labels=LABELS).loss.backward()
        torch.optim.SGD(trained, 0.1).step()
        for p, was in zip(trained, start, strict=True):
            assert not torch.equal(p, was), "a part of the prefix did not train"
        assert_unchanged(wrapper.model, before)


def test_checkpointing_which_drops_the_cache_is_refused(prefix):
    for model in (llama, t5):
        wrapper = wrapped(prefix, model)
        wrapper.model.gradient_checkpointing_enable()
        want = wrapper(IDS, labels=LABELS).loss  # of no effect while it answers
        wrapper.train()
        with refused("checkpointing", wrapper):
            wrapper(IDS, labels=LABELS)
        wrapper.model.gradient_checkpointing_disable()
        assert wrapper(IDS, labels=LABELS).loss.requires_grad and want > 0


def test_the_prefix_is_float32_over_a_16_bit_base(prefix):
    for dtype in (torch.bfloat16, torch.float16):
        for hidden in (None, 6):
            wrapper = prefix.add(llama().to(dtype), N, hidden)
            trained = [p for p in wrapper.parameters() if p.requires_grad]
            assert {p.dtype for p in trained} == {torch.float32}
            out = wrapper(**BATCH, labels=LABELS)
            assert out.logits.dtype == dtype, "the model must stay in its precision"
            out.loss.backward()
            assert all(p.grad.any() for p in trained)
    for hidden in (None, 6):
        wrapper = prefix.add(llama().double(), N, hidden)
        assert flat_of(prefix, wrapper).dtype == torch.float64


def test_it_starts_at_a_standard_normal(prefix):
    torch.manual_seed(3)
    rows = prefix.add(gpt2(), 50).prompt_embeddings.detach()
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05
    torch.manual_seed(3)
    again = prefix.add(gpt2(), 50).prompt_embeddings
    assert torch.equal(again, rows), "the seed decides"


# The laws: the MLP


def test_the_mlp_makes_the_keys_and_values(prefix):
    wrapper = wrapped(prefix, hidden=6)
    narrow, _, wide = wrapper.mlp
    start = wrapper.prompt_embeddings
    assert start.shape == (N, 8) and narrow.weight.shape == (6, 8)
    want = wide(torch.tanh(narrow(start)))
    torch.testing.assert_close(flat_of(prefix, wrapper), want)
    got = wrapper(IDS).logits
    torch.testing.assert_close(got, by_hand(wrapper, want, IDS).logits)


def test_folding_changes_no_output_and_leaves_the_flat_tensor(prefix):
    wrapper = wrapped(prefix, hidden=6)
    before, flat = wrapper(**BATCH).logits, flat_of(prefix, wrapper).clone()
    assert prefix.fold(wrapper) is wrapper and wrapper.hidden is None
    assert torch.equal(wrapper.prompt_embeddings, flat)
    assert torch.equal(wrapper(**BATCH).logits, before), "folding moved the outputs"
    assert trainable(wrapper) == {"prompt_embeddings"}
    parameter = wrapper.prompt_embeddings
    assert prefix.fold(wrapper).prompt_embeddings is parameter, "an optimizer holds it"


def test_the_counts_are_the_papers(prefix):
    with torch.device("meta"):
        config = tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
        model = tf.GPT2LMHeadModel(config)
    for n, hidden, count in (
        (5, None, 245_760),
        (10, None, 491_520),
        (10, 512, 25_750_016),
    ):
        wrapper = prefix.add(model, n, hidden)
        assert measure.parameters(wrapper)[0] == count
        assert flat_of(prefix, wrapper).shape == (n, 2 * 24 * 1024)
        assert {p.device.type for p in wrapper.parameters()} == {"meta"}


# The laws: the wrapper


def test_the_state_dict_goes_round(prefix):
    for hidden in (None, 6):  # whether it goes into a flat prefix or an MLP
        one, two = wrapped(prefix, hidden=6), prefix.add(llama(), N, hidden)
        tensors = {n: t.clone() for n, t in prefix.state_dict(one).items()}
        shapes = {n: t.shape for n, t in tensors.items()}
        assert shapes == {"prompt_embeddings": (N, 32)}
        held = two.prompt_embeddings
        prefix.load_state_dict(two, tensors)
        assert torch.equal(one(IDS).logits, two(IDS).logits)
        assert trainable(two) == {"prompt_embeddings"} and two.hidden is None
        assert hidden or two.prompt_embeddings is held, "an optimizer holds it"


def test_loading_that_is_refused_does_not_fold(prefix):
    wrapper = wrapped(prefix, hidden=6)
    with refused("shape", wrapper):
        prefix.load_state_dict(wrapper, {"prompt_embeddings": torch.zeros(N, 8)})


def test_what_has_no_keys_and_values_of_one_shape_is_refused(prefix):
    plain = nn.Sequential(nn.Linear(3, 3))
    encoders = bert(), bert(tf.BertModel)
    for model in (plain, *encoders, mamba2(), jamba()):
        with refused("generates by attention", model):
            prefix.add(model, N)
    with refused("of one shape", model := deepseek()):
        prefix.add(model, N)


# Bad input: one sentence each, and the model as it was


@pytest.mark.parametrize("hidden", BAD_NUMBERS, ids=lambda value: f"{value!r:.9}")
def test_bad_input_gets_one_sentence_and_changes_nothing(hidden):
    add_is_refused(reference, hidden=hidden)


def test_a_compiled_wrapper_is_folded_and_a_plain_model_is_refused():
    with refused("no prefix"):
        reference.fold(llama())
    wrapper = reference.add(torch.compile(llama()), N, hidden=6)
    reference.load_state_dict(torch.compile(wrapper), reference.state_dict(wrapper))
    assert wrapper.hidden is None and type(wrapper.model) is tf.LlamaForCausalLM


# The oracle: peft


KINDS = {
    "tiny-decoder": MODELS["tiny-decoder"],
    "llama": llama,
    "wide": wide,
    "gpt2": gpt2,
    "t5": t5,
}


def pair(name, hidden=None):
    """Our wrapper and peft's around copies of one model, and what each of them trains,
    the same numbers in both."""
    model = KINDS[name]().eval()
    settings = dict(prefix_projection=bool(hidden), encoder_hidden_size=hidden)
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=N, **settings)
    twin = get_peft_model(copy.deepcopy(model), config).eval()
    wrapper = reference.add(model, N, hidden)
    ours, theirs = (
        [p for p in m.parameters() if p.requires_grad] for m in (wrapper, twin)
    )
    ours, theirs = ([*sorted(ps, key=_by_shape)] for ps in (ours, theirs))
    torch.manual_seed(2)
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b.copy_(torch.randn(b.shape) / (2 if b.dim() == 2 else 4)))
    return wrapper, twin, ours, theirs


def _by_shape(p):
    return p.dim(), *p.shape


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("name", KINDS)
def test_numbers_equal_pefts_before_and_after_training(name, hidden):
    wrapper, twin, ours, theirs = pair(name, hidden)
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    more = dict(decoder_attention_mask=MASK.roll(1, 0)) if name == "t5" else {}
    optimizers = [torch.optim.SGD(ps, lr=0.1, momentum=0.9) for ps in (ours, theirs)]
    for step in range(3):
        outputs = [m(**BATCH, labels=LABELS, **more) for m in (wrapper, twin)]
        for key in ("loss", "logits"):
            assert_same(outputs[0][key], outputs[1][key], f"step {step}: {key}")
        for optimizer, out in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            out.loss.backward()
        assert max(p.grad.abs().max() for p in ours) > 1e-4, "no gradient to speak of"
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a.grad, b.grad, f"step {step}: a gradient {tuple(a.shape)}")
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, f"step {step}: the tensor {tuple(a.shape)}")
    flat = twin.get_prompt_embedding_to_save("default")
    assert_same(flat_of(reference, wrapper), flat, "what is saved")


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("name", KINDS)
def test_it_writes_what_pefts_forward_chooses(name, hidden):
    # peft 0.21's own generate looks for the cache by the name that it had before
    # transformers 5.24, and loses it: with 5.23 it writes the same as ours.
    wrapper, twin, _, _ = pair(name, hidden)
    if name == "t5":
        want = torch.zeros(3, 1, dtype=torch.long)
        for _ in range(6):
            out = twin(**BATCH, decoder_input_ids=want).logits[:, -1]
            want = torch.cat([want, out.argmax(-1, keepdim=True)], 1)
        assert torch.equal(write(wrapper, *BATCH.values()), want)
    else:
        assert torch.equal(write(wrapper, IDS), greedy(twin, IDS, 6))


# prefix.py copied alone, for tests/test_standalone.py

ALONE = """
import prefix
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
sizes = dict(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)
base = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=None)).eval()
ids = torch.arange(8).view(2, 4)
plain = base(ids).logits
model = prefix.add(base, 3, hidden=5)
tuned = model(ids).logits
assert not torch.allclose(tuned, plain)
model(ids, labels=ids).loss.backward()
assert model.prompt_embeddings.grad.any() and base.lm_head.weight.grad is None
prefix.fold(model)
assert torch.allclose(model(ids).logits, tuned)
text = model.generate(ids, max_new_tokens=3, do_sample=False)
assert text.shape == (2, 7) and torch.equal(text[:, :4], ids)
prefix.load_state_dict(model, {n: t + 1 for n, t in prefix.state_dict(model).items()})
assert torch.equal(model.model(ids).logits, plain)
"""

# Broken copies, for tests/test_mutations.py

PAIR = "pairs[2 * pair], pairs[2 * pair + 1]"
WHICH = "2 * layer % layers if twice else layer"
VIEW = "pairs = pairs.view(self.n, 2 * layers, 1, heads, size)"
PERMUTE = "pairs = pairs.permute(1, 2, 3, 0, 4)."
MASKED = "        if mask is not None:\n            longer"
LEFT_PADS = "if positions is None and is_told and _has_left_pads(mask):"
FILLED = "if not _is_filled(cache):"

# {the law that goes red: {what is broken: {text: text in its place}}}
MUTATIONS = by_fault(
    {
        test_every_layer_reads_its_keys_and_values_before_the_texts_own: {
            "keys are values": {PAIR: "pairs[2 * pair + 1], pairs[2 * pair]"},
            "all keys come first": {PAIR: "pairs[pair], pairs[layers + pair]"},
            "the last layer reads the first": {WHICH: "layers - 1 - layer"},
            "heads and sizes are mixed": {
                "1, heads, size)": "1, size, heads)",
                "(1, 2, 3, 0, 4)": "(1, 2, 4, 0, 3)",
            },
            "tokens and heads are mixed": {
                VIEW: "pairs = pairs.view(2 * layers, 1, heads, self.n, size)",
                PERMUTE: "pairs = pairs.",
            },
            "the prefix is dead": {"(self.prompt_emb": "(0 * self.prompt_emb"},
            "the prefix never gets in": {"= self._filled(cache, len(text))": "= cache"},
        },
        test_the_sizes_are_those_of_the_key_value_heads: {
            "one head is taken for four": {
                "(layers), heads, size": "(layers), 4, size"
            },
            "a cache stays off": {'["use_cache"] = True': '["use_cache"] = False'},
            "T5's encoder gives the depth": {
                "len(layers), h": "model.config.num_hidden_layers, h"
            },
            "the sizes move the seed": {", torch.random.fork_rng(devices)": ""},
        },
        test_a_key_that_fits_every_query_makes_attention_give_its_value: {
            "the value is the key": {PAIR: "pairs[2 * pair], pairs[2 * pair]"},
        },
        test_a_batch_padded_on_the_right_is_masked_and_counted_as_ever: {
            "the prefix is masked": {"(self.n, 0), value=1": "(self.n, 0), value=0"},
            "the mask grows behind": {"(self.n, 0), value": "(0, self.n), value"},
            "right pads are not counted": {
                LEFT_PADS: "if positions is None and is_told and mask is not None:"
            },
        },
        test_a_row_padded_on_the_left_says_what_it_says_alone: {
            "left pads are counted": {LEFT_PADS: "if False:"},
        },
        test_pads_that_would_be_counted_are_refused: {
            "BART's left pads pass": {"and not _takes_left_pads(model)": "and False"},
            "T5's decoder takes them": {
                'if side and not _takes(model, side + "position_ids"):': "if False:"
            },
            "pads may fill a window": {"> _window(model):": "> math.inf:"},
        },
        test_position_ids_start_after_the_prefix: {
            "position ids start at 0": {"positions + self.n": "positions"},
            "position ids are dropped": {'inputs.get(side + "position_ids")': "None"},
        },
        test_embeddings_and_labels_pass_through: {
            "labels are dropped": {'inputs["labels"] = labels': "pass"},
        },
        test_the_decoder_of_t5_has_the_prefix_in_its_self_attention: {
            "the encoder's mask grows": {'return "decoder_" if': 'return "" if'},
        },
        test_t5_reads_every_other_pair_as_peft_does: {
            "T5 reads pair after pair": {WHICH: "layer"},
        },
        test_it_writes_the_greedy_choice_of_forward: {
            "it comes at each step": {FILLED: "if True:"},
            "the last step's is taken": {'inputs.get("use_cache") is False': "False"},
        },
        soft.test_a_text_can_be_read_in_two_parts: {
            "a second part has it too": {FILLED: "if True:"},
        },
        test_beams_find_the_same_with_and_without_a_cache: {
            "beams share one row": {"expand(-1, rows,": "expand(-1, 3,"},
        },
        soft.test_rows_padded_on_the_left_write_what_they_write_alone: {
            "later steps do not mask the pads": {
                MASKED: MASKED.replace("None", "None and text.shape[1] > 1")
            },
        },
        test_only_the_prefix_trains: {
            "the base trains along": {"grad_(False)": "grad_(True)"},
            "the prefix is frozen too": {"Parameter(start)": "Parameter(start, False)"},
        },
        test_checkpointing_which_drops_the_cache_is_refused: {
            "checkpointing passes": {'"gradient_checkpointing", ': '"a", '},
        },
        test_the_prefix_is_float32_over_a_16_bit_base: {
            "the prefix is in 16 bits": {
                "l.dtype, torch.float32": "l.dtype, model.dtype"
            },
            "the model is drawn into float32": {".to(self.model.dtype)": ""},
        },
        soft.test_transformers_trainer_trains_it_and_saves_it: {
            "Trainer takes all columns": {"    @_ModelSignature\n": ""},
            "Trainer finds no labels": {
                " labels=None,": "",
                "if labels is not None": "if False",
            },
        },
        test_it_starts_at_a_standard_normal: {
            "it starts at a uniform": {"torch.randn(n,": "torch.rand(n,"},
        },
        test_the_mlp_makes_the_keys_and_values: {
            "the MLP has no tanh": {"nn.Tanh()": "nn.Identity()"},
            "the MLP has a ReLU": {"nn.Tanh()": "nn.ReLU()"},
        },
        test_folding_changes_no_output_and_leaves_the_flat_tensor: {
            "folding leaves the MLP": {"plain.mlp = nn.Sequential()": "pass"},
            "folding a flat prefix makes a new one": {"if plain.hidden:": "if True:"},
        },
        test_the_counts_are_the_papers: {
            "the prefix has no values": {"2 * layers * kv": "layers * kv"},
        },
        soft.test_the_wrapper_answers_for_its_model: {
            "the wrapper forgets the mode": {"= model.training": "= True"},
        },
        test_the_state_dict_goes_round: {
            "what is saved is not folded": {
                "wrapper.mlp(wrapper.prompt_embeddings)": "wrapper.prompt_embeddings"
            },
            "loading does not fold": {"(fold(wrapper))": "(wrapper)"},
        },
        test_loading_that_is_refused_does_not_fold: {
            "it folds before it checks": {
                "_load(state_dict(wrapper), tensors)": "fold(wrapper)"
            },
        },
        soft.test_a_second_method_is_refused: {
            "a prefix goes on a prefix": {'peft_method = "prefix"': "pass"},
            "a prefix goes on a prompt": {"_refuse_carried(model)\n": "model\n"},
        },
        test_what_has_no_keys_and_values_of_one_shape_is_refused: {
            "states beside keys pass": {"not kinds <=": "kinds <"},
            "keys wider than values pass": {"len(shapes) > 1 or": "False or"},
        },
    }
)
