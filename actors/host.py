"""The expert host: a shell around ``ShardHost`` and its data-plane server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from moray.actors.guard import exit_with
from moray.actors.home import Home
from moray.actors.messages import HostConfig, HostReport
from moray.cluster.client import HostAddress
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.peers import Peers
from moray.cluster.server import DataPlaneServer
from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.cpu import usable_cores
from moray.runtime.errors import HostLostError, MorayError
from moray.runtime.events import HostRestarted
from moray.runtime.experts.shard_host import HostStats, ShardHost
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.prefetch.replication import ReplicationBudget
from moray.runtime.store.store import Store
from moray.runtime.topology import cores_of_host, on_cores, read_cores

_START_CORES = 2  # what imports and tries the model meanwhile computes with


class ExpertHost:
    """Serves over the data plane from when it is made until its process ends, and fills its arena meanwhile.

    On the compute actor's node it leaves disk and cores to the trunk until ``fill`` is called.
    """

    def __init__(self, config: HostConfig, home: Home) -> None:
        exit_with(config.owner)
        self._host_id = config.address.host_id
        self._admission: Admission | None = None  # None: no other node is part of the engine
        self._peers: Peers | None = None
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
        if self._admission is not None:
            self._admission.allow(client_key)

    def set_peers(self, hosts: Sequence[HostAddress]) -> None:
        """The other hosts now: they may read here, and what this node's disk lacks or has damaged comes from them."""
        if self._admission is None or self._peers is None:
            return
        for host in hosts:
            self._admission.allow(host.server_key)
        self._peers.set_hosts(hosts)
        self._host.assign(self._host.assigned)  # somebody may have what could not be loaded

    def assign(self, keys: Sequence[ExpertKey]) -> None:
        """Keep these in memory from now on, as far as it reaches."""
        self._host.assign(keys)

    def replicate(self, keys: Sequence[ExpertKey]) -> None:
        """Copy these here in the background, the hottest first, in place of what is used less."""
        self._host.replicate(keys)

    def fill(self) -> None:
        """The compute actor is ready."""
        self._host.fill()

    def stats(self) -> HostStats:
        return replace(self._host.stats(), host_id=self._host_id)

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
        network = address.address if is_remote else config.network
        keys = KeyPair.make() if network else None
        self._peers = Peers(store.manifest, [], keys) if keys else None
        arena = None if is_remote else _take_back(orders.survivor)
        options: dict[str, Any] = {"policy": caching.policy, "prefetch": caching.prefetch}
        if caching.replication:
            options["replication"] = ReplicationBudget(caching.replication)
        if not is_remote and not orders.num_restarts:
            options["start_reads"] = max(0, usable_cores() - _START_CORES)
        self._host = ShardHost(
            store,
            config.keys,
            num_threads,
            arena,
            num_slots=config.num_slots,
            assigned=() if keys else config.assigned,
            peers=self._peers,
            **options,
        )
        if not is_remote:
            self._server = DataPlaneServer(address.host_id, self._host, address.address, address.token)
        if network and keys:
            self._admission = Admission(keys, home.client_keys())
            self._network = DataPlaneServer(address.host_id, self._host, network, address.token, self._admission)
            reached = replace(address, address=self._network.address, server_key=keys.public)
            address = reached if is_remote else address
            part = home.announce(reached)
            self.set_peers(part.peers)
            self._host.assign(part.assigned)  # with whom to ask for what cannot be read here
        if orders.num_restarts:
            home.note([HostRestarted(orders.cause, address.host_id, os.getpid(), self._host.num_adopted)])
        return HostReport(
            host_id=address.host_id,
            node_id=home.node_id(),
            pid=os.getpid(),
            address=address,
            num_experts=len(config.keys),
            num_assigned=len(self._host.assigned),
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
