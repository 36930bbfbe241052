"""Prompt tuning: a few trained vectors before the text, nothing else.

    python 09_prompt.py --data records.jsonl --start "Answer with a code:"

What differs from qlora_llm.py: no weight is touched, and the prompt starts as
the tokens of --start, the instruction that you would write. First give the
base that instruction in --prompt: what it cannot do at all, a trained prompt
will hardly teach it. Take LoRA then.
"""

from peft import (
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import AutoTokenizer

import qlora_llm


def count(args):
    """How many vectors the prompt has: by default as --start has tokens."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = len(tokenizer(args.start)["input_ids"])  # as peft counts them
    n = found if args.vectors is None else args.vectors
    if not args.start.strip():
        raise SystemExit("--start is empty: write an instruction")
    if n < found:
        raise SystemExit(f"--start has {found} tokens, too many for {n}")
    if n > args.length // 2:
        raise SystemExit(f"{n} vectors are over half of --length")
    return n


def load(name):
    """The base in 4 bits. It answers without a cache, which is slower: beside
    transformers 5.24 peft 0.21 puts the prompt in again at each token."""
    model, tokenizer = qlora_llm.load(name)
    model.generation_config.use_cache = False
    return model, tokenizer


def adder(args, n):
    """The function that puts a prompt of n vectors on the base."""

    def add_prompt(model):
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=n,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=args.start,
            tokenizer_name_or_path=args.model,
        )
        model = prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model = get_peft_model(model, config)
        model.print_trainable_parameters()
        return model

    return add_prompt


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--start", default="Answer the question:")
    parser.add_argument("--vectors", type=int, help="as --start has tokens")
    parser.set_defaults(rate=3e-2)
    args = parser.parse_args()
    add_prompt = adder(args, count(args))
    qlora_llm.main(args, load=load, add_lora=add_prompt)
