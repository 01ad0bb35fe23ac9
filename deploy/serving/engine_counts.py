"""An engine's statistics as the numbers of ``docs/metrics.md``; pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moray.actors.messages import EngineStats


@dataclass(frozen=True, slots=True)
class Series:
    """One counter with its tag's value, as one part of the engine counts it."""

    metric: str
    tag: str
    part: str = ""  # a host's id; not exported: what all parts count is added up


def totals(stats: EngineStats) -> dict[Series, float]:
    """Everything the engine has counted; each part since its own start."""
    found: dict[Series, float] = {}
    misses, generation = stats.fetches.misses, stats.generation
    found[Series("moray_expert_uses", "memory")] = stats.hits
    found[Series("moray_expert_uses", "missed")] = misses
    for lane, num_bytes in _lane_bytes(stats):
        found[Series("moray_lane_bytes", lane)] = num_bytes
    found[Series("moray_retries", "compute_restart")] = stats.compute_restarts
    found[Series("moray_retries", "preemption")] = generation.preemptions
    for host in stats.hosts:
        part = host.host_id
        found[Series("moray_disk_bytes", "own", part)] = host.loader.bytes_read - host.loader.peer_bytes
        found[Series("moray_disk_bytes", "other_hosts", part)] = host.loader.peer_bytes
        found[Series("moray_evictions", "arena", part)] = host.residency.evictions
        found[Series("moray_retries", "corrupt_read", part)] = host.loader.corrupt_reads
        prefetch = host.prefetch
        for fate, count in (
            ("used", prefetch.num_used),
            ("late", prefetch.num_late),
            ("wasted", prefetch.num_wasted),
            ("refused", prefetch.num_refused),
            ("unlikely", prefetch.num_unlikely),
        ):
            found[Series("moray_prefetches", fate, part)] = count
    for remote in stats.remote:
        found[Series("moray_network_bytes", "sent", remote.host_id)] = remote.bytes_sent
        found[Series("moray_network_bytes", "received", remote.host_id)] = remote.bytes_received
        found[Series("moray_retries", "host_deadline", remote.host_id)] = remote.missed
        found[Series("moray_retries", "host_refused", remote.host_id)] = remote.refused
    if stats.device is not None:
        found[Series("moray_evictions", "device")] = stats.device.evictions
    return found


def _lane_bytes(stats: EngineStats) -> Iterator[tuple[str, float]]:
    """Bytes of the shards that each lane computed with."""
    by_tier = {"local": 0, "remote": 0}
    for source in stats.sources:
        tier = "remote" if source.tier == "remote" else "local"
        by_tier[tier] += stats.experts.bytes_by_source.get(source.name, 0)
    if stats.device is None:
        yield "host-cpu", by_tier["local"]
        yield "remote-cpu", by_tier["remote"]
    else:
        yield from stats.device.bytes_by_lane.items()


@dataclass(slots=True)
class Increments:
    """Totals into what was added to them since the last time."""

    _last: dict[Series, float] = field(default_factory=dict)

    def take(self, now: dict[Series, float]) -> dict[tuple[str, str], float]:
        """(metric, tag) -> what was added, if anything was.

        What was counted before a series was first seen is not told: another server may have told it. A part that
        counts less than before was started again, and counts from 0.
        """
        added: dict[tuple[str, str], float] = {}
        for series, value in now.items():
            before = self._last.get(series, value)
            more = value - before if value >= before else value
            if more > 0:
                key = series.metric, series.tag
                added[key] = added.get(key, 0) + more
        self._last |= now
        return added
