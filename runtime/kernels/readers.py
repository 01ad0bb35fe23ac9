"""Two readers that stream memory as fast as this machine can: the yardstick for kernels that are bound by memory.

Both return the wrapping sum of all 64-bit words of a buffer (the last bytes padded with zeros), so none can skip a
byte. They are independent of each other, and the faster one counts:

- *vectors*: LLVM loads of 64 bytes into eight accumulators, one stream, software prefetch;
- *streams*: a plain loop that LLVM vectorises over four interleaved streams, a quarter of a chunk apart, which leaves
  prefetching to the hardware.

On CPUs without 64-byte registers LLVM lowers both to what there is. They are programs of the pool (pool.py), as the
kernels are: each thread has a contiguous range, in chunks of 4 MiB, and helps the others at the end of it.
"""

from __future__ import annotations

from functools import cache
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from moray.runtime.arrays import Bytes
from moray.runtime.kernels import pool
from moray.runtime.kernels.atomics import add_atomic, load_int64

_ACCUMULATORS = 8
_STEP_BYTES = 64 * _ACCUMULATORS
_AHEAD_BYTES = 512
_CHUNK_WORDS = 1 << 19  # 4 MiB
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_I64, 8)
# Of a program: params has the address of the words, how many there are, and the address of their sum.
_ITEMS = types.void(types.int64, types.int64, types.int64)


@intrinsic
def _sum_steps(typingctx, address, steps):
    """Wrapping sum of the 64-bit words in ``steps`` times 512 bytes from ``address``; steps is at least 1."""

    def codegen(context, builder, sig, args):
        address, steps = args
        before = builder.block
        loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        step, at = builder.phi(_I64), builder.phi(_I64)
        sums = [builder.phi(_VECTOR) for _ in range(_ACCUMULATORS)]
        added = []
        for k, total in enumerate(sums):
            here = builder.add(at, _I64(64 * k))
            _prefetch(builder, builder.add(here, _I64(_AHEAD_BYTES)))
            added.append(builder.add(total, builder.load(builder.inttoptr(here, _VECTOR.as_pointer()), align=1)))
        next_step, next_at = builder.add(step, _I64(1)), builder.add(at, _I64(_STEP_BYTES))
        for phi, first, following in (
            (step, _I64(0), next_step),
            (at, address, next_at),
            *((total, ir.Constant(_VECTOR, [0] * 8), value) for total, value in zip(sums, added, strict=True)),
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", next_step, steps), loop, after)
        builder.position_at_end(after)
        vector = added[0]
        for value in added[1:]:
            vector = builder.add(vector, value)
        total = builder.extract_element(vector, _I32(0))
        for lane in range(1, 8):
            total = builder.add(total, builder.extract_element(vector, _I32(lane)))
        return total

    return types.int64(types.int64, types.int64), codegen


def _prefetch(builder, address):
    pointer = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), _I32(0), _I32(3), _I32(1)])


@intrinsic
def _as_words(typingctx, address):
    """A pointer to int64 values."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], _I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@cfunc(_ITEMS, nogil=True, cache=True)
def _read_vectors(params, first, last):
    """Add the words of chunks first..last-1 to the sum."""
    begin, end = first * _CHUNK_WORDS, min(last * _CHUNK_WORDS, load_int64(params + 8))
    at = load_int64(params) + 8 * begin
    steps = (end - begin) // 64
    total = _sum_steps(at, steps) if steps else 0
    for i in range(64 * steps, end - begin):
        total += load_int64(at + 8 * i)
    add_atomic(load_int64(params + 16), total)


@njit(nogil=True, cache=True)
def _sum_streams(words):
    """Wrapping sum of int64 [N], read at four places at once."""
    quarter = words.shape[0] // 4
    a, b, c, d = words[:quarter], words[quarter:], words[2 * quarter :], words[3 * quarter :]
    sum_a = sum_b = sum_c = sum_d = 0
    for i in range(quarter):
        sum_a += a[i]
        sum_b += b[i]
        sum_c += c[i]
        sum_d += d[i]
    for i in range(4 * quarter, words.shape[0]):
        sum_a += words[i]
    return sum_a + sum_b + sum_c + sum_d


@cfunc(_ITEMS, nogil=True, cache=True)
def _read_streams(params, first, last):
    """As ``_read_vectors``."""
    words = carray(_as_words(load_int64(params)), (load_int64(params + 8),))
    for chunk in range(first, last):
        total = _sum_streams(words[chunk * _CHUNK_WORDS : (chunk + 1) * _CHUNK_WORDS])
        add_atomic(load_int64(params + 16), total)


READERS = {"vectors": _read_vectors.address, "streams": _read_streams.address}


def checksum(buffer: Bytes) -> int:
    """What the readers return, in NumPy."""
    words, tail = _words(buffer)
    return (int(words.sum(dtype=np.uint64)) + tail) % (1 << 64)


def read(buffer: Bytes, threads: int, reader: str) -> int:
    """Read every byte of uint8 [N] and return the checksum. ``reader`` is a key of ``READERS``."""
    words, tail = _words(buffer)
    total = np.zeros(1, dtype=np.uint64)
    params = np.array([words.ctypes.data, words.size, total.ctypes.data], dtype=np.int64)
    program = np.array([[READERS[reader], params.ctypes.data, -(-words.size // _CHUNK_WORDS), 1]], dtype=np.int64)
    workers = _pool(threads)
    with workers.lock:
        pool.run(workers.address, program)
    return (int(total[0]) + tail) % (1 << 64)


def time_read(buffer: Bytes, threads: int, reader: str) -> float:
    """Seconds that one pass over the buffer takes."""
    started = perf_counter()
    read(buffer, threads, reader)
    return perf_counter() - started


def read_bandwidth(buffer: Bytes, threads: int, passes: int = 5) -> float:
    """Bytes a second of the faster reader: medians over ``passes`` passes of each, in turns, after one not counted.

    A buffer of at least 16 times the last-level cache measures memory; its pages must have been written.
    """
    seconds: dict[str, list[float]] = {reader: [] for reader in READERS}
    for index in range(-1, passes):
        for reader in READERS:
            taken = time_read(buffer, threads, reader)
            if index >= 0:
                seconds[reader].append(taken)
    return buffer.nbytes / min(median(taken) for taken in seconds.values())


def _pool(threads: int) -> pool.Pool:
    """This process's pool if it has so many threads, else one for readers only."""
    current = pool.current_pool()
    return current if current.num_threads == threads else _make_pool(threads)


@cache
def _make_pool(threads: int) -> pool.Pool:
    return pool.Pool(threads)


def _words(buffer: Bytes) -> tuple[npt.NDArray[np.uint64], int]:
    """The whole 64-bit words of a contiguous uint8 [N], and the rest as one more."""
    end = buffer.size // 8 * 8
    return buffer[:end].view(np.uint64), int.from_bytes(buffer[end:].tobytes(), "little")
