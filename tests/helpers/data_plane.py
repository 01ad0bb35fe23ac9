"""Both ends of the data plane, for tests of what goes between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import zmq

from moray.cluster.activations import WireFormat
from moray.cluster.client import HostAddress, HostClient
from moray.cluster.messages import PROTOCOL_VERSION, Ask, Hello, Message, Welcome, decode, encode
from moray.runtime.arrays import Floats
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

KEYS = [ExpertKey(0, 1), ExpertKey(0, 3), ExpertKey(0, 5), ExpertKey(1, 0)]  # that the host has
HIDDEN = 256  # of the demonstration model
ROW = 4 + HIDDEN + 4 * HIDDEN // 64  # bytes of one pair with a row of its own, in class int8


@contextmanager
def connected(address: HostAddress, name: str = "tester", timeout_s: float = 30.0) -> Iterator[HostClient]:
    made = HostClient(address, name, timeout_s=timeout_s)
    try:
        yield made
    finally:
        made.close()


class Peer:
    """Speaks ZeroMQ, but says what it likes."""

    def __init__(self, address: HostAddress) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self._socket.connect(address.address)
        self._token = address.token

    def greet(self) -> None:
        assert isinstance(self.ask([encode(1, Hello(client="peer", token=self._token))])[1], Welcome)

    def send(self, frames: Sequence[bytes]) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> tuple[int, Message]:
        return decode(self._socket.recv_multipart()[0])

    def ask(self, frames: Sequence[bytes]) -> tuple[int, Message]:
        self.send(frames)
        return self.receive()

    def replies_until(self, request_id: int) -> list[Message]:
        """Replies that came before the one to a request, which is not returned."""
        replies = []
        while (reply := self.receive())[0] != request_id:
            replies.append(reply[1])
        return replies

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


def wire(store: Store, numerics: Any) -> WireFormat:
    return WireFormat.of(store.manifest.layers[0].layout["gate_up_proj"].spec, numerics)


def rows(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, HIDDEN)).astype(np.float32)


def header(
    kind: object = "Need", fields: object = None, request_id: object = 5, version: object = PROTOCOL_VERSION
) -> bytes:
    fields = {"layer": 0, "experts": [3]} if fields is None else fields
    packed: bytes = msgpack.Packer().pack([version, request_id, kind, fields])
    return packed


def check_alive(peer: Peer, request_id: int = 99) -> None:
    peer.send([encode(request_id, Ask(layer=0, experts=[3]))])
    peer.replies_until(request_id)
