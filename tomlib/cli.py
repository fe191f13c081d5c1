"""The `tom` command: models, scenarios, draws, chapters, book, all from one place."""

import argparse
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tomlib import __version__
from tomlib.errors import TomError, printable
from tomlib.games import KINDS, TwoPlayerGame
from tomlib.profiles import (
    CHAPTERS,
    EXTRAS,
    PAGES,
    SHIPPED,
    Run,
    load_profile,
    new_run,
    profile_names,
)
from tomlib.prompts import ANSWERS
from tomlib.scenarios import find, nearest, scenarios


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when it went well, 2 after a one-line error, 130 when stopped."""
    with suppress(ValueError):  # not the main thread: whoever has that one minds its signals
        # A scheduler's time limit ends as Ctrl-C does, and leaves no kernel behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _parser().parse_args(argv)
    for folder in ("TOM_RUNS", "TOM_CACHE", "TOM_MODELS"):  # chapters run in another folder
        if os.environ.get(folder):
            os.environ[folder] = str(Path(os.environ[folder]).expanduser().resolve())
    act: Callable[[argparse.Namespace], int | None] = arguments.act
    try:
        return act(arguments) or 0
    except TomError as error:
        print(f"tom: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"tom: {printable(_refused(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ntom: stopped; all draws made so far are kept, the same command goes on from here",
            file=sys.stderr,
        )
        return 130


def _refused(error: OSError) -> str:
    """What the system refused (disk full, read-only, not there), in a line that says what to do."""
    where = error.filename if error.filename is not None else "the disk"
    return (
        f"{where}: {error.strerror or error}; make room there or choose another folder (TOM_RUNS, "
        "TOM_CACHE) and give the same command again: what was recorded before is safe"
    )


# --- commands -------------------------------------------------------------------------------------


def _models(a: argparse.Namespace) -> int:
    from tomlib import models, weights

    if a.what == "list":
        for c in models.cards().values():
            here = "here" if weights.is_fetched(c) else "-"
            print(f"{c.name:24} {c.kind:10} {c.parameters:>6} {here:5} {c.licence}")
        return 0
    stored = [c for c in models.cards().values() if c.kind in ("gguf", "hub")]
    wanted = a.names or [c.name for c in stored if weights.is_fetched(c)]
    if not wanted:
        raise TomError(
            "no model has been fetched yet: name one, e.g. tom models fetch smollm2-135m"
        )
    for name in wanted:
        c = models.card(name)
        if a.what == "fetch":
            print(f"{name}: {weights.fetch(c)}")
        else:
            weights.verify(c)
            print(f"{name}: {_VERIFIED[c.kind]}")
    return 0


_VERIFIED = {
    "gguf": "sha256 as in its card",
    "hub": "sha256 as the hub names them",
    "folder": "complete (its card names no hash)",
    "published": "its tables are here, `tom verify published` compares them",
    "endpoint": "a server: nothing here to verify",
}


def _scenarios(a: argparse.Namespace) -> None:
    for s in scenarios(a.split):
        numbers = " ".join(f"{x:g}" for x in s.game.payoffs)
        print(f"{s.split:13} {s.name:35} {numbers}")


def _show(a: argparse.Namespace) -> None:
    from tomlib.prompts import messages, prompt_id

    run = new_run(load_profile(a.profile, **_parameters(a.p)))
    scenario = find(a.scenario, a.split)
    for message in messages(scenario, a.answer, run.wording):
        print(f"[{message.type}]\n{message.content}\n")
    print(f"prompt {prompt_id(scenario, a.answer, run.wording)}")


def _new_context(a: argparse.Namespace) -> int:
    from tomlib.scenarios import context_problems, new_context

    if not a.check:
        print(new_context(a.name, a.title, a.split))
    problems = context_problems(a.name)
    for problem in problems:
        print(f"to do: {problem}")
    if not problems:
        print(f"{a.name}: says all that a context says, and is as long as the others")
    elif a.check:
        raise TomError(
            f"context {a.name!r}: {len(problems)} things to do; edit it in contexts.toml"
        )
    else:
        print(f"then: tom new-context {a.name} --check")
    return 0


def _new_game(a: argparse.Namespace) -> None:
    from tomlib.scenarios import new_game

    print(new_game(a.name, a.kind, a.payoffs, a.title))
    game = next(s.game for s in scenarios() if s.game.name == a.name)
    if isinstance(game, TwoPlayerGame):
        pure = ", ".join(f"({mine}, {theirs})" for mine, theirs in game.pure_nash())
        mixed = game.mixed_nash()
        print(
            f"order {game.order}; dominant: {game.dominant() or 'none'}; equilibria: {pure or '-'}"
        )
        print(f"mixed equilibrium: {'none' if mixed is None else f'C with {mixed:.3f}'}")
    print("it is part of the training too: tom plan says what that costs")


def _plan(a: argparse.Namespace) -> None:
    from tomlib.reproduce import costs, planned

    run = _run_of(a)
    table = planned(run)
    print(table.to_string(index=False))
    print()
    print(costs(run, table).to_string(index=False))
    if a.measure:
        from tomlib.costs import estimate, measure

        spent = estimate(run, measure(run), devices=a.devices, price=a.price)
        print(f"\n{spent.round(2).to_string(index=False)}")


def _run(a: argparse.Namespace) -> None:
    from tomlib.reproduce import run_chapters

    chapters = [_chapter(c) for c in a.chapters] or [*CHAPTERS, *PAGES]
    given = _parameters(a.p)
    run = new_run(load_profile(a.profile, **given), replay=not a.fresh)
    for path in run_chapters(run, chapters, _for_chapters(a, given), replay=not a.fresh):
        print(path)


def _reproduce(a: argparse.Namespace) -> None:
    from tomlib.reproduce import do_step, reproduce

    given = _parameters(a.p)
    run = new_run(load_profile(a.profile, **given), replay=False)
    parameters = _for_chapters(a, given)
    if a.only:
        return do_step(run, a.only, parameters)
    print(reproduce(run, parameters, book=not a.no_book))


def _book(a: argparse.Namespace) -> None:
    from tomlib.reproduce import build_book

    print(build_book(Path(a.notebooks) if a.notebooks else None, Path(a.out) if a.out else None))


def _ship(a: argparse.Namespace) -> None:
    from tomlib.reproduce import ship

    print(ship(Path(a.run), Path(a.to)))


def _verify(a: argparse.Namespace) -> int:
    if a.run == "published":
        from tomlib.published import verify

        problems = verify(a.authors_repo)
    else:
        from tomlib.reproduce import verify_run

        problems = verify_run(Path(a.run))
    if len(problems):
        print(problems.to_string(index=False))
        print(f"tom: {a.run}: {len(problems)} problems", file=sys.stderr)
        return 2
    print(f"{a.run}: complete, nothing differs")
    return 0


# --- arguments ------------------------------------------------------------------------------------


def _run_of(a: argparse.Namespace) -> Run:
    return new_run(load_profile(a.profile, **_parameters(a.p)))


def _for_chapters(a: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """What chapters are given: a profile that is a file of the user's goes by its path."""
    own = a.profile.endswith(".toml")
    return {**given, "profile": str(Path(a.profile).resolve()) if own else a.profile}


