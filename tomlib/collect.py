"""Replay or run: draws come from the ledger first, from a model for what is missing.

With a full ledger no model is loaded and a notebook replays in seconds; with a half-full one it goes
on where it stopped; with an empty one it runs live. There is no other switch.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from tomlib import finetune
from tomlib.answers import decided, read
from tomlib.engines import Completion, Engine, Request, ask, open_engine
from tomlib.errors import TomError
from tomlib.games import PublicGoodsGame
from tomlib.models import Card, card, engine_of
from tomlib.profiles import Run
from tomlib.prompts import ANSWERS, messages, opening, prompt_id
from tomlib.scenarios import Scenario, check_written, nearest, root
from tomlib.weights import published_files, weights_mark

ROLES = ("teacher", "student", "tuned", "published-teacher", "published-tuned")
"""The models of a run: the family arm's three, then the published arm's teacher and tuned student."""

DRAW_COLUMNS = [
    "split", "context", "game", "model", "card", "adapter", "answer", "index", "choice", "outcome",
    "text", "motivation", "new_tokens", "prompt", "weights", "temperature", "seed", "engine", "time",
]  # fmt: skip

REQUEST = 128
"""Most draws between two writes to the ledger, so that little is lost when a run is killed."""

BRIEF = 4096
"""The same for draws that stop at the choice and are made on this machine: they take a second."""

ARM_OF = {"tuned": "family", "published-tuned": "published"}
"""The arm whose adapter a tuned role wears."""


@dataclass(frozen=True)
class Player:
    """A model in a role of a run."""

    role: str
    card: Card
    engine: str
    quantize: str = ""
    adapter: finetune.Adapter | None = None

    @property
    def published(self) -> bool:
        """Whether it answers from published counts and has no weights."""
        return self.card.kind == "published"


def player(run: Run, role: str, *, progress: bool = True) -> Player:
    """The model of a role; a tuned student's adapter is found, or trained.

    Raises:
        TomError: An unknown role, or one that the profile leaves out.
    """
    p = run.profile
    if role not in ROLES:
        raise TomError(f"role {role!r} is unknown{nearest(role, ROLES)}")
    if role.startswith("published") and not p.published_teacher:
        raise TomError(f"role {role!r}: profile {p.name!r} names no published_teacher")
    if role == "teacher":
        who = card(p.teacher)
        return Player(role, who, engine_of(who, p.teacher_engine))
    if role == "published-teacher":
        who = card(p.published_teacher)
        return Player(role, who, who.engine)
    who = card(p.student)
    engine = engine_of(who, p.student_engine)
    if role == "student":
        return Player(role, who, engine, p.student_quantization)
    adapter = tuned_adapter(run, ARM_OF[role], progress=progress)
    return Player(role, who, engine, p.student_quantization, adapter)


def training_rows(run: Run, arm: str, *, progress: bool = True) -> pd.DataFrame:
    """The rows that an arm's student is tuned on, teacher draws collected where missing."""
    if arm == "published" or card(run.profile.teacher).kind == "published":
        name = run.profile.published_teacher if arm == "published" else run.profile.teacher
        counts = _published_counts(card(name))
        return finetune.letter_rows(run, counts[counts["split"].eq("in_sample")])
    draws = collect(
        run,
        "teacher",
        run.scenarios("in_sample"),
        run.profile.teacher_answer,
        run.profile.n_teacher,
        progress=progress,
    )
    return finetune.rows(run, draws)


def tuned_adapter(
    run: Run, arm: str, *, whole: bool = False, progress: bool = True
) -> finetune.Adapter:
    """The arm's adapter: found by its fingerprint, else trained; `whole` as for `finetune.train`."""
    rows = training_rows(run, arm, progress=progress)
    mark = finetune.fingerprint(card(run.profile.student), finetune.settings(run, arm), rows)
    if finetune.find_adapter(run, arm, mark, whole=whole) is None:
        close_engines()  # the teacher's memory is wanted
    return finetune.train(run, arm, rows, whole=whole, progress=progress)


