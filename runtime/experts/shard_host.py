"""What an expert host does, without its process: shards of one store in an arena, loaded by need, leased, computed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from moray.runtime.arena import NOWHERE, Arena
from moray.runtime.arrays import Floats, Ints
from moray.runtime.errors import HostLostError, MorayError, ProtocolError
from moray.runtime.kernels.gates import Gate
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.prefetch.host import HostPrefetch, PrefetchMode
from moray.runtime.prefetch.payoff import PrefetchStats
from moray.runtime.prefetch.replication import ReplicationBudget
from moray.runtime.residency.loader import Loader, LoaderStats
from moray.runtime.residency.manager import ResidencyManager, ResidencyStats, State
from moray.runtime.residency.policies import make_policy
from moray.runtime.store.disk import DiskReader
from moray.runtime.store.reader import PeerReaders
from moray.runtime.store.store import Store

if TYPE_CHECKING:
    from moray.runtime.experts.fused import FusedExperts


_SELF = "compute"  # who claims the experts that this host computes with
_STALL_S = 30.0  # without any progress: as long as a client waits


@dataclass(frozen=True, slots=True)
class HostStats:
    """A host's residency and traffic since its start. Bytes."""

    num_experts: int
    num_resident: int
    num_slots: int
    slot_bytes: int
    policy: str
    residency: ResidencyStats
    loader: LoaderStats
    prefetch: PrefetchStats
    damaged: tuple[str, ...] = ()  # shards on this host's disk that are read from other hosts instead, and why
    host_id: str = ""  # in an engine


