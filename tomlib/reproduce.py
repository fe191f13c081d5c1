"""The whole experiment, step by step: all draws, both trainings, the chapters, the book of the run.

`work` is the one list of what a run has to do; planning, running and verifying all go by it. `steps`
cuts it into jobs, which `reproduce` does one after the other and the Snakefile on any number of
machines. Every step takes what is there and does the rest, so a run that was stopped goes on where
it was.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from tomlib import __version__
from tomlib.collect import (
    ARM_OF,
    close_engines,
    collect,
    plan,
    player_if_ready,
    stops_early,
    tuned_adapter,
)
from tomlib.errors import TomError
from tomlib.finetune import Adapter, check_base, settings
from tomlib.ledger import hold, verify
from tomlib.models import card, engine_of
from tomlib.profiles import CHAPTERS, PAGES, Profile, Run, override
from tomlib.prompts import prompt_id, wording_names
from tomlib.readout import has_exact, held_readouts, readout
from tomlib.scenarios import SPLITS, Scenario, check_written, root
from tomlib.weights import fetch, transformers_folder, weights_id

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "xllamacpp", "langchain-core", "langchain-openai",
    "numpy", "pandas", "scipy", "statsmodels", "matplotlib", "papermill", "jupyter-book",
)  # fmt: skip

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Work:
    """Draws (or, with n = 0, exact probabilities) of one model in one split, in one answer form."""

    role: str
    split: str
    answer: str
    n: int
    letter_only: bool = True
    """Whether draws stop at the choice."""
    wording: str = ""
    """Another wording than the run's (the sweep of chapter 01)."""

    @property
    def name(self) -> str:
        """How the manifest calls this step."""
        return f"{self.role} {self.split} {self.answer} {self.n or 'exact'} {self.wording}".strip()


def work(run: Run) -> list[Work]:
    """All that the chapters of a run need, in the order in which it is done.

    The teacher answers with motivations in sample (they train the student); wherever choices are
    compared, draws in the same words stop at the letter. `choice` and `reasoning+choice` are the
    robustness conditions of chapter 02.
    """
    p = run.profile
    splits = [s for s in SPLITS if _scenarios(run, s)]
    live = card(p.teacher).kind != "published"  # published counts are taken as they are
    todo: list[Work] = []
    if live:
        form = p.teacher_answer
        todo += [Work("teacher", "in_sample", form, p.n_teacher, letter_only=False)]
        for split in splits:
            todo += [Work("teacher", split, form, p.n), Work("teacher", split, form, 0)]
        if form != "choice":
            todo += [Work("teacher", "in_sample", "choice", n) for n in (p.n, 0)]
        todo += [
            Work("teacher", "in_sample", each, 0, wording=name)
            for name in wording_names()
            for each in ("choice", "choice+motivation")
            if not p.prompts_from
        ]
        if p.n_reasoning and form != "reasoning+choice":
            todo += [Work("teacher", "in_sample", "reasoning+choice", p.n_reasoning)]
    roles = ["student", "tuned"] + ["published-tuned"] * ("published" in run.arms)
    for role in roles:
        for split in splits:
            todo += [Work(role, split, p.student_answer, n) for n in (p.n, 0)]
    return [w for w in todo if w.n or has_exact(run, w.role, w.answer)]


def _scenarios(run: Run, split: str) -> list[Scenario]:
    """The run's scenarios of a split; none where its contexts and games leave none."""
    try:
        return run.scenarios(split)
    except TomError:
        return []


def do(run: Run, what: Work, context: str = "") -> pd.DataFrame:
    """Have one piece of work done, or one context's share; what is in the ledger is not done again."""
    scenarios = asked(run, what, context)
    if what.wording:
        run = run.changed(wording=what.wording)
    if not scenarios:
        return pd.DataFrame()
    if what.n:
        return collect(run, what.role, scenarios, what.answer, what.n, letter_only=what.letter_only)
    return readout(run, what.role, scenarios, what.answer)


