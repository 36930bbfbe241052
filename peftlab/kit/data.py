r"""Real records with one right answer each: dates, amounts and country names as people
write them.

The texts come from CLDR, Unicode's locale data, through Babel, for every locale Babel
knows:

| kind | text | answer | what it asks for |
|---|---|---|---|
| `dates` | `Donnerstag, 12. März 2026` | `2026-03-12` | parse a date |
| `amounts` | `1.234,50 €` | `1234.50 EUR` | parse an amount of money |
| `countries` | `Finnland` | `FI` | the ISO 3166 code of a country |
| `render` | `fr: 2026-03-12` | `12 mars 2026` | write a date in a language |
| `refuse` | `31 juin 2026` | `?` | say that there is no such day |
| `translate` | `fr: March 12, 2026` | `12 mars 2026` | translate from a base language |

Dates are the headline metric. A record is written `text = answer`; its prompt ends in
`=` without a space.

Three promises, each held by a test. **No text has two answers**, in any pair of
locales: two-digit years and month/day forms with slashes are never used, nor the few
names that mean two things. **Splits are apart**: a date (as a day, in every language
and format), an amount or a country's name belongs to train, dev or test by its
checksum, so no test record is trained on. **The same seed gives the same records**,
whichever Babel is installed: the words of the book's sixteen languages are frozen in
`languages.json` (`tools/languages.py` wrote it). All other languages are written as the
installed Babel writes them. Digits are Latin and the calendar is Gregorian everywhere,
which is Babel's default."""

import datetime
import difflib
import functools
import json
import random
import zlib
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from babel import Locale, UnknownLocaleError, localedata
from babel.dates import (
    format_date,
    get_date_format,
    parse_pattern,
    tokenize_pattern,
    untokenize_pattern,
)
from babel.numbers import format_currency
from babel.numbers import parse_pattern as parse_number_pattern

KINDS = ("dates", "amounts", "countries", "render", "refuse", "translate")
SPLITS = ("train", "dev", "test")
BASE_LANGUAGES = ("en", "fr", "es", "it", "pt", "nl", "sv", "da", "ro", "ca")
HELD_BACK = ("de", "fi", "pl", "tr", "sw", "hu")
# No symbol of these stands for two of them in any locale ("kr" and "R" would).
CURRENCIES = "EUR USD GBP JPY CHF PLN HUF CZK TRY INR BRL KWD".split()
DIGITS = {"JPY": 0, "KWD": 3}  # after the decimal point; the others have 2
WORDS_FILE = Path(__file__).with_name("languages.json")
FIRST_DAY, LAST_DAY = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)

# What would give a text a second answer; tests/test_data.py finds these again.
MEDIUM_CLASHES = set("agq bas dav dua kcg lg mgh nd ss st teo ve xog".split())
NAMES_OF_TWO = set(
    "Nigeri|Kongo|Конго|ኮንጎ|موریتانیا|لتونی|Nikaraagua|Sant Martin|Свети Мартин".split(
        "|"
    )
)
NOT_COUNTRIES = {"EU", "EZ", "UN", "QO", "XA", "XB", "ZZ"}


@dataclass(frozen=True)
class Record:
    """One piece of data: `text = answer`."""

    kind: str
    language: str
    text: str
    answer: str

    @property
    def prompt(self):
        """What the model is given: the text and an equals sign, no space after it."""
        return f"{self.text} ="

    @property
    def line(self):
        """What the model is trained on."""
        return f"{self.text} = {self.answer}"


