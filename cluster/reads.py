"""The host's answers to who reads its store: shards for peers that lack them, files for who makes a copy.

They come in pieces, from a thread of their own, so that no Compute waits for a disk; the pieces are small enough that
none waits long behind one on its way out. What a client does not take is bounded.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import Counter, deque
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import zmq

from moray.cluster.messages import Bytes, FileEntry, Files, ListFiles, Message, Read, ReadFile, Refused, encode
from moray.runtime.errors import MorayError, ProtocolError, StoreError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.shard import ALIGNMENT, ExpertKey, round_up
from moray.runtime.store.disk import DiskReader
from moray.runtime.store.manifest import MANIFEST_NAME
from moray.runtime.store.presence import runs_of
from moray.runtime.store.shelf import Shelf, StoreFile

READS = (Read, ReadFile, ListFiles)
_MOST_UNTAKEN_BYTES = 32 << 20  # of answers to one client
_ADDRESS = "inproc://reads"


class ReadLane:
    """Answers in a thread. ``replies`` is for the thread that has the server's socket: it sends what comes there."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: ShardHost) -> None:
        self._host, self._shelf, self._disk = host, Shelf(host.store), DiskReader(host.store)
        self._files: dict[str, StoreFile] = {}
        self._untaken: Counter[bytes] = Counter()  # bytes, by client
        self._taken: deque[tuple[bytes, int]] = deque()
        self._asked: SimpleQueue[tuple[bytes, int, Message] | None] = SimpleQueue()
        self.replies = context.socket(zmq.PULL)
        self.replies.setsockopt(zmq.RCVHWM, 4)
        self.replies.bind(_ADDRESS)
        self._out = context.socket(zmq.PUSH)
        self._out.setsockopt(zmq.SNDHWM, 4)
        self._out.setsockopt(zmq.LINGER, 0)
        self._out.connect(_ADDRESS)
        self._thread = threading.Thread(target=self._run, name="moray-reads", daemon=True)
        self._thread.start()

    def ask(self, client: bytes, request_id: int, message: Message) -> None:
        """From the server's thread: to be answered later."""
        self._asked.put((client, request_id, message))

    def close(self) -> None:
        """From the server's thread, which takes no more replies."""
        self._asked.put(None)
        while self._thread.is_alive():
            if self.replies.poll(10):
                self.replies.recv_multipart()  # what the thread may be waiting to hand over
        self.replies.close(linger=0)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            client, request_id, message = asked
            answer, buffers = self._answer(client, message)
            self._out.send_multipart([client, encode(request_id, answer), *buffers], copy=False)
        self._out.close(linger=0)
        self._disk.close()

    def _answer(self, client: bytes, message: Message) -> tuple[Message, list[memoryview]]:
        try:
            match message:
                case Read():
                    return Bytes(), [self._read_shard(client, message)]
                case ReadFile():
                    return Bytes(), [self._read_file(client, message)]
            return self._list_files(), []
        except ProtocolError as error:
            return Refused(reason="request", message=str(error)), []
        except StoreError as error:
            return Refused(reason="absent", message=str(error)), []
        except MorayError as error:
            return Refused(reason="failed", message=str(error)), []
        except Exception as error:  # told to the one who asked; the lane works on for the others
            return Refused(reason="failed", message=f"{type(error).__name__}: {error}"), []

    def _read_shard(self, client: bytes, asked: Read) -> memoryview:
        key = ExpertKey(asked.layer, asked.expert)
        entry = self._host.store.manifest.shards.get(key)
        if entry is None or asked.offset % ALIGNMENT or asked.offset + asked.num_bytes > entry.num_bytes:
            raise ProtocolError(
                f"{asked.num_bytes} bytes at {asked.offset} of expert {key.expert} of MoE layer {key.layer} are not "
                f"in the store, or do not begin at a multiple of {ALIGNMENT}"
            )
        memory = self._room(client, asked.num_bytes)
        wanted = memory.data[: asked.num_bytes]
        if not self._host.copy_resident(key, asked.offset, wanted):
            self._disk.read(key, asked.offset, memory.data)
        return wanted

    def _read_file(self, client: bytes, asked: ReadFile) -> memoryview:
        if not self._files:
            self._list_files()
        file = self._files.get(asked.name)
        if file is None or asked.offset + asked.num_bytes > file.num_bytes:
            raise ProtocolError(f"{asked.num_bytes} bytes at {asked.offset} of {asked.name!r:.80} are not in the store")
        view = self._room(client, asked.num_bytes).data[: asked.num_bytes]
        self._shelf.read_file(asked.name, asked.offset, view)
        return view

    def _list_files(self) -> Files:
        files, manifest = self._shelf.files(), self._host.store.manifest
        size = (self._host.store.path / MANIFEST_NAME).stat().st_size
        self._files = {file.name: file for file in [*files, StoreFile(MANIFEST_NAME, size, 0)]}
        present = runs_of(self._host.store.present, manifest)
        entries = [FileEntry(name=f.name, num_bytes=f.num_bytes, xxh3=f.checksum) for f in files]
        return Files(manifest_bytes=size, files=entries, present=present)

    def _room(self, client: bytes, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory for an answer, in whole pages, counted until it is sent."""
        while self._taken:
            by, size = self._taken.popleft()
            self._untaken[by] -= size
            if not self._untaken[by]:
                del self._untaken[by]
        if self._untaken[client] + num_bytes > _MOST_UNTAKEN_BYTES:
            raise ProtocolError(f"{self._untaken[client]} bytes were asked for and not taken; take them first")
        self._untaken[client] += num_bytes
        memory = np.frombuffer(mmap.mmap(-1, round_up(num_bytes, ALIGNMENT)), dtype=np.uint8)
        weakref.finalize(memory, self._taken.append, (client, num_bytes)).atexit = False
        return memory
