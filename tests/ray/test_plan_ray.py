"""A cluster that runs is measured and planned: two real raylets."""

from __future__ import annotations

import json

import pytest
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from moray.deploy.cli import app

pytestmark = [pytest.mark.ray, pytest.mark.long]


def test_a_running_cluster_is_measured(cluster: Cluster) -> None:
    result = CliRunner().invoke(app, ["plan", "--address", cluster.address, "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert len(plan["nodes"]) == 2 and plan["fits"]
    here, there = plan["nodes"]
    assert here["link"] is None and there["link"]["latency_s"] > 0
    assert min(node["compute_bytes_per_s"] for node in plan["nodes"]) > 1e6
    assert not any(node["assumed_rates"] for node in plan["nodes"])
