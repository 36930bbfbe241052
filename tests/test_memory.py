"""The memory calculator: against real steps, known bytes, and everything that is wrong
with a command line."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import transformers as tf
from common import assert_one_sentence
from torch import nn
from torch.nn import functional

from experiments.sweeps import memory as sweep
from peftlab import adam8bit, lora, memory
from peftlab.kit import measure, results
from peftlab.memory import __main__ as command
from peftlab.memory import calculator, cards, tracker
from tools import figures

TINY = "tiny-decoder"
PARTS = sweep.PARTS
RESULTS = results.load("memory")
LARGE = RESULTS["models"]
PAGE = (results.FOLDER.parent / "memory.md").read_text("utf8")


def refused(words, call, *args, **settings):
    with pytest.raises(ValueError, match=words) as error:
        call(*args, **settings)
    assert_one_sentence(error)


def llama(width=192, layers=3, heads=3, kv_heads=1, vocab=1000, inner=2):
    return tf.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
    )


def gpt2(dropout=0.1):
    drops = dict(attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout)
    return tf.GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=1000, **drops)


def sizes(width, layers, heads, **more):
    heads = dict(num_hidden_layers=layers, num_attention_heads=heads)
    return dict(hidden_size=width, **heads, **more)


SMALL = sizes(128, 2, 4, intermediate_size=384, vocab_size=500)
T5 = dict(d_model=128, d_ff=256, d_kv=32, num_layers=2, num_heads=4, vocab_size=1000)
T5 = tf.T5Config(**T5, decoder_start_token_id=0)
FALCON = tf.FalconConfig(**sizes(128, 2, 8, vocab_size=1000))
# Little but the activations, the widest of them in the middle of a block.
DRY = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
BERT = tf.BertConfig(**sizes(192, 1, 3, intermediate_size=768, vocab_size=500), **DRY)
WIDE = llama(128, 2, 2, 2, 200, inner=8)
RELATIVE = dict(relative_attention=True, pos_att_type=["p2c", "c2p"])
DEBERTA = tf.DebertaV2Config(**SMALL, **RELATIVE)
EXPERTS = tf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
MAMBA = tf.MambaConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2)
VISION = dict(intermediate_size=512, image_size=32, patch_size=8)
LLAVA = tf.LlavaConfig(  # a step without images reaches a third of its weights
    text_config=llama(128, 1, 2, 2),
    vision_config=dict(model_type="clip_vision_model", **sizes(128, 4, 2), **VISION),
    architectures=["LlavaForConditionalGeneration"],
)


# Against real steps


STORED = {sweep.key(row): row for row in RESULTS["cells"]}
EIGHTEEN = [
    f"{size}.{method}{more}"
    for size in sweep.SIZES
    for method in sweep.METHODS
    for more in ("", ".checkpointing")
]


def test_stored_predictions_are_within_a_tenth_of_the_measured_peaks():
    """Three methods at three sizes, twice: within a twentieth."""
    for name, row in STORED.items():
        ratio = row["predicted"]["total"] / row["measured"]
        assert ratio == row["ratio"]
        assert abs(ratio - 1) < (0.05 if name in EIGHTEEN else 0.1), name
        assert sum(row["predicted"][p] for p in PARTS[:-1]) == row["predicted"]["total"]
    assert {*EIGHTEEN} < STORED.keys() and len(EIGHTEEN) == 18
    assert {row["shape"] for row in STORED.values()} == {*sweep.SIZES, *sweep.OTHERS}
    # The model is most of it, and not a few workspaces.
    assert max(row["measured"] for row in STORED.values()) > 3e9


STEPS = [
    (llama(), dict(method="lora", seq=192, batch=4)),
    (llama(vocab=9000), dict(method="qlora", seq=256, batch=2, checkpointing=True)),
    (llama(768, 1, 12, 4), dict(method="qlora", seq=128, batch=4)),
    (llama(), dict(method="full", seq=256, batch=2, checkpointing=True)),
    (llama(vocab=9000), dict(method="full", seq=8, batch=1)),
    (llama(vocab=9000), dict(method="full", seq=8, batch=1, optimizer="adamw8bit")),
    (llama(), dict(method="full", seq=64, batch=4, optimizer="sgd")),
    (llama(), dict(method="lora", seq=192, batch=4, dtype="float32", r=64)),
    (gpt2(), dict(method="full", seq=128, batch=4)),
    (gpt2(0.0), dict(method="qlora", seq=256, batch=4)),
    (BERT, dict(method="lora", seq=120, batch=16, dtype="float32")),
    (BERT, dict(method="lora", seq=96, batch=8, checkpointing=True, r=4)),
    (WIDE, dict(method="lora", seq=300, batch=1, checkpointing=True)),
    (WIDE, dict(method="qlora", seq=200, batch=2)),
    (T5, dict(method="lora", seq=128, batch=2)),
    (FALCON, dict(method="full", seq=256, batch=2)),
    (DEBERTA, dict(method="full", seq=128, batch=4)),
    (EXPERTS, dict(method="full", seq=64, batch=2)),
    (EXPERTS, dict(method="lora", seq=128, batch=4, targets=["q_proj"])),
    (LLAVA, dict(method="full", seq=32, batch=2)),
    (LLAVA, dict(method="lora", seq=32, batch=2, dtype="float32", r=64)),
    (MAMBA, dict(method="full", seq=64, batch=2)),
    # an 8-bit base, what peft prepares, and inference, which fills its cache; in
    # float32, for a CPU without bfloat16 instructions copies weights of 16 bits
    (llama(), dict(method="lora8bit", seq=192, batch=4)),
    (llama(vocab=9000), dict(method="lora8bit", seq=128, batch=2, checkpointing=True)),
    (WIDE, dict(method="lora8bit", seq=200, batch=2, kbit_prepared=True)),
    (gpt2(0.0), dict(method="qlora", seq=64, batch=2, kbit_prepared=True)),
    (llama(), dict(method="inference", seq=256, batch=4, dtype="float32")),
    (llama(vocab=9000), dict(method="inference", seq=128, batch=1, dtype="float32")),
    (BERT, dict(method="inference", seq=120, batch=8, dtype="float32")),
    (T5, dict(method="inference", seq=128, batch=2, dtype="float32")),
]
# Labels of their kind: of several classes, and of one.
SEVERAL = dict(problem_type="multi_label_classification", num_labels=3)
for more in (
    SEVERAL | dict(architectures=["BertForSequenceClassification"]),
    dict(architectures=["BertForNextSentencePrediction"]),
):
    STEPS.append((tf.BertConfig(**SMALL, **more), dict(method="full", seq=32, batch=4)))


@pytest.mark.parametrize("config, settings", STEPS)
def test_a_step_of_another_shape_takes_what_is_predicted(config, settings):
    predicted = memory.step(config, device="cpu", **settings)["total"]
    real = sweep.measured(config, **settings)
    assert predicted == pytest.approx(real, rel=0.03), f"{predicted / real:.4f}"


def test_a_generation_takes_no_more_than_one_pass_over_all_its_tokens():
    config, seq, batch = llama(256, 4, 4, 2), 160, 4
    settings = dict(seq=seq, batch=batch, dtype="float32", device="cpu")
    predicted = memory.step(config, "inference", **settings)
    assert predicted["gradients"] == predicted["optimizer"] == 0
    model = tf.LlamaForCausalLM(config).eval()
    shared = dict(do_sample=False, eos_token_id=None, pad_token_id=0)

    def peak(prompt):
        ids = torch.ones(batch, prompt, dtype=torch.long)
        mask, new = torch.ones_like(ids), seq - prompt
        settings = dict(attention_mask=mask, max_new_tokens=new, **shared)
        work = lambda: model.generate(ids, **settings)  # noqa: E731
        work()
        return measure.nbytes(model) + measure.peak_memory(work)

    cache = 4 * batch * seq * 2 * 2 * 64 * 4  # layers, tokens, K and V of 2 heads
    assert predicted["activations"] > cache
    assert peak(seq - 1) == pytest.approx(predicted["total"], rel=0.05)
    assert peak(8) < predicted["total"]


def test_attention_that_no_hardware_stores_is_not_counted(monkeypatch):
    config = llama(128, 3, 8, 8)
    settings = dict(method="full", seq=512)
    predicted = memory.step(config, device="cpu", **settings)["total"]
    assert predicted == memory.step(config, **settings)["total"]
    real = sweep.measured(config, batch=1, **settings)
    assert predicted == pytest.approx(real, rel=0.03)
    scores = 3 * 8 * 512**2 * 4  # layers, heads, tokens squared, bytes
    stored = lambda kernel, device, *args, **more: kernel(*args, **more)  # noqa: E731
    monkeypatch.setattr(tracker, "_attention", stored)
    naive = memory.step(config, **settings)["total"]
    assert naive - predicted > scores, "meta tensors go to the kernel that stores them"


def test_dropout_and_a_learned_bias_on_the_scores_cost_a_gpu_less_than_a_cpu():
    def both(config):
        settings = dict(seq=256, batch=2, method="full")
        return [memory.step(config, device=d, **settings) for d in ("cpu", "cuda")]

    cpu, gpu = both(gpt2())
    scores = 3 * 2 * 4 * 256**2 * 4  # layers, batch, heads, tokens squared, bytes
    assert cpu["activations"] - gpu["activations"] > scores
    dry = both(gpt2(0.0))
    assert dry[0] == dry[1] and dry[1]["total"] < gpu["total"]
    cpu, gpu = both(T5)
    assert gpu["total"] < cpu["total"]


def test_the_tracker_knows_what_the_profiler_knows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    x = torch.randn(100, 64)

    def work():
        y = model(x)
        (y.view(-1)[:50] * 2).sum().backward()  # a view is no storage of its own

    peak = measure.peak_memory(work)
    model.zero_grad()
    with memory.Tracker() as tracked:
        tracked.enter([x, *model.parameters()])
        held = tracked.live
        work()
    assert held == x.nbytes + measure.nbytes(model)
    assert tracked.peak - held == peak, "a storage counts once, from birth to death"
    gradients = measure.nbytes([p.grad for p in model.parameters()])
    assert tracked.live - held == gradients, "something freed is still open"


@pytest.mark.parametrize("pick", ["gather", "index", "index_select"])
def test_what_was_picked_out_goes_back_in_place(pick):
    w, rows = torch.randn(3000, 400, requires_grad=True), torch.randperm(3000)
    picks = dict(
        gather=lambda: w.gather(0, rows[:, None].expand(-1, 400)),
        index=lambda: w[rows],
        index_select=lambda: w.index_select(0, rows),
    )

    def work():
        y = picks[pick]()
        (y * 2).sum().backward()

    peak, w.grad = measure.peak_memory(work), None
    with memory.Tracker() as tracked:
        tracked.enter([w, rows])
        held = tracked.live
        work()
    assert tracked.peak - held == pytest.approx(peak, rel=0.01)


# Known bytes


KNOWN = [
    ("llama-7b", "qlora", torch.bfloat16, "3.866"),
    ("llama-13b", "qlora", torch.bfloat16, "7.201"),
    ("llama-33b", "qlora", torch.bfloat16, "17.414"),
    ("llama-65b", "lora", torch.float16, "130.571"),
]


@pytest.mark.parametrize("name, method, dtype, gigabytes", KNOWN)
def test_llama_in_4_and_16_bits_has_the_known_bytes(name, method, dtype, gigabytes):
    settings = dict(dtype=dtype, targets=["q_proj"], r=1)
    if method == "qlora":
        settings["double_quant"] = True
    with tracker.as_on("cuda"):
        model, _ = calculator.build(memory.load(name), method, **settings)
    base = measure.nbytes(model) - 4 * measure.parameters(model)[0]  # without A and B
    assert f"{base / 1e9:.3f}" == gigabytes


PUBLISHED = """
    bert-base  109_482_240       roberta-base  124_645_632    gpt2  124_439_808
    bert-large  335_141_888      roberta-large  355_359_744   gpt2-medium  354_823_168
    llama-7b  6_738_415_616      llama-2-7b  6_738_415_616    gpt2-large  774_030_080
    llama-13b  13_015_864_320    llama-2-13b  13_015_864_320  gpt2-xl  1_557_611_200
    llama-33b  32_528_943_616    llama-2-70b  68_976_648_192  tiny-decoder  918_656
    llama-65b  65_285_660_672    llama-3-8b  8_030_261_248   llama-3-70b  70_553_706_496
    mistral-7b  7_241_732_096    qwen2.5-0.5b  494_032_768   qwen2.5-7b  7_615_616_512
