"""What the browser tests share: where the book is, what a page says, what axe-core finds."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

ROOT = Path(__file__).parent.parent.parent
BOOK = Path(os.environ.get("TOM_BOOK", ROOT / "_build" / "html"))
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 300_000
"""Milliseconds after which a browser that says nothing has hung; a busy machine is slow, not wrong."""
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}


@cache
def pages() -> list[str]:
    """Every page of the book, as a path below its root; those that only lead on left out."""
    found = sorted(p for p in BOOK.rglob("*.html") if "_static" not in p.parts)
    real = [p for p in found if 'http-equiv="Refresh"' not in p.read_text("utf-8")[:500]]
    return [p.relative_to(BOOK).as_posix() for p in real]


def watched(page: Page) -> list[str]:
    """What goes wrong on a page from now on: errors, failed requests, requests to elsewhere."""
    wrong: list[str] = []
    local = ("http://127.0.0.1:", "file:", "data:", "blob:")
    page.on("console", lambda m: wrong.append(f"says {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"throws {error}"))
    page.on("requestfailed", lambda r: wrong.append(f"does not get {r.url}"))
    page.on("response", lambda r: wrong.append(f"{r.status}: {r.url}") if r.status > 399 else None)
    page.on("request", lambda r: r.url.startswith(local) or wrong.append(f"asks for {r.url}"))
    return wrong


def axe(page: Page, **options: Any) -> list[str]:
    """What axe-core finds on the page that is serious or critical, a line each."""
    if not page.evaluate("typeof axe === 'object'"):
        page.add_script_tag(path=AXE)
    found = page.evaluate("options => axe.run(document, options)", options)
    assert found["passes"], "axe checked nothing"
    return [
        f"{rule['id']} {node['target']} {node['html'][:150]} {node['failureSummary'][:250]}"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
