"""The server's and the engine's metrics, exported by Ray (``docs/metrics.md``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge, Histogram

from moray.actors.messages import EngineStats
from moray.deploy.serving.engine_counts import Increments, totals
from moray.deploy.serving.records import RequestRecord
from moray.runtime.errors import MorayError

POLL_S = 5.0
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
_FIRST_TOKEN_S = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]
_TOKEN_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5]
_WHOLE_S = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1200.0, 3600.0]

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Description:
    """A metric with one tag."""

    name: str
    tag: str
    text: str


COUNTERS = (
    Description("moray_requests", "outcome", "Requests that ended: ok, refused, limited, failed, gone."),
    Description("moray_tokens", "kind", "Tokens of prompts, of these from kept KV caches, and of answers."),
    Description("moray_expert_uses", "found", "Uses of experts by layer calls: in memory, or missed."),
    Description("moray_lane_bytes", "lane", "Bytes of the experts that each lane computed with."),
    Description("moray_disk_bytes", "source", "Bytes of experts read from the own disk and from other hosts."),
    Description("moray_network_bytes", "direction", "Bytes exchanged with remote hosts that compute."),
    Description("moray_prefetches", "outcome", "Predicted loads: used, late, wasted, refused."),
    Description("moray_evictions", "tier", "Experts evicted from arenas and from a device."),
    Description("moray_retries", "cause", "Work done again, and why."),
)
HISTOGRAMS = (
    (Description("moray_first_token_s", "endpoint", "From a request's arrival to its first token."), _FIRST_TOKEN_S),
    (Description("moray_per_token_s", "endpoint", "Mean time a token of a choice, after its first."), _TOKEN_S),
    (Description("moray_request_s", "endpoint", "From a request's arrival to the end of its answer."), _WHOLE_S),
)
GAUGES = (
    Description("moray_sequences", "state", "Sequences in the engine: running, waiting."),
    Description("moray_kv_bytes", "state", "Bytes of KV caches: reserved."),
)


class Metrics:
    """One server's metrics. Another server of the same engine has its own."""

    def __init__(self) -> None:
        self._counters = {of.name: Counter(of.name, of.text, (of.tag,)) for of in COUNTERS}
        self._histograms = {of.name: Histogram(of.name, of.text, edges, (of.tag,)) for of, edges in HISTOGRAMS}
        self._gauges = {of.name: Gauge(of.name, of.text, (of.tag,)) for of in GAUGES}
        self._tags = {of.name: of.tag for of in (*COUNTERS, *(of for of, _ in HISTOGRAMS), *GAUGES)}
        self._increments = Increments()

    def note_request(self, record: RequestRecord) -> None:
        """A request has ended."""
        self._add("moray_requests", record.outcome, 1)
        self._add("moray_tokens", "prompt", record.prompt_tokens)
        self._add("moray_tokens", "cached", record.cached_tokens)
        self._add("moray_tokens", "output", record.output_tokens)
        endpoint = record.path if record.path in _ENDPOINTS else "other"
        if record.first_token_s is not None:
            self._observe("moray_first_token_s", endpoint, record.first_token_s)
        for seconds in record.token_s:
            self._observe("moray_per_token_s", endpoint, seconds)
        if record.outcome == "ok" and endpoint != "other":
            self._observe("moray_request_s", endpoint, record.seconds)

    def note_engine(self, stats: EngineStats) -> None:
        """What the engine has counted so far."""
        for (name, tag), more in self._increments.take(totals(stats)).items():
            self._add(name, tag, more)
        self._set("moray_sequences", "running", stats.generation.running)
        self._set("moray_sequences", "waiting", stats.generation.waiting)
        self._set("moray_kv_bytes", "reserved", stats.generation.kv_reserved_bytes)

    def _add(self, name: str, tag: str, more: float) -> None:
        if more > 0:
            self._counters[name].inc(more, {self._tags[name]: tag})

    def _observe(self, name: str, tag: str, seconds: float) -> None:
        self._histograms[name].observe(seconds, {self._tags[name]: tag})

    def _set(self, name: str, tag: str, value: float) -> None:
        self._gauges[name].set(value, {self._tags[name]: tag})


async def poll(metrics: Metrics, stats: Callable[[], Awaitable[EngineStats | None]]) -> None:
    """Ask the engine every few seconds, for ever. One that does not answer is asked again."""
    has_answered = True
    while True:
        try:
            found = await stats()
            if found is not None:
                metrics.note_engine(found)
            has_answered = True
        except MorayError as error:
            if has_answered:
                logger.warning("the engine's metrics stand still: %s", error)
            has_answered = False
        await asyncio.sleep(POLL_S)
