"""A host under random events, watched from another process: its memory, and every shard that its directory names."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import child, read_line

from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.kernels import memory
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(280)

# Two clients that need, hint, release and sometimes wait, as a compute process does: with what is there, which they
# then release. Arguments: store, slots, events, seed.
HOST = """
import sys, threading
import numpy as np
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.residency import loader
from moray.runtime.residency.manager import State
from moray.runtime.store.store import Store

loader.PIECE_BYTES, loader._HINT_PIECE_BYTES = 8192, 4096
path, num_slots, num_events, seed = sys.argv[1], *(int(word) for word in sys.argv[2:])
store = Store.open(path)
keys = list(store.manifest.shards)
num_layers, num_experts = len(store.manifest.layers), store.manifest.layers[0].num_experts
host = ShardHost(store, keys, 1, num_slots=num_slots)
ref = host.arena.ref
print(ref.pid, ref.fd, ref.num_bytes, flush=True)
sys.stdin.readline()


def serve(client, layer, experts):
    lock, left = host._loader.lock, set(experts)
    host.need(client, layer, experts)
    while left:
        with lock:
            here = lambda: [e for e in left if host._manager.state(keys.index(ExpertKey(layer, e))) is State.RESIDENT]
            assert lock.wait_for(here, 60), f"{left} of layer {layer} never came"
            found = here()
        host.release(client, layer, found)
        left -= set(found)


def run(client, random):
    for _ in range(num_events // 2):
        layer, kind = int(random.integers(num_layers)), random.random()
        experts = random.permutation(num_experts)[: random.integers(1, num_experts + 1)].tolist()
        if kind < 0.2:
            serve(client, layer, experts)
        elif kind < 0.5:
            host.need(client, layer, experts)
        elif kind < 0.75:
            host.hint(layer, experts)
        elif kind < 0.9:
            host.release(client, layer, experts)
        elif kind < 0.97:
            host.used(layer, experts)
        else:
            host.drop_client(client)
        with host._loader.lock:
            host._manager.validate()
    host.drop_client(client)  # what it claims to its end nobody else can have


outcomes = []
def guarded(*arguments):
    try:
        run(*arguments)
        outcomes.append("served")
    except BaseException as error:
        outcomes.append(repr(error))

randoms = [np.random.default_rng([seed, index]) for index in range(2)]
clients = [threading.Thread(target=guarded, args=pair) for pair in zip("ab", randoms)]
for client in clients:
    client.start()
for client in clients:
    client.join()
stats = host.stats()
print(*outcomes, stats.residency.evictions, stats.loader.bytes_read, flush=True)
sys.stdin.readline()
host.close()
print("closed", flush=True)
"""


class Watcher:
    """Another process's arena, looked at from outside."""

    def __init__(self, ref: ArenaRef, store: Store) -> None:
        self.arena, self._ref = Arena.attach(ref), ref
        keys = list(store.manifest.shards)
        self._shards = [store.read_shard(key).tobytes() for key in keys]
        self.num_good, self.num_torn, self.most_bytes = 0, 0, 0
        count = len(keys)
        arena = self.arena
        self._leases = np.zeros((memory.NUM_COLUMNS, count), dtype=np.int64)
        self._leases[memory.ENTRY] = arena.entry_addresses(np.arange(count))
        self._leases[memory.FIRST_SLOT] = arena.addresses(np.zeros(1, np.int64))[0]
        self._leases[memory.SLOT_BYTES] = arena.slot_bytes
        self._leases[memory.FIRST_COUNTER] = arena.counter_address(0)

    def check_memory(self) -> None:
        """The file has its size and no more pages; nobody has mapped more of it."""
        status = os.stat(f"/proc/{self._ref.pid}/fd/{self._ref.fd}")
        self.most_bytes = max(self.most_bytes, 512 * status.st_blocks)
        assert status.st_size == self._ref.num_bytes and self.most_bytes <= self._ref.num_bytes
        mapped = []
        for line in Path(f"/proc/{self._ref.pid}/maps").read_text().splitlines():
            if "moray-arena" in line:
                first, last = (int(word, 16) for word in line.split()[0].split("-"))
                mapped.append(last - first)
        assert mapped == [self._ref.num_bytes]

    def check_shards(self) -> None:
        """What a reader's two looks let pass is the store's."""
        memory.look_up_each(self._leases, np.arange(len(self._shards)))
        addresses, counters, generations = self._leases[:3]
        for expert in np.flatnonzero(generations >= 0).tolist():
            shard = self._shards[expert]
            start = int(addresses[expert] - self.arena.base_address)
            found = self.arena._bytes[start : start + len(shard)].tobytes()
            if memory.all_equal(counters[expert : expert + 1], generations[expert : expert + 1]):
                assert found == shard, f"expert {expert} is not what its directory says"
                self.num_good += 1
            else:
                self.num_torn += 1


def watch(store: Store, num_slots: int, num_events: int, seed: int) -> Watcher:
    with child(HOST, str(store.path), str(num_slots), str(num_events), str(seed)) as process:
        assert process.stdin is not None and process.stdout is not None
        watcher = Watcher(ArenaRef(*(int(word) for word in read_line(process).split())), store)
        process.stdin.write("go\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0)[0]:
            watcher.check_memory()
            for _ in range(20):
                watcher.check_shards()
        line = read_line(process)
        *outcomes, evictions, bytes_read = line.split()
        assert outcomes == ["served", "served"], line
        size = store.manifest.layers[0].layout.num_bytes
        assert (int(evictions) > 0 and int(bytes_read) > 0) or num_slots * size >= store.manifest.expert_bytes
        watcher.check_memory()
        process.stdin.write("close\n")
        process.stdin.flush()
        assert read_line(process) == "closed"
    watcher.arena.close()
    return watcher


@pytest.fixture(scope="module")
def small(store: Callable[..., Path]) -> Store:
    """24 shards of 4 pages."""
    with Store.open(store("mixtral")) as opened:
        return opened


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_memory_and_shards_of_a_host_under_random_events(small: Store, num_slots: int) -> None:
    """10,000 events in all."""
    watcher = watch(small, num_slots, 3400, num_slots)
    assert watcher.num_good > 0


def test_torn_reads_are_seen(demo: Store) -> None:
    """Shards of 192 KiB, copied while their slots are given to others: copies that are not whole are known as such."""
    good = torn = 0
    for seed in range(20):
        watcher = watch(demo, 3, 600, seed)
        good, torn = good + watcher.num_good, torn + watcher.num_torn
        if good >= 100 and torn >= 20:
            return
    raise AssertionError(f"{good} whole and {torn} torn reads: too few to tell")


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_slots", [1, 2, 3, 12, 23, 24])
def test_memory_and_shards_over_many_events(small: Store, num_slots: int, seed: int) -> None:
    assert watch(small, num_slots, 20_000, seed).num_good > 0