""".split()
BASES = dict(zip(PUBLISHED[::2], map(int, PUBLISHED[1::2]), strict=True))
# T5 1.1, less the head that transformers ties, and GPT-3: as they are rounded.
SIZES = dict(small=60.5e6, base=222.9e6, large=750.3e6, xl=2.784e9, xxl=11.004e9)
BASES |= {f"t5-{size}": pytest.approx(n, rel=0.001) for size, n in SIZES.items()}
BASES["gpt-3"] = pytest.approx(175e9, rel=0.003)


@pytest.mark.parametrize("name", memory.SHAPES)
def test_a_built_in_shape_has_the_published_count(name):
    kind = "base" if "bert" in name else None  # heads are not counted
    assert measure.count(memory.load(name), kind=kind)["base"] == BASES[name]


@pytest.mark.parametrize("method", ["lora", "lora8bit", "qlora"])
def test_weights_and_gradients_are_the_bytes_of_a_real_model(method):
    model = tf.LlamaForCausalLM(llama()).bfloat16()
    memory.METHODS[method](model, "all-linear", r=4)
    found = memory.step(llama(), method, r=4, seq=8)
    assert found["weights"] == measure.nbytes(model)
    tensors = lora.state_dict(model)
    assert found["gradients"] == measure.nbytes(tensors)
    assert found["trainable"] == sum(t.numel() for t in tensors.values())
    assert found["parameters"] - found["trainable"] == measure.count(llama())["base"]
    assert found["total"] == sum(found[part] for part in PARTS[:-1])


def test_linears_in_8_bits_take_a_byte_a_weight_and_four_a_row():
    found = {m: memory.step(llama(), m, seq=8)["weights"] for m in memory.METHODS}
    width, inner, kv = 192, 384, 64
    rows = 2 * width + 2 * kv + 2 * inner + width
    weights = 2 * width * width + 2 * kv * width + 3 * inner * width
    assert found["lora"] - found["lora8bit"] == 3 * (weights - 4 * rows)
    assert found["qlora"] < found["lora8bit"] < found["lora"] < found["full"]
    assert found["inference"] == pytest.approx(found["full"] / 2, rel=1e-3)


@pytest.mark.parametrize("method", ["lora8bit", "qlora"])
def test_what_peft_prepares_has_the_bytes_of_its_own_function(method):
    from peft import prepare_model_for_kbit_training

    config = tf.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=300)
    model = tf.GPT2LMHeadModel(config).bfloat16()
    memory.METHODS[method](model, "all-linear", r=4)
    trained = {p: p.requires_grad for p in model.parameters()}
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert {p.dtype for p in trained} == {torch.float32}, "biases, norms and embedding"
    found = memory.step(config, method, r=4, seq=8, kbit_prepared=True)
    assert found["weights"] == measure.nbytes(model)


def test_llama_3_8b_prepared_takes_2_10_gb_more():
    found = [RESULTS["models"][f"case.kbit.{on}"]["weights"] for on in (False, True)]
    embedding, head, norms = 128256 * 4096, 128256 * 4096, 65 * 4096
    assert found[1] - found[0] == 2 * (embedding + head + norms)
    assert f"{(found[1] - found[0]) / 1e9:.2f}" == "2.10"


# Several GPUs

FIGURE_1 = [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)]  # ZeRO's paper: level, GB


@pytest.mark.parametrize("level, gigabytes", FIGURE_1)
def test_zero_divides_as_in_the_papers_figure(level, gigabytes):
    n = 7_500_000_000  # parameters; mixed precision: 2 + 2 + 12 bytes, 64 GPUs
    parts = memory.shard(2 * n, 2 * n, 12 * n, gpus=64 if level else 1, zero=level)
    assert round(sum(parts) / 1e9, 1) == gigabytes


def test_each_level_divides_one_more_part():
    def step(gpus, zero, method="full"):
        return memory.step(llama(vocab=9000), method, seq=32, gpus=gpus, zero=zero)

    one = step(1, 0)
    levels = [step(4, level) for level in range(4)]
    assert levels[0] == one
    for part, first in dict(optimizer=1, gradients=2, weights=3).items():
        for level, found in enumerate(levels):
            assert found[part] == (-(-one[part] // 4) if level >= first else one[part])
    # The highest point is no longer the end, with every gradient there, but the loss.
    logits = 32 * 9000 * 4
    assert levels[2]["activations"] > 2 * logits > one["activations"]
    embedding = 9000 * 192 * 4
    assert levels[3]["activations"] == levels[2]["activations"] + embedding
    totals = [found["total"] for found in levels]
    assert totals == sorted(totals, reverse=True)
    assert step(4, 3, "inference")["weights"] == step(1, 0, "inference")["weights"] / 4


def test_an_update_is_divided_with_the_weights():
    def step(gpus, zero):
        settings = dict(seq=8, optimizer="adamw-foreach", gpus=gpus, zero=zero)
        return memory.step(llama(vocab=9000), "full", **settings)

    one, two = step(1, 0), step(2, 1)
    assert two["activations"] == pytest.approx(one["activations"] / 2, rel=0.01)


def test_the_states_are_those_of_the_optimizers():
    def state(optimizer, **more):
        found = memory.step(llama(), "full", seq=8, optimizer=optimizer, **more)
        return found["optimizer"] / found["trainable"]

    assert state("adamw") == pytest.approx(8, rel=1e-3)
    assert state("adamw", dtype="bfloat16") == pytest.approx(4, rel=1e-3)
    assert state("sgd") == 0
    real = tf.LlamaForCausalLM(llama())
    optimizer = adam8bit.Adam8bit(real.parameters())
    real(torch.zeros(1, 8, dtype=torch.long)).logits.mean().backward()
    optimizer.step()
    size = tracker.nbytes(calculator._state(optimizer))
    found = memory.step(llama(), "full", seq=8, optimizer="adamw8bit")["optimizer"]
    assert found == size < 0.27 * 8 * measure.parameters(real)[0]


def test_torchs_own_adamw_takes_one_more_copy_on_a_gpu():
    config, names = llama(vocab=9000), ("adamw", "adamw-foreach")
    fused, foreach = (memory.step(config, "full", seq=8, optimizer=o) for o in names)
    copy = foreach["activations"] - fused["activations"]
    assert copy == pytest.approx(fused["weights"], rel=0.05)


# What has to hold of any prediction


def test_checkpointing_lowers_activations_and_nothing_else():
    settings = dict(config=llama(layers=6), seq=256, batch=4)
    plain, less = (memory.step(checkpointing=c, **settings) for c in (False, True))
    assert less["activations"] < 0.7 * plain["activations"]
    assert all(less[part] == plain[part] for part in PARTS[:3])


def test_each_setting_does_what_it_says():
    def step(config=None, method="lora", **settings):
        return memory.step(config or llama(), method, seq=8, **settings)

    assert step(r=32)["gradients"] == 16 * step(r=2)["gradients"]
    wide = llama(768, 1, 12, 12)
    once, twice = (step(wide, "qlora", double_quant=d) for d in (False, None))
    packed = 4 * 768**2 + 3 * 768 * 2 * 768
    bits = 8 * (once["weights"] - twice["weights"]) / packed
    assert bits == pytest.approx(4.5 - 4.127, abs=0.01)
    assert step(targets=["q_proj"])["trainable"] == 3 * 16 * (192 + 192)
    bf16, fp32 = (step(method="full", dtype=d) for d in ("bfloat16", None))
    assert fp32["gradients"] == 2 * bf16["gradients"] == 4 * fp32["trainable"]
    assert step(method="full", dtype=torch.bfloat16) == bf16


def test_a_7b_model_takes_no_memory_here():
    found = []

    def work():
        found.append(memory.step("llama-2-7b", "full", checkpointing=True))

    assert measure.peak_memory(work) < 1e7 or torch.cuda.is_available()
    assert found[0] == LARGE["llama-2-7b.full.1"] and found[0]["total"] > 1e11


@pytest.mark.parametrize(
    "name", ["llama-2-7b.full.4", "llama-2-70b.lora.4", "llama-2-7b.qlora.4"]
)
def test_a_stored_large_model_is_what_smaller_ones_of_its_kind_add_up_to(name):
    """All layers are alike: a line through three and four of them."""
    config, method, batch = name.rsplit(".", 2)

    def at(layers):
        shape = memory.load(config)
        shape.num_hidden_layers = layers
        return memory.step(shape, method, batch=int(batch), checkpointing=True)

    three, four = at(3), at(4)
    more = memory.load(config).num_hidden_layers - 3
    parts = [*PARTS, "trainable", "parameters"]
    want = {part: three[part] + more * (four[part] - three[part]) for part in parts}
    stored = {part: LARGE[name][part] for part in parts}
    assert want == stored, "run `python -m experiments.sweeps.memory`"


CELLS = ["width 256.full", "width 256.lora.checkpointing", "width 256.qlora"]
CELLS += ["width 512.full.adamw8bit", "bert-base.full", "t5-small.lora"]


@pytest.mark.parametrize("name", CELLS)
def test_a_stored_prediction_is_what_comes_out_today(name):
    row = STORED[name]
    shape = (sweep.SIZES | sweep.OTHERS)[row["shape"]][0]
    names = ("method", "seq", "batch", "checkpointing", "optimizer")
    settings = {k: row[k] for k in names if k in row}
    found = memory.step(shape, device="cpu", **settings)
    assert {part: found[part] for part in PARTS} == row["predicted"]


def test_nothing_is_left_changed():
    config, places = llama(), ("scaled_dot_product_attention", "dropout")
    before = config.to_dict(), [getattr(functional, n) for n in places]
    for targets in (None, ["no"]):
        with contextlib.suppress(ValueError):
            memory.step(config, "lora", targets=targets, seq=8)
        after = config.to_dict(), [getattr(functional, n) for n in places]
        assert after == before


NARROW = sizes(64, 2, 2, intermediate_size=64)
CLASSES = ["DebertaV2ForSequenceClassification", "BertForQuestionAnswering", None]


@pytest.mark.parametrize("name", CLASSES)
def test_models_that_ask_about_values_or_have_no_loss_are_run(name):
    kind = tf.DebertaV2Config if "Deberta" in str(name) else tf.BertConfig
    config = kind(**NARROW, architectures=[name] if name else None)
    found = memory.step(config, "full", seq=16)
    assert found["gradients"] > 0.9 * found["weights"]


# The cards


def test_a_card_holds_less_than_its_name_says():
    rooms = [size * cards.GIB for size in memory.CARDS.values()]
    assert rooms == sorted(rooms)
    for name, size in memory.CARDS.items():
        printed = int(name.split("(")[1].split()[0])
        assert 0.9 * printed < size < printed, "GiB against the name"
        room = (size * cards.GIB - cards.CONTEXT) / (1 + cards.HOLES)
        assert memory.fits(room - 1) == name != memory.fits(room + 1e3)
    assert memory.fits(0) == "T4 (16 GB)" and memory.fits(1e12) is None
    assert memory.fits(10**400) is None
    assert memory.fits(0, bfloat16=True) == "T4 (16 GB, no bfloat16: use float16)"
    assert memory.fits(2e10, bfloat16=True) == "L4 or A10G (24 GB)"
    for total in (-1, float("nan"), "8", True):
        refused("bytes are a number", memory.fits, total)


def test_the_public_figures_come_out_or_are_said_not_to():
    room = {n.partition(" (")[0]: size * 2**30 for n, size in memory.CARDS.items()}
    total = {n[6:]: m["total"] for n, m in LARGE.items() if n.startswith("claim")}
    gpu = {n[6:]: m["gpu"] for n, m in LARGE.items() if n.startswith("claim")}
    # "65B on a 48 GB card": at r=64, as it was done, only with paged optimizers.
    assert room["L40S"] < total["65b"] < room["RTX A6000"]
    assert gpu["65b"] == "A100 or H100 (80 GB)" and gpu["65b.small"] == "A100 (40 GB)"
    # "33B on a 24 GB card": the same.
    assert total["33b"] > room["RTX 3090 or 4090"]
    assert total["33b.small"] < room["L4 or A10G"]
    assert gpu["7b"] == "T4 (16 GB, no bfloat16: use float16)"
    # 780 GB are 12 bytes a parameter, between our two; 350 GB are GPT-3's.
    assert total["65b.bf16"] < 780e9 < total["65b.full"]
    assert total["gpt3"] == pytest.approx(350e9, rel=0.01)


# The page


def test_the_page_shows_what_the_command_prints():
    block = (
        PAGE.partition("## Count yours")[2].split("```")[1].replace("\\\n", "").strip()
    )
    line, _, printed = block.partition("\n")
    assert line.startswith("$ python -m peftlab.memory ")
    want = vars(command.parse(["--config", "llama-2-7b"]))
    want |= dict(method="qlora", seq=512, batch=4, checkpointing=True)
    assert vars(command.parse(line.split()[4:])) == want
    assert command.report(LARGE["llama-2-7b.qlora.4"]) == printed


def test_the_page_names_the_cards_that_are_stored_and_its_figures_are_bound():
    rows = re.findall(r"memory:(llama-2-\S+)\.total --> \| ([^|]+) \|", PAGE)
    assert {key for key, _ in rows} == {k for k in LARGE if k.startswith("llama-2")}
    for key, card in rows:
        assert (LARGE[key]["gpu"] or "none").partition(" (")[0] == card
    for name, size in memory.CARDS.items():
        card, _, printed = name.rstrip(")").partition(" (")
        assert f"| {card} | {printed} | {size:.2f}<!-- cited -->" in PAGE
    assert not figures.unbound(PAGE)


# What is wrong

LED = dict(d_model=32, vocab_size=100, attention_window=8)
for side in ("encoder", "decoder"):
    LED |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
XLNET = tf.XLNetConfig(n_layer=1, d_model=32, n_head=2)
ROBERTA = tf.RobertaConfig(max_position_embeddings=20, num_hidden_layers=1)
HEADS = tf.GPT2Config(n_embd=128, n_head=3)
BAD = [
    (dict(method="dora"), "there are: full, lora, lora8bit, qlora, inference"),
    (dict(method=["lora"]), "there are: full, lora"),
    (dict(method="full", r=8), "r is of lora, lora8bit and qlora"),
    (dict(method="inference", targets=["q_proj"]), "trains nothing: targets is of"),
    (dict(method="inference", checkpointing=True), "no backward pass"),
    (dict(method="lora8bit", dtype="float16"), "lora8bit packs bfloat16 weights"),
    (dict(method="lora", kbit_prepared=True), "packs no weights: kbit_prepared is of"),
    (dict(method="qlora", kbit_prepared="yes"), "True or False"),
    (dict(gpus=0), "gpus must be a whole number from 1"),
    (dict(gpus=8, zero=4), "zero must be a whole number from 0 to 3"),
    (dict(zero=1), "gpus must be at least 2"),
    (dict(method="lora8bit", gpus=8, zero=3), "8-bit weights are not: take qlora"),
    (dict(method="full", targets=["q_proj"]), "targets is of lora"),
    (dict(method="qlora", dtype="float16"), "dtype is of full, lora and"),
    (dict(double_quant=True), "double_quant is of qlora"),
    (dict(method="full", double_quant=False), "is of qlora"),
    (dict(r=2.5), "whole number"),
    (dict(r=10**400), "rank r must be a whole number from 1 to 100,000, not"),
    (dict(r=10**5000), "not a huge int"),  # past what Python prints
    (dict(targets=["q_proj", "query"]), "there are: down_proj"),
    (dict(targets=[]), "all-linear"),
    (dict(targets=["q" * 10**5]), "a list of names"),
    (dict(dtype="int8"), "there are: float32, bfloat16, float16"),
    (dict(dtype=torch.float64), "there are: float32"),
    (dict(optimizer="lion"), "there are: adamw, adamw-foreach"),
    (dict(device="tpu"), "there are: cuda, cpu"),
    (dict(seq=0), "seq must be a whole number"),
    (dict(seq=True), "seq must be a whole number"),
    (dict(seq=10**400), "seq must be a whole number from 1 to"),
    (dict(batch=1.5), "batch must be a whole number"),
    (dict(batch=10**400), "batch must be a whole number from 1 to"),
    (dict(method="qlora", double_quant=1), "True or False"),
    (dict(checkpointing="no"), "True or False"),
    (dict(config="x" * 10**5), r"x\.\.\. cannot be read"),
    (dict(config="\x1b[2J"), "x1b"),
    (dict(config=None), "a name, a path or a config"),
    (dict(config="llama-5"), "llama-2-7b, llama-2-13b"),
    (dict(config="meta-llama/Llama-2-7b-hf"), "one of bert-base"),
    # models that read no text, and less of it than they are given
    (dict(config=tf.ViTConfig(), method="full"), "reads no text"),
    (dict(seq=257), "maximum, 256"),
    (dict(config=tf.LEDConfig(**LED), method="full", seq=1025), "maximum, 1024"),
    (dict(config=LLAVA, method="full", seq=2049), "maximum, 2048"),
    (dict(config=ROBERTA, method="full", seq=19), "maximum, 18"),  # the pad's places
    # models that cannot be, or do not run
    (dict(config=tf.MixtralConfig(num_hidden_layers=1)), "3-D expert"),
    (dict(config=HEADS, method="full"), "divisible"),
    (dict(config=llama(heads=4, kv_heads=3)), "share 3"),
    (dict(config=XLNET, method="full"), "XLNetLMHeadModel does not run without data"),
    (dict(config=tf.LlamaConfig(num_hidden_layers=2000)), "layers must be a whole"),
]


@pytest.mark.parametrize("settings, words", BAD, ids=range(len(BAD)))
def test_bad_input_gets_one_sentence(settings, words, monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("it reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    refused(words, memory.step, **{"config": TINY, "seq": 8, **settings})


FALCON_FILE = FALCON.to_diff_dict() | dict(
    auto_map=dict(AutoModelForCausalLM="somewhere--modeling.Model"),
    quantization_config=dict(quant_method="bitsandbytes"),
)
OWN_CODE = r"code of its own \(auto_map\)"


def of(**content):
    return json.dumps(dict(model_type="llama") | content)


FILES = [  # (words, the file's text)
    ("is not JSON", "{"),
    ("is not JSON: maximum recursion", "[" * 100_000),
    ("it has no model_type", "[]"),
    ("no model's config: it has no model_type", "null"),
    ("has no model_type", '{"hidden_size": 8}'),
    ("knows no model type 'llama5'; it knows [1-9]", of(model_type="llama5")),
    ("knows no model type 'aaa", of(model_type="a" * 10**5)),
    ("hidden_size must be .* not 'wide'", of(model_type="t5", hidden_size="wide")),
    ("is not a multiple of", of(num_attention_heads=7)),
    ("over 10,000,000 bytes", " " * (10**7 + 1)),
    (OWN_CODE, of(**FALCON_FILE | dict(model_type="chatglm"))),
    (OWN_CODE, of(**FALCON_FILE | dict(architectures=["RWForCausalLM"]))),
    # sizes that cannot be, or that nobody has
    ("from 1 to 1,000", of(num_hidden_layers=10**6)),
    ("from 1 to 1,000", of(num_hidden_layers=0)),
    ("hidden_size must be", of(hidden_size=2**20)),
    ("hidden_size must be", of(hidden_size=-8)),
    ("hidden_size must be", of(hidden_size=64.5)),
    ("hidden_size must be", of(hidden_size=True)),
    ("num_attention_heads must be", of(num_attention_heads=0)),
    ("vocab_size must be", of(vocab_size=10**400)),
    ("num_labels must be", of(num_labels=10**9)),
    ("attention_dropout must be from 0", of(attention_dropout=7)),
    ("rms_norm_eps is not a number", of(rms_norm_eps=float("nan"))),
    ("dropout is not a number", of(attention_dropout=float("nan"))),
    ("layers must be", of(model_type="llava", text_config=dict(num_layers=10**7))),
    (
        "more than 10,000,000,000,000 parameters",
        of(vocab_size=10**8, hidden_size=96_000, num_hidden_layers=1000),
    ),
]


@pytest.mark.parametrize("words, text", FILES, ids=range(len(FILES)))
def test_a_file_that_is_no_config_gets_one_sentence(words, text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    refused(words, memory.step, tmp_path)


def test_no_published_config_is_refused_for_its_sizes():
    kinds = "llama gpt2 t5 bert mamba2 falcon cvt gemma3n llava clap nllb-moe doge"
    for kind in (*kinds.split(), "lxmert"):
        memory.load(tf.CONFIG_MAPPING[kind]())


def test_a_pipe_in_place_of_a_config_does_not_hang_nor_an_empty_folder(tmp_path):
    refused("a folder that has one", memory.load, tmp_path)
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        refused("no regular file", memory.load, path)


@pytest.mark.parametrize("named", [[], ["FalconForCausalLM"]])
def test_a_type_that_transformers_builds_needs_no_code_of_its_own(named, tmp_path):
    text = of(**FALCON_FILE | dict(architectures=named))
    (tmp_path / "config.json").write_text(text)
    config = memory.load(tmp_path)
    assert not hasattr(config, "auto_map")
    found, want = (memory.step(c, "qlora", seq=8) for c in (config, FALCON))
    assert found == want, "what is packed is ours to say"


PHI_4 = dict(  # a class that transformers has, and an auto_map that it does not need
    model_type="phi3",
    architectures=["Phi3ForCausalLM"],
    auto_map=dict(
        AutoConfig="configuration_phi3.Phi3Config",
        AutoModelForCausalLM="modeling_phi3.Phi3ForCausalLM",
    ),
    **sizes(5120, 40, 40, intermediate_size=17920, num_key_value_heads=10),
    vocab_size=100352,
    max_position_embeddings=16384,
    original_max_position_embeddings=16384,
    tie_word_embeddings=False,
    pad_token_id=100257,
    rope_theta=250000,
    rope_scaling=None,
    sliding_window=None,
)


def test_phi_4_has_its_published_count(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PHI_4))
    count = measure.count(memory.load(tmp_path))
    assert count["base"] == 14_659_507_200


def test_a_config_is_read_from_a_file_or_its_folder(tmp_path):
    config = llama()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    want = memory.step(config, seq=8)
    assert memory.step(tmp_path, seq=8) == want
    assert memory.step(str(tmp_path / "config.json"), seq=8) == want


def test_a_config_with_an_infinite_number_is_read(tmp_path):
    tf.Mamba2Config().save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert memory.load(tmp_path).time_step_limit == [0.0, float("inf")]


# The command


def test_the_command_prints_the_parts_and_the_card(capsys):
    arguments = "--config tiny-decoder --method qlora --r 4 --seq 32 --batch 2"
    assert command.main(arguments.split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == [*PARTS, "trains", "fits"]
    assert out[0].endswith(" GB")
    assert out[-1].endswith("T4 (16 GB, no bfloat16: use float16)")
    assert "38,912 of 957,568 (4.06%)" in out[-2]
    huge = dict.fromkeys(PARTS, 1e12) | dict(trainable=1, parameters=1, gpu=None)
    assert "none of them" in command.report(huge)


def test_the_command_says_that_the_bytes_are_of_one_gpu_of_several(capsys):
    line = "--config tiny-decoder --method full --seq 8 --gpus 4 --zero 3"
    assert command.main(line.split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "on each of  4 GPUs, ZeRO level 3"


def test_the_model_that_ships_is_counted_with_the_defaults(capsys):
    assert command.main(["--config", TINY]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "sequence    256 tokens, the model's maximum"
    assert memory.step(TINY) == memory.step(TINY, seq=256) != memory.step(TINY, seq=255)


FULL = dict(method="full", optimizer="sgd", dtype="bfloat16")
SOME = dict(targets=["q_proj", "v_proj"], checkpointing=True)
ONCE = dict(method="qlora", double_quant=False, device="cpu")
LINES = {
    "--method full --optimizer sgd --dtype bfloat16": FULL,
    "--targets q_proj,v_proj --checkpointing": SOME,
    "--method qlora --no-double-quant --device cpu": ONCE,
    "--targets all-linear --r 2 --batch 3": dict(r=2, batch=3),
    "--method lora8bit --kbit-prepared": dict(method="lora8bit", kbit_prepared=True),
    "--method inference --gpus 2 --zero 3": dict(method="inference", gpus=2, zero=3),
}


@pytest.mark.parametrize("line", LINES)
def test_the_options_of_the_command_are_those_of_step(line, capsys):
    options = ["--config", TINY, "--seq", "8", "--json", *line.split()]
    assert command.main(options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == memory.step(TINY, seq=8, **LINES[line])


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "--config"),
        ("--config x", "one of bert-base"),
        ("--config tiny-decoder --r many", "no whole number: 'many'"),
        ("--config tiny-decoder --metho lora", "unrecognized"),
        ("--config tiny-decoder --targets ,", "no linear layer is named"),
        (f"--config tiny-decoder --r {'9' * 5000}", "no whole number"),
        (f"--config tiny-decoder --{'x' * 10**5}", "unrecognized"),
    ],
)
def test_a_wrong_command_gets_one_sentence_and_status_2(line, words, capsys):
    try:
        status = command.main(line.split())
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert words in err and err.count("\n") == 1, err


def test_the_command_runs_or_fails_and_prints_nothing_else():
    def run(line):
        words = [sys.executable, "-m", "peftlab.memory", *line.split()]
        return subprocess.run(words, capture_output=True, text=True)

    done = run("--config tiny-decoder --method qlora --seq 8 --checkpointing --json")
    assert done.returncode == 0 and not done.stderr
    settings = dict(method="qlora", seq=8, checkpointing=True)
    assert json.loads(done.stdout) == memory.step(TINY, **settings)
    done = run("--config llama-5")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("no config 'llama-5'")
    assert done.stderr.count("\n") == 1
