"""The long fault campaign: a live run is killed thirty times and has to end as an undisturbed one.

    make test-faults

It then runs the tests of single faults, writes `tests/faults.json` and the tables of
`book/reliability.md`. The model is the smallest real one; every file lies in a folder of its own.
`python tests/faults.py --page` only writes the page again.
"""

import json
import os
import platform
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "faults.json"
PAGE = ROOT / "book" / "reliability.md"

SETTINGS = {
    "contexts": "IR,sports,party", "games": "prisoners_dilemma,stag_hunt,public_goods",
    "n_teacher": "4", "n": "6", "max_steps": "4", "epochs": "4", "published_epochs": "4",
}  # fmt: skip
WORDS = [word for name, value in SETTINGS.items() for word in ("-p", name, value)]
# Checkpoints after every step, so that a training that is killed has something to go on from; and the
# chapters that show the run.
TOM = [
    sys.executable,
    "-c",
    "import sys; from tomlib import cli, finetune, reproduce; finetune.CHECKPOINT_SECONDS = 0.0; "
    "reproduce.CHAPTERS = tuple(c for c in reproduce.CHAPTERS if '01' <= c[:2] <= '07'); "
    "reproduce.PAGES = (); sys.exit(cli.main(sys.argv[1:]))",
]
REPRODUCE = [*TOM, "reproduce", "--profile", "smoke", "--no-book", *WORDS]
FAULTS = ("tests/test_faults.py", "tests/test_ledger.py", "tests/test_weights.py", "-k", (
    "test_faults or kill or disk or torn or damage or altered or truncated or flipped or refused or "
    "unsafe or network or without_end or two_processes"
))  # fmt: skip
KILLS = {"conversion": 5, "draws": 12, "training": 5, "papermill": 5, "book": 3}


