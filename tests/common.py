"""What the tests of all methods share: small models, snapshots, comparisons."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from peftlab.kit import base_models

IDS = torch.arange(22).reshape(2, 11) % 11
ALL = "q_proj c_attn c_proj proj".split()  # the linears of Net but its head
SMALL = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2)


class Net(nn.Module):
    """A decoder's stand-in with every sort of layer that LoRA meets, in float64."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q_proj = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.c_attn = Conv1D(12, 8)  # GPT-2's: 8 in, 12 out, the weight is (8, 12)
        self.c_proj = Conv1D(12, 12)  # square: a wrong transpose still fits
        self.proj = nn.Linear(12, 12, bias=False)
        self.lm_head = nn.Linear(12, 11)

    def forward(self, ids):
        x = self.norm(torch.tanh(self.q_proj(self.embed(ids))))
        x = self.c_proj(torch.tanh(self.c_attn(x)))
        return self.lm_head(torch.tanh(self.proj(torch.tanh(x))))

    def get_output_embeddings(self):
        return self.lm_head


def seeded(model, seed=0):
    """The model with every weight random, biases and norms too (none 0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() == 1:
            noise = 0.3 * noise + name.endswith("weight")  # a norm's is about 1
        else:
            noise /= math.sqrt(p.shape[-1])
        p.data = noise.to(p.dtype)
    return model.eval()


def net():
    return seeded(Net().double())


def train(model, steps=3):
    """A few steps of gradient descent on whatever is trainable; the model."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(IDS) - 1).pow(2).mean().backward()
        optimizer.step()
    return model


def snapshot(model):
    """All that must not move when something raises: values, flags, types."""
    values = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    kinds = {n: (type(m), m.training) for n, m in model.named_modules()}
    return values, flags, kinds


def assert_unchanged(model, before):
    values, flags, kinds = snapshot(model)
    assert kinds == before[2], "a layer was replaced although the call raised"
    assert flags == before[1], "requires_grad was changed although the call raised"
    assert values.keys() == before[0].keys()
    moved = [n for n, t in values.items() if not torch.equal(t, before[0][n])]
    assert not moved, f"weights were changed although the call raised: {moved}"


def assert_one_sentence(error):
    message = str(error.value)
    assert message and "\n" not in message, f"not one clear line: {message!r}"
    assert len(message) < 500, f"too long to be one clear sentence: {message!r}"


def refused(model, words, call, *args, **settings):
    """The call raises one sentence with these words, and the model is as it was."""
    before = isinstance(model, nn.Module) and snapshot(model)
    with pytest.raises(ValueError, match=words or None) as error:
        call(model, *args, **settings)
    assert_one_sentence(error)
    if before:
        assert_unchanged(model, before)


def by_fault(broken):
    """{what is broken: (law, changes)} from {law: {what is broken: changes}}."""
    faults = {}
    for law, cases in broken.items():
        for what, changes in cases.items():
            assert what not in faults, f"two mutations are called {what!r}"
            faults[what] = law, changes
    return faults


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def bert(kind=BertForSequenceClassification):
    config = BertConfig(**SMALL, num_attention_heads=4, num_labels=3)
    return seeded(kind(config))


def gpt2():
    return seeded(
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4))
    )


def llama():
    """One key-value head for four query heads, and biases in the attention."""
    heads = dict(num_attention_heads=4, num_key_value_heads=1, attention_bias=True)
    return seeded(LlamaForCausalLM(LlamaConfig(**SMALL, **heads)))


def t5():
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ids = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return seeded(T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes, **ids)))


def jiggle(tensors, seed=5):
    """Every tensor a little different, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for t in tensors:
        t.data += torch.randn(t.shape, generator=generator) / 10


MODELS = {
    "tiny-decoder": lambda: base_models.load("tiny-decoder", device="cpu")[0],
    "bert": bert,
    "bert-model": lambda: bert(BertModel),
    "gpt2": gpt2,
    "llama": llama,
}
BATCH = dict(
    input_ids=torch.arange(3, 27).reshape(3, 8),
    attention_mask=torch.tensor([[1] * 8, [1] * 8, [1] * 5 + [0] * 3]),
)


def assert_same(got, want, what):
    """Equal to 1e-5, and to 1e-5 of the largest where numbers are above 1."""
    gap, size = (got - want).abs().max(), want.abs().max()
    assert gap <= 1e-5 * max(1, size), f"{what} differs from peft's by {gap:.1e}"


def outputs(model):
    """All outputs in a row; a decoder beside an encoder reads the same ids."""
    two = getattr(model.config, "is_encoder_decoder", False)
    more = dict(decoder_input_ids=BATCH["input_ids"]) if two else {}
    found = model(**BATCH, **more).values()
    return torch.cat([t.flatten() for t in found if torch.is_tensor(t)])


def assert_same_training(model, own, twin, theirs, steps=2):
    """The same outputs, gradients and tensors before, between and after SGD steps; own
    and theirs are {name: parameter}, by our names, of our model and of peft's."""
    assert own.keys() == theirs.keys(), "not the same parameters are trained"
    theirs = {name: theirs[name] for name in own}
    for step in range(steps + 1):
        rows, gradients = [], []
        for m, parameters in ((model, own), (twin, theirs)):
            torch.manual_seed(step)  # the same dropout where there is some
            rows.append(row := outputs(m))
            loss = (row * torch.cos(torch.arange(len(row)))).sum() / len(row) ** 0.5
            gradients.append(torch.autograd.grad(loss, [*parameters.values()]))
        assert_same(*rows, f"step {step}: the output")
        for name, ours, peft in zip(own, *gradients, strict=True):
            assert_same(own[name], theirs[name], f"step {step}: {name}")
            assert_same(ours, peft, f"step {step}: the gradient of {name}")
        largest = max(g.abs().max() for g in gradients[0])
        assert 0.05 < largest < 20, f"gradients of {largest:.1g} would prove little"
        for parameters, found in zip((own, theirs), gradients, strict=True):
            for p, g in zip(parameters.values(), found, strict=True):
                p.data -= 0.01 * g


def assert_same_merged(merged, theirs):
    """Two plain models with the same weights: ours merged, and peft's."""
    wanted = theirs.state_dict()
    assert merged.state_dict().keys() == wanted.keys()
    for name, t in merged.state_dict().items():
        assert_same(t, wanted[name], f"the merged {name}")
