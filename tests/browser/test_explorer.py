"""The scenario explorer: its numbers, its controls, its addresses, with and without a server."""

import json
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from chromium import BOOK, PHONE, ROOT, axe, watched
from playwright.sync_api import Page

from tomlib import published, stats
from tomlib.collect import player_if_ready
from tomlib.plots import LONGEST, visible
from tomlib.profiles import load_profile, new_run
from tomlib.prompts import messages
from tomlib.scenarios import find

NewPage = Callable[..., Page]
CARRIED = {
    "d3.min.js": "d3/dist/d3.min.js",
    "plot.umd.min.js": "@observablehq/plot/dist/plot.umd.min.js",
}
PARTY = {"split": "public_goods", "context": "party", "game": "public_goods"}
HUNT = {"split": "scaled_games", "context": "biz", "game": "stag_hunt"}


def built() -> dict[str, Any]:
    """What the page was built from."""
    text = (BOOK / "_static" / "explorer" / "data.js").read_text(encoding="utf-8")
    assert "<" not in text  # no text of a model can end the script
    values: dict[str, Any] = json.loads(text.removeprefix("window.explorerData = ").rstrip(";\n"))
    return values


def at(base: str, **view: str) -> str:
    return f"{base}/book/explorer.html" + (f"#{urlencode(view)}" if view else "")


def go(page: Page, **view: str) -> None:
    """Change the address as a link would, and wait until the page has followed."""
    page.evaluate("hash => { location.hash = hash }", f"#{urlencode(view)}")
    page.wait_for_function(
        "view => Object.entries(view).every("
        "([key, value]) => document.getElementById(`explorer-${key}`).value === value)",
        arg=view,
    )


