"""LoRA training on two processes: the same training as on one."""

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
    "published_epochs": "3",
    "max_steps": "3",
    "threads": "1",
}
PROFILES = root() / "profiles" / "accelerate"
# The documented commands; ACCELERATE_USE_CPU has the processes use processors where they say GPUs.
LAUNCH = [*("-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file")]
DDP = [*LAUNCH, str(PROFILES / "ddp.yaml")]
FSDP = [*LAUNCH, str(PROFILES / "fsdp.yaml")]
# Accelerate shards a model over GPUs only: that check is lifted, and all behind it is its own. The
# training is killed once, on both processes, when it has saved its second step.
SHARDED = """
import os, sys
import torch
from accelerate import Accelerator, state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from tomlib import cli, finetune

settle, prepare = state.AcceleratorState.__init__, Accelerator.prepare

def init(self, *args, fsdp_plugin=None, **more):
    settle(self, *args, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        assert self.distributed_type == DistributedType.MULTI_CPU
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

def prepared(self, bare, optimizer):
    model, optimizer = prepare(self, bare, optimizer)
    assert all(isinstance(x, FSDPModule) for x in model.base_model.model.model.layers)
    assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.requires_grad)
    return model, optimizer

state.AcceleratorState.__init__, Accelerator.prepare = init, prepared
finetune.CHECKPOINT_SECONDS = 0.0
save = finetune._checkpoint

def checkpoint(part, model, optimizer, names, step, log, write=True):
    save(part, model, optimizer, names, step, log, write)
    if step == 2 and not os.environ.get("AGAIN"):
        torch.distributed.barrier()
        os._exit(9)

finetune._checkpoint = checkpoint
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, smol: Card) -> pd.DataFrame:
    """The training log of one process. The published arm's rows need no draws."""
    folder = tmp_path_factory.mktemp("alone")
    return trained(folder, [], None, processes=1)


def trained(folder: Path, launched: list[str], code: str | None, processes: int) -> pd.DataFrame:
    done = training(folder, launched, code)
    assert done.returncode == 0, done.stderr[-3000:]
    (adapter,) = (folder / "smoke" / "adapters").glob("published-*")
    assert json.loads((adapter / "training.json").read_text())["processes"] == processes
    return pd.read_csv(adapter / "log.csv")


def training(
    folder: Path, launched: list[str], code: str | None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Train under `launched`: the command itself, or the code of a script in its place."""
    what = ["-m", "tomlib.cli"]
    if code is not None:
        script = folder / "training.py"
        script.write_text(code, encoding="utf-8")
        what = [str(script)]
    environment = os.environ | {"TOM_RUNS": str(folder), "OMP_NUM_THREADS": "1"} | more
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root())}
    changes = [word for pair in CHANGES.items() for word in ("-p", *pair)]
    command = [sys.executable, *launched, *what, "reproduce", "--profile", "smoke"]
    return subprocess.run(
        [*command, *changes, "--only", "adapter/published"],
        env=environment, cwd=root(), capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.weights
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path, alone: pd.DataFrame) -> None:
    """The DDP configuration: batches of four scenarios, two of them on each process."""
    two = trained(tmp_path, DDP, None, processes=2)
    assert len(alone) == 3 and alone["loss"].nunique() == 3
    np.testing.assert_allclose(two["loss"], alone["loss"], rtol=1e-4)


@pytest.mark.long
@pytest.mark.weights
def test_a_model_in_parts_trains_alike_and_goes_on_from_its_checkpoint(
    tmp_path: Path, alone: pd.DataFrame
) -> None:
    killed = training(tmp_path, FSDP, SHARDED)
    assert killed.returncode != 0
    (saved,) = tmp_path.rglob("checkpoint.safetensors")
    whole = saved.stat().st_size
    done = training(tmp_path, FSDP, SHARDED, AGAIN="1")
    assert done.returncode == 0, done.stderr[-3000:]
    (adapter,) = (tmp_path / "smoke" / "adapters").glob("published-*")
    np.testing.assert_allclose(pd.read_csv(adapter / "log.csv")["loss"], alone["loss"], rtol=1e-4)
    # Weights in fp16, beside their values and two moments of them in fp32: all of them whole.
    assert (adapter / "adapter_model.safetensors").stat().st_size > whole / 7


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_accelerate_reads_the_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(PROFILES / f"{name}.yaml"))
    assert read.distributed_type == {"ddp": "MULTI_GPU", "fsdp": "FSDP"}[name]
    assert bool(read.fsdp_config) == (name == "fsdp")
