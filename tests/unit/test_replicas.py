"""Hot experts of other nodes become this node's, and tokens stay the same."""

from __future__ import annotations

from time import monotonic, sleep

import numpy as np
import pytest
import torch
from helpers.reference import greedy, runner
from helpers.remote import net
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster.replicas import ExpertUse, RemoteHeat, worth_copying
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store

PROMPT_IDS = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]
EXPERTS = st.lists(st.tuples(st.floats(0, 1000), st.booleans(), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=200)
@given(EXPERTS, st.integers(0, 10))
def test_each_copy_is_worth_more_than_what_it_replaces(experts: list[tuple[float, bool, bool]], free: int) -> None:
    heat, is_here, is_elsewhere = (np.array(column) for column in zip(*experts, strict=True))
    chosen = worth_copying(heat, is_here, is_elsewhere, int(is_here.sum()) + free)
    assert (is_elsewhere & ~is_here)[chosen].all() and (np.diff(heat[chosen]) <= 0).all()
    replaced = np.sort(heat[is_here & (is_elsewhere | (heat < 0.5))])[: max(0, len(chosen) - free)]
    assert len(chosen) <= free + len(replaced)
    pairs = zip(heat[chosen][::-1], replaced[::-1], strict=False)
    assert all(hot > cold + 2 * np.sqrt(cold) and hot >= 8 for hot, cold in pairs)
    # With room for all, whatever is used enough comes.
    every = worth_copying(heat, is_here, is_elsewhere, 2 * len(experts))
    assert set(every) >= set(np.flatnonzero(is_elsewhere & ~is_here & (heat > 9)))


def test_heat_fades_and_a_restarted_process_begins_anew() -> None:
    keys = [ExpertKey(0, 0), ExpertKey(0, 1)]
    heat = RemoteHeat({"here": keys}, {"here": 1})

    def step(first: int, second: int, passed_s: float = 1.0) -> dict[str, list[ExpertKey]]:
        here = np.array([True, False])
        return heat.step(ExpertUse((np.array([first, second]),), (here,), (np.array([True, True]),)), passed_s)

    assert step(50, 1000) == {}  # when these were used is not known
    assert step(100, 1010) == {}
    assert step(110, 1200) == {"here": [keys[1]]}
    assert step(400, 1200, passed_s=600) == {}
    assert step(0, 0) == {} and step(0, 100) == {"here": [keys[1]]}


@pytest.mark.timeout(120)
def test_hot_experts_of_another_node_become_local_and_tokens_are_the_same(demo: Store) -> None:
    every = list(demo.manifest.shards)
    with runner(demo.path, "int8") as made:
        expected = greedy(made, PROMPT_IDS, 24)
        uses = np.concatenate(made.stats().tokens_per_expert)
    coldest = sorted(every[i] for i in np.argsort(uses, kind="stable")[:16].tolist())
    with net(demo, coldest, [every]) as nodes:
        run = Runner(demo, nodes.source, load_model(demo, "int8", torch.device("cpu")), "int8")

        def look() -> ExpertUse:
            counts = tuple(np.array(layer) for layer in run.stats().tokens_per_expert)
            return ExpertUse(counts, *nodes.source.held())

        heat = RemoteHeat({"here": every}, {"here": 16})
        assert heat.step(look(), 1.0) == {}
        deadline = monotonic() + 60
        wanted: list[ExpertKey] = []
        while not wanted and monotonic() < deadline:  # a host that is late on a busy machine offers nothing for a while
            assert greedy(run, PROMPT_IDS, 24) == expected
            wanted = heat.step(look(), 1.0).get("here", [])
        assert wanted and not {*wanted} & {*coldest}
        nodes.local.replicate(wanted)
        while not all(nodes.source.held()[0][key.layer][key.expert] for key in wanted) and monotonic() < deadline:
            sleep(0.01)
        assert all(nodes.source.held()[0][key.layer][key.expert] for key in wanted)
        nodes.local._manager.validate()
        assert greedy(run, PROMPT_IDS, 24) == expected
        run.close()
