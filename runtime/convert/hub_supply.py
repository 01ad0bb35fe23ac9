"""The supply of a conversion from a hub: one thread fetches files, pieces are made from those that are there.

With ``deletes`` a file lives until its last piece is in the store and on the disk; when only pieces that also need a
later file are left, what they do not need is given back before. A file is fetched ahead only as far as files and store
together stay within what was announced.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Event, Thread

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece
from moray.runtime.convert.holes import punch_holes
from moray.runtime.convert.hub import HubFile, HubModel, fetch_range
from moray.runtime.convert.hub_files import CacheFetcher, Fetcher, StreamFetcher
from moray.runtime.convert.journal import JOURNAL_NAME
from moray.runtime.convert.supply import BLOCK_BYTES, Feed, Itinerary, files_of, plan_itinerary
from moray.runtime.store.receipt import Stopped, sync


class RemoteCheckpoint(Checkpoint):
    """A checkpoint of headers, to plan with. The few tensors that planning reads come over the network."""

    model: HubModel

    def _read_into(self, file: str, offset: int, view: memoryview) -> None:
        view[:] = fetch_range(self.model, file, offset, len(view))


class HubSupply:
    """Files of ``model``: streamed through ``folder`` and deleted, or kept in the client's cache at ``folder``."""

    def __init__(
        self,
        model: HubModel,
        weights: Sequence[HubFile],
        folder: Path,
        store: Path,
        told: Callable[[str], None],
        *,
        stream: bool,
    ) -> None:
        self.hashes: dict[str, str] = {}
        self._model = model
        self._files = {file.name: file for file in weights}
        self._folder = folder
        self._store = store
        self._told = told
        self._stream = stream
        self._checkpoint: Checkpoint | None = None

    def readable(self, checkpoint: Checkpoint) -> Checkpoint:
        self._checkpoint = checkpoint.moved(self._folder)
        return self._checkpoint

    def room_bytes(self, pieces: Sequence[Piece]) -> int:
        if not self._stream:
            return 0
        return max(0, self._itinerary(pieces).peak_bytes - sum(piece.num_bytes for piece in pieces))

    def cache_bytes(self, pieces: Sequence[Piece]) -> int:
        if self._stream:
            return 0
        return sum(file.num_bytes for file in self._files.values() if not (self._folder / file.name).exists())

    def _itinerary(self, pieces: Sequence[Piece]) -> Itinerary:
        assert self._checkpoint is not None
        return plan_itinerary(pieces, self._checkpoint, {name: file.num_bytes for name, file in self._files.items()})

    @contextmanager
    def open(self, pieces: Sequence[Piece]) -> Iterator[Feed]:
        assert self._checkpoint is not None
        stop = Event()
        make = StreamFetcher if self._stream else CacheFetcher
        fetcher = make(self._model, self._folder, stop, lambda num_bytes: None)
        feed = HubFeed(self._itinerary(pieces), self._checkpoint, self._files, fetcher, self._store, self._told)
        if self._stream:
            _clear(self._folder, keep={*feed.files})
        thread = Thread(target=feed.fetch_all, name="moray-download", daemon=True)
        thread.start()
        try:
            yield feed
        finally:
            stop.set()
            feed.close()
            thread.join(timeout=5)  # it may wait for a server that does not answer
            self.hashes |= feed.hashes


def _clear(folder: Path, keep: set[str]) -> None:
    """Drop files that an earlier run fetched and no piece needs any more."""
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in keep and name.removesuffix(".part") not in keep:
            path.unlink()


class HubFeed:
    """What is there, and what may be fetched. All methods take the lock; files are fetched outside it."""

    def __init__(
        self,
        itinerary: Itinerary,
        checkpoint: Checkpoint,
        files: Mapping[str, HubFile],
        fetcher: Fetcher,
        store: Path,
        told: Callable[[str], None],
    ) -> None:
        self.files = itinerary.files
        self.hashes: dict[str, str] = {}
        self._needs = {piece.name: files_of(piece, checkpoint) for piece in itinerary.pieces}
        self._waiting = deque(itinerary.pieces)
        self._users = Counter(file for need in self._needs.values() for file in need)  # pieces not made yet
        self._infos = files
        self._fetcher = fetcher
        self._store = store
        self._told = told
        self._arrived: set[str] = set()
        self._kept = itinerary.kept
        self._tensors = checkpoint.tensors
        self._straddling = Counter(  # pieces that also wait for a file after this one
            file for need in self._needs.values() for file in need if file != max(need, key=itinerary.files.index)
        )
        self._trimmed: set[str] = set()
        self._sizes: dict[str, int] = {}  # what each file takes that is here or on its way
        self._beside = itinerary.beside
        self._stuck_bytes = 0  # that should have been given back
        self._unsynced: set[str] = set()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = Condition()

    # ------------------------------------------------------------------------- the converter's thread

    def take(self, wait: bool) -> Piece | None:
        with self._changed:
            while self._waiting:
                if self._error is not None:
                    raise self._error
                if self._needs[self._waiting[0].name] <= self._arrived:
                    return self._waiting.popleft()
                if not wait:
                    return None
                self._changed.wait()
            return None

    def done(self, piece: Piece) -> None:
        need = self._needs[piece.name]
        with self._changed:
            self._unsynced.add(piece.file)
            self._users.subtract(need)
            if need and len(need) > 1:
                self._straddling.subtract(need - {max(need, key=self.files.index)})
            used = [file for file in need if self._users[file] == 0 or self._may_trim(file)]
            self._trimmed.update(used)
            self._changed.notify_all()
        if used and self._fetcher.deletes:
            self._give_back(used)

    def _may_trim(self, file: str) -> bool:
        return file not in self._trimmed and self._users[file] == self._straddling[file]

    def _give_back(self, used: list[str]) -> None:
        """Free what no piece needs any more. A power cut must not take both a file and what was made of it."""
        for name in (*self._unsynced, JOURNAL_NAME):
            sync(self._store / name)
        self._unsynced.clear()
        with self._changed:
            for file in used:
                path = self._fetcher.folder / file
                if self._users[file] == 0:
                    path.unlink(missing_ok=True)
                    self._sizes.pop(file, None)
                else:
                    needed = [(self._tensors[key].offset, self._tensors[key].num_bytes) for key in self._kept[file]]
                    left = punch_holes(path, needed)
                    self._stuck_bytes += max(
                        0, left - sum(size + BLOCK_BYTES for _, size in needed)
                    )  # not on every disk
                    self._sizes[file] = left
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -------------------------------------------------------------------------- the download's thread

    def fetch_all(self) -> None:
        try:
            for name in self.files:
                file = self._infos[name]
                with self._changed:
                    while not self._closed and not self._may_fetch(file):
                        self._changed.wait()
                    if self._closed:
                        return
                    self._sizes[name] = file.num_bytes
                self._told(f"downloading {name}")
                digest = self._fetcher.fetch(file)
                with self._changed:
                    self.hashes[name] = digest
                    self._arrived.add(name)
                    self._changed.notify_all()
        except Stopped:
            pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _may_fetch(self, file: HubFile) -> bool:
        if not self._fetcher.deletes:
            return True
        return sum(self._sizes.values()) <= self._beside[file.name] + self._stuck_bytes
