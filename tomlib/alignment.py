"""How close the tuned student has come to the teacher: improvement, distances, baselines.

Draws become counts (`cooperation`), counts of three models become a comparison with one row a
scenario (`compare`), and everything else is read off the comparison. Exact probabilities may stand
wherever counts may: they are rates without sampling error. The public goods game has a module of
its own, `contributions`.

>>> counts = pd.DataFrame(
...     [("in_sample", "team", "stag_hunt", model, "choice", c, 100 - c)
...      for model, c in [("teacher", 40), ("student", 80), ("tuned", 50)]],
...     columns=["split", "context", "game", "model", "answer", "cooperate", "defect"],
... )
>>> improvement(compare(counts))[["improvement", "verdict"]].round(2).to_dict("records")
[{'improvement': 0.75, 'verdict': 'improves'}]
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import rel_entr

from tomlib import stats
from tomlib.errors import TomError

Array = NDArray[np.float64]

SCENARIO = ["split", "context", "game"]
CELL = [*SCENARIO, "model", "answer"]

#: The arms of a run: (teacher, student, tuned student) by their roles.
ARMS: dict[str, tuple[str, str, str]] = {
    "family": ("teacher", "student", "tuned"),
    "published": ("published-teacher", "student", "published-tuned"),
}

#: Answers without a readable choice: they are counted beside C and D, never dropped.
UNREAD = ("unparsed", "refused", "truncated")

# ---------------------------------------------------------------------------------------- counts


def _outcome(draws: pd.DataFrame) -> pd.Series:
    """`read` where a choice was read, else why not."""
    outcome = draws["outcome"].where(draws["outcome"].isin(UNREAD), "unparsed")
    return outcome.where(draws["choice"].isna(), "read")


def cooperation(draws: pd.DataFrame) -> pd.DataFrame:
    """Count what was answered: every draw falls into exactly one of five columns.

    Args:
        draws: One row a draw of a two-player game (`split, context, game, model, answer, choice,
            outcome`); `choice` is "C", "D" or missing.

    Returns:
        One row a scenario, model and answer form, in the order of the draws: `split, context, game,
        model, answer, cooperate, defect, unparsed, refused, truncated`.

    Raises:
        TomError: a choice is neither C nor D.
    """
    strange = draws.loc[draws["choice"].notna() & ~draws["choice"].isin(["C", "D"]), "choice"]
    if len(strange):
        raise TomError(
            f"draws: the choice {strange.iloc[0]} is neither C nor D; "
            "contributions to a public good are counted by contributions.counts"
        )
    names = {"C": "cooperate", "D": "defect"}
    answer = draws["choice"].map(names).astype(object).where(draws["choice"].notna())
    what = answer.fillna(_outcome(draws))
    columns = ["cooperate", "defect", *UNREAD]
    counts = {name: (what == name).astype(int) for name in columns}
    return draws[CELL].assign(**counts).groupby(CELL, sort=False, as_index=False)[columns].sum()


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """Add `rate` (share of C among the readable choices), `draws` (their number) and `unread`.

    Args:
        table: Counts (`cooperate, defect`), exact probabilities (`p_cooperate`) or both, one below
            the other. An exact probability counts as infinitely many draws.
    """
    unknown = pd.Series(np.nan, index=table.index)
    cooperate, defect, exact = (
        table.get(name, unknown).astype(float) for name in ("cooperate", "defect", "p_cooperate")
    )
    draws = (cooperate + defect).where(exact.isna(), np.inf)
    unread = sum(table.get(name, unknown).fillna(0) for name in UNREAD)
    return table.assign(
        rate=stats.proportion(cooperate.where(exact.isna(), exact), draws),
        draws=draws,
        unread=pd.Series(unread, index=table.index).astype(int),
    )


def compare(
    table: pd.DataFrame,
    teacher: str = "teacher",
    student: str = "student",
    tuned: str = "tuned",
) -> pd.DataFrame:
    """Put the cooperation rates of three models side by side.

    Args:
        table: Counts or exact probabilities (see `rates`), with `model`.
        teacher: Name in `model` of the model to be imitated.
        student: Name of the small model before tuning.
        tuned: Name of the small model after tuning.

    Returns:
        One row a scenario: `split, context, game, teacher, student, tuned` (rates, NaN where no
        answer was readable), `n_teacher, n_student, n_tuned` (readable draws, inf for exact ones)
        and `unread`, the number of all three models' answers without a readable choice.

    Raises:
        TomError: a model is not in the table, or answers a scenario in more than one row.
    """
    rated = rates(table)
    parts = []
    for role, model in {"teacher": teacher, "student": student, "tuned": tuned}.items():
        rows = rated[rated["model"] == model]
        if rows.empty:
            there = ", ".join(sorted(map(str, rated["model"].unique())))
            raise TomError(f"compare: no row of the model {model!r}; there are: {there}")
        twice = rows[rows.duplicated(SCENARIO)]
        if len(twice):
            raise TomError(
                f"compare: {model!r} has more than one row of {'/'.join(twice.iloc[0][SCENARIO])}; "
                "choose one answer form"
            )
        parts.append(
            rows.set_index(SCENARIO)[["rate", "draws", "unread"]].set_axis(
                [role, f"n_{role}", f"unread_{role}"], axis=1
            )
        )
    wide = pd.concat(parts, axis=1).reset_index()
    roles = ["teacher", "student", "tuned"]
    unread = wide[[f"unread_{role}" for role in roles]].sum(axis=1).astype(int)
    return wide[[*SCENARIO, *roles, *(f"n_{role}" for role in roles)]].assign(unread=unread)


def stack(tables: Mapping[str, pd.DataFrame], name: str = "comparison") -> pd.DataFrame:
    """Tables of one form below each other, each named in the index.

    >>> stack({"a": pd.DataFrame({"x": [1, 2]}), "b": pd.DataFrame({"x": [3]})})["x"].to_dict()
    {('a', 0): 1, ('a', 1): 2, ('b', 0): 3}
    """
    return pd.concat(dict(tables), names=[name, None])


# ----------------------------------------------------------------------------------- improvement


def _divide(part: Array, whole: Array) -> Array:
    """Quotient, NaN where `whole` is 0."""
    result: Array = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole != 0)
    return result


def ratio(teacher: ArrayLike, student: ArrayLike, tuned: ArrayLike) -> Array:
    """The paper's improvement: the part of the way from student to teacher that was gone."""
    t, s, f = (np.asarray(rate, dtype=float) for rate in (teacher, student, tuned))
    return _divide(f - s, t - s)


