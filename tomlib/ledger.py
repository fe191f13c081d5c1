"""The ledger: an append-only record of draws and readouts, one JSON line each.

A ledger is a folder: `draws/SHARD.jsonl` and `readouts/SHARD.jsonl`, one shard per job, so that
many jobs may write at the same time. A line is written once and never changed. The rules:

- A batch of lines is one write, synced to disk; what a full disk leaves half written is cut back.
- A last line torn by a crash is not there: it is left out when reading and cut off when writing.
- Any other damage is an error that names file and line. Nothing is repaired by guessing.
- A key stands in a ledger once. What a read-only folder (the run that comes with the book) has
  counts before what the ledger's own folder has.

The key of a draw is all that its text depends on but chance, and its index (`DRAW_KEY`); the key of
a readout the same without sampling (`READOUT_KEY`).
"""

import errno
import gc
import gzip
import json
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tomlib.answers import OUTCOMES, GameType, read
from tomlib.errors import TomError
from tomlib.scenarios import nearest

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["draws", "readouts"]
Row = dict[str, Any]

KINDS: tuple[Kind, Kind] = ("draws", "readouts")

# -- what a line must be --------------------------------------------------------------------------


def _text(value: object) -> bool:
    return type(value) is str and value != ""


def _name(value: object) -> bool:
    return type(value) is str and _NAME.fullmatch(value) is not None


def _hex(value: object) -> bool:
    return type(value) is str and _HEX.fullmatch(value) is not None


def _number(value: object) -> bool:
    return type(value) in (int, float) and -1e15 <= value <= 1e15  # type: ignore[operator]


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _time(value: object) -> bool:
    return type(value) is str and _is_time(value)


@lru_cache(1024)  # a batch of draws has one time
def _is_time(text: str) -> bool:
    with suppress(ValueError):
        return len(text) == 20 and text[-1] == "Z" and bool(datetime.fromisoformat(text).tzinfo)
    return False


_HEX = re.compile("[0-9a-f]{16}")
# Names go into prose, where markup would come alive; those of cards, contexts and games are plain.
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._+-]{0,59}")
_WHERE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a card name", _name),
    "weights": ("16 hex digits", _hex),
    "adapter": ("16 hex digits or null", lambda v: v is None or _hex(v)),
    "split": ("a name", _name),
    "context": ("a name", _name),
    "game": ("a name", _name),
    "payoffs": (
        "[R, S, T, P] or [players, endowment, multiplier]",
        lambda v: type(v) is list and len(v) in (3, 4) and all(map(_number, v)),
    ),
    "answer": ("a name", _name),
    "prompt": ("16 hex digits", _hex),
    "temperature": ("a number of at least 0", lambda v: _number(v) and v >= 0),
    "top_p": ("a number above 0 up to 1", lambda v: _number(v) and 0 < v <= 1),
    "repetition_penalty": ("a number above 0", lambda v: _number(v) and v > 0),
}
_MADE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "engine": ("a text", _text),
    "time": ("a UTC time such as 2026-01-31T12:00:00Z", _time),
}

#: Fields of a line in their order: what a value must be, in words and as a test.
SCHEMA: dict[Kind, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "draws": _WHERE
    | {
        "max_new_tokens": ("a count", _count),
        "seed": ("a count", _count),
        "index": ("a count", _count),
        "text": ("a text", lambda v: type(v) is str),
        "choice": ('"C", "D", a count or null', lambda v: v in ("C", "D", None) or _count(v)),
        "outcome": (f"one of {', '.join(OUTCOMES)}", lambda v: v in OUTCOMES),
        "new_tokens": ("a count", _count),
    }
    | _MADE,
    "readouts": _WHERE
    | {
        "p": (
            "options with their probabilities",
            lambda v: (
                type(v) is dict and v != {} and all(_number(q) and q >= 0 for q in v.values())
            ),
        ),
        "coverage": ("a number of 0 to 1", lambda v: _number(v) and 0 <= v <= 1 + 1e-6),
    }
    | _MADE,
}

READOUT_KEY = (
    "weights", "adapter", "prompt", "temperature", "top_p", "repetition_penalty", "answer",
)  # fmt: skip
DRAW_KEY = (*READOUT_KEY, "max_new_tokens", "index")
_KEYS: dict[Kind, tuple[str, ...]] = {"draws": DRAW_KEY, "readouts": READOUT_KEY}


