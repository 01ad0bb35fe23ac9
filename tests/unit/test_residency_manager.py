"""Residency as a pure state machine: any events in any order, the accounts checked after each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moray.runtime.residency.manager import Load, ResidencyManager, State, Urgency
from moray.runtime.residency.policies import make_policy

POLICIES = ["lru", "layer-lru", "lfu"]


def manager_of(sizes: Sequence[int], num_slots: int, policy: str = "lru") -> ResidencyManager:
    """``sizes``: experts of each layer."""
    layer_of = [layer for layer, size in enumerate(sizes) for _ in range(size)]
    return ResidencyManager(layer_of, num_slots, make_policy(policy, list(sizes), num_slots))


def fill(manager: ResidencyManager) -> None:
    while (load := manager.next_load()) is not None:
        finish(manager, load)


def finish(manager: ResidencyManager, load: Load) -> None:
    if load.victim is not None:
        manager.evicted(load.victim)
    manager.loaded(load.expert)
    manager.validate()


# --------------------------------------------------------------------------------- single decisions


def test_everything_becomes_resident_if_it_fits() -> None:
    manager = manager_of([3, 2], 5)
    fill(manager)
    assert manager.holds_all and manager.num_resident == 5
    assert (manager.stats.fill_loads, manager.stats.evictions) == (5, 0)


def test_a_demand_goes_before_a_hint_and_a_hint_before_the_rest() -> None:
    manager = manager_of([4, 4], 8)
    manager.hint([6, 5])
    manager.need("a", [2])
    loads = [manager.next_load() for _ in range(5)]
    assert [(load.expert, load.urgency) for load in loads if load is not None] == [
        (2, Urgency.DEMAND),
        (6, Urgency.HINT),
        (5, Urgency.HINT),
        (0, Urgency.FILL),
        (1, Urgency.FILL),
    ]


def test_what_is_urgent_is_all_that_may_begin() -> None:
    manager = manager_of([4, 4], 8)
    manager.hint([6])
    assert manager.next_load(Urgency.DEMAND) is None
    load = manager.next_load(Urgency.HINT)
    assert load is not None and load.expert == 6
    assert manager.next_load(Urgency.HINT) is None


def test_a_demand_takes_the_slot_of_what_is_only_predicted() -> None:
    manager = manager_of([4], 1)
    manager.hint([3])
    load = manager.next_load()
    assert load is not None and load.expert == 3
    manager.need("a", [0])  # contradicts the hint: same layer
    assert manager.is_given_up(3) and manager.next_load() is None
    manager.failed(3)
    load = manager.next_load()
    assert load is not None and (load.expert, load.slot, load.urgency) == (0, 0, Urgency.DEMAND)
    manager.validate()


def test_a_demand_takes_the_slot_of_a_hint_of_another_layer_if_there_is_no_other() -> None:
    manager = manager_of([2, 2], 1)
    manager.hint([3])
    assert manager.next_load() is not None
    manager.need("a", [0])
    assert not manager.is_given_up(3) and manager.next_load() is None and manager.is_given_up(3)


def test_a_hint_that_comes_true_in_time_or_late() -> None:
    manager = manager_of([2, 2, 2], 4)
    manager.hint([2, 4])
    early, late = manager.next_load(), manager.next_load()
    assert early is not None and late is not None
    finish(manager, early)
    manager.used([2])
    manager.need("a", [4, 5])
    assert manager.urgency(4) is Urgency.DEMAND
    finish(manager, late)
    assert (manager.stats.hint_loads, manager.stats.demand_loads) == (2, 0)


def test_a_hint_that_its_layer_contradicts_is_evicted_before_what_was_used_long_ago() -> None:
    manager = manager_of([3, 3], 3)
    for expert in (0, 1):
        manager.need("a", [expert])
        load = manager.next_load()
        assert load is not None
        finish(manager, load)
        manager.used([expert])
    manager.hint([3])
    load = manager.next_load(Urgency.HINT)
    assert load is not None and load.expert == 3
    finish(manager, load)
    manager.need("a", [4])
    load = manager.next_load()
    assert load is not None and load.victim == 3


def test_a_prediction_ends_with_the_call_that_it_was_for() -> None:
    """Whether its layer had to ask for anything or not: it is neither begun later nor loaded to its end."""
    manager = manager_of([3, 3], 6)
    manager.hint([4, 5, 0])
    begun = manager.next_load(Urgency.HINT)
    assert begun is not None and begun.expert == 4
    manager.used([3])
    assert manager.is_given_up(4)
    manager.failed(4)
    load = manager.next_load(Urgency.HINT)
    assert load is not None and load.expert == 0  # another layer's
    assert manager.next_load(Urgency.HINT) is None
    manager.validate()


def test_wrong_predictions_take_one_place_between_them() -> None:
    """What the first of them took is kept for the next one, and for a demand: free memory is not filled there."""
    manager = manager_of([2, 4], 2)
    fill(manager)
    for wrong in (3, 4):
        manager.hint([wrong])
        load = manager.next_load()
        assert load is not None and load.urgency is Urgency.HINT
        manager.used([5])
        assert manager.is_given_up(wrong)
        manager.failed(wrong)
        assert not manager.wants_to_fill and manager.next_load() is None
        manager.validate()
    assert manager.stats.evictions == 1 and manager.num_resident == 1
    manager.need("a", [5])
    load = manager.next_load()
    assert load is not None and load.victim is None
    assert manager.stats.evictions == 1


def test_a_budget_decides_of_every_prediction_but_where_memory_was_never_used() -> None:
    manager, asked = manager_of([2, 4], 3), []

    def admit(expert: int) -> bool:
        asked.append(expert)
        return expert != 4

    manager.hint([2])
    assert manager.next_load(Urgency.HINT, admit) is not None and not asked
    fill(manager)
    for wrong, is_admitted in ((3, True), (5, True), (4, False)):
        manager.hint([wrong])
        assert (manager.next_load(Urgency.HINT, admit) is not None) == is_admitted
        manager.used([2])
        if is_admitted:
            manager.failed(wrong)
    assert asked == [3, 5, 4]
    manager.validate()


@pytest.mark.parametrize("is_found", [True, False])
def test_what_somebody_will_ask_for_again_is_no_prediction(is_found: bool) -> None:
    """It is loaded whatever other clients' calls of its layer need, also if it was predicted before."""
    manager = manager_of([6], 6)
    manager.hint([3, 4, 5])
    manager.hint([3, 4], is_prediction=False)
    begun = manager.next_load(Urgency.HINT)
    assert begun is not None and begun.expert == 3
    if is_found:
        manager.used([0])
    else:
        manager.need("a", [0])
    assert not manager.is_given_up(3)
    loads = [manager.next_load(), manager.next_load(Urgency.HINT)]
    assert [load.expert for load in loads if load is not None] == ([4] if is_found else [0, 4])
    manager.validate()


