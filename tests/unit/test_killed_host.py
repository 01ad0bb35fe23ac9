"""A host that is killed while it loads what a layer needs: no wrong token, no hang, the arena taken back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from subprocess import Popen

import pytest
import torch
from helpers.hosts import TOKEN, new_address
from helpers.processes import child, read_line
from helpers.reference import greedy

from moray.cluster.arena_source import ArenaSource
from moray.cluster.client import HostAddress
from moray.runtime.arena import ArenaRef
from moray.runtime.events import Event, HostBack, HostLost
from moray.runtime.generation.runner import Runner
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(200)

PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
NUM_TOKENS = 20

# A host process as an actor makes one. After so many reads it says so in the middle of one, and stays there.
# Arguments: store, address, slots, reads (0: any number), and of a kept arena: pid, descriptor, bytes.
HOST = """
import os, sys, threading
from moray.cluster.server import DataPlaneServer
from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.store.store import Store

path, address, token, (num_slots, num_reads, *kept) = *sys.argv[1:4], (int(word) for word in sys.argv[4:])
lock, count, read, is_ready = threading.Lock(), [0], os.preadv, threading.Event()

def stuck(descriptor, buffers, offset):
    with lock:
        count[0] += 1
        is_stuck = num_reads and count[0] >= num_reads
        is_first = count[0] == num_reads
    if not is_stuck:
        return read(descriptor, buffers, offset)
    if is_first:
        is_ready.wait()
        print("stuck", flush=True)
    read(descriptor, [buffers[0][: len(buffers[0]) // 2]], offset)
    threading.Event().wait()

os.preadv = stuck
store = Store.open(path)
arena = Arena.attach(ArenaRef(*kept), writable=True) if kept else None
host = ShardHost(store, list(store.manifest.shards), 1, arena, num_slots=num_slots)
server = DataPlaneServer("host-0", host, address, token)
print("ready", flush=True)
is_ready.set()
for line in sys.stdin:
    print(host.stats().loader.bytes_read, flush=True)
"""


@contextmanager
def host_process(
    store: Store, address: HostAddress, num_slots: int, num_reads: int = 0, kept: ArenaRef | None = None
) -> Iterator[Popen[str]]:
    words = [] if kept is None else [str(number) for number in (kept.pid, kept.fd, kept.num_bytes)]
    with child(HOST, str(store.path), address.address, TOKEN, str(num_slots), str(num_reads), *words) as process:
        yield process


def kill(process: Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def expected(demo_runner: Runner) -> list[int]:
    return greedy(demo_runner, list(demo_runner.encode(PROMPT)), NUM_TOKENS)


class Generation(threading.Thread):
    """Makes a runner, which warms up, and generates until ``is_enough``, and once more."""

    def __init__(self, store: Store, source: ArenaSource) -> None:
        super().__init__()
        self._store, self._source = store, source
        self.is_enough = threading.Event()
        self.outcome: set[tuple[int, ...]] | BaseException | None = None

    def run(self) -> None:
        try:
            runner = Runner(self._store, self._source, load_model(self._store, "int8", torch.device("cpu")))
            ids = list(runner.encode(PROMPT))
            seen, is_last = set(), False
            while not is_last:
                is_last = self.is_enough.is_set()
                seen.add(tuple(greedy(runner, ids, NUM_TOKENS)))
            self.outcome = seen
            runner.close()
        except BaseException as error:
            self.outcome = error


@pytest.mark.parametrize(
    ("num_slots", "deaths"),
    [
        (2, [10, 20]),  # beyond what it fills its arena with: what is read then, a layer waits for
        (7, [15, 20]),
        (48, [20, 10]),  # everything fits: killed at a cold start, and when it was started again
    ],
)
def test_a_host_killed_in_mid_load_is_done_without_and_used_again(
    demo: Store, expected: list[int], num_slots: int, deaths: list[int]
) -> None:
    """``deaths``: after how many reads each host is killed; the one after them lives."""
    address = new_address("host-0")
    with ExitStack() as stack:
        process = stack.enter_context(host_process(demo, address, num_slots, deaths[0]))
        assert read_line(process) == "ready"
        events: list[Event] = []
        source = ArenaSource(demo, [address], report=events.append)
        stack.callback(source.close)
        generation = Generation(demo, source)
        generation.start()
        for num_reads in (*deaths[1:], 0):
            assert read_line(process) == "stuck"
            kill(process)
            kept = source.arena_refs()["host-0"]
            process = stack.enter_context(host_process(demo, address, num_slots, num_reads, kept))
            assert read_line(process) == "ready"
        has_misses = num_slots < len(demo.manifest.shards)
        while has_misses and sum(isinstance(event, HostBack) for event in events) < len(deaths):
            generation.join(0.01)
        generation.is_enough.set()
        generation.join(150)
        assert generation.outcome == {tuple(expected)}
        assert not has_misses or [e.how for e in events if isinstance(e, HostLost)] == ["ended"] * len(deaths)
