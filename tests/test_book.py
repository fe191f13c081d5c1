"""The book holds together: what it shows, what it links to, and what it tells readers to type."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from tomlib import published, reproduce
from tomlib.alignment import ARMS, compare, cooperation
from tomlib.cli import _parser
from tomlib.collect import collect
from tomlib.errors import TomError
from tomlib.games import KINDS
from tomlib.models import cards
from tomlib.profiles import (
    CHAPTERS,
    EXTRAS,
    SHIPPED,
    load_profile,
    new_run,
    override,
    profile_names,
)
from tomlib.readout import readout
from tomlib.reproduce import build_book
from tomlib.scenarios import context_problems, find, scenarios

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROSE = [
    *sorted((ROOT / "book").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "data" / "published" / "README.md",
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def notebook(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in notebook(path)["cells"] if cell["cell_type"] == "code"]


DRAWING = ROOT / "book" / "_static" / "experiment.svg"


def extension(name: str) -> Any:
    """A module of `book/_ext`, which Sphinx imports from there."""
    if str(ROOT / "book" / "_ext") not in sys.path:
        sys.path.append(str(ROOT / "book" / "_ext"))
    return importlib.import_module(name)


def toc() -> list[str]:
    """Every page of the table of contents, its root first."""
    table = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [table["root"], *(page["file"] for part in table["parts"] for page in part["chapters"])]


# --- pages ----------------------------------------------------------------------------------------


def test_every_page_of_the_toc_is_there_once() -> None:
    pages = toc()
    assert len(pages) == len(set(pages))
    for page in pages:
        there = [page + end for end in (".md", ".ipynb") if (ROOT / (page + end)).is_file()]
        assert len(there) == 1, page


def test_every_notebook_and_prose_page_is_in_the_toc() -> None:
    pages = {path.relative_to(ROOT).with_suffix("").as_posix() for path in NOTEBOOKS}
    pages |= {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}
    assert pages <= set(toc())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_chapter_keeps_the_contract(path: Path) -> None:
    cells = code_cells(path)
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert tagged == [cells[0]]
    for cell in cells:
        assert cell["execution_count"], f"not executed: {source(cell)[:60]}"
        assert all(o["output_type"] != "error" for o in cell["outputs"]), source(cell)[:60]
        for node in ast.walk(ast.parse(source(cell))):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    first = notebook(path)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S", source(first)) and "# #" not in source(first)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_chapter_was_run_from_top_to_bottom(path: Path) -> None:
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_holds_no_path_of_the_machine(path: Path) -> None:
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", path.read_text("utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_figure_has_a_caption_a_name_and_a_finding(path: Path) -> None:
    for cell in code_cells(path):
        pictures = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
        figure = cell["metadata"].get("mystnb", {}).get("figure", {})
        assert bool(figure) == ("plots.show(" in source(cell)), source(cell)[:80]
        assert len(pictures) <= bool(figure), "a figure is one picture, shown by plots.show"
        if figure:
            assert figure["caption"].endswith(".") and figure["name"].startswith("fig-")


def tables(path: Path) -> list[tuple[str, str, str]]:
    """Name, caption and text of every table that a notebook shows."""
    found = []
    for cell in code_cells(path):
        for output in cell["outputs"]:
            html = "".join(output.get("data", {}).get("text/html", ""))
            if "<table" not in html:
                continue
            match = re.search(
                r'<table[^>]* id="([^"]+)">\s*<caption>(.*?)</caption>', html, re.DOTALL
            )
            assert match, f"a table is shown by plots.table, with a name: {source(cell)[:80]}"
            found.append((match[1], match[2], "".join(output["data"]["text/plain"])))
    return found


NO_ANSWERS = {
    "tab-01-players", "tab-02-plan", "tab-03-rows", "tab-03-first", "tab-03-settings",
    "tab-03-record", "tab-03-loss", "tab-03-published-rows", "tab-03-published-loss",
    "tab-06-table1", "tab-07-game", "tab-09-left", "tab-09-by-game", "tab-09-attempts",
    "tab-10-sizes", "tab-06-doubled-exactly",
    # exact probabilities beside published counts:
    "tab-09-attempts-judged", "tab-09-folds", "tab-09-seeds", "tab-09-held-out", "tab-09-goods",
    "tab-10-curve", "tab-answer",
}  # fmt: skip
"""Tables of no sampled answer: plans, training rows, published figures, exact probabilities."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_table_has_a_caption_and_says_what_could_not_be_read(path: Path) -> None:
    shown = tables(path)
    assert shown
    for name, caption, text in shown:
        assert caption.endswith("."), name
        assert name.startswith(f"tab-{path.stem.split('-')[0].replace('index', 'answer')}"), name
        if name in NO_ANSWERS or path.stem[:2] in ("00", "08", "st"):
            continue
        said = re.search(r"\bunread\b|\bunparsed\b|readable choice|not readable|not be read", text)
        assert said, f"{name} does not say how many answers could not be read"


