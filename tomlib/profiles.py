"""Profiles and runs: every number of a run in one file, and the folders that it reads and writes.

A chapter's parameters override its profile by name. A run reads what is shipped with the book
(`data/runs/NAME`, never written) and its own folder (`runs/NAME`); it writes to its own only.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tomlib.errors import TomError
from tomlib.ledger import Ledger
from tomlib.prompts import ANSWERS, Wording, load_wording
from tomlib.scenarios import Scenario, nearest, root, scenarios

CHAPTERS = (
    "01-exploratory-comparison",
    "02-teacher-querying",
    "03-lora-training",
    "04-in-sample",
    "05-new-contexts",
    "06-scaled-games",
    "07-public-goods",
    "08-published-results",
)
PAGES = ("00-games", "index", "status")
"""Notebooks beside the chapters: the games, the front page, what the run took."""
SHIPPED = "laptop"
"""The run that comes with the book: chapters show it unless told otherwise."""
EXTRAS = ("09-reading-the-game", "10-learning-curve")
"""Chapters that train further students: run by name, no part of reproducing a run."""


@dataclass(frozen=True)
class Profile:
    """Every number of a run; the comments in `profiles/quick.toml` say what each means."""

    name: str
    label: str
    teacher: str
    student: str
    published_teacher: str
    teacher_engine: str
    student_engine: str
    student_quantization: str
    contexts: tuple[str, ...]
    sweep_contexts: tuple[str, ...]
    games: tuple[str, ...]
    wording: str
    prompts_from: str
    teacher_answer: str
    student_answer: str
    n_teacher: int
    n: int
    n_reasoning: int
    temperature: float
    top_p: float
    repetition_penalty: float
    tokens_choice: int
    tokens_motivation: int
    tokens_reasoning: int
    seed: int
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_modules: tuple[str, ...]
    objective: str
    learning_rate: float
    epochs: int
    batch_rows: int
    held_out: float
    max_steps: int
    published_objective: str
    published_learning_rate: float
    published_epochs: int
    published_batch: int
    published_targets: str
    published_copies: tuple[str, ...]
    threads: int
    parallel: int
    margin: float = 0.1
    """Equivalence margin on a difference of proportions (chapters 06 and 08)."""
    bootstrap: int = 2000
    """Resamples of the clustered bootstrap."""

    def tokens(self, answer: str) -> int:
        """Most new tokens of an answer form."""
        limits = (self.tokens_choice, self.tokens_motivation, self.tokens_reasoning)
        return dict(zip(ANSWERS, limits, strict=True))[answer]


_AT_LEAST: dict[str, float] = {
    "n_teacher": 1, "n": 1, "n_reasoning": 0, "temperature": 0, "tokens_choice": 1,
    "tokens_motivation": 1, "tokens_reasoning": 1, "seed": 0, "lora_r": 1, "lora_alpha": 1,
    "lora_dropout": 0, "epochs": 1, "batch_rows": 1, "held_out": 0, "max_steps": 0,
    "published_epochs": 1, "published_batch": 1, "threads": 0, "parallel": 1, "margin": 0,
    "bootstrap": 100,
}  # fmt: skip
_ABOVE_ZERO = ("top_p", "repetition_penalty", "learning_rate", "published_learning_rate")
_BELOW_ONE = ("held_out", "lora_dropout")
_ONE_OF: dict[str, tuple[str, ...]] = {
    "label": ("this run", "smoke"),
    "teacher_engine": ("", "llamacpp", "transformers", "endpoint"),
    "student_engine": ("", "llamacpp", "transformers", "endpoint"),
    "student_quantization": ("", "nf4"),
    "teacher_answer": ANSWERS,
    "student_answer": ANSWERS,
    "objective": ("sft", "distill"),
    "published_objective": ("sft", "distill"),
    "published_targets": ("counts", "additive"),
}


def profile_names() -> list[str]:
    """Names of the profiles in `profiles/`."""
    return sorted(path.stem for path in (root() / "profiles").glob("*.toml"))


def load_profile(name: str, /, **changes: Any) -> Profile:
    """The profile of that name, with changes (None leaves a value as it is).

    Args:
        name: A file `profiles/NAME.toml`, or a path that ends in `.toml`.
        changes: New values by field name.

    Raises:
        TomError: No such profile; a missing, unknown, wrongly typed or impossible value.
    """
    path = Path(name) if name.endswith(".toml") else root() / "profiles" / f"{name}.toml"
    try:
        data = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a NUL in the name, a number without end
        raise TomError(f"profile {name[:80]!r}: {path}: not valid TOML: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise TomError(
            f"profile {name!r}: no file {path}{nearest(name, profile_names())}"
        ) from None
    except OSError as error:
        raise TomError(f"profile {name[:80]!r} cannot be read ({error.strerror})") from None
    types = get_type_hints(Profile)
    for key in data:
        if key not in types:
            raise TomError(f"{path}: unknown setting {key!r}{nearest(key, types)}")
    for f in fields(Profile):
        if f.name not in data and not isinstance(f.default, (int, float)):
            raise TomError(f"{path}: the setting {f.name!r} is missing; add it")
    values = {key: _typed(key, value, types[key], str(path)) for key, value in data.items()}
    if path.parent == root() / "profiles" and values["name"] != path.stem:
        raise TomError(f"{path}: name = {values['name']!r} must be the file's own, {path.stem!r}")
    if changes.get("name") is not None:
        raise TomError("name is no parameter: copy the profile to a file with that name")
    return override(Profile(**values), changes)


def override(profile: Profile, changes: Mapping[str, Any]) -> Profile:
    """The profile with these values in place of its own; None leaves a value as it is.

    Raises:
        TomError: An unknown, wrongly typed or impossible value.
    """
    types = get_type_hints(Profile)
    new: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in types:
            raise TomError(
                f"unknown parameter {key!r}{nearest(key, ['profile', 'replay', *types])}"
            )
        if value is not None:
            new[key] = _typed(key, value, types[key], "parameter")
    changed = replace(profile, **new)
    _check(changed)
    return changed


def _typed(key: str, value: Any, wanted: Any, where: str) -> Any:
    """The value as the field's type; a whole number may stand for a float, nothing else is bent."""
    if get_origin(wanted) is tuple:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if isinstance(value, (list, tuple)) and all(
            isinstance(v, get_args(wanted)[0]) for v in value
        ):
            return tuple(value)
    elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    kind = "a list of texts" if get_origin(wanted) is tuple else wanted.__name__
    raise TomError(f"{where}: {key} = {_shown(value)} must be {kind}, not {type(value).__name__}")


