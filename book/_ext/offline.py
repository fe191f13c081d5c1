"""The built book asks nothing of the network: formulas are MathML, thebe is off, a mode is set.

Jupyter Book loads MathJax and thebe from content delivery networks; thebe's configuration, which it
writes twice, is an error in the console besides.
"""

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

_MODE = """
const root = document.documentElement.dataset;
if (!root.mode) {
  root.mode = "auto";
  root.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}
"""
"""Light or dark as the system says, from the first paint on; the theme leaves it empty."""


def inline(translator: Any, node: Any) -> None:
    """A formula within a line."""
    translator.body.append(f'<span class="math">{tex2mathml(node.astext())}</span>')
    raise nodes.SkipNode


def block(translator: Any, node: Any) -> None:
    """A formula of its own, with its number where it has one."""
    number = node["number"]
    translator.body.append(
        '<div class="math"' + (f' id="{node["ids"][0]}"' if number else "") + ">"
    )
    if number:
        translator.body.append(f'<span class="eqno">({number})</span>')
    translator.body.append(f"{tex2mathml(node.astext(), as_block=True)}</div>")
    raise nodes.SkipNode


def without_thebe(app: Any) -> None:
    """Take off whatever sphinx-thebe would do to the pages."""
    for event, listeners in app.events.listeners.items():
        app.events.listeners[event] = [
            each for each in listeners if each.handler.__module__.split(".")[0] != "sphinx_thebe"
        ]
    app.registry.css_files = [
        (name, attributes) for name, attributes in app.registry.css_files if "thebe" not in name
    ]


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx; `html_math_renderer: mathml` chooses the formulas."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline, None), block_renderers=(block, None)
    )
    app.connect("config-inited", lambda app, config: without_thebe(app), priority=999)
    app.add_js_file(None, body=_MODE, priority=1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
