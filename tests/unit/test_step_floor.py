"""The least that a decoded token takes (benchmarks/step_floor.py), against counts and sums by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        names = ("step_floor", "replay", "offload_runs")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_reads_hide_only_behind_the_other_experts_of_their_layer(benchmarks: SimpleNamespace) -> None:
    times = benchmarks.step_floor.Times(read_s=5.0, compute_s=4.0, rest_s=100.0)
    hidden = benchmarks.step_floor.Times(read_s=1.0, compute_s=4.0, rest_s=100.0)
    assert times.step_s(np.array([0, 0]), active=2) == 108  # two layers in memory
    assert times.step_s(np.array([1, 0]), active=2) == 100 + (5 + 2) + 4
    assert times.step_s(np.array([2, 1]), active=2) == 100 + (10 + 2) + (5 + 2)
    assert hidden.step_s(np.array([2, 1]), active=2) == 108  # behind one expert's computing, which is 2


def _replay(benchmarks: SimpleNamespace, chosen: list[list[int]], predicted: list[list[int]]) -> object:
    """One layer-pair model: layer 0 always chooses expert 0, layer 1 what is given."""
    chosen_TLK = np.zeros((len(chosen), 2, len(chosen[0])), dtype=np.int16)
    chosen_TLK[:, 1] = chosen
    ahead_TLK = np.full_like(chosen_TLK, -1)
    ahead_TLK[:, 1] = predicted
    return benchmarks.replay.Replay(4, chosen_TLK, (0, len(chosen)), ("made up",), {1: ahead_TLK})


def test_misses_of_the_decode_alone_are_counted_and_those_predicted(benchmarks: SimpleNamespace) -> None:
    chosen = [[0], [1], [1], [2], [3], [3], [0]]
    predicted = [[-1], [0], [1], [2], [0], [3], [-1]]
    replay = _replay(benchmarks, chosen, predicted)
    prompt, decode = (benchmarks.offload_runs.Ask(*ask) for ask in (((0, 1), 1), ((2, 3), 4)))
    found = benchmarks.step_floor.replay_misses([prompt, decode], replay, num_slots=8)  # nothing is evicted
    assert found.missed_TL.tolist() == [[0, 1], [0, 0], [0, 0]]  # of tokens 4, 5, 6: only expert 3 is new
    assert found.foreseen_TL.tolist() == [[0, 0], [0, 0], [0, 0]]  # predicted was expert 0 of layer 1, in memory

    predicted[4] = [3]
    found = benchmarks.step_floor.replay_misses([prompt, decode], _replay(benchmarks, chosen, predicted), num_slots=8)
    assert found.foreseen_TL.tolist() == [[0, 1], [0, 0], [0, 0]]
    times = benchmarks.step_floor.Times(read_s=9.0, compute_s=2.0, rest_s=1.0)
    assert found.floors(times, active=1) == ((1 + 2 + 11 + 5 + 5) / 3, 5.0)
