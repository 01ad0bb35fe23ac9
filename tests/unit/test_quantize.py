from __future__ import annotations

import numpy as np
import pytest
import torch
from hqq.core.quantize import Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.runtime.convert.quantize import dequantize_rows, quantize_rows
from moray.runtime.layout.packed import Encoding, Meta, PackedSpec, Quantized, pack_quantized, unpack_quantized

SCHEMES: list[tuple[int, int, Meta]] = [
    (8, 64, "f16"),
    (4, 64, "f16"),
    (3, 64, "f16"),
    (2, 16, "f16"),
    (4, 64, "u8"),
    (3, 64, "u8"),
    (2, 16, "u8"),
]
ENCODINGS: dict[int, Encoding] = {8: "q8", 4: "q4", 3: "q3", 2: "q2"}


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


def assert_packs_exactly(quantized: Quantized, bits: int, group: int, meta: Meta) -> None:
    spec = PackedSpec(*quantized.codes.shape, ENCODINGS[bits], group, meta)
    unpacked = unpack_quantized(pack_quantized(quantized, spec), spec)
    np.testing.assert_array_equal(unpacked.codes, quantized.codes)
    np.testing.assert_array_equal(unpacked.scales, quantized.scales)
    np.testing.assert_array_equal(unpacked.zeros, quantized.zeros)


@pytest.mark.parametrize(("bits", "group", "meta"), SCHEMES)
def test_better_than_hqq_on_the_whole_tensor(bits: int, group: int, meta: Meta) -> None:
    matrix = gaussian(256, 1024, 0.02)
    assert relative_error(matrix, quantize_rows(matrix, bits, group, meta)) < hqq_error(matrix, bits, group)


@pytest.mark.parametrize(("bits", "group", "meta"), SCHEMES)
def test_the_magnitude_of_weights_does_not_matter(bits: int, group: int, meta: Meta) -> None:
    errors = [
        relative_error(matrix, quantize_rows(matrix, bits, group, meta))
        for matrix in (gaussian(64, 512, std) for std in (1e-5, 1e-4, 0.02, 1.0, 50.0))
    ]
    assert max(errors) < 1.02 * min(errors)


@pytest.mark.parametrize(("bits", "group", "meta"), SCHEMES)
def test_powers_of_two_change_scales_only(bits: int, group: int, meta: Meta) -> None:
    matrix = gaussian(16, 256, 0.02)
    one, other = quantize_rows(matrix, bits, group, meta), quantize_rows(matrix * 64, bits, group, meta)
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


@pytest.mark.parametrize(("bits", "group", "meta"), SCHEMES)
def test_packing_loses_nothing(bits: int, group: int, meta: Meta) -> None:
    matrix = gaussian(20, 256, 0.02)
    matrix[3] = 0.5
    matrix[4] += 1
    assert_packs_exactly(quantize_rows(matrix, bits, group, meta), bits, group, meta)


def test_one_outlier_spoils_its_own_group_only() -> None:
    matrix = gaussian(16, 256, 0.02)
    clean = dequantize_rows(quantize_rows(matrix, 4, 64))
    matrix[0, 0] = 1000.0
    spoiled = dequantize_rows(quantize_rows(matrix, 4, 64))
    torch.testing.assert_close(spoiled[1:], clean[1:], rtol=0.1, atol=5e-3)
    torch.testing.assert_close(spoiled[0, 64:], clean[0, 64:], rtol=0.1, atol=5e-3)
    assert spoiled[0, 0] == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize("meta", ["f16", "u8"])
def test_weights_too_large_for_the_layout_are_refused(meta: Meta) -> None:
    quantized = quantize_rows(gaussian(16, 64, 1e5), 4, 64, meta)
    with pytest.raises(OverflowError):
        pack_quantized(quantized, PackedSpec(16, 64, "q4", 64, meta))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_taken(dtype: torch.dtype) -> None:
    matrix = gaussian(16, 64, 0.02).to(dtype)
    assert relative_error(matrix.float(), quantize_rows(matrix, 8, 64)) < 0.006


