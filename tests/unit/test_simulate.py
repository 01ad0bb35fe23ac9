"""Replaying traces: hit rates, bytes, times, the choice of a policy, and a store's recorded traffic."""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import msgpack
import numpy as np
import pytest

from moray.runtime.errors import ConfigError, TraceError
from moray.runtime.residency.policies import POLICIES
from moray.runtime.trace import traffic
from moray.runtime.trace.format import Trace, TraceHeader, read_trace
from moray.runtime.trace.recorder import TraceRecorder
from moray.runtime.trace.simulate import BELADY, best_policy, hit_rates, simulate
from moray.runtime.trace.traffic import TrafficRecorder, choose_policy, read_traffic, traffic_file

TRACES = [read_trace(path) for path in sorted((Path(__file__).parents[1] / "data" / "traces").glob("*.msgpack"))]
NUM_EXPERTS = TRACES[0].header.num_experts
BUDGETS = [round(share * sum(NUM_EXPERTS)) for share in (0.25, 0.4, 0.6, 0.8)]
RATE = 2e9


def make_trace(path: Path, calls: list[tuple[int, list[int], int]], shard_bytes: tuple[int, ...]) -> Trace:
    """Of (layer, experts, compute time in us), three experts a layer."""
    header = TraceHeader("f00d", "mixtral", (3,) * len(shard_bytes), shard_bytes)
    recorder = TraceRecorder(path, header)
    for step, (layer, experts, compute_us) in enumerate(calls):
        recorder.record(step, layer, 1, experts, compute_us=compute_us)
    recorder.close()
    return read_trace(path)


def test_bytes_and_times_are_those_of_the_layers(tmp_path: Path) -> None:
    calls = [(0, [0, 1], 300), (1, [0], 100), (0, [0, 1], 200), (1, [2], 700)]
    trace = make_trace(tmp_path / "a.trace", calls, (1000, 4000))
    outcome = simulate([trace], "lru", 3, bytes_per_s=1e7)
    # Loaded: 2 x 100 us, 400 us, nothing, 400 us.
    assert (outcome.num_uses, outcome.num_hits, outcome.loaded_bytes) == (6, 2, 10_000)
    assert outcome.serial_s == pytest.approx(1e-6 * (500 + 500 + 200 + 1100))
    assert outcome.overlapped_s == pytest.approx(1e-6 * (300 + 400 + 200 + 700))
    assert outcome.hit_rate == 2 / 6
    twice = simulate([trace, trace], "lru", 3, bytes_per_s=1e7)
    assert (twice.num_uses, twice.num_hits) == (12, 4)  # each from an empty cache


def test_what_the_layer_before_foresaw_of_the_misses_is_counted(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "a.trace", TraceHeader("f00d", "mixtral", (3, 3), (1000, 1000)))
    guesses = [{1: [0, 2]}, {1: [2, 1]}, {1: [1]}]
    for step, (first, second) in enumerate((([0], [0, 1]), ([1], [1, 2]), ([0], [2]))):
        recorder.record(step, 0, 1, first, predicted=guesses[step])
        recorder.record(step, 1, 1, second)
    recorder.close()
    outcome = simulate([read_trace(tmp_path / "a.trace")], "lru", 6, RATE)
    # Misses: 0 and 1 of layer 0, which nothing foresees; 0 (foreseen) and 1, then 2 (foreseen) of layer 1. In vain: 2.
    assert (outcome.num_uses - outcome.num_hits, outcome.num_foreseen, outcome.num_needless) == (5, 2, 1)


@pytest.mark.parametrize("num_slots", [4, *BUDGETS, 48])
def test_hit_rates_of_lru_are_those_of_a_naive_one(num_slots: int) -> None:
    hits = 0
    for trace in TRACES:
        cache: OrderedDict[int, None] = OrderedDict()
        for active in decoded(trace):
            hits += len(cache.keys() & set(active))
            for expert in active:
                cache[expert] = None
                cache.move_to_end(expert)
            while len(cache) > num_slots:
                cache.popitem(last=False)
    num_uses = sum(len(active) for trace in TRACES for active in decoded(trace))
    rates = hit_rates([decoded(trace) for trace in TRACES], TRACES[0].header.num_experts, num_slots)
    assert rates["lru"] == pytest.approx(hits / num_uses)


