"""The placement of a running engine: place.py's rule while nodes come and go, with the compute node as one host.

A store's experts are dealt to the hosts of the compute node once and for all (``place_evenly``), because it makes no
difference which of them has an expert; the rule decides which experts that node holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from moray.cluster.layer_cost import LayerGeometry, geometry_of
from moray.cluster.place import place, replace
from moray.cluster.placement import Heat, HostSpec, Placement, heat_of, place_evenly
from moray.cluster.topology import ComputeSpeed
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.planning.profiles import profile_of
from moray.runtime.store.store import Store
from moray.runtime.trace.traffic import read_traffic

HERE = "compute-node"  # as a host; ids of remote hosts begin with "host-"


class LivePlacement:
    """At first all is held by the compute node alone, as much as it has memory for. Not thread-safe."""

    def __init__(self, store: Store, local_slots: Mapping[str, int]) -> None:
        """``local_slots``: host id -> slots, of the compute node."""
        self.manifest = store.manifest
        self._path, self._fingerprint, self._local_slots = store.path, store.fingerprint, dict(local_slots)
        self._not_here = [key for key in self.manifest.shards if not store.has(key)]
        self._owned = {host_id: {*keys} for host_id, keys in place_evenly(self.manifest, [*local_slots]).items()}
        self._facts: tuple[list[LayerGeometry], Heat | None] | None = None
        in_turn = sorted(self.manifest.shards, key=lambda key: (key.expert, key.layer))
        room = sum(local_slots.values())
        self._placement = Placement(dict.fromkeys(in_turn[:room], HERE), left_out=tuple(sorted(in_turn[room:])))

    def place(self, here: ComputeSpeed, remote: Sequence[HostSpec]) -> None:
        """Place all experts anew. Raises ConfigError if memory does not hold what the compute node's disk lacks."""
        layers, heat = self._read_facts()
        self._placement = place(layers, self._hosts(here, remote), heat, self._not_here)

    def replace(self, here: ComputeSpeed, remote: Sequence[HostSpec]) -> None:
        """These are the remote hosts now: place again, moving as little as possible. Raises as ``place`` does."""
        layers, heat = self._read_facts()
        self._placement = replace(self._placement, layers, self._hosts(here, remote), heat, self._not_here)

    @property
    def owned(self) -> Mapping[str, Collection[ExpertKey]]:
        """Of each host of the compute node, the experts that it may hold."""
        return self._owned

    def assigned(self, host_id: str) -> tuple[ExpertKey, ...]:
        """What a host keeps in memory: in layer order, replicas last."""
        owned = self._owned.get(host_id)
        if owned is None:
            return tuple(self._placement.assigned(host_id))
        mine = [key for key in self._placement.assigned(HERE) if key in owned]
        left_out = {*self._placement.left_out}
        # What is placed on the node may not be spread over its hosts as their memory is.
        others = sorted(owned.difference(mine), key=lambda key: (key not in left_out, key.expert, key.layer))
        return tuple([*mine, *others][: self._local_slots[host_id]])

    def _hosts(self, here: ComputeSpeed, remote: Sequence[HostSpec]) -> list[HostSpec]:
        return [HostSpec(HERE, sum(self._local_slots.values()), here), *remote]

    def _read_facts(self) -> tuple[list[LayerGeometry], Heat | None]:
        """The layers, and how often experts were used lately as far as it was recorded. Read when there is a choice."""
        if self._facts is None:
            counts = [layer.num_experts for layer in self.manifest.layers]
            calls = read_traffic(self._fingerprint, counts)
            layers = geometry_of(self.manifest, profile_of(Path(self._path)).top_k)
            self._facts = layers, heat_of(calls, counts) if calls else None
        return self._facts
