"""The estimate of `tom plan --measure` beside a real run."""

from collections.abc import Callable
from datetime import datetime

import pytest

from tomlib.costs import estimate, measure
from tomlib.profiles import Run
from tomlib.reproduce import do_step, read_manifest, steps


@pytest.mark.long
@pytest.mark.weights
def test_the_estimate_is_within_a_factor_of_two_of_a_real_run(
    new_smoke: Callable[..., Run],
) -> None:
    """Enough draws that the models' work counts, not the clock's whole seconds."""
    run = new_smoke(n=24, n_teacher=8, n_reasoning=4, max_steps=6, threads=1)
    told = estimate(run, measure(run), devices=2, price=3.0)
    for step in steps(run):
        if step.name.startswith(("draws", "adapter")):
            do_step(run, step.name, {})
    stages = read_manifest(run.folder)["stages"].values()
    took = sum(
        (datetime.fromisoformat(s["end"]) - datetime.fromisoformat(s["start"])).total_seconds()
        for s in stages
    )
    total = told.iloc[-1]
    spoken = int(run.ledger.draws()["new_tokens"].sum())
    assert 0.5 < total["tokens"] / spoken < 2, (told, spoken)
    assert total["tokens"] == pytest.approx(told["tokens"].iloc[:-1].sum(), abs=len(told))
    assert 0.5 < total["seconds"] / took < 2, (told, took)
    assert total["device_hours"] == pytest.approx(total["seconds"] / 1800)
    assert total["cost"] == pytest.approx(3 * total["device_hours"])