class Process:
    """A command whose lines are read while it runs."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.begin = time.monotonic()
        self.child = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.stages: dict[str, float] = {}  # finished stage -> seconds since the start
        self.ended = False
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def until(self, stage: str, timeout: float = 900) -> bool:
        """Whether a stage (or, with "", the whole command) has been finished."""
        end = time.monotonic() + timeout
        while stage not in self.stages or not stage:
            if self.ended:
                return not stage
            try:
                line = self._queue.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                return False
            if line is None:
                self.child.wait()
                self.ended = True
                continue
            self.lines.append(line.rstrip())
            found = re.match(r"\[ *[\d.]+ s\] (.+)", line)
            if found:
                self.stages[found[1]] = time.monotonic() - self.begin
        return True

    def kill(self, everything: bool) -> bool:
        """SIGKILL to the command alone or to all that it has started; False if it had ended."""
        if self.child.poll() is not None:
            return False
        # A notebook's kernel has a session of its own: by the process, not by its group.
        others = psutil.Process(self.child.pid).children(recursive=True) if everything else []
        self.child.kill()
        for other in others:
            with suppress(psutil.NoSuchProcess):
                other.kill()
        self.child.wait()
        return True

    @property
    def refused(self) -> bool:
        return any("another run is writing to it" in line for line in self.lines)


def killed(
    command: list[str],
    environment: dict[str, str],
    everything: bool,
    wait: Callable[[Process], object],
) -> tuple[Process, int] | None:
    """Start a command, wait, kill it: the process, and how often it was refused before that.

    It is refused while an orphan of the run that was killed before still writes. None where the
    command had done all it had to before the moment came.
    """
    for refused in range(60):
        process = Process(command, environment)
        wait(process)
        if process.kill(everything):
            return process, refused
        process.until("")
        if not process.refused:
            if process.child.returncode:  # going on after a kill has failed: what this looks for
                raise SystemExit("\n".join(process.lines[-5:]))
            return None
        time.sleep(1)
    raise SystemExit("refused sixty times: an orphan of a killed run does not end")


def finish(command: list[str], environment: dict[str, str]) -> Process:
    """A command run to its end; refused ones are tried again."""
    for _ in range(60):
        process = Process(command, environment)
        process.until("", timeout=3600)
        if not process.refused:
            if process.child.returncode != 0:
                raise SystemExit("\n".join(process.lines[-5:]))
            return process
        time.sleep(1)
    raise SystemExit("refused for a minute")


# --- what a run holds -----------------------------------------------------------------------------


def keys(folder: Path) -> Counter[tuple[Any, ...]]:
    """The keys of all draws and readouts as they stand in the files, and how often."""
    from tomlib.ledger import DRAW_KEY, READOUT_KEY, verify

    found: Counter[tuple[Any, ...]] = Counter()
    if folder.is_dir():
        problems = verify(folder)["problem"]
        assert problems.eq("").all(), problems.tolist()
    for kind, names in (("draws", DRAW_KEY), ("readouts", READOUT_KEY)):
        for path in sorted((folder / kind).glob("*.jsonl")):
            text = path.read_text("utf-8")
            for line in text.splitlines()[: text.count("\n")]:  # without a torn last line
                row = json.loads(line)
                found[(kind, *(row[name] for name in names))] += 1
    return found


def contents(folder: Path) -> tuple[dict[tuple[Any, ...], Any], dict[tuple[Any, ...], Any]]:
    """Text and seed of every draw, and the probabilities of every readout, by key."""
    from tomlib.ledger import DRAW_KEY, READOUT_KEY, Ledger

    ledger = Ledger(folder)
    draws = ledger.draws().astype({"adapter": object})
    said = {
        tuple(None if v != v else v for v in row[:-2]): row[-2:]
        for row in draws[[*DRAW_KEY, "text", "seed"]].itertuples(index=False, name=None)
    }
    return said, {tuple(r[k] for k in READOUT_KEY): r["p"] for r in ledger.readouts()}


def tables(folder: Path) -> dict[str, str]:
    """What every cell of every chapter shows, without durations."""
    shown = {}
    for path in sorted((folder / "notebooks").glob("0*.ipynb")):
        if path.name.endswith(".part.ipynb"):
            continue
        cells = json.loads(path.read_text("utf-8"))["cells"]
        for number, cell in enumerate(cells):
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                text = "".join(data.get("text/html") or data.get("text/plain") or "")
                text = "".join(data.get("text/markdown") or text)
                text = re.sub(r"(?s)(<th>seconds</th>.*?<td>)[^<]*", r"\1", text)
                text = re.sub(r"\d+ s on", "s on", text)
                if text.startswith("**Cost"):
                    continue
                if text and "image/png" not in data:
                    shown[f"{path.stem}, cell {number}"] = (
                        shown.get(f"{path.stem}, cell {number}", "") + text
                    )
    return shown


def alike(first: str | None, second: str | None) -> bool:
    """Whether two texts say the same, their numbers up to one unit of the last digit.

    A prompt is read on from what was read before it, so that probabilities after another start
    differ by rounding.
    """
    number = re.compile(r"-?\d+\.\d+")
    if first is None or second is None or number.split(first) != number.split(second):
        return False
    pairs = zip(number.findall(first), number.findall(second), strict=True)
    return all(
        abs(float(a) - float(b)) <= 1.001 * 10.0 ** -min(len(x.split(".")[1]) for x in (a, b))
        for a, b in pairs
    )


def adapters(folder: Path) -> dict[str, bytes]:
    """Weights of the finished adapters by name."""
    files = sorted((folder / "adapters").glob("*/adapter_model.safetensors"))
    return {path.parent.name: path.read_bytes() for path in files}


# --- the campaign ---------------------------------------------------------------------------------


def a_place(base: Path, name: str, gguf: Path) -> dict[str, str]:
    """An environment with runs and cache of its own; the weights' file is there, unconverted."""
    weights = base / name / "cache" / "weights"
    weights.mkdir(parents=True)
    (base / name / "tmp").mkdir()
    shutil.copy2(gguf, weights / gguf.name)
    own = {"TOM_RUNS": str(base / name), "TOM_CACHE": str(base / name / "cache")}
    plain = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return os.environ | own | plain | {"TMPDIR": str(base / name / "tmp")}


def phase_of(stage: str) -> str:
    for word, phase in (("weights", "conversion"), ("train", "training"), ("chapter", "papermill")):
        if stage.startswith(word):
            return phase
    return "draws"


