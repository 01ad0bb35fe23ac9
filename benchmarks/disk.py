"""How fast the disk gives a store's experts, with nothing but reads: the limit that offloading is measured against.

    python benchmarks/disk.py STORE                       # about half a minute
    python benchmarks/disk.py FILE [FILE ...] --read-bytes 99094528

*One read* is ``--read-bytes`` contiguous bytes (of a store: one expert's shard), at a random multiple of that size in a
random one of the files, never the same place twice until all had their turn. It is cut into *pieces* that are read with
O_DIRECT into page-aligned memory that was touched before, by as many threads as the *depth* says; pieces of the next
read begin when those of this one run out, as a loader that is never idle does it.
*Bandwidth* of a piece size and a depth: bytes read / seconds, the median of ``--rounds`` measurements of ``--seconds``
each, in turns with all others. *Raw bandwidth* is the best of these medians.
Before, the files' pages are dropped from the page cache; *cached* is the share of the files' pages that is in it
afterwards and at the end (mincore), and must be 0.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from direct_file import BLOCK_BYTES

PIECES = tuple(size << 20 for size in (1, 2, 4, 8, 16))
DEPTHS = (1, 2, 4, 8)
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Rate:
    """Measurements of one piece size and depth, in bytes/s."""

    piece_bytes: int
    depth: int
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rates)


@dataclass(frozen=True)
class RawBandwidth:
    rates: tuple[Rate, ...]
    cached: float  # the largest share of the files' pages in the page cache, before and after

    @property
    def best(self) -> Rate:
        return max(self.rates, key=lambda rate: rate.median)

    @property
    def bytes_per_s(self) -> float:
        return self.best.median


def raw_bandwidth(
    files: Sequence[Path],
    read_bytes: int,
    seconds: float = 0.5,
    *,
    rounds: int = 3,
    pieces: Sequence[int] = PIECES,
    depths: Sequence[int] = DEPTHS,
) -> RawBandwidth:
    """What the top of this file defines. Reads of less than a piece have one piece."""
    assert read_bytes % BLOCK_BYTES == 0, f"O_DIRECT reads whole blocks, not {read_bytes} bytes"
    drop_cached(files)
    cached = [cached_share(files)]
    sizes = sorted({min(piece, read_bytes) for piece in pieces})
    found: dict[tuple[int, int], list[float]] = {(piece, depth): [] for piece in sizes for depth in depths}
    with _open_direct(files) as handles, _buffers(max(depths), max(sizes)) as buffers:
        reads = _Reads(handles, read_bytes)
        for _ in range(rounds):
            for (piece, depth), rates in found.items():
                rates.append(_measure(reads, piece, buffers[:depth], seconds))
    cached.append(cached_share(files))
    return RawBandwidth(tuple(Rate(*key, tuple(rates)) for key, rates in found.items()), max(cached))


class _Reads:
    """Pieces of one read after the other, to whoever asks next."""

    def __init__(self, handles: Sequence[int], read_bytes: int) -> None:
        self._places = [
            (handle, offset)
            for handle in handles
            for offset in range(0, os.fstat(handle).st_size - read_bytes + 1, read_bytes)
        ]
        if not self._places:
            raise SystemExit(f"no file is as large as one read of {read_bytes:,} bytes")
        self._read_bytes, self._random = read_bytes, random.Random(0)
        self._left: list[tuple[int, int]] = []
        self._pieces: Iterator[tuple[int, int, int]] = iter(())
        self._lock = threading.Lock()

    def begin(self, piece_bytes: int) -> None:
        self._piece_bytes, self._pieces = piece_bytes, iter(())

    def next(self) -> tuple[int, int, int]:
        """File, offset, bytes."""
        with self._lock:
            piece = next(self._pieces, None)
            if piece is None:
                self._pieces = self._cut()
                piece = next(self._pieces)
            return piece

    def _cut(self) -> Iterator[tuple[int, int, int]]:
        if not self._left:
            self._left = self._random.sample(self._places, len(self._places))
        handle, offset = self._left.pop()
        for start in range(0, self._read_bytes, self._piece_bytes):
            yield handle, offset + start, min(self._piece_bytes, self._read_bytes - start)


def _measure(reads: _Reads, piece_bytes: int, buffers: Sequence[memoryview], seconds: float) -> float:
    reads.begin(piece_bytes)
    counts = [0] * len(buffers)
    started = perf_counter()

    def work(index: int) -> None:
        while perf_counter() - started < seconds:
            handle, offset, size = reads.next()
            if os.preadv(handle, [buffers[index][:size]], offset) != size:
                raise SystemExit("a read was short: did the file change?")
            counts[index] += size

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(buffers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (perf_counter() - started)


# -------------------------------------------------------------------------------------- page cache


def drop_cached(files: Sequence[Path]) -> None:
    """Drop the files' pages from the page cache; what is not on the disk yet is written first."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def cached_share(files: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache."""
    return sum(cached_bytes(path) for path in files) / max(1, sum(path.stat().st_size for path in files))


