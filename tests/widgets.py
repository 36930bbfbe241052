"""What the tests of things to play with share: a page of its own, and a visit to it."""

from contextlib import contextmanager
from pathlib import Path

from test_browser import Visit

STYLE = Path(__file__).parents[1] / "book" / "_static" / "peftlab.css"
TEMPLATE = """<!doctype html>
<html lang="en" data-theme="light">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}
body {{ margin: 1rem; font: 16px sans-serif; background: #fefefe; color: #1f2933; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #121212; color: #ced6dd; }} a {{ color: #7cc0ee; }} }}
</style>
<main><h1>{title}</h1>{widget}</main>
<script>
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.onchange = () => {{
  document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; }};
</script>
</html>"""


def page_of(title, widget, folder):
    """A page with nothing but the widget, as a path."""
    path = folder / "alone.html"
    style = STYLE.read_text("utf8")
    path.write_text(TEMPLATE.format(title=title, style=style, widget=widget), "utf8")
    return path


@contextmanager
def visiting(browser, path):
    """A visit to a page, offline."""
    context = browser.new_context(offline=True)
    visit = Visit(context.new_page())
    visit.open(path)
    yield visit
    context.close()
