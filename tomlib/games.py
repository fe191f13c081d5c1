"""The games: symmetric two-player games in one shot, and the linear public goods game.

Actions are `"C"` (cooperate) and `"D"` (defect). Payoffs carry the customary letters: **R**eward
for (C, C), **S**ucker's payoff for C against D, **T**emptation for D against C, **P**unishment
for (D, D). A game is what the order of its four payoffs makes it:

>>> hunt = TwoPlayerGame("stag_hunt", R=10, S=2, T=5, P=3)
>>> hunt.order, hunt.kind
('R>T>P>S', 'stag_hunt')
>>> hunt.pure_nash(), hunt.mixed_nash()
([('C', 'C'), ('D', 'D')], 0.16666666666666666)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from tomlib.errors import TomError

Action = Literal["C", "D"]
Profile = tuple[Action, Action]

ACTIONS: tuple[Action, Action] = ("C", "D")

#: Kinds of symmetric 2x2 games, by the order of their payoffs. The first four are the paper's;
#: `leader` and `hero` are named in Rapoport (1967), the rest in Bruns (2015), "Names for Games".
KINDS: dict[str, str] = {
    "prisoners_dilemma": "T>R>P>S",
    "prisoners_delight": "R>T>S>P",
    "stag_hunt": "R>T>P>S",
    "snowdrift": "T>R>S>P",
    "deadlock": "T>P>R>S",
    "compromise": "T>P>S>R",
    "leader": "T>S>R>P",
    "hero": "S>T>R>P",
    "assurance": "R>P>T>S",
    "coordination": "R>P>S>T",
    "peace": "R>S>P>T",
    "harmony": "R>S>T>P",
}

_LARGEST = 1e9  # a payoff beyond this is a slip of the pen, and would lose digits in a prompt


def _number(name: str, field: str, value: object) -> None:
    """Refuse what is not a finite number of ordinary size; bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TomError(f"game {name!r}: {field} must be a number, got {value!r}")
    if not abs(value) <= _LARGEST:  # also true for NaN
        raise TomError(
            f"game {name!r}: {field} must be a finite number of at most {_LARGEST:g} in size, "
            f"got {value:g}"
            if isinstance(value, float)
            else f"game {name!r}: {field} is too large, use at most {_LARGEST:g}"
        )


def payoff_order(R: float, S: float, T: float, P: float) -> str:
    """Payoff letters from the highest to the lowest, with `=` between equals.

    >>> payoff_order(R=5, S=2, T=10, P=3)
    'T>R>P>S'
    >>> payoff_order(R=5, S=2, T=5, P=3)
    'R=T>P>S'
    """
    ranked = sorted({"R": R, "S": S, "T": T, "P": P}.items(), key=lambda item: -item[1])
    text = ranked[0][0]
    for (_, higher), (letter, value) in pairwise(ranked):
        text += ("=" if value == higher else ">") + letter
    return text


