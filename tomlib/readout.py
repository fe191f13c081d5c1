"""Exact choice probabilities, read from the model instead of sampled.

The answer's opening is fixed, so what comes next is the choice: its probability is read in one
forward pass, every option (C and D, or the contributions 0 to 10) scored as one batch that branches
off the prompt. The mass that the options cover is always reported; the rest would go to answers that
cannot be read.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from tomlib.collect import Player, condition, opened, player, published_distribution, shard_name
from tomlib.engines import Engine, served
from tomlib.errors import TomError
from tomlib.ledger import READOUT_KEY
from tomlib.models import card
from tomlib.profiles import Run
from tomlib.prompts import messages
from tomlib.scenarios import Scenario, check_written

COLUMNS = ["split", "context", "game", "model", "card", "answer", "p_cooperate", "coverage"]
GOODS_COLUMNS = [
    "split",
    "context",
    "game",
    "model",
    "card",
    "answer",
    "contribution",
    "p",
    "coverage",
]


def options(scenario: Scenario) -> list[str]:
    """What can be chosen: `["C", "D"]`, or the whole contributions from 0 to the endowment."""
    if scenario.game_type == "public_goods":
        return [str(i) for i in range(scenario.endowment + 1)]
    return ["C", "D"]


def has_exact(run: Run, role: str, answer: str) -> bool:
    """Whether a role's choices have exact probabilities in an answer form.

    Not where the choice comes after the reasons, nor from a server that cannot go on with a started
    answer.
    """
    teacher, student = card(run.profile.teacher), card(run.profile.student)
    who = teacher if role == "teacher" else student
    mute = who.kind == "endpoint" and who.prefill == "none"
    return answer != "reasoning+choice" and not mute


def readout(
    run: Run,
    role: str,
    scenarios: Sequence[Scenario],
    answer: str = "choice",
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Exact probabilities at the run's temperature, from the ledger where it has them.

    Args:
        run: Profile and ledger.
        role: Who (see `collect.ROLES`).
        scenarios: Two-player scenarios, or public goods ones (not both at once).
        answer: A letter-first answer form: with `reasoning+choice` the choice depends on what was
            reasoned.
        progress: Whether to show a bar.

    Returns:
        Two-player: `COLUMNS`, one row per scenario; `p_cooperate` is P(C) / (P(C) + P(D)) and
        `coverage` is P(C) + P(D). Public goods: `GOODS_COLUMNS`, one row per contribution, `p`
        normalized likewise.

    Raises:
        TomError: No exact probabilities are to be had (see `has_exact`); scenarios of both kinds; no
            mass on any option.
    """
    if answer == "reasoning+choice":
        raise TomError("answer 'reasoning+choice' has no exact readout: its choice comes last")
    kinds = {s.game_type for s in scenarios}
    if len(kinds) != 1:
        raise TomError("readout: ask for two-player scenarios or public goods ones, not both")
    who = player(run, role, progress=progress)
    found = held_readouts(run, who, scenarios, answer)
    missing = [s for s in scenarios if s not in found]
    if missing:
        _read(run, who, missing, answer, progress)
        found |= held_readouts(run, who, missing, answer)
    rows: list[tuple[Any, ...]] = []
    for s in scenarios:
        p, coverage = found[s]
        total = sum(p.values())
        if not total > 0:
            raise TomError(f"{who.card.name}: no probability on any choice in {s.name}")
        where = (*s.key, role, who.card.name, answer)
        if s.game_type == "public_goods":
            rows += [(*where, int(k), v / total, coverage) for k, v in p.items()]
        else:
            rows.append((*where, p["C"] / total, coverage))
    return pd.DataFrame(rows, columns=GOODS_COLUMNS if kinds == {"public_goods"} else COLUMNS)


def held_readouts(
    run: Run, who: Player, scenarios: Sequence[Scenario], answer: str
) -> dict[Scenario, tuple[dict[str, float], float]]:
    """What the ledger (or the paper) has of these scenarios: option -> probability, and coverage."""
    found: dict[Scenario, tuple[dict[str, float], float]] = {}
    if who.published:
        for s in scenarios:
            counts = published_distribution(who.card, s)
            total = sum(counts.values())
            found[s] = {o: counts.get(_as_choice(o), 0) / total for o in options(s)}, 1.0
        return found
    key = [name for name in READOUT_KEY if name != "answer"]  # the prompt says it too
    lines = {tuple(line[k] for k in key): line for line in run.ledger.readouts()}
    for s in scenarios:
        where = condition(run, who, s, answer)
        line = lines.get(tuple(where[k] for k in key))
        if line is not None:
            found[s] = dict(line["p"]), float(line["coverage"])
    return found


def _as_choice(option: str) -> Any:
    return int(option) if option.isdigit() else option


def _read(
    run: Run, who: Player, scenarios: Sequence[Scenario], answer: str, progress: bool
) -> None:
    check_written(scenarios)
    with ExitStack() as locks:
        for shard in sorted({shard_name(who, s, answer) for s in scenarios}):
            locks.enter_context(run.ledger.lock("readouts", shard))
        # Another run may have read some meanwhile.
        held = held_readouts(run, who, scenarios, answer)
        missing = [s for s in scenarios if s not in held]
        if missing:
            _read_all(run, who, missing, answer, progress)


