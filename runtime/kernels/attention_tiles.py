"""Attention of many queries, as LLVM's intermediate form: 32 queries side by side in lanes, keys one after another.

A *tile* is 32 rows of queries, turned on their side: a column of it, and of everything made from it (scores, sums,
results), is 2 vectors of 16 lanes. Keys and values are read as they lie in the cache, one float at a time into all
lanes, so nothing is summed across lanes. A tile of no more than 16 rows is left without its second vector.

Strict float32 in a stated order, as in rows.py: each lane's result depends on its own query and on the keys that it
sees only, however tiles are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moray.runtime.kernels.attention_rows import PADDING
from moray.runtime.kernels.rows import LANES, const_floats, exp, store
from moray.runtime.kernels.vectors import F32, I32, I64, VF32, VI32, broadcast, load, offset, splat

VECTORS = 2
ROWS = VECTORS * LANES  # of queries in a tile
COLUMN_BYTES = 4 * ROWS
_WIDTHS = (8, 1)  # keys, or columns of values, at once: 16 sums fit AVX-512's registers
_CACHE_LINE = 64


@intrinsic
def stack_memory(typingctx: Any, num_bytes: Any) -> Any:
    """Address of memory on the stack, aligned to a cache line, until the calling function returns."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = builder.alloca(ir.IntType(8), size=builder.add(args[0], I64(_CACHE_LINE)))
        end = builder.add(builder.ptrtoint(memory, I64), I64(_CACHE_LINE - 1))
        return builder.and_(end, I64(-_CACHE_LINE))

    return types.int64(types.int64), codegen


