"""Every page of the book: quiet, linked, readable by all, at every width."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote, urldefrag

import pytest
import yaml
from bs4 import BeautifulSoup
from chromium import BOOK, DESKTOP, PATIENCE, PHONE, axe, pages, watched
from playwright.sync_api import Browser, Page
from pypdf import PdfReader

from tomlib.scenarios import root


@dataclass
class Visit:
    """What opening a page showed."""

    title: str = ""
    problems: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    pictures: list[str] = field(default_factory=list)
    """What stands for each figure of the page for those who do not see it."""
    light: list[str] = field(default_factory=list)
    dark: list[str] = field(default_factory=list)
    lit: list[str] = field(default_factory=list)
    """What is behind numbers in the dark, as a colour."""
    width: int = 0
    too_wide: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def visit(browser: Browser, served: str) -> Callable[[str], Visit]:
    """Open a page, once: on a desktop in the light and in the dark, and on a phone."""

    @cache
    def opened(name: str) -> Visit:
        context = browser.new_context(viewport=DESKTOP, reduced_motion="reduce")
        context.set_default_timeout(PATIENCE)
        page, seen = context.new_page(), Visit()
        seen.problems = watched(page)
        page.goto(f"{served}/{name}", wait_until="load")
        seen.title = page.title()
        seen.links = page.eval_on_selector_all("a[href]", "all => all.map(a => a.href)")
        seen.anchors = set(page.eval_on_selector_all("[id]", "all => all.map(e => e.id)"))
        seen.pictures = page.eval_on_selector_all(
            "article img:not(.toggler)", "all => all.map(i => i.alt)"
        )
        # The listings of the source come from one template: one of them stands for all.
        if not name.startswith("_modules/") or name.endswith("/games.html"):
            seen.light = axe(page, resultTypes=["violations"])
            page.emulate_media(color_scheme="dark", reduced_motion="reduce")
            # The 404 page has no theme of its own: it follows the system's colours at once.
            page.wait_for_function("(document.documentElement.dataset.theme ?? 'dark') === 'dark'")
            seen.dark = axe(page, resultTypes=["violations"], runOnly=["color-contrast"])
            seen.lit = page.evaluate(
                """() => [...document.querySelectorAll('.numbers')]
                    .map(e => getComputedStyle(e.closest('.text_html')).backgroundColor)"""
            )
        page.set_viewport_size(PHONE)
        seen.width = page.evaluate("document.documentElement.scrollWidth")
        if seen.width > PHONE["width"]:
            seen.too_wide = page.evaluate(
                """() => [...document.querySelectorAll('body *')]
                    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
                    .slice(0, 8).map(e => e.outerHTML.slice(0, 120))"""
            )
        context.close()
        return seen

    return opened


def test_a_page_is_quiet_and_asks_nothing_of_the_network(
    page_name: str, visit: Callable[[str], Visit]
) -> None:
    assert visit(page_name).problems == []
    assert visit(page_name).title


def test_axe_finds_nothing_serious(page_name: str, visit: Callable[[str], Visit]) -> None:
    seen = visit(page_name)
    assert seen.light == [], "\n".join(seen.light)
    assert seen.dark == [], "in the dark:\n" + "\n".join(seen.dark)


def test_the_front_page_s_numbers_stand_in_no_lit_box_in_the_dark(
    visit: Callable[[str], Visit],
) -> None:
    assert visit("notebooks/index.html").lit == ["rgba(0, 0, 0, 0)"]


def test_a_phone_scrolls_no_page_sideways(page_name: str, visit: Callable[[str], Visit]) -> None:
    seen = visit(page_name)
    assert seen.width <= PHONE["width"], "\n".join(seen.too_wide)


def test_a_figure_tells_its_finding_to_those_who_do_not_see_it(
    visit: Callable[[str], Visit],
) -> None:
    told = {name: visit(name).pictures for name in pages() if visit(name).pictures}
    # Sphinx falls back to the file's name, Jupyter to the figure's repr: neither is a sentence.
    mute = [
        f"{name}: {alt!r}"
        for name, pictures in told.items()
        for alt in pictures
        if len(alt) < 40 or alt.startswith("<")
    ]
    assert mute == []
    assert len(told) >= 10, told


def test_every_link_and_anchor_resolves(visit: Callable[[str], Visit], served: str) -> None:
    broken, followed = [], 0
    for name in pages():
        for link in visit(name).links:
            address, anchor = urldefrag(link)
            if not link.startswith(served):
                if not re.match(r"https?://(?!127\.)|mailto:", link):
                    broken.append(f"{name}: {link}: leads nowhere")
                continue
            followed += 1
            target = unquote(address.removeprefix(f"{served}/").split("?")[0]) or "index.html"
            if not (BOOK / target).is_file():
                broken.append(f"{name}: {link}: no such file")
            elif (
                anchor
                and "=" not in anchor  # with =, it is the explorer's state
                and target in pages()
                and unquote(anchor) not in visit(target).anchors
            ):
                broken.append(f"{name}: {link}: no such place on the page")
    assert broken == []
    assert followed > 1000


def test_the_root_leads_to_the_front_page(new_page: Callable[..., Page], served: str) -> None:
    page = new_page()
    page.goto(served)
    page.wait_for_url("**/notebooks/index.html")
    assert "Can a small model" in page.locator("article h1").inner_text()


def test_search_finds_snowdrift(new_page: Callable[..., Page], served: str) -> None:
    page = new_page()
    problems = watched(page)
    page.goto(f"{served}/search.html?q=snowdrift")
    # Results are put in one after the other.
    page.wait_for_selector("#search-results ul.search li a[href*='00-games']")
    assert problems == []


def headings(path: Path) -> list[str]:
    """A page's headings as they stand in it, its title first."""
    article = BeautifulSoup(path.read_text("utf-8"), "html.parser").select_one("article")
    assert article is not None, path
    for sign in article.select("a.headerlink"):
        sign.decompose()
    return [" ".join(h.get_text().split()) for h in article.find_all(re.compile("^h[1-6]$"))]


