"""Models whose experts do not all fit their hosts' arenas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from helpers.hosts import cluster_of

from moray.cluster.arena_source import ArenaSource
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.packed import Numerics
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store


@dataclass
class Capped:
    """Hosts in this process, what reads from them over the data plane, and a model on top."""

    hosts: list[ShardHost]
    source: ArenaSource
    runner: Runner


@contextmanager
def capped(store: Store, num_slots: int, num_hosts: int = 1, numerics: Numerics = "int8") -> Iterator[Capped]:
    """``num_slots``: of each host."""
    with hosts_and_source(store, num_slots, num_hosts) as (hosts, source):
        runner = Runner(store, source, load_model(store, numerics, torch.device("cpu")), numerics)
        try:
            yield Capped(hosts, source, runner)
        finally:
            runner.close()


@contextmanager
def hosts_and_source(
    store: Store, num_slots: int, num_hosts: int = 1, **options: Any
) -> Iterator[tuple[list[ShardHost], ArenaSource]]:
    with cluster_of(store, num_hosts, num_slots=num_slots, **options) as hosts:
        source = ArenaSource(store, [address for address, _ in hosts])
        try:
            yield [host for _, host in hosts], source
        finally:
            source.close()
            for _, host in hosts:
                host._manager.validate()
