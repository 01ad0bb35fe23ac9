"""An engine under a budget, and its counters: the one place where benchmarks touch what they need of both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

import psutil
from replay import predictions_file
from sampling import private_bytes

import moray
from moray.runtime.store.store import Store

#: Tells an engine's processes to take predictions from this file instead of the next layers' routers (replay.py).
PREDICTIONS_VARIABLE = "MORAY_REPLAYED_PREDICTIONS"
CONTEXT = 1024  # tokens: more than any request here has, and what llama.cpp is given


@dataclass(frozen=True)
class Options:
    """How an engine keeps its experts. ``arena_bytes`` None: all of them."""

    arena_bytes: int | None = None
    policy: str | None = None  # None: the engine's default
    prefetch: str | None = None
    replayed_predictions: bool = True  # else perfect ones, where choices are planted

    def __str__(self) -> str:
        parts = ["all resident" if self.arena_bytes is None else f"arena {self.arena_bytes / 2**30:.2f} GiB"]
        parts += [f"{name} {value}" for name in ("policy", "prefetch") if (value := getattr(self, name))]
        return ", ".join(parts)


@contextmanager
def open_engine(store: Path, options: Options, threads: int) -> Iterator[moray.Engine]:
    wanted: dict[str, Any] = {
        "host_memory": None if options.arena_bytes is None else f"{options.arena_bytes}B",
        "context": CONTEXT,
        "policy": options.policy,
        "prefetch": options.prefetch,
    }
    wanted = {name: value for name, value in wanted.items() if value is not None}
    missing = sorted(set(wanted) - set(signature(moray.launch).parameters))
    if missing:
        raise SystemExit(f"moray {moray.__version__} has no launch option {', '.join(missing)}: nothing to measure")
    with (
        _variable(PREDICTIONS_VARIABLE, _predictions(store, options)),
        moray.launch(store, hosts=1, device="cpu", threads=threads, **wanted) as engine,
    ):
        yield engine


def _predictions(store: Path, options: Options) -> str | None:
    path = predictions_file(store)
    return str(path.absolute()) if options.replayed_predictions and path.exists() else None


@contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@dataclass(frozen=True)
class Counters:
    """What an engine did so far. A *use* is one expert of one layer call."""

    uses: int
    misses: int  # uses whose expert was not in memory and was not on its way from a prefetch
    late: int  # uses that waited for a prefetch under way
    prefetched: int  # uses of what a prefetch brought, late ones included: the first use of each
    wasted: (
        int  # experts that a prefetch brought and that were contradicted or evicted unused, or whose load was given up
    )
    used_bytes: int
    missed_bytes: int  # of misses and of prefetched: what had to come from the disk
    read_bytes: int  # everything read from the disk, wasted reads included
    reading_s: float  # in which the disk had at least one read to do
    wait_s: float  # in which the step loop waited for experts
    compute_s: float  # of the experts' kernels
    layer_calls: int

    def __sub__(self, other: Counters) -> Counters:
        names = [field.name for field in fields(self)]
        return Counters(**{name: getattr(self, name) - getattr(other, name) for name in names})

    @property
    def hit_rate(self) -> float:
        """Of the cache alone: uses that neither missed nor were prefetched."""
        return 1 - (self.misses + self.prefetched) / self.uses if self.uses else 1.0


def read_counters(engine: moray.Engine) -> Counters:
    stats = engine.stats()
    with Store.open(engine.config.store_path) as store:
        shard_bytes = max(layer.layout.num_bytes for layer in store.manifest.layers)  # alike in these models
    prefetches = [host.prefetch for host in stats.hosts]
    late = sum(each.num_late for each in prefetches)
    used_after = sum(each.num_used_after for each in prefetches)
    prefetched = late + used_after + sum(each.num_used for each in prefetches)
    misses = stats.fetches.misses - late
    return Counters(
        uses=stats.experts.uses,
        misses=misses,
        late=late,
        prefetched=prefetched,
        wasted=sum(each.num_wasted for each in prefetches) - used_after,
        used_bytes=sum(stats.experts.bytes_by_source.values()),
        missed_bytes=(misses + prefetched) * shard_bytes,
        read_bytes=sum(host.loader.bytes_read for host in stats.hosts),
        reading_s=sum(host.loader.busy_s for host in stats.hosts),
        wait_s=stats.fetches.wait_s,
        compute_s=stats.experts.compute_s,
        layer_calls=stats.experts.layer_calls,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of an engine: weights in memory, and what all its processes hold privately beside them."""

    arena: int
    trunk: int
    other: int  # private memory of this program's processes, Ray's included, without the trunk


def memory_of(engine: moray.Engine, *, without: tuple[int, ...] = ()) -> Memory:
    """``without``: processes below this one that are none of the engine's."""
    with Store.open(engine.config.store_path) as store:
        trunk = store.manifest.trunk_bytes
    here = psutil.Process()
    pids = {here.pid, *(process.pid for process in here.children(recursive=True))} - set(without)
    arena = sum(host.arena.num_bytes for host in engine.actors.host_reports)
    return Memory(arena, trunk, sum(private_bytes(pid) for pid in pids) - trunk)
