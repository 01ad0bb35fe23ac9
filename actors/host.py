"""The expert host: a shell around ``ShardHost`` and its data-plane server."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter
from typing import Any

from moray.actors.guard import exit_with
from moray.actors.ledger import LedgerClient
from moray.actors.messages import HostConfig, HostReport
from moray.cluster.server import DataPlaneServer
from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.errors import HostLostError, MorayError
from moray.runtime.events import HostRestarted
from moray.runtime.experts.shard_host import HostStats, ShardHost
from moray.runtime.store.store import Store
from moray.runtime.topology import cores_of_host, on_cores, read_cores


class ExpertHost:
    """Fills its arena when it is made, and serves over the data plane meanwhile and until its process ends."""

    def __init__(self, config: HostConfig, node_id: Callable[[], str], ledger: LedgerClient) -> None:
        exit_with(config.owner)
        self._outcome: HostReport | MorayError
        try:
            with on_cores(cores_of_host(read_cores(), config.index, config.num_hosts)):
                self._outcome = self._start(config, node_id(), ledger)
        except MorayError as error:
            self._outcome = error  # Ray would turn an error of the constructor into text

    def report(self) -> HostReport:
        """Answers once the host serves. Raises what kept it from starting."""
        if isinstance(self._outcome, MorayError):
            raise self._outcome
        return self._outcome

    def stats(self) -> HostStats:
        return self._host.stats()

    def wait_filled(self) -> None:
        """Wait until the arena is full or holds all. Raises what kept a shard from being loaded."""
        self._host.wait_filled()

    def _start(self, config: HostConfig, node_id: str, ledger: LedgerClient) -> HostReport:
        started = perf_counter()
        orders = ledger.starting(config.address.host_id, os.getpid())
        store = Store.open(config.store_path)
        num_threads = min(config.num_threads, len(os.sched_getaffinity(0)))
        arena = _take_back(orders.survivor)
        caching = config.caching
        options: dict[str, Any] = {"policy": caching.policy, "prefetch": caching.prefetch}
        self._host = ShardHost(store, config.keys, num_threads, arena, num_slots=config.num_slots, **options)
        address = config.address
        self._server = DataPlaneServer(address.host_id, self._host, address.address, address.token)
        if orders.num_restarts:
            ledger.note([HostRestarted(orders.cause, address.host_id, os.getpid(), self._host.num_adopted)])
        return HostReport(
            host_id=address.host_id,
            node_id=node_id,
            pid=os.getpid(),
            num_experts=len(config.keys),
            arena=self._host.arena.ref,
            start_s=perf_counter() - started,
        )


def _take_back(ref: ArenaRef | None) -> Arena | None:
    if ref is None:
        return None
    try:
        return Arena.attach(ref, writable=True)
    except HostLostError:
        return None  # the survivor is gone too: load from disk
