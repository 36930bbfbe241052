"""Outliers inserted on purpose: the function is the same, or the norm is refused; and
what the page says of the models that were measured with them."""

import importlib.util
import math

import bitsandbytes as bnb
import pytest
import torch
from common import (
    BATCH,
    IDS,
    SMALL,
    Net,
    assert_unchanged,
    bert,
    by_fault,
    gpt2,
    llama,
    net,
    refused,
    seeded,
    snapshot,
    t5,
)
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from experiments.sweeps import outliers as sweep
from peftlab import lora
from peftlab.int8 import Int8Linear
from peftlab.kit import base_models, outliers, results
from peftlab.nf4 import NF4Linear

MAKERS = {"llama": llama, "gpt2": gpt2, "t5": t5, "net": net}
CHANNELS = [1, 5]


@pytest.fixture
def reference():
    return outliers


def inputs(model):
    return IDS if isinstance(model, Net) else {**model.dummy_inputs}


@torch.no_grad()
def answer(model):
    """What the model makes of its sample input, one tensor."""
    if isinstance(model, Net):
        return model(IDS)
    return model(**model.dummy_inputs).logits


def norm_outputs(model):
    """{norm: its output (..., width)} of one pass."""
    found, handles = {}, []
    for path in outliers.readers(model, inputs(model)):
        keep = lambda m, a, y, path=path: found.update({path: y})  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(keep))
    answer(model)
    for handle in handles:
        handle.remove()
    return found


# Laws: functions of the module alone


def test_the_function_is_the_same_and_by_powers_of_two_to_the_bit(reference):
    for name, make in MAKERS.items():
        for s, dtype, bound in (
            *((200, torch.float64, 1e-10), (1 / 60, torch.float64, 1e-10)),
            *((256, torch.float32, 0), (1 / 64, torch.float32, 0)),
        ):
            model = make().to(dtype)
            before = answer(model)
            reference.scale_channels(model, s, CHANNELS, inputs=inputs(model))
            off = (answer(model) - before).abs().max() / before.abs().max()
            assert off <= bound, f"{name}, s={s:.3g}: the answer moved by {off:.1e}"


def test_every_norm_grows_at_the_channels_alone(reference):
    for name, make in MAKERS.items():
        model = make().double()
        before = norm_outputs(model)
        assert len(before) == dict(llama=4, gpt2=4, t5=10, net=1)[name]
        reference.scale_channels(model, 200, CHANNELS, inputs=inputs(model))
        after = norm_outputs(model)
        scale = torch.ones(next(iter(before.values())).shape[-1], dtype=torch.float64)
        scale[CHANNELS] = 200
        for norm, y in before.items():
            assert torch.allclose(after[norm], y * scale), f"{name}: {norm}"


def test_nothing_else_is_touched(reference):
    model = llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    reference.scale_channels(model, 200, CHANNELS, ["input_layernorm"])
    kinds = "input_layernorm.weight q_proj.weight k_proj.weight v_proj.weight".split()
    for name, t in model.state_dict().items():
        moved = {int(i) for i in (t != before[name]).nonzero()[:, -1]}
        scaled = any(name.endswith(kind) for kind in kinds)
        assert moved == (set(CHANNELS) if scaled else set()), f"{name}: {moved}"


def test_the_inverse_takes_it_out(reference):
    model = gpt2()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    reference.scale_channels(model, 200, range(0, 32, 2))
    reference.scale_channels(model, 1 / 200, range(0, 32, 2))
    for name, t in model.state_dict().items():
        assert torch.allclose(t, before[name], rtol=1e-6), name


def test_the_readers_are_those_of_the_architecture(reference):
    found, first = reference.readers(llama()), "model.layers.0."
    attention = [f"{first}self_attn.{n}_proj" for n in "qkv"]
    assert found[f"{first}input_layernorm"] == attention
    forward = [f"{first}mlp.{n}_proj" for n in ("gate", "up")]
    assert found[f"{first}post_attention_layernorm"] == forward
    assert "model.norm" not in found, "the head is sliced off before it reads"


def test_looking_leaves_no_trace(reference):
    model = llama().train()
    model.model.layers[0].eval()
    before = snapshot(model)
    reference.readers(model)
    assert_unchanged(model, before)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, "the hooks of the watch were left on the model"


