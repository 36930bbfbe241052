"""Prompt tuning's laws, and the same numbers as peft: forward, backward, generated.

A law that takes only `prompt`, the module, is run again by tests/test_mutations.py on
broken copies of prompt.py. Messages name the mistake that gives the symptom.
"""

import contextlib
import copy
import math

import pytest
import torch
from common import (
    BATCH,
    MODELS,
    assert_one_sentence,
    assert_same,
    assert_unchanged,
    bert,
    gpt2,
    llama,
    snapshot,
    t5,
    trainable,
)
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertForTokenClassification, BertModel, ViTConfig, ViTModel

from peftlab import prompt as reference
from peftlab.kit import data, measure, base_models
from peftlab.kit.train import train

N = 4
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]  # the last row is padded
LABELS = IDS.masked_fill(MASK == 0, -100)


@pytest.fixture
def prompt():
    return reference


def wrapped(prompt, model=llama, **settings):
    """A model whose prompt is as long as its other embeddings, and none of them."""
    torch.manual_seed(1)
    wrapper = prompt.add(model(), N, **settings)
    for t in prompt.state_dict(wrapper).values():
        t += torch.randn(t.shape) / 5
    return wrapper


def by_hand(wrapper, ids, mask=None, **inputs):
    """What the plain model says of [P; E(ids)], a mask longer by ones given with it."""
    rows = prompt_of(wrapper).expand(len(ids), -1, -1)
    x = torch.cat([rows, wrapper.model.get_input_embeddings()(ids)], 1)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([torch.ones(len(ids), N).long(), mask], 1)
    return wrapper.model(inputs_embeds=x, **inputs)


def prompt_of(wrapper):
    return wrapper.prompt_embeddings[:N]


def given(wrapper, **inputs):
    """What the model inside is called with."""
    seen = {}
    with wrapper.model.register_forward_pre_hook(
        lambda _, args, named: seen.update(named), with_kwargs=True
    ):
        with contextlib.suppress(ValueError, RuntimeError, IndexError):
            wrapper(**inputs)
    return seen


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


# The laws: what the model reads


def test_the_prompt_stands_before_the_text(prompt):
    wrapper = wrapped(prompt)
    got, want = wrapper(IDS).logits, by_hand(wrapper, IDS).logits
    assert got.shape[1] == N + IDS.shape[1], "logits cover the prompt and the text"
    plain = wrapper.model(IDS).logits
    assert not torch.allclose(got[:, N:], plain, atol=1e-3), "the prompt is dead"
    torch.testing.assert_close(
        got, want, msg="the model reads [P; E(x)], in this order"
    )


def test_embeddings_are_taken_in_place_of_ids(prompt):
    wrapper = wrapped(prompt)
    x = wrapper.model.get_input_embeddings()(IDS)
    torch.testing.assert_close(wrapper(inputs_embeds=x).logits, wrapper(IDS).logits)


@torch.no_grad()
def test_a_batch_padded_on_the_right_is_masked_and_counted_as_ever(prompt):
    for model in (llama, gpt2, bert):
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
    ids, mask = padded_left(IDS, MASK)
    for model in (llama, gpt2):
        wrapper = wrapped(prompt, model)
        together = wrapper(ids, mask).logits
        for row, text in enumerate([IDS[0], IDS[1], IDS[2, :5]]):
            alone = wrapper(text[None]).logits[0, N:]
            gap = (together[row, -len(text) :] - alone).abs().max()
            assert gap < 1e-4, (
                f"row {row} moved by {gap:.1e}: pads on the left must stand before the"
                " prompt and must not be counted as positions"
            )


@torch.no_grad()
def test_an_encoder_without_positions_is_not_moved_by_pads_on_the_left(prompt):
    wrapper = wrapped(prompt, t5)
    right = wrapper(IDS, MASK, labels=IDS).logits
    left = wrapper(*padded_left(IDS, MASK), labels=IDS).logits
    gap = (left - right).abs().max()
    assert gap < 1e-4, f"{gap:.1e}: T5 measures distances, pads may not lie in between"