def _shown(value: object) -> str:
    try:
        return repr(str(value)[:40])
    except (ValueError, RecursionError):  # digits or a nesting without end
        return "a huge value"


def _check(profile: Profile) -> None:
    """Refuse what cannot work, before it has cost anything."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", profile.name):  # it names a folder
        raise TomError(
            f"name = {profile.name[:80]!r} must be up to 60 letters, digits, dots, - or _, a letter "
            "or digit first"
        )
    for key, value in asdict(profile).items():
        if isinstance(value, (int, float)) and abs(value) >= 2**32:
            raise TomError(f"{key} must be below 2**32 in size")
    for key, least in _AT_LEAST.items():
        if not getattr(profile, key) >= least:
            raise TomError(f"{key} = {getattr(profile, key)} must be at least {least:g}")
    for key in _ABOVE_ZERO:
        if not 0 < getattr(profile, key) < float("inf"):
            raise TomError(f"{key} = {getattr(profile, key)} must be above 0")
    for key in _BELOW_ONE:
        if not getattr(profile, key) < 1:
            raise TomError(f"{key} = {getattr(profile, key)} must be below 1")
    if profile.top_p > 1:
        raise TomError(f"top_p = {profile.top_p} must be at most 1")
    if "distill" in (profile.objective, profile.published_objective) and not profile.temperature:
        raise TomError("temperature = 0 leaves no distribution to distill; use the objective sft")
    if not profile.temperature <= 10:
        raise TomError(f"temperature = {profile.temperature} must be at most 10")
    if not profile.tokens_choice < min(profile.tokens_motivation, profile.tokens_reasoning):
        raise TomError(
            f"tokens_choice = {profile.tokens_choice} must be below tokens_motivation and "
            "tokens_reasoning: a draw that stops at the choice is told from a whole one by its limit"
        )
    for key, allowed in _ONE_OF.items():
        if getattr(profile, key) not in allowed:
            raise TomError(
                f"{key} = {getattr(profile, key)!r} is unknown{nearest(getattr(profile, key), allowed)}"
            )


@dataclass(frozen=True)
class Run:
    """A profile, and where its draws, adapters and chapters are."""

    profile: Profile
    folder: Path
    """Where this run writes: `runs/NAME`."""
    shipped: Path | None
    """What comes with the book, `data/runs/NAME`, read only; None where there is none."""
    chapter: str = ""

    @property
    def label(self) -> str:
        """How every number of the run is marked: `this run` or `smoke`."""
        return self.profile.label

    @cached_property
    def wording(self) -> Wording:
        """The profile's wording."""
        source = Path(self.profile.prompts_from) if self.profile.prompts_from else None
        return load_wording(self.profile.wording, prompts_from=source)

    @cached_property
    def copies(self) -> list[Wording]:
        """The wordings in which the published arm's prompts are told again in training."""
        return [load_wording(name) for name in self.profile.published_copies]

    @cached_property
    def ledger(self) -> Ledger:
        """The run's ledger: shipped draws first, then its own."""
        return Ledger(self.folder, readonly=[self.shipped] if self.shipped else [])

    @property
    def arms(self) -> tuple[str, ...]:
        """`family` (live teacher), and `published` where the profile names a published teacher."""
        return ("family", "published") if self.profile.published_teacher else ("family",)

    def scenarios(self, split: str | Sequence[str] | None = None) -> list[Scenario]:
        """The run's scenarios of a split.

        Raises:
            TomError: The split is unknown, or the profile's contexts and games leave nothing of it.
        """
        return scenarios(
            split, list(self.profile.contexts) or None, list(self.profile.games) or None
        )

    def sweep(self) -> list[Scenario]:
        """The training scenarios on which wordings are compared (chapter 01).

        Raises:
            TomError: `sweep_contexts` names none of the run's training contexts.
        """
        chosen = self.profile.sweep_contexts
        every = self.scenarios("in_sample")
        some = [s for s in every if not chosen or s.context.name in chosen]
        known = dict.fromkeys(s.context.name for s in every)
        for name in chosen:
            if name not in known:
                raise TomError(
                    f"sweep_contexts: {name!r} is no training context of this run "
                    f"({', '.join(known)})"
                )
        return some

    def changed(self, **changes: Any) -> "Run":
        """The same run with other values in its profile; draws are shared through the ledger."""
        return replace(self, profile=override(self.profile, changes))

    def as_dict(self) -> dict[str, Any]:
        """The profile's values, for a manifest."""
        return asdict(self.profile)


