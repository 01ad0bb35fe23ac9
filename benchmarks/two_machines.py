"""Two machines in one, for benchmarks: network namespaces with a shaped veth link, and a worker process in each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BURST_S = 2.5e-5  # of a shaped link: what goes at once. A real card sends nothing faster than its rate.


@contextmanager
def namespaces(gbit: float | None = None) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Two network namespaces on one link: of each its name and its address. Needs root.

    ``gbit``: Gbit/s of either direction; None: not shaped.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else who is told to end leaves them behind
    tag = f"mb{os.getpid() % 100000}"
    sides = [(f"{tag}{side}", f"10.213.0.{number}") for side, number in (("a", 1), ("b", 2))]
    try:
        for name, _ in sides:
            run_ip("netns", "add", name)
            run_ip("-n", name, "link", "set", "lo", "up")
        run_ip("link", "add", sides[0][0], "type", "veth", "peer", "name", sides[1][0])
        for name, address in sides:
            run_ip("link", "set", name, "netns", name)
            run_ip("-n", name, "address", "add", f"{address}/30", "dev", name)
            run_ip("-n", name, "link", "set", name, "up")
            if gbit is not None:
                burst = str(int(gbit * 1e9 / 8 * _BURST_S))
                shape = ["root", "tbf", "rate", f"{gbit:g}gbit", "burst", burst, "latency", "50ms"]
                run_ip("netns", "exec", name, "tc", "qdisc", "replace", "dev", name, *shape)
        yield sides[0], sides[1]
    finally:
        for name, _ in sides:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)  # and the link with it
        subprocess.run(["ip", "link", "delete", sides[0][0]], check=False, capture_output=True)


def run_ip(*words: str) -> None:
    if subprocess.run(["ip", *words], check=False).returncode:
        raise SystemExit(f"`ip {' '.join(words)}` failed; this needs root and iproute2")


class Worker:
    """A process of placement_worker.py. Orders and answers are lines of JSON."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        """``prefix``: what the process is started with, such as ``ip netns exec NAME taskset -c 0``."""
        command = [*prefix, sys.executable, str(Path(__file__).with_name("placement_worker.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """To the oldest order that was not answered yet."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __call__(self, **order: Any) -> dict[str, Any]:
        self.tell(**order)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
