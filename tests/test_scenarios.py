"""Scenarios: the shipped ones, a user's own, and every way to get the files wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tomlib import scenarios as module
from tomlib.errors import TomError
from tomlib.games import KINDS, PublicGoodsGame, TwoPlayerGame
from tomlib.scenarios import (
    SPLITS,
    check_written,
    context_problems,
    find,
    load,
    nearest,
    new_context,
    new_game,
    root,
    scenarios,
)

SHIPPED = Path(__file__).parent.parent / "data" / "scenarios"

CONTEXT = """
[[context]]
name = "orchard"
title = "Two gardeners"
split = "new_contexts"
system = "You are a gardener."
"""
GAME = """
[[game]]
name = "late"
title = "Deadlock"
kind = "deadlock"
T = 10
P = 5.5
R = 3
S = 2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("contexts.toml", "games.toml"):
        shutil.copy(SHIPPED / name, tmp_path)
    return tmp_path


def add(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def fails(folder: Path, *says: str) -> None:
    with pytest.raises(TomError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in says:
        assert part in message, message


def test_the_papers_scenarios() -> None:
    counts = {split: len(scenarios(split)) for split in SPLITS}
    assert counts == {"in_sample": 20, "new_contexts": 12, "scaled_games": 20, "public_goods": 1}
    assert [c.name for c in load().contexts if c.split == "in_sample"] == [
        "IR",
        "biz",
        "environment",
        "team",
        "friendsharing",
    ]
    payoffs = {s.game.name: s.game.payoffs for s in scenarios("in_sample", "IR")}
    assert payoffs == {
        "prisoners_dilemma": (5, 2, 10, 3),
        "prisoners_delight": (10, 3, 5, 2),
        "stag_hunt": (10, 2, 5, 3),
        "snowdrift": (5, 3, 10, 2),
    }
    for plain, scaled in zip(scenarios("in_sample"), scenarios("scaled_games"), strict=True):
        assert scaled.context == plain.context
        assert scaled.game.name == plain.game.name
        assert scaled.game.payoffs == tuple(2 * value for value in plain.game.payoffs)
        assert scaled.name == f"{plain.name} x2"
    (party,) = scenarios("public_goods")
    assert party.name == "party/public_goods" and party.game_type == "public_goods"
    assert isinstance(party.game, PublicGoodsGame)
    assert party.game.payoffs == (4, 10, 2.5)


def test_keys_are_unique_and_scenarios_hash() -> None:
    every = scenarios()
    assert len({s.key for s in every}) == len({s.name for s in every}) == len(set(every)) == 53
    with pytest.raises(AttributeError):
        every[0].split = "other"  # type: ignore[misc]


def test_every_name_finds_its_scenario() -> None:
    for scenario in scenarios():
        assert find(scenario.name) == scenario
        plain = f"{scenario.context.name}/{scenario.game.name}"
        assert find(plain, split=scenario.split) == scenario


def test_selection_by_context_and_game() -> None:
    chosen = scenarios(["in_sample", "new_contexts"], ["IR", "sports"], "stag_hunt")
    assert [s.name for s in chosen] == ["IR/stag_hunt", "sports/stag_hunt"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: scenarios("insample"), "split 'insample' is unknown; did you mean 'in_sample'?"),
        (lambda: scenarios(contexts="ir"), "did you mean 'IR'?"),
        (lambda: scenarios(games=["snowdrift", "chicken"]), "game 'chicken' is unknown"),
        (lambda: scenarios("in_sample", "sports"), "no scenario has"),
        (lambda: find("IR/staghunt"), "did you mean 'IR/stag_hunt'?"),
        (lambda: find("sports/snowdrift", "in_sample"), "unknown in split in_sample"),
        (lambda: find("IR/stag_hunt", "training"), "split 'training' is unknown"),
    ],
)
def test_unknown_names(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TomError) as error:
        call()
    assert says in str(error.value)


