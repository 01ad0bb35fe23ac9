"""What a conversion will take: memory and disk, before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece
from moray.runtime.convert.plan import Plan
from moray.runtime.convert.supply import Supply
from moray.runtime.memory import format_bytes, private_bytes

_WORKER_BYTES = 300 << 20  # private to a spawned process with torch and transformers
_CODE_COPIES = 3  # bytes a weight while codes are collected and packed


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
    memory = base + sum(piece_bytes[:workers]) + (workers * min(base, _WORKER_BYTES) if workers > 1 else 0)
    store = sum(plan.files.values()) + sum(path.stat().st_size for path in copied)
    return Needs(memory, store + supply.room_bytes(plan.pieces), store, supply.cache_bytes(plan.pieces), workers)


def _piece_memory(piece: Piece, checkpoint: Checkpoint) -> int:
    """The piece's bytes, its source tensors, and what is made of the largest one at a time."""
    largest = 0
    for plan in piece.tensors:
        sizes = []
        for key in plan.source.keys:
            shape, dtype = checkpoint.describe(key)
            count = math.prod(shape) // (shape[0] if plan.source.expert is not None and shape else 1)
            sizes.append((count, count * dtype.itemsize))
        count, num_bytes = sum(size for size, _ in sizes), sum(size for _, size in sizes)
        quantized = plan.spec is not None and plan.spec.is_quantized
        made = count * _CODE_COPIES if quantized else num_bytes
        largest = max(largest, num_bytes + max(made, num_bytes if len(sizes) > 1 else 0))
    return piece.num_bytes * (2 if piece.shard else 1) + largest
