"""pyproject.toml, requirements.lock and environment.yml say the same; the command is installed."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
HEAVY = [canonicalize_name(Requirement(line).name).replace("-", "_") for line in EXTRAS["models"]]
PYTHON = sorted((ROOT / "tomlib").rglob("*.py"))


def locked() -> list[str]:
    """The lines of requirements.lock that pin something."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


VERSIONS = dict(line.split("==") for line in locked())


def writer() -> ModuleType:
    """The script behind `make lock`."""
    spec = spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lock_pins_each_package_once_and_exactly() -> None:
    names = [line.split("==")[0] for line in locked()]
    assert names == sorted(set(names))
    for line in locked():
        assert re.fullmatch(r"[a-z0-9-]+==\d[A-Za-z0-9.]*", line), line  # no range, no local tag


def hashed(name: str) -> dict[str, list[str]]:
    """The pins of a file with the hashes of each; markers are left out."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", "")
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            pin, *hashes = re.sub(r" ; .*?(?= --)", "", line).split()
            assert hashes, pin
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), pin
            found[pin] = [one.removeprefix("--hash=sha256:") for one in hashes]
    return found


def test_every_pin_has_hashes() -> None:
    parts = writer().parts(locked())
    assert sorted(line for lines in parts.values() for line in lines) == sorted(locked())
    for part, lines in parts.items():
        assert list(hashed(f"locks/{part}.txt")) == lines


def test_all_that_is_locked_has_its_requirements_locked() -> None:
    """Else pip fetches the rest as it is today, and unhashed."""
    gpu = {
        line.split("==")[0] for line in hashed("locks/gpu.txt")
    }  # of which some builds have none
    assert writer().needs(set(VERSIONS)) - gpu == set(VERSIONS), "make lock"


@pytest.mark.parametrize(
    "target", ["setup", ".venv-bench/peers/.installed", ".venv-bench/vllm/.installed"]
)
def test_make_installs_what_has_hashes(target: str) -> None:
    done = subprocess.run(
        ["make", "-nB", target],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *installs, last = [line for line in done.stdout.splitlines() if "pip install" in line]
    if target == "setup":  # itself; and on other systems what the lock does not name
        assert last.endswith(" --no-deps --no-build-isolation -e .")
        *installs, last = installs
        assert "-r requirements.lock" in last
    else:
        installs.append(last)
    assert len(installs) == (4 if target == "setup" else 3)
    assert all("--no-deps" in line and "--require-hashes" in line for line in installs)
    (torch,) = [line for line in installs if "-r locks/torch.txt" in line]
    assert "--no-index" in torch  # what was fetched, and nothing else
    for line in installs:
        assert hashed(line.split(" -r ")[1].split()[0])


def test_builds_of_torch_for_no_gpu_are_read_from_its_index(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    names = (
        "torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl",
        "torch-2.13.0%2Bcpu-cp312-cp312-linux_s390x.whl",
        "torch-2.13.0%2Bcpu-cp311-cp311-win_amd64.whl",  # as PyPI has it
        "torch-2.13.00%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl",
        "torch-2.13.0%2Bcu126-cp311-cp311-manylinux_2_28_x86_64.whl",
    )
    (tmp_path / "torch" / "index.html").write_text(
        "".join(
            f'<a href="https://files.example/whl/{name}#sha256={at:064x}" data-core="x">{name}</a>'
            for at, name in enumerate(names)
        )
    )
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}"
        assert writer().cpu_builds("torch==2.13.0", index) == [f"{0:064x}", f"{1:064x}"]
        with pytest.raises(SystemExit, match=r"torch==2\.12\.0: .* holds no build"):
            writer().cpu_builds("torch==2.12.0", index)
        server.shutdown()


def test_binders_packages_have_the_hashes_of_the_lock() -> None:
    every, light = hashed("locks/requirements.txt"), hashed("binder/requirements.txt")
    assert light and light == {line: every[line] for line in light}
    text = (ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8")
    assert writer().light(every, text) == text


def test_tomlib_is_built_by_what_the_lock_holds() -> None:
    """No builder is fetched beside the lock, whose hashes it would escape."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    for requirement in map(Requirement, build["requires"]):
        assert VERSIONS[requirement.name] in requirement.specifier
    said = "".join((ROOT / f).read_text(encoding="utf-8") for f in ("Makefile", "binder/postBuild"))
    own = re.findall(r"^.*--no-deps.* (?:-e|--editable) \.$", said, re.MULTILINE)
    assert len(own) == 2 and all("--no-build-isolation" in line for line in own)


