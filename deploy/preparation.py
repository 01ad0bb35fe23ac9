"""What an engine needs to know of the machine its compute actor runs on: found out there."""

from __future__ import annotations

from dataclasses import dataclass

from moray.actors.messages import Caching
from moray.deploy.config import EngineConfig
from moray.deploy.memory_plan import plan_engine
from moray.runtime.planning.plan import MemoryPlan
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.store import Store
from moray.runtime.trace.traffic import choose_policy


@dataclass(frozen=True, slots=True)
class Preparation:
    """An engine's plan on one machine."""

    manifest: Manifest
    plan: MemoryPlan
    num_hosts: int
    num_threads: int
    caching: Caching
    policy: str  # of eviction, and why it was chosen


def prepare(config: EngineConfig) -> Preparation:
    """Plan an engine on this machine, as it is now. Raises MorayError: a bad store, or one that does not fit."""
    path = config.store_path.absolute()
    with Store.open(path) as store:
        plan = plan_engine(path, config)
        caching, policy = _choose_caching(store, config, plan)
        return Preparation(store.manifest, plan, config.num_hosts, config.num_threads, caching, policy)


def _choose_caching(store: Store, config: EngineConfig, plan: MemoryPlan) -> tuple[Caching, str]:
    """How the hosts keep experts, and why so in words."""
    trace = None if config.trace is None else str(config.trace.absolute())
    whole_layers = config.policy == "whole-layers"
    policy: str = "lru" if whole_layers else config.policy
    reason = "as configured"
    if policy == "auto":
        num_experts = [layer.num_experts for layer in store.manifest.layers]
        policy, reason = choose_policy(store.fingerprint, num_experts, plan.num_slots)
    prefetch = "off" if whole_layers else config.prefetch
    return Caching(policy, prefetch, whole_layers, trace, config.replication), f"{policy}: {reason}"
