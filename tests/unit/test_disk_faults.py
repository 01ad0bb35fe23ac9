"""A disk that fails, lies or stalls under a running host: no wrong token, no hang, a clear message, recovery."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.capped import capped, hosts_and_source
from helpers.data_plane import connected
from helpers.hosts import make_host, new_address, serving
from helpers.reference import greedy
from helpers.waiting import until

from moray.cluster.arena_source import ArenaSource
from moray.cluster.client import HostClient
from moray.cluster.messages import Ask, Coming, Need, Ping
from moray.runtime.errors import CorruptShardError, MorayError, StoreError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels.gates import SWIGLU
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.residency import loader
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(180)  # what hangs fails

PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
NUM_TOKENS = 12
SLOTS = 5

Read = Callable[[int, Sequence[memoryview], int], int]


@pytest.fixture(scope="module")
def expected(demo_runner: Runner) -> list[int]:
    return greedy(demo_runner, list(demo_runner.encode(PROMPT)), NUM_TOKENS)


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is three reads."""
    monkeypatch.setattr(loader, "PIECE_BYTES", 65536)


class Disk:
    """What hosts read from while it is plugged in. ``fault``: called in place of os.preadv; gets the real one first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real: Read = os.preadv
        self.fault: Callable[[Read, int, Sequence[memoryview], int], int] | None = None
        monkeypatch.setattr(os, "preadv", self._read)

    def _read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.fault is None:
            return self._real(descriptor, buffers, offset)
        return self.fault(self._real, descriptor, buffers, offset)

    def once(self, fault: Callable[[Read, int, Sequence[memoryview], int], int]) -> threading.Event:
        """The next read alone. Returns what is set when it has come."""
        lock, done = threading.Lock(), threading.Event()

        def first(real: Read, *arguments: Any) -> int:
            with lock:
                is_first = not done.is_set()
                done.set()
            return fault(real, *arguments) if is_first else real(*arguments)

        self.fault = first
        return done


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def copied(demo: Store, tmp_path: Path) -> Iterator[Store]:
    """A copy of the embedded store, to be damaged."""
    with Store.open(shutil.copytree(demo.path, tmp_path / "store")) as store:
        yield store


def refuse(real: Read, *arguments: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def mend(disk: Disk, host: ShardHost) -> None:
    """Lift the fault when no read that was refused is on its way to whoever asks next."""
    with host._loader.lock:
        assert host._loader.lock.wait_for(lambda: host._loader.is_idle, 60)
        disk.fault = None


def refused_at(store: Store, key: ExpertKey) -> tuple[Any, Callable[[], int]]:
    """A fault of one shard alone, and how often it was met."""
    entry, met = store.manifest.shards[key], []
    file = (store.path / entry.file).stat()

    def fault(real: Read, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if os.path.samestat(os.fstat(descriptor), file) and entry.offset <= offset < entry.offset + entry.num_bytes:
            met.append(offset)
            refuse(real)
        return real(descriptor, buffers, offset)

    return fault, lambda: len(met)


def generate(runner: Runner) -> list[int]:
    return greedy(runner, list(runner.encode(PROMPT)), NUM_TOKENS)


def read_all(source: ArenaSource, layer: int, experts: Sequence[int]) -> dict[int, bytes]:
    """Shards through the data plane, as far as they came before an error."""
    fetch, found = source.fetch(layer, np.array(experts, dtype=np.int64)), {}
    while not fetch.is_over:
        positions, lease = fetch.take()
        size = source._shard_bytes[layer]
        new = {
            experts[p]: ctypes.string_at(a, size)
            for p, a in zip(positions.tolist(), lease.addresses.tolist(), strict=True)
        }
        if lease.is_valid():
            found |= new
            fetch.finish(positions)
    return found


def shards(store: Store, layer: int, experts: Sequence[int]) -> dict[int, bytes]:
    return {e: store.read_shard(ExpertKey(layer, e)).tobytes() for e in experts}


def absent(host: ShardHost, layer: int) -> list[int]:
    """Experts of a layer that are not in a host's memory."""
    return [key.expert for key, slot in zip(host.keys, host.arena.directory, strict=True) if key.layer == layer > slot]


