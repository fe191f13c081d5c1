"""The data of the scenario explorer, taken from the run that the chapters of this book show.

Nothing is asked of a model: what the ledger does not hold is left out, and the page says so.
"""

import ast
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from tomlib import contributions, published, stats
from tomlib.collect import Player, collect, plan, player_if_ready, published_distribution
from tomlib.errors import TomError
from tomlib.games import PublicGoodsGame, TwoPlayerGame
from tomlib.models import card
from tomlib.plots import LONGEST, colour, visible
from tomlib.profiles import SHIPPED, Run, load_profile, new_run
from tomlib.prompts import messages, prompt_id
from tomlib.readout import held_readouts, options
from tomlib.scenarios import SPLITS, Scenario, load

PAGE = "book/explorer"
CHAPTER = "notebooks/04-in-sample.ipynb"
MOTIVATIONS = 8
"""Most motivations shown of a scenario: the first ones."""

FILES = ("d3.min.js", "plot.umd.min.js", "data.js", "explorer.js")
TITLES = {
    "teacher": "Teacher",
    "student": "Student",
    "tuned": "Tuned student",
    "published-teacher": "Published teacher",
    "published-tuned": "Tuned student (published arm)",
}
PAPER = {
    "teacher": "The paper's teacher (Llama-2-70b)",
    "teacher, choice only": "The paper's teacher, letter only",
    "student": "The paper's student (Llama-2-7b)",
    "tuned": "The paper's tuned student",
    "llama3-70b": "Llama-3-70b, letter only",
}


def shown_run(notebook: Path) -> Run:
    """The run that a chapter shows, from the values of its parameters."""
    given: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if {"parameters", "injected-parameters"} & set(cell["metadata"].get("tags", [])):
            for line in ast.parse("".join(cell["source"])).body:
                if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                    given[line.targets[0].id] = ast.literal_eval(line.value)
    name, replay = given.pop("profile", SHIPPED), given.pop("replay", True)
    return new_run(load_profile(name, **given), replay=replay)


def data(run: Run) -> dict[str, Any]:
    """All that the page shows of a run, as plain values."""
    p = run.profile
    arms = {"family": ["teacher", "student", "tuned"]}
    if "published" in run.arms:
        arms["published"] = ["published-teacher", "student", "published-tuned"]
    roles = list(dict.fromkeys(role for names in arms.values() for role in names))
    forms = {r: p.teacher_answer if r == "teacher" else p.student_answer for r in roles}
    cards = {
        r: p.teacher
        if r == "teacher"
        else p.published_teacher
        if r[-7:] == "teacher"
        else p.student
        for r in roles
    }
    every = [s for split in SPLITS for s in _scenarios(run, split)]
    texts: dict[str, int] = {}
    cells = [_scenario(run, s, forms, texts) for s in every]
    where = dict(zip(every, cells, strict=True))
    for role in roles:
        for s, result in _results(run, role, every, forms[role]).items():
            where[s]["results"][role] = result
    for s, said in _motivations(run, every).items():
        where[s]["motivations"] = said
    for s, cell in where.items():
        cell["published"] = _published(s)
    return {
        "run": {
            "profile": p.name, "label": run.label, "n": p.n, "temperature": p.temperature,
        },
        "splits": list(SPLITS),
        "contexts": {c.name: c.title for c in load().contexts},
        "arms": arms,
        "models": {
            r: {
                "title": TITLES[r], "card": cards[r], "answer": forms[r], "colour": colour(r),
                "published": card(cards[r]).kind == "published",
            }
            for r in roles
        },
        "paper": {r: {"title": title, "colour": colour(r)} for r, title in PAPER.items()},
        "texts": list(texts),
        "scenarios": cells,
    }  # fmt: skip


def _scenarios(run: Run, split: str) -> list[Scenario]:
    try:
        return run.scenarios(split)
    except TomError:  # the run's contexts and games leave none
        return []


def _scenario(
    run: Run, s: Scenario, forms: dict[str, str], texts: dict[str, int]
) -> dict[str, Any]:
    """What is played: the game's numbers and theory, and the messages by answer form."""
    prompts = {}
    for form in dict.fromkeys(forms.values()):
        said = messages(s, form, run.wording)
        lines = [[m.type, texts.setdefault(str(m.content), len(texts))] for m in said]
        prompts[form] = {"id": prompt_id(s, form, run.wording), "messages": lines}
    split, context, game = s.key
    return {
        "split": split, "context": context, "game": game, "name": s.name,
        "title": s.game.title or s.game.name, "kind": s.game_type, "theory": _theory(s.game),
        "prompts": prompts, "results": {}, "motivations": None,
    }  # fmt: skip


def _theory(game: TwoPlayerGame | PublicGoodsGame) -> dict[str, Any]:
    if isinstance(game, PublicGoodsGame):
        end = game.endowment
        others = game.players - 1
        return {
            "players": game.players, "endowment": end, "multiplier": game.multiplier,
            "mpcr": game.mpcr, "nash": game.nash(), "optimum": game.optimum(),
            "payoffs": [
                [game.payoff(own, [other] * others) for other in (0, end / 2, end)]
                for own in (0, end / 2, end)
            ],
        }  # fmt: skip
    return {
        "payoffs": dict(zip("RSTP", game.payoffs, strict=True)), "order": game.order,
        "dominant": game.dominant(), "nash": ["".join(pair) for pair in game.pure_nash()],
        "mixed": game.mixed_nash(), "welfare": ["".join(pair) for pair in game.welfare_optimum()],
    }  # fmt: skip


