"""Activations of class int8: quantization, SwiGLU and the weighted sum, in strict float32.

Every operation is a single correctly rounded float32 operation in a stated order, so NumPy gives the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from moray.runtime.kernels.simd import float_from_bits

LOG2E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Coefficients of exp on [-ln2/2, ln2/2] (Cephes, expf).
EXP_C = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
C0, C1, C2, C3, C4, C5 = EXP_C
EXP_MIN, EXP_MAX = np.float32(-87.0), np.float32(88.0)
# Fewer values than this are done by the calling thread: waking the others takes longer.
SERIAL_VALUES = 1 << 15
ONE, LIMIT, MAX_FINITE = np.float32(1.0), np.float32(127.0), np.float32(3.4028235e38)


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize_row(p, x, group, xq, xs, xsum):
    for g in range(x.shape[1] // group):
        first = g * group
        largest, finite = np.float32(0.0), True
        for c in range(first, first + group):
            magnitude = abs(x[p, c])
            finite = finite and magnitude <= MAX_FINITE
            largest = max(largest, magnitude)
        inverse = LIMIT / largest
        total = np.int32(0)
        if finite and inverse <= MAX_FINITE:
            for c in range(first, first + group):
                q = np.int8(np.rint(x[p, c] * inverse))
                xq[p, c] = q
                total += np.int32(q)
            xs[p, g] = largest / LIMIT
        else:
            for c in range(first, first + group):
                xq[p, c] = 0
            xs[p, g] = np.float32(0.0) if finite else np.float32(np.nan)
        xsum[p, g] = total


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _quantize_parallel(x, group, xq, xs, xsum):
    for p in prange(x.shape[0]):
        _quantize_row(p, x, group, xq, xs, xsum)


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_rows(x, group, xq, xs, xsum):
    """Symmetric int8 per group of columns, round half to even.

    x: float32 [P, C]. Written: xq int8 [P, C], xs float32 [P, G] (largest magnitude / 127), xsum int32 [P, G] (sum
    of xq). A group with a NaN or Inf gets scale NaN, so that the outputs that use it are NaN too.
    """
    if x.size < SERIAL_VALUES:
        for p in range(x.shape[0]):
            _quantize_row(p, x, group, xq, xs, xsum)
    else:
        _quantize_parallel(x, group, xq, xs, xsum)


@njit(nogil=True, cache=True, forceinline=True, error_model="numpy")
def _exp(x):
    n = np.rint(x * LOG2E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    y = C0
    y = y * r + C1
    y = y * r + C2
    y = y * r + C3
    y = y * r + C4
    y = y * r + C5
    y = (y * (r * r) + r) + ONE
    return y * float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(nogil=True, cache=True, error_model="numpy")
def _swiglu_row(p, gate_up, h):
    width = gate_up.shape[1] // 2
    for c in range(width):
        gate, up = gate_up[p, c], gate_up[p, width + c]
        if gate == gate:
            e = _exp(min(max(-gate, EXP_MIN), EXP_MAX))
            h[p, c] = (gate / (ONE + e)) * up
        else:
            h[p, c] = gate
    for c in range(width, h.shape[1]):
        h[p, c] = np.float32(0.0)


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _swiglu_parallel(gate_up, h):
    for p in prange(h.shape[0]):
        _swiglu_row(p, gate_up, h)


@njit(nogil=True, cache=True, error_model="numpy")
def swiglu(gate_up, h):
    """h = silu(gate) * up. gate_up: float32 [P, 2 I], gates first; h: float32 [P, >= I], written, zeros after I."""
    if h.size < SERIAL_VALUES:
        for p in range(h.shape[0]):
            _swiglu_row(p, gate_up, h)
    else:
        _swiglu_parallel(gate_up, h)


@njit(nogil=True, cache=True)
def _combine_token(t, y, positions, weights, out):
    for c in range(out.shape[1]):
        out[t, c] = np.float32(0.0)
    for k in range(positions.shape[1]):
        p = positions[t, k]
        if p >= 0:
            w = weights[t, k]
            for c in range(out.shape[1]):
                out[t, c] = out[t, c] + w * y[p, c]


@njit(nogil=True, cache=True, parallel=True)
def _combine_parallel(y, positions, weights, out):
    for t in prange(out.shape[0]):
        _combine_token(t, y, positions, weights, out)


@njit(nogil=True, cache=True)
def combine(y, positions, weights, out):
    """out[t] = sum over k, in the router's order, of weights[t, k] * y[positions[t, k]].

    y: float32 [P, H]; positions: int64 [T, K] (negative: skip); weights: float32 [T, K]; out: float32 [T, H], written.
    """
    if y.size < SERIAL_VALUES:
        for t in range(out.shape[0]):
            _combine_token(t, y, positions, weights, out)
    else:
        _combine_parallel(y, positions, weights, out)
