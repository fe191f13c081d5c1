"""Every figure of the book, one function each: a table in, axes out; and how tables are shown.

The same model has the same colour everywhere (Okabe and Ito's palette). What this run measured is
filled, what the paper published is open or hatched; grey is what needs no model at all. Every
estimate has its uncertainty. Call `style()` once per notebook.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tomlib import alignment, contributions, stats

TEACHER, STUDENT, TUNED, BASELINE = "#0072B2", "#E69F00", "#009E73", "#7F7F7F"
COLOURS: dict[str, str] = {"teacher": TEACHER, "student": STUDENT, "tuned": TUNED}

#: Limits of an improvement axis, in percent; what lies beyond is marked at the edge: dots as triangles,
#: bars by an arrow and their value, means by an arrowhead on the right.
IMPROVEMENT_LIMITS = (-150.0, 300.0)

_MARKERS = "osD^vPX*"


def style() -> None:
    """How figures look: matplotlib's defaults, the same everywhere."""
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "text.color": "#333333",
            "axes.labelcolor": "#333333",
            "axes.edgecolor": "#767676",
            "xtick.color": "#555555",
            "ytick.color": "#555555",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "svg.hashsalt": "tom",
        }
    )


def show(figure: Figure, finding: str) -> None:
    """Show a figure with what it finds, in words.

    The words are the figure's text in the notebook: readers who cannot see it get them, and the
    book puts them under its caption. They are an output like any other, hence computed and compared.

    Args:
        figure: What to show; it is closed.
        finding: One or a few plain sentences; Markdown's emphasis is taken off.
    """
    from IPython.core.pylabtools import print_figure
    from IPython.display import publish_display_data

    # IPython is typed in part only.
    picture = print_figure(figure, fmt="png", bbox_inches="tight", base64=True)  # type: ignore[no-untyped-call]
    plt.close(figure)
    words = " ".join(finding.replace("*", "").replace("`", "").split())
    publish_display_data({"image/png": picture, "text/plain": words})  # type: ignore[no-untyped-call]


def table(
    frame: pd.DataFrame,
    caption: str,
    name: str = "",
    *,
    intervals: Mapping[str, tuple[str, str]] | None = None,
    digits: int = 3,
    unread: int | None = None,
) -> None:
    """Show a table with its caption, whole, in words instead of identifiers, without row numbers.

    P values and settings that would round to nothing are written as powers of ten; any other number
    that does is a 0 without a sign. What could act on a terminal or turn the direction of reading
    (models write some of the cells) is shown as its code. The book numbers the table; `name` is what
    it is referred to by.

    Args:
        frame: What to show; index levels without a name are left out.
        caption: What it shows; one or a few plain sentences.
        name: Its label, as in `tab-04-counts`.
        intervals: Columns to be shown with the bounds that stand in two others, as in
            `{"gap": ("low", "high")}`.
        digits: Decimal places of numbers that are not whole.
        unread: How many answers without a readable choice are behind the table, where it has no
            column for them; the caption says so.
    """
    from IPython.display import publish_display_data

    if unread is not None:
        caption += (
            f" Answers without a readable choice, no part of it: {unread:,}."
            if unread
            else " All answers had a readable choice."
        )
    shown = _readable(frame, intervals or {}, digits)
    while shown.index.nlevels and shown.index.has_duplicates and len(shown.columns) > 1:
        shown = shown.set_index(shown.columns[0], append=True)
    names = [name for name in shown.index.names if name is not None]
    with pd.option_context("display.max_colwidth", None):
        html = shown.to_html(
            index=bool(names), index_names=False, border=0, justify="left", table_id=name or None
        )
        text = shown.to_string(index=bool(names), index_names=False)
    for label in names:  # over the row headings, in the one row of headings
        html = html.replace("<th></th>", f"<th>{escape(str(label))}</th>", 1)
    html = html.replace(">\n", f">\n  <caption>{escape(caption, quote=False)}</caption>\n", 1)
    text = "\n".join([caption, *([" / ".join(map(str, names))] if names else []), text])
    publish_display_data({"text/html": html, "text/plain": text})  # type: ignore[no-untyped-call]


