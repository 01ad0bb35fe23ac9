"""Engines: real actors, real arenas, and the same tokens as in one process."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from io import StringIO
from itertools import islice
from pathlib import Path
from threading import Thread

import pytest
from helpers.reference import greedy, runner, stock_logits, stock_model
from rich.console import Console

import moray
from moray.actors.calls import call
from moray.deploy.config import demo_store
from moray.deploy.engine import Engine
from moray.deploy.stats_report import print_stats
from moray.runtime.errors import ConfigError, CorruptShardError, RequestError
from moray.runtime.generation.request import Message

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]

PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
IDS = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]


@pytest.fixture(scope="module")
def local_tokens() -> list[int]:
    with runner(demo_store(), "int8") as made:
        return greedy(made, list(made.encode(PROMPT)), 64)


@pytest.fixture(scope="module")
def engine(session: object) -> Iterator[Engine]:
    """Two hosts; for every test that needs no other engine. Everything is in memory again when one is done."""
    with moray.launch(hosts=2) as made:
        yield made


def check_spread(engine: Engine, hosts: int, expected: list[int]) -> None:
    """The experts really are in other processes, split evenly, and every process was read from."""
    completion = engine.generate(PROMPT, max_new_tokens=64)
    stats = engine.stats()
    reports = engine.actors.host_reports
    assert list(completion.token_ids) == expected
    assert completion.usage.completion_tokens == 64
    assert [report.num_experts for report in reports] == [48 // hosts] * hosts
    assert len({report.pid for report in reports} | {os.getpid()}) == hosts + 1
    by_host = {name: num for name, num in stats.experts.bytes_by_source.items() if name != "remote"}
    assert len(by_host) == hosts and all(num_bytes > 0 for num_bytes in by_host.values())
    console = Console(file=StringIO(), width=200)
    print_stats(stats, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"{name} memory" in printed for name in by_host) and "remote memory" not in printed


def test_two_hosts_give_the_tokens_of_one_process(engine: Engine, local_tokens: list[int]) -> None:
    check_spread(engine, 2, local_tokens)


@pytest.mark.parametrize("hosts", [pytest.param(1, marks=pytest.mark.long), 3])
def test_any_number_of_hosts_gives_the_tokens_of_one_process_and_leaves_no_arena(
    hosts: int, local_tokens: list[int]
) -> None:
    with moray.launch(hosts=hosts) as engine:
        check_spread(engine, hosts, local_tokens)
        pids = [report.pid for report in engine.actors.host_reports]
    assert all(_has_ended(pid) for pid in pids)


@pytest.mark.parametrize(
    "family", [*(pytest.param(name, marks=pytest.mark.long) for name in ("mixtral", "deepseek_v3")), "gpt_oss"]
)
def test_logits_equal_transformers_through_ray(
    family: str, checkpoint: Callable[[str], Path], store: Callable[..., Path]
) -> None:
    expected = stock_logits(stock_model(checkpoint(family)), IDS)
    with moray.launch(store(family, "none"), numerics="float", hosts=2) as engine:
        assert (engine.logits(IDS) - expected).abs().max() < 1e-5


def test_streams_chats_cancels_and_refuses(engine: Engine, local_tokens: list[int]) -> None:
    # Text in pieces is the text as a whole.
    whole = engine.generate(PROMPT, max_new_tokens=40)
    assert "".join(event.text for event in engine.stream(PROMPT, max_new_tokens=40)) == whole.text
    assert engine.generate(PROMPT, max_new_tokens=40, stop="main").text == whole.text.split("main")[0]
    # The second turn of a chat computes only what is new.
    turns = [Message("user", PROMPT)]
    first = engine.chat(turns, max_new_tokens=20)
    turns += [Message("assistant", first.text, first.token_ids), Message("user", "    return 0")]
    second = engine.chat(turns, max_new_tokens=20)
    assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens - 1
    # Leaving a stream cancels it; the engine goes on.
    assert len(list(islice(engine.stream(PROMPT, max_new_tokens=2000), 3))) == 3
    assert list(engine.generate(PROMPT, max_new_tokens=64).token_ids) == local_tokens
    # A seed repeats; another seed differs.
    sampled = [engine.generate(PROMPT, max_new_tokens=30, temperature=1.0, seed=s).token_ids for s in (7, 7, 8)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(RequestError, match="the model's context holds 2048"):
        engine.generate([1] * 3000)
    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        engine.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(RequestError, match="not in the vocabulary"):
        engine.generate([999_999])


def test_many_streams_at_once_do_not_disturb_each_other(engine: Engine, local_tokens: list[int]) -> None:
    results: list[list[int]] = []
    threads = [
        Thread(target=lambda: results.append(list(engine.generate(PROMPT, max_new_tokens=64).token_ids)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [local_tokens] * 4


def test_a_killed_host_costs_no_token_and_takes_its_arena_back(engine: Engine, local_tokens: list[int]) -> None:
    victim = engine.actors.host_reports[0]
    call(engine.actors.hosts[0].wait_filled)
    events = engine.stream(PROMPT, max_new_tokens=64)
    tokens = [i for event in islice(events, 10) for i in event.token_ids]
    os.kill(victim.pid, signal.SIGKILL)
    tokens += [i for event in events for i in event.token_ids]
    assert tokens == local_tokens
    back = _report_of_restarted(engine.actors.hosts[0], victim.pid)
    assert back.pid != victim.pid
    call(engine.actors.hosts[0].wait_filled)
    stats = call(engine.actors.hosts[0].stats)
    assert (stats.num_resident, stats.loader.bytes_read) == (24, 0)  # nothing was read from disk again
    assert list(engine.generate(PROMPT, max_new_tokens=64).token_ids) == local_tokens


def test_errors_of_actors_arrive_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hosts is 60, expected 1 to 48"):
        moray.launch(hosts=60)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in demo_store().iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    with (damaged / "experts-00002.bin").open("r+b") as file:
        file.seek(3 * 196608 + 100_000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    corrupt = pytest.raises(CorruptShardError, match=r"experts-00002\.bin.*expert 3 of MoE layer 2 at offset 589824")
    with moray.launch(damaged) as engine:  # it starts before all is read
        with corrupt:
            call(engine.actors.hosts[0].wait_filled)
        with corrupt:
            engine.logits([*range(3, 300)])  # needs every expert


def _has_ended(pid: int) -> bool:
    """Within 30 s. Its entry in /proc may stay until its parent has looked."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    ended = bool(poll.poll(30_000))
    os.close(descriptor)
    return ended


def _report_of_restarted(host: object, old_pid: int) -> object:
    """Ask until the restarted actor answers: Ray fails calls while it is restarting."""
    import ray
    from ray.exceptions import RayActorError

    for _ in range(200):
        try:
            report = ray.get(host.report.remote(), timeout=30)  # type: ignore[attr-defined]
        except RayActorError:
            continue
        if report.pid != old_pid:
            return report
    raise AssertionError("the host did not come back")