def collect(
    run: Run,
    role: str,
    scenarios: Sequence[Scenario],
    answer: str,
    n: int | None = None,
    *,
    letter_only: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """N draws per scenario, from the ledger where it has them, else asked now.

    Args:
        run: Profile and ledger.
        role: One of `ROLES`.
        scenarios: What is played.
        answer: Answer form.
        n: Draws per scenario; the profile's `n` unless given.
        letter_only: Stop a draw once its choice is decided: the same distribution of choices at a
            fraction of the cost. True unless motivations are the point; see `stops_early`.
        progress: Whether to show a bar.

    Returns:
        Columns `DRAW_COLUMNS`, n rows per scenario in scenario order, `model` is the role. Of a
        published teacher there are no more than were published.

    Raises:
        TomError: n below 1, an unknown role or answer form, a damaged ledger, a model that fails.
    """
    n = run.profile.n if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise TomError(f"n = {n!r} must be a whole number of at least 1")
    who = player(run, role, progress=progress)
    if who.published:
        return _published_draws(run, who, scenarios, answer, n)
    short = stops_early(answer, letter_only)
    wanted, held = _wanted_and_held(run, who, scenarios, answer, n, short)
    missing = wanted.loc[~wanted["index_key"].isin(held["index_key"])]
    if len(missing):
        _ask_for(run, who, scenarios, answer, short, missing, progress)
        held = _held(run, who, wanted)
    # A draw belongs to its prompt; by which names that goes is the scenario's to say.
    names = ["index_key", *LABELS]
    found = wanted[names].merge(
        held.drop(columns=LABELS), on="index_key", how="left", validate="m:1"
    )
    found["model"] = role
    return found[DRAW_COLUMNS]


def stops_early(answer: str, letter_only: bool | None = None) -> bool:
    """Whether draws of an answer form stop at the choice.

    `choice` does, for nothing comes after it; `choice+motivation` where only the letter is wanted.
    Reasons come before the choice in `reasoning+choice`, so it never does.

    >>> stops_early("choice"), stops_early("choice+motivation"), stops_early("choice+motivation", True)
    (True, False, True)
    """
    return answer == "choice" or (answer == "choice+motivation" and bool(letter_only))


def plan(
    run: Run,
    role: str,
    scenarios: Sequence[Scenario],
    answer: str,
    n: int | None = None,
    *,
    letter_only: bool | None = None,
) -> pd.DataFrame:
    """What `collect` would do: one row per scenario, `wanted, in_ledger, to_ask, most_new_tokens`.

    A tuned student that is not trained yet has nothing in the ledger.
    """
    n = run.profile.n if n is None else n
    short = stops_early(answer, letter_only)
    most = run.profile.tokens("choice" if short else answer)
    try:
        who = player_if_ready(run, role)
    except TomError:
        who = None
    have = [n if who is not None and who.published else 0] * len(scenarios)
    if who is not None and not who.published:
        wanted, held = _wanted_and_held(run, who, scenarios, answer, n, short)
        here = wanted["index_key"].isin(held["index_key"])
        have = [int(number) for number in here.groupby(wanted["at"]).sum()]
    table = [
        (*s.key, role, answer, n, there, n - there, (n - there) * most)
        for s, there in zip(scenarios, have, strict=True)
    ]
    columns = ["split", "context", "game", "model", "answer", "wanted", "in_ledger", "to_ask"]
    return pd.DataFrame(table, columns=[*columns, "most_new_tokens"])


def player_if_ready(run: Run, role: str) -> Player | None:
    """`player`, but None where its adapter would have to be trained (or its rows drawn) first."""
    if role not in ARM_OF:
        return player(run, role)
    arm = ARM_OF[role]
    if arm == "family" and card(run.profile.teacher).kind != "published":
        p = run.profile
        need = plan(run, "teacher", run.scenarios("in_sample"), p.teacher_answer, p.n_teacher)
        if need["to_ask"].sum():
            return None
    student = card(run.profile.student)
    frame = training_rows(run, arm, progress=False)
    mark = finetune.fingerprint(student, finetune.settings(run, arm), frame)
    found = finetune.find_adapter(run, arm, mark)
    if found is None:
        return None
    who = player(run, "student")
    return Player(role, who.card, who.engine, who.quantize, found)


# --- the ledger's part ----------------------------------------------------------------------------

CONDITION = [
    "weights", "adapter", "prompt", "temperature", "top_p", "repetition_penalty", "max_new_tokens",
]  # fmt: skip
"""What, with the index, tells a draw from every other draw."""


def condition(
    run: Run, who: Player, scenario: Scenario, answer: str, short: bool = True
) -> dict[str, Any]:
    """The conditions of a player's draws in a scenario; `short` ones stop at the choice."""
    p = run.profile
    return {
        "weights": weights_mark(who.card, who.quantize),
        "adapter": who.adapter.fingerprint if who.adapter else None,
        "prompt": prompt_id(scenario, answer, run.wording),
        "temperature": p.temperature,
        "top_p": p.top_p,
        "repetition_penalty": p.repetition_penalty,
        "max_new_tokens": p.tokens("choice" if short else answer),
    }


def draw_seed(run_seed: int, key: str) -> int:
    """A draw's seed from the run's seed and the draw's key: 32 bits of a sha256.

    >>> draw_seed(0, "a") == draw_seed(0, "a") != draw_seed(1, "a")
    True
    """
    digest = hashlib.sha256(f"{run_seed}|{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


LABELS = ["split", "context", "game"]


def _wanted(
    run: Run, who: Player, at: int, scenario: Scenario, answer: str, n: int, short: bool
) -> pd.DataFrame:
    where = condition(run, who, scenario, answer, short)
    prefix = _key(where)
    return pd.DataFrame(
        {
            "index_key": [f"{prefix}|{i}" for i in range(n)],
            "prompt": where["prompt"],
            "index": range(n),
            "at": at,  # the scenario's place among those asked for
            **dict(zip(LABELS, scenario.key, strict=True)),
        }
    )


def _wanted_and_held(
    run: Run, who: Player, scenarios: Sequence[Scenario], answer: str, n: int, short: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The draws that are wanted, and those among them that the ledger has."""
    wanted = pd.concat(
        [_wanted(run, who, at, s, answer, n, short) for at, s in enumerate(scenarios)],
        ignore_index=True,
    )
    return wanted, _held(run, who, wanted)


def _key(where: dict[str, Any]) -> str:
    return "|".join("-" if pd.isna(where[k]) else f"{where[k]}" for k in CONDITION)


def _held(run: Run, who: Player, wanted: pd.DataFrame) -> pd.DataFrame:
    """The ledger's draws among those wanted, with their `index_key` and `card`."""
    mark = who.adapter.fingerprint if who.adapter else None
    draws = run.ledger.draws(weights=weights_mark(who.card, who.quantize), adapter=mark)
    draws = draws[draws["prompt"].isin(wanted["prompt"])].rename(columns={"model": "card"})
    parts = [_text(draws[k]) for k in [*CONDITION, "index"]]
    draws["index_key"] = ["|".join(row) for row in zip(*parts, strict=True)]
    return draws[draws["index_key"].isin(wanted["index_key"])]


def _text(column: pd.Series) -> list[str]:
    values = column.astype(object)
    said = {v: "-" if pd.isna(v) else f"{v}" for v in values.unique()}  # few, of many draws
    return [said[v] for v in values]


def _ask_for(
    run: Run,
    who: Player,
    scenarios: Sequence[Scenario],
    answer: str,
    short: bool,
    missing: pd.DataFrame,
    progress: bool,
) -> None:
    check_written(scenarios[at] for at in missing["at"].unique())
    # Two scenarios that say the same (one game under two names) share their draws.
    missing = missing.drop_duplicates("index_key")
    with ExitStack() as locks:
        # Held from before the first question: a second run is refused before it has cost anything.
        for shard in sorted({shard_name(who, scenarios[at], answer) for at in missing["at"]}):
            locks.enter_context(run.ledger.lock("draws", shard))
        held = _held(run, who, missing)  # another run may have drawn some meanwhile
        missing = missing.loc[~missing["index_key"].isin(held["index_key"])]
        if len(missing):
            _ask_all(run, who, scenarios, answer, short, missing, progress)


def _ask_all(
    run: Run,
    who: Player,
    scenarios: Sequence[Scenario],
    answer: str,
    short: bool,
    missing: pd.DataFrame,
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    engine = opened(run, who)
    bar = tqdm(total=len(missing), desc=f"{who.role}: {answer}", unit="draw", disable=not progress)
    # Scenarios of one context come one after the other: they share its system prompt.
    size = BRIEF if short and engine.local else REQUEST
    for start in range(0, len(missing), size):
        cells = [
            (scenarios[int(str(at))], part)
            for at, part in missing.iloc[start : start + size].groupby("at", sort=False)
        ]
        drawn = _draw(run, who, engine, answer, short, cells)
        for (scenario, _), lines in zip(cells, drawn, strict=True):
            run.ledger.append("draws", shard_name(who, scenario, answer), lines)
            bar.update(len(lines))
    bar.close()


def shard_name(who: Player, scenario: Scenario, answer: str) -> str:
    """One ledger file per model, answer form, split and context: what one job writes."""
    adapter = f"+{who.adapter.fingerprint}" if who.adapter else ""
    return "--".join([f"{who.card.name}{adapter}", answer, scenario.split, scenario.context.name])


def _draw(
    run: Run,
    who: Player,
    engine: Engine,
    answer: str,
    short: bool,
    cells: Sequence[tuple[Scenario, pd.DataFrame]],
) -> list[list[dict[str, Any]]]:
    """Ask for the missing draws of some scenarios; ledger lines per scenario."""
    p = run.profile
    requests = []
    for scenario, part in cells:
        start = opening(scenario, answer, run.wording)
        stop = partial(_decided, start=start, answer=answer, kind=scenario.game_type)
        seeds = [draw_seed(p.seed, key) for key in part["index_key"]]
        said = messages(scenario, answer, run.wording)
        requests.append(Request(said, seeds, stop if short else None))
    answers = ask(
        engine,
        requests,
        temperature=p.temperature,
        top_p=p.top_p,
        max_new_tokens=p.tokens("choice" if short else answer),
        repetition_penalty=p.repetition_penalty,
    )
    lines = []
    for (scenario, part), completions in zip(cells, answers, strict=True):
        where = condition(run, who, scenario, answer, short)
        start = opening(scenario, answer, run.wording) if engine.prefill != "none" else ""
        lines.append(
            [
                _line(who, engine, scenario, answer, where, start, int(index), completion)
                for index, completion in zip(part["index"], completions, strict=True)
            ]
        )
    return lines


def _line(
    who: Player,
    engine: Engine,
    scenario: Scenario,
    answer: str,
    where: dict[str, Any],
    start: str,
    index: int,
    completion: Completion,
) -> dict[str, Any]:
    text = start + completion.text
    seen = read(text, answer, scenario.game_type, completion.finish, scenario.endowment)
    return {
        "model": who.card.name,
        "weights": where["weights"],
        "adapter": where["adapter"],
        "split": scenario.split,
        "context": scenario.context.name,
        "game": scenario.game.name,
        "payoffs": [float(x) for x in scenario.game.payoffs],
        "answer": answer,
        "prompt": where["prompt"],
        "temperature": where["temperature"],
        "top_p": where["top_p"],
        "repetition_penalty": where["repetition_penalty"],
        "max_new_tokens": where["max_new_tokens"],
        "seed": completion.seed,
        "index": index,
        "text": text,
        "choice": seen.choice,
        "outcome": seen.outcome,
        "new_tokens": completion.new_tokens,
        "engine": engine.name,
        "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }


def _decided(text: str, start: str, answer: str, kind: Any) -> bool:
    return decided(start + text, answer, kind)


# --- engines stay open between calls --------------------------------------------------------------

_open: dict[tuple[Any, ...], Engine] = {}


def opened(run: Run, who: Player) -> Engine:
    """The player's engine, kept open until another one is needed."""
    p = run.profile
    adapter = who.adapter
    if adapter and not adapter.whole:
        adapter = tuned_adapter(run, ARM_OF[who.role], whole=True)
    folder: Path | None = adapter.folder if adapter else None
    room = _room(run) if who.engine == "llamacpp" else 0
    key = (who.card.name, folder, who.engine, who.quantize, p.parallel, p.threads, room)
    if key not in _open:
        close_engines()
        if folder is not None:
            finetune.check_base(folder, who.card)
        _open[key] = open_engine(
            who.card,
            folder,
            engine=who.engine,
            threads=p.threads or None,
            parallel=p.parallel,
            context=room,
            quantize=who.quantize,
        )
    return _open[key]


def _room(run: Run) -> int:
    """Tokens that one draw may need: the longest prompt of the run, its frame, the longest answer.

    A token stands for more than two bytes of the prompts' text, whatever the tokenizer.
    """
    p = run.profile
    said = [messages(s, form, run.wording) for s in run.scenarios() for form in ANSWERS]
    longest = max(sum(len(str(m.content).encode()) for m in each) for each in said)
    return longest // 2 + 64 + max(p.tokens_choice, p.tokens_motivation, p.tokens_reasoning)


def close_engines() -> None:
    """Close whatever is open and give its memory back."""
    while _open:
        _open.popitem()[1].close()


# --- the published teacher ------------------------------------------------------------------------


def _published_counts(who: Card) -> pd.DataFrame:
    """Published counts of a card's model in its answer form."""
    from tomlib.published import cooperation_counts

    counts = cooperation_counts(published_files(who)[0])
    mine = counts["model"].eq(who.column)
    if who.answer:
        mine &= counts["answer"].replace("choice only", "choice").eq(who.answer)
    return counts[mine]


def _check_payoffs(who: Card, scenario: Scenario) -> None:
    """Refuse the paper's answers for games that it did not put."""
    from tomlib.published import FUND, PAYOFFS

    game = scenario.game
    if published_files(who)[0].resolve().parent != (root() / "data" / "published").resolve():
        return  # the user's own tables, of which nothing is known
    if isinstance(game, PublicGoodsGame):
        same = (game.players, game.endowment, game.multiplier) == FUND
    else:
        factor = 2 if scenario.split == "scaled_games" else 1
        same = game.payoffs == tuple(factor * x for x in PAYOFFS[game.name])
    if not same:
        raise TomError(
            f"{who.name}: {scenario.name} ({scenario.split}) has other payoffs than the game that the "
            "published answers are to; give it a name of its own"
        )


def published_distribution(who: Card, scenario: Scenario) -> dict[Any, int]:
    """Published counts of one scenario: `{"C": 77, "D": 223}`, or contributions `{7: 300}`.

    Raises:
        TomError: The paper has no figures for it.
    """
    if scenario.game_type == "public_goods":
        from tomlib.published import public_goods

        paths = published_files(who)[1:] if scenario.game.name == "public_goods" else []
        mine = [r for path in paths for r in public_goods(path).to_dict("records")]
        mine = [r for r in mine if r["model"] == who.column]
        if not mine:
            raise TomError(f"{who.name}: no published figures for {scenario.name}")
        _check_payoffs(who, scenario)
        return {int(r["contribution"]): int(r["count"]) for r in mine}
    counts = _published_counts(who)
    split, context, game = scenario.key
    cell = counts[
        counts["split"].eq(split) & counts["context"].eq(context) & counts["game"].eq(game)
    ]
    if len(cell) != 1:
        raise TomError(f"{who.name}: no published figures for {scenario.name} ({scenario.split})")
    _check_payoffs(who, scenario)
    return {"C": int(cell["cooperate"].iloc[0]), "D": int(cell["defect"].iloc[0])}


def _published_draws(
    run: Run, who: Player, scenarios: Sequence[Scenario], answer: str, n: int
) -> pd.DataFrame:
    """The published choices themselves: up to n of each scenario's, drawn without replacement."""
    import numpy as np

    frames = []
    for s in scenarios:
        counts = published_distribution(who.card, s)
        choices = np.array([c for c, k in counts.items() for _ in range(k)], dtype=object)
        if n < len(choices):
            seed = draw_seed(run.profile.seed, f"{who.card.name}|{s.split}|{s.name}")
            choices = np.random.default_rng(seed).permutation(choices)[:n]
        frames.append(
            pd.DataFrame(
                {
                    "split": s.split,
                    "context": s.context.name,
                    "game": s.game.name,
                    "model": who.role,
                    "card": who.card.name,
                    "answer": answer,
                    "index": range(len(choices)),
                    "choice": choices,
                    "outcome": "ok",
                    "prompt": prompt_id(s, answer, run.wording),
                    "weights": weights_mark(who.card),
                    "engine": "published counts",
                }
            )
        )
    return pd.concat(frames, ignore_index=True).reindex(columns=DRAW_COLUMNS)