def _readable(
    frame: pd.DataFrame, intervals: Mapping[str, tuple[str, str]], digits: int
) -> pd.DataFrame:
    """Every cell and every heading as it is to be read; levels without a name are gone."""
    shown = frame.copy()
    for column, (low, high) in intervals.items():
        shown[column] = stats.with_interval(shown[column], shown[low], shown[high], digits)
    shown = shown.drop(columns=[bound for pair in intervals.values() for bound in pair])
    cells = {n: _column(shown.iloc[:, n], digits) for n in range(shown.shape[1])}
    levels = [n for n, name in enumerate(shown.index.names) if name is not None]
    index = [
        pd.Index(_column(shown.index.get_level_values(n), digits), dtype=object) for n in levels
    ]
    spoken = [_spoken(shown.index.names[n]) for n in levels]
    heads = [" ".join(map(_heading, c if isinstance(c, tuple) else (c,))) for c in shown.columns]
    table = pd.DataFrame(cells, dtype=object).set_axis(heads, axis=1)
    if not index:
        return table
    rows = pd.MultiIndex.from_arrays(index, names=spoken)
    return table.set_axis(rows if len(index) > 1 else rows.get_level_values(0))


_IDENTIFIER = re.compile(r"[A-Za-z]+[0-9]*(_[a-z0-9]+)+")


#: Columns in which what would round to nothing still differs from 0.
_SMALL = re.compile(r"(\w+_)?(p|p_value|holm|bh)|learning_rate")


def _column(values: pd.Series | pd.Index, digits: int) -> list[object]:
    """The cells of a column as they are to be read: whole numbers as such if all of them are."""
    numbers = [v for v in values if isinstance(v, (float, np.floating)) and np.isfinite(v)]
    whole = all(v == round(v) for v in numbers)
    # A column of several kinds of value holds settings; in one of measurements 1e-16 is 0, rounded.
    small = values.dtype == object or _SMALL.fullmatch(str(values.name)) is not None
    return [_cell(value, 0 if whole else digits, small) for value in values]


def _cell(value: object, digits: int, small: bool) -> object:
    if isinstance(value, str):
        named = _IDENTIFIER.fullmatch(value) or value.startswith("published-")
        return _spoken(value) if named else visible(value, LONGEST)
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if value is None or value is pd.NA or value is pd.NaT:
        return "-"
    if not isinstance(value, (float, np.floating)):
        return value
    number = float(value)
    if np.isnan(number):
        return "-"
    vanishes = small and 0 < abs(number) < 0.5 * 10.0**-digits
    return f"{number:.0e}" if vanishes else f"{number:z.{digits}f}"  # z: no sign before a 0


def _heading(value: object) -> str:
    return "-" if pd.isna(value) else _spoken(value)  # type: ignore[call-overload]


LONGEST = 1000
"""Most characters of a cell that are shown."""


def visible(text: str, longest: int | None = None) -> str:
    r"""A text in which nothing acts unseen: controls, marks of direction and the like as codes.

    Line ends, tabs and joiners stay; what is longer than `longest` is cut, and said to be.

    >>> print(visible("a\x1b[31mb\u202ec"))
    a\x1b[31mb\u202ec
    """
    if longest is not None and len(text) > longest:
        return f"{visible(text[:longest])}… ({len(text):,} characters)"
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in _UNSEEN and c not in _HARMLESS
        else c
        for c in text
    )


_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, halves of characters, separators
_HARMLESS = "\n\t\u00ad\u200c\u200d"  # line ends, tabs, hyphenation, joiners of scripts and emoji


def colour(model: str) -> str:
    """Colour of a model by its role; roles of the second arm end in the first one's names.

    >>> colour("tuned") == colour("published-tuned") == TUNED
    True
    >>> colour("llama3-70b") == BASELINE
    True
    """
    return next((c for role, c in COLOURS.items() if model.endswith(role)), BASELINE)


