"""Threads that carry out what the manager decides: shards from disk into slots.

A shard is read in pieces, so that several threads read one expert that a layer waits for, and so that a demand that
comes while a predicted expert is being read waits for a piece and not for an expert. Checksums are taken in the order
of the bytes, by whichever thread finds the next piece read.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import xxhash

from moray.runtime.arena import Arena
from moray.runtime.errors import MorayError
from moray.runtime.layout.shard import ALIGNMENT, ExpertKey, round_up
from moray.runtime.prefetch.host import HostPrefetch
from moray.runtime.residency.depth import DEPTHS, DepthTuner
from moray.runtime.residency.manager import Load, ResidencyManager, State, Urgency
from moray.runtime.store.manifest import ShardEntry
from moray.runtime.store.reader import PIECE_BYTES, ShardReader, corrupt_shard

_HINT_DEPTH = 2  # predicted experts' pieces in flight: what a demand may have to wait for
_ATTEMPTS = 2  # a shard that fails its checksum is read once more


@dataclass(slots=True)
class _Job:
    """One load under way."""

    load: Load
    entry: ShardEntry
    memory: memoryview
    order: int
    is_new_memory: bool
    next_piece: int = 0  # to be read
    in_flight: int = 0
    read: set[int] = field(default_factory=set)  # pieces read and not yet hashed
    hashed: int = 0  # pieces
    is_hashing: bool = False
    attempt: int = 1
    error: MorayError | None = None
    digest: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)

    @property
    def num_pieces(self) -> int:
        return -(-self.entry.num_bytes // PIECE_BYTES)

    def piece(self, index: int) -> memoryview:
        start = index * PIECE_BYTES
        return self.memory[start : min(start + PIECE_BYTES, round_up(self.entry.num_bytes, ALIGNMENT))]

    def hash_piece(self, index: int) -> None:
        start = index * PIECE_BYTES
        self.digest.update(self.memory[start : min(start + PIECE_BYTES, self.entry.num_bytes)])

    def restart(self) -> None:
        self.next_piece, self.hashed, self.attempt = 0, 0, self.attempt + 1
        self.digest.reset()


@dataclass(slots=True)
class LoaderStats:
    """Since the start. ``busy_s``: seconds with at least one read under way."""

    bytes_read: int = 0
    busy_s: float = 0.0
    depth: int = 0  # reads that the disk is given at once
    corrupt_reads: int = 0


class Loader:
    """Loads what ``manager`` wants, until ``close``. ``lock`` guards the manager, the arena's accounts and this."""

    def __init__(
        self,
        manager: ResidencyManager,
        arena: Arena,
        reader: ShardReader,
        keys: Sequence[ExpertKey],
        entries: Sequence[ShardEntry],
        prefetch: HostPrefetch,
    ) -> None:
        self._manager, self._arena, self._reader, self._prefetch = manager, arena, reader, prefetch
        self._keys, self._entries = keys, entries
        mutex = threading.RLock()
        self.lock = threading.Condition(mutex)  # its waiters are told when a load has ended
        self._work = threading.Condition(mutex)
        self.errors: dict[int, MorayError] = {}  # what kept an expert from being loaded, until it is told
        self.stats = LoaderStats()
        self._jobs: list[_Job] = []
        self._started, self._reading, self._changed_at = 0, 0, perf_counter()
        self._depth = DepthTuner()
        self._told_busy_s = 0.0
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"moray-load-{i}", daemon=True) for i in range(max(DEPTHS))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop after the reads in flight."""
        with self.lock:
            self._is_closed = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._jobs.clear()  # those begun hold memory of the arena
        self._reader.close()

    def wake(self) -> None:
        """The manager has new wishes. Call with ``lock`` held."""
        self._work.notify_all()

    @property
    def is_idle(self) -> bool:
        """Call with ``lock`` held."""
        return not self._jobs

    def loaded_bytes(self, expert: int) -> int:
        """How much of an expert is in memory. Call with ``lock`` held."""
        if self._manager.state(expert) is State.RESIDENT:
            return self._entries[expert].num_bytes
        return next((self._bytes_of(job) for job in self._jobs if job.load.expert == expert), 0)

    def _run(self) -> None:
        while True:
            with self.lock:
                found = self._find()
                while found is None:
                    if self._is_closed:
                        return
                    self._work.wait()
                    found = self._find()
                job, piece = found
                job.in_flight += 1
                self._note_reading(1)
            error = self._read(job, piece)
            with self.lock:
                self._note_reading(-1)
                job.in_flight -= 1
                if error is None:
                    self._note_read(len(job.piece(piece)))
                    job.read.add(piece)
                else:
                    job.error = error
            self._advance(job)

    def _find(self) -> tuple[_Job, int] | None:
        """A piece to read: of the most urgent load that has one left, or of a new load if that is more urgent."""
        if self._is_closed or self._reading >= self._depth.depth:
            return None
        self._end_given_up()
        waiting = [job for job in self._jobs if job.next_piece < job.num_pieces and not self._is_over(job)]
        best = min(waiting, key=lambda job: (self._manager.urgency(job.load.expert), job.order), default=None)
        urgency = Urgency.FILL + 1 if best is None else self._manager.urgency(best.load.expert)
        if urgency > Urgency.DEMAND:
            least = Urgency(urgency - 1)
            load = self._manager.next_load(least, self._prefetch.admit)
            if load is None and self._end_given_up():  # a demand found every slot taken: those are free now
                load = self._manager.next_load(least, self._prefetch.admit)
            if load is not None:
                best = self._begin(load)
        if best is None or (self._reading >= _HINT_DEPTH and self._manager.urgency(best.load.expert) is Urgency.HINT):
            return None
        best.next_piece += 1
        return best, best.next_piece - 1

    def _end_given_up(self) -> bool:
        idle = [job for job in self._jobs if self._is_given_up(job) and not job.in_flight and not job.is_hashing]
        for job in idle:
            self._end(job)
        return bool(idle)

    def _begin(self, load: Load) -> _Job:
        is_new_memory = self._arena.is_new(load.slot)
        memory = self._arena.begin_write(load.slot, load.victim)
        if load.victim is not None:
            self._manager.evicted(load.victim)
            self._prefetch.dropped(load.victim, self._entries[load.victim].num_bytes)
        if load.urgency is Urgency.HINT:
            self._prefetch.began(load.expert, load.victim)
        self.errors.pop(load.expert, None)
        job = _Job(load, self._entries[load.expert], memory, self._started, is_new_memory)
        self._started += 1
        self._jobs.append(job)
        self._work.notify(job.num_pieces - 1)  # the others read its other pieces
        return job

    def _read(self, job: _Job, piece: int) -> MorayError | None:
        try:
            start, memory = piece * PIECE_BYTES, job.piece(piece)
            if job.is_new_memory:
                self._arena.require(job.load.slot, start, len(memory))
            self._reader.read(job.entry, start, memory)
        except MorayError as error:
            return type(error)(*error.args)  # it is kept, and its own traceback would keep the slot's memory
        return None

    def _advance(self, job: _Job) -> None:
        """Hash what can be hashed; end the load if it is over."""
        with self.lock:
            if job.is_hashing:
                return  # that thread will find what this one has read
            job.is_hashing = True
            while job.hashed in job.read and not self._is_over(job):
                job.read.discard(job.hashed)
                self.lock.release()
                try:
                    job.hash_piece(job.hashed)
                finally:
                    self.lock.acquire()
                job.hashed += 1
            job.is_hashing = False
            if not job.in_flight and job in self._jobs and (self._is_over(job) or job.hashed == job.num_pieces):
                self._end(job)

    def _is_given_up(self, job: _Job) -> bool:
        return self._manager.is_given_up(job.load.expert)

    def _is_over(self, job: _Job) -> bool:
        return job.error is not None or self._is_given_up(job)

    def _end(self, job: _Job) -> None:
        """Publish a load, or take it back. With ``lock`` held."""
        expert, slot = job.load.expert, job.load.slot
        is_whole = not self._is_over(job)
        if is_whole and job.digest.intdigest() != job.entry.checksum:
            self.stats.corrupt_reads += 1
            if job.attempt < _ATTEMPTS:
                job.restart()
                self._work.notify_all()
                return
            job.error, is_whole = corrupt_shard(self._reader.path(job.entry), self._keys[expert], job.entry), False
        self._jobs.remove(job)
        if is_whole:
            if self._manager.urgency(expert) is Urgency.HINT:
                self._prefetch.loaded(expert)
            self._manager.loaded(expert)
            self._arena.end_write(slot, expert)
        else:
            self._prefetch.dropped(expert, self._bytes_of(job))
            self._manager.failed(expert)
            if job.error is not None:
                self.errors[expert] = job.error
                self._arena.mark_failed(expert)
            self._arena.end_write(slot, None)
        if not self._manager.has_demand:
            self._prefetch.demand_ended()
        self._work.notify()  # its slot may have been waited for
        self.lock.notify_all()

    def _bytes_of(self, job: _Job) -> int:
        """Read of a load that is not complete."""
        done = PIECE_BYTES * (job.next_piece - job.in_flight)
        return max(0, min(done, job.entry.num_bytes - 1))

    def _note_read(self, num_bytes: int) -> None:
        self.stats.bytes_read += num_bytes
        self._depth.note_bytes(num_bytes)
        self._prefetch.read(num_bytes, self.stats.busy_s - self._told_busy_s)
        self._told_busy_s = self.stats.busy_s

    def _note_reading(self, change: int) -> None:
        now = perf_counter()
        passed, self._changed_at = now - self._changed_at, now
        self._depth.note(passed, self._reading)
        self.stats.busy_s += passed if self._reading else 0.0
        self.stats.depth = self._depth.depth
        self._reading += change
        if change < 0:
            self._work.notify()  # this one may have to hash first
