"""Hello, needs, hints and releases: what a host does with them, and whom it refuses."""

from __future__ import annotations

import struct

import pytest
from helpers.data_plane import Peer, check_alive, connected, header
from helpers.hosts import TOKEN
from helpers.waiting import until

from moray.cluster.client import HelloRequiredError, HostAddress, HostClient
from moray.cluster.messages import Ask, Coming, Hint, Need, Release, Welcome
from moray.cluster.server import DataPlaneServer
from moray.runtime.errors import ProtocolError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.packed import LAYOUT_ID
from moray.runtime.store.manifest import NUMERICS_ID
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon


def test_a_host_says_what_it_holds(client: HostClient, host: ShardHost, demo: Store) -> None:
    welcome = client.greet()
    ref = host.arena.ref
    assert welcome == Welcome(
        host_id="host-7",
        store_fingerprint=demo.fingerprint,
        layout_id=LAYOUT_ID,
        numerics_id=NUMERICS_ID,
        arena_pid=ref.pid,
        arena_fd=ref.fd,
        arena_bytes=ref.num_bytes,
        holds_all=True,
        experts=(held := [[1, 3, 5], [0], [], [], [], []]),
        assigned=held,
        resident=held,
    )


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + " ", TOKEN[:-1], "ü"])
def test_a_wrong_token_is_refused_and_counted(server: DataPlaneServer, address: HostAddress, token: str) -> None:
    rejected = server.stats.rejected
    with connected(HostAddress("host-7", address.address, token), "intruder") as intruder:
        with pytest.raises(ProtocolError, match="host-7: the session token is wrong; this host serves another engine"):
            intruder.greet()
        with pytest.raises(ProtocolError):  # still nobody
            intruder.request(Ask(layer=0, experts=[3]))
    assert server.stats.rejected >= rejected + 2
    assert "intruder" not in server.stats.clients


def test_a_request_before_hello_is_refused_and_counted(server: DataPlaneServer, address: HostAddress) -> None:
    rejected = server.stats.rejected
    with connected(address, "hasty") as hasty:
        for kind in (Need, Ask, Hint, Release):
            with pytest.raises(HelloRequiredError, match="introduce yourself"):
                hasty.receive(hasty.send(kind(layer=0, experts=[3])))
        assert server.stats.rejected == rejected + 4 and "hasty" not in server.stats.clients
        assert hasty.request(Ask(layer=0, experts=[3]))[0] == Coming()  # introduces itself
        assert "hasty" in server.stats.clients


def test_a_client_that_comes_back_loses_its_old_claims(
    host: ShardHost, address: HostAddress, client: HostClient
) -> None:
    client.request(Ask(layer=0, experts=[3, 5]))
    assert host._manager._claims["tester"]
    with connected(address) as again:
        again.greet()
        assert "tester" not in host._manager._claims
        with pytest.raises(HelloRequiredError):  # the connection it had before is nobody's now
            client.receive(client.send(Ask(layer=0, experts=[3])))


# -------------------------------------------------------------------- need, ask, hint and release


def test_what_is_asked_for_is_coming(client: HostClient, host: ShardHost) -> None:
    assert client.request(Ask(layer=0, experts=[1, 3])) == (Coming(), b"")
    assert host._manager._claims["tester"] == {0, 1}
    assert client.request(Ask(layer=2, experts=[])) == (Coming(), b"")
    assert "tester" not in host._manager._claims


def test_a_need_a_release_and_a_hint_have_no_reply(
    client: HostClient, host: ShardHost, server: DataPlaneServer
) -> None:
    hints = server.stats.hints
    client.send(Need(layer=0, experts=[1, 3, 5]))
    client.send(Hint(layer=1, experts=[0]))
    client.send(Release(layer=0, experts=[3]))
    client.send(Release(layer=1, experts=[0]))  # was not claimed
    failed = client.send(Ask(layer=5, experts=[0]))
    with pytest.raises(ProtocolError):  # the next reply there is
        client.receive(failed)
    assert host._manager._claims["tester"] == {0, 2} and server.stats.hints == hints + 1


def test_uses_come_with_needs_and_hints(monkeypatch: pytest.MonkeyPatch, client: HostClient, host: ShardHost) -> None:
    told: list[list[int]] = []
    monkeypatch.setattr(host._manager._policy, "used", lambda experts: told.append(experts))
    client.send(Need(layer=0, experts=[5], uses=[[0, 3, 1], [1, 0]]))
    client.send(Hint(layer=0, experts=[], uses=[[0, 5]]))
    client.request(Ask(layer=0, experts=[]))
    assert told == [[1, 0], [3], [2]]


@pytest.mark.parametrize(
    ("layer", "expert"), [(0, 0), (1, 3), (3, 0), (6, 0), (-1, 0), (0, -1), (2**63, 0), (0, 2**64 - 1)]
)
def test_an_expert_that_lives_elsewhere_is_refused_and_counted(
    client: HostClient, server: DataPlaneServer, layer: int, expert: int
) -> None:
    rejected = server.stats.rejected
    kinds = (Need, Ask, Hint, Release)
    for kind in kinds:
        with pytest.raises(ProtocolError, match="does not live here"):
            client.receive(client.send(kind(layer=layer, experts=[expert])))
    for kind in (Need, Hint):
        with pytest.raises(ProtocolError, match="does not live here"):
            client.receive(client.send(kind(layer=0, experts=[3], uses=[[layer, expert]])))
    assert server.stats.rejected == rejected + len(kinds) + 2


def test_a_message_that_is_too_large_ends_the_connection_and_is_counted_once(
    server: DataPlaneServer, address: HostAddress
) -> None:
    """Also when two threads receive in turn, as they do since something was needed."""
    peer, rejected = Peer(address), server.stats.rejected
    peer.greet()
    peer.send([header("Need")])
    check_alive(peer)
    peer.wire._sock.sendall(struct.pack("<II", 1 << 30, 0))
    with pytest.raises(ConnectionError):
        peer.receive()
    until(lambda: server.stats.rejected == rejected + 1 and "peer" not in server._known)
    assert server.stats.rejected == rejected + 1
    peer.close()
