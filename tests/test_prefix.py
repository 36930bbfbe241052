"""Prefix tuning's laws, and the same numbers as peft: forward, backward, generated.

A law that takes only `prefix`, the module, is run again by tests/test_mutations.py on
broken copies of prefix.py. Messages name the mistake that gives the symptom.
"""

import copy

import pytest
import torch
from common import (
    BATCH,
    MODELS,
    SMALL,
    assert_one_sentence,
    assert_same,
    assert_unchanged,
    bert,
    gpt2,
    llama,
    seeded,
    snapshot,
    t5,
    trainable,
)
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftlab import prefix as reference
from peftlab import prompt
from peftlab.kit import data, measure, base_models
from peftlab.kit.train import train

N = 4
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]  # the last row is padded
LABELS = IDS.masked_fill(MASK == 0, -100)


@pytest.fixture
def prefix():
    return reference


def wide():
    """Heads that are not hidden / heads wide, two for keys, and an uneven depth."""
    sizes = dict(SMALL, num_hidden_layers=3, head_dim=12)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return seeded(LlamaForCausalLM(LlamaConfig(**sizes, **heads)))


def wrapped(prefix, model=llama, **settings):
    torch.manual_seed(1)
    return prefix.add(model(), N, **settings)


def by_hand(wrapper, flat, ids, mask=None, **inputs):
    """What the plain model says after a cache filled from the flat tensor."""
    layers, heads, size = wrapper.sizes
    pairs = [t.view(N, heads, size).transpose(0, 1) for t in flat.chunk(2 * layers, 1)]
    pairs = [t.expand(len(ids), -1, -1, -1) for t in pairs]
    cache = DynamicCache()
    for layer in range(layers):  # the key at 2 layer, the value after it
        cache.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([torch.ones(len(ids), N).long(), mask], 1)
    return wrapper.model(ids, **{wrapper._cache: cache}, **inputs)


def flat_of(prefix, wrapper):
    return prefix.state_dict(wrapper)["prompt_embeddings"]


def padded_left(ids, mask):
    """The rows of a batch that is padded on the right, padded on the left."""
    order = mask.argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def greedy(model, ids, steps):
    """The greedy continuation, read off forward anew for each token."""
    for _ in range(steps):
        best = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        ids = torch.cat([ids, best.argmax(-1, keepdim=True)], 1)
    return ids


def write(model, ids, mask=None, steps=6, **options):
    """`generate` without an end token, so that all rows are of one length."""
    options |= dict(max_new_tokens=steps, do_sample=False, eos_token_id=None)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **options)


# The laws: what the attention reads


@torch.no_grad()
def test_every_layer_reads_its_keys_and_values_before_the_texts_own(prefix):
    for model in (llama, wide, gpt2):
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
    ids = dict(decoder_start_token_id=0, pad_token_id=0)
    uneven = dict(d_model=32, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=3)
    uneven = T5Config(vocab_size=40, **uneven, **ids)
    for model, sizes in (
        (llama(), (2, 1, 8)),
        (wide(), (3, 2, 12)),
        (gpt2(), (2, 4, 8)),
        (T5ForConditionalGeneration(uneven), (3, 8, 4)),
    ):
        wrapper = prefix.add(model, N)
        assert wrapper.sizes == sizes, "(decoder layers, key-value heads, head's size)"
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
    ids, mask = padded_left(IDS, MASK)
    for model in (llama, gpt2):
        wrapper = wrapped(prefix, model)
        together = wrapper(ids, mask).logits
        for row, text in enumerate([IDS[0], IDS[1], IDS[2, :5]]):
            alone = wrapper(text[None]).logits[0]
            gap = (together[row, -len(text) :] - alone).abs().max()
            assert gap < 1e-4, f"row {row} moved by {gap:.1e}: are its pads counted?"


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
        model = T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes, **ids))
        wrapper = prefix.add(seeded(model), N)
        wrapper(**BATCH, labels=LABELS).loss.backward()
        moves = wrapper.prompt_embeddings.grad.view(N, layers, 2, 16)[:, :, 1].any(2)
        assert moves.any(0).nonzero().flatten().tolist() == read


