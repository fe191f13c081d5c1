"""What a run costs: time, device hours and money, from rates that are measured.

`measure` does one context's share of the run in a folder of its own, step by step, with a clock;
`estimate` scales that to the whole. The draws measured are those of the run's own models, prompts,
answer forms and engines, on the machine that is asked.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from tomlib.collect import ARM_OF, close_engines, opened, plan, player, training_rows
from tomlib.finetune import settings, train
from tomlib.profiles import Run
from tomlib.reproduce import Work, asked, do, work

MEASURED_DRAWS = 32
"""Most draws per scenario that are made to measure a rate."""
MEASURED_STEPS = 3
"""Steps of a training that are made to measure one; the first is left out."""

KIND = ["model", "answer", "exact", "letter_only"]


def measure(run: Run) -> pd.DataFrame:
    """Do one in-sample context's share of a run, and time it.

    Nothing of it stays: a run's own ledger would answer instead of the model. The tuned student's
    rates are the student's.

    Returns:
        Columns `model, answer, exact, letter_only, scenarios, draws, tokens, seconds`: one row per
        kind of work, with the new tokens that its draws had; rows with answer `load` (seconds per
        loading) and `step` (seconds per training step, model `family` or `published`).

    Raises:
        TomError: What the run itself would raise.
    """
    first = run.scenarios("in_sample")[0].context.name
    rows: list[tuple[object, ...]] = []

    @contextmanager
    def timed(*kind: object) -> Iterator[list[int]]:
        begin, tokens = time.monotonic(), [0]
        yield tokens
        rows.append((*kind, tokens[0], time.monotonic() - begin))

    with tempfile.TemporaryDirectory() as folder:
        few = min(run.profile.n_teacher, MEASURED_DRAWS)
        # Additive targets take two contexts; counts train as long.
        changes = {
            "n_teacher": few,
            "max_steps": MEASURED_STEPS,
            "held_out": 0.0,
            "published_targets": "counts",
        }
        small = run.changed(contexts=(first,), sweep_contexts=(first,), **changes)
        small = replace(small, folder=Path(folder), shipped=None)
        close_engines()
        done: set[tuple[str, str, bool, bool]] = set()
        for w in work(small):
            kind = _kind(w)
            if w.role not in ("teacher", "student") or w.split != "in_sample" or kind in done:
                continue
            if w.role not in {model for model, *_ in done}:
                with timed(w.role, "load", False, False, 0, 0):
                    opened(small, player(small, w.role))
            done.add(kind)
            some = replace(w, n=min(w.n, MEASURED_DRAWS))
            scenarios = len(asked(small, w))
            with timed(*kind, scenarios, some.n) as tokens:
                answers = do(small, some)
                tokens[0] = int(answers["new_tokens"].sum()) if some.n else 0
        close_engines()
        for arm in small.arms:
            rows_of_arm = training_rows(small, arm, progress=False)
            if rows_of_arm.empty:
                continue
            log = train(small, arm, rows_of_arm, progress=False).log
            steps = log[log["step"] > 0]
            spent = steps["seconds"].iloc[-1] - (steps["seconds"].iloc[0] if len(steps) > 1 else 0)
            rows.append((arm, "step", False, False, 0, 0, 0, spent / max(1, len(steps) - 1)))
    return pd.DataFrame(rows, columns=[*KIND, "scenarios", "draws", "tokens", "seconds"])


def estimate(
    run: Run, rates: pd.DataFrame, *, devices: int = 1, price: float = 0.0
) -> pd.DataFrame:
    """What is left of a run, in time and money: draws, exact probabilities, trainings, loadings.

    Chapters and the book are not in it: they take minutes whatever the models. More draws of a
    scenario than were measured are taken to cost in proportion, which is too much where draws share
    their work: the estimate is rather high than low.

    Args:
        run: The run.
        rates: As from `measure`.
        devices: GPUs (or machines) that a job holds.
        price: Of a device hour, in any currency.

    Returns:
        Columns `model, part, tokens, seconds, device_hours, cost`, where tokens are new ones of
        answers; the last row is the sum.
    """
    known: Any = rates.set_index(KIND)
    rows: list[tuple[str, str, float, float]] = []
    for role in dict.fromkeys(w.role for w in work(run)):
        mine = [w for w in work(run) if w.role == role]
        teller = "teacher" if role == "teacher" else "student"
        arm = ARM_OF.get(role)
        if arm and (arm, "step", False, False) in known.index:
            step = float(known.loc[(arm, "step", False, False), "seconds"])
            rows.append((role, "training", 0.0, step * _steps(run, arm)))
        spent = tokens = 0.0
        for w in mine:
            rate = known.loc[(teller, *_kind(w)[1:])]
            scenarios = asked(run, w)
            share = len(scenarios) / float(rate["scenarios"])
            if w.n:
                left = plan(run, role, scenarios, w.answer, w.n, letter_only=w.letter_only)
                asked_for = float(rate["scenarios"] * rate["draws"])
                tokens += float(rate["tokens"]) / asked_for * float(left["to_ask"].sum())
                share *= left["to_ask"].sum() / left["wanted"].sum()
                share *= max(1.0, w.n / float(rate["draws"]))
            spent += float(rate["seconds"]) * share
        rows.append((role, "answers", tokens, spent))
        loading = float(known.loc[(teller, "load", False, False), "seconds"])
        rows.append((role, "loading", 0.0, loading))
    rows.append(("all", "", sum(row[2] for row in rows), sum(row[3] for row in rows)))
    table = pd.DataFrame(rows, columns=["model", "part", "tokens", "seconds"])
    table["tokens"] = table["tokens"].round().astype(int)
    table["device_hours"] = table["seconds"] / 3600 * devices
    table["cost"] = table["device_hours"] * price
    return table


def _kind(w: Work) -> tuple[str, str, bool, bool]:
    return w.role, w.answer, w.n == 0, w.letter_only


def _steps(run: Run, arm: str) -> int:
    """Optimizer steps of a training, from the rows that it will have at most."""
    how = settings(run, arm)
    scenarios = len(run.scenarios("in_sample"))
    rows = scenarios * (1 + len(run.copies))
    if how.batch_by_rows:
        rows = round(scenarios * run.profile.n_teacher * (1 - run.profile.held_out))
    steps = how.epochs * -(-rows // how.batch)
    return min(steps, how.max_steps) if how.max_steps else steps
