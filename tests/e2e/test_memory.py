"""Private memory stays near the trunk's size, measured by benchmarks/memory.py on a checkpoint of 1.1 GiB."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.memory]

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    return importlib.import_module("memory")


def test_experts_are_never_in_private_memory(memory: ModuleType) -> None:
    with memory.checkpoint_and_store(None, "1gib") as (checkpoint, store):
        report = memory.measure(checkpoint, store)
    assert [usage.name for usage in report.exceeded] == []
    # The check can fail: the experts alone are larger than what the compute process may have beside its trunk.
    compute = report.usages[0]
    assert compute.name == "compute process"
    assert report.expert_bytes > compute.limit_bytes - report.trunk_bytes
    assert report.trunk_bytes < compute.peak_bytes < compute.limit_bytes
    assert report.arena_bytes >= report.expert_bytes