@pytest.mark.parametrize(
    ("chapter", "split"),
    [
        ("04-in-sample", "in_sample"),
        ("05-new-contexts", "new_contexts"),
        ("06-scaled-games", "scaled_games"),
    ],
)
def test_the_number_of_unread_answers_is_that_of_the_ledger(chapter: str, split: str) -> None:
    run = new_run(load_profile(SHIPPED))
    roles = {"teacher": run.profile.teacher_answer} | dict.fromkeys(("student", "tuned"), "choice")
    roles["published-tuned"] = "choice"
    draws = [collect(run, r, run.scenarios(split), f, letter_only=True) for r, f in roles.items()]
    unread = sum(int(table["choice"].isna().sum()) for table in draws)
    text = dict((name, text) for name, _, text in tables(ROOT / "notebooks" / f"{chapter}.ipynb"))
    wanted = f"no part of it: {unread:,}." if unread else "All answers had a readable choice."
    for name in ("measures", "distances", "baselines"):
        assert wanted in text[f"tab-{chapter[:2]}-{name}"]


def test_names_of_figures_and_tables_are_given_once_and_those_referred_to_exist() -> None:
    names = [
        cell["metadata"]["mystnb"]["figure"]["name"]
        for path in NOTEBOOKS
        for cell in code_cells(path)
        if "mystnb" in cell["metadata"]
    ]
    names += [name for path in NOTEBOOKS for name, _, _ in tables(path)]
    for path in (*PROSE, ROOT / "benchmarks" / "RESULTS.md"):
        names += re.findall("^:name: (.+)$", path.read_text("utf-8"), re.MULTILINE)
    assert len(names) == len(set(names)) > 20
    referred = {name for _, text in texts() for name in re.findall(r"\{numref\}`([^`]+)`", text)}
    captions = re.findall(r"\{numref\}`([^`]+)`", "".join(p.read_text("utf-8") for p in NOTEBOOKS))
    assert referred <= set(names)
    assert {name for name in names if name.startswith("fig-")} <= {*referred, *captions}


