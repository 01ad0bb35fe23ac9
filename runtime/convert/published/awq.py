"""AWQ, as AutoAWQ writes it (version gemm)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moray.runtime.convert.published.headers import FLOATS, Headers
from moray.runtime.convert.published.weight import Grid, OnGrid, Published, Read, fields, groups_of_columns

_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the field of each of eight neighbouring outputs


@dataclass(frozen=True, slots=True)
class AwqWeight(OnGrid):
    """codes int32 [C, R / 8]; zeros int32 [G, R / 8]; scales [G, R]. Eight outputs are shuffled in each word."""

    def unpack(self, read: Read) -> Grid:
        codes_CR, zeros_GR = (_in_order(fields(read(role), self.bits, dim=1)) for role in ("codes", "zeros"))
        group_C = groups_of_columns(len(codes_CR), self.group, len(zeros_GR), None, self.parts["codes"])
        return Grid(codes_CR.T.contiguous(), read("scales").T.contiguous(), zeros_GR.T.contiguous(), group_C)


def find(headers: Headers) -> Iterator[tuple[str, Published]]:
    """Name -> weight. Raises CheckpointError."""
    version = str(headers.settings.get("version", "format") or "gemm").lower()
    if version != "gemm":
        raise headers.refusal("version", version, "gemm")
    bits = headers.bits(4)
    for base in headers.bases(".qweight"):
        parts = headers.parts(base, codes="qweight", zeros="qzeros", scales="scales")
        columns, words = headers.matrix(parts["codes"], "I32")
        group = headers.group(columns)
        groups, rows = -(-columns // group), words * 32 // bits
        headers.expect(parts["scales"], FLOATS, groups, rows)
        headers.expect(parts["zeros"], ("I32",), groups, words)
        dtype = headers.scale_dtype(parts["scales"])
        yield f"{base}.weight", AwqWeight(parts, (rows, columns), dtype, bits, group)


def _in_order(shuffled: torch.Tensor) -> torch.Tensor:
    eights: torch.Tensor = shuffled.reshape(len(shuffled), -1, len(_ORDER))
    return eights[..., _ORDER].flatten(1)
