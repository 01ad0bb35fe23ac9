"""What may be loaded ahead of need, and whether it pays: properties, and a simulated machine."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.runtime.prefetch.budget import PrefetchBudget, RateMeter
from moray.runtime.prefetch.payoff import PayoffTracker

MB = 1_000_000


def meter_of(bandwidth: float, spare_s: float) -> RateMeter:
    meter = RateMeter()
    meter.record_read(round(bandwidth), 1.0)
    meter.record_spare(spare_s)
    return meter


# ------------------------------------------------------------------------------------------ rates


def test_rates_follow_what_is_measured() -> None:
    meter = RateMeter()
    assert (meter.bandwidth, meter.spare_s, meter.window_bytes) == (0, 0, 0)
    meter.record_read(100 * MB, 0.1)
    assert meter.bandwidth == pytest.approx(1000 * MB)
    meter.record_read(1000, 0.001)  # a small read, 1 MB/s, counts for little
    assert meter.bandwidth == pytest.approx(1000 * MB, rel=0.02)
    for _ in range(200):
        meter.record_read(100 * MB, 0.2)
        meter.record_spare(0.004)
    assert meter.bandwidth == pytest.approx(500 * MB, rel=0.01)
    assert meter.window_bytes == pytest.approx(2 * MB, rel=0.01)
    meter.record_spare(30.0)  # somebody read the answer
    assert meter.spare_s == pytest.approx(0.004)


# ----------------------------------------------------------------------------------------- budget


def test_a_window_admits_what_the_disk_can_read_in_it() -> None:
    budget = PrefetchBudget(meter_of(1000 * MB, 0.010))
    budget.demand_ended(0.0)
    assert [budget.admit(2 * MB) for _ in range(5)] == [True, True, True, True, False]  # 8 of 10 MB
    budget.need_arrived(0.010)
    assert not budget.admit(2 * MB)
    budget.demand_ended(0.020)
    assert budget.credit_bytes == pytest.approx(8 * MB)


def test_without_spare_time_nothing_is_admitted() -> None:
    budget = PrefetchBudget(meter_of(1000 * MB, 0.0))
    budget.demand_ended(0.0)
    budget.need_arrived(0.0)
    budget.demand_ended(0.1)
    assert not budget.admit(1)


def test_before_anything_was_measured_nothing_is_admitted() -> None:
    budget = PrefetchBudget(RateMeter())
    budget.demand_ended(0.0)
    assert not budget.admit(1)


def test_several_windows_pay_for_an_expert_bigger_than_one() -> None:
    budget = PrefetchBudget(meter_of(1000 * MB, 0.010))  # 8 MB a window
    admitted = []
    for layer in range(12):
        budget.layer_passed(0.010 * layer)
        admitted.append(budget.admit(30 * MB))
    assert admitted == [layer in (0, 3, 7, 11) for layer in range(12)]  # when 8, 32, 64, 96 MB were given


def test_windows_of_layers_that_needed_nothing_are_measured_too() -> None:
    meter = meter_of(1000 * MB, 0.010)
    budget = PrefetchBudget(meter)
    for layer in range(100):
        budget.layer_passed(0.002 * layer)
    assert meter.spare_s == pytest.approx(0.002, rel=0.01)
    budget.need_arrived(0.200)
    budget.need_arrived(0.201)  # while the last demand is still being loaded: no spare time at all
    assert meter.spare_s == pytest.approx(0.9 * 0.002, rel=0.01)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["need", "ended", "passed", "admit", "refund"]), st.integers(1, 50), st.floats(0.0, 0.05)
    ),
    max_size=200,
)


@given(EVENTS)
def test_never_more_is_admitted_than_all_windows_gave_and_one_load_more(
    events: list[tuple[str, int, float]],
) -> None:
    meter = meter_of(1000 * MB, 0.005)
    budget = PrefetchBudget(meter)
    now_s = given_bytes = admitted = 0.0
    loads: list[int] = []
    for kind, size, pause_s in events:
        now_s += pause_s
        if kind == "need":
            budget.need_arrived(now_s)
        elif kind in ("ended", "passed"):
            budget.demand_ended(now_s) if kind == "ended" else budget.layer_passed(now_s)
            given_bytes += 0.8 * meter.window_bytes
        elif kind == "admit":
            before = budget.credit_bytes
            if budget.admit(size * MB):
                assert before > 0
                loads.append(size * MB)
                admitted += size * MB
        elif loads:
            budget.refund(loads[-1])
            admitted -= loads.pop()
        assert admitted <= given_bytes + 50 * MB + 1
        assert budget.credit_bytes > -50 * MB


# ----------------------------------------------------------------------------------------- payoff


def test_what_became_of_prefetches_is_counted_and_weighed() -> None:
    tracker = PayoffTracker(meter_of(1000 * MB, 0.01))
    for expert in range(4):
        tracker.began(expert, 100 * MB, victim=10 + expert)
    tracker.needed(0, 100 * MB, 100 * MB)
    tracker.needed(1, 100 * MB, 40 * MB)
    tracker.contradicted(2, 100 * MB)
    tracker.needed(5, 100 * MB, 0)  # nobody foresaw it
    tracker.needed(6, 100 * MB, 100 * MB)  # a hit
    tracker.refused()
    stats = tracker.stats()
    assert (stats.num_begun, stats.num_used, stats.num_late, stats.num_wasted) == (4, 1, 1, 1)
    assert (stats.num_missed, stats.num_refused) == (1, 1)
    assert (stats.used_bytes, stats.late_bytes, stats.wasted_bytes) == (100 * MB, 40 * MB, 100 * MB)
    assert stats.precision == pytest.approx(2 / 3) and stats.recall == pytest.approx(2 / 3)
    assert stats.saved_s == pytest.approx(0.14) and stats.cost_s == pytest.approx(0.04)
    tracker.needed(10, 100 * MB, 0)  # a used prefetch evicted it: the demand load would have done so, too
    assert tracker.stats().cost_s == pytest.approx(0.04)
    tracker.needed(12, 100 * MB, 0)  # a wasted one did
    assert tracker.stats().cost_s == pytest.approx(0.14)
    tracker.needed(13, 100 * MB, 0)  # one of which nothing is known yet
    assert tracker.stats().cost_s == pytest.approx(0.14)
    tracker.dropped(3, 0)
    assert tracker.stats().cost_s == pytest.approx(0.24)
    tracker.needed(13, 100 * MB, 0)  # is counted once
    assert tracker.stats().cost_s == pytest.approx(0.24)
    tracker.needed(2, 100 * MB, 100 * MB)  # used after all, long after
    assert tracker.stats().cost_s == pytest.approx(0.14)
    assert (tracker.stats().num_used, tracker.stats().num_used_after) == (1, 1)
    tracker.validate()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 4)), max_size=300), st.integers(0, 2))
def test_every_prefetch_ends_once(events: list[tuple[int, int, int]], speed: int) -> None:
    tracker = PayoffTracker(meter_of(1000 * MB, 0.01) if speed else RateMeter())
    begun: set[int] = set()
    for step, (kind, expert, quarters) in enumerate(events):
        if kind <= 1 and expert not in begun:
            tracker.began(expert, 4 * MB, victim=(expert + quarters) if quarters else None)
            begun.add(expert)
        elif kind == 2:
            tracker.needed(expert, 4 * MB, quarters * MB)
            begun.discard(expert)
        elif kind == 3:
            tracker.dropped(expert, quarters * MB)
            begun.discard(expert)
        elif kind == 5:
            tracker.contradicted(expert, 4 * MB)
            begun.discard(expert)
        elif kind == 4:
            tracker.refused()
        else:
            tracker.is_on(step * speed)
        tracker.validate()
    stats = tracker.stats()
    assert stats.num_begun - stats.num_used - stats.num_late - stats.num_wasted == len(begun)
    assert 0 <= stats.precision <= 1 and 0 <= stats.recall <= 1


# ---------------------------------------------------------------------------------------- machine


@dataclass
class Machine:
    """A disk, an LRU cache and layers that compute, in simulated time. Routing is uniform: only hints can help.

    Experts of 1 MB, a disk of 1 GB/s: 1 ms a load. A hint names a needed expert with probability ``accuracy``, else
    any of the next layer.
    """

    compute_s: float
    accuracy: float
    has_prefetch: bool = True
    expert_bytes: int = MB
    num_layers: int = 8
    num_experts: int = 16
    num_slots: int = 64
    bandwidth: float = 1000 * MB
    now_s: float = 0.0
    waited_s: float = 0.0
    loaded: OrderedDict[int, int] = field(default_factory=OrderedDict)  # expert -> bytes in memory, LRU first
    states: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meter = RateMeter()
        self.budget, self.tracker = PrefetchBudget(self.meter), PayoffTracker(self.meter)
        self.rng = random.Random(0)
        self.expected = self.route(0)
        self.hinted: set[int] = set()

    def route(self, layer: int) -> list[int]:
        return [layer * self.num_experts + e for e in self.rng.sample(range(self.num_experts), 2)]

    def run(self, num_layers: int) -> Machine:
        for step in range(num_layers):
            needed, self.expected = self.expected, self.route((step + 1) % self.num_layers)
            self.demand(needed)
            if self.has_prefetch and self.tracker.is_on(self.now_s):
                self.hint(needed, (step + 1) % self.num_layers)
            self.compute()
            self.tracker.validate()
            self.states.append(self.tracker.state)
            assert len(self.loaded) <= self.num_slots
        return self

    def demand(self, needed: list[int]) -> None:
        for expert in needed:
            self.tracker.needed(expert, self.expert_bytes, self.loaded.get(expert, 0))
            if expert in self.hinted:  # what is not read yet is the demand's to read
                self.budget.refund(self.expert_bytes - self.loaded[expert])
        for expert in self.hinted - set(needed):  # contradicted: what is still loading is cancelled
            if self.loaded[expert] < self.expert_bytes:
                self.drop(expert)
            else:
                self.tracker.contradicted(expert, self.expert_bytes)
        self.hinted.clear()
        missing = [(e, self.expert_bytes - self.loaded.get(e, 0)) for e in needed]
        num_missing = sum(count for _, count in missing)
        if num_missing:
            self.budget.need_arrived(self.now_s)
            for expert, _ in missing:
                self.make_room(needed, expert)
                self.loaded[expert] = self.expert_bytes
            wait_s = num_missing / self.bandwidth
            self.meter.record_read(num_missing, wait_s)
            self.now_s, self.waited_s = self.now_s + wait_s, self.waited_s + wait_s
            self.budget.demand_ended(self.now_s)
        else:
            self.budget.layer_passed(self.now_s)
        for expert in needed:
            self.loaded.move_to_end(expert)

    def hint(self, in_use: list[int], layer: int) -> None:
        for true in self.expected:
            is_right = self.rng.random() < self.accuracy
            expert = true if is_right else layer * self.num_experts + self.rng.randrange(self.num_experts)
            if expert in self.loaded:
                continue
            if self.budget.admit(self.expert_bytes):
                self.tracker.began(expert, self.expert_bytes, self.make_room([*in_use, *self.hinted], expert))
                self.loaded[expert] = 0
                self.hinted.add(expert)
            else:
                self.tracker.refused()

    def compute(self) -> None:
        left = int(self.compute_s * self.bandwidth)
        for expert in sorted(self.hinted):
            read = min(left, self.expert_bytes - self.loaded[expert])
            self.loaded[expert] += read
            left -= read
            self.meter.record_read(read, read / self.bandwidth)
        self.now_s += self.compute_s

    def make_room(self, in_use: list[int], incoming: int) -> int | None:
        if incoming in self.loaded or len(self.loaded) < self.num_slots:
            return None
        victim = next(e for e in self.loaded if e not in in_use)
        self.drop(victim)
        return victim

    def drop(self, expert: int) -> None:
        read = self.loaded.pop(expert)
        self.tracker.dropped(expert, read)
        if expert in self.hinted:
            self.hinted.discard(expert)
            self.budget.refund(self.expert_bytes - read)


def waits(machine: Machine) -> float:
    """Of the time that layers wait for the disk without prefetch, the part that is left."""
    other = Machine(machine.compute_s, machine.accuracy, has_prefetch=False, expert_bytes=machine.expert_bytes)
    return machine.waited_s / other.run(len(machine.states)).waited_s


def test_perfect_hints_with_time_to_spare_take_the_waiting_away() -> None:
    machine = Machine(compute_s=0.004, accuracy=1.0).run(2000)
    stats = machine.tracker.stats()
    assert set(machine.states) == {"on"} and stats.reason == "prefetch is on"
    assert stats.precision == 1.0 and stats.recall > 0.95
    assert waits(machine) < 0.05


def test_good_hints_with_little_time_save_what_the_time_allows() -> None:
    """0.5 ms a layer for experts of 1 ms: at best half a load is hidden, and a fifth of the time stays unused."""
    machine = Machine(compute_s=0.0005, accuracy=1.0).run(4000)
    assert set(machine.states) == {"on"}
    saved_s = machine.tracker.stats().saved_s
    assert 0.5 * 0.8 * 4000 * 0.0005 < saved_s <= 4000 * 0.0005


def test_random_hints_are_switched_off() -> None:
    machine = Machine(compute_s=0.004, accuracy=0.0).run(6000)
    assert machine.states.count("off") > 0.8 * len(machine.states)
    assert machine.tracker.state != "on"
    assert "on" not in machine.states[machine.states.index("off") :]
    assert waits(machine) < 1.05
    assert "prefetch is" in machine.tracker.reason


def test_a_disk_without_spare_time_is_not_asked() -> None:
    machine = Machine(compute_s=0.0, accuracy=1.0).run(3000)
    assert machine.states[-1] == "off"
    assert machine.tracker.reason.startswith("prefetch is off: the disk had time for 0 of ")
    assert machine.tracker.stats().num_begun == 0


def test_it_comes_back_when_hints_become_good_and_goes_when_they_become_bad() -> None:
    machine = Machine(compute_s=0.004, accuracy=0.0).run(3000)
    assert machine.tracker.state != "on"
    machine.accuracy = 0.9
    machine.run(20_000)
    assert machine.states[-1] == "on"
    assert machine.tracker.reason.startswith("prefetch is on again: of 64 experts loaded ahead ")
    machine.accuracy = 0.0
    machine.run(3000)
    assert machine.states[-1] != "on"


def test_the_pause_doubles_while_it_does_not_pay() -> None:
    tracker, now_s, pauses = PayoffTracker(meter_of(1000 * MB, 0.01)), 0.0, []
    for _ in range(8):
        while tracker.is_on(now_s):
            tracker.began(1, MB)
            tracker.dropped(1, MB)
        assert tracker.reason.startswith("prefetch is off: of ") and "0 % were used" in tracker.reason
        began_s = now_s
        while not tracker.is_on(now_s):
            now_s += 1.0
        pauses.append(now_s - began_s)
    assert pauses == [2, 4, 8, 16, 32, 64, 64, 64]