def _by_vectors(builder: ir.IRBuilder, num_rows: ir.Value, emit: Callable[[int], None]) -> None:
    """``emit(vectors)``: as many as hold ``num_rows``."""
    with builder.if_else(builder.icmp_signed(">", num_rows, I64(LANES))) as (both, one):
        with both:
            emit(VECTORS)
        with one:
            emit(1)


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Sixteen vectors of 16 as the columns of what they were the rows of."""
    rows, apart = list(rows), 1
    while apart < LANES:
        # Of lanes 0..31 of two rows together: blocks of ``apart`` lanes change places.
        upper = [lane + (LANES - apart) * bool(lane & apart) for lane in range(LANES)]
        lower = [lane + apart if not lane & apart else lane + LANES for lane in range(LANES)]
        for first in (i for i in range(LANES) if not i & apart):
            pair = rows[first], rows[first + apart]
            for place, pick in ((first, upper), (first + apart, lower)):
                rows[place] = builder.shuffle_vector(*pair, ir.Constant(VI32, pick))
        apart *= 2
    return rows


Square = Callable[[list[ir.Value], int, ir.Value], None]


def _for_each_square(
    builder: ir.IRBuilder, vectors: int, table: ir.Value, dim: ir.Value, whole: Square, part: Square
) -> None:
    """``whole(rows, vector, byte)`` for every 16 columns of 16 rows, and ``part`` for each of a few columns left.

    ``rows`` are addresses of 16 columns, or of one, of the rows that ``table`` names; ``vector`` is the number of
    these rows' vector in a column, ``byte`` where the first column lies in the tile.
    """
    for vector in range(vectors):
        starts = [load(builder, offset(builder, table, 8 * (LANES * vector + lane)), I64) for lane in range(LANES)]
        even = builder.and_(dim, I64(-LANES))
        for first, last, columns, emit in ((I64(0), even, LANES, whole), (even, dim, 1, part)):
            with cgutils.for_range_slice(builder, first, last, I64(columns), inc=True) as (column, _):
                rows = [builder.add(start, builder.mul(column, I64(4))) for start in starts]
                emit(rows, vector, builder.add(builder.mul(column, I64(COLUMN_BYTES)), I64(4 * LANES * vector)))


@intrinsic
def load_tile(typingctx: Any, num_rows: Any, table: Any, tile: Any, dim: Any) -> Any:
    """tile [dim, 32] = the rows float32 [dim] whose 32 addresses are at ``table``."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        num_rows, table, tile, dim = args

        def whole(rows: list[ir.Value], vector: int, byte: ir.Value) -> None:
            columns = _transposed(builder, [load(builder, row, VF32) for row in rows])
            for c, column in enumerate(columns):
                store(builder, column, offset(builder, builder.add(tile, byte), c * COLUMN_BYTES))

        def part(rows: list[ir.Value], vector: int, byte: ir.Value) -> None:
            for lane, row in enumerate(rows):
                store(builder, load(builder, row, F32), offset(builder, builder.add(tile, byte), 4 * lane))

        _by_vectors(builder, num_rows, lambda vectors: _for_each_square(builder, vectors, table, dim, whole, part))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def store_tile(typingctx: Any, num_rows: Any, tile: Any, totals: Any, table: Any, dim: Any) -> Any:
    """The rows whose addresses are at ``table`` = tile [dim, 32] / totals [32]."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        num_rows, tile, totals, table, dim = args
        inverses = []
        for vector in range(VECTORS):
            total = load(builder, offset(builder, totals, 4 * LANES * vector), VF32)
            inverses.append(builder.fdiv(const_floats(1.0, LANES), total))

        def column(vector: int, byte: ir.Value, c: int) -> ir.Value:
            at = offset(builder, builder.add(tile, byte), c * COLUMN_BYTES)
            return builder.fmul(load(builder, at, VF32), inverses[vector])

        def whole(rows: list[ir.Value], vector: int, byte: ir.Value) -> None:
            columns = [column(vector, byte, c) for c in range(LANES)]
            for row, values in zip(rows, _transposed(builder, columns), strict=True):
                store(builder, values, row)

        def part(rows: list[ir.Value], vector: int, byte: ir.Value) -> None:
            values = column(vector, byte, 0)
            for lane, row in enumerate(rows):
                store(builder, builder.extract_element(values, I32(lane)), row)

        _by_vectors(builder, num_rows, lambda vectors: _for_each_square(builder, vectors, table, dim, whole, part))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


def _emit_products(
    builder: ir.IRBuilder,
    sums: list[list[ir.Value]],
    floats: list[ir.Value],
    step_bytes: ir.Value,
    columns: ir.Value,
    count: ir.Value,
) -> None:
    """sums[m][vector] += float m of step s * column s, for ``count`` steps, ``step_bytes`` apart for the floats."""
    with cgutils.for_range(builder, count) as loop:
        column = builder.add(columns, builder.mul(loop.index, I64(COLUMN_BYTES)))
        values = [load(builder, offset(builder, column, 4 * LANES * v), VF32) for v in range(len(sums[0]))]
        step = builder.mul(loop.index, step_bytes)
        for at, totals in zip(floats, sums, strict=True):
            factor = broadcast(builder, builder.add(at, step), F32)
            for value, total in zip(values, totals, strict=True):
                builder.store(builder.fadd(builder.load(total), builder.fmul(value, factor)), total)


def _by_width(builder: ir.IRBuilder, count: ir.Value, emit: Any) -> None:
    """``emit(index, width)`` for everything from 0 to ``count``, several at once while there are."""
    first: ir.Value = I64(0)
    for width in _WIDTHS:
        last = builder.add(first, builder.and_(builder.sub(count, first), I64(-width)))
        with cgutils.for_range_slice(builder, first, last, I64(width), inc=True) as (index, _):
            emit(index, width)
        first = last


@intrinsic
def score_tile(
    typingctx: Any, num_rows: Any, keys: Any, queries: Any, scores: Any, count: Any, dim: Any, scale: Any
) -> Any:
    """scores [count, 32] = scale * (keys [count, dim] . queries [dim, 32]); scale: a float32's bits."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        num_rows, keys, queries, scores, count, dim, scale = args
        factor = splat(builder, builder.bitcast(builder.trunc(scale, I32), F32))
        key_bytes = builder.mul(dim, I64(4))

        def emit(vectors: int, key: ir.Value, width: int) -> None:
            sums = [[cgutils.alloca_once(builder, VF32) for _ in range(vectors)] for _ in range(width)]
            for total in (total for totals in sums for total in totals):
                builder.store(const_floats(0.0, LANES), total)
            floats = [builder.add(keys, builder.mul(offset(builder, key, m), key_bytes)) for m in range(width)]
            _emit_products(builder, sums, floats, I64(4), queries, dim)
            to = builder.add(scores, builder.mul(key, I64(COLUMN_BYTES)))
            for m, totals in enumerate(sums):
                for v, total in enumerate(totals):
                    at = offset(builder, to, m * COLUMN_BYTES + 4 * LANES * v)
                    store(builder, builder.fmul(builder.load(total), factor), at)

        _by_vectors(builder, num_rows, lambda vectors: _by_width(builder, count, partial(emit, vectors)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def mix_tile(
    typingctx: Any, num_rows: Any, values: Any, weights: Any, mixed: Any, factors: Any, count: Any, dim: Any
) -> Any:
    """mixed [dim, 32] = mixed * factors [32] + values [count, dim]^T . weights [count, 32], key after key."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        num_rows, values, weights, mixed, factors, count, dim = args
        value_bytes = builder.mul(dim, I64(4))

        def emit(vectors: int, column: ir.Value, width: int) -> None:
            to = builder.add(mixed, builder.mul(column, I64(COLUMN_BYTES)))
            places = [
                [offset(builder, to, COLUMN_BYTES * m + 4 * LANES * v) for v in range(vectors)] for m in range(width)
            ]
            sums = [[cgutils.alloca_once(builder, VF32) for _ in range(vectors)] for _ in range(width)]
            for v in range(vectors):
                factor = load(builder, offset(builder, factors, 4 * LANES * v), VF32)
                for m in range(width):
                    builder.store(builder.fmul(load(builder, places[m][v], VF32), factor), sums[m][v])
            first = builder.add(values, builder.mul(column, I64(4)))
            _emit_products(
                builder, sums, [offset(builder, first, 4 * m) for m in range(width)], value_bytes, weights, count
            )
            for m in range(width):
                for place, total in zip(places[m], sums[m], strict=True):
                    store(builder, builder.load(total), place)

        _by_vectors(builder, num_rows, lambda vectors: _by_width(builder, dim, partial(emit, vectors)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def start_tile(typingctx: Any, mixed: Any, largest: Any, totals: Any, dim: Any) -> Any:
    """Before the first key: mixed [dim, 32] and totals [32] are 0, largest [32] is the least."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        mixed, largest, totals, dim = args
        for vector in range(VECTORS):
            store(builder, const_floats(PADDING, LANES), offset(builder, largest, 4 * LANES * vector))
            store(builder, const_floats(0.0, LANES), offset(builder, totals, 4 * LANES * vector))
        with cgutils.for_range(builder, builder.mul(dim, I64(VECTORS))) as loop:
            store(builder, const_floats(0.0, LANES), builder.add(mixed, builder.mul(loop.index, I64(4 * LANES))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def softmax_tile(
    typingctx: Any,
    num_rows: Any,
    scores: Any,
    count: Any,
    first: Any,
    seen: Any,
    largest: Any,
    totals: Any,
    factors: Any,
) -> Any:
    """Scores [count, 32] of keys ``first``.. become exp(score - largest so far), and 0 where a lane may not look.

    A lane sees the keys before int32 ``seen`` [32]. largest and totals [32] go on from the keys before; factors [32]
    are what everything summed until now must be multiplied with. (Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018.) NaN and Inf make everything NaN, as they do in torch.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        num_rows, scores, count, first, *states = args

        def emit(vectors: int) -> None:
            places = [[offset(builder, base, 4 * LANES * v) for base in states] for v in range(vectors)]
            _emit_softmax(builder, scores, count, first, places)

        _by_vectors(builder, num_rows, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


def _emit_softmax(
    builder: ir.IRBuilder, scores: ir.Value, count: ir.Value, first: ir.Value, places: list[list[ir.Value]]
) -> None:
    """``places``: for each vector, where its seen, largest, totals and factors are."""
    most, sums = ([cgutils.alloca_once(builder, VF32) for _ in places] for _ in range(2))
    limits = [load(builder, seen, VI32) for seen, *_ in places]
    for (_, largest, *_), slot in zip(places, most, strict=True):
        builder.store(load(builder, largest, VF32), slot)

    def for_each_score(body: Callable[[ir.Value, ir.Value, int], None]) -> None:
        with cgutils.for_range(builder, count) as loop:
            key = splat(builder, builder.trunc(builder.add(first, loop.index), I32))
            at = builder.add(scores, builder.mul(loop.index, I64(COLUMN_BYTES)))
            for v, limit in enumerate(limits):
                body(offset(builder, at, 4 * LANES * v), builder.icmp_signed("<", key, limit), v)

    def widen(at: ir.Value, sees: ir.Value, v: int) -> None:
        value, before = load(builder, at, VF32), builder.load(most[v])
        above = builder.and_(sees, builder.fcmp_ordered(">", value, before))
        builder.store(builder.select(above, value, before), most[v])

    for_each_score(widen)
    for v, (_, largest, totals, factors) in enumerate(places):
        value = builder.load(most[v])
        factor = _exp_or_nan(builder, builder.fsub(load(builder, largest, VF32), value))
        builder.store(builder.fmul(load(builder, totals, VF32), factor), sums[v])
        store(builder, value, largest)
        store(builder, factor, factors)

    def raise_(at: ir.Value, sees: ir.Value, v: int) -> None:
        value = _exp_or_nan(builder, builder.fsub(load(builder, at, VF32), builder.load(most[v])))
        value = builder.select(sees, value, const_floats(0.0, LANES))
        store(builder, value, at)
        builder.store(builder.fadd(builder.load(sums[v]), value), sums[v])

    for_each_score(raise_)
    for v, (_, _, totals, _) in enumerate(places):
        store(builder, builder.load(sums[v]), totals)


def _exp_or_nan(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    spoilt = builder.fmul(x, const_floats(0.0, LANES))  # 0, or NaN, which exp does not pass on
    return builder.fadd(exp(builder, x, LANES), spoilt)


@intrinsic
def store_int32(typingctx: Any, value: Any, target: Any) -> Any:
    """The low 32 bits of ``value`` to an address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        store(builder, builder.trunc(args[0], I32), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
