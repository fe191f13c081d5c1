"""The ledger: what is written is read back, once; crashes lose nothing; damage is named."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tomlib.errors import TomError
from tomlib.ledger import DRAW_KEY, KINDS, SCHEMA, Ledger, shard_name, verify


def draw(index: int = 0, **changes: Any) -> dict[str, Any]:
    row = {
        "model": "tiny",
        "weights": "0123456789abcdef",
        "adapter": None,
        "split": "in_sample",
        "context": "IR",
        "game": "stag_hunt",
        "payoffs": [10, 2, 5, 3],
        "answer": "choice+motivation",
        "prompt": "fedcba9876543210",
        "temperature": 0.8,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 80,
        "seed": 4_000_000_000,
        "index": index,
        "text": '{"choice": "C", "motivation": "Peace."}',
        "choice": "C",
        "outcome": "ok",
        "new_tokens": 12,
        "engine": "none 1.0",
        "time": "2026-01-31T12:00:00Z",
    }
    return row | changes


def readout(**changes: Any) -> dict[str, Any]:
    row = {name: value for name, value in draw().items() if name in SCHEMA["readouts"]}
    return row | {"p": {"C": 0.4, "D": 0.59}, "coverage": 0.99} | changes


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "run")


def shard_of(book: Ledger, name: str = "s") -> Path:
    return book.folder / "draws" / f"{name}.jsonl"


def test_what_is_written_is_read_back(book: Ledger) -> None:
    odd = "né\u2028\x00\ud800<script>\r\n\t\x1b[31m\u202e"
    rows = [
        draw(0, adapter="a" * 16),
        draw(1, text=odd, choice=None, outcome="unparsed", time="2026-02-01T00:00:00Z"),
        draw(2, text='{"choice": "D"}', answer="choice", choice="D"),
        draw(
            0,
            game="public_goods",
            payoffs=[4, 10, 2.5],
            prompt="0" * 16,
            text='{"contribution": 5, "motivation": "Half."}',
            choice=5,
        ),
    ]
    book.append("draws", ["tiny", "choice", "IR"], rows)
    path = book.folder / "draws" / "tiny--choice--IR.jsonl"
    assert lines(path) == rows
    assert [list(row) for row in lines(path)] == [list(SCHEMA["draws"])] * 4
    for reader in (book, Ledger(book.folder)):
        frame = reader.draws()
        assert frame["choice"].tolist() == ["C", None, "D", 5]
        assert type(frame["choice"][3]) is int
        assert frame["motivation"].tolist() == ["Peace.", None, None, "Half."]
        assert frame["adapter"].tolist() == ["a" * 16, None, None, None]
        assert frame["text"][1] == odd
        assert frame["payoffs"][3] == (4, 10, 2.5)
        assert frame["seed"].tolist() == [4_000_000_000] * 4
        assert set(frame.columns) == {*SCHEMA["draws"], "motivation"}
        assert reader.draws(choice="D")["index"].tolist() == [2]
        assert len(reader.draws(adapter=None, split="in_sample")) == 3
        assert len(reader.draws(model="large")) == 0
    with pytest.raises(TomError, match="did you mean 'model'"):
        book.draws(modell="tiny")


def test_readouts(book: Ledger) -> None:
    book.append("readouts", "s", [readout(), readout(prompt="0" * 16, p={"0": 0.5, "10": 0.1})])
    assert [row["p"] for row in Ledger(book.folder).readouts()] == [
        {"C": 0.4, "D": 0.59},
        {"0": 0.5, "10": 0.1},
    ]
    assert len(book.readouts(prompt="0" * 16)) == 1
    assert len(book.draws()) == 0
    with pytest.raises(TomError, match="already"):
        book.append("readouts", "s", [readout(coverage=0.5)])
    with pytest.raises(TomError, match="have no 'index'"):
        book.readouts(index=3)


def test_an_empty_ledger_has_the_columns_and_makes_no_folder(book: Ledger) -> None:
    frame = book.draws()
    assert len(frame) == 0 and set(frame.columns) == {*SCHEMA["draws"], "motivation"}
    assert len(book.draws(adapter=None, index=3)) == 0
    assert book.readouts() == []
    book.append("draws", "s", [])
    assert not book.folder.exists()


def test_a_change_to_a_frame_does_not_reach_the_next(book: Ledger) -> None:
    book.append("draws", "s", [draw()])
    frame = book.draws()
    frame["model"] = "changed"
    frame.loc[0, "choice"] = "D"
    assert book.draws()[["model", "choice"]].values.tolist() == [["tiny", "C"]]


# -- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAW_KEY)
def test_every_part_of_the_key_tells_draws_apart(book: Ledger, name: str) -> None:
    other = {"adapter": "b" * 16, "weights": "b" * 16, "prompt": "b" * 16, "answer": "choice"}
    value = other.get(name, {"top_p": 0.5, "repetition_penalty": 1.2}.get(name, 1))
    book.append("draws", "s", [draw(), draw(**{name: value})])
    with pytest.raises(TomError, match="already"):
        book.append("draws", "s", [draw(**{name: value, "seed": 7, "text": "C"})])
    assert len(book.draws()) == 2


def test_no_key_twice_whoever_wrote_it(book: Ledger) -> None:
    other = Ledger(book.folder)
    book.append("draws", "s", [draw(0)])
    with pytest.raises(TomError, match=r"s\.jsonl already"):
        other.append("draws", "another", [draw(1), draw(0)])
    with pytest.raises(TomError, match="the same batch already"):
        other.append("draws", "s", [draw(1), draw(1, seed=3)])
    assert len(book.draws()) == 1  # all or none
    assert not shard_of(book, "another").exists()
    other.append("draws", "another", [draw(1)])
    assert sorted(book.draws()["index"]) == [0, 1]


def test_a_key_in_two_shards_is_named(book: Ledger) -> None:
    book.append("draws", "a", [draw(0), draw(1)])
    shutil.copy(shard_of(book, "a"), shard_of(book, "b"))
    for _ in range(2):
        with pytest.raises(TomError, match=r"b\.jsonl, line 1: repeats .*a\.jsonl, line 1"):
            book.draws()
    os.remove(shard_of(book, "b"))
    assert len(book.draws()) == 2


def test_what_a_readonly_folder_has_counts_first(tmp_path: Path) -> None:
    shipped, own = Ledger(tmp_path / "shipped"), Ledger(tmp_path / "own")
    shipped.append("draws", "s", [draw(i, model="shipped") for i in range(3)])
    own.append("draws", "s", [draw(i, model="own") for i in range(2, 5)])
    both = Ledger(tmp_path / "own", readonly=[tmp_path / "shipped", tmp_path / "own"])
    assert both.draws()[["model", "index"]].values.tolist() == [
        ["shipped", 0],
        ["shipped", 1],
        ["shipped", 2],
        ["own", 3],
        ["own", 4],
    ]
    with pytest.raises(TomError, match="already"):
        both.append("draws", "s", [draw(0)])
    both.append("draws", "s", [draw(5)])
    assert len(shipped.draws()) == 3 and len(both.draws()) == 6


def test_gzip_is_read(book: Ledger) -> None:
    book.append("draws", "s", [draw(0), draw(1)])
    path = shard_of(book)
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert len(book.draws()) == 2
    book.append("draws", "s", [draw(2)])
    assert len(Ledger(book.folder).draws()) == 3
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(TomError, match=r"s\.jsonl\.gz: damaged gzip"):
        book.draws()


# -- rows that are no rows ------------------------------------------------------------------------

BAD = [
    ({"weights": "meta-llama/Llama"}, "weights"),
    ({"weights": None}, "weights"),
    ({"adapter": ""}, "adapter"),
    ({"split": 3}, "split"),
    ({"payoffs": [1, 2]}, "payoffs"),
    ({"payoffs": [1, 2, 3, True]}, "payoffs"),
    ({"payoffs": [1, 2, 3, float("nan")]}, "payoffs"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "0.8"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"index": -1}, "index"),
    ({"index": 1.0}, "index"),
    ({"index": True}, "index"),
    ({"seed": 2**63}, "seed"),
    ({"text": None}, "text"),
    ({"choice": "E"}, "choice"),
    ({"choice": True}, "choice"),
    ({"choice": 5.0}, "choice"),
    ({"choice": None}, "outcome"),
    ({"outcome": "refused"}, "outcome"),
    ({"outcome": "fine"}, "outcome"),
    ({"time": "2026-01-31T12:00:00"}, "time"),
    ({"time": "2026-13-31T12:00:00Z"}, "time"),
    ({"motivation": "x"}, "unknown field 'motivation'"),
    ({"outcom": "ok"}, "did you mean 'outcome'"),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_a_wrong_row_is_refused_and_a_wrong_line_named(
    book: Ledger, change: dict[str, Any], says: str
) -> None:
    book.append("draws", "s", [draw(0)])
    with pytest.raises(TomError, match=r"row 2 to append") as error:
        book.append("draws", "s", [draw(1), draw(2) | change])
    assert says in str(error.value)
    assert len(lines(shard_of(book))) == 1
    with shard_of(book).open("a") as file:
        file.write(json.dumps(draw(2) | change) + "\n" + json.dumps(draw(3)) + "\n")
    for reader in (book, Ledger(book.folder)):
        with pytest.raises(TomError, match=r"s\.jsonl, line 2") as error:
            reader.draws()
        assert "\n" not in str(error.value)


def test_what_lines_share_is_read_once_and_nothing_slips_by(book: Ledger) -> None:
    """Line by line, each in a file of its own, or all together: the same rows, the same errors."""
    rows = [draw(n) | {"text": f'a", "max_new_tokens": {n}, "model": "x"'} for n in range(3)]
    rows += [draw(n) | {"game": "snowdrift"} for n in range(3, 6)]
    for n in (8, 9):  # with the last field of the start after it
        rows.append(draw(n))
        rows[-1]["repetition_penalty"] = rows[-1].pop("repetition_penalty")
    rows += [dict(reversed(draw(6).items())), draw(7)]
    path = shard_of(book)
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Ledger(book.folder).draws()
    assert found["text"].tolist() == [row["text"] for row in rows]
    assert found["game"].tolist() == [row["game"] for row in rows]
    line = json.dumps(draw(10))
    for wrong, says in (
        (line[:-1] + ', "model": "other"}', "a field stands twice"),
        (line.replace('"temperature": 0.8', '"temperature": true'), "temperature"),
        (line.replace(', "max_new', '}, "max_new'), "damaged"),
        (line[:-1], rf"Expecting .* column {len(line)}\b"),
    ):
        path.write_text(json.dumps(rows[-1]) + "\n" + wrong + "\n" + line + "\n")
        with pytest.raises(TomError, match=rf"line 2: .*{says}"):
            Ledger(book.folder).draws()


def test_a_missing_field_is_named(book: Ledger) -> None:
    for name in SCHEMA["draws"]:
        row = draw()
        del row[name]
        with pytest.raises(TomError, match=f"lacks the field '{name}'"):
            book.append("draws", "s", [row])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"coverage": 1.1}, "coverage"),
        ({"coverage": float("nan")}, "coverage"),
        ({"p": {}}, "p"),
        ({"p": {"C": float("nan")}}, "p"),
        ({"p": [0.4, 0.6]}, "p"),
    ],
)
def test_a_wrong_readout(book: Ledger, change: dict[str, Any], says: str) -> None:
    with pytest.raises(TomError, match=f"has {says} ="):
        book.append("readouts", "s", [readout(**change)])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "is empty"),
        (b"   ", "is empty"),
        (b"{", "is damaged"),
        (b"[]", "is no JSON object"),
        (b"\x00\x00\x00", "is damaged"),
        (b"\xff", "is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (json.dumps(draw(7)).encode()[:-9], "is damaged"),
        (json.dumps(draw(7)).encode() * 2, "is damaged"),
        (json.dumps(draw(7)).encode().replace(b"{", b'{"index": 8, ', 1), "stands twice"),
        (json.dumps(draw(7)).encode().replace(b"0.8", b"NaN"), "NaN is no number"),
        (json.dumps(draw(7)).encode().replace(b"0.8", b"1e999"), "temperature"),
        (json.dumps(draw(0)).encode(), "repeats the key of line 1"),
    ],
)
def test_damage_in_the_middle_is_named_and_left_alone(book: Ledger, line: bytes, says: str) -> None:
    book.append("draws", "s", [draw(0), draw(1)])
    first, second = shard_of(book).read_bytes().splitlines(keepends=True)
    damaged = first + line + b"\n" + second
    shard_of(book).write_bytes(damaged)
    for act in (
        book.draws,
        Ledger(book.folder).draws,
        lambda: book.append("draws", "s", [draw(9)]),
    ):
        with pytest.raises(TomError, match=r"s\.jsonl, line 2") as error:
            act()
        assert says in str(error.value) and "\n" not in str(error.value)
    assert shard_of(book).read_bytes() == damaged
    problems = verify(book.folder)["problem"]
    assert problems.str.contains("line 2").all()


# -- crashes --------------------------------------------------------------------------------------


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(1, 2000))
def test_a_last_line_torn_anywhere(tmp_path: Path, cut: int) -> None:
    folder = tmp_path / f"run{cut}"
    shutil.rmtree(folder, ignore_errors=True)
    book = Ledger(folder)
    book.append("draws", "s", [draw(i) for i in range(3)])
    path = shard_of(book)
    whole = path.read_bytes()
    kept = whole[: max(0, len(whole) - cut)]
    path.write_bytes(kept)
    # A line is there if it is complete, be it without its end of line.
    expected = sum(len(part) > 0 for part in kept.split(b"\n")[:-1])
    expected += kept.split(b"\n")[-1].endswith(b'Z"}')
    fresh = Ledger(folder)
    for reader in (book, fresh):
        assert reader.draws()["index"].tolist() == list(range(expected))
    assert path.read_bytes() == kept  # reading heals nothing
    fresh.append("draws", "s", [draw(i) for i in range(expected, 5)])
    for reader in (book, fresh, Ledger(folder)):
        assert reader.draws()["index"].tolist() == list(range(5))
    assert [row["index"] for row in lines(path)] == list(range(5))


def test_verify_tells_a_torn_line_from_damage(book: Ledger) -> None:
    book.append("draws", "s", [draw(0), draw(1)])
    shard_of(book).write_bytes(shard_of(book).read_bytes()[:-20])
    table = verify(book.folder)
    assert table.to_dict("records") == [
        {"kind": "draws", "file": "draws/s.jsonl", "rows": 1, "torn": True, "problem": ""}
    ]


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_ledger import draw
from tomlib.ledger import Ledger
book = Ledger({folder!r})
done = set(book.draws()["index"])
with book.lock("draws", "s"):
    print("writing", flush=True)
    for start in range(0, 100_000, 7):
        rows = [draw(i, text="x" * 3000, choice=None, outcome="unparsed")
                for i in range(start, start + 7) if i not in done]
        book.append("draws", "s", rows)
"""