# The fields in which the lines of a job differ, and how they begin.
_OWN = {kind: dict([*schema.items()][len(_WHERE) :]) for kind, schema in SCHEMA.items()}
_REST = {kind: f', "{next(iter(own))}"'.encode() for kind, own in _OWN.items()}


def _complaint(kind: Kind, row: object, own: bool = False) -> str | None:
    """What is wrong with a row (or with its `_OWN` part), or None."""
    schema = _OWN[kind] if own else SCHEMA[kind]
    if type(row) is not dict:
        return "is no JSON object"
    if row.keys() != schema.keys():
        for name in row:
            if name not in schema:
                return f"has an unknown field {name!r}{nearest(name, schema)}"
        return f"lacks the field {next(name for name in schema if name not in row)!r}"
    for name, (words, right) in schema.items():
        if not right(row[name]):
            return f"has {name} = {str(row[name])[:40]!r}, which is not {words}"
    if kind == "draws" and (row["choice"] is None) == (row["outcome"] == "ok"):
        return f"has outcome {row['outcome']!r} with choice {row['choice']!r}"
    return None


# -- one file -------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """What has been read of a file so far; only what was appended since is read again."""

    path: Path
    kind: Kind
    rows: list[Row] = field(default_factory=list)
    keys: dict[tuple[Any, ...], int] = field(default_factory=dict)  # key -> line number, as rows
    starts: dict[bytes, Row] = field(default_factory=dict)  # how lines begin -> what that says
    seen: tuple[int, int, int] | None = None  # inode, size, time of change
    offset: int = 0
    tail: bytes = b""  # what stood before the offset, to notice that the file was edited
    torn: bool = False  # the last line is incomplete and left out
    ended: bool = True  # the last line has its end of line

    def refresh(self) -> bool:
        """Read what is new; whether anything was."""
        try:
            stat = self.path.stat()
            now = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if now == self.seen:
                return False
            grown = self.seen is not None and now[0] == self.seen[0] and now[1] > self.seen[1]
            data = self._bytes(self.offset - len(self.tail)) if grown and self.ended else b""
            if self.tail and data.startswith(self.tail):
                data = data[len(self.tail) :]
            else:
                self.rows, self.keys, self.offset, self.tail = [], {}, 0, b""
                data = self._bytes(0)
        except OSError as error:
            raise TomError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        self.seen = None  # until all of it turned out to be sound
        self._take(data)
        self.seen = now
        return True

    def _bytes(self, start: int) -> bytes:
        if self.path.suffix != ".gz":
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read()
        try:
            with gzip.open(self.path) as file:
                return file.read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TomError(f"{self.path}: damaged gzip file ({error}); restore it") from None

    def _take(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        number = len(self.rows)
        for number, line in enumerate(lines, start=len(self.rows) + 1):
            self._add(line, number)
        whole = len(data) - len(rest)
        self.offset += whole
        if self.path.suffix != ".gz":
            self.tail = (self.tail + data[max(0, whole - 512) : whole])[-512:]
        self.torn, self.ended = False, True
        if rest:
            # A line cut short is never complete JSON; one that only lacks its end of line is.
            try:
                json.loads(rest)
            except (ValueError, RecursionError):
                self.torn = True
            else:
                self._add(rest, number + 1)
                self.ended = False

    def _add(self, line: bytes, number: int) -> None:
        row = self._parsed(line, number)
        key = _key(self.kind, row)
        if key in self.keys:
            raise TomError(
                f"{self.path}, line {number}: repeats the key of line {self.keys[key]}; "
                "delete one of the two lines"
            )
        self.rows.append(row)
        self.keys[key] = number

    def _parsed(self, line: bytes, number: int) -> Row:
        # The lines of a job begin alike (model, scenario, prompt): that is read and checked once.
        # Quotes within a text are escaped, so that the mark between the two parts is in no text.
        start, mark, rest = line.partition(_REST[self.kind])
        known = self.starts.get(start)
        try:
            own = _decoded(b"{" + mark[2:] + rest) if known else None
        except (ValueError, RecursionError):
            own = None  # damaged: said of the whole line
        try:
            if known and own and known.keys().isdisjoint(own):
                row = known | own
                wrong = _complaint(self.kind, own, own=True)
            else:
                row = _decoded(line)
                wrong = _complaint(self.kind, row)
                if not wrong and mark:
                    with suppress(ValueError):
                        shared = _decoded(start + b"}")
                        if shared.keys() == _WHERE.keys():  # else the fields are in another order
                            self.starts[start] = shared
        except UnicodeDecodeError:
            wrong = "is not UTF-8"
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else "nested too deep"
            wrong = f"is damaged ({reason})" if line.strip() else "is empty"
        if wrong:
            raise TomError(
                f"{self.path}, line {number}: {wrong}; restore the file or delete that line, "
                "and what it held is drawn again"
            )
        return row


def _decoded(line: bytes) -> Row:
    row: Row = _DECODER.decode(line.decode("utf-8"))
    return row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a field stands twice")
    return row


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)