def test_a_users_context_and_game_appear_in_the_splits(folder: Path) -> None:
    add(folder / "contexts.toml", CONTEXT)
    add(folder / "games.toml", GAME)
    counts = {split: len(scenarios(split, folder=folder)) for split in SPLITS}
    assert counts == {"in_sample": 25, "new_contexts": 20, "scaled_games": 25, "public_goods": 1}
    game = find("orchard/late", folder=folder).game
    assert isinstance(game, TwoPlayerGame)
    assert (game.kind, game.payoffs) == ("deadlock", (3, 2, 10, 5.5))
    assert find("IR/late x2", folder=folder).game.payoffs == (6, 4, 20, 11)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"new_contexts"', '"held_out"', "split 'held_out' is unknown; there are: in_sample"),
        ('"new_contexts"', '"newcontexts"', "did you mean 'new_contexts'?"),
        ('"new_contexts"', '"scaled_games"', "split 'scaled_games' is unknown"),
        ('title = "Two gardeners"\n', "", "the field 'title' is missing"),
        ('"You are a gardener."', '"  "', "system is empty"),
        ('"You are a gardener."', "3", "system must be a text, got a whole number"),
        ("system =", "sytem =", "unknown field 'sytem'; did you mean 'system'?"),
        ('"orchard"', '"biz"', "the name is taken"),
        ('"orchard"', '"BIZ"', "the name is taken"),
        ('"orchard"', '"a/b"', "name must start with a letter"),
        ('"orchard"', '"../../x"', "name must start with a letter"),
        ('"orchard"', "true", "name must be a text, got true or false"),
    ],
)
def test_wrong_context(folder: Path, old: str, new: str, says: str) -> None:
    add(folder / "contexts.toml", CONTEXT.replace(old, new))
    fails(folder, "contexts.toml, context 10", says)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("T = 10", "T = 4", "payoffs must satisfy T>P>R>S, got R=3 S=2 T=4 P=5.5; put them in"),
        ("T = 10", "T = 5.5", "payoffs must satisfy T>P>R>S"),
        ("T = 10", "T = nan", "T must be a finite number"),
        ("T = 10", "T = inf", "T must be a finite number"),
        ("T = 10", "T = true", "T must be a number, got true or false"),
        ("T = 10", 'T = "10"', "T must be a number, got '10'"),
        ("T = 10", "T = 0x" + "f" * 9000, "T must be a finite number"),
        ("T = 10", "T = 10\nU = 3", "unknown field 'U'"),
        ("S = 2\n", "", "the field 'S' is missing"),
        ('"deadlock"', '"staghunt"', "kind 'staghunt' is unknown; did you mean 'stag_hunt'?"),
        ('"late"', '"snowdrift"', "the name is taken"),
        ('"late"', '"public_goods"', "the name is taken"),
    ],
)
def test_wrong_game(folder: Path, old: str, new: str, says: str) -> None:
    add(folder / "games.toml", GAME.replace(old, new))
    entry = "public_goods 1" if "public_goods" in new else "game 5"
    fails(folder, f"games.toml, {entry}", says)


