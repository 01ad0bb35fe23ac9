from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.reference import greedy

from moray.runtime.arrays import Ints
from moray.runtime.errors import HostLostError, MorayError, RequestError, StoreError
from moray.runtime.experts.source import Fetch, InProcessSource, SourceInfo
from moray.runtime.generation.request import GenerationRequest, SamplingParams, TokenEvent
from moray.runtime.generation.runner import Runner
from moray.runtime.model.loader import load_model
from moray.runtime.planning.profile import GenerationLimits
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon

PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
LONG = 1500  # tokens that take far longer than anything else in a test


class BrittleSource(InProcessSource):
    """Fails, or waits, when it is told to."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.calls_until_failure, self.failures = -2, 1  # then so many calls fail
        self.error: MorayError = HostLostError("expert host host-3 did not answer")
        self.gate = threading.Event()
        self.gate.set()

    def fetch(self, layer: int, experts: Ints) -> Fetch:
        self.gate.wait()
        self.calls_until_failure -= 1
        if -1 - self.failures < self.calls_until_failure <= -1:
            raise self.error
        return super().fetch(layer, experts)

    def table(self, layer: int) -> None:  # type: ignore[override]
        """Everything is fetched."""


@pytest.fixture
def source(demo: Store) -> Iterator[BrittleSource]:
    made = BrittleSource(demo)
    yield made
    made.gate.set()
    made.close()


@contextmanager
def runner_of(store: Store, source: InProcessSource) -> Iterator[Runner]:
    limits = GenerationLimits(2048, speculation="off")  # steps are counted
    made = Runner(store, source, load_model(store, "int8", torch.device("cpu")), limits=limits)
    try:
        yield made
    finally:
        source.gate.set() if isinstance(source, BrittleSource) else None
        made.close()


@pytest.fixture
def brittle(demo: Store, source: BrittleSource) -> Iterator[Runner]:
    with runner_of(demo, source) as made:
        yield made


@pytest.fixture(scope="module")
def expected(demo_runner: Runner) -> list[int]:
    return greedy(demo_runner, list(demo_runner.encode(PROMPT)), 12)


def request_of(runner: Runner, name: str = "r", count: int = 12, prompt: str = PROMPT) -> GenerationRequest:
    return GenerationRequest(name, runner.encode(prompt), count)


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def wait_for_commands(runner: Runner) -> None:
    """Returns when the loop's thread has taken all that was asked of it before."""
    runner.logits([1])


# ---------------------------------------------------------------------------------------- streams


