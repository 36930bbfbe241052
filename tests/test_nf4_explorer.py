"""The page's JavaScript quantizes as `peftlab.nf4` does, and says what Python computes.

The page is written here, around `nf4_explorer.show()`. The built chapter, where it has
the explorer, goes through the same clicks.
"""

import base64
from functools import cache

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from test_browser import (
    HTML,
    REACHABLE,
    SIDEWAYS,
    browser,  # noqa: F401
)
from widgets import page_of, visiting

from peftlab import nf4
from peftlab.kit import base_models, nf4_explorer

CHAPTER = HTML / "notebooks" / "13_nf4.html"
IS_IN_CHAPTER = CHAPTER.is_file() and "nf4-explorer" in CHAPTER.read_text("utf8")
KINDS = [*nf4_explorer.TYPES, nf4_explorer.BEST]
SOME_SIZES = [16, 64, 512, 4096]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    return page_of("NF4 explorer", nf4_explorer.show().data, folder)


@pytest.fixture(scope="module", params=["alone", "chapter"][: 1 + IS_IN_CHAPTER])
def path(request, alone):
    return alone if request.param == "alone" else CHAPTER


@pytest.fixture(scope="module")
def visit(browser, path):  # noqa: F811
    with visiting(browser, path) as visit:
        yield visit


@pytest.fixture(scope="module")
def box(visit):
    return visit.page.locator(".nf4-explorer")


@cache
def weights(distribution, outlier=16):
    return nf4_explorer.weights(distribution, outlier)


