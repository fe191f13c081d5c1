"""Tests, intervals, equivalence and multiplicity, on scipy and statsmodels.

Counts go in as numbers or arrays (`successes` out of `draws`), intervals come out as
`(low, high)`, whole tables as frames. Exact probabilities are proportions whose number of draws is
infinite: they have no sampling error.

>>> low, high = wilson(225, 300)
>>> print(f"{low:.3f} {high:.3f}")
0.698 0.796
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import (
    proportion_confint,
    proportions_ztest,
    tost_proportions_2indep,
)

from tomlib.errors import TomError

Array = NDArray[np.float64]

#: Two cooperation rates closer than this are called the same, unless a chapter says otherwise.
MARGIN = 0.10


class Interval(NamedTuple):
    """An estimate with its interval and the way the interval was made."""

    estimate: float
    low: float
    high: float
    method: str


class TTest(NamedTuple):
    """A t test of two means: t, degrees of freedom, two-sided p."""

    t: float
    df: float
    p: float


def span(low: float, high: float) -> str:
    """An interval of shares in words.

    >>> span(0.271, 0.404), span(float("-inf"), float("inf")), span(float("nan"), float("nan"))
    ('27% to 40%', 'unbounded', 'none')
    """
    if np.isnan(low) or np.isnan(high):
        return "none"
    return "unbounded" if np.isinf(low) or np.isinf(high) else f"{low:.0%} to {high:.0%}"


def with_interval(values: ArrayLike, low: ArrayLike, high: ArrayLike, digits: int = 2) -> list[str]:
    """Numbers with their intervals, as a table shows them; blanks do not break.

    >>> [" ".join(text.split()) for text in with_interval([0.5], [0.404], [0.596])]
    ['0.50 (0.40 to 0.60)']
    """
    columns = _arrays(values, low, high)
    return [
        "-"
        if np.isnan(p)
        else f"{p:.{digits}f}\xa0({_bounds(a, b, digits)})".replace("\xa0(none)", "")
        for p, a, b in zip(*columns, strict=True)
    ]


def _bounds(low: float, high: float, digits: int) -> str:
    if np.isnan(low) or np.isnan(high):
        return "none"
    if np.isinf(low) and np.isinf(high):
        return "unbounded"
    return f"{low:.{digits}f}\xa0to\xa0{high:.{digits}f}"


def _arrays(*values: ArrayLike) -> list[Array]:
    return [np.asarray(array, dtype=float) for array in np.broadcast_arrays(*values)]


def wilson(successes: ArrayLike, draws: ArrayLike, confidence: float = 0.95) -> tuple[Array, Array]:
    """Wilson's score interval of a proportion; NaN where there are no draws.

    With infinitely many draws (`successes` is then the probability itself) the interval is a point.
    """
    x, n = _arrays(successes, draws)
    exact = np.isinf(n)
    usable = ~exact & (n > 0)
    low, high = np.where(exact, x, np.nan), np.where(exact, x, np.nan)
    low[usable], high[usable] = proportion_confint(
        x[usable], n[usable], alpha=1 - confidence, method="wilson"
    )
    return low, high


def newcombe(
    successes1: ArrayLike,
    draws1: ArrayLike,
    successes2: ArrayLike,
    draws2: ArrayLike,
    confidence: float = 0.95,
) -> tuple[Array, Array]:
    """Newcombe's hybrid score interval of the difference p1 - p2 (his method 10, 1998)."""
    x1, n1, x2, n2 = _arrays(successes1, draws1, successes2, draws2)
    p1, p2 = proportion(x1, n1), proportion(x2, n2)
    low1, high1 = wilson(x1, n1, confidence)
    low2, high2 = wilson(x2, n2, confidence)
    difference = p1 - p2
    return (
        difference - np.hypot(p1 - low1, high2 - p2),
        difference + np.hypot(high1 - p1, p2 - low2),
    )


def proportion(successes: ArrayLike, draws: ArrayLike) -> Array:
    """Successes over draws: NaN without draws, the value itself with infinitely many."""
    x, n = _arrays(successes, draws)
    share = np.full(x.shape, np.nan)
    np.divide(x, n, out=share, where=(n > 0) & np.isfinite(n))
    return np.where(np.isinf(n), x, share)