def new_run(profile: Profile, *, replay: bool = True, chapter: str = "") -> Run:
    """The run of a profile.

    Args:
        profile: Its numbers.
        replay: Whether draws and adapters that come with the book may be used.
        chapter: The chapter that opens it.
    """
    base = Path(os.environ.get("TOM_RUNS") or root() / "runs")
    shipped = root() / "data" / "runs" / profile.name
    return Run(
        profile, base / profile.name, shipped if replay and shipped.is_dir() else None, chapter
    )


_FIRST = "_tom_parameters"
"""Where a notebook keeps the names that were its parameters when it opened its run first."""

_NOTEBOOK_OWN = {"In", "Out", "exit", "quit", "open", "get_ipython"}


def open_run(chapter: str, namespace: Mapping[str, Any]) -> Run:
    """Open a chapter's run with the parameters that stand in the notebook, called as its second cell.

    Every simple value in the namespace has to be a parameter, so that a mistyped `-p` is an error and
    is not ignored.

    Args:
        chapter: The chapter's name.
        namespace: The notebook's `globals()`.

    Raises:
        TomError: Unknown chapter; an unknown or wrongly typed parameter.
    """
    known = (*CHAPTERS, *PAGES, *EXTRAS)
    if chapter not in known:
        raise TomError(f"chapter {chapter!r} is unknown{nearest(chapter, known)}")
    simple = (str, int, float, bool, list, tuple, dict, type(None))
    given = {
        key: value
        for key, value in namespace.items()
        if not key.startswith("_") and key not in _NOTEBOOK_OWN and isinstance(value, simple)
    }
    # Run again in the same kernel, what the cells below have made stands among the parameters.
    first = namespace.get(_FIRST, set(given))
    if isinstance(namespace, dict):
        namespace[_FIRST] = first
    settings = {"profile", "replay", *get_type_hints(Profile)}
    given = {key: value for key, value in given.items() if key in first | settings}
    name, replay = given.pop("profile", SHIPPED), given.pop("replay", True)
    if not isinstance(name, str):
        raise TomError(f"parameter profile = {_shown(name)} must be str, not {type(name).__name__}")
    if not isinstance(replay, bool):
        raise TomError(
            f"parameter replay = {_shown(replay)} must be bool, not {type(replay).__name__}"
        )
    return new_run(load_profile(name, **given), replay=replay, chapter=chapter)