def test_position_ids_move_with_the_text(prompt):
    wrapper = wrapped(prompt, gpt2)
    at = torch.arange(8).expand(3, -1) + torch.tensor([[0], [3], [9]])
    want = torch.cat([torch.arange(N).expand(3, -1), at + N], 1)
    got = wrapper(IDS, position_ids=at).logits
    torch.testing.assert_close(got, by_hand(wrapper, IDS, position_ids=want).logits)


def test_there_is_no_loss_on_the_prompt(prompt):
    wrapper = wrapped(prompt)
    logits = by_hand(wrapper, IDS, MASK).logits
    want = nn.functional.cross_entropy(
        logits[:, N:-1].flatten(0, 1), LABELS[:, 1:].flatten()
    )
    got = wrapper(**BATCH, labels=LABELS).loss
    # the text's first token is foretold by the prompt's last slot
    first = nn.functional.cross_entropy(logits[:, N - 1], LABELS[:, 0])
    count = (LABELS[:, 1:] != -100).sum()
    want = (want * count + first * len(IDS)) / (count + len(IDS))
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
    wrapper, labels = wrapped(prompt, lambda: bert(BertForTokenClassification)), IDS % 3
    seen = given(wrapper, input_ids=IDS, labels=labels).get("labels")
    want = torch.cat([torch.full((3, N), -100), labels], 1)
    assert torch.equal(seen, want), "a label a token moves with the text"
    wrapper(input_ids=IDS, labels=labels).loss.backward()


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
    for model in (llama, gpt2):
        wrapper = wrapped(prompt, model)
        want = greedy(wrapper, IDS, 6)
        for cached in (True, False):
            got = write(wrapper, IDS, use_cache=cached)
            assert torch.equal(got[:, :8], IDS), "the result starts with input_ids"
            assert torch.equal(got, want), (
                f"use_cache={cached}: is the prompt put in at each step, or lost?"
            )


def test_rows_padded_on_the_left_write_what_they_write_alone(prompt):
    ids, mask = padded_left(IDS, MASK)
    for model in (llama, gpt2):
        wrapper = wrapped(prompt, model)
        got = write(wrapper, ids, mask)[:, 8:]
        texts = [IDS[:1], IDS[1:2], IDS[2:, :5]]
        alone = [write(wrapper, text)[0, -6:] for text in texts]
        assert torch.equal(got, torch.stack(alone)), (
            "later steps must count and mask as the first one did"
        )


