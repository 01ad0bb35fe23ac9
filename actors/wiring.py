"""Every actor of an engine, and every Ray option they have. No other module makes actors.

The classes themselves are plain. Options worth knowing:
- ``num_cpus=0``: threads are set explicitly, and an engine must start on a machine whose CPU slots Ray thinks taken;
- ``max_restarts=-1`` for hosts: a lost host comes back by itself and takes its arena back;
- ``max_concurrency`` for the compute actor: streams, cancels and statistics at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from moray.actors.compute import ComputeActor
from moray.actors.guard import Owner
from moray.actors.host import ExpertHost
from moray.actors.messages import (
    Caching,
    ComputeConfig,
    ComputeReport,
    EngineOrders,
    EngineStatus,
    HostConfig,
    HostReport,
    NodeOrders,
    NodeReport,
)
from moray.actors.orchestrator import Orchestrator
from moray.actors.survey import survey
from moray.cluster import ray_session
from moray.cluster.client import HostAddress
from moray.cluster.nodes import NodeInfo
from moray.cluster.placement import place_evenly
from moray.cluster.remote_host import RemoteStats
from moray.runtime.arena import ArenaRef
from moray.runtime.errors import ClusterError, MorayError
from moray.runtime.experts.shard_host import HostStats
from moray.runtime.layout.packed import Numerics
from moray.runtime.planning.plan import MemoryPlan
from moray.runtime.store.manifest import Manifest

T = TypeVar("T")

_MAX_STREAMS = 64
_FINISH_S = 10.0
_HOST_CALLS = 4  # statistics while somebody waits for the arena to fill
_ORCHESTRATOR_CALLS = 8  # hosts that start ask it while others wait for them
_TASK_S = 120.0  # for a task on another node: a worker starts there and imports moray
_REMOTE_START_S = 300.0  # for a host there: it maps its arena; shards are loaded in the background
_REMOTE_STATS_S = 2.0  # a node that is cut off is left out of statistics
#: Concurrency group of short calls to the compute actor: they never wait behind streams.
CONTROL = "control"
_NODE_LABEL = "ray.io/node-id"  # every node has this label from Ray


@dataclass(frozen=True, slots=True)
class Actors:
    """Handles of a running engine, and what its actors reported when it started."""

    compute: Any
    hosts: tuple[Any, ...]  # on the compute actor's node
    orchestrator: Any
    compute_report: ComputeReport
    host_reports: tuple[HostReport, ...]
    remote_reports: tuple[HostReport, ...]

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
        here = _on(node)
        orchestrator_options: dict[str, Any] = {
            "name": _orchestrator(name),
            "max_concurrency": _ORCHESTRATOR_CALLS,
        } | here
        orchestrator = _remote(Orchestrator, **orchestrator_options).remote(orders, RayHands(name))
        started.append(orchestrator)
        options = {"name": _compute(name), "max_concurrency": _MAX_STREAMS, "num_gpus": num_gpus} | here
        compute = _remote(ComputeActor, {CONTROL: 2}, **options).remote(compute_config, RayHome(name))
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
                assigned=tuple(placement[host_id]),
                index=index,
                num_hosts=num_hosts,
                num_threads=num_threads,
                num_slots=plan.slots[index],
                caching=caching,
                owner=owner,
            )
            started.append(_start_host(name, node, config))
        hosts = tuple(started[2:])
        host_reports = tuple(call(actor.report) for actor in hosts)
        remote_reports = tuple(call(orchestrator.remote_reports))
        remote = call(orchestrator.admit, call(compute.public_key))
        compute_report = call(compute.attach, addresses, remote)
        call(orchestrator.record_survivors, compute_report.arenas)
        if is_joined:
            call(orchestrator.watch)
    except BaseException:
        _kill(started)
        raise
    return Actors(compute, hosts, orchestrator, compute_report, host_reports, remote_reports)


def finish_actors(actors: Actors) -> None:
    """Let the compute actor write what it recorded; an engine that is broken is ended all the same."""
    with suppress(MorayError, GetTimeoutError, RayTaskError):
        fetch(lambda: ray.get(actors.compute.finish.options(concurrency_group=CONTROL).remote(), timeout=_FINISH_S))


def stop_actors(actors: Actors) -> None:
    """End the actors. Their memory is gone with their processes."""
    _kill([actors.compute, *actors.hosts, actors.orchestrator])


def host_stats(actors: Actors) -> tuple[HostStats, ...]:
    """Of all hosts that answer: those of this node, then the others."""
    stats = [call(host.stats) for host in actors.hosts]
    for host in actors.remote_hosts():
        with suppress(GetTimeoutError, ClusterError):
            stats.append(call(host.stats, timeout_s=_REMOTE_STATS_S))
    return tuple(stats)


def engine_statuses() -> dict[str, EngineStatus]:
    """Of every engine of the cluster that answers, by the engine's name."""
    ending, found = _orchestrator(""), {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == ray_session.NAMESPACE and actor["name"].endswith(ending):
            with suppress(GetTimeoutError, RayError, ValueError):  # it ends meanwhile
                orchestrator: Any = ray.get_actor(actor["name"], ray_session.NAMESPACE)
                name = actor["name"].removesuffix(ending)
                found[name] = ray.get(orchestrator.status.remote(), timeout=_REMOTE_STATS_S)
    return found


def run_on(node: NodeInfo, function: Callable[..., T], *args: object) -> T:
    """Run a module's function on a node, in a process of its own. Raises MorayError as it was raised there."""
    [result] = _results([(node, _task(node, function).remote(*args))])
    return cast(T, result)


class RayHands:
    """What the orchestrator has done by Ray."""

    def __init__(self, engine: str) -> None:
        self._engine = engine

    def living_nodes(self) -> list[NodeInfo]:
        return ray_session.living_nodes()

    def survey(self, nodes: Sequence[tuple[NodeInfo, NodeOrders]]) -> list[NodeReport]:
        return _results([(node, _task(node, survey).remote(orders)) for node, orders in nodes])

    def start_host(self, node: NodeInfo, config: HostConfig) -> Any:
        return _start_host(self._engine, node, config)

    def report(self, host: Any) -> HostReport:
        try:
            report: HostReport = fetch(lambda: ray.get(host.report.remote(), timeout=_REMOTE_START_S))
        except GetTimeoutError as error:
            raise ClusterError(f"an expert host did not start within {_REMOTE_START_S:g} s; see `ray logs`") from error
        return report

    def admit(self, host: Any, client_key: str) -> None:
        with suppress(GetTimeoutError, ClusterError):  # it asks by itself when it is restarted
            fetch(lambda: ray.get(host.admit.remote(client_key), timeout=_REMOTE_STATS_S))

    def stop(self, host: Any) -> None:
        ray.kill(host)

    def meet(self, address: HostAddress) -> None:
        self._control("meet", address)

    def part(self, host_id: str) -> None:
        self._control("part", host_id)

    def links(self) -> Sequence[RemoteStats]:
        try:
            found: tuple[RemoteStats, ...] = ray.get(self._control("remote_stats"), timeout=_REMOTE_STATS_S)
        except (GetTimeoutError, RayError, ValueError):  # it starts, or has ended
            return ()
        return found

    def _control(self, method: str, *args: object) -> Any:
        compute: Any = ray.get_actor(_compute(self._engine))
        return getattr(compute, method).options(concurrency_group=CONTROL).remote(*args)


class RayHome:
    """What actors ask Ray and the orchestrator of their engine."""

    def __init__(self, engine: str) -> None:
        self._engine = engine

    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def survivor(self, host_id: str) -> ArenaRef | None:
        found: ArenaRef | None = ray.get(self._orchestrator().survivor.remote(host_id))
        return found

    def client_keys(self) -> list[str]:
        return list(ray.get(self._orchestrator().client_keys.remote()))

    def announce(self, address: HostAddress) -> None:
        self._orchestrator().announce.remote(address)

    def _orchestrator(self) -> Any:
        return ray.get_actor(_orchestrator(self._engine))


def call(method: Any, *args: object, timeout_s: float | None = None) -> Any:
    """Call an actor's method and wait. Raises our own errors as they were raised there, GetTimeoutError."""
    return fetch(lambda: ray.get(method.remote(*args), timeout=timeout_s))


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


def _orchestrator(engine: str) -> str:
    return f"{engine}-orchestrator"


def _compute(engine: str) -> str:
    return f"{engine}-compute"


def _on(node: NodeInfo) -> dict[str, Any]:
    return {"label_selector": {_NODE_LABEL: node.node_id}}


def _start_host(engine: str, node: NodeInfo, config: HostConfig) -> Any:
    name = f"{engine}-{config.address.host_id}-{node.node_id[:8]}"  # a node may come back before its old host is gone
    options: dict[str, Any] = {"name": name, "max_restarts": -1, "max_concurrency": _HOST_CALLS}
    return _remote(ExpertHost, **options, **_on(node)).remote(config, RayHome(engine))


def _task(node: NodeInfo, function: Callable[..., Any]) -> Any:
    remote: Any = ray.remote
    return remote(function).options(num_cpus=0, max_retries=0, **_on(node))


def _results(tasks: Sequence[tuple[NodeInfo, Any]]) -> list[Any]:
    """Wait for tasks on nodes. Raises the first error, naming the node if it is not ours."""
    results = []
    for node, reference in tasks:
        try:
            results.append(fetch(partial(ray.get, reference, timeout=_TASK_S)))
        except GetTimeoutError as error:
            raise ClusterError(
                f"node {node.name} ran no task within {_TASK_S:g} s; is its Ray process alive?"
            ) from error
        except RayError as error:
            raise ClusterError(
                f"node {node.name} cannot run moray ({_first_line(error)}); install the same version of moray there, "
                "in the Python that its Ray was started from"
            ) from error
    return results


def _kill(actors: list[Any]) -> None:
    for actor in reversed(actors):
        ray.kill(actor)
