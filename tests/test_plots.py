"""What the figures show: heights, intervals and labels are the numbers of their tables."""

from xml.etree import ElementTree

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer, ErrorbarContainer

from tomlib import alignment, contributions, plots, published, stats

COUNTS = published.roles().query("split == 'in_sample'")
COMPARISON = alignment.compare(COUNTS)


@pytest.fixture(autouse=True)
def clean():
    plots.style()
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()  # a figure that cannot be drawn fails here
    plt.close("all")
    plt.rcdefaults()


def bars(ax):
    return [c for c in ax.containers if isinstance(c, BarContainer)]


def heights(ax):
    return [patch.get_height() for container in bars(ax) for patch in container]


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_propensity_shows_every_rate_with_its_interval():
    grid = plots.propensity(COUNTS)
    assert grid.shape == (2, 2)
    for row, model in zip(grid, ("student", "teacher"), strict=True):
        rates = sorted(alignment.rates(COUNTS[COUNTS["model"] == model])["rate"])
        for ax in row:
            assert sorted(heights(ax)) == pytest.approx(rates)
            assert all(container.errorbar is not None for container in bars(ax))
    by_context, by_game = grid[1]
    assert (len(by_context.get_xticks()), len(by_game.get_xticks())) == (5, 4)
    low, high = stats.wilson(246, 300)  # friendsharing / prisoner's dilemma of the teacher
    segments = [s for c in bars(by_context) for s in c.errorbar[2][0].get_segments()]
    assert any(s[:, 1] == pytest.approx([float(low), float(high)]) for s in segments)


def test_propensity_marks_the_published_figures():
    grid = plots.propensity(COUNTS, models=("teacher",), published=COUNTS)
    assert "published" in labels(grid[0, 0])
    marked = np.concatenate(
        [line.get_ydata() for line in grid[0, 0].lines if line.get_marker() == "D"]
    )
    assert sorted(marked) == pytest.approx(sorted(heights(grid[0, 0])))


def test_the_same_model_has_the_same_colour_everywhere():
    grid = plots.propensity(COUNTS)
    teacher = bars(grid[1, 0])[0].patches[0].get_facecolor()
    left, _ = plots.public_goods(published.public_goods_roles())
    assert matplotlib.colors.to_hex(teacher) == plots.TEACHER.lower()
    assert matplotlib.colors.to_hex(left.patches[0].get_facecolor()) == plots.TEACHER.lower()


def test_improvement_bars_are_the_means_by_group():
    by_game, by_context = plots.improvement_bars(COMPARISON, resamples=100)
    expected = alignment.improvement_by(COMPARISON, "game", resamples=100)
    assert heights(by_game) == pytest.approx(list(100 * expected["improvement"]))
    expected = alignment.improvement_by(COMPARISON, "context", resamples=100)
    assert heights(by_context) == pytest.approx(list(100 * expected["improvement"]))
    assert "mean: 46.6 %" in labels(by_game)
    assert 46.65 in [round(float(y), 2) for line in by_game.lines for y in line.get_ydata()]


def test_improvement_beside_the_published_one():
    other = COMPARISON.assign(tuned=COMPARISON["teacher"])  # complete alignment
    by_game, _ = plots.improvement_bars(other, COMPARISON, label="smoke", resamples=100)
    assert len(heights(by_game)) == 8
    assert heights(by_game)[:4] == pytest.approx([100] * 4)
    assert {"smoke", "published", "mean, smoke: 100.0 %"} <= set(labels(by_game))


def test_improvement_outside_the_limits_is_drawn_at_the_edge():
    wild = COMPARISON.assign(tuned=np.where(COMPARISON.index == 17, 0.0, COMPARISON["tuned"]))
    assert 100 * alignment.improvement(wild)["improvement"].max() > 3000
    by_game, _ = plots.improvement_bars(wild, resamples=50)
    assert by_game.get_ylim()[1] <= plots.IMPROVEMENT_LIMITS[1]
    triangles = [
        line for line in by_game.lines if line.get_marker() == "^" and len(line.get_xdata())
    ]
    assert len(triangles) == 1