def _chapter(name: str) -> str:
    """A chapter by its number, its name, or its file."""
    stem = Path(name).stem
    if not stem:
        raise TomError("chapter '' is none; name it by its number, as in `tom run 04`")
    known = (*CHAPTERS, *EXTRAS, *PAGES)
    for chapter in known:
        number, _, rest = chapter.partition("-")
        if stem == chapter or (rest and stem in (number, number.lstrip("0"), rest)):
            return chapter
    raise TomError(f"chapter {name!r} is unknown{nearest(stem, known)}")


def _parameters(pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """`-p name value` pairs; a value is read as TOML where it is TOML, else as text."""
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name in ("profile", "replay"):
            option = "--profile NAME" if name == "profile" else "--fresh"
            raise TomError(f"-p {name} is no value of a profile: give {option} instead")
        try:
            given[name] = tomllib.loads(f"v = {text}")["v"]
        except (ValueError, RecursionError):  # no TOML, a number or a nesting without end
            given[name] = text
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tom",
        description="Run, rerun and check the experiment.",
        epilog="example: tom run 04 -p n 20",
    )
    parser.add_argument("--version", action="version", version=f"tom {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, act: Callable[..., Any], says: str, example: str) -> Any:
        sub = commands.add_parser(
            name,
            help=says,
            description=f"{says[0].upper()}{says[1:]}.",
            epilog=f"example: {example}",
        )
        sub.set_defaults(act=act)
        return sub

    def with_profile(sub: Any, default: str = SHIPPED) -> None:
        names = ", ".join(profile_names())
        sub.add_argument("--profile", default=default, help=f"one of {names}, or a .toml file")
        sub.add_argument(
            "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
            help="a value in place of the profile's; may be given again",
        )  # fmt: skip

    sub = command(
        "models", _models, "list the model cards, fetch or verify weights",
        "tom models fetch smollm2-135m",
    )  # fmt: skip
    sub.add_argument("what", choices=("list", "fetch", "verify"), nargs="?", default="list")
    sub.add_argument("names", nargs="*", metavar="MODEL")

    sub = command(
        "scenarios", _scenarios, "list the scenarios", "tom scenarios --split new_contexts"
    )
    sub.add_argument("--split")

    sub = command(
        "show",
        _show,
        "show the exact messages of a scenario",
        "tom show IR/stag_hunt --answer choice",
    )
    sub.add_argument("scenario", metavar="CONTEXT/GAME")
    sub.add_argument("--split")
    sub.add_argument("--answer", default="choice+motivation", help=", ".join(ANSWERS))
    with_profile(sub)

    sub = command(
        "new-context", _new_context, "add a commented template of a context, and check it",
        "tom new-context orchestra --title 'Two section leaders'",
    )  # fmt: skip
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("--title", default="", help="how the book calls it")
    sub.add_argument("--split", default="new_contexts", help="new_contexts (held out) or in_sample")
    sub.add_argument("--check", action="store_true", help="only check the context of that name")

    sub = command(
        "new-game", _new_game, "add a game, its payoffs checked",
        "tom new-game deadlock --kind deadlock --payoffs 3 2 10 5",
    )  # fmt: skip
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("--kind", required=True, help=", ".join(KINDS))
    sub.add_argument(
        "--payoffs", nargs=4, type=float, metavar=("R", "S", "T", "P"),
        help="the paper's four numbers, in the order of the kind, unless given",
    )  # fmt: skip
    sub.add_argument("--title", default="", help="how the book calls it")

    sub = command("plan", _plan, "say what a run would ask and cost", "tom plan --profile paper")
    sub.add_argument(
        "--measure", action="store_true",
        help="do one context's share of it, with a clock, and say how long the whole would take",
    )  # fmt: skip
    sub.add_argument("--devices", type=int, default=1, help="GPUs that a job holds")
    sub.add_argument("--price", type=float, default=0.0, help="of a device hour")
    with_profile(sub, "quick")

    sub = command(
        "run", _run, "run chapters with papermill into runs/PROFILE/notebooks",
        "tom run 04 05 -p n 20",
    )  # fmt: skip
    sub.add_argument("chapters", nargs="*", metavar="CHAPTER", help="all of a run unless named")
    sub.add_argument("--fresh", action="store_true", help="do not replay what comes with the book")
    with_profile(sub)

    sub = command(
        "reproduce", _reproduce, "do all of a run: weights, draws, training, chapters, book",
        "tom reproduce --profile quick",
    )  # fmt: skip
    sub.add_argument("--no-book", action="store_true", help="stop before the book")
    sub.add_argument("--only", metavar="STEP", help="one step of it, as the Snakefile names them")
    with_profile(sub, "quick")

    sub = command("book", _book, "build the book, warnings as errors", "tom book")
    sub.add_argument("--notebooks", help="executed chapters to show in place of the committed ones")
    sub.add_argument("--out", help="where to put the pages")

    sub = command(
        "ship", _ship, "pack a run's folder for the book", "tom ship runs/quick data/runs/quick"
    )
    sub.add_argument("run", metavar="RUN", help="a run's folder")
    sub.add_argument("to", metavar="TO", help="where to put it; what is there is replaced")

    sub = command(
        "verify", _verify, "check a run's folder, or the published figures",
        "tom verify data/runs/quick",
    )  # fmt: skip
    sub.add_argument("run", metavar="RUN", help="a run's folder, or the word published")
    sub.add_argument("--authors-repo", help="a checkout of the authors' repository to compare with")
    return parser


if __name__ == "__main__":
    sys.exit(main())
