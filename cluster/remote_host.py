"""One remote host as the compute process sees it: its connection, what it has in memory, the requests under way.

    Hello -> Welcome -> Ping -> Pong, and small computations -> ready for work

Nothing here waits. Decisions are health.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.health import CAP_S, HostHealth, HostState, LinkRate, Probe
from moray.cluster.keys import KeyPair
from moray.cluster.messages import Compute, Computed, Hello, Message, Ping, Pong, Refused, Welcome
from moray.cluster.trials import HostTrials
from moray.runtime.arrays import Floats, Ints
from moray.runtime.errors import ClusterError, ProtocolError
from moray.runtime.lanes.lane import network, remote_cpu
from moray.runtime.lanes.rates import Rate, Rates
from moray.runtime.layout.packed import Numerics
from moray.runtime.store.store import Store

OnChange = Callable[[str, HostState, HostState, str], None]
"""Told of each change of a host's state: host id, old state, new state, why."""

_HELLO_S = 2.0  # before a greeting is taken for lost; the answer may take longer, kernels may have to be compiled
_TRIAL_S = 0.02  # that the answer to a trial is awaited, so that its time is known
_NEWS_S = 0.2  # between questions to a host that has not yet loaded what is assigned to it
_FORGOTTEN = 2000  # layer calls that go to others, before a host is measured again
_MOST_ABANDONED = 256
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Request:
    """Work sent to a host: pairs of a layer call, by their numbers there."""

    layer: int
    positions: Ints  # of its experts in the call's list
    experts: list[int]
    pairs: Ints
    num_bytes: int  # of shards
    wire_bytes: int  # there and back
    expected_s: float
    sent_at: float = 0.0
    was_last: bool = False  # of those under way, when it was answered


@dataclass(slots=True)
class RemoteStats:
    """Since the start, of one remote host."""

    host_id: str
    node: str
    state: str = HostState.DOWN.value
    num_assigned: int = 0
    num_resident: int = 0
    requests: int = 0
    pairs: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    missed: int = 0  # deadlines
    stale: int = 0  # replies that came too late
    refused: int = 0  # requests that it did not accept
    round_trip_us: float = 0.0  # without computing
    bytes_per_s: float = 0.0  # of the way there and back
    joined: int = 0  # how often it was ready for work, after it had not been


