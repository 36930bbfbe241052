"""The command: `python -m peftlab.memory --config llama-2-7b --method qlora`."""

import argparse
import json
import sys

from .calculator import DTYPES, METHODS, OPTIMIZERS, SEQ, default_seq, step
from .cards import CARDS
from .messages import LONGEST, shown
from .shapes import SHAPES


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # without the usage, which is longer than the sentence
        text = message if message.isprintable() else ascii(message)
        if len(text) > 5 * LONGEST:
            text = text[: 5 * LONGEST] + "..."
        self.exit(2, f"{text}\n")


def _whole(text):
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"no whole number: {shown(text)}") from None


def _parser():
    parser = _Parser(
        prog="python -m peftlab.memory",
        description="What fine-tuning takes, in GB of 10^9 bytes, and the smallest "
        "common GPU that holds it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = ", ".join(SHAPES)
    seq = f"tokens of a sequence; {SEQ}, or the model's maximum if it is less"
    add("--config", required=True, help=f"a config.json, its folder, or one of {names}")
    add("--method", default="lora", help=", ".join(METHODS))
    add("--r", type=_whole, help="LoRA's rank, 16 by default")
    add("--targets", help="linears by name, with commas; all of them by default")
    add("--seq", type=_whole, help=seq)
    add("--batch", type=_whole, default=1, help="sequences of a step")
    add("--dtype", help=f"of the weights: {', '.join(DTYPES)}")
    add("--optimizer", default="adamw", help=", ".join(OPTIMIZERS))
    add("--checkpointing", action="store_true", help="activation checkpointing")
    add("--double-quant", action=argparse.BooleanOptionalAction, help="of qlora; on")
    add("--device", default="cuda", help="whose step is counted: cuda, cpu")
    kbit = "embedding, norms and head in float32, as peft prepares for 4 and 8 bits"
    add("--kbit-prepared", action=argparse.BooleanOptionalAction, help=kbit)
    add("--gpus", type=_whole, default=1, help="that share the work")
    add("--zero", type=_whole, default=0, help="what they divide: level 0 to 3")
    add("--json", action="store_true", help="bytes as JSON")
    return parser


def report(sizes):
    """What `step` returns as lines of text, in GB of 10^9 bytes."""
    parts = ("weights", "gradients", "optimizer", "activations", "total")
    lines = [f"{part:12}{sizes[part] / 1e9:10.2f} GB" for part in parts]

    share = sizes["trainable"] / sizes["parameters"]
    numbers = f"{sizes['trainable']:,} of {sizes['parameters']:,} ({share:.2%})"
    gpu = sizes["gpu"] or f"none of them; the largest is the {[*CARDS][-1]}"
    return "\n".join([*lines, f"{'trains':12}{numbers}", f"{'fits':12}{gpu}"])


def parse(arguments=None):
    """The command line's options; leaves with a sentence and status 2 for others."""
    return _parser().parse_args(arguments)


def main(arguments=None):
    """Run the command line.

    Returns:
        The exit status: 0, or 2 where the input is wrong.
    """
    options = vars(parse(arguments))
    as_json = options.pop("json")
    if options["targets"] not in (None, "all-linear"):
        options["targets"] = options["targets"].split(",")

    try:
        sizes = step(**options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    if as_json:
        print(json.dumps(sizes, indent=1))
        return 0
    print(report(sizes))
    if options["gpus"] > 1:
        print(f"{'on each of':12}{options['gpus']} GPUs, ZeRO level {options['zero']}")
    if options["seq"] is None:
        seq = default_seq(options["config"])
        if seq < SEQ:
            print(f"{'sequence':12}{seq} tokens, the model's maximum")
    return 0


if __name__ == "__main__":
    sys.exit(main())
