"""What a conversion will take: memory and disk, before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece
from moray.runtime.convert.plan import Plan
from moray.runtime.convert.workspace import disk_bytes
from moray.runtime.memory import format_bytes

_WORKER_BYTES = 420 << 20  # a spawned process with torch and transformers, its libraries not shared
_FLOAT_COPIES = 6  # of the largest matrix, as float32, while HQQ iterates
_PLAIN_COPIES = 2


@dataclass(frozen=True, slots=True)
class Needs:
    """``memory_bytes``: of all processes at the peak. ``disk_bytes``: store, and what lies beside it meanwhile."""

    memory_bytes: int
    disk_bytes: int
    store_bytes: int
    workers: int

    def __str__(self) -> str:
        beside = "" if self.disk_bytes - self.store_bytes < 64 << 20 else f" (store {format_bytes(self.store_bytes)})"
        return (
            f"needs about {format_bytes(self.memory_bytes)} of memory in {self.workers} "
            f"process{'es' if self.workers > 1 else ''} and {format_bytes(self.disk_bytes)} of disk{beside}"
        )


def estimate_needs(plan: Plan, checkpoint: Checkpoint, copied: list[Path], room_bytes: int, workers: int) -> Needs:
    """For a conversion from nothing. ``room_bytes``: of disk beside the store."""
    piece_bytes = sorted((_piece_memory(piece, checkpoint) for piece in plan.pieces), reverse=True)
    largest = sum(piece_bytes[:workers])
    memory = psutil.Process().memory_info().rss + largest + (workers * _WORKER_BYTES if workers > 1 else 0)
    disk = disk_bytes(plan.files, copied, room_bytes)
    return Needs(memory, disk, disk - room_bytes, workers)


def _piece_memory(piece: Piece, checkpoint: Checkpoint) -> int:
    """The piece's bytes, its source tensors, and the working copies of its largest matrix."""
    largest = 0
    for plan in piece.tensors:
        sizes = []
        for key in plan.source.keys:
            shape, dtype = checkpoint.describe(key)
            count = math.prod(shape) // (shape[0] if plan.source.expert is not None and shape else 1)
            sizes.append((count, count * dtype.itemsize))
        count, num_bytes = sum(size for size, _ in sizes), sum(size for _, size in sizes)
        quantized = plan.spec is not None and plan.spec.is_quantized
        largest = max(largest, num_bytes + (4 * count * _FLOAT_COPIES if quantized else num_bytes * _PLAIN_COPIES))
    return piece.num_bytes * (2 if piece.shard else 1) + largest
