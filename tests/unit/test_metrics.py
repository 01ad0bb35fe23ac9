"""What a server counts and logs of requests, and makes of an engine's statistics."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from moray.actors.messages import EngineStats
from moray.cluster.remote_host import RemoteStats
from moray.deploy.serving.engine_counts import Increments, totals
from moray.deploy.serving.metrics import COUNTERS, GAUGES, HISTOGRAMS
from moray.deploy.serving.observer import Observer, open_log
from moray.deploy.serving.records import OUTCOMES, RequestRecord, current_record
from moray.runtime.errors import ConfigError
from moray.runtime.experts.meter import ExpertsStats
from moray.runtime.experts.shard_host import HostStats
from moray.runtime.experts.source import SourceInfo, SourceStats
from moray.runtime.generation.request import Finished, Timings, TokenEvent, Usage
from moray.runtime.generation.stats import GenerationStats
from moray.runtime.prefetch.payoff import PrefetchStats
from moray.runtime.residency.loader import LoaderStats
from moray.runtime.residency.manager import ResidencyStats

DOCUMENT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


class Seen:
    """Keeps the records it is told of."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def note_request(self, record: RequestRecord) -> None:
        self.records.append(record)


def token(count: int, finished: Finished | None = None) -> TokenEvent:
    return TokenEvent("r", tuple(range(count)), "x" * count, finished)


