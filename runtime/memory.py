"""How much memory this process may still take, and sizes in words."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil

from moray.runtime.errors import ResourceError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 512 << 20
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def private_bytes() -> int:
    """Memory that only this process has and the kernel cannot drop, now; where that is not told, all it has."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def available_memory() -> int:
    """Bytes that can still be used: the smaller of the machine's and the control group's (container's) answer.

    A group's page cache counts as used here although the kernel could drop it, so the answer is on the safe side.
    """
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and int(limit) < 1 << 60:
            available = min(available, max(0, int(limit) - int(usage)))
    return available


def require_memory(needed: int, purpose: str) -> None:
    """Raise ResourceError if ``needed`` bytes are not available now."""
    free = available_memory()
    if needed > free:
        raise ResourceError(
            f"{purpose} needs {format_bytes(needed)} of memory, {format_bytes(free)} are free; "
            "close other programs, use a smaller recipe (--recipe) or a machine with more memory"
        )


def format_bytes(count: float) -> str:
    """Sizes as people write them: 12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def reuse_freed_memory() -> None:
    """Let this process's C library keep what is freed, up to a limit, and use it again.

    A prefill's activations are megabytes each. By default glibc maps and unmaps each of them, and the kernel zeroes
    their pages every time: a tenth of a prefill or more. No effect with other C libraries.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
