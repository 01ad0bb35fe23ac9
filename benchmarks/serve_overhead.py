"""What Ray Serve and HTTP add to an engine's own stream: to the first token, and to each token after it.

All sides ask one engine, in turns, with random prompts of one length that share no prefix:

- *every step*: a streaming call of the compute actor, read in this process, with an event for each step;
- *engine*: the same as ``Engine.stream`` asks for it: what comes within 40 ms is joined, as a server's is;
- *api*: the server's application without Serve and HTTP: its ASGI messages, made and read in this process;
- *server*: an HTTP client of this process that reads the server's events.

First token: from the request to the first event, median. Per token: time between first and last event divided by the
tokens after the first, median of the requests. What is added is the server's median less the engine's; the limits are
30 ms and 1 ms.
*CPU* is processor time a token in ms, prompt and threads that wait for work included, of the compute actor, of the
server's replica and proxy, and of this program; *chunks* are events a request.

*An empty Serve application* sends chunks of the same size in the same number, one a ``--pace`` ms, from a replica that
does nothing else: what Serve's own way from a replica through the proxy takes for a chunk. Delay: from the replica's
``yield`` to the client, median; both read one machine's clock.

    python benchmarks/serve_overhead.py [--store STORE] [--threads N] [--repeat 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import httpx2
import psutil
import ray
from ray import serve
from rich.console import Console
from serve_floor import CHUNK_PATH, make_floor

from moray.actors.calls import call
from moray.actors.compute import EVENT_INTERVAL_S
from moray.actors.spawn import find_kept
from moray.deploy.serving.api import make_api
from moray.deploy.serving.args import ServeArgs, make_args
from moray.deploy.serving.command import serving
from moray.deploy.serving.engine_client import EngineClient
from moray.deploy.serving.keeper import KEEPER
from moray.deploy.serving.service import Service
from moray.runtime.generation.request import SamplingParams

FIRST_LIMIT_S = 0.030
TOKEN_LIMIT_S = 0.001
SIDES = ("every step", "engine", "api", "server")
ROLES = {"compute": "ray::ComputeActor", "replica": "ray::ServeReplica", "proxy": "ray::ProxyActor"}
NEVER_ENDS = ((0, -100.0), (1, -100.0))  # the demonstration model's special tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, help="of the engine; the server and the client need cores, too")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--pace", type=float, default=5.0, help="ms between the empty application's chunks")
    parser.add_argument("--vocabulary", type=int, default=4000, help="random token ids are below it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = make_args({"store": options.store, "threads": options.threads})
    with serving(args, "127.0.0.1", port, Console(stderr=True)):
        floor = measure_floor(f"http://127.0.0.1:{port}", options)
        found = measure(args, f"http://127.0.0.1:{port}", options) | {"empty_application": floor}
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


@dataclass
class Times:
    """Of one side, an entry a request."""

    first_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # role -> a token


def measure(args: ServeArgs, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of all sides, and what the server adds."""
    compute = call(find_kept(KEEPER).ensure, args.engine, args.linger_s).compute
    draw, count, meter = random.Random(0), options.new_tokens, CpuMeter()
    times = {name: Times() for name in SIDES}
    with httpx2.Client(base_url=url, timeout=None) as http, asyncio.Runner() as loop:
        api = loop.run(connect(args))
        sides: dict[str, Callable[[list[int]], Iterator[None] | list[float]]] = {
            "every step": lambda prompt: engine_events(compute, prompt, count, 0.0),
            "engine": lambda prompt: engine_events(compute, prompt, count, EVENT_INTERVAL_S),
            "api": lambda prompt: loop.run(api_arrivals(api, request_of(args.served_name, prompt, count))),
            "server": lambda prompt: server_events(http, request_of(args.served_name, prompt, count)),
        }
        for turn in range(options.repeat + 1):
            for name in SIDES if turn % 2 else SIDES[::-1]:
                prompt = [draw.randrange(2, options.vocabulary) for _ in range(options.prompt_tokens)]
                meter.restart()
                started = perf_counter()
                asked = sides[name](prompt)
                arrivals = asked if isinstance(asked, list) else [perf_counter() for _ in asked]
                if turn:  # the first warms them up
                    add(times[name], arrivals, started, count, meter)
    return report(times, options)


def add(times: Times, arrivals: list[float], started: float, count: int, meter: CpuMeter) -> None:
    times.first_s.append(arrivals[0] - started)
    times.token_s.append((arrivals[-1] - arrivals[0]) / (count - 1))
    times.chunks.append(len(arrivals))
    for role, seconds in meter.spent().items():
        times.cpu_s[role].append(seconds / count)


