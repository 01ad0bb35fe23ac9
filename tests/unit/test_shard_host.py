from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any

import numpy as np
import pytest
from helpers.hosts import make_host
from helpers.matrices import assert_same_bits
from helpers.processes import child, read_line

from moray.runtime.arena import FAILED, NOWHERE, Arena, ArenaRef
from moray.runtime.errors import CorruptShardError, HostLostError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.kernels import ops
from moray.runtime.kernels.gates import SWIGLU
from moray.runtime.kernels.ops import Grouping, LayerKernel, MatrixKernel
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.residency import depth, loader
from moray.runtime.store.store import Store

KEYS = [ExpertKey(0, 0), ExpertKey(0, 3), ExpertKey(1, 7), ExpertKey(2, 1)]

# A host that announces its arena when it is filled, and can be told to begin writing a slot and never end.
HOST = """
import sys
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store
keys = [ExpertKey(*(int(x) for x in word.split(","))) for word in sys.argv[2:]]
host = ShardHost(Store.open(sys.argv[1]), keys, 1)
assert host.wait_filled(60)
print(host.arena.ref.pid, host.arena.ref.fd, host.arena.ref.num_bytes, flush=True)
for line in sys.stdin:
    host.arena.begin_write(int(line), int(line))[:100] = bytes(100)
    print("writing", flush=True)
"""


@pytest.fixture(scope="module")
def host(demo: Store) -> Iterator[ShardHost]:
    made = make_host(demo, KEYS)
    yield made
    made.close()


@pytest.fixture
def survivor(demo: Store) -> Iterator[Arena]:
    """The arena of a host that was killed, held by this process alone."""
    with child(HOST, str(demo.path), *(f"{key.layer},{key.expert}" for key in KEYS)) as process:
        arena = Arena.attach(ArenaRef(*(int(word) for word in read_line(process).split())))
        process.kill()
        process.wait()
    yield arena
    arena.close()


def holds(host: ShardHost, slot: int, key: ExpertKey) -> bool:
    shard = host.store.read_shard(key)
    return (
        host.arena.directory[host.keys.index(key)] == slot
        and bytes(host.arena.slot(slot)[: len(shard)]) == shard.tobytes()
    )


def bytes_read(host: ShardHost) -> int:
    """From disk, since the host was made."""
    return host.stats().loader.bytes_read


def size_of(host: ShardHost, keys: Sequence[ExpertKey]) -> int:
    return sum(host.store.manifest.shards[key].num_bytes for key in keys)


# ------------------------------------------------------------------------------------------- load


def test_loading_fills_every_slot_from_the_store(demo: Store) -> None:
    made = make_host(demo, KEYS, 1)
    try:
        assert made.keys == KEYS and made.holds_all
        assert bytes_read(made) == size_of(made, KEYS)
        assert made.arena.generations.tolist() == [2] * len(KEYS)
        assert all(holds(made, slot, key) for slot, key in enumerate(KEYS))
        stats = made.stats()
        assert (stats.num_experts, stats.num_resident, stats.num_slots) == (4, 4, 4)
        assert (stats.residency.fill_loads, stats.residency.evictions) == (4, 0)
    finally:
        made.close()


def test_fewer_slots_than_experts_hold_one_of_each_layer_in_turn_and_no_more(demo: Store) -> None:
    made = make_host(demo, KEYS, 1, num_slots=2)
    try:
        assert not made.holds_all and made.arena.num_slots == 2
        assert made.arena.directory.tolist() == [0, NOWHERE, 1, NOWHERE]
        kept = [KEYS[0], KEYS[2]]
        assert bytes_read(made) == size_of(made, kept)
        assert all(holds(made, slot, key) for slot, key in enumerate(kept))
    finally:
        made.close()


