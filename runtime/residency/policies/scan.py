"""Keeping a cache through prompts, which use most experts of every layer, one layer after the other.

Such a scan is larger than the cache and comes round in order: a policy that keeps what was used last would evict each
expert just before its turn, and load everything every time (Qureshi et al., "Adaptive Insertion Policies for High
Performance Caching", ISCA 2007, section 3, where the remedy is called LIP).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moray.runtime.residency.policy import Policy


class ScanResistant:
    """Any policy; but what a scan loads in place of something else is the next to go, and a scan counts as no use.

    A call is a scan if it uses more than half of its layer's experts.
    """

    def __init__(self, policy: Policy, num_experts_of_layers: Sequence[int]) -> None:
        self._policy = policy
        self._size_of = [count for count in num_experts_of_layers for _ in range(count)]  # of an expert's layer
        self._fresh: set[int] = set()  # loaded in place of something, not used since
        self._transient: dict[int, None] = {}  # loaded by a scan, in order

    def loaded(self, expert: int) -> None:
        self._policy.loaded(expert)

    def evicted(self, expert: int) -> None:
        self._fresh.discard(expert)
        self._transient.pop(expert, None)
        self._policy.evicted(expert)

    def used(self, experts: list[int]) -> None:
        if not experts:
            return
        is_scan = 2 * len(experts) > self._size_of[experts[0]]
        for expert in experts:
            if is_scan and expert in self._fresh:
                self._transient[expert] = None
            elif not is_scan:
                self._transient.pop(expert, None)
        self._fresh.difference_update(experts)
        if not is_scan:
            self._policy.used(experts)

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        found = next((expert for expert in self._transient if may_evict(expert)), None)
        if found is None:
            found = self._policy.victim(incoming, may_evict)
        if found is not None:
            self._fresh.add(incoming)
        return found