# The laws: what it writes


def test_it_writes_the_greedy_choice_of_forward(prefix):
    for model in (llama, gpt2):
        wrapper = wrapped(prefix, model)
        want = greedy(wrapper, IDS, 6)
        for cached in (True, False):
            got = write(wrapper, IDS, use_cache=cached)
            assert torch.equal(got[:, :8], IDS), "the result starts with input_ids"
            assert torch.equal(got, want), (
                f"use_cache={cached}: is the prefix put in at each step, or lost?"
            )


def test_beams_find_the_same_with_and_without_a_cache(prefix):
    for model in (llama, t5):
        wrapper = wrapped(prefix, model)
        found = [write(wrapper, IDS, num_beams=3, use_cache=c) for c in (True, False)]
        assert torch.equal(*found), "every beam has a row of the prefix in its cache"


def test_rows_padded_on_the_left_write_what_they_write_alone(prefix):
    ids, mask = padded_left(IDS, MASK)
    for model in (llama, gpt2):
        wrapper = wrapped(prefix, model)
        got = write(wrapper, ids, mask)[:, 8:]
        texts = [IDS[:1], IDS[1:2], IDS[2:, :5]]
        alone = [write(wrapper, text)[0, -6:] for text in texts]
        assert torch.equal(got, torch.cat([a[None] for a in alone])), (
            "later steps must count and mask as the first one did"
        )


def test_the_model_is_as_it_was_after_writing(prefix):
    wrapper = wrapped(prefix)
    want = wrapper.model(input_ids=IDS).logits
    write(wrapper, IDS)
    with pytest.raises((TypeError, ValueError)):
        wrapper.generate(IDS, no_such_option=1)
    assert torch.equal(wrapper.model(input_ids=IDS).logits, want), "a hook was left"


# The laws: what trains


