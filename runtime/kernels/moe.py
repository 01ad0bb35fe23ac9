"""One launch for a matrix product, and one for a whole MoE layer: programs made of the phases of matmul and activation.

Shapes: T tokens, K experts a token, P = pairs actually computed, E active experts, H hidden, I intermediate.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moray.runtime.kernels import activation as act
from moray.runtime.kernels import matmul as mm
from moray.runtime.kernels.pool import PHASE_FIELDS, run, run_alone

# Fields of a matrix kernel, int64 (ops.MatrixKernel).
K_ITEMS, K_INTEGER, K_GROUP, K_ROWS, K_COLUMNS, K_BLOCK_BYTES, K_SOURCE_COLUMNS = range(7)
K_FIELDS = 7
# Compiled functions of the other phases, by address (ops.py).
F_PACK, F_ACTIVATE, F_COMBINE, F_NORMALIZE = range(4)

# A program below both is done by the calling thread: another would not come before it is done.
SERIAL_BYTES = 96 << 10
SERIAL_PRODUCTS = 1 << 20
_CHUNK_BYTES = 64 << 10
_ALIGN = 64


@njit(nogil=True, cache=True)
def group_by_expert(ids, num_experts):
    """Sort the (token, k) pairs of a layer by expert, keeping token order within an expert.

    ids: int64 [T, K]; ids outside 0..num_experts-1 mean "no expert" (expert-parallel sentinels, skipped experts).
    Returns active int64 [E], starts int64 [E + 1], token_of_pair int64 [P] and positions int64 [T, K], the pair that
    holds each (token, k), or -1.
    """
    counts = np.zeros(num_experts, np.int64)
    num_active, num_pairs = 0, 0
    for e in ids.flat:
        if 0 <= e < num_experts:
            num_active += counts[e] == 0
            counts[e] += 1
            num_pairs += 1
    active, starts = np.empty(num_active, np.int64), np.zeros(num_active + 1, np.int64)
    token_of_pair = np.empty(num_pairs, np.int64)
    i = 0
    for e in range(num_experts):
        if counts[e]:
            active[i] = e
            starts[i + 1] = starts[i] + counts[e]
            counts[e] = starts[i]  # from now on: where its next pair goes
            i += 1
    positions = np.full(ids.shape, -1, np.int64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            if 0 <= e < num_experts:
                positions[t, k] = counts[e]
                token_of_pair[counts[e]] = t
                counts[e] += 1
    return active, starts, token_of_pair, positions


@njit(nogil=True, cache=True)
def _expert_of_pair(starts):
    """int64 [P]: the index among the active experts of each pair's."""
    experts = np.empty(starts[-1], np.int64)
    for e in range(starts.shape[0] - 1):
        experts[starts[e] : starts[e + 1]] = e
    return experts


@njit(nogil=True, cache=True)
def _aligned(num_bytes):
    return (num_bytes + _ALIGN - 1) // _ALIGN * _ALIGN


