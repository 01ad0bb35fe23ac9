"""Comparing shared counters. Its own compiled function, so that no read is folded into a kernel's."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from moray.runtime.kernels import setup as _setup  # noqa: F401  (before any njit)


@intrinsic
def _load_int64(typingctx, address):
    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(pointer)

    return types.int64(types.int64), codegen


@njit(cache=True)
def all_equal(addresses, expected):
    """Whether the int64 at every address has its expected value."""
    for i in range(addresses.shape[0]):  # noqa: SIM110  (compiled: a loop is the plain form)
        if _load_int64(addresses[i]) != expected[i]:
            return False
    return True
