"""Each method as one file that needs torch alone: what tools/standalone.py writes.

The script that uses a method alone is ALONE in tests/test_NAME.py.
"""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import ALL, IDS, net, train

from tools import standalone

ROOT = Path(__file__).parents[1]
COMPOSED = ("multi_lora", "qlora")
ADDED = {  # what their add takes
    "bitfit": {},
    "dora": dict(targets=ALL, r=2),
    "ia3": dict(targets=ALL),
    "lora": dict(targets=ALL, r=2),
    "pissa": dict(targets=ALL, r=2),
    "vera": dict(targets=ALL, r=2),
}

# Run by `python -I` in an empty folder. What torch takes to start is there by then;
# whatever else is not in the standard library cannot be imported any more. torch is
# imported once, each script then runs in a process of its own.
RUN = """
import json, os, sys, traceback
import torch

class Guard:
    def __init__(self, more):
        self.allowed = {*more, "numpy", *sys.stdlib_module_names}
        self.allowed |= {name.partition(".")[0] for name in sys.modules}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed:
            raise ImportError(f"{name} is not in the standard library or torch")

for name in ("transformers", "peft", "peftlab", "safetensors", "bitsandbytes"):
    assert name not in sys.modules, f"torch brings {name}: the guard proves nothing"

for name, (folder, guarded, script) in json.load(sys.stdin).items():
    if os.fork():
        os.wait()
        continue
    sys.path.insert(0, folder)
    if guarded:
        sys.meta_path.insert(0, Guard(["mine", name]))
    try:
        exec(script, {"torch": torch, "sys": sys})
        outcome = ""
    except BaseException:
        outcome = traceback.format_exc()
    with open(os.path.join(folder, "outcome"), "w") as file:
        file.write(outcome)
    os._exit(0)
"""
each_file = pytest.mark.parametrize("name", standalone.NAMES)


