r"""Data for the tasks that are not about writing text: labels, spans, pairs.

An **invoice line** has a number, a country, a date and an amount, in any order, in one
of the book's languages, as CLDR (Unicode's locale data) writes them:

    #2041 · Finlande · 12 mars 2026 · 1 234,50 €

`lines` draws such lines and says where each of seven fields stands, as characters. From
a line come one label for each word (`word_labels`) and a question whose answer is a
span (`questions`). `translations` pairs a date or an amount with its English form.

Splits are apart as in `data`: no date, amount or country of a test invoice occurs in
training. `SIX` has a small task for each of peft's task types: its examples,
batches, loss and score.
"""

import datetime
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from babel.dates import (
    DateTimeFormat,
    format_date,
    get_date_format,
    tokenize_pattern,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from peftlab.kit import base_models, data, icd, measure
from peftlab.kit.train import collate, collate_pairs

LABELS = ("other", "day", "month", "year", "amount", "currency", "country")
QUESTIONS = {  # {field: its question}
    "number": "Which number?",
    "day": "Which day?",
    "month": "Which month?",
    "year": "Which year?",
    "amount": "How much?",
    "currency": "Which currency?",
    "country": "Which country?",
}
# Not English: to a tokenizer "£10" is one word, and it holds two fields.
LANGUAGES = tuple(code for code in data.BASE_LANGUAGES if code != "en")
# The tasks that write text, and their base; MiniLM has the others.
WRITES = {"CAUSAL_LM": "tiny-decoder", "SEQ_2_SEQ_LM": "tiny-seq2seq"}
IGNORED = -100  # a label that cross_entropy leaves out
_NUMBER = re.compile(r"\d(?:.*\d)?")
_FIELDS = {"d": "day", "M": "month", "L": "month", "y": "year"}


@dataclass(frozen=True)
class Line:
    """An invoice line: its text, and {field: (start, end)} in characters."""

    language: str
    text: str
    spans: dict = field(hash=False)

    def part(self, name):
        """The text of a field."""
        start, end = self.spans[name]
        return self.text[start:end]


def lines(n, split="train", seed=0, languages=LANGUAGES):
    """Draw invoice lines, evenly over the languages.

    Args:
        n: how many together.
        split: train, dev or test.
        seed: the same seed gives the same lines.
        languages: codes that `data.locale` takes.

    Returns:
        A list of `Line`.

    Raises:
        ValueError: an unknown language or split, n below 1.
    """
    if split not in data.SPLITS:
        raise ValueError(f"split must be train, dev or test, not {split!r}")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"ask for at least one line: n is {n!r}")
    rng = random.Random(f"{seed} lines {split}")
    wheres = [data.locale(language) for language in languages]
    return [_line(rng, wheres[i % len(wheres)], split) for i in range(n)]


def _line(rng, where, split):
    day = _drawn(rng, split, _day)
    style = rng.choice([s for s in ("long", "medium") if s in data.date_formats(where)])
    money = _drawn(rng, split, _money)
    names = data.country_names(where)
    country = _drawn(rng, split, lambda rng: names[rng.choice(list(names))])
    name = rng.choice([n for n, code in names.items() if code == country])
    parts = [
        _number(rng.randint(100, 9999)),
        (name, {"country": (0, len(name))}),
        _date(day, style, where),
        _amount(*money, where),
    ]
    rng.shuffle(parts)

    text, spans, glue = "", {}, rng.choice((" · ", ", ", " – ", " / "))
    for part, inside in parts:
        text += glue if text else ""
        moved = {k: (a + len(text), b + len(text)) for k, (a, b) in inside.items()}
        text, spans = text + part, spans | moved
    return Line(str(where), text, spans)


def _drawn(rng, split, draw):
    """The first of the draws that belongs to the split."""
    while True:
        found = draw(rng)
        if data.split_of(str(found)) == split:
            return found


def _day(rng):
    span = (data.LAST_DAY - data.FIRST_DAY).days
    return data.FIRST_DAY + datetime.timedelta(rng.randint(0, span))


def _money(rng):
    code = rng.choice(data.CURRENCIES)
    return data.amount(10 ** rng.uniform(0, 5), code), code


def _number(value):
    text = f"#{value}"
    return text, {"number": (1, len(text))}


def _date(day, style, where):
    """A date, written field by field so that it is known where each stands."""
    fields, text, spans = DateTimeFormat(day, where), "", {}
    for kind, value in tokenize_pattern(get_date_format(style, where).pattern):
        part = value if kind == "chars" else fields[value[0] * value[1]]
        name = _FIELDS.get(value[0]) if kind == "field" else None
        if name:
            spans[name] = len(text), len(text) + len(part)
        text += part
    if text != format_date(day, style, where):
        raise ValueError(f"{text!r} is not how {where} writes {day}")
    return text, spans


