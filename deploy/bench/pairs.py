"""Timing things against each other, in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep

# A reader's rates that vary by more are of a machine with other work.
MAX_VARIATION = 1.3
# Threads that have just computed look out for more work for about a millisecond, on cores that the next one needs.
PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    @property
    def variation(self) -> float:
        """The largest over the smallest."""
        return self.high / self.low


def time_in_turns(
    subjects: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = perf_counter,
    wait: Callable[[float], object] = sleep,
) -> dict[str, list[float]]:
    """Seconds of every subject, one value a round, after a round that is not counted.

    Each round runs every subject once, with a short pause before; which one is first changes from round to round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    for index in range(-1, rounds):
        turn = index % len(names)
        for name in (*names[turn:], *names[:turn]):
            wait(PAUSE_S)
            started = clock()
            subjects[name]()
            if index >= 0:
                seconds[name].append(clock() - started)
    return seconds


def busy_warning(variation: float) -> list[str]:
    """A line for a report, or none."""
    if variation <= MAX_VARIATION:
        return []
    return [f"the machine was busy: a reader's rates varied by a factor of {variation:.1f}; do not trust these numbers"]


def ratios(amount: float, seconds: Sequence[float], others: Sequence[tuple[float, Sequence[float]]]) -> list[float]:
    """Round by round: the rate ``amount`` / seconds over the best rate of the others (amount, seconds)."""
    best = [max(other / taken[i] for other, taken in others) for i in range(len(seconds))]
    return [amount / taken / other for taken, other in zip(seconds, best, strict=True)]
