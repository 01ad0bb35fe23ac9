"""GGUF files, as far as the comparison with llama.cpp needs them: write one piece by piece, and list one's tensors.

Little-endian: "GGUF", version 3, the counts of tensors and of metadata; the metadata (key, type, value); for each
tensor its name, sizes (columns first), type and offset; then the data, each tensor at a multiple of 32 bytes.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from direct_file import DirectWriter

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32

#: Name -> (its number, values in a block, bytes of a block).
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ4_XS": (23, 256, 136),
    "BF16": (30, 1, 2),
}
_NAMES = {number: name for name, (number, _, _) in TYPES.items()}

_STRING, _ARRAY, _INT32 = 8, 9, 5
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Value = str | bool | int | float | Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file; ``shape`` has the columns last."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        _, values, size = TYPES[self.type]
        assert self.shape[-1] % values == 0, (
            f"{self.name}: rows of {self.shape[-1]} are not whole blocks of {self.type}"
        )
        return self.count // values * size


Buffers = Iterable[bytes | memoryview]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[GgufTensor],
    data_of: Callable[[GgufTensor], Buffers],
) -> None:
    """Write a file. ``data_of`` gives a tensor's bytes in pieces, when its turn comes."""
    with DirectWriter(path) as file:
        file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for tensor in tensors:
            sizes = tensor.shape[::-1]
            file.write(_string(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
            file.write(struct.pack("<IQ", TYPES[tensor.type][0], offset))
            offset += _round_up(tensor.num_bytes)
        for tensor in tensors:
            _pad(file)
            start = file.tell()
            for piece in data_of(tensor):
                file.write(piece)
            assert file.tell() - start == tensor.num_bytes, tensor
        _pad(file)


def read_tensors(path: Path) -> list[GgufTensor]:
    """The tensors that a file holds."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise SystemExit(f"{path} is not a GGUF file")
        _, num_tensors, num_metadata = _read(file, "IQQ")
        for _ in range(num_metadata):
            _skip(file, _read(file, "Q")[0])
            _skip_value(file, _read(file, "I")[0])
        return [_read_tensor(file) for _ in range(num_tensors)]


def _round_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pad(file: DirectWriter) -> None:
    file.write(bytes(_round_up(file.tell()) - file.tell()))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, Sequence):
        return struct.pack("<I", _ARRAY) + _array(value)
    number, form = (7, "?") if isinstance(value, bool) else (4, "I") if isinstance(value, int) else (6, "f")
    return struct.pack(f"<I{form}", number, value)


def _array(values: Sequence[str] | Sequence[int]) -> bytes:
    """Not empty: of strings, or of signed 32-bit numbers."""
    is_text = isinstance(values[0], str)
    items = b"".join(_string(str(value)) if is_text else struct.pack("<i", value) for value in values)
    return struct.pack("<IQ", _STRING if is_text else _INT32, len(values)) + items


def _read(file: BinaryIO, form: str) -> tuple[int, ...]:
    form = f"<{form}"
    values: tuple[int, ...] = struct.unpack(form, file.read(struct.calcsize(form)))
    return values


def _skip(file: BinaryIO, count: int) -> None:
    file.seek(count, os.SEEK_CUR)


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _skip(file, _read(file, "Q")[0])
    elif kind == _ARRAY:
        item, count = _read(file, "IQ")
        for _ in range(count):
            _skip_value(file, item)
    else:
        _skip(file, struct.calcsize(f"<{_SCALARS[kind]}"))


def _read_tensor(file: BinaryIO) -> GgufTensor:
    name = file.read(_read(file, "Q")[0]).decode()
    sizes = _read(file, f"{_read(file, 'I')[0]}Q")
    number, _ = _read(file, "IQ")
    if number not in _NAMES:
        raise SystemExit(f"tensor {name} has GGUF type {number}, which benchmarks/gguf_file.py does not know")
    return GgufTensor(name, sizes[::-1], _NAMES[number])
