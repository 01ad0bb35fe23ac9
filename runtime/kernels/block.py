"""One row block of a packed matrix times a tile of tokens, as LLVM's intermediate form.

A *variant* fixes at compile time what the inner loops depend on: encoding, group, how scales and zeros are stored,
numerics class, instruction set, and the tokens in a tile (width W). Activations come as *panels*: the tile's tokens
interleaved, so that every load has one base register and a constant distance:

    int8     xq [C / 4][W][4] int8, xs [G][W] float32 scales, xsum [G][W] float32 sums of xq (exact)
    float    x [C][W] float32        plain encodings in both classes, and everything in class ``float``

Strict floating point (vectors.py). reference.py states class int8 in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir
from numba.core import cgutils

from moray.runtime.kernels import vectors as v
from moray.runtime.kernels.isa import INSTRUCTION_SETS
from moray.runtime.kernels.vectors import F32, I32, I64, VF32, VI32
from moray.runtime.layout import fp4, second_level
from moray.runtime.layout.packed import ENCODINGS, METAS, PLANES, SCALE_FACTOR, VECTOR_BYTES, Encoding, Meta

_MAX_UNROLLED = 16  # vectors of codes in a group; larger groups are loops
_AHEAD = 4096  # bytes from a use to its prefetch: the best, or as good as it, in every shape measured (0 to 36864)
_BITS = {8: -1, 4: 0x0F0F0F0F, 3: 0x07070707, 2: 0x03030303, 1: 0x01010101}  # masks of one code a byte

QuadBody = Callable[[ir.Value, ir.Value], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """What a kernel is compiled for. ``number`` is the same in one integer, which Numba can treat as a literal."""

    encoding: Encoding
    group: int
    meta: Meta
    integer: bool  # class int8; False: float32 activations
    instruction_set: str

    @property
    def number(self) -> int:
        number = self.group
        for value, count in (
            (ENCODINGS.index(self.encoding), len(ENCODINGS)),
            (METAS.index(self.meta), len(METAS)),
            (int(self.integer), 2),
            (INSTRUCTION_SETS.index(self.instruction_set), len(INSTRUCTION_SETS)),
        ):
            number = number * count + value
        return number

    @classmethod
    def of_number(cls, number: int) -> Variant:
        number, isa = divmod(number, len(INSTRUCTION_SETS))
        number, integer = divmod(number, 2)
        number, meta = divmod(number, len(METAS))
        group, encoding = divmod(number, len(ENCODINGS))
        return cls(ENCODINGS[encoding], group, METAS[meta], bool(integer), INSTRUCTION_SETS[isa])

    @property
    def bits(self) -> int:
        return sum(PLANES[self.encoding])

    @property
    def group_bytes(self) -> int:
        """Codes of one group in one row block."""
        return 2 * self.group * self.bits


@dataclass(frozen=True, slots=True)
class Operands:
    """Addresses (int64 values) of one row block and of one tile's panels."""

    block: ir.Value
    block_bytes: ir.Value
    columns: ir.Value
    x: ir.Value
    xs: ir.Value
    xsum: ir.Value


def emit_block(builder: ir.IRBuilder, variant: Variant, width: int, operands: Operands) -> list[ir.Value]:
    """The products of 16 rows with ``width`` tokens: a vector of 16 rows for each."""
    sums = [cgutils.alloca_once_value(builder, v.const_f32(0.0)) for _ in range(width)]
    if variant.encoding in PLANES:
        _emit_quantized(builder, variant, operands, sums)
    else:
        _emit_plain(builder, variant, operands, sums)
    return [builder.load(total) for total in sums]


# ------------------------------------------------------------------------------------ quantized


def _emit_quantized(builder: ir.IRBuilder, variant: Variant, ops: Operands, sums: list[ir.Value]) -> None:
    num_groups = builder.sdiv(ops.columns, I64(variant.group))
    meta = builder.add(ops.block, builder.mul(num_groups, I64(variant.group_bytes)))
    with cgutils.for_range(builder, num_groups) as loop:
        codes = builder.add(ops.block, builder.mul(loop.index, I64(variant.group_bytes)))
        scale, zero = _emit_meta(builder, variant, ops, meta, num_groups, loop.index)
        for line in range(0, variant.group_bytes, VECTOR_BYTES):
            v.prefetch(builder, v.offset(builder, codes, _AHEAD + line))
        panel = builder.mul(loop.index, I64((1 if variant.integer else 4) * variant.group * len(sums)))
        x = builder.add(ops.x, panel)
        if variant.integer:
            per_group = builder.mul(loop.index, I64(4 * len(sums)))
            dots = _emit_dots(builder, variant, codes, x, len(sums))
            xs, xsum = builder.add(ops.xs, per_group), builder.add(ops.xsum, per_group)
            _add_group(builder, sums, dots, scale, zero, xs, xsum)
        else:
            _emit_float_group(builder, variant, codes, x, scale, zero, sums)


