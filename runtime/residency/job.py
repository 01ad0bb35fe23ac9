"""One shard on its way into a slot: its pieces, its checksum, and from where it is read next if that fails."""

from __future__ import annotations

from dataclasses import dataclass, field

import xxhash

from moray.runtime.errors import MorayError
from moray.runtime.layout.shard import ALIGNMENT, ExpertKey, round_up
from moray.runtime.residency.manager import Load
from moray.runtime.store.manifest import ShardEntry
from moray.runtime.store.reader import ShardReader


@dataclass(slots=True)
class Job:
    """``readers``: those to try, in order; one that is listed twice may fail the checksum once."""

    load: Load
    key: ExpertKey
    entry: ShardEntry
    memory: memoryview
    order: int
    is_new_memory: bool
    piece_bytes: int
    readers: list[ShardReader]
    next_piece: int = 0  # to be read
    in_flight: int = 0
    read: set[int] = field(default_factory=set)  # pieces read and not yet hashed
    hashed: int = 0  # pieces
    is_hashing: bool = False
    error: MorayError | None = None  # of the present reader
    failures: list[MorayError] = field(default_factory=list)  # of those before
    damage: MorayError | None = None  # what is wrong with the copy on the own disk
    digest: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)

    @property
    def reader(self) -> ShardReader:
        return self.readers[0]

    @property
    def has_unread(self) -> bool:
        """Whether there is a piece that nobody reads yet."""
        return self.next_piece < self.num_pieces

    @property
    def num_pieces(self) -> int:
        return -(-self.entry.num_bytes // self.piece_bytes)

    def piece(self, index: int) -> memoryview:
        start = index * self.piece_bytes
        return self.memory[start : min(start + self.piece_bytes, round_up(self.entry.num_bytes, ALIGNMENT))]

    def hash_piece(self, index: int) -> None:
        start = index * self.piece_bytes
        self.digest.update(self.memory[start : min(start + self.piece_bytes, self.entry.num_bytes)])

    @property
    def is_right(self) -> bool:
        """Whether all bytes together have the checksum."""
        return bool(self.digest.intdigest() == self.entry.checksum)

    def try_next(self, error: MorayError, *, is_checksum: bool) -> bool:
        """Begin again with the next reader; one that cannot read is not tried twice. False: none is left."""
        failed = self.readers.pop(0)
        if not is_checksum:
            self.readers = [reader for reader in self.readers if reader is not failed]
        if self.readers[:1] != [failed]:
            self.failures.append(error)
        if not self.readers:
            return False
        self.next_piece, self.hashed, self.error = 0, 0, None
        self.read.clear()
        self.digest.reset()
        return True

    def failure(self) -> MorayError:
        """What to say when nobody had the shard: what the first said, and in short what the others did."""
        first, *others = self.failures
        if not others:
            return first
        return type(first)(f"{first}; then asked other hosts: {'; '.join(str(error) for error in others)}")
