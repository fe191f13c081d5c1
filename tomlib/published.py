"""The paper's own figures (`data/published/`), and their comparison with the authors' repository.

>>> counts = roles()
>>> counts.query("split == 'in_sample' and model == 'teacher'")["cooperate"].agg(["min", "max"])
min     77
max    246
Name: cooperate, dtype: int64
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from tomlib import stats
from tomlib.errors import TomError
from tomlib.scenarios import root

#: Who played which role in the paper: (model, answer form) -> role in a comparison.
ROLES: dict[tuple[str, str], str] = {
    ("llama2-70b", "choice+motivation"): "teacher",
    ("llama2-7b", "choice only"): "student",
    ("llama2-7b-ft", "choice only"): "tuned",
    ("llama2-70b", "choice only"): "teacher, choice only",
    ("llama3-70b", "choice only"): "llama3-70b",
}

#: The authors' short names of the games, as in their tables and in Table 1.
GAMES: dict[str, str] = {
    "prison": "prisoners_dilemma",
    "delight": "prisoners_delight",
    "staghunt": "stag_hunt",
    "snowdrift": "snowdrift",
}

#: Payoffs R, S, T, P of the paper's games; those of the split `scaled_games` are twice as large.
PAYOFFS: dict[str, tuple[int, int, int, int]] = {
    "prisoners_dilemma": (5, 2, 10, 3),
    "prisoners_delight": (10, 3, 5, 2),
    "stag_hunt": (10, 2, 5, 3),
    "snowdrift": (5, 3, 10, 2),
}

#: Players, endowment and multiplier of the paper's public goods game.
FUND = (4, 10, 2.5)

DRAWS = 300

#: Cells that do not hold 300 draws: (role, split, context, game) -> draws.
IRREGULAR: dict[tuple[str, str, str, str], int] = {
    ("teacher", "in_sample", "friendsharing", "snowdrift"): 299,
    ("student", "new_contexts", "roomsharing", "prisoners_dilemma"): 295,
    ("student", "new_contexts", "roomsharing", "prisoners_delight"): 295,
}

#: Scenarios that were published for the three models of the paper, by split.
SCENARIOS: dict[str, int] = {"in_sample": 20, "new_contexts": 12, "scaled_games": 20}


#: What the authors' notebook holds of the public goods game, and their t tests are made of:
#: (mean, standard deviation) of 300 contributions.
PUBLIC_GOODS_SUMMARIES: dict[str, tuple[float, float]] = {
    "teacher": (7.0, 0.0),
    "student": (5.49, 0.86),
    "tuned": (5.92, 0.99),
}

_PROBLEMS = ["source_file", "scenario", "ours", "theirs", "problem"]
_LINE = re.compile(r"(?P<name>\w+)\s*:\s*\{(?P<counts>[^{}]*)\}")
_COUNT = re.compile(r"\s*(['\"])\s*(?P<choice>[CD])\s*\1\s*:\s*(?P<count>\d+)\s*")


def _read(name: str, folder: Path | str | None) -> pd.DataFrame:
    path = root() / "data" / "published" if folder is None else Path(folder)
    path = path if path.suffix == ".csv" else path / name
    try:
        return pd.read_csv(path, keep_default_na=False)
    except FileNotFoundError:
        raise TomError(
            f"{path}: no such file; the paper's figures belong to the repository, "
            f"restore it with `git checkout -- data/published`"
        ) from None
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise TomError(f"{path}: not a readable table ({error})") from None


def cooperation_counts(folder: Path | str | None = None) -> pd.DataFrame:
    """C and D counts of every published scenario.

    Args:
        folder: Where the tables lie, or a table of the same form; `data/published` of the repository
            unless given.

    Returns:
        One row a scenario, model and answer form: `split, context, game, model, answer, cooperate,
        defect, source_file`, names of models and answer forms as published.

    Raises:
        TomError: the table is missing or unreadable.
    """
    return _read("cooperation_counts.csv", folder)


def roles(folder: Path | str | None = None) -> pd.DataFrame:
    """The published counts with `model` replaced by the role it had in the paper (`ROLES`)."""
    counts = cooperation_counts(folder)
    names = zip(counts["model"], counts["answer"], strict=True)
    return counts.assign(model=[ROLES.get(name, f"{name[0]}, {name[1]}") for name in names])


def public_goods(folder: Path | str | None = None) -> pd.DataFrame:
    """Published contributions: `model` (as published), `contribution` (dollars), `count`.

    `folder` as for `cooperation_counts`.
    """
    return _read("public_goods.csv", folder)


def public_goods_roles(folder: Path | str | None = None) -> pd.DataFrame:
    """The published contributions with `model` replaced by the role it had in the paper."""
    table = public_goods(folder)
    names = {"llama2-70b": "teacher", "llama2-7b": "student", "llama2-7b-ft": "tuned"}
    return table.assign(model=table["model"].replace(names))


def table1(folder: Path | str | None = None) -> pd.DataFrame:
    """Table 1 as printed: the tuned student in sample and with doubled payoffs.

    Returns:
        20 scenarios and the lines AVERAGE and MEDIAN: `scenario` (the paper's short name),
        `context, game` (ours; empty in the last two lines), `within_sample_c_ratio,
        scaled_c_ratio, difference, se, z, p_value, stars`.
    """
    table = _read("table1_as_printed.csv", folder)
    parts = table["scenario"].str.partition("_")
    table.insert(1, "context", parts[0].where(parts[1] == "_", ""))
    table.insert(2, "game", parts[2].map(GAMES).fillna(""))
    return table


def table1_regenerated(folder: Path | str | None = None) -> pd.DataFrame:
    """Table 1 from the counts by the rule that gives its digits (`stats.table1_rule`), unrounded.

    The lines AVERAGE and MEDIAN apply the rule to the average and the median of the rates; only the
    median's `difference` is the median of the differences.

    Returns:
        The rows and columns of `table1`.
    """
    printed = table1(folder)
    tuned = roles(folder).query("model == 'tuned'")
    rates = tuned.assign(rate=tuned["cooperate"] / (tuned["cooperate"] + tuned["defect"]))
    wide = rates.pivot(index=["context", "game"], columns="split", values="rate")
    keys = pd.MultiIndex.from_frame(printed[["context", "game"]])
    rows = wide.reindex(keys)[["in_sample", "scaled_games"]].to_numpy(copy=True)
    scenarios = rows[~np.isnan(rows).any(axis=1)]
    for name, centre in (("AVERAGE", np.mean), ("MEDIAN", np.median)):
        rows[printed["scenario"] == name] = centre(scenarios, axis=0)
    rule = stats.table1_rule(rows[:, 0], rows[:, 1], DRAWS)
    median = printed["scenario"] == "MEDIAN"
    rule.loc[median, "difference"] = np.median(scenarios[:, 1] - scenarios[:, 0])
    table = printed[["scenario", "context", "game"]].assign(
        within_sample_c_ratio=rows[:, 0], scaled_c_ratio=rows[:, 1]
    )
    return table.join(rule)


def read_distribution(path: Path | str) -> dict[str, tuple[int, int]]:
    """A text table of the authors: scenario name -> (C, D) counts. Parsed, never evaluated.

    Raises:
        TomError: the file is missing, is no text (some `.txt` files there are pickles), a line
            is not of the form `IR_prison: {'  C': 77, '  D': 223}`, or a name comes twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TomError(f"{path}: no such file") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise TomError(f"{path}: not a text table; pickles are not opened") from None
    table: dict[str, tuple[int, int]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        match = _LINE.fullmatch(line.strip())
        items = [_COUNT.fullmatch(item) for item in match["counts"].split(",")] if match else []
        counts = {item["choice"]: int(item["count"]) for item in items if item}
        if match is None or len(counts) != len(items):
            raise TomError(f"{where}: expected NAME: {{'C': count, 'D': count}}, got {line[:80]!r}")
        if match["name"] in table:
            raise TomError(f"{where}: {match['name']} comes twice")
        table[match["name"]] = (counts.get("C", 0), counts.get("D", 0))
    return table


def compare_with_authors(repository: Path | str, folder: Path | str | None = None) -> pd.DataFrame:
    """Compare every published count with a checkout of the authors' repository.

    Args:
        repository: Path of the checkout (its `results/`, `oos_context/`, `ood_game/` and
            `results_llama3/` hold `*_distribution.txt` tables).
        folder: Our tables; `data/published` unless given.

    Returns:
        One row a difference, empty when all counts agree: `source_file, scenario` (the authors'
        name)`, ours, theirs` (`"77 C, 223 D"` or `"-"`)`, problem`.

    Raises:
        TomError: the path is no folder, or a table in it cannot be read.
    """
    repository = Path(repository)
    if not repository.is_dir():
        raise TomError(f"{repository}: no such folder; give the path of a checkout of theirs")
    short = {game: name for name, game in GAMES.items()}
    ours = cooperation_counts(folder)
    doubled = np.where(ours["split"] == "scaled_games", "_d", "")
    ours["scenario"] = ours["context"] + "_" + ours["game"].map(short) + doubled
    rows = []
    for file, table in ours.groupby("source_file", sort=False):
        path = repository / str(file)
        if not path.exists():
            rows.append((file, "", f"{len(table)} scenarios", "-", "file is missing there"))
            continue
        theirs = read_distribution(path)
        mine = {
            str(name): (int(c), int(d))
            for name, c, d in zip(
                table["scenario"], table["cooperate"], table["defect"], strict=True
            )
        }
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            if mine.get(name) != theirs.get(name):
                problem = "counts differ"
                if name not in theirs:
                    problem = "scenario is missing there"
                if name not in mine:
                    problem = "scenario is missing here"
                rows.append((file, name, _shown(mine.get(name)), _shown(theirs.get(name)), problem))
    return pd.DataFrame(rows, columns=_PROBLEMS)


def _shown(counts: tuple[int, int] | None) -> str:
    return "-" if counts is None else f"{counts[0]} C, {counts[1]} D"


def verify(
    authors_repository: Path | str | None = None, folder: Path | str | None = None
) -> pd.DataFrame:
    """Everything that `tom verify published` checks, as a frame of problems; empty if all is well.

    Without a checkout: the number of scenarios of every role, 300 draws a cell but for the known
    exceptions (`IRREGULAR`), 300 contributions a model, and Table 1 digit by digit. With one, also
    every count (`compare_with_authors`).

    Returns:
        `source_file, scenario, ours, theirs, problem`; `theirs` is what was expected.
    """
    counts, contributions = roles(folder), public_goods_roles(folder)
    printed, regenerated = table1(folder), table1_regenerated(folder)
    rows: list[tuple[str, str, object, object, str]] = []

    def expect(file: str, name: str, found: object, expected: object, problem: str) -> None:
        if found != expected:
            rows.append((file, name, found, expected, problem))

    for role in ("teacher", "student", "tuned"):
        for split, number in SCENARIOS.items():
            held = int(((counts["model"] == role) & (counts["split"] == split)).sum())
            expect("cooperation_counts.csv", f"{role}, {split}", held, number, "scenarios")
    cells = counts[["model", "split", "context", "game"]].itertuples(index=False, name=None)
    for cell, draws in zip(cells, counts["cooperate"] + counts["defect"], strict=True):
        expected = IRREGULAR.get(cell, DRAWS)
        expect("cooperation_counts.csv", ", ".join(cell), int(draws), expected, "draws")
    for giver, draws in contributions.groupby("model")["count"].sum().items():
        expect("public_goods.csv", str(giver), int(draws), DRAWS, "draws")
    regenerated = regenerated.round(2)
    for column in printed.columns.drop(["scenario", "context", "game"]):
        for name, ours, theirs in zip(
            printed["scenario"], printed[column], regenerated[column], strict=True
        ):
            expect("table1_as_printed.csv", name, ours, theirs, f"{column} by the counts")
    problems = pd.DataFrame(rows, columns=_PROBLEMS)
    if authors_repository is None:
        return problems
    return pd.concat([problems, compare_with_authors(authors_repository, folder)])
