"""A host's tcp:// socket against whoever can reach it: no crash, no hang, no effect, everything counted."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

import numpy as np
import pytest
from helpers.data_plane import send
from helpers.hosts import TOKEN, make_host
from helpers.waiting import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.cluster import server as server_module
from moray.cluster.client import HostAddress, HostClient
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.messages import Ask, Ping, Pong, encode
from moray.cluster.server import DataPlaneServer
from moray.cluster.wire import Wire
from moray.runtime.errors import ConfigError, HostLostError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(200)

CLIENT, SERVER = KeyPair.make(), KeyPair.make()
MOST_BYTES = 1 << 20
_numbers = count()
GREETING = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(32)  # of TLS: how a ClientHello begins


@pytest.fixture(scope="module")
def server(demo: Store) -> Iterator[DataPlaneServer]:
    host = make_host(demo, [ExpertKey(0, 3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "MAX_BUFFER_BYTES", MOST_BYTES)
        made = DataPlaneServer("far", host, "tcp://127.0.0.1:0", TOKEN, Admission(SERVER, [CLIENT.public]))
        yield made
        made.close()
    host.close()


@contextmanager
def connected(server: DataPlaneServer, keys: KeyPair = CLIENT, **changes: str) -> Iterator[HostClient]:
    fields = {"address": server.address, "token": TOKEN, "server_key": SERVER.public} | changes
    made = HostClient(HostAddress("far", **fields), f"tester-{next(_numbers)}", keys=keys, timeout_s=30.0)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def friend(server: DataPlaneServer) -> Iterator[HostClient]:
    with connected(server) as made:
        made.greet()
        yield made


def wire_of(client: HostClient) -> Wire:
    wire = client._connection.wire
    assert wire is not None
    return wire


def raw(server: DataPlaneServer) -> socket.socket:
    host, _, port = server.address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def until_counted(server: DataPlaneServer, connections: int) -> None:
    until(lambda: server.stats.connections >= connections)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.booleans(), st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=5), st.booleans())
def test_bytes_from_anybody_have_no_effect(
    server: DataPlaneServer, friend: HostClient, is_greeted: bool, pieces: list[bytes], is_closed: bool
) -> None:
    before, admitted, requests = server.stats.connections, server.stats.admitted, server.stats.requests
    peer = raw(server)
    try:
        for piece in [GREETING] * is_greeted + pieces:
            peer.sendall(piece)
    except OSError:
        pass  # the server hung up already
    if is_closed:
        peer.close()
    assert friend.request(Ping())[0] == Pong()
    peer.close()
    until_counted(server, before + 1)
    assert server.stats.admitted == admitted and server.stats.requests == requests + 1


def test_unknown_clients_and_wrong_server_keys_are_not_heard(server: DataPlaneServer, friend: HostClient) -> None:
    refused, admitted = server.stats.clients_refused, server.stats.admitted
    requests = server.stats.requests
    for keys, changes in ((KeyPair.make(), {}), (CLIENT, {"server_key": KeyPair.make().public})):
        made = HostClient(
            HostAddress("far", server.address, TOKEN, **({"server_key": SERVER.public} | changes)), "intruder",
            keys=keys, timeout_s=0.5,
        )  # fmt: skip
        with pytest.raises(HostLostError):
            made.greet()
        made.close()
    assert server.stats.clients_refused > refused
    assert (server.stats.admitted, server.stats.requests) == (admitted, requests)
    newcomer = KeyPair.make()
    assert server._listener._admission is not None
    server._listener._admission.allow(newcomer.public)  # may be told later
    with connected(server, newcomer) as client:
        client.greet()


class Recorder(threading.Thread):
    """Passes one connection on to a server, and keeps what the client sent."""

    def __init__(self, server: DataPlaneServer) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._server, self.sent = server, bytearray()

    def run(self) -> None:
        near, _ = self._listener.accept()
        far = raw(self._server)
        threading.Thread(target=self._pump, args=(far, near, None), daemon=True).start()
        self._pump(near, far, self.sent)
        near.close()
        far.close()
        self._listener.close()

    def _pump(self, source: socket.socket, sink: socket.socket, kept: bytearray | None) -> None:
        try:
            while data := source.recv(65536):
                if kept is not None:
                    kept += data
                sink.sendall(data)
        except OSError:
            return


def test_a_recorded_connection_cannot_be_played_again(server: DataPlaneServer, friend: HostClient) -> None:
    recorder = Recorder(server)
    recorder.start()
    with connected(server, address=recorder.address) as client:
        client.greet()
        assert client.request(Ping())[0] == Pong()
    recorder.join(60)
    assert TOKEN.encode() not in recorder.sent and b"Hello" not in recorder.sent  # encrypted
    requests, admitted, before = server.stats.requests, server.stats.admitted, server.stats.connections
    for _ in range(5):
        peer = raw(server)
        peer.sendall(recorder.sent)
        peer.close()
    until_counted(server, before + 5)
    assert (server.stats.requests, server.stats.admitted) == (requests, admitted)
    assert friend.request(Ping())[0] == Pong()
    assert (server.stats.requests, server.stats.admitted) == (requests + 1, admitted)


def test_a_client_that_is_known_may_send_what_it_likes(server: DataPlaneServer, friend: HostClient) -> None:
    rng, before, rejected = np.random.default_rng(0), server.stats.requests, server.stats.rejected
    with connected(server) as client:
        client.greet()
        good = encode(2**40, Ask(layer=0, experts=[3]))
        for i in range(3000):
            header, *parts = [rng.bytes(rng.integers(0, 60)) for _ in range(rng.integers(1, 4))]
            if i % 3 == 0:  # nearly right
                broken = bytearray(good)
                broken[rng.integers(len(good))] ^= 1 << rng.integers(8)
                header = bytes(broken)
            send(wire_of(client), header, *parts)
            if i % 100 == 0:
                assert client.request(Ping())[0] == Pong()
        assert client.request(Ping())[0] == Pong()
    assert server.stats.requests == before + 1 + 3000 + 31
    assert server.stats.rejected - rejected > 2500
    assert friend.request(Ping())[0] == Pong()


def test_what_is_too_large_ends_the_connection_that_sent_it(server: DataPlaneServer, friend: HostClient) -> None:
    with connected(server) as client:
        client.greet()
        requests, rejected = server.stats.requests, server.stats.rejected
        wire = wire_of(client)
        with suppress(ConnectionError):  # it may hang up before all is sent
            wire.send(encode(1, Ping()), memoryview(bytes(MOST_BYTES + 1)))
        until(lambda: server.stats.rejected == rejected + 1)
        assert friend.request(Ping())[0] == Pong()
        assert server.stats.requests == requests + 1  # the large one was never seen
        assert client.insist(Ping()) == Pong() and wire_of(client) is not wire  # it connects anew
    with pytest.raises(ConfigError, match="cannot listen at tcp"):
        DataPlaneServer("far", server._host, "tcp://192.0.2.1:9", TOKEN, Admission(SERVER))
    with pytest.raises(ConfigError, match="needs keys"):
        DataPlaneServer("far", server._host, "tcp://127.0.0.1:0", TOKEN)
