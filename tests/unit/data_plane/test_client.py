"""The client: its patience, requests under way, a host that goes and comes back."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import numpy as np
import pytest
from helpers.data_plane import HIDDEN, connected, rows, wire
from helpers.hosts import new_address, serving, watching
from helpers.waiting import until

from moray.cluster.client import HostClient
from moray.cluster.listener import Listener, ServerStats
from moray.cluster.messages import Ask, Coming, Compute, Computed, Refused, encode
from moray.cluster.server import DataPlaneServer
from moray.cluster.wire import Wire
from moray.runtime.errors import CorruptShardError, HostLostError, ProtocolError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon


class QuietHost:
    """Listens, and answers the first request with headers somebody prepared."""

    def __init__(self, *answers: bytes) -> None:
        self.address = new_address("quiet")
        self._answers = answers
        self._stop = threading.Event()
        self._listener = Listener(self.address.address, None, ServerStats(), self._serve)

    def __enter__(self) -> QuietHost:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._listener.close()

    def _serve(self, wire: Wire) -> None:
        wire.receive()
        for answer in self._answers:
            wire.send(answer)
        self._stop.wait(60)


def test_a_silent_host_is_lost_after_the_deadline() -> None:
    lost = pytest.raises(HostLostError, match=r"expert host quiet did not answer within 0\.05 s")
    with QuietHost() as host, connected(host.address, timeout_s=0.05) as client, lost:
        client.greet()


def test_a_host_that_does_not_exist_is_lost_after_the_deadline() -> None:
    with connected(new_address("nobody"), timeout_s=0.05) as client, pytest.raises(HostLostError, match="nobody"):
        client.request(Ask(layer=0, experts=[0]))


def test_replies_to_older_requests_are_skipped() -> None:
    old, new = Computed(compute_s=0.5), Coming()
    with QuietHost(encode(0, old), encode(7, old), encode(1, new)) as host, connected(host.address) as client:
        assert client.receive(client.send(Ask(layer=0, experts=[0]))) == (new, b"")


def test_only_replies_to_older_requests_are_no_reply() -> None:
    old = Coming()
    lost = pytest.raises(HostLostError)
    with QuietHost(encode(0, old)) as host, connected(host.address, timeout_s=0.05) as client, lost:
        client.receive(client.send(Ask(layer=0, experts=[0])))


def test_a_host_that_speaks_nonsense_is_a_protocol_error() -> None:
    with QuietHost(b"\xc1") as host, connected(host.address) as client, pytest.raises(ProtocolError, match="Pack data"):
        client.greet()


def test_a_host_that_answers_hello_with_something_else_is_a_protocol_error() -> None:
    refused = pytest.raises(ProtocolError, match="host quiet answered Hello with Computed")
    with QuietHost(encode(1, Computed(compute_s=0.1))) as host, connected(host.address) as client, refused:
        client.greet()


def test_a_shard_the_host_could_not_read_is_a_corrupt_shard() -> None:
    answer = encode(1, Refused(reason="shard", message="checksum"))
    refused = pytest.raises(CorruptShardError, match="expert host quiet: checksum")
    with QuietHost(answer) as host, connected(host.address) as client, refused:
        client.receive(client.send(Ask(layer=0, experts=[0])))


def test_several_requests_may_be_under_way(client: HostClient, demo: Store) -> None:
    asks = [client.send(Ask(layer=0, experts=[expert])) for expert in (3, 5)]
    request = Compute(layer=0, experts=[3], counts=[2], num_rows=2, numerics="int8")
    compute = client.send(request, wire(demo, "int8").encode(rows(2), np.arange(2)).data)
    assert [client.receive(request_id)[0] for request_id in asks] == [Coming(), Coming()]
    reply, buffer = client.receive(compute)
    assert isinstance(reply, Computed) and len(buffer) == 8 * HIDDEN


def test_a_client_works_on_after_its_host_was_restarted(host: ShardHost) -> None:
    address = new_address("phoenix")
    with connected(address) as client, ExitStack() as stack:
        with serving(address, host):
            assert client.request(Ask(layer=0, experts=[3]))[0] == Coming()
            wait = stack.enter_context(watching(client))
        with serving(address, host) as restarted:
            wait()
            assert client.request(Ask(layer=0, experts=[3]))[0] == Coming()
            assert restarted.stats.clients == {"tester"}


def test_a_server_can_be_closed_while_clients_are_connected(host: ShardHost) -> None:
    address = new_address("short")
    with serving(address, host), connected(address) as client:
        client.greet()
    before = set(threading.enumerate())

    def new() -> list[str]:
        return sorted(thread.name for thread in set(threading.enumerate()) - before)

    with serving(address, host):
        assert new() == ["moray-listener"]
        with connected(address) as client:
            client.greet()
            assert new() == ["moray-connection", "moray-data-plane", "moray-listener"]
    until(lambda: not new())


def test_what_a_host_cannot_do_is_told_to_its_client_alone(
    monkeypatch: pytest.MonkeyPatch, client: HostClient, host: ShardHost, server: DataPlaneServer
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("no room")

    rejected = server.stats.rejected
    with monkeypatch.context() as patched:
        patched.setattr(host, "need", fail)
        with pytest.raises(ProtocolError, match="host-7: MemoryError: no room"):
            client.request(Ask(layer=0, experts=[3]))
    assert server.stats.rejected == rejected + 1
    assert client.request(Ask(layer=0, experts=[3]))[0] == Coming()
