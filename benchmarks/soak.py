"""Continuous generation with a fault every so often: no wrong token, and nothing that grows.

    python benchmarks/soak.py --minutes 30 --every 30
    python benchmarks/soak.py --nodes 2                 # as root: with another node (two_nodes.py)

Answers follow each other without a break, greedy and sampled in turn; every ``--every`` seconds one is struck by the
next fault. Memory (RSS), descriptors and threads of every actor are read when the engine is whole again, and of each
actor's process from its second reading on (the first requests allocate). *growth*: the largest reading over the first
of the same process; a process that a fault replaced is another one. Ends with status 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter

import psutil
from common import describe_machine, print_table
from fault_injection import PROMPT, SAMPLINGS, Fault, generate_struck, pid_of
from faults import launched

from moray.deploy.engine import Engine
from moray.runtime.memory import format_bytes


@dataclass(frozen=True)
class Reading:
    """One process at one time."""

    rss_bytes: int
    num_descriptors: int
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> Reading:
        process = psutil.Process(pid)
        with process.oneshot():
            return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass
class Soaked:
    """What a run found."""

    num_answers: int
    num_wrong: int
    stalls: dict[str, list[float]]  # by fault
    readings: dict[str, list[Reading]]  # by actor and pid, and of this process
    num_events: int


def processes(engine: Engine) -> dict[str, int]:
    actors = engine.actors
    named = {"compute": actors.compute, "orchestrator": actors.orchestrator}
    named |= {report.host_id: host for report, host in zip(actors.host_reports, actors.hosts, strict=True)}
    named |= {f"remote host {number}": host for number, host in enumerate(actors.remote_hosts())}
    return {"driver": psutil.Process().pid} | {name: pid_of(actor) for name, actor in named.items()}


def soak(
    engine: Engine, faults: Sequence[Fault], duration_s: float, every_s: float, num_tokens: int, random: Random
) -> Soaked:
    """Generate for so long, struck by all faults in turn."""
    options = [{"max_new_tokens": num_tokens} | sampling for sampling in SAMPLINGS]
    expected = [engine.generate(PROMPT, **each) for each in options]
    found = Soaked(0, 0, defaultdict(list), defaultdict(list), 0)
    started, next_fault_s, num_faults = perf_counter(), perf_counter() + every_s, 0
    while perf_counter() - started < duration_s:
        which = found.num_answers % len(options)
        if perf_counter() < next_fault_s:
            answer = engine.generate(PROMPT, **options[which])
        else:
            next_fault_s += every_s
            fault = faults[num_faults % len(faults)]
            num_faults += 1
            answer = generate_struck(engine, fault, random, **options[which])
            found.stalls[fault.name].append(answer.stall_s)
            gc.collect()
            for name, pid in processes(engine).items():
                found.readings[f"{name} {pid}"].append(Reading.of(pid))
        found.num_answers += 1
        found.num_wrong += (answer.token_ids, answer.text) != (expected[which].token_ids, expected[which].text)
    found.num_events = len(engine.events())
    return found


def report(found: Soaked) -> None:
    print(f"{found.num_answers} answers, {found.num_wrong} wrong, {found.num_events} events kept\n")
    rows = [[name, str(len(stalls)), f"{max(stalls):.2f}"] for name, stalls in found.stalls.items()]
    print_table(["fault", "times", "worst stall s"], rows)
    rows = []
    for name, readings in found.readings.items():
        settled = readings[1:]
        if len(settled) < 2:
            continue
        first, grown = settled[0], max(reading.rss_bytes for reading in settled) - settled[0].rss_bytes
        counts = [(getattr(first, n), max(getattr(r, n) for r in settled)) for n in ("num_descriptors", "num_threads")]
        rows.append([name, str(len(readings)), format_bytes(first.rss_bytes), format_bytes(max(grown, 0))])
        rows[-1] += [f"{before} -> {most}" for before, most in counts]
    print()
    print_table(["process", "readings", "RSS", "growth", "descriptors", "threads"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a converted checkpoint; none: the demonstration model")
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=30, help="seconds between two faults")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--host-memory", default="6MiB", help="of all arenas")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with launched(arguments.nodes, arguments.store, arguments.host_memory) as (engine, faults):
        times = 60 * arguments.minutes, arguments.every
        found = soak(engine, faults, *times, arguments.tokens, Random(arguments.seed))
    print(describe_machine())
    report(found)
    sys.exit(1 if found.num_wrong else 0)


if __name__ == "__main__":
    main()