def _shades(base: str, number: int) -> list[tuple[float, float, float]]:
    """Shades of one hue, from full to light."""
    full = np.array(colors.to_rgb(base))
    light = np.linspace(0, 0.65, number)
    return [tuple(full + (1 - full) * share) for share in light]


def _whiskers(values: Any, low: Any, high: Any) -> Any:
    """Lengths for `yerr`; 0 where there is no interval."""
    values, low, high = (np.asarray(x, dtype=float) for x in (values, low, high))
    lengths = np.stack([values - low, high - values])
    return np.where(np.isfinite(lengths), np.maximum(lengths, 0), 0)


def _rates(counts: pd.DataFrame) -> pd.DataFrame:
    """Rates with their 95 % Wilson intervals (`low`, `high`)."""
    table = alignment.rates(counts)
    draws = table["draws"].to_numpy(dtype=float)
    successes = table["rate"] * np.where(np.isinf(draws), 1.0, draws)
    table["low"], table["high"] = stats.wilson(successes, draws)
    return table


def _places(values: Iterable[Any], groups: list[Any]) -> Any:
    """Where the values' groups stand on an axis."""
    return np.array([groups.index(value) for value in values], dtype=float)


def _spoken(name: object) -> str:
    words = visible(str(name)).replace("_", " ").replace("prisoners ", "prisoner's ")
    return words.replace("published-", "published ")


def _panels(axes: Iterable[Axes] | None, rows: int, columns: int, size: tuple[float, float]) -> Any:
    if axes is not None:
        return np.asarray(list(axes), dtype=object).reshape(rows, columns)
    return plt.subplots(rows, columns, figsize=size, squeeze=False)[1]


# ------------------------------------------------------------------------------------- figure 2


def propensity(
    counts: pd.DataFrame,
    models: Sequence[str] = ("student", "teacher"),
    published: pd.DataFrame | None = None,
    axes: Iterable[Axes] | None = None,
) -> Any:
    """Figure 2: propensity to cooperate of each model, by context and by game.

    Args:
        counts: Counts or exact probabilities of the models (see `alignment.rates`).
        models: One row of panels each.
        published: Counts of the paper under the same roles: open diamonds over the bars.
        axes: As many as there are panels; new ones unless given.

    Returns:
        Array of axes, models x (by context, by game); bars are shares of C with 95 % Wilson
        intervals.
    """
    grid = _panels(axes, len(models), 2, (10, 3.2 * len(models)))
    table = _rates(counts)
    paper = None if published is None else _rates(published)
    for row, model in zip(grid, models, strict=True):
        for ax, (outer, inner) in zip(row, (("context", "game"), ("game", "context")), strict=True):
            _grouped_rates(ax, table[table["model"] == model], outer, inner, colour(model))
            if paper is not None:
                _grouped_rates(
                    ax, paper[paper["model"] == model], outer, inner, colour(model), over=table
                )
            ax.set(title=f"{_spoken(model)}, by {outer}", ylim=(0, 1), ylabel="share of C")
    return grid


def _grouped_rates(
    ax: Axes,
    table: pd.DataFrame,
    outer: str,
    inner: str,
    base: str,
    over: pd.DataFrame | None = None,
) -> None:
    """Bars of rates in groups; with `over`, open markers at the places of that table's bars."""
    places = table if over is None else over
    groups, members = list(places[outer].unique()), list(places[inner].unique())
    width = 0.8 / max(len(members), 1)
    for number, (member, shade) in enumerate(
        zip(members, _shades(base, len(members)), strict=True)
    ):
        rows = table[(table[inner] == member) & table[outer].isin(groups)]
        x = _places(rows[outer], groups) + (number - (len(members) - 1) / 2) * width
        if over is None:
            ax.bar(
                x,
                rows["rate"],
                width * 0.92,
                color=shade,
                yerr=_whiskers(rows["rate"], rows["low"], rows["high"]),
                ecolor="#444444",
                error_kw={"linewidth": 0.8},
                label=_spoken(member),
            )
        else:
            label = "published" if number == 0 else None
            ax.plot(x, rows["rate"], "D", mfc="none", mec="#333333", ms=4, mew=0.9, label=label)
    _name_groups(ax, groups)
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.1), fontsize=8)


