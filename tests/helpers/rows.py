"""The row functions of the kernels as functions on arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from moray.runtime.arrays import Floats
from moray.runtime.kernels.gates import SWIGLU, Gate
from moray.runtime.kernels.rows import gated_row, quantize_group


@njit
def _quantize(x, group, codes, scales, sums):  # type: ignore[no-untyped-def]
    columns = x.shape[1]
    for row in range(x.shape[0]):
        for g in range(columns // group):
            quantize_group(
                x.ctypes.data + 4 * (row * columns + g * group),
                group,
                codes.ctypes.data + row * columns + g * group,
                4,
                scales.ctypes.data + 4 * (row * scales.shape[1] + g),
                sums.ctypes.data + 4 * (row * scales.shape[1] + g),
            )


@njit
def _gated(gate, up, h, fields):  # type: ignore[no-untyped-def]
    kind, limit, alpha = fields
    gated_row(gate.ctypes.data, up.ctypes.data, h.ctypes.data, h.size, kind, limit, alpha)


def quantize_rows(x: Floats, group: int) -> tuple[npt.NDArray[np.int8], Floats, Floats]:
    """Codes [P, C], scales [P, G] and sums [P, G] of x [P, C]."""
    codes = np.empty(x.shape, np.int8)
    scales, sums = (np.empty((len(x), x.shape[1] // group), np.float32) for _ in range(2))
    _quantize(np.ascontiguousarray(x), group, codes, scales, sums)
    return codes, scales, sums


def swiglu(gate: Floats, up: Floats) -> Floats:
    """silu(gate) * up."""
    h = np.empty(gate.shape, np.float32)
    _gated(np.ascontiguousarray(gate), np.ascontiguousarray(up), h, SWIGLU.fields)
    return h


def gated(gate: Gate, gate_up: Floats) -> Floats:
    """[2 I] of one row of gate_up -> [I]."""
    width = len(gate_up) // 2
    h = np.empty(width, np.float32)
    _gated(gate_up, gate_up[width:], h, gate.fields)
    return h
