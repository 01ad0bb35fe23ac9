"""One host of a few experts, its server, and who asks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.data_plane import KEYS, Peer, connected
from helpers.hosts import make_host, new_address, serving

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.server import DataPlaneServer
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.store.store import Store


@pytest.fixture(scope="module")
def host(demo: Store) -> Iterator[ShardHost]:
    made = make_host(demo, KEYS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def address() -> HostAddress:
    return new_address("host-7")


@pytest.fixture(scope="module")
def server(host: ShardHost, address: HostAddress) -> Iterator[DataPlaneServer]:
    with serving(address, host) as made:
        yield made


@pytest.fixture
def client(server: DataPlaneServer, address: HostAddress) -> Iterator[HostClient]:
    with connected(address) as made:
        made.greet()
        yield made


@pytest.fixture(scope="module")
def stranger(server: DataPlaneServer, address: HostAddress) -> Iterator[Peer]:
    """A peer that has not said Hello."""
    peer = Peer(address)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def friend(server: DataPlaneServer, address: HostAddress) -> Iterator[Peer]:
    """A peer that knows the token."""
    peer = Peer(address)
    peer.greet()
    yield peer
    peer.close()
