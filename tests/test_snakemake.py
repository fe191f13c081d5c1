"""The run as a graph: what there is to do, in which order, and what a change does again."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tomlib.errors import TomError
from tomlib.profiles import load_profile, new_run
from tomlib.reproduce import Step, do_step, steps, work
from tomlib.scenarios import root


def _graph(shards: str = "model", **changes: Any) -> dict[str, Step]:
    run = new_run(load_profile("smoke", **changes), replay=False)
    return {step.name: step for step in steps(run, shards)}


def _again(**changes: Any) -> set[str]:
    """Steps that a change of the smoke profile makes anew, without the pages that tell of them all."""
    before, now = _graph(), _graph(**changes)
    assert before.keys() == now.keys()
    changed = {name for name in now if now[name].mark != before[name].mark}
    pages = {"chapter/status", "book"}
    assert pages <= changed or not changed
    return {name.replace("chapter/", "") for name in changed - pages}


RESULTS = {"04-in-sample", "05-new-contexts", "06-scaled-games", "07-public-goods", "index"}
TUNED = {"draws/tuned", "draws/published-tuned"}
ARMS = {"adapter/family", "adapter/published"}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"threads": 1, "parallel": 3}, set()),
        (
            {"bootstrap": 777},
            {"08-published-results"} | RESULTS - {"07-public-goods"},
        ),
        ({"margin": 0.2}, {"06-scaled-games", "08-published-results"}),
        ({"n_reasoning": 3}, {"draws/teacher", "02-teacher-querying", "index"}),
        ({"lora_r": 4}, ARMS | TUNED | RESULTS | {"03-lora-training"}),
        (
            {"published_epochs": 7},
            {"adapter/published", "draws/published-tuned", "03-lora-training"} | RESULTS,
        ),
        (
            {"n": 5},
            {"draws/teacher", "draws/student", "01-exploratory-comparison", "02-teacher-querying"}
            | TUNED
            | RESULTS,
        ),
        (
            {"n_teacher": 3},
            {"draws/teacher", "adapter/family", "draws/tuned", "02-teacher-querying"}
            | {"03-lora-training"}
            | RESULTS,
        ),
    ],
)
def test_a_parameter_does_again_what_depends_on_it_and_nothing_else(
    changes: dict[str, Any], again: set[str]
) -> None:
    assert _again(**changes) == again


@pytest.mark.parametrize("shards", ["model", "context"])
def test_every_step_comes_after_what_it_needs(shards: str) -> None:
    seen: set[str] = set()
    for name, step in _graph(shards).items():
        assert set(step.after) <= seen, name
        seen.add(name)


def test_shards_by_context_are_all_of_the_work_once() -> None:
    run = new_run(load_profile("smoke"), replay=False)
    wanted = {(w.role, s.context.name) for w in work(run) for s in run.scenarios(w.split)}
    names = [name for name in _graph("context") if name.startswith("draws/")]
    assert sorted(names) == sorted(f"draws/{role}/{context}" for role, context in wanted)


def test_one_context_s_share_depends_on_that_context_alone() -> None:
    before, now = _graph("context"), _graph("context", contexts="IR,sports,party")
    assert before["draws/student/IR"].mark == now["draws/student/IR"].mark
    assert before["draws/tuned/IR"].mark != now["draws/tuned/IR"].mark  # trained on less


def test_an_unknown_step_is_a_line() -> None:
    run = new_run(load_profile("smoke"), replay=False)
    for name in ("draws/nobody", "chapter/99", "adapter", "nonsense"):
        with pytest.raises(TomError, match="has no such step"):
            do_step(run, name, {})
    with pytest.raises(TomError, match="shards"):
        steps(run, "scenario")


@pytest.mark.slow
def test_snakemake_does_what_has_another_mark(tmp_path: Path) -> None:
    """On files that stand for a finished run: what Snakemake would do after a change."""
    for name, step in _graph().items():
        path = tmp_path / "smoke" / "done" / f"{name}.{step.mark}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def again(*changes: str) -> set[str]:
        command = [sys.executable, "-m", "snakemake", "--dry-run", "--config", "profile=smoke"]
        done = subprocess.run(
            [*command, *changes], cwd=root(), env=os.environ | {"TOM_RUNS": str(tmp_path)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return set(re.findall(r"output: \S*/smoke/done/(\S+)\.\S+", done.stdout + done.stderr))

    assert again("threads=1") == set()
    chapters = {
        f"chapter/{name}"
        for name in (*RESULTS, "status", "03-lora-training", "02-teacher-querying")
    }
    steps_ = {"draws/teacher", "adapter/family", "draws/tuned", "book"}
    assert again("n_teacher=3") == chapters | steps_


def test_folders_with_spaces_stay_one_word(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--printshellcmds"]
    done = subprocess.run(
        [*command, "--config", "profile=smoke"], cwd=root(),
        env=os.environ | {"TOM_RUNS": str(tmp_path / "my runs")}, capture_output=True, text=True,
    )  # fmt: skip
    jobs = [line.split("rm -f ", 1)[1] for line in done.stdout.splitlines() if "rm -f " in line]
    assert jobs
    for job in jobs:
        removed, then, *_ = shlex.split(job)[:2]
        assert "my runs/smoke/done/" in removed and then == "&&"


def test_a_server_has_no_weights_to_make_ready() -> None:
    """The commands of book/scale-out: a teacher on a server, a student here."""
    graph = _graph(teacher="qwen2.5-72b-vllm")  # whatever engine the profile wants for weights
    assert [name for name in graph if name.startswith("weights/")] == ["weights/smollm2-135m"]
    assert graph["draws/teacher"].after == ()
    assert graph["adapter/family"].after == ("weights/smollm2-135m", "draws/teacher")
    mute = new_run(load_profile("smoke", teacher="qwen2.5-72b-vllm"), replay=False)
    assert any(w.role == "teacher" and not w.n for w in work(mute))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student": "llamacpp-server"}, "name a card with weights"),
        ({"student": "llama2-7b-published"}, "name a card with weights"),
        ({"student_engine": "llamacpp"}, "student_engine = 'transformers'"),
        (
            {"teacher": "llama2-70b-chat", "teacher_engine": "llamacpp"},
            "engine 'llamacpp' cannot run a hub card; it is transformers",
        ),
    ],
)
def test_who_cannot_play_is_refused_before_the_first_draw(
    changes: dict[str, str], says: str
) -> None:
    with pytest.raises(TomError, match=says):
        _graph(**changes)


def test_chapters_of_a_split_that_is_left_out_are_no_steps() -> None:
    graph = _graph(contexts="IR,friendsharing")
    chapters = {name.partition("/")[2][:2] for name in graph if name.startswith("chapter/")}
    assert not chapters & {"05", "07"} and chapters >= {"01", "04", "06"}
    with pytest.raises(TomError, match="has no such step"):
        do_step(new_run(load_profile("smoke"), replay=False), "draws/teacher/typo", {})
