"""Matrix products over the packed layout, on the CPU.

Shapes: T tokens; P (token, expert) pairs sorted by expert; C columns (inputs), R rows (outputs), G groups a row.
``grouped_matmul`` computes y_PR = x_PC @ W_e^T for every expert e over its own range of pairs, all experts in one
launch. Row blocks are the outer loop, so threads get equal shares of every expert whatever its token count.

Strict floating point everywhere (never fastmath): each output is one chain of operations in a fixed order that
depends neither on the thread count, nor on the batch, nor on the instruction set. reference.py states it in NumPy.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from moray.runtime.kernels.simd import (
    add_bf16_tile,
    add_f16_tile,
    add_f32_tile,
    add_group_tile,
    add_quad_tile,
    bits_of,
    load_codes,
    load_scales,
    load_zeros,
    store_tile,
    with_high_bit,
    zero_dots,
    zero_sums,
)

TILE = 4  # tokens that share one unpacking of the weights
MASK4, MASK2, MASK1 = np.int32(0x0F0F0F0F), np.int32(0x03030303), np.int32(0x01010101)

# A product below both is done by the calling thread: waking the others takes longer than the product itself.
SERIAL_BYTES = 192 << 10
SERIAL_PRODUCTS = 1 << 20

# Encodings as the kernels know them: bits, and f16 apart from bf16.
F32, BF16, F16, Q8, Q4, Q3, Q2 = 32, 16, 17, 8, 4, 3, 2
ENCODING_CODES = {"f32": F32, "bf16": BF16, "f16": F16, "q8": Q8, "q4": Q4, "q3": Q3, "q2": Q2}


@njit(nogil=True, cache=True, forceinline=True)
def _add_group(acc, encoding, codes, group, scale, zero, x, ldx):
    """Add one group of columns to a tile; which arithmetic depends on the tile's type (add_quad_tile)."""
    quads = group // 4
    if encoding == Q8:
        for j in range(quads):
            acc = add_quad_tile(acc, load_codes(codes + 64 * j), scale, zero, x, j, ldx)
    elif encoding == Q4:
        half = quads // 2
        for j in range(half):
            v = load_codes(codes + 64 * j)
            acc = add_quad_tile(acc, bits_of(v, np.int32(0), MASK4), scale, zero, x, j, ldx)
            acc = add_quad_tile(acc, bits_of(v, np.int32(4), MASK4), scale, zero, x, half + j, ldx)
    elif encoding == Q2:
        quarter = quads // 4
        for j in range(quarter):
            v = load_codes(codes + 64 * j)
            for f in range(4):
                code = bits_of(v, np.int32(2 * f), MASK2)
                acc = add_quad_tile(acc, code, scale, zero, x, f * quarter + j, ldx)
    else:
        eighth = quads // 8
        for j in range(eighth):
            even, odd = load_codes(codes + 64 * j), load_codes(codes + 64 * (eighth + j))
            high = load_codes(codes + 64 * (2 * eighth + j))
            for f in range(4):
                low = np.int32(2 * f)
                code = with_high_bit(bits_of(even, low, MASK2), bits_of(high, low, MASK1))
                acc = add_quad_tile(acc, code, scale, zero, x, 2 * f * eighth + j, ldx)
                code = with_high_bit(bits_of(odd, low, MASK2), bits_of(high, np.int32(2 * f + 1), MASK1))
                acc = add_quad_tile(acc, code, scale, zero, x, (2 * f + 1) * eighth + j, ldx)
    return acc


@njit(nogil=True, cache=True, forceinline=True)
def _block_int8(sums, no_dots, encoding, block, columns, group, xq, xs, xsum):
    """One row block for a tile of tokens, class int8. xq int8 [., C], xs float32 and xsum int32 [., G]."""
    num_groups = columns // group
    group_bytes = 2 * group * encoding  # the code of a quantized encoding is its bits
    meta = block + num_groups * group_bytes
    for g in range(num_groups):
        scale, zero = load_scales(meta + 64 * g), load_zeros(meta + 64 * g + 32)
        dots = _add_group(no_dots, encoding, block + g * group_bytes, group, scale, zero, xq + g * group, columns)
        sums = add_group_tile(sums, dots, scale, zero, xs + 4 * g, xsum + 4 * g, 4 * num_groups)
    return sums


