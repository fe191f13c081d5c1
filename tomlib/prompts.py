"""The only place where messages are rendered: for asking, for training and for scoring alike.

A scenario becomes three messages: the context (system), the game and how to answer (human), and the
opening with which every answer starts (assistant). Because the opening is fixed, the next token is
the choice wherever the letter comes first, and its probability can be read exactly.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from tomlib.errors import TomError
from tomlib.games import PublicGoodsGame
from tomlib.scenarios import Scenario, nearest, root

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

ANSWERS = ("choice", "choice+motivation", "reasoning+choice")
"""The answer forms: letter only; letter first, then why (the paper's teacher); reasons first."""

_FUND = ("players", "others", "endowment", "multiplier")
_ANSWER_FIELDS = ("two_player", "public_goods", "opening_two_player", "opening_public_goods")


@dataclass(frozen=True)
class Wording:
    """How games and questions are put into words: one entry of `data/scenarios/wordings.toml`."""

    name: str
    two_player: str
    public_goods: str
    answers: Mapping[str, Mapping[str, str]] = field(hash=False)
    relabelled: bool = False
    """C stands for what is D elsewhere: the shares of C and D are exchanged."""
    verbatim: Path | None = None
    """A checkout of the authors' repository whose texts stand in for ours (`prompts_from`)."""

    def context_text(self, scenario: Scenario) -> str:
        """The system prompt of the scenario."""
        if self.verbatim is not None:
            return _verbatim_context(self.verbatim, scenario)
        return scenario.context.system.strip()

    def game_text(self, scenario: Scenario) -> str:
        """The rules and payoffs of the scenario's game."""
        from langchain_core.prompts import PromptTemplate

        game = scenario.game
        if isinstance(game, PublicGoodsGame):
            numbers = {
                "players": game.players,
                "others": game.players - 1,
                "endowment": _number(game.endowment),
                "multiplier": _number(game.multiplier),
            }
            return PromptTemplate.from_template(self.public_goods).format(**numbers)
        if self.verbatim is not None:
            return _verbatim_game(self.verbatim, scenario)
        payoffs = dict(zip("RSTP", map(_number, game.payoffs), strict=True))
        return PromptTemplate.from_template(self.two_player).format(**payoffs)


@lru_cache(maxsize=16)
def load_wording(
    name: str = "outcomes", folder: Path | None = None, prompts_from: Path | None = None
) -> Wording:
    """The wording of that name.

    Args:
        name: A `[game.NAME]` or `[copy.NAME]` entry of `wordings.toml`.
        folder: The scenarios folder; the repository's `data/scenarios` unless given.
        prompts_from: A checkout of the authors' repository: its verbatim context and game texts
            are used in place of ours, through the same renderer.

    Raises:
        TomError: The file or an entry is missing or malformed.
    """
    path, data = _file(folder)
    copies = _table(data, "copy", path) if "copy" in data else {}
    games = _table(data, "game", path) | copies
    if name not in games:
        raise TomError(f"{path}: no wording [game.{name}]{nearest(name, games)}")
    answers: dict[str, dict[str, str]] = {}
    for form in ANSWERS:
        entry = _table(_table(data, "answer", path), form, path)
        for key in _ANSWER_FIELDS:
            if not isinstance(entry.get(key), str):
                raise TomError(f"{path}: [answer.{form!r}] needs a text {key!r}")
        answers[form] = {key: entry[key].strip() for key in _ANSWER_FIELDS[:2]}
        answers[form] |= {key: entry[key] for key in _ANSWER_FIELDS[2:]}
    two_player, public = games[name], _table(_table(data, "public_goods", path), "fund", path)
    for label, entry in ((f"game.{name}", two_player), ("public_goods.fund", public)):
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise TomError(f"{path}: [{label}] needs a text 'text'")
    relabelled = two_player.get("relabelled", False)
    if not isinstance(relabelled, bool):
        raise TomError(f"{path}: [copy.{name}] relabelled must be true or false")
    stated = _placeholders(f"{path}: [game.{name}]", two_player["text"], tuple("RSTP"))
    for letter in "RSTP":
        if letter not in stated:
            raise TomError(f"{path}: [game.{name}] never states the payoff {{{letter}}}")
    _placeholders(f"{path}: [public_goods.fund]", public["text"], _FUND)
    if prompts_from is not None and not Path(prompts_from).is_dir():
        raise TomError(f"prompts_from = {str(prompts_from)!r}: no such folder")
    return Wording(
        name,
        two_player["text"].strip(),
        public["text"].strip(),
        answers,
        relabelled,
        Path(prompts_from) if prompts_from is not None else None,
    )


def wording_names(folder: Path | None = None) -> list[str]:
    """Names of the two-player wordings on offer, in file order."""
    path, data = _file(folder)
    return list(_table(data, "game", path))


def opening(scenario: Scenario, answer: str, wording: Wording) -> str:
    """What every answer to the scenario starts with.

    Raises:
        TomError: An unknown answer form.
    """
    return _form(answer, wording)[f"opening_{scenario.game_type}"]


def messages(scenario: Scenario, answer: str, wording: Wording) -> "list[BaseMessage]":
    """System, human and (prefilled) assistant message of a scenario, as LangChain messages.

    Args:
        scenario: What is played.
        answer: One of `ANSWERS` (paper, section "Querying": letter with motivation; SI: letter only).
        wording: How it is said.

    Raises:
        TomError: An unknown answer form.
    """
    from langchain_core.prompts import ChatPromptTemplate

    template = ChatPromptTemplate.from_messages(
        [("system", "{context}"), ("human", "{game}\n\n{question}"), ("ai", "{opening}")]
    )
    return template.format_messages(
        context=wording.context_text(scenario),
        game=wording.game_text(scenario),
        # Not a template: the braces of a question are those of the JSON that it asks for.
        question=_form(answer, wording)[scenario.game_type].replace(
            "{endowment}", str(scenario.endowment)
        ),
        opening=opening(scenario, answer, wording),
    )


def prompt_id(scenario: Scenario, answer: str, wording: Wording) -> str:
    """First 16 hex digits of the sha256 of the rendered messages, roles included."""
    said = [[m.type, m.content] for m in messages(scenario, answer, wording)]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()[:16]


def _form(answer: str, wording: Wording) -> Mapping[str, str]:
    if answer not in wording.answers:
        raise TomError(f"answer form {answer!r} is unknown{nearest(answer, ANSWERS)}")
    return wording.answers[answer]


def _number(value: float) -> str:
    """5.0 is said as 5, 2.5 as 2.5; no digit is lost."""
    return f"{value:.15g}"


def _file(folder: Path | None) -> tuple[Path, dict[str, Any]]:
    """`wordings.toml` and what it holds."""
    path = (folder or root() / "data" / "scenarios") / "wordings.toml"
    try:
        return path, tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise TomError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting without end as well
        raise TomError(f"{path}: not valid TOML: {error}") from None


def _placeholders(where: str, text: str, known: tuple[str, ...]) -> set[str]:
    """The names in braces; each must be known and plain (braces that are meant are doubled)."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise TomError(f"{where}: {error}; double a brace that is meant as one") from None
    for _, name, form, conversion in parts:
        if name is not None and (name not in known or form or conversion):
            wrong = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise TomError(
                f"{where}: the placeholder {{{wrong[:40]}}} is unknown; there are: "
                f"{', '.join(known)} (double a brace that is meant as one)"
            )
    return {name for _, name, _, _ in parts if name is not None}


def _table(data: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise TomError(f"{path}: needs a table [{key}]")
    return value


_AUTHORS_GAMES = {
    "prisoners_dilemma": "prison",
    "prisoners_delight": "delight",
    "stag_hunt": "staghunt",
    "snowdrift": "snowdrift",
}
"""Short names of the games in the authors' repository."""


def _verbatim_context(folder: Path, scenario: Scenario) -> str:
    """`data/context/NAME.txt` or `new contexts/NAME.txt` of the authors' checkout."""
    name = f"{scenario.context.name}.txt"
    places = (folder / "data" / "context" / name, folder / "new contexts" / name)
    return _first_text(places, f"context {scenario.context.name!r}")


def _verbatim_game(folder: Path, scenario: Scenario) -> str:
    """`data/game/NAME.txt` of the authors' checkout, `NAME_d.txt` for doubled payoffs."""
    short = _AUTHORS_GAMES.get(scenario.game.name, scenario.game.name)
    name = f"{short}_d.txt" if scenario.split == "scaled_games" else f"{short}.txt"
    return _first_text((folder / "data" / "game" / name,), f"game {scenario.game.name!r}")


def _first_text(places: tuple[Path, ...], what: str) -> str:
    for place in places:
        if place.is_file():
            try:
                return place.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise TomError(f"{place}: cannot be read as UTF-8 text ({error})") from None
    raise TomError(
        f"prompts_from: no verbatim text for {what}: none of {', '.join(map(str, places))} exists"
    )