def test_a_wish_that_a_demand_fulfilled_is_not_loaded_again_after_its_eviction() -> None:
    manager = manager_of([3], 1)
    manager.hint([1], is_prediction=False)
    for expert in (1, 0):
        manager.need("a", [expert])
        load = manager.next_load()
        assert load is not None and (load.expert, load.urgency) == (expert, Urgency.DEMAND)
        finish(manager, load)
        manager.release("a", [expert])
    assert manager.state(1) is State.ABSENT
    assert manager.next_load(Urgency.HINT) is None


def test_a_given_up_load_that_is_needed_after_all_goes_on() -> None:
    manager = manager_of([4], 2)
    manager.hint([3])
    assert manager.next_load() is not None
    manager.need("a", [0])
    assert manager.is_given_up(3)
    manager.need("b", [3])
    assert not manager.is_given_up(3) and manager.urgency(3) is Urgency.DEMAND
    manager.validate()


def test_what_is_claimed_is_not_evicted_and_what_is_released_is() -> None:
    manager = manager_of([4], 2)
    fill(manager)
    manager.need("a", [0, 1])
    manager.need("b", [2])
    assert manager.next_load() is None
    manager.release("a", [1])
    load = manager.next_load()
    assert load is not None and (load.expert, load.victim) == (2, 1)


