"""Least frequently used, with uses that count less the longer they lie back."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

HALF_LIFE_TOKENS = 64.0


class LFU:
    """Evicts the expert of the smallest score: the sum over its uses of 2 ** (-age / half-life).

    Age is in passes through the layers, that is in decoded tokens, and fractions of one. All scores decay alike, so
    their order changes by uses only: kept is log2 of the sum of 2 ** (time of use / half-life), which nothing needs to
    update. Uses count on while an expert is not in memory. A load counts as a use until the expert is used, so that
    prefetched experts are not the first to go.

    The heap holds one entry for each expert in memory, which may be out of date: too small, never too large. So the
    first entry that is up to date is the minimum. ``used`` takes O(1), ``victim`` O(log N) on average.
    """

    def __init__(self, num_experts_of_layers: Sequence[int], half_life: float = HALF_LIFE_TOKENS) -> None:
        self._layer_of = [layer for layer, count in enumerate(num_experts_of_layers) for _ in range(count)]
        self._num_layers, self._half_life = len(num_experts_of_layers), half_life
        self._pass, self._layer = 0, -1
        self._now = 0.0  # in half-lives
        self._scores = [-math.inf] * len(self._layer_of)
        self._loaded_at = [-math.inf] * len(self._layer_of)
        self._in_memory = bytearray(len(self._layer_of))
        self._heap: list[tuple[float, int]] = []
        self._has_entry = bytearray(len(self._layer_of))

    def loaded(self, expert: int) -> None:
        self._in_memory[expert] = True
        self._loaded_at[expert] = self._now
        if not self._has_entry[expert]:
            self._has_entry[expert] = True
            heapq.heappush(self._heap, (self._value(expert), expert))

    def evicted(self, expert: int) -> None:
        self._in_memory[expert] = False  # its entry goes when it is met

    def used(self, experts: list[int]) -> None:
        if not experts:
            return
        layer = self._layer_of[experts[0]]
        self._pass += layer <= self._layer
        self._layer = layer
        now = self._now = (self._pass + layer / self._num_layers) / self._half_life
        for expert in experts:
            self._scores[expert] = now + math.log2(1 + 2 ** (self._scores[expert] - now))

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        heap, refused, found = self._heap, [], None
        while heap:
            value, expert = heap[0]
            if not self._in_memory[expert]:
                heapq.heappop(heap)
                self._has_entry[expert] = False
            elif (current := self._value(expert)) > value:
                heapq.heapreplace(heap, (current, expert))
            elif may_evict(expert):
                found = expert
                break
            else:
                refused.append(heapq.heappop(heap))
        for entry in refused:
            heapq.heappush(heap, entry)
        return found

    def _value(self, expert: int) -> float:
        return max(self._scores[expert], self._loaded_at[expert])
