"""Weights read back: with torch, row by row, by kernels."""

from __future__ import annotations

import numpy as np
import torch
from helpers.kernels import seeds
from helpers.matrices import assert_same_bits, random_matrix, specs
from hypothesis import given, settings

from moray.runtime.kernels import ops, reference
from moray.runtime.kernels.dequantize import dequantize, dequantize_rows
from moray.runtime.kernels.lookup import lookup
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.layout.packed import ENCODINGS, METAS, PackedSpec, pack_fp4, pack_plain


@settings(max_examples=80, deadline=None)
@given(specs(ENCODINGS, METAS), seeds)
def test_torch_dequantizes_as_the_reference_does(spec: PackedSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = random_matrix(spec, rng)
    expected = torch.from_numpy(reference.dequantize(packed, spec))
    weights = dequantize(torch.from_numpy(packed), spec, torch.float32)
    assert torch.equal(weights, expected)
    rows = torch.from_numpy(rng.integers(0, spec.rows, 7))
    assert torch.equal(dequantize_rows(torch.from_numpy(packed), spec, rows, torch.float32), expected[rows])
    assert torch.equal(dequantize(torch.from_numpy(packed), spec, torch.bfloat16), expected.bfloat16())
    assert_same_bits(lookup(packed, spec, rows.numpy()), expected[rows].numpy())


def test_every_code_of_fp4_is_read_exactly_under_every_scale() -> None:
    """A row for each scale byte under which 6 is finite, with all sixteen codes twice."""
    spec = PackedSpec(253, 32, "fp4", 32, "e8m0")
    codes = np.tile(np.arange(16, dtype=np.uint8), (253, 2))
    exponents = np.arange(253, dtype=np.uint8)[:, None]
    codes[0] &= 8  # scale byte 0 stands for zeros
    packed = pack_fp4(codes, exponents, spec)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = (values[codes & 7] * np.exp2(exponents - 127.0) * np.where(codes & 8, -1, 1)).astype(np.float32)
    assert_same_bits(reference.dequantize(packed, spec), expected)
    assert torch.equal(dequantize(torch.from_numpy(packed), spec, torch.float32), torch.from_numpy(expected))
    assert_same_bits(lookup(packed, spec, np.arange(253)), expected)
    one_of_each = np.eye(32, dtype=np.float32)
    y = ops.linear(one_of_each, packed, MatrixKernel.of(spec, "float"))
    np.testing.assert_array_equal(y.T, expected)  # 0 + -0 is 0: not bit for bit
    with np.errstate(all="ignore"):
        wanted = reference.matmul(one_of_each, packed, spec)
    assert_same_bits(ops.linear(one_of_each, packed, MatrixKernel.of(spec, "int8")), wanted)


def test_every_16_bit_number_is_read_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bf16 = bits[(bits & 0x7F80) != 0x7F80]  # finite
    f16 = bits.view(np.float16)[np.isfinite(bits.view(np.float16))]
    for encoding, values, expected in (
        ("bf16", bf16, (bf16.astype(np.uint32) << 16).view(np.float32)),
        ("f16", f16, f16.astype(np.float32)),
    ):
        spec = PackedSpec(len(values), 1, encoding)
        packed = pack_plain(values[:, None], spec)
        y = ops.linear(np.ones((1, 1), np.float32), packed, MatrixKernel.of(spec, "float"))
        np.testing.assert_array_equal(y[0], expected)  # 0 + -0 is 0: not bit for bit
