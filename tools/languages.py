"""Write peftlab/kit/languages.json anew from the Babel that is installed.

    python tools/languages.py

The words of the book's sixteen languages: date patterns, months, weekdays, currency
symbols, number formats, country names. They are frozen because CLDR moves: Babel 2.19
changed the country names of thirteen of the sixteen, and the Danish sign for dollars.
Writing them anew moves the records: tiny-decoder must be trained again (`make models`).
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from babel import Locale

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from peftlab.kit import data


def in_order(names):
    """The values of a dict in the order of its keys, 1 to 12 or 0 to 6."""
    return [names[key] for key in sorted(names)]


def words(language):
    """What languages.json holds for one language."""
    where = Locale.parse(language)
    symbols = where.number_symbols["latn"]

    return dict(
        date_formats={
            style: where.date_formats[style].pattern
            for style in ("long", "full", "medium")
        },
        months={
            width: in_order(where.months["format"][width])
            for width in ("wide", "abbreviated")
        },
        # Finnish asks for the word that stands alone, the others for the other one.
        days={
            context: in_order(where.days[context]["wide"])
            for context in ("format", "stand-alone")
            if context == "format" or "cccc" in where.date_formats["full"].pattern
        },
        money=where.currency_formats["standard"].pattern,
        decimal=symbols["decimal"],
        group=symbols["group"],
        symbols={
            code: where.currency_symbols[code]
            for code in data.CURRENCIES
            if code in where.currency_symbols
        },
        countries={
            code: name
            for code, name in sorted(where.territories.items())
            if len(code) == 2
        },
    )


def table():
    """The whole file, as a dict."""
    languages = (*data.BASE_LANGUAGES, *data.HELD_BACK)
    source = f"Unicode CLDR, through Babel {version('babel')}"
    notice = "Copyright Unicode, Inc.; Unicode License v3, https://www.unicode.org/license.txt"

    return dict(
        source=source,
        notice=notice,
        languages={language: words(language) for language in languages},
    )


if __name__ == "__main__":
    content = table()
    languages = content.pop("languages").items()
    rows = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    lines = [
        f"{json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}"
        for name, row in languages
    ]
    rows.append('"languages": {\n' + ",\n".join(lines) + "\n}")
    data.WORDS_FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf8")
