from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from moray.runtime import topology
from moray.runtime.topology import Core, CoreClaim, choose_cores, cores_of_host, on_cores, read_cores

HYBRID = [Core(0, 0, 0, 1000), Core(1, 0, 1, 1000), Core(2, 0, 0, 1000), Core(3, 0, 1, 1000), Core(4, speed=600)]
TWO_NODES = [Core(cpu, node=cpu // 4) for cpu in range(8)]


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_cores_are_read_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 9})
    write(tmp_path / "node/node0/cpulist", "0-1\n")
    write(tmp_path / "node/node1/cpulist", "2,8-9\n")
    for cpu, siblings, speed in [(0, "0,8", 1024), (1, "1,9", 512), (2, "2", 512), (9, "1,9", 512)]:
        write(tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list", siblings + "\n")
        write(tmp_path / f"cpu/cpu{cpu}/cpu_capacity", f"{speed}\n")
    assert read_cores(tmp_path) == [Core(0, 0, 0, 1024), Core(1, 0, 0, 512), Core(2, 1, 0, 512), Core(9, 1, 1, 512)]


def test_a_kernel_that_tells_nothing_has_equal_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert read_cores(tmp_path) == [Core(3), Core(5)]


def test_this_machine_can_be_read() -> None:
    assert {core.cpu for core in read_cores()} == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, {0}), (2, {0, 2}), (3, {0, 2, 4}), (4, {0, 1, 2, 4}), (5, {0, 1, 2, 3, 4}), (9, None)]
)
def test_fast_physical_cores_come_first_and_hyperthreads_last(count: int, expected: set[int] | None) -> None:
    assert choose_cores(HYBRID, count) == (expected or {0, 1, 2, 3, 4})


def test_one_numa_node_is_enough_if_it_has_the_cores() -> None:
    assert choose_cores(TWO_NODES, 4) == {0, 1, 2, 3}
    assert choose_cores(TWO_NODES, 4, taken={1, 2}) == {4, 5, 6, 7}
    assert choose_cores(TWO_NODES, 3, taken={1, 5}) == {0, 2, 3}
    assert len(choose_cores(TWO_NODES, 6)) == 6
    siblings = [Core(cpu, node=cpu // 4, sibling=cpu % 2) for cpu in range(8)]
    assert choose_cores(siblings, 4) == {0, 2, 4, 6}  # two more physical cores are worth more than one node


def test_hosts_are_spread_over_numa_nodes_if_every_node_gets_one() -> None:
    assert cores_of_host(TWO_NODES, 0, 1) is None
    assert [cores_of_host(TWO_NODES, i, 3) for i in range(3)] == [{0, 1, 2, 3}, {4, 5, 6, 7}, {0, 1, 2, 3}]
    assert cores_of_host(TWO_NODES[:4], 0, 2) is None


def test_two_engines_choose_different_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "cpu_quota", lambda: None)
    scope = f"test-{os.getpid()}"
    with closing(CoreClaim(TWO_NODES, 2, scope)) as first, closing(CoreClaim(TWO_NODES, 2, scope)) as second:
        assert first.cpus == {0, 1} and second.cpus == {2, 3}
        with closing(CoreClaim(TWO_NODES, 7, scope)) as third:
            assert third.cpus is not None and len(third.cpus) == 7
    with closing(CoreClaim(TWO_NODES, 2, scope)) as fourth:
        assert fourth.cpus == {0, 1}
    assert CoreClaim(TWO_NODES, 8, scope).cpus is None
    monkeypatch.setattr(topology, "cpu_quota", lambda: 4.0)
    assert CoreClaim(TWO_NODES, 2, scope).cpus is None


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing to choose")
def test_threads_made_on_chosen_cores_stay_there() -> None:
    before = os.sched_getaffinity(0)
    chosen = {min(before)}
    found: list[set[int]] = []
    done = threading.Event()

    def look() -> None:
        done.wait(10)
        found.append(os.sched_getaffinity(0))

    with on_cores(chosen):
        thread = threading.Thread(target=look)
        thread.start()
    assert os.sched_getaffinity(0) == before
    done.set()
    thread.join()
    assert found == [chosen]
