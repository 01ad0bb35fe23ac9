"""An engine over two nodes: two real raylets, experts computed over tcp:// with CURVE, a node that goes and returns."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.partial import damage, partial_copy
from helpers.reference import greedy, runner
from ray.cluster_utils import Cluster

import moray
from moray.deploy.config import demo_store
from moray.runtime.errors import ClusterError, StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store

pytestmark = pytest.mark.ray

PROMPT = "import os\n"
RIGHT: dict[str, Any] = {"num_cpus": 1, "node_name": "right", "labels": {"role": "host"}}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    head = {"num_cpus": 1, "include_dashboard": False, "node_name": "left", "labels": {"role": "compute"}}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_two_nodes_give_the_tokens_of_one_and_a_node_that_returns_is_used_again(
    cluster: Cluster, store: Callable[..., Path], tmp_path: Path
) -> None:
    with runner(demo_store(), "int8") as made:
        expected = greedy(made, list(made.encode(PROMPT)), 32)
    right = cluster.add_node(**RIGHT)

    with pytest.raises(ClusterError, match=r"node right cannot join: its store is \w+, node left has \w+; give both"):
        moray.launch(address=cluster.address, nodes={"right": {"store": str(store("mixtral", "none"))}})
    with pytest.raises(StoreError, match=r"on node right: /nowhere is not a directory.*copy the store there"):
        moray.launch(address=cluster.address, nodes={"right": {"store": "/nowhere"}})

    with Store.open(demo_store()) as whole:  # the other node lacks a shard, and has damaged another
        lacking = partial_copy(whole, tmp_path / "lacking", whole.manifest.shards.keys() - {ExpertKey(1, 2)})
        damage(lacking, whole, ExpertKey(4, 3))
    nodes = {"right": {"store": str(lacking)}}
    with moray.launch(address=cluster.address, lanes="remote", nodes=nodes) as engine:

        def generate() -> int:
            """Checks the tokens; returns how many pairs the other node has computed so far."""
            assert list(engine.generate(PROMPT, max_new_tokens=32).token_ids) == expected
            return sum(host.pairs for host in engine.stats().remote)

        here, there = engine.actors.host_reports, engine.actors.remote_reports
        # Memory is left, so all is there too, as replicas at least; what its disk has not comes from here.
        assert [report.num_assigned for report in (*here, *there)] == [48, 48]
        local, remote = wait_for(lambda: engine.stats().hosts, lambda stats: all(s.num_resident == 48 for s in stats))
        assert remote.loader.peer_loads == 2 and remote.loader.healed == 1 and "checksum" in remote.damaged[0]
        assert local.loader.peer_loads == 0
        assert len({here[0].node_id, there[0].node_id}) == 2 and engine.actors.num_nodes == 2
        assert there[0].address.address.startswith("tcp://") and there[0].address.server_key
        computed: int = wait_for(generate, lambda pairs: pairs > 0)

        os.kill(there[0].pid, signal.SIGKILL)  # the process, not the node: Ray restarts it, with another port and key
        generate()
        wait_for(lambda: engine.status().remote_hosts[0].address, lambda address: address != there[0].address.address)
        computed = wait_for(generate, lambda pairs: pairs > computed)

        cluster.remove_node(right)
        wait_for(lambda: engine.status().remote_hosts[0].state, lambda state: state == "lost")
        assert generate() <= computed  # whatever is counted of a host that is gone
        cluster.add_node(**RIGHT)
        wait_for(lambda: engine.status().remote_hosts[0].state, lambda state: state == "running")
        before = generate()
        wait_for(generate, lambda pairs: pairs > before)
        [host] = engine.status().remote_hosts
        assert (host.node, host.num_experts) == ("right", 48)


def wait_for(look: Callable[[], Any], is_good: Callable[[Any], bool]) -> Any:
    """Look until it is good. The end of pytest's patience is the limit."""
    while not is_good(seen := look()):
        time.sleep(0.2)
    return seen
