"""Words that only we would understand, or that say it worse than plain English.

Read are the book's pages, the notebooks' Markdown, alt texts and comments, and the
docstrings and comments of the code. Each rule names the private word, what to say in
its place, a sentence that it refuses and honest uses that it lets through.

    python -m pytest -q tests/test_words.py                # every file
    python -m pytest -q tests/test_words.py -k 03_learning # one
"""

import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass
class Rule:
    word: str
    say: str
    pattern: str
    refused: list
    allowed: list = field(default_factory=list)

    def found(self, text):
        return [m[0] for m in re.finditer(self.pattern, text, re.IGNORECASE)]


RULES = [
    Rule(
        "line, for a sequence",
        "sequence, record, text",
        r"\blines? of (?:\d[\d,]*|random|short|long)(?: \w+)? ?tokens?\b"
        r"|\b(?:short|long|shorter|longer|random|padded|held-out) lines?\b"
        r"(?! of (?:code|text|prose))"
        r"|\btokens? (?:of|in|a|for) (?:(?:the|a|each|one) )?lines?\b"
        r"|\bthe line (?:begins|ends) with\b|\b(?:test|training|prompt) lines?\b"
        r"|\brecord's line\b|\blines of random\b|\bthe lines of `?kit\b"
        r"|\b\d[\d,]* lines of \d",
        [
            "16 lines of 32 tokens",
            "on short lines it saves more",
            "the line begins with fr:",
            "no test line is in training",
        ],
        [
            "LoRA in fifteen lines",
            "the dotted lines are cards",
            "a blank line between the steps",
            "two lines of code",
        ],
    ),
    Rule(
        "held against",
        "verified against, compared with",
        r"\bh[eo]ld(?:s|ing)? (?:\w+ ){0,3}against\b|\bholds? ours to\b",
        [
            "held against peft",
            "we hold ours against theirs",
            "no test holds ours to it",
        ],
    ),
    Rule(
        "price, for a trade-off",
        "cost, trade-off",
        r"\bpric(?:es?|ed)\b(?! per\b| an? hour\b| of an? (?:GPU|card|hour)\b)",
        ["The price: it forgets", "at the price of memory"],
        ["the price of a GPU", "a price per token"],
    ),
    Rule(
        "switch, for turning off",
        "turn off, turn on, disable",
        r"\bswitch(?:e[sd]|ing)? (?:\S+ ){0,3}?(?:off|on)\b"
        r"|\b(?:such|a|an|the|off|on) switch\b",
        ["switching it off", "no such switch", "switched the adapter off"],
        ["switch between adapters", "hold them by name, switch, combine"],
    ),
    Rule("pile", "part, kind of memory", r"\bpil(?:es?|ed)\b", ["the four piles"]),
    Rule("dial", "setting", r"\bdials?\b", ["The dial: rank"]),
    Rule("ledger", "what it costs", r"\bledgers?\b", ["## The ledger"]),
    Rule(
        "plant, for inserting",
        "insert on purpose",
        r"\bplant(?:ed|ing)\b|\bto plant\b"
        r"|\bplants? (?:outliers?|channels?|it|them|an?|one|the)\b",
        ["planted outliers", "we plant outliers"],
        ["toxic effect of plants"],
    ),
    Rule(
        "verbs, for functions",
        "functions",
        r"(?<!irregular )(?<!auxiliary )\bverbs?\b",
        ["four verbs", "two thin verbs for the state"],
    ),
    Rule(
        "law, for a check",
        "check, what must be true",
        r"(?<!scaling )(?<!power )(?<!by )\blaws?\b(?! of (?:nature|large))",
        ["check five laws", "a cell that prints a law"],
        ["no law of nature", "scaling laws", "a power law"],
    ),
    Rule(
        "kept, for retained",
        "retained, saved, stored",
        r"\bkept\b(?! (?:apart|out|small|short|open|separate|free|secret|in sync)\b)"
        r"|\bkeeps? (?:more|(?:no )?less|most|much|little|0\.\d+|\d+%)(?= |$|\.)",
        ["what is kept of English", "LoRA keeps more than full", "it keeps 0.84"],
        ["kept apart", "keeps the weights in 16 bits", "keep the largest"],
    ),
    Rule(
        "numbers, for parameters",
        "parameters, values, weights",
        r"\b(?:\d{1,3}(?:,\d{3})+|(?:m|b|tr)illions?) numbers\b"
        r"|\b(?:as many|fewer|trained|trainable) numbers\b"
        r"|\btrains? (?:[\w,']+ ){0,4}?numbers\b(?! of)"
        r"|\b(?:half|third|quarter|\w+th|share) of (?:\S+ )?numbers\b(?! of)",
        [
            "it trains 77,824 numbers",
            "a twelfth as many numbers",
            "a ninth of LoRA's numbers",
            "a space of a million numbers",
        ],
        ["the numbers of parameters are matched", "two numbers that differ"],
    ),
    Rule("reckon", "count, compute", r"\breckon\w*", ["reckoned by hand"]),
    Rule(
        "is in, for part of the model",
        "part of the model already",
        r"\| is in \||\"is in\"",
        ["| 5,120 | is in | a bias"],
        ["the head is in bfloat16"],
    ),
    Rule(
        "mend",
        "fix, repair",
        r"\bmend(?:s|ed|ing)?\b",
        ["the mend", "until that is mended"],
        ["recommended"],
    ),
    Rule(
        "the way back",
        "the backward pass",
        r"\bthe way back\b|\bon its way back\b",
        ["computed again on the way back"],
    ),
    Rule(
        "loud",
        "strong, large",
        r"\bloud(?:ly|er|est|ness)?\b|\b(?:change|branch|adapter) speaks?\b",
        ["how loudly the change speaks", "my adapter got louder"],
    ),
    Rule(
        "dear, for expensive",
        "expensive, costly",
        r"\bdear(?:er|est|ly)\b",
        ["the dearer of the two"],
    ),
    Rule(
        "whoever, who",
        "if you, people who",
        r"\bwhoever\b|(?:^|[.:;] )Who [a-z]+s [^.?!]*\.",
        ["whoever mixes them up", "It is gone. Who accumulates gradients has them."],
        ["Who needs this? Nobody."],
    ),
    Rule(
        "read, for parsing a date",
        "parse a date, answer right",
        r"\breads? (?:\w+ )?dates\b"
        r"|\breads? (?:back )?\d(?:\.\d+)?\b(?! (?:lines?|files?))"
        r"|\breads? (?:only )?\d+% of",
        ["it reads 0.97 of Finnish", "a model that reads dates", "reads Finnish dates"],
        ["read section 4", "torch reads the file"],
    ),
    Rule(
        "a limit of lines",
        "leave it out: no file has one",
        r"\b\d+ lines at most\b",
        ["150 lines at most"],
    ),
]

