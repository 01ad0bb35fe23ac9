from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moray.runtime.errors import RequestError
from moray.runtime.generation.request import SamplingParams
from moray.runtime.generation.sampler import Sampler

LOGITS = torch.tensor([1.0, 3.0, 0.0, 2.5, -4.0])
finite = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32))


def draw(params: SamplingParams, logits: torch.Tensor, count: int) -> list[int]:
    sampler = Sampler(params)
    return [sampler.sample([0], logits) for _ in range(count)]


@settings(max_examples=50, deadline=None)
@given(finite)
def test_greedy_takes_the_lowest_id_of_the_largest(values: np.ndarray) -> None:
    assert draw(SamplingParams(), torch.from_numpy(values), 1) == [int(values.argmax())]
    assert draw(SamplingParams(temperature=0, seed=3, top_p=0.1), torch.from_numpy(values), 1) == [values.argmax()]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert draw(SamplingParams(), torch.tensor([1.0, 2.0, 2.0]), 1) == [1]
    assert draw(SamplingParams(), torch.tensor([1.0, 2.0, 2.0], dtype=torch.bfloat16), 1) == [1]


@settings(max_examples=50, deadline=None)
@given(finite, st.floats(0.05, 5), st.integers(-(2**63), 2**64 - 1))
def test_a_seed_is_repeatable(values: np.ndarray, temperature: float, seed: int) -> None:
    params = SamplingParams(temperature=temperature, seed=seed)
    logits = torch.from_numpy(values)
    assert draw(params, logits, 8) == draw(params, logits, 8)


def test_requests_without_a_seed_differ() -> None:
    flat = torch.zeros(1000)
    assert draw(SamplingParams(temperature=1.0), flat, 8) != draw(SamplingParams(temperature=1.0), flat, 8)


def test_other_seeds_and_global_state_give_other_and_the_same_tokens() -> None:
    flat = torch.zeros(1000)
    expected = draw(SamplingParams(temperature=1.0, seed=1), flat, 8)
    torch.manual_seed(5)
    assert draw(SamplingParams(temperature=1.0, seed=1), flat, 8) == expected
    assert draw(SamplingParams(temperature=1.0, seed=2), flat, 8) != expected


@settings(max_examples=50, deadline=None)
@given(finite.filter(lambda x: (x == x.max()).sum() == 1), st.floats(0.1, 100), st.integers(0, 9))
def test_top_k_of_1_is_greedy(values: np.ndarray, temperature: float, seed: int) -> None:
    params = SamplingParams(temperature=temperature, top_k=1, seed=seed)
    assert draw(params, torch.from_numpy(values), 3) == [int(values.argmax())] * 3


def test_top_k_keeps_the_k_most_likely() -> None:
    drawn = Counter(draw(SamplingParams(temperature=5.0, top_k=3, seed=0), LOGITS, 300))
    assert set(drawn) == {0, 1, 3} and min(drawn.values()) > 20
    assert set(draw(SamplingParams(temperature=50.0, top_k=99, seed=0), LOGITS, 300)) == set(range(5))


def test_top_p_keeps_the_most_likely_of_that_probability() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for top_p, kept in [(1e-9, {0}), (0.35, {0}), (0.45, {0, 1}), (0.75, {0, 1, 2}), (0.95, {0, 1, 2, 3}), (1, None)]:
        drawn = set(draw(SamplingParams(temperature=1.0, top_p=top_p, seed=0), probabilities.log(), 400))
        assert drawn == (kept or {0, 1, 2, 3}), top_p


@pytest.mark.parametrize("temperature", [0.5, 1, 1.0, 2])
def test_tokens_come_as_often_as_they_are_likely(temperature: float) -> None:
    count = 4000
    drawn = Counter(draw(SamplingParams(temperature=temperature, seed=0), LOGITS, count))
    for token, probability in enumerate((LOGITS / temperature).softmax(0).tolist()):
        assert drawn[token] / count == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert draw(SamplingParams(temperature=temperature, seed=0), LOGITS * 10, 20) == [1] * 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_taken(dtype: torch.dtype) -> None:
    assert draw(SamplingParams(temperature=0.01, seed=0), (LOGITS * 4).to(dtype), 5) == [1] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1, expected 0 \(greedy\) to 100"),
        ({"temperature": 101}, "temperature is 101"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0, expected more than 0 and at most 1"),
        ({"top_p": 1.01}, r"top_p is 1\.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, r"top_k is -1, expected a whole number, 0 \(all\) or more"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"seed": 2**64}, "seed is 18446744073709551616, expected a whole number of at most 64 bits"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
        ({"seed": 1.5}, r"seed is 1\.5"),
    ],
)
def test_what_cannot_be_sampled_is_refused_up_front(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**arguments)
