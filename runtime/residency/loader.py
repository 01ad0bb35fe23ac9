"""Threads that carry out what the manager decides: shards from disk, or from other hosts, into slots.

A shard is read in pieces, so that several threads read one expert that a layer waits for, and so that a demand that
comes while a predicted expert is being read waits for a piece and not for an expert. Checksums are taken in the order
of the bytes, by whichever thread finds the next piece read.

The own disk is asked first, and a shard that fails its checksum there is read from it once more; then the other hosts
that may have it, one after the other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic, perf_counter

from moray.runtime.arena import Arena
from moray.runtime.errors import MorayError, ResourceError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.prefetch.budget import RateMeter
from moray.runtime.prefetch.host import HostPrefetch
from moray.runtime.prefetch.replication import ReplicationBudget
from moray.runtime.residency.depth import DEPTHS, DepthTuner
from moray.runtime.residency.job import Job
from moray.runtime.residency.manager import Load, ResidencyManager, State, Urgency
from moray.runtime.store.disk import DiskReader
from moray.runtime.store.manifest import ShardEntry
from moray.runtime.store.reader import PIECE_BYTES, PeerReaders, ShardReader

# Predicted experts' pieces in flight, and their size: what a demand may have to wait for. From hosts all but demands'.
_HINT_DEPTH, _HINT_PIECE_BYTES = 2, 1 << 20
_PEER_DEPTH = 4  # pieces in flight from other hosts: their disks and the link work at once
_ATTEMPTS = 2  # a shard that fails its checksum is read from disk once more
_MOST_WAITING = 8  # loads begun whose disk, or other hosts, have no time for them yet

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class LoaderStats:
    """Since the start. Seconds are those with at least one read under way."""

    bytes_read: int = 0  # from the own disk and from other hosts
    busy_s: float = 0.0
    peer_bytes: int = 0  # of ``bytes_read``: from other hosts
    peer_busy_s: float = 0.0
    replica_bytes: int = 0  # of ``bytes_read``: in the background, within the budget
    depth: int = 0  # reads that the disk is given at once
    corrupt_reads: int = 0  # from anywhere
    peer_loads: int = 0  # experts that came from another host
    healed: int = 0  # of these: because the own disk's copy is damaged


class _Lane:
    """Reads under way of one kind: from disk, or from other hosts."""

    def __init__(self) -> None:
        self.reading, self.busy_s = 0, 0.0
        self.meter = RateMeter()
        self._told_s = 0.0

    def note(self, passed_s: float) -> None:
        self.busy_s += passed_s if self.reading else 0.0

    def note_read(self, num_bytes: int) -> None:
        self.meter.record_read(num_bytes, self.busy_s - self._told_s)
        self._told_s = self.busy_s


class Loader:
    """Loads what ``manager`` wants, until ``close``. ``lock`` guards the manager, the arena's accounts and this."""

    def __init__(
        self,
        manager: ResidencyManager,
        arena: Arena,
        disk: DiskReader,
        keys: Sequence[ExpertKey],
        entries: Sequence[ShardEntry],
        prefetch: HostPrefetch,
        replication: ReplicationBudget,
        peers: PeerReaders | None = None,
        start_reads: int | None = None,
    ) -> None:
        """``start_reads``: most reads at once to fill memory until ``fill``; None: it fills from the beginning."""
        self._manager, self._arena, self._prefetch, self._replication = manager, arena, prefetch, replication
        self._disk, self._peers = disk, peers
        self._keys, self._entries = keys, entries
        mutex = threading.RLock()
        self.lock = threading.Condition(mutex)  # its waiters are told when a load has ended
        self._work = threading.Condition(mutex)
        self.errors: dict[int, MorayError] = {}  # what kept an expert from being loaded, until it is told
        self.damaged: dict[int, MorayError] = {}  # on the own disk, though another host had it
        self.stats = LoaderStats()
        self._jobs: list[Job] = []
        self._disk_lane, self._peer_lane = _Lane(), _Lane()
        self._started, self._changed_at = 0, perf_counter()
        self._depth = DepthTuner()
        self._start_reads = start_reads
        self._told_busy_s = 0.0
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"moray-load-{i}", daemon=True)
            for i in range(max(DEPTHS) + (_PEER_DEPTH if peers else 0))
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
        self._disk.close()

    def fill(self) -> None:
        """From now on fill memory as fast as it goes."""
        with self.lock:
            self._start_reads = None
            self.wake()

    def wake(self) -> None:
        """The manager has new wishes. Call with ``lock`` held.

        One thread wakes, and the next one when that has found something and there may be more: many at once would
        take the cores from what is computed meanwhile.
        """
        self._work.notify()

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
                    self._work.wait(self._pause_s())
                    found = self._find()
                self._begin_piece(found[0])
            self._carry_out(*found)

    def load_demanded(self) -> None:
        """Load what clients wait for, as far as nobody does yet, in the calling thread: none must be woken for it."""
        while True:
            with self.lock:
                found = self._find(Urgency.DEMAND)
                if found is None:
                    return self._wake_another()
                self._begin_piece(found[0])
            self._carry_out(*found)

    def _begin_piece(self, job: Job) -> None:
        job.in_flight += 1
        self._note_reading(self._lane(job), 1)
        self._wake_another()

    def _carry_out(self, job: Job, piece: int) -> None:
        """Read a piece, and end the load if that was the last one."""
        lane = self._lane(job)
        error = self._read(job, piece)
        with self.lock:
            self._note_reading(lane, -1)
            job.in_flight -= 1
            if error is None:
                self._note_read(lane, len(job.piece(piece)))
                job.read.add(piece)
            else:
                job.error = error
        self._advance(job)

    def _wake_another(self) -> None:
        """If there may be something to read. (Waking a thread for nothing costs the computing beside it more.)"""
        if not self._has_room_somewhere:
            return  # whoever ends a read wakes another
        if self._manager.is_asked or self._manager.wants_to_fill or any(job.has_unread for job in self._jobs):
            self._work.notify()

    def _find(self, least: Urgency = Urgency.FILL) -> tuple[Job, int] | None:
        """A piece to read: of the most urgent load that has one left, or of a new load if that is more urgent.

        ``least``: nothing less urgent is looked for.
        """
        if self._is_closed or not self._has_room_somewhere:
            return None
        if self._start_reads is not None and self._disk_lane.reading + self._peer_lane.reading >= self._start_reads:
            least = min(least, Urgency.REPLICA)
        self._end_given_up()
        unread = [job for job in self._jobs if job.has_unread and self._urgency(job) <= least]
        waiting = [job for job in unread if not self._is_over(job)]
        ready = [job for job in waiting if self._has_room(self._lane(job)) and not self._is_throttled(job)]
        best = min(ready, key=lambda job: (self._urgency(job), job.order), default=None)
        num_waiting = len(waiting) - len(ready)
        while num_waiting < _MOST_WAITING:
            load = self._next_load(least if best is None else self._urgency(best) - 1)
            if load is None:
                break
            job = self._begin(load)
            if self._has_room(self._lane(job)) and not self._is_throttled(job):
                best = job
                break
            num_waiting += 1
        if best is None:
            return None
        if best not in self._jobs or self._is_over(best):  # it gave way to one that was begun
            return self._find(least)
        urgency, lane = self._urgency(best), self._lane(best)
        if lane.reading >= _HINT_DEPTH and (urgency is Urgency.HINT or (lane is self._peer_lane and urgency)):
            return None
        if urgency is Urgency.REPLICA:
            size = len(best.piece(best.next_piece))
            self._replication.spend(monotonic(), size, lane.meter.bandwidth)
            self.stats.replica_bytes += size
        best.next_piece += 1
        return best, best.next_piece - 1

    def _next_load(self, least: int) -> Load | None:
        """A load to begin, of this urgency or a higher one; there is none above ``Urgency.DEMAND``."""
        if least < Urgency.DEMAND:
            return None
        may_replicate = self._may_replicate
        load = self._manager.next_load(Urgency(least), self._prefetch.admit, may_replicate=may_replicate)
        if load is None and self._end_given_up():  # a demand found every slot taken: those are free now
            load = self._manager.next_load(Urgency(least), self._prefetch.admit, may_replicate=may_replicate)
        return load

    @property
    def _may_replicate(self) -> bool:
        """Whether a piece may be read in the background now: one at a time, and within the budget."""
        busy = any(job.in_flight and self._urgency(job) is Urgency.REPLICA for job in self._jobs)
        return not busy and not self._replication.wait_s(monotonic())

    def _is_throttled(self, job: Job) -> bool:
        return self._urgency(job) is Urgency.REPLICA and not self._may_replicate

    def _pause_s(self) -> float | None:
        """How long to sleep unless woken: until the budget has something for replicas that wait."""
        if self._manager.num_replicas_due or any(self._urgency(job) is Urgency.REPLICA for job in self._jobs):
            return self._replication.wait_s(monotonic()) or None  # None: whoever reads for them now wakes another
        return None

    def _urgency(self, job: Job) -> Urgency:
        return self._manager.urgency(job.load.expert)

    def _lane(self, job: Job) -> _Lane:
        return self._disk_lane if job.reader is self._disk else self._peer_lane

    @property
    def _has_room_somewhere(self) -> bool:
        return self._has_room(self._disk_lane) or (self._peers is not None and self._has_room(self._peer_lane))

    def _has_room(self, lane: _Lane) -> bool:
        return lane.reading < (self._depth.depth if lane is self._disk_lane else _PEER_DEPTH)

    def _end_given_up(self) -> bool:
        idle = [job for job in self._jobs if self._is_given_up(job) and not job.in_flight and not job.is_hashing]
        for job in idle:
            self._end(job)
        return bool(idle)

    def _begin(self, load: Load) -> Job:
        is_new_memory = self._arena.is_new(load.slot)
        memory = self._arena.begin_write(load.slot, load.victim)
        if load.victim is not None:
            self._manager.evicted(load.victim)
            self._prefetch.dropped(load.victim, self._entries[load.victim].num_bytes)
        if load.urgency is Urgency.HINT:
            self._prefetch.began(load.expert, load.victim)
        self.errors.pop(load.expert, None)
        key, entry = self._keys[load.expert], self._entries[load.expert]
        readers = self._readers(key)
        piece_bytes = _HINT_PIECE_BYTES if load.urgency is Urgency.HINT else PIECE_BYTES
        job = Job(load, key, entry, memory, self._started, is_new_memory, piece_bytes, readers)
        self._started += 1
        self._jobs.append(job)
        return job

    def _readers(self, key: ExpertKey) -> list[ShardReader]:
        """Whom to try, in order. If the disk lacks it and nobody else may have it, the disk says so."""
        peers = list(self._peers.of(key)) if self._peers else []
        disk: list[ShardReader] = [self._disk] * _ATTEMPTS
        return (disk if self._disk.has(key) or not peers else []) + peers

    def _read(self, job: Job, piece: int) -> MorayError | None:
        try:
            start, memory = piece * job.piece_bytes, job.piece(piece)
            if job.is_new_memory:
                self._arena.require(job.load.slot, start, len(memory))
            job.reader.read(job.key, start, memory)
        except MorayError as error:
            return type(error)(*error.args)  # it is kept, and its own traceback would keep the slot's memory
        return None

    def _advance(self, job: Job) -> None:
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

    def _is_given_up(self, job: Job) -> bool:
        return self._manager.is_given_up(job.load.expert)

    def _is_over(self, job: Job) -> bool:
        return job.error is not None or self._is_given_up(job)

    def _end(self, job: Job) -> None:
        """Publish a load, or take it back. With ``lock`` held."""
        expert, slot = job.load.expert, job.load.slot
        is_whole, is_damaged = not self._is_over(job), False
        if is_whole and not job.is_right:
            self.stats.corrupt_reads += 1
            job.error, is_whole, is_damaged = job.reader.corrupt(job.key), False, True
        if job.error is not None and not self._is_given_up(job) and not isinstance(job.error, ResourceError):
            if job.reader is self._disk and self._disk.has(job.key):
                job.damage = job.error
            if job.try_next(job.error, is_checksum=is_damaged):
                self.wake()
                return
            job.error = job.failure()
        self._jobs.remove(job)
        if is_whole:
            self._note_origin(job)
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
        self._wake_another()  # its slot may have been waited for
        self.lock.notify_all()

    def _bytes_of(self, job: Job) -> int:
        """Read of a load that is not complete."""
        done = job.piece_bytes * (job.next_piece - job.in_flight)
        return max(0, min(done, job.entry.num_bytes - 1))

    def _note_origin(self, job: Job) -> None:
        """A load is whole. What the own disk has in its place may be damaged: that is told, and left as it is."""
        expert = job.load.expert
        if job.reader is self._disk:
            self.damaged.pop(expert, None)
            return
        self.stats.peer_loads += 1
        if job.damage is not None:
            self.stats.healed += 1
            if expert not in self.damaged:
                _log.warning("%s; read from %s instead", job.damage, job.reader.name)
            self.damaged[expert] = job.damage

    def _note_read(self, lane: _Lane, num_bytes: int) -> None:
        self.stats.bytes_read += num_bytes
        if lane is self._disk_lane:
            self._depth.note_bytes(num_bytes)
        else:
            self.stats.peer_bytes += num_bytes
        lane.note_read(num_bytes)
        self._prefetch.read(num_bytes, self.stats.busy_s - self._told_busy_s)
        self._told_busy_s = self.stats.busy_s

    def _note_reading(self, lane: _Lane, change: int) -> None:
        now = perf_counter()
        passed, self._changed_at = now - self._changed_at, now
        self._depth.note(passed, self._disk_lane.reading)
        self.stats.busy_s += passed if self._disk_lane.reading + self._peer_lane.reading else 0.0
        self._disk_lane.note(passed)
        self._peer_lane.note(passed)
        self.stats.peer_busy_s = self._peer_lane.busy_s
        self.stats.depth = self._depth.depth
        lane.reading += change
        if change < 0:
            self._wake_another()  # this one may have to hash first
