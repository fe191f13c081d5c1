"""What a run took, as its manifest says it."""

import json
from pathlib import Path

import pytest

from tomlib import status
from tomlib.profiles import CHAPTERS, SHIPPED, Run, load_profile
from tomlib.reproduce import work

MACHINE = {"cores": 2, "processor": "Some CPU", "system": "Linux"}


def a_run(folder: Path, chapter: str, **seconds: int) -> Run:
    run = Run(load_profile("smoke"), folder, None, chapter)
    stages = {
        name.replace("_", " "): {
            "start": "2026-01-01T00:00:00Z",
            "end": f"2026-01-01T00:{took // 60:02}:{took % 60:02}Z",
        }
        for name, took in seconds.items()
    }
    named = {
        "train tuned": stages.pop("train", None),
        "teacher public_goods choice+motivation 4": stages.pop("teacher", None),
        f"chapter {chapter}": stages.pop("own", None),
        "student scaled_games choice 4": stages.pop("other", None),
    }
    kept = {name: stage for name, stage in named.items() if stage}
    folder.mkdir(exist_ok=True)
    text = json.dumps({"stages": kept, "machine": MACHINE, "profile": {}})
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return run


def test_a_chapter_costs_what_it_and_all_that_it_builds_on_took(tmp_path: Path) -> None:
    run = a_run(tmp_path, "07-public-goods", train=600, teacher=30, own=7, other=1000)
    said = status.cost_in_words(run)
    assert "7 s replayed" in said and "2 cores, Some CPU" in said
    assert "10 min for all draws" in said  # 630 s: the scaled games are no part of this chapter
    assert "`train tuned` 10 min, `teacher public_goods choice+motivation 4` 30 s" in said


def test_a_run_that_was_not_made_is_said_to_be_so(tmp_path: Path) -> None:
    run = Run(load_profile("smoke"), tmp_path / "none", None, "04-in-sample")
    assert "No run of the profile `smoke` is recorded" in status.cost_in_words(run)
    assert status.chapters(run).empty and status.steps(run).empty


@pytest.mark.parametrize("chapter", [*CHAPTERS, "index"])
def test_what_a_chapter_needs_are_steps_of_the_run(chapter: str, tmp_path: Path) -> None:
    run = Run(load_profile(SHIPPED), tmp_path, None, chapter)
    needs = status.needs(run, chapter)
    steps = {w.name for w in work(run)} | {"train tuned", "train published-tuned"}
    assert set(needs) <= steps and len(needs) == len(set(needs))
    assert bool(needs) == (chapter[:2] != "08")
    rows = f"teacher in_sample choice+motivation {run.profile.n_teacher}"
    assert (rows in needs) == (chapter[:2] not in ("01", "08"))
