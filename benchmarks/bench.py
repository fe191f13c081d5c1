"""Measure every row of the table beside its peer; write RESULTS.md, results.json, scaling.png.

`make bench` runs this; `make bench BENCH=full` includes the long parts. Every worker is a process of its
own (`workers.py`); those that are compared take turns, in alternating order, so that a machine whose
speed changes is as fast for one as for the other. A row's ratio is the median over repetitions of the
ratio within a repetition.

Every measurement is kept in `_build/bench/MODE/raw.json` as soon as it is made: a bench that was stopped
goes on where it was. One that ended is put aside, so that the next one measures anew.

- `results.json`: `{id: {ratio, target, ours, peer, unit, repetitions, better, met}}`
- `measured.json`: each repetition, the checks, the machine; RESULTS.md is written from these two alone.

Without BENCH=full, rows marked long are measured in a short form, which is kept apart from the table.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from report import LENGTH, Data, results, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Mode:
    """How much is measured."""

    name: str
    repetitions: int
    long: bool
    """Whether the long rows are measured at full size (always in their short form too)."""
    short: tuple[int, int] = (16, 32)
    """Answers and tokens of the short form of sampling."""
    card: str = "qwen2.5-coder-0.5b"
    length: int = LENGTH
    """Tokens of a prompt."""
    answers: int = 64
    new: int = 64
    draws: int = 300
    scenarios: int = 20
    pipeline: int = 20
    """Draws of the pipeline that are timed in each repetition."""
    rows: int = 16
    peaks: int = 5
    scaled_draws: tuple[int, ...] = (1, 3, 10, 30, 100, 300)
    scaled_answers: tuple[int, ...] = (1, 4, 16, 64)
    scaled_scenarios: tuple[int, ...] = (1, 2, 4, 8, 12, 20)
    scaled_groups: tuple[int, ...] = (1, 2, 4, 8, 16)


MODES = {
    "full": Mode("full", 3, True),
    "short": Mode(
        "short", 1, False, pipeline=5, peaks=3,
        scaled_draws=(1, 10, 100, 300), scaled_answers=(1, 4, 16),
        scaled_scenarios=(1, 4, 8), scaled_groups=(1, 4, 16),
    ),
    # Whether everything runs; its numbers mean nothing and are written to no table.
    "tiny": Mode(
        "tiny", 1, True, card="smollm2-135m", length=330, short=(2, 2), answers=2, new=3, draws=4, scenarios=2, pipeline=1, rows=2,
        peaks=1, scaled_draws=(1, 2), scaled_answers=(1, 2), scaled_scenarios=(1, 2),
        scaled_groups=(1, 2),
    ),
}  # fmt: skip

LONG = ("sample_vs_generate", "sample_vs_vllm", "readout_vs_lm_eval")
"""Rows that only BENCH=full measures at full size."""


# --- workers --------------------------------------------------------------------------------------


class Worker:
    """A process that does one kind of work, one command at a time."""

    def __init__(self, kind: str, python: str, card: str, log: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TOM_BENCH_CARD": card,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # vLLM: in one process, on all cores, and no word home.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.kind = kind
        self.log = log
        self.process = subprocess.Popen(
            [python, str(HERE / "workers.py"), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a", encoding="utf-8"),
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def __call__(self, do: str, **given: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise SystemExit(f"bench: {self.kind}: {do}: {answer['error']} (see {self.log})")
        return answer["ok"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Bench:
    """The state of one bench: its mode, what is measured so far, the workers that are alive."""

    def __init__(self, mode: Mode, folder: Path, peers: Path) -> None:
        self.mode = mode
        self.folder = folder
        self.peers = peers
        self.path = folder / "raw.json"
        self.raw: Data = json.loads(self.path.read_text("utf-8")) if self.path.is_file() else {}
        self.workers: dict[str, Worker] = {}
        self.warm: dict[str, Callable[[Worker], Any]] = {}
        self.model = ""

    def python(self, kind: str) -> str:
        own = {"vllm": "vllm", "lm-eval": "peers", "trl": "peers"}.get(kind)
        return str(self.peers / own / "bin" / "python") if own else sys.executable

    def worker(self, kind: str) -> Worker:
        if kind not in self.workers:
            worker = Worker(kind, self.python(kind), self.mode.card, self.folder / f"{kind}.log")
            self.workers[kind] = worker
            self.once(f"about/{kind}", lambda: worker("about"))
            if kind in self.warm:
                self.warm[kind](worker)
        return self.workers[kind]

    def close(self) -> None:
        """End all workers: a part leaves nothing behind that could disturb the next."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()
        self.warm.clear()

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """The measurement of that name, made now unless it is there already."""
        if key not in self.raw:
            value = measure()
            self.raw[key] = value
            half = self.path.with_suffix(".part")
            half.write_text(json.dumps(self.raw, indent=1), encoding="utf-8")
            half.replace(self.path)
            took = (
                f"{value['seconds']:8.2f} s"
                if isinstance(value, dict) and "seconds" in value
                else ""
            )
            print(f"{datetime.now():%H:%M:%S} {key:42} {took}", flush=True)
        return self.raw[key]

    def ask(self, key: str, kind: str, do: str, **given: Any) -> Any:
        return self.once(key, lambda: self.worker(kind)(do, **given))

    def turns(self, repetition: int, entries: Sequence[tuple[str, str, str, Data]]) -> None:
        """Measure the entries (key, kind, command, arguments), every other time in reverse."""
        for key, kind, do, given in entries if repetition % 2 == 0 else entries[::-1]:
            self.ask(f"{key}/{repetition}", kind, do, **given)

    # What every part needs.

    def setup(self) -> None:
        self.once("started", lambda: datetime.now(UTC).isoformat(timespec="seconds"))
        self.model = self.ask("folder", "ours", "folder")["folder"]
        self.names = self.ask("names", "ours", "names")

    def prompts(
        self, names: Sequence[Any], mark: str, form: str = "choice+motivation", length: int = -1
    ) -> list[Data]:
        """Prompts of scenarios; `mark` makes them texts that no worker has read before."""
        length = self.mode.length if length < 0 else length
        key = f"prompts/{form}/{length}/{mark}/{len(names)}"
        found: list[Data] = self.once(
            key,
            lambda: self.worker("ours")(
                "prompts", scenarios=list(names), form=form, length=length, mark=mark
            ),
        )
        return found

    def plain(self) -> list[Any]:
        return [n for n in self.names if n[0] == "in_sample"]

    def each_context(self) -> list[Any]:
        """One scenario of each context, then of each again with another game."""
        firsts = {n[1]: n for n in self.names[::-1]}
        return list(firsts.values())


