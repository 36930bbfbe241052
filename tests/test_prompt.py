"""Prompt tuning's laws, and the same numbers as peft: forward, backward, generated.

A law that takes only `prompt`, the module, is run again by tests/test_mutations.py on
broken copies of prompt.py. Messages name the mistake that gives the symptom. What the
tests of both soft prompts use stands at the head of this file.
"""

import contextlib
import copy
import inspect
import math
import tempfile
import threading

import pytest
import torch
import transformers as tf
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
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peftlab import lora
from peftlab import prompt as reference
from peftlab.kit import base_models, data, measure
from peftlab.kit.train import train

N = 4
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]  # the last row is padded
LABELS = IDS.masked_fill(MASK == 0, -100)
ORDER = MASK.argsort(dim=1, stable=True)
LEFT = dict(input_ids=IDS.gather(1, ORDER), attention_mask=MASK.gather(1, ORDER))
TEXTS = [IDS[:1], IDS[1:2], IDS[2:, :5]]  # the rows of the batch, each alone
CACHE = "cache"  # its name from transformers 5.24 on
if CACHE not in inspect.signature(tf.LlamaForCausalLM.forward).parameters:
    CACHE = "past_key_values"


@pytest.fixture
def prompt():
    return reference


# What the tests of both soft prompts use


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


@contextlib.contextmanager
def refused(match, model=None):
    """A ValueError of one sentence, and the model, if given, unchanged."""
    before = model is not None and snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        yield
    assert_one_sentence(error)
    if model is not None:
        assert_unchanged(model, before)


def from_threads(call):
    """What a call gives in each of four threads, eight times."""
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(call() for _ in range(8)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 32, "a thread raised"
    return results


def roberta(kind=tf.RobertaForMaskedLM, **settings):
    settings |= dict(num_attention_heads=4, max_position_embeddings=64, pad_token_id=1)
    return seeded(kind(tf.RobertaConfig(**SMALL, **settings)))


def roberta_decoder():
    return roberta(tf.RobertaForCausalLM, is_decoder=True)


def bart(kind=tf.BartForConditionalGeneration):
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, vocab_size=40)
    sizes |= dict(encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    return seeded(kind(tf.BartConfig(**sizes, **heads, forced_eos_token_id=None)))


def bart_decoder():
    return bart(tf.BartForCausalLM)


def llama_classifier():
    config = copy.deepcopy(llama().config)
    config.pad_token_id = 0
    return seeded(tf.LlamaForSequenceClassification(config))


def bloom():
    sizes = dict(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
    return seeded(tf.BloomForCausalLM(tf.BloomConfig(**sizes)))


def mamba2():
    sizes = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4)
    sizes |= dict(num_heads=4, head_dim=16, n_groups=1, chunk_size=8)
    return seeded(tf.Mamba2ForCausalLM(tf.Mamba2Config(**sizes, pad_token_id=0)))


def jamba():
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_experts=1)
    layers = dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4)
    config = tf.JambaConfig(**SMALL, **heads, **layers, use_mamba_kernels=False)
    return seeded(tf.JambaForCausalLM(config))


def mistral():
    """It attends to the last seven tokens, itself among them."""
    heads = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=7)
    return seeded(tf.MistralForCausalLM(tf.MistralConfig(**SMALL, **heads)))


def trainer(wrapper, folder, rows, **options):
    """transformers' Trainer for two steps, with its defaults."""
    options |= dict(output_dir=str(folder), max_steps=2, report_to=[], use_cpu=True)
    options |= dict(per_device_train_batch_size=2, learning_rate=0.1)
    arguments = tf.TrainingArguments(**options, disable_tqdm=True)
    return tf.Trainer(wrapper, arguments, train_dataset=rows, eval_dataset=rows)


BAD_NUMBERS = (0, -1, 2.0, True, "4", 10**400)


def add_is_refused(module, **settings):
    """Bad input: one sentence, and the model as it was."""
    model = llama()
    model.lm_head.requires_grad_(False)
    with refused("", model):
        module.add(model, **{"n": N, **settings})


# A prompt, by hand


def wrapped(prompt, model=llama, **settings):
    """A model whose prompt is as long as its other embeddings, and none of them."""
    torch.manual_seed(1)
    wrapper = prompt.add(model(), N, **settings)
    for t in prompt.state_dict(wrapper).values():
        t += torch.randn(t.shape) / 5
    return wrapper


def by_hand(wrapper, ids, mask=None, **inputs):
    """What the plain model says of [P; E(ids)], a mask longer by ones given with it."""
    rows = wrapper.prompt_embeddings[:N].expand(len(ids), -1, -1)
    x = torch.cat([rows, wrapper.model.get_input_embeddings()(ids)], 1)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([torch.ones(len(ids), N).long(), mask], 1)
    return wrapper.model(inputs_embeds=x, **inputs)


