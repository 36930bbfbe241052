"""What a cell of a chapter shows, on another page: ``{stored} NOTEBOOK CLASS``.

The arguments are a notebook and the CSS class of the element. It is taken from the
notebook's stored outputs, so it needs neither a second copy nor torch to build.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class Stored(SphinxDirective):
    required_arguments = 2

    def run(self):
        name, kind = self.arguments
        path = Path(self.env.srcdir, "notebooks", f"{name}.ipynb")
        self.env.note_dependency(str(path))
        cells = json.loads(path.read_text("utf8"))["cells"]

        outputs = [out.get("data", {}) for c in cells for out in c.get("outputs", [])]
        found = ["".join(data.get("text/html", "")) for data in outputs]
        found = [html for html in found if html.startswith(f'<div class="{kind}"')]
        if len(found) != 1:
            raise self.error(f"{name} shows {len(found)} elements of class {kind}")
        return [nodes.raw("", found[0], format="html")]


def setup(app):
    app.add_directive("stored", Stored)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
