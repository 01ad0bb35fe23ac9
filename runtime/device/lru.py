"""Least recently used, over all layers."""

from __future__ import annotations

from collections.abc import Callable


class LeastRecentlyUsed:
    """A ``runtime.residency.policy.Policy``."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}  # the least recent first

    def loaded(self, expert: int) -> None:
        self._order[expert] = None

    def evicted(self, expert: int) -> None:
        self._order.pop(expert, None)

    def used(self, experts: list[int]) -> None:
        for expert in experts:
            if expert in self._order:
                del self._order[expert]
                self._order[expert] = None

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        return next((expert for expert in self._order if may_evict(expert)), None)