def test_only_the_prefix_trains(prefix):
    mlp = {f"mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    for hidden, more in ((None, set()), (6, mlp)):
        wrapper = wrapped(prefix, hidden=hidden)
        assert trainable(wrapper) == {"prompt_embeddings"} | more
        before = snapshot(wrapper.model)
        own = [p for p in wrapper.parameters() if p.requires_grad]
        start, optimizer = [p.detach().clone() for p in own], torch.optim.SGD(own, 0.1)
        wrapper(**BATCH, labels=LABELS).loss.backward()
        optimizer.step()
        for p, was in zip(own, start, strict=True):
            assert not torch.equal(p, was), "a part of the prefix did not train"
        assert_unchanged(wrapper.model, before)


def test_the_prefix_is_float32_over_a_16_bit_base(prefix):
    for dtype in (torch.bfloat16, torch.float16):
        for hidden in (None, 6):
            wrapper = prefix.add(llama().to(dtype), N, hidden)
            own = [p for p in wrapper.parameters() if p.requires_grad]
            assert {p.dtype for p in own} == {torch.float32}
            out = wrapper(**BATCH, labels=LABELS)
            assert out.logits.dtype == dtype, "the model must stay in its precision"
            out.loss.backward()
            assert all(p.grad.any() for p in own)
    for hidden in (None, 6):
        wrapper = prefix.add(llama().double(), N, hidden)
        assert flat_of(prefix, wrapper).dtype == torch.float64


def test_it_starts_at_a_standard_normal(prefix):
    torch.manual_seed(3)
    rows = prefix.add(gpt2(), 50).prompt_embeddings.detach()
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05
    torch.manual_seed(3)
    assert torch.equal(prefix.add(gpt2(), 50).prompt_embeddings, rows), (
        "the seed decides"
    )


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
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
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


def test_the_wrapper_answers_for_its_model(prefix):
    for training in (True, False):
        wrapper = prefix.add(llama().train(training), N)
        assert wrapper.training == wrapper.model.training == training
    model = wrapper.model
    assert wrapper.config is model.config and wrapper.device == model.device
    assert wrapper.generation_config is model.generation_config
    assert wrapper.train().model.training and not wrapper.eval().model.training
    assert not hasattr(wrapper, "no_such_thing")
    twin = copy.deepcopy(wrapper)
    assert torch.equal(twin(IDS).logits, wrapper(IDS).logits)


def test_the_state_dict_goes_round(prefix):
    for hidden in (None, 6):  # whether it goes into a flat prefix or an MLP
        one, two = wrapped(prefix, hidden=6), prefix.add(llama(), N, hidden)
        tensors = {n: t.clone() for n, t in prefix.state_dict(one).items()}
        assert {n: t.shape for n, t in tensors.items()} == {
            "prompt_embeddings": (N, 32)
        }
        held = two.prompt_embeddings
        prefix.load_state_dict(two, tensors)
        assert torch.equal(one(IDS).logits, two(IDS).logits)
        assert trainable(two) == {"prompt_embeddings"} and two.hidden is None
        assert hidden or two.prompt_embeddings is held, "an optimizer holds it"


def test_loading_is_strict(prefix):
    for hidden in (None, 6):
        wrapper = wrapped(prefix, hidden=hidden)
        good = {n: t.clone() + 1 for n, t in prefix.state_dict(wrapper).items()}
        rows, before = good["prompt_embeddings"], snapshot(wrapper)
        for tensors in (
            {},
            {"prefix": rows},
            {**good, "mlp.0.bias": torch.zeros(6)},
            {"prompt_embeddings": rows[:3]},
            {"prompt_embeddings": rows[:1]},  # would be repeated
            {"prompt_embeddings": rows[:, :8]},  # P', not what the MLP makes of it
            {"prompt_embeddings": None},
        ):
            with pytest.raises(ValueError) as error:
                prefix.load_state_dict(wrapper, tensors)
            assert_one_sentence(error)
            assert_unchanged(wrapper, before)
        prefix.load_state_dict(wrapper, good)


def test_a_second_soft_prompt_is_refused(prefix):
    wrapper, other = wrapped(prefix), prompt.add(llama(), N)
    for model in (wrapper, nn.Sequential(wrapper), other):
        before = snapshot(model)
        with pytest.raises(ValueError, match="already") as error:
            prefix.add(model, N)
        assert_one_sentence(error)
        assert_unchanged(model, before)
    prefix.add(wrapper.model, N)  # the plain model may have another


# Bad input: one sentence each, and the model as it was

BAD = {
    "n=0": dict(n=0),
    "n=-1": dict(n=-1),
    "n=2.0": dict(n=2.0),
    "n=True": dict(n=True),
    "n='4'": dict(n="4"),
    "n=None": dict(n=None),
    "hidden=0": dict(hidden=0),
    "hidden=-6": dict(hidden=-6),
    "hidden=6.0": dict(hidden=6.0),
    "hidden=True": dict(hidden=True),
    "hidden='6'": dict(hidden="6"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(case):
    model = llama()
    model.lm_head.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        reference.add(model, **{"n": N, **BAD[case]})
    assert_one_sentence(error)
    assert_unchanged(model, before)


def test_what_does_not_generate_is_refused():
    for model in (bert(), bert(BertModel), nn.Sequential(nn.Linear(3, 3))):
        before = snapshot(model)
        with pytest.raises(ValueError, match="generates") as error:
            reference.add(model, N)
        assert_one_sentence(error)
        assert_unchanged(model, before)


@pytest.mark.parametrize("verb", ["state_dict", "load_state_dict", "fold"])
def test_the_verbs_say_so_where_there_is_no_prefix(verb):
    for model in (llama(), prompt.add(llama(), N)):
        with pytest.raises(ValueError, match="no prefix") as error:
            getattr(reference, verb)(model, *[{}] * (verb == "load_state_dict"))
        assert_one_sentence(error)


def test_no_input_and_two_inputs_are_refused():
    wrapper = wrapped(reference)
    x = wrapper.model.get_input_embeddings()(IDS)
    for inputs in ({}, dict(attention_mask=MASK), dict(input_ids=IDS, inputs_embeds=x)):
        with pytest.raises(ValueError, match="one of the two") as error:
            wrapper(**inputs)
        assert_one_sentence(error)


# The kit: training and answering take the wrapper for a model


def test_the_kit_trains_it_and_lets_it_answer():
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(0)
    wrapper = reference.add(model, 8)
    records = data.records("dates", "fi", 40)  # new to the model
    losses = train(wrapper, tokenizer, records, 40, 0.1, 8, progress=False)
    assert sum(losses[-3:]) < sum(losses[:3]) / 2, f"it does not learn: {losses}"
    prompts = [r.prompt for r in records[:8]]
    assert len({len(tokenizer(p)["input_ids"]) for p in prompts}) > 1, "none is padded"
    together = measure.answers(wrapper, tokenizer, prompts)
    alone = [measure.answers(wrapper, tokenizer, [p])[0] for p in prompts]
    assert together == alone, "pads on the left change what is answered"


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
        assert torch.equal(write(wrapper, **_mask(BATCH)), want)
    else:
        assert torch.equal(write(wrapper, IDS), greedy(twin, IDS, 6))


def _mask(batch):
    return dict(ids=batch["input_ids"], mask=batch["attention_mask"])


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

READS = test_every_layer_reads_its_keys_and_values_before_the_texts_own
SIZES = test_the_sizes_are_those_of_the_key_value_heads
RIGHT = test_a_batch_padded_on_the_right_is_masked_and_counted_as_ever
LEFT = test_a_row_padded_on_the_left_says_what_it_says_alone
COUNTS = test_position_ids_start_after_the_prefix
T5S = test_the_decoder_of_t5_has_the_prefix_in_its_self_attention
PAIRS = test_t5_reads_every_other_pair_as_peft_does
WRITES = test_it_writes_the_greedy_choice_of_forward
PADDED = test_rows_padded_on_the_left_write_what_they_write_alone
TRAINS = test_only_the_prefix_trains
FLOAT = test_the_prefix_is_float32_over_a_16_bit_base
MLP = test_the_mlp_makes_the_keys_and_values
FOLD = test_folding_changes_no_output_and_leaves_the_flat_tensor
ROUND = test_the_state_dict_goes_round
STRICT = test_loading_is_strict
UPDATE = "own.update(kv[2 * pair], kv[2 * pair + 1], layer)"
PAIR = "(1 + config.is_encoder_decoder) * layer % layers"

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "key and value are swapped": (
        READS,
        {UPDATE: "own.update(kv[2 * pair + 1], kv[2 * pair], layer)"},
    ),
    "all keys come first, then all values": (
        READS,
        {UPDATE: "own.update(kv[pair], kv[layers + pair], layer)"},
    ),
    "layers are read from the last to the first": (
        READS,
        {PAIR: "layers - 1 - layer"},
    ),
    "heads and sizes are mixed": (
        READS,
        {"heads, size).permute(1, 2, 3, 0, 4)": "size, heads).permute(1, 2, 4, 0, 3)"},
    ),
    "tokens and heads are mixed": (
        READS,
        {
            "view(self.n, 2 * layers, 1, heads, size).permute(1, 2, 3, 0, 4)": "view("
            "2 * layers, 1, heads, self.n, size)"
        },
    ),
    "the prefix is dead": (
        READS,
        {"self.mlp(self.prompt_embeddings).to": "(0 * self.prompt_embeddings).to"},
    ),
    "the prefix never gets in": (READS, {"self._filled(cache, len(text))": "cache"}),
    "as many key-value heads as heads": (
        SIZES,
        {'getattr(config, "num_key_value_heads", None) or heads': "heads"},
    ),
    "a head's size is hidden / heads": (
        SIZES,
        {'getattr(config, "head_dim", None) or ': ""},
    ),
    "T5's encoder gives the depth": (
        SIZES,
        {'getattr(config, "num_decoder_layers", None) or ': ""},
    ),
    "the value is the key": (
        test_a_key_that_fits_every_query_makes_attention_give_its_value,
        {UPDATE: "own.update(kv[2 * pair], kv[2 * pair], layer)"},
    ),
    "the prefix is masked": (RIGHT, {"(n, 0), value=1": "(n, 0), value=0"}),
    "the mask grows on the wrong side": (RIGHT, {"(n, 0), value": "(0, n), value"}),
    "pads on the right are not counted": (RIGHT, {" and not mask[:, 0].all()": ""}),
    "pads on the left are counted": (LEFT, {"and self._told": "and False"}),
    "position ids start at 0": (COUNTS, {"at + n": "at"}),
    "position ids are dropped": (COUNTS, {'inputs.get("position_ids"), ': "None, "}),
    "labels are dropped": (
        test_embeddings_and_labels_pass_through,
        {
            "self.model(**self._put_in(inputs))": "self.model(**self._put_in("
            '{k: v for k, v in inputs.items() if k != "labels"}))'
        },
    ),
    "the encoder's mask grows": (T5S, {'"decoder_" * self': '"" * self'}),
    "T5 reads pair after pair": (PAIRS, {PAIR: "layer"}),
    "the prefix is put in at each step": (
        WRITES,
        {"not (cache and cache.get_seq_length())": "True"},
    ),
    "the prefix is lost in writing": (
        WRITES,
        {"(args, self._put_in(inputs))": "(args, inputs)"},
    ),
    "without a cache the last step's is taken": (
        WRITES,
        {'None if inputs.get("use_cache") is False else ': ""},
    ),
    "beams share one row": (
        test_beams_find_the_same_with_and_without_a_cache,
        {"expand(-1, rows,": "expand(-1, 3,"},
    ),
    "later steps do not mask the pads": (
        PADDED,
        {
            "        if mask is not None:": "        if not begins:\n"
            "            inputs[which] = mask = None\n"
            "        if mask is not None:"
        },
    ),
    "the hook stays on the model": (
        test_the_model_is_as_it_was_after_writing,
        {
            "        with self.model.register_forward_pre_hook(": "        if"
            " self.model.register_forward_pre_hook("
        },
    ),
    "the base trains along": (
        TRAINS,
        {"requires_grad_(False)": "requires_grad_(True)"},
    ),
    "the prefix is frozen too": (
        TRAINS,
        {"nn.Parameter(start)": "nn.Parameter(start, False)"},
    ),
    "the prefix is in the base's 16 bits": (
        FLOAT,
        {"torch.promote_types(model.dtype, torch.float32)": "model.dtype"},
    ),
    "the model is drawn into float32": (FLOAT, {".to(self.model.dtype)": ""}),
    "it starts at a uniform": (
        test_it_starts_at_a_standard_normal,
        {"torch.randn(n,": "torch.rand(n,"},
    ),
    "the MLP has no tanh": (MLP, {"nn.Tanh()": "nn.Identity()"}),
    "the MLP has a ReLU": (MLP, {"nn.Tanh()": "nn.ReLU()"}),
    "folding leaves the MLP": (FOLD, {"wrapper.mlp = nn.Sequential()": "pass"}),
    "folding a flat prefix makes a new parameter": (
        FOLD,
        {"if wrapper.hidden:": "if True:"},
    ),
    "the prefix has no values": (
        test_the_counts_are_the_papers,
        {"2 * layers * heads * size": "layers * heads * size"},
    ),
    "the wrapper forgets the mode": (
        test_the_wrapper_answers_for_its_model,
        {"= sizes, model.training, []": "= sizes, True, []"},
    ),
    "what is saved is not folded": (
        ROUND,
        {"wrapper.mlp(wrapper.prompt_embeddings)": "wrapper.prompt_embeddings"},
    ),
    "loading does not fold": (
        ROUND,
        {"state_dict(fold(wrapper))": "state_dict(wrapper)"},
    ),
    "loading is not strict": (
        STRICT,
        {"if got != want or name not in own:": "if name not in tensors:"},
    ),
    "loading lets the unexpected pass": (
        STRICT,
        {"own.keys() | tensors.keys()": "own.keys()"},
    ),
    "a prefix goes on a prompt": (
        test_a_second_soft_prompt_is_refused,
        {'in ("PromptModel", "PrefixModel")': 'in ("PrefixModel",)'},
    ),
}
