"""Reading shards in pieces: from where, and what to say when that fails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moray.runtime.errors import CorruptShardError, StoreError
from moray.runtime.layout.shard import ExpertKey, round_up
from moray.runtime.store.manifest import ShardEntry

PIECE_BYTES = 4 << 20  # a disk is as fast as with larger ones, and a demand waits for one piece only


def read_at(descriptor: int, path: Path, offset: int, view: memoryview, wanted: int, block: int = 1) -> None:
    """Read ``wanted`` bytes at ``offset`` into ``view``, in whole blocks: as many as O_DIRECT asks for, else of 1 byte.

    ``path`` names the file in errors. Raises StoreError: unreadable or too short.
    """
    done, end = 0, round_up(wanted, block)
    while done < wanted:
        at = offset + done
        try:
            count = os.preadv(descriptor, [view[done:end]], at)
        except OSError as error:
            raise StoreError(f"cannot read {path} at offset {at}: {error.strerror}") from error
        if count == 0:
            raise StoreError(f"{path} ends at {at}, expected {wanted - done} more bytes; copy it again")
        done += count
        if done < wanted and done % block:  # O_DIRECT goes on at a whole block only
            if count < block:
                raise StoreError(f"{path} ends at {at + count}, within a shard; copy it again")
            done -= done % block


def corrupt_shard(path: Path, key: ExpertKey, entry: ShardEntry) -> CorruptShardError:
    """What to say of a shard that fails its checksum. ``path``: its file."""
    return CorruptShardError(
        f"{path}: the shard of expert {key.expert} of MoE layer {key.layer} at offset {entry.offset} fails its "
        "checksum; copy the file again or convert again"
    )


def absent_shard(store: Path, key: ExpertKey) -> StoreError:
    """What to say of a shard that is not on this disk."""
    return StoreError(
        f"expert {key.expert} of MoE layer {key.layer} is not in the partial store {store}; bring it with "
        f"`moray store sync SOURCE {store}`, or let this host read from one that has it"
    )


class ShardReader(Protocol):
    """One place to read a store's shards from: the own disk, another host. Safe for several threads.

    It hands over bytes as they are; whoever puts them together compares the checksum.
    """

    name: str  # in messages

    def read(self, key: ExpertKey, start: int, view: memoryview) -> None:
        """Read the bytes of a shard from ``start`` on into ``view``, page-aligned memory that is filled to its end.

        ``start`` is a multiple of 4096. The view may reach past the shard's end, up to a multiple of 4096: what comes
        after the shard is of no meaning. Raises MorayError: not there, unreadable, too short, out of reach.
        """
        ...

    def corrupt(self, key: ExpertKey) -> CorruptShardError:
        """A shard that was read from here fails its checksum. Returns what to say of it."""
        ...


class PeerReaders(Protocol):
    """Other hosts that may have shards."""

    def of(self, key: ExpertKey) -> Sequence[ShardReader]:
        """Whom to ask for a shard, the best first. Quick, from any thread."""
        ...