def planned(run: Run) -> pd.DataFrame:
    """What is still to be asked, one row per model, split and answer form.

    Returns:
        Columns `model, split, answer, wanted, in_ledger, to_ask, most_new_tokens`.
    """
    rows = []
    for w in work(run):
        if not w.n:
            continue
        p = plan(run, w.role, asked(run, w), w.answer, w.n, letter_only=w.letter_only)
        sums = p[["wanted", "in_ledger", "to_ask", "most_new_tokens"]].sum()
        rows.append({"model": w.role, "split": w.split, "answer": w.answer, **sums})
    return pd.DataFrame(rows)


def costs(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """What the work of `planned` takes at most: one row per model card.

    Memory is that of the weights at 2 bytes a parameter (half a byte and a half in NF4) and a tenth
    more; time is left to measurement.

    Returns:
        Columns `model, card, draws, new_tokens, weights_gb`.
    """
    p = run.profile
    rows = []
    for role, part in table.groupby("model", sort=False):
        who = card(p.teacher if role == "teacher" else p.student)
        each = 0.55 if role != "teacher" and p.student_quantization == "nf4" else 2.0
        rows.append(
            {
                "model": role,
                "card": who.name,
                "draws": int(part["to_ask"].sum()),
                "new_tokens": int(part["most_new_tokens"].sum()),
                "weights_gb": round(1.1 * each * who.parameters / 1e9, 1),
            }
        )
    return pd.DataFrame(rows)


# --- the run as a graph ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A job of a run: what one process does, on whichever machine."""

    name: str
    """`weights/CARD`, `draws/ROLE`, `draws/ROLE/CONTEXT`, `adapter/ARM`, `chapter/NAME` or `book`."""
    after: tuple[str, ...]
    """Names of the steps that have to be done before."""
    mark: str
    """A digest of everything that decides what the step leaves: with another mark, do it again."""


def steps(run: Run, shards: str = "model") -> list[Step]:
    """All of a run as steps, in an order in which they can be done.

    Args:
        run: Profile and folders.
        shards: `model`: one job asks a model for all its draws, so that it is loaded once;
            `context`: one job per model and context, to be spread over machines.

    Raises:
        TomError: Another word for `shards`; a profile that names unknown models or contexts, an
            engine that cannot run its model, a student that cannot be trained, a context still to
            be written.
    """
    if shards not in ("model", "context"):
        raise TomError(f"shards = {shards!r} is unknown; it is 'model' or 'context'")
    p = run.profile
    engine_of(card(p.teacher), p.teacher_engine)
    if engine_of(card(p.student), p.student_engine) != "transformers":
        raise TomError(
            f"{p.student}: a student is trained, and plays with its adapter, in Transformers: name a "
            "card with weights, and student_engine = 'transformers'"
        )
    todo = work(run)
    check_written(s for split in SPLITS for s in _scenarios(run, split))
    trained = {arm: _digest(_training(run, arm)) for arm in run.arms}
    marks = {w: _digest(_decides(run, w), trained.get(ARM_OF.get(w.role, ""))) for w in todo}
    names = dict.fromkeys([p.teacher, p.student])
    here = [name for name in names if card(name).kind not in ("published", "endpoint")]
    found = [Step(f"weights/{name}", (), _digest(weights_id(card(name)))) for name in here]
    draws: dict[str, list[str]] = {}
    for role in dict.fromkeys(w.role for w in todo):
        name = p.teacher if role == "teacher" else p.student
        before = [f"weights/{name}"] if name in here else []
        if role in ARM_OF:
            rows = draws.get("teacher", []) if role == "tuned" else []
            adapter = f"adapter/{ARM_OF[role]}"
            found.append(Step(adapter, (*before, *rows), trained[ARM_OF[role]]))
            before = [*before, adapter]
        draws[role] = []
        mine = [w for w in todo if w.role == role]
        contexts = [s.context.name for w in mine for s in asked(run, w)]
        for context in dict.fromkeys(contexts) if shards == "context" else [""]:
            name = "/".join(["draws", role, context]).rstrip("/")
            some = [w for w in mine if not context or asked(run, w, context)]
            built_on = trained.get(ARM_OF.get(role, ""))
            mark = _digest(built_on, *[_decides(run, w, context) for w in some])
            found.append(Step(name, tuple(before), mark))
            draws[role].append(name)
    for chapter in (*CHAPTERS, *PAGES):
        if not (root() / "notebooks" / f"{chapter}.ipynb").is_file():
            continue
        if not _scenarios(run, _ABOUT.get(chapter[:2], "in_sample")):
            continue  # the profile's contexts and games leave nothing of its split
        used = [w for w in todo if reads(run, chapter, w)]
        after = tuple(d for role in dict.fromkeys(w.role for w in used) for d in draws[role])
        said: list[Any] = [p.name, p.label, *(marks[w] for w in used)]
        if chapter.startswith("03"):
            after, said = tuple(f"adapter/{arm}" for arm in run.arms), [*said, *trained.values()]
        if chapter == "status":  # tells of all that was done before it
            after = tuple(s.name for s in found)
            said += [s.mark for s in found]
        if chapter[:2] in ("04", "05", "06", "08", "in"):
            said += [p.bootstrap, p.seed, p.margin if chapter[:2] in ("06", "08") else None]
        found.append(Step(f"chapter/{chapter}", after, _digest(*said)))
    chapters = [s for s in found if s.name.startswith("chapter/")]
    return [*found, Step("book", tuple(s.name for s in chapters), _digest(*chapters))]


_ABOUT = {"05": "new_contexts", "06": "scaled_games", "07": "public_goods"}
"""The split that a chapter is about."""


def do_step(run: Run, name: str, parameters: Mapping[str, Any]) -> None:
    """Do one step by its name; what is done already is not done again.

    Raises:
        TomError: No step has this name; whatever the step itself raises.
    """
    kind, _, rest = name.partition("/")
    role, _, context = rest.partition("/")
    run.folder.mkdir(parents=True, exist_ok=True)
    if kind != "draws":
        close_engines()
    if kind == "weights":
        with _stage(run, f"weights {rest}"):
            fetch(card(rest))
            p = run.profile
            engines = {(p.teacher, p.teacher_engine), (p.student, p.student_engine)}
            if any(c == rest and engine_of(card(c), e) == "transformers" for c, e in engines):
                transformers_folder(card(rest))
    elif kind == "draws" and any(w.role == role and asked(run, w, context) for w in work(run)):
        for w in work(run):
            if w.role == role and asked(run, w, context):
                with _stage(run, f"{w.name} {context}".rstrip()):
                    do(run, w, context)
    elif kind == "adapter" and rest in run.arms:
        with _stage(run, f"train {'tuned' if rest == 'family' else 'published-tuned'}"):
            tuned_adapter(run, rest)
    elif kind == "chapter" and rest in (*CHAPTERS, *PAGES):
        with _stage(run, f"chapter {rest}"):
            run_chapters(run, [rest], parameters, replay=run.shipped is not None)
    elif name == "book":
        with hold(run.folder / "locks" / "book", run.folder / "book"), _stage(run, "book"):
            build_book(run.folder / "notebooks", run.folder / "book")
    else:
        raise TomError(f"step {name!r}: profile {run.profile.name!r} has no such step")


def reproduce(run: Run, parameters: Mapping[str, Any], *, book: bool = True) -> Path:
    """Do all of a run: weights, draws, trainings, chapters, book. Returns the run's folder."""
    with hold(run.folder / "locks" / "reproduce", run.folder):
        for step in steps(run):
            if book or step.name != "book":
                do_step(run, step.name, parameters)
    return run.folder


@contextmanager
def _stage(run: Run, name: str) -> Iterator[None]:
    """Time a part of the run, tell it, and note it in the manifest."""
    started, begin = datetime.now(UTC), time.monotonic()
    yield
    write_manifest(run, {name: {"start": _utc(started), "end": _utc(datetime.now(UTC))}})
    print(f"[{time.monotonic() - begin:6.1f} s] {name}", flush=True)


def asked(run: Run, what: Work, context: str = "") -> list[Scenario]:
    """The scenarios of a piece of work, or those of one context.

    Other wordings, and reasons first as a robustness check, are asked in the sweep's contexts only.
    """
    aside = what.wording or "reasoning+choice" == what.answer != run.profile.teacher_answer
    every = run.sweep() if aside else run.scenarios(what.split)
    return [s for s in every if context in ("", s.context.name)]


def _decides(run: Run, what: Work, context: str = "") -> Any:
    """Everything that decides a piece of work, or one context's share of it."""
    p = run.profile
    at = run.changed(wording=what.wording) if what.wording else run
    teacher = what.role == "teacher"
    short = stops_early(what.answer, what.letter_only)
    engine = (p.teacher_engine, "") if teacher else (p.student_engine, p.student_quantization)
    return [
        weights_id(card(p.teacher if teacher else p.student)),
        engine,
        [prompt_id(s, what.answer, at.wording) for s in asked(run, what, context)],
        [what.role, what.answer, what.n, what.letter_only, p.temperature],
        [p.top_p, p.repetition_penalty, p.tokens("choice" if short else what.answer), p.seed]
        if what.n
        else [],
    ]


def _training(run: Run, arm: str) -> Any:
    """Everything that decides an arm's adapter."""
    p = run.profile
    how = settings(run, arm).__dict__
    here = run.scenarios("in_sample")
    rows: Any = [prompt_id(s, "choice", w) for w in (run.wording, *run.copies) for s in here]
    rows.append(p.published_targets)
    name = p.published_teacher if arm == "published" else p.teacher
    if arm == "family" and card(name).kind != "published":
        drawn = Work("teacher", "in_sample", p.teacher_answer, p.n_teacher, letter_only=False)
        rows = [_decides(run, drawn), p.held_out]
    return [weights_id(card(p.student)), how, weights_id(card(name)), rows]


def reads(run: Run, chapter: str, w: Work) -> bool:
    """Whether a chapter reads this work: most compare choices, each model in its own answer form."""
    form = run.profile.teacher_answer if w.role == "teacher" else run.profile.student_answer
    compared = w.letter_only and w.answer == form and not w.wording
    splits = {"04": ["in_sample"], "05": ["in_sample", "new_contexts"], "07": ["public_goods"]}
    splits["06"] = ["in_sample", "scaled_games"]
    if chapter == "index":
        return w.n > 0 or compared
    if chapter.startswith("01"):
        first = w.role in ("teacher", "student") and w.split == "in_sample"
        return first and (compared or w.wording != "")
    if chapter.startswith("02"):
        return w.role == "teacher" and w.split == "in_sample" and w.n > 0
    return compared and w.split in splits.get(chapter[:2], [])


def _digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def run_chapters(
    run: Run, chapters: Sequence[str], parameters: Mapping[str, Any], *, replay: bool
) -> list[Path]:
    """Execute chapters with papermill into the run's `notebooks/`; their paths.

    Args:
        run: Where they are written.
        chapters: Their names.
        parameters: What they are given; `profile` too where it is a file outside `profiles/`.
        replay: Whether they may use the draws and adapters that come with the book.

    Raises:
        TomError: A chapter stopped with an error; its own line is given.
    """
    import logging

    import nbformat
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)
    out: list[Path] = []
    folder = run.folder / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    given = {"profile": run.profile.name, **parameters, "replay": replay}
    for chapter in chapters:
        source, target = root() / "notebooks" / f"{chapter}.ipynb", folder / f"{chapter}.ipynb"
        if not source.is_file():
            raise TomError(f"chapter {chapter!r}: no file {source}")
        half = target.with_suffix(".part.ipynb")
        with (
            hold(run.folder / "locks" / f"chapter--{chapter}", target),
            tempfile.TemporaryDirectory(prefix="tom-") as private,
        ):
            # The kernel is talked to through files of that folder: no port is opened.
            talk = {"transport": "ipc", "connection_file": f"{private}/kernel.json"}
            try:
                # Written once, when it is done: papermill would write it before and after each cell.
                executed = papermill.execute_notebook(
                    str(source),
                    None,
                    parameters=given,
                    cwd=str(root()),
                    kernel_name="python3",
                    progress_bar={"desc": chapter},
                    log_output=False,
                    config=Config(KernelManager=talk),
                )
            except papermill.PapermillExecutionError as error:
                raise TomError(f"chapter {chapter}: {error.ename}: {error.evalue}") from None
            except RuntimeError as error:  # the kernel ended: killed, or out of memory
                said = str(error) or type(error).__name__
                raise TomError(
                    f"chapter {chapter}: its kernel has ended ({said}); if memory ran out, free "
                    "some; the same command goes on from here"
                ) from None
            _hide_as_parameters(executed)
            half.write_text(nbformat.writes(executed), "utf-8")  # type: ignore[no-untyped-call]
            os.replace(half, target)
        out.append(target)
    return out


