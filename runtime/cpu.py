"""How many cores this process may compute with, and whether it may wait awake."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """The cores that this process may run on, or fewer if its control groups (a container's limit) allow less time."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else min(cores, max(1, int(quota)))


def spare_core(cpus: Path = Path("/sys/devices/system/cpu")) -> bool:
    """Whether a thread that waits awake leaves a core to others: a hardware thread of the same core is none."""
    if usable_cores() < 2:
        return False
    siblings = [cpus / f"cpu{number}/topology/thread_siblings_list" for number in os.sched_getaffinity(0)]
    return len({file.read_text() for file in siblings if file.is_file()}) > 1


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The cores' worth of time that this process's control groups (both versions) allow it; None: no limit."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # a kernel without control groups
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers
        own = base / group.strip("/")
        # A container sees its own group at the root, not at the path that the host knows.
        folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
        quotas += [quota for folder in folders if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


def _read_quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return int(quota) / int(period) if quota.isdigit() else None  # "max" and -1: none
