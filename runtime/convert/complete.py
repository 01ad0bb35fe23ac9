"""Converting into a store that is there already: what is missing or damaged is made again, the rest is verified.

The manifest says what each shard must be, so it stands for the journal: nothing else has to survive. While something
is missing it lies aside under another name, and the directory is an unfinished store.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from moray.runtime.convert.encode import Piece
from moray.runtime.convert.journal import JOURNAL_NAME
from moray.runtime.convert.plan import Plan
from moray.runtime.convert.supply import Supply
from moray.runtime.convert.trunk import PARTIAL_TRUNK_NAME
from moray.runtime.convert.workers import Workshop, make_pieces, write_at
from moray.runtime.convert.workspace import (
    ASIDE_NAME,
    DOWNLOAD_FOLDER,
    check_space,
    explain_full_disk,
    is_copied,
)
from moray.runtime.errors import StoreError
from moray.runtime.store.inspection import trunk_reason, verify_shard
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest, decode_manifest
from moray.runtime.store.presence import PRESENT_NAME
from moray.runtime.store.receipt import (
    RECEIPT_NAME,
    FileHash,
    Receipt,
    make_receipt,
    read_receipt,
    sha256_file,
    sync,
    write_aside,
)


class Told(Protocol):
    """A ``Progress`` that may be absent."""

    def start(self, total_bytes: int) -> None: ...

    def advance(self, num_bytes: int, what: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Completion:
    """A store to complete. ``manifest``: what it says of itself; ``missing``: pieces at their places in it."""

    store: Path
    manifest: Manifest
    receipt: Receipt | None
    missing: list[Piece]
    trunk_is_missing: bool

    @property
    def files(self) -> dict[str, int]:
        """Sizes of the files that ``missing`` is written to."""
        sizes = {PARTIAL_TRUNK_NAME: self.manifest.trunk_bytes} if self.trunk_is_missing else {}
        for entry in self.manifest.shards.values():
            sizes[entry.file] = max(sizes.get(entry.file, 0), entry.offset + entry.num_bytes)
        return sizes


def manifest_path(store: Path) -> Path | None:
    """The manifest of a store that is complete, or that was being completed; None if it has never had one."""
    return next((store / name for name in (MANIFEST_NAME, ASIDE_NAME) if (store / name).is_file()), None)


@contextmanager
def opened_for_completion(store: Path, plan: Plan, recipe: dict[str, str], told: Told) -> Iterator[Completion]:
    """Verify a store, locked against other conversions. Raises StoreError if it is not of this plan."""
    path = manifest_path(store)
    assert path is not None
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"{store} is being completed by another conversion; wait for it or stop it") from error
        manifest = decode_manifest(stream.read(), str(path))
        _require_same(manifest, plan, recipe, store)
        receipt = read_receipt(store)
        told.start(sum(piece.num_bytes for piece in plan.pieces))
        missing = [] if (trunk_is_there := trunk_reason(store, manifest) is None) else list(plan.trunk.pieces)
        if trunk_is_there:
            told.advance(sum(piece.num_bytes for piece in plan.trunk.pieces), "verified")
        for number, (key, piece) in enumerate(plan.shards.items()):
            entry = manifest.shards[key]
            # Without a receipt the first shard proves that the source is the store's.
            if verify_shard(store, entry) is None and (number or receipt is not None):
                told.advance(entry.num_bytes, "verified")
            else:
                missing.append(replace(piece, file=entry.file, offset=entry.offset))
        yield Completion(store, manifest, receipt, missing, not trunk_is_there)


def make_missing(work: Completion, workshop: Workshop, supply: Supply, workers: int, header: bytes, told: Told) -> None:
    """Make what is missing, each shard only if its bytes are what the manifest says. Raises StoreError."""
    manifest, store = work.manifest, work.store
    check_space(store, work.files, [], supply.room_bytes(work.missing))
    expected = {f"{entry.file}:{entry.offset}": entry.checksum for entry in manifest.shards.values()}
    with explain_full_disk(store, work.files):
        if (store / MANIFEST_NAME).exists():
            (store / MANIFEST_NAME).replace(store / ASIDE_NAME)
        for name, size in work.files.items():
            with (store / name).open("ab") as stream:
                stream.truncate(size)
        if work.trunk_is_missing:
            write_at(store / PARTIAL_TRUNK_NAME, 0, memoryview(header))
        with supply.open(work.missing) as feed:

            def written(piece: Piece, checksum: int) -> None:
                feed.done(piece)
                told.advance(piece.num_bytes, piece.label)

            make_pieces(
                replace(workshop, expected=expected), feed, max(1, min(workers, len(work.missing) or 1)), written
            )
        if work.trunk_is_missing:
            if trunk_reason(store, manifest, PARTIAL_TRUNK_NAME) is not None:
                raise StoreError(
                    f"the trunk made again has other bytes than the one of {store}; give the checkpoint (and the "
                    "versions of moray, transformers and hqq, `moray info`) that it was made with"
                )
            (store / PARTIAL_TRUNK_NAME).replace(store / TRUNK_NAME)
        for name in {*work.files, TRUNK_NAME} - {PARTIAL_TRUNK_NAME}:
            sync(store / name)


def finish(work: Completion, copied: Sequence[Path], hashes: dict[str, FileHash]) -> Manifest:
    """Bring back the checkpoint's own files, the receipt and the manifest. Raises StoreError for another source."""
    store, manifest = work.store, work.manifest
    for path in copied:
        _copy_missing(path, store, work.receipt)
    shutil.rmtree(store / DOWNLOAD_FOLDER, ignore_errors=True)
    manifest_file = manifest_path(store)
    assert manifest_file is not None
    if work.receipt is None:
        names = sorted(entry.name for entry in store.iterdir() if is_copied(entry.name))
        write_aside(store / RECEIPT_NAME, make_receipt(manifest, manifest_file.read_bytes(), store, names, hashes))
    manifest_file.replace(store / MANIFEST_NAME)
    (store / PRESENT_NAME).unlink(missing_ok=True)  # nothing is missing any more
    sync(store)
    (store / JOURNAL_NAME).unlink(missing_ok=True)
    if work.receipt is not None:
        _require_same_files(work.receipt.files, hashes, store)
    return manifest


