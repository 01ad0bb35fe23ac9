"""The bits of published quantized weights: codes, scales and zeros of every weight, and what they stand for.

Shapes: R rows (outputs), C columns (inputs), G groups in a row. Scales and zeros are returned for each weight, not
for each group, so that whatever a conversion does to a weight's rows and columns can be done to them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from moray.runtime.errors import CheckpointError
from moray.runtime.layout import fp4

Kind = Literal["gptq", "awq", "packed", "int8", "mxfp4", "fp8"]
Read = Callable[[str], torch.Tensor]  # a role of a weight's tensors: codes, scales, zeros, order

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the field of each of eight neighbouring outputs


@dataclass(frozen=True, slots=True)
class Grid:
    """w = (codes - zeros) * scales, weight by weight; with ``zeros`` None: MXFP4's codes and scale bytes."""

    codes: torch.Tensor  # uint8
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Every product is exact in float32, then rounded once."""
        if self.zeros is None:
            doubles = torch.tensor(fp4.DOUBLES, dtype=torch.float32)
            return torch.ldexp(doubles[self.codes.long()], self.scales.int() - 128).to(dtype)
        return ((self.codes.float() - self.zeros.float()) * self.scales.float()).to(dtype)

    def transpose(self) -> Grid:
        zeros = None if self.zeros is None else self.zeros.transpose(-1, -2)
        return Grid(self.codes.transpose(-1, -2), self.scales.transpose(-1, -2), zeros)


def unpack_gptq(read: Read, bits: int, group: int, zero_offset: int, has_order: bool) -> Grid:
    """codes int32 [C * bits / 32, R]; zeros int32 [G, R * bits / 32]; scales [G, R]; order [C]: each column's group."""
    codes_CR = _fields(read("codes"), bits, dim=0)
    zeros_GR = _fields(read("zeros"), bits, dim=1) + zero_offset
    group_C = _groups_of_columns(len(codes_CR), group, len(zeros_GR), read("order") if has_order else None)
    return Grid(codes_CR.T, read("scales")[group_C].T, zeros_GR[group_C].T)


def unpack_awq(read: Read, bits: int, group: int) -> Grid:
    """codes int32 [C, R / 8]; zeros int32 [G, R / 8]; scales [G, R]. Eight outputs are shuffled in each word."""
    codes_CR, zeros_GR = (_shuffled(_fields(read(role), bits, dim=1)) for role in ("codes", "zeros"))
    group_C = _groups_of_columns(len(codes_CR), group, len(zeros_GR), None)
    return Grid(codes_CR.T, read("scales")[group_C].T, zeros_GR[group_C].T)


def unpack_packed(read: Read, bits: int, group: int, columns: int, has_zeros: bool, has_order: bool) -> Grid:
    """compressed-tensors: codes int32 [R, C * bits / 32]; zeros int32 [R * bits / 32, G]; scales [R, G]; all biased."""
    codes_RC, scales_RG = _fields(read("codes"), bits, dim=1)[:, :columns], read("scales")
    middle = torch.full_like(scales_RG, 1 << (bits - 1), dtype=torch.uint8)
    zeros_RG = _fields(read("zeros"), bits, dim=0)[: len(codes_RC)] if has_zeros else middle
    group_C = _groups_of_columns(columns, group, scales_RG.shape[1], read("order") if has_order else None)
    return Grid(codes_RC, scales_RG[:, group_C], zeros_RG[:, group_C])


def unpack_int8(read: Read, group: int, has_zeros: bool) -> Grid:
    """compressed-tensors: codes int8 [R, C], scales and zeros (int8) [R, G], or one of each for all rows."""
    signed_RC = read("codes")
    rows, columns = signed_RC.shape
    scales_RG = read("scales").reshape(-1, read("scales").shape[-1] if read("scales").ndim else 1).expand(rows, -1)
    zeros_RG = read("zeros").int().reshape(-1, scales_RG.shape[1]).expand(rows, -1) if has_zeros else None
    group_C = _groups_of_columns(columns, group, scales_RG.shape[1], None)
    middle = torch.full_like(scales_RG, 128, dtype=torch.int32)
    zeros = middle if zeros_RG is None else zeros_RG + 128
    return Grid((signed_RC.int() + 128).byte(), scales_RG[:, group_C], zeros.byte()[:, group_C])


def unpack_mxfp4(read: Read) -> Grid:
    """codes uint8 [.., R, C / 2] or [.., R, G, 16], two of neighbouring columns a byte; scales uint8 [.., R, G]."""
    packed, scales = read("codes").view(torch.uint8), read("scales").view(torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(*scales.shape[:-1], -1)
    return Grid(codes, scales.repeat_interleave(codes.shape[-1] // scales.shape[-1], dim=-1), None)


def dequantize_fp8(read: Read, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """codes float8 [.., R, C]; a scale for each ``block`` of [R, C]: the product in float32, rounded once."""
    values, scales = read("codes").float(), read("scales")
    if scales.dtype == torch.uint8:  # powers of two
        scales = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    rows, columns = values.shape[-2:]
    scales = scales.float().reshape(*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    for dim, size, length in ((-2, block[0], rows), (-1, block[1], columns)):
        scales = scales.repeat_interleave(size, dim=dim).narrow(dim, 0, length)
    return values.mul_(scales).to(dtype)


def _fields(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The fields of int32 words, lowest bits first, as uint8 along ``dim``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    spread = words.unsqueeze(dim + 1)
    shape = [1] * spread.ndim
    shape[dim + 1] = len(shifts)
    fields = (spread >> shifts.reshape(shape)) & ((1 << bits) - 1)
    return fields.flatten(dim, dim + 1).to(torch.uint8)


def _shuffled(fields: torch.Tensor) -> torch.Tensor:
    eights: torch.Tensor = fields.reshape(len(fields), -1, len(_AWQ_ORDER))
    return eights[..., _AWQ_ORDER].flatten(1)


def _groups_of_columns(columns: int, group: int, num_groups: int, order: torch.Tensor | None) -> torch.Tensor:
    if order is None:
        return torch.arange(columns) // group
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < num_groups:
        raise CheckpointError(
            f"g_idx names groups {int(order.min())} to {int(order.max())} of {num_groups}; download it again"
        )
    return order.long()
