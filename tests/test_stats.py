"""Textbook tests against each other: statsmodels, scipy and formulas by hand."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from tomlib import stats
from tomlib.errors import TomError

test_proportions_2indep.__test__ = False  # a library function, not one of ours

PAIRS = [(225, 300, 213, 300), (1, 20, 12, 25), (0, 300, 77, 300), (10, 10, 9, 10), (3, 7, 3, 7)]


@pytest.mark.parametrize(("x", "n"), [(225, 300), (0, 300), (20, 20), (1, 3)])
def test_wilson_is_scipys(x, n):
    low, high = stats.wilson(x, n)
    theirs = scipy_stats.binomtest(x, n).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_of_no_draws_and_of_an_exact_probability():
    low, high = stats.wilson([0, 0.3], [0, np.inf])
    assert np.isnan([low[0], high[0]]).all()
    assert (low[1], high[1]) == (0.3, 0.3)


@pytest.mark.parametrize("pair", PAIRS)
def test_newcombe_is_statsmodels(pair):
    theirs = confint_proportions_2indep(*pair, method="newcomb", compare="diff")
    assert stats.newcombe(*pair) == pytest.approx(theirs, abs=1e-9)


def test_newcombes_own_example():
    """Newcombe (1998), table II: 56/70 against 48/80, method 10."""
    low, high = stats.newcombe(56, 70, 48, 80)
    assert (round(float(low), 4), round(float(high), 4)) == (0.0524, 0.3339)


@pytest.mark.parametrize("pair", PAIRS[:4])
def test_z_squared_is_the_chi_squared_of_scipy(pair):
    x1, n1, x2, n2 = pair
    z, p = stats.two_proportions(*pair)
    table = [[x1, n1 - x1], [x2, n2 - x2]]
    theirs = scipy_stats.chi2_contingency(table, correction=False)
    assert float(z) ** 2 == pytest.approx(theirs.statistic)
    assert float(p) == pytest.approx(theirs.pvalue)
    assert np.sign(z) == np.sign(x1 / n1 - x2 / n2)


def test_z_without_any_variation_or_draws():
    z, p = stats.two_proportions([0, 30, 0], [30, 30, 0], [0, 40, 4], [40, 40, 9])
    np.testing.assert_array_equal(z, [0, 0, np.nan])
    np.testing.assert_array_equal(p, [1, 1, np.nan])


@pytest.mark.parametrize("pair", PAIRS)
def test_equivalence_is_the_larger_of_two_one_sided_tests(pair):
    x1, n1, x2, n2 = pair
    p1, p2 = (x1 + 1) / (n1 + 2), (x2 + 1) / (n2 + 2)
    se = np.sqrt(p1 * (1 - p1) / (n1 + 2) + p2 * (1 - p2) / (n2 + 2))
    by_hand = max(
        scipy_stats.norm.sf((p1 - p2 + 0.1) / se), scipy_stats.norm.cdf((p1 - p2 - 0.1) / se)
    )
    assert float(stats.equivalence(*pair, margin=0.1)) == pytest.approx(by_hand, rel=1e-6)


def test_equivalence_needs_draws_not_absence_of_evidence():
    few, many = stats.equivalence([8, 800], [10, 1000], [8, 800], [10, 1000])
    assert few > 0.05 > many


def test_holm_and_benjamini_hochberg():
    p = [0.01, 0.04, 0.03, np.nan, 0.005]
    np.testing.assert_allclose(stats.adjust(p, "holm"), [0.03, 0.06, 0.06, np.nan, 0.02])
    known = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(
        stats.adjust(p, "bh")[[0, 1, 2, 4]], scipy_stats.false_discovery_control(known)
    )


def counts(*rows):
    return pd.DataFrame(rows, columns=["context", "game", "cooperate", "defect"])


def test_proportion_tests_pairs_by_name_and_says_what_was_shown():
    a, b, c, d = (("a", "g"), ("b", "g"), ("c", "g"), ("d", "g"))
    before = counts((*a, 700, 300), (*b, 500, 500), (*c, 5, 5), (*d, 5000, 5000))
    after = counts((*b, 100, 900), (*a, 702, 298), (*c, 6, 4), (*d, 5300, 4700))
    tests = stats.proportion_tests(before, after).set_index("context")
    verdicts = {"a": "same", "b": "changed", "c": "undecided", "d": "both"}
    assert tests["verdict"].to_dict() == verdicts
    raw = tests["equivalence_p"]
    assert tests["equivalence_holm"].to_numpy() == pytest.approx(stats.adjust(raw, "holm"))
    assert tests.loc["b", "difference"] == pytest.approx(-0.4)
    assert tests.loc["b", "high"] < tests.loc["b", "high90"] * 0.9 < 0  # 95 % is wider than 90 %
    assert (tests["low"] < tests["difference"]).all()


def test_table1_rule_by_hand():
    rule = stats.table1_rule([0.713333333], [0.633333333]).iloc[0]
    assert rule["se"] == pytest.approx(np.sqrt(0.713333333 * 0.286666667 / 300))
    assert rule["z"] == pytest.approx(0.08 / rule["se"])
    assert rule["p_value"] == pytest.approx(scipy_stats.norm.sf(rule["z"]))
    assert rule["stars"] == "***"  # p = 0.0011 is printed as 0.00
    assert stats.table1_rule([0.75], [0.7133]).iloc[0]["stars"] == ""


def summary(values):
    return np.mean(values), np.std(values, ddof=1), len(values)


def test_welch_is_scipys_and_statsmodels():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 1, 30), rng.normal(0.5, 3, 50)
    ours = stats.welch_from_summary(*summary(x), *summary(y))
    theirs = scipy_stats.ttest_ind(x, y, equal_var=False)
    assert ours == pytest.approx((theirs.statistic, theirs.df, theirs.pvalue))
    t, p, df = CompareMeans(DescrStatsW(x), DescrStatsW(y)).ttest_ind(usevar="unequal")
    assert ours == pytest.approx((t, df, p))


def test_welch_against_a_sample_without_spread():
    test = stats.welch_from_summary(*summary([5, 7, 7, 6]), *summary([7, 7, 7]))
    one_sample = scipy_stats.ttest_1samp([5, 7, 7, 6], 7)
    assert test == pytest.approx((one_sample.statistic, one_sample.df, one_sample.pvalue))


def test_bootstrap_is_seeded_paired_and_clustered():
    x = np.array([0.1, 0.4, 0.3, 0.9, 0.5, 0.2, 0.8, 0.6])

    def gap(a, b, axis):
        return np.mean(a - b, axis)

    same = [stats.bootstrap(gap, x, x + 0.1, resamples=500, seed=3) for _ in range(2)]
    assert same[0] == same[1]
    # Resampled together, a - b is always -0.1: no spread at all.
    assert (same[0].low, same[0].high) == pytest.approx((-0.1, -0.1))
    mean = stats.bootstrap(np.mean, x, resamples=4000, method="percentile")
    se = x.std(ddof=0) / len(x) ** 0.5
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * se, rel=0.1)
    assert mean != stats.bootstrap(np.mean, x, resamples=4000, seed=1, method="percentile")


def test_bootstrap_bca_is_scipys():
    x = np.array([0.1, 0.4, 0.3, 0.9, 0.5, 0.2, 3.0])
    ours = stats.bootstrap(np.mean, x, resamples=999, seed=0)
    theirs = scipy_stats.bootstrap(
        (np.sort(x),), np.mean, n_resamples=999, rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours.method == "BCa"
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_a_bootstrap_does_not_go_by_the_order_of_scenarios():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20)).round(1)  # with ties
    mixed = rng.permutation(20)
    ratio = lambda a, b, axis: a.mean(axis) / b.mean(axis)  # noqa: E731
    kept = stats.bootstrap(ratio, x, y, resamples=999)
    assert kept == stats.bootstrap(ratio, x[mixed], y[mixed], resamples=999)


def test_bootstrap_of_two_scenarios_gives_no_interval():
    assert np.isnan(stats.bootstrap(np.mean, [0.1, 0.2]).low)
    assert stats.bootstrap(np.mean, [0.1, 0.2]).estimate == pytest.approx(0.15)


def test_fishers_interval_is_scipys_and_covers_a_partial_correlation():
    rng = np.random.default_rng(1)
    x = rng.normal(size=30)
    y = 0.5 * x + rng.normal(size=30)
    found = scipy_stats.pearsonr(x, y)
    wanted = found.confidence_interval()
    assert stats.fisher(found.statistic, 30) == pytest.approx((wanted.low, wanted.high))
    hits, groups = 0, np.repeat(np.arange(5), 4)
    for _ in range(400):  # independent within groups: 0 is to be covered in 95 of 100
        a, b = rng.normal(size=(2, 20)) + 3 * rng.normal(size=(2, 5)).repeat(4, axis=1)
        a, b = (v - (np.bincount(groups, v) / 4)[groups] for v in (a, b))
        low, high = stats.fisher(np.corrcoef(a, b)[0, 1], 20, means=5)
        hits += low <= 0 <= high
    assert 0.92 <= hits / 400 <= 0.98
    assert np.isnan(stats.fisher(0.5, 5, means=3)).all() and np.isnan(stats.fisher(np.nan, 9)).all()
    assert stats.fisher(1.0, 9) == (1.0, 1.0)


def test_slope_is_that_of_a_regression_on_group_dummies():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(3), 4)
    x = rng.normal(size=12) + groups
    y = 0.3 * x - groups + 0.2 * rng.normal(size=12)
    dummies = (groups[:, None] == np.arange(3)).astype(float)
    fit = sm.OLS(y, np.column_stack([x, dummies])).fit()
    centred = [v - (np.bincount(groups, v) / 4)[groups] for v in (x, y)]
    assert stats.slope(*centred, means=3) == pytest.approx((fit.params[0], *fit.conf_int()[0]))
    assert np.isnan(stats.slope([0, 0, 0], [1, 2, -3])).all()
    assert np.isnan(stats.slope([-1, 1], [-1, 1])[1:]).all()


@pytest.mark.parametrize("width", [0.0, 0.03, 0.15])
def test_the_interval_of_a_spread_covers_the_true_one_where_the_drawn_one_is_inflated(width):
    chance = np.random.default_rng(7)
    true = 0.6 + width * np.linspace(-1, 1, 12)
    drawn = chance.binomial(100, true, (400, 12)) / 100
    bounds = np.array([stats.spread(row, [100] * 12) for row in drawn])
    hits = ((bounds[:, 0] <= true.std()) & (true.std() <= bounds[:, 1])).mean()
    assert 0.93 <= hits <= (0.99 if width == 0 else 0.98)
    if width < 0.1:  # a percentile bootstrap would be centred on something like this
        assert (drawn.std(axis=1) > true.std()).mean() > 0.9
    assert np.isnan(stats.spread([0.5, 0.6], [np.inf, np.inf])).all()
    assert np.isnan(stats.spread([0.0, 0.0], [10, 10])).all()
    assert np.isnan(stats.spread([0.5], [10])).all()


def test_fieller_covers_and_knows_when_it_cannot():
    low, high = stats.fieller([1, 1], [2, 0.1], [0.01, 0.01], [0.01, 0.01], [0, 0])
    assert low[0] < 0.5 < high[0]
    assert (low[1], high[1]) == (-np.inf, np.inf)
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 0.3, 4000), rng.normal(4, 0.4, 4000)
    low, high = stats.fieller(a, b, 0.09, 0.16, 0)
    assert np.mean((low < 0.25) & (high > 0.25)) == pytest.approx(0.95, abs=0.012)


KEYS = {"split": "in_sample", "context": "a", "game": "g", "model": "m", "answer": "choice"}


def test_exact_agreement_finds_the_readout_that_is_wrong():
    sampled = pd.DataFrame(
        [KEYS | {"game": game, "cooperate": 150, "defect": 150} for game in "ghi"]
    )
    exact = pd.DataFrame(
        [
            KEYS | {"game": game, "p_cooperate": p, "coverage": 0.99}
            for game, p in zip("gh", (0.52, 0.9), strict=True)
        ]
    )
    table = stats.exact_agreement(sampled, exact)
    assert table["agrees"].tolist() == [True, False]  # i has no readout and is left out
    assert table["p"][0] == pytest.approx(scipy_stats.binomtest(150, 300, 0.52).pvalue)
    assert table["draws"].tolist() == [300, 300]


def test_additive_targets_keep_the_margins_and_have_no_interaction():
    """Maximum likelihood of a logistic model: fitted and observed sums are equal in every group."""
    rng = np.random.default_rng(1)
    cells = [(c, g) for c in "abc" for g in "wxyz"]
    counts = pd.DataFrame(cells, columns=["context", "game"])
    counts["cooperate"] = rng.integers(20, 280, len(cells))
    counts["defect"] = 300 - counts["cooperate"]
    fitted = stats.additive(counts)
    for by in ("context", "game"):
        sums = [t.groupby(by)["cooperate"].sum() for t in (counts, fitted)]
        assert np.allclose(sums[0], sums[1], atol=0.5)
    logit = np.log(fitted["cooperate"] / fitted["defect"])
    grid = logit.groupby([fitted["context"], fitted["game"]]).first().unstack()
    steps = grid.sub(grid["w"], axis=0)
    assert np.allclose(steps, steps.iloc[0].to_numpy()[None], atol=0.01)
    assert (fitted["cooperate"] + fitted["defect"]).eq(300).all()
    with pytest.raises(TomError, match="two contexts"):
        stats.additive(counts[counts["context"] == "a"])


@pytest.mark.parametrize(
    ("between", "least"),
    [
        ((0.2, 0.02, 0), 0.92),
        ((0.03, 0.03, 0.02), 0.92),
        ((0.05, 0, 0.03), 0.92),
        ((0.05, 0, 0), 0.85),
    ],
)
def test_the_intervals_of_shares_of_variance_cover_the_true_ones(between, least):
    chance = np.random.default_rng(5)
    contexts, games = np.linspace(-1, 1, 5)[:, None], np.array([[1, -1, 0.5, -0.5]])
    true = 0.5 + between[0] * contexts + between[1] * games + between[2] * contexts * games

    def squares(p):
        left = p - p.mean(-1, keepdims=True) - p.mean(-2, keepdims=True)
        left += p.mean((-2, -1), keepdims=True)
        return [
            4 * 5 * p.mean(-1).var(-1),
            5 * 4 * p.mean(-2).var(-1),
            (left**2).sum((-2, -1)),
        ]

    parts = np.array(squares(true))
    drawn = chance.binomial(300, true, (300, 5, 4)) / 300
    noise = (drawn * (1 - drawn) / 300).mean((1, 2))
    hits = []
    for seed, sums in enumerate((np.array(squares(drawn)) / noise).T):
        bounds = np.array(stats.shares(sums, [4, 3, 12], resamples=1000, seed=seed))
        shares = parts / parts.sum()
        hits.append((bounds[:, 0] <= shares + 1e-9) & (shares <= bounds[:, 1]))
    assert (np.mean(hits, axis=0) >= least).all(), np.mean(hits, axis=0)
    assert np.mean(hits) <= 0.985
    assert np.isnan(stats.shares([1.0, float("nan"), 1.0], [4, 3, 12])).all()
    assert stats.shares([30.0, 0.0, 0.0], [4, 0, 0])[0] == (1.0, 1.0)
