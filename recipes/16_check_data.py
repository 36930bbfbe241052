"""Look at chats before a long run: what is learned of them, what is lost.

    python 16_check_data.py --model Qwen/Qwen2.5-7B-Instruct --data chats.jsonl

One chat a row, {"messages": [{"role": "...", "content": "..."}, ...]}, or
{"prompt": "...", "completion": "..."} ("answer" will do). The last answer is
looked at; a trainer with assistant_only_loss learns the earlier ones, too. Of
the model only the tokenizer and the generation config are loaded. Nothing is
changed; it ends with an error where anything was found, so it can stand
before a training command.
"""

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig


def chat_of(row):
    """The messages of a row; a ValueError says why there are none."""
    if not isinstance(row, dict):
        raise ValueError("no chat, but something else")
    chat = row.get("messages")
    if chat is None:
        answer = row.get("completion", row.get("answer"))
        pair = {"user": row.get("prompt"), "assistant": answer}
        chat = [{"role": r, "content": text} for r, text in pair.items()]
    if not isinstance(chat, list):
        raise ValueError("no chat, but something else")
    if not all(isinstance(turn, dict) and "role" in turn for turn in chat):
        raise ValueError("a turn without a role")
    for turn in chat:
        text = turn.get("content") or ""
        if not isinstance(text, str):
            raise ValueError("a turn that is not text")
        if not text.strip() and not turn.get("tool_calls"):
            raise ValueError("a turn without text")
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise ValueError("the last turn is not the assistant's")
    return chat


def encode(tokenizer, chat, ends):
    """Token ids, and how many of them are the prompt."""
    render = tokenizer.apply_chat_template
    bare = render(chat[:-1], tokenize=False)
    prompt = render(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = render(chat, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the template writes the prompt in two ways")
    answer = whole[len(prompt) :]
    text = (chat[-1].get("content") or "").strip()
    if bare == prompt and not answer.strip().startswith(text):
        before = answer.partition(text)[0].strip()
        raise ValueError(f"the prompt stops before {before!r}")
    parts = prompt, answer  # apart: no token spans the border
    prompt, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in parts
    )
    if not ends & set(answer[-2:]):
        raise ValueError("no end token: the model would not learn to stop")
    if prompt[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError("two start tokens")
    return prompt + answer, len(prompt)


def end_tokens(model, tokenizer):
    """The ids that stop an answer of this model."""
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # it has no generation config
        ends = None
    if ends is None:
        ends = tokenizer.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def main(args):
    if not Path(args.data).is_file():
        raise SystemExit(f"there is no file {args.data}: name it with --data")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        raise SystemExit(f"the tokenizer of {args.model} has no chat template")
    ends = end_tokens(args.model, tokenizer)
    found, first, sizes, answers, seen = Counter(), {}, [], [], set()
    text = Path(args.data).read_text("utf8").strip("\n")
    rows = text.split("\n") if text else []
    for number, row in enumerate(rows, 1):
        try:
            chat = chat_of(json.loads(row))
            ids, start = encode(tokenizer, chat, ends)
            if not sizes:
                print("prompt, no loss:", repr(tokenizer.decode(ids[:start])))
                print("answer, loss:   ", repr(tokenizer.decode(ids[start:])))
            sizes.append(len(ids))
            answers.append(len(ids) - start)
            if row in seen:
                raise ValueError("the same chat again")
            seen.add(row)
            if start >= args.length:
                raise ValueError("the prompt fills the length: no label left")
            if len(ids) > args.length:
                raise ValueError("the answer's end is cut off")
        except (ValueError, TemplateError) as error:
            why = str(error)
            if isinstance(error, json.JSONDecodeError):
                why = "no JSON"
            if isinstance(error, TemplateError):
                why = f"the template refuses it: {error}"
            found[why] += 1
            first.setdefault(why, number)
    print(f"{len(rows)} chats", end="")
    if sizes:
        share = sum(answers) / sum(sizes)
        middle = statistics.median(sizes)
        print(f", {middle:.0f} tokens in the median, {max(sizes)} at most")
        print(f"{share:.0%} of the tokens have a loss", end="")
    print()
    for why, count in found.most_common():
        print(f"{count} times, first in row {first[why]}: {why}")
    if found or not rows:
        why = ", ".join(found) or "the file is empty"
        total = found.total()
        raise SystemExit(f"{total} of {len(rows)} chats are not right: {why}")
    print("nothing wrong was found")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B-Instruct")
    parser.add_argument("--data", default="chats.jsonl")
    parser.add_argument("--length", type=int, default=1024)
    main(parser.parse_args())
