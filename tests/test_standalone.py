"""Each reference file is short, needs torch alone, and works copied on its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peftlab"
APART = ("__init__", "interop")  # the package, and the door to files
FILES = {p.stem: p for p in sorted(PACKAGE.glob("*.py")) if p.stem not in APART}
COMPOSED = {"several": {"lora"}, "qlora": {"lora", "nf4"}}  # copied with what they take
WALK = ("_shape", "_select", "_replace")

# Run by `python -I` in the folder with the copy. What torch takes to start is there by
# then; whatever else is not in the standard library cannot be imported any more.
GUARD = """
import sys
import torch

allowed = {"lora", "numpy", *sys.stdlib_module_names}
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
SCRIPTS = {
    "lora": """
import lora
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x = torch.randn(5, 6)
plain = model(x)
lora.add(model, ["0", "2"], r=2, dropout=0.1, bias="lora_only")
assert torch.equal(model.eval()(x), plain)
for _ in range(2):
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for p in lora.state_dict(model, keep_vars=True).values():
        p.data -= 0.1 * p.grad
tuned = model(x)
assert not torch.allclose(tuned, plain)
lora.load_state_dict(model, lora.state_dict(model))
merged = lora.merge(model)
assert [type(m).__name__ for m in merged] == ["Linear", "Tanh", "Linear"]
assert torch.allclose(merged(x), tuned, atol=1e-5)
""",
}

each_file = pytest.mark.parametrize("name", FILES)


@each_file
def test_a_reference_file_is_read_at_one_sitting(name):
    lines = FILES[name].read_text("utf8").splitlines()
    assert len(lines) <= 150, f"{name}.py has {len(lines)} lines: 150 at most"
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


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_copy_alone_works_with_only_torch(name, tmp_path):
    (tmp_path / f"{name}.py").write_bytes(FILES[name].read_bytes())
    guard = GUARD.replace('"lora"', f'"{name}"')
    run = subprocess.run(
        [sys.executable, "-I", "-c", guard + SCRIPTS[name], str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr


def test_the_guard_keeps_other_packages_out(tmp_path):
    (tmp_path / "lora.py").write_text("import transformers\n")
    run = subprocess.run(
        [sys.executable, "-I", "-c", GUARD + "import lora", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "transformers is not in the standard library" in run.stderr


@each_file
def test_every_reference_file_is_run_on_its_own(name):
    assert name in SCRIPTS, f"write a script that runs {name}.py alone, above"


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