def given(wrapper, **inputs):
    """What the model inside is called with."""
    seen = {}
    with wrapper.model.register_forward_pre_hook(
        lambda _, args, named: seen.update(named), with_kwargs=True
    ):
        with contextlib.suppress(ValueError, RuntimeError, IndexError):
            wrapper(**inputs)
    return seen


def in_front(prompt, model):
    """A wrapper whose prompt is tokens 1 to 3, the plain model, and those ids."""
    first = torch.tensor([1, 2, 3])
    plain = model()
    return prompt.add(copy.deepcopy(plain), 3, first), plain, first.expand(3, -1)


# The laws: what the model reads


def test_the_prompt_stands_before_the_text(prompt):
    wrapper = wrapped(prompt)
    got, want = wrapper(IDS).logits, by_hand(wrapper, IDS).logits
    assert got.shape[1] == N + IDS.shape[1], "logits cover the prompt and the text"
    plain = wrapper.model(IDS).logits
    assert not torch.allclose(got[:, N:], plain, atol=1e-3), "the prompt is dead"
    torch.testing.assert_close(got, want, msg="the model reads [P; E(x)], in order")


def test_embeddings_are_taken_in_place_of_ids(prompt):
    wrapper = wrapped(prompt)
    x = wrapper.model.get_input_embeddings()(IDS)
    torch.testing.assert_close(wrapper(inputs_embeds=x).logits, wrapper(IDS).logits)


@torch.no_grad()
def test_a_batch_padded_on_the_right_is_masked_and_counted_as_ever(prompt):
    for model in (llama, gpt2, bert, roberta):
        wrapper = wrapped(prompt, model)
        got, want = wrapper(IDS, MASK), by_hand(wrapper, IDS, MASK)
        torch.testing.assert_close(
            got.logits,
            want.logits,
            msg="the mask is 1 over the prompt, and positions are left to the model"
            " (they differ at the pads: are the pads left out of the count?)",
        )


@torch.no_grad()
def test_a_row_padded_on_the_left_says_what_it_says_alone(prompt):
    for model in (llama, gpt2, bloom, mamba2, jamba, mistral, roberta_decoder):
        wrapper = wrapped(prompt, model)
        together = wrapper(**LEFT).logits
        for row, text in enumerate(TEXTS):
            alone = wrapper(text).logits[0, N:]
            gap = (together[row, -text.shape[1] :] - alone).abs().max()
            assert gap < 1e-4, (
                f"{model.__name__}: row {row} moved by {gap:.1e}: pads on the left must"
                " stand before the prompt and must not be counted as positions"
            )


def test_pads_that_a_model_would_count_or_pool_are_refused(prompt):
    for model in (bert, roberta, bart, bart_decoder, lambda: bert(tf.BertModel)):
        wrapper = wrapped(prompt, model)
        with refused("pad on the right", wrapper):
            wrapper(**LEFT)

    wrapper = wrapped(prompt)
    with refused("batch, tokens"):
        wrapper(IDS, MASK[:, None, None])
    with refused("pads alone"):
        wrapper(IDS, MASK * torch.tensor([[1], [0], [1]]))

    wrapper = wrapped(prompt, llama_classifier)  # its answer is in the last slot
    with refused("pad on the left", wrapper):
        wrapper(IDS, MASK)
    alone = [wrapper(text).logits for text in TEXTS]
    torch.testing.assert_close(wrapper(**LEFT).logits, torch.cat(alone))


@torch.no_grad()
def test_an_encoder_without_positions_is_not_moved_by_pads_on_the_left(prompt):
    wrapper = wrapped(prompt, t5)
    gap = wrapper(IDS, MASK, labels=IDS).logits - wrapper(**LEFT, labels=IDS).logits
    gap = gap.abs().max()
    assert gap < 1e-4, f"{gap:.1e}: T5 measures distances, pads may not lie in between"


@torch.no_grad()
def test_position_ids_move_with_the_text(prompt):
    for model, start in ((gpt2, 0), (roberta, 2)):  # RoBERTa's begin at pad + 1
        wrapper = wrapped(prompt, model)
        at = start + torch.arange(8).expand(3, -1) + torch.tensor([[0], [3], [9]])
        want = torch.cat([start + torch.arange(N).expand(3, -1), at + N], 1)
        got = wrapper(IDS, position_ids=at).logits
        torch.testing.assert_close(got, by_hand(wrapper, IDS, position_ids=want).logits)


