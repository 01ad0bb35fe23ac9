"""From one norm's output to another's, of the same input, without the input.

RMSNorm and LayerNorm are y = normalized(s) * gain + shift. Two of the same kind with the same epsilon share
normalized(s), so y_target = (y_source - shift_source) * gain_target / gain_source + shift_target. Gains and shifts are
measured, not read from parameters: some families use 1 + weight.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Norm = Callable[[torch.Tensor], torch.Tensor]

_LOST_GAIN = 1e-6  # of the largest: what a source scales by less than that is not in its output any more
_MOST_LOST = 1 / 16  # of the columns
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest output


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """y = x * scale + shift, [H] each; None for one that changes nothing.

    ``num_lost`` columns are not in x and count as their shift.
    """

    scale: torch.Tensor | None
    shift: torch.Tensor | None
    num_lost: int = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return x
        return x * self.scale if self.shift is None else torch.addcmul(self.shift, x, self.scale)


IDENTITY = Affine(None, None)


@torch.no_grad()
def find_affine(source: Norm, target: Norm, residual: torch.Tensor) -> Affine | None:
    """target(s) from source(s), or None if no such map holds for residuals [..., H] like the given one."""
    source_gain, source_shift = _measure(source, residual)
    target_gain, target_shift = _measure(target, residual)
    is_lost = source_gain.abs() <= _LOST_GAIN * source_gain.abs().max()
    num_lost = int(is_lost.sum())
    if num_lost > _MOST_LOST * is_lost.numel():
        return None
    scale = torch.where(is_lost, 0.0, target_gain / torch.where(is_lost, 1.0, source_gain))
    shift = target_shift - source_shift * scale
    found = Affine(scale.to(residual.dtype), shift.to(residual.dtype) if shift.any() else None, num_lost)
    tolerance = _TOLERANCE[residual.dtype]
    for factor in (1.0, 0.5, 2.0):  # another epsilon shows in small residuals first
        wanted, got = target(residual * factor), found(source(residual * factor))
        error = (got - wanted)[..., ~is_lost].abs().max()
        if not error <= tolerance * wanted.abs().max():
            return None
    return found


def _measure(norm: Norm, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and shift, float32 [H] each, from values of mean 0 and mean square 1."""
    signs = torch.ones(like.shape[-1], device=like.device, dtype=like.dtype)
    signs[1::2] = -1
    up, down = norm(signs[None]).float()[0], norm(-signs[None]).float()[0]
    shift = (up + down) / 2
    return (up - down) / 2 * signs.float(), shift
