"""The packed layout: how one weight matrix lies in memory, for every kernel on every device.

A matrix [R, C] is cut into row blocks of 16. Everything is made of 64-byte vectors of 16 lanes
of 4 bytes; lane r belongs to row r of the block. What the 4 bytes hold depends on the encoding:

    f32         1 column          vector j: column j
    bf16, f16   2 columns         vector j: columns 2j, 2j+1 (an odd C is padded with one zero column)
    q8          4 columns         vector j: columns 4j..4j+3, one unsigned code a byte
    q4, q2, q3  as q8, but each byte holds several codes, in planes (below)
    fp4         as q4, each code a four-bit float (fp4.py)

Quantized rows are cut into groups of ``group`` columns. The codes of one group in one row block take
``16 * group * bits / 8`` bytes, a multiple of 64. A *plane* of b bits holds
8/b fields a byte and V = group*b/32 vectors a group: quad c (columns 4c..4c+3 of the group) lies in
vector c % V, at bit b * (c // V) of each byte. q4 is one plane of 4 bits and q2 one of 2; q3 is a
plane of 2 bits (the low ones) followed by a plane of 1 bit (the high one).

After the codes of all its groups a row block holds one *meta* vector a group: 16 scales, then
16 zeros, both float16. The value of a code q is

    w = (q - zero) * scale * 2**-8

The constant 2**-8 keeps the scales of small weights out of float16's subnormal range.
That is meta "f16". With meta "u8" (q4, q3 and q2) scales and zeros are 8-bit codes: second_level.py. fp4 has meta
"e8m0", powers of two: fp4.py.
Rows that do not fill the last block are stored as zero codes with zero scales.
docs/format.md has the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from moray.runtime.arrays import Bytes, Floats
from moray.runtime.layout import fp4, second_level

Encoding = Literal["f32", "bf16", "f16", "q8", "q4", "q3", "q2", "fp4"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

#: How scales and zeros are stored: as float16, as 8-bit codes with super-scales (second_level.py), or (fp4) as
#: powers of two without zeros.
Meta = Literal["f16", "u8", "e8m0"]
METAS: tuple[Meta, ...] = get_args(Meta)

#: Numerics classes of the CPU kernels (docs/format.md).
Numerics = Literal["int8", "float"]

LAYOUT_ID = "rows16-v1"
ROWS = 16  # rows in a block
VECTOR_BYTES = 64  # 16 lanes of 4 bytes
SCALE_FACTOR = 2.0**-8

_BITS: dict[Encoding, int] = {"f32": 32, "bf16": 16, "f16": 16, "q8": 8, "q4": 4, "q3": 3, "q2": 2, "fp4": 4}
PLANES: dict[Encoding, tuple[int, ...]] = {"q8": (8,), "q4": (4,), "q3": (2, 1), "q2": (2,), "fp4": (4,)}
SECOND_LEVEL_ENCODINGS: tuple[Encoding, ...] = ("q4", "q3", "q2")


@dataclass(frozen=True, slots=True)
class PackedSpec:
    """Shape and encoding of one packed matrix.

    ``group`` is the number of columns that share a scale and a zero; 0 for f32, bf16 and f16.
    ``meta`` says how these are stored; "u8" for q4, q3 and q2 only, "e8m0" for fp4 and for nothing else.
    """

    rows: int
    columns: int
    encoding: Encoding
    group: int = 0
    meta: Meta = "f16"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a packed matrix needs rows and columns, got {self.rows} x {self.columns}")
        if self.encoding not in ENCODINGS:
            raise ValueError(f"unknown encoding {self.encoding!r}, expected one of {', '.join(ENCODINGS)}")
        if self.is_quantized and not is_legal_group(self.group, self.columns, self.bits):
            raise ValueError(f"group {self.group} is not legal for {self.columns} columns of {self.encoding}")
        if not self.is_quantized and self.group != 0:
            raise ValueError(f"{self.encoding} has no groups, got group {self.group}")
        if self.meta not in METAS:
            raise ValueError(f"unknown meta {self.meta!r}, expected one of {', '.join(METAS)}")
        if self.meta == "u8" and self.encoding not in SECOND_LEVEL_ENCODINGS:
            raise ValueError(f"{self.encoding} has no second-level scales (meta u8)")
        if (self.encoding == "fp4") != (self.meta == "e8m0"):
            raise ValueError(f"fp4 goes with meta e8m0 only, got {self.encoding} with meta {self.meta}")

    @property
    def bits(self) -> int:
        return _BITS[self.encoding]

    @property
    def is_quantized(self) -> bool:
        return self.encoding in PLANES

    @property
    def num_blocks(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def num_groups(self) -> int:
        """Groups in a row; 0 if not quantized."""
        return self.columns // self.group if self.group else 0

    @property
    def code_bytes(self) -> int:
        """Bytes of codes in one row block."""
        if self.is_quantized:
            return ROWS * self.columns * self.bits // 8
        columns_per_lane = 32 // self.bits
        return -(-self.columns // columns_per_lane) * VECTOR_BYTES

    @property
    def meta_bytes(self) -> int:
        """Bytes of scales and zeros in one row block, a multiple of 64; 0 if not quantized."""
        if self.meta == "u8":
            return second_level.meta_bytes(self.num_groups)
        if self.meta == "e8m0":
            return fp4.meta_bytes(self.num_groups)
        return self.num_groups * VECTOR_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes of one row block: codes, then meta."""
        return self.code_bytes + self.meta_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class Quantized:
    """Codes and grid of one matrix, before packing: w = (codes - zeros) * scales.

    codes: uint8 [R, C]; scales, zeros: float32 [R, C / group], ``scales`` without the 2**8 factor. Of fp4: levels.
    """

    codes: Bytes
    scales: Floats
    zeros: Floats


