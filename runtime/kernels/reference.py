"""Class ``int8`` stated in NumPy: the definition that every kernel must equal bit for bit.

Slow and plain on purpose. Shapes as in matmul.py. Every float operation is one float32 operation; ``fma`` is one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moray.runtime.arrays import Bytes, Floats
from moray.runtime.kernels import rows
from moray.runtime.layout import fp4
from moray.runtime.layout.packed import PackedSpec, unpack_fp4, unpack_plain, unpack_quantized


def dequantize(packed: Bytes, spec: PackedSpec) -> Floats:
    """The float32 [R, C] matrix that a packed one stands for."""
    if not spec.is_quantized:
        values = unpack_plain(packed, spec)
        if spec.encoding == "bf16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)
    shape = (spec.rows, spec.num_groups, spec.group)
    if spec.encoding == "fp4":
        codes, exponents = unpack_fp4(packed, spec)
        doubles = np.array(fp4.DOUBLES, dtype=np.float32)[codes].reshape(shape)
        return np.asarray(doubles * fp4.decode(exponents)[:, :, None]).reshape(spec.rows, spec.columns)
    q = unpack_quantized(packed, spec)
    weights: Floats = (q.codes.reshape(shape) - q.zeros[:, :, None]) * q.scales[:, :, None]
    return weights.reshape(spec.rows, spec.columns)


def quantize_activations(x_TC: Floats, group: int) -> tuple[npt.NDArray[np.int8], Floats, npt.NDArray[np.int32]]:
    """int8 codes [T, C], scales [T, G] and sums of codes [T, G]: symmetric per group, round half to even."""
    x = x_TC.reshape(len(x_TC), -1, group)
    largest = np.abs(x).max(axis=2)
    with np.errstate(all="ignore"):
        inverse = np.float32(127) / largest
        usable = np.isfinite(x).all(axis=2) & np.isfinite(inverse)
        codes = np.where(usable[:, :, None], np.rint(x * inverse[:, :, None]), 0).astype(np.int8)
    zero_or_nan = np.where(np.isfinite(x).all(axis=2), np.float32(0), np.float32(np.nan))
    scales = np.where(usable, largest / np.float32(127), zero_or_nan).astype(np.float32)
    return codes.reshape(x_TC.shape), scales, codes.sum(axis=2, dtype=np.int32)


def matmul(x_TC: Floats, packed: Bytes, spec: PackedSpec) -> Floats:
    """x @ W^T in class int8: exact integer dots, combined group after group in float32."""
    if not spec.is_quantized:
        return matmul_float(x_TC, packed, spec)
    codes, scales, sums = quantize_activations(x_TC, spec.group)
    q = unpack_quantized(packed, spec)
    y = np.zeros((len(x_TC), spec.rows), dtype=np.float32)
    for g in range(spec.num_groups):
        columns = slice(g * spec.group, (g + 1) * spec.group)
        dot = (codes[:, columns].astype(np.int32) @ q.codes[:, columns].astype(np.int32).T).astype(np.float32)
        centred = fma(-q.zeros[None, :, g], sums[:, g, None].astype(np.float32), dot)
        y = fma(centred, q.scales[None, :, g] * scales[:, g, None], y)
    return y


def matmul_float(x_TC: Floats, packed: Bytes, spec: PackedSpec) -> Floats:
    """x @ W^T column after column in float32: plain encodings in both classes."""
    weights = dequantize(packed, spec)
    y = np.zeros((len(x_TC), spec.rows), dtype=np.float32)
    for c in range(spec.columns):
        y = fma(x_TC[:, c, None], weights[None, :, c], y)
    return y + np.float32(0) if spec.bits == 16 and spec.columns % 2 else y  # padded: -0 becomes 0


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c rounded once, of float32.

    Products of float32 are exact in float64. Their sum with c is rounded to odd there, which makes the second rounding
    right (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + addend
        share = total - product
        error = (product - (total - share)) + (addend - share)
        is_rounded_to_even = (np.isfinite(error) & (error != 0)) & (total.view(np.int64) % 2 == 0)
        towards = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.asarray(np.where(is_rounded_to_even, towards, total).astype(np.float32))


def swiglu(gate: Floats, up: Floats) -> Floats:
    """silu(gate) * up with the exp of rows.py."""
    f, one = np.float32, np.float32(1)
    x: Floats = np.where(np.isnan(gate), f(0), np.clip(-gate, f(rows.EXP_MIN), f(rows.EXP_MAX)))
    n = np.rint(x * f(rows.LOG2E))
    r = (x - n * f(rows.LN2_HIGH)) - n * f(rows.LN2_LOW)
    y: Floats = np.full_like(x, f(rows.EXP_C[0]))
    for c in rows.EXP_C[1:]:
        y = y * r + f(c)
    y = (y * (r * r) + r) + one
    power = ((n.astype(np.int32) + 127) << 23).view(np.float32)
    return np.asarray((gate / (one + y * power)) * up, dtype=np.float32)
