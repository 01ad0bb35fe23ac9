"""Prices of lanes, the choice between them, and how rates follow what is measured."""

from __future__ import annotations

from itertools import product
from threading import Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.runtime.errors import ConfigError
from moray.runtime.lanes.calibrate import calibrate
from moray.runtime.lanes.cost import Assignment, Work, choose, predict_s
from moray.runtime.lanes.lane import BUS, Lane, Resource, network, parse_lanes, remote_cpu
from moray.runtime.lanes.rates import Rate, Rates

MB = 1_000_000
HIT, COPY, CPU, DISK = Lane.DEVICE_HIT, Lane.DEVICE_COPY, Lane.HOST_CPU, Lane.DISK_LOAD
COMPUTE = Lane.REMOTE_COMPUTE
KEEPING = (COPY, DISK)


def rates_of(
    cpu: float = 70.0,
    link: float = 56.0,
    cpu_together: float = 70.0,
    link_together: float = 37.0,
    device: float = 500.0,
) -> Rates:
    """GB/s; by default those of a machine whose CPU and copies share a memory bus (facts: 70 and 56, or 70 and 37)."""
    rates = Rates(num_remotes=2, token_bytes=8192)
    for resource, alone, together in (
        (Resource.CPU, cpu, cpu_together),
        (Resource.LINK, link, link_together),
        (Resource.DEVICE, device, device),
        (Resource.DISK, 2.0, 2.0),
    ):
        token_s = 0.0 if resource in (Resource.LINK, Resource.DISK) else 1e-6
        rates.seed(resource, Rate(0.0, 1e-9 / alone, token_s), Rate(0.0, 1e-9 / together, token_s))
    rates.validate()
    return rates


# ------------------------------------------------------------- brute force, from the definition alone


def stages(lane: Lane, remote: int) -> tuple[int | None, int]:
    """Feeder and worker."""
    return {
        HIT: (None, Resource.DEVICE),
        COPY: (Resource.LINK, Resource.DEVICE),
        CPU: (None, Resource.CPU),
        DISK: (Resource.DISK, Resource.CPU),
        COMPUTE: (None, remote_cpu(remote)),
    }[lane]


def price(item: Work, lane: Lane, remote: int, rates: Rates, company: bool) -> tuple[float, float]:
    """Seconds of feeder and worker."""
    table = rates.together if company else rates.alone
    feeder, worker = stages(lane, remote)
    work_s = table[worker].seconds(item.num_bytes, item.tokens)
    if lane == COMPUTE:
        work_s += 2 * item.tokens * rates.token_bytes * table[network(remote)].byte_s
    return table[feeder].seconds(item.num_bytes, 0) if feeder is not None else 0.0, work_s


def choices(item: Work) -> list[tuple[Lane, int]]:
    return [(lane, remote) for lane in item.lanes for remote in (item.remotes if lane >= COMPUTE else (-1,))]


def counted_feed_s(item: Work, choice: tuple[Lane, int], rates: Rates, company: bool) -> float:
    """The feeder's seconds less what uses to come repay, at most half; reuse rounded down to a power of two."""
    feed_s, _ = price(item, *choice, rates, company)
    if choice[0] not in KEEPING or item.reuse <= 0 or len(choices(item)) < 2:
        return feed_s
    reuse = 0.0
    for exponent in range(-4, 4):
        reuse = 2.0**exponent if item.reuse >= 2.0**exponent else reuse
    others = [c for c in choices(item) if c[0] not in KEEPING] or choices(item)
    saved = min(sum(price(item, *c, rates, False)) for c in others) - price(item, *choice, rates, False)[1]
    return feed_s - min(max(0.0, reuse * saved), 0.5 * feed_s)


def makespan(work: list[Work], picks: list[tuple[Lane, int]], rates: Rates, discount: bool = True) -> float:
    used = {r for pick in picks for r in stages(*pick) if r in BUS}
    company = len(used) > 1
    loads: dict[int, float] = {}
    for item, pick in zip(work, picks, strict=True):
        feeder, worker = stages(*pick)
        feed_s, work_s = price(item, *pick, rates, company)
        loads[worker] = loads.get(worker, 0.0) + work_s
        if feeder is not None:
            loads[feeder] = loads.get(feeder, 0.0) + (
                counted_feed_s(item, pick, rates, company) if discount else feed_s
            )
    ends = [0.0]
    for resource, load in loads.items():
        fed = [
            price(item, *choice, rates, company)[1]
            for item in work
            for choice in choices(item)
            if stages(*choice)[0] == resource
        ]
        round_trips = [rates.alone[network(remote)].fixed_s for remote in (0, 1) if resource == remote_cpu(remote)]
        ends.append(load + min(fed, default=0.0) + sum(round_trips))
    return max(ends)


