"""A memory cgroup (v1) around a process: a limit on what it holds, page cache included. Needs root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

_ROOT = Path("/sys/fs/cgroup/memory")
_PREFIX = "moray-benchmark-"


class MemoryGroup:
    """Of the processes put into it, what they hold from then on counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, pid: int) -> None:
        (self._path / "cgroup.procs").write_text(str(pid))

    def limit(self, num_bytes: int | None) -> None:
        """None: no limit."""
        (self._path / "memory.limit_in_bytes").write_text(str(-1 if num_bytes is None else num_bytes))

    def used(self) -> int:
        """Bytes that the group holds: anonymous memory, page cache, and the kernel's memory for it."""
        return int((self._path / "memory.usage_in_bytes").read_text())


@contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup]:
    """A group of its own; what is still charged to it at the end is dropped. Its processes must have ended by then."""
    for left in _ROOT.glob(f"{_PREFIX}*"):  # of programs that were killed
        if not Path("/proc", left.name.removeprefix(_PREFIX).split("-")[0]).exists():
            _remove(left)
    path = _ROOT / f"{_PREFIX}{os.getpid()}-{name}"
    try:
        path.mkdir()
    except OSError as error:
        raise SystemExit(
            f"cannot make the memory cgroup {path}: {error.strerror}; it needs root and cgroup v1"
        ) from error
    try:
        yield MemoryGroup(path)
    finally:
        for _ in range(50):  # a process that ended leaves its group a little later
            if _remove(path):
                break
            sleep(0.1)


def _remove(path: Path) -> bool:
    try:
        (path / "memory.force_empty").write_text("0")
        path.rmdir()
    except OSError:
        return False
    return True