def _hide_as_parameters(executed: Any) -> None:
    """Have the cell of given parameters hidden in the book where the cell of defaults is."""
    tags = {
        kind: cell["metadata"].setdefault("tags", [])
        for cell in executed["cells"]
        for kind in ("parameters", "injected-parameters")
        if kind in cell["metadata"].get("tags", [])
    }
    if "remove-cell" in tags.get("parameters", []) and "injected-parameters" in tags:
        tags["injected-parameters"].append("remove-cell")


def build_book(notebooks: Path | None = None, out: Path | None = None) -> Path:
    """Build the Jupyter Book, warnings as errors; the path of its first page.

    Args:
        notebooks: Executed chapters to show in place of the committed ones.
        out: Where to put the pages; `_build/html` of the repository unless given.

    Raises:
        TomError: Jupyter Book is missing, or found something to warn about.
    """
    if notebooks is not None and not any(notebooks.glob("*.ipynb")):
        raise TomError(f"{notebooks}: no executed chapters there; name a run's folder `notebooks`")
    with tempfile.TemporaryDirectory() as folder:
        source = built = root()
        if notebooks is not None or out is not None:
            source = built = Path(folder)
            own = notebooks is not None and (notebooks.parent / "manifest.json").is_file()
            for name in _BOOK:
                here = root() / name
                if here.is_dir():
                    # The data behind the figures go with them: the run's own, or what is shipped.
                    leave_out = shutil.ignore_patterns("runs") if own and name == "data" else None
                    shutil.copytree(here, source / name, ignore=leave_out)
                elif here.is_file():
                    shutil.copy2(here, source / name)
            if notebooks is not None and own:
                named = read_manifest(notebooks.parent)["profile"]["name"]
                ship(notebooks.parent, source / "data" / "runs" / named)
        for chapter in sorted(notebooks.glob("*.ipynb")) if notebooks else []:
            if not chapter.name.endswith(".part.ipynb"):
                shutil.copy2(chapter, source / "notebooks" / chapter.name)
        command = [
            *(sys.executable, "-c", _JUPYTER_BOOK, "build", str(source)),
            # All pages: one that is kept from an earlier build would not warn again.
            *("--path-output", str(built), "--all", "-W", "--keep-going", "-q"),
        ]
        plain = {**os.environ, "NO_COLOR": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=plain)
        pages = built / "_build" / "html"
        if done.returncode or not (pages / "index.html").is_file():
            lines = (done.stdout + done.stderr).replace(f"{source}/", "").splitlines()
            said = [x for x in lines if "WARNING" in x or "rror" in x or "No module" in x]
            raise TomError("the book does not build: " + " | ".join(said[:5] or lines[-1:]))
        if source != root():
            target = out or root() / "_build" / "html"
            shutil.copytree(pages, target, dirs_exist_ok=True)
            pages = target
        return pages / "index.html"


_JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
"""Its command, run by this Python: the package has no `__main__`, and the script may not be on PATH."""

_BOOK = (
    "_config.yml", "_toc.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks", "book",
    "data", "notebooks", "profiles",
)  # fmt: skip
"""What the book is built from."""


# --- shipping and checking a run ------------------------------------------------------------------


def ship(folder: Path, to: Path) -> Path:
    """Copy what a replay needs of a run, shards packed: draws, readouts, adapters, manifest.

    `SHA256SUMS` beside them holds the hash of every file, as `sha256sum` writes it.

    Of adapters that are no arm's own (those that chapters 09 and 10 try) only the records are copied:
    their probabilities are in the ledger, and whoever asks them anew trains them anew.

    Args:
        folder: A run's folder.
        to: Where it goes, such as `data/runs/NAME`; what is there is replaced.

    Raises:
        TomError: The run has no manifest, or its ledger is damaged; one folder lies in the other.
    """
    import gzip

    read_manifest(folder)
    bad = verify(folder).query("problem != ''")
    if len(bad):
        raise TomError(
            f"{bad['file'].iloc[0]}: {bad['problem'].iloc[0]}; repair the run, then ship it"
        )
    here, there = folder.resolve(), to.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise TomError(f"{to}: is {folder} itself, or one holds the other; name another place")
    if to.exists() and not (to / "manifest.json").is_file():
        raise TomError(f"{to}: there already and no shipped run, which alone is replaced")
    half = to.with_name(to.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for kind in ("draws", "readouts"):
        for shard in sorted((folder / kind).glob("*.jsonl*")):
            (half / kind).mkdir(parents=True, exist_ok=True)
            if shard.suffix == ".gz":
                shutil.copy2(shard, half / kind / shard.name)
            else:
                packed = gzip.compress(shard.read_bytes(), 9, mtime=0)
                (half / kind / f"{shard.name}.gz").write_bytes(packed)
    own = {found.folder.name for found in _arms_adapters(_held_run(folder)).values() if found}
    for record in sorted((folder / "adapters").glob("*/training.json")):
        adapter = record.parent
        weights = None if adapter.name in own else shutil.ignore_patterns("adapter_*")
        shutil.copytree(adapter, half / "adapters" / adapter.name, ignore=weights)
    shutil.copy2(folder / "manifest.json", half / "manifest.json")
    sums = "".join(f"{digest}  {name}\n" for name, digest in _hashes(half).items())
    (half / SUMS).write_text(sums, encoding="utf-8")
    shutil.rmtree(to, ignore_errors=True)
    os.replace(half, to)
    return to


def verify_run(folder: Path) -> pd.DataFrame:
    """Everything that `tom verify RUN` checks, as a frame of problems; empty if all is well.

    The ledger line by line (readable, right types, no key twice, choices as the texts say), that all
    of the profile's work is there, that every adapter is the one that its fingerprint names, and, of
    a shipped run, that each of its files is as it was shipped.

    Returns:
        Columns `where, problem`.

    Raises:
        TomError: The folder has no readable manifest, or the ledger is damaged (file and line).
    """
    run = _held_run(folder)
    problems = _changed_since_shipped(folder)
    shards = verify(folder)
    for shard in shards[shards["problem"].ne("")].itertuples():
        problems.append((str(shard.file), str(shard.problem)))
    models = read_manifest(folder).get("models")
    for name, said in models.items() if isinstance(models, dict) else ():
        if not isinstance(said, dict) or weights_id(card(name)) != said.get("weights"):
            problems.append(("manifest.json", f"weights of {name} differ from its card"))
    for arm, adapter in _arms_adapters(run).items():
        if adapter is None:
            problems.append(
                ("adapters", f"{arm}: no adapter of the training that the draws lead to")
            )
            continue
        try:
            check_base(adapter.folder, card(run.profile.student))
        except TomError as error:
            problems.append(("adapters", str(error)))
    for w in work(run):
        where = f"{w.role} {w.split} {w.answer}"
        who = player_if_ready(run, w.role)
        if who is None:
            continue
        if w.n:
            p = plan(run, w.role, asked(run, w), w.answer, w.n, letter_only=w.letter_only)
            if p["to_ask"].sum():
                problems.append(
                    (where, f"{p['to_ask'].sum()} of {p['wanted'].sum()} draws missing")
                )
        else:
            here = run.changed(wording=w.wording) if w.wording else run
            wanted = asked(run, w)
            held = held_readouts(here, who, wanted, w.answer)
            if len(held) < len(wanted):
                problems.append(
                    (where, f"exact readout missing ({w.wording or run.profile.wording})")
                )
    return pd.DataFrame(problems, columns=["where", "problem"])


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a shipped run but `SHA256SUMS` itself, by its path within it."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(files.items())
        if path.is_file() and name != SUMS
    }