@pytest.mark.parametrize("piece_bytes", [16384, 65536, 1 << 20])
def test_shards_are_whole_however_they_are_cut(demo: Store, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", piece_bytes)
    made = make_host(demo, KEYS, 1)
    try:
        assert all(holds(made, slot, key) for slot, key in enumerate(KEYS))
        assert bytes_read(made) == size_of(made, KEYS)
    finally:
        made.close()


def test_a_corrupt_shard_is_read_again_and_told(demo: Store, tmp_path: Path) -> None:
    path = Path(shutil.copytree(demo.path, tmp_path / "store"))
    entry = demo.manifest.shards[KEYS[3]]
    with (path / entry.file).open("r+b") as file:
        file.seek(entry.offset + 5000)
        file.write(b"\xff\x00\xff")
    with Store.open(path) as store:
        made = ShardHost(store, KEYS, 1)
        try:
            message = rf"{entry.file}.*expert 1 of MoE layer 2 at offset {entry.offset}"
            with pytest.raises(CorruptShardError, match=message):
                made.wait_filled(60)
            assert made.stats().loader.corrupt_reads == 2
            assert made.arena.directory.tolist() == [0, 1, 2, FAILED]
            assert all(holds(made, slot, key) for slot, key in enumerate(KEYS[:3]))
            assert str(made.failure(2, [1])).startswith(str(path)) and made.failure(0, [0, 3]) is None
            with pytest.raises(CorruptShardError, match=message):
                made.compute(2, [1], [1], np.zeros((1, 256), np.float32), np.arange(1), "int8", SWIGLU)
        finally:
            made.close()


def test_while_an_engine_starts_only_what_is_needed_is_loaded(demo: Store) -> None:
    made = ShardHost(demo, KEYS, 1, start_reads=0)
    try:
        made.need("a", 2, [1])
        with made._loader.lock:
            assert made._loader.lock.wait_for(lambda: made.arena.directory[3] >= 0, 60)
            assert made._loader.is_idle and made._loader._find() is None
        assert made.arena.directory.tolist() == [NOWHERE, NOWHERE, NOWHERE, 0]
        made.fill()
        assert made.wait_filled(60)
        assert all(made.arena.directory >= 0)
    finally:
        made.close()


def test_spare_cores_fill_while_an_engine_starts(demo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "DEPTHS", (4,))
    monkeypatch.setattr(loader, "PIECE_BYTES", 65536)
    reading, peak, is_met = Condition(), [0, 0], False
    real = os.preadv

    def read(*arguments: Any) -> int:
        nonlocal is_met
        with reading:
            peak[0] += 1
            peak[1] = max(peak)
            is_met = is_met or peak[0] > 1
            reading.notify_all()
            assert not filling.is_set() or reading.wait_for(lambda: is_met, 30)
        try:
            return real(*arguments)
        finally:
            with reading:
                peak[0] -= 1

    filling = Event()
    monkeypatch.setattr(os, "preadv", read)
    made = ShardHost(demo, list(demo.manifest.shards), 1, start_reads=1)
    try:
        with made._loader.lock:
            assert made._loader.lock.wait_for(lambda: (made.arena.directory >= 0).sum() > 8, 60)
        assert peak[1] == 1
        filling.set()
        made.fill()
        assert made.wait_filled(60) and is_met
    finally:
        made.close()


# ----------------------------------------------------------------------------- restart and take back


def test_a_restarted_host_takes_its_arena_back_without_reading_the_disk(survivor: Arena, demo: Store) -> None:
    made = make_host(demo, KEYS, 1, arena=Arena.attach(survivor.ref, writable=True))
    assert bytes_read(made) == 0
    assert survivor.generations.tolist() == [2] * len(KEYS)  # leases given before the restart stay good
    assert all(holds(made, slot, key) for slot, key in enumerate(KEYS))
    made.close()


def test_a_half_written_slot_is_loaded_again_and_no_other(demo: Store) -> None:
    with child(HOST, str(demo.path), *(f"{key.layer},{key.expert}" for key in KEYS)) as process:
        survivor = Arena.attach(ArenaRef(*(int(word) for word in read_line(process).split())))
        assert process.stdin is not None
        process.stdin.write("2\n")
        process.stdin.flush()
        assert read_line(process) == "writing"
        process.kill()
        process.wait()
    assert survivor.generations.tolist() == [2, 2, 3, 2] and survivor.directory.tolist() == [0, 1, NOWHERE, 3]
    made = make_host(demo, KEYS, 1, arena=Arena.attach(survivor.ref, writable=True))
    assert bytes_read(made) == size_of(made, KEYS[2:3])
    generations = survivor.generations.tolist()
    assert generations[:2] + generations[3:] == [2, 2, 2] and generations[2] > 3 and generations[2] % 2 == 0
    assert holds(made, 2, KEYS[2])
    made.close()
    survivor.close()


@pytest.mark.parametrize("offset", [0, 20, 100_000, -1])
def test_a_slot_that_was_damaged_meanwhile_is_loaded_again(survivor: Arena, demo: Store, offset: int) -> None:
    damaged = Arena.attach(survivor.ref, writable=True)
    num_bytes = demo.manifest.shards[KEYS[3]].num_bytes
    damaged.slot(3)[offset % num_bytes] ^= 1
    made = make_host(demo, KEYS, 1, arena=damaged)
    assert bytes_read(made) == num_bytes and made.arena.generations.tolist() == [2, 2, 2, 4]
    assert holds(made, 3, KEYS[3])
    made.close()


def test_shards_of_another_store_are_not_taken_for_this_ones(
    demo: Store, checkpoint: Callable[[str], Path], store: Callable[..., Path], tmp_path: Path
) -> None:
    from helpers.checkpoints import tiny_checkpoint

    from moray.runtime.convert.converter import convert

    convert(tiny_checkpoint("mixtral", tmp_path / "checkpoint", seed=1), tmp_path / "store")
    with Store.open(store("mixtral")) as before, Store.open(tmp_path / "store") as after:
        assert before.manifest.layers == after.manifest.layers
        first = make_host(before, KEYS, 1)
        second = make_host(after, KEYS, 1, arena=Arena.attach(first.arena.ref, writable=True))
        assert bytes_read(second) == bytes_read(first)
        assert all(holds(second, slot, key) for slot, key in enumerate(KEYS))
        first.close()
        second.close()


def test_an_arena_of_another_shape_is_refused(host: ShardHost, demo: Store) -> None:
    with pytest.raises(HostLostError, match="the arena has 4 slots for 4 experts, this host has 3 for 3"):
        ShardHost(demo, KEYS[:3], 1, host.arena)
    with pytest.raises(HostLostError, match="the arena has 4 slots for 4 experts, this host has 2 for 4"):
        ShardHost(demo, KEYS, 1, host.arena, num_slots=2)


# ------------------------------------------------------------------------------------------ claims


def wait_for(host: ShardHost, *keys: ExpertKey) -> None:
    """Until these are in memory."""
    indices = [host.keys.index(key) for key in keys]
    with host._loader.lock:
        assert host._loader.lock.wait_for(lambda: (host.arena.directory[indices] >= 0).all(), 60)


def test_what_is_needed_comes_and_what_is_claimed_stays(demo: Store) -> None:
    made = make_host(demo, KEYS, 1, num_slots=2)
    try:
        made.need("me", 2, [1])
        wait_for(made, KEYS[3])
        for layer, expert in [(0, 0), (0, 3), (1, 7), (0, 0), (1, 7)] * 3:
            made.need("other", layer, [expert])
            wait_for(made, ExpertKey(layer, expert), KEYS[3])
        made.release("me", 2, [1])
        made.need("other", 0, [0, 3])
        wait_for(made, *KEYS[:2])
        assert all(holds(made, int(made.arena.directory[index]), KEYS[index]) for index in (0, 1))
        made._manager.validate()
    finally:
        made.close()


def test_claims_are_each_clients_own(demo: Store) -> None:
    made = make_host(demo, KEYS, 1)
    try:
        for client in ("a", "a", "b"):
            made.need(client, 0, [0])
        assert made._manager._claims == {"a": {0}, "b": {0}}
        made.release("a", 0, [0])
        made.release("a", 0, [0, 3])  # more than it has
        assert made._manager._claims == {"b": {0}}
        made.need("b", 2, [1])  # and no longer what it needed before
        assert made._manager._claims == {"b": {3}}
        made.drop_client("b")
        made.drop_client("nobody")
        made.release("nobody", 0, [0])
        assert not made._manager._claims
        made._manager.validate()
    finally:
        made.close()


def test_an_expert_that_lives_elsewhere_is_refused_and_claims_nothing(host: ShardHost) -> None:
    for layer, expert in [(0, 1), (1, 0), (5, 0), (-1, 3), (2**70, 0)]:
        for ask in (
            lambda of, e: host.need("me", of, [e]),
            lambda of, e: host.need("me", of, [0, e]),
            lambda of, e: host.hint(of, [e]),
            lambda of, e: host.used(of, [e]),
            lambda of, e: host.failure(of, [e]),
            lambda of, e: host.release("me", of, [e]),
        ):
            with pytest.raises(KeyError):
                ask(layer, expert)
    host.need("me", 1, [])
    assert not host._manager._claims


# ---------------------------------------------------------------------------------------- compute


@pytest.mark.parametrize("numerics", ["int8", "float"])
def test_a_host_computes_what_the_kernels_compute_here(host: ShardHost, demo: Store, numerics: str) -> None:
    layout = demo.manifest.layers[0].layout
    up, down = layout["gate_up_proj"], layout["down_proj"]
    x = np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32)
    y = host.compute(0, [3, 0], [2, 5], x, np.arange(7), numerics, SWIGLU)
    shards = [demo.read_shard(ExpertKey(0, expert)) for expert in (3, 0)]
    at = np.array([shard.ctypes.data for shard in shards], dtype=np.int64)
    rows = np.arange(7)
    grouping = Grouping(np.array([3, 0]), np.array([0, 2, 7]), rows, rows[:, None])
    kernels = [MatrixKernel.of(tensor.spec, numerics) for tensor in (up, down)]
    ones = np.ones((7, 1), dtype=np.float32)
    assert_same_bits(y, ops.moe_layer(x, ones, grouping, LayerKernel(*kernels), at + up.offset, at + down.offset))


