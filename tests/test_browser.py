"""Every page in a real browser: offline, accessible, wide, narrow, light and dark."""

import contextlib
import os
from pathlib import Path

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import TimeoutError, sync_playwright

HTML = Path(__file__).parents[1] / "_build" / "html"
DOOR = HTML / "index.html"  # sends the reader on to the start page
PAGES = sorted(p for p in HTML.rglob("*.html") if "_static" not in p.parts)
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONES = {"width": 1280, "height": 900}, (390, 360)
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]

each_page = pytest.mark.parametrize(
    "path", [p for p in PAGES if p != DOOR], ids=lambda p: str(p.relative_to(HTML))
)

# Bring the page to rest: folds open, mathematics set, pictures decoded.
SETTLE = """async () => {
    await (window.MathJax?.startup?.promise ?? null);
    document.querySelectorAll('details').forEach(d => { d.open = true; });
    const broken = [];
    for (const img of document.images) {
        img.loading = 'eager';
        try { await img.decode(); } catch { broken.push(img.getAttribute('src')); }
        if (!img.naturalWidth) broken.push(img.getAttribute('src'));
    }
    return broken;
}"""
NO_ALT = """() => [...document.querySelectorAll('img, article svg[role="img"]')]
    .map(i => [i, (i.alt ?? i.getAttribute('aria-label') ?? '').trim()])
    .filter(([i, alt]) => !i.ariaHidden && (!alt || alt.includes('<!--')))
    .map(([i, alt]) => alt || i.outerHTML.slice(0, 80))"""
UNSET = """() => [...document.querySelectorAll('.math')]
    .filter(m => !m.querySelector('mjx-container') || m.querySelector('mjx-merror'))
    .map(m => m.textContent.slice(0, 60))"""
# How far the page scrolls sideways, and what sticks out of it.
SIDEWAYS = """() => {
    const over = document.documentElement.scrollWidth - window.innerWidth;
    if (over <= 0) return null;
    const out = [...document.querySelectorAll('article *')].filter(
        e => e.getBoundingClientRect().right > window.innerWidth + 1);
    return over + ' px, ' + (out.at(-1)?.outerHTML ?? '').slice(0, 120);
}"""
# The theme makes what scrolls reachable by keyboard, a while after the width changes.
REACHABLE = """() => [...document.querySelectorAll(
        'pre, .cell_output > .output, .pst-scrollable-table-container')].every(
    e => e.tabIndex == 0
        || e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight)"""
