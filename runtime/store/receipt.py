"""The receipt: where a store comes from, and hashes of what the manifest does not cover, for people and `moray store`.

``receipt.json`` names the source and its revision, the source's files, the versions that converted, the recipe and
the time, and nothing of the machine. A store works without it; nothing that computes reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from moray.runtime.errors import StoreError
from moray.runtime.store.manifest import MANIFEST_NAME, Manifest

RECEIPT_NAME = "receipt.json"
RECEIPT_VERSION = 1
_CHUNK_BYTES = 8 << 20


class Stopped(Exception):
    """Work in a thread was no longer wanted."""


@dataclass(frozen=True, slots=True)
class FileHash:
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """``files``: of the source. ``copied``: files of the store, the manifest included."""

    source: dict[str, str]
    files: dict[str, FileHash]
    copied: dict[str, FileHash]
    versions: dict[str, str]
    recipe: dict[str, str]


def make_receipt(
    manifest: Manifest, manifest_data: bytes, store: Path, copied: list[str], files: dict[str, FileHash]
) -> bytes:
    """The receipt of a store whose files are all in place but the manifest. ``copied``: files and folders in it."""
    own = [path for name in copied for path in files_below(store / name)]
    hashes = {path.relative_to(store).as_posix(): FileHash(path.stat().st_size, sha256_file(path)) for path in own}
    hashes[MANIFEST_NAME] = FileHash(len(manifest_data), hashlib.sha256(manifest_data).hexdigest())
    document = {
        "receipt": RECEIPT_VERSION,
        "source": manifest.source,
        "source files": _encode(files),
        "versions": manifest.versions | {"python": platform.python_version()},
        "recipe": manifest.recipe,
        "format": manifest.format_version,
        "layout": manifest.layout_id,
        "numerics": manifest.numerics_id,
        "store files": _encode(hashes),
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def read_receipt(store: Path) -> Receipt | None:
    """None if there is none. Raises StoreError if it cannot be read."""
    file = store / RECEIPT_NAME
    try:
        document = json.loads(file.read_bytes())
        source, versions, recipe = (
            {str(k): str(v) for k, v in document[n].items()} for n in ("source", "versions", "recipe")
        )
        return Receipt(source, _decode(document["source files"]), _decode(document["store files"]), versions, recipe)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{file} is damaged ({error!r}); delete it (a store works without it) or copy it again"
        ) from error


def _encode(files: dict[str, FileHash]) -> dict[str, Any]:
    return {name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for name, entry in sorted(files.items())}


def _decode(document: dict[str, Any]) -> dict[str, FileHash]:
    return {str(name): FileHash(int(entry["bytes"]), entry["sha256"]) for name, entry in document.items()}


def files_below(path: Path) -> list[Path]:
    """A file itself, or all files in a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def sha256_file(path: Path, stop: Event | None = None) -> str:
    """Raises Stopped once ``stop`` is set."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            if stop is not None and stop.is_set():
                raise Stopped
    return digest.hexdigest()


def write_aside(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's (or a directory's list of) content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
