"""Making and writing pieces, in this process or in several."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece, encode_piece
from moray.runtime.convert.sources import ModelShapes
from moray.runtime.convert.supply import Feed
from moray.runtime.errors import ResourceError, StoreError

_PR_SET_PDEATHSIG = 1
Done = Callable[[Piece, int], None]  # a piece whose bytes are in its file, and their checksum


@dataclass(frozen=True)
class Workshop:
    """What a worker needs to make any piece."""

    checkpoint: Checkpoint
    shapes: ModelShapes
    store: Path
    expected: Mapping[str, int] = field(default_factory=dict)  # checksums that pieces must have

    def make(self, piece: Piece) -> int:
        """Write one piece to its place. Returns the xxh3-64 of its bytes. Holds one expert in memory.

        Raises StoreError, and writes nothing, if the piece is not what is expected.
        """
        data = encode_piece(piece, self.checkpoint, self.shapes)
        assert data.nbytes == piece.num_bytes, (piece.label, data.nbytes, piece.num_bytes)
        checksum = xxhash.xxh3_64_intdigest(data.data)
        if self.expected.get(piece.name, checksum) != checksum:
            raise StoreError(
                f"{piece.label} made again has other bytes than {self.store} had; give the checkpoint (and the "
                "versions of moray, transformers and hqq, `moray info`) that it was made with"
            )
        write_at(self.store / piece.file, piece.offset, data.data)
        return checksum


def write_at(path: Path, offset: int, view: memoryview) -> None:
    """Write all of a buffer at an offset of an existing file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
    finally:
        os.close(descriptor)


def make_pieces(workshop: Workshop, feed: Feed, workers: int, done: Done) -> None:
    """Make all pieces of a feed, calling ``done`` in this process as each one is written.

    With one worker in this process; otherwise in ``workers`` spawned processes, which die with this
    one. On an error or an interrupt the workers are stopped at once. The bytes do not depend on ``workers``.
    """
    if workers == 1:
        with _one_thread():
            while (piece := feed.take(wait=True)) is not None:
                done(piece, workshop.make(piece))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (workshop, os.getpid()))
    try:
        for piece, checksum in _in_flight(pool, feed, 2 * workers):
            done(piece, checksum)
    except BrokenProcessPool as error:
        raise ResourceError(
            f"a conversion worker ended: most likely for memory ({workers} workers, each holds one expert), "
            'or a script calls convert() outside `if __name__ == "__main__":`; run again with fewer workers, '
            "finished experts are kept"
        ) from error
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _in_flight(pool: ProcessPoolExecutor, feed: Feed, limit: int) -> Iterator[tuple[Piece, int]]:
    """Pieces as they finish, with at most ``limit`` handed out at a time.

    The feed is waited for only when nothing runs: what it waits for may be room that running pieces give back.
    """
    running: dict[Future[int], Piece] = {}
    while True:
        while len(running) < limit and (piece := feed.take(wait=not running)) is not None:
            running[pool.submit(_make, piece)] = piece
        if not running:
            return
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            yield running.pop(future), future.result()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread, as in workers: sums in another order could give another code now and then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_workshop: Workshop | None = None  # of this worker process


def _start_worker(workshop: Workshop, parent: int) -> None:
    global _workshop
    _workshop = workshop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request above
        os._exit(1)


def _make(piece: Piece) -> int:
    assert _workshop is not None
    return _workshop.make(piece)
