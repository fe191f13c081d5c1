"""Counts, improvement, distances, baselines and the scorecard."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, hypergeom, wasserstein_distance

from tomlib import alignment, contributions, published, stats
from tomlib.errors import TomError

CONTEXTS, GAMES = ("IR", "biz", "team"), ("dilemma", "hunt")


def table(split="in_sample", draws=1000, **models):
    """Counts with the given rates, context by context and game by game."""
    names = [(context, game) for context in CONTEXTS for game in GAMES]
    rows = [
        (split, context, game, model, "choice", round(rate * draws), draws - round(rate * draws))
        for model, rates in models.items()
        for (context, game), rate in zip(names, rates, strict=True)
    ]
    return pd.DataFrame(rows, columns=[*alignment.CELL, "cooperate", "defect"])


TEACHER = (0.2, 0.4, 0.3, 0.5, 0.7, 0.9)


# ---------------------------------------------------------------------------------------- counts


def draws(*choices, **fixed):
    keys = {"split": "in_sample", "context": "IR", "game": "g", "model": "m", "answer": "choice"}
    return pd.DataFrame(
        [keys | fixed | {"choice": choice, "outcome": outcome} for choice, outcome in choices]
    )


def test_every_draw_is_counted_once():
    table = draws(
        ("C", "ok"), ("C", "ok"), ("D", "ok"), (None, "unparsed"), (None, "refused"),
        (None, "truncated"), ("C", "truncated"), (None, "something new"),
    )  # fmt: skip
    counted = alignment.cooperation(table)
    assert counted.drop(columns=alignment.CELL).iloc[0].to_dict() == {
        "cooperate": 3, "defect": 1, "unparsed": 2, "refused": 1, "truncated": 1,
    }  # fmt: skip
    assert counted.drop(columns=alignment.CELL).to_numpy().sum() == len(table)


def test_a_cell_without_a_readable_answer_stays_in_the_table():
    both = pd.concat([draws((None, "unparsed"), game="h"), draws(("D", "ok"))])
    counted = alignment.cooperation(both)
    assert counted["game"].tolist() == ["h", "g"]
    rated = alignment.rates(counted)
    assert np.isnan(rated["rate"][0])
    assert rated["draws"].tolist() == [0, 1]


def test_no_draws_give_an_empty_table_with_its_columns():
    empty = alignment.cooperation(draws(("C", "ok")).iloc[:0])
    assert len(empty) == 0
    assert {"cooperate", "unparsed", "truncated"} <= set(empty.columns)


def test_a_contribution_is_no_choice():
    with pytest.raises(TomError, match="7 is neither C nor D"):
        alignment.cooperation(draws((7, "ok")))


def test_compare_puts_counts_and_exact_probabilities_side_by_side():
    counts = table(teacher=TEACHER, student=[0.8] * 6)
    exact = table(tuned=TEACHER).drop(columns=["cooperate", "defect"])
    both = pd.concat([counts, exact.assign(p_cooperate=0.25, coverage=0.9)])
    side = alignment.compare(both)
    assert list(side.columns) == [
        "split", "context", "game", "teacher", "student", "tuned",
        "n_teacher", "n_student", "n_tuned", "unread",
    ]  # fmt: skip
    assert side["teacher"].tolist() == list(TEACHER)
    assert side["tuned"].eq(0.25).all()
    assert side["n_tuned"].eq(np.inf).all()
    assert side["n_teacher"].eq(1000).all()


def test_compare_matches_scenarios_by_name_and_keeps_those_that_one_model_lacks():
    counts = table(teacher=TEACHER, student=[0.8] * 6, tuned=TEACHER[::-1])
    shuffled = counts.sample(frac=1, random_state=0).iloc[:-1]
    side = alignment.compare(shuffled).set_index(["context", "game"])
    assert len(side) == 6
    known = side.dropna()
    assert len(known) == 5
    whole = alignment.compare(counts).set_index(["context", "game"])
    pd.testing.assert_frame_equal(known, whole.loc[known.index], check_dtype=False)


def test_compare_refuses_what_is_ambiguous():
    counts = table(teacher=TEACHER, student=[0.8] * 6, tuned=TEACHER)
    with pytest.raises(TomError, match="no row of the model 'tune'; there are: student, teacher"):
        alignment.compare(counts, tuned="tune")
    twice = pd.concat([counts, counts.assign(answer="choice+motivation")])
    with pytest.raises(TomError, match="more than one row of in_sample/IR/dilemma"):
        alignment.compare(twice)


# ----------------------------------------------------------------------------------- improvement


def test_improvement_and_its_verdicts():
    side = alignment.compare(
        table(
            teacher=(0.2, 0.2, 0.2, 0.2, 0.5, 0.2),
            student=(0.8, 0.8, 0.8, 0.8, 0.5, 0.21),
            tuned=(0.5, 0.9, 0.1, 0.8, 0.3, 0.25),
        )
    )
    rows = alignment.improvement(side)
    assert rows["verdict"].tolist() == [
        "improves", "exacerbates", "overcorrects", "unchanged", "undefined", "exacerbates",
    ]  # fmt: skip
    np.testing.assert_allclose(rows["improvement"], [0.5, -1 / 6, 7 / 6, 0, np.nan, -4])
    # Overshooting by 0.1 leaves a distance of 0.1 out of 0.6.
    np.testing.assert_allclose(rows["distance_based"], [0.5, -1 / 6, 5 / 6, 0, np.nan, -4])
    assert rows["flagged"].tolist() == [False, False, False, False, True, True]
    assert rows["low"][0] < 0.5 < rows["high"][0]
    assert np.isinf(rows["low"][5])  # flagged: the ratio could be anything
    assert np.isnan(rows["low"][4])


def test_more_draws_take_the_flag_off():
    models = {"teacher": [0.2] * 6, "student": [0.25] * 6, "tuned": [0.22] * 6}
    few = alignment.improvement(alignment.compare(table(draws=100, **models)))
    many = alignment.improvement(alignment.compare(table(draws=10_000, **models)))
    assert few["flagged"].all()
    assert not many["flagged"].any()


def test_exact_probabilities_have_no_sampling_error():
    counts = table(teacher=TEACHER, student=[0.8] * 6, tuned=[0.6] * 6)
    exact = counts.assign(p_cooperate=counts["cooperate"] / 1000).drop(
        columns=["cooperate", "defect"]
    )
    rows = alignment.improvement(alignment.compare(exact))
    np.testing.assert_allclose(rows["low"], rows["improvement"])
    np.testing.assert_allclose(rows["high"], rows["improvement"])


def test_improvement_by_group_and_over_all():
    side = alignment.compare(table(teacher=TEACHER, student=[0.8] * 6, tuned=[0.6] * 6))
    ratios = alignment.improvement(side).set_index(["context", "game"])["improvement"]
    by_game = alignment.improvement_by(side, "game", resamples=200).set_index("game")
    assert by_game["scenarios"].tolist() == [3, 3]
    assert by_game.loc["hunt", "improvement"] == pytest.approx(ratios[:, "hunt"].mean())
    assert by_game.loc["hunt", "pooled"] == pytest.approx(-0.2 / (0.6 - 0.8))
    overall = alignment.improvement_by(side, "all", resamples=200).iloc[0]
    assert overall["improvement"] == pytest.approx(ratios.mean())
    assert overall["low"] < overall["improvement"] < overall["high"]
    closed = 1 - np.mean(np.abs(np.array(TEACHER) - 0.6)) / np.mean(np.abs(np.array(TEACHER) - 0.8))
    assert overall["pooled_distance"] == pytest.approx(closed)


def test_improvement_measures_leave_out_the_flagged_where_they_say_so():
    side = alignment.compare(published.roles().query("split == 'in_sample'"))
    measures = alignment.improvement_measures(side, resamples=200).set_index("measure")
    flagged = alignment.improvement(side)
    assert measures.loc["mean of ratios, unflagged", "scenarios"] == 16
    assert measures.loc["mean of ratios, unflagged", "estimate"] == pytest.approx(
        flagged.loc[~flagged["flagged"], "improvement"].mean()
    )
    assert measures.loc["pooled ratio", "estimate"] == pytest.approx(
        (side["tuned"] - side["student"]).mean() / (side["teacher"] - side["student"]).mean()
    )
    assert (measures["low"] <= measures["estimate"]).all()


def test_improvement_in_words_names_what_the_flagged_scenarios_do():
    side = alignment.compare(published.roles().query("split == 'in_sample'"))
    words = alignment.improvement_in_words(alignment.improvement_measures(side, resamples=200))
    assert words.startswith("Improvement 46.6% (mean of ratios; 95 % interval over scenarios: ")
    assert "34.2% over the 16 of 20 scenarios where teacher and student clearly differ" in words
    assert words.endswith("median 32.3%; 33.0% of the distance to the teacher closed.")
    two = alignment.improvement_measures(side.iloc[:2], resamples=20)
    assert "interval over scenarios: none)" in alignment.improvement_in_words(two)
    nothing = alignment.improvement_measures(side.assign(tuned=np.nan), resamples=20)
    assert alignment.improvement_in_words(nothing).startswith("No scenario has readable answers")


def test_exceptions_are_named():
    side = alignment.compare(published.roles().query("split == 'scaled_games'"))
    assert alignment.exceptions_in_words(alignment.improvement(side)) == (
        "Exacerbated: team/prisoners_dilemma (-7%). Overcorrected: environment/stag_hunt (161%); "
        "environment/prisoners_delight (241%, teacher and student hardly differ)."
    )


# ------------------------------------------------------------------------------------- distances


def test_distances_are_scipys():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.1, 0.1, 0.8])
    ours = alignment.distribution_distances(p, q)
    assert ours["total_variation"] == pytest.approx(0.5)
    assert ours["jensen_shannon"] == pytest.approx(jensenshannon(p, q, base=2) ** 2)
    assert ours["kullback_leibler"] == pytest.approx(entropy(p, q, base=2))


def test_distances_of_choices_and_their_smoothing():
    side = alignment.compare(table(teacher=TEACHER, student=[0.0] * 6, tuned=TEACHER, draws=10))
    rows = alignment.distances(side).set_index(["model", "context", "game"])
    assert rows.loc["tuned", ["total_variation", "jensen_shannon"]].eq(0).all(axis=None)
    student = rows.loc[("student", "IR", "dilemma")]
    assert student["total_variation"] == pytest.approx(0.2)
    smoothed = entropy([2.5 / 11, 8.5 / 11], [0.5 / 11, 10.5 / 11], base=2)
    assert student["kullback_leibler"] == pytest.approx(smoothed)


# ---------------------------------------------------------------------- baselines and scorecard


def test_leave_one_out_does_not_see_its_own_answer():
    side = alignment.compare(table(teacher=TEACHER, student=[0.8] * 6, tuned=[0.6] * 6))
    guesses = alignment.baselines(side)
    assert guesses["teacher's mean"][0] == pytest.approx(np.mean(TEACHER[1:]))
    assert guesses["teacher's mean by context"].tolist() == pytest.approx(
        [0.4, 0.2, 0.5, 0.3, 0.9, 0.7]
    )
    assert guesses["teacher's mean by game"][0] == pytest.approx((0.3 + 0.7) / 2)
    changed = side.assign(teacher=side["teacher"].where(side.index != 0, 0.99))
    names = guesses.columns[3:]
    again = alignment.baselines(changed).loc[0, names]
    assert again.tolist() == pytest.approx(guesses.loc[0, names].tolist())


def test_with_training_the_held_out_answers_are_not_seen_at_all():
    training = alignment.compare(table(teacher=TEACHER, student=[0.8] * 6, tuned=[0.6] * 6))
    held_out = alignment.compare(
        table(split="scaled_games", teacher=[0.1] * 6, student=[0.8] * 6, tuned=[0.6] * 6)
    ).replace({"context": {"team": "sports"}})
    guesses = alignment.baselines(held_out, training)
    assert guesses["teacher's mean"].tolist() == pytest.approx([0.5] * 6)
    assert guesses["teacher's mean by context"][:4].tolist() == pytest.approx([0.3, 0.3, 0.4, 0.4])
    assert guesses["teacher's mean by context"][4:].isna().all()  # sports was not trained on
    assert guesses["teacher in training"][:4].tolist() == list(TEACHER[:4])
    assert guesses["teacher's mean by game"].tolist() == pytest.approx([0.4, 0.6] * 3)


def test_within_context_correlation_ignores_the_contexts():
    contexts_only = (0.3, 0.3, 0.4, 0.4, 0.8, 0.8)
    games_reversed = (0.3, 0.1, 0.5, 0.3, 0.9, 0.7)
    side = alignment.compare(table(teacher=TEACHER, student=contexts_only, tuned=games_reversed))
    assert alignment.correlation(side["teacher"], side["student"]) > 0.9
    assert np.isnan(alignment.within_context_correlation(side, "teacher", "student"))
    assert alignment.correlation(side["teacher"], side["tuned"]) > 0.5
    assert alignment.within_context_correlation(side, "teacher", "tuned") == pytest.approx(-1)


def test_scorecard_tells_a_loser_in_words():
    side = alignment.compare(table(teacher=TEACHER, student=[0.9] * 6, tuned=[0.85] * 6))
    card = alignment.scorecard(side, resamples=300)
    rows = card.set_index("prediction")
    assert rows.loc["tuned", "gap"] == pytest.approx(np.mean(np.abs(np.array(TEACHER) - 0.85)))
    assert rows.loc["tuned", "spread"] == pytest.approx(0)
    assert rows.loc["teacher's mean", "against_tuned"] == pytest.approx(
        rows.loc["teacher's mean", "gap"] - rows.loc["tuned", "gap"]
    )
    assert np.isnan(rows.loc["teacher's mean", "correlation"])  # leave-one-out: -1 by construction
    words = alignment.in_words(card)
    assert "It cannot be told apart from a constant, the teacher's mean" in words
    steady = alignment.compare(
        table(teacher=[0.1, 0.12, 0.11, 0.13, 0.1, 0.12], student=[0.9] * 6, tuned=[0.85] * 6)
    )
    said = alignment.in_words(alignment.scorecard(steady, resamples=300))
    assert "It is farther away than a constant, the teacher's mean" in said
    assert "the teacher's choices, or its own, do not vary" in words


def test_scorecard_lets_a_winner_win():
    side = alignment.compare(table(teacher=TEACHER, student=[0.9] * 6, tuned=TEACHER))
    card = alignment.scorecard(side, resamples=300)
    assert "It is closer than a constant" in alignment.in_words(card)
    assert "farther" not in alignment.in_words(card)
    step = np.array([0.2, -0.2] * 3)
    near = np.clip(np.array(TEACHER) + step, 0, 1)
    unsure = alignment.compare(table(teacher=TEACHER, student=[0.9] * 6, tuned=near.tolist()))
    said = alignment.in_words(alignment.scorecard(unsure, resamples=300))
    assert "cannot be told apart from" in said
    again = card.set_index("prediction").loc["teacher drawn again"]
    rate = np.array(TEACHER)
    rng = np.random.default_rng(0)
    simulated = np.abs(
        rng.binomial(1000, rate, (4000, 6)) - rng.binomial(1000, rate, (4000, 6))
    ).mean()
    assert again["gap"] == pytest.approx(simulated / 1000, rel=0.03)


def test_scorecard_of_nothing_readable():
    side = alignment.compare(table(teacher=TEACHER, student=[0.9] * 6, tuned=TEACHER))
    side["tuned"] = np.nan
    words = alignment.in_words(alignment.scorecard(side, resamples=50))
    assert words.startswith("No scenario has readable answers")


def test_published_figures_of_the_tuned_7b():
    """Mean gap and correlation of the paper's own tuned student."""
    for split, gap, correlation in (("in_sample", 0.210, 0.34), ("new_contexts", 0.473, 0.76)):
        side = alignment.compare(published.roles().query(f"split == {split!r}"))
        row = alignment.scorecard(side, resamples=50).iloc[0]
        assert row["gap"] == pytest.approx(gap, abs=5e-4)
        assert row["correlation"] == pytest.approx(correlation, abs=6e-3)