def closed(teacher: ArrayLike, student: ArrayLike, tuned: ArrayLike) -> Array:
    """The part of the distance to the teacher that was closed: overshooting does not pay."""
    t, s, f = (np.asarray(rate, dtype=float) for rate in (teacher, student, tuned))
    return np.round(1 - _divide(np.abs(t - f), np.abs(t - s)), 12)  # 0 is 0


PAPER = "mean of ratios"

#: Ways to sum up the improvement over scenarios; columns are (teacher, student, tuned) rates.
#: The first is the paper's.
MEASURES: dict[str, Callable[..., Any]] = {
    PAPER: lambda t, s, f, axis: np.mean(ratio(t, s, f), axis),
    "median of ratios": lambda t, s, f, axis: np.median(ratio(t, s, f), axis),
    "mean of distance-based": lambda t, s, f, axis: np.mean(closed(t, s, f), axis),
    "pooled ratio": lambda t, s, f, axis: ratio(
        np.mean(t, axis), np.mean(s, axis), np.mean(f, axis)
    ),
    "pooled distance-based": lambda t, s, f, axis: (
        1 - np.mean(np.abs(t - f), axis) / np.mean(np.abs(t - s), axis)
    ),
}


def improvement(comparison: pd.DataFrame) -> pd.DataFrame:
    """The paper's improvement of every scenario, (tuned - student) / (teacher - student).

    Returns:
        The comparison with `improvement` (1 is complete alignment) and its 95 % Fieller interval
        `low`, `high` over draws; `distance_based`, 1 - |teacher - tuned| / |teacher - student|;
        `verdict`: `improves`, `overcorrects` (above 1), `exacerbates` (below 0), `unchanged`
        (exactly 0) or `undefined` (teacher and student agree exactly, or a rate is missing); and
        `flagged`: teacher and student hardly differ, that is, the 95 % Newcombe interval of their
        difference contains 0, so that the ratio is mostly noise.
    """
    teacher, student, tuned = _columns(comparison)
    n_teacher, n_student, n_tuned = (
        comparison[f"n_{role}"].to_numpy(dtype=float) for role in ("teacher", "student", "tuned")
    )
    gone = ratio(teacher, student, tuned)
    noise = student * (1 - student) / n_student
    low, high = stats.fieller(
        tuned - student,
        teacher - student,
        tuned * (1 - tuned) / n_tuned + noise,
        teacher * (1 - teacher) / n_teacher + noise,
        noise,
    )
    least, most = stats.newcombe(
        _successes(teacher, n_teacher), n_teacher, _successes(student, n_student), n_student
    )
    verdict = np.select(
        [np.isnan(gone), gone > 1, gone < 0, gone == 0],
        ["undefined", "overcorrects", "exacerbates", "unchanged"],
        "improves",
    )
    return comparison.assign(
        improvement=gone,
        low=np.where(np.isnan(gone), np.nan, low),
        high=np.where(np.isnan(gone), np.nan, high),
        distance_based=closed(teacher, student, tuned),
        verdict=verdict,
        flagged=(least <= 0) & (most >= 0),
    )


