"""A store as what it consists of, for those who copy it: files with their checksums, and shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moray.runtime.errors import StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest
from moray.runtime.store.presence import PRESENT_NAME
from moray.runtime.store.reader import read_at
from moray.runtime.store.receipt import RECEIPT_NAME, files_below
from moray.runtime.store.store import Store, checksum_file

LEFT_OVER = ("convert.journal", "*.partial")  # by an unfinished conversion
LEFT_OVER_FOLDERS = ("download",)


@dataclass(frozen=True, slots=True)
class StoreFile:
    """A file of a store that holds no shards."""

    name: str  # relative, with "/"
    num_bytes: int
    checksum: int  # xxh3-64


class SyncSource(Protocol):
    """Where a store is copied from."""

    name: str  # in messages

    @property
    def manifest_data(self) -> bytes: ...

    def files(self) -> Sequence[StoreFile]:
        """All files but the manifest and those of shards."""
        ...

    def has(self, key: ExpertKey) -> bool: ...

    def read_shard(self, key: ExpertKey, view: memoryview) -> None:
        """Read a shard into ``view``, of its size. The caller compares the checksum. Raises MorayError."""
        ...

    def read_file(self, name: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with a file's bytes from ``start`` on. Raises MorayError."""
        ...


def own_files(path: Path, manifest: Manifest) -> list[Path]:
    """Configuration, tokenizer and what else belongs to a store and holds no weights, but manifest and receipt."""
    others = {MANIFEST_NAME, RECEIPT_NAME, TRUNK_NAME, PRESENT_NAME}
    others |= {entry.file for entry in manifest.shards.values()}
    left_over = {file.name for pattern in LEFT_OVER for file in path.glob(pattern)} | set(LEFT_OVER_FOLDERS)
    return sorted(entry for entry in path.iterdir() if entry.name not in others | left_over)


class Shelf:
    """A ``SyncSource``: a store on this machine's disk, whole or partial."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = str(store.path)

    @property
    def manifest_data(self) -> bytes:
        return (self._store.path / MANIFEST_NAME).read_bytes()

    def files(self) -> list[StoreFile]:
        root, manifest = self._store.path, self._store.manifest
        paths = [file for entry in own_files(root, manifest) for file in files_below(entry)]
        paths += [root / RECEIPT_NAME] if (root / RECEIPT_NAME).is_file() else []
        found = [StoreFile(p.relative_to(root).as_posix(), p.stat().st_size, checksum_file(p)) for p in paths]
        return [StoreFile(TRUNK_NAME, manifest.trunk_bytes, manifest.trunk_checksum), *found]

    def has(self, key: ExpertKey) -> bool:
        return self._store.has(key)

    def read_shard(self, key: ExpertKey, view: memoryview) -> None:
        entry = self._store.manifest.shards[key]
        self._read(entry.file, entry.offset, view)

    def read_file(self, name: str, start: int, view: memoryview) -> None:
        self._read(name, start, view)

    def _read(self, name: str, start: int, view: memoryview) -> None:
        path = self._store.path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error
        try:
            read_at(descriptor, path, start, view, len(view))
        finally:
            os.close(descriptor)
