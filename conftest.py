"""For nbval: a time limit for each cell, no comparison of SVG, a table of times.

And a table of the screens that each chapter's page takes (tests/test_browser.py)."""

from collections import Counter

import nbval.plugin as nbval

CELL_SECONDS = 300  # a cell that takes longer hangs; how long it should take is no test

_init = nbval.IPyNbFile.__init__


def _init_without_svg(self, *args, **kwargs):
    # nbval leaves PNG alone; SVG text differs from one machine to the next.
    _init(self, *args, **kwargs)
    self.skip_compare += ("image/svg+xml",)


nbval.IPyNbFile.__init__ = _init_without_svg


def pytest_runtest_setup(item):
    if isinstance(item, nbval.IPyNbCell):
        item.config.option.nbval_cell_timeout = CELL_SECONDS


def pytest_terminal_summary(terminalreporter):
    reports = sum(terminalreporter.stats.values(), [])
    seconds = Counter()
    for report in reports:
        name = getattr(report, "nodeid", "").split("::")[0]
        if name.endswith(".ipynb"):
            seconds[name] += report.duration
    if seconds:
        terminalreporter.section("seconds a notebook")
        for name in sorted(seconds):
            terminalreporter.write_line(f"{seconds[name]:7.1f}  {name}")
        terminalreporter.write_line(f"{seconds.total():7.1f}  together")

    screens = {
        value
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == "screens"
    }
    if screens:
        terminalreporter.section("screens of 1280 x 900, folds closed")
        for line in sorted(screens):
            terminalreporter.write_line(line)
