"""tools/fork.py points every link at the fork and changes nothing else."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NEW = "https://github.com/jane-doe/my.peft_book"

spec = importlib.util.spec_from_file_location("fork", ROOT / "tools" / "fork.py")
fork = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fork)


def old():
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
    return fork.slug(config["repository"]["url"])


@pytest.fixture
def copy(tmp_path):
    """The text of the repository without what is built or installed."""
    skip = shutil.ignore_patterns(
        ".git",
        ".venv*",
        "_build",
        "__pycache__",
        "*.safetensors",
        "*.png",
        "*.egg-info",
    )
    shutil.copytree(ROOT, tmp_path / "book", ignore=skip)
    return tmp_path / "book"


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_fork_names_itself_everywhere_and_nothing_else_changes(copy):
    before = contents(copy)
    changed = set(fork.rewrite(copy, NEW))
    after = contents(copy)
    assert {str(p) for p in changed} >= {"_config.yml", "README.md", "CITATION.cff"}
    assert changed >= {p for p in before if p.suffix == ".ipynb"}
    assert {p for p in before if before[p] != after[p]} == changed
    short, new = old().encode(), fork.slug(NEW).encode()
    sites = [fork.published(slug).encode() for slug in (old(), fork.slug(NEW))]
    for path in changed:
        moved = before[path].replace(*sites).replace(b"/" + short, b"/" + new)
        assert moved == after[path], path
    left = [p for p, b in after.items() if b"github.com/" + short in b]
    left += [p for p, b in after.items() if b"google.com/github/" + short in b]
    assert not left, f"these still name {old()}: {left}"


def test_there_and_back_again_changes_nothing(copy):
    before = contents(copy)
    fork.rewrite(copy, NEW)
    fork.rewrite(copy, f"https://github.com/{old()}")
    assert contents(copy) == before


def test_the_start_page_s_picture_is_looked_for_where_the_fork_is_published(copy):
    fork.rewrite(copy, NEW)
    page = (copy / "book/index.md").read_text("utf8")
    assert "https://jane-doe.github.io/my.peft_book/_static/og.png" in page
    assert fork.published("Jane/jane.github.io") == "https://jane.github.io"


def test_a_repository_whose_name_only_begins_alike_is_left_alone(copy):
    text = f"https://github.com/{old()}-extras and https://github.com/x/{old()}\n"
    (copy / "README.md").write_text(text, "utf8")
    fork.rewrite(copy, NEW)
    assert (copy / "README.md").read_text("utf8") == text


@pytest.mark.parametrize(
    "url", ["", "you/yourbook", "http://github.com/a/b", "https://github.com/a"]
)
def test_what_is_not_an_address_is_refused_and_nothing_changes(copy, url):
    before = contents(copy)
    with pytest.raises(ValueError, match="https://github.com/you/yourbook"):
        fork.rewrite(copy, url)
    assert contents(copy) == before
