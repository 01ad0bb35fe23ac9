"""Attention of a prompt, or of a part of one, in one launch: what attention.py does for one token.

Shapes: T new tokens after others, N tokens in the cache, these included; H, V, D and G as in attention.py. A head of
keys goes with G of queries, so its T * G rows of queries lie in tiles (attention_tiles.py) of 32, token after token.

Scores are never held for more than 64 keys and 32 rows: the softmax goes on from block to block of keys (Dao et al.,
"FlashAttention", 2022), so a thread needs (256 D + 9,000) bytes of stack whatever N is. Blocks start at
multiples of 64: a token's result has the same bits however a prompt is cut into parts of 2 tokens or more.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit

from moray.runtime.kernels import activation as act
from moray.runtime.kernels import matmul as mm
from moray.runtime.kernels.atomics import address_of, store_int64, word
from moray.runtime.kernels.attention import (
    AFTER,
    AFTER_EPSILON,
    BEFORE,
    BEFORE_EPSILON,
    DIM,
    HEADS,
    KV_HEADS,
    NUM_FIELDS,
    O_BIAS,
    SCALE,
    kind_of_head,
    prepare_head,
)
from moray.runtime.kernels.attention_rows import copy_row
from moray.runtime.kernels.attention_tiles import (
    COLUMN_BYTES,
    ROWS,
    load_tile,
    mix_tile,
    score_tile,
    softmax_tile,
    stack_memory,
    start_tile,
    store_int32,
    store_tile,
)
from moray.runtime.kernels.matmul import ITEMS
from moray.runtime.kernels.pool import PHASE_FIELDS
from moray.runtime.kernels.programs import (
    F_ATTEND_TILES,
    F_FINISH_ROWS,
    F_NORMALIZE,
    F_PACK,
    F_PREPARE_ROWS,
    K_BLOCK_BYTES,
    K_ITEMS,
    K_ROWS,
    K_SOURCE_COLUMNS,
    aligned,
    carry_out,
    chunk_of,
    panel_bytes,
    set_phase,
    set_product,
    set_rows,
)
from moray.runtime.kernels.rows import add_row, rms_row
from moray.runtime.kernels.setup import entry

# Words of the params of ``prepare_rows`` and ``attend_tiles``: a layer's fields (attention.py), then these.
QUERIES, NEW_KEYS, NEW_VALUES, NUM_TOKENS, ATTENDED, COSINES, SINES, ROTARY, KEYS, VALUES, HEAD_BYTES, LENGTH = range(
    NUM_FIELDS, NUM_FIELDS + 12
)
NUM_PARAMS = NUM_FIELDS + 12
# And of ``finish_rows``; SUM_X, SUM_BIAS and SUM_NORM may be 0.
SUM_Y, SUM_X, SUM_BIAS, SUM_NORM, SUM_EPSILON, SUM_Z, SUM_COLUMNS = range(7)
NUM_ENDS = 7

_KEYS_AT_ONCE = 64
_PREPARED_AT_ONCE, _SUMMED_AT_ONCE = 64, 8  # rows in a chunk


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def prepare_rows(params, first, last):
    """``prepare_head`` for T tokens; keys and values go into the cache. Items: (head of any kind, token).

    Heads lie at QUERIES float32 [T, H, D], where the queries stay, and at NEW_KEYS and NEW_VALUES [T, V, D].
    """
    heads, kv_heads, dim = word(params, HEADS), word(params, KV_HEADS), word(params, DIM)
    num_tokens, rotary = word(params, NUM_TOKENS), word(params, ROTARY)
    for item in range(first, last):
        any_head, token = item // num_tokens, item % num_tokens
        kind, head = kind_of_head(params, any_head)
        row = word(params, QUERIES + kind) + 4 * dim * (token * (kv_heads if kind else heads) + head)
        at = 4 * token * rotary
        prepare_head(params, kind, head, row, word(params, COSINES) + at, word(params, SINES) + at, rotary)
        if kind:
            place = word(params, LENGTH) - num_tokens + token
            copy_row(row, word(params, KEYS + kind - 1) + head * word(params, HEAD_BYTES) + 4 * dim * place, dim)


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def attend_tiles(params, first, last):
    """softmax(scale * q . k) v of prepared queries over the keys up to their own, into ATTENDED float32 [T, H, D].

    Items: (head of keys, tile of its rows of queries), a head's last first: they take longest.
    """
    heads, kv_heads, dim = word(params, HEADS), word(params, KV_HEADS), word(params, DIM)
    num_tokens, length = word(params, NUM_TOKENS), word(params, LENGTH)
    group = heads // kv_heads
    num_rows = num_tokens * group
    num_tiles = (num_rows + ROWS - 1) // ROWS
    # A tile of the queries and of what they mix, scores, four columns, and the addresses of rows.
    queries = stack_memory((2 * dim + _KEYS_AT_ONCE + 4) * COLUMN_BYTES + 16 * ROWS)
    mixed = queries + dim * COLUMN_BYTES
    scores = mixed + dim * COLUMN_BYTES
    seen = scores + _KEYS_AT_ONCE * COLUMN_BYTES
    largest, totals, factors = seen + COLUMN_BYTES, seen + 2 * COLUMN_BYTES, seen + 3 * COLUMN_BYTES
    sources = seen + 4 * COLUMN_BYTES
    targets = sources + 8 * ROWS
    for item in range(first, last):
        head, tile = item // num_tiles, num_tiles - 1 - item % num_tiles
        left, end = num_rows - tile * ROWS, 0
        for lane in range(ROWS):
            row = min(tile * ROWS + lane, num_rows - 1)  # lanes that are left over repeat the last row
            token = row // group
            at = 4 * dim * (token * heads + head * group + row % group)
            end = length - num_tokens + token + 1
            store_int64(sources + 8 * lane, word(params, QUERIES) + at)
            store_int64(targets + 8 * lane, word(params, ATTENDED) + at)
            store_int32(end, seen + 4 * lane)
        load_tile(left, sources, queries, dim)
        start_tile(mixed, largest, totals, dim)
        for key in range(0, end, _KEYS_AT_ONCE):
            # Whole eights are quicker; a lane's own limit leaves out what is too many.
            count = min(_KEYS_AT_ONCE, (end - key + 7) // 8 * 8, length - key)
            at = head * word(params, HEAD_BYTES) + 4 * dim * key
            score_tile(left, word(params, KEYS) + at, queries, scores, count, dim, word(params, SCALE))
            softmax_tile(left, scores, count, key, seen, largest, totals, factors)
            mix_tile(left, word(params, VALUES) + at, scores, mixed, factors, count, dim)
        store_tile(left, mixed, totals, targets, dim)


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def finish_rows(params, first, last):
    """y = y + bias + x and z = norm(y), each part if it is there. Items: rows of y float32 [T, C], written."""
    columns = word(params, SUM_COLUMNS)
    for row in range(first, last):
        at = 4 * row * columns
        y = word(params, SUM_Y) + at
        if word(params, SUM_BIAS):
            add_row(y, word(params, SUM_BIAS), columns)
        if word(params, SUM_X):
            add_row(y, word(params, SUM_X) + at, columns)
        if word(params, SUM_NORM):
            rms_row(y, word(params, SUM_NORM), word(params, SUM_Z) + at, columns, word(params, SUM_EPSILON))


@njit(inline="always")
def _set_pack(phases, p, functions, params, kernel, source, panels, starts, expert):
    """Phase p: all rows at ``source`` into panels."""
    width, num_rows = kernel[K_SOURCE_COLUMNS], expert.shape[0]
    at = (address_of(starts), address_of(expert))
    items = set_rows(params, kernel, source, np.int64(0), width, width, panels, num_rows, *at)
    set_phase(phases, p, functions[F_PACK], address_of(params), items, 1)


@njit(inline="always")
def _set_matrix(phases, p, params, kernel, packed, weights, starts, y):
    """Phase p: y = the panels that ``packed`` names, times one matrix. Returns the bytes of the matrix."""
    items = set_product(params, kernel, packed, address_of(weights), address_of(starts), np.int64(1), y)
    set_phase(phases, p, kernel[K_ITEMS], address_of(params), items, chunk_of(kernel[K_BLOCK_BYTES]))
    return items * kernel[K_BLOCK_BYTES]


@njit(nogil=True, cache=True)
def layer_room(num_tokens, weights, output_weight):
    """What ``set_layer`` fills, to be kept until the program is done: params, phases, ends, and what they point to."""
    params = np.empty((8, max(act.NUM_PARAMS, NUM_PARAMS, mm.NUM_PARAMS)), np.int64)
    phases, ends = np.empty((10, PHASE_FIELDS), np.int64), np.empty(NUM_ENDS, np.int64)
    # One "expert", whose pairs are the tokens.
    starts, expert = np.zeros(2, np.int64), np.zeros(num_tokens, np.int64)
    starts[1] = num_tokens
    at = np.empty((4, 1), np.int64)
    at[0, 0], at[1, 0], at[2, 0], at[3, 0] = weights[0], weights[-2], weights[-1], output_weight
    return params, phases, ends, starts, expert, at


@njit(nogil=True, cache=True)
def set_layer(
    functions, fields, query, part, output, norms, x, num_tokens, attended, y, z, scratch, params, phases, ends,
    starts, expert, at,
):  # fmt: skip
    """All phases of T tokens' attention but 5 and 6, which the caller adds: what is between projections and output.

    Their params, params[5], have the fields, and the addresses of projections and of ``attended``. Without norms
    phase 0 is to be left out. Returns the bytes of the matrices.
    """
    heads, kv_heads, dim = fields[HEADS], fields[KV_HEADS], fields[DIM]
    columns, source, has_norms = query[K_SOURCE_COLUMNS], x, norms[BEFORE] != 0
    queries = scratch + aligned(4 * num_tokens * columns)
    new_keys = queries + aligned(4 * num_tokens * heads * dim)
    new_values = new_keys + aligned(4 * num_tokens * kv_heads * dim)
    panels = new_values + aligned(4 * num_tokens * kv_heads * dim)  # of x, then of the attended rows
    if has_norms:
        source = scratch
        params[0, act.N_X], params[0, act.N_WEIGHT], params[0, act.N_OUT] = x, norms[BEFORE], source
        params[0, act.N_COLUMNS], params[0, act.N_EPSILON] = columns, norms[BEFORE_EPSILON]
        set_phase(phases, 0, functions[F_NORMALIZE], address_of(params[0]), num_tokens, _SUMMED_AT_ONCE)
    _set_pack(phases, 1, functions, params[1], query, source, panels, starts, expert)
    num_bytes = _set_matrix(phases, 2, params[2], query, params[1], at[0], starts, queries)
    num_bytes += _set_matrix(phases, 3, params[3], part, params[1], at[1], starts, new_keys)
    num_bytes += _set_matrix(phases, 4, params[4], part, params[1], at[2], starts, new_values)
    middle = params[5]
    for field in range(NUM_FIELDS):
        middle[field] = fields[field]
    middle[QUERIES], middle[NEW_KEYS], middle[NEW_VALUES] = queries, new_keys, new_values
    middle[NUM_TOKENS], middle[ATTENDED] = num_tokens, attended
    _set_pack(phases, 7, functions, params[6], output, attended, panels, starts, expert)
    num_bytes += _set_matrix(phases, 8, params[7], output, params[6], at[3], starts, y)
    ends[SUM_Y], ends[SUM_X], ends[SUM_BIAS], ends[SUM_Z] = y, x * has_norms, fields[O_BIAS], z
    ends[SUM_NORM], ends[SUM_EPSILON], ends[SUM_COLUMNS] = norms[AFTER], norms[AFTER_EPSILON], output[K_ROWS]
    set_phase(phases, 9, functions[F_FINISH_ROWS], address_of(ends), num_tokens, _SUMMED_AT_ONCE)
    return num_bytes


@njit(inline="always")
def num_attend_items(fields, num_tokens):
    """Items of ``attend_tiles``."""
    heads, kv_heads = fields[HEADS], fields[KV_HEADS]
    return kv_heads * ((num_tokens * (heads // kv_heads) + ROWS - 1) // ROWS)


@entry("functions fields query part weights output norms")
def attention_prompt(
    pool, functions, fields, query, part, weights, output, output_weight, norms, x, num_tokens, cosines, sines,
    rotary, keys, values, head_bytes, length, attended, y, z, scratch,
):  # fmt: skip
    """y = output(attention(x)) for T tokens; their keys and values are written to the cache.

    With norms, where BEFORE is not 0: y = x + output(attention(before(x))), z = after(y): the first half of a layer.

    fields and norms: as in ``attention_step``; query and part: kernels of the queries' matrix, and of the keys' and
    the values'; weights: int64, the addresses of the queries' first, of the keys' and the values' last. x float32
    [T, C], cosines and sines float32 [T, rotary], keys and values (the cache's buffers, float32 [V, ., D], head_bytes
    from head to head, ``length`` tokens with the new ones), attended float32 [T, H, D], y and z float32 [T, R],
    written, and scratch (``prompt_bytes``) by address.
    """
    heads, kv_heads, dim = fields[HEADS], fields[KV_HEADS], fields[DIM]
    params, phases, ends, starts, expert, at = layer_room(num_tokens, weights, output_weight)
    middle = params[5]
    num_bytes = set_layer(
        functions, fields, query, part, output, norms, x, num_tokens, attended, y, z, scratch, params, phases, ends,
        starts, expert, at,
    )  # fmt: skip
    middle[COSINES], middle[SINES], middle[ROTARY] = cosines, sines, rotary
    middle[KEYS], middle[VALUES], middle[HEAD_BYTES], middle[LENGTH] = keys, values, head_bytes, length
    rows = (heads + 2 * kv_heads) * num_tokens
    set_phase(phases, 5, functions[F_PREPARE_ROWS], address_of(middle), rows, _PREPARED_AT_ONCE)
    items = num_attend_items(fields, num_tokens)
    set_phase(phases, 6, functions[F_ATTEND_TILES], address_of(middle), items, 1)
    products = num_tokens * ((heads + 2 * kv_heads) * dim * query[K_SOURCE_COLUMNS] + 2 * heads * dim * length)
    carry_out(pool, phases[0 if norms[BEFORE] else 1 :], num_bytes, products)
    # Alive until here: phases know only their addresses.
    return params[0, 0] + starts[0] + expert[0] + at[0, 0] + ends[0]


@entry("fields query output")
def prompt_bytes(fields, query, output, num_tokens):
    """Scratch of ``attention_prompt``."""
    heads, kv_heads, dim = fields[HEADS], fields[KV_HEADS], fields[DIM]
    rows = query[K_SOURCE_COLUMNS] + (heads + 2 * kv_heads) * dim
    panels = max(panel_bytes(query, num_tokens), panel_bytes(output, num_tokens))
    return aligned(4 * num_tokens * rows) + 4 * 64 + panels