def two_proportions(
    successes1: ArrayLike, draws1: ArrayLike, successes2: ArrayLike, draws2: ArrayLike
) -> tuple[Array, Array]:
    """Test p1 = p2: z of p1 - p2 with the pooled standard error, and its two-sided p.

    Where nobody or everybody cooperates in both samples there is no difference: z = 0, p = 1.
    """
    x1, n1, x2, n2 = _arrays(successes1, draws1, successes2, draws2)
    z, p = np.full(x1.shape, np.nan), np.full(x1.shape, np.nan)
    for at in np.ndindex(x1.shape):
        total, both = x1[at] + x2[at], n1[at] + n2[at]
        if min(n1[at], n2[at]) > 0:
            z[at], p[at] = (
                (0.0, 1.0)
                if total in (0, both)
                else proportions_ztest([x1[at], x2[at]], [n1[at], n2[at]])
            )
    return z, p


def equivalence(
    successes1: ArrayLike,
    draws1: ArrayLike,
    successes2: ArrayLike,
    draws2: ArrayLike,
    margin: float = MARGIN,
) -> Array:
    """Test |p1 - p2| < margin by two one-sided tests (TOST); a small p means: the same.

    "No significant difference" does not show sameness, this does. The tests are Agresti and Caffo's
    (one success and one failure added to each sample), which also hold where nobody cooperates.
    """
    x1, n1, x2, n2 = _arrays(successes1, draws1, successes2, draws2)
    p = np.full(x1.shape, np.nan)
    known = (n1 > 0) & (n2 > 0)
    with np.errstate(all="ignore"):  # statsmodels also takes the ratio, which may be 0 / 0
        p[known] = tost_proportions_2indep(
            *(array[known] for array in (x1, n1, x2, n2)),
            -margin,
            margin,
            method="agresti-caffo",
            compare="diff",
        ).pvalue
    return p


