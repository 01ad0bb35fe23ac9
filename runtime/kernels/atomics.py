"""Memory shared between threads, for compiled code: loads, stores, atomics, and sleeping on an address (futex).

Addresses are plain int64 of 8-byte aligned int64 values; the caller keeps the memory alive. Linux only.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moray.runtime.kernels import setup as _setup  # noqa: F401  (before any njit)
from moray.runtime.kernels.vectors import I32, I64

_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_SYS_FUTEX = 202 if _IS_X86 else 98  # asm-generic, e.g. aarch64
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129
_EVERYONE = 2**31 - 1
_CLOCK_MONOTONIC = 1
_i64 = types.int64

Emit = Callable[[ir.IRBuilder, list[ir.Value]], ir.Value]


def _on_int64s(count: int, emit: Emit) -> Any:
    """An intrinsic from ``count`` int64 to int64."""
    if count == 0:

        @intrinsic
        def nullary(typingctx: Any) -> Any:
            return _i64(), lambda context, builder, sig, args: emit(builder, args)

        return nullary
    if count == 1:

        @intrinsic
        def unary(typingctx: Any, a: Any) -> Any:
            return _i64(_i64), lambda context, builder, sig, args: emit(builder, args)

        return unary
    if count == 2:

        @intrinsic
        def binary(typingctx: Any, a: Any, b: Any) -> Any:
            return _i64(_i64, _i64), lambda context, builder, sig, args: emit(builder, args)

        return binary

    @intrinsic
    def quaternary(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return _i64(_i64, _i64, _i64, _i64), lambda context, builder, sig, args: emit(builder, args)

    return quaternary


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, I64.as_pointer())


def _store(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    builder.store(args[1], _pointer(builder, args[0]))
    return args[1]


def _store_atomic(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    builder.store_atomic(args[1], _pointer(builder, args[0]), "seq_cst", 8)
    return args[1]


def _word(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    return builder.load(_pointer(builder, builder.add(args[0], builder.mul(args[1], I64(8)))))


def _external(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _pause(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    if _IS_X86:
        _external(builder, "llvm.x86.sse2.pause", ir.VoidType())
    return I64(0)


def _sched_yield(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    return builder.sext(_external(builder, "sched_yield", I32), I64)


def _futex(operation: int) -> Emit:
    def emit(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
        value, none = (args[1] if len(args) > 1 else I64(_EVERYONE)), I64(0)
        return _external(builder, "syscall", I64, I64(_SYS_FUTEX), args[0], I64(operation), value, none, none, none)

    return emit


def _monotonic_ns(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    at = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
    address = builder.ptrtoint(at, I64)
    _external(builder, "clock_gettime", I32, I32(_CLOCK_MONOTONIC), address)
    seconds, rest = (builder.load(_pointer(builder, builder.add(address, I64(place)))) for place in (0, 8))
    return builder.add(builder.mul(seconds, I64(10**9)), rest)


def _call(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
    builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
    return I64(0)


@intrinsic
def address_of(typingctx: Any, array: Any) -> Any:
    """Of an array's first element. (``.ctypes.data`` takes Numba longer to compile, and is unsigned.)"""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.ptrtoint(context.make_array(array)(context, builder, args[0]).data, I64)

    return _i64(array), codegen


# Plain accesses, for memory that no other thread writes at the time.
load_int64 = _on_int64s(1, lambda builder, args: builder.load(_pointer(builder, args[0])))
store_int64 = _on_int64s(2, _store)
word = _on_int64s(2, _word)  # word(params, index): of an int64 array by its address

# Sequentially consistent ones. add_atomic(address, value) returns what was there before.
load_atomic = _on_int64s(1, lambda builder, args: builder.load_atomic(_pointer(builder, args[0]), "seq_cst", 8))
store_atomic = _on_int64s(2, _store_atomic)
add_atomic = _on_int64s(
    2, lambda builder, args: builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "seq_cst")
)

pause = _on_int64s(0, _pause)  # between two looks at a value that another thread will change
sched_yield = _on_int64s(0, _sched_yield)
futex_wait = _on_int64s(2, _futex(_FUTEX_WAIT_PRIVATE))  # sleep while the low 32 bits at an address equal a value's
futex_wake = _on_int64s(1, _futex(_FUTEX_WAKE_PRIVATE))  # wake everyone who sleeps on an address

monotonic_ns = _on_int64s(0, _monotonic_ns)  # the clock of time.perf_counter_ns

# call_items(function, params, first, last): a function by its address; see pool.py.
call_items = _on_int64s(4, _call)
