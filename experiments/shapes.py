"""The models of the papers as sizes alone: configs, and no weights anywhere.

What a config does not say is the class's default, which is the published model's."""

from transformers import (
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
)


def encoder(config, width, layers, **more):
    sizes = dict(hidden_size=width, num_hidden_layers=layers)
    sizes |= dict(num_attention_heads=width // 64, intermediate_size=4 * width)
    return config(**sizes, **more)


def roberta(width, layers):
    words = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return encoder(RobertaConfig, width, layers, **words)


def gpt2(width, layers):
    return GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64)


def llama(width, layers, inner, kv_heads=None, vocab=32000):
    heads = dict(num_attention_heads=width // 128, num_key_value_heads=kv_heads)
    sizes = dict(hidden_size=width, num_hidden_layers=layers, intermediate_size=inner)
    return LlamaConfig(vocab_size=vocab, **sizes, **heads)


def t5(width, layers, inner, heads):
    """T5 1.1: gated, 64 numbers a head, 32,128 rows in the vocabulary."""
    sizes = dict(d_model=width, d_ff=inner, d_kv=64, num_layers=layers, num_heads=heads)
    return T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes)


BERT_BASE = encoder(BertConfig, 768, 12)
BERT_LARGE = encoder(BertConfig, 1024, 24)
ROBERTA_BASE = roberta(768, 12)
ROBERTA_LARGE = roberta(1024, 24)
DEBERTA_XXL = encoder(
    DebertaV2Config,
    1536,
    48,
    vocab_size=128100,
    type_vocab_size=0,
    relative_attention=True,
    position_buckets=256,
    position_biased_input=False,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    conv_kernel_size=3,
    conv_act="gelu",
)

GPT2 = gpt2(768, 12)
GPT2_MEDIUM = gpt2(1024, 24)
GPT2_LARGE = gpt2(1280, 36)
# GPT-3 was never published. Its sizes in OPT's modules, where query, key, value and
# output are layers of their own (GPT-2's are fused); OPT has two positions more.
GPT3 = OPTConfig(
    vocab_size=50257,
    hidden_size=12288,
    word_embed_proj_dim=12288,
    ffn_dim=4 * 12288,
    num_hidden_layers=96,
    num_attention_heads=96,
    max_position_embeddings=2048,
)
GPT3_FUSED = GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
# The same width and depth in modules where adapter.py has its places.
GPT3_WIDTH = llama(12288, 96, 4 * 12288, vocab=50257)

LLAMA_7B = llama(4096, 32, 11008)
LLAMA_13B = llama(5120, 40, 13824)
LLAMA_33B = llama(6656, 60, 17920)
LLAMA_65B = llama(8192, 80, 22016)
LLAMA2_70B = llama(8192, 80, 28672, kv_heads=8)
LLAMA3_8B = llama(4096, 32, 14336, kv_heads=8, vocab=128256)

T5 = {
    "Small": t5(512, 8, 1024, 6),
    "Base": t5(768, 12, 2048, 12),
    "Large": t5(1024, 24, 2816, 16),
    "XL": t5(2048, 24, 5120, 32),
    "XXL": t5(4096, 24, 10240, 64),
}