@njit(nogil=True, cache=True, forceinline=True)
def _block_float(sums, encoding, block, columns, group, x):
    """One row block for a tile of tokens with float32 activations x [., C]."""
    ldx = 4 * columns
    if encoding <= Q8:
        num_groups = columns // group
        group_bytes = 2 * group * encoding
        meta = block + num_groups * group_bytes
        for g in range(num_groups):
            scale, zero = load_scales(meta + 64 * g), load_zeros(meta + 64 * g + 32)
            sums = _add_group(sums, encoding, block + g * group_bytes, group, scale, zero, x + 4 * g * group, ldx)
    elif encoding == F32:
        for j in range(columns):
            sums = add_f32_tile(sums, load_codes(block + 64 * j), x + 4 * j, ldx)
    elif encoding == BF16:
        for j in range(columns // 2):
            sums = add_bf16_tile(sums, load_codes(block + 64 * j), x + 8 * j, ldx)
    else:
        for j in range(columns // 2):
            sums = add_f16_tile(sums, load_codes(block + 64 * j), x + 8 * j, ldx)
    return sums


@njit(nogil=True, cache=True)
def _block_pairs(integer, encoding, block, block_rows, columns, group, first, last, x, xq, xs, xsum, y, ldy):
    """One row block for pairs first..last of its expert: tiles of TILE, then single tokens."""
    num_groups = columns // group if group else 0
    p = first
    while p < last:
        xf, xi, xg, xn = (
            x + 4 * p * columns,
            xq + p * columns,
            xs + 4 * p * num_groups,
            xsum + 4 * p * num_groups,
        )
        if p + TILE <= last:
            if integer:
                sums = _block_int8(zero_sums(4), zero_dots(4), encoding, block, columns, group, xi, xg, xn)
            else:
                sums = _block_float(zero_sums(4), encoding, block, columns, group, xf)
            store_tile(sums, y + p * ldy, ldy, block_rows)
            p += TILE
        else:
            if integer:
                one = _block_int8(zero_sums(1), zero_dots(1), encoding, block, columns, group, xi, xg, xn)
            else:
                one = _block_float(zero_sums(1), encoding, block, columns, group, xf)
            store_tile(one, y + p * ldy, ldy, block_rows)
            p += 1


@njit(nogil=True, cache=True)
def _matmul_items(first_item, last_item, integer, encoding, group, rows, columns, block_bytes, weights, starts,
                  x, xq, xs, xsum, y):  # fmt: skip
    """Items first..last of a product; item i is row block i // E of expert i % E. Activations and y by address."""
    num_experts = weights.shape[0]
    for item in range(first_item, last_item):
        b = item // num_experts
        e = item - b * num_experts
        _block_pairs(
            integer, encoding, weights[e] + b * block_bytes, rows - 16 * b, columns, group, starts[e], starts[e + 1],
            x, xq, xs, xsum, y + 64 * b, 4 * rows,
        )  # fmt: skip


@njit(nogil=True, cache=True, parallel=True)
def _matmul_parallel(num_items, integer, encoding, group, rows, columns, block_bytes, weights, starts,
                     x, xq, xs, xsum, y):  # fmt: skip
    for item in prange(num_items):
        _matmul_items(
            item, item + 1, integer, encoding, group, rows, columns, block_bytes, weights, starts, x, xq, xs, xsum, y
        )


@njit(nogil=True, cache=True)
def grouped_matmul(integer, encoding, group, rows, columns, block_bytes, weights, starts, x, xq, xs, xsum, y):
    """y[p] = x[p] @ W_e^T for the pairs starts[e]..starts[e+1] of each expert e.

    weights: int64 [E] addresses of packed matrices [rows, columns]; starts: int64 [E + 1].
    x: float32 [P, C], C even for 16-bit encodings; with ``integer`` xq int8 [P, C], xs float32 and xsum int32
    [P, C / group] are used instead. y: float32 [P, rows], written.
    """
    num_items = (rows + 15) // 16 * weights.shape[0]
    x_at, xq_at = np.int64(x.ctypes.data), np.int64(xq.ctypes.data)
    xs_at, xsum_at, y_at = np.int64(xs.ctypes.data), np.int64(xsum.ctypes.data), np.int64(y.ctypes.data)
    num_products = y.shape[0] * rows * columns
    if num_items * block_bytes < SERIAL_BYTES and num_products < SERIAL_PRODUCTS:
        _matmul_items(
            0, num_items, integer, encoding, group, rows, columns, block_bytes, weights, starts,
            x_at, xq_at, xs_at, xsum_at, y_at,
        )  # fmt: skip
    else:
        _matmul_parallel(
            num_items, integer, encoding, group, rows, columns, block_bytes, weights, starts,
            x_at, xq_at, xs_at, xsum_at, y_at,
        )  # fmt: skip
