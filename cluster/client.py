"""The compute process's end of the data plane: one connection to one host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import zmq

from moray.cluster.keys import CurveKeys
from moray.cluster.messages import MAX_MESSAGE_BYTES, Hello, Message, Refused, Welcome, decode, encode
from moray.runtime.errors import ConfigError, CorruptShardError, HostLostError, ProtocolError

# A connection that died is noticed and made again, and nothing is queued for one that is not there.
_TCP_OPTIONS = (
    (zmq.IMMEDIATE, 1),
    (zmq.HEARTBEAT_IVL, 1000),
    (zmq.HEARTBEAT_TIMEOUT, 3000),
    (zmq.CONNECT_TIMEOUT, 2000),
    (zmq.RECONNECT_IVL, 100),
    (zmq.RECONNECT_IVL_MAX, 1000),
)
_ATTEMPT_S = 1.0  # before a message is taken for lost


def copies(buffers: Sequence[memoryview]) -> bool:
    """Whether to copy what is sent: for a token's activations that costs less than to keep track of the memory."""
    return sum(buffer.nbytes for buffer in buffers) < zmq.COPY_THRESHOLD


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a host listens, and the token its peers must show. Treat as a secret."""

    host_id: str
    address: str  # ipc://... or tcp://...
    token: str
    node: str = ""  # which machine it is on
    server_key: str = ""  # its CURVE public key in Z85; empty: no CURVE, ipc:// only


class HostClient:
    """Sends requests and matches replies. Used by one thread at a time."""

    def __init__(
        self, host: HostAddress, client: str, *, curve: CurveKeys | None = None, timeout_s: float = 30.0
    ) -> None:
        """``curve``: this process's keys, for a host that has one. Raises ConfigError for tcp:// without keys."""
        if not host.address.startswith("ipc://") and (curve is None or not host.server_key):
            raise ConfigError(f"host {host.host_id} at {host.address} has no CURVE keys; only ipc:// goes without")
        self.host = host
        self.name, self._timeout_s = client, timeout_s
        self._next_id = 0
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        if curve is not None and host.server_key:
            self._socket.curve_serverkey = host.server_key.encode()
            self._socket.curve_publickey, self._socket.curve_secretkey = curve.public.encode(), curve.secret.encode()
            for option, value in _TCP_OPTIONS:
                self._socket.setsockopt(option, value)
            self._socket.setsockopt(zmq.SNDTIMEO, int(1000 * timeout_s))
        self._socket.connect(host.address)

    def greet(self) -> Welcome:
        """Introduce this process; again after the host was restarted."""
        reply = self.insist(Hello(client=self.name, token=self.host.token))
        if not isinstance(reply, Welcome):
            raise ProtocolError(f"host {self.host.host_id} answered Hello with {type(reply).__name__}")
        return reply

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """To be polled beside others."""
        return self._socket

    def send(self, message: Message, *buffers: memoryview) -> int:
        """Send without waiting for a reply, so that all hosts work at once. Returns the id to ``receive``.

        Raises HostLostError if there is no connection for ``timeout_s``.
        """
        request_id = self._send(message, buffers, 0)
        if request_id is None:
            raise HostLostError(f"there is no connection to expert host {self.host.host_id} at {self.host.address}")
        return request_id

    def try_send(self, message: Message, *buffers: memoryview) -> int | None:
        """``send``, or None if there is no connection now."""
        return self._send(message, buffers, zmq.NOBLOCK)

    def _send(self, message: Message, buffers: Sequence[memoryview], flags: int) -> int | None:
        self._next_id += 1
        try:
            self._socket.send_multipart([encode(self._next_id, message), *buffers], flags, copy=copies(buffers))
        except zmq.Again:
            return None
        return self._next_id

    def try_receive(self) -> tuple[int, Message, list[bytes]] | None:
        """The next reply, whatever it answers, or None if there is none yet. Raises ProtocolError."""
        try:
            header, *buffers = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return *decode(header), buffers

    def receive(self, request_id: int, timeout_s: float | None = None) -> tuple[Message, list[bytes]]:
        """The reply to a request, and its buffers; replies to older, abandoned requests are skipped.

        Raises HostLostError after the deadline, CorruptShardError or ProtocolError if the host refused.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = monotonic() + timeout_s
        while self._socket.poll(max(0, int(1000 * (deadline - monotonic())))):
            header, *buffers = self._socket.recv_multipart()
            answered, message = decode(header)
            if answered != request_id:
                continue
            if isinstance(message, Refused):
                raise refusal(self.host.host_id, message)
            return message, buffers
        raise self._silent(timeout_s)

    def request(self, message: Message, *buffers: memoryview) -> tuple[Message, list[bytes]]:
        """Send and receive, introducing this process again if the host was restarted meanwhile."""
        try:
            return self.receive(self.send(message, *buffers))
        except HelloRequiredError:
            self.greet()
            return self.receive(self.send(message, *buffers))

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
        return HostLostError(
            f"expert host {self.host.host_id} did not answer within {timeout_s:g} s; "
            "its process may have died: see `ray list actors`, then start the engine again"
        )

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


class HelloRequiredError(ProtocolError):
    """The host does not know this client: it was restarted."""


def refusal(host_id: str, refused: Refused) -> Exception:
    """What a host's refusal is raised as."""
    text = f"expert host {host_id}: {refused.message}"
    if refused.reason == "hello":
        return HelloRequiredError(text)
    return CorruptShardError(text) if refused.reason == "shard" else ProtocolError(text)
