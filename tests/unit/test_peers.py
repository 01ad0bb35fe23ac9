"""Shards from other hosts: what the own disk lacks or has damaged, read elsewhere, without a wrong token."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from helpers.capped import hosts_and_source
from helpers.hosts import TOKEN, make_host, new_address, serving
from helpers.partial import damage, lending, partial_copy
from helpers.processes import child, read_line
from helpers.reference import greedy
from helpers.waiting import until
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster import server as server_module
from moray.cluster.client import HostAddress, HostClient
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.messages import Bytes, Ping, Pong, Read, ReadFile
from moray.cluster.peers import Peers
from moray.cluster.server import DataPlaneServer
from moray.runtime.errors import CorruptShardError, HostLostError, ProtocolError, StoreError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.loader import load_model
from moray.runtime.prefetch.replication import ReplicationBudget
from moray.runtime.residency import loader
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(180)  # what hangs fails

PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
NUM_TOKENS = 12
SLOTS = 5
KEY = ExpertKey(4, 3)

# A peer that answers some reads and is gone in the middle of the next shard.
DYING_PEER = """
import os, signal, sys
from moray.cluster import reads
from moray.cluster.server import DataPlaneServer
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.store.store import Store
answer, left = reads.StoreReads.answer, int(sys.argv[3])
def dying(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(*arguments)
reads.StoreReads.answer = dying
server = DataPlaneServer("dying", ShardHost(Store.open(sys.argv[1]), [], 1), sys.argv[2], sys.argv[4])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is three reads."""
    monkeypatch.setattr(loader, "PIECE_BYTES", 65536)


@pytest.fixture(scope="module")
def expected(demo_runner: Runner) -> list[int]:
    return greedy(demo_runner, list(demo_runner.encode(PROMPT)), NUM_TOKENS)


@pytest.fixture(scope="module")
def lender(demo: Store) -> Iterator[HostAddress]:
    with lending(demo) as address:
        yield address


@contextmanager
def peers_of(store: Store, *hosts: HostAddress, timeout_s: float = 20.0) -> Iterator[Peers]:
    peers = Peers(store.manifest, hosts, timeout_s=timeout_s)
    try:
        yield peers
    finally:
        peers.close()


def generate(store: Store, peers: Peers, num_slots: int) -> tuple[list[int], ShardHost]:
    """Tokens of a model on one host, which is closed."""
    with hosts_and_source(store, num_slots, peers=peers) as ((host,), source):
        runner = Runner(store, source, load_model(store, "int8", torch.device("cpu")), "int8")
        try:
            return greedy(runner, list(runner.encode(PROMPT)), NUM_TOKENS), host
        finally:
            runner.close()


def assert_holds(host: ShardHost, store: Store, keys: Sequence[ExpertKey]) -> None:
    for key in keys:
        slot = int(host.arena.directory[host.keys.index(key)])
        assert slot >= 0 and bytes(host.arena.slot(slot)[: store.manifest.shards[key].num_bytes]) == (
            store.read_shard(key).tobytes()
        )


def wait_for(host: ShardHost, is_done: Callable[[], object]) -> None:
    with host._loader.lock:
        while not is_done():
            host._loader.lock.wait(0.01)


# ------------------------------------------------------------------------------------ partial stores


@pytest.mark.parametrize("num_slots", [SLOTS, 48])
def test_a_host_with_a_part_of_the_store_gives_the_same_tokens(
    demo: Store, lender: HostAddress, tmp_path: Path, expected: list[int], num_slots: int
) -> None:
    kept = [key for key in demo.manifest.shards if (key.layer + key.expert) % 3 == 0]
    with Store.open(partial_copy(demo, tmp_path / "part", kept)) as store, peers_of(store, lender) as peers:
        tokens, host = generate(store, peers, num_slots)
        loads = host.stats().loader
    assert tokens == expected
    assert loads.peer_loads >= min(num_slots, 32) and 0 < loads.peer_bytes < loads.bytes_read
    assert loads.healed == loads.corrupt_reads == 0


def test_a_shard_that_nobody_has_is_a_clear_error(demo: Store, tmp_path: Path) -> None:
    kept = [key for key in demo.manifest.shards if key != KEY]
    with Store.open(partial_copy(demo, tmp_path / "part", kept)) as store:
        assert not store.is_whole and store.present == kept and not store.has(KEY)
        message = r"expert 3 of MoE layer 4 is not in the partial store .*part; bring it with `moray store sync"
        with pytest.raises(StoreError, match=message):
            store.read_shard(KEY)
        host = ShardHost(store, [KEY], 1)
        with pytest.raises(StoreError, match=message):
            host.wait_filled(60)
        host.close()
        with lending(store, "as-poor") as address, peers_of(store, address) as peers:
            host = ShardHost(store, [KEY], 1, peers=peers)
            with pytest.raises(
                ProtocolError, match="expert host as-poor: expert 3 of MoE layer 4 is not in the partial"
            ):
                host.wait_filled(60)
            host.close()


def test_a_shard_that_was_brought_is_seen_by_a_running_host(demo: Store, tmp_path: Path) -> None:
    kept = [key for key in demo.manifest.shards if key != KEY]
    path = partial_copy(demo, tmp_path / "part", kept)
    with Store.open(path) as store:
        host = ShardHost(store, [KEY], 1)
        with pytest.raises(StoreError):
            host.wait_filled(60)
        entry = demo.manifest.shards[KEY]
        with (path / entry.file).open("r+b") as file:
            file.seek(entry.offset)
            file.write(demo.read_shard(KEY).tobytes())
        (path / "present.msgpack").unlink()
        host.need("a", *_wanted(KEY))
        assert host.wait_filled(60) and store.is_whole
        assert_holds(host, demo, [KEY])
        host.close()


def _wanted(key: ExpertKey) -> tuple[int, list[int]]:
    return key.layer, [key.expert]


# ---------------------------------------------------------------------------------- damaged and lying


def test_a_damaged_shard_is_read_from_another_host_without_a_wrong_token(
    demo: Store, lender: HostAddress, tmp_path: Path, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(demo.path, tmp_path / "store"))
    for key in demo.manifest.shards:
        if key.expert % 2:
            damage(path, demo, key)
    entry = demo.manifest.shards[KEY]
    before = (path / entry.file).read_bytes()
    with Store.open(path) as store, peers_of(store, lender) as peers:
        tokens, host = generate(store, peers, 48)
        stats = host.stats()
    assert tokens == expected
    assert stats.loader.healed == stats.loader.peer_loads == len(stats.damaged) == 24
    assert stats.loader.corrupt_reads == 2 * 24  # each was read twice from disk
    message = f"{path / entry.file}: the shard of expert 3 of MoE layer 4 at offset {entry.offset} fails its checksum"
    assert any(line.startswith(message) for line in stats.damaged)
    assert any(
        record.message.startswith(message) and "host lender instead" in record.message for record in caplog.records
    )
    assert (path / entry.file).read_bytes() == before  # repair is not a host's


def test_a_lying_host_is_named_and_another_one_asked(demo: Store, lender: HostAddress, tmp_path: Path) -> None:
    lie, part = Path(shutil.copytree(demo.path, tmp_path / "lie")), partial_copy(demo, tmp_path / "part", [])
    for key in demo.manifest.shards:
        damage(lie, demo, key)
    keys = list(demo.manifest.shards)
    with ExitStack() as stack:
        liar = stack.enter_context(lending(stack.enter_context(Store.open(lie)), "liar"))
        store = stack.enter_context(Store.open(part))
        alone = stack.enter_context(peers_of(store, liar))
        host = ShardHost(store, [KEY], 1, peers=alone)
        with pytest.raises(
            CorruptShardError, match=r"host liar at ipc://.* expert 3 of MoE layer 4 .*store verify` there"
        ):
            host.wait_filled(60)
        host.close()
        host = make_host(store, keys, 1, peers=stack.enter_context(peers_of(store, liar, lender)))
        assert_holds(host, demo, keys)
        assert 0 < host.stats().loader.corrupt_reads <= len(keys)
        host.close()


def test_a_host_of_another_store_is_not_read_from(demo: Store, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo.path, tmp_path / "other"))
    document = msgpack.unpackb((other / "manifest.msgpack").read_bytes())
    (other / "manifest.msgpack").write_bytes(msgpack.packb(document | {"family": "another"}))
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(partial_copy(demo, tmp_path / "part", [])))
        address = stack.enter_context(lending(stack.enter_context(Store.open(other)), "foreign"))
        host = ShardHost(store, [KEY], 1, peers=stack.enter_context(peers_of(store, address)))
        with pytest.raises(StoreError, match=r"host foreign serves another store .*; give every node the same store"):
            host.wait_filled(60)
        host.close()


# ------------------------------------------------------------------------------------- hosts that go


@pytest.mark.parametrize("num_answers", [4, pytest.param(0, marks=pytest.mark.long)])
def test_a_host_that_dies_in_the_middle_of_a_shard_is_replaced(
    demo: Store, lender: HostAddress, tmp_path: Path, num_answers: int
) -> None:
    keys = list(demo.manifest.shards)
    dying = new_address("dying")
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(partial_copy(demo, tmp_path / "part", [])))
        arguments = (str(demo.path), dying.address, str(num_answers), TOKEN)
        process = stack.enter_context(child(DYING_PEER, *arguments))
        assert read_line(process) == "ready"
        peers = stack.enter_context(peers_of(store, dying, lender, timeout_s=1.0))
        host = make_host(store, keys, 1, peers=peers)
        assert process.wait(60) == -9
        assert_holds(host, demo, keys)
        assert host.stats().loader.peer_loads == len(keys)
        host.close()


def test_a_host_whose_peers_are_all_gone_says_who_did_not_answer(demo: Store, tmp_path: Path) -> None:
    gone = new_address("gone"), new_address("gone-too")
    path = Path(shutil.copytree(demo.path, tmp_path / "store"))
    damage(path, demo, KEY)
    with Store.open(path) as store, peers_of(store, *gone, timeout_s=0.2) as peers:
        host = ShardHost(store, [KEY], 1, peers=peers)
        with pytest.raises(
            CorruptShardError, match=r"fails its checksum.*then asked other hosts: .*gone-too? did.*gone"
        ):
            host.wait_filled(60)
        with lending(demo, "back") as address:
            peers.set_hosts([*gone, address])  # it joined
            host.need("a", *_wanted(KEY))
            assert host.wait_filled(60)
            assert_holds(host, demo, [KEY])
        host.close()


def test_hosts_that_lacked_a_shard_or_did_not_answer_are_asked_last(
    demo: Store, lender: HostAddress, tmp_path: Path
) -> None:
    now = [0.0]
    gone = new_address("gone")
    with Store.open(partial_copy(demo, tmp_path / "part", [])) as poor, lending(poor, "poor") as without:
        peers = Peers(demo.manifest, [gone, without, lender], timeout_s=0.2, clock=lambda: now[0])
        buffer = memoryview(bytearray(demo.manifest.slot_bytes))
        for reader in peers.of(KEY):
            if reader.name != "host lender":
                with pytest.raises((HostLostError, ProtocolError)):
                    reader.read(KEY, 0, buffer)
        assert [reader.name for reader in peers.of(KEY)] == ["host lender", "host poor", "host gone"]
        other = ExpertKey(4, 4)
        assert [reader.name for reader in peers.of(other)][2] == "host gone"
        now[0] = 100.0
        assert [reader.name for reader in peers.of(other)] == [f"host {n}" for n in ("lender", "gone", "poor")]
        assert {peers.of(ExpertKey(0, e))[0].name for e in range(3)} == {"host gone", "host poor", "host lender"}
        peers.close()


# --------------------------------------------------------------------------------------- the protocol


def test_wrong_keys_and_wrong_tokens_read_nothing(demo: Store) -> None:
    keys, host = KeyPair.make(), ShardHost(demo, [], 1)
    server = DataPlaneServer("shelf", host, "tcp://127.0.0.1:0", TOKEN, Admission(keys, [keys.public]))
    address = HostAddress("shelf", server.address, TOKEN, server_key=keys.public)
    buffer = memoryview(bytearray(demo.manifest.slot_bytes))

    def read(address: HostAddress, admission: KeyPair) -> None:
        peers = Peers(demo.manifest, [address], admission, timeout_s=1.0)
        try:
            peers.of(KEY)[0].read(KEY, 0, buffer)
        finally:
            peers.close()

    try:
        read(HostAddress("shelf", server.address, TOKEN, server_key=keys.public), keys)
        assert bytes(buffer) == demo.read_shard(KEY).tobytes()
        num_reads = server.stats.reads
        with pytest.raises(HostLostError, match=r"shelf (at|did)"):
            read(address, KeyPair.make())
        with pytest.raises(HostLostError):
            read(HostAddress("shelf", server.address, TOKEN, server_key=KeyPair.make().public), keys)
        with pytest.raises(ProtocolError, match="token is wrong"):
            read(HostAddress("shelf", server.address, "guessed", server_key=keys.public), keys)
        assert server.stats.reads == num_reads and server.stats.clients_refused >= 1
    finally:
        server.close()
        host.close()


def test_nothing_waits_for_a_read_and_bad_reads_are_refused(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    host, address = ShardHost(demo, [], 1), new_address("shelf")
    go_on, reading, real = threading.Event(), threading.Event(), os.preadv

    def stalled(*arguments: object) -> int:
        reading.set()
        assert go_on.wait(60)
        return real(*arguments)  # type: ignore[arg-type]

    with serving(address, host) as server:
        client = HostClient(address, "tester")
        client.greet()
        bad = [
            Read(layer=4, expert=8, offset=0, num_bytes=4096),
            Read(layer=-1, expert=0, offset=0, num_bytes=4096),
            Read(layer=4, expert=3, offset=100, num_bytes=4096),
            Read(layer=4, expert=3, offset=demo.manifest.shards[KEY].num_bytes, num_bytes=1),
            ReadFile(name="../store/config.json", offset=0, num_bytes=10),
            ReadFile(name="experts-00000.bin", offset=0, num_bytes=10),
            ReadFile(name="config.json", offset=0, num_bytes=1 << 20),
        ]
        for message in bad:
            with pytest.raises(ProtocolError, match="not in the store"):
                client.request(message)
        monkeypatch.setattr(os, "preadv", stalled)
        asked = client.send(Read(layer=4, expert=3, offset=8192, num_bytes=5000))
        assert reading.wait(60)
        with another_client(address) as other:
            assert other.request(Ping())[0] == Pong()  # the read has not come yet
        go_on.set()
        reply, data = client.receive(asked)
        assert isinstance(reply, Bytes) and data == demo.read_shard(KEY).tobytes()[8192:13192]
        assert server.stats.reads == len(bad) + 1
        client.close()
    host.close()


@contextmanager
def another_client(address: HostAddress, name: str = "another") -> Iterator[HostClient]:
    client = HostClient(address, name)
    try:
        client.greet()
        yield client
    finally:
        client.close()


def test_what_a_client_does_not_take_is_not_read(demo: Store) -> None:
    """Far more is asked for than all buffers on the way hold together."""
    size, count = demo.manifest.shards[KEY].num_bytes, 400
    with ExitStack() as stack:
        host, address = stack.enter_context(closing(ShardHost(demo, [], 1))), new_address("shelf")
        server = stack.enter_context(serving(address, host))
        greedy = stack.enter_context(another_client(address))
        asked = [greedy.send(Read(layer=4, expert=3, offset=0, num_bytes=size)) for _ in range(count)]
        with another_client(address, "patient") as other:  # others are served meanwhile
            for _ in range(10):
                reply, data = other.request(Read(layer=0, expert=0, offset=0, num_bytes=4096))
                assert isinstance(reply, Bytes) and data == demo.read_shard(ExpertKey(0, 0)).tobytes()[:4096]
        assert server.stats.reads < count / 2
        shard = demo.read_shard(KEY).tobytes()
        assert all(greedy.receive(request_id)[1] == shard for request_id in asked)


def test_a_client_that_takes_nothing_is_given_up(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "TAKEN_S", 0.05)
    size = demo.manifest.shards[KEY].num_bytes
    with ExitStack() as stack:
        host, address = stack.enter_context(closing(ShardHost(demo, [], 1))), new_address("shelf")
        server = stack.enter_context(serving(address, host))
        greedy = stack.enter_context(another_client(address))
        asked = [greedy.send(Read(layer=4, expert=3, offset=0, num_bytes=size)) for _ in range(400)]
        until(lambda: not server._known)
        with pytest.raises(HostLostError):
            for request_id in asked:
                greedy.receive(request_id)


def test_shards_in_memory_are_read_from_there_while_they_come_and_go(demo: Store, tmp_path: Path) -> None:
    """The disk's copy is cut off: what a reader gets is from memory, and right, or refused."""
    path = Path(shutil.copytree(demo.path, tmp_path / "store"))
    keys = [ExpertKey(4, e) for e in range(8)]
    with Store.open(path) as store, peers_of(store, timeout_s=5.0) as nobody:
        host = make_host(store, keys, 1, num_slots=8, peers=nobody)
        with (path / "experts-00004.bin").open("r+b") as file:
            file.truncate(0)
        address = new_address("rich")
        with serving(address, host), peers_of(demo, address) as peers:
            buffer = memoryview(bytearray(store.manifest.slot_bytes))
            for key in keys:
                peers.of(key)[0].read(key, 0, buffer)
                assert bytes(buffer) == demo.read_shard(key).tobytes()
            host.arena.begin_write(int(host.arena.directory[3]), 3)
            with pytest.raises(ProtocolError, match=r"experts-00004\.bin ends at"):
                peers.of(KEY)[0].read(KEY, 0, buffer)
        host.close()


# ----------------------------------------------------------------------------------------- replication


@given(
    share=st.floats(0.05, 1.0),
    most=st.none() | st.floats(1e5, 1e9),
    sizes=st.lists(st.integers(1, 1 << 24), min_size=1, max_size=50),
    bandwidth=st.floats(1e6, 1e10),
)
@settings(max_examples=60, deadline=None)
def test_replication_keeps_to_its_share(share: float, most: float | None, sizes: list[int], bandwidth: float) -> None:
    budget, now = ReplicationBudget(share, most), 5.0
    rate = min(share * bandwidth, most or np.inf)
    for index, size in enumerate(sizes):
        now += budget.wait_s(now)
        assert sum(sizes[:index]) <= rate * (now - 5.0) * (1 + 1e-6) + 1e-3
        budget.spend(now, size, bandwidth)
    assert budget.wait_s(now) == pytest.approx(sizes[-1] / rate)


def test_hot_experts_are_copied_in_the_background(demo: Store, lender: HostAddress, tmp_path: Path) -> None:
    keys = list(demo.manifest.shards)
    hot = [ExpertKey(layer, 7) for layer in range(6)]
    with Store.open(partial_copy(demo, tmp_path / "part", keys[:24])) as store, peers_of(store, lender) as peers:
        budget = ReplicationBudget(most_bytes_per_s=50e6)
        host = make_host(store, keys, 1, num_slots=12, peers=peers, replication=budget)
        assert not set(hot) & {key for key, slot in zip(keys, host.arena.directory, strict=True) if slot >= 0}
        host.replicate(hot)
        wait_for(host, lambda: host.stats().residency.replica_loads == 6 and host._loader.is_idle)
        host._manager.validate()
        assert_holds(host, demo, hot)
        stats = host.stats()
        assert stats.loader.replica_bytes == sum(demo.manifest.shards[key].num_bytes for key in hot)
        assert stats.num_resident == 12 and stats.residency.evictions == 6
        host.replicate(hot)  # they are there
        assert host.stats().residency.replica_loads == 6
        host.close()


def test_a_replica_that_is_needed_does_not_wait_for_the_budget(demo: Store) -> None:
    keys = list(demo.manifest.shards)
    budget = ReplicationBudget(most_bytes_per_s=1.0)  # a piece a day
    host = make_host(demo, keys, 1, num_slots=12, replication=budget)
    hot = ExpertKey(5, 7)
    host.replicate([hot])
    wait_for(host, lambda: host.stats().loader.replica_bytes > 0)
    assert host.stats().loader.replica_bytes < demo.manifest.shards[hot].num_bytes
    host.need("a", hot.layer, [hot.expert])
    wait_for(host, lambda: host.arena.directory[keys.index(hot)] >= 0)
    assert_holds(host, demo, [hot])
    host.close()
