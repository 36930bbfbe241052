"""The promises of peftlab.kit.data: one answer each, splits apart, the same by seed."""

import datetime
import hashlib
import json
import re
from collections import defaultdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

import babel.numbers
import pytest
from babel import Locale, localedata
from babel.dates import get_date_format

from peftlab.kit import base_models, data, pretrain
from tools import languages

LANGUAGES = (*data.BASE_LANGUAGES, *data.HELD_BACK)
YEARS = (2023, 2024)  # the second with a February 29
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# Of 2,000 records of the pretraining mixture, and of all kinds, languages and splits.
# See the message below before changing them.
CHECKSUM = "721aeea485eb7fac61bf9b42a97ce7623dfc6c9b3ef819cb823b47e146bc53cb"
EVERYWHERE = "c2da590ae49c7a0b18228b02483bf3b6409a35638b77551755fd3612a0bb8a6c"
TRANSLATED = "4085850936f09f09dd45fbc13ebfa563ec683717a0effcfe01c2e73c036f18ca"


def days(year):
    day, one = datetime.date(year, 1, 1), datetime.timedelta(1)
    while day.year == year:
        yield day
        day += one


def texts(where, formats, year):
    """(text, day) of each day of a year, in each format, as `format_date` writes it."""
    for style in formats:
        pattern = get_date_format(style, where)
        for day in days(year):
            yield pattern.apply(day, where), day


@cache
def all_locales():
    """Every locale that Babel knows."""
    return [data.locale(code) for code in sorted(localedata.locale_identifiers())]


@cache
def date_locales():
    """The same, once for each way to write a date: patterns, months, weekdays."""
    probes = [datetime.date(2024, 1, d) for d in range(1, 8)]
    probes += [datetime.date(2024, m, 1) for m in range(2, 13)]
    found = {}
    for where in all_locales():
        written = []
        for style in data.date_formats(where):
            pattern = get_date_format(style, where)
            written += [pattern.pattern, *(pattern.apply(d, where) for d in probes)]
        found.setdefault(tuple(written), where)
    return list(found.values())


@cache
def dates_everywhere(year):
    """{text: day} of every day of a year in every locale, and what has two answers."""
    found, double = {}, []
    for where in date_locales():
        for text, day in texts(where, data.date_formats(where), year):
            if found.setdefault(text, day) != day:
                double.append((text, str(where), day, found[text]))
    return found, double


# No text has two answers


def test_a_year_stands_in_full_in_every_date():
    for where in date_locales():
        for style in data.date_formats(where):
            for year in (1950, 1999, 2007, 2049):
                text = get_date_format(style, where).apply(
                    datetime.date(year, 5, 6), where
                )
                assert str(year) in text, f"{where}: {text!r} hides the year {year}"


def test_no_day_of_ours_has_two_answers_in_our_languages():
    # Year by year: each text holds its year in full, as the law above has it. Years
    # that begin on one weekday and are as long are alike.
    where = [data.locale(language) for language in LANGUAGES]
    alike = {}
    for year in range(data.FIRST_DAY.year, data.LAST_DAY.year + 1):
        first, last = datetime.date(year, 1, 1), datetime.date(year, 12, 31)
        alike[first.weekday(), last.weekday()] = year
    assert len(alike) == 14
    for year in alike.values():
        found = {}
        for one in where:
            for text, day in texts(one, data.date_formats(one), year):
                other = found.setdefault(text, day)
                assert other == day, f"{one}: {text!r} is {day} and {other}"


@pytest.mark.parametrize("year", YEARS)
def test_no_date_has_two_answers_in_any_locale(year):
    found, double = dates_everywhere(year)
    assert len(found) > 200_000
    assert not double, f"{len(double)} texts of two days, such as {double[0]}"