def _require_same(manifest: Manifest, plan: Plan, recipe: dict[str, str], store: Path) -> None:
    trunk = plan.trunk.num_bytes, plan.trunk.packed
    same = manifest.layers == plan.layers and (manifest.trunk_bytes, manifest.packed_trunk) == trunk
    if not same or manifest.recipe != recipe:
        raise StoreError(
            f"{store} is already a complete store of another checkpoint or recipe; "
            "choose another directory or delete it"
        )


def _require_same_files(recorded: dict[str, FileHash], found: dict[str, FileHash], store: Path) -> None:
    for name in sorted(recorded.keys() & found.keys()):
        a, b = recorded[name], found[name]
        if a.num_bytes != b.num_bytes or (a.sha256 and b.sha256 and a.sha256 != b.sha256):
            raise StoreError(
                f"{store} is already a complete store, made from a checkpoint with another {name}; "
                "choose another directory or delete it"
            )


def _copy_missing(path: Path, store: Path, receipt: Receipt | None) -> None:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        target = store / file.relative_to(path.parent)
        name = target.relative_to(store).as_posix()
        if not file.is_file() or (target.is_file() and _is_recorded(target, name, receipt)):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        sync(target)


def _is_recorded(target: Path, name: str, receipt: Receipt | None) -> bool:
    recorded = receipt.copied.get(name) if receipt is not None else None
    return recorded is None or recorded == FileHash(os.path.getsize(target), sha256_file(target))
