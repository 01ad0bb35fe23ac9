"""One launch for new tokens' way through consecutive layers whose attention and MoE block are fused.

Between launches Python runs with cold caches: the weights of a layer are more than they hold.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types

from moray.runtime.kernels import attention, routed
from moray.runtime.kernels.attention import attention_step
from moray.runtime.kernels.attention_batch import attention_batch
from moray.runtime.kernels.programs import K_FIELDS, K_ROWS
from moray.runtime.kernels.routed import CHOSEN, routed_layer
from moray.runtime.kernels.router import pointer
from moray.runtime.kernels.rows import add_row
from moray.runtime.kernels.setup import TABLE, entry

# A layer's row, int64: the fields of its parts one after the other, then single words.
NUM_GATE_FIELDS = 3
ATTENTION, QUERIES, PART, OUTPUT, NORMS, BLOCK, ROUTER, GATE_UP, DOWN, GATE, WORDS = (
    int(place)
    for place in np.cumsum(
        [
            *(0, attention.NUM_FIELDS, K_FIELDS, K_FIELDS, K_FIELDS, attention.NUM_NORMS, routed.NUM_FIELDS),
            *(K_FIELDS, K_FIELDS, K_FIELDS, NUM_GATE_FIELDS),
        ]
    )
)
# Addresses of int64 arrays: the attention's parts, the layer's leases, and what counts its use; or of values.
PARTS_AT, NUM_PARTS, OUTPUT_AT, LEASES, LEASE_COLUMNS, OWNERS, TOKENS, KEYS, VALUES, HEAD_BYTES = range(
    WORDS, WORDS + 10
)
NUM_WORDS = WORDS + 10


@njit(inline="always")
def _array(address, count):
    return carray(pointer(address, np.int64(0)), (count,))


@njit(inline="always")
def _compute_block(
    pool, functions, row, z, num_tokens, chosen, out, scratch, bytes_by_owner, times, used, its_uses
):  # fmt: skip
    """``routed_layer`` of a layer's row. ``its_uses`` int64 [1 + E], written: how many experts were used, which."""
    experts = row[BLOCK + routed.NUM_EXPERTS]
    done = routed_layer(
        pool, functions, row[BLOCK:ROUTER], row[ROUTER:GATE_UP], row[GATE_UP:DOWN], row[DOWN:GATE],
        (row[GATE], row[GATE + 1], row[GATE + 2]),
        carray(pointer(row[LEASES], np.int64(0)), (row[LEASE_COLUMNS], experts)), _array(row[OWNERS], experts),
        _array(row[TOKENS], experts), bytes_by_owner, z, num_tokens, chosen, out, scratch, times, used,
    )  # fmt: skip
    if done:
        for i in range(1 + used[0]):
            its_uses[i] = used[i]
    return done


@entry("functions states bytes_by_owner times", rows=TABLE, chosen=CHOSEN, uses=TABLE)
def layers_step(
    pool, functions, rows, first, cosines, sines, rotary, length, states, attended, z, out, chosen, scratch,
    bytes_by_owner, times, uses,
):  # fmt: skip
    """Layers ``first``, ... of one token, as ``attention_step`` and ``routed_layer`` compute them one by one.

    Returns the first layer whose block could not be computed because an expert is not there, or how many layers there
    are. Of that layer ``chosen`` has ids and weights, as in ``routed_layer``.
    rows: int64 [L, NUM_WORDS]. states: two addresses of float32 [H]; layer l reads its input from states[l % 2] and
    writes its output to the other: where it stops, the sum that its block is to be added to, whose input is in z.
    length: of the cache, the token included. out float32 [H], attended and scratch are for its own use. Added to:
    bytes_by_owner, times (as in routed_layer). uses int64 [L, 1 + E], written: how many experts each layer used, which.
    """
    used = np.empty(2 * uses.shape[1], np.int64)
    for index in range(first, rows.shape[0]):
        row, x, y = rows[index], states[index % 2], states[(index + 1) % 2]
        attention_step(
            pool, functions, row[ATTENTION:QUERIES], row[PART:OUTPUT], _array(row[PARTS_AT], row[NUM_PARTS]),
            row[OUTPUT:NORMS], row[OUTPUT_AT], row[NORMS:BLOCK], x, cosines, sines, rotary, row[KEYS], row[VALUES],
            row[HEAD_BYTES], length, attended, y, z, scratch,
        )  # fmt: skip
        if not _compute_block(
            pool, functions, row, z, np.int64(1), chosen, out, scratch, bytes_by_owner, times, used, uses[index]
        ):  # fmt: skip
            return index
        add_row(y, out, row[DOWN + K_ROWS])
    return rows.shape[0]


@entry("functions states bytes_by_owner times", rows=TABLE, caches=types.int64[:, :, ::1], chosen=CHOSEN, uses=TABLE)
def layers_batch(
    pool, functions, rows, first, cosines, sines, rotary, caches, states, attended, z, out, chosen, scratch,
    bytes_by_owner, times, uses,
):  # fmt: skip
    """As ``layers_step``, for T new tokens, each of its sequence: states, z and out float32 [T, H].

    caches: int64 [L, T, NUM_ROW_FIELDS], as in attention_batch.py.
    """
    used = np.empty(2 * uses.shape[1], np.int64)
    num_tokens = caches.shape[1]
    for index in range(first, rows.shape[0]):
        row, x, y = rows[index], states[index % 2], states[(index + 1) % 2]
        attention_batch(
            pool, functions, row[ATTENTION:QUERIES], row[QUERIES:PART], row[PART:OUTPUT],
            _array(row[PARTS_AT], row[NUM_PARTS]), row[OUTPUT:NORMS], row[OUTPUT_AT], row[NORMS:BLOCK], x, cosines,
            sines, rotary, caches[index], attended, y, z, scratch,
        )  # fmt: skip
        if not _compute_block(
            pool, functions, row, z, num_tokens, chosen, out, scratch, bytes_by_owner, times, used, uses[index]
        ):  # fmt: skip
            return index
        add_row(y, out, num_tokens * row[DOWN + K_ROWS])
    return rows.shape[0]
