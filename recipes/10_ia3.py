"""IA3 in place of LoRA: a scale for each key, value and unit of the MLP.

    python 10_ia3.py --data records.jsonl --folded my-model

The names of the layers are Llama's and Qwen's; `--outputs` and `--inputs` take
others. At the end the scales are folded into the base in 16 bits: an ordinary
model, as fast as the base.
"""

import torch
from peft import IA3Config, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import qlora_llm


def add_ia3(model, outputs, inputs):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()  # checkpointing over frozen embeddings
    config = IA3Config(
        target_modules=[*outputs, *inputs],
        feedforward_modules=inputs,  # scaled where their input comes in
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return model


def refuse(args):
    """What peft would take without a word, or stumble over later."""
    if args.rate <= 0:
        raise SystemExit(f"--rate is above 0, not {args.rate}")
    if both := set(args.outputs) & set(args.inputs):
        raise SystemExit(f"{both.pop()} is in --outputs and in --inputs")

    with torch.device("meta"):  # the layers' names, without the weights
        config = AutoConfig.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_config(config)
    there = {path.split(".")[-1] for path, _ in model.named_modules()}
    for name in [*args.outputs, *args.inputs]:
        if name not in there:
            raise SystemExit(f"{args.model} has no layer called {name}")


def load(name):
    return qlora_llm.load(name, packing=None)


def fold(args):
    """The base with the scales in its weights, as an ordinary model."""
    base, tokenizer = load(args.model)
    model = PeftModel.from_pretrained(base, args.out).merge_and_unload()
    model.save_pretrained(args.folded)
    tokenizer.save_pretrained(args.folded)
    print("folded:", qlora_llm.answer(model, tokenizer, args))


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--outputs", nargs="+", default=["k_proj", "v_proj"])
    parser.add_argument("--inputs", nargs="+", default=["down_proj"])
    parser.add_argument("--folded", default="my-model")
    parser.set_defaults(rate=3e-3)  # Liu et al.; LoRA's 2e-4 is too small
    args = parser.parse_args()
    refuse(args)

    def add(model):
        return add_ia3(model, args.outputs, args.inputs)

    qlora_llm.main(args, load=load, add_lora=add)
    fold(args)
