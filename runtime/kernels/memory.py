"""Counters shared between processes. Their own compiled functions, so that no read is folded into a kernel's."""

from __future__ import annotations

import numpy as np

from moray.runtime.kernels.atomics import load_atomic
from moray.runtime.kernels.setup import TABLE, entry

# Columns of a layer's leases (experts/source.py). Those that never move have only the first three.
ADDRESS, COUNTER, GENERATION, ENTRY, FIRST_SLOT, SLOT_BYTES, FIRST_COUNTER = range(7)
NUM_COLUMNS = 7


@entry("addresses expected")
def all_equal(addresses, expected):
    """Whether the int64 at every address has its expected value."""
    for i in range(addresses.shape[0]):  # noqa: SIM110  (compiled: a loop is the plain form)
        if load_atomic(addresses[i]) != expected[i]:
            return False
    return True


@entry(leases=TABLE)
def look_up(leases, expert):
    """Read the directory of an arena (runtime/arena.py) for one expert. Returns whether it is there.

    leases: int64 [NUM_COLUMNS, E]. ENTRY: address of the directory's entry; FIRST_SLOT, FIRST_COUNTER: of slot 0 and
    its generation in the expert's arena. ADDRESS, COUNTER and GENERATION are written; -1 for what is not there.
    """
    entry = leases[ENTRY, expert]
    slot = load_atomic(entry)
    counter = leases[FIRST_COUNTER, expert] + 8 * max(slot, 0)
    generation = load_atomic(counter)
    leases[COUNTER, expert] = counter
    if slot >= 0 and generation % 2 == 0 and load_atomic(entry) == slot:
        leases[ADDRESS, expert] = leases[FIRST_SLOT, expert] + slot * leases[SLOT_BYTES, expert]
        leases[GENERATION, expert] = generation
        return True
    leases[GENERATION, expert] = -1
    return False


@entry("experts", leases=TABLE)
def look_up_each(leases, experts):
    """As ``look_up``, for some: bool [E], which of them are there."""
    found = np.empty(experts.shape[0], np.bool_)
    for i in range(experts.shape[0]):
        found[i] = look_up(leases, experts[i])
    return found
