"""Print the whole book into one PDF beside its pages: `python book/pdf.py`, or `make pdf`.

Sphinx puts all pages into one (numbers of figures as in the book), Chromium prints it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from pypdf import PdfWriter
from pypdf.generic import NameObject, TextStringObject

from tomlib.errors import TomError
from tomlib.scenarios import root

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-pdf-header-footer", "--generate-pdf-document-outline", "--virtual-time-budget=20000",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TARGET = "tom-book.pdf"


def chromium() -> str:
    """Chromium's command: `CHROMIUM` in the environment, else the first one that is found."""
    found = next(filter(None, map(shutil.which, [os.environ.get("CHROMIUM", ""), *NAMES])), None)
    if found is None:
        raise TomError("no Chromium found: install one (apt-get install chromium) or set CHROMIUM")
    return found


def single_page(pages: Path) -> Path:
    """Build the book as one page; the path of that page."""
    book = "from jupyter_book.cli.main import main; main()"
    command = [
        *(sys.executable, "-c", book, "build", str(root()), "--path-output", str(pages)),
        *("--builder", "singlehtml", "--all", "-q"),
    ]
    plain = {**os.environ, "NO_COLOR": "1", "TOM_PDF": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    built = sorted(
        (pages / "_build" / "singlehtml").rglob("*.html"), key=lambda p: p.stat().st_size
    )
    if done.returncode or not built:
        raise TomError(f"the single page does not build: {(done.stdout + done.stderr)[-400:]}")
    return built[-1].replace(
        pages / "_build" / "singlehtml" / "print.html"
    )  # its links start there


def prepare(page: Path) -> None:
    """Open what is folded and drop what only a screen needs."""
    text = page.read_text("utf-8")
    text = text.replace("<details ", "<details open ").replace("<details>", "<details open>")
    text = re.sub(r'data-mode="[^"]*"', 'data-mode="light"', text)
    text = text.replace("<noscript>", "").replace("</noscript>", "")  # on paper nothing is chosen
    # What is downloaded beside a page is not beside the PDF.
    text = re.sub(r'(?s)<a [^>]*href="_downloads/[^"]*"[^>]*>(.*?)</a>', r"\1", text)
    page.write_text(text, encoding="utf-8")


def headings(page: Path) -> list[str]:
    """All headings of a page in order, without the signs that link to them."""
    soup = BeautifulSoup(page.read_text("utf-8"), "html.parser")
    for sign in soup.select("a.headerlink"):
        sign.decompose()
    return [" ".join(h.get_text().split()) for h in soup.find_all(re.compile("^h[1-6]$"))]


def heading_of(said: str, titles: Sequence[str]) -> str | None:
    """The heading that an entry of Chromium's outline means, or None.

    Chromium drops the space where a line breaks; and where a heading was begun at the foot of
    one page and moved to the next, it says what had been laid out before the whole.

    >>> heading_of("The student learnsThe student learns fromits teacher", [
    ...     "The student learns from its teacher", "teacher"])
    'The student learns from its teacher'
    """
    said = re.sub(r"\s", "", said)
    for title in sorted(titles, key=len, reverse=True):
        short = re.sub(r"\s", "", title)
        if short and said.endswith(short) and short.startswith(said[: -len(short)]):
            return title
    return None


def name_outline(pdf: Path, titles: Sequence[str]) -> None:
    """Give the outline its headings' words; an entry that is no heading stays as it is."""
    writer = PdfWriter(clone_from=pdf)

    def rename(entry: Any) -> None:
        while entry is not None:
            title = heading_of(str(entry.get("/Title", "")), titles)
            if title:
                entry[NameObject("/Title")] = TextStringObject(title)
            if "/First" in entry:
                rename(entry["/First"].get_object())
            entry = entry["/Next"].get_object() if "/Next" in entry else None

    rename(writer.get_outline_root())
    writer.write(pdf)


def main() -> None:
    """Build, print, say where."""
    browser = chromium()
    target = root() / "_build" / "html" / TARGET
    if not target.parent.is_dir():
        raise TomError(f"{target.parent}: no book; build it first (make book)")
    with tempfile.TemporaryDirectory() as folder:
        page = single_page(Path(folder))
        prepare(page)
        half = Path(folder) / TARGET
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", f"--print-to-pdf={half}"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True)
        if done.returncode or not half.is_file():
            raise TomError(f"{browser} did not print the book: {done.stderr[-400:]}")
        name_outline(half, headings(page))
        shutil.move(half, target)
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    try:
        main()
    except TomError as error:
        sys.exit(f"pdf: {error}")
