"""The expert host: a shell around ``ShardHost`` and its data-plane server."""

from __future__ import annotations

import os
from dataclasses import replace
from time import perf_counter
from typing import Any

from moray.actors.guard import exit_with
from moray.actors.home import Home
from moray.actors.messages import HostConfig, HostReport
from moray.cluster.keys import CurveKeys, CurveServer
from moray.cluster.server import DataPlaneServer
from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.errors import HostLostError, MorayError
from moray.runtime.events import HostRestarted
from moray.runtime.experts.shard_host import HostStats, ShardHost
from moray.runtime.store.store import Store
from moray.runtime.topology import cores_of_host, on_cores, read_cores


class ExpertHost:
    """Fills its arena when it is made, and serves over the data plane meanwhile and until its process ends."""

    def __init__(self, config: HostConfig, home: Home) -> None:
        exit_with(config.owner)
        self._curve: CurveServer | None = None
        self._outcome: HostReport | MorayError
        try:
            with on_cores(cores_of_host(read_cores(), config.index, config.num_hosts)):
                self._outcome = self._start(config, home)
        except MorayError as error:
            self._outcome = error  # Ray would turn an error of the constructor into text

    def report(self) -> HostReport:
        """Answers once the host serves. Raises what kept it from starting."""
        if isinstance(self._outcome, MorayError):
            raise self._outcome
        return self._outcome

    def admit(self, client_key: str) -> None:
        """Let the holder of this public key connect."""
        if self._curve is not None:
            self._curve.allow(client_key)

    def stats(self) -> HostStats:
        return self._host.stats()

    def wait_filled(self) -> None:
        """Wait until the arena is full or holds all. Raises what kept a shard from being loaded."""
        self._host.wait_filled()

    def _start(self, config: HostConfig, home: Home) -> HostReport:
        started = perf_counter()
        orders = home.starting(config.address.host_id, os.getpid())
        store = Store.open(config.store_path)
        num_threads = min(config.num_threads, len(os.sched_getaffinity(0)))
        caching, address = config.caching, config.address
        is_remote = address.address.startswith("tcp://")
        arena = None if is_remote else _take_back(orders.survivor)
        options: dict[str, Any] = {"policy": caching.policy, "prefetch": caching.prefetch}
        self._host = ShardHost(
            store,
            config.keys,
            num_threads,
            arena,
            num_slots=config.num_slots,
            assigned=config.assigned,
            **options,
        )
        if is_remote:
            keys = CurveKeys.make()
            self._curve = CurveServer(keys, home.client_keys())
            address = replace(address, server_key=keys.public)
        self._server = DataPlaneServer(address.host_id, self._host, address.address, address.token, self._curve)
        address = replace(address, address=self._server.address)
        if is_remote:
            home.announce(address)
        if orders.num_restarts:
            home.note([HostRestarted(orders.cause, address.host_id, os.getpid(), self._host.num_adopted)])
        return HostReport(
            host_id=address.host_id,
            node_id=home.node_id(),
            pid=os.getpid(),
            address=address,
            num_experts=len(config.keys),
            num_assigned=len(config.assigned),
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
