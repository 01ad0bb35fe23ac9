"""Where a conversion's files come from: a directory that is there, or one that fills while pieces are made.

The order is decided here, without doing anything: files in an order that keeps few of them waiting for others,
pieces as their last file arrives, and what disk the files take while they wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.encode import Piece

BLOCK_BYTES = 8192  # around a range of a file: what a file system does not give back


class Feed(Protocol):
    """Hands out the pieces of one run of a conversion."""

    def take(self, wait: bool) -> Piece | None:
        """The next piece whose files are there. None: no piece is left or, if not ``wait``, none is ready yet."""
        ...

    def done(self, piece: Piece) -> None:
        """The piece's bytes are in the store's file, and the journal has it."""
        ...


class Supply(Protocol):
    """Gives a conversion its files."""

    def readable(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint that workers read from, given the one that was planned with."""
        ...

    def room_bytes(self, pieces: Sequence[Piece]) -> int:
        """Disk that files take beside the finished store, at most."""
        ...

    def cache_bytes(self, pieces: Sequence[Piece]) -> int:
        """Disk that files take elsewhere, and keep."""
        ...

    def open(self, pieces: Sequence[Piece]) -> AbstractContextManager[Feed]:
        """Begin to make ``pieces`` available."""
        ...


class ListFeed:
    """Pieces that can all be made now, in their order."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = deque(pieces)

    def take(self, wait: bool) -> Piece | None:
        return self._pieces.popleft() if self._pieces else None

    def done(self, piece: Piece) -> None:
        pass


class LocalSupply:
    """All files are there, and stay."""

    def readable(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint

    def room_bytes(self, pieces: Sequence[Piece]) -> int:
        return 0

    def cache_bytes(self, pieces: Sequence[Piece]) -> int:
        return 0

    def open(self, pieces: Sequence[Piece]) -> AbstractContextManager[Feed]:
        return nullcontext(ListFeed(pieces))


@dataclass(frozen=True, slots=True)
class Itinerary:
    """In which order files come and pieces are made.

    ``kept``: file -> the tensors in it that wait for a later file, when all else in it has been used.
    ``beside``: file -> the most that others may take when it is fetched. ``peak_bytes``: the most that files and
    finished pieces take together then.
    """

    files: tuple[str, ...]
    pieces: tuple[Piece, ...]
    kept: dict[str, frozenset[str]]
    beside: dict[str, int]
    peak_bytes: int


def files_of(piece: Piece, checkpoint: Checkpoint) -> frozenset[str]:
    """The files a piece is made from."""
    return frozenset(checkpoint.tensors[part].file for part in _parts(piece, checkpoint))


def _parts(piece: Piece, checkpoint: Checkpoint) -> list[str]:
    """The tensors in files that a piece is made from."""
    return [part for plan in piece.tensors for key in plan.source.keys for part in checkpoint.parts_of(key)]


def plan_itinerary(pieces: Sequence[Piece], checkpoint: Checkpoint, sizes: Mapping[str, int]) -> Itinerary:
    """Order files so that those that make pieces together come together; by name where that leaves a choice."""
    needs = [files_of(piece, checkpoint) for piece in pieces]
    files = _order_files(needs)
    rank = {file: number for number, file in enumerate(files)}
    last = [max((rank[file] for file in need), default=-1) for need in needs]
    order = sorted(range(len(pieces)), key=lambda number: last[number])
    kept: dict[str, set[str]] = {file: set() for file in files}
    stages = [Stage(sizes[file]) for file in files]
    for number, piece in enumerate(pieces):
        if last[number] >= 0:
            stages[last[number]].made_bytes += piece.num_bytes
        for key in _parts(piece, checkpoint):
            file = checkpoint.tensors[key].file
            stages[rank[file]].until = max(stages[rank[file]].until, last[number])
            if last[number] > rank[file]:
                kept[file].add(key)
    for file, stage in zip(files, stages, strict=True):
        stage.kept_bytes = sum(checkpoint.tensors[key].num_bytes + BLOCK_BYTES for key in kept[file])
    beside = _beside(stages)
    frozen = {file: frozenset(keys) for file, keys in kept.items()}
    ordered = tuple(pieces[number] for number in order)
    caps = dict(zip(files, beside, strict=True))
    return Itinerary(tuple(files), ordered, frozen, caps, _peak_bytes(stages, beside))


@dataclass(slots=True)
class Stage:
    """The time between a file's arrival and the next one's. ``made_bytes``: of the pieces that become possible."""

    size: int
    until: int = 0  # the stage after which the file is needed no more
    kept_bytes: int = 0  # of it, after its own stage
    made_bytes: int = 0


def _held(stages: Sequence[Stage], now: int, ahead: int) -> list[int]:
    """What the files up to ``ahead`` take during stage ``now``."""
    past = [min(stage.size, stage.kept_bytes) if stage.until >= now else 0 for stage in stages[:now]]
    return past + [stage.size for stage in stages[now : ahead + 1]]


def _beside(stages: Sequence[Stage]) -> list[int]:
    """The most that other files may take when each one is fetched: so little that conversion can go on, or as much as
    the pieces of later files, not made before it has been used, leave free (but not more than one file ahead).
    """
    owed, room = 0, [0] * len(stages)
    for now in reversed(range(len(stages))):
        room[now] = min(owed, stages[now].size)
        owed += stages[now].made_bytes
    limit = max((sum(_held(stages, now, now)) - room[now] for now in range(len(stages))), default=0)
    return [limit + room[now] - stage.size for now, stage in enumerate(stages)]


def _peak_bytes(stages: Sequence[Stage], beside: Sequence[int]) -> int:
    """Files and pieces together at the worst moment: just before what a stage has used is given back."""
    ahead = peak = written = 0
    for now, stage in enumerate(stages):
        ahead = max(ahead, now)
        while ahead + 1 < len(stages) and sum(_held(stages, now, ahead)) <= beside[ahead + 1]:
            ahead += 1
        written += stage.made_bytes
        peak = max(peak, written + sum(_held(stages, now, ahead)))
    return peak


def _order_files(needs: Sequence[frozenset[str]]) -> list[str]:
    partners: dict[str, dict[str, None]] = {}
    for need in needs:
        for file in need:
            partners.setdefault(file, {}).update(dict.fromkeys(sorted(need)))
    order: dict[str, None] = {}
    for first in sorted(partners):
        waiting = deque([first])
        while waiting:
            file = waiting.popleft()
            if file not in order:
                order[file] = None
                waiting.extend(partner for partner in partners[file] if partner not in order)
    return list(order)