def test_every_table_and_picture_of_the_prose_has_a_caption_and_a_name() -> None:
    found = 0
    for path in (*sorted((ROOT / "book").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"):
        text = path.read_text("utf-8")
        for before in re.split(r"^\|.*\n\|[-|]+\n", text, flags=re.M)[:-1]:
            found += 1
            assert re.search(r"^:::\{table\} .+\.\n:name: tab-[\w-]+\n\n\Z", before, re.M), (
                path.name
            )
        for picture in re.findall(r"```\{figure\}(.*?)```", text, re.DOTALL):
            options, _, caption = picture.partition("\n\n")
            assert (
                ":name: fig-" in options and ":alt: " in options and caption.rstrip().endswith(".")
            )
        pictures = re.findall(r"!\[[^]]*\]\([^)]+\)|\{image\}|<img", text)
        assert path.name == "RESULTS.md" or not pictures, path.name  # its own is in speed.md
    assert found > 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_opens_with_what_it_asks_needs_and_costs_and_how_to_rerun_it(path: Path) -> None:
    first = source(notebook(path)["cells"][0])
    opens = source(code_cells(path)[1])
    if path.stem in CHAPTERS:
        assert "cost_in_words(run)" in opens
    elif path.stem in EXTRAS:
        assert "**Cost.**" in opens
    elif path.stem != "index":  # the front page is nobody's chapter
        assert "no model, no draws, a second" in first
    if path.stem != "index":
        order = ["**What it asks.**", "**What it needs.**", "**Run it again**"]
        assert [part for part in re.findall(r"\*\*[^*]+\*\*", first) if part in order] == order
        assert f"papermill notebooks/{path.name} out.ipynb" in first


# --- links ----------------------------------------------------------------------------------------


def texts() -> Iterator[tuple[Path, str]]:
    """All that is prose: Markdown files, and the Markdown cells of notebooks."""
    for path in PROSE:
        yield path, path.read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        cells = [c for c in notebook(path)["cells"] if c["cell_type"] == "markdown"]
        yield path, "\n\n".join(source(cell) for cell in cells)


def headings(path: Path) -> set[str]:
    """Anchors of a page's headings, as the book and most viewers make them."""
    text = dict(texts()).get(path, "")
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


def test_every_internal_link_leads_somewhere() -> None:
    links = 0
    for path, text in texts():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
            if re.match(r"[a-z]+:", target):
                continue
            links += 1
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), f"{name_of(path)}: {target}"
            if anchor:
                assert anchor in headings(there), f"{name_of(path)}: {target}"
    assert links > 15


def test_the_public_address_stands_where_the_pages_leave_it_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = [(ROOT / "book" / "use-it-yourself.md").read_text("utf-8")]
    monkeypatch.setenv("TOM_REPOSITORY", "https://github.com/someone/strategies/")
    extension("website").name_repository(None, "book/use-it-yourself", page)
    assert '"https://github.com/someone/strategies", "book"' in page[0] and "OWNER" not in page[0]


def test_terms_of_the_glossary_are_used() -> None:
    glossary = (ROOT / "book" / "glossary.md").read_text("utf-8")
    known = set(re.findall(r"^(\w[^\n]*)\n  \S", glossary, re.MULTILINE))
    used = [term for _, text in texts() for term in re.findall(r"\{term\}`([^`]+)`", text)]
    assert len(used) > 8 and set(used) <= known


def test_prose_refers_to_the_figures_of_its_chapter() -> None:
    for chapter in CHAPTERS:
        path = ROOT / "notebooks" / f"{chapter}.ipynb"
        cells = notebook(path)["cells"]
        prose = "".join(source(c) for c in cells if c["cell_type"] == "markdown")
        captions = "".join(str(c["metadata"].get("mystnb", "")) for c in cells)
        referred = re.findall(r"\{numref\}`(?:fig|tab)-([0-9]{2})", prose + captions)
        assert chapter[:2] in referred, chapter


def test_citations_are_in_the_bibliography() -> None:
    known = re.findall(r"^@\w+\{([^,]+),", (ROOT / "book/references.bib").read_text("utf-8"), re.M)
    cited = [
        key
        for _, text in texts()
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
        for key in keys.split(",")
    ]
    assert len(known) == len(set(known)) and set(cited) == set(known)


# --- what readers are told to type ----------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """Every line of every bash block, as (page, words)."""
    found = []
    for path, text in texts():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append((name_of(path), shlex.split(line, comments=True)))
    return found


def settings(pairs: list[list[str]]) -> dict[str, Any]:
    """`-p name value` as the command line reads it."""
    given = {}
    for name, text in pairs:
        try:
            given[name] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            given[name] = text
    return given


TOM = [(page, words[1:]) for page, words in commands() if words[0] == "tom"]
PAPERMILL = [(page, words[1:]) for page, words in commands() if words[0] == "papermill"]
MAKE = [(page, words[1:]) for page, words in commands() if words[0] == "make"]


@pytest.mark.parametrize(("page", "words"), TOM, ids=lambda x: x if isinstance(x, str) else "")
def test_a_tom_command_is_one(page: str, words: list[str]) -> None:
    given = vars(_parser().parse_args(words))
    if "profile" in given:
        profile = given["profile"] if given["profile"] in profile_names() else SHIPPED
        assert given["profile"] in (profile, "mine", "profiles/mine.toml")
        load_profile(profile, **settings(given["p"]))
    if "scenario" in given and given["scenario"] not in ("orchestra/stag_hunt", "IR/deadlock"):
        find(given["scenario"], given["split"])
    if given.get("split"):
        assert scenarios(given["split"])
    assert set(given.get("names") or []) <= set(cards())


@pytest.mark.parametrize(("page", "words"), PAPERMILL)
def test_a_papermill_command_runs_a_notebook(page: str, words: list[str]) -> None:
    assert (ROOT / words[0]).is_file()
    given = settings([words[i + 1 : i + 3] for i, word in enumerate(words) if word == "-p"])
    profile = load_profile(given.pop("profile", SHIPPED))
    override(profile, given)


def test_make_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert MAKE
    for page, words in MAKE:
        target, *variables = words
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)
        for variable in variables:
            assert re.search(rf"^{variable.split('=')[0]} \?=", makefile, re.MULTILINE), page


