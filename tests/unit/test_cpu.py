from __future__ import annotations

import os
from pathlib import Path

import pytest

from moray.deploy.config import EngineConfig
from moray.runtime import cpu
from moray.runtime.cpu import cpu_quota, spare_core, usable_cores


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (64.0, 4), (4.0, 4), (3.9, 3), (1.0, 1), (0.25, 1)])
def test_an_engine_takes_the_cores_it_may_run_on_or_the_whole_ones_of_its_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6})
    monkeypatch.setattr(cpu, "cpu_quota", lambda: quota)
    assert usable_cores() == EngineConfig().num_threads == expected
    assert EngineConfig(threads=7).num_threads == 7


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "missing", tmp_path) is None


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_the_smallest_quota_of_the_groups_above_the_process_counts(tmp_path: Path) -> None:
    groups, root = write(tmp_path / "groups", "0::/user/session\n"), tmp_path / "sys"
    assert cpu_quota(groups, root) is None
    write(root / "user/session/cpu.max", "max 100000\n")
    assert cpu_quota(groups, root) is None
    write(root / "user/cpu.max", "150000 100000\n")
    write(root / "cpu.max", "400000 100000\n")
    assert cpu_quota(groups, root) == 1.5


def test_quotas_of_version_1_groups_are_found_at_the_root_of_a_container(tmp_path: Path) -> None:
    groups = write(tmp_path / "groups", "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    write(tmp_path / "sys/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    quota = write(tmp_path / "sys/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert cpu_quota(groups, tmp_path / "sys") is None
    quota.write_text("250000\n")
    assert cpu_quota(groups, tmp_path / "sys") == 2.5


@pytest.mark.parametrize(
    ("siblings", "quota", "expected"),
    [
        (["0", "1"], None, True), (["0-1", "0-1"], None, False), (["0,2", "1,3", "0,2", "1,3"], None, True),
        (["0"], None, False), (["0", "1"], 1.5, False), ([], None, False),
    ],
)  # fmt: skip
def test_a_hardware_thread_of_the_same_core_is_no_spare_core(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, siblings: list[str], quota: float | None, expected: bool
) -> None:
    for number, text in enumerate(siblings):
        write(tmp_path / f"cpu{number}/topology/thread_siblings_list", text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(len(siblings) or 2)))
    monkeypatch.setattr(cpu, "cpu_quota", lambda: quota)
    assert spare_core(tmp_path) is expected
