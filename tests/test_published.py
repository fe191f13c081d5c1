"""The printed digits of the paper, from `data/published/`, and the comparison with the authors'."""

import numpy as np
import pandas as pd
import pytest

from tomlib import alignment, contributions, published, stats
from tomlib.errors import TomError

SPLITS = ("in_sample", "new_contexts", "scaled_games")


def comparison(split, as_if_300=False):
    counts = published.roles().query("split == @split")
    if as_if_300:
        counts = counts.assign(defect=published.DRAWS - counts["cooperate"])
    return alignment.compare(counts)


@pytest.mark.parametrize(
    ("split", "by_counts", "by_rates"),
    [("in_sample", 46.26, 46.65), ("new_contexts", 17.90, 18.26), ("scaled_games", 39.95, 39.95)],
)
def test_headline_improvements_to_the_printed_digit(split, by_counts, by_rates):
    """46 % and 18 % of the abstract are means of the scenarios' ratios of COUNTS."""
    for as_if_300, digits in ((True, by_counts), (False, by_rates)):
        ratios = alignment.improvement(comparison(split, as_if_300))["improvement"]
        assert round(100 * ratios.mean(), 2) == digits


def test_other_averages_do_not_give_the_headlines():
    pooled = alignment.improvement_by(comparison("in_sample", True), "all", resamples=20)
    assert round(100 * pooled["pooled"].item(), 1) == 35.0  # not 46
    by_game = alignment.improvement_by(comparison("in_sample", True), "game", resamples=20)
    assert round(100 * by_game["improvement"].mean(), 2) == 46.26  # equal groups: the same mean
    assert round(100 * by_game["pooled"].mean(), 1) == 35.0


def test_the_28_percent_are_the_public_goods_game():
    assert (
        round(100 * contributions.improvement(published.public_goods_roles()).estimate, 1) == 28.3
    )
    doubled = alignment.improvement(comparison("scaled_games"))
    by_context = (100 * doubled.groupby("context")["improvement"].mean()).round(1)
    assert round(by_context.mean(), 2) == 39.96  # rounded twice; 39.95 when rounded once


@pytest.mark.parametrize(
    ("split", "exacerbated", "overcorrected"),
    [
        (
            "in_sample",
            {"team/prisoners_dilemma": -25.0, "friendsharing/prisoners_dilemma": -5.0},
            {"friendsharing/snowdrift": 123.1, "team/prisoners_delight": 200.0},
        ),
        ("new_contexts", {}, {}),
        (
            "scaled_games",
            {"team/prisoners_dilemma": -7.4},
            {"environment/stag_hunt": 160.9, "environment/prisoners_delight": 241.2},
        ),
    ],
)
def test_every_exacerbation_and_overcorrection(split, exacerbated, overcorrected):
    rows = alignment.improvement(comparison(split, as_if_300=True))
    rows["name"] = rows["context"] + "/" + rows["game"]
    for verdict, expected in {"exacerbates": exacerbated, "overcorrects": overcorrected}.items():
        found = rows[rows["verdict"] == verdict].set_index("name")["improvement"]
        assert (100 * found).round(1).to_dict() == expected


def test_public_goods_means_errors_and_t_tests():
    given = contributions.summary(published.public_goods_roles()).set_index("model")
    assert given["mean"].round(2).to_dict() == {"teacher": 7.00, "student": 5.49, "tuned": 5.92}
    assert given["se"].round(3).to_dict() == {"teacher": 0.0, "student": 0.050, "tuned": 0.058}
    printed = published.PUBLIC_GOODS_SUMMARIES
    t = {
        pair: stats.welch_from_summary(
            *printed[pair[0]], published.DRAWS, *printed[pair[1]], published.DRAWS
        ).t
        for pair in (("student", "tuned"), ("tuned", "teacher"))
    }
    assert [round(value, 2) for value in t.values()] == [-5.68, -18.90]
    counted = contributions.compare_means(published.public_goods_roles())
    assert counted["t"].round(2).tolist() == [-5.60, -18.73]


def test_the_summaries_of_the_t_tests_are_the_counts_cut_off():
    """The second deviation was cut off, not rounded: 0.997 became 0.99."""
    given = contributions.summary(published.public_goods_roles()).set_index("model")
    for role, (mean, sd) in published.PUBLIC_GOODS_SUMMARIES.items():
        population = given.loc[role, "sd"] * (299 / 300) ** 0.5
        assert round(given.loc[role, "mean"], 2) == mean
        assert np.floor(100 * population) / 100 == sd


def test_table1_is_regenerated_to_every_printed_digit_and_star():
    printed, regenerated = published.table1(), published.table1_regenerated().round(2)
    pd.testing.assert_frame_equal(printed, regenerated, check_dtype=False)
    assert (printed["stars"] != "").sum() == 8


def test_other_rules_do_not_give_table1():
    """Neither the error of a difference nor a two-sided p fits what is printed."""
    printed = published.table1().query("context != ''")
    p1, p2 = (published.table1_regenerated()[c] for c in printed.columns[3:5])
    p1, p2 = p1[:20], p2[:20]
    of_difference = np.sqrt((p1 * (1 - p1) + p2 * (1 - p2)) / 300)
    assert ((p1 - p2) / of_difference).round(2).ne(printed["z"]).sum() >= 19
    two_sided = 2 * published.table1_regenerated()["p_value"][:20]
    assert two_sided.round(2).ne(printed["p_value"]).sum() >= 19


