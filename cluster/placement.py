"""Which expert lives on which host. Pure: the orchestrator asks, the wiring enacts."""

from __future__ import annotations

from collections.abc import Sequence

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
