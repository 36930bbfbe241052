"""Outliers inserted on purpose: the function is the same, or the norm is refused; and
what the page says of the models that were measured with them."""

import importlib.util

import bitsandbytes as bnb
import pytest
import torch
from common import (
    BATCH,
    IDS,
    Net,
    assert_one_sentence,
    assert_unchanged,
    bert,
    gpt2,
    llama,
    net,
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


def test_the_function_is_the_same_in_float64(reference):
    for name, make in MAKERS.items():
        for s in (200, 1 / 60):
            model = make().double()
            before = answer(model)
            reference.scale_channels(model, s, CHANNELS, inputs=inputs(model))
            off = (answer(model) - before).abs().max() / before.abs().max()
            assert off < 1e-10, f"{name}, s={s:.3g}: the answer moved by {off:.1e}"


def test_a_power_of_two_changes_no_bit(reference):
    for name, make in MAKERS.items():
        for s in (256, 1 / 64):
            model = make().float()
            before = answer(model)
            reference.scale_channels(model, s, CHANNELS, inputs=inputs(model))
            assert torch.equal(answer(model), before), f"{name}, s={s}: not to the bit"


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
    found = reference.readers(llama())
    first = "model.layers.0."
    assert found[f"{first}input_layernorm"] == [
        f"{first}self_attn.{n}_proj" for n in "qkv"
    ]
    assert found[f"{first}post_attention_layernorm"] == [
        f"{first}mlp.{n}_proj" for n in ("gate", "up")
    ]
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
        x = self.embed(ids)
        y = self.norm(x)
        z = torch.tanh(self.fc(y))
        if self.wrong == "residual":
            z = z + y
        if self.wrong == "fed twice":
            z = self.fc(z)
        if self.wrong == "attention":
            z = z + self.mha(y, y, y)[0]
        if self.wrong == "attribute":
            z = z + self.out(y.mT.mT)
        if self.wrong == "view":
            z = z + self.out(y[:, 1:]).sum()
        z = self.out(z)
        return (z, [y]) if self.wrong == "returned" else z


WRONG = {
    "residual": "read by `add`",
    "returned": "read by the caller",
    "attention": "read by `multi_head_attention_forward`",
    "view": "read by `__getitem__`",
    "attribute": "read by `mT`",
    "fed twice": "fc reads something else too",
    "tied": "fc and out share one weight",
}


def refuses(reference, model, sample, match, norms=None):
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        reference.scale_channels(model, 200, [1], norms, sample)
    assert_one_sentence(error)
    assert_unchanged(model, before)


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
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=64, head_dim=8)
    more = dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1)
    gemma = seeded(GemmaForCausalLM(GemmaConfig(**sizes, **more)))
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
    for s in (1e40, 1e-40):
        refuses_s(reference, llama(), s, "out of what torch.float32 can hold")
    for s in (2e4, 1e-6):  # small columns become zero; large ones become infinite
        refuses_s(reference, llama().half(), s, "out of what torch.float16 can hold")


def refuses_s(reference, model, s, match):
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        reference.scale_channels(model, s, range(32))
    assert_unchanged(model, before)


class Lends(nn.Module):
    """A linear's or a norm's weight is read outside its layer."""

    def __init__(self, lends):
        super().__init__()
        self.norm, self.linear, self.lends = nn.LayerNorm(8), nn.Linear(8, 16), lends

    def forward(self, x):
        y = self.linear(self.norm(x))
        if self.lends == "linear":
            return nn.functional.linear(y, self.linear.weight.T)
        return y.sum(-1, keepdim=True) + x * self.norm.weight


def test_a_weight_that_is_read_outside_its_layer_is_refused(reference):
    for lends in ("linear", "norm"):
        model = Lends(lends)
        before = snapshot(model)
        words = f"the weight of {lends} is also read by"
        with pytest.raises(ValueError, match=words) as error:
            reference.scale_channels(model, 2.0, [1], inputs=torch.randn(4, 8))
        assert_one_sentence(error)
        assert_unchanged(model, before)


