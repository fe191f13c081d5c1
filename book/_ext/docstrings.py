"""Docstrings of `tomlib` are written for `help()`: `name` in single backticks is code, here too."""

import re
from typing import Any

_NAME = re.compile(r"(?<![`:\w\\])`([^`\n]+)`(?![`_])")
_INITIAL = re.compile(r"\*\*(\w+)\*\*(?=\w)")


def plain(app: Any, what: str, name: str, item: object, options: Any, lines: list[str]) -> None:
    """Give reStructuredText what it needs: double backticks, and a gap after a bold initial."""
    for number, line in enumerate(lines):
        lines[number] = _INITIAL.sub(r"**\1**\\ ", _NAME.sub(r"``\1``", line))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx; the priority puts it before napoleon."""
    app.connect("autodoc-process-docstring", plain, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