def _read_all(
    run: Run, who: Player, scenarios: Sequence[Scenario], answer: str, progress: bool
) -> None:
    from tqdm.auto import tqdm

    engine = opened(run, who)
    bar = tqdm(scenarios, desc=f"{who.role}: exact {answer}", unit="scenario", disable=not progress)
    for s in bar:
        where = condition(run, who, s, answer)
        said = messages(s, answer, run.wording)
        p, coverage = option_probabilities(
            engine,
            said,
            options(s),
            where["temperature"],
            where["top_p"],
            where["repetition_penalty"],
        )
        line = {
            "model": who.card.name,
            "weights": where["weights"],
            "adapter": where["adapter"],
            "split": s.split,
            "context": s.context.name,
            "game": s.game.name,
            "payoffs": [float(x) for x in s.game.payoffs],
            "answer": answer,
            "prompt": where["prompt"],
            "temperature": where["temperature"],
            "top_p": where["top_p"],
            "repetition_penalty": where["repetition_penalty"],
            "p": {o: round(float(v), 9) for o, v in zip(options(s), p, strict=True)},
            "coverage": round(float(coverage), 9),
            "engine": engine.name,
            "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        }
        run.ledger.append("readouts", shard_name(who, s, answer), [line])


def option_probabilities(
    engine: Engine,
    said: Sequence[Any],
    choices: Sequence[str],
    temperature: float,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> tuple[np.ndarray, float]:
    """Probability of each option as the answer's next word, and the mass that they cover.

    Our Transformers engine reads the whole distribution. Any other chat model is asked for the log
    probabilities of its first token; requests that start one token later split options of two digits
    from their first digit, and tell whether a quoted option ends there.

    Args:
        engine: Who is read.
        said: Messages, the opening last.
        choices: The options' texts.
        temperature: Temperature at which the probabilities hold.
        top_p: Nucleus; a server is read without one.
        repetition_penalty: As in Transformers; a server is read without one.

    Returns:
        Probabilities `[options]`, coverage.

    Raises:
        TomError: The server gives no usable log probabilities, cannot go on with a started answer,
            or is asked for a nucleus or a penalty.
    """
    reader = getattr(engine.chat, "reader", None)
    if reader is not None:
        from tomlib.sharing import prompt_tokens

        tokens = prompt_tokens(reader.tokenizer, said)
        exact: tuple[np.ndarray, float] = reader.option_probabilities(
            tokens, choices, temperature, top_p, repetition_penalty
        )
        return exact
    if engine.prefill == "none":
        raise TomError(
            f"{engine.name}: no exact probabilities, for this server cannot go on with a started "
            "answer (prefill = 'none'); serve the model with llama.cpp, vLLM or SGLang for them"
        )
    if top_p < 1 or repetition_penalty != 1:
        raise TomError(
            f"{engine.name}: a server's probabilities hold for top_p = 1 and repetition_penalty = 1 "
            "alone; set both, or teacher_engine = 'transformers'"
        )
    first = _next_token(engine, said, temperature)
    p = {o: first.get(o, 0.0) for o in choices}
    split = [o for o in choices if len(o) > 1 and p[o] == 0 and p.get(o[0], 0) > 0]
    for head in dict.fromkeys(o[0] for o in split):  # 1, of 10 or 12: what follows the digit?
        later = _next_token(engine, [*said[:-1], _longer(said[-1], head)], temperature)
        for longer in (o for o in split if o[0] == head):
            p[longer] = p[head] * later.get(longer[1:], 0.0)
        p[head] *= 1 - sum(v for t, v in later.items() if t[:1].isdigit())
    if str(said[-1].content).endswith('"'):  # a quoted option ends with its quote
        for o in choices:
            later = _next_token(engine, [*said[:-1], _longer(said[-1], o)], temperature)
            p[o] *= sum(v for t, v in later.items() if t.startswith('"'))
    out = np.array([p[o] for o in choices])
    return out, float(out.sum())


def _longer(message: Any, more: str) -> Any:
    return message.model_copy(update={"content": message.content + more})


def _next_token(engine: Engine, said: Sequence[Any], temperature: float) -> dict[str, float]:
    """Probabilities of the next token's top candidates, brought from temperature 1 to this one.

    Beyond the top candidates nothing is known; their mass at temperature 1 bounds what is missing.
    """
    extra: dict[str, Any] = {}
    if engine.prefill == "continue_final_message":
        extra = {"continue_final_message": True, "add_generation_prompt": False}
    options: dict[str, Any] = {"extra_body": extra}
    options |= {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 20}
    result = served(engine, said, **options)
    try:
        generation: Any = result.generations[0][0]
        info = dict(generation.generation_info or {})
        info |= dict(generation.message.response_metadata or {})
        content = (info.get("logprobs") or {}).get("content") or []
        top = [(str(t["token"]), float(t["logprob"])) for t in content[0]["top_logprobs"]]
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        top = []
    if not top:
        raise TomError(f"{engine.name}: the server gives no log probabilities; use draws instead")
    logp = np.array([value for _, value in top])
    # Minus infinity is a probability of 0, nothing else that is not finite is one; the likeliest of
    # V tokens has at least 1 / V.
    if np.isnan(logp).any() or not -30 < logp.max() < 1e-3:
        raise TomError(
            f"{engine.name}: the server's log probabilities are none (not finite, above 0, or all "
            "far below it); use draws"
        )
    p = np.where(np.isfinite(logp), np.exp(logp), 0.0)
    rest = max(0.0, 1.0 - float(p.sum()))
    sharp = 1 / max(temperature, 1e-6)  # at 0, whatever is most likely
    warm = (p / p.max()) ** sharp
    # The unseen rest is taken as one candidate: at temperatures below 1 that overstates its share.
    share = warm / (warm.sum() + min(1.0, rest / p.max()) ** sharp)
    return {token: float(v) for (token, _), v in zip(top, share, strict=True)}
