from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.matrices import second_level_grid, specs
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.runtime.kernels import dequantize, reference
from moray.runtime.layout import second_level
from moray.runtime.layout.packed import (
    ENCODINGS,
    ROWS,
    SCALE_FACTOR,
    VECTOR_BYTES,
    PackedSpec,
    Quantized,
    choose_group,
    is_legal_group,
    pack_fp4,
    pack_plain,
    pack_quantized,
    unpack_fp4,
    unpack_plain,
    unpack_quantized,
)

BITS = {"q8": 8, "q4": 4, "q3": 3, "q2": 2}


@st.composite
def quantized_specs(draw: st.DrawFn) -> PackedSpec:
    encoding = draw(st.sampled_from(sorted(BITS)))
    group = draw(st.sampled_from([g for g in range(16, 145) if is_legal_group(g, g, BITS[encoding])]))
    return PackedSpec(draw(st.integers(1, 40)), group * draw(st.integers(1, 4)), encoding, group)


def random_quantized(spec: PackedSpec, seed: int) -> Quantized:
    rng = np.random.default_rng(seed)
    shape = (spec.rows, spec.num_groups)
    scales = rng.standard_normal(shape).astype(np.float16).astype(np.float32) * np.float32(SCALE_FACTOR)
    zeros = rng.uniform(-20, 20, shape).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 1 << spec.bits, (spec.rows, spec.columns), dtype=np.uint8)
    return Quantized(codes, scales, zeros)


@settings(max_examples=60, deadline=None)
@given(quantized_specs(), st.integers(0, 2**31))
def test_quantized_matrices_survive_packing(spec: PackedSpec, seed: int) -> None:
    quantized = random_quantized(spec, seed)
    packed = pack_quantized(quantized, spec)
    assert packed.nbytes == spec.num_bytes and spec.num_bytes % VECTOR_BYTES == 0
    unpacked = unpack_quantized(packed, spec)
    np.testing.assert_array_equal(unpacked.codes, quantized.codes)
    np.testing.assert_array_equal(unpacked.scales, quantized.scales)
    np.testing.assert_array_equal(unpacked.zeros, quantized.zeros)


@settings(max_examples=30, deadline=None)
@given(quantized_specs(), st.integers(0, 2**31))
def test_every_code_lies_where_the_format_says(spec: PackedSpec, seed: int) -> None:
    quantized = random_quantized(spec, seed)
    packed = pack_quantized(quantized, spec).reshape(spec.num_blocks, spec.block_bytes)
    rng = np.random.default_rng(seed)
    for row, column in zip(rng.integers(0, spec.rows, 20), rng.integers(0, spec.columns, 20), strict=True):
        block, lane = divmod(int(row), ROWS)
        group, inside = divmod(int(column), spec.group)
        assert code_at(packed[block], spec, lane, group, inside) == quantized.codes[row, column]