def test_streams_in_several_threads_get_the_tokens_they_get_alone(demo_runner: Runner) -> None:
    prompts = [PROMPT, "def read(path):\n", "class Node:\n", "for i in range("]
    alone = [tokens_of(list(demo_runner.stream(request_of(demo_runner, "a", 15, p)))) for p in prompts]
    found: list[list[int]] = [[] for _ in prompts]

    def consume(index: int) -> None:
        request = request_of(demo_runner, f"stream-{index}", 15, prompts[index])
        found[index] = tokens_of(list(demo_runner.stream(request)))

    threads = [threading.Thread(target=consume, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_the_second_turn_of_a_chat_is_served_from_the_kept_cache(demo_runner: Runner) -> None:
    request = request_of(demo_runner, "first", 8)
    first = list(demo_runner.stream(request))
    turn = (*request.prompt_ids, *tokens_of(first), 73, 129)
    (*_, last) = demo_runner.stream(GenerationRequest("second", turn, 4))
    assert last.finished is not None
    assert last.finished.usage.cached_tokens >= len(request.prompt_ids) + 7


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [((5,) * 2048, 1, "2048 tokens"), ((4096,), 1, "token id 4096"), ((-1,), 1, "token id -1")],
)
def test_a_request_that_cannot_be_served_is_refused_before_anything_is_computed(
    brittle: Runner, ids: tuple[int, ...], count: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        brittle.stream(GenerationRequest("r", ids, count))
    assert brittle.stats().layer_calls == 0


def test_a_request_id_is_used_once_at_a_time(brittle: Runner, expected: list[int]) -> None:
    first = brittle.stream(request_of(brittle, "same"))
    next(first)
    second = brittle.stream(request_of(brittle, "same"))
    with pytest.raises(RequestError, match="request id same is in use"):
        next(second)
    assert expected[0:1] + tokens_of(list(first)) == expected  # it goes on


@pytest.mark.parametrize("temperature", [2, 1e-45, 100])
def test_any_temperature_is_served(brittle: Runner, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=7)
    request = GenerationRequest("r", brittle.encode(PROMPT), 5, sampling)
    assert len(tokens_of(list(brittle.stream(request)))) == 5


# ----------------------------------------------------------------------------------------- cancel


def test_cancel_ends_the_stream_with_its_reason(brittle: Runner, expected: list[int]) -> None:
    stream = brittle.stream(request_of(brittle, "long", LONG))
    events = [next(stream) for _ in range(3)]
    brittle.cancel("long")
    events += list(stream)
    assert events[-1].finished is not None and events[-1].finished.reason == "cancelled"
    tokens = tokens_of(events)
    assert events[-1].finished.usage.completion_tokens == len(tokens) < LONG
    assert tokens[:12] == expected[: len(tokens)]


def test_closing_the_iterator_cancels(brittle: Runner) -> None:
    stream = brittle.stream(request_of(brittle, "long", LONG))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    wait_for_commands(brittle)
    list(brittle.stream(request_of(brittle, "short", 2)))  # needs steps, the first of which ends "long"
    calls = brittle.stats().layer_calls
    wait_for_commands(brittle)
    assert brittle.stats().layer_calls == calls + 6  # the logits' own: nothing else runs


def test_a_cancel_that_overtakes_its_request_ends_it(brittle: Runner) -> None:
    brittle.cancel("early")
    (*_, last) = brittle.stream(request_of(brittle, "early", LONG))
    assert last.finished is not None and last.finished.reason == "cancelled"


# ---------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("calls", [0, 3, 20])
def test_a_failing_step_raises_in_the_stream_and_the_runner_lives_on(
    brittle: Runner, source: BrittleSource, expected: list[int], calls: int
) -> None:
    source.calls_until_failure = calls
    with pytest.raises(HostLostError, match="host-3 did not answer"):
        list(brittle.stream(request_of(brittle)))
    # The next one starts from a sound cache, under the same id.
    assert tokens_of(list(brittle.stream(request_of(brittle)))) == expected


def test_a_failing_prompt_ends_its_stream_and_no_other(
    brittle: Runner, source: BrittleSource, expected: list[int]
) -> None:
    source.gate.clear()
    streams = [brittle.stream(request_of(brittle, name, 3)) for name in ("a", "b", "c")]
    source.calls_until_failure = 7  # the second prompt's second layer
    source.gate.set()
    assert tokens_of(list(streams[0])) == expected[:3]
    with pytest.raises(HostLostError):
        list(streams[1])
    assert tokens_of(list(streams[2])) == expected[:3]


def test_a_lost_host_ends_all_that_a_step_computes(brittle: Runner, source: BrittleSource) -> None:
    streams = [brittle.stream(request_of(brittle, name, LONG)) for name in ("a", "b")]
    for stream in streams:
        next(stream)
    wait_for_commands(brittle)
    source.calls_until_failure = 7
    for stream in streams:
        with pytest.raises(HostLostError):
            list(stream)


def test_one_sequences_damaged_shard_is_no_others_concern(
    brittle: Runner, source: BrittleSource, expected: list[int]
) -> None:
    """A step of both fails; computed alone, one of them fails again."""
    source.gate.clear()
    streams = [brittle.stream(request_of(brittle, name)) for name in ("a", "b")]
    source.error = StoreError("layer 3 expert 1 is damaged")
    source.calls_until_failure = 6 + 6 + 6 + 4  # both prompts, a step of the first beside the second, a layer of both
    source.failures = 2
    source.gate.set()
    outcomes = []
    for stream in streams:
        try:
            outcomes.append(tokens_of(list(stream)))
        except StoreError as error:
            outcomes.append(str(error))
    assert outcomes == ["layer 3 expert 1 is damaged", expected]


def test_a_stream_that_ends_in_the_step_that_fails_gets_its_last_token(brittle: Runner, source: BrittleSource) -> None:
    source.gate.clear()
    ended = brittle.stream(GenerationRequest("ended", (5,), 1))
    failed = brittle.stream(GenerationRequest("failed", (6,), 5))
    source.calls_until_failure = 6  # the first request's layers
    source.gate.set()
    assert len(tokens_of(list(ended))) == 1
    with pytest.raises(HostLostError):
        list(failed)


def test_a_request_cancelled_in_the_step_that_fails_does_not_wait_for_ever(
    brittle: Runner, source: BrittleSource
) -> None:
    first = brittle.stream(request_of(brittle, "cancelled", LONG))
    second = brittle.stream(request_of(brittle, "failed", LONG))
    next(first)
    next(second)
    source.gate.clear()
    brittle.cancel("cancelled")
    source.calls_until_failure = 0
    source.gate.set()
    with pytest.raises(HostLostError):
        list(second)
    try:
        (*_, last) = first
    except HostLostError:
        return
    assert last.finished is not None and last.finished.reason == "cancelled"


# ------------------------------------------------------------------------------------------ close


def test_closing_ends_open_streams_with_an_error(demo: Store, source: BrittleSource) -> None:
    with runner_of(demo, source) as made:
        stream = made.stream(request_of(made, "long", LONG))
        next(stream)
        made.close()
        with pytest.raises(MorayError, match="the engine was closed"):
            list(stream)


def test_a_closed_runner_refuses_instead_of_hanging(demo: Store, source: BrittleSource) -> None:
    with runner_of(demo, source) as made:
        made.close()
        with pytest.raises(MorayError, match="the engine was closed"):
            made.stream(request_of(made))
        with pytest.raises(MorayError, match="the engine was closed"):
            made.logits([1])
        made.cancel("r")
        made.close()


def test_closing_leaves_no_thread(demo: Store, source: BrittleSource) -> None:
    before = threading.active_count()
    with runner_of(demo, source):
        assert threading.active_count() > before
    assert threading.active_count() == before


# ----------------------------------------------------------------------------------------- logits


def test_logits_agree_with_the_stream(demo_runner: Runner, expected: list[int]) -> None:
    ids = [*demo_runner.encode(PROMPT), *expected]
    logits = demo_runner.logits(ids)
    assert logits.shape == (len(ids), 4096) and logits.dtype == torch.float32
    assert logits[len(ids) - len(expected) - 1 : -1].argmax(-1).tolist() == expected


def test_logits_of_a_full_context_are_served(demo_runner: Runner) -> None:
    assert len(demo_runner.logits([0, 5] * 1024)) == 2048


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ([4096], "token id 4096"),
        ([1, 2, 4096], "token id 4096"),
        ([1, -1], "token id -1"),
        ([-1, 1], "token id -1"),
        ([5] * 2049, "2048 tokens"),
    ],
)
def test_logits_of_what_the_model_cannot_take_are_refused(demo_runner: Runner, ids: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        demo_runner.logits(ids)


def test_an_error_in_logits_is_raised_where_they_were_asked_for(brittle: Runner, source: BrittleSource) -> None:
    source.calls_until_failure = 2
    with pytest.raises(HostLostError):
        brittle.logits([1, 2, 3])
    assert len(brittle.logits([1, 2, 3])) == 3


# ------------------------------------------------------------------------------------------- stats


def test_every_token_and_every_byte_of_a_request_is_counted(brittle: Runner, demo: Store) -> None:
    assert brittle.stats().layer_calls == 0  # warming up is not counted
    request = request_of(brittle, count=5)
    list(brittle.stream(request))
    stats = brittle.stats()
    computed = len(request.prompt_ids) + 4
    assert [sum(layer) for layer in stats.tokens_per_expert] == [2 * computed] * 6
    assert stats.layer_calls == 6 * 5
    assert 6 <= stats.num_used <= stats.num_experts == 48
    (num_bytes,) = stats.bytes_by_source.values()
    shard = demo.manifest.layers[0].layout.num_bytes
    assert num_bytes % shard == 0 and 6 * 5 * 2 <= num_bytes // shard <= 6 * (8 + 4 * 2)
    assert min(stats.group_s, stats.lease_s, stats.compute_s) > 0


# ------------------------------------------------------------------------------------------ wrong


def test_a_model_that_is_not_the_stores_is_refused(
    demo: Store, source: BrittleSource, store: Callable[..., object]
) -> None:
    with Store.open(str(store("mixtral"))) as other:
        model = load_model(other, "int8", torch.device("cpu"))
        with pytest.raises(StoreError, match="convert the checkpoint again"):
            Runner(demo, source, model)


def test_sources_describe_themselves(source: BrittleSource, demo: Store) -> None:
    assert source.describe() == [SourceInfo("memory", "process", 48, demo.manifest.expert_bytes)]
