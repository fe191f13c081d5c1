"""The public goods game: contributions, their means and distributions.

>>> table = pd.DataFrame(
...     [("teacher", 7, 300), ("student", 5, 226), ("student", 7, 74), ("tuned", 5, 162),
...      ("tuned", 7, 138)], columns=["model", "contribution", "count"])
>>> gone = improvement(table)
>>> print(f"{gone.estimate:.3f} ({gone.low:.3f} to {gone.high:.3f})")
0.283 (0.192 to 0.369)
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tomlib import alignment, stats


def counts(draws: pd.DataFrame) -> pd.DataFrame:
    """Count the contributions to a public good.

    Args:
        draws: One row a draw (`model, choice, outcome`); `choice` is a whole number of dollars or
            missing.

    Returns:
        One row a model and contribution: `model, contribution, count`; the contribution is `<NA>`
        for answers without a readable one, which are counted too.
    """
    given = draws[["model"]].assign(
        contribution=pd.to_numeric(draws["choice"], errors="coerce").astype("Int64")
    )
    models = pd.CategoricalDtype(list(given["model"].unique()), ordered=True)
    counted = given.astype({"model": models}).groupby(
        ["model", "contribution"], dropna=False, observed=True
    )
    return counted.size().reset_index(name="count").astype({"model": object})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean contributions with standard errors.

    Args:
        table: Counts (`model, contribution, count`) or exact probabilities (`model, contribution,
            p`), whose mean has no sampling error.

    Returns:
        One row a model: `model, mean, sd, se, draws, unread`.
    """
    rows = []
    for model, group in table.groupby("model", sort=False):
        weight = group["p" if "p" in group else "count"].astype(float)
        read = group["contribution"].notna()
        given, share = group.loc[read, "contribution"].astype(float), weight[read]
        total = share.sum()
        mean = float((given * share).sum() / total) if total else float("nan")
        spread = float(((given - mean) ** 2 * share).sum())
        if "p" in group:
            draws, sd, se = float("inf"), (spread / total) ** 0.5, 0.0
        else:
            draws = float(total)
            sd = (spread / (draws - 1)) ** 0.5 if draws > 1 else float("nan")
            se = sd / draws**0.5 if draws > 1 else float("nan")
        rows.append((model, mean, sd, se, draws, float(weight[~read].sum())))
    return pd.DataFrame(rows, columns=["model", "mean", "sd", "se", "draws", "unread"])


def compare_means(
    table: pd.DataFrame,
    pairs: Sequence[tuple[str, str]] = (("student", "tuned"), ("tuned", "teacher")),
) -> pd.DataFrame:
    """Welch's t tests of mean contributions, from the counts.

    Returns:
        One row a pair: `first, second, difference` (of their means), `t, df, p` (two-sided).
    """
    given = summary(table).set_index("model")[["mean", "sd", "draws"]]
    rows = []
    for first, second in pairs:
        mean1, sd1, draws1 = (float(number) for number in given.loc[first].to_numpy())
        mean2, sd2, draws2 = (float(number) for number in given.loc[second].to_numpy())
        test = stats.welch_from_summary(mean1, sd1, draws1, mean2, sd2, draws2)
        rows.append((first, second, mean1 - mean2, *test))
    return pd.DataFrame(rows, columns=["first", "second", "difference", "t", "df", "p"])


def improvement(
    table: pd.DataFrame, teacher: str = "teacher", student: str = "student", tuned: str = "tuned"
) -> stats.Interval:
    """The paper's improvement, (tuned - student) / (teacher - student), of mean contributions.

    Args:
        table: Counts or exact probabilities (see `summary`).
        teacher: Name in `model` of the model to be imitated.
        student: Name of the small model before tuning.
        tuned: Name of the small model after tuning.

    Returns:
        The ratio with its 95 % Fieller interval over draws; one game has no scenarios to draw.
    """
    given = summary(table).set_index("model")
    mean, noise = given["mean"], given["se"] ** 2
    ratio = alignment.ratio(mean[teacher], mean[student], mean[tuned])
    low, high = stats.fieller(
        mean[tuned] - mean[student],
        mean[teacher] - mean[student],
        noise[tuned] + noise[student],
        noise[teacher] + noise[student],
        noise[student],
    )
    return stats.Interval(float(ratio), float(low), float(high), "Fieller")


