"""One launch for the attention of one new token: projections, norms, rotary embedding, cache, softmax, output.

Shapes: H query heads, V heads of keys and of values, D their width, a multiple of 16; G = H / V; N tokens in the
cache, the new one included.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit

from moray.runtime.kernels import activation as act
from moray.runtime.kernels import matmul as mm
from moray.runtime.kernels.atomics import address_of, word
from moray.runtime.kernels.attention_rows import (
    PADDING,
    copy_row,
    divide_row,
    mix_values,
    rotate_row,
    score_keys,
    softmax_row,
    store_float,
)
from moray.runtime.kernels.matmul import ITEMS
from moray.runtime.kernels.pool import PHASE_FIELDS, num_threads
from moray.runtime.kernels.programs import (
    F_ATTEND,
    F_PACK,
    F_PREPARE_HEADS,
    K_BLOCK_BYTES,
    K_COLUMNS,
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
from moray.runtime.kernels.rows import add_row, rms_row, store_zero
from moray.runtime.kernels.setup import entry

# What a layer's attention is, int64: ops_fused.AttentionKernel.
HEADS, KV_HEADS, DIM, SCALE, EPSILON, Q_NORM, K_NORM, Q_BIAS, K_BIAS, V_BIAS, O_BIAS = range(11)
NUM_FIELDS = 11
# Words of the params of ``prepare_heads`` and ``attend``: these, then where this token's data are.
(PROJECTED, COSINES, SINES, ROTARY, KEYS, VALUES, HEAD_BYTES, LENGTH, SCORES, ATTENDED, AT_ONCE) = range(11, 22)
NUM_PARAMS = 22
# The norms around it, int64: addresses of their weights, and the bits of their epsilons.
BEFORE, AFTER, BEFORE_EPSILON, AFTER_EPSILON = range(4)
NUM_NORMS = 4

_AT_ONCE = 8  # query heads in an item, at most
_BLOCK = 32  # keys, or values, that stay in the nearest cache for all of them
_PADDING_BITS = int(np.float32(PADDING).view(np.int32))


@njit(inline="always")
def score_bytes(length):
    """Scratch of a head: scores, padded to 16 of them, and a line for their sum."""
    return (length + 15) // 16 * 64 + 64


@njit(nogil=True, cache=True)
def kind_of_head(params, head):
    """0, 1 or 2: queries, keys or values; and the head's number among these. ``head`` counts all, in this order."""
    heads, kv_heads = word(params, HEADS), word(params, KV_HEADS)
    kind = 0 if head < heads else 1 if head < heads + kv_heads else 2
    return kind, head - (0, heads, heads + kv_heads)[kind]


