"""Experts computed by other machines: one request a host and layer, all sent before anything is awaited.

What a host does not answer in time is computed by another that has it, or here. Outputs are those of the experts,
unweighted; who asked sums them in the router's order, so placement does not change a bit.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Sequence
from itertools import pairwise
from time import monotonic

import numpy as np

from moray.cluster.activations import WireFormat
from moray.cluster.client import HostAddress
from moray.cluster.health import LONGEST_S
from moray.cluster.keys import KeyPair
from moray.cluster.messages import Compute, GateSpec
from moray.cluster.remote_host import OnChange, RemoteHost, RemoteStats, Request
from moray.cluster.wire import look_out
from moray.runtime.arrays import Bools, Floats, Ints
from moray.runtime.cpu import usable_cores
from moray.runtime.kernels.gates import Gate
from moray.runtime.kernels.ops import Grouping
from moray.runtime.lanes.lane import Lane, Resource
from moray.runtime.lanes.places import HERE, Part, choose_places, split_work
from moray.runtime.lanes.rates import Rates
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ShardLayout
from moray.runtime.store.store import Store

_TEND_S = 0.5  # between looks after hosts that are all up
_HURRY_S = 0.05  # while one is not
_LOOK_S = 1e-3  # looking out for a reply that is due, before sleeping


class RemoteLanes:
    """All remote hosts of a compute process. A layer's call has them for itself; a thread tends them between calls."""

    def __init__(
        self, store: Store, hosts: Sequence[HostAddress], keys: KeyPair | None, client: str, numerics: Numerics,
        on_change: OnChange | None = None, forced: Lane | None = None,
    ) -> None:  # fmt: skip
        self._store, self._keys, self._client, self._numerics = store, keys, client, numerics
        self._on_change, self.forced = on_change or (lambda *change: None), forced
        self.rates = Rates(token_bytes=_row_bytes(store, numerics))
        self._free: list[int] = []  # numbers in ``rates`` of hosts that have left
        self.hosts: list[RemoteHost] = []
        self._layers: dict[int, _Layer] = {}
        self.lock = threading.Lock()
        self._may_look = usable_cores() > 1
        self._stop = threading.Event()
        for host in hosts:
            self.join(host)
        self._thread = threading.Thread(target=self._run, name="moray-remote", daemon=True)
        self._thread.start()

    def join(self, address: HostAddress) -> None:
        """Use a host as soon as it is ready; in place of the one of the same id, if there is one. Does not wait."""
        self.leave(address.host_id)
        with self.lock:
            number = self._free.pop() if self._free else self.rates.add_remote()
            host = RemoteHost(
                address, self._client, self._keys, self._store, self._numerics, self.rates, number, self._on_change,
                monotonic(),
            )  # fmt: skip
            self.hosts = [*self.hosts, host]  # a new list: others may be reading the old one

    def leave(self, host_id: str) -> None:
        """Use a host no more. Does nothing if it is not known."""
        with self.lock:
            for host in [host for host in self.hosts if host.address.host_id == host_id]:
                self.hosts = [other for other in self.hosts if other is not host]
                self._free.append(host.number)
                host.close()

    def wait_joined(self, timeout_s: float) -> list[str]:
        """Wait until every host is ready. Returns the ids of those that are not. Raises why one never will be."""
        deadline = monotonic() + timeout_s
        while True:
            with self.lock:
                for host in self.hosts:
                    if host.failure is not None:
                        raise host.failure
                late = [host.address.host_id for host in self.hosts if not host.is_up]
            if not late or monotonic() > deadline:
                return late
            self._stop.wait(0.01)

    def offers(self, layer: int) -> Bools | None:
        """bool [E]: experts that some live host has in memory. None: no host is live."""
        held = [host.resident[layer] for host in self.hosts if host.is_up]
        if not held or self.forced is Lane.HOST_CPU:
            return None
        some: Bools = np.logical_or.reduce(held)
        return some

    def begin(self, layer: int, grouping: Grouping, x_TH: Floats, gate: Gate, is_here: Bools) -> RemoteCall | None:
        """Send what others compute of a layer's call, which must be closed. None: nothing.

        ``is_here`` [E]: active experts in memory here.
        """
        self.lock.acquire()
        call = None
        try:
            call = self._begin(layer, grouping, x_TH, gate, is_here)
        finally:
            if call is None:
                self.lock.release()
        return call

    def _begin(self, layer: int, grouping: Grouping, x_TH: Floats, gate: Gate, is_here: Bools) -> RemoteCall | None:
        held = {host: host.resident[layer][grouping.active].tolist() for host in self.hosts if host.is_up}
        if not held:
            return None
        offers = [tuple([host.number for host, has in held.items() if has[i]]) for i in range(len(is_here))]
        layout = self._store.manifest.layers[layer].layout
        counts = [last - first for first, last in pairwise(grouping.starts.tolist())]
        places = choose_places(counts, is_here.tolist(), offers, layout.num_bytes, self.rates, self.forced)
        chosen = {number: [i for i, place in enumerate(places) if place == number] for number in set(places) - {HERE}}
        for host in held:
            host.passed_over += host.number not in chosen and any(held[host])
        if not chosen:
            return None
        known = self._layers.get(layer)
        if known is None:
            known = self._layers[layer] = _Layer(layer, layout, self._numerics, gate)
        call = RemoteCall(self, known, grouping, counts, x_TH, list(held), offers)
        call.send(chosen)
        return call

    def wait(self, hosts: Sequence[RemoteHost], due_s: float, most_s: float) -> None:
        """Until something comes from one of these, at most ``most_s``. ``due_s``: until a reply is expected.

        Around then this thread stays awake, if there is another core for those that receive.
        """
        poll = select.poll()
        for host in hosts:
            host.client.watch(poll)
        asleep_ms = int(1000 * (min(due_s, most_s) - _LOOK_S / 2))
        if asleep_ms > 0 and poll.poll(asleep_ms):
            return
        started = monotonic()
        if self._may_look and look_out(poll, min(_LOOK_S, most_s)):
            return
        poll.poll(max(0, 1 + int(1000 * (most_s - 1e-3 * max(0, asleep_ms) - (monotonic() - started)))))

    def stats(self) -> list[RemoteStats]:
        with self.lock:
            return [host.snapshot() for host in self.hosts]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for host in self.hosts:
            host.close()

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            with self.lock:
                now = monotonic()
                for host in [host for host in self.hosts if host.failure is None]:
                    host.tend(now)
                is_calm = all(host.is_up or host.failure is not None for host in self.hosts)
            wait_s = _TEND_S if is_calm else _HURRY_S


