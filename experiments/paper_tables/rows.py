"""The figures of the papers' tables, a row each, and how each is counted here.

A row's formula is the count worked out by hand; the count on the page is read off a
model that was really built, on the meta device, with the method added. A test checks
that the two are equal. A figure that we have not seen printed is left empty. Where the
printed one is neither the count nor a rounding of it, the note of that name in `notes`
says why, with the arithmetic.
"""

from dataclasses import dataclass

import torch

from experiments.paper_tables import shapes as s
from experiments.paper_tables.notes import INTRODUCTIONS
from peftlab import adapter, bitfit, dora, ia3, lora, prefix, prompt, vera


@dataclass(frozen=True)
class Row:
    setting: str
    printed: dict  # {"trainable", "total", "share", "of_all" or "fold": as printed}
    formula: int
    config: object = None  # without one there is nothing to build: the formula stands
    add: object = None
    note: str = ""


@dataclass(frozen=True)
class Group:
    title: str
    rows: list

    text = property(lambda self: INTRODUCTIONS[self.title])


def row(setting, trainable, formula, config=None, add=None, note="", **printed):
    printed |= dict(trainable=trainable) if trainable else {}
    return Row(setting, printed, formula, config, add, note)


def of(method, *args, **settings):
    """A method with its settings, still without a model."""
    return lambda model: method.add(model, *args, **settings)


# What the papers train that no reference file does.


def untied(model):
    """T5 1.1 has an output head of its own, which transformers 5 ties again."""
    size = (model.config.d_model, model.config.vocab_size)
    model.lm_head = torch.nn.Linear(*size, bias=False, device="meta")
    return model


def last_two(model):
    """Full fine-tuning of GPT-2's last two blocks."""
    model.requires_grad_(False).transformer.h[-2:].requires_grad_(True)
    return model


def norms(model):
    """T5's norms alone."""
    for name, p in model.named_parameters():
        p.requires_grad_("layer_norm" in name)
    return model


def lora_and_norms(model):
    for name, p in lora.add(model, T5_ALL, r=4).named_parameters():
        p.requires_grad_(p.requires_grad or "layer_norm" in name)
    return model


def lora_and_prompt(r):
    """Two methods on one model: LoRA inside, and a prompt around it."""

    def add(model):
        wrapped = prompt.add(model, 12)
        lora.add(model, QV, r=r)  # it freezes what is inside alone
        return wrapped

    return add