@njit(nogil=True, cache=True)
def prepare_head(params, kind, head, row, cosines, sines, rotary):
    """A token's head float32 [D], in place: its bias; for queries and keys also norm and rotary embedding."""
    dim = word(params, DIM)
    bias = word(params, Q_BIAS + kind)
    if bias:
        add_row(row, bias + 4 * head * dim, dim)
    if kind < 2:
        norm = word(params, Q_NORM + kind)
        if norm:
            rms_row(row, norm, row, dim, word(params, EPSILON))
        rotate_row(row, cosines, sines, rotary // 2)


@njit(nogil=True, cache=True)
def attend_heads(query, count, keys, values, scores, out, length, dim, scale):
    """out [count, D] = softmax(scale * q . k) v of query heads that share keys and values; all by address.

    scores: scratch of ``score_bytes`` for each. How many heads there are changes no head's bits.
    """
    padded, each = (length + 15) // 16 * 16, score_bytes(length)
    for first in range(0, length, _BLOCK):
        rows = min(_BLOCK, length - first)
        score_keys(query, count, 4 * dim, keys + 4 * dim * first, scores + 4 * first, each, rows, dim, scale)
    for head in range(count):
        at = scores + head * each
        for j in range(length, padded):
            store_float(_PADDING_BITS, at + 4 * j)
        softmax_row(at, padded, at + 4 * padded)
        for i in range(dim):
            store_zero(out + 4 * (head * dim + i))
    for first in range(0, length, _BLOCK):
        rows = min(_BLOCK, length - first)
        mix_values(scores + 4 * first, count, each, values + 4 * dim * first, out, 4 * dim, rows, dim)
    for head in range(count):
        divide_row(out + 4 * head * dim, dim, scores + head * each + 4 * padded)


@njit(inline="always")
def head_items(fields, at_once):
    """Items of a row: its heads, ``at_once`` of them."""
    group = fields[HEADS] // fields[KV_HEADS]
    return fields[KV_HEADS] * ((group + at_once - 1) // at_once)


@njit(inline="always")
def heads_at_once(pool, fields, num_rows):
    """How many query heads an item has: 8 of those that share keys, or fewer where threads would have nothing to do."""
    group = fields[HEADS] // fields[KV_HEADS]
    wanted, at_once = 2 * num_threads(pool), min(_AT_ONCE, group)
    while at_once > 1 and num_rows * head_items(fields, at_once) < wanted:
        at_once //= 2
    return at_once


@njit(nogil=True, cache=True)
def heads_of_item(params, item, at_once):
    """The head of keys and values of an item, its first query head, and how many it has."""
    group = word(params, HEADS) // word(params, KV_HEADS)
    parts = (group + at_once - 1) // at_once
    kv_head, first = item // parts, item % parts * at_once
    return kv_head, kv_head * group + first, min(at_once, group - first)


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def prepare_heads(params, first, last):
    """``prepare_head`` for the new token; keys and values go into the cache.

    Items: query heads, then heads of keys, then of values, as they lie in PROJECTED float32 [H + 2 V, D].
    """
    dim = word(params, DIM)
    to_new = 4 * dim * (word(params, LENGTH) - 1)
    for item in range(first, last):
        row = word(params, PROJECTED) + 4 * item * dim
        kind, head = kind_of_head(params, item)
        prepare_head(params, kind, head, row, word(params, COSINES), word(params, SINES), word(params, ROTARY))
        if kind:
            copy_row(row, word(params, KEYS + kind - 1) + head * word(params, HEAD_BYTES) + to_new, dim)


@cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")
def attend(params, first, last):
    """``attend_heads`` of a token, into ATTENDED float32 [H, D]. Items: AT_ONCE query heads."""
    dim, length = word(params, DIM), word(params, LENGTH)
    for item in range(first, last):
        kv_head, head, count = heads_of_item(params, item, word(params, AT_ONCE))
        cached = kv_head * word(params, HEAD_BYTES)
        scores = word(params, SCORES) + head * score_bytes(length)
        query, out = word(params, PROJECTED) + 4 * head * dim, word(params, ATTENDED) + 4 * head * dim
        keys, values = word(params, KEYS) + cached, word(params, VALUES) + cached
        attend_heads(query, count, keys, values, scores, out, length, dim, word(params, SCALE))


@entry("functions fields qkv weights output norms")
def attention_step(
    pool, functions, fields, qkv, weights, output, output_weight, norms, x, cosines, sines, rotary, keys, values,
    head_bytes, length, attended, y, z, scratch,
):  # fmt: skip
    """y = output(attention(x)) for one token; its key and value are written to the cache.

    With norms, where BEFORE is not 0: y = x + output(attention(before(x))), z = after(y): the first half of a layer.

    fields: int64 [NUM_FIELDS]; qkv: the kernel of a matrix of V * D rows, of which the projections are made: weights
    int64 [G + 2], the addresses of the queries' matrix in G parts, the keys' and the values'. x float32 [C], cosines
    and sines float32 [rotary], keys and values (the cache's buffers, float32 [V, ., D], head_bytes from head to
    head), attended float32 [H, D], y and z float32 [R], written, and scratch (``step_bytes``) by address.
    """
    num_parts, dim = weights.shape[0], fields[DIM]
    heads, kv_heads = fields[HEADS], fields[KV_HEADS]
    columns, source = qkv[K_SOURCE_COLUMNS], x
    projected = scratch + aligned(4 * columns)
    if norms[BEFORE]:
        source = scratch
        rms_row(x, norms[BEFORE], source, columns, norms[BEFORE_EPSILON])
    x_panels = projected + aligned(4 * (heads + 2 * kv_heads) * dim)
    scores = x_panels + panel_bytes(qkv, num_parts)
    o_panels = scores + heads * score_bytes(length)
    params = np.empty((5, max(act.NUM_PARAMS, NUM_PARAMS, mm.NUM_PARAMS)), np.int64)
    phases = np.empty((6, PHASE_FIELDS), np.int64)
    # Each part of the projections is an "expert" of one pair, and each pair is the same row of x.
    starts, same_row = np.empty(num_parts + 1, np.int64), np.zeros(num_parts, np.int64)
    for part in range(num_parts + 1):
        starts[part] = part
    part_of_pair = expert_of_pair(starts)
    # Of the output there is one "expert", number 0, whose pair is the only row.
    one_row, output_at = np.int64(1), np.empty(1, np.int64)
    output_at[0] = output_weight

    items = set_rows(
        params[0], qkv, source, address_of(same_row), columns, columns, x_panels, num_parts, address_of(starts),
        address_of(part_of_pair),
    )  # fmt: skip
    set_phase(phases, 0, functions[F_PACK], address_of(params[0]), items, 1)
    items = set_product(params[1], qkv, params[0], address_of(weights), address_of(starts), num_parts, projected)
    set_phase(phases, 1, qkv[K_ITEMS], address_of(params[1]), items, chunk_of(qkv[K_BLOCK_BYTES]))
    num_bytes = items * qkv[K_BLOCK_BYTES] + 8 * kv_heads * length * dim
    for field in range(NUM_FIELDS):
        params[2, field] = fields[field]
    params[2, PROJECTED], params[2, COSINES], params[2, SINES], params[2, ROTARY] = projected, cosines, sines, rotary
    params[2, KEYS], params[2, VALUES], params[2, HEAD_BYTES], params[2, LENGTH] = keys, values, head_bytes, length
    params[2, SCORES], params[2, ATTENDED], params[2, AT_ONCE] = scores, attended, heads_at_once(pool, fields, 1)
    set_phase(phases, 2, functions[F_PREPARE_HEADS], address_of(params[2]), heads + 2 * kv_heads, 4)
    set_phase(phases, 3, functions[F_ATTEND], address_of(params[2]), head_items(fields, params[2, AT_ONCE]), 1)
    items = set_rows(
        params[3], output, attended, np.int64(0), output[K_SOURCE_COLUMNS], output[K_SOURCE_COLUMNS], o_panels,
        one_row, address_of(starts), address_of(same_row),
    )  # fmt: skip
    set_phase(phases, 4, functions[F_PACK], address_of(params[3]), items, 1)
    items = set_product(params[4], output, params[3], address_of(output_at), address_of(starts), one_row, y)
    set_phase(phases, 5, output[K_ITEMS], address_of(params[4]), items, chunk_of(output[K_BLOCK_BYTES]))
    num_bytes += items * output[K_BLOCK_BYTES]
    carry_out(pool, phases, num_bytes, num_parts * qkv[K_ROWS] * qkv[K_COLUMNS] + 2 * heads * dim * length)
    if fields[O_BIAS]:
        add_row(y, fields[O_BIAS], output[K_ROWS])
    if norms[BEFORE]:
        add_row(y, x, columns)
        rms_row(y, norms[AFTER], z, columns, norms[AFTER_EPSILON])
    # Alive until here: phases know only their addresses.
    return params[0, 0] + starts[0] + same_row[0] + part_of_pair[0] + output_at[0]


@entry("fields qkv output")
def step_bytes(fields, qkv, output, num_parts, length):
    """Scratch of ``attention_step``."""
    heads, kv_heads, dim = fields[HEADS], fields[KV_HEADS], fields[DIM]
    projected = aligned(4 * (heads + 2 * kv_heads) * dim) + aligned(4 * qkv[K_SOURCE_COLUMNS])
    return projected + panel_bytes(qkv, num_parts) + heads * score_bytes(length) + panel_bytes(output, 1)
