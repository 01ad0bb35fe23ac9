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

    ``held_bytes``: the most that files take which still wait for a piece, if each is deleted after its last one.
    ``peak_bytes``: the most that files and finished pieces take together, with files fetched ahead as ``may_fetch`` lets.
    """

    files: tuple[str, ...]
    pieces: tuple[Piece, ...]
    held_bytes: int
    peak_bytes: int


def files_of(piece: Piece, checkpoint: Checkpoint) -> frozenset[str]:
    """The files a piece is made from."""
    return frozenset(checkpoint.tensors[key].file for plan in piece.tensors for key in plan.source.keys)


def plan_itinerary(pieces: Sequence[Piece], checkpoint: Checkpoint, sizes: Mapping[str, int]) -> Itinerary:
    """Order files so that those that make pieces together come together; by name where that leaves a choice."""
    needs = [files_of(piece, checkpoint) for piece in pieces]
    files = _order_files(needs)
    rank = {file: number for number, file in enumerate(files)}
    last = [max((rank[file] for file in need), default=-1) for need in needs]
    order = sorted(range(len(pieces)), key=lambda number: last[number])
    until = dict.fromkeys(files, 0)  # file -> rank of the file after whose arrival it is needed no more
    for number, need in enumerate(needs):
        for file in need:
            until[file] = max(until[file], last[number])
    held = max((sum(sizes[f] for f in files[: now + 1] if until[f] >= now) for now in range(len(files))), default=0)
    made = [0] * len(files)  # bytes of the pieces that are made when this file is the last to have arrived
    for number, rank_of_last in enumerate(last):
        if rank_of_last >= 0:
            made[rank_of_last] += pieces[number].num_bytes
    peak = _peak_bytes([sizes[file] for file in files], [until[file] for file in files], made, held)
    return Itinerary(tuple(files), tuple(pieces[number] for number in order), held, peak)


def may_fetch(num_bytes: int, held_bytes: int, limit_bytes: int, owed_bytes: int) -> bool:
    """Whether a file may be fetched beside those held: within the limit, or one ahead in room that the store will
    need later (``owed_bytes``: of the store, not yet written)."""
    return held_bytes + num_bytes <= limit_bytes + min(owed_bytes, num_bytes)


def _peak_bytes(sizes: list[int], until: list[int], made: list[int], limit_bytes: int) -> int:
    """Files and pieces together at the worst moment: a file is on its way, and those before it were just not deleted."""
    total, peak, written = sum(made), 0, 0
    ahead = 0  # rank of the last file that may have been fetched
    for stage in range(len(sizes)):  # pieces that end with this file are being made
        ahead = max(ahead, stage)
        held = [size if end >= stage else 0 for size, end in zip(sizes, until, strict=True)]
        while ahead + 1 < len(sizes) and may_fetch(
            sizes[ahead + 1], sum(held[: ahead + 1]), limit_bytes, total - written
        ):
            ahead += 1
        written += made[stage]
        peak = max(peak, written + sum(held[: ahead + 1]))
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