def _amount(value, code, where):
    text = data.format_amount(value, code, where)
    digits = _NUMBER.search(text).span()
    sides = (0, digits[0]), (digits[1], len(text))
    start, end = max(sides, key=lambda side: side[1] - side[0])
    while not text[start].strip():
        start += 1
    while not text[end - 1].strip():
        end -= 1
    return text, {"amount": digits, "currency": (start, end)}


def word_labels(text, encoding, spans, labels=LABELS):
    """One label for each word piece of a text, for token classification.

    The first piece of a word gets the label of the span that it starts in, else
    "other". Further pieces of the word, [CLS], [SEP] and padding get -100: there is no
    loss on them.

    Args:
        text: a string; not one that was cut into words before.
        encoding: the text through a fast tokenizer, with offsets: `encodings[i]` of
            what the tokenizer returned.
        spans: {label: (start, end)} in characters; other names are left out.
        labels: their names; the index is the label.

    Returns:
        A list of integers, one for each piece.
    """
    found, before = [], None
    for word, place in zip(encoding.word_ids, encoding.offsets, strict=True):
        if word is None or word == before:
            found.append(IGNORED)
        else:
            start = _first_letter(text, *place)
            names = [k for k, (a, b) in spans.items() if a <= start < b]
            names = [k for k in names if k in labels]
            found.append(labels.index(names[0] if names else "other"))
        before = word
    return found


def _first_letter(text, start, end):
    """Where a piece begins without the space that SentencePiece counts into it."""
    return end - len(text[start:end].lstrip())


def spans_of(text, encoding, given, labels=LABELS):
    """The spans that predicted labels make: neighbouring words with one label.

    Args:
        text, encoding: as in `word_labels`.
        given: a label for each piece; only the first piece of a word counts.
        labels: their names.

    Returns:
        A set of (name, start, end) in characters.
    """
    runs, before = [], None
    for word, (start, end), label in zip(
        encoding.word_ids, encoding.offsets, given, strict=True
    ):
        if word is None:
            continue
        if word == before:  # a further piece: the word goes on
            runs[-1][2] = end
        elif runs and runs[-1][0] == label:
            runs[-1][2] = end
        else:
            runs.append([label, start, end])
        before = word
    runs = [run for run in runs if labels[run[0]] != "other"]
    return {(labels[k], _first_letter(text, a, b), b) for k, a, b in runs}


def f1(given, right):
    """F1 of two lists of sets, counted over all of them: micro-averaged.

    Args:
        given, right: a set of (name, start, end) for each text.

    Returns:
        2 hits / (all given + all right), 0 where there is none of either.
    """
    hits = sum(len(a & b) for a, b in zip(given, right, strict=True))
    total = sum(map(len, given)) + sum(map(len, right))
    return 2 * hits / total if total else 0.0


def questions(some, seed=0):
    """Ask each line for one of its fields.

    Args:
        some: a list of `Line`.
        seed: of the choice.

    Returns:
        A list of (question, text, (start, end) of the answer in the text).
    """
    rng, asked = random.Random(f"{seed} questions"), []
    for line in some:
        name = rng.choice(list(QUESTIONS))
        asked.append((QUESTIONS[name], line.text, line.spans[name]))
    return asked


# Six tasks, one for each of peft's task types


@dataclass(frozen=True)
class Task:
    """What one of peft's task types adds to a training loop.

    Attributes:
        kind: peft's name, such as "TOKEN_CLS".
        metric: what `score` gives.
        auto: the class of transformers that has the head.
        head: the name of the new layers, "" for none.
        labels: how many outputs the head has, 0 where the class says.
        steps, size: of a training run, and of a batch.
        examples: (n, split, seed) -> a list of examples.
        batch: (tokenizer, examples) -> the model's inputs, labels included.
        loss: (model, batch) -> a scalar; it moves the batch to the model's device.
        score: (model, tokenizer, examples) -> a number from 0 to 1.
    """

    kind: str
    metric: str
    auto: type
    head: str
    labels: int
    steps: int
    size: int
    examples: Callable
    batch: Callable
    loss: Callable
    score: Callable

    def load(self, seed=0):
        """The base with this task's head, whose start the seed draws, and tokenizer."""
        if self.kind in WRITES:
            return base_models.load(WRITES[self.kind], device="cpu")

        torch.manual_seed(seed)
        folder = base_models.minilm_folder()
        more = dict(num_labels=self.labels) if self.labels else {}
        with base_models.quiet("transformers"):
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = self.auto.from_pretrained(folder, dtype=torch.float32, **more)
        return model.eval(), tokenizer

    @property
    def targets(self):
        """LoRA's layers. "all-linear" would take the head of some tasks too."""
        if self.kind in WRITES:
            return "all-linear"
        return ["query", "key", "value", "dense"]


