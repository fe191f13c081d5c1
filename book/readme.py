"""Write the results into README.md, and its figure, from the shipped run: `python book/readme.py`."""

import hashlib
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

from tomlib import alignment, plots, published
from tomlib.collect import collect
from tomlib.profiles import SHIPPED, Run, load_profile, new_run
from tomlib.readout import readout
from tomlib.scenarios import root

CONSTANT = "teacher's mean"
SPLITS = {"in_sample": "04", "new_contexts": "05", "scaled_games": "06"}


def sides(run: Run, split: str) -> dict[str, pd.DataFrame]:
    """Teacher, student and tuned student of both arms, and the paper's, in one split.

    Of the run's models the exact probabilities, of Llama-2-70b and the paper's the published counts.
    """
    scenarios = run.scenarios(split)
    p = run.profile
    answers = {"teacher": p.teacher_answer} | dict.fromkeys(
        ("student", "tuned", "published-tuned"), p.student_answer
    )
    known = [readout(run, role, scenarios, form) for role, form in answers.items()]
    drawn = collect(run, "published-teacher", scenarios, p.student_answer, published.DRAWS)
    table = pd.concat([*known, alignment.cooperation(drawn)], ignore_index=True)
    paper = published.roles()
    return {
        f"family arm ({run.label})": alignment.compare(table, *alignment.ARMS["family"]),
        f"published arm ({run.label})": alignment.compare(table, *alignment.ARMS["published"]),
        "the paper (published)": alignment.compare(paper[paper["split"].eq(split)]),
    }


def results(run: Run) -> str:
    """The results table of README.md, in Markdown."""
    lines = [
        "| split | comparison | improvement, the paper's ratio | distance closed "
        "| mean gap to the teacher | gap of a constant | command |",
        "|---|---|---|---|---|---|---|",
    ]
    training = sides(run, "in_sample")
    resampling = {"resamples": run.profile.bootstrap, "seed": run.profile.seed}
    for split, chapter in SPLITS.items():
        for name, table in sides(run, split).items():
            every = alignment.improvement_measures(table, **resampling)
            measure = every.set_index("measure").loc
            ratio, closed = measure["mean of ratios"], measure["pooled distance-based"]
            before = None if split == "in_sample" else training[name]
            card = alignment.scorecard(table, before, **resampling)
            gap = card.set_index("prediction")
            own, constant = (
                f"{r['gap']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
                for r in (gap.loc["tuned"], gap.loc[CONSTANT])
            )
            lines.append(
                f"| {split} | {name} "
                f"| {ratio['estimate']:.0%} ({ratio['low']:.0%} to {ratio['high']:.0%}) "
                f"| {closed['estimate']:.0%} ({closed['low']:.0%} to {closed['high']:.0%}) "
                f"| {own} | {constant} | `tom run {chapter}` |"
            )
    return "\n".join(lines)


def figure(run: Run, path: Path) -> None:
    """Tuned student against teacher, in sample and in new contexts, both arms."""
    plots.style()
    _, axes = plt.subplots(2, 2, figsize=(9, 9))
    for row, split in zip(axes, ("in_sample", "new_contexts"), strict=True):
        tables = sides(run, split)
        paper = tables.pop("the paper (published)")
        for ax, (name, table) in zip(row, tables.items(), strict=True):
            plots.teacher_vs_tuned(table, paper, ax=ax)
            ax.set_title(f"{split.replace('_', ' ')}, {name}")
    plt.tight_layout()
    plt.savefig(path, dpi=90, metadata={"Software": None, "Shows": shown(results(run))})


def shown(text: str) -> str:
    """A mark of what a picture shows, kept inside it: the picture is of this text or out of date."""
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Rewrite the section between the marks, and the figure."""
    run = new_run(load_profile(SHIPPED))
    readme = root() / "README.md"
    text = readme.read_text("utf-8")
    new = f"<!-- results -->\n{results(run)}\n<!-- /results -->"
    text = re.sub(r"<!-- results -->.*<!-- /results -->", lambda _: new, text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")
    figure(run, root() / "book" / "_static" / "results.png")


if __name__ == "__main__":
    main()
