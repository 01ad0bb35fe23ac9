from __future__ import annotations

import ctypes
import itertools
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hosts import cluster_of, make_host, new_address, serving, watching
from helpers.reference import greedy
from helpers.waiting import num_open_files, until_closed

from moray.cluster import server
from moray.cluster.arena_source import ArenaSource
from moray.cluster.client import HostAddress
from moray.cluster.messages import Ask
from moray.cluster.server import DataPlaneServer
from moray.runtime.arena import Arena
from moray.runtime.arrays import Ints
from moray.runtime.errors import ClusterError, HostLostError, ProtocolError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.experts.source import ExpertSource, Fetch, InProcessSource, Lease, SourceInfo, SourceStats
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(120)

PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def expected(demo_runner: Runner) -> list[int]:
    """What the demonstration model says with all its experts in this process."""
    return greedy(demo_runner, list(demo_runner.encode(PROMPT)), NUM_TOKENS)


@contextmanager
def source_of(store: Store, addresses: Sequence[HostAddress]) -> Iterator[ArenaSource]:
    source = ArenaSource(store, addresses)
    try:
        yield source
    finally:
        source.close()


@contextmanager
def runner_of(store: Store, source: ExpertSource) -> Iterator[Runner]:
    runner = Runner(store, source, load_model(store, "int8", torch.device("cpu")))
    try:
        yield runner
    finally:
        runner.close()


def generate(runner: Runner) -> list[int]:
    return greedy(runner, list(runner.encode(PROMPT)), NUM_TOKENS)


def rewrite(host: ShardHost, key: ExpertKey, data: bytes) -> None:
    """Write into the slot where an expert lies, and publish it there again."""
    index = host.keys.index(key)
    slot = int(host.arena.directory[index])
    host.arena.begin_write(slot, index)[: len(data)] = data
    host.arena.end_write(slot, index)


# ------------------------------------------------------------------------------------- same tokens