def _results(
    run: Run, role: str, scenarios: list[Scenario], answer: str
) -> dict[Scenario, dict[str, Any]]:
    """Choices of a role: counts with intervals, and exact probabilities; by scenario."""
    who = player_if_ready(run, role)
    if who is None:
        return {}
    if who.published:
        return _of_the_paper(who, scenarios)
    found = {}
    for s, draws in _held(run, role, scenarios, answer, run.profile.n, letter_only=True).items():
        unread = int(draws["choice"].isna().sum())
        given = draws["choice"].dropna().astype(str).value_counts().to_dict()
        found[s] = _counted(s, given, unread)
    if answer != "reasoning+choice":
        for s, (p, coverage) in held_readouts(run, who, list(found), answer).items():
            total = sum(p.values())
            found[s]["exact"] = {option: value / total for option, value in p.items()}
            found[s]["coverage"] = coverage
    return found


def _held(
    run: Run, role: str, scenarios: list[Scenario], answer: str, n: int, *, letter_only: bool
) -> dict[Scenario, pd.DataFrame]:
    """The draws of those scenarios that the ledger has all n of."""
    todo = plan(run, role, scenarios, answer, n, letter_only=letter_only)["to_ask"]
    whole = [s for s, missing in zip(scenarios, todo, strict=True) if not missing]
    if not whole:
        return {}
    draws = collect(run, role, whole, answer, n, letter_only=letter_only, progress=False)
    return {s: draws.iloc[i * n : (i + 1) * n] for i, s in enumerate(whole)}


def _of_the_paper(who: Player, scenarios: list[Scenario]) -> dict[Scenario, dict[str, Any]]:
    found = {}
    for s in scenarios:
        with suppress(TomError):  # the paper has no figures for it
            counts = published_distribution(who.card, s)
            found[s] = _counted(s, {str(choice): count for choice, count in counts.items()})
    return found


def _counted(s: Scenario, counts: dict[str, Any], unread: int = 0) -> dict[str, Any]:
    """Counts with the shares' 95 % Wilson intervals; means too where the options are numbers."""
    numbers = {option: int(counts.get(option, 0)) for option in options(s)}
    draws = sum(numbers.values())
    low, high = stats.wilson(list(numbers.values()), draws)
    result: dict[str, Any] = {
        "draws": draws, "unread": unread, "counts": numbers,
        "low": dict(zip(numbers, _plain(low), strict=True)),
        "high": dict(zip(numbers, _plain(high), strict=True)),
    }  # fmt: skip
    if s.game_type == "public_goods":
        rows = [("", int(option), count) for option, count in numbers.items()]
        table = pd.DataFrame(rows, columns=["model", "contribution", "count"])
        (row,) = contributions.summary(table).to_dict("records")
        result["mean"], result["se"] = _plain([row["mean"], row["se"]])
    return result


def _plain(values: Any) -> list[float | None]:
    """Numbers of JSON; what is none is null."""
    return [None if pd.isna(value) else float(value) for value in values]


def _motivations(run: Run, scenarios: list[Scenario]) -> dict[Scenario, dict[str, Any]]:
    """What the teacher said in the training scenarios."""
    p = run.profile
    here = [s for s in scenarios if s.split == "in_sample"]
    if not here or p.teacher_answer == "choice" or card(p.teacher).kind == "published":
        return {}
    said = {}
    held = _held(run, "teacher", here, p.teacher_answer, p.n_teacher, letter_only=False)
    for s, draws in held.items():
        texts = draws[draws["motivation"].fillna("").ne("")]
        first = texts.head(MOTIVATIONS)
        said[s] = {
            "asked": len(draws), "given": len(texts),
            "shown": [
                [None if pd.isna(choice) else str(choice), visible(str(motivation), LONGEST)]
                for choice, motivation in zip(first["choice"], first["motivation"], strict=True)
            ],
        }  # fmt: skip
    return said


def _published(s: Scenario) -> dict[str, dict[str, Any]]:
    """The paper's counts of a scenario, by the role that a model had there."""
    if s.game_type == "public_goods":
        goods = published.public_goods_roles().groupby("model", sort=False)
        return {
            str(role): _counted(
                s, dict(zip(part["contribution"].astype(str), part["count"], strict=True))
            )
            for role, part in goods
        }
    counts = published.roles()
    keys = zip(counts["split"], counts["context"], counts["game"], strict=True)
    return {
        str(row["model"]): _counted(s, {"C": row["cooperate"], "D": row["defect"]})
        for row in counts[[key == s.key for key in keys]].to_dict("records")
    }


def script(values: dict[str, Any]) -> str:
    """The data as a script, which a page opened from a folder may load; no text in it ends it."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return f"window.explorerData = {text.replace('<', chr(92) + 'u003c')};\n"


def add_to_page(app: Any, pagename: str, *_: Any) -> None:
    """Write the data beside the explorer's own files, and load them on its page alone."""
    if pagename != PAGE:
        return
    folder = Path(app.outdir) / "_static" / "explorer"
    folder.mkdir(parents=True, exist_ok=True)
    run = shown_run(Path(app.srcdir) / CHAPTER)
    (folder / "data.js").write_text(script(data(run)), encoding="utf-8")
    app.add_css_file("explorer/explorer.css")
    for place, name in enumerate(FILES):
        app.add_js_file(f"explorer/{name}", priority=900 + place, defer="defer")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("html-page-context", add_to_page)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
