"""Stands in for Ray's agents (metrics, runtime environments) where nobody uses them: a raylet ends without its agents.

Waits until the raylet has ended, and uses no CPU. Run by a raylet (ray_session.py), by file path.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while os.getppid() == int(os.environ["RAY_RAYLET_PID"]):  # else it ended before the line above
        signal.pause()
