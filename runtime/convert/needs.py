"""What a conversion will take: memory and disk, before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece, rows_at_once
from moray.runtime.convert.plan import Plan
from moray.runtime.convert.supply import Supply
from moray.runtime.layout.packed import PackedSpec
from moray.runtime.memory import format_bytes, private_bytes

_WORKER_BYTES = 300 << 20  # private to a spawned process with torch and transformers
_PROCESS_BYTES = 24 << 20  # that a process takes more as it works: buffers, and what its allocator keeps
_PACKING_COPIES = 10  # bytes a weight of the rows that are being packed


@dataclass(frozen=True, slots=True)
class Needs:
    """``memory_bytes``: private, of all processes at the peak.

    ``disk_bytes``: the store (``store_bytes``), and what lies beside it meanwhile.
    ``cache_bytes``: what the hub's cache takes and keeps.
    """

    memory_bytes: int
    disk_bytes: int
    store_bytes: int
    cache_bytes: int
    workers: int

    def __str__(self) -> str:
        beside = "" if self.disk_bytes == self.store_bytes else f" (store {format_bytes(self.store_bytes)})"
        cache = f", and {format_bytes(self.cache_bytes)} in the hub's cache" if self.cache_bytes else ""
        return (
            f"needs about {format_bytes(self.memory_bytes)} of memory in {self.workers} "
            f"process{'es' if self.workers > 1 else ''} and {format_bytes(self.disk_bytes)} of disk{beside}{cache}"
        )


def estimate_needs(plan: Plan, checkpoint: Checkpoint, copied: list[Path], supply: Supply, workers: int) -> Needs:
    """For a conversion from nothing."""
    piece_bytes = sorted((_piece_memory(piece, checkpoint) for piece in plan.pieces), reverse=True)
    base = private_bytes()
    spawned = workers if workers > 1 else 0
    memory = base + spawned * min(base, _WORKER_BYTES) + (1 + spawned) * _PROCESS_BYTES + sum(piece_bytes[:workers])
    store = sum(plan.files.values()) + sum(path.stat().st_size for path in copied)
    return Needs(memory, store + supply.room_bytes(plan.pieces), store, supply.cache_bytes(plan.pieces), workers)


def _piece_memory(piece: Piece, checkpoint: Checkpoint) -> int:
    """Tensors are made one after the other, beside those that are packed; then all are joined.

    One that is made from several is in memory twice when they are joined, and then beside its packed form, with the
    copies of the rows that are being packed.
    """
    packed = largest = 0
    for plan in piece.tensors:
        num_bytes = 0
        for key in plan.source.keys:
            shape, dtype = checkpoint.describe(key)
            size = math.prod(shape) // (shape[0] if plan.source.expert is not None and shape else 1)
            num_bytes += size * dtype.itemsize
        made = plan.spec.num_bytes + _packing_bytes(plan.spec) if plan.spec is not None else num_bytes
        largest = max(largest, packed + num_bytes + max(made, num_bytes if len(plan.source.keys) > 1 else 0))
        packed += plan.spec.num_bytes if plan.spec is not None else num_bytes
    return max(largest, 2 * piece.num_bytes if piece.shard else 0)


def _packing_bytes(spec: PackedSpec) -> int:
    return int(min(spec.rows, rows_at_once(spec.columns)) * spec.columns * _PACKING_COPIES)
