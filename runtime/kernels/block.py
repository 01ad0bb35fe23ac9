"""One or more row blocks of a packed matrix times a tile of tokens, as LLVM's intermediate form.

A *variant* fixes at compile time what the inner loops depend on: encoding, group, how scales and zeros are stored,
numerics class, instruction set, and the tokens in a tile (width W). Activations come as *panels*: the tile's tokens
interleaved, so that every load has one base register and a constant distance:

    int8     xq [C / 4][W][4] int8, xs [G][W] float32 scales, xsum [G][W] float32 sums of xq (exact)
    float    x [C][W] float32        plain encodings in both classes, and everything in class ``float``

Strict floating point (vectors.py). reference.py states class int8 in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

from llvmlite import ir
from numba.core import cgutils

from moray.runtime.kernels import vectors as v
from moray.runtime.kernels.isa import INSTRUCTION_SETS
from moray.runtime.kernels.vectors import F32, I32, I64, VF32, VI32
from moray.runtime.layout import fp4, second_level
from moray.runtime.layout.packed import ENCODINGS, METAS, PLANES, SCALE_FACTOR, VECTOR_BYTES, Encoding, Meta

_MAX_UNROLLED = 16  # quads times tokens in a group; more are loops, which are as fast and quicker to compile
# Bytes from a use to its prefetch, for few tokens and for so many that products take about as long as memory: the best,
# or as good as it, in every shape measured (0 to 36864).
_AHEAD, _AHEAD_OF_MANY, _MANY = 4096, 16384, 5
_BITS = {8: -1, 4: 0x0F0F0F0F, 3: 0x07070707, 2: 0x03030303, 1: 0x01010101}  # masks of one code a byte

Sums = list[list[ir.Value]]  # of each row block and token: where a vector of 16 rows is kept
QuadBody = Callable[[list[ir.Value], ir.Value], None]


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
    """Addresses (int64 values) of the first row block, which the others follow, and of one tile's panels."""

    block: ir.Value
    block_bytes: ir.Value
    columns: ir.Value
    x: ir.Value
    xs: ir.Value
    xsum: ir.Value


def emit_blocks(
    builder: ir.IRBuilder, variant: Variant, num_blocks: int, width: int, operands: Operands
) -> list[list[ir.Value]]:
    """The products of ``num_blocks`` times 16 rows with ``width`` tokens: of each block and token a vector of 16 rows.

    What is loaded of the tokens is used for all blocks.
    """
    sums = [[cgutils.alloca_once_value(builder, v.const_f32(0.0)) for _ in range(width)] for _ in range(num_blocks)]
    if variant.encoding in PLANES:
        _emit_quantized(builder, variant, operands, sums)
    else:
        _emit_plain(builder, variant, operands, sums)
    return [[builder.load(total) for total in of_block] for of_block in sums]


def _starts(builder: ir.IRBuilder, ops: Operands, num_blocks: int) -> list[ir.Value]:
    """Where each row block begins."""
    return [builder.add(ops.block, builder.mul(ops.block_bytes, I64(b))) for b in range(num_blocks)]


def _ahead(builder: ir.IRBuilder, ops: Operands, width: int, num_blocks: int, done: ir.Value) -> ir.Value:
    """How far ahead of ``done`` bytes of a block to ask for more: past its end, of the one that will follow it.

    (``num_blocks`` are worked on side by side: that is not the next one in memory.)
    """
    distance = I64(_AHEAD_OF_MANY if width >= _MANY else _AHEAD)
    if num_blocks == 1:
        return distance
    is_past = builder.icmp_signed(">=", builder.add(done, distance), ops.block_bytes)
    others = builder.mul(ops.block_bytes, I64(num_blocks - 1))
    return builder.select(is_past, builder.add(others, distance), distance)


# ------------------------------------------------------------------------------------ quantized


def _emit_quantized(builder: ir.IRBuilder, variant: Variant, ops: Operands, sums: Sums) -> None:
    num_groups, width = builder.sdiv(ops.columns, I64(variant.group)), len(sums[0])
    blocks = _starts(builder, ops, len(sums))
    code_bytes = builder.mul(num_groups, I64(variant.group_bytes))
    metas = [builder.add(block, code_bytes) for block in blocks]
    next_meta = builder.mul(ops.block_bytes, I64(len(blocks)))
    with cgutils.for_range(builder, num_groups) as loop:
        done = builder.mul(loop.index, I64(variant.group_bytes))
        codes = [builder.add(block, done) for block in blocks]
        scales = [_emit_meta(builder, variant, next_meta, meta, num_groups, loop.index) for meta in metas]
        ahead = _ahead(builder, ops, width, len(blocks), done)
        panel = builder.mul(loop.index, I64((1 if variant.integer else 4) * variant.group * width))
        x = builder.add(ops.x, panel)
        if variant.integer:
            per_group = builder.mul(loop.index, I64(4 * width))
            dots = _emit_dots(builder, variant, codes, ahead, x, width)
            xs, xsum = builder.add(ops.xs, per_group), builder.add(ops.xsum, per_group)
            _add_group(builder, sums, dots, scales, xs, xsum)
        else:
            _emit_float_group(builder, variant, codes, ahead, x, scales, sums)


