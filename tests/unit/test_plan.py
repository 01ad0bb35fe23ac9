"""``moray plan``: outlines, measurements, predictions, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.hosts import cluster_of
from typer.testing import CliRunner

from moray.cluster.activations import WireFormat
from moray.cluster.client import HostClient
from moray.cluster.layer_cost import LayerGeometry, TokenCost, Worker, geometry_of
from moray.cluster.messages import MAX_ECHO_BYTES, Echo, Echoed, decode, encode
from moray.cluster.place import place
from moray.cluster.placement import HostSpec
from moray.cluster.predict import _ASKING_S as ASKING_S
from moray.cluster.predict import Trunk, predict
from moray.cluster.topology import ComputeSpeed, LinkReport, measure_link, measure_node
from moray.deploy.cli import app
from moray.deploy.config import demo_store
from moray.deploy.plan_config import parse_link, plan_config_of_file, plan_config_of_flags
from moray.runtime.convert.outline import write_outline
from moray.runtime.convert.recipe import Recipe
from moray.runtime.errors import ConfigError, ProtocolError
from moray.runtime.planning.profiles import profile_of
from moray.runtime.store.store import Store

ROOT = Path(__file__).parents[2]
MB = 1 << 20
TWO = ("--node", "desk,memory=4GiB,cores=2", "--node", "den,memory=2GiB,cores=4", "--link", "1Gbit/0.2ms")


def run(*words: str, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, ["plan", *words])
    assert result.exit_code == code, result.output
    return result.output


# ------------------------------------------------------------------------------------- outlines


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("mixtral", "experts=hqq2:16:s8,attention=none"), ("gpt_oss", "hqq4"), ("deepseek_v3", "hqq4"), ("dbrx", "hqq4")],
)
def test_an_outline_is_the_store_without_its_weights(
    family: str,
    recipe: str,
    checkpoint: Callable[[str], Path],
    store: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """From a checkpoint's headers, and from its config.json alone; and it is planned as the store is."""
    lone = tmp_path / "config"
    lone.mkdir()
    (lone / "config.json").write_bytes((checkpoint(family) / "config.json").read_bytes())
    with Store.open(store(family, recipe)) as opened:
        real = opened.manifest
    for index, source in enumerate((checkpoint(family), lone)):
        made = tmp_path / str(index)
        made.mkdir()
        write_outline(source, Recipe.parse(recipe), made)
        with Store.open(made) as opened:
            outline = opened.manifest
        assert (outline.layers, outline.packed_trunk) == (real.layers, real.packed_trunk)
        assert {k: (e.file, e.offset, e.num_bytes) for k, e in outline.shards.items()} == {
            k: (e.file, e.offset, e.num_bytes) for k, e in real.shards.items()
        }
        assert outline.num_parameters == real.num_parameters
        assert outline.trunk_bytes == real.trunk_bytes
        assert sum(file.stat().st_blocks for file in made.glob("experts-*.bin")) == 0  # holes


def test_a_profile_tells_what_a_token_reads() -> None:
    profile = profile_of(demo_store())
    with Store.open(demo_store()) as opened:
        assert profile.top_k == (2,) * 6 == (2,) * len(opened.manifest.layers)
        assert 0.5 * profile.trunk_bytes < profile.bytes_per_token <= profile.trunk_bytes


# ------------------------------------------------------------------------------------ measurements


def test_a_node_and_a_link_are_measured() -> None:
    report = measure_node(demo_store(), 2)
    assert min(report.memory_bytes, report.disk_bytes_per_s, report.compute.bytes_per_s) > 0
    assert report.num_cores == 2 and report.instruction_set
    assert report.compute.token_bytes_per_s > report.compute.bytes_per_s / 64  # 64 tokens cost less than 64 times one
    with Store.open(demo_store()) as store, cluster_of(store, 1) as [(address, _)]:
        client = HostClient(address, "test")
        try:
            with pytest.raises(ProtocolError, match="introduce yourself"):  # strangers get no megabytes
                client.receive(client.send(Echo(reply_bytes=10), memoryview(b"abc")))
            client.greet()
            assert client.request(Echo(reply_bytes=10), memoryview(b"abc")) == (Echoed(), bytes(10))
            link = measure_link(client)
            assert 0 < link.latency_s < 1 and link.bytes_per_s > 0
        finally:
            client.close()
    with pytest.raises(ProtocolError, match="malformed"):
        decode(encode(1, Echo(reply_bytes=MAX_ECHO_BYTES + 1)))