def test_bars_and_means_beyond_the_axis_are_marked_with_their_values():
    low, high = plots.IMPROVEMENT_LIMITS
    end, rows = COMPARISON["teacher"], COMPARISON["game"].eq("stag_hunt")
    for times, arrow, edge in ((9, "↑", high), (-9, "↓", low)):
        there = COMPARISON["student"] + times * (end - COMPARISON["student"])
        wild = COMPARISON.assign(tuned=there.where(rows, end))
        by_game, _ = plots.improvement_bars(wild, COMPARISON, "smoke", resamples=50)
        (text,) = by_game.texts  # one bar is cut: that of the stag hunt
        assert text.get_text() == f"{arrow}\u2009{100 * times} %".replace("-", "−")
        assert text.get_position()[1] == edge
    far = COMPARISON.assign(tuned=COMPARISON["student"] - 9 * (end - COMPARISON["student"]))
    by_game, _ = plots.improvement_bars(far, resamples=50)
    said = "mean: -900.0 %, off the axis"
    assert said in labels(by_game)
    (head,) = [line for line in by_game.lines if line.get_label() == said]
    assert (head.get_marker(), list(head.get_ydata()), head.get_clip_on()) == ("v", [low], False)


def test_public_goods_means_and_distributions():
    given = published.public_goods_roles()
    left, right = plots.public_goods(given)
    assert heights(left) == pytest.approx([7, 1648 / 300, 5.92])
    assert sum(heights(right)) == pytest.approx(3)  # three distributions
    summary = contributions.summary(given)
    segments = [s for c in bars(left) for s in c.errorbar[2][0].get_segments()]
    lengths = [(s[1, 1] - s[0, 1]) / 2 for s in segments]
    assert lengths == pytest.approx(list(summary["se"]))
    exact = given.assign(p=given["count"] / 300).drop(columns="count")
    left, right = plots.public_goods(exact, published=given)
    assert heights(left)[:3] == pytest.approx(heights(left)[3:])
    assert "tuned (published)" in labels(right)


def test_the_published_teacher_is_hatched_among_this_runs_models():
    given = published.public_goods_roles().replace({"model": {"teacher": "published-teacher"}})
    left, _ = plots.public_goods(given)
    hatches = [patch.get_hatch() for container in bars(left) for patch in container]
    assert hatches == ["//", None, None]
    face = bars(left)[0].patches[0].get_edgecolor()
    assert matplotlib.colors.to_hex(face) == plots.TEACHER.lower()


def test_forest_plot_has_every_row_and_the_margin():
    tests = stats.proportion_tests(
        COUNTS.query("model == 'teacher'"),
        published.roles().query("model == 'teacher' and split == 'scaled_games'"),
    )
    ax = plots.scaled_differences(tests, margin=0.05, model="teacher")
    points = {line.get_label(): line.get_xdata() for line in ax.lines}
    assert (len(points["changed (Holm)"]), len(points["no change shown"])) == (15, 5)
    assert "±0.05" in labels(ax)
    assert ax.get_yticklabels()[0].get_text() == "IR / prisoner's dilemma"
    first = ax.collections[0].get_segments()[0]
    assert first[:, 0] == pytest.approx(tests.loc[0, ["low", "high"]].tolist())


def test_exact_against_sampled_crosses_out_what_does_not_agree():
    exact = COUNTS.assign(p_cooperate=COUNTS["cooperate"] / 300, coverage=1.0)
    agreement = stats.exact_agreement(COUNTS, exact)
    assert "do not agree (Holm)" not in labels(plots.exact_vs_sampled(agreement))
    exact.iloc[0, exact.columns.get_loc("p_cooperate")] = 0.9
    ax = plots.exact_vs_sampled(stats.exact_agreement(COUNTS, exact))
    crossed = next(line for line in ax.lines if line.get_marker() == "x")
    assert crossed.get_xdata() == pytest.approx([0.9])
    assert sum(isinstance(c, ErrorbarContainer) for c in ax.containers) == 5  # one a model