# -------------------------------------------------------------------------------------- read errors


def test_a_late_refusal_does_not_reach_the_next_request(demo: Store, disk: Disk) -> None:
    """What was asked for a layer call that was given up is answered while the next one waits."""
    with hosts_and_source(demo, SLOTS, prefetch="off") as ((host,), source):
        assert host.wait_filled(60)
        layer, link = 0, source._hosts[0].link
        experts = absent(host, layer)[:1]
        disk.fault = refuse
        source.fetch(layer, np.array(experts, dtype=np.int64))
        with host._loader.lock:
            assert host._loader.lock.wait_for(lambda: host._loader.errors, 60)
        link.ask(Ask(layer=layer, experts=experts))
        assert link.client.poll(60)  # the refusal is here, and nobody has read it
        mend(disk, host)

        def late(real: Read, *arguments: Any) -> int:
            time.sleep(0.2)
            return real(*arguments)

        disk.fault = late
        assert read_all(source, layer, experts) == shards(demo, layer, experts)


def test_a_read_error_ends_the_request_and_the_next_one_is_served(demo: Store, disk: Disk, expected: list[int]) -> None:
    with capped(demo, SLOTS) as made:
        disk.fault = refuse
        with pytest.raises(
            CorruptShardError, match=r"cannot read .*experts-\d+\.bin at offset \d+: Input/output error"
        ):
            generate(made.runner)
        mend(disk, *made.hosts)
        assert generate(made.runner) == expected


@pytest.mark.parametrize("num_slots", [1, SLOTS, 48])
def test_a_single_read_error_costs_no_more_than_its_request(
    demo: Store, disk: Disk, expected: list[int], num_slots: int
) -> None:
    with capped(demo, num_slots) as made:
        for _ in range(3):
            failed = disk.once(refuse)
            try:
                assert generate(made.runner) == expected
            except CorruptShardError as error:
                assert "Input/output error" in str(error) and failed.is_set()
        mend(disk, *made.hosts)
        assert generate(made.runner) == expected


def test_an_expert_that_cannot_be_read_is_not_read_over_and_over(demo: Store, disk: Disk) -> None:
    with hosts_and_source(demo, SLOTS) as ((host,), source):
        wanted = absent(host, 5)[:1]
        disk.fault, num_reads = refused_at(demo, ExpertKey(5, wanted[0]))
        for _ in range(3):
            with pytest.raises(CorruptShardError, match="Input/output error"):
                read_all(source, 5, wanted)
            host.hint(5, wanted)  # nobody waits
        assert 3 <= num_reads() <= 9  # three pieces each time at most
        disk.fault = None
        assert read_all(source, 5, wanted) == shards(demo, 5, wanted)


def test_other_experts_are_served_while_one_cannot_be_read(demo: Store, disk: Disk) -> None:
    entry = demo.manifest.shards[ExpertKey(4, 3)]
    with hosts_and_source(demo, SLOTS) as (_, source):
        disk.fault, _ = refused_at(demo, ExpertKey(4, 3))
        for _ in range(2):
            with pytest.raises(CorruptShardError, match=rf"{entry.file} at offset"):
                read_all(source, 4, [1, 3])
            for layer in range(6):
                others = [e for e in range(8) if (layer, e) != (4, 3)]
                assert read_all(source, layer, others) == shards(demo, layer, others)


# ------------------------------------------------------------------------------------- short reads