@pytest.mark.parametrize("token_bytes_per_s", [1e11, 2e10])
def test_a_speed_is_that_of_experts_with_one_token_each(token_bytes_per_s: float) -> None:
    """The first token's arithmetic is in it, as it is when a node is measured; only further ones cost more."""
    rate = ComputeSpeed(1e10, token_bytes_per_s).rate(1_000_000)
    one_s, many_s = (rate.seconds(1_000_000, tokens) for tokens in (1, 65))
    assert one_s == pytest.approx(rate.fixed_s + 1e-4)
    assert many_s - one_s == pytest.approx(64 * 1e6 / token_bytes_per_s)


def test_a_speed_whose_bytes_would_cost_nothing_still_has_a_price_for_them() -> None:
    assert ComputeSpeed(1e10, 1e9).rate(1_000_000).byte_s > 0


def test_activations_are_counted_as_they_travel() -> None:
    with Store.open(demo_store()) as opened:
        manifest = opened.manifest
    layers = geometry_of(manifest, [2] * len(manifest.layers)), geometry_of(manifest, [2] * 6, "float")
    for numerics, of in zip(("int8", "float"), layers, strict=True):
        form = WireFormat.of(manifest.layers[0].layout["gate_up_proj"].spec, numerics)
        assert of[0].sent_bytes == form.num_bytes(1, 0)
        assert of[0].received_bytes == 4 * form.columns


# ------------------------------------------------------------------------------------- predictions


def test_predictions_follow_from_what_they_are_made_of() -> None:
    layer = LayerGeometry(16, 4, 20 * MB, 4352, 16384)
    layers, fast, link = 12 * [layer], ComputeSpeed(30e9, 300e9), LinkReport(2e-4, 117e6)
    trunk = Trunk(12, 500 * MB, 10 * MB)

    def predicted(here: int, there: int, link: LinkReport = link, disk: float = 2e9):
        hosts = [HostSpec("a", here, fast), HostSpec("b", there, fast, link)]
        return predict(layers, trunk, hosts, place(layers, hosts), disk), place(layers, hosts)

    alone, _ = predicted(192, 0)
    assert alone.experts_s == pytest.approx(12 * TokenCost(layer, [Worker(fast)]).tables[0][4])
    assert alone.hit_rate == 1 and alone.link_bytes_per_token == alone.disk_bytes_per_token == 0
    both, placement = predicted(96, 96)
    assert not placement.replicas
    expected = 12 * TokenCost(layer, [Worker(fast), Worker(fast, link)]).expected_even_s((8, 8))
    drawn_s = both.experts_s - 12 * ASKING_S
    assert drawn_s == pytest.approx(expected, rel=0.05)  # drawn calls against the whole distribution
    assert 12 * 2 * 16384 < both.link_bytes_per_token < 12 * (2.2 * 16384 + 4352)
    twice, placement = predicted(192, 192)
    assert len(placement.replicas) == 192
    best = 12 * max(table[2] for table in TokenCost(layer, [Worker(fast), Worker(fast, link)]).tables)
    assert twice.experts_s == pytest.approx(best + 12 * ASKING_S)  # every call is split in halves
    assert twice.decode_tokens_per_s > max(both.decode_tokens_per_s, alone.decode_tokens_per_s)
    assert drawn_s < alone.experts_s  # what asking takes aside, two are faster
    assert predicted(96, 96, LinkReport(1e-4, 1.2e9))[0].prefill_tokens_per_s > alone.prefill_tokens_per_s
    slow, _ = predicted(96, 96, LinkReport(5e-3, 117e6))
    assert slow.decode_tokens_per_s < both.decode_tokens_per_s
    short, left = predicted(96, 48)
    assert len(left.left_out) == 48 and short.hit_rate == pytest.approx(96 / 144)
    assert short.disk_bytes_per_token == pytest.approx(12 * 4 * 20 * MB * 48 / 192, rel=0.01)
    assert short.experts_s > short.disk_bytes_per_token / 2e9
    assert predicted(96, 48, disk=4e9)[0].experts_s < short.experts_s


def test_recorded_traffic_decides_hits_and_splits() -> None:
    """Calls that use four experts of sixteen only: they fit, wherever the others are."""
    layer = LayerGeometry(16, 2, 20 * MB, 4352, 16384)
    layers, speed = 2 * [layer], ComputeSpeed(30e9, 300e9)
    random = np.random.default_rng(0)
    calls = [[index, *random.permutation(4)[:2].tolist()] for _ in range(200) for index in range(2)]
    hosts = [HostSpec("a", 10, speed)]
    trunk = Trunk(2, MB)
    placement = place(layers, hosts)
    assert predict(layers, trunk, hosts, placement, 2e9, calls=calls).hit_rate > 0.97
    assert predict(layers, trunk, hosts, placement, 2e9).hit_rate == pytest.approx(10 / 32)


# ----------------------------------------------------------------------------------- the command