@dataclass(frozen=True)
class TwoPlayerGame:
    """A symmetric game of two players with the actions C and D and payoffs in points.

    `factor` tells by how much a game was scaled; it does not change its name or kind.

    Raises:
        TomError: a payoff is no finite number, or the order of the payoffs is none of `KINDS`.

    >>> game = TwoPlayerGame("prisoners_dilemma", R=5, S=2, T=10, P=3)
    >>> game.payoffs
    (5, 2, 10, 3)
    >>> game.dominant()
    'D'
    >>> TwoPlayerGame("flat", R=1, S=1, T=1, P=1)
    Traceback (most recent call last):
    ...
    tomlib.errors.TomError: game 'flat': payoffs must be in a strict order, got R=S=T=P
    """

    name: str
    R: float
    S: float
    T: float
    P: float
    title: str = ""
    factor: float = 1

    game_type: ClassVar[Literal["two_player"]] = "two_player"

    def __post_init__(self) -> None:
        for letter in "RSTP":
            _number(self.name, letter, getattr(self, letter))
        _number(self.name, "factor", self.factor)
        if "=" in self.order:
            raise TomError(
                f"game {self.name!r}: payoffs must be in a strict order, got {self.order}"
            )
        if self.order not in KINDS.values():
            known = ", ".join(f"{kind} {order}" for kind, order in KINDS.items())
            raise TomError(
                f"game {self.name!r}: the order {self.order} is none of the known kinds ({known}); "
                "name the actions the other way round (R with P, S with T) or change the payoffs"
            )

    @property
    def payoffs(self) -> tuple[float, float, float, float]:
        """(R, S, T, P) in points."""
        return (self.R, self.S, self.T, self.P)

    @property
    def order(self) -> str:
        """Order of the payoffs, such as `T>R>P>S`."""
        return payoff_order(*self.payoffs)

    @property
    def kind(self) -> str:
        """Key of `KINDS` that the order of the payoffs belongs to."""
        return next(kind for kind, order in KINDS.items() if order == self.order)

    def payoff(self, me: Action, other: Action) -> float:
        """Points to me when I play `me` and the other plays `other`.

        >>> TwoPlayerGame("snowdrift", R=5, S=3, T=10, P=2).payoff("D", "C")
        10
        """
        return {"CC": self.R, "CD": self.S, "DC": self.T, "DD": self.P}[me + other]

    def best_response(self, other: Action) -> Action:
        """My best action against `other`; unique, since the payoffs are in a strict order."""
        return "C" if self.payoff("C", other) > self.payoff("D", other) else "D"

    def dominant(self) -> Action | None:
        """The action that is better whatever the other does, if there is one.

        >>> TwoPlayerGame("prisoners_delight", R=10, S=3, T=5, P=2).dominant()
        'C'
        >>> TwoPlayerGame("snowdrift", R=5, S=3, T=10, P=2).dominant() is None
        True
        """
        against_c, against_d = self.best_response("C"), self.best_response("D")
        return against_c if against_c == against_d else None

    def pure_nash(self) -> list[Profile]:
        """Pairs of actions from which neither player gains by leaving alone.

        >>> TwoPlayerGame("snowdrift", R=5, S=3, T=10, P=2).pure_nash()
        [('C', 'D'), ('D', 'C')]
        """
        return [
            (mine, theirs)
            for mine, theirs in _PROFILES
            if mine == self.best_response(theirs) and theirs == self.best_response(mine)
        ]

    def mixed_nash(self) -> float | None:
        """P(C) of the symmetric equilibrium in properly mixed strategies, if there is one.

        It leaves the other indifferent: p R + (1 - p) S = p T + (1 - p) P.

        >>> TwoPlayerGame("snowdrift", R=5, S=3, T=10, P=2).mixed_nash()
        0.16666666666666666
        >>> TwoPlayerGame("prisoners_dilemma", R=5, S=2, T=10, P=3).mixed_nash() is None
        True
        """
        if self.dominant() is not None:
            return None
        fear, greed = self.P - self.S, self.T - self.R
        return fear / (fear - greed)

    def pareto_optima(self) -> list[Profile]:
        """Pairs of actions that no other pair improves for one player without harm to the other.

        >>> TwoPlayerGame("prisoners_dilemma", R=5, S=2, T=10, P=3).pareto_optima()
        [('C', 'C'), ('C', 'D'), ('D', 'C')]
        """
        pairs = {p: (self.payoff(*p), self.payoff(*p[::-1])) for p in _PROFILES}
        return [
            profile
            for profile, (mine, theirs) in pairs.items()
            if not any(
                a >= mine and b >= theirs and (a, b) != (mine, theirs) for a, b in pairs.values()
            )
        ]

    def welfare_optimum(self) -> list[Profile]:
        """Pairs of actions with the largest sum of both players' points.

        With the paper's numbers this is not mutual cooperation in the prisoner's dilemma, because
        T + S = 12 exceeds 2 R = 10:

        >>> TwoPlayerGame("prisoners_dilemma", R=5, S=2, T=10, P=3).welfare_optimum()
        [('C', 'D'), ('D', 'C')]
        >>> TwoPlayerGame("stag_hunt", R=10, S=2, T=5, P=3).welfare_optimum()
        [('C', 'C')]
        """
        sums = {p: self.payoff(*p) + self.payoff(*p[::-1]) for p in _PROFILES}
        return [profile for profile, total in sums.items() if total == max(sums.values())]

    def scaled(self, k: float) -> "TwoPlayerGame":
        """The same game with every payoff times `k` (paper: 2); theory says nothing changes.

        >>> TwoPlayerGame("stag_hunt", R=10, S=2, T=5, P=3).scaled(2).payoffs
        (20, 4, 10, 6)
        """
        _number(self.name, "the scale", k)
        if not k > 0:
            raise TomError(f"game {self.name!r}: the scale must be above 0, got {k:g}")
        R, S, T, P = (value * k for value in self.payoffs)
        return TwoPlayerGame(self.name, R, S, T, P, title=self.title, factor=self.factor * k)


