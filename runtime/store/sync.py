"""Bringing a store, or a part of it, from another disk or another machine; also what is missing or damaged in one.

Nothing is believed without its checksum, neither what comes nor what is there already: that is what makes a rerun
continue where the last one was stopped, however it was stopped. A shard becomes part of a partial store only after
its bytes are on the disk; a new store gets its manifest last. Nothing is deleted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from moray.runtime.errors import CorruptShardError, ResourceError, StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.memory import format_bytes
from moray.runtime.paths import is_outside
from moray.runtime.store.inspection import verify_shard
from moray.runtime.store.manifest import MANIFEST_NAME, Manifest, decode_manifest
from moray.runtime.store.presence import PRESENT_NAME, read_presence, write_presence
from moray.runtime.store.receipt import sync, write_aside
from moray.runtime.store.shelf import StoreFile, SyncSource
from moray.runtime.store.store import checksum_file

_CHUNK_BYTES = 4 << 20
_COMMIT_BYTES = 256 << 20  # shards brought before they are flushed and counted as here
_SPARE_BYTES = 16 << 20  # for the manifest and the file system's own use
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Told(Protocol):
    """Who is told of progress."""

    def start(self, total_bytes: int, what: str) -> None: ...

    def advance(self, num_bytes: int, what: str) -> None: ...


@dataclass(slots=True)
class SyncPlan:
    """What a store lacks of what was asked for."""

    manifest: Manifest
    manifest_data: bytes
    num_wanted: int
    here: set[ExpertKey]  # counted as here, and not found damaged
    missing: list[ExpertKey] = field(default_factory=list)  # by file and offset
    damaged: list[ExpertKey] = field(default_factory=list)  # some of ``missing``: they were counted as here
    files: list[StoreFile] = field(default_factory=list)
    is_new: bool = True  # no manifest yet

    @property
    def num_bytes(self) -> int:
        """To be brought."""
        shards = self.manifest.shards
        return sum(shards[key].num_bytes for key in self.missing) + sum(file.num_bytes for file in self.files)


def sync_store(
    source: SyncSource,
    store: Path,
    told: Told,
    wanted: Callable[[Manifest], Collection[ExpertKey]] | None = None,
    *,
    dry_run: bool = False,
) -> SyncPlan:
    """Bring into ``store`` what it lacks of the shards ``wanted`` and of all other files. Returns what that was.

    ``wanted`` None: all that the source has. ``dry_run``: look only.
    Raises StoreError (another store, a key that the source lacks, source or network), ResourceError (disk).
    """
    data = source.manifest_data
    manifest = decode_manifest(data, f"the manifest of {source.name}")
    keys = [key for key in manifest.shards if source.has(key)] if wanted is None else list(wanted(manifest))
    is_new = _check_target(store, manifest, source)
    with _locked(store, make=not dry_run):
        plan = SyncPlan(manifest, data, len(keys), _claimed(store, manifest, is_new), is_new=is_new)
        _look(plan, source, store, keys, told)
        absent = [key for key in plan.missing if not source.has(key)]
        if absent:
            layer, expert = absent[0]
            raise StoreError(
                f"{source.name} lacks {len(absent)} of the {len(keys)} experts asked for, the first is expert "
                f"{expert} of MoE layer {layer}; ask for what it has, or bring these from another host"
            )
        _check_space(store, plan)
        if not dry_run:
            with _full_disk_explained(store):
                _bring(plan, source, store, told)
    return plan


# ------------------------------------------------------------------------------------------- looking


def _check_target(store: Path, manifest: Manifest, source: SyncSource) -> bool:
    """Whether the store is a new one. Raises StoreError if it cannot become, or is not, a copy of the source."""
    place, origin = store.absolute().resolve(), Path(source.name).resolve()
    if origin.is_dir() and (place == origin or origin in place.parents or place in origin.parents):
        raise StoreError(f"{store} and {source.name} overlap; choose another directory")
    if not store.exists():
        return True
    if not store.is_dir():
        raise StoreError(f"{store} is a file; choose a directory for the store")
    file = store / MANIFEST_NAME
    if file.is_file():
        theirs = decode_manifest(file.read_bytes(), str(file)).fingerprint
        if theirs != manifest.fingerprint:
            raise StoreError(
                f"{store} holds another store than {source.name} (fingerprints {theirs} and {manifest.fingerprint}); "
                "choose another directory"
            )
        return False
    own = {entry.file for entry in manifest.shards.values()} | {PRESENT_NAME, f"{PRESENT_NAME}.partial"}
    own |= {f"{MANIFEST_NAME}.partial"} | {n for f in source.files() for n in _names(f.name)}
    foreign = sorted(entry.name for entry in store.iterdir() if entry.name not in own)
    if foreign:
        raise StoreError(f"{store} is no part of {source.name} (it holds {foreign[0]}); choose another directory")
    return True


def _names(file: str) -> tuple[str, str]:
    """What a file may be seen as, at the top of a store."""
    top = file.partition("/")[0]
    return top, f"{top}.partial"


def _claimed(store: Path, manifest: Manifest, is_new: bool) -> set[ExpertKey]:
    """What is counted as here."""
    present = read_presence(store, manifest)
    if present is None:
        return set() if is_new else set(manifest.shards)
    return set(present)


def _look(plan: SyncPlan, source: SyncSource, store: Path, keys: Sequence[ExpertKey], told: Told) -> None:
    manifest, files = plan.manifest, source.files()
    reserved = {"", ".", MANIFEST_NAME, PRESENT_NAME, *(entry.file for entry in manifest.shards.values())}
    total = sum(manifest.shards[key].num_bytes for key in keys) + sum(file.num_bytes for file in files)
    told.start(total, "looking at what is there")
    for key in sorted(keys, key=lambda key: (manifest.shards[key].file, manifest.shards[key].offset)):
        entry = manifest.shards[key]
        if _has_bytes(store / entry.file, entry.offset) and verify_shard(store, entry) is None:
            plan.here.add(key)
        else:
            plan.missing.append(key)
            plan.damaged += [key] if key in plan.here else []
            plan.here.discard(key)
        told.advance(entry.num_bytes, "looking at what is there")
    for file in files:
        if is_outside(file.name) or not file.name.isprintable() or file.name in reserved:
            raise StoreError(f"{source.name} has a file {file.name!r:.80}, which no store has")
        path = store / file.name
        if not (path.is_file() and path.stat().st_size == file.num_bytes and checksum_file(path) == file.checksum):
            plan.files.append(file)
        told.advance(file.num_bytes, "looking at what is there")


def _has_bytes(path: Path, offset: int) -> bool:
    """Whether anything was ever written at a place of a file: a hole need not be read to know that it is no shard."""
    try:
        with path.open("rb") as stream:
            return os.lseek(stream.fileno(), offset, os.SEEK_DATA) == offset
    except OSError:  # no such file, or nothing but a hole from there on
        return False


def _check_space(store: Path, plan: SyncPlan) -> None:
    entries = [plan.manifest.shards[key] for key in plan.damaged]
    in_place = sum(entry.num_bytes for entry in entries if _has_bytes(store / entry.file, entry.offset))
    aside = (store / f"{file.name}.partial" for file in plan.files)
    in_place += sum(path.stat().st_size for path in aside if path.is_file())
    needed = plan.num_bytes - in_place + (_SPARE_BYTES if plan.num_bytes else 0)
    place = store.absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free
    if needed > free:
        raise ResourceError(
            f"what is to be brought needs {format_bytes(needed)} on the disk of {store}, {format_bytes(free)} are "
            "free; free some space, or ask for fewer experts"
        )


# ------------------------------------------------------------------------------------------ bringing


def _bring(plan: SyncPlan, source: SyncSource, store: Path, told: Told) -> None:
    manifest = plan.manifest
    told.start(plan.num_bytes, "bringing")
    if not plan.is_new and (plan.damaged or len(plan.here) < len(manifest.shards)):
        write_presence(store, manifest, plan.here)  # before a file is touched
    for file in plan.files:
        _bring_file(file, source, store, told)
    brought: list[ExpertKey] = []
    since = 0
    for key in _written(plan, source, store):
        entry = manifest.shards[key]
        brought.append(key)
        since += entry.num_bytes
        told.advance(entry.num_bytes, f"expert {key.expert} of MoE layer {key.layer}")
        if since >= _COMMIT_BYTES:
            _commit(plan, store, brought)
            since = 0
    _commit(plan, store, brought)
    is_whole = len(plan.here) == len(manifest.shards)
    if plan.is_new:
        if not is_whole:
            write_presence(store, manifest, plan.here)
        write_aside(store / MANIFEST_NAME, plan.manifest_data)
    if is_whole and (store / PRESENT_NAME).exists():
        (store / PRESENT_NAME).unlink()
        sync(store)


def _commit(plan: SyncPlan, store: Path, brought: list[ExpertKey]) -> None:
    """From here on these are part of the store."""
    for file in {plan.manifest.shards[key].file for key in brought}:
        sync(store / file)
    sync(store)
    plan.here.update(brought)
    if brought and not plan.is_new:
        write_presence(store, plan.manifest, plan.here)
    brought.clear()


def _written(plan: SyncPlan, source: SyncSource, store: Path) -> Iterator[ExpertKey]:
    """Shards as they are written, the next one read meanwhile."""
    shards, sizes = plan.manifest.shards, file_sizes(plan.manifest)
    buffers = [np.empty(plan.manifest.slot_bytes, dtype=np.uint8) for _ in range(2 if plan.missing else 0)]

    def read(index: int) -> memoryview:
        key = plan.missing[index]
        view = buffers[index % 2].data[: shards[key].num_bytes]
        _read_checked(plan, source, key, view)
        return view

    with ThreadPoolExecutor(1, "moray-sync") as reader:
        coming = reader.submit(read, 0) if plan.missing else None
        for index, key in enumerate(plan.missing):
            assert coming is not None
            view, entry = coming.result(), shards[key]
            coming = reader.submit(read, index + 1) if index + 1 < len(plan.missing) else None
            descriptor = os.open(store / entry.file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(descriptor).st_size < sizes[entry.file]:
                    os.ftruncate(descriptor, sizes[entry.file])
                _write_at(descriptor, view, entry.offset)
            finally:
                os.close(descriptor)
            yield key


def _read_checked(plan: SyncPlan, source: SyncSource, key: ExpertKey, view: memoryview) -> None:
    for _ in range(2):
        source.read_shard(key, view)
        if xxhash.xxh3_64_intdigest(view) == plan.manifest.shards[key].checksum:
            return
    raise CorruptShardError(
        f"expert {key.expert} of MoE layer {key.layer} comes from {source.name} with another checksum than the "
        "manifest has; bring it from another host, or repair it there"
    )


def _bring_file(file: StoreFile, source: SyncSource, store: Path, told: Told) -> None:
    """Into a file aside, continued where an earlier run stopped; its checksum decides at the end."""
    path = store / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    for is_last in (False, True):
        start = 0 if is_last or not aside.is_file() else min(aside.stat().st_size, file.num_bytes)
        digest = xxhash.xxh3_64()
        with aside.open("r+b" if start else "wb") as stream:
            for at in range(0, start, _CHUNK_BYTES):
                digest.update(stream.read(min(_CHUNK_BYTES, start - at)))
            chunk = memoryview(bytearray(_CHUNK_BYTES))
            for at in range(start, file.num_bytes, _CHUNK_BYTES):
                view = chunk[: min(_CHUNK_BYTES, file.num_bytes - at)]
                source.read_file(file.name, at, view)
                digest.update(view)
                stream.write(view)
                told.advance(len(view), file.name)
            stream.truncate(file.num_bytes)
        if digest.intdigest() == file.checksum:
            sync(aside)
            aside.replace(path)
            sync(path.parent)
            return
    raise StoreError(f"{file.name} comes from {source.name} with another checksum than it said; is it being changed?")


def file_sizes(manifest: Manifest) -> dict[str, int]:
    """Of the files that hold shards."""
    sizes: dict[str, int] = {}
    for entry in manifest.shards.values():
        sizes[entry.file] = max(sizes.get(entry.file, 0), entry.offset + entry.num_bytes)
    return sizes


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


@contextmanager
def _locked(store: Path, *, make: bool) -> Iterator[None]:
    """Nobody else syncs into this directory."""
    if make:
        store.mkdir(parents=True, exist_ok=True)
    elif not store.is_dir():
        yield
        return
    descriptor = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise StoreError(f"{store} is being synced by another process; wait for it or stop it") from error
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_explained(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        free = shutil.disk_usage(store).free
        raise ResourceError(
            f"the disk of {store} is full ({error.strerror}), {format_bytes(free)} are free; free some space and run "
            "the same command again, it continues where it stopped"
        ) from error
