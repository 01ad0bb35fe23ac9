"""Whatever befalls another node, its link, or this one while it is used: the same tokens, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="needs root and iproute2"),
    pytest.mark.timeout(7200),
]


def benchmark(name: str, *options: str) -> str:
    """Run one in a process of its own, which moves to another network. It ends with status 1 for a wrong answer."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--nodes", "2", *options]
    # An engine that another test had in this process left its token there, which the nodes do not know.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_answer_is_the_same_whatever_befalls_another_node(tmp_path: Path) -> None:
    benchmark("faults.py", "--times", "5", "--tokens", "1000", "--json", str(tmp_path / "runs.json"))
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    by_fault = {fault: [run["same"] for run in runs if run["fault"] == fault] for fault in {r["fault"] for r in runs}}
    assert len(by_fault) == 12 and all(same == [True] * 5 for same in by_fault.values()), by_fault


def test_two_minutes_of_faults_of_two_nodes(tmp_path: Path) -> None:
    assert " 0 wrong" in benchmark("soak.py", "--minutes", "2", "--every", "5", "--tokens", "1000")