def test_one_starred_row_survives_a_right_test_and_none_survives_multiplicity():
    counts = published.roles()
    tests = {
        role: stats.proportion_tests(
            counts.query("model == @role and split == 'in_sample'"),
            counts.query("model == @role and split == 'scaled_games'"),
        )
        for role in ("teacher", "student", "tuned")
    }
    stars = published.table1().query("stars != ''")[["context", "game"]]
    starred = stars.merge(tests["tuned"], on=["context", "game"])
    assert (starred["p"] < 0.05).sum() == 1
    assert starred.loc[starred["p"] < 0.05, ["context", "game"]].values.tolist() == [
        ["biz", "stag_hunt"]
    ]
    assert not (starred["holm"] < 0.05).any()
    assert not (starred["bh"] < 0.05).any()
    # The teacher is not invariant, and the student was so before it was tuned.
    assert (tests["teacher"]["holm"] < 0.05).sum() == 15
    alone = {role: (table["equivalence_p"] < 0.05).sum() for role, table in tests.items()}
    assert alone == {"teacher": 2, "student": 17, "tuned": 13}
    after_holm = {role: (table["verdict"] == "same").sum() for role, table in tests.items()}
    assert after_holm == {"teacher": 0, "student": 12, "tuned": 0}


def test_verify_is_silent_on_the_shipped_tables():
    assert published.verify().empty


def test_verify_finds_a_changed_number(tmp_path):
    changes = {
        "cooperation_counts.csv": ("7b-ft,choice only,221,79,", "7b-ft,choice only,222,79,"),
        "public_goods.csv": ("5,162", "5,161"),
    }  # fmt: skip
    for path in (published.root() / "data" / "published").glob("*.csv"):
        text = path.read_text()
        old, new = changes.get(path.name, ("", ""))
        assert old in text
        (tmp_path / path.name).write_text(text.replace(old, new, 1))
    problems = published.verify(folder=tmp_path)
    assert {"draws", "z by the counts"} <= set(problems["problem"])
    assert "tuned" in set(problems["scenario"])


def test_missing_and_unreadable_tables_are_told(tmp_path):
    with pytest.raises(TomError, match=r"cooperation_counts\.csv: no such file"):
        published.cooperation_counts(tmp_path)
    (tmp_path / "cooperation_counts.csv").write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(TomError, match="not a readable table"):
        published.cooperation_counts(tmp_path)


# ------------------------------------------------------------------- the authors' repository


@pytest.fixture
def checkout(tmp_path):
    """A folder laid out like the authors' repository, with the published counts in their form."""
    short = {game: name for name, game in published.GAMES.items()}
    for file, table in published.cooperation_counts().groupby("source_file"):
        lines = [
            f"{row.context}_{short[row.game]}{'_d' if row.split == 'scaled_games' else ''}: "
            f"{{'  C': {row.cooperate}, '  D': {row.defect}}}\n"
            for row in table.itertuples()
        ]
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines))
    return tmp_path


def test_an_untouched_checkout_agrees(checkout):
    assert published.compare_with_authors(checkout).empty
    assert published.verify(checkout).empty


def test_differences_are_listed(checkout):
    table = checkout / "ood_game" / "70b_distribution.txt"
    # An earlier state of that file had 256 where 156 are right.
    table.write_text(table.read_text().replace("'  D': 156", "'  D': 256"))
    (checkout / "oos_context" / "7b-fined_distribution.txt").unlink()
    short = checkout / "results" / "7b_distribution.txt"
    short.write_text("".join(short.read_text().splitlines(keepends=True)[1:]) + "IR_new: {'C': 1}")
    found = published.compare_with_authors(checkout)
    assert found.set_index("source_file").to_records().tolist() == [
        (f"{folder}_distribution.txt", *rest)
        for folder, *rest in (
            ("results/7b", "IR_prison", "254 C, 46 D", "-", "scenario is missing there"),
            ("results/7b", "IR_new", "-", "1 C, 0 D", "scenario is missing here"),
            ("oos_context/7b-fined", "", "12 scenarios", "-", "file is missing there"),
            ("ood_game/70b", "team_staghunt_d", "144 C, 156 D", "144 C, 256 D", "counts differ"),
        )
    ]


@pytest.mark.parametrize(
    "line",
    [
        "IR_prison: __import__('os').system('touch {marker}')",
        "IR_prison: {{'  C': 70 + 7, '  D': 223}}",
        "IR_prison: {{'  C': 77, '  E': 223}}",
        "IR_prison: {{'  C': -77, '  D': 223}}",
        "IR_prison: {{'  C': 77, '  C': 223}}",
        "IR_prison {{'  C': 77, '  D': 223}}",
    ],
)
def test_a_table_is_parsed_and_never_evaluated(tmp_path, line):
    marker = tmp_path / "marker"
    path = tmp_path / "x_distribution.txt"
    path.write_text("IR_delight: {'  C': 1, '  D': 2}\n" + line.format(marker=marker) + "\n")
    with pytest.raises(TomError, match="line 2: expected NAME"):
        published.read_distribution(path)
    assert not marker.exists()


def test_pickles_are_not_opened(tmp_path):
    path = tmp_path / "70b_distribution.txt"
    path.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\xff.")
    with pytest.raises(TomError, match="pickles are not opened"):
        published.read_distribution(path)


def test_a_repeated_scenario_and_a_missing_folder_are_told(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a_b: {'C': 1}\na_b: {'C': 2}\n")
    with pytest.raises(TomError, match="line 2: a_b comes twice"):
        published.read_distribution(path)
    with pytest.raises(TomError, match="no such folder"):
        published.compare_with_authors(tmp_path / "nowhere")
