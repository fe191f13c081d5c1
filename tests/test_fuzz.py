"""Whatever a text holds that comes from elsewhere, it is read, counted, or refused in one line.

One test for each kind of foreign text; `FUZZ=20` makes each twenty times as long, at random.
"""

import contextlib
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tomlib import alignment, answers, contributions, ledger, models, readout, weights
from tomlib.cli import _parameters
from tomlib.engines import Engine
from tomlib.errors import TomError, printable
from tomlib.finetune import check_base
from tomlib.models import card
from tomlib.profiles import SHIPPED, load_profile, new_run, open_run
from tomlib.prompts import ANSWERS, load_wording, messages, wording_names
from tomlib.reproduce import read_manifest, verify_run
from tomlib.scenarios import find, load, root

LONG = int(os.environ.get("FUZZ", "1"))


def often(examples: int) -> Any:
    return settings(
        max_examples=examples * LONG, deadline=None, suppress_health_check=list(HealthCheck)
    )


@contextlib.contextmanager
def one_line(*parts: str) -> Iterator[None]:
    """What goes wrong within is a TomError in one printable line that names these parts."""
    try:
        yield
    except TomError as error:
        said = str(error)
        assert said and said.isprintable(), said
        assert all(part in said for part in parts), said
        assert len(said) < 3000


def damaged(data: st.DataObject, whole: bytes, most: int = 40) -> bytes:
    """A file with a piece cut out and something else in its place."""
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + most)))
    piece = data.draw(
        st.binary(max_size=8)
        | st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass"))
        | st.sampled_from(
            [b"{R!r}", b"{", b"}", b"{x}", b"nan", b"-inf", b"\x00", b"[[", b"9" * 40]
        )
    )
    return whole[:start] + piece + whole[stop:]


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["<script>", "../..", "\x1b[31m", "\u202e"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)

# --- answers --------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            "{",
            "}",
            '"',
            "'",
            "choice",
            "contribution",
            "motivation",
            ":",
            "C",
            "D",
            " ",
            "\n",
            "I",
        ),
        *("I choose ", "because", "sorry", "\\", "**", "\u202e", "\x1b[31m", "<b>", "10", "\ud800"),
    ]
)
TEXTS = st.text(max_size=60) | st.lists(PIECES, max_size=14).map("".join)
GAMES = ("two_player", "public_goods")


@often(150)
@given(TEXTS, st.sampled_from(ANSWERS), st.sampled_from(GAMES), st.sampled_from(["stop", "length"]))
def test_any_answer_has_one_outcome(text: str, form: str, game: Any, finish: str) -> None:
    found = answers.read(text, form, game, finish)
    assert found.outcome in answers.OUTCOMES
    assert (found.choice is not None) == (found.outcome == "ok")
    if found.choice is not None:
        assert found.choice in (("C", "D") if game == "two_player" else range(11))


OUTCOMES = st.sampled_from(["C", "D", "unparsed", "refused", "truncated"])
ROLES = ("teacher", "student", "tuned")


def drawn(outcomes: list[tuple[str, str, str]]) -> pd.DataFrame:
    """Draws from (model, game, what became of it)."""
    return pd.DataFrame(
        [
            ("in_sample", "IR", game, model, "choice", what if len(what) == 1 else None, outcome)
            for model, game, what in outcomes
            for outcome in ["ok" if len(what) == 1 else what]
        ],
        columns=["split", "context", "game", "model", "answer", "choice", "outcome"],
    )


@often(15)
@given(
    st.lists(
        st.tuples(st.sampled_from(ROLES), st.sampled_from(["stag_hunt", "snowdrift"]), OUTCOMES),
        max_size=40,
    )
)
def test_no_draw_is_dropped_by_any_table(outcomes: list[tuple[str, str, str]]) -> None:
    """Every draw is counted as read or as unread, in the counts and in all that is made of them."""
    # Each model answers each game at least once, perhaps unreadably.
    outcomes += [(m, g, "unparsed") for m in ROLES for g in ("stag_hunt", "snowdrift")]
    counts = alignment.cooperation(drawn(outcomes))
    unread = counts[list(alignment.UNREAD)].sum(axis=1)
    assert int(counts[["cooperate", "defect"]].to_numpy().sum() + unread.sum()) == len(outcomes)
    rated = alignment.rates(counts)
    assert rated["rate"].isna().eq(rated["draws"].eq(0)).all()
    assert rated["draws"].add(unread).sum() == len(outcomes)
    assert rated["unread"].tolist() == unread.tolist()
    side = alignment.compare(counts)
    assert side["unread"].sum() == unread.sum()
    improved = alignment.improvement(side)
    assert improved["unread"].sum() == unread.sum()
    assert (improved["verdict"].eq("undefined") | improved["improvement"].notna()).all()
    for by in ("game", "context", "all"):
        table = alignment.improvement_by(side, by, resamples=20)
        assert table["unread"].sum() == unread.sum()  # of undefined scenarios as well
        assert table["scenarios"].sum() + table["undefined"].sum() == len(side)
    assert alignment.sensitivity(counts)["unread"].sum() == unread.sum()


