"""Activations as phases of a program (pool.py): into panels, through the gate, and summed.

Shapes as in programs.py. A pair's row goes into the panel of its tile (matmul.py: ``tile_of``).
"""

from __future__ import annotations

from numba import cfunc, njit

from moray.runtime.kernels.atomics import word
from moray.runtime.kernels.gates import INTERLEAVED
from moray.runtime.kernels.matmul import ITEMS, tile_of
from moray.runtime.kernels.rows import (
    add_row,
    add_scaled_row,
    copy_column,
    gated_row,
    quantize_group,
    rms_row,
    store_zero,
)

# Words of the params of ``pack`` and ``activate``.
SOURCE, INDEX, SOURCE_COLUMNS, SOURCE_STRIDE, COLUMNS, GROUP, INTEGER, X, XS, XSUM, STARTS, EXPERT, SLICES = range(13)
# And of ``activate`` alone: outputs of gate_up, the addresses of its biases (or 0), and a Gate's fields.
GATE_UP, BIASES, KIND, LIMIT, ALPHA = range(13, 18)
NUM_PARAMS = 18

# Words of the params of ``combine``.
C_Y, C_POSITIONS, C_WEIGHTS, C_OUT, C_ROWS, C_TOP_K, C_COLUMNS, C_SLICES, C_BIASES, C_EXPERT = range(10)

# Words of the params of ``normalize``.
N_X, N_WEIGHT, N_OUT, N_COLUMNS, N_EPSILON = range(5)

SLICE = 1024  # columns in an item, about


@njit(inline="always")
def slice_columns(group):
    """Columns in one item: whole groups of about 1024 columns."""
    return group * max(1, SLICE // group) if group else SLICE


@njit(inline="always")
def num_slices(columns, group):
    each = slice_columns(group)
    return (columns + each - 1) // each


@njit(nogil=True, cache=True)
def _pack_slice(params, pair, source, first, last):
    """Put columns first..last-1 of a pair's row, which starts at ``source``, into its panel."""
    columns, group, end_of_source = word(params, COLUMNS), word(params, GROUP), word(params, SOURCE_COLUMNS)
    expert = word(word(params, EXPERT), pair)
    start, end = word(word(params, STARTS), expert), word(word(params, STARTS), expert + 1)
    tile, width = tile_of(pair, start, end)
    token = pair - tile
    if word(params, INTEGER):
        num_groups = columns // group
        codes = word(params, X) + tile * columns + 4 * token
        scales = word(params, XS) + 4 * (tile * num_groups + token)
        sums = word(params, XSUM) + 4 * (tile * num_groups + token)
        for g in range(first // group, last // group):
            quantize_group(
                source + 4 * g * group, group, codes + g * group * width, 4 * width,
                scales + 4 * g * width, sums + 4 * g * width,
            )  # fmt: skip
    else:
        x = word(params, X) + 4 * (tile * columns + token)
        for c in range(first, min(last, end_of_source)):
            copy_column(source + 4 * c, x + 4 * c * width)
        for c in range(max(first, end_of_source), last):
            store_zero(x + 4 * c * width)


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def pack(params, first, last):
    """Rows of x into panels, quantized in class int8. Items: (pair, slice); row INDEX[pair], or the pair's own."""
    columns, each, slices = word(params, COLUMNS), slice_columns(word(params, GROUP)), word(params, SLICES)
    for item in range(first, last):
        pair = item // slices
        at = (item - pair * slices) * each
        row = word(word(params, INDEX), pair) if word(params, INDEX) else pair
        source = word(params, SOURCE) + 4 * row * word(params, SOURCE_STRIDE)
        _pack_slice(params, pair, source, at, min(at + each, columns))


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def activate(params, first, last):
    """Rows of gate_up, plus biases, through the gate into rows of h, and these into panels. Items: (pair, slice)."""
    columns, each, slices = word(params, COLUMNS), slice_columns(word(params, GROUP)), word(params, SLICES)
    width, kind = word(params, SOURCE_COLUMNS), word(params, KIND)
    for item in range(first, last):
        pair = item // slices
        at = (item - pair * slices) * each
        end = min(at + each, columns)
        count = min(end, width) - at
        h = word(params, SOURCE) + 4 * pair * width
        row = word(params, GATE_UP) + 8 * pair * width
        gate, up = row + 4 * at, row + 4 * (width + at)
        if kind & INTERLEAVED:
            gate = up = row + 8 * at
        if word(params, BIASES):
            biases = word(word(params, BIASES), word(word(params, EXPERT), pair))
            if kind & INTERLEAVED:
                add_row(gate, biases + 8 * at, 2 * count)
            else:
                add_row(gate, biases + 4 * at, count)
                add_row(up, biases + 4 * (width + at), count)
        gated_row(gate, up, h + 4 * at, count, kind, word(params, LIMIT), word(params, ALPHA))
        _pack_slice(params, pair, h, at, end)


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def combine(params, first, last):
    """out[rows[t]] = sum over k, in the router's order, of weights[t, k] * y[positions[t, k]]; negative: skip.

    Items: (token, slice). y float32 [P, H], positions int64 [T, K], weights float32 [T, K], out float32 [., H], rows
    int64 [T], or 0: row t is out[t]. Biases, if there are, are added to y first: in place, each row of y is used once.
    """
    columns, top_k, slices = word(params, C_COLUMNS), word(params, C_TOP_K), word(params, C_SLICES)
    for item in range(first, last):
        token = item // slices
        at = (item - token * slices) * SLICE
        count = min(SLICE, columns - at)
        place = word(word(params, C_ROWS), token) if word(params, C_ROWS) else token
        out = word(params, C_OUT) + 4 * (place * columns + at)
        for c in range(count):
            store_zero(out + 4 * c)
        for k in range(top_k):
            pair = word(word(params, C_POSITIONS), token * top_k + k)
            if pair >= 0:
                row = word(params, C_Y) + 4 * (pair * columns + at)
                if word(params, C_BIASES):
                    add_row(row, word(word(params, C_BIASES), word(word(params, C_EXPERT), pair)) + 4 * at, count)
                add_scaled_row(out, row, word(params, C_WEIGHTS) + 4 * (token * top_k + k), count)


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def normalize(params, first, last):
    """RMSNorm of rows. Items: rows of x float32 [., C]; weight float32 [C]; out as x, written."""
    columns = word(params, N_COLUMNS)
    for row in range(first, last):
        at = 4 * row * columns
        rms_row(
            word(params, N_X) + at, word(params, N_WEIGHT), word(params, N_OUT) + at, columns, word(params, N_EPSILON)
        )
