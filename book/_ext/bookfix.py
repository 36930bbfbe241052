"""Mends what Jupyter Book 1 and its theme leave broken.

- sphinx-thebe declares a constant twice, which logs a console error on each page.
  The book has no live cells, so its scripts and style sheet go altogether.
- The page that redirects to the start page has no language, no title and no link.
- The list of references carries ARIA roles that are deprecated or do not fit together.
- An alt text shows its comments, which bind its figures to results: they go.
- GitHub Pages drops folders that begin with an underscore unless told not to.
"""

import re
from pathlib import Path

LABEL = re.compile(r'\b(?:alt|aria-label)="[^"]*"')
COMMENT = re.compile(r"&lt;!--.*?--&gt;|<!--.*?-->")
REDIRECT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="0; url={start}">
<title>{title}</title>
</head>
<body><main><h1>{title}</h1><p><a href="{start}">The book starts here.</a></p></main>
</body>
</html>
"""


def _is_thebe(asset):
    filename = str(getattr(asset, "filename", asset) or "")
    body = getattr(asset, "attributes", {}).get("body") or ""
    return "thebe" in filename or "THEBE_JS_URL" in body


def drop_thebe(app, pagename, templatename, context, doctree):
    for kind in ("script_files", "css_files"):
        context[kind] = [a for a in context.get(kind, []) if not _is_thebe(a)]


def plain_references(app, pagename, templatename, context, doctree):
    for role in (' role="doc-biblioentry"', ' role="list" class="citation-list"'):
        context["body"] = context.get("body", "").replace(role, role.split('"', 2)[2])


def plain_labels(app, pagename, templatename, context, doctree):
    body = context.get("body", "")
    context["body"] = LABEL.sub(lambda m: COMMENT.sub("", m[0]), body)


def finish(app, error):
    if error or app.builder.name != "html":
        return
    out = Path(app.outdir)
    (out / ".nojekyll").touch()
    start = f"{app.config.root_doc}.html"
    title = app.config.html_title
    (out / "index.html").write_text(REDIRECT.format(start=start, title=title), "utf8")


def setup(app):
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", plain_references)
    # After the extension that makes labels of alt texts.
    app.connect("html-page-context", plain_labels, priority=960)
    app.connect("build-finished", finish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
