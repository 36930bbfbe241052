"""One clear sentence, whatever goes wrong, and nothing else on the terminal."""

import contextlib
import textwrap
import warnings

LONGEST = 60  # characters of a value that a message repeats


def shown(value):
    """A value as a message repeats it: `repr`, cut short, no control characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"a huge {type(value).__name__}"

    if len(text) > LONGEST:
        text = text[: LONGEST - 3] + "..."
    return text if text.isprintable() else ascii(text)


def one_line(error):
    """What an error says, in one line of at most 160 printable characters."""
    text = textwrap.shorten(str(error), 160).rstrip(".")
    return text if text.isprintable() else ascii(text)


@contextlib.contextmanager
def one_sentence(what):
    """Any error in code that is not ours becomes a ValueError of one sentence.

    Args:
        what: the start of the sentence; what the error says comes after it. A
            ValueError that is one line already passes as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise
        raise ValueError(f"{what}: {one_line(error)}") from error


@contextlib.contextmanager
def quiet():
    """No warnings, and none of transformers' messages."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def check_one_of(what, name, choices):
    if not isinstance(name, str) or name not in choices:
        raise ValueError(f"no {what} {shown(name)}; there are: {', '.join(choices)}")


def check_whole(what, value, most, least=1):
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{what} must be a whole number from {least} to {most:,}, not "
            f"{shown(value)}"
        )