# --- parts ----------------------------------------------------------------------------------------


def sampling(b: Bench) -> None:
    """Answers of up to 64 tokens: ours, generate, vLLM."""
    kinds = ("ours", "transformers", "vllm")
    warm = b.prompts(b.each_context()[:1], "Warm-up.")[0]["tokens"]
    where = {"ours": {}, "transformers": {"path": b.model}, "vllm": {"path": b.model}}
    for kind in kinds:
        b.warm[kind] = lambda w, kind=kind: w(
            "sample", tokens=[warm], n=2, new=4, seed=1, **where[kind]
        )
    greedy = b.prompts(b.each_context()[-1:], "Greedy.")[0]["tokens"]
    for kind in kinds:
        given = {"tokens": [greedy], "n": 1, "new": b.mode.new, "seed": 1, "temperature": 0.0}
        b.ask(f"sampling/greedy/{kind}", kind, "sample", **given, **where[kind])
    sizes = [("short", *b.mode.short, 1)]
    if b.mode.long:
        sizes.append(("long", b.mode.answers, b.mode.new, b.mode.repetitions))
    for size, n, new, repetitions in sizes:
        for r in range(repetitions):
            name = b.each_context()[r % len(b.each_context())]
            tokens = b.prompts([name], f"{size.title()} {r + 1}.")[0]["tokens"]
            given = {"tokens": [tokens], "n": n, "new": new, "seed": 100 + r}
            b.turns(
                r,
                [(f"sampling/{size}/{k}", k, "sample", {**given, **where[k]}) for k in kinds],
            )
    tokens = b.prompts(b.each_context()[:1], "Profile.")[0]["tokens"]
    b.ask(
        "sampling/profile", "ours", "profile", what="sample", tokens=[tokens],
        n=b.mode.short[0], new=b.mode.short[1], seed=1,
    )  # fmt: skip