def _changed_since_shipped(folder: Path) -> list[tuple[str, str]]:
    """Where a shipped run's files are not those of its `SHA256SUMS`; a live run has none."""
    if not (folder / SUMS).is_file():
        return []
    lines = (folder / SUMS).read_text("utf-8", errors="replace").splitlines()
    said = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = _hashes(folder)
    problem = {
        **{name: f"not in {SUMS}" for name in found.keys() - said.keys()},
        **{name: f"missing, {SUMS} names it" for name in said.keys() - found.keys()},
        **{
            n: f"not as it was shipped ({SUMS})" for n in found if found[n] != said.get(n, found[n])
        },
    }
    return sorted((ascii(name)[1:-1], text) for name, text in problem.items())


def _held_run(folder: Path) -> Run:
    """The run that a folder's manifest tells of, as it lies there.

    Raises:
        TomError: No readable manifest, or no usable profile in it.
    """
    manifest = read_manifest(folder)
    try:
        values: dict[str, Any] = dict(manifest["profile"])
        plain: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if empty := [key for key, value in plain.items() if value is None]:
            raise ValueError(f"{', '.join(map(repr, empty))}: null")
        profile = override(Profile(**plain), plain)  # types and sizes as in a file
    except (KeyError, TypeError, ValueError, AttributeError, TomError) as error:
        raise TomError(f"{folder / 'manifest.json'}: no usable profile ({error})") from None
    return Run(profile, folder, None)


