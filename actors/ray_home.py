"""What actors ask of Ray and of their engine, whichever process that is now; the names that they are found by."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RpcError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from moray.actors.calls import call, fetch
from moray.actors.ledger import COMPUTE, StartOrders
from moray.actors.messages import HostPart
from moray.cluster import ray_session
from moray.cluster.client import HostAddress
from moray.cluster.nodes import NodeInfo
from moray.runtime.arena import ArenaRef
from moray.runtime.events import Event

_KV_NAMESPACE = b"moray"
_FORGET_S = 2.0


def named(name: str) -> dict[str, Any]:
    """The options of an actor's name: in moray's namespace, whatever that of the program that starts it (Serve's)."""
    return {"name": name, "namespace": ray_session.NAMESPACE}


def find(name: str) -> Any:
    """The actor of this name. Raises ValueError if there is none."""
    return ray.get_actor(name, namespace=ray_session.NAMESPACE)


def orchestrator_name(engine: str) -> str:
    return f"{engine}-orchestrator"


def compute_name(engine: str) -> str:
    return f"{engine}-{COMPUTE}"


def host_name(engine: str, node: NodeInfo, host_id: str) -> str:
    return f"{engine}-{host_id}-{node.node_id[:8]}"  # a node may come back before its old host is gone


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
        """What does not answer any more has nothing to forget, and Ray would wait for it for a minute."""
        connected: Any = ray._private.worker.global_worker
        with suppress(RpcError):
            connected.gcs_client.internal_kv_del(self.engine.encode(), False, _KV_NAMESPACE, timeout=_FORGET_S)


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
        return find(orchestrator_name(self.engine))
