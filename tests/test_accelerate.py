"""LoRA training with `accelerate launch` on two processes: the same training as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tomlib.models import Card
from tomlib.scenarios import root

CHANGES = {
    "contexts": "IR,friendsharing",
    "published_epochs": "2",
    "max_steps": "3",
    "threads": "1",
}


@pytest.mark.slow
@pytest.mark.weights
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path, smol: Card) -> None:
    """The published arm: its rows need no draws. Batches of four scenarios, two on each process."""
    logs = []
    alone = [sys.executable]
    both = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"),
        *("--config_file", "profiles/accelerate/ddp.yaml", "--main_process_port", "0"),
    ]
    for name, launched in (("alone", alone), ("both", both)):
        environment = os.environ | {"TOM_RUNS": str(tmp_path / name), "OMP_NUM_THREADS": "1"}
        command = [*launched, "-m", "tomlib.cli", "reproduce", "--profile", "smoke"]
        command += [x for pair in CHANGES.items() for x in ("-p", *pair)]
        done = subprocess.run(
            [*command, "--only", "adapter/published"],
            env=environment, cwd=root(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = (tmp_path / name / "smoke" / "adapters").glob("published-*")
        assert json.loads((folder / "training.json").read_text())["processes"] == len(logs) + 1
        logs.append(pd.read_csv(folder / "log.csv"))
    one, two = logs
    assert len(one) == 3 and one["loss"].nunique() == 3
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)
