"""Each reference file is short, needs torch alone, and works copied on its own.

The script that runs peftlab/NAME.py alone is ALONE in tests/test_NAME.py.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peftlab"
APART = ("__init__", "interop")  # the package, and the door to files
FILES = {p.stem: p for p in sorted(PACKAGE.glob("*.py")) if p.stem not in APART}
COMPOSED = {"several": {"lora"}, "qlora": {"lora", "nf4"}}  # copied with what they take
LINES = {"nf4": 164}  # three types, double quantization and a layer: one idea
WALK = ("_shape", "_select", "_replace")

# Run by `python -I` in the folder with the copy. What torch takes to start is there by
# then; whatever else is not in the standard library cannot be imported any more.
GUARD = """
import sys
import torch

allowed = {*sys.argv[2:], "numpy", *sys.stdlib_module_names}
allowed |= {name.partition(".")[0] for name in sys.modules}

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{name} is not in the standard library or torch")

for name in ("transformers", "peft", "peftlab", "safetensors", "bitsandbytes"):
    assert name not in allowed, f"torch itself brings {name}: the guard proves nothing"
sys.meta_path.insert(0, Guard())
sys.path.insert(0, sys.argv[1])
"""
each_file = pytest.mark.parametrize("name", FILES)


@each_file
def test_a_reference_file_is_read_at_one_sitting(name):
    lines = FILES[name].read_text("utf8").splitlines()
    most = LINES.get(name, 150)
    assert len(lines) <= most, f"{name}.py has {len(lines)} lines: {most} at most"
    assert max(map(len, lines)) <= 88


@each_file
def test_a_reference_file_imports_torch_and_the_standard_library(name):
    allowed = {"torch", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(FILES[name].read_text("utf8"))):
        if isinstance(node, ast.Import):
            taken = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            taken = {node.module or "."}
            if node.level or node.module == "peftlab":
                taken = {alias.name for alias in node.names} - COMPOSED.get(name, set())
        else:
            continue
        strange = {t for t in taken if t.partition(".")[0] not in allowed}
        if name == "prefix":  # it may take the cache class
            strange = {t for t in strange if not t.startswith("transformers")}
        assert not strange, f"{name}.py imports {strange}"


@each_file
def test_a_copy_alone_works_with_only_torch(name, tmp_path):
    copied = {name, *COMPOSED.get(name, ())}
    folder = tmp_path / "mine" if len(copied) > 1 else tmp_path  # a package of its own
    folder.mkdir(exist_ok=True)
    for each in copied:
        (folder / f"{each}.py").write_bytes(FILES[each].read_bytes())
    script = importlib.import_module(f"test_{name}").ALONE
    guard = "" if name == "prefix" else GUARD  # it takes the cache class
    head = guard or "import sys; sys.path.insert(0, sys.argv[1])\n"
    run = subprocess.run(
        [sys.executable, "-I", "-c", head + script, str(tmp_path), "mine", *copied],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr


def test_the_guard_keeps_other_packages_out(tmp_path):
    (tmp_path / "lora.py").write_text("import transformers\n")
    run = subprocess.run(
        [sys.executable, "-I", "-c", GUARD + "import lora", str(tmp_path), "lora"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "transformers is not in the standard library" in run.stderr


@pytest.mark.parametrize("function", WALK)
def test_the_tree_walk_is_the_same_to_the_letter_in_every_file(function):
    found = {}
    for name, path in FILES.items():
        source = path.read_text("utf8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                found[name] = ast.get_source_segment(source, node)
    assert "lora" in found, f"lora.py has no {function}"
    other = [name for name, text in found.items() if text != found["lora"]]
    assert not other, f"{function} differs from lora.py's in {other}"
