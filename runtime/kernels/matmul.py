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
from moray.runtime.kernels.atomics import word
from moray.runtime.kernels.block import Operands, Variant, emit_blocks
from moray.runtime.kernels.vectors import I64

ITEMS = "void(int64, int64, int64)"  # signature of a phase's function

# Words of a product's params.
ROWS, COLUMNS, GROUP, INTEGER, BLOCK_BYTES, NUM_BLOCKS, WEIGHTS, STARTS, X, XS, XSUM, Y = range(12)
NUM_PARAMS = 12

MAX_WIDTH = 8  # pairs in a tile
MOST_BLOCKS = 4  # at once
# Row blocks at once of tiles of 1, 2, ... MAX_WIDTH pairs, measured. Of few pairs memory gives more to several streams,
# which the CPU's own prefetching follows too; of many, loads of the panels would take longer than one block's products.
# Their sums must find room in registers.
_BLOCKS = {
    "avx512vnni": (4, 4, 4, 4, 2, 2, 2, 2),
    "avx512": (4, 4, 4, 4, 2, 2, 2, 2),
    "avxvnni": (4, 4, 2, 2, 1, 1, 1, 1),
    "avx2": (4, 4, 2, 2, 2, 2, 2, 2),
    "portable": (4, 4, 2, 2, 1, 1, 1, 1),
}


def blocks_at_once(variant: Variant) -> tuple[int, ...]:
    """Row blocks at once of tiles of 1, 2, ... MAX_WIDTH pairs."""
    blocks = _BLOCKS[variant.instruction_set]
    if variant.encoding in ("bf16", "f16"):  # two columns of each block at once
        return (*blocks[:4], 1, 1, 1, 1)
    return blocks


def _cases(variant: Variant) -> list[tuple[int, int]]:
    """Row blocks and widths of the tiles that are compiled."""
    single = [(1, width) for width in range(1, MAX_WIDTH + 1)]
    return sorted({*single, *((blocks, i + 1) for i, blocks in enumerate(blocks_at_once(variant)))})


@intrinsic(prefer_literal=True)
def _tile(
    typingctx: Any, number: Any, num_blocks: Any, width: Any, block: Any, block_bytes: Any, columns: Any, x: Any,
    xs: Any, xsum: Any, y: Any, ldy: Any, rows: Any,
) -> Any:  # fmt: skip
    """y[t, 0..rows] = the products of row blocks with tile token t; ``y`` is an address, ``ldy`` bytes a token.

    num_blocks and width: one of ``_cases``.
    """
    variant = Variant.of_number(number.literal_value)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _number, num_blocks, width, *others = args
        done = builder.append_basic_block("done")
        switch = builder.switch(builder.add(builder.mul(num_blocks, I64(MAX_WIDTH + 1)), width), done)
        for blocks, tokens in _cases(variant):
            case = builder.append_basic_block(f"blocks{blocks}width{tokens}")
            switch.add_case(I64(blocks * (MAX_WIDTH + 1) + tokens), case)
            builder.position_at_end(case)
            builder.call(_tile_function(builder.module, variant, blocks, tokens), others)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(number, *[types.int64] * 11), codegen


def _tile_function(module: ir.Module, variant: Variant, blocks: int, tokens: int) -> ir.Function:
    """One case of ``_tile``. A function of its own: the time that LLVM takes grows faster than a function does."""
    name = f"moray_tile_{variant.number}_{blocks}_{tokens}"
    if name in module.globals:
        return module.get_global(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 9), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    block, block_bytes, columns, x, xs, xsum, y, ldy, rows = function.args
    operands = Operands(block, block_bytes, columns, x, xs, xsum)
    for b, sums in enumerate(emit_blocks(builder, variant, blocks, tokens, operands)):
        left = builder.sub(rows, I64(vectors.LANES * b))
        for t, total in enumerate(sums):
            at = vectors.offset(builder, builder.add(y, builder.mul(ldy, I64(t))), 4 * vectors.LANES * b)
            vectors.store_rows(builder, total, at, left)
    builder.ret_void()
    return function


@njit(inline="always")
def tile_of(pair, start, end):
    """Of a pair of an expert whose pairs are start..end-1: the first pair of its tile, and the tile's width."""
    first = pair - (pair - start) % MAX_WIDTH
    return first, min(MAX_WIDTH, end - first)


def _make_items(number: int) -> Any:
    blocks_of = (0, *blocks_at_once(Variant.of_number(number)))  # of each width

    def items(params, first, last):
        rows, columns, group = word(params, ROWS), word(params, COLUMNS), word(params, GROUP)
        block_bytes, num_blocks = word(params, BLOCK_BYTES), word(params, NUM_BLOCKS)
        x_bytes = columns if word(params, INTEGER) else 4 * columns
        g_bytes = 4 * (columns // group) if group else 0
        item = first
        while item < last:
            e = item // num_blocks
            b = item - e * num_blocks
            count = min(MOST_BLOCKS, last - item, num_blocks - b)
            block = word(word(params, WEIGHTS), e) + b * block_bytes
            p, end = word(word(params, STARTS), e), word(word(params, STARTS), e + 1)
            while p < end:
                x, xs = word(params, X) + p * x_bytes, word(params, XS) + p * g_bytes
                xsum = word(params, XSUM) + p * g_bytes
                y, left = word(params, Y) + 4 * p * rows + 64 * b, rows - 16 * b
                width = min(MAX_WIDTH, end - p)
                k = 0
                while k < count:
                    blocks = blocks_of[width] if count - k >= blocks_of[width] else 1
                    _tile(
                        number, blocks, width, block + k * block_bytes, block_bytes, columns, x, xs, xsum, y + 64 * k,
                        4 * rows, left - 16 * k,
                    )  # fmt: skip
                    k += blocks
                p += width
            item += count

    return cfunc(ITEMS, nopython=True, cache=True, error_model="numpy")(items)


@cache
def compile_items(variant: Variant) -> Any:
    """The compiled function of a product's phase; ``.address`` is what a program takes."""
    return _make_items(variant.number)
