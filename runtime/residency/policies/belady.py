"""Belady's MIN: evicts what is needed again last. It knows the future, so it is for replaying traces only: a bound."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence


class Belady:
    """The fewest misses that any policy can have ("A study of replacement algorithms for a virtual-storage computer",
    1966), for a cache that holds all experts of a layer call at once, as long as they fit.

    If a call has more experts than there are slots, ``victim`` gives None where it is better to keep what is there:
    the incoming expert is used and not kept.
    """

    def __init__(self, calls: Sequence[Sequence[int]], num_slots: int) -> None:
        """``calls``: the experts of every layer call that ``used`` will tell of, in that order."""
        self._calls, self._num_slots = calls, num_slots
        self._call = 0
        self._uses: defaultdict[int, list[int]] = defaultdict(list)  # expert -> its calls
        for index, experts in enumerate(calls):
            for expert in experts:
                self._uses[expert].append(index)
        self._next: dict[int, int] = {}  # those in memory -> their next call after the present one
        self._heap: list[tuple[int, int]] = []  # (-next call, expert); entries that differ from _next are void

    def loaded(self, expert: int) -> None:
        self._next[expert] = self._next_call(expert)
        heapq.heappush(self._heap, (-self._next[expert], expert))

    def evicted(self, expert: int) -> None:
        self._next.pop(expert, None)

    def used(self, experts: list[int]) -> None:
        self._call += 1
        if self._call < len(self._calls):
            for expert in self._calls[self._call]:
                if expert in self._next:
                    self.loaded(expert)

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        heap, refused, found = self._heap, [], None
        while heap and found is None:
            after, expert = heap[0]
            if self._next.get(expert) != -after:
                heapq.heappop(heap)
            elif may_evict(expert):
                found = expert
            else:
                refused.append(heapq.heappop(heap))
        for entry in refused:
            heapq.heappush(heap, entry)
        if found is not None and self._may_bypass() and self._next_call(incoming) >= self._next[found]:
            return None
        return found

    def _next_call(self, expert: int) -> int:
        uses = self._uses[expert]
        index = bisect_right(uses, self._call)
        return uses[index] if index < len(uses) else len(self._calls)

    def _may_bypass(self) -> bool:
        return len(self._calls[self._call]) > self._num_slots
