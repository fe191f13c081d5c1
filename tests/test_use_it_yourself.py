"""The page "Use it yourself", done as it is written, in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tomlib.engines import open_engine
from tomlib.models import Card
from tomlib.weights import transformers_folder

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "book" / "use-it-yourself.md").read_text(encoding="utf-8")
COPIED = ("data", "profiles", "notebooks", "tomlib", "pyproject.toml")
TEMPLATE = "\n# A context of one's own"


def blocks(heading: str) -> list[tuple[str, str]]:
    """Language and text of every block under a heading."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading + "\n")]
    return re.findall(r"```(bash|toml|python)\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def desk(tmp_path: Path, smol: Card) -> Iterator[Path]:
    """A copy of the repository, without what others have run in it."""
    for name in COPIED:
        here = ROOT / name
        if here.is_dir():
            shutil.copytree(here, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(here, tmp_path / name)
    yield tmp_path


def do(desk: Path, heading: str, **more: str) -> str:
    """Follow a section: put its entries into their files, run its commands; what they said."""
    said = []
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(desk),
        **more,
    }
    for name in ("TOM_RUNS", "TOM_MODELS"):
        environment.pop(name, None)
    for language, text in blocks(heading):
        if language == "toml":
            contexts, mine = desk / "data/scenarios/contexts.toml", desk / "mine.toml"
            if text.startswith("[[context]]"):  # the template, filled in
                before = contexts.read_text("utf-8")
                assert TEMPLATE in before
                contexts.write_text(before.split(TEMPLATE)[0] + "\n" + text, "utf-8")
            else:
                with mine.open("a", encoding="utf-8") as file:
                    file.write("\n" + text)
            continue
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
        done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stderr[-1500:]}"
        said.append(done.stdout)
    return "\n".join(said)


def chapter(desk: Path, run: str, name: str) -> str:
    return (desk / "runs" / run / "notebooks" / f"{name}.ipynb").read_text("utf-8")


@pytest.mark.long
@pytest.mark.weights
def test_your_own_profile_and_temperature(desk: Path) -> None:
    do(desk, "A profile of your own")
    assert "profiles/mine.toml" in chapter(desk, "mine", "00-games")
    do(desk, "Your own temperature")
    assert '"temperature": 1.0' in next((desk / "runs/smoke/draws").glob("*")).read_text("utf-8")


@pytest.mark.long
@pytest.mark.weights
def test_your_own_context(desk: Path) -> None:
    said = do(desk, "Your own context")
    assert "is as long as the others" in said and "leader of a section" in said
    assert "orchestra" in chapter(desk, "smoke", "05-new-contexts")
    assert list((desk / "runs/smoke/draws").glob("*+*--new_contexts--orchestra.jsonl"))


@pytest.mark.long
@pytest.mark.weights
def test_your_own_game(desk: Path) -> None:
    do(desk, "Your own game")
    assert "deadlock" in chapter(desk, "smoke", "01-exploratory-comparison")
    assert list(
        (desk / "runs/smoke/draws").glob("*--new_games--IR.jsonl")
    )  # hero, never trained on


@pytest.mark.long
@pytest.mark.weights
def test_your_own_models(desk: Path, smol: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a server stand in for the page's, which are on no machine but the reader's."""
    (desk / "profiles" / "mine.toml").write_text(
        (desk / "profiles" / "smoke.toml").read_text("utf-8").replace('"smoke"', '"mine"', 1),
        "utf-8",
    )
    with open_engine(smol, engine="llamacpp", parallel=4, threads=2) as server:
        theirs = {
            "/models/my-student": str(transformers_folder(smol)),
            "http://127.0.0.1:8000/v1": str(server.chat.openai_api_base),
            'prefill = "continue_final_message"': 'prefill = "native"',
        }
        page = PAGE
        for said, here in theirs.items():
            assert said in page
            page = page.replace(said, here)
        monkeypatch.setattr(sys.modules[__name__], "PAGE", page)
        key = server.chat.openai_api_key.get_secret_value()
        listed = do(desk, "Your own models", MY_KEY=key)
    for name in ("my-student", "my-teacher", "hub-student"):
        assert re.search(rf"^{name} ", listed, re.MULTILINE)
    asked = next((desk / "runs/smoke/draws").glob("my-teacher--*")).read_text("utf-8")
    assert '"engine": ' in asked and "my-teacher" in asked


@pytest.mark.long
@pytest.mark.weights
def test_a_server_that_cannot_go_on_with_a_started_answer(desk: Path, smol: Card) -> None:
    """Such a teacher answers in its own words: no exact probabilities of it, all else is there."""
    (desk / "mine.toml").write_text(
        (desk / "profiles" / "smoke.toml")
        .read_text("utf-8")
        .replace('"smoke"', '"mine"', 1)
        .replace('teacher = "smollm2-135m"', 'teacher = "talker"', 1)
        .replace('teacher_engine = "transformers"', 'teacher_engine = "endpoint"', 1)
        .replace("tokens_choice = 8", "tokens_choice = 20", 1)
        .replace("n = 4 ", "n = 12 ", 1)
        .replace("n_teacher = 2 ", "n_teacher = 6 ", 1),
        "utf-8",
    )
    with open_engine(smol, engine="llamacpp", parallel=8, threads=2) as server:
        with (desk / "data" / "models.toml").open("a", encoding="utf-8") as file:
            file.write(
                '\n[[model]]\nname = "talker"\nkind = "endpoint"\nfamily = "smollm2"\n'
                'purpose = "answers as it likes"\nmodel_id = "smollm2"\nprefill = "none"\n'
                f'base_url = "{server.chat.openai_api_base}"\napi_key_env = "MY_KEY"\n'
            )
        environment = os.environ | {
            "PYTHONPATH": str(desk),
            "MY_KEY": server.chat.openai_api_key.get_secret_value(),
        }
        command = [sys.executable, "-m", "tomlib.cli", "reproduce", "--profile", "mine.toml"]
        done = subprocess.run(
            [*command, "--no-book"], cwd=desk, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-2000:]
    asked = "".join(p.read_text("utf-8") for p in (desk / "runs/mine/draws").glob("talker--*"))
    lines = list(map(json.loads, asked.splitlines()))
    assert len(lines) > 100 and {line["outcome"] for line in lines} - {"ok"}
    held = [p.read_text("utf-8") for p in (desk / "runs/mine/readouts").glob("*.jsonl")]
    assert "talker" not in "".join(held) and held
    shown = chapter(desk, "mine", "04-in-sample")
    unread = sum(
        line["choice"] is None
        for line in lines
        if line["split"] == "in_sample" and line["answer"] == "choice+motivation"
        and line["max_new_tokens"] == 20
    )  # fmt: skip
    # The caption counts those of all models that the table compares.
    assert 0 < unread <= max(map(int, re.findall(r"no part of it: (\d+)\.", shown)))