def test_there_is_no_loss_on_the_prompt(prompt):
    wrapper = wrapped(prompt)
    logits = by_hand(wrapper, IDS, MASK).logits
    loss = nn.functional.cross_entropy  # of the text, whose first token the prompt's
    want = loss(logits[:, N - 1 : -1].flatten(0, 1), LABELS.flatten())  # last foretells
    got = wrapper(**BATCH, labels=LABELS).loss
    torch.testing.assert_close(got, want, msg="labels are -100 over the prompt")


@torch.no_grad()
def test_token_types_are_zero_over_the_prompt(prompt):
    wrapper, types = wrapped(prompt, bert), IDS % 2
    want = torch.cat([torch.zeros(3, N).long(), types], 1)
    got = wrapper(IDS, token_type_ids=types).logits
    torch.testing.assert_close(got, by_hand(wrapper, IDS, token_type_ids=want).logits)


def test_only_labels_of_single_tokens_grow(prompt):
    wrapper = wrapped(prompt, bert)
    for labels in (torch.tensor([0, 2, 1]), torch.ones(3, 3)):  # one class, several
        seen = given(wrapper, input_ids=IDS, labels=labels).get("labels")
        assert seen is labels, "labels of a row stay as they are"
    wrapper = wrapped(prompt, lambda: bert(tf.BertForTokenClassification))
    seen = given(wrapper, input_ids=IDS, labels=IDS % 3).get("labels")
    want = torch.cat([torch.full((3, N), -100), IDS % 3], 1)
    assert torch.equal(seen, want), "a label a token moves with the text"
    wrapper(input_ids=IDS, labels=IDS % 3).loss.backward()


def test_an_encoder_decoder_has_its_prompt_in_the_encoder(prompt):
    for decoder in (False, True):
        wrapper = wrapped(prompt, t5, decoder=decoder)
        assert wrapper.prompt_embeddings.shape == ((2 if decoder else 1) * N, 32)
        got = wrapper(**BATCH, labels=LABELS)
        want = by_hand(wrapper, IDS, MASK, labels=LABELS)
        assert got.logits.shape == (3, 8, 40), "the decoder's text has no prompt"
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.logits, want.logits)
        got.loss.backward()
        moves = wrapper.prompt_embeddings.grad.any(1)
        assert moves[:N].all() and not moves[N:].any(), "the second half is idle"


# The laws: what it writes


def test_it_writes_the_greedy_choice_of_forward(prompt):
    for model in (llama, gpt2, jamba):
        wrapper = wrapped(prompt, model)
        want = greedy(wrapper, IDS, 6)
        for cached in (True, False):
            got = write(wrapper, IDS, use_cache=cached)
            assert torch.equal(got[:, :8], IDS), "the result starts with input_ids"
            assert torch.equal(got, want), (
                f"use_cache={cached}: is the prompt put in at each step, or lost?"
            )


def test_a_state_space_model_reads_the_prompt_once(prompt):
    wrapper, plain, first = in_front(prompt, mamba2)
    whole = torch.cat([first, IDS], 1)
    torch.testing.assert_close(wrapper(IDS).logits, plain(whole).logits)
    want = write(plain, whole)[:, -6:]
    assert torch.equal(write(wrapper, IDS)[:, -6:], want), "its cache has no length"


def test_rows_padded_on_the_left_write_what_they_write_alone(prompt):
    for model in (llama, gpt2, bloom):
        wrapper = wrapped(prompt, model)
        got = write(wrapper, *LEFT.values())[:, 8:]
        alone = [write(wrapper, text)[0, -6:] for text in TEXTS]
        assert torch.equal(got, torch.stack(alone)), (
            "later steps must count and mask as the first one did"
        )


def test_a_text_can_be_read_in_two_parts(prompt):
    wrapper = wrapped(prompt)
    want = wrapper(IDS).logits[:, -3:]
    for mask in (None, torch.ones_like(IDS)):
        cache = {CACHE: wrapper(IDS[:, :5], use_cache=True)[CACHE]}
        got = wrapper(IDS[:, 5:], mask, **cache).logits
        torch.testing.assert_close(got, want, msg="the cache holds the prompt already")


def test_a_cache_that_is_filled_or_static_is_refused(prompt):
    wrapper = wrapped(prompt)
    empty = tf.DynamicCache()
    options = dict(past_key_values=empty, return_dict_in_generate=True)
    first = write(wrapper, IDS, **options)
    assert torch.equal(first.sequences, write(wrapper, IDS))
    for name in {CACHE, "past_key_values"}:
        with refused("no cache", wrapper):
            write(wrapper, first.sequences, **{name: first[CACHE]})
    static = tf.StaticCache(wrapper.config, max_cache_len=64)
    for options in ({CACHE: static}, dict(cache_implementation="static")):
        with refused("static cache", wrapper):
            write(wrapper, IDS, **options)


