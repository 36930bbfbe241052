"""The sweep to drag through: the page says what is stored, whatever is chosen."""

from statistics import mean

import pytest
from bs4 import BeautifulSoup
from test_browser import (
    HTML,
    REACHABLE,
    SIDEWAYS,
    browser,  # noqa: F401
)
from widgets import visiting

from peftlab.kit import explore, results

PAGE = HTML / "notebooks" / "05_rank_alpha_rate.html"
RUNS = results.load("rank_alpha_rate")["runs"]
RANKS = sorted({run["r"] for run in RUNS})
RATES = sorted({run["lr"] for run in RUNS})
SCALINGS = list(dict.fromkeys(run["scaling"] for run in RUNS))


def said(scaling, r, lr):
    """What the page should say of a combination, straight from the runs."""
    same = results.where(RUNS, scaling=scaling, r=r, lr=lr)
    shares = results.shares(same, "learned")
    change = mean(run["change"] for run in same)
    return (
        f"Rank {r}, alpha {same[0]['alpha']}, learning rate {lr:g}: "
        f"{mean(shares):.2f} of the dates right, {min(shares):.2f} to "
        f"{max(shares):.2f} over the seeds. Size of the change: {change:.2f}."
    )


def test_the_table_holds_every_mean():
    page = BeautifulSoup(explore.rates(RUNS).data, "html.parser")
    rows = [row for row in page.find_all("tr") if row.find("td")]
    assert len(rows) == len(SCALINGS) * len(RANKS)
    wanted = [(s, r) for s in SCALINGS for r in RANKS]
    for row, (scaling, r) in zip(rows, wanted, strict=True):
        assert row.th.text == str(r)
        for cell, lr in zip(row.find_all("td"), RATES, strict=True):
            same = results.where(RUNS, scaling=scaling, r=r, lr=lr)
            assert cell.text == f"{mean(results.shares(same, 'learned')):.2f}"


def test_a_combination_without_a_run_is_refused():
    runs = [run for run in RUNS if (run["r"], run["lr"]) != (RANKS[0], RATES[0])]
    with pytest.raises(ValueError, match="no run at .*, rank 1, learning rate 0.001"):
        explore.rates(runs)


@pytest.fixture(scope="module")
def visit(browser):  # noqa: F811
    with visiting(browser, PAGE) as visit:
        yield visit


@pytest.fixture(scope="module")
def box(visit):
    return visit.page.locator(".explore")


def shown(box):
    return box.locator("[role=status]").inner_text()


def slider(box, name):
    return box.get_by_role("slider", name=name)


def test_it_starts_where_the_chapter_does(box):
    assert shown(box) == said("alpha = 2r", 16, 0.01)


def test_every_step_of_each_control_by_keyboard_says_what_is_stored(box):
    rank, rate = slider(box, "Rank"), slider(box, "Learning rate")
    menu = box.get_by_label("Scaling")
    for scaling in SCALINGS:
        menu.select_option(scaling)
        rank.press("Home")
        for r in RANKS:
            rate.press("Home")
            for lr in RATES:
                assert shown(box) == said(scaling, r, lr)
                assert rate.get_attribute("aria-valuetext") == f"{lr:g}"
                rate.press("ArrowRight")
            assert rank.get_attribute("aria-valuetext") == str(r)
            rank.press("ArrowRight")


def test_the_drawing_is_the_table(box):
    box.get_by_label("Scaling").select_option(SCALINGS[0])
    slider(box, "Rank").press("End")
    same = [
        results.where(RUNS, scaling=SCALINGS[0], r=RANKS[-1], lr=lr) for lr in RATES
    ]
    means = [f"{mean(results.shares(runs, 'learned')):.2f}" for runs in same]
    points = box.locator("polyline.chosen").get_attribute("points").split()
    heights = [(150 - float(point.split(",")[1])) / 140 for point in points]
    assert heights == pytest.approx([float(m) for m in means])
    label = box.locator("svg").get_attribute("aria-label")
    for m, lr in zip(means, RATES, strict=True):
        assert f"{m} at {lr:g}" in label
    assert box.locator("polyline").count() == len(RANKS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(visit, box, scheme):
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    page.wait_for_selector(f"html[data-theme={scheme}]", state="attached")
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_function(REACHABLE)
    assert not page.evaluate(SIDEWAYS)
    assert not visit.axe()
    ink = "getComputedStyle(document.querySelector('.explore {}')).{}"
    line = page.evaluate(ink.format("polyline.chosen", "stroke"))
    wanted = {"light": "rgb(200, 80, 15)", "dark": "rgb(240, 138, 82)"}
    assert line == wanted[scheme]
    text = page.evaluate(ink.format("svg text", "fill"))
    assert text == page.evaluate(ink.format("[role=status]", "color"))
    page.emulate_media(color_scheme="light")
    assert not visit.trouble


def test_the_numbers_are_folded_away_until_asked_for(browser):  # noqa: F811
    page = browser.new_page()
    page.goto(PAGE.as_uri())
    table = page.locator(".explore table")
    assert not table.is_visible()
    page.locator(".explore summary").press("Enter")
    assert table.is_visible()
    page.close()


def test_a_reader_without_javascript_sees_all_the_numbers(browser):  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(PAGE.as_uri())
    assert page.locator(".explore table").is_visible()
    assert not page.locator(".explore :is(input, select):visible").count()
    context.close()
