"""The gated activations that are fused into a layer's launch.

With g the gate and u the up value of a column:

    silu            h = g * sigmoid(g) * u
    silu, limit     the same of g clamped to at most ``limit`` and u to +-``limit``        DeepSeek-V4, GLM-5
    alpha, limit    h = g * sigmoid(alpha * g) * (u + 1), g and u clamped so              gpt-oss, MiniMax-M3
    gelu            h = gelu(g) * u, gelu in its tanh form                                 Gemma

Gates are the first half of gate_up's rows, or (gpt-oss) every second one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# A kind is flags; these combinations are compiled.
CLAMPED, SCALED, GELU, INTERLEAVED = 1, 2, 4, 8
GATE_KINDS = (0, CLAMPED, CLAMPED | SCALED, CLAMPED | SCALED | INTERLEAVED, GELU)


@dataclass(frozen=True, slots=True)
class Gate:
    """One of them. ``limit`` None: not clamped; ``alpha`` None: the plain sigmoid, and no 1 added."""

    limit: float | None = None
    alpha: float | None = None
    is_gelu: bool = False
    is_interleaved: bool = False

    #: kind, and the bits of limit and alpha as float32: what rows.gated_row takes
    fields: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        flags = ((self.limit is not None, CLAMPED), (self.alpha is not None, SCALED), (self.is_gelu, GELU))
        kind = sum(flag for is_set, flag in flags if is_set) + INTERLEAVED * self.is_interleaved
        if kind not in GATE_KINDS:
            raise ValueError(f"a gate of kind {kind} is not one of those that are compiled: {GATE_KINDS}")
        values = np.array([self.limit or 0, self.alpha or 0], dtype=np.float32).view(np.int32)
        object.__setattr__(self, "fields", (kind, int(values[0]), int(values[1])))


SWIGLU = Gate()
