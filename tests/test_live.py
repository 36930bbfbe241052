"""The live page: the model in the browser answers as torch does, whatever is set.

Both sides compute with the weights of the data file. torch gets them through
`tools/live.py`, which reads the file on its own and folds the adapters into the
weights; the page runs the adapters beside them.
"""

from functools import cache

import pytest
import torch
from test_browser import (
    CONTRAST,
    HTML,
    REACHABLE,
    SIDEWAYS,
    Visit,
    browser,  # noqa: F401
)

from peftlab import lora
from peftlab.kit import base_models, data, measure, results
from tools import live

PAGE = HTML / "book" / "live.html"
SCRIPTS = HTML / "_static" / "live"
EVERY = list(live.LANGUAGES)

SETTINGS = [  # languages of the prompts | adapters, rank, strength
    ("en fr es it pt nl sv da ro ca", [], 8, 1.0),
    ("de fi hu pl sw tr", [], 8, 1.0),
    ("de en", ["de"], 8, 1.0),
    ("fi en", ["fi"], 8, 1.0),
    ("hu en", ["hu"], 8, 1.0),
    ("pl en", ["pl"], 8, 1.0),
    ("sw en", ["sw"], 8, 1.0),
    ("tr en", ["tr"], 8, 1.0),
    ("fi en", ["fi"], 1, 1.0),
    ("hu de", ["hu"], 3, 0.85),
    ("pl en", ["pl"], 0, 1.0),
    ("fi de", ["fi"], 8, 0.4),
    ("sw en", ["sw"], 8, 1.5),
    ("tr en", ["tr"], 8, 0.0),
    ("de fi en", ["de", "fi"], 8, 1.0),
    ("hu sw pl", ["hu", "sw", "pl"], 5, 0.6),
    ("en tr", EVERY, 8, 0.3),
]
ODD = [  # what nobody would call a date
    "",
    " ",
    "2026",
    "\u0661\u0662 مارس \u0662\u0660\u0662\u0666",  # digits outside ASCII
    "1²½Ⅷ\u0663",
    "12. märz\u00a02026",
    "a\u0085b \ufeffc\u2003 d\u3000",  # spaces to one language, not to the other
    "it's  the 3rd,   isn't it? ",
    "日本語 2026年3月12日",
    "🙂🙂 12 mars 2026",
    "e\u0301te\u0301 12",
    "tab\tand\nnewline",
    "-- 12--03--2026 --",
]

ENCODE = """texts => {
    const {tokens, merges, config} = window.tinyDecoderData;
    const tokenizer = new TinyTokenizer(tokens, merges, config.bos_token_id);
    return texts.map(text => tokenizer.encode(text));
}"""
ANSWERS = """([cases, whole]) => {
    const {tokens, merges, config} = window.tinyDecoderData;
    const tokenizer = new TinyTokenizer(tokens, merges, config.bos_token_id);
    const decoder = new TinyDecoder(window.tinyDecoderData);
    const answer = (ids, setting) => {
        const steps = decoder.answer(ids, setting).map(step => step.id);
        return tokenizer.decode(steps.filter(id => id != config.eos_token_id));
    };
    return cases.map(({prompt, setting}) => {
        const ids = tokenizer.encode(prompt);
        const logits = Array.from(decoder.logits(ids, setting));
        return {ids, logits, text: whole ? answer(ids, setting) : null};
    });
}"""


@pytest.fixture(scope="module")
def visit(browser):  # noqa: F811
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, offline=True, reduced_motion="reduce"
    )
    visit = Visit(context.new_page())
    visit.open(PAGE)
    load(visit.page)
    yield visit
    context.close()


def load(page):
    """Press the button, and wait until the curves of the second panel are drawn."""
    page.click("#live-load")
    wait_for_curves(page)


def wait_for_curves(page):
    drawn = "document.querySelector('#live-chart').dataset.points == 16"
    page.wait_for_function(drawn, timeout=60_000)


@cache
def content():
    return live.unpack(live.DATA_FILE.read_text("ascii"))