def test_the_model_is_as_it_was_after_writing(prompt):
    wrapper = wrapped(prompt)
    want = wrapper.model(input_ids=IDS).logits
    write(wrapper, IDS)
    with pytest.raises((TypeError, ValueError)):
        wrapper.generate(IDS, no_such_option=1)
    assert torch.equal(wrapper.model(input_ids=IDS).logits, want), (
        "a hook was left on the model"
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
    rows, before = good["prompt_embeddings"], snapshot(wrapper)
    for tensors in (
        {},
        {"prompt": rows},
        {**good, "lora_A": torch.zeros(2)},
        {"prompt_embeddings": rows[:3]},
        {"prompt_embeddings": rows[:1]},  # would be repeated
        {"prompt_embeddings": rows.T},
        {"prompt_embeddings": None},
    ):
        with pytest.raises(ValueError) as error:
            prompt.load_state_dict(wrapper, tensors)
        assert_one_sentence(error)
        assert_unchanged(wrapper, before)
    prompt.load_state_dict(wrapper, good)


def test_a_second_soft_prompt_is_refused(prompt):
    wrapper = wrapped(prompt)
    before = snapshot(wrapper)
    for model in (wrapper, nn.Sequential(wrapper)):
        with pytest.raises(ValueError, match="already") as error:
            prompt.add(model, N)
        assert_one_sentence(error)
        assert_unchanged(wrapper, before)
    prompt.add(wrapper.model, N)  # the plain model may have another


# Bad input: one sentence each, and the model as it was

IDS_FROM_40 = {
    "a token id that is too large": torch.tensor([3, 40]),
    "a negative token id": torch.tensor([-1]),
    "no token id": torch.tensor([], dtype=torch.long),
    "token ids as floats": torch.tensor([1.0, 2.0]),
    "token ids as truth values": torch.tensor([True, False]),
    "token ids in two dimensions": torch.tensor([[1, 2]]),
    "token ids in none": torch.tensor(3),
}
BAD = {
    "n=0": dict(n=0),
    "n=-1": dict(n=-1),
    "n=2.0": dict(n=2.0),
    "n=True": dict(n=True),
    "n='4'": dict(n="4"),
    "n=None": dict(n=None),
    "init='text'": dict(init="text"),
    "init=None": dict(init=None),
    "init=3": dict(init=3),
    "init a list": dict(init=[1, 2]),
    "decoder where there is none": dict(decoder=True),
    **{what: dict(init=ids) for what, ids in IDS_FROM_40.items()},
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


def test_a_model_without_token_embeddings_is_refused():
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    pictures = ViTModel(ViTConfig(**tiny, num_attention_heads=2, image_size=32))
    for model in (nn.Sequential(nn.Linear(3, 3)), pictures):
        before = snapshot(model)
        with pytest.raises(ValueError, match="no token embeddings") as error:
            reference.add(model, N)
        assert_one_sentence(error)
        assert_unchanged(model, before)


@pytest.mark.parametrize("verb", ["state_dict", "load_state_dict"])
def test_the_verbs_say_so_where_there_is_no_prompt(verb):
    with pytest.raises(ValueError, match="no prompt") as error:
        getattr(reference, verb)(llama(), *[{}] * (verb == "load_state_dict"))
    assert_one_sentence(error)


def test_no_input_and_two_inputs_are_refused():
    wrapper = wrapped(reference)
    x = wrapper.model.get_input_embeddings()(IDS)
    for inputs in ({}, dict(attention_mask=MASK), dict(input_ids=IDS, inputs_embeds=x)):
        with pytest.raises(ValueError, match="one of the two") as error:
            wrapper(**inputs)
        assert_one_sentence(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
def test_a_mask_of_any_type_says_the_same(dtype):
    wrapper = wrapped(reference)
    for mask in (MASK, MASK.flip(1)):
        with torch.no_grad():
            got = wrapper(IDS, mask.to(dtype)).logits
            assert torch.equal(got, wrapper(IDS, mask).logits)


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
    "bert-model": (lambda: bert(BertModel), "FEATURE_EXTRACTION", {}, {}),
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

ORDER = "torch.cat([first.to(rest).expand(len(rest), *first.shape), rest], 1)"
STANDS = test_the_prompt_stands_before_the_text
LEFT = test_a_row_padded_on_the_left_says_what_it_says_alone
RIGHT = test_a_batch_padded_on_the_right_is_masked_and_counted_as_ever
TRAINS = test_only_the_prompt_trains
WRITES = test_it_writes_the_greedy_choice_of_forward
PADDED = test_rows_padded_on_the_left_write_what_they_write_alone
T5S = test_an_encoder_decoder_has_its_prompt_in_the_encoder
LABEL = test_only_labels_of_single_tokens_grow
STRICT = test_loading_is_strict
PROMPT_END = "self.prompt_embeddings[-n:]"
BEGINS = 'begins := not (read or inputs.get("encoder_outputs"))'

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "the prompt stands after the text": (
        STANDS,
        {ORDER: "torch.cat([rest, first.to(rest).expand(len(rest), *first.shape)], 1)"},
    ),
    "the prompt is dead": (
        STANDS,
        {"self.prompt_embeddings[:n], x": "0 * self.prompt_embeddings[:n], x"},
    ),
    "given embeddings are replaced": (
        test_embeddings_are_taken_in_place_of_ids,
        {"(ids) if x is None else x": "(ids) if x is None else 0 * x"},
    ),
    "the prompt is masked": (RIGHT, {'{"attention_mask": 1}': '{"attention_mask": 0}'}),
    "pads on the right are not counted": (
        RIGHT,
        {"elif order is not None": "elif attention_mask is not None"},
    ),
    "the mask does not grow": (
        RIGHT,
        {'{"attention_mask": 1}': "{}"},
    ),
    "pads on the left are counted": (LEFT, {"and self._told": "and False"}),
    "the prompt stands before pads on the left in T5": (
        test_an_encoder_without_positions_is_not_moved_by_pads_on_the_left,
        {"rank = 2 * (mask": "rank = 2 + (mask"},
    ),
    "position ids stay where they were": (
        test_position_ids_move_with_the_text,
        {"at, first = at + n,": "at, first = at,"},
    ),
    "the prompt has labels": (
        test_there_is_no_loss_on_the_prompt,
        {'{"labels": -100}': '{"labels": 0}'},
    ),
    "token types over the prompt are one": (
        test_token_types_are_zero_over_the_prompt,
        {'{"token_type_ids": 0}': '{"token_type_ids": 1}'},
    ),
    "a label a row grows": (LABEL, {"t.dim() == 2 and ": ""}),
    "several classes a row grow": (
        LABEL,
        {" and (value > -1 or t.dtype == torch.long)": ""},
    ),
    "labels do not move": (LABEL, {'{"labels": -100}': "{}"}),
    "the labels of T5 grow": (T5S, {"{} if self._encodes else ": ""}),
    "T5 reads the idle half": (T5S, {"self.prompt_embeddings[:n]": PROMPT_END}),
    "the prompt is put in at each step": (WRITES, {BEGINS: "begins := True"}),
    "the prompt is lost in writing": (
        WRITES,
        {"(args, self._put_in(**inputs))": "(args, inputs)"},
    ),
    "later steps do not count the prompt": (
        WRITES,
        {"if begins else at\n": "if begins else at - n\n"},
    ),
    "later steps do not mask the pads": (
        PADDED,
        {
            "        for name, value in fill.items():": "        if not begins:\n"
            '            inputs["attention_mask"] = None\n'
            "        for name, value in fill.items():"
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
    "the prompt is frozen too": (TRAINS, {"[:n], x, order": "[:n].detach(), x, order"}),
    "the prompt is in the base's 16 bits": (
        test_the_prompt_is_float32_over_a_16_bit_base,
        {"start.to(torch.promote_types(start.dtype, torch.float32))": "start"},
    ),
    "the model is drawn into float32": (
        test_the_prompt_is_float32_over_a_16_bit_base,
        {ORDER: "torch.cat([first.expand(len(rest), *first.shape), rest], 1)"},
    ),
    "all rows start as one word": (
        test_it_starts_at_words_drawn_from_the_whole_vocabulary,
        {"torch.randint(size, (rows,)": "torch.randint(1, (rows,)"},
    ),
    "words are spread and not repeated": (
        test_it_starts_at_given_words_repeated_or_cut,
        {"init.repeat(": "init.repeat_interleave("},
    ),
    "random is from 0 to 1": (
        test_random_is_uniform_within_a_half,
        {"torch.rand_like(start) - 0.5": "torch.rand_like(start)"},
    ),
    "random is a normal": (
        test_random_is_uniform_within_a_half,
        {"torch.rand_like(start) - 0.5": "torch.randn_like(start)"},
    ),
    "the embedding's own scale is left out": (
        test_it_starts_at_words_as_the_model_scales_them,
        {"embedding(ids).detach()": "embedding.weight[ids].detach()"},
    ),
    "token ids are left on their device": (
        test_it_can_be_counted_without_memory,
        {
            "embedding(ids).detach()": "embedding(ids).detach().new_zeros(rows, 32)"
            '.to("cpu", copy=True).fill_(0)'
        },
    ),
    "the wrapper forgets the mode": (
        test_the_wrapper_answers_for_its_model,
        {"nn.Parameter(rows), model.training": "nn.Parameter(rows), True"},
    ),
    "the state dict has another name": (
        test_the_state_dict_goes_round,
        {'return {"prompt_embeddings"': 'return {"embedding"'},
    ),
    "loading copies nothing": (
        test_the_state_dict_goes_round,
        {'own["prompt_embeddings"].copy_(': 'own["prompt_embeddings"].clone().copy_('},
    ),
    "loading is not strict": (
        STRICT,
        {"if got != want or name not in own:": "if name not in tensors:"},
    ),
    "loading lets the unexpected pass": (
        STRICT,
        {"own.keys() | tensors.keys()": "own.keys()"},
    ),
    "a prompt goes on a prompt": (
        test_a_second_soft_prompt_is_refused,
        {'in ("PromptModel", "PrefixModel")': "in ()"},
    ),
}
