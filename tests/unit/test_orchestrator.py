"""The orchestrator without Ray: what hosts are told as nodes come, go, and cannot be used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moray.actors import orchestrator as module
from moray.actors import replication
from moray.actors.messages import Caching, EngineOrders, HostConfig, HostPart, HostReport, NodeOrders, NodeSurvey
from moray.actors.orchestrator import Orchestrator
from moray.cluster.client import HostAddress
from moray.cluster.identity import identity_of
from moray.cluster.nodes import NodeInfo
from moray.cluster.remote_host import RemoteStats
from moray.cluster.replicas import ExpertUse
from moray.cluster.topology import ComputeSpeed, NodeReport
from moray.runtime.arena import ArenaRef
from moray.runtime.errors import StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

HERE = NodeInfo("0", {"role": "compute"}, 0, "here", "10.0.0.1")
LOCAL = {"host-0": 16}
SPEED = ComputeSpeed(1e10, 1e11)


def node(name: str, start: int = 0) -> NodeInfo:
    return NodeInfo(f"{name}{start}", {"role": "host"}, 0, name, "10.0.0.2", start)


class KeptState:
    """An engine's ledger."""

    state: bytes | None = None

    def keep(self, state: bytes) -> None:
        self.state = state

    def recall(self) -> bytes | None:
        return self.state


class Hosts:
    """``Hands`` whose nodes all have 16 slots and whose hosts are what they were told last."""

    def __init__(self, store: Store) -> None:
        self.store, self.nodes, self.bad_node = store, [HERE], ""
        self.engine: Orchestrator
        self.parts: dict[str, tuple[ExpertKey, ...]] = {}
        self.peers: dict[str, set[str]] = {}
        self.copied: dict[str, tuple[ExpertKey, ...]] = {}
        self.num_measured, self.num_looks = 0, 0
        self.changed = threading.Condition()

    def living_nodes(self) -> list[NodeInfo]:
        return self.nodes

    def survey(self, nodes: Sequence[tuple[NodeInfo, NodeOrders]]) -> list[NodeSurvey]:
        if any(asked.name == self.bad_node for asked, _ in nodes):
            raise StoreError(f"on node {self.bad_node}: nothing is there")
        return [NodeSurvey(identity_of(self.store), 16, self._report()) for _ in nodes]

    def measure(self, node: NodeInfo, store_path: str) -> NodeReport:
        assert (node, store_path) == (HERE, str(self.store.path))
        self.num_measured += 1
        return self._report()

    def start_host(self, node: NodeInfo, config: HostConfig) -> HostAddress:
        return replace(config.address, address=f"tcp://{node.address}:1", server_key=node.node_id)

    def start(self, address: HostAddress) -> None:
        """A host's process begins to serve."""
        self._take(address.host_id, self.engine.announce(address))

    def find_host(self, node: NodeInfo, host_id: str) -> HostAddress:
        return HostAddress(host_id, "", "", node.name)

    def report(self, host: HostAddress) -> HostReport:
        self.start(host)
        return HostReport(host.host_id, "", 0, host, 0, 0, ArenaRef(0, 0, 0), 0.0)

    def admit(self, host: HostAddress, client_key: str) -> None: ...

    def assign(self, host: HostAddress, keys: Sequence[ExpertKey]) -> None:
        with self.changed:
            self.parts[host.host_id] = tuple(keys)
            self.changed.notify_all()

    def set_peers(self, host: HostAddress, peers: Sequence[HostAddress]) -> None:
        with self.changed:
            self.peers[host.host_id] = {peer.host_id for peer in peers}
            self.changed.notify_all()

    def stop(self, host: HostAddress) -> None:
        with self.changed:
            self.parts.pop(host.host_id, None)
            self.peers.pop(host.host_id, None)

    def meet(self, address: HostAddress) -> None: ...

    def part(self, host_id: str) -> None: ...

    def links(self) -> Sequence[RemoteStats]:
        return []

    def expert_use(self) -> ExpertUse:
        """Those on other nodes are used ever more."""
        self.num_looks += 1
        layers = [layer.num_experts for layer in self.store.manifest.layers]
        here = [np.zeros(count, dtype=np.bool_) for count in layers]
        for key in (key for host_id in LOCAL for key in self.parts[host_id]):
            here[key.layer][key.expert] = True
        uses = tuple(np.where(each, 0, 100 * self.num_looks) for each in here)
        return ExpertUse(uses, tuple(here), tuple(~each for each in here))

    def replicate(self, host: HostAddress, keys: Sequence[ExpertKey]) -> None:
        with self.changed:
            self.copied[host.host_id] = tuple(keys)
            self.changed.notify_all()

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """The end of pytest's patience is the limit."""
        with self.changed:
            while not is_so():
                self.changed.wait(0.01)

    def is_settled(self, names: set[str], num_experts: int) -> bool:
        """Whether these hosts know each other and hold so many experts together, none more than it has memory for."""
        held = {key for keys in self.parts.values() for key in keys}
        fits = all(len(keys) <= LOCAL.get(host_id, 16) for host_id, keys in self.parts.items())
        return self.peers == {name: names - {name} for name in names} and len(held) == num_experts and fits

    def _take(self, host_id: str, part: HostPart) -> None:
        with self.changed:
            self.parts[host_id] = part.assigned
            self.peers[host_id] = {peer.host_id for peer in part.peers}
            self.changed.notify_all()

    def _report(self) -> NodeReport:
        return NodeReport(1 << 30, 4, "", SPEED, 1e9)


