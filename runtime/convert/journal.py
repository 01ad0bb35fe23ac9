"""The journal of a conversion: which pieces of a store are written, so that a rerun continues there.

A line per piece, appended when its bytes are in the file: 16 hex digits of the xxh3-64 of the rest of the
line, a space, and JSON. The first line holds the fingerprint of checkpoint, recipe and layout. Nothing is
believed without its checksum: neither a line of the journal nor, on resuming, the bytes it speaks of.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from moray.runtime.errors import StoreError

JOURNAL_NAME = "convert.journal"


class Journal:
    """An open journal, locked against other processes. ``pieces``: piece name -> checksum, as found."""

    def __init__(self, path: Path, stream: BinaryIO, pieces: dict[str, int]) -> None:
        self.path = path
        self.pieces = pieces
        self._stream = stream

    @classmethod
    def create(cls, directory: Path, fingerprint: str) -> Journal:
        """Start a journal in an empty directory; it exists whole or not at all."""
        path = directory / JOURNAL_NAME
        partial = directory / f"{JOURNAL_NAME}.partial"
        stream = partial.open("wb")
        _lock(stream, path)
        _append(stream, {"fingerprint": fingerprint})
        os.fsync(stream.fileno())
        partial.rename(path)
        return cls(path, stream, {})

    @classmethod
    def resume(cls, directory: Path, fingerprint: str) -> Journal:
        """Continue a journal. Raises StoreError if it is in use or of another conversion."""
        path = directory / JOURNAL_NAME
        stream = path.open("r+b")
        _lock(stream, path)
        records, end = _read_records(stream.read())
        if not records or records[0].get("fingerprint") != fingerprint:
            stream.close()
            raise StoreError(
                f"{directory} holds an unfinished conversion of another checkpoint or recipe; "
                "run that one again, or delete the directory"
            )
        stream.seek(end)
        stream.truncate()  # a torn last line
        return cls(path, stream, {record["piece"]: record["xxh3"] for record in records[1:]})

    def append(self, piece: str, checksum: int) -> None:
        """Note that a piece's bytes are in its file."""
        self.pieces[piece] = checksum
        _append(self._stream, {"piece": piece, "xxh3": checksum})

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _lock(stream: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise StoreError(f"{path.parent} is being written by another conversion; wait for it or stop it") from error


def _append(stream: BinaryIO, record: dict[str, Any]) -> None:
    text = json.dumps(record, separators=(",", ":")).encode()
    stream.write(b"%016x %s\n" % (xxhash.xxh3_64_intdigest(text), text))
    stream.flush()


def _read_records(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first line that fails its checksum or is no record, and where that line starts."""
    records: list[dict[str, Any]] = []
    end = 0
    for line in data.splitlines(keepends=True):
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or digest != b"%016x" % xxhash.xxh3_64_intdigest(text):
            break
        record = _parse_record(text)
        if record is None or (records and not _names_piece(record)):
            break
        records.append(record)
        end += len(line)
    return records, end


def _parse_record(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _names_piece(record: dict[str, Any]) -> bool:
    return isinstance(record.get("piece"), str) and type(record.get("xxh3")) is int
