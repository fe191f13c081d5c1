"""What a run took: the cost of a chapter and of every step, as the run's manifest recorded it."""

from datetime import datetime
from typing import Any

import pandas as pd

from tomlib.collect import ARM_OF
from tomlib.profiles import CHAPTERS, PAGES, Run
from tomlib.reproduce import read_manifest, reads, work


def manifest(run: Run) -> dict[str, Any]:
    """The manifest of the run: the one that came with the book, else its own, else {}."""
    for folder in (run.shipped, run.folder):
        if folder is not None and (folder / "manifest.json").is_file():
            return read_manifest(folder)
    return {}


def steps(run: Run) -> pd.DataFrame:
    """Every step of the run that its manifest recorded.

    Returns:
        Columns `step, started` (UTC) and `seconds`, in the order in which they were done.
    """
    rows = []
    for name, stage in manifest(run).get("stages", {}).items():
        start, end = (datetime.fromisoformat(stage[key]) for key in ("start", "end"))
        rows.append((name, start, (end - start).total_seconds()))
    return pd.DataFrame(rows, columns=["step", "started", "seconds"])


def needs(run: Run, chapter: str) -> list[str]:
    """Names of the steps that a chapter builds on: draws, exact probabilities, trainings.

    A chapter with a tuned student needs all that leads to it, the training rows too.
    """
    used = [w for w in work(run) if reads(run, chapter, w)]
    roles = {w.role for w in used}
    trained = [
        r for r, arm in ARM_OF.items() if arm in run.arms and (r in roles or chapter[:2] == "03")
    ]
    rows = [w for w in work(run) if not w.letter_only and "tuned" in trained]
    return list(
        dict.fromkeys([*(w.name for w in [*rows, *used]), *(f"train {r}" for r in trained)])
    )


def _passed(run: Run, wanted: list[str], seconds: "pd.Series[float]") -> "pd.Series[float]":
    """What the wanted steps took; where contexts went to jobs of their own, each of these."""
    contexts = {s.context.name for s in run.scenarios()}
    kept = []
    for name in map(str, seconds.index):
        step, _, context = name.rpartition(" ")
        kept.append(name in wanted or (step in wanted and context in contexts))
    return seconds[kept]


def duration(seconds: float) -> str:
    """Seconds in words, as exact as a reader needs them.

    >>> duration(7.2), duration(95), duration(5400), duration(40000)
    ('7 s', '95 s', '90 min', '11.1 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cost_in_words(run: Run) -> str:
    """What the run's chapter costs: replayed, and with all that it builds on; in Markdown."""
    p = run.profile
    recorded = steps(run)
    if recorded.empty:
        return (
            f"**Cost.** No run of the profile `{p.name}` is recorded yet; "
            f"`tom plan --profile {p.name}` says what one asks for."
        )
    seconds = recorded.set_index("step")["seconds"]
    machine = manifest(run).get("machine", {})
    where = f"{machine.get('cores', '?')} cores, {machine.get('processor', 'unknown processor')}"
    text = f"**Cost**, as recorded by the run `{p.name}` on {where}:"
    own = seconds.get(f"chapter {run.chapter}")
    wanted = needs(run, run.chapter)
    parts = []
    if own is not None:
        replayed = (
            " replayed from the ledger, without any model" if wanted else ", without any model"
        )
        parts.append(f" {duration(own)}{replayed}")
    done = _passed(run, wanted, seconds)
    if len(done):
        longest = ", ".join(
            f"`{name}` {duration(took)}" for name, took in done.nlargest(3).items() if took >= 1
        )
        parts.append(
            f" {duration(done.sum())} for all draws, exact probabilities and trainings that it builds "
            f"on, when they were made (longest: {longest})"
        )
    return text + (";".join(parts) or " not this chapter") + "."


def chapters(run: Run) -> pd.DataFrame:
    """When each chapter and page was executed in the run, and how long that took.

    Returns:
        Columns `chapter, executed` (UTC), `seconds` (of the chapter alone, from a full ledger) and
        `seconds_built_on` (of the draws, exact probabilities and trainings that it needs).
    """
    recorded = steps(run).set_index("step")
    rows = []
    for chapter in (*CHAPTERS, *PAGES):
        name = f"chapter {chapter}"
        if name not in recorded.index:
            continue
        before = _passed(run, needs(run, chapter), recorded["seconds"]).sum()
        own = recorded.loc[name]
        rows.append((chapter, own["started"], own["seconds"], before))
    return pd.DataFrame(rows, columns=["chapter", "executed", "seconds", "seconds_built_on"])
