"""Print a course of four weeks, or of twelve, as Markdown tables.

    python tools/syllabus.py 12 > syllabus.md

Made from the exercises' metadata, as on the page for instructors; the links lead to the
repository. Which chapters a week has stands in `book/_ext/syllabus.py`.
"""

import argparse
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import syllabus  # noqa: E402


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weeks", type=int, choices=sorted(syllabus.PLANS))
    options = parser.parse_args(arguments)
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]
    home = f"{config['url']}/blob/{config['branch']}"
    links = (f"{home}/notebooks", f"{home}/book/problem_sets.md")
    print("\n".join(syllabus.markdown(ROOT, options.weeks, *links)))


if __name__ == "__main__":
    main()
