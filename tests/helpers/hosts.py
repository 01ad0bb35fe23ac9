"""Expert hosts in threads of this process, reached over the real data plane."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from helpers.waiting import until

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.placement import place_evenly
from moray.cluster.server import DataPlaneServer
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

TOKEN = "the session's token"
_numbers = count()


def new_address(host_id: str) -> HostAddress:
    """An abstract socket of this test's own."""
    return HostAddress(host_id, f"ipc://@moray-test-{os.getpid()}-{next(_numbers)}", TOKEN)


def make_host(store: Store, keys: Sequence[ExpertKey], num_threads: int = 2, **options: Any) -> ShardHost:
    """A host that has loaded what its arena holds."""
    host = ShardHost(store, keys, num_threads, **options)
    assert host.wait_filled(60)
    return host


@contextmanager
def serving(address: HostAddress, host: ShardHost) -> Iterator[DataPlaneServer]:
    server = DataPlaneServer(address.host_id, host, address.address, address.token)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def cluster_of(store: Store, num_hosts: int, **options: Any) -> Iterator[list[tuple[HostAddress, ShardHost]]]:
    """All of a store's experts on so many hosts, as an engine places them. ``options``: of each ShardHost."""
    names = [f"host-{index}" for index in range(num_hosts)]
    placement = place_evenly(store.manifest, names)
    hosts = [(new_address(name), make_host(store, keys, **options)) for name, keys in placement.items()]
    servers = [DataPlaneServer(a.host_id, host, a.address, a.token) for a, host in hosts]
    try:
        yield hosts
    finally:
        for server in servers:
            server.close()
        for _, host in hosts:
            host.close()


@contextmanager
def watching(client: HostClient) -> Iterator[Callable[[], object]]:
    """Yields what waits until the client is connected anew: a request sent before might go to the old server."""
    old = client._connection.wire

    def wait() -> None:
        until(lambda: client._try_frames() is None and client._connection.wire not in (None, old))

    yield wait
