"""Connections: who is let in, what becomes of those that say nothing, and how a client makes its own anew."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from time import monotonic

import pytest
from helpers.data_plane import receive
from helpers.hosts import TOKEN, new_address
from helpers.waiting import until

from moray.cluster import client as client_module
from moray.cluster import listener as listener_module
from moray.cluster.client import HostAddress, HostClient
from moray.cluster.connection import Connection
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.listener import Listener, ServerStats
from moray.cluster.messages import Ping
from moray.cluster.tls import client_context
from moray.cluster.wire import Wire
from moray.runtime.errors import HostLostError

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon

CLIENT, SERVER = KeyPair.make(), KeyPair.make()


def echo(wire: Wire) -> None:
    while True:
        header, buffer = wire.receive()
        if not wire.send(bytes(header), buffer):
            wire.wait_sent(30)


@contextmanager
def echoing(address: str = "tcp://127.0.0.1:0") -> Iterator[tuple[Listener, ServerStats]]:
    stats = ServerStats()
    admission = Admission(SERVER, [CLIENT.public]) if address.startswith("tcp") else None
    listener = Listener(address, admission, stats, echo)
    try:
        yield listener, stats
    finally:
        listener.close()


@contextmanager
def connected(listener: Listener) -> Iterator[Connection]:
    connection = Connection(listener.address, lambda: client_context(CLIENT.secret, SERVER.public))
    try:
        yield connection
    finally:
        connection.close()


def hello(connection: Connection) -> None:
    wire = connection.wait(30)
    assert wire is not None
    wire.send(b"hello")
    assert receive(wire)[0] == b"hello"


def where(listener: Listener) -> tuple[str, int]:
    host, _, port = listener.address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def test_who_says_nothing_is_closed_and_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_HANDSHAKE_S", 0.5)
    monkeypatch.setattr(listener_module, "_MOST_STRANGERS", 4)
    with echoing() as (listener, stats), connected(listener) as friend, ExitStack() as stack:
        hello(friend)
        silent = [stack.enter_context(socket.create_connection(where(listener), timeout=30)) for _ in range(12)]
        hello(friend)
        assert all(sock.recv(1) == b"" for sock in silent)  # eight at once, the others after half a second
        until(lambda: listener._strangers == 0)
        with connected(listener) as newcomer:
            hello(newcomer)
        hello(friend)
        assert (stats.connections, stats.admitted) == (14, 2)


def test_an_idle_connection_is_looked_after_on_both_sides() -> None:
    """A machine that is gone says nothing: the kernel asks whether it is there."""
    with echoing() as (listener, _), connected(listener) as friend:
        hello(friend)
        assert friend.wire is not None
        for sock, seconds in ((friend.wire._sock, 10), (next(iter(listener._open))._sock, 30)):
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * seconds


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_another_user_of_the_machine_is_not_heard() -> None:
    script = "import os, socket, sys; os.setuid(12345); s = socket.socket(socket.AF_UNIX)\n"
    script += "s.connect(chr(0) + sys.argv[1]); s.settimeout(30); print(s.recv(1))"
    address = new_address("private").address
    with echoing(address) as (listener, stats), closing(Connection(address, None)) as friend:
        hello(friend)
        command = [sys.executable, "-c", script, address.removeprefix("ipc://@")]
        assert subprocess.run(command, capture_output=True, check=True).stdout == b"b''\n"
        assert (stats.connections, stats.admitted) == (2, 1)
        hello(friend)
        assert len(listener._open) == 1


def test_a_connection_is_made_anew_and_nothing_waits_for_it() -> None:
    with echoing() as (listener, _), connected(listener) as friend:
        for _ in range(3):
            hello(friend)
            wire = friend.wire
            assert wire is not None
            next(iter(listener._open)).shut()
            with pytest.raises(ConnectionError):
                wire.receive()
            friend.lost(wire, "the test says so")
            assert friend.wire is None
        hello(friend)


def test_closing_does_not_wait_for_who_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        connection = Connection(address, lambda: client_context(CLIENT.secret, SERVER.public))
        assert select.select([mute], [], [], 30)[0]  # it shows its key, to nobody
        started = monotonic()
        connection.close()
        assert monotonic() - started < 1.0 and connection.wire is None


def test_why_there_is_no_connection_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
    client = HostClient(HostAddress("far", address, TOKEN, server_key=SERVER.public), "me", keys=CLIENT, timeout_s=0.3)
    with closing(client), pytest.raises(HostLostError, match=r"no connection to expert host far .*Connection refused"):
        client.send(Ping())
    with echoing() as (listener, _):
        address = listener.address
        wrong = HostAddress("far", address, TOKEN, server_key=KeyPair.make().public)
        client = HostClient(wrong, "me", keys=CLIENT, timeout_s=0.5)
        with closing(client), pytest.raises(HostLostError, match="CERTIFICATE_VERIFY_FAILED"):
            client.send(Ping())


def test_what_does_not_fit_is_sent_in_the_background_as_far_as_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, go_on = [], threading.Event()

    def slow(wire: Wire) -> None:
        go_on.wait(60)
        while True:
            taken.append(len(wire.receive()[1]))

    large, address = memoryview(bytes(8 << 20)), new_address("slow")
    monkeypatch.setattr(client_module, "_MOST_UNSENT_BYTES", 20 << 20)
    listener = Listener(address.address, None, ServerStats(), slow)
    with closing(listener), closing(HostClient(address, "me", timeout_s=0.3)) as client:
        client.send(Ping(), large)
        asked = 1
        while client.try_send(Ping(), large) is not None:
            asked += 1
        assert asked == 3
        with pytest.raises(HostLostError, match=r"expert host slow took nothing for 0\.3 s"):
            client.send(Ping(), large)
        go_on.set()
        until(lambda: len(taken) == asked)  # nobody called anything
        assert set(taken) == {len(large)} and client.try_send(Ping(), large) is not None
