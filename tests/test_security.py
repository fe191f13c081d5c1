"""Texts of models, servers and files are untrusted; keys stay where they are."""

import ast
import gzip
import http.client
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

import pandas as pd
import pytest
from test_faults import TOM, Faulty, endpoint, server  # noqa: F401

from tomlib import engines, errors, models, plots, sharing, weights
from tomlib.engines import Engine
from tomlib.errors import TomError
from tomlib.models import Card
from tomlib.profiles import SHIPPED, Run, load_profile, new_run
from tomlib.reproduce import _JUPYTER_BOOK
from tomlib.scenarios import root

# --- what the code never does ---------------------------------------------------------------------

CODE = [*sorted((root() / "tomlib").glob("*.py")), *sorted((root() / "book").rglob("*.py"))]
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NEVER_CALLED = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "torch.load",
        "pd.read_pickle",
    ),
    *(
        "pandas.read_pickle",
        "numpy.load",
        "np.load",
        "yaml.load",
        "zipfile.extractall",
        "extractall",
    ),
    *("archive.extractall", "archive.extract", "tempfile.mktemp"),
}


def sources() -> list[tuple[str, ast.AST]]:
    """The package, the book's extensions, and the code of the chapters."""
    found = [(path.name, ast.parse(path.read_text("utf-8"))) for path in CODE]
    for path in sorted((root() / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        found.append((path.name, ast.parse(code)))
    return found


@pytest.mark.parametrize(("name", "tree"), sources())
def test_nothing_is_unpickled_or_run_from_text(name: str, tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & NEVER_IMPORTED, name
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] not in NEVER_IMPORTED, name
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in NEVER_CALLED, f"{name}: {called}"
            keywords = {k.arg: k.value for k in node.keywords}
            shell = keywords.get("shell", ast.Constant(False))
            assert isinstance(shell, ast.Constant) and not shell.value, name
            if called.endswith(".from_pretrained") and "Peft" not in called:
                trusted = keywords.get("trust_remote_code")
                assert isinstance(trusted, ast.Constant) and trusted.value is False, (name, called)


def test_code_that_comes_with_a_model_is_not_run(
    smol: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights.transformers_folder(smol)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in whole.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((whole / "config.json").read_text("utf-8"))
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "evil", "auto_map": names})
    )
    cards = tmp_path / "models.toml"
    cards.write_text(
        '[[model]]\nname = "evil"\nkind = "folder"\nfamily = "f"\npurpose = "p"\n'
        f'folder = "{folder}"\nengine = "transformers"\n'
    )
    with pytest.raises(TomError, match="cannot be loaded"):
        sharing.load_transformers(models.card("evil", cards))
    assert not marker.exists()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(TomError, match="no Transformers folder"):
        sharing.load_transformers(models.card("evil", cards))


# --- servers and keys -----------------------------------------------------------------------------


def test_our_server_is_on_loopback_and_wants_its_random_key(server: Engine) -> None:  # noqa: F811
    chat: Any = server.chat
    where = urlsplit(str(chat.openai_api_base))
    assert where.hostname == "127.0.0.1"
    key = chat.openai_api_key.get_secret_value()
    assert key == server.secret and len(key) >= 20
    assert key not in repr(server) and key not in repr(chat)
    for given in ("", "Bearer none"):
        link = http.client.HTTPConnection("127.0.0.1", where.port, timeout=20)
        headers = {"Content-Type": "application/json", "Authorization": given}
        link.request("POST", "/v1/chat/completions", b'{"messages": []}', headers)
        assert link.getresponse().status == 401


def test_a_key_that_a_server_says_back_is_taken_out() -> None:
    said = SimpleNamespace(
        generation_info={}, message=SimpleNamespace(response_metadata={}), text='C", sk-secret-1!'
    )
    found = engines._completion(said, 1, "", 1, 8, "sk-secret-1")
    assert found.text == 'C", ***!'
    assert errors.short(ValueError("key sk-secret-1 is\nwrong"), "sk-secret-1") == (
        "ValueError: key *** is wrong"
    )


def test_a_card_never_holds_a_key(tmp_path: Path) -> None:
    text = (
        '[[model]]\nname = "x"\nkind = "endpoint"\nfamily = "f"\npurpose = "p"\nmodel_id = "m"\n'
        'prefill = "none"\nbase_url = "{url}"\napi_key_env = "{env}"\n'
    )
    for url, env in (
        ("http://user:key@host/v1", "KEY"),
        ("http://host/v1?key=secret", "KEY"),
        ("http://host/v1", "sk-0123-secret"),
    ):
        (tmp_path / "models.toml").write_text(text.format(url=url, env=env))
        with pytest.raises(TomError) as stopped:
            models.cards(tmp_path)
        assert "key" in str(stopped.value)


