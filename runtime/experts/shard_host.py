"""An expert host without its process: one arena, the shards in it, and the leases on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import xxhash

from moray.runtime.arena import Arena
from moray.runtime.errors import HostLostError, ProtocolError
from moray.runtime.experts.source import Ints
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

Floats = npt.NDArray[np.float32]

_LOADERS = 2  # threads that read shards: one can check while the other waits for the disk


class ShardHost:
    """Holds some of a store's experts in an arena and answers for them.

    ``load`` and the constructor run in one thread; afterwards all calls come from the data-plane thread.
    """

    def __init__(self, store: Store, keys: Sequence[ExpertKey], num_threads: int, arena: Arena | None = None) -> None:
        """``arena`` is the one this host had before it was restarted. Raises ResourceError."""
        self._num_threads = num_threads
        self.store = store
        self._slots = {key: slot for slot, key in enumerate(keys)}
        self.arena = arena or Arena.create(len(keys), store.manifest.slot_bytes)
        if self.arena.num_slots != len(keys):
            raise HostLostError(f"the arena has {self.arena.num_slots} slots, this host has {len(keys)} experts")
        self._leases: dict[str, Counter[int]] = {}
        self.loaded_bytes = 0

    @property
    def keys(self) -> list[ExpertKey]:
        return list(self._slots)

    def load(self, on_loaded: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Fill every slot that does not hold its shard already. Raises CorruptShardError, StoreError."""
        with ThreadPoolExecutor(_LOADERS) as pool:
            for num_bytes in pool.map(self._fill, self._slots):
                self.loaded_bytes += num_bytes
                on_loaded(num_bytes)

    def need(self, client: str, layer: int, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Lease shards: their slots and generations. A leased slot keeps its content until it is released.

        Raises KeyError for an expert that does not live here.
        """
        slots = [self._slots[ExpertKey(layer, expert)] for expert in experts]
        self._leases.setdefault(client, Counter()).update(slots)
        return slots, self.arena.generations[slots].tolist()

    def release(self, client: str, slots: Sequence[int]) -> None:
        leases = self._leases.get(client, Counter())
        leases.subtract(slots)
        self._leases[client] = +leases

    def drop_client(self, client: str) -> None:
        """Forget the leases of a client that is gone."""
        self._leases.pop(client, None)

    def compute(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], x_PH: Floats, numerics: Numerics
    ) -> Floats:
        """SwiGLU experts where they lie: rows of x sorted by expert, ``counts`` rows each -> float32 [P, H].

        The rows are not weighted: the caller sums them, in the router's order.
        """
        # Imported here: a host that only lends its shards never loads torch or Numba.
        from moray.runtime.kernels import ops
        from moray.runtime.kernels.ops import LayerKernel, MatrixKernel
        from moray.runtime.kernels.pool import set_num_threads

        set_num_threads(self._num_threads)
        info = self.store.manifest.layers[layer]
        if info.activation != "swiglu":
            raise ProtocolError(f"the experts of MoE layer {layer} ({info.module}) are not plain SwiGLU: lease them")
        layout = info.layout
        gate_up, down = layout["gate_up_proj"], layout["down_proj"]
        assert gate_up.spec is not None and down.spec is not None
        slots = np.array([self._slots[ExpertKey(layer, expert)] for expert in experts], dtype=np.int64)
        shards = self.arena.addresses(slots)
        starts: Ints = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        pairs = np.arange(len(x_PH))
        grouping = ops.Grouping(np.asarray(experts, dtype=np.int64), starts, pairs, pairs[:, None])
        ones = np.ones((len(x_PH), 1), dtype=np.float32)
        kernels = LayerKernel(MatrixKernel.of(gate_up.spec, numerics), MatrixKernel.of(down.spec, numerics))
        return ops.moe_layer(x_PH, ones, grouping, kernels, shards + gate_up.offset, shards + down.offset)

    def close(self) -> None:
        self.arena.close()

    def _fill(self, key: ExpertKey) -> int:
        slot = self._slots[key]
        if self._holds(slot, key):
            return 0
        with self.arena.writing(slot) as buffer:
            return self.store.read_shard_into(key, buffer)

    def _holds(self, slot: int, key: ExpertKey) -> bool:
        """Whether a slot kept from before a restart still has this shard, whole and of this store."""
        if self.arena.generations[slot] == 0:
            return False
        if self.arena.generations[slot] % 2:  # its writer died in the middle
            self.arena.generations[slot] += 1
            return False
        entry = self.store.manifest.shards[key]
        return xxhash.xxh3_64_intdigest(self.arena.slot(slot)[: entry.num_bytes]) == entry.checksum