def choices(b: Bench) -> None:
    """Choices only, many draws of the training scenarios."""
    names = b.plain()[: b.mode.scenarios]
    warm = b.prompts(names[:1], "Warm-up.", "choice")
    b.warm["ours"] = lambda w: w("choices", asked=warm, n=2, new=8, seed=1)
    b.warm["transformers"] = lambda w: w(
        "pipeline", path=b.model, texts=[warm[0]["text"]], new=8, seed=1
    )
    for r in range(b.mode.repetitions):
        asked = b.prompts(names, f"{r + 1}.", "choice")
        step = max(1, len(asked) // b.mode.pipeline)
        texts = [p["text"] for p in asked[::step][: b.mode.pipeline]]
        b.turns(
            r,
            [
                (
                    "choices/ours", "ours", "choices",
                    {"asked": asked, "n": b.mode.draws, "new": 8, "seed": 7 + r},
                ),
                (
                    "choices/pipeline", "transformers", "pipeline",
                    {"path": b.model, "texts": texts, "new": 8, "seed": 7 + r},
                ),
            ],
        )  # fmt: skip


def readout(b: Bench) -> None:
    """Exact probabilities of C and D, and whether they are the harness's."""
    warm = b.prompts(b.plain()[:1], "Warm-up.", "choice")
    b.warm["ours"] = lambda w: w("readout", asked=warm)
    b.warm["lm-eval"] = lambda w: w("readout", path=b.model, asked=warm, options=["C", "D"])
    sizes = [("short", b.plain()[: 2 if b.mode.name == "tiny" else 12], b.mode.length, 1)]
    if b.mode.long:
        some = b.names[:3] if b.mode.name == "tiny" else b.names
        sizes.append(("long", some, b.mode.length, min(2, b.mode.repetitions)))
        sizes.append(("plain", some, 0, 1))
    for size, names, length, repetitions in sizes:
        for r in range(repetitions):
            asked = b.prompts(names, f"{size.title()} {r + 1}.", "choice", length)
            peer = {"path": b.model, "asked": asked, "options": ["C", "D"]}
            b.turns(
                r,
                [
                    (f"readout/{size}/ours", "ours", "readout", {"asked": asked}),
                    (f"readout/{size}/lm-eval", "lm-eval", "readout", peer),
                ],
            )
    # Ours also says that the option ends there: between P(C) and P(C, then the closing quote and brace).
    short = b.prompts(sizes[0][1], "Short 1.", "choice")
    b.ask(
        "readout/closed", "lm-eval", "readout", path=b.model, asked=short, options=['C"}', 'D"}']
    )  # fmt: skip


def llamacpp(b: Bench) -> None:
    """Our way to llama.cpp against its server alone."""
    kinds = ("llamacpp", "llamacpp-server")
    warm = b.prompts(b.each_context()[:1], "Warm-up.")[0]["messages"]
    for kind in kinds:
        b.warm[kind] = lambda w: w("sample", messages=warm, n=2, new=4, seed=1)
    for r in range(b.mode.repetitions + (b.mode.name == "short")):
        name = b.each_context()[r % len(b.each_context())]
        messages = b.prompts([name], f"{r + 1}.")[0]["messages"]
        given = {"messages": messages, "n": b.mode.answers, "new": b.mode.new, "seed": 11 + r}
        b.turns(r, [(f"llamacpp/{k}", k, "sample", given) for k in kinds])


def lora(b: Bench) -> None:
    """LoRA steps on the same rows."""
    g = b.mode.rows
    answers = b.ask(
        "lora/answers", "ours", "teacher_answers", n=g * (b.mode.repetitions + 1), about=60
    )
    warm = b.prompts(b.each_context()[:1], "Warm-up.")[0]["tokens"]
    b.warm["ours"] = lambda w: w("step", prompt=warm, answers=answers[-2:], group=2)
    # The peer's batch size: the faster one.
    batches = (1, min(4, g))
    for size in batches:
        b.ask(
            f"lora/batch/{size}", "trl", "step",
            path=b.model, prompt=warm, answers=answers[: min(4, g)], batch=size,
        )  # fmt: skip
    best = min(batches, key=lambda size: float(b.raw[f"lora/batch/{size}"]["seconds"]))
    for r in range(b.mode.repetitions):
        name = b.each_context()[r % len(b.each_context())]
        prompt = b.prompts([name], f"{r + 1}.")[0]["tokens"]
        rows = answers[g * r : g * (r + 1)]
        if f"lora/ours/{r}" not in b.raw:
            b.worker("ours")("fresh_lora")
        b.turns(
            r,
            [
                ("lora/ours", "ours", "step", {"prompt": prompt, "answers": rows, "group": g}),
                (
                    "lora/trl", "trl", "step",
                    {"path": b.model, "prompt": prompt, "answers": rows, "batch": best},
                ),
            ],
        )  # fmt: skip


def unlike(b: Bench, number: int) -> list[list[int]]:
    """Prompts of four contexts that have nothing in common but the chat template."""
    some = b.each_context()[:4]
    return [b.prompts([name], f"{'ABCD'[i]}{number}.")[0]["tokens"] for i, name in enumerate(some)]


def peak(b: Bench) -> None:
    """Which share of the machine's matrix product rate reading and training reach."""
    g = b.mode.rows
    answers = b.ask("peak/answers", "ours", "teacher_answers", n=g, about=60)
    warm = b.prompts(b.each_context()[:1], "Warm-up.")[0]["tokens"]

    def ready(w: Worker) -> None:
        w("prefill", tokens=[warm])
        w("step", prompt=warm, answers=answers, group=g)

    b.warm["ours"] = ready
    for r in range(b.mode.peaks):
        tokens = unlike(b, r + 1)
        step = {"prompt": tokens[0], "answers": answers, "group": g}
        b.ask(f"peak/matmul/before/{r}", "ours", "matmul")
        b.ask(f"peak/prefill/{r}", "ours", "prefill", tokens=tokens)
        b.ask(f"peak/matmul/between/{r}", "ours", "matmul")
        b.ask(f"peak/train/{r}", "ours", "step", **step)
        b.ask(f"peak/matmul/after/{r}", "ours", "matmul")
    total = b.mode.length + sum(map(len, answers))
    b.ask("peak/shapes/prefill", "ours", "shapes", tokens=b.mode.length)
    b.ask("peak/shapes/train", "ours", "shapes", tokens=total)
    last = unlike(b, 0)
    b.ask("peak/profile/prefill", "ours", "profile", what="prefill", tokens=last)
    b.ask(
        "peak/profile/train", "ours", "profile",
        what="train", prompt=last[0], answers=answers, group=g,
    )  # fmt: skip


def replay(b: Bench) -> None:
    """All chapters from the shipped ledger, in a folder of their own."""

    def run() -> Data:
        with tempfile.TemporaryDirectory() as runs:
            environment = {**os.environ, "TOM_RUNS": runs, "PYTHONPATH": str(ROOT)}
            eight = [f"{number:02}" for number in range(1, 9)]
            command = [sys.executable, "-m", "tomlib.cli", "run", *eight]
            start = time.perf_counter()
            done = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise SystemExit(f"bench: replay: {done.stderr.strip().splitlines()[-1]}")
            asked = [*Path(runs).rglob("*.jsonl"), *Path(runs).rglob("*.safetensors")]
            if asked:
                raise SystemExit(f"bench: replay: not a replay, it asked a model ({asked[0].name})")
            chapters = len(list(Path(runs).rglob("notebooks/*.ipynb")))
        return {"seconds": seconds, "chapters": chapters}

    for r in range(b.mode.repetitions):
        b.once(f"replay/{r}", run)


def scaling(b: Bench) -> None:
    """What cost depends on: draws, scenarios, answers per prompt."""
    names = b.plain()
    warm = b.prompts(b.each_context()[:1], "Warm-up.", "choice")
    b.warm["ours"] = lambda w: w("choices", asked=warm, n=2, new=8, seed=1)
    m = b.mode
    for n in m.scaled_draws:
        asked = b.prompts(names[:1], f"Draws {n}.", "choice")
        b.ask(f"scaling/draws/{n}", "ours", "choices", asked=asked, n=n, new=8, seed=n)
    for n in m.scaled_answers:
        tokens = b.prompts(names[:1], f"Answers {n}.")[0]["tokens"]
        b.ask(f"scaling/answers/{n}", "ours", "sample", tokens=[tokens], n=n, new=m.new, seed=n)
    for n in m.scaled_scenarios:
        asked = b.prompts(names[:n], f"Scenarios {n}.", "choice")
        b.ask(
            f"scaling/scenarios/{n}", "ours", "choices", asked=asked, n=m.draws, new=8, seed=n
        )  # fmt: skip
    answers = b.ask("scaling/rows", "ours", "teacher_answers", n=max(m.scaled_groups), about=60)
    prompt = b.prompts(names[:1], "Groups.")[0]["tokens"]
    b.once(
        "scaling/ready",
        lambda: b.worker("ours")("step", prompt=prompt, answers=answers[:1], group=1),
    )
    for g in m.scaled_groups:
        b.ask(
            f"scaling/groups/{g}", "ours", "step", prompt=prompt, answers=answers[:g], group=g
        )  # fmt: skip


PARTS: dict[str, Callable[[Bench], None]] = {
    "peak": peak,
    "replay": replay,
    "llamacpp": llamacpp,
    "choices": choices,
    "lora": lora,
    "sampling": sampling,
    "readout": readout,
    "scaling": scaling,
}
ROWS_OF = {
    "peak": ("peak_prefill", "peak_training"),
    "replay": ("replay_seconds",),
    "llamacpp": ("llamacpp_overhead",),
    "choices": ("choices_vs_pipeline",),
    "lora": ("lora_vs_trl",),
    "sampling": ("sample_vs_generate", "sample_vs_vllm"),
    "readout": ("readout_vs_lm_eval",),
    "scaling": (),
}


# --- from measurements to rows --------------------------------------------------------------------


def series(raw: Data, key: str) -> list[Data]:
    """The repetitions of a measurement, in order."""
    found = []
    while f"{key}/{len(found)}" in raw:
        found.append(raw[f"{key}/{len(found)}"])
    return found


def compared(ours: Sequence[float], peer: Sequence[float], **more: Any) -> Data:
    """A row: rates of both, repetition by repetition."""
    return {
        "ours": list(ours),
        "peer": list(peer),
        "ratios": [a / b for a, b in zip(ours, peer, strict=True)],
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def rate(measured: Sequence[Data], what: str) -> list[float]:
    return [x[what] / x["seconds"] for x in measured]


def versus(
    raw: Data, id: str, part: str, ours: str, peer: str, what: str, **said: Any
) -> dict[str, Data]:
    """The row of a part: our rate of something beside the peer's, where both are measured."""
    a, b = series(raw, f"{part}/{ours}"), series(raw, f"{part}/{peer}")
    if not a or len(a) != len(b):
        return {}
    if what == "scenarios":
        a, b = ([x | {what: len(x.get("p", x.get("logp")))} for x in side] for side in (a, b))
        said["size"] = f"{a[0][what]} scenarios"
    if what == "tokens":
        said["tokens"] = [[x[what], y[what]] for x, y in zip(a, b, strict=True)]
    return {id: compared(rate(a, what), rate(b, what), **said)}


def agreement(a: Sequence[int], b: Sequence[int]) -> Data:
    """How far two greedy answers are the same."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return {"equal": list(a) == list(b), "same_tokens": same, "tokens": max(len(a), len(b))}


def evaluate(raw: Data, mode: Mode) -> Data:
    """What a bench's raw measurements say: rows with their repetitions, checks, shares, the curve."""
    rows: Data = {}
    short: Data = {}
    checks: Data = {}
    for size, into in (("long", rows), ("short", short)):
        n, new = (mode.answers, mode.new) if size == "long" else mode.short
        told = f"{n} answers of up to {new} tokens"
        for id, kind in (("sample_vs_generate", "transformers"), ("sample_vs_vllm", "vllm")):
            into |= versus(raw, id, f"sampling/{size}", "ours", kind, "tokens", size=told)
        into |= versus(raw, "readout_vs_lm_eval", f"readout/{size}", "ours", "lm-eval", "scenarios")
    for kind in ("transformers", "vllm"):
        if f"sampling/greedy/{kind}" in raw:
            checks[f"greedy_{kind}"] = agreement(
                raw["sampling/greedy/ours"]["ids"], raw[f"sampling/greedy/{kind}"]["ids"]
            )
    told = f"{mode.draws} draws of {mode.scenarios} scenarios"
    rows |= versus(raw, "choices_vs_pipeline", "choices", "ours", "pipeline", "draws", size=told)
    if "choices_vs_pipeline" in rows:
        timed = raw["choices/pipeline/0"]["draws"]
        rows["choices_vs_pipeline"] |= {"timed": timed, "all": mode.draws * mode.scenarios}
    told = f"{mode.answers} answers of up to {mode.new} tokens"
    rows |= versus(
        raw, "llamacpp_overhead", "llamacpp", "llamacpp", "llamacpp-server", "tokens", size=told
    )
    rows |= versus(
        raw, "lora_vs_trl", "lora", "ours", "trl", "rows", size=f"{mode.rows} rows a step"
    )
    if "lora_vs_trl" in rows:
        seconds = {s: raw.get(f"lora/batch/{s}", {"seconds": 1e9})["seconds"] for s in (1, 4)}
        rows["lora_vs_trl"]["batch"] = min(seconds, key=lambda s: seconds[s])
        ours, peer = series(raw, "lora/ours"), series(raw, "lora/trl")
        loss = [[a["loss"], b["loss"]] for a, b in zip(ours, peer, strict=True)]
        checks["loss_trl"] = {
            "losses": loss,
            "largest_relative_difference": max(abs(a - b) / b for a, b in loss),
        }
    for id, what, sides in (
        ("peak_prefill", "prefill", ("before", "between")),
        ("peak_training", "train", ("between", "after")),
    ):
        ours = series(raw, f"peak/{what}")
        around = [series(raw, f"peak/matmul/{side}") for side in sides]
        if ours and all(len(x) >= len(ours) for x in around):
            limit = [(x["rate"] + y["rate"]) / 2e9 for x, y in zip(*around, strict=False)]
            rows[id] = compared(
                [x["flops"] / x["seconds"] / 1e9 for x in ours], limit[: len(ours)], size=""
            )
    done = series(raw, "replay")
    if done:
        rows["replay_seconds"] = compared([x["seconds"] for x in done], [1.0] * len(done))
        rows["replay_seconds"] |= {"size": f"{done[0]['chapters']} chapters", "peer": []}
    closed = raw.get("readout/closed")
    first = raw.get("readout/short/ours/0")
    letters = raw.get("readout/short/lm-eval/0")
    if closed and first and letters:
        from math import exp

        gaps, over = [], []
        for p, open_, shut in zip(first["p"], letters["logp"], closed["logp"], strict=True):
            theirs = exp(open_[0]) / (exp(open_[0]) + exp(open_[1]))
            gaps.append(abs(p[0] / (p[0] + p[1]) - theirs))
            over += [
                max(exp(s) - x, x - exp(o), 0.0) for x, o, s in zip(p, open_, shut, strict=True)
            ]
        checks["readout_lm_eval"] = {
            "scenarios": len(gaps),
            "largest_gap_p_cooperate": max(gaps),
            "largest_excess": max(over),
            "same_tokens": letters["same_tokens"],
        }
    measured: Data = {"rows": rows, "short": short, "checks": checks}
    plain = [series(raw, f"readout/plain/{k}") for k in ("ours", "lm-eval")]
    if all(plain):
        measured["readout_plain"] = {
            "ratio": plain[1][0]["seconds"] / plain[0][0]["seconds"],
            "scenarios": len(plain[0][0]["p"]),
        }
    where: Data = {}
    for what, key in (
        ("sampling", "sampling/profile"),
        ("prefill", "peak/profile/prefill"),
        ("train", "peak/profile/train"),
    ):
        if key in raw:
            where[what] = raw[key]
    for what in ("prefill", "train"):
        if f"peak/shapes/{what}" in raw and f"peak/matmul/after/{mode.peaks - 1}" in raw:
            limit_now = raw[f"peak/matmul/after/{mode.peaks - 1}"]["rate"]
            where[f"shapes_{what}"] = raw[f"peak/shapes/{what}"]["rate"] / limit_now
    measured["where"] = where
    curve = {
        kind: {
            key.rsplit("/", 1)[1]: value["seconds"]
            for key, value in raw.items()
            if key.startswith(f"scaling/{kind}/")
        }
        for kind in ("draws", "answers", "scenarios", "groups")
    }
    if all(curve.values()):
        measured["scaling"] = curve
    kinds = sorted({k.split("/")[1] for k in raw if k.startswith("about/")})
    measured["versions"] = {k: raw[f"about/{k}"] for k in kinds}
    cpu = [
        v["cpu_seconds"] / v["seconds"]
        for k, v in raw.items()
        if isinstance(v, dict) and v.get("cpu_seconds") and k.startswith(("sampling/", "peak/"))
    ]
    measured["machine"] = machine() | {"cores_used": median(cpu) if cpu else None}
    return measured


def machine() -> Data:
    """Processor, cores, memory, system."""
    name = platform.processor() or platform.machine()
    flags = ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            if key == "flags":
                flags = value
    except OSError:
        pass
    has = [x for x in ("avx2", "fma", "avx512f", "amx_tile") if f" {x} " in f" {flags} "]
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "instructions": " ".join(has),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def merged(before: Data, now: Data, mode: Mode) -> Data:
    """A bench's findings put into those of earlier ones: what it measured replaces what was there."""
    out = {**before, **{k: v for k, v in now.items() if v}}
    for key in ("rows", "short", "checks", "where", "versions"):
        out[key] = {**before.get(key, {}), **now.get(key, {})}
    for row in now["rows"].values():
        row["mode"] = mode.name
    # A curve of the full bench is not replaced by one with fewer points.
    if mode.name == "short" and "scaling" in before:
        out["scaling"] = before["scaling"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=MODES, default="short")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[], metavar="PART")
    parser.add_argument("--repetitions", type=int, help="in place of the mode's")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-bench")
    parser.add_argument("--write", action="store_true", help="only write the tables anew")
    a = parser.parse_args()
    kept = HERE / "measured.json"
    before: Data = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    if a.write:
        write(before, HERE)
        return
    mode = MODES[a.mode]
    if a.repetitions:
        mode = replace(mode, repetitions=a.repetitions)
    folder = ROOT / "_build" / "bench" / mode.name
    folder.mkdir(parents=True, exist_ok=True)
    b = Bench(mode, folder, a.peers)
    begin = time.monotonic()
    try:
        for name in a.only or PARTS:
            start = time.monotonic()
            b.setup()
            PARTS[name](b)
            b.close()
            print(f"--- {name}: {time.monotonic() - start:.0f} s", flush=True)
    except KeyboardInterrupt:
        raise SystemExit("bench: stopped; the same command goes on from here") from None
    finally:
        b.close()
    to = folder if mode.name == "tiny" else HERE
    measured = merged({} if mode.name == "tiny" else before, evaluate(b.raw, mode), mode)
    write(measured, to)
    b.path.rename(b.path.with_name(f"raw-{datetime.now():%Y%m%d-%H%M%S}.json"))
    for id, row in results(measured).items():
        mark = "ok " if row["met"] else "low" if row["better"] == "higher" else "high"
        print(f"{mark:4} {id:22} {row['ratio']:>9.3f}  target {row['target']:g}")
    for id, row in measured["short"].items():
        print(f"     {id:22} {median(row['ratios']):>9.3f}  ({row['size']})")
    print(f"{to / 'RESULTS.md'} written; {time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
