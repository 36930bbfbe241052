"""Each reference file is short, and as one file it needs torch alone.

`tools/standalone.py` writes that one file: it is what a reader downloads.

The script that runs peftlab/NAME.py alone is ALONE in tests/test_NAME.py.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tools import standalone

PACKAGE = Path(__file__).parents[1] / "peftlab"
APART = ("__init__", "peft_files", "surgery")  # no methods
FILES = {p.stem: p for p in sorted(PACKAGE.glob("*.py")) if p.stem not in APART}
COMPOSED = {  # copied with what they take
    "multi_lora": {"lora", "surgery"},
    "qlora": {"lora", "nf4", "surgery"},
}
LINES = {"nf4": 164}  # three types, double quantization and a layer: one idea

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
            if node.level:
                taken = {alias.name for alias in node.names}
                taken -= COMPOSED.get(name, set()) | {"surgery"}
        else:
            continue
        strange = {t for t in taken if t.partition(".")[0] not in allowed}
        if name == "prefix":  # it may take the cache class
            strange = {t for t in strange if not t.startswith("transformers")}
        assert not strange, f"{name}.py imports {strange}"


@each_file
def test_a_copy_alone_works_with_only_torch(name, tmp_path):
    copied = {name, *COMPOSED.get(name, ())}
    if len(copied) > 1:  # a package of its own
        folder = tmp_path / "mine"
        folder.mkdir()
        for each in copied:
            (folder / f"{each}.py").write_bytes((PACKAGE / f"{each}.py").read_bytes())
    else:
        (tmp_path / f"{name}.py").write_text(standalone.of(name), "utf8")
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


def test_the_one_file_has_the_helpers_that_it_reaches_and_no_others():
    surgery = "import math\n\nONE = 1\n\n\ndef a(x):\n    return b(x) + ONE\n\n\n"
    surgery += "def b(x):\n    return math.sqrt(x)\n\n\ndef c(x):\n    return x\n"
    method = (
        '"""M."""\n\nfrom . import surgery\n\n\ndef f(b):\n    return surgery.a(b)\n'
    )
    text = standalone.standalone(method, surgery)
    space = {}
    exec(text, space)
    assert space["f"](9) == 4 and "_c" not in space and "surgery" not in space
    assert text.startswith('"""M."""\n\nimport math\n\n\ndef f(b):\n    return _a(b)\n')


def test_a_helper_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="surgery.py has no d"):
        standalone.standalone("from . import surgery\n\nsurgery.d()\n", "a = 1\n")


@each_file
def test_no_helper_has_the_name_of_a_local_or_of_the_methods_own(name):
    helpers = standalone.definitions((PACKAGE / "surgery.py").read_text("utf8"))
    text = standalone.of(name)
    made = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    arguments = {
        a.arg for f in made for a in ast.walk(f.args) if isinstance(a, ast.arg)
    }
    assert not arguments & {f"_{helper}" for helper in helpers}
    names = [f.name for f in made if not f.col_offset]
    assert len(names) == len({*names}), "two functions of one name in the one file"
