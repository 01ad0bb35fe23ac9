"""A stream that is taken up again after any of its tokens goes on as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
import torch
from helpers.reference import runner
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.runtime.errors import RequestError
from moray.runtime.generation.request import GenerationRequest, SamplingParams, TokenEvent
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.sampler import Sampler

_names = count()
SAMPLINGS = [SamplingParams(), SamplingParams(1.0, seed=5), SamplingParams(1.5, top_p=0.9, top_k=50, seed=-3)]


def run(runner: Runner, request: GenerationRequest) -> list[TokenEvent]:
    return list(runner.stream(replace(request, request_id=f"replay-{next(_names)}")))


def tokens_of(events: list[TokenEvent]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["import os\n", "# naïve café über\nprint('é", "def read(path):\n    "]),
    st.sampled_from(SAMPLINGS),
    st.sampled_from([(), ("\n\n",), ("return", ")\n")]),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_the_rest_of_a_stream_is_the_same(demo_runner, prompt, sampling, stop, limit, random) -> None:  # type: ignore[no-untyped-def]
    request = GenerationRequest("whole", demo_runner.encode(prompt), limit, sampling, stop)
    whole = run(demo_runner, request)
    cut = random.randrange(len(whole))
    given_before = tokens_of(whole[:cut])
    rest = run(demo_runner, replace(request, generated=given_before))
    assert given_before + tokens_of(rest) == tokens_of(whole)
    assert text_of(whole[:cut]) + text_of(rest) == text_of(whole)
    assert rest[-1].finished is not None and whole[-1].finished is not None
    assert rest[-1].finished.reason == whole[-1].finished.reason
    assert rest[-1].finished.usage.completion_tokens == whole[-1].finished.usage.completion_tokens


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])  # whole prompts only; attention of transformers' own
def test_replayed_tokens_leave_the_state_that_they_had(family: str, store) -> None:  # type: ignore[no-untyped-def]
    with runner(store(family, "none"), "float") as made:
        request = GenerationRequest("whole", tuple(range(3, 40)), 24, SamplingParams(2.0, seed=1))
        whole = tokens_of(run(made, request))
        for cut in (1, 11, 23):
            assert whole[:cut] + tokens_of(run(made, replace(request, generated=whole[:cut]))) == whole


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(2, 3000), st.floats(0.1, 3))
def test_a_sampler_goes_on_after_what_was_drawn(num_drawn: int, vocabulary: int, temperature: float) -> None:
    params = SamplingParams(temperature, top_p=0.95, seed=num_drawn)
    torch.manual_seed(vocabulary)
    logits = torch.randn(num_drawn + 5, vocabulary)
    first, second = Sampler(params), Sampler(params, num_drawn=num_drawn)
    drawn = [first.sample([0], row) for row in logits]
    assert [second.sample([0], row) for row in logits[num_drawn:]] == drawn[num_drawn:]


def test_more_than_is_wanted_cannot_have_been_generated() -> None:
    with pytest.raises(RequestError, match=r"4 tokens are generated already, expected fewer than max_new_tokens \(4\)"):
        GenerationRequest("r", (1,), 4, generated=(1, 2, 3, 4))
