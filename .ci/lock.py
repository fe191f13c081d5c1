"""Write requirements.lock, requirements.hashes, environment.yml and Binder's from this environment.

Run by `make lock` in a fresh environment that holds the extras [models,scale,book,test] and
nothing else.
"""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from urllib.request import Request, urlopen

LEFT_OUT = {"pip", "setuptools", "tomlib", "wheel"}


def pins() -> list[str]:
    """`name==version` of all that is installed, without a build's local tag (torch's +cpu)."""
    found = {
        re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower(): each.version.split("+")[0]
        for each in distributions()
    }
    return [f"{name}=={found[name]}" for name in sorted(set(found) - LEFT_OUT)]


def lock(lines: list[str]) -> str:
    """The text of requirements.lock."""
    return (
        "# The exact versions that the results and the tests were made with: all that the extras\n"
        "# [models,scale,book,test] resolve to. Written by `make lock`; tests/test_environment.py\n"
        "# holds it together with pyproject.toml and environment.yml.\n"
        "# Of torch any build of this version will do (see TORCH_INDEX in the Makefile).\n"
        + "".join(f"{line}\n" for line in lines)
    )


def files(line: str) -> list[str]:
    """sha256 of every file that the package index holds of a pinned version."""
    name, release = line.split("==")
    kind = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urlopen(Request(f"https://pypi.org/simple/{name}/", headers=kind), timeout=60) as reply:
        listed = json.load(reply)["files"]
    stem = rf"{re.sub('-', '[-_.]+', name)}-{re.escape(release)}"
    mine = re.compile(rf"{stem}(-.*\.whl|\.tar\.gz|\.zip)", re.IGNORECASE)
    found = sorted(f["hashes"]["sha256"] for f in listed if mine.fullmatch(f["filename"]))
    if not found:
        raise SystemExit(f"{line}: the index holds no file of it")
    return found


def hashed(lines: list[str]) -> dict[str, str]:
    """Each pin with the hashes of its files, as pip reads it; without torch."""
    checked = [line for line in lines if not line.startswith("torch==")]
    with ThreadPoolExecutor(8) as several:
        found = several.map(files, checked)
    return {
        line: " \\\n    ".join([line, *(f"--hash=sha256:{one}" for one in each)]) + "\n"
        for line, each in zip(checked, found, strict=True)
    }


def hashes(entries: dict[str, str]) -> str:
    """The text of requirements.hashes."""
    return (
        "# requirements.lock with the hashes of its files, which `make` checks as it installs them.\n"
        "# Not of torch: its builds for GPUs and for none come from more than one place.\n"
        + "".join(entries.values())
    )


def light(entries: dict[str, str], before: str) -> str:
    """The text of binder/requirements.txt: the packages that it names, as they are pinned now."""
    wanted = set(re.findall(r"^([a-z0-9-]+)==", before, re.MULTILINE))
    return (
        "# What a replay needs, with versions and hashes of requirements.lock: no torch, no model.\n"
        "# Binder reads this; tests/test_book.py holds it to the lock.\n"
        + "".join(text for line, text in entries.items() if line.split("==")[0] in wanted)
    )


def environment(lines: list[str]) -> str:
    """The text of environment.yml."""
    return (
        "# The versions of requirements.lock for users of conda; written by `make lock`.\n"
        "#   conda env create -f environment.yml && conda activate tomlib\n"
        "#   pip install --no-deps -e .\n"
        "name: tomlib\n"
        "channels:\n"
        "  - conda-forge\n"
        "dependencies:\n"
        f"  - python={sys.version_info.major}.{sys.version_info.minor}\n"
        "  - pip\n"
        "  - pip:\n" + "".join(f"      - {line}\n" for line in lines)
    )


if __name__ == "__main__":
    Path("requirements.lock").write_text(lock(pins()), encoding="utf-8")
    found, binder = hashed(pins()), Path("binder", "requirements.txt")
    Path("requirements.hashes").write_text(hashes(found), encoding="utf-8")
    binder.write_text(light(found, binder.read_text(encoding="utf-8")), encoding="utf-8")
    Path("environment.yml").write_text(environment(pins()), encoding="utf-8")
