"""Counters shared between processes. Their own compiled functions, so that no read is folded into a kernel's."""

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


@njit(cache=True)
def look_up(entries, first_slots, slot_bytes, first_counters, addresses, counters, generations):
    """Read arenas' directories (runtime/arena.py) for E experts. Returns how many are there.

    entries: addresses of the directory's entries; first_slots, first_counters: of slot 0 and its generation in each
    expert's arena; addresses, counters and generations are written, a generation of -1 for what is not there. All
    int64 [E].
    """
    found = 0
    for i in range(entries.shape[0]):
        slot = load_atomic(entries[i])
        counter = first_counters[i] + 8 * max(slot, 0)
        generation = load_atomic(counter)
        counters[i] = counter
        if slot >= 0 and generation % 2 == 0 and load_atomic(entries[i]) == slot:
            addresses[i], generations[i] = first_slots[i] + slot * slot_bytes[i], generation
            found += 1
        else:
            generations[i] = -1
    return found
