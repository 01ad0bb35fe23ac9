"""Rewriting a store without changing a weight: the present format, its shards in other files, nothing left over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import xxhash

from moray.runtime.errors import ResourceError, StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.memory import format_bytes
from moray.runtime.store.inspection import read_manifest
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest, ShardEntry
from moray.runtime.store.receipt import RECEIPT_NAME, make_receipt, read_receipt, sync, write_aside
from moray.runtime.store.shelf import LEFT_OVER, LEFT_OVER_FOLDERS, own_files
from moray.runtime.store.store import Store

_CHUNK_BYTES = 16 << 20
Told = Callable[[int, str], None]  # bytes that are done, and what they are


def stored_format(store: Path) -> int:
    """The format version on disk; ``Manifest.format_version`` is what it was read as. Raises StoreError."""
    read_manifest(store)  # refuses what is not one
    return int(msgpack.unpackb((store / MANIFEST_NAME).read_bytes())["format"])


def repack_in_place(path: Path) -> list[str]:
    """Bring a store to the present format, write its receipt if it has none, drop what an unfinished conversion left.

    Returns what was done, in words. Each file is replaced whole: whenever this is stopped the store can be opened.
    Raises StoreError.
    """
    done: list[str] = []
    with Store.open(path) as store:
        manifest, version = store.manifest, stored_format(path)
    if version != manifest.format_version:
        done.append(f"format {version} is format {manifest.format_version} now")
    if version != manifest.format_version or read_receipt(path) is None:
        _write_ends(path, manifest, path)
        done.append(f"{RECEIPT_NAME} is written")
    for pattern in LEFT_OVER:
        for file in path.glob(pattern):
            file.unlink()
            done.append(f"{file.name} is deleted")
    for name in LEFT_OVER_FOLDERS:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
            done.append(f"{name} is deleted")
    return done


def repack(path: Path, target: Path, file_bytes: int | None, told: Told) -> Manifest:
    """Write a store again, every shard and the trunk verified on the way. ``target`` must not exist, or be empty.

    ``file_bytes``: shards fill files of at most so many bytes (or one shard); None: one file a MoE layer. The manifest
    comes last. Raises StoreError (also CorruptShardError), ResourceError.
    """
    with Store.open(path) as store:
        manifest = store.manifest
        _check_target(path, target, manifest)
        target.mkdir(parents=True, exist_ok=True)
        shards = {}
        for key, entry in _place(manifest, file_bytes):
            data = store.read_shard(key)
            with (target / entry.file).open("ab") as stream:
                assert stream.tell() == entry.offset
                stream.write(data.data)
            shards[key] = entry
            told(entry.num_bytes, f"expert {key.expert} of MoE layer {key.layer}")
        if _copy(store.trunk_path, target / TRUNK_NAME) != manifest.trunk_checksum:
            raise StoreError(f"{store.trunk_path} fails its checksum; `moray store verify {path}` says what to do")
        told(manifest.trunk_bytes, TRUNK_NAME)
    for entry_path in own_files(path, manifest):
        if entry_path.is_dir():
            shutil.copytree(entry_path, target / entry_path.name)
        else:
            shutil.copyfile(entry_path, target / entry_path.name)
    for file in target.rglob("*"):
        sync(file)
    repacked = replace(manifest, shards={key: shards[key] for key in manifest.shards})
    _write_ends(target, repacked, path)
    return repacked


def _place(manifest: Manifest, file_bytes: int | None) -> Iterator[tuple[ExpertKey, ShardEntry]]:
    """Shards in order, and where each one goes."""
    number, end, layer = -1, 0, -1
    for key, entry in sorted(manifest.shards.items()):
        full = end + entry.num_bytes > file_bytes if file_bytes is not None else key.layer != layer
        if number < 0 or full:
            number, end = number + 1, 0
        name = f"experts-{key.layer if file_bytes is None else number:05d}.bin"
        yield key, replace(entry, file=name, offset=end)
        end, layer = end + entry.num_bytes, key.layer


def _check_target(path: Path, target: Path, manifest: Manifest) -> None:
    source, place = path.resolve(), target.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise StoreError(f"{target} and the store {path} overlap; choose another directory")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target} is not an empty directory; choose another one or delete it")
    needed = manifest.expert_bytes + manifest.trunk_bytes
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            f"the store needs {format_bytes(needed)} on the disk of {target}, {format_bytes(free)} are free; "
            "free some space or choose another disk"
        )


def _write_ends(target: Path, manifest: Manifest, source: Path) -> None:
    receipt = read_receipt(source)
    data = manifest.encode()
    names = [entry.name for entry in own_files(target, manifest)]
    write_aside(
        target / RECEIPT_NAME, make_receipt(manifest, data, target, names, dict(receipt.files) if receipt else {})
    )
    write_aside(target / MANIFEST_NAME, data)


def _copy(source: Path, target: Path) -> int:
    """Copy a file. Returns the xxh3-64 of what was copied."""
    digest = xxhash.xxh3_64()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
    return digest.intdigest()
