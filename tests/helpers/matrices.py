"""Random packed matrices, and comparison bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from moray.runtime.layout.packed import (
    ENCODINGS,
    SCALE_FACTOR,
    Bytes,
    PackedSpec,
    Quantized,
    is_legal_group,
    pack_plain,
    pack_quantized,
)

Floats = npt.NDArray[np.float32]

BITS = {"q8": 8, "q4": 4, "q3": 3, "q2": 2}


def legal_groups(encoding: str) -> list[int]:
    return [group for group in range(16, 145) if is_legal_group(group, group, BITS[encoding])]


@st.composite
def specs(draw: st.DrawFn, encodings: tuple[str, ...] = ENCODINGS) -> PackedSpec:
    """Matrices of up to 40 x 40, or up to 4 groups a row; whole row blocks and tails, odd columns."""
    encoding = draw(st.sampled_from(encodings))
    rows = draw(st.integers(1, 40))
    if encoding not in BITS:
        return PackedSpec(rows, draw(st.integers(1, 40)), encoding)
    group = draw(st.sampled_from(legal_groups(encoding)))
    return PackedSpec(rows, group * draw(st.integers(1, 4)), encoding, group)


def random_matrix(spec: PackedSpec, rng: np.random.Generator) -> Bytes:
    """Packed: all codes with scales of about a thousandth, or normal values of the plain encoding."""
    if not spec.is_quantized:
        values = rng.standard_normal((spec.rows, spec.columns)).astype(np.float32)
        if spec.encoding == "bf16":
            return pack_plain((values.view(np.uint32) >> 16).astype(np.uint16), spec)
        return pack_plain(values.astype(np.float16 if spec.encoding == "f16" else np.float32), spec)
    meta = (spec.rows, spec.num_groups)
    scales = rng.uniform(0.1, 1, meta).astype(np.float16).astype(np.float32) * np.float32(SCALE_FACTOR)
    zeros = rng.uniform(0, 1 << spec.bits, meta).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 1 << spec.bits, (spec.rows, spec.columns), dtype=np.uint8)
    return pack_quantized(Quantized(codes, scales, zeros), spec)


def assert_same_bits(actual: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> None:
    """Equal to the last bit, the sign of zero included; one NaN is as good as another."""
    assert actual.dtype == expected.dtype == np.float32 and actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    a, b = np.ascontiguousarray(actual).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    np.testing.assert_array_equal(np.where(nan, 0, a), np.where(nan, 0, b))