def start_writer(folder: Path) -> "subprocess.Popen[str]":
    code = WRITER.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_kill_at_random_moments_loses_and_doubles_nothing(book: Ledger) -> None:
    before = 0
    for seed in range(4):
        process = start_writer(book.folder)
        time.sleep(random.Random(seed).uniform(0.02, 0.3))
        process.kill()
        process.communicate()
        found = Ledger(book.folder).draws()["index"].tolist()
        assert found == list(range(len(found)))
        assert len(found) >= before
        assert book.draws()["index"].tolist() == found  # a reader that was there all along
        before = len(found)
    assert before > 0
    book.append("draws", "s", [draw(before)])  # the lock died with its holder
    assert verify(book.folder)["problem"].tolist() == [""]


def test_a_second_writer_is_refused_with_the_holders_pid(book: Ledger) -> None:
    process = start_writer(book.folder)
    try:
        other = "second"
        with pytest.raises(TomError, match=rf"s\.jsonl: .*pid {process.pid} on .* since 20"):
            book.append("draws", "s", [draw(10**6)])
        with pytest.raises(TomError, match=f"pid {process.pid}"), book.lock("draws", "s"):
            pass
        book.append("draws", other, [draw(10**6)])  # another shard is free
        assert len(book.draws()) > 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with book.lock("draws", "s"):
        book.append("draws", "s", [draw(10**6 + 1)])


