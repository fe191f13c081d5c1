"""The built book in a real browser: Chromium, driven by Playwright; nothing is skipped.

`make test-browser` builds the book, brings axe-core and runs these tests. `TOM_BOOK` names another
folder of pages, `CHROMIUM` another browser.
"""

import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from chromium import BOOK, DESKTOP, FLAGS, PATIENCE, pages
from playwright.sync_api import Browser, Page, sync_playwright


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per page for those that take a `page_name`."""
    if "page_name" in metafunc.fixturenames:
        if not pages():
            raise pytest.UsageError(f"no book in {BOOK}; build it with `make book`")
        metafunc.parametrize("page_name", pages())


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Lost(_Quiet):
    """Answers an address that is none as GitHub's pages do: with `404.html`."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        text = (BOOK / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def _serving(kind: type[_Quiet]) -> Iterator[str]:
    """Address of the book on this machine's loopback."""
    handler = functools.partial(kind, directory=str(BOOK))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def served() -> Iterator[str]:
    """Address of the book."""
    with _serving(_Quiet) as address:
        yield address


@pytest.fixture(scope="session")
def lost() -> Iterator[str]:
    """Address of the book on a server that shows `404.html` for what is not there."""
    with _serving(_Lost) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    binary = next((path for name in names if name and (path := shutil.which(name))), None)
    if binary is None:
        pytest.fail("no Chromium: install it (Debian: apt-get install chromium) or set CHROMIUM")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=binary, args=FLAGS, timeout=PATIENCE)
        yield opened
        opened.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A page in a context of its own; `options` are those of Playwright's `new_context`."""
    contexts = []

    def make(**options: Any) -> Page:
        contexts.append(browser.new_context(**{"viewport": DESKTOP, **options}))
        contexts[-1].set_default_timeout(PATIENCE)
        return contexts[-1].new_page()

    yield make
    for context in contexts:
        context.close()