def generate(choices: int, finished: int) -> None:
    """Two prompts of 5 and 6 tokens, ``choices`` of each; 3 tokens of each choice, whose ends come for some."""
    record = current_record()
    record.begin([5, 6], 2 * choices)
    for index in range(2 * choices):
        record.note(index, token(1))
        record.note(index, token(2))
        if index < finished:
            record.note(index, token(0, Finished("stop", Usage(5, 4, 3), Timings(0, 0))))


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Does what the path says."""
    what = Request(scope).url.path.removeprefix("/v1/")

    async def stream() -> Any:
        yield "a"
        generate(2, 4 if what == "whole" else 1)

    if what == "crash":
        raise KeyError("crash")
    answer = StreamingResponse(stream()) if what in ("whole", "broken") else PlainTextResponse("b", int(what))
    await answer(scope, receive, send)


def test_each_request_is_counted_and_logged_with_its_id(tmp_path: Path) -> None:
    seen, file = Seen(), tmp_path / "requests.jsonl"
    client = TestClient(Observer(app, seen, open_log(file)), raise_server_exceptions=False)
    paths = ("whole", "400", "429", "503", "broken", "crash")
    for path in paths:
        client.post(f"/v1/{path}", headers={"x-request-id": f'id "{path}"\t' + "y" * 1000})
    client.get("/v1/200")  # not counted
    client.get("/v1/404")
    outcomes = ["ok", "refused", "limited", "failed", "failed", "failed", "refused"]
    assert [record.outcome for record in seen.records] == outcomes
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["path"] for line in lines] == [f"/v1/{path}" for path in (*paths, "404")]
    assert [line["status"] for line in lines] == [200, 400, 429, 503, 200, 500, 404]
    assert all(line["request_id"].startswith(f'id "{path}"') for line, path in zip(lines, paths, strict=False))
    assert max(len(line["request_id"]) for line in lines) == 200 and len(lines[-1]["request_id"]) == 32
    whole, broken, refused = lines[0], lines[4], lines[1]
    counted = {"choices": 4, "prompt_tokens": 11, "cached_tokens": 8, "output_tokens": 12}
    assert counted.items() <= whole.items() and broken["cached_tokens"] == 4
    assert 0 < whole["first_token_s"] <= whole["seconds"] and whole["per_token_s"] >= 0
    assert refused["first_token_s"] is refused["per_token_s"] is None and refused["output_tokens"] == 0
    assert set(re.findall(r'"(\w+)":', re.search(r"```json\n(.*)\n```", DOCUMENT)[1])) == set(whole)  # type: ignore[index]
    open_log(None)  # lets go of the file
    with pytest.raises(ConfigError, match="choose another file for request_log"):
        open_log(tmp_path / "none" / "x")


def run_left(app: ASGIApp, act: Callable[[asyncio.Task[None]], Awaitable[None]]) -> Seen:
    """A request whose task ``act`` is given after it has begun."""
    seen = Seen()

    async def receive() -> dict[str, object]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: object) -> None: ...

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        task = asyncio.create_task(Observer(app, seen, logging.getLogger("quiet"))(scope, receive, send))
        await asyncio.sleep(0)
        await act(task)

    asyncio.run(run())
    return seen


def test_who_leaves_is_told_from_what_fails() -> None:
    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        current_record().begin([3], 1)
        current_record().note(0, token(2))
        await receive()

    async def leave(task: asyncio.Task[None]) -> None:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    (record,) = run_left(hang, leave).records
    assert record.outcome == "gone" and (record.prompt_tokens, record.output_tokens) == (3, 2)
    assert record.token_s == []  # both came at once


def host(number: int, evictions: int, used: int) -> HostStats:
    prefetch = PrefetchStats("on", "", 0, used, 2, 3, 0, 0, 4, 5, 0, 0, 0, 0.0, 0.0)
    loader = LoaderStats(bytes_read=1000 * evictions, peer_bytes=10)
    residency = ResidencyStats(evictions=evictions)
    return HostStats(8, 4, 4, 4096, "lru", residency, loader, prefetch, host_id=f"host-{number}")


def stats(uses: int, *hosts: HostStats, restarts: int = 0) -> EngineStats:
    places = tuple(SourceInfo(name, tier, 8, 0) for name, tier in (("host-0", "arena"), ("far", "remote")))
    experts = ExpertsStats([], {"host-0": 100 * uses, "far": uses}, 1, uses, 0.0, 0.0, 0.0)
    generation = GenerationStats("fused", 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, None)
    remote = (RemoteStats("far", "10.0.0.2", bytes_sent=5 * uses, bytes_received=7 * uses, missed=1),)
    return EngineStats(
        experts, places, SourceStats(misses=uses // 4), hosts, "lru", None, "on", generation, restarts, remote
    )


def test_what_the_engine_adds_is_told_once_and_restarts_count_from_nothing() -> None:
    increments = Increments()
    assert increments.take(totals(stats(8, host(0, 1, 1), host(1, 1, 1)))) == {}  # another server may have told it
    added = increments.take(totals(stats(20, host(0, 4, 1), host(1, 1, 6))))
    assert added == {
        ("moray_expert_uses", "memory"): 9,
        ("moray_expert_uses", "missed"): 3,
        ("moray_lane_bytes", "host-cpu"): 1200,
        ("moray_lane_bytes", "remote-cpu"): 12,
        ("moray_network_bytes", "sent"): 60,
        ("moray_network_bytes", "received"): 84,
        ("moray_disk_bytes", "own"): 3000,
        ("moray_evictions", "arena"): 3,
        ("moray_prefetches", "used"): 5,
    }
    assert increments.take(totals(stats(20, host(0, 4, 1), host(1, 1, 6)))) == {}
    again = increments.take(totals(stats(4, host(0, 4, 1), host(1, 2, 6), restarts=1)))  # the compute actor came back
    assert (again["moray_expert_uses", "memory"], again["moray_expert_uses", "missed"]) == (3, 1)
    assert again["moray_retries", "compute_restart"] == 1 == again["moray_evictions", "arena"]
    assert increments.take(totals(stats(4, host(1, 2, 6), restarts=1))) == {}  # one host does not answer
    back = increments.take(totals(stats(4, host(0, 5, 1), host(1, 2, 7), restarts=1)))
    assert back["moray_evictions", "arena"] == 1 == back["moray_prefetches", "used"]


def test_every_metric_and_value_is_in_the_document() -> None:
    listed = re.findall(r"^\| `(moray_\w+)` \| (\w+) \| `(\w+)` \| (.+) \|$", DOCUMENT, re.MULTILINE)
    kinds = {"counter": COUNTERS, "histogram": [of for of, _ in HISTOGRAMS], "gauge": GAUGES}
    made = {(of.name, kind, of.tag) for kind, group in kinds.items() for of in group}
    assert {(name, kind, tag) for name, kind, tag, _ in listed} == made and len(listed) == len(made)
    meaning = {name: text for name, _, _, text in listed}
    assert all(f"`{outcome}`" in meaning["moray_requests"] for outcome in OUTCOMES)
    for series in totals(stats(8, host(0, 1, 1))):
        assert f"`{series.tag}`" in meaning[series.metric]
