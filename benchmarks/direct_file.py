"""Files written past the page cache: several times as fast where memory is slow to get, and it fills no memory."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 4096  # what O_DIRECT wants offsets, sizes and addresses to be multiples of
_BUFFER_BYTES = 16 << 20


class DirectWriter:
    """A new file, written from its beginning to its end with O_DIRECT, or plainly where the file system refuses it."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o644)
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._view = np.frombuffer(self._buffer, dtype=np.uint8)
        self._held, self._written = 0, 0

    def tell(self) -> int:
        """Bytes written so far."""
        return self._written + self._held

    def write(self, data: bytes | memoryview | npt.NDArray[np.uint8]) -> None:
        left = data.reshape(-1) if isinstance(data, np.ndarray) else np.frombuffer(data or b"", dtype=np.uint8)
        while len(left):
            count = min(len(left), _BUFFER_BYTES - self._held)
            self._view[self._held : self._held + count] = left[:count]
            self._held, left = self._held + count, left[count:]
            if self._held == _BUFFER_BYTES:
                self._flush(_BUFFER_BYTES)

    def close(self) -> None:
        size = self.tell()
        self._flush(-(-self._held // BLOCK_BYTES) * BLOCK_BYTES)
        os.ftruncate(self._file, size)
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _flush(self, count: int) -> None:
        done = 0
        while done < count:
            done += os.pwrite(self._file, memoryview(self._buffer)[done:count], self._written + done)
        self._written, self._held = self._written + count, 0
