"""Model cards: what a model is, and where it comes from.

Cards lie in `data/models.toml`, and in a file of the user's own named by `TOM_MODELS`. A file that
holds anything else is an error that names file, entry and field. The weights that a card names are
the business of `weights`.

>>> card("smollm2-135m").size
98362432
>>> card("smollm-135m")
Traceback (most recent call last):
...
tomlib.errors.TomError: model 'smollm-135m' is unknown; did you mean 'smollm2-135m'?
"""

import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tomlib.errors import TomError
from tomlib.scenarios import nearest, root

ENGINES = {
    "gguf": ("llamacpp", "transformers"),
    "folder": ("transformers",),
    "hub": ("transformers",),
    "endpoint": ("endpoint",),
    "published": ("published",),
}
"""Each kind of card, and the engines that can run it, its default first."""

PREFILL = ("native", "continue_final_message", "none")
"""How a server goes on with an assistant turn that we have started."""


@dataclass(frozen=True)
class Source:
    """One place that a GGUF file can come from: wheels, one file of a hub repository, or a path."""

    packages: tuple[str, ...] = ()
    version: str = ""
    member: str = ""
    bytes: int = 0
    repo: str = ""
    revision: str = ""
    file: str = ""
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"file {self.path}"
        if self.repo:
            return f"hub {self.repo}@{self.revision[:8]}/{self.file}"
        more = f" .. {self.packages[-1]}" if len(self.packages) > 1 else ""
        return f"packages {self.packages[0]}{more} =={self.version}"


@dataclass(frozen=True)
class Card:
    """What a model is, and where it comes from. Sizes in bytes, context length in tokens.

    Fields that do not belong to the card's kind are empty. `data/models.toml` says what each means.
    """

    name: str
    kind: str
    family: str
    purpose: str
    engine: str
    parameters: int = 0
    size: int = 0
    sha256: str = ""
    quantization: str = ""
    licence: str = ""
    context_length: int = 0
    chat_template: str = "none"
    origin: str = ""
    source: tuple[Source, ...] = ()
    folder: str = ""
    repo: str = ""
    revision: str = ""
    gated: bool = False
    base_url: str = ""
    model_id: str = ""
    api_key_env: str = ""
    prefill: str = "native"
    counts: str = ""
    public_goods: str = ""
    column: str = ""
    answer: str = ""
    file: str = ""
    """The file that the card was read from."""


# -- cards ----------------------------------------------------------------------------------------


def cards(path: Path | str | None = None) -> dict[str, Card]:
    """All model cards by name: `data/models.toml`, then the user's own.

    Args:
        path: A TOML file of cards, or a folder that holds `models.toml`; the environment variable
            `TOM_MODELS` unless given.

    Raises:
        TomError: A file is missing or damaged, or an entry is wrong; names file and entry.
    """
    own = path if path is not None else os.environ.get("TOM_MODELS") or None
    files = [root() / "data" / "models.toml"]
    if own is not None:
        more = Path(own).expanduser()
        files.append(more / "models.toml" if more.is_dir() else more)
    found: dict[str, Card] = {}
    for file in files:
        for read in _as_it_is(file):
            taken = {name.casefold(): name for name in found}
            if read.name.casefold() in taken:
                other = found[taken[read.name.casefold()]]
                raise TomError(
                    f"{file}: model {read.name!r}: the name is taken by {other.name!r} in "
                    f"{other.file}; choose another"
                )
            found[read.name] = read
    return found


def card(name: str, path: Path | str | None = None) -> Card:
    """The card of that name.

    Raises:
        TomError: No such card (names the nearest); whatever `cards` raises.
    """
    known = cards(path)
    if name not in known:
        raise TomError(f"model {name!r} is unknown{nearest(name, known)}")
    return known[name]


