"""The `tom` command as a tired user meets it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tomlib.cli import main
from tomlib.errors import TomError
from tomlib.profiles import SHIPPED, load_profile, new_run, open_run
from tomlib.reproduce import ship
from tomlib.scenarios import root


def test_show_prints_the_exact_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "IR/stag_hunt", "--answer", "choice"]) == 0
    said = capsys.readouterr().out
    assert "delegate of a sovereign nation" in said
    assert '{"choice": "' in said


def test_plan_of_the_paper_profile_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--profile", "paper"]) == 0
    said = capsys.readouterr().out
    costs = {line.split()[0]: line.split() for line in said.splitlines()[-6:] if line.strip()}
    assert costs["teacher"][1] == "llama2-70b-chat"
    assert float(costs["teacher"][-1]) > 140
    assert float(costs["tuned"][-1]) < 5
    in_sample = next(
        line
        for line in said.splitlines()
        if "teacher in_sample choice+motivation" in " ".join(line.split())
    )
    assert "6000" in in_sample


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["run", "04", "--profile", "quik"], "did you mean 'quick'"),
        (["run", "19"], "chapter '19' is unknown"),
        (["run", "04", "-p", "n", "0"], "n = 0 must be at least 1"),
        (["run", "04", "-p", "n", "many"], "must be int, not str"),
        (["run", "04", "-p", "temperatur", "1"], "did you mean 'temperature'"),
        (["run", "04", "-p", "temperature", "-1"], "at least 0"),
        (["show", "IR/staghunt"], "did you mean 'IR/stag_hunt'"),
        (["show", "IR/stag_hunt", "--split", "scaled"], "did you mean 'scaled_games'"),
        (["scenarios", "--split", "new"], "new_contexts"),
        (["models", "fetch", "smollm-135m"], "did you mean 'smollm2-135m'"),
        (["plan", "--profile", "smoke", "-p", "student", "gpt"], "gpt"),
        (["new-context", "IR"], "the name is taken"),
        (["new-context", "2nd"], "name must start with a letter"),
        (["new-context", "orchestra", "--split", "held_out"], "split 'held_out' is unknown"),
        (["new-context", "orchestra", "--check"], "context 'orchestra' is unknown"),
        (["new-game", "late", "--kind", "deadlok"], "did you mean 'deadlock'"),
        (["new-game", "late", "--kind", "deadlock", "--payoffs", "1", "2", "3", "4"], "T>P>R>S"),
        (["verify", "no/such/run"], "no manifest"),
        (["ship", "no/such/run", "x"], "no manifest"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(
    command: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("tom: ")
    assert said.count("\n") == 1
    assert says in said


@pytest.mark.parametrize(
    "command",
    [
        *("models", "scenarios", "show", "new-context", "new-game"),
        *("plan", "run", "reproduce", "book", "ship", "verify"),
    ],
)
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: tom {command}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["00-games", "08-published-results", "index", "status"])
def test_a_mistyped_parameter_of_plain_papermill_is_an_error(name: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "papermill", f"notebooks/{name}.ipynb"),
        *(str(tmp_path / "out.ipynb"), "-p", "profle", SHIPPED),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown parameter 'profle'; did you mean 'profile'?" in done.stderr


def shown(notebook: Path) -> str:
    """All texts that a notebook's cells put out."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return "\n".join(
        "".join(text)
        for cell in cells
        for output in cell.get("outputs", [])
        for kind, text in output.get("data", {}).items()
        if kind.startswith("text/")
    )


@pytest.mark.slow
def test_a_profile_of_the_user_s_reaches_the_chapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOM_RUNS", str(tmp_path / "runs"))
    text = Path("profiles/smoke.toml").read_text("utf-8").replace('"smoke"', '"mine"', 1)
    text = text.replace('"prisoners_dilemma", "stag_hunt"', '"snowdrift"')
    (tmp_path / "elsewhere.toml").write_text(text, encoding="utf-8")
    assert main(["run", "00", "--profile", str(tmp_path / "elsewhere.toml")]) == 0
    said = shown(tmp_path / "runs" / "mine" / "notebooks" / "00-games.ipynb")
    assert "Snowdrift" in said and "Stag hunt" not in said


@pytest.mark.slow
def test_fresh_leaves_aside_what_comes_with_the_book(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, replayed in (([], True), (["--fresh"], False)):
        monkeypatch.setenv("TOM_RUNS", str(tmp_path / str(replayed)))
        assert main(["run", "status", "--profile", SHIPPED, *flags]) == 0
        said = shown(tmp_path / str(replayed) / SHIPPED / "notebooks" / "status.ipynb")
        assert (f"No run of the profile `{SHIPPED}` is recorded yet" in said) != replayed
        run = open_run("status", {"profile": SHIPPED, "replay": replayed})
        assert bool(len(run.ledger.draws())) == replayed


def test_importing_the_package_needs_no_torch() -> None:
    code = (
        "import sys, tomlib.cli, tomlib.reproduce, tomlib.finetune, tomlib.engines, tomlib.plots; "
        "assert not {'torch', 'transformers', 'langchain_openai', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_not_shipped_onto_itself(tmp_path: Path) -> None:
    run = tmp_path / SHIPPED
    shutil.copytree(root() / "data" / "runs" / SHIPPED, run)
    held = sorted(p.name for p in run.rglob("*"))
    for to in (run, run / "inside", tmp_path):
        with pytest.raises(TomError, match="itself, or one holds the other"):
            ship(run, to)
    assert sorted(p.name for p in run.rglob("*")) == held
    again = ship(run, tmp_path / "again")  # a packed run is shipped whole
    assert sorted(p.name for p in again.rglob("*.gz")) == [n for n in held if n.endswith(".gz")]


def test_models_are_verified_by_what_their_cards_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "verify", "llamacpp-server"]) == 0
    assert "a server" in capsys.readouterr().out


def test_an_empty_chapter_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "", "--profile", "smoke"]) == 2
    assert "chapter '' is none" in capsys.readouterr().err


def test_a_relative_folder_of_runs_is_one_folder_for_commands_and_chapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOM_RUNS", "mine")
    assert main(["run", "00", "--profile", "smoke"]) == 0
    assert os.environ["TOM_RUNS"] == str(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine" / "smoke" / "notebooks").glob("*.ipynb")]
    monkeypatch.setenv("TOM_RUNS", "")  # as if it were not set
    assert new_run(load_profile("smoke")).folder == root() / "runs" / "smoke"
