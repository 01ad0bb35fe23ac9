"""First rates: each resource loaded alone for a moment, then all at once, because they share the memory bus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from threading import Barrier, Thread
from time import perf_counter

from moray.runtime.lanes.lane import Resource
from moray.runtime.lanes.rates import Rate, Rates

Load = Callable[[int], int]
"""One piece of work for so many tokens: does it, waits for its end, returns the bytes it moved."""

_MANY = 16  # tokens of the piece that tells a token's cost from a byte's
_SMALLEST = 1e-15  # s for a byte: what noise may not make zero or less


def calibrate(
    rates: Rates, loads: Mapping[int, Load], seconds: float = 0.05, clock: Callable[[], float] = perf_counter
) -> None:
    """Seed the rates of the resources that have a load. Takes about ``(2 * len(loads) + 1) * seconds``.

    A load is called from a thread of its own while the others run, never by two threads.
    """
    alone = {resource: _measure_alone(resource, load, seconds, clock) for resource, load in loads.items()}
    together = _measure_together(loads, seconds, clock) if len(loads) > 1 else {}
    for resource, (rate, num_bytes) in alone.items():
        shared_s = together.get(resource, 0.0) - rate.token_s
        rates.seed(resource, rate, rate._replace(byte_s=max(rate.byte_s, shared_s / num_bytes)))


def _measure_alone(resource: int, load: Load, seconds: float, clock: Callable[[], float]) -> tuple[Rate, int]:
    num_bytes = load(1)  # not measured: compiles, allocates
    one_s = _median_s(load, 1, clock() + seconds, clock)
    token_s = 0.0
    if resource not in (Resource.LINK, Resource.DISK):
        many_s = _median_s(load, _MANY, clock() + seconds, clock)
        # Noise may not leave nothing for the bytes.
        token_s = min(max(0.0, many_s - one_s) / (_MANY - 1), 0.5 * one_s)
    return Rate(0.0, max((one_s - token_s) / num_bytes, _SMALLEST), token_s), num_bytes


def _measure_together(loads: Mapping[int, Load], seconds: float, clock: Callable[[], float]) -> dict[int, float]:
    """Seconds for a piece of work with one token, by resource."""
    found: dict[int, float] = {}
    failed: list[BaseException] = []
    start = Barrier(len(loads))

    def run(resource: int, load: Load) -> None:
        try:
            start.wait()
            found[resource] = _median_s(load, 1, clock() + seconds, clock)
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=run, args=item, name="moray-calibrate", daemon=True) for item in loads.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def _median_s(load: Load, tokens: int, until: float, clock: Callable[[], float]) -> float:
    times = []
    while True:
        started = clock()
        load(tokens)
        ended = clock()
        times.append(ended - started)
        if ended >= until:
            return median(times)