@often(40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(ROLES),
            st.one_of(st.integers(0, 10), st.none()),
            st.sampled_from(["unparsed", "refused", "truncated"]),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_no_contribution_is_dropped(given_: list[tuple[str, int | None, str]]) -> None:
    table = pd.DataFrame(
        [(m, c, "ok" if c is not None else why) for m, c, why in given_],
        columns=["model", "choice", "outcome"],
    ).astype({"choice": object})
    counts = contributions.counts(table)
    assert counts["count"].sum() == len(given_)
    summary = contributions.summary(counts)
    assert (summary["draws"] + summary["unread"]).sum() == len(given_)
    assert summary["unread"].sum() == sum(c is None for _, c, _ in given_)


# --- files that a user writes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scenarios."""
    return Path(
        shutil.copytree(
            root() / "data" / "scenarios", tmp_path_factory.mktemp("fuzz") / "scenarios"
        )
    )


@often(80)
@given(data=st.data())
def test_wordings(folder: Path, data: st.DataObject) -> None:
    path = folder / "wordings.toml"
    whole = (root() / "data" / "scenarios" / "wordings.toml").read_bytes()
    path.write_bytes(damaged(data, whole))
    load_wording.cache_clear()
    with one_line(str(path)):
        assert wording_names(folder)
        for scenario in (find("IR/stag_hunt"), find("party/public_goods")):
            for form in ANSWERS:
                said = messages(scenario, form, load_wording("replies", folder))
                assert [m.type for m in said] == ["system", "human", "ai"]
    load_wording.cache_clear()


@pytest.mark.parametrize("name", ["contexts.toml", "games.toml"])
@often(50)
@given(data=st.data())
def test_scenarios(folder: Path, name: str, data: st.DataObject) -> None:
    whole = (root() / "data" / "scenarios" / name).read_bytes()
    (folder / name).write_bytes(damaged(data, whole))
    with one_line(str(folder)):
        loaded = load(folder)
        assert len({s.key for s in loaded}) == len(loaded)
    (folder / name).write_bytes(whole)


@often(80)
@given(data=st.data())
def test_profiles(folder: Path, data: st.DataObject) -> None:
    path = folder / "mine.toml"
    path.write_bytes(damaged(data, (root() / "profiles" / "smoke.toml").read_bytes()))
    with one_line():
        profile = load_profile(str(path))
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", profile.name)
        assert profile.n >= 1 and profile.temperature >= 0


@often(80)
@given(data=st.data())
def test_model_cards(folder: Path, data: st.DataObject) -> None:
    path = folder / "models.toml"
    path.write_bytes(damaged(data, (root() / "data" / "models.toml").read_bytes()[-9000:]))
    with one_line():
        for one in models._read(path):
            weights.is_fetched(one)
            with one_line():
                if one.kind != "hub":
                    weights.weights_id(one)


# --- parameters -----------------------------------------------------------------------------------


FIELDS = [*load_profile("smoke").__dataclass_fields__, "profile", "replay", "n ", "chapter", "x"]


@often(150)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), VALUES, max_size=3))
@example({"name": "../../etc"})
@example({"profile": "a" * 5000})
@example({"profile": "a\x00b"})
def test_parameters_of_a_notebook(given_: dict[str, Any]) -> None:
    with one_line():
        run = open_run("04-in-sample", {"profile": "smoke"} | given_)
        assert run.folder.parent == new_run(load_profile("smoke")).folder.parent


