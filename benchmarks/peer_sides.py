"""The two sides of peer.py, moray through its actors and llama.cpp in a process, behind one interface."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Protocol

import psutil
from peer_client import Peer

import moray
from moray.runtime.generation.request import Finished


@dataclass(frozen=True)
class Run:
    """One request, in seconds from the asking side's call."""

    first_s: float  # to the first token
    later_s: float  # from the first token to the last
    ids: tuple[int, ...]


class Side(Protocol):
    """Something that generates greedily and is idle otherwise."""

    name: str

    def generate(self, prompt: Sequence[int], count: int) -> Run:
        """``count`` tokens. Computes the whole prompt: nothing of earlier requests may be used."""
        ...

    def cpu_s(self) -> float:
        """CPU time of its processes so far."""
        ...


class LlamaCpp:
    """llama.cpp: seconds are of ``llama_decode`` and of taking the largest logit, without the pipe."""

    name = "llama.cpp"

    def __init__(self, peer: Peer) -> None:
        self._peer, self._process = peer, psutil.Process(peer.pid)

    def generate(self, prompt: Sequence[int], count: int) -> Run:
        answer = self._peer.request("generate", ids=list(prompt), count=count)
        first, *later = answer["seconds"]
        return Run(first, sum(later), tuple(answer["ids"]))

    def cpu_s(self) -> float:
        return _cpu_s(self._process)


@dataclass(frozen=True)
class Breakdown:
    """Where a phase's time went, in milliseconds: a token of decode, or a whole prompt. Means of some requests."""

    kernel: float  # the experts' products
    grouping: float
    lease: float
    rest: float  # of the step loop: trunk, router, Python, sampling
    delivery: float  # from the step loop to the caller, through Ray

    @property
    def total(self) -> float:
        return self.kernel + self.grouping + self.lease + self.rest + self.delivery


class Moray:
    """An engine, from the caller's side of Ray."""

    name = "moray"

    def __init__(self, engine: moray.Engine, peer_pid: int) -> None:
        self._engine, self._peer_pid = engine, peer_pid

    def generate(self, prompt: Sequence[int], count: int) -> Run:
        run, finished = self.stream(prompt, count)
        assert finished.usage.cached_tokens == 0, f"{finished.usage.cached_tokens} tokens of the prompt were kept"
        return run

    def cpu_s(self) -> float:
        """Of this program and everything it started, Ray's own processes included, except the peer."""
        here = psutil.Process()
        processes = [here, *here.children(recursive=True)]
        return sum(_cpu_s(process) for process in processes if process.pid != self._peer_pid)

    def breakdown(self, prompts: Sequence[Sequence[int]], count: int) -> Breakdown:
        """By the engine's own clocks. With more than one token, only of steps with one token."""
        parts = [0.0] * 5
        for prompt in prompts:
            if count > 1:
                self.stream(prompt, 1)  # its KV cache is kept
            before = self._engine.stats().experts
            run, finished = self.stream(prompt, count)
            after = self._engine.stats().experts
            loop_s = finished.timings.prefill_s + finished.timings.decode_s
            spent = [getattr(after, name) - getattr(before, name) for name in ("compute_s", "group_s", "lease_s")]
            delivery_s = run.first_s + run.later_s - loop_s
            for i, seconds in enumerate([*spent, loop_s - sum(spent), delivery_s]):
                parts[i] += 1000 * seconds / (count * len(prompts))
        return Breakdown(*parts)

    def tokens_per_expert(self) -> list[list[int]]:
        return self._engine.stats().experts.tokens_per_expert

    def stream(self, prompt: Sequence[int], count: int) -> tuple[Run, Finished]:
        """As ``generate``, but what earlier requests left may be used."""
        started = perf_counter()
        times: list[float] = []
        ids: list[int] = []
        finished: Finished | None = None
        for event in self._engine.stream(list(prompt), max_new_tokens=count):
            times.append(perf_counter())
            ids += event.token_ids
            finished = event.finished
        assert finished is not None and len(ids) == count and len(times) <= count
        return Run(times[0] - started, times[-1] - times[0], tuple(ids)), finished


class Watch:
    """How much of this machine's CPU time goes to neither side."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides
        self.restart()

    def restart(self) -> None:
        self._started, self._others_s = perf_counter(), self._read()

    def others(self) -> float:
        """Their share of all cores since the last restart."""
        cores = os.cpu_count() or 1
        return max(0.0, (self._read() - self._others_s) / (cores * (perf_counter() - self._started)))

    def wait(self, share: float, patience_s: float) -> float:
        """Sleep until they took at most so much for a second, or patience ends. Returns what is left of it."""
        until = perf_counter() + patience_s
        while perf_counter() < until:
            self.restart()
            sleep(1)
            if self.others() <= share:
                break
        return max(0.0, until - perf_counter())

    def _read(self) -> float:
        return _busy_s() - sum(side.cpu_s() for side in self._sides)


def _busy_s() -> float:
    """CPU time that all processes of this machine took so far, and its host took away."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
