"""LoRA over a base in 8 bits: LLM.int8() in place of NF4.

    python 12_int8.py --data records.jsonl --prompt "A prompt like those"

What differs from qlora_llm.py: a weight takes a byte, twice what 4 bits take,
and is rounded far less. A column of a layer's input in which a value reaches
--threshold is multiplied in 16 bits; 0 turns that off.
"""

import logging

from transformers import BitsAndBytesConfig

import qlora_llm


def loader(threshold):
    """The function that loads the base with this threshold."""
    if threshold < 0:
        raise SystemExit(f"--threshold is at least 0, not {threshold:g}")
    packing = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=threshold
    )

    def load(name):
        model, tokenizer = qlora_llm.load(name, packing)
        size = model.get_memory_footprint() / 1e9
        print(f"the base in 8 bits: {size:.4f} GB")
        return model, tokenizer

    return load


if __name__ == "__main__":
    # At each product it says that it casts its input to float16.
    logging.getLogger("bitsandbytes.autograd").setLevel("ERROR")
    parser = qlora_llm.options()
    parser.add_argument("--threshold", type=float, default=6.0)
    args = parser.parse_args()
    qlora_llm.main(args, load=loader(args.threshold))