class FrozenLocale(Locale):
    """A Babel `Locale` with the words of `languages.json`: those of Babel 2.18."""

    def __init__(self, language):
        super().__init__(language)
        self.words = frozen_words()[language]

    @functools.cached_property
    def territories(self):
        return self.words["countries"]

    @functools.cached_property
    def date_formats(self):
        patterns = self.words["date_formats"]
        return {style: parse_pattern(text) for style, text in patterns.items()}

    @functools.cached_property
    def months(self):
        numbered = {
            width: dict(enumerate(names, start=1))
            for width, names in self.words["months"].items()
        }
        return {"format": numbered}

    @functools.cached_property
    def days(self):
        return {
            context: {"wide": dict(enumerate(names))}
            for context, names in self.words["days"].items()
        }

    @functools.cached_property
    def currency_formats(self):
        return {"standard": parse_number_pattern(self.words["money"])}

    @functools.cached_property
    def currency_symbols(self):
        return self.words["symbols"]

    @functools.cached_property
    def number_symbols(self):
        frozen = {key: self.words[key] for key in ("decimal", "group")}
        return {"latn": {**super().number_symbols["latn"], **frozen}}


@functools.cache
def frozen_words():
    """{language: its words} of the languages that the book trains and tests on."""
    return json.loads(WORDS_FILE.read_text(encoding="utf8"))["languages"]


