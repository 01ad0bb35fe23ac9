"""The experts of hosts on this node, used in place: their arenas mapped into the compute process."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.messages import Granted, Need, Welcome
from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.errors import ClusterError, ProtocolError
from moray.runtime.experts.source import Ints, Lease, LeaseTable, SourceInfo
from moray.runtime.kernels.memory import all_equal
from moray.runtime.layout.packed import LAYOUT_ID
from moray.runtime.store.store import Store


class ArenaLease:
    """Slots leased once and for all; valid while none of their generations has moved."""

    def __init__(self, addresses: Ints, counters: Ints, generations: Ints) -> None:
        self.addresses = addresses
        self._counters, self._generations = counters, generations

    def is_valid(self) -> bool:
        return bool(all_equal(self._counters, self._generations))

    def release(self) -> None:
        """Nothing to do: the host keeps these shards resident for as long as this process lives."""


class _Layer:
    """For each expert of a layer: its host, and its lease."""

    def __init__(self, num_experts: int) -> None:
        self.owners = np.full(num_experts, -1, dtype=np.int64)
        self.leases = LeaseTable(*(np.zeros(num_experts, dtype=np.int64) for _ in range(3)))


class ArenaSource:
    """Leases every expert of every host at the start; the hot path then sends nothing.

    A slot whose generation moved (its host was restarted and had to load it again) is leased anew.
    """

    def __init__(self, store: Store, hosts: Sequence[HostAddress]) -> None:
        """Connect to all hosts. Raises ClusterError if they do not hold this store's experts between them."""
        self._store = store
        self._tables = [_Layer(layer.num_experts) for layer in store.manifest.layers]
        self._clients = [HostClient(host, f"compute-{os.getpid()}") for host in hosts]
        self._arenas: list[Arena] = []
        self._infos: list[SourceInfo] = []
        try:
            for index in range(len(hosts)):
                self._join(index)
            missing = sum(int((table.owners < 0).sum()) for table in self._tables)
            if missing:
                raise ClusterError(f"{missing} experts of {store.path} live on no host; start the engine again")
        except BaseException:
            self.close()  # a connection left to the garbage collector blocks it
            raise

    def lease(self, layer: int, experts: Ints) -> Lease:
        table = self._tables[layer]
        lease = self._make(table.leases, experts)
        if not lease.is_valid():
            for host in np.unique(table.owners[experts]).tolist():
                owned = np.flatnonzero(table.owners == host)
                self._lease_experts(host, layer, owned.tolist())
            lease = self._make(table.leases, experts)
        return lease

    def table(self, layer: int) -> LeaseTable:
        return self._tables[layer].leases

    def describe(self) -> list[SourceInfo]:
        return list(self._infos)

    def owner_of(self, layer: int) -> Ints:
        return self._tables[layer].owners

    def arena_refs(self) -> dict[str, ArenaRef]:
        """This process's own descriptors of the arenas: what a restarted host takes its arena back from."""
        return {info.name: arena.ref for info, arena in zip(self._infos, self._arenas, strict=True)}

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for arena in self._arenas:
            arena.close()

    def _join(self, index: int) -> None:
        """Map a host's arena and lease all that is in it."""
        welcome = self._clients[index].greet()
        _check(welcome, self._store.fingerprint, self._store.manifest.numerics_id)
        self._arenas.append(Arena.attach(ArenaRef(welcome.arena_pid, welcome.arena_fd, welcome.arena_bytes)))
        for layer, experts in enumerate(welcome.experts):
            self._lease_experts(index, layer, experts)
        count = sum(len(experts) for experts in welcome.experts)
        self._infos.append(SourceInfo(welcome.host_id, "arena", count, welcome.arena_bytes))

    def _make(self, table: LeaseTable, experts: Ints) -> ArenaLease:
        return ArenaLease(table.addresses[experts], table.counters[experts], table.generations[experts])

    def _lease_experts(self, host: int, layer: int, experts: list[int]) -> None:
        if not experts:
            return
        reply, _ = self._clients[host].request(Need(layer=layer, experts=experts))
        if not isinstance(reply, Granted) or len(reply.slots) != len(experts):
            raise ProtocolError(f"host {self._clients[host].host.host_id} answered Need with {reply!r}")
        arena, table, slots = self._arenas[host], self._tables[layer].leases, np.array(reply.slots, dtype=np.int64)
        self._tables[layer].owners[experts] = host
        table.addresses[experts] = arena.addresses(slots)
        table.counters[experts] = arena.counter_addresses(slots)
        table.generations[experts] = reply.generations


def _check(welcome: Welcome, fingerprint: str, numerics_id: str) -> None:
    mine, theirs = (
        (fingerprint, LAYOUT_ID, numerics_id),
        (
            welcome.store_fingerprint,
            welcome.layout_id,
            welcome.numerics_id,
        ),
    )
    if mine != theirs:
        raise ClusterError(
            f"expert host {welcome.host_id} holds another store or speaks another format: it has {theirs}, "
            f"this process has {mine}; give every node the same store and the same version of moray"
        )
