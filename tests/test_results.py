"""The figures: what the prose says, what is stored, what a fresh run gives."""

import json
import math
import sys
from pathlib import Path

import nbformat
import pytest

from experiments import common
from experiments.common import dev_share, neighbourhood
from experiments.sweeps import families
from experiments.sweeps import icd as chapters
from peftlab import prompt
from peftlab.kit import base_models, measure, results
from tools import figures

sys.path.insert(0, str(Path(__file__).parents[1] / "book" / "_ext"))
import bookfix  # noqa: E402

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*sorted((ROOT / "book").rglob("*.md")), ROOT / "README.md"]
FINDINGS = ("appendix", "atlas", "choosing", "claims", "glossary", "index", "memory")
FINDINGS += ("methods", "outliers", "quantization")
FRESH = ROOT / "_build" / "results"  # where `make test` has the chapters write

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def prose(chapter):
    """The text of a chapter and its alt texts."""
    texts = []
    for cell in nbformat.read(chapter, as_version=4).cells:
        if cell.cell_type == "markdown":
            texts.append(cell.source)
        texts.append(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", ""))
    return "\n\n".join(filter(None, texts))


@each_chapter
def test_every_figure_in_a_chapter_is_what_is_stored(chapter):
    stale = figures.stale(prose(chapter), chapter.stem)
    assert not stale, f"written, stored, key: {stale}; run tools/notebooks.py"


@each_page
def test_every_figure_on_a_page_is_what_is_stored(page):
    stale = figures.stale(page.read_text("utf8"))
    assert not stale, f"written, stored, key: {stale}"


@each_chapter
def test_no_decimal_in_a_chapter_is_left_unbound(chapter):
    loose = figures.unbound(prose(chapter))
    assert not loose, f"bind these to a result, or mark them <!-- cited -->: {loose}"


@pytest.mark.parametrize("name", FINDINGS)
def test_no_decimal_on_a_page_of_findings_is_left_unbound(name):
    loose = figures.unbound((ROOT / "book" / f"{name}.md").read_text("utf8"))
    assert not loose, f"bind these to a result, or mark them <!-- cited -->: {loose}"


@each_chapter
def test_a_fresh_run_gives_the_stored_figures(chapter):
    fresh = FRESH / f"{chapter.stem}.json"
    assert fresh.is_file(), "no fresh figures: `make test` runs the chapters first"
    fresh = json.loads(fresh.read_text("utf8"))["figures"]
    stored = results.load(chapter.stem)["figures"]
    assert fresh.keys() == stored.keys(), "run `make notebooks`: the keys have changed"
    off = {
        key: (fresh[key]["value"], kept["value"], kept["tolerance"])
        for key, kept in stored.items()
        if abs(fresh[key]["value"] - kept["value"]) > kept["tolerance"] + 1e-9
    }
    assert not off, f"fresh, stored, tolerance: {off}"


@pytest.mark.parametrize("vectors", ["AVX512", "AVX2"])
def test_packing_keeps_up_with_bitsandbytes(vectors):
    """As stored by `make bench` on either processor: seconds, ours over theirs."""
    stored = results.load(f"bench_quantization_{vectors.lower()}")
    assert stored["machine"]["vectors"] == vectors
    figures = stored["figures"]
    ratios = {k: f["value"] for k, f in figures.items() if not k.endswith("rate")}
    packing = {k: v for k, v in ratios.items() if k.startswith("quantize")}
    assert len(packing) == 6 and max(packing.values()) <= 1, packing
    unpacking = [ratios[f"dequantize, {k}, new"] for k in ("float32", "bfloat16")]
    assert max(unpacking) <= 2, "half of the library's throughput in a young process"


def test_a_wrong_figure_is_found(monkeypatch):
    kept = dict(share=0.974, count=77824.0, drop=-0.035)
    stored = {"figures": {k: dict(value=v) for k, v in kept.items()}}
    monkeypatch.setattr(results, "load", lambda name, folder=None: stored)
    right = "0.97<!-- share --> 97%<!-- share --> 77,824<!-- count --> "
    right += "−0.04<!-- drop -->"
    assert not figures.stale(right, "x")
    wrong = "0.98<!-- share --> 98%<!-- share --> 77,825<!-- count --> "
    wrong += "0.04<!-- drop -->"
    assert len(figures.stale(wrong, "x")) == 4
    assert figures.refresh(wrong, "x").replace("-0.04", "−0.04") == right


def test_a_comment_in_an_alt_text_leaves_the_page():
    words = "falls to 0.9{} in 100 steps"
    page = '<img alt="{0}" src="a.png"><svg aria-label="{0}"></svg><p>{0}</p>'
    comment, plain = words.format("&lt;!-- loss --&gt;"), words.format("")
    context = dict(body=page.format(comment))
    bookfix.plain_labels(None, "page", "page.html", context, None)
    assert context["body"] == page.format(plain).replace(f"<p>{plain}", f"<p>{comment}")


def test_an_unbound_figure_is_found():
    text = "It is 0.97 or 12% of 4,096, see section 4.1, `x = 0.5`, $0.5$,"
    text += " 0.3<!-- cited -->."
    assert figures.unbound(text) == ["0.97", "12%", "4,096"]


@each_chapter
def test_stored_outputs_are_whole_and_quiet(chapter):
    for cell in nbformat.read(chapter, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        ran = cell.execution_count or "nbval-skip" in cell.metadata.get("tags", [])
        assert ran, f"cell {cell.id} has not run"
        for output in cell.outputs:
            assert output.get("name") != "stderr", f"cell {cell.id} printed to stderr"


# The comparison of all methods, and the bench: what the stored runs have to show

GAIN = ("gain", "gain_low")


def test_the_figures_of_the_comparison_follow_from_its_runs():
    stored = results.load("families")
    derived = families.derive(stored)
    kept = stored["figures"]
    assert derived.keys() == kept.keys()
    for key, figure in derived.items():
        assert figure["value"] == pytest.approx(kept[key]["value"], abs=1e-9), key


@pytest.mark.parametrize("method", families.METHODS)
def test_every_method_beats_the_frozen_base_by_more_than_its_interval(method):
    stored = results.load("families")
    runs = results.where(stored["runs"], method=method)
    assert [r["seed"] for r in runs] == [0, 1, 2, 3, 4]
    assert all(len(r["learned"]) == 400 for r in runs)
    gain, low = (stored["figures"][f"{method}.{k}"]["value"] for k in GAIN)
    assert low > 0, f"{method} learns {gain:.3f}, and the interval reaches {low:.3f}"


@pytest.mark.parametrize("method", [*families.METHODS, *families.PROMPTS])
def test_no_neighbour_of_a_learning_rate_is_better_with_five_seeds(method):
    stored = results.load("families")
    best, mean = stored["best"][method], {}
    for lr in neighbourhood(best):
        runs = results.where(stored["rates"], method=method, lr=lr)
        assert [r["seed"] for r in runs] == [0, 1, 2, 3, 4], lr
        mean[lr] = sum(map(dev_share, runs))
    assert mean[best] == max(mean.values())
    assert {r["lr"] for r in results.where(stored["runs"], method=method)} == {best}


@pytest.mark.parametrize("method", [n for group in families.GROUPS for n in group])
def test_a_method_is_searched_on_the_diagnoses_with_five_seeds_too(method):
    stored = results.load("families")["icd"]
    best, mean = stored["best"][method], {}
    for lr in neighbourhood(best):
        runs = results.where(stored["rates"], method=method, lr=lr)
        assert {r["seed"] for r in runs if "dev" in r} == {0, 1, 2, 3, 4}, lr
        mean[lr] = sum({r["seed"]: dev_share(r) for r in runs}.values())
    assert mean[best] == max(mean.values())

    tested = results.where(stored["runs"], method=method)
    assert [(r["lr"], r["seed"]) for r in tested] == [(best, n) for n in range(5)]
    truth = results.load("icd")["test_phrases"]
    assert all(len(r["learned"]) == len(truth) for r in tested)
    runs = [dict(test=r["learned"]) for r in tested]
    even = chapters.by_seed(runs, truth).tolist()
    assert stored["by_seed"][method] == pytest.approx(even)


def test_a_search_ends_where_no_neighbour_is_better(monkeypatch):
    def run(job):
        name, lr, seed = job
        far = abs(math.log10(lr) - (-2 if name == "left" else -4))
        worst = seed == 3 and name == "right" and lr == 1e-4  # two seeds do not see it
        return dict(method=name, lr=lr, seed=seed, dev=1 - far / 10 - 4 * worst)

    monkeypatch.setattr(common, "sweep", lambda run, jobs, title: list(map(run, jobs)))
    tried, best = common.search(run, dict(left=1e-1, right=3e-3), "", (2, 5))
    assert best["left"] == 1e-2 and best["right"] in (3e-5, 3e-4)
    for name, rate in best.items():
        for lr in neighbourhood(rate):
            assert len(results.where(tried, method=name, lr=lr)) == 5
    with pytest.raises(ValueError, match="the end of its grid"):
        common.search(lambda job: run(job) | dict(dev=job[1]), dict(left=1.0), "")


def test_one_forward_pass_grades_as_greedy_decoding_does():
    model, tokenizer = base_models.load("tiny-decoder", device="cpu")
    lines = common.records("dates", ["fi", "en"], 30, "test")
    for asked in (model, prompt.add(model, 4)):
        wanted = "".join("01"[x] for x in measure.answered(asked, tokenizer, lines))
        assert common.graded(asked, tokenizer, lines)[0] == wanted
        assert "0" in wanted and "1" in wanted


def test_no_method_is_slower_or_larger_than_pefts_by_more_than_a_twentieth():
    ratios = {
        key: figure["value"]
        for key, figure in results.load("bench_methods")["figures"].items()
        if key.endswith(".peft") and ".file." not in key
    }
    assert len(ratios) >= 9 * 6, "nine methods, three widths, time and memory"
    assert not {key: r for key, r in ratios.items() if r > 1.05}
