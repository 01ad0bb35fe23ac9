"""The directory a store is made in: what may lie there, room on the disk, and what an earlier run left."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import xxhash

from moray.runtime.convert.encode import Piece
from moray.runtime.convert.journal import JOURNAL_NAME, Journal
from moray.runtime.convert.trunk import PARTIAL_TRUNK_NAME
from moray.runtime.errors import ResourceError, StoreError
from moray.runtime.memory import format_bytes
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME
from moray.runtime.store.receipt import sync as sync

ASIDE_NAME = f"{MANIFEST_NAME}.partial"  # of a store that is being completed
DOWNLOAD_FOLDER = "download"  # in the store, for files that live only while it is made
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SPARE_BYTES = 16 << 20  # for the manifest, the journal and the file system's own use
_COPIED = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece.*\.model|.*\.tiktoken"
    r"|chat_template.*|additional_chat_templates"
)


def check_places(checkpoint: Path, store: Path) -> None:
    """Raises StoreError unless ``store`` is a place for a new store, or is one, finished or not."""
    source, target = checkpoint.resolve(), store.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise StoreError(f"the store {store} and the checkpoint {checkpoint} overlap; choose another directory")
    if not store.exists():
        return
    if not store.is_dir():
        raise StoreError(f"{store} is a file; choose a directory for the store")
    if any((store / name).exists() for name in (MANIFEST_NAME, ASIDE_NAME)):
        return  # it is completed, if it is of the same checkpoint
    found = sorted(entry.name for entry in store.iterdir())
    if JOURNAL_NAME not in found and any(name.startswith("experts-") for name in found):
        raise StoreError(
            f"{store} is a store without its {MANIFEST_NAME}; copy that from where the store was made, and what is "
            "missing is filled in; or choose another directory"
        )
    if JOURNAL_NAME not in found and any(name != f"{JOURNAL_NAME}.partial" for name in found):
        raise StoreError(f"{store} is not empty (it holds {found[0]}); choose another directory for the store")


def is_copied(name: str) -> bool:
    """Whether a store keeps a file or folder of this name as it is."""
    return _COPIED.fullmatch(name) is not None


def files_to_copy(checkpoint: Path) -> list[Path]:
    """Configuration, tokenizer, generation config and chat template: what a store keeps as it is."""
    return sorted(entry for entry in checkpoint.iterdir() if is_copied(entry.name))


def disk_bytes(files: Mapping[str, int], copied: list[Path], room_bytes: int) -> int:
    """Disk that a conversion takes: the finished store, ``room_bytes`` beside it, and a little to spare."""
    return sum(files.values()) + sum(path.stat().st_size for path in copied) + room_bytes + _SPARE_BYTES


def check_space(store: Path, files: Mapping[str, int], copied: list[Path], room_bytes: int = 0) -> None:
    """Raises ResourceError if the disk has no room for what is not there yet."""
    total = disk_bytes(files, copied, room_bytes)
    present = sum(_allocated_bytes(store / name) for name in (*files, TRUNK_NAME))
    present += sum(_allocated_bytes(path) for path in (store / DOWNLOAD_FOLDER).rglob("*"))
    free = shutil.disk_usage(_nearest_existing(store)).free
    needed = max(0, total - present)
    if needed > free:
        raise ResourceError(
            f"the store needs {format_bytes(needed)} on the disk of {store}, {format_bytes(free)} are free; "
            "free some space or choose another disk"
        )


@contextmanager
def explain_full_disk(store: Path, files: Mapping[str, int]) -> Iterator[None]:
    """Turns a write that found the disk full into a ResourceError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        present = sum(_allocated_bytes(store / name) for name in files)
        free = shutil.disk_usage(_nearest_existing(store)).free
        raise ResourceError(
            f"the disk of {store} is full ({error.strerror}): {format_bytes(max(0, sum(files.values()) - present))} "
            f"more are needed, {format_bytes(free)} are free; "
            "free some space and run the same command again, it continues where it stopped"
        ) from error


def open_journal(store: Path, fingerprint: str) -> Journal:
    """Start the store's directory, or continue in it."""
    if (store / JOURNAL_NAME).exists():
        return Journal.resume(store, fingerprint)
    store.mkdir(parents=True, exist_ok=True)
    return Journal.create(store, fingerprint)


def make_files(store: Path, files: Mapping[str, int]) -> None:
    """Create the files that pieces are written to, at their full size; what is in them stays."""
    if (store / TRUNK_NAME).exists():  # an earlier run stopped just before its manifest
        (store / TRUNK_NAME).replace(store / PARTIAL_TRUNK_NAME)
    for name, size in files.items():
        with (store / name).open("ab") as stream:
            stream.truncate(size)


def verified_checksum(store: Path, piece: Piece, journal: Journal) -> int | None:
    """The piece's checksum if an earlier run wrote it and its bytes are still right, else None."""
    checksum = journal.pieces.get(piece.name)
    if checksum is None:
        return None
    with (store / piece.file).open("rb") as stream:
        stream.seek(piece.offset)
        data = stream.read(piece.num_bytes)
    return checksum if xxhash.xxh3_64_intdigest(data) == checksum else None


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
