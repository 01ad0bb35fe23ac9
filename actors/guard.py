"""Ending with the process that owns the engine, at once and however it ends.

Ray notices a driver that was killed after some seconds; an arena of many gigabytes should not wait for that.
"""

from __future__ import annotations

import os
import select
import threading


def exit_with(pid: int | None) -> None:
    """End this process as soon as process ``pid`` of this machine has ended. None: do nothing."""
    if pid is None:
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    threading.Thread(target=_wait, args=(descriptor,), name="moray-guard", daemon=True).start()


def _wait(descriptor: int) -> None:
    select.select([descriptor], [], [])  # readable when the process has ended; uses no CPU meanwhile
    os._exit(1)
