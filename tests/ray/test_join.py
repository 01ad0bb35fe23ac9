"""An engine in a cluster that somebody else started: two real raylets, placement by label, nothing stopped."""

from __future__ import annotations

import pytest
import ray
from helpers.reference import greedy, runner
from ray.cluster_utils import Cluster

import moray
from moray.deploy.config import demo_store

pytestmark = pytest.mark.ray

PROMPT = "import os\n"


def test_actors_run_on_the_labelled_node_and_the_cluster_lives_on(cluster: Cluster) -> None:
    with runner(demo_store(), "int8") as made:
        expected = greedy(made, list(made.encode(PROMPT)), 32)
    with moray.launch(address=cluster.address, hosts=2) as engine:
        assert list(engine.generate(PROMPT, max_new_tokens=32).token_ids) == expected
        actors = engine.actors
        labelled = next(node["NodeID"] for node in ray.nodes() if node["Labels"].get("role") == "compute")
        assert {actors.compute_report.node_id, *(report.node_id for report in actors.host_reports)} == {labelled}
    assert ray.is_initialized()
    assert sum(node["Alive"] for node in ray.nodes()) == 2
