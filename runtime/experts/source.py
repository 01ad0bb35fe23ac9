"""Where a layer's expert shards come from, seen from the process that computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moray.runtime.arrays import Bools, Bytes, Floats, Ints
from moray.runtime.layout.packed import VECTOR_BYTES
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.memory import require_memory
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.store import Store

if TYPE_CHECKING:
    from moray.runtime.kernels.gates import Gate
    from moray.runtime.kernels.ops import Grouping


class Lease(Protocol):
    """The right to read some shards of one layer.

    ``addresses``: int64 [E], where each shard begins in this process's memory, in the order asked for.
    """

    addresses: Ints

    def is_valid(self) -> bool:
        """Whether every shard is still what was leased. Call after use; if False, discard the results and retry."""
        ...


class Fetch(Protocol):
    """One layer call's experts on their way. Take, compute, finish what was valid, until nothing is left."""

    missed: Ints  # experts that were not here at the beginning

    @property
    def is_over(self) -> bool: ...

    def take(self) -> tuple[Ints, Lease]:
        """Those that are here and not finished: their positions in the list asked for, at least one, and their lease.

        Waits if none is here. Raises CorruptShardError, StoreError or HostLostError when a shard cannot be had.
        """
        ...

    def finish(self, positions: Ints) -> None:
        """These are computed: their memory may be given to others."""
        ...


class LeaseTable:
    """A layer's experts by index, as far as they are in memory: int64 [C, E], whose columns kernels/memory.py names.

    A shard lies at its address as long as the counter at ``counters`` has the value in ``generations``; so a counter
    that never has it says that the shard must be fetched. Shards that move have columns that say where to look.
    """

    def __init__(self, columns: Ints) -> None:
        self.columns = columns
        self.addresses: Ints = columns[0]
        self.counters: Ints = columns[1]
        self.generations: Ints = columns[2]

    @classmethod
    def fixed(cls, addresses: Ints, counters: Ints, generations: Ints) -> LeaseTable:
        return cls(np.stack((addresses, counters, generations)))


class RemoteCall(Protocol):
    """A layer call of which other machines compute a part."""

    here: Ints  # positions in the list of active experts: those to be computed here at once
    elsewhere: Bools  # [E], the others, except those that came back

    @property
    def is_over(self) -> bool: ...

    def take(self) -> tuple[list[tuple[Ints, Floats]], Ints]:
        """Outputs that have arrived, as numbers of pairs and float32 [P, H], and positions to be computed here after
        all. Waits for either, with a deadline.
        """
        ...

    def note_computed(self, num_experts: int, num_pairs: int, seconds: float) -> None:
        """So long did experts take here."""
        ...

    def note_loaded(self, num_experts: int, seconds: float) -> None:
        """So long were experts waited for that must be loaded here."""
        ...

    def close(self) -> None:
        """Must be called before the next ``begin``."""
        ...


class RemoteExperts(Protocol):
    """Other machines that compute experts."""

    def begin(self, layer: int, grouping: Grouping, x_TH: Floats, gate: Gate) -> RemoteCall | None:
        """Send what others compute of a layer call: gated experts on float32 [T, H]. None: nothing."""
        ...


class ShardSource(Protocol):
    """Gives shards to the step loop's thread, the only one that calls."""

    @property
    def remote(self) -> RemoteExperts | None:
        """Where experts can be computed besides this process. What that does is the last place of ``describe``."""
        ...

    def fetch(self, layer: int, experts: Ints) -> Fetch: ...

    def table(self, layer: int) -> LeaseTable | None:
        """What is in memory now and needs no asking. None: there is no such table."""
        ...


class ExpertSource(ShardSource, Protocol):
    """One that can be told what is used, and what will be."""

    @property
    def wants_uses(self) -> bool:
        """Whether ``used`` should be told of layer calls: not if everything stays in memory anyway."""
        ...

    @property
    def wants_hints(self) -> bool:
        """Whether ``hint`` does any good now."""
        ...

    def used(self, layer: int, experts: list[int]) -> None:
        """A layer call used these."""
        ...

    def hint(self, layer: int, experts: list[int]) -> None:
        """A layer soon to come will probably use these, the likeliest first."""
        ...

    def describe(self) -> list[SourceInfo]:
        """One entry for each place that holds shards."""
        ...

    def owner_of(self, layer: int) -> Ints:
        """int64 [num_experts]: index into ``describe()`` of the place that holds each expert."""
        ...

    def stats(self) -> SourceStats: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A place that holds shards."""

    name: str  # "memory" for this process, else the host's id
    tier: str  # "process", "arena" or "remote"
    num_experts: int
    num_bytes: int


@dataclass(slots=True)
class SourceStats:
    """What layer calls did not find in memory."""

    misses: int = 0  # uses of experts by layer calls
    missed_bytes: int = 0  # read from disk because a layer needed it
    wait_s: float = 0.0  # with nothing to compute


@dataclass(slots=True)
class FixedLease:
    """A lease on memory that never changes."""

    addresses: Ints

    def is_valid(self) -> bool:
        return True


class FixedFetch:
    """Everything is here."""

    def __init__(self, addresses: Ints) -> None:
        self._addresses, self.is_over = addresses, False
        self.missed: Ints = addresses[:0]

    def take(self) -> tuple[Ints, Lease]:
        return np.arange(len(self._addresses)), FixedLease(self._addresses)

    def finish(self, positions: Ints) -> None:
        self.is_over = True


class BlankSource:
    """Zeros in place of every shard, one piece of memory for all: to try a model without reading experts."""

    remote = None

    def __init__(self, manifest: Manifest) -> None:
        self._num_experts = [layer.num_experts for layer in manifest.layers]
        room = np.zeros(manifest.slot_bytes + VECTOR_BYTES, dtype=np.uint8)
        self._shard = room[-room.ctypes.data % VECTOR_BYTES :]
        self._zero: Ints = np.zeros(1, dtype=np.int64)

    def fetch(self, layer: int, experts: Ints) -> Fetch:
        return FixedFetch(np.full(len(experts), self._shard.ctypes.data, dtype=np.int64))

    def table(self, layer: int) -> LeaseTable:
        def column(value: int) -> Ints:
            return np.full(self._num_experts[layer], value, dtype=np.int64)

        return LeaseTable.fixed(column(self._shard.ctypes.data), column(self._zero.ctypes.data), column(0))


class InProcessSource:
    """All shards of a store in this process's private memory: the smallest source, for tests and libraries."""

    wants_uses = wants_hints = False
    remote = None

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
            generations: Ints = np.zeros(layer.num_experts, dtype=np.int64)
            self._tables.append(LeaseTable.fixed(addresses, counters, generations))

    def fetch(self, layer: int, experts: Ints) -> Fetch:
        return FixedFetch(self._tables[layer].addresses[experts])

    def table(self, layer: int) -> LeaseTable:
        return self._tables[layer]

    def used(self, layer: int, experts: list[int]) -> None:
        pass

    def hint(self, layer: int, experts: list[int]) -> None:
        pass

    def describe(self) -> list[SourceInfo]:
        return [SourceInfo("memory", "process", len(self._shards), self._store.manifest.expert_bytes)]

    def owner_of(self, layer: int) -> Ints:
        return np.zeros(len(self._tables[layer].addresses), dtype=np.int64)

    def stats(self) -> SourceStats:
        return SourceStats()

    def close(self) -> None:
        self._shards.clear()
