"""The orchestrator: where experts live, which nodes hold them, and what outlives its actors. Never waited for by a
layer.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any, Protocol

from moray.actors.guard import exit_with
from moray.actors.ledger import Ledger, Memory, StartOrders
from moray.actors.messages import (
    EngineOrders,
    EngineStatus,
    HostConfig,
    HostPart,
    HostReport,
    NodeOrders,
    NodeSurvey,
    OrchestratorReport,
    RemoteHostStatus,
)
from moray.actors.replication import ReplicationHands, replicate
from moray.cluster.client import HostAddress
from moray.cluster.identity import check_identity, identity_of
from moray.cluster.live_placement import LivePlacement
from moray.cluster.membership import Drop, Member, Membership
from moray.cluster.nodes import NodeInfo
from moray.cluster.placement import HostSpec
from moray.cluster.remote_host import RemoteStats
from moray.cluster.topology import ASSUMED_LINK, ComputeSpeed, LinkReport, NodeReport
from moray.runtime.arena import ArenaRef
from moray.runtime.errors import ClusterError, MorayError
from moray.runtime.events import Event
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

_POLL_S = 1.0  # between two looks at Ray's nodes
_log = logging.getLogger("moray.orchestrator")


class Hands(ReplicationHands, Protocol):
    """What the orchestrator has done for it, through Ray. All raise MorayError, ClusterError after a deadline."""

    def living_nodes(self) -> list[NodeInfo]: ...

    def survey(self, nodes: Sequence[tuple[NodeInfo, NodeOrders]]) -> list[NodeSurvey]:
        """On the nodes themselves, all at once."""

    def measure(self, node: NodeInfo, store_path: str) -> NodeReport:
        """On the node itself."""

    def start_host(self, node: NodeInfo, config: HostConfig) -> Any:
        """Returns a handle at once."""

    def report(self, host: Any) -> HostReport:
        """Waits until the host serves."""

    def admit(self, host: Any, client_key: str) -> None: ...

    def assign(self, host: Any, keys: Sequence[ExpertKey]) -> None: ...

    def set_peers(self, host: Any, peers: Sequence[HostAddress]) -> None:
        """Returns at once; what is told first is done first."""

    def stop(self, host: Any) -> None: ...

    def meet(self, address: HostAddress) -> None:
        """Tell the compute actor of a host that serves; returns at once."""

    def part(self, host_id: str) -> None:
        """Tell the compute actor of a host that is gone; returns at once."""

    def links(self) -> Sequence[RemoteStats]:
        """The remote hosts as the compute actor sees them; none if it does not answer soon."""


class Orchestrator:
    """One engine's plan, its remote hosts, and what it needs to bring a lost actor back: the ledger.

    Called from several threads; the lock is never held while waiting for another process.
    """

    def __init__(self, orders: EngineOrders, hands: Hands, memory: Memory) -> None:
        exit_with(orders.owner, end_ray=True)
        self._orders, self._hands = orders, hands
        self._lock = threading.RLock()
        self._members = Membership(orders.compute_node)
        self._placing = threading.Lock()  # one placement after the other is made and carried out
        self._here: ComputeSpeed | None = None
        self._surveys: dict[str, NodeSurvey] = {}  # of remote hosts that experts are placed on
        self._assigned: dict[str, tuple[ExpertKey, ...]] = {}
        self._handles: dict[str, Any] = {}  # of remote hosts
        self._addresses: dict[str, HostAddress] = {}  # of remote hosts
        self._ledger = Ledger(memory)
        if self._ledger.is_restarted:
            self._go_on()

    # ------------------------------------------------------------------------------- starting

    def open(self) -> dict[str, tuple[ExpertKey, ...]]:
        """Place the experts, and start hosts on the nodes that are there. Returns host id -> experts assigned to it.

        Without other nodes nothing is measured, and the compute node has all. Links cannot be measured yet: they are
        taken to be ASSUMED_LINK.

        Raises StoreError, ResourceError, ClusterError: a node without this store, without memory, of another version.
        """
        self._read_store()
        self._members.see(self._hands.living_nodes())
        members = self._members.members
        if members:
            self._survey(members)
            self._placement.place(self._speed_here(), self._specs([]))
        self._assigned = self._parts()
        for member in members:
            self._launch(member)
        return self._assigned

    def remote_reports(self) -> list[HostReport]:
        """What the hosts started by ``open`` report, once they serve. Raises what kept one from it."""
        return [self._await(member) for member in self._members.members]

    def admit(self, client_key: str) -> list[HostAddress]:
        """Let the holder of this public key connect to the remote hosts, later ones too. Returns where they are."""
        with self._lock:
            self._ledger.admit(client_key)
            handles, addresses = list(self._handles.values()), list(self._addresses.values())
        for host in handles:
            self._hands.admit(host, client_key)
        return addresses

    def watch(self) -> None:
        """From now on, use nodes that join or come back, and give up the hosts of nodes that have gone.

        What is used much on them is copied to the hosts of the compute node.
        """
        self._ledger.watch()
        threading.Thread(target=self._watch, name="moray-nodes", daemon=True).start()
        if self._orders.caching.replication:
            arguments = (self._hands, self._orders.compute_node, self._placement.owned, self._orders.local_slots)
            threading.Thread(target=replicate, args=arguments, name="moray-replication", daemon=True).start()

    def _go_on(self) -> None:
        """After a restart: remote hosts ended with the process before, and their nodes are as good as new ones."""
        self._read_store()
        self._enact()
        self._introduce()
        if self._ledger.watches:
            self.watch()

    def _read_store(self) -> None:
        with Store.open(self._orders.store_path) as store:
            self._identity = identity_of(store)
            self._placement = LivePlacement(store, self._orders.local_slots)

    # ------------------------------------------------------------------------------- asked by hosts

    def report(self) -> OrchestratorReport:
        return OrchestratorReport(os.getpid())

    def starting(self, actor: str, pid: int) -> StartOrders:
        return self._ledger.starting(actor, pid)

    def compute_ready(self, arenas: dict[str, ArenaRef]) -> None:
        self._ledger.compute_ready(arenas)

    def record_hosts(self, hosts: Sequence[HostAddress]) -> None:
        self._ledger.record_hosts(hosts)

    def note(self, events: Sequence[Event]) -> None:
        self._ledger.note(events)

    def events(self) -> tuple[Event, ...]:
        return self._ledger.events()

    def client_keys(self) -> list[str]:
        """Public keys that a remote host lets in."""
        return list(self._ledger.client_keys)

    def announce(self, address: HostAddress) -> HostPart:
        """A host serves the network here now: the first time, or after a restart, with another key."""
        host_id = address.host_id
        if is_local := host_id in self._orders.local_slots:
            self._ledger.reach(address)
        with self._lock:
            if not is_local:
                self._addresses[host_id] = address
                if self._ledger.client_keys:
                    self._hands.meet(address)
            self._introduce(host_id)
            return HostPart(self._assigned.get(host_id, ()), self._peers_of(host_id))

    # ------------------------------------------------------------------------------- asked by people

    def remote_hosts(self) -> list[Any]:
        """Handles of the remote hosts that run."""
        with self._lock:
            return [self._handles[m.host_id] for m in self._members.members if m.state == "running"]

    def status(self) -> EngineStatus:
        links = {link.host_id: link for link in self._hands.links()}
        with self._lock:
            members, addresses, assigned = self._members.members, dict(self._addresses), self._assigned
        remote = tuple(
            RemoteHostStatus(
                host_id=member.host_id,
                node=member.node.name,
                state=member.state,
                reason=member.reason,
                address=addresses[member.host_id].address if member.host_id in addresses else "",
                num_experts=len(assigned.get(member.host_id, ())),
                link=links.get(member.host_id),
            )
            for member in members
        )
        local = {host_id: len(assigned[host_id]) for host_id in self._orders.local_slots}
        return EngineStatus(self._orders.store_path, self._orders.compute_node.name, local, remote)

    # ------------------------------------------------------------------------------- experts

    def _replace(self) -> None:
        """Place again after a node came or went, and tell the hosts whose part changed."""
        with self._placing:
            try:
                self._placement.replace(self._speed_here(), self._specs(self._hands.links()))
            except MorayError as error:
                _log.warning("experts stay where they are: %s", error)
            self._enact()

    def _specs(self, links: Sequence[RemoteStats]) -> list[HostSpec]:
        """The remote hosts for placement, their links as the traffic of those that have joined shows them."""
        found = {link.host_id: LinkReport(1e-6 * link.round_trip_us, link.bytes_per_s) for link in links if link.joined}
        with self._lock:
            return [
                HostSpec(host_id, survey.num_slots, survey.report.compute, found.get(host_id, ASSUMED_LINK))
                for host_id, survey in self._surveys.items()
            ]

    def _parts(self) -> dict[str, tuple[ExpertKey, ...]]:
        return {host_id: self._placement.assigned(host_id) for host_id in (*self._orders.local_slots, *self._surveys)}

    def _enact(self) -> None:
        """Tell the hosts that run, and the compute actor, what has changed for them."""
        with self._lock:
            old, self._assigned = self._assigned, self._parts()
            changed = [host_id for host_id, keys in self._assigned.items() if {*keys} != {*old.get(host_id, ())}]
            hosts = {host_id: host for host_id, host in self._running().items() if host_id in changed}
            parts, addresses = self._assigned, dict(self._addresses)
        for host_id, host in hosts.items():
            self._hands.assign(host, parts[host_id])
            if host_id in addresses:
                self._hands.meet(addresses[host_id])  # the welcome says what a host was assigned

    def _running(self) -> dict[str, Any]:
        """Handles of hosts that have been reached over the network."""
        here = self._orders.compute_node
        local = {host_id: self._hands.find_host(here, host_id) for host_id in self._ledger.reached}
        return local | {host_id: host for host_id, host in self._handles.items() if host_id in self._addresses}

    def _introduce(self, new: str = "") -> None:
        """Tell all hosts of each other; the new one is answered."""
        with self._lock:
            for host_id, host in self._running().items():
                if host_id != new:
                    self._hands.set_peers(host, self._peers_of(host_id))

    def _peers_of(self, host_id: str) -> tuple[HostAddress, ...]:
        known = self._ledger.reached | self._addresses
        return tuple(address for other, address in known.items() if other != host_id)

    # ------------------------------------------------------------------------------- nodes

    def _watch(self) -> None:
        while True:
            sleep(_POLL_S)
            try:
                nodes = self._hands.living_nodes()
            except Exception as error:  # Ray's own; the next look may find it well
                _log.warning("Ray's nodes cannot be listed: %s", error)
                continue
            with self._lock:
                steps = self._members.see(nodes)
            for step in steps:
                if isinstance(step, Drop):
                    self._drop(step.member)
                else:
                    arguments = (step.member,)
                    threading.Thread(target=self._welcome, args=arguments, name="moray-welcome", daemon=True).start()

    def _drop(self, member: Member) -> None:
        _log.warning("node %s has left the cluster; its experts come from elsewhere", member.node.name)
        with self._lock:
            handle = self._handles.pop(member.host_id, None)
            self._addresses.pop(member.host_id, None)
        self._hands.part(member.host_id)
        if handle is not None:
            self._hands.stop(handle)
        self._do_without(member)

    def _welcome(self, member: Member) -> None:
        """Use a node that joined while the engine runs. A node that cannot be used is left alone, and that is told."""
        try:
            self._survey([member])
            self._replace()
            self._launch(member)
            self._await(member)
            _log.warning("node %s holds %d experts", member.node.name, len(self._assigned[member.host_id]))
        except MorayError as error:
            _log.warning("node %s is not used: %s", member.node.name, error)
            self._do_without(member)

    def _do_without(self, member: Member) -> None:
        """Others take over what was placed on a member that has gone, if it is not there again."""
        with self._lock:
            current = [other for other in self._members.members if other.host_id == member.host_id]
            if any(other.node.node_id != member.node.node_id for other in current):
                return
            was_placed = self._surveys.pop(member.host_id, None) is not None
        if was_placed:
            self._replace()
            self._introduce()

    def _survey(self, members: Sequence[Member]) -> None:
        """Ask what the members' nodes could hold. Raises what keeps one from being used; it is refused then."""
        questions = [(member.node, self._orders_of(member.node)) for member in members]
        ours = self._orders.compute_node.name
        try:
            with ThreadPoolExecutor(1) as beside:
                here = beside.submit(self._speed_here)
                surveys = self._hands.survey(questions)
                here.result()
            for member, survey in zip(members, surveys, strict=True):
                check_identity(self._identity, survey.identity, ours, member.node.name)
        except MorayError as error:
            self._refuse(members, error)
            raise
        with self._lock:
            self._surveys |= {member.host_id: survey for member, survey in zip(members, surveys, strict=True)}

    def _speed_here(self) -> ComputeSpeed:
        """Of the compute node, measured when the first other node comes."""
        if self._here is None:
            self._here = self._hands.measure(self._orders.compute_node, self._orders.store_path).compute
        return self._here

    def _orders_of(self, node: NodeInfo) -> NodeOrders:
        given = self._orders.nodes.get(node.name) or self._orders.nodes.get(node.address)
        return given or NodeOrders(node.name, self._orders.store_path, None)

    def _launch(self, member: Member) -> None:
        """Start a member's host with the experts assigned to it, as many as the node has memory for."""
        survey = self._surveys[member.host_id]
        address = f"tcp://{member.node.address}:0"  # any free port; the host reports which
        config = HostConfig(
            address=HostAddress(member.host_id, address, self._orders.token, member.node.name),
            store_path=self._orders_of(member.node).store_path,
            keys=tuple(sorted(self._placement.manifest.shards)),
            assigned=self._assigned[member.host_id],
            index=0,
            num_hosts=1,
            num_threads=survey.report.num_cores,
            num_slots=survey.num_slots,
            caching=self._orders.caching,
            owner=None,  # another machine's process cannot be watched; Ray ends the host with this actor
        )
        with self._lock:  # an ``admit`` meanwhile finds the host, or the host, asking for keys, finds what is admitted
            self._handles[member.host_id] = self._hands.start_host(member.node, config)

    def _await(self, member: Member) -> HostReport:
        """Wait until a member's host serves."""
        handle = self._handles[member.host_id]
        try:
            report = self._hands.report(handle)
        except MorayError as error:
            self._refuse([member], error)
            self._hands.stop(handle)
            raise
        with self._lock:
            is_used = self._members.started(member)
        if not is_used:
            self._hands.stop(handle)
            raise ClusterError(f"node {member.node.name} left the cluster while its expert host was started")
        self.announce(report.address)  # its own word may still be on the way
        return report

    def _refuse(self, members: Sequence[Member], error: MorayError) -> None:
        with self._lock:
            for member in members:
                self._members.failed(member, str(error))