def batches(examples, size, seed=0):
    """Endless batches of examples of about one length, so that there is little padding.

    Args:
        examples: a list.
        size: of a batch.
        seed: of the order.

    Yields:
        A list of `size` examples.
    """
    rng = random.Random(seed)
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order) - size + 1, 8 * size):
            pool = sorted(order[start : start + 8 * size], key=_length)
            some = [pool[i : i + size] for i in range(0, len(pool), size)]
            rng.shuffle(some)
            yield from (batch for batch in some if len(batch) == size)


def _length(example):
    if isinstance(example, tuple):
        return sum(len(part) for part in example if isinstance(part, str))
    return len(example.text)


def _own_loss(model, batch):
    return model(**batch.to(model.device)).loss


def _in_batches(compute, examples, size=100):
    """compute(some) for examples of about one length; the answers in their order."""
    order = sorted(range(len(examples)), key=lambda i: _length(examples[i]))
    found = [None] * len(examples)
    with torch.no_grad():
        for start in range(0, len(order), size):
            some = order[start : start + size]
            answers = compute([examples[i] for i in some])
            for i, answer in zip(some, answers, strict=True):
                found[i] = answer
    return found


def _share(right):
    return sum(right) / len(right)


def _records(kind, language):
    return lambda n, split, seed=0: data.records(kind, language, n, split, seed)


def _exact_match(model, tokenizer, records):
    return measure.exact_match(model, tokenizer, records)


