"""A server under load that is not kind: right answers, clear refusals, nothing left behind, as fast afterwards.

    python benchmarks/serve_load.py    # 200 clients, 5 minutes, an expert host killed twice, the server replaced once
    python benchmarks/serve_load.py --clients 50 --minutes 1 --kills 0 --replacements 0

An engine of two hosts, half of whose experts fit in memory, behind its server, and clients in this process
(load_clients.py): whole and streamed requests, slow readers, clients that leave, and what is no request. All is right
if every answer that was not left is the engine's own (greedy, computed before by the same model alone in this process),
every other one is the refusal it deserves, and none is a 5xx.

*first token*, *answer*: medians and 95th percentiles of single requests one after the other, before and after the load;
*under load*: of the streams that were admitted. *growth*: of each process that lived throughout, after the load against
before, both times idle and after a load of the same kind. *KV*: bytes that caches take when the last 20 requests were
short ones: what was lost would come on top. Ends with status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median, quantiles
from time import perf_counter, sleep

import httpx2
import psutil
import ray
from common import describe_machine, in_process, print_table
from fault_injection import pid_of
from load_clients import Bad, Found, Load, Question, bad_requests, make_questions
from ray import serve
from rich.console import Console
from soak import Reading

from moray.deploy.config import demo_store
from moray.deploy.serving.args import ServeArgs, make_args
from moray.deploy.serving.command import serving
from moray.deploy.serving.keys import add_key
from moray.runtime.memory import format_bytes

_IDLE_S = 300.0
_SHORT = 20  # requests, more than caches are kept


@dataclass(frozen=True)
class Target:
    """A server, and what to ask it."""

    url: str
    key: str
    model: str
    questions: Sequence[Question]
    bad: Sequence[Bad]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@dataclass(frozen=True)
class Quiet:
    """A server that nobody asks."""

    first_s: list[float]
    answer_s: list[float]
    readings: dict[tuple[int, str], Reading]  # by pid and name
    kv_bytes: int


@dataclass(frozen=True)
class Loaded:
    """Before, during and after a load."""

    before: Quiet
    found: Found
    after: Quiet
    struck: list[str]  # what happened meanwhile


def load(
    target: Target, num_clients: int, warm_s: float, seconds: float, strikes: Sequence[Callable[[], str]], seed: int
) -> Loaded:
    """Load a server on this process's Ray for so long; ``strikes`` come at equal distances and say what they did."""
    rest, struck = (target.url, target.key, target.questions, target.bad), []
    warm = asyncio.run(Load(*rest, seed, num_clients).run(warm_s))
    before = _quiet(target)
    timers = [
        threading.Timer(seconds * number / (len(strikes) + 1), lambda strike: struck.append(strike()), [strike])
        for number, strike in enumerate(strikes, 1)
    ]
    for timer in timers:
        timer.start()
    found = asyncio.run(Load(*rest, seed + 1, num_clients).run(seconds))
    for timer in timers:
        timer.join()
    found.wrong += warm.wrong
    return Loaded(before, found, _quiet(target), struck)


def processes() -> dict[int, str]:
    """Ray's own below this process, and the actors that it started."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        words = child.cmdline()
        if words and words[0].startswith("ray::"):
            found[child.pid] = words[0].removeprefix("ray::").split(".")[0]
        elif words and os.path.basename(words[0]) in ("raylet", "gcs_server"):
            found[child.pid] = os.path.basename(words[0])
    return found


def kill_host(random: Random) -> str:
    """kill -9 of one of the engine's expert hosts."""
    actors = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "-host-" in actor["name"]]
    chosen = random.choice(actors)
    pid = pid_of(ray.get_actor(chosen["name"], chosen["namespace"]))
    os.kill(pid, signal.SIGKILL)
    return f"{chosen['name']} was killed"


def replace_server(args: ServeArgs) -> str:
    """Deploy again with other limits: the engine stays."""
    from moray.deploy.app import build

    serve.run(build(args.model_copy(update={"drain_s": args.drain_s + 1})), name="moray", route_prefix="/")
    return "the server was replaced"


def _quiet(target: Target) -> Quiet:
    """Wait until the engine is idle, then look. Raises TimeoutError."""
    with httpx2.Client(base_url=target.url, headers=target.headers, timeout=None) as http:
        _wait_idle(http)
        first_s, answer_s = zip(*(_ask(http, question) for question in target.questions), strict=True)
        for number in range(_SHORT):
            body = {"model": target.model, "prompt": [100 + number], "max_tokens": 1}
            http.post("/v1/completions", json=body).raise_for_status()
        _wait_idle(http)
        readings = {(pid, name): Reading.of(pid) for pid, name in processes().items()}
        return Quiet(list(first_s), list(answer_s), readings, http.get("/state").json()["kv_reserved_bytes"])


