"""Experts computed by other machines: the same bits, whoever computes what, and whatever happens to them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.hosts import TOKEN, make_host, new_address, serving
from helpers.reference import greedy, runner
from helpers.remote import host_process, net, pairs_computed, serve
from helpers.waiting import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.cluster import remote
from moray.cluster.activations import WireFormat
from moray.cluster.client import HostAddress, HostClient
from moray.cluster.cluster_source import ClusterSource
from moray.cluster.keys import KeyPair
from moray.cluster.messages import Compute, Computed
from moray.runtime.convert.converter import convert
from moray.runtime.errors import ClusterError, ConfigError, ProtocolError
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(280)

PROMPT_IDS = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]
NUM_TOKENS = 6
TRIALS = 36  # pairs that a host is measured with

# Shapes and gates of different kinds: family, entries of its config, recipe. gpt_oss has biases and a gate of its own.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "many": ("qwen3_moe", {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 2}, "hqq4:16"),
    "biases": ("gpt_oss", {"num_hidden_layers": 2}, "hqq4:16"),
    "relu": ("mixtral", {"hidden_act": "relu", "num_hidden_layers": 2}, "hqq4:16"),
    "plain": ("mixtral", {"num_hidden_layers": 2}, "none"),
}


@dataclass(frozen=True)
class Case:
    """A store, and what it says with all its experts in this process."""

    store: Store
    numerics: Numerics
    tokens: list[int]
    logits: torch.Tensor

    def check(self, made: Runner) -> None:
        assert greedy(made, PROMPT_IDS, NUM_TOKENS) == self.tokens
        assert torch.equal(made.logits(PROMPT_IDS), self.logits)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Numerics], Case]]:
    stores: list[Store] = []

    @cache
    def store_of(model: str) -> Path:
        root, (family, entries, recipe) = tmp_path_factory.mktemp(model), MODELS[model]
        convert(tiny_checkpoint(family, root / "checkpoint", **entries), root / "store", recipe)
        return root / "store"

    @cache
    def case(model: str, numerics: Numerics) -> Case:
        path = store_of(model)
        stores.append(Store.open(path))
        with runner(path, numerics) as made:
            return Case(stores[-1], numerics, greedy(made, PROMPT_IDS, NUM_TOKENS), made.logits(PROMPT_IDS))

    yield case
    for store in stores:
        store.close()


@pytest.fixture(scope="module")
def demo_case(demo: Store) -> Case:
    with runner(demo.path, "int8") as made:
        return Case(demo, "int8", greedy(made, PROMPT_IDS, NUM_TOKENS), made.logits(PROMPT_IDS))


@contextmanager
def generating(case: Case, source: ClusterSource) -> Iterator[Runner]:
    made = Runner(case.store, source, load_model(case.store, case.numerics, torch.device("cpu")), case.numerics)
    try:
        yield made
    finally:
        made.close()


def deal(store: Store, seed: int, num_remotes: int, replicas: float) -> tuple[list[ExpertKey], list[list[ExpertKey]]]:
    """Experts at random on this node and others, some on several."""
    rng, nodes = np.random.default_rng(seed), [[] for _ in range(1 + num_remotes)]
    for key in store.manifest.shards:
        count = 1 + int(rng.binomial(num_remotes, replicas))
        for node in rng.permutation(len(nodes))[:count]:
            nodes[node].append(key)
    return nodes[0], nodes[1:]


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.sampled_from(sorted(MODELS)), st.sampled_from(["int8", "float"]), st.integers(1, 2), st.integers(0, 99),
    st.sampled_from([0.0, 0.5]), st.sampled_from([1, 5, 1000]),
)  # fmt: skip
def test_any_split_gives_the_same_bits(
    case_of: Callable[[str, Numerics], Case], model: str, numerics: Numerics, num_remotes: int, seed: int,
    replicas: float, num_slots: int,
) -> None:  # fmt: skip
    case = case_of(model, numerics)
    here, elsewhere = deal(case.store, seed, num_remotes, replicas)
    for lanes in ("remote", "auto"):
        with net(case.store, here, elsewhere, num_slots, numerics=numerics, lanes=lanes) as made:
            with generating(case, made.source) as run:
                case.check(run)
            trials = TRIALS * num_remotes
            if lanes == "remote":
                assert (made.remote_pairs() > trials) == (model != "relu")
                assert (run.stats().bytes_by_source["remote"] > 0) == (model != "relu")
            else:
                assert made.remote_pairs() >= trials


def test_forced_local_asks_nobody(demo_case: Case) -> None:
    every = list(demo_case.store.manifest.shards)
    with net(demo_case.store, every[::2], [every], lanes="local") as made, generating(demo_case, made.source) as run:
        demo_case.check(run)
        assert made.source.remote_stats()[0].requests == 0 and run.stats().bytes_by_source["remote"] == 0


def test_work_that_would_take_too_long_goes_in_several_requests(
    demo_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request for every pair, and the same bits."""
    monkeypatch.setattr(remote, "LONGEST_S", 0.0)
    every = list(demo_case.store.manifest.shards)
    with net(demo_case.store, [], [every], lanes="remote") as made, generating(demo_case, made.source) as run:
        demo_case.check(run)
        (stats,) = made.source.remote_stats()
        assert 0 < stats.pairs <= stats.requests


