"""A smoke run on a real Slurm: one node on loopback, two jobs that write draws at the same time.

`make test-slurm` asks for it; then it may not be skipped. Needs root and Debian's slurm-wlm and munge.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_security import holding

from tomlib.models import Card
from tomlib.profiles import CHAPTERS, PAGES, load_profile, new_run
from tomlib.reproduce import read_manifest, verify_run
from tomlib.scenarios import root

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.weights,
    pytest.mark.skipif("TOM_TEST_SLURM" not in os.environ, reason="make test-slurm asks for it"),
]

# No daemon outlives a test that is killed.
ENDED_WITH_US = ["setpriv", "--pdeathsig", "TERM"]
OURS = "# Written by tests/test_slurm.py, which removes it again"
# No cgroups, no accounting: it has to run in a container. Scheduling once a second, not a minute.
CONFIGURATION = """
ClusterName=tom
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={next_port}
AuthType=auth/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,defer=0
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _munge() -> subprocess.Popen[bytes] | None:
    """munged as its own user, unless one runs; the daemon, to be ended by us."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return None
    for name in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
        Path(name).mkdir(exist_ok=True)
        shutil.chown(name, "munge", "munge")
    Path("/run/munge").chmod(0o755)
    command = ["/usr/sbin/munged", "--foreground", "--num-threads=2"]
    daemon = subprocess.Popen(command, user="munge", group="munge", extra_groups=[])
    for _ in range(50):
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return daemon
        time.sleep(0.2)
    daemon.kill()
    raise AssertionError("munged does not answer")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of one node."""
    for needed in ("slurmctld", "slurmd", "munged", "sbatch"):
        path = f"{os.environ['PATH']}:/usr/sbin"
        assert shutil.which(needed, path=path), f"{needed}: apt-get install slurm-wlm munge"
    folder = tmp_path_factory.mktemp("slurm")
    for part in ("state", "spool"):
        (folder / part).mkdir()
    # Where Slurm looks by itself: within a job, Snakemake takes its variables (SLURM_CONF) away.
    configuration = Path("/etc/slurm/slurm.conf")
    if configuration.exists():  # a run of this test that was killed leaves its own behind
        assert configuration.read_text().startswith(OURS), "this machine has a Slurm of its own"
    values = {"host": socket.gethostname().split(".")[0], "folder": folder}
    ports = {"port": _free_port(), "next_port": _free_port()}
    configuration.write_text(OURS + CONFIGURATION.format(**values, **ports))
    daemons = [d for d in [_munge()] if d]
    try:
        for command in (["/usr/sbin/slurmctld", "-D"], ["/usr/sbin/slurmd", "-D"]):
            log = (folder / f"{Path(command[0]).name}.out").open("wb")
            daemons.append(subprocess.Popen([*ENDED_WITH_US, *command], stdout=log, stderr=log))
        for _ in range(150):
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
            if state.stdout.strip() == "idle":
                break
            assert all(d.poll() is None for d in daemons), _logs(folder)
            time.sleep(0.2)
        else:
            raise AssertionError(f"no idle node: {state.stdout}{state.stderr}{_logs(folder)}")
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        configuration.unlink()


def _logs(folder: Path) -> str:
    return "".join(path.read_text()[-2000:] for path in folder.glob("*.log"))


def test_a_smoke_run_goes_through_slurm_with_two_jobs_writing_at_once(
    slurm: None, tmp_path: Path, smol: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"HF_TOKEN": "hf_canary_on_slurm", "OPENAI_API_KEY": "sk-canary-on-slurm"}
    environment = os.environ | {"TOM_RUNS": str(tmp_path), "OMP_WAIT_POLICY": "PASSIVE"} | keys
    begin = time.time()
    command = [
        *(sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/slurm"),
        *("--jobs", "2", "--default-resources", "mem_mb=3000", "runtime=60"),
        # Without accounting only squeue knows how a job ended.
        *("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5"),
        *("--slurm-keep-successful-logs", "--slurm-logdir", str(tmp_path / "slurm_logs")),
        *("--config", "profile=smoke", "shards=context", "threads=1"),
        *("--set-threads", "draws=1", "adapter=1"),  # the node has two cores
    ]
    done = subprocess.run(command, env=environment, cwd=root(), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    monkeypatch.setenv("TOM_RUNS", str(tmp_path))
    run = new_run(load_profile("smoke"), replay=False)
    assert verify_run(run.folder).empty  # all of the profile's draws, no key twice
    stages = [
        (stage["start"], stage["end"], name)
        for name, stage in read_manifest(run.folder)["stages"].items()
        if name.startswith(("teacher", "student", "tuned", "published")) and "exact" not in name
    ]
    assert any(
        first < other_last and other < last and name.split()[-1] != other_name.split()[-1]
        for first, last, name in stages
        for other, other_last, other_name in stages
    ), sorted(stages)  # two contexts, hence two jobs that write draws, at the same time
    chapters = {path.stem for path in (run.folder / "notebooks").glob("*.ipynb")}
    assert chapters == {*CHAPTERS, *PAGES}
    assert (run.folder / "book" / "index.html").is_file()

    logs = [p for p in (root() / ".snakemake/log").iterdir() if p.stat().st_mtime > begin - 1]
    assert logs and any((tmp_path / "slurm_logs").rglob("*.log"))  # Snakemake's, and of each job
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not holding(list(keys.values()), [*written, *logs])
    assert not [key for key in keys.values() if key in done.stdout + done.stderr]
