"""Prompt tuning's laws, and the same numbers as peft: forward, backward, generated.

A law that takes only `prompt`, the module, is run again by tests/test_mutations.py on
broken copies of prompt.py. Messages name the mistake that gives the symptom.
More laws, and the tools of these, are in test_soft_prompts.py.
"""

import contextlib
import copy
import math

import pytest
import test_soft_prompts as soft
import torch
import transformers as tf
from common import (
    BATCH,
    MODELS,
    assert_same,
    bert,
    by_fault,
    gpt2,
    llama,
    t5,
    trainable,
)
from peft import PromptTuningConfig, get_peft_model
from test_soft_prompts import (
    IDS,
    LABELS,
    LEFT,
    MASK,
    TEXTS,
    N,
    add_is_refused,
    bart,
    bart_decoder,
    bloom,
    jamba,
    llama_classifier,
    mamba2,
    mistral,
    refused,
    roberta,
    roberta_decoder,
    says_alone,
    wrapped,
    write,
    writes_greedily,
)
from torch import nn

from peftlab import prompt as reference
from peftlab.kit import measure


@pytest.fixture
def prompt():
    return reference


# A prompt, by hand


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


def test_a_row_padded_on_the_left_says_what_it_says_alone(prompt):
    for model in (llama, gpt2, bloom, mamba2, jamba, mistral, roberta_decoder):
        says_alone(wrapped(prompt, model), model.__name__)


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
        writes_greedily(wrapped(prompt, model))


def test_a_state_space_model_reads_the_prompt_once(prompt):
    wrapper, plain, first = in_front(prompt, mamba2)
    whole = torch.cat([first, IDS], 1)
    torch.testing.assert_close(wrapper(IDS).logits, plain(whole).logits)
    want = write(plain, whole)[:, -6:]
    assert torch.equal(write(wrapper, IDS)[:, -6:], want), "its cache has no length"


# The laws: what trains


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


def test_the_state_dict_goes_round(prompt):
    one, two = wrapped(prompt), prompt.add(llama(), N)
    tensors = {n: t.clone() for n, t in prompt.state_dict(one).items()}
    assert {n: t.shape for n, t in tensors.items()} == {"prompt_embeddings": (N, 32)}
    prompt.load_state_dict(two, tensors)
    assert torch.equal(one(IDS).logits, two(IDS).logits)
    assert trainable(two) == {"prompt_embeddings"}


# Bad input: one sentence each, and the model as it was