def _name_groups(ax: Axes, groups: list[Any]) -> None:
    names = [_spoken(group).replace(" ", "\n") for group in groups]
    ax.set_xticks(range(len(groups)), names, fontsize=8 if len(groups) > 4 else 9)


# -------------------------------------------------------------------------------- figures 3 and 4


def improvement_bars(
    comparison: pd.DataFrame,
    published: pd.DataFrame | None = None,
    label: str = "this run",
    resamples: int = 2_000,
    axes: Iterable[Axes] | None = None,
) -> Any:
    """Figures 3 and 4: improvement by game and by context, with the mean over all scenarios.

    Args:
        comparison: Rates side by side (`alignment.compare`).
        published: The paper's comparison of the same split: hatched bars beside.
        label: How the numbers of `comparison` are marked when there are others beside them.
        resamples: Of the bootstrap over scenarios.
        axes: Two; new ones unless given.

    Returns:
        Two axes. Bars: means of the scenarios' ratios in percent, with percentile bootstrap
        intervals over scenarios; dots: the scenarios (open where teacher and student hardly
        differ); dashed: the mean; 100 is complete alignment.
    """
    grid = _panels(axes, 1, 2, (10, 3.8))[0]
    runs = [(label, comparison, True)]
    if published is not None:
        runs.append(("published", published, False))
    for ax, by in zip(grid, ("game", "context"), strict=True):
        groups = list(comparison[by].unique())
        width = 0.7 / len(runs)
        for number, (name, table, filled) in enumerate(runs):
            shift = (number - (len(runs) - 1) / 2) * width
            bars = alignment.improvement_by(table, by, resamples=resamples)
            bars = bars[bars[by].isin(groups)].dropna(subset="improvement")
            bars[["improvement", "low", "high"]] *= 100
            x = _places(bars[by], groups) + shift
            look: dict[str, Any] = {"color": TUNED} if filled else _open(TUNED)
            ax.bar(
                x,
                bars["improvement"],
                width * 0.9,
                alpha=0.75 if filled else 1,
                yerr=_whiskers(bars["improvement"], bars["low"], bars["high"]),
                ecolor="#444444",
                error_kw={"linewidth": 0.9},
                label=name if len(runs) > 1 else None,
                **look,
            )
            _cut_bars(ax, x + width * 0.48, bars["improvement"])
            scenarios = alignment.improvement(table).query("verdict != 'undefined'")
            _scenario_dots(ax, scenarios[scenarios[by].isin(groups)], by, groups, shift)
            whose = "" if len(runs) == 1 else f", {name}"
            _mean_line(ax, 100 * scenarios["improvement"].mean(), whose, filled)
        ax.axhline(0, color="#767676", linewidth=0.8)
        ax.axhline(100, color="#767676", linewidth=0.8)
        _name_groups(ax, groups)
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, IMPROVEMENT_LIMITS[0]), min(max(high, 110), IMPROVEMENT_LIMITS[1]))
        ax.set(title=f"improvement by {by}", ylabel="improvement, %")
        ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.1), fontsize=8)
    return grid


def _cut_bars(ax: Axes, x: Any, percent: pd.Series) -> None:
    """An arrow and the value beside every bar that goes beyond the axis, at the edge that cuts it."""
    low, high = IMPROVEMENT_LIMITS
    for place, value in zip(x, percent, strict=True):
        if not low <= value <= high:
            arrow, edge, side = ("↑", high, "top") if value > high else ("↓", low, "bottom")
            ax.text(
                place, edge, f"{arrow}\u2009{value:,.0f} %".replace("-", "−"), fontsize=7, va=side
            )


