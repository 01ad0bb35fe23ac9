"""Cache policies against their definitions, written down naively."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.runtime.errors import ConfigError
from moray.runtime.residency.policies import POLICIES, make_policy
from moray.runtime.residency.policies.belady import Belady
from moray.runtime.residency.policies.layer_lru import LayerLRU, share_slots
from moray.runtime.residency.policies.lfu import LFU
from moray.runtime.residency.policies.lru import LRU
from moray.runtime.residency.policy import Policy
from moray.runtime.trace.simulate import replay

LAYERS = (4, 3, 5)
NUM_EXPERTS = sum(LAYERS)
LAYER_OF = [layer for layer, count in enumerate(LAYERS) for _ in range(count)]
FIRST = [0, *itertools.accumulate(LAYERS)]
HALF_LIFE = 3.0


class Naive:
    """Everything that happened; subclasses say whom their definition lets go, and with what value."""

    def __init__(self) -> None:
        self.memory: set[int] = set()
        self.events: list[tuple[float, int, bool]] = []  # time in tokens, expert, is it a load
        self.now, self._pass, self._layer = 0.0, 0, -1

    def loaded(self, expert: int) -> None:
        self.memory.add(expert)
        self.events.append((self.now, expert, True))

    def evicted(self, expert: int) -> None:
        self.memory.discard(expert)

    def used(self, experts: list[int]) -> None:
        if experts:
            layer = LAYER_OF[experts[0]]
            self._pass += layer <= self._layer
            self._layer = layer
            self.now = self._pass + layer / len(LAYERS)
            self.events += [(self.now, expert, False) for expert in experts]

    def last_touch(self, expert: int) -> int:
        """Of those in memory, only touches while in memory count: its load is one."""
        return max(i for i, (_, other, _) in enumerate(self.events) if other == expert)

    def score(self, expert: int) -> float:
        uses = [
            2 ** ((t - self.now) / HALF_LIFE) for t, other, is_load in self.events if other == expert and not is_load
        ]
        last_load = [t for t, other, is_load in self.events if other == expert and is_load][-1]
        return max(sum(uses), 2 ** ((last_load - self.now) / HALF_LIFE))


Step = tuple[str, int, frozenset[int]]
steps = st.lists(
    st.tuples(
        st.sampled_from(["load", "load", "evict", "use", "use"]),
        st.integers(0, NUM_EXPERTS - 1),
        st.frozensets(st.integers(0, NUM_EXPERTS - 1)),
    ),
    max_size=60,
)


def run(policy: Policy, history: Sequence[Step], check: Callable[[Naive, int, set[int], int | None], None]) -> None:
    """Give both the same history; ``check(naive, incoming, allowed, victim)`` at each eviction."""
    naive = Naive()
    for kind, expert, chosen in history:
        if kind == "load" and expert not in naive.memory:
            policy.loaded(expert)
            naive.loaded(expert)
        elif kind == "evict":
            allowed = naive.memory & chosen
            victim = policy.victim(expert, chosen.__contains__)
            assert (victim is None) == (not allowed)
            assert policy.victim(expert, chosen.__contains__) == victim  # asking changes nothing
            check(naive, expert, allowed, victim)
            if victim is not None:
                policy.evicted(victim)
                naive.evicted(victim)
        elif kind == "use":
            used = sorted(e for e in chosen | {expert} if LAYER_OF[e] == LAYER_OF[expert])
            policy.used(used)
            naive.used(used)


@given(steps)
def test_lru_evicts_what_was_touched_longest_ago(history: list[Step]) -> None:
    def check(naive: Naive, incoming: int, allowed: set[int], victim: int | None) -> None:
        if allowed:
            assert victim == min(allowed, key=naive.last_touch)

    run(LRU(), history, check)


@given(steps, st.integers(1, NUM_EXPERTS))
def test_layer_lru_evicts_within_the_layer_unless_it_is_below_its_quota(history: list[Step], num_slots: int) -> None:
    quotas = share_slots(LAYERS, num_slots)

    def check(naive: Naive, incoming: int, allowed: set[int], victim: int | None) -> None:
        if not allowed:
            return
        excess = [sum(LAYER_OF[e] == layer for e in naive.memory) - quotas[layer] for layer in range(len(LAYERS))]
        own = LAYER_OF[incoming]
        with_candidates = {LAYER_OF[e] for e in allowed}
        assert victim is not None
        layer = LAYER_OF[victim]
        if excess[own] >= 0 and own in with_candidates:
            assert layer == own
        else:
            assert excess[layer] == max(excess[other] for other in with_candidates)
        assert victim == min((e for e in allowed if LAYER_OF[e] == layer), key=naive.last_touch)

    run(LayerLRU(LAYERS, num_slots), history, check)


@given(steps)
def test_lfu_evicts_the_smallest_decayed_count(history: list[Step]) -> None:
    def check(naive: Naive, incoming: int, allowed: set[int], victim: int | None) -> None:
        if victim is not None:
            assert naive.score(victim) <= min(map(naive.score, allowed)) * (1 + 1e-9)

    run(LFU(LAYERS, HALF_LIFE), history, check)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 80))
def test_shares_use_all_slots_and_differ_by_one_where_layers_are_large_enough(layers: list[int], slots: int) -> None:
    shares = share_slots(layers, slots)
    assert sum(shares) == min(slots, sum(layers))
    assert all(share <= count for share, count in zip(shares, layers, strict=True))
    open_shares = [share for share, count in zip(shares, layers, strict=True) if share < count]
    assert not open_shares or max(shares) - min(open_shares) <= 1


def test_lfu_forgets_with_its_half_life() -> None:
    policy = LFU([3], half_life=2)
    for expert in range(3):
        policy.loaded(expert)
    for used in ([0], [0], [0], [2], [1], [1], [2], [2]):
        policy.used(used)
    # Ages 7, 6, 5; 3, 2; 4, 1, 0.
    assert policy.victim(0, lambda _: True) == 0
    for _ in range(8):
        policy.used([0])
    assert policy.victim(0, lambda _: True) == 1


def test_lfu_keeps_what_was_just_prefetched() -> None:
    policy = LFU([2, 2])
    policy.loaded(0)
    for _ in range(3):
        policy.used([0])
    policy.loaded(1)
    for _ in range(400):
        policy.used([3])
    policy.loaded(2)
    assert policy.victim(3, lambda _: True) == 1  # loaded and never used
    policy.evicted(1)
    assert policy.victim(3, lambda _: True) == 0


def test_policies_by_name() -> None:
    kinds = [type(make_policy(name, LAYERS, 4)._policy) for name in POLICIES]
    assert kinds == [LFU, LayerLRU, LRU]
    with pytest.raises(ConfigError, match=r"unknown cache policy 'fifo', expected lfu, layer-lru, lru"):
        make_policy("fifo", LAYERS, 4)


# -------------------------------------------------------------------------------------- scans


def scans(policy: Policy, num_slots: int, rounds: int) -> list[int]:
    """Misses of each round of calls that use all experts of six layers of 4."""
    calls = [list(range(first, first + 4)) for first in range(0, 24, 4)] * rounds
    missed = replay(calls, policy, num_slots)
    return missed.reshape(rounds, 6).sum(axis=1).tolist()


def test_a_scan_larger_than_the_cache_finds_most_of_the_cache_again() -> None:
    assert scans(LRU(), 18, 4) == [24, 24, 24, 24]
    for name in POLICIES:
        first, *later = scans(make_policy(name, (4,) * 6, 18), 18, 4)
        assert first == 24 and all(6 <= missed <= 12 for missed in later), (name, later)


def test_a_scan_is_no_use_and_its_loads_go_first() -> None:
    policy = make_policy("lru", (4, 4), 4)
    for expert in (0, 1, 2, 3):
        policy.loaded(expert)
        policy.used([expert])
    policy.used([0, 1, 2, 3])  # all of a layer
    assert policy.victim(4, lambda _: True) == 0  # still the one that was used first
    policy.evicted(0)
    policy.loaded(4)
    policy.used([4, 5, 6])  # 5 and 6 were not kept
    assert policy.victim(7, lambda _: True) == 4
    policy.used([4])  # by a single token
    assert policy.victim(7, lambda _: True) == 1


# ------------------------------------------------------------------------------------- Belady


def calls_of(layers: Sequence[int], max_calls: int) -> st.SearchStrategy[list[list[int]]]:
    """Layer calls over experts numbered in layer order."""
    first = [0, *itertools.accumulate(layers)]
    call = st.integers(0, len(layers) - 1).flatmap(
        lambda layer: st.sets(st.integers(first[layer], first[layer + 1] - 1), min_size=1).map(sorted)
    )
    return st.lists(call, max_size=max_calls)


def fewest_misses(calls: Sequence[list[int]], num_slots: int) -> int:
    """Over every choice of what to keep. A call that fits leaves all its experts in memory."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for active in calls:
        after: dict[frozenset[int], int] = {}
        must = frozenset(active if len(active) <= num_slots else ())
        for memory, misses in best.items():
            every = memory | set(active)
            total = misses + len(set(active) - memory)
            for others in itertools.combinations(every - must, min(num_slots, len(every)) - len(must)):
                kept = must | set(others)
                after[kept] = min(after.get(kept, total), total)
        best = after
    return min(best.values())


