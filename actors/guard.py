"""Ending with the process that owns the engine, at once and however it ends.

Ray notices a driver that was killed after seconds, and its own helpers only after minutes; an arena of many
gigabytes should not wait for that.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Owner:
    """The process an engine lives for, on this machine, and the Ray processes it started."""

    pid: int
    ray_processes: tuple[tuple[int, float], ...]  # pid and time of creation, for pids are used again


def exit_with(owner: Owner | None, *, end_ray: bool = False) -> None:
    """End this process as soon as its owner has ended. None: live until told.

    ``end_ray``: end the owner's Ray processes first; one actor of an engine does that.
    """
    if owner is None:
        return
    try:
        descriptor = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        os._exit(1)
    arguments = (descriptor, owner.ray_processes if end_ray else ())
    threading.Thread(target=_wait, args=arguments, name="moray-guard", daemon=True).start()


def _wait(descriptor: int, ray_processes: tuple[tuple[int, float], ...]) -> None:
    select.select([descriptor], [], [])  # readable when the process has ended; uses no CPU meanwhile
    for pid, created in ray_processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created:
                process.kill()
    os._exit(1)
