"""FP8 with scales of blocks, of rows or of whole tensors, as DeepSeek, Qwen and others publish it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moray.runtime.convert.published import mxfp4
from moray.runtime.convert.published.headers import EXPONENTS, FLOATS, Headers
from moray.runtime.convert.published.weight import Published, Read, damaged, row_chunks
from moray.runtime.errors import CheckpointError

TYPES = ("F8_E4M3", "F8_E5M2")

Block = tuple[int, int]  # rows and columns that share a scale


@dataclass(frozen=True, slots=True)
class Fp8Weight(Published):
    """codes float8 [.., R, C]; a scale for each ``block`` of [R, C], in any shape of as many values."""

    block: Block

    def dequantize(self, read: Read) -> torch.Tensor:
        """The product in float32, rounded once."""
        codes, scales = read(self.parts["codes"]), _as_floats(read(self.parts["scales"]))
        where = self.parts["scales"]
        if not torch.isfinite(scales).all():
            raise damaged(where, "a scale that is not a number")
        matrices = codes.reshape(-1, *codes.shape[-2:]) if codes.ndim > 1 else codes.reshape(1, 1, -1)
        count, rows, columns = matrices.shape
        high, wide = self.block
        grids = scales.reshape(-1, -(-rows // high), -(-columns // wide)).expand(count, -1, -1)
        has_zero, out = bool((scales == 0).any()), torch.empty(matrices.shape, dtype=self.dtype)
        for matrix, grid, made in zip(matrices, grids, out, strict=True):
            for part in row_chunks(rows, columns, high):
                own = grid[part.start // high : -(-part.stop // high)].repeat_interleave(high, dim=0)
                own = own[: part.stop - part.start].repeat_interleave(wide, dim=1)[:, :columns]
                values = matrix[part].float()
                if has_zero and ((own == 0) & (values != 0)).any():
                    raise damaged(where, "a scale of 0 for weights that are not 0")
                made[part] = values.mul_(own)
        return out.reshape(codes.shape)


def find(headers: Headers) -> Iterator[tuple[str, Published]]:
    """Name -> weight. Raises CheckpointError."""
    size = headers.settings.get("weight_block_size")
    for key, entry in headers.tensors.items():
        if entry.dtype not in (*TYPES, "I8"):
            continue
        stem = key.removesuffix("weight")
        names = (f"{key}_scale_inv", f"{key}_scale", f"{stem}scale", f"{stem}qscale_weight")
        scales = next((name for name in names if name in headers.tensors), None)
        if entry.dtype == "I8":  # two four-bit floats a byte, as DeepSeek-V4 has its experts
            if scales and headers.tensors[scales].dtype in EXPONENTS:
                yield key, mxfp4.of_matrix(headers, {"codes": key, "scales": scales}, "I8")
            continue
        if scales is None:
            raise CheckpointError(
                f"{headers.root} has no scales for {key} ({entry.dtype}), expected {names[0]}; "
                "it is incomplete, download it again"
            )
        yield key, make_weight(headers, key, scales, size)


def make_weight(headers: Headers, key: str, scales: str, size: Any) -> Fp8Weight:
    """``size``: rows and columns of a block, if the configuration says so. Raises CheckpointError."""
    shape, grid = headers.shape(key, *TYPES, at_least=1), headers.shape(scales, *FLOATS, *EXPONENTS)
    *outer, rows, columns = shape if len(shape) > 1 else (1, *shape)
    block = _find_block(rows, columns, math.prod(outer), grid, size)
    if block is None:
        wanted = f"[{-(-rows // size[0])}, {-(-columns // size[1])}]" if _is_pair(size) else "1 value"
        raise CheckpointError(
            f"{headers.root}: {scales} has shape {list(grid)}, expected {wanted} for {key} of {list(shape)}; "
            "the checkpoint does not fit its config.json, download it again"
        )
    return Fp8Weight({"codes": key, "scales": scales}, shape, headers.settings.dtype, block)


def _find_block(rows: int, columns: int, outer: int, grid: tuple[int, ...], size: Any) -> Block | None:
    """As configured, or what divides the weight (as transformers has it)."""
    if math.prod(grid) in (1, outer):
        return rows, columns
    high, wide = grid[-2:] if len(grid) > 1 else (*grid, 1)
    if math.prod(grid[:-2]) != outer:
        return None
    if _is_pair(size) and (-(-rows // size[0]), -(-columns // size[1])) == (high, wide):
        return int(size[0]), int(size[1])
    fits = high and wide and rows % high == 0 and columns % wide == 0
    return (rows // high, columns // wide) if fits else None


def _as_floats(scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def _is_pair(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
