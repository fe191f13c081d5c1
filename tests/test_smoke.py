"""The whole experiment on the smallest real model: draws, trainings, chapters, shipping, checking."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tomlib.models import Card
from tomlib.profiles import CHAPTERS, PAGES, Run, load_profile
from tomlib.readout import readout
from tomlib.reproduce import read_manifest, ship, verify_run

TOM = [sys.executable, "-m", "tomlib.cli"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, smol: Card) -> Path:
    """A finished smoke run, made by the command line, killed once on the way."""
    base = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"TOM_RUNS": str(base)}
    command = [*TOM, "reproduce", "--profile", "smoke", "--no-book"]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if "student in_sample" in line:
            killed.kill()
            break
    killed.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return base / "smoke"


@pytest.mark.slow
@pytest.mark.weights
def test_the_run_is_complete_and_every_chapter_ran(smoke: Path) -> None:
    assert verify_run(smoke).empty
    manifest = read_manifest(smoke)
    assert manifest["label"] == "smoke"
    for chapter in (*CHAPTERS, *PAGES):
        notebook = json.loads((smoke / "notebooks" / f"{chapter}.ipynb").read_text("utf-8"))
        outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
        assert outputs
        assert not any(o["output_type"] == "error" for o in outputs)
        assert f"chapter {chapter}" in manifest["stages"]


@pytest.mark.slow
@pytest.mark.weights
def test_a_shipped_run_verifies_and_a_changed_count_does_not(smoke: Path, tmp_path: Path) -> None:
    shipped = ship(smoke, tmp_path / "smoke")
    assert verify_run(shipped).empty
    texts = {p: gzip.decompress(p.read_bytes()).decode() for p in (shipped / "draws").glob("*.gz")}
    shard = next(p for p, text in texts.items() if '"choice": "C"' in text)
    altered = texts[shard].replace('"choice": "C"', '"choice": "D"', 1)
    shard.write_bytes(gzip.compress(altered.encode()))
    (shipped / "SHA256SUMS").unlink()
    assert verify_run(shipped)["problem"].str.contains("its text does not say choice 'D'").any()


@pytest.mark.slow
@pytest.mark.weights
def test_a_missing_shard_is_told(smoke: Path, tmp_path: Path) -> None:
    shipped = ship(smoke, tmp_path / "smoke")
    next((shipped / "draws").glob("*--choice--*")).unlink()
    assert verify_run(shipped)["problem"].str.contains("draws missing").any()


@pytest.mark.slow
@pytest.mark.weights
def test_what_a_chapter_tried_is_shipped_as_its_record_and_trained_again_when_asked(
    smoke: Path, tmp_path: Path
) -> None:
    own, attempt = tmp_path / "own", {"published_epochs": 1, "max_steps": 1}
    shutil.copytree(smoke, own)
    run = Run(load_profile("smoke"), own, None)
    asked = run.scenarios("in_sample")[:1]
    told = readout(run.changed(**attempt), "published-tuned", asked, "choice", progress=False)
    shipped = ship(own, tmp_path / "smoke")
    weights = {path.parent.name for path in shipped.rglob("adapter_model.safetensors")}
    records = {path.parent.name for path in shipped.rglob("training.json")}
    assert len(weights) == len(run.arms) and len(records - weights) == 1
    assert verify_run(shipped).empty

    later = Run(load_profile("smoke"), tmp_path / "later", shipped).changed(**attempt)
    again = readout(later, "published-tuned", asked, "choice", progress=False)
    pd.testing.assert_frame_equal(told, again)
    assert not list((tmp_path / "later").rglob("*.safetensors"))  # replayed: no model was asked
    readout(later, "published-tuned", run.scenarios("in_sample")[1:2], "choice", progress=False)
    (trained,) = (tmp_path / "later").rglob("adapter_model.safetensors")
    assert trained.parent.name in records - weights
