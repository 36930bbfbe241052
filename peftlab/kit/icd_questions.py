"""Questions on entries of ICD-10-CM, each answered by a piece of the entry, or by none.

An entry is written as the classification prints it: the code, its title, a term that
it includes, and up to three notes, of one item each. `M35.0 Sjögren syndrome. Sicca
syndrome. Use additional code: to identify associated manifestations. Excludes1: dry
mouth, unspecified (R68.2).`

| kind | asks for | its note |
|---|---|---|
| `code` | the entry's own code | |
| `first` | what is coded before it | Code first |
| `never` | what is never coded together with it | Excludes1 |
| `apart` | what is not meant here, and may be coded beside it | Excludes2 |
| `also` | what else is coded | Use additional code |

By the official guidelines Excludes1 means NOT CODED HERE: the two are never coded
together, except where they are unrelated. Excludes2 means not included here: a patient
who has both may have both coded.

Right is what stands under the label that is asked for, in the entry as it is shortened
here, to one item of a note. An item under a heading is quoted with it ("osteomyelitis
due to: echinococcus" is *osteomyelitis due to echinococcus*) or not at all, and none is
quoted that holds on a condition ("if applicable"): without it, it would say too much.

A quarter of the questions ask for a note that there is not, neither in the entry nor in
what it inherits from: its category, block and chapter. The right answer is none, "".

There are phrasings to train on and others, kept apart, to test with; and a test can
have the labels of the notes reworded. An entry belongs to train, dev or test by the
checksum of its three-character category, as in `icd`: no category is trained and
tested. One note can stand in several ("underlying disease" in many). ICD-10-CM is the
US modification of the WHO's ICD-10, published for all to use by CDC and CMS."""

import functools
import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass

from peftlab.kit import icd, tasks

LABELS = {  # of a kind, as ICD-10-CM prints it
    "first": "Code first",
    "never": "Excludes1",
    "apart": "Excludes2",
    "also": "Use additional code",
}
REWORDED = {  # the same in words that no training record has, drawn for each note
    "first": ("Sequence ahead of it", "List before this", "Precede with"),
    "never": ("Do not combine with", "Incompatible with", "Not together with"),
    "apart": (
        "Separate condition, both allowed",
        "Not meant, may be listed beside it",
        "Distinct, may coexist",
    ),
    "also": ("Report besides", "Supplement with", "Add detail"),
}
KINDS = ("code", *LABELS)
TAGS = dict(first="codeFirst", never="excludes1", apart="excludes2")
TAGS |= dict(also="useAdditionalCode")
MORE = dict.fromkeys(TAGS) | dict(also="codeAlso")  # it would be an answer, too
KNOWN = {  # phrasings of a question that are trained on
    "code": (
        "Which code is this?",
        "What is the code of this entry?",
        "How is this coded?",
        "Give the code.",
    ),
    "first": (
        "What must be coded first?",
        "Which condition is coded first?",
        "What comes first, before this code?",
        "Is there something to code first?",
    ),
    "never": (
        "What is never coded together with this?",
        "What must not be coded together with it?",
        "What does Excludes1 rule out?",
        "Which condition is never coded at the same time?",
    ),
    "apart": (
        "What does Excludes2 name?",
        "Which condition is not included, yet may be coded beside it?",
        "What is not part of this, but may be coded together with it?",
        "What is not included, but may be coded as well?",
    ),
    "also": (
        "What else is coded?",
        "Which additional code is used?",
        "What additional code should be added?",
        "What else should be coded with it?",
    ),
}
UNSEEN = {  # and those that are not
    "code": (
        "Under which number is this diagnosis filed?",
        "What do I look up to find this entry?",
        "Which letters and digits stand for this diagnosis?",
        "What is the identifier of this entry?",
        "How does the classification number this?",
        "Where in the classification is this listed?",
    ),
    "first": (
        "What has to precede this one?",
        "Which disease is to be listed ahead of this?",
        "What goes on the claim before this diagnosis?",
        "Which diagnosis leads, with this one after it?",
        "What takes the top place, above this diagnosis?",
        "After which condition is this one listed?",
    ),
    "never": (
        "With what can this not be combined?",
        "Which diagnosis cannot stand beside this one?",
        "Which diagnosis is incompatible with this?",
        "What may not appear on the same claim as this?",
        "Together with which condition is this forbidden?",
        "What would contradict this diagnosis?",
    ),
    "apart": (
        "What belongs elsewhere, though a patient may have both?",
        "Which separate condition may a patient have as well?",
        "What does this not cover, though both may be recorded?",
        "Which condition lies outside this one but can be listed with it?",
        "What has an entry of its own and is allowed next to this one?",
        "Which different condition may be recorded at the same time?",
    ),
    "also": (
        "What further detail is wanted?",
        "What is to be reported besides?",
        "Which supplement does this diagnosis need?",
        "What should accompany this diagnosis to complete it?",
        "What has to be recorded on top of this?",
        "What more must the record say?",
    ),
}
LONGEST = 60  # characters of a title or an item
SHORT = 24  # characters of a title that is asked for without its entry
MOST = 3  # notes of an entry
REFUSALS = 4  # one question in four has no answer
CODE = r"\([A-Z]\d\w(\.\w+)?-?\)"
CONDITION = r"\b(if|when|unless)\b"
OPEN = r"\b(in|of|to|by|with|associated|identify|specify|complicating|involving)"


