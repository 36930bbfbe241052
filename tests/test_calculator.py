"""The calculator in the page: table, JavaScript and Python count the same bytes."""

import random

import nbformat
import pytest
from bs4 import BeautifulSoup
from test_browser import (
    HTML,
    REACHABLE,
    SIDEWAYS,
    browser,  # noqa: F401
)
from widgets import page_of, visiting

from experiments.sweeps import memory_table as sweep
from peftlab import memory
from peftlab.kit import calculator
from peftlab.memory import calculator as counted
from peftlab.memory import cards, table

PAGE = HTML / "book" / "memory.html"
CHAPTER = HTML.parents[1] / "notebooks" / "15_fitting_in_memory.ipynb"
IS_IN_PAGE = PAGE.is_file() and "calculator-live" in PAGE.read_text("utf8")
TABLE = table.content()
MODELS = [*TABLE["models"]]
OPTIMIZERS = [*TABLE["optimizers"]]
COUNT = """([table, every]) => every.map(
    settings => memoryCalculator.count(table, settings))"""
BEST = """([table, settings]) => {
    const lever = memoryCalculator.best(table, settings);
    return lever && [lever[0], lever[1].total];
}"""


def drawn(n, models, seed=0):
    """Settings at random, as `lookup` takes them."""
    dice = random.Random(seed)
    every = []
    while len(every) < n:
        name, method = dice.choice(models), dice.choice([*memory.METHODS])
        positions = TABLE["models"][name]["positions"]
        settings = dict(
            model=name,
            method=method,
            seq=dice.randint(1, min(positions, dice.choice([16, 300, 5000, 40_000]))),
            batch=dice.choice([1, 1, 2, 3, 4, 7, 16, 60]),
            optimizer=dice.choice(OPTIMIZERS),
        )
        if method in counted.LORAS:
            settings["r"] = dice.choice([1, 2, 7, 8, 16, 33, 64, 256])
        if method in counted.PACKED:
            settings["kbit_prepared"] = dice.random() < 0.4
        if method != "inference":
            settings["checkpointing"] = dice.random() < 0.5
        settings["gpus"] = dice.choice([1, 1, 2, 3, 8, 64])
        if settings["gpus"] > 1:
            settings["zero"] = dice.randint(0, 2 + (method != "lora8bit"))
        every.append(settings)
    return every


def in_page(settings):
    """The same settings as the script names them."""
    more = dict(r=0, checkpointing=False, zero=0, kbit=False)
    found = more | {k: v for k, v in settings.items() if k != "kbit_prepared"}
    return found | dict(kbit=settings.get("kbit_prepared", False))


# The table


SMALL = ["tiny-decoder", "bert-base", "gpt2"]
LARGE = ["qwen2.5-0.5b", "mistral-7b", "llama-3-8b"]


@pytest.mark.parametrize("settings", drawn(28, SMALL) + drawn(2, LARGE))
def test_the_table_is_what_a_step_counts(settings):
    step = settings | dict(config=settings["model"])
    step.pop("model")
    assert table.lookup(**settings) == memory.step(**step)


def test_a_row_of_the_table_is_what_is_recorded_today():
    way = ("qlora", None, True)
    stored = TABLE["models"]["tiny-decoder"]["ways"]["qlora.checkpointing"]
    assert sweep.entry("tiny-decoder", *way) == stored


def test_the_table_has_every_way_of_every_model_and_the_cards():
    for name, model in TABLE["models"].items():
        same = TABLE["models"][model.get("same", name)]
        assert same["ways"].keys() == sweep.ways().keys()
        assert model["positions"] == memory.load(name).max_position_embeddings
    assert TABLE["cards"] == memory.CARDS
    assert {*TABLE["no_bfloat16"]} == cards.NO_BFLOAT16
    room = dict(GiB=cards.GIB, context=cards.CONTEXT, holes=cards.HOLES)
    assert TABLE["room"] == room
    assert table.FILE.stat().st_size < 300_000


