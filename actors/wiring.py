"""An engine's actors: started, asked, ended.

The classes themselves are plain. Options worth knowing:
- ``num_cpus=0``: threads are set explicitly, and an engine must start on a machine whose CPU slots Ray thinks taken;
- ``max_restarts=-1``: a lost actor comes back by itself, with what the orchestrator's ledger says of the others;
- ``max_task_retries=-1`` for the orchestrator: calls of it are made again when it is back, so its methods may be
  called twice;
- ``max_concurrency`` for the compute actor: streams, cancels and statistics at once.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from moray.actors.calls import CONTROL, call, fetch
from moray.actors.compute import ComputeActor
from moray.actors.guard import Owner
from moray.actors.messages import (
    Caching,
    ComputeConfig,
    ComputeReport,
    EngineOrders,
    EngineStatus,
    HostConfig,
    HostReport,
    NodeOrders,
)
from moray.actors.orchestrator import Orchestrator
from moray.actors.ray_hands import RayHands
from moray.actors.ray_home import KeyValueMemory, RayHome, compute_name, find, named, orchestrator_name
from moray.actors.spawn import FOR_EVER, kill_all, make_remote, on_node, start_host
from moray.cluster import ray_session
from moray.cluster.client import HostAddress
from moray.cluster.nodes import NodeInfo
from moray.cluster.placement import place_evenly
from moray.runtime.errors import ClusterError, MorayError
from moray.runtime.experts.shard_host import HostStats
from moray.runtime.layout.packed import Numerics
from moray.runtime.planning.plan import MemoryPlan
from moray.runtime.store.manifest import Manifest

MAX_STREAMS = 64
_FINISH_S = 10.0
_ORCHESTRATOR_CALLS = 8  # hosts that start ask it while others wait for them
_REMOTE_STATS_S = 2.0  # a node that is cut off is left out of statistics


@dataclass(frozen=True, slots=True)
class Actors:
    """Handles of a running engine, and what its actors reported when it started."""

    compute: Any
    hosts: tuple[Any, ...]  # on the compute actor's node
    orchestrator: Any
    compute_report: ComputeReport
    host_reports: tuple[HostReport, ...]
    remote_reports: tuple[HostReport, ...]
    memory: KeyValueMemory
    ledger: RayHome

    @property
    def num_actors(self) -> int:
        return 2 + len(self.hosts) + len(self.remote_reports)

    @property
    def num_nodes(self) -> int:
        reports = (*self.host_reports, *self.remote_reports)
        return len({self.compute_report.node_id} | {report.node_id for report in reports})

    def remote_hosts(self) -> list[Any]:
        """Handles of the hosts on other nodes that run now: nodes come and go."""
        return list(call(self.orchestrator.remote_hosts))


def start_actors(
    store_path: str,
    manifest: Manifest,
    *,
    node: NodeInfo,
    nodes: dict[str, NodeOrders],
    is_joined: bool,
    num_hosts: int,
    numerics: Numerics,
    device: str,
    num_gpus: int,
    num_threads: int,
    owner: Owner | None,
    caching: Caching,
    lanes: str,
    plan: MemoryPlan,
) -> Actors:
    """Start an engine's actors and wait until they are ready. On failure none is left behind.

    The compute actor, the orchestrator and ``num_hosts`` hosts run on ``node``, where the hosts' arenas are used in
    place; there is one more host on every other node labelled role=host. ``nodes``: what is particular about a node,
    by its name or address. ``is_joined``: the cluster is somebody else's, and its nodes may come and go.
    ``num_gpus`` is what the compute actor asks of Ray: 0 or 1. ``owner``: the process of the same node that the actors
    end with, however it ends. ``plan``: sizes of arenas and caches.
    """
    name = f"engine-{secrets.token_hex(4)}"
    token = secrets.token_hex(32)
    local_keys = place_evenly(manifest, [f"host-{index}" for index in range(num_hosts)])
    orders = EngineOrders(
        store_path=store_path,
        compute_node=node,
        local_slots=dict(zip(local_keys, plan.slots, strict=True)),
        nodes=nodes,
        token=token,
        caching=caching,
        owner=owner,
    )
    compute_config = ComputeConfig(
        store_path=store_path,
        numerics=numerics,
        device=device,
        num_threads=num_threads,
        owner=owner,
        caching=caching,
        num_slots=plan.num_slots,
        lanes=lanes,
        device_bytes=plan.device_expert_bytes,
        limits=plan.limits,
    )
    started: list[Any] = []
    try:
        memory, home = KeyValueMemory(name), RayHome(name)
        supervised: dict[str, Any] = {"max_restarts": FOR_EVER} | on_node(node.node_id)
        options = supervised | named(orchestrator_name(name))
        options |= {"max_concurrency": _ORCHESTRATOR_CALLS, "max_task_retries": FOR_EVER}
        orchestrator = make_remote(Orchestrator, **options).remote(orders, RayHands(name), memory)
        started.append(orchestrator)
        options = supervised | named(compute_name(name)) | {"max_concurrency": MAX_STREAMS, "num_gpus": num_gpus}
        compute = make_remote(ComputeActor, {CONTROL: 2}, **options).remote(compute_config, home)
        started.append(compute)
        placement = call(orchestrator.open)
        addresses = []
        for index, (host_id, keys) in enumerate(local_keys.items()):
            # Abstract sockets: no files, and gone with their processes.
            addresses.append(HostAddress(host_id, f"ipc://@moray-{name}-{host_id}", token, node.name))
            config = HostConfig(
                address=addresses[-1],
                store_path=store_path,
                keys=tuple(keys),
                assigned=placement[host_id],
                index=index,
                num_hosts=num_hosts,
                num_threads=num_threads,
                num_slots=plan.slots[index],
                caching=caching,
                owner=owner,
                network=f"tcp://{node.address}:0" if is_joined else None,
            )
            started.append(start_host(name, node, config))
        hosts = tuple(started[2:])
        host_reports = tuple(call(actor.report) for actor in hosts)
        remote_reports = tuple(call(orchestrator.remote_reports))
        remote = call(orchestrator.admit, call(compute.public_key))
        compute_report = call(compute.attach, addresses, remote)
        for host in hosts:
            host.fill.remote()  # one that was killed meanwhile does it by itself
        call(orchestrator.record_hosts, addresses)
        if is_joined:
            call(orchestrator.watch)
    except BaseException:
        kill_all(started)
        raise
    return Actors(compute, hosts, orchestrator, compute_report, host_reports, remote_reports, memory, home)


def finish_actors(actors: Actors) -> None:
    """Let the compute actor write what it recorded; an engine that is broken is ended all the same."""
    with suppress(MorayError, GetTimeoutError, RayTaskError):
        fetch(lambda: ray.get(actors.compute.finish.options(concurrency_group=CONTROL).remote(), timeout=_FINISH_S))


def stop_actors(actors: Actors) -> None:
    """End the actors. Their memory is gone with their processes."""
    kill_all([actors.compute, *actors.hosts, actors.orchestrator])
    actors.memory.forget()


def host_stats(actors: Actors) -> tuple[HostStats, ...]:
    """Of all hosts that answer: those of this node, then the others."""
    stats = [call(host.stats) for host in actors.hosts]
    for host in actors.remote_hosts():
        with suppress(GetTimeoutError, ClusterError):
            stats.append(call(host.stats, timeout_s=_REMOTE_STATS_S))
    return tuple(stats)


def engine_statuses() -> dict[str, EngineStatus]:
    """Of every engine of the cluster that answers, by the engine's name."""
    ending, found = orchestrator_name(""), {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == ray_session.NAMESPACE and actor["name"].endswith(ending):
            with suppress(GetTimeoutError, RayError, ValueError):  # it ends meanwhile
                orchestrator = find(actor["name"])
                name = actor["name"].removesuffix(ending)
                found[name] = ray.get(orchestrator.status.remote(), timeout=_REMOTE_STATS_S)
    return found
