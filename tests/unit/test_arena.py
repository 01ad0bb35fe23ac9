from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import child, read_line

from moray.runtime import arena as arena_module
from moray.runtime import memory
from moray.runtime.arena import FAILED, NOWHERE, Arena, ArenaRef
from moray.runtime.errors import HostLostError, ResourceError
from moray.runtime.memory import available_memory, format_bytes, require_memory

CREATOR = """
import sys
from moray.runtime.arena import Arena
arena = Arena.create(7, 3, 5000)
arena.begin_write(1, None)[:5] = b"hello"
arena.end_write(1, 6)
print(arena.ref.pid, arena.ref.fd, arena.ref.num_bytes, flush=True)
for line in sys.stdin:
    arena.begin_write(int(line), 6)[:5] = b"again"
    arena.end_write(int(line), 2)
    print("written", flush=True)
"""


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(6, 4, 10_000)
    yield made
    made.close()


def read_ref(line: str) -> ArenaRef:
    return ArenaRef(*(int(word) for word in line.split()))


def holders_of(inode: int) -> set[int]:
    """Processes that have the memory with this inode open or mapped."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if descriptor.stat().st_ino == inode and "moray-arena" in os.readlink(descriptor):
                        found.add(int(process.name))
            lines = (process / "maps").read_text().splitlines()
            if any(f" {inode} " in line and "moray-arena" in line for line in lines):
                found.add(int(process.name))
    return found


def inode_of(arena: Arena) -> int:
    return os.stat(f"/proc/self/fd/{arena.ref.fd}").st_ino


def taken_bytes(arena: Arena) -> int:
    return 512 * os.stat(f"/proc/self/fd/{arena.ref.fd}").st_blocks


# ----------------------------------------------------------------------------------- one process


def test_slots_are_aligned_apart_and_zero(arena: Arena) -> None:
    assert (arena.num_slots, arena.num_experts, arena.slot_bytes) == (4, 6, 12288)
    addresses = arena.addresses(np.arange(4))
    assert (addresses % 4096 == 0).all() and (np.diff(addresses) == arena.slot_bytes).all()
    assert arena.num_bytes == arena.first_slot + 4 * arena.slot_bytes
    assert not arena.generations.any() and arena.directory.tolist() == [NOWHERE] * 6
    for index in range(4):
        assert not any(arena.slot(index)) and arena.is_new(index)


def test_a_slot_is_written_where_its_address_says(arena: Arena) -> None:
    for index in range(4):
        slot = arena.begin_write(index, None)
        slot[:] = bytes([index + 1]) * len(slot)
        arena.end_write(index, index)
    for index, address in enumerate(arena.addresses(np.arange(4)).tolist()):
        assert ctypes.string_at(address, arena.slot_bytes) == bytes([index + 1]) * arena.slot_bytes
    del slot


def test_a_generation_is_odd_while_writing_and_new_afterwards(arena: Arena) -> None:
    old = None
    for expert, expected in enumerate((2, 4, 6)):
        assert arena.is_new(2) == (expert == 0)
        arena.begin_write(2, old)
        assert arena.generations.tolist() == [0, 0, expected - 1, 0]
        assert arena.directory.tolist() == [NOWHERE] * 6  # what lay there is not found any more
        arena.end_write(2, expert)
        assert arena.generations.tolist() == [0, 0, expected, 0]
        assert arena.directory[expert] == 2 and arena.arrivals[0] == expert + 1
        old = expert


def test_a_failed_write_leaves_a_new_generation_that_nobody_finds(arena: Arena) -> None:
    arena.begin_write(0, None)
    arena.end_write(0, 5)
    arena.begin_write(0, 5)
    arena.mark_failed(3)
    arena.end_write(0, None)
    assert arena.generations[0] == 4 and arena.arrivals[0] == 2
    assert arena.directory.tolist() == [NOWHERE, NOWHERE, NOWHERE, FAILED, NOWHERE, NOWHERE]


def test_a_write_that_never_ended_is_taken_up_again(arena: Arena) -> None:
    """What a host that was killed leaves: no reader may take the odd generation for a content."""
    arena.begin_write(1, None)
    arena.begin_write(1, None)
    assert arena.generations[1] == 1 and arena.is_new(1)
    arena.end_write(1, 0)
    assert arena.generations[1] == 2


def test_counters_lie_where_their_addresses_say(arena: Arena) -> None:
    arena.begin_write(3, None)
    arena.end_write(3, 4)
    for index in range(4):
        assert ctypes.c_int64.from_address(arena.counter_address(index)).value == arena.generations[index]
    for expert, address in enumerate(arena.entry_addresses(np.arange(6)).tolist()):
        assert ctypes.c_int64.from_address(address).value == arena.directory[expert]
    assert ctypes.c_int64.from_address(arena.arrivals_address).value == 1


def test_many_slots_and_experts_do_not_overlap_their_counters() -> None:
    made = Arena.create(5000, 2000, 1)
    try:
        made.generations[:] = -1
        assert made.directory.tolist() == [NOWHERE] * 5000 and not made.arrivals.any()
        made.directory[:] = -3
        assert not any(made.slot(0)) and made.first_slot >= 128 + 8 * 7000
        assert (made.generations == -1).all() and not made.arrivals.any()
        assert made.slot_bytes == 4096
    finally:
        made.close()


def test_memory_is_taken_slot_by_slot() -> None:
    made = Arena.create(4, 4, 8 << 20)
    try:
        before = taken_bytes(made)
        assert before < 1 << 20
        made.require(1, 0, 4 << 20)
        made.require(1, 4 << 20, 4 << 20)
        assert taken_bytes(made) == before + (8 << 20)
        made.require(1, 0, 8 << 20)  # again, as a slot that is written again never needs
        assert taken_bytes(made) == before + (8 << 20)
    finally:
        made.close()


def test_a_sleeper_in_another_process_wakes_when_a_shard_comes(arena: Arena) -> None:
    script = """