# Places that need the word: {file: words}. A quotation, a published title.
EXCUSED = {}


# What a reader sees of a file, as paragraphs without code, addresses and comments


def plain(markdown):
    """Paragraphs of Markdown: no code, addresses, comments, tags; spaces single."""
    text = re.sub(r"^---\n.*?^---$", " ", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(`{3,})(?!\{).*?^\1`*$", " ", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\{[\w:-]+\}`[^`]*`|`[^`\n]+`", "`code`", text)
    text = re.sub(r"\]\([^)\s]+\)", "]", text)
    text = re.sub(
        r"https?://\S+|</?[a-zA-Z][^>]*>|[*_]{1,3}(?=\S)|(?<=\S)[*_]+", "", text
    )
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n|\n(?=[|#:-])", text)]


def python(source):
    """The docstrings and comments of Python code; neighbouring comments together."""
    parts, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("# ")
            if last is not None and token.start[0] == last + 1:
                parts[-1] += " " + words
            else:
                parts.append(words)
            last = token.start[0]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            parts.append(docstring)
    return [paragraph for part in parts for paragraph in plain(part)]


def notebook(path):
    """Markdown, alt texts and the comments of code cells, where they can be parsed."""
    parts = []
    for cell in json.loads(path.read_text("utf8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts += plain(source)
            continue
        image = cell["metadata"].get("mystnb", {}).get("image", {})
        parts += plain(image.get("alt", ""))
        parts += re.findall(r"(?m)(?<=# ).*$", source)
    return parts


def paragraphs(path):
    if path.suffix == ".ipynb":
        return notebook(path)
    if path.suffix == ".py":
        return python(path.read_text("utf8"))
    return plain(path.read_text("utf8"))


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "book").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE = [
    path
    for folder in ("peftlab", "experiments", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS, *CODE], ids=name)
def test_no_private_word_is_in_a_file(path):
    bad = []
    for paragraph in paragraphs(path):
        for rule in RULES:
            if rule.word in EXCUSED.get(name(path), ()):
                continue
            for found in rule.found(paragraph):
                start = max(0, paragraph.find(found) - 40)
                around = paragraph[start : start + len(found) + 80]
                bad.append(f"{rule.word} (say: {rule.say}): ... {around} ...")
    assert not bad, "\n".join([f"{name(path)}:", *bad])


OTHER_RATES = (
    r"(?:success|error|pass|sampling|dropout|hit|frame|at any|rank and|alpha,) rate"
)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=name)
def test_the_first_rate_on_a_page_is_a_learning_rate(path):
    text = re.sub(OTHER_RATES, "", " ".join(paragraphs(path)), flags=re.IGNORECASE)
    first = re.search(r"\b(learning )?rates?\b", text, re.IGNORECASE)
    assert not first or first[1], (
        f"say learning rate first: ... {text[max(0, first.start() - 60) : first.end()]}"
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.word)
def test_a_rule_refuses_the_private_use_and_lets_the_honest_one_through(rule):
    missed = [text for text in rule.refused if not rule.found(text)]
    wrong = [text for text in rule.allowed if rule.found(text)]
    assert rule.refused and not missed and not wrong


def test_code_and_addresses_are_not_read():
    text = "`dial.py`, [page](https://x.org/price) <!-- pile -->\n\n```\nledger\n```"
    assert not [rule.word for rule in RULES for p in plain(text) if rule.found(p)]
    assert plain("a line\nof code") == ["a line of code"]
    source = '"""A pile."""\nx = "ledger"  # a dial\n'
    assert python(source) == ["a dial", "A pile."]