def test_a_client_that_is_gone_demands_nothing() -> None:
    manager = manager_of([4], 4)
    manager.need("a", [0, 1])
    manager.need("b", [1])
    manager.drop_client("a")
    load = manager.next_load(Urgency.DEMAND)
    assert load is not None and load.expert == 1
    assert manager.next_load(Urgency.DEMAND) is None


@pytest.mark.parametrize("urgency", ["fill", "hint"])
def test_what_was_given_up_is_filled_in_later(urgency: str) -> None:
    """Where everything fits, everything becomes resident, whatever was cancelled on the way."""
    manager = manager_of([4], 4)
    if urgency == "hint":
        manager.hint([1])
    begun = [manager.next_load() for _ in range(4)]
    assert all(begun)
    if urgency == "fill":
        manager.hint([1])
    manager.need("a", [0])
    for load in begun:
        assert load is not None
        if manager.is_given_up(load.expert):
            manager.failed(load.expert)
        else:
            finish(manager, load)
    fill(manager)
    assert manager.num_resident == 4


def test_an_expert_that_is_needed_while_it_is_evicted_is_loaded_again() -> None:
    manager = manager_of([3], 1)
    fill(manager)
    manager.need("a", [1])
    load = manager.next_load()
    assert load is not None and load.victim == 0
    manager.need("a", [0])  # before readers were told that it is gone
    assert manager.next_load() is None
    finish(manager, load)
    load = manager.next_load()
    assert load is not None and (load.expert, load.victim) == (0, 1)


def test_what_could_not_be_loaded_is_not_tried_again_by_itself() -> None:
    manager = manager_of([2], 2)
    manager.need("a", [0])
    load = manager.next_load()
    assert load is not None and load.expert == 0
    manager.failed(0)
    load = manager.next_load()
    assert load is not None and load.expert == 1
    finish(manager, load)
    assert manager.next_load() is None
    manager.need("a", [0])
    load = manager.next_load()
    assert load is not None and (load.expert, load.urgency) == (0, Urgency.DEMAND)


def test_replicas_come_after_hints_take_a_place_and_give_way_to_demands() -> None:
    manager = manager_of([4, 4], 3)
    manager.replicate([3])
    manager.replicate([7, 6])  # the earlier wish is off
    manager.hint([5])
    assert manager.num_replicas_due == 2
    loads = [manager.next_load(), manager.next_load(may_replicate=False), manager.next_load()]
    assert [(load.expert, load.urgency) for load in loads if load] == [
        (5, Urgency.HINT),
        (0, Urgency.FILL),
        (7, Urgency.REPLICA),
    ]
    for load in loads[:2]:
        assert load is not None
        finish(manager, load)
    manager.need("a", [5, 0])
    manager.need("b", [6])
    assert manager.next_load() is None and manager.is_given_up(7)
    manager.failed(7)
    load = manager.next_load()
    assert load is not None and (load.expert, load.urgency) == (6, Urgency.DEMAND)
    finish(manager, load)
    manager.release("b", [6])
    load = manager.next_load()
    assert load is not None and (load.expert, load.victim, load.urgency) == (7, 6, Urgency.REPLICA)
    finish(manager, load)
    assert manager.stats.replica_loads == 2 and manager.num_replicas_due == 0


# ------------------------------------------------------------------------------------- any events


CHOICES = st.tuples(st.integers(0, 3), st.integers(1, 63))  # a layer, and some of its experts


