"""Watching a value while something runs. Imports next to nothing: what measures memory should not take any."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self


class Sampling(ABC):
    """Calls ``sample`` every ``interval_s`` in a thread, between entering and leaving."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s, self._stop = interval_s, threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    @abstractmethod
    def sample(self) -> None: ...

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()


def private_bytes(pid: int) -> int:
    """RssAnon; 0 if the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)