def _mean_line(ax: Axes, mean: float, whose: str, filled: bool) -> None:
    """The mean as a line; beyond the axis as an arrowhead at its edge, where a line would not show."""
    low, high = IMPROVEMENT_LIMITS
    label = f"mean{whose}: {mean:.1f} %"
    if low <= mean <= high or np.isnan(mean):
        style = "--" if filled else ":"
        ax.axhline(mean, color=TUNED, linestyle=style, linewidth=1.2, label=label)
        return
    edge, head = (high, "^") if mean > high else (low, "v")
    ax.plot(
        1.03,
        edge,
        head,
        color=TUNED,
        mfc=TUNED if filled else "white",
        transform=ax.get_yaxis_transform(),
        clip_on=False,
        label=f"{label}, off the axis",
    )


def _open(base: str) -> dict[str, Any]:
    """How a published bar looks: hatched, in the model's colour, without filling."""
    return {"facecolor": "none", "edgecolor": base, "hatch": "//", "linewidth": 1}


def _scenario_dots(ax: Axes, table: pd.DataFrame, by: str, groups: list[Any], shift: float) -> None:
    low, high = IMPROVEMENT_LIMITS
    percent = 100 * table["improvement"]
    shown = percent.clip(low * 0.97, high * 0.97)
    x = _places(table[by], groups) + shift
    for outside, marker in (
        (percent.between(low, high), "o"),
        (percent > high, "^"),
        (percent < low, "v"),
    ):
        for flagged, fill in ((False, "#333333"), (True, "white")):
            rows = outside & (table["flagged"] == flagged)
            ax.plot(x[rows], shown[rows], marker, mfc=fill, mec="#333333", ms=4, mew=0.8, zorder=3)


# ------------------------------------------------------------------------------------- figure 5


def public_goods(
    table: pd.DataFrame,
    published: pd.DataFrame | None = None,
    endowment: int = 10,
    axes: Iterable[Axes] | None = None,
) -> Any:
    """Figure 5: mean contributions with standard errors, and the full distributions.

    Args:
        table: Counts or exact probabilities of contributions (see `contributions.summary`).
        published: The paper's contributions under the same roles: hatched.
        endowment: The largest contribution, in dollars.
        axes: Two; new ones unless given.

    Returns:
        Two axes: means with one standard error; shares of each contribution.
    """
    left, right = _panels(axes, 1, 2, (10, 3.6))[0]
    sets = [(table, True)] + ([] if published is None else [(published, False)])
    names: list[str] = []
    width = 0.8 / sum(part["model"].nunique() for part, _ in sets)
    place = 0
    for part, filled in sets:
        for row in contributions.summary(part).dropna(subset="mean").to_dict("records"):
            model, mean = str(row["model"]), float(row["mean"])
            measured = filled and model != "published-teacher"
            look = {"color": colour(model), "alpha": 0.85} if measured else _open(colour(model))
            if measured and model.startswith("published"):
                look |= {"hatch": "..", "edgecolor": "white"}  # the same role in the second arm
            label = _spoken(model) + ("" if filled or published is None else " (published)")
            left.bar(len(names), mean, 0.7, yerr=row["se"], capsize=4, ecolor="#444444", **look)
            left.text(len(names), mean + 0.3, f"{mean:.2f}", ha="center", fontsize=9)
            names.append(label.replace(" (", "\n(").replace("published ", "published\n"))
            rows = part[(part["model"] == model) & part["contribution"].notna()]
            weight = rows["p" if "p" in rows else "count"].astype(float)
            x = rows["contribution"].astype(float) - 0.4 + (place + 0.5) * width
            right.bar(x, weight / weight.sum(), width * 0.92, label=label, **look)
            place += 1
    left.set_xticks(range(len(names)), names, fontsize=8)
    left.set(ylim=(0, endowment), ylabel="mean contribution, dollars", title="means")
    right.set_xticks(range(endowment + 1))
    right.set(xlabel="contribution, dollars", ylabel="share of answers", title="distributions")
    if names:
        right.legend()
    return np.array([left, right], dtype=object)