class Residency(RuleBasedStateMachine):
    """Events of two clients and of a disk that may fail; a model of who holds which slot beside the manager."""

    @initialize(
        sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
        share=st.floats(0, 1),
        policy=st.sampled_from(POLICIES),
    )
    def begin(self, sizes: list[int], share: float, policy: str) -> None:
        self.sizes = sizes
        self.count = sum(sizes)
        self.num_slots = max(1, round(share * self.count))
        self.manager = manager_of(sizes, self.num_slots, policy)
        self.loads: dict[int, Load] = {}  # under way
        self.untold: set[int] = set()  # victims that readers may still find
        self.holders: dict[int, int] = {}  # slot -> expert
        self.claims: dict[str, set[int]] = {"a": set(), "b": set()}
        self.owed: set[int] = set()  # demanded, and neither here nor failed since
        self.failures: set[int] = set()
        self.predicted: set[int] = set()  # for the next call of its layer
        self.certain: set[int] = set()

    def experts(self, data: st.DataObject) -> list[int]:
        """Some of one layer, as a router gives them."""
        return self.chosen(data.draw(CHOICES))

    def chosen(self, choice: tuple[int, int]) -> list[int]:
        layer = choice[0] % len(self.sizes)
        first = sum(self.sizes[:layer])
        return [first + i for i in range(self.sizes[layer]) if choice[1] >> i & 1] or [first]

    @rule(data=st.data(), client=st.sampled_from("ab"))
    def need(self, data: st.DataObject, client: str) -> None:
        experts = self.experts(data)
        self.manager.need(client, experts)
        self.predicted -= self.layer_of(experts)
        self.claims[client] = set(experts)
        self.failures -= set(experts)
        self.owed |= {e for e in experts if self.manager.state(e) in (State.ABSENT, State.EVICTING)}
        self.forget()
        assert not any(self.manager.is_given_up(e) for e in experts)

    @rule(data=st.data(), client=st.sampled_from("ab"))
    def release(self, data: st.DataObject, client: str) -> None:
        experts = self.experts(data)
        self.manager.release(client, experts)
        self.claims[client] -= set(experts)
        self.forget()

    @rule(client=st.sampled_from("ab"))
    def drop(self, client: str) -> None:
        self.manager.drop_client(client)
        self.claims[client] = set()
        self.forget()

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        experts = self.experts(data)
        self.manager.used(experts)
        self.predicted -= self.layer_of(experts)

    @rule(data=st.data(), is_prediction=st.booleans())
    def hint(self, data: st.DataObject, is_prediction: bool) -> None:
        self.predict(self.experts(data), is_prediction)

    @rule(data=st.data())
    def replicate(self, data: st.DataObject) -> None:
        self.manager.replicate(self.experts(data))

    def layer_of(self, experts: list[int]) -> set[int]:
        """All experts of the layer of these."""
        layers = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return set(np.flatnonzero(layers == layers[experts[0]]).tolist())

    def predict(self, experts: list[int], is_prediction: bool = True) -> None:
        new = self.manager.hint(experts, is_prediction=is_prediction)
        (self.predicted if is_prediction else self.certain).update(experts)
        assert set(new) <= set(experts) - self.failures
        assert all(self.manager.state(e) is State.ABSENT for e in new)

    @rule(least=st.sampled_from(Urgency), is_told=st.booleans(), may_replicate=st.booleans())
    def load(self, least: Urgency, is_told: bool, may_replicate: bool) -> None:
        self.start(least, is_told, may_replicate)

    def start(self, least: Urgency, is_told: bool = True, may_replicate: bool = True) -> bool:
        before = {e: self.manager.state(e) for e in range(self.count)}
        waiting = {e for e in self.owed if before[e] is State.ABSENT}
        load = self.manager.next_load(least, may_replicate=may_replicate)
        if load is None:
            return False
        assert may_replicate or load.urgency is not Urgency.REPLICA
        assert load.urgency <= least and before[load.expert] is State.ABSENT
        assert load.urgency is Urgency.DEMAND or not waiting
        assert load.urgency is not Urgency.HINT or load.expert in self.predicted | self.certain
        assert (load.urgency is Urgency.DEMAND) == (load.expert in waiting)
        if load.victim is None:
            assert load.slot not in self.holders
        else:
            assert not self.manager.holds_all
            assert before[load.victim] is State.RESIDENT and self.holders[load.slot] == load.victim
            assert not any(load.victim in claimed for claimed in self.claims.values())
            assert self.manager.state(load.victim) is State.EVICTING
            self.untold.add(load.victim)
        self.holders[load.slot] = load.expert
        self.loads[load.expert] = load
        for waits in (self.owed, self.predicted, self.certain):
            waits.discard(load.expert)
        assert load.expert not in self.failures
        if is_told and load.victim is not None:
            self.tell(load.victim)
        return True

    @precondition(lambda self: self.untold)
    @rule(data=st.data())
    def tell_readers(self, data: st.DataObject) -> None:
        self.tell(data.draw(st.sampled_from(sorted(self.untold))))

    def tell(self, victim: int) -> None:
        self.manager.evicted(victim)
        self.untold.discard(victim)

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), is_good=st.booleans())
    def end(self, data: st.DataObject, is_good: bool) -> None:
        self.end_load(data.draw(st.sampled_from(sorted(self.loads))), is_good)

    def end_load(self, expert: int, is_good: bool) -> None:
        load = self.loads.pop(expert)
        if load.victim in self.untold:  # readers are told before the slot is written
            self.tell(load.victim)  # type: ignore[arg-type]
        if is_good and not self.manager.is_given_up(expert):
            self.manager.loaded(expert)
            assert self.manager.state(expert) is State.RESIDENT
            return
        if not self.manager.is_given_up(expert):
            self.failures.add(expert)
        self.manager.failed(expert)
        del self.holders[load.slot]

    @rule(hints=st.lists(CHOICES, max_size=3))
    def serve_all(self, hints: list[tuple[int, int]]) -> None:
        """Loads come to their ends, clients compute with what is there and release it, hints keep coming:
        everything that was demanded comes, in as many rounds as there are experts demanded.
        """
        for _ in range(3 * self.count + 3):
            for victim in sorted(self.untold):
                self.tell(victim)
            for expert in sorted(self.loads):
                self.end_load(expert, is_good=True)
            for client, claimed in self.claims.items():
                here = {e for e in claimed if self.manager.state(e) is State.RESIDENT}
                self.manager.release(client, here)
                claimed -= here
            self.forget()
            for choice in hints:
                self.predict(self.chosen(choice))
            least = Urgency.FILL if hints else Urgency.DEMAND
            while self.start(least):
                self.manager.validate()
            if not self.owed and not self.loads:
                break
        assert not self.owed

    def forget(self) -> None:
        self.owed &= self.claims["a"] | self.claims["b"]

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.validate()
        assert len(self.holders) <= self.num_slots
        inside = {e for e in range(self.count) if self.manager.state(e) in (State.LOADING, State.RESIDENT)}
        assert inside == set(self.holders.values())
        assert self.manager.num_resident == len(inside) - len(self.loads)
        stats = self.manager.stats
        assert stats.evictions == 0 or not self.manager.holds_all

    def teardown(self) -> None:
        """With nobody asking, what fits becomes resident, but for what the disk refused."""
        if not hasattr(self, "manager"):
            return
        for client in self.claims:
            self.drop(client)
        for _ in range(3 * self.count):
            for expert in sorted(self.loads):
                self.end_load(expert, is_good=True)
            if not self.start(Urgency.FILL):
                break
        assert not self.loads
        if self.manager.holds_all:
            assert self.manager.num_resident == self.count - len(self.failures)


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_any_events_in_any_order(count: int) -> None:
    run_state_machine_as_test(
        Residency,
        settings=settings(
            max_examples=count,
            stateful_step_count=50,
            deadline=None,
            database=None,
            derandomize=count < 1000,
            suppress_health_check=list(HealthCheck),
        ),
    )
