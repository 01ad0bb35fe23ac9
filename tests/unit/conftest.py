"""Fixtures of unit tests: no Ray, and the demonstration model in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.reference import runner

from moray.deploy.config import demo_store
from moray.runtime.generation.runner import Runner
from moray.runtime.store.store import Store


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit tests may not start Ray."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a unit test called ray.init; such a test belongs in tests/ray")

    monkeypatch.setattr("ray.init", refuse)


@pytest.fixture(scope="session")
def demo() -> Iterator[Store]:
    """The embedded store."""
    with Store.open(demo_store()) as store:
        yield store


@pytest.fixture(scope="session")
def demo_runner() -> Iterator[Runner]:
    """The demonstration model, generating in this process. Do not close it."""
    with runner(demo_store(), "int8") as made:
        yield made
