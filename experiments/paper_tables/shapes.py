"""The models of the papers as sizes alone: configs, and no weights anywhere.

Those that the memory calculator knows by name are its own; the others are here. What a
config does not say is the class's default, which is the published model's.
"""

from transformers import DebertaV2Config, GPT2Config, LlamaConfig

from peftlab import memory


def shape(name):
    """One of the calculator's shapes, without the head that it is fine-tuned with."""
    config = memory.SHAPES[name]()
    config.architectures = None
    return config


BERT_BASE, BERT_LARGE = shape("bert-base"), shape("bert-large")
ROBERTA_BASE, ROBERTA_LARGE = shape("roberta-base"), shape("roberta-large")
DEBERTA_XXL = DebertaV2Config(
    hidden_size=1536,
    num_hidden_layers=48,
    num_attention_heads=24,
    intermediate_size=4 * 1536,
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

GPT2, GPT2_MEDIUM, GPT2_LARGE = map(shape, ("gpt2", "gpt2-medium", "gpt2-large"))
# Never published; in OPT's modules query, key, value and output are layers of their own
# (GPT-2's are fused), and there are two positions more.
GPT3 = shape("gpt-3")
GPT3_FUSED = GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
# The same width and depth in modules where adapter.py has its places.
GPT3_WIDTH = LlamaConfig(
    vocab_size=50257,
    hidden_size=12288,
    intermediate_size=4 * 12288,
    num_hidden_layers=96,
    num_attention_heads=96,
)

LLAMA_7B, LLAMA_13B = shape("llama-7b"), shape("llama-13b")
LLAMA_33B, LLAMA_65B = shape("llama-33b"), shape("llama-65b")
LLAMA2_70B, LLAMA3_8B = shape("llama-2-70b"), shape("llama-3-8b")

SIZES = ("Small", "Base", "Large", "XL", "XXL")
T5 = {size: shape(f"t5-{size.lower()}") for size in SIZES}
