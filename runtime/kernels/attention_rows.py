"""What attention does to rows, as LLVM's intermediate form: rotating, scoring keys, softmax, mixing values.

Strict float32 in a stated order, as in rows.py. Heads are a multiple of 16 wide.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moray.runtime.kernels.isa import INSTRUCTION_SET
from moray.runtime.kernels.rows import LANES, by_lanes, const_floats, exp, steps, store
from moray.runtime.kernels.vectors import F32, I32, I64, VF32, load, prefetch, splat

# What is computed at once: query heads of one head of keys and values, keys, and vectors of values. Their sums fit the
# registers: 32 that hold a vector, or 16 that hold half of one.
_TILE = (4, 4, 4) if INSTRUCTION_SET.startswith("avx512") else (2, 2, 2)
_TILE_OF_ONE = (1, 4, 4)
_AHEAD = 16  # rows from keys and values to those that are asked for meanwhile

#: Scores are padded to a multiple of 16 with this: its exponential is nothing beside the largest one's, which is 1.
PADDING = -1e30


@intrinsic
def copy_row(typingctx: Any, source: Any, target: Any, count: Any) -> Any:
    """``count`` float32 from address to address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, target, count = args

        def emit(lanes: int) -> None:
            kind = ir.VectorType(F32, lanes)

            def step(at: ir.Value) -> None:
                store(builder, load(builder, builder.add(source, at), kind), builder.add(target, at))

            steps(builder, count, lanes, step)

        by_lanes(builder, count, 1, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def rotate_row(typingctx: Any, row: Any, cosines: Any, sines: Any, half: Any) -> Any:
    """Rotary embedding of the first 2 * ``half`` float32 of a row, in place: lane i turns with lane half + i."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        row, cosines, sines, half = args
        to_second = builder.mul(half, I64(4))

        def emit(lanes: int) -> None:
            kind = ir.VectorType(F32, lanes)

            def step(at: ir.Value) -> None:
                also = builder.add(at, to_second)
                first, second = (load(builder, builder.add(row, place), kind) for place in (at, also))
                turned = []
                for place, mine, other in ((at, first, builder.fneg(second)), (also, second, first)):
                    cosine, sine = (load(builder, builder.add(base, place), kind) for base in (cosines, sines))
                    turned.append(builder.fadd(builder.fmul(mine, cosine), builder.fmul(other, sine)))
                store(builder, turned[0], builder.add(row, at))
                store(builder, turned[1], builder.add(row, also))

            steps(builder, half, lanes, step)

        by_lanes(builder, half, 1, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def score_keys(
    typingctx: Any, queries: Any, count: Any, query_bytes: Any, keys: Any, scores: Any, score_bytes: Any, length: Any,
    dim: Any, scale: Any,
) -> Any:  # fmt: skip
    """scores[i][j] = scale * (queries[i] . keys[j]) for i < count and j < length; scale: a float32's bits.

    float32 queries [count, dim], query_bytes from one to the next; keys [length, dim]; scores, score_bytes apart.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        queries, count, query_bytes, keys, scores, score_bytes, length, dim, scale = args
        scale = builder.bitcast(builder.trunc(scale, I32), F32)
        key_bytes = builder.mul(dim, I64(4))

        def emit(query: ir.Value, score: ir.Value, heads: int, width: int) -> None:
            """Scores of all keys but less than ``width`` of them, and then of these."""
            whole = builder.and_(length, I64(-width))
            for start, end, num_keys in ((I64(0), whole, width), (whole, length, 1)):
                with cgutils.for_range(builder, builder.sdiv(builder.sub(end, start), I64(num_keys))) as loop:
                    j = builder.add(start, builder.mul(loop.index, I64(num_keys)))
                    key = builder.add(keys, builder.mul(j, key_bytes))
                    at = builder.add(score, builder.mul(j, I64(4)))
                    rows = _rows(builder, key, key_bytes, num_keys)
                    dots = _dots(builder, _rows(builder, query, query_bytes, heads), rows, dim)
                    for values, head_at in zip(dots, _rows(builder, at, score_bytes, heads), strict=True):
                        store(builder, builder.fmul(values, splat(builder, scale, num_keys)), head_at)

        def step(first: ir.Value, heads: int, width: int, _: int) -> None:
            query = builder.add(queries, builder.mul(first, query_bytes))
            emit(query, builder.add(scores, builder.mul(first, score_bytes)), heads, width)

        _by_heads(builder, count, step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


def _by_heads(builder: ir.IRBuilder, count: ir.Value, step: Callable[[ir.Value, int, int, int], None]) -> None:
    """``step(first, heads, keys, vectors)``, whose numbers are what it computes at once."""
    together, whole = _TILE[0], builder.and_(count, I64(-_TILE[0]))
    for start, end, tile in ((I64(0), whole, _TILE), (whole, count, _TILE_OF_ONE)):
        heads = together if tile is _TILE else 1
        with cgutils.for_range(builder, builder.sdiv(builder.sub(end, start), I64(heads))) as loop:
            step(builder.add(start, builder.mul(loop.index, I64(heads))), *tile)


def _rows(builder: ir.IRBuilder, first: ir.Value, num_bytes: ir.Value, count: int) -> list[ir.Value]:
    return [builder.add(first, builder.mul(num_bytes, I64(i))) for i in range(count)]


def _dots(builder: ir.IRBuilder, queries: list[ir.Value], keys: list[ir.Value], dim: ir.Value) -> list[ir.Value]:
    """For each query a vector: its products with the keys."""
    sums = [[cgutils.alloca_once(builder, VF32) for _ in keys] for _ in queries]
    for total in (total for row in sums for total in row):
        builder.store(const_floats(0.0, LANES), total)

    def step(at: ir.Value) -> None:
        values = []
        for key in keys:
            place = builder.add(key, at)
            prefetch(builder, builder.add(place, builder.mul(dim, I64(4 * _AHEAD))))
            values.append(load(builder, place, VF32))
        for query, totals in zip(queries, sums, strict=True):
            mine = load(builder, builder.add(query, at), VF32)
            for value, total in zip(values, totals, strict=True):
                builder.store(builder.fadd(builder.load(total), builder.fmul(mine, value)), total)

    steps(builder, dim, LANES, step)
    return [_sum_each(builder, [builder.load(total) for total in totals]) for totals in sums]


def _sum_each(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """A vector of the sums of 1, 2 or 4 vectors' 16 lanes: halves are added, then quarters, and so on."""
    lanes, sums = LANES, 1  # of each sum, and sums in a vector
    while lanes > 1:
        half, sources = lanes // 2, min(2, len(vectors))
        starts = [lanes * i for i in range(sources * sums)]
        kind = ir.VectorType(I32, half * len(starts))
        low, high = (ir.Constant(kind, [at + part + i for at in starts for i in range(half)]) for part in (0, half))
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if sources == 2 else [(vectors[0], vectors[0])]
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)) for a, b in pairs
        ]
        lanes, sums = half, sources * sums
    return vectors[0]