def test_a_plan_for_described_nodes() -> None:
    plan = json.loads(run(*TWO, "--context", "1024", "--json"))
    desk, den = plan["nodes"]
    assert plan["fits"] and plan["advice"] == [] and desk["experts"] + den["experts"] == plan["experts"] == 48
    assert (desk["link"], den["link"]) == (None, {"latency_s": 2e-4, "bytes_per_s": 125e6})
    assert plan["compute_memory"]["context"] == 1024 and desk["assumed_rates"]
    taken = plan["compute_memory"]
    parts = ("trunk_bytes", "workspace_bytes", "kv_bytes", "arena_bytes", "processes_bytes")
    assert sum(taken[name] for name in parts) <= desk["memory_bytes"]
    text = run(*TWO)
    assert "every expert is in memory" in text and "assumed" in text and "tokens/s" in text


def test_what_does_not_fit_comes_with_what_helps() -> None:
    tight = ("--node", "desk,memory=4GiB,host_memory=3MiB", "--node", "den,memory=2GiB,host_memory=4MiB")
    plan = json.loads(run(*tight, "--json"))
    assert not plan["fits"] and 0 < plan["left_out"] < 48 and plan["prediction"]["hit_rate"] < 1
    assert plan["nodes"][1]["experts"] == plan["nodes"][1]["slots"]
    assert "more memory on any node" in plan["advice"][0]
    enough = [f"desk,memory=4GiB,host_memory={3 * MB + plan['left_out_bytes'] + 64 * 1024}B", tight[3]]
    assert json.loads(run("--node", enough[0], "--node", enough[1], "--json"))["fits"]
    assert "are read from the disk of desk when needed" in run(*tight)
    small = run("--node", "desk,memory=4GiB", "--node", "den,memory=500MiB")
    assert "den is not used: den has 0 B for experts" in small


def test_plans_of_files_and_of_models_that_are_not_converted(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    two_machines = ROOT / "configs/plan/two-machines.yaml"
    config = plan_config_of_file(two_machines)
    assert list(config.nodes) == ["desk", "den"] and not config.nodes["desk"].is_assumed
    described = ("--cluster", str(two_machines), "--json")
    plan = json.loads(run(str(checkpoint("mixtral") / "config.json"), "--recipe", "hqq8", *described))
    more = json.loads(run(str(checkpoint("mixtral")), "--recipe", "hqq2", *described))
    assert plan["fits"] and plan["expert_bytes"] > more["expert_bytes"]
    assert not list(tmp_path.parent.glob("moray-plan-*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--node", "a"), "--node: nodes.a.memory is {}: Field required"),
        (("--node", "memory=3GiB"), "--node is 'memory=3GiB', expected NAME,memory=16GiB"),
        (("--node", "a,memory=lots"), "memory is 'lots', expected a size"),
        (("--node", "a,memory=1GiB,gpu=2"), "unknown key 'nodes.a.gpu'; known keys: address, memory"),
        (("--node", "a,memory"), "has 'memory', expected KEY=VALUE"),
        (("--node", "a,memory=900MiB"), "computed on a, needs"),
        (("--node", "a,memory=4GiB", "--link", "fast"), "link is 'fast', expected a bandwidth and a round trip"),
        (("--node", "a,memory=4GiB", "--link", "b=1Gbit/1ms"), "a link to 'b', and no such node"),
        (("--link", "1Gbit/1ms"), "--link goes with --node"),
        (("--node", "a,memory=4GiB", "--address", "x:1"), "give one of --node, --cluster and --address"),
        (("--cluster", "/nowhere.yaml"), "cannot be read as YAML"),
        (("--recipe", "hqq2"), "is a store, its recipe is decided"),
        (("/nowhere", "--node", "a,memory=4GiB"), "/nowhere is not a directory"),
    ],
)
def test_wrong_input_is_one_line(words: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", *words])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_links_and_rates_as_people_write_them() -> None:
    link = parse_link("10 Gbit/s / 50us")
    assert (link.latency_s, link.bytes_per_s) == (pytest.approx(5e-5), 1.25e9)
    for wrong in ("0Gbit/1ms", "1GB/1ms", "1Gbit", "1..2Gbit/1ms"):
        with pytest.raises(ConfigError, match="expected a bandwidth and a round trip"):
            parse_link(wrong)
    node = plan_config_of_flags(["a,memory=1GiB,cores=2,compute=7GB/s,prompts=9GB/s,disk=3GB/s"], []).nodes["a"]
    assert (node.speed, node.disk_bytes_per_s) == (ComputeSpeed(7e9, 9e9), 3e9)
    assert replace(node.speed, bytes_per_s=1.0).rate(10).byte_s == pytest.approx(1.0)
