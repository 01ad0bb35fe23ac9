"""Which nodes hold experts: nodes that come, go, and come back; what each gets; who may join."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster.identity import check_identity, identity_of
from moray.cluster.membership import Drop, Member, Membership, Start
from moray.cluster.nodes import NodeInfo
from moray.deploy.config import demo_store
from moray.runtime.errors import ClusterError, ResourceError
from moray.runtime.planning.host_plan import plan_host_slots
from moray.runtime.store.manifest import NUMERICS_ID
from moray.runtime.store.store import Store

COMPUTE = NodeInfo("compute", {"role": "compute"}, 0, "compute")
NAMES = ("a", "b", "c")
GIB = 1 << 30


def host(name: str, start: int) -> NodeInfo:
    """The ``start``-th time that a machine's Ray was started."""
    return NodeInfo(f"{name}{start}", {"role": "host"}, 0, name, f"10.0.0.{start}", start)


@settings(max_examples=100)
@given(st.data())
def test_whatever_happens_to_nodes_each_living_one_gets_one_host_and_each_dead_one_is_given_up(
    data: st.DataObject,
) -> None:
    members, starts = Membership(COMPUTE), dict.fromkeys(NAMES, 0)
    alive: set[str] = set()
    ghosts: list[NodeInfo] = []
    open_starts: list[Member] = []
    for _ in range(data.draw(st.integers(1, 25))):
        name = data.draw(st.sampled_from(NAMES))
        match data.draw(st.sampled_from(["up", "down", "restart", "settle"])):
            case "up" if name not in alive:
                starts[name] += 1
                alive.add(name)
            case "down" if name in alive:
                alive.remove(name)
            case "restart" if name in alive:  # Ray takes the old node for alive for a while
                ghosts.append(host(name, starts[name]))
                starts[name] += 1
            case "settle" if open_starts:
                member = open_starts.pop(data.draw(st.integers(0, len(open_starts) - 1)))
                is_current = member.node.name in alive and member.node == host(
                    member.node.name, starts[member.node.name]
                )
                settled = members.started(member) if data.draw(st.booleans()) else members.failed(member, "why")
                assert settled or not is_current
        ghosts = [node for node in ghosts if node.name in alive and data.draw(st.booleans())]
        steps = members.see([COMPUTE, *ghosts, *(host(name, starts[name]) for name in alive)])
        open_starts += [step.member for step in steps if isinstance(step, Start)]
        kinds = [isinstance(step, Drop) for step in steps]
        assert kinds == sorted(kinds, reverse=True)
        now = {member.node.name: member for member in members.members}
        for name in NAMES:
            if name in alive:
                assert now[name].state != "lost" and now[name].node == host(name, starts[name])
            elif name in now:
                assert now[name].state in ("lost", "refused")
        assert members.see([COMPUTE, *(host(name, starts[name]) for name in alive)]) == []


def test_a_host_that_serves_too_late_is_nobodys() -> None:
    members = Membership(COMPUTE)
    [start] = members.see([COMPUTE, host("a", 1), NodeInfo("plain", {}, 0, "plain")])
    [drop] = members.see([COMPUTE])
    assert isinstance(drop, Drop) and drop.member == start.member
    assert not members.started(start.member)
    [again] = members.see([COMPUTE, host("a", 2)])
    assert again.member.host_id == start.member.host_id and members.started(again.member)


def test_only_equal_identities_go_together() -> None:
    with Store.open(demo_store()) as store:
        ours = identity_of(store)
        older = Store(store.path, replace(store.manifest, numerics_id="int8-v1"))
        assert identity_of(older).numerics == ours.numerics == NUMERICS_ID  # a store has no rules of its own
    check_identity(ours, ours, "left", "right")
    for name, remedy in (("moray", "same version"), ("numerics", "same version"), ("store", "copy its directory")):
        with pytest.raises(
            ClusterError, match=f"node right cannot join: its {name} is other, node left has .*{remedy}"
        ):
            check_identity(ours, replace(ours, **{name: "other"}), "left", "right")


def test_a_host_nodes_slots() -> None:
    assert plan_host_slots(4 << 20, 48, 8 * GIB, None, "n") == 48
    few = plan_host_slots(100 << 20, 256, 8 * GIB, None, "n")
    assert 0 < few * (100 << 20) < 8 * GIB - GIB // 2
    assert plan_host_slots(100 << 20, 256, 8 * GIB, "1GiB", "n") == 10
    with pytest.raises(ResourceError, match="host_memory of n is 9GiB"):
        plan_host_slots(100 << 20, 256, 8 * GIB, "9GiB", "n")
    with pytest.raises(ResourceError, match=r"n has .* for experts, one takes"):
        plan_host_slots(100 << 20, 256, GIB * 9 // 10, None, "n")