def adjust(p: ArrayLike, method: Literal["holm", "bh"]) -> Array:
    """p-values adjusted for multiplicity (Holm, or Benjamini-Hochberg); NaN stays NaN."""
    values = np.asarray(p, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    known = ~np.isnan(values)
    if known.any():
        name = {"holm": "holm", "bh": "fdr_bh"}[method]
        adjusted[known] = multipletests(values[known], method=name)[1]
    return adjusted


def proportion_tests(
    before: pd.DataFrame,
    after: pd.DataFrame,
    on: Sequence[str] = ("context", "game"),
    margin: float = MARGIN,
) -> pd.DataFrame:
    """Has the cooperation rate changed? The right tests for the question of Table 1.

    Args:
        before: Counts (columns `cooperate`, `defect` and those of `on`), one row a scenario.
        after: Counts of the same scenarios under the other condition.
        on: Columns that pair the rows.
        margin: Largest difference that counts as none, for the equivalence test.

    Returns:
        One row a pair: `before`, `after` (rates), `difference` (after - before) with its 95 %
        Newcombe interval `low`, `high` and its 90 % one `low90`, `high90`, pooled `z` and two-sided
        `p`, `holm` and `bh` adjusted, `equivalence_p` (TOST), `equivalence_holm` adjusted, and
        `verdict`: `changed` (Holm below 0.05), `same` (equivalence after Holm below 0.05), `both`
        (changed, by less than the margin) or `undecided`.
    """
    keys = list(on)
    pairs = before[[*keys, "cooperate", "defect"]].merge(
        after[[*keys, "cooperate", "defect"]], on=keys, suffixes=("1", "2"), validate="1:1"
    )
    x1, x2 = pairs["cooperate1"].to_numpy(), pairs["cooperate2"].to_numpy()
    n1, n2 = x1 + pairs["defect1"].to_numpy(), x2 + pairs["defect2"].to_numpy()
    z, p = two_proportions(x2, n2, x1, n1)
    tests = pairs[keys].assign(before=proportion(x1, n1), after=proportion(x2, n2))
    tests["difference"] = tests["after"] - tests["before"]
    tests["low"], tests["high"] = newcombe(x2, n2, x1, n1)
    tests["low90"], tests["high90"] = newcombe(x2, n2, x1, n1, confidence=0.90)
    tests["z"], tests["p"] = z, p
    tests["holm"], tests["bh"] = adjust(p, "holm"), adjust(p, "bh")
    tests["equivalence_p"] = equivalence(x2, n2, x1, n1, margin)
    tests["equivalence_holm"] = adjust(tests["equivalence_p"], "holm")
    changed, same = tests["holm"] < 0.05, tests["equivalence_holm"] < 0.05
    tests["verdict"] = np.select(
        [changed & same, changed, same], ["both", "changed", "same"], "undecided"
    )
    return tests


def table1_rule(rates1: ArrayLike, rates2: ArrayLike, draws: int = 300) -> pd.DataFrame:
    """Table 1 of the paper by the rule that gives its digits; not a test to be used.

    The standard error is that of ONE proportion, sqrt(p1 (1 - p1) / draws), as if the second were
    known exactly; z is (p1 - p2) over it, while `difference` is p2 - p1; p is one-sided, and the
    stars go by p after rounding to two digits (0.05 `*`, 0.01 `**`, 0.00 `***`).

    >>> table1_rule([0.75], [0.71]).round(2).to_dict("records")
    [{'difference': -0.04, 'se': 0.02, 'z': 1.6, 'p_value': 0.05, 'stars': '*'}]
    """
    p1, p2 = _arrays(rates1, rates2)
    se = np.sqrt(p1 * (1 - p1) / draws)
    with np.errstate(all="ignore"):  # se is 0 where all or none cooperated
        z = (p1 - p2) / se
    p = stats.norm.sf(np.abs(z))
    rounded = np.round(p, 2)
    stars = np.select([rounded <= 0.0, rounded <= 0.01, rounded <= 0.05], ["***", "**", "*"], "")
    return pd.DataFrame({"difference": p2 - p1, "se": se, "z": z, "p_value": p, "stars": stars})


def additive(counts: pd.DataFrame) -> pd.DataFrame:
    """Counts as an additive logistic model sees them: a context's effect and a game's, no more.

    A cell's own count is noisy (with 300 draws by 3 percentage points, as much as games differ); the
    model pools a game over all contexts, and a context over all games.

    Args:
        counts: `context, game, cooperate, defect`.

    Returns:
        The same table with fitted counts to one decimal; each cell's number of draws is kept.

    Raises:
        TomError: fewer than two contexts or games.
    """
    import statsmodels.api as sm

    if min(counts["context"].nunique(), counts["game"].nunique()) < 2:
        raise TomError("additive targets need two contexts and two games at least")
    design = pd.get_dummies(counts[["context", "game"]], drop_first=True, dtype=float)
    observed = counts[["cooperate", "defect"]].to_numpy(dtype=float)
    model = sm.GLM(observed, sm.add_constant(design.to_numpy()), family=sm.families.Binomial())
    share, draws = np.asarray(model.fit().fittedvalues), observed.sum(1)
    fitted = np.round(share * draws, 1)
    return counts.assign(cooperate=fitted, defect=np.round(draws - fitted, 1))


def welch_from_summary(
    mean1: float, sd1: float, n1: float, mean2: float, sd2: float, n2: float
) -> TTest:
    """Welch's t test of mean1 - mean2, from means, standard deviations and sample sizes.

    NaN for samples of fewer than two.

    >>> round(welch_from_summary(5.92, 0.99, 300, 7, 0, 300).t, 2)  # as the paper prints it
    -18.9
    """
    if min(n1, n2) < 2:
        return TTest(float("nan"), float("nan"), float("nan"))
    with np.errstate(all="ignore"):  # two samples without spread: t is infinite or undefined
        test = stats.ttest_ind_from_stats(mean1, sd1, n1, mean2, sd2, n2, equal_var=False)
    e1, e2 = sd1**2 / n1, sd2**2 / n2
    error = e1**2 / (n1 - 1) + e2**2 / (n2 - 1)
    df = (e1 + e2) ** 2 / error if error > 0 else float("nan")
    return TTest(float(test.statistic), float(df), float(test.pvalue))


def bootstrap(
    statistic: Callable[..., Any],
    *columns: ArrayLike,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    method: Literal["BCa", "percentile"] = "BCa",
) -> Interval:
    """Bootstrap interval clustered by scenario: whole scenarios are drawn, with replacement.

    The scenarios are the sample, not the draws: 300 more draws of the same 20 scenarios tell
    nothing about a 21st.

    Args:
        statistic: Of the columns, along `axis` (given by name); vectorized.
        columns: One value a scenario each, all of one length, resampled together.
        resamples: How many.
        seed: Makes the interval repeatable.
        confidence: Its level.
        method: `BCa`, or `percentile`, which also stands in where BCa does not exist (the interval
            says which it is). Fewer than three scenarios: no interval, NaN.
    """
    data = [np.asarray(column, dtype=float) for column in columns]
    # Sorted, so that the interval does not go by the order in which scenarios stand.
    data = [column[np.lexsort(data)] for column in data]
    estimate = float(statistic(*data, axis=-1))
    if len(data[0]) < 3 or not np.isfinite(estimate):
        return Interval(estimate, float("nan"), float("nan"), "none")
    low = high = float("nan")
    for way in dict.fromkeys((method, "percentile")):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # gives NaN, seen below
            result = stats.bootstrap(
                data,
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=resamples,
                confidence_level=confidence,
                method=way,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        low, high = float(result.low), float(result.high)
        if np.isfinite([low, high]).all():
            return Interval(estimate, low, high, way)
    return Interval(estimate, low, high, "none")


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and its t interval: of few values that are independent, such as means of contexts.

    Returns:
        Mean, low, high; bounds NaN for fewer than two values.

    >>> "{:.2f} {:.2f} {:.2f}".format(*mean_interval([0.1, 0.2, 0.3]))
    '0.20 -0.05 0.45'
    """
    (data,) = _arrays(values)
    if len(data) < 2:
        return float(np.mean(data)), float("nan"), float("nan")
    interval = stats.ttest_1samp(data, 0).confidence_interval(confidence)
    return float(np.mean(data)), float(interval.low), float(interval.high)


def fisher(r: float, n: int, means: int = 1, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a correlation by Fisher's z; NaN for too few pairs.

    Args:
        r: The correlation.
        n: Pairs.
        means: How many means were taken off each side: 1 is the plain correlation; with one for each
            group it is a partial correlation, and every further mean costs a degree of freedom.
        confidence: Its level.

    >>> low, high = fisher(0.5, 20)
    >>> print(f"{low:.3f} {high:.3f}")
    0.074 0.772
    """
    free = n - (means - 1) - 3
    if np.isnan(r) or free < 1:
        return float("nan"), float("nan")
    with np.errstate(divide="ignore"):  # a perfect correlation is its own interval
        z = np.arctanh(np.clip(r, -1, 1))
    half = stats.norm.ppf((1 + confidence) / 2) / np.sqrt(free)
    return float(np.tanh(z - half)), float(np.tanh(z + half))


def slope(
    x: ArrayLike, y: ArrayLike, means: int = 1, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Least-squares slope of y on x, both with their means taken off, and its t interval.

    Args:
        x: Explains.
        y: Is explained.
        means: How many means were taken off each side (1, or one for each group).
        confidence: Its level.

    Returns:
        Slope, low, high; NaN where x does not vary, bounds NaN where nothing is left to go by.

    >>> estimate, low, high = slope([-1, 0, 1, 2, -2], [-1, 0.2, 0.9, 1.8, -1.9])
    >>> print(f"{estimate:.3f} {low:.3f} {high:.3f}")
    0.930 0.799 1.061
    """
    a, b = _arrays(x, y)
    size = float(a @ a)
    if size <= 1e-18:
        return float("nan"), float("nan"), float("nan")
    estimate = float(a @ b) / size
    free = len(a) - means - 1
    if free < 1:
        return estimate, float("nan"), float("nan")
    left = b - estimate * a
    error = np.sqrt(float(left @ left) / free / size)
    half = float(stats.t.ppf((1 + confidence) / 2, free) * error)
    return estimate, estimate - half, estimate + half


def spread(rates: ArrayLike, draws: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the standard deviation that rates would have over cells without sampling.

    Sampling adds to a spread. Over its mean sampling variance the rates' sum of squares is noncentral
    chi-square; the interval holds every noncentrality that it does not contradict, so that it may lie
    below the spread that was drawn.

    Args:
        rates: One for each cell.
        draws: Behind each rate; NaN is returned where they are infinite or where sampling has no part.
        confidence: Its level.

    >>> low, high = spread([0.2, 0.4, 0.5, 0.7], [100] * 4)
    >>> print(f"{low:.3f} {high:.3f}")
    0.131 0.223
    """
    p, n = _arrays(rates, draws)
    noise = float(np.mean(p * (1 - p) / n)) if len(p) > 1 else 0.0
    if not noise > 0:
        return float("nan"), float("nan")
    seen, free = len(p) * float(p.var()) / noise, len(p) - 1

    def noncentrality(level: float) -> float:
        """The noncentrality under which less than what was seen has this probability."""
        if stats.chi2.cdf(seen, free) <= level:
            return 0.0
        most = 2 * seen + 50
        return float(optimize.brentq(lambda nc: stats.ncx2.cdf(seen, free, nc) - level, 0.0, most))

    outside = (1 - confidence) / 2
    low, high = (
        float(np.sqrt(noncentrality(level) * noise / len(p))) for level in (1 - outside, outside)
    )
    return low, high


def shares(
    squares: Sequence[float],
    freedom: Sequence[int],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Intervals of the parts of a variance that its sources would have without sampling.

    Over its sampling variance the sum of squares of a source is noncentral chi-square (see `spread`).
    Each noncentrality is drawn from the fiducial distribution that inverting this gives, and the parts
    are taken of what was drawn. In simulations they hold the truth as often as they should, but where
    all of the variance has one source: there in 88 % in place of 95 (`tests/test_stats.py`).

    Args:
        squares: Sum of squares of each source over the sampling variance of one cell.
        freedom: Degrees of freedom of each.
        confidence: Level of the intervals.
        resamples: Draws of the noncentralities.
        seed: Of these draws.

    >>> [f"{low:.2f} to {high:.2f}" for low, high in shares([400, 12, 20], [4, 3, 12])]
    ['0.90 to 0.99', '0.00 to 0.06', '0.00 to 0.07']
    """
    if not all(np.isfinite(square) for square in squares):
        return [(float("nan"), float("nan"))] * len(squares)
    rng = np.random.default_rng(seed)
    drawn = []
    for square, free in zip(squares, freedom, strict=True):
        if not free:  # one context or one game
            drawn.append(np.zeros(resamples))
            continue
        tried = (2 * square + 50) * np.linspace(0, 1, 2001) ** 2
        below = stats.ncx2.cdf(square, free, tried)
        drawn.append(np.interp(rng.random(resamples), below[::-1], tried[::-1]))
    whole = np.sum(drawn, axis=0)
    known = whole > 0
    if not known.any():
        return [(0.0, 1.0)] * len(drawn)
    tail = (1 - confidence) / 2
    bounds = [np.quantile(part[known] / whole[known], [tail, 1 - tail]) for part in drawn]
    return [(float(low), float(high)) for low, high in bounds]


def fieller(
    numerator: ArrayLike,
    denominator: ArrayLike,
    var_numerator: ArrayLike,
    var_denominator: ArrayLike,
    covariance: ArrayLike,
    confidence: float = 0.95,
) -> tuple[Array, Array]:
    """Fieller's interval of a ratio; (-inf, inf) where the denominator may well be zero.

    >>> low, high = fieller(1.0, 2.0, 0.01, 0.01, 0.0)
    >>> print(f"{low:.3f} {high:.3f}")
    0.395 0.615
    """
    a, b, va, vb, vab = _arrays(numerator, denominator, var_numerator, var_denominator, covariance)
    q = stats.norm.ppf((1 + confidence) / 2) ** 2
    bounded = b**2 > q * vb
    with np.errstate(all="ignore"):
        centre = (a * b - q * vab) / (b**2 - q * vb)
        half = np.sqrt(np.maximum(centre**2 - (a**2 - q * va) / (b**2 - q * vb), 0))
    unknown = np.isnan(a) | np.isnan(b)
    low = np.where(bounded, centre - half, -np.inf)
    high = np.where(bounded, centre + half, np.inf)
    return np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)


def exact_agreement(
    counts: pd.DataFrame,
    exact: pd.DataFrame,
    on: Sequence[str] = ("split", "context", "game", "model", "answer"),
) -> pd.DataFrame:
    """Do the sampled choices fit the exact probabilities?

    Args:
        counts: Sampled choices (`cooperate`, `defect`).
        exact: Exact probabilities (`p_cooperate`, `coverage`).
        on: Columns that pair the rows; pairs missing on either side are left out.

    Returns:
        One row a pair: `rate` and `draws` with the 95 % Wilson interval `low`, `high`; `exact`;
        `coverage`; the two-sided binomial `p` of the sample under the exact probability; `holm`
        (adjusted over all rows) and `agrees` (Holm at least 0.05; without draws there is nothing to
        disagree).
    """
    keys = list(on)
    table = counts[[*keys, "cooperate", "defect"]].merge(
        exact[[*keys, "p_cooperate", "coverage"]], on=keys, validate="1:1"
    )
    draws = table["cooperate"] + table["defect"]
    low, high = wilson(table["cooperate"], draws)
    p = [
        stats.binomtest(int(x), int(n), min(max(float(q), 0.0), 1.0)).pvalue if n else np.nan
        for x, n, q in zip(table["cooperate"], draws, table["p_cooperate"], strict=True)
    ]
    result = table[keys].assign(
        rate=proportion(table["cooperate"], draws),
        draws=draws,
        low=low,
        high=high,
        exact=table["p_cooperate"],
        coverage=table["coverage"],
        p=p,
        holm=adjust(p, "holm"),
    )
    result["agrees"] = result["holm"].isna() | (result["holm"] >= 0.05)
    return result