def best(work: list[Work], rates: Rates) -> float:
    return min(makespan(work, list(picks), rates) for picks in product(*[choices(item) for item in work]))


def found(work: list[Work], rates: Rates) -> float:
    assignment = choose(work, rates)
    return makespan(work, list(zip(assignment.lanes, assignment.remotes, strict=True)), rates)


# ------------------------------------------------------------------------------------- the choice

LANES = st.sampled_from([(HIT, CPU), (COPY, CPU), (COPY, CPU), (HIT,), (CPU,), (DISK,), (COPY,)])
REMOTE_LANES = st.sampled_from([(COPY, CPU), (DISK, COMPUTE), (CPU, COMPUTE), (COMPUTE,)])
GB_S = st.floats(1.0, 100.0)


@st.composite
def random_rates(draw: st.DrawFn) -> Rates:
    slower = st.floats(0.4, 1.0)
    cpu, link = draw(GB_S), draw(GB_S)
    return rates_of(cpu, link, cpu * draw(slower), link * draw(slower), 10 * draw(GB_S))


def works(lanes: st.SearchStrategy[tuple[Lane, ...]], most: int) -> st.SearchStrategy[list[Work]]:
    item = st.builds(
        Work,
        expert=st.integers(0, 999),
        tokens=st.sampled_from([1, 1, 1, 2, 7, 64]),
        num_bytes=st.sampled_from([99 * MB, 99 * MB, 25 * MB]),
        lanes=lanes,
        reuse=st.sampled_from([0.0, 0.0, 0.1, 0.7, 3.0, 100.0]),
        remotes=st.sampled_from([(0,), (0, 1)]),
    )
    return st.lists(item, min_size=1, max_size=most)