def test_training_curves():
    log = pd.DataFrame(
        {
            "step": [1, 2, 3, 4],
            "epoch": [0.5, 1.0, 1.5, 2.0],
            "loss": [2.0, 1.5, 1.2, 1.0],
            "heldout_loss": [np.nan, 1.8, np.nan, 1.6],
        }
    )
    ax = plots.loss_curve(log)
    assert ax.lines[0].get_ydata().tolist() == [2.0, 1.5, 1.2, 1.0]
    assert ax.lines[1].get_xdata().tolist() == [2, 4]
    curve = pd.DataFrame({"rows": [300, 100], "gap": [0.2, 0.3], "low": 0.1, "high": 0.4})
    ax = plots.learning_curve(curve)
    assert ax.lines[0].get_xdata().tolist() == [100, 300]
    ax = plots.learning_curve(curve.drop(columns=["low", "high"]).assign(split=["a", "b"]))
    assert labels(ax) == ["a", "b"]


def test_teacher_vs_tuned_and_scores():
    ax = plots.teacher_vs_tuned(COMPARISON, published=COMPARISON)
    assert {"student", "tuned", "tuned (published)", "team"} <= set(labels(ax))
    card = alignment.scorecard(COMPARISON, resamples=50)
    ax = plots.scores(card)
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == pytest.approx(list(card["gap"]))


def test_figures_survive_what_small_runs_give():
    """One scenario, a model without a readable answer, no training log yet."""
    one = COUNTS.query("context == 'IR' and game == 'stag_hunt'").copy()
    one.loc[one["model"] == "tuned", ["cooperate", "defect"]] = 0
    side = alignment.compare(one)
    plots.propensity(one, published=COUNTS)
    plots.improvement_bars(side, COMPARISON, resamples=20)
    plots.teacher_vs_tuned(side, COMPARISON)
    plots.scores(alignment.scorecard(side, resamples=20))
    plots.scaled_differences(stats.proportion_tests(one.iloc[:1], one.iloc[:1]))
    plots.loss_curve(pd.DataFrame(columns=["step", "epoch", "loss", "heldout_loss"], dtype=float))
    nobody = published.public_goods_roles().assign(
        contribution=pd.array([pd.NA] * 5, dtype="Int64")
    )
    plots.public_goods(nobody)


def test_a_figure_is_shown_with_its_finding_as_its_text(monkeypatch):
    shown = {}
    monkeypatch.setattr("IPython.display.publish_display_data", shown.update)
    plots.show(plots.propensity(COUNTS)[0, 0].figure, "**The `teacher`**\n reads the context.")
    assert shown["text/plain"] == "The teacher reads the context."
    assert shown["image/png"].startswith("iVBOR")
    assert not plt.get_fignums()


def test_what_tuning_moved_is_drawn_where_the_scorecards_say():
    card = alignment.scorecard(COMPARISON, resamples=50).assign(
        split="in_sample", comparison="paper"
    )
    (ax,) = plots.moved(card)
    drawn = {c.get_label(): c for c in ax.containers if isinstance(c, ErrorbarContainer)}
    gaps = card.set_index("prediction")["gap"]
    for name, label in (("tuned", "after tuning"), ("student", "before tuning")):
        assert drawn[label][0].get_xdata() == pytest.approx([gaps[name]])
        assert drawn[label].has_xerr


# ------------------------------------------------------------------------------------------ tables


@pytest.fixture
def shown(monkeypatch):
    """What was shown, as HTML and as text."""
    import IPython.display

    seen = []
    monkeypatch.setattr(IPython.display, "publish_display_data", seen.append)
    return seen


