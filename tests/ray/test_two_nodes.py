"""An engine over two nodes: two real raylets, experts computed over tcp:// with TLS, a node that goes and returns."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import ray
from helpers.partial import damage, partial_copy
from helpers.reference import greedy, runner
from ray import serve
from ray.cluster_utils import Cluster

import moray
from moray.actors.calls import call
from moray.actors.spawn import find_kept
from moray.deploy.app import build
from moray.deploy.config import demo_store
from moray.deploy.serving.args import ServeArgs
from moray.deploy.serving.keeper import KEEPER
from moray.runtime.errors import ClusterError, StoreError
from moray.runtime.generation.request import GenerationRequest
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


@pytest.mark.long
def test_a_deployment_over_two_nodes_is_on_the_compute_node_and_uses_both(cluster: Cluster) -> None:
    """The server comes where ``role`` is compute, whoever deploys it; a node that returns is used again."""
    with runner(demo_store(), "int8") as made:
        ids = made.encode(PROMPT)
        text = "".join(event.text for event in made.stream(GenerationRequest("alone", ids, 32)))
    right = cluster.add_node(**RIGHT)
    ray.init(cluster.address, namespace="moray")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    args = ServeArgs.model_validate({"lanes": "remote", "nodes": {"right": {"store": str(demo_store())}}})
    serve.run(build(args), name="moray")
    nodes = {actor["ActorClassName"]: actor["Address"]["NodeID"] for actor in ray._private.state.actors().values()}
    assert {nodes["EngineKeeper"], nodes["ServeReplica:moray:openai"]} == {cluster.head_node.node_id}
    body = {"model": "moray-demo", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}

    def ask() -> int:
        """Checks the answer; returns how many pairs the other node has computed so far."""
        answer = httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=None)
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == text
        return sum(host.pairs for host in call(find_kept(KEEPER).stats).remote)

    wait_for(ask, lambda pairs: pairs > 0)
    cluster.remove_node(right)
    ask()
    cluster.add_node(**RIGHT)
    before = ask()
    wait_for(ask, lambda pairs: pairs > before)


def wait_for(look: Callable[[], Any], is_good: Callable[[Any], bool]) -> Any:
    """Look until it is good. The end of pytest's patience is the limit."""
    while not is_good(seen := look()):
        time.sleep(0.2)
    return seen
