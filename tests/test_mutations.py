"""Break each reference file in every way that people do, and see that a law goes red.

tests/test_NAME.py holds the laws of peftlab/NAME.py, functions of the module alone, and
MUTATIONS: {what is broken: (the law that must find it, {text: text in its place})}.
(A well-known LoRA test passes with the bypass dead.)
"""

import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest

from tools import standalone

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "peftlab"
NAMES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem[0] != "_")
FILES = ("adapter_folder", "adapter_report", "peft_files", "bnb_files", "surgery")
NAMES = [n for n in NAMES if n not in FILES]
LAWS = {name: importlib.import_module(f"test_{name}") for name in NAMES}
LAWS["surgery"] = importlib.import_module("test_every_method")  # broken in lora's file
NAMES.append("surgery")
CASES = [(name, what) for name in NAMES for what in LAWS[name].MUTATIONS]
RED = (AssertionError, pytest.fail.Exception, RuntimeError)  # the last: shapes clash

each_file = pytest.mark.parametrize("name", NAMES)


def source_of(name):
    """The method as one file: what is broken may be surgery.py's."""
    name = "lora" if name == "surgery" else name
    composed = name in ("multi_lora", "qlora")  # they need the package's other files
    text = (PACKAGE / f"{name}.py").read_text("utf8")
    return text if composed else standalone.of(name)


def module_of(name, source, tmp_path):
    path = tmp_path / f"broken_{name}.py"
    path.write_text(source, "utf8")
    # in the package by its name, so that `from . import lora` finds the real lora
    spec = importlib.util.spec_from_file_location(f"peftlab.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, what", CASES)
def test_a_law_finds(name, what, tmp_path):
    law, changes = LAWS[name].MUTATIONS[what]
    source = source_of(name)
    for old, new in changes.items():
        assert old in source, f"{name}.py no longer has {old!r}: write it anew"
        source = source.replace(old, new)
    try:
        law(module_of(name, source, tmp_path))
    except RED:
        return
    pytest.fail(f"{law.__name__} does not notice that {what}")


@each_file
def test_the_same_laws_pass_on_an_unbroken_copy(name, tmp_path):
    module = module_of(name, source_of(name), tmp_path)
    for law in {law for law, _ in LAWS[name].MUTATIONS.values()}:
        law(module)


@each_file
def test_each_file_is_broken_in_four_ways_at_least(name):
    assert len(LAWS[name].MUTATIONS) >= 4


@each_file
def test_each_law_has_a_mutation_that_it_finds(name):
    every = {
        law
        for law in vars(LAWS[name]).values()
        if inspect.isfunction(law)
        and law.__name__.startswith("test_")
        and list(inspect.signature(law).parameters)
        == ["method" if name == "surgery" else name]
    }
    files = LAWS.values() if name == "surgery" else [LAWS[name]]
    found = {law for file in files for law, _ in file.MUTATIONS.values()}
    idle = {law.__name__ for law in every - found}
    assert not idle, f"laws that no mutation puts to the test: {idle}"
