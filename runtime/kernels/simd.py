"""Sixteen-lane vectors for Numba: the few operations the packed-layout kernels need.

A value of type ``i32x16`` or ``f32x16`` is one LLVM vector and lives in registers. LLVM lowers it for any CPU:
one AVX-512 register, two AVX2 registers, four SSE or NEON ones. Only ``_dot4`` differs by instruction set,
and it is exact integer arithmetic, so every instruction set gives the same bits. No operation here carries
fast-math flags, so LLVM may neither reorder nor contract them.

A *tile* is a tuple of vectors, one for each token computed together; its length is fixed at compile time.
Addresses are plain int64; the caller keeps the memory alive.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from moray.runtime.kernels import setup as _setup  # noqa: F401  (before any njit)
from moray.runtime.kernels.isa import INSTRUCTION_SET

LANES = 16
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
VI32, VF32 = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


class _VectorType(types.Type):  # type: ignore[misc]
    def __init__(self, name: str, lanes: ir.VectorType) -> None:
        super().__init__(name=name)
        self.lanes = lanes


i32x16 = _VectorType("i32x16", VI32)
f32x16 = _VectorType("f32x16", VF32)


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: _VectorType) -> None:
        super().__init__(dmm, fe_type, fe_type.lanes)


# ------------------------------------------------------------------------------ building blocks


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    vector = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def const_i32(value: int) -> ir.Constant:
    return ir.Constant(VI32, [value] * LANES)


def const_f32(value: float) -> ir.Constant:
    return ir.Constant(VF32, [value] * LANES)


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 4) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def half_to_float(builder: ir.IRBuilder, half_in_i32: ir.Value, scale: float) -> ir.Value:
    """float16 bits in the low half of each i32 lane -> float32 times ``scale`` (a power of two), exactly.

    Moving the exponent field and multiplying by 2**112 needs no F16C and handles subnormals; finite input only.
    """
    magnitude = builder.shl(builder.and_(half_in_i32, const_i32(0x7FFF)), const_i32(13))
    sign = builder.shl(builder.and_(half_in_i32, const_i32(0x8000)), const_i32(16))
    scaled = builder.fmul(builder.bitcast(magnitude, VF32), const_f32(2.0**112 * scale))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, VI32), sign), VF32)


def _dot4(builder: ir.IRBuilder, acc: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """acc[r] += sum over k of unsigned byte k of codes[r] times signed byte k of the scalar x. Exact."""
    if INSTRUCTION_SET == "avx512vnni":
        kind = ir.FunctionType(VI32, [VI32, VI32, VI32])
        vpdpbusd = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(vpdpbusd, [acc, codes, splat(builder, x)])
    if INSTRUCTION_SET == "portable":
        for k in range(4):
            code = builder.and_(builder.lshr(codes, const_i32(8 * k)), const_i32(0xFF))
            value = builder.ashr(builder.shl(x, I32(24 - 8 * k)), I32(24))
            acc = builder.add(acc, builder.mul(code, splat(builder, value)))
        return acc
    # pmaddwd on 16-bit halves: unsigned codes up to 255 times 127, two of them, cannot saturate 32 bits.
    low, high = const_i32(0x00FF00FF), I32(0x0000FFFF)
    for shift in (0, 8):
        halves = builder.and_(builder.lshr(codes, const_i32(shift)), low)
        first = builder.ashr(builder.shl(x, I32(24 - shift)), I32(24))
        second = builder.ashr(builder.shl(x, I32(8 - shift)), I32(24))
        pair = builder.or_(builder.and_(first, high), builder.shl(second, I32(16)))
        acc = builder.add(acc, _pmaddwd(builder, halves, splat(builder, pair)))
    return acc


def _pmaddwd(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    lanes = 16 if INSTRUCTION_SET == "avx512" else 8
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    words, out = ir.VectorType(I16, 2 * lanes), ir.VectorType(I32, lanes)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(out, [words, words]), name)
    if lanes == 16:
        return builder.call(function, [builder.bitcast(a, words), builder.bitcast(b, words)])
    halves = []
    for first in (0, 8):
        pick = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
        parts = [builder.bitcast(builder.shuffle_vector(v, v, pick), words) for v in (a, b)]
        halves.append(builder.call(function, parts))
    return builder.shuffle_vector(halves[0], halves[1], ir.Constant(VI32, list(range(16))))


def _tile_of(context: Any, builder: ir.IRBuilder, tile_type: types.UniTuple, values: list[ir.Value]) -> ir.Value:
    return context.make_tuple(builder, tile_type, values)


def _offset(builder: ir.IRBuilder, base: ir.Value, stride: ir.Value, count: int) -> ir.Value:
    return builder.add(base, builder.mul(stride, ir.Constant(base.type, count)))


# ----------------------------------------------------------------------------------- intrinsics


@intrinsic
def load_codes(typingctx: Any, address: Any) -> Any:
    """Sixteen 4-byte lanes at ``address``."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return load(builder, args[0], VI32)

    return i32x16(types.int64), codegen


