"""One launch per MoE layer: grouping, gate and up, SwiGLU, down and the weighted sum, over all its experts.

Shapes: T tokens, K experts a token, P = pairs actually computed, E active experts, H hidden, I intermediate.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moray.runtime.kernels.activation import combine, quantize_rows, swiglu
from moray.runtime.kernels.matmul import grouped_matmul


@njit(nogil=True, cache=True)
def group_by_expert(ids, num_experts):
    """Sort the (token, k) pairs of a layer by expert, keeping token order within an expert.

    ids: int64 [T, K]; ids outside 0..num_experts-1 mean "no expert" (expert-parallel sentinels, skipped experts).
    Returns active int64 [E], starts int64 [E + 1], token_of_pair int64 [P] and positions int64 [T, K], the pair
    that holds each (token, k), or -1.
    """
    counts = np.zeros(num_experts, np.int64)
    flat = ids.ravel()
    for e in flat:
        if 0 <= e < num_experts:
            counts[e] += 1
    active = np.nonzero(counts)[0].astype(np.int64)
    starts = np.zeros(active.shape[0] + 1, np.int64)
    cursor = np.zeros(num_experts, np.int64)
    for i in range(active.shape[0]):
        cursor[active[i]] = starts[i]
        starts[i + 1] = starts[i] + counts[active[i]]
    token_of_pair = np.empty(starts[-1], np.int64)
    positions = np.full(ids.shape, -1, np.int64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            if 0 <= e < num_experts:
                positions[t, k] = cursor[e]
                token_of_pair[cursor[e]] = t
                cursor[e] += 1
    return active, starts, token_of_pair, positions


@njit(nogil=True, cache=True)
def gather_rows(x, index, out):
    """out[p] = x[index[p]]."""
    for p in range(index.shape[0]):
        out[p] = x[index[p]]


@njit(nogil=True, cache=True)
def project(integer, encoding, group, rows, columns, block_bytes, weights, starts, index, x, y):
    """y[p] = x[index[p]] @ W_e^T; each token's activations are quantized once, however many experts read it.

    An empty ``index`` means that x has a row for each pair already.
    """
    num_tokens, num_pairs = x.shape[0], y.shape[0]
    num_groups = columns // group if integer else 0
    gather = index.shape[0] > 0
    rows_quantized = num_tokens if integer else 0
    xq, xs = np.empty((rows_quantized, columns), np.int8), np.empty((rows_quantized, num_groups), np.float32)
    xsum = np.empty((rows_quantized, num_groups), np.int32)
    if integer:
        quantize_rows(x, group, xq, xs, xsum)
        if gather:
            xq_tokens, xs_tokens, xsum_tokens = xq, xs, xsum
            xq, xs = np.empty((num_pairs, columns), np.int8), np.empty((num_pairs, num_groups), np.float32)
            xsum = np.empty((num_pairs, num_groups), np.int32)
            gather_rows(xq_tokens, index, xq)
            gather_rows(xs_tokens, index, xs)
            gather_rows(xsum_tokens, index, xsum)
    elif gather:
        x_tokens = x
        x = np.empty((num_pairs, columns), np.float32)
        gather_rows(x_tokens, index, x)
    grouped_matmul(integer, encoding, group, rows, columns, block_bytes, weights, starts, x, xq, xs, xsum, y)


@njit(nogil=True, cache=True)
def moe_swiglu(gate_up, gate_up_at, down, down_at, starts, token_of_pair, positions, x, weights, out):
    """out = sum over experts of weight * down(silu(gate(x)) * up(x)).

    gate_up, down: int64 [6] = integer, encoding, group, rows, columns, block_bytes of the two matrices;
    gate_up_at, down_at: int64 [E] addresses; x float32 [T, H]; weights float32 [T, K]; out float32 [T, H], written.
    """
    num_pairs, hidden, width = token_of_pair.shape[0], down[3], down[4]
    y_gate_up = np.empty((num_pairs, gate_up[3]), np.float32)
    project(
        gate_up[0] != 0, gate_up[1], gate_up[2], gate_up[3], gate_up[4], gate_up[5], gate_up_at, starts,
        token_of_pair, x, y_gate_up,
    )  # fmt: skip
    h = np.empty((num_pairs, width), np.float32)
    swiglu(y_gate_up, h)
    y = np.empty((num_pairs, hidden), np.float32)
    project(down[0] != 0, down[1], down[2], down[3], down[4], down[5], down_at, starts, np.empty(0, np.int64), h, y)
    combine(y, positions, weights, out)
