"""The same bits however few experts are in memory, whatever is predicted, and whenever something is evicted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.capped import capped, hosts_and_source
from helpers.checkpoints import tiny_checkpoint
from helpers.reference import greedy, runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.cluster.arena_source import ArenaSource
from moray.runtime.arrays import Ints
from moray.runtime.convert.converter import convert
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.experts.source import Fetch, Lease, LeaseTable
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.loader import load_model
from moray.runtime.residency.manager import State
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(280)

PROMPT_IDS = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]
NUM_TOKENS = 6

# Shapes, routing and gates of different kinds: family, and entries of its config. gpt_oss has biases and a gate of its
# own; a relu gate is none of the fused ones, so torch computes it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "many": ("qwen3_moe", {"num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 2}),
    "biases": ("gpt_oss", {"num_hidden_layers": 2}),
    "relu": ("mixtral", {"hidden_act": "relu", "num_hidden_layers": 2}),
}


@dataclass(frozen=True)
class Case:
    """A store, and what it says with all its experts in this process."""

    store: Store
    numerics: Numerics
    tokens: list[int]
    logits: torch.Tensor
    logits_of_5: torch.Tensor


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Numerics], Case]]:
    stores: list[Store] = []

    @cache
    def store_of(model: str) -> Path:
        root, (family, entries) = tmp_path_factory.mktemp(model), MODELS[model]
        convert(tiny_checkpoint(family, root / "checkpoint", **entries), root / "store", "hqq4:16")
        return root / "store"

    @cache
    def case(model: str, numerics: Numerics) -> Case:
        path = store_of(model)
        stores.append(Store.open(path))
        with runner(path, numerics) as made:
            tokens = greedy(made, PROMPT_IDS, NUM_TOKENS)
            return Case(stores[-1], numerics, tokens, made.logits(PROMPT_IDS), made.logits(PROMPT_IDS[:5]))

    yield case
    for store in stores:
        store.close()


def check(case: Case, made: Runner) -> None:
    """Prefill of all at once, and of a part; decode."""
    assert greedy(made, PROMPT_IDS, NUM_TOKENS) == case.tokens
    assert torch.equal(made.logits(PROMPT_IDS), case.logits)
    assert torch.equal(made.logits(PROMPT_IDS[:5]), case.logits_of_5)


def slot_counts(store: Store, num_hosts: int) -> list[int]:
    whole = len(store.manifest.shards) // num_hosts
    return sorted({1, 2, 3, whole // 3, whole - 1, whole})


# --------------------------------------------------------------------------------- any slots and hosts


@pytest.mark.parametrize("num_hosts", [1, 2])
@pytest.mark.parametrize("numerics", ["int8", "float"])
@pytest.mark.parametrize("model", MODELS)
def test_any_number_of_slots_gives_the_same_bits(
    model: str, numerics: Numerics, num_hosts: int, case_of: Callable[[str, Numerics], Case]
) -> None:
    case = case_of(model, numerics)
    for num_slots in slot_counts(case.store, num_hosts):
        with capped(case.store, num_slots, num_hosts, numerics) as made:
            check(case, made.runner)


def test_a_layer_with_room_for_one_expert_is_computed_one_by_one(case_of: Callable[[str, Numerics], Case]) -> None:
    case = case_of("many", "int8")
    with capped(case.store, 1) as made:
        check(case, made.runner)
        assert made.runner.stats().uses <= made.source.stats().misses + made.hosts[0].stats().residency.demand_loads


def test_nothing_is_sent_once_all_is_in_memory(case_of: Callable[[str, Numerics], Case]) -> None:
    case = case_of("many", "int8")
    with hosts_and_source(case.store, len(case.store.manifest.shards)) as (hosts, source):
        made = Runner(case.store, source, load_model(case.store, "int8", torch.device("cpu")))
        source._clients[0].send = refuse_to_send  # type: ignore[method-assign]
        check(case, made)
        made.close()
        assert source.stats().misses == 0 and hosts[0].stats().residency.demand_loads == 0


def refuse_to_send(*arguments: object) -> int:
    raise AssertionError(f"sent {arguments}")


# ------------------------------------------------------------------------------ the worst of moments


class Meddler:
    """A source that meddles between a look into the directory and the computing, between the computing and the second
    look, and before the next. It has hosts evict what is not claimed, gives hints, and overwrites what is.
    """

    def __init__(self, hosts: Sequence[ShardHost], source: ArenaSource, seed: int, share: float) -> None:
        self._hosts, self._source, self._share = hosts, source, share
        self._random = np.random.default_rng(seed)
        self._scribbled: list[tuple[ShardHost, int, int]] = []  # host, its number of the expert, slot
        self.num_broken = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def fetch(self, layer: int, experts: Ints) -> _MeddledFetch:
        self.restore()
        self.meddle(layer, [])
        return _MeddledFetch(self, layer, experts, self._source.fetch(layer, experts))

    def table(self, layer: int) -> Any:
        """Looked up by the kernel, or before, and then perhaps overwritten."""
        self.restore()
        table = self._source.table(layer)
        if self._random.random() < 0.5:
            self.meddle(layer, [])
            return table
        self._source.in_memory(layer, np.arange(len(table.addresses)))
        seen = LeaseTable.fixed(table.addresses, table.counters, table.generations)
        self.meddle(layer, np.arange(len(table.addresses)))
        return seen

    def meddle(self, layer: int, experts: Sequence[int]) -> None:
        """``experts``: one of them may be overwritten."""
        if self._random.random() < self._share:
            push_out(self._hosts, self._random, "other")
        if len(experts) and self._random.random() < self._share:
            self._scribble(ExpertKey(layer, int(self._random.choice(experts))))

    def _scribble(self, key: ExpertKey) -> None:
        host = next(host for host in self._hosts if key in host.keys)
        index = host.keys.index(key)
        with host._loader.lock:
            if host._manager.state(index) is not State.RESIDENT:
                return
            host.need(f"scribble-{index}", key.layer, [key.expert])  # nobody else may take this slot meanwhile
            slot = int(host.arena.directory[index])
            memory = host.arena.begin_write(slot, index)
        memory[:] = self._random.bytes(len(memory))
        host.arena.generations[slot] += self._random.integers(2)  # perhaps it looks whole again
        self._scribbled.append((host, index, slot))

    def restore(self) -> None:
        for host, index, slot in self._scribbled:
            host.arena.generations[slot] |= 1
            shard = host.store.read_shard(host.keys[index]).tobytes()
            host.arena.slot(slot)[: len(shard)] = shard
            host.arena.end_write(slot, index)
            host.drop_client(f"scribble-{index}")
        self._scribbled.clear()


class _MeddledFetch:
    def __init__(self, meddler: Meddler, layer: int, experts: Ints, fetch: Fetch) -> None:
        self._meddler, self._layer, self._experts, self._fetch = meddler, layer, experts, fetch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fetch, name)

    def take(self) -> tuple[Ints, Lease]:
        self._meddler.restore()
        positions, lease = self._fetch.take()
        self._meddler.meddle(self._layer, self._experts[positions])
        return positions, _MeddledLease(self._meddler, self._layer, lease)


class _MeddledLease:
    def __init__(self, meddler: Meddler, layer: int, lease: Lease) -> None:
        self._meddler, self._layer, self._lease, self.addresses = meddler, layer, lease, lease.addresses

    def is_valid(self) -> bool:
        self._meddler.meddle(self._layer, [])
        valid = self._lease.is_valid()
        self._meddler.num_broken += not valid
        return valid


def push_out(hosts: Sequence[ShardHost], random: np.random.Generator, client: str) -> None:
    """Another client needs as many experts as a host has slots, and soon no longer; and predicts others."""
    for host in hosts:
        key = host.keys[int(random.integers(len(host.keys)))]
        experts = [k.expert for k in host.keys if k.layer == key.layer]
        wanted = random.permutation(experts)[: host.arena.num_slots].tolist()
        host.need(client, key.layer, wanted)
        host.hint(int(random.integers(key.layer + 1)), [])
        host.hint(key.layer, random.permutation(experts)[:2].tolist())
        indices = host._indices(key.layer, wanted)
        with host._loader.lock:  # it waits a little: what the model has claimed does not go
            host._loader.lock.wait_for(lambda i=indices, h=host: all_here(h, i), 0.002)
        host.drop_client(client)


def all_here(host: ShardHost, indices: Sequence[int]) -> bool:
    return all(host._manager.state(index) is State.RESIDENT for index in indices)


@contextmanager
def meddled(case: Case, num_slots: int, num_hosts: int, seed: int, share: float, is_thread: bool) -> Iterator[Any]:
    """A runner, and its meddler."""
    with hosts_and_source(case.store, num_slots, num_hosts) as (hosts, source):
        meddler = Meddler(hosts, source, seed, share)
        model = load_model(case.store, case.numerics, torch.device("cpu"))
        made = Runner(case.store, meddler, model, case.numerics)  # type: ignore[arg-type]
        stop, random = threading.Event(), np.random.default_rng(seed + 1)

        def push() -> None:
            while not stop.is_set():
                push_out(hosts, random, "thread")

        thread = threading.Thread(target=push)
        if is_thread:
            thread.start()
        try:
            yield made, meddler
        finally:
            stop.set()
            if is_thread:
                thread.join()
            made.close()
            meddler.restore()


@pytest.mark.parametrize("num_hosts", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_evicted_at_the_worst_moment_costs_no_bit(
    model: str, num_hosts: int, case_of: Callable[[str, Numerics], Case]
) -> None:
    case = case_of(model, "int8")
    with meddled(case, 12 // num_hosts, num_hosts, seed=0, share=0.3, is_thread=False) as (made, meddler):
        check(case, made)
    assert meddler.num_broken > 0  # it did happen


@pytest.mark.parametrize(
    "count", [25, pytest.param(500, marks=[pytest.mark.long, pytest.mark.timeout(6000)])], ids=["some", "many"]
)
def test_any_slots_hosts_predictions_and_evictions_give_the_same_bits(
    count: int, case_of: Callable[[str, Numerics], Case]
) -> None:
    @settings(
        max_examples=count, deadline=None, database=None, derandomize=count < 100,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        st.sampled_from(sorted(MODELS)),
        st.sampled_from(["int8", "float"]),
        st.integers(1, 3),
        st.floats(0, 1),
        st.integers(0, 1000),
        st.sampled_from([0.0, 0.1, 0.5]),
        st.booleans(),
    )
    def run(
        model: str, numerics: Numerics, num_hosts: int, room: float, seed: int, share: float, is_thread: bool
    ) -> None:
        case = case_of(model, numerics)
        num_slots = max(1, round(room * room * len(case.store.manifest.shards) / num_hosts))
        with meddled(case, num_slots, num_hosts, seed, share, is_thread) as (made, _):
            check(case, made)

    run()