def test_the_entry_in_error_is_named(folder: Path) -> None:
    edit(folder / "games.toml", "R = 10\nS = 2\nT = 5\nP = 3", "R = 5\nS = 2\nT = 10\nP = 3")
    fails(folder, "games.toml, game 3 ('stag_hunt'): payoffs must satisfy R>T>P>S, got R=5 S=2")


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("games.toml", "factor = 2", "factor = 1", "[scaling]: factor must be"),
        ("games.toml", "factor = 2", "factor = 0", "[scaling]: factor must be"),
        ("games.toml", "factor = 2", "faktor = 2", "did you mean 'factor'?"),
        ("games.toml", "factor = 2", "factor = false", "factor must be a number"),
        ("games.toml", "[scaling]", "[scalling]", "did you mean 'scaling'?"),
        ("games.toml", "[scaling]\nfactor = 2", "", "[scaling] is missing"),
        ("games.toml", "[[game]]", "[game]", "not valid TOML"),
        ("games.toml", "players = 4", "players = 4.0", "players must be a whole number"),
        ("games.toml", "players = 4", "players = 1", "players must be a whole number of at least"),
        ("games.toml", "multiplier = 2.5", "multiplier = 4", "neither 1 nor the number of players"),
        ("games.toml", '"party"', '"partyy"', "did you mean 'party'?"),
        ("games.toml", '"party"', '"IR"', "belongs to split in_sample"),
        ("contexts.toml", 'name = "IR"', 'name = "IR', "not valid TOML: "),
        ("contexts.toml", "[[context]]", "[[contexts]]", "did you mean 'context'?"),
    ],
)
def test_wrong_file(folder: Path, file: str, old: str, new: str, says: str) -> None:
    edit(folder / file, old, new)
    fails(folder, file, says)


def test_a_public_goods_context_without_a_game_is_no_silent_drop(folder: Path) -> None:
    add(folder / "contexts.toml", CONTEXT.replace("new_contexts", "public_goods"))
    fails(folder, "games.toml: no [[public_goods]] is played in context 'orchard'")


def test_syntax_error_names_the_line(folder: Path) -> None:
    lines = (folder / "games.toml").read_text(encoding="utf-8").splitlines()
    (folder / "games.toml").write_text("\n".join(["x = = 1", *lines]), encoding="utf-8")
    fails(folder, "games.toml", "line 1")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"# ok\n\xff\xfe", "line 2 is not UTF-8"),
        (b"", "no [[public_goods]] is played in context 'party'"),
        (b"game = 3", "must be written as [[game]]"),
        (b"game = [3]", "game 1: must be written as [[game]]"),
        (b"x = " + b"[" * 100_000, "nested too deep"),
        (b"x = " + b"9" * 5000, "not valid TOML"),
    ],
)
def test_wrong_bytes(folder: Path, data: bytes, says: str) -> None:
    (folder / "games.toml").write_bytes(data)
    fails(folder, "games.toml", says)


def test_missing_file_and_byte_order_mark(folder: Path) -> None:
    text = (folder / "games.toml").read_bytes()
    (folder / "games.toml").write_bytes(b"\xef\xbb\xbf" + text)
    assert len(load(folder)) == 53
    (folder / "games.toml").unlink()
    fails(folder, "games.toml: no such file")
    (folder / "games.toml").mkdir()
    fails(folder, "games.toml: cannot be read")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_an_error_or_still_sound(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["games.toml", "contexts.toml"]))
    raw = (SHIPPED / name).read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 40)))
    (folder / name).write_bytes(raw[:start] + data.draw(st.binary(max_size=8)) + raw[stop:])
    try:
        loaded = load(folder)
    except TomError as error:
        assert f"{folder}/" in str(error) and "\n" not in str(error)
    else:
        assert len({s.key for s in loaded}) == len(loaded) > 0
    finally:
        (folder / name).write_bytes(raw)


def test_nearest_survives_long_names() -> None:
    assert nearest("x" * 1_000_000, ["a", "b"]) == "; there are: a, b"
    assert nearest("x", []) == "; there are none"


def test_root_is_this_checkout_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert root() == SHIPPED.parent.parent
    assert len(scenarios()) == 53


def test_an_installed_copy_finds_the_repository_it_runs_in(tmp_path: Path) -> None:
    site, clone, nowhere = tmp_path / "site", tmp_path / "clone", tmp_path / "nowhere"
    shutil.copytree(Path(module.__file__).parent, site / "tomlib")
    shutil.copytree(SHIPPED, clone / "data" / "scenarios")
    (clone / "tomlib").mkdir()
    (clone / "notebooks").mkdir()
    nowhere.mkdir()
    code = (
        "from tomlib.scenarios import root, TomError\n"
        "try:\n    print(root())\nexcept TomError as error:\n    print(error)"
    )

    def run(folder: Path) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert run(clone / "notebooks") == str(clone)
    assert "run from the repository root" in run(nowhere)


