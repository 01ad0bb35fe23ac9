"""Reading shards in pieces, past the page cache: what an arena holds need not be held twice."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from moray.runtime.errors import CorruptShardError, StoreError
from moray.runtime.layout.shard import ALIGNMENT, ExpertKey, round_up
from moray.runtime.store.manifest import ShardEntry

PIECE_BYTES = 4 << 20  # a disk is as fast as with larger ones, and a demand waits for one piece only


def read_at(descriptor: int, path: Path, offset: int, view: memoryview, wanted: int, block: int = 1) -> None:
    """Read ``wanted`` bytes at ``offset`` into ``view``, in whole blocks: as many as O_DIRECT asks for, else of 1 byte.

    ``path`` names the file in errors. Raises StoreError: unreadable or too short.
    """
    done, end = 0, round_up(wanted, block)
    while done < wanted:
        at = offset + done
        try:
            count = os.preadv(descriptor, [view[done:end]], at)
        except OSError as error:
            raise StoreError(f"cannot read {path} at offset {at}: {error.strerror}") from error
        if count == 0:
            raise StoreError(f"{path} ends at {at}, expected {wanted - done} more bytes; copy it again")
        done += count
        if done < wanted and done % block:  # O_DIRECT goes on at a whole block only
            if count < block:
                raise StoreError(f"{path} ends at {at + count}, within a shard; copy it again")
            done -= done % block


def corrupt_shard(path: Path, key: ExpertKey, entry: ShardEntry) -> CorruptShardError:
    """What to say of a shard that fails its checksum. ``path``: its file."""
    return CorruptShardError(
        f"{path}: the shard of expert {key.expert} of MoE layer {key.layer} at offset {entry.offset} fails its "
        "checksum; copy the file again or convert again"
    )


class ShardReader:
    """O_DIRECT where the file system has it, else buffered reads whose pages are dropped. Safe for several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._descriptors: dict[str, tuple[int, bool]] = {}
        self._lock = threading.Lock()

    def read(self, entry: ShardEntry, start: int, view: memoryview) -> None:
        """Read the bytes of a shard from ``start`` on into ``view``, page-aligned memory that is filled to its end.

        ``start`` is a multiple of 4096. The view may reach past the shard's end, up to a multiple of 4096: what comes
        after the shard is of no meaning. Raises StoreError: unreadable or too short.
        """
        descriptor, is_direct = self._descriptor(entry.file)
        wanted, offset = min(len(view), entry.num_bytes - start), entry.offset + start
        read_at(descriptor, self.path(entry), offset, view, wanted, ALIGNMENT if is_direct else 1)
        if not is_direct:
            os.posix_fadvise(descriptor, offset, wanted, os.POSIX_FADV_DONTNEED)

    def path(self, entry: ShardEntry) -> Path:
        return self._root / entry.file

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1][0])

    def _descriptor(self, file: str) -> tuple[int, bool]:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = self._open(self._root / file)
            return self._descriptors[file]

    def _open(self, path: Path) -> tuple[int, bool]:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            return os.open(path, flags | os.O_DIRECT), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise StoreError(f"cannot open {path}: {error.strerror}") from error
        try:
            return os.open(path, flags), False  # a file system without O_DIRECT
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error
