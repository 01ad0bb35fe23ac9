"""Four-bit floats as MXFP4 has them: codes of encoding "fp4", and their scales (meta "e8m0").

A code is an E2M1 number: a sign bit, two of exponent, one of mantissa. Twice its value is a small integer, which
plus 12 is its *level*: so a code is to the kernels what any other is, after a look into a table of 16 bytes.

    w = double(code) * 2**(e - 128) = (level(code) - 12) * 2**(e - 128)

e is the group's scale as published (E8M0: one byte, no sign, no mantissa); e = 0 stands for a group of zeros.
The meta of one row block, R = 16 rows and G groups: 16 bytes e of group 0, then of group 1, ..., then zeros up to
a multiple of 64 bytes.
"""

from __future__ import annotations

import numpy as np

from moray.runtime.arrays import Bytes, Floats

GROUP = 32  # columns that share a scale in MXFP4
ZERO = 12
#: Twice the value of each code; code 8 is -0.
DOUBLES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)
LEVELS = tuple(int(ZERO + double) for double in DOUBLES)
MAX_EXPONENT = 254  # 255 is NaN

_ROWS = 16  # rows in a block


def meta_bytes(num_groups: int) -> int:
    """Bytes of the meta of one row block: a multiple of 64."""
    return -(-_ROWS * num_groups // 64) * 64


def check(codes_RC: Bytes, exponents_RG: Bytes) -> None:
    """Raises OverflowError if a scale is NaN, or is code 0 while its group is not all zeros."""
    if (exponents_RG > MAX_EXPONENT).any():
        raise OverflowError("a scale is NaN")
    rows, groups = exponents_RG.shape
    magnitudes = (codes_RC & 7).reshape(rows, groups, -1).max(axis=2, initial=0)
    if magnitudes[exponents_RG == 0].any():
        raise OverflowError("a scale is 2**-127, the smallest that can be kept is 2**-126")


def decode(exponents: Bytes) -> Floats:
    """2**(e - 128), and 0 for e = 0."""
    powers: Floats = (exponents.astype(np.uint32) << 23).view(np.float32)
    return powers * np.float32(0.5)


def pack_meta(exponents_RG: Bytes) -> Bytes:
    """The meta of every row block: uint8 [ceil(R / 16), meta_bytes]."""
    rows, groups = exponents_RG.shape
    blocks = -(-rows // _ROWS)
    padded = np.zeros((blocks * _ROWS, groups), dtype=np.uint8)
    padded[:rows] = exponents_RG
    meta = np.zeros((blocks, meta_bytes(groups)), dtype=np.uint8)
    meta[:, : _ROWS * groups] = padded.reshape(blocks, _ROWS, groups).transpose(0, 2, 1).reshape(blocks, -1)
    return meta


def unpack_meta(meta: Bytes, groups: int) -> Bytes:
    """uint8 e [16 * B, G] of uint8 [B, meta_bytes]: inverse of ``pack_meta``, with the rows that fill blocks."""
    codes = meta[:, : _ROWS * groups].reshape(-1, groups, _ROWS).transpose(0, 2, 1)
    return np.ascontiguousarray(codes.reshape(-1, groups))