# -------------------------------------------------------------------------- second-level scales


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 64), (2, 16)])
def test_second_level_scales_cost_little(bits: int, group: int) -> None:
    matrix = gaussian(64, 1024, 0.02)
    halves, codes = (relative_error(matrix, quantize_rows(matrix, bits, group, meta)) for meta in ("f16", "u8"))
    assert codes < 1.01 * halves


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("value", [0.0, 0.03, -0.05, 1e-6, -1e-6])
def test_constant_groups_do_not_spoil_their_super_block(bits: int, value: float) -> None:
    matrix = gaussian(4, 1024, 0.02)
    clean = quantize_rows(matrix, bits, 64, "u8")
    changed = matrix.clone()
    changed[1, 64:128] = value
    quantized = quantize_rows(changed, bits, 64, "u8")
    assert (dequantize_rows(quantized)[1, 64:128] - value).abs().max() < max(abs(value) / 128, 1e-4)
    others = torch.ones(4, 1024, dtype=torch.bool)
    others[1, 64:128] = False
    errors = [(dequantize_rows(q) - matrix)[others].norm() for q in (clean, quantized)]
    assert errors[1] < 1.01 * errors[0]
    if value == 0:
        assert quantized.scales[1, 1] == 0


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_rows_of_zeros_have_no_scales(bits: int) -> None:
    quantized = quantize_rows(torch.zeros(3, 128), bits, 64, "u8")
    assert not quantized.scales.any() and not dequantize_rows(quantized).any()
    assert_packs_exactly(quantized, bits, 64, "u8")


GROUP_KINDS = ("gaussian", "zero", "constant", "far", "skewed", "outlier", "tiny", "two values")


def group_of_kind(kind: str, size: int, std: float, rng: np.random.Generator) -> np.ndarray:
    weights = rng.standard_normal(size) * std
    if kind == "zero":
        return np.zeros(size)
    if kind == "constant":
        return np.full(size, weights[0])
    if kind == "far":
        return weights[0] + weights * 1e-3
    if kind == "skewed":
        return np.abs(weights) * np.sign(weights[0]) + weights[1]
    if kind == "outlier":
        weights[rng.integers(size)] *= 50
    if kind == "tiny":
        return weights * 1e-6
    if kind == "two values":
        return np.where(rng.random(size) < 0.5, weights[0], weights[1])
    return weights


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(4, 64), (4, 16), (3, 64), (3, 32), (2, 16), (2, 64)]),
    st.lists(st.sampled_from(GROUP_KINDS), min_size=1, max_size=40),
    st.sampled_from([1e-7, 1e-5, 0.02, 1.0, 3.0]),
    st.integers(0, 2**31),
)
def test_any_groups_pack_exactly_and_stay_near_float16(
    scheme: tuple[int, int], kinds: list[str], std: float, seed: int
) -> None:
    bits, group = scheme
    rng = np.random.default_rng(seed)
    rows = [np.concatenate([group_of_kind(kind, group, std, rng) for kind in kinds]) for _ in range(3)]
    matrix = torch.from_numpy(np.array(rows)).float()
    halves, codes = (quantize_rows(matrix, bits, group, meta) for meta in ("f16", "u8"))
    assert_packs_exactly(codes, bits, group, "u8")
    assert (codes.scales >= 0).all()
    step = 1 / (1.5 * 2**bits - 1)  # of a grid from the lowest zero up to the largest weight, as a part of it
    for start in range(0, matrix.shape[1], 16 * group):  # a super block
        part = slice(start, start + 16 * group)
        errors = [(dequantize_rows(q) - matrix)[:, part].square().mean(dim=1).sqrt() for q in (halves, codes)]
        largest = matrix[:, part].abs().amax(dim=1)
        assert (errors[1] <= 1.1 * errors[0] + (step / 2 + 1 / 256) * largest + 1e-12).all()
