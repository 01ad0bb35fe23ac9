"""What nodes and the links between them can do: measured when a node joins, links also kept current from traffic."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from moray.runtime.cpu import usable_cores
from moray.runtime.errors import StoreError
from moray.runtime.lanes.rates import Rate
from moray.runtime.layout.shard import ALIGNMENT, ExpertKey, round_up
from moray.runtime.memory import available_memory
from moray.runtime.store.disk import DiskReader
from moray.runtime.store.manifest import ExpertsLayer
from moray.runtime.store.reader import PIECE_BYTES
from moray.runtime.store.store import Store

if TYPE_CHECKING:
    from moray.cluster.client import HostClient

_LEAST_SHARE = 0.01  # of an expert's time with one token, that its bytes take
_LAUNCH_S = 2e-5  # of the kernels, once a layer
_WORKING_SET_BYTES = 128 << 20  # more than most caches, so that memory is measured
_GROUP_BYTES = 32 << 20  # of the experts computed by one call
_MANY = 64  # tokens an expert in a call that tells a token's cost from a byte's
_MEASURE_S, _MEANS = 0.1, 3  # for each of both
_READS_AT_ONCE = 4
_SMOOTHING = 0.1  # weight of the newest observation
_LARGEST_CHANGE = 4.0  # an observation counts as at most so many times too slow or too fast
_SMALL_BYTES = 4096  # a message that tells the latency
_ROUND_TRIPS = 20
_FIRST_PAYLOAD_BYTES, _LAST_PAYLOAD_BYTES = 256 << 10, 4 << 20
_LONG_ENOUGH_S = 0.02  # for a payload to tell the bandwidth


@dataclass(frozen=True, slots=True)
class ComputeSpeed:
    """How fast a CPU computes experts: ``bytes_per_s`` of their shards with one token each, which memory bounds, and
    ``token_bytes_per_s``, shard bytes times tokens a second, which its arithmetic bounds."""

    bytes_per_s: float
    token_bytes_per_s: float

    def rate(self, shard_bytes: int) -> Rate:
        """For the cost model: experts of one size, all of a layer's at a host launched at once."""
        byte_s, token_byte_s = 1 / self.bytes_per_s, 1 / self.token_bytes_per_s
        # ``bytes_per_s`` is with a first token, which the cost model adds.
        return Rate(_LAUNCH_S, max(byte_s - token_byte_s, _LEAST_SHARE * byte_s), shard_bytes * token_byte_s)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node has and can do, as it was measured there."""

    memory_bytes: int  # free
    num_cores: int
    instruction_set: str
    compute: ComputeSpeed
    disk_bytes_per_s: float  # of its store, past the page cache


@dataclass(frozen=True, slots=True)
class LinkReport:
    """The way from the compute process to a host and back."""

    latency_s: float  # of an empty request and its empty reply
    bytes_per_s: float  # of what goes one way

    @property
    def rate(self) -> Rate:
        """For the cost model: one request and its reply."""
        return Rate(self.latency_s, 1 / self.bytes_per_s, 0.0)


#: Before a link has been measured: gigabit Ethernet.
ASSUMED_LINK = LinkReport(3e-4, 125e6)


@dataclass(frozen=True, slots=True)
class Topology:
    """A cluster as seen from its compute node. ``links``: by node, of all nodes but that."""

    compute_node: str
    nodes: Mapping[str, NodeReport]
    links: Mapping[str, LinkReport]


class LinkAverage:
    """A link's report, following the traffic."""

    def __init__(self, report: LinkReport) -> None:
        self._latency_s, self._byte_s = report.latency_s, 1 / report.bytes_per_s

    @property
    def report(self) -> LinkReport:
        return LinkReport(self._latency_s, 1 / self._byte_s)

    def observe(self, num_bytes: int, seconds: float) -> None:
        """A request and its reply of ``num_bytes`` together, that took so long beyond the host's own work.

        What takes mainly as long as an empty one tells the latency; other messages tell the bandwidth.
        """
        sent_s = num_bytes * self._byte_s
        if num_bytes <= _SMALL_BYTES or sent_s < 0.5 * self._latency_s:
            self._latency_s = _follow(self._latency_s, seconds - sent_s)
        elif sent_s > 2 * self._latency_s or seconds > 2 * (sent_s + self._latency_s):
            self._byte_s = _follow(self._byte_s, (seconds - self._latency_s) / num_bytes)


def _follow(value: float, observed: float) -> float:
    bounded = min(max(observed, value / _LARGEST_CHANGE), value * _LARGEST_CHANGE)
    return value + _SMOOTHING * (bounded - value)


# ------------------------------------------------------------------------------------------- a node


