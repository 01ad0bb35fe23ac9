"""Experts of a cluster: this node's in its hosts' arenas, in place, and those that other nodes compute.

An expert in memory here is computed here; else on a host that has it in memory; else it is loaded from this node's
disk. Where more than one way is open, the cost model decides (runtime/lanes).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import numpy as np

from moray.cluster.arena_source import ArenaSource
from moray.cluster.client import HostAddress
from moray.cluster.keys import KeyPair
from moray.cluster.remote import RemoteCall, RemoteLanes
from moray.cluster.remote_host import OnChange, RemoteStats
from moray.cluster.residency import Place, Residency
from moray.runtime.arena import Arena, ArenaRef
from moray.runtime.arrays import Bools, Floats, Ints
from moray.runtime.errors import ConfigError
from moray.runtime.events import Event
from moray.runtime.experts.source import Fetch, LeaseTable, SourceInfo, SourceStats
from moray.runtime.kernels.gates import Gate
from moray.runtime.kernels.ops import Grouping
from moray.runtime.lanes.lane import Lane
from moray.runtime.layout.packed import Numerics
from moray.runtime.store.store import Store

FORCED: dict[str, Lane | None] = {"auto": None, "local": Lane.HOST_CPU, "remote": Lane.REMOTE_COMPUTE}
_JOIN_S = 30.0
_log = logging.getLogger(__name__)


class ClusterSource:
    """The experts of all nodes. ``join``, ``leave`` and ``remote_stats`` may be called from any thread."""

    def __init__(
        self,
        store: Store,
        local: Sequence[HostAddress],
        remote: Sequence[HostAddress],
        keys: KeyPair | None,
        *,
        numerics: Numerics = "int8",
        lanes: str = "auto",
        whole_layers: bool = False,
        join_s: float = _JOIN_S,
        on_change: OnChange | None = None,
        report: Callable[[Event], None] = lambda event: None,
    ) -> None:
        """Connect to all hosts. Remote ones that are not ready within ``join_s`` are used later.

        ``lanes``: "local" never asks a remote host, "remote" always one that has the expert in memory; "auto" decides.
        ``on_change``: told of remote hosts that come and go, by whichever thread finds out; ``report``: of this node's.
        Raises ConfigError, and ClusterError if a host holds another store or the local ones lack experts.
        """
        if lanes not in FORCED:
            raise ConfigError(f"lanes is {lanes!r}, expected one of {', '.join(FORCED)}")
        self._arenas = ArenaSource(store, local, whole_layers=whole_layers, join_s=join_s, report=report)
        self._num_layers, self._local_nodes = len(store.manifest.layers), [host.node for host in local]
        self._elsewhere: tuple[int, frozenset[int]] = (-1, frozenset())  # of the last call: computed on other nodes
        try:
            client = f"compute-{os.uname().nodename}-{os.getpid()}"
            self._remote = RemoteLanes(store, remote, keys, client, numerics, on_change, FORCED[lanes])
        except BaseException:
            self._arenas.close()
            raise
        try:
            late = self._remote.wait_joined(join_s) if remote else []
        except BaseException:
            self.close()
            raise
        if late:
            _log.warning("expert hosts %s are not ready after %g s; others do their work", ", ".join(late), join_s)
        count = sum(stats.num_assigned for stats in self._remote.stats())
        self._place = SourceInfo("remote", "remote", count, count * store.manifest.slot_bytes)

    # ---------------------------------------------------------------------------- other nodes

    @property
    def remote(self) -> ClusterSource | None:
        return self if self._remote.hosts else None

    def begin(self, layer: int, grouping: Grouping, x_TH: Floats, gate: Gate) -> RemoteCall | None:
        self._elsewhere = (-1, frozenset())
        if self._remote.forced is Lane.HOST_CPU:
            return None
        call = self._remote.begin(layer, grouping, x_TH, gate, self._arenas.in_memory(layer, grouping.active))
        if call is not None:
            self._elsewhere = (layer, frozenset(grouping.active[call.elsewhere].tolist()))
        return call

    def join(self, address: HostAddress) -> None:
        """Use a remote host as soon as it is ready, also in place of one of the same id that is elsewhere now."""
        self._remote.join(address)

    def leave(self, host_id: str) -> None:
        """Use a remote host no more."""
        self._remote.leave(host_id)

    def remote_stats(self) -> list[RemoteStats]:
        return self._remote.stats()

    # ----------------------------------------------------------------------------- everywhere

    def residency(self) -> Residency:
        """Where every expert is now: here if in memory here, else on the first live host that has it.

        From any thread, without the lanes' lock, which a layer call holds: the list of hosts is never changed in place.
        """
        arenas = self._arenas.describe()
        hosts = [host for host in self._remote.hosts if host.is_up]
        places = [Place("disk", "", "")]
        places += [Place("arena", info.name, node) for info, node in zip(arenas, self._local_nodes, strict=True)]
        places += [Place("remote", host.address.host_id, host.address.node) for host in hosts]
        layers = []
        for layer in range(self._num_layers):
            held = self._arenas.held_by(layer) + 1
            for number, host in enumerate(hosts, 1 + len(arenas)):
                held[(held == 0) & host.resident[layer]] = number
            layers.append(held)
        return Residency(tuple(places), tuple(layers))

    def held(self) -> tuple[tuple[Bools, ...], tuple[Bools, ...]]:
        """Of each layer bool [E]: what is in memory here, and what on a live host of another node. From any thread."""
        layers = range(self._num_layers)
        here = tuple(self._arenas.held_by(layer) >= 0 for layer in layers)
        held = [self._remote.offers(layer) for layer in layers]
        return here, tuple(np.zeros_like(a) if b is None else b for a, b in zip(here, held, strict=True))

    # ------------------------------------------------------------------------------ this node

    @property
    def wants_uses(self) -> bool:
        return self._arenas.wants_uses

    @property
    def wants_hints(self) -> bool:
        return self._arenas.wants_hints

    @property
    def arenas(self) -> list[Arena]:
        return self._arenas.arenas

    def arena_refs(self) -> dict[str, ArenaRef]:
        return self._arenas.arena_refs()

    def fetch(self, layer: int, experts: Ints) -> Fetch:
        return self._arenas.fetch(layer, experts)

    def table(self, layer: int) -> LeaseTable | None:
        self._elsewhere = (-1, frozenset())
        return None if self._remote.forced is Lane.REMOTE_COMPUTE else self._arenas.table(layer)

    def used(self, layer: int, experts: list[int]) -> None:
        """What other nodes computed was not used here."""
        if self._elsewhere[0] == layer:
            experts = [e for e in experts if e not in self._elsewhere[1]]
        self._arenas.used(layer, experts)

    def hint(self, layer: int, experts: list[int]) -> None:
        """What another node has in memory need not be loaded here."""
        offers = self._remote.offers(layer)
        self._arenas.hint(layer, experts if offers is None else [e for e in experts if not offers[e]])

    def describe(self) -> list[SourceInfo]:
        return [*self._arenas.describe(), self._place]

    def owner_of(self, layer: int) -> Ints:
        return self._arenas.owner_of(layer)

    def stats(self) -> SourceStats:
        return self._arenas.stats()

    def close(self) -> None:
        self._remote.close()
        self._arenas.close()