class ShardHost:
    """Holds some of a store's experts in an arena and answers for them. Thread-safe.

    Without anybody asking it fills what is free of its arena with what is assigned to it.
    """

    def __init__(
        self,
        store: Store,
        keys: Sequence[ExpertKey],
        num_threads: int,
        arena: Arena | None = None,
        *,
        num_slots: int | None = None,
        policy: str = "lru",
        prefetch: PrefetchMode = "auto",
        assigned: Sequence[ExpertKey] | None = None,
        peers: PeerReaders | None = None,
        replication: ReplicationBudget | None = None,
        start_reads: int | None = None,
    ) -> None:
        """``keys``: in layer order. ``arena``: the one this host had before it was restarted. ``num_slots``: experts
        that are in memory at once; None: all. ``assigned``: those that it fills its arena with, in this order; None:
        all. ``peers``: where shards come from that the store lacks or has damaged. ``start_reads``: most reads at once
        to fill the arena until ``fill`` is called; None: it need not be. Raises ResourceError.
        """
        self._num_threads = num_threads
        self.store, self.keys = store, list(keys)
        assert self.keys == sorted(self.keys)
        self._index = {key: index for index, key in enumerate(self.keys)}
        self._policy_name = policy
        count = min(num_slots or len(keys), len(keys))
        self.arena = arena or Arena.create(len(keys), count, store.manifest.slot_bytes)
        if (self.arena.num_experts, self.arena.num_slots) != (len(keys), count):
            raise HostLostError(
                f"the arena has {self.arena.num_slots} slots for {self.arena.num_experts} experts, this host has "
                f"{count} for {len(keys)}"
            )
        layers = [sum(key.layer == layer for key in self.keys) for layer in range(len(store.manifest.layers))]
        layer_of, entries = [key.layer for key in self.keys], [store.manifest.shards[key] for key in self.keys]
        self._manager = ResidencyManager(layer_of, count, make_policy(policy, layers, count))
        if assigned is not None:
            self._manager.assign([self._index[key] for key in assigned])
        self.assigned = self.keys if assigned is None else list(assigned)
        self._prepared: set[Numerics] = set()
        self._fused: dict[int, tuple[tuple[Numerics, Gate], FusedExperts]] = {}  # by layer
        self._computing = threading.Lock()
        self._adopt()
        self.num_adopted = self._manager.num_resident  # shards that an earlier process had loaded
        self._prefetch = HostPrefetch(prefetch, layer_of, [entry.num_bytes for entry in entries])
        budget = replication or ReplicationBudget()
        self._loader = Loader(
            self._manager, self.arena, DiskReader(store), self.keys, entries, self._prefetch, budget, peers, start_reads
        )
        self.arena.wants_hints = prefetch != "off" and not self.holds_all

    @property
    def holds_all(self) -> bool:
        """Whether nothing is ever evicted here."""
        return self._manager.holds_all

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being loaded."""
        with self._loader.lock:
            return self._loader.is_idle

    def assign(self, assigned: Sequence[ExpertKey]) -> None:
        """From now on these are what it fills its arena with, in this order. Evicts nothing by itself.

        What could not be loaded before is tried again. Raises KeyError for an expert that does not live here.
        """
        indices = [self._index[key] for key in assigned]
        with self._loader.lock:
            while self._loader.errors:
                self.arena.directory[self._loader.errors.popitem()[0]] = NOWHERE
            self.assigned = list(assigned)
            self._manager.assign(indices)
            self._loader.wake()

    def fill(self) -> None:
        """Fill the arena with what is assigned as fast as it goes: the engine's start needs disk and cores no more."""
        self._loader.fill()

    def resident(self) -> list[list[int]]:
        """[layer]: which of the assigned experts are in memory."""
        held: list[list[int]] = [[] for _ in self.store.manifest.layers]
        with self._loader.lock:
            for key in self.assigned:
                if self._manager.state(self._index[key]) is State.RESIDENT:
                    held[key.layer].append(key.expert)
        return held

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Which of these are not in memory. Raises KeyError for an expert that does not live here."""
        with self._loader.lock:
            states = [self._manager.state(index) for index in self._indices(layer, experts)]
        return [expert for expert, state in zip(experts, states, strict=True) if state is not State.RESIDENT]

    def need(self, client: str, layer: int, experts: Sequence[int], *, loads: bool = True) -> None:
        """A client's layer needs these: they are loaded, and stay until it needs others or releases them.

        ``loads``: by other threads; else the caller must call ``load_needed``. Raises KeyError for an expert that does
        not live here.
        """
        indices = self._indices(layer, experts)
        with self._loader.lock:
            for index in indices:
                if self._loader.errors.pop(index, None) is not None:
                    self.arena.directory[index] = NOWHERE  # try again
            if indices:
                self._prefetch.needed(indices, [self._loader.loaded_bytes(index) for index in indices])
            self._manager.need(client, indices)
            self._tell_whether_hints_help()
            if loads:
                self._loader.wake()

    def load_needed(self) -> None:
        """Load what clients need and nobody loads yet, in this thread: another one would have to be woken."""
        self._loader.load_demanded()

    def failure(self, layer: int, experts: Sequence[int]) -> MorayError | None:
        """What kept one of these from being loaded."""
        with self._loader.lock:
            return next(
                (self._loader.errors[i] for i in self._indices(layer, experts) if i in self._loader.errors), None
            )

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """A client's layer call used these, found in memory or loaded for it."""
        with self._loader.lock:
            self._note_used(self._indices(layer, experts))

    def hint(self, layer: int, experts: Sequence[int], *, is_prediction: bool = True) -> None:
        """These will probably be needed, the likeliest first; or, if it is no prediction, will be asked for again."""
        with self._loader.lock:
            indices = self._indices(layer, experts)
            absent = [index for index in indices if self._manager.state(index) is State.ABSENT]
            self._prefetch.hinted(absent if is_prediction else [])
            self._manager.hint(indices, is_prediction=is_prediction)
            self._tell_whether_hints_help()
            self._loader.wake()

    def replicate(self, experts: Sequence[ExpertKey]) -> None:
        """These should be in memory here too, the hottest first: they are loaded in the background.

        In place of what is worth less, after everything else that is to be loaded but the filling of free memory, and
        within the replication budget. A later call replaces what is not done of the ones before.
        Raises KeyError for an expert that does not live here.
        """
        with self._loader.lock:
            self._manager.replicate([self._index[key] for key in experts])
            self._loader.wake()

    def release(self, client: str, layer: int, experts: Sequence[int]) -> None:
        with self._loader.lock:
            self._manager.release(client, self._indices(layer, experts))
            self._loader.wake()

    def drop_client(self, client: str) -> None:
        """Forget the claims of a client that is gone."""
        with self._loader.lock:
            self._manager.drop_client(client)
            self._loader.wake()

    def stats(self) -> HostStats:
        with self._loader.lock:
            return HostStats(
                num_experts=len(self.keys),
                num_resident=self._manager.num_resident,
                num_slots=self.arena.num_slots,
                slot_bytes=self.arena.slot_bytes,
                policy=self._policy_name,
                residency=self._manager.stats,
                loader=self._loader.stats,
                prefetch=self._prefetch.stats(),
                damaged=tuple(str(error) for error in self._loader.damaged.values()),
            )

    def wait_filled(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to load. Raises what kept a shard from being loaded."""
        with self._loader.lock:
            self._loader.wake()
            done = self._loader.lock.wait_for(self._is_filled, timeout_s)
            for error in self._loader.errors.values():
                raise error
            return done

    def prepare(self, numerics: Numerics) -> None:
        """Make the kernels ready for ``compute``: compiled, or loaded, and checked. Idempotent."""
        if numerics in self._prepared:
            return
        with self._computing:
            self._prepare(numerics)

    def _prepare(self, numerics: Numerics) -> None:
        # Imported here: a host that only lends its shards never loads Numba.
        from moray.runtime.experts.fused import FusedExperts
        from moray.runtime.kernels.gates import SWIGLU
        from moray.runtime.kernels.pool import set_num_threads

        set_num_threads(self._num_threads)
        for layout in {info.layout for info in self.store.manifest.layers if info.layout.get("gate_up_proj")}:
            fused, blank = FusedExperts.of(layout, numerics, SWIGLU), np.zeros(layout.num_bytes + 64, dtype=np.uint8)
            shards = np.array([blank.ctypes.data + -blank.ctypes.data % 64], dtype=np.int64)
            x, starts = np.zeros((1, fused.kernel.gate_up.spec.columns), dtype=np.float32), np.arange(2)
            fused.compute_pairs(x, np.zeros(1, dtype=np.int64), starts, np.zeros(1, dtype=np.int64), shards)
        self._prepared.add(numerics)

    def compute(
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        x_TH: Floats,
        row_of_pair: Ints,
        numerics: Numerics,
        gate: Gate,
        *,
        waits: bool = True,
    ) -> Floats | None:
        """Gated experts where they lie -> float32 [P, H]: ``counts`` pairs each, pair p of row ``row_of_pair[p]``.

        The outputs are not weighted: the caller sums them, in the router's order. Waits for what must be loaded, or
        else returns None at once. One call after the other: they share a claim. Raises KeyError for an expert that does
        not live here, and what keeps one from being loaded.
        """
        self.prepare(numerics)
        starts = np.array([0, *accumulate(counts)], dtype=np.int64)
        with self._computing:
            kind, fused = self._fused.get(layer, (None, None))
            if fused is None or kind != (numerics, gate):
                fused = self._fuse(layer, numerics, gate)
            try:
                slots = self._hold(layer, experts, waits)
                if slots is None:
                    return None
                shards = self.arena.addresses(slots)
                return fused.compute_pairs(x_TH, np.asarray(experts, dtype=np.int64), starts, row_of_pair, shards)
            finally:
                self._let_go()

    def _fuse(self, layer: int, numerics: Numerics, gate: Gate) -> FusedExperts:
        """How a layer is computed; remembered."""
        from moray.runtime.experts.fused import FusedExperts

        layout = self.store.manifest.layers[layer].layout
        if layout.get("gate_up_proj") is None:
            raise ProtocolError(f"the experts of MoE layer {layer} have no gate: lease them")
        fused = FusedExperts.of(layout, numerics, gate)
        self._fused[layer] = (numerics, gate), fused
        return fused

    def copy_resident(self, key: ExpertKey, start: int, view: memoryview) -> bool:
        """Copy a part of a shard out of the arena. False: it is not in memory, or went meanwhile. From any thread."""
        index = self._index.get(key)
        slot = NOWHERE if index is None else int(self.arena.directory[index])
        if slot < 0:
            return False
        generation = int(self.arena.generations[slot])
        if generation % 2 or self.arena.directory[index] != slot:
            return False
        shard = np.frombuffer(self.arena.slot(slot), dtype=np.uint8)
        np.copyto(np.frombuffer(view, dtype=np.uint8), shard[start : start + len(view)])
        return bool(self.arena.generations[slot] == generation)

    def close(self) -> None:
        self._loader.close()
        self.arena.close()

    def _note_used(self, indices: list[int]) -> None:
        """A layer call used these. With the loader's lock held."""
        self._manager.used(indices)
        if indices:
            self._prefetch.used(indices)

    def _tell_whether_hints_help(self) -> None:
        wants = self._prefetch.is_on and not self.holds_all
        if wants != self.arena.wants_hints:
            self.arena.wants_hints = wants

    def _indices(self, layer: int, experts: Sequence[int]) -> list[int]:
        return [self._index[ExpertKey(layer, expert)] for expert in experts]

    def _hold(self, layer: int, experts: Sequence[int], waits: bool) -> Ints | None:
        """Claim experts for this host's own use and wait for them. Returns their slots; None: one is not here."""
        indices = self._indices(layer, experts)
        with self._loader.lock:
            if all(self._manager.state(index) is State.RESIDENT for index in indices):
                # The loader's threads are not woken: they would compete with what is to be computed now.
                self._manager.claim(_SELF, indices)
                self._note_used(indices)
                return self.arena.directory[indices]
        if not waits:
            return None
        if len(set(indices)) > self.arena.num_slots:
            raise ProtocolError(f"{len(indices)} experts at once, this host has memory for {self.arena.num_slots}")
        self.need(_SELF, layer, experts)
        deadline = monotonic() + _STALL_S
        with self._loader.lock:
            while any(self._manager.state(index) is not State.RESIDENT for index in indices):
                for index in indices:
                    if index in self._loader.errors:
                        raise self._loader.errors[index]
                if not self._loader.lock.wait(deadline - monotonic()):
                    raise HostLostError(f"experts {list(experts)} of MoE layer {layer} did not come from the disk")
            self._note_used(indices)
            return self.arena.directory[indices]

    def _let_go(self) -> None:
        """Give up the claim of ``_hold``. Loads that found every slot claimed are tried again."""
        with self._loader.lock:
            self._manager.drop_client(_SELF)
            if self._manager.is_asked:
                self._loader.wake()

    def _is_filled(self) -> bool:
        return not self._manager.wants_to_fill and self._loader.is_idle

    def _adopt(self) -> None:
        """Take over what a kept arena holds whole; what a dead writer left is as good as empty."""
        for index, slot in enumerate(self.arena.directory.tolist()):
            if slot >= 0 and self._holds(slot, self.keys[index]):
                self._manager.adopt(index, slot)
            else:
                self.arena.directory[index] = NOWHERE
                if slot >= 0:  # readers who found it there must see it go
                    self.arena.begin_write(slot, None)

    def _holds(self, slot: int, key: ExpertKey) -> bool:
        """Whether a slot kept from before a restart has this shard, whole and of this store."""
        if self.arena.generations[slot] % 2:
            return False
        entry = self.store.manifest.shards[key]
        return xxhash.xxh3_64_intdigest(self.arena.slot(slot)[: entry.num_bytes]) == entry.checksum
