"""Scenarios: social contexts x games, in the four splits of the paper.

Everything comes from `data/scenarios/contexts.toml` and `data/scenarios/games.toml`; a context or a
game added there appears in the splits without any change to the code.

>>> [len(scenarios(split)) for split in ("in_sample", "new_contexts", "scaled_games")]
[20, 12, 20]
>>> find("IR/stag_hunt").game.payoffs
(10, 2, 5, 3)
>>> find("IR/stag_hunt", split="scaled_games").name
'IR/stag_hunt x2'
"""

import difflib
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

from tomlib.errors import TomError
from tomlib.games import KINDS, Game, PublicGoodsGame, TwoPlayerGame

SPLITS = ("in_sample", "new_contexts", "scaled_games", "public_goods")

_CONTEXT_SPLITS = ("in_sample", "new_contexts", "public_goods")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True)
class Context:
    """A social context: its system prompt and the split that it belongs to."""

    name: str
    title: str
    split: str
    system: str


@dataclass(frozen=True)
class Scenario:
    """One game played in one context. Frozen and hashable."""

    split: str
    context: Context
    game: Game

    @property
    def name(self) -> str:
        """`IR/stag_hunt`, or `IR/stag_hunt x2` where the payoffs are scaled."""
        factor = self.game.factor if isinstance(self.game, TwoPlayerGame) else 1
        return f"{self.context.name}/{self.game.name}" + (f" x{factor:g}" if factor != 1 else "")

    @property
    def key(self) -> tuple[str, str, str]:
        """(split, context name, game name): the columns that name a scenario in every table."""
        return (self.split, self.context.name, self.game.name)

    @property
    def game_type(self) -> Literal["two_player", "public_goods"]:
        """What is answered: a letter (`two_player`) or a contribution (`public_goods`)."""
        return self.game.game_type

    @property
    def endowment(self) -> int:
        """The largest contribution, in dollars; 0 where a letter is the answer."""
        return self.game.endowment if isinstance(self.game, PublicGoodsGame) else 0

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Scenarios:
    """What a scenarios folder holds; iterates over its scenarios, split by split."""

    contexts: tuple[Context, ...]
    games: tuple[Game, ...]
    scenarios: tuple[Scenario, ...]

    def __iter__(self) -> Iterator[Scenario]:
        return iter(self.scenarios)

    def __len__(self) -> int:
        return len(self.scenarios)


def root() -> Path:
    """The repository root: where this package was checked out, else the current directory or above.

    Raises:
        TomError: neither holds `data/scenarios`.
    """
    here = Path.cwd()
    for folder in (Path(__file__).resolve().parent.parent, here, *here.parents):
        if (folder / "data" / "scenarios").is_dir() and (folder / "tomlib").is_dir():
            return folder
    raise TomError(f"no data/scenarios in {here} or above; run from the repository root")


