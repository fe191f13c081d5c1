"""The games: kinds, equilibria against brute force, validation."""

import doctest
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tomlib import games
from tomlib.errors import TomError
from tomlib.games import KINDS, PublicGoodsGame, TwoPlayerGame, payoff_order

PAPER = {
    "prisoners_dilemma": (5, 2, 10, 3),
    "prisoners_delight": (10, 3, 5, 2),
    "stag_hunt": (10, 2, 5, 3),
    "snowdrift": (5, 3, 10, 2),
}
ORDERS = [
    dict(zip(letters, (4, 3, 2, 1), strict=True))
    for letters in itertools.permutations("RSTP")
    if ">".join(letters) in KINDS.values()
]


def test_doctests() -> None:
    assert doctest.testmod(games).failed == 0


@pytest.mark.parametrize(("name", "payoffs"), PAPER.items())
def test_kind_of_the_papers_games_also_when_scaled(name: str, payoffs: tuple[int, ...]) -> None:
    game = TwoPlayerGame(name, *payoffs)
    assert game.kind == name
    scaled = game.scaled(2)
    assert (scaled.kind, scaled.factor) == (name, 2)
    assert scaled.payoffs == tuple(2 * value for value in payoffs)
    assert scaled.pure_nash() == game.pure_nash()
    assert scaled.mixed_nash() == pytest.approx(game.mixed_nash())
    assert scaled.scaled(1.5).factor == 3


def test_kinds_are_all_symmetric_games_once_up_to_the_names_of_the_actions() -> None:
    swapped = {
        ">".join(order.translate(str.maketrans("RPST", "PRTS"))[::2]) for order in KINDS.values()
    }
    assert len(KINDS) == len(set(KINDS.values())) == 12
    assert not swapped & set(KINDS.values())


@pytest.mark.parametrize("payoffs", ORDERS)
def test_equilibria_and_optima_against_brute_force(payoffs: dict[str, int]) -> None:
    game = TwoPlayerGame("g", **payoffs)
    pay = game.payoff
    brute = [
        (a, b)
        for a in "CD"
        for b in "CD"
        if all(pay(x, b) <= pay(a, b) and pay(x, a) <= pay(b, a) for x in "CD")
    ]
    assert game.pure_nash() == brute
    dominant = [a for a in "CD" if all(pay(a, b) > pay(x, b) for b in "CD" for x in "CD" if x != a)]
    assert game.dominant() == (dominant[0] if dominant else None)
    p = game.mixed_nash()
    assert (p is None) == bool(dominant)
    if p is not None:
        assert 0 < p < 1
        assert p * game.R + (1 - p) * game.S == pytest.approx(p * game.T + (1 - p) * game.P)
    best = max(pay(a, b) + pay(b, a) for a in "CD" for b in "CD")
    assert {pay(a, b) + pay(b, a) for a, b in game.welfare_optimum()} == {best}
    assert set(game.welfare_optimum()) <= set(game.pareto_optima())


@given(st.tuples(*[st.integers(-100, 100)] * 4), st.floats(0.01, 100))
def test_order_survives_scaling(payoffs: tuple[int, int, int, int], k: float) -> None:
    order = payoff_order(*payoffs)
    if "=" not in order and order in KINDS.values():
        game = TwoPlayerGame("g", *payoffs)
        assert game.scaled(k).kind == game.kind


@pytest.mark.parametrize(
    ("payoffs", "says"),
    [
        ((5, 2, 10, True), "P must be a number"),
        ((5, 2, "10", 3), "T must be a number"),
        ((float("nan"), 2, 10, 3), "R must be a finite number"),
        ((5, float("-inf"), 10, 3), "S must be a finite number"),
        ((5, 2, 10**400, 3), "T is too large"),
        ((5, 2, 5, 3), "strict order"),
        ((3, 10, 2, 5), "none of the known kinds"),
    ],
)
def test_bad_payoffs(payoffs: tuple[float, ...], says: str) -> None:
    with pytest.raises(TomError, match=says) as error:
        TwoPlayerGame("odd", *payoffs)
    assert "'odd'" in str(error.value) and "\n" not in str(error.value)


def test_bad_scale() -> None:
    for k in (0, -2, float("nan"), True):
        with pytest.raises(TomError, match="scale"):
            TwoPlayerGame("g", 5, 2, 10, 3).scaled(k)


def test_public_goods_game_is_a_dilemma() -> None:
    game = PublicGoodsGame("public_goods", players=4, endowment=10, multiplier=2.5)
    assert game.mpcr == 0.625
    assert game.payoffs == (4, 10, 2.5)
    for others in itertools.product((0, 5, 10), repeat=3):
        pay = [game.payoff(own, others) for own in range(11)]
        assert max(range(11), key=pay.__getitem__) == game.nash() == 0
    everybody = [game.payoff(c, [c] * 3) for c in range(11)]
    assert max(range(11), key=everybody.__getitem__) == game.optimum() == 10
    assert PublicGoodsGame("g", 4, 10, 5).nash() == 10
    assert PublicGoodsGame("g", 4, 10, 0.5).optimum() == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ((1, 10, 2.5), "players"),
        ((4.0, 10, 2.5), "players"),
        ((True, 10, 2.5), "players"),
        ((4, 0, 2.5), "endowment"),
        ((4, 10, 0), "multiplier"),
        ((4, 10, 4), "multiplier"),
        ((4, 10, float("inf")), "multiplier"),
    ],
)
def test_bad_public_goods(fields: tuple[float, ...], says: str) -> None:
    with pytest.raises(TomError, match=says):
        PublicGoodsGame("g", *fields)  # type: ignore[arg-type]


def test_public_goods_payoff_refuses_impossible_contributions() -> None:
    game = PublicGoodsGame("g", 4, 10, 2.5)
    with pytest.raises(TomError, match="3 others"):
        game.payoff(5, [5, 5])
    with pytest.raises(TomError, match="between 0 and 10"):
        game.payoff(11, [5, 5, 5])