def _emit_meta(
    builder: ir.IRBuilder, variant: Variant, to_next: ir.Value, meta: ir.Value, num_groups: ir.Value, group: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Scales and zeros of 16 rows, as layout/packed.py, second_level.py and fp4.py define them.

    to_next: bytes to those that will be needed after these.
    """
    isa = variant.instruction_set
    if variant.meta == "f16":
        at = builder.add(meta, builder.mul(group, I64(VECTOR_BYTES)))
        v.prefetch(builder, builder.add(at, to_next))  # its own: what follows codes is elsewhere
        scale = builder.fmul(v.load_halves(builder, at, isa), v.const_f32(SCALE_FACTOR))
        return scale, v.load_halves(builder, v.offset(builder, at, 32), isa)
    if variant.meta == "e8m0":
        at = builder.add(meta, builder.mul(group, I64(16)))
        v.prefetch(builder, builder.add(at, to_next))
        return builder.fmul(v.load_powers(builder, at), v.const_f32(0.5)), v.const_f32(fp4.ZERO)
    at = builder.add(meta, builder.mul(group, I64(32)))
    v.prefetch(builder, builder.add(at, to_next))
    supers = builder.add(meta, builder.mul(num_groups, I64(32)))
    super_at = builder.add(supers, builder.mul(builder.lshr(group, I64(4)), I64(32)))
    unit = builder.fmul(v.load_halves(builder, super_at, isa), v.const_f32(second_level.SUPER_FACTOR))
    scale = builder.fmul(v.load_bytes_as_floats(builder, at), unit)
    zero = builder.fmul(
        v.load_bytes_as_floats(builder, v.offset(builder, at, 16)), v.const_f32(second_level.zero_step(variant.bits))
    )
    return scale, builder.fadd(zero, v.const_f32(second_level.lowest_zero(variant.bits)))


def _for_each_quad(
    builder: ir.IRBuilder,
    variant: Variant,
    codes: list[ir.Value],
    ahead: ir.Value,
    width: int,
    body: QuadBody,
) -> None:
    """Call ``body(each block's codes of one quad, number of the quad in its group)`` for all quads of a group.

    Between them it asks for as many bytes of each block, ``ahead`` of its codes: a CPU has room for few requests.
    """
    # Of the narrowest plane: one vector of it goes with one or more of the others.
    width_of_plane = PLANES[variant.encoding][-1]
    num_vectors = variant.group * width_of_plane // 32
    lines_of_one = variant.group_bytes // VECTOR_BYTES // num_vectors

    def one(j: ir.Value) -> None:
        for at in codes:
            first = builder.add(builder.add(at, ahead), builder.mul(j, I64(VECTOR_BYTES)))
            for line in range(lines_of_one):
                v.prefetch(builder, v.offset(builder, first, line * num_vectors * VECTOR_BYTES))
        for field in range(8 // width_of_plane):
            quad = v.offset(builder, j, field * num_vectors)
            body([_quad(builder, variant, at, j, field, num_vectors) for at in codes], quad)

    if num_vectors == 1 or variant.group // 4 * width * len(codes) <= _MAX_UNROLLED:
        for j in range(num_vectors):
            one(I64(j))
    else:
        v.repeat(builder, num_vectors, one)


def _quad(
    builder: ir.IRBuilder, variant: Variant, codes: ir.Value, j: ir.Value, field: int, num_vectors: int
) -> ir.Value:
    """A block's codes of one quad: field ``field`` of vector j."""
    bits = PLANES[variant.encoding][-1]

    def plane_vector(first: int) -> ir.Value:
        at = v.offset(builder, builder.add(codes, builder.mul(j, I64(VECTOR_BYTES))), first * VECTOR_BYTES)
        return v.load(builder, at, VI32)

    if variant.encoding == "q3":
        return _three_bits(builder, plane_vector, field, num_vectors)
    quad_codes = _field(builder, plane_vector(0), bits * field, bits)
    return v.fp4_levels(builder, quad_codes, variant.instruction_set) if variant.encoding == "fp4" else quad_codes


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


def _emit_dots(
    builder: ir.IRBuilder,
    variant: Variant,
    codes: list[ir.Value],
    ahead: ir.Value,
    x: ir.Value,
    width: int,
) -> Sums:
    """Exact integer products of one group: of each block, 16 rows for each token."""
    chains = 2 if width * len(codes) <= 2 else 1  # so that one product need not await the last
    slots = [[[cgutils.alloca_once(builder, VI32) for _ in range(chains)] for _ in range(width)] for _ in codes]
    for slot in (slot for block in slots for token in block for slot in token):
        builder.store(v.const_i32(0), slot)
    turn = 0

    def add(quads: list[ir.Value], quad: ir.Value) -> None:
        nonlocal turn
        at = builder.add(x, builder.mul(quad, I64(4 * width)))
        for t in range(width):
            four = v.load(builder, v.offset(builder, at, 4 * t), I32)
            for quad_codes, block in zip(quads, slots, strict=True):
                slot = block[t][turn % chains]
                builder.store(v.dot4(builder, builder.load(slot), quad_codes, four, variant.instruction_set), slot)
        turn += 1

    _for_each_quad(builder, variant, codes, ahead, width, add)
    return [[reduce(builder.add, [builder.load(slot) for slot in token]) for token in block] for block in slots]


def _add_group(
    builder: ir.IRBuilder,
    sums: Sums,
    dots: Sums,
    scales: list[tuple[ir.Value, ir.Value]],
    xs: ir.Value,
    xsum: ir.Value,
) -> None:
    """sums[t] = fma(fma(-zero, xsum[t], float(dots[t])), scale * xs[t], sums[t])."""
    for t in range(len(sums[0])):
        x_scale = v.broadcast(builder, v.offset(builder, xs, 4 * t), F32)
        x_sum = v.broadcast(builder, v.offset(builder, xsum, 4 * t), F32)
        for total, dot, (scale, zero) in zip(sums, dots, scales, strict=True):
            centred = v.fma(builder, builder.fneg(zero), x_sum, builder.sitofp(dot[t], VF32))
            factor = builder.fmul(scale, x_scale)
            builder.store(v.fma(builder, centred, factor, builder.load(total[t])), total[t])


def _emit_float_group(
    builder: ir.IRBuilder,
    variant: Variant,
    codes: list[ir.Value],
    ahead: ir.Value,
    x: ir.Value,
    scales: list[tuple[ir.Value, ir.Value]],
    sums: Sums,
) -> None:
    """sums[t] = fma((code - zero) * scale, x[t], sums[t]), column after column."""
    width = len(sums[0])

    def add(quads: list[ir.Value], quad: ir.Value) -> None:
        at = builder.add(x, builder.mul(quad, I64(16 * width)))
        for k in range(4):
            weights = []
            for quad_codes, (scale, zero) in zip(quads, scales, strict=True):
                byte = builder.and_(_shifted(builder, quad_codes, 8 * k), v.const_i32(0xFF))
                weights.append(builder.fmul(builder.fsub(builder.sitofp(byte, VF32), zero), scale))
            _add_column(builder, sums, weights, v.offset(builder, at, 4 * k * width))

    _for_each_quad(builder, variant, codes, ahead, width, add)


# ---------------------------------------------------------------------------------------- plain


def _emit_plain(builder: ir.IRBuilder, variant: Variant, ops: Operands, sums: Sums) -> None:
    """sums[t] = fma(w[column], x[column, t], sums[t]), column after column."""
    per_vector, width = 1 if variant.encoding == "f32" else 2, len(sums[0])
    blocks = _starts(builder, ops, len(sums))
    with cgutils.for_range(builder, builder.sdiv(ops.columns, I64(per_vector))) as loop:
        done = builder.mul(loop.index, I64(VECTOR_BYTES))
        ahead = builder.add(done, _ahead(builder, ops, width, len(blocks), done))
        for block in blocks:
            v.prefetch(builder, builder.add(block, ahead))
        x = builder.add(ops.x, builder.mul(loop.index, I64(4 * per_vector * width)))
        lanes = [v.load(builder, builder.add(block, done), VI32) for block in blocks]
        weights = [_plain_weights(builder, one, variant.encoding) for one in lanes]
        for k, of_blocks in enumerate(zip(*weights, strict=True)):
            _add_column(builder, sums, of_blocks, v.offset(builder, x, 4 * k * width))


def _plain_weights(builder: ir.IRBuilder, lanes: ir.Value, encoding: Encoding) -> list[ir.Value]:
    if encoding == "f32":
        return [builder.bitcast(lanes, VF32)]
    if encoding == "bf16":
        low, high = builder.shl(lanes, v.const_i32(16)), builder.and_(lanes, v.const_i32(-65536))
        return [builder.bitcast(low, VF32), builder.bitcast(high, VF32)]
    return [v.half_to_float(builder, builder.lshr(lanes, v.const_i32(16 * k))) for k in range(2)]


def _add_column(builder: ir.IRBuilder, sums: Sums, weights: Sequence[ir.Value], x: ir.Value) -> None:
    for t in range(len(sums[0])):
        value = v.broadcast(builder, v.offset(builder, x, 4 * t), F32)
        for total, weight in zip(sums, weights, strict=True):
            builder.store(v.fma(builder, weight, value, builder.load(total[t])), total[t])