def test_sensitivity_separates_context_from_game():
    context_only = (0.2, 0.2, 0.5, 0.5, 0.8, 0.8)
    game_only = (0.2, 0.6) * 3
    rows = alignment.sensitivity(table(a=context_only, b=game_only, c=[0.5] * 6)).set_index("model")
    assert rows.loc["a", ["context_share", "game_share", "both_share"]].tolist() == pytest.approx(
        [1, 0, 0]
    )
    assert rows.loc["b", ["context_share", "game_share", "both_share"]].tolist() == pytest.approx(
        [0, 1, 0]
    )
    assert np.isnan(rows.loc["c", "context_share"])
    exact = (
        table(a=context_only).drop(columns=["cooperate", "defect"]).assign(p_cooperate=context_only)
    )
    assert alignment.sensitivity(exact)["noise_share"].item() == 0
    assert 0 < rows.loc["a", "noise_share"] < 0.05


def test_sensitivity_has_the_interval_of_the_spread():
    counts = published.roles().query("split == 'in_sample' and model == 'teacher'")
    row = alignment.sensitivity(counts).iloc[0]
    n = counts["cooperate"] + counts["defect"]
    rate = counts["cooperate"] / n
    assert (row["spread_low"], row["spread_high"]) == stats.spread(rate, n)
    fit = sm.OLS.from_formula("rate ~ C(context) + C(game)", counts.assign(rate=rate)).fit()
    anova = sm.stats.anova_lm(fit)
    squares = anova["sum_sq"] / (rate * (1 - rate) / n).mean()
    bounds = stats.shares(squares.tolist(), anova["df"].astype(int).tolist())
    for columns, bound in zip(
        list(alignment.SENSITIVITY_INTERVALS.values())[1:], bounds, strict=True
    ):
        assert row[list(columns)].tolist() == pytest.approx(bound)
    exact = counts.assign(p_cooperate=rate).drop(columns="cooperate")
    assert alignment.sensitivity(exact)[["spread_low", "context_low"]].isna().all(axis=None)
    assert np.isnan(
        alignment.sensitivity(counts.iloc[1:])["context_low"].item()
    )  # a cell is missing


