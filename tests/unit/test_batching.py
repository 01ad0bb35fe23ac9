"""Requests that share steps, memory and prefixes get the tokens that each gets alone; what they cost together."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.capped import capped
from helpers.checkpoints import tiny_checkpoint
from helpers.reference import runner
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moray.deploy.config import demo_store
from moray.runtime.convert.converter import convert
from moray.runtime.errors import RequestError
from moray.runtime.generation.kv_pool import BLOCK_TOKENS
from moray.runtime.generation.request import Finished, GenerationRequest, SamplingParams, TokenEvent
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.step_loop import StepLoop
from moray.runtime.planning.measure import measure_profile
from moray.runtime.planning.profile import GenerationLimits, SequenceMemory
from moray.runtime.store.store import Store

A_TOKEN = SequenceMemory(0, 6144, (), can_chunk=True)  # the demonstration model's: 6 layers, 2 x 2 heads of 64
BLOCK_BYTES = BLOCK_TOKENS * A_TOKEN.bytes_per_token


class RandomClock:
    """Each look at it is some time later: whatever is decided by time comes out in many ways."""

    def __init__(self, seed: int) -> None:
        self._random, self._now = random.Random(seed), 0.0

    def __call__(self) -> float:
        self._now += self._random.choice((0.0, 0.001, 0.01, 1.0))
        return self._now


def limits_of(blocks: int, **fields: Any) -> GenerationLimits:
    return GenerationLimits(2048, kv_bytes=blocks * BLOCK_BYTES, sequence=A_TOKEN, **fields)


def loop_of(made: Runner, limits: GenerationLimits | None = None, clock: Callable[[], float] = lambda: 0.0) -> StepLoop:
    return StepLoop(
        made.model, made.tokenizer, frozenset(), limits=limits, batch=made._loop._forward._batch, clock=clock
    )


def check(loop: StepLoop) -> None:
    """The accounts hold, and caches are really no larger than they say."""
    loop.validate()
    layers = [[layer for layer in kv.cache.layers if layer.is_initialized] for kv in loop.caches]
    held = [sum(layer._keys.nbytes + layer._values.nbytes for layer in of_one) for of_one in layers]
    assert all(size <= kv.reserved_bytes for size, kv in zip(held, loop.caches, strict=True))
    assert sum(held) <= loop.stats().kv_limit_bytes


def drive(loop: StepLoop, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    for request in requests:
        loop.add(request)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    while not loop.is_idle:
        for event in loop.step():
            events[event.request_id].append(event)
        loop.validate()
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def end_of(events: list[TokenEvent]) -> Finished:
    assert events[-1].finished is not None
    return events[-1].finished


def prompt_of(seed: int, length: int, shared: int = 0) -> tuple[int, ...]:
    """The first ``shared`` tokens are the same for all."""
    common, own = random.Random(0), random.Random(seed)
    return tuple([common.randrange(5, 4000) for _ in range(shared)] + [own.randrange(5, 4000) for _ in range(length)])


def mixed_requests() -> list[GenerationRequest]:
    """Prompts of 1 to 140 tokens, some with the same beginning, some that repeat themselves; greedy and seeded."""
    made = []
    for i, (length, shared, count) in enumerate(
        [(1, 0, 30), (2, 0, 7), (5, 70, 40), (30, 70, 20), (1, 70, 60), (100, 0, 50), (140, 0, 9), (17, 33, 33)]
    ):
        ids = prompt_of(i, length, shared)
        sampling = SamplingParams() if i % 2 else SamplingParams(temperature=0.8, top_p=0.95, seed=i)
        made.append(GenerationRequest(f"r{i}", ids, count, sampling))
    repeating = prompt_of(99, 12) * 6
    return [*made, GenerationRequest("repeating", repeating, 60)]


@pytest.fixture(scope="module")
def alone(demo_runner: Runner) -> dict[str, list[int]]:
    """The tokens of ``mixed_requests``, each in a loop of its own."""
    return {r.request_id: tokens_of(drive(loop_of(demo_runner), r)[r.request_id]) for r in mixed_requests()}


# ------------------------------------------------------------------------------ the same tokens


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 1 << 20), blocks=st.integers(5, 12), chunk=st.sampled_from((2, 16, 64, 512)))
def test_whatever_runs_beside_it_a_request_gets_its_tokens(
    seed: int, blocks: int, chunk: int, demo_runner: Runner, alone: dict[str, list[int]]
) -> None:
    """Arrivals, cancels, the budget, and whatever is decided by time at random."""
    chance = random.Random(seed)
    limits = limits_of(blocks, chunk=chunk, max_running=chance.randint(2, 9))
    loop = loop_of(demo_runner, limits, RandomClock(seed))
    coming = mixed_requests()
    chance.shuffle(coming)
    found: dict[str, list[TokenEvent]] = {request.request_id: [] for request in coming}
    cancelled = set()
    while coming or not loop.is_idle:
        for _ in range(min(chance.randint(0, 2), len(coming))):
            loop.add(coming.pop())
        if chance.random() < 0.02:
            loop.cancel(name := chance.choice(sorted(found)))
            cancelled.add(name)
        for event in loop.step():
            found[event.request_id].append(event)
        check(loop)
    assert not loop.take_failures()
    for name, events in found.items():
        tokens = tokens_of(events)
        assert tokens == alone[name][: len(tokens)]
        assert end_of(events).reason == "length" or name in cancelled
        assert end_of(events).reason == "cancelled" or len(tokens) == len(alone[name])


def growing_requests(count: int) -> list[GenerationRequest]:
    """Each needs a block at first and three in the end."""
    sampling = [SamplingParams(temperature=0.7 * (i % 2), seed=i) for i in range(count)]
    return [GenerationRequest(str(i), prompt_of(i, 60), 80, sampling[i]) for i in range(count)]


def test_preempted_requests_go_on_as_if_nothing_had_been(demo_runner: Runner) -> None:
    """Five blocks for four requests, through a runner, its streams read by threads."""
    batch = growing_requests(4)
    expected = {r.request_id: tokens_of(drive(loop_of(demo_runner), r)[r.request_id]) for r in batch}
    with runner(demo_store(), "int8", limits_of(5)) as made:
        made._loop._end_ids = frozenset()
        found: dict[str, list[int]] = {}
        streams = {request.request_id: made.stream(request) for request in batch}

        def read(name: str) -> None:
            found[name] = tokens_of(list(streams[name]))

        threads = [threading.Thread(target=read, args=(name,)) for name in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = made.generation_stats()
    assert found == expected
    assert stats.preemptions > 0 and stats.largest_batch > 1 and stats.running == stats.waiting == 0


def test_the_youngest_is_preempted_and_comes_back_first(demo_runner: Runner) -> None:
    """Three grow beyond the blocks that are there. None overtakes, and the first is never sent away."""
    loop = loop_of(demo_runner, limits_of(5))
    requests = growing_requests(3)
    expected = {r.request_id: tokens_of(drive(loop_of(demo_runner), r)[r.request_id]) for r in requests}
    for request in requests:
        loop.add(request)
    found: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    order = []
    while not loop.is_idle:
        before = loop.stats().preemptions
        for event in loop.step():
            found[event.request_id].append(event)
            order += [event.request_id] if event.finished else []
        check(loop)
        if loop.stats().preemptions > before:
            running, waiting = [*loop._running], [sequence.request.request_id for sequence in loop._waiting]
            assert running and running + waiting == [name for name in "012" if name not in order]
    assert order == ["0", "1", "2"] and loop.stats().preemptions >= 1
    assert {name: tokens_of(events) for name, events in found.items()} == expected
    assert [end_of(found[name]).usage.cached_tokens for name in "012"] == [0, 0, 0]


def test_a_preempted_request_can_be_cancelled(demo_runner: Runner) -> None:
    loop = loop_of(demo_runner, limits_of(5))
    for i in range(2):
        loop.add(GenerationRequest(str(i), prompt_of(i, 60), 200))
    while not loop.stats().preemptions:
        loop.step()
    generated = loop._waiting[0].num_generated
    loop.cancel("1")
    (cancelled,) = [event for event in loop.step() if event.request_id == "1"]
    assert cancelled.finished is not None and cancelled.finished.reason == "cancelled"
    assert cancelled.finished.usage.completion_tokens == generated > 0
    check(loop)


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("jamba", marks=pytest.mark.long)])
def test_windows_and_states_are_computed_again_as_they_were(family: str, store: Callable[..., Path]) -> None:
    """Keys, windows of them and states, in padded batches or in turn, with room for hardly two sequences."""
    path = store(family, "none")
    with Store.open(path) as opened:
        memory = measure_profile(opened).sequence
    limits = GenerationLimits(512, 16, kv_bytes=2 * memory.kv_bytes(150, 16), sequence=memory)
    batch = [
        GenerationRequest(str(i), tuple(3 + (7 * j * j + i) % 180 for j in range(50)), 90, SamplingParams(0.5, seed=i))
        for i in range(3)
    ]
    with runner(path, "float") as made:
        expected = [tokens_of(drive(loop_of(made), request)[request.request_id]) for request in batch]
        loop = loop_of(made, limits)
        found = drive(loop, *batch)
        assert [tokens_of(found[request.request_id]) for request in batch] == expected
        assert loop.stats().preemptions > 0 and loop.stats().largest_batch > 1


# ----------------------------------------------------------------------------------- prefixes


def test_a_shared_system_prompt_is_computed_once(demo_runner: Runner) -> None:
    """Twenty requests at once; a kept cache serves the twenty-first when all have ended."""
    requests = [GenerationRequest(str(i), prompt_of(i + 1, 10, shared=1000), 12) for i in range(21)]
    loop = loop_of(demo_runner, limits_of(21 * 17))
    drive(loop, *requests[:20])
    assert loop.stats().prompt_tokens_computed == 1000 + 20 * 10
    events = drive(loop, requests[20])["20"]
    assert loop.stats().prompt_tokens_computed == 1000 + 21 * 10
    assert end_of(events).usage.cached_tokens == 1000 and loop.stats().largest_batch > 8
    assert tokens_of(events) == tokens_of(drive(loop_of(demo_runner), requests[20])["20"])
    check(loop)


def test_the_second_turn_of_a_long_chat_computes_only_what_is_new(demo_runner: Runner) -> None:
    loop = loop_of(demo_runner, limits_of(60))
    first = GenerationRequest("first", prompt_of(1, 1000), 20)
    answer = tokens_of(drive(loop, first)["first"])
    others = [GenerationRequest(str(i), prompt_of(i + 5, 40), 5) for i in range(3)]
    drive(loop, *others)
    computed = loop.stats().prompt_tokens_computed
    turn = GenerationRequest("second", (*first.prompt_ids, *answer, *prompt_of(2, 30)), 5)
    events = drive(loop, turn)["second"]
    assert end_of(events).usage.cached_tokens == 1000 + 19  # the answer's last token was never computed
    assert loop.stats().prompt_tokens_computed - computed == 1 + 30


# ----------------------------------------------------------------------------------- speculation


def test_speculation_is_used_where_it_pays_and_changes_nothing(
    demo_runner: Runner, alone: dict[str, list[int]]
) -> None:
    """A step that takes the same time whatever it computes makes it pay; one that is paid by the token never does."""
    request = mixed_requests()[-1]

    class Clock:
        def __init__(self, cost: Callable[[int], float]) -> None:
            self._cost, self._now, self._rows = cost, 0.0, 0

        def __call__(self) -> float:
            rows = loop.stats().speculated + loop.stats().decode_steps
            self._now += self._cost(rows - self._rows)
            self._rows = rows
            return self._now

    steps = {}
    for name, cost in (("flat", lambda rows: 1.0), ("off", lambda rows: 1.0)):
        loop = loop_of(demo_runner, limits_of(40, speculation="off" if name == "off" else "auto"), Clock(cost))
        assert tokens_of(drive(loop, request)["repeating"]) == alone["repeating"]
        steps[name] = loop.stats()
    assert steps["off"].speculated == 0 and steps["off"].decode_steps == len(alone["repeating"]) - 1
    flat = steps["flat"]
    assert 0 < flat.speculated_accepted <= flat.speculated
    assert flat.decode_steps + flat.speculated_accepted == len(alone["repeating"]) - 1


# --------------------------------------------------------------------------------------- bytes


def test_a_batch_loads_each_expert_once(demo: Store) -> None:
    """With few slots: what is read for each token falls as more sequences need the same experts."""
    requests = [GenerationRequest(str(i), prompt_of(i, 3), 16) for i in range(8)]
    loaded: list[float] = []
    tokens: list[list[list[int]]] = []
    for together in (1, 8):
        with capped(demo, num_slots=12) as made:
            made.runner._loop._max_running, made.runner._loop._speculates = together, False
            made.runner._loop._end_ids = frozenset()
            streams = [made.runner.stream(request) for request in requests]
            tokens.append([tokens_of(list(stream)) for stream in streams])
            loaded.append(sum(made.runner.stats().bytes_by_source.values()))
    assert tokens[0] == tokens[1]
    assert loaded[1] < 0.6 * loaded[0]


# ----------------------------------------------------------------------------------- long prompts


@pytest.mark.long
def test_a_prompt_of_32000_tokens_is_served_within_the_planned_memory(tmp_path: Path) -> None:
    """A second one waits, and what both hold is never more than one's plan."""
    checkpoint = tiny_checkpoint("mixtral", tmp_path / "checkpoint", max_position_embeddings=32768)
    convert(checkpoint, tmp_path / "store")
    with Store.open(tmp_path / "store") as opened:
        memory = measure_profile(opened).sequence
    limits = GenerationLimits(32768, kv_bytes=memory.kv_bytes(32768, 512), sequence=memory)
    prompt = tuple(3 + (7 * i * i) % 180 for i in range(32_000))
    with runner(tmp_path / "store", "int8") as made:
        loop = loop_of(made, limits)
        with pytest.raises(RequestError, match="the prompt has 32768 tokens, the model's context holds 32768 "):
            loop.check(GenerationRequest("r", prompt + prompt[:768], 1))
        for name in ("first", "second"):
            loop.add(GenerationRequest(name, prompt, 8))
        events: list[TokenEvent] = []
        while not loop.is_idle:
            events += loop.step()
            check(loop)
    ends = [event.finished for event in events if event.finished is not None]
    assert [end.usage.completion_tokens for end in ends] == [8, 8]
    assert [end.usage.cached_tokens for end in ends] == [0, 31_998]
