"""How many int8 products a second this machine's cores make when nothing is read: the yardstick beside the readers.

One *product* is an unsigned byte times a signed one, added to an int32 sum: what one weight and one activation cost in
class int8. The loop is ``dot4`` of ``runtime/kernels/vectors.py``, as the kernels compile it for this CPU, over sums
that stay in registers: no loads, no unpacking, no scales. It is a program of the pool, as the kernels are.
"""

from __future__ import annotations

from functools import cache
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from moray.runtime.kernels import pool
from moray.runtime.kernels import vectors as v
from moray.runtime.kernels.atomics import add_atomic, load_int64
from moray.runtime.kernels.isa import INSTRUCTION_SET

_SUMS = 12  # independent of each other, so that none waits for its last product
_STEPS = 1 << 16  # of an item
_ITEMS_A_THREAD = 8


@intrinsic
def _multiply(typingctx: Any, value: Any) -> Any:
    """The total of _STEPS * _SUMS vectors of products of ``value``'s bytes."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x = builder.trunc(args[0], v.I32)
        codes, sums = v.splat(builder, x), [cgutils.alloca_once(builder, v.VI32) for _ in range(_SUMS)]
        for k, total in enumerate(sums):
            builder.store(v.const_i32(k), total)
        with cgutils.for_range(builder, v.I64(_STEPS)):
            for total in sums:
                builder.store(v.dot4(builder, builder.load(total), codes, x, INSTRUCTION_SET), total)
        all_sums = builder.load(sums[0])
        for total in sums[1:]:
            all_sums = builder.xor(all_sums, builder.load(total))
        result: ir.Value = v.I32(0)
        for lane in range(v.LANES):
            result = builder.add(result, builder.extract_element(all_sums, v.I32(lane)))
        return builder.zext(result, v.I64)

    return types.int64(types.int64), codegen


@cache
def _items() -> Any:
    def items(params, first, last):  # type: ignore[no-untyped-def]
        for _ in range(first, last):
            add_atomic(params + 8, _multiply(load_int64(params)))

    return cfunc("void(int64, int64, int64)", nopython=True)(items)


def product_rate(passes: int = 5) -> float:
    """Products a second of this process's pool: the median over ``passes`` passes after one not counted."""
    workers = pool.current_pool()
    params = np.array([0x01020304, 0], dtype=np.int64)
    num_items = _ITEMS_A_THREAD * workers.num_threads
    program = np.array([[_items().address, params.ctypes.data, num_items, 1]], dtype=np.int64)
    seconds = []
    for _ in range(passes + 1):
        with workers.lock:
            started = perf_counter()
            pool.run(workers.address, program)
            seconds.append(perf_counter() - started)
    return num_items * _STEPS * _SUMS * 4 * v.LANES / median(seconds[1:])
