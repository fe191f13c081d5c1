"""The targets, and how a bench's findings become results.json, RESULTS.md and scaling.png."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

LENGTH = 425
"""Tokens of a prompt in the table."""

Data = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What a row has to reach, and what it is."""

    value: float
    work: str
    peer: str
    unit: str
    better: str = "higher"


TARGETS = {
    "sample_vs_generate": Target(
        8.0,
        "64 answers of up to 64 tokens per prompt, Transformers fp32",
        "`generate(num_return_sequences=64)`",
        "tokens/s",
    ),
    "sample_vs_vllm": Target(1.5, "the same", "vLLM, CPU build, fp32, prefix caching", "tokens/s"),
    "choices_vs_pipeline": Target(
        100.0,
        "choices only, 300 draws of 20 scenarios",
        "text-generation pipeline, one draw at a time (extrapolated)",
        "draws/s",
    ),
    "readout_vs_lm_eval": Target(
        2.0,
        "exact readout of the 52 two-player scenarios, fp32",
        "lm-evaluation-harness, loglikelihood of C and D",
        "scenarios/s",
    ),
    "llamacpp_overhead": Target(
        0.95,
        "64 answers through LangChain from llama.cpp in this process",
        "llama.cpp's server called directly, same requests",
        "tokens/s",
    ),
    "lora_vs_trl": Target(
        4.0,
        "LoRA steps, 16 answers of about 60 tokens after one prompt, fp32",
        "TRL `SFTTrainer`, same rows",
        "rows/s",
    ),
    "peak_prefill": Target(
        0.70,
        "reading prompts",
        "fp32 matrix product rate of the machine",
        "Gflop/s",
    ),
    "peak_training": Target(
        0.60,
        "LoRA steps, 16 answers after one prompt",
        "fp32 matrix product rate of the machine",
        "Gflop/s",
    ),
    "replay_seconds": Target(
        60.0,
        "all chapters executed from a full ledger, no model",
        "",
        "s",
        better="lower",
    ),
}


def results(measured: Data) -> Data:
    """`results.json` from `measured.json`: medians against targets."""
    out: Data = {}
    for id, target in TARGETS.items():
        row = measured["rows"].get(id)
        if row is None:
            continue
        lower = target.better == "lower"
        ratio = median(row["ours"]) if lower else median(row["ratios"])
        out[id] = {
            "ratio": round(ratio, 4),
            "target": target.value,
            "ours": round(median(row["ours"]), 4),
            "peer": round(median(row["peer"]), 4) if row["peer"] else None,
            "unit": target.unit,
            "repetitions": len(row["ours"]),
            "better": target.better,
            "met": ratio <= target.value if lower else ratio >= target.value,
        }
    return out


