"""Replay or run: what is in the ledger is not asked again, what is missing is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tomlib import collect as module
from tomlib.alignment import cooperation
from tomlib.collect import collect, plan, published_distribution, training_rows
from tomlib.errors import TomError
from tomlib.games import PublicGoodsGame
from tomlib.models import card
from tomlib.profiles import Run
from tomlib.readout import readout
from tomlib.scenarios import root, scenarios
from tomlib.stats import exact_agreement


def _fresh(run: Run) -> Run:
    run.__dict__.pop("ledger", None)
    return run


def _ask(run: Run, role: str) -> pd.DataFrame:
    return collect(run, role, run.scenarios("in_sample"), "choice", 1, progress=False)


def test_a_full_ledger_loads_no_model(
    new_smoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_smoke()
    scenarios = run.scenarios("in_sample")
    first = collect(run, "student", scenarios, "choice", 3, progress=False)
    module.close_engines()
    monkeypatch.setattr(module, "open_engine", lambda *a, **k: pytest.fail("a model was opened"))
    again = collect(_fresh(run), "student", scenarios, "choice", 3, progress=False)
    pd.testing.assert_frame_equal(first, again)
    fewer = collect(run, "student", scenarios, "choice", 2, progress=False)
    assert len(fewer) == 2 * len(scenarios)


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(
    new_smoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    run = new_smoke()
    scenarios = run.scenarios("in_sample")
    whole = collect(run, "student", scenarios, "choice+motivation", 4, progress=False)
    monkeypatch.setenv("TOM_RUNS", str(tmp_path / "second"))
    other = new_smoke()
    collect(other, "student", scenarios[:1], "choice+motivation", 2, progress=False)
    resumed = collect(_fresh(other), "student", scenarios, "choice+motivation", 4, progress=False)
    pd.testing.assert_frame_equal(whole.drop(columns="time"), resumed.drop(columns="time"))


def test_the_plan_counts_what_is_missing(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke()
    scenarios = run.scenarios("in_sample")
    collect(run, "student", scenarios[:1], "choice", 3, progress=False)
    table = plan(_fresh(run), "student", scenarios, "choice", 4)
    assert table["to_ask"].tolist() == [1] + [4] * (len(scenarios) - 1)
    assert (table["most_new_tokens"] == table["to_ask"] * run.profile.tokens_choice).all()


def test_conditions_do_not_mix(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke()
    one = run.scenarios("in_sample")[:1]
    collect(run, "student", one, "choice", 2, progress=False)
    for other in (
        run.changed(temperature=1.0),
        run.changed(wording="table"),
        run.changed(top_p=0.9),
        run.changed(tokens_choice=9),
    ):
        assert plan(other, "student", one, "choice", 2)["to_ask"].sum() == 2
    assert plan(run, "student", one, "choice+motivation", 2)["to_ask"].sum() == 2


def test_a_draw_goes_by_the_names_of_the_scenario_that_asks_for_it(
    new_smoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_smoke()
    one = run.scenarios("in_sample")[0]
    first = collect(run, "student", [one], "choice", 3, progress=False)
    module.close_engines()
    monkeypatch.setattr(module, "open_engine", lambda *a, **k: pytest.fail("a model was opened"))
    moved = replace(one, split="new_contexts", game=replace(one.game, name="renamed"))
    again = collect(_fresh(run), "student", [moved, one], "choice", 3, progress=False)
    assert again["split"].tolist() == ["new_contexts"] * 3 + ["in_sample"] * 3
    assert again["game"].tolist() == ["renamed"] * 3 + [one.game.name] * 3
    assert again["text"].tolist() == first["text"].tolist() * 2


def test_scenarios_that_say_the_same_are_asked_once(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke()
    one = run.scenarios("in_sample")[0]
    twin = replace(one, game=replace(one.game, name="twin"))
    both = collect(run, "student", [one, twin], "choice", 2, progress=False)
    assert both["text"].tolist()[:2] == both["text"].tolist()[2:]
    assert len(run.ledger.draws()) == 2


def test_a_choice_without_reasons_trains_as_the_form_asks(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke(teacher_answer="choice", n_teacher=60)
    frame = training_rows(run, "family", progress=False)
    assert set(frame["text"]) <= {'C"}', 'D"}'} and frame["ended"].all()
    held = run.ledger.draws()
    assert frame["weight"].sum() == held["outcome"].eq("ok").sum() > 0


def test_sampled_choices_fit_the_exact_probabilities(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke()
    scenarios = run.scenarios("in_sample")
    draws = collect(run, "student", scenarios, "choice", 400, progress=False)
    exact = readout(run, "student", scenarios, "choice", progress=False)
    table = exact_agreement(cooperation(draws), exact)
    assert len(table) == len(scenarios)
    assert table["agrees"].all()
    assert exact["coverage"].between(0, 0.9).all()  # it often echoes "C or D", which is no choice
    unread = 1 - table["draws"] / 400
    assert (unread - (1 - table["coverage"])).abs().max() < 0.1


def test_public_goods_readout_is_a_distribution(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke()
    goods = readout(run, "student", run.scenarios("public_goods"), progress=False)
    assert goods["contribution"].tolist() == list(range(11))
    assert goods["p"].sum() == pytest.approx(1)
    draws = collect(run, "student", run.scenarios("public_goods"), "choice", 20, progress=False)
    assert all(isinstance(c, int) and 0 <= c <= 10 for c in draws["choice"].dropna())


def test_the_published_teacher_answers_from_its_counts(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke(contexts=[], games=[])
    draws = collect(run, "published-teacher", run.scenarios("in_sample"), "choice", 300)
    counts = cooperation(draws).set_index(["context", "game"])
    assert counts.loc[("IR", "prisoners_dilemma"), ["cooperate", "defect"]].tolist() == [77, 223]
    exact = readout(run, "published-teacher", run.scenarios("in_sample"))
    assert exact["p_cooperate"].iloc[0] == pytest.approx(77 / 300)
    goods = readout(run, "published-teacher", run.scenarios("public_goods"))
    assert goods.set_index("contribution")["p"].loc[7] == 1


def test_draws_carry_all_that_the_contract_names(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke()
    collect(run, "student", run.scenarios("in_sample")[:1], "choice", 1, progress=False)
    (shard,) = (run.folder / "draws").glob("*.jsonl")
    line = json.loads(shard.read_text("utf-8"))
    assert list(line) == [
        "model", "weights", "adapter", "split", "context", "game", "payoffs", "answer", "prompt",
        "temperature", "top_p", "repetition_penalty", "max_new_tokens", "seed", "index", "text",
        "choice", "outcome", "new_tokens", "engine", "time",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: collect(r, "student", r.scenarios("in_sample"), "choice", 0), "n = 0"),
        (lambda r: collect(r, "pupil", r.scenarios("in_sample"), "choice", 1), "role 'pupil'"),
        (lambda r: collect(r, "student", r.scenarios("in_sample"), "letter", 1), "answer form"),
        (lambda r: r.scenarios("insample"), "did you mean 'in_sample'"),
        (lambda r: readout(r, "student", r.scenarios("in_sample"), "reasoning+choice"), "last"),
        (lambda r: readout(r, "student", r.scenarios()), "not both"),
        (lambda r: r.changed(student="gpt"), None),
        (lambda r: _ask(r.changed(student="gpt"), "student"), "gpt"),
        (
            lambda r: _ask(r.changed(published_teacher=""), "published-teacher"),
            "names no published_teacher",
        ),
    ],
)  # fmt: skip
def test_bad_calls_are_clear_errors(
    new_smoke: Callable[..., Run], call: Callable[[Run], Any], says: str | None
) -> None:
    run = new_smoke()
    if says is None:
        call(run)
        return
    with pytest.raises(TomError, match=says):
        call(run)


def test_a_published_card_answers_from_its_own_table(tmp_path: Path) -> None:
    counts = pd.read_csv(root() / "data" / "published" / "cooperation_counts.csv")
    counts.assign(cooperate=1, defect=299).to_csv(tmp_path / "mine.csv", index=False)
    own = replace(
        card("llama2-70b-published"),
        counts="mine.csv",
        public_goods="",
        file=str(tmp_path / "cards.toml"),
    )
    scenario = next(s for s in scenarios("in_sample") if s.name == "IR/stag_hunt")
    assert published_distribution(own, scenario) == {"C": 1, "D": 299}
    assert published_distribution(card("llama2-70b-published"), scenario) == {"C": 120, "D": 180}


@pytest.mark.parametrize("name", ["llama2-7b-published", "llama2-7b-ft-published"])
def test_every_published_card_answers_every_scenario(name: str) -> None:
    for scenario in scenarios():
        assert sum(published_distribution(card(name), scenario).values()) in (295, 300)


def test_published_answers_are_to_the_papers_payoffs_alone() -> None:
    who = card("llama2-70b-published")
    for scenario in scenarios():
        published_distribution(who, scenario)  # as shipped, all of them are
        game = scenario.game
        other = (
            replace(game, multiplier=3)
            if isinstance(game, PublicGoodsGame)
            else replace(game, R=game.R + 0.5)
        )
        with pytest.raises(TomError, match="other payoffs than the game"):
            published_distribution(who, replace(scenario, game=other))


def test_a_context_still_to_be_written_is_not_asked(new_smoke: Callable[..., Run]) -> None:
    run = new_smoke()
    done = run.scenarios("in_sample")[0]
    half = replace(done, context=replace(done.context, system="You are [who you are]."))
    for ask in (collect, readout):
        with pytest.raises(TomError, match="still to be written"):
            ask(run, "student", [half], "choice")
    assert not any(run.folder.glob("draws/*")) and not any(run.folder.glob("readouts/*"))
