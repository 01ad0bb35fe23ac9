"""Which cores to compute on: physical ones before hyperthreads, one NUMA node before several, fast before slow.

Cores that another engine on this machine has chosen come last. A choice is announced by binding an abstract socket
for each core: it is gone with its process, and needs no file.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moray.runtime.cpu import cpu_quota

_SYSTEM = Path("/sys/devices/system")
#: Where a kernel says how fast a core is, in units of its own; the first that is there counts.
_SPEEDS = ("cpu_capacity", "acpi_cppc/highest_perf", "cpufreq/cpuinfo_max_freq")


@dataclass(frozen=True, slots=True)
class Core:
    """One logical CPU. ``sibling``: its rank among the hyperthreads of its physical core."""

    cpu: int
    node: int = 0
    sibling: int = 0
    speed: int = 0


def read_cores(system: Path = _SYSTEM) -> list[Core]:
    """The CPUs that this process may run on."""
    nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in system.glob("node/node[0-9]*")
        for cpu in _cpu_list(folder / "cpulist")
    }
    cores = []
    for cpu in sorted(os.sched_getaffinity(0)):
        folder = system / f"cpu/cpu{cpu}"
        siblings = _cpu_list(folder / "topology/thread_siblings_list") or [cpu]
        speed = next((value for name in _SPEEDS if (value := _number(folder / name))), 0)
        cores.append(Core(cpu, nodes.get(cpu, 0), siblings.index(cpu) if cpu in siblings else 0, speed))
    return cores


def choose_cores(cores: Sequence[Core], count: int, taken: Collection[int] = ()) -> frozenset[int]:
    """The ``count`` best CPUs of ``cores``, or all of them if there are fewer."""

    def best(candidates: Sequence[Core]) -> list[Core]:
        return sorted(candidates, key=lambda core: (core.cpu in taken, core.sibling, -core.speed, core.cpu))[:count]

    def cost(chosen: Sequence[Core]) -> tuple[int, int, int, int]:
        in_use = sum(core.cpu in taken for core in chosen)
        hyperthreads = sum(core.sibling > 0 for core in chosen)
        return in_use, hyperthreads, len({core.node for core in chosen}), -sum(core.speed for core in chosen)

    nodes = numa_nodes(cores)
    choices = [best(cores)] + [best([core for core in cores if core.node == node]) for node in nodes]
    enough = [chosen for chosen in choices if len(chosen) == min(count, len(cores))]
    return frozenset(core.cpu for core in min(enough, key=cost))


def numa_nodes(cores: Sequence[Core]) -> list[int]:
    """The NUMA nodes that have cores of these."""
    return sorted({core.node for core in cores})


def cores_of_host(cores: Sequence[Core], index: int, num_hosts: int) -> frozenset[int] | None:
    """Where expert host ``index`` of ``num_hosts`` loads and computes: on one NUMA node, whose memory it then has.

    None, anywhere, if there is one node or if some node would have no host.
    """
    nodes = numa_nodes(cores)
    if len(nodes) == 1 or num_hosts < len(nodes):
        return None
    return frozenset(core.cpu for core in cores if core.node == nodes[index % len(nodes)])


class CoreClaim:
    """The cores of one engine, chosen and announced. Keep it as long as they are used."""

    def __init__(self, cores: Sequence[Core], count: int, scope: str = "moray") -> None:
        """``cpus`` is None, anywhere, where a choice would be worth nothing, or would be made blindly:

        all cores are wanted, or a control group limits the time (the other containers' choices are not seen).
        """
        self.cpus: frozenset[int] | None = None
        self._sockets: list[socket.socket] = []
        if count >= len(cores) or cpu_quota() is not None:
            return
        self.cpus = choose_cores(cores, count, {core.cpu for core in cores if not _is_free(scope, core.cpu)})
        self._sockets = [held for cpu in sorted(self.cpus) if (held := _announce(scope, cpu)) is not None]

    def close(self) -> None:
        for held in self._sockets:
            held.close()


@contextlib.contextmanager
def on_cores(cpus: Collection[int] | None) -> Iterator[None]:
    """Run this thread there, and the threads that it starts meanwhile for good. None: where it runs now.

    Also takes Ray's niceness from it (15 unless Ray was told otherwise), if this user may.
    """
    before = os.sched_getaffinity(0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, min(0, os.getpriority(os.PRIO_PROCESS, 0)))
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _announce(scope: str, cpu: int) -> socket.socket | None:
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(f"\0{scope}-{os.getuid()}-core-{cpu}")
    except OSError:
        held.close()
        return None
    return held


def _is_free(scope: str, cpu: int) -> bool:
    held = _announce(scope, cpu)
    if held is not None:
        held.close()
    return held is not None


def _cpu_list(file: Path) -> list[int]:
    """``0-3,8`` -> [0, 1, 2, 3, 8]; nothing if the file is not there."""
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    ranges = [part.partition("-") for part in text.split(",") if part]
    return [cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)]


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0