import sys
from moray.runtime import futex
from moray.runtime.arena import Arena, ArenaRef
arena = Arena.attach(ArenaRef(*(int(word) for word in sys.argv[1:])))
seen = int(arena.arrivals[0])
print("asleep", flush=True)
while int(arena.arrivals[0]) == seen:
    futex.wait(arena.arrivals_address, seen, 60.0)
print(*arena.directory, flush=True)
futex.wait(arena.arrivals_address, seen, 60.0)  # not the value any more: no sleep
print("done", flush=True)
"""
    ref = arena.ref
    with child(script, str(ref.pid), str(ref.fd), str(ref.num_bytes)) as sleeper:
        assert read_line(sleeper) == "asleep"
        arena.begin_write(0, None)
        arena.end_write(0, 3)
        assert read_line(sleeper) == "-1 -1 -1 0 -1 -1"
        assert read_line(sleeper) == "done"


def test_closing_gives_the_memory_back() -> None:
    made = Arena.create(1, 1, 4096)
    inode = inode_of(made)
    assert holders_of(inode) == {os.getpid()}
    made.close()
    assert not holders_of(inode)


# --------------------------------------------------------------------------------- two processes


def test_another_process_sees_what_is_written_and_cannot_write() -> None:
    with child(CREATOR) as creator:
        assert creator.stdin is not None
        attached = Arena.attach(read_ref(read_line(creator)))
        assert (attached.num_slots, attached.num_experts, attached.slot_bytes) == (3, 7, 8192)
        assert attached.generations.tolist() == [0, 2, 0] and attached.directory.tolist() == [-1] * 6 + [1]
        assert bytes(attached.slot(1)[:5]) == b"hello"
        with pytest.raises((TypeError, ValueError)):
            attached.slot(1)[0] = 1
        for numbers in (attached.generations, attached.directory, attached.arrivals):
            with pytest.raises(ValueError, match="read-only"):
                numbers[0] = 1
        del numbers  # it would keep the memory mapped
        creator.stdin.write("1\n")
        creator.stdin.flush()
        assert read_line(creator) == "written"
        assert attached.generations.tolist() == [0, 4, 0]
        assert attached.directory.tolist() == [-1, -1, 1, -1, -1, -1, -1]
        assert bytes(attached.slot(1)[:5]) == b"again"
        attached.close()


def test_memory_is_gone_with_its_last_process_however_it_ends() -> None:
    with child(CREATOR) as creator:
        ref = read_ref(read_line(creator))
        inode = os.stat(f"/proc/{ref.pid}/fd/{ref.fd}").st_ino
        assert holders_of(inode) == {ref.pid}
        creator.kill()
        creator.wait()
        assert not holders_of(inode)


def test_memory_outlives_its_creator_while_somebody_holds_it() -> None:
    with child(CREATOR) as creator:
        survivor = Arena.attach(read_ref(read_line(creator)))
        creator.kill()
        creator.wait()
    assert bytes(survivor.slot(1)[:5]) == b"hello"
    # A restarted host takes it back from the survivor's read-only descriptor, to write.
    again = Arena.attach(survivor.ref, writable=True)
    slot = again.begin_write(1, 6)
    slot[:5] = b"newer"
    assert survivor.generations[1] == 3
    again.end_write(1, 0)
    assert survivor.generations[1] == 4 and bytes(survivor.slot(1)[:5]) == b"newer"
    inode = inode_of(survivor)
    del slot
    survivor.close()
    assert holders_of(inode) == {os.getpid()}
    again.close()
    assert not holders_of(inode)


def test_a_dead_process_holds_no_arena() -> None:
    with child(CREATOR) as creator:
        ref = read_ref(read_line(creator))
        creator.kill()
        creator.wait()
        with pytest.raises(HostLostError, match=f"process {ref.pid} that holds an arena is gone"):
            Arena.attach(ref)


def test_a_descriptor_that_became_another_file_is_refused(tmp_path: Path) -> None:
    num_bytes = 8192
    (tmp_path / "file").write_bytes(bytes(num_bytes))
    before = len(os.listdir("/proc/self/fd"))
    with (tmp_path / "file").open("rb") as file:
        for announced in (num_bytes, num_bytes + 4096):
            with pytest.raises(HostLostError, match=f"process {os.getpid()} no longer holds the arena"):
                Arena.attach(ArenaRef(os.getpid(), file.fileno(), announced))
    assert len(os.listdir("/proc/self/fd")) == before


# -------------------------------------------------------------------------------------- resources


def test_an_arena_larger_than_memory_says_needed_and_free() -> None:
    with pytest.raises(ResourceError, match=r"arena of 1000 experts needs \d+\.\d TiB .*, \d+\.\d [MG]iB are free"):
        Arena.create(1000, 1000, 1 << 40)


def test_a_full_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    made = Arena.create(2, 2, 4096)
    monkeypatch.setattr(arena_module.os, "posix_fallocate", refuse)
    refused = r"4\.0 KiB more for an arena do not fit .*No space left on device.*less with --host-memory"
    for attempt in (lambda: made.require(1, 0, 4096), lambda: Arena.create(2, 2, 4096)):
        with pytest.raises(ResourceError, match=refused):
            attempt()
    made.close()


@pytest.mark.parametrize(
    ("limit", "usage", "expected"),
    [("1000", "400", 600), ("1000", "1400", 0), ("max", "400", None), (str(2**63 - 4096), "400", None)],
)
def test_a_containers_limit_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, usage: str, expected: int | None
) -> None:
    files = tmp_path / "limit", tmp_path / "usage"
    files[0].write_text(limit + "\n")
    files[1].write_text(usage + "\n")
    monkeypatch.setattr(memory, "_CGROUP_FILES", ((str(tmp_path / "none"), "none"), tuple(map(str, files))))
    if expected is None:
        assert available_memory() > 1 << 20
        return
    assert available_memory() == expected
    with pytest.raises(ResourceError, match=rf"a test needs 601 B of memory, {expected} B are free"):
        require_memory(601, "a test")
    require_memory(expected, "a test")


def test_sizes_are_written_as_people_do() -> None:
    sizes = [0, 1023, 1024, 1536, 3 << 20, int(12.3 * 2**30), 5 << 40, 5000 << 40]
    assert [format_bytes(size) for size in sizes] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 KiB", "3.0 MiB", "12.3 GiB", "5.0 TiB", "5000.0 TiB")
    ]
