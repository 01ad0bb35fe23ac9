"""Every actor of an engine, and every Ray option they have. No other module makes actors.

The classes themselves are plain. Options worth knowing:
- ``num_cpus=0``: threads are set explicitly, and an engine must start on a machine whose CPU slots Ray thinks taken;
- ``max_restarts=-1`` for hosts: a lost host comes back by itself and takes its arena back;
- ``max_concurrency`` for the compute actor: streams, cancels and statistics at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from moray.actors.compute import ComputeActor
from moray.actors.guard import Owner
from moray.actors.host import ExpertHost
from moray.actors.messages import Caching, ComputeConfig, ComputeReport, HostConfig, HostReport
from moray.actors.orchestrator import Orchestrator
from moray.actors.probe import NodeProbe
from moray.cluster.client import HostAddress
from moray.cluster.topology import Topology
from moray.runtime.arena import ArenaRef
from moray.runtime.errors import ClusterError, MorayError
from moray.runtime.layout.packed import Numerics
from moray.runtime.planning.plan import MemoryPlan

T = TypeVar("T")

_MAX_STREAMS = 64
_FINISH_S = 10.0
_HOST_CALLS = 4  # statistics while somebody waits for the arena to fill
#: Concurrency group of short calls to the compute actor: they never wait behind streams.
CONTROL = "control"
_NODE_LABEL = "ray.io/node-id"  # every node has this label from Ray


@dataclass(frozen=True, slots=True)
class Actors:
    """Handles of a running engine, and what its actors reported."""

    compute: Any
    hosts: tuple[Any, ...]
    orchestrator: Any
    compute_report: ComputeReport
    host_reports: tuple[HostReport, ...]

    @property
    def num_actors(self) -> int:
        return 2 + len(self.hosts)

    @property
    def num_nodes(self) -> int:
        return len({self.compute_report.node_id} | {report.node_id for report in self.host_reports})


def start_actors(
    store_path: str,
    *,
    node_id: str,
    num_hosts: int,
    numerics: Numerics,
    device: str,
    num_gpus: int,
    num_threads: int,
    owner: Owner | None,
    caching: Caching,
    lanes: str,
    plan: MemoryPlan | None = None,
) -> Actors:
    """Start an engine's actors and wait until they are ready. On failure none is left behind.

    All run on node ``node_id``: the hosts' arenas are used in place. ``num_gpus`` is what the compute actor
    asks of Ray: 0 or 1. ``owner``: the process that the actors end with, however it ends. ``plan``: sizes of arenas and
    caches; None: a slot for each expert, and the model's own context.
    """
    name = f"engine-{secrets.token_hex(4)}"
    token = secrets.token_hex(32)
    host_ids = [f"host-{index}" for index in range(num_hosts)]
    started: list[Any] = []
    try:
        here: dict[str, Any] = {"label_selector": {_NODE_LABEL: node_id}}
        orchestrator = _remote(Orchestrator, name=f"{name}-orchestrator", **here).remote(store_path, host_ids, owner)
        started.append(orchestrator)
        options = {"name": f"{name}-compute", "max_concurrency": _MAX_STREAMS, "num_gpus": num_gpus} | here
        slots, on_device, limits = (plan.num_slots, plan.device_expert_bytes, plan.limits) if plan else (None,) * 3
        compute_config = ComputeConfig(
            store_path, numerics, device, num_threads, owner, caching, slots, lanes, on_device, limits
        )
        compute = _remote(ComputeActor, {CONTROL: 2}, **options).remote(compute_config, _node_id)
        started.append(compute)
        placement = call(orchestrator.placement)
        lookup = _survivor_lookup(f"{name}-orchestrator")
        # Abstract sockets: no files, and gone with their processes.
        addresses = [HostAddress(host_id, f"ipc://@moray-{name}-{host_id}", token) for host_id in host_ids]
        for index, address in enumerate(addresses):
            keys = tuple(placement[address.host_id])
            num_slots = plan.slots[index] if plan else len(keys)
            config = HostConfig(address, store_path, keys, index, num_hosts, num_threads, num_slots, caching, owner)
            host_options: dict[str, Any] = {
                "name": f"{name}-{address.host_id}",
                "max_restarts": -1,
                "max_concurrency": _HOST_CALLS,
            } | here
            started.append(_remote(ExpertHost, **host_options).remote(config, _node_id, lookup))
        hosts = tuple(started[2:])
        host_reports = tuple(call(actor.report) for actor in hosts)
        compute_report = call(compute.attach, addresses)
        call(orchestrator.record_survivors, compute_report.arenas)
    except BaseException:
        _kill(started)
        raise
    return Actors(compute, hosts, orchestrator, compute_report, host_reports)


def finish_actors(actors: Actors) -> None:
    """Let the compute actor write what it recorded; an engine that is broken is ended all the same."""
    with suppress(MorayError, GetTimeoutError, RayTaskError):
        fetch(lambda: ray.get(actors.compute.finish.options(concurrency_group=CONTROL).remote(), timeout=_FINISH_S))


def stop_actors(actors: Actors) -> None:
    """End the actors. Their memory is gone with their processes."""
    _kill([actors.compute, *actors.hosts, actors.orchestrator])


def call(method: Any, *args: object) -> Any:
    """Call an actor's method and wait. Raises our own errors as they were raised there."""
    return fetch(lambda: ray.get(method.remote(*args)))


