"""What Ray Serve and HTTP add to an engine's own stream: to the first token, and to each token after it.

Both sides ask one engine, in turns, with random prompts of one length that share no prefix. The engine's side is what
``Engine.stream`` does with ``interval_s=0``: a streaming call of the compute actor, read in this process. The server's
side is an HTTP client of this process that reads server-sent events.

First token: from the request to the first event, median. Per token: time between first and last event divided by the
events between, median of the requests. What is added is the difference of the two medians.

    python benchmarks/serve_overhead.py [--store STORE] [--threads N] [--repeat 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import httpx2
import ray
from rich.console import Console

from moray.actors.calls import call
from moray.actors.spawn import find_kept
from moray.deploy.serving.args import ServeArgs, make_args
from moray.deploy.serving.command import serving
from moray.deploy.serving.keeper import KEEPER
from moray.runtime.generation.request import SamplingParams

FIRST_LIMIT_S = 0.030
TOKEN_LIMIT_S = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of the engine; the server and the client need cores, too")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=4000, help="random token ids are below it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = make_args({"store": options.store, "threads": options.threads})
    with serving(args, "127.0.0.1", port, Console(stderr=True)):
        found = measure(args, f"http://127.0.0.1:{port}", options)
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(args: ServeArgs, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of both sides, and what the server adds."""
    compute = call(find_kept(KEEPER).ensure, args.engine, args.linger_s).compute
    draw = random.Random(0)
    times: dict[str, list[tuple[float, float]]] = {"engine": [], "server": []}
    with httpx2.Client(base_url=url, timeout=None) as http:
        sides: dict[str, Callable[[list[int]], Iterator[None]]] = {
            "engine": lambda prompt: engine_events(compute, prompt, options.new_tokens),
            "server": lambda prompt: server_events(http, args.served_name, prompt, options.new_tokens),
        }
        for turn in range(options.repeat + 1):
            for name, ask in sorted(sides.items(), reverse=turn % 2 == 1):
                prompt = [draw.randrange(2, options.vocabulary) for _ in range(options.prompt_tokens)]
                timed = time_events(ask(prompt))
                if turn:  # the first warms both up
                    times[name].append(timed)
    first = {name: median(first for first, _ in pairs) for name, pairs in times.items()}
    token = {name: median(token for _, token in pairs) for name, pairs in times.items()}
    added_first, added_token = first["server"] - first["engine"], token["server"] - token["engine"]
    return {
        "first_token_ms": {name: round(value * 1e3, 3) for name, value in first.items()},
        "per_token_ms": {name: round(value * 1e3, 3) for name, value in token.items()},
        "added_first_token_ms": round(added_first * 1e3, 3),
        "added_per_token_ms": round(added_token * 1e3, 3),
        "within_limits": added_first <= FIRST_LIMIT_S and added_token <= TOKEN_LIMIT_S,
        "repeat": options.repeat,
    }


def time_events(events: Iterator[None]) -> tuple[float, float]:
    """Seconds to the first event, and between events from then on."""
    started = perf_counter()
    arrivals = [perf_counter() for _ in events]
    return arrivals[0] - started, (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)


def engine_events(compute: Any, prompt: list[int], count: int) -> Iterator[None]:
    generate = compute.generate.options(num_returns="streaming")
    arguments = secrets.token_hex(8), prompt, count, SamplingParams(logit_bias=NEVER_ENDS), (), None, 0.0
    for reference in generate.remote(*arguments):
        ray.get(reference)
        yield


NEVER_ENDS = ((0, -100.0), (1, -100.0))  # the demonstration model's special tokens


def server_events(http: httpx2.Client, model: str, prompt: list[int], count: int) -> Iterator[None]:
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    body["logit_bias"] = {str(token): bias for token, bias in NEVER_ENDS}
    with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield


if __name__ == "__main__":
    main()
