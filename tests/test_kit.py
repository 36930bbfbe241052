"""The plumbing: training, measuring, loading, storing."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from experiments import common
from experiments.sweeps import finnish as finnish_sweep
from experiments.sweeps import six_languages as six_sweep
from peftlab import lora
from peftlab.kit import base_models, data, measure, plot, pretrain, results, show
from peftlab.kit.extras import needs
from peftlab.kit.train import (
    batches,
    checkpoint_activations,
    collate,
    collate_pairs,
    train,
)


@pytest.fixture(scope="module")
def tiny():
    return base_models.load("tiny-decoder", device="cpu")


@pytest.fixture
def finnish():
    return data.records("dates", "fi", 40)


def test_labels_cover_the_answer_and_its_end_and_nothing_else(tiny, finnish):
    _, tokenizer = tiny
    batch = collate(finnish, tokenizer)
    for ids, labels, record in zip(
        batch["input_ids"], batch["labels"], finnish, strict=True
    ):
        graded = tokenizer.decode(labels[labels != -100])
        assert graded == f" {record.answer}</s>", "the loss is not on the answer alone"
        assert tokenizer.decode(ids).startswith(f"<s>{record.line}</s>")
        assert ((ids != tokenizer.pad_token_id) >= (labels != -100)).all()


def test_a_pair_has_the_prompt_in_the_encoder_and_the_answer_in_the_labels(tiny):
    _, tokenizer = tiny
    pairs = data.records("translate", "fr", 20)
    batch = collate_pairs(pairs, tokenizer)
    rows = zip(batch["input_ids"], batch["labels"], pairs, strict=True)
    for ids, labels, record in rows:
        asked = tokenizer.decode(ids, skip_special_tokens=True)
        assert asked == record.prompt
        assert tokenizer.decode(labels[labels != -100]) == f"{record.answer}</s>"


def test_an_encoder_decoder_model_is_trained_on_pairs():
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    torch.manual_seed(0)
    model = pretrain.new_seq2seq(len(tokenizer))
    same = copy.deepcopy(model)
    pairs = data.records("translate", "fr", 8)
    (loss,) = train(model, tokenizer, pairs, 1, 1e-3, 8, progress=False)
    shuffled = next(batches(pairs, 8))
    assert loss == same(**collate_pairs(shuffled, tokenizer)).loss.item()


def test_what_is_missing_is_said_with_its_cure():
    needs("torch", "peft")
    with pytest.raises(ImportError, match=r"no_such is not.*'peftlab\[practice\]'"):
        needs("torch", "no_such")


def test_loss_on_the_line_grades_the_prompt_too(tiny, finnish):
    batch = collate(finnish, tiny[1], loss_on="line")
    graded = (batch["labels"] != -100).sum()
    assert graded == batch["attention_mask"].sum(), "every real token has a label"


def test_batches_see_every_record_once_before_any_twice(finnish):
    source = batches(finnish, 8, seed=1)
    first = [r for _ in range(5) for r in next(source)]
    assert sorted(r.line for r in first) == sorted(r.line for r in finnish)
    assert len(next(batches(finnish[:3], 8))) == 8, "a small set repeats"


def test_the_same_seed_trains_the_same_weights(finnish):
    def run(seed):
        model, tokenizer = base_models.load("tiny-decoder", device="cpu")
        torch.manual_seed(0)
        lora.add(model, ["q_proj"], r=2, alpha=4)
        losses = train(model, tokenizer, finnish, 3, 1e-2, 8, seed, progress=False)
        return losses, lora.state_dict(model)

    (losses, a), (again, b), (other, _) = run(0), run(0), run(1)
    assert losses == again and all(torch.equal(a[k], b[k]) for k in a)
    assert losses != other


def test_training_is_the_loop_that_the_chapters_show(finnish):
    """AdamW, gradients clipped at a norm of 1, a linear rise and fall."""
    ours, tokenizer = base_models.load("tiny-decoder", device="cpu")
    shown = copy.deepcopy(ours).train()
    plain = copy.deepcopy(ours)
    how = dict(steps=10, lr=1e-3, batch_size=8, progress=False)
    train(ours, tokenizer, finnish, **how)
    train(plain, tokenizer, finnish, **how, max_grad_norm=None)

    weights, norms = list(shown.parameters()), []
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 10)
    for _, records in zip(range(10), batches(finnish, 8), strict=False):
        shown(**collate(records, tokenizer)).loss.backward()
        norms.append(nn.utils.clip_grad_norm_(weights, 1.0))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert max(norms) > 1, "nothing was clipped: this shows nothing"
    same = zip(ours.parameters(), weights, strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    same = zip(ours.parameters(), plain.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in same), "clipping has no effect"


def test_train_refuses_a_frozen_model_and_an_empty_set(tiny, finnish):
    model, tokenizer = tiny
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(frozen, tokenizer, finnish, 1, 1e-3)
    for records, steps in (([], 1), (finnish, 0)):
        with pytest.raises(ValueError, match="at least one"):
            train(model, tokenizer, records, steps, 1e-3)


def test_train_shows_no_bar_where_outputs_are_stored(tiny, finnish, capfd):
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    train(model, tokenizer, finnish, 1, 1e-4)
    assert capfd.readouterr() == ("", ""), "a bar would be stored in the notebook"


def test_exact_match_is_to_the_letter(tiny):
    model, tokenizer = tiny
    known = data.records("dates", "en", 30, "test")
    assert measure.exact_match(model, tokenizer, known) == 1.0
    spoilt = [data.Record(r.kind, r.language, r.text, r.answer[:-1]) for r in known]
    assert measure.exact_match(model, tokenizer, spoilt) == 0.0
    mixed = known[:10] + spoilt[10:]
    assert measure.answered(model, tokenizer, mixed) == [True] * 10 + [False] * 20


def test_answers_come_in_the_order_of_the_prompts_and_keep_the_mode(tiny):
    model, tokenizer = tiny
    known = data.records("dates", "en", 12, "test")
    model.train()
    given = measure.answers(model, tokenizer, [r.prompt for r in known], batch_size=5)
    assert given == [r.answer for r in known] and model.training
    model.eval()
    with pytest.raises(ValueError, match="no prompts"):
        measure.answers(model, tokenizer, [])


def test_parameters_and_bytes_count_a_tied_weight_once(tiny):
    model, _ = tiny
    trainable, total = measure.parameters(model)
    assert trainable == total == 918_656
    floats = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert measure.nbytes(model) == 4 * floats + buffers
    with torch.device("meta"):
        on_meta = type(model)(model.config)
    assert measure.parameters(on_meta) == (total, total)


def test_peak_memory_sees_what_was_released():
    def work():
        big = torch.zeros(1_000_000)  # 4 MB
        del big
        return torch.zeros(10)

    peak = measure.peak_memory(work)
    assert 4_000_000 <= peak < 4_100_000


def test_held_memory_sees_what_is_still_there_and_where_it_hides():
    class Hides(torch.autograd.Function):  # not in autograd's hands
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = torch.zeros(1_000_000)  # 4 MB
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad

    x, alive = torch.zeros(10, requires_grad=True), []

    def work():
        torch.zeros(2_000_000)  # gone at once
        alive.append(Hides.apply(x))

    assert 4_000_000 <= measure.held_memory(work) < 4_100_000
    alive.clear()
    assert measure.held_memory(lambda: x + 1) < 1_000


def test_step_times_takes_turns():
    order = []
    times = measure.step_times(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, 1
    )
    assert order == ["a", "b"] * 4 and set(times) == {"a", "b"}


def test_the_interval_holds_zero_for_equals_and_not_for_the_better():
    dice = torch.Generator().manual_seed(0)
    a = torch.rand(5, 200, generator=dice) < 0.8
    b = torch.rand(5, 200, generator=dice) < 0.8
    worse = torch.rand(5, 200, generator=dice) < 0.5
    gap, low, high = measure.interval(a, b)
    assert low < 0 < high and low < gap < high
    assert measure.interval(a, worse)[1] > 0.2
    with pytest.raises(ValueError, match="seeds, records"):
        measure.interval([1, 0], [1, 0])


def test_an_unknown_base_model_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="shipped are tiny-decoder") as error:
        base_models.load("no-such-model")
    assert "\n" not in str(error.value)


def test_any_hugging_face_folder_is_a_base_model(tmp_path, tiny):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = base_models.load(str(tmp_path), device="cpu")
    assert again.config._name_or_path == str(tmp_path) and not again.training
    ids = words("12 mars 2026 =", return_tensors="pt")
    assert torch.equal(again(**ids).logits, model(**ids).logits)


def test_figures_are_written_only_where_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFTLAB_RESULTS", raising=False)
    assert results.Figures("x").keep("a", 0.5, 0.1) == 0.5
    monkeypatch.setenv("PEFTLAB_RESULTS", str(tmp_path))
    results.Figures("x").keep("a", 0.5, 0.1)
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored["figures"] == {"a": {"value": 0.5, "tolerance": 0.1}}
    assert results.load("x", tmp_path) == stored
    with pytest.raises(ValueError, match="tolerance"):
        results.Figures("x").keep("a", 0.5, -1)
    with pytest.raises(ValueError, match="there are: x"):
        results.load("y", tmp_path)


def test_figures_have_one_style():
    ax = plot.axes("steps", "loss (nats)")
    plot.band(ax, [1, 2], [[1.0, 3.0], [2.0, 4.0]], "full")
    assert ax.get_xlabel() == "steps"
    assert list(ax.lines[0].get_ydata()) == [2.0, 3.0]
    plot.plt.close("all")


def test_checkpoints_change_no_gradient_and_store_less(finnish):
    gradients, sizes = [], []
    for checkpoints in (False, True):
        model, tokenizer = base_models.load("tiny-decoder", device="cpu")
        if checkpoints:
            assert checkpoint_activations(model, use_reentrant=False) is model
        stored = []

        def note(tensor, stored=stored):
            stored.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.train()(**collate(finnish, tokenizer)).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        sizes.append(sum(stored))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sizes[1] < sizes[0] / 2, "what is computed again is stored too"


@pytest.mark.parametrize("prefix", ["activation", "gradient"])
def test_checkpoints_are_turned_on_by_either_name(prefix):
    """transformers before 5.23 has the old name alone."""

    class Model:
        pass

    model, heard = Model(), []
    setattr(model, f"{prefix}_checkpointing_enable", heard.append)
    checkpoint_activations(model)
    checkpoint_activations(model, use_reentrant=True)
    assert heard == [None, {"use_reentrant": True}]


def fresh(script):
    """Run a script in a new interpreter; it must print nothing."""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("", ""), "a notebook would store this"


def test_importing_peft_after_the_kit_prints_nothing():
    fresh("from peftlab.kit import base_models; import peft, bitsandbytes")


def test_all_imports_and_works_without_bitsandbytes():
    fresh("""
