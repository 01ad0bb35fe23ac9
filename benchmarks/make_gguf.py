"""Write a GGUF file of a random model, as make_store.py writes a store: for speed, not for quality.

    python benchmarks/make_gguf.py /tmp/mixtral.gguf --preset mixtral-8x7b --layers 4
    python benchmarks/make_gguf.py /tmp/qwen.gguf --preset qwen3-30b-a3b --layers 4 --embedding-type BF16

Experts, attention and head are Q4_0: 4.5 bits a weight, as `hqq4:64` with float16 scales and zeros has (4 + 2 * 16 /
64). So is the embedding table, unless --embedding-type says otherwise; norms and routers are F32. Codes of Q4_0 are
uniform from 1 to 15, because 8 stands for 0: weights have mean 0, and the scale gives them std 0.02 (embeddings: 1). No
vocabulary: prompts are token ids. Data are slices of random blocks at random places, so writing runs at the disk's
speed, past the page cache.

--routing plants experts to choose for each token id, as in make_store.py: the same in both files with the same options.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from geometry import Geometry, add_geometry, config_of, geometry_of, std_of, tensors_of
from gguf_file import TYPES, Buffers, GgufTensor, Value, write_gguf
from gguf_model import class_of, group_tensors, metadata_of
from planted import HEAD_UNIT, UNIT, Levels, Planted, RowsOf, role_of
from replay import Replay
from routing import add_routing, replay_of

from moray.runtime.arrays import Bytes

_POOL = 8 << 20  # values in a random block
_SLICE = 1 << 20  # values written at a time
_ROWS_AT_ONCE = 1024  # of a matrix with planted values
RANDOM_TYPES = ("Q4_0", "BF16", "F16", "F32")


@dataclass(frozen=True)
class GgufTypes:
    """GGUF types by class of tensor."""

    experts: str = "Q4_0"
    attention: str = "Q4_0"
    head: str = "Q4_0"
    embedding: str = "Q4_0"

    def __getitem__(self, name: str) -> str:
        return getattr(self, name, "F32")


class RandomTensors:
    """The bytes of random tensors, of any of ``RANDOM_TYPES``."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pools: dict[tuple[str, float], Bytes] = {}

    def slices(self, tensor: GgufTensor) -> Iterator[memoryview]:
        """Its bytes in pieces: norms are ones."""
        if "norm" in tensor.name:
            yield np.ones(tensor.count, dtype=np.float32).data.cast("B")
            return
        yield from self._slices(tensor.type, std_of(tensor.name), tensor.count)

    def with_zero_rows(self, tensor: GgufTensor, zero_rows: int) -> Iterator[memoryview]:
        """Its bytes in pieces, where the first rows of each matrix are zero (0 bytes are, in every type)."""
        rows, columns = tensor.shape[-2:]
        row_bytes = tensor.num_bytes // (tensor.count // columns)
        for _ in range(tensor.count // (rows * columns)):
            yield memoryview(bytes(zero_rows * row_bytes))
            yield from self._slices(tensor.type, std_of(tensor.name), (rows - zero_rows) * columns)

    def planted(self, tensor: GgufTensor, rows_of: RowsOf, unit: float, *, is_random: bool) -> Iterator[memoryview]:
        """Its bytes in pieces: the first columns of each row are levels times ``unit``, the others random or zero."""
        rows, columns = tensor.shape
        _, values, size = TYPES[tensor.type]
        for first in range(0, rows, _ROWS_AT_ONCE):
            levels = rows_of(first, min(_ROWS_AT_ONCE, rows - first))
            whole = np.zeros((len(levels), columns // values * size), dtype=np.uint8)
            if is_random:
                pieces = self._slices(tensor.type, std_of(tensor.name), len(levels) * columns)
                flat = np.concatenate([np.frombuffer(piece, dtype=np.uint8) for piece in pieces])
                whole[:] = flat.reshape(whole.shape)
            encoded = _encode_levels(levels, tensor.type, unit)
            whole[:, : encoded.shape[1]] = encoded
            yield whole.reshape(-1).data

    def _slices(self, kind: str, std: float, left: int) -> Iterator[memoryview]:
        _, values, size = TYPES[kind]
        pool = self._pool(kind, std)
        while left:
            count = min(left, _SLICE)
            start = int(self._random.integers(0, (_POOL - count) // values)) * size
            yield pool[start : start + count // values * size].data
            left -= count

    def _pool(self, kind: str, std: float) -> Bytes:
        if (kind, std) not in self._pools:
            values = self._q4_0(std) if kind == "Q4_0" else self._plain(kind, std)
            self._pools[kind, std] = values.reshape(-1)
        return self._pools[kind, std]

    def _plain(self, kind: str, std: float) -> Bytes:
        values: npt.NDArray[np.float32] = self._random.standard_normal(_POOL, dtype=np.float32)
        values = (values - values.mean()) * np.float32(std / values.std())
        if kind == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return (values.astype(np.float16) if kind == "F16" else values).view(np.uint8)

    def _q4_0(self, std: float) -> Bytes:
        """Blocks of a float16 scale and 32 codes, two a byte."""
        blocks = np.empty((_POOL // 32, 18), dtype=np.uint8)
        scale = np.float16(std / np.sqrt((15**2 - 1) / 12))
        blocks[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
        low, high = self._random.integers(1, 16, (2, _POOL // 32, 16), dtype=np.uint8)
        blocks[:, 2:] = low | high << 4
        return blocks


def _encode_levels(levels: Levels, kind: str, unit: float) -> Bytes:
    """uint8 [rows, bytes]: exactly levels times ``unit``."""
    if kind == "Q4_0":
        blocks = np.empty((len(levels), levels.shape[1] // 32, 18), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(unit).tobytes(), dtype=np.uint8)
        codes = (levels + 8).astype(np.uint8).reshape(len(levels), -1, 2, 16)
        blocks[..., 2:] = codes[:, :, 0] | codes[:, :, 1] << 4
        return blocks.reshape(len(levels), -1)
    values = levels * np.float32(unit)
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return (values.astype(np.float16) if kind == "F16" else values).view(np.uint8)


def gguf_tensors(geometry: Geometry, types: GgufTypes) -> list[GgufTensor]:
    """Every tensor of the file: the experts of a layer are one."""
    shapes = {tensor.name: tensor.shape for tensor in tensors_of(geometry)}
    tensors = []
    for name, parts in group_tensors(shapes).items():
        shape = shapes[parts[0]]
        stacked = (len(parts), *shape) if class_of(name) == "experts" else shape
        tensors.append(GgufTensor(name, stacked, types[class_of(name)]))
    return tensors


def make_gguf(
    path: Path,
    geometry: Geometry,
    types: GgufTypes | None = None,
    *,
    seed: int = 0,
    replay: Replay | None = None,
    vocabulary: Mapping[str, Value] | None = None,
) -> Path:
    """Write a file. ``vocabulary``: its metadata. Returns the file."""
    random = RandomTensors(seed)
    data_of = _planted_data(random, Planted(replay, geometry.hidden)) if replay else random.slices
    metadata = metadata_of(config_of(geometry)) | dict(vocabulary or {})
    write_gguf(path, metadata, gguf_tensors(geometry, types or GgufTypes()), data_of)
    return path


def _planted_data(random: RandomTensors, planted: Planted) -> Callable[[GgufTensor], Buffers]:
    def data_of(tensor: GgufTensor) -> Buffers:
        role, layer = role_of(tensor.name)
        if role == "embedding":
            return random.planted(tensor, planted.embedding, UNIT, is_random=True)
        if role == "head":
            return random.planted(tensor, planted.head, HEAD_UNIT, is_random=False)
        if role == "router":
            return [planted.router(layer).reshape(-1).data.cast("B")]
        if role == "output":
            return random.with_zero_rows(tensor, planted.num_dims)
        return random.slices(tensor)

    return data_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for name in ("experts", "attention", "head", "embedding"):
        parser.add_argument(f"--{name}-type", choices=RANDOM_TYPES, default="Q4_0")
    parser.add_argument("--seed", type=int, default=0)
    add_geometry(parser, "mixtral-8x7b")
    add_routing(parser)
    arguments = parser.parse_args()
    types = GgufTypes(arguments.experts_type, arguments.attention_type, arguments.head_type, arguments.embedding_type)
    geometry = geometry_of(arguments)
    replay = replay_of(arguments.routing, geometry, seed=arguments.seed)
    make_gguf(arguments.file, geometry, types, seed=arguments.seed, replay=replay)
    print(f"{arguments.file}: {geometry.num_parameters:,} parameters, {arguments.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
