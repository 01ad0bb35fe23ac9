"""Sleeping on a number in shared memory, between processes (futex(2)). Linux only."""

from __future__ import annotations

import ctypes
import platform

_NUMBER = 202 if platform.machine() in ("x86_64", "AMD64") else 98
_WAIT, _WAKE = 0, 1  # not the private kind: the mapping's file is the key, so other processes' sleepers are found
_EVERYONE = 2**31 - 1
_library = ctypes.CDLL(None, use_errno=True)


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def wait(address: int, value: int, timeout_s: float) -> None:
    """Sleep while the int32 at ``address`` is ``value``'s lower half; may wake early. Releases the GIL."""
    time = _TimeSpec(int(timeout_s), int(1e9 * (timeout_s % 1)))
    expected = ctypes.c_uint32(value & 0xFFFFFFFF)
    _library.syscall(_NUMBER, ctypes.c_void_p(address), _WAIT, expected, ctypes.byref(time), None, 0)


def wake(address: int) -> None:
    """Wake all who sleep on ``address``."""
    _library.syscall(_NUMBER, ctypes.c_void_p(address), _WAKE, _EVERYONE, None, None, 0)
