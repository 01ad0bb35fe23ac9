"""Which expert lives on which host. Pure: the orchestrator asks, the wiring enacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from moray.runtime.errors import ConfigError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import Manifest


def place_evenly(manifest: Manifest, host_ids: Sequence[str]) -> dict[str, list[ExpertKey]]:
    """Deal the experts, layer after layer, over the hosts in turn.

    Every layer is spread over as many hosts as it can be, and totals differ by at most one. Keys come in layer order.
    Raises ConfigError if a host would get nothing.
    """
    if not 1 <= len(host_ids) <= len(manifest.shards):
        raise ConfigError(
            f"hosts is {len(host_ids)}, expected 1 to {len(manifest.shards)}, the number of experts in the store"
        )
    placement: dict[str, list[ExpertKey]] = {host_id: [] for host_id in host_ids}
    turn = 0
    for layer, info in enumerate(manifest.layers):
        for expert in range(info.num_experts):
            placement[host_ids[turn % len(host_ids)]].append(ExpertKey(layer, expert))
            turn += 1
    return placement


def place_by_slots(manifest: Manifest, slots: Mapping[str, int]) -> dict[str, list[ExpertKey]]:
    """Give each holder a share of every layer in proportion to its slots, and never more experts than slots.

    What the slots of all do not suffice for is left out, spread over the layers too: it is loaded on need. Keys come
    in layer order. Raises ConfigError if there is nobody to hold anything.
    """
    total, capacity = len(manifest.shards), sum(slots.values())
    if not slots or min(slots.values()) < 0 or not capacity:
        raise ConfigError(f"the nodes {', '.join(slots)} have memory for no expert; give them more host_memory")
    weights: dict[str | None, int] = {None: max(0, total - capacity)}
    weights.update((holder, count) for holder, count in slots.items())
    placement: dict[str | None, list[ExpertKey]] = {holder: [] for holder in weights}
    keys = (ExpertKey(layer, e) for layer, info in enumerate(manifest.layers) for e in range(info.num_experts))
    for count, key in enumerate(keys, 1):

        def lag(holder: str | None, count: int = count) -> float:
            return weights[holder] * count / sum(weights.values()) - len(placement[holder])

        free = [holder for holder in weights if len(placement[holder]) < weights[holder]]
        placement[max(free, key=lag)].append(key)
    return {holder: keys for holder, keys in placement.items() if holder is not None}


def place_more(manifest: Manifest, placement: Mapping[str, Sequence[ExpertKey]], num_slots: int) -> list[ExpertKey]:
    """What a holder that comes later gets: experts that nobody holds, then a second copy of those held once.

    Nothing that is placed moves. At most ``num_slots``, in layer order.
    """
    copies = Counter(key for keys in placement.values() for key in keys)
    return sorted(sorted(manifest.shards, key=lambda key: (copies[key], key.expert, key.layer))[:num_slots])