@pytest.mark.long  # kernels of other instruction sets are compiled
@pytest.mark.timeout(1200)
def test_hosts_of_other_instruction_sets_give_the_same_bits(case_of: Callable[[str, Numerics], Case]) -> None:
    client = KeyPair.make()
    for numerics in ("int8", "float"):
        case, keys = case_of("many", numerics), [KeyPair.make(), KeyPair.make()]
        with (
            host_process(case.store, "portable", keys[0], client, (2, 0), MORAY_KERNEL="portable") as (one, first),
            host_process(case.store, "avx2", keys[1], client, (2, 1), MORAY_KERNEL="avx2") as (other, second),
            standing(case, [first, second], client, numerics=numerics, lanes="remote", join_s=500) as (source, run),
        ):
            assert {each.state for each in source.remote_stats()} == {"up"}
            case.check(run)
            for process in (one, other):  # a deadline may have passed, once or more
                while pairs_computed(process) <= TRIALS:
                    case.check(run)


# -------------------------------------------------------------------------------------- failures


@contextmanager
def standing(
    case: Case, remote: list[HostAddress], client: KeyPair, **options: Any
) -> Iterator[tuple[ClusterSource, Runner]]:
    """A node whose own host has nothing in memory, and a disk."""
    host, address = (
        make_host(case.store, list(case.store.manifest.shards), assigned=[], num_slots=8),
        new_address("here"),
    )
    try:
        with serving(address, host):
            source = ClusterSource(case.store, [address], remote, client, **options)
            try:
                with generating(case, source) as run:
                    yield source, run
            finally:
                source.close()
    finally:
        host.close()


class Faulty(threading.Thread):
    """Generates again and again until ``stop``; every answer must be the same."""

    def __init__(self, case: Case, run: Runner) -> None:
        super().__init__()
        self._case, self._run, self._is_over = case, run, threading.Event()
        self.count, self.error = 0, None

    def run(self) -> None:
        try:
            while not self._is_over.is_set():
                tokens = greedy(self._run, PROMPT_IDS, NUM_TOKENS)
                assert tokens == self._case.tokens, tokens
                self.count += 1
        except BaseException as error:
            self.error = error

    def more(self, count: int = 2) -> None:
        """Wait for some more answers."""
        wanted = self.count + count
        until(lambda: self.count >= wanted or self.error is not None)
        assert self.error is None, self.error

    def stop(self) -> None:
        self._is_over.set()
        self.join()
        assert self.error is None, self.error


def kill(process: Popen[str]) -> None:
    process.kill()
    process.wait()


def test_hosts_that_die_freeze_and_return_cost_no_token(demo_case: Case) -> None:
    """One host has a replica of half the other's experts. Killed, stopped, restarted; at last none is left."""
    store, client, keys = demo_case.store, KeyPair.make(), [KeyPair.make(), KeyPair.make()]
    with (
        host_process(store, "all", keys[0], client) as (whole, first),
        host_process(store, "half", keys[1], client, (2, 0)) as (half, second),
        standing(demo_case, [first, second], client, lanes="remote", join_s=100) as (source, run),
    ):

        def stats() -> dict[str, Any]:
            return {each.host_id: each for each in source.remote_stats()}

        work = Faulty(demo_case, run)
        work.start()
        try:
            work.more()
            os.kill(half.pid, signal.SIGSTOP)
            until(lambda: stats()["half"].state != "up")
            work.more()
            assert stats()["all"].state == "up"
            os.kill(half.pid, signal.SIGCONT)
            until(lambda: stats()["half"].state == "up")
            before = stats()["half"].requests
            until(lambda: stats()["half"].requests > before)
            kill(whole)
            until(lambda: stats()["all"].state == "down")
            work.more()
            with host_process(store, "all", keys[0], client, address=first.address) as (again, same):
                assert same.address == first.address
                until(lambda: stats()["all"].state == "up")
                before = pairs_computed(again)
                work.more()
                assert pairs_computed(again) > before
            kill(half)
            until(lambda: {each.state for each in stats().values()} == {"down"})
            work.more()
            assert source.stats().misses > 0
        finally:
            work.stop()
        demo_case.check(run)


