"""CPU time that an engine takes while nobody asks anything of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter, sleep

import psutil

from moray.actors.wiring import Actors

_ACTOR_TITLES = ("ray::ComputeActor", "ray::ExpertHost", "ray::Orchestrator")


@dataclass(frozen=True, slots=True)
class IdleCpu:
    """Cores kept busy, on average: 0.01 is one percent of one core."""

    seconds: float
    actors: float  # compute, hosts, orchestrator
    ray: float  # Ray's processes of this engine's session; 0 for a joined cluster, whose processes are not ours
    num_processes: int


def measure_idle_cpu(actors: Actors, seconds: float) -> IdleCpu:
    """Sum over the processes of an engine on this machine, this one left out, for so long."""
    ours = {actors.compute_report.pid, *(report.pid for report in actors.host_reports)}
    processes = psutil.Process().children(recursive=True)
    processes += [psutil.Process(pid) for pid in ours - {p.pid for p in processes} if psutil.pid_exists(pid)]
    actor_pids = {p.pid for p in processes if p.pid in ours or _is_actor(p)}
    before, started = _cpu_seconds(processes), perf_counter()
    sleep(seconds)
    after, taken = _cpu_seconds(processes), perf_counter() - started
    busy = {pid: (after[pid] - before[pid]) / taken for pid in after.keys() & before.keys()}
    return IdleCpu(
        seconds=taken,
        actors=sum(share for pid, share in busy.items() if pid in actor_pids),
        ray=sum(share for pid, share in busy.items() if pid not in actor_pids),
        num_processes=len(busy),
    )


def _is_actor(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any(word.startswith(_ACTOR_TITLES) for word in process.cmdline())
    return False


def _cpu_seconds(processes: Iterable[psutil.Process]) -> dict[int, float]:
    found = {}
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found