AXE = """async options => {
    axe.configure({rules: [{id: 'color-contrast', selector: '.first-of-its-kind'}]});
    const found = await axe.run('html', {
        resultTypes: ['violations'], preload: false, runOnly: options});
    return found.violations.map(v =>
        `[${v.impact}] ${v.id} x${v.nodes.length}: ${v.help}`
        + v.nodes.slice(0, 3).map(n => '\\n    ' + n.html.slice(0, 140)
        + '\\n      ' + (n.any[0]?.message ?? '')).join(''));
}"""
# Contrast takes most of the time, and it depends on the ink, the size, and what is
# painted behind: one text of each kind is marked, on all pages together, and looked at.
CONTRAST = {"type": "rule", "values": ["color-contrast"]}
MARK = """known => {
    const kinds = new Set(known), grounds = new Map([[null, '']]);
    const ground = e => {
        if (grounds.has(e)) return grounds.get(e);
        const s = getComputedStyle(e);
        const paint = [s.backgroundColor, s.backgroundImage, s.opacity, s.filter];
        const plain = paint.join() == 'rgba(0, 0, 0, 0),none,1,none';
        const placed = ['absolute', 'fixed', 'sticky'].includes(s.position);
        const own = (plain ? '' : paint.join()) + (placed ? e.className : '');
        grounds.set(e, own + ground(e.parentElement));
        return grounds.get(e);
    };
    const written = e => e.matches('input, select, textarea') ||
        [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    for (const e of document.body.querySelectorAll('*')) {
        e.classList.remove('first-of-its-kind');
        if (!written(e) || !e.checkVisibility()) continue;
        const s = getComputedStyle(e);
        const ink = [s.color, s.fontSize, s.fontWeight, s.textShadow, s.position];
        const kind = ink.join() + ground(e);
        if (!kinds.has(kind)) e.classList.add('first-of-its-kind');
        kinds.add(kind);
    }
    return [...kinds];
}"""
# The words in our drawings, of which axe says nothing: their contrast with the page,
# and their size there, which is that in the drawing times the room that it has.
WORDS = """() => {
    const light = c => {
        const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(
            v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const clear = c => c == 'transparent' || c.endsWith(', 0)');
    const bad = new Set();
    for (const svg of document.querySelectorAll('article svg.peft-figure')) {
        const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
        if (box.width < 2) continue;
        let ground = svg;
        while (clear(getComputedStyle(ground).backgroundColor) && ground.parentElement)
            ground = ground.parentElement;
        const paper = light(getComputedStyle(ground).backgroundColor);
        const window = svg.querySelector(':scope > use[href]');
        const drawn = window
            ? document.querySelector(window.getAttribute('href')) : svg;
        for (const text of drawn.querySelectorAll('text')) {
            const style = getComputedStyle(text), ink = light(style.fill);
            const ratio = Math.max(ink, paper) / Math.min(ink, paper);
            const size = parseFloat(style.fontSize) * box.width / view.width;
            if (ratio < 4.5) bad.add(`${text.textContent}: ${ratio.toFixed(2)}:1`);
            if (size < 8) bad.add(`${text.textContent}: ${size.toFixed(1)} px`);
        }
    }
    return [...bad];
}"""
# Pictures without a number and a few words of their own.
BARE = """() => {
    const own = e => e.closest('.sd-card, .live, .navbar-brand') || e.matches('.panel');
    const number = /^Figure [\\d.]+\\.? /;
    const caption = e => e.closest('figure, .cell')
        ?.querySelector('figcaption, .figure-caption')?.textContent.trim();
    const every = [...document.querySelectorAll('article :is(img, svg[role="img"])')];
    return every.filter(e => !own(e) && !number.test(caption(e) ?? '')).map(
        e => (e.getAttribute('aria-label') ?? e.alt ?? '').slice(0, 80));
}"""
BRIGHTNESS = """() => {
    const box = document.querySelector('.bd-main') ?? document.body;
    const grey = c => c.match(/[\\d.]+/g).slice(0, 3).reduce((s, v) => s + +v, 0) / 765;
    const paint = e => getComputedStyle(e).backgroundColor;
    let ground = box;
    while (paint(ground).endsWith(', 0)') && ground.parentElement)
        ground = ground.parentElement;
    return [grey(paint(ground)), grey(getComputedStyle(box).color)];
}"""