class _Layer:
    """What is the same for all requests of a layer, whose gate does not change."""

    def __init__(self, layer: int, layout: ShardLayout, numerics: Numerics, gate: Gate) -> None:
        gate_up, down = layout["gate_up_proj"].spec, layout["down_proj"].spec
        assert gate_up is not None and down is not None
        self.index, self.num_bytes, self.numerics = layer, layout.num_bytes, numerics
        self.form = WireFormat.of(gate_up, numerics)
        self.pair_bytes = 4 * down.rows + self.form.num_bytes(1, 1)  # there and back, at most
        self.gate = GateSpec(
            limit=gate.limit, alpha=gate.alpha, is_gelu=gate.is_gelu, is_interleaved=gate.is_interleaved
        )


class RemoteCall:
    """One layer call's experts on other machines."""

    def __init__(
        self, lanes: RemoteLanes, layer: _Layer, grouping: Grouping, counts: list[int], x_TH: Floats,
        hosts: list[RemoteHost], offers: list[tuple[int, ...]],
    ) -> None:  # fmt: skip
        """``counts``: pairs of each active expert."""
        self._lanes, self._layer, self._grouping, self._counts, self._x_TH = lanes, layer, grouping, counts, x_TH
        self._hosts, self._offers = {host.number: host for host in hosts}, offers
        self._is_single = len(x_TH) == 1  # token: each expert has one pair, of its number
        self._lost: set[int] = set()
        self._tried: set[tuple[int, int]] = set()  # position, host
        self.here: Ints = np.empty(0, dtype=np.int64)
        self.elsewhere = np.zeros(len(grouping.active), dtype=np.bool_)

    @property
    def is_over(self) -> bool:
        return not self._lost and not any(host.in_flight for host in self._hosts.values())

    def send(self, chosen: dict[int, list[int]]) -> None:
        """At the beginning: the positions that each host computes."""
        for number, positions in chosen.items():
            self._send(self._hosts[number], positions)
        for positions in chosen.values():
            self.elsewhere[positions] = True
        self.here = np.flatnonzero(~self.elsewhere)

    def take(self) -> tuple[list[tuple[Ints, Floats]], Ints]:
        """Outputs that have arrived, as pairs' numbers and rows, and positions that must be computed here after all.

        Waits until there is something of either, or everything is over.
        """
        waited = False
        for host in self._hosts.values():
            host.learn()  # from the layer before, while this one's replies are due
        while True:
            arrived = self._receive(waited)
            busy = [host for host in self._hosts.values() if host.in_flight]
            if arrived or self._lost or not busy:
                lost = np.array(sorted(self._lost), dtype=np.int64)
                self.elsewhere[lost] = False
                self._lost.clear()
                return arrived, lost
            now = monotonic()
            due, deadline = min(host.due() for host in busy), min(host.deadline() for host in busy)
            self._lanes.wait(busy, due - now, deadline - now)
            waited = True

    def note_computed(self, num_experts: int, num_pairs: int, seconds: float) -> None:
        """So long did experts take here."""
        self._lanes.rates.observe(Resource.CPU, num_experts * self._layer.num_bytes, num_pairs, seconds, True)

    def note_loaded(self, num_experts: int, seconds: float) -> None:
        """So long were experts waited for that the disk here has."""
        self._lanes.rates.observe(Resource.DISK, num_experts * self._layer.num_bytes, 0, seconds, True)

    def close(self) -> None:
        """Whatever is still under way is no longer wanted."""
        for host in self._hosts.values():
            host.abandon()
        self._lanes.lock.release()

    def _receive(self, waited: bool) -> list[tuple[Ints, Floats]]:
        arrived: list[tuple[Ints, Floats]] = []
        for host in self._hosts.values():
            while host.in_flight and (reply := host.receive(monotonic(), waited)) is not None:
                request, y_PH = reply
                if y_PH is None:
                    self._retry(request.positions.tolist())
                else:
                    arrived.append((request.pairs, y_PH))
            if host.in_flight and not host.is_up:
                self._retry(_positions(host.abandon()))
            elif host.in_flight and (now := monotonic()) >= host.deadline():
                self._retry(_positions(host.give_up(now)))
        return arrived

    def _retry(self, positions: list[int]) -> None:
        """Elsewhere, at the fastest host that has not failed at it, or here."""
        by_host: dict[int, list[int]] = {}
        for position in positions:
            able = [
                self._hosts[number]
                for number in self._offers[position]
                if self._hosts[number].is_up and (position, number) not in self._tried
            ]
            if able:
                best = min(able, key=lambda host: host.expected_s(self._layer.pair_bytes, self._layer.num_bytes, 1))
                by_host.setdefault(best.number, []).append(position)
            else:
                self._lost.add(position)
        for number, mine in by_host.items():
            self._send(self._hosts[number], mine)

    def _send(self, host: RemoteHost, positions: list[int]) -> None:
        """In several requests if the work is expected to take long: each has its own deadline."""
        starts = self._grouping.starts
        parts = self._parts(host, [self._counts[p] for p in positions])
        self._tried.update((position, host.number) for position in positions)
        for number, part in enumerate(parts):
            experts = np.array([positions[i] for i in part.experts], dtype=np.int64)
            counts = [last - first for first, last in zip(part.first, part.last, strict=True)]
            if self._is_single:
                pairs = experts
            else:
                pairs = np.concatenate([starts[positions[i]] + np.arange(a, b) for i, a, b in zip(*part, strict=True)])
            if not self._send_part(host, experts, counts, pairs):
                self._retry(sorted({positions[i] for later in parts[number:] for i in later.experts}))
                return

    def _parts(self, host: RemoteHost, counts: list[int]) -> list[Part]:
        """Experts with so many pairs, as requests."""
        layer, pairs = self._layer, sum(counts)
        # Decoding: what split_work would find, for a quarter of the questions.
        if host.expected_s(pairs * layer.pair_bytes, len(counts) * layer.num_bytes, pairs) <= LONGEST_S:
            return [Part(list(range(len(counts))), [0] * len(counts), counts)]
        fixed_s, expert_s, pair_s = (
            host.expected_s(*work) for work in ((0, 0, 0), (0, layer.num_bytes, 0), (layer.pair_bytes, 0, 1))
        )
        return split_work(counts, fixed_s, expert_s - fixed_s, pair_s - fixed_s, LONGEST_S)

    def _send_part(self, host: RemoteHost, positions: Ints, counts: list[int], pairs: Ints) -> bool:
        layer, x_TH = self._layer, self._x_TH
        row_of_pair = self._grouping.token_of_pair[pairs]
        if len(x_TH) > 1:
            rows, row_of_pair = np.unique(row_of_pair, return_inverse=True)
            x_TH = x_TH[rows]
        buffer = layer.form.encode(x_TH, row_of_pair)
        experts = self._grouping.active[positions].tolist()
        message = Compute(
            layer=layer.index, experts=experts, counts=counts, num_rows=len(x_TH), numerics=layer.numerics,
            gate=layer.gate,
        )  # fmt: skip
        num_bytes = len(experts) * layer.num_bytes
        wire_bytes = len(buffer) + len(pairs) * (layer.pair_bytes - layer.form.num_bytes(1, 1))
        expected_s = host.expected_s(wire_bytes, num_bytes, len(pairs))
        request = Request(layer.index, positions, experts, pairs, num_bytes, wire_bytes, expected_s)
        return host.send(request, message, buffer.data, monotonic())


def _positions(requests: list[Request]) -> list[int]:
    return sorted({int(position) for request in requests for position in request.positions})


def _row_bytes(store: Store, numerics: Numerics) -> int:
    """Of one token's activations, on the mean of both ways."""
    for layer in store.manifest.layers:
        gate_up, down = layer.layout.get("gate_up_proj"), layer.layout["down_proj"].spec
        if gate_up is not None and gate_up.spec is not None and down is not None:
            return (WireFormat.of(gate_up.spec, numerics).num_bytes(1, 1) + 4 * down.rows) // 2
    return 0
