"""How a request's events are joined on their way out of the step loop."""

from __future__ import annotations

import pytest

from moray.runtime.errors import MorayError
from moray.runtime.generation import runner
from moray.runtime.generation.request import Finished, Timings, TokenEvent, Usage
from moray.runtime.generation.runner import _Outbox

LONG_S = 1e4  # nobody waits so long: a test that did would hang


def event(token: int, *, is_last: bool = False) -> TokenEvent:
    end = Finished("length", Usage(1, 0, token), Timings(0.0, 0.0)) if is_last else None
    return TokenEvent("a", (token,), f"<{token}>", end)


def test_the_first_event_goes_out_at_once_and_later_ones_joined() -> None:
    outbox = _Outbox(LONG_S)
    for token in (1, 2, 3):
        outbox.put(event(token))
    assert outbox.take() == event(1)
    outbox.put(event(4, is_last=True))  # ends the wait
    assert outbox.take() == TokenEvent("a", (2, 3, 4), "<2><3><4>", event(4, is_last=True).finished)


def test_events_that_are_far_apart_are_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(runner, "perf_counter", lambda: now)
    outbox = _Outbox(LONG_S)
    for token in (1, 2, 3):
        outbox.put(event(token))
        assert outbox.take() == event(token)
        now += 0.6 * LONG_S


def test_without_an_interval_every_event_is_its_own() -> None:
    outbox = _Outbox(0.0)
    for token in (1, 2):
        outbox.put(event(token))
    assert [outbox.take(), outbox.take()] == [event(1), event(2)]


def test_an_error_comes_through() -> None:
    outbox = _Outbox(LONG_S)
    outbox.put(event(1))
    outbox.take()
    outbox.put(error := MorayError("lost"))
    assert outbox.take() is error