class Small(nn.Module):
    """A norm, a linear after it, and one more reader that breaks the rule."""

    def __init__(self, wrong=None, n=8):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, n), nn.LayerNorm(n)
        self.fc, self.out, self.wrong = nn.Linear(n, n), nn.Linear(n, n), wrong
        if wrong == "tied":
            self.out.weight = self.fc.weight
        if wrong == "attention":
            self.mha = nn.MultiheadAttention(n, 2)
        self.unused = nn.LayerNorm(n)

    def forward(self, ids):
        y = self.norm(self.embed(ids))
        z = torch.tanh(self.fc(y))
        if self.wrong in READS:
            z = READS[self.wrong](self, y, z)
        z = self.out(z)
        return (z, [y]) if self.wrong == "returned" else z


READS = {  # what else a model does with the norm's output, y
    "residual": lambda m, y, z: z + y,
    "attention": lambda m, y, z: z + m.mha(y, y, y)[0],
    "view": lambda m, y, z: z + m.out(y[:, 1:]).sum(),
    "attribute": lambda m, y, z: z + m.out(y.mT.mT),
    "fed twice": lambda m, y, z: m.fc(z),
    "linear": lambda m, y, z: nn.functional.linear(z, m.fc.weight.T),
    "norm": lambda m, y, z: z * m.norm.weight,
}
WRONG = {
    "residual": "read by `add`",
    "returned": "read by the caller",
    "attention": "read by `multi_head_attention_forward`",
    "view": "read by `__getitem__`",
    "attribute": "read by `mT`",
    "fed twice": "fc reads something else too",
    "tied": "fc and out share one weight",
    "linear": "the weight of fc is also read by",
    "norm": "the weight of norm is also read by",
}


def refuses(reference, model, sample, words, norms=None):
    refused(model, words, reference.scale_channels, 200, [1], norms, sample)


def test_a_norm_that_anything_else_reads_is_refused(reference):
    assert reference.readers(seeded(Small()), IDS) == {"norm": ["fc"]}
    for wrong, match in WRONG.items():
        refuses(reference, seeded(Small(wrong)), IDS, match, ["norm"])
        refuses(reference, seeded(Small(wrong)), IDS, "no norm here is read by linears")
    refuses(reference, seeded(Small()), IDS, "did not run it", ["unused"])


def test_berts_norms_are_refused_as_the_residual_reads_them(reference):
    refuses(reference, bert(), None, "no norm here is read by linears alone")
    name = "bert.encoder.layer.0.output.LayerNorm"
    refuses(reference, bert(), None, f"{name} cannot be scaled: .*`add`", [name])


def test_a_norm_whose_weight_is_no_factor_is_refused(reference):
    heads = dict(head_dim=8, num_attention_heads=4, num_key_value_heads=1)
    gemma = seeded(GemmaForCausalLM(GemmaConfig(**SMALL, **heads)))
    refuses(reference, gemma, None, "1 \\+ weight", ["input_layernorm"])


def test_packed_and_wrapped_readers_are_refused_by_their_kind(reference):
    for kind, pack in {"NF4Linear": NF4Linear, "Int8Linear": Int8Linear}.items():
        model = seeded(Small(n=64))
        model.fc = pack(model.fc)
        refuses(reference, model, IDS, f"by fc, which is a {kind}", ["norm"])
    model = seeded(Small(n=64))
    model.fc = bnb.nn.Linear4bit(64, 64).to("cpu")  # it packs anew whenever it is run
    with pytest.raises(ValueError, match="by fc, which is a Linear4bit"):
        reference.scale_channels(model, 200, [1], ["norm"], IDS)
    tuned = lora.add(llama(), ["q_proj"], r=2)
    refuses(reference, tuned, None, "outside a linear", ["input_layernorm"])


def test_what_the_dtype_cannot_hold_is_refused(reference):
    for s, dtype in (
        *((1e40, torch.float32), (1e-40, torch.float32)),
        *((2e4, torch.float16), (1e-6, torch.float16)),  # columns are zero or infinite
    ):
        words = f"out of what {dtype} can hold"
        refused(llama().to(dtype), words, reference.scale_channels, s, range(32))


