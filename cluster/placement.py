"""Which expert lives on which host.

A host *holds* an expert if it keeps it in memory: as its primary, or as a replica beside it. Who computes an expert
that several hold is decided for each layer call (runtime/lanes/places.py). What no memory is left for is *left out*,
and loaded from the compute node's disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moray.cluster.layer_cost import LayerGeometry
from moray.cluster.topology import ComputeSpeed, LinkReport
from moray.runtime.arrays import Doubles
from moray.runtime.errors import ConfigError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import Manifest

Heat = Sequence[Doubles]  # [layer][expert]: how often each is used, in any unit


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A host as placement sees it. ``link`` None: on the compute node, whose CPU computes what any such host holds."""

    host_id: str
    num_slots: int
    speed: ComputeSpeed
    link: LinkReport | None = None


@dataclass(frozen=True)
class Placement:
    """Where experts are held. Host ids; experts that are in neither ``primary`` nor ``left_out`` do not exist."""

    primary: Mapping[ExpertKey, str]
    replicas: Mapping[ExpertKey, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[ExpertKey, ...] = ()

    def hosts_of(self, key: ExpertKey) -> tuple[str, ...]:
        """Who holds an expert, its primary first; empty if it was left out."""
        return (self.primary[key], *self.replicas.get(key, ())) if key in self.primary else ()

    def assigned(self, host_id: str) -> list[ExpertKey]:
        """What a host holds, in layer order, replicas last."""
        return [*self._held.get(host_id, [])]

    @cached_property
    def _held(self) -> dict[str, list[ExpertKey]]:
        held: dict[str, list[ExpertKey]] = {}
        for key in sorted(self.primary):
            held.setdefault(self.primary[key], []).append(key)
        for key in sorted(self.replicas):
            for host in self.replicas[key]:
                held.setdefault(host, []).append(key)
        return held

    def validate(self, layers: Sequence[LayerGeometry], hosts: Sequence[HostSpec]) -> None:
        """Raises AssertionError unless every expert is placed or left out once, and no host holds too many."""
        every = all_keys(layers)
        assert sorted([*self.primary, *self.left_out]) == every
        assert self.replicas.keys() <= self.primary.keys()
        slots = {host.host_id: host.num_slots for host in hosts}
        assert {h for key in self.primary for h in self.hosts_of(key)} <= slots.keys()
        for key in self.primary:
            assert len(set(self.hosts_of(key))) == len(self.hosts_of(key)), key
        for host_id, num_slots in slots.items():
            assert len(self.assigned(host_id)) <= num_slots, host_id


def place_evenly(manifest: Manifest, host_ids: Sequence[str]) -> dict[str, list[ExpertKey]]:
    """Deal a store's experts over hosts of one node, for which it makes no difference who holds what.

    Every layer is spread over as many hosts as it can be, and totals differ by at most one. Keys come in layer order.
    Raises ConfigError if a host would get nothing.
    """
    if not 1 <= len(host_ids) <= len(manifest.shards):
        raise ConfigError(
            f"hosts is {len(host_ids)}, expected 1 to {len(manifest.shards)}, the number of experts in the store"
        )
    return deal(sorted(manifest.shards), {host_id: len(manifest.shards) for host_id in host_ids})


def deal(keys: Iterable[ExpertKey], slots: Mapping[str, int]) -> dict[str, list[ExpertKey]]:
    """Give experts to hosts in turn, as long as they have slots."""
    dealt: dict[str, list[ExpertKey]] = {host_id: [] for host_id in slots}
    order, turn = [host_id for host_id, count in slots.items() if count], 0
    for key in keys:
        host_id = order[turn % len(order)]
        dealt[host_id].append(key)
        turn += 1
        if len(dealt[host_id]) == slots[host_id]:
            order = [other for other in order if other != host_id]
            turn = 0
    return dealt


def uniform_heat(layers: Sequence[LayerGeometry]) -> Heat:
    return [np.ones(layer.num_experts) for layer in layers]


def heat_of(calls: Iterable[Sequence[int]], num_experts: Sequence[int]) -> Heat:
    """From recorded layer calls (runtime/trace/traffic.py), each [layer, expert, ...]. One use a layer is assumed."""
    heat = [np.ones(count) for count in num_experts]
    for layer, *experts in calls:
        heat[layer][experts] += 1
    return heat


def moved(old: Placement, new: Placement) -> list[tuple[ExpertKey, str]]:
    """What has to be loaded, and by which host, on the way from one placement to another."""
    return [(key, host) for key in sorted(new.primary) for host in new.hosts_of(key) if host not in old.hosts_of(key)]


def all_keys(layers: Sequence[LayerGeometry]) -> list[ExpertKey]:
    return [key for index in range(len(layers)) for key in keys_of(layers, index)]


def keys_of(layers: Sequence[LayerGeometry], index: int) -> list[ExpertKey]:
    return [ExpertKey(index, expert) for expert in range(layers[index].num_experts)]
