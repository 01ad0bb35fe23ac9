"""``moray plan``: what a cluster would hold of a model, and how fast it would be, before anything is loaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.cluster.layer_cost import geometry_of
from moray.cluster.place import place
from moray.cluster.placement import HostSpec, Placement, heat_of
from moray.cluster.predict import Prediction, Trunk, predict
from moray.cluster.topology import LinkReport, NodeReport, Topology
from moray.deploy.plan_config import PlanConfig
from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe
from moray.runtime.errors import ConfigError, ResourceError
from moray.runtime.memory import format_bytes
from moray.runtime.planning.host_plan import plan_host_slots
from moray.runtime.planning.plan import Budgets, MemoryPlan, plan_memory
from moray.runtime.planning.profiles import profile_of
from moray.runtime.store.manifest import MANIFEST_NAME, Manifest
from moray.runtime.store.store import Store
from moray.runtime.trace.traffic import read_traffic

_PREDICTED_LENGTH = 1024  # tokens in the KV cache of a predicted step, where the context allows


@dataclass(frozen=True, slots=True)
class PlannedNode:
    """One node's part. ``problem``: why it holds nothing, in words."""

    name: str
    report: NodeReport
    link: LinkReport | None  # None: the compute node
    num_slots: int
    num_experts: int  # that it is the primary of
    num_replicas: int
    is_assumed: bool  # its rates were not measured
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What ``moray plan`` found."""

    model: str
    manifest: Manifest
    memory: MemoryPlan  # of the compute node
    nodes: tuple[PlannedNode, ...]  # the compute node first
    placement: Placement
    prediction: Prediction
    num_recorded_calls: int  # layer calls that heat and hit rates are of; 0: experts are taken to be used evenly

    @property
    def num_experts(self) -> int:
        return len(self.manifest.shards)

    @property
    def left_out_bytes(self) -> int:
        return sum(self.manifest.shards[key].num_bytes for key in self.placement.left_out)

    @property
    def advice(self) -> list[str]:
        """What to change so that everything fits; empty if it does."""
        if not self.placement.left_out:
            return []
        fitting = self.manifest.bits_per_expert_weight * (1 - self.left_out_bytes / self.manifest.expert_bytes)
        num_bytes = len(self.placement.left_out) * self.memory.slot_bytes
        found = [f"{format_bytes(num_bytes)} more memory on any node would hold all experts"]
        if fitting >= 2:
            found.append(f"so would a recipe of at most {fitting:.1f} bits an expert weight (--recipe)")
        least = self.memory.limits.sequence_bytes(min(4096, self.memory.limits.context_length))
        if self.memory.kv_bytes > 2 * least:
            found.append(
                f"a smaller --context frees up to {format_bytes(self.memory.kv_bytes - least)} of KV caches on "
                f"{self.nodes[0].name}"
            )
        return found


@contextmanager
def planned_store(model: Path, recipe: str | None) -> Iterator[Path]:
    """A store, or the outline of what a checkpoint or a config.json would become. Raises MorayError."""
    if model.is_file() and model.name == "config.json":
        model = model.parent
    if (model / MANIFEST_NAME).is_file():
        if recipe is not None:
            raise ConfigError(f"{model} is a store, its recipe is decided; leave out --recipe, or give a checkpoint")
        yield model
        return
    from moray.runtime.convert.outline import write_outline

    directory = Path(tempfile.mkdtemp(prefix="moray-plan-"))
    try:
        write_outline(model, Recipe.parse(recipe or DEFAULT_RECIPE), directory)
        yield directory
    finally:
        shutil.rmtree(directory)


def topology_of(config: PlanConfig) -> Topology:
    """A cluster that is described, not measured."""
    reports = {
        name: NodeReport(node.memory_bytes, node.cores, "", node.speed, node.disk_bytes_per_s)
        for name, node in config.nodes.items()
    }
    first, *others = config.nodes
    return Topology(first, reports, {name: config.link_to(name) for name in others})


def make_plan(
    model: str,
    path: Path,
    topology: Topology,
    *,
    context: int | None = None,
    host_memory: dict[str, str] | None = None,
    assumed: Sequence[str] = (),
) -> ClusterPlan:
    """Plan a store, or an outline, at ``path``. ``model``: what to call it. ``host_memory``: by node, as written.

    Raises ResourceError if the compute node does not hold the trunk and one sequence.
    """
    given = host_memory or {}
    with Store.open(path) as store:
        manifest, fingerprint = store.manifest, store.fingerprint
    num_experts, here = len(manifest.shards), topology.compute_node
    profile = profile_of(path)
    budgets = Budgets(topology.nodes[here].memory_bytes, given.get(here), context)
    memory = plan_memory(profile, manifest.slot_bytes, [num_experts], budgets, f"{model}, computed on {here},")
    hosts, problems = [HostSpec(here, memory.num_slots, topology.nodes[here].compute)], {}
    for name, link in topology.links.items():
        report = topology.nodes[name]
        try:
            slots = plan_host_slots(manifest.slot_bytes, num_experts, report.memory_bytes, given.get(name), name)
        except ResourceError as error:
            slots, problems[name] = 0, str(error)
        hosts.append(HostSpec(name, slots, report.compute, link))
    layers, counts = geometry_of(manifest, profile.top_k), [layer.num_experts for layer in manifest.layers]
    calls = read_traffic(fingerprint, counts)
    placement = place(layers, hosts, heat_of(calls, counts) if calls else None)
    length = min(_PREDICTED_LENGTH, memory.limits.context_length)
    trunk = Trunk(len(layers), profile.bytes_per_token, profile.sequence.kv_bytes(length, memory.limits.chunk))
    disk = topology.nodes[here].disk_bytes_per_s
    prediction = predict(layers, trunk, hosts, placement, disk, calls=calls, chunk=memory.limits.chunk)
    primaries = [*placement.primary.values()]
    nodes = []
    for host in hosts:
        primary = primaries.count(host.host_id)
        replicas = len(placement.assigned(host.host_id)) - primary
        nodes.append(
            PlannedNode(
                host.host_id, topology.nodes[host.host_id], host.link, host.num_slots, primary, replicas,
                host.host_id in assumed, problems.get(host.host_id, ""),
            )
        )  # fmt: skip
    return ClusterPlan(model, manifest, memory, tuple(nodes), placement, prediction, len(calls))


def to_json(plan: ClusterPlan) -> dict[str, Any]:
    """For ``--json``: sizes in bytes, times in seconds."""
    memory, prediction = plan.memory, plan.prediction
    return {
        "model": plan.model,
        "experts": plan.num_experts,
        "expert_bytes": plan.manifest.expert_bytes,
        "fits": not plan.placement.left_out,
        "left_out": len(plan.placement.left_out),
        "left_out_bytes": plan.left_out_bytes,
        "advice": plan.advice,
        "nodes": [_node_json(plan, node) for node in plan.nodes],
        "compute_memory": {
            "trunk_bytes": memory.profile.trunk_bytes,
            "workspace_bytes": memory.workspace_bytes,
            "kv_bytes": memory.kv_bytes,
            "kv_bytes_per_sequence": memory.sequence_bytes,
            "arena_bytes": memory.arena_bytes,
            "processes_bytes": memory.processes_bytes,
            "context": memory.limits.context_length,
        },
        "prediction": {
            "decode_tokens_per_s": prediction.decode_tokens_per_s,
            "prefill_tokens_per_s": prediction.prefill_tokens_per_s,
            "trunk_s": prediction.trunk_s,
            "experts_s": prediction.experts_s,
            "hit_rate": prediction.hit_rate,
            "disk_bytes_per_token": prediction.disk_bytes_per_token,
            "link_bytes_per_token": prediction.link_bytes_per_token,
            "recorded_calls": plan.num_recorded_calls,
        },
    }


def _node_json(plan: ClusterPlan, node: PlannedNode) -> dict[str, Any]:
    report, link = node.report, node.link
    return {
        "name": node.name,
        "memory_bytes": report.memory_bytes,
        "cores": report.num_cores,
        "compute_bytes_per_s": report.compute.bytes_per_s,
        "prompt_bytes_per_s": report.compute.token_bytes_per_s,
        "disk_bytes_per_s": report.disk_bytes_per_s,
        "assumed_rates": node.is_assumed,
        "link": None if link is None else {"latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s},
        "slots": node.num_slots,
        "experts": node.num_experts,
        "replicas": node.num_replicas,
        "arena_bytes": node.num_slots * plan.memory.slot_bytes,
        "problem": node.problem,
    }