EVERY = "for reader in found[norm]"
BROKEN = {
    test_the_function_is_the_same_and_by_powers_of_two_to_the_bit: {
        "the columns are multiplied": {"m.weight / fits": "m.weight * fits"},
        "the columns stay as they are": {"m.weight / fits": "m.weight"},
        "one reader is forgotten": {EVERY: f"{EVERY}[1:] or found[norm]"},
        "LayerNorm's bias is left out": {"p, p * s": "p, p if 'b' in name else p * s"},
        "a Conv1D is divided along its outputs": {"scale[:, None] if": "scale if"},
    },
    test_every_norm_grows_at_the_channels_alone: {
        "only the first norm is scaled": {"return list(found)": "return [*found][:1]"},
    },
    test_nothing_else_is_touched: {
        "every channel is scaled": {"scale[channels] = s": "scale[:] = s"},
    },
    test_the_inverse_takes_it_out: {
        "a second call starts from the first one's scale": {
            "] = s\n": "] = max(s, 1)\n"
        },
    },
    test_the_readers_are_those_of_the_architecture: {
        "the last reader is not seen": {"if norm in norms]": "if norm in norms][:2]"},
    },
    test_looking_leaves_no_trace: {
        "the hooks stay": {"handle.remove()": "pass"},
        "the model stays in eval mode": {"m.training = True": "pass"},
    },
    test_berts_norms_are_refused_as_the_residual_reads_them: {
        "functions are not watched": {
            "if self.inside not in self.lin": "if () and self.lin"
        },
    },
    test_a_norm_that_anything_else_reads_is_refused: {
        "the caller is not watched": {'watch.read("the caller", out)': "pass"},
        "a tied weight is divided": {"data_ptr()]) > 1": "data_ptr()]) > 9"},
        "a linear with another input is divided": {"!= {norm}]": "== set()]"},
        "weights are not watched": {"in read - {None, self.inside}:": "in ():"},
    },
    test_a_norm_whose_weight_is_no_factor_is_refused: {
        "Gemma's norm is taken for Llama's": {"if not _doubles(": "if 0 and _doubles("},
    },
    test_packed_and_wrapped_readers_are_refused_by_their_kind: {
        "packed linears are not told apart": {"elif hasattr(m": "elif 0 and (m"},
    },
    test_what_the_dtype_cannot_hold_is_refused: {
        "overflow passes": {"not new.isfinite().all() or ": ""},
        "underflow passes": {" or not torch.equal(new == 0, old == 0)": ""},
    },
}
MUTATIONS = by_fault(BROKEN)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_law_finds(what, tmp_path):
    law, changes = MUTATIONS[what]
    source = open(outliers.__file__, encoding="utf8").read()
    for old, new in changes.items():
        assert old in source, f"outliers.py no longer has {old!r}: write it anew"
        source = source.replace(old, new)
    (tmp_path / "broken.py").write_text(source, "utf8")
    spec = importlib.util.spec_from_file_location("broken", tmp_path / "broken.py")
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    try:
        law(broken)
    except (AssertionError, pytest.fail.Exception, RuntimeError):
        return
    pytest.fail(f"{law.__name__} does not notice that {what}")


# Bad input, and tiny-decoder itself

BAD = {
    "s must be a positive number, not": ("s", [0, -2, math.inf, "2", True]),
    "from 0 to 31 for .*, and at least": ("channels", [[], [3, 32], [-1], [1.0]]),
    "must be a list of whole numbers": ("channels", [1, None]),
    "a tensor, or a dict of tensors": ("inputs", ["a line", [1, 2]]),
    "norms must be a list of names": ("norms", [[0], [], "input_layernorm"]),
    "no norm is named 'x'; there are: in": ("norms", [["x"], ["input_layernorm", "x"]]),
    "model.norm cannot be scaled": ("norms", [["model.norm"]]),
}


def test_bad_input_gets_one_sentence():
    for words, (name, values) in BAD.items():
        for value in values:
            settings = {"s": 200, "channels": [1], name: value}
            refused(llama(), words, outliers.scale_channels, **settings)


def test_the_inputs_may_be_a_dict_or_a_tensor_and_may_be_needed():
    model = llama()
    assert outliers.readers(model, BATCH) == outliers.readers(model, BATCH["input_ids"])
    refused(net(), "give inputs", outliers.readers)