import importlib, importlib.metadata as metadata, pkgutil, sys
sys.modules["bitsandbytes"] = None  # an import raises
find = metadata.Distribution.from_name
def hidden(name):
    if name == "bitsandbytes":
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.Distribution.from_name = hidden
import peftlab
for module in pkgutil.walk_packages(peftlab.__path__, "peftlab."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import peft
from peftlab.kit import base_models, data, measure, train
versions = measure.machine()
assert "torch" in versions and "bitsandbytes" not in versions
model, tokenizer = base_models.load("tiny-decoder", device="cpu")
records = data.records("dates", "fi", 4)
train.train(model, tokenizer, records, 1, 1e-4)
assert len(measure.answered(model, tokenizer, records)) == 4
""")


def test_a_paired_interval_is_students():
    mean, low, high = measure.paired_interval([3, 4, 6, 7, 5], [2, 2, 3, 3, 0])
    assert mean == 3 and high - mean == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
    assert mean - low == pytest.approx(high - mean)
    with pytest.raises(ValueError, match="2 to 8 pairs, not 1"):
        measure.paired_interval([1], [2])
    with pytest.raises(ValueError):
        measure.paired_interval([1, 2], [2])


def test_a_table_shows_every_cell_and_refuses_a_row_that_is_too_short(capsys):
    show.compare("date", ["<a>", "b"], ["1", "2"], before=["", "2"], after=["1", "3"])
    text = capsys.readouterr().out
    assert "&lt;a&gt;" in text and "(nothing) ✗" in text and "2 ✓" in text
    with pytest.raises(ValueError, match="2 columns, a row 1"):
        show.table("a | b", [("x",)])


def test_a_sweep_that_was_killed_goes_on_from_its_last_whole_row(tmp_path):
    path = tmp_path / "some.jsonl"
    assert common.finished(path) == {}
    path.write_text('[["LoRA", 0.01], {"dev": "01"}]\n[["LoRA", 0.03], {"de')
    assert common.finished(path) == {'["LoRA", 0.01]': {"dev": "01"}}
    assert path.read_text().endswith("}]\n"), "the torn row is gone"
    assert common.digest(finnish_sweep.one_rate) != common.digest(six_sweep.one_rate)