@intrinsic
def softmax_row(typingctx: Any, scores: Any, count: Any, total_at: Any) -> Any:
    """scores become exp(score - largest); their sum goes to ``total_at``. ``count`` is a multiple of 16.

    NaN and Inf make everything NaN, as they do in torch.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        scores, count, total_at = args
        largest_at = cgutils.alloca_once(builder, VF32)
        sums = cgutils.alloca_once(builder, VF32)
        builder.store(const_floats(PADDING, LANES), largest_at)
        builder.store(const_floats(0.0, LANES), sums)

        def widen(at: ir.Value) -> None:
            value, before = load(builder, builder.add(scores, at), VF32), builder.load(largest_at)
            builder.store(builder.select(builder.fcmp_ordered(">", value, before), value, before), largest_at)

        steps(builder, count, LANES, widen)
        largest = builder.extract_element(builder.load(largest_at), I32(0))
        for lane in range(1, LANES):
            value = builder.extract_element(builder.load(largest_at), I32(lane))
            largest = builder.select(builder.fcmp_ordered(">", value, largest), value, largest)
        most = splat(builder, largest)

        def raise_(at: ir.Value) -> None:
            below = builder.fsub(load(builder, builder.add(scores, at), VF32), most)
            spoilt = builder.fmul(below, const_floats(0.0, LANES))  # 0, or NaN, which exp does not pass on
            value = builder.fadd(exp(builder, below, LANES), spoilt)
            store(builder, value, builder.add(scores, at))
            builder.store(builder.fadd(builder.load(sums), value), sums)

        steps(builder, count, LANES, raise_)
        store(builder, _sum_each(builder, [builder.load(sums)]), total_at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def mix_values(
    typingctx: Any, weights: Any, heads: Any, weight_bytes: Any, values: Any, out: Any, out_bytes: Any, length: Any,
    dim: Any,
) -> Any:  # fmt: skip
    """out[i] += sum over j < length of weights[i][j] * values[j], one j after the other.

    For i < heads; float32 weights, weight_bytes apart; values [length, dim]; out [dim], out_bytes apart.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        weights, count, weight_bytes, values, out, out_bytes, length, dim = args
        value_bytes = builder.mul(dim, I64(4))

        def emit(mine: list[ir.Value], targets: list[ir.Value], start: ir.Value, end: ir.Value, vectors: int) -> None:
            """The columns from byte to byte, so many vectors of them at once."""
            width = 4 * LANES * vectors
            with cgutils.for_range(builder, builder.sdiv(builder.sub(end, start), I64(width))) as loop:
                at = builder.add(start, builder.mul(loop.index, I64(width)))
                places = [_rows(builder, builder.add(target, at), I64(4 * LANES), vectors) for target in targets]
                sums = [[cgutils.alloca_once(builder, VF32) for _ in row] for row in places]
                for total, place in zip(chain(*sums), chain(*places), strict=True):
                    builder.store(load(builder, place, VF32), total)
                with cgutils.for_range(builder, length) as inner:
                    row = builder.add(builder.add(values, at), builder.mul(inner.index, value_bytes))
                    loaded = []
                    for place in _rows(builder, row, I64(4 * LANES), vectors):
                        prefetch(builder, builder.add(place, builder.mul(value_bytes, I64(_AHEAD))))
                        loaded.append(load(builder, place, VF32))
                    to_weight = builder.mul(inner.index, I64(4))
                    for head, totals in zip(mine, sums, strict=True):
                        weight = splat(builder, load(builder, builder.add(head, to_weight), F32))
                        for value, total in zip(loaded, totals, strict=True):
                            builder.store(builder.fadd(builder.load(total), builder.fmul(weight, value)), total)
                for total, place in zip(chain(*sums), chain(*places), strict=True):
                    store(builder, builder.load(total), place)

        def step(first: ir.Value, heads: int, _: int, vectors: int) -> None:
            mine = _rows(builder, builder.add(weights, builder.mul(first, weight_bytes)), weight_bytes, heads)
            targets = _rows(builder, builder.add(out, builder.mul(first, out_bytes)), out_bytes, heads)
            whole = builder.sub(value_bytes, builder.srem(value_bytes, I64(4 * LANES * vectors)))
            emit(mine, targets, I64(0), whole, vectors)
            emit(mine, targets, whole, value_bytes, 1)

        _by_heads(builder, count, step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@intrinsic
def divide_row(typingctx: Any, row: Any, count: Any, total_at: Any) -> Any:
    """``count`` float32, a multiple of 16, times the inverse of the float32 at ``total_at``."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        row, count, total_at = args
        inverse = splat(builder, builder.fdiv(ir.Constant(F32, 1.0), load(builder, total_at, F32)))

        def step(at: ir.Value) -> None:
            place = builder.add(row, at)
            store(builder, builder.fmul(load(builder, place, VF32), inverse), place)

        steps(builder, count, LANES, step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def store_float(typingctx: Any, value: Any, target: Any) -> Any:
    """The float32 with bits ``value`` to an address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        store(builder, builder.bitcast(builder.trunc(args[0], I32), F32), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
