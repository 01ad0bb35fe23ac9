"""Prefetch on a host: which hints become loads, and what became of them. Told of everything that touches the disk.

Glue between the loader's events and the budget, odds and payoff, which decide. Called with the loader's lock held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Literal

from moray.runtime.prefetch.budget import PrefetchBudget, RateMeter
from moray.runtime.prefetch.odds import PredictionOdds
from moray.runtime.prefetch.payoff import PayoffTracker, PrefetchStats

PrefetchMode = Literal["auto", "on", "off"]


class HostPrefetch:
    """``mode``: "auto" stops when it does not pay and tries again later; "on" never stops; both keep to the budget."""

    def __init__(
        self,
        mode: PrefetchMode,
        layer_of: Sequence[int],
        bytes_of: Sequence[int],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """``layer_of``, ``bytes_of`` [N]: of each of the host's experts."""
        self._mode, self._layer_of, self._bytes_of, self._clock = mode, layer_of, bytes_of, clock
        self._meter = RateMeter()
        self._budget, self._payoff = PrefetchBudget(self._meter), PayoffTracker(self._meter)
        self._odds = PredictionOdds(layer_of)
        self._loaded: dict[int, set[int]] = {}  # layer -> experts loaded for a hint to it, not yet needed
        self._in_demand = False

    @property
    def is_on(self) -> bool:
        if self._mode == "auto":
            return self._payoff.is_on(self._clock())
        return self._mode == "on"

    def stats(self) -> PrefetchStats:
        return self._payoff.stats()

    def needed(self, experts: Sequence[int], loaded_bytes: Sequence[int]) -> None:
        """A layer needs these, of which so many bytes each are in memory. ``experts``: of one layer, not empty."""
        is_missing = False
        for expert, loaded in zip(experts, loaded_bytes, strict=True):
            size = self._bytes_of[expert]
            self._payoff.needed(expert, size, loaded)
            is_missing |= loaded < size
            if 0 < loaded < size:
                self._budget.refund(size - loaded)
        self._contradict(experts)
        if is_missing and not self._in_demand:
            self._in_demand = True
            self._budget.need_arrived(self._clock())

    def used(self, experts: Sequence[int]) -> None:
        """A layer call used these: it found them in memory, or they were loaded for it."""
        self._odds.used(experts)
        for expert in experts:
            self._payoff.needed(expert, self._bytes_of[expert], self._bytes_of[expert])
        self._contradict(experts)

    def hinted(self, predicted: Sequence[int]) -> None:
        """A layer has begun that hints at the next ones: at these of one layer, which are not in memory."""
        self._odds.predicted(predicted)
        if not self._in_demand:
            self._budget.layer_passed(self._clock())

    def admit(self, expert: int) -> bool:
        """Whether a hint may become a load, in place of another expert, now."""
        if not self._odds.are_good(expert):
            self._payoff.unlikely()
            return False
        admitted = self.is_on and self._budget.admit(self._bytes_of[expert])
        if not admitted:
            self._payoff.refused()
        return admitted

    def began(self, expert: int, victim: int | None) -> None:
        """A hint has become a load."""
        self._payoff.began(expert, self._bytes_of[expert], victim)

    def loaded(self, expert: int) -> None:
        """What ``began`` is in memory, and was not needed meanwhile."""
        self._loaded.setdefault(self._layer_of[expert], set()).add(expert)

    def dropped(self, expert: int, read_bytes: int) -> None:
        """Any expert was evicted, or its load given up."""
        if read_bytes < self._bytes_of[expert]:
            self._budget.refund(self._bytes_of[expert] - read_bytes)
        self._payoff.dropped(expert, read_bytes)
        self._loaded.get(self._layer_of[expert], set()).discard(expert)

    def read(self, num_bytes: int, busy_s: float) -> None:
        """Any read has ended; the disk was busy so long since the last one."""
        self._meter.record_read(num_bytes, busy_s)

    def demand_ended(self) -> None:
        """No layer waits for the disk."""
        if self._in_demand:
            self._in_demand = False
            self._budget.demand_ended(self._clock())

    def _contradict(self, experts: Sequence[int]) -> None:
        """What was loaded for this call of the layer and is not needed by it."""
        for expert in self._loaded.pop(self._layer_of[experts[0]], set()) - set(experts):
            self._payoff.contradicted(expert, self._bytes_of[expert])
