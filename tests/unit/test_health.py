"""Decisions about remote hosts: deadlines and states by a manual clock, places, requests and key files."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.health import CAP_S, FLOOR_S, HostHealth, HostState, LinkRate, Probe
from moray.cluster.keys import Admission, KeyPair, read_keys, write_keys
from moray.runtime.errors import ConfigError
from moray.runtime.lanes.lane import Lane, Resource, network, remote_cpu
from moray.runtime.lanes.places import HERE, choose_places, split_work
from moray.runtime.lanes.rates import Rate, Rates

HEAD = "moray data plane keys\n"


def up(now: float = 0.0) -> HostHealth:
    health = HostHealth(now)
    assert health.state is HostState.DOWN and health.probe(now) is Probe.HELLO
    health.joined(now)
    return health


def test_deadlines_follow_what_was_measured() -> None:
    health = up()
    assert health.deadline_s(1e-3) == CAP_S  # nothing is known yet
    for _ in range(50):
        health.answered(1.0, 1e-3, 1.2e-3)
    assert health.deadline_s(1e-3) == FLOOR_S
    assert health.deadline_s(0.1) == pytest.approx(0.2, rel=0.05)
    health.answered(1.0, 1e-3, 0.2)  # one answer came late: more patience for a while
    patient = health.deadline_s(1e-3)
    assert FLOOR_S < patient < CAP_S
    for _ in range(50):
        health.answered(1.0, 1e-3, 1e-3)
    assert health.deadline_s(1e-3) == FLOOR_S < patient


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=30), st.floats(0, 1e6))
def test_a_deadline_has_its_limits(answers: list[tuple[float, float]], expected_s: float) -> None:
    health = up()
    for pair in answers:
        health.answered(0.0, *pair)
    assert FLOOR_S <= health.deadline_s(expected_s) <= CAP_S


def test_a_suspected_host_is_pinged_and_taken_back() -> None:
    health = up()
    health.missed(1.0)
    assert health.state is HostState.SUSPECTED and health.probe(1.0) is Probe.PING
    assert health.probe(1.01) is None  # not all the time
    health.heard(1.02)
    assert health.state is HostState.UP
    health.missed(2.0)  # again: not trusted at once
    health.heard(2.01)
    assert health.state is HostState.SUSPECTED
    health.heard(2.2)
    assert health.state is HostState.UP
    waits = []
    for start in (10.0, 100.0, 200.0, 300.0):
        health.missed(start)
        now = start
        while health.state is HostState.SUSPECTED:
            health.heard(now := now + 0.01)
        waits.append(now - start)
    assert waits == sorted(waits) and waits[-1] > 2 * waits[0]
    for _ in range(60):
        health.answered(400.0, 1e-3, 1e-3)
    health.missed(500.0)
    health.heard(500.02)
    assert health.state is HostState.UP


def test_a_host_whose_answers_all_come_too_late_delays_a_token_once() -> None:
    """Twelve layers, each 10 ms without it; what it is asked comes a second later."""
    health, now, late = up(), 0.0, []
    for _ in range(12):
        for answer_s in [at for at in late if at <= now]:
            health.heard(answer_s)
        if health.state is HostState.UP:
            late.append(now + 1.0)
            waited_s = health.deadline_s(0.1)
            now += waited_s
            health.missed(now, waited_s)
        now += 0.01
        health.heard(now)  # a ping's answer
    assert now < CAP_S + 12 * 0.01 + 1e-6
    health.heard(now + 3 * CAP_S)
    assert health.state is HostState.UP


def test_a_silent_host_must_introduce_itself_and_is_asked_less_and_less() -> None:
    health = up()
    health.missed(1.0)
    probes = [(now, probe) for i in range(6000) if (probe := health.probe(now := 1 + i / 100)) is not None]
    assert health.state is HostState.DOWN
    assert probes[0][1] is Probe.PING and probes[-1][1] is Probe.HELLO
    gaps = [b[0] - a[0] for a, b in pairwise(probes)]
    assert max(gaps) <= 2.1 and len(probes) < 50
    health.heard(70.0)
    assert health.state is HostState.DOWN  # words are not enough
    health.joined(71.0)
    assert health.state is HostState.UP and health.probe(71.5) is None and health.probe(72.1) is Probe.PING


def test_a_link_is_measured_by_what_goes_over_it() -> None:
    link = LinkRate()
    for _ in range(100):
        link.observe(4000, 2e-4)
        link.observe(10**6, 2e-4 + 8e-3)
    assert link.round_trip_s == pytest.approx(2e-4) and 1 / link.byte_s == pytest.approx(125e6)
    assert link.seconds(10**6) == pytest.approx(8.2e-3)


def test_replies_that_nobody_waited_for_make_a_link_quicker_down_to_what_was_seen() -> None:
    link = LinkRate()
    link.observe(4000, 3e-4)
    for _ in range(50):
        link.observe(4000, 2e-3)  # stalls
    slow = link.round_trip_s
    link.observe_early(10**6, 5e-3)
    assert link.round_trip_s == slow  # its bytes took most of that
    link.observe_early(4000, 5e-3)
    assert 0.9 * slow < link.round_trip_s < slow
    for _ in range(300):
        link.observe_early(4000, 5e-3)
    assert link.round_trip_s == pytest.approx(3e-4, rel=1e-3)
    link.observe_early(4000, 1e-3)
    assert link.round_trip_s >= 3e-4
    for _ in range(50):
        link.observe(4000, 2e-3)
    assert link.round_trip_s > 1.9e-3


@pytest.mark.parametrize("is_awaited", [True, False])
def test_a_link_that_stood_still_while_it_was_measured_is_not_slow_for_ever(is_awaited: bool) -> None:
    link = LinkRate()
    link.observe(4000, 3e-4)
    link.observe(10**5, 2.0)
    assert link.seconds(20_000) > 0.3
    for _ in range(100):  # all that is sent from now on is small
        (link.observe if is_awaited else link.observe_early)(20_000, 2e-3)
    assert link.seconds(20_000) < 5e-3


# ---------------------------------------------------------------------------------------- places


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.sets(st.integers(0, 2))), min_size=1, max_size=12),
    st.sampled_from([None, Lane.HOST_CPU, Lane.REMOTE_COMPUTE]),
)
def test_an_expert_goes_only_where_it_is(work: list[tuple[int, bool, set[int]]], forced: Lane | None) -> None:
    rates = Rates()
    assert [rates.add_remote() for _ in range(3)] == [0, 1, 2]
    rates.validate()
    tokens, is_here, offers = [w[0] for w in work], [w[1] for w in work], [tuple(sorted(w[2])) for w in work]
    places = choose_places(tokens, is_here, offers, 2 << 20, rates, forced)
    for place, hosts in zip(places, offers, strict=True):
        assert place == HERE or place in hosts
        if forced is Lane.HOST_CPU or not hosts:
            assert place == HERE
        elif forced is Lane.REMOTE_COMPUTE:
            assert place in hosts


def test_what_the_disk_would_take_longer_for_is_computed_elsewhere() -> None:
    rates = Rates()
    rates.add_remote()
    places = choose_places([1, 1, 1, 1], [True, True, False, False], [(), (), (0,), (0,)], 25 << 20, rates)
    assert places == [HERE, HERE, 0, 0]
    # What the disk takes of memory must be read again: a host that is a little slower than the disk still computes.
    rates.seed(Resource.DISK, disk := Rate(0.0, 1 / 2e9, 0.0), disk)
    for host, place in ((Rate(0.0, 1 / 1.2e9, 0.0), 0), (Rate(0.0, 1 / 0.8e9, 0.0), HERE)):
        rates.seed(remote_cpu(0), host, host)
        assert choose_places([1], [False], [(0,)], 25 << 20, rates) == [place]


def test_what_is_in_memory_here_goes_away_only_for_a_clear_gain() -> None:
    rates, free = Rates(), Rate(0.0, 1e-15, 0.0)
    rates.add_remote()
    rates.seed(network(0), free, free)
    rates.seed(Resource.CPU, here := Rate(0.0, 1 / 10e9, 0.0), here)
    question = ([1, 1], [True, True], [(0,), ()], 10 << 20, rates)  # 2.1 ms here; elsewhere, one of them beside 1.05
    for there_s, places in ((1.0e-3, [0, HERE]), (1.8e-3, [0, HERE]), (2.0e-3, [HERE, HERE]), (3e-3, [HERE, HERE])):
        there = Rate(0.0, there_s / (10 << 20), 0.0)
        rates.seed(remote_cpu(0), there, there)
        for _ in range(2):
            assert choose_places(*question) == places


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=10), st.floats(0, 0.1), st.floats(0, 0.1), st.floats(1e-6, 0.1)
)
def test_requests_are_cut_to_size_and_lose_nothing(
    counts: list[int], fixed_s: float, expert_s: float, pair_s: float
) -> None:
    seen: dict[int, list[int]] = {}
    for part in split_work(counts, fixed_s, expert_s, pair_s, 0.25):
        spans = list(zip(*part, strict=True))
        cost_s = fixed_s + sum(expert_s + (last - first) * pair_s for _, first, last in spans)
        assert cost_s <= 0.25 * (1 + 1e-6) or (len(spans) == 1 and spans[0][2] - spans[0][1] == 1)
        for expert, first, last in spans:
            seen.setdefault(expert, []).extend(range(first, last))
    assert seen == {expert: list(range(count)) for expert, count in enumerate(counts)}


# ------------------------------------------------------------------------------------------ keys


def test_keys_are_kept_in_files_that_nobody_else_reads(tmp_path: Path) -> None:
    keys, path = KeyPair.make(), tmp_path / "keys"
    write_keys(path, keys)
    assert path.stat().st_mode & 0o777 == 0o600 and read_keys(path) == keys
    assert keys.secret not in repr(keys)
    with pytest.raises(ConfigError, match="choose a file that does not exist"):
        write_keys(path, keys)
    for mode in (0o640, 0o604, 0o700):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"has mode {mode:04o}, expected 0600"):
            read_keys(path)
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    for other in (tmp_path / "link", tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError):
            read_keys(other)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        with pytest.raises(ConfigError, match="is not a file of this user"):
            read_keys(path)


@pytest.mark.parametrize("text", ["", HEAD, HEAD + "public a\nsecret b\n", "\0" * 300])
def test_files_that_hold_no_keys_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        read_keys(path)


def test_keys_must_fit_each_other_and_tcp_needs_them() -> None:
    one, other = KeyPair.make(), KeyPair.make()
    with pytest.raises(ConfigError, match="do not belong together"):
        KeyPair(one.public, other.secret)
    with pytest.raises(ConfigError, match="only ipc:// goes without"):
        HostClient(HostAddress("far", "tcp://127.0.0.1:9", "token"), "me", keys=one)
    with pytest.raises(ConfigError, match="only ipc:// goes without"):
        HostClient(HostAddress("far", "tcp://127.0.0.1:9", "token", server_key=one.public), "me")
    with pytest.raises(ConfigError, match="is no public key of moray, expected 43 characters"):
        Admission(one).allow(one.public[:-1])
