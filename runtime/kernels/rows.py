"""Rows of activations as LLVM's intermediate form: quantization into panels, and gated activations.

Strict float32, every operation correctly rounded and in a stated order, so NumPy gives the same bits (reference.py).
Rows are worked on 16 lanes at a time, and 4 or 1 at a time where a row or group is not a multiple of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moray.runtime.kernels.gates import CLAMPED, GATE_KINDS, GELU, INTERLEAVED, SCALED
from moray.runtime.kernels.vectors import F32, I8, I32, I64, load, splat

LANES = 16
LIMIT, MAX_FINITE, MAX_FINITE_BITS = 127.0, 3.4028234663852886e38, 0x7F7FFFFF

# Coefficients of exp on [-ln2/2, ln2/2] (Cephes, expf).
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
EXP_C = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
EXP_MIN, EXP_MAX = -87.0, 88.0


def _float(value: float) -> ir.Constant:
    return ir.Constant(F32, _rounded(value))


def _rounded(value: float) -> float:
    return float(np.float32(value))


def const_floats(value: float, lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(F32, lanes), [_rounded(value)] * lanes)


def _ints(value: int, lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, lanes), [value] * lanes)


def _call(builder: ir.IRBuilder, name: str, kind: ir.Type, *arguments: ir.Value) -> ir.Value:
    function = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def steps(builder: ir.IRBuilder, count: ir.Value, lanes: int, body: Callable[[ir.Value], None]) -> None:
    """``body(byte offset)`` for every ``lanes`` float32 of ``count``, a multiple of them."""
    with cgutils.for_range(builder, builder.sdiv(count, I64(lanes))) as loop:
        body(builder.mul(loop.index, I64(4 * lanes)))


def by_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int, emit: Callable[[int], None]) -> None:
    """``emit(16)`` where 16 divides ``count``, else ``emit(lanes)``."""
    whole = builder.icmp_signed("==", builder.srem(count, I64(LANES)), I64(0))
    with builder.if_else(whole) as (then, otherwise):
        with then:
            emit(LANES)
        with otherwise:
            emit(lanes)


# ------------------------------------------------------------------------------------ quantizing


@intrinsic
def quantize_group(typingctx: Any, x: Any, group: Any, codes: Any, quad_stride: Any, scale_at: Any, sum_at: Any) -> Any:
    """Symmetric int8 of ``group`` (a multiple of 4) float32 at ``x``, round half to even.

    Quads of codes are written ``quad_stride`` bytes apart; scale = largest magnitude / 127, and the sum of the codes
    as float32. A group with a NaN or Inf gets codes 0 and scale NaN, so that outputs that use it are NaN too.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        by_lanes(builder, args[1], 4, lambda lanes: _emit_quantize(builder, lanes, *args))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