_PROFILES: tuple[Profile, ...] = tuple((mine, theirs) for mine in ACTIONS for theirs in ACTIONS)


@dataclass(frozen=True)
class PublicGoodsGame:
    """Linear public goods game: whole contributions out of an endowment, multiplied and shared.

    Raises:
        TomError: `players` below 2, `endowment` below 1, one of them not a whole number, or a
            multiplier that is not above 0 or that leaves the players or the group indifferent.

    >>> party = PublicGoodsGame("public_goods", players=4, endowment=10, multiplier=2.5)
    >>> party.mpcr, party.nash(), party.optimum()
    (0.625, 0, 10)
    """

    name: str
    players: int
    endowment: int
    multiplier: float
    title: str = ""

    game_type: ClassVar[Literal["public_goods"]] = "public_goods"
    kind: ClassVar[Literal["public_goods"]] = "public_goods"

    def __post_init__(self) -> None:
        for field, least in (("players", 2), ("endowment", 1)):
            value = getattr(self, field)
            _number(self.name, field, value)
            if not isinstance(value, int) or value < least:
                raise TomError(
                    f"game {self.name!r}: {field} must be a whole number of at least {least}, "
                    f"got {value!r}"
                )
        _number(self.name, "multiplier", self.multiplier)
        if not self.multiplier > 0 or self.multiplier in (1, self.players):
            raise TomError(
                f"game {self.name!r}: multiplier must be above 0 and neither 1 nor the number of "
                f"players, where contributing makes no difference, got {self.multiplier:g}"
            )

    @property
    def payoffs(self) -> tuple[float, float, float]:
        """(players, endowment, multiplier): the numbers that define the game."""
        return (self.players, self.endowment, self.multiplier)

    @property
    def mpcr(self) -> float:
        """Marginal per-capita return: what a unit in the fund brings to each player."""
        return self.multiplier / self.players

    def payoff(self, own: float, others: Sequence[float]) -> float:
        """Money to me when I give `own` and the others give `others` (one number each).

        Raises:
            TomError: a number of others that is not `players - 1`, or a contribution that is not
                between 0 and the endowment.

        >>> PublicGoodsGame("public_goods", 4, 10, 2.5).payoff(5, [5, 5, 5])
        17.5
        >>> PublicGoodsGame("public_goods", 4, 10, 2.5).payoff(0, [5, 5, 5])
        19.375
        """
        if len(others) != self.players - 1:
            raise TomError(
                f"game {self.name!r}: expected the contributions of {self.players - 1} others, "
                f"got {len(others)}"
            )
        if not all(0 <= given <= self.endowment for given in (own, *others)):
            raise TomError(
                f"game {self.name!r}: contributions must lie between 0 and {self.endowment}"
            )
        return self.endowment - own + self.mpcr * math.fsum((own, *others))

    def nash(self) -> int:
        """Contribution of a player who wants most for itself, whatever the others do."""
        return self.endowment if self.mpcr > 1 else 0

    def optimum(self) -> int:
        """Contribution of each player that is best for the group."""
        return self.endowment if self.multiplier > 1 else 0


Game = TwoPlayerGame | PublicGoodsGame