def figure(value: float) -> str:
    """Three significant figures, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".split("e")[1]))
    return f"{value:.{digits}f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def line_through(points: dict[str, float]) -> tuple[float, float]:
    """Least squares: what it takes at none, and what each one more adds."""
    x, y = [float(k) for k in points], list(points.values())
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    slope /= sum((a - mx) ** 2 for a in x) or 1.0
    return my - slope * mx, slope


def captioned(name: str, caption: str) -> list[str]:
    """The lines before a table of the book, which numbers it; `:::` ends it."""
    return [f":::{{table}} {caption}", f":name: tab-{name}", ""]


def render(table: Data, m: Data) -> str:
    """RESULTS.md: every number comes from `results.json` and `measured.json`."""
    say: list[str] = ["# Speed, measured beside its peers", ""]
    about, versions = m["machine"], m["versions"]
    own = versions.get("ours", {})
    say += [
        "Each row was measured beside its peer in the same order of processes, which take turns; the ratio",
        "is the median over repetitions of the ratio within a repetition. All rows are of "
        f"`qwen2.5-coder-0.5b`, with prompts of {LENGTH} tokens (a",
        "scenario whose context is repeated up to that length) that no process had read before. "
        "Tokens are counted up to and",
        "including an answer's end token.",
        "",
        *captioned("speed", "What was measured, beside what, and the target of each."),
        "| id | work | beside | ours | peer | unit | ratio | target | reached | repetitions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for id, row in table.items():
        target = TARGETS[id]
        lower = target.better == "lower"
        ratio = "" if lower else figure(row["ratio"])
        goal = f"at most {figure(target.value)} s" if lower else f"at least {target.value:g}"
        say.append(
            f"| `{id}` | {target.work} | {target.peer or 'nothing'} | {figure(row['ours'])} | "
            f"{figure(row['peer']) if row['peer'] is not None else ''} | {row['unit']} | {ratio} | "
            f"{goal} | {'yes' if row['met'] else '**no**'} | {row['repetitions']} |"
        )
    say += [":::"]
    missing = [id for id in TARGETS if id not in table]
    if missing:
        say += ["", f"Not measured yet: {', '.join(f'`{id}`' for id in missing)} (`BENCH=full`)."]
    if m.get("short"):
        said = "Short forms of the long rows: what `make bench` measures without `BENCH=full`."
        say += ["", *captioned("speed-short", said)]
        say += ["| id | size | ours | peer | unit | ratio |", "|---|---|---|---|---|---|"]
        for id, row in m["short"].items():
            say.append(
                f"| `{id}` | {row['size']} | {figure(median(row['ours']))} | "
                f"{figure(median(row['peer']))} | {TARGETS[id].unit} | {figure(median(row['ratios']))} |"
            )
        say += [":::"]
    say += ["", "## How it was measured", ""]
    say += _how(table, m)
    say += ["", "## Whether the outputs are the same", "", *_checks(m["checks"])]
    say += ["", "## What limits it", "", *_limits(table, m)]
    if m.get("scaling"):
        say += ["", "## What cost depends on", "", *_scaling(m)]
    say += ["", "## Machine and versions", ""]
    say += [
        f"- {about['processor']}, {about['cores']} cores ({about['instructions']}), "
        f"{about['memory_gib']} GiB, {about['system']}, Python {own.get('python', '')}, "
        f"{own.get('threads', '')} threads, torch's kernels for {own.get('simd', '')}."
    ]
    if about.get("cores_used"):
        say.append(
            f"- The timed processes had {figure(about['cores_used'])} of {about['cores']} cores (median): "
            "less than all means that something else ran, or that part of the work is not parallel."
        )
    for kind, found in versions.items():
        named = ", ".join(f"{k} {v}" for k, v in found.items() if k not in ("threads", "simd"))
        say.append(f"- `{kind}`: {named}")
    say += [
        "",
        "```bash",
        "make bench               # the table without its long rows",
        "make bench BENCH=full    # all of it",
        "```",
        "",
        "A bench that is stopped goes on where it was. `benchmarks/measured.json` has every repetition.",
    ]
    return "\n".join(say) + "\n"


def _how(table: Data, m: Data) -> list[str]:
    say: list[str] = []
    rows = m["rows"]
    if "choices_vs_pipeline" in rows:
        row = rows["choices_vs_pipeline"]
        say.append(
            f"- `choices_vs_pipeline`: {row['size']}, {row['all']} draws in all. The pipeline was timed on "
            f"{row['timed']} of them in each repetition ({100 * row['timed'] / row['all']:.2g} %); the rest is "
            "taken to be as fast. Both stop at the model's own end or after 8 tokens; ours once the choice "
            "is decided."
        )
    if "lora_vs_trl" in rows:
        say.append(
            f"- `lora_vs_trl`: LoRA of rank 8 on q and v, AdamW; one optimizer step on {rows['lora_vs_trl']['size'].split()[0]} "
            "rows that share their prompt, real answers of the shipped teacher. `SFTTrainer` without gradient "
            f"checkpointing (it would be slower), batches of {rows['lora_vs_trl']['batch']} (the faster of 1 and 4)."
        )
    if "peak_prefill" in rows:
        say.append(
            "- `peak_*`: operations that the work needs, 2 per weight and token forward, the embedding left "
            "out, the output layer where a next token is wanted, attention over pairs that see each other; "
            "backward, the gradients of inputs for frozen weights and of the LoRA matrices, nothing below the "
            "first layer. Divided by the best sustained rate of large fp32 products (torch and numpy) just "
            "before and after."
        )
    if "llamacpp_overhead" in rows:
        pairs = rows["llamacpp_overhead"]["tokens"]
        say.append(
            "- `llamacpp_overhead`: same weights (Q4_K_M), slots and requests; tokens per repetition, ours and "
            f"the server's: {', '.join(f'{a}/{b}' for a, b in pairs)}."
        )
    if "readout_plain" in m:
        say.append(
            f"- `readout_vs_lm_eval`: with the {m['readout_plain']['scenarios']} prompts as they are, not "
            f"lengthened, the ratio is {figure(m['readout_plain']['ratio'])}. The harness scores the letter; ours "
            "also that the answer ends after it."
        )
    if "replay_seconds" in rows:
        say.append(
            f"- `replay_seconds`: `tom run`, {rows['replay_seconds']['size']} with papermill, "
            "starting Python and kernels included; it is an error here if a model is asked."
        )
    return say


def _checks(checks: Data) -> list[str]:
    say: list[str] = []
    for kind, name in (("transformers", "`generate`"), ("vllm", "vLLM")):
        c = checks.get(f"greedy_{kind}")
        if c:
            say.append(
                f"- Greedy answer, ours and {name}: "
                + (
                    f"all {c['tokens']} tokens equal."
                    if c["equal"]
                    else f"the first {c['same_tokens']} of {c['tokens']} tokens equal, then they part "
                    "(rounding decides where two tokens are nearly as likely)."
                )
            )
    c = checks.get("readout_lm_eval")
    if c:
        say.append(
            f"- Exact readout and lm-evaluation-harness, {c['scenarios']} scenarios"
            f"{', the same tokens' if c['same_tokens'] else ', NOT the same tokens'}: largest difference of "
            f"P(C)/(P(C)+P(D)) {c['largest_gap_p_cooperate']:.1e}. Ours says that the answer ends after the "
            "letter, so it has to lie between the harness's probabilities of the letter and of the letter with "
            f'`"}}` after it; it leaves that range by at most {c["largest_excess"]:.1e}.'
        )
    c = checks.get("loss_trl")
    if c:
        say.append(
            "- Loss on the same rows, ours and TRL's: largest relative difference "
            f"{c['largest_relative_difference']:.1e}."
        )
    return say


def _limits(table: Data, m: Data) -> list[str]:
    where = m.get("where", {})
    names = {"sampling": "Sampling", "prefill": "Reading prompts", "train": "Training"}
    say: list[str] = []
    missed = [id for id, row in table.items() if not row["met"]]
    if missed:
        say.append(f"Targets that are missed: {', '.join(f'`{id}`' for id in missed)}.")
    elif len(table) == len(TARGETS):
        say.append("All targets are reached.")
    for what, name in names.items():
        if what not in where:
            continue
        top = list(where[what]["top"].items())[:5]
        say.append(
            f"- {name}: {percent(where[what]['products'])} of operator time inside matrix products; the longest "
            f"operators are {', '.join(f'`{k}` {percent(v)}' for k, v in top)}."
        )
        if f"shapes_{what}" in where:
            say.append(
                "  The layers' own products, at these sizes and with nothing else done, reach "
                f"{percent(where[f'shapes_{what}'])} of the rate of large ones."
            )
    return say


def _scaling(m: Data) -> list[str]:
    curve = m["scaling"]
    say = ["![Cost against draws, scenarios and answers per prompt](scaling.png)", ""]
    headers = {
        "draws": ("seconds", "for one scenario, by draws of its choice"),
        "answers": ("seconds", "for one prompt, by answers of up to 64 tokens"),
        "scenarios": ("seconds", "in all, by scenarios with 300 choices each"),
        "groups": ("rows per second", "in training, by answers per prompt"),
    }
    for kind, (unit, by) in headers.items():
        points = curve[kind]
        values = [
            figure(float(n) / s if kind == "groups" else s) for n, s in points.items()
        ]  # fmt: skip
        say += [
            *captioned(f"scaling-{kind}", f"{unit.capitalize()} {by}."),
            f"| {by.rpartition('by ')[2].split(' ')[0]} | {' | '.join(points)} |",
            f"|---|{'---|' * len(points)}",
            f"| {unit} | {' | '.join(values)} |",
            ":::",
            "",
        ]
    base, each = line_through(curve["draws"])
    last = max(map(int, curve["draws"]))
    say.append(
        "**Draws.** Draws that have said the same are one row of the batch, so what grows with draws is the "
        f"choosing, not the reading: {last} draws take "
        f"{figure(curve['draws'][str(last)] / curve['draws']['1'])} times as long as one. Answers in words part after "
        "a few tokens; what grows then is one row per answer and token, not the prompt."
    )
    base, each = line_through(curve["answers"])
    most = max(map(int, curve["answers"]))
    say[-1] += (
        f" Each further answer adds {figure(each)} s here; "
        f"{most} answers take {figure(curve['answers'][str(most)] / curve['answers']['1'])} times as long as one."
    )
    base, each = line_through(curve["scenarios"])
    say += [
        "",
        f"**Scenarios.** Cost grows in proportion: {figure(each)} s for each more, since each brings a prompt of "
        "its own; the games of a context share its system prompt, so only the first of four pays for it.",
    ]
    base, each = line_through(curve["groups"])
    say += [
        "",
        f"**Answers per prompt in training.** A sequence costs its prompt once ({figure(base)} s) and {figure(each)} s "
        "for each answer, so rows per second rise until the answers outweigh the prompt; from there on they "
        f"would level off at {figure(1 / each) if each > 0 else 'no bound seen'} rows per second.",
    ]
    return say


def draw(m: Data, path: Path) -> None:
    """scaling.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve, rows = m["scaling"], m["rows"]
    shape, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")

    def points(kind: str) -> tuple[list[int], list[float]]:
        held = sorted((int(k), v) for k, v in curve[kind].items())
        return [k for k, _ in held], [v for _, v in held]

    x, y = points("draws")
    axes[0].loglog(x, y, "o-", color="#0072B2", label="ours, choices")
    axes[0].loglog(*points("answers"), "s-", color="#009E73", label="ours, answers of 64 tokens")
    if "choices_vs_pipeline" in rows:
        each = 1 / median(rows["choices_vs_pipeline"]["peer"])
        axes[0].loglog(x, [each * n for n in x], "--", color="#D55E00", label="pipeline, choices")
    axes[0].set(xlabel="draws per scenario", ylabel="seconds")
    x, y = points("scenarios")
    axes[1].plot(x, y, "o-", color="#0072B2", label="ours, 300 choices each")
    axes[1].set(xlabel="scenarios", ylabel="seconds", ylim=(0, None))
    x, y = points("groups")
    axes[2].plot(x, [n / s for n, s in zip(x, y, strict=True)], "o-", color="#0072B2", label="ours")
    if "lora_vs_trl" in rows:
        axes[2].axhline(
            median(rows["lora_vs_trl"]["peer"]), ls="--", color="#D55E00", label="TRL SFTTrainer"
        )
    axes[2].set(xlabel="answers per prompt", ylabel="training rows/s", ylim=(0, None))
    for one in axes:
        one.legend(frameon=False, fontsize=8)
        one.spines[["top", "right"]].set_visible(False)
    shape.savefig(path, dpi=110, metadata={"Software": None})


def write(measured: Data, to: Path) -> None:
    """results.json, measured.json, RESULTS.md and, where there is a curve, scaling.png."""
    to.mkdir(parents=True, exist_ok=True)
    measured = json.loads(json.dumps(measured))  # as it will be read back
    table = results(measured)
    (to / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (to / "results.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (to / "RESULTS.md").write_text(render(table, measured), encoding="utf-8")
    if measured.get("scaling"):
        draw(measured, to / "scaling.png")
