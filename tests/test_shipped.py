"""The run that comes with the book, and what `tom verify` says of one that was changed."""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tomlib.errors import TomError
from tomlib.profiles import SHIPPED
from tomlib.reproduce import build_book, ship, verify_run
from tomlib.scenarios import root

RUN = root() / "data" / "runs" / SHIPPED


def problems(run: Path) -> dict[str, str]:
    found = verify_run(run)
    return dict(zip(found["where"], found["problem"], strict=True))


def test_the_shipped_run_is_whole_and_small() -> None:
    assert problems(RUN) == {}
    assert sum(p.stat().st_size for p in RUN.rglob("*") if p.is_file()) < 25e6
    stock = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"]  # macOS
    done = subprocess.run([*stock, "--check", "SHA256SUMS"], cwd=RUN, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / SHIPPED))


def change(shard: Path, was: str, now: str) -> str:
    """Change one line; the shard's name, as problems have it."""
    text = gzip.decompress(shard.read_bytes()).decode()
    assert was in text
    shard.write_bytes(gzip.compress(text.replace(was, now, 1).encode()))
    return f"{shard.parent.name}/{shard.name}"


def test_one_count_probability_or_file_that_was_changed_is_named(shipped: Path) -> None:
    draws, readouts = (sorted((shipped / kind).glob("*.gz")) for kind in ("draws", "readouts"))
    own = '"text": "{\\"choice\\": \\"%s\\"}", "choice": "%s"'  # what the text says, too
    shard = next(p for p in draws if (own % ("C", "C")).encode() in gzip.decompress(p.read_bytes()))
    count = change(shard, own % ("C", "C"), own % ("D", "D"))
    line = json.loads(gzip.decompress(readouts[0].read_bytes()).splitlines()[0])
    p = change(readouts[0], json.dumps(line["p"]), '{"C": 0.25, "D": 0.75}')
    lost = next(path for path in draws if path != shard)
    lost.unlink()
    (shipped / "draws" / "more.txt").write_text("")
    found = problems(shipped)
    assert found[count] == found[p] == "not as it was shipped (SHA256SUMS)"
    assert found[f"draws/{lost.name}"] == "missing, SHA256SUMS names it"
    assert found["draws/more.txt"] == "not in SHA256SUMS"


def test_a_shipped_run_can_be_shipped_on(shipped: Path, tmp_path: Path) -> None:
    again = ship(shipped, tmp_path / "again")
    assert (again / "SHA256SUMS").read_bytes() == (RUN / "SHA256SUMS").read_bytes()


def test_a_manifest_whose_profile_lacks_a_value_is_refused(shipped: Path) -> None:
    path = shipped / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["profile"]["contexts"] = None
    path.write_text(json.dumps(manifest))
    with pytest.raises(TomError, match=r"manifest\.json: no usable profile \('contexts': null\)"):
        verify_run(shipped)


def test_a_damaged_ledger_is_not_shipped(shipped: Path, tmp_path: Path) -> None:
    shard = next((shipped / "readouts").glob("*.gz"))
    shard.write_bytes(gzip.compress(gzip.decompress(shard.read_bytes()) + b'{"p": 1}\n'))
    with pytest.raises(TomError, match="repair the run, then ship it"):
        ship(shipped, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_without_chapters_makes_no_book(tmp_path: Path) -> None:
    with pytest.raises(TomError, match="no executed chapters there"):
        build_book(tmp_path / "notebooks")
