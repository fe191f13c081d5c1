"""Write requirements.lock and environment.yml from what is installed in this environment.

Run by `make lock` in a fresh environment that holds the extras [models,scale,book,test] and
nothing else.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

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
    Path("environment.yml").write_text(environment(pins()), encoding="utf-8")