FORMULA = 'fresh[f"{reader}.weight"] = m.weight, m.weight / fits'
MUTATIONS = {
    "the columns are multiplied": (
        test_the_function_is_the_same_in_float64,
        {"m.weight / fits": "m.weight * fits"},
    ),
    "the columns stay as they are": (
        test_a_power_of_two_changes_no_bit,
        {FORMULA: "pass"},
    ),
    "one reader is forgotten": (
        test_the_function_is_the_same_in_float64,
        {"for reader in found[norm]:": "for reader in found[norm][1:] or found[norm]:"},
    ),
    "LayerNorm's bias is left out": (
        test_the_function_is_the_same_in_float64,
        {"p, p * scale": "p, p * scale if name == 'weight' else p"},
    ),
    "a Conv1D is divided along its outputs": (
        test_the_function_is_the_same_in_float64,
        {"scale[:, None] if": "scale if"},
    ),
    "only the first norm is scaled": (
        test_every_norm_grows_at_the_channels_alone,
        {"return list(found)": "return list(found)[:1]"},
    ),
    "every channel is scaled": (
        test_nothing_else_is_touched,
        {"scale[channels] = s": "scale[:] = s"},
    ),
    "a second call starts from the first one's scale": (
        test_the_inverse_takes_it_out,
        {"scale[channels] = s": "scale[channels] = max(s, 1)"},
    ),
    "the last reader is not seen": (
        test_the_readers_are_those_of_the_architecture,
        {"if norm in norms]": "if norm in norms][:2]"},
    ),
    "the hooks stay": (test_looking_leaves_no_trace, {"handle.remove()": "pass"}),
    "the model stays in eval mode": (
        test_looking_leaves_no_trace,
        {"m.training = True": "pass"},
    ),
    "functions are not watched": (
        test_berts_norms_are_refused_as_the_residual_reads_them,
        {"if self.inside not in self.linears:": "if False:"},
    ),
    "the caller is not watched": (
        test_a_norm_that_anything_else_reads_is_refused,
        {'watch.read("the caller", out)': "pass"},
    ),
    "a tied weight is divided": (
        test_a_norm_that_anything_else_reads_is_refused,
        {"if len(shared := owners[weight.data_ptr()]) > 1:": "if False:"},
    ),
    "a linear with another input is divided": (
        test_a_norm_that_anything_else_reads_is_refused,
        {"!= {norm}]": "== set()]"},
    ),
    "Gemma's norm is taken for Llama's": (
        test_a_norm_whose_weight_is_no_factor_is_refused,
        {"if not _doubles(": "if False and not _doubles("},
    ),
    "packed linears are not told apart": (
        test_packed_and_wrapped_readers_are_refused_by_their_kind,
        {'elif hasattr(m, "in_features"):': "elif False:"},
    ),
    "overflow passes": (
        test_what_the_dtype_cannot_hold_is_refused,
        {"not new.isfinite().all() or ": ""},
    ),
    "weights are not watched": (
        test_a_weight_that_is_read_outside_its_layer_is_refused,
        {"for path in read - {None, self.inside}:": "for path in ():"},
    ),
    "underflow passes": (
        test_what_the_dtype_cannot_hold_is_refused,
        {" or not torch.equal(new == 0, old == 0)": ""},
    ),
}


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
    "s is zero": (dict(s=0), "s must be a positive number, not 0"),
    "s is negative": (dict(s=-2), "positive number, not -2"),
    "s is infinite": (dict(s=float("inf")), "positive number, not inf"),
    "s is no number": (dict(s="2"), "positive number, not '2'"),
    "s is a truth value": (dict(s=True), "positive number, not True"),
    "no channel": (dict(channels=[]), "from 0 to 31 for .*, and at least one, not"),
    "a channel too high": (dict(channels=[3, 32]), "numbers from 0 to 31"),
    "a channel below zero": (dict(channels=[-1]), "numbers from 0 to 31"),
    "a channel is a float": (dict(channels=[1.0]), "numbers from 0 to 31"),
    "channels is a number": (dict(channels=1), "must be a list of whole numbers"),
    "no channels at all": (dict(channels=None), "must be a list of whole numbers"),
    "inputs is a text": (dict(inputs="a line"), "a tensor, or a dict of tensors"),
    "a list of inputs": (dict(inputs=[1, 2]), "a tensor, or a dict of tensors"),
    "a norm by its number": (dict(norms=[0]), "norms must be a list of names"),
    "no norms": (dict(norms=[]), "norms must be a list of names"),
    "norms is one string": (dict(norms="input_layernorm"), "must be a list of names"),
    "an unknown norm": (dict(norms=["ln_1"]), "no norm is named 'ln_1'; there are: in"),
    "a half-wrong list": (dict(norms=["input_layernorm", "x"]), "is named 'x'"),
    "the last norm": (dict(norms=["model.norm"]), "model.norm cannot be scaled"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_sentence(what):
    settings, match = BAD[what]
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        outliers.scale_channels(model, **dict(s=200, channels=[1]) | settings)
    assert_one_sentence(error)
    assert_unchanged(model, before)


def test_a_model_without_sample_inputs_asks_for_some():
    with pytest.raises(ValueError, match="give inputs"):
        outliers.readers(net())


def test_the_inputs_may_be_a_dict_or_a_tensor():
    model = llama()
    assert outliers.readers(model, BATCH) == outliers.readers(model, BATCH["input_ids"])


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


def test_without_outliers_there_is_nothing_to_lose(figures):
    for method in sweep.LAYERS:
        assert figures[f"none.{method}.dates"] >= 0.99


def test_outliers_leave_the_function_as_it_is(figures):
    for name in sweep.CASES:
        assert figures[f"{name}.moved"] < 1e-6
        if f"{name}.plain.dates" in figures:
            assert figures[f"{name}.plain.loss"] == 0


def test_outliers_break_naive_int8_and_the_threshold_repairs_it(figures):
    assert figures["outliers.naive.dates"] < 0.6
    assert figures["outliers.naive.dates.highest"] < 0.95, "each channel breaks it"
    assert figures["outliers.naive.loss.low"] > 0.2
    plain = figures["outliers.plain.dates"]
    assert figures["outliers.threshold.dates"] > 0.95 * plain
    assert figures["outliers.threshold.over naive.low"] > 0.2
    assert figures["outliers.NF4.dates"] > 0.95 * plain, "NF4 minds no activations"


def test_shrunken_channels_break_nf4_and_qlora_wins_the_dates_back(figures):
    assert figures["shrunken.NF4.dates"] < 0.1
    assert figures["shrunken.QLoRA.dates.lowest"] > 0.95
    assert figures["shrunken.QLoRA.over NF4.low"] > 0.9
    assert figures["shrunken.QLoRA.loss.low"] > 0, "a little stays lost"
    assert figures["shrunken.naive.dates"] > 0.95, "127 levels hold both sizes"
    refusals = {m: figures[f"shrunken.{m}.refuse"] for m in ("plain", "NF4", "QLoRA")}
    assert refusals["plain"] > 0.95
    assert refusals["QLoRA"] < 0.6 and refusals["NF4"] < 0.6, "not won back"


def test_what_sits_in_many_scaled_columns_is_lost_in_part(figures):
    assert figures["outliers.emptied.dates"] > 0.95, "one channel is not needed"
    assert figures["sixteen outliers.naive.dates"] < 0.05
    assert figures["sixteen outliers.threshold.loss.low"] > 0
    assert figures["sixteen outliers.threshold.over emptied.low"] > 0


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
    touched = [
        r for r in touched if r["path"].split(".")[-1] not in ("o_proj", "down_proj")
    ]
    assert len(touched) == 20 and min(r["output"] for r in touched) > 0.2
    assert max(r["weights"] for r in touched) < 0.15, "its own error hardly shows it"


@pytest.mark.parametrize(
    "name, method",
    [("outliers", "naive"), ("outliers", "threshold"), ("shrunken", "NF4")],
)
def test_one_point_of_each_run_live_gives_the_stored_bits(stored, name, method):
    (run,) = results.where(stored["runs"], inserted=name, method=method, seed=0)
    model, tokenizer = sweep.with_outliers(name, 0)
    fresh = sweep.bits(sweep.replaced(model, method), tokenizer, n=10)
    kept = "".join(run["dates"][i : i + 10] for i in range(0, 400, 40))
    assert results.share(fresh) == pytest.approx(results.share(kept), abs=0.1)


def test_minilms_weights_are_weighed_the_same_live(stored):
    minilm = base_models.load_minilm("cpu")
    fresh = {r["path"]: r for r in sweep.weigh("MiniLM", *minilm)}
    for row in stored["linears"]:
        if row["model"] == "MiniLM":
            for key in ("kurtosis", "largest", "weights", "output"):
                near = pytest.approx(row[key], rel=0.02, abs=1e-3)
                assert fresh[row["path"]][key] == near, f"{row['path']}: {key}"


def test_excess_kurtosis_is_known_for_three_distributions():
    dice = torch.Generator().manual_seed(0)
    normal, uniform = (
        torch.randn(10**6, generator=dice),
        torch.rand(10**6, generator=dice),
    )
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
