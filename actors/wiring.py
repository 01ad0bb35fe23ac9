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
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from moray.actors.compute import ComputeActor
from moray.actors.guard import Owner
from moray.actors.host import ExpertHost
from moray.actors.ledger import COMPUTE, StartOrders
from moray.actors.messages import Caching, ComputeConfig, ComputeReport, HostConfig, HostReport
from moray.actors.orchestrator import Orchestrator
from moray.cluster.client import HostAddress
from moray.cluster.ray_session import NAMESPACE
from moray.runtime.arena import ArenaRef
from moray.runtime.errors import ActorLostError, MorayError
from moray.runtime.events import Event
from moray.runtime.layout.packed import Numerics
from moray.runtime.planning.plan import MemoryPlan

T = TypeVar("T")

MAX_STREAMS = 64
_FINISH_S = 10.0
_KEEPER_CALLS = 8
_HOST_CALLS = 4  # statistics while somebody waits for the arena to fill
#: Concurrency group of short calls to the compute actor: they never wait behind streams.
CONTROL = "control"
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
class OrchestratorLedger:
    """The ledger, through whichever process is the orchestrator now."""

    orchestrator: str

    def starting(self, actor: str, pid: int) -> StartOrders:
        orders: StartOrders = call(self._actor().starting, actor, pid)
        return orders

    def compute_ready(self, arenas: dict[str, ArenaRef]) -> None:
        call(self._actor().compute_ready, arenas)

    def note(self, events: Sequence[Event], *, wait: bool = False) -> None:
        reference = self._actor().note.remote(tuple(events))
        if wait:
            fetch(lambda: ray.get(reference))

    def _actor(self) -> Any:
        return ray.get_actor(self.orchestrator)


@dataclass(frozen=True, slots=True)
class Actors:
    """Handles of a running engine, and what its actors reported."""

    compute: Any
    hosts: tuple[Any, ...]
    orchestrator: Any
    compute_report: ComputeReport
    host_reports: tuple[HostReport, ...]
    memory: KeyValueMemory
    ledger: OrchestratorLedger

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
        memory, ledger = KeyValueMemory(name), OrchestratorLedger(f"{name}-orchestrator")
        supervised: dict[str, Any] = {"max_restarts": _FOR_EVER} | here
        options = supervised | {"name": ledger.orchestrator, "max_task_retries": _FOR_EVER}
        orchestrator = _remote(Orchestrator, **options).remote(store_path, host_ids, owner, memory)
        started.append(orchestrator)
        options = supervised | {"name": f"{name}-{COMPUTE}", "max_concurrency": MAX_STREAMS, "num_gpus": num_gpus}
        slots, on_device, limits = (plan.num_slots, plan.device_expert_bytes, plan.limits) if plan else (None,) * 3
        compute_config = ComputeConfig(
            store_path, numerics, device, num_threads, owner, caching, slots, lanes, on_device, limits
        )
        compute = _remote(ComputeActor, {CONTROL: 2}, **options).remote(compute_config, _node_id, ledger)
        started.append(compute)
        placement = call(orchestrator.placement)
        # Abstract sockets: no files, and gone with their processes.
        addresses = [HostAddress(host_id, f"ipc://@moray-{name}-{host_id}", token) for host_id in host_ids]
        for index, address in enumerate(addresses):
            keys = tuple(placement[address.host_id])
            num_slots = plan.slots[index] if plan else len(keys)
            config = HostConfig(address, store_path, keys, index, num_hosts, num_threads, num_slots, caching, owner)
            host_options: dict[str, Any] = {
                "name": f"{name}-{address.host_id}",
                "max_concurrency": _HOST_CALLS,
            } | supervised
            started.append(_remote(ExpertHost, **host_options).remote(config, _node_id, ledger))
        hosts = tuple(started[2:])
        host_reports = tuple(call(actor.report) for actor in hosts)
        compute_report = call(compute.attach, addresses)
        call(orchestrator.record_hosts, addresses)
    except BaseException:
        _kill(started)
        raise
    return Actors(compute, hosts, orchestrator, compute_report, host_reports, memory, ledger)


def keep(kind: type, name: str, *args: object) -> Any:
    """The one actor of this name, started if there is none. It outlives this process, and ends with the cluster."""
    options: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return _remote(kind, max_concurrency=_KEEPER_CALLS, **options).remote(*args)


def find_kept(name: str) -> Any | None:
    """The actor that ``keep`` started under this name, if it lives."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
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


def call(method: Any, *args: object) -> Any:
    """Call an actor's method and wait. Raises our own errors as they were raised there."""
    return fetch(lambda: ray.get(method.remote(*args)))


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
    except RayActorError as error:
        raise ActorLostError(
            f"an actor of the engine is gone ({_first_line(error)}); start the engine again"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _remote(kind: type, groups: dict[str, int] | None = None, **options: Any) -> Any:
    remote: Any = ray.remote  # its types know neither concurrency groups nor plain classes
    made = (remote(concurrency_groups=groups) if groups else remote)(kind)
    return made.options(num_cpus=0, **options)


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _kill(actors: list[Any]) -> None:
    for actor in reversed(actors):
        ray.kill(actor)
