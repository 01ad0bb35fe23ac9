"""Placements: what always holds, and how close to the best they are. Pure."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster.layer_cost import LayerGeometry, TokenCost, Worker, odds_of, symmetric_polynomials
from moray.cluster.live_placement import LivePlacement
from moray.cluster.place import place, replace
from moray.cluster.placement import Heat, HostSpec, Placement, all_keys, deal, heat_of, moved, place_evenly
from moray.cluster.topology import ComputeSpeed, LinkAverage, LinkReport
from moray.runtime.errors import ConfigError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

MB = 1 << 20
COARSE = LayerGeometry(8, 2, 99 * MB, 4352, 16384)  # as Mixtral-8x7B has them, at 4.5 bits
FINE = LayerGeometry(128, 8, 3 * MB, 2176, 8192)
FAST, SLOW = ComputeSpeed(30e9, 300e9), ComputeSpeed(10e9, 100e9)
LAN = LinkReport(2e-4, 117e6)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[LayerGeometry], list[HostSpec], Heat | None]:
    """A few layers of few experts, one to three remote hosts, memory for some or all of them."""
    num_experts, top_k = draw(st.sampled_from([(4, 1), (8, 2), (12, 4)]))
    layer = LayerGeometry(num_experts, top_k, draw(st.sampled_from([MB, 99 * MB])), 4352, 16384)
    layers = draw(st.integers(1, 4)) * [layer]
    speed = st.builds(ComputeSpeed, st.floats(1e9, 50e9), st.just(1e11))
    slots = st.integers(0, num_experts * len(layers))
    hosts = [HostSpec(f"local-{i}", draw(slots), FAST) for i in range(draw(st.integers(1, 2)))]
    link = st.builds(LinkReport, st.floats(5e-5, 5e-3), st.floats(1e7, 1e9))
    hosts += [HostSpec(f"remote-{i}", draw(slots), draw(speed), draw(link)) for i in range(draw(st.integers(1, 3)))]
    heat = draw(st.none() | st.integers(0, 2**32))
    if heat is None:
        return layers, hosts, None
    random = np.random.default_rng(heat)
    return layers, hosts, [random.pareto(1.0, num_experts) for _ in layers]


def primary_counts(placement: Placement, hosts: list[HostSpec]) -> list[int]:
    return [sum(host == spec.host_id for host in placement.primary.values()) for spec in hosts]


@settings(max_examples=60, deadline=None)
@given(clusters())
def test_capacities_hold_and_everything_is_placed_that_fits(
    cluster: tuple[list[LayerGeometry], list[HostSpec], Heat | None],
) -> None:
    layers, hosts, heat = cluster
    made = place(layers, hosts, heat)
    made.validate(layers, hosts)
    room, total = sum(host.num_slots for host in hosts), len(all_keys(layers))
    assert len(made.left_out) == max(0, total - room)
    if heat is not None and made.left_out and made.primary:  # the coldest
        shares = {key: heat[key.layer][key.expert] / heat[key.layer].sum() for key in all_keys(layers)}
        assert max(shares[key] for key in made.left_out) <= min(shares[key] for key in made.primary) + 1e-6
    assert place(layers, hosts, heat) == made
    # Memory is full, or holds everything that is placed.
    held = {host.host_id: {*made.assigned(host.host_id)} for host in hosts}
    here = {key for host in hosts if not host.link for key in held[host.host_id]}
    for host in hosts:
        assert len(held[host.host_id]) == host.num_slots or (held[host.host_id] if host.link else here) == {
            *made.primary
        }


@settings(max_examples=40, deadline=None)
@given(clusters(), st.data())
def test_after_a_host_came_or_went_little_is_moved(
    cluster: tuple[list[LayerGeometry], list[HostSpec], Heat | None], data: st.DataObject
) -> None:
    layers, hosts, heat = cluster
    changing = data.draw(st.sampled_from([host for host in hosts if host.link]))
    others = [host for host in hosts if host != changing]
    every, without = place(layers, hosts, heat), place(layers, others, heat)

    after_loss = replace(every, layers, others, heat)
    after_loss.validate(layers, others)
    room = sum(host.num_slots for host in others)
    assert len(after_loss.left_out) == max(0, len(all_keys(layers)) - room)
    for key, host in every.primary.items():
        if host != changing.host_id:  # what did not have to change did not
            assert after_loss.primary[key] == host
        elif key in after_loss.primary:  # a replica took over, if there was one on a host that had room for it
            able = [host for host in others if host.host_id in every.hosts_of(key)]
            full = [host for host in able if primary_counts(after_loss, [host])[0] == host.num_slots]
            assert not able or after_loss.primary[key] in every.hosts_of(key) or full == able

    after_join = replace(without, layers, hosts, heat)
    after_join.validate(layers, hosts)
    assert len(after_join.left_out) == max(0, len(all_keys(layers)) - sum(host.num_slots for host in hosts))
    for key, host in without.primary.items():
        assert after_join.primary[key] in (host, changing.host_id)
    # A new host gets what nobody had, and at most what a placement from the beginning would give it.
    fresh = primary_counts(place(layers, hosts), [changing])[0]
    assert primary_counts(after_join, [changing])[0] <= max(fresh, len(without.left_out)) + len(layers)
    assert replace(after_join, layers, hosts, heat).primary == after_join.primary  # nothing to do any more
    assert not moved(after_join, after_join)


def expected_s(layer: LayerGeometry, workers: list[Worker], heat: np.ndarray, assignment: tuple[int, ...]) -> float:
    odds, where = odds_of(heat, layer.top_k), np.array(assignment)
    return TokenCost(layer, workers).expected_s([odds[where == worker] for worker in range(len(workers))])


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32), st.floats(0.2, 1.0), st.floats(1e-5, 2e-3), st.integers(2, 8), st.integers(0, 8),
    st.booleans(),
)  # fmt: skip
def test_one_layer_is_placed_nearly_as_well_as_can_be(
    seed: int, slower: float, latency_s: float, here: int, there: int, is_even: bool
) -> None:
    """Against every possible assignment of 6 experts to two workers."""
    layer = LayerGeometry(6, 2, 20 * MB, 4352, 16384)
    here, there = max(here, 6 - there), there
    heat = np.ones(6) if is_even else np.random.default_rng(seed).pareto(1.5, 6) + 0.05
    link, speed = LinkReport(latency_s, 117e6), ComputeSpeed(30e9 * slower, 1e11)
    hosts = [HostSpec("local", here, FAST), HostSpec("remote", there, speed, link)]
    made = place([layer], hosts, [heat])
    chosen = tuple(int(made.primary[ExpertKey(0, expert)] == "remote") for expert in range(6))
    workers = [Worker(FAST), Worker(speed, link)]
    possible = [a for a in product((0, 1), repeat=6) if a.count(0) <= here and a.count(1) <= there]
    best = min(expected_s(layer, workers, heat, a) for a in possible)
    assert expected_s(layer, workers, heat, chosen) <= 1.03 * best


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.1, 2.0))
def test_hot_experts_are_balanced(seed: int, skew: float) -> None:
    """Two equal machines with room to choose: as even as the hottest experts allow."""
    heat = np.random.default_rng(seed).pareto(skew, FINE.num_experts) + 0.01
    slow = ComputeSpeed(3e9, 30e9)  # what a request costs by itself is little beside the kernels
    hosts = [HostSpec("a", 100, slow), HostSpec("b", 100, slow, LinkReport(1e-5, 1e10))]
    made = place([FINE], hosts, [heat])
    loads = [sum(heat[k.expert] for k, host in made.primary.items() if host == spec.host_id) for spec in hosts]
    assert abs(loads[0] - loads[1]) <= heat.max() + 0.1 * heat.sum()  # a link costs, so less is remote


def test_speed_and_memory_decide_the_split() -> None:
    def remote(layer: LayerGeometry, here: int, there: int, speed: ComputeSpeed, link: LinkReport = LAN) -> int:
        hosts = [HostSpec("a", here, FAST), HostSpec("b", there, speed, link)]
        return primary_counts(place(8 * [layer], hosts), hosts)[1]

    assert 0 < remote(COARSE, 64, 64, FAST) <= 32  # both compute beside each other
    assert remote(COARSE, 64, 64, SLOW) == 0  # two of eight experts: waiting for the slow one takes longer
    assert remote(FINE, 1024, 1024, SLOW) < remote(FINE, 1024, 1024, FAST) < 512
    assert remote(COARSE, 16, 64, SLOW) == 48  # memory has the last word
    assert remote(COARSE, 64, 64, FAST, LinkReport(0.5, LAN.bytes_per_s)) == 0  # a link to the moon


def test_what_the_disk_here_lacks_is_placed_first_and_twice() -> None:
    layers = 2 * [COARSE]
    lacking = [ExpertKey(1, expert) for expert in range(4)]
    hosts = [HostSpec("a", 6, FAST), HostSpec("b", 6, SLOW, LAN)]
    heat = [np.ones(8), np.array([1e-3] * 4 + [1.0] * 4)]
    made = place(layers, hosts, heat, lacking)
    made.validate(layers, hosts)
    assert set(lacking) <= made.primary.keys() and len(made.left_out) == 4
    assert not any(made.primary[key] == "a" for key in lacking)  # they are used least
    third = [HostSpec("a", 8, FAST), HostSpec("b", 6, SLOW, LAN), HostSpec("c", 6, SLOW, LAN)]
    assert set(place(layers, third, heat, lacking).replicas) >= set(lacking)  # before hotter ones
    with pytest.raises(ConfigError, match=r"4 experts are missing on the compute node's disk, .* memory for 2; "):
        place(layers, [HostSpec("a", 1, FAST), HostSpec("b", 1, SLOW, LAN)], heat, lacking)
    with pytest.raises(ConfigError, match="no host is on the compute node"):
        place(layers, hosts[1:])


def test_hosts_of_one_node_are_dealt_to_in_turn() -> None:
    layers = 3 * [LayerGeometry(5, 2, MB, 100, 100)]
    hosts = [HostSpec(f"host-{index}", 15, FAST) for index in range(4)]
    made = place(layers, hosts)
    assert {host.host_id: made.assigned(host.host_id) for host in hosts} == deal(
        all_keys(layers), {host.host_id: 15 for host in hosts}
    )
    assert deal(all_keys(layers)[:6], {"a": 1, "b": 4, "c": 0, "d": 9})["d"] == [(0, 2), (0, 4)]


def test_the_number_chosen_at_a_worker_is_distributed_as_draws_are() -> None:
    """Even odds are a hypergeometric distribution; all makespans are weighted by it."""
    assert symmetric_polynomials(np.ones(5), 3).tolist() == [1, 5, 10, 10]
    workers = [Worker(FAST), Worker(SLOW, LAN)]
    cost = TokenCost(COARSE, workers)
    here, there = cost.tables
    chances = {0: 6 / 28, 1: 16 / 28, 2: 6 / 28}  # of 2 of 8 experts, so many of the 4 that are remote
    by_hand = sum(chance * max(here[2 - n], there[n]) for n, chance in chances.items())
    assert cost.expected_even_s((4, 4)) == pytest.approx(by_hand)
    assert cost.expected_s([np.ones(4), np.ones(4)]) == pytest.approx(by_hand)
    assert there[1] > LAN.latency_s + 99 * MB / SLOW.bytes_per_s  # the request and the computing, one after the other


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.lists(st.integers(0, 60), min_size=1, max_size=3))
def test_a_running_engine_places_by_the_same_rule(demo: Store, local: list[int], remote: list[int]) -> None:
    """Hosts of the compute node keep to their own experts; what is placed, when nodes come and go, is place.py's."""
    slots = {f"host-{i}": count for i, count in enumerate(local)}
    hosts = [HostSpec(f"host-{chr(97 + i)}", count, SLOW, LAN) for i, count in enumerate(remote)]
    owned, every = place_evenly(demo.manifest, [*slots]), set(demo.manifest.shards)
    live = LivePlacement(demo, slots)

    def check(used: list[HostSpec]) -> None:
        held = {host_id: live.assigned(host_id) for host_id in (*slots, *(host.host_id for host in used))}
        for host_id, count in slots.items():  # no memory is left empty
            assert {*held[host_id]} <= {*owned[host_id]} and len({*held[host_id]}) == len(held[host_id])
            assert len(held[host_id]) == min(count, len(owned[host_id]))
        assert all(len(held[host.host_id]) <= host.num_slots for host in used)
        if len(slots) == 1:
            room = sum(slots.values()) + sum(host.num_slots for host in used)
            assert len({key for keys in held.values() for key in keys}) == min(room, len(every))

    check([])
    alone = [live.assigned(host_id) for host_id in slots]
    live.replace(FAST, hosts)
    check(hosts)
    if len(slots) == 1:  # only what another has now is not kept
        taken = {*alone[0]} - {*live.assigned("host-0")}
        assert taken <= {key for host in hosts for key in live.assigned(host.host_id)}
    live.replace(FAST, [])
    check([])
    live.place(FAST, hosts)
    check(hosts)


def test_heat_is_what_was_recorded() -> None:
    heat = heat_of([[0, 1, 2], [1, 0], [0, 2, 3]], [4, 2])
    assert [each.tolist() for each in heat] == [[1, 2, 3, 2], [2, 1]]


def test_a_link_follows_its_traffic() -> None:
    """From a wrong report to the true latency and bandwidth, through messages of all sizes."""
    average, true = LinkAverage(LinkReport(1e-3, 1e7)), LinkReport(2e-4, 1e8)
    random = np.random.default_rng(0)
    for size in random.choice([100, 2000, 20_000, 200_000, 5_000_000], 2000).tolist():
        average.observe(size, true.rate.seconds(size, 0) * random.uniform(0.9, 1.1))
    assert average.report.latency_s == pytest.approx(true.latency_s, rel=0.15)
    assert average.report.bytes_per_s == pytest.approx(true.bytes_per_s, rel=0.15)
    before = average.report
    average.observe(100, 60.0)  # a process that was stopped
    assert average.report.latency_s < 1.5 * before.latency_s