def test_threads_write_what_one_writes(prompt):
    wrapper = wrapped(prompt)
    want = write(wrapper, IDS, steps=3)
    got = from_threads(lambda: write(wrapper, IDS, steps=3))
    wrong = sum(not torch.equal(each, want) for each in got)
    assert not wrong, f"{wrong} of 32 are wrong: threads see each other's prompt"


def test_the_model_is_as_it_was_after_writing(prompt):
    wrapper = wrapped(prompt)
    want = wrapper.model(input_ids=IDS).logits
    write(wrapper, IDS)
    with pytest.raises((TypeError, ValueError)):
        wrapper.generate(IDS, no_such_option=1)
    assert torch.equal(wrapper.model(input_ids=IDS).logits, want), (
        "something was left on the model"
    )


# The laws: what trains


def test_only_the_prompt_trains(prompt):
    wrapper = wrapped(prompt)
    assert trainable(wrapper) == {"prompt_embeddings"}, "the base is not frozen"
    before = snapshot(wrapper.model)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    start = wrapper.prompt_embeddings.detach().clone()
    wrapper(**BATCH, labels=LABELS).loss.backward()
    optimizer.step()
    assert (wrapper.prompt_embeddings != start).any(1).all(), "a row did not train"
    assert_unchanged(wrapper.model, before)


def test_the_prompt_is_float32_over_a_16_bit_base(prompt):
    for dtype in (torch.bfloat16, torch.float16):
        for init in ("vocabulary", "random"):
            wrapper = prompt.add(llama().to(dtype), N, init)
            assert wrapper.prompt_embeddings.dtype == torch.float32
        out = wrapper(**BATCH, labels=LABELS)
        assert out.logits.dtype == dtype, "the model must stay in its own precision"
        out.loss.backward()
        assert wrapper.prompt_embeddings.grad.any()
    assert prompt.add(llama().double(), N).prompt_embeddings.dtype == torch.float64


def test_transformers_trainer_trains_it_and_saves_it(prompt):
    with tempfile.TemporaryDirectory() as folder:
        row = dict(input_ids=IDS[0], token_type_ids=IDS[0] % 2, labels=torch.tensor(1))
        wrapper = wrapped(prompt, bert)
        trains = trainer(wrapper, folder, [row | dict(name="dropped")] * 4)
        assert trains.label_names == ["labels"], "evaluation looks for them"
        want = wrapper(**{k: v[None] for k, v in row.items()}).loss.item()
        got = trains.evaluate()["eval_loss"]
        assert abs(got - want) < 1e-5, "forward shows its model's arguments"
        assert trains.train().training_loss > 0
        assert abs(trains.evaluate()["eval_loss"] - want) > 1e-5

        wrapper = wrapped(prompt, gpt2)  # its head is tied to its embeddings
        want = wrapper(IDS).logits
        trainer(wrapper, folder, []).save_model()
        tensors = load_file(f"{folder}/model.safetensors")
        with torch.no_grad():
            wrapper.prompt_embeddings += 1
        wrapper.load_state_dict(tensors)
        assert torch.equal(wrapper(IDS).logits, want)
        tied = wrapper.model.lm_head.weight
        assert tied is wrapper.model.transformer.wte.weight


# The laws: how it starts


def test_it_starts_at_words_drawn_from_the_whole_vocabulary(prompt):
    torch.manual_seed(3)
    model = llama()
    words = model.get_input_embeddings().weight.detach()
    rows = prompt.add(copy.deepcopy(model), 400).prompt_embeddings.detach()
    which = torch.cdist(rows, words).argmin(1)
    assert torch.equal(rows, words[which]), "each row is a row of the vocabulary"
    assert which.unique().numel() == len(words), "400 draws of 40 should meet them all"
    torch.manual_seed(3)
    again = prompt.add(llama(), 400).prompt_embeddings
    assert torch.equal(again, rows), "torch's seed decides"
    with torch.no_grad():
        again += 1
    assert torch.equal(model.get_input_embeddings().weight, words), "it is a copy"


def test_it_starts_at_given_words_repeated_or_cut(prompt):
    words = llama().get_input_embeddings().weight
    for ids in ([7, 3], [7, 3, 9], [1, 2, 3, 4, 5, 6, 7]):
        wrapper = prompt.add(llama(), 5, torch.tensor(ids))
        want = words[(ids * 3)[:5]]
        assert torch.equal(wrapper.prompt_embeddings, want)


def test_random_is_uniform_within_a_half(prompt):
    rows = prompt.add(llama(), 500, "random").prompt_embeddings
    assert rows.abs().max() <= 0.5 and abs(rows.mean()) < 0.01
    assert abs(rows.std() - 1 / math.sqrt(12)) < 0.01