class RemoteHost:
    """Used with the lock of RemoteLanes held."""

    def __init__(
        self, address: HostAddress, client: str, keys: KeyPair | None, store: Store, numerics: Numerics,
        rates: Rates, number: int, on_change: OnChange, now: float,
    ) -> None:  # fmt: skip
        """``number``: of its resources in ``rates``. Raises ConfigError if the address needs keys it has not."""
        self.address, self.number = address, number
        self._store, self._numerics, self._rates, self._on_change = store, numerics, rates, on_change
        self._name = client
        self.client = HostClient(address, client, keys=keys)
        self.health, self.link = HostHealth(now), LinkRate()
        self.resident = [np.zeros(layer.num_experts, dtype=np.bool_) for layer in store.manifest.layers]
        self.stats = RemoteStats(address.host_id, address.node)
        self.failure: ClusterError | None = None  # why it can never be used as it is
        self.in_flight: dict[int, Request] = {}
        self.passed_over = 0  # layer calls that it could have had a part in, since it was last asked
        self._last_reply_at = now
        self._abandoned: dict[int, Request] = {}
        self._pings: dict[int, float] = {}
        self._greeting: tuple[int, float] | None = None  # the request's id, and when it was sent
        self._trials, self._is_check = HostTrials(store, numerics), False  # a check: of a host in use
        self._trial: dict[int, float] = {}  # under way: its id, and when it was sent
        self._num_assigned, self._news_at = 0, now
        self._lessons: list[tuple[Request, float, float, bool]] = []  # see ``learn``

    @property
    def is_up(self) -> bool:
        return self.health.state is HostState.UP

    # ------------------------------------------------------------------------------------- work

    def expected_s(self, wire_bytes: int, num_bytes: int, num_pairs: int) -> float:
        """Of a request for experts of so many bytes."""
        return self.link.seconds(wire_bytes) + self._rates.alone[remote_cpu(self.number)].seconds(num_bytes, num_pairs)

    def send(self, request: Request, message: Compute, buffer: memoryview, now: float) -> bool:
        """False if there is no connection."""
        request_id = self.client.try_send(message, buffer)
        if request_id is None:
            self._lose(now, "no connection")
            return False
        request.sent_at = now
        self.in_flight[request_id] = request
        self.passed_over = 0
        self.stats.requests += 1
        self.stats.bytes_sent += len(buffer)
        return True

    def due(self) -> float:
        """When the oldest request under way is expected to be answered."""
        oldest = next(iter(self.in_flight.values()))
        return max(self._last_reply_at, oldest.sent_at) + oldest.expected_s

    def deadline(self) -> float:
        """When the oldest request under way is given up."""
        oldest = next(iter(self.in_flight.values()))
        return max(self._last_reply_at, oldest.sent_at) + self.health.deadline_s(oldest.expected_s)

    def give_up(self, now: float) -> list[Request]:
        """The deadline has passed: what was under way is to be done elsewhere."""
        old, oldest = self.health.state, next(iter(self.in_flight.values()))
        self.health.missed(now, now - max(self._last_reply_at, oldest.sent_at))
        self.stats.missed += 1
        self._tell(old, "a deadline passed")
        return self.abandon()

    def abandon(self) -> list[Request]:
        """Forget what is under way; replies that still come only tell that the host lives."""
        requests = list(self.in_flight.values())
        self._abandoned |= self.in_flight
        self.in_flight.clear()
        while len(self._abandoned) > _MOST_ABANDONED:
            del self._abandoned[next(iter(self._abandoned))]
        return requests

    def receive(self, now: float, waited: bool) -> tuple[Request, Floats | None] | None:
        """The next reply to work that is there: float32 [P, H], or None if it was refused. ``waited``: so that its
        time of arrival is known.
        """
        while True:
            try:
                reply = self.client.try_receive()
            except ProtocolError as error:
                self._fail(now, str(error))
                continue
            if reply is None:
                if self.is_up and not self.client.is_connected:
                    self._lose(now, "the connection ended")
                return None
            request_id, message, buffer = reply
            request = self.in_flight.pop(request_id, None)
            if request is not None:
                return request, self._accept(request, message, buffer, now, waited)
            self._other(request_id, message, now)

    def _accept(
        self, request: Request, message: Message, buffer: memoryview, now: float, waited: bool
    ) -> Floats | None:
        width = self._store.manifest.layers[request.layer].layout["down_proj"].spec.rows  # type: ignore[union-attr]
        expected = 4 * len(request.pairs) * width
        if isinstance(message, Computed) and len(buffer) == expected:
            took_s = now - max(request.sent_at, self._last_reply_at)
            self._last_reply_at = now
            self.health.answered(now, request.expected_s, min(took_s, request.expected_s) if not waited else took_s)
            self.stats.pairs += len(request.pairs)
            self.stats.bytes_received += expected
            request.was_last = not self.in_flight
            self._lessons.append((request, message.compute_s, now, waited))
            return np.frombuffer(buffer, dtype=np.float32).reshape(-1, width)
        self.stats.refused += 1
        if isinstance(message, Refused) and message.reason != "hello":
            _log.info("host %s does not compute: %s", self.address.host_id, message.message)
            self.resident[request.layer][request.experts] = False
            self._count_resident()
            self._news_at = now + _NEWS_S
        elif isinstance(message, Refused):
            self._lose(now, "it was restarted")
        else:
            self._fail(now, f"it answered Compute with {type(message).__name__} and {len(buffer)} bytes")
        return None

    def learn(self) -> None:
        """From the times of what was answered since: while there is nothing to do but to wait."""
        for lesson in self._lessons:
            self._learn(*lesson)
        self._lessons.clear()

    def _learn(self, request: Request, compute_s: float, found_at: float, waited: bool) -> None:
        num_pairs, on_way_s = len(request.pairs), found_at - request.sent_at - compute_s
        self._rates.observe(remote_cpu(self.number), request.num_bytes, num_pairs, compute_s, concurrent=False)
        if not request.was_last or on_way_s <= 0:
            return
        if waited:
            self.link.observe(request.wire_bytes, on_way_s)
        else:
            self.link.observe_early(request.wire_bytes, on_way_s)
        self._publish_link()

    def _publish_link(self) -> None:
        self._rates.follow(network(self.number), Rate(self.link.round_trip_s, self.link.byte_s, 0.0))

    # ----------------------------------------------------------------------------------- health

    def tend(self, now: float) -> None:
        """Read what came without being waited for, and send what is due. No work may be under way."""
        self.learn()
        while self.receive(now, waited=False) is not None:
            pass
        if self.is_up and self.passed_over > _FORGOTTEN:  # what is never asked would be thought slow for ever
            self.passed_over = 0
            self._measure_anew(now, is_check=True)
        while self._trial and self.client.poll(_TRIAL_S):
            self.receive(now := monotonic(), waited=True)
        old = self.health.state
        if self.is_up and any(now - sent_at > CAP_S for sent_at in self._pings.values()):
            self.health.missed(now)
            self.stats.missed += 1
            self._tell(old, "a ping was not answered")
        probe = self.health.probe(now)
        self._tell(old, "not heard for long")
        if probe is Probe.HELLO and self.failure is None and not self._awaits_welcome(now):
            self._greet(now)
        elif probe is Probe.PING or (self.is_up and now >= self._news_at):
            self._ping(now)

    def _greet(self, now: float) -> None:
        message = Hello(client=self._name, token=self.address.token, numerics=self._numerics)
        if (request_id := self.client.try_send(message)) is not None:
            self._greeting = request_id, now

    def _awaits_welcome(self, now: float) -> bool:
        return self._greeting is not None and now - self._greeting[1] <= _HELLO_S

    def _ping(self, now: float) -> None:
        lacks = self.stats.num_resident < self._num_assigned
        self._news_at = now + _NEWS_S if lacks else np.inf
        request_id = self.client.try_send(Ping(wants_resident=lacks))
        if request_id is None:
            self._lose(now, "no connection")
        else:
            self._pings.setdefault(request_id, now)

    def _other(self, request_id: int, message: Message, now: float) -> None:
        """What is no reply to work under way."""
        if (late := self._abandoned.pop(request_id, None)) is not None:
            self.stats.stale += 1
            late.was_last = not self.in_flight
            if isinstance(message, Computed):
                self._learn(late, message.compute_s, now, waited=True)
        if isinstance(message, Welcome):
            self._welcome(message, now)
        elif isinstance(message, Computed) and request_id in self._trial:
            self._trial_done(message.compute_s, now)
        elif isinstance(message, Pong):
            if message.resident is not None:
                self._note_resident(message.resident)
            self._pings.pop(request_id, None)
        elif isinstance(message, Refused) and (message.reason == "hello" or request_id in self._trial):
            self._lose(now, message.message)
        elif isinstance(message, Refused) and self._greeting is not None and request_id == self._greeting[0]:
            self._refuse(ClusterError(f"expert host {self.address.host_id}: {message.message}"))
        old = self.health.state
        self.health.heard(now)
        self._tell(old, "it answers again")
        if old is HostState.SUSPECTED and self.is_up:
            self._measure_anew(now)

    def _measure_anew(self, now: float, is_check: bool = False) -> None:
        """What was learned of a host that stood still would keep work from it for good."""
        self.link = LinkRate()
        self._trials, self._is_check = HostTrials(self._store, self._numerics), is_check
        self._next_trial(now)

    def _welcome(self, welcome: Welcome, now: float) -> None:
        # Imported here: who only reads a host's statistics does not load Numba.
        from moray.cluster.arena_source import check_welcome

        try:
            check_welcome(welcome, self._store)
        except ClusterError as error:
            self._refuse(error)
            return
        self._num_assigned = self.stats.num_assigned = sum(map(len, welcome.assigned))
        self._note_resident(welcome.resident)
        self._measure_anew(now)

    def _next_trial(self, now: float) -> None:
        """Measure how fast it computes; then it is ready."""
        asked = self._trials.next(self.resident)
        if asked is None:
            self._join(now)
            return
        request_id = self.client.try_send(*asked)
        self._trial = {} if request_id is None else {request_id: monotonic()}

    def _trial_done(self, compute_s: float, now: float) -> None:
        (sent_at,) = self._trial.values()
        self._trial = {}
        if self._trials.done(compute_s):
            self.link.observe(self._trials.wire_bytes, now - sent_at - compute_s)
        self._next_trial(now)

    def _join(self, now: float) -> None:
        if (rate := self._trials.rate()) is not None:
            self._rates.seed(remote_cpu(self.number), rate, rate)
            self.link.settle()
            self._publish_link()
        old = self.health.state
        self.health.joined(now)
        self._pings.clear()
        self._trial.clear()
        self._news_at = now
        self.stats.joined += not self._is_check
        self._tell(old, "it is ready")

    def _note_resident(self, resident: list[list[int]]) -> None:
        for held, experts in zip(self.resident, resident, strict=False):
            held[:] = False
            held[[e for e in experts if 0 <= e < len(held)]] = True
        self._count_resident()

    def _count_resident(self) -> None:
        self.stats.num_resident = sum(int(held.sum()) for held in self.resident)

    # --------------------------------------------------------------------------------- changes

    def _refuse(self, error: ClusterError) -> None:
        """It holds something else, or serves another engine: asked no more."""
        if self.failure is None:
            _log.error("%s", error)
        self.failure = error

    def _fail(self, now: float, why: str) -> None:
        _log.warning("host %s does not keep to the protocol: %s", self.address.host_id, why)
        self._lose(now, why)

    def _lose(self, now: float, why: str) -> None:
        old = self.health.state
        self.health.lost(now)
        self._pings.clear()
        self._trial.clear()  # its answer would not make it ready
        for held in self.resident:
            held[:] = False
        self._count_resident()
        self._greeting = None
        self._tell(old, why)

    def _tell(self, old: HostState, why: str) -> None:
        if (new := self.health.state) is not old:
            _log.info("host %s: %s -> %s, %s", self.address.host_id, old.value, new.value, why)
            self._on_change(self.address.host_id, old, new, why)

    def snapshot(self) -> RemoteStats:
        return replace(
            self.stats,
            state=self.health.state.value,
            round_trip_us=1e6 * self.link.round_trip_s,
            bytes_per_s=1 / self.link.byte_s,
        )

    def close(self) -> None:
        self.client.close()