def test_the_lock_is_not_reentrant_and_is_released(book: Ledger) -> None:
    with book.lock("draws", "s"):
        with pytest.raises(TomError, match=f"pid {os.getpid()}"), book.lock("draws", "s"):
            pass
        book.append("draws", "s", [draw(0)])
        with pytest.raises(TomError, match=f"pid {os.getpid()}"):
            Ledger(book.folder).append("draws", "s", [draw(1)])
    with pytest.raises(ZeroDivisionError), book.lock("draws", "s"):
        _ = 1 / 0
    Ledger(book.folder).append("draws", "s", [draw(1)])
    assert len(book.draws()) == 2


# -- the disk -------------------------------------------------------------------------------------


def test_a_file_that_may_not_grow_keeps_whole_lines_only(book: Ledger) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_ledger import draw
from tomlib.errors import TomError
from tomlib.ledger import Ledger
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
book = Ledger({str(book.folder)!r})
for start in range(0, 1000, 10):
    try:
        book.append("draws", "s", [draw(i) for i in range(start, start + 10)])
    except TomError as error:
        assert len(book.draws()) == start
        print(start, error)
        break
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    written, message = out.stdout.split(" ", 1)
    assert "cannot be written (File too large)" in message and "recorded before is safe" in message
    assert int(written) > 0
    assert book.draws()["index"].tolist() == list(range(int(written)))
    assert shard_of(book).read_bytes().endswith(b"\n")
    book.append("draws", "s", [draw(int(written))])
    assert verify(book.folder)["problem"].tolist() == [""]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_and_a_read_only_disk(small_disk: Path) -> None:
    book = Ledger(small_disk / "run")
    written = 0
    with pytest.raises(TomError, match=r"No space left on device.*free some space"):
        for written in range(0, 10_000, 10):
            book.append("draws", "s", [draw(i) for i in range(written, written + 10)])
    assert written > 0
    assert book.draws()["index"].tolist() == list(range(written))
    assert shard_of(book).read_bytes().endswith(b"\n")
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    with pytest.raises(TomError, match=r"Read-only file system.*make the disk writable"):
        book.append("draws", "s", [draw(written)])
    assert len(Ledger(book.folder).draws()) == written


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    book = Ledger(tmp_path / "file")
    with pytest.raises(TomError, match="cannot be"):
        book.append("draws", "s", [draw()])
    with pytest.raises(TomError, match="no such folder"):
        verify(tmp_path / "nowhere")
    (tmp_path / "run" / "draws" / "s.jsonl").mkdir(parents=True)
    with pytest.raises(TomError, match=r"s\.jsonl: cannot be read"):
        Ledger(tmp_path / "run").draws()