def fetch(get: Callable[[], T]) -> T:
    """Map Ray's errors to ours, at this one edge."""
    try:
        return get()
    except RayTaskError as error:
        if isinstance(error.cause, MorayError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise ClusterError(f"an actor of the engine is gone ({_first_line(error)}); start the engine again") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _remote(kind: type, groups: dict[str, int] | None = None, **options: Any) -> Any:
    remote: Any = ray.remote  # its types know neither concurrency groups nor plain classes
    made = (remote(concurrency_groups=groups) if groups else remote)(kind)
    return made.options(num_cpus=0, **options)


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _survivor_lookup(orchestrator_name: str) -> Callable[[str], ArenaRef | None]:
    def lookup(host_id: str) -> ArenaRef | None:
        orchestrator = ray.get_actor(orchestrator_name)
        reference: Any = orchestrator.survivor.remote(host_id)
        found: ArenaRef | None = ray.get(reference)
        return found

    return lookup


def _kill(actors: list[Any]) -> None:
    for actor in reversed(actors):
        ray.kill(actor)


def measure_cluster(store_path: str, compute_node: str) -> Topology:
    """Measure every living node, all at once, and then the links from the compute node (a Ray node id), one by one.

    Raises StoreError for a node without the store, HostLostError for one that cannot be reached.
    """
    nodes = {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
    names = [str(node.get("NodeName") or node["NodeManagerAddress"]) for node in nodes.values()]
    unique = {
        node_id: name if names.count(name) == 1 else node_id[:12] for node_id, name in zip(nodes, names, strict=True)
    }
    probes: dict[str, Any] = {}
    try:
        for node_id, node in nodes.items():
            made = _remote(NodeProbe, label_selector={_NODE_LABEL: node_id})
            probes[node_id] = made.remote(unique[node_id], str(node["NodeManagerAddress"]), store_path)
        found = fetch(lambda: ray.get([probe.measure.remote() for probe in probes.values()]))
        reports = {unique[node_id]: report for node_id, report in zip(probes, found, strict=True)}
        here = probes[compute_node]
        key, links = call(here.client_key), {}
        for node_id, probe in probes.items():
            if probe is not here:
                links[unique[node_id]] = call(here.link_to, call(probe.listen, key))
        return Topology(unique[compute_node], reports, links)
    finally:
        _kill([*probes.values()])