def _columns(comparison: pd.DataFrame) -> list[Array]:
    return [comparison[role].to_numpy(dtype=float) for role in ("teacher", "student", "tuned")]


def _successes(rate: Array, draws: Array) -> Array:
    return rate * np.where(np.isinf(draws), 1.0, draws)


def improvement_by(
    comparison: pd.DataFrame, by: str, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Improvement by `game`, by `context` or over `all` scenarios, as in figures 3 and 4.

    Returns:
        One row a group: the group's name, `scenarios` that have an improvement, how many are
        `undefined`, `flagged`, `exacerbates` and `overcorrects`, `unread`, the answers without a
        readable choice; `improvement`, the mean of the scenarios' ratios (what the
        paper shows), with a percentile bootstrap interval `low`, `high` over scenarios; `pooled`,
        the ratio of the mean rates; `distance_based` and `pooled_distance`, the same by distances.
    """
    table = improvement(comparison)
    table = table.assign(unread=table.get("unread", 0))
    groups = table.assign(all="all") if by == "all" else table
    rows = []
    for name, every in groups.groupby(by, sort=False):
        group = every[every["verdict"] != "undefined"]
        columns = _columns(group)
        measured = dict.fromkeys(MEASURES, float("nan"))
        interval = stats.Interval(float("nan"), float("nan"), float("nan"), "none")
        if len(group):
            measured = {key: float(f(*columns, axis=-1)) for key, f in MEASURES.items()}
            interval = stats.bootstrap(
                MEASURES[PAPER], *columns, resamples=resamples, seed=seed, method="percentile"
            )
        rows.append(
            {
                by: name,
                "scenarios": len(group),
                "undefined": len(every) - len(group),
                "unread": int(every["unread"].sum()),
                "flagged": int(group["flagged"].sum()),
                "exacerbates": int((group["verdict"] == "exacerbates").sum()),
                "overcorrects": int((group["verdict"] == "overcorrects").sum()),
                "improvement": measured[PAPER],
                "low": interval.low,
                "high": interval.high,
                "pooled": measured["pooled ratio"],
                "distance_based": measured["mean of distance-based"],
                "pooled_distance": measured["pooled distance-based"],
            }
        )
    names = ["scenarios", "undefined", "unread", "flagged", "exacerbates", "overcorrects"]
    names += ["improvement", "low", "high", "pooled", "distance_based", "pooled_distance"]
    return pd.DataFrame(rows, columns=[by, *names])


def improvement_measures(
    comparison: pd.DataFrame, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """The improvement over all scenarios, measured in several ways, with bootstrap intervals.

    The intervals are clustered by scenario (`stats.bootstrap`): the scenarios are the sample.

    Returns:
        One row a measure (`MEASURES`, and the paper's without the flagged scenarios): `measure,
        estimate, low, high, method, scenarios`.
    """
    table = improvement(comparison).query("verdict != 'undefined'")
    wanted = {**MEASURES, f"{PAPER}, unflagged": MEASURES[PAPER]}
    rows = []
    for measure, statistic in wanted.items():
        used = table[~table["flagged"]] if measure.endswith("unflagged") else table
        if len(used):
            interval = stats.bootstrap(statistic, *_columns(used), resamples=resamples, seed=seed)
            rows.append({"measure": measure, **interval._asdict(), "scenarios": len(used)})
    columns = ["measure", "estimate", "low", "high", "method", "scenarios"]
    return pd.DataFrame(rows, columns=columns)


def improvement_in_words(measures: pd.DataFrame) -> str:
    """The improvement in one sentence: the paper's measure, its interval, and two sober ones.

    Args:
        measures: What `improvement_measures` returns.
    """
    rows = {row["measure"]: row for row in measures.to_dict("records")}
    if PAPER not in rows:
        return "No scenario has readable answers of all three models."
    mean, unflagged = rows[PAPER], rows.get(f"{PAPER}, unflagged")
    text = (
        f"Improvement {mean['estimate']:.1%} (mean of ratios; 95 % interval over scenarios: "
        f"{stats.span(mean['low'], mean['high'])})"
    )
    if unflagged and unflagged["scenarios"] < mean["scenarios"]:
        text += (
            f", {unflagged['estimate']:.1%} over the {unflagged['scenarios']} of "
            f"{mean['scenarios']} scenarios where teacher and student clearly differ"
        )
    return (
        f"{text}; median {rows['median of ratios']['estimate']:.1%}; "
        f"{rows['pooled distance-based']['estimate']:.1%} of the distance to the teacher closed."
    )


def closed_in_words(comparison: pd.DataFrame) -> str:
    """The mean gap to the teacher before and after tuning, in one sentence.

    >>> closed_in_words(pd.DataFrame({"teacher": [0.5], "student": [0.9], "tuned": [0.6]}))
    'the mean gap to the teacher goes from 0.400 to 0.100 (75% of the distance closed).'
    """
    known = comparison.dropna(subset=["teacher", "student", "tuned"])
    before, after = (
        float((known["teacher"] - known[role]).abs().mean()) for role in ("student", "tuned")
    )
    if known.empty:
        return "no scenario has readable answers of all three models."
    share = f"{1 - after / before:.0%} of the" if before > 0 else "there was no"
    return (
        f"the mean gap to the teacher goes from {before:.3f} to {after:.3f} "
        f"({share} distance {'closed' if before > 0 else 'to close'})."
    )


def exceptions_in_words(improvements: pd.DataFrame) -> str:
    """Name every scenario that was exacerbated or overcorrected, as the paper's text does.

    Args:
        improvements: What `improvement` returns.
    """
    sentences = []
    for verdict, phrase in {"exacerbates": "Exacerbated", "overcorrects": "Overcorrected"}.items():
        rows = improvements[improvements["verdict"] == verdict].sort_values("improvement")
        names = [
            f"{row['context']}/{row['game']} ({row['improvement']:.0%}"
            + (", teacher and student hardly differ)" if row["flagged"] else ")")
            for _, row in rows.iterrows()
        ]
        sentences.append(f"{phrase}: {'; '.join(names) or 'none'}.")
    return " ".join(sentences)


# ------------------------------------------------------------------------------------- distances


def distribution_distances(p: ArrayLike, q: ArrayLike) -> dict[str, Array]:
    """Distances between distributions over the last axis (which must be normalized).

    Returns:
        `total_variation` (0 to 1), `jensen_shannon` divergence and `kullback_leibler` divergence of
        q from p, KL(p || q), both in bits; KL is infinite where q excludes what p allows.

    >>> far = distribution_distances([1, 0], [0, 1])
    >>> {name: float(value) for name, value in far.items()}
    {'total_variation': 1.0, 'jensen_shannon': 1.0, 'kullback_leibler': inf}
    """
    first, second = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    middle = (first + second) / 2
    bits = 1 / np.log(2)
    return {
        "total_variation": np.abs(first - second).sum(-1) / 2,
        "jensen_shannon": (rel_entr(first, middle) + rel_entr(second, middle)).sum(-1) / 2 * bits,
        "kullback_leibler": rel_entr(first, second).sum(-1) * bits,
    }


DISTANCES = ("total_variation", "jensen_shannon", "kullback_leibler")


def smoothed(share: Array, draws: ArrayLike, pseudo: float) -> Array:
    """Add `pseudo` draws to every possible answer (last axis); nothing to exact probabilities."""
    n = np.asarray(draws, dtype=float)[..., None]
    exact = np.isinf(n)
    n = np.where(exact, 1.0, n)
    return np.where(exact, share, (share * n + pseudo) / (n + pseudo * share.shape[-1]))


def distances(comparison: pd.DataFrame, pseudo: float = 0.5) -> pd.DataFrame:
    """Distance of student and tuned student from the teacher in every scenario.

    Args:
        comparison: Rates side by side.
        pseudo: Draws added to each of C and D before KL is taken (additive smoothing, 0.5 is
            Jeffreys'), since a share of 0 would make it infinite; the others are not smoothed.

    Returns:
        One row a scenario and model: `split, context, game, model, total_variation,
        jensen_shannon, kullback_leibler` (bits; see `distribution_distances`).
    """
    tables = []
    for model in ("student", "tuned"):
        pairs = [
            (np.stack([comparison[role], 1 - comparison[role]], axis=-1), comparison[f"n_{role}"])
            for role in ("teacher", model)
        ]
        table = comparison[SCENARIO].assign(
            model=model, **distribution_distances(*(share for share, _ in pairs))
        )
        smooth = [smoothed(share, draws, pseudo) for share, draws in pairs]
        tables.append(
            table.assign(kullback_leibler=distribution_distances(*smooth)["kullback_leibler"])
        )
    return pd.concat(tables, ignore_index=True)


def mean_distances(
    comparison: pd.DataFrame, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Mean distances from the teacher over scenarios, with bootstrap intervals over scenarios.

    Returns:
        One row a model: `model`; `total_variation`, `jensen_shannon` and `kullback_leibler` (see
        `distances`), each with the bounds `NAME_low`, `NAME_high`; `scenarios` that have them.
    """
    rows = []
    for model, table in distances(comparison).groupby("model", sort=False):
        known = table.dropna()
        row: dict[str, Any] = {"model": model}
        for name in DISTANCES:
            found = stats.bootstrap(np.mean, known[name], resamples=resamples, seed=seed)
            row |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row | {"scenarios": len(known)})
    return pd.DataFrame(rows)


# -------------------------------------------------------------- correlation, baselines, scorecard


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson's correlation; NaN where one side does not vary.

    >>> round(correlation([1, 2, 3], [1, 2, 4]), 3)
    0.982
    >>> correlation([1, 2, 3], [5, 5, 5])
    nan
    """
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 3 or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def within_context_correlation(table: pd.DataFrame, first: str, second: str) -> float:
    """Correlation over games within contexts: of both columns after taking off the context's mean.

    It asks whether the GAME is read; a model that knows nothing but the context gets NaN or 0.
    """
    centred = within_contexts(table, first, second)
    return correlation(centred[first], centred[second])


def within_contexts(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Both columns after taking off the context's mean: what is left is the game, and noise."""
    known = table.dropna(subset=[first, second])
    means = known.groupby(["split", "context"])[[first, second]].transform("mean")
    return known[[first, second]] - means


def _following(table: pd.DataFrame, first: str, second: str) -> dict[str, float]:
    """How the second column follows the first, over scenarios and within contexts, with intervals."""
    known = table.dropna(subset=[first, second])
    centred = within_contexts(known, first, second)
    contexts = known.groupby(["split", "context"]).ngroups
    plain = correlation(known[first], known[second])
    within = within_context_correlation(known, first, second)
    steep = stats.slope(centred[first], centred[second], means=max(contexts, 1))
    names = ["correlation", "correlation_low", "correlation_high"]
    names += ["within_context", "within_low", "within_high"]
    names += ["within_slope", "slope_low", "slope_high"]
    values = [plain, *stats.fisher(plain, len(known)), within]
    values += [*stats.fisher(within, len(known), max(contexts, 1)), *steep]
    return dict(zip(names, values, strict=True))


def baselines(comparison: pd.DataFrame, training: pd.DataFrame | None = None) -> pd.DataFrame:
    """What the teacher could be guessed to do without any student.

    Args:
        comparison: The scenarios to guess.
        training: A comparison of other scenarios whose teacher may be known (held-out splits: the
            training scenarios). Without it the means are taken over the OTHER scenarios of the
            comparison itself (leave one out), so that no guess sees its own answer.

    Returns:
        `split, context, game` and one column a guess: `teacher's mean` (a constant), `teacher's
        mean by context`, `teacher's mean by game` and, with training, `teacher in training` (the
        same context and game); NaN where the training scenarios have nothing to go by.
    """
    guesses = comparison[SCENARIO].copy()
    ways: dict[str, list[str]] = {
        "teacher's mean": [],
        "teacher's mean by context": ["context"],
        "teacher's mean by game": ["game"],
    }
    if training is not None:
        ways["teacher in training"] = ["context", "game"]
    for name, keys in ways.items():
        if training is not None:
            known = training.assign(all="all")
            mean = known.groupby(keys or ["all"])["teacher"].mean().rename(name)
            guesses = guesses.assign(all="all").join(mean, on=keys or ["all"]).drop(columns="all")
        else:
            groups = comparison.assign(all="all").groupby(keys or ["all"])["teacher"]
            own = comparison["teacher"].fillna(0)
            others = groups.transform("count") - comparison["teacher"].notna()
            total = groups.transform("sum") - own
            guesses[name] = total / others.where(others > 0)
    return guesses


def scorecard(
    comparison: pd.DataFrame,
    training: pd.DataFrame | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """One small table that says how well the teacher is met, and by what it could be met for free.

    Args:
        comparison: Rates side by side.
        training: See `baselines`.
        resamples: Of the bootstrap over scenarios.
        seed: Of the bootstrap.

    Returns:
        One row a prediction of the teacher (tuned student, student, the baselines, and the teacher
        drawn again: the gap that sampling alone would leave): `prediction`; `gap`, the mean
        absolute gap to the teacher, with its bootstrap interval `low`, `high`; `correlation` with
        the teacher over scenarios (Fisher's interval `correlation_low`, `correlation_high`);
        `within_context`, the same over games within contexts (`within_low`, `within_high`), and
        `within_slope`, how much it moves there where the teacher moves by one (t interval
        `slope_low`, `slope_high`); `spread`, the standard deviation over scenarios;
        `against_tuned`, its gap minus the tuned student's, with `against_low`, `against_high`
        (bootstrap of the pairs); `scenarios`. Correlation and slope
        are NaN where a prediction does not vary by construction, and for means that leave the
        scenario out, which run against it by construction.
    """
    guesses = baselines(comparison, training)
    table = comparison.join(guesses.drop(columns=SCENARIO))
    names = ["tuned", "student", *guesses.columns.drop(SCENARIO)]
    following = ["correlation", "correlation_low", "correlation_high", "within_context"]
    following += ["within_low", "within_high", "within_slope", "slope_low", "slope_high"]
    constant = {"teacher's mean": following, "teacher's mean by context": following[3:]}
    if training is None:  # a mean without the scenario itself runs against it by construction
        constant |= dict.fromkeys(guesses.columns.drop(SCENARIO), following)
    rows = []
    for name in names:
        used = table.dropna(subset=["teacher", "tuned", name])
        if used.empty:
            continue
        teacher, tuned = used["teacher"].to_numpy(), used["tuned"].to_numpy()
        gap = np.abs(teacher - used[name].to_numpy())
        lead = gap - np.abs(teacher - tuned)
        interval = stats.bootstrap(np.mean, gap, resamples=resamples, seed=seed)
        against = stats.bootstrap(np.mean, lead, resamples=resamples, seed=seed)
        row = {
            "prediction": name,
            "gap": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            **_following(used, "teacher", name),
            "spread": round(float(used[name].std(ddof=0)), 12),  # a constant has none
            "against_tuned": against.estimate,
            "against_low": against.low,
            "against_high": against.high,
            "scenarios": len(used),
        }
        if name == "tuned":  # nothing to compare it with
            row |= dict.fromkeys(("against_tuned", "against_low", "against_high"), float("nan"))
        rows.append(row | dict.fromkeys(constant.get(name, []), float("nan")))
    draws = comparison[["n_teacher", "n_tuned"]].where(lambda n: n > 0)
    noise = (
        comparison["teacher"] * (1 - comparison["teacher"]) * (1 / draws).sum(axis=1, skipna=False)
    )
    again = {
        "prediction": "teacher drawn again",
        "gap": float(np.sqrt(2 / np.pi * noise).mean()),  # E|x| of a normal with that variance
        "spread": float(comparison["teacher"].std(ddof=0)),
        "scenarios": int(comparison["teacher"].notna().sum()),
    }
    columns = ["prediction", "gap", "low", "high", *following, "spread"]
    columns += ["against_tuned", "against_low", "against_high", "scenarios"]
    return pd.DataFrame([*rows, again], columns=columns)


SCORECARD_INTERVALS = {
    "gap": ("low", "high"),
    "correlation": ("correlation_low", "correlation_high"),
    "within_context": ("within_low", "within_high"),
    "within_slope": ("slope_low", "slope_high"),
    "against_tuned": ("against_low", "against_high"),
}
"""Estimates of a scorecard, with the columns that hold their bounds."""

_GUESSES = {
    "teacher's mean": "a constant, the teacher's mean",
    "teacher in training": "the teacher's answers to the same scenarios in training",
}


def in_words(card: pd.DataFrame, tuned: str = "the tuned student") -> str:
    """Say plainly what a scorecard means, and no more than its intervals bear out.

    Args:
        card: What `scorecard` returns.
        tuned: How to call the tuned student.
    """
    rows = {str(row["prediction"]): row for row in card.to_dict("records")}
    if "tuned" not in rows:
        return "No scenario has readable answers of teacher and tuned student."
    own = rows["tuned"]
    gap = {name: f"{r['gap']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for name, r in rows.items()}
    where = f"over {own['scenarios']} scenarios"
    text = f"On average {where} {tuned} is {gap['tuned']} away from the teacher"
    text += f"; before tuning {gap['student']}." if "student" in rows else "."
    for name, row in rows.items():
        if not name.startswith("teacher's") and name != "teacher in training":
            continue
        what = _GUESSES.get(name, f"the {name}")
        verb = "cannot be told apart from"
        if row["against_low"] > 0 or row["against_high"] < 0:
            verb = "is closer than" if row["against_tuned"] > 0 else "is farther away than"
        text += f" It {verb} {what}: {gap[name]}."
    if np.isnan(own["within_context"]):
        return text + " Over the games of a context the teacher's choices, or its own, do not vary."
    return text + (
        " Over the games within a context it correlates with the teacher at "
        f"{own['within_context']:.2f} ({own['within_low']:.2f} to {own['within_high']:.2f}), and moves "
        f"by {100 * own['within_slope']:.1f} points ({100 * own['slope_low']:.1f} to "
        f"{100 * own['slope_high']:.1f}) where the teacher moves by 100."
    )


def sensitivity(table: pd.DataFrame) -> pd.DataFrame:
    """How much of a model's behaviour depends on the context and how much on the game.

    Args:
        table: Counts or exact probabilities (see `rates`).

    Returns:
        One row a split, model and answer form: `mean, lowest, highest, spread` (standard deviation)
        of P(C) over scenarios; `spread_low`, `spread_high`, the 95 % interval of what it would be
        without sampling (`stats.spread`; NaN for exact probabilities);
        `context_share` and `game_share`, the parts of the variance that lie between the means of
        contexts and of games, and `both_share`, what only their combination explains (two-way
        analysis of variance without replication, for a full grid of contexts and games), each with
        the 95 % interval of what it would be without sampling, as `context_low` and so on
        (`stats.shares`; NaN for exact probabilities and where a cell of the grid is missing);
        `noise_share`, the part that sampling alone would cause; `unread`, the number of answers
        without a readable choice.
    """
    rows = []
    for key, group in rates(table).groupby(["split", "model", "answer"], sort=False):
        known = group.dropna(subset="rate")
        rate, draws = known["rate"].to_numpy(), known["draws"].to_numpy()
        total = float(rate.var()) if len(rate) else float("nan")
        spread = stats.spread(rate, draws)
        shares = {
            f"{by}_share": float(known.groupby(by)["rate"].transform("mean").var(ddof=0))
            for by in ("context", "game")
        }
        shares["both_share"] = total - sum(shares.values())
        noise = float(np.mean(rate * (1 - rate) / draws)) if len(rate) else total
        contexts, games = known["context"].nunique(), known["game"].nunique()
        full = noise > 0 and len(rate) == contexts * games
        bounds = stats.shares(
            [len(rate) * part / noise if full else float("nan") for part in shares.values()],
            [contexts - 1, games - 1, (contexts - 1) * (games - 1)],
        )
        shares["noise_share"] = noise
        varies = total > 1e-12
        row = dict(zip(("split", "model", "answer"), key, strict=True)) | {
            "mean": known["rate"].mean(),
            "lowest": known["rate"].min(),
            "highest": known["rate"].max(),
            "spread": total**0.5,
        }
        row |= {name: part / total if varies else float("nan") for name, part in shares.items()}
        intervals = zip(SENSITIVITY_INTERVALS.values(), [spread, *bounds], strict=True)
        for columns, interval in intervals:
            row |= zip(columns, interval, strict=True)
        rows.append(row | {"unread": int(group["unread"].sum())})
    return pd.DataFrame(rows)


SENSITIVITY_INTERVALS = {
    "spread": ("spread_low", "spread_high"),
    "context_share": ("context_low", "context_high"),
    "game_share": ("game_low", "game_high"),
    "both_share": ("both_low", "both_high"),
}
"""Estimates of `sensitivity`, with the columns that hold their bounds."""
