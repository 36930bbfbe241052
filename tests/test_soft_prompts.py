"""What holds for both soft prompts, prompt.py and prefix.py, and their tests' tools.

A law takes only `soft`, the module. The files of the two name some among theirs: what
surgery.py does around a model is broken in prompt.py's stand-alone file, once.
"""

import contextlib
import copy
import inspect
import tempfile
import threading

import pytest
import torch
import transformers as tf
from common import (
    BATCH,
    SMALL,
    assert_one_sentence,
    assert_unchanged,
    gpt2,
    llama,
    seeded,
    snapshot,
    t5,
    trainable,
)
from safetensors.torch import load_file
from torch import nn

from peftlab import lora, prefix, prompt
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


@pytest.fixture(params=[prompt, prefix], ids=["prompt", "prefix"])
def soft(request):
    return request.param


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


def wrapped(soft, model=llama, **settings):
    """A prompt as long as the model's other embeddings, and none of them; a prefix."""
    torch.manual_seed(1)
    wrapper = soft.add(model(), N, **settings)
    with torch.no_grad():
        p = wrapper.prompt_embeddings
        p += torch.randn(p.shape) / 5
    return wrapper


# The laws: what the model reads


def test_embeddings_are_taken_in_place_of_ids(soft):
    wrapper = wrapped(soft)
    x = wrapper.get_input_embeddings()(IDS)
    got, want = (
        wrapper(**i, labels=IDS) for i in (dict(inputs_embeds=x), dict(input_ids=IDS))
    )
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)


def test_no_input_and_two_inputs_are_refused(soft):
    wrapper = wrapped(soft)
    x = wrapper.get_input_embeddings()(IDS)
    left = LEFT["attention_mask"]
    for inputs in (
        {},
        dict(attention_mask=MASK),
        dict(attention_mask=left),
        dict(input_ids=IDS, inputs_embeds=x),
    ):
        with refused("one of the two"):
            wrapper(**inputs)


@torch.no_grad()
def test_a_mask_of_any_type_says_the_same(soft):
    wrapper = wrapped(soft)
    for dtype in (torch.float32, torch.bool, torch.int32):
        for mask in (MASK, MASK.flip(1)):
            got = wrapper(IDS, mask.to(dtype)).logits
            assert torch.equal(got, wrapper(IDS, mask).logits)


@torch.no_grad()
def says_alone(wrapper, name):
    """A row that is padded on the left says what it says alone."""
    together = wrapper(**LEFT).logits
    for row, text in enumerate(TEXTS):
        size = text.shape[1]
        alone = wrapper(text).logits[0, -size:]
        gap = (together[row, -size:] - alone).abs().max()
        assert gap < 1e-4, (
            f"{name}: row {row} moved by {gap:.1e}: pads on the left must stand before"
            " the prompt and must not be counted as positions"
        )


# The laws: what it writes


def writes_greedily(wrapper):
    want = greedy(wrapper, IDS, 6)
    for cached in (True, False):
        got = write(wrapper, IDS, use_cache=cached)
        assert torch.equal(got[:, :8], IDS), "the result starts with input_ids"
        assert torch.equal(got, want), (
            f"use_cache={cached}: is it put in at each step, or lost?"
        )


def test_rows_padded_on_the_left_write_what_they_write_alone(soft):
    for model in (llama, gpt2, bloom):
        wrapper = wrapped(soft, model)
        got = write(wrapper, *LEFT.values())[:, 8:]
        alone = [write(wrapper, text)[0, -6:] for text in TEXTS]
        assert torch.equal(got, torch.stack(alone)), (
            "later steps must count and mask as the first one did"
        )


def test_a_text_can_be_read_in_two_parts(soft):
    wrapper = wrapped(soft)
    want = wrapper(IDS).logits[:, -3:]
    for mask in (None, torch.ones_like(IDS)):
        for name in {CACHE, "past_key_values"}:  # by its old name too
            first = wrapper(IDS[:, :5], **{name: tf.DynamicCache()})
            got = wrapper(IDS[:, 5:], mask, **{name: first[CACHE]}).logits
            torch.testing.assert_close(got, want, msg="the cache holds it already")


def test_a_cache_that_is_filled_or_static_is_refused(soft):
    wrapper = wrapped(soft)
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


def test_threads_write_what_one_writes(soft):
    wrapper = wrapped(soft)
    want = write(wrapper, IDS, steps=3)
    got = from_threads(lambda: write(wrapper, IDS, steps=3))
    wrong = sum(not torch.equal(each, want) for each in got)
    assert not wrong, f"{wrong} of 32 are wrong: threads see each other's prompt"


def test_the_model_is_as_it_was_after_writing(soft):
    wrapper = wrapped(soft)
    want = wrapper.model(input_ids=IDS).logits
    write(wrapper, IDS)
    with pytest.raises((TypeError, ValueError)):
        wrapper.generate(IDS, no_such_option=1)
    assert torch.equal(wrapper.model(input_ids=IDS).logits, want), (
        "something was left on the model"
    )


# The laws: what trains


def test_generate_takes_its_arguments_as_transformers_does(soft):
    for build in (llama, t5):
        wrapper = soft.add(build(), N)
        settings = tf.GenerationConfig(max_new_tokens=4, decoder_start_token_id=0)
        settings.pad_token_id = 0
        want = wrapper.generate(input_ids=IDS, generation_config=settings)
        for given in (
            wrapper.generate(IDS, settings),
            wrapper.generate(inputs=IDS, generation_config=settings),
            wrapper.generate(IDS, settings, attention_mask=torch.ones_like(IDS)),
        ):
            assert torch.equal(given, want)