@cache
def cases():
    """[{"prompt", "setting"}, ...], those of a setting one after another."""
    found = []
    for languages, adapters, rank, strength in SETTINGS:
        setting = dict(adapters=adapters, rank=rank, strength=strength)
        codes = languages.split()
        for code in codes:
            records = data.records("dates", code, 10 // len(codes) + 1, "test", seed=7)
            found += [dict(prompt=r.prompt, setting=setting) for r in records]
    for kind in ("amounts", "render", "refuse"):
        setting = dict(adapters=[], rank=8, strength=1.0)
        records = data.records(kind, "fr", 4, "test", seed=7)
        found += [dict(prompt=r.prompt, setting=setting) for r in records]
    return found


@cache
@torch.no_grad()
def expected():
    """What torch gives for each case: {"ids", "text", "logits"}."""
    answers = []
    while len(answers) < len(cases()):
        setting = cases()[len(answers)]["setting"]
        prompts = [c["prompt"] for c in cases() if c["setting"] is setting]
        model, tokenizer = live.assemble(
            content(), setting["adapters"], setting["rank"], setting["strength"]
        )
        texts = measure.answers(model, tokenizer, prompts)
        for prompt, text in zip(prompts, texts, strict=True):
            ids = tokenizer(prompt)["input_ids"]
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            answers.append(dict(ids=ids, text=text, logits=logits))
    return answers


def largest_gap(given, wanted):
    """Between the logits of the page and those of torch."""
    pairs = zip(given, wanted, strict=True)
    return max((torch.tensor(g["logits"]) - w["logits"]).abs().max() for g, w in pairs)


def column(rows, key):
    return [row[key] for row in rows]


# The model


def test_the_page_answers_as_torch_does(visit):
    given, wanted = visit.page.evaluate(ANSWERS, [cases(), True]), expected()
    texts = [text.strip(" ") for text in column(given, "text")]
    assert len(given) >= 200 and len(set(texts)) > 100
    assert column(given, "ids") == column(wanted, "ids")
    assert texts == column(wanted, "text")
    assert largest_gap(given, wanted) < 1e-2


def test_any_text_becomes_the_tokens_that_the_library_makes_of_it(visit):
    _, tokenizer = base_models.load("tiny-decoder", device="cpu")
    everywhere = [data.records(k, "sw", 5)[i].line for k in data.KINDS for i in (0, 4)]
    texts = ODD + everywhere
    for text, ids in zip(texts, visit.page.evaluate(ENCODE, texts), strict=True):
        assert ids == tokenizer(text)["input_ids"], repr(text)


def test_an_adapter_of_the_page_is_the_lora_of_chapter_2():
    adapter = content()["adapters"]["hu"]
    tensors = {}
    for name, t in adapter["tensors"].items():
        path, _, factor = name.rpartition(".")
        tensors[f"{path}.lora_{factor[0]}"] = t if factor == "A" else t.T

    beside, tokenizer = live.assemble(content())
    lora.add(beside, "all-linear", r=8, alpha=live.SETTINGS["alpha"])
    lora.load_state_dict(beside, tensors)
    folded, _ = live.assemble(content(), ["hu"])
    inputs = tokenizer("1984. jún. 5. =", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    gap = (beside(**inputs).logits - folded(**inputs).logits).abs().max()
    assert adapter["scaling"] == live.SETTINGS["alpha"] / live.SETTINGS["r"]
    assert gap < 1e-3, gap


MISTAKES = {  # file | what it says | what somebody might write
    "alpha / r left out": ("decoder.js", "this.strength * scaling", "this.strength"),
    "strength left out": ("decoder.js", "this.strength * scaling", "scaling"),
    "the last directions": ("decoder.js", "Bt, k,", "Bt, Bt.rows - 1 - k,"),
    "the smallest ranks first": (
        "decoder.js",
        "let k = 0; k < this.rank; k++",
        "let k = 8 - this.rank; k < 8; k++",
    ),
    "one rank too many": ("decoder.js", "k < this.rank", "k <= this.rank && k < 8"),
    "only the first adapter": (
        "decoder.js",
        "of this.adapters)",
        "of this.adapters.slice(0, 1))",
    ),
    "neighbours turned": ("decoder.js", "at + half", "at + 1"),
    "positions doubled": ("decoder.js", "this.length /", "2 * this.length /"),
    "groups interleaved": ("decoder.js", "Math.floor(head / group)", "(head % group)"),
    "no root of the head's size": ("decoder.js", "/ Math.sqrt(head_dim)", ""),
    "gate and up swapped": ("decoder.js", "silu(value) * up[i]", "value * silu(up[i])"),
    "norm without its gains": ("decoder.js", "* gains[i]", ""),
    "letters off by one": ("decoder.js", "i - MIDDLE", "i - MIDDLE + 1"),
    "one scale for two blocks": ("decoder.js", "i / BLOCK", "i / BLOCK / 2"),
    "words without their space": ("tokenizer.js", '"| ?\\\\p{L}+"', '"|\\\\p{L}+"'),
    "the leftmost pair first": ("tokenizer.js", "rank < best", "best === Infinity"),
    "no start token": ("tokenizer.js", "[this.startId]", "[]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(browser, mistake):  # noqa: F811
    file, right, wrong = MISTAKES[mistake]
    text = (SCRIPTS / file).read_text("utf8")
    assert right in text
    page = browser.new_page()
    for name in ("tokenizer.js", "decoder.js", "data.js"):
        if name == file:
            page.add_script_tag(content=text.replace(right, wrong))
        else:
            page.add_script_tag(path=SCRIPTS / name)
    sample = list({id(c["setting"]): i for i, c in enumerate(cases())}.values())
    given = page.evaluate(ANSWERS, [[cases()[i] for i in sample], False])
    page.close()
    wanted = [expected()[i] for i in sample]
    other_ids = column(given, "ids") != column(wanted, "ids")
    gap = largest_gap(given, wanted)
    assert other_ids or gap > 1e-2, gap


# The data


def test_the_data_is_small_and_the_button_says_how_much(visit):
    size = live.DATA_FILE.stat().st_size
    assert size <= 1_500_000
    label = visit.page.text_content("#live-load")
    assert f"({size / 1e6:.1f} MB)" in label


def test_the_data_is_what_the_tool_stored():
    text = live.DATA_FILE.read_text("ascii")
    stored = results.load("live")
    assert live.checksum(text) == stored["sha256"], "run tools/live.py"
    assert stored["figures"]["bytes"]["value"] == len(text)
    assert stored["settings"] == live.SETTINGS
    assert (SCRIPTS / "data.js").read_text("ascii") == text, "build the book again"


def test_packing_gives_the_same_bytes_again():
    """The base from the shipped model, the adapters from the file itself."""
    text = live.DATA_FILE.read_text("ascii")
    assert live.pack(content()["adapters"]) == text


def test_an_adapters_directions_are_sorted():
    for adapter in content()["adapters"].values():
        for name, A in adapter["tensors"].items():
            if name.endswith(".A"):
                Bt = adapter["tensors"][f"{name}t".replace(".At", ".Bt")]
                sizes = A.norm(dim=1) * Bt.norm(dim=1)
                assert (sizes[1:] <= 1.02 * sizes[:-1]).all(), sizes


# The page


def state(page):
    """What a reader sees of the first panel."""
    return dict(
        date=page.input_value("#live-date"),
        answer=page.inner_text("#live-answer"),
        frozen=page.is_visible("#live-frozen"),
        place=page.inner_text("#live-place"),
        rank=page.inner_text("#live-rank-value"),
        strength=page.inner_text("#live-strength-value"),
        on=page.locator("#live-adapters input:checked").count(),
    )


def settle(page):
    """Wait for what is drawn at the next frame."""
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame("
        "() => requestAnimationFrame(done)))"
    )


def test_what_the_page_promises_before_it_has_loaded_is_true(visit):
    model, tokenizer = live.assemble(content())
    adapted, _ = live.assemble(content(), ["fi"])
    page = visit.page
    date, frozen, with_adapter = (
        " ".join(page.text_content(f"#live-sample-{name}").split())
        for name in ("date", "frozen", "adapted")
    )
    assert measure.answers(model, tokenizer, [f"{date} ="]) == [frozen]
    assert measure.answers(adapted, tokenizer, [f"{date} ="]) == [with_adapter]


def test_the_things_to_try_are_as_the_page_says(visit):
    page, answers = visit.page, []
    for button in page.locator("[data-setting]").all():
        button.click()
        settle(page)
        answers.append(state(page))
    first, weak, cut, two = answers
    sample = " ".join(page.text_content("#live-sample-date").split())
    assert {a["date"] for a in answers} == {sample}
    assert first["answer"] == "1974-04-23 right" and first["frozen"]
    for changed in (weak, cut, two):
        assert "wrong: it is 1974-04-23" in changed["answer"]
    day, year = "-23", "1974-"
    assert page.inner_text("#live-frozen-answer").startswith(year)
    assert weak["answer"].startswith(year) and weak["answer"].split()[0].endswith(day)
    assert (weak["strength"], cut["rank"], two["on"]) == ("0.40", "1", 2)


def test_a_typed_date_gets_an_answer_and_no_verdict(visit):
    page = visit.page
    page.locator("[data-setting]").first.click()
    page.fill("#live-date", "2. maaliskuuta 1999")
    settle(page)
    assert state(page)["answer"].strip() == "1999-03-02"


def test_the_curves_are_the_probabilities_that_torch_gives(visit):
    page = visit.page
    page.select_option("#live-language", "sw")
    wait_for_curves(page)
    points = [
        page.get_attribute(f"#live-{side}-curve", "points").split()
        for side in ("new", "english")
    ]
    day = content()["dates"]["days"].index("1974-04-23")
    for language, drawn in zip(("sw", "en"), points, strict=True):
        text = content()["dates"][language][day]
        for strength in (0.0, 0.5, 1.0, 1.5):
            x, y = map(float, drawn[round(10 * strength)].split(","))
            assert x == strength
            assert y == pytest.approx(likelihood("sw", strength, text), abs=1e-3)


def likelihood(adapter, strength, text):
    """The probability of the right answer for 23 April 1974."""
    model, tokenizer = live.assemble(content(), [adapter], strength=strength)
    prompt = tokenizer(f"{text} =")["input_ids"]
    answer = tokenizer(" 1974-04-23", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logs.gather(1, ids[0, len(prompt) :, None]).sum().exp().item()


def press_until(page, key, selector, most=90):
    """Press a key until the focus is on what is looked for, and can be seen there."""
    for _ in range(most):
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
        page.keyboard.press(key)
    pytest.fail(f"{key} never reaches {selector}")


def test_everything_can_be_done_by_keyboard(browser):  # noqa: F811
    page = browser.new_page()
    page.goto(PAGE.as_uri())
    press_until(page, "Tab", "#live-load")
    page.keyboard.press("Enter")
    wait_for_curves(page)

    assert page.evaluate("document.activeElement.id") == "live-date"
    page.keyboard.press("Control+A")
    page.keyboard.type("29. maaliskuuta 2048")
    press_until(page, "Tab", "#live-adapters input[value=fi]")
    page.keyboard.press("Space")
    settle(page)
    assert state(page)["answer"].startswith("2048-03-29")

    press_until(page, "Tab", "#live-rank")
    page.keyboard.press("Home")
    settle(page)
    seen = state(page)
    assert seen["rank"] == "0"
    assert page.inner_text("#live-frozen-answer") == seen["answer"].split()[0]
    page.keyboard.press("End")
    press_until(page, "Tab", "#live-strength")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert state(page)["strength"] == "0.95"

    press_until(page, "Tab", "#live-tokens input")
    before = state(page)["place"]
    page.keyboard.press("ArrowRight")
    assert state(page)["place"] == before + "0"
    seen_focus = "e => getComputedStyle(e.parentElement).outlineStyle"
    assert page.eval_on_selector("#live-tokens input:focus", seen_focus) == "solid"

    press_until(page, "Tab", "[data-setting]")
    press_until(page, "Tab", "#live-language")
    page.keyboard.press("ArrowDown")
    wait_for_curves(page)
    assert page.inner_text("#live-new-name") == "Hungarian"
    press_until(page, "Tab", "#live-day")
    page.keyboard.press("Enter")
    press_until(page, "Tab", "#live-amount")
    page.keyboard.press("Home")
    settle(page)
    assert page.inner_text("#live-amount-value") == "0.00"
    assert page.inner_text("#live-english-answer").endswith("right")
    page.close()


def test_the_page_is_accessible_and_fits(visit):
    page, bad = visit.page, []
    for width in (1280, 360):
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_selector(f"html[data-theme={scheme}]", state="attached")
            page.wait_for_function(REACHABLE)
            rules = [] if scheme == "light" else [CONTRAST]
            bad += [f"{width} {scheme}: {v}" for v in visit.axe(*rules)]
            if over := page.evaluate(SIDEWAYS):
                bad.append(f"scrolls sideways at {width}: {over}")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")
    assert not bad, "\n".join(bad)


def test_every_control_has_a_name_and_the_answer_is_announced(visit):
    page = visit.page
    nameless = page.locator(".live :is(input, select, button)").evaluate_all(
        "all => all.filter(e => !(e.labels?.length || e.textContent.trim()))"
        ".map(e => e.outerHTML)"
    )
    assert not nameless
    for part in ("#live-answer", "#live-status"):
        assert page.get_attribute(part, "role") == "status"
    said = page.get_attribute("#live-chart", "aria-label")
    assert "at strength 0.5" in said and "English" in said


def test_a_reader_without_javascript_gets_words_and_a_table(browser):  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(PAGE.as_uri())
    assert "turned off" in page.inner_text("#live-model")
    assert not page.locator(".live :is(input, select, button):visible").count()
    table = page.inner_text("article table.table")
    for name in live.LANGUAGES.values():
        assert name in table
    context.close()


def test_a_file_that_does_not_load_is_said(browser):  # noqa: F811
    page = browser.new_page()
    page.route("**/data.js", lambda route: route.abort())
    page.goto(PAGE.as_uri())
    page.click("#live-load")
    page.wait_for_selector("text=did not load")
    assert page.is_enabled("#live-load")
    page.close()


def test_nothing_was_asked_from_outside_and_nothing_complained(visit):
    """The last test: it speaks for all that came before it in this window."""
    assert not visit.trouble
