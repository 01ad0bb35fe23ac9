"""The step loop over the demonstration model, driven by hand: no thread, every step seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.loops import PROMPTS, drive, end_of, run, text_of, tokens_of
from helpers.reference import runner

from moray.runtime.errors import RequestError
from moray.runtime.generation import forward
from moray.runtime.generation.request import GenerationRequest, Timings, Usage
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.step_loop import StepLoop

# ------------------------------------------------------------------------------------- one request


def test_a_request_is_generated_token_by_token(
    loop: StepLoop, request_of: Callable[..., GenerationRequest], demo_runner: Runner
) -> None:
    request = request_of(PROMPTS[0], 20)
    events = run(loop, request)
    assert all(len(event.token_ids) == 1 for event in events) and len(events) == 20
    end = end_of(events)
    assert end.reason == "length" and end.usage == Usage(len(request.prompt_ids), 0, 20)
    decode = demo_runner.tokenizer.decode
    before, after = decode(list(request.prompt_ids)), decode([*request.prompt_ids, *tokens_of(events)])
    assert text_of(events) == after.removeprefix(before)
    assert end.timings.prefill_s > 0 and end.timings.decode_s > 0


@torch.inference_mode()
def test_greedy_tokens_are_those_of_whole_forward_passes(
    loop: StepLoop, request_of: Callable[..., GenerationRequest], demo_runner: Runner
) -> None:
    request = request_of(PROMPTS[1], 10)
    ids = list(request.prompt_ids)
    for token in tokens_of(run(loop, request)):
        assert token == int(demo_runner.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(token)


def test_the_first_token_may_be_the_last(loop: StepLoop, request_of: Callable[..., GenerationRequest]) -> None:
    (event,) = run(loop, request_of(PROMPTS[0], 1))
    assert event.finished is not None and event.finished.usage.completion_tokens == 1
    assert event.finished.timings.decode_s == 0


def test_an_end_token_ends_the_text_and_is_not_part_of_it(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    free = run(make_loop(), request_of(PROMPTS[0]))
    end_id = tokens_of(free)[5]
    count = tokens_of(free).index(end_id) + 1
    ended = run(make_loop([end_id]), request_of(PROMPTS[0]))
    assert tokens_of(ended) == tokens_of(free)[:count]
    assert end_of(ended).reason == "stop" and end_of(ended).usage.completion_tokens == count
    assert text_of(ended) == text_of(free[: count - 1])


def test_a_stop_string_ends_the_text_before_itself(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    free = run(make_loop(), request_of(PROMPTS[0], 30))
    text = text_of(free)
    stop = text[11:16]  # across tokens
    events = run(make_loop(), request_of(PROMPTS[0], 30, stop=(stop, "never said")))
    assert text_of(events) == text[: text.index(stop)]
    assert end_of(events).reason == "stop" and len(events) < len(free)


def test_text_held_back_comes_with_the_last_token(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    free = run(make_loop(), request_of(PROMPTS[0], 8))
    events = run(make_loop(), request_of(PROMPTS[0], 8, stop=(text_of(free)[-2:] + "never said",)))
    assert text_of(events) == text_of(free) and events[-1].text.endswith(text_of(free)[-2:])
    assert end_of(events).reason == "length"


def test_more_tokens_than_the_context_holds_are_not_generated(
    loop: StepLoop, request_of: Callable[..., GenerationRequest]
) -> None:
    prompt = ([0, *range(100, 1100)] * 3)[: loop.context_length - 5]
    events = run(loop, request_of(prompt, 100))
    assert len(tokens_of(events)) == 5
    assert end_of(events).reason == "length" and end_of(events).usage.completion_tokens == 5


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("surplus", [0, 1, 500])
def test_a_prompt_that_leaves_no_room_is_refused(loop: StepLoop, surplus: int) -> None:
    length = loop.context_length + surplus
    with pytest.raises(RequestError, match=rf"the prompt has {length} tokens, the model's context holds 2048 "):
        loop.add(GenerationRequest("r", (5,) * length, 1))
    assert loop.is_idle


@pytest.mark.parametrize("token", [-1, 4096, 2**40])
def test_a_token_outside_the_vocabulary_is_refused(loop: StepLoop, token: int) -> None:
    with pytest.raises(RequestError, match=f"token id {token} is not in the vocabulary of 4096"):
        loop.add(GenerationRequest("r", (5, token), 1))
    assert loop.is_idle


def test_a_request_that_makes_no_sense_cannot_be_made() -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        GenerationRequest("r", (), 1)
    for count in (0, -1):
        with pytest.raises(RequestError, match=f"max_new_tokens is {count}, expected at least 1"):
            GenerationRequest("r", (1,), count)
    with pytest.raises(RequestError, match="a stop string is empty"):
        GenerationRequest("r", (1,), 1, stop=("a", ""))


def test_a_stop_string_needs_a_tokenizer(demo_runner: Runner) -> None:
    loop = StepLoop(demo_runner.model, None, frozenset())
    with pytest.raises(RequestError, match="no tokenizer"):
        loop.add(GenerationRequest("r", (5,), 2, stop=("a",)))
    events = run(loop, GenerationRequest("r", (5,), 2))
    assert len(tokens_of(events)) == 2 and text_of(events) == ""


# -------------------------------------------------------------------------------- several at once


def test_requests_together_get_the_tokens_they_get_alone(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    requests = [request_of(prompt, 5 + i, f"greedy-{i}") for i, prompt in enumerate(PROMPTS)]
    requests += [request_of(PROMPTS[i], 9, f"seed-{i}", temperature=1.0, top_p=0.9, seed=i) for i in range(3)]
    alone = {request.request_id: run(make_loop(), request) for request in requests}
    together = drive(make_loop(max_running=8), *requests)  # some wait
    for name, events in alone.items():
        assert tokens_of(together[name]) == tokens_of(events), name
        assert text_of(together[name]) == text_of(events)
        assert end_of(together[name]).reason == end_of(events).reason


def test_requests_that_join_later_change_nothing(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    first, second = request_of(PROMPTS[0], 12, "first"), request_of(PROMPTS[1], 4, "second")
    alone = [run(make_loop(), request) for request in (first, second)]
    loop = make_loop()
    loop.add(first)
    events = [event for _ in range(5) for event in loop.step()]
    loop.add(second)
    while not loop.is_idle:
        events += loop.step()
    for request, expected in zip((first, second), alone, strict=True):
        assert tokens_of([e for e in events if e.request_id == request.request_id]) == tokens_of(expected)


def test_a_step_gives_every_decoding_request_a_token_while_a_long_prompt_is_computed(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    loop = make_loop(chunk=8)
    loop.add(request_of("x", 50, "a"))
    loop.add(request_of("y", 50, "b"))
    while len(loop.step()) < 2:
        pass
    loop.add(request_of([7] * 40, 50, "long"))
    loop.add(request_of([9] * 40, 50, "longer"))
    for _ in range(4):  # four of five chunks of the first
        assert [event.request_id for event in loop.step()] == ["a", "b"]
    assert [event.request_id for event in loop.step()] == ["a", "b", "long"]
    for _ in range(4):
        assert [event.request_id for event in loop.step()] == ["a", "b", "long"]
    assert [event.request_id for event in loop.step()] == ["a", "b", "long", "longer"]


def test_no_more_than_the_maximum_run_at_once(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    loop = make_loop(max_running=3)
    for i in range(5):
        loop.add(request_of([5 + i], 5, str(i)))
    seen = []
    while not loop.is_idle:
        seen.append([event.request_id for event in loop.step()])
    assert seen[:3] == [["0"], ["0", "1"], ["0", "1", "2"]]
    assert max(map(len, seen)) == 3 and sum(map(len, seen)) == 25
    assert loop.stats().largest_batch == 3


# ---------------------------------------------------------------------------------------- cancel


def test_a_cancelled_request_ends_between_steps_and_no_other(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    first, second = request_of(PROMPTS[0], 12, "first"), request_of(PROMPTS[1], 12, "second")
    alone = [run(make_loop(), request) for request in (first, second)]
    loop = make_loop()
    loop.add(first)
    loop.add(second)
    before = [event for _ in range(5) for event in loop.step()]
    loop.cancel("first")
    rest = loop.step()
    cancelled = [event for event in rest if event.request_id == "first"]
    tokens = tokens_of([event for event in before if event.request_id == "first"])
    end = end_of(cancelled)
    assert end.reason == "cancelled" and tokens_of(cancelled) == []
    assert tokens == tokens_of(alone[0])[: len(tokens)] and end.usage.completion_tokens == len(tokens)
    while not loop.is_idle:
        rest += loop.step()
    assert tokens_of([e for e in before + rest if e.request_id == "second"]) == tokens_of(alone[1])


def test_a_cancelled_request_gives_up_text_it_held_back(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    text = text_of(run(make_loop(), request_of(PROMPTS[0], 4)))
    loop = make_loop()
    loop.add(request_of(PROMPTS[0], 12, stop=(text + "never said",)))
    held = [event for _ in range(4) for event in loop.step()]
    assert text_of(held) == ""
    loop.cancel("r")
    assert text_of(loop.step()) == text


def test_requests_are_cancelled_before_they_run_and_in_the_middle_of_a_prompt(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    loop = make_loop(chunk=8)
    loop.add(request_of([7] * 40, 5, "prompt"))
    loop.step()
    loop.cancel("prompt")
    (event,) = loop.step()
    assert event.finished is not None and event.finished.usage == Usage(40, 0, 0)
    loop.add(request_of([7] * 40, 5, "waiting"))
    loop.cancel("waiting")
    (event,) = loop.step()
    assert event.finished is not None and event.finished.reason == "cancelled"
    assert event.finished.usage == Usage(40, 0, 0)
    assert loop.is_idle
    assert end_of(run(loop, request_of([7] * 40, 5))).usage.cached_tokens == 8  # the first prompt's are of use


def test_cancelling_what_is_not_there_changes_nothing(
    loop: StepLoop, request_of: Callable[..., GenerationRequest]
) -> None:
    loop.cancel("later")
    loop.cancel("never")
    assert end_of(run(loop, request_of(PROMPTS[0], 3, "later"))).reason == "length"
    loop.cancel("later")  # it has just ended
    assert end_of(run(loop, request_of(PROMPTS[0], 3, "later"))).reason == "length"


# ----------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("chunk", [2, 7, 16])
def test_a_prompt_in_chunks_gives_the_same_tokens(
    make_loop: Callable[..., StepLoop],
    request_of: Callable[..., GenerationRequest],
    chunk: int,
) -> None:
    request = request_of("\n".join(PROMPTS), 12)
    whole = run(make_loop(), request)
    loop = make_loop(chunk=chunk)
    loop.add(request)
    silent = 0
    while not (events := loop.step()):
        silent += 1
    assert silent == -(-len(request.prompt_ids) // chunk) - 1
    while not loop.is_idle:
        events += loop.step()
    assert tokens_of(events) == tokens_of(whole)


@pytest.mark.parametrize(("family", "wanted"), [("mixtral", 1), ("gpt_oss", 2)])
def test_torch_gets_threads_for_a_large_attention_of_its_own_only(
    family: str, wanted: int, store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_SMALL_ATTENTION", 100)
    before, seen = torch.get_num_threads(), []
    with runner(store(family, "none"), "float") as made:
        torch.set_num_threads(2)
        loop = StepLoop(made.model, None, frozenset())
        hook = made.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        run(loop, GenerationRequest("r", tuple(range(3, 23)), 2))
        hook.remove()
    torch.set_num_threads(before)
    assert seen == [wanted, 1]


def test_logits_of_a_whole_sequence_change_nothing_that_runs(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    request = request_of(PROMPTS[0], 6)
    expected = tokens_of(run(make_loop(), request))
    loop = make_loop()
    loop.add(request)
    events = loop.step() + loop.step()
    logits = loop.logits([*request.prompt_ids, *expected])
    assert logits.dtype == torch.float32
    assert logits[len(request.prompt_ids) - 1 : -1].argmax(-1).tolist() == expected
    while not loop.is_idle:
        events += loop.step()
    assert tokens_of(events) == expected


# ------------------------------------------------------------------------------------------- rates


def test_rates_count_what_was_computed() -> None:
    usage = Usage(prompt_tokens=100, cached_tokens=60, completion_tokens=11)
    assert Timings(prefill_s=2.0, decode_s=5.0).prefill_rate(usage) == 20.0
    assert Timings(prefill_s=2.0, decode_s=5.0).decode_rate(usage) == 2.0
    assert Timings(0.0, 0.0).prefill_rate(usage) == Timings(0.0, 0.0).decode_rate(usage) == 0.0
