"""Every actor of an engine, and every Ray option they have. No other module makes actors.

The classes themselves are plain. Options worth knowing:
- ``num_cpus=0``: threads are set explicitly, and an engine must start on a machine whose CPU slots Ray thinks taken;
- ``max_restarts=-1``: a lost actor comes back by itself, with what the orchestrator's ledger says of the others;
- ``max_task_retries=-1`` for the orchestrator: calls of it are made again when it is back, so its methods may be
  called twice;
- ``max_concurrency`` for the compute actor: streams, cancels and statistics at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from moray.actors.compute import ComputeActor
from moray.actors.guard import Owner
from moray.actors.host import ExpertHost
from moray.actors.ledger import COMPUTE, StartOrders
from moray.actors.messages import (
    Caching,
    ComputeConfig,
    ComputeReport,
    EngineOrders,
    EngineStatus,
    HostConfig,
    HostPart,
    HostReport,
    NodeOrders,
    NodeSurvey,
)
from moray.actors.orchestrator import Orchestrator
from moray.actors.probe import NodeProbe
from moray.actors.survey import survey
from moray.cluster import ray_session
from moray.cluster.client import HostAddress
from moray.cluster.nodes import NodeInfo
from moray.cluster.placement import place_evenly
from moray.cluster.remote_host import RemoteStats
from moray.cluster.topology import NodeReport, Topology, measure_node
from moray.runtime.arena import ArenaRef
from moray.runtime.errors import ActorLostError, ClusterError, MorayError
from moray.runtime.events import Event
from moray.runtime.experts.shard_host import HostStats
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.planning.plan import MemoryPlan
from moray.runtime.store.manifest import Manifest

T = TypeVar("T")

MAX_STREAMS = 64
_FINISH_S = 10.0
_KEEPER_CALLS = 8
_HOST_CALLS = 4  # statistics while somebody waits for the arena to fill
_ORCHESTRATOR_CALLS = 8  # hosts that start ask it while others wait for them
_TASK_S = 120.0  # for a task on another node: a worker starts there and imports moray
_REMOTE_START_S = 300.0  # for a host there: it maps its arena; shards are loaded in the background
_REMOTE_STATS_S = 2.0  # a node that is cut off is left out of statistics
#: Concurrency group of short calls to the compute actor: they never wait behind streams.
CONTROL = "control"
#: Concurrency group of a host's changes of part: one after the other.
PART = "part"
_FOR_EVER = -1
_KV_NAMESPACE = b"moray"
_NODE_LABEL = "ray.io/node-id"  # every node has this label from Ray


@dataclass(frozen=True, slots=True)
class KeyValueMemory:
    """An engine's ledger in the key-value store of Ray's control service, which outlives all actors."""

    engine: str

    def keep(self, state: bytes) -> None:
        _internal_kv_put(self.engine.encode(), state, overwrite=True, namespace=_KV_NAMESPACE)

    def recall(self) -> bytes | None:
        state: bytes | None = _internal_kv_get(self.engine.encode(), namespace=_KV_NAMESPACE)
        return state

    def forget(self) -> None:
        _internal_kv_del(self.engine.encode(), namespace=_KV_NAMESPACE)


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
        supervised: dict[str, Any] = {"max_restarts": _FOR_EVER} | _on(node)
        orchestrator_options: dict[str, Any] = (
            {
                "max_concurrency": _ORCHESTRATOR_CALLS,
                "max_task_retries": _FOR_EVER,
            }
            | supervised
            | _named(_orchestrator(name))
        )
        orchestrator = _remote(Orchestrator, **orchestrator_options).remote(orders, RayHands(name), memory)
        started.append(orchestrator)
        options = supervised | _named(_compute(name)) | {"max_concurrency": MAX_STREAMS, "num_gpus": num_gpus}
        compute = _remote(ComputeActor, {CONTROL: 2}, **options).remote(compute_config, home)
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
            started.append(_start_host(name, node, config))
        hosts = tuple(started[2:])
        host_reports = tuple(call(actor.report) for actor in hosts)
        remote_reports = tuple(call(orchestrator.remote_reports))
        remote = call(orchestrator.admit, call(compute.public_key))
        compute_report = call(compute.attach, addresses, remote)
        call(orchestrator.record_hosts, addresses)
        if is_joined:
            call(orchestrator.watch)
    except BaseException:
        _kill(started)
        raise
    return Actors(compute, hosts, orchestrator, compute_report, host_reports, remote_reports, memory, home)


def keep(kind: type, name: str, *args: object) -> Any:
    """The one actor of this name, started on this node if there is none. It outlives this process, not the cluster."""
    options: dict[str, Any] = {
        "lifetime": "detached",
        "get_if_exists": True,
        "label_selector": {_NODE_LABEL: ray_session.this_node()},
    } | _named(name)
    return _remote(kind, max_concurrency=_KEEPER_CALLS, **options).remote(*args)


def find_kept(name: str) -> Any | None:
    """The actor that ``keep`` started under this name, if it lives."""
    try:
        return _find(name)
    except ValueError:
        return None


def finish_actors(actors: Actors) -> None:
    """Let the compute actor write what it recorded; an engine that is broken is ended all the same."""
    with suppress(MorayError, GetTimeoutError, RayTaskError):
        fetch(lambda: ray.get(actors.compute.finish.options(concurrency_group=CONTROL).remote(), timeout=_FINISH_S))


def stop_actors(actors: Actors) -> None:
    """End the actors. Their memory is gone with their processes."""
    _kill([actors.compute, *actors.hosts, actors.orchestrator])
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
    ending, found = _orchestrator(""), {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == ray_session.NAMESPACE and actor["name"].endswith(ending):
            with suppress(GetTimeoutError, RayError, ValueError):  # it ends meanwhile
                orchestrator = _find(actor["name"])
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
        self._found: dict[tuple[str, str], Any] = {}

    def living_nodes(self) -> list[NodeInfo]:
        return ray_session.living_nodes()

    def survey(self, nodes: Sequence[tuple[NodeInfo, NodeOrders]]) -> list[NodeSurvey]:
        return _results([(node, _task(node, survey).remote(orders)) for node, orders in nodes])

    def measure(self, node: NodeInfo, store_path: str) -> NodeReport:
        return run_on(node, measure_node, store_path)

    def start_host(self, node: NodeInfo, config: HostConfig) -> Any:
        return _start_host(self._engine, node, config)

    def find_host(self, node: NodeInfo, host_id: str) -> Any:
        if (node.node_id, host_id) not in self._found:
            self._found[node.node_id, host_id] = _find(_host(self._engine, node, host_id))
        return self._found[node.node_id, host_id]

    def report(self, host: Any) -> HostReport:
        try:
            report: HostReport = fetch(lambda: ray.get(host.report.remote(), timeout=_REMOTE_START_S))
        except GetTimeoutError as error:
            raise ClusterError(f"an expert host did not start within {_REMOTE_START_S:g} s; see `ray logs`") from error
        return report

    def admit(self, host: Any, client_key: str) -> None:
        with suppress(GetTimeoutError, ClusterError):  # it asks by itself when it is restarted
            fetch(lambda: ray.get(host.admit.remote(client_key), timeout=_REMOTE_STATS_S))

    def assign(self, host: Any, keys: Sequence[ExpertKey]) -> None:
        with suppress(GetTimeoutError, ClusterError):  # it is told when it is restarted
            reference = host.assign.options(concurrency_group=PART).remote(tuple(keys))
            fetch(lambda: ray.get(reference, timeout=_REMOTE_STATS_S))

    def set_peers(self, host: Any, peers: Sequence[HostAddress]) -> None:
        host.set_peers.options(concurrency_group=PART).remote(tuple(peers))

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
        compute = _find(_compute(self._engine))
        return getattr(compute, method).options(concurrency_group=CONTROL).remote(*args)


@dataclass(frozen=True, slots=True)
class RayHome:
    """What actors ask Ray and their engine's orchestrator, whichever process that is now."""

    engine: str

    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def starting(self, actor: str, pid: int) -> StartOrders:
        orders: StartOrders = call(self._actor().starting, actor, pid)
        return orders

    def compute_ready(self, arenas: dict[str, ArenaRef]) -> None:
        call(self._actor().compute_ready, arenas)

    def note(self, events: Sequence[Event], *, wait: bool = False) -> None:
        reference = self._actor().note.remote(tuple(events))
        if wait:
            fetch(lambda: ray.get(reference))

    def client_keys(self) -> list[str]:
        return list(call(self._actor().client_keys))

    def admit(self, client_key: str) -> list[HostAddress]:
        return list(call(self._actor().admit, client_key))

    def announce(self, address: HostAddress) -> HostPart:
        part: HostPart = call(self._actor().announce, address)
        return part

    def _actor(self) -> Any:
        return _find(_orchestrator(self.engine))


