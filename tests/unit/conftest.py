"""Fixtures of unit tests: no Ray, and the demonstration model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.reference import runner

from moray.deploy.config import demo_store
from moray.runtime.generation.request import GenerationRequest, SamplingParams
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.step_loop import StepLoop
from moray.runtime.planning.profile import GenerationLimits
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


@pytest.fixture
def same_threads_after() -> Iterator[None]:
    """Tests may change the number of threads."""
    from moray.runtime.kernels.pool import current_pool, set_num_threads

    before = current_pool().num_threads
    yield
    set_num_threads(before)


@pytest.fixture
def make_loop(demo_runner: Runner) -> Callable[..., StepLoop]:
    """A new loop, without kept caches, over the one model. No token ends a text unless asked for; time stands still."""
    batch = demo_runner._loop._forward._batch
    return lambda end_ids=(), **limits: StepLoop(
        demo_runner.model,
        demo_runner.tokenizer,
        frozenset(end_ids),
        limits=GenerationLimits(**{"context_length": 2048} | limits),
        batch=batch,
        clock=lambda: 0.0,
    )


@pytest.fixture
def loop(make_loop: Callable[..., StepLoop]) -> StepLoop:
    return make_loop()


@pytest.fixture
def request_of(demo_runner: Runner) -> Callable[..., GenerationRequest]:
    def make(prompt: str | list[int], count: int = 12, name: str = "r", **fields: Any) -> GenerationRequest:
        ids = demo_runner.encode(prompt)
        stop = fields.pop("stop", ())
        return GenerationRequest(name, ids, count, SamplingParams(**fields), stop)

    return make