@pytest.mark.parametrize("year", YEARS)
def test_no_refusal_reads_as_a_day_in_any_locale(year):
    found, _ = dates_everywhere(year)
    gaps = [(m, 31) for m in (4, 6, 9, 11)] + [(2, 30), (2, 31)]
    gaps += [(2, 29)] if year == 2023 else []
    for where in date_locales():
        for style in data.date_formats(where):
            if style != "full":
                for month, day in gaps:
                    text = data.impossible_date(year, month, day, where, style)
                    assert str(day) in text and str(year) in text
                    assert text not in found, f"{where}: {text!r} is {found[text]}"


def test_a_refusal_drawn_is_never_a_day():
    for language in LANGUAGES:
        for record in data.records("refuse", language, 10):
            year = int(re.search(r"\d{4}", record.text).group())
            where = data.locale(language)
            valid = {text for text, _ in texts(where, data.date_formats(where), year)}
            assert record.answer == "?" and record.text not in valid


def test_a_date_drawn_is_answered_as_babel_reads_it():
    for kind in ("dates", "render"):
        for language in LANGUAGES:
            where = data.locale(language)
            for record in data.records(kind, language, 20, seed=3):
                both = f"{record.text} {record.answer}"
                day = datetime.date.fromisoformat(
                    re.search(r"\d{4}-\d\d-\d\d", both).group()
                )
                assert data.FIRST_DAY <= day <= data.LAST_DAY
                formats = data.date_formats(where) if kind == "dates" else ["long"]
                written = {get_date_format(f, where).apply(day, where) for f in formats}
                assert (record.text if kind == "dates" else record.answer) in written


def test_no_amount_has_two_answers_in_any_locale():
    values = (
        "1 1.234 9.99 12.345 100 123.456 999.99 1000 1234 1234.5 12345.678 99999.99"
    )
    found = {}
    for code in data.CURRENCIES:
        amounts = {data.amount(v, code) for v in values.split()}
        for where in all_locales():
            for value in amounts:
                text, answer = data.format_amount(value, code, where), (value, code)
                other = found.setdefault(text, answer)
                assert other == answer, f"{where}: {text!r} is {answer} and {other}"
    assert len(found) > 3_000


def test_no_translation_has_two_answers():
    """Long and full dates of all base languages: a text means one day in one style."""
    meaning = {}
    for code in data.BASE_LANGUAGES:
        where = data.locale(code)
        for style in ("long", "full"):
            for text, day in texts(where, [style], 2024):
                assert meaning.setdefault(text, (day, style)) == (day, style), text
    assert len(meaning) > 366 * 2 * 8


def test_a_translation_keeps_the_day_the_style_or_the_amount():
    for language in ("fr", "de"):
        target = data.locale(language)
        days = {
            text: day.isoformat()
            for code in data.BASE_LANGUAGES
            for text, day in texts(data.locale(code), ("long", "full"), 2001)
        }
        found = 0
        for record in data.records("translate", language, 4000):
            text = record.text.removeprefix(f"{language}: ")
            if text in days:
                found += 1
                forms = {
                    answer: day.isoformat()
                    for answer, day in texts(target, ("long", "full"), 2001)
                }
                assert forms[record.answer] == days[text], record
        assert found > 10, "no date of 2001 was drawn: this shows nothing"


def test_no_country_has_two_answers_in_any_locale():
    found = {}
    for where in all_locales():
        for name, code in data.country_names(where).items():
            other = found.setdefault(name, code)
            assert other == code, f"{where}: {name!r} is {code} and {other}"


def test_each_name_of_two_means_two_countries():
    found = defaultdict(set)
    for where in all_locales():
        for code, name in where.territories.items():
            if len(code) == 2 and code not in data.NOT_COUNTRIES:
                found[name].add(code)
    idle = {name for name in data.NAMES_OF_TWO if len(found[name]) < 2}
    assert not idle, (
        f"these have one meaning now: take them out of NAMES_OF_TWO: {idle}"
    )