def test_an_edited_file_is_read_anew(book: Ledger) -> None:
    book.append("draws", "s", [draw(i) for i in range(4)])
    assert len(book.draws()) == 4
    first, *others = shard_of(book).read_text().splitlines(keepends=True)
    grown = first.replace("tiny", "a-much-longer-name")
    shard_of(book).write_text("".join([grown, *others]))
    assert book.draws()["model"].tolist() == ["a-much-longer-name", *["tiny"] * 3]
    shard_of(book).write_text("".join([*others[:2]]))
    assert book.draws()["index"].tolist() == [1, 2]
    shard_of(book).unlink()
    assert len(book.draws()) == 0


# -- the rest -------------------------------------------------------------------------------------


def test_verify_reads_the_texts_again(book: Ledger) -> None:
    book.append("draws", "a", [draw(0), draw(1, choice="D"), draw(2, text="D", choice="D")])
    cut = {"text": '{"choice": "', "choice": None}
    book.append("draws", "b", [draw(3, **cut, outcome="truncated")])
    book.append("draws", "c", [draw(4, **cut, outcome="refused")])
    book.append("readouts", "d", [readout()])
    goods = {"game": "public_goods", "payoffs": [4, 5, 2.5], "text": '{"contribution": 6}'}
    book.append("draws", "e", [draw(5, **goods, choice=6)])
    table = verify(book.folder).set_index("file")["problem"]
    assert "line 2: its text does not say choice 'D'" in table["draws/a.jsonl"]
    assert table["draws/b.jsonl"] == table["readouts/d.jsonl"] == ""
    assert "line 1" in table["draws/c.jsonl"] and "line 1" in table["draws/e.jsonl"]
    shutil.copy(shard_of(book, "b"), shard_of(book, "z"))
    table = verify(book.folder).set_index("file")["problem"]
    assert "repeats the key" in table["draws/z.jsonl"]


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_shard_names_are_file_names(parts: list[str]) -> None:
    if not "--".join(parts):
        return
    name = shard_name(parts)
    assert name not in (".", "..") and len(f"draws--{name}.jsonl".encode()) < 255
    assert not set(name) & set('/\\:*?"<>|\0 \n') and name[0] not in ".-"


