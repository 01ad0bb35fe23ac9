"""Activations on their way to another machine: int8 codes and a peak for each group.

A peak is a group's largest magnitude, from which the kernels make the scale (reference.py: ``quantize_activations``).
What ``restore_rows`` makes of codes and peaks is quantized by them to the same codes, scales and sums, bit for bit: an
element whose code is +-127 becomes +-peak exactly, so the group has the same peak; of every other one the error stays
far below half a code.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_MOST = np.float32(127)
_MAX_FINITE_BITS = np.int32(0x7F7FFFFF)


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_rows(x, group, codes, peaks):
    """x float32 [T, C] -> codes int8 [T, C] and peaks float32 [T, C / group], written.

    A peak is NaN if its group is not finite, and 0 if it is too small to be anything else in int8.
    """
    bits, values = x.view(np.int32), peaks.view(np.int32)
    for t in range(x.shape[0]):
        for g in range(peaks.shape[1]):
            first = g * group
            largest = np.int32(0)
            for c in range(first, first + group):  # magnitudes compare as their bits do, and NaN above all
                largest = max(largest, bits[t, c] & np.int32(0x7FFFFFFF))
            values[t, g] = largest
            inverse = _MOST / peaks[t, g]
            if largest > _MAX_FINITE_BITS:
                peaks[t, g], inverse = np.float32(np.nan), np.float32(0)
            elif not np.isfinite(inverse):
                peaks[t, g], inverse = np.float32(0), np.float32(0)
            if inverse > 0:
                for c in range(first, first + group):
                    codes[t, c] = np.int8(np.rint(x[t, c] * inverse))
            else:
                codes[t, first : first + group] = 0


@njit(nogil=True, cache=True, error_model="numpy")
def restore_rows(codes, peaks, group, x):
    """x float32 [T, C], written, whose int8 form is these codes with the scales of these peaks."""
    for t in range(x.shape[0]):
        for g in range(peaks.shape[1]):
            peak = peaks[t, g]
            scale = peak / _MOST
            for c in range(g * group, (g + 1) * group):
                code = codes[t, c]
                if abs(code) == 127:
                    x[t, c] = peak if code > 0 else -peak
                else:
                    x[t, c] = np.float32(code) * scale