def _arms_adapters(run: Run) -> dict[str, Adapter | None]:
    """The adapter of each arm, None where it is not there (or its rows are not)."""
    tuned = {
        ARM_OF[role]: player_if_ready(run, role) for role in ARM_OF if ARM_OF[role] in run.arms
    }
    return {arm: who.adapter if who else None for arm, who in tuned.items()}


# --- the manifest ---------------------------------------------------------------------------------


def write_manifest(run: Run, stages: Mapping[str, Any]) -> Path:
    """`manifest.json` of a run: profile, versions, machine, cards with hashes, commit, stages.

    Stages of an earlier, interrupted start are kept; of a stage that was passed twice, the longer
    one counts: it did the work, the other found it done.
    """
    path = run.folder / "manifest.json"
    with FileLock(run.folder / "manifest.lock"):  # jobs may end at the same time
        return _write_manifest(run, path, stages)


def _write_manifest(run: Run, path: Path, stages: Mapping[str, Any]) -> Path:
    before: dict[str, Any] = {}
    if path.is_file():
        try:
            before = dict(read_manifest(run.folder).get("stages", {}))
        except (TomError, TypeError, ValueError):
            before = {}
    p = run.profile
    names = dict.fromkeys(n for n in (p.teacher, p.student, p.published_teacher) if n)
    manifest = {
        "profile": run.as_dict(),
        "label": run.label,
        "tomlib": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
        "models": {name: {"weights": weights_id(card(name))} for name in names},
        "stages": {**before, **{k: _longer(before.get(k), v) for k, v in stages.items()}},
    }
    half = path.with_suffix(".part")
    half.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(half, path)
    return path


def _longer(before: Any, now: dict[str, str]) -> Any:
    def seconds(stage: dict[str, str]) -> float:
        start, end = (datetime.fromisoformat(stage[k]) for k in ("start", "end"))
        return (end - start).total_seconds()

    try:
        return before if before and seconds(before) > seconds(now) else now
    except (KeyError, TypeError, ValueError):  # a damaged manifest
        return now


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a run's folder.

    Raises:
        TomError: It is missing or damaged.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except OSError:
        raise TomError(f"{path}: no manifest; is {folder} the folder of a run?") from None
    except (ValueError, RecursionError) as error:
        raise TomError(f"{path}: damaged ({error})") from None
    if not isinstance(manifest, dict):
        raise TomError(f"{path}: damaged (no JSON object)")
    return manifest


def _commit() -> str:
    git = ["git", "-C", str(root()), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _utc(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
