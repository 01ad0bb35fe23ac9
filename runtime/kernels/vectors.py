"""Sixteen-lane vectors in LLVM's intermediate form: the few operations that the packed-layout kernels need.

A vector is one LLVM value and lives in registers. LLVM lowers it for any CPU: one AVX-512 register, two AVX2
registers, four SSE or NEON ones. Only ``dot4``, ``fp4_levels`` and the reading of float16 differ by instruction
set, and all are exact, so every instruction set gives the same bits. No operation here carries fast-math flags, so
LLVM may neither reorder nor contract them. Addresses are plain int64; the caller keeps the memory alive.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir
from numba.core import cgutils

from moray.runtime.kernels.isa import PORTABLE, PREFETCH_LOCALITY
from moray.runtime.layout import fp4

LANES = 16
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
VI32, VF32 = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    vector = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def const_i32(value: int) -> ir.Constant:
    return ir.Constant(VI32, [value] * LANES)


def const_f32(value: float) -> ir.Constant:
    return ir.Constant(VF32, [value] * LANES)


def offset(builder: ir.IRBuilder, base: ir.Value, num_bytes: int | ir.Value) -> ir.Value:
    return builder.add(base, I64(num_bytes) if isinstance(num_bytes, int) else num_bytes)


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 4) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def repeat(builder: ir.IRBuilder, count: int, body: Callable[[ir.Value], None]) -> None:
    """``body(0..count - 1)``, count at least 1, as a loop that LLVM leaves one: unrolled it takes long to compile."""
    before, loop, after = builder.block, builder.append_basic_block("repeat"), builder.append_basic_block("repeated")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(I64)
    body(index)
    following = builder.add(index, I64(1))
    branch = builder.cbranch(builder.icmp_signed("<", following, I64(count)), loop, after)
    branch.set_metadata("llvm.loop", _no_unrolling(builder.module))
    index.add_incoming(I64(0), before)
    index.add_incoming(following, builder.block)
    builder.position_at_end(after)


def _no_unrolling(module: ir.Module) -> ir.MDValue:
    """What marks a loop that must not be unrolled: a node whose first operand is itself, as LLVM wants it."""
    loop = module.add_metadata([ir.MetaDataString(module, f"loop {len(module.metadata)}")])
    disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop.operands = (loop, disable)
    return loop


def broadcast(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """The scalar at ``address`` in every lane."""
    return splat(builder, load(builder, address, kind))


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c of float32, rounded once. One instruction, or the C library's function on a CPU that has none."""
    kind = ir.FunctionType(VF32, [VF32, VF32, VF32])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [a, b, c])


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line at ``address``, which need not be mapped."""
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), I32(0), I32(PREFETCH_LOCALITY), I32(1)])


def load_halves(builder: ir.IRBuilder, address: ir.Value, instruction_set: str) -> ir.Value:
    """Sixteen float16 -> float32, exactly. Finite values only."""
    if instruction_set != PORTABLE:
        return builder.fpext(load(builder, address, ir.VectorType(ir.HalfType(), LANES), align=2), VF32)
    return half_to_float(builder, builder.zext(load(builder, address, ir.VectorType(I16, LANES), align=2), VI32))


def half_to_float(builder: ir.IRBuilder, half_in_i32: ir.Value) -> ir.Value:
    """float16 bits in the low half of each i32 lane -> float32, exactly.

    Moving the exponent field and multiplying by 2**112 needs no F16C and handles subnormals; finite input only.
    """
    magnitude = builder.shl(builder.and_(half_in_i32, const_i32(0x7FFF)), const_i32(13))
    sign = builder.shl(builder.and_(half_in_i32, const_i32(0x8000)), const_i32(16))
    scaled = builder.fmul(builder.bitcast(magnitude, VF32), const_f32(2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, VI32), sign), VF32)


def load_bytes_as_floats(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Sixteen uint8 -> float32."""
    codes = load(builder, address, ir.VectorType(I8, LANES), align=1)
    return builder.sitofp(builder.zext(codes, VI32), VF32)


