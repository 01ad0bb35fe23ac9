"""The orchestrator: where experts live and who survives. Decides; never waited for by a layer."""

from __future__ import annotations

from collections.abc import Sequence

from moray.actors.guard import Owner, exit_with
from moray.cluster.placement import place_evenly
from moray.runtime.arena import ArenaRef
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store


class Orchestrator:
    """One engine's plan, and what it needs to bring a lost host back."""

    def __init__(self, store_path: str, host_ids: Sequence[str], owner: Owner | None) -> None:
        exit_with(owner, end_ray=True)
        self._store_path, self._host_ids = store_path, tuple(host_ids)
        self._survivors: dict[str, ArenaRef] = {}

    def placement(self) -> dict[str, list[ExpertKey]]:
        """Host id -> the experts it holds. Raises StoreError, ConfigError."""
        with Store.open(self._store_path) as store:
            return place_evenly(store.manifest, self._host_ids)

    def record_survivors(self, arenas: dict[str, ArenaRef]) -> None:
        """Remember which process, besides a host, holds its arena open."""
        self._survivors.update(arenas)

    def survivor(self, host_id: str) -> ArenaRef | None:
        """Where a restarted host finds its arena; None if it is the first to ask."""
        return self._survivors.get(host_id)
