"""Random packed matrices, and comparison bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from moray.runtime.arrays import Floats
from moray.runtime.layout import second_level
from moray.runtime.layout.packed import (
    ENCODINGS,
    SCALE_FACTOR,
    SECOND_LEVEL_ENCODINGS,
    Bytes,
    Meta,
    PackedSpec,
    Quantized,
    is_legal_group,
    pack_fp4,
    pack_plain,
    pack_quantized,
)

BITS = {"q8": 8, "q4": 4, "q3": 3, "q2": 2, "fp4": 4}


#: All but fp4, whose codes are not steps of one size.
AFFINE = tuple(encoding for encoding in ENCODINGS if encoding != "fp4")

# Each group is compiled on its own, for about a second; one of each kind is enough for the kernels.
COMPILED_GROUPS = {"q8": [16, 20, 64], "q4": [24, 64], "q3": [32, 64], "q2": [16, 48], "fp4": [32]}


def legal_groups(encoding: str) -> list[int]:
    return [group for group in range(16, 145) if is_legal_group(group, group, BITS[encoding])]


@st.composite
def specs(
    draw: st.DrawFn,
    encodings: tuple[str, ...] = AFFINE,
    metas: tuple[Meta, ...] = ("f16",),
    groups_of: Callable[[str], list[int]] = legal_groups,
) -> PackedSpec:
    """Matrices of up to 40 x 40, or up to 4 groups a row (with second-level scales up to 40); tails, odd columns."""
    encoding = draw(st.sampled_from(encodings))
    rows = draw(st.integers(1, 40))
    if encoding not in BITS:
        return PackedSpec(rows, draw(st.integers(1, 40)), encoding)
    group = draw(st.sampled_from(groups_of(encoding)))
    if encoding == "fp4":
        return PackedSpec(rows, group * draw(st.integers(1, 6)), encoding, group, "e8m0")
    meta = (
        draw(st.sampled_from([meta for meta in metas if meta != "e8m0"]))
        if encoding in SECOND_LEVEL_ENCODINGS
        else "f16"
    )
    groups = draw(st.integers(1, 4) if meta == "f16" else st.sampled_from([1, 2, 3, 5, 15, 16, 17, 32, 40]))
    return PackedSpec(rows, group * groups, encoding, group, meta)


def second_level_grid(spec: PackedSpec, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Scales and zeros [R, G] of random codes, all 256 of them, and super-scales of which some are 0 or subnormal."""
    shape = (2, spec.rows, spec.num_groups)
    scale_codes, zero_codes = rng.integers(0, 256, shape, dtype=np.uint8)
    supers = rng.uniform(0.1, 1, (spec.rows, second_level.num_supers(spec.num_groups)))
    supers *= rng.choice([1, 1, 1, 1, 2.0**-20, 0, 2.0**12], supers.shape)
    return second_level.decode(scale_codes, zero_codes, supers.astype(np.float16), spec.bits)


def random_matrix(spec: PackedSpec, rng: np.random.Generator) -> Bytes:
    """Packed: all codes with scales of about a thousandth, or normal values of the plain encoding."""
    if not spec.is_quantized:
        values = rng.standard_normal((spec.rows, spec.columns)).astype(np.float32)
        if spec.encoding == "bf16":
            return pack_plain((values.view(np.uint32) >> 16).astype(np.uint16), spec)
        return pack_plain(values.astype(np.float16 if spec.encoding == "f16" else np.float32), spec)
    codes = rng.integers(0, 1 << spec.bits, (spec.rows, spec.columns), dtype=np.uint8)
    if spec.encoding == "fp4":
        return pack_fp4(codes, rng.integers(110, 124, (spec.rows, spec.num_groups), dtype=np.uint8), spec)
    if spec.meta == "u8":
        return pack_quantized(Quantized(codes, *second_level_grid(spec, rng)), spec)
    meta = (spec.rows, spec.num_groups)
    scales = rng.uniform(0.1, 1, meta).astype(np.float16).astype(np.float32) * np.float32(SCALE_FACTOR)
    zeros = rng.uniform(0, 1 << spec.bits, meta).astype(np.float16).astype(np.float32)
    return pack_quantized(Quantized(codes, scales, zeros), spec)


def assert_same_bits(actual: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> None:
    """Equal to the last bit, the sign of zero included; one NaN is as good as another."""
    assert actual.dtype == expected.dtype == np.float32 and actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    a, b = np.ascontiguousarray(actual).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    np.testing.assert_array_equal(np.where(nan, 0, a), np.where(nan, 0, b))
