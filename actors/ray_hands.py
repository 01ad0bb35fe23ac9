"""What the orchestrator has done by Ray: nodes looked at, hosts started, told and ended."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from moray.actors.calls import CONTROL, PART, fetch
from moray.actors.messages import HostConfig, HostReport, NodeOrders, NodeSurvey
from moray.actors.ray_home import compute_name, find, host_name
from moray.actors.spawn import run_on, run_on_all, start_host
from moray.actors.survey import survey
from moray.cluster import ray_session
from moray.cluster.client import HostAddress
from moray.cluster.nodes import NodeInfo
from moray.cluster.remote_host import RemoteStats
from moray.cluster.replicas import ExpertUse
from moray.cluster.topology import NodeReport, measure_node
from moray.runtime.errors import ClusterError
from moray.runtime.layout.shard import ExpertKey

_START_S = 300.0  # for a host on another node: it maps its arena; shards are loaded in the background
_TELL_S = 2.0  # a node that is cut off is not waited for


class RayHands:
    """The orchestrator's ``Hands`` for an engine."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._found: dict[tuple[str, str], Any] = {}

    def living_nodes(self) -> list[NodeInfo]:
        return ray_session.living_nodes()

    def survey(self, nodes: Sequence[tuple[NodeInfo, NodeOrders]]) -> list[NodeSurvey]:
        return run_on_all([(node, (orders,)) for node, orders in nodes], survey)

    def measure(self, node: NodeInfo, store_path: str) -> NodeReport:
        return run_on(node, measure_node, store_path)

    def start_host(self, node: NodeInfo, config: HostConfig) -> Any:
        return start_host(self._engine, node, config)

    def find_host(self, node: NodeInfo, host_id: str) -> Any:
        if (node.node_id, host_id) not in self._found:
            self._found[node.node_id, host_id] = find(host_name(self._engine, node, host_id))
        return self._found[node.node_id, host_id]

    def report(self, host: Any) -> HostReport:
        try:
            report: HostReport = fetch(lambda: ray.get(host.report.remote(), timeout=_START_S))
        except GetTimeoutError as error:
            raise ClusterError(f"an expert host did not start within {_START_S:g} s; see `ray logs`") from error
        return report

    def admit(self, host: Any, client_key: str) -> None:
        with suppress(GetTimeoutError, ClusterError):  # it asks by itself when it is restarted
            fetch(lambda: ray.get(host.admit.remote(client_key), timeout=_TELL_S))

    def assign(self, host: Any, keys: Sequence[ExpertKey]) -> None:
        with suppress(GetTimeoutError, ClusterError):  # it is told when it is restarted
            reference = host.assign.options(concurrency_group=PART).remote(tuple(keys))
            fetch(lambda: ray.get(reference, timeout=_TELL_S))

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
            found: tuple[RemoteStats, ...] = ray.get(self._control("remote_stats"), timeout=_TELL_S)
        except (GetTimeoutError, RayError, ValueError):  # it starts, or has ended
            return ()
        return found

    def expert_use(self) -> ExpertUse | None:
        try:
            found: ExpertUse = ray.get(self._control("expert_use"), timeout=_TELL_S)
        except (GetTimeoutError, RayError, ValueError, ClusterError):  # it starts, or has ended
            return None
        return found

    def replicate(self, host: Any, keys: Sequence[ExpertKey]) -> None:
        host.replicate.options(concurrency_group=PART).remote(tuple(keys))

    def _control(self, method: str, *args: object) -> Any:
        compute: Any = find(compute_name(self._engine))
        return getattr(compute, method).options(concurrency_group=CONTROL).remote(*args)