@pytest.mark.parametrize(
    "wanted", [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
)
def test_the_lock_satisfies_pyproject(wanted: str) -> None:
    requirement = Requirement(wanted)
    name = canonicalize_name(requirement.name)
    assert name in VERSIONS, f"{name} is not in requirements.lock: make lock"
    assert VERSIONS[name] in requirement.specifier


def test_no_package_is_named_twice_in_pyproject() -> None:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    names = [canonicalize_name(Requirement(line).name) for line in lines]
    assert len(names) == len(set(names))


def test_environment_yml_has_the_same_pins() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    *conda, last = yaml.safe_load(text)["dependencies"]
    assert last["pip"] == locked()
    python = next(line.split("=")[1] for line in conda if line.startswith("python="))
    assert python in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_make_lock_would_write_the_files_as_they_are() -> None:
    lock = writer()
    assert lock.lock(locked()) == (ROOT / "requirements.lock").read_text(encoding="utf-8")
    now = f"python={sys.version_info.major}.{sys.version_info.minor}"
    here = re.sub(r"python=3\.\d+", now, (ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert lock.environment(locked()) == here


def test_every_import_is_declared() -> None:
    """What tomlib imports is its own, Python's, or named in pyproject."""
    imported = set()
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    declared = {
        canonicalize_name(Requirement(line).name).replace("-", "_")
        for line in [*PROJECT["dependencies"], *(x for extra in EXTRAS.values() for x in extra)]
    }
    named = {name.lower() for name in imported - set(sys.stdlib_module_names)}
    assert named - {name.lower() for name in declared} - {"tomlib"} == set()


def test_modules_import_without_the_heavy_packages() -> None:
    """An analysis opens on a machine without torch, transformers, peft or a server's client."""
    modules = [
        f"tomlib.{path.stem}" for path in PYTHON if path.stem not in ("__init__", "__main__")
    ]
    code = f"""
import importlib, sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
for name in {modules}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_and_the_types_are_installed() -> None:
    scripts = {point.name: point.value for point in entry_points(group="console_scripts")}
    assert scripts["tom"] == "tomlib.cli:main"
    assert (ROOT / "tomlib" / "py.typed").is_file()


def test_the_citation_names_the_software_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    version = re.search(r'"(.+)"', (ROOT / "tomlib" / "__init__.py").read_text().split("__ = ")[1])
    assert version is not None and cited["version"] == version[1]
    paper = cited["references"][0]
    assert [author["family-names"] for author in paper["authors"]] == ["Lorè", "Ilami", "Heydari"]
    assert "2408.05241" in paper["url"]
    page = (ROOT / "book" / "cite.md").read_text(encoding="utf-8")
    assert f"version = {{{cited['version']}}}" in page
    assert (
        " ".join(re.findall(r"title   = {(tomlib.*?)}", page, re.DOTALL)[0].split())
        == cited["title"]
    )
    assert f"## [{cited['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- workflows ------------------------------------------------------------------------------------


WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}


def workflow(name: str) -> dict[str, Any]:
    """A workflow; YAML takes its `on` for a truth value."""
    loaded: dict[Any, Any] = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    loaded["on"] = loaded.pop(True)
    return loaded


def steps_of(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_what_is_there_and_may_do_no_more_than_it_must(name: str) -> None:
    made = workflow(name)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert made["permissions"]["contents"] == "read"
    writes = {k for k, v in made["permissions"].items() if v == "write"}
    assert writes <= ({"pages", "id-token"} if name == "pages" else set())
    for step in steps_of(name):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step["uses"]
            continue
        said = step["run"]
        for target in re.findall(r"\bmake ([\w-]+)", said):
            assert re.search(rf"^{target}[ :]", makefile, re.MULTILINE), target
        for script in re.findall(r"\bbash (\S+)", said):
            assert (ROOT / script).is_file(), script
        # What somebody else may write (a branch's name, a title) is never part of a command.
        assert "${{" not in said


def test_the_book_is_published_after_the_tests_have_passed_and_from_what_they_tested() -> None:
    made = workflow("pages")
    assert set(made["on"]) == {"workflow_run", "workflow_dispatch"}
    waits = made["on"]["workflow_run"]
    assert waits["workflows"] == [workflow("ci")["name"]] and waits["types"] == ["completed"]
    (job,) = made["jobs"].values()
    assert "conclusion == 'success'" in job["if"]
    assert "workflow_run.head_sha" in job["steps"][0]["with"]["ref"]
    built = [step["with"]["path"] for step in steps_of("pages") if "upload-pages" in str(step)]
    assert built == ["_build/html"]


def test_a_pull_request_brings_its_book_and_the_tests_run_on_it() -> None:
    assert (
        "pull_request" in workflow("ci")["on"] and "pull_request" in workflow("pull-request")["on"]
    )
    (upload,) = [s for s in steps_of("pull-request") if "upload-artifact" in s.get("uses", "")]
    assert upload["with"]["path"] == "_build/html"
    assert upload["with"]["if-no-files-found"] == "error"
    assert any("pip-audit" in step.get("run", "") for step in steps_of("ci"))
