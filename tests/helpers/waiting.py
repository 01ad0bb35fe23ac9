"""Waiting for what happens in other threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic, sleep


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Returns when it is so; fails if that takes longer than anything may."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "waited in vain"
        sleep(0.01)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def until_closed(num_files: int) -> None:
    """Until this process has no more than so many open files. Threads close sockets later."""
    until(lambda: num_open_files() <= num_files)
