"""MXFP4: four-bit floats with a power of two for every 32. gpt-oss has its experts so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moray.runtime.convert.published.headers import Headers
from moray.runtime.convert.published.weight import Grid, OnGrid, Published, Read
from moray.runtime.layout import fp4
from moray.runtime.layout.packed import Encoding, Meta


@dataclass(frozen=True, slots=True)
class Mxfp4Weight(OnGrid):
    """codes uint8 [.., R, C / 2] or [.., R, G, 16], two of neighbouring columns a byte; scales uint8 [.., R, G]."""

    transposed: bool = False  # the parameter is [.., C, R]

    def unpack(self, read: Read) -> Grid:
        packed, scales = read("codes").view(torch.uint8), read("scales").view(torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(*scales.shape[:-1], -1)
        return Grid(codes, scales, None, torch.arange(codes.shape[-1]) // fp4.GROUP, self.transposed)

    def coding(self, columns: int) -> tuple[Encoding, int, Meta] | None:
        return ("fp4", fp4.GROUP, "e8m0") if columns % fp4.GROUP == 0 else None


def find(headers: Headers) -> Iterator[tuple[str, Published]]:
    """Name -> weight. Raises CheckpointError."""
    for base in headers.bases("_blocks"):
        parts = headers.parts(base, "_", codes="blocks", scales="scales")
        *outer, rows, groups, width = headers.shape(parts["codes"], "U8", at_least=3)
        if width != fp4.GROUP // 2:
            raise headers.wrong(parts["codes"], [*outer, rows, groups, fp4.GROUP // 2])
        headers.expect(parts["scales"], ("U8",), *outer, rows, groups)
        shape = (*outer, groups * fp4.GROUP, rows)  # experts of families that have them [in, out]
        yield base, Mxfp4Weight(parts, shape, headers.settings.dtype, 4, fp4.GROUP, transposed=True)


def of_matrix(headers: Headers, parts: dict[str, str], *types: str) -> Mxfp4Weight:
    """A matrix [R, C] whose codes are [R, C / 2]. Raises CheckpointError."""
    rows, width = headers.matrix(parts["codes"], *types)
    columns = 2 * width
    headers.expect(parts["scales"], ("U8", "F8_E8M0"), rows, -(-columns // fp4.GROUP))
    return Mxfp4Weight(parts, (rows, columns), headers.settings.dtype, 4, fp4.GROUP)
