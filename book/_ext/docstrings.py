"""Docstrings of `tomlib` are written for `help()`: `name` is code, * and | are themselves."""

import re
from itertools import groupby
from typing import Any

_BOLD_INITIAL = re.compile(r"\*\*(\w+)\*\*(?=\w)")
_CODE_OR_SIGN = re.compile(r"``.+?``|`([^`]+)`(?!_)|\*\*\w[^*]*\*\*|([*|])", re.DOTALL)


def _sign(found: re.Match[str]) -> str:
    if found[1]:
        return f"``{found[1]}``"
    return f"\\{found[2]}" if found[2] else found[0]


def plain(app: Any, what: str, name: str, item: object, options: Any, lines: list[str]) -> None:
    """Turn the lines of a docstring into reStructuredText that means the same."""
    literal, turned = False, list[str]()
    for blank, group in groupby(lines, key=lambda line: not line.strip()):
        part = list(group)
        literal = literal and (blank or part[0].startswith(" "))
        if not blank and not literal and not part[0].lstrip().startswith(">>>"):
            text = _BOLD_INITIAL.sub(r"**\1**\\ ", _CODE_OR_SIGN.sub(_sign, "\n".join(part)))
            part = text.split("\n")
            rest = [line for line in lines[len(turned) + len(part) :] if line.strip()]
            if what == "module" and text.endswith(":") and rest and rest[0].startswith("  "):
                part[-1], literal = part[-1] + ":", True  # an indented block: as it stands
        turned += part
    lines[:] = turned


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx; the priority puts it before napoleon."""
    app.connect("autodoc-process-docstring", plain, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
