"""Programs for the pool, put together from the phases of matmul and activation: a product, and a norm.

Shapes: T tokens, P rows actually computed ("pairs" of a token and an expert), E experts, C columns, R rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moray.runtime.kernels import activation as act
from moray.runtime.kernels import matmul as mm
from moray.runtime.kernels.atomics import address_of
from moray.runtime.kernels.pool import PHASE_FIELDS, run, run_alone
from moray.runtime.kernels.setup import entry

# Fields of a matrix kernel, int64 (ops.MatrixKernel).
K_ITEMS, K_INTEGER, K_GROUP, K_ROWS, K_COLUMNS, K_BLOCK_BYTES, K_SOURCE_COLUMNS = range(7)
K_FIELDS = 7
# Compiled functions of the other phases, by address (ops.py).
F_PACK, F_ACTIVATE, F_COMBINE, F_NORMALIZE, F_PREPARE_HEADS, F_ATTEND = range(6)
F_PREPARE_ROWS, F_ATTEND_TILES, F_FINISH_ROWS, F_PREPARE_BATCH, F_ATTEND_BATCH = range(6, 11)

# A program below both is done by the calling thread: another would not come before it is done.
SERIAL_BYTES = 96 << 10
SERIAL_PRODUCTS = 1 << 20
_CHUNK_BYTES = 64 << 10
_ALIGN = 64


@njit(nogil=True, cache=True)
def expert_of_pair(starts):
    """int64 [P]: the index among the active experts of each pair's."""
    experts = np.empty(starts[-1], np.int64)
    for e in range(starts.shape[0] - 1):
        for pair in range(starts[e], starts[e + 1]):
            experts[pair] = e
    return experts


@njit(inline="always")
def aligned(num_bytes):
    return (num_bytes + _ALIGN - 1) // _ALIGN * _ALIGN