def report(times: dict[str, Times], options: argparse.Namespace) -> dict[str, Any]:
    first = {name: median(of.first_s) for name, of in times.items()}
    token = {name: median(of.token_s) for name, of in times.items()}
    added_first, added_token = first["server"] - first["engine"], token["server"] - token["engine"]
    return {
        "first_token_ms": {name: _ms(value) for name, value in first.items()},
        "per_token_ms": {name: _ms(value) for name, value in token.items()},
        "cpu_per_token_ms": {
            name: {role: _ms(mean(values)) for role, values in of.cpu_s.items()} for name, of in times.items()
        },
        "chunks": {name: median(of.chunks) for name, of in times.items()},
        "added_first_token_ms": _ms(added_first),
        "added_per_token_ms": _ms(added_token),
        "within_limits": added_first <= FIRST_LIMIT_S and added_token <= TOKEN_LIMIT_S,
        "repeat": options.repeat,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


class CpuMeter:
    """Processor time of a server's processes, which this program started, and of its own."""

    def __init__(self) -> None:
        self._found = {"client": [psutil.Process()]}
        for process in psutil.Process().children(recursive=True):
            for role, title in ROLES.items():
                if title in " ".join(process.cmdline()):
                    self._found.setdefault(role, []).append(process)
        self.restart()

    def restart(self) -> None:
        self._before = self._read()

    def spent(self) -> dict[str, float]:
        """Seconds since the last restart."""
        return {role: now - self._before[role] for role, now in self._read().items()}

    def _read(self) -> dict[str, float]:
        return {role: sum(sum(of.cpu_times()[:2]) for of in processes) for role, processes in self._found.items()}


# ----------------------------------------------------------------------------------------- sides


def engine_events(compute: Any, prompt: list[int], count: int, interval_s: float) -> Iterator[None]:
    generate = compute.generate.options(num_returns="streaming")
    arguments = secrets.token_hex(8), prompt, count, SamplingParams(logit_bias=NEVER_ENDS), (), (), None, interval_s
    for reference in generate.remote(*arguments):
        ray.get(reference)
        yield


def request_of(model: str, prompt: list[int], count: int) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    return body | {"logit_bias": {str(token): bias for token, bias in NEVER_ENDS}}


def server_events(http: httpx2.Client, body: dict[str, Any]) -> Iterator[None]:
    with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield


async def connect(args: ServeArgs) -> Any:
    """The server's application in this process, in front of the same engine."""
    return make_api(Service(args, await EngineClient.connect(args.engine, args.linger_s)), None)


async def api_arrivals(api: Any, body: dict[str, Any]) -> list[float]:
    """When each event was sent."""
    arrivals: list[float] = []
    requests = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        return requests.pop() if requests else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        arrivals.extend([perf_counter()] * message.get("body", b"").count(b"data: {"))

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": ""}
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    await api(scope | {"headers": headers, "client": ("127.0.0.1", 1)}, receive, send)
    return arrivals


# ------------------------------------------------------------------------------- an empty application


def measure_floor(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Delay and processor time of a chunk, in ms."""
    serve.run(make_floor(), name="floor", route_prefix=CHUNK_PATH)
    query = {"count": options.new_tokens, "pace_s": options.pace / 1e3}
    delays: list[float] = []
    spent: dict[str, list[float]] = defaultdict(list)
    with httpx2.Client(base_url=url, timeout=None) as http:
        meter = CpuMeter()
        for turn in range(max(2, options.repeat // 4) + 1):
            meter.restart()
            found = floor_delays(http, query)
            if turn:
                delays += found
                for role, seconds in meter.spent().items():
                    spent[role].append(seconds / options.new_tokens)
    serve.delete("floor")
    cpu = {role: _ms(mean(values)) for role, values in spent.items() if role != "compute"}
    return {"delay_ms": _ms(median(delays)), "cpu_per_chunk_ms": cpu, "pace_ms": options.pace}


def floor_delays(http: httpx2.Client, query: dict[str, float]) -> list[float]:
    """Seconds from when each event was made until it is here."""
    with http.stream("GET", CHUNK_PATH, params=query) as response:
        response.raise_for_status()
        return [perf_counter() - float(line.split()[1]) for line in response.iter_lines() if line]


if __name__ == "__main__":
    main()