def test_each_medium_clash_really_clashes():
    found = {text: {day} for text, day in dates_everywhere(2024)[0].items()}
    written = defaultdict(set)
    for where in all_locales():
        if where.language in data.MEDIUM_CLASHES:
            for text, day in texts(where, ["medium"], 2024):
                found.setdefault(text, set()).add(day)
                written[where.language].add(text)
    idle = {
        language
        for language in data.MEDIUM_CLASHES
        if all(len(found[text]) == 1 for text in written[language])
    }
    assert not idle, f"these clash no more: take them out of MEDIUM_CLASHES: {idle}"


# Splits are apart


@cache
def drawn(split, kinds=data.KINDS):
    """40 records of every kind and language."""
    n = 40 * len(kinds) * len(LANGUAGES)
    return data.mixture(dict.fromkeys(kinds, 1 / len(kinds)), LANGUAGES, n, split)


@pytest.mark.parametrize(
    "one, two", [("train", "test"), ("train", "dev"), ("dev", "test")]
)
def test_no_line_and_no_prompt_is_in_two_splits(one, two):
    for part in ("line", "prompt", "text"):
        first, second = ({getattr(r, part) for r in drawn(s)} for s in (one, two))
        both = first & second
        assert not both, f"in {one} and in {two}: {sorted(both)[:3]}"


def test_no_day_of_the_test_split_is_in_training_in_any_form():
    def found(split):
        return {
            re.search(r"\d{4}-\d\d-\d\d", r.line).group()
            for r in drawn(split)
            if r.kind in ("dates", "render")
        }

    assert found("train").isdisjoint(found("test"))
    assert found("train").isdisjoint(found("dev"))


def test_splits_are_about_85_5_and_10_percent():
    keys = [day.isoformat() for year in (1990, 2020) for day in days(year)]
    keys += list(data.country_names(data.locale("en")))
    share = {
        s: sum(data.split_of(k) == s for k in keys) / len(keys) for s in data.SPLITS
    }
    assert share == pytest.approx(dict(train=0.85, dev=0.05, test=0.10), abs=0.03)


# The same by seed


def test_the_same_seed_gives_the_same_records():
    for kind in data.KINDS:
        one, two = (data.records(kind, "fr", 20, seed=7) for _ in range(2))
        assert one == two
        assert one != data.records(kind, "fr", 20, seed=8)
    shares = dict(dates=0.5, render=0.5)
    one, two = (data.mixture(shares, ["fr", "de"], 60, seed=7) for _ in range(2))
    assert one == two


def test_more_records_begin_with_the_fewer():
    assert data.records("dates", "fr", 50)[:20] == data.records("dates", "fr", 20)


def checksum(records):
    return hashlib.sha256("\n".join(r.line for r in records).encode()).hexdigest()


def test_the_data_has_not_moved_whichever_babel_is_installed():
    message = (
        f"the records are not those of before, under Babel {version('babel')}. If they"
        " are to move, train the small models again (`make models`), run the"
        " notebooks, and put the new checksums here."
    )
    mixed = data.mixture(pretrain.SHARES, data.BASE_LANGUAGES, 2000)
    assert checksum(mixed) == CHECKSUM, message
    kinds = tuple(pretrain.SHARES)
    all_splits = [r for split in data.SPLITS for r in drawn(split, kinds)]
    assert checksum(all_splits) == EVERYWHERE, message
    pairs = [r for split in data.SPLITS for r in drawn(split, ("translate",))]
    assert checksum(pairs) == TRANSLATED, message


def test_the_frozen_words_are_those_of_the_babel_in_constraints():
    pinned = re.search(r"(?m)^babel==(\S+)", CONSTRAINTS.read_text("utf8")).group(1)
    stored = json.loads(data.WORDS_FILE.read_text("utf8"))
    assert stored["source"].endswith(f"Babel {pinned}")
    assert stored["languages"].keys() == set(LANGUAGES)
    if version("babel") == pinned:
        assert stored == languages.table(), "write it anew: python tools/languages.py"