@given(calls_of([4, 3], 9), st.integers(1, 6))
def test_belady_misses_as_rarely_as_is_possible(calls: list[list[int]], num_slots: int) -> None:
    assert replay(calls, Belady(calls, num_slots), num_slots).sum() == fewest_misses(calls, num_slots)


@given(calls_of(LAYERS, 60), st.integers(1, NUM_EXPERTS))
def test_no_policy_beats_belady(calls: list[list[int]], num_slots: int) -> None:
    bound = replay(calls, Belady(calls, num_slots), num_slots).sum()
    for name in POLICIES:
        assert replay(calls, make_policy(name, LAYERS, num_slots), num_slots).sum() >= bound


@given(calls_of(LAYERS, 40), st.integers(1, NUM_EXPERTS), st.sampled_from([*POLICIES, "belady"]))
def test_a_replay_keeps_to_its_slots_and_pins_the_call(calls: list[list[int]], num_slots: int, name: str) -> None:
    policy: Any = Belady(calls, num_slots) if name == "belady" else make_policy(name, LAYERS, num_slots)
    watched = Watched(policy, calls, num_slots)
    missed_C = replay(calls, watched, num_slots)
    assert missed_C.tolist() == watched.missed and watched.num_calls == len(calls)


class Watched:
    """A policy that checks what it is told."""

    def __init__(self, policy: Policy, calls: Sequence[list[int]], num_slots: int) -> None:
        self._policy, self._calls, self._num_slots = policy, calls, num_slots
        self._memory: set[int] = set()
        self.num_calls, self.missed = 0, [0] * len(calls)

    @property
    def _active(self) -> list[int]:
        return self._calls[self.num_calls]

    def loaded(self, expert: int) -> None:
        assert expert in self._active and expert not in self._memory
        self._memory.add(expert)
        assert len(self._memory) <= self._num_slots
        self.missed[self.num_calls] += 1
        self._policy.loaded(expert)

    def evicted(self, expert: int) -> None:
        self._memory.remove(expert)
        assert expert not in self._active or len(self._active) > self._num_slots
        self._policy.evicted(expert)

    def used(self, experts: list[int]) -> None:
        assert experts == self._active
        assert len(experts) > self._num_slots or self._memory >= set(experts)
        self._policy.used(experts)
        self.num_calls += 1

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        assert len(self._memory) == self._num_slots
        victim = self._policy.victim(incoming, may_evict)
        if victim is None:
            assert len(self._active) > self._num_slots
            self.missed[self.num_calls] += 1  # used and not kept
        return victim
