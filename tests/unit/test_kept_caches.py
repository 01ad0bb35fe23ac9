"""KV caches of the step loop: kept and shared ones, what they forget, and their budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.loops import PROMPTS, drive, end_of, run, text_of, tokens_of
from helpers.reference import runner

from moray.runtime.errors import RequestError
from moray.runtime.generation.kv import KVCache
from moray.runtime.generation.kv_pool import BLOCK_TOKENS, KEPT_CACHES
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.step_loop import StepLoop
from moray.runtime.planning.profile import SequenceMemory

# ------------------------------------------------------------------------------------- kept caches


def test_a_second_turn_computes_only_what_is_new(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    loop = make_loop()
    first = request_of(PROMPTS[0], 10)
    answer = tokens_of(run(loop, first))
    turn = request_of([*first.prompt_ids, *answer, *request_of(PROMPTS[1]).prompt_ids[1:]], 10)
    again, fresh = run(loop, turn), run(make_loop(), turn)
    assert end_of(again).usage.cached_tokens == len(first.prompt_ids) + 9  # its last token was never computed
    assert end_of(fresh).usage.cached_tokens == 0
    assert tokens_of(again) == tokens_of(fresh) and text_of(again) == text_of(fresh)


def test_the_same_prompt_again_computes_its_last_tokens_only(
    loop: StepLoop, request_of: Callable[..., GenerationRequest]
) -> None:
    request = request_of(PROMPTS[0], 6)
    one, other = run(loop, request), run(loop, request)
    # Two: a single one would be computed as a step, not as a part of a prompt.
    assert end_of(other).usage.cached_tokens == len(request.prompt_ids) - 2
    assert tokens_of(one) == tokens_of(other)


def test_a_prompt_that_parts_ways_reuses_what_is_common(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    loop = make_loop()
    run(loop, request_of([0, 10, 11, 12, 13, 14], 8))
    other = request_of([0, 10, 11, 99, 98, 97, 96], 8)
    reused = run(loop, other)
    assert end_of(reused).usage.cached_tokens == 3
    assert tokens_of(reused) == tokens_of(run(make_loop(), other))
    unrelated = request_of([5, 6, 7], 8)
    assert end_of(run(loop, unrelated)).usage.cached_tokens == 0


def test_a_cache_that_cannot_be_copied_is_moved_for_those_that_use_most_of_it(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of indexed attention, whose layers know nothing of copies."""
    monkeypatch.setattr(KVCache, "can_copy", False)
    loop, first = make_loop(), request_of([0, *range(10, 30)], 2)
    answer = tokens_of(run(loop, first))
    for prompt, cached in (([0, 10, 99, 98], 0), ([0, *range(10, 28), 97], 18), ([0, *range(10, 15), 96, 95], 0)):
        request = request_of(prompt, 6)
        reused = run(loop, request)
        assert end_of(reused).usage.cached_tokens == cached
        assert tokens_of(reused) == tokens_of(run(make_loop(), request))
    assert tokens_of(run(loop, first)) == answer


def test_a_prompt_is_computed_once_for_all_that_share_it(
    loop: StepLoop, request_of: Callable[..., GenerationRequest]
) -> None:
    """Those that come while it is computed are served from a running sequence's cache."""
    first = request_of(PROMPTS[0], 6)
    both = drive(loop, replace(first, request_id="a"), replace(first, request_id="b"))
    assert [end_of(both[name]).usage.cached_tokens for name in "ab"] == [0, len(first.prompt_ids) - 2]
    assert tokens_of(both["a"]) == tokens_of(both["b"])


def test_only_the_last_caches_are_kept(loop: StepLoop, request_of: Callable[..., GenerationRequest]) -> None:
    requests = [request_of([100 + i] * 10, 1) for i in range(KEPT_CACHES + 1)]
    for request in requests:
        run(loop, request)
    cached = [end_of(run(loop, request)).usage.cached_tokens for request in reversed(requests)]
    assert cached == [8] * KEPT_CACHES + [0]


def test_a_cancelled_requests_cache_is_sound(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    request = request_of(PROMPTS[0], 12)
    expected = tokens_of(run(make_loop(), request))
    loop = make_loop()
    loop.add(request)
    for _ in range(4):
        loop.step()
    loop.cancel("r")
    loop.step()
    again = run(loop, request)
    assert tokens_of(again) == expected and end_of(again).usage.cached_tokens == len(request.prompt_ids) - 2


@pytest.mark.parametrize(("family", "cached"), [("mixtral", 20), ("gpt_oss", 0), ("jamba", 0)])
def test_what_a_cache_has_forgotten_is_computed_again(family: str, cached: int, store: Callable[..., Path]) -> None:
    """Windows and states cannot go back to an earlier token."""
    prompt = [3 + (7 * i * i) % 180 for i in range(40)]
    other = [*prompt[:20], 5, 6, 7, 8]
    with runner(store(family, "none"), "float") as made:
        loops = [StepLoop(made.model, None, frozenset()) for _ in range(2)]
        run(loops[0], GenerationRequest("r", tuple(prompt), 4))
        events = [run(loop, GenerationRequest("r", tuple(other), 6)) for loop in loops]
    assert end_of(events[0]).usage.cached_tokens == cached
    assert tokens_of(events[0]) == tokens_of(events[1])


# ------------------------------------------------------------------------------------------ budgets

A_TOKEN = SequenceMemory(0, 6144, (), can_chunk=True)  # the demonstration model's: 6 layers, 2 x 2 heads of 64


def budget(tokens: int) -> dict[str, Any]:
    return {"kv_bytes": tokens * 6144, "sequence": A_TOKEN}


def test_requests_wait_for_room_in_their_order(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    """The second does not fit beside the first; the third would, and does not overtake."""
    requests = [request_of([7] * 120, 8, "a"), request_of([8] * 150, 10, "b"), request_of([9] * 4, 4, "c")]
    expected = drive(make_loop(), *requests)
    loop = make_loop(**budget(4 * BLOCK_TOKENS))
    seen = drive(loop, *requests)
    assert list(seen) == ["a", "b", "c"] and loop.stats().preemptions == 0
    assert {name: tokens_of(events) for name, events in seen.items()} == {
        name: tokens_of(events) for name, events in expected.items()
    }


def test_the_oldest_kept_caches_make_room(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    loop = make_loop(**budget(3 * BLOCK_TOKENS))
    for first in (7, 8, 9):
        run(loop, request_of([first] * 18, 2))
    run(loop, request_of([10] * 28, 2))
    cached = [end_of(run(loop, request_of([first] * 18, 2))).usage.cached_tokens for first in (9, 7)]
    assert cached == [16, 0]


def test_a_prompt_beyond_the_planned_context_is_refused_with_both_numbers(
    make_loop: Callable[..., StepLoop], request_of: Callable[..., GenerationRequest]
) -> None:
    loop = make_loop(context_length=32, **budget(32))
    assert loop.context_length == 32
    with pytest.raises(RequestError, match=r"prompt has 32 tokens, .* holds 32 .the model's own 2048.*--context"):
        loop.check(request_of([7] * 32, 1))
    assert len(tokens_of(run(loop, request_of([7] * 31, 99)))) == 1