@dataclass(frozen=True)
class Question:
    """A question on a context; `start` is where the answer begins, -1 for none."""

    kind: str
    question: str
    context: str
    answer: str
    start: int


@functools.cache
def entries():
    """Every entry with a note: (code, heading, {kind: item}, absent, split), in the
    classification's order. The heading is the title, and a term that it includes.
    `absent` are the kinds of note that neither the entry has nor what it stands under,
    not even one that is not quoted here.

    Raises:
        ValueError: the package with the classification is not installed.
    """
    found = []
    for diag, tags in _with_tags(icd.classification().getroot(), frozenset()):
        code, title = diag.findtext("name"), diag.findtext("desc")
        notes = {}
        for child in diag:  # in the order in which they are printed
            for kind, tag in TAGS.items():
                items = _items(child) if child.tag == tag else []
                if items and len(notes) < MOST:
                    notes.setdefault(kind, items[0])
        if notes and len(title) <= LONGEST and "." not in title:
            terms = _items(diag.findall("inclusionTerm/note"))
            heading = ". ".join([title, *terms[:1]])
            absent = tuple(kind for kind in TAGS if not tags & {TAGS[kind], MORE[kind]})
            found.append((code, heading, notes, absent, icd.split_of(code[:3])))
    return found


def _with_tags(element, above):
    """Every `diag` below an element, with the tags of its notes and of those above."""
    tags = above | {child.tag for child in element}
    if element.tag == "diag":
        yield element, tags
    for child in element:
        if child.tag in ("chapter", "section", "diag"):
            yield from _with_tags(child, tags)


def _items(notes):
    """The items of one printed note that one can quote: no list of codes in them, no
    condition, and what stands under a heading only together with it."""
    found, heading = [], ""
    for note in notes:
        text = (note.text or "").strip()
        if re.search(CONDITION, text):
            break  # it may hold for what follows, too
        text = re.sub(r"^codes?(\(s\))? ", "", text)
        examples = re.fullmatch(r"(.*?),? such as ?:", text)
        if examples:
            found.append(examples[1])
            break
        if text.endswith(":"):
            if heading or not re.search(OPEN + "$", text[:-1]):
                break
            heading = text[:-1] + " "
        else:
            found.append(heading + text)
    return [text for text in found if _quotable(text)]


def _quotable(text):
    bare = re.sub(CODE, "", text).strip()
    whole = not re.search(r"[.:;()\[\]]|such as|^or ", bare)
    return whole and 4 < len(bare) and len(text) <= LONGEST and text[0] != "("


