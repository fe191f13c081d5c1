"""What happens to a run when something goes wrong around it, as its user meets it."""

import gzip
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime as Datetime
from datetime import timedelta, tzinfo
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pytest

from tomlib import collect as collecting
from tomlib import finetune, ledger, models, readout, reproduce, weights
from tomlib.cli import main
from tomlib.collect import collect
from tomlib.engines import Engine, Request, ask, open_engine
from tomlib.errors import TomError
from tomlib.models import Card
from tomlib.profiles import SHIPPED, Run, load_profile
from tomlib.prompts import load_wording, messages
from tomlib.scenarios import find, root
from tomlib.sharing import load_transformers

QUICK = root() / "data" / "runs" / SHIPPED
TOM = [sys.executable, "-m", "tomlib.cli"]


def tom(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*TOM, *words], env=os.environ | environment, capture_output=True, text=True, timeout=600
    )


def one_line(text: str) -> str:
    """The error, where it is one line of ours and no traceback."""
    said = re.findall(r"(?:^|[\r\n\]])tom: (.*)", text)
    assert len(said) == 1 and "Traceback" not in text, text[-2000:]
    return str(said[0])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk of its own: `disk("64k")` mounts it."""
    made: list[Path] = []

    def mounted(size: str) -> Path:
        place = tmp_path / f"disk{len(made)}"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk is not allowed here")
        made.append(place)
        return place

    yield mounted
    for place in made:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped run as a user's own, to be damaged: `runs/quick`, shards unpacked."""
    folder = tmp_path / "runs" / SHIPPED
    shutil.copytree(QUICK, folder)
    for packed in folder.glob("*/*.jsonl.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    monkeypatch.setenv("TOM_RUNS", str(folder.parent))
    return folder


# --- two runs, Ctrl-C, a clock --------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from tomlib.ledger import hold
with hold(Path(sys.argv[1]), Path("x")):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(place: Path) -> Iterator[int]:
    """Another process holds a lock; its pid."""
    code = [sys.executable, "-c", HOLDER, str(place)]
    process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process.pid
    finally:
        process.communicate()


def test_a_second_run_is_refused_before_it_asks_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOM_RUNS", str(tmp_path))
    monkeypatch.setattr(collecting, "open_engine", lambda *a, **k: pytest.fail("opened a model"))
    locks = tmp_path / "smoke" / "locks"
    run = reproduce_run()
    scenarios = run.scenarios("in_sample")
    shard = collecting.shard_name(collecting.player(run, "student"), scenarios[0], "choice")
    with held(locks / f"draws--{shard}") as pid, pytest.raises(TomError, match=f"pid {pid} on "):
        collect(run, "student", scenarios, "choice", 1, progress=False)
    with held(locks / f"readouts--{shard}") as pid, pytest.raises(TomError, match=f"pid {pid} "):
        readout.readout(run, "student", scenarios, "choice", progress=False)
    with held(locks / "reproduce") as pid:
        assert main(["reproduce", "--profile", "smoke"]) == 2
        assert f"another run is writing to it (pid {pid} on" in one_line(capsys.readouterr().err)
    with held(locks / "chapter--08-published-results") as pid:
        assert main(["run", "08", "--profile", "smoke"]) == 2
        assert f"another run is writing to it (pid {pid} on" in one_line(capsys.readouterr().err)
    with held(locks / "book") as pid:
        assert main(["reproduce", "--profile", "smoke", "--only", "book"]) == 2
        assert f"another run is writing to it (pid {pid} on" in one_line(capsys.readouterr().err)
    rows = collecting.training_rows(run, "published")
    how = finetune.settings(run, "published")
    mark = finetune.fingerprint(models.card("smollm2-135m"), how, rows)
    with (
        held(locks / f"adapters--published-{mark}") as pid,
        pytest.raises(TomError, match=f"pid {pid} "),
    ):
        finetune.train(run, "published", rows)


def reproduce_run() -> Run:
    from tomlib.profiles import new_run

    return new_run(load_profile("smoke"), replay=False)


def test_what_another_run_has_drawn_meanwhile_is_not_drawn_again(
    new_smoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ends between the look into the ledger and the lock."""
    run = new_smoke()
    scenarios = run.scenarios("in_sample")[:2]
    other = reproduce_run()
    ask_for = collecting._ask_for

    def after_the_other(*a: Any) -> None:
        monkeypatch.setattr(collecting, "_ask_for", ask_for)
        collect(other, "student", scenarios, "choice", 2, progress=False)
        ask_for(*a)

    monkeypatch.setattr(collecting, "_ask_for", after_the_other)
    mine = collect(run, "student", scenarios, "choice", 3, progress=False)
    assert len(mine) == 6 and mine["text"].notna().all()
    assert ledger.verify(run.folder)["problem"].eq("").all()


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_time_limit_leaves_a_sound_ledger_and_says_how_to_go_on(
    tmp_path: Path, smol: Card, how: signal.Signals
) -> None:
    command = [*TOM, "reproduce", "--profile", "smoke", "--no-book"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"TOM_RUNS": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A process started in the background by a shell ignores Ctrl-C, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "teacher in_sample" in line:
            os.killpg(process.pid, how)
            break
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from here" in one_line(said)
    assert ledger.verify(tmp_path / "smoke")["problem"].eq("").all()
    assert len(ledger.Ledger(tmp_path / "smoke").draws())


@pytest.mark.slow
def test_a_time_limit_ends_a_chapters_kernel_too(tmp_path: Path) -> None:
    temporary = tmp_path / "t"  # sockets lie there, whose paths are short
    temporary.mkdir()
    process = subprocess.Popen(
        [*TOM, "run", "08"],
        env=os.environ | {"TOM_RUNS": str(tmp_path / "runs"), "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (kernels := list(temporary.glob("tom-*/kernel.json"))) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in said
    assert not list(temporary.glob("tom-*"))
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            assert str(kernels[0]).encode() not in line.read_bytes()


class Backwards(Datetime):
    """A clock that jumps back an hour each time it is read."""

    reads = itertools.count(1)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "Backwards":
        return super().now(tz) - timedelta(hours=next(cls.reads))


def test_a_clock_that_jumps_back_changes_nothing_but_times(
    new_smoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = new_smoke()
    scenarios = plain.scenarios("in_sample")
    expected = collect(plain, "student", scenarios, "choice", 2, progress=False)
    shutil.rmtree(plain.folder)
    run = new_smoke()
    for module in (collecting, ledger, readout, reproduce):
        monkeypatch.setattr(module, "datetime", Backwards)
    for n in (1, 2):
        found = collect(run, "student", scenarios, "choice", n, progress=False)
        start = Backwards.now()
        stage = {"start": reproduce._utc(start), "end": reproduce._utc(Backwards.now())}
        reproduce.write_manifest(run, {"draws": stage})
    pd.testing.assert_frame_equal(found.drop(columns="time"), expected.drop(columns="time"))
    assert found["time"].is_monotonic_increasing is False
    assert ledger.verify(run.folder)["problem"].eq("").all()
    assert "draws" in reproduce.read_manifest(run.folder)["stages"]


# --- disks ----------------------------------------------------------------------------------------


def test_a_full_and_a_read_only_disk_during_a_chapter(disk: Callable[[str], Path]) -> None:
    place = disk("48k")
    said = one_line(tom("run", "08", TOM_RUNS=str(place)).stderr)
    assert "No space left on device" in said and "give the same command again" in said
    shutil.rmtree(place / SHIPPED)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for command in (["run", "08"], ["reproduce", "--profile", "smoke"]):
        done = tom(*command, TOM_RUNS=str(place))
        assert done.returncode == 2
        assert "Read-only file system" in one_line(done.stderr)


def test_a_full_disk_while_packing_a_run(disk: Callable[[str], Path]) -> None:
    place = disk("100k")
    done = tom("ship", str(QUICK), str(place / SHIPPED))
    assert done.returncode == 2 and "No space left" in one_line(done.stderr)
    assert not (place / SHIPPED).exists()


def test_a_full_disk_while_an_adapter_is_written(disk: Callable[[str], Path]) -> None:
    place = disk("64k")
    with pytest.raises(TomError, match=r"cannot write \(No space left on device\); free some"):
        finetune._write(place / "checkpoint.safetensors", bytes(100_000))
    assert list(place.iterdir()) == []


# --- servers --------------------------------------------------------------------------------------


class Faulty(ThreadingHTTPServer):
    """Stands before a real server on loopback; `plan` says what happens to the coming requests."""

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.behind = urlsplit(behind)
        self.plan: list[str] = []
        self.seen = 0

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of the test."""


class _Passing(BaseHTTPRequestHandler):
    server: Faulty

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.server.plan.pop(0) if self.server.plan else ""
        self.server.seen += 1
        if fault == "hangs":
            threading.Event().wait(30)
        elif fault == "closes":
            pass
        elif fault.isdigit():
            key = self.headers["Authorization"]
            self._give(int(fault), json.dumps({"error": {"message": f"no: {key}"}}).encode())
        elif fault in ("garbage", "wrong shape", "no choices"):
            said = {"garbage": "<html>\x1b[31m", "wrong shape": '{"choices": [{"message": 5}]}'}
            self._give(200, said.get(fault, '{"id": "x", "object": "y", "choices": []}').encode())
        else:
            status, answer = self._asked(body)
            if fault == "NaN":
                answer = _not_numbers(answer)
            self._give(status, answer, half=fault == "half a body")
        self.close_connection = True

    def _asked(self, body: bytes) -> tuple[int, bytes]:
        where = self.server.behind
        link = http.client.HTTPConnection(str(where.hostname), where.port, timeout=120)
        headers = {k: self.headers[k] for k in ("Authorization", "Content-Type")}
        link.request("POST", self.path, body, headers)
        answer = link.getresponse()
        return answer.status, answer.read()

    def _give(self, status: int, body: bytes, half: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)


def _not_numbers(answer: bytes) -> bytes:
    said = json.loads(answer)
    for choice in said["choices"]:
        for token in choice["logprobs"]["content"]:
            for top in token["top_logprobs"]:
                top["logprob"] = float("nan")
    return json.dumps(said).encode()


@pytest.fixture(scope="module")
def server(smol: Card) -> Iterator[Engine]:
    with open_engine(smol, engine="llamacpp", parallel=4, threads=2) as running:
        yield running


@pytest.fixture
def endpoint(
    request: pytest.FixtureRequest,
    server: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[Faulty, Engine, Run]]:
    """A real model's server behind a faulty one, its engine with three attempts, and a run."""
    chat: Any = server.chat
    faulty = Faulty(str(chat.openai_api_base))
    threading.Thread(target=faulty.serve_forever, daemon=True).start()
    monkeypatch.setenv("TOM_TEST_KEY", chat.openai_api_key.get_secret_value())
    card = tmp_path / "models.toml"
    card.write_text(
        f"""[[model]]
name = "loopback"
kind = "endpoint"
family = "smollm2"
purpose = "test"
base_url = "http://127.0.0.1:{faulty.server_port}/v1"
model_id = "any"
api_key_env = "TOM_TEST_KEY"
prefill = "native"
""",
        encoding="utf-8",
    )
    monkeypatch.setenv("TOM_MODELS", str(card))
    monkeypatch.setenv("TOM_RUNS", str(tmp_path / "runs"))
    hangs = "hangs" in request.node.name
    monkeypatch.setenv("TOM_TIMEOUT", "10" if hangs else "100")
    monkeypatch.setenv("TOM_ATTEMPTS", "3")
    engine = open_engine(models.card("loopback"), parallel=4)
    run = reproduce_run().changed(teacher="loopback", teacher_engine="endpoint")
    monkeypatch.setattr(collecting, "opened", lambda *_: engine)
    monkeypatch.setattr(readout, "opened", lambda *_: engine)
    yield faulty, engine, run
    faulty.shutdown()
    faulty.server_close()


FAULTS = ["429", "500", "garbage", "wrong shape", "no choices", "half a body", "closes", "hangs"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_once_is_asked_again(
    fault: str, endpoint: tuple[Faulty, Engine, Run]
) -> None:
    faulty, _, run = endpoint
    faulty.plan = [fault]
    scenarios = run.scenarios("in_sample")[:1]
    drawn = collect(run, "teacher", scenarios, "choice", 2, progress=False)
    assert drawn["index"].tolist() == [0, 1] and faulty.seen >= 2
    assert ledger.verify(run.folder)["problem"].eq("").all()


@pytest.mark.parametrize("fault", ["500", "garbage", "half a body", "401", "gone"])
def test_a_server_that_keeps_failing_is_one_line_and_nothing_is_lost(
    fault: str, endpoint: tuple[Faulty, Engine, Run]
) -> None:
    faulty, _, run = endpoint
    scenarios = run.scenarios("in_sample")[:1]
    before = collect(run, "teacher", scenarios, "choice", 1, progress=False)
    if fault == "gone":
        faulty.shutdown()
        faulty.server_close()
    else:
        faulty.plan = [fault] * 100
    run.__dict__.pop("ledger", None)
    with pytest.raises(TomError, match="endpoint") as stopped:
        collect(run, "teacher", scenarios, "choice", 3, progress=False)
    said = str(stopped.value)
    assert "\n" not in said and "\x1b" not in said and len(said) < 600
    assert os.environ["TOM_TEST_KEY"] not in said
    assert len(ledger.Ledger(run.folder).draws()) == len(before) == 1
    if fault != "gone":
        faulty.plan = []
        again = collect(run, "teacher", scenarios, "choice", 3, progress=False)
        assert again["index"].tolist() == [0, 1, 2]
        assert again["text"].iloc[0] == before["text"].iloc[0]


def test_probabilities_that_are_no_numbers_are_refused(
    endpoint: tuple[Faulty, Engine, Run],
) -> None:
    faulty, _, run = endpoint
    faulty.plan = ["NaN"] * 100
    scenarios = run.scenarios("in_sample")[:1]
    with pytest.raises(TomError, match="not finite"):
        readout.readout(run, "teacher", scenarios, "choice", progress=False)
    assert ledger.Ledger(run.folder).readouts() == []
    # Where only texts are wanted, numbers beside them do not matter.
    assert len(collect(run, "teacher", scenarios, "choice", 1, progress=False)) == 1


# --- weights --------------------------------------------------------------------------------------


def _copy_of_converted(smol: Card, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own with the converted model, whose files may be damaged."""
    (place / "weights").mkdir(parents=True)
    source = weights.fetch(smol)
    (place / "weights" / "smollm2-135m.gguf").symlink_to(source)
    shutil.copy2(source.with_suffix(".verified"), place / "weights")
    folder = weights.transformers_folder(smol)
    shutil.copytree(folder, place / "converted" / folder.name)
    monkeypatch.setenv("TOM_CACHE", str(place))
    return place / "converted" / folder.name


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "record"])
def test_damaged_converted_weights_are_refused_and_named(
    damage: str, smol: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _copy_of_converted(smol, tmp_path / "cache", monkeypatch)
    path = folder / "model.safetensors"
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "altered":
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"\x00\x01\x02\x03")
    elif damage == "missing":
        path.unlink()
    else:
        (folder / "converted-from.json").write_text("[]")
    with pytest.raises(TomError, match=f"{folder} is altered .*remove it, and it is converted"):
        load_transformers(smol)


def test_verify_finds_a_change_that_left_no_trace(
    smol: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _copy_of_converted(smol, tmp_path / "cache", monkeypatch)
    path = folder / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x00\x01\x02\x03")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(TomError, match=r"model\.safetensors"):
        weights.verify(smol)


def _adapter(folder: Path, student: Card) -> Path:
    """The shipped adapter with its record changed to belong to another student."""
    weights_ = next((QUICK / "adapters").glob("published-*/adapter_model.safetensors"))
    shutil.copytree(weights_.parent, folder)
    record = json.loads((folder / "training.json").read_text("utf-8"))
    record["base"] = weights.weights_id(student)
    (folder / "training.json").write_text(json.dumps(record))
    return folder


def test_damaged_adapters_are_refused_and_named(smol: Card, tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "a", smol)
    weights = folder / "adapter_model.safetensors"
    finetune.check_base(folder, smol)
    # A right record, but tensors of another shape: the library's complaint is one line.
    with pytest.raises(TomError, match="adapter cannot be loaded"):
        open_engine(smol, folder, engine="transformers")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(TomError, match="adapter cannot be loaded"):
        open_engine(smol, folder, engine="transformers")
    record = json.loads((folder / "training.json").read_text("utf-8"))
    (folder / "training.json").write_text(json.dumps(record | {"sha256": "0" * 64}))
    with pytest.raises(TomError, match="altered; restore it, or remove"):
        finetune.check_base(folder, smol)
    weights.rename(folder / "adapter_model.bin")  # what a pickle would be called
    with pytest.raises(TomError, match=r"adapter_model\.safetensors: no such file"):
        finetune.check_base(folder, smol)


# --- bad input at the command line ----------------------------------------------------------------


def test_an_adapter_of_another_base_is_one_line_for_the_user(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (quick / "adapters").glob("family-*/training.json"):
        record = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(record | {"base": "0" * 64, "student": "another"}))
    done = tom("run", "05", "--fresh")
    assert done.returncode == 2
    assert "this adapter belongs to 'another'" in one_line(done.stderr)
    assert main(["verify", str(quick)]) == 2
    assert "belongs to 'another'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("\n", "line 2: is empty"),
        ("{\n", "line 2: is damaged"),
        ('{"model": "x"}\n', "line 2: lacks the field"),
        ("<script>alert(1)</script>\n", "line 2: is damaged"),
    ],
)
def test_a_damaged_ledger_line_names_file_and_line_and_changes_nothing(
    quick: Path, damage: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted((quick / "draws").glob("*.jsonl"))[0]
    first, rest = shard.read_text("utf-8").split("\n", 1)
    shard.write_text(f"{first}\n{damage}{rest}", encoding="utf-8")
    before = shard.read_bytes()
    for command in (["verify", str(quick)], ["plan", "--profile", SHIPPED]):
        assert main(command) == 2
        both = capsys.readouterr()
        assert f"{shard.name}, {says}" in both.out + both.err
        assert "Traceback" not in both.out + both.err
    assert shard.read_bytes() == before


def test_a_chapter_runs_from_anywhere_and_a_lone_copy_says_what_it_lacks(tmp_path: Path) -> None:
    """Outside the repository: the package knows where it lies; a copy without the data says so."""
    notebook = root() / "notebooks" / "00-games.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), str(tmp_path / "out.ipynb")]
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    here = plain | {"PYTHONPATH": str(root())}
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    shutil.copytree(root() / "tomlib", tmp_path / "alone" / "tomlib")
    away = plain | {"PYTHONPATH": str(tmp_path / "alone")}
    done = subprocess.run(command, cwd=tmp_path, env=away, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no data/scenarios in" in done.stderr and "run from the repository root" in done.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["run", "04", "-p", "name", "../../x"], "name is no parameter"),
        (["run", "04", "-p", "profile", "smoke"], "give --profile NAME instead"),
        (["run", "04", "-p", "n", "0x" + "f" * 5000], "below 2"),
        (["run", "04", "-p", "n", "9" * 5000], "must be int"),
        (["run", "04", "-p", "n", "[" * 5000], "must be int"),
        (["run", "04", "--profile", "a" * 300], "cannot be read"),
        (["plan", "-p", "wording", "nope"], "no wording [game.nope]"),
        (["plan", "-p", "contexts", "IR,nowhere"], "context 'nowhere' is unknown"),
        (["show", "IR/a\x1b[31m\nb"], r"\x1b[31m\nb"),
        (["ship", str(QUICK), str(root() / "tests")], "there already and no shipped run"),
        (["verify", "/dev/null"], "no manifest"),
    ],
)
def test_bad_words_at_the_command_line(
    command: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    said = capsys.readouterr().err
    assert says in one_line(said) and said.count("\n") == 1


@pytest.mark.slow
def test_a_kernel_that_is_killed_is_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*TOM, "run", "08"],
        env=os.environ | {"TOM_RUNS": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    kernels: list[int] = []
    while not kernels and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.parent.is_dir():
            pytest.skip("no /proc here")
        time.sleep(0.05)
        for child in children.read_text().split():
            if b"ipykernel" in Path(f"/proc/{child}/cmdline").read_bytes():
                kernels.append(int(child))
    time.sleep(1)
    for kernel in kernels:
        os.kill(kernel, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "its kernel has ended" in one_line(said)


def test_requests_of_the_wording_are_what_the_server_gets(
    endpoint: tuple[Faulty, Engine, Run],
) -> None:
    """The faulty server is a clean pipe where no fault is planned."""
    faulty, engine, _ = endpoint
    said = messages(find("IR/stag_hunt"), "choice", load_wording("replies"))
    (drawn,) = ask(engine, [Request(said, [1, 2])], temperature=0.8, max_new_tokens=4)
    assert len(drawn) == 2 and faulty.seen >= 1


def test_the_page_says_what_the_report_holds() -> None:
    import faults

    report = json.loads(faults.REPORT.read_text("utf-8"))
    text = faults.PAGE.read_text("utf-8")
    assert faults.page(report, text) == text
    report["run"]["lost"] = 3
    assert faults.page(report, text) != text
