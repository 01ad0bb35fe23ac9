"""Giving the disk back parts of a file that is still in use."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


def punch_holes(path: Path, needed: Iterable[tuple[int, int]]) -> int:
    """Free all of a file but some ranges (offset, bytes), which stay where they are; the rest reads as zeros.

    Returns the bytes that the file still takes: all of them where the file system cannot do this.
    """
    size = path.stat().st_size
    if sys.platform != "linux":
        return size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        end = 0
        for offset, num_bytes in (*sorted(needed), (size, 0)):
            if offset > end:
                libc.fallocate(descriptor, _KEEP_SIZE_AND_PUNCH, end, offset - end)
            end = max(end, offset + num_bytes)
        return min(size, os.fstat(descriptor).st_blocks * 512)
    finally:
        os.close(descriptor)