def test_a_table_is_shown_in_words_with_its_caption(shown):
    frame = pd.DataFrame(
        {
            "game": ["prisoners_dilemma", "stag_hunt"],
            "gap": [0.1234, np.nan],
            "low": [0.1, np.nan],
            "high": [0.2, np.nan],
            "p_value": [1e-7, 0.5],
            "draws": [100.0, np.nan],
            "flagged": [True, False],
        }
    )
    plots.table(
        pd.concat({"a": frame}, names=["comparison", None]),
        "Gaps < 1.",
        "tab-x",
        intervals={"gap": ("low", "high")},
        unread=1234,
    )
    html, text = shown[0]["text/html"], shown[0]["text/plain"]
    head, *body = [
        [" ".join((cell.text or "").split()) for cell in row]
        for row in ElementTree.fromstring(html).iter("tr")
    ]
    assert head == ["comparison", "game", "gap", "p value", "draws", "flagged"]
    assert body == [
        ["a", "prisoner's dilemma", "0.123 (0.100 to 0.200)", "1e-07", "100", "yes"],
        ["stag hunt", "-", "0.500", "-", "no"],
    ]
    assert '<table class="dataframe" id="tab-x">\n  <caption>Gaps &lt; 1.' in html
    assert "no part of it: 1,234." in html and "no part of it: 1,234." in text
    assert "prisoner's dilemma" in text and "1e-07" in text


def test_rounding_noise_is_shown_as_nothing_and_small_p_values_are_shown(shown):
    noise = [-5e-15, 1e-16, -1e-4, -0.0, 0.5]
    frame = pd.DataFrame({"gap": noise, "equivalence_holm": [2e-25, 0.5, 1e-4, 0.0, 1.0]})
    settings = pd.Series([3, 2e-6, "cosine"], name="family").to_frame()
    plots.table(frame, "Gaps.")
    plots.table(settings, "Settings.", digits=4)
    rows = [
        [[cell.text for cell in row] for row in ElementTree.fromstring(one["text/html"]).iter("tr")]
        for one in shown
    ]
    gaps, p = zip(*rows[0][1:], strict=True)
    assert gaps == ("0.000", "0.000", "0.000", "0.000", "0.500")
    assert p == ("2e-25", "0.500", "1e-04", "0.000", "1.000")
    assert [cell for (cell,) in rows[1][1:]] == ["3", "2e-06", "cosine"]


def test_a_table_without_unread_answers_says_so(shown):
    plots.table(pd.DataFrame({"x": [1]}), "One.", unread=0)
    assert shown[0]["text/plain"].startswith("One. All answers had a readable choice.")


def test_nothing_in_a_table_acts_unseen(shown):
    said = "<script>x</script>\x1b[31m\u202egod\u2066\u2028\u200b\U000e0041"
    said += " caf\u00e9 \u05e9\u05dc\u05d5\u05dd"
    plots.table(pd.DataFrame({"said": [said], "model": [1.0]}, index=[0]), "Said.")
    for kind in ("text/html", "text/plain"):
        out = shown[0][kind]
        assert not set(out) & set("\x1b\u202e\u2066\u2028\u200b\U000e0041"), kind
        assert (
            "\\x1b[31m\\u202egod\\u2066\\u2028\\u200b\\U000e0041 caf\u00e9 \u05e9\u05dc\u05d5\u05dd"
            in out
        )
    assert "<script>" not in shown[0]["text/html"]


def test_a_long_cell_is_whole_and_an_endless_one_is_cut(shown):
    plots.table(pd.DataFrame({"said": ["x" * 999, "y" * 10**6]}), "Long.")
    assert "x" * 999 in shown[0]["text/html"]
    assert "y" * 1000 + "… (1,000,000 characters)" in shown[0]["text/html"]
    assert len(shown[0]["text/html"]) < 4000
