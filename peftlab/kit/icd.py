"""Diagnoses in words, each with its chapter of ICD-10-CM, the classification that US
hospitals code with (CDC and CMS, public domain).

The phrases are the titles and inclusion terms in the XML file of the package
simple-icd-10-cm; none of its code runs. Chapters 1 to 18 are the classes: 19 to 22 hold
injuries, causes and administration.

A phrase belongs to train, dev or test by the checksum of its three-character category
(E11 is type 2 diabetes), so no near-copy of a test phrase is ever trained on. Left out
are phrases that occur in two categories, and those of more than 48 characters, which
mostly repeat a shorter one with more detail. A draw takes the first phrases in the
order of their own checksums: another release of the classification moves only what
it changed.
"""

import functools
import hashlib
import importlib.metadata
import re
import zlib
from collections import Counter
from xml.etree import ElementTree

import torch
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

PACKAGE = "simple-icd-10-cm"
LONGEST = 48  # characters of a phrase
SPLITS = ("test", "dev", "train", "train", "train")  # by a category's checksum
CHAPTERS = (  # short names, in the order of ICD-10-CM's chapters 1 to 18
    "infections",
    "neoplasms",
    "blood",
    "endocrine",
    "mental",
    "nervous system",
    "eye",
    "ear",
    "circulation",
    "respiration",
    "digestion",
    "skin",
    "bones and muscles",
    "urinary and genital",
    "pregnancy",
    "newborn",
    "congenital",
    "symptoms",
)


class MeanClassifier(BertForSequenceClassification):
    """MiniLM was trained to put a text's meaning into the mean of its tokens."""

    accepts_loss_kwargs = False  # else Trainer sums accumulated losses

    def __init__(self, config):
        super().__init__(config)
        self.bert.pooler = None  # it would take the first token alone

    def forward(self, input_ids, attention_mask, labels=None, **_):
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)  # (texts, tokens, 1): no padding
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


def diagnoses(split, per_chapter=None, seed=0):
    """Phrases of one split, evenly over the chapters and shuffled.

    Args:
        split: "train", "dev" or "test".
        per_chapter: how many of each chapter, at most as many as there are; by default
            all of them.
        seed: of the draw.

    Returns:
        A list of pairs (phrase, index of its chapter in `CHAPTERS`).

    Raises:
        ValueError: another split, or the package is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be train, dev or test, not {split!r}")

    def checksum(text, purpose):
        return hashlib.sha256(f"{purpose} {seed} {text}".encode()).digest()

    drawn = []
    for chapter in range(len(CHAPTERS)):
        texts = [t for t, c, s in phrases() if (c, s) == (chapter, split)]
        texts.sort(key=lambda text: checksum(text, "draw"))
        drawn += [(text, chapter) for text in texts[:per_chapter]]
    return sorted(drawn, key=lambda pair: checksum(pair[0], "shuffle"))


@functools.cache
def phrases():
    """Every (phrase, chapter index, split) that occurs in one category only, sorted.

    Raises:
        ValueError: the package is not installed.
    """
    found = set()
    for chapter in classification().iter("chapter"):
        number = int(chapter.findtext("name")) - 1
        if number >= len(CHAPTERS):
            continue
        for code in chapter.iter("diag"):
            category = code.findtext("name")[:3]
            terms = [code.find("desc"), *code.findall("inclusionTerm/note")]
            found |= {(term.text, number, category) for term in terms}

    categories = Counter(text for text, _, _ in found)
    return sorted(
        (text, number, split_of(category))
        for text, number, category in found
        if categories[text] == 1 and len(text) <= LONGEST
    )


def titles(longest, category=r"[A-Z]\d\d"):
    """Every title that is filed under one category alone, sorted.

    Args:
        longest: characters of a title.
        category: a pattern of those that count.

    Returns:
        A list of pairs (title, three-character category).

    Raises:
        ValueError: the package is not installed.
    """
    found = {}
    for code in classification().iter("diag"):
        title, where = code.findtext("desc"), code.findtext("name")[:3]
        if len(title) <= longest and re.fullmatch(category, where):
            found.setdefault(title, set()).add(where)
    return sorted((title, *where) for title, where in found.items() if len(where) == 1)


def split_of(category):
    """The split that a three-character category belongs to, by its checksum."""
    return SPLITS[zlib.crc32(category.encode()) % len(SPLITS)]


def classification():
    """ICD-10-CM as a tree of XML: chapters, and in them a `diag` for each entry.

    Raises:
        ValueError: the package is not installed.
    """
    return ElementTree.parse(_file())


def _file():
    """The path of the classification in the package, which is not imported."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"the diagnoses come from a package that is not installed:"
            f" pip install {PACKAGE}"
        ) from None
    (file,) = [f for f in package.files if f.match("data/icd10c-tabular-*.xml")]
    return package.locate_file(file)
