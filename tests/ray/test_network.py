"""Two machines on a link of 1 or 10 Gbit/s: `moray cluster` in namespaces of their own, with and without TLS."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.network import Machine, two_machines
from helpers.reference import greedy, runner

from moray.deploy.config import demo_store
from moray.runtime.generation.request import GenerationRequest

ROOT = Path(__file__).parents[2]
PROMPT = "import os\n"
MORAY = (sys.executable, "-m", "moray.deploy.cli")
DRIVER = """
import dataclasses, json, sys
import moray
with moray.launch(address=sys.argv[1], lanes="remote", nodes={sys.argv[3]: {"store": sys.argv[4]}}) as engine:
    engine.wait_filled()
    first = engine.generate(sys.argv[2], max_new_tokens=32)
    before = engine.stats().remote[0]
    second = engine.generate(sys.argv[2] + "import sys", max_new_tokens=32)
    after = engine.stats().remote[0]
    print(json.dumps({
        "tokens": [first.token_ids, second.token_ids],
        "pairs": after.pairs - before.pairs,
        "sent": after.bytes_sent - before.bytes_sent,
        "received": after.bytes_received - before.bytes_received,
        "round_trip_us": after.round_trip_us,
        "nodes": engine.actors.num_nodes,
    }))
"""
CALLER = """
import sys, time
import httpx2
name, prompt, expected = sys.argv[1:]
with httpx2.Client(base_url="http://127.0.0.1:8000", timeout=None) as http:
    while True:
        try:
            if http.get("/health").status_code == 200:
                break
        except httpx2.ConnectError:
            pass
        time.sleep(0.2)
    state = {"bytes_by_lane": {"remote-compute": 0}}
    while not state["bytes_by_lane"]["remote-compute"]:
        body = {"model": name, "prompt": prompt, "max_tokens": 32, "temperature": 0}
        answer = http.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == expected, answer.text
        state = http.get("/state").json()
    print(http.get("/state").text)
"""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="needs root and iproute2"),
    pytest.mark.timeout(1800),
]


@pytest.mark.parametrize(("rate", "tls"), [("1gbit", False), ("10gbit", False), ("1gbit", True)])
def test_two_machines_from_keys_to_tokens(rate: str, tls: bool, tmp_path: Path) -> None:
    expected = []
    with runner(demo_store(), "int8") as made:
        for prompt in (PROMPT, PROMPT + "import sys"):
            expected.append(greedy(made, list(made.encode(prompt)), 32))
    python_path = str(ROOT / "src")
    with two_machines(tmp_path, rate, PYTHONPATH=python_path, HF_HUB_OFFLINE="1") as (left, right):
        copy = copied_store(left, right)
        options = keys(left, right, tls)
        left.run(*MORAY, "cluster", "up", "--address", left.address, *options(left))
        head = f"{left.address}:6379"
        if tls:  # without certificates nobody gets in, and is told why
            refused = right.run(*MORAY, "cluster", "join", head, check=False)
            assert refused.returncode == 1 and "TLS is off here" in refused.stderr.replace("\n", " "), refused
        right.run(*MORAY, "cluster", "join", head, *options(right))
        again = right.run(*MORAY, "cluster", "join", head, *options(right), check=False)
        assert again.returncode == 2 and "already node" in again.stderr

        status = json.loads(right.run(*MORAY, "cluster", "status", "--json").stdout)
        assert [(n["address"], n["role"]) for n in status["nodes"]] == [
            (left.address, "compute"),
            (right.address, "host"),
        ]

        sent = left.sent_bytes(), right.sent_bytes()
        out = left.run(sys.executable, "-c", DRIVER, head, PROMPT, right.address, copy).stdout
        found = json.loads(out.splitlines()[-1])
        crossed = left.sent_bytes() - sent[0], right.sent_bytes() - sent[1]
        print(found, crossed)
        assert [list(tokens) for tokens in found["tokens"]] == expected
        assert found["nodes"] == 2 and found["pairs"] > 0
        # What is counted did go over the link, encrypted and with headers; and both ways.
        assert crossed[0] > found["sent"] > 0 and crossed[1] > found["received"] > 0

        for machine in (right, left):
            machine.run(*MORAY, "cluster", "down")
            assert not machine.pids()
        assert "no node" in left.run(*MORAY, "cluster", "down").stdout


def copied_store(left: Machine, right: Machine) -> str:
    """The demonstration model's store, copied by the commands from one machine to the other. Returns where it is."""
    for machine in (left, right):  # each its own file
        machine.run(*MORAY, "store", "keys", str(machine.home / "moray.keys"))
    source, copy = f"{left.address}:7420", str(right.home / "store")
    serve = (*MORAY, "store", "serve", str(demo_store()), "--listen", source, "--keys", str(left.home / "moray.keys"))
    sync = (*MORAY, "store", "sync", source, copy, "--keys", str(right.home / "moray.keys"))
    refused = right.run(*sync, check=False)
    assert refused.returncode == 1 and "did not answer; is it served there" in refused.stderr.replace("\n", " "), (
        refused
    )
    shutil.copy(left.home / "moray.keys", right.home / "moray.keys")
    with left.start(*serve) as server:
        assert server.stdout is not None and "serving 48 of 48 experts" in server.stdout.readline()
        assert "it is whole now" in right.run(*sync).stdout
        server.terminate()
        assert "were read" in server.communicate()[0] and server.returncode == 0
    return copy