def _emit_quantize(
    builder: ir.IRBuilder,
    lanes: int,
    x: ir.Value,
    group: ir.Value,
    codes: ir.Value,
    quad_stride: ir.Value,
    scale_at: ir.Value,
    sum_at: ir.Value,
) -> None:
    integers, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
    largest_at = cgutils.alloca_once_value(builder, _ints(0, lanes))
    builder.store(_ints(0, lanes), largest_at)

    def widen(at: ir.Value) -> None:  # magnitudes compare as their bits do, and NaN above all
        bits = builder.and_(load(builder, builder.add(x, at), integers), _ints(0x7FFFFFFF, lanes))
        before = builder.load(largest_at)
        builder.store(builder.select(builder.icmp_signed(">", bits, before), bits, before), largest_at)

    steps(builder, group, lanes, widen)
    suffix = f"v{lanes}i32"
    bits = _call(builder, f"llvm.vector.reduce.smax.{suffix}", I32, builder.load(largest_at))
    largest = builder.bitcast(bits, F32)
    finite = builder.icmp_signed("<=", bits, I32(MAX_FINITE_BITS))
    inverse = builder.fdiv(_float(LIMIT), largest)
    usable = builder.and_(finite, builder.fcmp_ordered("<=", inverse, _float(MAX_FINITE)))
    inverse = splat(builder, builder.select(usable, inverse, _float(0.0)), lanes)
    usable_lanes = splat(builder, usable, lanes)
    total_at = cgutils.alloca_once(builder, integers)
    builder.store(_ints(0, lanes), total_at)

    def code(at: ir.Value) -> None:
        scaled = builder.fmul(load(builder, builder.add(x, at), floats), inverse)
        nearest = _call(builder, f"llvm.rint.v{lanes}f32", floats, scaled)
        nearest = builder.select(usable_lanes, nearest, const_floats(0.0, lanes))
        values = builder.fptosi(nearest, integers)
        builder.store(builder.add(builder.load(total_at), values), total_at)
        quads = builder.bitcast(builder.trunc(values, ir.VectorType(I8, lanes)), ir.VectorType(I32, lanes // 4))
        first = builder.add(codes, builder.mul(builder.sdiv(at, I64(16)), quad_stride))
        for i in range(lanes // 4):
            store(builder, builder.extract_element(quads, I32(i)), first)
            first = builder.add(first, quad_stride)

    steps(builder, group, lanes, code)
    total = _call(builder, f"llvm.vector.reduce.add.{suffix}", I32, builder.load(total_at))
    scale = builder.fdiv(largest, _float(LIMIT))
    unusable = builder.select(finite, _float(0.0), ir.Constant(F32, float("nan")))
    store(builder, builder.select(usable, scale, unusable), scale_at)
    store(builder, builder.sitofp(total, F32), sum_at)


# ------------------------------------------------------------------------------------ activations


# gelu(x) = x * sigmoid(x * (GELU_A + GELU_B * x * x)), the tanh form
GELU_A, GELU_B = 1.5957691216057308, 0.07135481627159471


@intrinsic
def gated_row(typingctx: Any, gate: Any, up: Any, h: Any, count: Any, kind: Any, limit: Any, alpha: Any) -> Any:
    """h = activation(gate) * up over ``count`` float32; gates.py says what the kinds compute.

    gate, up, h: addresses; of interleaved pairs ``gate`` is the first and ``up`` is not used. limit, alpha: the bits
    of two float32.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        gate, up, h, count, wanted, limit, alpha = args
        limit, alpha = (builder.bitcast(builder.trunc(bits, I32), F32) for bits in (limit, alpha))
        for kind in GATE_KINDS:
            with builder.if_then(builder.icmp_signed("==", wanted, I64(kind))):
                _emit_gate(builder, kind, (gate, up, h, count), limit, alpha)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _emit_gate(
    builder: ir.IRBuilder,
    kind: int,
    where: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    limit: ir.Value,
    alpha: ir.Value,
) -> None:
    gate, up, h, count = where

    def emit(lanes: int) -> None:
        def step(at: ir.Value) -> None:
            if kind & INTERLEAVED:
                g, u = _load_pairs(builder, builder.add(gate, builder.add(at, at)), lanes)
            else:
                g, u = (load(builder, builder.add(base, at), ir.VectorType(F32, lanes)) for base in (gate, up))
            if kind & CLAMPED:
                most, least = splat(builder, limit, lanes), splat(builder, builder.fneg(limit), lanes)
                g, u = _at_most(builder, g, most), _at_least(builder, _at_most(builder, u, most), least)
            if kind & SCALED:
                u = builder.fadd(u, const_floats(1.0, lanes))
            minus = builder.fneg(_sigmoid_argument(builder, kind, g, alpha, lanes))
            h_value = builder.fmul(
                builder.fdiv(g, builder.fadd(const_floats(1.0, lanes), exp(builder, minus, lanes))), u
            )
            store(builder, h_value, builder.add(h, at))

        steps(builder, count, lanes, step)

    by_lanes(builder, count, 1, emit)


def _sigmoid_argument(builder: ir.IRBuilder, kind: int, g: ir.Value, alpha: ir.Value, lanes: int) -> ir.Value:
    if kind & SCALED:
        return builder.fmul(g, splat(builder, alpha, lanes))
    if kind & GELU:
        slope = builder.fmul(const_floats(GELU_B, lanes), builder.fmul(g, g))
        return builder.fmul(g, builder.fadd(const_floats(GELU_A, lanes), slope))
    return g


def _load_pairs(builder: ir.IRBuilder, address: ir.Value, lanes: int) -> tuple[ir.Value, ir.Value]:
    """The even and the odd ones of ``2 * lanes`` float32."""
    both = load(builder, address, ir.VectorType(F32, 2 * lanes))
    even, odd = (
        builder.shuffle_vector(both, both, ir.Constant(ir.VectorType(I32, lanes), list(range(first, 2 * lanes, 2))))
        for first in (0, 1)
    )
    return even, odd


def _at_most(builder: ir.IRBuilder, x: ir.Value, limit: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", x, limit), limit, x)  # NaN stays


def _at_least(builder: ir.IRBuilder, x: ir.Value, limit: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", x, limit), limit, x)


def exp(builder: ir.IRBuilder, x: ir.Value, lanes: int) -> ir.Value:
    """exp(x), x clamped to where float32 can hold it. NaN gives a number: the caller's own NaN must remain."""
    x = builder.select(builder.fcmp_ordered(">", x, const_floats(EXP_MIN, lanes)), x, const_floats(EXP_MIN, lanes))
    x = builder.select(builder.fcmp_ordered("<", x, const_floats(EXP_MAX, lanes)), x, const_floats(EXP_MAX, lanes))
    n = _call(builder, f"llvm.rint.v{lanes}f32", x.type, builder.fmul(x, const_floats(LOG2E, lanes)))
    r = builder.fsub(x, builder.fmul(n, const_floats(LN2_HIGH, lanes)))
    r = builder.fsub(r, builder.fmul(n, const_floats(LN2_LOW, lanes)))
    y: ir.Value = const_floats(EXP_C[0], lanes)
    for c in EXP_C[1:]:
        y = builder.fadd(builder.fmul(y, r), const_floats(c, lanes))
    one = const_floats(1.0, lanes)
    y = builder.fadd(builder.fadd(builder.fmul(y, builder.fmul(r, r)), r), one)
    exponent = builder.add(builder.fptosi(n, ir.VectorType(I32, lanes)), _ints(127, lanes))
    power = builder.bitcast(builder.shl(exponent, _ints(23, lanes)), x.type)
    return builder.fmul(y, power)


@intrinsic
def add_scaled_row(typingctx: Any, out: Any, row: Any, weight: Any, count: Any) -> Any:
    """out += weight * row over ``count`` float32 at two addresses; ``weight`` is the address of a float32."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        out, row, weight, count = args
        factor = load(builder, weight, F32)

        def emit(lanes: int) -> None:
            kind = ir.VectorType(F32, lanes)

            def step(at: ir.Value) -> None:
                product = builder.fmul(splat(builder, factor, lanes), load(builder, builder.add(row, at), kind))
                to = builder.add(out, at)
                store(builder, builder.fadd(load(builder, to, kind), product), to)

            steps(builder, count, lanes, step)

        by_lanes(builder, count, 1, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def rms_row(typingctx: Any, x: Any, weight: Any, out: Any, count: Any, epsilon: Any) -> Any:
    """out = weight * (x / sqrt(mean(x * x) + epsilon)) over ``count`` float32; ``epsilon`` has a float32's bits.

    Squares are summed in 16 lanes (or 1), then lane after lane.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x, weight, out, count, epsilon = args
        epsilon = builder.bitcast(builder.trunc(epsilon, I32), F32)

        def emit(lanes: int) -> None:
            kind = ir.VectorType(F32, lanes)
            sums = cgutils.alloca_once(builder, kind)
            builder.store(const_floats(0.0, lanes), sums)

            def square(at: ir.Value) -> None:
                value = load(builder, builder.add(x, at), kind)
                builder.store(builder.fadd(builder.load(sums), builder.fmul(value, value)), sums)

            steps(builder, count, lanes, square)
            total: ir.Value = _float(0.0)
            for lane in range(lanes):
                total = builder.fadd(total, builder.extract_element(builder.load(sums), I32(lane)))
            mean = builder.fdiv(total, builder.sitofp(count, F32))
            root = _call(builder, "llvm.sqrt.f32", F32, builder.fadd(mean, epsilon))
            scale = splat(builder, builder.fdiv(_float(1.0), root), lanes)

            def normalize(at: ir.Value) -> None:
                value = builder.fmul(load(builder, builder.add(x, at), kind), scale)
                value = builder.fmul(load(builder, builder.add(weight, at), kind), value)
                store(builder, value, builder.add(out, at))

            steps(builder, count, lanes, normalize)

        by_lanes(builder, count, 1, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def add_row(typingctx: Any, out: Any, row: Any, count: Any) -> Any:
    """out += row over ``count`` float32 at two addresses."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        out, row, count = args

        def emit(lanes: int) -> None:
            kind = ir.VectorType(F32, lanes)

            def step(at: ir.Value) -> None:
                to = builder.add(out, at)
                total = builder.fadd(load(builder, to, kind), load(builder, builder.add(row, at), kind))
                store(builder, total, to)

            steps(builder, count, lanes, step)

        by_lanes(builder, count, 1, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def copy_column(typingctx: Any, source: Any, target: Any) -> Any:
    """One float32 from address to address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        store(builder, load(builder, args[0], F32), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_zero(typingctx: Any, target: Any) -> Any:
    """0.0 as float32 to an address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        store(builder, _float(0.0), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