def measure_node(store_path: str | Path, num_threads: int | None = None) -> NodeReport:
    """Measure this node for about a second: its disk by reading some of the store's shards, its CPU by computing them.

    ``num_threads``: None: all usable cores. Sets this process's kernel threads. Raises StoreError.
    """
    from moray.runtime.kernels.isa import INSTRUCTION_SET
    from moray.runtime.kernels.pool import set_num_threads

    threads = usable_cores() if num_threads is None else num_threads
    memory_bytes = available_memory()
    with Store.open(store_path) as store:
        layer, addresses, disk_bytes_per_s, memory = _read_some(store)
        set_num_threads(threads)
        compute = _measure_compute(layer, addresses)
    del memory  # read by address until here
    return NodeReport(memory_bytes, threads, INSTRUCTION_SET, compute, disk_bytes_per_s)


def _read_some(store: Store) -> tuple[ExpertsLayer, list[int], float, mmap.mmap]:
    """Shards of one size in page-aligned memory: their addresses, and bytes a second of reading."""
    layers = store.manifest.layers
    keys: list[ExpertKey] = sorted(store.present)
    if not keys:
        raise StoreError(f"{store.path} has no expert of the store; bring some with `moray store sync`")
    layer = layers[keys[0].layer]
    keys = [key for key in keys if layers[key.layer].layout == layer.layout]
    slot = round_up(layer.layout.num_bytes, ALIGNMENT)
    keys = keys[: max(2, -(-_WORKING_SET_BYTES // slot))]
    memory = mmap.mmap(-1, slot * len(keys))
    view, reader = memoryview(memory), DiskReader(store)
    np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 0  # its pages are there before reading is timed

    def read(piece: tuple[int, int]) -> None:
        index, start = piece
        end = min(start + PIECE_BYTES, slot)
        reader.read(keys[index], start, view[index * slot + start : index * slot + end])

    pieces = [(index, start) for index in range(len(keys)) for start in range(0, slot, PIECE_BYTES)]
    try:
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            started = perf_counter()
            list(pool.map(read, pieces))
            seconds = perf_counter() - started
    finally:
        reader.close()
    base = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    addresses = [base + index * slot for index in range(len(keys))]
    return layer, addresses, len(keys) * layer.layout.num_bytes / seconds, memory


def _measure_compute(layer: ExpertsLayer, addresses: list[int]) -> ComputeSpeed:
    """The products of all matrices of some experts, group after group, with one row each and with many."""
    from moray.runtime.kernels.ops import MatrixKernel

    layout = layer.layout
    matrices = [(MatrixKernel.of(t.spec, "int8"), t.offset) for t in layout.tensors if t.spec is not None]
    size = max(1, min(len(addresses), _GROUP_BYTES // layout.num_bytes))
    groups = [np.array(addresses[i : i + size], dtype=np.int64) for i in range(0, len(addresses) - size + 1, size)]

    def load(tokens: int) -> Callable[[int], None]:
        starts = tokens * np.arange(size + 1, dtype=np.int64)
        inputs = [
            np.random.default_rng(0).standard_normal((tokens * size, kernel.spec.columns), dtype=np.float32)
            for kernel, _ in matrices
        ]

        def run(turn: int) -> None:
            shards = groups[turn % len(groups)]
            for (kernel, offset), x in zip(matrices, inputs, strict=True):
                kernel.matmul(x, shards + offset, starts)

        return run

    num_bytes = size * layout.num_bytes
    one_s, many_s = _seconds(load(1)), _seconds(load(_MANY))
    # A token costs what _MANY of them take beyond one; noise may not make that nothing.
    token_s = max((many_s - one_s) / (_MANY - 1), 0.01 * one_s)
    return ComputeSpeed(num_bytes / one_s, num_bytes / token_s)


def _seconds(run: Callable[[int], None]) -> float:
    """Seconds of a call, which gets its number: the median of means, because where a control group limits the time of
    a process most calls take less than their share."""
    run(0)  # compiles
    means: list[float] = []
    number = 0
    while len(means) < _MEANS:
        started, calls = perf_counter(), 0
        while calls < 2 or perf_counter() - started < _MEASURE_S:
            calls += 1
            number += 1
            run(number)
        means.append((perf_counter() - started) / calls)
    return median(means)


# ------------------------------------------------------------------------------------------- a link


def measure_link(client: HostClient) -> LinkReport:
    """Measure the way to a host that was greeted: empty round trips, then payloads there and back until one takes long.

    Takes some tens of milliseconds. Raises HostLostError.
    """
    latency_s = median(_echo_s(client, b"", 0) for _ in range(_ROUND_TRIPS))
    num_bytes = _FIRST_PAYLOAD_BYTES
    while True:
        seconds = _echo_s(client, bytes(num_bytes), num_bytes)
        if seconds > _LONG_ENOUGH_S or num_bytes >= _LAST_PAYLOAD_BYTES:
            # Noise may not leave nothing for the bytes.
            return LinkReport(latency_s, 2 * num_bytes / max(seconds - latency_s, 0.1 * seconds))
        num_bytes *= 4


def _echo_s(client: HostClient, payload: bytes, reply_bytes: int) -> float:
    from moray.cluster.messages import Echo

    started = perf_counter()
    client.request(Echo(reply_bytes=reply_bytes), memoryview(payload))
    return perf_counter() - started