@njit(nogil=True, cache=True)
def panel_bytes(kernel, num_pairs):
    """Scratch for the panels of a product's activations."""
    columns = kernel[K_COLUMNS]
    if not kernel[K_INTEGER]:
        return _aligned(4 * num_pairs * columns)
    return _aligned(num_pairs * columns) + 2 * _aligned(4 * num_pairs * (columns // kernel[K_GROUP]))


@njit(nogil=True, cache=True)
def _set_phase(phases, p, function, params, items, chunk):
    phases[p, 0], phases[p, 1], phases[p, 2], phases[p, 3] = function, params, items, chunk


@njit(nogil=True, cache=True)
def _set_rows(params, kernel, source, index, source_columns, source_stride, panels, num_pairs, starts, expert):
    """Params of a phase that fills panels. Returns its items."""
    columns, group, integer = kernel[K_COLUMNS], kernel[K_GROUP], kernel[K_INTEGER]
    slices = act.num_slices(columns, group if integer else 0)
    params[act.SOURCE], params[act.INDEX] = source, index
    params[act.SOURCE_COLUMNS], params[act.SOURCE_STRIDE] = source_columns, source_stride
    params[act.COLUMNS], params[act.GROUP], params[act.INTEGER] = columns, group if integer else 0, integer
    params[act.X] = panels
    params[act.XS] = panels + _aligned(num_pairs * columns)
    params[act.XSUM] = params[act.XS] + (_aligned(4 * num_pairs * (columns // group)) if integer else 0)
    params[act.STARTS], params[act.EXPERT], params[act.SLICES] = starts, expert, slices
    return num_pairs * slices


@njit(nogil=True, cache=True)
def _set_product(params, kernel, rows_params, weights, starts, num_experts, y):
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


@njit(nogil=True, cache=True)
def _set_sum(params, y, positions, weights, columns, out):
    """Params of the weighted sum, without biases. Returns its items."""
    slices = act.num_slices(columns, 0)
    params[act.C_Y], params[act.C_POSITIONS], params[act.C_WEIGHTS] = y, positions.ctypes.data, weights
    params[act.C_OUT], params[act.C_TOP_K] = out, positions.shape[1]
    params[act.C_COLUMNS], params[act.C_SLICES] = columns, slices
    return positions.shape[0] * slices


@njit(nogil=True, cache=True)
def _chunk(block_bytes):
    return max(1, _CHUNK_BYTES // block_bytes)


@njit(nogil=True, cache=True)
def _carry_out(pool, phases, num_bytes, num_products):
    if num_bytes < SERIAL_BYTES and num_products < SERIAL_PRODUCTS:
        run_alone(phases)
    else:
        run(pool, phases)


@njit(nogil=True, cache=True)
def project(pool, functions, kernel, weights, starts, index, x, source_columns, num_pairs, y, scratch):
    """y[p] = x[index[p]] @ W_e^T for the pairs starts[e]..starts[e + 1] of each expert e.

    pool: its address; kernel: int64 [K_FIELDS]; weights: int64 [E] addresses of packed matrices; starts: int64
    [E + 1]; index: int64 [P], empty where pair p reads row p. x float32 [., source_columns], y float32 [P, R],
    written, and scratch (``panel_bytes``) by address.
    """
    num_experts = weights.shape[0]
    params = np.empty((2, max(act.NUM_PARAMS, mm.NUM_PARAMS)), np.int64)
    expert = _expert_of_pair(starts)
    phases = np.empty((2, PHASE_FIELDS), np.int64)
    items = _set_rows(
        params[0], kernel, x, index.ctypes.data if index.shape[0] else 0, source_columns, source_columns, scratch,
        num_pairs, starts.ctypes.data, expert.ctypes.data,
    )  # fmt: skip
    _set_phase(phases, 0, functions[F_PACK], params[0].ctypes.data, items, 1)
    items = _set_product(params[1], kernel, params[0], weights.ctypes.data, starts.ctypes.data, num_experts, y)
    _set_phase(phases, 1, kernel[K_ITEMS], params[1].ctypes.data, items, _chunk(kernel[K_BLOCK_BYTES]))
    _carry_out(pool, phases, items * kernel[K_BLOCK_BYTES], num_pairs * kernel[K_ROWS] * kernel[K_COLUMNS])
    return params[0, 0] + params[1, 0] + expert.shape[0]  # alive until here: phases know only their addresses


@njit(nogil=True, cache=True)
def linear(pool, functions, kernel, weight, x, num_rows, y, scratch):
    """y = x @ W^T for one packed matrix, by addresses: x float32 [num_rows, C], y float32 [num_rows, R], written."""
    weights, starts = np.empty(1, np.int64), np.zeros(2, np.int64)
    weights[0], starts[1] = weight, num_rows
    every_row = np.empty(0, np.int64)
    project(pool, functions, kernel, weights, starts, every_row, x, kernel[K_SOURCE_COLUMNS], num_rows, y, scratch)


@njit(nogil=True, cache=True)
def moe_layer(
    pool, functions, gate, gate_up, gate_up_at, gate_up_biases, down, down_at, down_biases, starts, token_of_pair,
    positions, x, weights, out, scratch,
):  # fmt: skip
    """out = sum over experts of weight * down(gate(gate_up(x))), in one launch.

    gate: the fields of a Gate; gate_up, down: int64 [K_FIELDS]; gate_up_at, down_at: int64 [E] addresses of packed
    matrices; gate_up_biases, down_biases: int64 [E] addresses of float32 biases, empty if there are none; the
    grouping as ``group_by_expert`` gives it; x float32 [T, H], weights float32 [T, K], out float32 [T, H], written,
    and scratch by address.
    """
    num_pairs, num_experts = token_of_pair.shape[0], starts.shape[0] - 1
    hidden, width = down[K_ROWS], gate_up[K_ROWS] // 2
    y_gate_up = scratch
    h = y_gate_up + _aligned(8 * num_pairs * width)
    y = h + _aligned(4 * num_pairs * width)
    x_panels = y + _aligned(4 * num_pairs * hidden)
    h_panels = x_panels + panel_bytes(gate_up, num_pairs)
    params = np.empty((5, max(act.NUM_PARAMS, mm.NUM_PARAMS)), np.int64)
    phases = np.empty((5, PHASE_FIELDS), np.int64)
    experts = _expert_of_pair(starts)
    starts_at, expert_at = starts.ctypes.data, experts.ctypes.data

    items = _set_rows(
        params[0], gate_up, x, token_of_pair.ctypes.data, gate_up[K_SOURCE_COLUMNS], gate_up[K_SOURCE_COLUMNS],
        x_panels, num_pairs, starts_at, expert_at,
    )  # fmt: skip
    _set_phase(phases, 0, functions[F_PACK], params[0].ctypes.data, items, 1)
    up_items = _set_product(params[1], gate_up, params[0], gate_up_at.ctypes.data, starts_at, num_experts, y_gate_up)
    _set_phase(phases, 1, gate_up[K_ITEMS], params[1].ctypes.data, up_items, _chunk(gate_up[K_BLOCK_BYTES]))
    items = _set_rows(params[2], down, h, 0, width, width, h_panels, num_pairs, starts_at, expert_at)
    params[2, act.GATE_UP] = y_gate_up
    params[2, act.BIASES] = gate_up_biases.ctypes.data if gate_up_biases.shape[0] else 0
    params[2, act.KIND], params[2, act.LIMIT], params[2, act.ALPHA] = gate
    _set_phase(phases, 2, functions[F_ACTIVATE], params[2].ctypes.data, items, 1)
    down_items = _set_product(params[3], down, params[2], down_at.ctypes.data, starts_at, num_experts, y)
    _set_phase(phases, 3, down[K_ITEMS], params[3].ctypes.data, down_items, _chunk(down[K_BLOCK_BYTES]))
    items = _set_sum(params[4], y, positions, weights, hidden, out)
    params[4, act.C_BIASES] = down_biases.ctypes.data if down_biases.shape[0] else 0
    params[4, act.C_EXPERT] = expert_at
    _set_phase(phases, 4, functions[F_COMBINE], params[4].ctypes.data, items, 1)

    num_bytes = up_items * gate_up[K_BLOCK_BYTES] + down_items * down[K_BLOCK_BYTES]
    _carry_out(pool, phases, num_bytes, num_pairs * 3 * width * hidden)
    return params[0, 0] + experts.shape[0]  # alive until here: phases know only their addresses


@njit(nogil=True, cache=True)
def combine_pairs(pool, functions, y, positions, weights, columns, out):
    """out[t] = sum over k of weights[t, k] * y[positions[t, k]]: the last phase of ``moe_layer`` alone."""
    params, phases = np.empty(act.NUM_PARAMS, np.int64), np.empty((1, PHASE_FIELDS), np.int64)
    items = _set_sum(params, y, positions, weights, columns, out)
    params[act.C_BIASES] = params[act.C_EXPERT] = 0
    _set_phase(phases, 0, functions[F_COMBINE], params.ctypes.data, items, 1)
    _carry_out(pool, phases, 4 * positions.size * columns, 0)
    return params[0]


@njit(nogil=True, cache=True)
def rms_norm(pool, functions, x, weight, num_rows, columns, epsilon, out):
    """out = weight * x / rms(x) for every row of x float32 [num_rows, columns], by addresses."""
    params, phases = np.empty(act.NUM_PARAMS, np.int64), np.empty((1, PHASE_FIELDS), np.int64)
    params[act.N_X], params[act.N_WEIGHT], params[act.N_OUT] = x, weight, out
    params[act.N_COLUMNS], params[act.N_EPSILON] = columns, epsilon
    chunk = max(1, _CHUNK_BYTES // (4 * columns))
    _set_phase(phases, 0, functions[F_NORMALIZE], params.ctypes.data, num_rows, chunk)
    _carry_out(pool, phases, 4 * num_rows * columns, 0)
    return params[0]