def test_numbers_stay_where_javascript_is_exact():
    largest = dict(model="llama-3-70b", seq=8192, batch=64, method="full")
    assert table.lookup(**largest)["total"] < 2**53 / 100


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(model="gpt-5"), "no model in the table 'gpt-5'; there are: tiny-decoder"),
        (dict(optimizer="sgd"), "there are: adamw, adamw8bit"),
        (dict(method="full", r=8), "r is of lora"),
        (dict(seq=257), "maximum, 256"),
        (dict(batch=0), "batch must be a whole number"),
        (dict(zero=1), "gpus must be at least 2"),
    ],
)
def test_what_the_table_lacks_gets_one_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        table.lookup(**dict(model="tiny-decoder") | settings)


# The page


def test_the_chapter_has_stored_what_show_draws():
    cells = nbformat.read(CHAPTER, as_version=4).cells
    outputs = [out for c in cells for out in c.get("outputs", []) if "data" in out]
    found = [out.data.get("text/html", "") for out in outputs]
    stored = [html for html in found if 'class="calculator"' in html]
    assert stored == [calculator.show().data], "run `python tools/notebooks.py 15`"


def test_without_javascript_there_is_a_table_of_common_cases():
    page = BeautifulSoup(calculator.show().data, "html.parser")
    rows = [row for row in page.details.find_all("tr") if row.find("td")]
    assert [row.th.text for row in rows] == [*calculator.COMMON]
    for row in rows:
        for cell, method in zip(row.find_all("td"), calculator.METHODS, strict=True):
            settings = dict(seq=512, batch=4, checkpointing=method != "inference")
            total = table.lookup(row.th.text, method, **settings)["total"]
            assert cell.text == f"{total / 1e9:.1f}"


@pytest.mark.parametrize(
    "start, words",
    [
        (dict(rank=8), "no setting 'rank'; there are: model, method, r"),
        (dict(r=3), "no r 3; there are: 1, 2, 4"),
        (dict(model="llama-5"), "no model 'llama-5'; there are: tiny-decoder"),
    ],
)
def test_a_start_that_is_no_choice_gets_one_sentence(start, words):
    with pytest.raises(ValueError, match=words):
        calculator.show(start)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calculator")
    return page_of("Memory calculator", calculator.show().data, folder)


@pytest.fixture(scope="module", params=["alone", "book"][: 1 + IS_IN_PAGE])
def path(request, alone):
    return alone if request.param == "alone" else PAGE


@pytest.fixture(scope="module")
def visit(browser, path):  # noqa: F811
    with visiting(browser, path) as visit:
        yield visit


@pytest.fixture(scope="module")
def box(visit):
    return visit.page.locator(".calculator")


def test_javascript_counts_the_same_bytes_as_python(visit):
    every = drawn(600, MODELS, seed=1)
    found = visit.page.evaluate(COUNT, [TABLE, [in_page(s) for s in every]])
    for settings, sizes in zip(every, found, strict=True):
        want = table.lookup(**settings)
        assert sizes == {part: want[part] for part in sizes}, settings
    assert {s["method"] for s in every} == {*memory.METHODS}
    assert {s["model"] for s in every} == {*MODELS}


def said(now):
    """How the page's sentence should begin, and the figures."""
    sizes = table.lookup(**now)
    gpus = now.get("gpus", 1)
    where = f"each of {gpus} GPUs" if gpus > 1 else "one GPU"
    return f"{sizes['total'] / 1e9:.2f} GB on {where}. ", sizes


def state(box):
    return box.locator("[role=status]").inner_text()


START = dict(model="llama-2-7b", method="qlora", r=16, seq=512, batch=4)
START |= dict(checkpointing=True)


def test_it_starts_with_four_sequences_on_a_free_card(box):
    first, sizes = said(START)
    assert state(box).startswith(first + "The smallest common card that holds it: T4")
    assert "no bfloat16: use float16" in state(box)
    for part in counted.PARTS:
        shown = box.locator(f"td.{part}").inner_text()
        assert shown == f"{sizes[part] / 1e9:.2f} GB"