def engine_of(who: Card, wanted: str = "") -> str:
    """The engine that runs a card: the one wanted, else the card's own.

    A server, or a published table, is what it is whatever engine a profile wants for weights.

    Raises:
        TomError: An engine that cannot run cards of this kind.

    >>> engine_of(card("smollm2-135m")), engine_of(card("smollm2-135m"), "transformers")
    ('llamacpp', 'transformers')
    >>> engine_of(card("llamacpp-server"), "transformers")
    'endpoint'
    """
    if not wanted or who.kind in ("endpoint", "published"):
        return who.engine
    if wanted not in ENGINES[who.kind]:
        can = " or ".join(ENGINES[who.kind])
        raise TomError(f"{who.name}: engine {wanted!r} cannot run a {who.kind} card; it is {can}")
    return wanted


# -- reading and checking the files ---------------------------------------------------------------

_TEXT = "a text"
_COUNT = "a whole number above 0"
_YES = "true or false"
_TEXTS = "a list of texts"

_COMMON: dict[str, str] = {
    "name": _TEXT,
    "kind": _TEXT,
    "family": _TEXT,
    "purpose": _TEXT,
    "engine": _TEXT,
    "parameters": _COUNT,
    "size": _COUNT,
    "licence": _TEXT,
    "quantization": _TEXT,
    "context_length": _COUNT,
    "chat_template": _TEXT,
    "origin": _TEXT,
}
_OF_KIND: dict[str, dict[str, str]] = {
    "gguf": {"sha256": _TEXT},
    "folder": {"folder": _TEXT},
    "hub": {"repo": _TEXT, "revision": _TEXT, "gated": _YES},
    "endpoint": {"base_url": _TEXT, "model_id": _TEXT, "api_key_env": _TEXT, "prefill": _TEXT},
    "published": {"counts": _TEXT, "public_goods": _TEXT, "column": _TEXT, "answer": _TEXT},
}
_NEEDED = ("name", "kind", "family", "purpose")
_OPTIONAL = ("api_key_env", "gated", "public_goods")
_TEMPLATES = ("gguf", "tokenizer", "server", "none")
_ANSWERS = ("choice", "choice+motivation", "reasoning+choice")
_SOURCES: tuple[dict[str, str], ...] = (
    {"packages": _TEXTS, "version": _TEXT, "member": _TEXT, "bytes": _COUNT},
    {"repo": _TEXT, "revision": _TEXT, "file": _TEXT},
    {"path": _TEXT},
)
_FORMS: dict[str, tuple[str, str]] = {
    "name": (
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}",
        "must be up to 60 letters, digits, dots, - or _, a letter or digit first",
    ),
    "sha256": (r"[0-9a-f]{64}", "must be 64 hexadecimal digits, as sha256sum prints them"),
    "revision": (
        r"[0-9a-f]{40}",
        "must be a commit of 40 hexadecimal digits, since a branch can change",
    ),
    "repo": (r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", "must be owner/name"),
    "version": (r"[A-Za-z0-9][A-Za-z0-9.+!-]*", "must be one exact version"),
    "packages": (r"[A-Za-z0-9][A-Za-z0-9._-]*", "must be package names"),
    "api_key_env": (
        r"[A-Z][A-Z0-9_]*",
        "must be the name of an environment variable in capitals, never a key itself",
    ),
}


def _as_it_is(path: Path) -> Sequence[Card]:
    """The cards of one file, read again only when it has changed."""
    try:
        stat = path.stat()
    except OSError:
        return _read(path)  # says what is wrong
    return _as_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(16)
def _as_of(path: Path, *_: int) -> tuple[Card, ...]:
    return tuple(_read(path))


