from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.matrices import assert_same_bits
from helpers.processes import child, read_line

from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.errors import CorruptShardError, HostLostError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.kernels import ops
from moray.runtime.kernels.ops import Grouping, LayerKernel, MatrixKernel
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

KEYS = [ExpertKey(0, 3), ExpertKey(2, 1), ExpertKey(0, 0), ExpertKey(1, 7)]

# A host that announces its arena when it is loaded, and can be told to begin writing a slot and never end.
HOST = """
import sys
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store
keys = [ExpertKey(*(int(x) for x in word.split(","))) for word in sys.argv[2:]]
host = ShardHost(Store.open(sys.argv[1]), keys, 1)
host.load()
print(host.arena.ref.pid, host.arena.ref.fd, host.arena.ref.num_bytes, flush=True)
for line in sys.stdin:
    writing = host.arena.writing(int(line))  # kept, or it would end at once
    buffer = writing.__enter__()
    buffer[:100] = bytes(100)
    print("writing", flush=True)
"""


@pytest.fixture(scope="module")
def host(demo: Store) -> Iterator[ShardHost]:
    made = ShardHost(demo, KEYS, 2)
    made.load()
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
    return bytes(host.arena.slot(slot)[: len(shard)]) == shard.tobytes()


# ------------------------------------------------------------------------------------------- load


def test_loading_fills_every_slot_from_the_store(demo: Store) -> None:
    made = ShardHost(demo, KEYS, 1)
    seen: list[int] = []
    made.load(seen.append)
    try:
        assert made.keys == KEYS
        sizes = [demo.manifest.shards[key].num_bytes for key in KEYS]
        assert seen == sizes and made.loaded_bytes == sum(sizes)
        assert made.arena.generations.tolist() == [2] * len(KEYS)
        assert all(holds(made, slot, key) for slot, key in enumerate(KEYS))
    finally:
        made.close()


def test_a_corrupt_shard_stops_loading(demo: Store, tmp_path: Path) -> None:
    path = Path(shutil.copytree(demo.path, tmp_path / "store"))
    entry = demo.manifest.shards[KEYS[1]]
    with (path / entry.file).open("r+b") as file:
        file.seek(entry.offset + 5000)
        file.write(b"\xff\x00\xff")
    with Store.open(path) as store:
        made = ShardHost(store, KEYS, 1)
        with pytest.raises(CorruptShardError, match=rf"{entry.file}.*expert 1 of MoE layer 2 at offset {entry.offset}"):
            made.load()


# ----------------------------------------------------------------------------- restart and take back


def test_a_restarted_host_takes_its_arena_back_without_reading_the_disk(survivor: Arena, demo: Store) -> None:
    made = ShardHost(demo, KEYS, 1, Arena.attach(survivor.ref, writable=True))
    made.load()
    assert made.loaded_bytes == 0
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
    assert survivor.generations.tolist() == [2, 2, 3, 2]
    made = ShardHost(demo, KEYS, 1, Arena.attach(survivor.ref, writable=True))
    made.load()
    assert made.loaded_bytes == demo.manifest.shards[KEYS[2]].num_bytes
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
    made = ShardHost(demo, KEYS, 1, damaged)
    made.load()
    assert made.loaded_bytes == num_bytes and made.arena.generations.tolist() == [2, 2, 2, 4]
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
        first = ShardHost(before, KEYS, 1)
        first.load()
        second = ShardHost(after, KEYS, 1, Arena.attach(first.arena.ref, writable=True))
        second.load()
        assert second.loaded_bytes == first.loaded_bytes
        assert all(holds(second, slot, key) for slot, key in enumerate(KEYS))
        first.close()
        second.close()


def test_an_arena_of_another_shape_is_refused(host: ShardHost, demo: Store) -> None:
    with pytest.raises(HostLostError, match="the arena has 4 slots, this host has 3 experts"):
        ShardHost(demo, KEYS[:3], 1, host.arena)


# ----------------------------------------------------------------------------------------- leases


def test_a_need_is_answered_with_slots_and_generations(host: ShardHost) -> None:
    assert host.need("me", 0, [0, 3]) == ([2, 0], [2, 2])
    assert host.need("me", 1, []) == ([], [])
    for layer, expert in [(0, 1), (1, 0), (5, 0), (-1, 3), (2**70, 0)]:
        with pytest.raises(KeyError):
            host.need("me", layer, [expert])


def test_leases_are_counted_for_each_client(demo: Store) -> None:
    made = ShardHost(demo, KEYS, 1)
    try:
        for client in ("a", "a", "b"):
            made.need(client, 0, [0])
        made.release("a", [2])
        assert made._leases == {"a": {2: 1}, "b": {2: 1}}
        made.release("a", [2, 2, 0])  # more than it has
        assert made._leases == {"a": {}, "b": {2: 1}}
        made.drop_client("b")
        made.drop_client("nobody")
        made.release("nobody", [1])
        assert not any(made._leases.values())
    finally:
        made.close()


def test_an_unknown_expert_leases_nothing(demo: Store) -> None:
    made = ShardHost(demo, KEYS, 1)
    try:
        with pytest.raises(KeyError):
            made.need("a", 0, [0, 5])
        assert not any(made._leases.values())
    finally:
        made.close()


# ---------------------------------------------------------------------------------------- compute


@pytest.mark.parametrize("numerics", ["int8", "float"])
def test_a_host_computes_what_the_kernels_compute_here(host: ShardHost, demo: Store, numerics: str) -> None:
    layout = demo.manifest.layers[0].layout
    up, down = layout["gate_up_proj"], layout["down_proj"]
    x = np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32)
    y = host.compute(0, [3, 0], [2, 5], x, numerics)
    shards = [demo.read_shard(ExpertKey(0, expert)) for expert in (3, 0)]
    at = np.array([shard.ctypes.data for shard in shards], dtype=np.int64)
    rows = np.arange(7)
    grouping = Grouping(np.array([3, 0]), np.array([0, 2, 7]), rows, rows[:, None])
    kernels = [MatrixKernel.of(tensor.spec, numerics) for tensor in (up, down)]
    ones = np.ones((7, 1), dtype=np.float32)
    assert_same_bits(y, ops.moe_layer(x, ones, grouping, LayerKernel(*kernels), at + up.offset, at + down.offset))


def test_a_host_computes_nothing_for_others(host: ShardHost) -> None:
    with pytest.raises(KeyError):
        host.compute(0, [1], [1], np.zeros((1, 256), np.float32), "int8")


def test_a_host_that_only_lends_shards_loads_neither_torch_nor_numba(demo: Store) -> None:
    script = HOST.replace("for line in sys.stdin", "print({'torch', 'numba'} & set(sys.modules))\nfor line in ''")
    with child(script, str(demo.path), "0,0") as process:
        assert read_line(process).startswith(str(process.pid)) and os.getpid() != process.pid
        assert read_line(process) == "set()"