@settings(deadline=None, max_examples=150)
@given(works(LANES, 5), random_rates())
def test_of_few_experts_the_choice_is_the_best_there_is(work: list[Work], rates: Rates) -> None:
    assert found(work, rates) == pytest.approx(best(work, rates), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(works(REMOTE_LANES, 3), random_rates())
def test_remote_lanes_are_chosen_by_the_same_rule(work: list[Work], rates: Rates) -> None:
    assert found(work, rates) == pytest.approx(best(work, rates), rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(works(LANES, 10), random_rates())
def test_of_more_experts_the_choice_is_near_the_best(work: list[Work], rates: Rates) -> None:
    least = best(work, rates)
    assert least * (1 - 1e-9) <= found(work, rates) <= (1 + 1e-9 if len(work) <= 8 else 1.5) * least


@settings(deadline=None, max_examples=60)
@given(works(LANES, 8), random_rates())
def test_predictions_are_makespans_without_discounts(work: list[Work], rates: Rates) -> None:
    assignment = choose(work, rates)
    picks = list(zip(assignment.lanes, assignment.remotes, strict=True))
    assert predict_s(work, assignment, rates) == pytest.approx(makespan(work, picks, rates, discount=False))


@settings(deadline=None, max_examples=30)
@given(works(LANES, 8), random_rates())
def test_an_answer_that_is_remembered_is_the_one_that_was_found(work: list[Work], rates: Rates) -> None:
    first = choose(work, rates)
    assert rates.choices or all(len(item.lanes) == 1 for item in work)
    assert choose(work, rates) == first
    rates.choices.clear()
    assert choose(work, rates) == first


def test_equal_experts_are_exact_at_any_number() -> None:
    work = [Work(i, 1, 25 * MB, (COPY, CPU)) for i in range(12)]
    rates = rates_of(cpu=40, link=20, cpu_together=30, link_together=15)
    counts = [makespan(work, n * [(COPY, -1)] + (12 - n) * [(CPU, -1)], rates) for n in range(13)]
    assert found(work, rates) == pytest.approx(min(counts))
    assert 0 < choose(work, rates).lanes.count(COPY) < 6  # the CPU is twice as fast


def test_lanes_that_work_beside_each_other_share_by_makespan_and_not_by_sum() -> None:
    """The sum would put all on the CPU; the link would stand still."""
    lanes = choose([Work(i, 1, 99 * MB, (COPY, CPU)) for i in range(8)], rates_of()).lanes
    assert 2 <= lanes.count(COPY) <= 4


def test_a_bus_that_gains_nothing_from_company_is_left_to_one() -> None:
    """Copies that take from the CPU exactly what they carry themselves: all stays on the CPU."""
    rates = rates_of(cpu=60, link=30, cpu_together=30, link_together=20)
    assignment = choose([Work(i, 1, 99 * MB, (COPY, CPU)) for i in range(2)], rates)
    assert assignment.lanes == (CPU, CPU)


def test_one_lane_each_asks_for_no_prices() -> None:
    rates = rates_of()
    work = [Work(0, 1, MB, (HIT,)), Work(1, 1, MB, (CPU,)), Work(2, 1, MB, (COMPUTE,), remotes=(1,))]
    assert choose(work, rates) == Assignment((HIT, CPU, COMPUTE), (-1, -1, 1))
    assert choose([], rates) == Assignment((), ())
    assert not rates.choices


def test_what_will_be_used_again_is_worth_a_copy() -> None:
    rates = rates_of(cpu=60, link=45, cpu_together=60, link_together=45)
    work = [Work(0, 1, 99 * MB, (COPY, CPU))]
    assert choose(work, rates).lanes == (CPU,)
    assert choose([work[0]._replace(reuse=0.1)], rates).lanes == (CPU,)
    assert choose([work[0]._replace(reuse=8.0)], rates) == Assignment((COPY,), (-1,))
    slow = rates_of(cpu=60, link=5, cpu_together=60, link_together=5)
    assert choose([work[0]._replace(reuse=1000.0)], slow).lanes == (CPU,)  # an investment is at most half of a cost


def test_without_a_copy_the_most_used_miss_warms_the_cache() -> None:
    rates = rates_of(link=1.0, link_together=1.0)
    work = [Work(i, 1, 99 * MB, (COPY, CPU), reuse) for i, reuse in enumerate((0.0, 0.2, 0.9, 0.3))]
    assert choose(work, rates) == Assignment((CPU,) * 4, (-1,) * 4, warm=2)
    assert choose([item._replace(reuse=0.0) for item in work], rates).warm == -1
    assert choose([Work(0, 1, MB, (HIT,), 5.0)], rates).warm == -1
    slow_device = rates_of(link=1.0, link_together=1.0, device=20)
    assert choose(work, slow_device).warm == -1
    copied = choose([Work(0, 1, MB, (COPY,)), *work], rates)
    assert copied.lanes[0] is COPY and copied.warm == -1


def test_equal_hosts_share_the_work() -> None:
    rates = rates_of()
    two = choose([Work(i, 1, 99 * MB, (COMPUTE,), remotes=(0, 1)) for i in range(4)], rates)
    assert sorted(two.remotes) == [0, 0, 1, 1]


def test_lanes_are_parsed() -> None:
    assert [parse_lanes(text) for text in ("auto", "device-copy", "host-cpu")] == [None, COPY, CPU]
    with pytest.raises(ConfigError, match=r"lanes is 'gpu'; use auto, device-copy or host-cpu"):
        parse_lanes("gpu")


# ------------------------------------------------------------------------------------------ rates


def test_rates_find_the_cost_of_bytes_and_of_tokens() -> None:
    """From a mix of small and large batches, each a little off."""
    rates, true = Rates(), Rate(0.0, 1 / 20e9, 5e-6)
    for i in range(2000):
        tokens = (1, 8, 64, 300)[i % 4]
        noise = 1 + 0.05 * (-1) ** (i // 4)
        rates.observe(Resource.CPU, 99 * MB, tokens, noise * true.seconds(99 * MB, tokens), concurrent=False)
        rates.validate()
    for tokens in (1, 30, 300):
        assert rates.alone[Resource.CPU].seconds(99 * MB, tokens) == pytest.approx(
            true.seconds(99 * MB, tokens), rel=0.1
        )
    shown = rates.snapshot()["cpu"]
    assert shown.bytes_per_s == pytest.approx(20e9, rel=0.1) and shown.token_us == pytest.approx(5, rel=0.1)
    assert shown.num_observations == 2000 and rates.snapshot()["disk"].num_observations == 0


def test_the_first_observation_replaces_the_guess_and_a_stop_of_minutes_changes_little() -> None:
    rates = Rates()
    rates.observe(Resource.LINK, 100 * MB, 0, 0.02, concurrent=True)
    assert rates.alone[Resource.LINK].seconds(100 * MB, 0) == pytest.approx(0.02)
    assert rates.together[Resource.LINK] == rates.alone[Resource.LINK]
    for _ in range(50):
        rates.observe(Resource.LINK, 100 * MB, 0, 0.02, concurrent=False)
    rates.observe(Resource.LINK, 100 * MB, 0, 300.0, concurrent=False)
    rates.observe(Resource.LINK, 100 * MB, 0, 0.0, concurrent=False)  # a clock that stands still says nothing
    assert rates.alone[Resource.LINK].seconds(100 * MB, 0) < 0.024


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 10**8), st.integers(0, 4096), st.floats(1e-9, 1e3), st.booleans()),
        max_size=60,
    )
)
def test_rates_stay_sound_whatever_is_observed(observations: list[tuple[int, int, int, float, bool]]) -> None:
    rates = Rates(num_remotes=2)
    for resource, num_bytes, tokens, seconds, concurrent in observations:
        rates.observe(resource, num_bytes, tokens, seconds, concurrent)
        rates.validate()
    assert len(rates.snapshot().resources) == rates.num_resources == 8