def locale(language):
    """Babel's `Locale` for a code such as `de`, `pt_PT` or `zh-Hans`.

    Args:
        language: a code; of the book's sixteen languages the words are frozen.

    Returns:
        The `Locale`.

    Raises:
        ValueError: Babel does not know the language; it names the nearest codes.
    """
    code = str(language).replace("-", "_")
    if code in frozen_words():
        return _frozen_locale(code)

    try:
        return Locale.parse(code)
    except (UnknownLocaleError, ValueError, TypeError):
        known = localedata.locale_identifiers()
        near = difflib.get_close_matches(str(language), known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "try en, de or fi"
        raise ValueError(f"Babel knows no language {language!r}; {hint}") from None


@functools.cache
def _frozen_locale(language):
    return FrozenLocale(language)


def split_of(key):
    """The split a date, amount or name belongs to, by checksum: 85% train, 5% dev, 10%
    test."""
    twentieth = zlib.crc32(key.encode()) % 20
    if twentieth < 2:
        return "test"
    return "dev" if twentieth == 2 else "train"


def date_formats(where):
    """The CLDR formats in use for a locale: long, full and, where unambiguous,
    medium."""
    pattern = get_date_format("medium", where).pattern
    clear = "MMM" in pattern or pattern.startswith("y")
    clear |= "." in pattern and "/" not in pattern and "-" not in pattern  # 12.03.2026
    usable = clear and where.language not in MEDIUM_CLASHES
    return ("long", "full", "medium") if usable else ("long", "full")


def _day(rng):
    span = (LAST_DAY - FIRST_DAY).days
    return FIRST_DAY + datetime.timedelta(rng.randint(0, span))


def _dates(rng, where):
    day = _day(rng)
    text = format_date(day, rng.choice(date_formats(where)), locale=where)
    return text, day.isoformat(), day.isoformat()


def _render(rng, where):
    day = _day(rng)
    return f"{where}: {day}", format_date(day, "long", locale=where), day.isoformat()


def impossible_date(year, month, day, where, style="long"):
    """A day that does not exist (June 31), written in a CLDR format of a `Locale`."""
    tokens = [
        ("chars", str(day)) if kind == "field" and value[0] == "d" else (kind, value)
        for kind, value in tokenize_pattern(get_date_format(style, where).pattern)
    ]
    return format_date(datetime.date(year, month, 1), untokenize_pattern(tokens), where)


def _refuse(rng, where):
    year = rng.randint(FIRST_DAY.year, LAST_DAY.year)
    leap = year % 4 == 0  # right for every year from 1950 to 2049
    gaps = (
        [(m, 31) for m in (4, 6, 9, 11)] + [(2, 30), (2, 31)] + [(2, 29)] * (not leap)
    )
    month, day = rng.choice(gaps)
    style = rng.choice([f for f in date_formats(where) if f != "full"])  # no weekday
    text = impossible_date(year, month, day, where, style)
    return text, "?", f"{year}-{month:02}-{day}"


def amount(value, code):
    """A number as a `Decimal` with the digits of its currency: `amount(3, "EUR")` is
    3.00."""
    return Decimal(str(value)).quantize(Decimal(1).scaleb(-DIGITS.get(code, 2)))


def format_amount(value, code, where):
    """An `amount` of a currency as a `Locale` writes it.

    Babel's own digits are not asked: 2.19 took the forint's away."""
    pattern = where.currency_formats["standard"].pattern
    decimals = "0." + "0" * DIGITS.get(code, 2)
    pattern = pattern.replace("0.00", decimals.rstrip("."))
    return format_currency(value, code, pattern, where, currency_digits=False)


def _amounts(rng, where):
    code = rng.choice(CURRENCIES)
    value = amount(10 ** rng.uniform(0, 5), code)
    answer = f"{value} {code}"
    return format_amount(value, code, where), answer, answer


@functools.cache
def country_names(where):
    """{name: ISO code} of a `Locale`, without the names that mean two countries
    somewhere."""
    return {
        name: code
        for code, name in sorted(where.territories.items())
        if len(code) == 2 and code not in NOT_COUNTRIES and name not in NAMES_OF_TWO
    }


def _countries(rng, where):
    name, code = rng.choice(list(country_names(where).items()))
    return name, code, name


def _translate(rng, where):
    """Long and full dates alone: of medium ones "12 maj 2026" could be either."""
    others = [code for code in BASE_LANGUAGES if code != str(where)]
    source = locale(rng.choice(others))
    if rng.random() < 0.3:
        code = rng.choice(CURRENCIES)
        value = amount(10 ** rng.uniform(0, 5), code)
        key = f"{value} {code}"
        written = [format_amount(value, code, one) for one in (source, where)]
    else:
        day, style = _day(rng), rng.choice(("long", "full"))
        key = day.isoformat()
        written = [format_date(day, style, locale=one) for one in (source, where)]
    return f"{where}: {written[0]}", written[1], key


_DRAW = dict(
    dates=_dates,
    amounts=_amounts,
    countries=_countries,
    render=_render,
    refuse=_refuse,
    translate=_translate,
)


def _draw(kind, language, n, split, seed):
    """Up to n different records; fewer where 3,000 draws in a row bring nothing new."""
    where, found, misses = locale(language), {}, 0
    rng = random.Random(f"{seed} {kind} {where} {split}")
    while len(found) < n and misses < 3_000:
        text, answer, key = _DRAW[kind](rng, where)
        misses += 1
        if split_of(key) == split and text not in found:
            found[text], misses = Record(kind, str(where), text, answer), 0
    return list(found.values())


def records(kind, language, n, split="train", seed=0):
    """Draw `n` different records of one kind and language from one split.

    Args:
        kind: one of `KINDS`.
        language: any locale code that Babel knows.
        n: how many, a whole number of at least 1.
        split: train, dev or test.
        seed: the same seed gives the same records.

    Returns:
        A list of `Record`.

    Raises:
        ValueError: an unknown kind, language or split, n below 1, or more records than
            exist.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"ask for at least one record: n is {n!r}")
    found = _draw(kind, language, n, split, seed)
    if len(found) < n:
        raise ValueError(
            f"{language} has only {len(found)} different {kind} records in its"
            f" {split} split; you asked for {n}"
        )
    return found


def mixture(shares, languages, n, split="train", seed=0):
    """About `n` records of several kinds, evenly over languages, shuffled.

    Where a kind has fewer records than its share (a language has some 200 country
    names) they are repeated.

    Args:
        shares: {kind: fraction}.
        languages: a list of locale codes.
        n: how many together, a whole number of at least 1.
        split: train, dev or test.
        seed: the same seed gives the same records in the same order.

    Returns:
        A list of `Record`.

    Raises:
        ValueError: as `records` does, and for no languages.
    """
    if not languages or isinstance(languages, str) or not shares:
        raise ValueError("mixture needs a list of languages and a {kind: share}")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"ask for at least one record: n is {n!r}")
    drawn = []
    for kind, share in shares.items():
        for language in languages:
            count = max(1, round(n * share / len(languages)))
            records(kind, language, 1, split, seed)  # a clear error for what is unknown
            some = _draw(kind, language, count, split, seed)
            drawn += [some[i % len(some)] for i in range(count)]
    random.Random(seed).shuffle(drawn)
    return drawn
