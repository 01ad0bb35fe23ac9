"""Reading a Hugging Face checkpoint: which tensors lie where, and their values, one at a time.

Headers are checked when a checkpoint is opened, so that a download that was cut short is found before
hours of work. Tensors are read with plain reads, never mapped: memory stays bounded and a file that
shrinks is an error instead of a signal.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from moray.runtime.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
_SAMPLE_BYTES = 64 << 10
_DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` counts bytes from the start of its file."""

    file: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Checkpoint:
    """A local checkpoint in safetensors. Picklable; opens files when it reads."""

    def __init__(self, path: Path, tensors: dict[str, TensorEntry], fingerprint: str) -> None:
        self.path = path
        self.tensors = tensors
        self.fingerprint = fingerprint  # of its files' names, sizes, headers and samples of their content

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read all headers. Raises CheckpointError: nothing there, cut short, damaged, or pre-quantized."""
        root = Path(path)
        if not root.is_dir():
            raise CheckpointError(f"{root} is not a directory; expected a downloaded Hugging Face checkpoint")
        _refuse_quantized(root / "config.json")
        index = _read_index(root)
        files = sorted(set(index.values())) if index else [SINGLE_NAME]
        tensors: dict[str, TensorEntry] = {}
        digest = xxhash.xxh3_128()
        for file in files:
            found, file_digest = _read_file_header(root, file)
            tensors |= found
            digest.update(f"{file}\0{file_digest}\0".encode())
        for key, file in (index or {}).items():
            if key not in tensors or tensors[key].file != file:
                raise CheckpointError(
                    f"{root / INDEX_NAME} says that tensor {key} is in {file}, but it is not; download both again"
                )
        return cls(root, tensors, digest.hexdigest())

    def describe(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor. Raises CheckpointError if its dtype is not supported."""
        entry = self.tensors[key]
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path / entry.file}: tensor {key} has dtype {entry.dtype}, expected F32, BF16 or F16; "
                "moray does not read pre-quantized checkpoints yet, use the original one"
            )
        return entry.shape, _DTYPES[entry.dtype]

    def read(self, key: str, expert: int | None = None) -> torch.Tensor:
        """A private copy of a tensor; with ``expert`` only ``tensor[expert : expert + 1]``."""
        entry = self.tensors[key]
        shape, dtype = self.describe(key)
        offset, num_bytes = entry.offset, entry.num_bytes
        if expert is not None:
            num_bytes //= shape[0]
            offset += expert * num_bytes
            shape = (1, *shape[1:])
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(num_bytes)
        self._read_into(entry.file, offset, memoryview(data))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def _read_into(self, file: str, offset: int, view: memoryview) -> None:
        path = self.path / file
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


def _refuse_quantized(file: Path) -> None:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # load_config reports it
    quantization = document.get("quantization_config") if isinstance(document, dict) else None
    if quantization:
        method = quantization.get("quant_method", "an unknown method") if isinstance(quantization, dict) else "?"
        raise CheckpointError(
            f"{file.parent} is quantized already ({method}); moray does not read pre-quantized checkpoints yet, "
            "use the original 16-bit one"
        )


def read_index_files(root: Path) -> list[str]:
    """The weight files that an index names, whether they are there or not. Raises CheckpointError."""
    return sorted(set(_parse_index(root / INDEX_NAME).values()))


def _read_index(root: Path) -> dict[str, str]:
    """Tensor -> file; empty for a checkpoint in a single file."""
    file = root / INDEX_NAME
    if not file.is_file():
        if not (root / SINGLE_NAME).is_file():
            raise CheckpointError(_explain_no_weights(root))
        return {}
    index = _parse_index(file)
    missing = sorted({name for name in index.values() if not (root / name).is_file()})
    if missing:
        raise CheckpointError(
            f"{root} lacks {missing[0]}{_and_more(len(missing) - 1)}, named in {INDEX_NAME}; download the missing files"
        )
    return index


def _parse_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}); download it again") from error


def _and_more(count: int) -> str:
    return f" and {count} more files" if count else ""


def _explain_no_weights(root: Path) -> str:
    others = [file.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for file in sorted(root.glob(pattern))]
    if others:
        return (
            f"{root} has its weights in {others[0]}; expected {SINGLE_NAME} or {INDEX_NAME}: "
            "convert it to safetensors first, or download the safetensors version"
        )
    return f"{root} has no weights: expected {SINGLE_NAME} or {INDEX_NAME}; download the checkpoint again"


def _read_file_header(root: Path, name: str) -> tuple[dict[str, TensorEntry], str]:
    """Tensors of one file, and a digest of its header and of samples of its content."""
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
    return _parse_header(path, header, size), digest.hexdigest()


def _parse_header(path: Path, header: bytes, size: int) -> dict[str, TensorEntry]:
    try:
        document = json.loads(header)
        document.pop("__metadata__", None)
        tensors = {key: _parse_entry(path.name, entry, 8 + len(header)) for key, entry in document.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged header ({str(error)[:100]}); download it again") from error
    end = max((entry.offset + entry.num_bytes for entry in tensors.values()), default=0)
    if end > size:
        raise CheckpointError(f"{path} has {size} bytes, its header says {end}; it is cut short, download it again")
    return tensors


def _parse_entry(file: str, entry: dict[str, Any], data_start: int) -> TensorEntry:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = str(entry["dtype"])
    num_elements = 1
    for size in shape:
        num_elements *= size
    itemsize = _DTYPES[dtype].itemsize if dtype in _DTYPES else None
    if begin < 0 or end < begin or (itemsize and end - begin != num_elements * itemsize):
        raise ValueError(f"{end - begin} bytes for {dtype} {shape}")
    return TensorEntry(file, dtype, shape, data_start + begin, end - begin)