def test_it_starts_at_words_as_the_model_scales_them(prompt):
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 8 * super().forward(ids)

    model = llama()
    model.set_input_embeddings(Scaled(40, 32))
    rows = prompt.add(model, N, torch.tensor([5])).prompt_embeddings
    want = 8 * model.get_input_embeddings().weight[[5] * N]
    torch.testing.assert_close(rows, want, msg="the embedding's scale is left out")


def test_it_can_be_counted_without_memory(prompt):
    with torch.device("meta"):
        model = llama()
    for init in ("vocabulary", "random", torch.tensor([1, 2])):
        wrapper = prompt.add(copy.deepcopy(model), 7, init)
        assert wrapper.prompt_embeddings.device.type == "meta"
        assert measure.parameters(wrapper)[0] == 7 * 32


# The laws: the wrapper


def test_the_wrapper_answers_for_its_model(prompt):
    for training in (True, False):
        wrapper = prompt.add(llama().train(training), N)
        assert wrapper.training == wrapper.model.training == training
    model = wrapper.model
    assert wrapper.config is model.config and wrapper.device == model.device
    assert wrapper.generation_config is model.generation_config
    assert wrapper.train().model.training and not wrapper.eval().model.training
    assert not hasattr(wrapper, "no_such_thing")
    twin = copy.deepcopy(wrapper)
    assert torch.equal(twin(IDS).logits, wrapper(IDS).logits)
    with torch.no_grad():
        twin.prompt_embeddings += 1
    assert not torch.equal(twin(IDS).logits, wrapper(IDS).logits), "it is another one"


def test_the_state_dict_goes_round(prompt):
    one, two = wrapped(prompt), prompt.add(llama(), N)
    tensors = {n: t.clone() for n, t in prompt.state_dict(one).items()}
    assert {n: t.shape for n, t in tensors.items()} == {"prompt_embeddings": (N, 32)}
    prompt.load_state_dict(two, tensors)
    assert torch.equal(one(IDS).logits, two(IDS).logits)
    assert trainable(two) == {"prompt_embeddings"}


def test_loading_is_strict(prompt):
    wrapper = wrapped(prompt)
    good = {n: t.clone() + 1 for n, t in prompt.state_dict(wrapper).items()}
    rows = good["prompt_embeddings"]
    for tensors in (
        {},
        {"prompt": rows},
        {**good, "lora_A": torch.zeros(2)},
        {"prompt_embeddings": rows[:3]},
        {"prompt_embeddings": rows[:1]},  # would be repeated
        {"prompt_embeddings": rows.T},
        {"prompt_embeddings": None},
    ):
        with refused("", wrapper):
            prompt.load_state_dict(wrapper, tensors)
    prompt.load_state_dict(wrapper, good)


def test_a_second_method_is_refused(prompt):
    wrapper = wrapped(prompt)
    for model in (wrapper, nn.Sequential(wrapper), lora.add(llama(), ["q_proj"])):
        with refused("already", model):
            prompt.add(model, N)
    prompt.add(wrapper.model, N)  # the plain model may have another


# Bad input: one sentence each, and the model as it was

