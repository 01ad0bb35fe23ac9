"""What a cluster consists of, and what its engines make of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moray.actors.messages import EngineStatus, RemoteHostStatus
from moray.cluster import ray_session
from moray.cluster.nodes import ROLE_LABEL, NodeInfo
from moray.cluster.remote_host import RemoteStats
from moray.deploy.cluster.node import VERSION_LABEL
from moray.runtime.memory import format_bytes


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A cluster as its head sees it, and the engines that answered."""

    gcs_address: str
    nodes: tuple[NodeInfo, ...]
    engines: dict[str, EngineStatus]


def cluster_status(gcs_address: str) -> ClusterStatus:
    """Ask the head for its nodes, and every engine of this user for its own. Raises ConfigError, ClusterError."""
    from moray.actors.wiring import engine_statuses

    ray_session.prepare_environment(gcs_address)
    nodes = sorted(ray_session.nodes_at(gcs_address), key=lambda node: (node.name, node.node_id))
    session = ray_session.join(gcs_address)
    try:
        return ClusterStatus(gcs_address, tuple(nodes), engine_statuses())
    finally:
        ray_session.leave(session)


def as_document(status: ClusterStatus) -> dict[str, Any]:
    """For JSON."""
    document = asdict(status)
    for node in document["nodes"]:
        node["role"] = node["labels"].get(ROLE_LABEL, "")
    return document


def print_status(status: ClusterStatus, console: Console) -> None:
    console.print(f"cluster at {status.gcs_address}: {len(status.nodes)} nodes, {len(status.engines)} engines")
    table = Table("node", "address", "role", "cores", "memory", "GPUs", "moray")
    for node in status.nodes:
        table.add_row(
            node.name,
            node.address,
            node.labels.get(ROLE_LABEL, "-"),
            str(node.num_cpus),
            format_bytes(node.memory_bytes),
            str(node.num_gpus),
            node.labels.get(VERSION_LABEL, "-"),
        )
    console.print(table)
    for name, engine in status.engines.items():
        console.print(f"{name}: {engine.store_path}, computing on {engine.compute_node}")
        table = Table("host", "node", "state", "experts", "in memory", "round trip", "link", "late", "why")
        for host_id, count in engine.local_hosts.items():
            table.add_row(host_id, engine.compute_node, "running", str(count), "", "in place")
        for host in engine.remote_hosts:
            table.add_row(host.host_id, host.node, _state(host), str(host.num_experts), *_link(host.link), host.reason)
        console.print(table)


def _state(host: RemoteHostStatus) -> str:
    """What the orchestrator says, and what the compute actor has seen of it since."""
    return host.state if host.link is None or host.state != "running" else f"{host.state}, {host.link.state}"


def _link(link: RemoteStats | None) -> tuple[str, str, str, str]:
    """Experts in memory, time of a round trip without computing, bandwidth, requests that missed their deadline."""
    if link is None:
        return "-", "-", "-", "-"
    speed = f"{format_bytes(int(link.bytes_per_s))}/s" if link.bytes_per_s else "-"
    return str(link.num_resident), f"{link.round_trip_us / 1000:.2f} ms", speed, str(link.missed)
