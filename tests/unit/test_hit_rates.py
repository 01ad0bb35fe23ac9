"""What the simulator says of a policy is what an engine measures."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest
import torch
from helpers.hosts import cluster_of
from helpers.reference import greedy

from moray.cluster.arena_source import ArenaSource
from moray.runtime.experts.watch import WatchOptions
from moray.runtime.generation.runner import Runner
from moray.runtime.model.loader import load_model
from moray.runtime.residency.policies import POLICIES, make_policy
from moray.runtime.store.store import Store
from moray.runtime.trace.format import read_trace
from moray.runtime.trace.simulate import replay

PROMPTS = ("import os\nimport sys\n\n\ndef main(argv=None):\n", "class Socket:\n    def send(self", "# statistics\n")
NUM_TOKENS = 150


@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_slots", [12, pytest.param(24, marks=pytest.mark.long)])
def test_simulated_and_measured_hit_rates_agree(demo: Store, tmp_path: Path, policy: str, num_slots: int) -> None:
    file = tmp_path / "run.trace"
    with cluster_of(demo, 1, num_slots=num_slots, policy=policy, prefetch="off") as hosts:
        source = ArenaSource(demo, [address for address, _ in hosts])
        model = load_model(demo, "int8", torch.device("cpu"))
        watch = WatchOptions(trace=str(file), num_slots=num_slots, policy=policy)
        runner = Runner(demo, source, model, watch=watch)
        try:
            for prompt in PROMPTS:
                greedy(runner, list(runner.encode(prompt)), NUM_TOKENS)
            misses = source.stats().misses
        finally:
            runner.close()
            source.close()
    trace = read_trace(file)
    num_uses = len(trace.experts_U)
    assert num_uses > 1200 and sum(len(missed) for missed in missed_of(file)) == misses
    simulated = replay(trace.calls(), make_policy(policy, trace.header.num_experts, num_slots), num_slots)
    assert misses / num_uses == pytest.approx(simulated.sum() / num_uses, abs=0.02)


def missed_of(file: Path) -> list[list[int]]:
    with file.open("rb") as opened:
        _, *records = msgpack.Unpacker(opened, strict_map_key=False)
    return [record[5] for record in records]
