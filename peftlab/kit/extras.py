"""What a chapter needs beside the package itself: asked for at once, in a sentence."""

from importlib.util import find_spec


def needs(*packages, extra="practice"):
    """Stop here, before any work, if a package is not installed.

    Args:
        *packages: names as they are imported, such as "trl".
        extra: the extra of peftlab that brings them.

    Raises:
        ImportError: one is missing; it says what to install.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} is not installed: pip install 'peftlab[{extra}]'"
        )
