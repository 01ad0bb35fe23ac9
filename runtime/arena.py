"""The arena: one host's shared memory, cut into slots that hold one shard each.

    0          8 bytes   magic b"MORAYAR1"
    8          8 bytes   number of slots
    16         8 bytes   bytes in a slot
    24         8 bytes   offset of slot 0 (a multiple of 4096)
    64         8 bytes a slot: its generation
    slot 0 ...

It is a memfd: not limited by /dev/shm, page-aligned, and gone when the last process that holds it is gone, however
that happens. Another process of the same user attaches through /proc/PID/fd/FD.

A generation is odd while its slot is being written and grows by 2 with each new content. A reader notes the
generation with its lease, and compares it again after use, outside any compiled function (the compiler would fold
the second read); what it computed counts only if both are equal.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.runtime.errors import HostLostError, ResourceError
from moray.runtime.layout.shard import ALIGNMENT, round_up
from moray.runtime.memory import format_bytes, require_memory

MAGIC = b"MORAYAR1"
_HEADER_BYTES = 64


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
        self.num_slots, self.slot_bytes, self.first_slot = (int(x) for x in self._bytes[8:32].view(np.int64))
        self.generations: npt.NDArray[np.int64] = self._bytes[_HEADER_BYTES:][: 8 * self.num_slots].view(np.int64)
        self.base_address = int(self._bytes.ctypes.data)

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int) -> Arena:
        """Reserve and map a new arena; every page is allocated now, so that writing can never raise SIGBUS.

        Raises ResourceError with the needed and free bytes.
        """
        slot_bytes = round_up(slot_bytes, ALIGNMENT)
        first_slot = round_up(_HEADER_BYTES + 8 * num_slots, ALIGNMENT)
        num_bytes = first_slot + num_slots * slot_bytes
        require_memory(num_bytes, f"an arena of {num_slots} experts")
        fd = os.memfd_create("moray-arena", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise ResourceError(
                f"an arena of {format_bytes(num_bytes)} does not fit this machine's memory ({error.strerror}); "
                "close other programs or use a smaller recipe"
            ) from error
        header = MAGIC + np.array([num_slots, slot_bytes, first_slot], dtype=np.int64).tobytes()
        os.pwrite(fd, header, 0)
        return cls(fd, num_bytes, writable=True)

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

    def slot(self, index: int) -> memoryview:
        start = self.first_slot + index * self.slot_bytes
        return self._bytes.data[start : start + self.slot_bytes]

    def addresses(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Addresses of slots in this process; valid until ``close``."""
        return self.base_address + self.first_slot + slots * self.slot_bytes

    def counter_addresses(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Addresses of the slots' generations in this process."""
        return self.base_address + _HEADER_BYTES + 8 * slots

    @contextmanager
    def writing(self, index: int) -> Iterator[memoryview]:
        """Write a slot: its generation is odd meanwhile, and new afterwards even if writing failed."""
        self.generations[index] += 1
        try:
            yield self.slot(index)
        finally:
            self.generations[index] += 1

    def close(self) -> None:
        """Unmap. Addresses handed out before are invalid from here on."""
        del self.generations
        del self._bytes
        self._map.close()
        os.close(self._fd)
