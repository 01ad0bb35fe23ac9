"""Reading a store: its manifest, its shards, its trunk, its tokenizer files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from moray.runtime.arrays import Bytes
from moray.runtime.errors import StoreError
from moray.runtime.layout.packed import VECTOR_BYTES
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest, decode_manifest
from moray.runtime.store.presence import PRESENT_NAME, read_presence
from moray.runtime.store.reader import absent_shard, corrupt_shard, read_at

_CHUNK_BYTES = 16 << 20


class Store:
    """A converted checkpoint on disk, whole or with a part of its shards (``runtime/store/presence.py``).

    Read-only, and safe to use from several threads and processes.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._present_as = _identity(path / PRESENT_NAME)
        self._present = read_presence(path, manifest)
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store and check that its files are all there, without reading weights.

        Raises StoreError: no directory, no manifest, a newer format, a missing or short file.
        """
        root = Path(path)
        if not root.is_dir():
            raise StoreError(f"{root} is not a directory; expected a store made by `moray convert`")
        file = root / MANIFEST_NAME
        if not file.is_file():
            raise StoreError(_explain_missing_manifest(root))
        store = cls(root, decode_manifest(file.read_bytes(), str(file)))
        store._check_sizes()
        return store

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def is_whole(self) -> bool:
        return self._present is None

    def has(self, key: ExpertKey) -> bool:
        """Whether a shard is here. Of one that is not, this looks again: it may have been brought meanwhile."""
        present = self._present
        if present is None or key in present:
            return True
        identity = _identity(self.path / PRESENT_NAME)
        if identity != self._present_as:
            present = read_presence(self.path, self.manifest)
            self._present, self._present_as = present, identity
        return present is None or key in present

    @property
    def present(self) -> list[ExpertKey]:
        """The shards that are here, in the manifest's order."""
        present = self._present
        return [key for key in self.manifest.shards if present is None or key in present]

    @property
    def trunk_path(self) -> Path:
        return self.path / TRUNK_NAME

    def read_shard_into(self, key: ExpertKey, buffer: memoryview) -> int:
        """Read one shard into ``buffer`` and check it. Returns its size in bytes.

        A shard that fails its checksum is read a second time before it is called corrupt.
        Raises CorruptShardError (names file and offset), StoreError (not here, unreadable or short).
        """
        entry = self.manifest.shards[key]
        if not self.has(key):
            raise absent_shard(self.path, key)
        view = buffer[: entry.num_bytes]
        for _ in range(2):
            self._read(entry.file, entry.offset, view)
            if xxhash.xxh3_64_intdigest(view) == entry.checksum:
                return entry.num_bytes
        raise corrupt_shard(self.path / entry.file, key, entry)

    def read_shard(self, key: ExpertKey) -> Bytes:
        """One shard in new memory, at a multiple of 64 bytes: elsewhere kernels on it take up to twice the time."""
        num_bytes = self.manifest.shards[key].num_bytes
        room = np.empty(num_bytes + VECTOR_BYTES, dtype=np.uint8)
        start = -room.ctypes.data % VECTOR_BYTES
        shard = room[start : start + num_bytes]
        self.read_shard_into(key, shard.data)
        return shard

    def verify(self) -> Iterator[ExpertKey | str]:
        """Check every byte that is here, yielding each shard's key and then the trunk's name as it passes."""
        buffer = memoryview(bytearray(self.manifest.slot_bytes))
        for key in self.present:
            self.read_shard_into(key, buffer)
            yield key
        self.verify_trunk()
        yield TRUNK_NAME

    def verify_trunk(self) -> None:
        """Read the whole trunk and check it. Raises StoreError."""
        if checksum_file(self.trunk_path) != self.manifest.trunk_checksum:
            raise StoreError(f"{self.trunk_path} fails its checksum; copy the file again or convert again")

    def _read(self, file: str, offset: int, view: memoryview) -> None:
        read_at(self._descriptor(file), self.path / file, offset, view, len(view))

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise StoreError(f"cannot open {self.path / file}: {error.strerror}") from error
            return self._descriptors[file]

    def _check_sizes(self) -> None:
        needed: dict[str, int] = {TRUNK_NAME: self.manifest.trunk_bytes}
        for entry in (self.manifest.shards[key] for key in self.present):
            needed[entry.file] = max(needed.get(entry.file, 0), entry.offset + entry.num_bytes)
        for file, size in needed.items():
            path = self.path / file
            if not path.is_file():
                raise StoreError(
                    f"{path} is missing; copy it from where the store was made, bring it with "
                    f"`moray store sync SOURCE {self.path}`, or convert again"
                )
            if path.stat().st_size < size:
                raise StoreError(f"{path} has {path.stat().st_size} bytes, expected {size}; copy it again")


def _identity(file: Path) -> tuple[int, int] | None:
    """Changes when a file is replaced."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def checksum_file(path: Path) -> int:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.intdigest()


def _explain_missing_manifest(root: Path) -> str:
    if any(root.glob("experts-*.bin*")):
        return f"{root} is an unfinished store (no {MANIFEST_NAME}); run the same `moray convert` again to resume it"
    if (root / "config.json").is_file():
        return f"{root} is a checkpoint, not a store; convert it first: moray convert {root} STORE"
    return f"{root} is not a store (no {MANIFEST_NAME}); make one with `moray convert CHECKPOINT STORE`"
