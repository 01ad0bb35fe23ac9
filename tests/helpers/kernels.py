"""Matrices of every encoding, for tests of kernels."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from helpers.matrices import COMPILED_GROUPS, specs
from hypothesis import strategies as st

from moray.runtime.arrays import Bytes, Floats, Ints
from moray.runtime.layout.packed import ENCODINGS, PackedSpec

# One matrix of every encoding, with several groups, a row tail and, in 16 bits, an odd row.
SPECS = [
    PackedSpec(37, 96, "q8", 32),
    PackedSpec(37, 192, "q4", 64),
    PackedSpec(37, 192, "q3", 64),
    PackedSpec(37, 64, "q2", 16),
    PackedSpec(37, 192, "q4", 32, "u8"),
    PackedSpec(37, 640, "q3", 32, "u8"),
    PackedSpec(37, 272, "q2", 16, "u8"),  # 17 groups: two super-scales a row
    PackedSpec(37, 160, "fp4", 32, "e8m0"),
    PackedSpec(37, 41, "bf16"),
    PackedSpec(37, 41, "f16"),
    PackedSpec(37, 41, "f32"),
]
QUANTIZED = [spec for spec in SPECS if spec.is_quantized]


def name_of(spec: PackedSpec) -> str:
    return spec.encoding + "-u8" * (spec.meta == "u8")


every_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)
every_quantized = pytest.mark.parametrize("spec", QUANTIZED, ids=name_of)
seeds = st.integers(0, 2**31)
compiled_specs = partial(specs, ENCODINGS, groups_of=COMPILED_GROUPS.__getitem__)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def addresses_of(matrices: list[Bytes]) -> Ints:
    return np.array([matrix.ctypes.data for matrix in matrices], dtype=np.int64)