def code_at(block: np.ndarray, spec: PackedSpec, lane: int, group: int, inside: int) -> int:
    """A code of a row block, found by the words of the layout's docstring."""
    start = group * (ROWS * spec.group * spec.bits // 8)
    quad, byte = divmod(inside, 4)
    value = shift = 0
    for bits in (2, 1) if spec.bits == 3 else (spec.bits,):
        vectors = spec.group * bits // 32
        vector = block[start + (quad % vectors) * VECTOR_BYTES :]
        field = int(vector[lane * 4 + byte]) >> (bits * (quad // vectors))
        value |= (field & ((1 << bits) - 1)) << shift
        start, shift = start + vectors * VECTOR_BYTES, shift + bits
    return value


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["f32", "bf16", "f16"]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_plain_matrices_survive_packing(encoding: str, rows: int, columns: int, seed: int) -> None:
    spec = PackedSpec(rows, columns, encoding)
    kinds = {"f32": np.float32, "bf16": np.uint16, "f16": np.float16}
    matrix = (np.random.default_rng(seed).standard_normal((rows, columns)) * 1000).astype(kinds[encoding])
    packed = pack_plain(matrix, spec)
    assert packed.nbytes == spec.num_bytes
    unpacked = unpack_plain(packed, spec)
    assert unpacked.dtype == matrix.dtype
    np.testing.assert_array_equal(unpacked, matrix)


def test_rows_that_do_not_fill_a_block_are_zeros_with_zero_scales() -> None:
    spec = PackedSpec(3, 64, "q4", 64)
    whole = PackedSpec(16, 64, "q4", 64)
    padded = unpack_quantized(pack_quantized(random_quantized(spec, 0), spec), whole)
    assert not padded.codes[3:].any() and not padded.scales[3:].any()


@given(st.integers(16, 256), st.integers(1, 5000), st.sampled_from([8, 4, 3, 2]))
def test_chosen_groups_are_legal_and_the_largest(wanted: int, columns: int, bits: int) -> None:
    group = choose_group(wanted, columns, bits)
    assert group == 0 or is_legal_group(group, columns, bits)
    assert not any(is_legal_group(larger, columns, bits) for larger in range(group + 1, wanted + 1))


@pytest.mark.parametrize(
    ("columns", "wanted", "group"), [(4096, 64, 64), (2880, 128, 120), (704, 128, 88), (1407, 64, 0), (7688, 64, 0)]
)
def test_groups_of_real_row_lengths(columns: int, wanted: int, group: int) -> None:
    assert choose_group(wanted, columns, 4) == group


@pytest.mark.parametrize("value", [1e3, np.inf, np.nan])
def test_what_does_not_fit_float16_is_refused(value: float) -> None:
    spec = PackedSpec(1, 64, "q4", 64)
    quantized = random_quantized(spec, 0)
    quantized.scales[0, 0] = value
    with pytest.raises(OverflowError):
        pack_quantized(quantized, spec)


# -------------------------------------------------------------------------- second-level scales

second_level_specs = specs(("q4", "q3", "q2"), ("u8",))


def random_second_level(spec: PackedSpec, seed: int) -> Quantized:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << spec.bits, (spec.rows, spec.columns), dtype=np.uint8)
    return Quantized(codes, *second_level_grid(spec, rng))


@settings(max_examples=80, deadline=None)
@given(second_level_specs, st.integers(0, 2**31))
def test_second_level_scales_survive_packing(spec: PackedSpec, seed: int) -> None:
    quantized = random_second_level(spec, seed)
    packed = pack_quantized(quantized, spec)
    groups = spec.num_groups
    assert spec.meta_bytes == -(-(32 * groups + 32 * -(-groups // 16)) // 64) * 64
    assert packed.nbytes == spec.num_bytes and spec.block_bytes == spec.code_bytes + spec.meta_bytes
    unpacked = unpack_quantized(packed, spec)
    np.testing.assert_array_equal(unpacked.codes, quantized.codes)
    np.testing.assert_array_equal(unpacked.scales, quantized.scales)
    np.testing.assert_array_equal(unpacked.zeros, quantized.zeros)


@settings(max_examples=40, deadline=None)
@given(second_level_specs, st.integers(0, 2**31))
def test_second_level_scales_lie_where_the_format_says(spec: PackedSpec, seed: int) -> None:
    quantized = random_second_level(spec, seed)
    blocks = pack_quantized(quantized, spec).reshape(spec.num_blocks, spec.block_bytes)
    end = spec.code_bytes + 32 * spec.num_groups
    for row in range(spec.num_blocks * ROWS):
        block, lane = blocks[row // ROWS], row % ROWS
        scale_codes = block[spec.code_bytes + lane : end : 32].astype(np.float64)
        zero_codes = block[spec.code_bytes + 16 + lane : end : 32].astype(np.float64)
        supers = block[end : end + 32 * second_level.num_supers(spec.num_groups)].view(np.float16)[lane::16]
        if row >= spec.rows:
            assert not scale_codes.any() and not zero_codes.any() and not supers.any()
            continue
        wide = np.repeat(supers.astype(np.float64), 16)[: spec.num_groups]
        np.testing.assert_array_equal(scale_codes * wide * 2.0**-16, quantized.scales[row])
        zeros = zero_codes * 2.0 ** (spec.bits - 7) - 2.0 ** (spec.bits - 1)
        np.testing.assert_array_equal(zeros, quantized.zeros[row])
    padding = blocks[:, end + 32 * second_level.num_supers(spec.num_groups) :]
    assert not padding.any() and padding.shape[1] < VECTOR_BYTES


@settings(max_examples=40, deadline=None)
@given(second_level_specs, st.integers(0, 2**31))
def test_torch_reads_second_level_scales_as_the_reference_does(spec: PackedSpec, seed: int) -> None:
    quantized = random_second_level(spec, seed)
    packed = pack_quantized(quantized, spec)
    expected = torch.from_numpy(reference.dequantize(packed, spec))
    tensor = torch.from_numpy(packed)
    assert torch.equal(dequantize.dequantize(tensor, spec, torch.float32), expected)
    assert torch.equal(dequantize.dequantize(tensor, spec, torch.bfloat16), expected.bfloat16())
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, spec.rows, 7))
    assert torch.equal(dequantize.dequantize_rows(tensor, spec, rows, torch.float32), expected[rows])


@settings(max_examples=40, deadline=None)
@given(second_level_specs, st.data())
def test_any_second_level_bytes_are_packed_again(spec: PackedSpec, data: st.DataObject) -> None:
    """What can be stored can be packed: grids are found again from their values alone."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    packed = rng.integers(0, 256, (spec.num_blocks, spec.block_bytes), dtype=np.uint8)
    end = spec.code_bytes + 32 * spec.num_groups
    supers = packed[:, end : end + 32 * second_level.num_supers(spec.num_groups)]
    supers[:, 1::2] &= 0x7B  # not negative, not infinite, not a NaN
    quantized = unpack_quantized(packed.reshape(-1), spec)
    again = unpack_quantized(pack_quantized(quantized, spec), spec)
    np.testing.assert_array_equal(again.scales, quantized.scales)
    np.testing.assert_array_equal(again.zeros, quantized.zeros)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_scale_and_zero_of_extreme_codes_are_exact(bits: int) -> None:
    supers = np.array([[65504], [2.0**-24], [0.333]], np.float16)
    codes = np.array([[255, 1, 0]] * 3, np.uint8)
    scales, zeros = second_level.decode(codes, codes, supers, bits)
    np.testing.assert_array_equal(scales, codes.astype(np.float64) * supers.astype(np.float64) * 2.0**-16)
    highest, lowest = 1.5 * 2**bits - 2.0 ** (bits - 7), -(2.0 ** (bits - 1))
    assert zeros[0, 0] == highest == second_level.highest_zero(bits)
    assert zeros[0, 2] == lowest == second_level.lowest_zero(bits)


@pytest.mark.parametrize(
    ("what", "value"),
    [("scales", v) for v in (-1.0, 255.0, np.inf, np.nan, 1e-9, 0.1)]
    + [("zeros", v) for v in (0.01, -8.125, 24.0, np.inf, np.nan)],
)
def test_grids_that_second_level_scales_cannot_hold_are_refused(what: str, value: float) -> None:
    spec = PackedSpec(3, 256, "q4", 64, "u8")
    quantized = Quantized(
        np.zeros((3, 256), np.uint8), np.full((3, 4), 2.0**-8, np.float32), np.ones((3, 4), np.float32)
    )
    pack_quantized(quantized, spec)
    getattr(quantized, what)[1, 2] = value
    with pytest.raises(OverflowError):
        pack_quantized(quantized, spec)


@pytest.mark.parametrize("arguments", [("q8", 64, "u8"), ("f32", 0, "u8"), ("f16", 0, "u8"), ("q4", 64, "u4")])
def test_metas_that_do_not_exist_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"second-level|unknown meta 'u4', expected one of f16, u8"):
        PackedSpec(16, 64, *arguments)


# ------------------------------------------------------------------------------------------ fp4


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_fp4_lies_as_q4_does_with_a_scale_byte_a_group(rows: int) -> None:
    rng = np.random.default_rng(rows)
    spec, as_q4 = PackedSpec(rows, 160, "fp4", 32, "e8m0"), PackedSpec(rows, 160, "q4", 32)
    codes, exponents = rng.integers(0, 16, (rows, 160), np.uint8), rng.integers(1, 255, (rows, 5), np.uint8)
    packed = pack_fp4(codes, exponents, spec)
    blocks = packed.reshape(spec.num_blocks, spec.block_bytes)
    assert spec.block_bytes == 16 * 160 // 2 + 128  # 5 groups of 16 bytes, then zeros up to a multiple of 64
    ones = np.ones((rows, 5), np.float32)
    like = pack_quantized(Quantized(codes, ones, ones), as_q4).reshape(spec.num_blocks, as_q4.block_bytes)
    np.testing.assert_array_equal(blocks[:, : spec.code_bytes], like[:, : spec.code_bytes])
    meta = blocks[:, spec.code_bytes :]
    for r, g in np.ndindex(rows, 5):
        assert meta[r // 16, 16 * g + r % 16] == exponents[r, g]
    assert not meta[:, 80:].any() and not meta[-1, :80].reshape(5, 16)[:, (rows - 1) % 16 + 1 :].any()
    for got, wanted in zip(unpack_fp4(packed, spec), (codes, exponents), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("exponent", "code"), [(255, 0), (0, 1), (0, 15)])
def test_fp4_scales_that_do_not_exist_are_refused(exponent: int, code: int) -> None:
    spec = PackedSpec(3, 32, "fp4", 32, "e8m0")
    codes, exponents = np.full((3, 32), code, np.uint8), np.full((3, 1), 127, np.uint8)
    pack_fp4(codes, exponents, spec)
    exponents[1] = exponent
    with pytest.raises(OverflowError):
        pack_fp4(codes, exponents, spec)


@pytest.mark.parametrize("arguments", [("fp4", 32), ("fp4", 32, "u8"), ("q4", 32, "e8m0"), ("fp4", 20, "e8m0")])
def test_fp4_goes_with_its_own_meta(arguments: tuple) -> None:
    with pytest.raises(ValueError):
        PackedSpec(16, 160, *arguments)


# ---------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    "arguments",
    [(0, 4, "f32"), (4, 0, "f32"), (4, 64, "q5", 64), (4, 64, "q4", 0), (4, 60, "q4", 64), (4, 4, "f32", 4)],
)
def test_impossible_specs_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError):
        PackedSpec(*arguments)


def test_encodings_have_one_name_each() -> None:
    assert len(set(ENCODINGS)) == 8