def _read(path: Path) -> list[Card]:
    """The cards of one file, checked."""
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise TomError(f"{path}: no such file; TOM_MODELS must name it or its folder") from None
    except OSError as error:
        raise TomError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise TomError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deep"
        raise TomError(f"{path}: not valid TOML: {reason}") from None
    for name in raw:
        if name != "model":
            raise TomError(f"{path}: nothing called {name[:40]!r} belongs here; write [[model]]")
    entries = raw.get("model", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TomError(f"{path}: model must be written as [[model]]")
    found: list[Card] = []
    for number, entry in enumerate(entries, start=1):
        name = entry.get("name")
        label = repr(name[:60]) if isinstance(name, str) else str(number)
        read = _card(path, f"{path}: model {label}", entry)
        if read.name.casefold() in (other.name.casefold() for other in found):
            raise TomError(f"{path}: model {label}: the name is taken by an earlier entry")
        found.append(read)
    return found


def _card(path: Path, where: str, entry: dict[str, Any]) -> Card:
    """One card from its entry."""
    entry = dict(entry)
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in ENGINES:
        hint = nearest(kind, ENGINES) if "kind" in entry else f"; add one of {', '.join(ENGINES)}"
        raise TomError(f"{where}: kind {'' if kind is None else repr(kind)[:40]} is unknown{hint}")
    sources = entry.pop("source", []) if kind == "gguf" else []
    known = _COMMON | _OF_KIND[kind]
    needed = [*_NEEDED, *_OF_KIND[kind], *(["size"] if kind == "gguf" else [])]
    _fields(where, entry, known, [name for name in needed if name not in _OPTIONAL])
    entry.setdefault("engine", ENGINES[kind][0])
    _one_of(where, entry, "engine", ENGINES[kind])
    _one_of(where, entry, "chat_template", _TEMPLATES)
    _one_of(where, entry, "prefill", PREFILL)
    _one_of(where, entry, "answer", _ANSWERS)
    if kind == "endpoint":
        _address(where, entry["base_url"])
    if kind == "gguf":
        if not isinstance(sources, list) or not sources:
            raise TomError(f"{where}: needs at least one [[model.source]]")
        entry["source"] = tuple(
            _source(f"{where}, source {number}", source)
            for number, source in enumerate(sources, start=1)
        )
    return Card(**entry, file=str(path))


def _source(where: str, entry: object) -> Source:
    if not isinstance(entry, dict):
        raise TomError(f"{where}: must be written as [[model.source]]")
    for fields in _SOURCES:
        if next(iter(fields)) in entry:
            _fields(where, entry, fields, [name for name in fields if name != "bytes"])
            packages = tuple(entry.get("packages", ()))
            return Source(**entry | {"packages": packages})
    raise TomError(f"{where}: must name packages, repo or path")


def _fields(
    where: str, entry: dict[str, Any], known: dict[str, str], needed: Iterable[str]
) -> None:
    """Every field must be known and of its form, and the needed ones must be there."""
    for name, value in entry.items():
        if name not in known:
            raise TomError(f"{where}: unknown field {name[:40]!r}{nearest(name, known)}")
        right = {
            _TEXT: isinstance(value, str) and bool(value.strip()),
            _COUNT: isinstance(value, int) and not isinstance(value, bool) and value > 0,
            _YES: isinstance(value, bool),
            _TEXTS: isinstance(value, list)
            and bool(value)
            and all(isinstance(text, str) for text in value),
        }[known[name]]
        if not right:
            raise TomError(f"{where}: {name} must be {known[name]}, got {repr(value)[:40]}")
        pattern, says = _FORMS.get(name, ("", ""))
        for text in value if isinstance(value, list) else [value]:
            if pattern and not re.fullmatch(pattern, text):
                got = "" if name == "api_key_env" else f", got {text[:40]!r}"  # it may be a key
                raise TomError(f"{where}: {name} {says}{got}")
    for name in needed:
        if name not in entry:
            raise TomError(f"{where}: the field {name!r} is missing; add it ({known[name]})")


def _one_of(where: str, entry: dict[str, Any], name: str, allowed: Sequence[str]) -> None:
    value = entry.get(name, allowed[0])
    if value not in allowed:
        raise TomError(f"{where}: {name} {value[:40]!r} is not one of {', '.join(allowed)}")


def _address(where: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname)
        secret = parts.username is not None or bool(parts.query)
    except ValueError:
        right = secret = False
    if not right or secret:
        raise TomError(
            f"{where}: base_url must be http(s)://host[:port]/path, without a key in it (keys "
            "belong in the environment variable that api_key_env names)"
        )