@intrinsic
def bits_of(typingctx: Any, codes: Any, shift: Any, mask: Any) -> Any:
    """(codes >> shift) & mask in every lane; shift and mask are int32."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        codes, shift, mask = args
        return builder.and_(builder.lshr(codes, splat(builder, shift)), splat(builder, mask))

    return i32x16(i32x16, types.int32, types.int32), codegen


@intrinsic
def with_high_bit(typingctx: Any, low: Any, high: Any) -> Any:
    """low | high << 2 in every lane: the two planes of a 3-bit code."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.or_(args[0], builder.shl(args[1], const_i32(2)))

    return i32x16(i32x16, i32x16), codegen


def _half_loader(scale: float) -> Any:
    @intrinsic
    def loader(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            halves = load(builder, args[0], ir.VectorType(I16, LANES), align=2)
            return half_to_float(builder, builder.zext(halves, VI32), scale)

        return f32x16(types.int64), codegen

    return loader


load_scales = _half_loader(2.0**-8)  # 16 float16 scales, times the format's 2**-8
load_zeros = _half_loader(1.0)  # 16 float16 zeros


@intrinsic(prefer_literal=True)
def zero_dots(typingctx: Any, tile: Any) -> Any:
    """A tile of ``tile`` (a compile-time constant) int32 zero vectors."""
    tile_type = types.UniTuple(i32x16, tile.literal_value)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _tile_of(context, builder, tile_type, [const_i32(0)] * tile_type.count)

    return tile_type(tile), codegen


@intrinsic(prefer_literal=True)
def zero_sums(typingctx: Any, tile: Any) -> Any:
    """A tile of float32 zero vectors."""
    tile_type = types.UniTuple(f32x16, tile.literal_value)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _tile_of(context, builder, tile_type, [const_f32(0.0)] * tile_type.count)

    return tile_type(tile), codegen


@intrinsic
def add_quad_tile(typingctx: Any, tile: Any, codes: Any, scale: Any, zero: Any, x: Any, quad: Any, stride: Any) -> Any:
    """Add the products of one quad of columns (one code a byte) with columns 4*quad.. of every token's x.

    An i32 tile adds exact integer products with int8 activations; scale and zero are not used.
    An f32 tile adds ((code - zero) * scale) * x column after column; x is float32.
    """

    def integer(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        tile, codes, _scale, _zero, x, quad, stride = args
        x = _offset(builder, x, quad, 4)
        values = []
        for t in range(sig.return_type.count):
            four = load(builder, _offset(builder, x, stride, t), I32)
            values.append(_dot4(builder, builder.extract_value(tile, t), codes, four))
        return _tile_of(context, builder, sig.return_type, values)

    def floating(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        tile, codes, scale, zero, x, quad, stride = args
        x = _offset(builder, x, quad, 16)
        values = [builder.extract_value(tile, t) for t in range(sig.return_type.count)]
        for k in range(4):
            byte = builder.and_(builder.lshr(codes, const_i32(8 * k)), const_i32(0xFF))
            weight = builder.fmul(builder.fsub(builder.sitofp(byte, VF32), zero), scale)
            _add_column(builder, values, weight, x, stride, 4 * k)
        return _tile_of(context, builder, sig.return_type, values)

    signature = tile(tile, i32x16, f32x16, f32x16, types.int64, types.int64, types.int64)
    return signature, integer if tile.dtype == i32x16 else floating


@intrinsic
def add_group_tile(typingctx: Any, sums: Any, dots: Any, scale: Any, zero: Any, xs: Any, xsum: Any, stride: Any) -> Any:
    """sums[t] += (float(dots[t]) - zero * float(xsum[t])) * (scale * xs[t]), in this order, unfused.

    ``xs`` (float32) and ``xsum`` (int32) hold one value a token, ``stride`` bytes apart.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        sums, dots, scale, zero, xs, xsum, stride = args
        values = []
        for t in range(sig.return_type.count):
            x_scale = splat(builder, load(builder, _offset(builder, xs, stride, t), F32))
            x_sum = splat(builder, builder.sitofp(load(builder, _offset(builder, xsum, stride, t), I32), F32))
            dot = builder.sitofp(builder.extract_value(dots, t), VF32)
            centred = builder.fsub(dot, builder.fmul(zero, x_sum))
            term = builder.fmul(centred, builder.fmul(scale, x_scale))
            values.append(builder.fadd(builder.extract_value(sums, t), term))
        return _tile_of(context, builder, sig.return_type, values)

    i64 = types.int64
    return sums(sums, dots, f32x16, f32x16, i64, i64, i64), codegen


def _plain_adder(encoding: str) -> Any:
    @intrinsic
    def adder(typingctx: Any, sums: Any, lanes: Any, x: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            sums, lanes, x, stride = args
            values = [builder.extract_value(sums, t) for t in range(sig.return_type.count)]
            for k, weight in enumerate(_plain_weights(builder, lanes, encoding)):
                _add_column(builder, values, weight, x, stride, 4 * k)
            return _tile_of(context, builder, sig.return_type, values)

        return sums(sums, i32x16, types.int64, types.int64), codegen

    return adder


def _plain_weights(builder: ir.IRBuilder, lanes: ir.Value, encoding: str) -> list[ir.Value]:
    if encoding == "f32":
        return [builder.bitcast(lanes, VF32)]
    if encoding == "bf16":
        low, high = builder.shl(lanes, const_i32(16)), builder.and_(lanes, const_i32(-65536))
        return [builder.bitcast(low, VF32), builder.bitcast(high, VF32)]
    return [half_to_float(builder, builder.lshr(lanes, const_i32(16 * k)), 1.0) for k in range(2)]


def _add_column(
    builder: ir.IRBuilder, values: list[ir.Value], weight: ir.Value, x: ir.Value, stride: ir.Value, at: int
) -> None:
    for t in range(len(values)):
        address = builder.add(_offset(builder, x, stride, t), ir.Constant(x.type, at))
        product = builder.fmul(weight, splat(builder, load(builder, address, F32)))
        values[t] = builder.fadd(values[t], product)


# One 64-byte vector of a plain matrix: sums[t] += w[column] * x[t, column] for its 1 or 2 columns, in order.
add_f32_tile = _plain_adder("f32")
add_bf16_tile = _plain_adder("bf16")
add_f16_tile = _plain_adder("f16")


@intrinsic
def store_tile(typingctx: Any, sums: Any, out: Any, stride: Any, rows: Any) -> Any:
    """Write the first ``rows`` (1..16) lanes of every token to ``out + t * stride`` bytes."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        tile, out, stride, rows = args
        full = builder.icmp_signed(">=", rows, ir.Constant(rows.type, LANES))
        for t in range(sig.args[0].count):
            address, vector = _offset(builder, out, stride, t), builder.extract_value(tile, t)
            with builder.if_else(full) as (whole, part):
                with whole:
                    builder.store(vector, builder.inttoptr(address, VF32.as_pointer()), align=4)
                with part:
                    pointer = builder.inttoptr(address, F32.as_pointer())
                    for r in range(LANES - 1):
                        with builder.if_then(builder.icmp_signed(">", rows, ir.Constant(rows.type, r))):
                            builder.store(
                                builder.extract_element(vector, I32(r)),
                                builder.gep(pointer, [I32(r)]),
                                align=4,
                            )
        return context.get_dummy_value()

    return types.void(sums, types.int64, types.int64, types.int64), codegen


@intrinsic
def float_from_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), codegen