def _key(kind: Kind, row: Row) -> tuple[Any, ...]:
    return tuple([row[name] for name in _KEYS[kind]])


# -- the ledger -----------------------------------------------------------------------------------


class Ledger:
    """The draws and readouts of a run.

    Reading again reads only what was appended since, by this process or by others.

    Args:
        folder: Where this run writes; made with the first line.
        readonly: Folders of the same layout that are only read, such as the shipped run.
    """

    def __init__(self, folder: Path | str, readonly: Sequence[Path | str] = ()) -> None:
        self.folder = Path(folder)
        own = self.folder.resolve()
        self.readonly = tuple(Path(other) for other in readonly if Path(other).resolve() != own)
        self._shards: dict[Path, _Shard] = {}
        self._keys: dict[Kind, dict[tuple[Any, ...], _Shard]] = {kind: {} for kind in KINDS}
        self._frame: pd.DataFrame | None = None
        self._locked: set[tuple[Kind, str]] = set()

    def draws(self, **equal: Any) -> "pd.DataFrame":
        """Draws in the order of folders, shards and lines.

        Args:
            **equal: Values that columns must have (None: have none), such as `answer="choice"`.

        Returns:
            The fields of a line as columns, `model` being the card's name, and `motivation`, which
            is not stored but read out of `text` with `answers.read`. `choice` is an object column:
            a letter, a whole contribution, or None.

        Raises:
            TomError: a damaged ledger, or an unknown column.
        """
        with _without_collecting():
            if self._refresh("draws") or self._frame is None:
                self._frame = _frame(self._rows("draws"))
        frame = self._frame
        for name, value in equal.items():
            if name not in frame:
                raise TomError(f"draws have no column {name!r}{nearest(name, frame.columns)}")
            frame = frame[frame[name].isna() if value is None else frame[name].eq(value)]
        return frame.reset_index(drop=True)

    def readouts(self, **equal: Any) -> list[Row]:
        """Readouts as rows, in the order of folders, shards and lines; `equal` as for draws.

        Raises:
            TomError: a damaged ledger, or an unknown field.
        """
        self._refresh("readouts")
        for name in equal:
            if name not in SCHEMA["readouts"]:
                raise TomError(f"readouts have no {name!r}{nearest(name, SCHEMA['readouts'])}")
        return [
            dict(row)
            for row in self._rows("readouts")
            if all(row[name] == value for name, value in equal.items())
        ]

    def append(
        self, kind: Kind, shard: str | Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write rows to a shard, all or none, and sync them to disk.

        Takes the shard's lock for the time being where the caller does not hold it.

        Raises:
            TomError: a row that is not as `SCHEMA` says or whose key is there already; another
                process that writes to the shard; a full, read-only or failing disk. Nothing has
                been written then.
        """
        _known(kind)
        if not rows:
            return
        name = shard_name(shard)
        if (kind, name) not in self._locked:
            with self.lock(kind, name):
                return self.append(kind, name, rows)
        path = self.folder / kind / f"{name}.jsonl"
        self._refresh(kind)
        known = self._keys[kind]
        ordered: dict[tuple[Any, ...], Row] = {}
        for number, given in enumerate(rows, start=1):
            wrong = _complaint(kind, dict(given))
            if wrong:
                raise TomError(f"{path}: row {number} to append {wrong}")
            row = {field_: given[field_] for field_ in SCHEMA[kind]}
            key = _key(kind, row)
            if key in known or key in ordered:
                there = known[key].path if key in known else "the same batch"
                raise TomError(f"{path}: row {number} to append is in {there} already")
            ordered[key] = row
        # ASCII only: half a surrogate pair or an odd line separator in a text stays what it is.
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in ordered.values())
        with _disk(path):
            _write(path, lines.encode("ascii"))
        self._refresh(kind)
        return None

    @contextmanager
    def lock(self, kind: Kind, shard: str | Sequence[str]) -> Iterator[None]:
        """Hold a shard for writing; a torn last line is cut off first.

        The lock is the kernel's: it is free again once its holder has ended, in whatever way.

        Raises:
            TomError: another process (or this one) holds the shard; names it.
        """
        _known(kind)
        name = shard_name(shard)
        path = self.folder / kind / f"{name}.jsonl"
        with hold(self.folder / "locks" / f"{kind}--{name}", path):
            with _disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _heal(path)
            self._locked.add((kind, name))
            try:
                yield
            finally:
                self._locked.discard((kind, name))

    def _refresh(self, kind: Kind) -> bool:
        """Take in what was written since; whether anything was."""
        before = {path for path, shard in self._shards.items() if shard.kind == kind}
        now = [path for folder in (*self.readonly, self.folder) for path in _files(folder / kind)]
        changed = before != set(now)
        for path in before - set(now):
            del self._shards[path]
        for path in now:
            changed |= self._shards.setdefault(path, _Shard(path, kind)).refresh()
        if not changed:
            return False
        if kind == "draws":
            self._frame = None
        keys: dict[tuple[Any, ...], _Shard] = {}
        for path in now:
            shard = self._shards[path]
            for key, number in shard.keys.items():
                first = keys.setdefault(key, shard)  # the first folder counts
                if first is not shard and first.path.parent == path.parent:
                    self._shards.clear()
                    raise TomError(
                        f"{path}, line {number}: repeats the key of {first.path}, "
                        f"line {first.keys[key]}; delete one of the two lines"
                    )
        self._keys[kind] = keys
        return True

    def _rows(self, kind: Kind) -> list[Row]:
        """Rows that count, in order."""
        keys = self._keys[kind]
        return [
            row
            for folder in (*self.readonly, self.folder)
            for path in _files(folder / kind)
            if path in self._shards
            for row, key in zip(self._shards[path].rows, self._shards[path].keys, strict=True)
            if keys[key] is self._shards[path]
        ]


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Look for no garbage: a million small things are made here, and all of them are kept."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def hold(place: Path, what: Path) -> Iterator[None]:
    """Hold a lock file: `what` is written by one process at a time.

    The lock is the kernel's: it is free again once its holder has ended, in whatever way.

    Raises:
        TomError: another process (or this one) holds it; names it.
    """
    import fcntl

    with _disk(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with _disk(place):
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(held, 200, 0).decode("utf-8", "replace").strip()
                raise TomError(
                    f"{what}: another run is writing to it ({holder or 'it has just begun'}); "
                    "wait until it has ended, or end it"
                ) from None
            me = f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%FT%TZ}"
            os.ftruncate(held, 0)
            os.pwrite(held, me.encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(held, 0)
    finally:
        os.close(held)


def shard_name(parts: str | Sequence[str]) -> str:
    """A safe file name from the parts that tell one job from another.

    >>> shard_name(["org/model", "choice+motivation", "in_sample", "IR"])
    'org_model--choice+motivation--in_sample--IR'
    """
    name = parts if isinstance(parts, str) else "--".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._+-]", "_", name)
    safe = re.sub(r"^[.-]", "_", safe)
    if not safe:
        raise TomError("a shard needs a name")
    if len(safe) > 180:
        safe = f"{safe[:170]}-{zlib.crc32(name.encode()):08x}"
    return safe


def verify(folder: Path | str) -> "pd.DataFrame":
    """Check every line of a ledger folder: readable, as `SCHEMA` says, no key twice, read rightly.

    "Read rightly" means that reading a draw's text again gives its choice and outcome.

    Returns:
        Columns `kind, file, rows, torn, problem`: one row per file with an empty `problem`, or one
        per problem; `torn` marks a last line that the next write cuts off, which is no damage.

    Raises:
        TomError: no such folder.
    """
    import pandas as pd

    folder = Path(folder)
    if not folder.is_dir():
        raise TomError(f"{folder}: no such folder; name the folder of a run, such as runs/quick")
    table: list[tuple[str, str, int, bool, str]] = []
    for kind in KINDS:
        first: dict[tuple[Any, ...], str] = {}
        for path in _files(folder / kind):
            shard = _Shard(path, kind)
            problems = []
            try:
                shard.refresh()
            except TomError as error:
                problems.append(str(error))
            for key, number in shard.keys.items():
                here = f"{path}, line {number}"
                if first.setdefault(key, here) != here:
                    problems.append(f"{here}: repeats the key of {first[key]}")
            for number, row in enumerate(shard.rows if kind == "draws" else (), start=1):
                if not _read_rightly(row):
                    problems.append(
                        f"{path}, line {number}: its text does not say choice {row['choice']!r} "
                        f"with outcome {row['outcome']!r}"
                    )
            name = str(path.relative_to(folder))
            for problem in problems or [""]:
                table.append((kind, name, len(shard.rows), shard.torn, problem))
    return pd.DataFrame(table, columns=["kind", "file", "rows", "torn", "problem"])


def _game(row: Row) -> tuple[GameType, str, int]:
    """What `answers.read` has to know of a draw's game: its type, how it ended, the endowment."""
    if len(row["payoffs"]) == 3:
        return "public_goods", "stop", int(row["payoffs"][1])
    return "two_player", "stop", 0


def _read_rightly(row: Row) -> bool:
    """Whether the text says what was stored; how its generation ended is not, so either will do."""
    game, _, endowment = _game(row)
    return any(
        (found.choice, found.outcome) == (row["choice"], row["outcome"])
        for finish in ("stop", "length")
        for found in [read(row["text"], row["answer"], game, finish, endowment)]
    )


def _frame(rows: list[Row]) -> "pd.DataFrame":
    import pandas as pd

    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in SCHEMA["draws"]}
    columns["payoffs"] = [tuple(payoffs) for payoffs in columns["payoffs"]]
    # Draws that stop at the letter say the same few things many times.
    motivation = cache(lambda text, answer, *game: read(text, answer, *game).motivation)
    columns["motivation"] = [
        motivation(row["text"], row["answer"], *_game(row))
        if row["outcome"] == "ok" and row["answer"] != "choice"
        else None
        for row in rows
    ]
    numbers = dict.fromkeys(["temperature", "top_p", "repetition_penalty"], "float64")
    numbers |= dict.fromkeys(["max_new_tokens", "seed", "index", "new_tokens"], "int64")
    objects = ("adapter", "payoffs", "choice", "motivation", "text")
    kinds = numbers | dict.fromkeys(objects, "object")
    return pd.DataFrame(
        {name: pd.Series(values, dtype=kinds.get(name, "str")) for name, values in columns.items()}
    )


