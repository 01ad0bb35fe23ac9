"""Rows of a packed matrix as float32, one code after the other: an embedding's lookup on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from moray.runtime.arrays import Bytes, Floats, Ints
from moray.runtime.kernels.setup import FLOATS, entry
from moray.runtime.kernels.vectors import F32, I32
from moray.runtime.layout import fp4, second_level
from moray.runtime.layout.packed import METAS, PLANES, SCALE_FACTOR, PackedSpec

_HALF_TO_FLOAT = np.float32(2.0**112)  # moves float16's exponent field to float32's place
_SECOND_LEVEL, _POWERS = METAS.index("u8"), METAS.index("e8m0")
_DOUBLES = np.array(fp4.DOUBLES, dtype=np.float32)
_SCALE_FACTOR, _SUPER_FACTOR = np.float32(SCALE_FACTOR), np.float32(second_level.SUPER_FACTOR)


@intrinsic
def _float_of(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return types.float32(types.int64), codegen


@njit(nogil=True, cache=True)
def _half(data, at):
    bits = np.int64(data[at]) | np.int64(data[at + 1]) << 8
    value = _float_of((bits & 0x7FFF) << 13) * _HALF_TO_FLOAT
    return -value if bits & 0x8000 else value


@njit(nogil=True, cache=True)
def _plain_row(block, lane, columns, is_half, width, out):
    """``width`` bytes a column: 4 (float32) or 2 (bfloat16, or float16)."""
    per_lane = 4 // width
    for c in range(columns):
        at = c // per_lane * 64 + 4 * lane + c % per_lane * width
        if width == 4:
            word = np.int64(0)
            for k in range(4):
                word |= np.int64(block[at + k]) << (8 * k)
            out[c] = _float_of(word)
        elif is_half:
            out[c] = _half(block, at)
        else:
            out[c] = _float_of((np.int64(block[at]) | np.int64(block[at + 1]) << 8) << 16)


@njit(nogil=True, cache=True)
def _quantized_row(block, lane, columns, group, planes, code_bytes, meta, step, lowest, out):
    num_groups, bits = columns // group, planes.sum()
    codes = np.empty(group, np.int64)
    for g in range(num_groups):
        if meta == _SECOND_LEVEL:
            at = code_bytes + 32 * g
            unit = _half(block, code_bytes + 32 * num_groups + 32 * (g // 16) + 2 * lane) * _SUPER_FACTOR
            scale = np.float32(block[at + lane]) * unit
            zero = np.float32(block[at + 16 + lane]) * step + lowest
        elif meta == _POWERS:
            scale = _float_of(np.int64(block[code_bytes + 16 * g + lane]) << 23) * np.float32(0.5)
            zero = np.float32(0)
        else:
            at = code_bytes + 64 * g
            scale, zero = _half(block, at + 2 * lane) * _SCALE_FACTOR, _half(block, at + 32 + 2 * lane)
        codes[:] = 0
        shift, first = 0, 2 * group * bits * g
        for b in planes:
            vectors, mask = group * b // 32, (1 << b) - 1
            for part in range(8 // b):
                for i in range(vectors):
                    for k in range(4):
                        byte = np.int64(block[first + 64 * i + 4 * lane + k])
                        codes[4 * (part * vectors + i) + k] |= ((byte >> (b * part)) & mask) << shift
            first, shift = first + 64 * vectors, shift + b
        for c in range(group):
            value = _DOUBLES[codes[c]] if meta == _POWERS else np.float32(codes[c]) - zero
            out[g * group + c] = value * scale


@entry(
    "rows planes",
    packed=types.uint8[:, ::1], is_half=types.boolean, step=types.float32, lowest=types.float32, out=FLOATS,
)  # fmt: skip
def _lookup(packed, rows, columns, is_half, width, group, planes, code_bytes, meta, step, lowest, out):
    for i in range(rows.shape[0]):
        block, lane = packed[rows[i] // 16], rows[i] % 16
        if group:
            _quantized_row(block, lane, columns, group, planes, code_bytes, meta, step, lowest, out[i])
        else:
            _plain_row(block, lane, columns, is_half, width, out[i])


def lookup(packed: Bytes, spec: PackedSpec, rows: Ints) -> Floats:
    """Rows int64 [N] of a packed matrix -> float32 [N, C], the values that reference.py's ``dequantize`` gives."""
    out = np.empty((len(rows), spec.columns), dtype=np.float32)
    planes = np.array(PLANES.get(spec.encoding, ()), dtype=np.int64)
    is_half, width = spec.encoding == "f16", 4 if spec.encoding == "f32" else 2
    step, lowest = (np.float32(f(spec.bits)) for f in (second_level.zero_step, second_level.lowest_zero))
    _lookup(
        packed.reshape(spec.num_blocks, spec.block_bytes), rows, spec.columns, is_half, width, spec.group, planes,
        spec.code_bytes, METAS.index(spec.meta), step, lowest, out,
    )  # fmt: skip
    return out
