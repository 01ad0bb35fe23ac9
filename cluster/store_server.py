"""Serving a store to who copies it: a host that has no experts of its own, behind keys that both sides have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from moray.cluster.client import HostAddress
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.server import DataPlaneServer
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.store.store import Store


def store_address(address: str, keys: KeyPair) -> HostAddress:
    """How to reach a store that is served at ``address`` (HOST:PORT) by who has the same keys."""
    token = hashlib.blake2b(keys.secret.encode(), person=b"store serve").hexdigest()
    return HostAddress(address, f"tcp://{address}", token, server_key=keys.public)


@contextmanager
def serving_store(store: Store, address: str, keys: KeyPair) -> Iterator[DataPlaneServer]:
    """Serve at ``address`` (HOST:PORT; port 0: a free one). Raises ConfigError if the address cannot be used."""
    host = ShardHost(store, [], 1)
    try:
        where = store_address(address, keys)
        server = DataPlaneServer(where.host_id, host, where.address, where.token, Admission(keys, [keys.public]))
        try:
            yield server
        finally:
            server.close()
    finally:
        host.close()