@pytest.mark.timeout(120)
def test_hosts_are_told_their_part_and_of_each_other_as_nodes_come_and_go(
    demo: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """16 slots a node and 48 experts: three nodes hold all, two 32."""
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    monkeypatch.setattr(replication, "_INTERVAL_S", 0.01)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    orders = EngineOrders(
        str(demo.path), HERE, LOCAL, {}, "token", Caching("lru", "auto", whole_layers=False, trace=None), None
    )
    hands, memory = Hosts(demo), KeptState()
    hands.engine = engine = Orchestrator(orders, hands, memory)
    alone = engine.open()
    assert sum(map(len, alone.values())) == 16 and not hands.num_measured
    for host_id in LOCAL:
        hands.start(HostAddress(host_id, "tcp://10.0.0.1:1", "token", "here", host_id))
    engine.watch()

    hands.nodes = [HERE, node("a")]
    hands.wait_for(lambda: hands.is_settled({*LOCAL, "host-a"}, 32))
    assert {host_id: hands.parts[host_id] for host_id in LOCAL} == alone  # what is in memory stays there
    hands.wait_for(lambda: set(hands.copied) == {*LOCAL})
    assert not {*hands.copied["host-0"]} & {*alone["host-0"]} and len(hands.copied["host-0"]) == 16
    first = dict(hands.parts)
    hands.nodes = [HERE, node("a"), node("b")]
    hands.wait_for(lambda: hands.is_settled({*LOCAL, "host-a", "host-b"}, 48))
    assert {key for host_id in first for key in hands.parts[host_id]} == {k for keys in first.values() for k in keys}

    hands.nodes = [HERE, node("b")]
    hands.wait_for(lambda: hands.is_settled({*LOCAL, "host-b"}, 32))
    hands.nodes = [HERE, node("b", 1), node("a", 1)]  # one is back, one was started anew meanwhile
    hands.wait_for(lambda: hands.is_settled({*LOCAL, "host-a", "host-b"}, 48))
    assert hands.num_measured == 1

    hands.bad_node, hands.nodes = "c", [HERE, node("b", 1), node("a", 1), node("c")]
    hands.wait_for(lambda: any(host.state == "refused" for host in engine.status().remote_hosts))
    assert hands.is_settled({*LOCAL, "host-a", "host-b"}, 48)
    status = engine.status()
    assert status.local_hosts == {host_id: len(hands.parts[host_id]) for host_id in LOCAL}
    assert sum(host.num_experts for host in status.remote_hosts) == sum(len(hands.parts[f"host-{n}"]) for n in "ab")

    # The orchestrator is restarted, and remote hosts with it; those here are still there.
    hands.nodes = [HERE]
    hands.wait_for(lambda: hands.is_settled({*LOCAL}, 16))
    hands.parts["host-0"] = ()
    hands.engine = Orchestrator(orders, hands, memory)
    hands.wait_for(lambda: hands.is_settled({*LOCAL}, 16))
    hands.nodes = [HERE, node("a", 2)]
    hands.wait_for(lambda: hands.is_settled({*LOCAL, "host-a"}, 32))