def test_an_unknown_kind_and_a_nameless_shard(book: Ledger) -> None:
    with pytest.raises(TomError, match="did you mean 'draws'"):
        book.append("draw", "s", [draw()])  # type: ignore[arg-type]
    with pytest.raises(TomError, match="needs a name"):
        book.append("draws", "", [draw()])
    assert set(SCHEMA) == set(KINDS)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_an_error_or_a_torn_end(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    book = Ledger(folder)
    book.append("draws", "s", [draw(i) for i in range(3)])
    raw = shard_of(book).read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 30)))
    shard_of(book).write_bytes(raw[:start] + data.draw(st.binary(max_size=6)) + raw[stop:])
    try:
        frame = Ledger(folder).draws()
    except TomError as error:
        assert "s.jsonl, line " in str(error) and "\n" not in str(error)
    else:
        assert frame.duplicated(list(DRAW_KEY)).sum() == 0


def test_only_what_is_new_is_read_again(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(20):
        book.append("draws", f"s{shard}", [draw(i, prompt=f"{shard:016x}") for i in range(200)])
    fresh = Ledger(book.folder)
    assert len(fresh.draws()) == 4000
    opened: list[tuple[str, int]] = []
    read = type(next(iter(fresh._shards.values())))._bytes

    def recorded(shard: Any, start: int) -> bytes:
        data: bytes = read(shard, start)
        opened.append((shard.path.name, len(data)))
        return data

    monkeypatch.setattr("tomlib.ledger._Shard._bytes", recorded)
    assert len(fresh.draws(answer="choice+motivation")) == 4000
    assert opened == []
    with shard_of(book, "s3").open("a") as file:
        file.write(json.dumps(draw(200, prompt=f"{3:016x}")) + "\n")
    assert len(fresh.draws()) == 4001
    (once,) = opened
    assert once[0] == "s3.jsonl" and once[1] < 2000
