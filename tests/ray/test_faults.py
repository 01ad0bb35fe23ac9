"""Actors that die in the middle of an answer: the same tokens, the same text, one pause."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from helpers.reference import greedy, runner

import moray
from moray.actors.ledger import MAX_FAILED_STARTS
from moray.deploy.config import demo_store
from moray.deploy.engine import Completion, Engine
from moray.runtime.errors import ClusterError
from moray.runtime.events import ComputeRestarted, HostRestarted, OrchestratorRestarted, StreamResumed, cause_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from fault_injection import FAULTS, PROMPT, SAMPLINGS, Fault, KillHost, generate_struck, pid_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]

NUM_TOKENS = 1000


@pytest.fixture(scope="module")
def engine(session: object) -> Iterator[Engine]:
    """Half of the experts fit: hosts are needed all the time."""
    with moray.launch(hosts=2, host_memory="6MiB") as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(engine: Engine) -> list[Completion]:
    made = [engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, **sampling) for sampling in SAMPLINGS]
    with runner(demo_store(), "int8") as alone:
        assert list(made[0].token_ids) == greedy(alone, list(alone.encode(PROMPT)), NUM_TOKENS)
    return made


def strike(engine: Engine, undisturbed: list[Completion], kind: type[Fault], times: int, seed: int) -> None:
    random = Random(seed)
    for number in range(times):
        which = number % len(SAMPLINGS)
        struck = generate_struck(engine, kind(), random, max_new_tokens=NUM_TOKENS, **SAMPLINGS[which])
        assert (struck.token_ids, struck.text) == (undisturbed[which].token_ids, undisturbed[which].text)


@pytest.mark.parametrize("kind", [KillHost], ids=lambda kind: kind.__name__)
def test_an_answer_is_the_same_whatever_dies(kind: type[Fault], engine: Engine, undisturbed: list[Completion]) -> None:
    strike(engine, undisturbed, kind, 1, 1)


@pytest.mark.long
@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_an_answer_is_the_same_whenever_it_dies(
    kind: type[Fault], engine: Engine, undisturbed: list[Completion]
) -> None:
    strike(engine, undisturbed, kind, 5, 2)


def test_a_stream_outlives_its_compute_actor(engine: Engine, undisturbed: list[Completion]) -> None:
    """Several at once, of which one has a seed and one is stopped by a text; every cause can be found."""
    stop = undisturbed[1].text[-40:-20]
    options = [{"max_new_tokens": NUM_TOKENS} | each for each in (*SAMPLINGS, SAMPLINGS[1] | {"stop": stop})]
    victim = pid_of(engine.actors.compute)
    streams = [engine.stream(PROMPT, **each) for each in options]
    events = [list(islice(stream, 2)) for stream in streams]
    os.kill(victim, signal.SIGKILL)
    for seen, stream in zip(events, streams, strict=True):
        seen += stream
    texts = ["".join(event.text for event in seen) for seen in events]
    assert texts == [*(whole.text for whole in undisturbed), undisturbed[1].text.split(stop)[0]]
    assert [seen[-1].finished.reason for seen in events if seen[-1].finished] == ["length", "length", "stop"]
    for seen, whole in zip(events, undisturbed, strict=False):
        assert tuple(token for event in seen for token in event.token_ids) == whole.token_ids
        assert seen[-1].finished is not None and seen[-1].finished.usage.completion_tokens == NUM_TOKENS
        assert len({event.request_id for event in seen}) == 1
    told = [event for event in engine.events() if event.cause == cause_of("compute", victim)]
    assert [type(event) for event in told].count(ComputeRestarted) == 1
    assert any(isinstance(event, StreamResumed) and event.num_tokens > 0 for event in told)
    assert engine.stats().compute_restarts >= 1


def test_events_outlive_the_orchestrator(engine: Engine) -> None:
    before, victims = engine.events(), [pid_of(engine.actors.orchestrator), pid_of(engine.actors.hosts[0])]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    while pid_of(engine.actors.hosts[0]) == victims[1]:
        pass
    told = engine.events()[len(before) :]
    assert engine.events()[: len(before)] == before
    assert {(type(event), event.cause) for event in told} >= {
        (OrchestratorRestarted, cause_of("orchestrator", victims[0])),
        (HostRestarted, cause_of("host-0", victims[1])),
    }
    assert next(event for event in told if isinstance(event, HostRestarted)).num_kept > 0


@pytest.mark.long
def test_a_compute_actor_that_never_comes_back_is_given_up(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for file in demo_store().iterdir():
        (store / file.name).write_bytes(file.read_bytes())
    with moray.launch(store) as engine:
        stream = engine.stream(PROMPT, max_new_tokens=NUM_TOKENS)
        next(stream)
        (store / "manifest.msgpack").unlink()
        os.kill(pid_of(engine.actors.compute), signal.SIGKILL)
        with pytest.raises(ClusterError, match=f"ended {MAX_FAILED_STARTS} times while it was restarted.*manifest"):
            list(stream)
        with pytest.raises(ClusterError, match="close the engine and start it again"):
            engine.generate(PROMPT)


@pytest.mark.long
def test_two_minutes_of_faults_leave_nothing_behind(session: object) -> None:
    from soak import soak

    with moray.launch(hosts=2, host_memory="6MiB") as engine:
        found = soak(engine, [kind() for kind in FAULTS], 120, 10, NUM_TOKENS, Random(3))
    assert found.num_answers > 0 and found.num_wrong == 0
    for name, readings in found.readings.items():
        settled = readings[2:]
        if len(settled) < 2:
            continue
        assert settled[-1].num_threads <= settled[0].num_threads + 2, (name, readings)
        assert settled[-1].num_descriptors <= settled[0].num_descriptors + 8, (name, readings)
        assert settled[-1].rss_bytes <= settled[0].rss_bytes + (48 << 20), (name, readings)