@pytest.mark.long
@pytest.mark.weights
def test_keys_reach_nothing_that_a_run_writes(
    endpoint: tuple[Faulty, Engine, Run],  # noqa: F811
    tmp_path: Path,
) -> None:
    """A live chapter through a server that says the key back in its errors: all files are searched."""
    faulty, _, _ = endpoint
    faulty.plan = ["500", "garbage"]
    others = {
        "HF_TOKEN": "hf_canary_in_the_environment",
        "OPENAI_API_KEY": "sk-canary-in-the-environment",
        "PIP_EXTRA_INDEX_URL": "https://canary-user:canary-word@localhost/simple",
    }
    words = [*("-p", "teacher", "loopback"), *("-p", "teacher_engine", "endpoint")]
    words += [*("-p", "contexts", "IR"), *("-p", "games", "stag_hunt")]
    command = [*TOM, "run", "02", "--fresh", "--profile", "smoke", *words]
    patient = {"TOM_TIMEOUT": "120", "TOM_ATTEMPTS": "4"}
    said = ""
    for plan, code in ((["500", "garbage"], 0), (["401"] * 50, 2)):
        faulty.plan = plan
        if code:
            command += ["-p", "temperature", "0.9"]  # nothing of it is in the ledger
        done = subprocess.run(
            command, env=os.environ | others | patient, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == code, done.stderr[-1000:]
        said += done.stdout + done.stderr
    assert "***" in said  # the server did say it, and it was taken out
    faulty.plan = ["500"]
    command = [*TOM, "reproduce", "--only", "draws/teacher", "--profile", "smoke", *words]
    done = subprocess.run(
        command, env=os.environ | others | patient, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-1000:]
    said += done.stdout + done.stderr
    # All of it, as `make reproduce` does it: training, chapters, book, and Snakemake's own log.
    settings = [f"{name}={value}" for name, value in zip(words[1::3], words[2::3], strict=True)]
    settings += ["n_teacher=16"]  # of which some can be read, and trained on
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "profile=smoke"]
    begin = time.time()
    done = subprocess.run(
        [*command, *settings], cwd=root(), env=os.environ | others | patient,
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    said += done.stdout + done.stderr
    logs = [p for p in (root() / ".snakemake" / "log").iterdir() if p.stat().st_mtime > begin - 1]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in written}
    assert kinds >= {".ipynb", ".jsonl", ".json", ".safetensors", ".csv", ".html"} and logs
    keys = [os.environ["TOM_TEST_KEY"], *others.values(), "canary-word"]
    assert not holding(keys, [*written, *logs])
    assert not [key for key in keys if key in said]


def holding(keys: list[str], written: list[Path]) -> list[Path]:
    """The files that hold one of the keys, plain or as a URL has it."""
    wanted = [form.encode() for key in keys for form in (key, quote(key, safe=""))]
    return [path for path in written if any(key in path.read_bytes() for key in wanted)]


def test_a_key_in_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff log: sk-canary%2Fword")
    (tmp_path / "b").write_text("nothing")
    assert holding(["sk-canary/word"], sorted(tmp_path.iterdir())) == [tmp_path / "a"]


# --- texts of models ------------------------------------------------------------------------------

ACTING = set("\x1b\x07\u202e\u2066")
"""What would act on a terminal or turn the direction of reading."""

EVIL = [
    "<script>window.EVIL = 1</script>",
    "</td></tr></table><script>EVIL()</script>",
    "<img src=x onerror=EVIL()>",
    "[EVIL](javascript:EVIL())",
    "$\\href{javascript:EVIL()}{EVIL}$ \\(\\unicode{EVIL}\\)",
    "```{raw} html\n<script>EVIL()</script>\n```",
    "\x1b[31mEVIL\x1b]8;;http://evil.example\x07EVIL",
    "\u202eEVIL\u2066EVIL",
    "<!-- EVIL",
    "{{ EVIL }} {eval}`EVIL`",
    "&lt;script&gt;EVIL()&lt;/script&gt;",
    "EVIL" * 250_000,
]


