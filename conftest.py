"""For nbval: a time limit for each cell, no comparison of SVG, a table of times."""

from collections import Counter

import nbval.plugin as nbval

CELL_SECONDS = 60  # unless the cell's metadata has a `timeout` of its own

_init = nbval.IPyNbFile.__init__


def _init_without_svg(self, *args, **kwargs):
    # nbval leaves PNG alone; SVG text differs from one machine to the next.
    _init(self, *args, **kwargs)
    self.skip_compare += ("image/svg+xml",)


nbval.IPyNbFile.__init__ = _init_without_svg


def pytest_runtest_setup(item):
    if isinstance(item, nbval.IPyNbCell):
        seconds = item.cell.metadata.get("timeout", CELL_SECONDS)
        item.config.option.nbval_cell_timeout = seconds


def pytest_terminal_summary(terminalreporter):
    seconds = Counter()
    for report in sum(terminalreporter.stats.values(), []):
        name = getattr(report, "nodeid", "").split("::")[0]
        if name.endswith(".ipynb"):
            seconds[name] += report.duration
    if seconds:
        terminalreporter.section("seconds a notebook")
        for name in sorted(seconds):
            terminalreporter.write_line(f"{seconds[name]:7.1f}  {name}")
        terminalreporter.write_line(f"{seconds.total():7.1f}  together")