def packed(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


# The arithmetic, on blocks at random

DECODE = """
    const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
    const floats = text => new Float32Array(bytes(text).buffer);
    const encode = array => {
        const all = new Uint8Array(array.buffer), parts = [];
        for (let i = 0; i < all.length; i += 8192)
            parts.push(String.fromCharCode(...all.subarray(i, i + 8192)));
        return btoa(parts.join(''));
    };
    const {quantize, measure, lloyd, draw, data} =
        document.querySelector('.nf4-explorer').nf4;
"""
QUANTIZE = (
    "cases => {"
    + DECODE
    + """return cases.map(([weights, size, code]) => {
        weights = floats(weights);
        code = floats(code);
        const {indices, absmax} = quantize(weights, size, code);
        const {rms, largest} = measure(weights, size, code);
        return {indices: encode(indices), absmax: encode(absmax), rms, largest};
    });
}"""
)


@cache
def cases():
    """[(weights, block size, type), ...]: more than 10,000 blocks of every sort."""
    dice = torch.Generator().manual_seed(13)
    found = []
    for size in (2, 6, 100, *nf4_explorer.SIZES):
        for kind, code in nf4_explorer.TYPES.items():
            rows = torch.cat(list(_blocks(size, code, dice)))
            cut = int(torch.randint(size, (), generator=dice))
            found.append((rows.flatten()[: rows.numel() - cut], size, kind))
    return found


def _blocks(size, code, dice):
    """Blocks of all sorts, (some, size) each, in a random order at random scales."""
    count = max(3, 1_500 // size)
    normal = torch.randn(count, size, generator=dice)
    uniform = 2 * torch.rand(count, size, generator=dice) - 1
    edges = _edges(code)[torch.randint(48, (count, size), generator=dice)]
    edges[:, 0] = 1
    edges *= 1 + torch.rand(count, 1, generator=dice)  # to the last bit at a midpoint
    rows = torch.cat([normal, uniform, normal**5, edges])
    order = torch.randperm(len(rows), generator=dice)
    yield rows[order]

    scales = 10 ** (60 * torch.rand(count, 1, generator=dice) - 38)
    yield normal * scales  # from denormal floats to large ones
    yield torch.zeros(2, size)
    yield torch.full((1, size), 3e-39)
    is_zero = torch.rand((), generator=dice) < 0.5
    yield edges[:1] * ~is_zero  # the last block, which is cut


def _edges(code):
    """The midpoints between values, and the floats beside them, 48 with a zero."""
    values = code.sort().values
    midpoints = (values[1:] + values[:-1]) / 2
    below, above = (midpoints.nextafter(torch.tensor(t)) for t in (-2.0, 2.0))
    return torch.cat([midpoints, below, above, -torch.zeros(3)])


@cache
def expected():
    """What nf4.py makes of each case: indices, absmax and the two errors."""
    answers = []
    for x, size, kind in cases():
        code = nf4_explorer.TYPES[kind]
        q = nf4.quantize(x, size, code)
        high, low = q.codes.view(-1) >> 4, q.codes.view(-1) & 15
        indices = torch.stack([high, low], 1).flatten()[: len(x)]
        lost = nf4.dequantize(q).double() - x.double()
        scale = x.double().square().mean().sqrt()
        rms = (lost.square().mean().sqrt() / scale).item()
        largest = (lost.abs().max() / scale).item()
        answers.append((indices.numpy(), q.absmax.numpy(), rms, largest))
    return answers


def differences(page):
    """The cases that the page's JavaScript quantizes in another way, in words."""
    given = page.evaluate(
        QUANTIZE, [(packed(x), s, packed(nf4_explorer.TYPES[k])) for x, s, k in cases()]
    )
    bad = []
    for (_, size, kind), got, want in zip(cases(), given, expected(), strict=True):
        indices, absmax, rms, largest = want
        where = f"{kind}, blocks of {size}"
        if not np.array_equal(unpacked(got["indices"], np.uint8), indices):
            bad.append(f"{where}: other indices")
        if not np.array_equal(unpacked(got["absmax"], np.float32), absmax):
            bad.append(f"{where}: other absmax")
        if got["rms"] != pytest.approx(rms, rel=1e-6):
            bad.append(f"{where}: error {got['rms']}, not {rms}")
        if got["largest"] != pytest.approx(largest, rel=1e-6):
            bad.append(f"{where}: largest error {got['largest']}, not {largest}")
    return bad


def test_ten_thousand_blocks_are_quantized_as_python_does(visit):
    assert sum(-(-len(x) // size) for x, size, _ in cases()) >= 10_000
    assert not differences(visit.page)


MISTAKES = {  # what it says | what somebody might write
    "at a midpoint up": ("divided[i] > midpoints", "divided[i] >= midpoints"),
    "a factor in double": ("fround(1 / divisor)", "1 / divisor"),
    "no factor": ("weights[i] * factor", "weights[i] / divisor"),
    "midpoints in double": ("fround(v + values[i]) / 2", "(v + values[i]) / 2"),
    "ranks for indices": ("= order[rank]", "= rank"),
    "a partial block as the others": ("end - start === size;", "true;"),
    "no least divisor": ("Math.max(largest, TINY)", "largest"),
    "the signed largest": ("Math.abs(weights[i]))", "weights[i])"),
    "mean for RMS": ("lost += error * error", "lost += error"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(browser, alone, tmp_path, mistake):  # noqa: F811
    right, wrong = MISTAKES[mistake]
    text = alone.read_text("utf8")
    assert right in text
    path = tmp_path / "wrong.html"
    path.write_text(text.replace(right, wrong), "utf8")
    page = browser.new_page()
    page.goto(path.as_uri())
    found = differences(page)
    page.close()
    assert found


# The weights, and Lloyd's sixteen

DRAW = "([name, outlier]) => {" + DECODE + "return encode(draw(name, outlier, data)); }"
LLOYD = (
    "([weights, size]) => {"
    + DECODE
    + """
    const start = Float32Array.from(data.codes.NF4);
    return encode(lloyd(floats(weights), size, start, data.rounds));
}"""
)


@pytest.mark.parametrize("distribution", nf4_explorer.DISTRIBUTIONS)
def test_the_page_draws_the_weights_that_python_draws(visit, distribution):
    for outlier in nf4_explorer.OUTLIERS:
        drawn = visit.page.evaluate(DRAW, [distribution, outlier])
        wanted = weights(distribution, outlier).numpy()
        assert np.array_equal(unpacked(drawn, np.float32), wanted)


def test_the_weights_are_what_they_are_called():
    normal, uniform, outlier = map(weights, ("normal", "uniform", "outlier"))
    assert normal.mean().abs() < 0.02 and (normal.std() - 1).abs() < 0.02
    assert ((normal**4).mean() - 3).abs() < 0.2
    inside = [(normal.abs() < z).double().mean().item() for z in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.01)
    tenths = torch.histc(uniform, 10, -1, 1) / len(uniform)
    assert (tenths - 0.1).abs().max() < 0.01
    changed = (outlier != normal).nonzero().flatten().tolist()
    assert len(changed) == 1 and outlier[changed[0]] == 16


def test_the_layer_is_minilms():
    model, _ = base_models.load_minilm("cpu")
    layer = model.get_parameter(nf4_explorer.LAYER).detach().flatten()
    held = weights("minilm")
    assert len(held) == nf4_explorer.COUNT
    assert torch.equal(held, layer[: len(held)].bfloat16().float())


@pytest.mark.parametrize("distribution", nf4_explorer.DISTRIBUTIONS)
def test_lloyds_sixteen_are_the_same_in_both_and_lose_least(visit, distribution):
    x = weights(distribution)
    for size in nf4_explorer.SIZES:
        fitted = nf4_explorer.lloyd(x, size)
        drawn = visit.page.evaluate(LLOYD, [packed(x), size])
        assert unpacked(drawn, np.float32) == pytest.approx(fitted.numpy(), abs=1e-6)
        least = nf4_explorer.errors(x, size, fitted)[0]
        for code in nf4_explorer.TYPES.values():
            assert least < nf4_explorer.errors(x, size, code)[0]


def test_no_small_step_from_lloyds_sixteen_is_better():
    """One more round, and a step of one value, change next to nothing."""
    x = weights("normal")
    fitted = nf4_explorer.lloyd(x, 64)
    least = nf4_explorer.errors(x, 64, fitted)[0]
    for i in range(16):
        for step in (-0.01, 0.01):
            moved = fitted.clone()
            moved[i] += step
            assert nf4_explorer.errors(x, 64, moved)[0] > least - 1e-6


# What the page says


def said(x, kind, size):
    """The sentence, from nf4.py and from Lloyd's values in Python."""
    code = nf4_explorer.code(kind, x, size)
    rms, largest = nf4_explorer.errors(x, size, code)
    layer = torch.empty(4096, 4096, device="meta")
    bits = nf4.quantize(layer, size).bits()
    double = nf4.quantize(layer, size, double_quant=True).bits()
    return (
        f"{kind}, blocks of {size}: relative RMS error {rms:.4f}, largest error "
        f"{largest:.2f} of the weights' RMS. {bits + 1e-9:.3f} bits a weight; "
        f"{double:.3f} with double quantization."  # JavaScript rounds a half up
    )


def shown(box):
    return box.locator("[role=status]").inner_text()


def move(slider, steps, value):
    """A slider by keyboard: to its first step, then to the value's."""
    slider.press("Home")
    for _ in range(steps.index(value)):
        slider.press("ArrowRight")


def test_it_starts_with_normal_weights_in_nf4_and_blocks_of_64(box):
    assert shown(box) == said(weights("normal"), "NF4", 64)


@pytest.mark.parametrize("distribution", nf4_explorer.DISTRIBUTIONS)
def test_the_sentence_is_what_python_computes(box, distribution):
    box.get_by_role("combobox", name="Weights").select_option(distribution)
    size = box.get_by_role("slider", name="Block size")
    for each in SOME_SIZES:
        move(size, nf4_explorer.SIZES, each)
        for kind in KINDS:
            box.get_by_role("combobox", name="Type").select_option(kind)
            assert shown(box) == said(weights(distribution), kind, each)
        assert size.get_attribute("aria-valuetext") == f"{each} weights"


def test_the_outlier_has_a_slider_of_its_own_and_only_then(box):
    outlier = box.get_by_role("slider", name="Outlier")
    for distribution in nf4_explorer.DISTRIBUTIONS:
        box.get_by_role("combobox", name="Weights").select_option(distribution)
        assert outlier.count() == (distribution == "outlier")
    box.get_by_role("combobox", name="Type").select_option("NF4")
    for large in nf4_explorer.OUTLIERS:
        move(outlier, nf4_explorer.OUTLIERS, large)
        move(box.get_by_role("slider", name="Block"), nf4_explorer.SIZES, 1024)
        assert shown(box) == said(weights("outlier", large), "NF4", 1024)
        wanted = f"{large} standard deviations"
        assert outlier.get_attribute("aria-valuetext") == wanted


def test_the_drawings_are_what_python_computes(box):
    box.get_by_role("combobox", name="Weights").select_option("minilm")
    box.get_by_role("combobox", name="Type").select_option("FP4")
    move(box.get_by_role("slider", name="Block"), nf4_explorer.SIZES, 128)
    x, code = weights("minilm"), nf4.FP4
    codes = nf4.quantize(x, 128, code).codes.view(-1)
    values = code[torch.cat([codes >> 4, codes & 15]).long()]
    levels, curve = box.locator("svg").all()
    label = levels.get_attribute("aria-label")
    for value in code.unique():
        assert f"{value:.3f}: {100 * (values == value).double().mean():.1f}%" in label
    assert levels.locator("rect.hue").count() == len(code.unique()) == 15

    rms = [nf4_explorer.errors(x, size, code)[0] for size in nf4_explorer.SIZES]
    label = curve.get_attribute("aria-label")
    for error, size in zip(rms, nf4_explorer.SIZES, strict=True):
        assert f"{error:.4f} at {size}" in label
    points = curve.locator("polyline.chosen").get_attribute("points").split()
    lost = [192 - float(point.split(",")[1]) for point in points]
    assert [each / lost[0] for each in lost] == pytest.approx(
        [error / rms[0] for error in rms]
    )
    assert curve.locator("polyline").count() == len(KINDS)


def test_the_table_is_what_python_computes():
    page = BeautifulSoup(nf4_explorer.show().data, "html.parser")
    first, *rows = (row for row in page.find_all("tr") if row.find("td"))
    bits = [f"{4 + 32 / size:.3f}" for size in nf4_explorer.SHOWN]
    assert [cell.text for cell in first.find_all("td")] == bits
    every = [(d, kind) for d in nf4_explorer.DISTRIBUTIONS for kind in KINDS]
    for row, (distribution, kind) in zip(rows, every, strict=True):
        assert row.th.text == kind
        x = weights(distribution)
        for cell, size in zip(row.find_all("td"), nf4_explorer.SHOWN, strict=True):
            error, _ = nf4_explorer.errors(x, size, nf4_explorer.code(kind, x, size))
            assert cell.text == f"{error:.4f}"


# The page itself


def test_the_explorer_is_small():
    assert len(nf4_explorer.show().data.encode()) < 120_000


def test_everything_is_reached_and_moved_by_tab_and_arrows(browser, path):  # noqa: F811
    page = browser.new_page()
    page.goto(path.as_uri())
    box = page.locator(".nf4-explorer")
    is_there = "document.activeElement.matches('.nf4-explorer select')"
    for _ in range(600):  # a chapter has many links before it
        page.keyboard.press("Tab")
        if page.evaluate(is_there):
            break
    for _ in range(3):
        page.keyboard.press("ArrowDown")  # to the outlier, which brings its slider
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    assert shown(box) == said(weights("outlier", 32), "FP4", 128)
    focus = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(focus) == "solid"

    page.keyboard.press("Tab")  # the link
    page.keyboard.press("Tab")
    assert not box.locator("table").is_visible()
    page.keyboard.press("Enter")
    assert box.locator("table").is_visible()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(visit, box, scheme):
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    page.wait_for_selector(f"html[data-theme={scheme}]", state="attached")
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_function(REACHABLE)
    for kind in KINDS:
        box.get_by_role("combobox", name="Type").select_option(kind)
        assert not page.evaluate(SIDEWAYS)
        assert not visit.axe()
        ink = "getComputedStyle(document.querySelector('.nf4-explorer {}')).{}"
        line = page.evaluate(ink.format("polyline.chosen", "stroke"))
        assert line == page.evaluate(ink.format("rect.hue", "fill"))
        text = page.evaluate(ink.format("svg text", "fill"))
        assert text == page.evaluate(ink.format("[role=status]", "color"))
    page.emulate_media(color_scheme="light")


def test_a_reader_without_javascript_sees_the_table(browser, path):  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    box = page.locator(".nf4-explorer")
    assert box.locator("table").is_visible()
    assert "Apache 2.0" in box.inner_text()
    assert not box.locator(":is(input, select, svg):visible").count()
    context.close()


def test_nothing_was_asked_from_outside_and_nothing_complained(visit):
    """The last test: it speaks for all that came before it in this window."""
    assert not visit.trouble
