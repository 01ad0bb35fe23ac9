"""Cache policies by name. Each file holds one."""

from __future__ import annotations

from collections.abc import Sequence

from moray.runtime.errors import ConfigError
from moray.runtime.residency.policies.layer_lru import LayerLRU
from moray.runtime.residency.policies.lfu import LFU
from moray.runtime.residency.policies.lru import LRU
from moray.runtime.residency.policies.scan import ScanResistant
from moray.runtime.residency.policy import Policy

#: Those that can run; the first is taken where nothing speaks for another.
POLICIES = ("lfu", "layer-lru", "lru")


def make_policy(name: str, num_experts_of_layers: Sequence[int], num_slots: int) -> Policy:
    """A policy for the experts of these layers, numbered in layer order. Raises ConfigError."""
    return ScanResistant(_make_plain(name, num_experts_of_layers, num_slots), num_experts_of_layers)


def _make_plain(name: str, num_experts_of_layers: Sequence[int], num_slots: int) -> Policy:
    if name == "lru":
        return LRU()
    if name == "layer-lru":
        return LayerLRU(num_experts_of_layers, num_slots)
    if name == "lfu":
        return LFU(num_experts_of_layers)
    raise ConfigError(f"unknown cache policy {name!r}, expected {', '.join(POLICIES)}")
