"""Triton kernels over the packed layout (layout/packed.py), which they read in place. Imported only where Triton is.

A program takes one row block of a matrix: 16 rows. Its codes are loaded as tiles of words of 4 bytes, (vectors, 16
rows), each vector 64 contiguous bytes. Bits ``BITS * field + 8 * j`` and up of the words of vector v of a group are the
codes of column ``4 * (v + VECTORS * field) + j``. Of q3 that is the plane of the low bits, and BITS is 2; the high bit
comes from a tile of the other plane (HIGH is 1).

Float32 throughout, sums in a fixed order.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(16)
VECTOR_BYTES = tl.constexpr(64)

#: META: how scales and zeros are stored (layout/packed.py: f16, u8, e8m0).
F16, U8, E8M0 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load_meta(meta, group, row, inside, num_groups, META: tl.constexpr, ALL_BITS: tl.constexpr):
    """float32 scales and zeros of groups and rows; ``meta``: of one row block. E8M0 has no zeros."""
    if META == F16:
        halves = meta.to(tl.pointer_type(tl.float16)) + 2 * ROWS * group + row
        scale = tl.load(halves, inside, 0.0).to(tl.float32) * 0.00390625  # 2**-8
        zero = tl.load(halves + ROWS, inside, 0.0).to(tl.float32)
    elif META == U8:
        codes = meta + 2 * ROWS * group + row
        supers = (meta + 2 * ROWS * num_groups).to(tl.pointer_type(tl.float16)) + ROWS * (group // 16) + row
        shared = tl.load(supers, inside, 0.0).to(tl.float32)
        scale = tl.load(codes, inside, 0).to(tl.float32) * shared * 0.0000152587890625  # 2**-16
        zero = tl.load(codes + ROWS, inside, 0).to(tl.float32) * (2 ** (ALL_BITS - 7)) - 2 ** (ALL_BITS - 1)
    else:
        exponent = tl.load(meta + ROWS * group + row, inside, 0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True) * 0.5
        zero = tl.zeros_like(scale)
    return scale, zero


@triton.jit
def _load_words(codes, group, vector, row, inside, GROUP: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr):
    """int32 words of the (first) plane, and of q3's second one, shifted so that field 0 is its lowest bits."""
    group_words: tl.constexpr = 4 * GROUP * (BITS + HIGH) // 8
    at = codes.to(tl.pointer_type(tl.int32)) + group * group_words + row
    words = tl.load(at + vector * ROWS, inside, 0)
    high = words
    if HIGH:
        num_high: tl.constexpr = GROUP // 32
        high = tl.load(at + (2 * num_high + vector % num_high) * ROWS, inside, 0) >> (vector // num_high)
    return words, high


@triton.jit
def _decode(
    words, high, FIELD: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, IS_FP4: tl.constexpr
):
    """float32: codes, or of fp4 twice the values.

    Integers become floats by being written into a mantissa: many GPUs convert at an eighth of the rate of the rest.
    """
    at: tl.constexpr = (8 * J + BITS * FIELD) % 16
    if J >= 2:
        words, high = words >> 16, high >> 16
    if IS_FP4:
        code = words >> at
        magnitude = ((127 << 23) + ((code & 7) << 22)).to(tl.float32, bitcast=True)  # of codes from 2 on
        magnitude = tl.where((code & 7) == 0, 0.0, tl.where((code & 7) == 1, 1.0, magnitude))
        value = tl.where((code & 8) == 0, magnitude, -magnitude)
    else:
        code = words & (((1 << BITS) - 1) << at)
        if HIGH:
            code |= (high & (1 << at)) << BITS
        unit: tl.constexpr = 2 ** (23 - at)  # floats from here on count in steps of 2**-at
        value = (code | ((150 - at) << 23)).to(tl.float32, bitcast=True) - unit
    return value


@triton.jit
def _unpack(four, J: tl.constexpr, DTYPE: tl.constexpr):
    """float32 value J of four 16-bit floats that were loaded as one int64."""
    return (four >> (16 * J)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _matmul_block(
    own, x, x_rows, y, y_rows, start, count,
    matrix_at, bias_at, num_rows, num_columns, num_groups, code_bytes, block_bytes,
    GROUP: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, IS_FP4: tl.constexpr, META: tl.constexpr,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One row block of a matrix, for up to TOKENS pairs.

    64 vectors and tokens at a time: below the number of threads, so that a thread computes with the words that it
    loaded; else they would be exchanged through shared memory.
    """
    VECTORS: tl.constexpr = GROUP * BITS // 32
    TILE: tl.constexpr = 64 // TOKENS
    block = tl.program_id(0)
    pair = tl.arange(0, TOKENS)
    is_pair = pair < count
    x_row = x + tl.load(x_rows + start + pair, is_pair, 0) * num_columns
    x_quads = x_row.to(tl.pointer_type(tl.int64))[:, None]
    row = tl.arange(0, ROWS)[None, None, :]
    codes = own + matrix_at + block.to(tl.int64) * block_bytes
    total = tl.zeros([TOKENS, TILE, ROWS], tl.float32)
    for first in range(0, num_groups * VECTORS, TILE):
        k = first + tl.arange(0, TILE)
        group, vector, is_here = k // VECTORS, k % VECTORS, k < num_groups * VECTORS
        at_group, at_vector, inside = group[None, :, None], vector[None, :, None], is_here[None, :, None]
        words, high = _load_words(codes, at_group, at_vector, row, inside, GROUP, BITS, HIGH)
        products = tl.zeros([TOKENS, TILE, ROWS], tl.float32)
        sums = tl.zeros([TOKENS, TILE], tl.float32)
        for field in tl.static_range(8 // BITS):
            quad = group * (GROUP // 4) + vector + VECTORS * field
            four = tl.load(x_quads + quad[None, :], is_pair[:, None] & is_here[None, :], 0)
            for j in tl.static_range(4):
                value = _unpack(four, j, x.dtype.element_ty)
                products += value[:, :, None] * _decode(words, high, field, j, BITS, HIGH, IS_FP4)
                sums += value
        scale, zero = _load_meta(codes + code_bytes, at_group, row, inside, num_groups, META, BITS + HIGH)
        total += scale * (products - zero * sums[:, :, None])
    out = tl.sum(total, axis=1)
    rows = block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    if HAS_BIAS:
        out += tl.load((own + bias_at).to(tl.pointer_type(tl.float32)) + rows, is_row, 0.0)[None, :]
    y_row = y + tl.load(y_rows + start + pair, is_pair, 0) * num_rows
    tl.store(y_row[:, None] + rows[None, :], out.to(y.dtype.element_ty), is_pair[:, None] & is_row[None, :])


@triton.jit
def matmul_few(
    memory, offsets, starts, counts, x, x_rows, y, y_rows,
    matrix_at, bias_at, num_rows, num_columns, num_groups, code_bytes, block_bytes,
    GROUP: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, IS_FP4: tl.constexpr, META: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_SINGLE: tl.constexpr,
):  # fmt: skip
    """y[y_rows[p]] = W_m @ x[x_rows[p]] + b_m for ``counts[m]`` pairs p from ``starts[m]`` on; counts up to 8.

    W_m lies at ``offsets[m] + matrix_at`` of ``memory`` (uint8), b_m (float32 [R]) at ``offsets[m] + bias_at``, all
    multiples of 64. x [., C] of 16-bit floats, 8-byte aligned; y [., R]. Grid: (row blocks, matrices). IS_SINGLE: all
    counts are 1. What decides the order of a sum is its matrix's own count.
    """
    matrix = tl.program_id(1)
    start, count = tl.load(starts + matrix), tl.load(counts + matrix)
    own = memory + tl.multiple_of(tl.load(offsets + matrix), VECTOR_BYTES)
    if IS_SINGLE:
        _matmul_block(
            own, x, x_rows, y, y_rows, start, count,
            matrix_at, bias_at, num_rows, num_columns, num_groups, code_bytes, block_bytes,
            GROUP, BITS, HIGH, IS_FP4, META, HAS_BIAS, 1,
        )  # fmt: skip
    else:
        for log_tokens in tl.static_range(4):
            if (count <= (1 << log_tokens)) & (2 * count > (1 << log_tokens)):
                _matmul_block(
                    own, x, x_rows, y, y_rows, start, count,
                    matrix_at, bias_at, num_rows, num_columns, num_groups, code_bytes, block_bytes,
                    GROUP, BITS, HIGH, IS_FP4, META, HAS_BIAS, 1 << log_tokens,
                )  # fmt: skip


@triton.jit
def dequantize(
    packed, out, num_rows, num_columns, num_groups, code_bytes, block_bytes,
    GROUP: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, IS_FP4: tl.constexpr, META: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """out [R, C], the values of kernels/dequantize.py. Grid: (row blocks, tiles of TILE vectors)."""
    VECTORS: tl.constexpr = GROUP * BITS // 32
    block = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_here = (k < num_groups * VECTORS)[:, None]
    group, vector, row = (k // VECTORS)[:, None], (k % VECTORS)[:, None], tl.arange(0, ROWS)[None, :]
    codes = packed + block * block_bytes
    words, high = _load_words(codes, group, vector, row, is_here, GROUP, BITS, HIGH)
    scale, zero = _load_meta(codes + code_bytes, group, row, is_here, num_groups, META, BITS + HIGH)
    rows = block * ROWS + row
    inside = (is_here & (rows < num_rows))[:, :, None]
    for field in tl.static_range(8 // BITS):
        w0 = (_decode(words, high, field, 0, BITS, HIGH, IS_FP4) - zero) * scale
        w1 = (_decode(words, high, field, 1, BITS, HIGH, IS_FP4) - zero) * scale
        w2 = (_decode(words, high, field, 2, BITS, HIGH, IS_FP4) - zero) * scale
        w3 = (_decode(words, high, field, 3, BITS, HIGH, IS_FP4) - zero) * scale
        four = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILE, ROWS, 4])  # four columns side by side
        column = group * GROUP + 4 * (vector + VECTORS * field)
        at = (rows * num_columns + column)[:, :, None] + tl.arange(0, 4)[None, None, :]
        tl.store(out + at, four.to(out.dtype.element_ty), inside)
