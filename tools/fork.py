"""Point a fork at itself: python tools/fork.py https://github.com/you/yourbook

Rewrites the repository's address, which _config.yml names, wherever it stands: in
_config.yml itself, in the chapters (links to Colab, the cells that install the package
there), README.md, CITATION.cff, pyproject.toml, environment.yml, the recipes and the
book's pages.
So does it with the address of the published book, on GitHub Pages, which the start page
names for its preview picture. The package keeps its name, so `import peftlab` stays.
"""

import argparse
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
FILES = [
    "_config.yml",
    "README.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "pyproject.toml",
    "environment.yml",
    "book/**/*.md",
    "notebooks/*.ipynb",
    "recipes/*.py",
]


def slug(url):
    """``you/yourbook`` of https://github.com/you/yourbook"""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", url)
    if not found:
        raise ValueError(
            f"{url!r} is not the address of a repository on GitHub, which looks like "
            "https://github.com/you/yourbook"
        )
    return found[1]


def published(slug):
    """Where GitHub Pages shows the book of ``you/yourbook``."""
    owner, name = slug.split("/")
    site = f"{owner.lower()}.github.io"
    return f"https://{site}" if name.lower() == site else f"https://{site}/{name}"


def rewrite(root, url):
    """Change every file that names the old repository; return their paths."""
    new = slug(url)
    config = yaml.safe_load((root / "_config.yml").read_text("utf8"))
    old = slug(config["repository"]["url"])
    # github.com/old, raw files and Colab's /github/old, never github.com/old-and-more.
    pattern = re.compile(
        rf"(github\.com/|raw\.githubusercontent\.com/|"
        rf"colab\.research\.google\.com/github/){re.escape(old)}"
        r"(?![\w-]|\.(?!git\b)\w)"
    )
    site = re.compile(rf"{re.escape(published(old))}(?![\w.-])")
    changed = []
    for path in sorted(p for glob in FILES for p in root.glob(glob)):
        before = path.read_bytes().decode("utf8")
        after = pattern.sub(lambda m: m[1] + new, before)
        after = site.sub(published(new), after)
        if after != before:
            path.write_bytes(after.encode("utf8"))
            changed.append(path.relative_to(root))
    return changed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="https://github.com/you/yourbook")
    try:
        changed = rewrite(ROOT, parser.parse_args().url)
    except ValueError as error:
        parser.error(str(error))
    for path in changed:
        print(path)
    print(f"{len(changed)} files changed. Next: git diff, then make test.")


if __name__ == "__main__":
    main()
