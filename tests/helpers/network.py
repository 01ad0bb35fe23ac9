"""Two machines in one: network namespaces with a shaped link between them. Needs root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """A network namespace with an address on the link, and a home of its own."""

    namespace: str
    device: str
    address: str
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program here."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, *command],
            env=os.environ | {"HOME": str(self.home), "XDG_STATE_HOME": str(self.home / "state")} | self.environment,
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def sent_bytes(self) -> int:
        """Bytes that this machine has put on the link so far."""
        links = json.loads(_ip("-n", self.namespace, "-s", "-j", "link", "show", self.device))
        return int(links[0]["stats64"]["tx"]["bytes"])

    def pids(self) -> list[int]:
        """Of every process in the namespace."""
        return [int(word) for word in _ip("netns", "pids", self.namespace).split()]


@contextmanager
def two_machines(folder: Path, rate: str, **environment: str) -> Iterator[tuple[Machine, Machine]]:
    """Two machines and a link of ``rate`` as tc takes it, e.g. 1gbit. Whatever runs there at the end is killed."""
    tag, cache = f"m{os.getpid() % 100000}", os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    machines = []
    for side, number in (("a", 1), ("b", 2)):
        home = folder / side
        home.mkdir()
        settings = {"XDG_CACHE_HOME": cache} | environment  # compiled kernels
        machines.append(Machine(f"{tag}{side}", f"{tag}{side}0", f"10.83.0.{number}", home, settings))
    left, right = machines
    try:
        for machine in machines:
            _ip("netns", "add", machine.namespace)
            _ip("-n", machine.namespace, "link", "set", "lo", "up")
        _ip("link", "add", left.device, "type", "veth", "peer", "name", right.device)
        for machine in machines:
            _ip("link", "set", machine.device, "netns", machine.namespace)
            _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", machine.device)
            _ip("-n", machine.namespace, "link", "set", machine.device, "up")
            shape = ["rate", rate, "burst", "1m", "latency", "50ms"]
            machine.run("tc", "qdisc", "replace", "dev", machine.device, "root", "tbf", *shape)
        yield left, right
    finally:
        for machine in machines:
            with suppress(subprocess.CalledProcessError):
                for pid in machine.pids():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        for machine in machines:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", machine.namespace)  # and the link with it
        with suppress(subprocess.CalledProcessError):
            _ip("link", "delete", left.device)  # if it never got there


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
