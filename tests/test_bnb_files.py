"""Weights in 4 bits under bitsandbytes' names, both ways; bad entries: one sentence,
nothing changed."""

import copy
import json

import bitsandbytes
import pytest
import torch
from common import (
    BATCH,
    MODELS,
    assert_one_sentence,
    assert_unchanged,
    gpt2,
    jiggle,
    refused,
    snapshot,
    t5,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
)

from peftlab import (
    bnb_files,
    dora,
    ia3,
    int8,
    lora,
    nf4,
    peft_files,
    qlora,
    surgery,
    vera,
)
from peftlab.kit import base_models

FULL = torch.float32  # to compute in, so that comparisons are exact
KINDS = {"nf4": nf4.NF4, "fp4": nf4.FP4}
JSON = ".quant_state.bitsandbytes__nf4"


def theirs(linear, kind="nf4", nested=False, dtype=torch.float32, blocksize=64):
    """bitsandbytes' packed linear, as it is before any forward pass repacks it."""
    n_out, n_in = linear.weight.shape
    settings = dict(compress_statistics=nested, quant_type=kind, compute_dtype=FULL)
    layer = bitsandbytes.nn.Linear4bit(n_in, n_out, linear.bias is not None, **settings)
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data.to(dtype),
        requires_grad=False,
        compress_statistics=nested,
        quant_type=kind,
        blocksize=blocksize,
    )
    if linear.bias is not None:
        layer.bias = linear.bias
    return layer.to("cpu")