@pytest.mark.parametrize("tls", [False, True], ids=["token", "tls"])
def test_a_server_over_two_machines(tls: bool, tmp_path: Path) -> None:
    """`serve deploy configs/serve/two-machines.yaml` with other addresses and paths, asked over HTTP."""
    with runner(demo_store(), "int8") as made:
        ids = made.encode(PROMPT)
        text = "".join(event.text for event in made.stream(GenerationRequest("alone", ids, 32)))
    document = yaml.safe_load((ROOT / "configs" / "serve" / "two-machines.yaml").read_text())
    (application,) = document["applications"]
    copy = shutil.copytree(demo_store(), tmp_path / "copy")
    environment = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "token"}
    with two_machines(tmp_path, "1gbit", **environment) as (left, right):
        options = keys(left, right, tls)
        left.run(*MORAY, "cluster", "up", "--address", left.address, "--dashboard", *options(left))
        right.run(*MORAY, "cluster", "join", f"{left.address}:6379", *options(right))
        (there,) = application["args"]["nodes"].values()
        nodes = {right.address: there | {"store": str(copy)}}
        application["args"] |= {"store": str(demo_store()), "nodes": nodes, "lanes": "remote"}
        file = tmp_path / "two-machines.yaml"
        file.write_text(yaml.safe_dump(document))
        left.run(str(Path(sys.executable).with_name("serve")), "deploy", str(file))
        name = application["args"]["model_name"]
        found = json.loads(left.run(sys.executable, "-c", CALLER, name, PROMPT, text).stdout)
        assert {place["tier"] for place in found["places"]} >= {"arena", "remote"}
        (engine,) = json.loads(left.run(*MORAY, "cluster", "status", "--json").stdout)["engines"].values()
        assert [host["node"] for host in engine["remote_hosts"]] == [right.address]
        for machine in (right, left):
            machine.run(*MORAY, "cluster", "down")
            assert not machine.pids()


def keys(left: Machine, right: Machine, tls: bool) -> Callable[[Machine], list[str]]:
    """Make the secrets on one machine and copy to the other what belongs there. Returns a machine's options."""
    folder = left.home / ".config" / "moray" / "tls"
    wanted = ["--tls", left.address, "--tls", right.address, "--folder", str(folder)] if tls else []
    made = json.loads(left.run(*MORAY, "cluster", "keys", "--json", *wanted).stdout)
    token = Path(made["token"])
    assert token.stat().st_mode & 0o777 == 0o600 and token.is_relative_to(left.home)
    shutil.copytree(token.parent, right.home / ".ray")
    if tls:
        there = right.home / ".config" / "moray" / "tls"
        there.mkdir(parents=True)
        for name in ("ca.pem", f"node-{right.address}.pem", f"node-{right.address}-key.pem"):
            shutil.copy(folder / name, there / name)

    def options(machine: Machine) -> list[str]:
        return ["--tls", str(machine.home / ".config" / "moray" / "tls")] if tls else []

    return options
