"""Matrix products over the packed layout, on the CPU, as phases of a program (pool.py).

Shapes: P (token, expert) pairs sorted by expert; C columns (inputs), R rows (outputs), G groups a row, E experts.
``y_PR = x_PC @ W_e^T`` for every expert e over its own range of pairs. An item is one row block of one expert with
all of the expert's pairs, so each row block is read from memory once, and unpacked once for a tile of up to 8 pairs.

Pairs lie in panels (block.py): an expert's pairs are cut into tiles of 8, and one of what is left over. A tile of pairs
p.. starts at p's place, so panels fill [P, C] without gaps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

from moray.runtime.kernels import vectors
from moray.runtime.kernels.atomics import load_int64
from moray.runtime.kernels.block import Operands, Variant, emit_blocks
from moray.runtime.kernels.vectors import I64

ITEMS = "void(int64, int64, int64)"  # signature of a phase's function

# Words of a product's params.
ROWS, COLUMNS, GROUP, INTEGER, BLOCK_BYTES, NUM_BLOCKS, WEIGHTS, STARTS, X, XS, XSUM, Y = range(12)
NUM_PARAMS = 12

MAX_WIDTH = 8  # pairs in a tile
BLOCKS_AT_ONCE = 2  # for tiles of MAX_WIDTH, in 32 registers: loads of the panels would take longer than one's products


@intrinsic(prefer_literal=True)
def _tile(
    typingctx: Any, number: Any, num_blocks: Any, width: Any, block: Any, block_bytes: Any, columns: Any, x: Any,
    xs: Any, xsum: Any, y: Any, ldy: Any, rows: Any,
) -> Any:  # fmt: skip
    """y[t, 0..rows] = the products of row blocks with tile token t; ``y`` is an address, ``ldy`` bytes a token.

    num_blocks, a literal: 1, for tiles of any width, or more, for tiles of MAX_WIDTH.
    """
    variant, blocks = Variant.of_number(number.literal_value), num_blocks.literal_value

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _number, _blocks, width, block, block_bytes, columns, x, xs, xsum, y, ldy, rows = args
        operands, done = Operands(block, block_bytes, columns, x, xs, xsum), builder.append_basic_block("done")
        switch = builder.switch(width, done)
        for tokens in range(1 if blocks == 1 else MAX_WIDTH, MAX_WIDTH + 1):
            case = builder.append_basic_block(f"width{tokens}")
            switch.add_case(I64(tokens), case)
            builder.position_at_end(case)
            for b, sums in enumerate(emit_blocks(builder, variant, blocks, tokens, operands)):
                left = builder.sub(rows, I64(vectors.LANES * b))
                for t, total in enumerate(sums):
                    at = vectors.offset(builder, builder.add(y, builder.mul(ldy, I64(t))), 4 * vectors.LANES * b)
                    vectors.store_rows(builder, total, at, left)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(number, num_blocks, *[types.int64] * 10), codegen


@njit(nogil=True, cache=True, forceinline=True)
def word(params, index):
    """Word ``index`` of an int64 array by its address."""
    return load_int64(params + 8 * index)


@njit(nogil=True, cache=True)
def tile_of(pair, start, end):
    """Of a pair of an expert whose pairs are start..end-1: the first pair of its tile, and the tile's width."""
    first = pair - (pair - start) % MAX_WIDTH
    return first, min(MAX_WIDTH, end - first)


def _make_items(number: int) -> Any:
    at_once = BLOCKS_AT_ONCE if Variant.of_number(number).instruction_set in ("avx512vnni", "avx512") else 1

    def items(params, first, last):
        rows, columns, group = word(params, ROWS), word(params, COLUMNS), word(params, GROUP)
        block_bytes, num_blocks = word(params, BLOCK_BYTES), word(params, NUM_BLOCKS)
        x_bytes = columns if word(params, INTEGER) else 4 * columns
        g_bytes = 4 * (columns // group) if group else 0
        item = first
        while item < last:
            e = item // num_blocks
            b = item - e * num_blocks
            count = min(at_once, last - item, num_blocks - b)
            block = word(word(params, WEIGHTS), e) + b * block_bytes
            p, end = word(word(params, STARTS), e), word(word(params, STARTS), e + 1)
            while p < end:
                x, xs = word(params, X) + p * x_bytes, word(params, XS) + p * g_bytes
                xsum = word(params, XSUM) + p * g_bytes
                y, left = word(params, Y) + 4 * p * rows + 64 * b, rows - 16 * b
                width = min(MAX_WIDTH, end - p)
                if width == MAX_WIDTH and count == BLOCKS_AT_ONCE:
                    _tile(number, BLOCKS_AT_ONCE, width, block, block_bytes, columns, x, xs, xsum, y, 4 * rows, left)
                else:
                    for k in range(count):
                        _tile(
                            number, 1, width, block + k * block_bytes, block_bytes, columns, x, xs, xsum, y + 64 * k,
                            4 * rows, left - 16 * k,
                        )  # fmt: skip
                p += width
            item += count

    return cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")(items)


@cache
def compile_items(variant: Variant) -> Any:
    """The compiled function of a product's phase; ``.address`` is what a program takes."""
    return _make_items(variant.number)