def test_scorecard_and_mean_distances_carry_their_intervals():
    side = alignment.compare(published.roles().query("split == 'new_contexts'"))
    row = alignment.scorecard(side, resamples=200).set_index("prediction").loc["tuned"]
    assert (row["correlation_low"], row["correlation_high"]) == pytest.approx(
        stats.fisher(row["correlation"], 12)
    )
    assert (row["within_low"], row["within_high"]) == pytest.approx(
        stats.fisher(row["within_context"], 12, means=3)
    )
    dummies = pd.get_dummies(side["context"]).astype(float)
    fit = sm.OLS(side["tuned"], dummies.assign(teacher=side["teacher"])).fit()
    assert (row["within_slope"], row["slope_low"], row["slope_high"]) == pytest.approx(
        (fit.params["teacher"], *fit.conf_int().loc["teacher"])
    )
    means = alignment.mean_distances(side, resamples=500).set_index("model")
    each = alignment.distances(side).query("model == 'tuned'")["total_variation"]
    assert means.loc["tuned", "total_variation"] == pytest.approx(each.mean())
    found = stats.bootstrap(np.mean, each, resamples=500)
    assert means.loc["tuned", "total_variation_low"] == pytest.approx(found.low)


# ---------------------------------------------------------------------------------- public goods