def campaign(base: Path, seed: int) -> dict[str, Any]:
    """The reference run, the run that is killed, and how they compare."""
    from tomlib.models import card
    from tomlib.weights import fetch

    rng = random.Random(seed)
    gguf = fetch(card("smollm2-135m"))
    calm = a_place(base, "calm", gguf)
    print("undisturbed run", flush=True)
    reference = finish(REPRODUCE, calm)
    names = list(reference.stages)
    ends = [reference.stages[name] for name in names]
    lasts = dict(zip(names, [b - a for a, b in zip([0.0, *ends], ends, strict=False)], strict=True))
    whole = keys(base / "calm" / "smoke")

    # Moments: in each phase uniformly over its time, in the order of the run.
    moments: list[tuple[int, float]] = []
    for phase in ("conversion", "draws", "training"):
        inside = [i for i, name in enumerate(names) if phase_of(name) == phase]
        weights = [max(lasts[names[i]], 0.05) for i in inside]
        for i in rng.choices(inside, weights, k=KILLS[phase]):
            begin = 0.3 if i == 0 else 0.0  # not while Python itself starts
            moments.append((i, rng.uniform(begin, 0.95) * lasts[names[i]]))
    # A conversion begins anew each time, whatever was killed.
    moments = sorted(moments[: KILLS["conversion"]]) + sorted(moments[KILLS["conversion"] :])

    rough = a_place(base, "rough", gguf)
    folder = base / "rough" / "smoke"
    kills: list[dict[str, Any]] = []
    before: Counter[tuple[Any, ...]] = Counter()

    def checked() -> None:
        nonlocal before
        now = keys(folder)
        assert max(now.values(), default=1) == 1, "a key stands twice"
        assert not before - now, f"{len(before - now)} keys are lost"
        before = now

    def note(phase: str, stage: str, moment: float, everything: bool, refused: int) -> None:
        checked()
        kills.append(
            {
                "phase": phase,
                "stage": stage,
                "seconds_into_it": round(moment, 2),
                "killed": "with its children" if everything else "alone",
                "refused_before": refused,
                "keys_then": len(before),
            }
        )
        print(f"kill {len(kills)}: {phase} ({stage}), {len(before)} keys", flush=True)

    for number, (at, moment) in enumerate(moments):
        everything = number % 2 == 0
        # Where what was to be killed is done already, a later moment of the run takes its place.

        def there(process: Process, at: int = at, moment: float = moment) -> None:
            if at == 0 or process.until(names[at - 1]):
                process.until("", timeout=moment)

        ended = killed(REPRODUCE, rough, everything, there)
        if ended:
            done = [name for name in names if name in ended[0].stages]
            stage = names[min(len(done), len(names) - 1)]
            note(phase_of(stage), stage, moment, everything, ended[1])
    chapters = [name.removeprefix("chapter ") for name in names if name.startswith("chapter")]
    number = 0
    # One that is done before its moment does not count; moments of draws and training that came too
    # late are made up for here, so that there are thirty kills.
    missing = sum(KILLS[phase] for phase in ("conversion", "draws", "training")) - len(kills)
    for _ in range(200):
        if number == KILLS["papermill"] + missing:
            break
        chapter = rng.choice(chapters)
        command = [*TOM, "run", chapter, "--fresh", "--profile", "smoke", *WORDS]
        moment = 1 + rng.uniform(0.1, 0.9) * lasts[f"chapter {chapter}"]
        ended = killed(command, rough, number % 2 == 0, lambda p, m=moment: p.until("", timeout=m))
        if ended:
            note("papermill", f"chapter {chapter}", moment, number % 2 == 0, ended[1])
            number += 1
    print("to the end", flush=True)
    finish(REPRODUCE, rough)
    checked()
    pages = base / "pages"
    book = [*TOM, "book", "--notebooks", str(folder / "notebooks"), "--out", str(pages)]
    still = time.monotonic()
    finish([*book[:-1], str(base / "still")], rough)
    still = time.monotonic() - still
    number = 0
    for _ in range(100):
        if number == KILLS["book"]:
            break
        moment = rng.uniform(0.05, 0.98) * still
        ended = killed(book, rough, number % 2 == 0, lambda p, m=moment: p.until("", timeout=m))
        if ended:
            note("book", "book", moment, number % 2 == 0, ended[1])
            number += 1
    finish(book, rough)

    (said, read), (said_too, read_too) = (
        contents(base / name / "smoke") for name in ("calm", "rough")
    )
    off = [
        abs(read[key][option] - value) if key in read else 1.0
        for key, options in read_too.items()
        for option, value in options.items()
    ]
    mine, theirs = tables(folder), tables(base / "calm" / "smoke")
    ours, others = adapters(folder), adapters(base / "calm" / "smoke")
    left = [p.name for p in (base / "rough" / "cache" / "converted").glob(".*")]
    return {
        "seed": seed,
        "undisturbed_seconds": round(ends[-1]),
        "kills": kills,
        "keys": len(whole),
        "lost": len(whole - before),
        "doubled": sum(n > 1 for n in before.values()),
        "unknown": len(before - whole),
        "draws": len(said),
        "draws_that_differ": sum(said.get(key) != text for key, text in said_too.items()),
        "largest_difference_of_a_probability": max(off),
        "adapters": len(ours),
        "adapters_that_differ": sum(others.get(name) != data for name, data in ours.items()),
        "tables": len(mine),
        "tables_that_differ": sorted(
            n for n in {*mine, *theirs} if not alike(mine.get(n), theirs.get(n))
        ),
        "pages": len(list(base.glob("still/**/*.html"))),
        "pages_missing": sorted(
            {str(p.relative_to(base / "still")) for p in base.glob("still/**/*.html")}
            - {str(p.relative_to(pages)) for p in pages.glob("**/*.html")}
        ),
        "half_conversions_left": left,
    }


def cases(base: Path) -> list[dict[str, Any]]:
    """The tests of single faults, test by test."""
    out = base / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", *FAULTS, f"--junitxml={out}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    table: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(out).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        state = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        name = str(case.get("name")).split("[")[0]
        table.setdefault(name, Counter())[state] += 1
    return [
        {"test": name, **{state: found[state] for state in ("passed", "failed", "skipped")}}
        for name, found in table.items()
    ]


