"""The arena: one host's shared memory, cut into slots that hold one shard each, and a directory of what is where.

    0          8 bytes   magic b"MORAYAR2"
    8          8 bytes   number of slots
    16         8 bytes   bytes in a slot
    24         8 bytes   offset of slot 0 (a multiple of 4096)
    32         8 bytes   number of experts
    40         8 bytes   1 if hints do any good now, else 0
    64         8 bytes   arrivals: grows with each shard that has come; its lower half is a futex
    128        8 bytes   a slot: its generation
    ...        8 bytes   an expert of the host: its slot; -1: not here; -2: could not be loaded, ask the host why
    slot 0 ...

It is a memfd: not limited by /dev/shm, page-aligned, and gone when the last process that holds it is gone, however
that happens. Another process of the same user attaches through /proc/PID/fd/FD. A slot takes memory when it is first
written, and the host asks for all of it before (``require``), so that writing can never raise SIGBUS.

A generation is 0 before the first content, odd while its slot is being written, and grows by 2 with each new content.
The writer takes an expert out of the directory before it touches the slot, and puts one in when it is done. A reader
takes the slot from the directory, then the generation, then looks at the directory again; it compares the generation
again after use, outside any compiled function (the compiler would fold the second read); what it computed counts only
if both are equal. (The order of loads and stores is that of x86; elsewhere fences would be needed.)
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass

import numpy as np

from moray.runtime.arrays import Ints
from moray.runtime.errors import HostLostError, ResourceError
from moray.runtime.futex import wake
from moray.runtime.layout.shard import ALIGNMENT, round_up
from moray.runtime.memory import format_bytes, require_memory

MAGIC = b"MORAYAR2"
_WANTS_HINTS_AT, _ARRIVALS_AT = 40, 64
_HEADER_BYTES = 128
_FIRST_CONTENT = 2  # generation
NOWHERE, FAILED = -1, -2  # in the directory


@dataclass(frozen=True, slots=True)
class ArenaRef:
    """How to reach an arena: a process that holds it, and its descriptor there."""

    pid: int
    fd: int
    num_bytes: int


class Arena:
    """A mapped arena. The creator writes; everybody else maps it read-only."""

    def __init__(self, fd: int, num_bytes: int, writable: bool) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.num_bytes = num_bytes
        numbers = self._bytes[8:40].view(np.int64)
        self.num_slots, self.slot_bytes, self.first_slot, self.num_experts = (int(x) for x in numbers)
        counters = self._bytes[_HEADER_BYTES:][: 8 * (self.num_slots + self.num_experts)].view(np.int64)
        self.generations: Ints = counters[: self.num_slots]
        self.directory: Ints = counters[self.num_slots :]
        self.arrivals: Ints = self._bytes[_ARRIVALS_AT:][:8].view(np.int64)
        self.base_address = int(self._bytes.ctypes.data)

    @classmethod
    def create(cls, num_experts: int, num_slots: int, slot_bytes: int) -> Arena:
        """Map a new, empty arena. Raises ResourceError with the needed and free bytes."""
        slot_bytes = round_up(slot_bytes, ALIGNMENT)
        first_slot = round_up(_HEADER_BYTES + 8 * (num_slots + num_experts), ALIGNMENT)
        num_bytes = first_slot + num_slots * slot_bytes
        require_memory(num_bytes, f"an arena of {num_slots} experts")
        fd = os.memfd_create("moray-arena", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        try:
            _allocate(fd, 0, first_slot)
        except BaseException:
            os.close(fd)
            raise
        header = MAGIC + np.array([num_slots, slot_bytes, first_slot, num_experts], dtype=np.int64).tobytes()
        os.pwrite(fd, header, 0)
        arena = cls(fd, num_bytes, writable=True)
        arena.directory[:] = NOWHERE
        return arena

    @classmethod
    def attach(cls, ref: ArenaRef, *, writable: bool = False) -> Arena:
        """Map another process's arena. ``writable`` is for a restarted host that takes its arena back.

        Raises HostLostError if that process is gone.
        """
        try:
            flags = os.O_RDWR if writable else os.O_RDONLY
            fd = os.open(f"/proc/{ref.pid}/fd/{ref.fd}", flags | os.O_CLOEXEC)
        except OSError as error:
            raise HostLostError(f"the process {ref.pid} that holds an arena is gone ({error.strerror})") from error
        # Its host may have gone, and the number be another file's now.
        if os.fstat(fd).st_size != ref.num_bytes or os.pread(fd, len(MAGIC), 0) != MAGIC:
            os.close(fd)
            raise HostLostError(f"process {ref.pid} no longer holds the arena announced for it")
        return cls(fd, ref.num_bytes, writable)

    @property
    def ref(self) -> ArenaRef:
        """Where another process finds this arena, for as long as this process lives."""
        return ArenaRef(os.getpid(), self._fd, self.num_bytes)

    @property
    def wants_hints(self) -> bool:
        """Told by the host: whether it would load what is predicted."""
        return bool(self._bytes[_WANTS_HINTS_AT])

    @wants_hints.setter
    def wants_hints(self, wants: bool) -> None:
        self._bytes[_WANTS_HINTS_AT] = wants

    def slot(self, index: int) -> memoryview:
        start = self.first_slot + index * self.slot_bytes
        return self._bytes.data[start : start + self.slot_bytes]

    def addresses(self, slots: Ints) -> Ints:
        """Addresses of slots in this process; valid until ``close``."""
        return self.base_address + self.first_slot + slots * self.slot_bytes

    def entry_addresses(self, experts: Ints) -> Ints:
        """Addresses of directory entries in this process."""
        return self.base_address + _HEADER_BYTES + 8 * (self.num_slots + experts)

    def counter_address(self, slot: int) -> int:
        """Address of a slot's generation in this process."""
        return self.base_address + _HEADER_BYTES + 8 * slot

    @property
    def arrivals_address(self) -> int:
        """Of ``arrivals`` in this process: what readers sleep on."""
        return self.base_address + _ARRIVALS_AT

    def is_new(self, slot: int) -> bool:
        """Whether a slot has never held a whole shard, so that its memory may not have been taken yet."""
        return bool(self.generations[slot] < _FIRST_CONTENT)

    def require(self, slot: int, start: int, num_bytes: int) -> None:
        """Take the memory of a part of a slot before it is written. Raises ResourceError."""
        _allocate(self._fd, self.first_slot + slot * self.slot_bytes + start, num_bytes)

    def begin_write(self, slot: int, old: int | None) -> memoryview:
        """The memory of a slot, to be written. ``old``: the expert that lies in it."""
        if old is not None:
            self.directory[old] = NOWHERE
        self.generations[slot] |= 1
        return self.slot(slot)

    def end_write(self, slot: int, expert: int | None) -> None:
        """The slot holds an expert now, or nothing of use. Wakes those who wait for arrivals."""
        self.generations[slot] += 1
        if expert is not None:
            self.directory[expert] = slot
        self.arrivals[0] += 1
        wake(self.arrivals_address)

    def mark_failed(self, expert: int) -> None:
        """It could not be loaded: those who wait for it must ask why."""
        self.directory[expert] = FAILED

    def close(self) -> None:
        """Unmap. Addresses handed out before are invalid from here on."""
        del self.generations, self.directory, self.arrivals
        del self._bytes
        self._map.close()
        os.close(self._fd)


def _allocate(fd: int, offset: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, offset, num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise ResourceError(
            f"{format_bytes(num_bytes)} more for an arena do not fit this machine's memory ({error.strerror}); "
            "close other programs, or give the engine less with --host-memory"
        ) from error