def test_every_control_by_keyboard(visit, box):
    """Tab through all that is on, and change each with a key."""
    now = dict(START)
    steps = [
        ("method", "ArrowUp", dict(method="lora8bit")),
        ("r", "ArrowDown", dict(r=32)),
        ("seq", "ArrowDown", dict(seq=1024)),
        ("batch", "ArrowUp", dict(batch=2)),
        ("optimizer", "ArrowDown", dict(optimizer="adamw8bit")),
        ("gpus", "ArrowDown", dict(gpus=2)),
        ("zero", "ArrowDown", dict(zero=1)),
        ("checkpointing", "Space", dict(checkpointing=False)),
        ("kbit", "Space", dict(kbit_prepared=True)),
    ]
    focused = "document.activeElement.name"
    box.locator("[name=model]").focus()
    for name, key, change in steps:
        visit.page.keyboard.press("Tab")
        assert visit.page.evaluate(focused) == name
        visit.page.keyboard.press(key)
        now |= change
        assert state(box).startswith(said(now)[0]), name
        assert box.get_attribute("data-total") == str(said(now)[1]["total"])
    assert "What helps most next: activation checkpointing" in state(box)


def test_what_cannot_be_is_off(box):
    def choose(**values):
        for name, value in values.items():
            box.locator(f"[name={name}]").select_option(str(value))

    def is_off(name):
        return box.locator(f"[name={name}]").is_disabled()

    choose(method="inference", gpus=1)
    assert all(map(is_off, ["r", "optimizer", "checkpointing", "kbit", "zero"]))
    choose(method="full", gpus=8)
    assert is_off("r") and is_off("kbit") and not is_off("zero")
    choose(zero=3)
    choose(method="lora8bit")
    assert box.locator("[name=zero]").input_value() == "2"
    choose(seq=4096)
    choose(model="tiny-decoder")
    assert box.locator("[name=seq]").input_value() == "256", "the longest it can"


def test_the_lever_is_the_one_with_the_lowest_total(visit):
    cases = [
        (dict(method="full"), "LoRA instead of training all weights"),
        (dict(method="lora", checkpointing=True), "a base in 4 bits"),
        (dict(method="qlora", seq=4096, batch=8), "activation checkpointing"),
        (dict(method="inference", batch=1), None),
    ]
    for more, want in cases:
        now = dict(START, checkpointing=False) | more
        if now["method"] not in counted.LORAS:
            now.pop("r")
        if now["method"] == "inference":
            now.pop("checkpointing")
        page = in_page(now | dict(optimizer="adamw", gpus=1)) | dict(r=16)
        found = visit.page.evaluate(BEST, [TABLE, page])
        assert (found and found[0]) == want
        if want and "LoRA" in want:
            then = table.lookup(**now | dict(method="lora", r=16))
            assert found[1] == then["total"]


def test_half_a_batch_with_gradients_added_up_has_them_from_the_start(visit):
    now = dict(START, method="full", r=0, batch=2)
    page = in_page(now | dict(optimizer="adamw", gpus=1)) | dict(accumulate=True)
    found = visit.page.evaluate(COUNT, [TABLE, [page]])[0]
    row = TABLE["models"]["llama-2-7b"]["ways"]["full.checkpointing"]
    parts = table.evaluate(row, 2, 512, 0)
    assert found["activations"] == max(parts["alone"], parts["inputs"])
    assert found["gradients"] == parts["gradients"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(visit, box, scheme):
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    page.wait_for_selector(f"html[data-theme={scheme}]", state="attached")
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_function(REACHABLE)
    assert not page.evaluate(SIDEWAYS)
    assert not visit.axe()
    page.emulate_media(color_scheme="light")
    assert not visit.trouble


def test_the_common_cases_are_folded_away_until_asked_for(browser, path):  # noqa: F811
    page = browser.new_page()
    page.goto(path.as_uri())
    cases = page.locator(".calculator details table")
    assert not cases.is_visible()
    page.locator(".calculator summary").press("Enter")
    assert cases.is_visible()
    page.close()


def test_a_reader_without_javascript_sees_the_common_cases(browser, path):  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator(".calculator details table").is_visible()
    assert not page.locator(".calculator :is(input, select):visible").count()
    context.close()
