"""From weights to codes, scales and zeros: HQQ, with its traps handled.

HQQ (hqq's ``Quantizer``) minimises the error of each group's zero point. Around it:

* It works on absolute magnitudes and clamps small ones, so each group is first scaled by a power of two
  to a range (max - min) in [2, 4), and the scale is undone in its grid: exact, and the result no longer
  depends on the magnitude of the weights. Relative errors with that range, and of plain hqq, on 64 x 4096
  Gaussian weights of std 0.02: 8 bits g64 0.00506 / 0.00506, 4 bits g64 0.0872 / 0.0872,
  3 bits g64 0.1836 / 0.1847, 2 bits g16 0.2991 / 0.3032. From 1 downwards the range makes no difference.
* A group of equal weights has no range: it gets code 1, zero 0 and the weight as its scale.
* A group far from 0, whose zero would lose precision in float16, gets a range that includes 0.
* Scales and zeros are rounded to float16, as stored, before the codes are chosen.
"""

from __future__ import annotations

import numpy as np
import torch
from hqq.core.quantize import Quantizer

from moray.runtime.layout.packed import SCALE_FACTOR, Quantized

_BLOCK_BYTES = 1 << 20  # float32 bytes per call: in cache, hqq is 8 times faster (64 rows of 4096)
_CANONICAL_RANGE = 2.0
_MAX_ZERO = 512.0  # above it float16 rounds a zero by more than a quarter of a code
_MIN_SCALE = 2.0**-24  # smallest float16 above 0


def quantize_rows(matrix_RC: torch.Tensor, bits: int, group: int) -> Quantized:
    """Quantize [R, C] of finite floats, ``group`` columns of a row to a scale and a zero.

    ``group`` must divide C. Scales and zeros come back as float32 that float16 holds exactly (scales:
    after the factor of the packed layout), unless they overflow it, which the packer reports.
    """
    rows, columns = matrix_RC.shape
    assert columns % group == 0 and matrix_RC.is_floating_point()
    block = max(1, _BLOCK_BYTES // (4 * columns))
    parts = [_quantize_groups(part.float().reshape(-1, group), bits) for part in matrix_RC.split(block)]
    codes, scales, zeros = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
    return Quantized(codes.reshape(rows, columns), scales.reshape(rows, -1).astype(np.float32), zeros.reshape(rows, -1))


def dequantize_rows(quantized: Quantized) -> torch.Tensor:
    """Float32 [R, C] of what was quantized."""
    rows, columns = quantized.codes.shape
    codes = torch.from_numpy(quantized.codes.reshape(rows, quantized.scales.shape[1], -1).astype(np.float32))
    scales, zeros = torch.from_numpy(quantized.scales), torch.from_numpy(quantized.zeros)
    return ((codes - zeros[..., None]) * scales[..., None]).reshape(rows, columns)


def _quantize_groups(groups_NG: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 codes [N, G], float32 scales [N] and zeros [N] of float32 groups [N, G]."""
    low, high = torch.aminmax(groups_NG, dim=1)
    exponent_N = _canonical_exponent(high.double() - low.double())
    scaled_NG = torch.ldexp(groups_NG.double(), exponent_N[:, None]).float()
    scales_N, zeros_N = _hqq(scaled_NG, bits)
    far = zeros_N.abs() > _MAX_ZERO
    if far.any():
        scales_N[far], zeros_N[far] = _grid_with_zero(scaled_NG[far], bits)
    scales_N, zeros_N = _as_stored(scales_N, zeros_N, exponent_N)
    codes_NG = _choose_codes(groups_NG, scales_N, zeros_N, bits)
    constant = low == high
    codes_NG[constant] = 1
    scales_N[constant] = _round_scale(low[constant])
    zeros_N[constant] = 0
    return codes_NG, scales_N, zeros_N


def _canonical_exponent(range_N: torch.Tensor) -> torch.Tensor:
    """The power of two that brings each range to [2, 4); 0 where there is no range."""
    _, exponent = torch.frexp(range_N)  # range = m * 2**exponent, m in [0.5, 1)
    return torch.where(range_N > 0, 2 - exponent, torch.zeros_like(exponent))


def _hqq(groups_NG: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    _, meta = Quantizer.quantize(
        groups_NG,
        nbits=bits,
        group_size=groups_NG.shape[1],
        axis=1,
        optimize=True,
        bitpack=False,
        device="cpu",
    )
    return meta["scale"].reshape(-1).clone(), meta["zero"].reshape(-1).clone()  # out of inference mode


def _grid_with_zero(groups_NG: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and integer zeros of a grid that covers each group and 0."""
    low = groups_NG.amin(dim=1).clamp(max=0)
    high = groups_NG.amax(dim=1).clamp(min=0)
    scales = (high - low) / (2**bits - 1)
    return scales, torch.round(-low / scales)


def _as_stored(
    scales_N: torch.Tensor, zeros_N: torch.Tensor, exponent_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo the canonical range and round to float16; the zero follows the scale that was rounded."""
    true_N = torch.ldexp(scales_N.double(), -exponent_N)
    stored_N = _round_scale(true_N)
    zeros_N = (zeros_N.double() * (true_N / stored_N.double())).half().float()
    return stored_N, zeros_N


def _round_scale(scales: torch.Tensor) -> torch.Tensor:
    """To what float16 holds after the layout's factor. What overflows stays, for the packer to report."""
    factored = scales.double() / SCALE_FACTOR
    rounded = factored.half().double()
    smallest = torch.where(factored < 0, -_MIN_SCALE, _MIN_SCALE)
    rounded = torch.where((rounded == 0) & (factored != 0), smallest.double(), rounded)
    return (torch.where(rounded.isinf(), factored, rounded) * SCALE_FACTOR).float()


def _choose_codes(groups_NG: torch.Tensor, scales_N: torch.Tensor, zeros_N: torch.Tensor, bits: int) -> torch.Tensor:
    codes = torch.round(groups_NG / scales_N[:, None] + zeros_N[:, None])
    return codes.clamp_(0, 2**bits - 1).nan_to_num_(0).to(torch.uint8)