# -- the disk -------------------------------------------------------------------------------------


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise TomError(f"a ledger has no {kind!r}{nearest(kind, KINDS)}")


def _files(folder: Path) -> list[Path]:
    """The shards of a folder by name; none where there is no folder."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TomError(f"{folder}: cannot be read ({error.strerror})") from None
    return [folder / name for name in names if name.endswith((".jsonl", ".jsonl.gz"))]


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some of your quota",
            errno.EFBIG: "raise the limit on file sizes",
            errno.EROFS: "make the disk writable or run in another folder",
            errno.EACCES: "make the folder writable or run in another one",
            errno.EPERM: "make the folder writable or run in another one",
        }.get(error.errno or 0, "check the disk")
        raise TomError(
            f"{path}: cannot be written ({error.strerror or error}); {advice} and start again: "
            "what was recorded before is safe"
        ) from None


def _write(path: Path, data: bytes) -> None:
    """Append whole lines in one write; cut back whatever could not be written whole."""
    new = not path.exists()
    out = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(out).st_size
        try:
            written = os.write(out, data)
            while written < len(data):  # a disk that runs full takes a part, then says so
                written += os.write(out, data[written:])
            os.fsync(out)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(out, size)
            raise
    finally:
        os.close(out)
    if new:  # the folder's entry for the file has to reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(folder)
        os.close(folder)


def _heal(path: Path) -> None:
    """Cut off a last line that a crash tore; end one that only lacks its end of line."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        size = os.fstat(file).st_size
        start, rest = size, b""
        while start > 0 and b"\n" not in rest:
            step = min(1 << 16, start)
            start -= step
            rest = os.pread(file, step, start) + rest
        rest = rest[rest.rfind(b"\n") + 1 :]
        if not rest:
            return
        try:
            json.loads(rest)
        except (ValueError, RecursionError):
            os.ftruncate(file, size - len(rest))
        else:
            os.pwrite(file, b"\n", size)
        os.fsync(file)
    finally:
        os.close(file)