@pytest.mark.parametrize("kind", data.KINDS)
def test_no_word_of_ours_is_asked_of_babel(kind, monkeypatch):
    """What a later release of CLDR moves: names, patterns, signs, digits."""
    language = "da"
    before = data.records(kind, language, 30)

    def asked(*args, **kwargs):
        raise AssertionError("Babel's own words are used")

    words = (
        "territories date_formats months days currency_formats currency_symbols".split()
    )
    for name in words:
        monkeypatch.setattr(Locale, name, property(asked))
    monkeypatch.setattr(babel.numbers, "get_currency_precision", asked)
    assert data.records(kind, language, 30) == before


def test_every_digit_and_sign_of_an_amount_is_ours():
    hungarian = data.locale("hu")
    assert data.format_amount(data.amount(1234.5, "HUF"), "HUF", hungarian) == (
        "1\xa0234,50\xa0Ft"
    )
    danish = data.locale("da")
    assert data.format_amount(data.amount(1.5, "USD"), "USD", danish) == "1,50\xa0US$"
    assert str(data.amount(1.5, "JPY")) == "2" and str(data.amount(3, "KWD")) == "3.000"


# What is asked for


def test_records_are_as_many_as_asked_and_all_different():
    for kind in data.KINDS:
        some = data.records(kind, "fi", 25)
        assert len(some) == len({r.text for r in some}) == 25
        assert {(r.kind, r.language) for r in some} == {(kind, "fi")}
        assert all(r.line == f"{r.prompt} {r.answer}" for r in some)


def test_any_locale_that_babel_knows_has_records():
    for language in ("pt_PT", "zh-Hans", "ar", "hi", "sr-Latn", "gsw"):
        for kind in ("dates", "amounts", "render", "refuse"):
            assert len(data.records(kind, language, 3)) == 3


def test_a_mixture_keeps_its_shares():
    some = data.mixture(dict(dates=0.75, countries=0.25), ["en", "fr"], 800)
    count = defaultdict(int)
    for record in some:
        count[record.kind, record.language] += 1
    assert count == {
        ("dates", "en"): 300,
        ("dates", "fr"): 300,
        ("countries", "en"): 100,
        ("countries", "fr"): 100,
    }


BAD = {
    "an unknown language": ("did you mean", dict(language="finish")),
    "a language that is no name": ("no language", dict(language=None)),
    "an empty language": ("no language", dict(language="")),
    "an unknown kind": ("dates, amounts", dict(kind="date")),
    "an unknown split": ("train, dev, test", dict(split="validation")),
    "n=0": ("at least one", dict(n=0)),
    "n=-1": ("at least one", dict(n=-1)),
    "n=2.5": ("at least one", dict(n=2.5)),
    "n=None": ("at least one", dict(n=None)),
    "more than there are": ("you asked for", dict(kind="countries", n=400)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_one_sentence(case):
    match, change = BAD[case]
    with pytest.raises(ValueError, match=match) as error:
        data.records(**{"kind": "dates", "language": "fi", "n": 5, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(languages=[]),
        dict(languages="fi"),
        dict(languages=None),
        dict(languages=["fi", "finish"]),
        dict(shares={}),
        dict(shares={"date": 1.0}),
        dict(split="validation"),
        dict(n=0),
    ],
    ids=str,
)
def test_bad_mixtures_get_one_sentence(change):
    with pytest.raises(ValueError) as error:
        data.mixture(
            **{"shares": {"dates": 1.0}, "languages": ["fi"], "n": 5, **change}
        )
    assert "\n" not in str(error.value)


# The tokenizer


def test_the_tokenizer_gives_every_line_back():
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    for record in drawn("test"):
        tokens = tokenizer(record.line)["input_ids"]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == record.line
        prompt = tokenizer(record.prompt)["input_ids"]
        answer = tokenizer(f" {record.answer}", add_special_tokens=False)["input_ids"]
        assert prompt + answer == tokens, "the answer's loss is on other tokens"
