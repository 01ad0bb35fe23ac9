"""The compute process's end of the data plane: one connection to one host."""

from __future__ import annotations

import select
from dataclasses import dataclass
from time import monotonic, sleep

from moray.cluster.connection import Connection
from moray.cluster.keys import KeyPair
from moray.cluster.messages import Hello, Message, Refused, Welcome, decode, encode
from moray.cluster.stream import NOTHING
from moray.cluster.tls import client_context
from moray.cluster.wire import Frames, is_local
from moray.runtime.errors import ConfigError, CorruptShardError, HostLostError, ProtocolError

_ATTEMPT_S = 1.0  # before a message is taken for lost
_MOST_UNSENT_BYTES = 64 << 20  # of what a host does not take
_FULL_S = 0.005  # between looks whether it has taken some


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a host listens, and the token its peers must show. Treat as a secret."""

    host_id: str
    address: str  # ipc://... or tcp://...
    token: str
    node: str = ""  # which machine it is on
    server_key: str = ""  # its public key; empty: no TLS, ipc:// only


class HostClient:
    """Sends requests and matches replies. Used by one thread at a time."""

    def __init__(self, host: HostAddress, client: str, *, keys: KeyPair | None = None, timeout_s: float = 30.0) -> None:
        """``keys``: this process's, for a host that has some. Raises ConfigError for tcp:// without keys."""
        if not is_local(host.address) and (keys is None or not host.server_key):
            raise ConfigError(f"host {host.host_id} at {host.address} has no keys; only ipc:// goes without")
        self.host = host
        self.name, self._timeout_s = client, timeout_s
        self._next_id = 0
        secret = keys.secret if keys is not None and host.server_key else None
        make_context = None if secret is None else lambda: client_context(secret, host.server_key)
        self._connection = Connection(host.address, make_context)

    def greet(self) -> Welcome:
        """Introduce this process; again after the host was restarted."""
        reply = self.insist(Hello(client=self.name, token=self.host.token))
        if not isinstance(reply, Welcome):
            raise ProtocolError(f"host {self.host.host_id} answered Hello with {type(reply).__name__}")
        return reply

    @property
    def is_connected(self) -> bool:
        return self._connection.wire is not None

    def watch(self, poll: select.poll) -> None:
        """Have this polled beside others, until something comes. What is here already must have been taken."""
        if (wire := self._connection.wire) is not None:
            poll.register(wire, select.POLLIN)

    def poll(self, timeout_s: float) -> bool:
        """Until something comes, likewise. Whether it did."""
        wire = self._connection.wire
        return wire is not None and wire.wait(1000 * timeout_s)

    def send(self, message: Message, buffer: memoryview = NOTHING) -> int:
        """Send without waiting for a reply, so that all hosts work at once. Returns the id to ``receive``.

        Raises HostLostError if there is no connection for ``timeout_s``, or the host takes nothing for so long.
        """
        deadline = monotonic() + self._timeout_s
        while self._connection.wait(max(0.0, deadline - monotonic())) is not None:
            if (request_id := self.try_send(message, buffer)) is not None:
                return request_id
            if monotonic() > deadline:
                raise HostLostError(f"expert host {self.host.host_id} took nothing for {self._timeout_s:g} s")
            sleep(_FULL_S)
        raise HostLostError(
            f"there is no connection to expert host {self.host.host_id} at {self.host.address}"
            + f" ({self._connection.why})" * bool(self._connection.why)
        )

    def try_send(self, message: Message, buffer: memoryview = NOTHING) -> int | None:
        """``send``, or None if there is no connection now, or the host takes nothing."""
        wire = self._connection.wire
        if wire is None or wire.unsent_bytes > _MOST_UNSENT_BYTES:
            return None
        self._next_id += 1
        try:
            if not wire.send(encode(self._next_id, message), buffer):
                self._connection.flush_later()
        except ConnectionError as error:
            self._connection.lost(wire, str(error))
            return None
        return self._next_id

    def try_receive(self) -> tuple[int, Message, memoryview] | None:
        """The next reply, whatever it answers, or None if there is none yet. Raises ProtocolError."""
        frames = self._try_frames()
        return None if frames is None else (*decode(frames[0]), frames[1])

    def _try_frames(self) -> Frames | None:
        wire = self._connection.wire
        if wire is None:
            return None
        try:
            return wire.try_receive()
        except (ConnectionError, ProtocolError) as error:
            self._connection.lost(wire, str(error))
            if isinstance(error, ProtocolError):
                raise
            return None

    def receive(self, request_id: int, timeout_s: float | None = None) -> tuple[Message, memoryview]:
        """The reply to a request, and its buffer; replies to older, abandoned requests are skipped.

        Raises HostLostError after the deadline, or when the connection ends, since then no reply will come;
        CorruptShardError or ProtocolError if the host refused.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = monotonic() + timeout_s
        while True:
            reply = self.try_receive()
            if reply is None:
                left_s = deadline - monotonic()
                if left_s <= 0 or not self.is_connected:
                    raise self._silent(timeout_s)
                self.poll(left_s)
            elif reply[0] == request_id:
                if isinstance(reply[1], Refused):
                    raise refusal(self.host.host_id, reply[1])
                return reply[1:]

    def request(self, message: Message, buffer: memoryview = NOTHING) -> tuple[Message, memoryview]:
        """Send and receive, introducing this process again if the host was restarted meanwhile."""
        try:
            return self.receive(self.send(message, buffer))
        except HelloRequiredError:
            self.greet()
            return self.receive(self.send(message, buffer))

    def insist(self, message: Message) -> Message:
        """``request`` for what may be asked twice: sent again while a host that died is being restarted."""
        deadline = monotonic() + self._timeout_s
        while True:
            try:
                return self.receive(self.send(message), min(_ATTEMPT_S, self._timeout_s))[0]
            except HelloRequiredError:
                self.send(Hello(client=self.name, token=self.host.token))
            except HostLostError:
                if monotonic() > deadline:
                    raise self._silent(self._timeout_s) from None

    def _silent(self, timeout_s: float) -> HostLostError:
        why = "" if self.is_connected else f" ({self._connection.why or 'no connection'})"
        return HostLostError(
            f"expert host {self.host.host_id} did not answer within {timeout_s:g} s{why}; "
            "its process may have died: see `ray list actors`, then start the engine again"
        )

    def close(self) -> None:
        self._connection.close()


class HelloRequiredError(ProtocolError):
    """The host does not know this client: it was restarted."""


def refusal(host_id: str, refused: Refused) -> Exception:
    """What a host's refusal is raised as."""
    text = f"expert host {host_id}: {refused.message}"
    if refused.reason == "hello":
        return HelloRequiredError(text)
    return CorruptShardError(text) if refused.reason == "shard" else ProtocolError(text)
