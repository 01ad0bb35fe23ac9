"""The threads that compute: one pool a process, launched once for a whole layer.

A *program* is a few phases, one after the other. A phase is a compiled function ``f(params, first, last)`` over
items that may be done in any order by any thread: each thread starts with its own range, takes chunks from it, and
then helps the others, so unequal cores and unequal items cost little. A phase starts when all items of the last one
are done. Which thread does an item never changes the result.

Nobody waits for a thread that has not come: on a busy machine the caller does all the work itself if no other thread
gets a core (OpenMP's barriers wait for every thread). Between programs threads look out for the next one for a
fraction of a millisecond, then sleep: an idle pool uses no CPU.

Shared state is one int64 array of cache lines; its words are named below. An odd epoch means that a program is open.
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
from numba import njit

from moray.runtime.arrays import Ints
from moray.runtime.kernels.atomics import (
    add_atomic,
    call_items,
    futex_wait,
    futex_wake,
    load_atomic,
    load_int64,
    pause,
    sched_yield,
    store_atomic,
    store_int64,
)
from moray.runtime.kernels.setup import TABLE, entry

MAX_PHASES = 10
PHASE_FIELDS = 4  # function, params, items, chunk

_LINE = 64
_EPOCH, _ACTIVE, _SLEEPERS, _STOP, _THREADS, _PHASES = (_LINE * i for i in range(6))
_HEADER = 6 * _LINE
# A phase: a line of its fields, a line that counts items done, and a line for each thread's range.
_DONE, _NEXT = _LINE, 2 * _LINE
_SPINS = 4000  # looks before a thread sleeps: a few hundred microseconds
_SPINS_ALONE = 500  # looks before it offers its core to others between them


@njit(inline="always")
def _phase_at(state, phase):
    return state + _HEADER + phase * (_NEXT + load_int64(state + _THREADS) * _LINE)


@njit(inline="always")
def num_threads(state):
    """Of the pool at this address."""
    return load_int64(state + _THREADS)


@njit(inline="always")
def _range_start(items, thread, threads):
    return items * thread // threads


@njit(inline="always")
def _wait_a_little(looks):
    if looks > _SPINS_ALONE:
        sched_yield()
    else:
        pause()


@njit(nogil=True, cache=True)
def _take_part(state, thread):
    """Work on the open program until it is done."""
    threads = load_int64(state + _THREADS)
    for p in range(load_int64(state + _PHASES)):
        at = _phase_at(state, p)
        function, params = load_int64(at), load_int64(at + 8)
        items, chunk = load_int64(at + 16), load_int64(at + 24)
        for step in range(threads):
            owner = (thread + step) % threads
            end = _range_start(items, owner + 1, threads)
            first = add_atomic(at + _NEXT + owner * _LINE, chunk)
            while first < end:
                last = min(first + chunk, end)
                call_items(function, params, first, last)
                add_atomic(at + _DONE, last - first)
                first = add_atomic(at + _NEXT + owner * _LINE, chunk)
        looks = 0
        while load_atomic(at + _DONE) < items:
            _wait_a_little(looks)
            looks += 1


@entry()
def _serve(state, thread):
    """A thread of the pool: take part in every program, until the pool ends."""
    seen, looks = 0, 0
    while load_atomic(state + _STOP) == 0:
        epoch = load_atomic(state + _EPOCH)
        if epoch % 2 == 1 and epoch != seen:
            add_atomic(state + _ACTIVE, 1)
            if load_atomic(state + _EPOCH) == epoch:  # else it was closed before we were counted
                _take_part(state, thread)
            add_atomic(state + _ACTIVE, -1)
            seen, looks = epoch, 0
        elif looks < _SPINS:
            _wait_a_little(looks)
            looks += 1
        else:
            add_atomic(state + _SLEEPERS, 1)
            futex_wait(state + _EPOCH, epoch)
            add_atomic(state + _SLEEPERS, -1)
            looks = 0


@entry(phases=TABLE)
def run(state, phases):
    """Carry out a program and return when it is done.

    phases: int64 [N, 4] = address of the function, address of its params, items, items in a chunk. The caller keeps
    the params alive and holds the pool's lock.
    """
    threads = load_int64(state + _THREADS)
    store_int64(state + _PHASES, phases.shape[0])
    for p in range(phases.shape[0]):
        at = _phase_at(state, p)
        for field in range(PHASE_FIELDS):
            store_int64(at + 8 * field, phases[p, field])
        store_int64(at + _DONE, 0)
        for thread in range(threads):
            store_int64(at + _NEXT + thread * _LINE, _range_start(phases[p, 2], thread, threads))
    epoch = load_int64(state + _EPOCH) + 1
    store_atomic(state + _EPOCH, epoch)
    if load_atomic(state + _SLEEPERS) > 0:
        futex_wake(state + _EPOCH)
    _take_part(state, np.int64(0))
    store_atomic(state + _EPOCH, epoch + 1)
    looks = 0
    while load_atomic(state + _ACTIVE) > 0:  # they still read the state, though all work is done
        _wait_a_little(looks)
        looks += 1


@njit(nogil=True, cache=True)
def run_alone(phases):
    """Carry out a program in this thread: for work that is done before another thread would have woken."""
    for p in range(phases.shape[0]):
        call_items(phases[p, 0], phases[p, 1], 0, phases[p, 2])


@entry()
def _wake(state):
    futex_wake(state + _EPOCH)


class Pool:
    """``num_threads`` threads: the caller's and others that this makes. ``address`` is what ``run`` takes.

    The others run where the thread that makes the pool may run.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.lock = threading.Lock()  # held while a program runs
        lines = _HEADER // _LINE + MAX_PHASES * (_NEXT // _LINE + num_threads)
        self._memory: Ints = np.zeros((lines + 1) * _LINE // 8, dtype=np.int64)
        self.address = -(-self._memory.ctypes.data // _LINE) * _LINE
        self._word(_THREADS)[0] = num_threads
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=f"moray-compute-{i}", daemon=True)
            for i in range(1, num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the other threads."""
        with self.lock:
            self._word(_STOP)[0] = 1
            # A changed epoch keeps a thread that is about to sleep awake.
            self._word(_EPOCH)[0] += 2
            _wake(self.address)
            for thread in self._threads:
                thread.join()

    def _serve(self, thread: int) -> None:
        _serve(self.address, thread)

    def _word(self, offset: int) -> Ints:
        first = (self.address - self._memory.ctypes.data + offset) // 8
        return self._memory[first : first + 1]


_pool: Pool | None = None
_making = threading.Lock()


def current_pool() -> Pool:
    """This process's pool; at first of one thread a core."""
    pool = _pool
    if pool is None:
        with _making:
            pool = _pool or _make(len(os.sched_getaffinity(0)))
    return pool


def set_num_threads(count: int) -> None:
    """Give the kernels ``count`` threads, the caller's included; no more than the machine has cores. And torch, if this
    process has imported it: expert hosts do without.

    Call it in each process that computes, while nothing is computed: an actor with num_cpus=0 would otherwise give
    torch one thread.
    """
    count = max(1, min(count, os.cpu_count() or 1))
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)
    with _making:
        if _pool is None or _pool.num_threads != count:
            _make(count)


def _make(num_threads: int) -> Pool:
    global _pool
    if _pool is not None:
        _pool.close()
    _pool = Pool(num_threads)
    return _pool


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)