def context(code, heading, notes, labels=LABELS):
    """An entry as text.

    Args:
        code, heading: of the entry.
        notes: {kind: item}.
        labels: {kind: label}.

    Returns:
        A string.
    """
    parts = [
        f"{code} {heading}",
        *(f"{labels[k]}: {item}" for k, item in notes.items()),
    ]
    return "".join(f"{part}. " for part in parts).strip()


def questions(split, n, seed=0, unseen=False, reworded=False):
    """Questions of one split, one in four without an answer, shuffled.

    Those with an answer are spread evenly over the kinds, as far as there are entries,
    and so are those without. The entries that are asked about are the same whatever the
    wording is.

    Args:
        split: "train", "dev" or "test".
        n: how many, at least 8.
        seed: of the draw.
        unseen: ask in phrasings that are never trained on.
        reworded: label the notes in words that are never trained on.

    Returns:
        A list of `Question`.

    Raises:
        ValueError: another split, n below 8 or more than there are, unseen wording in
            training, or the package is not installed.
    """
    if split not in icd.SPLITS:
        raise ValueError(f"split must be train, dev or test, not {split!r}")
    if not isinstance(n, int) or n < 2 * REFUSALS:
        raise ValueError(f"ask for at least {2 * REFUSALS} questions: n is {n!r}")
    if split == "train" and (unseen or reworded):
        raise ValueError("unseen and reworded questions are for dev and test alone")

    def rank(*what):
        return hashlib.sha256(repr((seed, *what)).encode()).digest()

    def order(ask):  # entries with two notes or three first: there one must choose
        return len(ask[2]) == 1, rank("draw", ask[0], ask[3])

    pool = sorted(_pool(split), key=order)
    drawn = _spread([ask for ask in pool if ask[4]], n - n // REFUSALS)
    drawn += _spread([ask for ask in pool if not ask[4]], n - len(drawn))
    if len(drawn) < n:
        raise ValueError(f"the {split} split has only {len(drawn)} questions, not {n}")
    drawn.sort(key=lambda ask: rank("shuffle", ask[0], ask[3]))

    def one_of(texts, *what):
        return texts[rank(*what)[0] % len(texts)]

    asked, found = UNSEEN if unseen else KNOWN, []
    for code, heading, notes, kind, _ in drawn:
        labels = LABELS
        if reworded:
            labels = {k: one_of(REWORDED[k], "label", code, k) for k in LABELS}
        phrase = one_of(asked[kind], "words", code, kind)
        found.append(_question(code, heading, notes, kind, labels, phrase))
    return found


def _pool(split):
    """(code, heading, notes, kind, whether there is an answer): all one could ask."""
    return [
        (code, heading, notes, kind, kind not in absent)
        for code, heading, notes, absent, where in entries()
        if where == split
        for kind in ("code", *notes, *absent)
    ]


def _spread(pool, n):
    """The first of every kind in turn, until there are n."""
    place, each = Counter(), []
    for ask in pool:
        each.append((place[ask[3]], KINDS.index(ask[3]), ask))
        place[ask[3]] += 1
    each.sort(key=lambda row: row[:2])
    return [ask for _, _, ask in each[:n]]


def _question(code, heading, notes, kind, labels, phrase):
    text = context(code, heading, notes, labels)
    if kind == "code":
        answer, start = code, 0
    elif kind in notes:
        label = f"{labels[kind]}: "
        start = text.index(f". {label}") + 2 + len(label)
        answer = re.sub(rf" {CODE}$", "", notes[kind])
    else:
        answer, start = "", -1
    return Question(kind, phrase, text, answer, start)


def rule(question, note):
    """What a program of a few lines answers: the question's keyword names a label, and
    the text after it, up to the full stop, is the answer. It knows the phrasings of
    `KNOWN` and ICD-10-CM's own labels.

    Args:
        question, note: strings.

    Returns:
        The answer, "" for none.
    """
    keywords = {
        "first": "first",
        "never": "never|must not|excludes1",
        "apart": "not included|not part|excludes2",
        "also": "else|additional",
        "code": "code",
    }
    said = question.lower()
    for kind, pattern in keywords.items():
        if re.search(pattern, said):
            if kind == "code":
                return note.split(" ")[0]
            found = re.search(rf"\. {LABELS[kind]}: (.*?)( {CODE})?\.( |$)", note)
            return found[1] if found else ""
    return ""


def best_span(start, end, given, longest=30):
    """The best piece of a context, and by how much it beats no answer.

    Args:
        start, end: (T,), how likely a token is an answer's first and its last; those
            of token 0, [CLS], together score that there is none.
        given: (T,) booleans, the tokens of the context.
        longest: tokens of an answer at most.

    Returns:
        ((first, last), margin), tokens and the best span's score less that of none.
    """
    first, last = tasks.best_span(start, end, given, longest)
    margin = start[first] + end[last] - start[0] - end[0]
    return (first, last), margin.item()


def threshold(found):
    """The margin above which an answer is given, best on what was found for questions
    whose answers are known.

    Args:
        found: {`Question`: (its best span's text, the margin)}.

    Returns:
        A float, midway between two margins.
    """
    pairs = [(margin, text, q.answer) for q, (text, margin) in found.items()]
    margins = sorted(margin for margin, _, _ in pairs)
    cuts = [(a + b) / 2 for a, b in zip(margins[:-1], margins[1:], strict=True)]

    def right(cut):
        return sum((text if m > cut else "") == answer for m, text, answer in pairs)

    return max(cuts, key=right)


def token_f1(given, answer):
    """The harmonic mean of two shares: of the words given those that are right, and of
    the right words those that are given; 1 or 0 where one of them is none.

    Args:
        given, answer: strings, "" for none.

    Returns:
        A float from 0 to 1.
    """
    ours, theirs = Counter(given.split()), Counter(answer.split())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def titles(split, n, seed=0):
    """Short titles, each with the three-character category that it is filed under.

    Args:
        split: "train", "dev" or "test", by category as above.
        n: how many.
        seed: of the draw.

    Returns:
        A list of pairs (title, category), no title in two categories.

    Raises:
        ValueError: another split, more than there are, or the package is missing.
    """
    if split not in icd.SPLITS:
        raise ValueError(f"split must be train, dev or test, not {split!r}")
    pool = [pair for pair in _titles() if icd.split_of(pair[1]) == split]
    if not 1 <= n <= len(pool):
        raise ValueError(f"the {split} split has 1 to {len(pool)} titles, not {n}")
    return random.Random(seed).sample(pool, n)


def made_up(n, seed=0):
    """Titles of nothing: a word pieced together of two, and the last word of a title.

    Args:
        n: how many.
        seed: of the draw.

    Returns:
        A list of different strings. None is in the classification, and no title there
        has the word pieced together.

    Raises:
        ValueError: n is below 1, or the package is not installed.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"ask for at least one title: n is {n!r}")
    rng, found = random.Random(f"{seed} made up"), {}
    words = sorted({w for t, _ in _titles() for w in t.split() if w.isalpha()})
    known = {word.lower() for word in _words()}
    heads = [w for w in words if len(w) >= 8 and w.istitle()]
    tails = [w for w in words if len(w) >= 8 and w.islower()]
    while len(found) < n:
        word = rng.choice(heads)[:4] + rng.choice(tails)[-4:]
        if word.lower() not in known:
            found[f"{word} {rng.choice(tails)}"] = True
    return list(found)


@functools.cache
def categories():
    """The three-character categories of the classification, a frozenset.

    Raises:
        ValueError: the package with the classification is not installed.
    """
    every = icd.classification().iter("diag")
    return frozenset(diag.findtext("name")[:3] for diag in every)


@functools.cache
def _words():
    """Every word of every title."""
    every = icd.classification().iter("diag")
    return {word for d in every for word in re.findall(r"\w+", d.findtext("desc"))}


@functools.cache
def _titles():
    """(title, category) of every title that is short and in one category alone."""
    return icd.titles(SHORT)
