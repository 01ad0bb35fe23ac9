"""Least recently used, over all layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class LRU:
    """Evicts what was used, or loaded, longest ago. O(1), and one more for each expert that may not be evicted."""

    def __init__(self) -> None:
        self._recency: OrderedDict[int, None] = OrderedDict()  # those in memory, the most recent last

    def loaded(self, expert: int) -> None:
        self._recency[expert] = None
        self._recency.move_to_end(expert)

    def evicted(self, expert: int) -> None:
        self._recency.pop(expert, None)

    def used(self, experts: list[int]) -> None:
        for expert in experts:
            if expert in self._recency:
                self._recency.move_to_end(expert)

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        return next((expert for expert in self._recency if may_evict(expert)), None)