# --- templates ------------------------------------------------------------------------------------


def test_a_new_context_is_a_template_that_loads_and_says_what_it_lacks(folder: Path) -> None:
    path = new_context("orchestra", 'The "Two"', folder=folder)
    assert path == folder / "contexts.toml" and path.read_text("utf-8").startswith("# The social")
    assert [s.context.title for s in scenarios("new_contexts", "orchestra", folder=folder)] == [
        "The 'Two'"
    ] * 4
    assert "[who you are] is still to be written" in context_problems("orchestra", folder)
    models_would_see = [s for s in load(folder) if s.context.name == "orchestra"]
    with pytest.raises(
        TomError, match=r"'orchestra': \[who you are\] is still to be written; edit"
    ):
        check_written(models_would_see)
    edit(path, "[who you are]", "the leader of a section of an orchestra")
    edit(path, "[who the other one is]", "the leader of another section")
    edit(path, "[two or three things]", "the sound, the esteem of others and your place")
    (gap,) = context_problems("orchestra", folder)
    edit(path, gap.removesuffix(" is still to be written"), "You settle who plays the solo.")
    assert context_problems("orchestra", folder) == []
    check_written(load(folder))
    edit(path, "You settle who plays the solo.", "You settle who plays the solo." * 9)
    (problem,) = context_problems("orchestra", folder)
    assert "come within 20 %" in problem
    edit(path, "the solo.", "the solo. Take your time: ")
    edit(path, "The choice is made only once", "The choice is made once")
    assert "it never says 'only once'" in context_problems("orchestra", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_game_of_every_kind_has_its_order_and_the_papers_numbers(
    kind: str, folder: Path
) -> None:
    if kind in {game.kind for game in load(folder).games if isinstance(game, TwoPlayerGame)}:
        with pytest.raises(TomError, match=f"has the payoffs of '{kind}'.*give it others"):
            new_game("mine", kind, folder=folder)
        return
    new_game("mine", kind, folder=folder)
    game = find("IR/mine", folder=folder).game
    assert isinstance(game, TwoPlayerGame)
    assert game.kind == kind and sorted(game.payoffs) == [2, 3, 5, 10]


@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_scaled_game_is_no_new_one(factor: float, folder: Path) -> None:
    old = find("IR/snowdrift", folder=folder).game
    assert isinstance(old, TwoPlayerGame)
    with pytest.raises(TomError, match=r"'mine'.*is 'snowdrift' scaled.*give it other payoffs"):
        new_game("mine", old.kind, old.scaled(factor).payoffs, folder=folder)
    new_game("mine", old.kind, old.scaled(3).payoffs, folder=folder)


def test_what_does_not_fit_is_not_written(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for call in (
        lambda: new_context("IR", folder=folder),
        lambda: new_context("a b", folder=folder),
        lambda: new_context("bazaar", split="public_goods", folder=folder),
        lambda: new_game("snowdrift", "hero", folder=folder),
        lambda: new_game("late", "deadlock", (1, 2, 3, 4), folder=folder),
        lambda: new_game("late", "deadlock", (float("nan"), 2, 3, 4), folder=folder),
    ):
        with pytest.raises(TomError):
            call()
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    new_game("late", "deadlock", (3, 2, 10, 5.5), folder=folder)
    assert find("IR/late", folder=folder).game.payoffs == (3, 2, 10, 5.5)


def test_importing_needs_no_heavy_library() -> None:
    code = (
        "import sys, tomlib.answers, tomlib.games, tomlib.scenarios\n"
        "print([m for m in ('torch', 'transformers', 'langchain_core', 'pandas') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