def outline(reader: PdfReader, entries: Any) -> Iterator[tuple[str, int]]:
    """Title and page number of every entry of a PDF's outline, in its order."""
    for entry in entries:
        if isinstance(entry, list):
            yield from outline(reader, entry)
        else:
            number = reader.get_destination_page_number(entry)
            assert number is not None
            yield str(entry.title), number


def test_the_pdf_is_the_whole_book_and_the_front_page_links_to_it(
    visit: Callable[[str], Visit], served: str
) -> None:
    reader = PdfReader(BOOK / "tom-book.pdf")
    told = list(outline(reader, reader.outline))
    contents = yaml.safe_load((root() / "_toc.yml").read_text("utf-8"))
    files = [c["file"] for part in contents["parts"] for c in part["chapters"]]
    found = [headings(BOOK / f"{file}.html") for file in (contents["root"], *files)]
    titles = [first for first, *_ in found]
    assert {title for title, _ in told} <= {title for page in found for title in page}
    assert [title for title, _ in told if title in titles] == titles
    numbers = [number for _, number in told]
    assert numbers == sorted(numbers) and len(reader.pages) > 100
    for title, number in told:
        if title in titles:
            text = normalize("NFKC", reader.pages[number].extract_text())  # ligatures
            assert re.sub(r"\s", "", title) in re.sub(r"\s", "", text), title
    links = [link for link in visit("notebooks/index.html").links if link.endswith(".pdf")]
    assert links == [f"{served}/tom-book.pdf"]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("notebooks/04-in-sampel.html", "notebooks/04-in-sample.html"),
        ("book/scale_out", "book/scale-out.html"),
        ("08-published-results.html", "notebooks/08-published-results.html"),
    ],
)
def test_a_wrong_address_leads_to_the_page_that_was_meant(
    asked: str, wanted: str, new_page: Callable[..., Page], lost: str
) -> None:
    page = new_page()
    answer = page.goto(f"{lost}/{asked}")
    assert answer is not None and answer.status == 404
    near = page.locator("#near a")
    assert "Did you mean" in page.locator("#near").inner_text()
    there = page.goto(str(near.evaluate("link => link.href")))
    assert there is not None and there.status == 200 and there.url.endswith(wanted)


def test_an_address_like_no_other_offers_all_pages_and_a_search(
    new_page: Callable[..., Page], lost: str
) -> None:
    page = new_page()
    page.goto(f"{lost}/notebooks/xyzzy.html")
    assert "Did you mean" not in page.locator("#near").inner_text()
    links = page.locator("main a").evaluate_all("links => links.map(a => a.href)")
    assert len(links) > 20 and all(link.startswith(lost) for link in links)
    page.get_by_role("searchbox").fill("snowdrift")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("Search finished").or_(page.locator("ul.search li").first).first.wait_for()
    assert page.locator("ul.search li").count() > 0
