"""Which nodes hold experts for one engine, and what to do when nodes come and go. Pure: the orchestrator acts on it.

absent -> starting -> running -> lost -> starting -> ...
             |
             +-> refused, until the node has been started anew
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moray.cluster.nodes import NodeInfo, choose_host_nodes

MemberState = Literal["starting", "running", "lost", "refused"]


@dataclass(frozen=True, slots=True)
class Member:
    """A node's part. A node that is started anew has another Ray id and the same name: the same member."""

    host_id: str
    node: NodeInfo
    state: MemberState
    reason: str = ""  # of the state, in words


@dataclass(frozen=True, slots=True)
class Start:
    """Start this member's host: its node is there."""

    member: Member


@dataclass(frozen=True, slots=True)
class Drop:
    """Give this member's host up: its node is gone, and Ray could restart it nowhere."""

    member: Member


class Membership:
    """The remote hosts of one engine, by the names of their nodes. Not thread-safe."""

    def __init__(self, compute: NodeInfo) -> None:
        self._compute = compute
        self._members: dict[str, Member] = {}

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    def see(self, nodes: Sequence[NodeInfo]) -> list[Start | Drop]:
        """The nodes that live now. Returns what is to be done, drops first.

        Of nodes with one name the one that was started last counts: Ray takes a while to notice that another is dead.
        """
        newest = {node.name: node for node in sorted(nodes, key=lambda node: node.started_ms)}
        current = {node.node_id for node in newest.values()}
        drops = []
        for name, member in self._members.items():
            if member.node.node_id not in current and member.state in ("starting", "running"):
                drops.append(member)
                self._members[name] = replace(member, state="lost", reason="its node has left the cluster")
        starts = []
        for node in choose_host_nodes(list(newest.values()), self._compute):
            known = self._members.get(node.name)
            if known is None or known.node.node_id != node.node_id:
                starts.append(Member(f"host-{node.name}", node, "starting"))
                self._members[node.name] = starts[-1]
        self.validate()
        return [*(Drop(member) for member in drops), *(Start(member) for member in starts)]

    def started(self, member: Member) -> bool:
        """Its host serves. False: the node was lost or replaced meanwhile, and the host is nobody's."""
        return self._settle(member, "running", "")

    def failed(self, member: Member, reason: str) -> bool:
        """Its host cannot be started on this node."""
        return self._settle(member, "refused", reason)

    def validate(self) -> None:
        assert all(member.node.name == name for name, member in self._members.items())
        assert self._compute.node_id not in {m.node.node_id for m in self._members.values() if m.state != "lost"}
        running = [m.node.node_id for m in self._members.values() if m.state in ("starting", "running")]
        assert len(running) == len(set(running))

    def _settle(self, member: Member, state: MemberState, reason: str) -> bool:
        if self._members.get(member.node.name) != member:
            return False
        self._members[member.node.name] = replace(member, state=state, reason=reason)
        self.validate()
        return True
