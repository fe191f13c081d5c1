"""The experiment in one drawing, made from the profile of the run that the book shows."""

from html import escape
from pathlib import Path
from typing import Any

from chapters import run_name, runs

from tomlib.errors import TomError
from tomlib.models import card
from tomlib.profiles import Profile, Run, load_profile, new_run
from tomlib.published import DRAWS
from tomlib.reproduce import read_manifest
from tomlib.scenarios import SPLITS, Scenario

DRAWING = "book/_static/experiment.svg"

_SAID = {
    "in_sample": "in sample: the {n} training scenarios",
    "new_contexts": "new contexts: {contexts} × {games} = {n} scenarios",
    "scaled_games": "scaled games: {n} scenarios, payoffs doubled",
    "public_goods": "public goods: {n} scenario",
}


def shown_run(app: Any) -> Run | None:
    """The run that the book's front page was executed with; None where there is none to be found."""
    front = Path(app.srcdir, "notebooks", "index.ipynb")
    if not front.is_file():
        return None
    name = run_name(front)
    if name in runs(app):
        values = read_manifest(runs(app)[name].parent)["profile"]
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return new_run(Profile(**plain))
    try:
        return new_run(load_profile(name))
    except TomError:  # a profile of the user's that is not here any more
        return None


def scenarios(run: Run, split: str) -> list[Scenario]:
    """The run's scenarios of a split; none where its contexts and games leave none."""
    try:
        return run.scenarios(split)
    except TomError:
        return []


def svg(run: Run) -> str:
    """The drawing: models, scenarios, draws and training rows as the run's profile says."""
    p = run.profile
    training = scenarios(run, "in_sample")
    contexts, games = ({getattr(s, k).name for s in training} for k in ("context", "game"))
    held = round(p.held_out * p.n_teacher * len(training))
    rows = p.n_teacher * len(training) - held
    played = []
    for split in SPLITS:
        part = scenarios(run, split)
        if part:
            numbers = {
                "n": len(part),
                "contexts": len({s.context.name for s in part}),
                "games": len({s.game.name for s in part}),
            }
            played.append(_SAID[split].format(**numbers))
    second = (
        (p.published_teacher, "known by its counts,", f"{DRAWS} choices a scenario")
        if "published" in run.arms
        else ("none in this run",)
    )
    live = card(p.teacher).kind != "published"
    first = (
        (p.teacher, f"{p.n_teacher} answers a scenario,", p.teacher_answer)
        if live
        else (p.teacher,)
    )
    boxes = [
        (60, 16, 400, f"{len(contexts)} contexts × {len(games)} games", "#f4f4f4", "#7f7f7f", "",
         [f"{len(training)} training scenarios"]),
        (22, 130, 236, "Teacher", "#e6f1f8", "#0072b2", "", [*first]),
        (270, 130, 236, "Published teacher", "#fff", "#0072b2", "7 4", [*second]),
        (60, 278, 400, "LoRA training", "#f4f4f4", "#7f7f7f", "",
         [f"{rows} rows (prompt, answer)" + f"; {held} more held out" * (held > 0),
          f"(second arm: the counts of {len(training)} scenarios)",
          f"rank {p.lora_r}, alpha {p.lora_alpha}, {', '.join(p.lora_modules)}"]),
        (22, 432, 236, "Student", "#fdf3df", "#e69f00", "", [p.student]),
        (270, 432, 236, "Tuned student", "#e2f4ee", "#009e73", "", [f"{p.student} + adapter"]),
        (22, 544, 484, "All of them play", "#f4f4f4", "#7f7f7f", "",
         [*played, f"{p.n} choices a scenario and model, and the exact probabilities"]),
    ]  # fmt: skip
    parts, tall = [], {}
    for x, y, width, title, fill, edge, dash, lines in boxes:
        height = 40 + 22 * len(lines)
        tall[title] = y + height
        middle = x + width / 2
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" '
            f'stroke="{edge}" stroke-width="2"{dashed}/>'
            f'<text x="{middle:g}" y="{y + 26}" font-size="17" font-weight="bold">'
            f"{escape(title)}</text>"
        )
        parts += [
            f'<text x="{middle:g}" y="{y + 50 + 22 * i}" font-size="13">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
    end = tall["All of them play"] + 40
    parts.append(
        f'<rect x="22" y="{end}" width="484" height="90" rx="8" fill="#fff" stroke="#333" '
        'stroke-width="2"/>'
        f'<text x="260" y="{end + 28}" font-size="17" font-weight="bold">'
        "How much of the way to the teacher?</text>"
        f'<text x="260" y="{end + 53}">(tuned − student) / (teacher − student)</text>'
        f'<text x="260" y="{end + 77}">and against what needs no student at all</text>'
    )
    arrows = [
        "M160 78 140 126", "M360 78 388 126",
        f"M140 {tall['Teacher']} 170 274", f"M388 {tall['Published teacher']} 350 274",
        f"M388 {tall['LoRA training']}V428", "M258 464H266",
        f"M140 {tall['Student']}V540", f"M388 {tall['Tuned student']}V540",
        "M22 176H8V600H18", f"M260 {tall['All of them play']}V{end - 4}",
    ]  # fmt: skip
    drawn = "".join(f'<path d="{a}"/>' for a in arrows)
    says = (
        f"{len(training)} training scenarios go to the teacher {p.teacher}; {rows} of its answers "
        f"train the student {p.student} by LoRA. Teacher, student and tuned student then play "
        f"{'; '.join(played)}; and the part of the way to the teacher that the tuned student has gone "
        "is measured."
    )
    total = end + 106
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 {total}" '
        'font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="14" text-anchor="middle" '
        f'fill="#222"><title>The experiment</title><desc>{escape(says)}</desc><defs><marker id="tip" '
        'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="#555"/></marker></defs>'
        f'<rect width="520" height="{total}" fill="#fff"/>'
        f'<g stroke="#555" stroke-width="1.6" fill="none" marker-end="url(#tip)">{drawn}</g>'
        + "\n".join(parts)
        + "</svg>\n"
    )


def draw(app: Any) -> None:
    """Draw the run that is shown; the file is only touched where it would change."""
    run = shown_run(app)
    path = Path(app.srcdir, DRAWING)
    if run is not None and path.parent.is_dir():
        drawing = svg(run)
        if not path.is_file() or path.read_text("utf-8") != drawing:
            path.write_text(drawing, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
