from __future__ import annotations

import numpy as np
import pytest
import torch
from hqq.core.quantize import Quantizer

from moray.runtime.convert.quantize import dequantize_rows, quantize_rows
from moray.runtime.layout.packed import PackedSpec, Quantized, pack_quantized, unpack_quantized

SCHEMES = [(8, 64), (4, 64), (3, 64), (2, 16)]


def gaussian(rows: int, columns: int, std: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


def relative_error(matrix: torch.Tensor, quantized: Quantized) -> float:
    return ((dequantize_rows(quantized) - matrix).norm() / matrix.norm()).item()


def hqq_error(matrix: torch.Tensor, bits: int, group: int) -> float:
    """Of hqq itself, given the whole tensor at once."""
    codes, meta = Quantizer.quantize(matrix, nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu")
    return (
        ((codes - meta["zero"]) * meta["scale"]).reshape(matrix.shape) - matrix
    ).norm().item() / matrix.norm().item()


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_as_good_as_hqq_on_the_whole_tensor(bits: int, group: int) -> None:
    matrix = gaussian(256, 1024, 0.02)
    assert relative_error(matrix, quantize_rows(matrix, bits, group)) < 1.01 * hqq_error(matrix, bits, group)


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_the_magnitude_of_weights_does_not_matter(bits: int, group: int) -> None:
    errors = [
        relative_error(matrix, quantize_rows(matrix, bits, group))
        for matrix in (gaussian(64, 512, std) for std in (1e-5, 1e-4, 0.02, 1.0, 50.0))
    ]
    assert max(errors) < 1.02 * min(errors)


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_powers_of_two_change_scales_only(bits: int, group: int) -> None:
    matrix = gaussian(16, 256, 0.02)
    one, other = quantize_rows(matrix, bits, group), quantize_rows(matrix * 64, bits, group)
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scales * 64, other.scales)
    np.testing.assert_array_equal(one.zeros, other.zeros)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("value", [0.0, 0.3, -5.0, 1e-6, 200.0])
def test_constant_groups_are_kept(bits: int, value: float) -> None:
    matrix = gaussian(4, 128, 0.02)
    matrix[1, :64] = value
    matrix[2] = value
    restored = dequantize_rows(quantize_rows(matrix, bits, 64))
    torch.testing.assert_close(restored[1, :64], matrix[1, :64], rtol=2**-11, atol=1e-9)
    torch.testing.assert_close(restored[2], matrix[2], rtol=2**-11, atol=1e-9)
    assert (restored[0] != 0).any()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("center", [1.0, -70.0])
def test_groups_far_from_zero_keep_their_place(bits: int, center: float) -> None:
    matrix = center + gaussian(8, 64, abs(center) * 1e-4)
    quantized = quantize_rows(matrix, bits, 64)
    assert np.abs(quantized.zeros).max() <= 512
    assert relative_error(matrix, quantized) < 2e-3


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_packing_loses_nothing(bits: int, group: int) -> None:
    matrix = gaussian(20, 256, 0.02)
    matrix[3] = 0.5
    matrix[4] += 1
    quantized = quantize_rows(matrix, bits, group)
    spec = PackedSpec(20, 256, {8: "q8", 4: "q4", 3: "q3", 2: "q2"}[bits], group)
    unpacked = unpack_quantized(pack_quantized(quantized, spec), spec)
    np.testing.assert_array_equal(unpacked.codes, quantized.codes)
    np.testing.assert_array_equal(unpacked.scales, quantized.scales)
    np.testing.assert_array_equal(unpacked.zeros, quantized.zeros)


def test_one_outlier_spoils_its_own_group_only() -> None:
    matrix = gaussian(16, 256, 0.02)
    clean = dequantize_rows(quantize_rows(matrix, 4, 64))
    matrix[0, 0] = 1000.0
    spoiled = dequantize_rows(quantize_rows(matrix, 4, 64))
    torch.testing.assert_close(spoiled[1:], clean[1:], rtol=0.1, atol=5e-3)
    torch.testing.assert_close(spoiled[0, 64:], clean[0, 64:], rtol=0.1, atol=5e-3)
    assert spoiled[0, 0] == pytest.approx(1000, rel=0.05)


def test_weights_too_large_for_the_layout_are_refused() -> None:
    quantized = quantize_rows(gaussian(16, 64, 1e5), 4, 64)
    with pytest.raises(OverflowError):
        pack_quantized(quantized, PackedSpec(16, 64, "q4", 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_taken(dtype: torch.dtype) -> None:
    matrix = gaussian(16, 64, 0.02).to(dtype)
    assert relative_error(matrix.float(), quantize_rows(matrix, 8, 64)) < 0.006