def is_legal_group(group: int, columns: int, bits: int) -> bool:
    """Whether groups of this size divide the row and fill whole 64-byte vectors."""
    return group >= 16 and columns % group == 0 and (ROWS * group * bits // 8) % VECTOR_BYTES == 0


def choose_group(wanted: int, columns: int, bits: int) -> int:
    """The largest legal group not above ``wanted``; 0 if there is none (keep the matrix in 16 bits)."""
    for group in range(min(wanted, columns), 15, -1):
        if is_legal_group(group, columns, bits):
            return group
    return 0


# ---------------------------------------------------------------------------------------- plain


def pack_plain(matrix: npt.NDArray[np.generic], spec: PackedSpec) -> Bytes:
    """Pack [R, C] of 16-bit (as uint16 or float16) or float32 values. Returns uint8 [num_bytes]."""
    width = spec.bits // 8
    assert matrix.shape == (spec.rows, spec.columns) and matrix.itemsize == width
    per_lane = 4 // width
    vectors = -(-spec.columns // per_lane)
    padded = np.zeros((spec.num_blocks * ROWS, vectors * per_lane), dtype=f"u{width}")
    padded[: spec.rows, : spec.columns] = np.ascontiguousarray(matrix).view(padded.dtype)
    lanes = padded.reshape(spec.num_blocks, ROWS, vectors, per_lane).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(lanes).reshape(-1).view(np.uint8)


def unpack_plain(packed: Bytes, spec: PackedSpec) -> npt.NDArray[np.generic]:
    """Inverse of ``pack_plain``: uint16 (bf16), float16 or float32 of [R, C]."""
    width = spec.bits // 8
    per_lane = 4 // width
    lanes = packed.view(f"u{width}").reshape(spec.num_blocks, -1, ROWS, per_lane).transpose(0, 2, 1, 3)
    matrix = np.ascontiguousarray(lanes.reshape(spec.num_blocks * ROWS, -1)[: spec.rows, : spec.columns])
    views = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}
    return matrix.view(views[spec.encoding])


# ------------------------------------------------------------------------------------ quantized


def pack_quantized(quantized: Quantized, spec: PackedSpec) -> Bytes:
    """Pack codes, scales and zeros. Returns uint8 [num_bytes].

    Raises OverflowError if a scale does not fit float16 (weights of a range above ~3800 at 4 bits), or, with
    meta "u8", if scales and zeros are not exactly ones that it can hold (convert/quantize.py makes them so).
    """
    return _pack_blocks(quantized.codes, _pack_meta(quantized, spec), spec)


def pack_fp4(codes_RC: Bytes, exponents_RG: Bytes, spec: PackedSpec) -> Bytes:
    """Pack the codes and scales of MXFP4 as they are. Returns uint8 [num_bytes]. Raises OverflowError (fp4.check)."""
    fp4.check(codes_RC, exponents_RG)
    return _pack_blocks(codes_RC, fp4.pack_meta(exponents_RG), spec)


def unpack_fp4(packed: Bytes, spec: PackedSpec) -> tuple[Bytes, Bytes]:
    """Inverse of ``pack_fp4``."""
    meta = packed.reshape(spec.num_blocks, spec.block_bytes)[:, spec.code_bytes :]
    return _unpack_codes(packed, spec), fp4.unpack_meta(meta, spec.num_groups)[: spec.rows]


def _pack_blocks(codes_RC: Bytes, meta: Bytes, spec: PackedSpec) -> Bytes:
    assert codes_RC.shape == (spec.rows, spec.columns)
    blocks, groups = spec.num_blocks, spec.num_groups
    codes = np.zeros((blocks * ROWS, spec.columns), dtype=np.uint8)
    codes[: spec.rows] = codes_RC
    quads = spec.group // 4
    # [block, row, group, quad, 4] -> [block, group, quad, row, 4]: one quad is one 64-byte vector of codes
    vectors = codes.reshape(blocks, ROWS, groups, quads, 4).transpose(0, 2, 3, 1, 4)
    out = np.empty((blocks, spec.block_bytes), dtype=np.uint8)
    out[:, : spec.code_bytes] = _pack_planes(vectors, spec).reshape(blocks, spec.code_bytes)
    out[:, spec.code_bytes :] = meta.reshape(blocks, -1)
    return out.reshape(-1)


def unpack_quantized(packed: Bytes, spec: PackedSpec) -> Quantized:
    """Inverse of ``pack_quantized``, up to the float16 rounding of scales and zeros with meta "f16".

    Of fp4 the levels, which are the same for 0 and -0.
    """
    codes = _unpack_codes(packed, spec)
    scales, zeros = _unpack_meta(packed.reshape(spec.num_blocks, spec.block_bytes)[:, spec.code_bytes :], spec)
    if spec.encoding == "fp4":
        codes = np.array(fp4.LEVELS, dtype=np.uint8)[codes]
    return Quantized(codes, scales[: spec.rows], zeros[: spec.rows])


def _unpack_codes(packed: Bytes, spec: PackedSpec) -> Bytes:
    """uint8 [R, C]."""
    blocks, groups = spec.num_blocks, spec.num_groups
    data = packed.reshape(blocks, spec.block_bytes)
    vectors = _unpack_planes(data[:, : spec.code_bytes].reshape(blocks, groups, -1, ROWS, 4), spec)
    codes = vectors.transpose(0, 3, 1, 2, 4).reshape(blocks * ROWS, spec.columns)[: spec.rows]
    return np.ascontiguousarray(codes)


def _pack_planes(vectors: Bytes, spec: PackedSpec) -> Bytes:
    """[block, group, quad, 16, 4] codes -> [block, group, vectors, 16, 4] packed bytes."""
    blocks, groups, quads = vectors.shape[:3]
    planes = []
    shift = 0
    for bits in PLANES[spec.encoding]:
        fields = 8 // bits
        part = (vectors >> shift) & ((1 << bits) - 1)
        part = part.reshape(blocks, groups, fields, quads // fields, ROWS, 4)
        shifts = (bits * np.arange(fields, dtype=np.uint8)).reshape(1, 1, fields, 1, 1, 1)
        planes.append(np.bitwise_or.reduce(part << shifts, axis=2))
        shift += bits
    return np.concatenate(planes, axis=2)


def _unpack_planes(packed: Bytes, spec: PackedSpec) -> Bytes:
    """Inverse of ``_pack_planes``."""
    blocks, groups = packed.shape[:2]
    codes = np.zeros((blocks, groups, spec.group // 4, ROWS, 4), dtype=np.uint8)
    first, shift = 0, 0
    for bits in PLANES[spec.encoding]:
        fields, count = 8 // bits, spec.group * bits // 32
        plane = packed[:, :, None, first : first + count]
        shifts = (bits * np.arange(fields, dtype=np.uint8)).reshape(1, 1, fields, 1, 1, 1)
        part = (plane >> shifts) & ((1 << bits) - 1)
        codes |= part.reshape(codes.shape) << shift
        first, shift = first + count, shift + bits
    return codes


def _unpack_meta(data: Bytes, spec: PackedSpec) -> tuple[Floats, Floats]:
    """uint8 [block, meta_bytes] -> float32 scales and zeros [block * 16, G]."""
    if spec.meta == "u8":
        return second_level.unpack(data, spec.num_groups, spec.bits)
    if spec.meta == "e8m0":
        powers = fp4.decode(fp4.unpack_meta(data, spec.num_groups))
        return powers, np.full_like(powers, fp4.ZERO)
    halves = np.ascontiguousarray(data).view(np.float16).reshape(-1, spec.num_groups, 2, ROWS)
    scales, zeros = halves.transpose(2, 0, 3, 1).reshape(2, -1, spec.num_groups).astype(np.float32)
    return scales * np.float32(SCALE_FACTOR), zeros


def _pack_meta(quantized: Quantized, spec: PackedSpec) -> Bytes:
    if spec.meta == "u8":
        return second_level.pack(quantized.scales, quantized.zeros, spec.bits)
    assert spec.meta == "f16", "pack_fp4 packs fp4"
    meta = np.zeros((2, spec.num_blocks * ROWS, spec.num_groups), dtype=np.float16)
    with np.errstate(over="ignore"):
        meta[0, : spec.rows] = quantized.scales / np.float32(SCALE_FACTOR)
        meta[1, : spec.rows] = quantized.zeros
    if not np.isfinite(meta).all():
        raise OverflowError("a scale or zero does not fit float16")
    # [2, block*16, group] -> [block, group, 2, 16]
    lanes = meta.reshape(2, spec.num_blocks, ROWS, spec.num_groups).transpose(1, 3, 0, 2)
    return np.ascontiguousarray(lanes).view(np.uint8)