def test_in_float32_the_answer_of_tiny_decoder_stays_and_its_activations_do_not():
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    before, largest = sweep.watched(model, tokenizer)
    assert largest["q_proj"] < 6 and largest["gate_proj"] < 7, "an outlier of its own"
    outliers.scale_channels(model, 200, [98])
    after, grown = sweep.watched(model, tokenizer)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    for kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert grown[kind] > 20 * 6, f"{kind}: no activation is far above 6"
    for kind in ("o_proj", "down_proj"):
        assert grown[kind] == pytest.approx(largest[kind], rel=1e-3), "scaled too"


# What is stored, and what the page says of it


@pytest.fixture(scope="module")
def stored():
    return results.load("outliers")


@pytest.fixture(scope="module")
def figures(stored):
    return {key: f["value"] for key, f in stored["figures"].items()}


def test_the_figures_follow_from_the_stored_runs(stored):
    kept = {k: f for k, f in stored["figures"].items()}
    seen = {k: f["value"] for k, f in kept.items() if "largest" in k or "moved" in k}
    again = sweep.derive(stored["runs"], stored["linears"], seen)
    again["rate"] = dict(value=stored["best"], tolerance=0)
    shares = [sweep.blocks(seed) for seed in sweep.SEEDS]
    again["shrunken.blocks"] = dict(value=sum(shares) / len(shares))
    assert again.keys() == kept.keys()
    for key, figure in again.items():
        assert figure["value"] == pytest.approx(kept[key]["value"], abs=1e-6), key


def test_every_row_has_its_seeds_and_records(stored):
    for name in ("outliers", "shrunken", "sixteen outliers"):
        drawn = set()
        for method in {r["method"] for r in stored["runs"] if r["inserted"] == name}:
            runs = results.where(stored["runs"], inserted=name, method=method)
            assert [r["seed"] for r in runs] == [0, 1, 2, 3, 4]
            assert all(len(r["dates"]) == 400 for r in runs)
            drawn |= {tuple(r["channels"]) for r in runs}
        assert len(drawn) == 5, "each seed has its own channels, whatever the method"
        assert len(set(sum(drawn, ()))) == 5 * sweep.CASES[name][1]


def test_the_rate_comes_from_dev_records_and_is_inside_the_sweep(stored):
    tried = {}
    for run in stored["rates"]:
        assert "dates" not in run, "a rate was chosen on test records"
        tried.setdefault(run["lr"], []).append(results.share(run["dev"]))
    best = stored["best"]
    assert min(tried) < best < max(tried) and len(tried) >= 4
    assert sum(tried[best]) == max(map(sum, tried.values()))


def test_outliers_leave_the_function_break_int8_and_the_threshold_repairs_it(figures):
    for method in sweep.LAYERS:
        assert figures[f"none.{method}.dates"] >= 0.99, "without them nothing is lost"
    for name in sweep.CASES:
        assert figures[f"{name}.moved"] < 1e-6
        assert figures.get(f"{name}.plain.loss", 0) == 0
    assert figures["outliers.naive.dates"] < 0.6
    assert figures["outliers.naive.dates.highest"] < 0.95, "each channel breaks it"
    assert figures["outliers.naive.loss.low"] > 0.2
    plain = figures["outliers.plain.dates"]
    assert figures["outliers.threshold.dates"] > 0.95 * plain
    assert figures["outliers.threshold.over naive.low"] > 0.2
    assert figures["outliers.NF4.dates"] > 0.95 * plain, "NF4 minds no activations"
    assert figures["outliers.emptied.dates"] > 0.95, "one channel is not needed"
    # what sits in many scaled columns is lost in part
    assert figures["sixteen outliers.naive.dates"] < 0.05
    assert figures["sixteen outliers.threshold.loss.low"] > 0
    assert figures["sixteen outliers.threshold.over emptied.low"] > 0


def test_shrunken_channels_break_nf4_and_qlora_wins_the_dates_back(figures):
    assert figures["shrunken.NF4.dates"] < 0.1
    assert figures["shrunken.QLoRA.dates.lowest"] > 0.95
    assert figures["shrunken.QLoRA.over NF4.low"] > 0.9
    assert figures["shrunken.QLoRA.loss.low"] > 0, "a little stays lost"
    assert figures["shrunken.naive.dates"] > 0.95, "127 levels hold both sizes"
    refusals = {m: figures[f"shrunken.{m}.refuse"] for m in ("plain", "NF4", "QLoRA")}
    assert refusals["plain"] > 0.95
    assert refusals["QLoRA"] < 0.6 and refusals["NF4"] < 0.6, "not won back"


