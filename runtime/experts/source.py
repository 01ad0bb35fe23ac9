"""Where a layer's expert shards come from, seen from the process that computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moray.runtime.layout.packed import Bytes
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.memory import require_memory
from moray.runtime.store.store import Store

Ints = npt.NDArray[np.int64]


class Lease(Protocol):
    """The right to read some shards of one layer, from ``lease`` to ``release``.

    ``addresses``: int64 [E], where each shard begins in this process's memory, in the order asked for.
    """

    addresses: Ints

    def is_valid(self) -> bool:
        """Whether every shard is still what was leased. Call after use; if False, discard the results and retry."""
        ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LeaseTable:
    """What a source has leased for good, a layer's experts by index: kept up to date in place. All int64 [E].

    A shard lies at its address as long as the counter at ``counters`` has the value in ``generations``; so a counter
    that never has it says that the shard must be asked for with ``lease``.
    """

    addresses: Ints
    counters: Ints
    generations: Ints


class ExpertSource(Protocol):
    """Hands out leases. Called by one thread, the step loop's.

    ``lease`` may wait for shards to be loaded. It raises CorruptShardError, StoreError or HostLostError when a
    shard cannot be had.
    """

    def lease(self, layer: int, experts: Ints) -> Lease: ...

    def table(self, layer: int) -> LeaseTable | None:
        """Leases that need no asking. None: there are none."""
        ...

    def describe(self) -> list[SourceInfo]:
        """One entry for each place that holds shards."""
        ...

    def owner_of(self, layer: int) -> Ints:
        """int64 [num_experts]: index into ``describe()`` of the place that holds each expert."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A place that holds shards."""

    name: str  # "memory" for this process, else the host's id
    tier: str  # "process" or "arena"
    num_experts: int
    num_bytes: int


@dataclass(slots=True)
class FixedLease:
    """A lease on memory that never changes."""

    addresses: Ints

    def is_valid(self) -> bool:
        return True

    def release(self) -> None:
        pass


class InProcessSource:
    """All shards of a store in this process's private memory: the smallest source, for tests and libraries."""

    def __init__(self, store: Store) -> None:
        self._store = store
        manifest = store.manifest
        require_memory(manifest.expert_bytes, "loading all experts into this process")
        self._shards: dict[ExpertKey, Bytes] = {}
        self._tables: list[LeaseTable] = []
        self._zero: Ints = np.zeros(1, dtype=np.int64)  # the generation of all of them
        for index, layer in enumerate(manifest.layers):
            addresses = np.empty(layer.num_experts, dtype=np.int64)
            for expert in range(layer.num_experts):
                shard = store.read_shard(ExpertKey(index, expert))
                self._shards[ExpertKey(index, expert)] = shard
                addresses[expert] = shard.ctypes.data
            counters = np.full(layer.num_experts, self._zero.ctypes.data)
            self._tables.append(LeaseTable(addresses, counters, np.zeros(layer.num_experts, dtype=np.int64)))

    def lease(self, layer: int, experts: Ints) -> Lease:
        return FixedLease(self._tables[layer].addresses[experts])

    def table(self, layer: int) -> LeaseTable:
        return self._tables[layer]

    def describe(self) -> list[SourceInfo]:
        return [SourceInfo("memory", "process", len(self._shards), self._store.manifest.expert_bytes)]

    def owner_of(self, layer: int) -> Ints:
        return np.zeros(len(self._tables[layer].addresses), dtype=np.int64)

    def close(self) -> None:
        self._shards.clear()