def test_contributions_are_counted_with_the_unread():
    given = pd.DataFrame(
        {
            "model": ["tuned"] * 5 + ["student"] * 2,
            "choice": [7, 5, 5, None, None, 0, 10],
            "outcome": ["ok"] * 3 + ["unparsed", "refused"] + ["ok"] * 2,
        }
    )
    counted = contributions.counts(given)
    assert counted["model"].tolist() == ["tuned"] * 3 + ["student"] * 2
    assert counted["contribution"].dropna().tolist() == [5, 7, 0, 10]
    assert counted["count"].tolist() == [2, 1, 2, 1, 1]
    summary = contributions.summary(counted).set_index("model")
    assert summary.loc["tuned", ["mean", "draws", "unread"]].tolist() == pytest.approx(
        [17 / 3, 3, 2]
    )
    assert summary.loc["tuned", "se"] == pytest.approx(np.std([5, 5, 7], ddof=1) / 3**0.5)


def test_exact_contributions():
    exact = pd.DataFrame(
        [("teacher", 5, 0.5), ("teacher", 7, 0.5), ("tuned", 7, 0.9)],
        columns=["model", "contribution", "p"],
    )
    summary = contributions.summary(exact).set_index("model")
    assert summary["mean"].tolist() == [6, 7]
    assert summary.loc["teacher", ["sd", "se", "draws"]].tolist() == [1, 0, np.inf]
    far = contributions.distances(exact).iloc[0]
    assert far[["total_variation", "wasserstein"]].tolist() == [0.5, 1]
    assert np.isnan(far["wasserstein_high"])


