from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moray.runtime.experts.watch import LayerWatch
from moray.runtime.prefetch.host import HostPrefetch
from moray.runtime.prefetch.odds import PredictionOdds
from moray.runtime.prefetch.predictor import Prediction

LAYER_OF = [0, 0, 0, 0, 1, 1, 1, 1]


def test_predictions_of_what_was_not_used_for_long_are_learned_to_be_wrong() -> None:
    """Expert 0 is used every other call, 1 never; both are predicted each time that 0 was not used just before."""
    odds = PredictionOdds(LAYER_OF)
    for _ in range(40):
        odds.used([0, 2])
        odds.used([2, 3])
        odds.predicted([0, 1])
    assert odds.are_good(0) and not odds.are_good(1)
    odds.used([0, 1])
    odds.predicted([1])  # it was used just now: another kind
    assert odds.are_good(1)


def test_ranks_are_told_apart() -> None:
    """Of experts that were used just now, which the likeliest never was."""
    odds = PredictionOdds(LAYER_OF)
    for _ in range(40):
        odds.predicted([0, 1, 2])
        odds.used([0])
        odds.used([1, 2])
    odds.predicted([2, 1])
    assert [odds.are_good(expert) for expert in (2, 1)] == [True, False]


def test_decoding_says_nothing_about_prompts() -> None:
    odds = PredictionOdds([0] * 64)
    for _ in range(100):
        odds.predicted([1])
        odds.used([0])
    odds.predicted([1])
    assert not odds.are_good(1)
    odds.predicted(list(range(1, 64)))  # a prompt's
    assert odds.are_good(1) and odds.are_good(63)


def test_what_was_not_predicted_and_what_is_new_is_good() -> None:
    odds = PredictionOdds(LAYER_OF)
    assert odds.are_good(5)
    odds.predicted([5])
    assert odds.are_good(5)
    odds.predicted([])


def test_odds_recover() -> None:
    odds = PredictionOdds(LAYER_OF)
    for _ in range(200):
        odds.predicted([1])
        odds.used([0])
    odds.predicted([1])
    assert not odds.are_good(1)
    calls = 0
    while not odds.are_good(1):
        odds.used([2, 1])  # it came true, though nobody loaded it
        for _ in range(1 << 8):
            odds.used([2])
        odds.predicted([1])
        calls += 1
        assert calls < 60


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 3), min_size=1), st.integers(0, 1)), max_size=60))
def test_a_layer_is_judged_by_its_own_calls(events: list[tuple[bool, set[int], int]]) -> None:
    """What happens in the other layer changes no answer."""
    alone, both = PredictionOdds(LAYER_OF), PredictionOdds(LAYER_OF)
    for is_prediction, chosen, layer in events:
        experts = [4 * layer + expert for expert in sorted(chosen)]
        for odds in (both, alone) if layer == 0 else (both,):
            (odds.predicted if is_prediction else odds.used)(experts)
    kinds = [odds._open.get(0) for odds in (alone, both)]
    assert kinds[0] == kinds[1]


def test_a_host_loads_what_is_likely_and_counts_the_rest() -> None:
    """With a disk that has time for all of it."""
    now = iter(range(1_000_000))
    prefetch = HostPrefetch("on", LAYER_OF, [1000] * 8, clock=lambda: float(next(now)) / 4)
    prefetch.read(1_000_000, 1.0)
    admitted = []
    for _ in range(60):
        for _ in range(2):
            prefetch.used([4, 5])
        prefetch.hinted([6, 7])
        admitted.append((prefetch.admit(6), prefetch.admit(7)))
        prefetch.used([4, 6])
        prefetch.used([5, 4])
    assert admitted[-1] == (True, False)
    assert prefetch.stats().num_unlikely > 40
    prefetch.hinted([])
    assert prefetch.admit(3)  # asked for, not predicted


def test_hints_are_for_the_next_layer_only() -> None:
    """What is predicted for later ones, for a trace, is no hint."""

    class Ahead:
        def predict(self, layer: int, x_TH: torch.Tensor) -> list[Prediction]:
            return [Prediction(layer + ahead, np.array([ahead])) for ahead in (1, 2)]

    class Source:
        wants_hints = True

        def hint(self, layer: int, experts: list[int]) -> None:
            hints.append((layer, experts))

    hints: list[tuple[int, list[int]]] = []
    source: Any = Source()
    predictor: Any = Ahead()
    LayerWatch(source, predictor).before(3, torch.zeros(1, 4))
    assert hints == [(4, [1])]
