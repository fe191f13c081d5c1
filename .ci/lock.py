"""Write requirements.lock, locks/, environment.yml and Binder's requirements from this environment.

Run by `make lock` in a fresh environment that holds the extras [models,scale,book,test] and
nothing else; with the name of a benchmark's environment, in that: then it writes locks/NAME.txt.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions, requires
from pathlib import Path
from urllib.parse import unquote
from urllib.request import Request, urlopen

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPI = "https://pypi.org/simple"
PYTORCH_CPU = "https://download.pytorch.org/whl/cpu"
BUILDERS = ("setuptools", "wheel")
LOCKS = Path("locks")


def pins() -> list[str]:
    """`name==version` of all that is installed, without a build's local tag (torch's +cpu)."""
    found = {
        re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower(): each.version.split("+")[0]
        for each in distributions()
    }
    return [f"{name}=={found[name]}" for name in sorted(set(found) - {"pip", "tomlib"})]


def parts(lines: list[str]) -> dict[str, list[str]]:
    """The pins by file of locks/, in the order in which they are installed."""
    found: dict[str, list[str]] = {"build": [], "torch": [], "requirements": []}
    for line in lines:
        name = line.split("==")[0]
        part = "build" if name in BUILDERS else "torch" if name == "torch" else "requirements"
        found[part].append(line)
    return found


def gpu(lines: list[str]) -> list[str]:
    """What PyPI's build of torch for Linux needs besides, as pip resolves it; downloads nothing."""
    (torch,) = parts(lines)["torch"]
    asked = [*("install", "--isolated", "--quiet", "--dry-run", "--ignore-installed")]
    asked += [*("--use-feature=fast-deps", "--report", "-", "--index-url", PYPI)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *asked, torch], capture_output=True, text=True, check=True
    )
    wanted = {
        re.sub(r"[-_.]+", "-", each["metadata"]["name"]).lower(): each["metadata"]["version"]
        for each in json.loads(done.stdout)["install"]
    }
    here = {line.split("==")[0] for line in lines}
    return [f"{name}=={wanted[name]}" for name in sorted(set(wanted) - here)]


def files(line: str) -> list[str]:
    """sha256 of every file that PyPI holds of a pinned version."""
    name, release = line.split("==")
    kind = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urlopen(Request(f"{PYPI}/{name}/", headers=kind), timeout=60) as reply:
        listed = json.load(reply)["files"]
    stem = rf"{re.sub('-', '[-_.]+', name)}-{re.escape(release)}"
    mine = re.compile(rf"{stem}(-.*\.whl|\.tar\.gz|\.zip)", re.IGNORECASE)
    found = sorted(f["hashes"]["sha256"] for f in listed if mine.fullmatch(f["filename"]))
    if not found:
        raise SystemExit(f"{line}: the index holds no file of it")
    return found


def cpu_builds(line: str, index: str = PYTORCH_CPU) -> list[str]:
    """sha256 of torch's builds for Linux without a GPU, which are not on PyPI."""
    release = line.split("==")[1]
    with urlopen(f"{index}/torch/", timeout=60) as reply:
        links = re.findall(r'href="([^"]+)#sha256=([0-9a-f]{64})"', reply.read().decode())
    mine = re.compile(rf"torch-{re.escape(release)}\+cpu-[^/]*linux[^/]*\.whl")
    found = sorted(one for link, one in links if mine.fullmatch(unquote(link).rsplit("/")[-1]))
    if not found:
        raise SystemExit(f"{line}: {index} holds no build of it for Linux")
    return found


def hashed(lines: list[str]) -> dict[str, list[str]]:
    """Each pin with the hashes of its files; torch's with those of its builds for no GPU."""
    with ThreadPoolExecutor(8) as several:
        found = dict(zip(lines, several.map(files, lines), strict=True))
    return found | {one: found[one] + cpu_builds(one) for one in found if one.startswith("torch==")}


def entries(found: dict[str, list[str]], marker: str = "") -> str:
    """Pins and hashes as pip reads them."""
    return "".join(
        " \\\n    ".join([line + marker, *(f"--hash=sha256:{one}" for one in each)]) + "\n"
        for line, each in found.items()
    )


SAYS = {
    "build": "What builds the packages that come as source.",
    "torch": f"torch: its files on PyPI, then those for Linux without a GPU\n# ({PYTORCH_CPU}).",
    "requirements": "All else of requirements.lock.",
    "gpu": "What torch needs besides on Linux with a GPU.",
    "peers": "Tools that the benchmarks measure beside ours: lm-eval, TRL.",
    "vllm": "vLLM's CPU build, which tests and benchmarks set beside ours.",
}


def write(part: str, found: dict[str, list[str]]) -> None:
    """locks/PART.txt, from which `make` installs with --require-hashes."""
    marker = ' ; sys_platform == "linux"' if part == "gpu" else ""
    text = f"# {SAYS[part]}\n# Written by `make lock`.\n" + entries(found, marker)
    (LOCKS / f"{part}.txt").write_text(text, encoding="utf-8")


def lock(lines: list[str]) -> str:
    """The text of requirements.lock."""
    return (
        "# The exact versions that the results and the tests were made with: all that the extras\n"
        "# [models,scale,book,test] resolve to. Written by `make lock`, which writes the hashes of\n"
        "# their files into locks/; tests/test_environment.py holds them together.\n"
        + "".join(f"{line}\n" for line in lines)
    )


def needs(names: set[str]) -> set[str]:
    """Packages with all that they require here, and what that requires."""
    lines = [Requirement(line) for name in names for line in requires(name) or ()]
    here = [one for one in lines if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = names | {canonicalize_name(one.name) for one in here}
    return found if found == names else needs(found)


def light(found: dict[str, list[str]], before: str) -> str:
    """The text of binder/requirements.txt: the packages that it names, and what they need now."""
    wanted = needs(set(re.findall(r"^([a-z0-9-]+)==", before, re.MULTILINE)))
    return (
        "# What a replay needs, with versions and hashes of requirements.lock: no torch, no model.\n"
        "# Binder reads this; tests/test_book.py holds it to the lock.\n"
        + entries({line: each for line, each in found.items() if line.split("==")[0] in wanted})
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
    here = pins()
    if sys.argv[1:]:
        write(sys.argv[1], hashed([line for line in here if not line.startswith("torch==")]))
        raise SystemExit
    Path("requirements.lock").write_text(lock(here), encoding="utf-8")
    Path("environment.yml").write_text(environment(here), encoding="utf-8")
    found = hashed(here)
    for part, lines in parts(here).items():
        write(part, {line: found[line] for line in lines})
    write("gpu", hashed(gpu(here)))
    binder = Path("binder", "requirements.txt")
    binder.write_text(light(found, binder.read_text(encoding="utf-8")), encoding="utf-8")