def test_what_a_host_computes_counts_as_used_whether_it_was_there_or_not(demo: Store) -> None:
    made, used = make_host(demo, [ExpertKey(0, expert) for expert in range(4)], num_slots=2, policy="lfu"), []
    note = made._manager._policy.used
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made._manager._policy, "used", lambda experts: (used.extend(experts), note(experts)))
            for expert in (3, 3, 2, 0):
                made.compute(0, [expert], [1], np.zeros((1, 256), np.float32), np.arange(1), "int8", SWIGLU)
        assert made.stats().residency.demand_loads >= 2
        assert used == [3, 3, 2, 0]
    finally:
        made.close()


def test_calls_at_the_same_time_do_not_take_each_other_s_experts(demo: Store) -> None:
    """Memory for one expert, so that each call needs the place of the other's."""
    x = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)

    def compute(host: ShardHost, expert: int) -> bytes:
        y = host.compute(0, [expert], [1], x, np.zeros(1, dtype=np.int64), "int8", SWIGLU)
        assert y is not None
        return y.tobytes()

    with ExitStack() as stack:
        rich, poor = (make_host(demo, [ExpertKey(0, e) for e in range(2)], num_slots=n) for n in (2, 1))
        stack.callback(rich.close)
        stack.callback(poor.close)
        expected, found = [compute(rich, e) for e in range(2)], [set[bytes](), set[bytes]()]

        def work(expert: int) -> None:
            for _ in range(200):
                found[expert].add(compute(poor, expert))

        threads = [Thread(target=work, args=(e,)) for e in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [{expected[0]}, {expected[1]}]
        assert poor.compute(0, [0, 1], [1, 1], x, np.zeros(2, np.int64), "int8", SWIGLU, waits=False) is None


def test_a_host_computes_nothing_for_others(host: ShardHost) -> None:
    with pytest.raises(KeyError):
        host.compute(0, [1], [1], np.zeros((1, 256), np.float32), np.arange(1), "int8", SWIGLU)


@pytest.mark.parametrize(("computes", "loaded"), [(False, "[]"), (True, "['numba']")])
def test_a_host_loads_numba_only_to_compute_and_torch_never(demo: Store, computes: bool, loaded: str) -> None:
    prepare = "host.prepare('int8')\n" if computes else ""
    script = HOST.replace(
        "for line in sys.stdin", f"{prepare}print(sorted({{'torch', 'numba'}} & set(sys.modules)))\nfor line in ''"
    )
    with child(script, str(demo.path), "0,0") as process:
        assert read_line(process).startswith(str(process.pid)) and os.getpid() != process.pid
        assert read_line(process) == loaded
