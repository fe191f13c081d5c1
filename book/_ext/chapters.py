"""Notebooks in the book: findings under figures, numbered tables, links to code and data."""

import base64
import hashlib
import json
import os
import re
import tomllib
import zipfile
from html import unescape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxRole

PDF = "tom-book.pdf"
"""Where `make pdf` puts the whole book, beside the front page's redirect."""

COUNTS, GOODS = "data/published/cooperation_counts.csv", "data/published/public_goods.csv"
DATA = {
    "notebooks/00-games": ["data/scenarios/games.toml"],
    "notebooks/02-teacher-querying": ["draws"],
    "notebooks/07-public-goods": ["draws", GOODS],
    "notebooks/08-published-results": [COUNTS, GOODS, "data/published/table1_as_printed.csv"],
    "notebooks/status": ["manifest.json"],
}
"""The files behind a notebook's outputs; the run's ledger and the paper's counts unless said here."""


def findings(path: Path) -> dict[str, str]:
    """What the figures of a notebook find, by the sha256 of the picture (`tomlib.plots.show`)."""
    said = {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            words = "".join(data.get("text/plain", ""))
            if "image/png" in data and not words.startswith("<"):
                picture = base64.b64decode("".join(data["image/png"]))
                said[hashlib.sha256(picture).hexdigest()] = words
    return said


def runs(app: Any) -> dict[str, Path]:
    """The runs whose data lie with the book, by name."""
    return {p.parent.name: p for p in Path(app.srcdir, "data", "runs").glob("*/manifest.json")}


def ledgers(app: Any) -> None:
    """Pack draws, exact probabilities and training logs of each run into one file for download."""
    for name, manifest in runs(app).items():
        target = Path(app.srcdir, "_build", "data", f"{name}-draws.zip")
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(target, "w") as packed:
            held = [*manifest.parent.glob("[dr][re]*s/*.jsonl.gz")]
            held += [*manifest.parent.glob("adapters/*/log.csv")]
            held += [*manifest.parent.glob("adapters/*/training.json")]
            for path in sorted(held):
                entry = zipfile.ZipInfo(f"{name}/{path.relative_to(manifest.parent)}")
                packed.writestr(entry, path.read_bytes())
            packed.writestr(zipfile.ZipInfo(f"{name}/manifest.json"), manifest.read_bytes())


def run_name(path: Path) -> str:
    """The profile that an executed notebook was given."""
    name = ""
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if {"parameters", "injected-parameters"} & set(cell["metadata"].get("tags", [])):
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("profile = "):
                    name = line.split("=", 1)[1].split("#")[0].strip().strip("\"'")
    if name.endswith(".toml") and Path(name).is_file():
        return str(tomllib.loads(Path(name).read_text("utf-8"))["name"])
    return Path(name).stem


def data_of(app: Any, docname: str) -> list[tuple[str, str]]:
    """Label and path (from the book's root) of the data behind a notebook's outputs."""
    name = run_name(Path(app.env.doc2path(docname)))
    held = runs(app).get(name)
    found = []
    for file in DATA.get(docname, ["draws", COUNTS]):
        if file == "draws" and held is not None:
            found.append((f"ledger of the run {name}", f"/_build/data/{name}-draws.zip"))
        elif file == "manifest.json" and held is not None:
            found.append(("manifest.json", f"/data/runs/{name}/manifest.json"))
        elif Path(app.srcdir, file).is_file():
            found.append((Path(file).name, f"/{file}"))
    return found


def link_outputs(app: Any, doctree: nodes.document) -> None:
    """Put the findings under the figures, and under every output what made it."""
    docname = app.env.docname
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        return
    said = findings(path)
    for image in doctree.findall(nodes.image):
        words = said.get(Path(image["uri"]).stem)
        if words is None:
            continue
        image["alt"] = words
        around: Any = image.parent
        while around is not None and not isinstance(around, nodes.figure):
            around = around.parent
        for caption in around.findall(nodes.caption) if around is not None else ():
            caption += nodes.inline("", f" {words}", classes=["finding"])
    data = data_of(app, docname)
    cells = json.loads(path.read_text("utf-8"))["cells"]
    for cell in list(doctree.findall(nodes.container)):
        if cell.get("nb_element") != "cell_code":
            continue
        outputs = [c for c in cell.children if c.get("nb_element") == "cell_code_output"]
        index = int(cell["cell_index"])
        if not outputs or not _shows(outputs[0]):
            continue
        anchor = f"{path.stem}-cell-{index}"  # the PDF is one page
        cell["ids"].append(anchor)
        made = nodes.paragraph("", "", classes=["made-by"])
        hidden = {"remove-input", "remove-cell"} & set(cells[index]["metadata"].get("tags", []))
        if not hidden:
            made += nodes.reference("", "code", refuri=f"#{anchor}", internal=True)
            made += nodes.Text(" · ")
        made += addnodes.download_reference(
            "", "notebook", reftarget=f"/{docname}.ipynb", refdoc=docname
        )
        for label, target in data:
            made += nodes.Text(" · data: ")
            made += addnodes.download_reference("", label, reftarget=target, refdoc=docname)
        outputs[0] += made


def _shows(output: nodes.Element) -> bool:
    """Whether an output holds a figure or a table, in contrast to a sentence."""
    if any(next(output.findall(kind), None) is not None for kind in (nodes.image, nodes.table)):
        return True
    return any("<table" in raw.astext() for raw in output.findall(nodes.raw))  # a frame as it is


SHOWN_TABLE = re.compile(
    r'<table[^>]* id="(?P<name>[^"]+)">\s*<caption>(?P<caption>.*?)</caption>(?P<rows>.*)</table>',
    re.DOTALL,
)
"""A table as `tomlib.plots.table` shows it."""


class NumberTables(SphinxTransform):
    """Tables that notebooks show become tables of the book: numbered, and referred to by name."""

    default_priority = 840  # before names are gathered for references

    def apply(self, **_: Any) -> None:
        """Called by Sphinx."""
        for html in list(self.document.findall(nodes.raw)):
            found = SHOWN_TABLE.search(html.astext()) if html.get("format") == "html" else None
            if found is None:
                continue
            title = nodes.title("", unescape(found["caption"]))
            rows = nodes.raw("", found["rows"], format="html")
            table = nodes.table("", title, rows, classes=["dataframe"], names=[found["name"]])
            self.document.note_explicit_target(table)
            html.replace_self(table)


class Pdf(SphinxRole):
    """`{pdf}` links to the PDF where it is built with the book, else to how it is made."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Called by docutils."""
        if os.environ.get("TOM_PDF"):
            up = "../" * self.env.docname.count("/")
            return [nodes.reference("", self.text, refuri=f"{up}{PDF}", internal=True)], []
        text = nodes.inline("", f"{self.text} (to be made)")
        link = addnodes.pending_xref(
            "", text, refdomain="std", reftype="ref", reftarget="make-pdf", refexplicit=True,
            refwarn=True, refdoc=self.env.docname,
        )  # fmt: skip
        return [link], []


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx; downloads are gathered at the usual priority, hence after `link_outputs`."""
    app.connect("builder-inited", ledgers)
    app.connect("doctree-read", link_outputs, priority=100)
    app.add_transform(NumberTables)
    app.add_role("pdf", Pdf())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
