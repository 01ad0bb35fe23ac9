"""Attention of single tokens of several sequences, each over its own cache, in one launch.

Shapes: T rows, each one new token of a sequence; H, V, D and G as in attention.py. Matrices are read once for all
rows; each row's heads are computed as ``attention_step`` does it, in the same order, so it has the same bits as alone.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc

from moray.runtime.kernels.atomics import address_of, word
from moray.runtime.kernels.attention import (
    BEFORE,
    DIM,
    HEADS,
    KV_HEADS,
    NUM_FIELDS,
    SCALE,
    attend_heads,
    head_items,
    heads_at_once,
    heads_of_item,
    kind_of_head,
    prepare_head,
    score_bytes,
)
from moray.runtime.kernels.attention_prompt import (
    ATTENDED,
    QUERIES,
    layer_room,
    prompt_bytes,
    set_layer,
)
from moray.runtime.kernels.attention_rows import copy_row
from moray.runtime.kernels.matmul import ITEMS
from moray.runtime.kernels.programs import (
    F_ATTEND_BATCH,
    F_PREPARE_BATCH,
    K_SOURCE_COLUMNS,
    aligned,
    carry_out,
    set_phase,
)
from moray.runtime.kernels.setup import TABLE, entry

# A row's cache, int64 [T, NUM_ROW_FIELDS]: addresses of keys and of values float32 [V, ., D], bytes from head to head,
# and the tokens that the row sees, itself the last.
ROW_KEYS, ROW_VALUES, ROW_HEAD_BYTES, ROW_LENGTH = range(4)
NUM_ROW_FIELDS = 4
# Words of the params of ``prepare_batch`` and ``attend_batch``: a layer's fields, those of attention_prompt.py up to
# ATTENDED, then these. ROW_SCORES: address of the address of each row's scratch.
(BATCH_COSINES, BATCH_SINES, BATCH_ROTARY, ROWS, ROW_SCORES, BATCH_AT_ONCE, BATCH_ITEMS) = range(
    NUM_FIELDS + 5, NUM_FIELDS + 12
)

_PREPARED_AT_ONCE = 16  # heads in a chunk


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def prepare_batch(params, first, last):
    """``prepare_head`` for T rows, each with its own cache. Items: (row, head of any kind).

    Heads lie at QUERIES float32 [T, H, D], where the queries stay, and at NEW_KEYS and NEW_VALUES [T, V, D].
    """
    heads, kv_heads, dim = word(params, HEADS), word(params, KV_HEADS), word(params, DIM)
    rotary = word(params, BATCH_ROTARY)
    for item in range(first, last):
        row, any_head = item // (heads + 2 * kv_heads), item % (heads + 2 * kv_heads)
        kind, head = kind_of_head(params, any_head)
        at = word(params, QUERIES + kind) + 4 * dim * (row * (kv_heads if kind else heads) + head)
        turn = 4 * row * rotary
        prepare_head(
            params, kind, head, at, word(params, BATCH_COSINES) + turn, word(params, BATCH_SINES) + turn, rotary
        )
        if kind:
            cache = word(params, ROWS) + 8 * NUM_ROW_FIELDS * row
            place = head * word(cache, ROW_HEAD_BYTES) + 4 * dim * (word(cache, ROW_LENGTH) - 1)
            copy_row(at, word(cache, ROW_KEYS + kind - 1) + place, dim)


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def attend_batch(params, first, last):
    """``attend_heads`` of each row, into ATTENDED float32 [T, H, D]. Items: (row, BATCH_AT_ONCE query heads)."""
    heads, dim, at_once = word(params, HEADS), word(params, DIM), word(params, BATCH_AT_ONCE)
    items = word(params, BATCH_ITEMS)
    for item in range(first, last):
        row = item // items
        kv_head, head, count = heads_of_item(params, item % items, at_once)
        cache = word(params, ROWS) + 8 * NUM_ROW_FIELDS * row
        length = word(cache, ROW_LENGTH)
        cached = kv_head * word(cache, ROW_HEAD_BYTES)
        scores = word(word(params, ROW_SCORES), row) + head * score_bytes(length)
        place = 4 * dim * (row * heads + head)
        keys, values = word(cache, ROW_KEYS) + cached, word(cache, ROW_VALUES) + cached
        attend_heads(
            word(params, QUERIES) + place, count, keys, values, scores, word(params, ATTENDED) + place, length, dim,
            word(params, SCALE),
        )  # fmt: skip


@entry("functions fields query part weights output norms", rows=TABLE)
def attention_batch(
    pool, functions, fields, query, part, weights, output, output_weight, norms, x, cosines, sines, rotary, rows,
    attended, y, z, scratch,
):  # fmt: skip
    """y = output(attention(x)) for T rows; their keys and values are written to their caches.

    rows: int64 [T, NUM_ROW_FIELDS], above; several rows may be of one cache, each one token longer than the last.
    scratch: ``batch_bytes``. Everything else is as in ``attention_prompt``.
    """
    heads, kv_heads, dim = fields[HEADS], fields[KV_HEADS], fields[DIM]
    num_rows = rows.shape[0]
    params, phases, ends, starts, expert, at = layer_room(num_rows, weights, output_weight)
    num_bytes = set_layer(
        functions, fields, query, part, output, norms, x, num_rows, attended, y, z, scratch, params, phases, ends,
        starts, expert, at,
    )  # fmt: skip
    scores, free, num_keys = (
        np.empty(num_rows, np.int64),
        scratch + aligned(prompt_bytes(fields, query, output, num_rows)),
        0,
    )
    for row in range(num_rows):
        scores[row] = free
        free += heads * score_bytes(rows[row, ROW_LENGTH])
        num_keys += rows[row, ROW_LENGTH]
    middle = params[5]
    middle[BATCH_COSINES], middle[BATCH_SINES], middle[BATCH_ROTARY] = cosines, sines, rotary
    middle[ROWS], middle[ROW_SCORES] = address_of(rows), address_of(scores)
    middle[BATCH_AT_ONCE] = heads_at_once(pool, fields, num_rows)
    middle[BATCH_ITEMS] = head_items(fields, middle[BATCH_AT_ONCE])
    items = num_rows * (heads + 2 * kv_heads)
    set_phase(phases, 5, functions[F_PREPARE_BATCH], address_of(middle), items, _PREPARED_AT_ONCE)
    set_phase(phases, 6, functions[F_ATTEND_BATCH], address_of(middle), num_rows * middle[BATCH_ITEMS], 1)
    num_bytes += 8 * kv_heads * num_keys * dim
    products = num_rows * (heads + 2 * kv_heads) * dim * query[K_SOURCE_COLUMNS] + 2 * heads * dim * num_keys
    carry_out(pool, phases[0 if norms[BEFORE] else 1 :], num_bytes, products)
    # Alive until here: phases know only their addresses.
    return params[0, 0] + starts[0] + expert[0] + at[0, 0] + ends[0] + rows[0, 0] + scores[0]


@entry("fields query output", rows=TABLE)
def batch_bytes(fields, query, output, rows):
    """Scratch of ``attention_batch``."""
    needed = aligned(prompt_bytes(fields, query, output, rows.shape[0]))
    for row in range(rows.shape[0]):
        needed += fields[HEADS] * score_bytes(rows[row, ROW_LENGTH])
    return needed
