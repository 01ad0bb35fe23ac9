"""Calling actors and waiting for them. Ray's errors become ours, at this one edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

from moray.runtime.errors import ActorLostError, MorayError

T = TypeVar("T")

#: Concurrency group of short calls to the compute actor: they never wait behind streams.
CONTROL = "control"
#: Concurrency group of a host's changes of part: one after the other.
PART = "part"


def call(method: Any, *args: object, timeout_s: float | None = None) -> Any:
    """Call an actor's method and wait. Raises our own errors as they were raised there, GetTimeoutError."""
    return fetch(lambda: ray.get(method.remote(*args), timeout=timeout_s))


def fetch(get: Callable[[], T]) -> T:
    """What ``get`` gives. Raises our own errors as they were raised in the actor."""
    with our_errors():
        return get()


@contextmanager
def our_errors() -> Iterator[None]:
    """Map Ray's errors to ours."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, MorayError):
            raise error.cause from None
        raise
    except (RayActorError, ActorUnschedulableError) as error:  # the second: its node is gone
        raise ActorLostError(f"an actor of the engine is gone ({first_line(error)}); start the engine again") from error


def first_line(error: Exception) -> str:
    """Of an error's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
