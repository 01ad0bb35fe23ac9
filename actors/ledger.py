"""What must outlive any actor of an engine: where hosts listen, who holds which arena, who started how often, events.

The orchestrator holds it, and keeps a copy outside its process (Ray's key-value store), from which a restarted
orchestrator goes on. So any actors may end at any time, also together.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moray.cluster.client import HostAddress
from moray.runtime.arena import ArenaRef
from moray.runtime.errors import ClusterError
from moray.runtime.events import ComputeFailed, Event, EventLog, OrchestratorRestarted, cause_of

COMPUTE = "compute"
MAX_FAILED_STARTS = 3  # of a compute actor in a row, before the engine gives up


class Memory(Protocol):
    """Where the ledger is kept. What is in it comes from this engine only."""

    def keep(self, state: bytes) -> None: ...

    def recall(self) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class StartOrders:
    """What a process is told that starts as an actor."""

    num_restarts: int
    cause: str  # why it was restarted
    hosts: tuple[HostAddress, ...]  # for the compute actor; empty: it will be told
    survivor: ArenaRef | None  # for a host: where its arena still is


@dataclass(slots=True)
class _State:
    pids: dict[str, list[int]] = field(default_factory=dict)  # actor -> all processes that it had
    failed_starts: int = 0  # of the compute actor since it was last ready
    hosts: tuple[HostAddress, ...] = ()
    survivors: dict[str, ArenaRef] = field(default_factory=dict)
    client_keys: tuple[str, ...] = ()
    reached: dict[str, HostAddress] = field(default_factory=dict)
    watches: bool = False
    events: tuple[Event, ...] = ()


class Ledger:
    """Thread-safe. All methods may be called twice with the same: callers repeat what an orchestrator may have lost."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._lock = memory, threading.Lock()
        kept = memory.recall()
        self._state: _State = _State() if kept is None else pickle.loads(kept)
        self._log = EventLog(self._state.events)
        before = self._pids("orchestrator")
        before.append(os.getpid())
        self.is_restarted = len(before) > 1
        if self.is_restarted:
            self._log.record([OrchestratorRestarted(cause_of("orchestrator", before[-2]), before[-1])])
        self._keep()

    def starting(self, actor: str, pid: int) -> StartOrders:
        """A process starts as this actor. Raises ClusterError if the compute actor has failed to too often."""
        with self._lock:
            pids = self._pids(actor)
            if pid not in pids:
                pids.append(pid)
                if actor == COMPUTE:
                    self._state.failed_starts += 1
                self._keep()
            if actor == COMPUTE and self._state.failed_starts > MAX_FAILED_STARTS:
                raise ClusterError(self._given_up())
            cause = cause_of(actor, pids[-2]) if len(pids) > 1 else ""
            return StartOrders(len(pids) - 1, cause, self._state.hosts, self._state.survivors.get(actor))

    def compute_ready(self, arenas: dict[str, ArenaRef]) -> None:
        """The compute actor serves. ``arenas``: its own descriptors of the hosts' arenas."""
        with self._lock:
            self._state.failed_starts = 0
            self._state.survivors.update(arenas)
            self._keep()

    def record_hosts(self, hosts: Sequence[HostAddress]) -> None:
        """Where a restarted compute actor finds the hosts."""
        with self._lock:
            self._state.hosts = tuple(hosts)
            self._keep()

    def reach(self, address: HostAddress) -> None:
        """Hosts of other nodes reach a host of the compute node here."""
        with self._lock:
            self._state.reached[address.host_id] = address
            self._keep()

    @property
    def reached(self) -> dict[str, HostAddress]:
        """What ``reach`` was told last, by host id."""
        with self._lock:
            return dict(self._state.reached)

    @property
    def client_keys(self) -> tuple[str, ...]:
        """Public keys of who may connect over the network."""
        return self._state.client_keys

    def admit(self, client_key: str) -> None:
        with self._lock:
            if client_key not in self._state.client_keys:
                self._state.client_keys += (client_key,)
                self._keep()

    @property
    def watches(self) -> bool:
        """Whether nodes may come and go."""
        return self._state.watches

    def watch(self) -> None:
        with self._lock:
            self._state.watches = True
            self._keep()

    def note(self, events: Sequence[Event]) -> None:
        with self._lock:
            self._log.record(events)
            self._keep()

    def events(self) -> tuple[Event, ...]:
        with self._lock:
            return self._log.snapshot()

    def _pids(self, actor: str) -> list[int]:
        return self._state.pids.setdefault(actor, [])

    def _keep(self) -> None:
        self._state.events = self._log.snapshot()
        self._memory.keep(pickle.dumps(self._state))

    def _given_up(self) -> str:
        reasons = [event.reason for event in self._log.snapshot() if isinstance(event, ComputeFailed)]
        last = f", the last time because: {reasons[-1]}" if reasons else " (killed? see dmesg)"
        return (
            f"the compute actor ended {MAX_FAILED_STARTS} times while it was restarted{last}; "
            "close the engine and start it again"
        )


class LedgerClient(Protocol):
    """The ledger as actors see it: its methods, called through the orchestrator."""

    def starting(self, actor: str, pid: int) -> StartOrders: ...

    def compute_ready(self, arenas: dict[str, ArenaRef]) -> None: ...

    def note(self, events: Sequence[Event], *, wait: bool = False) -> None: ...