def choices(page: Page) -> dict[str, dict[str, str]]:
    """The table beside the chart: model -> column -> text."""
    rows: list[list[str]] = page.eval_on_selector_all(
        "#explorer-choices tr", "rows => rows.map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}


def rounded(number: float, digits: int) -> str:
    """As JavaScript's toFixed: of two equally near, the larger."""
    return str(Decimal(number).quantize(Decimal(10) ** -digits, ROUND_HALF_UP))


def percent(share: float) -> str:
    return f"{rounded(100 * share, 1)}%"


@pytest.fixture
def page(new_page: NewPage, served: str) -> Page:
    """The explorer, served."""
    opened = new_page()
    opened.goto(at(served))
    return opened


def test_the_data_are_those_of_the_ledger() -> None:
    """Counted here from the ledger's lines alone, for every scenario and model."""
    values = built()
    run = new_run(load_profile(values["run"]["profile"]))
    p, draws = run.profile, run.ledger.draws()
    draws = draws[draws["temperature"].eq(p.temperature) & draws["index"].lt(p.n)]
    draws = draws[draws["max_new_tokens"].eq(p.tokens_choice)]
    draws["adapter"] = draws["adapter"].fillna("")
    key = ["model", "adapter", "prompt"]
    asked = dict(list(draws.groupby(key)))
    exact = {(r["model"], r["adapter"] or "", r["prompt"]): r["p"] for r in run.ledger.readouts()}
    paper = published.roles().set_index(["model", "split", "context", "game"])
    compared = 0
    for role, model in values["models"].items():
        who = player_if_ready(run, role)
        assert who is not None
        for cell in values["scenarios"]:
            found = cell["results"][role]
            if who.published:
                if cell["kind"] == "two_player":
                    row = paper.loc[("teacher", cell["split"], cell["context"], cell["game"])]
                    assert found["counts"] == {"C": row["cooperate"], "D": row["defect"]}
                continue
            where = (who.card.name, who.adapter.fingerprint if who.adapter else "")
            where = (*where, cell["prompts"][model["answer"]]["id"])
            choices = asked[where]["choice"]
            read = choices.dropna().astype(str)
            assert found["draws"] == len(read) > 0
            assert found["unread"] == len(choices) - len(read)
            total = sum(exact[where].values())
            for option, count in found["counts"].items():
                assert count == (read == option).sum()
                low, high = stats.wilson(count, len(read))
                assert found["low"][option] == pytest.approx(float(low))
                assert found["high"][option] == pytest.approx(float(high))
                assert found["exact"][option] == pytest.approx(exact[where][option] / total)
            compared += 1
    assert compared >= 3 * len(values["scenarios"])


def test_the_page_shows_its_data(page: Page) -> None:
    values = built()
    for cell in [*values["scenarios"][::9], values["scenarios"][-1]]:
        for arm, roles in values["arms"].items():
            view = {k: cell[k] for k in ("split", "context", "game")}
            go(page, **view, arm=arm)
            table = choices(page)
            spoken = page.locator("#explorer-summary").inner_text()
            for role in roles:
                shown, data = table[values["models"][role]["title"]], cell["results"][role]
                assert int(shown["draws"]) == data["draws"]
                assert int(shown["not readable"]) == data["unread"]
                if cell["kind"] == "public_goods":
                    assert shown["mean"] == rounded(data["mean"], 2)
                    assert f"{rounded(data['mean'], 2)} dollars" in spoken
                    for option, count in data["counts"].items():
                        assert shown[f"{option} $"].startswith(f"{count} (")
                        if "exact" in data:
                            assert shown[f"{option} $"].endswith(percent(data["exact"][option]))
                    continue
                share = percent(data["counts"]["C"] / data["draws"])
                between = f"{percent(data['low']['C'])} to {percent(data['high']['C'])}"
                assert (int(shown["C"]), int(shown["D"])) == tuple(data["counts"].values())
                assert (shown["share of C"], shown["95% interval"]) == (share, between)
                assert shown["exact"] == (percent(data["exact"]["C"]) if "exact" in data else "")
                assert f"C in {data['counts']['C']} of {data['draws']} draws, {share}" in spoken


def test_prompts_are_as_rendered_and_motivations_as_drawn(page: Page) -> None:
    values = built()
    run = new_run(load_profile(values["run"]["profile"]))
    for cell in values["scenarios"][:: len(values["scenarios"]) // 6]:
        s = find(cell["name"], cell["split"])
        for model in ("teacher", "tuned"):
            go(page, split=s.split, context=s.key[1], game=s.key[2], arm="family", model=model)
            form = values["models"][model]["answer"]
            said = [m.content for m in messages(s, form, run.wording)]
            assert page.locator("#explorer-prompt pre").all_text_contents() == said
        if s.split == "in_sample":
            texts = page.locator("#explorer-motivations q").all_text_contents()
            draws = run.ledger.draws(split=s.split, context=s.key[1], game=s.key[2])
            assert texts and set(texts) <= {
                visible(said, LONGEST) for said in draws["motivation"].dropna()
            }


def test_a_choice_by_mouse_changes_all_of_the_page(page: Page) -> None:
    page.select_option("#explorer-split", "new_contexts")
    page.select_option("#explorer-game", "snowdrift")
    assert page.input_value("#explorer-context") == "sports"  # what does not fit falls back
    assert page.input_value("#explorer-game") == "snowdrift"
    summary = page.locator("#explorer-summary")
    assert summary.get_attribute("aria-live") == "polite"
    assert "Snowdrift, Two athletes, new contexts; family arm." in summary.inner_text()
    assert "professional athlete" in page.locator("#explorer-prompt pre").first.inner_text()
    cells = page.locator("#explorer-payoffs td.nash").all_inner_texts()
    assert [cell.split("\n")[0].strip() for cell in cells] == ["3, 10", "10, 3"]
    assert "16.7%" in page.locator("#explorer-payoffs").inner_text()
    before = summary.inner_text()
    page.select_option("#explorer-arm", "published")
    assert summary.inner_text() != before
    assert page.input_value("#explorer-model") == "published-teacher"
    page.go_back()
    page.wait_for_function("document.getElementById('explorer-arm').value === 'family'")
    assert summary.inner_text() == before


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    page.focus("#explorer-split")
    reached = []
    for _ in range(5):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert reached == [f"explorer-{x}" for x in ("split", "context", "game", "arm", "model")]
    before = page.locator("#explorer-summary").inner_text()
    page.focus("#explorer-game")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#explorer-game") == "prisoners_delight"
    assert page.locator("#explorer-summary").inner_text() != before
    assert "game=prisoners_delight" in page.url
    assert page.evaluate("document.activeElement.id") == "explorer-game"  # focus stays


def test_it_works_from_a_folder_and_an_address_names_its_view(new_page: NewPage) -> None:
    page = new_page()
    problems = watched(page)
    page.goto(at(BOOK.resolve().as_uri(), **HUNT, arm="published", model="published-tuned"))
    assert page.input_value("#explorer-context") == "biz"
    assert page.input_value("#explorer-model") == "published-tuned"
    assert "20, 20" in page.locator("#explorer-payoffs").inner_text()
    page.select_option("#explorer-context", "team")
    assert "context=team" in page.url
    link = page.get_by_text("Link to this view").get_attribute("href")
    assert link is not None and page.url.endswith(link)
    assert page.locator("#explorer-choices svg[role=img]").get_attribute("aria-label")
    assert problems == []


def test_an_address_that_names_nothing_falls_back(new_page: NewPage, served: str) -> None:
    page = new_page()
    problems = watched(page)
    page.goto(at(served, split="nowhere", context="<b>", game="chess", arm="x", model="y"))
    assert page.input_value("#explorer-split") == "in_sample"
    assert len(choices(page)) >= 3
    assert problems == []


def test_what_a_model_writes_is_never_read_as_html(new_page: NewPage, served: str) -> None:
    evil = "</script><img src=x onerror='window.owned = true'>"
    values = built()
    values["scenarios"][0]["motivations"] = {"asked": 1, "given": 1, "shown": [["C", evil]]}
    values["texts"] = [evil] * len(values["texts"])
    page = new_page()
    page.route(
        "**/explorer/data.js*",
        lambda route: route.fulfill(body=f"window.explorerData = {json.dumps(values)};"),
    )
    page.goto(at(served))
    assert page.locator("#explorer-motivations q").first.text_content() == evil
    assert page.locator(".explorer img").count() == 0
    assert page.evaluate("window.owned") is None


def test_a_run_that_lacks_draws_is_said_to(new_page: NewPage, served: str) -> None:
    values = built()
    for cell in values["scenarios"]:
        cell["results"], cell["motivations"], cell["published"] = {}, None, {}
    page = new_page()
    problems = watched(page)
    page.route(
        "**/explorer/data.js*",
        lambda route: route.fulfill(body=f"window.explorerData = {json.dumps(values)};"),
    )
    page.goto(at(served))
    assert "not in the ledger of this run" in page.locator("#explorer-summary").inner_text()
    assert "holds no choices" in page.locator("#explorer-choices").inner_text()
    assert "no figures" in page.locator("#explorer-paper").inner_text()
    assert problems == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_other_views_are_readable_by_all_and_fit_a_phone(
    theme: str, new_page: NewPage, served: str
) -> None:
    page = new_page(color_scheme=theme, reduced_motion="reduce", viewport=PHONE)
    page.goto(at(served, **PARTY, arm="published", model="published-tuned"))
    assert page.locator("#explorer-choices svg").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    found = axe(page, resultTypes=["violations"])
    assert found == [], "\n".join(found)


@pytest.mark.parametrize("arm", ["family", "published"])
def test_no_label_of_a_chart_runs_off_a_phone(arm: str, new_page: NewPage, served: str) -> None:
    page = new_page(viewport=PHONE)
    page.goto(at(served, **HUNT, arm=arm))
    room = page.evaluate(
        """[...document.querySelectorAll("#explorer-choices svg text")].map((text) => {
          const [inner, outer] = [text, text.closest("svg")].map((e) => e.getBoundingClientRect());
          return [text.textContent, inner.left - outer.left, outer.right - inner.right];
        })"""
    )
    assert len(room) > 5
    assert [text for text, left, right in room if min(left, right) < -1] == []


@pytest.mark.parametrize("name", CARRIED)
def test_carried_libraries_are_the_packages_files(name: str) -> None:
    packages = Path(__file__).parent / "node_modules"
    ours = ROOT / "book" / "_static" / "explorer" / name
    assert ours.read_bytes() == (packages / CARRIED[name]).read_bytes()
    wanted = json.loads((Path(__file__).parent / "package.json").read_text("utf-8"))
    package = CARRIED[name].split("/dist/")[0]
    assert f"v{wanted['dependencies'][package]} Copyright" in ours.read_text("utf-8")[:200]