# -------------------------------------------------------------------------------------- table 1


def scaled_differences(
    tests: pd.DataFrame,
    margin: float = stats.MARGIN,
    model: str = "tuned",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Table 1 as a forest plot: difference between scaled and original game, scenario by scenario.

    Args:
        tests: What `stats.proportion_tests` returns.
        margin: Half-width of the band of equivalence.
        model: Whose colour to take.
        title: Above the axes; the model's name unless given.
        ax: Axes to draw on; new ones unless given.

    Returns:
        Axes with 95 % (thin) and 90 % (thick) Newcombe intervals. A thick line inside the band
        means the same within the margin; filled points changed (Holm below 0.05).
    """
    ax = ax or plt.subplots(figsize=(6, 0.24 * len(tests) + 1.6))[1]
    y = np.arange(len(tests))[::-1]
    base = colour(model)
    ax.axvspan(-margin, margin, color="#EEEEEE", zorder=0, label=f"±{margin:g}")
    ax.axvline(0, color="#767676", linewidth=0.8)
    ax.hlines(y, tests["low"], tests["high"], color=base, linewidth=1)
    ax.hlines(y, tests["low90"], tests["high90"], color=base, linewidth=2.6)
    changed = (tests["holm"] < 0.05).to_numpy()
    for rows, fill, label in (
        (changed, base, "changed (Holm)"),
        (~changed, "white", "no change shown"),
    ):
        ax.plot(
            tests["difference"][rows], y[rows], "o", mfc=fill, mec=base, ms=5, zorder=3, label=label
        )
    ax.set_yticks(y, [f"{row.context} / {_spoken(row.game)}" for row in tests.itertuples()])
    ax.set(xlabel="P(C) with doubled payoffs − P(C)", title=title or _spoken(model))
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.1), fontsize=8)
    return ax


# ---------------------------------------------------------------------------- exact and sampled


def exact_vs_sampled(agreement: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Sampled shares of C against exact probabilities.

    Args:
        agreement: What `stats.exact_agreement` returns.
        ax: Axes to draw on; new ones unless given.

    Returns:
        Axes with 95 % Wilson intervals; points that do not agree are crossed out.
    """
    ax = ax or plt.subplots(figsize=(4.8, 4.6))[1]
    ax.plot([0, 1], [0, 1], color="#767676", linewidth=0.8)
    groups = agreement.groupby("model", sort=False)
    for marker, (model, rows) in zip(cycle(_MARKERS), groups, strict=False):
        base = colour(str(model))
        ax.errorbar(
            rows["exact"],
            rows["rate"],
            _whiskers(rows["rate"], rows["low"], rows["high"]),
            fmt=marker,
            color=base,
            ms=4,
            linewidth=0.9,
            label=_spoken(model),
        )
    off = agreement[~agreement["agrees"]]
    if len(off):
        ax.plot(off["exact"], off["rate"], "x", color="#222222", ms=9, label="do not agree (Holm)")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="exact P(C)", ylabel="sampled share of C")
    ax.set_aspect("equal")
    ax.legend()
    return ax


# ------------------------------------------------------------------------------------- training