class Visit:
    """A page with a record of what it asked for and complained about."""

    def __init__(self, page):
        self.page, self.trouble, self.kinds = page, [], []
        page.on("console", self.console)
        page.on("pageerror", lambda e: self.trouble.append(f"error: {e.message}"))
        page.on("request", self.request)

    def console(self, message):
        if message.type == "error":
            self.trouble.append(f"console: {message.text}")

    def request(self, request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.trouble.append(f"asked the network for {request.url}")

    def open(self, path):
        self.trouble.clear()
        self.page.emulate_media(color_scheme="light")
        self.page.set_viewport_size(DESKTOP)
        self.page.goto(path.as_uri(), wait_until="load")
        # axe judges no text on a gradient, such as the shade where something is cut.
        plain = "article * { background-image: none !important }"
        self.page.add_style_tag(content=plain)
        self.page.evaluate(AXE_SCRIPT)
        return self.page.evaluate(SETTLE)

    def axe(self, rules=LEVELS):
        """What axe finds; of contrast, in kinds of text that no page has had yet."""
        self.kinds = self.page.evaluate(MARK, self.kinds)
        if rules == CONTRAST and not self.page.query_selector(".first-of-its-kind"):
            return []
        return self.page.evaluate(AXE, rules)


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).is_file():
        pytest.fail(
            f"The browser tests need Chromium, and there is none at {CHROMIUM}. On "
            "Debian and Ubuntu: apt-get install chromium. Elsewhere set the variable "
            "CHROMIUM to the path of a Chromium or Chrome."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visit(browser):
    context = browser.new_context(viewport=DESKTOP, reduced_motion="reduce")
    yield Visit(context.new_page())
    context.close()


def test_the_book_is_built():
    assert PAGES, f"there is no book in {HTML}: run `make book` first"


@each_page
def test_page(visit, path):
    page, bad = visit.page, []

    broken = visit.open(path)
    bad += [f"does not load: {src}" for src in broken]
    bad += [f"no alt text, or a key in it: {src}" for src in page.evaluate(NO_ALT)]
    bad += [f"mathematics not set: {text}" for text in page.evaluate(UNSET)]
    bad += [f"no number or caption: {alt}" for alt in page.evaluate(BARE)]
    bad += [f"light: {v}" for v in [*page.evaluate(WORDS), *visit.axe()]]

    page.emulate_media(color_scheme="dark")
    if page.query_selector(".bd-main"):
        page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
        ground, ink = page.evaluate(BRIGHTNESS)
        if ground > 0.2 or ink < 0.6:
            bad.append(f"dark mode is not dark: ground {ground:.2f}, text {ink:.2f}")
        bad += [f"dark: {v}" for v in [*page.evaluate(WORDS), *visit.axe(CONTRAST)]]

    for width in PHONES:
        page.set_viewport_size({"width": width, "height": 844})
        if over := page.evaluate(SIDEWAYS):
            bad.append(f"scrolls sideways at {width}: {over}")
        bad += [f"at {width}: {v}" for v in page.evaluate(WORDS)]
    page.emulate_media(color_scheme="light")
    with contextlib.suppress(TimeoutError):  # axe names what is never made so
        page.wait_for_function(REACHABLE, timeout=5000)
    bad += [f"phone: {v}" for v in visit.axe()]

    bad += visit.trouble
    if bad:
        pytest.fail("\n".join(bad), pytrace=False)


FAULTS = [
    "article li { color: #aaa !important }",
    "article p { opacity: 0.4 }",
    "article pre { background: #555 !important }",
]


def test_a_text_that_is_hard_to_read_is_found_whatever_was_seen_before(visit):
    page = HTML / "book" / "index.html"
    visit.open(page)
    visit.axe()
    for style in FAULTS:
        visit.open(page)
        assert not visit.axe(CONTRAST)
        visit.page.add_style_tag(content=style)
        assert any("color-contrast" in fault for fault in visit.axe(CONTRAST)), style


def test_a_first_visit_in_dark_mode_is_dark(browser):
    context = browser.new_context(color_scheme="dark", viewport=DESKTOP)
    page = context.new_page()
    page.goto((HTML / "book" / "index.html").as_uri(), wait_until="load")
    ground, ink = page.evaluate(BRIGHTNESS)
    context.close()
    assert ground < 0.2 and ink > 0.6


def test_the_door_leads_to_the_start_page(visit):
    visit.page.goto(DOOR.as_uri())
    visit.page.wait_for_url("**/book/index.html")


def test_a_solution_is_folded_until_asked_for(visit):
    pages = [p for p in PAGES if "Show solution" in p.read_text("utf8")]
    assert pages, "no page folds a solution away"
    visit.page.set_viewport_size(DESKTOP)
    visit.page.goto(pages[0].as_uri(), wait_until="load")
    fold = visit.page.locator("details.hide").first
    assert fold.get_attribute("open") is None
    assert not fold.locator("pre").first.is_visible()
    fold.locator("summary").click()
    assert fold.locator("pre").first.is_visible()


# How much of it there is: a reader sees the result first, and comes to an end

CHAPTERS = [path for path in PAGES if path.parent.name == "notebooks"]
MOST_SCREENS, FIRST_RESULT = 12, 2
# The page's height, and where the output of the first result ends; folds stay closed.
HEIGHTS = """async () => {
    await (window.MathJax?.startup?.promise ?? null);
    await document.fonts.ready;
    for (const img of document.images) {
        img.loading = 'eager';
        try { await img.decode(); } catch { }
    }
    const results = [...document.querySelectorAll('.cell.tag_first-result')].map(
        cell => cell.querySelector('.cell_output') ?? cell);
    return {
        whole: document.documentElement.scrollHeight,
        results: results.map(r => r.getBoundingClientRect().bottom + window.scrollY),
    };
}"""


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_is_short_and_its_first_result_stands_at_the_top(
    visit, path, record_property
):
    visit.page.emulate_media(color_scheme="light")
    visit.page.set_viewport_size(DESKTOP)
    visit.page.goto(path.as_uri(), wait_until="load")
    heights = visit.page.evaluate(HEIGHTS)
    screens = heights["whole"] / DESKTOP["height"]
    results = [bottom / DESKTOP["height"] for bottom in heights["results"]]
    where = ", ".join(f"{place:.1f}" for place in results) or "nowhere"
    line = f"{screens:5.1f} screens, first result ends at {where:8} {path.stem}"
    record_property("screens", line)
    assert len(results) == 1, "one cell, and only one, has the tag first-result"
    assert results[0] <= FIRST_RESULT, line
    assert screens <= MOST_SCREENS, line
