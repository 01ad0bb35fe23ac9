"""One launch for a whole MoE layer.

Shapes: T tokens, K experts a token, P = pairs actually computed, E active experts, H hidden, I intermediate.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from moray.runtime.kernels import activation as act
from moray.runtime.kernels import matmul as mm
from moray.runtime.kernels.atomics import address_of
from moray.runtime.kernels.pool import PHASE_FIELDS
from moray.runtime.kernels.programs import (
    F_ACTIVATE,
    F_COMBINE,
    F_PACK,
    K_BLOCK_BYTES,
    K_ITEMS,
    K_ROWS,
    K_SOURCE_COLUMNS,
    aligned,
    carry_out,
    chunk_of,
    expert_of_pair,
    panel_bytes,
    set_phase,
    set_product,
    set_rows,
)
from moray.runtime.kernels.setup import TABLE, entry

GATE = types.UniTuple(types.int64, 3)  # the fields of a Gate


@entry(ids=TABLE)
def group_by_expert(ids, num_experts):
    """Sort the (token, k) pairs of a layer by expert, keeping token order within an expert.

    ids: int64 [T, K]; ids outside 0..num_experts-1 mean "no expert" (expert-parallel sentinels, skipped experts).
    Returns active int64 [E], starts int64 [E + 1], token_of_pair int64 [P] and positions int64 [T, K], the pair that
    holds each (token, k), or -1.
    """
    counts = np.zeros(num_experts, np.int64)
    num_active, num_pairs = 0, 0
    positions = np.empty(ids.shape, np.int64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            positions[t, k] = -1
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
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            if 0 <= e < num_experts:
                positions[t, k] = counts[e]
                token_of_pair[counts[e]] = t
                counts[e] += 1
    return active, starts, token_of_pair, positions


@entry("experts starts token_of_pair")
def pairs_of(experts, starts, token_of_pair):
    """The pairs of some of the active experts, by their positions int64 [E'], ascending, as a grouping of their own.

    Returns rows int64 [P'], their numbers among all pairs, and starts [E' + 1] and token_of_pair [P'].
    """
    count = 0
    for expert in experts:
        count += starts[expert + 1] - starts[expert]
    rows, own_starts = np.empty(count, np.int64), np.zeros(experts.shape[0] + 1, np.int64)
    pair = 0
    for i in range(experts.shape[0]):
        for row in range(starts[experts[i]], starts[experts[i] + 1]):
            rows[pair] = row
            pair += 1
        own_starts[i + 1] = pair
    return rows, own_starts, token_of_pair[rows]


@entry("active starts owners tokens bytes_by_owner")
def count_use(active, starts, shard_bytes, owners, tokens, bytes_by_owner):
    """Add a layer's use to ``tokens`` [E] and ``bytes_by_owner``; ``owners`` [E]. All int64."""
    for i in range(active.shape[0]):
        expert = active[i]
        tokens[expert] += starts[i + 1] - starts[i]
        bytes_by_owner[owners[expert]] += shard_bytes


@njit(nogil=True, cache=True)
def _set_sum(params, y, positions, weights, columns, out, rows):
    """Params of the weighted sum, without biases. ``rows``: address of int64 [T], or 0. Returns its items."""
    slices = act.num_slices(columns, 0)
    params[act.C_Y], params[act.C_POSITIONS], params[act.C_WEIGHTS] = y, address_of(positions), weights
    params[act.C_OUT], params[act.C_ROWS], params[act.C_TOP_K] = out, rows, positions.shape[1]
    params[act.C_COLUMNS], params[act.C_SLICES] = columns, slices
    return positions.shape[0] * slices


@entry(
    "functions gate_up gate_up_at gate_up_biases down down_at down_biases starts token_of_pair",
    gate=GATE, positions=TABLE,
)  # fmt: skip
def moe_layer(
    pool, functions, gate, gate_up, gate_up_at, gate_up_biases, down, down_at, down_biases, starts, token_of_pair,
    positions, x, weights, out, rows, scratch,
):  # fmt: skip
    """out = sum over experts of weight * down(gate(gate_up(x))), in one launch.

    gate: the fields of a Gate; gate_up, down: int64 [K_FIELDS]; gate_up_at, down_at: int64 [E] addresses of packed
    matrices; gate_up_biases, down_biases: int64 [E] addresses of float32 biases, empty if there are none; the
    grouping as ``group_by_expert`` gives it; x float32 [T, H], weights float32 [T, K], out float32 [., H], of which row
    rows[t] (int64 [T], or 0: row t) is written, and scratch by address.
    """
    num_pairs, num_experts = token_of_pair.shape[0], starts.shape[0] - 1
    hidden, width = down[K_ROWS], gate_up[K_ROWS] // 2
    y_gate_up = scratch
    h = y_gate_up + aligned(8 * num_pairs * width)
    y = h + aligned(4 * num_pairs * width)
    x_panels = y + aligned(4 * num_pairs * hidden)
    h_panels = x_panels + panel_bytes(gate_up, num_pairs)
    params = np.empty((5, max(act.NUM_PARAMS, mm.NUM_PARAMS)), np.int64)
    phases = np.empty((5, PHASE_FIELDS), np.int64)
    experts = expert_of_pair(starts)
    starts_at, expert_at = address_of(starts), address_of(experts)

    items = set_rows(
        params[0], gate_up, x, address_of(token_of_pair), gate_up[K_SOURCE_COLUMNS], gate_up[K_SOURCE_COLUMNS],
        x_panels, num_pairs, starts_at, expert_at,
    )  # fmt: skip
    set_phase(phases, 0, functions[F_PACK], address_of(params[0]), items, 1)
    up_items = set_product(params[1], gate_up, params[0], address_of(gate_up_at), starts_at, num_experts, y_gate_up)
    set_phase(phases, 1, gate_up[K_ITEMS], address_of(params[1]), up_items, chunk_of(gate_up[K_BLOCK_BYTES]))
    items = set_rows(params[2], down, h, np.int64(0), width, width, h_panels, num_pairs, starts_at, expert_at)
    params[2, act.GATE_UP] = y_gate_up
    params[2, act.BIASES] = address_of(gate_up_biases) if gate_up_biases.shape[0] else 0
    params[2, act.KIND], params[2, act.LIMIT], params[2, act.ALPHA] = gate
    set_phase(phases, 2, functions[F_ACTIVATE], address_of(params[2]), items, 1)
    down_items = set_product(params[3], down, params[2], address_of(down_at), starts_at, num_experts, y)
    set_phase(phases, 3, down[K_ITEMS], address_of(params[3]), down_items, chunk_of(down[K_BLOCK_BYTES]))
    items = _set_sum(params[4], y, positions, weights, hidden, out, rows)
    params[4, act.C_BIASES] = address_of(down_biases) if down_biases.shape[0] else 0
    params[4, act.C_EXPERT] = expert_at
    set_phase(phases, 4, functions[F_COMBINE], address_of(params[4]), items, 1)

    num_bytes = up_items * gate_up[K_BLOCK_BYTES] + down_items * down[K_BLOCK_BYTES]
    carry_out(pool, phases, num_bytes, num_pairs * 3 * width * hidden)
    return params[0, 0] + experts.shape[0]  # alive until here: phases know only their addresses


@entry("functions", positions=TABLE)
def combine_pairs(pool, functions, y, positions, weights, columns, out):
    """out[t] = sum over k of weights[t, k] * y[positions[t, k]]: the last phase of ``moe_layer`` alone."""
    params, phases = np.empty(act.NUM_PARAMS, np.int64), np.empty((1, PHASE_FIELDS), np.int64)
    items = _set_sum(params, y, positions, weights, columns, out, np.int64(0))
    params[act.C_BIASES] = params[act.C_EXPERT] = 0
    set_phase(phases, 0, functions[F_COMBINE], address_of(params), items, 1)
    carry_out(pool, phases, 4 * positions.size * columns, np.int64(0))
    return params[0]
