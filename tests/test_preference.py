"""Chapter 21's two sweeps: the samples' mask, and figures that follow from the runs."""

import copy

import pytest
import torch

from experiments.sweeps import preference, reward
from peftlab.kit import base_models, data, results


@pytest.fixture(scope="module")
def tiny():
    return base_models.load("tiny-decoder", device="cpu")


@pytest.mark.parametrize("pad", ["its own", "the end token"])
def test_a_sampled_answer_goes_up_to_its_first_end_token(tiny, pad):
    """Also where the end token pads: masking by token would leave it no gradient."""
    model, tokenizer = map(copy.deepcopy, tiny)
    if pad == "the end token":
        tokenizer.pad_token = tokenizer.eos_token
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    lines = data.records("dates", "en", 6, "test")
    torch.manual_seed(0)
    batch, right = reward.sample(model, tokenizer, lines, 4)
    assert right.shape == (6, 4) and right.mean() > 0.5
    end = tokenizer.eos_token_id
    prompts = tokenizer([r.prompt for r in lines])["input_ids"]
    asked = [prompt for prompt in prompts for _ in range(4)]
    parts = (batch[k] for k in ("input_ids", "labels", "attention_mask"))
    for prompt, tokens, labels, seen in zip(asked, *parts, strict=True):
        answer = tokens[labels != -100].tolist()
        assert answer.count(end) == 1 and answer[-1] == end
        assert tokens[seen == 1].tolist() == prompt + answer


def test_the_reward_s_figures_follow_from_its_runs():
    stored = results.load("reward")
    found = reward.derive(stored["runs"], stored["best"], stored["start"])
    assert found.keys() == stored["figures"].keys()
    for key, figure in stored["figures"].items():
        assert found[key]["value"] == pytest.approx(figure["value"]), key


def test_the_ways_figures_follow_from_their_runs():
    stored = results.load("preference")
    found = preference.derive(stored["runs"], stored["best"])
    assert found.keys() == stored["figures"].keys()
    for key, figure in stored["figures"].items():
        assert found[key]["value"] == pytest.approx(figure["value"]), key


def test_every_way_s_learning_rate_is_inside_what_was_tried():
    stored = results.load("preference")
    for way in preference.WAYS:
        tried = {run["lr"] for run in stored["runs"] if run["method"] == way}
        assert min(tried) < stored["best"][way] < max(tried), way


def test_the_pairs_prefer_refusals_and_dates_alike(tiny):
    pairs = preference.make_pairs(*tiny)
    both = pairs["all"]
    chosen = [c for c, _ in both if c.answer != "?"]
    assert all(r.answer == "?" for c, r in both if c.answer != "?")
    assert {c.language for c in chosen} == {*data.BASE_LANGUAGES, "fi"}
    assert all(c.answer == "?" != r.answer for c, r in pairs["refusals"])
    assert all(c.prompt == r.prompt for c, r in both)


def test_what_the_page_says_of_the_ways_is_so():
    stored = results.load("preference")["figures"]
    found = {key: figure["value"] for key, figure in stored.items()}
    base, start = found["base.valid.base"], found["start.valid.base"]
    assert base - start > 0.5, "the valid dates are forgotten, not the refusals alone"
    assert found["mixed.none.base"] > 0.9 and found["mixed.valid.base"] < start + 0.1
    assert found["mixed.none.fi"] < 0.1
    assert found["DPO.none.base.low"] < 0.8 < found["DPO.none.base"]
    assert found["fast.lost"] >= 3 and found["fast.begun.base"] > 0.9
    assert found["DPO on refusals.over.base"] > 3 * found["DPO.over.base"]
    for way in ("DPO + answers", "answers"):
        assert found[f"{way}.none.base.low"] > 0.95
        assert found[f"{way}.rate"] > 5 * found["DPO.rate"]
        assert found[f"{way}.valid.base"] > start + 0.3
        assert found[f"{way}.valid.fi"] < found["start.valid.fi"] - 0.1
