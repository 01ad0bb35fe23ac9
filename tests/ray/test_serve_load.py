"""Two hundred unkind clients for a minute, and an expert host that dies meanwhile."""

from __future__ import annotations

import socket
import sys
from functools import partial
from pathlib import Path
from random import Random

import pytest
from helpers.reference import runner
from rich.console import Console

from moray.deploy.config import demo_store
from moray.deploy.serving.args import make_args
from moray.deploy.serving.command import serving
from moray.deploy.serving.keys import add_key

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from load_clients import WEIGHTS, bad_requests, make_questions
from serve_load import Target, kill_host, load, replace_server

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]
MODEL = "moray-demo"


def test_a_minute_of_unkind_clients_leaves_nothing_behind(session: object, tmp_path: Path) -> None:
    with runner(demo_store(), "int8") as alone:
        questions = make_questions(alone, MODEL, 32, Random(1))
    key = add_key(tmp_path / "keys.txt", "load")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = make_args({"hosts": 2, "host_memory": "6MiB", "api_keys": tmp_path / "keys.txt", "max_body": "1MiB"})
    with serving(args, "127.0.0.1", port, Console(quiet=True)):
        target = Target(f"http://127.0.0.1:{port}", key, MODEL, questions, bad_requests(MODEL, args.max_body_bytes))
        strikes = [partial(kill_host, Random(2)), partial(replace_server, args)]
        loaded = load(target, 200, 20, 60, strikes, 3)
    found, before, after = loaded.found, loaded.before, loaded.after
    assert found.wrong == [] and len(loaded.struck) == 2
    assert {kind for kind, _ in found.outcomes} == set(WEIGHTS)
    assert found.outcomes["stream", "right"] > 20 and found.outcomes["slow", "right"] and found.outcomes["whole", "429"]
    assert after.kv_bytes == before.kv_bytes
    lasting = before.readings.keys() & after.readings.keys()
    assert len(lasting) >= 6
    for process in lasting:
        then, now = before.readings[process], after.readings[process]
        assert now.num_threads <= then.num_threads + 4, (process, then, now)
        assert now.num_descriptors <= then.num_descriptors + 16, (process, then, now)
        assert now.rss_bytes <= then.rss_bytes + (48 << 20), (process, then, now)
