"""The committed table says what was measured; the operations are counted as they should be."""

import json
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
HERE = ROOT / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of `benchmarks/` as a module, as it finds itself when it is run."""
    monkeypatch.syspath_prepend(str(HERE))
    spec = spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("report", monkeypatch)


@pytest.fixture
def bench(report: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("bench", monkeypatch)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("workers", monkeypatch)


committed = pytest.mark.skipif(
    not (HERE / "results.json").is_file(), reason="no bench has been run yet: make bench BENCH=full"
)


@committed
def test_the_committed_table_has_every_row_and_target(report: Any) -> None:
    table = json.loads((HERE / "results.json").read_text("utf-8"))
    assert list(table) == list(report.TARGETS)
    for id, row in table.items():
        assert row["target"] == report.TARGETS[id].value
        assert row["repetitions"] >= 2
        assert row["ours"] > 0 and row["ratio"] > 0


@committed
def test_the_committed_table_is_what_the_repetitions_give(report: Any) -> None:
    measured = json.loads((HERE / "measured.json").read_text("utf-8"))
    table = json.loads((HERE / "results.json").read_text("utf-8"))
    assert report.results(measured) == table
    assert (HERE / "RESULTS.md").read_text("utf-8") == report.render(table, measured)
    for row in measured["rows"].values():
        if row["peer"]:
            again = [a / b for a, b in zip(row["ours"], row["peer"], strict=True)]
            assert row["ratios"] == pytest.approx(again)


@committed
def test_the_committed_outputs_agree_with_the_peers(report: Any) -> None:
    checks = json.loads((HERE / "measured.json").read_text("utf-8"))["checks"]
    assert checks["greedy_transformers"]["same_tokens"] >= 16
    assert checks["readout_lm_eval"]["same_tokens"]
    assert checks["readout_lm_eval"]["largest_excess"] < 1e-4
    assert checks["loss_trl"]["largest_relative_difference"] < 1e-4


def findings(bench: Any, ours: list[float]) -> dict[str, Any]:
    """Raw measurements of an imagined bench of two rows, as the driver keeps them."""
    raw: dict[str, Any] = {"about/ours": {"torch": "1", "python": "3"}}
    for r, seconds in enumerate(ours):
        raw[f"lora/ours/{r}"] = {"seconds": seconds, "rows": 16, "loss": 2.0}
        raw[f"lora/trl/{r}"] = {"seconds": 8.0, "rows": 16, "loss": 2.0}
        raw[f"replay/{r}"] = {"seconds": 10.0 + r, "chapters": 8}
    return bench.evaluate(raw, bench.MODES["full"])


def test_a_ratio_is_the_median_within_repetitions(bench: Any, report: Any) -> None:
    measured = bench.merged({}, findings(bench, [1.0, 4.0, 2.0]), bench.MODES["full"])
    table = report.results(measured)
    assert table["lora_vs_trl"]["ratio"] == pytest.approx(4.0)
    assert table["lora_vs_trl"]["ours"] == pytest.approx(8.0)
    assert table["lora_vs_trl"]["met"]
    assert table["replay_seconds"] == {
        "ratio": 11.0, "target": 60.0, "ours": 11.0, "peer": None, "unit": "s",
        "repetitions": 3, "better": "lower", "met": True,
    }  # fmt: skip
    text = report.render(table, measured)
    assert "| `lora_vs_trl` |" in text and "`sample_vs_vllm`" in text.split("Not measured yet")[1]


def test_a_missed_target_is_said_so(bench: Any, report: Any) -> None:
    measured = bench.merged({}, findings(bench, [4.0, 4.0]), bench.MODES["full"])
    table = report.results(measured)
    assert not table["lora_vs_trl"]["met"]
    text = report.render(table, measured)
    assert "missed: `lora_vs_trl`" in text
    assert re.search(r"`lora_vs_trl`.*\*\*no\*\*", text)


def test_a_later_bench_replaces_only_what_it_measured(bench: Any) -> None:
    full = bench.MODES["full"]
    before = bench.merged({}, findings(bench, [1.0]), full)
    again = bench.evaluate({"replay/0": {"seconds": 5.0, "chapters": 8}}, bench.MODES["short"])
    after = bench.merged(before, again, bench.MODES["short"])
    assert after["rows"]["replay_seconds"]["ours"] == [5.0]
    assert after["rows"]["lora_vs_trl"] == before["rows"]["lora_vs_trl"]
    assert after["versions"] == before["versions"]


def test_a_measurement_is_made_once_and_kept(bench: Any, tmp_path: Path) -> None:
    first = bench.Bench(bench.MODES["tiny"], tmp_path, tmp_path)
    assert first.once("a", lambda: {"seconds": 1.0}) == {"seconds": 1.0}
    resumed = bench.Bench(bench.MODES["tiny"], tmp_path, tmp_path)
    assert resumed.once("a", lambda: pytest.fail("measured twice")) == {"seconds": 1.0}


def test_a_worker_answers_and_reports_errors_by_line() -> None:
    asked = '{"do": "about"}\n{"do": "nonsense"}\n'
    done = subprocess.run(
        [sys.executable, str(HERE / "workers.py"), "transformers"],
        input=asked, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["ok"]["python"] == sys.version.split()[0]
    assert second["error"].startswith("KeyError")


def test_operations_are_counted_by_the_definition(workers: Any) -> None:
    c = SimpleNamespace(
        hidden_size=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=6,
        num_hidden_layers=3, vocab_size=10,
    )  # fmt: skip
    weights = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6
    pairs = 5 * 6 // 2
    assert workers.forward_flops(c, 5, 1) == 3 * (2 * weights * 5 + 4 * pairs * 4) + 2 * 4 * 10
    # A group of one answer is one row; more answers cost less than as many rows.
    c.hidden_size, c.intermediate_size = 512, 1024
    one, two = (workers.training_flops(c, 20, [4] * g) for g in (1, 2))
    assert one < two < 2 * one
    plain = workers.forward_flops(c, 24, 4)
    assert 1.8 * plain < one < 2.5 * plain  # frozen weights have no gradient of their own: not 3


def test_tokens_are_counted_up_to_the_end(workers: Any) -> None:
    assert workers.until_end([5, 6, 2, 2, 2], {2}) == [5, 6, 2]
    assert workers.until_end([5, 6], {2}) == [5, 6]


def test_a_prompt_is_lengthened_exactly_and_marked(
    workers: Any, smol_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "tokenizer", lambda: smol_model[1])
    names = [["in_sample", "IR", "stag_hunt"], ["in_sample", "IR", "snowdrift"]]
    first, second = workers.prompts(names, "choice", 425, "7.")
    assert len(first["tokens"]) == len(second["tokens"]) == 425
    assert first["messages"][0] == second["messages"][0]  # a context's games share it
    assert first["messages"][0][1].startswith("7. ")
    plain = workers.prompts(names[:1], "choice", 0, "")[0]
    assert len(plain["tokens"]) < 425 and plain["messages"][1:] == first["messages"][1:]


def test_figures_and_lines(report: Any) -> None:
    assert report.figure(0.04567) == "0.0457" and report.figure(123.4) == "123"
    base, each = report.line_through({"1": 3.0, "2": 5.0, "5": 11.0})
    assert (base, each) == (pytest.approx(1.0), pytest.approx(2.0))