def test_contribution_distances_are_scipys():
    given = pd.DataFrame(
        [("teacher", 7, 300), ("tuned", 5, 162), ("tuned", 7, 138)],
        columns=["model", "contribution", "count"],
    )
    far = contributions.distances(given).iloc[0]
    assert far["wasserstein"] == pytest.approx(
        wasserstein_distance([7], [5, 7], v_weights=[162, 138])
    )
    assert far["total_variation"] == pytest.approx(162 / 300)
    teacher, tuned = np.full(11, 0.5), np.full(11, 0.5)
    teacher[7] += 300
    tuned[[5, 7]] += 162, 138
    assert far["kullback_leibler"] == pytest.approx(entropy(teacher, tuned, base=2))
    # Of 300 draws each, 162 fives are divided at random: a hypergeometric number of them.
    moved = hypergeom(600, 162, 300).ppf([0.0125, 0.9875])  # two-sided in the distance
    assert far["total_variation_high"] == pytest.approx(
        np.abs(2 * moved - 162).max() / 300, abs=0.01
    )
    assert far["wasserstein_high"] == pytest.approx(2 * far["total_variation_high"])


def test_models_that_give_alike_lie_in_the_range_of_chance():
    rng = np.random.default_rng(3)
    within = []
    for seed in range(60):
        draws = rng.multinomial(200, [0.1, 0.3, 0.4, 0.2], size=2)
        given = pd.DataFrame(
            [
                (model, dollars, count)
                for model, counts in zip(("teacher", "tuned"), draws, strict=True)
                for dollars, count in enumerate(counts)
            ],
            columns=["model", "contribution", "count"],
        )
        far = contributions.distances(given, resamples=400, seed=seed).iloc[0]
        within.append([far[name] <= far[high] for name, (_, high) in contributions.CHANCE.items()])
    assert (np.mean(within, axis=0) > 0.9).all() and np.mean(within) < 1


def test_contribution_improvement_has_the_interval_of_redrawn_answers():
    gone = contributions.improvement(published.public_goods_roles())
    rng = np.random.default_rng(0)
    student = 5 + 2 * rng.binomial(300, 74 / 300, 20_000) / 300
    tuned = 5 + 2 * rng.binomial(300, 138 / 300, 20_000) / 300
    low, high = np.quantile((tuned - student) / (7 - student), [0.025, 0.975])
    assert (gone.low, gone.high) == pytest.approx((low, high), abs=0.006)


def test_contributions_in_words_with_a_model_that_gave_no_readable_answer():
    given = published.public_goods_roles()
    assert contributions.in_words(given) == (
        "Teacher 7.00, student 5.49, tuned student 5.92 dollars; improvement 28.3% (95 % interval "
        "over draws: 19% to 37%). The distribution's distance from the teacher's went from 0.753 to "
        "0.540 (total variation)."
    )
    given["contribution"] = given["contribution"].where(given["model"] != "student").astype("Int64")
    assert "student nan" in contributions.in_words(given)
    assert contributions.summary(given).set_index("model").loc["student", "unread"] == 300
    assert np.isnan(contributions.compare_means(given)["t"][0])