BAD = {
    **{f"n={n!r:.9}": dict(n=n) for n in (*BAD_NUMBERS, None)},
    **{f"init={init!r}": dict(init=init) for init in ("text", None, 3, [1, 2])},
    "decoder where there is none": dict(decoder=True),
    "a token id that is too large": dict(init=torch.tensor([3, 40])),
    "a negative token id": dict(init=torch.tensor([-1])),
    "no token id": dict(init=torch.tensor([], dtype=torch.long)),
    "token ids as floats": dict(init=torch.tensor([1.0, 2.0])),
    "token ids as truth values": dict(init=torch.tensor([True, False])),
    "token ids in two dimensions": dict(init=torch.tensor([[1, 2]])),
    "token ids in none": dict(init=torch.tensor(3)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(case):
    add_is_refused(reference, **BAD[case])


def test_a_model_that_takes_no_embeddings_is_refused():
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    pictures = tf.ViTModel(tf.ViTConfig(**tiny, num_attention_heads=2, image_size=32))
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, dim_head=8)
    ants = tf.CpmAntModel(tf.CpmAntConfig(**sizes, num_attention_heads=2, dim_ff=16))
    for model in (nn.Sequential(nn.Linear(3, 3)), pictures, ants):
        with refused("embeddings", model):
            reference.add(model, N)


@pytest.mark.parametrize("verb", ["state_dict", "load_state_dict"])
def test_the_state_is_refused_where_there_is_no_prompt_in_sight(verb):
    wrapper = wrapped(reference)
    for model, match in (
        (llama(), "no prompt"),
        (nn.DataParallel(wrapper), "module"),
    ):
        with refused(match):
            getattr(reference, verb)(model, *[{}] * (verb == "load_state_dict"))
    for model in (nn.DataParallel(llama()), None):
        with refused("must be an nn.Module|the plain model"):
            reference.add(model, N)


def test_a_compiled_model_is_taken_for_the_plain_one():
    plain = llama()
    wrapper = reference.add(torch.compile(plain), N)
    assert wrapper.model is plain
    tensors = reference.state_dict(torch.compile(wrapper))
    assert tensors["prompt_embeddings"].shape == (N, 32)


def test_no_input_and_two_inputs_are_refused():
    wrapper = wrapped(reference)
    x = wrapper.model.get_input_embeddings()(IDS)
    for inputs in ({}, dict(attention_mask=MASK), dict(input_ids=IDS, inputs_embeds=x)):
        with refused("one of the two"):
            wrapper(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
@torch.no_grad()
def test_a_mask_of_any_type_says_the_same(dtype):
    wrapper = wrapped(reference)
    for mask in (MASK, MASK.flip(1)):
        got = wrapper(IDS, mask.to(dtype)).logits
        assert torch.equal(got, wrapper(IDS, mask).logits)


# The kit: training and answering take the wrapper for a model


def kit_trains_it(module):
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(0)
    wrapper = module.add(model, 8)
    records = data.records("dates", "fi", 40)  # new to the model
    losses = train(wrapper, tokenizer, records, 40, 0.1, 8, progress=False)
    assert sum(losses[-3:]) < sum(losses[:3]) / 2, f"it does not learn: {losses}"
    prompts = [r.prompt for r in records[:8]]
    assert len({len(tokenizer(p)["input_ids"]) for p in prompts}) > 1, "none is padded"
    together = measure.answers(wrapper, tokenizer, prompts)
    alone = [measure.answers(wrapper, tokenizer, [p])[0] for p in prompts]
    assert together == alone, "pads on the left change what is answered"


def test_the_kit_trains_it_and_lets_it_answer():
    kit_trains_it(reference)


# The oracle: peft

KINDS = {  # model, peft's name for its task, its further settings, what goes in
    "tiny-decoder": (MODELS["tiny-decoder"], "CAUSAL_LM", {}, dict(labels=LABELS)),
    "llama": (llama, "CAUSAL_LM", {}, dict(labels=LABELS)),
    "gpt2": (gpt2, "CAUSAL_LM", {}, dict(labels=LABELS)),
    "bert": (
        bert,
        "SEQ_CLS",
        {},
        dict(labels=torch.tensor([0, 2, 1]), token_type_ids=IDS % 2),
    ),
    "bert-model": (lambda: bert(tf.BertModel), "FEATURE_EXTRACTION", {}, {}),
    "t5": (t5, "SEQ_2_SEQ_LM", {}, dict(labels=LABELS)),
    "t5-encoder": (
        t5,
        "SEQ_2_SEQ_LM",
        dict(num_transformer_submodules=1),
        dict(labels=LABELS),
    ),
}


def pair(name):
    """Our wrapper and peft's around copies of one model, with the same prompt."""
    build, task, settings, more = KINDS[name]
    model = build().eval()
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=N, **settings)
    twin = get_peft_model(copy.deepcopy(model), config).eval()
    wrapper = reference.add(model, N, decoder=name == "t5")
    theirs = twin.prompt_encoder["default"].embedding.weight
    torch.manual_seed(2)
    theirs.data += wrapper.model.get_input_embeddings().weight[:1].std() * torch.randn(
        theirs.shape
    )
    reference.load_state_dict(wrapper, {"prompt_embeddings": theirs})
    return wrapper, twin, theirs, more


@pytest.mark.parametrize("name", KINDS)
def test_numbers_equal_pefts_before_and_after_training(name):
    wrapper, twin, theirs, more = pair(name)
    ours = wrapper.prompt_embeddings
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in (ours, theirs)]
    for step in range(3):
        outputs = [m(**BATCH, **more) for m in (wrapper, twin)]
        for key in outputs[1].keys() & {"loss", "logits", "last_hidden_state"}:
            assert_same(outputs[0][key], outputs[1][key], f"step {step}: {key}")
        for p, out in zip((ours, theirs), outputs, strict=True):
            p.grad = None
            value = out["loss"] if "loss" in out else out[0].cos().mean()
            value.backward()
        assert_same(ours.grad, theirs.grad, f"step {step}: the gradient")
        assert ours.grad.abs().max() > 1e-4, "so small a gradient proves little"
        for optimizer in optimizers:
            optimizer.step()
        assert_same(ours, theirs, f"step {step}: the prompt")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [k for k in KINDS if "bert" not in k])
