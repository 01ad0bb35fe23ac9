"""One weight of a pre-quantized checkpoint: its codes, scales and zeros, and what they stand for.

Shapes: R rows (outputs), C columns (inputs), G groups in a row. Weights with a leading dimension are those of all
experts; of one expert it is 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moray.runtime.errors import CheckpointError
from moray.runtime.layout import fp4
from moray.runtime.layout.packed import Encoding, Meta, is_legal_group

Read = Callable[[str], torch.Tensor]  # a tensor of the checkpoint by its key

_MAX_GROUP = 256  # activations are quantized in the weights' groups: larger ones would cost precision
_ENCODINGS: dict[int, Encoding] = {2: "q2", 4: "q4", 8: "q8"}
_CHUNK = 1 << 18  # weights that are dequantized at once: in cache, and next to nothing in memory


@dataclass(frozen=True, slots=True)
class Grid:
    """w = (codes - zeros) * scales, a scale and a zero a group; with ``zeros`` None: MXFP4's codes and scale bytes.

    codes: uint8 [.., R, C]; scales, zeros: [.., R, G]; group_C: int64, each column's group. ``transposed``: the
    parameter is [.., C, R], and so is what the methods return.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_C: torch.Tensor
    transposed: bool = False

    def oriented_codes(self) -> torch.Tensor:
        return self._oriented(self.codes)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The scale or zero of every weight: so that what is done to weights can be done to them too."""
        return self._oriented(values[..., self.group_C])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Every product is exact in float32 (with scales of 16 bits), then rounded once."""
        rows, columns = self.codes.flatten(0, -2), self.codes.shape[-1]
        scales = self.scales.flatten(0, -2)
        zeros = None if self.zeros is None else self.zeros.flatten(0, -2)
        doubles = torch.tensor(fp4.DOUBLES, dtype=torch.float32)
        out = torch.empty(rows.shape, dtype=dtype)
        for part in row_chunks(*rows.shape):
            if zeros is None:
                powers = scales[part].int()[:, self.group_C] - 128
                out[part] = torch.ldexp(doubles[rows[part].long()], powers)
            else:
                steps = rows[part].float() - zeros[part].float()[:, self.group_C]
                out[part] = steps.mul_(scales[part].float()[:, self.group_C])
        return self._oriented(out.reshape(*self.codes.shape[:-1], columns))

    def check(self, where: str) -> None:
        """Raises CheckpointError if a scale is not a number, or is 0 for codes that are not."""
        bad = self.scales == fp4.MAX_EXPONENT + 1 if self.zeros is None else ~torch.isfinite(self.scales)
        if bad.any():
            raise damaged(where, "a scale that is not a number")
        if self.zeros is not None and (self.scales == 0).any():
            used = self.codes != self.zeros[..., self.group_C]
            if (used & (self.scales == 0)[..., self.group_C]).any():
                raise damaged(where, "a scale of 0 for weights that are not 0")

    def _oriented(self, values: torch.Tensor) -> torch.Tensor:
        return values.transpose(-1, -2) if self.transposed else values


@dataclass(frozen=True, slots=True)
class Published(ABC):
    """One weight, quantized. ``parts``: role -> the checkpoint's key. ``shape`` and ``dtype``: of it in 16 bits."""

    parts: dict[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def dequantize(self, read: Read) -> torch.Tensor:
        """The weight as it would be in 16 bits. ``read`` may give one expert of each tensor. Raises CheckpointError."""


@dataclass(frozen=True, slots=True)
class OnGrid(Published):
    """A weight of integer codes, or of MXFP4's."""

    bits: int
    group: int  # columns that share a scale
    is_reordered: bool = False  # groups are not runs of columns, says the configuration

    @abstractmethod
    def unpack(self, read: Read) -> Grid: ...

    def read_grid(self, read: Read) -> Grid:
        """Raises CheckpointError: scales that cannot be."""
        grid = self.unpack(lambda role: read(self.parts[role]))
        grid.check(self.parts["scales"])
        return grid

    def dequantize(self, read: Read) -> torch.Tensor:
        return self.read_grid(read).dequantize(self.dtype)

    def coding(self, columns: int) -> tuple[Encoding, int, Meta] | None:
        """How a packed matrix with such rows holds the codes as they are; None if it cannot."""
        fitting = [
            g for g in range(16, _MAX_GROUP + 1) if self.group % g == 0 and is_legal_group(g, columns, self.bits)
        ]
        return (_ENCODINGS[self.bits], max(fitting), "f16") if fitting else None


def row_chunks(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of a matrix's rows, a multiple each, that are worth one call."""
    step = max(1, _CHUNK // max(1, columns * multiple)) * multiple
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def fields(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The fields of 32-bit words, lowest bits first, as uint8 along ``dim`` (0 or 1) of a matrix."""
    count = 32 // bits
    shape = [size * count if d == dim else size for d, size in enumerate(words.shape)]
    out = torch.empty(shape, dtype=torch.uint8)
    for i in range(count):
        own = (slice(i, None, count),) if dim == 0 else (slice(None), slice(i, None, count))
        out[own] = (words >> (bits * i)) & ((1 << bits) - 1)
    return out


def groups_of_columns(
    columns: int, group: int, num_groups: int, order: torch.Tensor | None, where: str
) -> torch.Tensor:
    """int64 [C]. ``order``: each column's group as published (g_idx), if it is. Raises CheckpointError."""
    if order is None:
        return torch.arange(columns) // group
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < num_groups:
        raise damaged(where, f"group {int(order.max())} or below 0, expected 0 to {num_groups - 1}")
    return order.long()


def damaged(key: str, what: str) -> CheckpointError:
    return CheckpointError(f"tensor {key} holds {what}; the checkpoint is damaged, download it again")
