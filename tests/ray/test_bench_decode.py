"""``moray bench decode`` on the embedded model: the structure of what it prints. No time is judged."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from moray.cluster.ray_session import RaySession
from moray.deploy.cli import app
from moray.deploy.config import demo_store
from moray.runtime.store.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_decode_as_json(session: RaySession) -> None:
    arguments = [
        "--json",
        "--repeat",
        "2",
        "--new-tokens",
        "8",
        "--prompt-tokens",
        "5",
        "--hosts",
        "2",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, ["bench", "decode", *arguments])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    settings = document["settings"]
    assert (settings["repeat"], settings["hosts"], settings["new_tokens"], settings["numerics"]) == (2, 2, 8, "int8")
    assert set(document["prefill_tokens_per_s"]) == {"64", "512"}
    for spread in (document["decode_tokens_per_s"], document["ratio"], *document["prefill_tokens_per_s"].values()):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    token = document["token"]
    parts = ("kernel_s", "grouping_s", "leases_s", "rest_s")
    assert sum(token[part] for part in parts) == pytest.approx(token["total_s"])
    with Store.open(demo_store()) as store:
        layers = store.manifest.layers
    assert token["expert_bytes"] == sum(2 * layer.layout.num_bytes for layer in layers)  # 2 experts a token
    assert document["idle_cpu"]["num_processes"] >= 4  # compute, two hosts, the orchestrator