@pytest.mark.parametrize("most", [4096, 5000, 40_000])
def test_short_reads_are_continued(demo: Store, disk: Disk, expected: list[int], most: int) -> None:
    def fault(real: Read, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        scratch = memoryview(bytearray(len(buffers[0]) + 4096))  # aligned as O_DIRECT wants it
        start = -np.frombuffer(scratch, np.uint8).ctypes.data % 4096
        whole = scratch[start : start + len(buffers[0])]
        count = min(real(descriptor, [whole], offset), most)
        buffers[0][:count] = whole[:count]
        return count

    with capped(demo, SLOTS) as made:
        disk.fault = fault
        assert generate(made.runner) == expected


# -------------------------------------------------------------------------------------- corruption


def flip(real: Read, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    count = real(descriptor, buffers, offset)
    buffers[0][count // 2] ^= 16
    return count


def test_what_was_read_wrongly_once_is_read_again(demo: Store, disk: Disk, expected: list[int]) -> None:
    with capped(demo, SLOTS) as made:
        done = disk.once(flip)
        assert generate(made.runner) == expected
        assert done.is_set() and made.hosts[0].stats().loader.corrupt_reads == 1


def test_a_shard_that_is_corrupt_for_good_is_named_and_others_go_on(copied: Store) -> None:
    entry = copied.manifest.shards[ExpertKey(4, 3)]
    with hosts_and_source(copied, SLOTS) as ((host,), source):
        with (copied.path / entry.file).open("r+b") as file:
            file.seek(entry.offset + 100_000)
            byte = file.read(1)
            file.seek(entry.offset + 100_000)
            file.write(bytes([byte[0] ^ 1]))
        message = rf"{entry.file}: the shard of expert 3 of MoE layer 4 at offset {entry.offset} fails its checksum"
        for _ in range(2):
            with pytest.raises(CorruptShardError, match=message):
                read_all(source, 4, [3])
            assert read_all(source, 4, [2, 5]) == shards(copied, 4, [2, 5])
        assert host.stats().loader.corrupt_reads == 4
        with (copied.path / entry.file).open("r+b") as file:  # copied again
            file.seek(entry.offset + 100_000)
            file.write(byte)
        assert read_all(source, 4, [3]) == shards(copied, 4, [3])


@pytest.mark.parametrize("cut", [0, 4096, 100_000])
def test_a_file_cut_short_under_a_running_host_is_named(copied: Store, cut: int) -> None:
    """``cut``: bytes of the last shard that are left."""
    entry = copied.manifest.shards[ExpertKey(4, 7)]
    path = copied.path / entry.file
    with hosts_and_source(copied, SLOTS) as (_, source):
        kept = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(entry.offset + cut)
        with pytest.raises(CorruptShardError, match=rf"{entry.file} ends at \d+.*copy it again"):
            read_all(source, 4, [6, 7])
        assert read_all(source, 4, [6, 0]) == shards(copied, 4, [6, 0])
        path.write_bytes(kept)
        assert read_all(source, 4, [7]) == shards(copied, 4, [7])


# ------------------------------------------------------------------------------------------ stalls


def test_a_disk_that_stalls_for_seconds_costs_only_time(demo: Store, disk: Disk, expected: list[int]) -> None:
    def stall(real: Read, *arguments: Any) -> int:
        time.sleep(3)
        return real(*arguments)

    with capped(demo, SLOTS, num_hosts=2) as made:
        done = disk.once(stall)
        assert generate(made.runner) == expected
        assert done.is_set()


@contextmanager
def stalled_for(disk: Disk, host: ShardHost) -> Iterator[tuple[HostClient, list[str]]]:
    """A client whose disk stands still, and the names of the threads that read from it meanwhile; then it goes on."""
    go_on, readers = threading.Event(), list[str]()
    address = new_address("stalled")

    def stall(real: Read, *arguments: Any) -> int:
        readers.append(threading.current_thread().name)
        assert go_on.wait(60)
        return real(*arguments)

    with serving(address, host), connected(address) as client:
        client.greet()
        disk.fault = stall
        try:
            yield client, readers
        finally:
            go_on.set()


def test_what_is_needed_is_read_by_the_thread_that_has_heard_of_it(demo: Store, disk: Disk) -> None:
    """And the client is heard meanwhile: else a host whose disk stands still would be taken for lost."""
    host = make_host(demo, list(demo.manifest.shards), num_slots=SLOTS, prefetch="off")
    host._loader._depth.depth = 4
    first, second, third = absent(host, 0)[:3]
    with stalled_for(disk, host) as (client, readers):
        client.send(Need(layer=0, experts=[first]))
        until(lambda: "moray-data-plane" in readers)
        client.request(Ping())
        client.send(Need(layer=0, experts=[first, second]))  # nobody is left to read and to receive
        client.send(Need(layer=0, experts=[first, second, third]))
        assert isinstance(client.request(Ask(layer=0, experts=[first, second, third]))[0], Coming)
        until(lambda: len(readers) == 4)
        assert readers.count("moray-data-plane") == 1
        client.request(Ping())
        assert set(absent(host, 0)) >= {first, second, third}
    until(lambda: not {first, second, third} & set(absent(host, 0)))
    host.close()


def test_a_client_that_goes_while_its_shard_is_read_leaves_no_claim(demo: Store, disk: Disk) -> None:
    host = make_host(demo, list(demo.manifest.shards), num_slots=SLOTS, prefetch="off")
    threads = threading.active_count()
    with stalled_for(disk, host) as (client, readers):
        client.send(Need(layer=0, experts=absent(host, 0)[:1]))
        until(lambda: bool(readers))
        client._connection.wire.shut()
    until(lambda: threading.active_count() == threads)  # serving has ended
    assert not host._manager._claims
    host.close()


# ------------------------------------------------------------------------------------------- ends


def open_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue  # the listing's own
    return sorted(found)


def test_hosts_come_and_go_without_a_trace(demo: Store) -> None:
    keys = list(demo.manifest.shards)
    make_host(demo, keys, 1, num_slots=3).close()
    files, threads = open_files(), threading.active_count()
    for index in range(50):
        host = ShardHost(demo, keys, 1, num_slots=3 + index % 4)
        if index % 2:
            host.need("a", index % 6, [index % 8])
        if index % 3:
            assert host.wait_filled(60)
        host.close()
    assert open_files() == files and threading.active_count() == threads
    assert "moray-arena" not in Path("/proc/self/maps").read_text()


def test_a_host_can_be_closed_while_it_reads(demo: Store, disk: Disk) -> None:
    files, threads = open_files(), threading.active_count()
    reading, go_on = threading.Event(), threading.Event()

    def stall(real: Read, *arguments: Any) -> int:
        reading.set()
        go_on.wait(60)
        return real(*arguments)

    disk.fault = stall
    host = ShardHost(demo, list(demo.manifest.shards), 1, num_slots=3)
    assert reading.wait(60)
    closing = threading.Thread(target=host.close)
    closing.start()
    go_on.set()
    closing.join(60)
    assert not closing.is_alive() and threading.active_count() == threads and open_files() == files


def test_an_arena_that_cannot_be_made_leaves_nothing_open(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = open_files()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MorayError, match="do not fit this machine's memory"):
        ShardHost(demo, list(demo.manifest.shards), 1)
    assert open_files() == files


def test_memory_that_runs_out_while_shards_come_is_told(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.posix_fallocate
    with hosts_and_source(demo, SLOTS) as (_, source):
        assert read_all(source, 0, [0]) == shards(demo, 0, [0])

    def full(descriptor: int, offset: int, count: int) -> None:
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, count)

    monkeypatch.setattr(os, "posix_fallocate", full)
    host = ShardHost(demo, list(demo.manifest.shards), 1, num_slots=2)
    with pytest.raises(MorayError, match="do not fit this machine's memory"):
        host.wait_filled(60)
    monkeypatch.setattr(os, "posix_fallocate", real)
    y = host.compute(0, [0], [1], np.ones((1, 256), np.float32), np.arange(1), "int8", SWIGLU)
    assert np.isfinite(y).all()
    host.close()


def test_a_failed_computation_claims_nothing(demo: Store, disk: Disk) -> None:
    host = make_host(demo, list(demo.manifest.shards), 1, num_slots=2)
    disk.fault = refuse
    with pytest.raises(StoreError, match="Input/output error"):
        host.compute(5, [0, 1], [1, 1], np.ones((2, 256), np.float32), np.arange(2), "int8", SWIGLU)
    assert not host._manager._claims
    mend(disk, host)
    host.need("a", 4, [0, 1])  # both slots
    wanted = [host.keys.index(ExpertKey(4, e)) for e in (0, 1)]
    with host._loader.lock:
        assert host._loader.lock.wait_for(lambda: (host.arena.directory[wanted] >= 0).all(), 60)
    host.close()
