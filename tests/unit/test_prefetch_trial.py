"""Prefetch is kept only while steps are shorter with it: a trial on step times that a test makes up."""

from __future__ import annotations

import random

from moray.runtime.prefetch.trial import PrefetchTrial


def run(trial: PrefetchTrial, with_s: float, without_s: float, steps: int, seed: int = 0) -> float:
    """Share of steps with prefetch. Times vary by a fifth, batches change, prompts come between."""
    numbers, num_on = random.Random(seed), 0
    for _ in range(steps):
        num_tokens = numbers.choice((1, 1, 1, 4, 500))
        seconds = (with_s if trial.is_on else without_s) * (0.5 + 0.5 * num_tokens) * numbers.uniform(0.9, 1.1)
        num_on += trial.is_on
        trial.note_step(seconds, num_tokens)
    return num_on / steps


def test_it_is_off_most_of_the_time_where_it_costs_and_on_where_it_saves() -> None:
    costly, saving = PrefetchTrial(), PrefetchTrial()
    assert run(costly, 0.089, 0.066, 5000) < 0.1 and not costly.is_on
    assert "off: steps took 1.3" in costly.reason
    assert run(saving, 0.066, 0.089, 5000) > 0.9 and saving.is_on
    assert "on: steps took 0.7" in saving.reason


def test_it_is_tried_again_and_changes_with_the_system() -> None:
    trial = PrefetchTrial()
    run(trial, 0.089, 0.066, 1000)
    assert not trial.is_on
    run(trial, 0.066, 0.089, 8000)
    assert trial.is_on


def test_what_makes_no_difference_is_left_off() -> None:
    trial = PrefetchTrial()
    run(trial, 0.07, 0.07, 200, seed=3)
    assert not trial.is_on


def test_prompts_tell_nothing() -> None:
    trial = PrefetchTrial()
    for _ in range(1000):
        trial.note_step(1.0, 512)
    assert trial.is_on and trial.reason == "on, and being tried"
