"""The host's answers to who reads its store: shards for peers that lack them, files for who makes a copy.

A client is answered one piece after the other in its connection's own thread: what it does not take is not read, and
nobody else waits for its disk.
"""

from __future__ import annotations

import mmap

import numpy as np

from moray.cluster.messages import (
    MAX_READ_BYTES,
    Bytes,
    FileEntry,
    Files,
    ListFiles,
    Message,
    Read,
    ReadFile,
)
from moray.cluster.stream import NOTHING
from moray.runtime.errors import ProtocolError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.shard import ALIGNMENT, ExpertKey, round_up
from moray.runtime.store.disk import DiskReader
from moray.runtime.store.manifest import MANIFEST_NAME
from moray.runtime.store.presence import runs_of
from moray.runtime.store.shelf import Shelf, StoreFile

READS = (Read, ReadFile, ListFiles)


class StoreReads:
    """The store of one server. Thread-safe."""

    def __init__(self, host: ShardHost) -> None:
        self._host, self._shelf, self._disk = host, Shelf(host.store), DiskReader(host.store)
        self._files: dict[str, StoreFile] = {}

    def answer(self, message: Message, memory: ReadMemory) -> tuple[Message, memoryview]:
        """The answer to one of ``READS``; its buffer is in ``memory``. Raises ProtocolError, StoreError."""
        match message:
            case Read():
                return Bytes(), self._read_shard(message, memory)
            case ReadFile():
                return Bytes(), self._read_file(message, memory)
        return self._list_files(), NOTHING

    def close(self) -> None:
        self._disk.close()

    def _read_shard(self, asked: Read, memory: ReadMemory) -> memoryview:
        key = ExpertKey(asked.layer, asked.expert)
        entry = self._host.store.manifest.shards.get(key)
        if entry is None or asked.offset % ALIGNMENT or asked.offset + asked.num_bytes > entry.num_bytes:
            raise ProtocolError(
                f"{asked.num_bytes} bytes at {asked.offset} of expert {key.expert} of MoE layer {key.layer} are not "
                f"in the store, or do not begin at a multiple of {ALIGNMENT}"
            )
        pages = memory.pages(asked.num_bytes)
        wanted = pages[: asked.num_bytes]
        if not self._host.copy_resident(key, asked.offset, wanted):
            self._disk.read(key, asked.offset, pages)
        return wanted

    def _read_file(self, asked: ReadFile, memory: ReadMemory) -> memoryview:
        if not self._files:
            self._list_files()
        file = self._files.get(asked.name)
        if file is None or asked.offset + asked.num_bytes > file.num_bytes:
            raise ProtocolError(f"{asked.num_bytes} bytes at {asked.offset} of {asked.name!r:.80} are not in the store")
        view = memory.pages(asked.num_bytes)[: asked.num_bytes]
        self._shelf.read_file(asked.name, asked.offset, view)
        return view

    def _list_files(self) -> Files:
        files, manifest = self._shelf.files(), self._host.store.manifest
        size = (self._host.store.path / MANIFEST_NAME).stat().st_size
        self._files = {file.name: file for file in [*files, StoreFile(MANIFEST_NAME, size, 0)]}
        present = runs_of(self._host.store.present, manifest)
        entries = [FileEntry(name=f.name, num_bytes=f.num_bytes, xxh3=f.checksum) for f in files]
        return Files(manifest_bytes=size, files=entries, present=present)


class ReadMemory:
    """Of one client, for one answer at a time, aligned for O_DIRECT; made when it is first needed."""

    def __init__(self) -> None:
        self._memory: memoryview | None = None

    def pages(self, num_bytes: int) -> memoryview:
        """Whole pages, at least so many bytes."""
        if self._memory is None:
            self._memory = np.frombuffer(mmap.mmap(-1, round_up(MAX_READ_BYTES, ALIGNMENT)), dtype=np.uint8).data
        return self._memory[: round_up(num_bytes, ALIGNMENT)]
