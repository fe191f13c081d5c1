"""Fixtures: the smallest real model, and runs in folders of their own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tomlib import collect
from tomlib.models import Card, card
from tomlib.profiles import Run, load_profile, new_run
from tomlib.weights import fetch, transformers_folder

# A check that passed passes again; FUZZ=20 looks further, at other examples each time.
hypothesis.settings.register_profile("repeatable", derandomize="FUZZ" not in os.environ)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: two processes that take files in turn then end together."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


@pytest.fixture(scope="session")
def smol() -> Card:
    """SmolLM2-135M-Instruct, fetched and converted once into the machine's cache."""
    who = card("smollm2-135m")
    fetch(who, progress=False)
    transformers_folder(who, progress=False)
    return who


@pytest.fixture(scope="session")
def smol_model(smol: Card) -> tuple[Any, Any]:
    """Its model (fp32) and tokenizer."""
    from tomlib.sharing import load_transformers

    return load_transformers(smol)


@pytest.fixture
def new_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smol: Card) -> Callable[..., Run]:
    """A smoke run in a folder of its own; keyword arguments change its profile."""
    monkeypatch.setenv("TOM_RUNS", str(tmp_path / "runs"))

    def make(**changes: Any) -> Run:
        return new_run(load_profile("smoke", **changes), replay=False)

    yield make  # type: ignore[misc]
    collect.close_engines()