def test_choices_follow_rates_that_move_and_not_their_jitter() -> None:
    rates = rates_of(cpu=60, link=30, cpu_together=60, link_together=30)
    work = [Work(0, 1, 99 * MB, (COPY, CPU))]
    assert choose(work, rates).lanes == (CPU,)
    for i in range(20):
        rates.observe(Resource.CPU, 99 * MB, 1, 99e6 / 60e9 * (1 + 0.02 * (-1) ** i), concurrent=False)
    assert rates.choices, "forgotten for jitter"
    for _ in range(100):
        rates.observe(Resource.CPU, 99 * MB, 1, 99e6 / 5e9, concurrent=False)
    assert choose(work, rates).lanes == (COPY,)


# ------------------------------------------------------------------------------------ calibration


class Bus:
    """A machine on a manual clock whose loads take twice as long while they are not alone."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_running = 0
        self.lock = Lock()

    def load(self, tokens: int, seconds: float) -> int:
        with self.lock:
            self.now_s += (seconds + tokens * 1e-4) * (2 if self.num_running > 1 else 1)
        return 10 * MB

    def clock(self) -> float:
        return self.now_s


def test_calibration_tells_bytes_from_tokens() -> None:
    bus, rates = Bus(), Rates()
    calibrate(rates, {Resource.CPU: lambda tokens: bus.load(tokens, 0.002)}, 0.05, bus.clock)
    rate = rates.alone[Resource.CPU]
    assert rate.byte_s * 10 * MB == pytest.approx(0.002) and rate.token_s == pytest.approx(1e-4)
    assert rates.together[Resource.CPU] == rate
    rates.validate()


def test_calibration_loads_all_resources_at_once() -> None:
    """Both wait for each other in every piece of the second part: it ends only if they run together."""
    bus, rates, calls = Bus(), Rates(), {Resource.CPU: 0, Resource.LINK: 0}
    seen_together = []

    def load(resource: Resource, seconds: float) -> int:
        calls[resource] += 1
        with bus.lock:
            bus.num_running += 1
        moved = bus.load(0, seconds)
        seen_together.append(bus.num_running)
        with bus.lock:
            bus.num_running -= 1
        return moved

    calibrate(
        rates,
        {
            Resource.CPU: lambda tokens: load(Resource.CPU, 0.002),
            Resource.LINK: lambda tokens: load(Resource.LINK, 0.004),
        },
        0.05,
        bus.clock,
    )
    assert min(calls.values()) >= 3 and seen_together
    assert rates.alone[Resource.LINK].seconds(10 * MB, 0) == pytest.approx(0.004, rel=0.01)
    assert rates.together[Resource.LINK].byte_s >= rates.alone[Resource.LINK].byte_s
    rates.validate()


def test_a_load_that_fails_ends_the_calibration_with_its_error() -> None:
    calls = []

    def fail(tokens: int) -> int:
        calls.append(tokens)
        if len(calls) > 2:
            raise OSError("read error")
        return MB

    with pytest.raises(OSError, match="read error"):
        calibrate(Rates(), {Resource.CPU: lambda tokens: MB, Resource.DISK: fail}, 0.0)
