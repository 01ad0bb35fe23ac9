"""The orchestrator: where experts live, and what outlives its actors. Decides; never waited for by a layer."""

from __future__ import annotations

import os
from collections.abc import Sequence

from moray.actors.guard import Owner, exit_with
from moray.actors.ledger import Ledger, Memory, StartOrders
from moray.actors.messages import OrchestratorReport
from moray.cluster.client import HostAddress
from moray.cluster.placement import place_evenly
from moray.runtime.arena import ArenaRef
from moray.runtime.events import Event
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store


class Orchestrator:
    """One engine's plan, and what it needs to bring a lost actor back: the ledger, whose methods it passes on."""

    def __init__(self, store_path: str, host_ids: Sequence[str], owner: Owner | None, memory: Memory) -> None:
        exit_with(owner, end_ray=True)
        self._store_path, self._host_ids = store_path, tuple(host_ids)
        self._ledger = Ledger(memory)

    def placement(self) -> dict[str, list[ExpertKey]]:
        """Host id -> the experts it holds. Raises StoreError, ConfigError."""
        with Store.open(self._store_path) as store:
            return place_evenly(store.manifest, self._host_ids)

    def report(self) -> OrchestratorReport:
        return OrchestratorReport(os.getpid())

    def starting(self, actor: str, pid: int) -> StartOrders:
        return self._ledger.starting(actor, pid)

    def compute_ready(self, arenas: dict[str, ArenaRef]) -> None:
        self._ledger.compute_ready(arenas)

    def record_hosts(self, hosts: Sequence[HostAddress]) -> None:
        self._ledger.record_hosts(hosts)

    def note(self, events: Sequence[Event]) -> None:
        self._ledger.note(events)

    def events(self) -> tuple[Event, ...]:
        return self._ledger.events()
