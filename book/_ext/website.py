"""The published site beside its pages: launch buttons, and a page for addresses that are none."""

import json
import os
from html import escape
from pathlib import Path
from typing import Any

from sphinx import addnodes

_NOT_FOUND = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Not found</title><link rel="icon" href="data:,"><meta name="robots" content="noindex">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1.05rem/1.55 "DejaVu Sans", Verdana, Arial, sans-serif; max-width: 44rem;
  margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; overflow-wrap: anywhere; }}
a {{ color: #0b5394; }} h2 {{ font-size: 1.05rem; margin-bottom: 0; }} ul {{ margin-top: 0.3rem; }}
input, button {{ font: inherit; padding: 0.3rem 0.6rem; max-width: 100%; }}
@media (prefers-color-scheme: dark) {{
  body {{ color: #eee; background: #121212; }} a {{ color: #8ab4f8; }} }}
</style></head><body><main>
<h1>There is no such page</h1>
<p id="near">It may have been renamed, or the address has a slip.</p>
<form action="search.html"><label>Search the book: <input name="q" type="search"></label>
<button>Search</button></form>
{pages}
</main><script>
// The site may lie under any path: its root is where the folders of its pages begin.
const pages = {names};
const path = decodeURIComponent(location.pathname);
const folders = /\\/(notebooks|book|_modules|_static)\\/.*$/;
let root = path.endsWith("/404.html") ? path.slice(0, -8) : path.replace(folders, "/");
// On GitHub's pages the first folder is the project's; a site of a user's own has none.
const first = /^\\/[^/.]+\\//.exec(path);
const project = location.hostname.endsWith(".github.io") && first ? first[0] : "/";
if (root === path) root = project;
for (const link of document.links) link.href = root + link.getAttribute("href");
document.forms[0].action = root + "search.html";
const letters = text => new Set(text.toLowerCase().match(/[a-z0-9]{{2,}}/g) || []);
const asked = letters(path.split("/").pop().replace(/\\.html?$/, ""));
const score = page => [...letters(page)].filter(word => asked.has(word)).length;
const best = pages.reduce((a, b) => score(b[0]) > score(a[0]) ? b : a);
if (score(best[0]) && !path.endsWith("/404.html")) {{
  const near = document.getElementById("near");
  near.textContent = "Did you mean ";
  const link = document.createElement("a");
  link.href = root + best[0] + ".html";
  link.textContent = best[1];
  near.append(link, "?");
}}
</script></body></html>
"""


def launch_buttons(app: Any, config: Any) -> None:
    """Binder, Colab and repository buttons, where `TOM_REPOSITORY` names the public repository."""
    address = os.environ.get("TOM_REPOSITORY", "").rstrip("/")
    if not address:
        return
    config.html_theme_options |= {
        "repository_url": address,
        "repository_branch": os.environ.get("TOM_BRANCH", "main"),
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        },
    }


def name_repository(app: Any, docname: str, source: list[str]) -> None:
    """Put the public repository's address where the pages leave it open."""
    address = os.environ.get("TOM_REPOSITORY", "").rstrip("/")
    if address and docname.startswith("book/"):
        source[0] = source[0].replace("https://github.com/OWNER/NAME", address)


def parts(env: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """The table of contents: captions with the names and titles of their pages."""
    found = []
    for tree in env.get_doctree(env.config.root_doc).findall(addnodes.toctree):
        pages = [
            (name, str(title) if title else env.titles[name].astext())
            for title, name in tree["entries"]
            if name in env.titles
        ]
        found.append((tree.get("caption") or "", pages))
    return found


def not_found(app: Any, failed: Exception | None) -> None:
    """Write `404.html`: the page that is most like the one asked for, a search, and all pages."""
    if failed is not None or app.builder.name != "html":
        return
    root = app.config.root_doc
    listed = [("", [(root, app.env.titles[root].astext())]), *parts(app.env)]
    shown = "\n".join(
        (f"<h2>{escape(caption)}</h2>\n" if caption else "")
        + "<ul>"
        + "".join(f'<li><a href="{name}.html">{escape(title)}</a></li>' for name, title in pages)
        + "</ul>"
        for caption, pages in listed
    )
    names = json.dumps([page for _, pages in listed for page in pages])
    text = _NOT_FOUND.format(pages=shown, names=names.replace("</", "<\\/"))
    Path(app.outdir, "404.html").write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", launch_buttons)
    app.connect("source-read", name_repository)
    app.connect("build-finished", not_found)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
