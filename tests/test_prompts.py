"""Rendering: one function for asking, training and scoring."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tomlib.errors import TomError
from tomlib.games import TwoPlayerGame
from tomlib.prompts import ANSWERS, load_wording, messages, opening, prompt_id, wording_names
from tomlib.scenarios import find, root, scenarios


@pytest.mark.parametrize("name", wording_names())
def test_every_wording_states_all_four_payoffs_of_both_players(name: str) -> None:
    text = messages(find("IR/prisoners_dilemma"), "choice", load_wording(name))[1].content
    for number in ("5", "2", "10", "3"):
        assert str(text).count(number) >= 2, (name, number)


def test_messages_are_context_then_game_then_the_fixed_opening() -> None:
    wording = load_wording("replies")
    scenario = find("biz/stag_hunt")
    system, human, ai = messages(scenario, "choice+motivation", wording)
    assert [system.type, human.type, ai.type] == ["system", "human", "ai"]
    assert system.content == scenario.context.system.strip()
    assert ai.content == opening(scenario, "choice+motivation", wording) == '{"choice": "'
    assert "motivation" in str(human.content)


def test_prompt_ids_differ_wherever_the_prompt_does() -> None:
    wording = load_wording("replies")
    ids = [prompt_id(s, a, wording) for s in scenarios() for a in ANSWERS]
    assert len(set(ids)) == len(ids)


def test_scaled_prompts_differ_in_the_numbers_only() -> None:
    wording = load_wording("outcomes")
    plain, scaled = (
        str(messages(find("IR/snowdrift", split), "choice", wording)[1].content)
        for split in ("in_sample", "scaled_games")
    )
    strip = str.maketrans("", "", "0123456789")
    assert plain != scaled
    assert plain.translate(strip) == scaled.translate(strip)


def test_public_goods_prompt_states_its_numbers() -> None:
    text = str(messages(find("party/public_goods"), "choice", load_wording("replies"))[1].content)
    for said in ("4", "10", "2.5"):
        assert said in text


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load_wording("tabel"), "did you mean 'table'"),
        (lambda: opening(find("IR/snowdrift"), "choise", load_wording("table")), "'choice'"),
        (lambda: load_wording("table", prompts_from=Path("no/such")), "no such folder"),
    ],
)
def test_errors_name_the_nearest(call: object, says: str) -> None:
    with pytest.raises(TomError, match=says):
        call()  # type: ignore[operator]


def test_verbatim_prompts_stand_in_for_ours(tmp_path: Path) -> None:
    (tmp_path / "data" / "context").mkdir(parents=True)
    (tmp_path / "data" / "game").mkdir(parents=True)
    (tmp_path / "data" / "context" / "IR.txt").write_text("Their context {with braces}.")
    (tmp_path / "data" / "game" / "staghunt.txt").write_text("Their game.")
    (tmp_path / "data" / "game" / "staghunt_d.txt").write_text("Their doubled game.")
    wording = load_wording("replies", prompts_from=tmp_path)
    system, human, _ = messages(find("IR/stag_hunt"), "choice", wording)
    assert system.content == "Their context {with braces}."
    assert str(human.content).startswith("Their game.")
    doubled = messages(find("IR/stag_hunt", "scaled_games"), "choice", wording)[1]
    assert str(doubled.content).startswith("Their doubled game.")
    ours = prompt_id(find("IR/stag_hunt"), "choice", load_wording("replies"))
    assert prompt_id(find("IR/stag_hunt"), "choice", wording) != ours
    with pytest.raises(TomError, match="biz"):
        messages(find("biz/stag_hunt"), "choice", wording)


@pytest.mark.parametrize(
    "game", ["prisoners_dilemma", "prisoners_delight", "stag_hunt", "snowdrift"]
)
def test_copies_tell_the_same_game(game: str) -> None:
    """Every payoff that a wording states, read back out of its text."""

    def told(wording: str) -> dict[tuple[str, str], tuple[str, str]]:
        text = load_wording(wording).game_text(find(f"IR/{game}"))
        payoffs = {}
        for line in text.strip().splitlines()[1:]:
            (theirs,) = re.findall(r"If your coplayer chooses ([CD]):", line)
            for mine, me, them in re.findall(
                r"choosing ([CD]) gives you (\d+) points \(and your coplayer (\d+)\)", line
            ):
                payoffs[mine, theirs] = me, them
        return payoffs

    plain = told("replies")
    assert len(plain) == 4
    assert told("reordered") == plain
    other = {"C": "D", "D": "C"}
    assert told("relabelled") == {(other[a], other[b]): pay for (a, b), pay in plain.items()}
    assert load_wording("relabelled").relabelled and not load_wording("reordered").relabelled


def test_a_question_names_the_endowment() -> None:
    party = find("party/public_goods")
    for form in ANSWERS:
        said = [m.content for m in messages(party, form, load_wording("replies"))]
        assert "from 0 to 10>" in said[1]
        richer = replace(party, game=replace(party.game, endowment=25))
        assert "from 0 to 25>" in str(messages(richer, form, load_wording("replies"))[1].content)


@pytest.mark.parametrize("odd", ["{}", "{RS}", "{0}", "{x}", "{R!r}"])
def test_a_placeholder_that_is_no_payoff_is_named(tmp_path: Path, odd: str) -> None:
    whole = (root() / "data" / "scenarios" / "wordings.toml").read_text("utf-8")
    assert "{R}" in whole
    (tmp_path / "wordings.toml").write_text(whole.replace("{R}", "{R}" + odd), "utf-8")
    with pytest.raises(TomError, match=re.escape(f"the placeholder {odd} is unknown")):
        load_wording("replies", tmp_path)


@pytest.mark.parametrize(
    ("value", "said"),
    [(5.0, "5"), (2.5, "2.5"), (1234567, "1234567"), (10.1234567, "10.1234567"), (1e7, "10000000")],
)
def test_no_digit_of_a_payoff_is_lost(value: float, said: str) -> None:
    hunt = next(s for s in scenarios("in_sample") if s.game.name == "stag_hunt")
    assert isinstance(hunt.game, TwoPlayerGame)
    scenario = replace(hunt, game=replace(hunt.game, R=value, S=1, T=2, P=1.5))
    asked = " ".join(
        str(each.content) for each in messages(scenario, "choice", load_wording("replies"))
    )
    assert f"gives you {said} points" in asked