def linear(n_out=96, n_in=64, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(n_in, n_out)


def pack(base, nested=False, blocksize=64, code=nf4.NF4):
    return nf4.NF4Linear(base, blocksize, nested, FULL, code)


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert got[name].dtype == t.dtype, name
        assert torch.equal(got[name], t), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocksize", [64, 256])
def test_the_tensors_of_a_layer_are_bitsandbytes(kind, dtype, blocksize):
    base = linear().to(dtype)
    want = theirs(base, kind, dtype=dtype, blocksize=blocksize).state_dict(prefix="0.")
    layer = pack(base, blocksize=blocksize, code=KINDS[kind])
    assert_same_tensors(bnb_files.packed_state_dict(nn.Sequential(layer)), want)


def test_a_doubly_quantized_layer_is_bitsandbytes_but_for_its_table_of_bins():
    base = linear(1024, 512)
    want = theirs(base, nested=True).state_dict(prefix="0.")
    got = bnb_files.packed_state_dict(nn.Sequential(pack(base, nested=True)))
    codes = [d.pop("0.weight.absmax") for d in (got, want)]
    assert_same_tensors(got, want)
    assert codes[0].shape == codes[1].shape and codes[0].dtype == codes[1].dtype
    gap = (codes[0].int() - codes[1].int()).abs()
    assert gap.max() <= 1 and 0 < gap.float().mean() < 0.01, "see nf4's double rounding"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_bitsandbytes_packed_is_read_to_the_bit(kind, nested):
    base = linear()
    packed = theirs(base, kind, nested)
    tensors = packed.state_dict(prefix="0.")
    model = bnb_files.load_packed(nn.Sequential(linear(seed=1)), tensors, FULL)
    layer, state = model[0], packed.weight.quant_state
    assert torch.equal(layer.codes, packed.weight.data)
    want = bitsandbytes.functional.dequantize_4bit(packed.weight.data, state)
    assert torch.equal(layer.weight, want)  # 64 wide: where their kernel is right
    assert torch.equal(layer.bias, base.bias)
    assert_same_tensors(bnb_files.packed_state_dict(model), tensors)


def test_another_storage_type_is_the_same_bytes():
    base = linear()
    tensors = theirs(base).state_dict(prefix="0.")
    stored = tensors["0.weight"].view(-1).view(torch.bfloat16)
    tensors["0.weight"] = stored.view(-1, 1)  # what quant_storage=bfloat16 makes of it
    layer = bnb_files.load_packed(nn.Sequential(linear(seed=1)), tensors, FULL)[0]
    assert torch.equal(layer.weight, pack(base).weight)


def test_a_loaded_layer_has_its_own_memory():
    tensors = {k: t.clone() for k, t in packed_twin().items()}
    tensors["0.weight.nested_absmax"].requires_grad_()  # nor any tie to a graph
    model = bnb_files.load_packed(nn.Sequential(linear(seed=1)), tensors, FULL)
    before = model[0].weight.clone()
    assert not before.requires_grad
    with torch.no_grad():
        for t in tensors.values():
            t.zero_()
    assert torch.equal(model[0].weight, before) and before.any()


@pytest.mark.parametrize("name", [*MODELS, "t5"])
def test_a_whole_model_goes_round(name):
    build = {**MODELS, "t5": t5}[name]
    model = qlora.add(build(), compute_dtype=FULL, r=2)
    jiggle(lora.state_dict(model).values())
    tensors = bnb_files.packed_state_dict(model)
    assert not [k for k in tensors if "lora" in k or ".base" in k]
    fresh = build()
    for p in fresh.parameters():
        p.data += 1
    fresh = bnb_files.load_packed(fresh, tensors, FULL)
    assert surgery.select(fresh, "all-linear")
    lora.add(fresh, "all-linear", r=2)
    lora.load_state_dict(fresh, lora.state_dict(model))
    two = dict(decoder_input_ids=BATCH["input_ids"]) if name == "t5" else {}
    a, b = (m(**BATCH, **two)[0] for m in (model, fresh))
    assert (a - b).abs().max() < 1e-5
    assert_same_tensors(bnb_files.packed_state_dict(fresh), tensors)


def test_a_gpt2_is_its_linears_again_after_a_16_bit_merge():
    tensors = bnb_files.packed_state_dict(qlora.add(gpt2(), compute_dtype=FULL))
    model = lora.add(bnb_files.load_packed(gpt2(), tensors, FULL), "all-linear")
    kinds = [type(m) for m in qlora.merge(model, 16).modules()]
    assert kinds == [type(m) for m in gpt2().modules()]


def four_bits(nested, **more):
    settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", **more)
    settings |= dict(bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=FULL)
    return BitsAndBytesConfig(**settings)


def checkpoint(folder, tensors, nested):
    """A 4-bit checkpoint as transformers saves them: the config says what it is."""
    config = json.loads(
        (base_models.MODELS / "tiny-decoder" / "config.json").read_text()
    )
    settings = four_bits(nested)
    config |= dict(quantization_config=settings.to_dict(), dtype="float32")
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("nested", [False, True])
def test_transformers_loads_the_file_that_we_write(tmp_path, nested):
    model = base_models.load("tiny-decoder", device="cpu")[0]
    model = qlora.add(model, double_quant=nested, compute_dtype=FULL)
    tensors = bnb_files.packed_state_dict(model)
    checkpoint(tmp_path, tensors, nested)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    layer = loaded.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    for path, m in loaded.named_modules():
        if isinstance(m, bitsandbytes.nn.Linear4bit):
            assert torch.equal(m.weight.data, tensors[f"{path}.weight"]), path
            assert m.weight.quant_state.nested is nested
    loaded.train()  # in eval mode some CPUs repack the weight in 16 bits
    gap = (loaded(**BATCH).logits - model.train()(**BATCH).logits).abs().max()
    assert gap < 1e-4, f"the same file gives other logits, by {gap:.1e}"


def test_transformers_loads_a_classifier_whose_head_is_named(tmp_path):
    """It would take the head for packed; no class of ours packs one."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, vocab_size=64)
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    model = qlora.add(BertForSequenceClassification(config), compute_dtype=FULL).eval()
    assert type(model.classifier) is nn.Linear
    tensors = bnb_files.packed_state_dict(model)
    settings = four_bits(True, llm_int8_skip_modules=["classifier"])
    config.quantization_config, config.dtype = settings.to_dict(), "float32"
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    kind = BertForSequenceClassification
    loaded = kind.from_pretrained(tmp_path, device_map="cpu").train()
    for m in loaded.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    ids = torch.arange(1, 17)[None]
    gap = (loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    assert gap < 1e-4, f"the same file gives other logits, by {gap:.1e}"


@pytest.mark.parametrize("nested", [False, True])
def test_we_load_the_file_that_transformers_writes(tmp_path, nested):
    settings = four_bits(nested)
    folder = base_models.MODELS / "tiny-decoder"
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=FULL
    )
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = base_models.load("tiny-decoder", device="cpu")[0]
    for p in model.parameters():
        p.data += 1
    model = bnb_files.load_packed(model, tensors, FULL)
    packed = {p for p, m in model.named_modules() if isinstance(m, nf4.NF4Linear)}
    assert len(packed) == 28
    gap = (theirs.train()(**BATCH).logits - model(**BATCH).logits).abs().max()
    assert gap < 1e-4


def lora_layer():
    return lora.add(nn.Sequential(linear()), ["0"])[0]


def packed_twin():
    return bnb_files.packed_state_dict(nn.Sequential(pack(linear(), nested=True)))


def single(**entries):
    tensors = bnb_files.packed_state_dict(nn.Sequential(pack(linear(), nested=False)))
    return tensors | {f"0.weight.{k}": t for k, t in entries.items()}


def renamed(old, new):
    return {k.replace(old, new, 1): t for k, t in packed_twin().items()}


def plus(**entries):
    return packed_twin() | {f"0.{k}": t for k, t in entries.items()}


def changed(**entries):
    """A good file with entries replaced (None: left out)."""
    tensors = packed_twin() | {f"0.weight.{k}": t for k, t in entries.items()}
    return {k: t for k, t in tensors.items() if t is not None}


def state(**changes):
    key = f"0.weight{JSON}"
    tensors = packed_twin()
    about = json.loads(bytes(tensors[key].tolist())) | changes
    about = {k: v for k, v in about.items() if v is not None}
    text = bytearray(json.dumps(about), "utf8")
    return tensors | {key: torch.frombuffer(text, dtype=torch.uint8)}


BAD_FILES = {
    "nothing packed": lambda: linear().state_dict(prefix="0."),
    "empty": dict,
    "no absmax": lambda: changed(absmax=None),
    "half an absmax": lambda: changed(absmax=packed_twin()["0.weight.absmax"][:50]),
    "absmax in float": lambda: changed(absmax=torch.rand(96)),
    "no values": lambda: changed(quant_map=None),
    "too many values": lambda: changed(quant_map=torch.rand(256)),
    "no nested absmax": lambda: changed(nested_absmax=None),
    "no 8-bit type": lambda: changed(nested_quant_map=None),
    "an 8-bit type of integers": lambda: changed(nested_quant_map=torch.arange(256)),
    "an 8-bit type of nothing": lambda: state(nested_offset=None),
    "another 8-bit type": lambda: changed(nested_quant_map=torch.rand(256)),
    "something unknown": lambda: changed(zero_point=torch.rand(3)),
    "no codes": lambda: {k: t for k, t in packed_twin().items() if k != "0.weight"},
    "half of the codes": lambda: plus(weight=packed_twin()["0.weight"][:99]),
    "a bias of integers": lambda: plus(bias=torch.ones(96, dtype=torch.int32)),
    "a complex bias": lambda: plus(bias=torch.ones(96, dtype=torch.complex64)),
    "a name of fp4 on a weight in nf4": lambda: renamed("__nf4", "__fp4"),
    "a bias too long": lambda: plus(bias=torch.rand(97)),
    "no bias": lambda: {k: t for k, t in packed_twin().items() if k != "0.bias"},
    "one tensor more": lambda: packed_twin() | {"1.weight": torch.rand(3, 3)},
    "another path": lambda: renamed("0.", "7."),
    "no JSON": lambda: plus(**{f"weight{JSON}": torch.arange(30, dtype=torch.uint8)}),
    "no shape": lambda: state(shape=None),
    "another shape": lambda: state(shape=[64, 96]),
    "no dtype": lambda: state(dtype="float7"),
    "an integer dtype": lambda: state(dtype="int8"),
    "a block size of 7": lambda: state(blocksize=7),
    "a block size of 128": lambda: state(blocksize=128),
    "nested blocks of 64": lambda: state(nested_blocksize=64),
    "an offset that is NaN": lambda: state(nested_offset=float("nan")),
    "an offset of 400 digits": lambda: state(nested_offset=10**400),
    "a type that it is not": lambda: state(quant_type="fp4"),
    "a type that is not there": lambda: state(quant_type="int8"),
    "infinite scales": lambda: changed(nested_absmax=torch.full((1,), torch.inf)),
    "negative scales": lambda: changed(nested_absmax=torch.full((1,), -1.0)),
    "negative absmax": lambda: single(absmax=-single()["0.weight.absmax"]),
    "a nested absmax too many": lambda: single(nested_absmax=torch.ones(1)),
    "a bias that is NaN": lambda: plus(bias=torch.full((96,), torch.nan)),
    "a bias past float32": lambda: plus(
        bias=torch.full((96,), 1e300, dtype=torch.double)
    ),
    "a state of one number": lambda: plus(**{f"weight{JSON}": torch.tensor(2**60)}),
    "codes without a shape": lambda: plus(weight=torch.tensor(1.0)),
    "sparse codes": lambda: plus(weight=torch.eye(3).to_sparse()),
    "codes without memory": lambda: plus(weight=packed_twin()["0.weight"].to("meta")),
    "codes that are a text": lambda: plus(weight="codes"),
    "no tensor": lambda: plus(bias=None),
    "a name that is none": lambda: packed_twin() | {3: torch.zeros(3)},
    "a number": lambda: 5,
    "a tensor": lambda: torch.ones(3),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_refused_and_nothing_is_changed(what):
    model = nn.Sequential(linear(seed=1))
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        bnb_files.load_packed(model, BAD_FILES[what](), FULL)
    assert_one_sentence(error)
    assert_unchanged(model, before)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(64), nn.Embedding(96, 64), nn.Conv1d(64, 96, 1), lora_layer()],
)
def test_four_bits_go_into_linears_only(layer):
    model = nn.Sequential(layer)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no linear '0'") as error:
        bnb_files.load_packed(model, packed_twin())
    assert_one_sentence(error)
    assert_unchanged(model, before)


def test_a_wrong_dtype_to_compute_in_is_named():
    with pytest.raises(ValueError, match="compute_dtype") as error:
        bnb_files.load_packed(nn.Sequential(linear()), packed_twin(), "bf16")
    assert_one_sentence(error)


def test_a_packed_model_takes_other_bytes():
    model = nn.Sequential(pack(linear(seed=1)))
    model = bnb_files.load_packed(model, packed_twin(), FULL)
    assert_same_tensors(bnb_files.packed_state_dict(model), packed_twin())


def test_modules_with_two_names_go_round():
    """An encoder's and a decoder's embedding may be one module, and so may linears."""

    def build():
        model = t5()
        model.resize_token_embeddings(48)
        model.twin = model.encoder.block[0].layer[0].SelfAttention.q
        return model

    model = qlora.add(build(), compute_dtype=FULL)
    tensors = bnb_files.packed_state_dict(model)
    places = [t.data_ptr() for t in tensors.values() if t.data_ptr()]
    assert len(places) == len(set(places)), "a tensor is there twice"
    fresh = bnb_files.load_packed(build(), tensors, FULL)
    two = dict(decoder_input_ids=BATCH["input_ids"])
    gap = (fresh(**BATCH, **two)[0] - model(**BATCH, **two)[0]).abs().max()
    assert gap < 1e-5  # a product may round by where its factors lie in memory
    assert fresh.twin is fresh.encoder.block[0].layer[0].SelfAttention.q


def test_a_file_of_another_model_is_refused():
    tensors = bnb_files.packed_state_dict(qlora.add(MODELS["llama"]()))
    for model in (MODELS["tiny-decoder"](), MODELS["bert"](), nn.Sequential()):
        before = snapshot(model)
        with pytest.raises(ValueError) as error:
            bnb_files.load_packed(model, tensors)
        assert_one_sentence(error)
        assert_unchanged(model, before)


def test_a_model_without_memory_is_refused():
    model = nn.Sequential(linear().to("meta"))
    with pytest.raises(ValueError, match="meta") as error:
        bnb_files.load_packed(model, packed_twin())
    assert_one_sentence(error)


def test_what_bitsandbytes_does_not_have_is_not_written():
    layers = [pack(linear(), code=nf4.INT4), pack(linear(), blocksize=48)]
    layers.append(pack(linear()).double())
    for model in (*map(nn.Sequential, layers), nn.Sequential(linear())):
        with pytest.raises(ValueError) as error:
            bnb_files.packed_state_dict(model)
        assert_one_sentence(error)


def test_writing_changes_nothing():
    model = qlora.add(MODELS["bert"]())
    before = snapshot(copy.deepcopy(model))
    bnb_files.packed_state_dict(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["tiny-decoder", "gpt2"])
def test_an_adapter_goes_through_its_file_onto_a_packed_base(name, tmp_path):
    model = qlora.add(MODELS[name](), compute_dtype=FULL, r=2)
    jiggle(lora.state_dict(model).values())
    peft_files.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (name == "gpt2"), "a packed Conv1D is one still"
    fresh = bnb_files.load_packed(
        MODELS[name](), bnb_files.packed_state_dict(model), FULL
    )
    fresh = peft_files.load(fresh, tmp_path)
    assert (fresh(**BATCH).logits - model(**BATCH).logits).abs().max() < 1e-5


PACKINGS = [
    int8.Int8Linear,
    pack,
    lambda base: lora.add(nn.Sequential(base), ["0"])[0].base,  # plain
    lambda base: qlora.add(nn.Sequential(base), compute_dtype=FULL)[0].base,
]
ADDITIONS = {  # and what a file for another base is refused for
    "LoRA": (lora.add, "another model"),
    "VeRA": (vera.add, "another model"),
    "IA3": (lambda model, targets: ia3.add(model, targets, []), "another model"),
    "DoRA": (dora.add, "packed|another model"),
    "PiSSA": (None, "packed|another model"),
}


@pytest.mark.parametrize("kind", ADDITIONS)
def test_a_misfit_adapter_is_refused_and_a_packed_base_is_left_as_it_was(
    kind, tmp_path
):
    add, words = ADDITIONS[kind]
    model = nn.Sequential(linear(64, 64))
    if add is None:
        config = LoraConfig(init_lora_weights="pissa", target_modules=["0"])
        get_peft_model(model, config).save_pretrained(tmp_path)
    else:
        peft_files.save(add(model, ["0"]), tmp_path)
    for packing in PACKINGS:
        refused(
            nn.Sequential(packing(linear(96, 64))), words, peft_files.load, tmp_path
        )
