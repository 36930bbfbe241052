"""A variant of LoRA in place of LoRA: the configuration is all that changes.

    python 07_variants.py --variant dora --data records.jsonl

The base is loaded in 16 bits: PiSSA splits its weights, which must not be
packed. A PiSSA is saved as a plain LoRA of twice the rank, for the base as it
came. vLLM loads that, and rsLoRA and LoRA+, but no DoRA and no VeRA: those are
merged at the end, into an ordinary model in --merged. To serve many VeRAs on
one base, turn each into a LoRA instead, with peft.save_as_lora.
"""

import functools

import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer

import qlora_llm

VARIANTS = {  # the default learning rate, and what differs in the config
    "lora": (2e-4, {}),
    "dora": (1.5e-4, {"use_dora": True}),
    "pissa": (2e-5, {"init_lora_weights": "pissa_niter_4"}),
    "rslora": (2e-4, {"use_rslora": True}),
    "loraplus": (1e-4, {}),  # A's; B learns --ratio times faster
    "vera": (2e-3, {}),
}
RANKS = {"rslora": 64, "vera": 256}  # the others': 16


def alpha(variant, r):
    """lora_alpha. B A counts once in PiSSA, and twice in LoRA at any rank. In
    rsLoRA it counts twice at rank 16, and alpha is the same at every rank."""
    if variant == "pissa":
        return r
    return 8 if variant == "rslora" else 2 * r


def adder(args):
    """The function that puts the variant on the base."""

    def add(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # over frozen embeddings
        common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        r = args.rank or RANKS.get(args.variant, 16)
        if args.variant == "vera":
            config = VeraConfig(r=r, save_projection=False, **common)
        else:
            how = {"lora_alpha": alpha(args.variant, r)}
            how |= VARIANTS[args.variant][1]
            config = LoraConfig(r=r, **how, **common)
        model = get_peft_model(model, config)
        model.print_trainable_parameters()
        if args.variant == "pissa":
            save_as_lora(model, f"{args.out}-start")
        return model

    return add


def save_as_lora(model, start):
    """Have save_pretrained write B A - B0 A0, a LoRA of the base as it came.

    Without it peft computes the split anew at each load: by a random method,
    so that another split meets the trained A and B."""
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    model.save_pretrained = functools.partial(
        model.save_pretrained, path_initial_model_for_weight_conversion=start
    )


def train_plus(model, tokenizer, records, held_out, args):
    """qlora_llm's training, with two learning rates in the optimizer."""
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=args.rate, loraplus_lr_ratio=args.ratio
    )
    qlora_llm.Trainer = functools.partial(
        Trainer, optimizers=(optimizer, None)
    )
    qlora_llm.train(model, tokenizer, records, held_out, args)
    qlora_llm.Trainer = Trainer


def load(name):
    return qlora_llm.load(name, packing=None)


def merge(args):
    """The base with the change in its weights, as an ordinary model."""
    base, tokenizer = load(args.model)
    model = PeftModel.from_pretrained(base, args.out).merge_and_unload()
    model.save_pretrained(args.merged)
    tokenizer.save_pretrained(args.merged)
    print("merged:", qlora_llm.answer(model, tokenizer, args))


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--rank", type=int, help="16; rsLoRA's 64, VeRA's 256")
    parser.add_argument("--ratio", type=float, default=16, help="of LoRA+")
    parser.add_argument("--merged", default="my-model")
    parser.set_defaults(rate=None)
    args = parser.parse_args()
    if args.rank is not None and args.rank < 1:
        raise SystemExit(f"--rank is at least 1, not {args.rank}")
    if args.ratio <= 0:
        raise SystemExit(f"--ratio is above 0, not {args.ratio}")

    if args.rate is None:
        args.rate = VARIANTS[args.variant][0]
    train = train_plus if args.variant == "loraplus" else qlora_llm.train
    qlora_llm.main(args, load=load, add_lora=adder(args), train=train)
    if args.variant in ("dora", "vera"):
        merge(args)
    else:
        print(f"{args.out} is a LoRA: vLLM loads it beside {args.model}")