def test_a_host_that_is_passed_over_for_long_is_measured_again(demo_case: Case) -> None:
    client, keys = KeyPair.make(), KeyPair.make()
    with (
        host_process(demo_case.store, "far", keys, client) as (_, address),
        standing(demo_case, [address], client) as (source, run),
    ):
        host = source._remote.hosts[0]
        with source._remote.lock:
            host.link.round_trip_s = 10.0  # as if it had been measured at a bad moment
            host._publish_link()
        before = host.stats.requests
        demo_case.check(run)
        assert host.stats.requests == before and host.passed_over > 0
        with source._remote.lock:
            had, host.resident, host.passed_over = host.resident, [np.zeros_like(held) for held in host.resident], 0
        demo_case.check(run)
        assert host.passed_over == 0  # it had nothing to offer
        host.resident = had
        host.passed_over = 10**6
        until(lambda: host.link.round_trip_s < 1 and not host._trial)
        demo_case.check(run)
        assert host.is_up and host.stats.joined == 1 and host.passed_over < 10**6


def test_a_host_that_is_asked_for_what_it_lacks_says_so_and_loads_it(demo_case: Case) -> None:
    """Whatever it has learned of predictions: it will be asked again."""
    store, client, hints = demo_case.store, KeyPair.make(), []
    experts = [ExpertKey(0, expert) for expert in range(3)]
    far = serve(store, "far", experts[:2], client, num_slots=3)
    hint = far.host.hint
    form = WireFormat.of(store.manifest.layers[0].layout["gate_up_proj"].spec, "float")
    activations = form.encode(np.zeros((1, form.columns), np.float32), np.arange(1))
    asked = Compute(layer=0, experts=[2], counts=[1], num_rows=1, numerics="float")
    asking = HostClient(far.address, "tester", keys=client)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(far.host, "hint", lambda *a, **b: (hints.append((a, b)), hint(*a, **b)))
            asking.greet()
            with pytest.raises(ProtocolError, match=r"experts \[2\] of layer 0 are not in memory yet"):
                asking.request(asked, memoryview(activations))
        assert hints == [((0, [2]), {"is_prediction": False})]
        until(lambda: far.host.absent(0, [2]) == [])
        assert isinstance(asking.request(asked, memoryview(activations))[0], Computed)
    finally:
        asking.close()
        far.server.close()
        far.host.close()


def test_a_host_that_moved_and_one_that_left(demo_case: Case) -> None:
    store, client, keys = demo_case.store, KeyPair.make(), KeyPair.make()
    with standing(demo_case, [], client, lanes="remote") as (source, run):
        demo_case.check(run)
        for _ in range(2):
            with host_process(store, "far", keys, client) as (process, address):
                source.join(address)
                until(lambda: [each.state for each in source.remote_stats()] == ["up"])
                demo_case.check(run)
                assert pairs_computed(process) > TRIALS
        source.leave("far")
        assert source.remote_stats() == []
        demo_case.check(run)


def test_a_host_of_another_store_or_with_other_keys_is_not_used(
    demo_case: Case, case_of: Callable[[str, Numerics], Case]
) -> None:
    client, keys, other = KeyPair.make(), KeyPair.make(), case_of("many", "int8").store
    with host_process(other, "other", keys, client) as (_, address):
        with pytest.raises(ClusterError, match="other holds another store"), standing(demo_case, [address], client):
            pass
        wrong = HostAddress("other", address.address, TOKEN, server_key=KeyPair.make().public)
        for bad, mine in ((wrong, client), (address, KeyPair.make())):
            with standing(demo_case, [bad], mine, join_s=0.5, lanes="remote") as (source, run):
                assert [each.state for each in source.remote_stats()] == ["down"]
                demo_case.check(run)
        liar = HostAddress("other", address.address, "another token", server_key=address.server_key)
        with pytest.raises(ClusterError, match="the session token is wrong"), standing(demo_case, [liar], client):
            pass
    with pytest.raises(ConfigError, match="lanes is 'fast', expected one of auto, local, remote"):
        ClusterSource(demo_case.store, [], [], client, lanes="fast")