QV, QKVO = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj"]
BERT_QV, BERT_QK = ["query", "value"], ["query", "key"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP, HEAD = ["gate_proj", "up_proj", "down_proj"], ["lm_head"]
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
T5_ALL = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
D3 = 12288  # GPT-3's width; it has 96 layers

BERTS = [
    row("BERT-base", "110M", 109_482_240, s.BERT_BASE),
    row("BERT-large", "340M", 335_141_888, s.BERT_LARGE),
    row("RoBERTa-base", "125.0M", 124_645_632, s.ROBERTA_BASE, None, "roberta"),
    row("RoBERTa-large", "355.0M", 355_359_744, s.ROBERTA_LARGE, None, "roberta"),
    row("DeBERTa-XXL", "1500.0M", 1_564_549_632, s.DEBERTA_XXL, None, "deberta-xxl"),
]
GPTS = [
    row("GPT-2", "117M", 124_439_808, s.GPT2, None, "gpt2"),
    row("GPT-2 medium", "345M", 354_823_168, s.GPT2_MEDIUM, None, "gpt2"),
    row("GPT-2 large", "762M", 774_030_080, s.GPT2_LARGE, None, "gpt2"),
    row(
        *("GPT-2 medium, Hu et al.", "354.92M", 354_823_168, s.GPT2_MEDIUM),
        note="gpt2-m",
    ),
    row("GPT-2 large, Hu et al.", "774.03M", 774_030_080, s.GPT2_LARGE),
    row("GPT-3", "175B", 174_604_259_328, s.GPT3_FUSED),
]
LLAMAS = [
    row("LLaMA 7B", "6.7B", 6_738_415_616, s.LLAMA_7B),
    row("LLaMA 13B", "13.0B", 13_015_864_320, s.LLAMA_13B),
    row("LLaMA 33B", "32.5B", 32_528_943_616, s.LLAMA_33B),
    row("LLaMA 65B", "65.2B", 65_285_660_672, s.LLAMA_65B, None, "llama-65b"),
    row("Llama 2 70B", "70B", 68_976_648_192, s.LLAMA2_70B),
    row("Llama 3 8B", "8B", 8_030_261_248, s.LLAMA3_8B),
]

LORA = [
    row("RoBERTa-base, r=8", "0.3M", 294_912, s.ROBERTA_BASE, of(lora, BERT_QV, r=8)),
    row("RoBERTa-large, r=8", "0.8M", 786_432, s.ROBERTA_LARGE, of(lora, BERT_QV, r=8)),
    row(
        *("DeBERTa-XXL, r=16", "4.7M", 4_718_592, s.DEBERTA_XXL),
        *(of(lora, ["query_proj", "value_proj"], r=16), "deberta-rank"),
    ),
    row(
        *("DeBERTa-XXL, r=8", "", 2_359_296, s.DEBERTA_XXL),
        *(of(lora, ["query_proj", "value_proj"], r=8), "deberta-rank"),
    ),
    row(
        *("GPT-2 medium, r=4", "0.35M", 393_216, s.GPT2_MEDIUM),
        *(of(lora, ["c_attn"], r=4), "tenth"),
    ),
    row(
        *("GPT-2 large, r=4", "0.77M", 737_280, s.GPT2_LARGE),
        *(of(lora, ["c_attn"], r=4), "tenth"),
    ),
    row("GPT-2 M, last two blocks", "25.19M", 25_192_448, s.GPT2_MEDIUM, last_two),
    row("again in Table 13", "24M", 25_192_448, s.GPT2_MEDIUM, last_two, "top2"),
]


def gpt3(name, targets, r, printed, note=""):
    formula = 96 * len(targets) * 2 * D3 * r
    return row(f"{name}, r={r}", printed, formula, s.GPT3, of(lora, targets, r=r), note)


LORA_GPT3 = [
    gpt3("v", ["v_proj"], 2, "4.7M"),
    gpt3("q, v", QV, 1, "4.7M"),
    gpt3("q, v", QV, 2, "9.4M"),
    gpt3("q, k, v, o", QKVO, 1, "9.4M"),
    gpt3("q, v", QV, 4, "18.8M", "cut"),
    gpt3("q, k, v, o", QKVO, 2, "18.8M", "cut"),
    gpt3("q, v", QV, 8, "37.7M"),
    gpt3("q, k, v, o", QKVO, 4, "37.7M"),
    gpt3("q, v", QV, 64, "301.9M", "cut"),
    gpt3("q, k, v, o", QKVO, 64, "603.8M", "twice-cut"),
    gpt3("one matrix (Table 5)", ["q_proj"], 8, "18M", "cut"),
    gpt3("q, k, v, o (D.4)", QKVO, 2, "37.7M", "four"),
    row(
        *("q, v, r=4: times fewer", "", 18_874_368, s.GPT3_FUSED),
        *(of(lora, ["c_attn"], r=4), "fold"),
        fold="10,000×",
    ),
    *[
        row(
            *(
                f"q, v, r={r}, and 12 prompt tokens",
                printed,
                192 * 2 * D3 * r + 12 * D3,
            ),
            *(s.GPT3, lora_and_prompt(r), note),
        )
        for r, printed, note in (
            (8, "37.8M", "cut-sum"),
            (32, "151.1M", ""),
            (64, "302.1M", ""),
        )
    ],
]


def regret(name, targets, r, printed, formula):
    add = of(lora, targets + HEAD, r=r)
    return row(f"Llama 3.1 8B, {name}, r={r}", printed, formula, s.LLAMA3_8B, add)


EVERY_LINEAR = of(lora, "all-linear", r=64)
LORA_LLAMA = [
    row(
        *("LLaMA 7B, q and v, r=8", "", 4_194_304, s.LLAMA_7B),
        *(of(lora, QV, r=8), "tutorial"),
    ),
    row(
        *("LLaMA 7B, all, r=64", "159.9M", 159_907_840, s.LLAMA_7B),
        *(EVERY_LINEAR, "range"),
    ),
    row("LLaMA 13B, all, r=64", "250.3M", 250_347_520, s.LLAMA_13B, EVERY_LINEAR),
    row("T5-XL, all, r=4", "9.1M", 9_097_216, s.T5["XL"], lora_and_norms, "with-norms"),
    regret("MLP and head", MLP, 256, "0.49B", 486_866_944),
    regret("attention and head", ATTENTION, 256, "0.25B", 251_985_920),
    regret("all", ATTENTION + MLP, 256, "0.70B", 704_970_752),
    regret("MLP and head", MLP, 128, "0.24B", 243_433_472),
    regret("all", ATTENTION + MLP, 1, "3M", 2_753_792),
]


def five(config, method, r, printed, formula, note=""):
    """A row of DoRA's Table 1, which prints shares of all parameters."""
    name = f"{config}, {'DoRA' if method is dora else 'LoRA'} r={r}"
    shape = {"LLaMA 7B": s.LLAMA_7B, "LLaMA 13B": s.LLAMA_13B}.get(config, s.LLAMA3_8B)
    return row(name, "", formula, shape, of(method, FIVE, r=r), note, of_all=printed)


DORA = [
    five("LLaMA 7B", lora, 32, "0.83%", 56_098_816),
    five("LLaMA 7B", dora, 32, "0.84%", 56_975_360),
    five("LLaMA 7B", dora, 16, "0.43%", 28_925_952),
    five("LLaMA 13B", lora, 32, "0.67%", 87_818_240),
    five("LLaMA 13B", dora, 32, "0.68%", 89_190_400),
    five("LLaMA 13B", dora, 16, "0.35%", 45_281_280),
    five("Llama 3 8B", lora, 32, "0.70%", 56_623_104),
    five("Llama 3 8B", dora, 32, "0.71%", 57_409_536),
    five("Llama 3 8B", dora, 16, "0.35%", 29_097_984, "half-rank"),
]


def query_key(config, method, r, printed, note=""):
    """A row of VeRA's Table 1, on query and key."""
    shape = {"RoBERTa-base": s.ROBERTA_BASE, "RoBERTa-large": s.ROBERTA_LARGE}
    shape, targets = shape.get(config, s.GPT3), BERT_QK
    if config == "GPT-3":
        targets = ["q_proj", "k_proj"]
    matrices, d = 2 * shape.num_hidden_layers, shape.hidden_size
    formula = matrices * (2 * d * r if method is lora else d + r)
    name = f"{config}, {'LoRA' if method is lora else 'VeRA'} r={r}"
    return row(name, printed, formula, shape, of(method, targets, r=r), note)


BROAD = of(vera, "all-linear", r=1024)
VERA = [
    query_key("RoBERTa-base", lora, 1, "36.8K", "vera-cut"),
    query_key("RoBERTa-base", vera, 1, "18.4K", "vera-cut"),
    query_key("RoBERTa-base", lora, 16, "589.8K"),
    query_key("RoBERTa-base", vera, 16, "18.8K"),
    query_key("RoBERTa-base", lora, 256, "9437.1K", "vera-cut"),
    query_key("RoBERTa-base", vera, 256, "24.5K", "vera-cut"),
    query_key("RoBERTa-large", lora, 1, "98.3K"),
    query_key("RoBERTa-large", vera, 1, "49.2K"),
    query_key("RoBERTa-large", lora, 16, "1572.8K", "vera-cut"),
    query_key("RoBERTa-large", vera, 16, "49.5K", "vera-16"),
    query_key("RoBERTa-large", lora, 256, "25165.8K"),
    query_key("RoBERTa-large", vera, 256, "61.4K"),
    query_key("GPT-3", lora, 1, "4.7M"),
    query_key("GPT-3", vera, 1, "2.4M"),
    query_key("GPT-3", lora, 16, "75.5M"),
    query_key("GPT-3", vera, 16, "2.8M", "vera-shared"),
    query_key("GPT-3", lora, 256, "1207.9M", "vera-cut"),
    query_key("GPT-3", vera, 256, "8.7M", "vera-shared"),
    row(
        *("RoBERTa-base, q and v, r=1024", "0.043M", 43_008, s.ROBERTA_BASE),
        of(vera, BERT_QV, r=1024),
    ),
    row(
        *("RoBERTa-large, q and v, r=256", "0.061M", 61_440, s.ROBERTA_LARGE),
        of(vera, BERT_QV, r=256),
    ),
    row(
        *("LLaMA 7B, all, r=256", "1.4M", 1_417_216, s.LLAMA_7B),
        of(vera, "all-linear", r=256),
    ),
    row("LLaMA 7B, all, r=1024", "1.6M", 1_589_248, s.LLAMA_7B, BROAD),
    row("LLaMA 13B, all, r=1024", "2.4M", 2_416_640, s.LLAMA_13B, BROAD),
]


def bottleneck(config, placement, m, printed, formula, note=""):
    shape = {"BERT-base": s.BERT_BASE, "GPT-3": s.GPT3_WIDTH}
    add = of(adapter, placement, bottleneck=m)
    name = f"{config}, {placement.title()}, m={m}"
    return row(name, printed, formula, shape.get(config, s.ROBERTA_LARGE), add, note)


ADAPTERS = [
    bottleneck("GPT-3", "houlsby", 1, "7.1M", 7_078_080),
    bottleneck("GPT-3", "houlsby", 4, "21.2M", 21_234_432),
    bottleneck("GPT-3", "houlsby", 8, "40.1M", 40_109_568),
    bottleneck("GPT-3", "houlsby", 16, "77.9M", 77_859_840),
    bottleneck("GPT-3", "houlsby", 64, "304.4M", 304_361_472),
    bottleneck("RoBERTa-large", "pfeiffer", 16, "0.8M", 811_392),
    bottleneck("RoBERTa-large", "houlsby", 8, "0.8M", 835_968),
    bottleneck("RoBERTa-large", "pfeiffer", 64, "3.0M", 3_171_840, "mebi"),
    bottleneck("RoBERTa-large", "houlsby", 64, "6.0M", 6_343_680, "mebi"),
    bottleneck("BERT-base", "pfeiffer", 48, "", 894_528, "one-percent"),
    bottleneck("BERT-base", "houlsby", 48, "", 1_789_056, "one-percent"),
]

T5_IA3 = dict(Small=34_816, Base=104_448, Large=282_624, XL=540_672, XXL=1_081_344)
LLAMA_IA3 = of(ia3, ["k_proj", "v_proj"], ["down_proj"])
BIASES, SOME = of(bitfit), of(bitfit, targets=["query", "intermediate.dense"])
SMALL = [
    row("BitFit, BERT-base", "", 102_912, s.BERT_BASE, BIASES, "bitfit", share="0.09%"),
    row(
        "BitFit, BERT-large", "", 272_384, s.BERT_LARGE, BIASES, "bitfit", share="0.08%"
    ),
    row("BitFit, query and intermediate", "", 46_080, s.BERT_BASE, SOME, "two-biases"),
    row("BitFit, RoBERTa-base", "0.1M", 102_912, s.ROBERTA_BASE, BIASES),
    row("norms, T5-XL", "250K", 122 * 2048, s.T5["XL"], norms),
    *[
        row(
            *(f"IA3, T5-{size}", "540K" if size == "XL" else "", formula),
            *(s.T5[size], of(ia3, ["k", "v"], ["wo"])),
            "ia3-cut" if size == "XL" else "",
        )
        for size, formula in T5_IA3.items()
    ],
    row("IA3, LLaMA 7B", "", 614_400, s.LLAMA_7B, LLAMA_IA3),
]

T5_BASES = dict(Small=76_961_152, Base=247_577_856, Large=783_150_080)
T5_BASES |= dict(XL=2_849_757_184, XXL=11_135_332_352)
LENGTHS = (1, 5, 20, 50, 100, 150)
LESTER = {  # trainable, total and percent, as printed, for each of LENGTHS
    "Small": """
        512 76,961,664 0.00067% | 2,560 76,963,712 0.00333% | 10,420 76,971,572 0.01330%
        | 25,600 76,986,752 0.03325% | 51,200 77,012,352 0.06648%
        | 76,800 77,037,952 0.09969%""",
    "Base": """
        768 247,578,624 0.00031% | 3,840 247,581,696 0.00155%
        | 15,360 247,593,216 0.00620% | 38,400 247,616,256 0.01551%
        | 76,800 247,654,656 0.03101% | 115,200 247,693,056 0.04651%""",
    "Large": """
        1,024 783,151,104 0.00013% | 5,120 783,155,200 0.00065%
        | 20,480 783,170,560 0.00262% | 51,200 783,201,280 0.00654%
        | 102,400 783,252,480 0.01907% | 153,600 783,303,680 0.01961%""",
    "XL": """
        2,048 2,849,759,232 0.00007% | 10,240 2,849,767,424 0.00036%
        | 40,960 2,849,798,144 0.00143% | 102,400 2,849,859,584 0.00359%
        | 204,800 2,849,961,984 0.00718% | 307,200 2,850,064,384 0.01078%""",
    "XXL": """
        4,096 11,135,336,448 0.00004% | 20,480 11,135,352,832 0.00018%
        | 81,920 11,135,414,272 0.00074% | 204,800 11,137,380,352 0.00184%
        | 409,600 11,135,741,952 0.00368% | 614,400 11,135,946,752 0.00552%""",
}
SLIPS = {("Small", 20): "swapped", ("Large", 100): "nine", ("XXL", 50): "tenfold"}
SLIPS |= {("XL", 20): "xl-cut", ("XL", 100): "xl-cut"}


def prompt_of(n):
    return lambda model: prompt.add(untied(model), n)


def lester(size):
    config = s.T5[size]
    yield row("no prompt", "", T5_BASES[size], config, untied)
    for n, figures in zip(LENGTHS, LESTER[size].split("|"), strict=True):
        trainable, total, share = figures.split()
        name, formula = f"{n} token{'s' * (n > 1)}", n * config.d_model
        how = (config, prompt_of(n), SLIPS.get((size, n), ""))
        yield row(name, trainable, formula, *how, total=total, of_all=share)


def gpt3_prompt(n, printed, note=""):
    name, n = f"GPT-3, {n} and 8 tokens", n + 8
    return row(name, printed, n * D3, s.GPT3, of(prompt, n), note)


def both_stacks(n, printed, note=""):
    add = of(prompt, n, decoder=True)
    return row(f"T5-XL, {n} tokens", printed, 2 * n * 2048, s.T5["XL"], add, note)


def prefixed(name, formula, n, note="", hidden=None, **printed):
    add = of(prefix, n, hidden=hidden)
    return row(f"GPT-2 M, {name}", "", formula, s.GPT2_MEDIUM, add, note, **printed)


SOFT = [
    gpt3_prompt(32, "0.4M", "forty"),
    gpt3_prompt(64, "0.9M"),
    gpt3_prompt(128, "1.7M"),
    gpt3_prompt(256, "3.2M"),
    gpt3_prompt(512, "6.4M"),
    both_stacks(10, "41K"),
    both_stacks(100, "409K", "stacks-cut"),
    prefixed("prefix of 5", 245_760, 5, share="0.1%"),
    prefixed("prefix of 10", 491_520, 10, share="0.1%"),
    prefixed("the same from an MLP", 25_750_016, 10, "mlp", hidden=512),
]


def prelayer(before, inside, printed):
    n = before + inside
    name = f"PreLayer, {before} and {inside} tokens"
    return row(name, printed, 96 * D3 * n, note="prelayer")


OPEN = [
    row("the model", "175,255.8M", 174_604_259_328, s.GPT3_FUSED, None, "gpt3-all"),
    row("BitFit", "14.2M", 12_988_416, s.GPT3_FUSED, BIASES, "gpt3-biases"),
    prelayer(2, 2, "5.1M"),
    prelayer(8, 0, "10.1M"),
    prelayer(8, 8, "20.2M"),
    prelayer(32, 4, "44.1M"),
    prelayer(64, 0, "76.1M"),
    row("LoRA r=8 and PreLayer 8, 4", "52.8M", 51_904_512, note="prelayer-sum"),
]

GROUPS = [
    Group("Models: encoders", BERTS),
    Group("Models: GPT", GPTS),
    Group("Models: Llama", LLAMAS),
    Group("LoRA on encoders and GPT-2", LORA),
    Group("LoRA on GPT-3", LORA_GPT3),
    Group("LoRA on Llama and T5", LORA_LLAMA),
    Group("DoRA", DORA),
    Group("VeRA", VERA),
    Group("Bottleneck adapters", ADAPTERS),
    Group("BitFit, norms and IA3", SMALL),
    *[Group(f"Prompt tuning: T5 {size}", [*lester(size)]) for size in LESTER],
    Group("Prompt and prefix tuning elsewhere", SOFT),
    Group("What does not come out", OPEN),
]
