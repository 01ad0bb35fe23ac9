"""Activations on their way to another machine: int8 codes and a peak for each group, in one buffer.

A peak is a group's largest magnitude, from which the kernels make the scale (reference.py: ``quantize_activations``).
What ``read_request`` makes of codes and peaks is quantized by them to the same codes, scales and sums, bit for bit: an
element whose code is +-127 becomes +-peak exactly, so the group has the same peak; of every other one the error stays
far below half a code.

A request's buffer: the row of each pair, int32 [P]; then peaks float32 [T, C / group] and codes int8 [T, C]; or, where
group is 0, float32 [T, C].
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types

from moray.runtime.kernels.atomics import address_of
from moray.runtime.kernels.router import pointer
from moray.runtime.kernels.setup import FLOATS, entry

_MOST = np.float32(127)
_MAX_FINITE_BITS = np.int32(0x7F7FFFFF)
_BUFFER = types.uint8[::1]


@njit(inline="always")
def _views(buffer, num_pairs, shape, group):
    """The parts of a buffer: rows, peaks and codes; and all behind the rows as float32."""
    num_rows, columns = shape
    num_groups = columns // group if group else 0
    at = address_of(buffer)
    rest = at + 4 * num_pairs
    rows = carray(pointer(at, np.int32(0)), (num_pairs,))
    peaks = carray(pointer(rest, np.float32(0)), (num_rows, num_groups))
    codes = carray(pointer(rest + 4 * num_rows * num_groups, np.int8(0)), shape)
    return rows, peaks, codes, carray(pointer(rest, np.float32(0)), shape)


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize(x, group, codes, peaks):
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
def _restore(codes, peaks, group, x):
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


@entry("row_of_pair", x=FLOATS, buffer=_BUFFER)
def write_request(x, row_of_pair, group, buffer):
    """Fill a buffer, as large as it must be, with rows x float32 [T, C] and ``row_of_pair`` int64 [P].

    A peak is NaN if its group is not finite, and 0 if it is too small to be anything else in int8.
    """
    rows, peaks, codes, plain = _views(buffer, row_of_pair.shape[0], x.shape, group)
    for pair in range(row_of_pair.shape[0]):
        rows[pair] = row_of_pair[pair]
    if group:
        _quantize(x, group, codes, peaks)
    else:
        plain[:] = x


@entry("row_of_pair", buffer=_BUFFER, x=FLOATS)
def read_request(buffer, group, row_of_pair, x):
    """Fill rows x float32 [T, C] and ``row_of_pair`` int64 [P] from a buffer of exactly that.

    False: a pair takes a row that there is not.
    """
    rows, peaks, codes, plain = _views(buffer, row_of_pair.shape[0], x.shape, group)
    for pair in range(row_of_pair.shape[0]):
        row_of_pair[pair] = rows[pair]
        if not 0 <= rows[pair] < x.shape[0]:
            return False
    if group:
        _restore(codes, peaks, group, x)
    else:
        x[:] = plain
    return True