@njit(inline="always")
def panel_bytes(kernel, num_pairs):
    """Scratch for the panels of a product's activations."""
    columns = kernel[K_COLUMNS]
    if not kernel[K_INTEGER]:
        return aligned(4 * num_pairs * columns)
    return aligned(num_pairs * columns) + 2 * aligned(4 * num_pairs * (columns // kernel[K_GROUP]))


@njit(inline="always")
def set_phase(phases, p, function, params, items, chunk):
    phases[p, 0], phases[p, 1], phases[p, 2], phases[p, 3] = function, params, items, chunk


@njit(nogil=True, cache=True)
def set_rows(params, kernel, source, index, source_columns, source_stride, panels, num_pairs, starts, expert):
    """Params of a phase that fills panels. Returns its items."""
    columns, group, integer = kernel[K_COLUMNS], kernel[K_GROUP], kernel[K_INTEGER]
    slices = act.num_slices(columns, group if integer else 0)
    params[act.SOURCE], params[act.INDEX] = source, index
    params[act.SOURCE_COLUMNS], params[act.SOURCE_STRIDE] = source_columns, source_stride
    params[act.COLUMNS], params[act.GROUP], params[act.INTEGER] = columns, group if integer else 0, integer
    params[act.X] = panels
    params[act.XS] = panels + aligned(num_pairs * columns)
    params[act.XSUM] = params[act.XS] + (aligned(4 * num_pairs * (columns // group)) if integer else 0)
    params[act.STARTS], params[act.EXPERT], params[act.SLICES] = starts, expert, slices
    return num_pairs * slices


@njit(nogil=True, cache=True)
def set_product(params, kernel, rows_params, weights, starts, num_experts, y):
    """Params of a product whose panels ``rows_params`` names. Returns its items."""
    num_blocks = (kernel[K_ROWS] + 15) // 16
    params[mm.ROWS], params[mm.COLUMNS], params[mm.GROUP] = kernel[K_ROWS], kernel[K_COLUMNS], kernel[K_GROUP]
    params[mm.INTEGER], params[mm.BLOCK_BYTES], params[mm.NUM_BLOCKS] = (
        kernel[K_INTEGER],
        kernel[K_BLOCK_BYTES],
        num_blocks,
    )
    params[mm.WEIGHTS], params[mm.STARTS] = weights, starts
    params[mm.X], params[mm.XS], params[mm.XSUM] = rows_params[act.X], rows_params[act.XS], rows_params[act.XSUM]
    params[mm.Y] = y
    return num_blocks * num_experts


@njit(inline="always")
def chunk_of(block_bytes):
    return max(1, _CHUNK_BYTES // (mm.MOST_BLOCKS * block_bytes)) * mm.MOST_BLOCKS


@njit(nogil=True, cache=True)
def carry_out(pool, phases, num_bytes, num_products):
    if num_bytes < SERIAL_BYTES and num_products < SERIAL_PRODUCTS:
        run_alone(phases)
    else:
        run(pool, phases)


@entry("functions kernel weights starts index")
def project(pool, functions, kernel, weights, starts, index, x, source_columns, num_pairs, y, scratch):
    """y[p] = x[index[p]] @ W_e^T for the pairs starts[e]..starts[e + 1] of each expert e.

    pool: its address; kernel: int64 [K_FIELDS]; weights: int64 [E] addresses of packed matrices; starts: int64
    [E + 1]; index: int64 [P], empty where pair p reads row p. x float32 [., source_columns], y float32 [P, R],
    written, and scratch (``panel_bytes``) by address.
    """
    num_experts = weights.shape[0]
    params = np.empty((2, max(act.NUM_PARAMS, mm.NUM_PARAMS)), np.int64)
    expert = expert_of_pair(starts)
    phases = np.empty((2, PHASE_FIELDS), np.int64)
    items = set_rows(
        params[0], kernel, x, address_of(index) if index.shape[0] else 0, source_columns, source_columns, scratch,
        num_pairs, address_of(starts), address_of(expert),
    )  # fmt: skip
    set_phase(phases, 0, functions[F_PACK], address_of(params[0]), items, 1)
    items = set_product(params[1], kernel, params[0], address_of(weights), address_of(starts), num_experts, y)
    set_phase(phases, 1, kernel[K_ITEMS], address_of(params[1]), items, chunk_of(kernel[K_BLOCK_BYTES]))
    carry_out(pool, phases, items * kernel[K_BLOCK_BYTES], num_pairs * kernel[K_ROWS] * kernel[K_COLUMNS])
    return params[0, 0] + params[1, 0] + expert.shape[0]  # alive until here: phases know only their addresses


@entry("functions kernel")
def linear(pool, functions, kernel, weight, x, num_rows, y, scratch):
    """y = x @ W^T for one packed matrix, by addresses: x float32 [num_rows, C], y float32 [num_rows, R], written."""
    weights, starts = np.empty(1, np.int64), np.zeros(2, np.int64)
    weights[0], starts[1] = weight, num_rows
    every_row = np.empty(0, np.int64)
    project(pool, functions, kernel, weights, starts, every_row, x, kernel[K_SOURCE_COLUMNS], num_rows, y, scratch)


@entry("functions")
def rms_norm(pool, functions, x, weight, num_rows, columns, epsilon, out):
    """out = weight * x / rms(x) for every row of x float32 [num_rows, columns], by addresses."""
    params, phases = np.empty(act.NUM_PARAMS, np.int64), np.empty((1, PHASE_FIELDS), np.int64)
    params[act.N_X], params[act.N_WEIGHT], params[act.N_OUT] = x, weight, out
    params[act.N_COLUMNS], params[act.N_EPSILON] = columns, epsilon
    chunk = max(1, _CHUNK_BYTES // (4 * columns))
    set_phase(phases, 0, functions[F_NORMALIZE], address_of(params), num_rows, chunk)
    carry_out(pool, phases, 4 * num_rows * columns, np.int64(0))
    return params[0]
