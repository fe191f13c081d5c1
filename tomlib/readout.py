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
from tomlib.profiles import Run
from tomlib.prompts import messages
from tomlib.scenarios import Scenario

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

KEY = ("weights", "adapter", "prompt", "temperature")
"""What tells a readout from every other readout."""


def options(scenario: Scenario) -> list[str]:
    """What can be chosen: `["C", "D"]`, or the whole contributions from 0 to the endowment."""
    if scenario.game_type == "public_goods":
        return [str(i) for i in range(int(getattr(scenario.game, "endowment", 10)) + 1)]
    return ["C", "D"]


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
        answer: A letter-first answer form. With `reasoning+choice` the choice depends on what was
            reasoned; see `reasoned`.
        progress: Whether to show a bar.

    Returns:
        Two-player: `COLUMNS`, one row per scenario; `p_cooperate` is P(C) / (P(C) + P(D)) and
        `coverage` is P(C) + P(D). Public goods: `GOODS_COLUMNS`, one row per contribution, `p`
        normalized likewise.

    Raises:
        TomError: `reasoning+choice`; temperature 0; scenarios of both kinds; no mass on any option.
    """
    if answer == "reasoning+choice":
        raise TomError("answer 'reasoning+choice' has no exact readout: its choice comes last")
    if run.profile.temperature <= 0:
        raise TomError("temperature = 0 has no choice distribution to read; use a positive one")
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
    lines = {tuple(line[k] for k in KEY): line for line in run.ledger.readouts()}
    for s in scenarios:
        where = condition(run, who, s, answer)
        line = lines.get(tuple(where[k] for k in KEY))
        if line is not None:
            found[s] = dict(line["p"]), float(line["coverage"])
    return found


def _as_choice(option: str) -> Any:
    return int(option) if option.isdigit() else option


def _read(
    run: Run, who: Player, scenarios: Sequence[Scenario], answer: str, progress: bool
) -> None:
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
        p, coverage = option_probabilities(engine, said, options(s), run.profile.temperature)
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
            "temperature": run.profile.temperature,
            "p": {o: round(float(v), 9) for o, v in zip(options(s), p, strict=True)},
            "coverage": round(float(coverage), 9),
            "engine": engine.name,
            "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        }
        run.ledger.append("readouts", shard_name(who, s, answer), [line])


def option_probabilities(
    engine: Engine, said: Sequence[Any], choices: Sequence[str], temperature: float
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

    Returns:
        Probabilities `[options]`, coverage.

    Raises:
        TomError: The server gives no usable log probabilities.
    """
    reader = getattr(engine.chat, "reader", None)
    if reader is not None:
        from tomlib.engines import prompt_tokens

        tokens = prompt_tokens(reader.tokenizer, said)
        exact: tuple[np.ndarray, float] = reader.option_probabilities(tokens, choices, temperature)
        return exact
    first = _next_token(engine, said, temperature)
    p = {o: first.get(o, 0.0) for o in choices}
    for longer in [o for o in choices if len(o) > 1 and p[o] == 0 and p.get(o[0], 0) > 0]:
        head, tail = longer[0], longer[1:]
        later = _next_token(engine, [*said[:-1], _longer(said[-1], head)], temperature)
        p[longer] = p[head] * later.get(tail, 0.0)
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
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    options: dict[str, Any] = {"extra_body": extra if engine.prefill != "native" else {}}
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
    # Minus infinity is a probability of 0; nothing else that is not finite is one.
    if np.isnan(logp).any() or logp.max() > 1e-3 or not np.isfinite(logp).any():
        raise TomError(
            f"{engine.name}: the server's log probabilities are not finite or above 0; use draws"
        )
    p = np.where(np.isfinite(logp), np.exp(logp), 0.0)
    rest = max(0.0, 1.0 - float(p.sum()))
    warm = p ** (1 / temperature)
    # The unseen rest is taken as one candidate: at temperatures below 1 that overstates its share.
    share = warm / (warm.sum() + rest ** (1 / temperature))
    return {token: float(v) for (token, _), v in zip(top, share, strict=True)}
