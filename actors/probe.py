"""A node of a cluster, measured on itself, and the way to it: what ``moray plan`` asks of a cluster that runs."""

from __future__ import annotations

import secrets
from pathlib import Path

from moray.cluster.client import HostAddress, HostClient
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.server import DataPlaneServer
from moray.cluster.topology import LinkReport, NodeReport, measure_link, measure_node
from moray.runtime.errors import StoreError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.store.store import Store


class NodeProbe:
    """Measures its node, and listens as an expert host with one expert would: links are measured as they are used."""

    def __init__(self, name: str, address: str, store_path: str) -> None:
        """``address``: the node's own IP address."""
        self._name, self._address, self._path = name, address, Path(store_path)
        self._keys = KeyPair.make()

    def measure(self) -> NodeReport:
        """Raises StoreError."""
        try:
            return measure_node(self._path)
        except StoreError as error:
            raise StoreError(f"on node {self._name}: {error}") from error

    def listen(self, client_key: str) -> HostAddress:
        """Raises StoreError, ConfigError."""
        store, token = Store.open(self._path), secrets.token_hex(16)
        host = ShardHost(store, [min(store.manifest.shards)], 1)
        admission = Admission(self._keys, [client_key])
        self._server = DataPlaneServer(self._name, host, f"tcp://{self._address}:0", token, admission)
        return HostAddress(self._name, self._server.address, token, self._name, self._keys.public)

    def client_key(self) -> str:
        return self._keys.public

    def link_to(self, host: HostAddress) -> LinkReport:
        """Raises HostLostError."""
        client = HostClient(host, f"probe-{self._name}", keys=self._keys)
        try:
            client.greet()
            return measure_link(client)
        finally:
            client.close()
