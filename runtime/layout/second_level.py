"""Second-level scales: 8-bit codes of a quantized matrix's scales and zeros (meta "u8" of the packed layout).

In each row, a scale is an 8-bit code times a *super-scale*, a float16 that 16 consecutive groups share; a zero is
an 8-bit code on a grid that depends on the bits only:

    scale = scale_code * super * 2**-16                     0, or up to 254.9
    zero  = zero_code * 2**(bits - 7) - 2**(bits - 1)       256 steps from -2**(bits - 1) to below 1.5 * 2**bits

Both are exact in float32. The meta of one row block, R = 16 rows and G groups:

    16 scale codes, 16 zero codes       of group 0, then of group 1, ..., then of group G - 1
    16 super-scales (float16)           of groups 0..15, then of groups 16..31, ...
    zeros up to a multiple of 64 bytes
"""

from __future__ import annotations

import numpy as np

from moray.runtime.arrays import Bools, Bytes, Doubles, Floats, Halves

GROUPS = 16  # groups of a row that share a super-scale
MAX_CODE = 255
SUPER_FACTOR = 2.0**-16

_ROWS = 16  # rows in a block
_GROUP_BYTES = 2 * _ROWS  # of one group in one row block: scale codes, zero codes
_SUPER_BYTES = 2 * _ROWS  # of one super vector


def num_supers(num_groups: int) -> int:
    """Super-scales in a row."""
    return -(-num_groups // GROUPS)


def meta_bytes(num_groups: int) -> int:
    """Bytes of the meta of one row block: a multiple of 64."""
    return -(-(_GROUP_BYTES * num_groups + _SUPER_BYTES * num_supers(num_groups)) // 64) * 64


def zero_step(bits: int) -> float:
    """Distance between two zeros that can be stored."""
    return 2.0 ** (bits - 7)


def lowest_zero(bits: int) -> float:
    """The zero of code 0."""
    return -(2.0 ** (bits - 1))


def highest_zero(bits: int) -> float:
    """The zero of code 255."""
    return lowest_zero(bits) + MAX_CODE * zero_step(bits)


def encode(scales_RG: Floats, zeros_RG: Floats, bits: int) -> tuple[Bytes, Bytes, Halves]:
    """Scale codes [R, G], zero codes [R, G] and super-scales [R, ceil(G / 16)] that stand for exactly these values.

    Raises OverflowError if there are none.
    """
    zero_codes = (zeros_RG.astype(np.float64) - lowest_zero(bits)) / zero_step(bits)
    if not _are_codes(zero_codes).all():
        raise OverflowError("a zero is not one of the 256 that second-level scales have")
    if not np.isfinite(scales_RG).all():
        raise OverflowError("a scale does not fit second-level scales")
    rows, groups = scales_RG.shape
    padded = np.zeros((rows, num_supers(groups) * GROUPS))
    padded[:, :groups] = scales_RG
    units = _find_units(padded.reshape(-1, GROUPS))
    scale_codes = _codes_in(padded.reshape(-1, GROUPS), units).astype(np.uint8).reshape(rows, -1)[:, :groups]
    supers = (units / SUPER_FACTOR).astype(np.float16).reshape(rows, -1)
    return np.ascontiguousarray(scale_codes), zero_codes.astype(np.uint8), supers


def decode(scale_codes_RG: Bytes, zero_codes_RG: Bytes, supers_RS: Halves, bits: int) -> tuple[Floats, Floats]:
    """Scales and zeros [R, G]: inverse of ``encode``."""
    units = np.repeat(supers_RS.astype(np.float32), GROUPS, axis=1)[:, : scale_codes_RG.shape[1]]
    scales = scale_codes_RG * units * np.float32(SUPER_FACTOR)
    zeros = zero_codes_RG * np.float32(zero_step(bits)) + np.float32(lowest_zero(bits))
    return scales, zeros


def pack(scales_RG: Floats, zeros_RG: Floats, bits: int) -> Bytes:
    """The meta of every row block: uint8 [ceil(R / 16), meta_bytes]. Raises OverflowError as ``encode`` does."""
    rows, groups = scales_RG.shape
    blocks = -(-rows // _ROWS)
    scale_codes, zero_codes, supers = encode(scales_RG, zeros_RG, bits)
    codes = np.zeros((2, blocks * _ROWS, groups), dtype=np.uint8)
    codes[0, :rows], codes[1, :rows] = scale_codes, zero_codes
    shared = np.zeros((blocks * _ROWS, supers.shape[1]), dtype=np.float16)
    shared[:rows] = supers
    meta = np.zeros((blocks, meta_bytes(groups)), dtype=np.uint8)
    end = _GROUP_BYTES * groups
    meta[:, :end] = codes.reshape(2, blocks, _ROWS, groups).transpose(1, 3, 0, 2).reshape(blocks, -1)
    vectors = np.ascontiguousarray(shared.reshape(blocks, _ROWS, -1).transpose(0, 2, 1)).reshape(blocks, -1)
    meta[:, end : end + 2 * vectors.shape[1]] = vectors.view(np.uint8)
    return meta


def unpack(meta: Bytes, groups: int, bits: int) -> tuple[Floats, Floats]:
    """Scales and zeros [16 * B, G] of uint8 [B, meta_bytes]: inverse of ``pack``, with the rows that fill blocks."""
    blocks, end = len(meta), _GROUP_BYTES * groups
    codes = meta[:, :end].reshape(blocks, groups, 2, _ROWS).transpose(2, 0, 3, 1).reshape(2, -1, groups)
    vectors = np.ascontiguousarray(meta[:, end : end + _SUPER_BYTES * num_supers(groups)]).view(np.float16)
    supers = vectors.reshape(blocks, -1, _ROWS).transpose(0, 2, 1).reshape(blocks * _ROWS, -1)
    return decode(codes[0], codes[1], supers, bits)


def _find_units(scales_NG: Doubles) -> Doubles:
    """[N] of super-scale * 2**-16 in which each row of [N, 16] scales is whole codes; the smallest that works."""
    largest = scales_NG.max(axis=1)
    units = np.zeros(len(scales_NG))
    left = np.flatnonzero(largest != 0)
    for code in range(MAX_CODE, 0, -1):  # the largest scale has code 255 unless its super-scale is subnormal
        if not left.size:
            return units
        unit = largest[left] / code
        fits = _is_half(unit / SUPER_FACTOR) & _are_codes(_codes_in(scales_NG[left], unit)).all(axis=1)
        units[left[fits]] = unit[fits]
        left = left[~fits]
    if left.size:
        raise OverflowError("a scale does not fit second-level scales")
    return units


def _codes_in(scales_NG: Doubles, units_N: Doubles) -> Doubles:
    return scales_NG / np.where(units_N == 0, 1, units_N)[:, None]


def _are_codes(values: Doubles) -> Bools:
    codes: Bools = (values >= 0) & (values <= MAX_CODE) & (values == np.rint(values))
    return codes


def _is_half(values: Doubles) -> Bools:
    """Whether float16 holds each exactly; NaN and infinity do not count."""
    with np.errstate(over="ignore", invalid="ignore"):
        halves: Bools = np.isfinite(values) & (values.astype(np.float16) == values)
    return halves