def _diagnoses(n, split, seed=0):
    return icd.diagnoses(split, n // len(icd.CHAPTERS), seed)


def _text_batch(tokenizer, pairs):
    batch = tokenizer([t for t, _ in pairs], padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([label for _, label in pairs])
    return batch


def classes(model, tokenizer, pairs):
    """The likeliest class of each (text, label), a list of indices."""

    def answer(some):
        batch = _text_batch(tokenizer, some)
        batch.pop("labels")
        return model.eval()(**batch.to(model.device)).logits.argmax(-1).tolist()

    return _in_batches(answer, pairs)


def macro_accuracy(given, right):
    """The share right within each class, averaged: every class counts alike.

    Args:
        given, right: a class for each text.
    """
    shares = []
    for label in sorted(set(right)):
        mine = [g == label for g, r in zip(given, right, strict=True) if r == label]
        shares.append(_share(mine))
    return _share(shares)


def _macro_accuracy(model, tokenizer, pairs):
    return macro_accuracy(classes(model, tokenizer, pairs), [k for _, k in pairs])


def _line_batch(tokenizer, some):
    batch = tokenizer([line.text for line in some], padding=True, return_tensors="pt")
    labels = [
        word_labels(line.text, batch[i], line.spans) for i, line in enumerate(some)
    ]
    batch["labels"] = torch.tensor(labels)
    return batch


def fields(model, tokenizer, some):
    """The spans that a token classifier finds, {(name, start, end)} for each line."""

    def answer(part):
        batch = _line_batch(tokenizer, part)
        batch.pop("labels")
        given = model.eval()(**batch.to(model.device)).logits.argmax(-1).tolist()
        return [spans_of(part[i].text, batch[i], row) for i, row in enumerate(given)]

    return _in_batches(answer, some)


def _fields_f1(model, tokenizer, some):
    right = [
        {(k, *span) for k, span in line.spans.items() if k in LABELS} for line in some
    ]
    return f1(fields(model, tokenizer, some), right)


def _asked(n, split, seed=0):
    return questions(lines(n, split, seed), seed)


def _question_batch(tokenizer, asked):
    batch = tokenizer(
        [question for question, _, _ in asked],
        [text for _, text, _ in asked],
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,  # peft 0.21's class for the task drops them
    )
    spans = [span for _, _, span in asked]
    starts = [batch.char_to_token(i, a, 1) for i, (a, _) in enumerate(spans)]
    ends = [batch.char_to_token(i, b - 1, 1) for i, (_, b) in enumerate(spans)]
    batch["start_positions"] = torch.tensor(starts)
    batch["end_positions"] = torch.tensor(ends)
    return batch


def best_span(starts, ends, inside, longest=None):
    """The likeliest span that begins no later than it ends.

    Args:
        starts, ends: (tokens,), logits.
        inside: (tokens,), True where an answer may be: not in the question.
        longest: tokens of a span at most, None for any number.

    Returns:
        (start, end), the indices of its first and last token.
    """
    scores = starts[:, None] + ends[None, :]  # (tokens, tokens): first, last
    allowed = (inside[:, None] & inside[None, :]).triu()
    if longest is not None:
        allowed = allowed.tril(longest - 1)
    best = scores.masked_fill(~allowed, -torch.inf).argmax().item()
    return divmod(best, len(ends))


def answer_spans(model, tokenizer, asked):
    """The (start, end) that a question answerer gives, in characters of the text."""

    def answer(some):
        batch = _question_batch(tokenizer, some)
        del batch["start_positions"], batch["end_positions"]
        out, found = model.eval()(**batch.to(model.device)), []
        starts, ends = out.start_logits.cpu(), out.end_logits.cpu()
        for i in range(len(some)):
            inside = torch.tensor([part == 1 for part in batch.sequence_ids(i)])
            a, b = best_span(starts[i], ends[i], inside)
            found.append((batch[i].offsets[a][0], batch[i].offsets[b][1]))
        return found

    return _in_batches(answer, asked)


def _exact_spans(model, tokenizer, asked):
    """A span that is right to the word piece, whatever it leaves of its last word."""
    batch = _question_batch(tokenizer, asked)
    given = answer_spans(model, tokenizer, asked)
    right = []
    for i, (start, end) in enumerate(given):
        a, b = batch["start_positions"][i], batch["end_positions"][i]
        right.append((start, end) == (batch[i].offsets[a][0], batch[i].offsets[b][1]))
    return _share(right)


def translations(n, split, seed=0):
    """Dates and amounts in two languages: (in one of nine, in English), none twice."""
    found = {}
    for record in data.records("translate", "en", 2 * n, split, seed):
        found.setdefault(record.answer, record.text.removeprefix("en: "))
    return [(text, english) for english, text in found.items()][:n]


def _pair_batch(tokenizer, pairs):
    return [
        tokenizer(list(t), padding=True, return_tensors="pt")
        for t in zip(*pairs, strict=True)
    ]


def embed(model, batch):
    """A vector of length 1 for each text: the mean of its tokens' vectors."""
    batch = batch.to(model.device)
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)  # (texts, tokens, 1): no padding
    mean = (hidden * mask).sum(1) / mask.sum(1)
    if hasattr(model, "projection"):  # a head, where one is trained alone
        mean = model.projection(mean)
    return torch.nn.functional.normalize(mean, dim=-1)


def contrastive_loss(model, batch):
    """Each text is to pick its partner among the partners of the whole batch."""
    texts, partners = (embed(model, side) for side in batch)
    right = torch.arange(len(texts), device=texts.device)
    return torch.nn.functional.cross_entropy(20 * texts @ partners.T, right)


def nearest(model, tokenizer, pairs):
    """For each text the index of the partner nearest to it, among all partners."""

    def vectors(texts):
        def answer(some):
            batch = tokenizer([t for (t,) in some], padding=True, return_tensors="pt")
            return embed(model.eval(), batch)

        return torch.stack(_in_batches(answer, [(text,) for text in texts]))

    texts, partners = (vectors(side) for side in zip(*pairs, strict=True))
    return (texts @ partners.T).argmax(-1).tolist()


def _recall(model, tokenizer, pairs):
    found = nearest(model, tokenizer, pairs)
    return _share([k == i for i, k in enumerate(found)])


SIX = {
    task.kind: task
    for task in (
        Task(
            "CAUSAL_LM",
            "exact match",
            AutoModelForCausalLM,
            *("", 0, 80, 16),
            _records("dates", "fi"),
            lambda tokenizer, some: collate(some, tokenizer),
            _own_loss,
            _exact_match,
        ),
        Task(
            "SEQ_2_SEQ_LM",
            "exact match",
            AutoModelForSeq2SeqLM,
            *("", 0, 80, 16),
            _records("translate", "fi"),
            lambda tokenizer, some: collate_pairs(some, tokenizer),
            _own_loss,
            _exact_match,
        ),
        Task(
            "SEQ_CLS",
            "macro accuracy",
            AutoModelForSequenceClassification,
            *("classifier", len(icd.CHAPTERS), 80, 32),
            _diagnoses,
            _text_batch,
            _own_loss,
            _macro_accuracy,
        ),
        Task(
            "TOKEN_CLS",
            "F1 of spans",
            AutoModelForTokenClassification,
            *("classifier", len(LABELS), 30, 16),
            lines,
            _line_batch,
            _own_loss,
            _fields_f1,
        ),
        Task(
            "QUESTION_ANS",
            "exact span",
            AutoModelForQuestionAnswering,
            *("qa_outputs", 0, 40, 16),
            _asked,
            _question_batch,
            _own_loss,
            _exact_spans,
        ),
        Task(
            "FEATURE_EXTRACTION",
            "recall@1",
            AutoModel,
            *("", 0, 25, 16),
            translations,
            _pair_batch,
            contrastive_loss,
            _recall,
        ),
    )
}