def decoded(trace: Trace) -> list[list[int]]:
    """Calls of single tokens: prompts are scans, which no policy remembers as uses."""
    return [active for active, tokens in zip(trace.calls(), trace.num_tokens_C, strict=True) if tokens == 1]


def test_with_room_for_all_each_expert_is_loaded_once() -> None:
    for policy in (*POLICIES, BELADY):
        for trace in TRACES:
            outcome = simulate([trace], policy, sum(NUM_EXPERTS), RATE)
            assert outcome.num_uses - outcome.num_hits == len({e for active in trace.calls() for e in active})


@pytest.mark.parametrize("num_slots", BUDGETS)
def test_the_policy_chosen_on_two_texts_does_for_the_third(num_slots: int) -> None:
    for held_out in TRACES:
        chosen = best_policy([trace for trace in TRACES if trace is not held_out], num_slots)
        rates = {name: simulate([held_out], name, num_slots, RATE).hit_rate for name in POLICIES}
        assert rates[chosen] >= 0.95 * max(rates.values())
        assert max(rates.values()) <= simulate([held_out], BELADY, num_slots, RATE).hit_rate


def test_traces_of_different_models_are_not_mixed() -> None:
    header = replace(TRACES[0].header, shard_bytes=(1,) * 6)
    with pytest.raises(TraceError, match="different models"):
        simulate([TRACES[0], replace(TRACES[1], header=header)], "lru", 4, RATE)
    with pytest.raises(TraceError, match="no traces"):
        best_policy([], 4)
    with pytest.raises(ConfigError, match="unknown cache policy"):
        simulate(TRACES, "fifo", 4, RATE)


# ------------------------------------------------------------------------------------ traffic


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def run_traffic(trace: Trace, fingerprint: str = "f00d") -> TrafficRecorder:
    recorder = TrafficRecorder(fingerprint, trace.header.num_experts)
    for layer, (start, end) in zip(trace.layers_C.tolist(), bounds(trace), strict=True):
        recorder.add(layer, trace.experts_U[start:end].tolist())
    recorder.close()
    return recorder


def bounds(trace: Trace) -> list[tuple[int, int]]:
    return list(pairwise(trace.starts.tolist()))


def numbered(calls: list[list[int]]) -> list[list[int]]:
    first = [0, *accumulate(NUM_EXPERTS)]
    return [[first[layer] + expert for expert in experts] for layer, *experts in calls]


def test_traffic_of_two_runs_is_joined_and_chooses_as_their_traces_would(state: Path) -> None:
    for trace in TRACES[:2]:
        assert run_traffic(trace).error is None
    kept = numbered(read_traffic("f00d", NUM_EXPERTS))
    assert kept == TRACES[0].calls() + TRACES[1].calls()
    assert [path.name for path in sorted((state / "moray" / "traffic").iterdir())] == ["f00d.lock", "f00d.msgpack"]
    for num_slots in BUDGETS:
        rates = hit_rates([kept], NUM_EXPERTS, num_slots)
        choice = choose_policy("f00d", NUM_EXPERTS, num_slots)
        assert choice.policy == max(rates, key=rates.__getitem__) == best_policy(TRACES[:2], num_slots)
        assert choice.reason.startswith(f"hits over the last {len(kept)} layer calls: lfu {100 * rates['lfu']:.1f} %")


def test_without_traffic_the_default_is_chosen_and_said(state: Path) -> None:
    assert choose_policy("f00d", NUM_EXPERTS, 12) == (
        "lfu",
        "the default: too little traffic of this store is recorded to choose by",
    )
    assert choose_policy("f00d", NUM_EXPERTS, 48) == ("lfu", "every expert fits, nothing is evicted")
    run_traffic(TRACES[0], "other")
    assert "the default" in choose_policy("f00d", NUM_EXPERTS, 12).reason
    assert "the default" in choose_policy("other", NUM_EXPERTS[1:], 12).reason
    assert "layer calls" in choose_policy("other", NUM_EXPERTS, 12).reason