@pytest.mark.parametrize("num_hosts", [1, 2, 3])
def test_any_number_of_hosts_gives_the_same_tokens(demo: Store, expected: list[int], num_hosts: int) -> None:
    with cluster_of(demo, num_hosts) as hosts:
        with source_of(demo, [address for address, _ in hosts]) as source, runner_of(demo, source) as runner:
            assert generate(runner) == expected
            stats = runner.stats()
        assert set(stats.bytes_by_source) == {f"host-{index}" for index in range(num_hosts)}
        assert all(stats.bytes_by_source.values())
        assert [info.num_experts for info in source.describe()] == [48 // num_hosts] * num_hosts


def test_shards_are_used_where_they_lie(demo: Store) -> None:
    with cluster_of(demo, 2) as hosts, source_of(demo, [address for address, _ in hosts]) as source:
        for layer in range(len(demo.manifest.layers)):
            experts = np.array([6, 0, 3], dtype=np.int64)
            fetch = source.fetch(layer, experts)
            positions, lease = fetch.take()
            assert positions.tolist() == [0, 1, 2] and lease.is_valid() and not fetch.is_over
            for address, expert in zip(lease.addresses.tolist(), experts.tolist(), strict=True):
                shard = demo.read_shard(ExpertKey(layer, expert))
                found = (ctypes.c_uint8 * len(shard)).from_address(address)
                assert bytes(found) == shard.tobytes()
            fetch.finish(positions[1:])
            assert fetch.take()[0].tolist() == [0]
            fetch.finish(positions[:1])
            assert fetch.is_over
        for layer in range(len(demo.manifest.layers)):
            owners = source.owner_of(layer)
            for expert, owner in enumerate(owners.tolist()):
                assert ExpertKey(layer, expert) in hosts[owner][1].keys


def test_the_hot_path_sends_nothing(demo: Store) -> None:
    address, host = new_address("only"), make_host(demo, list(demo.manifest.shards))
    with serving(address, host) as server, source_of(demo, [address]) as source, runner_of(demo, source) as runner:
        before = server.stats.requests
        generate(runner)
        assert server.stats.requests == before == 1  # Hello
    host.close()


def test_a_host_is_told_at_once_what_was_predicted_wrong(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the layer had all that it needed: else the host would read on what nobody waits for."""
    host = make_host(demo, list(demo.manifest.shards), num_slots=3 * len(demo.manifest.layers), prefetch="on")
    address = new_address("only")
    with serving(address, host), source_of(demo, [address]) as source:
        sent: list[Any] = []
        monkeypatch.setattr(source._hosts[0].link, "send", sent.append)
        experts = np.arange(demo.manifest.layers[1].num_experts)
        is_here = source.in_memory(1, experts)
        here, absent = experts[is_here].tolist(), experts[~is_here].tolist()
        source.hint(1, absent[:2])
        source.used(1, here[:2])
        source.used(1, here[:2])  # nothing was predicted for this call
        source.hint(1, absent[:1])
        source.used(1, [here[0], absent[0]])
        source.hint(1, absent[1:])
        assert [(message.experts, message.uses) for message in sent] == [
            (absent[:2], []),
            ([], [[1, *here[:2]]]),
            (absent[:1], [[1, *here[:2]]]),
            (absent[1:], [[1, here[0], absent[0]]]),
        ]
    host.close()


# ------------------------------------------------------------------------------- what is refused


def test_another_store_is_refused_and_nothing_stays_open(demo: Store) -> None:
    other = Store(demo.path, replace(demo.manifest, trunk_checksum=0))
    with cluster_of(demo, 2) as hosts:
        before = num_open_files()
        with pytest.raises(ClusterError, match=f"host-0 holds another store.*{demo.fingerprint}.*{other.fingerprint}"):
            ArenaSource(other, [address for address, _ in hosts])
        until_closed(before)


def test_another_rule_of_numerics_is_refused(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster_of(demo, 1) as hosts:
        monkeypatch.setattr(server, "NUMERICS_ID", "int8-v0")
        with pytest.raises(ClusterError, match="int8-v0"):
            ArenaSource(demo, [hosts[0][0]])


def test_an_expert_that_lives_on_no_host_is_missed_and_nothing_stays_open(demo: Store) -> None:
    with cluster_of(demo, 3) as hosts:
        before = num_open_files()
        with pytest.raises(ClusterError, match=r"16 experts of .* live on no host"):
            ArenaSource(demo, [address for address, _ in hosts[:2]])
        with pytest.raises(ClusterError, match="48 experts"):
            ArenaSource(demo, [])
        until_closed(before)


def test_a_wrong_token_is_refused_and_nothing_stays_open(demo: Store) -> None:
    with cluster_of(demo, 1) as hosts:
        before = num_open_files()
        with pytest.raises(ProtocolError, match="token"):
            ArenaSource(demo, [replace(hosts[0][0], token="guess")])
        until_closed(before)


def test_an_arena_that_cannot_be_reached_is_a_lost_host(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(ref: object) -> Arena:
        raise HostLostError("gone")

    with cluster_of(demo, 1) as hosts:
        monkeypatch.setattr(Arena, "attach", attach)
        before = num_open_files()
        with pytest.raises(HostLostError, match="gone"):
            ArenaSource(demo, [hosts[0][0]])
        until_closed(before)


# -------------------------------------------------------------------------------------- generations


def test_a_stale_lease_shows_and_is_taken_anew(demo: Store) -> None:
    with cluster_of(demo, 2) as hosts, source_of(demo, [address for address, _ in hosts]) as source:
        experts = np.arange(4)
        fetch = source.fetch(0, experts)
        (_, first), (_, unrelated) = fetch.take(), source.fetch(1, experts).take()
        _, host = hosts[0]
        index = host.keys.index(ExpertKey(0, 2))
        host.arena.begin_write(index, index)
        assert not first.is_valid()  # while it is written
        host.arena.end_write(index, index)
        assert not first.is_valid() and unrelated.is_valid()
        positions, second = fetch.take()
        assert positions.tolist() == [0, 1, 2, 3] and second.is_valid() and not first.is_valid()
        np.testing.assert_array_equal(second.addresses, first.addresses)
        assert source.fetch(0, np.array([1, 3])).take()[1].is_valid()


class MeddlingSource:
    """Passes fetches on; spoils a shard in its host's arena while each of the first leases is in use."""

    wants_uses = False
    remote = None

    def __init__(self, source: ArenaSource, hosts: dict[str, ShardHost], times: int) -> None:
        self._source, self._hosts, self.times_left = source, hosts, times
        self._names = [info.name for info in source.describe()]

    def fetch(self, layer: int, experts: Ints) -> Fetch:
        fetch = self._source.fetch(layer, experts)
        if not self.times_left:
            return fetch
        self.times_left -= 1
        expert = int(experts[0])
        host = self._hosts[self._names[int(self._source.owner_of(layer)[expert])]]
        return _SpoiledFetch(fetch, host, ExpertKey(layer, expert))

    def table(self, layer: int) -> None:
        """Everything is fetched."""

    def describe(self) -> list[SourceInfo]:
        return self._source.describe()

    def owner_of(self, layer: int) -> Ints:
        return self._source.owner_of(layer)

    def stats(self) -> SourceStats:
        return self._source.stats()

    def close(self) -> None:
        self._source.close()


class _SpoiledFetch:
    def __init__(self, fetch: Fetch, host: ShardHost, key: ExpertKey) -> None:
        self._fetch, self._host, self._key, self._is_spoiled = fetch, host, key, False

    @property
    def is_over(self) -> bool:
        return self._fetch.is_over

    def take(self) -> tuple[Ints, Lease]:
        positions, lease = self._fetch.take()
        if self._is_spoiled:
            return positions, lease
        self._is_spoiled = True
        return positions, _SpoiledLease(lease, self._host, self._key)

    def finish(self, positions: Ints) -> None:
        self._fetch.finish(positions)


class _SpoiledLease:
    def __init__(self, lease: Lease, host: ShardHost, key: ExpertKey) -> None:
        self.addresses = lease.addresses
        self._lease, self._host, self._key = lease, host, key
        rewrite(host, key, np.random.default_rng(0).bytes(host.arena.slot_bytes))

    def is_valid(self) -> bool:
        valid = self._lease.is_valid()
        assert not valid
        rewrite(self._host, self._key, self._host.store.read_shard(self._key).tobytes())
        return valid


def test_what_was_computed_from_a_rewritten_slot_is_thrown_away(demo: Store, expected: list[int]) -> None:
    with cluster_of(demo, 2) as hosts, source_of(demo, [address for address, _ in hosts]) as source:
        meddling = MeddlingSource(source, {address.host_id: host for address, host in hosts}, times=0)
        with runner_of(demo, meddling) as runner:
            meddling.times_left = 50
            assert generate(runner) == expected
            assert meddling.times_left == 0
            stats = runner.stats()
        # What was thrown away is not counted.
        assert stats.layer_calls == len(demo.manifest.layers) * NUM_TOKENS


def test_a_host_restarted_with_its_arena_is_used_on(demo: Store, expected: list[int], tmp_path: Path) -> None:
    keys = list(demo.manifest.shards)
    address = new_address("phoenix")
    first = make_host(demo, keys)
    server = DataPlaneServer(address.host_id, first, address.address, address.token)
    with source_of(demo, [address]) as source, runner_of(demo, source) as runner, ExitStack() as stack:
        assert generate(runner) == expected
        wait = stack.enter_context(watching(source._clients[0]))
        server.close()
        first.close()
        # One slot was being written. The store lacks every file but the one that slot is loaded from.
        lost = ExpertKey(3, int(np.argmax(runner.stats().tokens_per_expert[3])))
        arena = Arena.attach(source.arena_refs()["phoenix"], writable=True)
        slot = int(arena.directory[keys.index(lost)])
        arena.begin_write(slot, keys.index(lost))[:100] = bytes(100)
        store = stack.enter_context(Store.open(shutil.copytree(demo.path, tmp_path / "store")))
        for file in {entry.file for key, entry in store.manifest.shards.items() if key.layer != lost.layer}:
            (store.path / file).unlink()
        second = make_host(store, keys, 1, arena=arena)
        assert second.stats().loader.bytes_read == store.manifest.shards[lost].num_bytes
        with serving(address, second) as restarted:
            wait()
            assert generate(runner) == expected
            assert not restarted.stats.clients  # everything was there: nobody had to be asked
            source._clients[0].insist(Ask(layer=0, experts=[0]))
            assert restarted.stats.clients == {"compute"}
        second.close()


def test_a_restarted_host_is_asked_again_however_much_comes_for_others(demo: Store) -> None:
    """It does not know what this client needs, and is busy: arrivals alone are no sign of being served."""
    address, host = new_address("phoenix"), make_host(demo, list(demo.manifest.shards), num_slots=2)
    stop, served = threading.Event(), threading.Event()

    def keep_busy() -> None:
        for layer in itertools.cycle(range(5)):
            if stop.is_set():
                break
            host.need("other", layer, [layer])
            with host._loader.lock:
                host._loader.lock.wait_for(lambda of=layer: host.arena.directory[9 * of] >= 0, 10)
        host.drop_client("other")

    def fetch(source: ArenaSource) -> None:
        fetch = source.fetch(5, np.array([0]))
        while not fetch.is_over:
            fetch.finish(fetch.take()[0])
        served.set()

    with serving(address, host) as server, source_of(demo, [address]) as source:
        server._known.clear()  # as a new process
        threads = [threading.Thread(target=keep_busy), threading.Thread(target=fetch, args=(source,))]
        for thread in threads:
            thread.start()
        was_served = served.wait(20)
        stop.set()
        for thread in threads:
            thread.join()
        assert was_served
    host.close()


# --------------------------------------------------------------------------------- InProcessSource


def test_experts_in_this_process_need_no_host(demo: Store) -> None:
    source = InProcessSource(demo)
    fetch = source.fetch(2, np.array([7, 0]))
    positions, lease = fetch.take()
    assert positions.tolist() == [0, 1]
    for address, expert in zip(lease.addresses.tolist(), (7, 0), strict=True):
        shard = demo.read_shard(ExpertKey(2, expert))
        assert bytes((ctypes.c_uint8 * len(shard)).from_address(address)) == shard.tobytes()
    assert lease.is_valid() and not fetch.is_over
    fetch.finish(positions)
    assert fetch.is_over
    assert source.describe() == [SourceInfo("memory", "process", 48, demo.manifest.expert_bytes)]
    assert source.owner_of(0).tolist() == [0] * 8
    source.close()