BAD = {
    **{f"init={init!r}": dict(init=init) for init in ("text", None, 3, [1, 2])},
    "decoder where there is none": dict(decoder=True),
    "decoder=1": dict(decoder=1),
    "decoder=None": dict(decoder=None),
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

ROWS = "self.prompt_embeddings[: self.n]"
READ = "        if was_read:\n            return inputs"
READER = """reader = copy.copy(model)
    reader.forward = forward
    return reader.generate(*args, **options)"""
HOOK = """hook = lambda _, args, inputs: (args, put_in(**inputs))
    with model.register_forward_pre_hook(hook, with_kwargs=True):
        return model.generate(*args, **options)"""
COUNTED = "if given is not None or not _has_left_pads(mask):"
LOOK_UP = "embedding(ids.to(embedding.weight.device))"
IN_CACHE = "return _is_filled(_cache_in(inputs))"

# {the law that goes red: {what is broken: {text: text in its place}}}
MUTATIONS = by_fault(
    {
        test_the_prompt_stands_before_the_text: {
            "the prompt stands after the text": {
                "cat([first, rest]": "cat([rest, first]"
            },
            "the prompt is dead": {ROWS: f"0 * {ROWS}"},
        },
        soft.test_embeddings_are_taken_in_place_of_ids: {
            "given embeddings are replaced": {
                "        return text\n": "        return text * bool(ids is not None)\n"
            },
        },
        test_a_batch_padded_on_the_right_is_masked_and_counted_as_ever: {
            "the prompt is masked": {"mask.new_ones(": "mask.new_zeros("},
            "the mask does not grow": {"_join(ones, mask, order)": "mask"},
            "pads on the right are not counted": {
                COUNTED: "if given is not None or mask is None:"
            },
        },
        test_a_row_padded_on_the_left_says_what_it_says_alone: {
            "left pads are counted": {COUNTED: "if True:"},
            "RoBERTa is told from 0": {":] + first": ":]"},
        },
        test_pads_that_a_model_would_count_or_pool_are_refused: {
            "BERT takes left pads": {"(_is_causal(model) or ": "(True or "},
            "BART takes left pads": {"hasattr(config, ": "bool("},
            "BART's decoder takes them": {'return family == "bloom"': "return True"},
            "pads take the place of an answer": {"and _pools_last(model)": "and False"},
            "a 4-D mask passes": {"if mask.dim() != 2:": "if False:"},
            "a row of pads passes": {"if not mask.any(1).all():": "if False:"},
        },
        test_an_encoder_without_positions_is_not_moved_by_pads_on_the_left: {
            "T5's prompt is before the pads": {"rank = 2 * (": "rank = 2 + ("},
        },
        test_position_ids_move_with_the_text: {
            "position ids stay": {"positions + self.n": "positions"},
            "RoBERTa's prompt is at its pad": {
                "positions.device) + f": "positions.device) + 0 * f"
            },
        },
        test_there_is_no_loss_on_the_prompt: {
            "the prompt has labels": {"(self.n,), -100)": "(self.n,), 0)"},
        },
        test_token_types_are_zero_over_the_prompt: {
            "token types are one": {"types.new_zeros(": "types.new_ones("},
        },
        test_only_labels_of_single_tokens_grow: {
            "a label a row grows": {"labels.dim() == 2 and ": ""},
            "several classes a row grow": {" and labels.dtype == torch.long": ""},
            "labels do not move": {"_join(no_loss, labels, order)": "labels"},
        },
        test_an_encoder_decoder_has_its_prompt_in_the_encoder: {
            "the labels of T5 grow": {" and not _is_encoder_decoder(self.model):": ":"},
            "T5 reads the idle half": {ROWS: "self.prompt_embeddings[-self.n :]"},
        },
        test_it_writes_the_greedy_choice_of_forward: {
            "it comes at each step": {IN_CACHE: "return False"},
            "the prompt is lost in writing": {
                "forward(**put_in(*args, **inputs))": "forward(*args, **inputs)"
            },
            "later steps do not count": {
                'inputs["position_ids"] = positions + self.n': "pass"
            },
        },
        soft.test_a_text_can_be_read_in_two_parts: {
            "a second part has it too": {IN_CACHE: "return False"},
        },
        test_a_state_space_model_reads_the_prompt_once: {
            "Mamba reads it at each step": {"cache.has_previous_state()": "False"},
        },
        soft.test_rows_padded_on_the_left_write_what_they_write_alone: {
            "later steps do not mask the pads": {
                READ: READ.replace(
                    "return", 'inputs["attention_mask"] = None\n            return'
                )
            },
        },
        soft.test_a_cache_that_is_filled_or_static_is_refused: {
            "a filled cache passes": {
                "if _is_filled(_cache_in(options)):": "if False:"
            },
            "a static cache passes": {'"max_cache_len"': '"no_such_thing"'},
        },
        soft.test_the_model_is_as_it_was_after_writing: {
            "the model's forward is replaced": {"copy.copy(model)": "model"},
            "a hook stays": {READER: HOOK.replace("with model", "if model")},
        },
        soft.test_threads_write_what_one_writes: {
            "threads share a hook": {READER: HOOK}
        },
        soft.test_nothing_else_trains: {
            "the base trains along": {"grad_(False)": "grad_(True)"},
            "the prompt is frozen too": {"_join(prompt,": "_join(prompt.detach(),"},
        },
        soft.test_transformers_trainer_trains_it_and_saves_it: {
            "Trainer drops the token types": {"    @_ModelSignature\n": ""},
            "Trainer finds no labels": {
                " labels=None,": "",
                "if labels is not None": "if False",
            },
            "tied weights share memory": {".clone() if storage in": " if storage in"},
        },
        test_the_prompt_is_float32_over_a_16_bit_base: {
            "the prompt is in 16 bits": {
                "dtype, torch.float32": "dtype, vectors.dtype"
            },
            "the model is drawn into float32": {"first.to(rest).": "first."},
        },
        test_it_starts_at_words_drawn_from_the_whole_vocabulary: {
            "all rows start as one word": {"randint(size, (": "randint(1, ("},
        },
        test_it_starts_at_given_words_repeated_or_cut: {
            "words are spread": {"ids.repeat(": "ids.repeat_interleave("},
        },
        test_random_is_uniform_within_a_half: {
            "random is from 0 to 1": {"rand_like(tokens) - 0.5": "rand_like(tokens)"},
            "random is a normal": {"rand_like(tokens) - 0.5": "randn_like(tokens)"},
        },
        test_it_starts_at_words_as_the_model_scales_them: {
            "the scale is left out": {LOOK_UP: "embedding.weight[ids]"},
        },
        test_it_can_be_counted_without_memory: {
            "it starts on another device": {LOOK_UP: "torch.zeros(len(ids), 32)"},
        },
        soft.test_the_wrapper_answers_for_its_model: {
            "the wrapper forgets the mode": {"= model.training": "= True"},
        },
        test_the_state_dict_goes_round: {
            "the state has another name": {'{"prompt_embeddings":': '{"embedding":'},
            "loading copies nothing": {"t.copy_(tensors": "t.clone().copy_(tensors"},
        },
        soft.test_a_second_method_is_refused: {
            "a prompt goes on a prompt": {'peft_method = "prompt"': "pass"},
            "a prompt goes on a LoRA": {"_refuse_carried(model)\n": "model\n"},
        },
    }
)