def test_it_writes_what_peft_writes(name, beams):
    wrapper, twin, _, _ = pair(name)
    # peft 0.21 looks for the cache by the name that it had before transformers 5.24,
    # and puts the prompt in again at each step: without a cache that is right.
    cached = {} if "t5" in name else dict(use_cache=False)
    mask = MASK if "t5" in name else None
    want = write(twin, IDS, mask, num_beams=beams, **cached)
    assert torch.equal(write(wrapper, IDS, mask, num_beams=beams), want)


# prompt.py copied alone, for tests/test_standalone.py

ALONE = """
import prompt
from torch import nn
class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 2)
    def get_input_embeddings(self):
        return self.words
    def forward(self, inputs_embeds, attention_mask):
        weights = attention_mask / attention_mask.sum(1, keepdim=True)
        return self.head((weights[..., None] * inputs_embeds.tanh()).sum(1))
torch.manual_seed(0)
ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
model = prompt.add(Bag(), 3, torch.tensor([1, 5]))
tuned = model(ids, mask)
x = torch.cat([model.prompt_embeddings, model.words(ids[1, 1:])])
assert torch.allclose(tuned[1], model.head(x.tanh().mean(0)))
tuned.pow(2).sum().backward()
assert model.prompt_embeddings.grad.any() and model.head.weight.grad is None
prompt.load_state_dict(model, {n: t + 1 for n, t in prompt.state_dict(model).items()})
assert not torch.allclose(model(ids, mask), tuned)
"""


# Broken copies, for tests/test_mutations.py

STANDS = test_the_prompt_stands_before_the_text
EMBEDS = test_embeddings_are_taken_in_place_of_ids
RIGHT = test_a_batch_padded_on_the_right_is_masked_and_counted_as_ever
ALONE_LEFT = test_a_row_padded_on_the_left_says_what_it_says_alone
PADS = test_pads_that_a_model_would_count_or_pool_are_refused
T5_LEFT = test_an_encoder_without_positions_is_not_moved_by_pads_on_the_left
PLACES = test_position_ids_move_with_the_text
LOSS = test_there_is_no_loss_on_the_prompt
TYPES = test_token_types_are_zero_over_the_prompt
LABEL = test_only_labels_of_single_tokens_grow
T5S = test_an_encoder_decoder_has_its_prompt_in_the_encoder
WRITES = test_it_writes_the_greedy_choice_of_forward
PARTS = test_a_text_can_be_read_in_two_parts
MAMBA = test_a_state_space_model_reads_the_prompt_once
PADDED = test_rows_padded_on_the_left_write_what_they_write_alone
CACHES = test_a_cache_that_is_filled_or_static_is_refused
AFTER = test_the_model_is_as_it_was_after_writing
THREADS = test_threads_write_what_one_writes
TRAINS = test_only_the_prompt_trains
TRAINER = test_transformers_trainer_trains_it_and_saves_it
SIXTEEN = test_the_prompt_is_float32_over_a_16_bit_base
WORDS = test_it_starts_at_words_drawn_from_the_whole_vocabulary
GIVEN = test_it_starts_at_given_words_repeated_or_cut
RANDOM = test_random_is_uniform_within_a_half
SCALED = test_it_starts_at_words_as_the_model_scales_them
META = test_it_can_be_counted_without_memory
ANSWERS = test_the_wrapper_answers_for_its_model
ROUND = test_the_state_dict_goes_round
STRICT = test_loading_is_strict
SECOND = test_a_second_method_is_refused

P = "self.prompt_embeddings[: self.n]"
JOIN = "[first.to(rest).expand(len(rest), *first.shape), rest]"
LOOP = "        for name, value in fill.items():"
NO_MASK = '        if was_read:\n            inputs["attention_mask"] = None\n'
READER = """reader = copy.copy(self.model)
        reader.forward = forward
        return reader.generate(*args, **options)"""