def test_a_loop_larger_than_the_cache_is_not_given_to_lru(state: Path) -> None:
    recorder = TrafficRecorder("f00d", (8,))
    for _ in range(40):
        for expert in (0, 1, 2, 3, 4, 5):
            recorder.add(0, [expert])
    recorder.close()
    assert choose_policy("f00d", (8,), 5).policy == "lfu"


def test_recency_wins_where_the_present_says_more_than_the_past(state: Path) -> None:
    recorder = TrafficRecorder("f00d", (64,))
    for phase in range(60):
        for _ in range(20):  # each phase uses four experts of its own
            for expert in range(4):
                recorder.add(0, [(4 * phase + expert) % 64])
    recorder.close()
    assert choose_policy("f00d", (64,), 4).policy != "lfu"


def test_kept_traffic_is_bounded(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "_MAX_USES", 100)
    recorder = TrafficRecorder("f00d", (8, 8))
    for step in range(500):
        recorder.add(0, [step % 8, (step + 1) % 8])
    assert len(recorder._older) + len(recorder._newer) < 500
    recorder.close()
    kept = read_traffic("f00d", (8, 8))
    assert sum(len(call) - 1 for call in kept) == 100 and kept[-1] == [0, 499 % 8, 500 % 8]
    monkeypatch.setattr(traffic, "_MAX_TOKENS", 10)
    recorder = TrafficRecorder("f00d", (8, 8))
    recorder.add(1, [7])
    recorder.close()
    assert len(read_traffic("f00d", (8, 8))) == 20 and read_traffic("f00d", (8, 8))[-1] == [1, 7]


def spoil(change: Callable[[bytes], bytes]) -> None:
    file = traffic_file("f00d")
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-3],
        lambda data: b"\xc1" + data,
        lambda data: msgpack.packb(msgpack.unpackb(data) | {"format": 2}),
        lambda data: msgpack.packb(msgpack.unpackb(data) | {"calls": "text"}),
        lambda data: msgpack.packb(msgpack.unpackb(data) | {"calls": np.uint16([0, 5, 1]).tobytes()}),
        lambda data: msgpack.packb(msgpack.unpackb(data) | {"calls": np.uint16([6, 1, 1]).tobytes()}),
        lambda data: msgpack.packb(msgpack.unpackb(data) | {"calls": np.uint16([0, 1, 8]).tobytes()}),
        lambda data: msgpack.packb(msgpack.unpackb(data) | {"calls": b"\0"}),
        lambda data: msgpack.packb([1]),
    ],
)
def test_spoilt_traffic_is_as_none_and_is_replaced(state: Path, change: Callable[[bytes], bytes]) -> None:
    run_traffic(TRACES[0])
    spoil(change)
    assert read_traffic("f00d", NUM_EXPERTS) == []
    assert "the default" in choose_policy("f00d", NUM_EXPERTS, 12).reason
    assert run_traffic(TRACES[1]).error is None
    assert numbered(read_traffic("f00d", NUM_EXPERTS)) == TRACES[1].calls()


def test_traffic_that_cannot_be_kept_is_said_and_nothing_raises(state: Path) -> None:
    state.write_text("a file where the folder should be")
    recorder = run_traffic(TRACES[0])
    assert recorder.error is not None and recorder.error.startswith("traffic is not kept:")
    recorder.close()


def test_a_run_that_used_nothing_leaves_no_file(state: Path) -> None:
    TrafficRecorder("f00d", (8,)).close()
    assert not state.exists()


def test_another_engine_that_writes_is_not_waited_for(state: Path) -> None:
    run_traffic(TRACES[0])
    with traffic_file("f00d").with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = run_traffic(TRACES[1]).error
    assert error is not None and os.strerror(11) in error
    assert numbered(read_traffic("f00d", NUM_EXPERTS)) == TRACES[0].calls()