def load_powers(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Sixteen bytes e -> 2**(e - 127), and 0 for e = 0."""
    codes = load(builder, address, ir.VectorType(I8, LANES), align=1)
    return builder.bitcast(builder.shl(builder.zext(codes, VI32), const_i32(23)), VF32)


def fp4_levels(builder: ir.IRBuilder, codes: ir.Value, instruction_set: str) -> ir.Value:
    """The level of each byte of [16 x i32], a code from 0 to 15 (layout/fp4.py)."""
    if instruction_set in ("avx512vnni", "avx512"):
        return _pshufb(builder, codes, 64)
    if instruction_set != PORTABLE:
        return _halved(builder, partial(_pshufb, builder, lanes=32), codes)
    # In each byte: twice the value is m for m < 4, then 4, 6, 8, 12; the level is 12 plus or minus it.
    ones = const_i32(0x01010101)
    b0, b1, b2, sign = (builder.and_(builder.lshr(codes, const_i32(k)), ones) for k in range(4))
    both = builder.add(b1, builder.and_(b0, b1))
    more = builder.and_(builder.add(b0, builder.add(both, both)), builder.mul(b2, const_i32(0xFF)))
    double = builder.add(builder.and_(codes, const_i32(0x07070707)), more)
    zero, negative = const_i32(fp4.ZERO * 0x01010101), builder.mul(sign, const_i32(0xFF))
    plus, minus = builder.add(zero, double), builder.sub(zero, double)
    return builder.or_(builder.and_(minus, negative), builder.and_(plus, builder.not_(negative)))


def _pshufb(builder: ir.IRBuilder, codes: ir.Value, lanes: int) -> ir.Value:
    name = "llvm.x86.avx512.pshuf.b.512" if lanes == 64 else "llvm.x86.avx2.pshuf.b"
    kind = ir.VectorType(I8, lanes)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, kind]), name)
    table = ir.Constant(kind, list(fp4.LEVELS) * (lanes // 16))
    return builder.bitcast(builder.call(function, [table, builder.bitcast(codes, kind)]), codes.type)


def dot4(builder: ir.IRBuilder, acc: ir.Value, codes: ir.Value, x: ir.Value, instruction_set: str) -> ir.Value:
    """acc[r] += sum over k of unsigned byte k of codes[r] times signed byte k of the scalar x. Exact."""
    if instruction_set == "avx512vnni":
        return _vpdpbusd(builder, acc, codes, splat(builder, x), 16)
    if instruction_set == "avxvnni":
        return _halved(builder, partial(_vpdpbusd, builder, lanes=8), acc, codes, splat(builder, x))
    if instruction_set == PORTABLE:
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
        pair = splat(builder, builder.or_(builder.and_(first, high), builder.shl(second, I32(16))))
        if instruction_set == "avx512":
            acc = builder.add(acc, _pmaddwd(builder, halves, pair, 16))
        else:
            acc = builder.add(acc, _halved(builder, partial(_pmaddwd, builder, lanes=8), halves, pair))
    return acc


def _vpdpbusd(builder: ir.IRBuilder, acc: ir.Value, codes: ir.Value, x: ir.Value, lanes: int) -> ir.Value:
    vector = ir.VectorType(I32, lanes)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"  # of AVX-VNNI too: LLVM picks the encoding
    kind = ir.FunctionType(vector, [vector] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [acc, codes, x])


def _pmaddwd(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: int) -> ir.Value:
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    words, out = ir.VectorType(I16, 2 * lanes), ir.VectorType(I32, lanes)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(out, [words, words]), name)
    return builder.call(function, [builder.bitcast(a, words), builder.bitcast(b, words)])


def _halved(builder: ir.IRBuilder, operation: Callable[..., ir.Value], *vectors: ir.Value) -> ir.Value:
    """An eight-lane operation on each half of sixteen-lane vectors."""
    halves = []
    for first in (0, 8):
        pick = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
        halves.append(operation(*(builder.shuffle_vector(v, v, pick) for v in vectors)))
    return builder.shuffle_vector(halves[0], halves[1], ir.Constant(VI32, list(range(LANES))))


def store_rows(builder: ir.IRBuilder, vector: ir.Value, address: ir.Value, rows: ir.Value) -> None:
    """Write the first ``rows`` lanes (1 or more; 16 or more: all) to ``address``."""
    lanes = ir.VectorType(I64, LANES)
    numbers = ir.Constant(lanes, list(range(LANES)))
    mask = builder.icmp_signed("<", numbers, splat(builder, rows))
    pointer, masks = VF32.as_pointer(), ir.VectorType(ir.IntType(1), LANES)
    kind = ir.FunctionType(ir.VoidType(), [VF32, pointer, I32, masks])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.store.v16f32.p0")
    builder.call(function, [vector, builder.inttoptr(address, pointer), I32(4), mask])