HOOK = """hook = lambda _, args, inputs: (args, self._with_prompt(**inputs))
        with self.model.register_forward_pre_hook(hook, with_kwargs=True):
            return self.model.generate(*args, **options)"""

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "the prompt stands after the text": (
        STANDS,
        {JOIN: "[rest, first.to(rest).expand(len(rest), *first.shape)]"},
    ),
    "the prompt is dead": (STANDS, {P: f"0 * {P}"}),
    "given embeddings are replaced": (EMBEDS, {"else text": "else 0 * text"}),
    "the prompt is masked": (RIGHT, {'{"attention_mask": 1}': '{"attention_mask": 0}'}),
    "the mask does not grow": (RIGHT, {'{"attention_mask": 1}': "{}"}),
    "pads on the right are not counted": (
        RIGHT,
        {"if order is None or not": 'if inputs["attention_mask"] is None or not'},
    ),
    "left pads are counted": (ALONE_LEFT, {"if order is None or": "if True or"}),
    "RoBERTa is told from 0": (ALONE_LEFT, {"(0) + self._first_position": "(0)"}),
    "BERT takes left pads": (PADS, {"return _is_causal(model) or": "return True or"}),
    "BART takes left pads": (PADS, {"hasattr(config, ": "bool("}),
    "BART's decoder takes them": (PADS, {"return family in": "return family not in"}),
    "pads take the place of an answer": (PADS, {"and self._pools_last": "and False"}),
    "a 4-D mask passes": (PADS, {"if mask.dim() != 2:": "if False:"}),
    "a row of pads passes": (PADS, {"if not mask.any(1).all():": "if False:"}),
    "T5's prompt is before the pads": (T5_LEFT, {"rank = 2 * (": "rank = 2 + ("}),
    "position ids stay": (PLACES, {"given + self.n, order": "given, order"}),
    "RoBERTa's prompt is at its pad": (PLACES, {"given.min()": "0 * given.min()"}),
    "the prompt has labels": (LOSS, {'fill["labels"] = -100': 'fill["labels"] = 0'}),
    "token types are one": (
        TYPES,
        {'["token_type_ids"] = 0': '["token_type_ids"] = 1'},
    ),
    "a label a row grows": (LABEL, {"labels.dim() == 2 and ": ""}),
    "several classes a row grow": (LABEL, {" and labels.dtype == torch.long": ""}),
    "labels do not move": (LABEL, {'fill["labels"] = -100': "pass"}),
    "the labels of T5 grow": (T5S, {" and not self._in_encoder:\n": ":\n"}),
    "T5 reads the idle half": (T5S, {P: "self.prompt_embeddings[-self.n :]"}),
    "it comes at each step": (WRITES, {"return _is_filled(": "return 0 * bool("}),
    "a second part has it too": (PARTS, {"return _is_filled(": "return 0 * bool("}),
    "the prompt is lost in writing": (
        WRITES,
        {"forward(**self._with_prompt(*args, **inputs))": "forward(*args, **inputs)"},
    ),
    "later steps do not count": (WRITES, {"return given + self.n": "return given"}),
    "Mamba reads it at each step": (MAMBA, {"cache.has_previous_state()": "False"}),
    "later steps do not mask the pads": (PADDED, {LOOP: NO_MASK + LOOP}),
    "a filled cache passes": (CACHES, {"if _is_filled(_cache(options)):": "if False:"}),
    "a static cache passes": (CACHES, {'"max_cache_len"': '"no_such_thing"'}),
    "the model's forward is replaced": (AFTER, {"copy.copy(self.model)": "self.model"}),
    "a hook stays": (AFTER, {READER: HOOK.replace("with self", "if self")}),
    "threads share a hook": (THREADS, {READER: HOOK}),
    "the base trains along": (TRAINS, {"grad_(False)": "grad_(True)"}),
    "the prompt is frozen too": (TRAINS, {"_join(prompt,": "_join(prompt.detach(),"}),
    "Trainer drops the token types": (TRAINER, {"    @ModelSignature\n": ""}),
    "Trainer finds no labels": (
        TRAINER,
        {" labels=None,": "", "if labels is not None": "if False"},
    ),
    "tied weights share memory": (
        TRAINER,
        {".clone() if storage in": " if storage in"},
    ),
    "the prompt is in 16 bits": (
        SIXTEEN,
        {"dtype, torch.float32": "dtype, start.dtype"},
    ),
    "the model is drawn into float32": (SIXTEEN, {"first.to(rest).": "first."}),
    "all rows start as one word": (WORDS, {"randint(size, (": "randint(1, ("}),
    "words are spread": (GIVEN, {"ids.repeat(": "ids.repeat_interleave("}),
    "random is from 0 to 1": (RANDOM, {"rand_like(start) - 0.5": "rand_like(start)"}),
    "random is a normal": (RANDOM, {"rand_like(start) - 0.5": "randn_like(start)"}),
    "the scale is left out": (SCALED, {"embedding(ids)": "embedding.weight[ids]"}),
    "ids are on another device": (META, {"embedding(ids)": "torch.zeros(count, 32)"}),
    "the wrapper forgets the mode": (ANSWERS, {"= model.training": "= True"}),
    "the state has another name": (ROUND, {'{"prompt_embeddings":': '{"embedding":'}),
    "loading copies nothing": (ROUND, {"t.copy_(tensors": "t.clone().copy_(tensors"}),
    "loading is not strict": (STRICT, {"or got != want": "or want is None"}),
    "loading lets the unexpected pass": (STRICT, {" | tensors.keys()": ""}),
    "a prompt goes on a prompt": (SECOND, {'peft_method = "prompt"': "pass"}),
    "a prompt goes on a LoRA": (SECOND, {"_refuse_carried(model)\n": "model\n"}),
}
