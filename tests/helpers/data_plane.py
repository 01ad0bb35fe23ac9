"""Both ends of the data plane, for tests of what goes between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np

from moray.cluster.activations import WireFormat
from moray.cluster.client import HostAddress, HostClient
from moray.cluster.messages import PROTOCOL_VERSION, Ask, Hello, Message, Welcome, decode, encode
from moray.cluster.wire import Frames, Wire, new_socket
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


def dial(address: HostAddress) -> Wire:
    """A connection to an address of this machine alone."""
    sock, where = new_socket(address.address)
    sock.connect(where)
    return Wire(sock)


def send(wire: Wire, header: bytes, *parts: bytes) -> None:
    buffer = b"".join(parts)
    if not wire.send(header, memoryview(buffer)):
        wire.wait_sent(30)


def receive(wire: Wire) -> Frames:
    while (frames := wire.try_receive()) is None:
        assert wire.wait(30_000)
    return frames


class Peer:
    """Speaks in messages, but says what it likes."""

    def __init__(self, address: HostAddress) -> None:
        self.wire = dial(address)
        self._token = address.token

    def greet(self) -> None:
        assert isinstance(self.ask([encode(1, Hello(client="peer", token=self._token))])[1], Welcome)

    def send(self, frames: Sequence[bytes]) -> None:
        """A header, and what is put together to its buffer."""
        send(self.wire, *frames)

    def receive(self) -> tuple[int, Message]:
        return decode(receive(self.wire)[0])

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
        self.wire.close()


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