@pytest.mark.parametrize("name", ["n", "seed", "profile", "replay", "contexts", "top_p", "new"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_beyond_all_bounds(name: str, sign: int) -> None:
    """Python itself refuses to write such a number out."""
    huge = sign * (1 << 20_000)
    for value in (huge, [huge], {"x": huge}):
        with pytest.raises(TomError) as stopped:
            open_run("04-in-sample", {"profile": "smoke"} | {name: value})
        assert str(stopped.value).isprintable()


@often(100)
@given(st.sampled_from(FIELDS), st.text(max_size=12) | VALUES.map(str))
def test_parameters_of_the_command_line(name: str, text: str) -> None:
    with one_line():
        load_profile("smoke", **_parameters([(name, text)]))


# --- the record of a run --------------------------------------------------------------------------


def line(**changes: Any) -> dict[str, Any]:
    plain = {
        "model": "m", "weights": "0" * 16, "adapter": None, "split": "in_sample", "context": "IR",
        "game": "stag_hunt", "payoffs": [10.0, 2.0, 5.0, 3.0], "answer": "choice",
        "prompt": "1" * 16, "temperature": 0.8, "top_p": 1.0, "max_new_tokens": 8, "seed": 1,
        "repetition_penalty": 1.0, "index": 0, "text": '{"choice": "C"}', "choice": "C",
        "outcome": "ok", "new_tokens": 2,
        "engine": "e", "time": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    known = ledger.SCHEMA["draws"]
    assert set(plain) <= set(known), "the schema has changed: change this line with it"
    return plain | changes


def written(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@often(120)
@given(
    changes=st.dictionaries(st.sampled_from(list(line())) | st.text(max_size=5), VALUES, max_size=2)
)
@example(changes={"context": "<script>alert(1)</script>"})
@example(changes={"index": 1 << 70})
def test_ledger_lines(folder: Path, changes: dict[str, Any]) -> None:
    run = folder / "run"
    written(run / "draws" / "s.jsonl", [line(), {**line(index=1), **changes}])
    with one_line("s.jsonl, line "):
        frame = ledger.Ledger(run).draws()
        assert len(frame) == 2
        for name in ("model", "split", "context", "game", "answer"):
            assert not frame[name].str.contains(r"[<>&`$|*\s]").any()
    table = ledger.verify(run)
    assert table["problem"].map(str.isprintable).all()


@often(12)
@given(data=st.data())
def test_manifests(folder: Path, data: st.DataObject) -> None:
    shipped = root() / "data" / "runs" / SHIPPED / "manifest.json"
    manifest = json.loads(shipped.read_text("utf-8"))
    place = folder / "shipped"
    place.mkdir(exist_ok=True)
    key = data.draw(st.sampled_from([*manifest, *manifest["profile"]]))
    where = manifest if key in manifest else manifest["profile"]
    where[key] = data.draw(VALUES)
    (place / "manifest.json").write_text(json.dumps(manifest))
    with one_line():
        verify_run(place)
    (place / "manifest.json").write_bytes(damaged(data, shipped.read_bytes()))
    with one_line("manifest.json"):
        assert isinstance(read_manifest(place), dict)


@often(60)
@given(data=st.data())
def test_records_of_adapters(folder: Path, data: st.DataObject) -> None:
    shipped = next((root() / "data" / "runs" / SHIPPED / "adapters").glob("family-*"))
    place = folder / "adapter"
    place.mkdir(exist_ok=True)
    whole = (shipped / "training.json").read_bytes()
    record = json.dumps(data.draw(VALUES), default=str) if data.draw(st.booleans()) else None
    raw = record.encode("utf-8", "replace") if record else damaged(data, whole)
    (place / "training.json").write_bytes(raw)
    with one_line(str(place)):
        check_base(place, card("qwen2.5-coder-0.5b"))


# --- what a server says ---------------------------------------------------------------------------


class Saying:
    """A chat model that gives what it is told to, through LangChain's own classes."""

    def __init__(self, message: Any, info: Any) -> None:
        self.message, self.info = message, info

    def generate(self, *_: Any, **__: Any) -> Any:
        from langchain_core.messages import AIMessage
        from langchain_core.outputs import ChatGeneration, LLMResult

        said = AIMessage(content=self.message, response_metadata={"logprobs": self.info})
        return LLMResult(generations=[[ChatGeneration(message=said)]])


TOKENS = st.fixed_dictionaries(
    {},
    optional={
        "token": st.sampled_from(["C", "D", '"', "10", "1"]) | VALUES,
        "logprob": st.floats() | st.just(-1.0) | VALUES,
        "top_logprobs": VALUES,
    },
)
LOGPROBS = VALUES | st.fixed_dictionaries(
    {
        "content": st.lists(
            st.fixed_dictionaries({"top_logprobs": st.lists(TOKENS, max_size=4)}) | VALUES,
            max_size=2,
        )
        | VALUES
    }
)


@often(200)
@given(LOGPROBS, st.floats(0.1, 2))
@example({"content": [{"top_logprobs": [{"token": "C", "logprob": float("nan")}]}]}, 0.8)
@example({"content": [{"top_logprobs": [{"token": "C", "logprob": 700.0}]}]}, 0.8)
@example({"content": [{"top_logprobs": [{"token": "C", "logprob": -746.0}]}]}, 1.0)
def test_log_probabilities_of_a_server(info: Any, temperature: float) -> None:
    said = messages(find("IR/stag_hunt"), "choice", load_wording("replies"))
    engine = Engine(Saying("C", info), "endpoint (x)", 1, False)  # type: ignore[arg-type]
    with one_line("endpoint (x)"):
        p, coverage = readout.option_probabilities(engine, said, ["C", "D"], temperature)
        assert (p >= 0).all() and 0 <= coverage <= 1 + 1e-6


@often(100)
@given(st.text(max_size=20) | st.text(alphabet="\x00\x1b\u202e\n\r\t\u2028a", max_size=20))
def test_messages_of_errors_cannot_steer_a_terminal(text: str) -> None:
    assert str(TomError(text)).isprintable()
    plain = "".join(c for c in text if c.isprintable() and c != "\\")
    assert all(c in printable(text) for c in plain)


@often(60)
@given(st.text(max_size=30))
def test_toml_that_is_none_is_a_text(text: str) -> None:
    (value,) = _parameters([("x", text)]).values()
    try:
        expected = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        expected = text
    assert value == expected or value != value


def test_the_line_above_is_one(tmp_path: Path) -> None:
    """The fuzzers start from what is right, so that they reach what lies behind the first check."""
    written(tmp_path / "draws" / "s.jsonl", [line(), line(index=1)])
    assert len(ledger.Ledger(tmp_path).draws()) == 2
    assert ledger.verify(tmp_path)["problem"].tolist() == [""]