def nearest(name: object, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known one, else all of them.

    >>> nearest("quik", ["quick", "laptop"])
    "; did you mean 'quick'?"
    >>> nearest("zzz", ["quick", "laptop"])
    '; there are: quick, laptop'
    """
    known = list(names)
    folded = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(str(name)[:100].casefold(), folded, n=1)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; there are: {', '.join(known)}" if known else "; there are none"


def load(folder: Path | str | None = None) -> Scenarios:
    """Read and check `contexts.toml` and `games.toml`.

    Args:
        folder: Where they lie; `data/scenarios` of the repository unless given.

    Raises:
        TomError: a file is missing or no TOML, or an entry is wrong; names file and entry.
    """
    folder = root() / "data" / "scenarios" if folder is None else Path(folder)
    contexts = _contexts(folder / "contexts.toml")
    games, places, factor = _games(folder / "games.toml", contexts)
    two_player = [game for game in games if isinstance(game, TwoPlayerGame)]
    by_split = {split: [c for c in contexts if c.split == split] for split in _CONTEXT_SPLITS}
    built = [
        *(Scenario("in_sample", c, g) for c in by_split["in_sample"] for g in two_player),
        *(Scenario("new_contexts", c, g) for c in by_split["new_contexts"] for g in two_player),
        *(
            Scenario("scaled_games", c, g.scaled(factor))
            for c in by_split["in_sample"]
            for g in two_player
        ),
        *(Scenario("public_goods", places[g.name], g) for g in games if g.name in places),
    ]
    return Scenarios(contexts, games, tuple(built))


def scenarios(
    split: str | Sequence[str] | None = None,
    contexts: str | Sequence[str] | None = None,
    games: str | Sequence[str] | None = None,
    folder: Path | str | None = None,
) -> list[Scenario]:
    """Scenarios in file order, all or those of the given splits, contexts and games.

    Raises:
        TomError: an unknown split, context or game, or no scenario left; whatever `load` raises.

    >>> [s.name for s in scenarios("new_contexts", games="snowdrift")]
    ['sports/snowdrift', 'ventcap/snowdrift', 'roomsharing/snowdrift']
    """
    loaded = load(folder)
    wanted = (
        _chosen("split", split, SPLITS),
        _chosen("context", contexts, [context.name for context in loaded.contexts]),
        _chosen("game", games, [game.name for game in loaded.games]),
    )
    found = [
        scenario
        for scenario in loaded
        if all(part in names for part, names in zip(scenario.key, wanted, strict=True))
    ]
    if not found:
        raise TomError(
            f"no scenario has split in {list(wanted[0])}, context in {list(wanted[1])} and game in "
            f"{list(wanted[2])}; choose a wider selection"
        )
    return found


def find(name: str, split: str | None = None, folder: Path | str | None = None) -> Scenario:
    """The scenario called `CONTEXT/GAME`; with `split="scaled_games"` or `... x2`, the scaled one.

    Raises:
        TomError: no such scenario; whatever `load` raises.

    >>> find("party/public_goods").split
    'public_goods'
    >>> find("IR/staghunt")
    Traceback (most recent call last):
    ...
    tomlib.errors.TomError: scenario 'IR/staghunt' is unknown; did you mean 'IR/stag_hunt'?
    """
    among = [s for s in load(folder) if s.split in _chosen("split", split, SPLITS)]
    for scenario in among:
        plain = f"{scenario.context.name}/{scenario.game.name}"
        if name == scenario.name or (split is not None and name == plain):
            return scenario
    where = f" in split {split}" if split is not None else ""
    hint = nearest(name, (scenario.name for scenario in among))
    raise TomError(f"scenario {name!r} is unknown{where}{hint}")


def _chosen(what: str, names: str | Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    """The names asked for, each of which must be known; all of them when None."""
    if names is None:
        return known
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in known:
            raise TomError(f"{what} {name!r} is unknown{nearest(name, known)}")
    return names


# -- contexts and games of one's own --------------------------------------------------------------

_CONTEXT_TEMPLATE = """
# {comment}
[[context]]
name = "{name}"
title = "{title}"
split = "{split}" # in_sample trains the student, new_contexts is held out
# Replace each [...]; keep the order of ideas and the length of the others (within 20 %), and give no
# hint of what to choose.
system = \"\"\"
You are [who you are], and [who the other one is] is your coplayer. [What the meeting is about, \
and how the two of you stand to each other, in one or two sentences.] In the end each of you, \
independently of the other, has to adopt one of two strategies, labelled C and D. The outcome \
is measured in points. Points stand for what matters to you: [two or three things]. The choice \
is made only once, you cannot talk to your coplayer before choosing, and each of you learns the \
other's strategy only after both have been adopted.\"\"\"
"""

_GAME_TEMPLATE = """
# {comment}
[[game]]
name = "{name}"
title = "{title}"
kind = "{kind}" # the order that the payoffs must keep: {order}
# Payoffs to me: R for (C, C), S for (C, D), T for (D, C), P for (D, D), my own choice first.
R = {R}
S = {S}
T = {T}
P = {P}
"""

_GAPS = re.findall(r"\[[^\]]*\]", _CONTEXT_TEMPLATE.partition("system = ")[2])

_SAID = ("C and D", "coplayer", "independently", "points", "only once")
"""What every two-player context says, so that contexts differ in their story alone."""


def check_written(among: Iterable[Scenario]) -> None:
    """Refuse contexts that still hold what their template asks to be replaced.

    Raises:
        TomError: The first of them.

    >>> check_written(scenarios())
    """
    for context in dict.fromkeys(scenario.context for scenario in among):
        for gap in _GAPS:
            if gap in context.system:
                raise TomError(
                    f"context {context.name!r}: {gap} is still to be written; edit it in "
                    "contexts.toml, or leave the context out of the run's"
                )


def context_problems(name: str, folder: Path | str | None = None) -> list[str]:
    """What a context still lacks to stand beside the others; nothing if all is well.

    Raises:
        TomError: no such context; whatever `load` raises.

    >>> context_problems("IR")
    []
    """
    contexts = {context.name: context for context in load(folder).contexts}
    if name not in contexts:
        raise TomError(f"context {name!r} is unknown{nearest(name, contexts)}")
    context = contexts[name]
    found = [f"{gap} is still to be written" for gap in re.findall(r"\[[^\]]*\]", context.system)]
    if context.split != "public_goods":
        found += [f"it never says {said!r}" for said in _SAID if said not in context.system]
    others = [len(c.system) for c in contexts.values() if c.name != name]
    usual, own = sum(others) / max(1, len(others)), len(context.system)
    if others and not 0.8 * usual <= own <= 1.2 * usual:
        found.append(f"it has {own} characters, the others {usual:.0f}: come within 20 %")
    return found


def new_context(
    name: str, title: str = "", split: str = "new_contexts", folder: Path | str | None = None
) -> Path:
    """Append a commented context to `contexts.toml`, to be filled in; the file's path.

    Raises:
        TomError: the name is taken or no name, the split is unknown or `public_goods` (such a context
            needs a game of its own); the file is as it was then.
    """
    comment = "A context of one's own: `tom show NAME/stag_hunt` shows what models will see."
    text = _CONTEXT_TEMPLATE.format(
        comment=comment.replace("NAME", name), name=name, title=_title(name, title), split=split
    )
    return _append("contexts.toml", text, folder)


def new_game(
    name: str,
    kind: str,
    payoffs: Sequence[float] | None = None,
    title: str = "",
    folder: Path | str | None = None,
) -> Path:
    """Append a game to `games.toml`; the file's path.

    Args:
        name: What it is called.
        kind: One of `tomlib.games.KINDS`: the order of its payoffs.
        payoffs: R, S, T, P; the paper's four numbers in the order of the kind unless given.
        title: How it is called in the book; the name unless given.
        folder: Where `games.toml` lies.

    Raises:
        TomError: the name is taken or no name, the kind is unknown, the payoffs are not in its order;
            the file is as it was then.
    """
    if kind not in KINDS:
        raise TomError(f"kind {kind!r} is unknown{nearest(kind, KINDS)}")
    order = KINDS[kind]
    numbers: dict[str, float] = dict(zip(order.split(">"), (10.0, 5.0, 3.0, 2.0), strict=True))
    if payoffs is not None:
        numbers = dict(zip("RSTP", payoffs, strict=True))
    text = _GAME_TEMPLATE.format(
        comment="A game of one's own, played in every context and split.",
        name=name, title=_title(name, title), kind=kind, order=order,
        **{letter: f"{value:.15g}" for letter, value in numbers.items()},
    )  # fmt: skip
    return _append("games.toml", text, folder)


def _title(name: str, title: str) -> str:
    title = title or name.replace("_", " ").capitalize()
    return title.replace("\\", "").replace('"', "'")


def _append(file: str, text: str, folder: Path | str | None) -> Path:
    """Add an entry to a scenarios file, unless the folder does not load with it."""
    folder = root() / "data" / "scenarios" if folder is None else Path(folder)
    path = folder / file
    load(folder)
    before = path.read_bytes()
    half = path.with_name(path.name + ".part")
    try:
        half.write_bytes(before.rstrip() + b"\n" + text.encode())
        with tempfile.TemporaryDirectory() as trial:
            for each in folder.glob("*.toml"):
                shutil.copy2(half if each == path else each, Path(trial) / each.name)
            try:
                load(trial)
            except TomError as error:
                raise TomError(str(error).replace(trial, str(folder))) from None
        os.replace(half, path)
    except OSError as error:
        raise TomError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        half.unlink(missing_ok=True)
    return path


# -- reading and checking the files ---------------------------------------------------------------

_TEXT = "a text"
_NUMBER = "a number"
_WHOLE = "a whole number"

_CONTEXT_FIELDS = {"name": _TEXT, "title": _TEXT, "split": _TEXT, "system": _TEXT}
_GAME_FIELDS = {"name": _TEXT, "title": _TEXT, "kind": _TEXT} | dict.fromkeys("RSTP", _NUMBER)
_FUND_FIELDS = {
    "name": _TEXT,
    "title": _TEXT,
    "context": _TEXT,
    "players": _WHOLE,
    "endowment": _WHOLE,
    "multiplier": _NUMBER,
}
_SCALING_FIELDS = {"factor": _NUMBER}


def _contexts(path: Path) -> tuple[Context, ...]:
    raw = _toml(path, tables={"context": list})
    found = []
    for where, entry in _entries(path, "context", raw, _CONTEXT_FIELDS):
        if entry["split"] not in _CONTEXT_SPLITS:
            hint = nearest(entry["split"], _CONTEXT_SPLITS)
            raise TomError(f"{where}: split {entry['split']!r} is unknown{hint}")
        found.append(Context(**{**entry, "system": entry["system"].strip()}))
    if not found:
        raise TomError(f"{path}: no [[context]] at all; add one")
    return tuple(found)


def _games(
    path: Path, contexts: tuple[Context, ...]
) -> tuple[tuple[Game, ...], dict[str, Context], float]:
    """The games, the context that each public goods game is played in, and the scaling factor."""
    raw = _toml(path, tables={"game": list, "public_goods": list, "scaling": dict})
    found: dict[str, TwoPlayerGame] = {}
    for where, entry in _entries(path, "game", raw, _GAME_FIELDS):
        found[where] = _two_player(where, entry)
    games: list[Game] = [*found.values()]
    by_name = {context.name: context for context in contexts}
    places: dict[str, Context] = {}
    for where, entry in _entries(path, "public_goods", raw, _FUND_FIELDS):
        context = entry.pop("context")
        if context not in by_name:
            raise TomError(f"{where}: context {context!r} is unknown{nearest(context, by_name)}")
        if by_name[context].split != "public_goods":
            raise TomError(
                f"{where}: context {context!r} belongs to split {by_name[context].split}; "
                "name one whose split is public_goods"
            )
        _unique(where, entry["name"], [game.name for game in games])
        games.append(_made(where, PublicGoodsGame, entry))
        places[entry["name"]] = by_name[context]
    for context_ in contexts:
        if context_.split == "public_goods" and context_ not in places.values():
            raise TomError(
                f"{path}: no [[public_goods]] is played in context {context_.name!r}, whose split "
                "is public_goods; add one or give the context another split"
            )
    if not games:
        raise TomError(f"{path}: no [[game]] at all; add one")
    if "scaling" not in raw:
        raise TomError(f"{path}: the table [scaling] is missing; add it with factor = 2")
    where = f"{path}, [scaling]"
    factor = _fields(where, raw["scaling"], _SCALING_FIELDS)["factor"]
    if factor == 1 or not 0 < factor <= 1000:
        raise TomError(f"{where}: factor must be between 0 and 1000 and not 1, got {factor:g}")
    for (_, one), (where, two) in combinations(found.items(), 2):
        if one.payoffs == two.payoffs:
            raise TomError(
                f"{where}: has the payoffs of {one.name!r}, so it is the same game; give it others"
            )
        if two.payoffs in (one.scaled(factor).payoffs, one.scaled(1 / factor).payoffs):
            raise TomError(
                f"{where}: is {one.name!r} scaled, which split scaled_games asks already; give it "
                "other payoffs"
            )
    return tuple(games), places, factor


def _two_player(where: str, entry: dict[str, Any]) -> TwoPlayerGame:
    kind = entry.pop("kind")
    if kind not in KINDS:
        raise TomError(f"{where}: kind {kind!r} is unknown{nearest(kind, KINDS)}")
    ranked = [entry[letter] for letter in KINDS[kind].split(">")]
    if not all(higher > lower for higher, lower in pairwise(ranked)):
        got = " ".join(f"{letter}={entry[letter]}" for letter in "RSTP")
        raise TomError(
            f"{where}: payoffs must satisfy {KINDS[kind]}, got {got}; put them in that order"
        )
    game: TwoPlayerGame = _made(where, TwoPlayerGame, entry)
    return game


def _made(where: str, game: type, fields: dict[str, Any]) -> Any:
    """A game from its fields, any complaint of its own prefixed with file and entry."""
    try:
        return game(**fields)
    except TomError as error:
        raise TomError(f"{where}: {str(error).split(': ', 1)[-1]}") from None


def _toml(path: Path, tables: dict[str, type]) -> dict[str, Any]:
    """The file's top-level tables; nothing but the expected ones may be there."""
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise TomError(f"{path}: no such file; run from the repository root") from None
    except OSError as error:
        raise TomError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise TomError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deep"
        raise TomError(f"{path}: not valid TOML: {reason}") from None
    for name, value in raw.items():
        if name not in tables:
            hint = nearest(name, tables)
            raise TomError(f"{path}: nothing called {name!r} belongs here{hint}")
        if not isinstance(value, tables[name]):
            form = f"[[{name}]]" if tables[name] is list else f"[{name}]"
            raise TomError(f"{path}: {name} must be written as {form}")
    return raw


def _entries(
    path: Path, table: str, raw: dict[str, Any], fields: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, checked fields) of each entry of an array of tables; names must differ."""
    seen: list[str] = []
    for number, entry in enumerate(raw.get(table, []), start=1):
        where = f"{path}, {table} {number}"
        if not isinstance(entry, dict):
            raise TomError(f"{where}: must be written as [[{table}]]")
        name = entry.get("name")
        if isinstance(name, str):
            where += f" ({name[:40]!r})"
        checked = _fields(where, entry, fields)
        if not _NAME.fullmatch(checked["name"]):
            raise TomError(
                f"{where}: name must start with a letter and have up to 40 letters, digits, - or _"
            )
        _unique(where, checked["name"], seen)
        seen.append(checked["name"])
        yield where, checked


def _unique(where: str, name: str, seen: list[str]) -> None:
    if name.casefold() in (other.casefold() for other in seen):
        raise TomError(f"{where}: the name is taken by an earlier entry; choose another")


def _fields(where: str, entry: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """The entry, once every field is there, known, and of the right type."""
    for field in entry:
        if field not in fields:
            raise TomError(f"{where}: unknown field {field!r}{nearest(field, fields)}")
    for field, form in fields.items():
        if field not in entry:
            raise TomError(f"{where}: the field {field!r} is missing; add it ({form})")
        value = entry[field]
        right = {_TEXT: str, _NUMBER: int | float, _WHOLE: int}[form]
        if isinstance(value, bool) or not isinstance(value, right):
            raise TomError(f"{where}: {field} must be {form}, got {_shown(value)}")
        if isinstance(value, str) and not value.strip():
            raise TomError(f"{where}: {field} is empty; write a text")
        if isinstance(value, int | float) and not abs(value) <= 1e9:  # also refuses NaN
            raise TomError(f"{where}: {field} must be a finite number of at most 1e9 in size")
    return dict(entry)


def _shown(value: object) -> str:
    """A wrong value, or what it is where it may be long."""
    if isinstance(value, str):
        return repr(value[:40])
    names = {bool: "true or false", int: "a whole number", list: "a list", dict: "a table"}
    return names.get(type(value), f"{value}")