# --- the page -------------------------------------------------------------------------------------


def page_tables(report: dict[str, Any]) -> str:
    """What `book/reliability.md` says in numbers."""
    run = report["run"]
    by_phase = Counter(kill["phase"] for kill in run["kills"])
    alone = sum(kill["killed"] == "alone" for kill in run["kills"])
    refused = sum(kill["refused_before"] for kill in run["kills"])
    differ = run["tables_that_differ"]
    words = {
        "keys of draws and exact probabilities, undisturbed": run["keys"],
        "lost": run["lost"],
        "doubled": run["doubled"],
        "not in the undisturbed run": run["unknown"],
        "draws whose text differs": f"{run['draws_that_differ']} of {run['draws']}",
        "largest difference of a probability": f"{run['largest_difference_of_a_probability']:.0e}",
        "adapters that differ": f"{run['adapters_that_differ']} of {run['adapters']}",
        "tables and sentences of the chapters that differ by more than the last digit": (
            f"{len(differ)} of {run['tables']}"
        ),
        "pages missing in the book": f"{len(run['pages_missing'])} of {run['pages']}",
        "half conversions left behind": len(run["half_conversions_left"]),
    }
    tests = report["tests"]
    lines = [
        f"*Measured* on {report['date']} at commit `{report['commit']}` on {report['machine']}: "
        f"{report['seconds'] / 60:.0f} minutes, of which the undisturbed run took "
        f"{run['undisturbed_seconds']} seconds (smallest real model, a reduced smoke profile).",
        "",
        f"The run was killed {len(run['kills'])} times "
        f"({', '.join(f'{n} in {phase}' for phase, n in by_phase.items())}), {alone} times alone and "
        f"{len(run['kills']) - alone} times with all that it had started; {refused} starts were "
        "refused because a part of the killed run was still there, and let in when it had ended.",
        "",
        ":::{table} What the last start left, beside an undisturbed run.",
        ":name: tab-killed",
        "",
        "| after the last start | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in words.items()),
        ":::",
        "",
        ":::{table} Single faults, one test each.",
        ":name: tab-faults",
        "",
        "| fault | cases | as it should be |",
        "|---|---|---|",
        *(
            f"| {t['test'].removeprefix('test_').replace('_', ' ')} "
            f"| {t['passed'] + t['failed'] + t['skipped']} | {t['passed']}"
            + (f" ({t['skipped']} not possible there)" if t["skipped"] else "")
            + " |"
            for t in tests
        ),
        ":::",
        "",
        f"{sum(t['passed'] for t in tests)} cases passed, {sum(t['failed'] for t in tests)} failed.",
    ]
    if differ:
        lines += ["", f"Cells that differ: {'; '.join(differ)}."]
    return "\n".join(lines)


def page(report: dict[str, Any], text: str) -> str:
    """The page with the report's numbers between its two marks."""
    begin, end = "<!-- measured -->\n", "<!-- /measured -->"
    head, rest = text.split(begin)
    return head + begin + page_tables(report) + "\n" + end + rest.split(end)[1]


def commit() -> str:
    """What is checked out, with a mark where files differ from it."""
    told = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(told, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Run the campaign, write report and page; 0 when nothing was lost."""
    if "--page" not in sys.argv:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run = campaign(Path(folder), seed=20240805)
            tests = cases(Path(folder))
        report = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "commit": commit(),
            "machine": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores",
            "seconds": round(time.monotonic() - begin),
            "run": run,
            "tests": tests,
        }
        REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report = json.loads(REPORT.read_text("utf-8"))
    PAGE.write_text(page(report, PAGE.read_text("utf-8")), encoding="utf-8")
    print(page_tables(report))
    run = report["run"]
    counted = Counter(kill["phase"] for kill in run["kills"])
    bad = {
        "keys": run["lost"] + run["doubled"] + run["unknown"] + (run["keys"] == 0),
        "draws": run["draws_that_differ"],
        "probabilities": run["largest_difference_of_a_probability"] > 1e-5,
        "adapters": run["adapters_that_differ"] + (run["adapters"] == 0),
        "tables": len(run["tables_that_differ"]) + (run["tables"] == 0),
        "pages": len(run["pages_missing"]) + (run["pages"] == 0),
        "half conversions": len(run["half_conversions_left"]),
        "kills": len(run["kills"]) != sum(KILLS.values()) or counted.keys() != KILLS.keys(),
        "tests": sum(t["failed"] for t in report["tests"]),
    }
    print("; ".join(f"{name}: {number:d} wrong" for name, number in bad.items() if number))
    return int(any(bad.values()))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
