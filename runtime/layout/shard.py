"""The shard: one expert as one contiguous block of bytes.

    0        8 bytes   magic b"MORAYSH1"
    8        4 bytes   length of the header, little-endian
    12       4 bytes   zero
    16       header    msgpack: layer, expert, payload checksum, tensors
    ...      zeros up to the first tensor (a multiple of 64)
    ...      tensors, each at a multiple of 64
    ...      zeros up to a multiple of 4096

The header names every tensor and holds the xxh3-64 of all bytes after it, so that a shard can be checked
without its store. Offsets count from the start of the shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np
import xxhash

from moray.runtime.arrays import Bytes
from moray.runtime.errors import CorruptShardError
from moray.runtime.layout.packed import VECTOR_BYTES, PackedSpec

MAGIC = b"MORAYSH1"
ALIGNMENT = 4096
_PREFIX_BYTES = 16


class ExpertKey(NamedTuple):
    """One routed expert. ``layer`` counts the model's MoE layers from 0, not all its layers."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """A tensor inside a shard: a packed matrix, or (``spec`` None) a float32 vector of ``length``."""

    name: str
    offset: int
    spec: PackedSpec | None
    length: int = 0

    @property
    def num_bytes(self) -> int:
        return self.spec.num_bytes if self.spec else 4 * self.length


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where each tensor lies in the shards of a layer; the same for all experts of the layer."""

    tensors: tuple[ShardTensor, ...]
    num_bytes: int

    def __getitem__(self, name: str) -> ShardTensor:
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def get(self, name: str) -> ShardTensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    def validate(self) -> None:
        """Raises ValueError or TypeError unless its tensors lie one after the other inside a shard."""
        end = _PREFIX_BYTES
        for tensor in self.tensors:
            if not isinstance(tensor.name, str) or type(tensor.offset) is not int or type(tensor.length) is not int:
                raise TypeError(f"a tensor {tensor}")
            if tensor.offset < end or tensor.offset % VECTOR_BYTES or tensor.length < 0:
                raise ValueError(f"tensor {tensor.name!r:.80} at {tensor.offset}")
            end = tensor.offset + tensor.num_bytes
        if not self.tensors or type(self.num_bytes) is not int or end > self.num_bytes:
            raise ValueError(f"a shard of {self.num_bytes} bytes for tensors up to {end}")

    @property
    def header_end(self) -> int:
        return self.tensors[0].offset


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan_layout(tensors: Sequence[tuple[str, PackedSpec | int]]) -> ShardLayout:
    """Lay out tensors in the order given; an int stands for a float32 vector of that length."""
    # The header's length depends on the offsets it holds: reserve room for the largest integers.
    widest = [ShardTensor(n, 2**40, *_spec_or_length(s)) for n, s in tensors]
    probe = _encode_header(ExpertKey(2**31, 2**31), 2**64 - 1, widest)
    offset = round_up(_PREFIX_BYTES + len(probe), VECTOR_BYTES)
    placed = []
    for name, what in tensors:
        tensor = ShardTensor(name, offset, *_spec_or_length(what))
        placed.append(tensor)
        offset = round_up(offset + tensor.num_bytes, VECTOR_BYTES)
    return ShardLayout(tuple(placed), round_up(offset, ALIGNMENT))


def _spec_or_length(what: PackedSpec | int) -> tuple[PackedSpec | None, int]:
    return (None, what) if isinstance(what, int) else (what, 0)


def _encode_header(key: ExpertKey, checksum: int, tensors: Sequence[ShardTensor]) -> bytes:
    packed: bytes = msgpack.packb(
        {
            "layer": key.layer,
            "expert": key.expert,
            "xxh3": checksum,
            "tensors": [encode_tensor(t) for t in tensors],
        }
    )
    return packed


def encode_tensor(tensor: ShardTensor) -> dict[str, Any]:
    """A tensor as it stands in headers and manifests."""
    entry: dict[str, Any] = {"name": tensor.name, "offset": tensor.offset}
    return entry | (encode_spec(tensor.spec) if tensor.spec else {"length": tensor.length})


def decode_tensor(entry: Mapping[str, Any]) -> ShardTensor:
    if "length" in entry:
        return ShardTensor(entry["name"], entry["offset"], None, entry["length"])
    return ShardTensor(entry["name"], entry["offset"], decode_spec(entry))


def encode_spec(spec: PackedSpec) -> dict[str, Any]:
    """A spec as it stands in headers and manifests. ``meta`` is there only if it is not "f16"."""
    entry: dict[str, Any] = {
        "shape": [spec.rows, spec.columns],
        "encoding": spec.encoding,
        "bits": spec.bits,
        "group": spec.group,
    }
    return entry if spec.meta == "f16" else entry | {"meta": spec.meta}


def decode_spec(entry: Mapping[str, Any]) -> PackedSpec:
    """Inverse of ``encode_spec``. Raises ValueError for what this version does not know."""
    rows, columns = entry["shape"]
    if any(type(n) is not int for n in (rows, columns, entry["group"])):
        raise ValueError(f"a packed matrix of {entry['shape']} in groups of {entry['group']}")
    return PackedSpec(rows, columns, entry["encoding"], entry["group"], entry.get("meta", "f16"))


def build_shard(key: ExpertKey, layout: ShardLayout, tensors: Mapping[str, Bytes]) -> Bytes:
    """Assemble a shard. ``tensors`` maps every name of the layout to its packed bytes."""
    shard = np.zeros(layout.num_bytes, dtype=np.uint8)
    for tensor in layout.tensors:
        data = tensors[tensor.name]
        assert data.nbytes == tensor.num_bytes, (tensor, data.nbytes)
        shard[tensor.offset : tensor.offset + tensor.num_bytes] = data.view(np.uint8).reshape(-1)
    checksum = xxhash.xxh3_64_intdigest(shard[layout.header_end :].data)
    header = _encode_header(key, checksum, layout.tensors)
    prefix = MAGIC + len(header).to_bytes(4, "little") + bytes(4) + header
    shard[: len(prefix)] = np.frombuffer(prefix, dtype=np.uint8)
    return shard


def read_header(shard: Bytes) -> tuple[ExpertKey, ShardLayout]:
    """Read and check a shard by itself. Raises CorruptShardError."""
    if shard.nbytes < _PREFIX_BYTES or shard[:8].tobytes() != MAGIC:
        raise CorruptShardError("not a shard: its first bytes are not MORAYSH1")
    length = int.from_bytes(shard[8:12].tobytes(), "little")
    try:
        header = msgpack.unpackb(shard[_PREFIX_BYTES : _PREFIX_BYTES + length].tobytes())
        layout = ShardLayout(tuple(decode_tensor(entry) for entry in header["tensors"]), shard.nbytes)
        key, checksum = ExpertKey(header["layer"], header["expert"]), header["xxh3"]
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise CorruptShardError(f"a shard's header cannot be read ({error})") from error
    if xxhash.xxh3_64_intdigest(shard[layout.header_end :].data) != checksum:
        raise CorruptShardError(f"expert {tuple(key)}: the shard's checksum does not match its bytes")
    return key, layout