def test_kurtosis_alone_does_not_say_what_nf4_breaks(stored, figures):
    normal = figures["normal.weights"]
    assert figures["tiny-decoder.kurtosis.highest"] < 4
    assert figures["MiniLM.kurtosis.highest"] > 1000
    assert figures["MiniLM.weights.highest"] < 1.1 * normal
    assert figures["MiniLM.output.highest"] < 1.25 * normal
    assert figures["inserted.output.highest"] > 4 * normal
    of = [r for r in stored["linears"] if r["model"] == "MiniLM"]
    tiny = [r for r in stored["linears"] if r["model"] == "tiny-decoder"]
    assert (len(of), len(tiny)) == (37, 28)
    assert sum(r["kurtosis"] < 2 for r in of) == 30
    of.sort(key=lambda r: r["kurtosis"])
    top, rest = of[-6:], of[:-6]
    paths = [f"encoder.layer.{i}.output.dense" for i in range(6)]
    assert sorted(r["path"] for r in top) == paths
    assert top[-1]["path"] == paths[0] and top[-1]["largest"] > 100
    assert max(r["largest"] for r in tiny) < 15
    least = min(r["output"] for r in rest)
    assert sum(r["output"] < least for r in top) == 5
    touched = [r for r in stored["linears"] if r["model"] == "inserted"]
    others = ("o_proj", "down_proj")
    touched = [r for r in touched if not r["path"].endswith(others)]
    assert len(touched) == 20 and min(r["output"] for r in touched) > 0.2
    assert max(r["weights"] for r in touched) < 0.15, "its own error hardly shows it"


LIVE = [("outliers", "naive"), ("outliers", "threshold"), ("shrunken", "NF4")]


@pytest.mark.parametrize("name, method", LIVE)
def test_one_point_of_each_run_live_gives_the_stored_bits(stored, name, method):
    (run,) = results.where(stored["runs"], inserted=name, method=method, seed=0)
    model, tokenizer = sweep.with_outliers(name, 0)
    fresh = sweep.bits(sweep.replaced(model, method), tokenizer, n=10)
    kept = "".join(run["dates"][i : i + 10] for i in range(0, 400, 40))
    assert results.share(fresh) == pytest.approx(results.share(kept), abs=0.1)


def test_minilms_weights_are_weighed_the_same_live(stored):
    minilm, tokenizer = base_models.load_minilm("cpu")
    minilm.encoder.layer = minilm.encoder.layer[:2]  # what comes later changes nothing
    minilm.pooler = None
    rows = {(r["model"], r["path"]): r for r in stored["linears"]}
    fresh = sweep.weigh("MiniLM", minilm, tokenizer)
    assert len(fresh) == 12
    for row in fresh:
        for key in ("kurtosis", "largest", "weights", "output"):
            near = pytest.approx(rows["MiniLM", row["path"]][key], rel=0.02, abs=1e-3)
            assert row[key] == near, f"{row['path']}: {key}"


def test_excess_kurtosis_is_known_for_three_distributions():
    dice = torch.Generator().manual_seed(0)
    normal = torch.randn(10**6, generator=dice)
    uniform = torch.rand(10**6, generator=dice)
    assert sweep.excess_kurtosis(normal) == pytest.approx(0, abs=0.02)
    assert sweep.excess_kurtosis(5 * normal + 3) == pytest.approx(0, abs=0.02)
    assert sweep.excess_kurtosis(uniform) == pytest.approx(-1.2, abs=0.01)
    assert sweep.excess_kurtosis(torch.tensor([1.0, -1, 1, -1])) == pytest.approx(-2)


def test_an_outlier_columns_codes_are_nearly_all_zero():
    model = sweep.replaced(sweep.with_outliers("outliers", 0)[0], "threshold")
    (channel,) = sweep.channels("outliers", 0)
    kinds = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    layers = [m for n, m in model.named_modules() if n.endswith(kinds)]
    codes = torch.cat([m.codes[:, channel] for m in layers])
    assert len(layers) == 20 and codes.ne(0).float().mean() < 0.1
