"""Keeps this machine's node in its cluster. A process of its own: ``... keeper.py LOG HEAD:PORT COMMAND``.

A cluster that has not heard of a node for some seconds takes it for dead, and when they meet again the node's Ray
processes end. So Ray is started again here as soon as the head answers. SIGTERM ends both.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

STARTED = "Ray runtime started"  # what Ray says then
_LOOK_S, _AGAIN_S = 1.0, 3.0
_STOP_S = 35.0  # Ray drains for up to 30 s
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def keep(log: Path, gcs_address: str, command: Sequence[str]) -> int:
    """Run the command again whenever it ends. Returns its status if it does not start at all."""
    has_started = False
    while True:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
            )
        try:
            status = process.wait()
        except SystemExit:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            raise
        has_started |= STARTED in log.read_text(errors="replace")
        if not has_started:
            return status
        time.sleep(_AGAIN_S)
        while not answers(gcs_address):
            time.sleep(_LOOK_S)


def answers(gcs_address: str) -> bool:
    """Whether anybody listens at HOST:PORT."""
    host, _, port = gcs_address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), _LOOK_S):
            return True
    except OSError:
        return False


def _end_with_parent() -> None:
    """In the new process: should the keeper be killed, Ray is told to end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def main(log: str, gcs_address: str, *command: str) -> None:
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(keep(Path(log), gcs_address, command))


if __name__ == "__main__":
    main(*sys.argv[1:])