def _wait_idle(http: httpx2.Client) -> None:
    until = perf_counter() + _IDLE_S
    while perf_counter() < until:
        state = http.get("/state").raise_for_status().json()
        if not state["running"] and not state["waiting"] and not state["requests"]:
            return
        sleep(0.2)
    raise TimeoutError(f"{state['requests']} requests are taken and {state['running']} sequences run after all is over")


def _ask(http: httpx2.Client, question: Question) -> tuple[float, float]:
    """Seconds to the first event and to the end."""
    started, first_s = perf_counter(), 0.0
    with http.stream("POST", question.path, json=question.body | {"stream": True}) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line and not first_s:
                first_s = perf_counter() - started
    return first_s, perf_counter() - started


def report(loaded: Loaded, seconds: float) -> None:
    before, found, after = loaded.before, loaded.found, loaded.after
    rows = [[kind, how, str(count)] for (kind, how), count in sorted(found.outcomes.items())]
    print_table(["client", "outcome", "times"], rows)
    print(f"\n{found.num_tokens / seconds:.0f} tokens/s in answers that came whole")
    print(f"{'; '.join(loaded.struck) or 'nothing struck'}\n")
    rows = [["before", *_spread(before.first_s), *_spread(before.answer_s)]]
    rows += [["under load", *_spread(found.first_s), "", ""]]
    rows += [["after", *_spread(after.first_s), *_spread(after.answer_s)]]
    print_table(["ms", "first token", "95 %", "answer", "95 %"], rows)
    print(f"\nafter / before: first token {median(after.first_s) / median(before.first_s):.2f}, ", end="")
    print(f"answer {median(after.answer_s) / median(before.answer_s):.2f}\n")
    rows = []
    for (pid, name), then in before.readings.items():
        now = after.readings.get((pid, name))
        if now is not None:
            grown = (now.rss_bytes - then.rss_bytes) / 2**20
            rows.append([name, format_bytes(then.rss_bytes), f"{grown:+.1f}"])
            rows[-1] += [f"{then.num_descriptors} -> {now.num_descriptors}", f"{then.num_threads} -> {now.num_threads}"]
    print_table(["process", "RSS", "growth MiB", "descriptors", "threads"], rows)
    print(f"\nKV {before.kv_bytes} -> {after.kv_bytes} bytes")
    print(f"{len(found.wrong)} wrong")
    for words in found.wrong[:20]:
        print(f"  {words}")


def _spread(values: Sequence[float]) -> list[str]:
    return [f"{1e3 * median(values):.1f}", f"{1e3 * quantiles(values, n=20)[-1]:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=demo_store(), help="none: the demonstration model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--warm", type=float, default=30, help="seconds of load before anything is looked at")
    parser.add_argument("--kills", type=int, default=2, help="of expert hosts")
    parser.add_argument("--replacements", type=int, default=1, help="of the server by a new deployment")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--host-memory", default="6MiB", help="of all arenas")
    parser.add_argument("--max-requests", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = Random(options.seed)
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        keys = Path(folder) / "keys.txt"
        key = add_key(keys, "load")
        settings = {"store": options.store, "hosts": 2, "host_memory": options.host_memory, "api_keys": keys}
        args = make_args(settings | {"max_requests": options.max_requests, "max_body": "1MiB"})
        model = args.served_name
        with in_process(options.store) as alone:
            questions = make_questions(alone, model, options.questions, random)
        with serving(args, "127.0.0.1", port, Console(stderr=True)):
            target = Target(f"http://127.0.0.1:{port}", key, model, questions, bad_requests(model, args.max_body_bytes))
            strikes: list[Callable[[], str]] = [partial(kill_host, random)] * options.kills
            strikes += [partial(replace_server, args)] * options.replacements
            random.shuffle(strikes)
            loaded = load(target, options.clients, options.warm, 60 * options.minutes, strikes, options.seed)
    print(describe_machine())
    report(loaded, 60 * options.minutes)
    sys.exit(1 if loaded.found.wrong or loaded.after.kv_bytes != loaded.before.kv_bytes else 0)


if __name__ == "__main__":
    main()
