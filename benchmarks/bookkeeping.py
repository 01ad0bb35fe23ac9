"""What residency costs when everything is resident: decoding from a host's arena against private memory.

    python benchmarks/bookkeeping.py                    # the demonstration model: the smallest experts, the worst case
    python benchmarks/bookkeeping.py /tmp/qwen --threads 2 --pairs 7

Both sides run in this process, with the same kernels and the same store:
- *private*: ``Runner`` over ``InProcessSource``: addresses that never move, nobody to tell;
- *arena*: ``Runner`` over ``ArenaSource`` and a host that holds all experts in its arena, as an engine has it.

*A pair*: each side decodes ``--tokens`` tokens after a prompt of 16 that is not counted; sides take turns to be first.
*bookkeeping* is arena / private - 1 of the seconds a token, the median over pairs; the goal is less than 3 %.
*leases*: the arena's own clock for looking leases up and checking them, as a share of its decode time.
*messages*: what the host was sent meanwhile; the goal is none.
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from common import describe_machine, print_table

from moray.cluster.arena_source import ArenaSource
from moray.cluster.client import HostAddress
from moray.cluster.server import DataPlaneServer
from moray.deploy.config import demo_store
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.experts.source import ExpertSource, InProcessSource
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels.pool import set_num_threads
from moray.runtime.memory import reuse_freed_memory
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store

GOAL = 0.03
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Arena:
    host: ShardHost
    source: ArenaSource
    server: DataPlaneServer


@contextmanager
def arena_of(store: Store, threads: int, **options: Any) -> Iterator[Arena]:
    """A host with all experts, in threads of this process: idle ones, once it is attached. ``options``: ShardHost's."""
    address = HostAddress("host", f"ipc://@moray-bookkeeping-{os.getpid()}", secrets.token_hex(8))
    host = ShardHost(store, list(store.manifest.shards), threads, **options)
    server = DataPlaneServer(address.host_id, host, address.address, address.token)
    source = ArenaSource(store, [address])
    try:
        host.wait_filled()
        yield Arena(host, source, server)
    finally:
        source.close()
        server.close()
        host.close()


@contextmanager
def runner_of(store: Store, source: ExpertSource) -> Iterator[Runner]:
    runner = Runner(store, source, load_model(store, "int8", torch.device("cpu")))
    try:
        yield runner
    finally:
        runner.close()


def decode_s(runner: Runner, first: int, tokens: int) -> float:
    """Seconds a token, from the first in this thread's hands to the last."""
    prompt = tuple(range(first, first + _PROMPT_TOKENS))
    times = [perf_counter() for _ in runner.stream(GenerationRequest(secrets.token_hex(4), prompt, tokens + 1))]
    return (times[-1] - times[0]) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=demo_store())
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    set_num_threads(arguments.threads)
    reuse_freed_memory()
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(arguments.store))
        arena = stack.enter_context(arena_of(store, arguments.threads))
        sides = {
            "private": stack.enter_context(runner_of(store, InProcessSource(store))),
            "arena": stack.enter_context(runner_of(store, arena.source)),
        }
        for runner in sides.values():
            decode_s(runner, 3, arguments.tokens)
        sent, before = arena.server.stats.requests, sides["arena"].stats()
        found: dict[str, list[float]] = {name: [] for name in sides}
        for pair in range(arguments.pairs):
            for name in list(sides)[:: 1 if pair % 2 else -1]:
                found[name].append(decode_s(sides[name], 3 + pair, arguments.tokens))
        sent, after = arena.server.stats.requests - sent, sides["arena"].stats()
    print(f"{describe_machine()}\n{arguments.store}, {arguments.threads} threads, {arguments.pairs} pairs\n")
    rows = [(name, *(f"{1e3 * f(times):.3f}" for f in (median, min, max))) for name, times in found.items()]
    print_table(("decode, ms a token", "median", "lowest", "highest"), rows)
    ratio = median(a / p for a, p in zip(found["arena"], found["private"], strict=True)) - 1
    leases = (after.lease_s - before.lease_s) / (sum(found["arena"]) * arguments.tokens)
    print(f"\nbookkeeping {ratio:+.1%} (goal: less than {GOAL:.0%}), leases {leases:.2%}, messages {sent}")


if __name__ == "__main__":
    main()