class Page(HTMLParser):
    """The elements of a page, each with its attributes and, for scripts, their text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.live: list[str] = []
        self.text = ""
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._script = tag == "script"
        for name, value in attributes:
            seen = (value or "").casefold()
            risky = name.startswith("on") or "javascript:" in seen or "evil.example" in seen
            if risky and ("evil" in seen or "javascript:" in seen):
                self.live.append(f"<{tag} {name}={seen[:60]}>")
            if tag == "img" and seen == "x":
                self.live.append("<img src=x>")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script and "EVIL" in data:
            self.live.append(f"<script>{data[:60]}")
        self.text += data


def test_the_page_reader_sees_what_is_live() -> None:
    for text in EVIL[:3]:
        assert Page(f"<p>{text}</p>").live
    assert not Page("<p>&lt;script&gt;EVIL()&lt;/script&gt;</p>").live


def test_tables_escape_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notebook shows of a frame."""
    import IPython.display

    seen: list[dict[str, str]] = []
    monkeypatch.setattr(IPython.display, "publish_display_data", seen.append)
    plots.table(
        pd.DataFrame({"text": EVIL}, index=pd.Index(EVIL, name="said")),
        "<script>EVIL()</script>",
        "tab-evil",
    )
    page = Page(seen[0]["text/html"])
    assert page.live == [] and page.text.count("EVIL") > 2 * len(EVIL)
    for text in seen[0].values():
        assert not set(text) & ACTING and len(text) < 100_000


def test_the_explorer_shows_such_texts_as_codes_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root() / "book" / "_ext"))
    explorer = importlib.import_module("explorer")
    run = new_run(load_profile(SHIPPED))
    scenario = run.scenarios("in_sample")[0]
    draws = pd.DataFrame({"choice": "C", "motivation": EVIL})
    monkeypatch.setattr(explorer, "_held", lambda *_, **__: {scenario: draws})
    monkeypatch.setattr(explorer, "MOTIVATIONS", len(EVIL))
    shown = [text for _, text in explorer._motivations(run, [scenario])[scenario]["shown"]]
    assert len(shown) == len(EVIL) and not set("".join(shown)) & ACTING
    assert max(map(len, shown)) < 1100 and "(1,000,000 characters)" in shown[-1]


@pytest.mark.slow
def test_a_ledger_of_such_texts_is_read_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chapter 02 replayed with such motivations, and its page built: all of it is inert."""
    runs = tmp_path / "runs"
    shutil.copytree(root() / "data" / "runs" / SHIPPED, runs / SHIPPED)
    evil = iter(EVIL * 3)
    for packed in sorted((runs / SHIPPED / "draws").glob("*choice+motivation--in_sample--*")):
        rows = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
        for row in rows:
            if row["index"] == 0 and row["max_new_tokens"] > 20 and row["outcome"] == "ok":
                text = next(evil, "no more")
                said = {"choice": row["choice"], "motivation": text}
                row["text"] = json.dumps(said, ensure_ascii=False)
        plain = packed.with_suffix("")
        packed.unlink()
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert next(evil, None) != EVIL[0], "no motivation was replaced"
    environment = os.environ | {"TOM_RUNS": str(runs), "TOM_CACHE": str(tmp_path / "none")}
    done = subprocess.run(
        [*TOM, "run", "02", "--fresh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    chapter = runs / SHIPPED / "notebooks" / "02-teacher-querying.ipynb"
    outputs = [
        output.get("data", {})
        for cell in json.loads(chapter.read_text("utf-8"))["cells"]
        for output in cell.get("outputs", [])
    ]
    shown = [Page("".join(data["text/html"])) for data in outputs if "text/html" in data]
    assert any("EVIL" in page.text for page in shown)
    assert [page.live for page in shown if page.live] == []
    for data in outputs:
        for kind in ("text/html", "text/plain"):
            acting = set("".join(data.get(kind, ""))) & ACTING
            assert not acting, f"{kind}: {sorted(map(ascii, acting))}"
    assert chapter.stat().st_size < 3_000_000  # a megabyte of text is cut, not shown

    book = tmp_path / "book"
    (book / "notebooks").mkdir(parents=True)
    shutil.copy2(chapter, book / "notebooks")
    shutil.copy2(root() / "_config.yml", book)
    shutil.copytree(root() / "book", book / "book")
    for path in (book / "book").glob("*.md"):
        path.unlink()
    (book / "_toc.yml").write_text("format: jb-book\nroot: notebooks/02-teacher-querying\n")
    command = [sys.executable, "-c", _JUPYTER_BOOK, "build", str(book), "-q"]
    built = subprocess.run(command, capture_output=True, text=True)
    path = book / "_build" / "html" / "notebooks" / "02-teacher-querying.html"
    assert path.is_file(), (built.stdout + built.stderr)[-1500:]
    page = Page(path.read_text("utf-8"))
    assert "EVIL" in page.text and page.live == []
    assert not set(path.read_text("utf-8")) & ACTING
