"""What went wrong in an engine, and what was done about it.

Every event carries the id of its cause, ``ACTOR:PID`` of the process that was lost, with ``.N`` if it was lost more
than once. Whoever notices a loss derives the same id, so one id finds the loss, the restart and the streams it delayed.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from time import time
from typing import Literal

MAX_EVENTS = 1000  # kept

_logger = logging.getLogger("moray.events")


def cause_of(actor: str, pid: int, count: int = 0) -> str:
    """The id of a loss. ``count``: how often this process was lost, and came back, before."""
    return f"{actor}:{pid}.{count}" if count else f"{actor}:{pid}"


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""

    cause: str
    at_s: float = field(default_factory=time, kw_only=True)  # Unix time

    @property
    def kind(self) -> str:
        """The class's name as people write it: host-lost."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__).lower()

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({"event": self.kind} | asdict(self))


@dataclass(frozen=True, slots=True)
class HostLost(Event):
    """The compute process does not wait for this host any more: it reads from the disk what the host lacks."""

    host_id: str
    how: Literal["ended", "stopped", "silent"]


@dataclass(frozen=True, slots=True)
class HostBack(Event):
    """The host is used again."""

    host_id: str
    lost_s: float
    shards_read: int  # by the compute process meanwhile


@dataclass(frozen=True, slots=True)
class HostRestarted(Event):
    host_id: str
    pid: int
    num_kept: int  # shards that were still in its arena


@dataclass(frozen=True, slots=True)
class RemoteHostChanged(Event):
    """A host on another node is suspected, given up or used again; its cause is its id, its process is not known."""

    host_id: str
    old: str  # states of cluster/health.py
    new: str
    why: str


@dataclass(frozen=True, slots=True)
class ComputeFailed(Event):
    """A compute actor that could not be brought back; another one is tried."""

    reason: str


@dataclass(frozen=True, slots=True)
class ComputeRestarted(Event):
    pid: int
    num_restarts: int
    start_s: float


@dataclass(frozen=True, slots=True)
class OrchestratorRestarted(Event):
    pid: int


@dataclass(frozen=True, slots=True)
class StreamResumed(Event):
    """A stream goes on that lost its compute actor."""

    request_id: str
    num_tokens: int  # replayed
    paused_s: float  # until the new actor took it


class EventLog:
    """The last events, oldest first. Not thread-safe."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._events: deque[Event] = deque(events, maxlen=MAX_EVENTS)

    def record(self, events: Iterable[Event]) -> None:
        """Keep and log events; one that is told twice is kept once."""
        for event in events:
            if event not in self._events:
                self._events.append(event)
                _logger.warning(event.line())

    def snapshot(self) -> tuple[Event, ...]:
        return tuple(self._events)
