"""Requests along replayed texts with an engine's counters around them: for offload.py and ablation.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capped import Counters, Options, open_engine, read_counters
from peer_sides import Moray, Run
from replay import Replay

import moray

DECODE = "decode"


@dataclass(frozen=True)
class Sample:
    """One measured request. ``seconds``, ``counters``: of one decoded token, or of a whole prompt."""

    phase: str
    first_id: int
    seconds: float
    num_units: int  # what ``counters`` is the sum of: tokens, or 1
    counters: Counters
    distinct_experts: int  # of a prompt, each counted once

    def per_unit(self, name: str) -> float:
        value: float = getattr(self.counters, name)
        return value / self.num_units


@dataclass(frozen=True)
class Ask:
    """A decode of so many tokens after a prompt, or (1) a prefill."""

    prompt: tuple[int, ...]
    count: int

    @property
    def phase(self) -> str:
        return DECODE if self.count > 1 else f"prefill {len(self.prompt)}"


def run_all(
    store: Path, options: Options, threads: int, warm: Sequence[Ask], asks: Sequence[Ask], replay: Replay
) -> list[Sample]:
    """An engine from start to end: requests that are not counted, then those that are."""
    with open_engine(store, options, threads) as engine:
        for ask in warm:
            _check(ask, Moray(engine, -1).generate(ask.prompt, ask.count))
        return [measure(engine, ask, replay) for ask in asks]


def measure(engine: moray.Engine, ask: Ask, replay: Replay) -> Sample:
    """A decode's prompt is computed by a request of its own before, and its KV cache is used: only steps with one token
    lie between the two readings of the counters."""
    side = Moray(engine, -1)
    is_decode = ask.count > 1
    if is_decode:
        side.stream(ask.prompt, 1)
    before = read_counters(engine)
    run, _ = side.stream(ask.prompt, ask.count)
    counters = read_counters(engine) - before
    _check(ask, run)
    seconds = run.later_s / (ask.count - 1) if is_decode else run.first_s
    distinct = sum(map(len, replay.distinct(ask.prompt[0], len(ask.prompt))))
    return Sample(ask.phase, ask.prompt[0], seconds, ask.count if is_decode else 1, counters, distinct)


def _check(ask: Ask, run: Run) -> None:
    first = ask.prompt[-1] + 1
    if run.ids != tuple(range(first, first + ask.count)):
        raise SystemExit(f"moray: the tokens after {first - 1} are {run.ids[:8]}..., not {first}, {first + 1}, ...")