def _emit_meta(
    builder: ir.IRBuilder, variant: Variant, ops: Operands, meta: ir.Value, num_groups: ir.Value, group: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Scales and zeros of 16 rows, as layout/packed.py, second_level.py and fp4.py define them."""
    isa = variant.instruction_set
    if variant.meta == "f16":
        at = builder.add(meta, builder.mul(group, I64(VECTOR_BYTES)))
        v.prefetch(builder, builder.add(at, ops.block_bytes))  # the next block's: the one after is elsewhere
        scale = builder.fmul(v.load_halves(builder, at, isa), v.const_f32(SCALE_FACTOR))
        return scale, v.load_halves(builder, v.offset(builder, at, 32), isa)
    if variant.meta == "e8m0":
        at = builder.add(meta, builder.mul(group, I64(16)))
        v.prefetch(builder, builder.add(at, ops.block_bytes))
        return builder.fmul(v.load_powers(builder, at), v.const_f32(0.5)), v.const_f32(fp4.ZERO)
    at = builder.add(meta, builder.mul(group, I64(32)))
    v.prefetch(builder, builder.add(at, ops.block_bytes))
    supers = builder.add(meta, builder.mul(num_groups, I64(32)))
    super_at = builder.add(supers, builder.mul(builder.lshr(group, I64(4)), I64(32)))
    unit = builder.fmul(v.load_halves(builder, super_at, isa), v.const_f32(second_level.SUPER_FACTOR))
    scale = builder.fmul(v.load_bytes_as_floats(builder, at), unit)
    zero = builder.fmul(
        v.load_bytes_as_floats(builder, v.offset(builder, at, 16)), v.const_f32(second_level.zero_step(variant.bits))
    )
    return scale, builder.fadd(zero, v.const_f32(second_level.lowest_zero(variant.bits)))


def _for_each_quad(builder: ir.IRBuilder, variant: Variant, codes: ir.Value, body: QuadBody) -> None:
    """Call ``body(codes of one quad, number of the quad in its group)`` for all quads of a group."""
    planes = PLANES[variant.encoding]
    width = planes[-1]  # the narrowest plane: one vector of it goes with one or more of the others
    num_vectors = variant.group * width // 32

    def one(j: ir.Value) -> None:
        def plane_vector(first: int) -> ir.Value:
            at = v.offset(builder, builder.add(codes, builder.mul(j, I64(VECTOR_BYTES))), first * VECTOR_BYTES)
            return v.load(builder, at, VI32)

        for field in range(8 // width):
            quad = v.offset(builder, j, field * num_vectors)
            if variant.encoding == "q3":
                body(_three_bits(builder, plane_vector, field, num_vectors), quad)
            else:
                quad_codes = _field(builder, plane_vector(0), width * field, width)
                if variant.encoding == "fp4":
                    quad_codes = v.fp4_levels(builder, quad_codes, variant.instruction_set)
                body(quad_codes, quad)

    if num_vectors <= _MAX_UNROLLED:
        for j in range(num_vectors):
            one(I64(j))
    else:
        with cgutils.for_range(builder, I64(num_vectors)) as loop:
            one(loop.index)


def _field(builder: ir.IRBuilder, codes: ir.Value, shift: int, bits: int) -> ir.Value:
    if bits == 8:
        return codes
    return builder.and_(_shifted(builder, codes, shift), v.const_i32(_BITS[bits]))


def _shifted(builder: ir.IRBuilder, codes: ir.Value, right: int) -> ir.Value:
    if right == 0:
        return codes
    shift = builder.lshr if right > 0 else builder.shl
    return shift(codes, v.const_i32(abs(right)))


def _three_bits(
    builder: ir.IRBuilder, plane_vector: Callable[[int], ir.Value], field: int, num_vectors: int
) -> ir.Value:
    """Two low bits from the first plane, which has 2 V vectors, and the high one from the second, which has V."""
    low = _shifted(builder, plane_vector((field % 2) * num_vectors), 2 * (field // 2))
    high = _shifted(builder, plane_vector(2 * num_vectors), field - 2)
    low_bits = v.const_i32(_BITS[2])
    both = builder.or_(builder.and_(low, low_bits), builder.and_(high, builder.not_(low_bits)))
    return builder.and_(both, v.const_i32(_BITS[3]))


def _emit_dots(builder: ir.IRBuilder, variant: Variant, codes: ir.Value, x: ir.Value, width: int) -> list[ir.Value]:
    """Exact integer products of one group: 16 rows for each token."""
    chains = 2 if width <= 2 else 1  # few tokens: two sums for each, so that one product need not await the last
    slots = [[cgutils.alloca_once(builder, VI32) for _ in range(chains)] for _ in range(width)]
    for slot in (slot for token in slots for slot in token):
        builder.store(v.const_i32(0), slot)
    turn = 0

    def add(quad_codes: ir.Value, quad: ir.Value) -> None:
        nonlocal turn
        at = builder.add(x, builder.mul(quad, I64(4 * width)))
        for t, token in enumerate(slots):
            slot = token[turn % chains]
            four = v.load(builder, v.offset(builder, at, 4 * t), I32)
            builder.store(v.dot4(builder, builder.load(slot), quad_codes, four, variant.instruction_set), slot)
        turn += 1

    _for_each_quad(builder, variant, codes, add)
    totals = []
    for token in slots:
        total = builder.load(token[0])
        for slot in token[1:]:
            total = builder.add(total, builder.load(slot))
        totals.append(total)
    return totals


def _add_group(
    builder: ir.IRBuilder,
    sums: list[ir.Value],
    dots: list[ir.Value],
    scale: ir.Value,
    zero: ir.Value,
    xs: ir.Value,
    xsum: ir.Value,
) -> None:
    """sums[t] += (float(dots[t]) - zero * xsum[t]) * (scale * xs[t]), in this order, unfused."""
    for t, (total, dot) in enumerate(zip(sums, dots, strict=True)):
        x_scale = v.broadcast(builder, v.offset(builder, xs, 4 * t), F32)
        x_sum = v.broadcast(builder, v.offset(builder, xsum, 4 * t), F32)
        centred = builder.fsub(builder.sitofp(dot, VF32), builder.fmul(zero, x_sum))
        term = builder.fmul(centred, builder.fmul(scale, x_scale))
        builder.store(builder.fadd(builder.load(total), term), total)


def _emit_float_group(
    builder: ir.IRBuilder,
    variant: Variant,
    codes: ir.Value,
    x: ir.Value,
    scale: ir.Value,
    zero: ir.Value,
    sums: list[ir.Value],
) -> None:
    """sums[t] += ((code - zero) * scale) * x[t], column after column."""

    def add(quad_codes: ir.Value, quad: ir.Value) -> None:
        at = builder.add(x, builder.mul(quad, I64(16 * len(sums))))
        for k in range(4):
            byte = builder.and_(_shifted(builder, quad_codes, 8 * k), v.const_i32(0xFF))
            weight = builder.fmul(builder.fsub(builder.sitofp(byte, VF32), zero), scale)
            _add_column(builder, sums, weight, v.offset(builder, at, 4 * k * len(sums)))

    _for_each_quad(builder, variant, codes, add)


# ---------------------------------------------------------------------------------------- plain


def _emit_plain(builder: ir.IRBuilder, variant: Variant, ops: Operands, sums: list[ir.Value]) -> None:
    """sums[t] += w[column] * x[column, t], column after column."""
    per_vector = 1 if variant.encoding == "f32" else 2
    with cgutils.for_range(builder, builder.sdiv(ops.columns, I64(per_vector))) as loop:
        at = builder.add(ops.block, builder.mul(loop.index, I64(VECTOR_BYTES)))
        v.prefetch(builder, v.offset(builder, at, _AHEAD))
        x = builder.add(ops.x, builder.mul(loop.index, I64(4 * per_vector * len(sums))))
        for k, weight in enumerate(_plain_weights(builder, v.load(builder, at, VI32), variant.encoding)):
            _add_column(builder, sums, weight, v.offset(builder, x, 4 * k * len(sums)))


def _plain_weights(builder: ir.IRBuilder, lanes: ir.Value, encoding: Encoding) -> list[ir.Value]:
    if encoding == "f32":
        return [builder.bitcast(lanes, VF32)]
    if encoding == "bf16":
        low, high = builder.shl(lanes, v.const_i32(16)), builder.and_(lanes, v.const_i32(-65536))
        return [builder.bitcast(low, VF32), builder.bitcast(high, VF32)]
    return [v.half_to_float(builder, builder.lshr(lanes, v.const_i32(16 * k))) for k in range(2)]


def _add_column(builder: ir.IRBuilder, sums: list[ir.Value], weight: ir.Value, x: ir.Value) -> None:
    for t, total in enumerate(sums):
        product = builder.fmul(weight, v.broadcast(builder, v.offset(builder, x, 4 * t), F32))
        builder.store(builder.fadd(builder.load(total), product), total)