def test_toml_examples_are_accepted(tmp_path: Path) -> None:
    """The blocks of the page for users are valid entries of the files that they belong to."""
    page = (ROOT / "book" / "use-it-yourself.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    for file in ("contexts", "games"):
        ours = (ROOT / "data" / "scenarios" / f"{file}.toml").read_text(encoding="utf-8")
        own = [b for b in blocks if b.startswith("[[context]]")] if file == "contexts" else []
        assert bool(own) == (file == "contexts")
        (tmp_path / f"{file}.toml").write_text("\n".join([*own, ours]), encoding="utf-8")
    assert "orchestra/stag_hunt" in {s.name for s in scenarios(folder=tmp_path)}
    assert context_problems("orchestra", tmp_path) == []
    models = tmp_path / "mine.toml"
    models.write_text("\n".join(b for b in blocks if b.startswith("[[model]]")), encoding="utf-8")
    assert {"my-student", "my-teacher"} <= set(cards(models))


def test_python_examples_name_things_that_exist() -> None:
    blocks = [
        (path, block)
        for path, text in texts()
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ]
    assert blocks
    for path, block in blocks:
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        exec("\n".join(map(ast.unparse, imports)), {})  # an import that fails names itself
        assert imports, name_of(path)


# --- what is typed is what the code says ----------------------------------------------------------


def said_by_the_code() -> list[str]:
    """Every text of `tomlib`, with … where something is put in."""
    said = []
    for path in (ROOT / "tomlib").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                said.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return said


def test_errors_in_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "book" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 20
    known = said_by_the_code()
    for message in messages:
        shape = ".*".join(re.escape(part) for part in message.split("…"))
        assert any(re.match(shape, said, re.DOTALL) for said in known), message


def test_the_overview_counts_scenarios_as_they_are() -> None:
    page = (ROOT / "book" / "experiment.md").read_text(encoding="utf-8")
    overview = extension("overview")
    assert DRAWING.read_text("utf-8") == overview.svg(new_run(load_profile(SHIPPED)))
    other = overview.svg(new_run(load_profile("smoke", n_teacher=7)))
    assert "smollm2-135m" in other and ">14 rows" in other  # of 4 training scenarios, half held out
    drawing = (ROOT / "book" / "_static" / "experiment.svg").read_text(encoding="utf-8")
    for split in ("in_sample", "new_contexts", "scaled_games", "public_goods"):
        those = scenarios(split)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{split}`"))
        assert f"| {len(those)} |" in row
        line = re.search(rf">{split.replace('_', ' ')}: ([^<]+)<", drawing)
        assert line is not None
        assert str(len(those)) in re.findall(r"\d+", line[1])
    for context in {s.context.name for s in scenarios()}:
        assert context in page
    assert (
        "twelve" in (ROOT / "book" / "use-it-yourself.md").read_text("utf-8") and len(KINDS) == 12
    )


def test_every_model_card_is_described() -> None:
    page = (ROOT / "book" / "models.md").read_text(encoding="utf-8")
    for card in cards().values():
        row = next((x for x in page.splitlines() if x.startswith(f"| `{card.name}` |")), "")
        assert card.purpose in row and card.licence in row, card.name


def script(name: str) -> Any:
    """A script of `book/`, as a module."""
    if str(ROOT / "book") not in sys.path:
        sys.path.append(str(ROOT / "book"))
    return importlib.import_module(name)


def test_the_picture_in_the_readme_is_of_the_front_page_as_it_is() -> None:
    mark = script("screenshot").front(ROOT / "notebooks" / "index.ipynb")
    picture = Image.open(ROOT / "book" / "_static" / "front.png")
    assert picture.info.get("Shows") == mark, "the front page has changed: make front"
    assert picture.width >= 1000 and "front.png" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_results_in_the_readme_are_those_of_the_shipped_run() -> None:
    readme = script("readme")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    results = readme.results(new_run(load_profile(SHIPPED)))
    assert table.strip() == results
    picture = Image.open(ROOT / "book" / "_static" / "results.png")
    assert picture.info.get("Shows") == readme.shown(results), "python book/readme.py"


def test_the_seeds_in_the_readme_are_those_of_the_shipped_run() -> None:
    run = new_run(load_profile(SHIPPED))
    splits = ["in_sample", "new_contexts", "scaled_games"]
    everywhere = run.scenarios(splits)
    teacher = cooperation(collect(run, "published-teacher", everywhere, "choice", published.DRAWS))
    known = [teacher, readout(run, "student", everywhere, "choice")]
    closed = []
    for seed in range(run.profile.seed + 1, run.profile.seed + 5):
        tuned = readout(run.changed(seed=seed), "published-tuned", everywhere, "choice")
        side = compare(pd.concat([*known, tuned], ignore_index=True), *ARMS["published"])
        side["before"] = (side["teacher"] - side["student"]).abs()
        side["after"] = (side["teacher"] - side["tuned"]).abs()
        gaps = side.groupby("split")[["before", "after"]].mean()
        closed.append(100 * (1 - gaps["after"] / gaps["before"]))
    ends = pd.concat(closed, axis=1).agg(["min", "max"], axis=1).round().astype(int)
    low, high = ends["min"], ends["max"]
    assert (
        f"with four further seeds {low['in_sample']} to {high['in_sample']} % are closed in sample, "
        f"{low['new_contexts']} to {high['new_contexts']} % in new contexts and "
        f"{low['scaled_games']} to {high['scaled_games']} % with doubled payoffs"
    ) in (ROOT / "README.md").read_text(encoding="utf-8")


# --- the pages ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_book_builds_without_a_warning(tmp_path: Path) -> None:
    page = build_book(out=tmp_path / "book")
    assert page == tmp_path / "book" / "index.html"
    for name in toc():
        assert (page.parent / f"{name}.html").is_file(), name
    front = (page.parent / "notebooks" / "index.html").read_text(encoding="utf-8")
    assert "book.css" in front and "book.js" in front
    api = (page.parent / "book" / "api.html").read_text(encoding="utf-8")
    assert 'id="tomlib.games.TwoPlayerGame.mixed_nash"' in api
    pages = {
        path.resolve(): path.read_text("utf-8")
        for path in page.parent.rglob("*.html")
        if "_static" not in path.parts
    }
    for path, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"#?:]+)(?:[#?][^"]*)?"', text):
            there = (path.parent / link.replace("%20", " ")).resolve()
            assert there.exists(), f"{path.relative_to(tmp_path)}: {link}"

    for path in NOTEBOOKS:  # every figure and table leads to its code, its notebook and its data
        text = (page.parent / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        made = re.findall(r'<p class="made-by">.*?</p>', text, re.DOTALL)
        shown = [o for c in code_cells(path) for o in c["outputs"] if "data" in o]
        kinds = ["image/png" in o["data"] or "<table" in str(o["data"]) for o in shown]
        assert len(made) == sum(kinds) > 0, path.name
        anchors = set(re.findall(r'id="([\w-]+-cell-\d+)"', text))
        for links in made:
            assert set(re.findall(r'href="#([^"]+)"', links)) <= anchors
            assert path.name in links and " data: " in links, path.name
            assert path.stem[:2] in ("00", "08", "st") or "-draws.zip" in links, path.name
    chapter = (page.parent / "notebooks" / "04-in-sample.html").read_text(encoding="utf-8")
    assert chapter.count("</figcaption>") == 4 and f"{SHIPPED}-draws.zip" in chapter
    games = (page.parent / "notebooks" / "00-games.html").read_text(encoding="utf-8")
    assert 'alt="The 4 games lie in 4 quadrants' in games and "Fig. " in games
    lost = (page.parent / "404.html").read_text(encoding="utf-8")
    assert all(f'href="{name}.html"' in lost for name in toc())


@pytest.mark.slow
def test_a_link_that_leads_nowhere_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy2(ROOT / name, tmp_path / name)
    for name in ("book/_ext", "book/_static"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy2(ROOT / "book" / "references.bib", tmp_path / "book")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: front\n", encoding="utf-8")
    (tmp_path / "front.md").write_text("# Front\n\n[away](nowhere.md)\n", encoding="utf-8")
    monkeypatch.setattr(reproduce, "root", lambda: tmp_path)
    with pytest.raises(TomError, match=r"does not build: .*nowhere"):
        build_book()
    (tmp_path / "front.md").unlink()
    games = (ROOT / "notebooks" / "00-games.ipynb").read_text("utf-8")
    alone = re.sub(r"\{cite\}`[^`]+`", "", games)  # the bibliography is on a page that is not here
    (tmp_path / "front.ipynb").write_text(alone, encoding="utf-8")
    monkeypatch.setenv("TOM_REPOSITORY", "https://github.com/someone/strategies")
    assert build_book() == tmp_path / "_build" / "html" / "index.html"
    front = (tmp_path / "_build" / "html" / "front.html").read_text("utf-8")
    assert (
        "https://mybinder.org/v2/gh/someone/strategies/main?urlpath=lab/tree/front.ipynb" in front
    )
    assert (
        "https://colab.research.google.com/github/someone/strategies/blob/main/front.ipynb" in front
    )


# --- in the browser of somebody else --------------------------------------------------------------


def light() -> set[str]:
    """The packages of `binder/requirements.txt`, as they are imported from the lock."""
    text = (ROOT / "binder" / "requirements.txt").read_text("utf-8")
    return set(re.findall(r"^([a-z0-9-]+==\S+)", text, re.MULTILINE))


def test_the_light_environment_is_a_part_of_the_lock_and_holds_all_of_the_core() -> None:
    locked = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    assert light() <= set(locked)
    names = {line.split("==")[0] for line in light()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = list(map(Requirement, project["dependencies"]))
    seen = set[str]()
    while wanted:  # what the core needs, and what that needs
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        assert name in names, f"{name} is not in binder/requirements.txt"
        wanted += [Requirement(r) for r in requires(name) or [] if "extra ==" not in r]
    assert not names & {"torch", "transformers", "peft", "xllamacpp", "jupyter-book"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_a_replay_needs_the_light_environment_only(name: str) -> None:
    """Executed with every other package forbidden."""
    cells = [source(c) for c in code_cells(ROOT / "notebooks" / f"{name}.ipynb")]
    forbidden = """
import sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name
light = set(sys.argv[1].split()) | {"tomlib", "pip", "setuptools"}
heavy = {m for m, who in packages_distributions().items()
         if not {canonicalize_name(w) for w in who} & light}
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            raise ModuleNotFoundError(f"{name} is not in binder/requirements.txt", name=name)
sys.meta_path.insert(0, Forbid())
import matplotlib
matplotlib.use("agg")
"""
    names = " ".join(line.split("==")[0] for line in light())
    command = [sys.executable, "-c", "\n".join([forbidden, *cells]), names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]


def _modules() -> list[str]:
    """The modules in the order of CONTRIBUTING's table."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text.split("| module | it holds |")[1].split("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def test_no_module_imports_from_one_below_it() -> None:
    order = _modules()
    assert sorted(order) == sorted(p.stem for p in (ROOT / "tomlib").glob("[a-z]*.py"))
    for number, name in enumerate(order):
        for node in ast.walk(ast.parse((ROOT / "tomlib" / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tomlib"):
                _, _, inner = (node.module or "").partition(".")
                used = [inner] if inner else [a.name for a in node.names]
                for module in set(used) & set(order):
                    assert order.index(module) < number, f"{name} imports {module}"


def test_the_api_page_has_every_module_in_order() -> None:
    page = (ROOT / "book" / "api.md").read_text("utf-8")
    assert re.findall(r"automodule:: tomlib\.(\w+)", page) == _modules()
    listed = re.findall(r"`(\w+)`", (ROOT / "tomlib" / "__init__.py").read_text("utf-8"))
    assert listed == _modules()
