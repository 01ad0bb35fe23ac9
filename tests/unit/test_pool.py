from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cfunc

from moray.runtime.arrays import Ints
from moray.runtime.kernels.atomics import add_atomic, load_int64, store_int64
from moray.runtime.kernels.matmul import ITEMS
from moray.runtime.kernels.pool import Pool, current_pool, run, run_alone


@cfunc(ITEMS)
def mark(params, first, last):  # type: ignore[no-untyped-def]
    """params: the address of a count for each item."""
    for item in range(first, last):
        add_atomic(params + 8 * item, 1)


@cfunc(ITEMS)
def double_neighbour(params, first, last):  # type: ignore[no-untyped-def]
    """params: addresses of the input [N] and the output [N], and N: out[i] = 2 * in[N - 1 - i]."""
    for item in range(first, last):
        source = load_int64(params) + 8 * (load_int64(params + 16) - 1 - item)
        store_int64(load_int64(params + 8) + 8 * item, 2 * load_int64(source))


@pytest.fixture(params=[1, 2, 5])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(request.param)
    yield made
    made.close()


def program(*phases: tuple[int, Ints, int, int]) -> Ints:
    return np.array([(f, params.ctypes.data, items, chunk) for f, params, items, chunk in phases], dtype=np.int64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 70), st.integers(1, 6))
def test_every_item_is_done_once(items: int, chunk: int, threads: int) -> None:
    pool, counts = Pool(threads), np.zeros(items + 1, np.int64)
    with pool.lock:
        run(pool.address, program((mark.address, counts, items, chunk)))
    pool.close()
    assert (counts[:items] == 1).all() and counts[items] == 0


def test_a_phase_sees_all_of_the_phase_before(pool: Pool) -> None:
    count = 501
    values = [np.arange(count, dtype=np.int64), *(np.zeros(count, np.int64) for _ in range(4))]
    params = [np.array([a.ctypes.data, b.ctypes.data, count], dtype=np.int64) for a, b in pairwise(values)]
    phases = program(*((double_neighbour.address, p, count, 3) for p in params))
    for _ in range(300):
        for part in values[1:]:
            part[:] = -1
        with pool.lock:
            run(pool.address, phases)
        np.testing.assert_array_equal(values[4], 16 * values[0])
    run_alone(phases)
    np.testing.assert_array_equal(values[4], 16 * values[0])


def test_an_idle_pool_uses_no_cpu(pool: Pool) -> None:
    counts = np.zeros(64, np.int64)
    with pool.lock:
        run(pool.address, program((mark.address, counts, 64, 1)))
    time.sleep(0.3)  # threads look out for work a while before they sleep
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.2
    with pool.lock:
        run(pool.address, program((mark.address, counts, 64, 1)))  # and it wakes again
    assert (counts == 2).all()


def test_a_pool_ends_its_threads() -> None:
    before = threading.active_count()
    pool = Pool(4)
    assert threading.active_count() == before + 3
    pool.close()
    assert threading.active_count() == before


def _ask_in_a_fork(answers: multiprocessing.SimpleQueue[int]) -> None:
    counts = np.zeros(100, np.int64)
    pool = current_pool()
    with pool.lock:
        run(pool.address, program((mark.address, counts, 100, 1)))
    answers.put(int(counts.sum()))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_makes_its_own_pool() -> None:
    current_pool()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_ask_in_a_fork, args=(answers,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and answers.get() == 100


def test_busy_cores_do_not_stop_a_program() -> None:
    """More threads than cores, all of them wanted at once."""
    pools = [Pool(2 * (os.cpu_count() or 1)) for _ in range(3)]
    results = [np.zeros(2000, np.int64) for _ in pools]

    def work(pool: Pool, counts: Ints) -> None:
        for _ in range(50):
            with pool.lock:
                run(pool.address, program((mark.address, counts, len(counts), 7)))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(pools, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for pool, counts in zip(pools, results, strict=True):
        pool.close()
        assert (counts == 50).all()