def distances(
    table: pd.DataFrame,
    endowment: int = 10,
    teacher: str = "teacher",
    pseudo: float = 0.5,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Distance of every other model's contributions from the teacher's.

    Args:
        table: Counts or exact probabilities (see `summary`).
        endowment: The largest contribution; every whole number from 0 on is possible.
        teacher: The model to compare with.
        pseudo: Draws added to every possible contribution before KL is taken.
        resamples: Random divisions of two models' draws.
        seed: Of these divisions.

    Returns:
        One row a model: `model, total_variation, jensen_shannon, kullback_leibler`, and
        `wasserstein`, the mean number of dollars by which contributions would have to be moved.
        Sampling adds to a distance, and near 0 no interval of it is to be trusted; so each has the
        range in which 95 % of distances lie when the draws of both models are divided between them
        at random, as `total_variation_low`, `total_variation_high` and so on (NaN for exact
        probabilities): a distance within it may be chance alone.
    """
    exact = "p" in table
    wide = (
        table.dropna(subset="contribution")
        .pivot_table(
            index="model", columns="contribution", values="p" if exact else "count", aggfunc="sum"
        )
        .reindex(index=pd.Index(table["model"].unique()), columns=range(endowment + 1))
        .fillna(0.0)
        .astype(float)
    )
    own = wide.loc[teacher].to_numpy()
    rng = np.random.default_rng(seed)
    rows = []
    for model, given in wide.drop(index=teacher).iterrows():
        other = given.to_numpy()
        row = {name: float(far) for name, far in _apart(own, other, pseudo, exact).items()}
        chance = dict.fromkeys(row, np.array([np.nan]))
        both = (own + other).astype(int)
        if not exact and min(own.sum(), other.sum()) > 0:
            first = rng.multivariate_hypergeometric(both, int(own.sum()), size=resamples)
            chance = _apart(first.astype(float), (both - first).astype(float), pseudo)
        for name, columns in CHANCE.items():
            row |= zip(columns, np.quantile(chance[name], [0.025, 0.975]), strict=True)
        rows.append({"model": model} | row)
    return pd.DataFrame(rows)


def _apart(
    teacher: NDArray[np.float64],
    other: NDArray[np.float64],
    pseudo: float,
    exact: bool = False,
) -> dict[str, NDArray[np.float64]]:
    """Distances between weights of contributions, along the last axis."""
    shares, smooth = [], []
    for weight in (teacher, other):
        total = weight.sum(-1, keepdims=True)
        shares.append(np.divide(weight, total, out=np.full_like(weight, np.nan), where=total > 0))
        draws = np.full(total.shape[:-1], np.inf) if exact else total[..., 0]
        smooth.append(alignment.smoothed(shares[-1], draws, pseudo))
    far = alignment.distribution_distances(*shares)
    far["kullback_leibler"] = alignment.distribution_distances(*smooth)["kullback_leibler"]
    far["wasserstein"] = np.abs(np.cumsum(shares[0] - shares[1], axis=-1)).sum(-1)
    return far


CHANCE = {name: (f"{name}_low", f"{name}_high") for name in (*alignment.DISTANCES, "wasserstein")}
"""The distances, with the columns that hold the range of chance."""


def in_words(
    table: pd.DataFrame,
    teacher: str = "teacher",
    student: str = "student",
    tuned: str = "tuned",
    endowment: int = 10,
) -> str:
    """What the contributions say: means, improvement, and how far the distributions are apart.

    Args:
        table: Counts or exact probabilities (see `summary`).
        teacher: Name in `model` of the model to be imitated.
        student: Name of the small model before tuning.
        tuned: Name of the small model after tuning.
        endowment: The largest contribution.
    """
    mean = summary(table).set_index("model")["mean"]
    far = distances(table, endowment, teacher).set_index("model")["total_variation"]
    gone = improvement(table, teacher, student, tuned)
    return (
        f"Teacher {mean[teacher]:.2f}, student {mean[student]:.2f}, tuned student "
        f"{mean[tuned]:.2f} dollars; improvement {gone.estimate:.1%} (95 % interval over draws: "
        f"{stats.span(gone.low, gone.high)}). The distribution's distance from the teacher's went "
        f"from {far[student]:.3f} to {far[tuned]:.3f} (total variation)."
    )
