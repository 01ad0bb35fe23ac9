"""Shards from the own disk, past the page cache: what an arena holds need not be held twice."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from moray.runtime.errors import CorruptShardError, StoreError
from moray.runtime.layout.shard import ALIGNMENT, ExpertKey
from moray.runtime.store.reader import absent_shard, corrupt_shard, read_at
from moray.runtime.store.store import Store


class DiskReader:
    """A ``ShardReader``: O_DIRECT where the file system has it, else buffered reads whose pages are dropped."""

    def __init__(self, store: Store) -> None:
        self.name = str(store.path)
        self._store = store
        self._descriptors: dict[str, tuple[int, bool]] = {}
        self._lock = threading.Lock()

    def has(self, key: ExpertKey) -> bool:
        return self._store.has(key)

    def read(self, key: ExpertKey, start: int, view: memoryview) -> None:
        if not self.has(key):
            raise absent_shard(self._store.path, key)
        entry = self._store.manifest.shards[key]
        descriptor, is_direct = self._descriptor(entry.file)
        wanted, offset = min(len(view), entry.num_bytes - start), entry.offset + start
        path = self._store.path / entry.file
        read_at(descriptor, path, offset, view, wanted, ALIGNMENT if is_direct else 1)
        if not is_direct:
            os.posix_fadvise(descriptor, offset, wanted, os.POSIX_FADV_DONTNEED)

    def corrupt(self, key: ExpertKey) -> CorruptShardError:
        entry = self._store.manifest.shards[key]
        return corrupt_shard(self._store.path / entry.file, key, entry)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1][0])

    def _descriptor(self, file: str) -> tuple[int, bool]:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = self._open(self._store.path / file)
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
