"""Residency as a pure state machine: any events in any order, the accounts checked after each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moray.runtime.residency.manager import Load, ResidencyManager, Urgency
from moray.runtime.residency.policies import make_policy


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
    assert manager.stats.hints_wasted == 1
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
    stats = manager.stats
    assert (stats.hint_loads, stats.hints_used, stats.hints_late, stats.hints_wasted) == (2, 1, 1, 0)


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