def python(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def tool(*arguments):
    return python(ROOT / "tools" / "standalone.py", *arguments)


def alone(name):
    """ALONE of tests/test_NAME.py, read and not imported: that would take seconds."""
    tree = ast.parse((ROOT / "tests" / f"test_{name}.py").read_text("utf8"))
    nodes = [n for n in tree.body if isinstance(n, ast.Assign)]
    (script,) = [n.value for n in nodes if getattr(n.targets[0], "id", "") == "ALONE"]
    return ast.literal_eval(script)


# The files


def test_there_are_fifteen_methods():
    assert len(standalone.NAMES) == 15


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{name: the traceback of its script, alone in a folder; "" if there is none}."""
    jobs = {}
    for name in standalone.NAMES:
        folder = tmp_path_factory.mktemp(name)
        place = folder / "mine" if name in COMPOSED else folder
        place.mkdir(exist_ok=True)
        for file, text in standalone.parts(name).items():
            (place / file).write_text(text, "utf8")
        jobs[name] = str(folder), name != "prefix", alone(name)  # it takes transformers
    strange = tmp_path_factory.mktemp("strange")
    jobs["strange"] = str(strange), True, "import strange"
    (strange / "strange.py").write_text("import transformers\n")

    run = python(
        "-I", "-c", RUN, input=json.dumps(jobs), cwd=tmp_path_factory.getbasetemp()
    )
    assert run.returncode == 0, run.stderr
    return {name: Path(job[0], "outcome").read_text() for name, job in jobs.items()}


@each_file
def test_a_copy_alone_works_with_only_torch(name, outcomes):
    assert not outcomes[name], outcomes[name]


def test_the_guard_keeps_other_packages_out(outcomes):
    assert "transformers is not in the standard library" in outcomes["strange"]


@each_file
def test_a_file_imports_torch_and_the_standard_library_even_in_its_functions(name):
    allowed = {"torch", *sys.stdlib_module_names}
    allowed |= {"transformers"} if name == "prefix" else set()
    for file, text in standalone.parts(name).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                modules = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules = {"torch" if node.level else node.module}  # . is the folder
            else:
                continue
            strange = {m for m in modules if m.partition(".")[0] not in allowed}
            assert not strange, f"{file} imports {strange}"


def test_the_files_are_formatted_and_pass_ruff(tmp_path):
    for name in standalone.NAMES:
        for file, text in standalone.parts(name).items():
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            (folder / file).write_text(text, "utf8")
    settings = f"--config={ROOT / 'pyproject.toml'}"
    for command in (["check"], ["format", "--check"]):
        run = python("-m", "ruff", *command, settings, "--no-cache", tmp_path)
        assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", ADDED)
def test_the_one_file_gives_the_numbers_of_the_package(name, tmp_path):
    path = tmp_path / f"alone_{name}.py"
    path.write_text(standalone.of(name), "utf8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    package = importlib.import_module(f"peftlab.{name}")

    outputs, states = [], []
    for module in (package, alone):
        torch.manual_seed(0)
        model = train(module.add(net(), **ADDED[name]))
        outputs.append(model(IDS))
        states.append({k: t.clone() for k, t in module.state_dict(model).items()})
        if hasattr(module, "merge"):
            outputs.append(module.merge(model)(IDS))
    half = len(outputs) // 2
    for ours, theirs in zip(outputs[:half], outputs[half:], strict=True):
        assert torch.equal(ours, theirs)
    assert states[0].keys() == states[1].keys() and states[0]
    assert all(torch.equal(t, states[1][k]) for k, t in states[0].items())


# How they are made

HELPERS = """
import math
from functools import wraps

import torch
from torch import nn

ONE = 1  # a constant
# About the other.
OTHER: int = ONE + 1


def exact(f):
    @wraps(f)
    def g(*args):
        return f(*args)

    return g


@exact
def root(x):
    return math.sqrt(x)


def shape(x):
    return root(x) + ONE


def weight(shape, x=OTHER):
    root = shape  # names of helpers, but local here
    return [root for root in (shape, x)]


class Base:
    shape = 7

    def size(self, x):
        return shape(x), self.shape, f"the shape is {shape(x):.1f}, é, {shape(x)}"


class Other(Base):
    pass


def idle():
    return torch, nn
"""


def made(body, imports="from . import surgery"):
    """The one file of a method with that body, and its names once it has run."""
    text = standalone.standalone(f'"""M."""\n\n{imports}\n\n\n{body}\n', HELPERS)
    space = {}
    exec(text, space)
    return text, space


def test_the_helpers_that_are_reached_are_there_and_no_others():
    text, space = made("def f(root):\n    return surgery.shape(root)")
    assert space["f"](9) == 4
    assert "_weight" not in space and "_idle" not in space and "surgery" not in space
    first = '"""M."""\n\nimport math\nfrom functools import wraps\n\n\ndef f(root):\n'
    assert text.startswith(first + "    return _shape(root)\n")


def test_a_helpers_locals_keep_their_names():
    _, space = made("def f(x):\n    return surgery.weight(x)")
    assert space["f"](3) == [3, 2]
    assert "_shape" not in space and "_root" not in space


def test_a_class_takes_its_base_along_and_f_strings_are_renamed_inside():
    text, space = made("class M(surgery.Other):\n    pass")
    assert space["M"]().size(4) == (3, 7, "the shape is 3.0, é, 3.0")
    assert "# About" not in text and standalone.EARLY in text


def test_what_runs_at_import_stands_above_the_method():
    body = "@surgery.exact\ndef f(x, y=surgery.OTHER):\n    return surgery.root(x) + y"
    text, space = made(body)
    assert space["f"](9) == 5
    above, below = text.index("def _exact"), text.index("def _root")
    assert above < text.index("def f") < below
    assert "# About the other.\n_OTHER: int = _ONE + 1\n" in text[: text.index("def f")]


def test_a_name_that_the_method_has_already_is_left_to_it():
    body = "def _shape(x):\n    return 0\n\n\ndef f(_root):\n"
    body += "    return _shape(1), surgery.shape(_root)"
    _, space = made(body)
    assert space["f"](9) == (0, 4)


def test_imports_of_both_parts_are_put_together():
    imports = "import os\n\nimport torch\nfrom torch import Tensor\n\n"
    imports += "from . import lora, surgery"
    body = "def f(x: Tensor):\n    return os, torch, lora, surgery.idle(), surgery.root"
    text = standalone.standalone(f'"""M."""\n\n{imports}\n\n\n{body}\n', HELPERS)
    wanted = "import math\nimport os\nfrom functools import wraps\n\nimport torch\n"
    wanted += "from torch import Tensor, nn\n\nfrom . import lora\n\n\ndef f"
    assert text.split('"""\n\n')[1].startswith(wanted)


WRONG = {
    "from . import surgery\n\nsurgery.d()\n": "surgery.py has no d",
    "from . import surgery\n\nx = surgery\n": "as surgery.NAME only",
    "from .surgery import root\n\nroot(1)\n": "write `from . import surgery`",
    "from . import surgery\n\nx = surgery.ONE\n\nimport os\n": "below the others",
    "from . import surgery\n\nmath = surgery.root\n": "surgery.py imports a math too",
    "import torch.nn as math\n\nfrom . import surgery\n\nsurgery.root(math)\n": (
        "math is imported twice"
    ),
}


@pytest.mark.parametrize("source", WRONG)
def test_what_cannot_be_one_file_is_refused(source):
    with pytest.raises(ValueError, match=WRONG[source]):
        standalone.standalone(source, HELPERS)


# The command


def test_the_command_prints_one_file():
    run = tool("lora")
    assert run.returncode == 0 and run.stdout == standalone.of("lora")


def test_the_command_writes_a_composition_to_a_folder(tmp_path):
    folder = tmp_path / "new" / "mine"
    run = tool("qlora", folder)
    assert run.returncode == 0, run.stderr
    names = ["__init__.py", "lora.py", "nf4.py", "qlora.py"]
    assert sorted(path.name for path in folder.iterdir()) == names
    again = tool("qlora", folder)
    assert again.returncode == 2 and "exists already" in again.stderr


REFUSED = {
    (): "give a method's name, such as lora",
    ("lora", "a", "b"): "give a method's name, such as lora",
    ("lorra",): "no method is named 'lorra'; there are: adam8bit, adapter, bitfit,",
    ("surgery",): "no method is named 'surgery'",
    ("../x",): "no method is named '../x'",
    ("qlora",): "qlora takes several files (lora.py, nf4.py, qlora.py): name a FOLDER",
    ("qlora", "/dev/null/x"): "Not a directory",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_the_command_refuses_in_one_sentence(arguments):
    run = tool(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert REFUSED[arguments] in run.stderr and run.stderr.count("\n") == 1


# Names that have gone

# In pieces, so that this file has none of them.
GONE = [
    "sev" + r"eral\.py",
    r"\.sev" + "eral",
    "kit[./]pl" + "ant",
    r"(?<!unsloth-)(_|\b|\\n)z" + r"oo(_|\b)",
]
GONE += ["int" + "erop", r"kit[./]mem" + "ory", r"import sev" + "eral"]
TEXT = {".py", ".md", ".ipynb", ".json", ".toml", ".yml", ".txt", ".css", ".cff", ""}


def test_the_old_names_are_in_the_changelog_alone():
    run = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    files = [ROOT / line for line in run.stdout.splitlines()]
    files = [p for p in files if p.suffix in TEXT and p.is_file()]
    assert len(files) > 100, "git does not say which files there are"
    pattern = re.compile("|".join(GONE))
    bad = {p for p in files if pattern.search(p.read_text("utf8"))}
    bad = {str(p.relative_to(ROOT)) for p in bad} - {"CHANGELOG.md"}
    assert not bad, f"an old name is in {bad}"
