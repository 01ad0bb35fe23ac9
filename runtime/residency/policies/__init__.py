"""Temporary."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from moray.runtime.residency.policy import Policy


class LRU:
    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def loaded(self, expert: int) -> None:
        self._order[expert] = None

    def evicted(self, expert: int) -> None:
        del self._order[expert]

    def used(self, experts: list[int]) -> None:
        for e in experts:
            if e in self._order:
                self._order.move_to_end(e)

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        return next((e for e in self._order if may_evict(e)), None)


def make_policy(name: str, num_experts_of_layers: Sequence[int], num_slots: int) -> Policy:
    return LRU()
