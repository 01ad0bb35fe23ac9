"""Looking at every byte of a store, whatever state it is in: what is there, what is damaged, what repairs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from moray.runtime.errors import StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest, ShardEntry, decode_manifest
from moray.runtime.store.presence import read_presence
from moray.runtime.store.receipt import RECEIPT_NAME, read_receipt, sha256_file
from moray.runtime.store.store import checksum_file


@dataclass(frozen=True, slots=True)
class Checked:
    """One part of a store. ``reason``: what is wrong with it, None if nothing is."""

    name: str  # in words
    num_bytes: int
    reason: str | None
    key: ExpertKey | None = None


def read_manifest(store: Path) -> Manifest:
    """The manifest alone: files may be missing. Raises StoreError."""
    file = store / MANIFEST_NAME
    try:
        return decode_manifest(file.read_bytes(), str(file))
    except OSError as error:
        raise StoreError(
            f"{file} cannot be read ({error.strerror}); a store without it is unfinished: convert again"
        ) from error


def inspect(store: Path, manifest: Manifest) -> Iterator[Checked]:
    """Check the shards that are here, the trunk and every file in the receipt; each part's result as it is found."""
    present = read_presence(store, manifest)
    for key, entry in manifest.shards.items():
        if present is not None and key not in present:
            continue
        name = f"expert {key.expert} of MoE layer {key.layer} ({entry.file}, offset {entry.offset})"
        yield Checked(name, entry.num_bytes, verify_shard(store, entry), key)
    yield Checked(TRUNK_NAME, manifest.trunk_bytes, trunk_reason(store, manifest))
    try:
        receipt = read_receipt(store)
    except StoreError as error:
        yield Checked(RECEIPT_NAME, 0, str(error))
        return
    for name, entry_hash in (receipt.copied if receipt else {}).items():
        yield Checked(name, entry_hash.num_bytes, _file_reason(store / name, entry_hash.sha256))


def verify_shard(store: Path, entry: ShardEntry) -> str | None:
    """What is wrong with a shard on disk: None, or a reason in words."""
    try:
        with (store / entry.file).open("rb", buffering=0) as stream:
            stream.seek(entry.offset)
            data = bytearray(entry.num_bytes)
            view, done = memoryview(data), 0
            while done < len(view) and (count := stream.readinto(view[done:])):
                done += count
    except OSError as error:
        return f"{entry.file} cannot be read: {error.strerror}"
    if done < entry.num_bytes:
        return f"{entry.file} ends {entry.num_bytes - done} bytes before the shard does"
    return None if xxhash.xxh3_64_intdigest(data) == entry.checksum else "its checksum fails"


def trunk_reason(store: Path, manifest: Manifest, name: str = TRUNK_NAME) -> str | None:
    """What is wrong with the trunk: None, or a reason in words."""
    try:
        size = os.path.getsize(store / name)
        if size != manifest.trunk_bytes:
            return f"it has {size} bytes, expected {manifest.trunk_bytes}"
        return None if checksum_file(store / name) == manifest.trunk_checksum else "its checksum fails"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def repair_command(store: Path, manifest: Manifest) -> str:
    """What makes again only what is damaged."""
    name, commit = manifest.source.get("checkpoint", "CHECKPOINT"), manifest.source.get("commit")
    source = f"{name} {store} --revision {commit}" if commit else f"PATH/TO/{name} {store}"
    recipe = ",".join(f"{component}={scheme}" for component, scheme in manifest.recipe.items())
    return f"moray convert {source} --recipe {recipe}"


def _file_reason(path: Path, sha256: str | None) -> str | None:
    try:
        return None if sha256_file(path) == sha256 else "it is not the file that the receipt names"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
