"""The expert host: a shell around ``ShardHost`` and its data-plane server."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter

from moray.actors.guard import exit_with
from moray.actors.messages import HostConfig, HostReport
from moray.cluster.server import DataPlaneServer
from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.errors import HostLostError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.kernels.setup import set_num_threads
from moray.runtime.store.store import Store


class ExpertHost:
    """Loads its experts when it is made; serves them over the data plane until its process ends."""

    def __init__(
        self, config: HostConfig, node_id: Callable[[], str], survivor: Callable[[str], ArenaRef | None]
    ) -> None:
        """``survivor`` tells who still holds the arena of a host that was restarted."""
        started = perf_counter()
        exit_with(config.owner_pid)
        set_num_threads(config.num_threads)
        host_id = config.address.host_id
        self._store = Store.open(config.store_path)
        self._host = ShardHost(self._store, config.keys, _take_back(survivor(host_id)))
        self._host.load()
        self._server = DataPlaneServer(host_id, self._host, config.address.address, config.address.token)
        self._report = HostReport(
            host_id=host_id,
            node_id=node_id(),
            pid=os.getpid(),
            num_experts=len(config.keys),
            arena=self._host.arena.ref,
            loaded_bytes=self._host.loaded_bytes,
            load_s=perf_counter() - started,
        )

    def report(self) -> HostReport:
        """Answers once the host is ready."""
        return self._report

    def close(self) -> None:
        self._server.close()
        self._host.close()
        self._store.close()


def _take_back(ref: ArenaRef | None) -> Arena | None:
    if ref is None:
        return None
    try:
        return Arena.attach(ref, writable=True)
    except HostLostError:
        return None  # the survivor is gone too: load from disk
