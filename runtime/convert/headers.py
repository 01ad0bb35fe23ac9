"""The header of a safetensors file, checked before anything is believed, and its tensors, read one at a time."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from moray.runtime.convert.tensors import STORED_DTYPES, TensorEntry
from moray.runtime.errors import CheckpointError

_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
_SAMPLE_BYTES = 64 << 10


def read_file_header(root: Path, name: str) -> tuple[dict[str, TensorEntry], str]:
    """Tensors of one file, and a digest of its header and of samples of its content. Raises CheckpointError."""
    path = root / name
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} has no safetensors header ({size} bytes); it is cut short or damaged, download it again"
                )
            header = stream.read(length)
            digest = xxhash.xxh3_128(header + size.to_bytes(8, "little"))
            for position in (8 + length, (size + length) // 2, max(8 + length, size - _SAMPLE_BYTES)):
                stream.seek(position)
                digest.update(stream.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return _parse_header(path, name, header, size), digest.hexdigest()


def read_tensor(read: Callable[[int, memoryview], None], entry: TensorEntry, row: int | None = None) -> torch.Tensor:
    """A private copy of a tensor; with ``row`` only ``tensor[row : row + 1]``.

    ``read`` fills a buffer from an offset of the file.
    """
    shape, dtype = entry.shape, STORED_DTYPES[entry.dtype]
    offset, num_bytes = entry.offset, entry.num_bytes
    if row is not None:
        num_bytes //= shape[0]
        offset += row * num_bytes
        shape = (1, *shape[1:])
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(num_bytes)
    read(offset, memoryview(data))
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def read_into(path: Path, offset: int, view: memoryview) -> None:
    """Fill a buffer from a file. Raises CheckpointError."""
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            done = 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{path} became shorter while it was read; download it again")
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _parse_header(path: Path, name: str, header: bytes, size: int) -> dict[str, TensorEntry]:
    start = 8 + len(header)
    try:
        document = json.loads(header, object_pairs_hook=_without_duplicates)
        if not isinstance(document, dict):
            raise ValueError("not a map")
        document.pop("__metadata__", None)
        tensors = {key: _parse_entry(name, key, entry, start) for key, entry in document.items()}
        _require_disjoint(tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{path} has a damaged header ({why}); download it again") from error
    end = max((entry.offset + entry.num_bytes for entry in tensors.values()), default=start)
    if end > size:
        raise CheckpointError(f"{path} has {size} bytes, its header says {end}; it is cut short, download it again")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r:.60} comes twice")
    return document


def _parse_entry(file: str, key: str, entry: dict[str, Any], start: int) -> TensorEntry:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    is_text = isinstance(dtype, str) and dtype.isprintable() and key.isprintable()
    if not is_text or any(type(n) is not int for n in (begin, end, *shape)):
        raise ValueError(f"entry {key!r:.60} is {entry!r}")
    itemsize = STORED_DTYPES[dtype].itemsize if dtype in STORED_DTYPES else None
    wanted = math.prod(shape) * itemsize if itemsize else end - begin
    if not 0 <= begin <= end or min(shape, default=0) < 0 or end - begin != wanted:
        raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}")
    return TensorEntry(file, dtype, shape, start + begin, end - begin)


def _require_disjoint(tensors: dict[str, TensorEntry]) -> None:
    """No byte belongs to two tensors."""
    end, last = 0, ""
    for key, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset < end and entry.num_bytes:
            raise ValueError(f"{last!r:.60} and {key!r:.60} overlap")
        end, last = max(end, entry.offset + entry.num_bytes), key