def call(method: Any, *args: object, timeout_s: float | None = None) -> Any:
    """Call an actor's method and wait. Raises our own errors as they were raised there, GetTimeoutError."""
    return fetch(lambda: ray.get(method.remote(*args), timeout=timeout_s))


def fetch(get: Callable[[], T]) -> T:
    """What ``get`` gives. Raises our own errors as they were raised in the actor."""
    with our_errors():
        return get()


@contextmanager
def our_errors() -> Iterator[None]:
    """Map Ray's errors to ours, at this one edge."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, MorayError):
            raise error.cause from None
        raise
    except (RayActorError, ActorUnschedulableError) as error:  # the second: its node is gone
        raise ActorLostError(
            f"an actor of the engine is gone ({_first_line(error)}); start the engine again"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _remote(kind: type, groups: dict[str, int] | None = None, **options: Any) -> Any:
    remote: Any = ray.remote  # its types know neither concurrency groups nor plain classes
    made = (remote(concurrency_groups=groups) if groups else remote)(kind)
    return made.options(num_cpus=0, **options)


def _named(name: str) -> dict[str, Any]:
    """In a namespace of our own, whatever that of the program is that starts the engine: Serve has another."""
    return {"name": name, "namespace": ray_session.NAMESPACE}


def _find(name: str) -> Any:
    """Raises ValueError if there is no such actor."""
    return ray.get_actor(name, ray_session.NAMESPACE)


def _orchestrator(engine: str) -> str:
    return f"{engine}-orchestrator"


def _compute(engine: str) -> str:
    return f"{engine}-{COMPUTE}"


def _on(node: NodeInfo) -> dict[str, Any]:
    return {"label_selector": {_NODE_LABEL: node.node_id}}


def _start_host(engine: str, node: NodeInfo, config: HostConfig) -> Any:
    name = _host(engine, node, config.address.host_id)
    options = _named(name) | {"max_restarts": _FOR_EVER, "max_concurrency": _HOST_CALLS}
    return _remote(ExpertHost, {PART: 1}, **options, **_on(node)).remote(config, RayHome(engine))


def _host(engine: str, node: NodeInfo, host_id: str) -> str:
    return f"{engine}-{host_id}-{node.node_id[:8]}"  # a node may come back before its old host is gone


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