def test_nothing_else_trains(soft):
    wrapper = wrapped(soft)
    assert trainable(wrapper) == {"prompt_embeddings"}, "the base is not frozen"
    before = snapshot(wrapper.model)
    start = wrapper.prompt_embeddings.detach().clone()
    wrapper(**BATCH, labels=LABELS).loss.backward()
    torch.optim.SGD(wrapper.parameters(), lr=0.1).step()
    assert (wrapper.prompt_embeddings != start).any(1).all(), "a row did not train"
    assert_unchanged(wrapper.model, before)


def test_transformers_trainer_trains_it_and_saves_it(soft):
    labels = IDS[0].clone()
    labels[
        0
    ] = -100  # Trainer divides by all labels, the model shifts the first one out
    row = dict(input_ids=IDS[0], token_type_ids=IDS[0], labels=labels)
    wrapper = wrapped(soft, gpt2)  # its head is tied to its embeddings
    shown = inspect.signature(wrapper.forward)
    assert shown == inspect.signature(wrapper.model.forward), "columns are dropped"
    with tempfile.TemporaryDirectory() as folder:
        trains = trainer(wrapper, folder, [row | dict(name="dropped")] * 4)
        assert trains.label_names == ["labels"], "evaluation looks for them"
        want = wrapper(**{k: v[None] for k, v in row.items()}).loss.item()
        got = trains.evaluate()["eval_loss"]
        assert abs(got - want) < 1e-5, "forward shows its model's arguments"
        assert trains.train().training_loss > 0
        assert abs(trains.evaluate()["eval_loss"] - want) > 1e-5

        want = wrapper(IDS).logits
        trains.save_model()
        tensors = load_file(f"{folder}/model.safetensors")
        with torch.no_grad():
            wrapper.prompt_embeddings += 1
        wrapper.load_state_dict(tensors)
        assert torch.equal(wrapper(IDS).logits, want)
        tied = wrapper.model.lm_head.weight
        assert tied is wrapper.model.transformer.wte.weight


def test_the_kit_trains_it_and_lets_it_answer(soft):
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(0)
    wrapper = soft.add(model, 8)
    records = data.records("dates", "fi", 40)  # new to the model
    losses = train(wrapper, tokenizer, records, 40, 0.1, 8, progress=False)
    assert sum(losses[-3:]) < sum(losses[:3]) / 2, f"it does not learn: {losses}"
    prompts = [r.prompt for r in records[:8]]
    assert len({len(tokenizer(p)["input_ids"]) for p in prompts}) > 1, "none is padded"
    together = measure.answers(wrapper, tokenizer, prompts)
    alone = [measure.answers(wrapper, tokenizer, [p])[0] for p in prompts]
    assert together == alone, "pads on the left change what is answered"


# The laws: the wrapper


def test_the_wrapper_answers_for_its_model(soft):
    for training in (True, False):
        wrapper = soft.add(llama().train(training), N)
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


def test_loading_is_strict(soft):
    for hidden in (None, 6) if soft is prefix else (None,):
        wrapper = wrapped(soft, **({"hidden": hidden} if hidden else {}))
        good = {n: t.clone() + 1 for n, t in soft.state_dict(wrapper).items()}
        rows = good["prompt_embeddings"]
        for tensors in (
            {},
            {"prompt": rows},
            {**good, "mlp.0.bias": torch.zeros(6)},
            {"prompt_embeddings": rows[:3]},
            {"prompt_embeddings": rows[:1]},  # would be repeated
            {"prompt_embeddings": rows.T},
            {"prompt_embeddings": rows[:, :8]},  # P', not what the MLP makes of it
            {"prompt_embeddings": None},
        ):
            with refused("", wrapper):
                soft.load_state_dict(wrapper, tensors)
        soft.load_state_dict(wrapper, good)


def test_a_second_method_is_refused(soft):
    wrapper = wrapped(soft)
    other = prompt.add(llama(), N), prefix.add(llama(), N)
    for model in (
        wrapper,
        nn.Sequential(wrapper),
        *other,
        lora.add(llama(), ["q_proj"]),
    ):
        with refused("already", model):
            soft.add(model, N)
    soft.add(wrapper.model, N)  # the plain model may have another


def test_the_state_is_refused_where_there_is_none_in_sight(soft):
    other = (prefix if soft is prompt else prompt).add(llama(), N)
    for model, match in (
        (llama(), "carries no pr"),
        (other, "carries no pr"),
        (nn.DataParallel(wrapped(soft)), "the plain model"),
    ):
        with refused(match):
            soft.state_dict(model)
        with refused(match):
            soft.load_state_dict(model, {})
    for model in (nn.DataParallel(llama()), None):
        with refused("must be an nn.Module|the plain model"):
            soft.add(model, N)


def test_a_compiled_model_is_taken_for_the_plain_one(soft):
    plain = llama()
    wrapper = soft.add(torch.compile(plain), N)
    assert wrapper.model is plain
    tensors = soft.state_dict(torch.compile(wrapper))
    soft.load_state_dict(torch.compile(wrapper), tensors)
    assert tensors["prompt_embeddings"].shape == (N, 32)


BAD_NUMBERS = (0, -1, 2.0, True, "4", 10**400)


def add_is_refused(soft, **settings):
    """Bad input: one sentence, and the model as it was."""
    model = llama()
    model.lm_head.requires_grad_(False)
    with refused("", model):
        soft.add(model, **{"n": N, **settings})


@pytest.mark.parametrize("n", [*BAD_NUMBERS, None], ids=lambda n: f"{n!r:.9}")
def test_a_bad_length_gets_one_sentence_and_changes_nothing(soft, n):
    add_is_refused(soft, n=n)
