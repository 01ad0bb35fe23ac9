"""Two machines in one: network namespaces with a shaped link between them. Needs root."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_CLONE_NEWNET = 0x40000000  # <sched.h>


@dataclass(frozen=True)
class Machine:
    """A network namespace with an address on the link, and a home of its own."""

    namespace: str
    device: str
    address: str
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a program here."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program here."""
        with self.start(*command) as process:
            out, err = process.communicate()
        assert not check or process.returncode == 0, f"{command}: {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def shape(self, rate: str, burst: str = "1m") -> None:
        """Bound what it sends to ``rate``, as tc takes it."""
        qdisc = ["qdisc", "replace", "dev", self.device, "root", "tbf", "rate", rate, "burst", burst]
        subprocess.run(["tc", "-n", self.namespace, *qdisc, "latency", "50ms"], check=True)

    def set_link(self, state: str) -> None:
        """``up`` or ``down``, as if the cable were pulled."""
        _ip("-n", self.namespace, "link", "set", self.device, state)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and what it starts from now on, is on this machine: its network, its home."""
        before, kept = os.open("/proc/thread-self/ns/net", os.O_RDONLY), dict(os.environ)
        inside = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        try:
            _enter_network(inside)
            os.environ.update(self._environment)
            yield
        finally:
            _enter_network(before)
            os.environ.clear()
            os.environ.update(kept)
            os.close(before)
            os.close(inside)

    @property
    def _environment(self) -> dict[str, str]:
        return {"HOME": str(self.home), "XDG_STATE_HOME": str(self.home / "state")} | self.environment

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
    # Addresses of their own: Ray looks for a cluster's among all processes of the machine.
    tag, cache = f"m{os.getpid() % 100000}", os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    machines = []
    for side, number in (("a", 1), ("b", 2)):
        home = folder / side
        home.mkdir()
        settings = {"XDG_CACHE_HOME": cache} | environment  # compiled kernels
        machines.append(Machine(f"{tag}{side}", f"{tag}{side}0", f"10.83.{os.getpid() % 250}.{number}", home, settings))
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
            machine.shape(rate)
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


def _enter_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns needs Python 3.12
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