def cached_bytes(path: Path) -> int:
    """Of a file, in the page cache (mincore). Only what this process could have mapped counts: nothing is read."""
    size = path.stat().st_size
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    handle = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    finally:
        os.close(handle)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {path}")
    pages = (ctypes.c_ubyte * -(-size // _PAGE))()
    try:
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return _PAGE * sum(page & 1 for page in bytes(pages))


@contextmanager
def _open_direct(files: Sequence[Path]) -> Iterator[list[int]]:
    with ExitStack() as stack:
        handles = []
        for path in files:
            handles.append(os.open(path, os.O_RDONLY | os.O_DIRECT))
            stack.callback(os.close, handles[-1])
        yield handles


@contextmanager
def _buffers(count: int, size: int) -> Iterator[list[memoryview]]:
    with ExitStack() as stack:
        views = []
        for _ in range(count):
            memory = stack.enter_context(mmap.mmap(-1, size))
            memory.write(bytes(size))
            views.append(stack.enter_context(memoryview(memory)))
        yield views


# -------------------------------------------------------------------------------------------- main


def expert_files(store: Path) -> list[Path]:
    return sorted(store.glob("experts-*.bin"))


def store_bandwidth(store: Path, seconds: float = 0.5, rounds: int = 3) -> RawBandwidth:
    """Of a store's expert files, at the size of its largest shard."""
    from moray.runtime.store.store import Store

    with Store.open(store) as opened:
        read_bytes = max(layer.layout.num_bytes for layer in opened.manifest.layers)
    return raw_bandwidth(expert_files(store), read_bytes, seconds, rounds=rounds)


def main() -> None:
    from common import describe_machine, print_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="a store, or files")
    parser.add_argument("--read-bytes", type=int, default=16 << 20, help="of files; of a store: its shards (16 MiB)")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.paths[0].is_dir():
        found = store_bandwidth(arguments.paths[0], arguments.seconds, arguments.rounds)
    else:
        found = raw_bandwidth(arguments.paths, arguments.read_bytes, arguments.seconds, rounds=arguments.rounds)
    print(f"{describe_machine()}\n")
    depths = sorted({rate.depth for rate in found.rates})
    rows = []
    for piece in sorted({rate.piece_bytes for rate in found.rates}):
        at = {rate.depth: rate for rate in found.rates if rate.piece_bytes == piece}
        rows.append((f"{piece / 2**20:g} MiB", *(f"{at[depth].median / 1e9:.2f}" for depth in depths)))
    print_table(("GB/s, pieces of", *(f"depth {depth}" for depth in depths)), rows)
    best = found.best
    print(
        f"\nraw bandwidth {best.median / 1e9:.2f} GB/s "
        f"(pieces of {best.piece_bytes / 2**20:g} MiB, depth {best.depth}; "
        f"{min(best.rates) / 1e9:.2f}-{max(best.rates) / 1e9:.2f}), cached {found.cached:.1%}"
    )


if __name__ == "__main__":
    main()
