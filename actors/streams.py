"""Streams that outlive the compute actor: after a restart, prompt and delivered tokens are replayed.

``Replay`` decides, purely; ``stream`` carries out, for the Python API and the HTTP ingress alike.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from time import perf_counter, sleep
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from moray.actors.calls import CONTROL, fetch
from moray.actors.compute import EVENT_INTERVAL_S
from moray.actors.ledger import COMPUTE, LedgerClient
from moray.actors.messages import ComputeReport
from moray.runtime.errors import ActorLostError, ClusterError
from moray.runtime.events import StreamResumed, cause_of
from moray.runtime.generation.request import Prompt, SamplingParams, Timings, TokenEvent

T = TypeVar("T")

MAX_LOSSES = 3  # of the compute actor, in a row without a token: more would come of the request itself
RESTART_S = 600.0  # a large trunk may have to come from a slow disk
_POLL_S = 0.05
_LEAST_S = 1e-3  # left to a request whose time ran out meanwhile


class Replay:
    """One stream over as many compute actors as it takes."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: SamplingParams,
        stop: tuple[str, ...],
        timeout_s: float | None = None,
        interval_s: float = EVENT_INTERVAL_S,
    ) -> None:
        """As ``ComputeActor.generate``."""
        if sampling.temperature and sampling.seed is None:  # what is random must be so once only
            sampling = replace(sampling, seed=secrets.randbits(63))
        self.request_id = request_id
        self._order = (prompt, max_new_tokens, sampling, stop)
        self._timeout_s, self._interval_s = timeout_s, interval_s
        self._generated: list[int] = []
        self._num_losses = self._losses_in_a_row = 0
        self._started_s = self._first_token_s = perf_counter()

    @property
    def attempt_id(self) -> str:
        """The request's id at the compute actor: another one each time, for the last may still be in use there."""
        return f"{self.request_id}.{self._num_losses}" if self._num_losses else self.request_id

    @property
    def num_generated(self) -> int:
        return len(self._generated)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of ``ComputeActor.generate``, for the present attempt."""
        left_s = None
        if self._timeout_s is not None:
            left_s = max(_LEAST_S, self._timeout_s - (perf_counter() - self._started_s))
        return (self.attempt_id, *self._order, tuple(self._generated), left_s, self._interval_s)

    def take(self, event: TokenEvent) -> TokenEvent:
        """An event of the present attempt; returns it as the caller's stream has it."""
        if event.token_ids and not self._generated:
            self._first_token_s = perf_counter()
        self._generated += event.token_ids
        self._losses_in_a_row = 0
        finished = event.finished
        if finished is not None and self._num_losses:  # the last actor did not see the beginning
            times = Timings(self._first_token_s - self._started_s, perf_counter() - self._first_token_s)
            finished = replace(finished, timings=times)
        return replace(event, request_id=self.request_id, finished=finished)

    def lose(self, error: Exception) -> None:
        """The compute actor was lost. Raises ClusterError if it is not worth another attempt."""
        self._num_losses += 1
        self._losses_in_a_row += 1
        if self._losses_in_a_row > MAX_LOSSES:
            raise ClusterError(
                f"the compute actor ended {self._losses_in_a_row} times in a row before it gave token "
                f"{self.num_generated + 1} of this request; is there memory enough? See dmesg and Ray's logs"
            ) from error


def stream(compute: Any, ledger: LedgerClient, replay: Replay) -> Iterator[TokenEvent]:
    """Yield the stream's events; the last has ``finished``. Leaving the iterator cancels.

    Raises RequestError, or ClusterError if the compute actor cannot be brought back.
    """
    is_over = False
    try:
        while True:
            generator = compute.generate.options(num_returns="streaming").remote(*replay.arguments)
            try:
                while not is_over:
                    event = replay.take(fetch(partial(_next, generator)))
                    is_over = event.finished is not None
                    yield event
                return
            except ActorLostError as error:
                resume(compute, ledger, replay, error)
    finally:
        if not is_over:
            cancel(compute, replay.attempt_id)


def _next(generator: Any) -> TokenEvent:
    event: TokenEvent = ray.get(next(generator))
    return event


def resume(compute: Any, ledger: LedgerClient, replay: Replay, error: ActorLostError) -> None:
    """The compute actor was lost: wait until another attempt can be made. Raises ClusterError if none can."""
    lost_s = perf_counter()
    cancel(compute, replay.attempt_id)  # should it still live, and only its connection be gone
    replay.lose(error)
    report = await_compute(compute)
    cause = report.cause or cause_of(COMPUTE, report.pid)
    ledger.note([StreamResumed(cause, replay.request_id, replay.num_generated, perf_counter() - lost_s)])


def cancel(compute: Any, request_id: str) -> None:
    """Without waiting. A stream may be left after its engine was closed: then there is nothing to cancel."""
    if ray.is_initialized():
        compute.cancel.options(concurrency_group=CONTROL).remote(request_id)


def insist(compute: Any, work: Callable[[], T]) -> T:
    """``work`` that only asks the compute actor: done again if the actor was lost meanwhile."""
    for _ in range(MAX_LOSSES):
        try:
            return work()
        except ActorLostError:
            await_compute(compute)
    return work()


def await_compute(compute: Any) -> ComputeReport:
    """Wait until supervision has brought the compute actor back. Raises ClusterError if it cannot."""
    report: ComputeReport = await_actor(compute, concurrency_group=CONTROL)
    return report


def await_actor(actor: Any, **options: Any) -> Any:
    """What an actor reports, once it serves. Raises ClusterError if it cannot be brought back."""
    deadline = perf_counter() + RESTART_S
    while perf_counter() < deadline:
        reference = actor.report.options(**options).remote()
        try:
            return fetch(partial(ray.get, reference, timeout=max(0.0, deadline - perf_counter())))
        except ActorLostError as error:
            if not isinstance(error.__cause__, ActorUnavailableError):
                raise  # for good
            sleep(_POLL_S)
        except GetTimeoutError:
            break
    raise ClusterError(
        f"an actor of the engine was not back after {RESTART_S:g} s; see Ray's logs, then close the engine and start "
        "it again"
    )
