"""Comparing shared counters. Its own compiled function, so that no read is folded into a kernel's."""

from __future__ import annotations

from numba import njit

from moray.runtime.kernels.atomics import load_atomic


@njit(cache=True)
def all_equal(addresses, expected):
    """Whether the int64 at every address has its expected value."""
    for i in range(addresses.shape[0]):  # noqa: SIM110  (compiled: a loop is the plain form)
        if load_atomic(addresses[i]) != expected[i]:
            return False
    return True