def loss_curve(log: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Training and held-out loss over optimizer steps.

    Args:
        log: `step, epoch, loss, heldout_loss`; the held-out loss is missing at most steps.
        ax: Axes to draw on; new ones unless given.
    """
    ax = ax or plt.subplots(figsize=(6.4, 3.4))[1]
    held = log.dropna(subset="heldout_loss")
    ax.plot(log["step"], log["loss"], color=TUNED, linewidth=0.9, alpha=0.8, label="training")
    ax.plot(held["step"], held["heldout_loss"], "o-", color="#333333", ms=4, label="held out")
    for step in log.loc[np.floor(log["epoch"]).diff() > 0, "step"]:
        ax.axvline(step, color="#BBBBBB", linewidth=0.7, linestyle=":")
    ax.set(xlabel="step (dotted: a new epoch)", ylabel="loss per answer token")
    ax.legend()
    return ax


def learning_curve(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Gap to the teacher over the number of training rows, on a logarithmic axis.

    Args:
        table: `rows, gap` and, where there are any, `split` (one line each) and the interval `low`,
            `high`.
        ax: Axes to draw on; new ones unless given.
    """
    ax = ax or plt.subplots(figsize=(5.6, 3.6))[1]
    table = table.assign(split=table.get("split", "gap"))
    splits = table["split"].nunique()
    for number, (split, rows) in enumerate(table.groupby("split", sort=False)):
        rows = rows.sort_values("rows")
        apart = 1.05 ** (number - (splits - 1) / 2)  # so that intervals do not hide each other
        low, high = rows.get("low", rows["gap"]), rows.get("high", rows["gap"])
        ax.errorbar(
            rows["rows"] * apart,
            rows["gap"],
            _whiskers(rows["gap"], low, high),
            fmt=_MARKERS[number % len(_MARKERS)] + ("-", "--", ":")[number % 3],
            color=TUNED,
            ms=5,
            capsize=2,
            label=_spoken(split),
        )
    sizes = sorted(table["rows"].unique())
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    ax.set(xlabel="training rows", ylabel="mean absolute gap to the teacher")
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax


# -------------------------------------------------------------------------- teacher and student


def teacher_vs_tuned(
    comparison: pd.DataFrame, published: pd.DataFrame | None = None, ax: Axes | None = None
) -> Axes:
    """P(C) of tuned student and student against the teacher's, scenario by scenario.

    Args:
        comparison: Rates side by side.
        published: The paper's comparison: its tuned student as open markers.
        ax: Axes to draw on; new ones unless given.

    Returns:
        Axes with 95 % Wilson intervals; every context has its own marker, and the diagonal is
        complete alignment.
    """
    ax = ax or plt.subplots(figsize=(5.6, 5.2))[1]
    ax.plot([0, 1], [0, 1], color="#767676", linewidth=0.8)
    contexts = list(comparison["context"].unique())
    for context, marker in zip(contexts, cycle(_MARKERS), strict=False):
        ax.plot([], [], marker, mfc="none", mec="#555555", linestyle="", label=_spoken(context))
        rows = comparison[comparison["context"] == context]
        for model in ("student", "tuned"):
            draws = rows[f"n_{model}"].to_numpy(dtype=float)
            low, high = stats.wilson(rows[model] * np.where(np.isinf(draws), 1, draws), draws)
            ax.errorbar(
                rows["teacher"],
                rows[model],
                _whiskers(rows[model], low, high),
                fmt=marker,
                color=COLOURS[model],
                ms=6,
                linewidth=0.8,
                label=model if context == contexts[0] else None,
            )
        if published is not None:
            paper = published[published["context"] == context]
            ax.plot(paper["teacher"], paper["tuned"], marker, mfc="none", mec=TUNED, ms=7)
    if published is not None:
        ax.plot([], [], "o", mfc="none", mec=TUNED, linestyle="", label="tuned (published)")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.set(xlabel="P(C) of the teacher", ylabel="P(C) of the student")
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return ax


def within_contexts(sides: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Tuned students' P(C) against the teacher's, both with their context's mean taken off.

    Args:
        sides: Comparisons (`alignment.compare`) by name, one marker each.
        ax: Axes to draw on; new ones unless given.
    """
    ax = ax or plt.subplots(figsize=(5.6, 4.4))[1]
    shades = _shades(TUNED, len(sides))[::-1]
    for number, (name, side) in enumerate(sides.items()):
        left = alignment.within_contexts(side, "teacher", "tuned")
        ax.plot(
            left["teacher"],
            left["tuned"],
            _MARKERS[number % len(_MARKERS)],
            color=shades[number],
            mec="#444444",
            ms=7,
            label=name,
        )
    reach = max(map(abs, ax.get_xlim()))
    ax.plot([-reach, reach], [-reach, reach], color="#767676", linewidth=0.8)
    ax.axhline(0, color="#767676", linewidth=0.8, linestyle=":")
    ax.set(xlabel="teacher, from its context's mean", ylabel="tuned student, likewise")
    ax.legend()
    return ax


def scores(card: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean absolute gaps to the teacher: tuned student, student and the baselines.

    Args:
        card: What `alignment.scorecard` returns.
        ax: Axes to draw on; new ones unless given.

    Returns:
        Axes with bootstrap intervals over scenarios; shorter is closer to the teacher.
    """
    card = card.dropna(subset="gap")
    ax = ax or plt.subplots(figsize=(6.4, 0.42 * len(card) + 1))[1]
    y = np.arange(len(card))[::-1]
    ax.barh(
        y,
        card["gap"],
        0.7,
        color=[COLOURS.get(str(name), BASELINE) for name in card["prediction"]],
        xerr=_whiskers(card["gap"], card["low"], card["high"]),
        ecolor="#444444",
        alpha=0.85,
        error_kw={"linewidth": 0.9},
    )
    ax.set_yticks(y, [_spoken(name) for name in card["prediction"]])
    ax.set(xlabel="mean absolute gap to the teacher")
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    return ax


def moved(table: pd.DataFrame, axes: Iterable[Axes] | None = None) -> Any:
    """Where the student stood, where tuning has moved it, and where a constant stands.

    Args:
        table: Scorecards (`alignment.scorecard`) one below the other, with `split` and `comparison`.
        axes: One per split; new ones unless given.

    Returns:
        One axes a split: mean absolute gaps to the teacher with their bootstrap intervals over
        scenarios, one row a comparison; 0 is the teacher.
    """
    splits = list(table["split"].unique())
    names = list(table["comparison"].unique())
    grid = _panels(axes, len(splits), 1, (5.4, (0.62 * len(names) + 0.75) * len(splits)))[:, 0]
    looks: dict[str, tuple[str, str, float, dict[str, Any]]] = {
        "student": ("before tuning", "s", 0.2, {"color": STUDENT}),
        "tuned": ("after tuning", "o", 0.0, {"color": TUNED}),
        "teacher's mean": ("a constant", "D", -0.2, {"color": BASELINE, "mfc": "white"}),
    }
    for ax, split in zip(grid, splits, strict=True):
        part = table[table["split"] == split]
        for name, (label, marker, shift, look) in looks.items():
            rows = part[part["prediction"] == name]
            y = len(names) - 1 - _places(rows["comparison"], names) + shift
            ax.errorbar(
                rows["gap"],
                y,
                xerr=_whiskers(rows["gap"], rows["low"], rows["high"]),
                fmt=marker,
                ms=6,
                linewidth=1.1,
                label=label,
                **look,
            )
        before, after = (
            part[part["prediction"] == name].set_index("comparison")["gap"]
            for name in ("student", "tuned")
        )
        for place, name in enumerate(names):
            if name in before.index and name in after.index:
                ax.annotate(
                    "",
                    (after[name], len(names) - 1 - place),
                    (before[name], len(names) - 0.8 - place),
                    arrowprops={"arrowstyle": "->", "color": "#999999", "linewidth": 0.9},
                    zorder=0,
                )
        ax.set_yticks(range(len(names) - 1, -1, -1), names)
        ax.set(ylim=(-0.5, len(names) - 0.5), title=_spoken(split))
        ax.grid(axis="x")
        ax.grid(axis="y", visible=False)
    shared = max(ax.get_xlim()[1] for ax in grid)
    for ax in grid:
        ax.set_xlim(0, shared)
    grid[-1].set_xlabel("mean absolute gap to the teacher (0: like the teacher)")
    grid[0].legend(ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1.15), fontsize=9)
    return grid
