"""Scales and zeros that the packed layout can hold: float64 in, float32 that it stores exactly out.

N groups of G weights each. A scale that is too large stays out of range, for the packer to report.
"""

from __future__ import annotations

import torch

from moray.runtime.layout import second_level
from moray.runtime.layout.packed import SCALE_FACTOR, Meta

_MAX_ZERO = 512.0  # above it float16 rounds a zero by more than a quarter of a code
_MIN_SCALE = 2.0**-24  # smallest float16 above 0


def zero_range(bits: int, meta: Meta) -> tuple[float, float]:
    """The lowest and the highest zero that may be stored."""
    if meta == "u8":
        return second_level.lowest_zero(bits), second_level.highest_zero(bits)
    return -_MAX_ZERO, _MAX_ZERO


def round_scales(scales_N: torch.Tensor, num_groups: int, meta: Meta) -> torch.Tensor:
    """To what is stored; ``num_groups`` is the number of groups in a row. None but 0 becomes 0."""
    if meta == "u8":
        return _second_level(scales_N.reshape(-1, num_groups)).reshape(-1)
    factored = scales_N / SCALE_FACTOR
    rounded = factored.half().double()
    smallest = torch.where(factored < 0, -_MIN_SCALE, _MIN_SCALE)
    rounded = torch.where((rounded == 0) & (factored != 0), smallest.double(), rounded)
    return (torch.where(rounded.isinf(), factored, rounded) * SCALE_FACTOR).float()


def round_zeros(zeros_N: torch.Tensor, bits: int, meta: Meta) -> torch.Tensor:
    """To what is stored."""
    if meta == "u8":
        step, lowest = second_level.zero_step(bits), second_level.lowest_zero(bits)
        codes = torch.round((zeros_N.double() - lowest) / step).clamp(0, second_level.MAX_CODE)
        return (codes * step + lowest).float()
    return zeros_N.half().float()


def _second_level(scales_RG: torch.Tensor) -> torch.Tensor:
    """Codes times a super-scale for each 16 groups of a row, which is as small as its largest scale allows."""
    groups = scales_RG.shape[1]
    padded = torch.nn.functional.pad(scales_RG, (0, -groups % second_level.GROUPS))
    blocks = padded.unflatten(1, (-1, second_level.GROUPS))
    needed = blocks.amax(dim=2, keepdim=True) / (second_level.MAX_CODE * second_level.SUPER_FACTOR)
    supers = needed.half()
    above = (supers.view(torch.int16) + 1).view(torch.float16)
    units = torch.where(supers.double() < needed, above, supers).double() * second_level.SUPER_FACTOR
    codes = torch.round(blocks / units.where(units > 0, 1)).clamp(1, second_level.MAX_CODE)
    rounded = torch.where(blocks > 0, codes * units, 0)
    return rounded.flatten(1)[:, :groups].float()
