"""What attention does to rows, as LLVM's intermediate form: rotating, scoring keys, softmax, mixing values.

Strict float32 in a stated order, as in rows.py. Heads are a multiple of 16 wide.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moray.runtime.kernels.rows import LANES, by_lanes, const_floats, exp, steps, store
from moray.runtime.kernels.vectors import F32, I32, I64, VF32, load, splat

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


def _sum_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of 16 lanes: halves are added, then quarters, and so on."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        picks = (ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes))) for first in (0, lanes))
        low, high = (builder.shuffle_vector(vector, vector, pick) for pick in picks)
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, I32(0))


@intrinsic
def score_keys(typingctx: Any, query: Any, keys: Any, scores: Any, first: Any, last: Any, dim: Any, scale: Any) -> Any:
    """scores[j] = scale * (query . keys[j]) for j in first..last-1; keys float32 [., dim]; scale: a float32's bits."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        query, keys, scores, first, last, dim, scale = args
        scale = builder.bitcast(builder.trunc(scale, I32), F32)
        key_bytes = builder.mul(dim, I64(4))

        def emit(start: ir.Value, end: ir.Value, width: int) -> None:
            count = builder.sdiv(builder.sub(end, start), I64(width))
            with cgutils.for_range(builder, count) as loop:
                j = builder.add(start, builder.mul(loop.index, I64(width)))
                key = builder.add(keys, builder.mul(j, key_bytes))
                rows = [builder.add(key, builder.mul(key_bytes, I64(k))) for k in range(width)]
                for k, score in enumerate(_dots(builder, query, rows, dim)):
                    at = builder.add(scores, builder.mul(builder.add(j, I64(k)), I64(4)))
                    store(builder, builder.fmul(score, scale), at)

        whole = builder.add(first, builder.and_(builder.sub(last, first), I64(-4)))
        emit(first, whole, 4)
        emit(whole, last, 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _dots(builder: ir.IRBuilder, x: ir.Value, rows: list[ir.Value], dim: ir.Value) -> list[ir.Value]:
    """x . row for each of a few rows at once."""
    sums = [cgutils.alloca_once(builder, VF32) for _ in rows]
    for total in sums:
        builder.store(const_floats(0.0, LANES), total)

    def step(at: ir.Value) -> None:
        value = load(builder, builder.add(x, at), VF32)
        for row, total in zip(rows, sums, strict=True):
            product = builder.fmul(value, load(builder, builder.add(row, at), VF32))
            builder.store(builder.fadd(builder.load(total), product), total)

    steps(builder, dim, LANES, step)
    return [_sum_lanes(builder, builder.load(total)) for total in sums]


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
        store(builder, _sum_lanes(builder, builder.load(sums)), total_at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def mix_values(typingctx: Any, weights: Any, values: Any, out: Any, count: Any, dim: Any, total_at: Any) -> Any:
    """out [dim] = sum over j < count of weights[j] * values[j], divided by the float32 at ``total_at``."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        weights, values, out, count, dim, total_at = args
        value_bytes = builder.mul(dim, I64(4))
        inverse = splat(builder, builder.fdiv(ir.Constant(F32, 1.0), load(builder, total_at, F32)))

        def emit(start: ir.Value, end: ir.Value, vectors: int) -> None:
            width = 4 * LANES * vectors
            with cgutils.for_range(builder, builder.sdiv(builder.sub(end, start), I64(width))) as loop:
                at = builder.add(start, builder.mul(loop.index, I64(width)))
                sums = [cgutils.alloca_once(builder, VF32) for _ in range(vectors)]
                for total in sums:
                    builder.store(const_floats(0.0, LANES), total)
                with cgutils.for_range(builder, count) as inner:
                    weight = splat(builder, load(builder, builder.add(weights, builder.mul(inner.index, I64(4))), F32))
                    row = builder.add(builder.add(values, at), builder.mul(inner.index, value_bytes))
                    for v, total in enumerate(sums):
                        value = load(builder, builder.add(row, I64(4 * LANES * v)), VF32)
                        builder.store(builder.fadd(builder.load(total), builder.fmul(weight, value)), total)
                for v, total in enumerate(sums):
                    mixed = builder.fmul(builder.load(total), inverse)
                    store(builder, mixed, builder.add(builder.add(out, at), I64(4 * LANES * v)))

        whole = builder.and_(value_bytes, I64(-4 * LANES * 4))
        emit(I64(0), whole, 4)
        emit(whole, value_bytes, 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def store_float(typingctx: Any, value: Any, target: Any) -> Any:
    """The float32 with bits ``value`` to an address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        store(builder, builder.bitcast(builder.trunc(args[0], I32), F32), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
