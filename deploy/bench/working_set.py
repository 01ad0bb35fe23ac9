"""Many distinct packed matrices in memory as an arena has it: more than the CPU's caches hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moray.runtime.arena import Arena
from moray.runtime.arrays import Bytes
from moray.runtime.layout import second_level
from moray.runtime.layout.packed import ROWS, VECTOR_BYTES, PackedSpec
from moray.runtime.memory import format_bytes


class WorkingSet:
    """``count`` items of the same matrices each, back to back in one arena; all bytes are random and all are used.

    ``items[i][j]``: matrix j of item i, uint8; ``addresses``: int64 [items, matrices]; ``buffer``: all of them.
    """

    def __init__(self, arena: Arena, specs: Sequence[PackedSpec], count: int) -> None:
        sizes = [spec.num_bytes for spec in specs]
        self.buffer: Bytes = np.frombuffer(arena.slot(0), dtype=np.uint8)[: count * sum(sizes)]
        _fill_random(self.buffer, np.random.default_rng(0))
        ends = np.cumsum(sizes)
        rows = self.buffer.reshape(count, -1)
        self.items: list[list[Bytes]] = [
            [row[end - size : end] for size, end in zip(sizes, ends, strict=True)] for row in rows
        ]
        for item in self.items:
            for matrix, spec in zip(item, specs, strict=True):
                make_finite(matrix, spec)
        self.addresses = np.array([[matrix.ctypes.data for matrix in item] for item in self.items], dtype=np.int64)

    @property
    def num_bytes(self) -> int:
        return self.buffer.nbytes

    def drop(self) -> None:
        """Let go of the memory, so that it can be unmapped."""
        self.items.clear()
        del self.buffer


@contextmanager
def working_set(specs: Sequence[PackedSpec], count: int) -> Iterator[WorkingSet]:
    """A working set for the time of a ``with`` block, in an arena of its own. Raises ResourceError."""
    arena = Arena.create(1, 1, count * sum(spec.num_bytes for spec in specs))
    arena.require(0, 0, arena.slot_bytes)
    made = WorkingSet(arena, specs, count)
    yield made  # after an error the memory is left to the end of the process: a traceback may still hold views
    made.drop()
    arena.close()


def make_finite(matrix: Bytes, spec: PackedSpec) -> None:
    """Turn random bytes into a packed matrix: scales, zeros and plain values of ordinary size; codes stay."""
    if not spec.is_quantized:
        values = matrix.view(f"u{spec.bits // 8}")
        values &= ~values.dtype.type(1 << (spec.bits - 2))  # below 2
        values |= values.dtype.type(3 << (spec.bits - 4))  # no subnormals
        return
    meta = matrix.reshape(spec.num_blocks, spec.block_bytes)[:, spec.code_bytes :]
    random = np.random.default_rng(1)
    groups = spec.num_groups
    if spec.meta == "e8m0":
        meta[:] = 118 + meta % 2
        return
    if spec.meta == "u8":
        supers = random.uniform(0.25, 1, second_level.num_supers(groups) * ROWS).astype(np.float16)
        end = 2 * ROWS * groups
        meta[:, end : end + supers.nbytes] = supers.view(np.uint8)
        return
    halves = np.empty((groups, 2, ROWS), dtype=np.float16)
    halves[:, 0] = random.uniform(0.25, 1, (groups, ROWS))
    halves[:, 1] = random.uniform(0, 1 << spec.bits, (groups, ROWS))
    assert halves.nbytes == groups * VECTOR_BYTES
    meta[:] = halves.reshape(-1).view(np.uint8)


def describe_pages(address: int) -> str:
    """What pages the mapping that holds this address is made of."""
    setting = "unknown"
    for line in _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").splitlines():
        setting = line.partition("[")[2].partition("]")[0]
    inside, huge = False, 0
    for line in _read("/proc/self/smaps").splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            start, _, end = name.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and name in ("ShmemPmdMapped:", "AnonHugePages:"):
            huge += int(value.split()[0]) << 10
    found = f"{format_bytes(huge)} in huge pages" if huge else "4 KiB pages"
    return f"memfd as an arena's, {found} (transparent_hugepage/shmem_enabled: {setting})"


def _fill_random(buffer: Bytes, random: np.random.Generator) -> None:
    step = 64 << 20
    for start in range(0, buffer.size, step):
        part: Bytes = buffer[start : start + step]
        part[:] = np.frombuffer(random.bytes(part.size), dtype=np.uint8)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
